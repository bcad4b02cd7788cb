"""Getting clips, from a server on this machine that has some and fails in each way."""

import json
import os
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from common.clips import key_frame_positions, read_clip
from common.formats import RecordError
from tests.common.test_clips import turn_clip, write_clip
from tests.conftest import shown
from tools import clips
from tools.clips import Config, Piece, piece_of


@pytest.fixture
def server(film):
    """-> (its url template, Counter of what was asked). Videos: `good` and `short`, of 40 frames,
    12 a second; `text`, which is none; `torn`, whose end does not come; no other.
    """
    with open(film("good.mp4"), "rb") as f:
        good = f.read()
    videos = dict(good=good, short=good, text=b"no film\n" * 99, torn=good)
    asked = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.split("?")[0].strip("/").removesuffix(".mp4")
            asked[name] += 1
            if name not in videos:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Type", "video/mp4")
            self.send_header("Content-Length", str(len(videos[name])))
            self.end_headers()
            content = videos[name]
            if self.command == "GET":
                self.wfile.write(content[: len(content) // 2] if name == "torn" else content)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/{{id}}.mp4", asked
    http.shutdown()


def record(source, start, end, **more):
    times = dict(start=f"0:00:{start:06.3f}", end=f"0:00:{end:06.3f}")
    video = f"videos/{source}-{start}-{end}.mp4"
    row = dict(video=video, question="what next ?", answer="<ans>red</ans>", meta_data=times)
    return dict(row, question_images_index=[3], reasoning_images_index=[], **more)


def write(tmp_path, records):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


RECORDS = [
    record("good", 0.5, 1.5),  # frames 6 to 17
    record("good", 1.0, 3.0),  # frames 12 to 35
    record("gone", 0.0, 1.0),
    record("text", 0.0, 1.0),
    record("torn", 0.0, 1.0),
    record("short", 10.0, 12.0),  # begins after its end
    record("short", 3.0, 9.0),  # 0.3 of 6 s
    dict(video="good.mp4"),
]
WHY = {
    "videos/gone-0.0-1.0.mp4": "cannot be fetched: HTTP Error 404",
    "videos/text-0.0-1.0.mp4": "cannot be cut: InvalidDataError",
    "videos/torn-0.0-1.0.mp4": "cannot be fetched: ",
    "videos/short-10.0-12.0.mp4": "the video ends before 10.0 s",
    "videos/short-3.0-9.0.mp4": "holds 0.3 of 6.0 s",
}


def test_each_way(server, tmp_path, capsys):
    """Breaks if a clip is another part of its video than its record says, or a failure has no name,
    stops the others, or leaves a file.
    """
    url, asked = server
    data, out = write(tmp_path, RECORDS), str(tmp_path / "clips")
    counts = clips.main(Config(data=data, out=out, url=url))
    assert (counts["clips"], counts["here"]) == (7, 2) and counts["coverage"] == 2 / 7
    assert sum(counts["failed"].values()) == 5 and counts["failed"]["cannot be fetched"] == 2
    assert [text.split(": ")[0] for text in counts["records without a clip"]] == [f"{data}:7"]
    with open(os.path.join(out, "failed.jsonl")) as f:
        failed = {line["video"]: line["why"] for line in map(json.loads, f)}
    assert failed.keys() == WHY.keys() and all(failed[name].startswith(WHY[name]) for name in WHY)
    printed = capsys.readouterr().out
    assert all(f"failed {name}: {WHY[name]}" in printed for name in WHY)
    assert "2 of 7 clips (28.6%)" in printed

    names = ["good-0.5-1.5.mp4", "good-1.0-3.0.mp4"]
    assert sorted(os.listdir(os.path.join(out, "videos"))) == names
    assert sorted(os.listdir(out)) == [".whole", "coverage.json", "failed.jsonl", "videos"]
    assert os.listdir(os.path.join(out, ".whole")) == []
    assert asked == dict(good=1, gone=1, text=1, torn=1, short=1)
    for name, first, length in (*zip(names, (6, 12), (12, 24)),):
        path = os.path.join(out, "videos", name)
        pictures, numbers, fps = read_clip(path, key_frame_positions)
        assert shown(pictures) == [first + k for k in key_frame_positions(length)]
        assert numbers == key_frame_positions(length) and abs(fps - 12) < 0.1


def test_a_second_run_does_what_is_missing(server, tmp_path):
    """Breaks if what is there is fetched again, what failed is not, or --no-again asks again."""
    url, asked = server
    data, out = write(tmp_path, RECORDS), str(tmp_path / "clips")
    clips.main(Config(data=data, out=out, url=url))
    clips.main(Config(data=data, out=out, url=url))
    assert asked == dict(good=1, gone=2, text=2, torn=2, short=2)
    os.remove(os.path.join(out, "videos", "good-1.0-3.0.mp4"))
    counts = clips.main(Config(data=data, out=out, url=url, again=False))
    assert asked == dict(good=2, gone=2, text=2, torn=2, short=2)
    assert counts["here"] == 2 and sum(counts["failed"].values()) == 5


def test_a_turned_video(tmp_path):
    """Breaks if the clip of a video that a phone wrote on its side lies on its side."""
    picture = np.full((30, 64, 96, 3), 90, np.uint8)
    picture[:, :32, :48] = 250, 0, 0  # red at its upper left
    video = write_clip(tmp_path / "turned.mp4", picture, range(0, 1200, 40))
    turn_clip(video, 0, 1)
    clips.cut(video, Piece("x.mp4", "x", 0.2, 1.0), str(tmp_path / "part.mp4"))
    pictures, numbers, _ = read_clip(str(tmp_path / "part.mp4"), lambda n: [0, n - 1])
    assert numbers[-1] == 19 and pictures.shape == (2, 96, 64, 3)
    assert np.abs(pictures - np.rot90(picture[:2], -1, axes=(1, 2)).astype(int)).mean() < 8


def test_pieces():
    """Breaks if an id with hyphens, times in the name or JSON text are misread."""
    assert piece_of(record("a-b_c-1-2-x", 1.5, 2.5), "f:0").source == "a-b_c-1-2-x"
    plain = dict(video="id-x-00:01:02.5-63.mp4")
    assert piece_of(plain, "f:0") == Piece(plain["video"], "id-x", 62.5, 63.0)
    meta = json.dumps(dict(start="1:00:00", end="1:00:01.25"))
    assert piece_of(dict(video="x-1-2.mp4", meta_data=meta), "f:0")[2:] == (3600.0, 3601.25)
    assert piece_of(dict(video="../../x-1-2.mp4"), "f:0").name == "x-1-2.mp4"
    for bad in (dict(), [], dict(video="x.mp4"), dict(video="x-2-1.mp4"), dict(video="x-a-b.mp4")):
        with pytest.raises(RecordError, match="^f:0: "):
            piece_of(bad, "f:0")


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    """Breaks if an absent package or an empty file is a traceback."""
    monkeypatch.setitem(sys.modules, "yt_dlp", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    data = write(tmp_path, RECORDS)
    with pytest.raises(SystemExit, match="pip install yt-dlp"):
        clips.main(Config(data=data, out=str(tmp_path / "out")))
    with pytest.raises(SystemExit, match="pip install datasets"):
        clips.main(Config(data="some/records"))
    with pytest.raises(SystemExit, match="no record names a clip; the first: .*:0: no 'video'"):
        clips.main(Config(data=write(tmp_path, [dict(id=1)])))
    with pytest.raises(ValueError, match="expected one with {id} in it"):
        Config(url="http://x")


def test_yt_dlp_itself(server, tmp_path):
    """Breaks if the package is called otherwise than it wants, or its failures have no words."""
    pytest.importorskip("yt_dlp")
    url, asked = server
    data, out = write(tmp_path, RECORDS[:3]), str(tmp_path / "clips")
    counts = clips.main(Config(data=data, out=out, url=url + "?x"))
    assert counts["here"] == 2
    assert list(counts["failed"].values()) == [1]
