"""Spans predicted as a set: all latents of a set at once, set after set.

A fork of sft.py, and of `latent_decode.decode_slowly`. Ours, after SAR (Liu et al., arXiv
2410.10511).

    p(x) = prod_k p(X_k | X_<k)              a sequence x, cut into sets X_1 .. X_K      SAR
    m_n  = embedding of `<|latent|>` + e_n           the query of a block's latent n, e_n is learnt
    z_n  = g(h(m_n))                                 what it predicts, g = to_latent
    L_latent = 1/|S| sum_n || g(h(m_n)) - e*_n ||^2          the paper's Eq. (3), from the queries

Two streams run through one decoder. *Content* is what sft.py feeds: words, and e* in the latents'
places. *Queries* come behind it, one a latent, at the position of their latent:

    layout      prompt, words, <|latent_start|> z_1 .. z_N <|latent_end|>, words | m_1 .. m_N
    content     sees content of its own set and of those before it; a word is a set of its own
    query       sees content of the sets before its own, and the queries of its own
    nobody      else sees a query: words do not depend on them

With as many sets as latents, content is causal as ever. No latent is predicted from another of its
set: under teacher forcing nothing leaks from the first to the second. Decoding feeds the queries of
a set together with the content before it; then they leave the cache. From `<|latent_start|>` to
`<|latent_end|>`, both fed, K sets take K + 1 passes; one by one, N latents take N + 2.

    python -m variants.set_spans --model DIR --data train.json --schedule frame

Schedules: ar (K = N) | frame (a set a frame) | one (K = 1) | K sets, as equal as can be | random:
other cuts for each row and step, to be decoded with any number of sets.

Where this differs from SAR:
 1. Latents are continuous. None is sampled, and each has a squared error of its own: of several
    possible futures a set predicts the mean.
 2. One decoder, not two. The order is that of the sequence; only the cuts are random.
Where this differs from the paper:
 3. A latent is read off its query, not off the state before it; with ar, too.
 4. A span's length is given, not chosen. Spans with no word between them are one *block*: a set may
    hold latents of several, and then all that stands between these.

Axis letters: B rows, L content tokens, Q queries of a row, N latents of all rows, C tokens in the
cache, D hidden, V words.
"""

import dataclasses
import math
import os
import random
import re
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

import sft
from common.cli import run_script
from common.machine import Machine, set_sync, whole
from common.report import draw_curves
from common.run import Run, rows_of
from data import Samples, model_inputs
from latent_decode import ends_of, never_words
from model import FutureL1

FAR = 2**40  # the order of padding: nobody sees it


@dataclasses.dataclass
class Config(sft.Config):
    schedule: str = "frame"  # ar | frame | one | random | a number of sets  # ours
    slots: int = 32  # latents of the longest block, a learnt vector each  # ours

    def __post_init__(self):
        super().__post_init__()
        cut([[0]], self.schedule, random)  # raises ValueError for what is no schedule
        if self.stop_term or not self.spans:
            raise ValueError("a span's length is given: no --stop_term, and no --no-spans")
        if self.eval_data or self.lora_rank:
            raise ValueError("set spans: no --eval_data, no --lora_rank")

    @property
    def label(self):
        return f"set spans ({self.schedule})"


def add_slots(model, n):
    """Give a FutureL1 e_1 .. e_n, small random vectors. Saved, it is loaded with cls=Model."""
    weight, D = model.lm_head.weight, model.config.text_config.hidden_size
    model.config.decoded_by, model.config.set_slots = "variants/set_spans.py", n
    model.slots = nn.Embedding(n, D, dtype=weight.dtype, device=weight.device)
    nn.init.normal_(model.slots.weight, std=model.config.text_config.initializer_range)


class Model(FutureL1):
    """FutureL1 with the vectors of the queries, if its config has them: `load(cls=Model)`."""

    def __init__(self, config):
        super().__init__(config)
        if getattr(config, "set_slots", None):
            add_slots(self, config.set_slots)


def find_blocks(ids, c):
    """A row's ids (list) -> its blocks: lists of spans, each the places of its latents."""
    names = {c.latent_start_id: "S", c.latent_id: "z", c.latent_end_id: "E"}
    text, span = "".join(names.get(token, ".") for token in ids), re.compile("z+")
    blocks = [span.finditer(text, *block.span()) for block in re.finditer("z+(ESz+)*", text)]
    return [[list(range(*match.span())) for match in block] for block in blocks]


def cut(block, schedule, draw=None):
    """A block -> its sets, lists of places. draw: a random.Random, without it random is refused."""
    places = sum(block, [])
    n = len(places)
    if schedule == "frame":
        return block
    if schedule == "random" and draw:
        cuts = sorted(draw.sample(range(1, n), draw.randrange(n)))
    elif schedule in ("ar", "one") or (schedule.isdecimal() and int(schedule)):
        K = dict(ar=n, one=1).get(schedule) or min(n, int(schedule))
        cuts = [k * n // K for k in range(1, K)]
    else:
        raise ValueError(f"schedule is {schedule!r}, expected ar, frame, one, 1, 2 ... (or random)")
    return [places[i:j] for i, j in pairwise([0, *cuts, n])]


def number(length, sets):
    """The order of a row's tokens (length,): tokens from a set's first to its last share one."""
    opens = torch.ones(length, dtype=torch.long)
    for places in sets:
        opens[places[0] + 1 : places[-1] + 1] = 0
    return opens.cumsum(0)


class Layout(NamedTuple):
    """The content and the queries of a forward. Padding has order FAR."""

    order: torch.Tensor  # (B, L) of content
    query_order: torch.Tensor  # (B, Q)
    place: torch.Tensor  # (B, Q) where in the content a query's latent is
    slot: torch.Tensor  # (B, Q) the latent's number in its block


def lay_out(ids, mask, c, schedule, draws=()):
    """A padded batch (B, L) -> its Layout. draws: a random.Random a row, for schedule random."""
    rows = []
    for r, (row, real) in enumerate(zip(ids.tolist(), mask.bool().cpu())):
        blocks, draw = find_blocks(row, c), draws[r] if r < len(draws) else None
        sets = [places for block in blocks for places in cut(block, schedule, draw)]
        order = number(len(row), sets).masked_fill(~real, FAR)
        place = torch.tensor(sum(sets, []), dtype=torch.long)
        slot = torch.cat([place[:0], *(torch.arange(len(sum(block, []))) for block in blocks)])
        if (slot >= c.set_slots).any():
            raise ValueError(f"a block of {slot.max() + 1} latents, but slots is {c.set_slots}")
        rows.append((order, order[place], place, slot))
    fields = zip(zip(*rows), (FAR, FAR, 0, 0))
    return Layout(*(pad_sequence(rows, True, fill).to(ids.device) for rows, fill in fields))


def sees(order, is_query, key_order, key_is_query):
    """Who sees whom: order and stream of tokens (B, L) and of keys (B, C) -> (B, L, C) bool."""
    # deviation 2: one decoder, whose order is that of the sequence
    same_stream = key_is_query[:, None] == is_query[..., None]
    earlier = (key_order[:, None] < order[..., None]) & ~key_is_query[:, None]
    return earlier | ((key_order[:, None] == order[..., None]) & same_stream)


def run_streams(model, embedded, positions, layout, seen, cache=None):
    """Content and queries through the decoder -> states of content (B, L, D), of queries (B, Q, D).

    embedded: `FutureL1.embed`'s of content. positions (3, B, L + Q). seen (B, C): the order of what
    is in the cache, where all that is fed is added.
    """
    x, visual, deepstack = embedded
    L, Q = layout.order.shape[1], layout.slot.shape[1]
    keys = torch.cat([seen, layout.order, layout.query_order], 1)  # (B, C + L + Q)
    is_query = (torch.arange(keys.shape[1], device=x.device) >= keys.shape[1] - Q).expand_as(keys)
    mask = sees(keys[:, -L - Q :], is_query[:, -L - Q :], keys, is_query)  # (B, L + Q, C + L + Q)
    m = model.get_input_embeddings().weight[model.config.latent_id] + model.slots(layout.slot)
    text = model.model.language_model
    if text.config._attn_implementation != "sdpa":  # which takes any mask
        text.set_attn_implementation("sdpa")
    out = text(
        inputs_embeds=torch.cat([x, m], 1),  # (B, L + Q, D)
        position_ids=positions,
        attention_mask=mask[:, None],
        visual_pos_masks=None if visual is None else F.pad(visual, (0, Q)),
        deepstack_visual_embeds=deepstack,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return out.last_hidden_state.split([L, Q], 1)


def two_streams(model, layout, latents, input_ids, attention_mask, cache=None, **media):
    """A padded batch from its start -> states of content (B, L, D), of queries (N, D) in order.

    latents (N, D): what content is fed in the latents' places. media as `FutureL1.hidden`.
    """
    embedded = model.embed(input_ids, latents, **media)  # (B, L, D)
    grids = media.get("image_grid_thw"), media.get("video_grid_thw")
    positions, model.model.rope_deltas = model.positions(input_ids, attention_mask, *grids)
    of_queries = positions.gather(2, layout.place.expand(3, -1, -1))  # (3, B, Q)
    positions = torch.cat([positions, of_queries], 2)  # (3, B, L + Q)
    h, q = run_streams(model, embedded, positions, layout, layout.order[:, :0], cache)
    return h, q[layout.query_order < FAR]


# -------------------------------------------------------------------------------------------- loop


def batch_sums(model, batch, progress, latent_var, config):
    """A micro-batch -> its sums of Eq. (2) from content, and of Eq. (3) from the queries."""
    e = model.lm_head.weight.new_zeros(0, model.lm_head.in_features)  # (N, D)
    if "future_pixel_values" in batch:
        e = model.encode_frames(batch["future_pixel_values"], batch["future_grid_thw"])
    # cuts depend on seed, progress and id alone: one process and eight draw the same
    draws = [random.Random(f"{config.seed} {progress!r} {row.id}") for row in batch["rows"]]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    layout = lay_out(ids, mask, model.config, config.schedule, draws)
    h, q = two_streams(model, layout, e, **model_inputs(batch))

    # Eq. (2): the state at t - 1 predicts the word at t
    has_label = batch["labels"][:, 1:] != -100  # (B, L - 1)
    words, logits = batch["labels"][:, 1:][has_label], model.logits(h[:, :-1][has_label])
    ce_sum = F.cross_entropy(logits, words, reduction="sum")
    # deviation 1: latents are continuous, so each has a squared error of its own
    # deviation 3: a latent is read off its query
    distance = (model.to_latent(q).float() - e.float()).pow(2).mean(-1)  # (N,) Eq. (3)
    return ce_sum, distance.sum() / latent_var


def train(config):
    """SFT with queries -> path of the last checkpoint. The loop of sft.py.

    Raises SystemExit on a folder in use or bad input.
    """
    # the run's folder, the rows in their order, the model with the vectors of its queries
    machine = Machine(config.bf16, config.shard)
    rows = rows_of(config)
    order, steps = sft.order_of(rows, config)
    run = Run(config, rows, machine, config.label)
    torch.manual_seed(config.seed)
    model, tokenizer = run.load(cls=Model, latent_head=config.latent_head or None)
    if not hasattr(model, "slots"):
        add_slots(model, config.slots)
    model.model.visual.requires_grad_(not config.freeze_vision)
    latent_id = model.config.latent_id

    samples = Samples(rows, tokenizer, config, train=True)
    batches = sft.batches_of(samples, order, steps, run, tokenizer.pad_token_id or 0)

    # what Eq. (3) is divided by; the model over the ranks; what learns, and how
    state = run.state or dict(
        latent_var=sft.measure_variance(model, samples, order, config, machine)
    )
    latent_var = state["latent_var"]
    parallel = machine.wrap(model, unused=not config.freeze_vision)  # a batch may lack pictures
    optimizer, trained = sft.adamw(model, config)
    run.start(model, optimizer, sft.describe(config, rows, model, steps, machine))

    for step in run.steps(steps):
        # the step's samples, and how many words and latents all ranks have
        micro = next(batches)
        skipped, _ = run.skips([skip for batch in micro for skip in batch["skipped"]])
        counts = [sft.count(batch, latent_id, config) for batch in micro]
        n_text, n_latent, n_tokens = (int(n) for n in machine.sum(map(sum, zip(*counts))))
        if step == 0 and not n_text:
            raise SystemExit(f"no sample of step 0 could be used, e.g. {skipped[:1]}")

        # forward and backward, a micro-batch at a time
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in micro if n_text else []:
            set_sync(parallel, last=batch is micro[-1])
            arguments = sft.on_device(batch, machine), step / steps, latent_var, config
            with machine.autocast():
                ce, latent = parallel(batch_sums, *arguments)
            loss = ce / n_text + config.lam * latent / max(n_latent, 1)  # Eq. (1)
            (loss * machine.world).backward()  # DDP and FSDP average the ranks' gradients
            sums += torch.stack([ce, latent]).detach().double().cpu()

        # clip and step, unless there was nothing to learn or the gradient is not finite
        lr, norm = sft.learning_rate(step, steps, config), None
        for group in optimizer.param_groups:
            group["lr"] = lr
        if n_text:
            norm = whole(torch.nn.utils.clip_grad_norm_(trained, config.clip)).item()
            if math.isfinite(norm):  # the norm is equal on all ranks
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # a line in the log, and now and then a checkpoint
        means = sft.means_of(sums, n_text, n_latent, config, machine)
        line = dict(step=step, lr=lr, tokens=n_tokens, latents=n_latent, **means)
        run.log(dict(line, grad_norm=norm, skipped=skipped), "ce", "latent")
        if run.due(step + 1, steps):
            run.save(step + 1, model, tokenizer, optimizer, latent_var=latent_var)
            if machine.master:
                draw_curves(run.path, os.path.join(config.out, "loss.png"))
    return run.finish()


# ---------------------------------------------------------------------------------------- decoding


@torch.no_grad()
def decode(model, prompt, blocks, schedule, max_new_tokens):
    """Continue one prompt greedily, set after set -> tokens (list), latents (N, D).

    prompt: HF-named tensors of one row without padding. blocks: those that the response may open,
    in their order, as lengths of spans; one without room for it and a word is not opened.
    """
    c, cache, blocks = model.config, DynamicCache(), list(blocks)
    ids, start = prompt["input_ids"], prompt["input_ids"].shape[1]
    layout = lay_out(ids, prompt["attention_mask"], c, schedule)
    h, latents = two_streams(model, layout, None, **prompt, cache=cache)  # (1, L, D), none yet
    offset = model.model.rope_deltas
    while True:
        # a word, and the block that it opens
        # deviation 4: the lengths of the spans are given in `blocks`
        room = sum(blocks[0]) + 2 * len(blocks[0]) if blocks else FAR
        fits = ids.shape[1] - start + room < max_new_tokens
        never = never_words(c) + [c.latent_start_id] * (not fits)
        logits = model.logits(h[0, -1])  # (V,)
        new = [int(logits.index_fill(0, torch.tensor(never), -torch.inf).argmax())]
        if new == [c.latent_start_id]:
            spans = [
                [c.latent_start_id, *[c.latent_id] * n, c.latent_end_id] for n in blocks.pop(0)
            ]
            new = sum(spans, [])
        fed, ids = ids.shape[1], torch.cat([ids, torch.tensor([new])], 1)
        if new[-1] in ends_of(model) or ids.shape[1] - start == max_new_tokens:
            return ids[0, start:].tolist(), latents

        # a pass for each set, with its queries and what stands before its first latent; then one
        # for what is left
        layout = lay_out(ids, torch.ones_like(ids), c, schedule)
        sets = [cut(block, schedule) for block in find_blocks(new, c)]
        for size in [*map(len, sum(sets, [])), 0]:
            own = slice(len(latents), len(latents) + size)
            queries = [field[:, own] for field in layout[1:]]  # order, place, slot, each (1, Q)
            stop = int(queries[1][0, 0]) if size else ids.shape[1]
            part = Layout(layout.order[:, fed:stop], *queries)
            at = torch.cat([torch.arange(fed, stop), queries[1][0]])  # (L + Q,)
            known = int((ids[0, :fed] == c.latent_id).sum())  # latents that were fed before
            embedded = model.embed(ids[:, fed:stop], latents[known:])
            positions = (at + offset).expand(3, -1, -1)  # (3, 1, L + Q)
            h, q = run_streams(model, embedded, positions, part, layout.order[:, :fed], cache)
            if size:  # queries leave the cache; what they predict is content of the next pass
                cache.crop(-size)
                latents = torch.cat([latents, model.to_latent(q[0])])
            fed = stop


if __name__ == "__main__":
    run_script(train, Config)
