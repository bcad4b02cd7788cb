"""The backbone: equal to stock Qwen3-VL without latents, and fed what it should be with them."""

import copy
import json
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from latent_decode import generate, token_logprobs
from model import LATENT_IDS, FutureL1, add_latent_tokens, load
from sft import sft_loss
from toy import tiny

SPAN = "<|latent_start|> <|latent|> <|latent|> <|latent_end|>"
# kind and grid in patches
IMAGE, WIDE, VIDEO = ("image", 1, 4, 4), ("image", 1, 2, 6), ("video", 3, 4, 2)
ROWS = {
    "text": [["watch the ball"], ["which wall does it hit next ?"]],
    "images": [["watch", IMAGE, "the", WIDE, "ball"], [WIDE, "red"]],
    "videos": [
        ["the ball", VIDEO, "hits ?"],
        [VIDEO, "up", ("video", 1, 2, 2), "moves right left up down"],
    ],
    "both": [
        ["the", VIDEO, IMAGE, "ball"],
        [WIDE, "red", ("video", 2, 2, 2), "blue", IMAGE, VIDEO, "hits"],
    ],
}


def make_batch(tokenizer, rows, side="right"):
    """Rows of texts and (kind, t, h, w) -> HF-named tensors.

    Pixels are random, but the same for the same row.
    """
    texts, media = [], {"image": [], "video": []}
    for row in rows:
        g = torch.Generator().manual_seed(zlib.crc32(repr(row).encode()))
        text = ""
        for part in row:
            if isinstance(part, str):
                text += f" {part}"
                continue
            kind, t, h, w = part
            pads = f" <|{kind}_pad|>" * (h * w // 4)
            text += f" <|vision_start|>{pads} <|vision_end|>" * t
            media[kind].append(((t, h, w), torch.randn(t * h * w, 1536, generator=g)))
        texts.append(text)
    how = dict(padding=True, padding_side=side, return_token_type_ids=False)
    batch = tokenizer(texts, return_tensors="pt", **how).data
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if media[kind]:
            batch[f"{kind}_grid_thw"] = torch.tensor([grid for grid, _ in media[kind]])
            batch[pixels] = torch.cat([x for _, x in media[kind]])
    return batch


def kinds(model, ids):
    """What HF processors call mm_token_type_ids: 1 image, 2 video, 0 text."""
    c = model.config
    return (ids == c.image_token_id).long() + 2 * (ids == c.video_token_id).long()


def stock_of(model):
    stock = Qwen3VLForConditionalGeneration(copy.deepcopy(model.config)).eval()
    stock.set_attn_implementation("sdpa")
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("latent_head")}
    stock.load_state_dict(own)
    return stock


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def log_softmax(x):
    """(..., V) -> float64 log-probabilities, written out."""
    x = x.detach().double().numpy()
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    "name, side", [("text", "left"), ("images", "right"), ("videos", "left"), ("both", "right")]
)
def test_logits_equal_stock(model, tokenizer, name, side):
    """Breaks if visual features, deepstack features, their order or the positions differ from
    Qwen3-VL's.
    """
    batch = make_batch(tokenizer, ROWS[name], side)
    types, real = kinds(model, batch["input_ids"]), batch["attention_mask"].bool()
    ours = model(**batch, mm_token_type_ids=types).logits[real]
    theirs = stock_of(model)(**batch, mm_token_type_ids=types).logits[real]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    for key in [k for k in batch if k.startswith("pixel")]:  # and the pictures are looked at
        other = model(**{**batch, key: batch[key].flip(0)}).logits[real]
        assert not torch.allclose(other, ours, atol=1e-2)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("spare", [8, 2, 0])
def test_stock_folder_gets_the_tokens(model, tokenizer, tmp_path, monkeypatch, spare, tie):
    """Breaks if a stock folder is resized without need, keeps too few rows, or does not give
    stock logits.
    """
    monkeypatch.setattr(tiny, "add_latent_tokens", lambda tokenizer: {})
    plain = tiny.make_tokenizer([" ".join(w for w in tokenizer.get_vocab() if "<" not in w)])
    words = len(plain)
    settings = {k: v for k, v in model.config.to_dict().items() if k not in LATENT_IDS}
    config = Qwen3VLConfig(**settings)
    config.text_config.vocab_size, config.tie_word_embeddings = words + spare, tie
    stock = Qwen3VLForConditionalGeneration(config).eval()
    batch = make_batch(plain, ROWS["images"])
    expected = stock(**batch, mm_token_type_ids=kinds(stock, batch["input_ids"])).logits

    mine, loaded = load(save(stock, plain, tmp_path / "stock"))
    c = mine.config
    assert (c.latent_start_id, c.latent_id, c.latent_end_id) == (words, words + 1, words + 2)
    assert loaded.convert_tokens_to_ids(SPAN.split()) == [words, words + 1, words + 1, words + 2]
    rows = words + max(spare, 3)
    assert len(mine.lm_head.weight) == len(mine.get_input_embeddings().weight) == rows
    assert c.text_config.vocab_size == rows
    logits = mine.eval()(**batch).logits[..., : words + spare]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=0)
    again = FutureL1.from_pretrained(save(mine, loaded, tmp_path / "again")).eval()
    assert torch.equal(again(**batch).logits, mine(**batch).logits)


def test_load_refuses_a_config_that_contradicts_the_tokenizer(model, tokenizer, tmp_path):
    """Breaks if latents would silently be fed at the positions of another token."""
    again, tok = load(save(model, tokenizer, tmp_path))
    assert add_latent_tokens(tok) == {k: getattr(again.config, k) for k in LATENT_IDS}
    assert len(tok) == len(tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    config["latent_id"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"latent_id = 7.*{model.config.latent_id}"):
        load(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_head_starts_as_identity_and_is_saved(model, tokenizer, tmp_path, dtype):
    """Breaks if adding the head changes the latents, or its weights do not survive a save and a
    load.
    """
    h = torch.randn(2, 3, 96, dtype=dtype)
    assert model.to_latent(h) is h
    mine, _ = load(save(model, tokenizer, tmp_path / "a"), latent_head="linear", dtype=dtype)
    assert torch.equal(mine.to_latent(h), h)
    w, b = (torch.nn.init.normal_(p).detach() for p in mine.latent_head.parameters())
    for choice in (None, "linear"):  # "linear" must keep the head that is there
        again, _ = load(save(mine, tokenizer, tmp_path / "b"), latent_head=choice, dtype=dtype)
        assert torch.equal(again.latent_head.weight, w) and torch.equal(again.latent_head.bias, b)
        expected = h @ w.T + b  # values are around 10
        torch.testing.assert_close(again.to_latent(h), expected, atol=0.2, rtol=0)
    with pytest.raises(ValueError, match="mlp"):
        load(str(tmp_path / "a"), latent_head="mlp")


@pytest.mark.parametrize("given", [None, 3])
def test_wrong_counts_name_both_numbers(model, tokenizer, given):
    """Breaks if latents, images or videos that do not fit their placeholders are accepted, or the
    error is vague.
    """
    batch = make_batch(tokenizer, [["watch", SPAN]])
    with pytest.raises(ValueError, match=rf"^2 <\|latent\|> tokens .* {given or 0} latents"):
        model(**batch, latents=None if given is None else torch.zeros(given, 96))
    with pytest.raises(ValueError, match=r"^0 <\|latent\|> tokens .* 1 latents"):
        model(**make_batch(tokenizer, ROWS["text"]), latents=torch.zeros(1, 96))
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        batch = make_batch(tokenizer, [["the", (kind, 1, 2, 4), "ball"]])
        other = {} if given is None else make_batch(tokenizer, [[(kind, 1, 2, 2 * given)]])
        batch[pixels], grid = other.get(pixels), other.get(f"{kind}_grid_thw")
        message = rf"^2 <\|{kind}_pad\|> tokens .* {given or 0} {kind} features"
        with pytest.raises(ValueError, match=message):
            model(**{**batch, f"{kind}_grid_thw": grid})


def test_encode_frames_is_the_stock_merger_output(model):
    """Breaks if e* has deepstack or pooling in it, or lets a gradient through."""
    pixels, grid = torch.randn(16 + 4 + 8, 1536), torch.tensor([[1, 4, 4], [1, 2, 2], [1, 4, 2]])
    e = model.encode_frames(pixels, grid)
    expected = stock_of(model).model.get_image_features(pixels, grid).pooler_output
    assert torch.equal(e, torch.cat(expected)) and e.shape == (4 + 1 + 2, 96)
    assert not e.requires_grad


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, GPU])])
def test_logits_are_not_rounded_to_bf16(model, device, autocast):
    """Breaks if logits or their gradient are not those of the bf16 factors, or come out in bf16. On
    a GPU the product is one kernel with a result in fp32.
    """
    h = torch.randn(2, 3, 96) * 8
    with torch.no_grad():
        assert torch.equal(model.logits(h), model.lm_head(h))  # fp32 stays what it was
        assert model.double().logits(h.double()).dtype == torch.float64
    dtype = torch.float32 if autocast else torch.bfloat16
    h, weight = h.to(device, dtype).requires_grad_(), model.to(device, dtype).lm_head.weight
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        logits = model.logits(h)
        assert model.logits(h[:0]).shape == (0, 3, len(weight))
        assert torch.equal(model.logits(h[0, 0])[None], model.logits(h[0, :1]))
    x, w = (t.detach().bfloat16().double().cpu() for t in (h, weight))
    expected = x @ w.T
    assert logits.dtype == torch.float32 and expected.abs().max() > 16
    atol = 1e-3 if h.is_cuda else 1e-4  # a GPU's tensor cores add up less exactly
    torch.testing.assert_close(logits.double().cpu(), expected, atol=atol, rtol=1e-5)
    assert (logits.bfloat16() - logits).abs().max() > 0.03  # what rounding would have cost

    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad(logits, (h, weight), upstream.to(device))
    g = upstream.double()
    for ours, true, like in zip(got, (g @ w, g.flatten(0, 1).T @ x.flatten(0, 1)), (h, weight)):
        assert ours.dtype == like.dtype
        error = (ours.double().cpu() - true).norm() / true.norm()
        assert error < 2**-7  # that of bf16


@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_sampled_and_learnt_from_is_not_rounded(model, tokenizer, autocast):
    """Breaks if decoding, replay or the loss of SFT takes logits that were rounded to bf16."""
    if not autocast:
        model.bfloat16()

    def hook(module, args):
        raise AssertionError("the head's own product was taken")

    model.lm_head.register_forward_pre_hook(hook)
    batch, sample = make_batch(tokenizer, ROWS["images"], "left"), dict(temperature=1.0, n=4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rollout = generate(model, batch, max_new_tokens=8, **sample)
        logprobs = token_logprobs(model, batch, rollout, 1.0)
        ids = batch["input_ids"]
        loss = sft_loss(model, **batch, labels=ids, stop_term=True)["loss"]
    assert logprobs.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(logprobs, rollout.logprobs, atol=0.5, rtol=0)  # states are in bf16


def test_load_refuses_weights_it_would_not_use(model, tokenizer, tmp_path):
    """Breaks if a part of another model, or a missing one, is passed over with a warning."""
    folder = save(model, tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    extra = weights | {"projector.weight": torch.zeros(2, 2)}
    missing = {k: v for k, v in weights.items() if k != "lm_head.weight"}
    for content, fault in (
        (extra, "1 weights have no place in the model.* projector.weight"),
        (missing, "1 weights are missing .* lm_head.weight"),
    ):
        save_file(content, tmp_path / "model.safetensors", metadata=dict(format="pt"))
        with pytest.raises(ValueError, match=fault):
            load(folder)


def test_transformers_own_generate_is_refused(model):
    """Breaks if a rollout without latents can be had by mistake."""
    with pytest.raises(TypeError, match="latent_decode.generate .* custom_generate=folder"):
        model.generate(torch.tensor([[1]]), max_new_tokens=1)
