"""Turn a trained model into a folder to give away: bf16 weights, processors, a model card.

    python -m tools.export runs/rl --out exported --name my-future-l1

The folder is half as large as a checkpoint and has no optimizer state. It holds the painter, if the
model has one, and custom_generate/, with which transformers' own Qwen3-VL imagines. README.md, from
tools/model_card.md.jinja, says how to use the model, what it was made from and how it scored.
`hf upload NAME exported` would publish it.
"""

import json
import os
import shutil
from dataclasses import dataclass

import torch
from jinja2 import Template

from common.cli import run_script
from common.folder import complete, newest, one_line_if_missing, trained_with
from model import load

SHOWN = ("n", "accuracy", "strict", "official", "chain", "answer", "average")  # scores on the card


@dataclass
class Config:
    model: str = ""  # a model's folder or a run's folder (its newest checkpoint)
    out: str = ""  # the folder to write; it must be empty or not exist
    name: str = ""  # the model's name on its card; "" = the name of `out`
    base: str = ""  # the hub id of the base model, if the folder does not know it
    licence: str = ""  # such as apache-2.0, for the card
    evals: str = ""  # folders of evaluations whose scores the card shows, separated by commas


def card(about, scores, config, decoded_by=None):
    """The text of README.md.

    about: the content of future_l1.json. scores: {benchmark: scores}. decoded_by: config.json's,
    the file that decodes this model if latent_decode.py does not.
    """
    path = os.path.join(os.path.dirname(__file__), "model_card.md.jinja")
    with open(path, encoding="utf-8") as f:
        template = Template(f.read(), trim_blocks=True, keep_trailing_newline=True)
    name = config.name or os.path.basename(os.path.normpath(config.out))
    base = config.base or about.get("base", "unknown")
    facts = dict(name=name, base=base, licence=config.licence, scores=scores, figures=figures)
    system = json.dumps(about.get("system", ""), ensure_ascii=False)
    return template.render(about=about, system=system, decoded_by=decoded_by, **facts)


def figures(values):
    """{name: number or None} -> "name number, ..." without those that are None."""
    return ", ".join(f"{name} {v:.4g}" for name, v in values.items() if v is not None)


def export(config):
    """Write the folder. Raises SystemExit if there is no model, or `out` is not empty."""
    source = newest(config.model)
    if not config.out:
        raise SystemExit("--out is missing: the folder to write")
    if os.path.isdir(config.out) and os.listdir(config.out):
        raise SystemExit(f"{config.out} is not empty: choose another --out")

    # weights, tokenizer, processors, settings, painter
    with one_line_if_missing(source):
        model, tokenizer = load(source, dtype=torch.bfloat16)
    model.save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)
    about = trained_with(source)
    complete(config.out, source, about)
    painter = os.path.join(source, "painter")
    if os.path.isdir(painter):
        shutil.copytree(painter, os.path.join(config.out, "painter"))

    # the card, with the scores of evaluations
    scores = {}
    for folder in filter(None, config.evals.split(",")):
        with open(os.path.join(folder, "summary.json"), encoding="utf-8") as f:
            summary = json.load(f)
        name, found = summary["benchmark"] or os.path.basename(summary["data"]), summary["scores"]
        scores[name] = {k: found["all"][k] for k in SHOWN if k in found["all"]}
    with open(os.path.join(config.out, "README.md"), "w", encoding="utf-8") as f:
        f.write(card(about, scores, config, getattr(model.config, "decoded_by", None)))
    print(f"{config.out}: made from {source}")


if __name__ == "__main__":
    run_script(export, Config, positional="model")
