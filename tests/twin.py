"""The method once more, as slowly and plainly as it can be written: a second definition.

    weights, steps = sft(config)                   # supervised fine-tuning, Eq. (1)-(3)

Everything runs on the stock Qwen3-VL of transformers, one row or one rollout at a time: no batch,
no padding, no cache, no merged rollouts. Words are looped over one by one. Nothing is imported from
the project except how a record becomes a row and a row becomes token ids and patches. The tests in
test_twin_*.py run the real scripts and require the same weights, log lines and files.

A config is that of the real script; only its fields are read.

Axis letters: T tokens, N latents, D hidden, V vocabulary.
"""

import math
import os

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from common.formats import read_rows
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
    optimizer = adamw(model, config.lr, (config.beta1, config.beta2), config.weight_decay)

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
