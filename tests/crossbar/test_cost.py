"""The cost model and `explain` against sums by hand and the arrays that programming really makes."""

import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from crossbar_strategies import single_slices
from json_files import write_json

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    CONSTANTS,
    DAC,
    PRESETS,
    Cell,
    CrossbarConfig,
    Encoding,
    Range,
    Tile,
    counts,
    explain,
    program,
    read_energy,
    read_latency,
    write_cost,
)

SMALL = Tile(rows=4, cols=4)
UNIT_COLUMN = Encoding(kind="offset", unit_column=True)
UNIT = CrossbarConfig(tile=SMALL, encoding=UNIT_COLUMN, adc=ADC())
DIFFERENTIAL = CrossbarConfig(tile=SMALL, adc=ADC())
TYPICAL = CONSTANTS.pinned("typical")


def exactly(*values):
    """Return a range, or its typical value, that others equal but for rounding."""
    return pytest.approx(values if len(values) > 1 else values[0], rel=1e-12)


def ends(of_range):
    return of_range.low, of_range.typical, of_range.high


def test_a_range_is_interval_arithmetic():
    a = Range(1.0, 2.0, 4.0)
    b = Range(2.0, 5.0, 10.0)
    assert a + b == Range(3.0, 7.0, 14.0)
    assert a * b == Range(2.0, 10.0, 40.0) and a * 3 == Range(3.0, 6.0, 12.0)
    assert b / a == Range(0.5, 2.5, 10.0) and a / 2 == Range(0.5, 1.0, 2.0)
    assert a**2 == Range(1.0, 4.0, 16.0) and a**-1 == Range(0.25, 0.5, 1.0)


def test_counts_by_hand():
    # 6 x 5 on 4 x 4 arrays: rows 3 + 3, columns 2 + 3 (5 / 2 rounds to even); four slices, a unit column an array.
    unit = counts((6, 5), UNIT)
    # Input slices, weight slices, row tiles, columns.
    assert unit.conversions == 7 * 4 * 2 * (5 + 2)
    assert unit.additions == unit.conversions + 7 * 4 * 2 * 5
    assert unit.sums == 5 and (unit.inputs, unit.outputs) == (6, 5)
    pairs = counts((6, 5), DIFFERENTIAL)
    assert pairs.additions == pairs.conversions == 7 * 4 * 2 * 5
    offset = CrossbarConfig(tile=SMALL, adc=ADC(), encoding=Encoding(kind="offset"))
    assert counts((6, 5), offset).additions == pairs.conversions + 6


# 96 = 12 x 2 x 2 x 2, and 52 = 13 x 2 x 2, whose cosine transform has products.
@pytest.mark.parametrize(
    ("d_in", "additions", "products"),
    [(96, 96 * (11 + 3), 96), (52, 52 * (12 + 2), 52 + 52 * 13)],
)
def test_preparing_by_hand(d_in, additions, products):
    plain = CrossbarConfig(adc=ADC())
    mapping = crossbar.Mapping(factors=True, transform="hadamard")
    prepared = replace(plain, mapping=mapping)
    total = counts((d_in, 8), prepared)
    without = counts((d_in, 8), plain)
    assert total == replace(without, transforms=additions, factors=products)
    assert counts((d_in, 8), prepared, prepares=False) == without
    digital = [read_energy(each, plain).digital.typical for each in (total, without)]
    more = 0.1e-12 * additions + 4.6e-12 * products
    assert digital[0] - digital[1] == pytest.approx(more)
    assert f"{additions:,} additions" in str(explain(prepared, (d_in, 8)))


def test_writing_by_hand():
    cost = write_cost(counts((6, 5), UNIT))
    assert cost.cells == 168 and cost.pulses == CONSTANTS["write_pulses"] * 168
    assert ends(cost.energy) == exactly(168 * 1.3e-12, 168 * 41e-12, 168 * 104e-12)
    # At best all arrays at once, of 3 rows each.
    times = (3 * 0.04e-6, 48 * 2.74e-6 / 8, 48 * 8.52e-6)
    assert ends(cost.time) == exactly(*times)
    assert cost.cycles == Range(1.0, 8.52, 32.0)
    assert ends(cost.until_worn) == exactly(1e4 / 32, 1e6 / 8.52, 1e10)
    again = write_cost(counts((6, 5), UNIT), passes=10)
    assert again.cells == 1680 and again.cycles == cost.cycles * 10
    assert again.time.typical == exactly(10 * cost.time.typical)
    assert again.until_worn.typical == exactly(cost.until_worn.typical / 10)
    nothing = write_cost(crossbar.Counts())
    assert nothing.energy == nothing.cycles == Range.of(0.0)
    assert nothing.until_worn is None


def test_an_array_alone_is_written_row_by_row():
    isaac = counts((128, 128), PRESETS["isaac"])
    assert (isaac.arrays, isaac.rows, isaac.tallest) == (8, 8 * 128, 128)
    one = write_cost(replace(isaac, arrays=1, rows=128)).time
    assert ends(one) == exactly(128 * 0.04e-6, 128 * 2.74e-6, 128 * 8.52e-6)
    # Ten of the matrix have 80 arrays: ten turns of eight, or all at once.
    ten = write_cost(isaac * 10).time
    assert ends(ten)[:2] == exactly(128 * 0.04e-6, 10 * 128 * 2.74e-6)
    # A tall array among short ones keeps its time.
    mixed = isaac + counts((2, 16), PRESETS["isaac"]) * 500
    assert mixed.tallest == 128 and mixed.rows == 8 * 128 + 16 * 500
    assert write_cost(mixed).time.low == exactly(128 * 0.04e-6)


def test_reading_by_hand():
    energy = read_energy(counts((6, 5), UNIT), UNIT, TYPICAL)
    assert energy.array.typical == exactly(168 * 7 * 2e-15)
    assert energy.dac.typical == exactly(48 * 7 * 0.39e-12)
    assert energy.adc.typical == exactly(392 * 1.56e-12)
    assert energy.shift_add.typical == exactly((392 + 280) * 0.1e-12)
    digital = 5 * 0.1e-12 + 5 * 4.6e-12 + (6 + 5) * 2.15e-12
    assert energy.digital.typical == exactly(digital)
    assert energy.total.typical == exactly(sum(part.typical for part in energy))
    # Two bits a slice: three slices of 2 and one of 1, which drive with 3, 3, 3 and 1 units.
    wide = replace(UNIT, dac=DAC(bits=8, slice_bits=2))
    dac = read_energy(counts((6, 5), wide), wide, TYPICAL).dac
    assert dac.typical == exactly(48 * 10 * 0.39e-12)


def test_conversions_grow_with_bits():
    def one(bits, architecture="sar"):
        config = single_slices(architecture, bits=bits)
        return read_energy(crossbar.Counts(conversions=1), config).adc

    assert one(8) == CONSTANTS["adc_energy"]
    assert ends(one(10))[1:] == exactly(4 * 1.56e-12, 16 * 5e-12)
    assert ends(one(6))[:2] == exactly(0.5e-12 / 16, 1.56e-12 / 4)
    assert one(5, "ramp").typical == exactly(1.56e-12 / 8)
    assert ends(one(5, "truncating")) == exactly(5e-12, 10e-12, 15e-12)


def test_conversions_are_stopped_or_left_out_by_hand():
    """Two weight slices and three input slices: two of 8 bits, 6, 4 and 2 bits, and one without a conversion."""
    table = ((0, 2, 4), (6, 8, 8))
    config = CrossbarConfig(
        cell=Cell(bits=(2, 2)),
        mapping=crossbar.Mapping(weight_bits=5),
        dac=DAC(bits=4),
        adc=ADC(bits=table),
    )
    one = 1.56e-12
    stopped = [0.2 + 0.8 * bits / 8 for bits in (2, 4, 6, 8, 8)]
    energy = read_energy(counts((6, 5), config), config, TYPICAL).adc
    assert energy.typical == exactly(5 * sum(stopped) * one)
    designed = [2.0**-4, 2.0**-4, 1, 1, 1]
    both = [0.6 / 16, 1 / 16, 0.8, 1, 1]
    shares = explain(config, (6, 5)).adc_energy
    assert list(shares.values()) == exactly(
        *(sum(energies) / 6 for energies in (stopped, designed, both))
    )
    assert "0.63 of full conversions" in str(explain(config, (6, 5)))


def test_latency_by_hand():
    # 128 conversions of 0.78 ns fit into one read of 100 ns; of 10 ns they do not.
    puma = replace(PRESETS["puma"], adc=ADC(bits=8))
    latency = read_latency((1024, 1024), puma)
    assert ends(latency) == exactly(15 * 14.6e-9, 15 * 100e-9, 15 * 1280e-9)
    assert read_latency((1024, 16), puma).high == exactly(15 * 700e-9)
    # NeuRRAM converts once, after all three slices.
    once = read_latency((256, 256), PRESETS["neurram"])
    assert once.typical == exactly(3 * 100e-9 + 128 * 0.78e-9)
    # Arrays that are read in no time: a ramp converts all columns together, in a step for every code.
    no_time = crossbar.Constant("ns", 0.0, 0.0, 0.0, "[A]", "none")
    table = {**CONSTANTS.table, "array_read_time": no_time}
    at_once = crossbar.Constants(table)
    for shape in ((14, 1), (200, 90)):
        ramp = read_latency(shape, single_slices("ramp"), at_once)
        assert ends(ramp) == exactly(0.3 * 32e-9, 32e-9, 10 * 32e-9)
    sar = read_latency((14, 4), single_slices("sar"), at_once)
    assert sar.typical == exactly(4 * 0.78e-9)


def test_an_array_of_puma_takes_what_its_simulator_says():
    """puma-simulator: 274 pJ for one read of 128 x 128 cells with its periphery, 30 of them for the array."""
    config = replace(
        PRESETS["puma"],
        cell=Cell(bits=(8,)),
        mapping=crossbar.Mapping(weight_bits=8),
        dac=DAC(bits=1, signed=False),
    )
    energy = read_energy(counts((128, 128), config), config, TYPICAL)
    total = (energy.array + energy.dac + energy.adc).typical
    assert total == pytest.approx(274e-12, rel=0.05)


def test_constants_have_sources_and_are_pinned_or_replaced_by_those_of_a_file(tmp_path):
    assert CONSTANTS["cell_write_energy"] == Range(1.3, 41.0, 104.0) * 1e-12
    pinned = CONSTANTS.pinned("high", "endurance")
    assert pinned["endurance"] == Range.of(1e10)
    assert pinned["adc_energy"] == CONSTANTS["adc_energy"]
    for name, constant in CONSTANTS.table.items():
        assert 0 < constant.low <= constant.typical <= constant.high, name
        assert any(tag in constant.source for tag in ("[S]", "[R]", "[A]")), name
    defaults = Path(crossbar.__file__).parent / "cost" / "constants.yaml"
    table = yaml.safe_load(defaults.read_text())
    mine = tmp_path / "mine.json"
    write_json(mine, {"endurance": table["endurance"] | {"high": 1e11}})
    loaded = crossbar.load_constants(mine)
    assert loaded["endurance"].high == 1e11
    assert loaded["adc_energy"] == CONSTANTS["adc_energy"]


# Explanations.

ARRAYS = Tile(rows=16, cols=12)
NOISE = crossbar.Device(
    programming=crossbar.Independent(jnp.float32(0.1)),
    read_noise=crossbar.ReadNoise(jnp.float32(0.1)),
)
CONFIGS = {
    "separate": CrossbarConfig(tile=ARRAYS, adc=ADC(separate=True)),
    "sum": CrossbarConfig(tile=ARRAYS, adc=ADC(convert="sum")),
    "unit column": CrossbarConfig(tile=ARRAYS, encoding=UNIT_COLUMN, adc=ADC()),
    "unsigned": CrossbarConfig(tile=ARRAYS, dac=DAC(signed=False, slice_bits=3)),
    "whole": CrossbarConfig(tile=Tile(rows=None, cols=None), adc=ADC(range="max")),
    "swept noise": CrossbarConfig(adc=ADC(), device=NOISE),
    **PRESETS,
}


@pytest.mark.parametrize("shape", [(40, 30), (5, 70)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_counts_are_those_of_the_programmed_arrays(config, shape):
    explanation = explain(config, shape)
    total = counts(shape, config)
    cells = jax.eval_shape(
        lambda W: program(W, config, jax.random.key(1), path="definition").cells,
        jnp.zeros(shape),
    )
    K, P, R, C, _, columns = cells.shape
    used = crossbar.Geometry.of(shape, config).cells_in_use
    assert explanation.tiles == (R, C) and explanation.polarities == P
    assert explanation.arrays == total.arrays == K * P * R * C
    share = np.sum(used) / (R * C * math.prod(explanation.array))
    assert explanation.utilisation == pytest.approx(share)
    units = C * shape[0] * (columns - used.shape[3])
    assert total.cells == K * P * (int(used.sum()) + units)
    assert total.rows == K * P * int(used.any(axis=3).sum())
    pulses = 1 if config.converts_sums else len(config.input_slices)
    outputs = shape[1] + C * config.encoding.unit_column
    each = P if config.converts_each else 1
    conversions = K * R * pulses * each * outputs
    assert explanation.conversions == (conversions if config.adc else 0)


@pytest.mark.parametrize("name", ["sum", "swept noise", "isaac", "neurram"])
def test_the_path_is_the_one_that_programming_takes(name):
    weights = jax.random.normal(jax.random.key(0), (40, 30))
    chip = program(weights, CONFIGS[name], jax.random.key(1))
    for explanation in (explain(CONFIGS[name], (40, 30)), explain(chip)):
        assert explanation.path == chip.plan.path
        assert explanation.reason == chip.plan.reason


@pytest.mark.parametrize("kind", ["differential", "offset"])
@pytest.mark.parametrize(
    ("bits", "dac"),
    [((2, 2, 2, 2), DAC(bits=7, slice_bits=3)), ((2, 2, 4), DAC(signed=False))],
    ids=["signed", "not"],
)
def test_an_adc_with_the_lost_bits_loses_nothing(bits, dac, kind):
    def explained(adc_bits):
        adc = ADC(bits=adc_bits, range="granular")
        config = CrossbarConfig(
            cell=Cell(bits=bits), encoding=Encoding(kind=kind), dac=dac, adc=adc
        )
        return explain(config, (100, 8))

    lost = explained(4).lost_bits
    assert min(lost) > 0
    # 2^b - 1 codes: a little more than the logarithm.
    enough = explained(4 + math.ceil(max(lost) + 0.1))
    assert enough.path == "product" and enough.lost_bits == (0.0,) * len(bits)
    assert explained(4 + math.floor(max(lost))).path != "product"


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
    assert explain(config, (128, 128)).lost_bits is None
    chip = program(jnp.ones((128, 128)), config, jax.random.key(0))
    assert not chip.plan.integers


def test_it_prints_what_it_knows():
    raella = str(explain(PRESETS["raella"], (1000, 600)))
    for words in (
        "1000 x 600 on arrays of 512 x 512",
        "slices of 2, 2, 4 bits, least significant first; top slice: 4 bits, 2 polarities",
        "24 = 2 x 2 tiles x 3 weight slices x 2 polarities",
        "57.2 % of their cells",
        f"{7 * 3 * 2 * 600:,} for one input vector",
        "4.6, 4.6, 6.9 from the least significant slice",
    ):
        assert words in raella
    ideal = str(explain(PRESETS["ideal"], (8, 8)))
    for words in ("one analogue cell", "all at once", "none, no ADC", "not defined"):
        assert words in ideal


@pytest.mark.parametrize("kind", ["differential", "offset"])
def test_default_cells_use_every_level(kind):
    for weight_bits in range(2, 17):
        mapping = crossbar.Mapping(weight_bits=weight_bits)
        config = CrossbarConfig(mapping=mapping, encoding=Encoding(kind=kind))
        assert max(config.cell.bits) <= 2
        assert crossbar.unused_levels(config) is None


@pytest.mark.parametrize(
    ("model", "factor"), [(crossbar.Independent, 0.2), (crossbar.Proportional, 1.0)]
)
def test_unused_levels_are_named_with_what_they_cost(model, factor):
    """Independent errors of the top cell count three times, and proportional ones as before."""
    device = crossbar.Device(programming=model(0.03))
    config = CrossbarConfig(cell=Cell(bits=(2, 2, 2, 2)), device=device)
    _, found = str(explain(config, (8, 8))).split(
        "[2, 2, 2, 1] would use every level, and multiply the error power of the cells by "
    )
    assert float(found) == pytest.approx(factor, abs=0.03)
