"""Decoding: equal to the slowest possible decoder, choosing as it says, leaving all as it was.
Sampled responses are compared with a second definition in test_twin_la_dapo.py, what spans can be
fed in test_twin_evaluate.py.
"""

import contextlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_model import IMAGE, VIDEO, WIDE, log_softmax, make_batch

import latent_decode
from common import shared_prefix
from common.shared_prefix import DecodingCache
from latent_decode import Rule, choose, decode_slowly, generate
from model import LATENT_IDS

ROWS = [
    ["watch", IMAGE, "the ball"],
    [WIDE, "red"],
    ["which wall does it hit next ?"],
    ["up", VIDEO, IMAGE],
    ["left"],
    ["moves", WIDE, WIDE, "right down ?"],
]
EOS = "<|im_end|> red blue green"  # several, so that rows finish at many different lengths


@pytest.fixture
def eos(tokenizer):
    return tokenizer.convert_tokens_to_ids(EOS.split())


def shuffle(model, seed, head=False):
    """Other random words in and out, with loud span tokens: each seed decodes differently, with
    many spans.
    """
    c = model.config
    torch.manual_seed(seed)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
        model.lm_head.weight.normal_(std=0.4)
        model.lm_head.weight[c.latent_start_id] *= 3
        model.lm_head.weight[c.latent_end_id] *= 4
    if head:
        model.add_latent_head()
        torch.nn.init.normal_(model.latent_head.weight, std=0.1)
        torch.nn.init.normal_(model.latent_head.bias)
    return model


def spans(tokens, c):
    """Tokens of a row -> the number of latents in each closed span."""
    text = "".join(
        {c.latent_start_id: "S", c.latent_id: "z", c.latent_end_id: "E"}.get(t, "w") for t in tokens
    )
    return [len(z) for z in re.findall("S(z*)E", text)]


def rows_fed(model):
    """A list that gets the number of rows of each decoding step of the language model."""
    sizes = []

    def hook(module, args, inputs):
        if isinstance(inputs["prefix"], DecodingCache):
            sizes.append(len(inputs["inputs_embeds"]))

    model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    return sizes


@torch.no_grad()
def reference(model, prompt, max_new_tokens, max_latents, eos):
    """What `decode_slowly` says, with the log-probabilities of one forward over it: for
    `check_row`.
    """
    c, media = model.config, {k: v for k, v in prompt.items() if "pixel" in k or "grid" in k}
    tokens, latents = decode_slowly(model, prompt, max_new_tokens, max_latents, eos)
    ids = torch.cat([prompt["input_ids"], torch.tensor([tokens])], 1)
    out, at = model(ids, latents=latents, **media), slice(-len(tokens) - 1, -1)  # what predicts t
    fed = torch.tensor(tokens) == c.latent_id
    predicted = model.to_latent(out.hidden_states[-1][0, at][fed])
    torch.testing.assert_close(latents, predicted, atol=1e-4, rtol=0)  # z_{k+1} = h_{p+k}

    span, logprobs, sampled = None, [], []
    for t, logp in zip(tokens, log_softmax(out.logits[0, at])):
        go = t == c.latent_id
        assert span is None or go or t == c.latent_end_id  # nothing else can happen in a span
        sampled.append(span is None or span < max_latents)
        logprobs.append(sampled[-1] * (np.log1p(-np.exp(logp[c.latent_end_id])) if go else logp[t]))
        span = 0 if t == c.latent_start_id else span + 1 if go else None
    return tokens, latents, logprobs, sampled, "eos" if tokens[-1] in eos else "length"


def check_row(rollout, r, expected):
    """Row r of a rollout is what `reference` says, and padding after it."""
    tokens, latents, logprobs, sampled, finish = expected
    L = len(tokens)
    assert rollout.tokens[r, :L].tolist() == tokens
    assert (rollout.lengths[r].item(), rollout.finish[r]) == (L, finish)
    assert rollout.sampled[r, :L].tolist() == sampled and not rollout.sampled[r, L:].any()
    assert not rollout.logprobs[r][~rollout.sampled[r]].any()
    got = rollout.logprobs[r, :L].double()
    torch.testing.assert_close(got, torch.tensor(logprobs).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(rollout.latents[r], latents, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk, head", [(16, True), (3, False)])
def test_greedy_equals_the_slow_decoder(model, tokenizer, eos, monkeypatch, chunk, head):
    """Breaks if cache, padding, positions, the state machine, dropped rows or the record are
    wrong anywhere.
    """
    monkeypatch.setattr(latent_decode, "CHUNK", chunk)
    batch, sizes, happened, counts = make_batch(tokenizer, ROWS, "left"), rows_fed(model), set(), []
    for seed in range(4):
        shuffle(model, seed, head)
        sizes.clear()
        rollout = generate(model, batch, max_new_tokens=36, max_latents=3, eos_token_id=eos)
        if min(sizes) < 6:  # rows left, after a whole chunk, when half of them were done
            k = next(i for i, n in enumerate(sizes) if n < 6)
            assert sizes[k] <= 3 and k % chunk == 0
            happened.add("compaction")
        for r, row in enumerate(ROWS):
            expected = reference(model, make_batch(tokenizer, [row]), 36, 3, eos)
            check_row(rollout, r, expected)
            happened.add(expected[-1])
            counts.append(spans(expected[0], model.config))
    assert happened == {"compaction", "eos", "length"}
    assert {k for row in counts for k in row} == {0, 1, 2, 3}  # stopped at once, early and by force
    assert max(map(len, counts)) > 2


def test_limits_and_ends(model, tokenizer, eos):
    """Breaks if a limit is overstepped, max_latents = 0 leaves a latent, or the default end is
    not the model's.
    """
    batch, c = make_batch(tokenizer, ROWS, "left"), shuffle(model, 0).config
    r = generate(model, batch, max_new_tokens=17, eos_token_id=[])
    assert r.tokens.shape == (6, 17)
    assert r.finish == ["length"] * 6 and r.lengths.tolist() == [17] * 6

    r = generate(model, batch, max_new_tokens=40, max_latents=0, eos_token_id=eos)
    for i, row in enumerate(ROWS):
        check_row(r, i, reference(model, make_batch(tokenizer, [row]), 40, 0, eos))
    assert (r.tokens == c.latent_start_id).any() and all(z.shape == (0, 96) for z in r.latents)

    first = int(generate(model, batch, max_new_tokens=1).tokens[0, 0])
    assert first not in (c.latent_start_id, eos[0])
    assert generate(model, batch, max_new_tokens=20, eos_token_id=eos[0]).lengths[0] > 1
    model.generation_config.eos_token_id = [eos[0], first]  # now row 0 ends at once
    row = make_batch(tokenizer, [ROWS[0]])
    del row["attention_mask"]  # optional
    assert generate(model, row, max_new_tokens=20).lengths.tolist() == [1]


def test_pictures_are_looked_at_once(model, tokenizer):
    """Breaks if the vision tower runs again for another sample or another token."""
    patches = []
    model.model.visual.register_forward_pre_hook(lambda m, args: patches.append(len(args[0])))
    generate(model, make_batch(tokenizer, ROWS, "left"), max_new_tokens=3, n=3)
    assert patches == [2 * 16 + 3 * 12, 24]  # of all images, of the video


def test_sharing_what_is_equal_changes_nothing(model, tokenizer, eos):
    """Breaks if samples that part get a wrong row of the cache, or if nothing is shared."""
    batch, sizes = make_batch(tokenizer, ROWS, "left"), rows_fed(shuffle(model, 4))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)  # surer, so that samples stay together for a while
    how = dict(max_new_tokens=40, max_latents=3, temperature=1.0, top_p=0.95, n=6, eos_token_id=eos)
    runs = []
    for merge_equal in (False, True):
        sizes.clear()
        generator = torch.Generator().manual_seed(0)
        rollout = generate(model, batch, **how, merge_equal=merge_equal, generator=generator)
        runs.append((rollout, sizes[:]))
    (plain, all_rows), (shared, fewer) = runs
    assert torch.equal(plain.tokens, shared.tokens) and torch.equal(plain.sampled, shared.sampled)
    torch.testing.assert_close(plain.logprobs, shared.logprobs, atol=1e-4, rtol=0)
    for a, b in zip(plain.latents, shared.latents):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert fewer[1] < all_rows[1] == 6 * len(ROWS) and fewer[1] < max(fewer)
    assert sum(fewer) < 0.9 * sum(all_rows)
    with pytest.raises(ValueError, match="merge_equal"):
        generate(model, batch, **how, merge_equal=True, feed=lambda model, state: state.h)


# of the direct tests of `choose`; 3 stands for a picture's placeholder
V, IDS, NEVER = 12, (9, 10, 11), [10, 11, 3]
CONFIG = SimpleNamespace(**dict(zip(LATENT_IDS, IDS)))


def decide(logits, u, in_span=False, count=0, **more):
    """One row of logits, many u -> what `choose` gives, as numpy."""
    u = torch.as_tensor(u, dtype=torch.float32)
    states = torch.full((len(u),), in_span), torch.full((len(u),), count)
    got = choose(logits.expand(len(u), V), *states, u, Rule(CONFIG, torch.tensor(NEVER), **more))
    return [x.numpy() for x in got]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_choose_in_a_span(temperature):
    """Breaks if stop and continue are not p(LE) and 1 - p(LE) of the full softmax, or a word gets
    into a span.
    """
    logits, M = torch.zeros(V), 10_000
    logits[IDS[2]], logits[5] = 1.5, 3.0  # p(LE) is below one half
    p = np.exp(log_softmax(logits / (temperature or 1.0)))[IDS[2]]
    u, how = (torch.arange(M) + 0.5) / M, dict(temperature=temperature, max_latents=3)
    token, chosen, sampled = decide(logits, u, True, 2, top_p=0.1, **how)
    stop = token == IDS[2]
    assert sampled.all() and (stop | (token == IDS[1])).all()
    assert stop.mean() == pytest.approx(p if temperature else 0, abs=2 / M)
    np.testing.assert_allclose(np.exp(chosen), np.where(stop, p, 1 - p), rtol=1e-5)
    token, chosen, sampled = decide(logits, [0.0, 0.999], True, 3, **how)
    assert token.tolist() == [IDS[2]] * 2 and not chosen.any() and not sampled.any()  # forced
    # p = 1, 0: the -inf of the other must not get in
    for value, only in ((200.0, IDS[2]), (-200.0, IDS[1])):
        logits[IDS[2]] = value
        token, chosen, sampled = decide(logits, [0.0, 1 - 2**-24], True, **how)
        assert token.tolist() == [only] * 2 and not chosen.any() and sampled.all()


def test_a_greedy_span_ends_where_the_end_is_the_most_probable_word():
    """Breaks if greedy decoding is not the limit of sampling: p(LE) < 1/2 may still be the
    largest, and
    p(LE) = .45 beside a word of .5 is not."""
    for p_word, stops in ((0.3, True), (0.5, False)):
        p = torch.full((V,), (1 - 0.45 - p_word) / (V - 2))
        p[IDS[2]], p[5] = 0.45, p_word
        greedy = decide(p.log(), [0.3], True, temperature=0.0)
        limit = decide(p.log(), torch.linspace(0, 0.999, 50), True, temperature=1e-4)
        assert greedy[0].tolist() == [IDS[2] if stops else IDS[1]]
        assert (limit[0] == greedy[0]).all()
        np.testing.assert_allclose(np.exp(greedy[1]), 0.45 if stops else 0.55, rtol=1e-5)


def test_choose_at_the_edges():
    """Breaks if u near 0 or 1 falls off the table, onto a banned word or out of the nucleus."""
    logits, u = torch.arange(V).float(), [0.0, 1 - 2**-24]
    # e^9, e^8, e^7: 63 %, 86 %, 95 % of the allowed; words are drawn in the order of their ids
    for top_p, ends in ((1.0, [0, 9]), (0.9, [7, 9]), (1e-9, [9, 9])):
        assert decide(logits, u, temperature=1.0, top_p=top_p)[0].tolist() == ends
    # one allowed word has all there is
    steep = torch.full((V,), -1e4).index_fill(0, torch.tensor([4, 10]), 1e4)
    assert all(decide(steep, u, temperature=t)[0].tolist() == [4, 4] for t in (0.0, 1.0))


@pytest.mark.parametrize("scale", [1, 6, torch.linspace(1, 6, 64)[:, None]])  # flat, sure, both
def test_top_p_is_its_definition(scale):
    """Breaks if the nucleus is larger or smaller, leaves out a tie, or another word is drawn."""
    random = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0))
    logp = (random * scale).log_softmax(-1)
    logp[:, 7] = logp[:, 8]  # a tie
    u, p = torch.rand(64, generator=torch.Generator().manual_seed(1)), logp.double().exp()
    expected = []
    for row, place in zip(p, u):
        falling = row.sort(descending=True).values
        floor = falling[int((falling.cumsum(0) >= 0.9 * row.sum()).int().argmax())]
        inside = (row >= floor).nonzero()[:, 0]
        cdf = row[inside].cumsum(0)
        expected.append(int(inside[(cdf <= place * cdf[-1]).sum()]))
    assert latent_decode.choose_word(logp, u, 1.0, 0.9).tolist() == expected


@pytest.mark.parametrize(
    "name, value",
    [("max_new_tokens", 0), ("n", 0), ("max_latents", -1), ("temperature", -0.1), ("top_p", 0.0)]
    + [("top_p", 1.1), ("left-padded", None)],
)
def test_bad_arguments_raise(model, tokenizer, name, value):
    """Breaks if nonsense or right padding is accepted, or refused without its name."""
    side, bad = ("right", {}) if value is None else ("left", {name: value})
    with pytest.raises(ValueError, match=name):
        generate(model, make_batch(tokenizer, ROWS, side), **{"max_new_tokens": 4, **bad})


@pytest.mark.parametrize(
    "attention, training, fails", [("eager", True, False), ("sdpa", False, True)]
)
def test_the_model_is_left_as_it_was(model, tokenizer, attention, training, fails):
    """Breaks if generating, or failing to, leaves another mode or attention behind, or runs with
    dropout on.
    """
    model.set_attn_implementation(attention)
    model.train(training)
    modes = []

    def hook(module, args):
        modes.append((module.training, model.model.language_model.config._attn_implementation))
        if fails:
            raise RuntimeError("stop here")

    model.lm_head.register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError, match="stop here") if fails else contextlib.nullcontext():
        generate(model, make_batch(tokenizer, ROWS, "left"), max_new_tokens=3)
    assert set(modes) == {(False, shared_prefix.NAME)}
    assert all(m.training == training for m in model.modules())
    assert model.config.vision_config._attn_implementation == attention
