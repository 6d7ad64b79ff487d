"""Exact match, against the rule of the paper's code written out."""

import pytest
from refusals import refused

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
def test_texts_are_compared_by_the_rule_of_the_papers_code(prediction, target, same):
    assert exact_match([[prediction]], [target]).tolist() == [[same]]


def test_every_seed_has_a_row():
    found = exact_match([["a", "B.", "c"], ["a", "", "x"]], ["A", "b", "x"])
    assert found.tolist() == [[True, True, False], [True, False, True]]


@pytest.mark.parametrize(
    ("predictions", "targets"), [(["a"], ["a", "b"]), ([], []), (["a"], [])]
)
def test_rows_must_pair(predictions, targets):
    message = f"{len(predictions)} predictions for {len(targets)} targets: expected one for each"
    with refused(message):
        exact_match([predictions], targets)


def _task(*targets):
    return Task("t", tuple(Example("p", target) for target in targets), (), "here")


@pytest.mark.parametrize(
    ("targets", "answer"),
    [(("b", "a", "a"), "a"), (("b", "a", "a", "b", "c"), "b"), (("z",), "z")],
)
def test_constant_answer_is_the_most_common_and_of_equals_the_first(targets, answer):
    assert constant_answer(_task(*targets)) == answer


def test_constant_answer_needs_training_rows():
    with refused("t has no training rows, so it has no most common target"):
        constant_answer(_task())
