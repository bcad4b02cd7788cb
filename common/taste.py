"""The tiny trained model, two clips and eight questions that come with the repository: taste/."""

import dataclasses
import json
import os

from common.formats import Frame, read_rows

TASTE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "taste")


def questions():
    """The shipped questions as Rows, with their answers and what really came. Raises SystemExit."""
    path = os.path.join(TASTE, "questions.jsonl")
    if not os.path.exists(path):
        raise SystemExit(f"{path}: no such file; pass --model, --video and --question")
    return read_rows(path)


def list_questions():
    """The shipped questions, a line each, as text."""
    lines = []
    for number, row in enumerate(questions(), 1):
        frames = [part for part in row.prompt if isinstance(part, Frame)]
        clip = os.path.relpath(frames[0].source, os.path.dirname(TASTE))
        seen = ",".join(str(frame.index) for frame in frames)
        lines.append(f"{number}  {clip}, key frames {seen}: {row.question}")
    return "\n".join(lines)


def shipped(config, number):
    """Question `number` of the shipped ones -> its Row, config with the model and its settings."""
    rows = questions()
    if not 1 <= number <= len(rows):
        raise SystemExit(f"--ask takes 1 to {len(rows)}, found {number} (--list shows them)")
    model = os.path.join(TASTE, "model")
    with open(os.path.join(model, "future_l1.json"), encoding="utf-8") as f:
        settings = dict(json.load(f), model=model)
    names = {field.name for field in dataclasses.fields(config)}
    settings = {name: value for name, value in settings.items() if name in names}
    return rows[number - 1], dataclasses.replace(config, **settings)
