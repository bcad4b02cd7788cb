"""The cheap score against plain transformers, and what it selects."""

import dataclasses
import json

import pytest
import torch

from common.formats import read_rows
from curate import with_future
from data import collate, encode, model_inputs
from model import load
from tests.conftest import changed_rows
from toy.tiny import settings
from variants import logprob_gain


def config(world, out, **more):
    names = ("image_max_tokens", "l_max", "max_length", "system")
    shared = {name: settings("sft")[name] for name in names}
    own = dict(model=world["model"], data=world["test"], out=str(out), batch=3, workers=0)
    return logprob_gain.Config(**{**shared, **own, **more})


def test_logprob_score_by_transformers(world, tmp_path):
    """Breaks if the score is not the mean log-probability of the answer's words behind <answer>,
    under t and under v: of one word, and in the first row of three.
    """

    def change(i, record):
        if i == 0:
            record.update(answer="red blue red", options=None)

    data = changed_rows(dict(data=world["test"]), "words.jsonl", change)
    c = config(world, tmp_path, data=data)
    lines = logprob_gain.probe(c)
    model, tokenizer = load(world["model"])
    for row in read_rows(data):
        for key, prompt in (
            ("logp_t", dataclasses.replace(row, response=[])),
            ("logp_v", with_future(row)),
        ):
            batch = collate([encode(prompt, tokenizer, c, train=False)], pad_id=0)
            tag, word = tokenizer("<answer>").input_ids, tokenizer(row.answer).input_ids
            ids = torch.cat([batch["input_ids"], torch.tensor([tag + word])], 1)
            inputs = dict(model_inputs(batch), input_ids=ids, attention_mask=torch.ones_like(ids))
            with torch.no_grad():
                logp = model(**inputs).logits[0].log_softmax(-1)
            expected = sum(
                logp[-len(word) - 1 + i, token].item() for i, token in enumerate(word)
            ) / len(word)
            assert lines[row.id][key] == pytest.approx(expected, abs=2e-5)
    chosen = logprob_gain.cut(c)
    gain = {id: line["logp_v"] - line["logp_t"] for id, line in lines.items()}
    assert [r["id"] for r in chosen] == sorted(
        (id for id in gain if gain[id] >= 0), key=gain.get, reverse=True
    )
    written = [json.loads(line) for line in open(tmp_path / "selected.jsonl")]
    assert written == chosen and len(chosen) < 8
    assert logprob_gain.probe(c) == lines  # all is done
