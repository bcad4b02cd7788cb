"""VideoLatent-like: latents that are learnt from questions and answers, without a future frame.

A fork of sft.py. A row is a prompt, one span of N latents, the answer: no chain, no picture of what
comes. What is fed to the span is always the model's own.

    z_k = g(h_{p+k-1})                                       as decoding feeds it, always N times
    g(h) = h + W2 silu(W1 RMSNorm(h)), W2 = 0 at first                         (a)  injection head
    z^0_k = embedding of `<|latent|>`,  z^i = g(h(z^{i-1})),  i = 1..N              (b)  N passes
    L = CE(answer) + alpha L_align + beta L_div                                     (c)

    A  L_align = 1/N sum_k (1 - cos(z_k, sg z^T_k))         z^T: latents of the same weights where
                                                            the question is followed by its answer
    B  L_align = 1/N sum_k (1 - cos(z_k, sg sum_j a_j v_j)),  a = softmax_j(cos(sg h_a, v_j) / tau)
    C  L_align = - log softmax_b(cos(zbar_i, c_b) / tau) at b = i         zbar, c: means of a row
       L_div = 2 / (N (N - 1)) sum_{i<j} max(0, cos(z_i, z_j))

v_j: the embeddings of what a row shows; c_i: their mean; h_a: the mean of the states that predict
the answer; sg: no gradient. A, the control, asks for what the answer alone tells. B and C tie the
latents to what is seen.

After pass i the first i latents are what decoding feeds, so N passes are exact, and so is their
gradient, which runs through all of them. The prompt is read once; a pass is over what follows it.

    python -m variants.video_latent --model DIR --data train.json --align B
    python -m variants.video_latent evaluate --model RUN --data test.json   # --latents zero, pause

The length of a span is the model's (`n_latents` in its config.json): the model neither stops before
it nor goes on after it.

A model may well leave its latents unread (arXiv 2605.18445). So a few times in a training the log
has the answer's loss with other latents: zeros, another row's.

Source: the idea of VideoLatent (Hu et al. 2026, arXiv 2606.22870): an injection module, latent
alignment and latent diversity, from triplets of video, question, answer. Its equations are not
public. Every equation here is ours, and what these losses give says nothing of that paper's.

Where this may differ from what one expects:
 1. All latents are fed at each pass, not one after another: the same numbers and gradients.
 2. C compares with the rows of its micro-batch. Rows about one clip count as different.
 3. What is logged beside the losses is of one micro-batch of the first rank.
 4. `--pause`, the control: the embedding of `<|latent|>` is fed, as in variants/pause_tokens.py.

Axis letters: B rows, L tokens of a row, T of all prompts, S that follow, N latents of a row,
J visual tokens of all, D hidden.
"""

import dataclasses
import functools
import math
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import evaluate
import latent_decode
import sft
from common.cli import run_script
from common.formats import Blank
from common.machine import Machine, set_sync, whole
from common.report import draw_curves
from common.run import Run, rows_of
from common.shared_prefix import Layout
from common.shared_prefix import _in_dtype as in_dtype
from data import Samples, at_least, loader, model_inputs
from model import FutureL1


@dataclasses.dataclass
class Config(sft.Config):
    latent_head: str = ""  # "" = (a), unless the model has a head | linear  # ours
    n_latents: int = 4  # N, of each span  # ours
    align: str = "B"  # A (answer-aware self-teacher) | B (evidence) | C (own context)  # ours
    alpha: float = 0.1  # weight of L_align  # ours
    beta: float = 0.01  # weight of L_div  # ours
    tau: float = 0.1  # of B's and C's softmax  # ours
    pause: bool = False  # feed the embedding of `<|latent|>`: the control  # ours
    probes: int = 20  # times that other latents are tried in a training  # ours
    lam: float = 1.0  # alpha and beta weigh the latents' part of the loss

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "n_latents", "probes")
        if self.align not in ("A", "B", "C"):
            raise ValueError(f"align is {self.align!r}, expected A, B or C")
        plain = self.lam == 1 and self.latent_loss == "mse" and self.spans
        if not plain or self.stop_term or self.eval_data or self.shard or self.lora_rank:
            raise ValueError(
                "spans have one length and no target: lam 1, latent_loss mse (weights: alpha and "
                "beta), no --no-spans, --stop_term, --eval_data, --shard, --lora_rank"
            )
        if self.pause and (self.alpha or self.beta):
            raise ValueError("pause tokens have no loss of their own: alpha 0, beta 0")

    @property
    def label(self):
        return "pause, answers only" if self.pause else "VideoLatent-like"


# --------------------------------------------------------------------------------------- injection


class Injection(torch.nn.Module):
    """Eq. (a): states (..., D) -> h + W2 silu(W1 RMSNorm(h)), at first h: W2 = 0. Source: ours."""

    def __init__(self, D):
        super().__init__()
        self.w1 = torch.nn.Linear(D, D, bias=False)
        self.w2 = torch.nn.Linear(D, D, bias=False)
        torch.nn.init.zeros_(self.w2.weight)

    def forward(self, h):
        normal = F.rms_norm(h, h.shape[-1:])  # its gain would be part of W1
        return h + self.w2(F.silu(self.w1(normal)))


class Model(FutureL1):
    """FutureL1 with Eq. (a), if its config says so, and spans of one length: `load(cls=Model)`."""

    one_length = False  # while decoding: a span does not stop by itself

    def __init__(self, config):
        super().__init__(config)
        if getattr(config, "injected", False):
            inject(self)

    def logits(self, h):
        """As FutureL1's. With `one_length`, to stop is never likely: only the longest span does."""
        logits = super().logits(h)  # (..., V)
        if self.one_length:
            logits[..., self.config.latent_end_id] = -torch.inf
        return logits


def inject(model):
    """Give a model Eq. (a) as its latent head."""
    head = Injection(model.config.text_config.hidden_size)
    model.latent_head = head.to(model.lm_head.weight)  # its device and dtype
    model.config.injected = True


def prepare(model, config):
    """Give a model Eq. (a) unless it has a head, and its spans' length, which its folder keeps."""
    if model.latent_head is None:
        inject(model)
    model.config.decoded_by = "variants/video_latent.py"
    model.config.n_latents = config.n_latents


# ----------------------------------------------------------------------------------------- decoding


def generate(model, batch, **how):
    """`latent_decode.generate` by a Model whose spans have `n_latents` latents -> Rollout. Ours.

    The stop of a span is forced, and to go on has probability 1.
    """
    model.one_length = True
    try:
        return latent_decode.generate(model, batch, max_latents=model.config.n_latents, **how)
    finally:
        model.one_length = False


def evaluate_folder(config):
    """evaluate.py with a Model whose spans have one length -> {group: scores}."""
    model, tokenizer = Machine(config.bf16).load(config.model, cls=Model)
    model.one_length = True
    config = dataclasses.replace(config, max_latents=model.config.n_latents)
    return evaluate.evaluate(config, model, tokenizer)


# ----------------------------------------------------------------------------------------- N passes


class Prompts:
    """Attention over prompts in one row without padding. Their keys and values are kept, with their
    gradient, for `Following`. lengths: tokens of each prompt (B,).
    """

    def __init__(self, lengths, device):
        self.layout, self.kept = Layout([(0, [n]) for n in lengths], device), {}
        length = torch.tensor(lengths, device=device)[:, None]  # (B, 1)
        place = torch.arange(max(lengths), device=device)
        self.real = place < length  # (B, P)
        self.index = length.cumsum(0) - length + torch.minimum(place, length - 1)  # (B, P)

    def attend(self, layer, query, key, value, scaling):
        """query (1, H, N, d), key and value (1, H_kv, N, d) -> (1, N, H, d)."""
        self.kept[layer] = [x[0][:, self.index].transpose(0, 1) for x in (key, value)]
        return self.layout.attend(layer, query, key, value, scaling)


class Following:
    """Attention of what follows kept Prompts, T tokens a row: a token sees its prompt and its row's
    tokens so far. It can be fed again and again.
    """

    def __init__(self, prompts, T):
        self.kept = prompts.kept  # {layer: keys and values (B, H_kv, P, d)}
        of_prompt = prompts.real[:, None].expand(-1, T, -1)  # (B, T, P)
        own = torch.ones(T, T, dtype=torch.bool, device=of_prompt.device).tril()
        mask = torch.cat([of_prompt, own.expand(len(of_prompt), -1, -1)], 2)  # (B, T, P + T)
        self.mask = mask[:, None]

    def attend(self, layer, query, key, value, scaling):
        """query (B, H, T, d), key and value (B, H_kv, T, d) -> (B, T, H, d)."""
        both = [torch.cat(pair, 2) for pair in zip(self.kept[layer], (key, value))]
        q, k, v = (in_dtype(x) for x in (query, *both))  # keys and values (B, H_kv, P + T, d)
        shared = dict(attn_mask=self.mask, scale=scaling, enable_gqa=True)
        return F.scaled_dot_product_attention(q, k, v, **shared).transpose(1, 2)


class Sequences:
    """A right-padded batch of rows with a span each, to be fed other latents again and again. Ours.

    The prompts, with their pictures, are read once. What follows them is read at each pass.
    """

    def __init__(self, model, input_ids, attention_mask, **media):
        # what comes before the first latent, `<|latent_start|>` its last
        self.model, text = model, model.model.language_model
        real, is_latent = attention_mask.bool(), input_ids == model.config.latent_id  # (B, L)
        self.before = real & (is_latent.cumsum(1) == 0)  # (B, L)
        self.after, start = real & ~self.before, self.before.sum(1)[:, None]  # (B, L), (B, 1)
        grids = media.get("image_grid_thw"), media.get("video_grid_thw")
        position_ids, _ = model.positions(input_ids, real.long(), *grids)  # (3, B, L)
        self.prompts = Prompts(start[:, 0].tolist(), real.device)
        embedded = self.x, self.visual, _ = model.embed(input_ids[self.before][None], **media)
        places = position_ids[:, self.before]
        self.h, _ = model.states(embedded, places, self.prompts)  # (T, D)
        self.starts = self.h[start[:, 0].cumsum(0) - 1]  # (B, D): they predict the first latents

        # what follows, padded on the right again
        S, N = int(self.after.sum(1).max()), int(is_latent.sum(1).max())
        column = (start + torch.arange(S, device=real.device)).clamp(max=real.shape[1] - 1)
        self.real = torch.arange(S, device=real.device) < self.after.sum(1)[:, None]  # (B, S)
        words = model.get_input_embeddings()(input_ids.gather(1, column))  # (B, S, D)
        self.pause, self.words = words.split([N, S - N], 1)  # `<|latent|>`'s embedding N times
        self.places = position_ids.gather(2, column.expand(3, -1, -1))  # (3, B, S)
        self.read = functools.partial(text, use_cache=False)

    def follow(self, x):
        """States of what follows the prompts, so far as it is fed: x (B, S', D) -> (B, S', D)."""
        if not x.shape[1]:
            return x
        places, prefix = self.places[..., : x.shape[1]], Following(self.prompts, x.shape[1])
        return self.read(inputs_embeds=x, position_ids=places, prefix=prefix).last_hidden_state

    def unroll(self, passes):
        """Eq. (b) -> z (B, N, D), with the gradient through all passes."""
        z = self.pause
        for _ in range(passes):
            h = torch.cat([self.starts[:, None], self.follow(z)], 1)  # (B, 1 + N, D)
            z = self.model.to_latent(h[:, : z.shape[1]]).to(z.dtype)  # predicted one place before
        return z

    def states(self, z):
        """Last hidden states (B, L, D), 0 at padding, fed the latents z (B, N, D)."""
        h = self.follow(torch.cat([z, self.words], 1))  # (B, S, D)
        padded = h.new_zeros(*self.before.shape, h.shape[-1])  # (B, L, D)
        padded = padded.masked_scatter(self.before[..., None], self.h)
        return padded.masked_scatter(self.after[..., None], h[self.real])

    def evidence(self):
        """What rows show -> embeddings v (J, D) without gradient, whose they are (B, J) bool.

        Raises ValueError for a row that shows nothing.
        """
        own = torch.zeros(len(self.before), 0, dtype=torch.bool)
        if self.visual is not None:
            row = self.before.nonzero()[:, 0][self.visual[0]]  # (J,)
            own = row == torch.arange(len(own), device=row.device)[:, None]
        if not own.any(1).all():
            raise ValueError("align B and C need rows with pictures or clips")
        return self.x[self.visual].detach(), own


# ------------------------------------------------------------------------------------------- losses


def cosines(a, b):
    """Of each vector of a (..., I, D) with each of b (..., J, D) -> (..., I, J)."""
    return F.cosine_similarity(a.unsqueeze(-2), b.unsqueeze(-3), dim=-1)  # under autocast in fp32


def mean_distance(z, target):
    """1/N sum_k (1 - cos(z_k, sg target_k)), z and target (B, N, D) -> (B,). Source: ours, A, B."""
    return (1 - F.cosine_similarity(z, target.detach(), dim=-1)).mean(-1)


def read_out(h_a, v, own, tau):
    """What of a row's pictures the answer is nearest to: sum_j a_j v_j. Source: ours, B.

    h_a (B, D), v (J, D), own (B, J) -> (B, D).
    """
    near = cosines(h_a, v) / tau  # (B, J)
    a = near.masked_fill(~own, -torch.inf).softmax(-1)
    return a @ v


def contrast(zbar, c, tau):
    """Whose clip are these latents about? (B, D), (B, D) -> cross-entropy (B,). Source: ours, C."""
    near = cosines(zbar, c.detach()) / tau  # (B, B)
    return F.cross_entropy(near, torch.arange(len(c), device=c.device), reduction="none")


def pairwise_cosine(z):
    """Latents (B, N, D) -> cosines of all pairs of a row's (B, N (N - 1) / 2)."""
    i, j = torch.triu_indices(z.shape[1], z.shape[1], 1, device=z.device)
    return cosines(z, z)[:, i, j]


def diversity_loss(z):
    """Mean over pairs of max(0, cos), z (B, N, D) -> (B,); 0 for a single one. Source: ours."""
    cosine = pairwise_cosine(z)
    return cosine.clamp(min=0).sum(-1) / max(1, cosine.shape[1])


def with_answer(batch, c):
    """The prompts with their answers shown, and their spans: ids, mask (B, L'). Source: ours, A.

    The answer's block, in its tags, is put at the end of the user's turn. c: the model's config.
    """
    rows = []
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        start, end = (int((ids == i).nonzero()[0]) for i in (c.latent_start_id, c.latent_end_id))
        *answer, end_of_turn = ids[end + 1 :][labels[end + 1 :] != -100].tolist()
        turn = int((ids[:start] == end_of_turn).nonzero()[-1])
        rows.append(torch.cat([ids[:turn], ids.new_tensor(answer), ids[turn : end + 1]]))
    mask = pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True), mask


# --------------------------------------------------------------------------------------------- loop


def without_chain(rows, n):
    """Rows -> the same with one span of n latents in the place of their chains."""
    return [dataclasses.replace(row, response=[Blank(n)]) for row in rows]


class Words:
    """What a batch's rows say, and how well states (B, L, D) tell it: Eq. (2)."""

    def __init__(self, model, batch):
        labels, c = batch["labels"][:, 1:], model.config
        self.model, self.where = model, labels != -100  # (B, L - 1): the state at t - 1 predicts t
        self.words, self.row = labels[self.where], self.where.nonzero()[:, 0]  # (n_text,)
        self.of_answer = (self.words != c.latent_start_id) & (self.words != c.latent_end_id)

    def losses(self, h):
        """-> cross-entropy of each word (n_text,)."""
        logits = self.model.logits(h[:, :-1][self.where])  # (n_text, V)
        return F.cross_entropy(logits, self.words, reduction="none")

    def answer_states(self, h):
        """The mean of the states that each row's answer is predicted from (B, D)."""
        row, h_before = self.row[self.of_answer], h[:, :-1][self.where][self.of_answer]
        count = torch.bincount(row, minlength=len(h))[:, None]  # (B, 1)
        return h.new_zeros(len(h), h.shape[-1]).index_add(0, row, h_before) / count


def alignment(model, batch, sequences, words, h, z, config):
    """L_align of each row (B,), in the way that config.align names."""
    if config.align == "A":
        ids, mask = with_answer(batch, model.config)
        inputs = dict(model_inputs(batch), input_ids=ids, attention_mask=mask)
        with torch.no_grad():
            taught = Sequences(model, **inputs).unroll(config.n_latents)  # (B, N, D)
        return mean_distance(z, taught)
    v, own = sequences.evidence()
    if config.align == "B":
        target = read_out(words.answer_states(h).detach(), v, own, config.tau)  # (B, D)
        return mean_distance(z, target[:, None].expand_as(z))
    c = own.to(v.dtype) @ v / own.sum(1, keepdim=True)  # (B, D)
    return contrast(z.mean(1), c, config.tau)


@torch.no_grad()
def exchanged(sequences, words, z):
    """The answer's loss with z (B, N, D), with zeros, with another row's -> figures."""
    fed, figures = dict(answer=z, answer_zero=0 * z, answer_swapped=z.roll(1, 0)), {}
    for name, latents in fed.items():
        losses = words.losses(sequences.states(latents))  # (n_text,)
        figures[name] = losses[words.of_answer].mean().item()
    return figures


def batch_sums(model, batch, probe, config):
    """A micro-batch -> Eq. (c)'s sums, and figures for the log.

    The sums are that of the words' cross-entropies, and over latents of alpha L_align + beta L_div.
    probe: whether other latents are tried.
    """
    words, sequences = Words(model, batch), Sequences(model, **model_inputs(batch))
    z = sequences.unroll(0 if config.pause else config.n_latents)  # (B, N, D)
    h = sequences.states(z)  # (B, L, D)
    losses = words.losses(h)  # (n_text,)
    unused = model.to_latent(z[:, :0]).sum()  # DDP wants the head in every backward
    if not batch["rows"]:  # one row without a span stands in
        return losses.sum(), unused, {}

    align = div = losses.new_zeros(len(z))
    if config.alpha:
        align = alignment(model, batch, sequences, words, h, z, config)  # (B,)
    if config.beta:
        div = diversity_loss(z)  # (B,)
    latents = config.n_latents * (config.alpha * align + config.beta * div).sum()

    cosine = pairwise_cosine(z.detach()).mean().nan_to_num().item()  # nan: N = 1
    figures = dict(cosine=cosine, align=align.mean().item(), div=div.mean().item())
    if probe:
        figures.update(exchanged(sequences, words, z))
    return losses.sum(), latents + unused, figures


def probe_due(step, steps, probes):
    """Whether other latents are tried at a step: `probes` times in a training, first in step 0."""
    return step * probes // steps != (step - 1) * probes // steps


def train(config):
    """SFT on rows without their chains -> path of the last checkpoint. The loop of sft.py, without
    targets: Eq. (c) in the place of Eq. (1).

    Raises SystemExit on a folder in use or bad input.
    """
    # the run's folder, the rows in their order, the model with its head
    machine = Machine(config.bf16)
    rows = without_chain(rows_of(config), config.n_latents)
    total = config.steps * config.global_batch or round(len(rows) * config.epochs)
    if total < 1:
        raise SystemExit(f"nothing to train on: {len(rows)} rows, {config.epochs} epochs")
    order, steps = sft.sample_order(len(rows), total, config.seed), -(-total // config.global_batch)
    run = Run(config, rows, machine, config.label)
    torch.manual_seed(config.seed)
    model, tokenizer = run.load(cls=Model, latent_head=config.latent_head or None)
    prepare(model, config)
    model.model.visual.requires_grad_(not config.freeze_vision)

    # the loader is created before the random state is restored: it draws a number when it starts
    samples = Samples(rows, tokenizer, config, train=True)
    sizes = config.global_batch, config.micro_batch, machine.rank, machine.world
    plan = list(sft.micro_batches(order, run.first, steps, *sizes))
    micro_steps = -(-config.global_batch // (config.micro_batch * machine.world))
    batches = iter(loader(samples, plan, config.workers, pad_id=tokenizer.pad_token_id or 0))

    # the model over the ranks; AdamW with weight decay on matrices only
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
            sft.print_row(micro[0], tokenizer, model.config.latent_id)
        counts = [sft.count(batch, model.config.latent_id, config) for batch in micro]
        counts = [sum(some) for some in zip(*counts)]
        n_text, n_latent, n_tokens = (int(n) for n in machine.sum(counts))
        if step == 0 and not n_text:
            why = f"could be used, e.g. {skipped[0][1]}" if skipped else "has a word to learn"
            raise SystemExit(f"no sample of step 0 {why}")

        # forward and backward, a micro-batch at a time; the first one may try other latents
        sums, figures = torch.zeros(2, dtype=torch.float64), {}
        for batch in micro if n_text else []:
            set_sync(sums_of, last=batch is micro[-1])
            probe = batch is micro[0] and probe_due(step, steps, config.probes)
            with machine.autocast():
                on_device = sft.on_device(batch, machine)
                ce, latent, noted = sums_of(batch_sums, on_device, probe, config)
            loss = ce / n_text + latent / max(n_latent, 1)  # Eq. (c): lam is 1
            (loss * machine.world).backward()  # DDP averages the ranks' gradients
            sums += torch.stack([ce, latent]).detach().double().cpu()
            figures.update(noted)

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
        line = dict(step=step, lr=lr, tokens=n_tokens, latents=n_latent, **means, **figures)
        line.update(grad_norm=norm, update_skipped=update_skipped, skipped=skipped)
        line.update(seconds=round(time.time() - began, 4))
        if update_skipped:
            why = "no sample could be used" if norm is None else "gradient is not finite"
            run.say(f"step {step}: {why}, no update")
        run.log(line, "ce", "latent")
        if run.due(step + 1, steps):
            run.save(step + 1, model, tokenizer, optimizer)
            if machine.master:
                draw_curves(run.path, os.path.join(config.out, "loss.png"))
    return run.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["evaluate"]:
        run_script(evaluate_folder, evaluate.Config, sys.argv[2:])
    else:
        run_script(train, Config)
