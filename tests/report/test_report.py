"""Tables and plots: what they say, that they are whole, and that bad rows are named."""

import struct
import sys

import numpy as np
import pytest

from lorafusion_jax.report import (
    markdown_table,
    plot_accuracy,
    plot_coefficients,
    plot_learning_curves,
    write_text,
)


def _row(task, method, seed, exact_match, trainable=20, seconds=1.0):
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "exact_match": exact_match,
        "trainable": trainable,
        "seconds": seconds,
    }


_ROWS = [
    _row("easy", "zero-shot", 1, 10.0, trainable=0, seconds=0.0),
    _row("hard", "zero-shot", 1, 2.0, trainable=0, seconds=0.0),
    _row("easy", "fusion", 1, 50.0, trainable=1232, seconds=2.0),
    _row("easy", "fusion", 2, 60.0, trainable=1232, seconds=4.0),
    _row("hard", "fusion", 1, 20.0, trainable=1232),
    _row("hard", "fusion", 2, 30.0, trainable=1232),
    _row("impossible", "fusion", 1, 0.0, trainable=1232),
    _row("impossible", "fusion", 2, 0.0, trainable=1232),
]
_METRICS = {
    "easy": {
        "zero-shot": [],
        "fusion": [{"step": t, "seed": s, "cross_entropy": 2 / t + s} for t in range(1, 6) for s in (1, 2)]
        # What an epoch adds, and a seed that stopped early.
        + [{"step": 5, "seed": 1, "validation_loss": 1.0}, {"step": 6, "seed": 1, "cross_entropy": 1.0}],
    },
    "hard": {"fusion": [{"step": t, "seed": 1, "cross_entropy": 3 / t} for t in range(1, 6)]},
}


def _size(png):
    """Return width and height of a PNG file, from its header."""
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


def test_table():
    lines = markdown_table(_ROWS, apart=("impossible",)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["exact match, %", "zero-shot", "fusion"]
    assert set(cells[1][0]) == {"-"} and all(set(rule) == {"-", ":"} and rule[-1] == ":" for rule in cells[1][1:])
    assert cells[2:] == [
        ["easy", "10.0", f"55.0 ± {np.std([50, 60], ddof=1):.1f}"],
        ["hard", "2.0", f"25.0 ± {np.std([20, 30], ddof=1):.1f}"],
        # The spread of the seeds' means, 35 and 45, not the mean of the spreads.
        ["**mean**", "6.0", f"40.0 ± {np.std([35, 45], ddof=1):.1f}"],
        ["impossible", "–", "0.0 ± 0.0"],
        ["trainable numbers", "0", "1,232"],
        ["seconds of training", "0.0", "1.7"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_a_method_that_lacks_a_task_has_no_mean():
    rows = [*_ROWS, _row("easy", "LoRA", 1, 90.0)]
    mean = next(line for line in markdown_table(rows, apart=("impossible",)).splitlines() if "mean" in line)
    assert mean.strip("| ").split("|")[-1].strip() == "–"


def test_counts_that_differ_by_task_are_shown_as_a_range():
    rows = [_row("easy", "fusion", 1, 1.0, trainable=900), _row("hard", "fusion", 1, 1.0, trainable=1000)]
    assert "| 900 to 1,000 |" in markdown_table(rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "no results to report"), ([{"task": "easy", "method": "LoRA"}], "a row lacks seed, exact_match, train")],
)
def test_rows_that_cannot_be_reported(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        markdown_table(rows)
    with pytest.raises(ValueError, match=message):
        plot_accuracy(rows, tmp_path / "accuracy.png")
    assert not list(tmp_path.iterdir())


def test_plots_are_whole_png_files(tmp_path):
    plot_accuracy(_ROWS, tmp_path / "accuracy.png", apart=("impossible",), title="accuracy")
    plot_learning_curves(_METRICS, tmp_path / "curves.png", title="loss")
    coefficients = np.random.default_rng(0).normal(size=(3, 4))
    names = ["first", "second", "third"], ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    plot_coefficients(coefficients, *names, tmp_path / "coefficients.png")
    plot_coefficients(np.zeros((1, 48)), ["one"], [f"block {i}" for i in range(48)], tmp_path / "zeros.png")
    for path in tmp_path.iterdir():
        width, height = _size(path)
        assert width > 500 and height > 200
    assert len(list(tmp_path.iterdir())) == 4


def test_bars_dots_and_legend_show_the_rows(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *a, **k: figures.append(figure))
    monkeypatch.setattr("lorafusion_jax.report.figure.write", lambda path, writer: writer(path))
    plot_accuracy(_ROWS, tmp_path / "accuracy.png", apart=("impossible",))
    (axes,) = figures[0].axes
    bars = [bar.get_height() for container in axes.containers if hasattr(container, "patches") for bar in container]
    assert bars == pytest.approx([10, 2, 6, 55, 25, 40, 0])
    dots = np.concatenate([points.get_offsets()[:, 1] for points in axes.collections if len(points.get_offsets())])
    assert sorted(dots[dots > 0]) == pytest.approx([20, 30, 35, 45, 50, 60])
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["zero-shot", "fusion"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["easy", "hard", "mean", "impossible"]


def test_curves_are_the_seeds_and_their_mean_over_the_steps_of_all(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *a, **k: figures.append(figure))
    monkeypatch.setattr("lorafusion_jax.report.figure.write", lambda path, writer: writer(path))
    plot_learning_curves(_METRICS, tmp_path / "curves.png")
    first = [line.get_xydata() for line in figures[0].axes[0].lines if len(line.get_xydata())]
    assert [len(line) for line in first] == [6, 5, 5]
    np.testing.assert_allclose(first[2], [(t, 2 / t + 1.5) for t in range(1, 6)])
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["fusion"]


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no learning curves: wanted lines with step, seed and cross_entropy"):
        plot_learning_curves({"easy": {"zero-shot": []}}, tmp_path / "curves.png")


def test_names_that_do_not_fit_coefficients(tmp_path):
    with pytest.raises(ValueError, match=r"coefficients are \[2, 4\], names are for \[3, 4\]"):
        plot_coefficients(np.zeros((2, 4)), list("abc"), list("wxyz"), tmp_path / "heat.png")


def test_missing_matplotlib_is_named_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"plots need matplotlib, .* pip install -e '\.\[plots\]'"):
        plot_accuracy(_ROWS, tmp_path / "accuracy.png")


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "table.md"
    write_text(path, "old")

    def torn(partial, text, encoding):
        partial.write_bytes(text[:1].encode())
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.write_text", torn)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.md"]


def test_the_legend_names_a_method_that_lacks_the_first_task(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *a, **k: figures.append(figure))
    monkeypatch.setattr("lorafusion_jax.report.figure.write", lambda path, writer: writer(path))
    plot_accuracy([*_ROWS, _row("hard", "late", 1, 5.0)], tmp_path / "accuracy.png", apart=("impossible",))
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert names == ["zero-shot", "fusion", "late"]
