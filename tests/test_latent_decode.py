"""Decoding: equal to the slowest possible decoder, replayable from its record, and sampling what
it says it samples.
"""

import contextlib
import re

import numpy as np
import pytest
import torch
from test_model import IMAGE, VIDEO, WIDE, log_softmax, make_batch, stock_of

import latent_decode
from common import shared_prefix
from common.shared_prefix import DecodingCache
from latent_decode import Rollout, Rule, choose, decode_slowly, generate

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


def reference(model, prompt, max_new_tokens, max_latents, eos):
    """What `decode_slowly` says, with the log-probabilities of one forward over it: for
    `check_row`.
    """
    tokens, latents = decode_slowly(model, prompt, max_new_tokens, max_latents, eos)
    finish = "eos" if tokens[-1] in eos else "length"
    lengths, tokens = torch.tensor([len(tokens)]), torch.tensor([tokens])
    slow = Rollout(tokens, None, [latents], None, [finish], lengths)
    expected, predicted = replay(model, prompt, slow, 0, max_latents, 1.0)
    torch.testing.assert_close(latents, predicted, atol=1e-4, rtol=0)  # z_{k+1} = h_{p+k}
    return expected


def check_row(rollout, r, expected):
    """Row r of a rollout is what `reference` says, and padding after it."""
    tokens, latents, logprobs, sampled, finish = expected
    L = len(tokens)
    assert rollout.tokens[r, :L].tolist() == tokens
    assert (rollout.lengths[r].item(), rollout.finish[r]) == (L, finish)
    assert rollout.sampled[r, :L].tolist() == sampled and not rollout.sampled[r, L:].any()
    assert (
        not rollout.logprobs[r, L:].any()
        and not rollout.logprobs[r, :L][~rollout.sampled[r, :L]].any()
    )
    torch.testing.assert_close(
        rollout.logprobs[r, :L].double(), torch.tensor(logprobs).double(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(rollout.latents[r], latents, atol=1e-4, rtol=0)


@torch.no_grad()
def replay(model, prompt, rollout, r, max_latents, temperature):
    """Tokens and latents of a row through `forward` at once -> what `check_row` expects, and the
    latents predicted.
    """
    c, L = model.config, int(rollout.lengths[r])
    tokens, z = rollout.tokens[r, :L], rollout.latents[r]
    assert int((tokens == c.latent_id).sum()) == len(z)
    out = model(
        torch.cat([prompt["input_ids"], tokens[None]], 1),
        latents=z,
        **{k: v for k, v in prompt.items() if k not in ("input_ids", "attention_mask")},
    )
    at = slice(-L - 1, -1)  # the positions that predict the tokens
    logp, span, logprobs, sampled = log_softmax(out.logits[0, at] / temperature), None, [], []
    for t, p in zip(tokens.tolist(), logp):
        sampled.append(span is None or span < max_latents)
        go = span is not None and t == c.latent_id
        logprobs.append(sampled[-1] * (np.log(1 - np.exp(p[c.latent_end_id])) if go else p[t]))
        assert span is None or go or t == c.latent_end_id  # nothing else can happen in a span
        span = 0 if t == c.latent_start_id else span + 1 if go else None
    finish = "eos" if L < rollout.tokens.shape[1] else rollout.finish[r]
    predicted = model.to_latent(out.hidden_states[-1][0, at][tokens == c.latent_id])
    return (tokens.tolist(), z, logprobs, sampled, finish), predicted


@pytest.mark.parametrize("chunk, head", [(16, False), (16, True), (3, False)])
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


def test_alone_or_in_any_company(model, tokenizer, eos):
    """Breaks if a row depends on other rows, padding or n, if row i * n + k is not prompt i's, or
    vision runs twice.
    """
    args = dict(max_new_tokens=40, max_latents=3, eos_token_id=eos)
    shuffle(model, 0)
    alone = [generate(model, make_batch(tokenizer, [row], "left"), **args) for row in ROWS]
    order, n, seen = [3, 0, 5, 1, 4, 2], 3, []
    model.model.visual.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    together = generate(model, make_batch(tokenizer, [ROWS[i] for i in order], "left"), **args, n=n)
    assert len({tuple(a.tokens[0].tolist()) for a in alone}) > 3
    assert len(together.tokens) == n * len(ROWS)
    assert seen == [2 * 16 + 3 * 12, 24]  # patches of all images and of the video, once
    for r in range(n * len(ROWS)):
        a = alone[order[r // n]]
        assert torch.equal(together.tokens[r], a.tokens[0])
        assert torch.equal(together.sampled[r], a.sampled[0])
        torch.testing.assert_close(together.latents[r], a.latents[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(together.logprobs[r], a.logprobs[0], atol=1e-4, rtol=0)


def test_limits_and_ends(model, tokenizer, eos):
    """Breaks if a limit is overstepped, max_latents = 0 leaves a latent, or the default end is
    not the model's.
    """
    batch, c = make_batch(tokenizer, ROWS, "left"), shuffle(model, 0).config
    for T in (1, 2, 17):
        r = generate(model, batch, max_new_tokens=T, eos_token_id=[])
        assert r.tokens.shape == (6, T)
        assert r.finish == ["length"] * 6 and r.lengths.tolist() == [T] * 6
    r = generate(model, batch, max_new_tokens=40, max_latents=0, eos_token_id=eos)
    for i, row in enumerate(ROWS):
        check_row(r, i, reference(model, make_batch(tokenizer, [row]), 40, 0, eos))
    assert (r.tokens == c.latent_start_id).any() and all(z.shape == (0, 96) for z in r.latents)
    first = generate(model, batch, max_new_tokens=1, eos_token_id=[]).tokens[0, 0].item()
    assert first not in (c.latent_start_id, eos[0])
    model.generation_config.eos_token_id = eos = [eos[0], first]  # now row 0 ends at once
    default, given = (
        generate(model, batch, max_new_tokens=20, **more) for more in ({}, dict(eos_token_id=eos))
    )
    assert (
        torch.equal(default.tokens, given.tokens)
        and default.lengths.tolist() == given.lengths.tolist()
    )
    one = generate(model, batch, max_new_tokens=20, eos_token_id=eos[0])
    assert given.lengths[0] == 1 and one.lengths[0] > 1
    prompt = make_batch(tokenizer, [ROWS[0]])
    del prompt["attention_mask"]  # optional
    assert torch.equal(
        generate(model, prompt, max_new_tokens=20, eos_token_id=eos).tokens[0], given.tokens[0]
    )


def test_replace_feeds_other_vectors(model, tokenizer, eos, monkeypatch):
    """Breaks if given vectors are not what is fed and recorded, or reach another row,
    or if span and place in it are miscounted."""
    monkeypatch.setattr(latent_decode, "CHUNK", 4)  # rows leave early; vectors are given after that
    batch, sizes = make_batch(tokenizer, ROWS, "left"), rows_fed(shuffle(model, 4))
    other = torch.randn(24, 3, 3, 96)
    args = dict(max_new_tokens=30, max_latents=3, eos_token_id=eos, n=4, temperature=1.0)
    places = [[] for _ in range(24)]  # (span, place in the span) of each latent, as `feed` is told

    def feed(model, state):
        places_now = zip(state.row.tolist(), state.span.tolist(), state.count.tolist())
        for r, span, count in places_now:
            places[r].append((span, count))
        return other[state.row, state.span.clamp(0, 2), state.count.clamp(max=2)]

    rollout = generate(model, batch, **args, feed=feed, generator=torch.Generator().manual_seed(0))
    assert min(sizes[1:]) < 24 and max(map(len, rollout.latents)) > 6  # sizes[0] is the prompts'
    for r in range(24):
        expected, predicted = replay(
            model, make_batch(tokenizer, [ROWS[r // 4]]), rollout, r, 3, 1.0
        )
        check_row(rollout, r, expected)
        tokens, steps = rollout.tokens[r].tolist(), iter(places[r])
        fed = [place for token, place in zip(tokens, steps) if token == model.config.latent_id]
        lengths = spans(tokens, model.config)
        assert fed[: sum(lengths)] == [(m, j) for m, n in enumerate(lengths) for j in range(n)]
        assert len(fed) == len(rollout.latents[r])
        for z, (m, j) in zip(rollout.latents[r], fed):
            assert torch.equal(z, other[r, min(m, 2), min(j, 2)])


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (1.5, 0.95)])
def test_sampled_record_replays(model, tokenizer, eos, temperature, top_p):
    """Breaks if tokens and latents of the record, fed at once, do not give the record's
    log-probabilities.
    """
    batch, n = make_batch(tokenizer, ROWS, "left"), 6
    shuffle(model, 5)
    rollout = generate(
        model,
        batch,
        max_new_tokens=40,
        max_latents=3,
        eos_token_id=eos,
        temperature=temperature,
        top_p=top_p,
        n=n,
        generator=torch.Generator().manual_seed(0),
    )
    counts = []
    for r in range(n * len(ROWS)):
        expected, predicted = replay(
            model, make_batch(tokenizer, [ROWS[r // n]]), rollout, r, 3, temperature
        )
        check_row(rollout, r, expected)
        torch.testing.assert_close(rollout.latents[r], predicted, atol=1e-4, rtol=0)
        counts.append(spans(expected[0], model.config))
    seen = {k for row in counts for k in row}  # empty spans, forced ones, and some in between
    assert {0, 3} <= seen and seen & {1, 2} and max(map(len, counts)) > 2
    assert set(rollout.finish) == {"eos", "length"} and len(torch.cat(rollout.latents)) > 50


class Noise:
    """A feed with a state of its own: as the model's latents, plus noise it draws for all rows."""

    def __init__(self, R, D, sigma):
        self.shape, self.sigma, self.rows = (R, D), sigma, []
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, model, state):
        self.rows.append(len(state.row))
        drawn = torch.randn(self.shape, generator=self.generator)
        return model.to_latent(state.h) + self.sigma * drawn[state.row]


def test_a_feed_may_have_a_state_of_its_own(model, tokenizer, eos):
    """Breaks if `feed` is not called once a step, or for other rows than those that are decoded; or
    if what it gave is not what is recorded, replayed, and independent of who else is left.
    """
    batch, sizes = make_batch(tokenizer, ROWS, "left"), rows_fed(shuffle(model, 4))
    args = dict(max_new_tokens=60, max_latents=3, temperature=1.2, n=3)
    runs = []
    for ends in (eos, []):
        sizes.clear()
        feed = Noise(18, 96, 0.5)
        seed = torch.Generator().manual_seed(0)
        rollout = generate(model, batch, **args, eos_token_id=ends, feed=feed, generator=seed)
        assert feed.rows == sizes
        runs.append((rollout, min(feed.rows)))
    (some, left), (endless, all_rows) = runs
    assert left < all_rows == 18
    for r, L in enumerate(some.lengths.tolist()):
        assert torch.equal(some.tokens[r, :L], endless.tokens[r, :L])
        same = endless.latents[r][: len(some.latents[r])]
        torch.testing.assert_close(some.latents[r], same, atol=1e-4, rtol=0)

    # replay feeds what was fed, and predicts what it would have been without the noise
    out = latent_decode.replay(model, batch, some, 1.2)
    assert torch.equal(out.latents, torch.cat(some.latents))
    torch.testing.assert_close(out.logprobs, some.logprobs, atol=1e-4, rtol=0)
    noise = out.latents - out.predicted
    assert len(noise) > 50 and noise.mean().abs() < 0.02
    assert noise.std().item() == pytest.approx(0.5, abs=0.02)


def test_sharing_what_is_equal_changes_nothing(model, tokenizer, eos):
    """Breaks if samples that part get a wrong row of the cache, or if nothing is shared."""
    batch, sizes = make_batch(tokenizer, ROWS, "left"), rows_fed(shuffle(model, 4))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)  # surer, so that samples stay together for a while
    common = dict(
        max_new_tokens=40, max_latents=3, eos_token_id=eos, temperature=1.0, top_p=0.95, n=6
    )
    runs = []
    for share in (False, True):
        sizes.clear()
        runs.append(
            (
                generate(
                    model, batch, **common, share=share, generator=torch.Generator().manual_seed(0)
                ),
                sizes[:],
            )
        )
    (plain, all_rows), (shared, fewer) = runs
    assert torch.equal(plain.tokens, shared.tokens) and torch.equal(plain.sampled, shared.sampled)
    torch.testing.assert_close(plain.logprobs, shared.logprobs, atol=1e-4, rtol=0)
    for a, b in zip(plain.latents, shared.latents):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert (
        fewer[1] < all_rows[1] == 6 * len(ROWS)
        and sum(fewer) < 0.9 * sum(all_rows)
        and fewer[1] < max(fewer)
    )
    with pytest.raises(ValueError, match="share"):
        generate(model, batch, **common, share=True, feed=Noise(36, 96, 0.1))


def test_seeds_and_independence(model, tokenizer, eos):
    """Breaks if a seed does not fix the result, or a row's draws shift when other rows finish and
    leave.
    """
    batch, sizes = make_batch(tokenizer, ROWS, "left"), rows_fed(shuffle(model, 4))

    def sample(seed, eos):
        return generate(
            model,
            batch,
            max_new_tokens=60,
            temperature=1.2,
            n=3,
            eos_token_id=eos,
            max_latents=3,
            generator=torch.Generator().manual_seed(seed),
        )

    a, left = sample(0, eos), min(sizes[1:])  # sizes[0] is the prompts'
    b, c, endless = sample(0, eos), sample(1, eos), sample(0, [])
    assert left < 18 and sizes[-60:] == [18] * 60  # rows left; none left the endless run
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logprobs, b.logprobs)
    assert all(torch.equal(x, y) for x, y in zip(a.latents, b.latents))
    assert not torch.equal(a.tokens, c.tokens)
    assert len({tuple(row) for row in a.tokens[:3].tolist()}) == 3  # the samples of a prompt differ
    for r, L in enumerate(a.lengths.tolist()):
        assert torch.equal(a.tokens[r, :L], endless.tokens[r, :L])
        torch.testing.assert_close(
            a.latents[r], endless.latents[r][: len(a.latents[r])], atol=1e-4, rtol=0
        )
    assert (a.lengths > 20).sum() > 1


# of the direct tests of `choose`; 3 stands for a picture's placeholder
V, IDS, NEVER = 12, (9, 10, 11), [10, 11, 3]
BANNED = torch.zeros(V).index_fill(0, torch.tensor(NEVER), -torch.inf)


def decide(logits, u, in_span=False, count=0, **more):
    """One row of logits, many u -> what `choose` gives, as numpy."""
    u = torch.as_tensor(u, dtype=torch.float32)
    got = choose(
        logits.expand(len(u), V),
        torch.full((len(u),), in_span),
        torch.full((len(u),), count),
        u,
        Rule(*IDS, BANNED, **more),
    )
    return [x.numpy() for x in got]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.5, 1e-6])
def test_choose_samples_exactly(temperature, top_p):
    """Breaks if words are drawn from another distribution, banned ones appear, or another
    log-probability is given.
    """
    logits, M = (
        torch.linspace(-2, 2, V)[torch.randperm(V, generator=torch.Generator().manual_seed(0))],
        20_000,
    )
    logits[NEVER] = 2.5  # likely, were they not banned
    logp = log_softmax(logits / temperature)
    p = np.exp(logp) * ~np.isin(np.arange(V), NEVER)
    p /= p.sum()
    order, nucleus = np.argsort(-p), []
    while sum(p[nucleus]) < top_p - 1e-9:
        nucleus = order[: len(nucleus) + 1]
    p = np.where(np.isin(np.arange(V), nucleus), p, 0) / p[nucleus].sum()
    assert len(nucleus) == {1.0: V - 3, 1e-6: 1}.get(top_p, len(nucleus)) and (
        top_p != 0.8 or len(nucleus) > 1
    )
    token, chosen, sampled = decide(
        logits, (torch.arange(M) + 0.5) / M, temperature=temperature, top_p=top_p
    )
    np.testing.assert_allclose(np.bincount(token, minlength=V) / M, p, atol=2 / M)
    np.testing.assert_allclose(chosen, logp[token], atol=1e-5)
    assert sampled.all()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_choose_in_a_span(temperature):
    """Breaks if stop and continue are not p(LE) and 1 - p(LE) of the full softmax, or a word gets
    into a span.
    """
    logits, M = torch.zeros(V), 10_000
    logits[IDS[2]], logits[5] = 1.5, 3.0  # p(LE) is below one half
    p = np.exp(log_softmax(logits / (temperature or 1.0)))[IDS[2]]
    for count in (0, 2):
        token, chosen, sampled = decide(
            logits,
            (torch.arange(M) + 0.5) / M,
            True,
            count,
            temperature=temperature,
            top_p=0.1,
            max_latents=3,
        )
        stop = token == IDS[2]
        assert sampled.all() and (stop | (token == IDS[1])).all()
        assert stop.mean() == pytest.approx(p if temperature else 0, abs=2 / M)
        np.testing.assert_allclose(np.exp(chosen), np.where(stop, p, 1 - p), rtol=1e-5)
    token, chosen, sampled = decide(
        logits, [0.0, 0.999], True, 3, temperature=temperature, max_latents=3
    )
    assert token.tolist() == [IDS[2]] * 2 and not chosen.any() and not sampled.any()  # forced
    # p = 1, 0: the -inf of the other must not get in
    for value, only in ((200.0, IDS[2]), (-200.0, IDS[1])):
        logits[IDS[2]] = value
        token, chosen, sampled = decide(logits, [0.0, 1 - 2**-24], True, temperature=temperature)
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


def test_greedy_is_the_limit_of_sampling(model, tokenizer, eos):
    """Breaks if temperature 1e-4 and 0 decode differently anywhere, in words or in spans."""
    batch = make_batch(tokenizer, ROWS, "left")
    for seed in range(4):
        shuffle(model, seed)
        args = dict(max_new_tokens=36, max_latents=3, eos_token_id=eos)
        cold = generate(model, batch, **args, temperature=1e-4)
        assert torch.equal(generate(model, batch, **args).tokens, cold.tokens)


def test_choose_at_the_edges():
    """Breaks if u near 0 or 1 falls off the table, onto a banned word or out of the nucleus."""
    logits, u = torch.arange(V).float(), [0.0, 1 - 2**-24]
    # e^9, e^8, e^7: 63 %, 86 %, 95 % of the allowed; words are drawn in the order of their ids
    for top_p, ends in ((1.0, [0, 9]), (0.9, [7, 9]), (1e-9, [9, 9])):
        assert decide(logits, u, temperature=1.0, top_p=top_p)[0].tolist() == ends
    steep = torch.full((V,), -1e4).index_fill(
        0, torch.tensor([4, 10]), 1e4
    )  # one allowed word has all there is
    assert all(decide(steep, u, temperature=t)[0].tolist() == [4, 4] for t in (0.0, 1.0))


def test_log_probabilities_by_stock_one_rollout_at_a_time(model, tokenizer, eos):
    """Breaks if anything of the shared row (order, positions, masks, latents) differs from
    transformers' own model on each rollout alone, whole, without a cache: replay or record.
    """
    batch, c = make_batch(tokenizer, ROWS, "left"), model.config
    shuffle(model, 4)
    args = dict(max_new_tokens=20, max_latents=3, eos_token_id=eos, temperature=0.9, n=2)
    rollout = generate(model, batch, **args, generator=torch.Generator().manual_seed(0))
    replayed = latent_decode.token_logprobs(model, batch, rollout, 0.9)
    stock, compared = stock_of(model), 0
    for r in range(len(rollout.tokens)):
        length, alone = int(rollout.lengths[r]), make_batch(tokenizer, [ROWS[r // 2]])
        tokens, P = rollout.tokens[r, :length], alone["input_ids"].shape[1]
        ids = torch.cat([alone["input_ids"], tokens[None]], 1)
        media = {k: v for k, v in alone.items() if k.startswith(("pixel", "image", "video"))}
        with torch.no_grad():
            x, visual, deepstack = model.embed(ids, rollout.latents[r], **media)
            grids = media.get("image_grid_thw"), media.get("video_grid_thw")
            positions, _ = model.positions(ids, torch.ones_like(ids), *grids)
            inputs = dict(visual_pos_masks=visual, deepstack_visual_embeds=deepstack)
            text = stock.model.language_model
            h = text(inputs_embeds=x, position_ids=positions, **inputs).last_hidden_state[0]
            logp = (stock.lm_head(h[P - 1 : -1]) / 0.9).log_softmax(-1)  # (length, V)
        for t in rollout.sampled[r, :length].nonzero()[:, 0].tolist():
            stop, token = logp[t, c.latent_end_id], int(tokens[t])
            expected = torch.log1p(-stop.exp()) if token == c.latent_id else logp[t, token]
            for got in (replayed, rollout.logprobs):
                torch.testing.assert_close(got[r, t], expected, atol=1e-4, rtol=0)
            compared += 1
    assert compared > 100 and sum(len(z) for z in rollout.latents) > 10


@pytest.mark.parametrize("scale", [1.0, 3.0, 6.0])  # flat to sure
def test_the_way_to_the_nucleus_changes_no_word(monkeypatch, scale):
    """Breaks if a sort, the likeliest words and bisection find another nucleus or another word."""
    logp = (torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)) * scale).log_softmax(
        -1
    )
    logp[:, 7] = logp[:, 8]  # a tie
    u, p = torch.rand(64, generator=torch.Generator().manual_seed(1)), logp.double().exp()
    expected = []
    for row, place in zip(p, u):  # the definition, by a sort
        falling = row.sort(descending=True).values
        floor = falling[int((falling.cumsum(0) >= 0.9 * row.sum()).int().argmax())]
        inside = (row >= floor).nonzero()[:, 0]
        cdf = row[inside].cumsum(0)
        expected.append(int(inside[(cdf <= place * cdf[-1]).sum()]))
    for likeliest in (5000, 1024, 1):
        monkeypatch.setattr(latent_decode, "LIKELIEST", likeliest)
        assert latent_decode.choose_word(logp, u, 1.0, 0.9).tolist() == expected


def test_frequencies_of_a_rollout(model, tokenizer):
    """Breaks if `generate` feeds `choose` the wrong numbers: words, stop and continue each as
    often as they should.
    """
    c, n, g = model.config, 2000, torch.Generator().manual_seed(0)
    prompt = make_batch(tokenizer, [["watch", WIDE]])
    rest = {k: prompt[k] for k in ("pixel_values", "image_grid_thw")}
    W = model.lm_head.weight.detach()
    with torch.no_grad():
        W.mul_(0.15)
        h = model(**prompt).hidden_states[-1][0, -1]
        W[c.latent_start_id] = h * (
            (W @ h).logsumexp(0) / (h @ h)
        )  # about every second row starts a span
        ids = torch.cat([prompt["input_ids"], torch.tensor([[c.latent_start_id]])], 1)
        h2 = model(ids, **rest).hidden_states[-1][0, -1]
        W[c.latent_end_id] = (
            h2 * ((W @ h2).logsumexp(0) - 0.8) / (h2 @ h2)
        )  # about half of the spans stop at once
        first, second = (
            log_softmax(model(x, **rest).logits[0, -1] / 0.8) for x in (prompt["input_ids"], ids)
        )
    rollout = generate(
        model, prompt, max_new_tokens=3, temperature=0.8, n=n, max_latents=1, generator=g
    )
    p = np.exp(first)
    p[[c.latent_id, c.latent_end_id, c.image_token_id, c.video_token_id]] = 0
    expected, found = n * p / p.sum(), np.bincount(rollout.tokens[:, 0], minlength=len(p))
    often, df = expected > 5, (expected > 5).sum() - 1
    assert df > 10 and not found[p == 0].any()
    assert ((found - expected)[often] ** 2 / expected[often]).sum() < df + 4 * (
        2 * df
    ) ** 0.5  # chi-square
    np.testing.assert_allclose(rollout.logprobs[:, 0], first[rollout.tokens[:, 0]], atol=1e-4)

    begun = rollout.tokens[:, 0] == c.latent_start_id
    stop, p_stop = rollout.tokens[begun, 1] == c.latent_end_id, np.exp(second[c.latent_end_id])
    assert 0.2 < p_stop < 0.6 and begun.sum() > 400
    assert (
        abs(stop.float().mean().item() - p_stop)
        < 4 * (p_stop * (1 - p_stop) / begun.sum().item()) ** 0.5
    )
    got = rollout.logprobs[begun, 1].exp().numpy()
    np.testing.assert_allclose(got, np.where(stop.numpy(), p_stop, 1 - p_stop), atol=1e-4)
    forced = begun.nonzero()[:, 0][~stop]
    assert (rollout.tokens[forced, 2] == c.latent_end_id).all() and not rollout.sampled[
        forced, 2
    ].any()


@pytest.mark.parametrize(
    "bad",
    [
        dict(max_new_tokens=0),
        dict(n=0),
        dict(max_latents=-1),
        dict(temperature=-0.1),
        dict(top_p=0.0),
        dict(top_p=1.1),
        "left-padded",
    ],
)
def test_bad_arguments_raise(model, tokenizer, bad):
    """Breaks if nonsense or right padding is accepted, or refused without its name."""
    side, bad = ("right", {}) if isinstance(bad, str) else ("left", bad)
    with pytest.raises(ValueError, match=next(iter(bad), "left-padded")):
        generate(model, make_batch(tokenizer, ROWS, side), **{"max_new_tokens": 4, **bad})


@pytest.mark.parametrize(
    "attention, training, fails",
    [("eager", True, False), ("eager", True, True), ("sdpa", False, True)],
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


def test_ask_is_encode_collate_generate_decode(model, tokenizer):
    """Breaks if rows change places, tokens run past a row's end, or the padding is on the right."""
    short = dict(ids=tokenizer("watch the ball").input_ids, images=[], videos=[], futures=[])
    long = dict(short, ids=tokenizer("which wall does the ball hit next ?").input_ids)
    samples = [dict(s, labels=[-100] * len(s["ids"]), row=None) for s in (short, long)]
    rollout, tokens, texts = latent_decode.ask(model, tokenizer, samples, max_new_tokens=6)
    for k, sample in enumerate(samples):
        prompt = dict(input_ids=torch.tensor([sample["ids"]]))
        slowly, _ = decode_slowly(model, prompt, 6, eos=(model.generation_config.eos_token_id,))
        assert tokens[k] == slowly == rollout.tokens[k, : len(slowly)].tolist()
        assert texts[k] == tokenizer.decode(slowly)
