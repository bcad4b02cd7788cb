"""Formats, clips and batches: from a JSON record and an mp4 file to the tensors the model takes.

    record --read_rows--> Row --encode--> ids, patches --collate--> batch

Nothing here knows about training or generation; the scripts differ only in the arguments they pass.

The record formats (told apart by their keys, `read_rows`):
    future-l1    video, image, reasoning_image, conversations, answer          training JSON
    twiff        video, question, answer, question_images_index, ...           TwiFF-2.7M, Future-L1-50K on the hub
    twiff-bench  the same plus question_images, reasoning_images               TwiFF-Bench
    futurebench  id, question_type, video_path, qa {Question, Options, Answer} FutureBench
    rl           problem, answer, images | videos                              generic RL rows
    mcq          question, options, answer, video                              generic multiple choice

The chat layout (ours; special tokens in angle bars):
    <|im_start|>system SYSTEM<|im_end|> <|im_start|>user ... <|im_end|> <|im_start|>assistant
    <reason>text 0</reason><|latent_start|><|latent|>*N<|latent_end|><reason>text 1</reason>...<answer>A</answer><|im_end|>

Where this differs from the paper and the official code:
 1. Frames are taken at midpoints in training, RL and evaluation alike (official: midpoints in SFT, linspace in RL).
    Only a clip that enters as a *video* is sampled as Qwen3-VL's own processor does, linspace over the whole clip.
 2. A clip that decord refuses is read by PyAV; one that both refuse is skipped, counted and named, as is a sample longer
    than `max_length`. Official drops it silently and can leave an empty batch; here an empty batch steps with weight 0.
 3. Text from data can never become a special token: "<|latent|>" in a question is read as plain characters. The
    system message names no special token for the same reason.
 4. The blocks of a response are tokenised one by one, so that removing the spans (text-only SFT) leaves every other
    token as it was: in Qwen's vocabulary ">" and what follows it would merge.

 5. Pixel budgets of observed images and of whole videos are ours (`DataConfig`): the paper gives none. A picture may be as
    small as one token; Hugging Face's released settings would enlarge it to 64.

Axis letters: T frames, H and W pixels, P patches (before the 2x2 merge), B rows, L tokens.
"""

import argparse
import dataclasses
import functools
import inspect
import io
import json
import math
import os
import re
import sys
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from model import CELL, LATENT, LATENT_END, LATENT_START, MERGE, TEMPORAL, normalise, resize_and_cut
from model import resize_and_patchify  # noqa: F401  pixels to patches in one call, under this name too

SYSTEM = ("You answer questions about what happens next in a video. Work in two modes and switch between them freely. "
          "In words: put each step of your reasoning between <reason> and </reason>. In images: where picturing a "
          "coming frame helps, open a latent span and imagine it there before you go on. When you are sure, give the "
          "final answer between <answer> and </answer>.")  # ours


class RecordError(ValueError):
    """A record that cannot be used: the message names its file, its index and what was expected."""


class ClipError(ValueError):
    """A clip or image that cannot be read: the message names the file and what each reader said."""


# ----------------------------------------------------------------------------------------------------------- config

@dataclasses.dataclass
class DataConfig:
    """The part of every script's config that decides what the model sees."""
    num_frames: int = 16  # frames sampled from a clip that enters as a video  # paper Table 8 (FutureBench: 32)
    l_max: int = 4  # a future frame has at most l_max * 32 * 32 pixels: L_max latents for a square  # paper Table 8
    image_max_tokens: int = 256  # an observed key frame has at most this many tokens  # ours
    video_max_tokens: int = 4096  # all temporal patches of a clip together  # ours
    max_length: int = 16384  # tokens of a sample; a longer one is skipped and counted  # paper Table 8
    workers: int = 2  # background processes that decode ahead, each rank; 0 = none  # ours
    system: str = SYSTEM  # the system message  # ours
    cache_frames: int = 0  # resized frames kept in memory by each process; for small worlds seen often  # ours

    def __post_init__(self):
        at_least_1 = ("num_frames", "l_max", "image_max_tokens", "video_max_tokens", "max_length",
                      "global_batch", "micro_batch", "save_every", "batch", "max_new_tokens")  # these: of the scripts
        for name in at_least_1:
            if getattr(self, name, 1) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")

    @property
    def budgets(self):
        """Pixel budgets (min, max) of an observed image, a future frame, and a whole video."""
        cell = CELL * CELL
        return ((cell, self.image_max_tokens * cell), (cell, self.l_max * cell),
                (cell, self.video_max_tokens * TEMPORAL * cell))


def parse_config(cls, argv=None):
    """Command line -> a config dataclass: one flag a field, `--no-x` for bools, unknown flags are errors. Ours.

    The comment behind a field is its help.
    """
    source = "".join(inspect.getsource(c) for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c))
    comment = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", source, re.M))
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in dataclasses.fields(cls):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        parser.add_argument(f"--{f.name}", default=f.default, help=comment.get(f.name, " ").replace("%", "%%"), **kind)
    argv = sys.argv[1:] if argv is None else argv
    return cls(**vars(parser.parse_args([re.sub("^--(no-)?[^=]+", _underscores, a) for a in argv])))


def _underscores(flag):  # --judge-only is --judge_only
    no = flag.group(1) or ""
    return f"--{no}" + flag.group()[2 + len(no):].replace("-", "_")


# ------------------------------------------------------------------------------------------------------------- rows

class Frame(NamedTuple):
    """One image of a prompt or a future: key frame `index` (1..8) of a clip, or a whole image file (index 0)."""
    source: str | bytes  # path, or the image file's bytes
    index: int = 0


class Clip(NamedTuple):
    """A clip that enters as a video: uniformly sampled frames with time stamps, of all of it or of a part."""
    path: str
    start: float = 0.0  # seconds
    end: float = math.inf


@dataclasses.dataclass
class Row:
    """The one normal form of all formats. `response` holds str (a reasoning step) and Frame (a future to imagine)."""
    where: str  # "file:index", for every message
    id: str
    prompt: list  # str | Frame | Clip, in the order of the user turn
    response: list  # str | Frame; empty where the format has no reasoning
    answer: str
    question: str = ""
    options: list | None = None  # texts of A, B, C ...
    group: str = "all"  # what scores are split by


def read_rows(path, media_root=None):
    """A .json, .jsonl or .parquet file -> list of Row, whatever the format. Source: the published formats.

    media_root: where relative clip paths start; default: the folder of the file. Raises RecordError naming the file,
    the index and the missing key, FileNotFoundError if there is no file.
    """
    media_root = os.path.dirname(os.path.abspath(path)) if media_root is None else media_root
    rows = [read_record(record, f"{path}:{i}", media_root) for i, record in enumerate(read_records(path))]
    if not rows:
        raise RecordError(f"{path}: no records")
    return rows


def read_records(path):
    """A .json, .jsonl or .parquet file -> its records as they stand. Raises RecordError, FileNotFoundError. Ours."""
    if path.endswith(".parquet"):
        try:
            import pyarrow.parquet
        except ImportError as e:
            raise RecordError(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from e
        return pyarrow.parquet.read_table(path).to_pylist()
    with open(path, encoding="utf-8") as f:
        try:
            texts = f.read().split("\n") if path.endswith(".jsonl") else [f.read()]
        except UnicodeDecodeError as e:
            raise RecordError(f"{path}: not UTF-8 text ({e})") from e
    records = []
    for text in texts:
        try:
            records += [json.loads(text)] if text.strip() else []
        except json.JSONDecodeError as e:
            raise RecordError(f"{path}:{len(records)}: not JSON ({e})") from e
    if path.endswith(".jsonl"):
        return records
    records = records[0] if records else []
    if isinstance(records, dict):  # {"data": [...]} or {id: record}
        records = records["data"] if isinstance(records.get("data"), list) else list(records.values())
    if not isinstance(records, list):
        raise RecordError(f"{path}: expected a list of records, found {type(records).__name__}")
    return records


def read_lines(path):
    """A results file -> its lines as dicts. A half-written last line (a killed run) is cut off the file and redone."""
    with open(path, "rb") as f:
        text = f.read()
    whole = text[:text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(path, len(whole))
    try:
        return [json.loads(line) for line in whole.decode("utf-8").split("\n")[:-1]]
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not a results file ({e})") from e


def read_record(record, where, media_root="."):
    """One JSON object -> Row. `where` names it in errors. Raises RecordError."""
    if not isinstance(record, dict):
        raise RecordError(f"{where}: expected an object, found {type(record).__name__}")

    def need(key, kind, of=record):
        if key not in of:
            raise RecordError(f"{where}: key {key!r} is missing (found {', '.join(sorted(of))})")
        if not isinstance(of[key], kind):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise RecordError(f"{where}: {key!r} should be {names}, found {type(of[key]).__name__}: {of[key]!r:.60}")
        return of[key]

    def media(name):
        if not isinstance(name, str):
            raise RecordError(f"{where}: 'videos' should hold paths, found {name!r:.60}")
        return name if os.path.isabs(name) else os.path.join(media_root, name)

    def indices(key):
        found = need(key, list)
        if not all(type(i) is int and 1 <= i <= 8 for i in found):
            raise RecordError(f"{where}: {key!r} should hold key-frame numbers 1..8, found {found}")
        return found

    row = Row(where, str(record.get("id", where)), [], [], "", group=str(record.get("group", "all")))
    if record.get("options") is not None:
        row.options = _options(record["options"], where)
    if "conversations" in record:  # future-l1
        clip = media(need("video", str))
        seen, future = ([Frame(clip, i) for i in indices(key)] if key in record else []
                        for key in ("image", "reasoning_image"))
        turns = {"human": "", "gpt": ""}
        for turn in need("conversations", list):
            if not isinstance(turn, dict) or turn.get("from") not in turns or not isinstance(turn.get("value"), str):
                raise RecordError(f"{where}: a turn should be {{from: human|gpt, value: text}}, found {turn!r:.80}")
            turns[turn["from"]] += turn["value"]
        chain, said = _split_answer(turns["gpt"], "answer")
        row.prompt = _interleave(turns["human"], "<image>", seen, where, "image")
        row.response = _steps(_interleave(chain, "<image>", future, where, "reasoning_image"))
        row.answer = said if said is not None and "answer" not in record else need("answer", (str, int, float))
    elif "question_images_index" in record:  # twiff, twiff-bench
        clip = media(need("video", str))
        seen, future = ([Frame(clip, i) for i in indices(key)]
                        for key in ("question_images_index", "reasoning_images_index"))
        for key, frames in (("question_images", seen), ("reasoning_images", future)):
            if record.get(key):  # twiff-bench ships the pictures themselves
                frames[:] = [Frame(_image_source(x, where, key, media)) for x in need(key, list)]
        question, (chain, said) = need("question", str), _split_answer(need("answer", str), "ans")
        if "<image>" not in question:
            question = "<image>" * len(seen) + question
        row.prompt = _interleave(question, "<image>", seen, where, "question_images_index")
        if said is None:  # no chain: the answer alone
            if "<rimage>" in chain or "<ans>" in chain:
                raise RecordError(f"{where}: 'answer' holds a chain without a closed <ans>...</ans>")
            row.answer = chain
        else:
            row.answer = said
            row.response = _steps(_interleave(chain, "<rimage>", future, where, "reasoning_images_index"))
        meta = record.get("meta_data")
        if isinstance(meta, str) and meta.lstrip().startswith("{"):
            try:
                meta = json.loads(meta)
            except json.JSONDecodeError as e:
                raise RecordError(f"{where}: 'meta_data' is not JSON ({e})") from e
        if isinstance(meta, dict):
            row.group = str(next((meta[k] for k in ("class", "category", "type") if k in meta), "all"))
    elif "qa" in record:  # futurebench
        qa = need("qa", dict)
        row.options = _options(need("Options", (dict, list), qa), where)
        row.answer, row.group = need("Answer", str, qa), need("question_type", str)
        name = need("video_path", str).split("video_dataset/")[-1]
        row.prompt = [Clip(media(name)), _with_options(need("Question", str, qa), row.options)]
    elif "problem" in record:  # rl
        row.answer = need("answer", (str, int, float))
        images, videos = (need(key, list) if record.get(key) is not None else [] for key in ("images", "videos"))
        images = [Frame(_image_source(x, where, "images", media)) for x in images]
        text = need("problem", str).replace("<video>", "")
        text = "<image>" * len(images) + text if "<image>" not in text else text
        row.prompt = [Clip(media(x)) for x in videos]
        row.prompt += _interleave(text, "<image>", images, where, "images")
    elif "options" in record:  # mcq
        need("options", (list, dict))
        row.answer = need("answer", (str, int))
        row.prompt = [Clip(media(need("video", str))), _with_options(need("question", str), row.options)]
    else:
        raise RecordError(f"{where}: unknown format (keys {', '.join(sorted(map(str, record)))}); expected one of the "
                          "six in data.py: conversations | question_images_index | qa | problem | question + options")
    row.answer = str(row.answer).strip()
    row.question = "".join(p for p in row.prompt if isinstance(p, str)).strip()
    for name in ("question", "answer"):
        if not getattr(row, name):
            raise RecordError(f"{where}: the {name} is empty")
    try:
        "".join(p for p in (*row.prompt, *row.response, row.answer) if isinstance(p, str)).encode()
    except UnicodeEncodeError as e:
        raise RecordError(f"{where}: the text is not valid Unicode ({e})") from e
    return row


def _interleave(text, marker, frames, where, key):
    pieces = text.split(marker)
    if len(pieces) - 1 != len(frames):
        raise RecordError(f"{where}: {len(pieces) - 1} {marker} in the text but {len(frames)} entries in {key!r}")
    out = []
    for piece, frame in zip(pieces, [*frames, None]):
        out += ([piece] if piece.strip() else []) + ([frame] if frame is not None else [])
    return out


def _steps(pieces):
    """Strip "THOUGHT n:" and <reason> tags from the reasoning texts; drop what is then empty."""
    clean = [p if isinstance(p, Frame) else re.sub(r"THOUGHT\s*\d+\s*:|</?reason>", "", p).strip() for p in pieces]
    return [p for p in clean if p != ""]


def _split_answer(text, tag):
    found = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.S)
    return (text, None) if found is None else (text[:found.start()] + text[found.end():], found.group(1).strip())


def _options(options, where):
    if isinstance(options, dict):
        options = [options[k] for k in sorted(options, key=lambda k: (len(str(k)), str(k)))]  # A, B, ... or 1, 2, ... 10
    if options is not None and (not isinstance(options, list) or not 2 <= len(options) <= 26):
        raise RecordError(f"{where}: options should be 2 to 26 texts, found {options!r:.60}")
    return options and [str(o) for o in options]


def _with_options(question, options):
    """Append "A) ..." lines unless the question already has them (some FutureBench questions do)."""
    if all(re.search(rf"\b{chr(65 + i)}\s*[).:]\s*{re.escape(o)}", question) for i, o in enumerate(options)):
        return question
    return question + "\n" + "\n".join(f"{chr(65 + i)}) {o}" for i, o in enumerate(options))


def _image_source(x, where, key, media):
    if isinstance(x, dict):  # the hub's image column: {"bytes": ..., "path": ...}
        x = x.get("bytes") or x.get("path")
    if not isinstance(x, (str, bytes)):
        raise RecordError(f"{where}: {key!r} should hold paths or image bytes, found {type(x).__name__}")
    return media(x) if isinstance(x, str) else x


# ------------------------------------------------------------------------------------------------------------ clips

def key_frame_positions(num_frames):
    """Frame numbers (0-based) of a clip's pool of 8 key frames. Source: TwiFF; V=600 -> 1 51 150 249 349 448 547 598.

    The second and the last but one frame, and the midpoints of six equal intervals between frames 2 and V-2. A clip of
    fewer than 8 frames gives each frame once and repeats the last. Raises ValueError if there is no frame.
    """
    if num_frames < 1:
        raise ValueError(f"a clip needs at least one frame, found {num_frames}")
    if num_frames < 8:
        return [min(i, num_frames - 1) for i in range(8)]
    edges = np.linspace(2, num_frames - 2, 7).astype(int)
    return [1, *((edges[:-1] + edges[1:] - 1) // 2).tolist(), num_frames - 2]


def uniform_positions(num_frames, n):
    """n frame numbers spread over the whole clip, as Qwen3-VL's video processor takes them; n <= num_frames."""
    return np.linspace(0, num_frames - 1, min(n, num_frames)).round().astype(int).tolist()


def read_clip(path, choose):
    """Decode some frames of a clip -> (frames uint8 (T, H, W, 3), their numbers, frames per second).

    choose(number of frames) -> list of frame numbers. decord first, PyAV when decord refuses. Raises ClipError with
    what both said. Source: ours.
    """
    if not os.path.isfile(path):
        raise ClipError(f"{path}: no such file")
    said = []
    for reader in (_decord, _pyav):
        try:
            frames, numbers, fps = reader(path, choose)
            return frames, numbers, fps if fps and math.isfinite(fps) else 24.0
        except ImportError as e:
            said.append(f"{reader.__name__[1:]}: not installed ({e})")
        except ClipError as e:
            said.append(str(e))
    raise ClipError(f"{path}: cannot be read as a video ({'; '.join(said)})")


def read_uniform(clip, n):
    """A Clip -> n frames spread over it, as `read_clip` returns them. Raises ClipError. Source: ours."""
    first, last = 0, None
    if clip.start or clip.end < math.inf:
        fps = read_clip(clip.path, lambda total: [0] if total else [])[2]
        first, last = int(clip.start * fps), int(min(clip.end * fps, 2**31))

    def choose(total):
        if not total:
            return []
        a, b = (min(x, total - 1) for x in (first, total if last is None else last))
        return [a + i for i in uniform_positions(max(b - a, 0) + 1, n)]
    return read_clip(clip.path, choose)


def _decord(path, choose):
    import decord
    try:
        clip = decord.VideoReader(path, num_threads=1)
        clock = clip.get_frame_timestamp(np.arange(len(clip)))[:, 0]  # (frames,) seconds
        if clock[:1] < 0 or (np.diff(clock) <= 0).any() or 0 not in clip.get_key_indices():
            raise ClipError("decord: cut by stream copy")  # it would count hidden frames, or mix the order up
        numbers = choose(len(clip)) if len(clip) else None
        frames = clip.get_batch(numbers).asnumpy() if numbers else None
        fps = float(clip.get_avg_fps())
    except Exception as e:  # whatever a damaged file provokes: the other reader decides
        raise ClipError(f"decord: {type(e).__name__} {(str(e).strip().splitlines() or [''])[-1]:.100}") from e
    if frames is None:
        raise ClipError("decord: no frames")
    return frames, numbers, fps


def _shown(frame):
    """Not one of the frames that a cut by stream copy keeps for the decoder alone, before the clip's time 0."""
    return frame.time is None or frame.time >= 0


def _pyav(path, choose):
    import av
    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            total = sum(_shown(frame) for frame in container.decode(stream))  # the header's count cannot be trusted
            fps = float(stream.average_rate or 0)
        numbers = choose(total)
        wanted, found = set(numbers), {}
        with av.open(path) as container:
            for i, frame in enumerate(filter(_shown, container.decode(container.streams.video[0]))):
                if i in wanted:
                    found[i] = frame.to_ndarray(format="rgb24")
        return np.stack([found[i] for i in numbers]), numbers, fps
    except Exception as e:  # no video stream, no frames, fewer frames than counted, any decoder error
        raise ClipError(f"PyAV: {type(e).__name__} {e}") from e


def read_image(source):
    """An image file's path or bytes -> uint8 (1, H, W, 3). Raises ClipError."""
    from PIL import Image
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        return np.array(image.convert("RGB"))[None]
    except Exception as e:  # a damaged picture raises almost anything
        name = f"image of {len(source)} bytes" if isinstance(source, bytes) else source
        raise ClipError(f"{name}: cannot be read as an image ({e})") from e


_cache = {}  # (path, key frame, budget) -> (patches uint8, grid); filled up to DataConfig.cache_frames, then closed


def _cut(frames, budget, name):
    try:
        return resize_and_cut(frames, *budget)
    except ValueError as e:
        raise ClipError(f"{name if isinstance(name, str) else 'image'}: {e}") from e


def load_frames(frames, budget, room=0):
    """list of Frame -> list of (patches uint8, grid), each clip opened once. Raises ClipError."""
    got = {}
    for frame in frames:
        if (frame, budget) in _cache:
            got[frame] = _cache[frame, budget]
        elif not frame.index:
            got[frame] = _cut(read_image(frame.source), budget, frame.source)
    for path in {f.source for f in frames if f not in got}:
        numbers = range(1, 9) if room else sorted({f.index for f in frames if f not in got and f.source == path})
        pictures, _, _ = read_clip(path, lambda n: [key_frame_positions(n)[i - 1] for i in numbers])
        for i, picture in zip(numbers, pictures):
            got[Frame(path, i)] = _cut(picture[None], budget, path)
    if len(_cache) < room:
        _cache.update({(frame, budget): value for frame, value in got.items()})
    return [got[frame] for frame in frames]


# --------------------------------------------------------------------------------------------------------- encoding

class Special(str):
    """A string that is one token of the tokenizer, not text."""


def encode(row, tokenizer, config, train=True, spans=True):
    """Row -> dict of ids, labels and patches, ready for `collate`. Source: chat layout above, sec. 3.2.

    train: with the response and its labels, else the prompt alone. spans: False drops the latent spans and leaves
    every other token (text-only SFT). Labels: all response tokens but `<|latent|>`, incl. `<|im_end|>`.
    Raises ClipError for media, RecordError for a sample over max_length.
    """
    image_budget, future_budget, video_budget = config.budgets
    stills = [p for p in row.prompt if isinstance(p, Frame)]
    stills = iter(list(zip(stills, load_frames(stills, image_budget, config.cache_frames))))
    images, videos, pieces = [], [], [Special("<|im_start|>"), "system\n" + config.system, Special("<|im_end|>"), "\n",
                                      Special("<|im_start|>"), "user\n"]
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
                pieces += [f"<{(numbers[2 * k] / fps + numbers[2 * k + 1] / fps) / 2:.1f} seconds>",
                           *_visual("<|video_pad|>", torch.tensor([1, h, w]))]
    pieces += [Special("<|im_end|>"), "\n", Special("<|im_start|>"), "assistant\n"]
    ids, futures = _tokenize(pieces, tokenizer), []
    labels = [-100] * len(ids)
    if train:
        to_come = [p for p in row.response if isinstance(p, Frame)] if spans else []
        futures = load_frames(to_come, future_budget, config.cache_frames)
        grids = iter(grid for _, grid in futures)
        latent = tokenizer.convert_tokens_to_ids(LATENT)
        for part in [*row.response, None]:
            if isinstance(part, Frame):
                if not spans:
                    continue
                n = int(next(grids).prod()) // MERGE**2
                new = _tokenize([Special(LATENT_START), *[Special(LATENT)] * n, Special(LATENT_END)], tokenizer)
            elif part is None:
                new = _tokenize([f"<answer>{row.answer}</answer>", Special("<|im_end|>")], tokenizer)
            else:
                new = _tokenize([f"<reason>{part}</reason>"], tokenizer)
            ids += new
            labels += [-100 if token == latent else token for token in new]
    if len(ids) > config.max_length:
        raise RecordError(f"{row.where}: {len(ids)} tokens, more than max_length = {config.max_length}")
    return dict(ids=ids, labels=labels, images=images, videos=videos, futures=futures, row=row)


def _visual(token, grid):
    return [Special("<|vision_start|>"), *[Special(token)] * (int(grid.prod()) // MERGE**2), Special("<|vision_end|>")]


def _tokenize(pieces, tokenizer):
    """Specials become their id; neighbouring texts are joined first, as a chat template would join them."""
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


class Skipped(NamedTuple):
    """A sample that could not be used, and why."""
    where: str
    why: str


class Samples(Dataset):
    """Rows encoded on demand, in background workers where the loader has them. A broken one becomes a Skipped."""

    def __init__(self, rows, tokenizer, config, train=True, spans=True):
        self.rows, self.tokenizer, self.config, self.train, self.spans = rows, tokenizer, config, train, spans

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        try:
            return encode(self.rows[i], self.tokenizer, self.config, self.train, self.spans)
        except (ClipError, RecordError) as e:
            return Skipped(self.rows[i].where, str(e))


def collate(samples, pad_id, side="right", pack=False, keep=False):
    """Encoded samples -> a batch of HF-named tensors, plus `rows` and `skipped`. Source: ours.

    input_ids, attention_mask, labels (B, L); pixel_values / image_grid_thw, pixel_values_videos / video_grid_thw,
    future_pixel_values / future_grid_thw where there are any. side: "left" to generate, "right" to train. pack: all
    samples one after another in a single row, with seq_lens. keep: also hand on the encoded `samples`. `kept`: which of
    the samples are in the batch. If every sample was skipped, a one-token row without a label stands in, so that each rank
    still takes its step.
    """
    skipped = [s for s in samples if isinstance(s, Skipped)]
    good = [s for s in samples if not isinstance(s, Skipped)]
    ids = [torch.tensor(s["ids"]) for s in good] or [torch.tensor([pad_id])]
    labels = [torch.tensor(s["labels"]) for s in good] or [torch.tensor([-100])]
    if pack:
        batch = dict(input_ids=torch.cat(ids)[None], labels=torch.cat(labels)[None], seq_lens=[len(x) for x in ids])
        batch["labels"][0, np.cumsum([0, *batch["seq_lens"][:-1]])] = -100  # nothing predicts a sample's first token
    else:
        def pad(rows, value):
            return torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side=side)
        batch = dict(input_ids=pad(ids, pad_id), labels=pad(labels, -100),
                     attention_mask=pad([torch.ones_like(x) for x in ids], 0))  # (B, L)
    for kind, pixels, grid in (("images", "pixel_values", "image_grid_thw"),
                               ("videos", "pixel_values_videos", "video_grid_thw"),
                               ("futures", "future_pixel_values", "future_grid_thw")):
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
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


MODEL_KEYS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw",
              "seq_lens")


def model_inputs(batch):
    """The part of a batch that the model's `forward` and `generate` take."""
    return {k: batch[k] for k in MODEL_KEYS if k in batch}


def loader(samples, batches, workers, **collate_arguments):
    """A DataLoader over explicit lists of indices (one list a batch), decoding ahead in `workers` processes."""
    return DataLoader(samples, batch_sampler=batches, collate_fn=functools.partial(collate, **collate_arguments),
                      num_workers=workers, prefetch_factor=4 if workers else None)
