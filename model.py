"""The backbone with a second output channel (paper sec. 3.1 and 3.2).

`FutureL1` is transformers' Qwen3-VL plus one idea: between `<|latent_start|>` and `<|latent_end|>`
the model does not choose a word. Its last hidden state (after the final norm) is fed back as the
next input embedding.

    z_1 = h_p                  p = position of <|latent_start|>; z_1 is the input at p + 1
    z_{k+1} = h_{p+k}          so the state at t - 1 *predicts* the latent at t        sec. 3.1
    e* = vision tower and merger of a future frame, what a latent is trained to be    sec. 3.2

    model, tokenizer = load("Qwen/Qwen3-VL-2B-Instruct")  # or a Future-L1 folder, or a toy folder
    out = model(input_ids, attention_mask, pixel_values, image_grid_thw, latents=latents)

The loss, Eq. (1)-(3), is in sft.py.

Where this differs from the paper:
 1. Optional and off by default: a linear latent head. A tiny model needs it, whose states and
    visual embeddings live on different scales; the paper's model does not.
Where this differs from the official code:
 2. A subclass, not a patched copy: weights of either project load in the other and in stock
    Qwen3-VL. Stock `generate` then runs without imagination: it feeds `<|latent|>`, the token.
 3. The number of latents is checked against the number of `<|latent|>` tokens before anything runs.

Axis letters: B rows, T tokens, N latents (all rows together), D hidden, V vocabulary.
"""

import json
import os

import torch
import torch.nn as nn
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutputWithPast

LATENT_START, LATENT, LATENT_END = "<|latent_start|>", "<|latent|>", "<|latent_end|>"


LATENT_IDS = {
    "latent_start_id": LATENT_START,
    "latent_id": LATENT,
    "latent_end_id": LATENT_END,
}  # config key: token


class FutureL1(Qwen3VLForConditionalGeneration):
    """Qwen3-VL that reads latents at `<|latent|>` positions and can produce them.

    Source: paper sec. 3.1.
    """

    def __init__(self, config):
        super().__init__(config)
        self.latent_head = None  # the paper's method: the hidden state itself is the latent
        if getattr(config, "latent_head", None) == "linear":
            self.add_latent_head()

    def add_latent_head(self):
        """A linear map from states to latents, starting as the identity, i.e.

        As the paper's method. Source: ours.
        """
        D = self.config.text_config.hidden_size
        self.config.latent_head = "linear"
        self.latent_head = nn.Linear(
            D, D, dtype=self.lm_head.weight.dtype, device=self.lm_head.weight.device
        )
        nn.init.eye_(self.latent_head.weight)
        nn.init.zeros_(self.latent_head.bias)

    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        """Load a Future-L1 folder, or a stock Qwen3-VL folder (adds the three tokens.

        Its tokenizer is then read too).

        Embeddings are resized only if the ids do not fit: stock Qwen3-VL has spare rows, and those
        are left as they
        are, so that a stock folder gives stock logits. Raises OSError if the folder is not a model.
                                                  Source: ours.
        """
        loaded = super().from_pretrained(folder, *args, **kwargs)
        model = (
            loaded[0] if isinstance(loaded, tuple) else loaded
        )  # a tuple with output_loading_info=True
        if any(getattr(model.config, key, None) is None for key in LATENT_IDS):
            model.set_latent_tokens(add_latent_tokens(AutoTokenizer.from_pretrained(folder)))
        return loaded

    def set_latent_tokens(self, ids):
        """ids {config key: id} -> stored in the config.

        Grows the embeddings if an id does not fit. Source: ours.
        """
        for key, value in ids.items():
            setattr(self.config, key, value)
        rows = self.get_input_embeddings().num_embeddings
        if max(ids.values()) >= rows:
            self.resize_token_embeddings(max(ids.values()) + 1)
            self.config.text_config.vocab_size = max(ids.values()) + 1

    def save_pretrained(self, folder, **kwargs):
        """A plain Hugging Face folder whose config names the stock class, so that other software
        loads it.
        """
        super().save_pretrained(folder, **kwargs)
        path = os.path.join(folder, "config.json")
        with open(path) as f:
            config = json.load(f)
        config["architectures"] = ["Qwen3VLForConditionalGeneration"]
        with open(path, "w") as f:
            json.dump(config, f, indent=2)

    # ------------------------------------------------------------------------------------ embedding

    @torch.no_grad()
    def encode_frames(self, pixel_values, grid):
        """e*: what future frames look like to the model. Source: Eq. (3), sec. 3.2.

        pixel_values (patches, 1536), grid (frames, 3) -> (N, D): vision tower and merger, no
        deepstack, no pooling, no gradient (the target is frozen, whatever else is trained).
        """
        return self.model.visual(
            pixel_values.to(self.model.visual.dtype), grid_thw=grid
        ).pooler_output

    def embed(
        self,
        input_ids,
        pixel_values=None,
        image_grid_thw=None,
        pixel_values_videos=None,
        video_grid_thw=None,
        latents=None,
    ):
        """Token ids (B, T) -> what is fed: embeddings (B, T, D), mask of visual positions,
        deepstack features.

        Raises ValueError naming both numbers if images, videos or latents do not match their
        placeholder tokens.
        """
        x = self.get_input_embeddings()(input_ids)  # (B, T, D)
        visual, parts = None, []
        for name, token_id, pixels, grid in (
            ("image", self.config.image_token_id, pixel_values, image_grid_thw),
            ("video", self.config.video_token_id, pixel_values_videos, video_grid_thw),
        ):
            where = input_ids == token_id  # (B, T)
            if pixels is None:
                _check_count(f"<|{name}_pad|>", where, f"{name} features", None)
                continue
            out = self.model.visual(pixels.to(self.model.visual.dtype), grid_thw=grid)
            _check_count(f"<|{name}_pad|>", where, f"{name} features", out.pooler_output)
            x = x.masked_scatter(where[..., None], out.pooler_output.to(x.dtype))
            visual = where if visual is None else visual | where
            parts.append((where, out.deepstack_features))
        where = input_ids == getattr(self.config, "latent_id", -1)
        _check_count(LATENT, where, "latents", latents)
        if latents is not None:
            x = x.masked_scatter(where[..., None], latents.to(x.dtype))  # row by row, in order
        if len(parts) < 2:
            return x, visual, parts[0][1] if parts else None
        # both images and videos: their features in the order of the sequence
        deepstack = []
        for per_kind in zip(*(features for _, features in parts)):
            joint = per_kind[0].new_zeros(int(visual.sum()), per_kind[0].shape[-1])
            for (where, _), features in zip(parts, per_kind):
                joint[where[visual]] = features
            deepstack.append(joint)
        return x, visual, deepstack

    def positions(self, input_ids, attention_mask=None, image_grid_thw=None, video_grid_thw=None):
        """M-RoPE positions (3, B, T) and each row's offset (B, 1) for the words after it.

        Source: Qwen3-VL.

        Latents count as text.
        """
        kind = (input_ids == self.config.image_token_id).int() + 2 * (
            input_ids == self.config.video_token_id
        ).int()
        return self.model.get_rope_index(
            input_ids,
            kind,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            attention_mask=attention_mask,
        )

    def hidden(
        self,
        input_ids,
        attention_mask=None,
        pixel_values=None,
        image_grid_thw=None,
        pixel_values_videos=None,
        video_grid_thw=None,
        latents=None,
        past_key_values=None,
        position_ids=None,
        use_cache=False,
    ):
        """-> last hidden states after the final norm (B, T, D), the cache or None.

        Arguments as `forward`.
        """
        x, visual, deepstack = self.embed(
            input_ids, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw, latents
        )
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if position_ids is None and past == 0:
            position_ids, self.model.rope_deltas = self.positions(
                input_ids, attention_mask, image_grid_thw, video_grid_thw
            )
        elif (
            position_ids is None
        ):  # words after a cached prompt: count on from where its M-RoPE positions ended
            seen = (
                torch.arange(past + input_ids.shape[1], device=x.device).expand(len(x), -1)
                if attention_mask is None
                else attention_mask.cumsum(-1) - 1
            )
            position_ids = (seen[:, -input_ids.shape[1] :] + self.model.rope_deltas).expand(
                3, -1, -1
            )  # (3, B, T)
        out = self.model.language_model(
            inputs_embeds=x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            visual_pos_masks=visual,
            deepstack_visual_embeds=deepstack,
            use_cache=use_cache,
        )
        return out.last_hidden_state, out.past_key_values

    def to_latent(self, h):
        """Hidden states (..., D) -> the latents they predict (..., D): themselves (paper) or
        through the head.
        """
        return h if self.latent_head is None else self.latent_head(h)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        pixel_values=None,
        image_grid_thw=None,
        pixel_values_videos=None,
        video_grid_thw=None,
        latents=None,
        past_key_values=None,
        position_ids=None,
        use_cache=None,
        logits_to_keep=0,
        mm_token_type_ids=None,
    ):
        """Logits (B, T, V), with `latents` (N, D) fed at the `<|latent|>` positions, row by row
        in order.

        `.hidden_states[-1]` is h (B, T, D). logits_to_keep: only the last k positions, 0 = all.
        mm_token_type_ids is accepted because HF processors return it; it is recomputed. Raises
        ValueError on a count mismatch.
        """
        h, cache = self.hidden(
            input_ids,
            attention_mask,
            pixel_values,
            image_grid_thw,
            pixel_values_videos,
            video_grid_thw,
            latents,
            past_key_values,
            position_ids,
            bool(use_cache) or past_key_values is not None,
        )
        logits = self.lm_head(h[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache, hidden_states=(h,))

    def generate(self, *args, **kwargs):
        """Not here: transformers' own loop knows no latents.

        Raises TypeError that says where to go. Source: ours.
        """
        raise TypeError(
            "latent_decode.generate decodes words and latents; for words alone, load the folder as "
            "transformers' Qwen3VLForConditionalGeneration"
        )


def _check_count(token, where, name, rows):
    found, given = int(where.sum()), 0 if rows is None else len(rows)
    if found != given:
        raise ValueError(f"{found} {token} tokens in input_ids but {given} {name}")


def log_continue(log_stop):
    """log p(stop) -> log(1 - p(stop)): the other outcome of a step inside a span. Source: ours."""
    return torch.log(-torch.expm1(log_stop.clamp(max=-1e-7)))  # finite where p rounds to 1


def log_density(z, mean, sigma):
    """log N(z; mean, sigma^2) of noisy latents (N, D) -> (N,), the mean over D and without the
    constant. Source: ours.

    The mean keeps it on the scale of a word's log-probability; the sum over thousands of dimensions
    would drown that.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    return -((z.to(wide) - mean.to(wide)) / sigma).square().mean(-1) / 2


def add_latent_tokens(tokenizer):
    """Give a tokenizer the three control tokens if it lacks them -> {config key: id}.

    Source: paper sec. 3.1.
    """
    tokenizer.add_tokens(list(LATENT_IDS.values()), special_tokens=True)
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in LATENT_IDS.items()}


def load(folder, latent_head=None, **kwargs):
    """A model folder or hub id -> (FutureL1, tokenizer), stock or ours. Source: ours.

    latent_head: None keeps what the folder has; "linear" adds one, starting as the identity. kwargs
    go to transformers (dtype=, attn_implementation=). Raises ValueError if weights are missing, or
    if config and tokenizer disagree on a token's id.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = add_latent_tokens(tokenizer)
    model, info = FutureL1.from_pretrained(folder, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        raise ValueError(
            f"{folder} lacks {len(info['missing_keys'])} weights, e.g. {min(info['missing_keys'])}"
        )
    for key, token in LATENT_IDS.items():
        if getattr(model.config, key) != ids[key]:
            raise ValueError(
                f"{folder}: config.json says {key} = {getattr(model.config, key)}, "
                f"but its tokenizer gives {token} the id {ids[key]}"
            )
    if latent_head not in (None, "linear"):
        raise ValueError(f"latent_head is {latent_head!r}, expected None or 'linear'")
    if latent_head and model.latent_head is None:
        model.add_latent_head()
    return model, tokenizer


def best_attention():
    """flash_attention_2 where the flash-attn package is installed on CUDA, else sdpa.

    Source: ours.
    """
    from transformers.utils import is_flash_attn_2_available

    return (
        "flash_attention_2" if torch.cuda.is_available() and is_flash_attn_2_available() else "sdpa"
    )
