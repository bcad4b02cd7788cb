"""VideoLatent-like: latents that are learnt from questions and answers, without a future frame.

A fork of sft.py. A row is a prompt, one span of N latents, the answer: no chain, no picture of what
comes. The span is always fed the model's own latents.

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
gradient, which runs through all of them. A pass is a forward over whole rows, the simplest way: a
step costs N + 1 forwards. Keeping the keys and values of the prompts would save most of that.

    python -m variants.video_latent --model DIR --data train.json --align B
    python -m variants.video_latent evaluate --model RUN --data test.json   # --latents zero, pause

The length of a span is the model's (`n_latents` in its config.json): the model neither stops before
it nor goes on after it.

A model may well leave its latents unread (arXiv 2605.18445). So a few times in a training the log
has the answer's loss with other latents: zeros, another row's.

Source: the idea of VideoLatent (Hu et al. 2026, arXiv 2606.22870): an injection module, latent
alignment and latent diversity, from triplets of video, question, answer. Its equations are not
public. Every equation here is ours, and what these losses give says nothing of that paper's.

Where this may differ from what you expect:
 1. All latents are fed at each pass, not one after another: the same numbers and gradients.
 2. C compares with the rows of its micro-batch. Rows about one clip count as different.
 3. What is logged beside the losses is of one micro-batch of the first rank.
 4. `--pause`, the control: the embedding of `<|latent|>` is fed, as in variants/pause_tokens.py.

Axis letters: B rows, L tokens of a row, N latents of a row, J visual tokens of all, D hidden.
"""

import dataclasses
import math
import os
import sys

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import evaluate
import sft
from common.cli import run_script
from common.formats import Skipped
from common.machine import Machine, set_sync
from common.report import draw_curves
from common.run import Run, rows_of
from data import Samples, at_least, model_inputs
from model import LATENT, LATENT_END, LATENT_START, FutureL1

TAU = 0.1  # temperature of B's and C's softmax; ours
PROBES = 20  # times that other latents are tried in a training; ours


@dataclasses.dataclass
class Config(sft.Config):
    latent_head: str = ""  # "" = (a), unless the model has a head | linear  # ours
    n_latents: int = 4  # N, of each span  # ours
    align: str = "B"  # A (answer-aware self-teacher) | B (evidence) | C (own context)  # ours
    alpha: float = 0.1  # weight of L_align  # ours
    beta: float = 0.01  # weight of L_div  # ours
    pause: bool = False  # feed the embedding of `<|latent|>`: the control  # ours
    lam: float = 1.0  # alpha and beta weigh the latents' part of the loss

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "n_latents")
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


def evaluate_folder(config):
    """evaluate.py with a Model whose spans have one length -> {group: scores}."""
    model, tokenizer = Machine(config.bf16).load(config.model, cls=Model)
    model.one_length = True
    config = dataclasses.replace(config, max_latents=model.config.n_latents)
    return evaluate.evaluate(config, model, tokenizer)


# ----------------------------------------------------------------------------------------- N passes


def unroll(model, inputs, passes):
    """Eq. (b) -> z (B, N, D), with the gradient through all passes. Source: ours.

    inputs: padded rows as HF-named tensors, a span of N latents in each.
    """
    ids = inputs["input_ids"]
    is_latent = ids == model.config.latent_id  # (B, L)
    z = model.get_input_embeddings()(ids[is_latent])  # (B N, D)
    # deviation 1: all latents are fed at each pass
    for _ in range(passes):
        h, _ = model.hidden(**inputs, latents=z)  # (B, L, D)
        z = model.to_latent(h[:, :-1][is_latent[:, 1:]]).to(z.dtype)  # predicted one place before
    return z.view(len(ids), int(is_latent[0].sum()), z.shape[-1])


@torch.no_grad()
def evidence(model, batch):
    """What rows show -> embeddings v (J, D) without gradient, whose they are (B, J) bool.

    Raises ValueError for a row that shows nothing.
    """
    c, media = model.config, model_inputs(batch)
    ids, real = media.pop("input_ids"), media.pop("attention_mask").bool()
    shown = (ids == c.image_token_id) | (ids == c.video_token_id)  # (B, L)
    own = shown.nonzero()[:, 0] == torch.arange(len(ids), device=ids.device)[:, None]
    if not own.any(1).all():
        raise ValueError("align B and C need rows with pictures or clips")
    latents = model.get_input_embeddings()(ids[ids == c.latent_id])
    x, visual, _ = model.embed(ids[real][None], latents, **media)
    return x[visual], own


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


def without_chain(rows):
    """Rows -> the same without their chains."""
    return [dataclasses.replace(row, response=[]) for row in rows]


class Spanned(Samples):
    """Rows without chains; each has one span of n_latents before its answer."""

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        if isinstance(sample, Skipped) or not self.encoding.get("train", True):
            return sample
        names = LATENT_START, *[LATENT] * self.config.n_latents, LATENT_END
        span = self.tokenizer.convert_tokens_to_ids(names)
        ids, labels = sample["ids"], sample["labels"]
        at = next(k for k, label in enumerate(labels) if label != -100)  # where the answer begins
        learnt = [span[0], *[-100] * self.config.n_latents, span[-1]]
        ids, labels = ids[:at] + span + ids[at:], labels[:at] + learnt + labels[at:]
        return dict(sample, ids=ids, labels=labels)


def answer_labels(batch, c):
    """The labels of a batch's answers alone (B, L), without those of the span's markers."""
    labels = batch["labels"]
    marker = (labels == c.latent_start_id) | (labels == c.latent_end_id)
    return labels.masked_fill(marker, -100)


@torch.no_grad()
def answer_states(model, batch, z):
    """The mean of the states that each row's answer is predicted from (B, D)."""
    h, _ = model.hidden(**model_inputs(batch), latents=z.flatten(0, 1))  # (B, L, D)
    before = (answer_labels(batch, model.config)[:, 1:] != -100).to(h.dtype)  # (B, L - 1)
    return torch.einsum("bl,bld->bd", before, h[:, :-1]) / before.sum(1, keepdim=True)


def alignment(model, batch, z, config):
    """L_align of each row (B,), in the way that config.align names."""
    if config.align == "A":
        ids, mask = with_answer(batch, model.config)
        inputs = dict(model_inputs(batch), input_ids=ids, attention_mask=mask)
        with torch.no_grad():
            taught = unroll(model, inputs, config.n_latents)  # (B, N, D)
        return mean_distance(z, taught)
    v, own = evidence(model, batch)
    if config.align == "B":
        target = read_out(answer_states(model, batch, z), v, own, TAU)  # (B, D)
        return mean_distance(z, target[:, None].expand_as(z))
    # deviation 2: the others are the rows of the micro-batch
    c = own.to(v.dtype) @ v / own.sum(1, keepdim=True)  # (B, D)
    return contrast(z.mean(1), c, TAU)


@torch.no_grad()
def exchanged(model, batch, z):
    """The answer's loss with z (B, N, D), with zeros, with another row's -> figures."""
    fed = dict(answer=z, answer_zero=0 * z, answer_swapped=z.roll(1, 0))
    inputs = dict(model_inputs(batch), labels=answer_labels(batch, model.config))
    return {
        name: sft.sft_loss(model, **inputs, latents=latents.flatten(0, 1))["ce"].item()
        for name, latents in fed.items()
    }


def batch_sums(model, batch, probe, config):
    """A micro-batch -> Eq. (c)'s sums, and figures for the log.

    The sums are that of the words' cross-entropies, and over latents of alpha L_align + beta L_div.
    probe: whether other latents are tried.
    """
    inputs = model_inputs(batch)
    # deviation 4: the control is fed the embedding of `<|latent|>`
    z = unroll(model, inputs, 0 if config.pause else config.n_latents)  # (B, N, D)
    words = sft.sft_loss(model, **inputs, labels=batch["labels"], latents=z.flatten(0, 1))
    if not batch["rows"]:  # one row without a span stands in
        return words["ce_sum"], z.sum(), {}

    align = div = z.new_zeros(len(z))
    if config.alpha:
        align = alignment(model, batch, z, config)  # (B,)
    if config.beta:
        div = diversity_loss(z)  # (B,)
    latents = config.n_latents * (config.alpha * align + config.beta * div).sum()

    # deviation 3: what is logged beside the losses is of this micro-batch
    cosine = pairwise_cosine(z.detach()).mean().nan_to_num().item()  # nan: N = 1
    figures = dict(cosine=cosine, align=align.mean().item(), div=div.mean().item())
    if probe:
        figures.update(exchanged(model, batch, z))
    return words["ce_sum"], latents, figures


def train(config):
    """SFT on rows without their chains -> path of the last checkpoint. The loop of sft.py, without
    targets: Eq. (c) in the place of Eq. (1).

    Raises SystemExit on a folder in use or bad input.
    """
    # the run's folder, the rows in their order, the model with its head
    machine = Machine(config.bf16)
    rows = without_chain(rows_of(config))
    order, steps = sft.order_of(rows, config)
    run = Run(config, rows, machine, config.label)
    torch.manual_seed(config.seed)
    model, tokenizer = run.load(cls=Model, latent_head=config.latent_head or None)
    prepare(model, config)
    model.model.visual.requires_grad_(not config.freeze_vision)

    samples = Spanned(rows, tokenizer, config, train=True)
    batches = sft.batches_of(samples, order, steps, run, tokenizer.pad_token_id or 0)

    # the model over the ranks; what learns, and how
    parallel = machine.wrap(model, unused=True)  # a batch may lack pictures, or any span
    optimizer, trained = sft.adamw(model, config)
    run.start(model, optimizer, sft.describe(config, rows, model, steps, machine))

    for step in run.steps(steps):
        # the step's samples, and how many words and latents all ranks have
        micro = next(batches)
        skipped, _ = run.skips([skip for batch in micro for skip in batch["skipped"]])
        counts = [sft.count(batch, model.config.latent_id, config) for batch in micro]
        n_text, n_latent, n_tokens = (int(n) for n in machine.sum(map(sum, zip(*counts))))
        if step == 0 and not n_text:
            raise SystemExit(f"no sample of step 0 could be used, e.g. {skipped[:1]}")

        # forward and backward, a micro-batch at a time; the first one may try other latents
        sums, figures = torch.zeros(2, dtype=torch.float64), {}
        for batch in micro if n_text else []:
            set_sync(parallel, last=batch is micro[-1])
            probe = batch is micro[0] and step % max(1, steps // PROBES) == 0
            batch = sft.on_device(batch, machine)
            with machine.autocast():
                ce, latent, noted = parallel(batch_sums, batch, probe, config)
            loss = ce / n_text + latent / max(n_latent, 1)  # Eq. (c): lam is 1
            (loss * machine.world).backward()  # DDP averages the ranks' gradients
            sums += torch.stack([ce, latent]).detach().double().cpu()
            figures.update(noted)

        # clip and step, unless there was nothing to learn or the gradient is not finite
        lr, norm = sft.learning_rate(step, steps, config), None
        for group in optimizer.param_groups:
            group["lr"] = lr
        if n_text:
            norm = torch.nn.utils.clip_grad_norm_(trained, config.clip).item()
            if math.isfinite(norm):  # the norm is equal on all ranks
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # a line in the log, and now and then a checkpoint
        means = sft.means_of(sums, n_text, n_latent, config, machine)
        line = dict(step=step, lr=lr, tokens=n_tokens, latents=n_latent, **means, **figures)
        run.log(dict(line, grad_norm=norm, skipped=skipped), "ce", "latent")
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
