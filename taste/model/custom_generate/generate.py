"""Decoding that switches between words and latents, for transformers' own Qwen3-VL.

Every folder that this project saves holds this file as custom_generate/generate.py. transformers
runs it in place of its own decoding loop, without any other file of this project:

    model = AutoModelForImageTextToText.from_pretrained(FOLDER)
    model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True)

It takes what transformers' `generate` takes, and returns what that returns. While a row is in a
span, between `<|latent_start|>` and `<|latent_end|>`, the model does not choose a word: its last
hidden state is fed back as the next input embedding.

    z_1 = h_p                  p = position of <|latent_start|>; z_1 is the input at p + 1
    z_{k+1} = h_{p+k}          paper sec. 3.1, arXiv 2606.05769

A span ends when the model chooses `<|latent_end|>`, and at `max_latents` at the latest. Outside a
span, `<|latent|>`, `<|latent_end|>`, the placeholders of images and videos and `suppress_tokens`
are never chosen.

Axis letters: B prompts, R rows = B * num_return_sequences, P prompt tokens, D hidden, V vocabulary.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open
from transformers import generation
from transformers.utils import cached_file

# arguments that change nothing here, and those that change nothing if they are 1
IGNORED = "use_cache bos_token_id mm_token_type_ids tokenizer disable_compile custom_generate "
IGNORED += "trust_remote_code transformers_version _from_model_config"
NEUTRAL_AT_1 = "num_beams num_beam_groups repetition_penalty length_penalty typical_p"
INDEX = "model.safetensors.index.json"


@dataclass
class Imagined(generation.GenerateDecoderOnlyOutput):
    """transformers' output, and the latents of each row (N, D) in the order they were fed."""

    latents: list | None = None


@torch.no_grad()
def generate(
    inputs=None, generation_config=None, *, model, input_ids=None, attention_mask=None,
    pixel_values=None, image_grid_thw=None, pixel_values_videos=None, video_grid_thw=None,
    stopping_criteria=None, streamer=None, **asked,
):  # fmt: skip
    """Continue left-padded prompts (B, P) with words and latents -> sequences (R, P + new tokens).

    With return_dict_in_generate it is an `Imagined`. asked: max_latents, and whatever else belongs
    to a generation config, which is read in the same way: see `read_settings`. Sampling draws from
    torch's global generator. Raises ValueError for right padding, for a model without latent
    tokens, and for arguments that are not supported, which it names.
    """
    ids, c = inputs if input_ids is None else input_ids, model.config
    if getattr(c, "latent_start_id", None) is None:
        raise ValueError("the model's config has no latent_start_id: this is no Future-L1 model")
    if ids is None:
        raise ValueError("generate needs a prompt: input_ids")
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask  # (B, P)
    if not bool(mask[:, -1].all()):
        raise ValueError("generate needs left-padded prompts: attention_mask must end in 1")
    settings = read_settings(model, generation_config, asked, ids.shape[1])
    criteria = generation.StoppingCriteriaList(stopping_criteria or [])
    head = latent_head(model)
    if streamer is not None:
        streamer.put(ids.cpu())

    # the prompts, once each; latents count as text, so positions go on by one after them
    types = (ids == c.image_token_id).int() + 2 * (ids == c.video_token_id).int()  # (B, P)
    grids = dict(image_grid_thw=image_grid_thw, video_grid_thw=video_grid_thw)
    positions, offset = model.model.get_rope_index(ids, types, attention_mask=mask, **grids)
    media = dict(grids, pixel_values=pixel_values, pixel_values_videos=pixel_values_videos)
    prompt = dict(input_ids=ids, attention_mask=mask, position_ids=positions)  # (3, B, P)
    out = model.model(**prompt, **media, use_cache=True)
    cache, h = out.past_key_values, out.last_hidden_state[:, -1]  # (B, D)

    # each row's state: what chooses its next token, where that stands, whether it is in a span
    cache.batch_repeat_interleave(settings.n)
    position = mask.sum(-1, keepdim=True) + offset  # (B, 1)
    start = ids, mask, h, position
    ids, mask, h, position = (x.repeat_interleave(settings.n, 0) for x in start)  # (R, ...)
    count = torch.zeros_like(ids[:, 0])  # (R,) latents of the open span
    in_span, done = count > 0, count > 0
    latents = [[] for _ in ids]

    for _ in range(settings.max_new_tokens):
        logits = model.lm_head(h).float()  # (R, V)
        token = choose(logits, in_span, count >= settings.max_latents, c, settings)
        token = torch.where(done, settings.pad, token)  # (R,)
        ids = torch.cat([ids, token[:, None]], 1)
        z = h if head is None else head(h)  # (R, D)
        is_latent = in_span & (token == c.latent_id) & ~done
        for row in is_latent.nonzero()[:, 0].tolist():
            latents[row].append(z[row])
        if streamer is not None:
            streamer.put(token.cpu())
        done = done | (torch.isin(token, settings.eos) & ~in_span) | criteria(ids, None)
        if bool(done.all()):
            break

        # feed the word, or inside a span the state itself
        in_span = is_latent | (token == c.latent_start_id)
        count = torch.where(is_latent, count + 1, 0)
        x = model.get_input_embeddings()(token)  # (R, D)
        x = torch.where(is_latent[:, None], z.to(x.dtype), x)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        new = dict(inputs_embeds=x[:, None], position_ids=position.expand(3, -1, -1))  # (R, 1, D)
        out = model.model(**new, attention_mask=mask, past_key_values=cache, use_cache=True)
        h, position = out.last_hidden_state[:, -1], position + 1  # (R, D)

    if streamer is not None:
        streamer.end()
    if not settings.return_dict:
        return ids
    latents = [torch.stack(row) if row else z.new_zeros(0, z.shape[-1]) for row in latents]
    return Imagined(sequences=ids, past_key_values=cache, latents=latents)


def choose(logits, in_span, full, config, settings):
    """One decision a row, logits (R, V) -> tokens (R,). Source: paper sec. 3.1.

    in_span (R,) bool: only stop and continue are possible. full (R,) bool: the span is as long as
    it may be and stops. The probability of a stop is that of `<|latent_end|>` among all words,
    whatever top-k and top-p leave out.
    """
    logits = settings.heat(None, logits)
    never = torch.tensor(settings.never, device=logits.device)
    words = logits.index_fill(-1, never, -torch.inf)
    if settings.do_sample:
        word = settings.cut(None, words).softmax(-1).multinomial(1)[:, 0]
        p_stop = logits.softmax(-1)[:, config.latent_end_id]
        stop = torch.rand_like(p_stop) < p_stop
    else:
        word, stop = words.argmax(-1), logits.argmax(-1) == config.latent_end_id
    in_a_span = torch.where(stop | full, config.latent_end_id, config.latent_id)
    return torch.where(in_span, in_a_span, word)


def read_settings(model, generation_config, asked, prompt_length):
    """What `generate` was asked for: its arguments, then a generation config, then the model's own.

    Raises ValueError naming everything that was asked for and is not supported, such as beams.
    """
    configs = filter(None, (model.generation_config, generation_config))
    configs = [config.to_diff_dict() for config in configs]
    asked = {name: value for name, value in asked.items() if value is not None}
    asked = {**configs[0], **configs[-1], **asked}
    take, c = asked.pop, model.config
    s = SimpleNamespace(do_sample=take("do_sample", False), n=take("num_return_sequences", 1))
    room = take("max_length", prompt_length + 2048) - prompt_length
    s.max_new_tokens = take("max_new_tokens", room)
    if s.max_new_tokens < 1 or s.n < 1:
        raise ValueError(f"bad arguments: max_new_tokens={s.max_new_tokens}, {s.n} sequences")
    s.max_latents = take("max_latents", getattr(c, "max_latents", 8))
    s.never = [c.latent_id, c.latent_end_id, c.image_token_id, c.video_token_id]
    s.never += take("suppress_tokens", [])
    s.return_dict = take("return_dict_in_generate", False)
    s.eos = torch.tensor(take("eos_token_id", []), dtype=torch.long, device=model.device).flatten()
    s.pad = take("pad_token_id", s.eos[0] if len(s.eos) else 0)

    # temperature holds for words and for stops, top-k and top-p for words alone
    temperature, top_k, top_p = take("temperature", 1.0), take("top_k", 0), take("top_p", 1.0)
    s.heat, s.cut = generation.LogitsProcessorList(), generation.LogitsProcessorList()
    if s.do_sample:
        s.heat.append(generation.TemperatureLogitsWarper(float(temperature)))
        s.cut += [generation.TopKLogitsWarper(top_k)] if top_k else []
        s.cut += [generation.TopPLogitsWarper(top_p)] if top_p != 1 else []

    ones = [name for name in NEUTRAL_AT_1.split() if asked.get(name) == 1]
    asked = {name: value for name, value in asked.items() if name not in IGNORED.split() + ones}
    refused = [name for name, value in asked.items() if torch.is_tensor(value) or value]
    if refused:
        raise ValueError(f"not supported while the model imagines: {', '.join(sorted(refused))}")
    return s


def latent_head(model):
    """The linear map from states to latents, where the folder has one, else None: z = h (paper).

    transformers' own class has no place for it, so it is read from the folder that the model was
    loaded from, once.
    """
    if getattr(model.config, "latent_head", None) != "linear":
        return None
    if getattr(model, "latent_head", None) is None:
        folder, at = model.name_or_path, dict(revision=getattr(model.config, "_commit_hash", None))
        # a large model has several files of weights, and an index that says which holds what
        index = cached_file(folder, INDEX, **at, _raise_exceptions_for_missing_entries=False)
        files = json.loads(Path(index).read_text("utf-8"))["weight_map"] if index else {}
        state = {}
        for name in ("weight", "bias"):
            file = files.get(f"latent_head.{name}", "model.safetensors")
            with safe_open(cached_file(folder, file, **at), "pt") as f:
                state[name] = f.get_tensor(f"latent_head.{name}")
        head = torch.nn.Linear(*state["weight"].shape)
        head.load_state_dict(state)
        model.latent_head = head.to(model.lm_head.weight)  # its dtype and device
    return model.latent_head
