"""The compressed cache: the steps of the conversion and both ways to attend, against plain sums."""

import copy
import os
import shutil

import numpy as np
import pytest
import torch
from test_latent_decode import EOS, ROWS, shuffle, spans
from test_model import make_batch
from test_sft import SMALL, read_log, settings
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

import evaluate
from common.run import rows_of
from common.shared_prefix import DecodingCache, Layout
from data import model_inputs
from latent_decode import decode_slowly, generate, token_logprobs
from model import FutureL1, load
from variants import m2la
from variants.m2la import M2LA, Config, Model, Moments, convert, fit

G, H, D_HEAD, D = 2, 4, 24, 96  # of the tiny model
FULL = (2 * G - 1) * D_HEAD  # the rank with which only RoPE is lost


@pytest.fixture
def exact(monkeypatch):
    """Text norms in the dtype of what they read: transformers' compute in fp32."""

    def forward(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(Qwen3VLTextRMSNorm, "forward", forward)


@pytest.fixture
def trained(batch, exact):
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


def with_other_words(b):
    """The same batch with its words in another order."""
    ids = b["input_ids"].clone()
    word = ids < 200  # control tokens come after the words
    ids[word] = ids[word].flip(0)
    assert word.any() and not torch.equal(ids, b["input_ids"])
    return dict(b, input_ids=ids)


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
    for some in (b, with_other_words(b)):
        torch.testing.assert_close(states(whole, some), states(model, some), atol=1e-12, rtol=0)
    one = compressed(model, b, rank=FULL)  # without RoPE on the second component
    assert (states(one, b) - states(model, b)).abs().max() > 1e-3
    assert type(whole) is Model and type(model) is FutureL1


def test_full_rank_is_a_model_with_partial_rope(layer):
    """Step 2. Breaks if another component keeps RoPE, or the content is not all that is left."""
    attention, read, moments = layer
    new = fit(attention, moments, rank=FULL, roped=1, norm="exact")
    n = 13
    torch.manual_seed(3)
    x = torch.randn(1, n, D, dtype=torch.float64)
    angle = torch.randn(n, D_HEAD // 2, dtype=torch.float64).repeat(1, 2)  # any: M-RoPE has three
    cos, sin = angle.cos(), angle.sin()
    with torch.no_grad():
        out, _ = new(x, (cos[None], sin[None]), prefix=Layout([(0, [n])], "cpu"))
        q = attention.q_norm(attention.q_proj(x).view(n, H, D_HEAD)).numpy()

    _, calibrated, _ = scaled_keys(attention, read, read)
    mu, keys, s = scaled_keys(attention, read, x[0])
    u = np.tile(first_axes(calibrated), (2, 1))  # (d, G)
    kept = np.einsum("ig,ih,nhi->ngi", u, u, keys)  # the first component, back in each head
    heads, v = [], raw(attention, x[0])[2]
    q_turned, k_turned = (
        turn_by(q, cos.numpy(), sin.numpy()),
        turn_by(kept, cos.numpy(), sin.numpy()),
    )
    for h in range(H):
        g = h // (H // G)
        logit = q_turned[:, h] @ k_turned[:, g].T + q[:, h] @ (keys - kept)[:, g].T  # (n, n)
        logit = logit * (s / mu)[:, g] / np.sqrt(D_HEAD)
        p = np.tril(np.exp(logit - logit.max()))
        heads.append(p / p.sum(1, keepdims=True) @ v[:, g])
    expected = attention.o_proj(torch.tensor(np.concatenate(heads, 1)))
    torch.testing.assert_close(out[0], expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("rank", [1, 20, 48, FULL])
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


def test_linear_norm_by_least_squares(trained, layer, monkeypatch):
    """Breaks if `linear` is anything but t = 1 with the mu nearest to s."""
    model, b = trained
    attention, read, moments = layer
    mu, _, _ = scaled_keys(attention, read, read)
    np.testing.assert_allclose(m2la.rotate(attention, moments)[0], mu, rtol=1e-12)
    linear, exact = (compressed(model, b, rank=30, norm=norm) for norm in ("linear", "exact"))
    assert not any("k_proj" in name or "mu" in name for name in linear.state_dict())
    gap = (states(linear, b) - states(exact, b)).abs().max()
    monkeypatch.setattr(M2LA, "key_scale", lambda self, x: x.new_ones(*x.shape[:2], G))
    torch.testing.assert_close(states(linear, b), states(exact, b), atol=1e-12, rtol=0)
    assert gap > 1e-3


@pytest.mark.parametrize("norm", ["exact", "linear"])
@torch.no_grad()
def test_absorbed_decoding_is_one_expanded_forward(trained, norm):
    """Breaks if the two ways to attend differ, in a prompt with images and latents, in what
    follows, with rows that leave, or if the cache is not as small as it says.
    """
    model, b = trained
    model, rank, more = compressed(model, b, rank=20, norm=norm), 20, 6
    expected = states(model, b)  # (B, T, D)
    ids, lengths = b["input_ids"], b["attention_mask"].sum(1)
    x, visual, deepstack = model.embed(
        **{k: v for k, v in model_inputs(b).items() if k != "attention_mask"},
        latents=model.encode_frames(b["future_pixel_values"], b["future_grid_thw"]),
    )
    positions, _ = model.positions(ids, b["attention_mask"], b["image_grid_thw"])  # (3, B, T)

    # all prompts in one row, then token by token
    P = lengths - more
    prompts = torch.arange(ids.shape[1]) < P[:, None]  # (B, T)
    kept = prompts[visual]
    row = x[prompts][None], visual[prompts][None], [layer[kept] for layer in deepstack]
    layout = Layout([(int(n), []) for n in P], "cpu")
    h, prompt = model.states(row, positions[:, prompts], layout, use_cache=True)
    torch.testing.assert_close(h, expected[prompts], atol=1e-10, rtol=0)

    numbers = rank + D_HEAD + (G if norm == "exact" else 0)
    width = sum(x.shape[-1] * x.shape[1] for x in (prompt.layers[0].keys, prompt.layers[0].values))
    assert width == numbers and prompt.layers[0].keys.shape[2] == P.sum()
    cache = DecodingCache(prompt, P.tolist(), 2)
    cache.reserve(more)
    rows = torch.arange(len(P)).repeat_interleave(2)
    for k in range(more):
        if k == 3:  # some rows leave
            cache.keep(torch.tensor([0, 3, 4, 5]))
            rows = rows[[0, 3, 4, 5]]
        at = P[rows] + k
        h = cache.feed(
            model.model.language_model, x[rows, at], positions[0, rows, at][:, None], None
        )
        torch.testing.assert_close(h, expected[rows, at], atol=1e-10, rtol=0)
    held = [x.numel() for pair in (*cache.prompt, *cache.own) for x in pair]
    places = len(cache.padding) * cache.padding.shape[-1] + len(rows) * more
    assert sum(held) == numbers * places * len(prompt.layers)


@pytest.mark.parametrize("norm", ["exact", "linear"])
def test_what_is_generated_replays(model, tokenizer, norm):
    """Breaks if a converted model's record is not what it was fed: left padding, images, videos,
    latents, samples decoded together.
    """
    model = shuffle(model, 3).requires_grad_(False)
    batch = make_batch(tokenizer, ROWS, side="left")
    labels = torch.full_like(batch["input_ids"], -100)
    convert(model, [dict(batch, labels=labels)], Config(rank=16, norm=norm))
    eos = tokenizer.convert_tokens_to_ids(EOS.split())
    options = dict(max_new_tokens=24, max_latents=3, eos_token_id=eos)
    sampling = dict(temperature=1.0, n=3, generator=torch.Generator().manual_seed(0))
    rollout = generate(model, batch, **options, **sampling)
    assert sum(len(spans(row.tolist(), model.config)) for row in rollout.tokens) > 5
    logp = token_logprobs(model, batch, rollout, 1.0)
    torch.testing.assert_close(logp, rollout.logprobs, atol=2e-4, rtol=0)

    greedy = generate(model, batch, **options)
    prompt = make_batch(tokenizer, ROWS[:1])
    tokens, latents = decode_slowly(model, prompt, 24, 3, eos)
    assert greedy.tokens[0, : len(tokens)].tolist() == tokens
    torch.testing.assert_close(greedy.latents[0], latents, atol=1e-3, rtol=0)
    sampling["generator"].manual_seed(0)
    shared = generate(model, batch, **options, **sampling, share=True)
    assert torch.equal(shared.tokens, rollout.tokens)


def test_a_converted_folder_is_a_folder_like_others(world, tmp_path):
    """Breaks if the conversion is lost on disk, healing starts from another model or leaves a part
    of it as it was, or a folder is converted over another.
    """
    more = dict(rank=20, lr=1e-3, calibration=4)
    config = settings(world, tmp_path / "a", Config, **more, steps=2)
    last = m2la.train(config)
    before, _ = load(os.path.join(config.out, "converted"), cls=Model)
    after, _ = load(last, cls=Model)
    assert before.config.m2la == after.config.m2la == dict(rank=20, roped=1, norm="exact")
    assert read_log(config.out)[0]["latents"] > 0
    for name, weight in before.named_parameters():
        moved = not torch.equal(weight, after.get_parameter(name))
        assert moved or not ("self_attn" in name and "language" in name), name
    with pytest.raises(SystemExit, match="is there: pass --resume"):
        m2la.train(config)

    plain, tokenizer = load(world["model"], latent_head="linear")
    ids = make_batch(tokenizer, ["moves right up", "the ball"])
    one = m2la.write_converted(settings(world, tmp_path / "b", Config, **more), rows_of(config))
    torch.testing.assert_close(load(one, cls=Model)[0](**ids).logits, before(**ids).logits)
    assert not torch.allclose(plain(**ids).logits, before(**ids).logits, atol=1e-3)

    config.resume = True
    shutil.rmtree(last)
    again = load(m2la.train(config), cls=Model)[0].state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in after.state_dict().items())


def evaluation(world, out, **more):
    """Settings of an evaluation of the tiny model."""
    shown = {name: SMALL[name] for name in ("image_max_tokens", "l_max", "max_length", "system")}
    own = dict(data=world["test"], out=str(out), workers=0, batch=4)
    return evaluate.Config(**shown, **own, **more)


def test_a_converted_folder_is_evaluated(world, tmp_path):
    """Breaks if the evaluation loads another model than the converted one."""
    config = settings(world, tmp_path / "a", Config, rank=20, calibration=4, heal=False)
    folder = m2la.train(config)
    table = m2la.evaluate_folder(
        evaluation(world, tmp_path / "eval", model=folder, limit=4, max_new_tokens=8)
    )
    assert table["all"]["n"] == 4 and table["all"]["tokens"] > 0
    with pytest.raises(ValueError, match="are missing from|have no place in"):
        evaluate.evaluate(
            evaluation(world, tmp_path / "plain", model=folder, limit=4, max_new_tokens=8)
        )


def test_the_bench_says_bytes_by_formula(capsys, monkeypatch):
    """Breaks if the bench measures another cache than 2 G d and r + d + G numbers of four bytes."""
    monkeypatch.setattr(m2la, "CONTEXTS", (5, 9))
    m2la.main(Config(bench="tiny"))
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0].strip("| ") for line in lines] == ["5", "9"]
    for line in lines:
        assert line[4:] == [str(4 * 2 * 8 * 128), f"{4 * (7 * 128 + 128 + 8)} |"]


def test_what_cannot_be_converted(trained):
    """Breaks if a rank or a model that does not fit is found out later."""
    model, b = trained
    for options, message in (
        (dict(rank=FULL + 1), f"expected rank <= {FULL}, "),
        (dict(roped=3), "1 <= roped <= 2"),
        (dict(roped=0), "1 <= roped <= 2"),
        (dict(rank=60), "calibration: 3 tokens, expected at least 60"),
    ):
        some = three_words(b) if "tokens" in message else b
        with pytest.raises(ValueError, match=message):
            compressed(model, some, **options)
    with pytest.raises(ValueError, match="converted already"):
        compressed(compressed(model, b), b)
    with pytest.raises(ValueError, match="expected exact or linear"):
        Config(norm="none")


def three_words(b):
    ids = b["input_ids"][:1, :3]
    return dict(input_ids=ids, labels=torch.full_like(ids, -100), attention_mask=ids * 0 + 1)
