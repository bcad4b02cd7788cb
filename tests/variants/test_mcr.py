"""The loop of looks: what the environment says; transcripts replay; its words are not learnt."""

import dataclasses
import random
import shutil

import pytest
import torch
from test_la_dapo import apart, log_of, weights
from test_la_dapo import settings as rl_settings
from test_sft import settings as sft_settings
from tokenizers import AddedToken

import la_dapo
from common.formats import Frame, Row, read_rows
from data import Samples, collate, model_inputs
from latent_decode import generate
from model import load
from rewards import accuracy_reward
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
    state is one off, if a word of the environment counts as chosen or one of the policy's does not,
    or if what fills up a rank's batches weighs anything.
    """
    model, tokenizer, config, _, episodes = played
    batch = batch_of(episodes, model, tokenizer, config)
    new = mcr.replay_loops(model, batch, config)
    torch.testing.assert_close(new.logprobs, batch.rollout.logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(new.predicted, new.latents, atol=1e-4, rtol=0)
    assert len(new.latents) > 4 and (new.logprobs < -1e-3).sum() > 20

    filling_up = la_dapo.no_batch(96, "cpu")
    loss, _ = mcr.policy_loss(model, filling_up, la_dapo.Counts(9, 9, 9), config)
    loss.backward()
    assert loss == 0


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
    """Breaks if SFT learns the environment's words or pictures, or leaves out the policy's."""
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
    """Breaks if scripted loops do not go through the loop of SFT, or have no spans."""
    config = sft_settings({**world, "model": looper}, tmp_path / "sft", mcr_sft.Config, steps=1)
    mcr_sft.train(config)
    assert log_of(tmp_path / "sft")[0]["latents"] > 0
    with pytest.raises(ValueError, match="scripted loops: spans, and no eval_data"):
        mcr_sft.Config(spans=False)
