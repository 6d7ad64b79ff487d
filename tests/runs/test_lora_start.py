"""LoRAs that start from other models: the same losses where the rank suffices, seeds, resumption, and refusals."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import recipes
from json_files import read_json, write_json
from numpy.testing import assert_array_equal
from refusals import refused

from lorafusion_jax import fuse, load_run
from lorafusion_jax.io import open_pool
from lorafusion_jax.runs import RunFolder, run_path
from lorafusion_jax.runs.export import MergeOptions, merge
from lorafusion_jax.runs.run import HardwareSetup, run

_RANKS = 96  # as many as the base's width


@pytest.fixture(scope="module")
def fused(small, tmp_path_factory):
    options = recipes.small_run(small, tmp_path_factory.mktemp("runs"), name="fused")
    return options, fuse(options)


def _lora(small, out, start, method="lora", rank=_RANKS, rate=0.0, **changes):
    rates = {"lr_lora": rate, "lr_magnitudes": rate}
    own = {
        "name": "run",
        "method": method,
        "lora_rank": rank,
        "start_from": start,
        "epochs": 1,
    }
    return recipes.small_run(small, out, **own | rates | changes)


def _losses(results):
    return [seed["loss"] for seed in results.seeds]


@pytest.mark.parametrize(
    "method", ["lora", pytest.param("dora", marks=pytest.mark.long)]
)
def test_a_lora_starts_at_the_loss_of_the_fusion(small, fused, tmp_path, method):
    """At learning rates of zero every seed has the loss of its seed of the fusion."""
    results = fuse(_lora(small, tmp_path, run_path(fused[0]), method))
    assert _losses(results) == pytest.approx(_losses(fused[1]), rel=1e-4)
    assert _losses(results)[0] != pytest.approx(_losses(results)[1], rel=1e-3)
    assert all(
        0 <= share < 1e-5
        for seed in results.seeds
        for share in seed["left_out"].values()
    )


def test_what_a_small_rank_leaves_out_is_reported(small, fused, tmp_path, capsys):
    results = fuse(_lora(small, tmp_path, run_path(fused[0]), rank=4))
    shares = [share for seed in results.seeds for share in seed["left_out"].values()]
    assert (
        min(shares) > 0.01
        and RunFolder(tmp_path / "run").results().seeds[0]["left_out"]
    )
    assert (
        f"at rank 4, which leaves out {100 * min(shares):.1f} to {100 * max(shares):.1f} %"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("kind", ["list", "merged", "adapter"])
def test_a_lora_starts_at_the_weighted_modules(small, tmp_path, kind):
    """The numbers of A B are those of the adapter's update; spare ranks have random columns in A, and zeros in B."""
    base, pool = map(str, small)
    first = sorted(small[1].iterdir())[0]
    start = first
    file = tmp_path / "weights.json"
    write_json(file, {first.name: 1})
    if kind != "adapter":
        start = file
    if kind == "merged":
        start = tmp_path / "merged"
        merge(MergeOptions(base=base, pool=pool, weights_file=file, out=start))
    fuse(_lora(small, tmp_path, start, pool=None if kind == "adapter" else pool))
    single = recipes.small_run(
        small,
        tmp_path,
        name="single",
        method="coefficients",
        lr_coefficients=0.0,
        epochs=1,
    )
    expected = fuse(replace(single, start_from=file))
    assert _losses(RunFolder(tmp_path / "run").results()) == pytest.approx(
        _losses(expected), rel=1e-4
    )
    lora = load_run(tmp_path / "run")[1]["lora"]
    assert all(np.any(np.asarray(A)[..., 16:]) for A in lora["A"].values())
    assert not any(np.any(np.asarray(B)[:, :, 16:]) for B in lora["B"].values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": (2, 1)}, r"has the seeds \[1, 2\], here \[2, 1\]: give the same"),
        (
            {"lora_targets": ("q",)},
            r"it adapts decoder\.cross\.v, .* which --lora-targets leaves out: add them",
        ),
        ({"start_from": "zero-shot"}, "it adapts no matrices"),
        pytest.param(
            {"start_from": "dora"},
            "of the kind WeightDecomposed has no factors",
            marks=pytest.mark.long,
        ),
        (
            {"start_from": "list", "pool": None},
            "the modules are those of a pool: give it with --pool",
        ),
        (
            {"method": "magnitudes", "start_from": "list"},
            "cannot start from them: use fusion, coefficients, lora or dora",
        ),
    ],
)
def test_a_start_that_a_lora_cannot_have_is_refused(
    small, fused, tmp_path, changes, message
):
    start = changes.pop("start_from", None)
    if start in ("zero-shot", "dora"):
        start = recipes.small_run(small, tmp_path, name=start, method=start, epochs=1)
        fuse(start)
        start = run_path(start)
    elif start == "list":
        start = tmp_path / "weights.json"
        write_json(start, {sorted(small[1].iterdir())[0].name: 1})
    with refused(message):
        fuse(_lora(small, tmp_path, start or run_path(fused[0]), rank=4, **changes))
    assert not (tmp_path / "run").exists()


def test_a_fusion_of_another_pool_is_refused(small, fused, tmp_path):
    folder = tmp_path / "fused"
    shutil.copytree(run_path(fused[0]), folder)
    config = read_json(folder / "config.json")
    config["digests"]["modules"] = dict.fromkeys(config["digests"]["modules"], "0")
    write_json(folder / "config.json", config)
    with refused("fused was fused with other weights: .* of the pool"):
        fuse(_lora(small, tmp_path, folder, rank=4))


def test_one_command_trains_a_fusion_and_then_a_lora_from_it(small, tmp_path):
    """The same as two commands, each with half of the epochs; interrupted in between, it continues."""
    options = recipes.small_run(
        small,
        tmp_path,
        name="both",
        method="lora",
        lora_rank=4,
        epochs=4,
        lr_lora=0.01,
        warm_start="fusion",
    )
    with pytest.raises(KeyError):
        run(
            [options],
            set_up=lambda setup, stage, begin: _stop_at_the_lora(setup, stage),
        )
    assert (
        RunFolder(tmp_path / "both" / "fusion").results()
        and not RunFolder(tmp_path / "both").exists()
    )
    results = fuse(replace(options, resume=True))
    fuse(recipes.small_run(small, tmp_path, name="first", modules=20))
    again = fuse(
        _lora(small, tmp_path, tmp_path / "first", rank=4, rate=0.01, epochs=2)
    )
    assert (
        results.seeds == again.seeds
        and load_run(tmp_path / "both")[0].recipe.epochs == 4
    )
    jax.tree.map(
        assert_array_equal,
        *(load_run(tmp_path / name)[1] for name in ("both", "run")),
    )


def test_a_warm_start_from_the_nearest_module_has_its_rank_and_its_model(
    small, tmp_path
):
    shared = {"method": "lora", "warm_start": "single", "lora_targets": None}
    options = recipes.small_run(small, tmp_path, name="warm", lr_lora=0.0, **shared)
    warm = fuse(options)
    nearest = RunFolder(tmp_path / "warm" / "single").results()
    trained = load_run(tmp_path / "warm")[0].recipe
    assert trained.lora_rank == open_pool(small[1]).largest_rank
    for trained_seed, seed in zip(warm.seeds, nearest.seeds, strict=True):
        assert max(trained_seed["left_out"].values()) < 1e-6
        assert trained_seed["loss"] == pytest.approx(seed["loss"], rel=1e-4)


def _stop_at_the_lora(setup, stage):
    return {"fusion": HardwareSetup(setup, lambda params: setup)}[stage.method]
