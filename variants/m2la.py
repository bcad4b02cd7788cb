"""A compressed cache: multi-head latent attention (M2LA) out of a trained model's grouped-query
attention. All tokens stay; what is cached of each is half as wide.

Source: InternVideo3 (arXiv 2606.12195); the conversion's equations are those of TransMLA, whose
names and sizes the released code has. A fork of sft.py, which heals what was converted.

For a token x, key head g of G and query head h of its group, Qwen3-VL's attention computes

    k_g = W_k,g x,   s_g = 1 / rms(k_g),   v_g = W_v,g x,   q_h = norm(W_q,h x)
    logit = RoPE(q_h) . RoPE(s_g gain k_g) / sqrt(d)                     caches 2 G d numbers

It is converted layer by layer, with sums of squares, not centred, over the tokens of some rows:

Step 1, rotation. mu_g: the number for which mu_g k_g is nearest to s_g k_g. At frequency f the
    G heads' mu_g gain k_g are points in R^G, two a token. U_f are their principal axes, the largest
    first.
        k'_c[f] = sum_g U_f[g, c] mu_g gain k_g[f]         q'_h,c[f] = U_f[g, c] q_h[f]
    RoPE turns a frequency of all heads by one angle, so this step alone changes no logit.
Step 2. k_r = k'_1 keeps RoPE and is one key for all heads. k'_2 ... k'_G lose it, which is an
    approximation.
Step 3, balanced joint PCA. rho: mean size of a coordinate of k'_2 ... k'_G over that of v.
        c = R' [k'_2 ... k'_G / rho ; v],   R: the r first principal axes,   W_UK, W_UV: back again
Step 4, QK-norm. `exact` (ours): t_g = s_g / mu_g is cached too. `linear` (the paper's): t_g = 1,
    because s hardly varies.

    [c ; k_r] = W_a x,   q_r,h = RoPE(U[g, 1] q_h),   v_g = W_UV,g c        caches r + d (+ G)
    logit = t_g (q_h . W_UK,g c + q_r,h . RoPE(k_r)) / sqrt(d)

*Expanded*, to train and for a prompt: keys and values are made from c, then as usual. *Absorbed*,
to decode: the cache is read as it is, (W_UK,g' q_h) . c and W_UV,g (sum of p c).

    python -m variants.m2la --model runs/sft --data train.json --out runs/m2la   # converts, heals
    python -m variants.m2la ... --rank 448 --norm linear --no-heal   # only OUT/converted
    python -m variants.m2la --bench 2b --layers 2   # seconds of a decoding step, bytes of a token

    python -m variants.m2la evaluate --model runs/m2la --data test.json   # or runs/m2la/converted

OUT/converted and OUT/step_N are loaded with `model.load(folder, cls=Model)`.

Where this differs from the paper, which prints neither formula nor ranks nor script:
 1. Left out: the modality adapters (affine maps of c, one for text, one for vision), ranks by layer
    and by modality; TransMLA's pooling of neighbouring frequencies (in M-RoPE: of other axes).
 2. `linear` starts from one number a key head; the paper fits a linear map. Queries keep their
    norm, the scale stays 1 / sqrt(d), W_UK and W_UV are one a key head: the released code has
    them a query head, larger queries without norm, and 1 / sqrt(2 d).
 3. Healing is SFT; the paper's is continued pretraining on 13.5 B tokens.

Axis letters: B rows, T tokens, N tokens of one row, R rows of decoding, D hidden, H query heads,
G key heads, d head width, m components with RoPE (1), r rank, P + C cached places.
"""

import dataclasses
import math
import os
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

import evaluate
import sft
from common.cli import run_script
from common.folder import complete, describe_training, newest
from common.machine import Machine, set_sync, whole
from common.report import draw_curves
from common.run import Run, rows_of
from common.shared_prefix import DecodingCache
from data import Samples, loader, to_device
from model import FutureL1
from tools.shapes import make

CALIBRATION = 128  # rows that the axes are found with, as TransMLA's 128 texts
CONTEXTS = (1024, 8192, 32768)  # of the bench


@dataclasses.dataclass
class Config(sft.Config):
    out: str = "runs/m2la"  # the run's folder; OUT/converted is the model before healing
    lr: float = 2e-5  # peak  # InternVideo3, continued pretraining
    rank: int = 0  # r; 0 = (G - m) d, which halves the cache  # InternVideo3: 896
    roped: int = 1  # m, components that keep RoPE  # InternVideo3
    norm: str = "exact"  # of keys: exact (ours) | linear (InternVideo3)
    heal: bool = True  # --no-heal: only convert  # ours
    bench: str = ""  # a shape of tools/shapes.py: time it, and nothing else  # ours
    layers: int = 2  # of the bench; 0 = all  # ours

    def __post_init__(self):
        super().__post_init__()
        if self.norm not in ("exact", "linear"):
            raise ValueError(f"norm is {self.norm!r}, expected exact or linear")
        if self.eval_data or self.lora_rank:
            raise ValueError("m2la: no --eval_data, no --lora_rank")

    @property
    def label(self):
        return "m2la"


class M2LA(nn.Module):
    """A text layer's attention with a compressed cache. Source: InternVideo3.

    attention: transformers' own, whose queries and outputs are kept. The other weights are random
    until `fit` sets them. Raises ValueError if the sizes do not fit.
    """

    def __init__(self, attention, rank, roped, norm):
        super().__init__()
        c, weight = attention.config, attention.q_proj.weight
        self.G, self.d = G, d = c.num_key_value_heads, attention.head_dim
        self.rank, self.roped, self.exact = rank or (G - roped) * d, roped, norm == "exact"
        # deviation 2: the scale stays 1 / sqrt(d), and W_UK and W_UV are one a key head
        self.layer_idx, self.scaling = attention.layer_idx, attention.scaling
        self.eps = c.rms_norm_eps
        most = (2 * G - roped) * d
        if c.attention_bias or not 1 <= roped <= G or not 1 <= self.rank <= most:
            raise ValueError(f"expected rank <= {most}, 1 <= roped <= {G} and no biases")

        def weights(*shape):
            return nn.Parameter(0.02 * torch.randn(shape, dtype=weight.dtype, device=weight.device))

        self.q_proj, self.q_norm, self.o_proj = attention.q_proj, attention.q_norm, attention.o_proj
        self.kv_a = nn.Linear(c.hidden_size, self.rank + roped * d, bias=False).to(weight)  # W_a
        self.up_k, self.up_v = weights(G, d, self.rank), weights(G, d, self.rank)  # W_UK, W_UV
        self.turn = weights(G, roped, d)  # U[g, c] at the frequency of each coordinate
        if self.exact:
            self.k_proj, self.mu = attention.k_proj, weights(G)

    def forward(self, hidden_states, position_embeddings, past_key_values=None, prefix=None, **_):
        """States (B, T, D) -> (B, T, D), None. prefix: a Layout or a DecodingCache."""
        x, (B, T, _) = hidden_states, hidden_states.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.d))  # (B, T, H, d)
        H = q.shape[2]
        turn = self.turn.repeat_interleave(H // self.G, 0)  # (H, m, d)
        c, k_r = self.kv_a(x).split([self.rank, self.roped * self.d], -1)
        q_r, k_r = apply_rotary_pos_emb(
            (q[..., None, :] * turn).flatten(2, 3),  # (B, T, H m, d)
            k_r.view(B, T, self.roped, self.d),
            *position_embeddings,  # cos, sin (B, T, d)
            unsqueeze_dim=2,
        )
        q_r, k_r = q_r.view(B, T, H, -1), k_r.flatten(2)  # (B, T, H, m d), (B, T, m d)

        entry, t = torch.cat([c, k_r], -1), self.key_scale(x)  # what is cached
        if past_key_values is not None:
            past_key_values.update(entry[:, None], t[:, None], self.layer_idx)
        attend = self.absorbed if isinstance(prefix, DecodingCache) else self.expanded
        return self.o_proj(attend(q, q_r, entry, t, prefix).flatten(2)), None

    def key_scale(self, x):
        """t of x (B, T, D) -> (B, T, G), or (B, T, 0) if linear. Ours."""
        if not self.exact:
            return x.new_empty(*x.shape[:2], 0)
        k = self.k_proj(x).view(*x.shape[:2], self.G, self.d)
        return scale_of(k, self.eps).to(k.dtype) / self.mu

    def expanded(self, q, q_r, entry, t, layout):
        """Keys and values made from c: q (1, N, H, d), q_r (1, N, H, m d) -> (1, N, H, d)."""
        c, k_r = entry.split([self.rank, q_r.shape[-1]], -1)
        content = torch.einsum("bnr,gdr->bngd", c, self.up_k)
        key = torch.cat([content, k_r[:, :, None].expand(-1, -1, self.G, -1)], -1)
        key = key * t[..., None] if self.exact else key  # (1, N, G, d + m d)
        # padded to the width of the keys, because FlashAttention needs equal widths
        value = F.pad(torch.einsum("bnr,gdr->bngd", c, self.up_v), (0, q_r.shape[-1]))
        states = (y.transpose(1, 2) for y in (torch.cat([q, q_r], -1), key, value))
        return layout.attend(self.layer_idx, *states, self.scaling)[..., : self.d]

    def absorbed(self, q, q_r, entry, t, cache):
        """The cache read as it is: q (R, 1, H, d), q_r (R, 1, H, m d) -> (R, 1, H, d)."""
        R, _, H, d = q.shape
        keys, scales = cache.write(self.layer_idx, entry[:, None], t[:, None])
        q = torch.einsum("rghd,gdc->rghc", q.view(R, self.G, -1, d), self.up_k)
        q = torch.cat([q.reshape(R, 1, H, -1), q_r], -1).to(keys[0].dtype)  # (R, 1, H, r + m d)
        score = cache.products(q, keys, self.scaling)  # (R, 1, H, P + C)
        if self.exact:  # each head takes the t of its group
            one = torch.eye(self.G, dtype=q.dtype, device=q.device)
            one = one.repeat_interleave(H // self.G, 0)  # (H, G)
            score = score * cache.products(one.expand(R, 1, H, -1), scales, 1.0)
        latents = tuple(key[..., : self.rank] for key in keys)
        c = cache.mix(cache.weights(score), latents)  # (R, 1, H, r)
        c = c.view(R, self.G, -1, self.rank).to(self.up_v.dtype)
        return torch.einsum("rghc,gdc->rghd", c, self.up_v).reshape(R, 1, H, d)


def scale_of(k, eps):
    """s = 1 / rms of keys (..., d) -> (...), at least in fp32. Source: Qwen3's norm."""
    k = k.to(torch.promote_types(k.dtype, torch.float32))
    return (k.square().mean(-1) + eps).rsqrt()


class Model(FutureL1):
    """FutureL1 with M2LA in its text layers, if its config says so: `load(folder, cls=Model)`."""

    def __init__(self, config):
        super().__init__(config)
        settings = getattr(config, "m2la", None)
        for layer in self.model.language_model.layers if settings else []:
            layer.self_attn = M2LA(layer.self_attn, **settings)


class Moments:
    """Sums over the tokens that a layer's attention reads while it is watched. Ours.

    yy (2 G d, 2 G d): y y' of y = [k ; v], before norm and RoPE. scaled (G,): s_g |k_g|^2.
    """

    def __init__(self, attention):
        self.tokens = self.yy = self.scaled = 0
        self.watch = attention.register_forward_pre_hook(self.add, with_kwargs=True)

    def add(self, attention, args, inputs):
        x = inputs["hidden_states"][0]  # (N, D)
        y = torch.cat([attention.k_proj(x), attention.v_proj(x)], -1).double()  # (N, 2 G d)
        k = y.view(len(x), 2, -1, attention.head_dim)[:, 0]  # (N, G, d)
        s = scale_of(k, attention.config.rms_norm_eps)  # (N, G)
        self.tokens, self.yy = self.tokens + len(x), self.yy + y.T @ y
        self.scaled = self.scaled + (s * k.square().sum(-1)).sum(0)


@torch.no_grad()
def rotate(attention, moments):
    """Step 1 -> mu (G,); U[g, c] at each coordinate (G, G, d); the map x -> y = [k'_1 ... k'_G ; v]
    (2 G d, D); sum of y y'. In float64. Source: TransMLA; mu is ours.
    """
    c, gain = attention.config, attention.k_norm.weight.double()
    G, d = c.num_key_value_heads, attention.head_dim
    # deviation 2: one number a key head, by least squares, where the paper fits a linear map
    mu = moments.scaled / moments.yy.diagonal()[: G * d].view(G, d).sum(1)
    scale = (mu[:, None] * gain).flatten()  # (G d,)

    # coordinates i and i + d / 2 of a head are a frequency's two
    keys = (moments.yy[: G * d, : G * d] * scale * scale[:, None]).view(G, 2, d // 2, G, 2, d // 2)
    axes = torch.linalg.eigh(torch.einsum("gpfhpf->fgh", keys)).eigenvectors.flip(-1)
    turn = axes.permute(1, 2, 0).repeat(1, 1, 2)  # (f, G, G) -> (G, G, d)

    # the whole step as one matrix on [k ; v]
    across = torch.einsum("gci,ij->cigj", turn, torch.eye(d).to(gain)).reshape(G * d, G * d)
    step = torch.block_diag(across * scale, torch.eye(G * d).to(gain))
    both = torch.cat([attention.k_proj.weight, attention.v_proj.weight]).double()
    return mu, turn, step @ both, step @ moments.yy @ step.T


@torch.no_grad()
def fit(attention, moments, **settings):
    """Steps 1 to 4 -> M2LA. settings: its arguments. Raises ValueError for too few tokens."""
    new = M2LA(attention, **settings)
    if moments.tokens < new.rank:
        raise ValueError(f"calibration: {moments.tokens} tokens, expected at least {new.rank}")
    G, d, m = new.G, new.d, new.roped
    mu, turn, maps, yy = rotate(attention, moments)
    (roped, content), yy = maps.tensor_split([m * d]), yy[m * d :, m * d :]  # step 2

    # step 3: the first n coordinates are the keys'
    n, size = (G - m) * d, yy.diagonal().sqrt()
    balance = torch.ones_like(size)
    balance[:n] = size[n:].mean() / size[:n].mean()  # 1 / rho
    R = torch.linalg.eigh(yy * balance * balance[:, None]).eigenvectors.flip(-1)[:, : new.rank]
    back = R / balance[:, None]  # (n + G d, r)

    # keys of the G heads from k'_2 ... k'_G: the rotation undone
    up_k = torch.einsum("gci,cir->gir", turn[:, m:], back[:n].view(G - m, d, new.rank))
    new.up_k.copy_(up_k), new.up_v.copy_(back[n:].view(G, d, new.rank))
    new.kv_a.weight.copy_(torch.cat([R.T @ (balance[:, None] * content), roped]))
    new.turn.copy_(turn[:, :m])
    if new.exact:
        new.mu.copy_(mu)
    return new


@torch.no_grad()
def convert(model, batches, config):
    """A FutureL1 -> the same object, now a Model. Source: InternVideo3.

    batches: of `data.collate`; fed as SFT does, true latents included. Raises ValueError as M2LA
    and `fit` do, or for a Model.
    """
    if getattr(model.config, "m2la", None):
        raise ValueError("this model's attention is converted already")
    layers = model.model.language_model.layers
    moments = [Moments(layer.self_attn) for layer in layers]
    # as in training: the flash-attn package refuses fp32, in which others would hold (T, T) scores
    device = model.device.type
    with torch.autocast(device, torch.bfloat16, enabled=config.bf16 and device == "cuda"):
        for batch in batches:
            batch = to_device(batch, model.device)
            sft.batch_sums(model, batch, sft.teacher_forcing, 0, 1, config)
    # deviation 1: one rank for all layers, for words and pictures; no adapters, no pooling
    settings = dict(rank=config.rank, roped=config.roped, norm=config.norm)
    for layer, known in zip(layers, moments):
        known.watch.remove()
        layer.self_attn = fit(layer.self_attn, known, **settings)
    model.config.decoded_by = "variants/m2la.py"
    model.config.m2la, model.__class__ = settings, Model
    return model


def write_converted(config, rows):
    """Convert config.model into OUT/converted -> that folder. Raises SystemExit if it exists."""
    folder, machine = os.path.join(config.out, "converted"), Machine(config.bf16)
    if os.path.exists(folder) and not config.resume:
        raise SystemExit(f"{folder} is there: pass --resume to go on with it, or another --out")
    machine.wait()
    if machine.master and not os.path.exists(folder):
        start = newest(config.model)
        head = config.latent_head or None
        model, tokenizer = machine.load(start, train=True, cls=Model, latent_head=head)
        some = sft.sample_order(len(rows), min(CALIBRATION, len(rows)), config.seed)
        samples = Samples(rows, tokenizer, config, spans=config.spans)
        convert(model, loader(samples, [[i] for i in some], config.workers, pad_id=0), config)
        for part in (model, tokenizer):
            part.save_pretrained(folder + ".part")
        about = describe_training(config, start, False, name="conversion", step=0)
        complete(folder + ".part", start, about)
        os.rename(folder + ".part", folder)
    machine.wait()
    return folder


def train(config):
    """Convert, then heal -> path of the last checkpoint; --no-heal: of the converted model.

    Raises SystemExit on a folder in use or bad input.
    """
    rows = rows_of(config)
    folder = write_converted(config, rows)
    if config.heal:
        return heal(dataclasses.replace(config, model=folder), rows)
    print("converted:", folder)
    return folder


def heal(config, rows):
    """SFT of a converted model -> path of the last checkpoint. The loop of sft.py."""
    # deviation 3: healing is SFT
    # the run's folder, the rows in their order, the model
    machine = Machine(config.bf16, config.shard)
    order, steps = sft.order_of(rows, config)
    run = Run(config, rows, machine, config.label)
    torch.manual_seed(config.seed)
    model, tokenizer = run.load(cls=Model)
    model.model.visual.requires_grad_(not config.freeze_vision)
    latent_id = model.config.latent_id

    samples = Samples(rows, tokenizer, config, train=True, spans=config.spans)
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
        sums, progress = torch.zeros(2, dtype=torch.float64), step / steps
        for batch in micro if n_text else []:
            set_sync(parallel, last=batch is micro[-1])
            batch = sft.on_device(batch, machine)
            fed = sft.teacher_forcing
            with machine.autocast():
                ce, latent = parallel(sft.batch_sums, batch, fed, progress, latent_var, config)
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


def evaluate_folder(config):
    """evaluate.py with a converted model -> {group: scores}."""
    return evaluate.evaluate(config, *Machine(config.bf16).load(config.model, cls=Model))


@torch.no_grad()
def time_step(model, context, steps=8):
    """A decoding step of one row after `context` tokens -> seconds and bytes a token, both a layer.

    The embeddings and the output layer are left out: next to so few layers they would take most of
    the time. Ours.
    """
    text, L = model.model.language_model, model.config.text_config.num_hidden_layers
    one = torch.ones(1, 1, dtype=torch.long, device=model.device)
    _, prompt = model.hidden(one, use_cache=True)
    for layer in prompt.layers:  # the same token again and again, because only the cost matters
        layer.keys, layer.values = (x.repeat(1, 1, context, 1) for x in (layer.keys, layer.values))
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in prompt.layers)
    cache = DecodingCache(prompt, [context], 1)
    cache.reserve(steps + 1)
    x = model.get_input_embeddings()(one[0])  # (1, D)
    cache.feed(text, x, one + context, None).sum().item()  # warm-up
    began = time.time()
    for k in range(steps):
        h = cache.feed(text, x, one + context + 1 + k, None)
    h.sum().item()  # waits for the GPU
    return (time.time() - began) / steps / L, size // (context * L)


def bench(config):
    """A random model of a real shape, before and after: a table on the screen. Ours."""
    kind = dict(dtype=torch.bfloat16, device="cuda") if torch.cuda.is_available() else {}
    model = make(config.bench, config.layers, **kind)
    gqa = [time_step(model, context) for context in CONTEXTS]
    for layer in model.model.language_model.layers:
        layer.self_attn = M2LA(layer.self_attn, config.rank, config.roped, config.norm)
    print("| context | GQA ms | M2LA ms | ratio | GQA bytes | M2LA bytes |\n" + "|---" * 6 + "|")
    for context, (a, a_size) in zip(CONTEXTS, gqa):
        b, b_size = time_step(model, context)
        print(f"| {context} | {1e3 * a:.2f} | {1e3 * b:.2f} | {a / b:.2f} | {a_size} | {b_size} |")


def main(config):
    if config.bench:
        bench(config)
    else:
        train(config)


if __name__ == "__main__":
    if sys.argv[1:2] == ["evaluate"]:
        run_script(evaluate_folder, evaluate.Config, sys.argv[2:])
    else:
        run_script(main, Config)
