"""A full disk: the error names the folder, and what was saved before stays."""

import contextlib
import resource

import jax.numpy as jnp
import made_up_rows
import numpy as np
import pytest

from lorafusion_jax import crossbar
from lorafusion_jax.io import new_folder, store
from lorafusion_jax.report import write_text
from lorafusion_jax.support.writing import WriteError, write
from lorafusion_jax.trials import append_lines, read_rows

_ROWS = made_up_rows.made_up(items=5)


def _save_chip(folder, size):
    chip = crossbar.program(jnp.ones((size, size)), crossbar.CrossbarConfig())
    crossbar.save_chip(chip, folder / "chip.safetensors")


# What saves twice, at first few numbers, and how that is read.
_CASES = {
    "text": (
        lambda folder, size: write_text(folder / "file", "x" * 101 * size),
        lambda folder: (folder / "file").read_text(),
    ),
    "rows": (
        lambda folder, size: append_lines(folder / "rows.jsonl", _ROWS[:1] * size),
        lambda folder: read_rows(folder / "rows.jsonl")[:1],
    ),
    "arrays": (
        lambda folder, size: store.save(
            folder / f"saved-{size}", "thing", {"x": np.ones(99 * size)}, {}
        ),
        lambda folder: [path.name for path in folder.iterdir()],
    ),
    "chip": (
        _save_chip,
        lambda folder: crossbar.load_chip(folder / "chip.safetensors").matrix_shape,
    ),
}


@contextlib.contextmanager
def _full_disk():
    """Let the kernel refuse files of over 100 kB, also to libraries that do not use Python's own functions."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", _CASES)
def test_a_full_disk_leaves_what_was_saved(name, tmp_path, capfd):
    save, read = _CASES[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    save(folder, 1)
    before = read(folder)
    with _full_disk(), pytest.raises(WriteError, match=f"^{folder} cannot be written"):
        save(folder, 1000)
    assert read(folder) == before
    assert not [path for path in folder.rglob("*") if path.name.endswith(".partial")]
    assert "Traceback" not in capfd.readouterr().err


def test_what_is_read_meanwhile_is_not_blamed_on_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter"):
        with new_folder(tmp_path / "pool"):
            (tmp_path.parent / "no adapter").read_bytes()


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """The second writes the whole file while the first is at it."""

    def first(file):
        file.write(b"first")
        write_text(tmp_path / "file", "second")

    write(tmp_path / "file", first)
    assert (tmp_path / "file").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1
