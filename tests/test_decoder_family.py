"""A small Llama goes through every command: what works for T5 works for a decoder-only model."""

import functools
import json
import math
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
import small_llama
from safetensors.numpy import save_file

from lorafusion_jax._fuse import fuse
from lorafusion_jax.adapters.coefficients import column_names
from lorafusion_jax.crossbar import PRESETS as ARRAYS
from lorafusion_jax.estimates.bill.activity import activities
from lorafusion_jax.estimates.bill.bill import bills
from lorafusion_jax.estimates.bill.options import CostOptions
from lorafusion_jax.estimates.memory import weights_bytes
from lorafusion_jax.estimates.params import counts
from lorafusion_jax.estimates.plan import describe_run
from lorafusion_jax.hardware.evaluate import EvaluateOnChipsOptions
from lorafusion_jax.hardware.report import report_on_chips
from lorafusion_jax.hardware.write import ProgramOptions, write_chips
from lorafusion_jax.io.convert import ConvertOptions, convert
from lorafusion_jax.io.hf import load_base, load_tokenizer, read_config
from lorafusion_jax.io.pool import load_pool, read_pool
from lorafusion_jax.methods import METHODS
from lorafusion_jax.models.architecture import Architecture, linear_shapes
from lorafusion_jax.models.decoder.shapes import SHAPES
from lorafusion_jax.runs.export import ExportOptions, export
from lorafusion_jax.runs.options import FuseOptions
from lorafusion_jax.runs.prepare import prepare
from lorafusion_jax.runs.run import load_run
from lorafusion_jax.training.mesh import partition, rules

_ADAPTED = ("q_proj", "o_proj", "down_proj")
_SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
_RANK = 2
_QUICK = {
    "modules": 2,
    "epochs": 1,
    "batch_size": 6,
    "lora_rank": 2,
    "vera_rank": 3,
    "evaluations": 3,
    "generations": 1,
    "population": 4,
    "shots": 2,
    "max_new_tokens": 4,
}
# One that trains, one that mixes the pool, and those that compile little.
_SHORT = ("lora", "zero-shot", "constant")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return small_llama.make(tmp_path_factory.mktemp("llama") / "base", **_SIZES)


@pytest.fixture(scope="module")
def config(base) -> Architecture:
    return read_config(base)


@pytest.fixture(scope="module")
def adapters(config, tmp_path_factory) -> list[Path]:
    """Three PEFT adapters."""
    folder, rng = tmp_path_factory.mktemp("adapters"), np.random.default_rng(0)
    for number in range(3):
        tensors = {}
        for path, (d_in, d_out) in linear_shapes(config).items():
            if path.rpartition(".")[2] in _ADAPTED:
                for factor, shape in (("lora_A", (_RANK, d_in)), ("lora_B", (d_out, _RANK))):
                    tensors[f"base_model.model.{path}.{factor}.weight"] = rng.standard_normal(shape, np.float32)
        (folder / f"adapter_{number}").mkdir()
        fields = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 1, "target_modules": [*_ADAPTED]}
        (folder / f"adapter_{number}" / "adapter_config.json").write_text(json.dumps(fields))
        save_file(tensors, folder / f"adapter_{number}" / "adapter_model.safetensors", metadata={"format": "pt"})
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def pool(base, adapters, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "pool"
    convert(ConvertOptions(base=str(base), adapters=tuple(map(str, adapters)), out=out))
    return out


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Two tasks with prompts of different lengths: answers recur in `closed` and so are options, but not in `open`."""
    folder = tmp_path_factory.mktemp("tasks")
    answers = {"hot": "cold", "tall": "short"}
    words = [*answers] * 6
    for name in ("closed", "open"):
        (folder / name).mkdir()
        rows = [
            {"input": f"{'the ' * (i % 3)}{word}", "target": answers[word] + f" {i}" * (name == "open")}
            for i, word in enumerate(words)
        ]
        for part, chosen in (("train", rows), ("test", rows[:4])):
            (folder / name / f"{part}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    return folder


@pytest.fixture(scope="module")
def asked(base, pool, tasks, tmp_path_factory) -> Callable[..., FuseOptions]:
    """A function from a name and further options to the options of a short run."""
    out = tmp_path_factory.mktemp("runs")

    def options(name: str, task: str = "closed", **changes) -> FuseOptions:
        recipe = _QUICK | changes.pop("recipe", {})
        values = {"base": str(base), "task": str(tasks / task), "seeds": (1,), "out": out, "name": name}
        if METHODS[changes.get("method", "fusion")].pool:
            values["pool"] = str(pool)
        return recipes.options(recipe, **values | changes)

    return options


@pytest.fixture(scope="module")
def run(asked) -> Path:
    """Two seeds of a fusion."""
    options = asked("fusion", seeds=(1, 2))
    fuse(options)
    return options.out / "fusion"


@pytest.fixture(scope="module")
def done(asked) -> Callable[[str], dict]:
    """A function from a method to the results of its run with one seed."""
    return functools.cache(lambda method: fuse(asked(method, "open", method=method)))


def test_a_converted_pool_is_the_adapters(pool, adapters, config):
    manifest = json.loads((pool / "manifest.json").read_text())
    assert manifest["base"]["family"] == "decoder"
    loaded = load_pool(pool)
    straight = read_pool([*map(str, adapters)], config)
    sites = ["decoder.self_attn.q_proj", "decoder.self_attn.o_proj", "decoder.mlp.down_proj"]
    assert list(loaded.A) == list(loaded.sites) == sites
    for site in sites:
        np.testing.assert_array_equal(loaded.A[site], straight.A[site])
        np.testing.assert_array_equal(loaded.B[site], straight.B[site])
    assert column_names(loaded, "block") == ["decoder.0"]


def test_an_adapter_of_another_family_is_refused(base, adapters, tmp_path):
    small = Path(__file__).resolve().parent.parent / "examples" / "small"
    cases = [
        (base, small / "adapters" / "sort_dash", r"\S+SelfAttention.*, a module of T5.*, and the base is one of Llama"),
        (small / "base", adapters[0], r"model\.layers\.0.*, a module of Llama.*, and the base is one of T5"),
    ]
    for of, adapter, message in cases:
        with pytest.raises(ValueError, match=rf"wrong base\?.* no linear module {message}"):
            convert(ConvertOptions(base=str(of), adapters=(str(adapter),), out=tmp_path / "pool"))


@pytest.mark.long
def test_two_seeds_are_trained_and_evaluated(run):
    results = json.loads((run / "results.json").read_text())
    # A coefficient for each of two modules, and a magnitude for each column of the adapted matrices.
    assert results["trainable_by_group"] == {"coefficients": 2, "magnitudes": 3 * 16}
    assert len(results["seeds"]) == 2
    for row in results["seeds"]:
        assert math.isfinite(row["loss"]) and 0 <= row["option_accuracy"] <= 100


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=() if name in _SHORT else pytest.mark.long) for name in METHODS if name != "fusion"],
)
def test_every_method_runs(method, done, config):
    results = done(method)
    (row,) = results["seeds"]
    assert 0 <= row["exact_match"] <= 100
    assert row["loss"] is None if method == "constant" else math.isfinite(row["loss"])
    if METHODS[method].title is not None:
        targets = _ADAPTED if METHODS[method].pool else None
        found = counts(config, modules=2, rank=_RANK, vera_rank=3, basis=None, targets=targets)
        assert results["trainable"] == found[METHODS[method].title.format(lora_rank=_RANK, vera_rank=3)]


@pytest.mark.parametrize(
    ("load_in", "method", "rel"),
    [
        ("nf4", "mean", 0.1),
        pytest.param("nf4", "coefficients", 0.1, marks=pytest.mark.long),
        ("int8", "zero-shot", 0.01),
    ],
)
def test_a_base_in_few_bits(load_in, method, rel, asked, done):
    (row,) = fuse(asked(f"{load_in}-{method}", "open", load_in=load_in, method=method))["seeds"]
    (wanted,) = done(method)["seeds"]
    assert row["loss"] == pytest.approx(wanted["loss"], rel=rel) and row["loss"] != wanted["loss"]


@pytest.mark.nightly
def test_a_mesh_gives_the_numbers_of_one_device(run, asked):
    options = asked("mesh", seeds=(1, 2), mesh="seed=2,model=2")
    fuse(options)
    (_, alone, _), (_, spread, _) = load_run(run), load_run(options.out / "mesh")
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_mesh_splits_matrices_as_the_sites_say():
    # Phi-3 has one matrix for queries, keys and values; Qwen2 has biases, and Qwen3 norms of queries and keys.
    phi, qwen2, qwen3 = (rules(SHAPES[name]) for name in ("phi-3-mini", "qwen2.5-7b", "qwen3-8b"))
    names = {
        ("base/decoder/self_attn/qkv_proj/kernel", 3, phi): (None, None, "model"),
        ("base/decoder/mlp/down_proj/kernel", 3, phi): (None, "model", None),
        ("base/decoder/self_attn/q_proj/kernel", 3, qwen2): (None, None, "model"),
        ("base/decoder/self_attn/o_proj/kernel", 3, qwen2): (None, "model", None),
        ("base/embedding", 2, qwen2): ("model", None),
        ("base/head", 2, qwen2): (None, "model"),
        ("base/decoder/self_attn/q_norm/scale", 2, qwen3): (None, None),
        ("base/decoder/input_norm/scale", 2, qwen3): (None, None),
        ("pool/A/decoder.mlp.down_proj", 4, qwen2): (None, None, "model", None),
        ("pool/B/decoder.self_attn.q_proj", 4, qwen2): (None, None, None, "model"),
    }
    assert {key: tuple(partition(key[0], key[1], key[2])) for key in names} == names


@pytest.mark.long
@pytest.mark.parametrize(
    "digital", [("*.[kvo]_proj", "*.mlp.*"), pytest.param((), marks=pytest.mark.nightly)], ids=["queries", "all"]
)
def test_chips_hold_every_matrix_that_is_not_digital(digital, base, pool, run, config, tmp_path):
    chips = tmp_path / "chips"
    write_chips(ProgramOptions(base=str(base), pool=str(pool), out=chips, crossbar="isaac", keep_digital=digital))
    files = {path.stem for path in (chips / "chip_0").iterdir()}
    adapted = [site for site in config.sites if site.rpartition(".")[2] in _ADAPTED]
    # The head is the embedding, which stays digital.
    matrices = [*config.sites, *(f"pool.{factor}.{site}" for factor in "AB" for site in adapted)]
    assert files == {name for name in matrices if not any(fnmatch(name, rule) for rule in digital)}
    asked = EvaluateOnChipsOptions(run=run, crossbar=str(chips), norm="programmed", calibration_rows=4, test_rows=4)
    results = report_on_chips(asked)
    assert (results["method"], results["norm"], results["age"]) == ("fusion", "programmed", None)
    for digital, on_chip in zip(results["digital"], results["chips"][0]["seeds"], strict=True):
        assert on_chip["loss"] == pytest.approx(digital["loss"], rel=1e-2)


def test_an_exported_fusion_is_read_as_an_adapter_and_merged(run, config, tmp_path):
    export(ExportOptions(out=tmp_path / "adapter", run=run, seed=2))
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["task_type"] == "CAUSAL_LM" and fields["use_dora"]
    assert fields["target_modules"] == sorted(
        path for path in linear_shapes(config) if path.rpartition(".")[2] in _ADAPTED
    )
    again = read_pool([str(tmp_path / "adapter")], config)
    assert again.magnitude is not None and len(again.sites) == 3

    export(ExportOptions(out=tmp_path / "merged", run=run, seed=2, format="merged"))
    options, params, _ = load_run(run)
    setup = prepare(options)
    problem = setup.problem.replace(index=setup.problem.index[1])
    model, adapters, _ = problem.adapted_model(jax.tree.map(lambda p: p[1], params))
    ids, labels = jnp.array([[5, 6, 7]]), jnp.array([[8, 9, 3]])
    wanted = model.label_logits(ids, ids > 0, labels, adapters)
    merged = load_base(tmp_path / "merged")
    np.testing.assert_allclose(merged.label_logits(ids, ids > 0, labels, {}), wanted, atol=1e-4)
    assert load_tokenizer(str(tmp_path / "merged")).chat_template == setup.tokenizer.chat_template


def test_a_plan_counts_what_a_run_needs(asked, run):
    said = describe_run(asked("plan", seeds=(1, 2)))
    assert "2 batches of 6 rows" in said and "tokenised, padded" in said
    trained = json.loads((run / "results.json").read_text())["trainable"]
    assert f"| fusion |    2 |        {trained} |" in said


def test_parameters_and_bytes_are_the_model_s(config):
    found = counts(config, modules=2, rank=3, basis=4, targets=["q_proj", "up_proj"])
    maps = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24
    assert found["full fine-tuning"] == maps + 320 * 16 + 3 * 16
    assert found["LoRAFusion"] == 2 + 16 + 24
    assert weights_bytes(config) == 4 * found["full fine-tuning"]


def test_a_bill_follows_the_block_s_stages(config):
    options = CostOptions(modules=2, rank=2, epochs=1, train_rows=20, source=8, target=4, targets=("v_proj",), bases=())
    found = {activity.method: activity for activity in activities(config, ARRAYS["isaac"], options)}
    # Queries with keys, values and their modules; the attention's end; gate and up; down. The head is the embedding.
    assert found["LoRAFusion"].stages == {
        frozenset({((16, 16),), ((16, 8),), ((16, 2), (2, 8))}): 1,
        frozenset({((16, 16),)}): 1,
        frozenset({((16, 24),)}): 1,
        frozenset({((24, 16),)}): 1,
    }
    priced = bills(config, ARRAYS["isaac"], options)
    assert all(bill.learning.typical > 0 < bill.inference.typical for bill in priced.values())
