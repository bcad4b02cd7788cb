# %% [markdown]
# # One clip, all the way through
#
# From pixels to tokens, latents, pictures, loss, reward and update, with the tiny model of
# `taste/`. VS Code opens this file as a notebook as it is, Jupyter with jupytext; or run it as a
# script: `python docs/walkthrough.py`. Every cell prints the shapes it made.
#
# Axis letters: B rows, T tokens, N latents, D hidden, P patches, R rollouts, V vocabulary.

# %% Where the repository is
import sys
from pathlib import Path

here = Path(globals().get("__file__", "notebook")).resolve()
ROOT = next(folder for folder in here.parents if (folder / "taste").is_dir())
sys.path.insert(0, str(ROOT))

import torch

# %% A question about a clip: two key frames are shown, three are to come
from data import DataConfig
from sample import shipped

row, settings = shipped(DataConfig(), number=7)
print(row.question, row.options, "->", row.answer)
print([part for part in row.prompt if not isinstance(part, str)])
print([part for part in row.response if not isinstance(part, str)])

# %% Pixels: a clip has a pool of eight key frames, wherever it is long
from common.clips import key_frame_positions, read_clip

clip = row.prompt[0].source
frames, numbers, fps = read_clip(clip, key_frame_positions)
print(frames.shape, "frames", numbers, f"at {fps:.0f} a second")

# %% Pixels to patches: 16 x 16 pixels, two frames deep; 2 x 2 patches are one token
from common.clips import resize_and_patchify

image_budget, future_budget, _ = settings.budgets
patches, grid = resize_and_patchify(frames[2:3], *image_budget)
print("patches (P, 1536)", tuple(patches.shape), "grid (t, h, w)", grid.tolist())

# %% Patches to a visual token, e* of Eq. (3): vision tower and merger, frozen
from model import load

folder = str(ROOT / "taste" / "model")
model, tokenizer = load(folder)
model.eval()
e = model.encode_frames(patches, grid[None])
print("e* (N, D)", tuple(e.shape))

# %% Words to tokens: the prompt as the model sees it
from data import collate, encode, model_inputs

sample = encode(row, tokenizer, settings, train=False)
prompt = model_inputs(collate([sample], tokenizer.pad_token_id, side="left"))
print({name: tuple(tensor.shape) for name, tensor in prompt.items()})
print(tokenizer.decode(sample["ids"]))

# %% Decoding, section 3.1 to the letter: inside a span the state itself is fed back
from latent_decode import decode_slowly

tokens, latents = decode_slowly(model, prompt, max_new_tokens=48, eos=[tokenizer.eos_token_id])
print("latents (N, D)", tuple(latents.shape))
print(tokenizer.decode(tokens))

# %% The same, fast: the caches, many prompts, samples, streaming are in `generate`
from latent_decode import generate

rollout = generate(model, prompt, max_new_tokens=48)
assert rollout.tokens[0, : rollout.lengths[0]].tolist() == tokens
assert torch.allclose(rollout.latents[0], latents, atol=1e-4)
print("the same tokens, and the same latents within 1e-4")

# %% Latents to pictures: a painter that has only ever seen true frames
from common.painter import Painter, paint, write_strip
from rewards import span_lengths

c = model.config
lengths = span_lengths(tokens, c.latent_start_id, c.latent_id)
painter = Painter.beside(folder)
spans = latents.split(lengths)
pictures = paint(painter, row, spans, future_budget)
print("spans of", lengths, "latents ->", [picture.shape for picture in pictures])
print(write_strip("imagined.png", model, row, spans, row.answer, future_budget))

# %% How near is each latent to the frame that really came?
future = [part for part in row.response if not isinstance(part, str)]
for n, (z, frame) in enumerate(zip(latents, future), 1):
    patches, grid = resize_and_patchify(frames[frame.index - 1 : frame.index], *future_budget)
    true = model.encode_frames(patches, grid[None])[0]
    print(n, f"cosine {torch.cosine_similarity(z, true, dim=0):.3f}")

# %% Learning from an annotated clip, Eq. (1)-(3): words by cross-entropy, latents by distance to e*
from sft import sft_loss

batch = collate([encode(row, tokenizer, settings)], tokenizer.pad_token_id)
e = model.encode_frames(batch["future_pixel_values"], batch["future_grid_thw"])
parts = sft_loss(model, labels=batch["labels"], latents=e, lam=0.1, **model_inputs(batch))
print("e* (N, D)", tuple(e.shape), "labels (B, T)", tuple(batch["labels"].shape))
print({name: f"{value:.4f}" for name, value in parts.items()})

# %% Learning from answers: eight rollouts of one prompt
torch.manual_seed(0)
draws = dict(temperature=2.0, generator=torch.Generator().manual_seed(0))
group = generate(model, prompt, max_new_tokens=48, max_latents=2, n=8, **draws)
texts, spans_of = [], []
for tokens, length in zip(group.tokens, group.lengths):
    tokens = tokens[:length].tolist()
    texts.append(tokenizer.decode(tokens))
    spans_of.append(span_lengths(tokens, c.latent_start_id, c.latent_id))
print("tokens (R, T)", tuple(group.tokens.shape), "latents", [len(z) for z in group.latents])

# %% Rewards, Eq. (4)-(7), and what is better than the group's mean
from la_dapo import group_advantages
from rewards import score_group

rewards = score_group(texts, group.latents, spans_of, row.answer, row.options)
A = group_advantages(rewards["total"])
for text, accuracy, total, a in zip(texts, rewards["accuracy"], rewards["total"], A.tolist()):
    print(f"R_acc {accuracy:.0f}  R {total:.3f}  A {a:+.2f}  ...{text[-60:]}")

# %% The update: feed the rollouts again, latents included; clip; gradient through the latents
from la_dapo import adjoint_loss, clipped_surrogate
from latent_decode import replay

again = replay(model, prompt, group, temperature=2.0)
print("log-probabilities (R, T)", tuple(again.logprobs.shape))
print(f"as decoded, within {(again.logprobs - group.logprobs).abs().max():.1e}")
surrogate, ratio = clipped_surrogate(again.logprobs, group.logprobs, A[:, None])
loss = (surrogate * group.sampled).sum() / group.sampled.sum()
longest = max(len(z) for z in group.latents)
through = adjoint_loss(loss, again.predicted, again.latents, longest) if longest else 0.0
(loss + through).backward()
norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
print(f"loss {loss.item():.4f}, norm of the gradient {norm:.4f}")

# %% One step: what was better becomes likelier
torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0).step()
with torch.no_grad():
    moved = replay(model, prompt, group, temperature=2.0).logprobs
change = ((moved - again.logprobs) * group.sampled).sum(1)
for a, d in zip(A.tolist(), change.tolist()):
    print(f"A {a:+.2f}  log-probability {d:+.4f}")
