"""Rows of the pool's value: letters that are not trained on, and shuffled answers. `test_tables.py` has its tests."""

import json
from collections import Counter

import numpy as np
import pytest
from json_files import write_rows
from lab import string_pools
from shuffle_labels import main as write_shuffled

_TARGETS = [
    target for target in string_pools.design().targets if target.pool != "tuning"
]


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
    write_rows(tmp_path / "task.jsonl", rows)
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
