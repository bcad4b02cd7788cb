"""Formats, clips and batches: from a JSON record and an mp4 file to the tensors the model takes.

    record --read_rows--> Row --encode--> ids, patches --collate--> batch

Nothing here knows about training or generation; the scripts differ only in the arguments they pass.

The record formats (told apart by their keys, `read_rows`):
    future-l1    video, image, reasoning_image, conversations, answer; training JSON
    twiff        video, question, answer, question_images_index, ...; TwiFF-2.7M, Future-L1-50K
    twiff-bench  the same plus question_images, reasoning_images
    futurebench  id, question_type, video_path, qa {Question, Options, Answer}
    rl           problem, answer, images | videos; generic RL rows
    mcq          question, options, answer, video; generic multiple choice

The chat layout (ours; special tokens in angle bars):
    <|im_start|>system SYSTEM<|im_end|> <|im_start|>user ... <|im_end|> <|im_start|>assistant
    <reason>text 0</reason> <|latent_start|> <|latent|>*N <|latent_end|> <reason>text 1</reason> ...
    <answer>A</answer><|im_end|>

Where this differs from the paper and the official code:
 1. Frames are taken at midpoints in training, RL and evaluation alike (official: midpoints in SFT,
    linspace in RL). Only a clip that enters as a *video* is sampled as Qwen3-VL's own processor
    does, linspace over the whole clip.
 2. A clip that decord refuses is read by PyAV; one that both refuse is skipped, counted and named,
    as is a sample longer than `max_length`. Official drops it silently and can leave an empty
    batch; here an empty batch steps with weight 0.
 3. Text from data can never become a special token: "<|latent|>" in a question is read as plain
    characters. The system message names no special token for the same reason.
 4. The blocks of a response are tokenised one by one, so that removing the spans (text-only SFT)
    leaves every other token as it was: in Qwen's vocabulary ">" and what follows it would merge.

 5. Pixel budgets of observed images and of whole videos are ours (`DataConfig`): the paper gives
    none. A picture may be as small as one token; Hugging Face's released settings would enlarge it
    to 64.

Axis letters: T frames, H and W pixels, P patches (before the 2x2 merge), B rows, L tokens.
"""

import dataclasses
import functools

import torch
from torch.utils.data import DataLoader, Dataset

from common.clips import (  # noqa: F401  importable from here too
    CELL,
    MERGE,
    TEMPORAL,
    ClipError,
    _cut,
    key_frame_positions,
    load_frames,
    normalise,
    read_uniform,
    resize_and_patchify,
)
from common.formats import Frame, RecordError, Skipped
from model import LATENT, LATENT_END, LATENT_START

SYSTEM = (
    "You answer questions about what happens next in a video. Work in two modes and switch "
    "between them freely. "
    "In words: put each step of your reasoning between <reason> and </reason>. In images: where "
    "picturing a "
    "coming frame helps, open a latent span and imagine it there before you go on. When you are "
    "sure, give the "
    "final answer between <answer> and </answer>."
)  # ours


@dataclasses.dataclass
class DataConfig:
    """The part of every script's config that decides what the model sees."""

    # frames sampled from a clip that enters as a video  # paper Table 8 (FutureBench: 32)
    num_frames: int = 16
    # a future frame has at most l_max * 32 * 32 pixels: L_max latents for a square  # paper Table 8
    l_max: int = 4
    image_max_tokens: int = 256  # an observed key frame has at most this many tokens  # ours
    video_max_tokens: int = 4096  # all temporal patches of a clip together  # ours
    # tokens of a sample; a longer one is skipped and counted  # paper Table 8
    max_length: int = 16384
    workers: int = 2  # background processes that decode ahead, each rank; 0 = none  # ours
    system: str = SYSTEM  # the system message  # ours
    max_bad: float = 0.05  # share of unusable records above which a run ends at its start  # ours

    def __post_init__(self):
        at_least_1 = (
            "num_frames",
            "l_max",
            "image_max_tokens",
            "video_max_tokens",
            "max_length",
            "global_batch",
            "micro_batch",
            "save_every",
            "batch",
            "max_new_tokens",
        )  # these: of the scripts
        for name in at_least_1:
            if getattr(self, name, 1) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")

    @property
    def budgets(self):
        """Pixel budgets (min, max) of an observed image, a future frame, and a whole video."""
        cell = CELL * CELL
        return (
            (cell, self.image_max_tokens * cell),
            (cell, self.l_max * cell),
            (cell, self.video_max_tokens * TEMPORAL * cell),
        )


class Special(str):
    """A string that is one token of the tokenizer, not text."""


def encode(row, tokenizer, config, train=True, spans=True):
    """Row -> dict of ids, labels and patches, ready for `collate`.

    Source: chat layout above, sec. 3.2.

    train: with the response and its labels, else the prompt alone. spans: False drops the latent
    spans and leaves every other token (text-only SFT). Labels: all response tokens but
    `<|latent|>`, incl. `<|im_end|>`. Raises ClipError for media, RecordError for a sample over
    max_length.
    """
    image_budget, future_budget, video_budget = config.budgets
    stills = [p for p in row.prompt if isinstance(p, Frame)]
    stills = iter(list(zip(stills, load_frames(stills, image_budget))))
    images, videos, pieces = (
        [],
        [],
        [
            Special("<|im_start|>"),
            "system\n" + config.system,
            Special("<|im_end|>"),
            "\n",
            Special("<|im_start|>"),
            "user\n",
        ],
    )
    for part in row.prompt:
        if isinstance(part, str):
            pieces.append(part)
        elif isinstance(part, Frame):
            images.append(next(stills)[1])
            pieces += _visual("<|image_pad|>", images[-1][1])
        else:
            frames, numbers, fps = read_uniform(part, config.num_frames)
            numbers = [*numbers, numbers[-1]]  # an odd last frame is doubled, its time too
            videos.append(_cut(frames, video_budget, part.path))
            t, h, w = videos[-1][1].tolist()
            for k in range(t):  # each temporal patch of two frames is announced by its mean time
                pieces += [
                    f"<{(numbers[2 * k] / fps + numbers[2 * k + 1] / fps) / 2:.1f} seconds>",
                    *_visual("<|video_pad|>", torch.tensor([1, h, w])),
                ]
    pieces += [Special("<|im_end|>"), "\n", Special("<|im_start|>"), "assistant\n"]
    ids, futures = _tokenize(pieces, tokenizer), []
    labels = [-100] * len(ids)
    if train:
        to_come = [p for p in row.response if isinstance(p, Frame)] if spans else []
        futures = load_frames(to_come, future_budget)
        grids = iter(grid for _, grid in futures)
        latent = tokenizer.convert_tokens_to_ids(LATENT)
        for part in [*row.response, None]:
            if isinstance(part, Frame):
                if not spans:
                    continue
                n = int(next(grids).prod()) // MERGE**2
                new = _tokenize(
                    [Special(LATENT_START), *[Special(LATENT)] * n, Special(LATENT_END)], tokenizer
                )
            elif part is None:
                new = _tokenize(
                    [f"<answer>{row.answer}</answer>", Special("<|im_end|>")], tokenizer
                )
            else:
                new = _tokenize([f"<reason>{part}</reason>"], tokenizer)
            ids += new
            labels += [-100 if token == latent else token for token in new]
    if len(ids) > config.max_length:
        raise RecordError(
            f"{row.where}: {len(ids)} tokens, more than max_length = {config.max_length}"
        )
    return dict(ids=ids, labels=labels, images=images, videos=videos, futures=futures, row=row)


def _visual(token, grid):
    return [
        Special("<|vision_start|>"),
        *[Special(token)] * (int(grid.prod()) // MERGE**2),
        Special("<|vision_end|>"),
    ]


def _tokenize(pieces, tokenizer):
    """Specials become their id.

    Neighbouring texts are joined first, as a chat template would join them.
    """
    ids, text = [], ""
    for piece in [*pieces, Special("")]:
        if not isinstance(piece, Special):
            text += piece
            continue
        if text:
            ids += tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            text = ""
        if piece:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
    return ids


class Samples(Dataset):
    """Rows encoded on demand, in background workers where the loader has them.

    A broken one becomes a Skipped.
    """

    def __init__(self, rows, tokenizer, config, train=True, spans=True):
        self.rows, self.tokenizer, self.config, self.train, self.spans = (
            rows,
            tokenizer,
            config,
            train,
            spans,
        )

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        try:
            return encode(self.rows[i], self.tokenizer, self.config, self.train, self.spans)
        except (ClipError, RecordError) as e:
            return Skipped(self.rows[i].where, str(e))


def collate(samples, pad_id, side="right", keep=False):
    """Encoded samples -> a batch of HF-named tensors, plus `rows` and `skipped`. Source: ours.

    input_ids, attention_mask, labels (B, L); pixel_values / image_grid_thw, pixel_values_videos /
    video_grid_thw, future_pixel_values / future_grid_thw where there are any. side: "left" to
    generate, "right" to train. keep: also hand on the encoded `samples`. `kept`: which of the
    samples are in the batch. If every sample was skipped, a one-token row without a label stands
    in, so that each rank still takes its step.
    """
    skipped = [s for s in samples if isinstance(s, Skipped)]
    good = [s for s in samples if not isinstance(s, Skipped)]
    ids = [torch.tensor(s["ids"]) for s in good] or [torch.tensor([pad_id])]
    labels = [torch.tensor(s["labels"]) for s in good] or [torch.tensor([-100])]

    def pad(rows, value):
        return torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side=side)

    batch = dict(
        input_ids=pad(ids, pad_id),
        labels=pad(labels, -100),
        attention_mask=pad([torch.ones_like(x) for x in ids], 0),
    )  # (B, L)
    for kind, pixels, grid in (
        ("images", "pixel_values", "image_grid_thw"),
        ("videos", "pixel_values_videos", "video_grid_thw"),
        ("futures", "future_pixel_values", "future_grid_thw"),
    ):
        found = [pair for s in good for pair in s[kind]]
        if found:
            batch[pixels] = normalise(torch.cat([patches for patches, _ in found]))  # (P, 1536)
            batch[grid] = torch.stack([g for _, g in found])  # (images, 3)
    batch["rows"], batch["skipped"] = [s["row"] for s in good], skipped
    if keep:
        batch["samples"] = good
    batch["kept"] = [i for i, s in enumerate(samples) if not isinstance(s, Skipped)]
    return batch


def to_device(batch, device):
    """Move a batch's tensors; lists stay."""
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v
        for k, v in batch.items()
    }


MODEL_KEYS = (
    "input_ids",
    "attention_mask",
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
)


def model_inputs(batch):
    """The part of a batch that the model's `forward` and `generate` take."""
    return {k: batch[k] for k in MODEL_KEYS if k in batch}


def loader(samples, batches, workers, **collate_arguments):
    """A DataLoader over explicit lists of indices (one list a batch), decoding ahead in `workers`
    processes.
    """
    return DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=functools.partial(collate, **collate_arguments),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
