"""Derivatives with respect to a crossbar's values: finite differences with common random numbers, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    Cell,
    CrossbarConfig,
    Device,
    Independent,
    ReadNoise,
    Tile,
    matmul,
    program,
)

CHIP = jax.random.key(11)
READ = jax.random.key(12)
WIDE = ADC(
    bits=16, range="given", limits=((-8.0, 8.0),) * 4
)  # rounds little and clips nothing


def problem():
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=shape)) for shape in ((20, 7), (3, 20), (3, 7)))


def by_definition(values):
    adc = dataclasses.replace(
        WIDE, offset_error=values["offset"], gain_error=values["gain"]
    )
    device = Device(
        iv=crossbar.Sinh(values["voltage"], values["scale"]),
        read_noise=ReadNoise(values["noise"]),
    )
    tile = Tile(rows=8, current_limit=values["current"])
    return CrossbarConfig(
        cell=Cell(on_off_ratio=values["ratio"]),
        dac=None,
        adc=adc,
        tile=tile,
        device=device,
    )


VALUES = {
    "gain": 0.1,
    "offset": 0.2,
    "noise": 0.05,
    "ratio": 5.0,
    "current": 0.9,
    "voltage": 0.3,
    "scale": 0.25,
}


# Values that no ADC rounds have theirs in `test_fuzz.py`.
@pytest.mark.long
@pytest.mark.usefixtures("fusion_emitters")
def test_values_have_the_derivatives_of_finite_differences():
    with jax.enable_x64(True):
        W, x, C = problem()

        def loss(values):
            return jnp.sum(
                C
                * matmul(
                    x,
                    crossbar.with_read_key(
                        program(W, by_definition(values), CHIP), READ
                    ),
                )
            )

        both = jax.jit(jax.value_and_grad(loss))
        at = {name: jnp.asarray(value) for name, value in VALUES.items()}
        _, gradient = both(at)
        for (
            name,
            value,
        ) in (
            at.items()
        ):  # an ADC of 16 bits still has steps, which are small over a distance
            step = (0.3 if name in ("gain", "offset", "noise") else 0.03) * value
            wanted = (
                both(at | {name: value + step})[0] - both(at | {name: value - step})[0]
            ) / (2 * step)
            assert abs(wanted) > 1e-3
            np.testing.assert_allclose(
                gradient[name], wanted, rtol=0.05, atol=1e-8, err_msg=name
            )
        _, along = jax.jit(lambda at: jax.jvp(loss, (at,), (at,)))(at)
        np.testing.assert_allclose(
            along, sum(gradient[name] * at[name] for name in at), rtol=1e-8
        )


def test_compensation_cancels_a_drift_that_is_the_same_in_all_cells():
    """Rounding of inputs, which the derivative passes straight through, has no part in it."""
    W, x, C = map(jnp.float32, problem())

    def both(compensate):
        def loss(exponent):
            device = Device(
                drift=crossbar.PowerLaw(exponent), time=1e4, compensate=compensate
            )
            return jnp.sum(
                C
                * matmul(
                    x,
                    program(
                        W, CrossbarConfig(dac=crossbar.DAC(bits=4), device=device), CHIP
                    ),
                )
            )

        return jax.jit(jax.value_and_grad(loss))

    young, slope = both(True)(jnp.float32(0.05))
    old, _ = both(True)(jnp.float32(0.1))
    np.testing.assert_allclose(young, old, rtol=1e-5)
    assert abs(slope) < 1e-4 * abs(both(False)(jnp.float32(0.05))[1])


def test_weights_keep_their_gradient_beside_that_of_the_cells():
    """Weights pass straight through what makes their scale: that of program and programmed_weights is the identity."""
    W = jnp.asarray(np.random.default_rng(1).normal(size=(6, 5)), jnp.float32)
    config = CrossbarConfig(device=Device(programming=Independent(0.05)))
    C = jnp.asarray(np.random.default_rng(2).normal(size=(6, 5)), jnp.float32)
    gradient = jax.grad(
        lambda W: jnp.sum(C * crossbar.programmed_weights(program(W, config, CHIP)))
    )
    np.testing.assert_allclose(jax.jit(gradient)(W), C, rtol=1e-5)


STUCK = Device(stuck=crossbar.StuckAt(low=0.1, high=0.1))
VERIFIED = Device(
    programming=crossbar.Proportional(0.1), write_verify=crossbar.WriteVerify(0.05)
)
WIRED = Tile(
    wire=crossbar.Wire(row_resistance=1e-3, column_resistance=1e-3, relaxation=0.5)
)


@pytest.mark.parametrize(
    "config, where, message",
    [
        (
            CrossbarConfig(device=STUCK),
            "device.stuck.low",
            r"StuckAt.low has no gradient: .* take differences",
        ),
        (
            CrossbarConfig(device=VERIFIED),
            "device.write_verify.tolerance",
            r"WriteVerify.tolerance has no gradient",
        ),
        (
            CrossbarConfig(device=VERIFIED),
            "device.programming.sigma",
            r"write-verify has no gradient",
        ),
        (
            CrossbarConfig(tile=WIRED),
            "tile.wire.row_resistance",
            r"tile.wire.row_resistance has no gradient",
        ),
        (
            CrossbarConfig(tile=WIRED, cell=Cell(on_off_ratio=9.0)),
            "cell.on_off_ratio",
            r"cell.on_off_ratio has no",
        ),
    ],
)
def test_a_value_without_gradient_is_refused_rather_than_zero(config, where, message):
    leaves, tree = jax.tree.flatten_with_path(config)
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves
    ]
    at = names.index(where)

    def loss(value):
        config = jax.tree.unflatten(
            tree, [value if i == at else leaf for i, (_, leaf) in enumerate(leaves)]
        )
        return jnp.sum(
            matmul(jnp.ones((2, 6)), program(jnp.ones((6, 5)), config, CHIP))
        )

    with pytest.raises(ValueError, match=message):
        jax.grad(loss)(jnp.float32(leaves[at][1]))


def test_a_value_that_acts_at_programming_is_learned_through_it():
    W = jnp.ones((6, 5), jnp.float32)
    x = jnp.ones((2, 6), jnp.float32)

    def made(limit):
        return CrossbarConfig(dac=crossbar.DAC(scaling="fixed", limit=limit))

    through = jax.grad(lambda limit: jnp.sum(matmul(x, program(W, made(limit)))))(
        jnp.float32(0.5)
    )
    np.testing.assert_allclose(
        through, 60, rtol=1e-5
    )  # every input is clipped to the limit


def test_an_input_of_zero_has_no_noise_and_no_undefined_derivative():
    W = jnp.ones((6, 5), jnp.float32)
    x = jnp.zeros((2, 6), jnp.float32)

    @jax.jit
    @jax.grad
    def gradient(sigma):
        noise = ReadNoise(0.1, "proportional")
        config = CrossbarConfig(
            device=Device(programming=Independent(sigma), read_noise=noise)
        )
        return jnp.sum(
            matmul(x, crossbar.with_read_key(program(W, config, CHIP), READ))
        )

    assert gradient(jnp.float32(0.1)) == 0


def test_an_eager_read_is_compiled_once(caplog):
    config = CrossbarConfig(adc=ADC(bits=6, range="max"))
    state = program(
        jnp.ones((11, 13), jnp.float32), config
    )  # a size of this test alone
    x = jnp.ones((2, 11), jnp.float32)
    other = jnp.zeros((2, 11), jnp.float32)
    for read in (matmul, crossbar.probe):
        with jax.log_compiles():
            read(x, state)
            assert "Compiling" in caplog.text
            caplog.clear()
            read(other, state)
            assert "Compiling" not in caplog.text
