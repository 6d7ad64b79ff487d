"""Arrays over devices: reads, calibration and programming under `jax.shard_map`."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from numpy.testing import assert_allclose

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    Cell,
    CrossbarConfig,
    Device,
    Encoding,
    Independent,
    Mapping,
    ReadNoise,
    Tile,
    Wire,
    flax as crossbar_flax,
)

_TILE = Tile(rows=16, cols=12)
_ADC = ADC(bits=6, range="max")
_PLAIN = CrossbarConfig(cell=Cell(bits=(2, 2, 2, 2)), tile=_TILE, adc=_ADC)
_WIRED = replace(_PLAIN, tile=Tile(rows=16, cols=12, wire=Wire(row_resistance=1e-4)))
_CASES = {
    "definition": (_PLAIN, "definition"),
    "loop": (_PLAIN, "loop"),
    "packed": (_PLAIN, "packed"),
    "lookup": (_PLAIN, "lookup"),
    "row tiles": (
        replace(
            _PLAIN, mapping=Mapping(scale="tile"), encoding=Encoding(kind="offset")
        ),
        "loop",
    ),
    "noise": (
        replace(_PLAIN, device=Device(read_noise=ReadNoise(0.01))),
        "loop",
    ),
    "wires": (_WIRED, None),
}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh(
        (2, 2), ("chips", "inputs"), axis_types=(AxisType.Auto, AxisType.Auto)
    )


def _chip(config, path=None, seed=0):
    key = jax.random.key(seed)
    chip = crossbar.program(jax.random.normal(key, (40, 20)), config, path=path)
    return crossbar.with_read_key(chip, key) if config.reads_at_random else chip


def _inputs():
    return jax.random.normal(jax.random.key(2), (4, 40))


@pytest.mark.parametrize(
    "name",
    [
        "packed",
        *(pytest.param(n, marks=pytest.mark.long) for n in _CASES if n != "packed"),
    ],
)
def test_chips_and_inputs_may_differ_between_devices(name, mesh):
    config, path = _CASES[name]
    chips = [_chip(config, path, seed) for seed in (0, 1)]
    x = _inputs()

    def read(x, chips):
        return crossbar.matmul(x, jax.tree.map(lambda leaf: leaf[0], chips))[None]

    shared = jax.shard_map(
        read,
        mesh=mesh,
        in_specs=(P("inputs"), P("chips")),
        out_specs=P("chips", "inputs"),
    )
    found = jax.jit(shared)(x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *chips))
    # Draws belong to an input's place on its device.
    wanted = [
        jnp.concatenate([crossbar.matmul(part, chip) for part in (x[:2], x[2:])])
        for chip in chips
    ]
    assert_allclose(
        found, wanted, rtol=1e-4, atol=1e-5 * float(jnp.abs(jnp.stack(wanted)).max())
    )


def test_devices_verify_the_cells_of_their_own_chips(mesh):
    device = Device(
        programming=Independent(0.05), write_verify=crossbar.WriteVerify(0.03)
    )
    config = replace(_PLAIN, device=device)
    keys = jax.random.split(jax.random.key(3), 2)
    weights = jax.random.normal(jax.random.key(4), (6, 5))

    def written(keys):
        chip = crossbar.program(weights, config, keys[0])
        return chip.codes[None], chip.pulses[None]

    codes, pulses = jax.jit(
        jax.shard_map(written, mesh=mesh, in_specs=P("chips"), out_specs=P("chips"))
    )(keys)
    for i, key in enumerate(keys):
        chip = crossbar.program(weights, config, key)
        assert_allclose(codes[i], chip.codes, rtol=1e-5, atol=1e-5)
        assert pulses[i] == pytest.approx(chip.pulses)


def test_chips_of_a_flax_model_are_read_where_they_are():
    """As docs/guides/flax.md shares them out."""
    config = replace(_PLAIN, device=Device(programming=Independent(0.03)))
    model = nnx.Linear(40, 20, rngs=nnx.Rngs(0))
    x = _inputs()
    chips = [
        crossbar_flax.convert(model, {"*": config}, jax.random.key(number))
        for number in range(4)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *chips)
    mesh = jax.make_mesh((4,), ("chips",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(stacked, NamedSharding(mesh, P("chips")))
    read = jax.vmap(lambda model: model(x))
    alone, stacked = tiny.compiled(read, stacked)
    shared, spread = tiny.compiled(read, spread)
    assert not re.search(
        r"all-(reduce|gather|to-all)|collective-permute|reduce-scatter",
        shared.as_text(),
    )
    np.testing.assert_array_equal(shared(spread), alone(stacked))
