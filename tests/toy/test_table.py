"""The tables of the embedded world, by hand."""

import json

import pytest

from toy import table


def leave(folder, name, seconds=(), **accuracies):
    """What an evaluation leaves in a seed's folder, and its training's log."""
    scores = {group: dict(accuracy=value, n=4) for group, value in accuracies.items()}
    (folder / f"eval_{name}").mkdir(parents=True)
    (folder / f"eval_{name}" / "summary.json").write_text(json.dumps(dict(scores=scores)))
    if seconds:
        (folder / "logs").mkdir(exist_ok=True)
        lines = [f"at work\nCPU s: {user} + {system}\n" for user, system in seconds]
        (folder / "logs" / f"{name}.txt").write_text("".join(lines))


@pytest.fixture
def seeds(tmp_path):
    """Two seeds; the second has no RL yet."""
    folders = [tmp_path / "seed_0", tmp_path / "seed_1"]
    for folder, a in zip(folders, (0.1, 0.3)):
        groups = {"1-hop": a, "2-hop": 0.5, "3-hop": 0.25, "4-hop": 1.0, "all": 0.5}
        leave(folder, "text", [(1.5, 0.25), (8.0, 0.5)], **groups)
        leave(folder, "latent_zero", **groups)
    leave(folders[0], "la-dapo", [(7.0, 0.0)], **dict(groups, all=1.0))
    leave(folders[0], "my-idea", **{"1-hop": 0.75, "all": 0.75})
    return [str(folder) for folder in folders]


def test_a_table_by_hand(seeds):
    """Breaks if a mean is not over seeds, a deviation not that of a sample, seconds not those of
    all attempts, a row out of order, or one that a seed lacks is lost or taken for a whole one.
    """
    lines = table.report(seeds).splitlines()
    assert lines[2:7] == [
        "|  | 1-hop | 2-hop | 3-hop | 4-hop | avg | CPU s |",
        "|---|---|---|---|---|---|---|",
        "| text-only SFT | 0.200 ± 0.141 | 0.500 ± 0.000 | 0.250 ± 0.000 | 1.000 ± 0.000 "
        "| 0.500 ± 0.000 | 10 ± 0 |",
        "| RL: LA-DAPO (1 of 2 seeds) | 0.300 | 0.500 | 0.250 | 1.000 | 1.000 | 7 |",
        "| my-idea (1 of 2 seeds) | 0.750 |  |  |  | 0.750 |  |",
    ]
    assert lines[8] == "Latent SFT, with its spans fed other vectors"
    assert lines[12].startswith("| zero | 0.200 ± 0.141 | 0.500 ± 0.000 |")


def test_what_a_curation_chose_and_how_far_pictures_are(tmp_path):
    """Breaks if a share is not that of questions about the future, or an error is not the one
    that the painter's log says, or of another kind of picture.
    """
    folder = tmp_path / "seed_0"
    for name in ("curation", "logs", "pictures"):
        (folder / name).mkdir(parents=True)
    kinds = dict(
        chosen=("1-hop", "2-hop", "near", "3-hop"), random=("near", "move", "move", "1-hop")
    )
    for name, groups in kinds.items():
        text = "".join(json.dumps(dict(group=group)) + "\n" for group in groups)
        (folder / "curation" / f"{name}.jsonl").write_text(text)
    assert table.curation_figures(str(folder)) == {
        "rows in each set": 4,
        "share of hops, selected": 0.75,
        "share of hops, random": 0.25,
    }
    (folder / "logs" / "painter.txt").write_text("painter: 100%\n0.004  true frames, held out\n")
    (folder / "pictures" / "imagined.json").write_text(json.dumps({"imagined 1": 0.125}))
    errors = table.picture_errors(str(folder))
    assert errors == {"true frames, held out": 0.004, "imagined 1": 0.125}
    assert table.as_list([errors, {"imagined 1": 0.375}]).splitlines() == [
        "- true frames, held out: 0.004",
        "- imagined 1: 0.250 ± 0.177",
    ]
