"""Small trained matrices beside frozen ones (--lora_rank): LoRA, by the peft package. Ours.

    W x  becomes  W x + 2 B (A x)        A: rank x in, random; B: out x rank, 0 at first

for every matrix W of the language model's layers; in a mixture of experts for those of attention
alone, because the experts' weights are no separate matrices and a layer has 128. Vision tower,
embeddings, output layer and latent head stay as they are, but for the three latent tokens: a stock
model has nothing of use in their rows, so no A and B could teach it to open a span.

    w_i  becomes  w_i + e_i              i one of the three; e_i: D numbers, 0 at first

in the embeddings, and in the output layer: the same e_i where these two are one matrix (2B, 4B),
else another. On CUDA W is in bf16 (`common.machine.narrow`), embeddings, A, B and e are in fp32: a
weight takes 2 bytes, not 16.

A checkpoint is a plain folder, 2 B A added to W and e_i to w_i, in fp32; its trainer.pt has A, B
and e, and the run goes on from these and the W that it began with. Source: Hu et al. 2021; the
factor 2 is peft's common choice, lora_alpha = 2 * rank. The rows are not peft's: its
trainable_token_indices copies the whole matrix in every forward, and `FutureL1.logits` would not
see it.
"""

import torch
import torch.nn as nn

from model import LATENT_IDS

LAYERS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
BASE = ".base_layer.weight"  # peft's name for W
WORDS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


def add_adapters(model, rank):
    """Put A, B and e beside the weights of a FutureL1, in place; only these are trained -> model.

    Raises ImportError if peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as e:
        raise ImportError(f"--lora_rank needs a package: pip install peft ({e})") from e
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LAYERS)
    inject_adapter_in_model(config, model)
    for p in adapters(model).values():
        p.data = p.data.float()
    model.latent_rows = LatentRows(model)
    model.get_input_embeddings().register_forward_hook(model.latent_rows.add_in)
    return model


class LatentRows(nn.Module):
    """What is added to the rows of the three latent tokens, in and out: e (3, D) each. Ours."""

    def __init__(self, model):
        super().__init__()
        W = model.get_input_embeddings().weight  # (V, D)
        ids = torch.tensor([getattr(model.config, key) for key in LATENT_IDS], device=W.device)
        self.register_buffer("ids", ids, persistent=False)
        zeros = torch.zeros(len(ids), W.shape[1], device=W.device)
        self.into = nn.Parameter(zeros)
        tied = model.config.tie_word_embeddings  # in bf16 the output layer is a rounded copy
        self.out = self.into if tied else nn.Parameter(zeros.clone())
        self.on = True

    def add_in(self, embedding, inputs, x):
        """The embedding's hook: x (..., D) of ids (...), e added to that of one of the three."""
        if not self.on:
            return x
        with torch.autocast(x.device.type, enabled=False):
            which = (inputs[0][..., None] == self.ids).float()  # (..., 3) one 1 or none
            return x + which @ self.into  # in fp32: bf16 would round small e away

    def add_out(self, logits, h):
        """Logits (..., V) of states h (..., D), e h added to those of the three, in place."""
        if not self.on:
            return logits
        with torch.autocast(h.device.type, enabled=False):
            more = h.float() @ self.out.T  # (..., 3)
        return logits.index_add_(-1, self.ids, more.to(logits.dtype))


def adapters(model):
    """{name: A, B or e}: all that is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def put_adapters(model, saved):
    """A checkpoint's A, B and e, {name: tensor}, back in place."""
    with torch.no_grad():
        for name, p in adapters(model).items():
            p.copy_(saved[name])


def adapted_layers(model):
    """{name: peft's layer}."""
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def frozen_alone(model):
    """-> run(f, *args) = f(model, *args), with the model as it began: without A, B and e."""
    layers, rows = adapted_layers(model).values(), model.latent_rows

    def turn(on):
        rows.on = on
        for layer in layers:
            layer.enable_adapters(on)

    def run(f, *args):
        turn(False)
        try:
            return f(model, *args)
        finally:
            turn(True)

    return run


def merged(model, weights):
    """Weights of an adapted model {name: tensor} -> a plain one's on the host, with 2 B A and e.

    A tied matrix stays one.
    """
    layers, rows, plain = adapted_layers(model), model.latent_rows, {}
    for name, W in weights.items():
        if ".lora_" in name or name.startswith("latent_rows."):
            continue
        if name.endswith(BASE):
            name = name.removesuffix(BASE)
            W = W.cpu().float() + layers[name].get_delta_weight("default").detach().cpu()
            name += ".weight"
        plain[name] = W

    def with_rows(W, e):
        return W.cpu().float().index_add(0, rows.ids.cpu(), e.detach().cpu())

    tied = rows.out is rows.into
    plain[WORDS] = with_rows(plain[WORDS], rows.into)
    plain[HEAD] = plain[WORDS] if tied else with_rows(plain[HEAD], rows.out)
    return plain
