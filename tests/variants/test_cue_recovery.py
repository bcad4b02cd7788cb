"""The cue recovery module: a look by hand, where it acts, and that decoding, replay and a saved
folder agree with one forward.
"""

import numpy as np
import pytest
import torch
from test_latent_decode import EOS, ROWS, check_row, reference, shuffle
from test_model import make_batch, save

from common.shared_prefix import Layout
from latent_decode import generate, token_logprobs
from model import load
from toy import tiny
from variants.cue_recovery import Look, Model, Recovery, add_recovery, find_places


@pytest.fixture
def deep(tokenizer):
    """A model of 11 layers: looks behind 0, 5 and the last."""
    return shuffle(tiny.make_model(tokenizer, seed=0, layers=11).eval(), 0)


def loud_recovery(model):
    """The module with a W_O that is heard."""
    add_recovery(model)
    torch.manual_seed(1)
    for look in model.recovery.looks:
        torch.nn.init.normal_(look.o.weight, std=0.3)
    return model


def test_published_parameter_counts(deep):
    """Breaks if a matrix is missing, shared or not D x D, or a layer is. Source: sec. 3.2."""
    for D, heads, layers, published in ((2048, 16, 28, 100.7), (4096, 32, 36, 536.9)):
        with torch.device("meta"):
            module = Recovery(D, heads, len(range(0, layers, 5)))
        matrices = sum(p.numel() for p in module.parameters() if p.ndim == 2)
        norms = sum(p.numel() for p in module.parameters() if p.ndim == 1)
        assert round(matrices / 1e6, 1) == published and norms == 2 * D
    add_recovery(deep)
    assert sum(p.numel() for p in deep.recovery.parameters()) == 3 * 4 * 96**2 + 2 * 96


def slow_look(look, q, v):
    """softmax(q K^T / sqrt(d)) U W_O with a loop over heads: q (D,), v (M, D), float64 numpy."""
    W_q, W_k, W_v, W_o = (
        m.weight.detach().double().numpy() for m in (look.q, look.k, look.v, look.o)
    )
    d, out = len(q) // look.heads, []
    for h in range(look.heads):
        part = slice(h * d, (h + 1) * d)
        scores = (v @ W_k.T)[:, part] @ (W_q @ q)[part] / np.sqrt(d)
        p = np.exp(scores - scores.max())
        out.append(p / p.sum() @ (v @ W_v.T)[:, part])
    return W_o @ np.concatenate(out)


def test_a_look_by_hand():
    """Breaks if heads mix, the scale is not that of a head, or padding is seen."""
    torch.manual_seed(0)
    look = Look(12, 3)
    torch.nn.init.normal_(look.o.weight)
    sink, seen = torch.randn(2, 12), torch.randn(2, 5, 12)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    out = look(sink, seen, real).detach()
    for b, m in enumerate((5, 3)):
        expected = slow_look(look, sink[b].double().numpy(), seen[b, :m].double().numpy())
        np.testing.assert_allclose(out[b].numpy(), expected, atol=1e-5)


def test_places_by_hand():
    """Breaks if a first token is not its prompt's, or reads another prompt."""
    layout = Layout([4, 3, 3, 4, 2, 2, 1, 2], "cpu", prompt_of=[-1, -1, -1, -1, -1, 0, 0, 2])
    visual = torch.zeros(1, 21, dtype=torch.bool)
    #  0123 | 456 | 789 | 10 11 12 13 | 14 15; then what follows the first and the third
    visual[0, [1, 3, 8, 11, 12, 13]] = True
    places = find_places(layout, visual)
    seen = [row[real].tolist() for row, real in zip(places.seen, places.real)]
    assert places.first.tolist() == [0, 7, 10] and seen == [[1, 3], [8], [11, 12, 13]]


def test_nothing_changes_at_first(deep, tokenizer):
    """Breaks if the model with W_O = 0 is not bitwise the model it was, or another is the same."""
    batch = make_batch(tokenizer, ROWS)
    with torch.no_grad():
        before = deep(**batch).logits
        add_recovery(deep)
        assert torch.equal(deep(**batch).logits, before)
        torch.nn.init.normal_(deep.recovery.looks[2].o.weight)  # behind the last layer
        last = deep(**batch).logits
    changed = (last != before).any(-1)
    with_pictures = torch.tensor([True, True, False, True, False, True])
    first = torch.zeros_like(changed)
    first[with_pictures, 0] = True
    assert torch.equal(changed, first)


def test_what_the_next_layer_reads(deep, tokenizer):
    """Breaks if the look is not behind the layer and deepstack, changes another token, leaves out a
    norm, or sees the pictures of another row.
    """
    batch, seen = make_batch(tokenizer, ROWS), {}

    def record(name):
        def hook(layer, args, out=None):
            seen[name] = (args[0] if out is None else out)[0].detach()

        return hook

    layers = deep.model.language_model.layers
    layers[0].register_forward_hook(record("behind layer 0"))
    layers[1].register_forward_pre_hook(record("before"))
    loud_recovery(deep)
    layers[1].register_forward_pre_hook(record("after"))
    with torch.no_grad():
        deep(**batch)
    real, ids = batch["attention_mask"].bool(), batch["input_ids"]
    c, r = deep.config, deep.recovery
    visual = ((ids == c.image_token_id) | (ids == c.video_token_id))[real]
    row = torch.arange(len(ids))[:, None].expand_as(ids)[real]
    deepstack = (seen["before"] != seen["behind layer 0"]).any(-1)
    assert torch.equal(deepstack, visual)  # else the test could not tell before from behind

    expected = seen["before"].clone()
    for b in range(len(ids)):
        own = seen["before"][(row == b) & visual]
        if len(own):
            first = int((row == b).nonzero()[0])
            q, v = (
                norm(x).double().detach().numpy()
                for norm, x in ((r.norm_q, expected[first]), (r.norm_kv, own))
            )
            expected[first] += torch.tensor(slow_look(r.looks[0], q, v)).float()
    torch.testing.assert_close(seen["after"], expected, atol=1e-4, rtol=1e-4)
    assert (seen["after"] - seen["before"]).abs().max() > 0.1


def test_prefill_and_cached_decoding_are_one_forward(deep, tokenizer):
    """Breaks if the module acts on decoded tokens, or on other prompts than in one forward."""
    eos, batch = tokenizer.convert_tokens_to_ids(EOS.split()), make_batch(tokenizer, ROWS, "left")
    how = dict(max_new_tokens=14, max_latents=3, eos_token_id=eos)
    plain = generate(deep, batch, **how)
    rollout = generate(loud_recovery(deep), batch, **how)
    for r, row in enumerate(ROWS):
        check_row(rollout, r, reference(deep, make_batch(tokenizer, [row]), 14, 3, eos))
    n = min(plain.tokens.shape[1], rollout.tokens.shape[1])
    assert not torch.equal(plain.tokens[:, :n], rollout.tokens[:, :n])  # it is heard


def test_replay_of_several_prompts(deep, tokenizer):
    """Breaks if a rollout is replayed behind another first token than it was decoded with."""
    batch = make_batch(tokenizer, ROWS, "left")
    how = dict(max_new_tokens=12, max_latents=3, n=2, temperature=0.9)
    rollout = generate(loud_recovery(deep), batch, **how)
    with torch.no_grad():
        again = token_logprobs(deep, batch, rollout, 0.9)
        deep.recovery.looks[1].o.weight.zero_()
        without = token_logprobs(deep, batch, rollout, 0.9)
    torch.testing.assert_close(again, rollout.logprobs, atol=2e-4, rtol=0)
    blind = [4, 5, 8, 9]  # rows of the prompts without pictures
    torch.testing.assert_close(without[blind], again[blind], atol=1e-5, rtol=0)
    assert ((without - again).abs().amax(1) > 1e-3).tolist() == [r not in blind for r in range(12)]


def test_checkpointed_layers_give_the_same_gradient(deep, tokenizer):
    """Breaks if a layer that is run again in the backward is run without its look."""
    batch = make_batch(tokenizer, ROWS)
    loud_recovery(deep).train()

    def gradients():
        return torch.autograd.grad(
            deep(**batch).logits.sin().sum(), list(deep.recovery.parameters())
        )

    plain = gradients()
    deep.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for a, b in zip(gradients(), plain):
        torch.testing.assert_close(a, b)
    assert all(g.any() for g in plain)


def test_saved_and_loaded_again(deep, tokenizer, tmp_path):
    """Breaks if a folder does not bring its module back."""
    batch = make_batch(tokenizer, ROWS)
    again, _ = load(save(loud_recovery(deep), tokenizer, tmp_path), cls=Model)
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, deep(**batch).logits)
