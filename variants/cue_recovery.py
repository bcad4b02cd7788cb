"""Cue recovery: a prompt's first token looks at all of its visual tokens, at every fifth layer.

A fork of model.py. Source: ViCuR, arXiv 2606.05718, sec. 3.2; variants/opd.py trains it. After
layers l = 0, 5, 10, ...

    q = norm_q(h) W_Q        K = norm_kv(V) W_K        U = norm_kv(V) W_V
    h <- h + softmax(q K^T / sqrt(d)) U W_O            d: width of a head

with h (D,) the state of the prompt's first token, its `<|im_start|>`, and V (M, D) the states of
its M visual tokens at that layer, none pooled. The first token is the sink: every later token can
attend to it, and so reads there what the visual tokens hold. Causal attention shows it nothing, so
that at its first look it asks the same in every prompt, whatever the question. The two norms are
shared by all layers, the four D x D matrices are each layer's own.

It acts where a prompt is read. Afterwards its result lies in the keys and values of the first
token: a token that is decoded costs what it did.

    add_recovery(model)        # then train it: python -m variants.opd --recovery

Nothing of the model is patched: hooks of its layers do it. A saved folder has the matrices beside
the other weights; its config.json names this file, so that every script loads it as it is. Stock
transformers would leave the module out.

Where this differs from the paper:
 1. W_O is 0 at first, so that step 0 is the model as it was (paper: unknown). The other matrices
    have torch's own start of a linear layer.
Where this differs from the official code:
 2. Several prompts in one row: each first token reads its own prompt. Official updates position 0
    of the row alone, from the visual tokens of all.

Axis letters: N tokens of the row, B prompts with visual tokens, M the most of them in a prompt,
H heads, D hidden, d = D / H.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from common.shared_prefix import Layout
from model import FutureL1


class Look(nn.Module):
    """The matrices of one layer: (W_Q, W_K, W_V, W_O), D x D each, without bias."""

    def __init__(self, D, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))
        nn.init.zeros_(self.o.weight)  # deviation 1: at step 0 the model is as it was

    def forward(self, sink, seen, real):
        """Normed sinks (B, D), normed visual states (B, M, D), which are no padding (B, M) bool ->
        what is added to the sinks (B, D).
        """

        def heads(x):
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, tokens, d)

        q, k, v = heads(self.q(sink)[:, None]), heads(self.k(seen)), heads(self.v(seen))
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        return self.o(found.transpose(1, 2).flatten(1))  # (B, D)


class Recovery(nn.Module):
    """The module: two norms, and a Look a layer. Source: sec. 3.2."""

    def __init__(self, D, heads, looks, eps=1e-6):
        super().__init__()
        self.norm_q, self.norm_kv = nn.RMSNorm(D, eps), nn.RMSNorm(D, eps)
        self.looks = nn.ModuleList(Look(D, heads) for _ in range(looks))

    def forward(self, k, h, places):
        """The states (1, N, D) behind a layer, with its first tokens updated by look k."""
        sink, seen = h[0, places.first], h[0, places.seen]  # (B, D), (B, M, D)
        found = self.looks[k](self.norm_q(sink), self.norm_kv(seen), places.real)
        return h.index_add(1, places.first, found[None].to(h.dtype))


class Places(NamedTuple):
    """Who looks where in the row."""

    first: torch.Tensor  # (B,) the first token of each prompt that has visual tokens
    seen: torch.Tensor  # (B, M) its visual tokens, padded
    real: torch.Tensor  # (B, M) bool


def find_places(layout, visual):
    """Where sequences lie (common/shared_prefix.py), what is visual (1, N) bool -> Places.

    Looked at are the sequences that follow no other: prompts, and whole samples.
    """
    # deviation 2: of several prompts in one row, each first token reads its own
    starts = [start for start, prompt in zip(layout.starts, layout.prompt_of) if prompt < 0]
    starts = torch.tensor(starts, device=visual.device)
    place = visual[0].nonzero()[:, 0]
    owner = torch.searchsorted(starts, place, right=True) - 1
    count = torch.bincount(owner, minlength=len(starts))
    seen = pad_sequence(place.split(count.tolist()), batch_first=True)
    real = torch.arange(seen.shape[1], device=seen.device) < count[:, None]
    return Places(*(x[count > 0] for x in (starts, seen, real)))


def add_recovery(model, every=5):
    """Give a FutureL1 the module, behind its layers 0, every, 2 every, ...: it changes nothing yet.

    What is saved from now on is loaded with cls=Model.
    """
    text, c = model.model.language_model, model.config.text_config
    where = range(0, len(text.layers), every)
    model.config.cue_every = every
    recovery = Recovery(c.hidden_size, c.num_attention_heads, len(where), c.rms_norm_eps)
    model.recovery = recovery.to(model.lm_head.weight)

    text.register_forward_pre_hook(_tell, with_kwargs=True)
    for k, layer in enumerate(where):
        # deepstack adds visual features between two layers: the module comes after that
        if layer + 1 < len(text.layers):
            hook = functools.partial(_before, model.recovery, k)
            text.layers[layer + 1].register_forward_pre_hook(hook, with_kwargs=True)
        else:
            hook = functools.partial(_behind, model.recovery, k)
            text.layers[layer].register_forward_hook(hook, with_kwargs=True)


def _tell(text, args, inputs):
    """The hook before the language model: its layers get `places`, where a prompt is read."""
    layout, visual = inputs.get("prefix"), inputs.get("visual_pos_masks")
    if isinstance(layout, Layout) and visual is not None:
        return args, dict(inputs, places=find_places(layout, visual))
    return None


def _before(recovery, k, layer, args, inputs):
    """The hook before a layer: look k changes what it reads."""
    places = inputs.get("places")
    return None if places is None else ((recovery(k, *args, places),), inputs)


def _behind(recovery, k, layer, args, inputs, h):
    """The hook behind the last layer: look k changes what it gives."""
    places = inputs.get("places")
    return None if places is None else recovery(k, h, places)


class Model(FutureL1):
    """FutureL1 with the module, if its config says so: `model.load(folder, cls=Model)`."""

    def __init__(self, config):
        super().__init__(config)
        if getattr(config, "cue_every", None):
            add_recovery(self, config.cue_every)
