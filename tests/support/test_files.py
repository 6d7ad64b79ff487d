"""Files as the types that they hold: what a fault's message says, and that no size in a file is believed."""

import dataclasses
import io
import json
import os
import sys
from typing import TypedDict

import jax.numpy as jnp
import pytest
import recipes
import tokenizers
import transformers
from json_files import write_json
from made_up_rows import made_up
from refusals import refused

import lorafusion_jax as lf
from lorafusion_jax import crossbar, runs
from lorafusion_jax.io.tensor_files import load_tensors
from lorafusion_jax.report import write_text
from lorafusion_jax.support.reading import read_json
from lorafusion_jax.support.text import printable
from lorafusion_jax.tasks import Example, encode
from lorafusion_jax.trials import append_lines

_CONFIG = recipes.run_config(lf.FuseOptions(base="base", task="task"))


class _Inner(TypedDict):
    sizes: dict[str, list[int]]


@dataclasses.dataclass
class _Outer:
    inner: _Inner
    name: str = ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"name": 5}', r"Expected `str`, got `int` - at `\$\.name`: restore"),
        ('{"name": "a"}', "Object missing required field `inner`: restore"),
        (
            '{"inner": {"sizes": {}, "colour": 1}}',
            r"inner\.colour is unknown: remove it, or restore",
        ),
        ("", r"not JSON \(.*\): restore"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested|recursion"),
        (
            "version https://git-lfs.github.com/spec/v1\noid",
            "this is a Git LFS pointer, not the file itself: fetch",
        ),
    ],
)
def test_a_fault_names_the_file_the_field_and_the_fix(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(lf.FileError, match=f"^{path}: .*{message}"):
        read_json(path, _Outer, "a thing")


def test_a_sound_file_is_its_type(tmp_path):
    (tmp_path / "x.json").write_text('{"inner": {"sizes": {"a": [1, 2]}}}')
    assert read_json(tmp_path / "x.json", _Outer, "a thing") == _Outer(
        {"sizes": {"a": [1, 2]}}
    )
    with pytest.raises(
        lf.FileError, match=f"^{tmp_path}: not a thing: it has no y.json"
    ):
        read_json(tmp_path / "y.json", _Outer, "a thing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c | {"options": c["options"] | {"new": 1}},
            r"options\.new is unknown",
        ),
        (lambda c: c | {"modules": [[], []]}, "modules is of 2 seeds: expected of 1"),
        (
            lambda c: c | {"max_new_tokens": 10**9},
            r"Expected `int` <= 1000000 - at `\$\.max_new_tokens`",
        ),
    ],
)
def test_a_run_whose_config_is_damaged(tmp_path, change, message):
    write_json(tmp_path / "config.json", change(_CONFIG))
    with pytest.raises(lf.FileError, match=f"^{tmp_path}/config.json: .*({message})"):
        lf.load_run(tmp_path)


def test_metrics_that_are_damaged(tmp_path):
    run = runs.RunFolder(tmp_path)
    run.append_metrics([{"step": 1, "loss": float("inf")}, {"step": 2, "loss": 0.5}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert run.metrics() == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]
    run.cut_metrics(1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'
    for line, message in (
        ("5", "Expected `object`, got `int`"),
        ('{"loss": 1}', "Object missing required field `step`"),
    ):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
        with pytest.raises(lf.FileError, match=rf"metrics\.jsonl, line 2: {message}"):
            run.metrics()
    for name in ("results.json", "predictions.jsonl"):
        (tmp_path / name).write_text('{"seed": 1}\n')
    for read in (run.results, run.predictions):
        with pytest.raises(
            lf.FileError,
            match=r"(results\.json|predictions\.jsonl, line 1): Object missing",
        ):
            read()


def test_a_shape_that_numpy_refuses_is_a_fault_of_its_file(tmp_path):
    header = json.dumps(
        {"x": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}
    ).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with refused(f"^{tmp_path}/x.safetensors: "):
        load_tensors(tmp_path / "x.safetensors")


def test_two_processes_cannot_make_one_folder(tmp_path):
    """The second stops before it writes; what a killed process left is no obstacle."""
    (tmp_path / ".pool.partial" / "left").mkdir(parents=True)
    with lf.io.new_folder(tmp_path / "pool") as first:
        assert list(first.iterdir()) == []
        (first / "mine").write_text("")
        with refused(
            "is being written by another process: wait for it, or give another"
        ):
            with lf.io.new_folder(tmp_path / "pool"):
                pass
        assert (first / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]


def test_what_a_terminal_would_obey_is_spelled_out():
    assert (
        printable("a\x1b[31mb\r\nc\u2028\ud800\u200d é")
        == "a\\x1b[31mb\\r\nc\\u2028\\ud800\u200d é"
    )


def test_text_that_is_not_utf8_is_named(tmp_path, monkeypatch):
    (tmp_path / "lines").write_bytes(b"good\n\xff\n")
    with pytest.raises(lf.FileError, match=f"^{tmp_path}/lines: not UTF-8 text"):
        runs.generate_lines(
            runs.GenerateOptions(base=str(tmp_path), file=tmp_path / "lines")
        )
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("half\udcff")
    )  # what Python makes of it in a C locale
    with pytest.raises(lf.FileError, match="^standard input: not UTF-8 text"):
        runs.generate_lines(runs.GenerateOptions(base=str(tmp_path)))


def test_a_text_that_the_tokenizer_rejects_is_a_fault_of_the_base():
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, name_or_path="the_base"
    )
    with refused(r"the tokenizer of the_base rejects a text \(.*UNK.*\): give"):
        encode(tokenizer, [Example("b", "a")])


def test_a_folder_where_a_file_is_to_be_written_is_refused(tmp_path):
    with pytest.raises(lf.FileError, match=f"{tmp_path}: a folder: give a file"):
        write_text(tmp_path, "text")


def test_links_that_replace_files_to_write_are_not_followed(tmp_path):
    (outside := tmp_path / "outside").mkdir()
    (outside / "file").write_text("kept")
    (tmp_path / ".new.partial").symlink_to(outside)
    with lf.io.new_folder(tmp_path / "new") as partial:
        (partial / "file").write_text("new")
    assert (outside / "file").read_text() == "kept" and (
        tmp_path / "new" / "file"
    ).read_text() == "new"


_CHIP = crossbar.program(jnp.ones((4, 2)), crossbar.CrossbarConfig())


@pytest.mark.parametrize(
    "put", [os.mkfifo, lambda path: path.symlink_to(path.parents[1] / "kept")]
)
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x.json", lambda path: write_text(path, "{}")),
        ("x.yaml", lambda path: crossbar.save_config(_CHIP.config, path)),
        ("x.safetensors", lambda path: crossbar.save_chip(_CHIP, path)),
    ],
)
def test_neither_a_link_nor_a_pipe_in_the_way_is_written_to(put, name, write, tmp_path):
    (tmp_path / "kept").write_text("kept")
    (folder := tmp_path / "folder").mkdir()
    for taken in (f".{name}.partial", f".{name}.{os.getpid()}.partial", name):
        put(folder / taken)
    with pytest.raises(lf.FileError, match=f"{name}: a link, .* or a special file"):
        append_lines(folder / name, made_up(items=2)[:1])
    write(folder / name)
    assert not (folder / name).is_symlink() and (folder / name).is_file()
    assert (tmp_path / "kept").read_text() == "kept"


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "checkpoints"])
def test_a_run_with_links_to_files_elsewhere_is_refused(name, tmp_path):
    (outside := tmp_path / "outside").write_text("kept")
    run = runs.RunFolder(tmp_path / "run")
    run.folder.mkdir()
    (run.folder / name).symlink_to(outside)
    with (
        pytest.raises(lf.FileError, match=f"{run.folder / name}: a link, .*remove it"),
        run.locked(),
    ):
        pass
    assert outside.read_text() == "kept"
