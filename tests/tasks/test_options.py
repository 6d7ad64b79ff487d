"""Possible answers of rows, in the form of BIG-Bench Hard and in others."""

import dataclasses

import bbh_rows
import one_block
import pytest

from lorafusion_jax.tasks import (
    Example,
    Task,
    answer_options,
    few_shot,
    load_task,
    write_lorahub_split,
)

# Answers of every test row, or the letters (from A on) that its rows have.
_LABELS = {"boolean_expressions": ("False", "True"), "causal_judgement": ("Yes", "No")}
_LETTERS = {"ruin_names": (3, 2, 2)}
_OPEN = {"object_counting"}
# Test rows whose target is none of the letters.
_MALFORMED = {"ruin_names": [1]}


def _task(prompts, train=(("p", "x"), ("q", "y")), targets="?"):
    return Task(
        "t",
        tuple(Example(*row) for row in train),
        tuple(Example(text, targets) for text in prompts),
        "here",
    )


@pytest.fixture(scope="module")
def bbh(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bbh")
    rows, index = bbh_rows.write(folder)
    return [
        load_task(task)
        for task in write_lorahub_split(rows, folder / "split", index=index)
    ]


def _letters(count):
    return tuple(f"({chr(ord('A') + i)})" for i in range(count))


def test_options_of_every_task(bbh):
    assert {task.name for task in bbh} == {*_LABELS, *_LETTERS, *_OPEN}
    for task in bbh:
        options = answer_options(task)
        # Neither examples in the prompt nor the targets of test rows change them.
        assert answer_options(few_shot(task, 4, 1)) == options, task.name
        blind = dataclasses.replace(
            task, test=tuple(Example(row.input, "?") for row in task.test)
        )
        assert answer_options(blind) == options, task.name
        if task.name in _OPEN:
            assert options is None, task.name
            continue
        assert options is not None and len(options) == len(task.test), task.name
        letters = tuple(map(_letters, _LETTERS.get(task.name, ())))
        assert options == (letters or (_LABELS[task.name],) * len(task.test)), task.name
        outside = [
            row
            for row, example in enumerate(task.test)
            if example.target not in options[row]
        ]
        assert outside == _MALFORMED.get(task.name, []), task.name
    for folder in (one_block.SMALL / "tasks").iterdir():
        assert answer_options(load_task(folder)) is None, folder


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
