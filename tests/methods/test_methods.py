"""Every method as a run: what it reports, what it counts, that it is loaded, evaluated and exported as it was."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import one_block
import pytest
import recipes
from json_files import read_json, write_rows
from refusals import refused
from safetensors.numpy import load_file

import lorafusion_jax as lf
from lorafusion_jax.estimates.params import counts
from lorafusion_jax.tasks import load_task, split

_SEEDS = (1, 2)
# of 100 rows
_ADAPT = 95
_VALIDATE = 5

# Method -> (its name in the table of counts, rows passed forward and backward by a seed of two epochs).
_TRAINED = {
    "fusion": "LoRAFusion",
    "coefficients": "LoRAFusion, coefficients only",
    "magnitudes": "LoRAFusion, magnitudes only",
    "lora": "LoRA, rank 4",
    "dora": "DoRA, rank 4",
    "vera": "VeRA, rank 8",
    "full": "full fine-tuning",
}
_SEARCHED = {"lorahub": 4, "single": 2}  # evaluations of the training rows
_METHODS = [
    *_TRAINED,
    *_SEARCHED,
    "mean",
    "merge",
    "cat",
    "zero-shot",
    "few-shot",
    "constant",
]
_ADAPTERS = [
    method
    for method in _METHODS
    if method not in ("full", "zero-shot", "few-shot", "constant")
]
# Fusion, the method that others are compared with, and some that compile little; other files run the other ones.
_SHORT = ("fusion", "single", "merge", "few-shot")
# They compile most; tests/test_families.py runs them too.
_NIGHTLY = ("dora", "vera", "full")


def _cases(methods):
    tiers = dict.fromkeys(_SHORT, ()) | dict.fromkeys(_NIGHTLY, pytest.mark.nightly)
    return [
        pytest.param(method, marks=tiers.get(method, pytest.mark.long))
        for method in methods
    ]


def _options(small, out, method, **changes):
    """`cat` is the method merge with that rule."""
    values = {
        "evaluations": 4,
        "shots": 2,
        "name": method,
        "method": method,
    }
    return recipes.small_run(
        small,
        out,
        **values
        | ({"method": "merge", "merge": "cat"} if method == "cat" else {})
        | changes,
    )


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """Method -> (options, results), each run once."""
    out = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(method):
        options = _options(small, out, method)
        return options, lf.fuse(options)

    return run


def _strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("method", _cases(_METHODS))
def test_a_run_reports_and_counts_and_is_evaluated_alike(method, runs):
    options, results = runs(method)
    seeds = _SEEDS[:1] if method == "zero-shot" else _SEEDS
    assert [row["seed"] for row in results.seeds] == list(seeds)
    written = (lf.runs.run_path(options) / "results.json").read_text()
    assert _strict(written) == dataclasses.asdict(results)
    for line in lf.runs.RunFolder(lf.runs.run_path(options)).metrics():
        _strict(json.dumps(line))
    forward = 0
    backward = 0
    steps = 0
    if method in _TRAINED:
        forward = 2 * (_ADAPT + _VALIDATE)
        backward = 2 * _ADAPT
        steps = 2 * 2
    if method in _SEARCHED:
        forward = _SEARCHED[method] * _ADAPT
        steps = _SEARCHED[method]
    table = counts(lf.read_config(options.base), modules=2, rank=4, vera_rank=8)
    trainable = (
        {"lorahub": 2}.get(method, 0)
        if method not in _TRAINED
        else table[_TRAINED[method]]
    )
    assert results.trainable == sum(results.trainable_by_group.values()) == trainable

    for row in results.seeds:
        assert (row["forward_rows"], row["backward_rows"], row["steps"]) == (
            forward,
            backward,
            steps,
        )
        assert row["option_accuracy"] is None  # an open task
        assert 0 <= row["exact_match"] <= 100
        assert (row["loss"] is None) == (method == "constant")
        pooled = method in (
            *_SEARCHED,
            "fusion",
            "coefficients",
            "mean",
            "merge",
            "cat",
        )
        assert len(row["modules"]) == (2 if pooled else 0)
    rows = lf.runs.evaluate_run(lf.runs.EvaluateOptions(run=lf.runs.run_path(options)))
    assert rows == [
        {k: s[k] for k in ("seed", "exact_match", "option_accuracy", "loss")}
        for s in results.seeds
    ]


def test_the_best_single_module_is_the_one_of_least_loss(runs):
    options, results = runs("single")
    folder = lf.runs.run_path(options)
    _, params, _ = lf.load_run(folder)
    lines = lf.runs.RunFolder(folder).metrics()
    for s, seed in enumerate(results.seeds):
        tried = [line for line in lines if line["seed"] == seed["seed"]]
        assert [line["module"] for line in tried] == seed["modules"]
        least = min(range(2), key=lambda n: tried[n]["score"])
        np.testing.assert_array_equal(params["coefficients"][s], np.eye(2)[least])


@pytest.mark.parametrize(
    "method", [pytest.param("few-shot", marks=pytest.mark.long), "constant"]
)
def test_only_a_seeds_own_five_rows_count(method, small, tmp_path):
    rows = load_task(recipes.TASK).train
    own = split(len(rows), (1,), limit=5).train[0]
    others = np.setdiff1d(range(len(rows)), own)
    said = []
    for changed in ((), others, own):
        task = tmp_path / f"{len(changed)}"
        shutil.copytree(recipes.TASK, task)
        lines = [
            {"context": row.input, "completion": "z" if i in changed else row.target}
            for i, row in enumerate(rows)
        ]
        write_rows(task / "train.jsonl", lines)
        options = _options(
            small,
            tmp_path / "runs",
            method,
            seeds=(1,),
            task=str(task),
            train_rows=5,
            name=task.name,
        )
        (row,) = lf.fuse(options).seeds
        said.append((row["loss"], recipes.answers(options, 1)))
    assert said[0] == said[1] != said[2]
    if method == "constant":
        assert set(said[2][1]) == {"z"}


def _exported(runs, method, form, tmp_path):
    options, _ = runs(method)
    lf.runs.export(
        lf.runs.ExportOptions(
            out=tmp_path / form, run=lf.runs.run_path(options), seed=2, format=form
        )
    )
    (file,) = (tmp_path / form).glob("*.safetensors")
    return load_file(file)


def _in_peft(adapter, config, base):
    """Return the base's weights [d_out, d_in] with what PEFT makes of those that an adapter names, in float64."""
    weights = {name: tensor.astype(np.float64) for name, tensor in base.items()}
    for path in config["target_modules"]:
        pieces = {
            kind: adapter[f"base_model.model.{path}.{kind}"].astype(np.float64)
            for kind in [
                "lora_A.weight",
                "lora_B.weight",
                *["lora_magnitude_vector"] * config["use_dora"],
            ]
        }
        W = weights[f"{path}.weight"]
        W = (
            W
            + config["lora_alpha"]
            / config["r"]
            * pieces["lora_B.weight"]
            @ pieces["lora_A.weight"]
        )
        if config["use_dora"]:
            W = (
                W
                * (pieces["lora_magnitude_vector"] / np.linalg.norm(W, axis=1))[:, None]
            )
        weights[f"{path}.weight"] = W
    return weights


@pytest.mark.parametrize("method", _cases(_ADAPTERS))
def test_an_exported_adapter_is_the_exported_model(method, runs, small, tmp_path):
    merged = _exported(runs, method, "merged", tmp_path)
    adapter = _exported(runs, method, "adapter", tmp_path)
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert len(adapter) == len(config["target_modules"]) * (
        3 if config["use_dora"] else 2
    )
    wanted = _in_peft(adapter, config, load_file(small[0] / "model.safetensors"))
    assert merged.keys() == wanted.keys()
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor, wanted[name], rtol=1e-4, atol=1e-5)
    assert config["use_dora"] == (method in ("fusion", "magnitudes", "dora"))
    # No larger than it need be: a single module is itself, and magnitudes need an update of one rank.
    ranks = {
        "single": 16,
        "magnitudes": 1,
        "lora": 4,
        "dora": 4,
        "vera": 8,
        "merge": 16,
        "mean": 32,
        "cat": 32,
    }
    assert config["r"] == ranks.get(method, config["r"])


@pytest.mark.parametrize(
    "method",
    _cases(["fusion", "magnitudes", "dora", "vera", "full", "single", "merge"]),
)
def test_an_exported_model_says_what_the_run_says(method, runs, small, tmp_path):
    options, results = runs(method)
    if method == "full":
        with refused("fine-tuned all weights, .* export it with --format merged"):
            _exported(runs, method, "adapter", tmp_path)
    _exported(runs, method, "merged", tmp_path)
    zero = _options((tmp_path / "merged", small[1]), tmp_path, "zero-shot")
    (row,) = lf.fuse(zero).seeds
    assert row["loss"] == pytest.approx(results.seeds[1]["loss"], rel=1e-4)
    assert recipes.answers(zero, 1) == recipes.answers(options, 2)


@pytest.mark.parametrize("method", ["lorahub", "merge"])
def test_a_dora_adapter_is_refused_where_its_magnitudes_have_no_place(
    method, small, tmp_path
):
    adapter = sorted(small[1].iterdir())[0]
    one_block.copy_as_dora(adapter, tmp_path / "pool" / "dora")
    options = _options(small, tmp_path, method, pool=str(tmp_path / "pool"))
    with refused(r"DoRA adapter.* magnitudes"):
        lf.fuse(options)
    assert not lf.runs.run_path(options).exists()


def test_methods_without_an_adapter_are_not_exported(runs, tmp_path):
    (tmp_path / "text").write_text("double then digit : a b c")
    with refused("of the method few-shot, which trains nothing"):
        _exported(runs, "few-shot", "adapter", tmp_path)
    with refused("of few-shot, which needs rows of its task"):
        lf.runs.generate_lines(
            lf.runs.GenerateOptions(
                run=lf.runs.run_path(runs("few-shot")[0]), file=tmp_path / "text"
            )
        )
    assert not (tmp_path / "adapter").exists()


@pytest.mark.nightly
def test_arrays_hold_what_a_run_reads(runs):
    """A merge is a module of its own, next to the base's arrays; a merge by `cat` reads the pool's."""
    sites = {}
    for method in ("merge", "cat"):
        options, results = runs(method)
        # Of the base, the values alone are in arrays: every kind of matrix is a program of its own.
        digital = ("head", "*.ff.*", "*.q", "*.k", "*.o")
        asked = lf.hardware.EvaluateOnChipsOptions(
            run=lf.runs.run_path(options),
            crossbar="isaac",
            calibration_rows=4,
            keep_digital=digital,
        )
        found = lf.hardware.report_on_chips(asked)
        for digital, row in zip(found["digital"], results.seeds, strict=True):
            assert digital["loss"] == pytest.approx(row["loss"], rel=1e-5)
        for on_chip, row in zip(found["chips"][0]["seeds"], results.seeds, strict=True):
            assert on_chip["loss"] == pytest.approx(row["loss"], rel=1e-3)
        sites[method] = {site["site"] for site in found["sites"]}
    assert {site.partition(".")[0] for site in sites["cat"] - sites["merge"]} == {
        "pool"
    }
    assert sites["merge"] < sites["cat"] and not any(
        site.startswith("pool") for site in sites["merge"]
    )


def test_bad_options_stop_before_anything_is_written(small, tmp_path):
    control = {"control": "random-factors"}
    wrong = {"lora_targets": ("q", "w")}
    cases = [
        ("lora", control, "the method lora has no pool to replace"),
        ("vera", wrong, "lora_targets are q w: choose of q k v o"),
        (
            "merge",
            {"control": "shuffled", "load_in": "nf4"},
            "the shuffled control is drawn in full precision",
        ),
        ("full", {"load_in": "nf4"}, "full trains weights, not 4 or 8 bits of them"),
        (
            "mean",
            {"start_from": small[0]},
            "the method mean starts from no run: .*--from",
        ),
        (
            "few-shot",
            {"shots": 6, "train_rows": 5},
            "prompts of 6 examples, but 5 .* --shots",
        ),
    ]
    for method, changes, message in cases:
        options = _options(small, tmp_path, method, **changes)
        with refused(message):
            lf.fuse(options)
        assert not lf.runs.run_path(options).exists()
