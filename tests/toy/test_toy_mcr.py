"""A loop of looks in the embedded world: the table by hand, and the whole in small."""

import json
import os

import numpy as np
import pytest

from toy import __main__ as demo
from toy import mcr as toy_mcr
from toy.world import make_world


def line(name, looks, all):
    """A line of the table whose groups are alike."""
    groups = {
        key: value for hop in toy_mcr.HOPS for key, value in ((hop, all), (f"looks {hop}", looks))
    }
    return dict(groups, name=name, looks=looks, all=all)


def test_the_table_is_of_all_seeds(tmp_path):
    """Breaks if a cell is one seed's, or a row that one seed lacks is lost or ends the run."""
    seeds = [
        [line("scripted agent", 1, 1), line("LA-DAPO, cost 0", 1, 0.9), line("blind", 0, 0.5)],
        [line("scripted agent", 1, 1), line("LA-DAPO, cost 0", 2, 0.7)],
    ]
    table = toy_mcr.markdown(seeds).splitlines()
    sd = np.std([0.9, 0.7], ddof=1)
    cell = f"0.800 ± {sd:.3f}"
    assert table[3] == f"| LA-DAPO, cost 0 | 1.50 | {' | '.join([f'{cell} (1.50)'] * 3)} | {cell} |"
    assert table[4].startswith("| blind | 0.00 | 0.500 (0.00) |") and len(table) == 5

    for lines in seeds:
        lines += [line("uniform looks, 0", 0, 0.8), line("scripted loops, greedy", 1.2, 0.9)]
    toy_mcr.draw(seeds, str(tmp_path / "looks.png"))
    assert (tmp_path / "looks.png").stat().st_size > 5000


@pytest.mark.slow  # whole trainings
def test_the_whole_in_small(tmp_path, capsys):
    """Breaks if a row does not train, a seed's models are another's, or a second run trains."""
    world = demo.Config(
        out=str(tmp_path / "toy"), clips=70, annotated=8, eval_clips=2, pretrain_steps=2
    )
    demo.claim_folder(world)
    paths = make_world(world)
    demo.run_seed(0, world, paths, {"base": demo.trainings(world)["base"]})
    out = tmp_path / "mcr"
    few = dict(annotated=4, sft_steps=2, rl_steps=1, costs="0.05", eval_clips=2)
    config = toy_mcr.Config(world=world.out, out=str(out), seeds="0,1", **few)
    capsys.readouterr()
    toy_mcr.main(config)
    table = (out / "table.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    assert (
        "| LA-DAPO, cost 0.05 |" in table
        and "| uniform looks, 3 | 3.00 |" in table
        and "±" in table
    )
    logs = [(out / seed / "loops" / "log.jsonl").read_text() for seed in ("seed_0", "seed_1")]
    assert json.loads(logs[0].splitlines()[0])["ce"] != json.loads(logs[1].splitlines()[0])["ce"]
    assert os.path.getsize(out / "looks.png") > 5000

    toy_mcr.main(config)
    assert (out / "table.md").read_text() == table
    assert (out / "seed_1" / "loops" / "log.jsonl").read_text() == logs[1]
