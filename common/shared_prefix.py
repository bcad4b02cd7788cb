"""Attention in which what follows a prompt reads it from one place.

The G rollouts of a prompt have thousands of visual tokens in common and some two hundred of their
own. Copying the prompt's keys and values G times costs memory and, in decoding, time at every
token. Here they exist once.

    softmax([q k_prompt', q k_own'] / sqrt(d)) [v_prompt; v_own]      q: a query of a rollout

*Training* (`Layout`): all sequences lie in one row without padding,

    [prompt 1 | prompt 2 | ... | rollout 1.1 | rollout 1.2 | ... | rollout 2.1 | ...]

and attention is a few calls, causal from the lower right: a rollout's query at place t sees its
prompt and its own first t + 1 tokens. Sequences of a call are padded on the right. A padded key
lies after every real query, so no mask is needed, and on CUDA each call is a FlashAttention kernel:
PyTorch's own, or that of the flash-attn package where it is installed. A sample of SFT is a
sequence that follows no other.

*Decoding* (`DecodingCache`): the prompt's keys and values once a prompt, a small cache of its own
for each row, one softmax over the scores against both.

transformers calls `attend` under the name NAME, its public way to bring one's own attention; what
is given to the language model as `prefix=` arrives here. Nothing is patched.
Source: ours; the layout is that of shared-prefix ("cascade") attention in inference engines.

Axis letters: N tokens of the row, S sequences of a call, T their longest, P prompt tokens, H heads,
d head width, B prompts, n rows a prompt, R rows = B * n.
"""

import itertools
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available

# On a H100 PyTorch would take cuDNN's attention, which plans each new length for up to a second,
# and every sample has its own. Without it FlashAttention runs, here and in the vision tower.
torch.backends.cuda.enable_cudnn_sdp(False)

NAME = "shared_prefix"
PADDED_TOGETHER = 256  # sequences up to this long share a call, padded; longer ones go one by one


def attend(module, query, key, value, attention_mask, scaling=None, prefix=None, **kwargs):
    """transformers' attention function: (1, H, N, d) -> (1, N, H, d), no weights."""
    if prefix is None:
        raise ValueError("shared-prefix attention needs a Layout or a DecodingCache as prefix=")
    if kwargs.get("dropout"):
        raise ValueError("shared-prefix attention has no dropout; set attention_dropout to 0")
    return prefix.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(NAME, attend)


def causal(query, key, value, scaling):
    """Causal from the lower right: query t of T sees the first P + t + 1 of P + T keys.

    query (S, H, T, d); key, value (S, H_kv, P + T, d) -> (S, H, T, d).
    """
    if flash_attends(query):
        return flash_causal(query, key, value, scaling)
    T, length = query.shape[2], key.shape[2]
    shared = dict(scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    if T == length:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **shared)
    mask = causal_lower_right(T, length)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **shared)


def flash_attends(query):
    """Whether the flash-attn package is installed and takes this: 16 bits, on CUDA."""
    narrow = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and narrow and is_flash_attn_2_available()


def flash_causal(query, key, value, scaling):
    """`causal` by flash-attn: causal from the lower right, too, since its version 2.1."""
    from flash_attn import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (S, T or P + T, heads, d)
    return flash_attn_func(q, k, v, softmax_scale=scaling, causal=True).transpose(1, 2)


class Layout:
    """Where sequences lie in one row, and the calls that attend to them.

    lengths: of the sequences, in the order of the row. prompt_of: for each the number of the
    sequence that it follows, -1 = it follows none; by default none does.
    """

    def __init__(self, lengths, device, prompt_of=None):
        self.prompt_of = [-1] * len(lengths) if prompt_of is None else prompt_of
        self.starts = [0, *itertools.accumulate(lengths)][:-1]
        # sequences share a call if their prompts have equal length, and long ones their prompt;
        # a long sequence without a prompt goes alone
        shared = defaultdict(list)
        for i, (length, prompt) in enumerate(zip(lengths, self.prompt_of)):
            P = 0 if prompt < 0 else lengths[prompt]
            alone = P > PADDED_TOGETHER or (not P and length > PADDED_TOGETHER)
            shared[P, (prompt if P else i) if alone else -1].append(i)
        self.calls = []
        for (P, _), some in shared.items():
            starts, prompts = [self.starts[i] for i in some], [self.prompt_of[i] for i in some]
            before = [self.starts[prompt] for prompt in prompts] if P else []
            self.calls.append(_Call(starts, [lengths[i] for i in some], device, P, before))
        back = torch.cat([call.order for call in self.calls]).argsort()  # (N,)
        in_order = torch.equal(back, torch.arange(len(back)))
        self.back = None if in_order else back.to(device)

    def attend(self, layer, query, key, value, scaling):
        """query (1, H, N, d), key and value (1, H_kv, N, d) -> (1, N, H, d)."""
        q, k, v = (_in_dtype(x)[0].transpose(0, 1) for x in (query, key, value))  # (N, H, d)
        out = torch.cat([call.attend(q, k, v, scaling) for call in self.calls])  # (N, H, d)
        return out[None] if self.back is None else out.index_select(0, self.back)[None]


class _Call:
    """Sequences that one kernel attends to, each after the same number of prompt tokens."""

    def __init__(self, starts, lengths, device, prompt=0, prompt_starts=()):
        start, length = torch.tensor(starts)[:, None], torch.tensor(lengths)[:, None]  # (S, 1)
        place = torch.arange(max(lengths))[None]  # (1, T)
        # a padded place is the sequence's last token again; what comes out there is dropped
        index = start + torch.minimum(place, length - 1)  # (S, T)
        self.own = _Places(index, device)
        real = place < length  # (S, T)
        self.order = index[real]  # where the results belong, on the host
        self.real = None if bool(real.all()) else real.flatten().nonzero()[:, 0].to(device)
        self.before = None
        if prompt:  # one prompt is read where it lies, not copied
            starts = prompt_starts[:1] if len(set(prompt_starts)) == 1 else prompt_starts
            before = torch.tensor(starts)
            self.before = _Places(before[:, None] + torch.arange(prompt), device)  # (1 or S, P)

    def attend(self, q, k, v, scaling):
        """q (N, H, d), k and v (N, H_kv, d) -> (tokens of the call, H, d)."""
        row_k, row_v = k, v
        q, k, v = self.own.of(q), self.own.of(k), self.own.of(v)  # (S, H, T, d)
        if self.before is not None:
            before = [self.before.of(x).expand(len(q), -1, -1, -1) for x in (row_k, row_v)]
            k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)  # (S, H_kv, P + T, d)
        out = causal(q, k, v, scaling).transpose(1, 2)  # (S, T, H, d)
        out = out.flatten(0, 1)
        return out if self.real is None else out.index_select(0, self.real)


class _Places:
    """Places (S, T) in the row; a single run of neighbours is a view, anything else a copy."""

    def __init__(self, index, device):
        self.index, self.start = index.to(device), None  # made on the host, without waiting
        if len(index) == 1 and bool((index.diff() == 1).all()):
            self.start = int(index[0, 0])

    def of(self, x):
        """x (N, H, d) -> (S, H, T, d)."""
        S, T = self.index.shape
        if self.start is not None:
            return x[None, self.start : self.start + T].transpose(1, 2)
        return x.index_select(0, self.index.flatten()).view(S, T, *x.shape[1:]).transpose(1, 2)


class DecodingCache:
    """Keys and values of the rows that are decoded together, each prompt's once. Source: ours.

    prompt: transformers' cache after the prompts in one row without padding.
    lengths: tokens of each prompt (B,). n: rows a prompt.
    """

    def __init__(self, prompt, lengths, n):
        B, device = len(lengths), prompt.layers[0].keys.device
        padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]  # (B, P)
        self.padding = padding.to(device)[:, None, None]  # (B, 1, 1, P)
        self.prompt, self.own = [], []  # (keys, values) a layer: (B, H_kv, P, d), (R, H_kv, C, d)
        for layer in prompt.layers:
            both = [_in_dtype(x)[0].transpose(0, 1) for x in (layer.keys, layer.values)]  # (N, ...)
            layer.keys = layer.values = None
            padded = [pad_sequence(x.split(lengths), True).transpose(1, 2) for x in both]
            # contiguous: a product with a transposed view would copy the prompts at every step
            self.prompt.append(tuple(x.contiguous() for x in padded))
            self.own.append([x.new_empty(B * n, x.shape[1], 0, x.shape[-1]) for x in padded])
        self.used, self.room = 0, 0  # places of the own caches: filled or reserved, and all
        self.place = torch.zeros(1, dtype=torch.long, device=device)  # the next one to be filled
        self._seat(torch.arange(B, device=device).repeat_interleave(n))

    def _seat(self, prompt_of):
        """Each row gets a seat at its prompt: seats (B, n) are what the prompt's keys meet."""
        self.prompt_of, B = prompt_of, len(self.prompt[0][0])
        count = torch.bincount(prompt_of, minlength=B)
        self.n = int(count.max())
        first = count.cumsum(0) - count
        own_place = torch.arange(len(prompt_of), device=prompt_of.device) - first[prompt_of]
        full = len(prompt_of) == B * self.n  # then seats are rows
        self.seat = None if full else prompt_of * self.n + own_place  # (R,)

    def reserve(self, steps):
        """Room for so many more tokens a row."""
        self.used += steps
        if self.used > self.room:
            more = max(2 * self.room, self.used) - self.room
            self.own = [[F.pad(x, (0, 0, 0, more)) for x in pair] for pair in self.own]
            self.room += more

    def feed(self, text, x, position, token):
        """One more input a row: x (R, D) at position (R, 1) -> the states after it (R, D).

        text: the language model. token (R,): what x stands for; only `SharedCache` reads it.
        """
        self.unseen = self._unseen()  # the same for all layers
        out = text(
            inputs_embeds=x[:, None],  # (R, 1, D)
            position_ids=position.expand(3, -1, -1),
            use_cache=False,
            prefix=self,
        )
        self.place.add_(1)
        return out.last_hidden_state[:, 0]

    def attend(self, layer, query, key, value, scaling):
        """query (R, H, 1, d), key and value (R, H_kv, 1, d) -> (R, 1, H, d)."""
        keys, values = self.write(layer, key, value)
        (R, H, _, d), H_kv = query.shape, key.shape[1]
        q = query.to(keys[0].dtype).view(R, H_kv, H // H_kv, d)
        out = self.mix(self.weights(self.products(q, keys, scaling)), values)  # (R, H_kv, g, d)
        return out.reshape(R, 1, H, d)

    def write(self, layer, key, value):
        """A token a row -> what is cached of a layer: keys, values, each (prompts', rows' own)."""
        for own, new in zip(self.own[layer], (key, value)):
            own.index_copy_(2, self.place, new.to(own.dtype))
        return tuple(zip(self.prompt[layer], self.own[layer]))

    def products(self, q, keys, scaling):
        """q (R, H_kv, g, d) with the keys of its prompt, then its own -> (R, H_kv, g, P + C).

        Times `scaling`, and in fp32 where q and keys are bf16, as in FlashAttention: bf16 scores
        between 16 and 32 are .125 apart, which is a factor of 1.13 in a weight.
        """
        narrow = torch.finfo(q.dtype).bits < 32
        if not narrow:
            q = q * scaling  # fewer numbers than the scores; in bf16 it would be rounded again
        (_, H_kv, g, d), (keys, own_keys) = q.shape, keys
        B, _, P, _ = keys.shape
        seats = self._to_seats(q).reshape(B, self.n, H_kv, g, d).transpose(1, 2)
        score = wide_product(seats.flatten(2, 3), keys.transpose(2, 3))
        score = score.view(B, H_kv, self.n, g, P).transpose(1, 2).flatten(0, 1)
        score = self._to_rows(score)  # (R, H_kv, g, P)
        score = torch.cat([score, wide_product(q, own_keys.transpose(2, 3))], -1)
        return score * scaling if narrow else score

    def weights(self, score):
        """Scores (R, H_kv, g, P + C) -> their softmax; 0 at padding and at places to come."""
        return score.masked_fill(self.unseen, -torch.inf).softmax(-1)

    def _unseen(self):
        """(R, 1, 1, P + C): a row's prompt's padding, and its own places that are still to come."""
        to_come = torch.arange(self.room, device=self.place.device) > self.place
        before = self.padding[self.prompt_of]  # (R, 1, 1, P)
        return torch.cat([before, to_come.expand(*before.shape[:3], -1)], -1)

    def mix(self, p, values):
        """Weights p (R, H_kv, g, P + C), values as `write` gives them -> (R, H_kv, g, d)."""
        (_, H_kv, g, _), (values, own_values) = p.shape, values
        B, _, P, d = values.shape
        p = p.to(values.dtype)
        p, p_own = p[..., :P], p[..., P:]
        p = self._to_seats(p).reshape(B, self.n, H_kv, g, P).transpose(1, 2).flatten(2, 3)
        out = wide_product(p, values).view(B, H_kv, self.n, g, d).transpose(1, 2).flatten(0, 1)
        return (self._to_rows(out) + wide_product(p_own, own_values)).to(values.dtype)

    def _to_seats(self, x):
        """Rows (R, ...) -> seats (B * n, ...), empty ones 0."""
        if self.seat is None:
            return x
        return x.new_zeros(len(self.padding) * self.n, *x.shape[1:]).index_copy(0, self.seat, x)

    def _to_rows(self, x):
        return x if self.seat is None else x[self.seat]

    def keep(self, rows):
        """Only these rows go on, in this order; a row may be named more than once."""
        prompts, prompt_of = torch.unique(self.prompt_of[rows], return_inverse=True)
        if len(prompts) < len(self.padding):
            self.padding = self.padding[prompts]
            self.prompt = [(k[prompts], v[prompts]) for k, v in self.prompt]
        self.own = [[x[rows] for x in pair] for pair in self.own]
        self._seat(prompt_of)


class SharedCache(DecodingCache):
    """Samples of a prompt share one row of the cache until they part. Source: ours.

    Exact as long as latents depend only on the tokens before them. Worth it when samples diverge
    late (low-entropy policy, short answers). Costs one GPU synchronisation per token.
    """

    def __init__(self, prompt, lengths, n):
        super().__init__(prompt, lengths, 1)
        self.reads = self.prompt_of.repeat_interleave(n)  # (R,)

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
        if len(first) > len(self.prompt_of):
            super().keep(self.reads[first])
        self.reads = reads
        return first


def wide_product(a, b):
    """a (..., m, k) @ b (..., k, n) -> (..., m, n), in fp32 where both are bf16."""
    if torch.finfo(a.dtype).bits >= 32:
        return a @ b
    if a.is_cuda:
        out = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
        return out.view(*a.shape[:-1], b.shape[-1])
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()


def _in_dtype(x):
    """Keys and values in one dtype: autocast gives keys in fp32 (their norm's), values in bf16."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
