"""Decoding that switches between words and latents (paper sec. 3.1).

Each row of the batch is in one of three states, and every step gives it one token:

    state      chosen by the policy                             fed back next
    words      a word, `<|latent_start|>` or the end of turn    that token's embedding
    in a span  stop = `<|latent_end|>`, continue = `<|latent|>`   stop: the token; continue: the last hidden state
    done       nothing                                          padding

`<|latent|>` and `<|latent_end|>` cannot be produced among words. At `max_latents` a span is stopped by force. The
record (tokens, latents, which of them were chosen, their log-probabilities) is exactly what was fed to the model and
what is in its cache, so that training can replay it.

    rollout = generate(model, batch, max_new_tokens=2048)            # greedy
    rollout = generate(model, batch, max_new_tokens=2048, temperature=0.9, top_p=0.99, n=8)
    token_logprobs(model, batch, rollout, temperature=0.9)           # = rollout.logprobs, with a gradient

Where this differs from the paper: 1. in a span the event is binary, so greedy decoding stops when p(LE) > 1/2, and top-p
does not apply. 2. Placeholder tokens of images and videos are never produced: a replay could not tell them from input.
Where this differs from the official code: 3. A forced stop is in the cache and in the record alike. 4. Inside a span only
stop or continue can happen, never another word. 5. A replay feeds the recorded latents; official feeds the `<|latent|>`
token.

How it is fast: vision and prompt run once a prompt, not once a sample; the key-value cache is allocated once; the host
looks at the device only every CHUNK tokens, and then drops finished rows; on CUDA a step can be captured as one graph.

Axis letters: B prompts, R rows = B * n (row i * n + k is sample k of prompt i), P prompt tokens, T new tokens,
S chosen tokens, N latents, D hidden, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.cache_utils import StaticLayer

from model import log_continue, log_density

CHUNK = 16  # steps between two looks at which rows are done


LOGITS = 1024  # tokens of a replay whose logits are in memory at a time


@dataclass
class Rollout:
    """What was generated, as it was fed. Rows as in the file's docstring; tensors are on the model's device."""

    tokens: torch.Tensor  # (R, T) generated tokens only, padded after the end of turn
    sampled: torch.Tensor  # (R, T) bool: the policy chose it; False where forced or padding
    latents: (
        list  # R tensors (N_i, D), one row a `<|latent|>` token, after the head and noise if any
    )
    logprobs: (
        torch.Tensor
    )  # (R, T) of what was chosen under the full softmax at the temperature; 0 where not chosen
    finish: list  # R of "eos" | "length"
    lengths: torch.Tensor  # (R,) generated tokens incl. the end of turn
    latent_sigma: float = (
        0.0  # noise on the latents; where > 0, a latent's log-density is part of its logprob
    )


def choose(logits, in_span, count, u, *, ids, banned, temperature=0.0, top_p=1.0, max_latents=8):
    """One decision a row -> (token (R,), log-probability (R,), sampled (R,) bool). Source: sec. 3.1; ours in a span.

    logits (R, V); in_span (R,) bool; count (R,) latents of the open span so far; u (R,) uniform in [0, 1), the one
    random number a row's decision takes, be it a word or stop; ids =
    (latent_start, latent, latent_end); banned (V,) = -inf for what cannot be produced among words, else 0.
    Log-probabilities are those of the full softmax, whatever top_p and banned leave out.
    """
    _, latent, latent_end = ids
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # (R, V)

    words = logp + banned
    if temperature == 0:
        word = words.argmax(-1)
    else:  # inverse of the cumulated probabilities; most probable first where the tail is to be cut
        p, order = words.softmax(-1), None
        if top_p < 1:
            p, order = p.sort(-1, descending=True)
            p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # the smallest set that reaches top_p
        cdf = p.cumsum(-1)
        k = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)  # (R, 1)
        last = (cdf < cdf[:, -1:]).sum(
            -1, keepdim=True
        )  # rounding must not lead past the last one that is possible
        k = torch.minimum(k, last)
        word = (k if order is None else order.gather(1, k))[:, 0]

    log_stop = logp[:, latent_end]
    log_go = log_continue(log_stop)
    forced = count >= max_latents
    stop = forced | (log_stop.exp() > (0.5 if temperature == 0 else u))

    token = torch.where(in_span, torch.where(stop, latent_end, latent), word)
    chosen = torch.where(
        in_span, torch.where(stop, log_stop, log_go), logp.gather(1, word[:, None])[:, 0]
    )
    sampled = ~(in_span & forced)
    return token, chosen.masked_fill(~sampled, 0), sampled


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
    latent_sigma=0.0,
    generator=None,
    replace=None,
    banned=(),
    stream=None,
    share=False,
    cuda_graph=False,
):
    """Continue each prompt n times -> Rollout. Source: sec. 3.1.

    batch: dict of HF-named tensors, left-padded (`data.model_inputs`). temperature 0 = greedy; log-probabilities are
    then those of the untempered softmax. max_latents: longest span; paper: 2 * L_max = 8. eos_token_id: int or list,
    default the model's. latent_sigma > 0 adds Gaussian noise to each latent, and the latent's log-density (see
    `log_density`) to the log-probability of its step. generator: where random numbers come
    from. replace (R, K, D): feed these instead of a row's first K latents, counted over its spans; later ones are the
    model's own (ablations). banned: token ids that are never produced among words. stream: called with each new piece
    of the tokens, (live rows, up to CHUNK), as it is known. share: decode what the samples of a prompt have in common
    once, until they part; pays where they part late (a sure policy, short answers), looks at the device every step.
    cuda_graph: on CUDA, capture one step and replay it, without Python or kernel launches in between. A greedy
    result does not depend on what else is in the batch (up to rounding); a sampled one does not depend on when other rows
    finish. Raises ValueError for right padding or bad arguments.
    """
    batch = {
        k: v for k, v in batch.items() if k != "mm_token_type_ids"
    }  # HF's processors return it: recomputed
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask  # (B, P)
    if not bool(mask[:, -1].all()):
        raise ValueError(
            "generate needs left-padded prompts: the last column of attention_mask must be 1"
        )
    if max_new_tokens < 1 or n < 1 or max_latents < 0 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"bad arguments: {max_new_tokens=} {n=} {max_latents=} {temperature=} {top_p=}"
        )
    if share and (latent_sigma or replace is not None or cuda_graph):
        raise ValueError(
            "share: noise or replaced latents make equal samples differ, a captured step cannot change size"
        )
    if eos_token_id is None:
        eos_token_id = model.generation_config.eos_token_id
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
    device, (B, P) = ids.device, ids.shape
    training, text = model.training, model.model.language_model
    attention = text.config._attn_implementation
    model.eval()
    try:
        # the prompt, once a prompt
        h, prompt = model.hidden(**{**batch, "attention_mask": mask}, use_cache=True)
        text.set_attn_implementation(
            "sdpa"
        )  # a step needs a mask over a half-filled cache: sdpa takes one
        return _decode(
            model,
            text,
            h[:, -1].repeat_interleave(n, 0),
            _static_cache(prompt, 1 if share else n, P + max_new_tokens),
            torch.cat(
                [mask.bool(), mask.new_zeros(B, max_new_tokens, dtype=torch.bool)], 1
            ).repeat_interleave(n, 0),
            (mask.sum(-1, keepdim=True) + model.model.rope_deltas).repeat_interleave(
                n, 0
            ),  # (R, 1) next position
            max_new_tokens=max_new_tokens,
            eos=torch.tensor(eos, device=device, dtype=torch.long),
            latent_sigma=latent_sigma,
            generator=generator,
            replace=replace,
            never=list(banned),
            stream=stream,
            graph=cuda_graph and device.type == "cuda",
            shared=torch.arange(B, device=device).repeat_interleave(n) if share else None,
            choice=dict(temperature=temperature, top_p=top_p, max_latents=max_latents),
        )
    finally:
        text.set_attn_implementation(attention)
        model.train(training)


class _Slots(StaticLayer):
    """A fixed-size layer of one dtype: under autocast keys come in fp32, as their norm's weight is, and values in bf16."""

    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.to(self.dtype), values.to(self.dtype), *args, **kwargs)


def _static_cache(prompt, n, length):
    """The prompt's cache, repeated n times, at the front of a fixed-size one. Layer by layer: the old one is freed."""
    keys = prompt.layers[0].keys
    kind = keys.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else keys.dtype
    cache = Cache(layers=[_Slots(max_cache_len=length) for _ in prompt.layers])
    for new, old in zip(cache.layers, prompt.layers):
        for name in ("keys", "values"):
            setattr(
                old, name, getattr(old, name).to(dtype).repeat_interleave(n, 0)
            )  # (R, heads, P, head width)
        new.lazy_initialization(old.keys, old.values)
        new.keys[:, :, : old.keys.shape[2]] = old.keys
        new.values[:, :, : old.keys.shape[2]] = old.values
        new.cumulative_length.fill_(old.keys.shape[2])
        old.keys = old.values = None
    return cache


def _decode(
    model,
    text,
    h,
    cache,
    seen,
    position,
    *,
    max_new_tokens,
    eos,
    latent_sigma,
    generator,
    replace,
    never,
    stream,
    graph,
    shared,
    choice,
):
    """The loop. h (R, D) state after the prompt; seen (R, L) bool cache slots to look at; position (R, 1).

    shared (R,): which row of the cache a row of the state reads, while samples are still equal; None: each its own.
    """
    R, device, T = len(h), h.device, max_new_tokens
    config = model.config
    ids = config.latent_start_id, config.latent_id, config.latent_end_id
    banned = torch.zeros(model.lm_head.out_features, device=device)
    banned[
        [
            config.latent_id,
            config.latent_end_id,
            config.image_token_id,
            config.video_token_id,
            *never,
        ]
    ] = -torch.inf
    pad = eos[0] if len(eos) else torch.zeros((), dtype=torch.long, device=device)
    slot = torch.full(
        (1,), seen.shape[1] - T, device=device
    )  # where the next token goes in the cache
    # one entry a live row; all are updated in place, so that a captured step keeps working on them
    S = dict(
        h=h,
        seen=seen[:, None, None],
        position=position,
        row=torch.arange(R, device=device),
        in_span=torch.zeros(R, dtype=torch.bool, device=device),
        done=torch.zeros(R, dtype=torch.bool, device=device),
        count=torch.zeros(R, dtype=torch.long, device=device),
        fed=torch.zeros(R, dtype=torch.long, device=device),
        u=torch.zeros(R, device=device),
        noise=torch.zeros(R, h.shape[1] if latent_sigma else 0, device=device),
        token=torch.zeros(R, dtype=torch.long, device=device),
        logprob=torch.zeros(R, device=device),
        sampled=torch.zeros(R, dtype=torch.bool, device=device),
        z=model.to_latent(h).clone(),
    )

    def split_up(token):
        """Rows that shared a row of the cache and now differ get one each -> the first row (U,) of each that is left."""
        nonlocal shared
        _, now = torch.unique(
            shared * model.lm_head.out_features + token, return_inverse=True
        )  # sorted by `shared`
        first = torch.full((int(now.max()) + 1,), len(now), device=device)
        first.scatter_reduce_(0, now, torch.arange(len(now), device=device), "amin")
        if len(first) > len(cache.layers[0].keys):
            _select(cache, shared[first])
        shared = now
        return first

    def step():
        token, logprob, sampled = choose(
            model.lm_head(S["h"]),
            S["in_span"],
            S["count"],
            S["u"],
            ids=ids,
            banned=banned,
            **choice,
        )
        S["token"].copy_(torch.where(S["done"], pad, token))
        S["logprob"].copy_(logprob.masked_fill(S["done"], 0))
        S["sampled"].copy_(sampled & ~S["done"])
        is_latent = (S["token"] == config.latent_id) & S["in_span"]
        z = model.to_latent(S["h"])
        if latent_sigma:
            mean, z = z, z + latent_sigma * S["noise"].to(z.dtype)
            S["logprob"].add_(log_density(z, mean, latent_sigma).masked_fill(~is_latent, 0))
        if replace is not None:
            k = S["fed"].clamp(max=replace.shape[1] - 1)
            z = torch.where(
                (S["fed"] < replace.shape[1])[:, None], replace[S["row"], k].to(z.dtype), z
            )
        S["z"].copy_(z)
        S["done"].logical_or_(torch.isin(S["token"], eos) & ~S["in_span"])
        S["fed"].add_(is_latent)
        S["count"].copy_(torch.where(is_latent, S["count"] + 1, 0))
        S["in_span"].copy_(is_latent | ((S["token"] == config.latent_start_id) & ~S["done"]))
        # feed it
        x = model.get_input_embeddings()(S["token"])
        x = torch.where(is_latent[:, None], S["z"].to(x.dtype), x)[:, None]  # (R, 1, D)
        S["seen"].index_fill_(3, slot, True)
        some = slice(None) if shared is None else split_up(S["token"])
        out = text(
            inputs_embeds=x[some],
            attention_mask=S["seen"][some],
            position_ids=S["position"][some].expand(3, -1, -1),
            past_key_values=cache,
            use_cache=True,
        )
        S["h"].copy_(out.last_hidden_state[slice(None) if shared is None else shared, 0])
        S["position"].add_(1)
        slot.add_(1)

    tokens, sampled = pad.expand(R, T).clone(), torch.zeros(R, T, dtype=torch.bool, device=device)
    logprobs, latents = torch.zeros(R, T, device=device), [[] for _ in range(R)]
    run, warm = None, False
    for start in range(0, T, CHUNK):
        steps = min(CHUNK, T - start)
        # drawn for all rows, live or not: a row's random numbers do not depend on when others finish
        u = torch.rand(
            R, steps, generator=generator, device=generator.device if generator else device
        ).to(device)
        noise = (
            torch.randn(
                R,
                steps,
                h.shape[1],
                generator=generator,
                device=u.device if generator is None else generator.device,
            ).to(device)
            if latent_sigma
            else None
        )
        record = {name: [] for name in ("token", "logprob", "sampled", "z")}
        for j in range(steps):
            S["u"].copy_(u[S["row"], j])
            if latent_sigma:
                S["noise"].copy_(noise[S["row"], j])
            if graph and run is None and warm:
                run = _capture(step)
            (run or step)()
            warm = True  # one plain step at each number of rows, before it is captured
            for name, steps_so_far in record.items():
                steps_so_far.append(S[name].clone())
        token, logprob, chosen, z = (
            torch.stack(x, 1) for x in record.values()
        )  # (live, steps), z (live, steps, D)
        if stream:
            stream(token)
        row = S["row"]
        tokens[row, start : start + steps], logprobs[row, start : start + steps] = token, logprob
        sampled[row, start : start + steps] = chosen
        is_latent = token == config.latent_id
        for r, part in zip(row.tolist(), z[is_latent].split(is_latent.sum(1).tolist())):
            latents[r].append(part)
        live = (~S["done"]).nonzero()[:, 0]
        if not len(live):
            break
        if len(live) <= len(row) // 2:  # finished rows leave
            S = {name: value[live] for name, value in S.items()}
            if shared is None:
                _select(cache, live)
            else:
                left, shared = torch.unique(shared[live], return_inverse=True)
                _select(cache, left)
            run, warm = None, False
    ended = torch.isin(tokens, eos) & sampled
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, T)
    return Rollout(
        tokens,
        sampled,
        [torch.cat(x) for x in latents],
        logprobs,
        ["eos" if e else "length" for e in ended.any(1).tolist()],
        lengths,
        latent_sigma,
    )


@dataclass
class Replay:
    """What a forward over recorded rollouts gives; as many rows as the Rollout."""

    logprobs: torch.Tensor  # (R, T) of what was chosen, 0 where nothing was
    entropy: torch.Tensor  # (R, T) of the choice there was, no gradient
    predicted: torch.Tensor  # (N, D) what the model would feed
    latents: torch.Tensor  # (N, D) what was fed: a leaf


def replay(model, batch, rollout, temperature, prompt_of=None, recorded=True):
    """Feed rollouts again, latents included -> Replay, differentiable in weights and latents. Source: sec. 3.3.

    batch: left-padded prompts (`data.model_inputs`), encoded once each. prompt_of (R,): each row's prompt, default R / B
    rows of each in turn. recorded=False feeds the `<|latent|>` token's embedding instead (official).
    """
    ids, mask = rollout.tokens, batch["attention_mask"]  # (R, T), (B, P)
    R, T = ids.shape
    if prompt_of is None:
        prompt_of = torch.arange(R, device=ids.device) // (R // len(mask))
    h, cache = model.hidden(**batch, use_cache=True)  # (B, P, D)
    start = (mask.sum(-1, keepdim=True) + model.model.rope_deltas)[
        prompt_of
    ]  # (R, 1) first new position
    cache.batch_select_indices(
        prompt_of
    )  # a copy inside the graph: gradients of a group add up in its prompt
    wide = torch.promote_types(h.dtype, torch.float32)
    is_latent = ids == model.config.latent_id  # (R, T)
    z = torch.cat(rollout.latents) if recorded else model.get_input_embeddings()(ids[is_latent])
    z = z.detach().to(wide).requires_grad_() if recorded else z  # (N, D)
    count = torch.arange(T, device=ids.device)
    new, _ = model.hidden(
        ids,
        torch.cat([mask[prompt_of], (count < rollout.lengths[:, None]).to(mask.dtype)], 1),
        latents=z,
        past_key_values=cache,
        position_ids=(start + count).expand(3, -1, -1),
        use_cache=True,
    )
    h = torch.cat(
        [h[prompt_of, -1:], new[:, :-1]], 1
    )  # (R, T, D): the state that chooses each token

    def choice(h, chosen):  # (S', D), (S',) -> log-probability and entropy (S',)
        logp = (model.lm_head(h).to(wide) / temperature).log_softmax(-1)  # (S', V)
        log_stop = logp[:, model.config.latent_end_id]
        continued = chosen == model.config.latent_id
        in_span = continued | (chosen == model.config.latent_end_id)
        picked = torch.where(
            continued, log_continue(log_stop), logp.gather(1, chosen[:, None])[:, 0]
        )
        with torch.no_grad():
            stop, go = log_stop, log_continue(log_stop)
            entropy = torch.where(
                in_span, -stop.exp() * stop - go.exp() * go, -(logp.exp() * logp).sum(-1)
            )
        return picked, entropy

    # a piece's (S', V) is made again in the backward: all at once would be 10 GB a copy at 16k tokens of Qwen's vocabulary
    parts = [
        checkpoint(choice, *part, use_reentrant=False)
        for part in zip(h[rollout.sampled].split(LOGITS), ids[rollout.sampled].split(LOGITS))
    ]
    picked, entropy = (torch.cat(part) for part in zip(*parts))  # (S,)
    predicted = model.to_latent(h[is_latent]).to(wide)  # (N, D)
    logprobs = torch.zeros_like(ids, dtype=wide).masked_scatter(rollout.sampled, picked)  # (R, T)
    if rollout.latent_sigma and recorded:
        density = log_density(z.detach(), predicted, rollout.latent_sigma)  # (N,)
        logprobs = logprobs + torch.zeros_like(logprobs).masked_scatter(is_latent, density)
    return Replay(
        logprobs, torch.zeros_like(logprobs).masked_scatter(rollout.sampled, entropy), predicted, z
    )


def token_logprobs(model, batch, rollout, temperature, prompt_of=None, recorded=True):
    """Log-probabilities (R, T) of what a rollout chose, as `generate` recorded them. Source: sec. 3.3, Eq. (7)'s policy.

    The one function for the policy, the reference model and the tests; arguments as `replay`.
    """
    return replay(model, batch, rollout, temperature, prompt_of, recorded).logprobs


def take(rollout, rows):
    """Some rows of a Rollout, cut to the longest of them. Source: ours."""
    rows = torch.as_tensor(rows, device=rollout.tokens.device)
    T = int(rollout.lengths[rows].max())
    return Rollout(
        rollout.tokens[rows, :T],
        rollout.sampled[rows, :T],
        [rollout.latents[r] for r in rows.tolist()],
        rollout.logprobs[rows, :T],
        [rollout.finish[r] for r in rows.tolist()],
        rollout.lengths[rows],
        rollout.latent_sigma,
    )


def join(rollouts):
    """Rollouts one below the other, padded to the longest. Source: ours."""

    def stack(name):
        return torch.nn.utils.rnn.pad_sequence(
            [row for r in rollouts for row in getattr(r, name)], True
        )

    return Rollout(
        stack("tokens"),
        stack("sampled"),
        [z for r in rollouts for z in r.latents],
        stack("logprobs"),
        [f for r in rollouts for f in r.finish],
        torch.cat([r.lengths for r in rollouts]),
        rollouts[0].latent_sigma,
    )


def _select(cache, rows):
    """Keep these rows of a cache, in this order; a row may be kept more than once."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[rows], layer.values[rows]


def _capture(step):
    """Record one step as a CUDA graph -> a function that replays it. Capturing runs nothing, so no state changes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
