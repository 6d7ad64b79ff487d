"""Plots: what they show, that files are whole, and that bad names are refused."""

import struct
import sys

import numpy as np
import pytest
from made_up_rows import made_up, row

from lorafusion_jax import report
from lorafusion_jax.report import plot_learning_curves, plot_means, scores

_METRICS = {
    "easy": {
        "zero-shot": [],
        "fusion": [{"step": t, "seed": s, "cross_entropy": 2 / t + s} for t in range(1, 6) for s in (1, 2)]
        # What an epoch adds, and a seed that stopped early.
        + [{"step": 5, "seed": 1, "validation_loss": 1.0}, {"step": 6, "seed": 1, "cross_entropy": 1.0}],
    },
    "hard": {"fusion": [{"step": t, "seed": 1, "cross_entropy": 3 / t} for t in range(1, 6)]},
}


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, which are not written."""
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *a, **k: drawn.append(figure))
    monkeypatch.setattr("lorafusion_jax.report.figure.write", lambda path, writer: writer(path))
    return drawn


def test_plots_are_whole_png_files(tmp_path):
    plot_learning_curves(_METRICS, tmp_path / "curves.png", title="loss")
    coefficients = np.random.default_rng(0).normal(size=(3, 4))
    names = ["first", "second", "third"], ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    report.plot_coefficients(coefficients, *names, tmp_path / "coefficients.png")
    report.plot_coefficients(np.zeros((1, 48)), ["one"], [f"block {i}" for i in range(48)], tmp_path / "zeros.png")
    # Methods that all score zero.
    rows = [row("easy", method, 1, np.zeros(8, bool), trainable=n) for method, n in (("a", 0), ("b", 0), ("c", 7))]
    plot_means(scores(rows)[0], tmp_path / "means.png")
    files = list(tmp_path.iterdir())
    assert len(files) == 4
    for data in (path.read_bytes() for path in files):
        assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
        width, height = struct.unpack(">II", data[16:24])
        assert width > 500 and height > 150


def test_curves_and_dots_are_the_numbers_of_the_rows(tmp_path, figures):
    plot_learning_curves(_METRICS, tmp_path / "curves.png")
    (league,) = scores(made_up(methods=("LoRA", "zero-shot", "fusion sum")))
    plot_means(league, tmp_path / "means.png")
    curves, means = (figure.axes[0] for figure in figures)
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["fusion"]
    # Curves are the seeds and their mean over the steps of all.
    lines = [line.get_xydata() for line in curves.lines if len(line.get_xydata())]
    assert [len(line) for line in lines] == [6, 5, 5]
    np.testing.assert_allclose(lines[2], [(t, 2 / t + 1.5) for t in range(1, 6)])
    # Means are dots with intervals, in the order given, the first on top.
    assert [label.get_text() for label in means.get_yticklabels()] == ["LoRA", "zero-shot", "fusion sum"]
    summaries = league.summaries.values()
    dots = [line.get_xydata()[0] for line in means.lines]
    np.testing.assert_allclose(dots, [(s.mean, i) for i, s in enumerate(summaries)])
    ends = [line.get_segments()[0][:, 0] for line in means.collections]
    np.testing.assert_allclose(ends, [(s.low, s.high) for s in summaries])
    assert means.get_ylim()[0] > means.get_ylim()[1]


def test_plots_without_data_names_or_matplotlib_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "plot.png"
    names = list("abc"), list("wxyz")
    for make, message in (
        (lambda: plot_learning_curves({"easy": {"zero-shot": []}}, path), "no learning curves: give lines with step"),
        (lambda: report.plot_coefficients(np.zeros((2, 4)), *names, path), r"column of \[2, 4\], got \[3, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"plots need matplotlib, .* pip install -e '\.\[plots\]'"):
        plot_learning_curves(_METRICS, path)
    assert not list(tmp_path.iterdir())
