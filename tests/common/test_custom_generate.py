"""A folder that imagines in transformers' own terms: the same words and latents as here."""

import filecmp
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from test_latent_decode import ROWS, shuffle
from test_model import WIDE, make_batch, save, stock_of
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    Qwen3VLProcessor,
    TopPLogitsWarper,
)
from transformers.models.qwen3_vl.video_processing_qwen3_vl import (
    Qwen3VLVideoProcessor,
    smart_resize,
)
from transformers.video_utils import VideoMetadata

import latent_decode
from common.clips import pixels_of, read_clip
from common.custom_generate import Imagined, choose, generate
from common.folder import complete
from common.formats import Clip, Frame, Row
from data import DataConfig, collate, encode, model_inputs
from model import load
from sample import TASTE, Config, shipped
from tests.conftest import ROOT, frames
from tools import export
from toy import tiny
from toy.world import write_mp4

GREY = 2 / 255  # a grey level of a normalised pixel
EOS = "<|im_end|> red blue green"  # several, so that rows finish at many different lengths


# ------------------------------------------------------------ far from here: the shipped model

ELSEWHERE = """
import importlib.util, sys, torch
from transformers import AutoModelForImageTextToText

folder, inputs, outputs = sys.argv[1:]
for name in ("model", "latent_decode", "common"):
    assert importlib.util.find_spec(name) is None, name
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
how = dict(custom_generate=folder, trust_remote_code=True, max_new_tokens=48)
answers = []
for batch in torch.load(inputs):
    out = model.generate(**batch, **how, return_dict_in_generate=True)
    answers.append((out.sequences[:, batch["input_ids"].shape[1] :], out.latents))
try:
    model.generate(**batch, custom_generate=folder, trust_remote_code=False)
except ValueError as e:
    refused = str(e)

# trusted at the load, the folder's way is the model's own
model = AutoModelForImageTextToText.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=True
)
ids = batch.pop("input_ids")
answers.append((model.generate(ids, **batch, max_new_tokens=48)[:, ids.shape[1] :], None))
torch.save((answers, refused), outputs)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The shipped model as tools.export writes it: a linear latent head, bf16 weights."""
    folder = tmp_path_factory.mktemp("exported") / "taste"
    export.export(export.Config(os.path.join(TASTE, "model"), str(folder)))
    return str(folder)


def shipped_questions(tokenizer):
    """The eight questions, encoded as `sample.py` does."""
    asked = [shipped(Config(), number) for number in range(1, 9)]
    return [encode(row, tokenizer, config, train=False) for row, config in asked]


def test_far_from_this_repository(exported, tmp_path):
    """Breaks if the exported folder needs anything of this repository, answers otherwise than
    `sample.py`, alone or in a left-padded batch, imagines other latents, forgets max_latents or the
    latent head, or runs its code without being trusted.
    """
    model, tokenizer = load(exported, dtype=torch.float32)
    samples = shipped_questions(tokenizer)
    uneven = samples[1], dict(samples[2], ids=samples[2]["ids"][3:])  # a shorter question
    groups = [*([sample] for sample in samples), uneven]
    batches = [model_inputs(collate(group, 0, side="left")) for group in groups]
    assert not batches[-1]["attention_mask"].all()
    inputs, outputs = str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")
    torch.save(batches, inputs)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env.update(HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", ELSEWHERE, exported, inputs, outputs]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    answers, refused = torch.load(outputs)
    assert "contains custom generation code" in refused
    number = 0
    for group, (sequences, latents) in zip([*groups, uneven], answers):
        rollout, tokens, _ = latent_decode.ask(
            model, tokenizer, group, max_new_tokens=48, max_latents=2
        )
        for r, expected in enumerate(tokens):
            assert sequences[r, : len(expected)].tolist() == expected
            assert (sequences[r, len(expected) :] == tokenizer.eos_token_id).all()
            if latents:
                torch.testing.assert_close(latents[r], rollout.latents[r], atol=1e-4, rtol=0)
            number += len(rollout.latents[r])
    assert number > 12


# ------------------------------------------------------------- the same question by processors


class PlainVideos(Qwen3VLVideoProcessor):
    """Qwen3-VL's video processor, with torch where it calls torchvision."""

    def convert_to_rgb(self, video):
        return video

    def resize(self, videos, size, resample, factor, temporal_factor, **more):
        assert not more["cap_pixels_per_frame"]
        (_, T, _, height, width), bounds = videos.shape, (size.shortest_edge, size.longest_edge)
        size = smart_resize(T, height, width, temporal_factor, factor, *bounds)
        resized = F.interpolate(videos[0].float(), size, mode="bicubic", antialias=True)
        return resized.round().clamp(0, 255)[None]

    def rescale_and_normalize(self, videos, _, factor, do_normalize, mean, std):
        return (videos * factor - mean[0]) / std[0]


class Plain(Qwen3VLProcessor):
    """Qwen3-VL's processor where torchvision, which its video processor needs, is missing."""

    def check_argument_for_proper_class(self, name, argument):
        pass

    @classmethod
    def from_pretrained(cls, folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with open(os.path.join(folder, "video_preprocessor_config.json")) as f:
            videos = PlainVideos(**json.load(f))
        images = AutoImageProcessor.from_pretrained(folder)
        return cls(images, tokenizer, videos, chat_template=tokenizer.chat_template)


NEEDS_TORCHVISION = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="AutoProcessor needs torchvision"
)


@pytest.mark.parametrize("cls", [Plain, pytest.param(AutoProcessor, marks=NEEDS_TORCHVISION)])
@pytest.mark.parametrize("n, height, width", [(16, 64, 96), (5, 332, 214), (3, 720, 1280)])
def test_a_clip_asks_the_same_question(tokenizer, model, tmp_path, cls, n, height, width):
    """Breaks if the saved settings choose other frames, times, sizes or pixels than our scripts, or
    the chat template another layout. The difference of two tokens is the one that the card states.
    """
    budgets = dict(video_max_tokens=50, image_max_tokens=5)
    config = DataConfig(num_frames=n, system="watch the ball", **budgets)
    save(model, tokenizer, tmp_path)
    complete(str(tmp_path), str(tmp_path), vars(config))
    path = str(tmp_path / "clip.mp4")
    write_mp4(path, frames(41, height, width), 10)
    row = Row("1", "1", [Frame(path, 1), Clip(path), "which wall does it hit ?"], [], "")
    sample = encode(row, tokenizer, config, train=False)
    ours = model_inputs(collate([sample], 0, side="left"))

    whole, _, fps = read_clip(path, range)
    processor = cls.from_pretrained(str(tmp_path))
    content = [dict(type="image"), dict(type="video"), dict(type="text", text=row.prompt[2])]
    messages = [dict(role="system", content=config.system), dict(role="user", content=content)]
    theirs = processor(
        text=[processor.apply_chat_template(messages, add_generation_prompt=True)],
        images=Image.fromarray(whole[1]),
        videos=[whole],
        video_metadata=[VideoMetadata(len(whole), fps=fps, duration=len(whole) / fps)],
        return_tensors="pt",
    )
    ids = theirs["input_ids"][0].tolist()  # with markers around the whole clip
    start, end = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    del ids[ids.index(start, ids.index(end))]
    del ids[len(ids) - 1 - ids[::-1].index(end)]
    assert ids == ours["input_ids"][0].tolist()
    for name, grid in (("pixel_values", "image_"), ("pixel_values_videos", "video_")):
        assert theirs[f"{grid}grid_thw"].tolist() == ours[f"{grid}grid_thw"].tolist()
        atol = 1.01 * GREY  # the rounding of two ways to resize
        torch.testing.assert_close(theirs[name], ours[name], atol=atol, rtol=0)


def test_the_lines_of_the_card(exported, tmp_path, monkeypatch, capsys):
    """Breaks if the card's lines do not run, or give another answer than ours."""
    row, config = shipped(Config(), 2)
    first, second = (part for part in row.prompt if isinstance(part, Frame))
    pictures = pixels_of([first, second])
    for name, frame in (("frame.png", first), ("second.png", second)):
        Image.fromarray(pictures[frame]).save(tmp_path / name)
    with open(os.path.join(exported, "README.md"), encoding="utf-8") as f:
        lines = f.read().split("```python\n")[1].split("```")[0]
    lines = lines.replace('FOLDER = "taste"', f'FOLDER = "{exported}"')
    text = "".join(part for part in row.prompt if isinstance(part, str))
    one = '{"type": "image", "path": "frame.png"}'
    lines = lines.replace(one, f"{one}, {one.replace('frame', 'second')}")
    lines = lines.replace("What happens next?", text.strip())
    assert "trust_remote_code=True" in lines and config.system in lines
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers, "AutoProcessor", Plain)
    exec(lines, {})
    printed = capsys.readouterr().out

    model, tokenizer = load(exported)
    sample = encode(row, tokenizer, config, train=False)
    _, _, [said] = latent_decode.ask(model, tokenizer, [sample], max_new_tokens=48, max_latents=2)
    assert said in printed


def test_every_folder_has_the_same_file(tmp_path):
    """Breaks if the shipped copy falls behind, a saved folder lacks it or its max_latents, or the
    folder of a model that other code decodes has it.
    """
    source = os.path.join(ROOT, "common", "custom_generate.py")
    name = os.path.join("custom_generate", "generate.py")
    assert filecmp.cmp(source, os.path.join(TASTE, "model", name), shallow=False)
    for other in (None, "variants/m2la.py"):
        folder = tmp_path / ("other" if other else "ours")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(dict(decoded_by=other)))
        complete(str(folder), str(folder), dict(max_latents=6))
        assert json.loads((folder / "config.json").read_text())["max_latents"] == 6
        assert (folder / name).exists() == (other is None)
        assert other or filecmp.cmp(source, folder / name, shallow=False)


# ------------------------------------------------------------------- the same choices


@pytest.mark.parametrize("head", [False, True])
def test_greedy_equals_generate(model, tokenizer, head, tmp_path):
    """Breaks if cache, padding, positions, spans, the longest span or the latent head, which is
    read from a folder with several files of weights, are not those of `latent_decode.generate`.
    """
    batch, eos = make_batch(tokenizer, ROWS, "left"), tokenizer.convert_tokens_to_ids(EOS.split())
    lengths = set()
    for seed in (3, 4, 6):
        folder = str(tmp_path / str(seed))
        shuffle(model, seed, head and seed == 3).save_pretrained(folder, max_shard_size="500KB")
        assert os.path.exists(os.path.join(folder, "model.safetensors.index.json"))
        rollout = latent_decode.generate(
            model, batch, max_new_tokens=30, max_latents=3, eos_token_id=eos
        )
        stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        how = dict(max_new_tokens=30, max_latents=3, eos_token_id=eos, pad_token_id=eos[0])
        out = generate(model=stock, **batch, **how, return_dict_in_generate=True)
        assert isinstance(out, Imagined)
        new = out.sequences[:, batch["input_ids"].shape[1] :]  # (6, tokens)
        assert torch.equal(new, rollout.tokens[:, : new.shape[1]])
        for ours, theirs in zip(rollout.latents, out.latents):
            torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
        lengths |= set(rollout.lengths.tolist())
    assert len(lengths) > 4 and len(torch.cat(rollout.latents)) > 10


def test_top_p_leaves_a_stop_alone():
    """Breaks if top-p acts on the decision to stop. At .5 it would leave out a stop of p = .3."""
    config = SimpleNamespace(latent_id=0, latent_end_id=1)
    logits = torch.tensor([0.1, 0.3, 0.6]).log().expand(4000, 3)
    in_span, full = torch.ones(4000, dtype=torch.bool), torch.zeros(4000, dtype=torch.bool)
    settings = SimpleNamespace(do_sample=True, never=[0, 1])
    settings.heat, settings.cut = lambda _, scores: scores, TopPLogitsWarper(0.5)
    torch.manual_seed(0)
    stops = choose(logits, in_span, full, config, settings) == 1
    assert stops.float().mean() == pytest.approx(0.3, abs=0.03)  # 4 standard deviations


def test_samples_have_the_distribution_of_generate():
    """Breaks if words, stops, temperature or top-p are drawn otherwise than by
    `latent_decode.generate`: in two sets of answers of three tokens, each answer is about as
    frequent.
    """
    tokenizer = tiny.make_tokenizer(["a b c"])
    model = tiny.make_model(tokenizer, seed=0).eval()
    c, eos = model.config, tokenizer.eos_token_id
    torch.manual_seed(5)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    prompts, N = [["a", WIDE, "b"]], 8000
    how = dict(temperature=1.3, top_p=0.8, max_new_tokens=3, max_latents=1)
    g = torch.Generator().manual_seed(0)
    ours = latent_decode.generate(model, make_batch(tokenizer, prompts), n=N, generator=g, **how)
    # 400 rows of a prompt, in a batch of equal prompts
    rows = make_batch(tokenizer, prompts * (N // 400))
    more = dict(do_sample=True, num_return_sequences=400)
    theirs = generate(model=stock_of(model), **rows, **how, **more)[:, rows["input_ids"].shape[1] :]
    found = []
    for tokens in (ours.tokens.tolist(), theirs.tolist()):
        ends = [row.index(eos) + 1 if eos in row else len(row) for row in tokens]
        found.append(Counter(tuple(row[:end]) for row, end in zip(tokens, ends)))
    a, b = found
    often = [tokens for tokens in a | b if a[tokens] + b[tokens] > 10]
    spans = sum(a[tokens] for tokens in often if c.latent_id in tokens)
    chi2 = sum((a[t] - b[t]) ** 2 / (a[t] + b[t]) for t in often)
    df = len(often)
    assert 0.1 * N < spans < 0.9 * N and df > 50 and chi2 < df + 4 * (2 * df) ** 0.5


# --------------------------------------------------------------------------- transformers' terms


class Words(list):
    """A streamer that keeps what it is given."""

    def put(self, value):
        self.append(value.flatten().tolist())

    def end(self):
        self.append("end")


def test_streamer_criteria_and_configs(model, tokenizer):
    """Breaks if a streamer misses a token, a stopping criterion or max_length is not heard, or a
    generation config does not come before the model's own and after the arguments.
    """
    stock = stock_of(shuffle(model, 0))
    batch = make_batch(tokenizer, [["watch", WIDE, "the ball"]])
    ids = batch["input_ids"]
    how = dict(model=stock, max_latents=3, eos_token_id=[])
    words = Words()
    out = generate(**batch, **how, max_new_tokens=12, streamer=words)
    assert out[0, : ids.shape[1]].tolist() == ids[0].tolist() == words[0]
    assert sum(words[1:-1], []) == out[0, ids.shape[1] :].tolist() and words[-1] == "end"
    assert out.shape[1] == ids.shape[1] + 12

    full = lambda ids, scores: torch.tensor([ids.shape[1] >= out.shape[1] - 4])  # noqa: E731
    stopped = generate(**batch, **how, max_new_tokens=12, stopping_criteria=[full])
    assert torch.equal(stopped, out[:, :-4])
    for more in (
        dict(max_length=ids.shape[1] + 5),
        dict(generation_config=GenerationConfig(max_new_tokens=5)),
        dict(generation_config=GenerationConfig(max_new_tokens=9), max_new_tokens=5),
    ):
        assert torch.equal(generate(**batch, **how, **more), out[:, : ids.shape[1] + 5])
    third = out[0, ids.shape[1] + 2].item()
    stock.generation_config.eos_token_id = third
    del how["eos_token_id"]
    ended = generate(batch.pop("input_ids"), **batch, **how, max_new_tokens=12)
    assert ended.shape[1] <= ids.shape[1] + 3 and ended[0, -1] == third


@pytest.mark.parametrize(
    "asked, message",
    [
        (dict(num_beams=4), "not supported while the model imagines: num_beams"),
        (dict(repetition_penalty=1.1, foo=3), "foo, repetition_penalty"),
        (dict(assistant_model=object()), "assistant_model"),
        (dict(logits_processor=[object()]), "logits_processor"),
        (dict(negative_prompt_ids=torch.ones(1, 2)), "negative_prompt_ids"),
        (dict(output_scores=True), "output_scores"),
        (dict(synced_gpus=True), "synced_gpus"),
        (dict(generation_config=GenerationConfig(num_beams=2)), "num_beams"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(do_sample=True, top_p=1.5), "top_p"),
        (dict(do_sample=True, temperature=0.0), "temperature"),
        (dict(input_ids=None), "needs a prompt"),
        (dict(attention_mask="right"), "left-padded"),
    ],
)
def test_what_is_not_done_is_named(model, tokenizer, asked, message):
    """Breaks if an argument that would change the answer is passed over in silence."""
    batch = make_batch(tokenizer, [["watch the ball"], ["which wall does it hit ?"]], "left")
    if asked.get("attention_mask") == "right":
        asked = dict(attention_mask=batch["attention_mask"].flip(1))
    with pytest.raises(ValueError, match=message):
        generate(model=stock_of(model), **{**batch, "max_new_tokens": 3, **asked})


def test_what_changes_nothing_is_accepted(model, tokenizer):
    """Breaks if what transformers' callers pass by habit is refused, or changes the answer."""
    stock, batch = stock_of(model), make_batch(tokenizer, [["watch", WIDE]])
    plain = generate(model=stock, **batch, max_new_tokens=6)
    habits = dict(use_cache=True, num_beams=1, top_k=0, repetition_penalty=1.0, synced_gpus=False)
    habits.update(mm_token_type_ids=torch.zeros(1, 1), tokenizer=tokenizer, logits_processor=[])
    habits.update(temperature=0.7, top_p=0.9, length_penalty=1.0, prefix_allowed_tokens_fn=None)
    assert torch.equal(generate(model=stock, **batch, max_new_tokens=6, **habits), plain)


def test_the_config_of_a_released_model(model, tokenizer):
    """Breaks if a generation config such as Qwen3-VL's is refused, or its top-k is not heard: with
    top_k 1 and no latents, sampling is greedy.
    """
    stock, batch = stock_of(shuffle(model, 3)), make_batch(tokenizer, ROWS, "left")
    how = dict(model=stock, max_new_tokens=20, max_latents=0)
    released = dict(do_sample=True, temperature=0.7, top_p=0.8, repetition_penalty=1.0)
    sampled = generate(**batch, **how, generation_config=GenerationConfig(top_k=1, **released))
    assert torch.equal(sampled, generate(**batch, **how))
    sampled = generate(**batch, **how, generation_config=GenerationConfig(**released))
    assert not torch.equal(sampled, generate(**batch, **how))


def test_suppressed_words(model, tokenizer):
    """Breaks if a word that the caller suppresses is chosen, or not the next best instead."""
    stock, batch = stock_of(model), make_batch(tokenizer, [["watch the ball"]])
    with torch.no_grad():
        best = stock(**batch).logits[0, -1].argsort(descending=True).tolist()
    how = dict(model=stock, max_new_tokens=1)
    best = [word for word in best if word not in latent_decode.never_words(stock.config)]
    for first in (0, 1, 3):
        found = generate(**batch, **how, suppress_tokens=best[:first])
        assert found[0, -1].item() == best[first]


def test_another_model_is_refused(model, tokenizer):
    """Breaks if a model without latent tokens runs as if it imagined."""
    stock = stock_of(model)
    stock.config.latent_start_id = None
    with pytest.raises(ValueError, match="no latent_start_id"):
        generate(model=stock, **make_batch(tokenizer, [["watch"]]))
