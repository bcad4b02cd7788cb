"""Rehearse a training at its real size, without a GPU and without memory for it.

    python -m tools.rehearse --shape 2b                              # one GPU, or DDP on any number
    python -m tools.rehearse --shape 8b --gpus 8 --shard
    python -m tools.rehearse --shape 2b --lora_rank 64 --out rehearsed.json

The released shape is built on fake tensors (tools/pretended.py) and does what the scripts do: a
sample of SFT and the update of one group, forward, backward and optimizer step; a prompt's forward;
decoding steps with full caches. Each line says what that takes on one GPU:

    GB       the peak of live tensors, and the smallest card of 24, 80 or 141 GB that it fits with a
             tenth left free, for CUDA's context, the kernels' workspaces and fragments
    TFLOP    all products and attention, the frozen tower and what checkpointing computes again too
    seconds  those TFLOPs at SHARE of PEAK: the time of the arithmetic if nothing waits for it
    kernels  how many are launched; waits: how often the host waits for a number from the GPU

Nothing here has been measured on a GPU. With --shard, or without a C++ compiler, kernels and waits
are not counted. Source: ours.
"""

import contextlib
import dataclasses
from unittest import mock

from tools.pretended import HAS_CUDA, PretendedGPU  # first: it has to come before torch

import torch  # isort: skip


import la_dapo
import latent_decode
from common.cli import run_script
from common.lora import add_adapters, frozen_alone
from common.machine import Calls, narrow, shard, whole_copy
from common.run import write_json
from latent_decode import generate
from sft import sft_loss
from tools import shapes
from tools.bench import checkpoint_activations

CARDS = (24, 80, 141)  # GB
USABLE = 0.9  # of a card
PEAK, SHARE = 989e12, 0.4  # FLOP/s in bf16, a H100's data sheet; the part that is reached: a guess
SHOWN = 3  # of the places where the host waits; --out has all


@dataclasses.dataclass
class Config:
    shape: str = "8b"  # 2b | 4b | 8b | 30b-a3b: those of Qwen3-VL
    gpus: int = 1  # ranks; without shard each holds the same
    shard: bool = False  # weights, gradients, optimizer spread over the ranks
    lora_rank: int = 0  # of matrices trained beside a frozen model; 0 = the model itself
    images: int = 15  # of a prompt, 258 tokens each
    words: int = 130  # of a prompt
    n: int = 8  # rollouts of a prompt  # paper Table 9
    new_tokens: int = 2048  # of each rollout: the longest there can be
    sft_tokens: int = 4300  # of a sample of SFT; what follows the prompt carries labels
    adjoint_terms: int = 8  # of the gradient through the latents; 0 = leave that case out
    out: str = ""  # also write all figures as JSON

    def __post_init__(self):
        shapes.check_shape(self.shape)
        if self.shard and (self.lora_rank or self.gpus < 2):
            raise ValueError("shard: needs --gpus 2 or more, and no --lora_rank")
        if self.shape == "30b-a3b" and not (self.shard or self.lora_rank):
            raise ValueError("30b-a3b: needs --shard or --lora_rank, else it takes 500 GB")


class Rehearsal:
    """A model to train on a pretended GPU, and what was found out about each case."""

    def __init__(self, config, gpu):
        self.config, self.gpu, self.cases = config, gpu, {}
        self.device = gpu.device

        # weights and Adam's moments are there from the start; so that they are, a first step
        with self.making("weights"):
            lora = config.lora_rank
            self.model = shapes.make(config.shape, device=self.device).train()
            self.model.model.visual.requires_grad_(False)
            if lora:
                narrow(self.model)
                # made where they belong, because peft cannot move fake weights
                stay = mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module)
                with stay, torch.device(self.device):
                    add_adapters(self.model, lora)
            self.module = Calls(self.model)
            if config.shard:
                self.module = shard(self.module, self.model, bf16=True)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)
        with self.making("gradients"):  # there from a step's second micro-batch on
            for p in self.trained:
                p.grad = torch.zeros_like(p)
        with self.making("moments"):
            self.optimizer.step()

    @contextlib.contextmanager
    def making(self, kind):
        """What is made inside is of this kind."""
        self.gpu.kind = kind
        yield
        self.gpu.kind = "activations"

    def autocast(self):
        return torch.autocast(self.device, torch.bfloat16)

    def case(self, name, work):
        """Run work() and write down what it took."""
        gpu = self.gpu
        gpu.begin()
        work()
        parts = gpu.ledger.peak(gpu.since)
        figures = dict(bytes=sum(parts.values()), parts=parts, flops=gpu.flops)
        figures.update(seconds=gpu.flops / (PEAK * SHARE), card=smallest_card(figures["bytes"]))
        if HAS_CUDA and not self.config.shard:
            figures.update(kernels=sum(gpu.kernels.values()), waits=gpu.looks)
        figures["attention"] = gpu.attention
        self.cases[name] = figures
        print_case(name, figures)

    def train_on(self, loss_of):
        """A training step, as both scripts do it: forward, backward, clip, step."""
        with self.autocast():
            loss = self.module(loss_of)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()

    # ---- what the scripts run

    def sft(self):
        """A sample with four future frames of four latents."""
        batch = shapes.sft_sample(self.config, self.device)
        frames = batch.pop("future_pixel_values"), batch.pop("future_grid_thw")

        def loss(model):
            return sft_loss(model, latents=model.encode_frames(*frames), **batch)["loss"]

        self.train_on(loss)

    def group(self):
        """One group as the update takes it."""
        config, device = self.config, self.device
        prompts = shapes.prompt(config, 1, device)
        hidden = self.model.config.text_config.hidden_size
        rollout = shapes.random_group(config, hidden, device)
        one = torch.ones(config.n, 1, dtype=torch.long, device=device)
        A = torch.randn(config.n, 1, device=device)
        return la_dapo.Batch(prompts, rollout, torch.zeros_like(one[:, 0]), A, one)

    def update(self, reference, terms=0):
        """The reference's log-probabilities, then the update of one group."""
        batch, settings = self.group(), la_dapo.Config(adjoint_terms=terms)
        counts = la_dapo.Counts(batch.weight.sum().item(), rollouts=self.config.n, groups=1)
        with torch.no_grad(), self.autocast():
            batch.ref = reference(lambda model: la_dapo.replayed(model, batch, settings)).logprobs
        self.train_on(lambda model: la_dapo.policy_loss(model, batch, counts, settings)[0])

    def reference(self):
        """The KL's reference, in bf16: as a function of functions of a model."""
        if self.config.lora_rank:
            return frozen_alone(self.model)
        with self.making("reference"):
            config = self.config
            dtype = torch.bfloat16 if config.shard else torch.float32
            model = shapes.make(config.shape, dtype=dtype, device=self.device).eval()
            model.requires_grad_(False)
            return shard(Calls(model), model, bf16=True) if config.shard else Calls(narrow(model))

    def decode(self, steps):
        """A prompt's forward and first token; with more steps, the last of them alone.

        The cache is as large as the longest rollout's.
        """
        model = self.model
        if self.config.shard:
            with self.making("copies"):
                where = dict(dtype=torch.bfloat16, device=self.device)
                model = shapes.make(self.config.shape, **where)
        elif not self.config.lora_rank:
            with self.making("copies"):
                model = whole_copy(model, bf16=True)
        batch = shapes.prompt(self.config, 1, self.device)
        settings = dict(max_new_tokens=steps, n=self.config.n, temperature=0.9, top_p=0.99)

        def counted_alone(*args, **kwargs):
            if steps > 1:
                self.gpu.begin()
            return step(*args, **kwargs)

        step, cache = latent_decode.step, full_cache(self)
        with mock.patch.multiple(latent_decode, step=counted_alone, DecodingCache=cache):
            with self.autocast():
                generate(model, batch, **settings)


def full_cache(rehearsal):
    """DecodingCache that at once has the room of the longest rollout, grown as it would grow."""
    room = rehearsal.config.new_tokens

    class FullCache(latent_decode.DecodingCache):
        def __init__(self, prompt, lengths, n):
            with rehearsal.making("KV"):
                super().__init__(prompt, lengths, n)

        def reserve(self, steps):
            half = -(-room // 2)
            with rehearsal.making("KV"):
                for some in (half, room - half) if not self.used else ():
                    super().reserve(some)

    return FullCache


# ---------------------------------------------------------------------------------------- the cases


def smallest_card(size):
    """The smallest card that so many bytes fit on, in GB; None = none."""
    return next((card for card in CARDS if size <= USABLE * card * 1e9), None)


def print_case(name, figures):
    """One case in a few lines."""
    card = figures["card"]
    fits = f"a card of {card} GB" if card else f"no card of {CARDS[-1]} GB"
    size, work = figures["bytes"] / 1e9, figures["flops"] / 1e12
    print(f"\n{name}: {size:.1f} GB ({fits}), {work:.1f} TFLOP, {figures['seconds']:.2f} s")
    parts = sorted(figures["parts"].items(), key=lambda part: -part[1])
    print("  " + ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in parts if size > 5e6))
    for kind, calls in figures["attention"].items():
        print(f"  attention: {kind}, {calls} calls")
    if "kernels" in figures:
        waits = figures["waits"]
        print(f"  {figures['kernels']:,} kernels, {sum(waits.values())} waits")
        for place, times in waits.most_common(SHOWN):
            print(f"    {times} x {place}")


def main(config):
    """Rehearse all cases -> {case: figures}."""
    device = "cuda" if HAS_CUDA and not config.shard else "cpu"
    if config.shard:
        join_ranks(config.gpus)
    mark = f", its part of {config.gpus}" if config.shard else ""
    print(f"{config.shape}: bytes on one GPU{mark}; on fake tensors, not measured on a GPU")
    if device == "cpu":
        why = "--shard is rehearsed on CPU tensors" if config.shard else "g++ or CUDA is missing"
        print(f"kernels and waits: not counted, {why}")
    with (gpu := PretendedGPU(device)):
        rehearsal = Rehearsal(config, gpu)
        for checkpointing in (False, True):
            checkpoint_activations(rehearsal.model, checkpointing)
            rehearsal.case("SFT" + ", checkpointing" * checkpointing, rehearsal.sft)
        reference = rehearsal.reference()
        for checkpointing in (False, True):
            checkpoint_activations(rehearsal.model, checkpointing)
            mark = ", checkpointing" * checkpointing
            rehearsal.case("LA-DAPO" + mark, lambda: rehearsal.update(reference))
            if config.adjoint_terms and not config.shard:
                name = f"LA-DAPO, {config.adjoint_terms} terms through the latents{mark}"
                rehearsal.case(name, lambda: rehearsal.update(reference, config.adjoint_terms))
        rehearsal.optimizer.zero_grad(set_to_none=True)  # as it is while rollouts are made
        rehearsal.case("a prompt and its first token", lambda: rehearsal.decode(1))
        rehearsal.case("a decoding step, caches full", lambda: rehearsal.decode(2))
    if config.out:
        write_json(config.out, dict(config=dataclasses.asdict(config), cases=rehearsal.cases))
    return rehearsal.cases


def join_ranks(world):
    """Rank 0 of so many ranks that are not there."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())


if __name__ == "__main__":
    run_script(main, Config)
