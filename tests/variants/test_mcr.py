"""The loop of looks: what the environment says; transcripts replay; its words are not learnt."""

import dataclasses
import random
import shutil

import numpy as np
import pytest
import torch
from test_la_dapo import apart, log_of, weights
from test_la_dapo import settings as rl_settings
from test_sft import settings as sft_settings
from tokenizers import AddedToken

import la_dapo
import sft
from common.clips import pixels_of
from common.formats import Frame, Row, read_rows
from data import Samples, collate, model_inputs
from latent_decode import generate
from model import LATENT, LATENT_END, load
from rewards import accuracy_reward
from tests.conftest import launch
from toy.world import WALLS
from variants import mcr, mcr_sft
from variants.mcr import Said, Shown, environment
from variants.mcr_sft import script


def add_words(folder, out):
    """The world's model with the words of the loop, as variants/mcr.sh makes it."""
    model, tokenizer = load(folder)
    words = [*mcr.WORDS, *"12345678"]
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in words])
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    model.config.text_config.vocab_size = len(tokenizer)
    for part in (model, tokenizer):
        part.save_pretrained(out)
    return out


def nearest_wall(picture):
    """The wall that the ball touches, by its pixels. picture: uint8 (H, W, 3)."""
    dark = picture.astype(int).sum(-1) < 240  # (H, W): the ball is the only dark thing
    i, j = (place.mean() for place in dark.nonzero())
    H, W = dark.shape
    return WALLS[int(np.argmin([j, H - 1 - i, W - 1 - j, i]))]  # left, bottom, right, top


@pytest.fixture(scope="module")
def looper(world, tmp_path_factory):
    """A random model whose output layer alone has learnt scripted loops: it looks, imagines, checks
    and answers.
    """
    folder = tmp_path_factory.mktemp("looper")
    model, tokenizer = load(add_words(world["model"], str(folder / "words")))
    config = sft_settings(world, "unused", mcr_sft.Config, copies=10)
    loops = mcr_sft.scripts(few_rows(world), config)
    samples = mcr_sft.LoopSamples(loops, tokenizer, config)
    batch = collate([samples[i] for i in range(len(loops))], 0)
    ids, latent = batch["input_ids"], batch["input_ids"] == model.config.latent_id
    chosen = ((batch["labels"] != -100) | latent)[:, 1:]  # (B, L - 1): to go on in a span, too
    with torch.no_grad():
        z = model.encode_frames(batch["future_pixel_values"], batch["future_grid_thw"])
        for _ in range(4):  # towards its own latents
            h, _ = model.hidden(**model_inputs(batch), latents=z)
            z = h[:, :-1][latent[:, 1:]]
    x, words = h[:, :-1][chosen], ids[:, 1:][chosen]
    head = torch.zeros_like(model.lm_head.weight, requires_grad=True)
    optimizer = torch.optim.Adam([head], lr=0.2)
    for _ in range(100):
        torch.nn.functional.cross_entropy(x @ head.T, words).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.lm_head.weight.data.copy_(head.data)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


def few_rows(world):
    """2-hop and 3-hop of two clips."""
    rows = read_rows(world["data"])
    return [rows[i] for i in (1, 2, 5, 6)]


def settings(world, looper, out, **more):
    config = vars(rl_settings(world, looper, out))
    config.update(
        group_size=10,
        temperature=0.8,
        max_new_tokens=40,
        max_turns=6,
        lambda_c=0.0,
        lambda_d=0.0,
        kl=0.0,
    )
    return mcr.Config(**{**config, **more})


@pytest.fixture(scope="module")
def played(world, looper):
    """Four prompts, ten drawn rollouts each: (model, tokenizer, config, samples, episodes)."""
    model, tokenizer = load(looper)
    config = settings(world, looper, "unused")
    samples = Samples(few_rows(world), tokenizer, config, train=False)
    samples = [samples[i] for i in range(4)]
    how = dict(temperature=0.8, generator=torch.Generator().manual_seed(4))
    episodes = mcr.play(model.eval(), tokenizer, samples, config, n=10, **how)
    assert {len(e.seen) for e in episodes} >= {0, 1, 2}
    imagined = [sum(len(z) > 0 for z in e.latents[:-1]) for e in episodes]
    assert max(imagined) > 1  # latents of two turns are fed again in a third
    return model, tokenizer, config, samples, episodes


FIVE, SIX = Frame("c.mp4", 5), Frame("c.mp4", 6)
ROW = Row("here", "r", [Frame("c.mp4", 4), "which ?"], [FIVE, SIX], "red")


@pytest.mark.parametrize(
    "turn, feedback",
    [
        ("<reason>look 6</reason><|im_end|>", Shown(SIX)),
        ("<reason> up </reason> <reason> look 1 </reason> <|im_end|>", Shown(Frame("c.mp4", 1))),
        ("<reason>look 9</reason>", Said("nothing")),
        ("<reason>check</reason><|im_end|>", Said("unseen")),
        ("<reason>look 6</reason><reason>hits red</reason><|im_end|>", None),
        ("<reason>look</reason><|im_end|>", None),
        ("<answer>look 6</answer><|im_end|>", None),
    ],
)
def test_feedback(turn, feedback):
    """Breaks if an action is missed, or made out of words that are none."""
    assert environment(turn, ROW, [Frame("c.mp4", 4)], 1) == feedback


def test_feedback_depends_on_what_was_seen():
    """Breaks if a check looks at another frame than the one asked for, or a budget is not kept."""
    check = "<reason>check</reason>"
    assert environment(check, ROW, [FIVE], 1) == Said("unseen")
    assert environment(check, ROW, [SIX], 0) == Said("seen")
    assert environment("<reason>look 6</reason>", ROW, [], 0) == Said("nothing")
    blind = dataclasses.replace(ROW, prompt=["which ?"], response=[])
    assert environment(check, blind, [SIX], 1) == Said("nothing")
    assert environment("<reason>look 6</reason>", blind, [], 1) == Said("nothing")


def test_one_turn_is_the_ordinary_rollout(played):
    """Breaks if the loop changes what a model does that does not act: `generate` is the oracle."""
    model, tokenizer, config, samples, _ = played
    how = dict(temperature=1.0, n=2, generator=torch.Generator().manual_seed(5))
    one = dataclasses.replace(config, max_turns=1)
    episodes = mcr.play(model, tokenizer, samples, one, **how)
    how["generator"].manual_seed(5)
    how.update(max_new_tokens=config.max_new_tokens, max_latents=config.max_latents)
    plain = generate(model, model_inputs(collate(samples, 0, side="left")), **how)
    got = mcr.as_rollout(episodes, model.device)
    for name in ("tokens", "logprobs", "sampled"):
        for i, n in enumerate(plain.lengths.tolist()):
            assert torch.equal(getattr(got, name)[i, :n], getattr(plain, name)[i, :n]), name
    assert got.lengths.equal(plain.lengths) and got.finish == plain.finish
    assert all(torch.equal(a, b) for a, b in zip(got.latents, plain.latents))


def test_without_looks_nothing_is_shown(played):
    """Breaks if a look is answered that the budget does not allow."""
    model, tokenizer, config, samples, _ = played
    none = dataclasses.replace(config, max_looks=0)
    episodes = mcr.play(model, tokenizer, samples, none, n=6, temperature=1.0)
    texts = " ".join(tokenizer.batch_decode([episode.tokens for episode in episodes]))
    assert not any(e.images or e.seen for e in episodes) and "nothing" in texts


def logprobs_alone(model, episode, temperature):
    """A transcript's log-probabilities by one plain forward of its own -> T floats, 0 = fed."""
    context = collate([episode.context], 0)
    out = model(**model_inputs(context), latents=torch.cat(episode.latents))
    logp = (out.logits[0] / temperature).log_softmax(-1)
    start, values, in_span = len(episode.sample["ids"]), [], False
    for t, (token, chosen) in enumerate(zip(episode.tokens, episode.sampled)):
        at = logp[start + t - 1]
        value = at[token]
        if in_span and token == model.config.latent_id:
            value = (1 - at[model.config.latent_end_id].exp()).log()
        in_span = token in (model.config.latent_start_id, model.config.latent_id)
        values.append(value if chosen else torch.zeros(()))
    return torch.stack(values)


def batch_of(episodes, model, tokenizer, config):
    """The four prompts' groups, scored, with their advantages, as a Batch of la_dapo.py."""
    samples = [episode.sample for episode in episodes[::10]]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(mcr, "play", lambda *a, **k: episodes)
        groups = mcr.roll_out(model, tokenizer, samples, 0, config)
    mcr.score_groups(groups, None, config)
    for group in groups:
        group.A = mcr.differences(group.parts["total"])
    return la_dapo.batch_of(groups, torch.device("cpu"))


def test_transcripts_replay(played):
    """The transcript in one forward is what was decoded turn by turn: log-probabilities, latents.

    Breaks if feedback, pictures, latents or positions differ between decoding and replay, if the
    state is one off, or if a word of the environment counts as chosen.
    """
    model, tokenizer, config, _, episodes = played
    batch = batch_of(episodes, model, tokenizer, config)
    new = mcr.replay_loops(model, batch, config)
    torch.testing.assert_close(new.logprobs, batch.rollout.logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(new.predicted, new.latents, atol=1e-4, rtol=0)
    assert len(new.latents) > 4 and (new.logprobs < -1e-3).sum() > 20
    for r, (k, members) in enumerate(zip(batch.prompt_of.tolist(), batch.members)):
        episode = batch.groups[k].episodes[members[0]]
        alone, n = logprobs_alone(model, episode, 0.8), len(episode.tokens)
        torch.testing.assert_close(new.logprobs[r, :n], alone, atol=1e-4, rtol=0)


def test_words_of_the_environment_are_fed_and_not_learnt(played):
    """Breaks if the environment's tokens have a log-probability or a weight, or those of the policy
    have none. By the text: a user's turn, up to the role that opens the policy's.
    """
    model, tokenizer, config, _, episodes = played
    for episode in episodes:
        text = tokenizer.decode(episode.tokens).split()
        feedback, starts = [], 0
        for before, token in zip(["", *text], text):
            starts += token == "<|im_start|>"
            feedback.append(starts % 2 == 1 or "<|im_start|>" in (before, token))
        # at its longest a span is stopped by force: that is not chosen either
        L, longest = config.max_latents, [LATENT] * config.max_latents
        forced = [t == LATENT_END and text[i - L : i] == longest for i, t in enumerate(text)]
        chosen = [not (fed or stop) for fed, stop in zip(feedback, forced)]
        assert episode.sampled == chosen
        assert all(p == 0 for p, c in zip(episode.logprobs, chosen) if not c)
        shown = text.count("<|image_pad|>")
        assert shown == len(episode.seen) == len(episode.images) and shown <= sum(feedback)
    batch = batch_of(episodes, model, tokenizer, config)
    assert batch.weight[~batch.rollout.sampled].sum() == 0
    assert int(batch.weight.sum()) == sum(sum(episode.sampled) for episode in episodes)


def test_the_loss_does_not_see_feedback(played):
    """Breaks if the gradient is that of another sum than -A log pi over what the policy chose, or
    A is not R - mean R.
    """
    model, tokenizer, config, _, episodes = played
    config = dataclasses.replace(config, adjoint_terms=0)
    batch = batch_of(episodes, model, tokenizer, config)
    n = int(batch.weight.sum())
    loss, _ = mcr.policy_loss(model, batch, la_dapo.Counts(n, 40, 4), config)
    (gradient,) = torch.autograd.grad(loss, model.lm_head.weight)
    by_hand = 0.0
    for group in batch.groups:
        R = torch.tensor(group.parts["total"])
        for A, episode in zip(R - R.mean(), group.episodes):
            by_hand = by_hand - A * logprobs_alone(model, episode, config.temperature).sum() / n
    (expected,) = torch.autograd.grad(by_hand, model.lm_head.weight)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-3)


def test_reward_by_hand(played):
    """Breaks if a look costs nothing, costs twice, a right answer is worth another amount, or an
    unjudged rollout counts in the mean.
    """
    assert mcr.differences([1.0, None, 0.5]).tolist() == [0.25, 0, -0.25]
    model, tokenizer, config, _, episodes = played
    config = dataclasses.replace(config, cost=0.25)
    groups = batch_of(episodes, model, tokenizer, config).groups
    assert len(groups) == 4
    for group in groups:
        for i, episode in enumerate(group.episodes):
            row, text = group.sample["row"], tokenizer.decode(episode.tokens)
            right = accuracy_reward(text, row.answer, row.options) > 0
            expected = right - 0.25 * tokenizer.decode(episode.tokens).count("<|image_pad|>")
            assert group.parts["total"][i] == pytest.approx(expected)
            assert la_dapo.rewards_of(group)["looks"][i] == len(episode.seen)


class Draws:
    """random.Random whose numbers are known."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


def test_scripts_by_hand():
    """Breaks if a frame is looked at that was to be imagined, or feedback is not the environment's:
    a check after a look at the frame that is asked for finds it seen.
    """
    row = dataclasses.replace(ROW, response=["up", FIVE, "hits red", SIX, "hits blue"])
    assert script(row, Draws(0.9, 0.1)) == [
        *("up", "imagine", FIVE, "hits red"),
        *("look 6", Shown(SIX), "hits blue", "check", Said("seen")),
    ]
    chain = ["up", "look 5", Shown(FIVE), "hits red", "imagine", SIX, "hits blue"]
    unseen = [*chain, "check", Said("unseen")]
    assert script(row, Draws(0.1, 0.9, 0.9)) == unseen
    assert script(row, Draws(0.1, 0.9, 0.1)) == [*unseen, "look 6", Shown(SIX), "hits blue"]
    config = mcr_sft.Config(copies=3, seed=1)
    loops = mcr_sft.scripts([row, row], config)
    assert [loop.id for loop in loops] == [f"r#{i}" for i in (0, 1, 2)] * 2
    assert loops[:3] == loops[3:] and len({str(loop.response) for loop in loops}) > 1
    assert loops[0].response == script(row, random.Random("1 r 0"))


def test_scripted_feedback_has_no_label(world, looper):
    """Breaks if SFT learns the environment's words or pictures, leaves out the policy's, or feeds
    another future: the loss is Eq. (2) over the policy's words alone.
    """
    model, tokenizer = load(looper)
    config = sft_settings(world, "unused", mcr_sft.Config)
    row = next(row for row in read_rows(world["data"]) if row.group == "3-hop")
    loop = dataclasses.replace(row, response=script(row, Draws(0.1, 0.9, 0.9, 0.1)))
    sample = mcr_sft.encode_loop(loop, tokenizer, config)
    learnt = tokenizer.decode([label for label in sample["labels"] if label != -100])
    steps = [part for part in loop.response if isinstance(part, str)]
    said = "".join(f"<reason>{step}</reason>" for step in steps)
    bare = learnt.replace("<|latent_start|>", "").replace("<|latent_end|>", "")
    assert bare.replace(" ", "").replace("<|im_end|>", "") == (
        f"{said}<answer>{row.answer}</answer>".replace(" ", "")
    )
    assert bare.count("<|im_end|>") == 4  # two looks, a check, the answer
    assert len(sample["images"]) == len(mcr.frames_in(row.prompt)) + 2
    assert len(sample["futures"]) == 2 and "image_pad" not in learnt

    batch = collate([sample], 0)
    frames = batch["future_pixel_values"], batch["future_grid_thw"]
    args = dict(model_inputs(batch), latents=model.encode_frames(*frames))
    loss = sft.sft_loss(model, **args, labels=batch["labels"])
    logp = model(**args).logits[0].log_softmax(-1)
    at = [t for t, label in enumerate(sample["labels"]) if label != -100]
    by_hand = -sum(logp[t - 1, sample["ids"][t]] for t in at)
    assert loss["ce_sum"].item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_a_script_reads_as_the_loop_writes(world, looper):
    """Breaks if feedback is tokenised differently in scripts and in the loop: a model that plays a
    script to the word has its very context.
    """
    _, tokenizer = load(looper)
    config = settings(world, looper, "unused")
    row = read_rows(world["data"])[0]
    loop = dataclasses.replace(row, response=script(row, Draws(0.1)))  # 1-hop: a look, then a check
    ids = mcr_sft.encode_loop(loop, tokenizer, config)["ids"]
    sample = Samples([row], tokenizer, config, train=False)[0]
    episode, (up, _, shown, hits, _, seen) = mcr.Episode(sample), loop.response
    turns = [[up, f"look {shown.frame.index}"], [hits, "check"]]
    for reasons in turns:
        text = "".join(f"<reason>{reason}</reason>" for reason in reasons)
        episode.turn, episode.finish = len(episode.tokens), "eos"
        episode.tokens += tokenizer(text + "<|im_end|>", add_special_tokens=False).input_ids
        assert episode.add_feedback(tokenizer, config)
    text = f"<answer>{row.answer}</answer><|im_end|>"
    episode.tokens += tokenizer(text, add_special_tokens=False).input_ids
    assert episode.context["ids"] == ids and seen == Said("seen")
    assert len(episode.context["images"]) == len(mcr.frames_in(row.prompt)) + 1


@pytest.mark.parametrize("wrong", [dict(kl=0.1), dict(filter=True), dict(minibatches=2)])
def test_settings_without_a_meaning(world, looper, wrong):
    """Breaks if a setting that has no meaning here is accepted."""
    with pytest.raises(ValueError, match="^mcr: "):
        settings(world, looper, "unused", **wrong)


def test_a_run_is_logged_and_resumes(world, looper, tmp_path):
    """Breaks if the looks are not logged, or a step of loops depends on more than the
    checkpoint: what was seen, say.
    """
    more = dict(steps=2, save_every=1, group_size=3, cost=0.1)
    config = settings(world, looper, tmp_path / "a", **more)
    straight = weights(mcr.train(config))
    lines = log_of(tmp_path / "a")
    for line in lines:
        assert line["total"] == pytest.approx(line["accuracy"] - 0.1 * line["looks"])
        assert line["groups"] == 4 and line["replay_rms"] < 1e-3
    assert lines[0]["looks"] > 0
    shutil.rmtree(tmp_path / "a" / "step_000002")
    resumed = weights(mcr.train(dataclasses.replace(config, resume=True)))
    assert apart(straight, weights(looper)) > 0
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)


def test_scripts_are_learnt(world, looper, tmp_path):
    """Breaks if scripted loops do not go through the loop of SFT, or their share is no share."""
    config = sft_settings({**world, "model": looper}, tmp_path / "sft", mcr_sft.Config, steps=1)
    mcr_sft.train(config)
    assert log_of(tmp_path / "sft")[0]["latents"] > 0
    with pytest.raises(ValueError, match="looks between 0 and 1"):
        mcr_sft.Config(looks=1.5)


@pytest.mark.slow  # processes of their own
def test_two_processes_give_the_update_of_one(world, looper, tmp_path):
    """Breaks if the ranks play other loops, or wait for a rank that has no loop left."""
    more = dict(steps=2, rollout_batch=1, group_size=3, lr=1e-5)
    more.update(groups=5, micro_batch=1)  # of them, one rank has three, the other two
    for name, processes in (("one", 1), ("two", 2)):
        launch(settings(world, looper, tmp_path / name, **more), processes)
    a, b = (weights(tmp_path / name / "step_000002") for name in ("one", "two"))
    assert apart(a, weights(looper)) > 1e-5 and apart(a, b) < 1e-6
    for x, y in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two")):
        for key in ("total", "accuracy", "looks", "entropy", "grad_norm", "rollouts", "length"):
            assert x[key] == pytest.approx(y[key], rel=1e-4, abs=1e-6), key


def test_the_scripted_agent_is_always_right(world):
    """Breaks if a look shows another frame than the one asked for, or a frame does not show the
    answer: one look is enough.
    """
    rows = read_rows(world["data"])
    for row in rows:
        asked = mcr.frames_in(row.response)[-1]
        shown = environment(f"<reason>look {asked.index}</reason>", row, [], 1)
        assert nearest_wall(pixels_of([shown.frame])[shown.frame]) == row.answer
    assert len(rows) == 24
