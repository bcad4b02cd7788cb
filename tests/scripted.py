"""Evaluations whose model answers from a script, and the records they are asked."""

import io
import json
import shutil

import torch
from PIL import Image

import evaluate
import latent_decode
from common.benchmarks import CLIPS
from latent_decode import Rollout
from model import LATENT, LATENT_END, LATENT_START
from tests.conftest import frames

SPAN = f"{LATENT_START} {LATENT} {LATENT} {LATENT_END}"


def line(group, gold, strict, official, **more):
    found = dict(group=group, gold=gold, strict=strict, official=official)
    found.update(right=gold == strict, picked="ABCD".find(strict) if strict else None)
    return dict(found, **{"spans": 1, "latents": 2, "tokens": 10, **more})


FB = {
    "q0": f"<reason> one </reason> {SPAN} <answer> B </answer>",
    "q1": f"{SPAN} {SPAN} <answer> C </answer>",
    "q2": "<answer> it is B A </answer>",
    "q3": "<reason> B </reason>",
    "q4": "<answer> two </answer>",
}


def play(monkeypatch, tokenizer, script, module=latent_decode):
    """Let generate answer from the script: {"q0": response, ...}; latents are ones.

    -> what it is asked: (words of each prompt, batch, settings) of each call.
    """
    asked = []

    def generate(model, batch, **settings):
        prompts = [tokenizer.decode(ids).split() for ids in batch["input_ids"]]
        asked.append((prompts, batch, settings))
        texts = [script[next(w for w in words if w in script)] for words in prompts]
        ids = [tokenizer(f"{t}<|im_end|>", add_special_tokens=False).input_ids for t in texts]
        tokens = [torch.tensor(row) for row in ids]
        lengths = torch.tensor([len(t) for t in tokens])
        padded = torch.nn.utils.rnn.pad_sequence(tokens, True, tokenizer.pad_token_id)
        latents = [torch.ones(int((t == model.config.latent_id).sum()), 96) for t in tokens]
        return Rollout(padded, padded > 0, latents, padded * 0.0, ["eos"] * len(tokens), lengths)

    monkeypatch.setattr(module, "generate", generate)
    return asked


def settings(folder, out, **more):
    own = dict(model=str(folder / "model"), out=str(out), workers=0, batch=2, system="system")
    own.update(image_max_tokens=4, video_max_tokens=64, max_length=4000, max_new_tokens=40)
    return evaluate.Config(**{**own, **more})


def futurebench(folder):
    """Seven questions: hop1 right, hop1 wrong, hop2 right only officially, hop3 unparsed, hop5
    right, two bad clips.
    """
    kinds = "hop1", "hop1", "hop2", "hop3", "hop5", "hop5", "hop2"
    clips = "0.mp4", "1.mp4", "2.mp4", "0.mp4", "1.mp4", "gone.mp4", "broken.mp4"
    records = []
    for i, (kind, clip) in enumerate(zip(kinds, clips)):
        asked = dict(Question=f"what next ? q{i}", Answer="B")
        asked["Options"] = dict(A="one", B="two", C="it", D="is")
        path = f"any/video_dataset/{clip}"
        records.append(dict(id=f"x{i % 6}", question_type=kind, video_path=path, qa=asked))
    (folder / CLIPS).mkdir(exist_ok=True)
    for clip in ("0.mp4", "1.mp4", "2.mp4", "broken.mp4"):
        shutil.copy(folder / clip, folder / CLIPS / clip)
    (folder / "futurebench.json").write_text(json.dumps(records))
    return str(folder / "futurebench.json")


def png(seed):
    out = io.BytesIO()
    Image.fromarray(frames(1, 40, 64, seed)[0]).save(out, "PNG")
    return out.getvalue()
