"""The embedded world, a ball in a box: its physics, its clips, and the questions about them.

    python -m toy.world --out runs/toy/data       # 4,000 clips and their records, in a minute

The box is square and has four coloured walls. Where on a wall the ball hits, u in [0, 1], sets the
angle of its rebound from the normal: phi = bend * (2u - 1). To name the fourth wall, a model has to
carry the exact contact point through three bounces; the words "hits red" are not enough. Each clip
shows six contacts, which fall on the key frames 2..7. The model sees frames 2 and 3 and is asked
which wall comes next (1-hop), second (2-hop), third (3-hop) or fourth (4-hop). A bounce needs the
place of the one before it, and the tiny model has two layers. So a 4-hop answer takes more steps,
one after the other, than one forward pass has.

OUT/clips/N.mp4 are the clips: training clips count from 0, held-out ones from `eval_seed`. The
records are in the Future-L1 training format:

    captions.jsonl          single frames and pairs in words, which stand in for pretraining
    train.jsonl             the four questions of a few clips, with chains of future frames: SFT
    places.jsonl            the same; the chains also say in words where each contact is
    all.jsonl               the same of all training clips
    prompts.jsonl           the same without chains, the answers alone: RL
    test.jsonl              the four questions of the held-out clips
    curation_pool.jsonl     a pool for curation: a third of it asks for the future
    curation_able.jsonl     such questions about other clips, with and without the later frames

Source: ours. 1-, 2- and 3-hop are FutureBench's kinds of questions, 4-hop is ours.
"""

import functools
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import av
import numpy as np
from tqdm import tqdm

from common.cli import run_script
from common.clips import key_frame_positions, read_clip
from common.run import write_json

SIZE, WALL, BALL = 160, 12, 13  # pixels: side of the picture, thickness of a wall, ball's radius
# frames between two contacts, and of a clip: with so many the contacts are key frames 2..7
SEGMENT = 6
FRAMES, FPS = 6 * SEGMENT + 4, 12

COLOURS = {
    "red": (225, 60, 50),
    "green": (50, 170, 80),
    "blue": (60, 90, 225),
    "yellow": (240, 200, 40),
}
WALLS = tuple(COLOURS)  # left, bottom, right, top; y grows upwards, in the picture downwards

# each wall: where its point u lies, its normal, its direction
POINT = (lambda u: (0.0, u), lambda u: (u, 0.0), lambda u: (1.0, u), lambda u: (u, 1.0))
NORMAL = ((1, 0), (0, 1), (-1, 0), (0, -1))
ALONG = ((0, 1), (1, 0), (0, 1), (1, 0))

LATER = " Later frames of the same clip: "  # as curate.py shows them
BINS = 24  # a caption names the ball's place in words x0..x23, y0..y23

# group, frames that are seen, frames that are to come, question
QUESTIONS = (
    ("1-hop", [2, 3], [4], "which wall does the ball hit next ?"),
    ("2-hop", [2, 3], [4, 5], "which wall does the ball hit second ?"),
    ("3-hop", [2, 3], [4, 5, 6], "which wall does the ball hit third ?"),
    ("4-hop", [2, 3], [4, 5, 6, 7], "which wall does the ball hit fourth ?"),
)


# ------------------------------------------------------------------------------- physics and clips


def next_contact(wall, u, bend):
    """Where the ball hits next: (wall, u) -> (wall, u). Ours.

    The rebound angle is phi = bend * (2u - 1), at most 1.45.
    """
    phi = float(np.clip(bend * (2 * u - 1), -1.45, 1.45))
    (x, y), n, t = POINT[wall](u), NORMAL[wall], ALONG[wall]
    dx = math.cos(phi) * n[0] + math.sin(phi) * t[0]
    dy = math.cos(phi) * n[1] + math.sin(phi) * t[1]
    hits = []
    for w in range(4):
        if w == wall:
            continue
        start, speed, other, other_speed = ((x, dx, y, dy), (y, dy, x, dx))[w % 2]
        if speed:
            time_to = ((w >= 2) - start) / speed
            if time_to > 1e-9:
                hits.append((time_to, w, other + time_to * other_speed))
    _, w, u = min(hits)
    return w, u


def contacts(seed, bend):
    """Eight successive contacts [(wall, u)]. Ours.

    They are drawn again if one is within a pixel or so of a corner.
    """
    rng = np.random.default_rng(seed)
    while True:
        path = [(int(rng.integers(4)), float(rng.uniform(0.05, 0.95)))]
        while len(path) < 8 and 0.015 < path[-1][1] < 0.985:
            path.append(next_contact(*path[-1], bend))
        if len(path) == 8:
            return path


def draw(path):
    """Contacts -> frames uint8 (FRAMES, SIZE, SIZE, 3).

    Contact k is frame 4 + 6 (k - 1); in between the ball moves evenly.
    """
    room = SIZE - 2 * WALL - 2 * BALL
    points = np.array([POINT[w](u) for w, u in path])  # (8, 2)
    frames = np.full((FRAMES, SIZE, SIZE, 3), 245, np.uint8)
    frames[:, :, :WALL] = COLOURS["red"]
    frames[:, :, -WALL:] = COLOURS["blue"]
    frames[:, :WALL, WALL:-WALL] = COLOURS["yellow"]
    frames[:, -WALL:, WALL:-WALL] = COLOURS["green"]

    yy, xx = np.mgrid[: 2 * BALL + 3, : 2 * BALL + 3]
    for i, frame in enumerate(frames):
        # the ball's centre, in pixels
        k, since = divmod(i + SEGMENT - 4, SEGMENT)
        x, y = points[k] + (points[k + 1] - points[k]) * since / SEGMENT
        x, y = WALL + BALL + x * room - 0.5, SIZE - (WALL + BALL + y * room) - 0.5

        # a disc with a soft edge, which shows places between pixels
        i0, j0 = int(y) - BALL - 1, int(x) - BALL - 1
        distance = np.hypot(xx + j0 - x, yy + i0 - y)
        cover = np.clip(BALL + 0.5 - distance, 0, 1)[..., None]
        part = frame[i0 : i0 + len(yy), j0 : j0 + len(xx)]
        part[:] = part * (1 - cover) + np.array([30, 30, 40]) * cover
    return frames


def write_mp4(path, frames, fps=FPS):
    """frames uint8 (T, H, W, 3) -> an H.264 file, written under a temporary name and renamed.

    Source: ours.
    """
    with av.open(path + ".part", "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=fps, options={"crf": "18", "preset": "ultrafast"}
        )
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    os.rename(path + ".part", path)


def make_clip(job):
    """(path, seed, bend) -> the clip on disk, unless it is there."""
    path, seed, bend = job
    if not os.path.exists(path):
        write_mp4(path, draw(contacts(seed, bend)))


# -------------------------------------------------------------------------------------------- rows


def heading(a, b):
    """The way from contact a to contact b in words."""
    (x0, y0), (x1, y1) = POINT[a[0]](a[1]), POINT[b[0]](b[1])
    return f"moves {'right' if x1 > x0 else 'left'} {'up' if y1 > y0 else 'down'}"


def turns(images, question, answer=""):
    """A conversation: some images and a question, the answer's chain or nothing."""
    human = "<image> " * images + question
    return [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]


def questions(seed, bend, video, places=False):
    """The four rows of a clip, in the Future-L1 training format. path[k] is key frame k + 1.

    places: the chain says before each wall where the ball is, in the words of the captions.
    """
    path, rows = contacts(seed, bend), []
    for group, seen, future, text in QUESTIONS:
        chain = f"THOUGHT 1: {heading(path[2], path[3])}"
        for n, k in enumerate(future, 2):
            place = f"{place_words(path[k - 1])} " if places else ""
            chain += f" <image> THOUGHT {n}: {place}hits {WALLS[path[k - 1][0]]}"
        row = dict(id=f"{seed}-{group}", video=video, image=seen, reasoning_image=future)
        row.update(group=group, conversations=turns(len(seen), text, chain))
        row.update(options=list(WALLS), answer=WALLS[path[future[-1] - 1][0]])
        rows.append(row)
    return rows


def prompts(seed, bend, video):
    """The same questions with their answers alone: no chain, no future frame. What RL sees."""
    rows = questions(seed, bend, video)
    for row in rows:
        row["reasoning_image"] = []
        row["conversations"][1]["value"] = ""
    return rows


def candidates(seed, bend, video):
    """Three rows of a clip for the curation. Ours.

    Two are about what is visible, the last is one of the four questions by turns.
    """
    path, hop = contacts(seed, bend), questions(seed, bend, video)[seed % 4]
    way, wall = heading(path[1], path[2]), WALLS[path[2][0]]
    ways = ["moves right up", "moves right down", "moves left up", "moves left down"]
    rows = []
    for group, text, options, answer in (
        ("near", "which wall is near the ball ?", list(WALLS), wall),
        ("move", "how does the ball move ?", ways, way),
    ):
        row = dict(hop, id=f"{seed}-{group}", group=group, options=options, answer=answer)
        row["conversations"] = turns(2, text, f"THOUGHT 1: {way} <image>")
        rows.append(dict(row, reasoning_image=[4]))
    return [*rows, hop]


def reading(seed, bend, video):
    """The candidates with their later frames in sight, and without: answers alone. Ours.

    Who learns them can read a frame that is shown, and foresee little: as Qwen3-VL does.
    """
    rows = []
    for row in candidates(seed, bend, video):
        seen, future = row["image"], row["reasoning_image"]
        shown, later = "<image> " * len(seen), LATER + "<image> " * len(future)
        words = row["conversations"][0]["value"].removeprefix(shown)
        for name, human, image in (
            ("later", shown + later + words, [*seen, *future]),
            ("plain", shown + words, seen),
        ):
            new = dict(row, id=f"{row['id']}-{name}", image=image, reasoning_image=[])
            rows.append(dict(new, conversations=turns(0, human)))
    return rows


def place_words(contact):
    """Where the ball is at a contact, in words."""
    wall, u = contact
    x, y = (min(BINS - 1, int(v * BINS)) for v in POINT[wall](u))
    return f"x{x} y{y}"


def captions(seed, bend, video):
    """Rows that stand in for pretraining: single key frames and pairs of them, in words.

    Asked are the ball's place, the wall it is near to, and its direction.
    """
    path, asked = contacts(seed, bend), []
    for k in range(2, 8):
        asked.append(([k], "where is the ball ?", place_words(path[k - 1])))
        asked.append(([k], "which wall is near the ball ?", WALLS[path[k - 1][0]]))
        if k < 7:
            way = heading(path[k - 1], path[k])
            asked.append(([k, k + 1], "how does the ball move ?", way))
    rows = []
    for i, (image, text, answer) in enumerate(asked):
        row = dict(id=f"{seed}-caption-{i}", video=video, image=image, reasoning_image=[])
        row.update(group="caption", answer=answer, conversations=turns(len(image), text))
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------- files


@dataclass
class Config:
    out: str = "runs/toy/data"  # the folder of the clips and the records
    clips: int = 3000  # training clips
    annotated: int = 200  # of these, clips whose questions have chains of future frames
    eval_clips: int = 1000  # held-out clips
    eval_seed: int = 6_000_000  # the first of them; tuning used 1_000_000, 2_000_000, 5_000_000
    bend: float = 1.05  # rebound angle at the end of a wall, radians; -1.3 is easier


def write_rows(path, rows):
    """Records -> a .jsonl file, as a whole or not at all."""
    with open(path + ".part", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    os.rename(path + ".part", path)


def read_jsonl(path):
    """A .jsonl file -> its records."""
    with open(path) as f:
        return [json.loads(line) for line in f]


def make_clips(folder, seeds, bend):
    """Write those of the clips that are not there yet, on all cores."""
    jobs = [(os.path.join(folder, f"{seed}.mp4"), seed, bend) for seed in seeds]
    missing = [job for job in jobs if not os.path.exists(job[0])]
    if not missing:
        return
    began = time.time()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(make_clip, missing, chunksize=16)
        for _ in tqdm(done, total=len(missing), desc="clips"):
            pass
    print(f"{len(missing)} clips written in {time.time() - began:.0f} s")


def claim(config):
    """Make config.out, and note in world.json what it holds.

    Raises SystemExit if it holds a world with other settings: clips are kept by their number.
    """
    os.makedirs(os.path.join(config.out, "clips"), exist_ok=True)
    path, settings = os.path.join(config.out, "world.json"), asdict(config)
    del settings["out"]
    if os.path.exists(path):
        with open(path) as f:
            before = json.load(f)
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            raise SystemExit(
                f"{path}: this world was made with other values of {', '.join(changed)}; "
                "choose another --out"
            )
    write_json(path, settings)


def make_world(config):
    """Clips and records in config.out -> {name: jsonl file}. Clips that are there are kept.

    Raises SystemExit as `claim` does.
    """
    claim(config)
    training = range(config.clips)
    test = range(config.eval_seed, config.eval_seed + config.eval_clips)
    make_clips(os.path.join(config.out, "clips"), [*training, *test], config.bend)
    annotated, half = training[: config.annotated], config.clips // 2
    kinds = dict(
        captions=(captions, training),
        train=(questions, annotated),
        places=(functools.partial(questions, places=True), annotated),
        all=(questions, training),
        prompts=(prompts, training),
        test=(questions, test),
        curation_pool=(candidates, training[: min(400, half)]),
        curation_able=(reading, training[half:]),
    )
    paths = {}
    for name, (make, seeds) in kinds.items():
        rows = []
        for seed in seeds:
            rows += make(seed, config.bend, f"clips/{seed}.mp4")
        paths[name] = os.path.join(config.out, f"{name}.jsonl")
        write_rows(paths[name], rows)
    return paths


def same_number(pool, selected, seed, folder):
    """Two sets of equal size to learn from: the selected records, and random ones of the pool.

    pool, selected: jsonl files. FOLDER/chosen.jsonl has the selected records in the order of the
    pool, FOLDER/random.jsonl as many others, drawn with `seed`.
    """
    records, ids = read_jsonl(pool), {record["id"] for record in read_jsonl(selected)}
    chosen = [record for record in records if record["id"] in ids]
    order = np.random.default_rng(int(seed)).permutation(len(records))
    write_rows(os.path.join(folder, "chosen.jsonl"), chosen)
    write_rows(os.path.join(folder, "random.jsonl"), [records[i] for i in order[: len(chosen)]])


def draw_key_frames(clip, png):
    """The eight key frames of a clip in a row, under what they are to the 4-hop question."""
    from matplotlib.figure import Figure  # here alone: it takes a while to import

    frames, _, _ = read_clip(clip, key_frame_positions)
    titles = {2: "2 seen", 3: "3 seen"} | {k: f"{k} future" for k in (4, 5, 6, 7)}
    fig = Figure(figsize=(11, 1.7), layout="constrained")
    for i, (ax, frame) in enumerate(zip(fig.subplots(1, 8), frames), 1):
        ax.imshow(frame)
        ax.set(xticks=[], yticks=[], title=titles.get(i, f"{i}"))
    fig.savefig(png, dpi=120)


def main(config):
    """The world in its folder, unless it is there, and at last a picture of its first clip."""
    picture = os.path.join(config.out, "clip.png")
    claim(config)
    if not os.path.exists(picture):
        make_world(config)
        draw_key_frames(os.path.join(config.out, "clips", "0.mp4"), picture)
    print(f"{config.out}: {config.clips} training clips, {config.eval_clips} held-out ones")


if __name__ == "__main__":
    run_script(main, Config)
