"""Chips and seeds over the devices of a mesh: the numbers of one device, without collectives."""

import contextlib
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
import tiny
from numpy.testing import assert_allclose
from refusals import refused

import lorafusion_jax as lf
from lorafusion_jax import crossbar, fuse, hardware, tasks
from lorafusion_jax.crossbar import (
    Device,
    Independent,
    ReadNoise,
)
from lorafusion_jax.training.loss import seed_entropies

_COLLECTIVES = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
)
_NOISE = Device(programming=Independent(0.02), read_noise=ReadNoise(0.01))
_NOISY = replace(crossbar.PRESETS["ideal"], device=_NOISE)


def _mesh(asked):
    return (
        contextlib.nullcontext()
        if asked is None
        else jax.set_mesh(lf.training.make_mesh(asked))
    )


@pytest.mark.long
def test_a_device_has_its_chips_alone_and_waits_for_no_other(small, tmp_path):
    setup = lf.runs.load_setup(
        recipes.small_run(small, tmp_path, seed_mode="batched")
    ).with_layers(unroll=False)
    keys = jax.random.split(jax.random.key(5), 3)
    params = lf.training.start(setup.problem, (1, 2)).params
    _, batch = next(iter(tasks.eval_batches(setup.train, 8, pad_id=0)))
    found = []
    flops = []
    weights = []
    for asked in (
        None,
        "seed=4",
    ):  # six seeds on chips, and with two that are padding eight
        with _mesh(asked):
            problem = hardware.on_every_chip(
                setup,
                params,
                {"encoder.self.v": _NOISY},
                keys,
                modules=None,
                norm="ideal",
                calibration_rows=1,
            ).problem
            count = len(problem.index)
            batches = jax.tree.map(
                lambda leaf, count=count: jnp.stack([leaf] * count), batch
            )
            given = (
                hardware.for_every_chip(params, 3),
                lf.training.on_mesh(batches, of_seeds=True),
                problem,
            )
            compiled, leaves = tiny.compiled(seed_entropies, *given)
            found.append(np.asarray(compiled(leaves))[:6])
        assert not _COLLECTIVES.search(compiled.as_text())
        flops.append(compiled.cost_analysis()["flops"])
        weights.append(
            sum(
                leaf.addressable_shards[0].data.nbytes
                for leaf in jax.tree.leaves(problem.frozen.base)
            )
        )
    np.testing.assert_array_equal(*found)
    assert (
        flops[1] == pytest.approx(flops[0] / 3, rel=0.02)
        and weights[1] == weights[0] / 3
    )


def _losses(rows):
    return [row["loss"] for row in rows]


@pytest.mark.long
def test_runs_on_chips_have_the_results_of_one_device(small, tmp_path):
    crossbar.save_config(_NOISY, tmp_path / "noisy.yaml")
    digital = ("head", "pool.*", "decoder.*", "*.ff.*", "*.q", "*.k", "*.o")
    noisy = str(tmp_path / "noisy.yaml")
    arrays = lf.runs.OnArrays(crossbar=noisy, keep_digital=digital, train_chip="fresh")
    options = recipes.small_run(small, tmp_path, epochs=1, arrays=arrays)
    trained = [
        fuse(replace(options, name=f"{mesh}", mesh=mesh)).seeds
        for mesh in (None, "seed=2")
    ]
    assert_allclose(*map(_losses, trained), rtol=1e-5)
    three_chips = hardware.EvaluateOnChipsOptions(
        run=tmp_path / "None", crossbar=noisy, keep_digital=digital, chips=3
    )
    read = [
        hardware.evaluate_on_chips(replace(three_chips, mesh=mesh))["rows"]
        for mesh in (None, "seed=2")
    ]
    assert_allclose(*map(_losses, read), rtol=1e-5)
    assert [(row["chip"], row["seed"]) for row in read[1]] == [
        (chip, seed) for chip in range(3) for seed in (1, 2)
    ]


def test_what_chips_cannot_share_out_is_refused_before_anything_is_loaded(
    small, tmp_path
):
    for asked, message in (
        ("seed=8", "needs 8 devices, got 4"),
        ("model=2", "would split matrices over devices, but chips are whole"),
    ):
        with refused(message):
            hardware.evaluate_on_chips(
                hardware.EvaluateOnChipsOptions(
                    run=tmp_path, crossbar="isaac", mesh=asked
                )
            )
    with refused("is of one process: leave out --distributed"):
        how = {"mesh": "seed=2", "distributed": True}
        fuse(
            recipes.small_run(
                small, tmp_path, arrays=lf.runs.OnArrays(crossbar="isaac"), **how
            )
        )
    with refused("leave out --mesh, or --report"):
        hardware.report_on_chips(
            hardware.EvaluateOnChipsOptions(
                run=tmp_path, crossbar="isaac", mesh="seed=2"
            )
        )
