"""The mixture of experts: the same method around the layers of transformers' Qwen3VLMoe."""

import json
import os
import re
from collections import Counter

import pytest
import torch
from test_la_dapo import ROWS, shuffle
from test_la_dapo import settings as rl_settings
from test_latent_decode import EOS
from test_model import make_batch, save
from test_sft import read_log, settings, weights
from transformers import AutoModelForImageTextToText, Qwen3VLMoeConfig
from transformers import Qwen3VLMoeForConditionalGeneration as Stock

import evaluate
import la_dapo
import sft
from common import custom_generate
from common.lora import HEAD, WORDS
from common.machine import Machine
from common.run import count_tokens, largest_expert
from latent_decode import decode_slowly, generate
from model import FutureL1, FutureL1MoE, add_latent_tokens, load
from tests.common.test_machine import SMOOTH, on_two_ranks
from tests.conftest import TINY_DATA
from toy import tiny
from variants import m2la

EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96)


def mixture(tokenizer, seed=0):
    """The tiny model, its language layers a mixture of four experts, of which a token takes two."""
    dense = tiny.make_config(tokenizer, hidden=96, layers=2).to_dict()
    words, pictures = dense.pop("text_config"), dense.pop("vision_config")
    for config in (dense, words, pictures):
        del config["model_type"]
    config = Qwen3VLMoeConfig(**dense, text_config=words | EXPERTS, vision_config=pictures)
    torch.manual_seed(seed)
    model = FutureL1MoE(config)
    for p in model.parameters():
        if p.ndim > 1:  # 1 / sqrt(fan in), as in toy/tiny.py
            fan_in = p.shape[-1] if p.ndim < 4 else p[0].numel()
            torch.nn.init.normal_(p, std=fan_in**-0.5)
    model.set_latent_tokens(add_latent_tokens(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.eval()


@pytest.fixture
def model(tokenizer):
    return mixture(tokenizer)


@pytest.fixture(scope="module")
def moe_world(world, tmp_path_factory):
    """The shared world, its model a mixture of experts with many spans."""
    _, tokenizer = load(world["model"])
    model = shuffle(mixture(tokenizer), 4, head=True)
    return dict(world, model=save(model, tokenizer, tmp_path_factory.mktemp("moe") / "model"))


# --------------------------------------------------------------------------------------- decoding


def test_decoding_is_the_definition(model, tokenizer, tmp_path):
    """Breaks if positions, pictures, cache or latents of this class are not those of the slow
    decoder, or transformers' own class with the folder's custom_generate decodes otherwise.
    """
    eos = tokenizer.convert_tokens_to_ids(EOS.split())
    model = shuffle(model, 5)
    batch = make_batch(tokenizer, ROWS, "left")
    how = dict(max_new_tokens=30, max_latents=3, eos_token_id=eos)
    rollout = generate(model, batch, **how)
    for r, row in enumerate(ROWS):
        tokens, latents = decode_slowly(model, make_batch(tokenizer, [row]), 30, 3, eos)
        assert rollout.tokens[r, : rollout.lengths[r]].tolist() == tokens
        torch.testing.assert_close(rollout.latents[r], latents, atol=1e-4, rtol=0)
    assert len(torch.cat(rollout.latents)) > 5 and len(set(rollout.lengths.tolist())) > 1

    stock = AutoModelForImageTextToText.from_pretrained(save(model, tokenizer, tmp_path))
    assert type(stock) is Stock
    more = dict(pad_token_id=eos[0], return_dict_in_generate=True)
    out = custom_generate.generate(model=stock, **batch, **how, **more)
    new = out.sequences[:, batch["input_ids"].shape[1] :]
    assert torch.equal(new, rollout.tokens[:, : new.shape[1]])
    for ours, theirs in zip(rollout.latents, out.latents):
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


# --------------------------------------------------------------------------------------- trainings


def test_sft(moe_world, tmp_path):
    """Breaks if an expert or a router is not trained, the folder is not stock's, or the largest
    expert's share is not logged.
    """
    config = settings(moe_world, tmp_path / "a")
    sft.train(config)
    for line in read_log(config.out):
        assert 0.5 <= line["largest_expert"] <= 1
    folder = os.path.join(config.out, "step_000004")
    with open(os.path.join(folder, "config.json")) as f:
        assert json.load(f)["architectures"] == ["Qwen3VLMoeForConditionalGeneration"]
    _, info = Stock.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == {
        "latent_head.weight",
        "latent_head.bias",
    }
    before, after = weights(moe_world["model"]), weights(folder)
    for name, weight in after.items():
        if "language_model.layers" in name:
            assert not torch.equal(weight, before[name]), name


def test_la_dapo_then_evaluate(moe_world, tmp_path):
    """Breaks if rollouts are not replayed as they were made, the KL has no reference, or what was
    trained cannot be evaluated.
    """
    more = dict(kl=0.05, adjoint_terms=-1, lr=1e-3)
    config = rl_settings(moe_world, moe_world["model"], tmp_path / "rl", **more)
    la_dapo.train(config)
    log = read_log(config.out)
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6) and log[-1]["kl"] > 1e-6
    assert all(line["replay_rms"] < 1e-3 and line["largest_expert"] >= 0.5 for line in log)
    shared = dict(data=moe_world["test"], max_new_tokens=6, workers=0, **TINY_DATA)
    out = str(tmp_path / "eval")
    scores = evaluate.evaluate(evaluate.Config(model=config.out, out=out, **shared))
    assert scores["all"]["n"] == 8


def test_adapters(moe_world, tmp_path):
    """Breaks if adapters change anything but attention and the rows of the latent tokens, such as
    an expert or a router.
    """
    config = settings(moe_world, tmp_path / "run", lora_rank=3, latent_head="", steps=2)
    before, after = weights(moe_world["model"]), weights(sft.train(config))
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    attention = {name for name in before if re.search(r"language_model.*[qkvo]_proj", name)}
    assert len(attention) == 2 * 4 and moved == attention | {WORDS, HEAD}


@pytest.mark.slow
def test_two_ranks_are_one(moe_world, tmp_path, monkeypatch):
    """Breaks if experts in parts, or experts that a rank has no token for, change the training."""
    monkeypatch.setattr(torch.optim, "AdamW", SMOOTH)
    runs = []
    for name, shard in (("one", False), ("shard", True), ("ddp", False)):
        more = dict(shard=shard, steps=2, save_every=1)
        sizes = dict(global_batch=5, micro_batch=2)
        runs.append(("sft", settings(moe_world, tmp_path / "sft" / name, **sizes, **more)))
        more.update(groups=3, rollout_batch=1, kl=0.05, adjoint_terms=0)
        model = moe_world["model"]
        runs.append(("la_dapo", rl_settings(moe_world, model, tmp_path / "rl" / name, **more)))
    sft.train(runs[0][1])
    la_dapo.train(runs[1][1])
    on_two_ranks(tmp_path, *runs[2:])
    for kind, figures in (("sft", ("ce", "latent")), ("rl", ("total", "kl", "entropy"))):
        one, *others = (read_log(tmp_path / kind / name) for name in ("one", "shard", "ddp"))
        for other in others:
            for figure in (*figures, "grad_norm", "largest_expert"):
                found, expected = ([line[figure] for line in run] for run in (other, one))
                # the one token of a micro-batch that fills up goes to experts, too
                rel = 1e-2 if figure == "largest_expert" else 1e-3
                assert found == pytest.approx(expected, rel=rel), figure


def test_the_largest_expert_by_hand(model):
    """Breaks if what is decoded counts, the share is one of choices instead of tokens, or the
    counts of a step go on to the next.
    """
    routers, machine = count_tokens(model, "cpu"), Machine()
    assert len(routers) == 2 and largest_expert([], machine) == {}
    with torch.no_grad():
        model(torch.arange(9)[None])
    assert largest_expert(routers, machine) == dict(largest_expert=None)
    chosen = [[], []]
    for router, some in zip(routers, chosen):
        router.register_forward_hook(lambda m, x, out, some=some: some.extend(out[2].tolist()))
    for _ in range(2):
        model(torch.arange(9)[None])
        counts = [Counter(expert for two in some for expert in two) for some in chosen]
        share = max(max(count.values()) for count in counts) / 9
        assert largest_expert(routers, machine) == dict(largest_expert=pytest.approx(share))
        assert 0.5 < share <= 1
        chosen[0].clear(), chosen[1].clear()


# ------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "nobody_knows_this", None])
def test_another_architecture_is_refused(tmp_path, kind):
    """Breaks if a folder of another model is read any further than its config.json."""
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type=kind)))
    with pytest.raises(ValueError, match=rf"model_type is {kind!r}, .*qwen3_vl or qwen3_vl_moe$"):
        load(str(tmp_path))


def test_the_class_is_chosen_by_the_folder(world, moe_world):
    """Breaks if a class is chosen by anything else, or a variant takes a model that it is not
    written for.
    """
    assert type(load(world["model"])[0]) is FutureL1
    assert type(load(moe_world["model"])[0]) is FutureL1MoE
    with pytest.raises(ValueError, match="'qwen3_vl_moe', expected qwen3_vl$"):
        load(moe_world["model"], cls=m2la.Model)
