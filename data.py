"""Formats, clips and batches: from a JSON record and an mp4 file to the tensors the model takes.

    record --read_rows--> Row --encode--> ids, patches --collate--> batch

A Row (common/formats.py) is a record in the one form that all formats are read into:
    prompt      the user turn: texts, Frames (pictures) and Clips (whole videos), in their order
    response    the assistant turn: texts (reasoning steps) and Frames (futures to imagine), which
                row.futures lists; the answer is not in it
    answer, question, options    texts; options is None where the record has none
    where, id, group             "file:index" for messages; the key of results; a table's column
Wherever a row or a sample can be unusable, a Skipped(where, why) stands in its place.

Nothing here knows about training or generation; the scripts differ only in the arguments they pass.

docs/data.md shows a record of each format; common/formats.py tells them apart by their keys:
    future-l1    video, image, reasoning_image, conversations, answer; training JSON. Or observed
                 and future in place of image and reasoning_image: a clip, and moments after it
    twiff        video, question, answer, question_images_index, ...; TwiFF-2.7M, Future-L1-50K
    twiff-bench  the same plus question_images, reasoning_images
    futurebench  id, question_type, video_path, qa {Question, Options, Answer}
    rl           problem, answer, images | videos; generic RL rows, with options or without
    mcq          question, options, answer, video; generic multiple choice
The last three show a row's options to the model. In the others `options` only says which answers
there are, unless --show_options is `always`.

The chat layout (ours; special tokens in angle bars):
    <|im_start|>system SYSTEM<|im_end|> <|im_start|>user ... <|im_end|> <|im_start|>assistant
    <reason>text 0</reason> <|latent_start|> <|latent|>*N <|latent_end|> <reason>text 1</reason> ...
    <answer>A</answer><|im_end|>

Where this differs from the paper and the official code:
 1. Key frames lie at midpoints in training, RL and evaluation alike (official: midpoints in SFT,
    linspace in RL). Only a clip that enters as a *video* is sampled over its whole length, as
    Qwen3-VL's own processor does.
 2. A clip that cannot be read is skipped, counted and named, and so is a sample longer than
    `max_length`. Official drops it silently and can be left with an empty batch; here a batch
    without samples still takes its step, with weight 0.
 3. Text from data can never become a special token: "<|latent|>" in a question is read as plain
    characters. The system message names no special token for the same reason.
 4. The blocks of a response are tokenised one by one, so that removing the spans (text-only SFT)
    leaves every other token as it was. In Qwen's vocabulary ">" and what follows it would merge.
 5. The pixel budgets of observed images and of whole videos are ours, because the paper gives none.
    A picture may be as small as one token; Hugging Face's released settings would enlarge it to 64.

Axis letters: T frames, H and W pixels, P patches (before the 2x2 merge), B rows, L tokens.
"""

import dataclasses
import functools
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from common.ahead import read_ahead
from common.clips import (
    CELL,
    MERGE,
    TEMPORAL,
    ClipError,
    cut_to,
    load_frames,
    normalise,
    read_uniform,
    stack,
)
from common.clips import key_frame_positions as key_frame_positions  # part of this file's surface
from common.clips import resize_and_patchify as resize_and_patchify
from common.formats import ASK_LETTER, Frame, RecordError, Skipped, option_lines, shows
from model import LATENT, LATENT_END, LATENT_START

SYSTEM = (
    "You answer questions about what happens next in a video. Work in two modes and switch between "
    "them freely. In words: put each step of your reasoning between <reason> and </reason>. In "
    "images: where picturing a coming frame helps, open a latent span and imagine it there before "
    "you go on. When you are sure, give the final answer between <answer> and </answer>."
)  # ours


def at_least(config, least, *names):
    """Raises ValueError if one of these fields of a config is below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} is {getattr(config, name)}, expected at least {least}")


class Budgets(NamedTuple):
    """Least and most pixels of an observed image, of a future frame, of all frames of a video."""

    image: tuple
    future: tuple
    video: tuple


@dataclasses.dataclass
class DataConfig:
    """The part of every script's config that decides what the model sees."""

    # frames sampled from a clip that enters as a video  # paper Table 8 (FutureBench: 32)
    num_frames: int = 16
    # a future frame has at most l_max * 32 * 32 pixels: L_max latents for a square  # paper Table 8
    l_max: int = 4
    image_max_tokens: int = 256  # an observed picture has at most this many tokens  # ours
    video_max_tokens: int = 4096  # all temporal patches of a clip together  # ours
    # tokens of a sample; a longer one is skipped and counted  # paper Table 8
    max_length: int = 16384
    workers: int = 2  # background processes that decode ahead, each rank; 0 = none  # ours
    system: str = SYSTEM  # the system message  # ours
    # whether a prompt shows the row's options, auto | always | never; auto: mcq, futurebench and rl
    # rows do, the others do not  # ours
    show_options: str = "auto"
    max_bad: float = 0.05  # share of unusable records above which a run ends at its start  # ours

    def __post_init__(self):
        at_least(self, 1, "num_frames", "l_max", "image_max_tokens", "video_max_tokens")
        at_least(self, 1, "max_length")
        if self.show_options not in ("auto", "always", "never"):
            raise ValueError(
                f"show_options is {self.show_options!r}, expected auto, always or never"
            )

    @property
    def budgets(self):
        """The pixel budgets of these settings."""
        cell = CELL * CELL  # 32 x 32 pixels make a token; in a video it covers TEMPORAL = 2 frames
        # deviation 5: one token is the least, and the most of an image and a video is ours
        return Budgets(
            image=(cell, self.image_max_tokens * cell),
            future=(cell, self.l_max * cell),
            video=(cell, self.video_max_tokens * TEMPORAL * cell),
        )


class Special(str):
    """A string that is one token of the tokenizer, not text."""


def encode(row, tokenizer, config, train=True, spans=True, futures=False):
    """Row -> dict of ids, labels and patches, ready for `collate`.

    train: True encodes prompt and response, with labels; False encodes the prompt alone. futures:
    True decodes the future frames without train, too, for a reward that reads them. spans: False
    drops the latent spans and leaves every other token (text-only SFT). Labels: all response tokens
    but `<|latent|>`, incl. `<|im_end|>`. Raises ClipError for media, RecordError for a sample over
    max_length. Source: chat layout above, sec. 3.2.
    """
    pieces, images, videos = _prompt(row, config, all_eight=train or futures)
    ids, loaded = tokenize(pieces, tokenizer), []
    labels = [-100] * len(ids)
    response = [part for part in row.response if spans or isinstance(part, str)]
    if train or futures:
        frames = [part for part in response if isinstance(part, Frame)]
        loaded = load_frames(frames, config.budgets.future)
    if train:
        latent = tokenizer.convert_tokens_to_ids(LATENT)
        # deviation 4: block by block, so that no token reaches from one into the next
        for block in _blocks(response, row.answer, loaded):
            new = tokenize(block, tokenizer)
            ids += new
            labels += [-100 if token == latent else token for token in new]
    if len(ids) > config.max_length:
        raise RecordError(
            f"{row.where}: {len(ids)} tokens, more than max_length = {config.max_length}"
        )
    return dict(ids=ids, labels=labels, images=images, videos=videos, futures=loaded, row=row)


def shown_prompt(row, show_options):
    """A row's prompt, its options shown as DataConfig.show_options says. Source: ours.

    never: what the reader of the format appended is taken away, the letter instruction too; options
    that are part of the question's own text stay.
    """
    lines = option_lines(row.options or [])
    if show_options == "always" and not shows(row.question, row.options or []):
        return [*row.prompt, lines]
    if show_options == "never" and lines:
        own = [part for part in row.prompt if part != ASK_LETTER]
        return [part.removesuffix(lines) if isinstance(part, str) else part for part in own]
    return row.prompt


def unshown_options(rows, config):
    """A part of a run's first line: how many rows have options that their prompts do not show."""
    count = 0
    for row in rows:
        prompt = shown_prompt(row, config.show_options)
        text = "".join(part for part in prompt if isinstance(part, str))
        count += not shows(text, row.options or [])
    return f", {count} rows with options that are not shown" if count else ""


def _prompt(row, config, all_eight=True):
    """Row -> the pieces of its prompt, its images and its videos, (patches, grid) each.

    all_eight: see `load_frames`; questions about a clip often show the same frames.
    """
    prompt = shown_prompt(row, config.show_options)
    frames = [part for part in prompt if isinstance(part, Frame)]
    # deviation 1: midpoints, whichever script asks
    images = load_frames(frames, config.budgets.image, all_eight)
    videos, shown = [], iter(images)
    pieces = [Special("<|im_start|>"), "system\n" + config.system, Special("<|im_end|>"), "\n"]
    pieces += [Special("<|im_start|>"), "user\n"]
    for part in prompt:
        if isinstance(part, str):
            pieces.append(part)
        elif isinstance(part, Frame):
            _, grid = next(shown)
            pieces += visual("<|image_pad|>", grid)
        else:
            patches, grid, stamped = _video(part, config)
            videos.append((patches, grid))
            pieces += stamped
    pieces += [Special("<|im_end|>"), "\n", Special("<|im_start|>"), "assistant\n"]
    return pieces, images, videos


def _video(clip, config):
    """A Clip -> patches, grid, and pieces in which each two frames are announced by their time."""
    frames, _, seconds = read_uniform(clip, config.num_frames)
    patches, grid = cut_to(config.budgets.video, frames, clip.path)
    t, h, w = grid.tolist()
    pairs = np.append(seconds, seconds[-1])[: 2 * t].reshape(t, 2)  # an odd last frame is doubled
    pieces = []
    for first, second in pairs:
        pieces.append(f"<{(first + second) / 2:.1f} seconds>")
        pieces += visual("<|video_pad|>", np.array([1, h, w]))
    return patches, grid, pieces


def visual(token, grid):
    """The pieces of a picture: its placeholder tokens between the two markers."""
    pads = [Special(token)] * (int(grid.prod()) // MERGE**2)
    return [Special("<|vision_start|>"), *pads, Special("<|vision_end|>")]


def _blocks(response, answer, futures):
    """Yields the pieces of each block of a response; futures: (patches, grid) of its Frames."""
    grids = iter(grid for _, grid in futures)
    for part in response:
        if isinstance(part, str):
            yield [f"<reason>{part}</reason>"]
            continue
        n = int(next(grids).prod()) // MERGE**2
        yield [Special(LATENT_START), *[Special(LATENT)] * n, Special(LATENT_END)]
    yield [f"<answer>{answer}</answer>", Special("<|im_end|>")]


def tokenize(pieces, tokenizer):
    """Pieces -> ids. Neighbouring texts are joined first, as a chat template would join them."""
    ids = []
    for is_special, group in groupby(pieces, lambda piece: isinstance(piece, Special)):
        if is_special:
            ids += [tokenizer.convert_tokens_to_ids(token) for token in group]
        else:
            ids += _ids("".join(group), tokenizer)
    return ids


@functools.lru_cache(maxsize=2**14)
def _ids(text, tokenizer):
    """A text's ids. They are cached, because the template's pieces come again in every sample."""
    # deviation 3: "<|latent|>" in a text is characters, not a token
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


class Samples(Dataset):
    """Rows encoded on demand, in the loader's workers. A broken one becomes a Skipped.

    encoding: `encode`'s train, spans and futures.
    """

    def __init__(self, rows, tokenizer, config, **encoding):
        self.rows, self.tokenizer, self.config = rows, tokenizer, config
        self.encoding = encoding

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        try:
            return encode(self.rows[i], self.tokenizer, self.config, **self.encoding)
        except (ClipError, RecordError) as e:
            # deviation 2: named in the log, and left out
            return Skipped(self.rows[i].where, str(e))


def collate(samples, pad_id, side="right", raw=False):
    """Encoded samples -> a batch: HF-named tensors, and the samples and rows they were made of.

    input_ids, attention_mask, labels (B, L); pixel_values / image_grid_thw, pixel_values_videos /
    video_grid_thw, future_pixel_values / future_grid_thw where there are any. side: "left" to
    generate, "right" to train. `samples`, `rows`: the B that are in the batch; `kept`: their
    numbers among those given; `skipped`: the others. If every sample was skipped, a one-token row
    without a label stands in, so that each rank still takes its step. raw: patches stay bytes, a
    quarter of fp32's, until `to_device` normalises them.
    """
    kept = [i for i, sample in enumerate(samples) if not isinstance(sample, Skipped)]
    skipped = [sample for sample in samples if isinstance(sample, Skipped)]
    good = [samples[i] for i in kept]
    # deviation 2: without a sample, one token that has no label
    ids = [torch.tensor(s["ids"]) for s in good] or [torch.tensor([pad_id])]
    labels = [torch.tensor(s["labels"]) for s in good] or [torch.tensor([-100])]

    def pad(rows, value):
        return torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side=side)  # (B, L)

    batch = dict(input_ids=pad(ids, pad_id), labels=pad(labels, -100))
    batch["attention_mask"] = pad([torch.ones_like(x) for x in ids], 0)
    for medium, pixels, grids in (
        ("images", "pixel_values", "image_grid_thw"),
        ("videos", "pixel_values_videos", "video_grid_thw"),
        ("futures", "future_pixel_values", "future_grid_thw"),
    ):
        pairs = list(chain.from_iterable(sample[medium] for sample in good))
        if pairs:
            patches, batch[grids] = stack(pairs)  # (P, 1536), (images, 3)
            batch[pixels] = patches if raw else normalise(patches)
    rows = [sample["row"] for sample in good]
    return dict(batch, samples=good, rows=rows, kept=kept, skipped=skipped)


def to_device(batch, device):
    """Move a batch's tensors; lists stay. Patches that are bytes are normalised there."""
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    raw = {k: v for k, v in moved.items() if getattr(v, "dtype", None) == torch.uint8}
    return moved | {k: normalise(v) for k, v in raw.items()}


MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
MODEL_KEYS = ("input_ids", "attention_mask", *MEDIA)


def model_inputs(batch):
    """The part of a batch that the model's `forward` and `generate` take."""
    return {k: batch[k] for k in MODEL_KEYS if k in batch}


def loader(samples, batches, workers, **collate_arguments):
    """Yields `collate` of each list of indices, see `read_ahead`.

    Patches travel as bytes: what the workers have ready lies in shared memory.
    """
    how = functools.partial(collate, raw=True, **collate_arguments)
    return read_ahead(samples, batches, workers, how)
