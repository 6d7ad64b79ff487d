"""Possible answers of rows, in the form of BIG-Bench Hard and in others."""

import pytest

from lorafusion_jax.tasks import (
    Example,
    Task,
    answer_options,
)


def _task(prompts, train=(("p", "x"), ("q", "y")), targets="?"):
    return Task(
        "t",
        tuple(Example(*row) for row in train),
        tuple(Example(text, targets) for text in prompts),
        "here",
    )


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("Which?\nOptions:\n(A) red\n(B) blue\n(C) red", ("(A)", "(B)", "(C)")),
        ("Which?\nOptions:\n(A) red\n(B) blue\nA:", ("(A)", "(B)")),
        ("Which?\nOptions:\n(A) red\n(B) blueA:", ("(A)", "(B)")),
        ("Which?\n\nOPTIONS:\n- it is \n- it is not\nAnswer: ", ("it is", "it is not")),
        ("Options:\n- a\n- a\n- b", ("a", "b")),
        (
            "Options:\n(A) x\n(B) y\nA: (A)\n\nOptions:\n(A) x\n(B) y\n(C) z\nA:",
            ("(A)", "(B)", "(C)"),
        ),
    ],
)
def test_options_of_a_prompt(prompt, options):
    for said in (options[0], f" {options[0]}\n"):
        assert answer_options(_task([prompt], train=[(prompt, said)])) == (options,)
    assert answer_options(_task([prompt], train=[])) == (options,)


@pytest.mark.parametrize(
    "prompt",
    [
        "Which?\n(A) red\n(B) blue",
        "Which?\nOptions: red or blue",
        "My options:\n- a\n- b",
        "Options:\n(A) alone",
        "Options:\n(A) x\n(B) y\nA: (A)\n\nNone are stated here.\nA:",
    ],
)
def test_no_options_in_a_prompt(prompt):
    assert answer_options(_task([prompt])) is None
    closed = _task([prompt], train=[("p", "yes"), ("q", "no")] * 2)
    assert answer_options(closed) == (("no", "yes"),)
    # Nor where other prompts' options are believed.
    assert (
        answer_options(_task([prompt], train=[("Options:\n- yes\n- no", "yes")]))
        is None
    )


def test_rows_whose_options_are_missing_or_not_believed_take_the_labels():
    stated = "Options:\n(A) x\n(B) y\n(C) z"
    red_or_blue = "Options:\n(A) red\n(B) blue"
    letters = [(stated, "(A)"), (stated, "(B)")]
    labels = [(red_or_blue, "red"), (red_or_blue, "blue")]
    for prompts, train, options in (
        (
            [stated, "Options:\n(A) x"],
            2 * letters,
            (("(A)", "(B)", "(C)"), ("(A)", "(B)")),
        ),
        ([stated, "none"], letters, None),
        ([red_or_blue], labels, None),
        ([red_or_blue], 2 * labels, (("blue", "red"),)),
        # Half of the training targets are enough: prompts of which some are malformed.
        (
            [red_or_blue],
            [(red_or_blue, "(A)"), (red_or_blue, "red")],
            (("(A)", "(B)"),),
        ),
    ):
        assert answer_options(_task(prompts, train=train)) == options


@pytest.mark.parametrize(
    ("targets", "labels"),
    [
        (["b", "a", "b", "a"], ("a", "b")),
        (["b", "a", "b"], None),
        (["a", "a", "a"], None),
        ([str(i) for i in range(10)] * 2, tuple(str(i) for i in range(10))),
        ([str(i) for i in range(11)] * 2, None),
        ([], None),
    ],
)
def test_labels_are_few_and_come_again(targets, labels):
    task = _task(["p", "q"], train=[("p", target) for target in targets])
    assert answer_options(task) == (labels and (labels, labels))
