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
    python evaluate.py --model RUN --data test.json                 # --latents zero, pause, ...

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

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import sft
from common.cli import run_script
from common.formats import Blank
from common.run import rows_of
from common.shared_prefix import Following, Prompts
from data import at_least, model_inputs
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
    """What `model.load` makes of a folder whose config says `variant: video_latent`."""

    def __init__(self, config):
        super().__init__(config)
        inject(self)


def inject(model):
    """Give a model Eq. (a) as its latent head. ValueError for another variant's model."""
    if getattr(model.config, "variant", None) not in (None, "video_latent"):
        raise ValueError(f"the model is variants/{model.config.variant}.py's: it takes no (a)")
    head = Injection(model.config.text_config.hidden_size)
    model.latent_head = head.to(model.lm_head.weight)  # its device and dtype
    model.config.variant = "video_latent"


# ----------------------------------------------------------------------------------------- N passes


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


class Step(sft.Step):
    """The forward that DDP wraps: Eq. (c)'s sums, in the place of Eq. (2)'s and (3)'s."""

    def __init__(self, model, config, latent_var=1.0):
        super().__init__(model, config, latent_var)
        if model.latent_head is None:
            inject(model)
        model.config.min_latents = config.n_latents  # kept in its folder; decoding heeds it
        self.progress = -1.0  # of the last forward

    def forward(self, batch, progress=0.0):
        """-> sum of the words' cross-entropies; sum over latents of alpha L_align + beta L_div."""
        config, words = self.config, Words(self.model, batch)
        sequences = Sequences(self.model, **model_inputs(batch))
        z = sequences.unroll(0 if config.pause else config.n_latents)  # (B, N, D)
        h = sequences.states(z)  # (B, L, D)
        losses = words.losses(h)  # (n_text,)

        readable = bool(batch["rows"])  # else one row without a span stands in
        align = div = losses.new_zeros(len(z))
        if config.alpha and readable:
            align = self.alignment(batch, sequences, words, h, z)  # (B,)
        if config.beta and readable:
            div = diversity_loss(z)  # (B,)
        if readable and self.training:
            self.note(progress, sequences, words, z)
            self.figures.update(align=align.mean().item(), div=div.mean().item())
        latents = config.n_latents * (config.alpha * align + config.beta * div).sum()
        unused = self.model.to_latent(z[:, :0]).sum()  # DDP wants the head in every backward
        return losses.sum(), latents + unused

    def alignment(self, batch, sequences, words, h, z):
        """L_align of each row (B,), in the way that config.align names."""
        config = self.config
        if config.align == "A":
            ids, mask = with_answer(batch, self.model.config)
            inputs = dict(model_inputs(batch), input_ids=ids, attention_mask=mask)
            with torch.no_grad():
                taught = Sequences(self.model, **inputs).unroll(config.n_latents)  # (B, N, D)
            return mean_distance(z, taught)
        v, own = sequences.evidence()
        if config.align == "B":
            target = read_out(words.answer_states(h).detach(), v, own, config.tau)  # (B, D)
            return mean_distance(z, target[:, None].expand_as(z))
        c = own.to(v.dtype) @ v / own.sum(1, keepdim=True)  # (B, D)
        return contrast(z.mean(1), c, config.tau)

    @torch.no_grad()
    def note(self, progress, sequences, words, z):
        """Figures for the log: how alike a row's latents are and, now and then, `probe`'s."""
        if progress != self.progress:  # the first forward of a step
            now, before = (int(p * self.config.probes) for p in (progress, self.progress))
            self.figures = {} if now == before else self.probe(sequences, words, z)
            self.progress = progress
        self.figures["cosine"] = pairwise_cosine(z).mean().nan_to_num().item()  # nan: N = 1

    def probe(self, sequences, words, z):
        """The answer's loss with z (B, N, D), with zeros, with another row's -> figures."""
        fed, figures = dict(answer=z, answer_zero=0 * z, answer_swapped=z.roll(1, 0)), {}
        for name, latents in fed.items():
            losses = words.losses(sequences.states(latents))  # (n_text,)
            figures[name] = losses[words.of_answer].mean().item()
        return figures


def train(config, rows=None):
    """`sft.train` with this step, on rows without their chains -> path of the last checkpoint."""
    rows = rows_of(config) if rows is None else rows
    return sft.train(config, without_chain(rows, config.n_latents), module=Step)


if __name__ == "__main__":
    run_script(lambda config: print("last checkpoint:", train(config)), Config)
