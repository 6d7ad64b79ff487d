"""Restoring SmolLM2 on arrays: its tables by hand, and its page against the rows next to it."""

from pathlib import Path

import restore as experiment
from page_tables import rows_below

from lorafusion_jax.trials import append_lines, read_lines

_ROOT = Path(__file__).resolve().parents[2]
_PAGE = _ROOT / "docs" / "results" / "restore.md"


def _row(chip, arm, loss):
    return {
        "part": "main",
        "base": experiment.SMOLLM2,
        "setting": experiment.Setting()._asdict(),
        "chip": chip,
        "arm": arm._asdict(),
        "text": "real",
        "calibration_tokens": 3072,
        "numbers": 10,
        "share": 0.01,
        "loss": loss,
        "digital": 3.0,
        "window_losses": [loss - 0.1, loss + 0.1],
        "digital_window_losses": [3.0, 3.0],
    }


def test_means_and_intervals_over_chips():
    arm = experiment.Arm("scales", None, 5)
    rows = [_row(chip, arm, loss) for chip, loss in enumerate((3.1, 3.2, 3.3), start=1)]
    # The standard error of a mean of three is 0.1 / sqrt(3), and 4.303 of them make half of the interval.
    # Two windows of 0.1 and 0.3, each a mean over chips: a standard error of 0.1, and 12.706 of them.
    line = [
        "scales, distilled",
        "10",
        "1.00",
        "3",
        "0.200",
        "-0.048 to 0.448",
        "-1.071 to 1.471",
    ]
    assert experiment.tables(rows)["main"][1] == line


def test_a_contrast_is_paired_by_chip_and_needs_three_chips():
    scales = experiment.SCALES
    low_rank, other = experiment.PLANNED[4:]
    rows = [_row(chip, scales, 3.0 + 0.5 * chip) for chip in (1, 2, 3, 4)]
    rows += [
        _row(chip, low_rank, 2.8 + 0.5 * chip + 0.1 * (chip == 3)) for chip in (1, 2, 3)
    ]
    rows += [_row(chip, other, 3.0) for chip in (1, 2)]
    # Differences of -0.2, -0.2 and -0.1: mean -1/6, standard error 1/30, t of -5 with two degrees of freedom.
    line = [
        "low rank 1 %, distilled",
        "3",
        "-0.167",
        "-0.310 to -0.023",
        "0.038",
        "0.23",
    ]
    assert experiment.tables(rows)["contrasts"][1:] == [line]


def test_ages_and_sources_of_corrections_are_told_apart():
    old = experiment.Setting(0.0, drift=10 * 365 * 86_400.0, compensate=True)._asdict()
    rows = [
        _row(1, experiment.Arm("scales"), loss) | {"part": "chips", "setting": old}
        for loss in (3.1, 3.4)
    ]
    rows[0]["source"] = "in advance"
    table = experiment.tables(rows)["chips"]
    assert [line[:3] + line[4:5] for line in table[1:]] == [
        ["ten years, compensated", "scales, closed form", "in advance", "0.100"],
        ["ten years, compensated", "scales, closed form", "itself", "0.400"],
    ]


def test_matches_of_fusions_are_means_over_chips():
    of_task = {
        "part": "transfer",
        "task": "sentiment",
        "digital_exact_match": 80.0,
        "digital_task_loss": 0.2,
        "task_loss": 0.3,
        "text": "continued",
    }
    arm = experiment.BEST[0]
    rows = [
        _row(chip, arm, 3.1) | of_task | {"exact_match": 70.0 + chip}
        for chip in (1, 2, 3)
    ]
    assert experiment.tables(rows)["transfer"][1] == [
        "sentiment", "low rank 1 %, distilled", "3", "0.200", "0.300", "80.0", "72.0", "69.5 to 74.5"
    ]  # fmt: skip
    others = [
        row | {"task": "antonym", "exact_match": 50.0, "digital_exact_match": 60.0}
        for row in rows[:2]
    ]
    assert experiment.tables(rows + others)["transfer"][-1] == [
        "mean of 2 tasks", "low rank 1 %, distilled", "2", "0.200", "0.300", "70.0", "60.8", "57.6 to 63.9"
    ]  # fmt: skip
    # Corrections of another text are a line of their own.
    prompted = [row | {"text": "prompts", "exact_match": 78.0} for row in rows]
    assert experiment.tables(rows + prompted)["transfer"][2] == [
        "sentiment", "low rank 1 %, distilled, prompts in the text", "3", "0.200", "0.300", "80.0", "78.0",
        "78.0 to 78.0",
    ]  # fmt: skip


def test_the_page_has_the_tables_of_its_rows():
    tables = experiment.tables(read_lines(_ROOT / "results" / "restore" / "rows.jsonl"))
    head = [
        "corrections",
        "parameters",
        "% of the weights",
        "excess loss",
        "over chips",
        "over windows",
    ]
    main = [[*line[1:3], *line[4:]] for line in tables["main"]]
    shown = rows_below(_PAGE, head)
    assert shown and [row for row in shown if row[1:] not in main] == []


def test_measured_rows_are_not_asked_for_again(tmp_path, capsys):
    plan = ["--again", "main", "--chips", "1", "--out", str(tmp_path), "--plan"]
    experiment.main(plan)
    assert "13 cells, " in capsys.readouterr().out
    append_lines(tmp_path / "rows.jsonl", [_row(1, experiment.SCALES, 3.5)])
    experiment.main(plan)
    assert "12 cells, " in capsys.readouterr().out
