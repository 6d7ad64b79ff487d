"""The pool's value: its draw, its rows, and the tests of its design by hand."""

import itertools
import json
from collections import Counter

import numpy as np
import pool_value as experiment
import pytest
from lab import pool_rows, string_pools
from shuffle_labels import main as write_shuffled
from string_tasks import split

_TARGETS = [
    target for target in string_pools.design().targets if target.pool != "tuning"
]


def test_targets_are_as_close_to_their_pools_as_their_class_says():
    pools = string_pools.design().pools
    counts = Counter(
        (target.pool, target.relevance) for target in string_pools.design().targets
    )
    for (pool, relevance), count in counts.items():
        assert (
            count == string_pools.TARGETS[pool][string_pools.CLASSES.index(relevance)]
        )
    for target in string_pools.design().targets:
        positions = {task[0] for task in pools[target.pool]}
        characters = {task[1] for task in pools[target.pool]}
        known = (target.task.position in positions) + (
            target.task.character in characters
        )
        assert known == {"both": 2, "one": 1, "foreign": 0}[target.relevance]


def test_nothing_was_trained_on_a_target():
    pools = string_pools.design().pools
    tasks = [target.task for target in string_pools.design().targets]
    assert len(set(tasks)) == 36 and not set(tasks) & set(split().base)
    assert not set(tasks) & {task for name in ("1", "2", "3") for task in pools[name]}
    for name, own in pools.items():
        assert len(set(own)) == 24 and not set(own) & set(split().base)
        assert (
            len({task.position for task in own}),
            len({task.character for task in own}),
        ) == (8, 5), name


def test_letters_of_test_rows_are_not_trained_on():
    def letters(rows):
        return {row["context"].partition(" : ")[2] for row in rows}

    tested = set().union(
        *(letters(string_pools.test_rows(target.task)) for target in _TARGETS)
    )
    target = _TARGETS[0]
    adapter = string_pools.design().pools["3"][0]
    assert len(letters(string_pools.test_rows(target.task))) == 200
    assert not tested & letters(string_pools.adapter_rows(adapter, "3", shuffled=False))
    for seed in (1, 2):
        rows = string_pools.train_rows(target.task, seed)
        assert len(rows) == 100 and not tested & letters(rows)
    assert string_pools.train_rows(target.task, 1) != string_pools.train_rows(
        target.task, 2
    )


def test_shuffled_labels_keep_inputs_and_the_set_of_answers():
    task = string_pools.design().pools["1"][0]
    real = string_pools.adapter_rows(task, "1", shuffled=False)
    shuffled = string_pools.adapter_rows(task, "1", shuffled=True)
    assert [row["context"] for row in real] == [row["context"] for row in shuffled]
    answers = [Counter(row["completion"] for row in rows) for rows in (real, shuffled)]
    assert answers[0] == answers[1]
    assert np.mean([a == b for a, b in zip(real, shuffled, strict=True)]) < 0.05


def test_a_file_of_rows_is_written_with_shuffled_answers(tmp_path):
    rows = [{"input": str(n), "target": str(-n)} for n in range(20)]
    (tmp_path / "task.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    write_shuffled(tmp_path / "task.jsonl", tmp_path / "out.jsonl")
    found = [
        json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()
    ]
    assert [row["input"] for row in found] == [
        row["input"] for row in rows
    ] and found != rows
    assert {row["target"] for row in found} == {row["target"] for row in rows}
    with pytest.raises(SystemExit, match="out.jsonl exists"):
        write_shuffled(tmp_path / "task.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(SystemExit, match="name it with --answer"):
        write_shuffled(
            tmp_path / "task.jsonl", tmp_path / "other.jsonl", answer="label"
        )


def _rows(losses, numbers=(20,)):
    """Return rows of all cells with losses of a function of the arm, the place of the target, and the rows."""
    return [
        {
            **{
                "arm": arm,
                "rows": number,
                "task": target.task.name,
                "seed": seed,
                "draw": draw,
                "numbers": 7,
            },
            **{
                "test_loss": losses(arm, place, number) + 0.01 * seed - 0.01 * draw,
                "exact_match": 50.0,
            },
            **{"training_rows_loss": 2.0},
        }
        for number, arm in itertools.product(numbers, pool_rows.ARMS)
        for place, target in enumerate(_TARGETS)
        for seed, draw in itertools.product(pool_rows.SEEDS, pool_rows.ARMS[arm].draws)
    ]


def _made_up(arm, place, number):
    close = {"both": 2, "one": 1, "foreign": 0}[_TARGETS[place].relevance]
    gains = {
        "rotated": 0.1 * close + 0.02 * np.sin(7.0 * place),
        "shuffled labels": 0.03 * np.cos(5.0 * place),
    }
    return (
        1.0
        + 5 / number * gains.get(arm, 0.0)
        + (0.2 + 0.01 * place) * (arm == "LoRA, rank 1 on v")
    )


def test_every_hypothesis_is_tested_as_the_design_says():
    rows = _rows(_made_up, numbers=(5, 20, 95))
    found = {test.name: test for test in experiment.tests(rows)}
    assert [*found] == ["H1", "H2", "H3", "H4", "H5", "H6"]
    # The three draws have the mean -0.01.
    gain = np.array([_made_up("rotated", place, 20) - 1.01 for place in range(30)])
    half = 2.045230 * gain.std(ddof=1) / np.sqrt(30)
    assert found["H1"][2:6] == pytest.approx(
        (30, gain.mean(), gain.mean() - half, gain.mean() + half), abs=1e-6
    )
    place = np.array(
        [{"both": 2, "one": 1, "foreign": 0}[target.relevance] for target in _TARGETS]
    )
    design = np.stack([np.ones(30), place], axis=1)
    (_, slope), squares, *_ = np.linalg.lstsq(design, gain)
    error = np.sqrt(squares[0] / 28 / np.sum((place - place.mean()) ** 2))
    assert (found["H2"].estimate, found["H2"].low) == pytest.approx(
        (slope, slope - 2.048407 * error), abs=1e-6
    )
    assert found["H3"].estimate == pytest.approx(
        (gain.mean() + 0.01) * (20 / 5 - 20 / 95)
    )
    assert (
        found["H4"].tasks == 10 and found["H4"].p < 1e-6
    )  # -0.01 ± 0.003 is within 0.05
    assert experiment.equivalence([0.04, 0.06, 0.05, 0.05]) == pytest.approx(0.5)
    assert found["H5"].estimate == pytest.approx(0.2 + 0.01 * 14.5)
    shuffled = np.array(
        [_made_up("shuffled labels", place, 20) - 1 for place in range(30)]
    )
    assert found["H6"].estimate == pytest.approx(np.mean(gain - shuffled))
