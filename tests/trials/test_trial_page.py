"""Figures of docs/results/trial.md, from the rows of results/trial."""

from pathlib import Path

import numpy as np
import page_tables
import pytest
from scipy import stats

from lorafusion_jax.report import over_tasks
from lorafusion_jax.trials import read_lines

_ROOT = Path(__file__).resolve().parents[2]
_PAGE = _ROOT / "docs" / "results" / "trial.md"
_SIMULATED = read_lines(_ROOT / "results" / "trial" / "coverage.jsonl")
_REAL = read_lines(_ROOT / "results" / "trial" / "truth.jsonl")
_LANGUAGE = ("ing", "choose_middle_of_5", "word_length")
_MARGIN = 0.05


def _above(truth, arm):
    """Nats of an arm above the best one."""
    return truth[arm] - min(truth.values())


def _least(row, reference):
    """The arm of least cross-validated loss; contrasts are with the reference."""
    means = {arm: mean for arm, (mean, _, _) in row["contrasts"].items()}
    means[reference] = 0.0
    return min(means, key=means.__getitem__)


def _covered(row, truth, reference, width=1.0):
    """For each contrast, whether its interval contains the true difference."""
    difference = {arm: truth[arm] - truth[reference] for arm in row["contrasts"]}
    return [
        abs(difference[arm] - mean) <= width * (high - low) / 2
        for arm, (mean, low, high) in row["contrasts"].items()
    ]


def _share(hits):
    """A percentage with its exact binomial interval (Clopper and Pearson, 1934)."""
    right = sum(hits)
    others = len(hits) - right
    low = stats.beta.ppf(0.025, right, others + 1) if right else 0.0
    high = stats.beta.ppf(0.975, right + 1, others) if others else 1.0
    return f"{100 * np.mean(hits):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _of(decision, rows):
    return [row for row in rows if row["decision"] == decision]


def _wrong(rows, choose=lambda row: row["arm"]):
    return [_above(row["truth"], choose(row)) > _MARGIN for row in rows]


def _simulated_column(size):
    """Shares of the first table for a number of rows."""
    rows = [row for row in _SIMULATED if row["rows"] == size]
    doubled = {row["task"]: row for row in _SIMULATED if row["rows"] == 2 * size}
    named = _of("named", rows)
    more = _of("more", rows)
    covered = np.transpose([_covered(row, row["truth"], "pool") for row in rows])
    wrong_names = [row["decision"] == "named" and _wrong([row])[0] for row in rows]
    return [
        _share(min(covered, key=sum)),
        *(
            f"{100 * len(_of(kind, rows)) / len(rows):.1f}"
            for kind in ("named", "close", "more")
        ),
        _share(wrong_names),
        _share(_wrong(named)),
        f"{100 * np.mean(_wrong(_of('close', rows))):.1f}",
        _share([doubled[row["task"]]["decision"] != "more" for row in more]),
    ]


def _choice_column(size):
    """Regret and errors of the sentence and of the least loss for a number of rows."""
    rows = [row for row in _SIMULATED if row["rows"] == size and row["arm"]]
    named = _of("named", rows)
    by_loss = [_above(row["truth"], _least(row, "pool")) for row in rows]
    by_sentence = [_above(row["truth"], row["arm"]) for row in rows]
    by_loss_of_named = _wrong(named, lambda row: _least(row, "pool"))
    return [
        str(len(rows)),
        f"{np.mean(by_sentence):.4f}",
        f"{np.mean(by_loss):.4f}",
        f"{sum(_wrong(named))} of {len(named)}",
        f"{sum(by_loss_of_named)} of {len(named)}",
    ]


def _real_column(language, size):
    """Counts of the real trials on one kind of task with a number of rows."""
    rows = [
        row
        for row in _REAL
        if row["rows"] == size and (row["task"] in _LANGUAGE) == language
    ]

    def nats(kind):
        above = sorted(_above(row["true_loss"], row["arm"]) for row in _of(kind, rows))
        return ", ".join(f"{nat:.3f}" if nat > 0.0005 else "0" for nat in above)

    def held(width):
        covered = [_covered(row, row["true_loss"], "LoRAFusion", width) for row in rows]
        return f"{np.sum(covered)} of {np.size(covered)}"

    return [
        str(len(rows)),
        str(len(_of("named", rows))),
        nats("named"),
        str(len(_of("close", rows))),
        nats("close"),
        held(1.0),
        held(1.5),
    ]


def _columns(*head):
    """Columns of the page's table with this header, without the first."""
    return np.transpose(page_tables.rows_below(_PAGE, head))[1:].tolist()


def test_tables_are_those_of_the_rows():
    sizes = [f"{size} rows" for size in (20, 40, 80)]
    kinds = [(language, size) for language in (False, True) for size in (20, 40)]
    assert _columns("share, %", *sizes) == [*map(_simulated_column, (20, 40, 80))]
    assert _columns("choice", *sizes) == [*map(_choice_column, (20, 40, 80))]
    heads = [
        f"{'language' if language else 'strings'}, {size} rows"
        for language, size in kinds
    ]
    assert _columns("real trials", *heads) == [_real_column(*kind) for kind in kinds]


@pytest.mark.parametrize(
    ("size", "width", "percent"),
    [(20, 1, 96.6), (40, 1, 96.1), (80, 1, 97.4), (40, 1.5, 98.9)],
)
def test_coverage_of_all_simulated_contrasts(size, width, percent):
    rows = [row for row in _SIMULATED if row["rows"] == size]
    covered = [_covered(row, row["truth"], "pool", width) for row in rows]
    assert round(100 * np.mean(covered), 1) == percent
    assert f"{percent}" in _PAGE.read_text()


def test_misses_and_choices_of_real_trials():
    misses = {}
    for row in (row for row in _REAL if row["rows"] == 40):
        truth = row["true_loss"]
        for width in (1, 1.06):
            hits = _covered(row, truth, "LoRAFusion", width)
            misses[row["task"], width] = hits.count(False)
    by_task = sorted(count for (_, width), count in misses.items() if width == 1)
    assert sum(by_task) == 11 and sum(by_task[-2:]) == 7
    far = sum(count for (_, width), count in misses.items() if width > 1)
    assert sum(by_task) - far == 5
    given = [row for row in _REAL if row["arm"]]
    assert all(row["arm"] == _least(row, "LoRAFusion") for row in given)


def test_lora_against_the_page_on_the_value_of_a_pool():
    of_page = {
        row["task"]: row["test_loss"]
        for row in read_lines(_ROOT / "results" / "pool_value" / "language.jsonl")
        if (row["arm"], row["rows"], row["seed"]) == ("LoRA, rank 8", 20, 1)
    }
    rows = read_lines(_ROOT / "results" / "trial" / "lora.jsonl")
    found = over_tasks([row["test_loss"] - of_page[row["task"]] for row in rows])
    assert len(rows) == 12
    np.testing.assert_allclose(found, (-0.004, -0.207, 0.198), atol=5e-4)
