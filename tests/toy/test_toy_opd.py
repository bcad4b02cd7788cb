"""On-policy distillation on the embedded world: the cues by hand, and the whole in small."""

import dataclasses
import json

import pytest

from common.formats import read_rows
from data import encode
from model import load
from toy import __main__ as demo
from toy import opd as toy_opd
from toy.world import captions, make_world, questions
from variants import opd


def test_a_cue_is_what_the_captions_say_of_the_shown_frames():
    """Breaks if a cue tells of a frame that is to come, or of another clip."""
    records = toy_opd.cued(questions, [3, 5], bend=1.05)
    assert len(records) == 8
    for record in records:
        said = []
        for k in record["image"]:
            for caption in captions(int(record["id"].split("-")[0]), 1.05, ""):
                about = caption["conversations"][0]["value"]
                if caption["image"] == [k] and "where is the ball" in about:
                    said.append(caption["answer"])
        assert record["cue"] == " ".join(said) and len(said) == len(record["image"]) >= 2


def test_the_teacher_reads_what_it_was_trained_on(world, tmp_path):
    """Breaks if the hint of OPD is not, token by token, that of the teacher's SFT."""
    path = tmp_path / "cued.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in toy_opd.cued(questions, range(3), 1.05)))
    _, tokenizer = load(world["model"])
    for row in read_rows(str(path), world["folder"] + "/data"):
        for privilege in ("cue", "answer"):
            config = opd.Config(**toy_opd.TINY_OPD, privilege=privilege)
            sample = encode(row, tokenizer, config, train=False)
            told = encode(toy_opd.with_hint(row, privilege), tokenizer, config, train=False)["ids"]
            assert opd.hinted(sample, tokenizer, config)["ids"] == told
            plain, told = (tokenizer.decode(ids) for ids in (sample["ids"], told))
            assert told.count("<unk>") == plain.count("<unk>")  # the hint's words are known
            assert len(told.split()) > len(plain.split()) + 5


def test_an_adjoint_row_is_its_namesake_but_for_the_gradient():
    """Breaks if a row has a setting that its script lacks, or differs from its pair in two."""
    terms = {}
    for name, (_, script, changes) in toy_opd.ROWS.items():
        if script is opd:
            made = opd.Config(**{**toy_opd.TINY_OPD, **changes})
            terms[name] = made.adjoint_terms
            made.adjoint_terms, pair = 0, toy_opd.ROWS[name.removesuffix("-adjoint")][2]
            assert made == opd.Config(**{**toy_opd.TINY_OPD, **pair})
    with_gradient = {name for name, n in terms.items() if n}
    assert with_gradient == {name for name in terms if name.endswith("-adjoint")}
    assert len(with_gradient) == 3 and {terms[name] for name in with_gradient} == {-1}


@pytest.mark.slow  # whole trainings
def test_the_whole_in_small(tmp_path, capsys):
    """Breaks if a row does not train, a second run trains again, or the demo is not asked for."""
    out = str(tmp_path / "toy")
    steps = dict(sft_steps=2, steps=1, rl_steps=1)
    config = toy_opd.Config(out=out, rows="cue,cue+module,la-dapo", **steps)
    with pytest.raises(SystemExit, match="comes first"):
        toy_opd.main(config)

    settings = demo.Config(out=out, clips=70, annotated=8, eval_clips=2, pretrain_steps=2)
    demo.claim_folder(settings)
    world = make_world(settings)
    demo.run_seed(0, settings, world, {"base": demo.trainings(settings)["base"]})
    capsys.readouterr()
    toy_opd.main(config)
    first = capsys.readouterr().out
    assert "| teacher, answer |" in first and "| OPD, cue + module (" in first
    toy_opd.main(config)
    table = first[first.index("seed 0\n\n") :]
    assert capsys.readouterr().out.endswith(table)
    with pytest.raises(SystemExit, match="other values of steps"):
        toy_opd.main(dataclasses.replace(config, steps=2))
