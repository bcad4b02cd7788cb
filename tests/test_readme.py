"""README's map from the paper to the code must point at things that exist."""

import importlib
import os
import re

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
    README = f.read()
SECTION = README.split("## From the paper to the code")[1].split("\n## ")[0]
MAP = [
    [cell.strip(" `") for cell in line.split(" | ")]
    for line in SECTION.splitlines()
    if ".py:" in line
]


def test_the_map_covers_the_equations():
    """Breaks if a numbered equation has no row."""
    equations = " ".join(row[1] for row in MAP)
    assert all(f"({n})" in equations for n in range(1, 8)) and len(MAP) >= 30


@pytest.mark.parametrize("row", MAP, ids=lambda row: row[2])
def test_each_row_names_a_function_and_a_test(row):
    """Breaks if a function or a test of the map was renamed."""
    file, _, name = row[2].partition(":")
    thing = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        thing = getattr(thing, part)
    assert thing.__doc__
    test_file, _, test_name = row[3].strip(" |`").partition("::")
    with open(os.path.join(ROOT, test_file), encoding="utf-8") as f:
        assert re.search(rf"^def {re.escape(test_name)}\(", f.read(), re.M)


def test_line_counts_and_no_placeholder():
    """Breaks if a script has outgrown what README says by more than a tenth, or a blank was left
    in the text.
    """
    for file, lines in re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README):
        with open(os.path.join(ROOT, file), encoding="utf-8") as f:
            assert abs(len(f.readlines()) - int(lines)) <= 0.1 * int(lines), file
    assert not re.search(r"\b(LINES|RESULTS|BENCH|DEMO_EXPECT)\b", README)
    for link in re.findall(r"\]\((docs/[^)]+)\)", README):
        assert os.path.exists(os.path.join(ROOT, link)), link
