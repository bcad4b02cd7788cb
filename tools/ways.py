"""The same work done by this repository and by what one would use otherwise, on the same weights.

    work                  ours                            otherwise
    update of a group     the prompt once, one row        a copy of the prompt a rollout, padded
    SFT                   one row without padding         a padded batch, all tokens' logits
    decoding a group      the prompt's keys once          transformers' `generate`, keys copied

*Otherwise* is transformers' own class and attention. It knows no latents: a `<|latent|>` is fed as
its token, which costs the same. tests/tools/test_ways.py: among words both give the same loss.
Source: ours.

Axis letters: R rollouts of one prompt, P prompt tokens, T new tokens, V vocabulary.
"""

import contextlib

import torch
from transformers import Qwen3VLForConditionalGeneration

from la_dapo import adjoint_loss
from latent_decode import MEDIA, generate, replay
from model import FutureL1, best_attention
from sft import sft_loss

TEMPERATURE, TOP_P = 0.9, 0.99  # paper Table 9


@contextlib.contextmanager
def stock(model):
    """transformers' own class and attention on the same weights, inside the context."""
    model.__class__ = Qwen3VLForConditionalGeneration
    model.set_attn_implementation(best_attention())
    try:
        yield
    finally:
        model.__class__ = FutureL1  # puts its own attention back when it is called


def autocast(device):
    """Arithmetic of a training: bf16 on CUDA, fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def checkpoint_activations(model, on):
    """Whether a backward of `model` makes its activations again."""
    if on:
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_disable()


def types_of(model, ids):
    """What transformers wants to know of each token: 1 = image, 2 = video, 0 = text."""
    is_image, is_video = (ids == getattr(model.config, f"{x}_token_id") for x in ("image", "video"))
    return is_image.int() + 2 * is_video.int()


# ------------------------------------------------------------------------------------------- update


def update(model, batch, rollout, advantages, terms=0):
    """Forward and backward of a group -> its loss: -A log p, a mean over what was chosen.

    batch: one prompt. advantages (R, 1). terms: of `adjoint_loss`.
    """
    with autocast(model.device):
        new = replay(model, batch, rollout, TEMPERATURE)
        loss = -(advantages * new.logprobs).sum() / rollout.sampled.sum()
        if terms:
            loss = loss + adjoint_loss(loss, new.predicted, new.latents, terms)
    loss.backward()
    return loss.detach()


def naive_update(model, batch, rollout, advantages):
    """The same with a copy of the prompt before each rollout; logits of new tokens alone."""
    (R, T), tokens = rollout.tokens.shape, rollout.tokens
    ids = torch.cat([batch["input_ids"].expand(R, -1), tokens], 1)  # (R, P + T)
    real = torch.arange(T, device=ids.device) < rollout.lengths[:, None]  # (R, T)
    mask = torch.cat([batch["attention_mask"].expand(R, -1), real.long()], 1)
    media = {name: x.repeat(R, 1) for name, x in batch.items() if name in MEDIA}
    inputs = dict(media, mm_token_type_ids=types_of(model, ids), use_cache=False)
    with stock(model):
        with autocast(model.device):
            out = model(input_ids=ids, attention_mask=mask, logits_to_keep=T + 1, **inputs)
            logp = (out.logits[:, :-1].float() / TEMPERATURE).log_softmax(-1)  # (R, T, V)
            chosen = logp.gather(-1, tokens[..., None])[..., 0]  # (R, T)
            loss = -(advantages * chosen * rollout.sampled).sum() / rollout.sampled.sum()
        loss.backward()
    return loss.detach()


# ---------------------------------------------------------------------------------------------- SFT


def sft(model, batch):
    """Forward and backward of a padded batch with labels -> its loss, Eq. (1)."""
    with autocast(model.device):
        loss = sft_loss(model, **batch)["loss"]
    loss.backward()
    return loss.detach()


def naive_sft(model, batch):
    """The same in transformers' own class: padding takes part, each token has logits."""
    types = types_of(model, batch["input_ids"])
    with stock(model):
        with autocast(model.device):
            loss = model(**batch, mm_token_type_ids=types, use_cache=False).loss
        loss.backward()
    return loss.detach()


# ----------------------------------------------------------------------------------------- decoding


def decode(model, batch, new_tokens, n, **more):
    """n samples a prompt of so many words each -> Rollout. more: as `generate` takes it."""
    words = dict(eos_token_id=-1, banned=(model.config.latent_start_id,))  # no end, no span
    sampling = dict(temperature=TEMPERATURE, top_p=TOP_P, n=n)
    return generate(model, batch, max_new_tokens=new_tokens, **sampling, **words, **more)


def naive_decode(model, batch, new_tokens, n):
    """The same by transformers' `generate` -> its output, with the cache."""
    sampling = dict(do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0)
    words = dict(eos_token_id=None, pad_token_id=0, max_new_tokens=new_tokens)
    types = types_of(model, batch["input_ids"])
    settings = dict(num_return_sequences=n, mm_token_type_ids=types, return_dict_in_generate=True)
    with stock(model), torch.no_grad():
        return model.generate(**batch, **settings, **sampling, **words)
