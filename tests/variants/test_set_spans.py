"""Sets of latents: who sees whom, what depends on what, and decoding that equals one forward."""

import random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_latent_decode import shuffle
from test_model import IMAGE, make_batch
from test_sft import assert_resumes, settings

import latent_decode
import sft
from latent_decode import take
from model import load
from variants import set_spans
from variants.set_spans import (
    FAR,
    Config,
    Model,
    add_slots,
    batch_sums,
    cut,
    find_blocks,
    generate,
    lay_out,
    number,
    sees,
    token_logprobs,
    two_streams,
)

SCHEDULES = ["ar", "frame", "one", "2", "3"]
PROMPTS = [["watch", IMAGE, "the ball"], ["which wall ?"], [IMAGE, "red", IMAGE, "up ?"]]


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


def states(model, rows, schedule, z=None, draws=()):
    inputs, latents = rows
    layout = lay_out(*list(inputs.values())[:2], model.config, schedule, draws)
    with torch.no_grad():
        return two_streams(model, layout, latents if z is None else z, **inputs), layout


# ------------------------------------------------------------------------------------------- sets


def test_blocks_and_cuts_by_hand(model, tokenizer):
    """Breaks if a word does not end a block, or a schedule cuts elsewhere."""
    ids = tokenizer(f"the {block(2, 3)} hits {block(1)} {block(2)}").input_ids
    assert find_blocks(ids, model.config) == [[[2, 3], [6, 7, 8]], [[12], [15, 16]]]
    assert find_blocks(tokenizer("the ball").input_ids, model.config) == []
    spans = [[2, 3], [6, 7, 8]]
    by_hand = {"ar": [[2], [3], [6], [7], [8]], "frame": spans, "one": [[2, 3, 6, 7, 8]]}
    by_hand.update({"2": [[2, 3], [6, 7, 8]], "3": [[2], [3, 6], [7, 8]], "9": by_hand["ar"]})
    assert {name: cut(spans, name) for name in by_hand} == by_hand
    assert number(10, cut(spans, "3")).tolist() == [1, 2, 3, 4, 4, 4, 4, 5, 5, 6]
    for wrong in ("random", "0", "two", ""):
        with pytest.raises(ValueError, match="expected ar, frame, one"):
            cut(spans, wrong)


def test_random_cuts_are_all_cuts():
    """Breaks if a number of sets is never drawn or drawn more often than another, or a latent is
    lost.
    """
    draw, counts = random.Random(0), {k: 0 for k in range(1, 5)}
    for _ in range(2000):
        sets = cut([[3, 4], [7, 8]], "random", draw)
        assert sum(sets, []) == [3, 4, 7, 8] and all(sets)
        counts[len(sets)] += 1
    assert all(abs(n - 500) < 100 for n in counts.values())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_mask_is_a_loop_over_pairs(slots, rows, schedule):
    """Breaks if any pair of tokens, of either stream, sees or does not see the other wrongly."""
    inputs, _ = rows
    ids, mask, c = inputs["input_ids"], inputs["attention_mask"], slots.config
    layout = lay_out(ids, mask, c, schedule)
    L, Q = ids.shape[1], layout.place.shape[1]
    order = torch.cat([layout.order, layout.query_order], 1)
    is_query = (torch.arange(L + Q) >= L).expand_as(order)
    got = sees(order, is_query, order, is_query)
    for r, row in enumerate(ids.tolist()):
        sets = [s for b in find_blocks(row, c) for s in cut(b, schedule)]
        latents = sum(sets, [])
        of_set = {t: k for k, s in enumerate(sets) for t in range(s[0], s[-1] + 1)}
        tokens = [("content", t) for t in range(int(mask[r].sum()))]
        tokens += [("query", t) for t in latents]
        places = {
            token: t
            for token, t in zip(tokens, [*range(len(tokens) - len(latents)), *range(L, L + Q)])
        }
        for me in tokens:
            for other in tokens:
                (a, i), (b, j) = me, other
                same = i == j or (i in of_set and of_set[i] == of_set.get(j))
                before = j < i and not same
                if b == "query":
                    expected = a == "query" and same
                else:
                    expected = before or (a == "content" and same)
                assert bool(got[r, places[me], places[other]]) == expected, (r, me, other)
        # nobody who is real sees padding
        real = [places[token] for token in tokens]
        padding = [k for k in range(L + Q) if k not in real]
        assert not got[r][real][:, padding].any() and got[r].any(1).all()


# -------------------------------------------------------------------------------------- dependence


def test_with_as_many_sets_as_latents_words_are_as_ever(slots, rows):
    """Breaks if content is not the ordinary forward under ar, or depends on the queries."""
    inputs, latents = rows
    (h, q), _ = states(slots, rows, "ar")
    with torch.no_grad():
        plain, _ = slots.hidden(**inputs, latents=latents)
        slots.slots.weight.normal_()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(slots.logits(h[real]), slots.logits(plain[real]), atol=1e-4, rtol=0)
    (again, other), _ = states(slots, rows, "ar")
    assert torch.equal(again, h) and not torch.allclose(other, q, atol=0.1)
    (one, _), _ = states(slots, rows, "one")
    assert not torch.allclose(one, h, atol=1e-2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_a_latent_changes(slots, rows, schedule):
    """Breaks if a query sees content of its own set or a later one, or not that of an earlier one;
    if a word before a set sees it, or one after it does not.
    """
    inputs, latents = rows
    (h, q), layout = states(slots, rows, schedule)
    asked = layout.query_order < FAR
    row_of, order_of = asked.nonzero()[:, 0], layout.query_order[asked]
    for n in range(len(latents)):
        z = latents.clone()
        z[n] += 1
        (h2, q2), _ = states(slots, rows, schedule, z)
        later = (row_of == row_of[n]) & (order_of > order_of[n])
        assert torch.equal((q2 != q).any(1), later)
        after = (layout.order >= order_of[n]) & (layout.order < FAR)
        after[torch.arange(3) != row_of[n]] = False
        real = inputs["attention_mask"].bool()
        assert torch.equal((h2 != h).any(2)[real], after[real])


def test_what_a_query_changes(slots, rows):
    """Breaks if a word or another set's latent depends on a query."""
    (h, q), layout = states(slots, rows, "frame")
    asked = layout.query_order < FAR
    slot, row, order = layout.slot[asked], asked.nonzero()[:, 0], layout.query_order[asked]
    with torch.no_grad():
        slots.slots.weight[1] += 1
    (h2, q2), _ = states(slots, rows, "frame")
    touched = {(int(r), int(o)) for r, o, k in zip(row, order, slot) if k == 1}
    same_set = torch.tensor([(int(r), int(o)) in touched for r, o in zip(row, order)])
    assert torch.equal(h, h2) and torch.equal((q2 != q).any(1), same_set)
    assert 0 < same_set.sum() < len(q)


# --------------------------------------------------------------------------------------- the loss


def test_the_loss_by_hand(slots, rows):
    """Breaks if Eq. (3) is not the queries' squared error, or Eq. (2) not sft's under ar."""
    inputs, _ = rows
    labels = inputs["input_ids"].clone()
    labels[(labels == slots.config.latent_id) | (inputs["attention_mask"] == 0)] = -100
    e = slots.encode_frames(torch.randn(40, 1536), torch.tensor([[1, 2, 2]] * 10))
    batch = dict(inputs, labels=labels, future_grid_thw=None, future_pixel_values=e)
    batch["rows"] = [SimpleNamespace(id=k) for k in "abc"]
    slots.encode_frames = lambda e, grid: e
    plain = sft.sft_loss(slots, **inputs, labels=labels, latents=e)
    for schedule in ("ar", "one"):
        (_, q), _ = states(slots, (inputs, e), schedule)
        ce, latent = batch_sums(slots, batch, 0.0, 2.0, Config(schedule=schedule))
        by_hand = sum(((slots.to_latent(q[n]) - e[n]) ** 2).mean() for n in range(10)) / 2
        assert latent.item() == pytest.approx(by_hand.item(), rel=1e-5)
        assert (ce.item() == pytest.approx(plain["ce_sum"].item(), rel=1e-5)) == (schedule == "ar")
    latent.backward()
    assert slots.slots.weight.grad[:5].abs().sum(1).all()


def test_with_one_latent_all_schedules_are_one(batch):
    """Breaks if a schedule changes more than the cuts."""
    model, b = batch
    blocks = [len(find_blocks(row, model.config)) for row in b["input_ids"].tolist()]
    assert {1, 3} == set(blocks)
    add_slots(model, 32)
    expected = None
    for schedule in ("ar", "frame", "one", "random", "2"):
        sums = torch.stack(batch_sums(model, b, 0.5, 1.0, Config(schedule=schedule)))
        expected = sums if expected is None else expected
        torch.testing.assert_close(sums, expected)


@pytest.mark.slow  # whole trainings
def test_a_run_resumes_with_the_same_cuts(world, tmp_path):
    """Breaks if cuts depend on what ran before, or slots are not saved, loaded and trained."""
    more = dict(save_every=2, stop_term=False, schedule="random", slots=7)
    config = settings(world, tmp_path / "a", Config, **more, l_max=4, image_max_tokens=4)
    assert_resumes(set_spans.train, config)
    model, _ = load(str(tmp_path / "a" / "step_000004"), cls=Model)
    before = load_file(tmp_path / "a" / "step_000002" / "model.safetensors")["slots.weight"]
    assert model.config.set_slots == 7 and not torch.equal(model.slots.weight, before)


def test_a_saved_model_is_loaded_with_its_slots(slots, tokenizer, world, tmp_path):
    """Breaks if the slots are lost, or a plain model gets some."""
    slots.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load(str(tmp_path), cls=Model)
    assert torch.equal(model.slots.weight, slots.slots.weight)
    assert not hasattr(load(world["model"], cls=Model)[0], "slots")


def test_random_cuts_depend_on_seed_progress_and_id_alone(slots, rows, monkeypatch):
    """Breaks if a row's cuts depend on its neighbours, or are the same at every step."""
    inputs, e = rows
    slots.encode_frames = lambda e, grid: e
    labels, seen = torch.full_like(inputs["input_ids"], -100), []

    def spy(*args, **more):
        seen.append(lay_out(*args, **more))
        return seen[-1]

    monkeypatch.setattr(set_spans, "lay_out", spy)

    def orders(progress=0.5, ids="abc", **more):
        batch = dict(inputs, labels=labels, future_grid_thw=None, future_pixel_values=e)
        batch["rows"] = [SimpleNamespace(id=k) for k in ids]
        batch_sums(slots, batch, progress, 1.0, Config(schedule="random", **more))
        return seen[-1].query_order.tolist()

    assert orders() == orders() and orders(ids="xby")[1] == orders()[1]
    differ = [orders(progress=k / 10)[1] for k in range(5)] + [orders(seed=1)[1]]
    assert len({tuple(order) for order in differ}) > 3
    assert len({tuple(orders(ids=["a", k, "c"])[1]) for k in "bcdef"}) > 2


def test_settings_without_a_meaning(slots, rows):
    """Breaks if a setting that does nothing, or a block beyond the slots, is taken."""
    for wrong, said in (
        (dict(stop_term=True), "no --stop_term"),
        (dict(spans=False), "no --no-spans"),
        (dict(schedule="two"), "schedule is 'two'"),
        (dict(eval_data="x"), "no --eval_data"),
        (dict(lora_rank=4), "no --lora_rank"),
    ):
        with pytest.raises(ValueError, match=said):
            Config(**wrong)
    inputs, _ = rows
    slots.config.set_slots = 4
    with pytest.raises(ValueError, match="a block of 5 latents, but slots is 4"):
        lay_out(inputs["input_ids"], inputs["attention_mask"], slots.config, "one")


# --------------------------------------------------------------------------------------- decoding


BLOCKS = [[[2, 3], [1]], [[4]], [[1], [2, 2], [3]]]  # of the three prompts


def roll_out(model, tokenizer, schedule, seed=0, prompts=PROMPTS, blocks=BLOCKS, **more):
    """The prompts, decoded by a model of random words -> (batch, rollout)."""
    shuffle(model, seed)
    ends = tokenizer.convert_tokens_to_ids("<|im_end|> red".split())
    model.generation_config.eos_token_id = ends
    batch = make_batch(tokenizer, prompts, "left")
    generator = torch.Generator().manual_seed(seed)
    args = dict(dict(max_new_tokens=40, temperature=1.3, generator=generator), **more)
    return batch, generate(model, batch, blocks, schedule, **args)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_decoding_equals_one_forward(slots, tokenizer, schedule):
    """Breaks if the cache, the positions, the order, the passes of rows in different states or the
    record are wrong: a forward over the record predicts each latent and word that was fed.
    """
    opened, finish = [], set()
    for seed in range(4):
        batch, r = roll_out(slots, tokenizer, schedule, seed)
        logprobs = token_logprobs(slots, batch, r, schedule, 1.3)
        torch.testing.assert_close(logprobs, r.logprobs, atol=1e-4, rtol=0)
        said = torch.arange(40) < r.lengths[:, None]
        inputs = dict(batch, input_ids=torch.cat([batch["input_ids"], r.tokens], 1))
        inputs["attention_mask"] = torch.cat([batch["attention_mask"], said.long()], 1)
        (_, q), _ = states(slots, (inputs, torch.cat(r.latents)), schedule)
        torch.testing.assert_close(slots.to_latent(q), torch.cat(r.latents), atol=1e-4, rtol=0)

        # each row opens its blocks in their order, and chooses only what is not inside them
        for tokens, sampled, length, given in zip(r.tokens.tolist(), r.sampled, r.lengths, BLOCKS):
            found = find_blocks(tokens[:length], slots.config)
            assert [[len(span) for span in b] for b in found] == given[: len(found)]
            inside = sum(b[-1][-1] + 2 - b[0][0] for b in found)
            assert sampled.sum() == length - inside and not sampled[length:].any()
            opened.append(len(found))
        finish |= set(r.finish)
    assert {0, 1, 2, 3} == set(opened) or sum(opened) > 8
    assert finish == {"eos", "length"}


def test_under_ar_words_score_as_ever(slots, tokenizer):
    """Breaks if K = N is another model than the ordinary one: its replay scores the same words."""
    batch, r = roll_out(slots, tokenizer, "ar")
    theirs = latent_decode.token_logprobs(slots, batch, r, 1.3)
    assert sum(map(len, r.latents)) > 4
    torch.testing.assert_close(theirs, r.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_set_takes_one_pass(slots, tokenizer, schedule):
    """Breaks if a block of K sets takes other than K + 1 passes with its first and last token."""
    calls, c = [], slots.config
    slots.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    for seed in range(3):
        calls.clear()
        _, r = roll_out(slots, tokenizer, schedule, seed, PROMPTS[2:], BLOCKS[2:])
        tokens = r.tokens[0, : r.lengths[0]].tolist()
        found = find_blocks(tokens, c)
        outside = len(tokens) - sum(
            b[-1][-1] + 3 - b[0][0] for b in found
        )  # `<|latent_start|>` too
        expected = outside + sum(len(cut(b, schedule)) + 1 for b in found)
        ended = r.finish == ["eos"]  # that token is not fed
        assert len(calls) == 1 + expected - ended  # one is the prompt's


def test_alone_or_in_company(slots, tokenizer):
    """Breaks if a greedy row depends on other rows, their blocks or the padding."""
    _, together = roll_out(slots, tokenizer, "frame", temperature=0)
    for k in range(3):
        _, alone = roll_out(
            slots, tokenizer, "frame", 0, PROMPTS[k : k + 1], BLOCKS[k : k + 1], temperature=0
        )
        row = take(together, [k])
        assert torch.equal(alone.tokens[:, : row.tokens.shape[1]], row.tokens)
        torch.testing.assert_close(alone.latents[0], row.latents[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(
            alone.logprobs[:, : row.tokens.shape[1]], row.logprobs, atol=1e-4, rtol=0
        )
    assert sum(map(len, together.latents)) > 4


def test_no_block_without_room(slots, tokenizer):
    """Breaks if a block is cut at max_new_tokens, or a row opens more blocks than it has."""
    for limit in range(1, 9):
        for seed in range(3):
            _, r = roll_out(slots, tokenizer, "one", seed, max_new_tokens=limit)
            for tokens, length, given in zip(r.tokens.tolist(), r.lengths, BLOCKS):
                found = find_blocks(tokens[:length], slots.config)
                assert [[len(span) for span in b] for b in found] == given[: len(found)]
                assert tokens.count(slots.config.latent_end_id) == tokens.count(
                    slots.config.latent_start_id
                )
    _, r = roll_out(slots, tokenizer, "one", blocks=[[], [], []])
    assert not any(map(len, r.latents)) and (r.tokens != slots.config.latent_start_id).all()
    with pytest.raises(ValueError, match="schedule is 'random'"):
        roll_out(slots, tokenizer, "random")
