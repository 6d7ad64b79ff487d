"""Writing slice after slice: cells by loops in NumPy, and errors by closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crossbar_strategies import problem

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import Cell, CrossbarConfig, Device, Encoding, Mapping

_ANALOGUE = Cell(bits=None, residual=True, significance=0.2)
_REAL = Mapping(weight_bits=None)
_READBACK = crossbar.Readback(0.01, repeats=4, offset=0.005, gain=0.01)
_KEY = jax.random.key(5)


def _too_small(G, key, time):
    return 0.9137 * G + 0.0107  # no remainder is half-way between two digits


def _written(code, slices, *, rounds, two_sided):
    """Return what a weight's cells hold, and whether a remainder was too large, given (value, top) from the top on."""
    held = 0.0
    clipped = False
    for number, (value, top) in enumerate(slices):
        room = sum(v * t for v, t in slices[number:]) + (
            slices[-1][0] / 2 if rounds else 0
        )
        clipped = clipped or abs(code - held) > room
        digit = (code - held) / value
        digit = np.clip(np.rint(digit) if rounds else digit, -top, top)
        if two_sided:
            pair = ((top + digit) / 2, (top - digit) / 2)
        else:
            pair = (max(digit, 0), max(-digit, 0))
        cells = [top * _too_small(level / top, None, None) for level in pair]
        held = held + value * (cells[0] - cells[1])
    return held, clipped


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize(
    ("cell", "mapping", "slices"),
    [
        (Cell(residual=True), Mapping(), [(64, 1), (16, 3), (4, 3), (1, 3)]),
        (Cell(bits=(3, 2), residual=True), Mapping(weight_bits=6), [(8, 3), (1, 7)]),
        (_ANALOGUE, _REAL, [(1, 1), (0.2, 1)]),
    ],
)
def test_slices_store_what_those_above_missed(cell, mapping, slices, two_sided):
    config = CrossbarConfig(
        cell=cell,
        mapping=mapping,
        encoding=Encoding(two_sided=two_sided),
        tile=crossbar.Tile(rows=8, cols=4),
        device=Device(programming=_too_small),
    )
    W, _ = problem()
    chip = crossbar.program(W, config, _KEY)
    top = 1 if mapping.weight_bits is None else 2 ** (mapping.weight_bits - 1) - 1
    codes = np.asarray(W / (jnp.max(jnp.abs(W)) / top), float)
    rounds = mapping.weight_bits is not None
    codes = np.rint(codes) if rounds else codes
    by_weight = [
        _written(code, slices, rounds=rounds, two_sided=two_sided)
        for code in codes.ravel()
    ]
    held = np.reshape([each[0] for each in by_weight], codes.shape)
    np.testing.assert_allclose(chip.codes, held, rtol=0, atol=2e-5 * top)
    np.testing.assert_allclose(
        chip.clipped, np.mean([e[1] for e in by_weight]), atol=1e-6
    )


_AGED = Device(programming=crossbar.RERAM_WAN_2022, time=86_400.0, readback=_READBACK)
_NOISY = Device(programming=crossbar.Independent(0.03), readback=_READBACK)


def test_relaxation_after_a_reading_does_not_depend_on_it():
    """Zero weights in two-sided pairs: the second pair removes the error of the first second, not what follows."""
    early = 0.02
    late = 0.05
    programming = crossbar.Polynomial(((early,), (late,)), seconds=(1.0, 100.0))
    device = Device(programming=programming, time=100.0, readback=crossbar.Readback())
    config = CrossbarConfig(
        cell=_ANALOGUE,
        mapping=_REAL,
        encoding=Encoding(two_sided=True),
        device=device,
        dac=None,
    )
    W = jnp.zeros((100, 100)).at[0, 0].set(1)
    errors = (crossbar.programmed_weights(crossbar.program(W, config, _KEY)) - W)[1:]
    # A pair's weight is the difference of two cells.
    expected = 2 * (late**2 - early**2) + 0.2**2 * 2 * late**2
    np.testing.assert_allclose(jnp.var(errors), expected, rtol=0.06)


@pytest.mark.parametrize(
    ("sigma", "deviation"), [(0.03, 0.0), (0.03, 0.01), (0.1, 0.0)]
)
def test_the_second_pair_is_as_wide_as_the_errors_need(sigma, deviation):
    draws = np.random.default_rng(1)
    codes = np.clip(draws.normal(scale=1 / 3, size=100_000), -1, 1)

    def pair(codes):
        errors = draws.normal(scale=sigma, size=(2, len(codes)))
        cells = np.maximum(np.maximum([codes, -codes], 0) + errors, 0)
        return cells[0] - cells[1]

    def power(scale):
        second = scale * pair(np.clip(missed / scale, -1, 1))
        return np.mean((first + second - codes) ** 2)

    first = pair(codes)
    missed = codes - first - 2**0.5 * draws.normal(scale=deviation, size=codes.shape)
    least = min(power(scale) for scale in np.geomspace(0.05, 0.5, 20))
    device = Device(
        programming=crossbar.Independent(sigma), readback=crossbar.Readback(deviation)
    )
    config = CrossbarConfig(
        cell=Cell(bits=None, residual=True), mapping=_REAL, device=device
    )
    assert power(config.cell.significance) < 1.03 * least


def test_matrices_of_a_stack_are_written_with_their_own_keys():
    cell = dataclasses.replace(_ANALOGUE, significance=0.05)
    config = CrossbarConfig(cell=cell, mapping=_REAL, device=_NOISY, dac=None)
    stack = jnp.stack([problem(seed=seed)[0] for seed in (0, 1)])
    keys = jax.random.split(_KEY, 2)
    both = jax.vmap(lambda W, key: crossbar.program(W, config, key))(stack, keys)
    chip = crossbar.program(stack[1], config, keys[1])
    np.testing.assert_allclose(both.clipped[1], chip.clipped, rtol=1e-6)
    np.testing.assert_allclose(both.codes[1], chip.codes, atol=1e-6)
    assert 0.1 < chip.clipped < 0.4


def test_readbacks_cost_energy_and_time():
    def cost(device):
        config = CrossbarConfig(cell=Cell(residual=True), device=device)
        return crossbar.write_cost(crossbar.counts((6, 5), config))

    aged = dataclasses.replace(_AGED, readback=crossbar.Readback(repeats=2, after=3.0))
    plain = crossbar.write_cost(crossbar.counts((6, 5), CrossbarConfig()))
    assert plain.readbacks == 0
    assert cost(_NOISY).readbacks == 4 * cost(Device()).readbacks == 4 * 6 * 5 * 6
    assert cost(_NOISY).energy.typical > plain.energy.typical
    assert cost(aged).time.typical - plain.time.typical == pytest.approx(9.0, rel=0.01)
