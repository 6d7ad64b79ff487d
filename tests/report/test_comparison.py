"""Plots that compare methods: what they show, and that no texts overlap."""

import itertools

import numpy as np
import pytest
from made_up_rows import METHODS, made_up, row

from lorafusion_jax.report import plot_against_trainable, plot_means, scores


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, which are not written."""
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *a, **k: drawn.append(figure))
    monkeypatch.setattr("lorafusion_jax.report.figure.write", lambda path, writer: writer(path))
    return drawn


def test_dots_are_the_means_in_the_order_given(figures, tmp_path):
    (found,) = scores(made_up(methods=("LoRA", "zero-shot", "fusion sum")))
    plot_means(found, tmp_path / "means.png", title="title")
    (axes,) = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["LoRA", "zero-shot", "fusion sum"]
    dots = [line.get_xydata()[0] for line in axes.lines]
    np.testing.assert_allclose(dots, [(s.mean, i) for i, s in enumerate(found.summaries.values())])
    ends = [lines.get_segments()[0][:, 0] for lines in axes.collections]
    np.testing.assert_allclose(ends, [(s.low, s.high) for s in found.summaries.values()])
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first on top


@pytest.mark.parametrize("start", [0, 1, 2])
def test_every_method_is_a_labelled_point_and_no_texts_overlap(figures, tmp_path, start):
    (found,) = scores(made_up(start=start, items=30))
    plot_against_trainable(found, tmp_path / "trainable.png", title="title")
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.texts if text.get_text() not in METHODS] == []
    assert {text.get_text() for text in axes.texts} == set(METHODS)
    figures[0].draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    overlapping = [(a, b) for a, b in itertools.combinations(boxes, 2) if boxes[a].overlaps(boxes[b])]
    assert not overlapping
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 for box in boxes.values())
    for text in axes.texts:
        method = text.get_text()
        assert text.xy[1] == pytest.approx(found.summaries[method].mean)
        count = METHODS[method][1]
        assert text.xy[0] == pytest.approx(np.log10(count)) if count else text.xy[0] < 1


def test_methods_that_all_score_zero_are_drawn(tmp_path):
    rows = [row("easy", method, 1, np.zeros(8, bool), trainable=n) for method, n in (("a", 0), ("b", 0), ("c", 7))]
    plot_means(scores(rows)[0], tmp_path / "means.png")
    plot_against_trainable(scores(rows)[0], tmp_path / "trainable.png")
    plot_against_trainable(scores(rows[:2])[0], tmp_path / "none.png")
    assert len(list(tmp_path.iterdir())) == 3
