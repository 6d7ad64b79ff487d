"""Whole runs on the embedded pool: resumable, reproducible, the same for a seed whatever runs at the same time."""

import dataclasses
import importlib
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import one_block
import pytest
import recipes
from json_files import read_json, write_json
from refusals import refused
from safetensors.numpy import load_file, save_file

import lorafusion_jax as lf
from lorafusion_jax import runs
from lorafusion_jax.io import store
from lorafusion_jax.runs import run as run_lib
from lorafusion_jax.support import interrupts

# The package's name of this module is that of its function.
fit_lib = importlib.import_module("lorafusion_jax.training.fit")


def _options(small, out, **changes):
    return recipes.small_run(small, out, **{"epochs": 3, "save_seconds": 0.0} | changes)


@pytest.fixture(scope="module")
def fused(small, tmp_path_factory):
    options = _options(small, tmp_path_factory.mktemp("runs"), name="whole")
    return options, lf.fuse(options)


@pytest.fixture
def copied(fused, tmp_path):
    """A copy of the run that can be changed: its options, and its folder."""
    options = replace(fused[0], out=tmp_path, resume=True)
    shutil.copytree(runs.run_path(fused[0]), runs.run_path(options))
    return options, runs.run_path(options)


def _change_config(folder, **changes):
    """Change options in a run's config.json, or remove fields that are None."""
    config = read_json(folder / "config.json")
    config["options"] |= {
        name: value for name, value in changes.items() if value is not None
    }
    config = {
        name: value
        for name, value in config.items()
        if changes.get(name, "") is not None
    }
    write_json(folder / "config.json", config)


def _assert_resumes(options, fused):
    """Resume a run, and check that it gets the bits of the run without interruptions."""
    whole, results = fused
    resumed = lf.fuse(replace(options, resume=True))
    assert replace(resumed, seconds={}) == replace(results, seconds={})
    for name in ("metrics.jsonl", "predictions.jsonl"):
        assert (runs.run_path(options) / name).read_bytes() == (
            runs.run_path(whole) / name
        ).read_bytes()
    jax.tree.map(
        np.testing.assert_array_equal,
        *(lf.load_run(runs.run_path(of))[1] for of in (options, whole)),
    )


@pytest.mark.accelerator
def test_a_run_writes_results_that_agree_with_its_rows(fused):
    options, results = fused
    folder = runs.run_path(options)
    assert (
        read_json(folder / "results.json") == dataclasses.asdict(results)
        and (folder / "final").is_dir()
    )
    rows = runs.RunFolder(folder).predictions()
    assert len(rows) == 2 * 5
    shares = [
        100 * np.mean([r["correct"] for r in rows if r["seed"] == seed])
        for seed in options.seeds
    ]
    assert shares == [s["exact_match"] for s in results.seeds]
    steps = [m for m in runs.RunFolder(folder).metrics() if "loss" in m]
    assert len(steps) == 2 * 3 * 2  # seeds, epochs, steps of 95 rows by 48
    for seed in options.seeds:
        losses = [m["loss"] for m in steps if m["seed"] == seed]
        assert losses[-1] < losses[0]
    assert results.trainable_by_group == {
        "coefficients": 2 * 2,
        "magnitudes": 6 * 96,
    }
    assert results.seeds[0]["modules"] != results.seeds[1]["modules"]


@pytest.mark.long
def test_training_without_a_finite_loss_stops_and_suggests_what_to_try(small, tmp_path):
    options = _options(
        small,
        tmp_path,
        name="diverged",
        epochs=30,
        lr_coefficients=1e38,
        lr_magnitudes=1e38,
    )
    for resume in (False, True):
        with refused(
            r"no seed has had a finite loss for 2\d steps, up to step 2\d: try lower"
        ):
            lf.fuse(replace(options, resume=resume))
    folder = tmp_path / "diverged"
    assert (
        len(
            [
                row
                for row in runs.RunFolder(folder).metrics()
                if "loss" in row and row["seed"] == 1
            ]
        )
        < 30
    )
    newest, _ = store.load(
        [*store.steps(folder / "checkpoints").values()][-1], "checkpoint"
    )
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(newest["best"]))


# Runs that were killed or stopped.


@pytest.mark.accelerator
@pytest.mark.parametrize(
    "killed_after", ["a step", "the last epoch", "training", "damage"]
)
def test_a_killed_run_resumes_bit_for_bit(killed_after, fused, copied, capsys):
    options, folder = copied
    (folder / "results.json").unlink()
    (folder / "predictions.jsonl").unlink()
    steps = sorted(p.name for p in (folder / "checkpoints").glob("step_*"))
    assert steps == ["step_000004", "step_000006"]
    (
        folder / "checkpoints" / ".step_000005.partial"
    ).mkdir()  # what a killed process leaves
    if killed_after == "damage":
        (folder / "final" / "manifest.json").write_text("{")
        (folder / "checkpoints" / "step_000006" / "manifest.json").unlink()
    elif killed_after != "training":
        shutil.rmtree(folder / "final")
    if killed_after == "a step":
        shutil.rmtree(folder / "checkpoints" / "step_000006")
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"step": 6, "epo')
    _assert_resumes(options, fused)
    said = capsys.readouterr().err
    there = {
        path.name
        for path in [*folder.glob("final*"), *(folder / "checkpoints").iterdir()]
    }
    aside = (
        {"final.damaged", "step_000006.damaged"} if killed_after == "damage" else set()
    )
    assert there == {"step_000004", "step_000006", "final"} | aside
    assert all(f"It is kept as {name}" in said for name in aside)
    reached = {"a step": 4, "training": None, "damage": 4}.get(killed_after, 6)
    newest = (
        folder / "final"
        if reached is None
        else folder / "checkpoints" / f"step_00000{reached}"
    )
    before = read_json(newest / "manifest.json")["metadata"]["seconds"]
    seconds = read_json(folder / "results.json")["seconds"]["train"]
    assert (
        seconds == before == fused[1].seconds["train"]
        if reached is None
        else seconds > before > 0
    )
    assert said.count("going on from step") == (reached is not None)
    assert reached is None or f"{folder}: going on from step {reached}\n" in said


@pytest.mark.parametrize("recorded", [True, False, None])
def test_a_resumed_run_compiles_its_layers_as_it_began(
    recorded, fused, copied, monkeypatch
):
    """Runs before 0.1.0 record nothing, and unroll the four layers of this model."""
    options, folder = copied
    config = read_json(folder / "config.json")
    found = []
    assert config["environment"].pop("unroll") is fused[1].environment["unroll"] is True
    config["environment"] |= {} if recorded is None else {"unroll": recorded}
    write_json(folder / "config.json", config)
    (folder / "results.json").unlink()

    def train(run, setup, *_):
        found.append(setup.config.unroll)
        raise SystemExit

    monkeypatch.setattr(run_lib, "train", train)
    with pytest.raises(SystemExit):
        lf.fuse(options)
    assert found == [recorded is not False]


def test_a_run_that_is_resumed_may_be_evaluated_in_smaller_batches(fused, copied):
    options, folder = copied
    (folder / "results.json").unlink()
    found = lf.fuse(replace(options, eval_batch=2, resume=True))
    for seed, before in zip(found.seeds, fused[1].seeds, strict=True):
        assert seed["loss"] == pytest.approx(before["loss"], rel=1e-4)


def test_a_signal_after_the_last_epoch_waits_until_the_numbers_are_saved(
    fused, tmp_path, monkeypatch
):
    def end():
        raise SystemExit(130)

    monkeypatch.setattr(interrupts, "release", end)
    with pytest.raises(SystemExit):
        lf.fuse(replace(fused[0], out=tmp_path, save_seconds=1e9))
    assert (tmp_path / "whole" / "final").is_dir() and not (
        tmp_path / "whole" / "checkpoints"
    ).exists()


# Use of a run.


def test_a_run_starts_from_the_numbers_of_another_one(fused, small, tmp_path):
    options, _ = fused
    more = replace(options, start_from=runs.run_path(options), out=tmp_path)
    lf.fuse(more)
    first = runs.RunFolder(runs.run_path(more)).metrics()[0]["loss"]
    assert first < runs.RunFolder(runs.run_path(options)).metrics()[0]["loss"]
    with refused("other modules or seeds"):
        lf.fuse(replace(more, seeds=(5,), name="other"))
    with refused("trained with the method fusion"):
        lf.fuse(replace(more, method="coefficients", name="other"))
    doubled = _with_base(small[0], tmp_path / "doubled", 2)
    with refused("whole was fused with other weights: the base"):
        lf.fuse(replace(more, base=str(doubled), name="other"))


def test_evaluate_and_generate_agree_with_the_run(fused, copied):
    options, results = fused
    _, folder = copied
    assert lf.load_run(str(folder))[2] == runs.RunFolder(folder).config()
    rows = recipes.evaluate(run=folder)
    assert rows == [
        {k: s[k] for k in ("seed", "exact_match", "option_accuracy", "loss")}
        for s in results.seeds
    ]
    with refused("--train-rows divides another task: name it with --task"):
        recipes.evaluate(run=folder, train_rows=0)
    with refused("test_rows is 0: "):
        recipes.evaluate(run=folder, test_rows=0)
    _change_config(folder, task=str(folder / "gone.jsonl"))  # generating needs no task
    text = folder / "lines.txt"
    text.write_text(
        "\n".join(
            p["input"] for p in runs.RunFolder(folder).predictions() if p["seed"] == 2
        )
    )
    assert recipes.generate(run=folder, file=text, seed=2) == recipes.answers(
        options, 2
    )
    with refused(r"gone.jsonl"):
        recipes.evaluate(run=folder)
    with refused("has no seed 7: it has 1, 2"):
        recipes.generate(run=folder, file=text, seed=7)
    text.write_text(" \n")
    with refused("holds no text"):
        recipes.generate(run=folder, file=text)


def _with_base(source, folder, number):
    """Write a copy of a base whose embeddings are multiplied by a number."""

    def change(tensors):
        shared = tensors["shared.weight"]
        return tensors | {"shared.weight": (shared * number).astype(shared.dtype)}

    shutil.copytree(source, folder, dirs_exist_ok=True)
    one_block.change_tensors(folder, change)
    return folder


@pytest.fixture
def moved(copied, small, tmp_path):
    """A run whose base and pool are copies that can be changed; the arguments are those of `_with_base`."""
    options, run = copied
    base = _with_base(small[0], tmp_path / "base", 1)
    pool = tmp_path / "pool"
    shutil.copytree(small[1], pool)
    _change_config(run, base=str(base), pool=str(pool))
    (tmp_path / "lines").write_text("a b")
    return run, replace(options, base=str(base), pool=str(pool))


def _uses(run, options):
    def resumed():
        (run / "results.json").unlink(missing_ok=True)
        return lf.fuse(options)

    return {
        "evaluate": lambda: recipes.evaluate(run=run),
        "generate": lambda: recipes.generate(run=run, file=run.parent / "lines"),
        "export": lambda: recipes.export(run=run, out=run.parent / "out"),
        "serve": lambda: lf.Service([lf.FusedRun.read(run)], capacity=1),
        "resume": resumed,
    }


@pytest.mark.parametrize("use", ["evaluate", "generate", "export", "serve", "resume"])
def test_a_run_is_not_used_with_other_weights_of_the_same_shapes(use, moved, small):
    run, options = moved
    called = _uses(run, options)[use]
    base = Path(options.base)
    pool = Path(str(options.pool))
    _with_base(small[0], base, 1.5)
    with refused(
        rf"{run} was fused with other weights: the base {base} had the SHA-256 "
    ):
        called()
    _with_base(small[0], base, 1)
    first, *_, last = sorted(pool.iterdir())
    shutil.copyfile(
        first / "adapter_model.safetensors", last / "adapter_model.safetensors"
    )
    with refused(
        rf"other weights: {last.name} of the pool {pool} had the SHA-256 \w+ then"
    ):
        called()
    assert not (run.parent / "out").exists()


def test_a_run_of_the_same_weights_is_used_in_another_format_and_dtype(moved, capsys):
    run, options = moved
    config = runs.RunFolder(run).config()
    assert set(config["digests"]) == {"base", "modules", "basis", "tokenizer", "config"}
    assert set(config["digests"]["modules"]) == {
        name for names in config["modules"] for name in names
    }
    tensors = load_file(Path(options.base) / "model.safetensors")
    backwards = {name: tensors[name] for name in sorted(tensors, reverse=True)}
    save_file(
        backwards | {"encoder.embed_tokens.weight": tensors["shared.weight"]},
        run / "model.safetensors",
    )
    shutil.move(run / "model.safetensors", Path(options.base) / "model.safetensors")
    for changes in ({"dtype": "bfloat16"}, {"dtype": "float32", "load_in": "nf4"}):
        _change_config(run, **changes)
        assert len(recipes.generate(run=run, file=run.parent / "lines")) == 1
    assert capsys.readouterr().err == ""


def test_a_base_with_a_relative_path_is_found_from_another_folder(
    fused, small, tmp_path, monkeypatch, capsys
):
    options, _ = fused
    there = tmp_path / "there"
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(small[0], there / "owner" / "name")
    elsewhere.mkdir()
    monkeypatch.chdir(there)
    asked = {
        "base": "owner/name",
        "method": "zero-shot",
        "pool": None,
        "out": Path("runs"),
    }
    lf.fuse(replace(options, **asked, recipe=lf.Recipe(max_new_tokens=8)))
    run = there / "runs" / "whole"
    monkeypatch.chdir(elsewhere)
    assert lf.load_run(run)[0].base == str(there / "owner" / "name")
    recipes.evaluate(run=run)
    there.rename(tmp_path / "moved")  # the whole project
    monkeypatch.chdir(tmp_path / "moved")
    assert lf.load_run("runs/whole")[0].base == "owner/name"
    recipes.evaluate(run=Path("runs/whole"))
    monkeypatch.chdir(elsewhere)
    assert capsys.readouterr().err == ""


def test_two_processes_cannot_write_one_run(copied, tmp_path):
    """A lock belongs to an open file, so one process can play both."""
    options, folder = copied
    (folder / "results.json").unlink()
    before = {
        path: path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    with runs.RunFolder(folder).locked():
        with refused(
            rf"whole is in use by process {os.getpid()}: wait for it, or give"
        ):
            lf.fuse(options)
    assert before == {path: path.read_bytes() for path in before}
    new = replace(options, name="new", resume=False)
    with (
        runs.RunFolder(runs.run_path(new)).locked(),
        refused(f"in use by process {os.getpid()}"),
    ):
        lf.fuse(new)


_WARM = {"method": "lora", "warm_start": "fusion"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": (1, 1)}, "given twice"),
        ({"name": "."}, "--name '.' is not the name of a folder"),
        ({"name": ""}, "--name '' is not the name of a folder"),
        ({"seeds": ()}, "no seeds"),
        ({"seeds": (1, 2**32)}, "seeds is 4294967296: "),
        ({"pool": None}, "give one with --pool"),
        ({"adapters": ("nobody",)}, "the pool lacks 'nobody'"),
        ({"control": "random-factors", "load_in": "nf4"}, "full precision"),
        ({"control_draw": 1}, "--control-draw numbers the draws of a random control"),
        (
            {"control": "rotated", "control_draw": -1},
            "control_draw is -1: expected an integer from 0",
        ),
        (
            {"method": "lora", "adapters": ("0",)},
            "the method lora fuses no modules: leave out --adapters",
        ),
        ({"lr_coefficients": -0.1}, "lr_coefficients is -0.1: expected at least 0"),
        ({"l1": -1.0}, "l1 is -1.0: expected at least 0"),
        ({"train_rows": -5}, "train_rows is -5: expected at least 0"),
        ({"method": "lorahub", "evaluations": 1000}, "at most 100 evaluations for 2"),
        ({"test_rows": -1}, "test_rows is -1: expected at least 0"),
        ({"save_seconds": math.inf}, "save_seconds is inf: give a finite number"),
        ({"clip": -1.0}, "clip is -1.0: give a norm above 0"),
        ({"warmup": 7}, "a warm-up of 7 steps, but training has 6: lower --warmup"),
        ({"epochs": 0}, "epochs is 0: "),
        ({"modules": 0}, "modules is 0: "),
        ({"prune": 1.5}, "prune is 1.5"),
        ({"basis": 0}, "basis is 0: "),
        ({"choose": "basis-gradient"}, "--choose basis-gradient needs a shared basis"),
        (
            {"choose": "gradient", "composition": "mix"},
            "no gradient can choose modules of a mix",
        ),
        (
            {"choose": "gradient", "adapters": ("double_next",)},
            "--adapters names the modules already",
        ),
        (
            {"choose": "gradient", "modules": 5},
            "5 modules to be chosen from a pool of 4",
        ),
        (
            _WARM | {"pool": None},
            "--warm-start starts from a pool: give it with --pool",
        ),
        (
            _WARM | {"start_from": Path()},
            "--warm-start makes the start: leave it out, or --from",
        ),
        (
            _WARM | {"epochs": 1},
            "--warm-start fusion divides the epochs into two parts: give 2 or more",
        ),
        (
            _WARM | {"lora_targets": ("q",)},
            "pool adapts v, which --lora-targets leaves out: add them",
        ),
    ],
)
def test_bad_options_stop_before_anything_is_written(changes, message, small, tmp_path):
    options = _options(small, tmp_path, **changes)
    with refused(message):
        lf.fuse(options)
    assert not list(tmp_path.iterdir())


def test_folders_that_are_no_inputs_stop_a_run_and_other_options_its_resumption(
    fused, tmp_path
):
    options, _ = fused
    new = replace(options, out=tmp_path, name="new")
    for changes, message in (
        ({"pool": str(tmp_path)}, "is not a pool"),
        ({"base": str(tmp_path)}, "config.json"),
    ):
        with refused(message):
            lf.fuse(replace(new, **changes))
    assert not runs.run_path(new).exists()
    with refused("prune is an option of the method fusion, not of coefficients"):
        replace(
            options,
            recipe=replace(options.recipe, prune=0.1),
            method="coefficients",
        )
    with refused("holds a run"):
        lf.fuse(options)
    with refused("was begun with other options: seeds was"):
        lf.fuse(replace(options, seeds=(3,), resume=True))


# Exports.


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_an_export_has_a_model_card_without_names_of_folders(form, fused, tmp_path):
    run = runs.run_path(fused[0])
    options = runs.ExportOptions(run=run, out=tmp_path / "out", format=form)
    runs.export(options)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f": {fused[1].seeds[0]['exact_match']:.1f} %" in card
    # The hub would refuse a folder as the base.
    assert str(fused[0].out) not in card and "base_model" not in card
    with refused("has no seed 9"):
        runs.export(replace(options, seed=9, out=tmp_path / "other"))


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_diverged_seed_is_not_exported(form, copied, tmp_path):
    _, run = copied
    params, metadata = store.load(run / "final", "training result")
    magnitudes = {site: np.array(m) for site, m in params["magnitudes"].items()}
    magnitudes["decoder.cross.v"][0] = np.nan
    shutil.rmtree(run / "final")
    store.save(
        run / "final",
        "training result",
        params | {"magnitudes": magnitudes},
        metadata,
    )
    options = runs.ExportOptions(run=run, seed=1, out=tmp_path / "out", format=form)
    with refused(
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.v\..* has NaN or infinite numbers"
    ):
        runs.export(options)
    assert [path.name for path in tmp_path.iterdir()] == [run.name]
    runs.export(replace(options, seed=2))


@pytest.mark.parametrize(
    ("task", "changes", "name"),
    [
        ("owner/bench", {}, "bench-fusion"),
        ("owner/bench@refs/pr/1:counting", {}, "bench-counting-fusion"),
        (
            "tasks/bench.json",
            {"control": "random-factors"},
            "bench-fusion-random-factors",
        ),
        (
            "tasks/bench.json",
            {"control": "rotated", "control_draw": 1},
            "bench-fusion-rotated-1",
        ),
        ("tasks/bench.json", {"name": "own"}, "own"),
    ],
)
def test_a_run_is_named_after_its_task_method_and_control(task, changes, name):
    assert (
        runs.run_path(lf.FuseOptions(base="base", pool="pool", task=task, **changes))
        == Path("runs") / name
    )


@pytest.mark.parametrize("task", ["some.task/v1.5", "."])
def test_a_run_of_a_task_folder_is_named_after_the_whole_folder(
    task, tmp_path, monkeypatch
):
    folder = tmp_path / "some.task" / "v1.5"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder if task == "." else tmp_path)
    assert runs.run_path(lf.FuseOptions(base="base", pool="pool", task=task)) == Path(
        "runs/v1.5-fusion"
    )
