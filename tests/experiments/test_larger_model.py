"""The pilot on a larger model: its controls and its rule by hand, and every arm on a small Llama."""

import math

import larger_model as experiment
import numpy as np
import pytest
import small_llama

from lorafusion_jax.tasks import Example, Task
from lorafusion_jax.trials import ResultRows

_OPTIONS = "Q\nOptions:\n(A) a\n(B) b\n(C) c"


@pytest.mark.parametrize(
    ("question", "trained", "unseen", "names"),
    [
        (_OPTIONS, ("(A)", "(A)"), "(B)", 2),  # two options that training lacks
        ("Q", ("1", "2", "3"), "4", 3),  # as many as different training answers
    ],
)
def test_the_second_control_names_answers_that_training_lacks(
    question, trained, unseen, names
):
    train = tuple(Example(question, answer) for answer in trained)
    test = (Example(question, trained[0]), Example(question, unseen))
    row = experiment.answer_row(Task("task", train, test, ""))
    parts = len(train) + len(set(trained)) + 1
    seen = math.log(parts / (trained.count(trained[0]) + 1))
    assert row["nats"] == pytest.approx([seen, math.log(parts)], abs=1e-4)
    assert row["named"] == pytest.approx([seen, math.log(parts * names)], abs=1e-4)
    assert row["correct"] == [1, 0]


@pytest.mark.parametrize(("below", "learned"), [(0.021, True), (0.019, False)])
def test_a_task_is_learned_two_standard_errors_below_the_controls(below, learned):
    spread = np.tile([0.1, -0.1], 50)  # two standard errors are 0.0201
    lora = {"nats": [2.0] * 100, "answer_tokens": [2] * 100}
    examples = (2 * (1 + below + spread)).tolist()
    assert experiment.learned(lora, [9.0] * 100, examples) == learned


@pytest.mark.long
def test_a_small_llama_has_all_arms_once(tmp_path, monkeypatch):
    """A task whose answer is the colour that its input names."""
    rows = [
        Example(f"Q: {n} {colour}\nA:", colour)
        for n in range(60)
        for colour in ("red", "blue")
    ]
    monkeypatch.setattr(experiment, "TASKS", ("colours",))
    llama = small_llama.make(tmp_path / "llama", max_position_embeddings=1024)
    task = Task("colours", tuple(rows[:100]), tuple(rows[100:]), "")
    results = ResultRows(tmp_path / "pilot.jsonl", experiment.cell_of)
    cells = [
        experiment.Cell("colours", arm, rate, 1, "float32")
        for arm, rate in (
            (experiment.ANSWERS, 0.0),
            (experiment.EXAMPLES, 0.0),
            (experiment.SHUFFLED, 0.01),
            (experiment.LORA, 0.01),
        )
    ]
    lab = experiment.Lab(llama / "model.safetensors", {"colours": task})
    lab.base = llama
    lab.fill(results, cells[:2])
    lab.fill(results, cells)
    answers, examples, shuffled, lora = results.rows()
    assert [experiment.cell_of(row) for row in results.rows()] == cells
    assert (examples["steps"], shuffled["steps"], lora["steps"]) == (0, 60, 60)
    assert lora["validation_loss"][-1] < lora["validation_loss"][0]
    assert sum(lora["nats"]) < sum(examples["nats"])
    assert lora["nats"] != shuffled["nats"]
    assert lora["answer_tokens"] == examples["answer_tokens"]
    assert len(answers["named"]) == len(lora["correct"]) == 20
