"""The method once more, as slowly and plainly as it can be written: a second definition.

    weights, steps = sft(config)                        # supervised fine-tuning, Eq. (1)-(3)
    weights, steps, more = la_dapo(config, numbers)     # reinforcement learning, Eq. (4)-(7)
    lines = probe(config, numbers)                      # visual gain, then select(lines, config)
    lines = evaluate(config)                            # greedy answers, also with other latents

Everything runs on the stock Qwen3-VL of transformers, one row or one rollout at a time: no batch,
no padding, no cache, no merged rollouts. Words are looped over one by one. Nothing is imported from
the project except how a record becomes a row and a row becomes token ids and patches. The tests in
test_twin_*.py run the real scripts and require the same weights, log lines and files.

A config is that of the real script; only its fields are read.

Axis letters: T tokens, N latents, D hidden, V vocabulary.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from common.formats import Frame, read_rows
from data import encode

# ------------------------------------------------------------------------------ model and one row


def load(folder, latent_head=""):
    """A model folder -> the stock model, its tokenizer. The vision tower is frozen.

    `model.latent_head` maps a state to the latent it predicts: it is the identity in the paper, and
    a linear map that starts as the identity with latent_head="linear".
    """
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    D = model.config.text_config.hidden_size
    model.latent_head = torch.nn.Identity()
    if latent_head or getattr(model.config, "latent_head", None):
        model.latent_head = torch.nn.Linear(D, D)
        torch.nn.init.eye_(model.latent_head.weight)
        torch.nn.init.zeros_(model.latent_head.bias)
    saved = load_file(os.path.join(folder, "model.safetensors"))
    for name, p in model.latent_head.named_parameters():
        p.data = p.data.to(model.dtype)
        if f"latent_head.{name}" in saved:
            p.data.copy_(saved[f"latent_head.{name}"])
    for p in model.model.visual.parameters():
        p.requires_grad = False
    return model, AutoTokenizer.from_pretrained(folder)


def pixels(pictures):
    """Pictures of `data.encode`, (patches of bytes, grid) each -> patches in [-1, 1], grids."""
    patches = torch.cat([torch.from_numpy(patch) for patch, _ in pictures])  # (patches, 1536)
    grids = torch.stack([torch.from_numpy(grid) for _, grid in pictures])  # (pictures, 3)
    return (patches.float() - 127.5) / 127.5, grids


def look(model, pictures):
    """What pictures look like to the model: vision tower and merger -> (N, D). Sec. 3.2."""
    if not pictures:
        return torch.zeros(0, model.config.text_config.hidden_size)
    patches, grids = pixels(pictures)
    with torch.no_grad():
        return model.model.visual(patches.to(model.dtype), grid_thw=grids).pooler_output


def states(model, sample, ids, latents):
    """The last hidden state after each of the tokens `ids` (a list of T) -> (T, D).

    sample: the `data.encode` of the row, for its pictures. latents (N, D): what is fed in place of
    the embeddings of the N `<|latent|>` tokens, in order.
    """
    c, media = model.config, {}
    for pictures, patch_name, grid_name in (
        (sample["images"], "pixel_values", "image_grid_thw"),
        (sample["videos"], "pixel_values_videos", "video_grid_thw"),
    ):
        if pictures:
            media[patch_name], media[grid_name] = pixels(pictures)
    if media:  # which tokens stand for a picture (1) or a video (2)
        kinds = [1 if t == c.image_token_id else 2 if t == c.video_token_id else 0 for t in ids]
        media["mm_token_type_ids"] = torch.tensor([kinds])  # (1, T)
    places = [t for t, token in enumerate(ids) if token == c.latent_id]
    assert len(places) == len(latents), "one latent for each <|latent|>"

    def feed_latents(module, arguments, embedded):  # (1, T, D)
        rows = list(embedded[0])
        for place, z in zip(places, latents):
            rows[place] = z
        return torch.stack(rows)[None]

    hook = model.get_input_embeddings().register_forward_hook(feed_latents)
    try:
        out = model.model(input_ids=torch.tensor([ids]), use_cache=False, **media)
    finally:
        hook.remove()
    return out.last_hidden_state[0]  # (T, D)


# ----------------------------------------------------------------------------- optimizer, one step


def adamw(model, lr, betas, weight_decay):
    """AdamW over what is trained. Only matrices decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=weight_decay)]
    groups.append(dict(params=vectors, weight_decay=0.0))
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


def clip_and_step(optimizer, lr, clip):
    """Scale the gradient down to the norm `clip` if it is longer; step -> the norm it had."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for p in trained:
        if p.grad is None:  # AdamW passes over a weight without a gradient, but not over zeros
            p.grad = torch.zeros_like(p)
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in trained))
    if norm > clip:
        for p in trained:
            p.grad *= clip / (norm + 1e-6)  # torch's own guard
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


def weights_of(model):
    """{name: a copy of the weight}, as they stand in a saved folder."""
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


# ------------------------------------------------------------------------------------------- SFT


def sft(config):
    """The whole of sft.py -> the weights after the last step, a dict of figures for each step."""
    rows = read_rows(config.data, config.media_root or None)
    model, tokenizer = load(config.model, config.latent_head)
    optimizer = adamw(model, config.lr, (0.9, config.beta2), config.weight_decay)

    # every epoch is another permutation of the rows; a step takes the next `global_batch` of them
    total = config.steps * config.global_batch or round(len(rows) * config.epochs)
    steps = math.ceil(total / config.global_batch)
    generator, order = torch.Generator().manual_seed(config.seed), []
    while len(order) < total:
        order += torch.randperm(len(rows), generator=generator).tolist()
    samples = [encode(row, tokenizer, config, True, config.spans) for row in rows]

    # nmse: Eq. (3) is divided by the variance of the targets of the first 64 samples
    variance = 1.0
    if config.latent_loss == "nmse" and config.spans:
        e = torch.cat([look(model, samples[i]["futures"]) for i in order[:total][:64]])  # (N, D)
        variance = sum(((z - e.mean(0)) ** 2).mean().item() for z in e) / len(e)

    figures = []
    for step in range(steps):
        chosen = order[:total][step * config.global_batch : (step + 1) * config.global_batch]

        # how many members the sets T of Eq. (2) and S of Eq. (3) have, over the whole step
        n_latent = sum(samples[i]["ids"].count(model.config.latent_id) for i in chosen)
        n_words = sum(label != -100 for i in chosen for label in samples[i]["labels"][1:])
        n_words += n_latent * config.stop_term

        ce = latent = 0.0
        for i in chosen:
            words, distance = sft_sums(model, samples[i], variance, config.stop_term)
            (words / n_words + config.lam * distance / max(1, n_latent)).backward()  # Eq. (1)
            ce += words.item() / n_words
            latent += distance.item() / max(1, n_latent)

        # linear warm-up, then cosine to 0
        warm = max(1, round(config.warmup * steps))
        if step < warm:
            lr = config.lr * (step + 1) / warm
        else:
            lr = config.lr * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2
        norm = clip_and_step(optimizer, lr, config.clip)
        loss = ce + config.lam * latent
        figures.append(dict(loss=loss, ce=ce, latent=latent, lr=lr, grad_norm=norm))
    return weights_of(model), figures


def sft_sums(model, sample, variance, stop_term):
    """One row -> the sums of Eq. (2) over its words and of Eq. (3) over its latents."""
    c, ids, labels = model.config, sample["ids"], sample["labels"]
    e = look(model, sample["futures"])  # (N, D), fed and aimed at
    h = states(model, sample, ids, e)  # (T, D)
    words, distance, k = torch.zeros(()), torch.zeros(()), 0
    for t in range(1, len(ids)):
        logp = model.lm_head(h[t - 1]).log_softmax(-1)  # (V,) the state at t - 1 predicts t
        if labels[t] != -100:
            words = words - logp[labels[t]]  # Eq. (2)
        if ids[t] == c.latent_id:
            distance = distance + ((model.latent_head(h[t - 1]) - e[k]) ** 2).mean() / variance
            k += 1
            if stop_term:  # "do not stop yet" is one more word to learn
                words = words - torch.log1p(-logp[c.latent_end_id].exp())
    return words, distance


# ---------------------------------------------------------------------------------------- a rollout


@dataclass
class Rollout:
    """One response to one prompt: T tokens, the N latents that were fed among them."""

    tokens: list
    chosen: list  # T bools: False where the longest span forced a stop
    logp: list  # T log-probabilities of what was chosen; 0 where forced
    latents: torch.Tensor  # (N, D)
    ended: bool = False  # by the end of turn, not by max_new_tokens

    def spans(self, c):
        """The latents of each span, (n, D) each, also of empty ones. c: the model's config."""
        lengths = []
        for token in self.tokens:
            if token == c.latent_start_id:
                lengths.append(0)
            if token == c.latent_id:
                lengths[-1] += 1
        return list(self.latents.split(lengths)) if lengths else []


@torch.no_grad()
def respond(model, sample, config, numbers=None, fed=None, never=()):
    """A response to one prompt -> Rollout. Sec. 3.1.

    numbers: one uniform number in [0, 1) for each token; it decides which word, or whether a span
    stops. None: greedily, the likeliest word each time; then a span ends where its end is the
    likeliest of all words.
    fed: what spans are fed in place of the model's own states, see `fed_instead`.
    never: more words that cannot be said.
    config: max_new_tokens, max_latents; where numbers are given, temperature and top_p.
    """
    c, out = model.config, Rollout([], [], [], torch.zeros(0, model.lm_head.in_features))
    banned = [c.latent_id, c.latent_end_id, c.image_token_id, c.video_token_id, *never]
    temperature = 1.0 if numbers is None else config.temperature
    number, span = -1, None  # of the newest span; latents of the open span, None = among words
    while len(out.tokens) < config.max_new_tokens and not out.ended:
        h = states(model, sample, sample["ids"] + out.tokens, out.latents)[-1]  # (D,)
        logp = (model.lm_head(h) / temperature).log_softmax(-1)  # (V,)
        u, chosen = None if numbers is None else float(numbers[len(out.tokens)]), True
        if span is None:
            token = choose_word(logp, u, config, banned)
            value = logp[token]
            out.ended = token == model.generation_config.eos_token_id
            if token == c.latent_start_id:
                number, span = number + 1, 0
        else:
            chosen = span < config.max_latents
            p_stop = logp[c.latent_end_id].exp()
            stops = int(logp.argmax()) == c.latent_end_id if u is None else p_stop > u
            if stops or not chosen:
                token, value, span = c.latent_end_id, p_stop.log(), None
            else:  # z_1 = h_p, z_{k+1} = h_{p+k}
                z = model.latent_head(h)
                if fed is not None:
                    frame = fed[min(number, len(fed) - 1)]
                    z = frame[min(span, len(frame) - 1)]
                token, value, span = c.latent_id, torch.log1p(-p_stop), span + 1
                out.latents = torch.cat([out.latents, z[None]])
        out.tokens.append(token)
        out.chosen.append(chosen)
        out.logp.append(value.item() if chosen else 0.0)
    return out


def choose_word(logp, u, config, banned):
    """Log-probabilities (V,) -> a word that is not banned: the likeliest (u is None), or the one
    at place u in [0, 1) of the summed probabilities of the nucleus, in the vocabulary's order.
    Top-p; the order is ours.
    """
    p = logp.double().exp()
    p[banned] = 0
    if u is None:
        return int(p.argmax())
    nucleus, mass = set(), 0.0
    for word in p.argsort(descending=True).tolist():
        if mass >= config.top_p * p.sum():
            break
        nucleus.add(word)
        mass += p[word].item()
    below = 0.0
    for word in sorted(nucleus):
        below += p[word].item()
        if below > u * mass:
            return word
    return max(nucleus)


def replay(model, sample, rollout, latents, temperature):
    """Feed a rollout again with `latents` (N, D) in its spans -> what it chose, with a gradient.

    A list of (log-probability, entropy of the choice there was), None where nothing was chosen; and
    the latents that the model would feed (N, D).
    """
    c, ids = model.config, sample["ids"] + rollout.tokens
    h = states(model, sample, ids, latents)  # (T, D)
    choices, predicted, in_span = [], [torch.zeros(0, h.shape[1])], False
    for t, token in enumerate(rollout.tokens):
        before = h[len(sample["ids"]) + t - 1]  # (D,) the state that chose the token
        logp = (model.lm_head(before) / temperature).log_softmax(-1)  # (V,)
        options = logp
        if in_span:  # stop or continue
            go_on = torch.log1p(-logp[c.latent_end_id].exp())
            options = torch.stack([logp[c.latent_end_id], go_on])  # (2,)
        if token == c.latent_id:
            value = go_on
            predicted.append(model.latent_head(before)[None])
        else:
            value = logp[token]
        entropy = -(options.exp() * options).sum()
        choices.append((value, entropy) if rollout.chosen[t] else None)
        in_span = token in (c.latent_start_id, c.latent_id)
    return choices, torch.cat(predicted)


def latents_anew(model, sample, rollout):
    """The latents of a rollout's spans as the weights make them now -> (N, D), with a gradient."""
    latents = torch.zeros(0, model.lm_head.in_features)
    for t, token in enumerate(rollout.tokens):
        if token == model.config.latent_id:
            h = states(model, sample, sample["ids"] + rollout.tokens[:t], latents)[-1]  # (D,)
            latents = torch.cat([latents, model.latent_head(h)[None]])
    return latents


# ------------------------------------------------------------------------------------------ rewards


def answer_of(text):
    """The first closed <answer>, or None."""
    found = re.search("<answer>(.*?)</answer>", text, re.S)
    return found.group(1).strip() if found else None


def plain(text):
    return " ".join(text.lower().split()).strip(" .,:;!?\"'()")


def option_of(answer, options):
    """The number of the option that an answer names by its text or its letter, or None."""
    for i, option in enumerate(options):
        letter = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i]
        named = re.fullmatch(rf"\(?{letter}(?:[).:](.*))?\s*", answer or "", re.I | re.S)
        if plain(answer or "") == plain(option):
            return i
        if named and plain(named.group(1) or "") in ("", plain(option)):
            return i
    return None


def is_right(text, row):
    """Whether the rule calls a response right. Sec. 3.3."""
    answer = answer_of(text)
    if row.options:
        return option_of(answer, row.options) == option_of(row.answer, row.options)
    return answer is not None and plain(answer) == plain(row.answer)


def repetition(text):
    """The share of repeated word 4-grams. Repeated blocks and lines also count, but need a hundred
    words or line breaks: tests/test_rewards.py has them.
    """
    words = re.sub(r"</?(reason|answer)>|<\|[a-z_]+\|>", " ", text).split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


SYMBOLS = {
    "<reason>": "r", "</reason>": "R", "<answer>": "a", "</answer>": "A",
    "<|latent_start|>": "S", "<|latent|>": "z", "<|latent_end|>": "E",
}  # fmt: skip


def has_format(text):
    """Whether a response is `R (L R)+ A` or `(L R)+ A`, and nothing else. Sec. 3.3."""
    text = re.sub(r"(\s|<\|im_end\|>|<\|endoftext\|>)*$", "", text)
    pieces = re.split("(" + "|".join(map(re.escape, SYMBOLS)) + ")", text)
    shape = "".join(SYMBOLS.get(piece, "t" if piece.strip() else "") for piece in pieces)
    return re.fullmatch("(rt?R)?(Sz+Ert?R)+at?A", shape) is not None


def likeness(a, b):
    """Eq. (4): latents (N, D) and (M, D) -> s."""
    T = min(len(a), len(b))
    return sum((1 + F.cosine_similarity(a[t], b[t], dim=0).item()) / 2 for t in range(T)) / T


def contrastive(i, latents, correct, tau):
    """Eq. (5) for rollout i of a group; latents: None where a rollout has no part in it.

    With the official code's edge cases.
    """
    members = [j for j, z in enumerate(latents) if z is not None and len(z)]
    if i not in members or len(latents) < 2:
        return 0.0
    s = {j: likeness(latents[i], latents[j]) for j in members}
    positives = [s[j] for j in members if correct[j] and j != i]
    negatives = [s[j] for j in members if not correct[j]]  # i itself too, if it is wrong
    if positives:
        plus = max(positives)
    else:
        plus = 1.0 if correct[i] else 0.0  # a lone correct rollout is its own neighbour
    if not negatives:
        return plus / tau
    return math.exp(plus / tau) / (math.exp(plus / tau) + sum(math.exp(x / tau) for x in negatives))


def diversity(spans):
    """Eq. (6): the spans of one rollout, (n, D) each -> at most 0."""
    b = [span.mean(0) for span in spans if len(span)]
    if len(b) < 2:
        return 0.0
    cosines = [F.cosine_similarity(b[m], b[m + 1], dim=0).item() for m in range(len(b) - 1)]
    return -sum(x * x for x in cosines) / len(cosines)


@dataclass
class Group:
    """A prompt, its G rollouts, and what they are worth. Lists of G; None = unjudged."""

    sample: dict
    rollouts: list
    correct: list
    parts: dict  # total, accuracy, format, repetition, contrastive, diversity
    A: list = ()  # advantages

    @property
    def judged(self):
        """The rollouts that count, by their number."""
        return [i for i, c in enumerate(self.correct) if c is not None]


def score(sample, rollouts, texts, judge, config, c):
    """Eq. (7) for the rollouts of one prompt -> Group.

    judge([(question, gold, answer)]) -> [True, False or None], asked where the rule says no and
    another word could matter; None = there is no judge.
    """
    row, correct, accuracy = sample["row"], [], []
    repeats = [repetition(text) for text in texts]
    for text, share in zip(texts, repeats):
        answer, right = answer_of(text), is_right(text, row)
        another_option = row.options and option_of(answer, row.options) is not None
        if judge and answer and not right and share <= 0.5 and not another_option:
            (right,) = judge([(row.question, row.answer, answer)])
        correct.append(None if right is None else right and share <= 0.5)
        accuracy.append(None if right is None else -1.0 if share > 0.5 else float(right))

    G = range(len(rollouts))
    form = [float(has_format(text)) for text in texts]
    known = [None if correct[i] is None else rollouts[i].latents for i in G]
    ctr = [contrastive(i, known, correct, config.tau) for i in G]
    div = [diversity(rollout.spans(c)) for rollout in rollouts]
    total = [
        None if a is None else 0.9 * a + 0.1 * f + config.lambda_c * s + config.lambda_d * d
        for a, f, s, d in zip(accuracy, form, ctr, div)
    ]
    parts = dict(accuracy=accuracy, format=form, repetition=repeats, contrastive=ctr, diversity=div)
    return Group(sample, rollouts, correct, dict(parts, total=total))


def verdict_on(group, config):
    """The filter: a group is learnt from if low < mean accuracy < high. Sec. 3.3."""
    known = [group.correct[i] for i in group.judged]
    if len(known) < 2:
        return "unjudged_groups"
    mean = sum(known) / len(known)
    return "too_hard" if mean <= config.low else "too_easy" if mean >= config.high else "kept"


def set_advantages(group):
    """A_i = (R_i - mean) / (std + 1e-6) over the judged rollouts, unbiased std. Sec. 3.3."""
    R = [group.parts["total"][i] for i in group.judged]
    mean = sum(R) / len(R)
    std = math.sqrt(sum((r - mean) ** 2 for r in R) / (len(R) - 1))
    group.A = [None if r is None else (r - mean) / (std + 1e-6) for r in group.parts["total"]]


# ------------------------------------------------------------------------------------------ LA-DAPO


def permutation(n, seed, epoch):
    """The order of n prompts in an epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def la_dapo(config, numbers, judge=None):
    """The whole of la_dapo.py -> the weights after the last step; two dicts for each step: what its
    log line says, and what a test wants to know besides.

    numbers[seed * 1_000_003 + k]: the uniform numbers (rows, T) that batch k of the prompts was
    sampled with. judge: see `score`.
    """
    rows = read_rows(config.data, config.media_root or None)
    model, tokenizer = load(config.model)
    reference, _ = load(config.model)
    optimizer = adamw(model, config.lr, (0.9, config.beta2), 0.0)
    steps = config.steps or max(1, int(len(rows) * config.epochs) // config.groups)
    a_try = math.ceil((config.prompts or config.groups) / config.rollout_batch)
    a_try *= config.rollout_batch  # prompts
    begin, figures, more = 0, [], []  # begin: the place of the prompt that comes next
    for step in range(steps):
        groups, kept, end = [], [], begin

        # roll out until enough groups are kept, in the order of the prompts
        for _ in range(config.max_tries):
            for place in range(end, end + a_try):
                epoch, i = divmod(place, len(rows))
                row = rows[permutation(len(rows), config.seed, epoch)[i]]
                sample = encode(row, tokenizer, config, False)
                k, j = divmod(place, config.rollout_batch)
                u = numbers[config.seed * 1_000_003 + k]  # (rows, T)
                own = u[j * config.group_size : (j + 1) * config.group_size]  # (G, T)
                rollouts = [respond(model, sample, config, x) for x in own]
                texts = [tokenizer.decode(r.tokens) for r in rollouts]
                groups.append(score(sample, rollouts, texts, judge, config, model.config))
            end += a_try
            dropped = ("unjudged_groups", "too_hard", "too_easy")
            dropped = dropped if config.filter else dropped[:1]
            worth = [group for group in groups if verdict_on(group, config) not in dropped]
            kept = worth[: config.groups]
            if len(kept) == config.groups:
                break
        for group in kept:
            set_advantages(group)

        # passes over the kept groups, an update a minibatch
        lr, sums, norms = learning_rate(step, steps, config), Counter(), []
        for _ in range(config.inner_epochs):
            for m in range(config.minibatches):
                if part := kept[m :: config.minibatches]:
                    loss_of(model, reference, part, config, sums).backward()
                    norms.append(clip_and_step(optimizer, lr, config.clip))

        line = dict(figures_of(groups, config, model.config), lr=lr, surplus=len(worth) - len(kept))
        line.update(summary(sums, len(norms)), groups=len(kept), grad_norm=norms[-1])
        line.update(prompts=[begin, end])
        figures.append(line)
        more.append(dict(kept=kept, norms=norms, **{k: sums[k] for k in ("high", "low", "dual")}))
        begin = end
    return weights_of(model), figures, more


def learning_rate(step, steps, config):
    """Linear warm-up, then linear to final_lr * lr at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    way = (step - config.warmup_steps) / max(1, steps - config.warmup_steps - 1)
    return config.lr * (1 - way) + config.lr * config.final_lr * way


def loss_of(model, reference, groups, config, sums):
    """L over some groups; adds figures to `sums`. Sec. 3.3.

        L = 1/n sum_t max(-r_t A, -clip(r_t, 1 - eps_low, 1 + eps_high) A) + kl * KL

    where A < 0 at most -dual_clip A; n: the chosen tokens of these groups.
    """
    n = sum(sum(group.rollouts[i].chosen) for group in groups for i in group.judged)
    loss = torch.zeros(())
    for group in groups:
        for i in group.judged:
            surrogate, kl = rollout_loss(model, reference, group, i, config, sums, n)
            loss = loss + surrogate / n + config.kl * kl / n
    return loss


def rollout_loss(model, reference, group, i, config, sums, n):
    """Rollout i of a group -> the sums over its tokens of both terms of L.

    The KL holds the latents constant. What they are in the first term, `adjoint_terms` says. 0: the
    recorded ones, as constants. -1: those that the weights make now, with their gradient; before
    the first update their values are the recorded ones. k > 0: the first k terms of that gradient.
    """
    sample, rollout, A = group.sample, group.rollouts[i], group.A[i]
    recorded, T = rollout.latents.clone().requires_grad_(), config.temperature
    with torch.no_grad():
        ref, _ = replay(reference, sample, rollout, recorded, T)
    held, predicted = replay(model, sample, rollout, recorded, T)
    new = held
    if config.adjoint_terms < 0:
        new, _ = replay(model, sample, rollout, latents_anew(model, sample, rollout), T)

    surrogate, kl = torch.zeros(()), torch.zeros(())
    for t in range(len(rollout.tokens)):
        if not rollout.chosen[t]:
            continue
        # with one update a step the policy is still the one that sampled
        one_update = config.minibatches * config.inner_epochs == 1
        old = new[t][0].item() if one_update else rollout.logp[t]
        r = (new[t][0] - old).exp()
        loss = torch.maximum(-r * A, -r.clamp(1 - config.eps_low, 1 + config.eps_high) * A)
        if A < 0:
            loss = loss.clamp(max=-config.dual_clip * A)
        surrogate = surrogate + loss
        d = (ref[t][0] - held[t][0]).clamp(-20, 20)
        k3 = (d.exp() - d - 1).clamp(-10, 10)
        kl = kl + k3

        high = A > 0 and r.item() > 1 + config.eps_high
        low = A < 0 and r.item() < 1 - config.eps_low
        dual = A < 0 and r.item() > config.dual_clip
        sums.update(
            high=high,
            low=low,
            dual=dual,
            loss=loss.item() / n,
            kl=k3.item() / n,
            ratio=r.item() / n,
            clip_fraction=(high or low) / n,
            entropy=held[t][1].item() / n,
            replay_ms=(new[t][0].item() - rollout.logp[t]) ** 2 / n,
        )
    if config.adjoint_terms > 0 and len(recorded):
        surrogate = surrogate + through_latents(
            surrogate, predicted, recorded, config.adjoint_terms
        )
    return surrogate, kl


def through_latents(loss, predicted, latents, terms):
    """Value 0, and the gradient (g + gJ + gJJ + ..., `terms` of them) d predicted / d weights.

    g = d loss / d latents, J = d predicted / d latents, written out as a matrix.
    """
    (g,) = torch.autograd.grad(loss, latents, retain_graph=True)
    rows = [torch.autograd.grad(x, latents, retain_graph=True)[0] for x in predicted.flatten()]
    J = torch.stack([row.flatten() for row in rows])  # (N D, N D)
    adjoint = total = g.flatten()
    for _ in range(terms - 1):
        adjoint = adjoint @ J
        total = total + adjoint
    value = (total * predicted.flatten()).sum()
    return value - value.detach()


def figures_of(groups, config, c):
    """What the log says of a step's rollouts."""
    rollouts = [r for group in groups for r in group.rollouts]
    out, n = Counter(verdict_on(group, config) for group in groups), len(rollouts)
    out.update(rollouts=n, unjudged=sum(g.correct.count(None) for g in groups))
    for name in groups[0].parts:
        values = [v for group in groups for v in group.parts[name] if v is not None]
        out[name] = mean = sum(values) / len(values)
        out[f"{name}_std"] = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    spans = [span for r in rollouts for span in r.spans(c)]
    out["length"] = sum(len(r.tokens) for r in rollouts) / n
    out["spans"], out["latents"] = len(spans) / n, sum(map(len, spans)) / n
    out["forced_stops"] = sum(r.chosen.count(False) for r in rollouts) / max(1, len(spans))
    out["cut_off"] = sum(not r.ended for r in rollouts) / n
    return dict(out)


def summary(sums, updates):
    """What the log says of a step's updates: means over them."""
    names = ("loss", "kl", "ratio", "clip_fraction", "entropy")
    out = {name: sums[name] / updates for name in names}
    out["replay_rms"] = math.sqrt(sums["replay_ms"] / updates)
    return dict(out, updates=updates)


# ----------------------------------------------------------------------------------------- curation


def with_future(row):
    """Condition (v): the future frames behind the last picture of the prompt."""
    futures = [part for part in row.response if isinstance(part, Frame)]
    pictures = [i for i, part in enumerate(row.prompt) if not isinstance(part, str)]
    at = pictures[-1] + 1 if pictures else 0
    later = [" Later frames of the same clip: ", *futures]
    return dataclasses.replace(row, prompt=row.prompt[:at] + later + row.prompt[at:])


def final_answer(text):
    """The first closed <answer>; without one, the last line, if the response came to its end."""
    if (answer := answer_of(text)) is not None or not text.endswith("<|im_end|>"):
        return answer or ""
    lines = [line.strip() for line in re.split(r"<[/|]?[a-z_]+\|?>|\n", text)]
    return ([""] + [line for line in lines if line])[-1]


def probe(config, numbers):
    """How many of n rollouts are right without the future, p_t, and with it, p_v. Sec. 3.2.

    numbers: {seed: uniform numbers (rows, T)}. `batch` neighbours of the pool share a seed under
    each condition, made of the config's, the condition's name and their ids: n rows for each.
    """
    rows = read_rows(config.data, config.media_root or None)
    model, tokenizer = load(config.model)
    lines = []
    for start in range(0, len(rows), config.batch):
        block = rows[start : start + config.batch]
        new = {row.id: dict(id=row.id, no_answer=0) for row in block}
        for name in ("t", "v"):
            text = json.dumps([config.seed, name, *(row.id for row in block)])
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
            u = iter(numbers[seed])
            for row in block:
                asked = with_future(row) if name == "v" else row
                sample = encode(asked, tokenizer, config, False)
                own = [next(u) for _ in range(config.rollouts)]  # n of (T,)
                rollouts = [respond(model, sample, config, x) for x in own]
                answers = [final_answer(tokenizer.decode(r.tokens)) for r in rollouts]
                right = sum(is_right(f"<answer>{a}</answer>", row) for a in answers)
                new[row.id][f"p_{name}"] = right
                new[row.id]["no_answer"] += answers.count("")
        lines += new.values()
    return lines


def select(lines, config):
    """Keep p_t <= 6 and p_v - p_t >= 2 (of 8) -> ids by falling gain, the first k. Sec. 3.2.

    Ties, ours: the lower p_t, then the smaller sha256 of the id.
    """
    max_p_t = config.max_p_t if config.max_p_t >= 0 else math.floor(config.rollouts * 6 / 8)
    min_gain = config.min_gain if config.min_gain >= 0 else math.ceil(config.rollouts * 2 / 8)
    ranked = []
    for line in lines:
        gain = line["p_v"] - line["p_t"]
        if line["p_t"] <= max_p_t and gain >= min_gain:
            tie = hashlib.sha256(line["id"].encode()).hexdigest()
            ranked.append((-gain, line["p_t"], tie, line["id"]))
    ids = [id for *_, id in sorted(ranked)]
    return ids[: config.k] if config.k else ids


# --------------------------------------------------------------------------------------- evaluation


def clip_of(row):
    """What a question is about: its first clip or picture."""
    media = [part for part in row.prompt if not isinstance(part, str)]
    return media[0].source if isinstance(media[0], Frame) else media[0].path


def donor_of(row, rows):
    """Whose futures `shuffled` feeds: the next row of the same group about another clip, else the
    next row about another clip.
    """
    at = rows.index(row)
    others = [other for other in rows[at + 1 :] + rows[:at] if clip_of(other) != clip_of(row)]
    return ([other for other in others if other.group == row.group] + others)[0]


def futures_of(model, row, tokenizer, config):
    """The true embeddings of a row's future frames: a list of (n, D), a frame each."""
    pictures = encode(row, tokenizer, config)["futures"]
    return [look(model, [picture]) for picture in pictures]


def fed_instead(model, row, rows, tokenizer, config):
    """What the spans of a row are fed with --latents: a list of (n, D), a frame each. None: its own
    states. Span m, place j is fed vector j of frame m; the last of each is repeated.
    """
    D = model.lm_head.in_features
    if config.latents == "zero":
        return [torch.zeros(1, D)]
    if config.latents == "pause":  # the token's own embedding
        return [model.get_input_embeddings().weight[model.config.latent_id].detach()[None]]
    if config.latents == "true":
        return futures_of(model, row, tokenizer, config)
    if config.latents == "shuffled":
        return futures_of(model, donor_of(row, rows), tokenizer, config)
    if config.latents == "noise":  # of the mean and deviation of all true embeddings
        e = torch.cat([z for r in rows[:64] for z in futures_of(model, r, tokenizer, config)])
        seed = hashlib.sha256(f"{config.seed} {row.id}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        noise = torch.randn(8, config.max_latents, D, generator=generator)  # 8 spans
        return list(e.mean(0) + e.std(0, unbiased=False) * noise)
    return None


def evaluate(config):
    """The whole of evaluate.py for rows with options -> a dict for each row. Sec. 4."""
    rows = read_rows(config.data, config.media_root or None)
    model, tokenizer = load(config.model)
    c, lines = model.config, []
    for row in rows:
        sample = encode(row, tokenizer, config, False)
        fed = fed_instead(model, row, rows, tokenizer, config)
        never = [c.latent_start_id] if config.latents == "none" else []
        tokens = respond(model, sample, config, fed=fed, never=never).tokens
        text = tokenizer.decode(tokens)
        line = dict(id=row.id, right=is_right(text, row), tokens=len(tokens))
        line.update(spans=tokens.count(c.latent_start_id), latents=tokens.count(c.latent_id))
        lines.append(dict(line, response=re.sub(r"(<\|latent\|>\s*)+", "<|latent|>", text)))
    return lines
