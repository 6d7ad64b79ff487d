"""ADC architectures: the two that are there, and one that is registered from outside."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from crossbar_strategies import problem
from testers import check_chip

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    Architecture,
    Cell,
    Constant,
    CrossbarConfig,
    Mapping,
    Range,
    Tile,
)

TRUNCATING = Architecture(
    energy=lambda bits, constants: constants["comparison_energy"] * bits,
    time=lambda bits, columns, constants: Range.of(1e-9 * columns),
    transfer=lambda sums, lowest, highest: jnp.floor(sums),
    constants={
        "comparison_energy": Constant(
            "pJ", 1.0, 2.0, 3.0, "[A] made up", "of one comparison"
        )
    },
)
crossbar.register_adc("truncating", TRUNCATING)
W, X = problem()
# Arrays that are read in no time, so that a read takes as long as its conversions.
AT_ONCE = crossbar.Constants(
    {
        **crossbar.CONSTANTS.table,
        "array_read_time": Constant("ns", 0, 0, 0, "[A]", "none"),
    }
)


def converting(architecture, **adc):
    """Return a crossbar with one slice of weights and one of inputs: sums of an array are small integers."""
    return CrossbarConfig(
        cell=Cell(bits=(3,)),
        mapping=Mapping(weight_bits=4),
        tile=Tile(rows=6, cols=4),
        dac=DAC(bits=4, slice_bits=None, scaling="fixed"),
        adc=ADC(architecture=architecture, **{"bits": 5, "range": "max"} | adc),
    )


def truncated(chip, full):
    """Return the read in NumPy: the integer sum of every array, rounded down to one of 15 codes on either side."""
    top = np.abs(W).max()
    step = full * 7 * 7 / 15
    parts = np.split(np.arange(len(W)), np.cumsum(chip.geometry.rows)[:-1])
    q = np.rint(np.asarray(W) / top * 7)
    n = np.rint(np.asarray(X) * 7)
    return (
        sum(np.clip(np.floor(n[:, rows] @ q[rows] / step), -15, 15) for rows in parts)
        * step
        * top
        / 7
        / 7
    )


# By name: an oracle of its reads, or None for the loops in NumPy.
ARCHITECTURES = {
    "truncating": lambda chip: truncated(chip, 2.03),
    "ramp": None,
    "sar": None,
}


@pytest.mark.parametrize(
    "name",
    ["truncating", *(pytest.param(n, marks=pytest.mark.long) for n in ("ramp", "sar"))],
)
def test_an_architecture_reads_chips_of_every_kind(name, tmp_path):
    config = converting(name, range="given", limits=[(-2.03, 2.03)])
    check_chip(config, tmp_path, wanted=ARCHITECTURES[name])
    assert crossbar.read_energy(crossbar.counts((14, 7), config), config).adc.low > 0


def test_a_transfer_curve_is_read_conversion_by_conversion_even_where_no_bits_are_lost():
    wide = converting("truncating", bits=16, range="granular")
    chip = crossbar.program(W, wide)
    assert chip.plan.path == "definition" and "transfer curve" in chip.plan.reason
    assert (
        crossbar.program(W, converting("sar", bits=16, range="granular")).plan.path
        == "product"
    )
    for path in ("product", "loop", "lookup", "packed"):
        with pytest.raises(ValueError, match=f"path='{path}'"):
            crossbar.program(W, wide, path=path)


def test_a_transfer_curve_goes_with_calibrated_ranges():
    chip = crossbar.program(W, converting("truncating", range="calibrated"))
    chip = crossbar.calibrated(chip, crossbar.probe(X, chip)[1])
    wanted = truncated(chip, float(chip.limits[0, 0, 1]))
    np.testing.assert_allclose(crossbar.matmul(X, chip), wanted, rtol=0, atol=1e-5)


def test_files_name_a_registered_architecture(tmp_path):
    config = converting("truncating")
    crossbar.save_config(config, tmp_path / "config.yaml")
    assert crossbar.load_config(tmp_path / "config.yaml") == config
    assert crossbar.config_hash(config) != crossbar.config_hash(converting("sar"))


def test_a_registered_architecture_sets_its_energy_and_its_latency(tmp_path):
    config = converting("truncating")
    reads = crossbar.counts((14, 7), config)
    energy = crossbar.read_energy(reads, config).adc
    assert (energy.low, energy.high) == pytest.approx(
        (5e-12 * reads.conversions, 15e-12 * reads.conversions)
    )
    assert crossbar.read_latency((14, 7), config, AT_ONCE).typical == pytest.approx(
        4e-9
    )  # columns of an array

    # A file may replace a constant of an architecture.
    of_file = {"unit": "pJ", "low": 2.0, "typical": 4.0, "high": 6.0, "source": "mine"}
    (tmp_path / "constants.json").write_text(json.dumps({"comparison_energy": of_file}))
    found = crossbar.read_energy(
        reads, config, crossbar.load_constants(tmp_path / "constants.json")
    ).adc
    assert found.typical == pytest.approx(2 * energy.typical)


def test_a_ramp_converts_all_columns_together_in_a_step_for_every_code():
    sar = converting("sar")
    ramp = converting("ramp")
    chips = [crossbar.program(W, config) for config in (sar, ramp)]
    np.testing.assert_array_equal(*(crossbar.matmul(X, chip) for chip in chips))
    for shape in ((14, 1), (14, 7), (200, 90)):
        found = crossbar.read_latency(shape, ramp, AT_ONCE)
        np.testing.assert_allclose(
            (found.low, found.typical, found.high), np.array([0.3, 1.0, 10.0]) * 32e-9
        )
    one = crossbar.read_latency((14, 1), sar, AT_ONCE).typical
    four = crossbar.read_latency((14, 4), sar, AT_ONCE).typical
    assert four == pytest.approx(4 * one) == pytest.approx(4 * 0.78e-9)
    # Of 5 bits, both take an eighth of the steps of 8 bits, if one more bit doubles a conversion's energy.
    reads = crossbar.counts((14, 7), ramp)
    energies = [
        crossbar.read_energy(reads, config).adc.typical for config in (sar, ramp)
    ]
    np.testing.assert_allclose(energies, 1.56e-12 / 8 * reads.conversions)


def test_an_unknown_architecture_and_a_name_that_is_taken_are_refused():
    with pytest.raises(
        ValueError,
        match=r"adc.architecture = 'flash': choose sar, ramp, .* or call register_adc",
    ):
        ADC(architecture="flash")
    crossbar.register_adc("truncating", TRUNCATING)  # the same again
    with pytest.raises(
        ValueError,
        match=r"there is an ADC architecture 'sar': choose another name than sar, ramp",
    ):
        crossbar.register_adc("sar", TRUNCATING)
