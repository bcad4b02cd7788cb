"""The compressed cache: the steps of the conversion and both ways to attend, against plain sums."""

import copy
import dataclasses
import shutil

import numpy as np
import pytest
import torch
from test_latent_decode import EOS, ROWS, shuffle, spans
from test_model import make_batch
from test_sft import SMALL, read_log, settings

import evaluate
from common.shared_prefix import Layout
from data import model_inputs
from latent_decode import decode_slowly, generate, replay
from model import FutureL1, load
from variants import m2la
from variants.m2la import Config, Model, Moments, convert, fit

G, H, D_HEAD, D = 2, 4, 24, 96  # of the tiny model
FULL = (2 * G - 1) * D_HEAD  # the rank with which only RoPE is lost


@pytest.fixture
def trained(batch):
    """A model in float64 whose norms have gains, and a batch with images and latents."""
    model, b = batch
    model.double().requires_grad_(False)
    torch.manual_seed(5)
    for layer in model.model.language_model.layers:
        layer.self_attn.k_norm.weight.uniform_(0.5, 1.5)
        layer.self_attn.q_norm.weight.uniform_(0.5, 1.5)
    return model, b


def compressed(model, b, **options):
    """A converted copy of a model, calibrated on one batch."""
    return convert(copy.deepcopy(model), [b], Config(**options))


@torch.no_grad()
def states(model, b):
    """States (B, T, D) of a batch as SFT feeds it."""
    e = model.encode_frames(b["future_pixel_values"], b["future_grid_thw"])
    return model.hidden(**model_inputs(b), latents=e)[0]


@pytest.fixture
def layer(trained):
    """A layer's attention, what it reads in calibration (n, D), and its moments."""
    model, b = trained
    attention, read = model.model.language_model.layers[1].self_attn, []
    moments = Moments(attention)
    spy = attention.register_forward_pre_hook(
        lambda module, args, inputs: read.append(inputs["hidden_states"][0]), with_kwargs=True
    )
    states(model, b)
    spy.remove()
    moments.watch.remove()
    return attention, torch.cat(read), moments


def raw(attention, x):
    """Keys before their norm, s, and values, by hand: x (n, D) -> (n, G, d), (n, G), (n, G, d)."""
    k = (x @ attention.k_proj.weight.T).view(len(x), G, D_HEAD).numpy()
    v = (x @ attention.v_proj.weight.T).view(len(x), G, D_HEAD).numpy()
    return k, 1 / np.sqrt((k**2).mean(-1) + attention.config.rms_norm_eps), v


def scaled_keys(attention, read, x):
    """mu (G,) by least squares on what was read, mu gain k of x (n, G, d), and s of x (n, G)."""
    k, s, _ = raw(attention, read)
    mu = [
        np.linalg.lstsq(k[:, g].reshape(-1, 1), (s[:, g, None] * k[:, g]).ravel(), rcond=None)[0][0]
        for g in range(G)
    ]
    k, s, _ = raw(attention, x)
    return np.array(mu), np.array(mu)[:, None] * attention.k_norm.weight.numpy() * k, s


def first_axes(keys):
    """Keys (n, G, d) -> the first principal axis across the heads of each frequency (d / 2, G)."""
    half = D_HEAD // 2
    points = [np.concatenate([keys[:, :, f], keys[:, :, f + half]]) for f in range(half)]
    return np.stack([np.linalg.svd(p, full_matrices=False)[2][0] for p in points])


def turn_by(x, cos, sin):
    """RoPE of x (n, heads, d), cos and sin (n, d)."""
    a, b = np.split(x, 2, -1)
    return x * cos[:, None] + np.concatenate([-b, a], -1) * sin[:, None]


def test_rotation_alone_changes_nothing(trained):
    """Steps 1 and 4. Breaks if axes mix frequencies, or the norm's scalar is not the exact one.

    All components keep RoPE and the latent is as wide as the values.
    """
    model, b = trained
    whole = compressed(model, b, rank=G * D_HEAD, roped=G)
    word = b["input_ids"] < 200  # control tokens come after the words
    other = b["input_ids"].masked_scatter(word, b["input_ids"][word].flip(0))
    for some in (b, dict(b, input_ids=other)):  # what it was calibrated on, and other words
        torch.testing.assert_close(states(whole, some), states(model, some), atol=1e-12, rtol=0)
    one = compressed(model, b, rank=FULL)  # without RoPE on the second component
    assert (states(one, b) - states(model, b)).abs().max() > 1e-3
    assert type(whole) is Model and type(model) is FutureL1


@pytest.mark.parametrize("norm", ["exact", "linear"])
def test_full_rank_is_a_model_with_partial_rope(layer, norm):
    """Steps 2 and 4. Breaks if another component keeps RoPE, the content is not all that is left,
    or `linear` is anything but t = 1 with the mu nearest to s.
    """
    attention, read, moments = layer
    new = fit(attention, moments, rank=FULL, roped=1, norm=norm)
    n = 13
    torch.manual_seed(3)
    x = torch.randn(1, n, D, dtype=torch.float64)
    angle = torch.randn(n, D_HEAD // 2, dtype=torch.float64).repeat(1, 2)  # any: M-RoPE has three
    cos, sin = angle.cos(), angle.sin()
    with torch.no_grad():
        out, _ = new(x, (cos[None], sin[None]), prefix=Layout([n], "cpu"))
        q = attention.q_norm(attention.q_proj(x).view(n, H, D_HEAD)).numpy()

    _, calibrated, _ = scaled_keys(attention, read, read)
    mu, keys, s = scaled_keys(attention, read, x[0])
    u = np.tile(first_axes(calibrated), (2, 1))  # (d, G)
    kept = np.einsum("ig,ih,nhi->ngi", u, u, keys)  # the first component, back in each head
    heads, v = [], raw(attention, x[0])[2]
    q_turned, k_turned = (turn_by(x, cos.numpy(), sin.numpy()) for x in (q, kept))
    for h in range(H):
        g = h // (H // G)
        logit = q_turned[:, h] @ k_turned[:, g].T + q[:, h] @ (keys - kept)[:, g].T  # (n, n)
        logit = logit * ((s / mu)[:, g] if norm == "exact" else 1) / np.sqrt(D_HEAD)
        p = np.tril(np.exp(logit - logit.max()))
        heads.append(p / p.sum(1, keepdims=True) @ v[:, g])
    expected = attention.o_proj(torch.tensor(np.concatenate(heads, 1)))
    torch.testing.assert_close(out[0], expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("rank", [1, 48, FULL])
def test_the_error_of_the_latent_is_the_dropped_eigenvalues(layer, rank):
    """Step 3. Breaks if keys and values are not balanced, or the axes are not the first ones."""
    attention, read, moments = layer
    new = fit(attention, moments, rank=rank, roped=1, norm="exact")
    _, keys, _ = scaled_keys(attention, read, read)
    u = np.tile(first_axes(keys), (2, 1))  # (d, G)
    content, v = keys - np.einsum("ig,ih,nhi->ngi", u, u, keys), raw(attention, read)[2]

    # two heads: the second component is what is orthogonal to the first, one coordinate a pair
    second = np.stack([-u[:, 1], u[:, 0]], 1)  # (d, G)
    k2 = np.einsum("ig,ngi->ni", second, keys)
    rho = np.sqrt((k2**2).sum(0)).mean() / np.sqrt((v**2).sum(0)).mean()
    y = np.concatenate([k2 / rho, v.reshape(len(v), -1)], 1)  # (n, 3 d)
    dropped = (np.linalg.svd(y, compute_uv=False)[rank:] ** 2).sum()

    c = (read @ new.kv_a.weight[:rank].T).detach().numpy()
    k_error = content - np.einsum("nr,gdr->ngd", c, new.up_k.detach().numpy())
    v_error = v - np.einsum("nr,gdr->ngd", c, new.up_v.detach().numpy())
    error = (k_error**2).sum() / rho**2 + (v_error**2).sum()
    assert error == pytest.approx(dropped, rel=1e-8, abs=1e-9)
    assert (rank == FULL) == (dropped < 1e-9)


@pytest.mark.parametrize("norm", ["exact", "linear"])
def test_absorbed_decoding_is_one_expanded_forward(model, tokenizer, norm):
    """Breaks if the two ways to attend differ, so that a record is not what it was fed: left
    padding, images, videos, latents, samples decoded together; or if greedy decoding is not
    section 3.1 to the letter.
    """
    model = shuffle(model, 1).double().requires_grad_(False)
    batch = make_batch(tokenizer, ROWS, side="left")
    labels = torch.full_like(batch["input_ids"], -100)
    convert(model, [dict(batch, labels=labels)], Config(rank=16, norm=norm))
    eos = tokenizer.convert_tokens_to_ids(EOS.split())
    options = dict(max_new_tokens=24, max_latents=3, eos_token_id=eos)
    rollout = generate(model, batch, **options, temperature=1.0, n=3)
    again = replay(model, batch, rollout, 1.0)
    assert sum(len(spans(row.tolist(), model.config)) for row in rollout.tokens) > 5
    torch.testing.assert_close(again.predicted, again.latents, atol=1e-10, rtol=0)
    torch.testing.assert_close(again.logprobs.float(), rollout.logprobs, atol=1e-5, rtol=0)

    greedy = generate(model, batch, **options)
    r = max(range(len(ROWS)), key=lambda r: len(greedy.latents[r]))
    tokens, latents = decode_slowly(model, make_batch(tokenizer, [ROWS[r]]), 24, 3, eos)
    assert greedy.tokens[r, : len(tokens)].tolist() == tokens and len(latents)
    torch.testing.assert_close(greedy.latents[r], latents, atol=1e-10, rtol=0)


def test_a_converted_folder_is_healed_resumed_and_evaluated(world, tmp_path):
    """Breaks if healing starts from another model than OUT/converted, leaves a part of it as it
    was or does not resume, a folder is converted over another, or the evaluation loads another
    model.
    """
    config = settings(world, tmp_path / "a", Config, rank=20, lr=1e-3, save_every=2)
    before = load(m2la.train(dataclasses.replace(config, heal=False)), cls=Model)[0]
    with pytest.raises(SystemExit, match="is there: pass --resume"):
        m2la.train(config)
    config.resume = True
    last = m2la.train(config)
    after, log = load(last, cls=Model)[0], read_log(config.out)
    assert before.config.m2la == after.config.m2la == dict(rank=20, roped=1, norm="exact")
    assert log[0]["latents"] > 0 and len(log) == 4
    for name, weight in before.named_parameters():
        moved = not torch.equal(weight, after.get_parameter(name))
        assert moved or not ("self_attn" in name and "language" in name), name

    shutil.rmtree(last)
    again = load(m2la.train(config), cls=Model)[0].state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in after.state_dict().items())
    assert [line["loss"] for line in read_log(config.out)] == [line["loss"] for line in log]

    shown = {name: SMALL[name] for name in ("image_max_tokens", "l_max", "max_length", "system")}
    more = dict(model=config.out, data=world["test"], workers=0, limit=4, max_new_tokens=8)
    asked = evaluate.Config(**shown, **more, out=str(tmp_path / "eval"))
    assert m2la.evaluate_folder(asked)["all"]["n"] == 4
    with pytest.raises(ValueError, match="are missing from|have no place in"):
        evaluate.evaluate(dataclasses.replace(asked, out=str(tmp_path / "plain")))


def test_the_bench_says_bytes_by_formula(capsys, monkeypatch):
    """Breaks if the bench measures another cache than 2 G d and r + d + G numbers of four bytes."""
    monkeypatch.setattr(m2la, "CONTEXTS", (5, 9))
    m2la.main(Config(bench="tiny"))
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0].strip("| ") for line in lines] == ["5", "9"]
    for line in lines:
        assert line[4:] == [str(4 * 2 * 8 * 128), f"{4 * (7 * 128 + 128 + 8)} |"]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rank=FULL + 1), f"expected rank <= {FULL}, "),
        (dict(roped=3), "1 <= roped <= 2"),
        (dict(rank=60), "calibration: 3 tokens, expected at least 60"),
        (dict(norm="none"), "expected exact or linear"),
    ],
)
def test_what_cannot_be_converted(trained, options, message):
    """Breaks if a rank or a model that does not fit is found out later."""
    ids = trained[1]["input_ids"][:1, :3]
    three = dict(input_ids=ids, labels=ids * 0 - 100, attention_mask=ids * 0 + 1)
    with pytest.raises(ValueError, match=message):
        compressed(trained[0], three, **options)


def test_nothing_is_converted_twice(trained):
    """Breaks if a converted model is taken for a plain one."""
    model, b = trained
    with pytest.raises(ValueError, match="converted already"):
        compressed(compressed(model, b), b)
