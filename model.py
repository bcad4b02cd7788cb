"""The backbone with a second output channel (paper sec. 3.1 and 3.2).

`FutureL1` is transformers' Qwen3-VL plus one idea, `TwoChannels`: between `<|latent_start|>` and
`<|latent_end|>` the model does not choose a word. Its last hidden state (after the final norm) is
fed back as the next input embedding.

    z_1 = h_p                  p = position of <|latent_start|>; z_1 is the input at p + 1
    z_{k+1} = h_{p+k}          so the state at t - 1 *predicts* the latent at t        sec. 3.1
    e* = vision tower and merger of a future frame, what a latent is trained to be    sec. 3.2

    model, tokenizer = load("Qwen/Qwen3-VL-2B-Instruct")  # or a Future-L1 folder, or a toy folder
    out = model(**batch, latents=latents)  # batch: input_ids, attention_mask, pixel_values, ...

The loss, Eq. (1)-(3), is in sft.py.

Where this differs from the paper:
 1. Optional and off by default: a linear latent head. A tiny model needs it, because its states
    and visual embeddings have different scales; the paper's model does not.
Where this differs from the official code:
 2. A subclass, not a patched copy: weights of either project load in the other and in stock
    Qwen3-VL. Stock `generate` feeds a span the embedding of `<|latent|>` and so does not imagine,
    unless it is given the folder's custom_generate/ (common/custom_generate.py).
 3. The number of latents is checked against the number of `<|latent|>` tokens before anything runs.
 4. What is learnt from or sampled from are logits in fp32 (`FutureL1.logits`), not rounded to bf16.
Where this differs from both, which have the dense Qwen3-VL alone:
 5. `FutureL1MoE` has a mixture of experts (Qwen3-VL-30B-A3B). No loss balances its router in
    training; the largest expert's share of the tokens is logged.

Axis letters: B rows, T tokens, N latents (all rows together), D hidden, V vocabulary.
"""

import json
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import is_flash_attention_requested
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from common import shared_prefix

LATENT_START, LATENT, LATENT_END = "<|latent_start|>", "<|latent|>", "<|latent_end|>"
# config key: token
LATENT_IDS = dict(latent_start_id=LATENT_START, latent_id=LATENT, latent_end_id=LATENT_END)


class TwoChannels:
    """Makes a Qwen3-VL read latents at `<|latent|>` positions and produce them.

    stock: the name of transformers' own class. Source: paper sec. 3.1.
    """

    def __init__(self, config):
        super().__init__(config)
        patches = self.model.visual.patch_embed
        patches.proj = PatchProduct(patches.proj)
        text = self.model.language_model
        stock_norm = type(text.norm)
        for module in [*text.modules()]:
            for name, child in module.named_children():
                if isinstance(child, stock_norm):
                    setattr(module, name, FusedRMSNorm(child))
        self.latent_head = None  # the paper's method: the hidden state itself is the latent
        self.latent_rows = None  # with --lora_rank, the trained part of the three tokens' rows
        if getattr(config, "latent_head", None) == "linear":
            self.add_latent_head()

    def add_latent_head(self):
        """A linear map from states to latents, at first the identity, the paper's method. Ours."""
        weight, D = self.lm_head.weight, self.config.text_config.hidden_size
        # deviation 1: a tiny model's states and visual embeddings live on different scales
        self.config.latent_head = "linear"
        self.latent_head = nn.Linear(D, D, dtype=weight.dtype, device=weight.device)
        nn.init.eye_(self.latent_head.weight)
        nn.init.zeros_(self.latent_head.bias)

    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        """Load a Future-L1 folder, or a stock Qwen3-VL folder. Source: ours.

        For a stock folder the tokenizer is read too, and gets the three tokens. Embeddings are
        resized only if the new ids do not fit. Stock Qwen3-VL has spare rows for them, which keep
        their values, so that a stock folder gives stock logits. Raises OSError if
        the folder is no model.
        """
        loaded = super().from_pretrained(folder, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        if any(getattr(model.config, key, None) is None for key in LATENT_IDS):
            model.set_latent_tokens(add_latent_tokens(AutoTokenizer.from_pretrained(folder)))
        return loaded

    def set_latent_tokens(self, ids):
        """Keep ids {config key: id} in the config; embeddings grow if one does not fit. Ours."""
        for key, value in ids.items():
            setattr(self.config, key, value)
        rows = self.get_input_embeddings().num_embeddings
        if max(ids.values()) >= rows:
            self.resize_token_embeddings(max(ids.values()) + 1)
            self.config.text_config.vocab_size = max(ids.values()) + 1

    def save_pretrained(self, folder, **kwargs):
        """A plain Hugging Face folder whose config names the stock class: others load it too."""
        super().save_pretrained(folder, **kwargs)
        path = os.path.join(folder, "config.json")
        with open(path) as f:
            config = json.load(f)
        # deviation 2: weights of either project load in the other and in stock Qwen3-VL
        config["architectures"] = [self.stock]
        with open(path, "w") as f:
            json.dump(config, f, indent=2)

    # ------------------------------------------------------------------------------------ embedding

    @torch.no_grad()
    def encode_frames(self, pixel_values, grid):
        """e*: what future frames look like to the model. Source: Eq. (3), sec. 3.2.

        pixel_values (patches, 1536), grid (frames, 3) -> (N, D): vision tower and merger, no
        deepstack, no pooling, no gradient (the target is frozen, whatever else is trained).
        """
        return self._look(pixel_values, grid).pooler_output

    def _look(self, pixels, grid):
        """Patches (P, 1536) of pictures with these grids (pictures, 3) through the vision tower."""
        visual, device = self.model.visual, pixels.device
        # made on the host: from a grid on the GPU, each layer of the tower would wait for it
        grid, merge = grid.cpu(), visual.spatial_merge_size
        table, weights = get_vision_interpolation_indices_and_weights(
            grid,
            visual.num_grid_per_side,
            visual.interpolation_mode,
            visual.interpolation_align_corners,
            merge,
        )
        lengths = get_vision_cu_seqlens(grid)
        flash = is_flash_attention_requested(visual.config)  # only this reads them on the device
        return visual(
            pixels.to(visual.dtype),
            grid_thw=grid,
            interp_indices=table.to(device),
            interp_weights=weights.to(device),
            position_ids=get_vision_position_ids(grid, merge).to(device),
            cu_seqlens=lengths.to(device) if flash else lengths,
        )

    def embed(
        self, input_ids, latents=None, pixel_values=None, image_grid_thw=None,
        pixel_values_videos=None, video_grid_thw=None,
    ):  # fmt: skip
        """Token ids (B, T) -> what is fed (B, T, D), where it is visual (B, T), deepstack features.

        The last two are None without images and videos. Raises ValueError naming both numbers if
        latents, images or videos do not match their placeholder tokens.
        """
        x = self.get_input_embeddings()(input_ids.to(self.device))  # (B, T, D)
        ids = input_ids.cpu()  # so that places are known without waiting for the GPU
        is_latent = ids == getattr(self.config, "latent_id", -1)
        x = _put(x, is_latent, latents, LATENT, "latents")

        where, deepstack = [], []
        for name, token_id, pixels, grid in (
            ("image", self.config.image_token_id, pixel_values, image_grid_thw),
            ("video", self.config.video_token_id, pixel_values_videos, video_grid_thw),
        ):
            looks = None if pixels is None else self._look(pixels, grid)
            features = None if looks is None else looks.pooler_output
            x = _put(x, ids == token_id, features, f"<|{name}_pad|>", f"{name} features")
            if looks is not None:
                where.append(ids == token_id)
                deepstack.append(looks.deepstack_features)
        if not where:
            return x, None, None

        # images first, then videos -> the order of the sequence
        order = torch.cat([places_of(mask) for mask in where]).argsort().to(x.device)
        deepstack = [torch.cat(layer)[order] for layer in zip(*deepstack)]
        return x, (where[0] | where[-1]).to(x.device), deepstack

    def positions(self, input_ids, attention_mask=None, image_grid_thw=None, video_grid_thw=None):
        """M-RoPE positions (3, B, T) and each row's offset (B, 1) for the words after it.

        Latents count as text. Source: Qwen3-VL.
        """
        inputs = input_ids, attention_mask, image_grid_thw, video_grid_thw
        # on the host: on the GPU each picture would be waited for
        ids, mask, images, videos = (None if x is None else x.cpu() for x in inputs)
        is_image, is_video = ids == self.config.image_token_id, ids == self.config.video_token_id
        types = is_image.int() + 2 * is_video.int()  # (B, T) 0 text, 1 image, 2 video
        found = self.model.get_rope_index(ids, types, images, videos, attention_mask=mask)
        return tuple(x.to(input_ids.device) for x in found)

    # ------------------------------------------------------------------------------- states, logits

    def states(self, embedded, position_ids, layout, use_cache=False):
        """One row without padding -> last hidden states after the final norm (N, D), the cache.

        embedded: what `embed` gives for ids (1, N). position_ids (3, N). layout: where the row's
        sequences lie (common/shared_prefix.py). The cache is None without use_cache.
        """
        x, visual, deepstack = embedded
        text = self.model.language_model
        if text.config._attn_implementation != shared_prefix.NAME:
            text.set_attn_implementation(shared_prefix.NAME)
        out = text(
            inputs_embeds=x,
            position_ids=position_ids[:, None],  # (3, 1, N)
            visual_pos_masks=visual,
            deepstack_visual_embeds=deepstack,
            use_cache=use_cache,
            prefix=layout,
        )
        return out.last_hidden_state[0], out.past_key_values

    def hidden(
        self, input_ids, attention_mask=None, latents=None, use_cache=False, mm_token_type_ids=None,
        **media,
    ):  # fmt: skip
        """A padded batch -> last hidden states (B, T, D), 0 at padding; the cache of `states`.

        The rows are put into one row without padding. media: pixel_values, image_grid_thw,
        pixel_values_videos, video_grid_thw. Arguments as `forward`. mm_token_type_ids is accepted
        because HF processors return it; it is recomputed.
        """
        ids, device = input_ids.cpu(), self.device  # indices are made on the host
        real = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
        real = real.bool()  # (B, T)
        embedded = self.embed(ids[real][None], latents, **media)  # (1, N, D)
        grids = media.get("image_grid_thw"), media.get("video_grid_thw")
        position_ids, deltas = self.positions(ids, real.long(), *grids)
        self.model.rope_deltas = deltas.to(device)  # where decoding goes on: latent_decode.generate
        layout = shared_prefix.Layout(real.sum(1).tolist(), device)  # each row is causal on its own
        places = position_ids[:, real].to(device)
        h, cache = self.states(embedded, places, layout, use_cache)  # (N, D)
        padded = h.new_zeros(real.numel(), h.shape[-1])
        padded = padded.index_copy(0, places_of(real).to(device), h)
        return padded.view(*real.shape, -1), cache  # (B, T, D)

    def to_latent(self, h):
        """States (..., D) -> the latents they predict: themselves (paper), or through the head."""
        return h if self.latent_head is None else self.latent_head(h)

    def logits(self, h, weight=None):
        """States (..., D) -> logits (..., V), in fp32 where weights or arithmetic are bf16. Ours.

        weight (V, D): the output layer's, in another precision; only bf16 arithmetic reads it.

        In bf16, logits between 16 and 32 are .125 apart: one bit is a factor of 1.13 in a
        probability. Under autocast the product takes bf16 as well; only its result is not rounded.
        """
        device = h.device.type
        narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        if torch.finfo(narrow).bits >= 32:
            return self._with_latent_rows(self.lm_head(h), h)
        weight = self.lm_head.weight if weight is None else weight
        rows = h.reshape(-1, h.shape[-1])
        # deviation 4: the product is not rounded to bf16
        logits = _Fp32Product.apply(rows.to(narrow), weight.to(narrow))
        return self._with_latent_rows(logits.view(*h.shape[:-1], len(weight)), h)

    def _with_latent_rows(self, logits, h):
        """Logits (..., V) of the output layer -> with what common/lora.py adds to three of them."""
        return logits if self.latent_rows is None else self.latent_rows.add_out(logits, h)

    def forward(self, input_ids, attention_mask=None, logits_to_keep=0, **inputs):
        """Logits (B, T, V) as stock Qwen3-VL gives them: in bf16 under bf16, unlike `logits`.

        inputs: HF-named tensors and `hidden`'s arguments. `latents` (N, D) are fed at the
        `<|latent|>` positions, row by row in order. `.hidden_states[-1]` is h (B, T, D).
        logits_to_keep: only the last k positions, 0 = all. Raises ValueError on a count mismatch.
        """
        h, _ = self.hidden(input_ids, attention_mask, **inputs)
        h_kept = h[:, -logits_to_keep:]
        logits = self._with_latent_rows(self.lm_head(h_kept), h_kept)
        return CausalLMOutputWithPast(logits=logits, hidden_states=(h,))

    def generate(self, *args, **kwargs):
        """Raises TypeError that names both ways: transformers' own loop knows no latents. Ours."""
        raise TypeError(
            "latent_decode.generate decodes words and latents with this model; in transformers' "
            "terms, load the folder with AutoModelForImageTextToText and call model.generate(..., "
            "custom_generate=folder, trust_remote_code=True)"
        )


class FutureL1(TwoChannels, Qwen3VLForConditionalGeneration):
    """The dense model: Qwen3-VL 2B, 4B, 8B, 32B."""

    stock = "Qwen3VLForConditionalGeneration"


class FutureL1MoE(TwoChannels, Qwen3VLMoeForConditionalGeneration):
    """The mixture of experts: Qwen3-VL-30B-A3B. Source: ours; transformers' layers."""

    # deviation 5: the loss that balances the router is in stock's `forward` alone
    stock = "Qwen3VLMoeForConditionalGeneration"


def _put(x, where, rows, token, name):
    """x (B, T, D) with `rows` (N, D) at the places `where` (B, T), row by row in order.

    Raises ValueError if there is not one for each place.
    """
    # deviation 3: counted before anything runs
    places, given = places_of(where), 0 if rows is None else len(rows)
    if len(places) != given:
        raise ValueError(f"{len(places)} {token} tokens in input_ids but {given} {name}")
    if rows is None:
        return x
    return x.flatten(0, 1).index_copy(0, places.to(x.device), rows.to(x.dtype)).view_as(x)


def places_of(mask):
    """Where a mask of any shape is true, counted row by row (N,)."""
    return mask.flatten().nonzero()[:, 0]


class PatchProduct(nn.Conv3d):
    """The tower's patch embedding: a product, because the stride of its convolution is its kernel.

    Names and shapes of the weights stay. In bf16, cuDNN's 3-d convolution takes seconds a call on a
    H100, and may have no backward. On a CPU it is the convolution, which rounds otherwise. Ours.
    """

    def __init__(self, conv):
        sizes = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride
        super().__init__(*sizes, device="meta")
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x):
        """Patches (P, 3, 2, 16, 16) -> (P, D)."""
        return super().forward(x).flatten(1) if x.device.type == "cpu" else self.product(x)

    def product(self, x):
        """The same as one product."""
        return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)


class FusedRMSNorm(nn.RMSNorm):
    """A norm of the language model by PyTorch's function, which is one kernel on CUDA.

    transformers' class takes 6 to 8 and keeps another copy of its input for the backward. In fp32
    on a CPU both give the same bits. In bf16 the result is rounded once, there twice. Ours.
    """

    def __init__(self, norm):
        super().__init__(norm.weight.shape, norm.variance_epsilon, device="meta")
        self.weight = norm.weight

    def forward(self, x):
        """(..., D) -> (..., D), in the wider dtype of input and weights, as transformers' class."""
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        weight = self.weight.to(dtype)
        return F.rms_norm(x.to(dtype), self.normalized_shape, weight, self.eps).to(dtype)


class _Fp32Product(torch.autograd.Function):
    """x (M, D), w (V, D), both bf16 -> x w^T (M, V) in fp32; the gradients are bf16."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        if x.is_cuda:
            return torch.mm(x, w.T, out_dtype=torch.float32)  # has no gradient of its own
        with torch.autocast(x.device.type, enabled=False):
            return x.float() @ w.float().T

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        grad = grad.to(x.dtype)
        return grad @ w, grad.T @ x if ctx.needs_input_grad[1] else None


def log_continue(log_stop):
    """log p(stop) -> log(1 - p(stop)): the other outcome of a step inside a span. Source: ours."""
    return torch.log(-torch.expm1(log_stop.clamp(max=-1e-7)))  # finite where p rounds to 1


def add_latent_tokens(tokenizer):
    """Give a tokenizer the three tokens if it lacks them -> {config key: id}. Source: sec. 3.1."""
    tokenizer.add_tokens(list(LATENT_IDS.values()), special_tokens=True)
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in LATENT_IDS.items()}


def load(folder, latent_head=None, cls=None, **kwargs):
    """A model folder or hub id, stock or ours -> (FutureL1 or FutureL1MoE, tokenizer). Ours.

    latent_head: None keeps what the folder has; "linear" adds one, starting as the identity. cls: a
    subclass with more or other layers. kwargs go to transformers (dtype=, attn_implementation=).
    Raises ValueError if the folder's model is of another type, if weights are missing or left over,
    or if config and tokenizer disagree on a token's id.
    """
    classes = {c.config_class.model_type: c for c in ([cls] if cls else [FutureL1, FutureL1MoE])}
    kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    if kind not in classes:
        raise ValueError(f"{folder}: model_type is {kind!r}, expected {' or '.join(classes)}")
    cls = classes[kind]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = add_latent_tokens(tokenizer)
    model, info = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
    for keys, fault in (
        (info["missing_keys"], "are missing from"),
        (info["unexpected_keys"], "have no place in the model, but are in"),
    ):
        if keys:
            names = ", ".join(sorted(keys)[:4])
            raise ValueError(f"{len(keys)} weights {fault} {folder}, e.g. {names}")
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
    """flash_attention_2 where the flash-attn package is installed on CUDA, else sdpa. Ours."""
    from transformers.utils import is_flash_attn_2_available

    flash = torch.cuda.is_available() and is_flash_attn_2_available()
    return "flash_attention_2" if flash else "sdpa"
