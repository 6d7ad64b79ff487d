"""Exploration of configurations for a small Flax model: predictions, costs, the choice, files that continue."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from refusals import refused

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar.flax import explore

_NOISY = crossbar.CrossbarConfig(
    cell=crossbar.Cell(bits=(7,)),
    mapping=crossbar.Mapping(scale="column"),
    dac=crossbar.DAC(bits=6, slice_bits=5),
    adc=crossbar.ADC(),
    device=crossbar.Device(programming=crossbar.Independent(0.08)),
)


class _Images(nnx.Module):
    """A convolution and a dense layer, trained for a few steps on noisy patterns."""

    def __init__(self, rngs):
        self.taps = nnx.Conv(1, 4, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(64, 6, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.taps(x)).reshape(len(x), -1))


def _losses(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def trained():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 1200)
    images = rng.normal(size=(6, 8, 8, 1))[labels] + 3 * rng.normal(
        size=(1200, 8, 8, 1)
    )
    model = _Images(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.05, 0.9), wrt=nnx.Param)
    batches = [
        (
            jnp.asarray(images[at : at + 100], jnp.float32),
            jnp.asarray(labels[at:][:100]),
        )
        for at in range(0, 1200, 100)
    ]

    @nnx.jit
    def step(model, optimizer, batch):
        loss = nnx.grad(lambda model: jnp.mean(_losses(model, batch)))
        optimizer.update(model, loss(model))

    for _ in range(5):
        for batch in batches[:6]:
            step(model, optimizer, batch)
    return model, batches[6:]


@pytest.fixture(scope="module")
def explored(trained, tmp_path_factory):
    model, batches = trained
    grid = crossbar.grid(_NOISY, {"adc.bits": [4, 6], "tile.rows": [16]})
    file = tmp_path_factory.mktemp("explored") / "rows.jsonl"
    return explore(model, batches, _losses, grid, file=file), file


def test_predicted_losses_are_those_of_simulated_chips(explored):
    exploration, _ = explored
    every = [*exploration.choosing, *exploration.confirming]
    for label, predicted in exploration.predicted.items():
        excess = exploration.excess(label, range(4), every)
        interval = crossbar.interval(excess, 0.025)
        bound = max(0.25 * interval.mean, 0.01)
        reach = (interval.high - interval.low) / 2
        assert abs(predicted - interval.mean) < bound + reach, (label, interval)


def test_the_cheapest_configuration_below_the_bound_is_named_and_confirmed(explored):
    exploration, _ = explored
    energies = [exploration.costs[label].energy.typical for label in exploration.front]
    assert energies == sorted(energies)
    choice = exploration.choose(10.0)
    assert choice.meets and choice.label == exploration.front[0]
    assert choice.excess.low < choice.excess.mean <= choice.percentile_90
    nothing_meets = exploration.choose(1e-6)
    assert not nothing_meets.meets and nothing_meets.label in exploration.simulated


def test_an_exploration_continues_without_measuring_again(explored, trained):
    exploration, file = explored
    model, batches = trained
    first = exploration.predicted
    rows = file.read_text()
    names = [json.loads(row)["name"] for row in rows.splitlines()]
    assert len(names) == len(set(names))
    file.write_text(rows + rows.splitlines()[-1][:9])  # a killed process
    again = explore(model, batches, _losses, exploration.grid, file=file, minutes=0.0)
    assert again.predicted == first and file.read_text().startswith(rows)
    other = [(2 * images, labels) for images, labels in batches]
    with refused("another model or other text: give another"):
        explore(model, other, _losses, exploration.grid, file=file)
    label = next(iter(exploration.grid))
    with refused("0 minutes are over: the same command cont"):
        again.excess(label, [99], again.choosing)


def test_costs_are_those_of_every_product(explored):
    """The 16 positions of an image read the convolution, one array of differential cells is 16 rows high."""
    exploration, _ = explored
    label = "adc.bits=4 tile.rows=16"
    config = exploration.grid[label]
    cost = exploration.costs[label]
    read = crossbar.counts((9, 4), config) * 16 + crossbar.counts((64, 6), config)
    assert cost.conversions == read.conversions == 16 * 4 + 4 * 6
    assert cost.reading == crossbar.read_energy(read, config)
    assert cost.written.arrays == 2 + 2 * 4


def test_a_grid_varies_any_field():
    vary = crossbar.parse_vary(["cell.bits=2221,43", "device.readback=null"])
    assert vary == {"cell.bits": [2221, 43], "device.readback": [None]}
    configs = [*crossbar.grid(_NOISY, vary).values()]
    assert [config.cell.bits for config in configs] == [(2, 2, 2, 1), (4, 3)]
    bare = dataclasses.replace(_NOISY, adc=None)
    (config,) = crossbar.grid(bare, {"adc.bits": [5]}).values()
    assert config.adc == crossbar.ADC(bits=5)
    usual = crossbar.grid(_NOISY, crossbar.usual_variations(_NOISY))
    assert len(usual) == 27 and all(
        crossbar.unused_levels(config) is None for config in usual.values()
    )


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("adc.bitz=4", "adc.bitz is unknown: choose from bits"),
        ("adc.bits.more=4", "adc.bits.more is unknown"),
        ("adc.bits=40", "give 2 to 16 bits"),
        ("cell.bits=22", "hold 4 bits"),
        ("adc.bits", "give a field and its values"),
        ("adc.bits=[4", "give a field and its values"),
    ],
)
def test_fields_and_values_that_no_configuration_has_are_refused(vary, message):
    with refused(message):
        crossbar.grid(_NOISY, crossbar.parse_vary([vary]))


def test_what_cannot_be_explored_is_refused(trained):
    model, batches = trained
    with refused("5 batches: give at least 6"):
        explore(model, batches[:5], _losses, {"a": _NOISY})
    ideal = dataclasses.replace(_NOISY, adc=None)
    with refused("no adc: adc = None is an ideal converter"):
        explore(model, batches, _losses, {"no adc": ideal})
