"""Rows of a results file: rows that are read and refused, and that nothing that was written is ever lost."""

import fcntl
import json
import threading

import pytest
from json_files import write_json
from made_up_rows import made_up
from refusals import refused

from lorafusion_jax.trials import append_lines, merge, read_rows

_ROWS = made_up(
    methods=("zero-shot", "fusion sum"), tasks=("easy", "hard"), seeds=(1, 2), items=8
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "results.jsonl"


def _changed(**changes):
    return {**_ROWS[0], **changes}


def _line(**changes):
    return json.dumps(_changed(**changes))


def test_every_cut_of_the_last_line_is_dropped_and_appending_mends_it(path):
    """Oracle: the rows before the cut, for a kill after any number of bytes."""
    append_lines(path, [_changed(method="Fusión")])
    append_lines(path, _ROWS[1:2])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert len(read_rows(path)) == 1
    append_lines(path, _ROWS[2:3])
    assert read_rows(path)[1:] == _ROWS[2:3]
    assert path.read_bytes().startswith(whole[:first])
    # A last line that lacks only its newline is kept.
    write_json(path, _ROWS[0])
    assert read_rows(path) == _ROWS[:1]
    append_lines(path, _ROWS[1:2])
    assert read_rows(path) == _ROWS[:2]


def test_a_writer_waits_for_another_one(path):
    """A lock belongs to an open file, so a thread can play another process."""
    append_lines(path, _ROWS[:1])
    before = path.read_bytes()
    writer = threading.Thread(target=append_lines, args=(path, _ROWS[1:2]))
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer.start()
        writer.join(0.3)
        assert path.read_bytes() == before
    writer.join(60)
    assert read_rows(path) == _ROWS[:2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "Expected `object`, got `array`"),
        (_line(task=" "), "Expected `str` matching .* - at `..task`"),
        (_line(seconds=-1.0), "Expected `float` >= 0.0 - at `..seconds`"),
        (_line(colour="red"), "colour is unknown: remove it"),
        (
            f"{json.dumps(_ROWS[1])[:50]}\n{json.dumps(_ROWS[2])}",
            r"not JSON \(.*\): fix or remove the line",
        ),
    ],
)
def test_lines_that_are_no_rows_are_named(line, message, tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text(f"{json.dumps(_ROWS[0])}\n{line}\n")
    with refused(f"line 2: {message}"):
        read_rows(file)


def test_files_are_merged_and_equal_rows_count_once(tmp_path):
    files = [tmp_path / name for name in ("one.jsonl", "two.jsonl", "other.jsonl")]
    append_lines(files[0], _ROWS[:3])
    append_lines(files[1], _ROWS[1:])
    assert merge(files[:2]) == _ROWS
    append_lines(files[2], [_changed(seconds=9.0)])
    message = (
        r"easy, zero-shot, 95\+5 shots, seed 1 has two results, .* differ in seconds"
    )
    with refused(message):
        merge(files)
    files[2].unlink()
    append_lines(files[2], [_changed(method="LoRA", shots="5", data_sha256="0" * 64)])
    with refused(r"easy has different data in .*one.jsonl \(sha"):
        merge(files)
