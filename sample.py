"""One clip, one question, one streamed answer.

python sample.py --model DIR --video clip.mp4 --question "What happens next?"
"""

from dataclasses import dataclass

import torch

from common.clips import ClipError, key_frame_positions, read_clip
from common.formats import Clip, Frame, Row, answer_of
from common.runs import newest, parse_config
from data import DataConfig, collate, encode, model_inputs, to_device
from latent_decode import generate
from model import best_attention, load


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


def streamer(tokenizer, config, write):
    """-> a function for generate's `stream` that writes a row's words as they come, [span 1: 4
    latents] for a span. Ours.
    """
    words, shown, spans, latents, ended = [], "", 0, 0, False

    def feed(tokens):
        nonlocal shown, spans, latents, ended
        for token in tokens[0].tolist() if not ended else []:
            if token == config.latent_id:
                latents += 1
            elif token == config.latent_end_id:
                write(f"{latents} latents]\n")
            elif token == config.latent_start_id:
                spans, latents, words[:], shown = spans + 1, 0, [], ""
                write(f"\n[span {spans}: ")
            else:
                ended = ended or tokenizer.convert_ids_to_tokens(token) == "<|im_end|>"
                words.append(token)
                text = tokenizer.decode(words, skip_special_tokens=True).rstrip(
                    "\ufffd"
                )  # half a character waits
                write(text[len(shown) :])
                shown = text
            if ended:
                break

    return feed


def main(config, write=lambda text: print(text, end="", flush=True)):
    """Answer one question about one clip, streaming -> the answer or None.

    Raises SystemExit for what cannot be used.
    """
    for name in ("model", "video", "question"):
        if not getattr(config, name):
            raise SystemExit(f"--{name} is missing")
    numbers = [n.strip() for n in config.key_frames.split(",") if n.strip()]
    if not all(n in "12345678" and len(n) == 1 for n in numbers):
        raise SystemExit(
            f"--key_frames takes numbers from 1 to 8, e.g. 3,4; found {config.key_frames!r}"
        )
    try:
        read_clip(config.video, key_frame_positions)  # before the weights are loaded
    except ClipError as e:
        raise SystemExit(f"--video: {e}") from e
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    seen = [Frame(config.video, int(n)) for n in numbers] or [Clip(config.video)]
    row = Row("the question", "", [*seen, config.question], [], "")
    model, tokenizer = load(
        newest(config.model),
        dtype=dtype,
        attn_implementation=best_attention() if device.type == "cuda" else "sdpa",
    )
    model.to(device).eval()
    batch = collate(
        [encode(row, tokenizer, config, train=False)], tokenizer.pad_token_id or 0, side="left"
    )
    rollout = generate(
        model,
        model_inputs(to_device(batch, device)),
        max_new_tokens=config.max_new_tokens,
        max_latents=config.max_latents,
        temperature=config.temperature,
        top_p=config.top_p,
        generator=torch.Generator().manual_seed(config.seed),
        stream=streamer(tokenizer, model.config, write),
    )
    answer = answer_of(tokenizer.decode(rollout.tokens[0, : rollout.lengths[0]]))
    write(
        f"\n\nanswer: {answer}\n"
        if answer is not None
        else f"\n\nno answer: the response ended by {rollout.finish[0]} without a closed <answer>\n"
    )
    return answer


if __name__ == "__main__":
    main(parse_config(Config))
