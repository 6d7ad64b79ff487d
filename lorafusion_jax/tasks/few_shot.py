"""Examples in the prompt, instead of in trained numbers."""

import dataclasses
import random

from .data import Task

BETWEEN_EXAMPLES = "\n\n"


def few_shot(task: Task, shots: int, seed: int) -> Task:
    r"""Put `shots` training examples, the same for all, before every test input.

    The prompt is `input target\n\n` for each example and then the row's own input. With a chat template the examples
    stand as text in the user's message. Of a conversation only the last message and its answer are shown as an example;
    the messages before a row's own input stay where they are. `random.Random("few-shot, seed N")` draws the examples
    and their order.

    `encode` cuts separate texts at the end, which is the question: keep its `max_length` above the longest prompt.
    """
    if not 1 <= shots <= len(task.train):
        raise ValueError(
            f"{shots} examples for the prompts of {task.name}, which has {len(task.train)} training rows: "
            f"use 1 to {len(task.train)}"
        )
    drawn = random.Random(f"few-shot, seed {seed}").sample(task.train, shots)
    shown = "".join(f"{example.input} {example.target}{BETWEEN_EXAMPLES}" for example in drawn)
    test = tuple(dataclasses.replace(example, input=shown + example.input) for example in task.test)
    return dataclasses.replace(task, test=test)
