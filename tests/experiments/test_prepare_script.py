"""Preparing SmolLM2: its tables by hand, and its page against the committed rows."""

from pathlib import Path

import prepare as experiment
import prepare_small as small
import pytest
from lab.genres import GENRES
from page_tables import rows_below

from lorafusion_jax.trials import append_lines, read_lines

_ROOT = Path(__file__).resolve().parents[2]
_PAGE = _ROOT / "docs" / "results" / "prepare.md"
_RESULTS = _ROOT / "results" / "prepare"


def _row(chip, losses):
    job = experiment.Job("main", experiment.Setting(), chip, experiment.NONE)
    of_job = {
        "part": "main",
        "setting": job.setting._asdict(),
        "chip": chip,
        "arm": job.arm._asdict(),
    }
    digital = {genre: [3.0, 3.0] for genre in GENRES}
    return {
        "base": experiment.SMOLLM2,
        **of_job,
        "losses": losses,
        "digital_losses": digital,
        "cpu_seconds": 60.0,
    }


def test_means_are_over_chips_and_genres_without_the_fitted_one():
    by_genre = dict.fromkeys(GENRES, [3.1, 3.3]) | {
        "fiction": [3.5, 3.7],
        "news": [9.0, 9.0],
    }
    worse = {
        genre: [loss + 0.2 for loss in losses] for genre, losses in by_genre.items()
    }
    (_, line) = experiment.tables([_row(0, by_genre), _row(1, worse)])["main"]
    # The genres of the first chip lose 0.6, 0.2, 0.2 and 0.2, those of the second 0.2 more.
    assert (line[2], line[3], line[6:]) == (
        "2",
        "0.400",
        ["0.500", "0.700", "0.300", "0.300", "0.300", "6.100"],
    )


def test_the_interval_draws_chips_and_windows_again():
    """Losses of one chip do not differ by window, so a draw of two chips has one of three means."""
    rows = [
        _row(chip, dict.fromkeys(GENRES, [loss, loss]))
        for chip, loss in enumerate((3.1, 3.5))
    ]
    assert experiment.over_chips_and_windows(rows) == pytest.approx((0.1, 0.5))


def test_the_page_has_the_table_of_its_rows():
    tables = experiment.tables(read_lines(_RESULTS / "rows.jsonl"))
    head = ["change", "excess loss", "interval", "worst chip"]
    shown = [[cell.strip("*") for cell in row] for row in rows_below(_PAGE, head)]
    names = {"today": "not prepared"}
    assert shown == [
        [names.get(line[1], line[1]), line[3], *line[5:7]]
        for line in tables["main"][1:]
    ]


def test_measured_rows_are_not_planned_again(tmp_path, capsys):
    plan = ["--parts", "main", "--chips", "0", "--out", str(tmp_path), "--plan"]
    experiment.main(plan)
    assert "7 cells, 7 CPU minutes" in capsys.readouterr().out
    append_lines(tmp_path / "rows.jsonl", [_row(0, dict.fromkeys(GENRES, [3.0, 3.0]))])
    experiment.main(plan)
    assert "6 cells, 6 CPU minutes" in capsys.readouterr().out


def test_the_page_has_what_small_models_get_back():
    tables = small.tables(read_lines(_RESULTS / "small.jsonl"))
    pairs = [tables["digits"][1:3]]
    for part, score in (("fusions", "loss"), ("language", "exact_match")):
        lines = [line for line in tables[part] if line[1] == score]
        pairs.insert(0, lines[:2])
    head = ["score", "digital", "not prepared", "prepared", "of the lost, back, %"]
    shown = rows_below(_PAGE, head)
    assert [[cell.strip("*") for cell in row[1:]] for row in shown] == [
        [before[3], before[4], after[4], after[7]] for before, after in pairs
    ]


def test_the_page_has_prepared_models_on_verified_chips():
    rows = read_lines(_RESULTS / "more" / "rows.jsonl")
    finer, coarser = experiment.tables(rows)["verified"][1:]
    assert f"{coarser[3]}; {finer[3]}" in _PAGE.read_text()
