"""Attention in which what follows a prompt reads it from one place.

The G rollouts of a prompt have thousands of visual tokens in common and some two hundred of their
own. Copying the prompt's keys and values G times costs memory and, in decoding, time at every
token. Here they exist once.

    softmax([q k_prompt', q k_own'] / sqrt(d)) [v_prompt; v_own]      q: a query of a rollout

*Training* (`Layout`): all sequences lie in one row without padding,

    [prompt 1 | rollout 1.1 | rollout 1.2 | ... | prompt 2 | ...]

and attention is a few calls, causal from the lower right: a rollout's query at place t sees its
prompt and its own first t + 1 tokens. Sequences of a call are padded on the right. A padded key
lies after every real query, so no mask is needed, and on CUDA each call is a FlashAttention kernel.
A sample of SFT is a rollout of an empty prompt.

*Decoding* (`DecodingCache`): the prompt's keys and values once a prompt, a small cache of its own
for each row, one softmax over the scores against both.

transformers calls `attend` under the name NAME, its public way to bring one's own attention; what
is given to the language model as `prefix=` arrives here. Nothing is patched, and no mask is built.
Source: ours; the layout is that of shared-prefix ("cascade") attention in inference engines.

Axis letters: N tokens of the row, S sequences of a call, T their longest, P prompt tokens, H heads,
d head width, B prompts, n rows a prompt, R rows = B * n.
"""

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

NAME = "shared_prefix"
PADDED_TOGETHER = 256  # sequences up to this long share a call, padded; longer ones go one by one


def attend(module, query, key, value, attention_mask, scaling=None, prefix=None, **kwargs):
    """transformers' attention function: (1, H, N, d) -> (1, N, H, d), no weights."""
    if prefix is None:
        raise ValueError("shared-prefix attention needs a Layout or a DecodingCache as prefix=")
    return prefix.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(NAME, attend)


def causal(query, key, value, scaling):
    """Causal from the lower right: query t of T sees the first P + t + 1 of P + T keys.

    query (S, H, T, d); key, value (S, H_kv, P + T, d) -> (S, H, T, d).
    """
    T, length = query.shape[2], key.shape[2]
    shared = dict(scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    if T == length:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **shared)
    mask = causal_lower_right(T, length)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **shared)


class Layout:
    """Where prompts and what follows them lie in one row, and the calls that attend to them.

    sequences: [(length of a prompt, lengths of its rollouts)], in the order of the row. A prompt of
    length 0 is no prompt: its "rollouts" are whole samples.
    """

    def __init__(self, sequences, device):
        self.prompts, self.rollouts = [], []  # (start, length); (start, length, number of prompt)
        place = 0
        for number, (prompt, lengths) in enumerate(sequences):
            self.prompts.append((place, prompt))
            place += prompt
            for length in lengths:
                self.rollouts.append((place, length, number))
                place += length
        self.length, self.device = place, device
        self.calls = [*self._prompt_calls(), *self._rollout_calls()]
        self.back = torch.cat([call.order for call in self.calls]).argsort()  # (N,)

    def _prompt_calls(self):
        """Prompts of equal length share a call."""
        by_length = defaultdict(list)
        for start, length in self.prompts:
            if length:
                by_length[length].append(start)
        for length, starts in by_length.items():
            yield _Call(starts, [length] * len(starts), self.device)

    def _rollout_calls(self):
        """Rollouts share a call if their prompts have equal length, and long ones their prompt."""
        shared = defaultdict(list)
        for start, length, number in self.rollouts:
            prompt_start, prompt = self.prompts[number]
            key = (prompt, number if prompt > PADDED_TOGETHER else None)
            if length > PADDED_TOGETHER and not prompt:
                key = (prompt, start)  # a long sample goes alone
            shared[key].append((start, length, prompt_start))
        for (prompt, _), some in shared.items():
            starts, lengths, prompt_starts = zip(*some)
            yield _Call(starts, lengths, self.device, prompt, prompt_starts)

    def attend(self, layer, query, key, value, scaling):
        """query (1, H, N, d), key and value (1, H_kv, N, d) -> (1, N, H, d)."""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, d)
        outputs = [call.attend(q, k, v, scaling) for call in self.calls]
        return torch.cat(outputs)[self.back][None]


class _Call:
    """Sequences that one kernel attends to, each after the same number of prompt tokens."""

    def __init__(self, starts, lengths, device, prompt=0, prompt_starts=()):
        start, length = torch.tensor(starts)[:, None], torch.tensor(lengths)[:, None]  # (S, 1)
        place = torch.arange(max(lengths))[None]  # (1, T)
        # a padded place is the sequence's last token again; what comes out there is dropped
        self.own = _Places(start + torch.minimum(place, length - 1), device)
        real = place < length  # (S, T)
        self.order = self.own.index[real.to(device)]  # where the results belong
        self.real = None if bool(real.all()) else real.to(device)
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
        return out.flatten(0, 1) if self.real is None else out[self.real]


class _Places:
    """Places (S, T) in the row; a single run of neighbours is a view, anything else a copy."""

    def __init__(self, index, device):
        self.index, self.start = index.to(device), None
        if len(index) == 1 and bool((index.diff() == 1).all()):
            self.start = int(index[0, 0])

    def of(self, x):
        """x (N, H, d) -> (S, H, T, d)."""
        S, T = self.index.shape
        if self.start is not None:
            return x[None, self.start : self.start + T].transpose(1, 2)
        return x.index_select(0, self.index.flatten()).view(S, T, *x.shape[1:]).transpose(1, 2)
