"""Exact match, against the rule of the paper's code written out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafusion_jax.tasks import Example, Task, constant_answer, exact_match


@pytest.mark.parametrize(
    ("prediction", "target", "same"),
    [
        ("True", "true", True),
        ("  (A)\n", "(a).", True),
        ("Dr. No", "dr no", True),
        ("3.5", "35", True),  # the paper's rule, for better or worse
        ("yes .", "yes", False),  # strip comes before the full stops go
        ("(A)", "(B)", False),
        ("", "x", False),
    ],
)
def test_rule(prediction, target, same):
    assert exact_match([prediction], [target]) == (np.array([same]), 100.0 * same)


@given(st.lists(st.tuples(st.text("aA. \n", max_size=3), st.text("aA. \n", max_size=3)), min_size=1))
def test_agrees_with_the_papers_code(pairs):
    right = [p.strip().lower().replace(".", "") == t.strip().lower().replace(".", "") for p, t in pairs]
    correct, percent = exact_match([p for p, _ in pairs], [t for _, t in pairs])
    assert correct.tolist() == right
    assert percent == pytest.approx(100 * sum(right) / len(right))


@pytest.mark.parametrize(("predictions", "targets"), [(["a"], ["a", "b"]), ([], []), (["a"], [])])
def test_rows_must_pair(predictions, targets):
    message = f"{len(predictions)} predictions for {len(targets)} targets: wanted one for each"
    with pytest.raises(ValueError, match=message):
        exact_match(predictions, targets)


def _task(*targets):
    return Task("t", tuple(Example("p", target) for target in targets), (), "here")


@pytest.mark.parametrize(
    ("targets", "answer"),
    [(("b", "a", "a"), "a"), (("b", "a", "a", "b", "c"), "b"), (("a", "b", "b", "a"), "a"), (("z",), "z")],
)
def test_constant_answer_is_the_most_common_and_of_equals_the_first(targets, answer):
    assert constant_answer(_task(*targets)) == answer


def test_constant_answer_needs_training_rows():
    with pytest.raises(ValueError, match="t has no training rows, so it has no most common target"):
        constant_answer(_task())
