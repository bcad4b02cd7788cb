"""Decoding that switches between words and latents (paper sec. 3.1).

Each row of the batch is in one of three states, and every step gives it one token:

    state      chosen by the policy                               fed back next
    words      a word, `<|latent_start|>` or the end of turn      that token's embedding
    in a span  stop = `<|latent_end|>`, continue = `<|latent|>`   stop: the token; else the state
    done       nothing                                            padding

`<|latent|>` and `<|latent_end|>` cannot be produced among words. At `max_latents` a span is forced
to stop. The record (tokens, latents, which of them were chosen, their log-probabilities) is exactly
what was fed to the model and what is in its cache, so that training can replay it.

    tokens, latents = decode_slowly(model, prompt, max_new_tokens=64)       # the definition
    rollout = generate(model, batch, max_new_tokens=2048)                   # the same, fast; greedy
    rollout = generate(model, batch, max_new_tokens=2048, temperature=0.9, top_p=0.99, n=8)
    token_logprobs(model, batch, rollout, temperature=0.9)     # = rollout.logprobs, with a gradient

The fast path: `generate` calls `step` (from state to state), which calls `choose` (one decision a
row) and, for words, `choose_word`.

Where this differs from the paper:
 1. In a span the event is binary, so top-p does not apply.
 2. Placeholder tokens of images and videos are never produced.
Where this differs from the official code:
 3. A forced stop is in the cache and in the record alike.
 4. Inside a span only stop or continue can happen. Greedily, a span ends where `<|latent_end|>` is
    the most probable token of the whole vocabulary, which is official's rule.
 5. A replay feeds the recorded latents; official feeds the `<|latent|>` token.

How it is fast: vision and prompt run once a prompt, not once a sample, and the keys and values of a
prompt exist once (common/shared_prefix.py; a reader may take it as causal attention and go on).
CPU and GPU synchronise only every CHUNK tokens; finished rows are dropped then. On CUDA a step can
be captured as one graph.

Axis letters: B prompts, R rows = B * n (row i * n + k is sample k of prompt i), P prompt tokens,
T new tokens, S chosen tokens, N latents, D hidden, V vocabulary.
"""

import contextlib
import functools
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from common.shared_prefix import DecodingCache, Layout, SharedCache
from data import MEDIA, collate, model_inputs, to_device
from model import LATENT, log_continue, places_of

CHUNK = 16  # steps between two looks at which rows are done
LIKELIEST = 1024  # words among which a CPU looks for the nucleus first
LOGITS_AT_ONCE = 1024  # tokens of a replay whose logits are in memory at a time


# ----------------------------------------------------------------------------------- the definition


@torch.no_grad()
def decode_slowly(model, prompt, max_new_tokens, max_latents=8, eos=None):
    """Section 3.1 to the letter: greedy, one prompt, no cache -> tokens (list), latents (N, D).

    prompt: HF-named tensors of one row without padding. eos: ids that end the response, by default
    the model's own. `generate` is tested against this function.
    """
    c, tokens, latents = model.config, [], torch.zeros(0, model.lm_head.in_features)
    ends = ends_of(model, eos)
    never = torch.tensor(never_words(c))
    in_span, n = False, 0  # n: latents of the open span
    while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in ends):
        ids = torch.cat([prompt["input_ids"], torch.tensor([tokens], dtype=torch.long)], 1)
        so_far = dict(prompt, input_ids=ids, attention_mask=None)  # (1, P + tokens so far)
        h = model.hidden(**so_far, latents=latents)[0][0, -1]  # (D,) h_p
        logits = model.logits(h)  # (V,)
        if not in_span:  # a word; it may open a span
            token = int(logits.index_fill(0, never, -torch.inf).argmax())
            in_span, n = token == c.latent_start_id, 0
        elif n == max_latents or int(logits.argmax()) == c.latent_end_id:  # stop imagining
            token, in_span = c.latent_end_id, False
        else:  # go on: z_1 = h_p, z_{k+1} = h_{p+k}, the state itself is what is fed next
            token, n = c.latent_id, n + 1
            latents = torch.cat([latents, model.to_latent(h)[None]])  # (n so far, D)
        tokens.append(token)
    return tokens, latents


def never_words(c):
    """The ids that cannot be produced as words, from a model's config."""
    # deviation 2: a replay could not tell a produced placeholder from input
    return [c.latent_id, c.latent_end_id, c.image_token_id, c.video_token_id]


def ends_of(model, eos=None):
    """The ids that end a response, as a list. eos: an int or a list, by default the model's own."""
    eos = model.generation_config.eos_token_id if eos is None else eos
    return [eos] if isinstance(eos, int) else list(eos or [])


# ------------------------------------------------------------------------------- one decision a row


@dataclass
class Rule:
    """How tokens are chosen."""

    config: PreTrainedConfig  # the model's, with the ids of the three latent tokens
    banned: torch.Tensor  # ids that cannot be produced among words
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0  # on words
    max_latents: int = 8  # longest span
    eos: torch.Tensor | None = None  # (ends,) ids that end a row
    pad: int = 0  # what a finished row gets


def choose(logits, in_span, count, u, rule):
    """One decision a row -> (token (R,), log-probability (R,), sampled (R,) bool).

    logits (R, V); in_span (R,) bool; count (R,) latents of the open span so far; u (R,) uniform in
    [0, 1), the one random number that a row's decision takes, for a word as for a stop.
    Log-probabilities are those of the full softmax, whatever top_p and banned leave out.
    Source: sec. 3.1; in a span ours.
    """
    c = rule.config
    logp = (logits.float() / (rule.temperature or 1.0)).log_softmax(-1)  # (R, V)
    words = logp.index_fill(1, rule.banned, -torch.inf)
    word = choose_word(words, u, rule.temperature, rule.top_p)

    # deviation 4: in a span the one event is to stop or to continue
    log_stop = logp[:, c.latent_end_id]
    # deviation 1: p(stop) decides alone, without top-p
    stops = log_stop.exp() > u if rule.temperature else logp.argmax(-1) == c.latent_end_id
    full = count >= rule.max_latents  # at its longest it stops, which is no choice
    stop = full | stops
    log_event = torch.where(stop, log_stop, log_continue(log_stop))  # or log(1 - p(stop))

    token = torch.where(in_span, torch.where(stop, c.latent_end_id, c.latent_id), word)
    logprob = torch.where(in_span, log_event, logp.gather(1, word[:, None])[:, 0])
    sampled = ~(in_span & full)
    return token, logprob.masked_fill(~sampled, 0), sampled


def choose_word(logp, u, temperature=1.0, top_p=1.0):
    """Log-probabilities (R, V), -inf = never -> words (R,): the likeliest, or drawn by u (R,).

    The nucleus is the smallest set of likeliest words whose probabilities add up to top_p; words
    that tie with the last of them are in it, too. The word is where u falls in the cumulated
    probabilities of the nucleus, in the vocabulary's order. `multinomial` would not do: with one
    number u a row, a row's words do not depend on the other rows of the batch.
    temperature 0 = the likeliest; else `logp` has been divided by it already. Source: ours.
    """
    if temperature == 0:
        return logp.argmax(-1)
    p = (logp - logp.amax(-1, keepdim=True)).exp()  # (R, V), up to a factor
    if top_p < 1:
        needed = top_p * p.sum(-1, keepdim=True, dtype=torch.float64)  # (R, 1)
        # the likeliest words first, (R, V) or, on a CPU, at first a part: to sort 151,936 words
        # takes it as long as a small model's step, and a trained model seldom needs so many
        falling = p.topk(min(LIKELIEST, p.shape[1])).values if p.is_cpu else None
        if falling is None or bool((falling.double().sum(-1, keepdim=True) < needed).any()):
            falling = p.sort(-1, descending=True).values
        before = falling.double().cumsum(-1) < needed  # whether the nucleus goes on after a word
        # its last word (R, 1); there is one, although sums in two orders may round differently
        end = before.sum(-1, keepdim=True).clamp(max=falling.shape[1] - 1)
        p = p.masked_fill(p < falling.gather(1, end), 0)
    # in float64, so that the zeros outside the nucleus change no sum
    cdf = p.double().cumsum(-1)
    k = torch.searchsorted(cdf, u[:, None].double() * cdf[:, -1:], right=True)  # (R, 1)
    # rounding of u * cdf must not lead past the last word that has a probability
    last = (cdf < cdf[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum(k, last)[:, 0]


# ------------------------------------------------------------------------- one step, state to state


class State(NamedTuple):
    """Where each live row is, and all that the next step needs."""

    row: torch.Tensor  # (R,) its number in the whole rollout
    h: torch.Tensor  # (R, D) the state that chooses the next token
    position: torch.Tensor  # (R, 1) M-RoPE position of the next token
    in_span: torch.Tensor  # (R,) bool
    span_number: torch.Tensor  # (R,) of the newest span, from 0; -1 = none yet
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
    is_latent = state.in_span & (token == rule.config.latent_id)
    opens = (token == rule.config.latent_start_id) & ~done
    x = model.get_input_embeddings()(token)  # (R, D) a word
    x = torch.where(is_latent[:, None], z.to(x.dtype), x)  # or the state itself
    # deviation 3: whatever was chosen or forced is fed, so cache and record hold the same
    # the language model on x, causal; the cache needs `token` only to tell equal rows apart
    h = cache.feed(model.model.language_model, x, state.position, token)
    after = State(
        row=state.row,
        h=h,
        position=state.position + 1,
        in_span=is_latent | opens,
        span_number=state.span_number + opens,
        count=torch.where(is_latent, state.count + 1, 0),
        done=done,
    )
    return after, record


# ----------------------------------------------------------------------------------------- generate


@dataclass
class Rollout:
    """What was generated, as it was fed. Tensors are on the model's device."""

    tokens: torch.Tensor  # (R, T) generated tokens only, padded after the end of turn
    sampled: torch.Tensor  # (R, T) bool: the policy chose it; False where forced or padding
    latents: list  # R tensors (N_i, D), one row a `<|latent|>` token: what was fed
    logprobs: torch.Tensor  # (R, T) under the full softmax at the temperature; 0 where not chosen
    finish: list  # R of "eos" | "length"
    lengths: torch.Tensor  # (R,) generated tokens incl. the end of turn


@torch.no_grad()
def generate(
    model,
    batch,
    *,
    max_new_tokens,
    temperature=0.0,
    top_p=1.0,
    max_latents=8,
    n=1,
    eos_token_id=None,
    generator=None,
    feed=own_latent,
    banned=(),
    stream=None,
    merge_equal=False,
    cuda_graph=False,
):
    """Continue each prompt n times -> Rollout. Source: sec. 3.1.

    batch: dict of HF-named tensors, left-padded (`data.model_inputs`).
    temperature 0 = greedy; log-probabilities are then those of the untempered softmax.
    max_latents: longest span. eos_token_id: int or list, by default the model's.
    generator: where random numbers come from. banned: ids that are never produced among words.
    feed: what a span is fed, see `step`. It is called once a step, in order, with the live rows
    (`state.row`), so it may be an object with a state of its own.
    stream: called with each new piece of the tokens, (live rows, up to CHUNK), as it is known.
    merge_equal: decode the samples of a prompt once while they are equal (`SharedCache`).
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
    if merge_equal and (feed is not own_latent or cuda_graph):  # equal words, other latents
        raise ValueError("merge_equal goes neither with another feed nor with cuda_graph")

    # how tokens are chosen
    device, ends = ids.device, ends_of(model, eos_token_id)
    banned = torch.tensor([*never_words(model.config), *banned], device=device)
    eos = torch.tensor(ends, dtype=torch.long, device=device)
    pad = ends[0] if ends else 0
    rule = Rule(model.config, banned, temperature, top_p, max_latents, eos, pad)

    with in_eval_mode(model):
        # each prompt runs once; its n samples read its keys and values from one place
        h, prompts = model.hidden(**batch, use_cache=True)  # (B, P, D)
        cache_class = SharedCache if merge_equal else DecodingCache
        cache = cache_class(prompts, mask.sum(1).tolist(), n)
        run = functools.partial(step, model, cache, rule=rule, feed=feed)
        run = CapturedStep(run, cache) if cuda_graph and ids.is_cuda else run
        # `hidden` has left there what M-RoPE adds after the prompt's pictures
        position = mask.sum(-1, keepdim=True) + model.model.rope_deltas  # (B, 1)
        R, T = len(ids) * n, max_new_tokens
        row = torch.arange(R, device=device)
        state = State(
            row=row,
            h=h[:, -1].repeat_interleave(n, 0),  # (R, D)
            position=position.repeat_interleave(n, 0),  # (R, 1)
            in_span=torch.zeros_like(row, dtype=torch.bool),
            span_number=torch.full_like(row, -1),
            count=torch.zeros_like(row),
            done=torch.zeros_like(row, dtype=torch.bool),
        )
        tokens = torch.full((R, T), pad, device=device)
        sampled = torch.zeros_like(tokens, dtype=torch.bool)
        logprobs = torch.zeros_like(tokens, dtype=torch.float32)
        latents = [[] for _ in range(R)]

        for start in range(0, T, CHUNK):
            # drawn for all rows, live or not: a row's numbers do not depend on when others finish
            stop = min(start + CHUNK, T)
            source = generator.device if generator else device
            u = torch.rand(R, stop - start, generator=generator, device=source).to(device)

            # the chunk's steps; the CPU does not wait for their results
            cache.reserve(stop - start)
            records = []
            for drawn in u[state.row].unbind(1):  # (live,)
                state, record = run(state, drawn)
                records.append(record)

            # write them down
            chunk = Record(*(torch.stack(field, 1) for field in zip(*records)))  # (live, steps)
            tokens[state.row, start:stop] = chunk.token
            sampled[state.row, start:stop] = chunk.sampled
            logprobs[state.row, start:stop] = chunk.logprob
            is_latent = chunk.token == model.config.latent_id  # (live, steps)
            parts = chunk.z[is_latent].split(is_latent.sum(1).tolist())
            for r, part in zip(state.row.tolist(), parts):
                latents[r].append(part)  # (latents, D)
            if stream:
                stream(chunk.token)

            # finished rows leave, when half of them have finished
            live = (~state.done).nonzero()[:, 0]
            if not len(live):
                break
            if len(live) <= len(state.row) // 2:
                state = state.at(live)
                cache.keep(live)

    ended = torch.isin(tokens, eos) & sampled  # (R, T)
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, T)
    finish = ["eos" if e else "length" for e in ended.any(1).tolist()]
    return Rollout(tokens, sampled, [torch.cat(z) for z in latents], logprobs, finish, lengths)


@contextlib.contextmanager
def in_eval_mode(model):
    """The model in evaluation mode, afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class CapturedStep:
    """`run(state, u)` as a CUDA graph: the same function, its inputs copied to fixed places. Ours.

    It is captured anew when rows have left or the cache has moved. Capturing runs nothing. The
    cache is updated in place, inside the graph as outside.
    """

    def __init__(self, run, cache):
        self.run, self.cache, self.size = run, cache, None

    def __call__(self, state, u):
        size = len(u), self.cache.room
        if size != self.size:
            self.size = size
            state, record = self.run(state, u)
            self.capture(state, u)
            return state, record
        for place, value in zip(self.fixed, (*state, u)):
            place.copy_(value)
        self.graph.replay()
        return State(*(x.clone() for x in self.after)), Record(*(x.clone() for x in self.record))

    def capture(self, state, u):
        """Record what `run` does with a state and numbers of this size."""
        self.fixed = [x.clone() for x in (*state, u)]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.after, self.record = self.run(State(*self.fixed[:-1]), self.fixed[-1])


def ask(model, tokenizer, samples, **how):
    """Encoded prompts -> their Rollout, the tokens of each row (lists), the text of each row.

    samples: B results of `data.encode`, all readable. how: keyword arguments of `generate`. With
    n rollouts a prompt, row i * n + k is rollout k of prompt i.
    """
    batch = collate(samples, tokenizer.pad_token_id or 0, side="left", raw=True)
    rollout = generate(model, model_inputs(to_device(batch, model.device)), **how)
    tokens = [row[:n].tolist() for row, n in zip(rollout.tokens.cpu(), rollout.lengths)]
    return rollout, tokens, tokenizer.batch_decode(tokens)


def one_mark_a_span(text):
    """A response's text with one `<|latent|>` for each run of them, to be read or stored."""
    return re.sub(f"(?:{re.escape(LATENT)}\\s*)+", LATENT, text)


def gather(parts):
    """Some rows of several Rollouts as one, padded to the longest. parts: [(rollout, rows)]."""
    rows = [(rollout, r) for rollout, some in parts for r in some]
    lengths = torch.stack([rollout.lengths[r] for rollout, r in rows])  # (R,)

    def cut(name):
        values = [getattr(rollout, name)[r] for rollout, r in rows]
        return pad_sequence(values, batch_first=True)[:, : lengths.max()]  # (R, T)

    return Rollout(
        tokens=cut("tokens"),
        sampled=cut("sampled"),
        latents=[rollout.latents[r] for rollout, r in rows],
        logprobs=cut("logprobs"),
        finish=[rollout.finish[r] for rollout, r in rows],
        lengths=lengths,
    )


# ------------------------------------------------------------------------------------------- replay


@dataclass
class Replay:
    """What a forward over recorded rollouts gives; as many rows as the Rollout."""

    logprobs: torch.Tensor  # (R, T) of what was chosen, 0 where nothing was
    entropy: torch.Tensor  # (R, T) of the choice there was, no gradient
    predicted: torch.Tensor  # (N, D) what the model would feed
    latents: torch.Tensor  # (N, D) what was fed: a leaf


def replay(model, batch, rollout, temperature, prompt_of=None):
    """Feed rollouts again, latents included -> Replay. Source: sec. 3.3.

    Differentiable in the weights and in the latents.
    batch: left-padded prompts (`data.model_inputs`), encoded once each. prompt_of (R,): each row's
    prompt, by default R / B rows of each in turn.
    """
    # indices are made on the host, so that the GPU is not waited for
    device = rollout.tokens.device
    ids, mask = batch["input_ids"].cpu(), batch["attention_mask"].cpu()  # (B, P)
    tokens, sampled = rollout.tokens.cpu(), rollout.sampled.cpu()  # (R, T)
    B, (R, T), lengths = len(ids), tokens.shape, rollout.lengths.cpu()
    prompt_of = torch.arange(R) // (R // B) if prompt_of is None else prompt_of.cpu()

    # all real tokens in one row without padding: the prompts', then the rollouts'
    real = mask.bool()  # (B, P)
    said = torch.arange(T) < lengths[:, None]  # (R, T)
    row = torch.cat([ids[real], tokens[said]])  # (N,)
    grids = batch.get("image_grid_thw"), batch.get("video_grid_thw")
    positions, offset = model.positions(ids, mask, *grids)  # (3, B, P), (B, 1)
    after = (mask.sum(-1, keepdim=True) + offset)[prompt_of]  # (R, 1) of a rollout's first token
    after = (after + torch.arange(T))[said]  # (rollouts' tokens,)
    positions = torch.cat([positions[:, real], after.expand(3, -1)], 1)  # (3, N)
    # a prompt attends to itself, a rollout to its prompt and to itself
    each = [*mask.sum(1).tolist(), *lengths.tolist()]
    layout = Layout(each, device, prompt_of=[-1] * B + prompt_of.tolist())

    # deviation 5: the recorded latents are fed. They are a leaf of the graph
    wide = torch.promote_types(model.dtype, torch.float32)
    z = torch.cat(rollout.latents).detach().to(wide).requires_grad_()  # (N_z, D)
    media = {name: value for name, value in batch.items() if name in MEDIA}
    embedded = model.embed(row[None], z, **media)
    h, _ = model.states(embedded, positions.to(device), layout)  # (N, D)

    # the state that chose each token is that of the token before it: at first the prompt's last
    places = torch.arange(int(real.sum()), len(row))
    own = tokens.new_zeros(R, T).masked_scatter(said, places)  # (R, T)
    last = mask.sum(1).cumsum(0) - 1  # (B,)
    before = torch.cat([last[prompt_of][:, None], own[:, :-1]], 1)  # (R, T)

    # what it chose, and what it would feed
    chosen, chose = tokens[sampled].to(device), before[sampled].to(device)  # (S,)
    logprob, entropy = decisions(model, h[chose], chosen, temperature)  # (S,)
    predicts = before[tokens == model.config.latent_id].to(device)  # (N_z,)
    predicted = model.to_latent(h[predicts]).to(wide)  # (N_z, D)
    at, zero = places_of(sampled).to(device), z.new_zeros(R * T)
    return Replay(
        logprobs=zero.index_copy(0, at, logprob).view(R, T),
        entropy=zero.index_copy(0, at, entropy).view(R, T),
        predicted=predicted,
        latents=z,
    )


def decisions(model, h, chosen, temperature):
    """States (S, D), what was chosen there (S,) -> log-probability and entropy of each (S,)."""

    def choice(h, chosen, weight=None):
        logp = (model.logits(h, weight) / temperature).log_softmax(-1)  # (S', V)
        log_stop = logp[:, model.config.latent_end_id]
        log_go = log_continue(log_stop)
        continued = chosen == model.config.latent_id
        in_span = continued | (chosen == model.config.latent_end_id)
        picked = torch.where(continued, log_go, logp.gather(1, chosen[:, None])[:, 0])
        with torch.no_grad():
            of_event = -log_stop.exp() * log_stop - log_go.exp() * log_go
            entropy = torch.where(in_span, of_event, -(logp.exp() * logp).sum(-1))
        return picked, entropy

    if len(h) <= LOGITS_AT_ONCE:
        return choice(h, chosen)
    # the logits (S', V) of one piece at a time, computed again in the backward pass: those of 16k
    # tokens together are 10 GB a copy
    pieces = zip(h.split(LOGITS_AT_ONCE), chosen.split(LOGITS_AT_ONCE))
    # in fp32, because the gradients of the pieces are added in the weight's dtype, and --shard
    # gathers it in bf16
    weight = model.lm_head.weight
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    results = [checkpoint(choice, *piece, weight, use_reentrant=False) for piece in pieces]
    logprob, entropy = zip(*results)
    return torch.cat(logprob), torch.cat(entropy)


def token_logprobs(model, batch, rollout, temperature, prompt_of=None):
    """Log-probabilities (R, T) of what a rollout chose, as `generate` recorded them.

    The one function for the policy, the reference model and the tests; arguments as `replay`.
    Source: sec. 3.3, the policy of Eq. (7).
    """
    return replay(model, batch, rollout, temperature, prompt_of).logprobs
