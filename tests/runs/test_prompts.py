"""Runs on a model that continues its prompt: trained, evaluated and asked, with and without its chat template."""

import dataclasses
import functools
import importlib
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import recipes
import small_llama
from json_files import read_json, write_json, write_rows
from refusals import refused

import lorafusion_jax as lf
from lorafusion_jax import runs

# The package's name of this module is that of its function.
evaluation = importlib.import_module("lorafusion_jax.runs.evaluate")

_ANSWERS = {"hot": "cold", "tall": "short", "bold": "old", "gold": "the gold"}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Prompts of different lengths, whose answers recur and so are options."""
    folder = tmp_path_factory.mktemp("task")
    words = [*_ANSWERS] * 3
    for part, count in (("train", 12), ("test", 7)):
        longest = (
            3 if part == "train" else 1
        )  # a single width of tests' rows, hence single programs of theirs
        rows = [
            {"input": f"{'the ' * (i % (longest + 1))}{w}", "target": _ANSWERS[w]}
            for i, w in enumerate(words)
        ]
        write_rows(folder / f"{part}.jsonl", rows[:count])
    return folder


def _options(base, task, out, **changes):
    recipe = {
        "epochs": 2,
        "batch_size": 6,
        "lora_rank": 2,
        "lr_lora": 0.05,
        "max_new_tokens": 6,
        "shots": 2,
    }
    values = {
        "base": str(base),
        "task": str(task),
        "out": out,
        "method": "lora",
        "save_seconds": 0.0,
    }
    return recipes.options(recipe, **values | changes)


@pytest.fixture(scope="module")
def chat(base, task, tmp_path_factory):
    options = _options(
        base,
        task,
        tmp_path_factory.mktemp("runs"),
        chat=True,
        prompt="say {input}",
        seeds=(1, 2),
    )
    return options, lf.fuse(options)


def test_a_run_with_a_chat_template_is_asked_as_it_was_trained(chat):
    options, _ = chat
    folder = runs.run_path(options)
    assert read_json(folder / "config.json")["options"]["chat"] is True
    losses = [row["loss"] for row in runs.RunFolder(folder).metrics() if "loss" in row]
    assert losses[-1] < losses[0]
    setup, _, _ = runs.load_to_evaluate(runs.EvaluateOptions(run=folder))
    asked = setup.tokenizer.decode(setup.test.inputs[1])
    assert asked == "<|im_start|>user\nsay the tall<|im_end|>\n<|im_start|>assistant\n"
    assert setup.tokenizer.decode(setup.test.labels[1]) == "short<|im_end|>"


def test_evaluating_and_generating_agree_with_the_run_in_batches_of_any_size(
    chat, tmp_path
):
    options, results = chat
    folder = runs.run_path(options)
    for row, recorded in zip(
        recipes.evaluate(run=folder, eval_batch=2),
        results.seeds,
        strict=True,
    ):
        for score in ("exact_match", "option_accuracy"):
            assert row[score] == recorded[score]
        assert row["loss"] == pytest.approx(recorded["loss"], rel=1e-5)
    said = [row for row in runs.RunFolder(folder).predictions() if row["seed"] == 2]
    (tmp_path / "lines").write_text(
        "\n".join(row["input"].removeprefix("say ") for row in said)
    )
    asked = runs.GenerateOptions(
        run=folder, file=tmp_path / "lines", seed=2, eval_batch=3
    )
    assert runs.generate_lines(asked) == [row["prediction"] for row in said]
    assert ["".join(answer) for answer in runs.stream_lines(asked)] == [
        row["prediction"] for row in said
    ]


def test_a_run_is_not_used_with_another_configuration_tokenizer_or_chat_template(
    chat, base, tmp_path
):
    run = tmp_path / "run"
    other = tmp_path / "base"
    shutil.copytree(runs.run_path(chat[0]), run)
    shutil.copytree(base, other)
    (tmp_path / "lines").write_text("hot")

    def ask(**changes):
        config = read_json(run / "config.json")
        config["options"] |= {"base": str(other)} | changes
        write_json(run / "config.json", config)
        return recipes.generate(run=run, file=tmp_path / "lines", max_new_tokens=1)

    settings = read_json(other / "tokenizer_config.json")
    write_json(other / "tokenizer_config.json", dict(reversed(settings.items())))
    assert len(ask()) == 1
    (other / "chat_template.jinja").write_text(small_llama.CHATML + " ")
    with refused(
        "run was fused with other texts: the chat template of .*base had the SHA-256"
    ):
        ask()
    assert len(ask(chat=False)) == 1  # the template is not used
    write_json(
        other / "tokenizer_config.json",
        settings | {"add_bos_token": True, "bos_token": "the"},
    )
    with refused(
        "run was fused with other texts: the tokenizer of .*base had the SHA-256 "
    ):
        ask()
    write_json(other / "tokenizer_config.json", settings)
    config = read_json(other / "config.json")
    write_json(other / "config.json", config | {"transformers_version": "0"})
    assert len(ask()) == 1
    for file, change in (
        ("config.json", {"rms_norm_eps": 0.1}),
        ("generation_config.json", {"eos_token_id": 4}),
    ):
        write_json(other / "config.json", config)
        write_json(other / file, config | change)
        with refused(
            "fused with other settings: the configuration of .*base had the SHA-256"
        ):
            ask()


def test_a_changed_task_is_refused_and_rows_that_trained_are_left_out_of_another(
    base, tmp_path
):
    """Sorted, the same rows are divided otherwise by their numbers."""
    rows = [
        json.dumps({"input": f"the {a} {b}", "target": _ANSWERS[b]})
        for a in _ANSWERS
        for b in _ANSWERS
    ]
    file = tmp_path / "all.jsonl"
    file.write_text("\n".join(rows))
    options = _options(base, file, tmp_path, train_rows=8)
    lf.fuse(options)
    folder = runs.run_path(options)
    tested = {row["input"] for row in runs.RunFolder(folder).predictions()}
    own = recipes.evaluate(run=folder)
    file.write_text("\n".join(sorted(rows)))
    with refused(
        "all.jsonl has other rows than .* was fused on: restore them, .* --task"
    ):
        recipes.evaluate(run=folder)
    other = runs.EvaluateOptions(run=folder, task=str(file))
    assert {
        row.input for row in runs.load_to_evaluate(other)[0].task.test
    } == tested and len(tested) == 8
    for row, of_own in zip(runs.evaluate_run(other), own, strict=True):
        assert row == of_own | {"loss": pytest.approx(of_own["loss"], rel=1e-5)}
    file.write_text(
        "\n".join(row for row in rows if json.loads(row)["input"] not in tested)
    )
    with refused("was trained on the inputs of all rows of .*all.jsonl: give others"):
        runs.evaluate_run(other)


@pytest.mark.parametrize(("chat", "answer"), [(False, " cold"), (True, " cold\n\nQ")])
def test_examples_in_the_prompt_end_an_answer_before_further_examples(
    chat, answer, base, task, tmp_path, monkeypatch
):
    options = _options(base, task, tmp_path, method="few-shot", chat=chat, test_rows=2)
    tokenizer = lf.io.open_base(options.base).tokenizer
    said = tokenizer(" cold\n\nQ", add_special_tokens=False)["input_ids"]
    prompts = []

    def generate_rows(params, read, test, **_):
        prompts.extend(map(tokenizer.decode, test.inputs))
        return np.array([[said + [small_llama.END] * (6 - len(said))] * len(test)])

    monkeypatch.setattr(evaluation, "generate_rows", generate_rows)
    results = lf.fuse(options)
    assert [
        row["prediction"]
        for row in runs.RunFolder(runs.run_path(options)).predictions()
    ] == [answer] * 2
    assert results.seeds[0]["exact_match"] == (0 if chat else 50)
    shown = r"((the )*\w+ (cold|short|old|the gold)\n\n){2}"
    around = (
        (r"<\|im_start\|>user\n", r"<\|im_end\|>\n<\|im_start\|>assistant\n")
        if chat
        else ("<s>", "")
    )
    for prompt, asked in zip(prompts, ("hot", "the tall"), strict=True):
        assert re.fullmatch(f"{around[0]}{shown}{asked}{around[1]}", prompt)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt": "the cold gold is " * 40 + "{input}"},
            r"row 1, '.*', has \d+ tokens, .* context holds 160",
        ),
        (
            {"max_new_tokens": 158},
            r"row 1, 'hot', has 3 .* answer of up to 158: .* \(--max-new-tokens\)",
        ),
        (
            {"method": "few-shot", "shots": 12, "max_new_tokens": 99},
            r"row \d, .* fewer examples in the prompt",
        ),
    ],
)
def test_a_row_longer_than_the_context_stops_before_the_weights_are_read(
    changes, message, base, task, tmp_path
):
    no_weights = tmp_path / "base"
    no_weights.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (no_weights / path.name).write_bytes(path.read_bytes())
    options = _options(no_weights, task, tmp_path, **changes)
    with refused(message):
        lf.fuse(options)
    assert not runs.run_path(options).exists()
    with refused("has no weights"):
        lf.fuse(_options(no_weights, task, tmp_path))


def test_chat_needs_a_template(task, tmp_path):
    plain = small_llama.make(tmp_path / "plain", chat_template=None)
    with refused(
        "plain has no chat template: leave out --chat, and describe the task with"
    ):
        runs.load_setup(_options(plain, task, tmp_path, chat=True))
    conversation = [
        {"role": "user", "content": "hot"},
        {"role": "assistant", "content": "cold"},
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join([json.dumps({"messages": conversation})] * 3))
    with refused("rows.jsonl, line 1 is a conversation, .*: give --chat"):
        runs.load_setup(_options(plain, rows, tmp_path, train_rows=1))


# A base model as it is.


def _ask(base, monkeypatch, text, **changes):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    options = runs.GenerateOptions(base=str(base), max_new_tokens=8, **changes)
    return (
        ["".join(answer) for answer in runs.stream_lines(options)]
        if options.stream
        else runs.generate_lines(options)
    )


def test_a_base_model_answers_without_a_run(base, monkeypatch):
    plain = _ask(base, monkeypatch, "hot\nbold\n", chat=False)
    chat = _ask(base, monkeypatch, "hot\nbold\n", chat=True)
    assert len(plain) == len(chat) == 2 and plain != chat
    assert _ask(base, monkeypatch, "hot\nbold\n", chat=True, stream=True) == chat


@pytest.mark.parametrize("stream", [False, True])
def test_each_line_gets_an_answer_and_a_blank_line_an_empty_one(
    base, monkeypatch, stream
):
    odd = "hot\u2028bold\x85bold\x0bbold\x0cbold\x1cbold"  # only line breaks end a line
    hot, bold, of_odd = _ask(base, monkeypatch, f"hot\nbold\n{odd}\n")
    assert _ask(base, monkeypatch, f"\nhot\n \n{odd}\n\nbold\r\n", stream=stream) == [
        "",
        hot,
        "",
        of_odd,
        "",
        bold,
    ]
    draw = functools.partial(
        _ask, base, monkeypatch, sampling=lf.Sampling(temperature=1.0), stream=stream
    )
    assert draw("\nhot\n")[1] == draw("bold\nhot\n")[1]


def test_padding_is_a_token_that_the_model_has(base, monkeypatch, tmp_path):
    """Some tokenizers have one more token than the model, for padding: NaN in its place would reach whole rows."""
    shutil.copytree(base, tmp_path / "base")
    tokenizer = small_llama.make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "base")
    assert tokenizer.pad_token_id == lf.read_config(base).vocab_size
    text = "hot\nthe bold gold is old\n"
    assert _ask(tmp_path / "base", monkeypatch, text) == _ask(base, monkeypatch, text)


def test_draws_depend_on_the_seed_and_the_line_alone(base, monkeypatch):
    sampling = lf.Sampling(temperature=1.0, top_k=200, top_p=0.95)
    text = "hot\nbold\nhot\n"
    ask = functools.partial(_ask, base, monkeypatch, sampling=sampling)
    drawn = ask(text)
    assert drawn[0] != drawn[2]
    assert ask(text, eval_batch=1) == drawn
    assert ask(text, stream=True) == drawn
    assert ask("hot\n")[0] == drawn[0]
    assert ask(text, sampling_seed=1) != drawn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"base": None},
            "give one model: a fused run with --run, or an unchanged base model with --base",
        ),
        ({"run": Path("run")}, "give one model"),
        (
            {"base": None, "run": Path("run"), "chat": True},
            "a run uses the chat template if it was fused with it",
        ),
        ({"seed": 1}, "a base model has no seeds: leave out --seed"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: "),
        ({"sampling_seed": 2**32}, "sampling_seed is 4294967296: "),
        (
            {"max_new_tokens": 200},
            r"row 1, 'hot', has \d+ tokens, .*: the model's context holds 160",
        ),
    ],
)
def test_options_without_an_answer_are_refused(changes, message, base, tmp_path):
    (tmp_path / "lines").write_text("hot\n")
    options = dataclasses.replace(
        runs.GenerateOptions(base=str(base), file=tmp_path / "lines"), **changes
    )
    with refused(message):
        runs.generate_lines(options)
    with refused(message):
        next(runs.stream_lines(options))
