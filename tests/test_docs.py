"""What README and docs/ say about the code must be so: the map, the links, the line counts."""

import glob
import importlib
import os
import re

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def text_of(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


def map_rows(text):
    """Rows of the tables whose third cell names a thing in a file: [[section, equation, ...]]."""
    rows = [
        [cell.strip(" `") for cell in line.strip("| ").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    return [row for row in rows if len(row) > 2 and ".py:" in row[2]]


README = text_of("README.md")
MAP = map_rows(text_of("docs/map.md"))
PAGES = ["README.md", "LOG.md"] + sorted(
    os.path.relpath(path, ROOT) for path in glob.glob(os.path.join(ROOT, "docs", "*.md"))
)
ANCHOR = re.compile(r"\]\(([^)\s]+)\)")


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
    test_file, _, test_name = row[3].partition("::")
    assert re.search(rf"^def {re.escape(test_name)}\(", text_of(test_file), re.M)


def test_readme_repeats_rows_of_the_map():
    """Breaks if a row of README's short map is not, word for word, one of docs/map.md."""
    rows = map_rows(README)
    assert 10 <= len(rows) <= 16
    assert [row for row in rows if row not in [line[:3] for line in MAP]] == []


def test_readme_fits_on_a_few_screens():
    """Breaks if README has grown beyond 10 KB: what is longer belongs into docs/."""
    assert len(README.encode()) <= 10_000


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_exist(page):
    """Breaks if a page links to a file of the repository that is not there."""
    links = [link.partition("#")[0] for link in ANCHOR.findall(text_of(page))]
    folder = os.path.dirname(os.path.join(ROOT, page))
    relative = [link for link in links if link and "://" not in link]
    assert [link for link in relative if not os.path.exists(os.path.join(folder, link))] == []


def test_every_page_can_be_reached():
    """Breaks if no page links to a file of docs/, or the patterns above find no link at all."""
    reached = set()
    for page in PAGES:
        for link in ANCHOR.findall(text_of(page)):
            reached.add(os.path.normpath(os.path.join(os.path.dirname(page), link)))
    docs = [os.path.relpath(path, ROOT) for path in glob.glob(os.path.join(ROOT, "docs", "*.*"))]
    assert [path for path in docs if path not in reached] == []


def test_line_counts_and_no_placeholder():
    """Breaks if a script has outgrown what README says by more than a tenth, or a blank was left
    in the text.
    """
    counts = re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README)
    assert len(counts) >= 8
    for file, lines in counts:
        assert abs(len(text_of(file).splitlines()) - int(lines)) <= 0.1 * int(lines), file
    for page in PAGES:
        assert not re.search(r"\b(LINES|RESULTS|BENCH|DEMO_EXPECT)\b", text_of(page)), page
