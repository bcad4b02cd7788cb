"""Get the clips of TwiFF-2.7M and Future-L1-50K: fetch each video, cut its clips, check them. Ours.

    pip install yt-dlp                     # optional: only for sites that need it
    python -m tools.clips --data train.jsonl --out clips
    python -m tools.clips --data clips.parquet --out clips --url "https://HOST/{id}.mp4"
    python sft.py ... --data train.jsonl --media_root clips

The releases hold records, not videos: `video` is {id}-{start}-{end}.mp4, `meta_data` has start and
end. A video is fetched once for all its clips. A clip is encoded anew, because one cut without
that (a stream copy) starts between key frames, which decoders refuse or miscount. It gets its name
only after this project's own readers have read it.

A second run does what is missing. OUT/failed.jsonl names each clip that could not be had, and why;
OUT/coverage.json counts. Videos vanish: expect to miss some, and say how many beside your results.

Terms of use: this fetches what the site shows to you. Whether you may keep and use it, is for the
site's terms, the uploader's licence and your law to say; the records' licence does not cover it.
"""

import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common.cli import run_script
from common.clips import ClipError, key_frame_positions, read_clip
from common.formats import RecordError, read_records
from common.run import read_lines, write, write_json
from data import at_least

YOUTUBE = "https://www.youtube.com/watch?v={id}"


@dataclass
class Config:
    data: str = ""  # records: a .json, .jsonl or .parquet file, or a hub id (needs datasets)
    out: str = "clips"  # where the clips go; then a script's media_root
    url: str = YOUTUBE  # where a video is; one that ends in .mp4 is fetched without yt-dlp
    height: int = 480  # the largest picture that is fetched, in lines
    limit: int = 0  # only the clips of the first records; 0 = all
    workers: int = 2  # videos at a time; sites refuse those who ask for many
    cookies: str = ""  # a cookies.txt for yt-dlp
    again: bool = True  # try again what failed in an earlier run

    def __post_init__(self):
        at_least(self, 1, "height", "workers")
        at_least(self, 0, "limit")
        if "{id}" not in self.url:
            raise ValueError(f"url is {self.url!r}, expected one with {{id}} in it")


class Piece(NamedTuple):
    """A clip: a part of a video."""

    name: str  # the file, below OUT
    source: str  # the video's id
    start: float  # seconds
    end: float


class Failure(Exception):
    """A clip that could not be had; the message says why."""


# ----------------------------------------------------------------------------------------- records


def piece_of(record, where):
    """A record -> its Piece. Raises RecordError that says what is missing."""
    if isinstance(record, RecordError):
        raise record
    name = record.get("video") if isinstance(record, dict) else None
    if not isinstance(name, str) or not name:
        raise RecordError(f"{where}: no 'video'")
    parts = re.fullmatch(r"(.+?)-([\d:.]+)-([\d:.]+)", os.path.splitext(os.path.basename(name))[0])
    meta = record.get("meta_data") or {}
    try:
        meta = json.loads(meta) if isinstance(meta, str) else meta
        times = [meta.get(key) for key in ("start", "end")]
        if None in times and parts:
            times = parts.groups()[1:]
        start, end = map(seconds, times)
    except (ValueError, TypeError, AttributeError) as e:
        text = (
            f"{where}: neither meta_data nor the name {name!r} says where the clip starts and ends"
        )
        raise RecordError(text) from e
    if not parts or not 0 <= start < end:
        raise RecordError(
            f"{where}: expected ID-START-END.mp4 with START before END, found {name!r}"
        )
    inside = os.path.normpath(name)
    safe = inside if not inside.startswith(("..", "/")) else os.path.basename(name)
    return Piece(safe, parts[1], start, end)


def seconds(text):
    """ "0:01:02.5", "62.5" or 62.5 -> 62.5. Raises ValueError."""
    total = 0.0
    for part in str(text).split(":"):
        total = 60 * total + float(part)
    return total


def read_pieces(config):
    """The records -> ({name: Piece}, [(where, why) of records that name no clip])."""
    pieces, bad = {}, []
    for i, record in enumerate(records_of(config.data)):
        if config.limit and i == config.limit:
            break
        try:
            piece = piece_of(record, f"{config.data}:{i}")
            pieces.setdefault(piece.name, piece)
        except RecordError as e:
            where, _, why = str(e).partition(": ")
            bad.append((where, why))
    return pieces, bad


def records_of(data):
    """A file's records, or a hub id's, one after another. Raises SystemExit."""
    if not data:
        raise SystemExit("--data is missing: a file of records, or a hub id")
    if os.path.exists(data) or data.endswith((".json", ".jsonl", ".parquet")):
        return read_records(data)
    try:
        import datasets
    except ImportError as e:
        text = f"{data}: no such file, and the hub needs a package: pip install datasets"
        raise SystemExit(text) from e
    return datasets.load_dataset(*data.split(":"), split="train", streaming=True)


# ------------------------------------------------------------------------------ fetch, cut, check


def fetch(source, folder, config):
    """A video's id -> the file it was fetched to. Raises Failure, SystemExit without yt-dlp."""
    url = config.url.format(id=source)
    path = os.path.join(folder, source)
    if url.endswith(".mp4"):
        try:
            urllib.request.urlretrieve(url, path)  # raises if less comes than was promised
        except (OSError, urllib.error.ContentTooShortError) as e:
            raise Failure(f"cannot be fetched: {e}") from e
        return path

    downloader = youtube_dl()
    best = f"bv*[height<={config.height}][ext=mp4]/bv*[height<={config.height}]/b"
    options = dict(format=best, outtmpl=path, cookiefile=config.cookies or None, retries=3)
    options.update(quiet=True, no_warnings=True, noprogress=True, noplaylist=True)
    try:
        with downloader.YoutubeDL(options) as client:
            client.download([url])
    except downloader.utils.DownloadError as e:
        why = re.sub(r"\x1b\[[\d;]*m|ERROR: ", "", str(e)).splitlines()[0]
        raise Failure(f"cannot be fetched: {why}") from e
    return path


def youtube_dl():
    """The package yt_dlp. Raises SystemExit that says how to get it."""
    try:
        import yt_dlp
    except ImportError as e:
        raise SystemExit(
            f"fetching needs a package: pip install yt-dlp ({e}); a --url in .mp4 does not"
        ) from e
    return yt_dlp


def cut(video, piece, path):
    """Encode a part of a video anew, from time 0 on. Raises Failure."""
    import av

    try:
        with av.open(video) as whole, av.open(path, "w", format="mp4") as clip:
            source, first = whole.streams.video[0], None
            target = clip.add_stream("libx264", rate=source.average_rate, options=dict(crf="18"))
            target.pix_fmt, target.time_base = "yuv420p", source.time_base
            whole.seek(int(piece.start / source.time_base), stream=source)  # the key frame before
            for frame in whole.decode(source):
                if frame.time < piece.start:
                    continue
                if frame.time >= piece.end:
                    break
                picture = upright(frame)
                if first is None:
                    first = frame.pts
                    target.width, target.height = picture.width // 2 * 2, picture.height // 2 * 2
                size = dict(width=target.width, height=target.height, format="yuv420p")
                picture = picture.reformat(**size)
                picture.pts, picture.time_base = frame.pts - first, frame.time_base
                picture.pict_type = 0
                clip.mux(target.encode(picture))
            if first is not None:
                clip.mux(target.encode())
    except Exception as e:  # whatever a damaged file provokes
        raise Failure(f"cannot be cut: {type(e).__name__} {e}") from e
    if first is None:
        raise Failure(f"the video ends before {piece.start:.1f} s")


def upright(frame):
    """A decoded frame, turned as its file says: phones write pictures that lie on their side."""
    import av

    if not frame.rotation:
        return frame
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")


def check(piece, path):
    """Read a clip as the scripts do. Raises Failure if that fails, or if it is too short."""
    try:
        counts = []
        _, _, fps = read_clip(path, lambda n: counts.append(n) or key_frame_positions(n))
    except ClipError as e:
        raise Failure(str(e).replace(path, piece.name)) from e
    length, wanted = counts[-1] / fps, piece.end - piece.start
    if length < 0.8 * wanted:
        raise Failure(f"holds {length:.1f} of {wanted:.1f} s")


def make(source, pieces, config):
    """All clips of one video -> {name: None, or why it could not be had}."""
    folder = os.path.join(config.out, ".whole", source)
    os.makedirs(folder, exist_ok=True)
    fates = {}
    try:
        video = fetch(source, folder, config)
        for piece in pieces:
            path = os.path.join(config.out, piece.name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            part = os.path.join(folder, "part.mp4")
            try:
                cut(video, piece, part)
                check(piece, part)
                os.replace(part, path)
                fates[piece.name] = None
            except Failure as e:
                fates[piece.name] = str(e)
    except Failure as e:
        fates = {piece.name: str(e) for piece in pieces}
    finally:
        shutil.rmtree(folder)
    return fates


# --------------------------------------------------------------------------------------------- run


def main(config):
    """Make what is missing -> the counts of coverage.json."""
    pieces, bad = read_pieces(config)
    if not pieces:
        why = f"; the first: {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise SystemExit(f"{config.data}: no record names a clip{why}")
    if not config.url.endswith(".mp4"):
        youtube_dl()  # said at once if it is absent
    os.makedirs(config.out, exist_ok=True)
    failed_path = os.path.join(config.out, "failed.jsonl")
    failed = {}
    if os.path.exists(failed_path):
        failed = {line["video"]: line["why"] for line in read_lines(failed_path)}

    # what is missing, by video
    missing = {}
    for piece in pieces.values():
        done = os.path.exists(os.path.join(config.out, piece.name))
        if not done and (config.again or piece.name not in failed):
            missing.setdefault(piece.source, []).append(piece)

    with ThreadPoolExecutor(config.workers) as pool:
        jobs = pool.map(lambda job: make(*job, config), missing.items())
        for fates in tqdm(jobs, total=len(missing), desc="videos", mininterval=2):
            for name, why in fates.items():
                failed.pop(name, None)
                if why:
                    failed[name] = why
                    tqdm.write(f"failed {name}: {why}")
            write_failures(failed_path, failed)
    return report(config, pieces, failed, bad)


def write_failures(path, failed):
    """{name: why} -> a line each."""
    lines = [json.dumps(dict(video=name, why=why)) + "\n" for name, why in failed.items()]
    write(path, "".join(lines))


def report(config, pieces, failed, bad):
    """Print and write how many clips there are, and what became of the others."""
    here = sum(os.path.exists(os.path.join(config.out, name)) for name in pieces)
    why = Counter(reason.split(":")[0] for name, reason in failed.items() if name in pieces)
    counts = dict(clips=len(pieces), here=here, coverage=here / len(pieces), failed=dict(why))
    counts["records without a clip"] = [f"{where}: {text}" for where, text in bad]
    write_json(os.path.join(config.out, "coverage.json"), counts)
    print(f"{here} of {len(pieces)} clips ({here / len(pieces):.1%}) in {config.out}")
    for reason, n in why.most_common():
        print(f"{n:6} {reason}")
    for where, text in bad:
        print(f"{where}: {text}")
    return counts


if __name__ == "__main__":
    run_script(main, Config)
