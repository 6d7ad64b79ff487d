"""A family other than T5's goes through every command: a small Llama, with random weights."""

import functools
import json
import math
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
import small_llama
import tiny
from json_files import read_json
from safetensors.numpy import load_file

import lorafusion_jax as lf
from lorafusion_jax import hardware, runs
from lorafusion_jax.crossbar import PRESETS as ARRAYS
from lorafusion_jax.estimates.params import counts
from lorafusion_jax.models.decoder import FAMILY
from lorafusion_jax.training.mesh import partition, rules

_QUICK = {
    "modules": 2,
    "epochs": 1,
    "batch_size": 6,
    "lora_rank": 2,
    "vera_rank": 3,
    "evaluations": 3,
    "shots": 2,
    "max_new_tokens": 4,
}
# Methods that the usual tests run: one that trains, and those that compile little.
_SHORT = ("lora", "zero-shot", "constant")
_TARGETS = ["down_proj", "o_proj", "q_proj"]
_ADAPTED = (
    "decoder.self_attn.q_proj",
    "decoder.self_attn.o_proj",
    "decoder.mlp.down_proj",
)


class _Family(NamedTuple):
    """A base, three adapters, their pool, and a task that the base's tokenizer reads."""

    folder: Path
    base: Path
    config: lf.Architecture
    adapters: list[Path]
    pool: Path
    task: Path

    def options(self, name, **changes):
        """Return the options of a short run."""
        values = {
            "base": str(self.base),
            "task": str(self.task),
            "seeds": (1,),
            "test_rows": 4,
            "out": self.folder / "runs",
            "name": name,
        }
        if lf.METHODS[changes.get("method", "fusion")].pool:
            values["pool"] = str(self.pool)
        return recipes.options(_QUICK, **values | changes)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    base = small_llama.make(
        folder / "base", num_attention_heads=4, num_key_value_heads=2, vocab_size=320
    )
    config = lf.read_config(base)
    # Prompts have different lengths.
    answers = {"hot": "cold", "tall": "short"}
    rows = [
        {"input": f"{'the ' * (i % 3)}{word}", "target": f"{answers[word]} {i}"}
        for i, word in enumerate([*answers] * 6)
    ]
    (folder / "task").mkdir()
    for part, chosen in (("train", rows), ("test", rows[:4])):
        lines = "\n".join(map(json.dumps, chosen))
        (folder / "task" / f"{part}.jsonl").write_text(lines)
    rng = np.random.default_rng(0)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": _TARGETS}
    adapters = [folder / "adapters" / f"adapter_{number}" for number in range(3)]
    for adapter in adapters:
        tensors = tiny.lora_tensors(config, rng.standard_normal, 2)
        adapted = {
            name: tensor
            for name, tensor in tensors.items()
            if name.split(".")[-3] in _TARGETS
        }
        lf.io.write_adapter(adapter, fields, adapted)
    _convert(base, adapters, folder / "pool")
    return _Family(folder, base, config, adapters, folder / "pool", folder / "task")


def _convert(base, adapters, out):
    paths = tuple(map(str, adapters))
    lf.io.convert(lf.io.ConvertOptions(base=str(base), adapters=paths, out=out))


@pytest.fixture(scope="module")
def run(family):
    """Two seeds of a fusion."""
    options = family.options("fusion", seeds=(1, 2))
    lf.fuse(options)
    return options.out / "fusion"


@pytest.fixture(scope="module")
def results(family):
    """A function from a method to the results of its run with one seed."""
    return functools.cache(
        lambda method: lf.fuse(family.options(method, method=method))
    )


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=() if name in _SHORT else pytest.mark.long)
        for name in lf.METHODS
        if name != "fusion"
    ],
)
def test_every_method_runs(family, method, results):
    (row,) = results(method).seeds
    assert 0 <= row["exact_match"] <= 100
    assert row["loss"] is None if method == "constant" else math.isfinite(row["loss"])
    entry = lf.METHODS[method]
    if entry.title is not None:
        trained = counts(
            family.config,
            modules=2,
            rank=2,
            vera_rank=3,
            basis=None,
            targets=_TARGETS if entry.pool else None,
        )
        title = entry.title.format(lora_rank=2, vera_rank=3)
        assert results(method).trainable == trained[title]


@pytest.mark.parametrize(
    ("load_in", "method", "rel"), [("nf4", "mean", 0.1), ("int8", "zero-shot", 0.01)]
)
def test_a_base_in_few_bits(family, load_in, method, rel, results):
    options = family.options(f"{load_in}-{method}", load_in=load_in, method=method)
    (row,) = lf.fuse(options).seeds
    (exact,) = results(method).seeds
    assert row["loss"] == pytest.approx(exact["loss"], rel=rel)
    assert row["loss"] != exact["loss"]


@pytest.mark.parametrize(
    ("model_type", "name", "spec"),
    [
        ("phi3", "base/decoder/self_attn/qkv_proj/kernel", (None, None, "model")),
        ("phi3", "base/decoder/mlp/down_proj/kernel", (None, "model", None)),
        ("qwen2", "base/decoder/self_attn/q_proj/kernel", (None, None, "model")),
        ("qwen2", "base/decoder/self_attn/o_proj/kernel", (None, "model", None)),
        ("qwen3", "base/decoder/self_attn/q_norm/scale", (None, None)),
        ("qwen3", "base/decoder/input_norm/scale", (None, None)),
        ("qwen2", "pool/A/decoder.mlp.down_proj", (None, None, "model", None)),
        ("qwen2", "pool/B/decoder.self_attn.q_proj", (None, None, None, "model")),
    ],
)
def test_a_mesh_splits_matrices_as_the_sites_say(model_type, name, spec):
    changes = {"vocab_size": 40, "model_type": model_type}
    config = FAMILY.read_config(small_llama.CONFIG | changes)
    assert tuple(partition(name, len(spec), rules(config))) == spec


@pytest.mark.long
def test_chips_hold_every_matrix_that_is_not_digital(family, run, tmp_path):
    digital = ("*.[kvo]_proj", "*.mlp.*")
    chips = tmp_path / "chips.json"
    written = hardware.write_chips(
        hardware.ProgramOptions(
            base=str(family.base),
            pool=str(family.pool),
            out=chips,
            crossbar="isaac",
            keep_digital=digital,
        )
    )
    factors = [f"pool.{factor}.{site}" for factor in "AB" for site in _ADAPTED]
    assert written["cells_sha256"].keys() == {
        name
        for name in [*family.config.sites, *factors]
        if not any(fnmatch(name, rule) for rule in digital)
    }
    options = hardware.EvaluateOnChipsOptions(
        run=run, crossbar=str(chips), norm="programmed", calibration_rows=4, test_rows=4
    )
    report = hardware.report_on_chips(options)
    on_chips = report["chips"][0]["seeds"]
    for exact, on_chip in zip(report["digital"], on_chips, strict=True):
        assert on_chip["loss"] == pytest.approx(exact["loss"], rel=1e-2)


def test_an_exported_fusion_is_read_as_an_adapter_and_merged(family, run, tmp_path):
    adapter = tmp_path / "adapter"
    runs.export(runs.ExportOptions(out=adapter, run=run, seed=2))
    fields = read_json(adapter / "adapter_config.json")
    assert fields["task_type"] == "CAUSAL_LM" and fields["use_dora"]
    again = lf.read_pool([str(adapter)], family.config)
    assert again.magnitude is not None and again.sites == _ADAPTED

    merged = tmp_path / "merged"
    setup = _check_merged(run, merged, seeds=(1, 2))
    template = lf.load_tokenizer(str(merged)).chat_template
    assert template == setup.tokenizer.chat_template


def _check_merged(run, merged, seeds):
    """Export the last seed, merged, compare its logits with the fusion's, and return the run's setup."""
    options = runs.ExportOptions(out=merged, run=run, seed=seeds[-1], format="merged")
    runs.export(options)
    run_options, params, _ = lf.load_run(run)
    setup = runs.load_setup(run_options)
    place = len(seeds) - 1
    problem = setup.problem.replace(index=setup.problem.index[place])
    model, adapters, _ = problem.adapted_model(jax.tree.map(lambda p: p[place], params))
    ids = jnp.array([[5, 6, 7]])
    labels = jnp.array([[8, 9, 1]])
    fused = model.label_logits(ids, ids > 0, labels, adapters)
    logits = lf.load_base(merged).label_logits(ids, ids > 0, labels, {})
    np.testing.assert_allclose(logits, fused, atol=1e-4)
    return setup


def test_a_pool_that_changes_the_head(family, tmp_path):
    """The base's head is tied, and the merged one is not."""
    rng = np.random.default_rng(1)
    config = family.config
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    shapes = {
        "base_model.model.lm_head.lora_A.weight": (2, config.d_model),
        "base_model.model.lm_head.lora_B.weight": (config.vocab_size, 2),
    }
    folders = []
    for adapter in family.adapters[:2]:
        tensors = load_file(adapter / "adapter_model.safetensors")
        for name, shape in shapes.items():
            tensors[name] = rng.standard_normal(shape, np.float32)
        folders.append(tmp_path / adapter.name)
        lf.io.write_adapter(folders[-1], fields, tensors)
    _convert(family.base, folders, tmp_path / "pool")
    options = family.options("head", pool=str(tmp_path / "pool"))
    lf.fuse(options)
    _check_merged(options.out / "head", tmp_path / "merged", seeds=(1,))
    assert config.tied and not lf.load_base(tmp_path / "merged").config.tied


def test_a_plan_and_the_costs_of_methods(family):
    text = lf.estimates.describe_run(family.options("plan", seeds=(1, 2)))
    assert "2 batches of 6 rows" in text and "tokenised, padded" in text
    assert f"| fusion |    2 |        {2 + 3 * 16} |" in text
    options = lf.estimates.CostOptions(
        targets=("v_proj",), bases=(), modules=2, rank=2, source=8, target=4
    )
    costs = lf.estimates.task_costs(family.config, ARRAYS["isaac"], options)
    assert all(0 < cost.reads.low < cost.token.low for cost in costs.values())
