"""Plots: what they show, that files are whole, and what they need."""

import sys

from lab.scores import scores
from made_up_rows import made_up
from numpy.testing import assert_allclose
from refusals import refused

from lorafusion_jax.report import plot_means


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
