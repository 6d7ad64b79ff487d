"""Combinations with given weights: the sum by definition, by block, formats, a start of a fusion, and refusals."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import recipes
from json_files import read_json, write_json
from numpy.testing import assert_allclose, assert_array_equal
from refusals import refused
from safetensors.numpy import load_file

from lorafusion_jax import (
    base_tensor,
    fuse,
    kernels,
    load_base,
    load_run,
    places,
    read_config,
)
from lorafusion_jax.io import read_adapter, write_adapter
from lorafusion_jax.runs import ExportOptions, export
from lorafusion_jax.runs.export import MergeOptions, merge

_SMALL = Path(__file__).resolve().parents[2] / "examples" / "small"
_BASE = str(_SMALL / "base")
_POOL = str(_SMALL / "adapters")
_WEIGHTS = "adapter_model.safetensors"
_NAMES = ("double_next", "dropfirst_dash")


def _updates(folder):
    adapter = read_adapter(str(folder))
    return {
        path: adapter.scaling[path] * (b.astype(np.float32) @ a.astype(np.float32))
        for path, (a, b) in adapter.factors.items()
    }


def _write(folder, config, factors, magnitudes):
    """Write an adapter in PEFT's format."""
    tensors = {}
    for path, (a, b) in factors.items():
        name = f"base_model.model.{path}"
        tensors[f"{name}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = b.astype(np.float32)
        if path in magnitudes:
            tensors[f"{name}.lora_magnitude_vector"] = magnitudes[path]
    write_adapter(folder, config, tensors)


def _merge(out, **options):
    merge(MergeOptions(**{"base": _BASE, "pool": _POOL, "out": out} | options))
    return out


def test_a_file_gives_weights_by_block_and_a_merged_model_has_them(tmp_path):
    file = tmp_path / "weights.json"
    write_json(file, {_NAMES[0]: {"encoder.0": 0.5, "decoder.1": 2}, _NAMES[1]: 1})
    _merge(tmp_path / "adapter", weights_file=file)
    first = _updates(_SMALL / "adapters" / _NAMES[0])
    second = _updates(_SMALL / "adapters" / _NAMES[1])
    found = _updates(tmp_path / "adapter")
    weights = {"encoder.block.0.": 0.5, "decoder.block.1.": 2}
    for path, update in found.items():
        weight = next(
            (weight for start, weight in weights.items() if path.startswith(start)), 0
        )
        assert_allclose(update, weight * first[path] + second[path], atol=1e-6)
    _merge(tmp_path / "model", format="merged", weights_file=file)
    merged = base_tensor(tmp_path / "model")
    base = base_tensor(_BASE)
    for path, update in found.items():
        assert_allclose(
            merged(f"{path}.weight"), base(f"{path}.weight") + update, atol=1e-5
        )
    assert kernels(load_base(tmp_path / "model"))["encoder.self.q"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no weights: give some with --weights name=0.7"),
        (
            {"weights": ("double_next",)},
            "--weights 'double_next': expected name=number",
        ),
        ({"weights": ("double_next=much",)}, "expected name=number"),
        ({"weights": ("0.7",)}, "--weights '0.7': expected name=number"),
        (
            {"weights": ("double_next=1e39",)},
            "is 1e\\+39: expected a finite number of float32",
        ),
        (
            {"weights": ("double_next=1", "double_next=2")},
            "double_next has two weights, one in --weights",
        ),
        (
            {"weights": ("double_next=1",), "file": {"double_next": 2}},
            "double_next has two weights, one in --weights",
        ),
        (
            {"weights": ("double_next=nan",)},
            "the weight of double_next is nan: expected a finite number",
        ),
        ({"weights": ("triple=1",)}, "has no module triple: it has double_next"),
        (
            {"file": {"double_next": {"block 7": 1}}},
            "name a block 'block 7': expected one of encoder.0, ",
        ),
        ({"file": {"double_next": "1"}}, r"weights.json: Expected `float \| object`"),
        ({"file": {"double_next": {}}}, "double_next has no weights: expected a num"),
        (
            {"weights": ("double_next=1e9",), "dtype": "float16"},
            "lora_B.weight has NaN or infinite numbers in float16",
        ),
        (
            {"weights": ("double_next=1e9",), "dtype": "float16", "format": "merged"},
            "weight has NaN or infinite numbers in float16: .*--dtype float32",
        ),
        (
            {"weights": ("double_next=1",), "format": "gguf", "dtype": "float16"},
            "--dtype float16: a GGUF adapter is float32",
        ),
        (
            {"weights_file": Path("none.json")},
            "none.json: no such file: expected JSON such as {",
        ),
        (
            {"weights": ("double_next=1",), "format": "gguf"},
            "model_type is 't5': expected one of llama, .* for GGUF",
        ),
    ],
)
def test_weights_that_cannot_be_used_are_refused_before_anything_is_written(
    tmp_path, options, message
):
    if file := options.pop("file", None):
        options["weights_file"] = tmp_path / "weights.json"
        write_json(options["weights_file"], file)
    with refused(message):
        _merge(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_dora_adapter_alone_keeps_its_magnitudes(tmp_path):
    source = _SMALL / "adapters" / _NAMES[0]
    adapter = read_adapter(str(source))
    rng = np.random.default_rng(0)
    magnitudes = {
        path: rng.uniform(-2, 2, len(b)).astype(np.float32)
        for path, (_, b) in adapter.factors.items()
    }
    config = {**adapter.config, "use_dora": True}
    _write(tmp_path / "pool" / "one", config, adapter.factors, magnitudes)
    pool = str(tmp_path / "pool")
    for out, form in (("adapter", "adapter"), ("model", "merged")):
        _merge(tmp_path / out, pool=pool, weights=("one=1.0",), format=form)
    again = read_adapter(str(tmp_path / "adapter"))
    base = base_tensor(_BASE)
    merged = base_tensor(tmp_path / "model")
    updates = _updates(source)
    assert again.config["use_dora"] and again.factors.keys() == updates.keys()
    for path, update in _updates(tmp_path / "adapter").items():
        assert_allclose(update, updates[path], atol=1e-6)
        assert_array_equal(again.magnitude[path], magnitudes[path])
        W = base(f"{path}.weight").astype(np.float64) + updates[path]
        scale = magnitudes[path] / np.linalg.norm(W, axis=1)
        assert_allclose(merged(f"{path}.weight"), W * scale[:, None], atol=1e-4)
    file = tmp_path / "weights.json"
    file.write_text('{"one": 1.0}')
    small = Path(_BASE), tmp_path / "pool"
    still = {"lr_coefficients": 0.0, "lr_magnitudes": 0.0, "epochs": 1, "modules": 1}
    fuse(recipes.small_run(small, tmp_path, name="run", start_from=file, **still))
    started = ExportOptions(run=tmp_path / "run", out=tmp_path / "start")
    export(started)
    started = read_adapter(str(tmp_path / "start"))
    for path, magnitude in magnitudes.items():
        assert_array_equal(started.magnitude[path], magnitude)


def test_modules_of_other_matrices_and_ranks_take_no_more_room_together(tmp_path):
    """The sum of modules with different targets and ranks, read back from all three dtypes."""
    first = read_adapter(str(_SMALL / "adapters" / _NAMES[0])).factors
    second = read_adapter(str(_SMALL / "adapters" / _NAMES[1])).factors
    sources = {
        "few": {path: (a[:3], b[:, :3]) for path, (a, b) in first.items()},
        "one": {path: f for path, f in second.items() if path.startswith("decoder.")},
    }
    for name, factors in sources.items():
        (rank,) = {len(a) for a, _ in factors.values()}
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": [*factors],
        }
        _write(tmp_path / "pool" / name, config, factors, {})
    stored = [_numbers(tmp_path / "pool" / name) for name in sources]
    wanted = {}
    for name, weight in (("few", 0.5), ("one", -1.0)):
        for path, update in _updates(tmp_path / "pool" / name).items():
            wanted[path] = wanted.get(path, 0) + weight * update
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 2e-2), ("float16", 3e-3)):
        out = tmp_path / dtype
        pool = str(tmp_path / "pool")
        _merge(out, pool=pool, weights=("few=0.5", "one=-1.0"), dtype=dtype)
        assert {t.dtype.name for t in load_file(out / _WEIGHTS).values()} == {dtype}
        assert _numbers(out) == sum(stored)
        found = _updates(out)
        assert found.keys() == wanted.keys()
        for path, update in found.items():
            largest = np.abs(wanted[path]).max()
            assert_allclose(update, wanted[path], atol=tolerance * largest)


def _numbers(folder):
    return sum(tensor.size for tensor in load_file(folder / _WEIGHTS).values())


@pytest.fixture(scope="module")
def listed(small, tmp_path_factory):
    """A list of weights, one module's by block, and the folder of the model that is merged from it."""
    folder = tmp_path_factory.mktemp("listed")
    base, pool = map(str, small)
    first, second = sorted(path.name for path in small[1].iterdir())[:2]
    file = folder / "weights.json"
    write_json(file, {second: 0.7, first: {"encoder.0": -0.3, "decoder.0": 2}})
    merged = folder / "merged"
    _merge(merged, base=base, pool=pool, weights_file=file, format="merged")
    return file, folder / "merged"


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        pytest.param(0, {"method": "coefficients"}, marks=pytest.mark.long),
        (1, {"lr_magnitudes": 0.0}),
    ],
)
def test_a_fusion_starts_at_the_model_that_is_merged(
    small, listed, tmp_path, number, changes
):
    """At learning rates of zero the start is what is exported."""
    still = {"lr_coefficients": 0.0, "start_from": listed[number]}
    options = recipes.small_run(small, tmp_path, name="run", **still | changes)
    fuse(options)
    recipes.export(
        run=tmp_path / "run", seed=2, out=tmp_path / "model", format="merged"
    )
    found = base_tensor(tmp_path / "model")
    merged = base_tensor(listed[1])
    for path in places(read_config(small[0])):
        assert_allclose(found(f"{path}.weight"), merged(f"{path}.weight"), atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ({}, {}, "it has none: give a weight"),
        ({"triple": 1}, {}, "the pool lacks 'triple'"),
        (None, {"composition": "mix"}, "they belong to a sum"),
        (
            None,
            {"adapters": ("0",)},
            "they name the modules already: leave out --adapters",
        ),
        (
            None,
            {"granularity": "global"},
            "has weights by block: use the granularity block, site or rank",
        ),
    ],
)
def test_a_list_that_a_fusion_cannot_start_from_is_refused(
    small, listed, tmp_path, weights, changes, message
):
    file = listed[0]
    if weights is not None:
        file = tmp_path / "weights.json"
        write_json(file, weights)
    with refused(message):
        fuse(recipes.small_run(small, tmp_path, name="run", start_from=file, **changes))
    assert not (tmp_path / "run").exists()


def test_a_control_starts_from_the_same_weights(small, listed, tmp_path):
    still = {
        "method": "coefficients",
        "lr_coefficients": 0.0,
        "epochs": 1,
        "start_from": listed[0],
    }
    found = []
    for control in ("none", "rotated"):
        options = recipes.small_run(
            small, tmp_path, name=control, control=control, **still
        )
        fuse(options)
        found.append(load_run(tmp_path / control)[1]["coefficients"])
    assert_array_equal(*found)
    assert np.any(found[0])


def test_a_start_that_does_not_exist_is_refused_before_anything_is_loaded(tmp_path):
    nothing = tmp_path / "base", tmp_path / "pool"
    with refused(r"--from .*gone\.json: no such file or folder: give a run"):
        fuse(recipes.small_run(nothing, tmp_path, start_from=tmp_path / "gone.json"))


@pytest.mark.parametrize(
    ("part", "message"),
    [("base", "the base .* had the SHA-256 0"), ("modules", "of the pool")],
)
def test_a_merged_list_of_another_base_or_pool_is_refused(
    small, listed, tmp_path, part, message
):
    record = read_json(listed[1] / "merge.json")
    digests = record["digests"]
    digests[part] = "0" if part == "base" else dict.fromkeys(digests[part], "0")
    write_json(tmp_path / "merge.json", record)
    with refused(f"{tmp_path} was fused with other weights: .*{message}"):
        fuse(recipes.small_run(small, tmp_path, name="run", start_from=tmp_path))
