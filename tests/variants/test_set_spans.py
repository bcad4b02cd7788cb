"""Sets of latents: who sees whom, the loss, and decoding that equals one forward."""

import random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_latent_decode import shuffle
from test_model import IMAGE, make_batch
from test_sft import assert_resumes, settings

import sft
from latent_decode import never_words
from model import load
from variants import set_spans
from variants.set_spans import (
    Config,
    Model,
    add_slots,
    batch_sums,
    cut,
    decode,
    find_blocks,
    lay_out,
    number,
    sees,
    two_streams,
)

SCHEDULES = ["ar", "frame", "one", "2"]


def block(*lengths):
    """The text of spans that follow one another."""
    return " ".join(f"<|latent_start|>{' <|latent|>' * n} <|latent_end|>" for n in lengths)


@pytest.fixture
def slots(model):
    """The tiny model, with loud vectors for the queries and a head."""
    add_slots(model, 12)
    model.add_latent_head()
    torch.manual_seed(3)
    torch.nn.init.normal_(model.slots.weight)
    torch.nn.init.normal_(model.latent_head.weight, std=0.1)
    return model


@pytest.fixture
def rows(slots, tokenizer):
    """Three rows, ten latents and blocks of one, two and three spans: (inputs, latents)."""
    texts = [["watch", IMAGE, "?", block(2, 1), "hits", block(1), "blue"]]
    texts += [["which wall ?", block(1, 2, 2), "up"], ["red", block(1), "left"]]
    return make_batch(tokenizer, texts), torch.randn(10, 96)


@torch.no_grad()
def states(model, inputs, z, schedule):
    layout = lay_out(inputs["input_ids"], inputs["attention_mask"], model.config, schedule)
    return two_streams(model, layout, z, **inputs), layout


# ------------------------------------------------------------------------------------------- sets


def test_blocks_and_cuts_by_hand(model, tokenizer):
    """Breaks if a word does not end a block, or a schedule cuts elsewhere."""
    ids = tokenizer(f"the {block(2, 3)} hits {block(1)} {block(2)}").input_ids
    assert find_blocks(ids, model.config) == [[[2, 3], [6, 7, 8]], [[12], [15, 16]]]
    spans = [[2, 3], [6, 7, 8]]
    by_hand = {"ar": [[2], [3], [6], [7], [8]], "frame": spans, "one": [[2, 3, 6, 7, 8]]}
    by_hand.update({"2": [[2, 3], [6, 7, 8]], "3": [[2], [3, 6], [7, 8]], "9": by_hand["ar"]})
    assert {name: cut(spans, name) for name in by_hand} == by_hand
    some = [cut(spans, "random", random.Random(k)) for k in range(40)]
    assert {len(sets) for sets in some} == {1, 2, 3, 4, 5}
    assert all(sum(sets, []) == sum(spans, []) and all(sets) for sets in some)
    assert number(10, cut(spans, "3")).tolist() == [1, 2, 3, 4, 4, 4, 4, 5, 5, 6]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_mask_is_a_loop_over_pairs(slots, rows, schedule):
    """Breaks if any pair of tokens, of either stream, sees or does not see the other wrongly."""
    ids, mask, c = rows[0]["input_ids"], rows[0]["attention_mask"], slots.config
    layout = lay_out(ids, mask, c, schedule)
    L = ids.shape[1]
    order = torch.cat([layout.order, layout.query_order], 1)
    is_query = (torch.arange(order.shape[1]) >= L).expand_as(order)
    got = sees(order, is_query, order, is_query)
    for r, row in enumerate(ids.tolist()):
        sets = [s for b in find_blocks(row, c) for s in cut(b, schedule)]
        of_set = {t: k for k, s in enumerate(sets) for t in range(s[0], s[-1] + 1)}
        columns = [(t, False, t) for t in range(int(mask[r].sum()))]  # column, query?, place
        columns += [(L + k, True, t) for k, t in enumerate(sum(sets, []))]
        for me, i_ask, i in columns:
            for other, it_asks, j in columns:
                same = i == j or (i in of_set and of_set[i] == of_set.get(j))
                expected = same and i_ask == it_asks or (j < i and not same and not it_asks)
                assert bool(got[r, me, other]) == expected, (r, me, other)
        padding = sorted(set(range(order.shape[1])) - {column for column, _, _ in columns})
        assert not got[r][[column for column, _, _ in columns]][:, padding].any()


# --------------------------------------------------------------------------------------- the loss


def batch_of(model, inputs, e, ids="abc"):
    """The rows as `data.collate` gives them, whose future frames are embedded as e."""
    model.encode_frames = lambda e, grid: e
    labels = inputs["input_ids"].clone()
    labels[(labels == model.config.latent_id) | (inputs["attention_mask"] == 0)] = -100
    rows = [SimpleNamespace(id=k) for k in ids]
    return dict(inputs, labels=labels, rows=rows, future_grid_thw=None, future_pixel_values=e)


def test_the_loss_by_hand(slots, rows):
    """Breaks if Eq. (3) is not the queries' squared error, or Eq. (2) not sft's under ar."""
    inputs, e = rows
    batch = batch_of(slots, inputs, e)
    plain = sft.sft_loss(slots, **inputs, labels=batch["labels"], latents=e)
    for schedule in ("ar", "one"):
        (_, q), _ = states(slots, inputs, e, schedule)
        ce, latent = batch_sums(slots, batch, 0.0, 2.0, Config(schedule=schedule))
        by_hand = sum(((slots.to_latent(q[n]) - e[n]) ** 2).mean() for n in range(10)) / 2
        assert latent.item() == pytest.approx(by_hand.item(), rel=1e-5)
        assert (ce.item() == pytest.approx(plain["ce_sum"].item(), rel=1e-5)) == (schedule == "ar")
    latent.backward()
    assert slots.slots.weight.grad[:5].abs().sum(1).all()
    assert slots.get_input_embeddings().weight.grad[slots.config.latent_id].any()  # m_n = it + e_n


def test_random_cuts_depend_on_seed_progress_and_id_alone(slots, rows, monkeypatch):
    """Breaks if a row's cuts depend on its neighbours, or are the same at every step or for every
    row.
    """
    seen = []
    monkeypatch.setattr(set_spans, "lay_out", lambda *args: seen.append(lay_out(*args)) or seen[-1])

    def second_row(progress=0.5, ids="abc", **more):
        config = Config(schedule="random", **more)
        batch_sums(slots, batch_of(slots, *rows, ids), progress, 1.0, config)
        return tuple(seen[-1].query_order[1].tolist())

    assert second_row() == second_row(ids="xby")
    assert len({second_row(k / 10) for k in range(5)} | {second_row(seed=1)}) > 3
    assert len({second_row(ids=f"a{k}c") for k in range(5)}) > 1


@pytest.mark.slow  # whole trainings
def test_a_run_resumes_with_the_same_cuts(world, tmp_path):
    """Breaks if cuts depend on what ran before, or slots are not saved, loaded and trained."""
    more = dict(save_every=2, stop_term=False, schedule="random", slots=7)
    config = settings(world, tmp_path / "a", Config, **more, l_max=4, image_max_tokens=4)
    assert_resumes(set_spans.train, config)
    model, _ = load(str(tmp_path / "a" / "step_000004"), cls=Model)
    before = load_file(tmp_path / "a" / "step_000002" / "model.safetensors")["slots.weight"]
    assert model.config.set_slots == 7 and not torch.equal(model.slots.weight, before)


@pytest.mark.parametrize(
    "wrong", [dict(stop_term=True), dict(spans=False), dict(schedule="two"), dict(eval_data="x")]
)
def test_settings_without_a_meaning(wrong):
    """Breaks if a setting that does nothing is taken."""
    with pytest.raises(ValueError, match="no --stop_term|schedule is 'two'|no --eval_data"):
        Config(**wrong)


def test_a_block_beyond_the_slots(slots, rows):
    """Breaks if a latent without a vector of its own is found out later."""
    slots.config.set_slots = 4
    with pytest.raises(ValueError, match="a block of 5 latents, but slots is 4"):
        lay_out(rows[0]["input_ids"], rows[0]["attention_mask"], slots.config, "one")


# --------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_decoding_equals_one_forward(slots, tokenizer, schedule):
    """Breaks if the cache, the positions, the order or the number of passes are wrong: a forward
    over the record predicts each latent and each word, and K sets took K + 1 passes.
    """
    calls, c, n_blocks = [], slots.config, []
    slots.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    end = slots.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    given = [[1], [2, 2], [3]]
    for seed in range(4):
        prompt = make_batch(tokenizer, [[IMAGE, "red", IMAGE, "up ?"]])
        P = prompt["input_ids"].shape[1]
        calls.clear()
        tokens, latents = decode(shuffle(slots, seed), prompt, given, schedule, 24)
        passes = len(calls)

        # blocks are opened in their order, whole, and with room for a word after them
        found = find_blocks(tokens, c)
        assert [[len(span) for span in b] for b in found] == given[: len(found)]
        assert tokens.count(c.latent_start_id) == tokens.count(c.latent_end_id)
        assert len(tokens) == 24 or tokens[-1] == end
        n_blocks.append(len(found))

        ids = torch.cat([prompt["input_ids"], torch.tensor([tokens])], 1)
        inputs = dict(prompt, input_ids=ids, attention_mask=torch.ones_like(ids))
        (h, q), _ = states(slots, inputs, latents, schedule)
        torch.testing.assert_close(slots.to_latent(q), latents, atol=1e-4, rtol=0)
        inside = {t for b in found for t in range(b[0][0], b[-1][-1] + 2)}
        for t in set(range(len(tokens))) - inside:
            logits = slots.logits(h[0, P + t - 1])
            never = torch.tensor([*never_words(c), c.latent_start_id])
            best = logits.index_fill(0, never, -torch.inf).max()  # where no block may be opened
            assert tokens[t] not in never_words(c) and logits[tokens[t]] >= best - 1e-4

        # a block's first token is fed alone or with its first set; the response's last is not fed
        words = len(tokens) - len(inside) - len(found) - 1
        assert passes == 1 + words + sum(len(cut(b, schedule)) + 1 for b in found)
    assert sum(n_blocks) > 6
