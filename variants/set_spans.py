"""Spans predicted as a set: all latents of a set at once, set after set.

A fork of sft.py's loss, latent_decode.py's loop. Ours, after SAR (Liu et al., arXiv 2410.10511).

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
cache, P prompt tokens, T new tokens, D hidden, V words.
"""

import dataclasses
import math
import os
import random
import re
import time
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
from data import Samples, loader, model_inputs
from latent_decode import Rollout, choose_word
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
    model.config.variant, model.config.set_slots = "set_spans", n
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
    total = config.steps * config.global_batch or round(len(rows) * config.epochs)
    if total < 1:
        raise SystemExit(f"nothing to train on: {len(rows)} rows, {config.epochs} epochs")
    order, steps = sft.sample_order(len(rows), total, config.seed), -(-total // config.global_batch)
    run = Run(config, rows, machine, config.label)
    torch.manual_seed(config.seed)
    model, tokenizer = run.load(cls=Model, latent_head=config.latent_head or None)
    if not hasattr(model, "slots"):
        add_slots(model, config.slots)
    model.model.visual.requires_grad_(not config.freeze_vision)
    latent_id = model.config.latent_id

    # the loader is created before the random state is restored: it draws a number when it starts
    samples = Samples(rows, tokenizer, config, train=True)
    sizes = config.global_batch, config.micro_batch, machine.rank, machine.world
    plan = list(sft.micro_batches(order, run.first, steps, *sizes))
    micro_steps = -(-config.global_batch // (config.micro_batch * machine.world))
    batches = iter(loader(samples, plan, config.workers, pad_id=tokenizer.pad_token_id or 0))

    # what Eq. (3) is divided by; the model over the ranks; AdamW with weight decay on matrices only
    if run.state:
        latent_var = run.state["latent_var"]
    else:
        latent_var = sft.measure_variance(model, samples, order, config, machine)
    sums_of = machine.wrap(model, unused=not config.freeze_vision)  # a batch may lack pictures
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = dict(params=[p for p in trained if p.ndim >= 2], weight_decay=config.weight_decay)
    vectors = dict(params=[p for p in trained if p.ndim < 2], weight_decay=0.0)
    betas = 0.9, config.beta2
    optimizer = torch.optim.AdamW([matrices, vectors], lr=config.lr, betas=betas, fused=True)
    run.start(model, optimizer, sft.describe(config, rows, model, steps, machine))

    for step in run.steps(steps):
        # the step's samples, and how many words and latents all ranks have
        began = time.time()
        micro = [next(batches) for _ in range(micro_steps)]
        skipped, _ = run.skips([skip for batch in micro for skip in batch["skipped"]])
        if step == 0 and machine.master:
            sft.print_row(micro[0], tokenizer, latent_id)
        counts = [sum(some) for some in zip(*(sft.count(b, latent_id, config) for b in micro))]
        n_text, n_latent, n_tokens = (int(n) for n in machine.sum(counts))
        if step == 0 and not n_text:
            why = f"could be used, e.g. {skipped[0][1]}" if skipped else "has a word to learn"
            raise SystemExit(f"no sample of step 0 {why}")

        # forward and backward, a micro-batch at a time
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in micro if n_text else []:
            set_sync(sums_of, last=batch is micro[-1])
            arguments = sft.on_device(batch, machine), step / steps, latent_var, config
            with machine.autocast():
                ce, latent = sums_of(batch_sums, *arguments)
            loss = ce / n_text + config.lam * latent / max(n_latent, 1)  # Eq. (1)
            (loss * machine.world).backward()  # DDP and FSDP average the ranks' gradients
            sums += torch.stack([ce, latent]).detach().double().cpu()

        # clip and step, unless there was nothing to learn or the gradient is not finite
        lr, norm = sft.learning_rate(step, steps, config), None
        if n_text:
            norm = whole(torch.nn.utils.clip_grad_norm_(trained, config.clip)).item()
        for group in optimizer.param_groups:
            group["lr"] = lr
        update_skipped = norm is None or not math.isfinite(norm)  # the norm is equal on all ranks
        if not update_skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # a line in the log, and now and then a checkpoint
        means = sft.means_of(sums, n_text, n_latent, config, machine)
        line = dict(step=step, lr=lr, tokens=n_tokens, latents=n_latent, **means)
        line.update(grad_norm=norm, update_skipped=update_skipped, skipped=skipped)
        line.update(seconds=round(time.time() - began, 4))
        if update_skipped:
            why = "no sample could be used" if norm is None else "gradient is not finite"
            run.say(f"step {step}: {why}, no update")
        run.log(line, "ce", "latent")
        if run.due(step + 1, steps):
            run.save(step + 1, model, tokenizer, optimizer, latent_var=latent_var)
            if machine.master:
                draw_curves(run.path, os.path.join(config.out, "loss.png"))
    return run.finish()


# ---------------------------------------------------------------------------------------- decoding


class Tables:
    """B responses of up to T tokens while they are decoded. like (B, D): a state."""

    def __init__(self, T, like):
        B, D = like.shape
        self.ids = torch.zeros(B, T, dtype=torch.long, device=like.device)
        self.logprobs, self.sampled = like.new_zeros(B, T).float(), self.ids.bool()
        self.z, self.done = like.new_zeros(B, T, D), self.sampled[:, 0].clone()
        # of each row: tokens written, tokens fed, latents known
        self.end, self.fed, self.known = self.ids.new_zeros(3, B)

    def say(self, words, logprobs, blocks, c, ends):
        """Write a word in each row whose tokens are all fed, and the block that it opens."""
        ready = ~self.done & (self.fed == self.end)
        self.done |= ready & (self.end == self.ids.shape[1])
        rows = (ready & ~self.done).nonzero()[:, 0]
        at = rows, self.end[rows]
        self.ids[at], self.logprobs[at], self.sampled[at] = words[rows], logprobs[rows], True
        self.end[rows] += 1
        self.done[rows] = torch.isin(words[rows], ends)
        for r in rows[words[rows] == c.latent_start_id].tolist():
            start, z, end = c.latent_start_id, c.latent_id, c.latent_end_id
            block = sum([[start, *[z] * n, end] for n in blocks[r].pop(0)], [])[1:]
            self.ids[r, self.end[r] : self.end[r] + len(block)] = torch.tensor(block)
            self.end[r] += len(block)


def pack(marked, *tables):
    """The marked (B, T) columns of tables (B, T), on the left (B, most); which are real."""
    columns = (~marked).int().argsort(dim=1, stable=True)[:, : int(marked.sum(1).max())]
    return [table.gather(1, columns) for table in tables], marked.gather(1, columns)


def feed(model, tables, after, seen, cache, schedule):
    """A pass: what is known and the next set's queries -> last states (B, D), orders (B, C).

    after (B, 1): position of the first token. seen (B, C): the order of what is in the cache.
    """
    t = torch.arange(tables.ids.shape[1], device=seen.device).expand_as(tables.ids)  # (B, T)
    fed, known, end = (x[:, None] for x in (tables.fed, tables.known, tables.end))  # (B, 1)
    layout = lay_out(tables.ids, t < end, model.config, schedule)

    # the queries of the next set, and content up to its first latent, or to the end
    order = layout.query_order.masked_fill(t[:, : layout.slot.shape[1]] < known, FAR)  # (B, Q)
    asked = (order < FAR) & (order == F.pad(order, (0, 1), value=FAR).amin(1, True))
    stop = torch.cat([layout.place.masked_fill(~asked, FAR), end], 1).amin(1, True)  # (B, 1)
    (at, order, ids), real = pack((t >= fed) & (t < stop), t, layout.order, tables.ids)
    (of_query, place, slot), asking = pack(asked, *layout[1:])
    layout = Layout(order.masked_fill(~real, FAR), of_query.masked_fill(~asking, FAR), place, slot)
    z = tables.z[torch.arange(len(at))[:, None], at]  # (B, L, D)
    z = z[real & (ids == model.config.latent_id)]  # (N, D)
    embedded = model.embed(ids.masked_fill(~real, 0), z)
    positions = (after + torch.cat([at, place], 1)).expand(3, -1, -1)  # (3, B, L + Q)
    h, q = run_streams(model, embedded, positions, layout, seen, cache)

    # queries leave the cache; what they predicted is content of the next pass
    cache.crop(-q.shape[1])
    row, k = asking.nonzero(as_tuple=True)
    tables.z[row, place[row, k]] = model.to_latent(q[row, k])
    tables.fed, tables.known = stop[:, 0], tables.known + asked.sum(1)
    last = real.sum(1).clamp(min=1) - 1  # (B,)
    return h[torch.arange(len(h)), last], torch.cat([seen, layout.order], 1)


@torch.no_grad()
def generate(
    model, batch, blocks, schedule, *, max_new_tokens, temperature=0.0, top_p=1.0, generator=None
):
    """Continue each row of a batch -> Rollout; queries are not in it.

    batch: left-padded prompts, a row for each sample. blocks: those that each row may open, in
    order, as lengths of spans; one without room is not opened. Else as `latent_decode.generate`.
    """
    # deviation 4: the lengths of the spans are given in `blocks`
    c, ids, mask = model.config, batch["input_ids"], batch["attention_mask"]
    layout, cache = lay_out(ids, mask, c, schedule), DynamicCache()
    h, _ = two_streams(model, layout, None, **model_inputs(batch), cache=cache)
    after = mask.sum(1, keepdim=True) + model.model.rope_deltas  # (B, 1)
    seen = layout.order - FAR // 2  # (B, P) before all that comes; padding still behind it
    h, tables, blocks = h[:, -1], Tables(max_new_tokens, h[:, -1]), [list(b) for b in blocks]
    ends = torch.tensor(model.generation_config.eos_token_id, device=ids.device).reshape(-1)
    never = torch.zeros(len(h), model.lm_head.out_features, device=ids.device)  # (B, V)
    never[:, [c.latent_id, c.latent_end_id, c.image_token_id, c.video_token_id]] = -torch.inf
    while True:
        sizes = [sum(b[0]) + 2 * len(b[0]) if b else FAR for b in blocks]
        fits = tables.end + torch.tensor(sizes, device=ids.device) <= max_new_tokens
        never[:, c.latent_start_id] = torch.where(fits, 0, -torch.inf)
        logp = (model.logits(h).float() / (temperature or 1.0)).log_softmax(-1)  # (B, V)
        u = torch.rand(len(h), generator=generator).to(h.device)
        words = choose_word(logp + never, u, temperature, top_p)  # (B,)
        tables.say(words, logp.gather(1, words[:, None])[:, 0], blocks, c, ends)
        if tables.done.all():
            break
        h, seen = feed(model, tables, after, seen, cache, schedule)
    last = tables.ids.gather(1, tables.end[:, None] - 1)[:, 0]  # (B,)
    finish = ["eos" if ended else "length" for ended in torch.isin(last, ends)]
    latents = [z[row == c.latent_id] for z, row in zip(tables.z, tables.ids)]
    return Rollout(tables.ids, tables.sampled, latents, tables.logprobs, finish, tables.end)


def token_logprobs(model, batch, rollout, schedule, temperature):
    """Log-probabilities (B, T) of the words that a rollout chose, with a gradient; 0 elsewhere."""
    T, sampled = rollout.tokens.shape[1], rollout.sampled
    ids = torch.cat([batch["input_ids"], rollout.tokens], 1)  # (B, P + T)
    said = torch.arange(T, device=ids.device) < rollout.lengths[:, None]  # (B, T)
    mask = torch.cat([batch["attention_mask"], said.long()], 1)
    inputs = dict(model_inputs(batch), input_ids=ids, attention_mask=mask)
    layout = lay_out(ids, mask, model.config, schedule)
    h, _ = two_streams(model, layout, torch.cat(rollout.latents), **inputs)
    logp = (model.logits(h[:, -T - 1 : -1][sampled]) / temperature).log_softmax(-1)  # (words, V)
    chosen = logp.gather(1, rollout.tokens[sampled][:, None])[:, 0]  # (words,)
    return torch.zeros_like(rollout.logprobs).masked_scatter(sampled, chosen)


if __name__ == "__main__":
    run_script(train, Config)
