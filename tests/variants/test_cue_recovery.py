"""The cue recovery module: what it does by hand, and that a replay is what was decoded."""

import numpy as np
import pytest
import torch
from test_latent_decode import ROWS, shuffle
from test_model import make_batch

from latent_decode import generate, token_logprobs
from toy import tiny
from variants.cue_recovery import add_recovery


@pytest.fixture
def deep(tokenizer):
    """A model of 11 layers: looks behind 0, 5 and the last."""
    return shuffle(tiny.make_model(tokenizer, seed=0, layers=11).eval(), 0)


def loud(model):
    """The model, its module with a W_O that is heard."""
    torch.manual_seed(1)
    for look in model.recovery.looks:
        torch.nn.init.normal_(look.o.weight, std=0.3)
    return model


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


def test_what_is_read_behind_each_look(deep, tokenizer):
    """Breaks if heads mix, the scale is not that of a head, looks share a matrix or a norm is left
    out; if a look is not behind its layer and deepstack, changes another token, or sees padding or
    another row's pictures. Or if the module changes anything at first.
    """
    batch, seen = make_batch(tokenizer, ROWS), {}
    layers, places = deep.model.language_model.layers, (0, 5, 10)

    def record(name):
        """Keep what the layer after each look reads; behind the last layer, what it gives."""
        for k, place in enumerate(places):

            def hook(layer, args, out=None, key=(name, k)):
                seen[key] = (args[0] if out is None else out)[0].detach()

            if place + 1 < len(layers):
                layers[place + 1].register_forward_pre_hook(hook)
            else:
                layers[place].register_forward_hook(hook)

    layers[0].register_forward_hook(lambda layer, args, out: seen.update(first=out[0].detach()))
    record("before")
    with torch.no_grad():
        plain = deep(**batch).logits
        add_recovery(deep)
        assert torch.equal(deep(**batch).logits, plain)
        assert sum(p.numel() for p in deep.recovery.parameters()) == 3 * 4 * 96**2 + 2 * 96
        record("after")
        loud(deep)
        deep(**batch)
    real, ids = batch["attention_mask"].bool(), batch["input_ids"]
    c, r = deep.config, deep.recovery
    visual = ((ids == c.image_token_id) | (ids == c.video_token_id))[real]
    row = torch.arange(len(ids))[:, None].expand_as(ids)[real]
    deepstack = (seen["before", 0] != seen["first"]).any(-1)
    assert torch.equal(deepstack, visual)  # else the test could not tell before from behind

    for k in range(3):
        before = seen["before", k]
        expected = before.clone()
        for b in range(len(ids)):
            own = before[(row == b) & visual]
            if len(own):
                first = int((row == b).nonzero()[0])
                q, v = (
                    norm(x).double().detach().numpy()
                    for norm, x in ((r.norm_q, before[first]), (r.norm_kv, own))
                )
                expected[first] += torch.tensor(slow_look(r.looks[k], q, v)).float()
        torch.testing.assert_close(seen["after", k], expected, atol=1e-4, rtol=1e-4)
        assert (expected - before).abs().max() > 0.1


def test_replay_of_several_prompts(deep, tokenizer):
    """Breaks if the module acts on decoded tokens, or a rollout is replayed behind another first
    token than it was decoded with.
    """
    batch = make_batch(tokenizer, ROWS, "left")
    how = dict(max_new_tokens=12, max_latents=3, n=2, temperature=0.9)
    add_recovery(deep)
    rollout = generate(loud(deep), batch, **how)
    with torch.no_grad():
        again = token_logprobs(deep, batch, rollout, 0.9)
        deep.recovery.looks[1].o.weight.zero_()
        without = token_logprobs(deep, batch, rollout, 0.9)
    torch.testing.assert_close(again, rollout.logprobs, atol=2e-4, rtol=0)
    blind = [4, 5, 8, 9]  # rows of the prompts without pictures
    torch.testing.assert_close(without[blind], again[blind], atol=1e-5, rtol=0)
    assert ((without - again).abs().amax(1) > 1e-3).tolist() == [r not in blind for r in range(12)]
