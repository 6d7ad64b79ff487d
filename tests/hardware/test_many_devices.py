"""Chips and seeds over the devices of a mesh: the numbers of one device, without collectives."""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes

from lorafusion_jax import crossbar, fuse, parts, tasks
from lorafusion_jax.crossbar import Cell, CrossbarConfig, Device, Independent, Mapping, ReadNoise
from lorafusion_jax.training.loss import seed_entropies

_COLLECTIVES = re.compile(r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)")
_NOISE = Device(programming=Independent(0.02), read_noise=ReadNoise(0.01))
_NOISY = CrossbarConfig(cell=Cell(bits=None), mapping=Mapping(weight_bits=None), dac=None, device=_NOISE)


def _mesh(asked):
    return contextlib.nullcontext() if asked is None else jax.set_mesh(parts.make_mesh(asked, in_arrays=True))


@pytest.mark.long
def test_a_device_has_its_chips_alone_and_waits_for_no_other(small, tmp_path):
    setup = parts.looped(parts.load_setup(recipes.small_run(small, tmp_path, seed_mode="batched")))
    keys, params = jax.random.split(jax.random.key(5), 3), parts.start(setup.problem, (1, 2)).params
    _, batch = next(iter(tasks.eval_batches(setup.train, 8, pad_id=0)))
    found, flops, weights = [], [], []
    for asked in (None, "seed=4"):  # six seeds on chips, and with two that are padding eight
        with _mesh(asked):
            how = {"modules": None, "norm": "ideal", "calibration_rows": 1}
            problem = parts.on_every_chip(setup, params, {"encoder.self.v": _NOISY}, keys, **how).problem
            count = len(problem.index)
            batches = jax.tree.map(lambda leaf, count=count: jnp.stack([leaf] * count), batch)
            given = parts.for_every_chip(params, 3), parts.on_mesh(batches, of_seeds=True), problem
            leaves, tree = jax.tree.flatten(given)  # a compiled program's description is no array
            compiled = (
                jax.jit(lambda leaves, tree=tree: seed_entropies(*tree.unflatten(leaves))).lower(leaves).compile()
            )
            found.append(np.asarray(compiled(leaves))[:6])
        assert not _COLLECTIVES.search(compiled.as_text())
        flops.append(compiled.cost_analysis()["flops"])
        weights.append(sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(problem.frozen.base)))
    np.testing.assert_array_equal(*found)
    assert flops[1] == pytest.approx(flops[0] / 3, rel=0.02) and weights[1] == weights[0] / 3


def _losses(rows):
    return [row["loss"] for row in rows]


@pytest.mark.long
def test_runs_on_chips_have_the_results_of_one_device(small, tmp_path):
    crossbar.save_config(_NOISY, tmp_path / "noisy.yaml")
    digital = ("head", "pool.*", "decoder.*", "*.ff.*", "*.q", "*.k", "*.o")
    chips = {"crossbar": str(tmp_path / "noisy.yaml"), "keep_digital": digital}
    options = recipes.small_run(small, tmp_path, epochs=1, arrays=parts.OnArrays(**chips, train_chip="fresh"))
    trained = [fuse(dataclasses.replace(options, name=f"{mesh}", mesh=mesh))["seeds"] for mesh in (None, "seed=2")]
    np.testing.assert_allclose(*map(_losses, trained), rtol=1e-5)
    given = {"run": tmp_path / "None", **chips, "chips": 3}
    read = [
        parts.evaluate_on_chips(parts.EvaluateOnChipsOptions(**given, mesh=mesh))["rows"] for mesh in (None, "seed=2")
    ]
    np.testing.assert_allclose(*map(_losses, read), rtol=1e-5)
    assert [(row["chip"], row["seed"]) for row in read[1]] == [(chip, seed) for chip in range(3) for seed in (1, 2)]


def test_what_chips_cannot_share_out_is_refused_before_anything_is_loaded(small, tmp_path):
    given = {"run": tmp_path, "crossbar": "isaac"}
    for asked, message in (("model=2", "would split simulated arrays"), ("seed=8", "needs 8 devices, got 4")):
        with pytest.raises(ValueError, match=message):
            parts.evaluate_on_chips(parts.EvaluateOnChipsOptions(**given, mesh=asked))
        with pytest.raises(ValueError, match=message):
            parts.restore_chips(parts.RestoreOptions(base="nowhere", crossbar="isaac", mesh=asked))
    for how, message in (
        ({"mesh": "model=2"}, "would split simulated arrays"),
        ({"mesh": "seed=2", "distributed": True}, "is of one process: leave out --distributed"),
    ):
        with pytest.raises(ValueError, match=message):
            fuse(recipes.small_run(small, tmp_path, arrays=parts.OnArrays(crossbar="isaac"), **how))
    with pytest.raises(ValueError, match="leave out --mesh, or --report"):
        parts.report_on_chips(parts.EvaluateOnChipsOptions(**given, mesh="seed=2"))
