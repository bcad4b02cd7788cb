"""One clip or picture, one question, one streamed answer, and a strip of what was imagined.

    python sample.py              # asks the shipped toy model about a shipped clip (taste/)
    python sample.py --list       # lists its questions; --ask 5 asks the fifth
    python sample.py --model DIR --video clip.mp4 --question "What happens next?"
    python sample.py --model DIR --image photo.jpg --question "What happens next?"

The strip shows what was seen, a picture for each span, and the key frames that really came. Spans
can be painted if the model has a painter (python -m common.painter teaches one).
"""

import os
from dataclasses import dataclass, fields, replace

import torch

from common.cli import run_script
from common.clips import ClipError, film
from common.folder import trained_with
from common.formats import Clip, Frame, Row, answer_of, read_rows
from common.machine import Machine
from common.painter import coming, write_strip
from data import DataConfig, at_least, encode
from latent_decode import ask
from rewards import span_lengths

# the shipped model of half a million weights, with two clips and eight questions
TASTE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "taste")


@dataclass
class Config(DataConfig):
    model: str = ""  # a model folder, or a run's folder (its newest checkpoint)
    video: str = ""  # the clip
    image: str = ""  # a picture to ask about, in place of a clip
    question: str = ""  # what to ask
    # show these key frames (1..8) as pictures, as in training, e.g. 3,4; "" = the clip as a video
    key_frames: str = ""
    list: bool = False  # show the shipped questions
    ask: int = 6  # the shipped question to ask, if no model, video, image and question are given
    strip: str = "imagined.png"  # where the strip goes; "" = no strip
    max_new_tokens: int = 2048  # paper sec. 4
    max_latents: int = 8  # longest span; a trained folder brings its own  # official
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0  # with a temperature: the smallest set of words that has this probability
    seed: int = 0  # of the sampling

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "max_new_tokens")


# ------------------------------------------------------------------------------- the question


def shipped(config, number):
    """Question `number` of taste/ -> its Row, and config with the shipped model and its settings.

    Raises SystemExit if there is no such question.
    """
    rows = read_rows(os.path.join(TASTE, "questions.jsonl"))
    if not 1 <= number <= len(rows):
        raise SystemExit(f"--ask takes 1 to {len(rows)}, found {number} (--list shows them)")
    model, names = os.path.join(TASTE, "model"), {field.name for field in fields(config)}
    settings = dict(trained_with(model), model=model)
    settings = {name: value for name, value in settings.items() if name in names}
    return rows[number - 1], replace(config, **settings)


def list_questions():
    """The shipped questions as text, one a line."""
    lines = []
    for number, row in enumerate(read_rows(os.path.join(TASTE, "questions.jsonl")), 1):
        frames = [part for part in row.prompt if isinstance(part, Frame)]
        clip = os.path.relpath(frames[0].source, os.path.dirname(TASTE))
        seen = ",".join(str(frame.index) for frame in frames)
        lines.append(f"{number}  {clip}, key frames {seen}: {row.question}\n")
    return "".join(lines)


def row_of(config):
    """The clip or picture and the question as a Row. Raises SystemExit for bad input."""
    source = config.image or config.video
    for name, value in dict(model=config.model, video=source, question=config.question).items():
        if not value:
            raise SystemExit(f"--{name} is missing")
    if config.image and (config.video or config.key_frames):
        raise SystemExit("--image goes without --video and --key_frames")
    numbers = [n.strip() for n in config.key_frames.split(",") if n.strip()]
    if not all(n in "12345678" and len(n) == 1 for n in numbers):
        raise SystemExit(f"--key_frames takes numbers from 1 to 8, found {config.key_frames!r}")

    frames = [Frame(source, int(n)) for n in numbers]
    seen = [Frame(source)] if config.image else frames or [Clip(source)]
    row = Row("the question", "", [*seen, config.question], coming(frames), "", config.question)
    try:
        film(row)  # refuse an unreadable file before the model is loaded
    except ClipError as e:
        raise SystemExit(f"--{'image' if config.image else 'video'}: {e}") from e
    return row


# -------------------------------------------------------------------------------- the answer


class Stream:
    """Writes an answer while it is generated: words as text, a span as [span 1: 4 latents]."""

    def __init__(self, tokenizer, config, write):
        self.tokenizer, self.config, self.write = tokenizer, config, write
        self.words, self.shown = [], ""  # tokens since the last span, and their text so far
        self.spans, self.latents, self.ended = 0, 0, False

    def __call__(self, tokens):
        """Write the next tokens (1, k). `generate` calls this as it goes."""
        for token in tokens[0].tolist():
            if self.ended:
                return
            if token == self.config.latent_start_id:
                self.words, self.shown = [], ""
                self.spans, self.latents = self.spans + 1, 0
                self.write(f"\n[span {self.spans}: ")
            elif token == self.config.latent_id:
                self.latents += 1
            elif token == self.config.latent_end_id:
                self.write(f"{self.latents} latent{'s' * (self.latents != 1)}]\n")
            else:
                self.words.append(token)
                text = self.tokenizer.decode(self.words, skip_special_tokens=True)
                text = text.rstrip("\ufffd")  # half a character waits for its other half
                self.write(text[len(self.shown) :])
                self.shown = text
                self.ended = self.tokenizer.convert_ids_to_tokens(token) == "<|im_end|>"


def main(config, write=lambda text: print(text, end="", flush=True)):
    """Answer one question, streaming to `write` -> the answer, or None without an <answer>."""
    if config.list:
        return write(list_questions())
    if config.model or config.video or config.image or config.question:
        row = row_of(config)
    else:
        row, config = shipped(config, config.ask)
    model, tokenizer = Machine().load(config.model)

    # the answer, greedy or sampled with a seed
    write(f"{row.question}\n\n")
    rollout, [tokens], [text] = ask(
        model,
        tokenizer,
        [encode(row, tokenizer, config, train=False)],
        max_new_tokens=config.max_new_tokens,
        max_latents=config.max_latents,
        temperature=config.temperature,
        top_p=config.top_p,
        generator=torch.Generator().manual_seed(config.seed),
        stream=Stream(tokenizer, model.config, write),
    )
    answer = answer_of(text)
    if answer is None:
        finish = rollout.finish[0]
        write(f"\n\nno answer: the response ended by {finish} without a closed <answer>\n")
    else:
        write(f"\n\nanswer: {answer}\n")
    if row.answer:
        write(f"what came: {row.answer}\n")

    # the strip: what each span imagined
    if config.strip:
        path = config.strip if os.path.splitext(config.strip)[1] else config.strip + ".png"
        lengths = span_lengths(tokens, model.config.latent_start_id, model.config.latent_id)
        spans = rollout.latents[0].split(lengths)
        write(write_strip(path, model, row, spans, answer, config.budgets.future) + "\n")
    return answer


if __name__ == "__main__":
    run_script(main, Config)
