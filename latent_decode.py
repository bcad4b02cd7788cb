"""Decoding that switches between words and latents (paper sec. 3.1).

Each row of the batch is in one of three states, and every step gives it one token:

    state      chosen by the policy                               fed back next
    words      a word, `<|latent_start|>` or the end of turn      that token's embedding
    in a span  stop = `<|latent_end|>`, continue = `<|latent|>`   stop: the token; else the state
    done       nothing                                            padding

`<|latent|>` and `<|latent_end|>` cannot be produced among words. At `max_latents` a span is stopped
by force; a model whose config has `min_latents` goes on by force below it. The record (tokens,
latents, which of them were chosen, their log-probabilities) is exactly what was fed to the model
and what is in its cache, so that training can replay it.

    tokens, latents = decode_slowly(model, prompt, max_new_tokens=64)       # the definition
    rollout = generate(model, batch, max_new_tokens=2048)                   # the same, fast; greedy
    rollout = generate(model, batch, max_new_tokens=2048, temperature=0.9, top_p=0.99, n=8)
    token_logprobs(model, batch, rollout, temperature=0.9)     # = rollout.logprobs, with a gradient

The fast path: `generate` -> `step`, from state to state -> `choose`, one decision a row.

Where this differs from the paper:
 1. In a span the event is binary: top-p does not apply.
 2. Placeholder tokens of images and videos are never produced: a replay could not tell them apart
    from input.
Where this differs from the official code:
 3. A forced stop is in the cache and in the record alike.
 4. Inside a span only stop or continue can happen, never another word. Greedily, a span ends where
    `<|latent_end|>` is the most probable of all words, which is official's rule.
 5. A replay feeds the recorded latents; official feeds the `<|latent|>` token.

How it is fast: vision and prompt run once a prompt, not once a sample. Keys and
values of a prompt exist once (common/shared_prefix.py). The host looks at the device only every
CHUNK tokens, and then drops finished rows. On CUDA a step can be captured as one graph.

Axis letters: B prompts, R rows = B * n (row i * n + k is sample k of prompt i), P prompt tokens,
T new tokens, S chosen tokens, N latents, D hidden, V vocabulary.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from common.rollouts import OneRow, Rollout, Transcript, join, take  # noqa: F401  importable too
from common.sampling import choose_word
from common.shared_prefix import DecodingCache, SharedCache
from data import MEDIA, collate, model_inputs, to_device
from model import log_continue

CHUNK = 16  # steps between two looks at which rows are done
LOGITS = 1024  # tokens of a replay whose logits are in memory at a time


# ----------------------------------------------------------------------------------- the definition


@torch.no_grad()
def decode_slowly(model, prompt, max_new_tokens, max_latents=8, eos=()):
    """Section 3.1 to the letter: greedy, one prompt, no cache -> tokens (list), latents (N, D).

    prompt: HF-named tensors of one row without padding. `generate` is tested against this.
    """
    c, tokens, latents = model.config, [], torch.zeros(0, model.lm_head.in_features)
    never = torch.tensor(_not_among_words(c))
    least, span = getattr(c, "min_latents", 0), None  # latents of the open span; None = among words
    while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in eos):
        ids = torch.cat([prompt["input_ids"], torch.tensor([tokens], dtype=torch.long)], 1)
        rest = dict(prompt, input_ids=ids, attention_mask=None)  # (1, P + tokens so far)
        h = model.hidden(**rest, latents=latents)[0][0, -1]  # (D,) h_p
        logits = model.logits(h)  # (V,)
        if span is None:
            token = int(logits.index_fill(0, never, -torch.inf).argmax())
            span = 0 if token == c.latent_start_id else None
        elif span == max_latents or (span >= least and int(logits.argmax()) == c.latent_end_id):
            token, span = c.latent_end_id, None
        else:  # z_1 = h_p, z_{k+1} = h_{p+k}: the state itself is what is fed next
            token, span = c.latent_id, span + 1
            latents = torch.cat([latents, model.to_latent(h)[None]])
        tokens.append(token)
    return tokens, latents


def _not_among_words(c):
    """The ids that cannot be produced as words."""
    return [c.latent_id, c.latent_end_id, c.image_token_id, c.video_token_id]


# ------------------------------------------------------------------------------- one decision a row


@dataclass
class Rule:
    """How tokens are chosen; the ids are those of the three latent tokens."""

    latent_start: int
    latent: int
    latent_end: int
    banned: torch.Tensor  # (V,) -inf for what cannot be produced among words, else 0
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0  # on words
    max_latents: int = 8  # longest span
    eos: torch.Tensor | None = None  # (ends,) ids that end a row
    pad: torch.Tensor | int = 0  # what a finished row gets
    min_latents: int = 0  # shortest span, where the longest is no shorter


def choose(logits, in_span, count, u, rule):
    """One decision a row -> (token (R,), log-probability (R,), sampled (R,) bool).

    logits (R, V); in_span (R,) bool; count (R,) latents of the open span so far; u (R,) uniform in
    [0, 1), the one random number that a row's decision takes, be it a word or stop.
    Log-probabilities are those of the full softmax, whatever top_p and banned leave out.
    Source: sec. 3.1; ours in a span.
    """
    logp = (logits.float() / (rule.temperature or 1.0)).log_softmax(-1)  # (R, V)
    word = choose_word(logp + rule.banned, u, rule.temperature, rule.top_p)

    # in a span there is one event: stop or continue; at its longest or too short it is no choice
    log_stop = logp[:, rule.latent_end]
    stops = log_stop.exp() > u if rule.temperature else logp.argmax(-1) == rule.latent_end
    full, short = count >= rule.max_latents, count < rule.min_latents
    stop = full | (stops & ~short)
    log_event = torch.where(stop, log_stop, log_continue(log_stop))

    token = torch.where(in_span, torch.where(stop, rule.latent_end, rule.latent), word)
    logprob = torch.where(in_span, log_event, logp.gather(1, word[:, None])[:, 0])
    sampled = ~(in_span & (full | short))
    return token, logprob.masked_fill(~sampled, 0), sampled


# ------------------------------------------------------------------------- one step, state to state


class State(NamedTuple):
    """Where each live row is: what the next step needs. Live: not left yet, finished or not."""

    row: torch.Tensor  # (R,) its number in the whole rollout
    h: torch.Tensor  # (R, D) the state that chooses the next token
    position: torch.Tensor  # (R, 1) M-RoPE position of the next token
    in_span: torch.Tensor  # (R,) bool
    span: torch.Tensor  # (R,) number of the newest span, from 0; -1 = none yet
    count: torch.Tensor  # (R,) latents of the open span so far
    done: torch.Tensor  # (R,) bool

    def at(self, rows):
        """Only these rows."""
        return State(*(x[rows] for x in self))


class Record(NamedTuple):
    """What a step did, a row each."""

    token: torch.Tensor  # (R,)
    logprob: torch.Tensor  # (R,) 0 where nothing was chosen
    sampled: torch.Tensor  # (R,) bool: the policy chose it
    z: torch.Tensor  # (R, D) what was fed, where the token is a latent


def own_latent(model, state):
    """What a span is fed: z_1 = h_p, z_{k+1} = h_{p+k} -> (R, D). Source: sec. 3.1."""
    return model.to_latent(state.h)


def step(model, cache, state, u, rule, feed=own_latent):
    """Choose one token a row, then feed it -> the next State, the Record. Source: sec. 3.1.

    feed(model, state) -> (R, D): the next latent of each row that is in a span.
    """
    token, logprob, sampled = choose(model.logits(state.h), state.in_span, state.count, u, rule)
    token = torch.where(state.done, rule.pad, token)
    z = feed(model, state)
    record = Record(token, logprob.masked_fill(state.done, 0), sampled & ~state.done, z)

    done = state.done | (torch.isin(token, rule.eos) & ~state.in_span)
    is_latent = state.in_span & (token == rule.latent)
    opens = (token == rule.latent_start) & ~done
    x = model.get_input_embeddings()(token)  # (R, D) a word
    x = torch.where(is_latent[:, None], z.to(x.dtype), x)  # or the state itself
    h = cache.feed(model.model.language_model, x, state.position, token)
    after = State(
        row=state.row,
        h=h,
        position=state.position + 1,
        in_span=is_latent | opens,
        span=state.span + opens,
        count=torch.where(is_latent, state.count + 1, 0),
        done=done,
    )
    return after, record


def capture(run, state, u):
    """`run(state, u)` as a CUDA graph: the same function, its inputs copied to fixed places. Ours.

    Capturing runs nothing. The cache is updated in place, inside the graph as outside.
    """
    fixed, fixed_u = State(*(x.clone() for x in state)), u.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        after, record = run(fixed, fixed_u)

    def replayed(state, u):
        for place, value in zip((*fixed, fixed_u), (*state, u)):
            place.copy_(value)
        graph.replay()
        return State(*(x.clone() for x in after)), Record(*(x.clone() for x in record))

    return replayed


# ----------------------------------------------------------------------------------------- generate


@torch.no_grad()
def generate(
    model, batch, *, max_new_tokens, temperature=0.0, top_p=1.0, max_latents=8, n=1,
    eos_token_id=None, generator=None, feed=own_latent, banned=(), stream=None, share=False,
    cuda_graph=False,
):  # fmt: skip
    """Continue each prompt n times -> Rollout. Source: sec. 3.1.

    batch: dict of HF-named tensors, left-padded (`data.model_inputs`).
    temperature 0 = greedy; log-probabilities are then those of the untempered softmax.
    max_latents: longest span; paper: 2 * L_max = 8. The shortest is the model's own, see `Rule`.
    eos_token_id: int or list, default the model's.
    generator: where random numbers come from. banned: ids that are never produced among words.
    feed: what a span is fed, see `step`. It is called once a step, in order, with the live rows
    only; `state.row` are their numbers. So it may be an object with a state of its own.
    stream: called with each new piece of the tokens, (live rows, up to CHUNK), as it is known.
    share: decode what the samples of a prompt have in common once (common/shared_prefix.py).
    Another feed is refused then: equal words would no longer mean equal latents.
    cuda_graph: on CUDA, capture one step and replay it; then feed may have no state on the host.

    A greedy result does not depend on what else is in the batch (up to rounding). A sampled one
    does not depend on when other rows finish. Raises ValueError for right padding or bad arguments.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask  # (B, P)
    if not bool(mask[:, -1].all()):
        raise ValueError("generate needs left-padded prompts: attention_mask must end in 1")
    if max_new_tokens < 1 or n < 1 or max_latents < 0 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"bad arguments: {max_new_tokens=} {n=} {max_latents=} {temperature=} {top_p=}"
        )
    if share and (feed is not own_latent or cuda_graph):
        raise ValueError("share: takes no other feed, and no cuda_graph, whose step has one size")
    rule = _rule(model, temperature, top_p, max_latents, eos_token_id, banned)
    inputs = {k: v for k, v in batch.items() if k != "mm_token_type_ids"}  # HF's: recomputed

    training = model.training
    model.eval()
    try:
        h, prompt = model.hidden(**dict(inputs, attention_mask=mask), use_cache=True)
        cache = (SharedCache if share else DecodingCache)(prompt, mask.sum(1).tolist(), n)
        position = mask.sum(-1, keepdim=True) + model.model.rope_deltas  # (B, 1)
        state = _begin(h[:, -1].repeat_interleave(n, 0), position.repeat_interleave(n, 0))
        run = functools.partial(step, model, cache, rule=rule, feed=feed)
        book = Transcript(len(state.row), max_new_tokens, rule)
        return _decode(run, cache, state, book, generator, stream, cuda_graph and ids.is_cuda)
    finally:
        model.train(training)


def _rule(model, temperature, top_p, max_latents, eos_token_id, banned):
    """The arguments of `generate` as a Rule, on the model's device."""
    c, device = model.config, model.device
    if eos_token_id is None:
        eos_token_id = model.generation_config.eos_token_id
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
    never = torch.zeros(model.lm_head.out_features, device=device)
    never[[*_not_among_words(c), *banned]] = -torch.inf
    ends = torch.tensor(eos, device=device, dtype=torch.long)
    pad = ends[0] if eos else torch.zeros((), dtype=torch.long, device=device)
    ids = c.latent_start_id, c.latent_id, c.latent_end_id
    least = getattr(c, "min_latents", 0)
    return Rule(*ids, never, temperature, top_p, max_latents, ends, pad, least)


def _begin(h, position):
    """The state after the prompts. h (R, D), position (R, 1)."""
    rows = torch.arange(len(h), device=h.device)
    no = torch.zeros_like(rows, dtype=torch.bool)
    zero = torch.zeros_like(rows)
    return State(rows, h, position, in_span=no, span=zero - 1, count=zero, done=no)


def _decode(run, cache, state, book, generator, stream, graph):
    """The loop over steps, `run(state, u)`, in chunks; after each, finished rows leave -> Rollout.

    graph: capture a step, once a plain one has run at this number of rows.
    """
    (R, T), device, captured = book.tokens.shape, state.h.device, None
    source = generator.device if generator else device
    for start in range(0, T, CHUNK):
        # drawn for all rows, live or not: a row's numbers do not depend on when others finish
        size = R, min(CHUNK, T - start)
        if cache.reserve(size[1]):
            captured = None
        u = torch.rand(size, generator=generator, device=source).to(device)

        records = []
        for drawn in u[state.row].unbind(1):  # (live,) a step
            state, record = (captured or run)(state, drawn)
            if graph and captured is None:
                captured = capture(run, state, drawn)
            records.append(record)
        chunk = Record(*(torch.stack(field, 1) for field in zip(*records)))  # (live, steps)
        book.write(state.row, start, chunk)
        cache.used += size[1]
        if stream:
            stream(chunk.token)

        # finished rows leave, when half of them have finished
        live = (~state.done).nonzero()[:, 0]
        if not len(live):
            break
        if len(live) <= len(state.row) // 2:
            state, captured = state.at(live), None
            cache.keep(live)
    return book.rollout()


def ask(model, tokenizer, samples, **how):
    """Encoded prompts -> their Rollout, the tokens of each row (lists), the text of each row.

    samples: B results of `data.encode`, all readable. how: keyword arguments of `generate`. With
    n rollouts a prompt, row i * n + k is rollout k of prompt i.
    """
    batch = collate(samples, tokenizer.pad_token_id or 0, side="left")
    rollout = generate(model, model_inputs(to_device(batch, model.device)), **how)
    tokens = [row[:n].tolist() for row, n in zip(rollout.tokens.cpu(), rollout.lengths)]
    return rollout, tokens, tokenizer.batch_decode(tokens)


# ------------------------------------------------------------------------------------------- replay


@dataclass
class Replay:
    """What a forward over recorded rollouts gives; as many rows as the Rollout."""

    logprobs: torch.Tensor  # (R, T) of what was chosen, 0 where nothing was
    entropy: torch.Tensor  # (R, T) of the choice there was, no gradient
    predicted: torch.Tensor  # (N, D) what the model would feed
    latents: torch.Tensor  # (N, D) what was fed: a leaf
    states: torch.Tensor  # (S, D) those that chose, in the order of `rollout.sampled`


def replay(model, batch, rollout, temperature, prompt_of=None):
    """Feed rollouts again, latents included -> Replay. Source: sec. 3.3.

    Differentiable in the weights and in the latents.
    batch: left-padded prompts (`data.model_inputs`), encoded once each. prompt_of (R,): each row's
    prompt, default R / B rows of each in turn.
    """
    ids, sampled, mask = rollout.tokens, rollout.sampled, batch["attention_mask"]
    R, T = ids.shape  # mask (B, P)
    if prompt_of is None:
        prompt_of = torch.arange(R, device=ids.device) // (R // len(mask))

    # each prompt once, its rollouts after it; the latents are a leaf
    row = OneRow(batch["input_ids"], mask, rollout, prompt_of)
    grids = batch.get("image_grid_thw"), batch.get("video_grid_thw")
    positions, offset = model.positions(batch["input_ids"], mask, *grids)  # (3, B, P), (B, 1)
    after = (mask.sum(-1, keepdim=True) + offset)[prompt_of]  # (R, 1)
    wide = torch.promote_types(model.dtype, torch.float32)
    z = torch.cat(rollout.latents).detach().to(wide).requires_grad_()  # (N, D)
    media = {name: value for name, value in batch.items() if name in MEDIA}
    embedded = model.embed(row.ids, row.latents(z, model.config.latent_id), **media)
    h, _ = model.states(embedded, row.positions(positions, after), row.layout)  # (N, D)

    # the state that chose each token, what it chose, what it would feed
    h = h[row.back]  # (N, D), prompts before rollouts
    states = h[row.before[sampled]]  # (S, D)
    logprob, entropy = decisions(model, states, ids[sampled], temperature)  # (S,)
    is_latent = ids == model.config.latent_id
    predicted = model.to_latent(h[row.before[is_latent]]).to(wide)  # (N, D)
    zero = torch.zeros_like(ids, dtype=wide)
    logprob, entropy = (zero.masked_scatter(sampled, x) for x in (logprob, entropy))  # (R, T)
    return Replay(logprob, entropy, predicted, z, states)


def decisions(model, h, chosen, temperature):
    """States (S, D), what was chosen there (S,) -> log-probability and entropy of each (S,)."""

    def choice(h, chosen):
        logp = (model.logits(h) / temperature).log_softmax(-1)  # (S', V)
        log_stop = logp[:, model.config.latent_end_id]
        log_go = log_continue(log_stop)
        continued = chosen == model.config.latent_id
        in_span = continued | (chosen == model.config.latent_end_id)
        picked = torch.where(continued, log_go, logp.gather(1, chosen[:, None])[:, 0])
        with torch.no_grad():
            of_event = -log_stop.exp() * log_stop - log_go.exp() * log_go
            entropy = torch.where(in_span, of_event, -(logp.exp() * logp).sum(-1))
        return picked, entropy

    if len(h) <= LOGITS:
        return choice(h, chosen)
    # a piece's (S', V) is made again in the backward: at once, 16k tokens are 10 GB a copy
    pieces = zip(h.split(LOGITS), chosen.split(LOGITS))
    results = [checkpoint(choice, *piece, use_reentrant=False) for piece in pieces]
    logprob, entropy = zip(*results)
    return torch.cat(logprob), torch.cat(entropy)


def token_logprobs(model, batch, rollout, temperature, prompt_of=None):
    """Log-probabilities (R, T) of what a rollout chose, as `generate` recorded them.

    The one function for the policy, the reference model and the tests; arguments as `replay`.
    Source: sec. 3.3, the policy of Eq. (7).
    """
    return replay(model, batch, rollout, temperature, prompt_of).logprobs
