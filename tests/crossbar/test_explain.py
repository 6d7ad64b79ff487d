"""`explain` against the arrays that programming really makes, and lost bits against ADCs that have them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    PRESETS,
    Cell,
    CrossbarConfig,
    Encoding,
    Tile,
    counts,
    explain,
    program,
)

SMALL = Tile(rows=16, cols=12)
CONFIGS = {
    "separate": CrossbarConfig(tile=SMALL, adc=ADC(separate=True)),
    "sum": CrossbarConfig(tile=SMALL, adc=ADC(convert="sum")),
    "unit column": CrossbarConfig(
        tile=SMALL, encoding=Encoding(kind="offset", unit_column=True), adc=ADC()
    ),
    "unsigned": CrossbarConfig(
        tile=SMALL, dac=DAC(signed=False, slice_bits=3), adc=ADC(bits=6)
    ),
    "unequal": CrossbarConfig(
        tile=SMALL, cell=Cell(bits=(2, 2, 4)), adc=ADC(range="granular")
    ),
    "whole": CrossbarConfig(tile=Tile(rows=None, cols=None), adc=ADC(range="max")),
    "noise and swept values": CrossbarConfig(
        adc=ADC(),
        device=crossbar.Device(
            programming=crossbar.Independent(jnp.float32(0.1)),
            read_noise=crossbar.ReadNoise(jnp.float32(0.1)),
        ),
    ),
    **PRESETS,
}


@pytest.mark.parametrize("shape", [(40, 30), (5, 70)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_counts_are_those_of_the_programmed_arrays(config, shape):
    said = explain(config, shape)
    found = counts(shape, config)
    key = jax.random.key(1)
    cells = jax.eval_shape(
        lambda weights: program(weights, config, key, path="definition").cells,
        jnp.zeros(shape),
    )
    K, P, R, C, _, columns = cells.shape
    assert (
        said.tiles == (R, C)
        and said.polarities == P
        and max(1, len(said.weight_slices)) == K
    )
    assert said.arrays == found.arrays == K * P * R * C
    used = crossbar.Geometry.of(shape, config).cells_in_use
    assert said.utilisation == pytest.approx(
        np.sum(used) / (R * C * math.prod(said.array))
    )
    assert found.cells == K * P * (
        int(used.sum()) + C * shape[0] * (columns - used.shape[3])
    )
    assert found.rows == K * P * int(used.any(axis=3).sum())
    pulses = 1 if config.converts_sums else max(1, len(said.input_slices))
    conversions = (
        K
        * R
        * pulses
        * (P if config.converts_each else 1)
        * (shape[1] + C * config.encoding.unit_column)
    )
    assert said.conversions == (
        conversions if config.adc else 0
    ) and found.conversions in (
        said.conversions,
        conversions,
    )


@pytest.mark.parametrize(
    "name", ["sum", "unequal", "noise and swept values", "isaac", "neurram"]
)
def test_the_path_is_the_one_that_programming_takes(name):
    config = CONFIGS[name]
    weights = jax.random.normal(jax.random.key(0), (40, 30))
    chip = program(weights, config, jax.random.key(1))
    for said in (explain(config, (40, 30)), explain(chip, (40, 30))):
        assert (said.path, said.reason) == (
            chip.plan.path,
            chip.plan.reason,
        ) and said.reason in str(said)


@pytest.mark.parametrize("kind", ["differential", "offset"])
@pytest.mark.parametrize(
    ("bits", "dac"),
    [((2, 2, 2, 2), DAC(bits=7, slice_bits=3)), ((2, 2, 4), DAC(signed=False))],
    ids=["signed", "not"],
)
def test_an_adc_with_the_lost_bits_loses_nothing(bits, dac, kind):
    config = CrossbarConfig(
        cell=Cell(bits=bits),
        encoding=Encoding(kind=kind),
        dac=dac,
        adc=ADC(bits=4, range="granular"),
    )
    lost = explain(config, (100, 8)).lost_bits
    assert min(lost) > 0
    enough = 4 + math.ceil(
        max(lost) + 0.1
    )  # 2^b - 1 codes: a little more than the logarithm says

    def path(adc_bits: int) -> str:
        with_bits = dataclasses.replace(
            config, adc=ADC(bits=adc_bits, range="granular")
        )
        return explain(with_bits, (100, 8)).path

    assert path(enough) == "product"
    assert path(4 + math.floor(max(lost))) != "product"
    exact = explain(
        dataclasses.replace(config, adc=ADC(bits=enough, range="granular")), (100, 8)
    )
    assert exact.lost_bits == (0.0,) * len(bits)


@pytest.mark.parametrize(
    "changes",
    [
        {"encoding": Encoding(kind="offset"), "cell": Cell(on_off_ratio=10.0)},
        {"encoding": Encoding(two_sided=True), "adc": ADC(bits=8, separate=True)},
        {"adc": ADC(bits=8, gain_error=0.01)},
    ],
    ids=["Gmin", "halves", "gains"],
)
def test_real_valued_sums_have_no_lost_bits(changes):
    config = CrossbarConfig(**{"adc": ADC(bits=8)} | changes)
    said = explain(config, (128, 128))
    assert said.lost_bits is None and "not defined: column sums are real-valued" in str(
        said
    )
    assert not program(jnp.ones((128, 128)), config, jax.random.key(0)).plan.integers


def test_it_prints_what_it_knows():
    raella = str(explain(PRESETS["raella"], (1000, 600)))
    ideal = str(explain(PRESETS["ideal"], (8, 8)))
    for words in (
        "1000 x 600 on arrays of 512 x 512",
        "slices of 2, 2, 4 bits, least significant first, 2 polarities",
        "7 slices of 1 bit",
        "24 = 2 x 2 tiles x 3 weight slices x 2 polarities",
        "57.2 % of their cells",
        f"{7 * 3 * 2 * 600:,} for one input vector",
        "4.6, 4.6, 6.9 from the least significant slice",
    ):
        assert words in raella
    for words in (
        "one analogue cell",
        "real-valued, all at once",
        "none, no ADC",
        "not defined",
    ):
        assert words in ideal


def test_another_shape_than_that_of_a_chip_is_refused():
    with pytest.raises(
        ValueError, match=r"shape \(4, 5\): expected that of the chip, \(4, 4\)"
    ):
        explain(program(jnp.ones((4, 4)), CrossbarConfig()), (4, 5))
