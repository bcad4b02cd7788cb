"""The embedded world: the whole method on a laptop, in minutes, on real mp4 clips.

    python toy.py                                            # one seed: clips, pretraining, SFT, LA-DAPO, curation, tables
    python toy.py --seeds 3 --variants all --rl all          # the README's tables

The paddle box: a ball in a square box with four coloured walls. Where on a wall it hits, u in [0, 1], sets the angle of
its rebound from the normal: phi = bend * (2u - 1). The picture of a contact is therefore all one needs to know, and
the words "hits red" are not: who wants to know the third wall has to keep the exact place in mind, twice. Each clip shows
six contacts, which fall on key frames 2..7; the model sees frames 3 and 4 and is asked which wall comes next (1-hop),
second (2-hop), third (3-hop), or second when the third contact's frame is shown too (interp).

Everything below the world is the real path: mp4 -> decord -> patches -> `curate.probe` -> `sft.train` -> `la_dapo.train` ->
`evaluate.evaluate`. This file makes the clips, the rows, a tokenizer and a tiny random Qwen3-VL; a short training on captions
of single frames stands in for Qwen3-VL's pretraining. A few clips have chains of future frames, which SFT learns from; all
have answers, which RL learns from. Settings differ from the paper's where `TINY` and `TINY_RL` say so, and only there.

Source: the world and the settings are ours; the four questions are FutureBench's.
"""

import dataclasses
import json
import math
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor

import av
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig

import curate
import evaluate
import la_dapo
import sft
from data import DataConfig, parse_config, read_rows
from model import FutureL1, add_latent_tokens
from report import draw_bars, draw_key_frames, draw_rl


@dataclasses.dataclass
class Config:
    out: str = "runs/toy"  # everything lands here
    seeds: int = 1  # trainings, each with its own pretraining
    fresh: bool = False  # delete `out` first
    clips: int = 3000  # training clips: their frames are captioned for the pretraining
    annotated: int = 200  # of these, clips that also have the four questions with their chains of future frames
    eval_clips: int = 1000  # held-out clips, four questions each
    eval_seed: int = 4_000_000  # where held-out clips start; tuning used 1_000_000 and 2_000_000
    bend: float = 1.05  # rebound angle at the end of a wall, radians; -1.3 is easier
    pretrain_steps: int = 1500  # x 64 captions
    sft_steps: int = 600  # x 64 rows
    rl_steps: int = 80  # of LA-DAPO, on the answers of all training clips
    variants: str = "text,latent"  # which SFT trainings to compare, or "all"
    rl: str = "la-dapo"  # which RL trainings to compare, or "all"
    curation: bool = True  # also choose rows of a mixed pool by visual gain, and train on them
    workers: int = 0  # decoding processes; the clips fit in memory, so one pass and a cache do

    @property
    def rl_names(self):
        return list(RL_VARIANTS) if self.rl == "all" else [name for name in self.rl.split(",") if name]

    @property
    def sft_names(self):
        """The trainings asked for, and those that RL starts from."""
        names = list(VARIANTS) if self.variants == "all" else [name for name in self.variants.split(",") if name]
        return names + sorted({RL_VARIANTS[name][0] for name in self.rl_names if name in RL_VARIANTS} - set(names))


# What differs from the paper's settings, in one place: the model is 10,000 times smaller and learns from scratch.
TINY = dict(global_batch=64, micro_batch=64, lr=2e-3, beta2=0.98, weight_decay=0.0, save_every=500,
            latent_head="linear", latent_loss="nmse", lam=1.0,  # raw states do not fit visual embeddings at this size
            stop_term=True,  # without it nothing teaches the model not to stop before its first latent
            image_max_tokens=1, l_max=1, max_length=256, system="watch the ball", cache_frames=10**6)
VARIANTS = {
    "text": dict(spans=False),
    "pause": dict(pause_tokens=True),
    "latent": dict(),
    "latent+self": dict(self_forcing=0.5, self_forcing_passes=3),
    "latent-stop": dict(stop_term=False),
    "latent-long": dict(longer=True),  # what SFT makes of the time that RL takes
    "latent-long-all": dict(longer=True, all=True),
}
# Its policy is sure of itself, so many samples are needed to see two outcomes: they are decoded together while equal.
LONGER = 2.1  # steps of "latent-long" over those of "latent": what the time of the RL run buys
TINY_RL = dict({k: TINY[k] for k in ("image_max_tokens", "l_max", "max_length", "system", "cache_frames")},
               groups=10**6, prompts=256, max_tries=1, rollout_batch=128, share=True, group_size=16, low=0.0, high=1.0,
               temperature=1.2, top_p=1.0, max_new_tokens=48, max_latents=2, micro_batch=64, kl=0.0, lr=1e-4, beta2=0.99,
               warmup_steps=20, final_lr=0.1, adjoint_terms=-1, save_every=20)
RL_VARIANTS = {  # name: (the SFT it starts from, settings)
    "dapo": ("latent", dict(lambda_c=0.0, lambda_d=0.0)),
    "dapo+ctr": ("latent", dict(lambda_d=0.0)),
    "dapo+div": ("latent", dict(lambda_c=0.0)),
    "la-dapo": ("latent", dict()),
    "constants": ("latent", dict(adjoint_terms=0)),
    "noise": ("latent", dict(adjoint_terms=0, latent_sigma=0.1, share=False, prompts=64)),
    "text-rl": ("text", dict()),
}
NAMES = {"base": "base (captions only)", "text": "text-only SFT", "pause": "pause tokens (control)", "latent": "latent SFT",
         "latent+self": "latent SFT, self-forcing", "latent-stop": "latent SFT, no stop term",
         "latent-long": "latent SFT, longer", "latent-long-all": "latent SFT, longer, all clips annotated",
         "dapo": "RL: DAPO", "dapo+ctr": "RL: DAPO + R_ctr", "dapo+div": "RL: DAPO + R_div", "la-dapo": "RL: LA-DAPO (both)",
         "constants": "RL: LA-DAPO, latents as constants", "noise": "RL: LA-DAPO, noisy latents", "text-rl": "RL from text-only SFT",
         "able": "before", "selected": "SFT on the selected rows", "random": "SFT on as many random rows"}
ABLATIONS = ("zero", "noise", "shuffled", "true")
GROUPS = ("1-hop", "2-hop", "3-hop", "interp")

# ------------------------------------------------------------------------------------------------------------ world

SIZE, WALL, BALL = 160, 12, 13  # pixels: side of the picture, thickness of a wall, radius of the ball
SEGMENT = 6  # frames between two contacts; with FRAMES = 6 * SEGMENT + 4 the contacts are key frames 2..7
FRAMES, FPS = 6 * SEGMENT + 4, 12
COLOURS = {"red": (225, 60, 50), "green": (50, 170, 80), "blue": (60, 90, 225), "yellow": (240, 200, 40)}
WALLS = tuple(COLOURS)  # left, bottom, right, top; y grows downwards in the picture, upwards in the world
POINT = (lambda u: (0.0, u), lambda u: (u, 0.0), lambda u: (1.0, u), lambda u: (u, 1.0))
NORMAL, ALONG = ((1, 0), (0, 1), (-1, 0), (0, -1)), ((0, 1), (1, 0), (0, 1), (1, 0))


def next_contact(wall, u, bend):
    """Where the ball hits next: (wall, u) -> (wall, u). Rebound angle phi = bend * (2u - 1), at most 1.45. Ours."""
    phi = float(np.clip(bend * (2 * u - 1), -1.45, 1.45))
    (x, y), n, t = POINT[wall](u), NORMAL[wall], ALONG[wall]
    dx, dy = math.cos(phi) * n[0] + math.sin(phi) * t[0], math.cos(phi) * n[1] + math.sin(phi) * t[1]
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
    """Eight successive contacts [(wall, u)], drawn again if one is within a pixel or so of a corner. Ours."""
    rng = np.random.default_rng(seed)
    while True:
        path = [(int(rng.integers(4)), float(rng.uniform(0.05, 0.95)))]
        while len(path) < 8 and 0.015 < path[-1][1] < 0.985:
            path.append(next_contact(*path[-1], bend))
        if len(path) == 8:
            return path


def draw(path):
    """Contacts -> frames uint8 (FRAMES, SIZE, SIZE, 3). Contact k is frame 4 + 6 (k - 1), moving evenly between."""
    room = SIZE - 2 * WALL - 2 * BALL
    points = np.array([POINT[w](u) for w, u in path])  # (8, 2)
    frames = np.full((FRAMES, SIZE, SIZE, 3), 245, np.uint8)
    frames[:, :, :WALL], frames[:, :, -WALL:] = COLOURS["red"], COLOURS["blue"]
    frames[:, :WALL, WALL:-WALL], frames[:, -WALL:, WALL:-WALL] = COLOURS["yellow"], COLOURS["green"]
    yy, xx = np.mgrid[:2 * BALL + 3, :2 * BALL + 3]
    for i, frame in enumerate(frames):
        k, since = divmod(i + SEGMENT - 4, SEGMENT)
        x, y = points[k] + (points[k + 1] - points[k]) * since / SEGMENT
        x, y = WALL + BALL + x * room - 0.5, SIZE - (WALL + BALL + y * room) - 0.5
        i0, j0 = int(y) - BALL - 1, int(x) - BALL - 1
        cover = np.clip(BALL + 0.5 - np.hypot(xx + j0 - x, yy + i0 - y), 0, 1)[..., None]  # soft: places between pixels
        part = frame[i0:i0 + len(yy), j0:j0 + len(xx)]
        part[:] = part * (1 - cover) + np.array([30, 30, 40]) * cover
    return frames


def write_mp4(path, frames, fps=FPS):
    """frames uint8 (T, H, W, 3) -> an H.264 file, written under a temporary name and renamed. Source: ours."""
    with av.open(path + ".part", "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18", "preset": "ultrafast"})
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


def heading(a, b):
    """The way from contact a to contact b in words."""
    (x0, y0), (x1, y1) = POINT[a[0]](a[1]), POINT[b[0]](b[1])
    return f"moves {'right' if x1 > x0 else 'left'} {'up' if y1 > y0 else 'down'}"


def questions(seed, bend, video):
    """The four rows of a clip, in the Future-L1 training format. path[k] is key frame k + 1."""
    path = contacts(seed, bend)
    hits = {k: f"hits {WALLS[path[k - 1][0]]}" for k in range(2, 8)}
    rows = []
    for group, seen, future, text in (
        ("1-hop", [3, 4], [5], "which wall does the ball hit next ?"),
        ("2-hop", [3, 4], [5, 6], "which wall does the ball hit second ?"),
        ("3-hop", [3, 4], [5, 6, 7], "which wall does the ball hit third ?"),
        ("interp", [3, 4, 7], [5, 6], "the last picture is the third hit . which wall does the ball hit second ?"),
    ):
        gpt = f"THOUGHT 1: {heading(path[3], path[4])}" + "".join(
            f" <image> THOUGHT {n}: {hits[k]}" for n, k in enumerate(future, 2))
        rows.append(dict(
            id=f"{seed}-{group}", video=video, image=seen, reasoning_image=future, group=group,
            conversations=[{"from": "human", "value": "<image> " * len(seen) + text}, {"from": "gpt", "value": gpt}],
            options=list(WALLS), answer=WALLS[path[future[-1] - 1][0]]))
    return rows


def prompts(seed, bend, video):
    """The same questions with their answers alone: neither chain nor future frames. What RL sees."""
    return [dict(row, reasoning_image=[], conversations=[row["conversations"][0], {"from": "gpt", "value": ""}])
            for row in questions(seed, bend, video)]


BINS = 24  # a caption names the ball's place in words x0..x23, y0..y23


def captions(seed, bend, video):
    """Rows that stand in for pretraining: place, nearest wall and direction, of single key frames and pairs."""
    path, rows = contacts(seed, bend), []
    for k in range(2, 8):
        wall, u = path[k - 1]
        x, y = (min(BINS - 1, int(v * BINS)) for v in POINT[wall](u))
        rows += [([k], "where is the ball ?", f"x{x} y{y}"), ([k], "which wall is near the ball ?", WALLS[wall])]
        if k < 7:
            rows.append(([k, k + 1], "how does the ball move ?", heading(path[k - 1], path[k])))
    return [dict(id=f"{seed}-caption-{i}", video=video, image=image, reasoning_image=[], group="caption", answer=answer,
                 conversations=[{"from": "human", "value": "<image> " * len(image) + text},
                                {"from": "gpt", "value": ""}])
            for i, (image, text, answer) in enumerate(rows)]


def write_rows(path, rows):
    with open(path + ".part", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    os.rename(path + ".part", path)


def make_world(config):
    """Clips and rows on disk -> dict(captions, train, all, prompts, test: jsonl files). What is there is kept."""
    folder = os.path.join(config.out, "data")
    os.makedirs(os.path.join(folder, "clips"), exist_ok=True)
    seeds = dict(captions=range(config.clips), train=range(min(config.annotated, config.clips)),
                 all=range(config.clips), prompts=range(config.clips),
                 test=range(config.eval_seed, config.eval_seed + config.eval_clips))
    jobs = [(os.path.join(folder, "clips", f"{s}.mp4"), s, config.bend) for s in (*seeds["captions"], *seeds["test"])]
    missing = [job for job in jobs if not os.path.exists(job[0])]
    if missing:
        began = time.time()
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            for _ in tqdm(pool.map(make_clip, missing, chunksize=16), total=len(missing), desc="clips"):
                pass
        print(f"{len(missing)} clips written in {time.time() - began:.0f} s")
    paths = {name: os.path.join(folder, f"{name}.jsonl") for name in seeds}
    for name, make in (("captions", captions), ("train", questions), ("all", questions), ("prompts", prompts),
                       ("test", questions)):
        write_rows(paths[name], [row for s in seeds[name] for row in make(s, config.bend, f"clips/{s}.mp4")])
    return paths


# ------------------------------------------------------------------------------------------------------- tiny model

def make_tokenizer(texts):
    """Words split at white space -> a tokenizer with Qwen's chat markup, which AutoTokenizer loads."""
    words = sorted({word for text in texts for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken(tag, normalized=False)
                          for tag in ("<reason>", "</reason>", "<answer>", "</answer>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        unk_token="<unk>", clean_up_tokenization_spaces=False)
    # not among the words: text that looks like a control token stays unknown text
    tokenizer.add_tokens([f"<|{name}|>" for name in ("im_start", "vision_start", "vision_end", "image_pad", "video_pad")],
                         special_tokens=True)
    add_latent_tokens(tokenizer)
    return tokenizer


def make_model(tokenizer, seed, hidden=96, layers=2):
    """A random Qwen3-VL of half a million weights: one visual token a frame at 32x32 pixels."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in (
        ("image_token_id", "image_pad"), ("video_token_id", "video_pad"), ("vision_start_token_id", "vision_start"),
        ("vision_end_token_id", "vision_end"))}
    head = hidden // 4
    config = Qwen3VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden,
                         num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=head,
                         max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_interleaved=True,
                                              mrope_section=[head // 2 - 2 * (head // 6), head // 6, head // 6])),
        vision_config=dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=hidden,
                           num_position_embeddings=64, deepstack_visual_indexes=[0]),
        tie_word_embeddings=False, **ids)
    torch.manual_seed(seed)
    model = FutureL1(config)
    for module in model.modules():  # 1 / sqrt(fan in): with the usual 0.02 so small a model learns nothing visual
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d)):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    model.set_latent_tokens(add_latent_tokens(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


# --------------------------------------------------------------------------------------------------------- pipeline

def trained(script, out, rows=None, **settings):
    """The checkpoint of a training (script: sft or la_dapo), run unless it is already complete."""
    done = sft.checkpoints(out)
    if done and done[-1].endswith(f"step_{settings['steps']:06d}"):
        return done[-1]
    print(f"\n== training {out}")
    return script.train(script.Config(**{**settings, "out": out, "resume": bool(done)}), rows)


def scored(model, data, out, config, latents="generated"):
    print(f"\n== evaluating {out}")
    shared = {f.name for f in dataclasses.fields(DataConfig)} & set(TINY)
    return evaluate.evaluate(evaluate.Config(
        model=model, data=data, out=out, latents=latents, batch=250, max_new_tokens=48, max_latents=2,
        workers=config.workers, **{k: TINY[k] for k in shared}))


def run_seed(seed, config, world):
    """All trainings and evaluations of one seed -> {row of the table: {group: accuracy}}, {ablation: ...}."""
    home = os.path.join(config.out, f"seed_{seed}")
    start = os.path.join(home, "random")
    if not os.path.exists(start):
        with open(world["captions"]) as f, open(world["train"]) as g:
            records = [json.loads(line) for line in [*f, *g]]
        texts = ["system user assistant", TINY["system"]]
        for r in records:
            texts += [r["answer"], *(t["value"].replace("<image>", " ") for t in r["conversations"])]
        tokenizer = make_tokenizer(texts)
        make_model(tokenizer, seed).save_pretrained(start + ".part")
        tokenizer.save_pretrained(start + ".part")
        os.rename(start + ".part", start)
    common = dict(seed=seed, workers=config.workers)
    base = trained(sft, os.path.join(home, "base"), **{**TINY, **common, **dict(
        model=start, data=world["captions"], steps=config.pretrain_steps, freeze_vision=False, spans=False,
        latent_head="", lr=1e-3)})
    models, scores, ablations = {}, {"base": scored(base, world["test"], os.path.join(home, "eval_base"), config)}, {}
    for name in config.sft_names:
        variant = dict(VARIANTS[name])
        steps = round(config.sft_steps * LONGER) if variant.pop("longer", False) else config.sft_steps
        data = world["all" if variant.pop("all", False) else "train"]
        models[name] = trained(sft, os.path.join(home, name), **{**TINY, **common, **variant, **dict(
            model=base, data=data, steps=steps)})
    for name in config.rl_names:
        start, variant = RL_VARIANTS[name]
        models[name] = trained(la_dapo, os.path.join(home, name), **{**TINY_RL, **common, **variant, **dict(
            model=models[start], data=world["prompts"], steps=config.rl_steps)})
    for name, model in models.items():
        scores[name] = scored(model, world["test"], os.path.join(home, f"eval_{name}"), config,
                              "pause" if name == "pause" else "generated")
    for kind in ABLATIONS if "latent" in models else ():
        ablations[kind] = scored(models["latent"], world["test"], os.path.join(home, f"eval_latent_{kind}"), config, kind)
    if ablations:
        ablations = {"generated": scores["latent"], **ablations}
    return scores, ablations


def spread(values):
    """Mean and, for two seeds or more, the standard deviation over seeds."""
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def markdown(results, names, groups=GROUPS):
    """[{row: {group: scores}} a seed] -> a table as text; avg is the micro average."""
    lines = ["| | " + " | ".join([*groups, "avg"]) + " |", "|---" * (len(groups) + 2) + "|"]
    for name in results[0]:
        cells = [spread([r[name][g]["accuracy"] for r in results]) for g in (*groups, "all")]
        lines.append(f"| {names.get(name, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def candidates(seed, bend, video):
    """Three rows of a clip: two about what is visible, and one of 1-, 2- and 3-hop by turns. Source: ours."""
    path, hop = contacts(seed, bend), questions(seed, bend, video)[seed % 3]
    moves, ways = heading(path[2], path[3]), [f"moves {x} {y}" for x in ("right", "left") for y in ("up", "down")]
    seen = [dict(hop, id=f"{seed}-{group}", group=group, options=options, answer=answer, reasoning_image=[5], conversations=[
        {"from": "human", "value": f"<image> <image> {text}"}, {"from": "gpt", "value": f"THOUGHT 1: {moves} <image>"}])
        for group, text, options, answer in (("near", "which wall is near the ball ?", list(WALLS), WALLS[path[3][0]]),
                                             ("move", "how does the ball move ?", ways, moves))]
    return [*seen, hop]


def spearman(a, b):
    """Rank correlation of two series; ties share their mean rank. Source: Spearman 1904."""
    def ranks(values):
        _, at, count = np.unique(values, return_inverse=True, return_counts=True)
        return (count.cumsum() - (count - 1) / 2)[at]
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def run_curation(seed, config, world):
    """Curation with one seed -> {training: {group: scores}}, {figure: value}. sec. 3.2; the pool is ours.

    The captions model first learns, on clips of its own, to answer such questions with and without the later frames in
    sight. That stands in for Qwen3-VL, which can read a frame it is given but hardly foresee it. The result is the model
    that is probed, and that then learns from the chosen rows, or from as many random ones.
    """
    home, folder = os.path.join(config.out, f"seed_{seed}"), os.path.dirname(world["train"])
    clips = dict(pool=range(min(400, config.clips // 2)), able=range(config.clips // 2, config.clips))
    files = {name: os.path.join(folder, f"curation_{name}.jsonl") for name in (*clips, "test")}
    for name, seeds in clips.items():
        write_rows(files[name], [row for s in seeds for row in candidates(s, config.bend, f"clips/{s}.mp4")])
    with open(world["test"]) as f:
        write_rows(files["test"], [row for row in map(json.loads, f) if row["group"] != "interp"])
    able = [r for row in read_rows(files["able"]) for r in (curate.with_future(row), dataclasses.replace(row, response=[]))]
    common = dict(TINY, seed=seed, workers=config.workers)
    base = trained(sft, os.path.join(home, "able"), able, **{**common, **dict(
        model=sft.newest(os.path.join(home, "base")), spans=False, lr=1e-3, steps=max(1, config.pretrain_steps // 15))})
    pool, figures, gains = read_rows(files["pool"]), {}, []
    c = curate.Config(model=base, data=files["pool"], out=os.path.join(home, "curation"), seed=seed, batch=50, max_latents=2,
                      max_new_tokens=12, k=len(pool) // 6, workers=config.workers,
                      **{f.name: TINY[f.name] for f in dataclasses.fields(DataConfig) if f.name in TINY})
    for c.score in ("logprob", "counts"):
        lines = curate.probe(c).values()
        t, v = ("p_t", "p_v") if c.score == "counts" else ("logp_t", "logp_v")
        gains.append([line[v] - line[t] for line in lines])
        chosen = {record["id"] for record in curate.cut(c)}
        figures[f"share of hops, chosen by {c.score}"] = np.mean([row.group in GROUPS for row in pool if row.id in chosen])
        spent = evaluate.read_lines(os.path.join(c.out, f"{c.name}.seconds_0.jsonl"))
        figures[f"seconds, {c.score}"] = sum(line["seconds"] for line in spent)
    figures["rank correlation of the two scores"] = spearman(*gains)
    some = np.random.default_rng(seed).permutation(len(pool))[:len(chosen)]
    sets = dict(selected=[row for row in pool if row.id in chosen], random=[pool[i] for i in some])
    figures["rows in each set"] = len(chosen)
    scores = {"able": scored(base, files["test"], os.path.join(home, "eval_able"), config)}
    for name, rows in sets.items() if chosen else ():
        figures[f"share of hops, {name}"] = np.mean([row.group in GROUPS for row in rows])
        model = trained(sft, os.path.join(home, name), rows, **common, model=base, steps=max(1, config.sft_steps // 3))
        scores[name] = scored(model, files["test"], os.path.join(home, f"eval_{name}"), config)
    return scores, figures


def main(config):
    torch.set_num_threads(1)  # so small a model gains little from a second one, and loses much on a busy machine
    if set(config.sft_names) - set(VARIANTS) or set(config.rl_names) - set(RL_VARIANTS) or config.seeds < 1:
        raise SystemExit(f"--variants takes some of {', '.join(VARIANTS)}, --rl of {', '.join(RL_VARIANTS)}, and --seeds "
                         "at least 1")
    path = os.path.join(config.out, "toy.json")
    if config.fresh and os.path.isdir(config.out):
        if os.listdir(config.out) and not os.path.exists(path):
            raise SystemExit(f"{config.out} was not made by this script (it has no toy.json): not deleting it")
        shutil.rmtree(config.out)
    os.makedirs(config.out, exist_ok=True)
    free = {"seeds", "fresh", "workers", "variants", "rl", "curation"}
    settings = dict({k: v for k, v in dataclasses.asdict(config).items() if k not in free}, tiny=TINY, tiny_rl=TINY_RL,
                    trainings=VARIANTS, rl_trainings={name: list(v) for name, v in RL_VARIANTS.items()}, longer=LONGER)
    if os.path.exists(path):
        with open(path) as f:
            if json.load(f) != settings:
                raise SystemExit(f"{config.out} was made with other settings (toy.json): pass --fresh to start over, "
                                 "or another --out")
    with open(path, "w") as f:
        json.dump(settings, f, indent=1)

    began = time.time()
    world = make_world(config)
    titles = {3: "3 seen", 4: "4 seen", 5: "5 future", 6: "6 future", 7: "7 future"}
    draw_key_frames(os.path.join(config.out, "data", "clips", "0.mp4"), titles, os.path.join(config.out, "clip.png"))
    results, ablations = zip(*(run_seed(seed, config, world) for seed in range(config.seeds)))
    text = f"Accuracy on {config.eval_clips} held-out clips a group, {config.seeds} seed(s)\n\n" + markdown(results, NAMES)
    if ablations[0]:
        text += "\n\nLatent SFT, with its spans fed other vectors\n\n" + markdown(ablations, {})
    curated, figures = [], []
    if config.curation:
        curated, figures = zip(*(run_curation(seed, config, world) for seed in range(config.seeds)))
        text += "\n\nCuration: a pool of which a third asks for the future\n\n" + markdown(curated, NAMES, GROUPS[:3]) + "\n"
        text += "".join(f"\n- {name}: {spread([f[name] for f in figures])}" for name in figures[0])
    with open(os.path.join(config.out, "table.md"), "w") as f:
        f.write(text + "\n")
    found = dict(settings=settings, results=results, ablations=ablations, curation=curated, figures=figures)
    with open(os.path.join(config.out, "table.json"), "w") as f:
        json.dump(found, f, indent=1)
    draw_bars(results, NAMES, GROUPS, os.path.join(config.out, "accuracy.png"))
    if config.rl_names:
        draw_rl({NAMES[name]: [os.path.join(config.out, f"seed_{seed}", name, "log.jsonl") for seed in range(config.seeds)]
                 for name in config.rl_names}, os.path.join(config.out, "rl.png"))
    print(f"\n{text}\n\n{time.time() - began:.0f} s; in {config.out}: table.md, accuracy.png, rl.png, clip.png, and each "
          "training's loss.png or rewards.png")


if __name__ == "__main__":
    main(parse_config(Config))
