"""Rollouts as data: what was generated, how it is written down, some of them, several together.

A reader of the method may skip this file: `latent_decode` calls `Transcript` and `OneRow`.

Axis letters: R rows, T new tokens, N latents, D hidden.
"""

import re
from dataclasses import dataclass
from itertools import chain

import torch
from torch.nn.utils.rnn import pad_sequence

from common.shared_prefix import Layout
from model import LATENT


@dataclass
class Rollout:
    """What was generated, as it was fed. Tensors are on the model's device."""

    tokens: torch.Tensor  # (R, T) generated tokens only, padded after the end of turn
    sampled: torch.Tensor  # (R, T) bool: the policy chose it; False where forced or padding
    latents: list  # R tensors (N_i, D), one row a `<|latent|>` token: what was fed
    logprobs: torch.Tensor  # (R, T) under the full softmax at the temperature; 0 where not chosen
    finish: list  # R of "eos" | "length"
    lengths: torch.Tensor  # (R,) generated tokens incl. the end of turn


class Transcript:
    """The record of R rows of T tokens, written some rows and steps at a time. Source: ours.

    rule: a `latent_decode.Rule`.
    """

    def __init__(self, R, T, rule):
        self.rule = rule
        self.tokens = rule.pad.expand(R, T).clone()
        self.sampled = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.logprobs = torch.zeros_like(self.tokens, dtype=torch.float32)
        self.latents = [[] for _ in range(R)]

    def write(self, row, start, chunk):
        """Steps from `start` on: a `latent_decode.Record` of (rows, steps); row (rows,): which."""
        columns = slice(start, start + chunk.token.shape[1])
        self.tokens[row, columns] = chunk.token
        self.sampled[row, columns] = chunk.sampled
        self.logprobs[row, columns] = chunk.logprob
        is_latent = chunk.token == self.rule.latent  # (rows, steps)
        parts = chunk.z[is_latent].split(is_latent.sum(1).tolist())
        for r, part in zip(row.tolist(), parts):
            self.latents[r].append(part)

    def rollout(self):
        """-> Rollout."""
        ended = torch.isin(self.tokens, self.rule.eos) & self.sampled  # (R, T)
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, ended.shape[1])
        finish = ["eos" if e else "length" for e in ended.any(1).tolist()]
        latents = [torch.cat(parts) for parts in self.latents]
        return Rollout(self.tokens, self.sampled, latents, self.logprobs, finish, lengths)


def one_mark_a_span(text):
    """A response's text with one `<|latent|>` for each run of them. Source: ours."""
    return re.sub(f"(?:{re.escape(LATENT)}\\s*)+", LATENT, text)


def take(rollout, rows):
    """Some rows of a Rollout, cut to the longest of them. Source: ours."""
    rows = torch.as_tensor(rows, device=rollout.tokens.device)
    lengths = rollout.lengths[rows]
    whole = rollout.tokens, rollout.sampled, rollout.logprobs
    tokens, sampled, logprobs = (x[rows, : lengths.max()] for x in whole)
    latents = [rollout.latents[r] for r in rows.tolist()]
    finish = [rollout.finish[r] for r in rows.tolist()]
    return Rollout(tokens, sampled, latents, logprobs, finish, lengths)


def join(rollouts):
    """Rollouts one below the other, padded to the longest. Source: ours."""

    def rows(name):
        return list(chain.from_iterable(getattr(rollout, name) for rollout in rollouts))

    names = "tokens", "sampled", "logprobs"
    tokens, sampled, logprobs = (pad_sequence(rows(name), batch_first=True) for name in names)
    lengths = torch.stack(rows("lengths"))
    return Rollout(tokens, sampled, rows("latents"), logprobs, rows("finish"), lengths)


class OneRow:
    """Prompts and their rollouts in one row without padding, for common/shared_prefix.py. Ours.

    ids, mask (B, P): the prompts. prompt_of (R,): each rollout's prompt. In the row each prompt is
    followed by its rollouts; *flat* is another order, all prompts before all rollouts.
    """

    def __init__(self, ids, mask, rollout, prompt_of):
        R, T = rollout.tokens.shape
        self.real = mask.bool()  # (B, P)
        self.said = torch.arange(T, device=ids.device) < rollout.lengths[:, None]  # (R, T)
        self.flat_ids = torch.cat([ids[self.real], rollout.tokens[self.said]])  # (N,)

        # flat -> row: a stable sort by prompt
        number = torch.arange(len(mask), device=ids.device)[:, None].expand_as(mask)  # (B, P)
        number = torch.cat([number[self.real], prompt_of[:, None].expand(R, T)[self.said]])  # (N,)
        self.order = number.argsort(stable=True)  # (N,)
        self.back = self.order.argsort()
        lengths = [[] for _ in mask]
        for b, length in zip(prompt_of.tolist(), rollout.lengths.tolist()):
            lengths[b].append(length)
        self.layout = Layout(list(zip(mask.sum(1).tolist(), lengths)), ids.device)

        # the place (R, T), flat, of the token before each: at first the prompt's last
        places = torch.arange(int(self.real.sum()), len(number), device=ids.device)
        place = rollout.tokens.new_zeros(R, T).masked_scatter(self.said, places)
        last = mask.sum(1).cumsum(0) - 1  # (B,)
        self.before = torch.cat([last[prompt_of][:, None], place[:, :-1]], 1)

    @property
    def ids(self):
        """(1, N)."""
        return self.flat_ids[self.order][None]

    def positions(self, of_prompts, after):
        """M-RoPE positions of prompts (3, B, P), of the first new token (R, 1) -> (3, N)."""
        after = after + torch.arange(self.said.shape[1], device=after.device)  # (R, T)
        new = after[self.said].expand(3, -1)
        return torch.cat([of_prompts[:, self.real], new], 1)[:, self.order]

    def latents(self, z, latent_id):
        """Latents (N, D), rollout after rollout, in the order in which the row reads them."""
        is_latent = self.flat_ids == latent_id
        number = is_latent.cumsum(0) - 1
        return z[number[self.order][is_latent[self.order]]]
