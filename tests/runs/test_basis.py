"""Runs in a shared basis: convert, fuse, resume, evaluate, export, and what is refused."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import recipes
from json_files import read_json
from numpy.testing import assert_allclose
from refusals import refused

import lorafusion_jax as lf
from lorafusion_jax import io, runs
from lorafusion_jax.loading.model import with_whole_modules


@pytest.fixture(scope="module")
def converted(small, tmp_path_factory):
    """Base, and a converted pool of three modules with a basis of 24 directions."""
    base, adapters = small
    out = tmp_path_factory.mktemp("converted") / "pool"
    sources = tuple(str(path) for path in sorted(adapters.iterdir()))[:3]
    io.convert(io.ConvertOptions(base=str(base), adapters=sources, out=out, basis=24))
    return base, out


def _options(converted, out, **changes):
    return recipes.small_run(
        converted, out, **{"batch_size": 32, "basis": 16, "seeds": (1,)} | changes
    )


@pytest.fixture(scope="module")
def fused(converted, tmp_path_factory):
    options = _options(converted, tmp_path_factory.mktemp("runs"), name="in_basis")
    return options, lf.fuse(options)


def test_a_basis_on_disk_is_the_one_of_the_modules_and_reads_none_of_them(
    converted, tmp_path
):
    basis = lf.load_basis(converted[1], 16)
    wanted = lf.shared_basis(lf.load_pool(converted[1]), 16)
    assert (basis.names, basis.sites, basis.k) == (wanted.names, wanted.sites, 16)
    for got, of_pool in zip(
        jax.tree.leaves(basis), jax.tree.leaves(wanted), strict=True
    ):
        assert_allclose(got, of_pool, atol=1e-4)
    alone = tmp_path / "alone"
    shutil.copytree(converted[1], alone, ignore=shutil.ignore_patterns("adapters"))
    assert lf.load_basis(alone, 16).names == basis.names


def test_a_run_in_a_basis_learns_and_is_evaluated_again(fused):
    options, results = fused
    assert results.trainable_by_group == {
        "coefficients": 2 * 2,
        "magnitudes": 6 * 96,
    }
    metrics = [
        json.loads(line)
        for line in (runs.run_path(options) / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [row["loss"] for row in metrics if "loss" in row]
    assert losses[-1] < losses[0]
    (again,) = recipes.evaluate(run=runs.run_path(options))
    assert (again["exact_match"], again["loss"]) == (
        results.exact_match,
        results.seeds[0]["loss"],
    )
    assert lf.fuse(replace(options, resume=True)) == results


def test_an_exported_adapter_and_a_merged_base_are_the_fusion(
    fused, converted, tmp_path
):
    """A rank-16 DoRA adapter whose W + dW, rescaled, is the merged base's kernel."""
    options, _ = fused
    recipes.export(run=runs.run_path(options), out=tmp_path / "adapter")
    recipes.export(run=runs.run_path(options), out=tmp_path / "merged", format="merged")
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert (config["r"], config["use_dora"]) == (16, True)
    base = lf.load_base(converted[0])
    merged = lf.load_base(tmp_path / "merged")
    pool = lf.read_pool([str(tmp_path / "adapter")], base.config)
    for site, A in pool.A.items():
        adapted = np.asarray(
            lf.kernels(base)[site][0] + A[0, 0] @ pool.B[site][0, 0], float
        )
        wanted = (
            np.asarray(pool.magnitude[site][0])
            * adapted
            / np.linalg.norm(adapted, axis=0)
        )
        assert_allclose(lf.kernels(merged)[site][0], wanted, atol=1e-4)


@pytest.mark.nightly
def test_modules_are_ranked_in_whole_or_inside_the_basis(converted, tmp_path):
    """Inside a basis of the modules' own rank the order is that of whole modules."""
    whole = tmp_path / "pool"
    shutil.copytree(converted[1], whole)
    shutil.rmtree(whole / "basis")
    io.convert(io.ConvertOptions(out=whole, basis=48))
    chosen = {}
    for choose in ("gradient", "basis-gradient"):
        options = _options(
            (converted[0], whole),
            tmp_path,
            name=choose,
            choose=choose,
            basis=48,
            epochs=1,
            method="coefficients",
        )
        chosen[choose] = lf.fuse(options).seeds[0]["modules"]
        assert (
            lf.fuse(replace(options, resume=True)).seeds[0]["modules"] == chosen[choose]
        )
    assert chosen["gradient"] == chosen["basis-gradient"]
    control = _options(
        (converted[0], whole),
        tmp_path,
        choose="gradient",
        basis=48,
        control="random-factors",
    )
    ranked = with_whole_modules(
        lf.loading.load_model(control), control
    ).problem.frozen.pool
    np.testing.assert_array_equal(
        ranked.A["encoder.self.q"], lf.load_pool(whole).A["encoder.self.q"]
    )
    shutil.rmtree(whole / "adapters")
    options = _options(
        (converted[0], whole),
        tmp_path,
        name="alone",
        choose="basis-gradient",
        epochs=1,
        basis=48,
    )
    assert lf.fuse(options).seeds[0]["modules"] == chosen["gradient"]


def test_controls_project_the_modules_on_other_directions(converted, tmp_path):
    own = lf.loading.load_model(_options(converted, tmp_path)).problem.frozen.pool
    for control in ("random-factors", "shuffled", "rotated"):
        pool = lf.loading.load_model(
            _options(converted, tmp_path, control=control)
        ).problem.frozen.pool
        assert (pool.names, pool.k) == (own.names, 16)
        for site in (
            own.sites if control != "shuffled" else ()
        ):  # a stack of one layer is not shuffled
            assert pool.kept()[site].sum() < own.kept()[site].sum()


def test_draws_of_a_rotated_control_differ(converted, tmp_path):
    draws = [
        lf.loading.load_model(
            _options(converted, tmp_path, basis=None, control="rotated", control_draw=n)
        )
        for n in (0, 1)
    ]
    first = draws[0].problem.frozen.pool
    second = draws[1].problem.frozen.pool
    assert (
        first.names
        == second.names
        == tuple(f"rotated {name}" for name in draws[0].modules[0])
    )
    assert all(np.abs(a - second.A[site]).max() > 0.01 for site, a in first.A.items())


def test_a_pool_without_a_basis_names_the_command_that_makes_one(
    small, converted, tmp_path
):
    with refused(r"24 directions, expected at least 25: .* convert --basis 25"):
        lf.loading.load_model(_options(converted, tmp_path, basis=25))
    base, adapters = small
    with refused(r"holds adapters, no basis: .* `lorafusion convert --basis 16`"):
        lf.loading.load_model(_options((base, adapters), tmp_path))
    bare = tmp_path / "bare"
    other = tmp_path / "other"
    shutil.copytree(converted[1], bare, ignore=shutil.ignore_patterns("basis"))
    with refused(r"has no basis: .* convert --basis 16 --out"):
        lf.loading.load_model(_options((base, bare), tmp_path))
    with refused("rank of at most 48"):
        io.convert(io.ConvertOptions(out=bare, basis=49))
    assert not (bare / "basis").exists()
    with refused("basis exists: move it away"):
        io.convert(io.ConvertOptions(out=converted[1], basis=8))
    io.convert(
        io.ConvertOptions(
            base=str(base), adapters=(str(sorted(adapters.iterdir())[3]),), out=other
        )
    )
    shutil.copytree(converted[1] / "basis", other / "basis")
    with refused("is the basis of other adapters than"):
        lf.load_basis(other)
