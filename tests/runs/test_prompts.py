"""Runs on a model that continues its prompt: trained, evaluated and asked, with and without its chat template."""

import dataclasses
import json
from pathlib import Path

import pytest
import small_llama

from lorafusion_jax.hardware.fuse import fuse
from lorafusion_jax.runs.apply import (
    EvaluateOptions,
    GenerateOptions,
    evaluate_run,
    generate_lines,
    load_to_evaluate,
    stream_lines,
)
from lorafusion_jax.runs.folder import RunFolder
from lorafusion_jax.runs.options import FuseOptions
from lorafusion_jax.runs.run import run_path
from lorafusion_jax.training.recipe import PRESETS

_ANSWERS = {"hot": "cold", "tall": "short", "bold": "old", "gold": "the gold"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return small_llama.make(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """Prompts of different lengths with options, the last rows conversations."""
    folder = tmp_path_factory.mktemp("task")
    words = [*_ANSWERS] * 3
    for part, count in (("train", 12), ("test", 7)):
        rows = [{"input": f"{'the ' * (i % 4)}{word}", "target": _ANSWERS[word]} for i, word in enumerate(words)]
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows[:count])))
    return folder


def _options(base: Path, task: Path, out: Path, **changes) -> FuseOptions:
    recipe = {"epochs": 2, "batch_size": 6, "lora_rank": 2, "lr_lora": 0.05, "max_new_tokens": 6, "shots": 2}
    values = {"base": str(base), "task": str(task), "out": out, "method": "lora", "save_seconds": 0.0}
    return FuseOptions(**values | changes, recipe=dataclasses.replace(PRESETS["default"], **recipe))


@pytest.fixture(scope="module")
def chat(base, task, tmp_path_factory) -> tuple[FuseOptions, dict]:
    options = _options(base, task, tmp_path_factory.mktemp("runs"), chat=True, prompt="say {input}", seeds=(1, 2))
    return options, fuse(options)


def test_a_run_with_a_chat_template_is_asked_as_it_was_trained(chat):
    options, results = chat
    folder = run_path(options)
    assert json.loads((folder / "config.json").read_text())["options"]["chat"] is True
    losses = [row["loss"] for row in RunFolder(folder).metrics() if "loss" in row]
    assert losses[-1] < losses[0]
    setup, _, _ = load_to_evaluate(EvaluateOptions(run=folder))
    asked = setup.tokenizer.decode(setup.test.inputs[1])
    assert asked == "<|im_start|>user\nsay the tall<|im_end|>\n<|im_start|>assistant\n"
    assert setup.tokenizer.decode(setup.test.labels[1]) == "short<|im_end|>"


def test_evaluating_and_generating_agree_with_the_run_in_batches_of_any_size(chat, tmp_path):
    options, results = chat
    folder = run_path(options)
    said = [row for row in RunFolder(folder).predictions() if row["seed"] == 2]
    for eval_batch in (2, 64):
        rows = evaluate_run(EvaluateOptions(run=folder, eval_batch=eval_batch))
        for row, recorded in zip(rows, results["seeds"], strict=True):
            for score in ("exact_match", "option_accuracy"):
                assert row[score] == recorded[score]
            assert row["loss"] == pytest.approx(recorded["loss"], rel=1e-5)
        text = tmp_path / "lines"
        text.write_text("\n".join(row["input"].removeprefix("say ") for row in said))
        asked = GenerateOptions(run=folder, file=text, seed=2, eval_batch=eval_batch)
        assert generate_lines(asked) == [row["prediction"] for row in said]
    assert ["".join(answer) for answer in stream_lines(asked)] == [row["prediction"] for row in said]
