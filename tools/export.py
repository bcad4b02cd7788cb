"""A trained model as a folder to give away: bf16 weights, processors, a model card. Ours.

    python -m tools.export runs/rl --out exported --name my-future-l1

The folder is half the size of a training's, has no trainer state, and says in README.md what it
was made from and what it scored. `huggingface-cli upload NAME exported` would publish it.
"""

import json
import os
from dataclasses import dataclass

import torch

from common.cli import run_script
from common.folder import add_scores, complete, newest, one_line_if_missing, trained_with
from model import load

CARD = """---
{head}---

# {name}

A video-language model that imagines before it predicts: between words it opens short spans of
latent visual imagination, its own states fed back in place of words
([arXiv 2606.05769](https://arxiv.org/abs/2606.05769)).

**It needs the Future-L1 scripts to imagine** (`python sample.py --model DIR --video clip.mp4
--question "..."`). {elsewhere}

What it was trained with, and how it has to be asked (system message, frames, pixel budgets), is in
`future_l1.json`; the scripts read it from there.

## Made from

Base model: {base}

{trainings}

## Scores

{scores}

## Licence

{licence}
"""


@dataclass
class Config:
    model: str = ""  # a model's folder or a run's folder (its newest checkpoint)
    out: str = ""  # the folder to write; it must not hold anything yet
    name: str = ""  # of the model, on its card; "" = the name of `out`
    base: str = ""  # the base model's hub id, where the folder does not know it
    licence: str = ""  # such as apache-2.0, in the card
    evals: str = ""  # folders of evaluations whose scores are added, separated by commas


ELSEWHERE = """Transformers' Qwen3-VL, vLLM and others load the folder too, but they feed a
span the embedding of `<|latent|>` and so run without imagination."""
VARIANT = "It is a variant (`variants/{}.py`): others do not load it, or not all of it."


def card(about, config, variant=None):
    """future_l1.json's content -> the text of README.md. variant: the name in the config."""
    base = config.base or about.get("base", "unknown")
    head = ["library_name: transformers", "pipeline_tag: video-text-to-text"]
    head += [f"base_model: {base}"] if "/" in base else []
    head += [f"license: {config.licence}"] if config.licence else []
    head += ["tags: [future-l1, video-event-prediction, latent-reasoning]"]
    trainings = "| training | data | steps | figures at its end | commit |\n|---|---|---|---|---|"
    for t in about.get("trainings", []):
        figures = ", ".join(f"{k} {v:.4g}" for k, v in t["figures"].items() if v is not None)
        trainings += f"\n| {t['name']} | {t['data']} | {t['step']} | {figures} | {t['commit']} |"
    scores = "| benchmark | scores |\n|---|---|"
    for name, values in about.get("scores", {}).items():
        text = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
        scores += f"\n| {name} | {text} |"
    unknown = "Not stated. The base model's licence and that of the data apply."
    return CARD.format(
        head="".join(line + "\n" for line in head),
        name=config.name or os.path.basename(os.path.normpath(config.out)),
        elsewhere=VARIANT.format(variant) if variant else ELSEWHERE,
        base=base,
        trainings=trainings if about.get("trainings") else "Trainings: not recorded.",
        scores=scores if about.get("scores") else "None recorded.",
        licence=config.licence or unknown,
    )


def export(config):
    """Write the folder. Raises SystemExit if there is no model, or `out` is not empty."""
    source = newest(config.model)
    if not config.out:
        raise SystemExit("--out is missing: the folder to write")
    if os.path.isdir(config.out) and os.listdir(config.out):
        raise SystemExit(f"{config.out} is not empty: choose another --out")

    # weights, tokenizer, processors; future_l1.json
    with one_line_if_missing(source):
        model, tokenizer = load(source, dtype=torch.bfloat16)
    model.save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)
    complete(config.out, source, {"scores": {}, **trained_with(source)})
    for folder in filter(None, config.evals.split(",")):
        add_evaluation(config.out, folder)

    # the card
    with open(os.path.join(config.out, "README.md"), "w", encoding="utf-8") as f:
        f.write(card(trained_with(config.out), config, getattr(model.config, "variant", None)))
    size = sum(os.path.getsize(os.path.join(config.out, n)) for n in os.listdir(config.out))
    print(f"{config.out}: {size / 1e6:,.1f} MB, made from {source}")


def add_evaluation(out, folder):
    """The scores of an evaluation's folder -> future_l1.json of `out`."""
    with open(os.path.join(folder, "summary.json"), encoding="utf-8") as f:
        summary = json.load(f)
    name = summary["benchmark"] or os.path.basename(summary["data"])
    add_scores(out, name, summary["scores"]["all"])


if __name__ == "__main__":
    run_script(export, Config, positional="model")
