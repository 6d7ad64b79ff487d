"""The cost model against sums by hand, the cells that programming really makes, and properties that any cost has."""

import dataclasses
import inspect
import json
import math
from pathlib import Path

import pytest
import yaml

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    CONSTANTS,
    DAC,
    PRESETS,
    CrossbarConfig,
    Range,
    counts,
    read_energy,
    write_cost,
)

_SMALL = crossbar.Tile(rows=4, cols=4)
_UNIT = CrossbarConfig(
    tile=_SMALL, encoding=crossbar.Encoding(kind="offset", unit_column=True), adc=ADC()
)
_TYPICAL = CONSTANTS.pinned("typical")
_explain = inspect.unwrap(crossbar.explain)
_CONFIGS = {
    "differential": CrossbarConfig(tile=_SMALL, adc=ADC()),
    "separate": CrossbarConfig(tile=_SMALL, adc=ADC(separate=True)),
    "offset": CrossbarConfig(
        tile=_SMALL, encoding=crossbar.Encoding(kind="offset"), adc=ADC()
    ),
    "unit column": _UNIT,
}


def _exactly(value: float) -> Range:
    """A typical value, and one equal to it but for rounding."""
    return pytest.approx(value, rel=1e-12)


def test_a_range_is_interval_arithmetic():
    a = Range(1.0, 2.0, 4.0)
    b = Range(2.0, 5.0, 10.0)
    assert a + b == Range(3.0, 7.0, 14.0)
    assert a * b == Range(2.0, 10.0, 40.0) and a * 3 == Range(3.0, 6.0, 12.0)
    assert b / a == Range(0.5, 2.5, 10.0) and a / 2 == Range(0.5, 1.0, 2.0)
    assert (
        a**2 == Range(1.0, 4.0, 16.0)
        and a**-1 == Range(0.25, 0.5, 1.0)
        and a**0 == Range.of(1.0)
    )
    for wrong in [
        (2.0, 1.0, 3.0),
        (1.0, 3.0, 2.0),
        (-1.0, 0.0, 1.0),
        (math.nan, 1.0, 2.0),
    ]:
        with pytest.raises(ValueError, match="give 0 <= low <= typical <= high"):
            Range(*wrong)


def test_counts_by_hand():
    # 6 x 5 on 4 x 4 arrays: rows 3 + 3, columns 2 + 3 (5 / 2 rounds to even); four slices, a unit column an array.
    found = counts((6, 5), _UNIT)
    assert found.arrays == 2 * 2 * 4
    assert found.cells == 6 * (5 + 2) * 4
    assert found.rows == 6 * 2 * 4  # each row in both column tiles and all slices
    assert found.conversions == 7 * 4 * 2 * (
        5 + 2
    )  # input slices, weight slices, row tiles, columns
    assert found.additions == found.conversions + 7 * 4 * 2 * 5
    assert found.sums == 5 and (found.inputs, found.outputs) == (6, 5)
    differential = counts((6, 5), _CONFIGS["differential"])
    assert (differential.arrays, differential.cells, differential.rows) == (
        2 * 2 * 4 * 2,
        6 * 5 * 8,
        6 * 2 * 8,
    )
    assert differential.additions == differential.conversions == 7 * 4 * 2 * 5
    assert (
        counts((6, 5), _CONFIGS["separate"]).conversions == 2 * differential.conversions
    )
    assert counts((6, 5), _CONFIGS["offset"]).additions == differential.conversions + 6


def test_preparing_by_hand():
    plain = CrossbarConfig(adc=ADC())
    prepared = dataclasses.replace(
        plain, mapping=crossbar.Mapping(factors=True, transform="hadamard")
    )
    # 96 = 12 x 2 x 2 x 2, and 52 = 13 x 2 x 2, whose cosine transform has products.
    for d_in, additions, products in (
        (96, 96 * (11 + 3), 96),
        (52, 52 * (12 + 2), 52 + 52 * 13),
    ):
        found = counts((d_in, 8), prepared)
        without = counts((d_in, 8), plain)
        assert found == dataclasses.replace(
            without, transforms=additions, factors=products
        )
        assert counts((d_in, 8), prepared, prepares=False) == without
        more = (
            read_energy(found, prepared).digital.typical
            - read_energy(without, plain).digital.typical
        )
        assert more == pytest.approx(0.1e-12 * additions + 4.6e-12 * products)
    assert "1,344 additions" in str(crossbar.explain(prepared, (96, 8)))


def test_writing_by_hand():
    found = write_cost(counts((6, 5), _UNIT))
    assert found.cells == 168
    assert found.pulses == CONSTANTS["write_pulses"] * 168
    assert found.energy.low == _exactly(168 * 1.3e-12)
    assert found.energy.typical == _exactly(168 * 41e-12)
    assert found.energy.high == _exactly(168 * 104e-12)
    assert found.time.low == _exactly(
        3 * 0.04e-6
    )  # 128 arrays at once would be more than the 16, of 3 rows each
    assert found.time.typical == _exactly(48 * 2.74e-6 / 8)
    assert found.time.high == _exactly(48 * 8.52e-6)
    assert found.cycles == Range(1.0, 8.52, 32.0)
    assert found.until_worn.typical == _exactly(1e6 / 8.52)
    assert (found.until_worn.low, found.until_worn.high) == (1e4 / 32, 1e10)
    again = write_cost(counts((6, 5), _UNIT), passes=10)
    assert again.cells == 1680 and again.cycles == found.cycles * 10
    assert again.energy.typical == _exactly(10 * found.energy.typical)
    assert again.time.typical == _exactly(10 * found.time.typical)
    assert again.until_worn.typical == _exactly(found.until_worn.typical / 10)
    nothing = write_cost(crossbar.Counts())
    assert (
        nothing.cells == 0
        and nothing.energy == nothing.time == nothing.cycles == Range.of(0.0)
    )
    assert nothing.until_worn is None


def test_an_array_alone_is_written_row_by_row():
    isaac = counts((128, 128), PRESETS["isaac"])
    assert (isaac.arrays, isaac.rows, isaac.tallest) == (8, 8 * 128, 128)
    for arrays in (1, 5):
        time = write_cost(
            dataclasses.replace(isaac, arrays=arrays, rows=arrays * 128)
        ).time
        assert (time.low, time.typical) == (
            _exactly(128 * 0.04e-6),
            _exactly(128 * 2.74e-6),
        )
        assert time.high == _exactly(arrays * 128 * 8.52e-6)
    # Ten of the matrix have 80 arrays: ten turns of eight, or all at once.
    ten = write_cost(isaac * 10).time
    assert (ten.low, ten.typical) == (
        _exactly(128 * 0.04e-6),
        _exactly(10 * 128 * 2.74e-6),
    )
    # A tall array among short ones keeps its time.
    mixed = isaac + counts((2, 16), PRESETS["isaac"]) * 500
    assert mixed.tallest == 128 and mixed.rows == 8 * 128 + 16 * 500
    assert write_cost(mixed).time.low == _exactly(128 * 0.04e-6)


def test_reading_by_hand():
    taken = counts((6, 5), _UNIT)
    found = read_energy(taken, _UNIT, _TYPICAL)
    assert found.array.typical == _exactly(168 * 7 * 2e-15)
    assert found.dac.typical == _exactly(48 * 7 * 0.39e-12)
    assert found.adc.typical == _exactly(392 * 1.56e-12)
    assert found.shift_add.typical == _exactly((392 + 280) * 0.1e-12)
    assert found.digital.typical == _exactly(
        5 * 0.1e-12 + 5 * 4.6e-12 + (6 + 5) * 2.15e-12
    )
    assert found.total.typical == _exactly(sum(part.typical for part in found))
    # Two bits a slice: three slices of 2 and one of 1, which drive with 3, 3, 3 and 1 units.
    wide = dataclasses.replace(_UNIT, dac=DAC(bits=8, slice_bits=2))
    assert read_energy(counts((6, 5), wide), wide, _TYPICAL).dac.typical == _exactly(
        48 * 10 * 0.39e-12
    )


def test_conversions_grow_with_bits():
    def one(bits: int) -> Range:
        config = dataclasses.replace(_UNIT, adc=ADC(bits=bits))
        return read_energy(crossbar.Counts(conversions=1), config).adc

    assert one(8) == CONSTANTS["adc_energy"]
    assert one(10).typical == _exactly(4 * 1.56e-12) and one(10).high == _exactly(
        16 * 5e-12
    )
    assert one(6).typical == _exactly(1.56e-12 / 4) and one(6).low == _exactly(
        0.5e-12 / 16
    )


def test_latency_by_hand():
    # 128 conversions of 0.78 ns fit into one read of 100 ns; of 10 ns they do not.
    config = dataclasses.replace(PRESETS["puma"], adc=ADC(bits=8))
    found = crossbar.read_latency((1024, 1024), config)
    assert found.typical == _exactly(15 * 100e-9)
    assert found.low == _exactly(15 * 14.6e-9) and found.high == _exactly(15 * 1280e-9)
    assert crossbar.read_latency((1024, 16), config).high == _exactly(15 * 700e-9)
    # NeuRRAM converts once, after all three slices.
    once = crossbar.read_latency((256, 256), PRESETS["neurram"])
    assert once.typical == _exactly(3 * 100e-9 + 128 * 0.78e-9)


@pytest.mark.parametrize(
    "cost",
    [counts, crossbar.read_latency, lambda shape, config: _explain(config, shape)],
)
@pytest.mark.parametrize("shape", [(0, 3), (2.5, 4), (3, -1), (3,), 4])
def test_shapes_that_no_matrix_has_are_refused(cost, shape):
    with pytest.raises(
        ValueError,
        match=r"a matrix of shape .*: give two whole numbers above 0, \(d_in, d_out\)",
    ):
        inspect.unwrap(cost)(shape, _UNIT)


def test_an_array_of_puma_takes_what_its_simulator_says():
    """puma-simulator: 274 pJ for one read of 128 x 128 cells with its periphery, 30 of them for the array."""
    config = dataclasses.replace(
        PRESETS["puma"],
        cell=crossbar.Cell(bits=(8,)),
        mapping=crossbar.Mapping(weight_bits=8),
    )
    one_slice = dataclasses.replace(config, dac=DAC(bits=1, signed=False))
    found = read_energy(counts((128, 128), one_slice), one_slice, _TYPICAL)
    assert (found.array + found.dac + found.adc).typical == pytest.approx(
        274e-12, rel=0.05
    )


def test_ideal_converters_have_no_energy():
    with pytest.raises(ValueError, match="dac = None is an ideal converter"):
        read_energy(crossbar.Counts(), PRESETS["ideal"])
    with pytest.raises(ValueError, match="adc = None is an ideal converter"):
        crossbar.read_latency((4, 4), CrossbarConfig())


def test_constants_are_in_si_units_and_pinned():
    assert CONSTANTS["cell_write_energy"] == Range(1.3, 41.0, 104.0) * 1e-12
    assert CONSTANTS["row_write_time"].typical == _exactly(2.74e-6)
    pinned = CONSTANTS.pinned("high", "endurance")
    assert (
        pinned["endurance"] == Range.of(1e10)
        and pinned["adc_energy"] == CONSTANTS["adc_energy"]
    )
    assert all(_TYPICAL[name].low == _TYPICAL[name].high for name in CONSTANTS.table)
    for name, constant in CONSTANTS.table.items():
        assert 0 < constant.low <= constant.typical <= constant.high, name
        assert any(tag in constant.source for tag in ("[S]", "[R]", "[A]")), name


_DEFAULTS = Path(crossbar.__file__).parent / "cost" / "constants.yaml"


def test_a_file_replaces_the_constants_that_it_has(tmp_path):
    assert crossbar.load_constants(_DEFAULTS) == CONSTANTS
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps(
            {
                "endurance": yaml.safe_load(_DEFAULTS.read_text())["endurance"]
                | {"high": 1e11}
            }
        )
    )
    found = crossbar.load_constants(path)
    assert (
        found["endurance"].high == 1e11
        and found["adc_energy"] == CONSTANTS["adc_energy"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update(enduranze=t["endurance"]),
            r"enduranze.* unknown: choose from cell_write_energy",
        ),
        (
            lambda t: t["adc_energy"].update(unit="nJ"),
            r"adc_energy is in 'nJ': give it in 'pJ'",
        ),
        (
            lambda t: t["adc_energy"].update(low=2.0),
            r"adc_energy is 2.0, 1.56, 5.0: give 0 < low <= typical <= high",
        ),
        (
            lambda t: t["adc_energy"].update(high=1.0),
            r"give 0 < low <= typical <= high",
        ),
        (
            lambda t: t["adc_energy"].update(low=0),
            r"adc_energy is 0.0, .*: give 0 < low",
        ),
        (
            lambda t: t["adc_energy"].update(high=math.nan),
            r"adc_energy is .*nan: give 0 < low",
        ),
        (
            lambda t: t["endurance"].update(low="1e4"),
            r"endurance.low is '1e4': .*YAML takes 1e4 for a text",
        ),
        (
            lambda t: t["endurance"].pop("source"),
            r"endurance.source is missing: expected a text",
        ),
    ],
)
def test_a_bad_table_is_refused_by_name(change, message, tmp_path):
    path = tmp_path / "table.yaml"
    table = yaml.safe_load(_DEFAULTS.read_text())
    change(table)
    path.write_text(yaml.safe_dump(table))
    with pytest.raises(ValueError, match=message):
        crossbar.load_constants(path)
