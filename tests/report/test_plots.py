"""Plots: what they show, that files are whole, and what they need."""

import struct
import sys

import numpy as np
from lab.scores import scores
from made_up_rows import made_up, row
from numpy.testing import assert_allclose
from refusals import refused

from lorafusion_jax.report import plot_means


def test_a_plot_is_a_whole_png_file(tmp_path):
    # Methods that all score zero.
    rows = [
        row("easy", method, 1, np.zeros(8, bool), trainable=n)
        for method, n in (("a", 0), ("b", 0), ("c", 7))
    ]
    plot_means(scores(rows)[0].summaries, tmp_path / "means.png")
    (data,) = (path.read_bytes() for path in tmp_path.iterdir())
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 500 and height > 150


def test_dots_and_intervals_are_the_numbers_of_the_rows(tmp_path, figures):
    (results,) = scores(made_up(methods=("LoRA", "zero-shot", "fusion sum")))
    plot_means(results.summaries, tmp_path / "means.png")
    means = figures[0].axes[0]
    # In the order given, the first on top.
    assert [label.get_text() for label in means.get_yticklabels()] == [
        "LoRA",
        "zero-shot",
        "fusion sum",
    ]
    summaries = results.summaries.values()
    dots = [line.get_xydata()[0] for line in means.lines]
    assert_allclose(dots, [(s.mean, i) for i, s in enumerate(summaries)])
    ends = [line.get_segments()[0][:, 0] for line in means.collections]
    assert_allclose(ends, [(s.low, s.high) for s in summaries])
    assert means.get_ylim()[0] > means.get_ylim()[1]


def test_plots_without_matplotlib_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with refused(r'a plot needs matplotlib, .* pip install "lorafusion-jax\[plots\]"'):
        plot_means(scores(made_up())[0].summaries, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
