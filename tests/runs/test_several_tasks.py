"""Several tasks that one program trains, against runs of each task alone."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import recipes
from json_files import write_json
from refusals import refused

import lorafusion_jax as lf
from lorafusion_jax import runs
from lorafusion_jax.cli.fuse import report
from lorafusion_jax.io import store
from lorafusion_jax.support import interrupts

# Rows of which the first and the second task have the same widths, and the third has fewer.
_ROWS = {"first": 40, "second": 40, "third": 12}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Sources of tasks with the same inputs, and with other answers."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = (recipes.TASK / "train.jsonl").read_text().splitlines()
    for name, count in _ROWS.items():
        rows = [json.loads(line) for line in lines[:count]]
        if name == "second":
            for row, other in zip(rows, reversed(rows[: count // 2]), strict=False):
                row["completion"] = other["completion"]
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        shutil.copy(recipes.TASK / "test.jsonl", folder / name)
    return [str(folder / name) for name in _ROWS]


def _options(small, out, **changes):
    shared = {"task": "", "batch_size": 8, "epochs": 3, "save_seconds": 0.0}
    return recipes.small_run(small, out, **shared | changes)


@pytest.fixture(scope="module")
def together(small, tasks, tmp_path_factory):
    options = _options(small, tmp_path_factory.mktemp("together"))
    return options, lf.fuse(options, task=tasks)


def _folders(options, tasks):
    return [runs.run_path(replace(options, task=task)) for task in tasks]


def _assert_same(folder, other, compare=np.testing.assert_array_equal):
    """Compare the metrics and the trained parameters of two runs."""
    found = []
    for run in (folder, other):
        # More validation rows of another task change the last bits of their loss.
        metrics = [
            [value for name, value in row.items() if name != "validation_loss"]
            for row in runs.RunFolder(run).metrics()
        ]
        found.append((metrics, lf.load_run(run)[1]))
    jax.tree.map(compare, *found)


def _near(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("number", range(3))
def test_a_run_reads_like_that_of_one_task(number, small, tasks, together, tmp_path):
    options, results = together
    folder = _folders(options, tasks)[number]
    assert folder.name == f"{Path(tasks[number]).name}-fusion"
    single = replace(options, out=tmp_path, task=tasks[number])
    alone = lf.fuse(single)
    compare = np.testing.assert_array_equal if number < 2 else _near
    _assert_same(folder, runs.run_path(single), compare)
    jax.tree.map(
        lambda ours, theirs: ours == theirs or _near(ours, theirs),
        replace(results[number], seconds={}).seeds,
        replace(alone, seconds={}).seeds,
    )
    assert runs.RunFolder(folder).results() == results[number]
    rows = recipes.evaluate(run=folder)
    assert [row["loss"] for row in rows] == [
        seed["loss"] for seed in results[number].seeds
    ]
    first = runs.RunFolder(folder).predictions()[0]
    (tmp_path / "lines").write_text(first["input"])
    answers = recipes.generate(run=folder, file=tmp_path / "lines")
    assert answers == [first["prediction"]]


@pytest.mark.parametrize(
    "method",
    [
        "lora",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("dora", "coefficients", "magnitudes")
        ),
    ],
)
def test_batched_tasks_are_trained_as_alone(method, small, tasks, tmp_path):
    options = _options(
        small, tmp_path / "together", method=method, seed_mode="batched", epochs=2
    )
    lf.fuse(options, task=tasks[1:])
    single = replace(options, out=tmp_path / "alone", task=tasks[2])
    lf.fuse(single)
    folder = runs.run_path(replace(options, task=tasks[2]))
    _assert_same(folder, runs.run_path(single), _near)


@pytest.mark.parametrize("left", ["the first epoch", "some results"])
def test_tasks_resume_bit_for_bit_after_a_kill(left, tasks, together, tmp_path, capsys):
    options, results = together
    resumed = replace(options, out=tmp_path, resume=True)
    folders = _folders(resumed, tasks)
    for before, folder in zip(_folders(options, tasks), folders, strict=True):
        shutil.copytree(before, folder)
        if left == "the first epoch" or folder != folders[0]:
            (folder / "results.json").unlink()
    if left == "the first epoch":
        # Killed while it saved the last epoch, which the second run has saved.
        for number in (0, 2):
            shutil.rmtree(folders[number] / "final")
            newest = max((folders[number] / "checkpoints").iterdir())
            shutil.rmtree(newest)
    shares = []
    if left == "the first epoch":
        for folder in folders:
            first = min((folder / "checkpoints").iterdir())
            shares.append(store.load(first, "checkpoint")[1]["seconds"])
    again = lf.fuse(resumed, task=tasks)
    for share, result, before in zip(shares, again, results, strict=False):
        # A share of what one program took, in each process.
        assert share < before.seconds["train"]
        assert share < result.seconds["train"]
    going_on = "going on from step" in capsys.readouterr().err
    assert going_on == (left == "the first epoch")
    for before, folder in zip(_folders(options, tasks), folders, strict=True):
        _assert_same(folder, before)
    assert [replace(each, seconds={}) for each in again] == [
        replace(each, seconds={}) for each in results
    ]


def test_tasks_that_were_stopped_within_an_epoch_resume_bit_for_bit(
    tasks, together, tmp_path, monkeypatch, capsys
):
    options, _ = together
    steps = []

    def asked():
        steps.append(None)
        return len(steps) in (7, 8)

    def release():
        if len(steps) in (7, 8):
            raise SystemExit(130)

    stopped = replace(options, out=tmp_path)
    monkeypatch.setattr(interrupts, "asked", asked)
    monkeypatch.setattr(interrupts, "release", release)
    with pytest.raises(SystemExit):
        lf.fuse(stopped, task=tasks)
    # Once more before the third task, which has two steps of an epoch's five, takes its next one.
    with pytest.raises(SystemExit):
        lf.fuse(replace(stopped, resume=True), task=tasks)
    lf.fuse(replace(stopped, resume=True), task=tasks)
    assert capsys.readouterr().err.count("going on from step") >= 2 * len(tasks) - 1
    for folder, before in zip(
        _folders(stopped, tasks), _folders(options, tasks), strict=True
    ):
        _assert_same(folder, before)


@pytest.mark.long
def test_a_task_without_a_finite_loss_is_reported_and_others_complete(
    tasks, together, tmp_path, monkeypatch, capsys
):
    options = replace(
        together[0], out=tmp_path, recipe=replace(together[0].recipe, epochs=5)
    )
    module = sys.modules[runs.RunFolder.__module__.replace("folder", "train")]
    fit = module.fit

    def fit_without_a_loss(*args, after_epoch, **others):
        def after(epoch):
            loss = epoch.metrics["loss"].copy()
            loss[:, 2:4] = np.nan  # the seeds of the second task
            metrics = epoch.metrics | {"loss": loss}
            after_epoch(epoch._replace(metrics=metrics))

        return fit(*args, after_epoch=after, **others)

    monkeypatch.setattr(module, "fit", fit_without_a_loss)
    first, second = _folders(options, tasks[:2])
    words = f"no seed had a finite loss at the end of {second}: try each alone"
    with refused(words):
        lf.fuse(options, task=tasks[:2])
    assert runs.RunFolder(first).results() is not None
    assert not (second / "results.json").exists()
    assert not (second / "final").exists()
    resumed = replace(options, resume=True)
    with refused("no seed has had a finite loss for 2. steps"):
        lf.fuse(resumed, task=tasks[:2])
    assert "is complete" in capsys.readouterr().err


def test_a_checkpoint_that_other_tasks_lack_is_left(tasks, together, tmp_path):
    options, _ = together
    resumed = replace(options, out=tmp_path, resume=True)
    folders = _folders(resumed, tasks)[:2]
    for before, folder in zip(_folders(options, tasks), folders, strict=False):
        shutil.copytree(before, folder)
        (folder / "results.json").unlink()
        shutil.rmtree(folder / "final")
    # Only the first has saved its last steps, of which it keeps two.
    for step in (folders[1] / "checkpoints").iterdir():
        shutil.rmtree(step)
    resumed = replace(resumed, save_seconds=1e9)
    lf.fuse(resumed, task=tasks[:2])
    for before, folder in zip(_folders(options, tasks), folders, strict=False):
        _assert_same(folder, before)
        assert not [*(folder / "checkpoints").glob("*")]


def test_a_task_that_is_added_does_not_start_others_again(
    tasks, together, tmp_path, capsys
):
    options, _ = together
    resumed = replace(options, out=tmp_path, resume=True)
    before = _folders(options, tasks)
    folders = _folders(resumed, tasks)
    shutil.copytree(before[0], folders[0])
    (folders[0] / "results.json").unlink()
    shutil.rmtree(folders[0] / "final")
    shutil.rmtree(max((folders[0] / "checkpoints").iterdir()))
    results = lf.fuse(resumed, task=[tasks[1], tasks[0]])
    assert "going on from step" in capsys.readouterr().err
    for number in (0, 1):
        _assert_same(folders[number], before[number])
    assert [result.task for result in results] == ["second", "first"]


def test_tasks_start_from_a_module_of_each(small, tasks, tmp_path):
    options = _options(
        small, tmp_path / "together", method="lora", warm_start="single", epochs=1
    )
    lf.fuse(options, task=tasks[:2])
    single = replace(options, out=tmp_path / "alone", task=tasks[1])
    lf.fuse(single)
    _assert_same(_folders(options, tasks)[1], runs.run_path(single))


def test_one_bad_task_is_refused_before_anything_is_written(small, tasks, tmp_path):
    bad = tmp_path / "bad.json"
    write_json(bad, [{"input": "a"}])
    with refused("bad.json"):
        lf.fuse(_options(small, tmp_path / "runs"), task=[*tasks, str(bad)])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "mine"}, "--name: only for one task"),
        ({"overwrite": True}, "--overwrite: only for one task"),
        ({"arrays": lf.runs.OnArrays(crossbar="isaac")}, "--crossbar: only"),
        ({"method": "lorahub"}, "--method lorahub: only"),
        ({"method": "zero-shot", "pool": None}, "--method zero-shot: only"),
    ],
)
def test_what_is_for_one_task_alone_is_refused(changes, words, small, tasks, tmp_path):
    with refused(words):
        lf.fuse(_options(small, tmp_path / "runs", **changes), task=tasks)
    assert not (tmp_path / "runs").exists()


def test_results_are_one_table(tasks, together):
    options, results = together
    head, _, *lines = report(results, _folders(options, tasks)).splitlines()
    assert head.startswith("3 tasks, fusion, ")
    seeds = [line.split()[1:3] for line in lines]
    assert seeds == [[name, seed] for name in _ROWS for seed in ("1", "2")]


def test_tasks_of_one_name_are_refused(small, tasks, tmp_path):
    with refused("two tasks have the name of the run .*first-fusion: rename one"):
        lf.fuse(_options(small, tmp_path), task=[tasks[0], tasks[0]])
    with refused("task is the text '.*first': give a list"):
        lf.fuse(_options(small, tmp_path), task=tasks[0])
    with refused("no tasks: give at least one"):
        lf.fuse(_options(small, tmp_path), task=[])
