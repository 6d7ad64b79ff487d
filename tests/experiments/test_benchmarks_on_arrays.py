"""The table of benchmarks on arrays: its numbers by hand, and its page against the rows next to it."""

from pathlib import Path

import benchmarks_on_arrays as experiment
import pytest
from page_tables import assert_written

from lorafusion_jax.trials import read_lines

_RESULTS = Path(__file__).resolve().parents[2] / "results"


def test_values_and_differences_of_items():
    samples = [
        {"doc_id": 1, "acc": 0.0, "word_perplexity": (-6.0, 3)},
        {"doc_id": 0, "acc": 1.0, "perplexity": -2.5},
    ]
    assert experiment.values(samples, "acc") == [1.0, 0.0]
    assert experiment.values(samples[:1], "word_perplexity") == [2.0]
    assert experiment.values(samples[1:], "perplexity") == [2.5]
    names = [" ".join(key) for key in experiment.METRICS]
    digital = {
        "bits": "digital",
        "items": dict.fromkeys(names, [1.0, 0.0, 1.0, 1.0]),
        "mj_per_token": None,
    }
    coarse = {
        "bits": 4,
        "items": dict.fromkeys(names, [0.0, 0.0, 1.0, 1.0]),
        "mj_per_token": [1.0, 2.0, 3.0],
    }
    found = experiment.tables([digital, coarse])
    # The standard error of a mean of four is a half of 50 points, and 3.182 of them make the interval.
    assert found["scores"][1] == [
        "4 bits",
        "1 / 2 / 3",
        *["50.0 ± 91.9"] * 2,
        *["0.50 ± 0.92"] * 2,
    ]
    assert found["paired"][1] == [
        "4 bits",
        *["-25.0 ± 79.6"] * 2,
        *["-0.25 ± 0.80"] * 2,
    ]


@pytest.mark.parametrize(
    "rows",
    sorted((_RESULTS / "benchmarks_on_arrays").rglob("rows.jsonl")),
    ids=lambda path: path.parent.name,
)
def test_the_page_has_the_tables_of_its_rows(rows):
    page = (
        _RESULTS.parent / "docs" / "results" / "benchmarks_on_arrays.md"
    ).read_text()
    tables = experiment.tables(read_lines(rows))
    assert_written(tables, rows.parent)
    for name, lines in tables.items():
        if rows.parent.name != "gemma":
            assert [
                line for line in lines if f"| {' | '.join(line)} |" not in page
            ] == []
        elif name == "paired":  # a sentence has the last column
            assert [line for line in lines[1:] if line[-1] not in page] == []
