"""The key-value cache of decoding: of fixed size, or shared by samples while they are equal.

A reader of the method may skip this file: `latent_decode.step` only calls `feed`.

Axis letters: B prompts, n samples a prompt, R rows = B * n, P prompt tokens, D hidden.
"""

import torch
from transformers import Cache
from transformers.cache_utils import StaticLayer


class _Slots(StaticLayer):
    """A layer of one dtype: autocast gives keys in fp32 (their norm's), values in bf16."""

    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.to(self.dtype), values.to(self.dtype), *args, **kwargs)


class DecodingCache:
    """Keys and values of the rows that are decoded together. Source: ours.

    prompt: transformers' cache after the prompts (B rows).
    mask (B, P): 1 where a prompt has a token.
    Each prompt is repeated n times; there is room for `new_tokens` more a row.
    """

    def __init__(self, prompt, mask, n, new_tokens):
        B, P = mask.shape
        self.kv = _copy_into_fixed_size(prompt, n, P + new_tokens)
        self.slot = torch.full((1,), P, device=mask.device)  # where the next token goes
        room = mask.new_zeros(B, new_tokens, dtype=torch.bool)
        seen = torch.cat([mask.bool(), room], 1)  # (B, P + new_tokens) slots to look at
        self.seen = seen.repeat_interleave(n, 0)[:, None, None]  # (R, 1, 1, P + new_tokens)

    def feed(self, text, x, position, token):
        """One more input a row: x (R, D) at position (R, 1) -> the states after it (R, D).

        text: the language model. token (R,): what x stands for; only `SharedCache` reads it.
        """
        self.seen.index_fill_(3, self.slot, True)
        out = text(
            inputs_embeds=x[:, None],  # (R, 1, D)
            attention_mask=self.seen,
            position_ids=position.expand(3, -1, -1),
            past_key_values=self.kv,
            use_cache=True,
        )
        self.slot.add_(1)
        return out.last_hidden_state[:, 0]

    def keep(self, rows):
        """Only these rows go on, in this order; a row may be named more than once."""
        self.seen = self.seen[rows]
        for layer in self.kv.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class SharedCache(DecodingCache):
    """Samples of a prompt share one row of the cache until they part. Source: ours.

    Exact while latents are a function of the words before them. Pays where samples part late
    (a sure policy, short answers). Looks at the device at every step.
    """

    def __init__(self, prompt, mask, n, new_tokens):
        super().__init__(prompt, mask, 1, new_tokens)
        self.reads = torch.arange(len(mask), device=mask.device).repeat_interleave(n)  # (R,)

    def feed(self, text, x, position, token):
        """As `DecodingCache.feed`, once for all rows that are still equal."""
        first = self._split(token)
        h = super().feed(text, x[first], position[first], token)
        return h[self.reads]

    def keep(self, rows):
        """As `DecodingCache.keep`; rows of the cache that nobody reads any more go."""
        left, self.reads = torch.unique(self.reads[rows], return_inverse=True)
        super().keep(left)

    def _split(self, token):
        """Rows that shared a cache row and now differ get one each -> the first row of each."""
        _, reads = torch.unique(self.reads * 2**32 + token, return_inverse=True)
        order = torch.arange(len(reads), device=reads.device)
        first = torch.full((int(reads.max()) + 1,), len(reads), device=reads.device)
        first.scatter_reduce_(0, reads, order, "amin")
        if len(first) > len(self.seen):
            super().keep(self.reads[first])
        self.reads = reads
        return first


def _copy_into_fixed_size(prompt, n, length):
    """The prompt's cache, each row n times, at the front of a fixed-size one; the old is freed."""
    keys = prompt.layers[0].keys
    device = keys.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else keys.dtype
    cache = Cache(layers=[_Slots(max_cache_len=length) for _ in prompt.layers])
    for new, old in zip(cache.layers, prompt.layers):
        keys = old.keys.to(dtype).repeat_interleave(n, 0)  # (R, heads, P, head width)
        values = old.values.to(dtype).repeat_interleave(n, 0)
        old.keys = old.values = None
        new.lazy_initialization(keys, values)
        new.keys[:, :, : keys.shape[2]] = keys
        new.values[:, :, : keys.shape[2]] = values
        new.cumulative_length.fill_(keys.shape[2])
    return cache
