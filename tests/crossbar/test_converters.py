"""What converters do to column sums, against NumPy in float64: ties, ranges, mismatch, flipped columns, bad inputs."""

import dataclasses
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from crossbar_problems import problem

from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    Cell,
    CrossbarConfig,
    Device,
    Encoding,
    Independent,
    Mapping,
    ReadNoise,
    Tile,
    Wire,
    calibrated,
    explain,
    matmul,
    probe,
    program,
    with_read_key,
)
from lorafusion_jax.crossbar.mapping.adc.quantiser import Converter
from lorafusion_jax.crossbar.read import definition as definition_module

UNSIGNED = DAC(signed=False, scaling="fixed")
OFFSET, UNIT = Encoding(kind="offset"), Encoding(kind="offset", unit_column=True)
FLIP = Encoding(kind="offset", unit_column=True, flip=True)
KEY = jax.random.key(3)
problem = functools.partial(problem, d_in=40, d_out=6, batch=16, seed=1)


def relative(y, exact):
    return float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact))


def offset_read(weights, x, bits, step, adc_bits):
    """Unsigned 8-bit inputs bit by bit, 8-bit weights with a digital offset, one array: in float64, loop by loop."""
    scale = np.abs(weights).max() / 127
    u, n = np.round(weights / scale).astype(int) + 128, np.round(x * 255).astype(int)
    total, start = np.zeros((len(x), weights.shape[1])), 0
    for k, width in enumerate(bits):
        digits = (u >> start) & (2**width - 1)
        for j in range(8):
            sums = ((n >> j) & 1) @ digits
            total += 2.0 ** (start + j) * step[k] * np.clip(np.round(sums / step[k]), 0, 2**adc_bits - 1)
        start += width
    return (total - 128 * n.sum(1, keepdims=True)) * scale / 255


@pytest.mark.parametrize(
    "bits", [(2, 6), *(pytest.param(bits, marks=pytest.mark.long) for bits in ((4, 4), (3, 3, 2), (8,)))]
)
def test_calibrated_codes_of_sums_between_two_are_the_even_one(bits):
    """Steps are whole levels, so that every other sum of a step of 2 is a tie: in float32 the result of float64."""
    config = CrossbarConfig(cell=Cell(bits=bits), encoding=OFFSET, dac=UNSIGNED, adc=ADC(bits=7))
    weights, x = problem(d_in=120, low=0.2)
    state = program(weights, config)
    state = calibrated(state, probe(x, state)[1])
    step = np.asarray(state.limits[0, :, 1] * np.asarray([2**b - 1 for b in bits], np.float32) / 127, float)
    exact = offset_read(np.asarray(weights, float), np.asarray(x, float), bits, np.round(step), 7)
    np.testing.assert_allclose(step, np.round(step), rtol=1e-6)
    assert (np.round(step) > 1).any()
    np.testing.assert_allclose(matmul(x, state), exact, rtol=0, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("top", [3, 63, 127, 1023])
def test_codes_are_those_of_fractions(top):
    """Every integer sum of every range, where no step is a power of two; Python rounds half to even."""

    @jax.jit
    def codes(sums, span, near):
        adc = Converter(span[None], -top, top, divides=True)
        counted, clipped = adc._replace(counts=True)(sums, span), adc.clips(adc.scaled(sums, span))
        return adc(sums, span), jax.vmap(adc._half_to_even, (0, None, None))(near, sums, span), counted, clipped

    for span in (1, 2, 6, 60, 384, 1001, 3825):
        sums = np.arange(-span - 3, span + 4)
        exact = [Fraction(int(s) * top, span) for s in sums]
        whole = np.array([round(code) for code in exact])
        near = whole + np.array([[-1], [0], [1]])  # as a product with the inverse of a span may round
        found, corrected, counted, clipped = codes(*(jnp.asarray(a, jnp.float32) for a in (sums, span, near)))
        np.testing.assert_array_equal(found, np.clip(whole, -top, top))
        np.testing.assert_array_equal(corrected, np.broadcast_to(whole, near.shape))
        beyond = [abs(code) > top + Fraction(1, 2) for code in exact]
        np.testing.assert_array_equal(counted, beyond)
        np.testing.assert_array_equal(clipped, beyond)


@pytest.mark.parametrize("path", ["definition", "loop", "lookup", "planes", "packed", "mosaic"])
def test_codes_at_max_of_sums_between_two_are_the_even_one(path):
    """40 rows of 4-bit cells and 4-bit codes: a step of 600 / 15 levels, of which half is a sum that occurs."""
    config = CrossbarConfig(cell=Cell(bits=(4, 4)), encoding=OFFSET, dac=UNSIGNED, adc=ADC(bits=4, range="max"))
    weights, x = problem(low=0.2)
    exact = offset_read(np.asarray(weights, float), np.asarray(x, float), (4, 4), [40 * 15 / 15] * 2, 4)
    y = matmul(x, program(weights, config, path=path))
    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize(
    "encoding, separate",
    [
        (UNIT, False),
        pytest.param(OFFSET, False, marks=pytest.mark.long),
        pytest.param(Encoding(), True, marks=pytest.mark.long),
    ],
)
def test_gain_errors_multiply_the_current_of_gmin_too(encoding, separate):
    adc = ADC(bits=14, range="max", gain_error=0.05, separate=separate)
    config = CrossbarConfig(cell=Cell(on_off_ratio=10.0), encoding=encoding, adc=adc)
    weights, x = problem()
    wanted = matmul(x, program(weights, config, KEY, path="definition"))
    for path in ("loop", "lookup"):
        assert relative(matmul(x, program(weights, config, KEY, path=path)), wanted) < 2e-3


@pytest.mark.long
@pytest.mark.parametrize(
    "kind, ratio, encoding, converter",
    [
        ("independent", 10.0, OFFSET, {}),
        ("independent", None, Encoding(), {"gain_error": 0.5, "separate": True}),
        pytest.param("proportional", 10.0, Encoding(), {}, marks=pytest.mark.nightly),
        pytest.param("proportional", 4.0, FLIP, {}, marks=pytest.mark.nightly),
    ],
)
def test_every_path_has_the_read_noise_of_the_definition(kind, ratio, encoding, converter):
    """The standard deviation of `sum over cells of u^2 v`, Gmin among the conductances: 3 % over 16 x 6 x 200 draws."""
    device = Device(read_noise=ReadNoise(0.3, kind))
    adc = ADC(bits=14, range="max", **converter)  # a column whose ADC has gain g has g times the noise
    config = CrossbarConfig(cell=Cell(on_off_ratio=ratio), encoding=encoding, adc=adc, device=device)
    weights, x = problem()
    keys = jax.random.split(KEY, 200)

    def spread(path):
        state = program(weights, config, KEY, path=path)
        drawn = jax.lax.map(lambda key: matmul(x, with_read_key(state, key)), keys)
        return float(jnp.sqrt(jnp.mean(jnp.var(drawn, axis=0))))

    wanted = spread("definition")
    assert [spread(path) / wanted for path in (None, "loop")] == pytest.approx([1, 1], rel=0.03)


def test_noise_below_zero_is_cut_off_in_flipped_columns_too():
    """Few inputs, so that sums are near zero, where an unsigned ADC has no codes below: the definition's mean."""
    weights, x = problem(d_in=64, d_out=8, batch=1, low=0.0)
    x = jnp.where(jnp.arange(64) % 10 == 0, x, 0)
    config = CrossbarConfig(
        cell=Cell(bits=(1,) * 8), encoding=FLIP, dac=UNSIGNED, adc=ADC(bits=8, range="max", noise=0.5)
    )
    keys = jax.random.split(KEY, 2000)

    def mean(path):
        state = program(weights, config, path=path)
        return jnp.mean(jax.lax.map(lambda key: matmul(x, with_read_key(state, key)), keys, batch_size=500), axis=0)

    np.testing.assert_allclose(mean(None), mean("definition"), atol=0.3)
    with pytest.raises(ValueError, match="path='loop' cannot compute noise below zero"):
        program(weights, config, path="loop")


@pytest.mark.parametrize(
    "bits, ratio, adc",
    [
        pytest.param((1,) * 8, None, ADC(bits=12, range="max"), marks=pytest.mark.long),
        ((2,) * 4, 10.0, ADC(bits=12, range="max")),
        pytest.param((1,) * 8, None, ADC(bits=6), marks=pytest.mark.long),
        pytest.param((1,) * 4, 20.0, ADC(bits=6), marks=pytest.mark.long),
    ],
)
def test_ranges_cover_the_unit_column_of_flipped_arrays(bits, ratio, adc):
    """Inputs near full scale: the unit column carries as much current as any; flipping is no worse than not."""
    weights, x = problem(low=0.8)
    errors, shares = [], []
    for encoding in (UNIT, FLIP):
        cell, mapping = Cell(bits=bits, on_off_ratio=ratio), Mapping(weight_bits=sum(bits))
        config = CrossbarConfig(cell=cell, encoding=encoding, mapping=mapping, dac=UNSIGNED, adc=adc)
        paths = (None, "definition")
        states = [program(weights, config, path=path) for path in paths]
        states = [calibrated(state, probe(x, state)[1]) for state in states]
        y, other = (matmul(x, state) for state in states)
        np.testing.assert_allclose(other, y, rtol=0, atol=2e-3 * float(jnp.abs(y).max()))
        errors.append(relative(y, x @ weights))
        of_paths = [probe(x, state)[1].clip_share for state in states if state.plan.path != "product"]
        shares += [float(jnp.max(share)) for share in of_paths]
        assert (explain(config, weights.shape).lost_bits is None) == (ratio is not None)  # Gmin makes sums real numbers
    assert errors[1] < 1.5 * errors[0] + 0.01
    assert max(shares, default=0) < 0.01


def test_calibrated_ranges_cover_flipped_columns_whose_cells_exceed_their_targets():
    """All cells at Gmax where half of it is the target of a flipped column: the range is what the sums reach."""
    config = CrossbarConfig(encoding=FLIP, dac=UNSIGNED, adc=ADC(bits=8, quantile=1.0))
    weights, _ = problem()
    cells = program(weights, config, path="definition").cells
    state = program(weights, config, conductances=jnp.ones_like(cells))
    x = jnp.ones((2, 40), jnp.float32)
    state = calibrated(state, probe(x, state)[1])
    np.testing.assert_allclose(state.limits[0, :, 1], 40, rtol=1e-3)
    assert float(jnp.max(probe(x, state)[1].clip_share)) == 0


@pytest.mark.parametrize("path", ["definition", "loop", "lookup", "planes", "packed", "mosaic", "product"])
@pytest.mark.parametrize("scaling", ["fixed", pytest.param("row", marks=pytest.mark.long)])
def test_an_input_that_is_not_a_number_makes_its_row_not_a_number(path, scaling):
    adc = ADC(bits=14, range="granular") if path == "product" else ADC(range="max")
    config = CrossbarConfig(dac=DAC(scaling=scaling), adc=adc)
    weights, x = problem(batch=3)
    y = matmul(x.at[1, 7].set(jnp.nan), program(weights, config, path=path))
    assert jnp.isnan(y[1]).all()
    assert jnp.isfinite(y[jnp.array([0, 2])]).all()


LIMITS = np.stack([np.stack([[-a, a]] * 4) for a in (3.0, 6.0, 2.0, 5.0)])  # [R 4, K 4, 2]


RANGES_BY_ROW = CrossbarConfig(tile=Tile(rows=10), adc=ADC(bits=5, range="given", limits=LIMITS.tolist()))


def read_with_ranges(limits, path):
    weights, x = problem(batch=4)
    traced = dataclasses.replace(RANGES_BY_ROW, adc=dataclasses.replace(RANGES_BY_ROW.adc, limits=limits))
    return matmul(x, program(weights, traced, path=path))


@pytest.mark.parametrize("path", ["loop", "lookup", pytest.param("planes", marks=pytest.mark.long), "packed", "mosaic"])
def test_row_tiles_with_ranges_of_their_own_are_read_as_defined(path):
    """Given, under jit, or put in: the result does not depend on it."""
    weights, x = problem(batch=4)
    wanted = matmul(x, program(weights, RANGES_BY_ROW, path="definition"))
    plain = dataclasses.replace(RANGES_BY_ROW, adc=ADC(bits=5, range="given", limits=LIMITS[0].tolist()))
    assert relative(matmul(x, program(weights, plain, path="definition")), wanted) > 0.01
    limits = jnp.asarray(LIMITS, jnp.float32)
    put_in = dataclasses.replace(program(weights, plain, path=path), limits=limits)
    bound = {"rtol": 0, "atol": 1e-6 * float(jnp.abs(wanted).max())}
    np.testing.assert_allclose(matmul(x, program(weights, RANGES_BY_ROW, path=path)), wanted, **bound)
    np.testing.assert_allclose(matmul(x, put_in), wanted, **bound)
    np.testing.assert_allclose(jax.jit(lambda limits: read_with_ranges(limits, path))(limits), wanted, **bound)


def test_ranges_of_row_tiles_have_the_gradient_of_the_definition():
    limits = jnp.asarray(LIMITS, jnp.float32)
    wanted, found = (
        jax.jit(jax.grad(lambda limits, path=path: jnp.sum(read_with_ranges(limits, path))))(limits)
        for path in ("definition", "loop")
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * float(jnp.abs(wanted).max()))


def test_ranges_that_no_array_has_are_refused():
    weights, x = problem()
    config = CrossbarConfig(tile=Tile(rows=10), adc=ADC(range="max"))
    state = dataclasses.replace(program(weights, config), limits=jnp.asarray(LIMITS[:3], jnp.float32))
    with pytest.raises(ValueError, match=r"chip.limits of shape \(3, 4, 2\): give .* or \(4, 4, 2\)"):
        matmul(x, state)


def test_ranges_that_lose_bits_do_not_pass_for_lossless_ones():
    """A lossless ADC leaves one product behind, which cannot clip: refused, and NaN where a program cannot refuse."""
    weights, x = problem()
    config = CrossbarConfig(adc=ADC(bits=9, range="granular"))
    state = program(weights, config)
    assert state.plan.path == "product"
    narrow = dataclasses.replace(state, limits=state.limits / 8)
    with pytest.raises(ValueError, match="chip.limits lose bits, .* path='loop'"):
        matmul(x, narrow)
    assert jnp.isnan(jax.jit(lambda limits: matmul(x, dataclasses.replace(state, limits=limits)))(narrow.limits)).all()
    y = matmul(x, program(weights, config, path="loop"))
    np.testing.assert_allclose(matmul(x, state), y, rtol=0, atol=1e-5 * float(jnp.abs(y).max()))


def test_negative_inputs_of_an_unsigned_dac_have_no_gradient():
    """The read sees max(x, 0): so do the gradients of inputs and of weights."""
    config = CrossbarConfig(
        dac=DAC(bits=16, slice_bits=None, signed=False), mapping=Mapping(weight_bits=16), cell=Cell(bits=(8, 8))
    )
    weights, x = problem(batch=4)

    def loss(x, weights):
        return jnp.sum(jnp.sin(matmul(x, program(weights, config))))

    def clipped(x, weights):
        return jnp.sum(jnp.sin(jnp.dot(jnp.maximum(x, 0), weights, precision="highest")))

    found, wanted = (jax.grad(of, argnums=(0, 1))(x, weights) for of in (loss, clipped))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "config",
    [
        CrossbarConfig(
            adc=ADC(range="max"), tile=Tile(rows=32, wire=Wire(row_resistance=1e-3, column_resistance=1e-3))
        ),
        CrossbarConfig(adc=ADC(range="max"), tile=Tile(rows=32), device=Device(read_noise=ReadNoise(0.1, clip=True))),
    ],
    ids=["wires", "clipped noise"],
)
@pytest.mark.usefixtures("own_programs")
def test_cells_that_are_read_one_by_one_keep_to_the_budget(config, monkeypatch):
    """96 x 96, 64 inputs: [B 64, J 7, K 4, P 2, 96, 96] float32 cells are 132 MB; what is there at once is 2 MiB."""
    weights, x = problem(d_in=96, d_out=96, batch=64)
    leaves, structure = jax.tree.flatten(program(weights, config, path="definition"))

    monkeypatch.setattr(definition_module, "BUDGET", 2**21)
    read = jax.jit(lambda x, leaves: matmul(x, with_read_key(jax.tree.unflatten(structure, leaves), KEY)))
    assert read.lower(x, leaves).compile().memory_analysis().temp_size_in_bytes < 2 * 2**21


@pytest.mark.usefixtures("own_programs")
def test_a_read_in_parts_gives_the_read_at_once(monkeypatch):
    weights, x = problem()
    config = CrossbarConfig(adc=ADC(range="max"), tile=Tile(rows=10, cols=3))
    chip = program(weights, config, path="definition")
    whole = matmul(x, chip)
    monkeypatch.setattr(definition_module, "BUDGET", 2**9)  # bytes: two of four weight slices at a time
    jax.clear_caches()  # a read is traced once for its arguments, and the budget is none of them
    np.testing.assert_array_equal(matmul(x, chip), whole)


def test_read_noise_on_an_accelerator_is_drawn_once_for_each_conversion():
    config = CrossbarConfig(adc=ADC(range="max"), device=Device(read_noise=ReadNoise(0.1)))
    weights, _ = problem()
    with tiny.for_tpu():
        assert program(weights, config).plan.path in ("loop", "packed")
        assert program(weights, dataclasses.replace(config, device=Device())).plan.path == "definition"


_REAL = Device(programming=Independent(0.02))


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({}, "mosaic"),
        ({"adc": ADC(range="max"), "device": _REAL}, "mosaic"),
        ({"adc": ADC(range="max")}, "definition"),  # its steps are not powers of two: conversions divide
        ({"dac": DAC(bits=11, slice_bits=9)}, "definition"),
        ({"device": Device(read_noise=ReadNoise(0.1))}, "packed"),
    ],
)
def test_one_tpu_reads_with_a_kernel(changes, path):
    weights, x = problem(batch=4)
    config = CrossbarConfig(**{"adc": ADC(range="calibrated"), **changes})
    with tiny.for_tpu():
        chip = program(weights, config, KEY)
        assert chip.plan.path == path
        if path != "mosaic":
            return
        chip = chip if chip.limits is not None else dataclasses.replace(chip, limits=jnp.full((1, 4, 2), 8.0))
        leaves, structure = jax.tree.flatten(chip)
        read = jax.jit(lambda x, leaves: matmul(x, jax.tree.unflatten(structure, leaves)))
        lowered = read.trace(x, leaves).lower(lowering_platforms=("tpu",)).as_text()
        assert "tpu_custom_call" in lowered and ("xi8>" in lowered) == chip.plan.integers
    # Elsewhere Pallas reads the same chip by a loop.
    defined = dataclasses.replace(program(weights, config, KEY, path="definition"), limits=chip.limits)
    wanted = matmul(x, defined)
    bound = 0 if chip.plan.integers else 0.02 * float(jnp.abs(wanted).max())  # a sum close to a tie may differ
    np.testing.assert_allclose(read(x, leaves), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("kind", "mesh", "path"),
    [("TPU v4", (), "definition"), ("TPU v6 lite", (1, 1), "mosaic"), ("TPU v6 lite", (2, 1), "definition")],
)
def test_no_kernel_where_bytes_are_not_multiplied_or_a_mesh_splits_arrays(kind, mesh, path):
    weights, config, plans = problem()[0], CrossbarConfig(adc=ADC(range="calibrated")), []
    with tiny.for_tpu(kind, mesh):
        jax.eval_shape(lambda weights: plans.append(program(weights, config).plan), weights)
    assert [plan.path for plan in plans] == [path]


@pytest.mark.parametrize(("dac", "narrow"), [(DAC(slice_bits=4), True), (DAC(bits=10, slice_bits=9), False)])
def test_an_accelerator_multiplies_small_integers_in_bfloat16(dac, narrow):
    """The sums are exact. Slices of nine bits are not bfloat16 numbers."""
    weights, x = problem(batch=4)
    config = CrossbarConfig(dac=dac, adc=ADC(range="max"))
    chip = program(weights, config, path="definition")
    leaves, structure = jax.tree.flatten(chip)
    read = jax.jit(lambda x, leaves: matmul(x, jax.tree.unflatten(structure, leaves)))
    wanted = read(x, leaves)
    with tiny.for_tpu():
        assert ("bf16" in read.lower(x, leaves).as_text()) == narrow
        np.testing.assert_array_equal(read(x, leaves), wanted)
