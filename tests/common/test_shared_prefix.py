"""Attention to a row of sequences against plain loops, in float64. Decoding is compared with a
forward a token in test_latent_decode.py.
"""

import sys
import types

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from common import shared_prefix
from common.shared_prefix import DecodingCache, Layout

H, H_KV, D, SCALE = 4, 2, 8, 0.3
# two prompts of equal length, a long one, sequences that nothing follows; then the rollouts
LENGTHS = [7, 4, 7, 300, 9, 300, 3, 5, 1, 2, 2, 5, 6]
PROMPT_OF = [-1] * 6 + [0, 2, 0, 2, 0, 3, 3]


def states(N, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, N, D, dtype=torch.float64, generator=generator).requires_grad_()


def seen_by(lengths, prompt_of):
    """For each place of the row, the places its query sees."""
    starts, seen = np.cumsum([0, *lengths]), []
    for start, length, prompt in zip(starts, lengths, prompt_of):
        before = range(starts[prompt], starts[prompt] + lengths[prompt]) if prompt >= 0 else []
        seen += [[*before, *range(start, start + t + 1)] for t in range(length)]
    return seen


def plain(q, k, v, seen):
    """softmax(q k') v, a query at a time -> (N, H, d)."""
    k, v = (x[0].repeat_interleave(H // H_KV, 0) for x in (k, v))  # (H, N, d)
    rows = []
    for t, places in enumerate(seen):
        weight = (torch.einsum("hd,hsd->hs", q[0, :, t], k[:, places]) * SCALE).softmax(-1)
        rows.append(torch.einsum("hs,hsd->hd", weight, v[:, places]))
    return torch.stack(rows)


def test_a_row_of_sequences_and_its_gradient():
    """Breaks if a query sees another sequence, what is to come or padding, or misses its prompt."""
    q, k, v = (states(sum(LENGTHS), heads, i) for i, heads in enumerate((H, H_KV, H_KV)))
    layout = Layout(LENGTHS, "cpu", PROMPT_OF)
    out = layout.attend(0, q, k, v, SCALE)[0]
    expected = plain(q, k, v, seen_by(LENGTHS, PROMPT_OF))
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(9))
    got, wanted = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, expected))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


@pytest.fixture
def flash_attn(monkeypatch):
    """A stand-in of the package, which needs a GPU: its layout and its convention in plain torch.

    Causal from the lower right, (S, T, heads, d), as its page says. -> the calls it was given.
    """
    calls = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        calls.append((q.shape, k.shape, dropout_p, softmax_scale, causal))
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        score = torch.einsum("sthd,suhd->shtu", q, k) * softmax_scale
        T, length = score.shape[2:]
        to_come = torch.arange(length) > torch.arange(T)[:, None] + length - T
        weight = score.masked_fill(to_come, -torch.inf).softmax(-1)
        return torch.einsum("shtu,suhd->sthd", weight, v)

    module = types.SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(shared_prefix, "flash_attends", lambda query: True)
    return calls


def test_the_flash_attn_package_in_the_row(flash_attn):
    """Breaks if it is given another layout, scale or convention than it has, or is not called."""
    q, k, v = (states(sum(LENGTHS), heads, i) for i, heads in enumerate((H, H_KV, H_KV)))
    layout = Layout(LENGTHS, "cpu", PROMPT_OF)
    out = layout.attend(0, q, k, v, SCALE)[0]
    expected = plain(q, k, v, seen_by(LENGTHS, PROMPT_OF))
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    assert len(flash_attn) == len(layout.calls)
    for of_q, of_k, *settings in flash_attn:
        assert of_q[2:] == (H, D) and of_k[2:] == (H_KV, D) and of_q[1] <= of_k[1]
        assert settings == [0.0, SCALE, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_a_gpu_pytorch_attends(dtype, monkeypatch):
    """Breaks if the package is asked for what it cannot do: on a CPU, or in 32 bits."""
    monkeypatch.setattr(shared_prefix, "is_flash_attn_2_available", lambda: True)
    assert not shared_prefix.flash_attends(torch.zeros(1, dtype=dtype))
    on_gpu = types.SimpleNamespace(dtype=dtype, is_cuda=True)
    assert shared_prefix.flash_attends(on_gpu) == (dtype == torch.bfloat16)
    monkeypatch.setattr(shared_prefix, "is_flash_attn_2_available", lambda: False)
    assert not shared_prefix.flash_attends(on_gpu)


def test_short_sequences_share_calls():
    """Breaks if many small groups become many small calls: 64 of 20 + 16 x 8 tokens are two."""
    prompt_of = [-1] * 64 + [prompt for prompt in range(64) for _ in range(16)]
    assert len(Layout([20] * 64 + [8] * 1024, "cpu", prompt_of).calls) == 2
    assert len(Layout(list(range(1, 65)), "cpu").calls) == 1
    assert len(Layout([300, 301], "cpu").calls) == 2  # long ones are not padded


def test_scores_in_decoding_are_not_rounded_to_bf16():
    """Breaks if decoding rounds scores that FlashAttention keeps in fp32: samples would come from
    another policy than the one that learns. Against float64 of the same bf16 numbers.
    """
    R, d, prompt = 8, 64, DynamicCache()
    generator = torch.Generator().manual_seed(0)
    shapes = (R, H, 1, d), (R, H_KV, 1, d), (R, H_KV, 1, d), (1, H_KV, 40, d), (1, H_KV, 40, d)
    q, k, v, keys, values = (torch.randn(s, generator=generator).bfloat16() for s in shapes)
    q = q * 8  # scores of trained models are large
    prompt.update(keys, values, 0)
    cache = DecodingCache(prompt, [40], R)
    cache.reserve(3)
    cache.unseen = cache._unseen()
    with torch.autocast("cpu", torch.bfloat16):
        out = cache.attend(0, q, k, v, SCALE)
    for i in range(R):
        both = (torch.cat([x, own[i : i + 1]], 2) for x, own in ((keys, k), (values, v)))
        expected = plain(*(x.double() for x in (q[i][None], *both)), [list(range(41))])
        # weights and results are each rounded to 8 bits; rounded scores gave errors up to .04
        assert (out[i].double() - expected).norm() < 4e-3 * expected.norm()


def test_without_a_layout_it_says_so():
    with pytest.raises(ValueError, match="needs a Layout or a DecodingCache"):
        shared_prefix.attend(None, None, None, None, None)
