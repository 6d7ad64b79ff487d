"""Preparations of matrices before they are written, against NumPy and against many chips."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from refusals import refusals

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar.preparation.transform import transform, transform_matrices

ALL = crossbar.Mapping(
    scale="column", factors=True, transform="hadamard", clip="optimal"
)
FACTORS = crossbar.Mapping(scale="column", factors=True)
ROTATED = crossbar.Mapping(scale="column", factors=True, transform="hadamard")
INDEPENDENT = crossbar.Device(programming=crossbar.Independent(0.03))


def drawn(kind, shape=(48, 20), seed=0):
    """Return weights whose rows differ in size, and mean squares of their inputs that do too."""
    rng = np.random.default_rng(seed)
    weights = {
        "normal": rng.normal(size=shape),
        "uniform": rng.uniform(-1, 1, size=shape),
        "heavy tails": rng.standard_t(3, size=shape),
    }[kind]
    weights = weights * np.exp(0.5 * rng.normal(size=(shape[0], 1)))
    moments = np.exp(rng.normal(size=shape[0]))
    return jnp.asarray(weights, jnp.float32), jnp.asarray(moments, jnp.float32)


WEIGHTS, MOMENTS = drawn("normal")
NOISY = crossbar.CrossbarConfig(mapping=ALL, device=INDEPENDENT)


def prepared_chip(config):
    preparation = crossbar.prepare({"w": WEIGHTS}, MOMENTS, config)["w"]
    return crossbar.program(WEIGHTS, config, jax.random.key(0), preparation=preparation)


def inputs(rows, width=48):
    return jnp.asarray(np.random.default_rng(1).normal(size=(rows, width)), jnp.float32)


@pytest.mark.parametrize("width", [1, 2, 12, 20, 576, 640])
def test_transform_is_a_hadamard_matrix(width):
    matrix = functools.reduce(np.kron, transform_matrices(width))
    assert_allclose(matrix @ matrix.T, np.eye(width), atol=1e-12)
    assert_allclose(np.abs(matrix), width**-0.5, rtol=1e-12)
    x = inputs(3, width)
    assert_allclose(transform(x, transform_matrices(width)), x @ matrix.T, atol=1e-5)
    again = transform(
        transform(x, transform_matrices(width)), transform_matrices(width), inverse=True
    )
    assert_allclose(again, x, atol=1e-5)


@pytest.mark.parametrize("width", [7, 52, 100, 11008])
def test_other_widths_get_an_orthogonal_matrix(width):
    matrices = transform_matrices(width)
    assert np.prod([len(matrix) for matrix in matrices]) == width
    for matrix in matrices:
        assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-12)


@pytest.mark.parametrize("mapping", [FACTORS, ROTATED, ALL])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_perfect_cells_keep_the_product(mapping, dtype):
    x = inputs(5).astype(dtype)
    exact = crossbar.CrossbarConfig(
        cell=crossbar.Cell(bits=None),
        mapping=replace(mapping, weight_bits=None),
        dac=None,
    )
    chip = prepared_chip(exact)
    expected = np.float64(x) @ WEIGHTS
    assert_allclose(
        np.float64(crossbar.matmul(x, chip)),
        expected,
        atol=2e-5 if dtype == "float32" else 0.1,
    )
    assert_allclose(crossbar.programmed_weights(chip), WEIGHTS, atol=2e-6)


def test_factors_and_ranges_equal_numpy():
    weights, moments = drawn("heavy tails")
    preparation = crossbar.prepare({"w": weights}, moments, NOISY)["w"]
    moments = np.maximum(np.float64(moments), 0.1 * np.median(moments))
    factors = (moments / np.sum(weights**2, axis=1)) ** 0.25
    factors /= np.exp(np.log(factors).mean())
    assert_allclose(np.abs(preparation.factors), factors, rtol=1e-5)
    matrix = functools.reduce(np.kron, transform_matrices(48))
    prepared = matrix @ np.float64(preparation.factors[:, None] * weights)
    square = np.mean(moments / factors**2)
    errors = crossbar.code_errors(NOISY)
    grid = np.linspace(-1, 1, 255)

    def power(column, top):
        codes = np.round(np.clip(column / top, -1, 1) * 127) / 127
        mean = top * (codes + np.interp(codes, grid, errors.mean))
        variance = top**2 * np.interp(codes, grid, errors.variance)
        return square * np.sum((mean - column) ** 2 + variance)

    for column, chosen in zip(prepared.T, np.asarray(preparation.ranges), strict=True):
        shares = np.linspace(1, 0.3, 36) * np.abs(column).max()
        best = min(power(column, top) for top in shares)
        assert power(column, chosen) < 1.005 * best


_FAULTY = crossbar.Device(
    programming=crossbar.Proportional(0.1), stuck=crossbar.StuckAt(low=0.01)
)
_AGED = crossbar.Device(
    programming=crossbar.RERAM_WAN_2022, drift=crossbar.PowerLaw(0.05), time=1e5
)


_READBACK = crossbar.Readback(0.01, repeats=4, offset=0.005, gain=0.01)
_READ_BACK = replace(INDEPENDENT, readback=_READBACK)
_VERIFIED = replace(_READ_BACK, write_verify=crossbar.WriteVerify(0.03))
_MEASURED = crossbar.Device(
    programming=crossbar.RERAM_WAN_2022, time=86_400.0, readback=_READBACK
)
_PLAIN = crossbar.Mapping(scale="column")
_RESIDUAL = {"cell": crossbar.Cell(residual=True), "mapping": _PLAIN}
_ANALOGUE = {
    "cell": crossbar.Cell(bits=None, residual=True, significance=0.2),
    "mapping": replace(_PLAIN, weight_bits=None),
}


@pytest.mark.parametrize(
    ("kind", "device", "parts"),
    [
        ("normal", INDEPENDENT, {}),
        ("uniform", _FAULTY, {}),
        ("heavy tails", _AGED, {}),
        ("normal", _READ_BACK, _RESIDUAL),
        ("normal", _VERIFIED, {"mapping": _PLAIN}),
        ("normal", _MEASURED, _ANALOGUE),
    ],
)
def test_error_power_is_that_of_many_chips(kind, device, parts):
    weights, moments = drawn(kind, (48, 64))
    parts = {"mapping": ALL, **parts}
    config = crossbar.CrossbarConfig(**parts, device=device, dac=None)
    preparation = crossbar.prepare({"w": weights}, moments, config)["w"]
    expected = crossbar.expected_error(weights, moments, config, preparation)

    def error(key):
        chip = crossbar.program(weights, config, key, preparation=preparation)
        power = moments @ jnp.square(crossbar.programmed_weights(chip) - weights)
        return jnp.sum(power) / jnp.sum(moments @ jnp.square(weights))

    measured = jax.vmap(error)(jax.random.split(jax.random.key(1), 50))
    assert float(expected) == pytest.approx(float(measured.mean()), rel=0.05)


def test_inputs_that_the_text_does_not_show_may_come_later():
    """With factors that follow moments of 1e-8, the errors are eleven times those of the right moments."""
    weights, moments = drawn("heavy tails")
    shown = crossbar.expected_error(
        weights, moments, NOISY, crossbar.prepare({"w": weights}, moments, NOISY)["w"]
    )
    hidden = crossbar.expected_error(
        weights,
        moments,
        NOISY,
        crossbar.prepare({"w": weights}, moments.at[:2].set(1e-08), NOISY)["w"],
    )
    assert hidden < 1.1 * shown


def test_matrices_of_one_input_share_factors_and_a_stack_has_its_own():
    stack, moments = zip(
        *[drawn("normal", seed=seed) for seed in range(3)], strict=True
    )
    stack = jnp.stack(stack)
    moments = jnp.stack(moments)
    both = crossbar.prepare({"q": stack[..., :8], "k": stack[..., 8:]}, moments, NOISY)
    assert_array_equal(both["q"].factors, both["k"].factors)
    assert both["q"].ranges.shape == (3, 8) and both["k"].ranges.shape == (3, 12)
    alone = crossbar.prepare(
        {"q": stack[1, :, :8], "k": stack[1, :, 8:]}, moments[1], NOISY
    )
    assert_allclose(both["k"].factors[1], alone["k"].factors, rtol=1e-6)
    assert_allclose(both["k"].ranges[1], alone["k"].ranges, rtol=1e-5)
    chips = crossbar.program_tree(
        {"k": stack[..., 8:]},
        {"*": NOISY},
        jax.random.key(0),
        preparations={"k": both["k"]},
    )
    of_layer = jax.tree.map(lambda leaf: leaf[1], chips["k"])
    x = inputs(40)
    assert (
        np.corrcoef(
            crossbar.matmul(x, of_layer).ravel(), (x @ stack[1, :, 8:]).ravel()
        )[0, 1]
        > 0.99
    )


def test_gradients_pass_through_the_preparation():
    chip = prepared_chip(NOISY)
    x = inputs(1)[0]
    of_inputs = jax.jit(jax.grad(lambda x: crossbar.matmul(x, chip).sum()))(x)
    assert_allclose(
        of_inputs, crossbar.programmed_weights(chip).sum(axis=1), rtol=1e-4, atol=1e-4
    )
    of_weights = jax.grad(
        lambda w: crossbar.matmul(
            x,
            crossbar.program(w, NOISY, jax.random.key(0), preparation=chip.preparation),
        ).sum()
    )(WEIGHTS)
    assert_allclose(of_weights, np.outer(x, np.ones(20)), rtol=1e-3, atol=1e-3)


def test_a_chip_is_calibrated_for_its_prepared_inputs_and_saved_with_them(tmp_path):
    dac = crossbar.DAC(scaling="calibrated")
    chip = prepared_chip(replace(NOISY, dac=dac, adc=crossbar.ADC()))
    x = inputs(64) * jnp.sqrt(MOMENTS)[None]
    for _ in range(2):
        chip = crossbar.calibrated(chip, crossbar.probe(x, chip)[1])
    sizes = np.abs(np.asarray(chip.preparation.inputs(x)))
    assert np.quantile(sizes, 0.99) < chip.input_limit < 1.3 * sizes.max()
    y = crossbar.matmul(x, chip)
    exact = x @ crossbar.programmed_weights(chip)
    assert np.corrcoef(y.ravel(), exact.ravel())[0, 1] > 0.99
    crossbar.save_chip(chip, tmp_path / "chip.safetensors")
    again = crossbar.load_chip(tmp_path / "chip.safetensors")
    assert again.preparation.identity == chip.preparation.identity != ""
    assert_array_equal(crossbar.matmul(x, again), y)


def test_no_errors_keep_the_largest_weight_as_range():
    config = crossbar.CrossbarConfig(mapping=ALL)
    assert crossbar.prepare({"w": WEIGHTS}, MOMENTS, config)["w"].ranges is None
    assert "no errors" in str(crossbar.explain(config, (48, 20)))
    assert "chosen" in str(crossbar.explain(NOISY, (48, 20)))


def prepare(moments=None, config=NOISY, **weights):
    return crossbar.prepare(weights, moments, config)


def program(weights, config=NOISY, preparation=None):
    key = jax.random.key(0)
    return crossbar.program(weights, config, key, preparation=preparation)


def on_chips(weights, preparations=None):
    rules = {"*": NOISY}
    key = jax.random.key(0)
    return crossbar.program_tree(weights, rules, key, preparations=preparations)


def traced(sigma):
    device = crossbar.Device(programming=crossbar.Independent(sigma))
    config = replace(NOISY, device=device)
    return prepare(config=config, w=WEIGHTS)["w"].factors


OTHER = replace(NOISY, mapping=FACTORS)


test_wrong_preparations_are_refused = refusals([
    (lambda: prepare(-MOMENTS, w=WEIGHTS), "48 of 48 moments are negative"),
    (lambda: prepare(MOMENTS[1:], w=WEIGHTS), r"shape \(47,\): expected \(48,\)"),
    (lambda: prepare(MOMENTS, w=WEIGHTS, v=WEIGHTS[1:]), "differ in d_out alone"),
    (lambda: prepare(), "but these are none"),
    (lambda: prepare(w=jnp.ones((523, 4))), "w: a transform of 523 inputs"),
    (lambda: program(WEIGHTS), "need a preparation"),
    (
        lambda: program(WEIGHTS.T, preparation=prepare(w=WEIGHTS)["w"]),
        r"factors of shape \(48,\)",
    ),
    (
        lambda: program(WEIGHTS, OTHER, prepare(w=WEIGHTS)["w"]),
        "has a transform and ranges, and the configuration's mapping does not",
    ),
    (lambda: on_chips({"w": WEIGHTS}), "w: mapping.factors"),
    (
        lambda: on_chips({"w": jnp.stack([WEIGHTS] * 2)}, prepare(w=WEIGHTS)),
        r"w: factors of shape \(48,\) .* expected \(2, 48\)",
    ),
    (
        lambda: on_chips({"w": WEIGHTS}, {"v": prepare(w=WEIGHTS)["w"]}),
        "preparations of v, which are no weights",
    ),
    (lambda: jax.jit(lambda w: prepare(w=w)["w"].factors)(WEIGHTS), "outside of jax.jit"),
    (lambda: jax.jit(traced)(0.03), "outside of jax.jit"),
])  # fmt: skip
