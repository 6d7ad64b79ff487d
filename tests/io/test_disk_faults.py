"""Every write fails in turn: the message names the folder and what to do, and what was saved before stays.

Writes of orbax itself are left out: that there is room for them is tried first, and tensorstore's go by Python's hooks.
"""

import errno
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import made_up_rows
import numpy as np
import pytest

from lorafusion_jax import cli
from lorafusion_jax.io import checkpoint, new_folder
from lorafusion_jax.report import write_text
from lorafusion_jax.runs import RunFolder
from lorafusion_jax.support.writing import WriteError, write, writing
from lorafusion_jax.trials import append_rows, read_rows

_ADVICE = {
    errno.ENOSPC: "cannot be written: the disk is full (No space left on device): free some of it, or give another",
    errno.EDQUOT: "cannot be written: the quota is used up (Disk quota exceeded): remove files there, or raise",
    errno.EROFS: "cannot be written: its file system is read-only (Read-only file system): mount it for writing, or",
    errno.ENOLCK: "cannot be written: its file system has no locks, which keep two processes apart",
}
_CHANGES = ("os.mkdir", "os.rename", "fcntl.flock")


class _Disk:
    """From a certain write on, every write below a folder fails; `writes` counts them."""

    def __init__(self):
        self.folder = ""
        self.error = 0
        self.sound = 0
        self.writes = 0

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.folder:
            return
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str | bytes) or not flags & (
                os.O_WRONLY | os.O_RDWR
            ):
                return
            self.write(os.fsdecode(path))
        elif event in _CHANGES:
            self.write(arguments[0])

    def write(self, where: str | int | Path) -> None:
        if isinstance(where, int):
            where = os.readlink(f"/proc/self/fd/{where}")
        if str(where).startswith(self.folder) and "/arrays" not in str(where):
            self.writes += 1
            if self.writes > self.sound:
                raise OSError(
                    self.error, os.strerror(self.error)
                )  # like write(), it does not name the file


_disk = _Disk()


@pytest.fixture(scope="module", autouse=True)
def _audited() -> None:
    sys.addaudithook(
        _disk
    )  # for the rest of the process; it does nothing without a folder


@pytest.fixture
def faults(tmp_path, monkeypatch) -> Iterator[Callable[[int, int], None]]:
    """Let writes below `tmp_path` fail with an error, all but the first ones."""
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if _disk.folder:
            _disk.write(descriptor)
        fsync(descriptor)

    def begin(error: int, sound: int) -> None:
        _disk.folder = str(tmp_path)
        _disk.error = error
        _disk.sound = sound
        _disk.writes = 0

    monkeypatch.setattr(os, "fsync", failing)
    yield begin
    _disk.folder = ""


def _fails_at_every_write(
    work: Callable[[], None], faults: Callable[[int, int], None], error: int
) -> Iterator[str]:
    """Let each write of some work be the first that fails, and yield the message; at last it comes to its end."""
    for sound in range(1000):
        faults(error, sound)
        try:
            work()
        except WriteError as raised:
            _disk.folder = ""
            yield str(raised)
        else:
            _disk.folder = ""
            assert sound > 0
            return
    raise AssertionError("it never ends")


_SLOWER = [
    pytest.param(error, marks=pytest.mark.long)
    for error in (errno.EDQUOT, errno.ENOLCK)
]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, *_SLOWER])
def test_the_last_sound_checkpoint_stays(error, faults, tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoint.save_step(folder, 1, {"x": np.ones(3)}, {}, keep=2)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def save() -> None:
        checkpoint.save_step(folder, 2, {"x": np.zeros(3)}, {}, keep=2)

    failed = 0
    for said in _fails_at_every_write(save, faults, error):
        failed += 1
        assert (
            _ADVICE[error] in said
            and said.startswith(str(folder))
            and said.endswith("Files that were saved before are unchanged")
        )
        if (
            checkpoint.steps(folder)[-1].name == "step_000002"
        ):  # it was whole when the last folder was flushed
            shutil.rmtree(folder / "step_000002")
        assert {
            path: path.read_bytes() for path in folder.rglob("*") if path.is_file()
        } == before
    newest = checkpoint.load_newest(checkpoint.steps(folder), note=pytest.fail)
    assert failed >= 8 and newest is not None and newest[0]["x"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("error", _ADVICE)
def test_the_files_of_a_run_stay(error, faults, tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.locked():
        run.write_results({"exact_match": 1.0})
        run.append_metrics([{"step": 1}])

    def work() -> None:
        with run.locked():
            run.append_metrics([{"step": 2}])
            run.write_results({"exact_match": 2.0})

    for said in _fails_at_every_write(work, faults, error):
        assert said.startswith(str(run.folder)) and _ADVICE[error] in said
        assert '"exact_match": 1.0' in (run.folder / "results.json").read_text()
        assert {path.name for path in run.folder.iterdir()} == {
            ".lock",
            "metrics.jsonl",
            "results.json",
        }
        run.cut_metrics(1)
    assert run.metrics() == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("error", _ADVICE)
def test_rows_stay(error, faults, tmp_path):
    file = tmp_path / "new" / "results.jsonl"
    rows = made_up_rows.made_up(items=5)[:1]
    for said in _fails_at_every_write(lambda: append_rows(file, rows), faults, error):
        assert said.startswith(str(file.parent)) and _ADVICE[error] in said
        file.unlink(missing_ok=True)
    assert read_rows(file) == rows


def test_an_error_of_tensorstore_is_one_of_the_disk_without_tracebacks(tmp_path, capfd):
    """The kernel refuses files over a size, which no hook of Python sees."""
    noise = np.random.default_rng(0).normal(size=100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            WriteError,
            match=f"^{tmp_path} cannot be written: a file would be larger than allowed",
        ):
            checkpoint.save(tmp_path / "saved", {"x": noise}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [] and "Traceback" not in capfd.readouterr().err


def test_a_folder_that_vanishes(tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.locked():
        shutil.rmtree(run.folder)
        with pytest.raises(
            WriteError,
            match=r"run cannot be written: it is gone .*: make or mount it again, or give",
        ):
            run.append_metrics([{"step": 1}])
        with pytest.raises(WriteError, match="it is gone"):
            run.write_results({})


def test_a_folder_inside_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        WriteError,
        match="a part of its path is a file .*: move that file, or give another folder",
    ):
        with RunFolder(tmp_path / "file" / "run").locked():
            pass


def test_what_is_read_meanwhile_is_not_blamed_on_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter"):
        with new_folder(tmp_path / "pool"):
            (tmp_path.parent / "no adapter").read_bytes()


def test_errors_of_safetensors_and_commands_name_the_disk(tmp_path, capsys):
    with pytest.raises(WriteError, match="the disk is full"), writing(tmp_path):
        raise RuntimeError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    def full(arguments: list[str]) -> None:
        with writing(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit) as stop:
        cli.run(full, [])
    assert stop.value.code == 2
    assert re.fullmatch(
        r"error: .* cannot be written: the disk is full .*\n", capsys.readouterr().err
    )


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """The second writes the whole file while the first is at it."""

    def first(file: BinaryIO) -> None:
        file.write(b"first")
        write_text(tmp_path / "file", "second")

    write(tmp_path / "file", first)
    assert (tmp_path / "file").read_text() == "first" and len(
        list(tmp_path.iterdir())
    ) == 1


def test_a_file_that_is_cut_off_leaves_what_was_there(tmp_path):
    def cut_off(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_text("before")
    with pytest.raises(WriteError, match="the disk is full"):
        write(tmp_path / "file", cut_off)
    assert (tmp_path / "file").read_text() == "before" and len(
        list(tmp_path.iterdir())
    ) == 1
