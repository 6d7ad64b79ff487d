"""A trial: what it refuses, that nothing is measured twice, its report and its plan; and its models against `fuse`."""

from dataclasses import replace

import numpy as np
import one_block
import pytest
from json_files import write_rows
from numpy.testing import assert_allclose
from refusals import refused

import lorafusion_jax as lf
from lorafusion_jax.cli import main
from lorafusion_jax.tasks import load_task
from lorafusion_jax.trials import (
    Scores,
    Trainer,
    Training,
    TrialOptions,
    judge,
    run,
    trainer,
    trial,
)

TASK = one_block.SMALL / "tasks" / "double_digit"


@pytest.fixture
def options(small, tmp_path):
    base, pool = small
    return TrialOptions(
        base=str(base),
        pool=str(pool),
        task=(str(TASK),),
        train_rows=12,
        folds=2,
        epochs=1,
        out=tmp_path / "out",
    )


def _command(options):
    command = f"trial --base {options.base} --pool {options.pool} --out {options.out}"
    sizes = "--train-rows 12 --folds 2 --epochs 1 --task"
    return [*command.split(), *sizes.split(), *options.task]


def _made_up(training):
    """Return scores; LoRA has the least loss, at rates of 0.006."""
    least = {"LoRA": 0.2, "LoRAFusion": 1.0}.get(training.arm, 1.5)
    far = sum(abs(np.log(rate / 0.006)) for _, rate in training.rates) - training.share
    loss = least + far / 10 + np.array(training.test) / 100
    correct = (loss < 1).astype(float) if training.answers else None
    return Scores(loss, correct, seconds=3.0)


@pytest.fixture
def measured(monkeypatch):
    """Trainings that were measured, whose scores are made up."""
    measured = []

    def run_items(function, trainings, engine):
        for training in trainings:
            measured.append(training)
            yield training, _made_up(training)

    monkeypatch.setattr(run, "run_items", run_items)
    monkeypatch.setattr(Trainer, "digests", {"base": "0"})
    return measured


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_rows": 2},
            "the 2 rows have 2 different inputs, expected at least 3",
        ),
        ({"train_rows": 0}, "train_rows is 0"),
        (
            {"arms": ("LoRA",)},
            "--arms 'LoRA' is no arm: give NAME=METHOD or NAME=METHOD:CONTROL",
        ),
        (
            {"arms": ("most frequent=constant",)},
            "arm most frequent: the method constant has no loss",
        ),
        ({"arms": ("x=lora:rotated",)}, "the method lora has no pool to replace"),
        ({"arms": ("x=loraa",)}, "no method 'loraa'"),
        ({"task": (str(TASK), str(TASK))}, "two tasks have the same name"),
        ({"minutes": 0.0}, "minutes is 0.0: give a time above 0"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_anything_is_loaded(
    options, changes, message, monkeypatch
):
    monkeypatch.setattr(trainer, "load_model", pytest.fail)
    with refused(message):
        next(trial(replace(options, **changes)))
    assert not options.out.exists()


def test_a_finished_trial_is_read_and_its_command_trains_the_method(
    options, measured, capsys
):
    arguments = _command(options)
    main(arguments)
    said = capsys.readouterr().out
    count = len(measured)
    assert "Train a LoRA. Least cross-validated loss: LoRA, 0.15" in said
    main(arguments)
    assert len(measured) == count and capsys.readouterr().out == said
    files = "double_digit double_digit.csv double_digit_details.csv double_digit.png report.html"
    assert {path.name for path in options.out.iterdir()} == {*files.split()}
    plot = (options.out / "double_digit.png").read_bytes()
    assert plot.startswith(b"\x89PNG\r\n\x1a\n") and plot.endswith(b"IEND\xaeB`\x82")
    (command,) = (
        line for line in said.splitlines() if line.startswith("lorafusion fuse")
    )
    flags = "--method lora --train-rows 12 --lr-lora 0.006 --epochs 1".split(" --")
    assert all(flag in command for flag in flags)


def test_roles_are_those_of_the_methods(options, measured):
    arms = ("LoRA=single", "nearest adapter=lora", "x=fusion:shuffled")
    *_, (_, outcomes) = trial(replace(options, arms=arms))
    roles = {arm.name: arm.role for arm in outcomes.arms}
    assert roles["nearest adapter"] == "lora" and roles["x"] == "control"
    assert roles["nearest adapter, trained further"] == "warm"
    sentence = judge(outcomes).sentence
    assert sentence.startswith("The nearest adapter is as good as it is")


def test_several_tasks_have_a_verdict_together(options, measured, capsys):
    tasks = (str(TASK), str(TASK.parent / "odd_dash"))
    main(_command(replace(options, task=tasks)))
    said = capsys.readouterr().out
    assert said.count("Train a LoRA.") == 3 and "2 tasks: loss" in said
    lines = (options.out / "all_tasks.csv").read_text().splitlines()
    (losses,) = (line.split(",")[1:3] for line in lines if line.startswith("LoRA,"))
    assert_allclose([float(loss) for loss in losses], 0.2 - 0.1 + 0.055, atol=1e-3)


def test_a_stop_in_any_round_gives_an_answer_and_the_command_continues(
    options, measured, monkeypatch, tmp_path
):
    first = replace(options, minutes=1e-9)
    for count in range(1, 40):  # each call measures one training
        *_, (_, outcomes) = trial(first)
        assert len({*measured}) == len(measured) == count
        assert judge(outcomes).arm
    continued = [*trial(options)][-1][1]
    assert len({*measured}) == len(measured)
    other = replace(options, out=tmp_path / "other", minutes="none")
    at_once = [*trial(other)][-1][1]
    for name, values in at_once.loss.items():
        np.testing.assert_array_equal(values, continued.loss[name])
    assert at_once.out == continued.out and at_once.tuned == continued.tuned
    monkeypatch.setattr(Trainer, "digests", {"base": "1"})
    with refused(
        "holds other rows .base_and_pool was [0-9a-f]{16}, is .*: give another --out"
    ):
        [*trial(options)]


def test_a_signal_ends_a_trial_with_its_last_answer(options, measured, monkeypatch):
    monkeypatch.setattr(run.interrupts, "asked", lambda: len(measured) >= 5)
    *_, (_, outcomes) = trial(options)
    assert len(measured) == 5 and judge(outcomes).arm


def test_a_plan_has_the_costs_of_the_trainings_of_each_arm(options, capsys):
    main([*_command(options), "--plan"])
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    head, _, *arms = [[*map(str.strip, line)] for line in lines if line]
    by_arm = {line[0]: dict(zip(head, line, strict=True)) for line in arms}
    # The default rates, two others, two finer ones, two halves and a whole training, and two folds.
    trainings = {name: int(line["runs"]) for name, line in by_arm.items()}
    assert trainings["LoRA"] == 1 + 2 + 2 + 2 + 1 + 2
    assert trainings["random adapters"] == trainings["LoRA"]
    assert trainings["base alone"] == 1 and by_arm["base alone"]["training"] == "0"
    assert trainings["all"] == 5 * 10 + 1 + 2 * 3
    assert by_arm["LoRA"]["time"] and not options.out.exists()


def test_the_nearest_adapter_starts_further_training_where_it_is(options):
    (task_trial,) = run.task_trials(options)
    trainer = task_trial.trainer()

    def loss(name, rates=()):
        rows = (*range(8),), (*range(8, 12),)
        return trainer.scores(Training(name, 0, rates, 1.0, *rows, answers=False)).loss

    nearest = loss("nearest adapter")
    further = "nearest adapter, trained further"
    assert_allclose(loss(further, (("lr_lora", 0.0),)), nearest, rtol=1e-3)
    assert not np.allclose(loss(further, (("lr_lora", 0.01),)), nearest, rtol=1e-3)


@pytest.mark.long
def test_trainings_equal_runs_of_fuse_on_the_same_rows(small, tmp_path):
    base, pool = map(str, small)
    recipe = lf.FusionRecipe(epochs=3, batch_size=16, modules=3, max_new_tokens=16)
    options = lf.FuseOptions(
        base=base, pool=pool, task=str(TASK), seeds=(1,), recipe=recipe
    )
    rows = load_task(TASK, need=()).train[:14]
    trainer = Trainer({"LoRAFusion": options}, rows)
    tokens = [len(labels) for labels in trainer.tokens.labels]
    for rate, count in ((0.01, 8), (0.3, 10)):
        rates = (("lr_coefficients", 0.05), ("lr_magnitudes", rate))
        train = tuple(range(count))
        test = tuple(range(count, 14))
        scores = trainer.scores(Training("LoRAFusion", 0, rates, 1.0, train, test))
        folder = tmp_path / str(count)
        folder.mkdir()
        for part, numbers in (("train", train), ("test", test)):
            texts = [
                {"input": rows[i].input, "target": rows[i].target} for i in numbers
            ]
            write_rows(folder / f"{part}.jsonl", texts)
        run = replace(
            options,
            task=str(folder),
            recipe=replace(recipe, **dict(rates)),
            out=tmp_path / "runs",
        )
        (seed,) = lf.fuse(run).seeds
        assert_allclose(scores.correct.mean() * 100, seed["exact_match"])
        loss = scores.loss.sum() * np.mean(tokens) / sum(tokens[i] for i in test)
        assert_allclose(loss, seed["loss"], rtol=2e-5)
