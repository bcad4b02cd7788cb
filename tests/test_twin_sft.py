"""sft.py against its plain twin: from the same settings and data to the same weights."""

import pytest
import twin
from twin_world import disagreement, in_double, picture, read_lines, save_model, write_records

import sft
from common.formats import read_rows
from data import collate, encode, model_inputs
from model import load

# every number differs from 0, from 1 and from the others, so that none can be lost or exchanged
SETTINGS = dict(
    seed=3, steps=4, global_batch=7, micro_batch=3, workers=0, save_every=100, system="watch",
    lr=2e-3, warmup=0.5, beta2=0.95, weight_decay=0.3, clip=14.0, lam=0.4, l_max=4,
    image_max_tokens=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Ten uneven rows with none to three futures of one, two or four latents, and a model."""
    folder = tmp_path_factory.mktemp("twin_sft")
    sizes = [(32, 32), (32, 64), (64, 64)]  # 1, 2 and 4 latents
    shown = [picture(folder, f"seen{i}.png", *sizes[i % 3], i) for i in range(5)]
    future = [picture(folder, f"next{i}.png", *sizes[i % 3], 50 + i) for i in range(7)]
    records = []
    for i in range(10):
        seen, spans = 1 + i % 2, i % 4
        answer = ("red", "green", "blue")[i % 3]
        chain = "".join(f"hits {'the ball ' * ((i + k) % 3)}<rimage> " for k in range(spans))
        records.append(
            dict(
                id=f"row {i}",
                video="none.mp4",
                question=f"which {'wall ' * (i % 3)}does it hit ?",
                answer=f"{chain}moves {'up ' * (i % 2)}<ans>{answer}</ans>",
                question_images_index=[1] * seen,
                question_images=[shown[(i + k) % 5] for k in range(seen)],
                reasoning_images_index=[2] * spans,
                reasoning_images=[future[(2 * i + k) % 7] for k in range(spans)],
            )
        )
    data = write_records(folder / "rows.json", records)
    return dict(model=save_model(folder / "model", seed=0), data=data)


def train_both(world, out, **more):
    """Both trainings -> log lines, the twin's, and `disagreement`."""
    config = sft.Config(**{**world, **SETTINGS, **more, "out": str(out)})
    checkpoint = sft.train(config)
    weights, figures = twin.sft(config)
    ratio = disagreement(world["model"], checkpoint, weights)
    print(f"sft.py and its twin, {more}: {ratio:.1e}")
    return read_lines(out / "log.jsonl"), figures, ratio


@pytest.mark.parametrize(
    "more",
    [
        dict(),
        dict(latent_loss="nmse", latent_head="linear", stop_term=True),
        dict(spans=False, steps=0, epochs=2.3),  # a short last step
    ],
    ids=["paper", "options", "text"],
)
def test_same_weights(world, tmp_path, more):
    """Breaks if any number of the method or any setting is lost on the way to the saved weights:
    a mean over the wrong set, a state off by one, the order of epochs, schedule, decay, clip.
    """
    with in_double():
        log, figures, ratio = train_both(world, tmp_path, **more)
    assert ratio < 1e-9
    assert len(log) == len(figures) == 4
    for line, expected in zip(log, figures):
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-9)

    # what is claimed to act has acted
    norms = [line["grad_norm"] for line in log]
    assert min(norms) < SETTINGS["clip"] < max(norms), "the clip should act, but not always"
    assert all((line["latent"] > 0) == more.get("spans", True) for line in log)


def test_same_weights_in_single_precision(world, tmp_path):
    """Breaks if something is computed more coarsely than in fp32. AdamW divides a gradient by its
    own size, so a weight whose gradient is nearly zero moves by its rounding. With this seed there
    is none (2e-5 of the way was measured); with seeds 1 to 5 it was 2e-5 to 3e-2.
    """
    _, _, ratio = train_both(world, tmp_path, steps=3, seed=2)
    assert ratio < 1e-3


def test_the_loss_of_a_batch(world):
    """Eq. (1)-(3) as `sft_loss` gives them. Breaks if a sum, a count or a mean of a padded batch is
    not that of its rows, if Eq. (3) compares with what was fed, or trains its target.
    """
    config = sft.Config(**world, **SETTINGS)
    mine, tokenizer = load(world["model"])
    stock, _ = twin.load(world["model"])
    samples = [encode(row, tokenizer, config) for row in read_rows(world["data"])[2:6]]
    sums = [sum(some) for some in zip(*(twin.sft_sums(stock, s, 2.5, True) for s in samples))]
    n_latent = sum(s["ids"].count(mine.config.latent_id) for s in samples)
    n_text = sum(label != -100 for s in samples for label in s["labels"]) + n_latent

    batch = collate(samples, 0)
    e = mine.encode_frames(batch["future_pixel_values"], batch["future_grid_thw"])
    inputs = dict(model_inputs(batch), labels=batch["labels"], latent_var=2.5, stop_term=True)
    out = sft.sft_loss(mine, latents=e, lam=0.3, **inputs)
    assert (out["n_text"], out["n_latent"]) == (n_text, n_latent)
    means = dict(ce=sums[0] / n_text, latent=sums[1] / n_latent)
    expected = dict(means, ce_sum=sums[0], latent_sum=sums[1])
    expected["loss"] = means["ce"] + 0.3 * means["latent"]
    for name, value in expected.items():
        assert out[name].item() == pytest.approx(value.item(), rel=1e-5), name

    targets = e.flip(0).requires_grad_()
    other = sft.sft_loss(mine, latents=e, targets=targets, **inputs)
    assert other["ce"] == out["ce"] and other["latent"] != out["latent"]
    other["loss"].backward()
    assert targets.grad is None
