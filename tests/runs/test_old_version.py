"""A run and result rows of the version in which one recipe had the numbers of all methods (commit 49e672b)."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import lorafusion_jax as lf
from lorafusion_jax.runs.folder import RunFolder, read_options
from lorafusion_jax.runs.options import OnArrays, options_to_json

_TESTS = Path(__file__).resolve().parents[1]
_OLD = _TESTS / "old_version"
_OPTIONS = lf.FuseOptions(
    base="examples/small/base",
    pool="examples/small/adapters",
    task="examples/small/tasks/double_digit",
    seeds=(1, 2),
    name="run",
    method="coefficients",
    recipe=lf.CoefficientsRecipe(modules=2, epochs=1, batch_size=48, pack=False, max_new_tokens=8),
    seed_mode="sequential",
    test_rows=3,
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The old run in a folder of its own, named from the folder that it was made in."""
    shutil.copytree(_OLD / "run", tmp_path / "run")
    monkeypatch.chdir(_TESTS.parent)
    return tmp_path / "run"


def test_an_old_run_is_read_by_the_new_names(run):
    config = RunFolder(run).config()
    assert config["options"] == dataclasses.replace(_OPTIONS, name="coefficients")
    assert config["environment"]["seed_mode"] == "sequential"
    results, rows = RunFolder(run).results(), RunFolder(run).predictions()
    assert results is not None and results["environment"]["seed_mode"] == "sequential"
    assert results["trainable_by_group"] == {"coefficients": 8} and len(rows) == 6


def test_an_old_run_that_is_complete_is_not_run_again(run, capsys):
    options = dataclasses.replace(_OPTIONS, out=run.parent, resume=True)
    assert lf.fuse(options)["exact_match"] == json.loads((run / "results.json").read_text())["exact_match"]
    assert "is complete: nothing to resume" in capsys.readouterr().err
    with pytest.raises(ValueError, match="pack was False, now True"):  # earlier versions padded every row
        lf.fuse(dataclasses.replace(options, recipe=dataclasses.replace(options.recipe, pack=True)))
    other = dataclasses.replace(options, recipe=dataclasses.replace(options.recipe, modules=3))
    with pytest.raises(ValueError, match="modules was 2, now 3"):
        lf.fuse(other)


def test_old_final_numbers_are_refused_with_the_version_that_reads_them(run):
    with pytest.raises(lf.FileError, match="checkpoints/final: .* commit [0-9a-f]{7}"):
        lf.load_run(run)


def test_old_rows_have_the_settings_of_their_methods_alone():
    rows = [json.loads(line)["config"] for line in (_OLD / "results.jsonl").read_text().splitlines()]
    lora, fusion, in_basis = (read_options(row, "row") for row in rows)
    assert lora.recipe == lf.LoRARecipe(lora_targets=("q", "v"), pack=False) and lora.arrays == OnArrays()
    assert fusion.recipe == lf.FusionRecipe(pack=False) and fusion.seed_mode == "auto"
    assert in_basis.recipe == lf.FusionRecipe(modules=28, basis=32, train_core=True, lr_core=5e-4, pack=False)


def test_every_committed_row_can_be_read():
    files = sorted((_TESTS.parent / "results").glob("**/results.jsonl"))
    configs = {json.dumps(json.loads(line)["config"]) for file in files for line in file.read_text().splitlines()}
    assert len(configs) > 100
    for config in configs:
        assert read_options(json.loads(config), "row").method == json.loads(config)["method"]


def test_a_removed_option_of_this_versions_names_is_left_out():
    assert read_options(options_to_json(_OPTIONS) | {"log": True}, "row") == _OPTIONS


def test_a_field_that_no_version_had_is_refused():
    row = json.loads((_OLD / "results.jsonl").read_text().splitlines()[0])["config"]
    row["recipe"]["speed"] = 1
    with pytest.raises(lf.FileError, match=r"row: recipe\.speed is unknown"):
        read_options(row, "row")
