"""One clip, one question, one streamed answer.

python sample.py --model DIR --video clip.mp4 --question "What happens next?"
"""

from dataclasses import dataclass

import torch

from common.clips import ClipError, key_frame_positions, read_clip
from common.flags import run_script
from common.formats import Clip, Frame, Row, answer_of
from common.runs import Machine
from data import DataConfig, at_least, collate, encode, model_inputs, to_device
from latent_decode import generate


@dataclass
class Config(DataConfig):
    model: str = ""  # a model folder, or a run's folder (its newest checkpoint)
    video: str = ""  # the clip
    question: str = ""  # what to ask about it
    # show these key frames (1..8) as pictures, as in training, e.g. 3,4; "" = the clip as a video
    key_frames: str = ""
    max_new_tokens: int = 2048  # paper sec. 4
    max_latents: int = 8  # longest span: 2 * l_max  # official
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0  # with a temperature: the smallest set of words that has this probability
    seed: int = 0  # of the sampling

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "max_new_tokens")


def streamer(tokenizer, config, write):
    """-> a function for generate's `stream` that writes one row as it comes. Source: ours.

    Words are written as text, a span as [span 1: 4 latents].
    """
    words, shown, spans, latents, ended = [], "", 0, 0, False

    def feed(tokens):
        nonlocal words, shown, spans, latents, ended
        for token in tokens[0].tolist():
            if ended:
                return
            if token == config.latent_start_id:
                words, shown, spans, latents = [], "", spans + 1, 0
                write(f"\n[span {spans}: ")
            elif token == config.latent_id:
                latents += 1
            elif token == config.latent_end_id:
                write(f"{latents} latents]\n")
            else:
                words.append(token)
                text = tokenizer.decode(words, skip_special_tokens=True)
                text = text.rstrip("\ufffd")  # half a character waits
                write(text[len(shown) :])
                shown, ended = text, tokenizer.convert_ids_to_tokens(token) == "<|im_end|>"

    return feed


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
    seen = [Frame(config.video, int(n)) for n in numbers] or [Clip(config.video)]
    return Row("the question", "", [*seen, config.question], [], "")


def main(config, write=lambda text: print(text, end="", flush=True)):
    """Answer one question about one clip, streaming -> the answer or None."""
    row, machine = row_of(config), Machine()  # what cannot be used is refused before the load
    model, tokenizer = machine.load(config.model)
    sample = encode(row, tokenizer, config, train=False)
    batch = collate([sample], tokenizer.pad_token_id or 0, side="left")
    inputs = model_inputs(to_device(batch, machine.device))

    limits = dict(max_new_tokens=config.max_new_tokens, max_latents=config.max_latents)
    draws = dict(temperature=config.temperature, top_p=config.top_p)
    draws.update(generator=torch.Generator().manual_seed(config.seed))
    stream = streamer(tokenizer, model.config, write)
    rollout = generate(model, inputs, **limits, **draws, stream=stream)

    answer = answer_of(tokenizer.decode(rollout.tokens[0, : rollout.lengths[0]]))
    missing = f"no answer: the response ended by {rollout.finish[0]} without a closed <answer>"
    write(f"\n\n{missing if answer is None else f'answer: {answer}'}\n")
    return answer


if __name__ == "__main__":
    run_script(main, Config)
