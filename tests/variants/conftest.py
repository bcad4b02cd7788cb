import pytest
from test_la_dapo import loud  # noqa: F401  a fixture
from test_sft import settings

from common.formats import read_rows
from data import Samples, collate
from model import load


@pytest.fixture
def batch(world):
    """A model and four encoded rows of one or three futures: (model, batch)."""
    model, tokenizer = load(world["model"])
    rows = [row for row in read_rows(world["data"]) if row.group in ("3-hop", "1-hop")][:4]
    samples = Samples(rows, tokenizer, settings(world, "unused"))
    return model, collate([samples[i] for i in range(4)], 0)
