"""Files as the types that they hold: what a fault's message says, and that no size in a file is believed."""

import dataclasses
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, TypedDict

import datasets
import one_block
import pytest
import tokenizers
import transformers
from made_up_rows import made_up

import lorafusion_jax as lf
from lorafusion_jax.crossbar import load_chip
from lorafusion_jax.files import FileError, printable, read_json, structured, write_text
from lorafusion_jax.io import safetensors
from lorafusion_jax.io.convert import ConvertOptions, convert
from lorafusion_jax.io.folders import new_folder
from lorafusion_jax.io.pool.folder import write_manifest
from lorafusion_jax.report import append_rows, read_rows
from lorafusion_jax.runs.folder import RunConfig, RunFolder
from lorafusion_jax.runs.options import FuseOptions
from lorafusion_jax.runs.predict import GenerateOptions, generate_lines
from lorafusion_jax.runs.run import options_to_json
from lorafusion_jax.tasks import Example, encode, load_task

_OPTIONS = options_to_json(FuseOptions(base="base", task="task"))
_CONFIG: dict[str, Any] = {
    "options": _OPTIONS,
    "modules": [[]],
    "task_sha256": "",
    "max_new_tokens": 8,
    "environment": {"seed_mode": "sequential", "dtype": "float32", "device": "cpu", "cores": 1, "versions": {}},
}


class _Inner(TypedDict):
    sizes: dict[str, list[int]]


@dataclasses.dataclass
class _Outer:
    inner: _Inner
    name: str = ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"name": 5}', "inner is missing: expected an object; restore"),
        (
            '{"inner": {"sizes": {"a": [1], "b": [1, "x"]}}}',
            r"inner\.sizes\.b\[1\] is 'x': expected an integer; restore",
        ),
        ('{"inner": {"sizes": []}}', r"inner\.sizes is \[\]: expected an object"),
        ('{"inner": {"sizes": {}, "colour": 1}}', r"inner\.colour is unknown: remove it, or restore"),
        ("[]", "holds a list, not an object: restore"),
        ("", r"not JSON \(.*\): restore"),
        ('{"inner": {"sizes": {"a": [NaN]}}}', r"not JSON \(.*\): restore"),
        ('{"name": "\\ud800", "inner": {"sizes": {}}}', r"not JSON \(.*\): restore"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested|recursion"),
        ("version https://git-lfs.github.com/spec/v1\noid", "this is a Git LFS pointer, not the file itself: fetch"),
    ],
)
def test_a_fault_names_the_file_the_field_and_the_fix(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(FileError, match=f"^{path}: .*{message}"):
        read_json(path, _Outer, "a thing")


def test_a_sound_file_is_its_type(tmp_path):
    (tmp_path / "x.json").write_text('{"inner": {"sizes": {"a": [1, 2]}}}')
    assert read_json(tmp_path / "x.json", _Outer, "a thing") == _Outer({"sizes": {"a": [1, 2]}})
    with pytest.raises(FileError, match=f"^{tmp_path}: not a thing: it has no y.json"):
        read_json(tmp_path / "y.json", _Outer, "a thing")


def test_half_a_character_in_place_of_an_object():
    with pytest.raises(FileError, match=r"^x\.json: not UTF-8 text \(.*surrogates not allowed\)"):
        structured("\ud800", _Outer, "x.json")


def test_an_option_of_a_newer_version_says_which():
    newer = _CONFIG["environment"] | {"versions": {"lorafusion-jax": "9.9"}}
    with pytest.raises(FileError) as error:
        structured(_CONFIG | {"environment": newer, "options": _OPTIONS | {"colour": "red"}}, RunConfig, "config.json")
    assert (error.value.file, error.value.field) == ("config.json", "options.colour")
    assert f"(written by version '9.9', this is {lf.__version__})" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "", "not JSON"),
        (lambda c: json.dumps(c)[:40], "not JSON"),
        (lambda c: "[]", "holds a list, not an object"),
        (
            lambda c: json.dumps({k: v for k, v in c.items() if k != "options"}),
            "options is missing: expected an object",
        ),
        (lambda c: json.dumps(c | {"options": c["options"] | {"new": 1}}), r"options\.new is unknown"),
        (lambda c: json.dumps(c | {"options": {"recipe": {"epochs": []}}}), r"options\.(base|recipe)"),
        (lambda c: json.dumps(c | {"modules": [[], []]}), "modules is of 2 seeds: expected of 1, as in"),
        (
            lambda c: json.dumps(c | {"max_new_tokens": 10**9}),
            "max_new_tokens is 1000000000: expected an integer from 1",
        ),
        (lambda c: '{"options":' * 100_000 + "1" + "}" * 100_000, "not JSON|nested too deeply"),
    ],
)
def test_a_run_whose_config_is_damaged(tmp_path, change, message):
    (tmp_path / "config.json").write_text(change(_CONFIG))
    with pytest.raises(FileError, match=f"^{tmp_path}/config.json: .*({message})"):
        lf.load_run(tmp_path)


def test_metrics_that_are_damaged(tmp_path):
    run = RunFolder(tmp_path)
    run.append_metrics([{"step": 1, "loss": float("inf")}, {"step": 2, "loss": 0.5}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert run.metrics() == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]
    run.cut_metrics(1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'
    for line, message in (("5", "holds an integer, not an object"), ('{"loss": 1}', "step is missing")):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
        with pytest.raises(FileError, match=rf"metrics\.jsonl, line 2: {message}"):
            run.metrics()
    for name in ("results.json", "predictions.jsonl"):
        (tmp_path / name).write_text('{"seed": 1}\n')
    for read in (run.results, run.predictions):
        with pytest.raises(FileError, match=r"(results\.json|predictions\.jsonl, line 1): \w+ is missing"):
            read()


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    base, adapters = one_block.cut(folder, adapters=2)
    convert(
        ConvertOptions(base=str(base), adapters=tuple(map(str, sorted(adapters.iterdir()))), out=folder / "converted")
    )
    return folder / "converted"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(adapters=5), "adapters is 5: expected a list"),
        (lambda m: m.update(adapters=[]), r"adapters is \[\]: expected a list"),
        (lambda m: m["adapters"].append(7), r"adapters\[2\] is 7: expected an object"),
        (lambda m: m["adapters"][0].pop("sites"), r"adapters\[0\]\.sites is missing"),
        (lambda m: m["adapters"][0].update(sites={}), r"adapters\[0\]\.sites is {}: expected an object"),
        (lambda m: m["adapters"][0]["files"].update(x=[]), r"adapters\[0\]\.files\.x is \[\]: expected a text"),
        (lambda m: m["adapters"][0].update(folder="x" * 300), "is not a file inside this folder"),
        (lambda m: m["adapters"][0].update(folder="a\0b"), "is not a file inside this folder"),
        (lambda m: m["adapters"][1].update(folder=m["adapters"][0]["folder"]), "two adapters of one folder"),
        (lambda m: m["base"].update(family="mamba"), "family is 'mamba': expected one of t5, decoder"),
        (lambda m: m["base"]["config"].update(d_model=0), "d_model is 0: expected an integer from 1 to 10,000,000"),
        (
            lambda m: m["base"]["config"].update(num_layers=10**9),
            "num_layers is 1000000000: expected an integer from 1",
        ),
        (lambda m: m["base"]["config"].update(new=1), "new is unknown"),
        (lambda m: m["base"]["config"].update(d_model=10**6), r"of [\d,]+ bytes, and the manifest says [\d,]+ numbers"),
        (lambda m: m["base"]["config"].update(d_kv=7), r"modules do not fit; first .*: expected \[r, "),
    ],
)
def test_a_signed_manifest_of_a_pool_is_not_believed(pool, tmp_path, change, message):
    folder = tmp_path / "pool"
    shutil.copytree(pool, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    write_manifest(folder, manifest)
    with pytest.raises(ValueError, match=message):
        lf.load_pool(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 0}, "d_model is 0: expected an integer from 1 to 10,000,000"),
        ({"d_ff": [8]}, r"d_ff is \[8\]: expected an integer"),
        ({"num_layers": 10**9}, "num_layers is 1000000000: expected an integer from 1 to 10,000"),
        ({"eos_token_id": {"a": 1}}, r"eos_token_id is \{'a': 1\}: expected an integer or a list or null"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon is 'small': expected a number"),
        ({"model_type": ["t5"]}, r"model_type is \['t5'\]"),
        (
            {"model_type": "llama", "num_hidden_layers": 10**9},
            "num_hidden_layers is 1000000000: expected an int",
        ),
        ({"model_type": "llama", "num_attention_heads": 0}, "num_attention_heads is 0: expected an integer from 1"),
        ({"model_type": "llama", "hidden_act": ["silu"]}, r"hidden_act is \['silu'\]: expected a text"),
        ({"model_type": "llama", "rope_scaling": 3}, "rope_scaling is 3: expected an object"),
    ],
)
def test_a_base_whose_configuration_is_damaged(pool, tmp_path, fields, message):
    config = json.loads((one_block.SMALL / "base" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: .*{message}"):
        lf.read_config(tmp_path)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": {}}}', '{"weight_map": 1}'])
def test_a_base_whose_index_is_damaged(tmp_path, index):
    shutil.copyfile(one_block.SMALL / "base" / "config.json", tmp_path / "config.json")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FileError, match=rf"^{tmp_path}/model\.safetensors\.index\.json: "):
        lf.load_base(tmp_path)


def test_a_shape_that_numpy_refuses_is_a_fault_of_its_file(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=f"^{tmp_path}/x.safetensors: "):
        safetensors.load(tmp_path / "x.safetensors")


def test_two_processes_cannot_make_one_folder(tmp_path):
    """The second stops before it writes; what a killed process left is no obstacle."""
    (tmp_path / ".pool.partial" / "left").mkdir(parents=True)
    with new_folder(tmp_path / "pool") as first:
        assert list(first.iterdir()) == []
        (first / "mine").write_text("")
        with pytest.raises(ValueError, match="is being written by another process: wait for it, or give another"):
            with new_folder(tmp_path / "pool"):
                pass
        assert (first / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]


def test_what_a_terminal_would_obey_is_spelled_out():
    assert printable("a\x1b[31mb\r\nc\u202e\ud800\u200d é") == "a\\x1b[31mb\\r\nc\\u202e\\ud800\u200d é"


def test_text_that_is_not_utf8_is_named(tmp_path, monkeypatch):
    (tmp_path / "lines").write_bytes(b"good\n\xff\n")
    with pytest.raises(FileError, match=f"^{tmp_path}/lines: not UTF-8 text"):
        generate_lines(GenerateOptions(base=str(tmp_path), file=tmp_path / "lines"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("half\udcff"))  # what Python makes of it in a C locale
    with pytest.raises(FileError, match="^standard input: not UTF-8 text"):
        generate_lines(GenerateOptions(base=str(tmp_path)))


def test_a_tokenizer_without_an_unknown_token_is_the_fault_of_its_base():
    known = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=known, name_or_path="the_base")
    with pytest.raises(ValueError, match=r"the tokenizer of the_base rejects a text \(.*UNK.*\): give a base with"):
        encode(tokenizer, [Example("b", "a")])


def test_a_link_in_the_place_of_a_folder_to_write_is_not_followed(tmp_path):
    (outside := tmp_path / "outside").mkdir()
    (outside / "file").write_text("kept")
    (tmp_path / ".new.partial").symlink_to(outside)
    with new_folder(tmp_path / "new") as partial:
        (partial / "file").write_text("new")
    assert (outside / "file").read_text() == "kept" and (tmp_path / "new" / "file").read_text() == "new"


def test_a_link_in_the_place_of_a_file_to_write_is_not_followed(tmp_path):
    (outside := tmp_path / "outside").write_text("kept")
    (tmp_path / f".x.{os.getpid()}.partial").symlink_to(outside)
    write_text(tmp_path / "x", "new")
    assert outside.read_text() == "kept" and (tmp_path / "x").read_text() == "new" and not (tmp_path / "x").is_symlink()


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "checkpoints"])
def test_a_run_with_links_where_it_is_written_in_place_is_refused(name, tmp_path):
    (outside := tmp_path / "outside").write_text("kept")
    run = RunFolder(tmp_path / "run")
    run.folder.mkdir()
    (run.folder / name).symlink_to(outside)
    message = f"{run.folder / name}: a link, which could lead out of its folder, or a special file: remove it"
    with pytest.raises(FileError, match=message), run.locked():
        pass
    assert outside.read_text() == "kept"


def test_rows_are_not_added_to_a_link_or_a_pipe(tmp_path):
    (outside := tmp_path / "outside.jsonl").write_text("")
    (link := tmp_path / "link.jsonl").symlink_to(outside)
    os.mkfifo(pipe := tmp_path / "pipe.jsonl")
    for path in (link, pipe):
        with pytest.raises(FileError, match=f"{path}: a link, which could lead out of its folder, or a special file"):
            append_rows(path, made_up(methods=("LoRA",), tasks=("easy",), seeds=(1,), items=2))
    assert outside.read_text() == ""


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl"])
def test_a_run_with_hard_links_where_it_is_written_in_place_is_refused(name, tmp_path):
    (outside := tmp_path / "outside").write_text("kept")
    run = RunFolder(tmp_path / "run")
    run.folder.mkdir()
    (run.folder / name).hardlink_to(outside)
    with pytest.raises(FileError, match=f"{run.folder / name}: a hard link.*copy it to a new file"), run.locked():
        pass
    assert outside.read_text() == "kept"


def test_rows_are_not_added_to_a_hard_link(tmp_path):
    (outside := tmp_path / "outside.jsonl").write_text("")
    (link := tmp_path / "link.jsonl").hardlink_to(outside)
    with pytest.raises(FileError, match=f"{link}: a hard link"):
        append_rows(link, made_up(methods=("LoRA",), tasks=("easy",), seeds=(1,), items=2))
    assert outside.read_text() == ""


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("read", [read_rows, load_chip, lambda path: RunFolder(path.parent).predictions()])
def test_what_is_no_file_is_not_read(read, kind, tmp_path):
    path = tmp_path / "predictions.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(ValueError, match=f"{path}: .*a pipe, a device or a folder"):
        read(path)


def test_a_saved_data_set_with_a_pipe_is_not_read(tmp_path):
    datasets.Dataset.from_dict({"input": ["a"], "target": ["b"]}).save_to_disk(tmp_path / "data")
    (file,) = (tmp_path / "data").glob("*.arrow")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match="a pipe, a device or a folder"):
        load_task(tmp_path / "data", train_rows=0, need=())


def test_a_pattern_of_a_tokenizer_that_never_ends_is_refused():
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    endless = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, name_or_path="the_base")
    with pytest.raises(ValueError, match=r"the tokenizer of the_base rejects a text \(.*retry-limit"):
        encode(endless, [Example("a" * 60 + "b", "a")])
