"""One clip, one question, one streamed answer, and what was imagined as a strip of pictures.

    python sample.py              # the shipped toy model, about a shipped clip (taste/)
    python sample.py --list       # its questions; --ask 5 asks the fifth
    python sample.py --model DIR --video clip.mp4 --question "What happens next?"

The strip shows what was seen, a picture for each span, and the key frames that really came. Spans
are painted if the model has a painter beside it (python -m tools.pictures teaches one).
"""

from dataclasses import dataclass

import torch

from common.cli import run_script
from common.clips import ClipError, key_frame_positions, read_clip
from common.formats import Clip, Frame, Row, answer_of
from common.pictures import coming, write_strip
from common.runs import Machine
from common.stream import streamer
from common.taste import list_questions, shipped
from data import DataConfig, at_least, encode
from latent_decode import ask
from rewards import span_lengths


@dataclass
class Config(DataConfig):
    model: str = ""  # a model folder, or a run's folder (its newest checkpoint)
    video: str = ""  # the clip
    question: str = ""  # what to ask about it
    # show these key frames (1..8) as pictures, as in training, e.g. 3,4; "" = the clip as a video
    key_frames: str = ""
    list: bool = False  # show the shipped questions
    ask: int = 2  # which of them to ask, where no model, video and question are given
    strip: str = "imagined.png"  # where the pictures go; "" = no pictures
    max_new_tokens: int = 2048  # paper sec. 4
    max_latents: int = 8  # longest span: 2 * l_max  # official
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0  # with a temperature: the smallest set of words that has this probability
    seed: int = 0  # of the sampling

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "max_new_tokens")


def row_of(config):
    """The clip and the question as a Row. Raises SystemExit for what cannot be used."""
    for name in ("model", "video", "question"):
        if not getattr(config, name):
            raise SystemExit(f"--{name} is missing")
    numbers = [n.strip() for n in config.key_frames.split(",") if n.strip()]
    if not all(n in "12345678" and len(n) == 1 for n in numbers):
        raise SystemExit(f"--key_frames takes numbers from 1 to 8, found {config.key_frames!r}")
    try:
        read_clip(config.video, key_frame_positions)
    except ClipError as e:
        raise SystemExit(f"--video: {e}") from e
    seen = [Frame(config.video, int(n)) for n in numbers]
    prompt = [*(seen or [Clip(config.video)]), config.question]
    return Row("the question", "", prompt, coming(seen), "", config.question)


def main(config, write=lambda text: print(text, end="", flush=True)):
    """Answer one question about one clip, streaming -> the answer or None."""
    if config.list:
        return write(list_questions() + "\n")
    if config.model or config.video or config.question:
        row = row_of(config)  # what cannot be used is refused before the load
    else:
        row, config = shipped(config, config.ask)
    machine = Machine()
    model, tokenizer = machine.load(config.model)
    sample = encode(row, tokenizer, config, train=False)

    limits = dict(max_new_tokens=config.max_new_tokens, max_latents=config.max_latents)
    draws = dict(temperature=config.temperature, top_p=config.top_p)
    draws.update(generator=torch.Generator().manual_seed(config.seed))
    write(f"{row.question}\n\n")
    stream = streamer(tokenizer, model.config, write)
    how = dict(**limits, **draws, stream=stream)
    rollout, [tokens], [text] = ask(model, tokenizer, [sample], **how)

    answer = answer_of(text)
    missing = f"no answer: the response ended by {rollout.finish[0]} without a closed <answer>"
    write(f"\n\n{missing if answer is None else f'answer: {answer}'}\n")
    write(f"what came: {row.answer}\n" if row.answer else "")
    if config.strip:
        lengths = span_lengths(tokens, model.config.latent_start_id, model.config.latent_id)
        spans = rollout.latents[0].split(lengths)
        write(write_strip(config.strip, model, row, spans, answer, config.budgets[1]) + "\n")
    return answer


if __name__ == "__main__":
    run_script(main, Config)
