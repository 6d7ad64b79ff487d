"""Examples in the prompt: written out by hand, and read by the embedded tokenizer."""

import random

import pytest
from refusals import refused

from lorafusion_jax.tasks import Example, Task, few_shot


def _task(rows=6):
    train = tuple(Example(f"Count.\n\nQ: {i}?\nA:", f"t{i}") for i in range(rows))
    return Task(
        "counting",
        train,
        (Example("Q: x?\nA:", "x"), Example("Q: y?\nA:", "y")),
        "here",
    )


def test_training_examples_stand_before_every_test_input():
    task = _task()
    first, second = random.Random("few-shot, seed 3").sample(range(6), 2)
    shown = f"Count.\n\nQ: {first}?\nA: t{first}\n\nCount.\n\nQ: {second}?\nA: t{second}\n\n"
    shot = few_shot(task, 2, 3)
    assert shot.test == (
        Example(f"{shown}Q: x?\nA:", "x"),
        Example(f"{shown}Q: y?\nA:", "y"),
    )
    assert (shot.name, shot.train, shot.source) == (task.name, task.train, task.source)
    assert shot.sha256 != task.sha256


def test_seeds_draw_different_examples_and_the_same_ones_again():
    task = _task(rows=50)
    prompts = [few_shot(task, 5, seed).test[0].input for seed in range(5)]
    assert len(set(prompts)) == 5
    assert few_shot(task, 5, 3).test[0].input == prompts[3]
    for prompt in prompts:
        assert len({line for line in prompt.split("\n") if line.startswith("Q:")}) == 6


@pytest.mark.parametrize("shots", [0, 7])
def test_as_many_examples_as_there_are(shots):
    with refused(
        f"{shots} examples in a prompt: use 1 to 6, the training rows of counting"
    ):
        few_shot(_task(), shots, 0)
