"""A family other than T5's goes through every command: a small Llama, with random weights."""

import functools
import json
import math
from collections.abc import Callable
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

import lorafusion_jax as lf
from lorafusion_jax.crossbar import PRESETS as ARRAYS
from lorafusion_jax.estimates.params import counts
from lorafusion_jax.models.decoder import FAMILY
from lorafusion_jax.training.mesh import partition, rules

_SMALL = Path(__file__).resolve().parent.parent / "examples" / "small"
_RANK = 2
_ALPHA = 4
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
_ADAPTED = (
    "decoder.self_attn.q_proj",
    "decoder.self_attn.o_proj",
    "decoder.mlp.down_proj",
)


class _Case(NamedTuple):
    """A base, and a task that its tokenizer reads."""

    folder: Path
    base: Path
    config: lf.Architecture
    task: Path


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> _Case:
    """Prompts have different lengths. Answers of `closed` recur and so are options, those of `open` do not."""
    folder = tmp_path_factory.mktemp("llama")
    base = small_llama.make(
        folder / "base", num_attention_heads=4, num_key_value_heads=2, vocab_size=320
    )
    answers = {"hot": "cold", "tall": "short"}
    for name in ("closed", "open"):
        (folder / name).mkdir()
        rows = [
            {
                "input": f"{'the ' * (i % 3)}{word}",
                "target": answers[word] + f" {i}" * (name == "open"),
            }
            for i, word in enumerate([*answers] * 6)
        ]
        for part, chosen in (("train", rows), ("test", rows[:4])):
            (folder / name / f"{part}.jsonl").write_text(
                "\n".join(map(json.dumps, chosen))
            )
    return _Case(folder, base, lf.read_config(base), folder / "closed")


@pytest.fixture(scope="module")
def adapters(family) -> list[Path]:
    """Three PEFT adapters."""
    rng = np.random.default_rng(0)
    targets = sorted(site.rpartition(".")[2] for site in _ADAPTED)
    fields = {
        "peft_type": "LORA",
        "r": _RANK,
        "lora_alpha": _ALPHA,
        "target_modules": targets,
    }
    for number in range(3):
        tensors = tiny.lora_tensors(family.config, rng.standard_normal, _RANK)
        adapted = {
            name: tensor
            for name, tensor in tensors.items()
            if name.split(".")[-3] in targets
        }
        lf.io.write_adapter(
            family.folder / "adapters" / f"adapter_{number}", fields, adapted
        )
    return sorted((family.folder / "adapters").iterdir())


@pytest.fixture(scope="module")
def pool(family, adapters) -> Path:
    out = family.folder / "pool"
    lf.io.convert(
        lf.io.ConvertOptions(
            base=str(family.base), adapters=tuple(map(str, adapters)), out=out
        )
    )
    return out


@pytest.fixture(scope="module")
def asked(family, pool) -> Callable[..., lf.FuseOptions]:
    """A function from a name and further options to the options of a short run."""

    def options(name: str, **changes) -> lf.FuseOptions:
        values = {
            "base": str(family.base),
            "task": str(family.task),
            "seeds": (1,),
            "test_rows": 4,
        }
        if lf.METHODS[changes.get("method", "fusion")].pool:
            values["pool"] = str(pool)
        return recipes.options(
            _QUICK, **values | {"out": family.folder / "runs", "name": name} | changes
        )

    return options


@pytest.fixture(scope="module")
def run(asked) -> Path:
    """Two seeds of a fusion."""
    options = asked("fusion", seeds=(1, 2))
    lf.fuse(options)
    return options.out / "fusion"


@pytest.fixture(scope="module")
def done(asked, family) -> Callable[[str], dict]:
    """A function from a method to the results of its run with one seed."""
    return functools.cache(
        lambda method: lf.fuse(
            asked(method, task=str(family.task.with_name("open")), method=method)
        )
    )


def test_an_adapter_of_another_family_is_refused(family, adapters, tmp_path):
    cases = [
        (family.base, _SMALL / "adapters" / "sort_dash", r"\S+SelfAttention"),
        (_SMALL / "base", adapters[0], r"model\.layers\.0"),
    ]
    for of, adapter, message in cases:
        with pytest.raises(
            ValueError, match=rf"wrong base\?.* no linear module {message}"
        ):
            lf.io.convert(
                lf.io.ConvertOptions(
                    base=str(of), adapters=(str(adapter),), out=tmp_path / "pool"
                )
            )


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=() if name in _SHORT else pytest.mark.long)
        for name in lf.METHODS
        if name != "fusion"
    ],
)
def test_every_method_runs(family, method, done):
    results = done(method)
    (row,) = results["seeds"]
    assert 0 <= row["exact_match"] <= 100
    assert row["loss"] is None if method == "constant" else math.isfinite(row["loss"])
    if lf.METHODS[method].title is not None:
        targets = (
            [site.rpartition(".")[2] for site in _ADAPTED]
            if lf.METHODS[method].pool
            else None
        )
        found = counts(
            family.config,
            modules=2,
            rank=_RANK,
            vera_rank=3,
            basis=None,
            targets=targets,
        )
        assert (
            results["trainable"]
            == found[lf.METHODS[method].title.format(lora_rank=_RANK, vera_rank=3)]
        )


@pytest.mark.parametrize(
    ("load_in", "method", "rel"), [("nf4", "mean", 0.1), ("int8", "zero-shot", 0.01)]
)
def test_a_base_in_few_bits(family, load_in, method, rel, asked, done):
    task = str(family.task.with_name("open"))
    (row,) = lf.fuse(
        asked(f"{load_in}-{method}", task=task, load_in=load_in, method=method)
    )["seeds"]
    (exact,) = done(method)["seeds"]
    assert (
        row["loss"] == pytest.approx(exact["loss"], rel=rel)
        and row["loss"] != exact["loss"]
    )


@pytest.mark.nightly
def test_a_mesh_gives_the_numbers_of_one_device(run, asked):
    options = asked("mesh", seeds=(1, 2), mesh="seed=2,model=2")
    lf.fuse(options)
    _, alone, _ = lf.load_run(run)
    _, spread, _ = lf.load_run(options.out / "mesh")
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        alone,
        spread,
    )


def test_a_mesh_splits_matrices_as_the_sites_say():
    # Phi-3 has one matrix for queries, keys and values; Qwen2 has biases, and Qwen3 norms of queries and keys.
    kinds = ("phi3", "qwen2", "qwen3")
    configs = [
        FAMILY.read_config(small_llama.CONFIG | {"vocab_size": 40, "model_type": kind})
        for kind in kinds
    ]
    phi, qwen2, qwen3 = map(rules, configs)
    names = {
        ("base/decoder/self_attn/qkv_proj/kernel", 3, phi): (None, None, "model"),
        ("base/decoder/mlp/down_proj/kernel", 3, phi): (None, "model", None),
        ("base/decoder/self_attn/q_proj/kernel", 3, qwen2): (None, None, "model"),
        ("base/decoder/self_attn/o_proj/kernel", 3, qwen2): (None, "model", None),
        ("base/decoder/self_attn/q_norm/scale", 2, qwen3): (None, None),
        ("base/decoder/input_norm/scale", 2, qwen3): (None, None),
        ("pool/A/decoder.mlp.down_proj", 4, qwen2): (None, None, "model", None),
        ("pool/B/decoder.self_attn.q_proj", 4, qwen2): (None, None, None, "model"),
    }
    assert {key: tuple(partition(*key)) for key in names} == names


@pytest.mark.long
def test_chips_hold_every_matrix_that_is_not_digital(family, pool, run, tmp_path):
    digital = ("*.[kvo]_proj", "*.mlp.*")
    chips = tmp_path / "chips.json"
    written = lf.hardware.write_chips(
        lf.hardware.ProgramOptions(
            base=str(family.base),
            pool=str(pool),
            out=chips,
            crossbar="isaac",
            keep_digital=digital,
        )
    )
    matrices = [
        *family.config.sites,
        *(f"pool.{factor}.{site}" for factor in "AB" for site in _ADAPTED),
    ]
    assert written["cells_sha256"].keys() == {
        name for name in matrices if not any(fnmatch(name, rule) for rule in digital)
    }
    options = lf.hardware.EvaluateOnChipsOptions(
        run=run, crossbar=str(chips), norm="programmed", calibration_rows=4, test_rows=4
    )
    results = lf.hardware.report_on_chips(options)
    assert (results["method"], results["norm"], results["age"]) == (
        "fusion",
        "programmed",
        None,
    )
    for exact, on_chip in zip(
        results["digital"], results["chips"][0]["seeds"], strict=True
    ):
        assert on_chip["loss"] == pytest.approx(exact["loss"], rel=1e-2)


def test_an_exported_fusion_is_read_as_an_adapter_and_merged(family, run, tmp_path):
    lf.runs.export(lf.runs.ExportOptions(out=tmp_path / "adapter", run=run, seed=2))
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["task_type"] == "CAUSAL_LM" and fields["use_dora"]
    assert fields["target_modules"] == sorted(
        path for path, (site, _) in lf.places(family.config).items() if site in _ADAPTED
    )
    again = lf.read_pool([str(tmp_path / "adapter")], family.config)
    assert again.magnitude is not None and again.sites == _ADAPTED

    lf.runs.export(
        lf.runs.ExportOptions(out=tmp_path / "merged", run=run, seed=2, format="merged")
    )
    options, params, _ = lf.load_run(run)
    setup = lf.runs.load_setup(options)
    problem = setup.problem.replace(index=setup.problem.index[1])
    model, adapters, _ = problem.adapted_model(jax.tree.map(lambda p: p[1], params))
    ids = jnp.array([[5, 6, 7]])
    labels = jnp.array([[8, 9, 1]])
    fused = model.label_logits(ids, ids > 0, labels, adapters)
    merged = lf.load_base(tmp_path / "merged").label_logits(ids, ids > 0, labels, {})
    np.testing.assert_allclose(merged, fused, atol=1e-4)
    assert (
        lf.load_tokenizer(str(tmp_path / "merged")).chat_template
        == setup.tokenizer.chat_template
    )


def test_a_plan_counts_what_a_run_needs(asked, family):
    text = lf.estimates.describe_run(asked("plan", seeds=(1, 2)))
    assert "2 batches of 6 rows" in text and "tokenised, padded" in text
    assert f"| fusion |    2 |        {2 + 3 * 16} |" in text


def test_every_method_has_a_cost(family):
    options = lf.estimates.CostOptions(
        targets=("v_proj",), bases=(), modules=2, rank=2, source=8, target=4
    )
    costs = lf.estimates.task_costs(family.config, ARRAYS["isaac"], options)
    assert all(0 < cost.reads.low < cost.token.low for cost in costs.values())
