"""Rows of a results file: what is read and refused, and that nothing that was written is ever lost."""

import json
import multiprocessing

import numpy as np
import pytest
from made_up_rows import made_up, row

from lorafusion_jax.report import append_rows, done, merge, read_rows

_ROWS = made_up(methods=("zero-shot", "fusion sum"), tasks=("easy", "hard"), seeds=(1, 2), items=8)


def _changed(**changes):
    return {**_ROWS[0], **changes}


def _append_fifty(path, seed):
    for task in range(50):
        append_rows(path, [row(f"task{task}", "LoRA", seed, np.ones(300, bool))])


def test_what_is_appended_is_read(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    append_rows(path, _ROWS[:1])
    append_rows(path, _ROWS[1:])
    assert read_rows(path) == _ROWS
    assert done(read_rows(path)) == {
        ("easy", "zero-shot", "95+5", 1),
        ("hard", "zero-shot", "95+5", 1),
        *((task, "fusion sum", "95+5", seed) for task in ("easy", "hard") for seed in (1, 2)),
    }


def test_every_cut_of_the_last_line_is_dropped_and_appending_mends_it(tmp_path):
    """Oracle: the rows before the cut, for a kill after any number of bytes."""
    path = tmp_path / "results.jsonl"
    append_rows(path, [_changed(method="Fusión")])
    append_rows(path, _ROWS[1:2])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert len(read_rows(path)) == 1
    append_rows(path, _ROWS[2:3])
    assert read_rows(path)[1:] == _ROWS[2:3]
    assert path.read_bytes().startswith(whole[:first])


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(_ROWS[0]))
    assert read_rows(path) == _ROWS[:1]
    append_rows(path, _ROWS[1:2])
    assert read_rows(path) == _ROWS[:2]


def test_a_cut_line_longer_than_what_is_read_at_once(tmp_path):
    path = tmp_path / "results.jsonl"
    append_rows(path, _ROWS[:1])
    with open(path, "a") as file:
        file.write('{"task": "' + "x" * 200_000)
    append_rows(path, _ROWS[1:2])
    assert read_rows(path) == _ROWS[:2]


def test_a_cut_line_that_is_not_the_last_is_an_error(tmp_path):
    path = tmp_path / "results.jsonl"
    append_rows(path, _ROWS[:2])
    first, second = path.read_text().splitlines()
    path.write_text(f"{first[:50]}\n{second}\n")
    with pytest.raises(ValueError, match=r"results.jsonl, line 1: not JSON \(.*\): fix or remove the line"):
        read_rows(path)


def test_processes_that_append_at_once_wait_for_each_other(tmp_path):
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_append_fifty, args=(path, seed)) for seed in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(done(read_rows(path))) == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "1"}, "seed is '1': expected a count"),
        ({"seed": True}, "seed is True: expected a count"),
        ({"steps": -1}, "steps is -1: expected a count"),
        ({"task": " "}, "task is ' ': expected a name"),
        ({"league": "100"}, r"league is '100': expected '95\+5' or '5'"),
        ({"correct": ""}, "correct is '': expected a 0 or 1 for each of at least one test row"),
        ({"correct": "0120"}, "correct is '0120': expected a 0 or 1"),
        ({"exact_match": 99.0}, r"exact_match is 99.0, but correct says \d+"),
        ({"option_correct": None}, "only one of option_accuracy and option_correct is null"),
        ({"option_correct": "1", "option_accuracy": 100}, "1 test rows in option_correct, 8 in correct"),
        ({"data_sha256": "abc"}, "data_sha256 is 'abc': expected 64 hexadecimal digits"),
        ({"seconds": float("nan")}, "seconds is nan: expected seconds"),
        ({"colour": "red"}, "colour is unknown: .*; what describes the run belongs into config"),
        ({"config": {"rate": float("inf")}}, "JSON cannot hold it: Out of range float"),
        ({"config": {"folder": object()}}, "JSON cannot hold it: Object of type object"),
    ],
)
def test_rows_that_are_refused_are_named_and_not_written(changes, message, tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(ValueError, match=f"row 2 of 2 to append.*{message}"):
        append_rows(path, [_ROWS[1], _changed(**changes)])
    assert not path.exists()


def test_percents_are_those_of_the_marks_to_a_decimal(tmp_path):
    rounded = {"correct": "001", "exact_match": 33.3, "option_correct": "110", "option_accuracy": 66.7}
    append_rows(tmp_path / "results.jsonl", [_changed(**rounded)])
    for percent, off in (("exact_match", 33.4), ("option_accuracy", 66.6)):
        with pytest.raises(ValueError, match=f"{percent} is {off}, but .* says"):
            append_rows(tmp_path / "results.jsonl", [_changed(**rounded | {percent: off})])


def test_lines_that_are_no_rows_are_named(tmp_path):
    path = tmp_path / "results.jsonl"
    append_rows(path, _ROWS[:1])
    for line, message in [
        ("[]", "line 2: holds a list, not an object"),
        ('{"task": "easy"}', "line 2: method is missing: expected a name"),
        (json.dumps(_changed(loss=float("nan"))), "line 2: not JSON"),
        ("", "line 2: not JSON"),
    ]:
        path.write_text(f"{json.dumps(_ROWS[0])}\n{line}\n")
        with pytest.raises(ValueError, match=message):
            read_rows(path)


def test_a_loss_that_is_not_finite_becomes_null(tmp_path):
    append_rows(tmp_path / "results.jsonl", [_changed(loss=float("nan"))])
    assert read_rows(tmp_path / "results.jsonl")[0]["loss"] is None


def test_files_are_merged_and_equals_count_once(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    append_rows(one, _ROWS[:3])
    append_rows(two, _ROWS[1:])
    assert merge([one, two]) == _ROWS


def test_different_data_of_one_task_are_not_merged(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    append_rows(one, _ROWS[:1])
    append_rows(two, [_changed(method="LoRA", league="5", data_sha256="0" * 64)])
    message = (
        rf"easy has different data in .*one.jsonl \(sha256 {_ROWS[0]['data_sha256']}\) and .*two.jsonl \(sha256 0{{64}}"
    )
    with pytest.raises(ValueError, match=message):
        merge([one, two])


def test_two_results_of_one_run_are_not_merged(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    append_rows(one, _ROWS[:1])
    append_rows(two, [_changed(seconds=9.0)])
    with pytest.raises(
        ValueError, match=r"easy, zero-shot, league 95\+5, seed 1 has two results, .* differ in seconds"
    ):
        merge([one, two])
