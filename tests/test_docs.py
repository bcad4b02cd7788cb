"""What README and docs/ say about the code must be so: the map, the links, the line counts."""

import ast
import glob
import importlib
import json
import os
import re

import pytest

from common import formats
from tests.conftest import ROOT


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


def test_the_idea_in_readme_is_the_code():
    """Breaks if README shows a decoding loop that is not, line for line, decode_slowly's."""
    (shown,) = re.findall(r"```python\n(.*?)```", README, re.S)
    code = " ".join(text_of("latent_decode.py").split())
    assert len(shown.splitlines()) > 8 and " ".join(shown.split()) in code


def test_readme_repeats_rows_of_the_map():
    """Breaks if a row of README's short map is not, word for word, one of docs/map.md."""
    rows = map_rows(README)
    assert 10 <= len(rows) <= 16
    assert [row for row in rows if row not in [line[:3] for line in MAP]] == []


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


# files whose docstrings list differences that are marked at their lines
SCRIPTS = [
    path for part in ("", "common/", "variants/") for path in glob.glob(f"{ROOT}/{part}*.py")
]
MARKED = [file for file in sorted(SCRIPTS) if "# deviation 1" in text_of(file)]
assert len(MARKED) > 16


@pytest.mark.parametrize("file", MARKED)
def test_each_deviation_is_marked_where_it_happens(file):
    """Breaks if a numbered difference of a docstring has no line, or a line no such number."""
    source = text_of(file)
    listed = re.findall(r"^ ?(\d+)\. ", ast.get_docstring(ast.parse(source), clean=False), re.M)
    assert listed == [str(n + 1) for n in range(len(listed))] and listed
    assert set(listed) == set(re.findall(r"# deviation (\d+)\b", source))


def records_of_data_md():
    """The JSON blocks of docs/data.md, and the "shows the options" cells of its second table."""
    page = text_of("docs/data.md")
    records = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", page, re.S)]
    table = page.partition("| shows the options |\n")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[1:]]
    return records, rows


def test_the_records_of_data_md_are_read():
    """Breaks if a record of docs/data.md cannot be used, has a key that nothing reads, or is of
    another format than the one it stands for; or the tables say otherwise about it.
    """
    records, table = records_of_data_md()
    assert len(records) == len(table) == len(formats.FORMATS) + 2
    by_format = {}
    for i, record in enumerate(records):
        row = formats.read_record(record, f"data.md:{i}", "/m")
        key = next(key for key in formats.FORMATS if key in record)
        by_format.setdefault(key, []).append((record, row))
        assert set(record) <= formats.format_of(record)[1] | {key}
    rows = [row for pairs in by_format.values() for _, row in pairs]
    assert list(by_format) == ["conversations", "question_images_index", "problem", "options", "qa"]
    for row, (_, future, sees, shown) in zip(rows, table):
        frames = [part for part in row.response if isinstance(part, formats.Frame)]
        clips = [part for part in row.prompt if isinstance(part, formats.Clip)]
        assert bool(frames) == (future == "yes") and bool(clips) == ("video" in sees)
        options = row.options or ["red", "blue"]
        assert formats.shows(row.question, options) == (shown == "yes")


def test_line_counts():
    """Breaks if a script has outgrown what README says by more than a tenth."""
    counts = re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README)
    assert len(counts) >= 8
    for file, lines in counts:
        assert abs(len(text_of(file).splitlines()) - int(lines)) <= 0.1 * int(lines), file
