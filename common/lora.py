"""Small trained matrices beside frozen ones (--lora_rank): LoRA, by the peft package. Ours.

    W x  becomes  W x + 2 B (A x)        A: rank x in, random; B: out x rank, 0 at first

for every matrix W of the language model's layers. Vision tower, embeddings, output layer and latent
head stay as they are: so the model to begin with should know the three latent tokens. W is in bf16
on CUDA, A and B in fp32: a weight takes 2 bytes, not 16.

A checkpoint is a plain folder, 2 B A added to W, in fp32; its trainer.pt has A and B, and the run
goes on from these and the W that it began with. Source: Hu et al. 2021; the factor 2 is peft's
common choice, lora_alpha = 2 * rank.
"""

import torch

LAYERS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
BASE = ".base_layer.weight"  # peft's name for W


def add_adapters(model, rank):
    """Put A and B beside the matrices of a FutureL1, in place; nothing else is trained -> model.

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
    return model


def adapters(model):
    """{name: A or B}: all that is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def put_adapters(model, saved):
    """A checkpoint's A and B, {name: tensor}, back in place."""
    with torch.no_grad():
        for name, p in adapters(model).items():
            p.copy_(saved[name])


def adapted_layers(model):
    """{name: peft's layer}."""
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def frozen_alone(model):
    """-> what runs a function of the model as it began, without A and B: f -> f(model)."""
    layers = adapted_layers(model).values()

    def run(function):
        for layer in layers:
            layer.enable_adapters(False)
        try:
            return function(model)
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    return run


def merged(model, weights):
    """Weights of an adapted model {name: tensor} -> a plain one's on the host, 2 B A added to W."""
    layers, plain = adapted_layers(model), {}
    for name, W in weights.items():
        if ".lora_" in name:
            continue
        if name.endswith(BASE):
            name = name.removesuffix(BASE)
            W = W.cpu().float() + layers[name].get_delta_weight("default").detach().cpu()
            name += ".weight"
        plain[name] = W
    return plain
