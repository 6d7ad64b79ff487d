"""What cannot be built, programmed, read or loaded, and the words of the error: one table, one body."""

import dataclasses
import inspect
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from crossbar_strategies import ENCODINGS
from refusals import refusals

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    Cell,
    CrossbarConfig,
    Device,
    Encoding,
    Mapping,
    Tile,
    Wire,
    matmul,
)

INF = float("inf")
NAN = float("nan")
W = jnp.ones((6, 5), jnp.float32)
X = jnp.ones((3, 6), jnp.float32)
BAD = W.at[2, 3].set(NAN)
KEY = jax.random.key(0)
OFFSET = ENCODINGS["offset"]
FLIP = ENCODINGS["flip"]
FOUR = ((-1.0, 1.0),) * 4
AT_MAX = ADC(range="max")
UNIFORM = crossbar.Independent(0.1)
STUCK = Device(stuck=crossbar.StuckAt(low=0.1, high=0.1))
VERIFIED = Device(programming=UNIFORM, write_verify=crossbar.WriteVerify(0.05))
NOISY = Device(read_noise=crossbar.ReadNoise(0.1))
WIRED = Tile(wire=Wire(row_resistance=1e-3, relaxation=0.5))
LIMITS = np.tile(np.asarray([-3.0, 3.0]), (2, 4, 1))  # of two row tiles
CONSTANTS = Path(crossbar.__file__).parent / "cost" / "constants.yaml"


def part(cls, **values):
    """Build a part as users do, without the type checks that run in tests, which would refuse it first."""

    def make():
        untyped = object.__new__(cls)
        for field in dataclasses.fields(cls):
            default = 1.0 if field.default is dataclasses.MISSING else field.default
            object.__setattr__(untyped, field.name, values.get(field.name, default))
        untyped.__post_init__()

    return make


def config(**parts):
    return lambda: CrossbarConfig(**parts)


def given(*limits, **others):
    return ADC(range="given", limits=limits, **others)


def programmed(key=None, path=None, conductances=None, weights=W, **parts):
    """Program a crossbar with some parts."""
    config = CrossbarConfig(**parts)
    return crossbar.program(weights, config, key, path=path, conductances=conductances)


def chip(*args, **parts):
    return lambda: programmed(*args, **parts)


def measured(one):
    """Return conductances of the cells of `W`, one of which is `one`."""
    return jnp.full((4, 2, 1, 1, 6, 5), 0.5, jnp.float32).at[0, 0, 0, 0, 2, 3].set(one)


def read(x=X, **parts):
    return lambda: inspect.unwrap(matmul)(x, programmed(**parts))


def calls(field, wrong):
    """Read cells with a user's function that returns a wrong shape."""
    function = (
        (lambda v, G: wrong(G)) if field == "iv" else lambda G, key, time: wrong(G)
    )
    time = 1.0 if field == "drift" else None
    return lambda: matmul(
        X, programmed(KEY, device=Device(**{field: function, "time": time}))
    )


def auto_significance():
    pair = Cell(bits=None, residual=True)
    return CrossbarConfig(cell=pair, mapping=Mapping(weight_bits=None))


def slope(place, **parts):
    """Differentiate a read with respect to one value of its configuration."""

    def differentiate():
        leaves, tree = jax.tree.flatten_with_path(CrossbarConfig(**parts))
        names = [
            jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves
        ]
        values = [leaf for _, leaf in leaves]
        number = names.index(place)

        def loss(value):
            changed = [*values[:number], value, *values[number + 1 :]]
            config = jax.tree.unflatten(tree, changed)
            return jnp.sum(matmul(X, crossbar.program(W, config, KEY)))

        jax.grad(loss)(jnp.float32(values[number]))

    return differentiate


def load(text, suffix=".yaml", read_file=crossbar.load_config):
    """Read a file with this text."""

    def of_file():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "file").with_suffix(suffix)
            path.write_text(text)
            read_file(path)

    return of_file


def save(config, name):
    def to_file():
        with tempfile.TemporaryDirectory() as folder:
            crossbar.save_config(config, Path(folder, name))

    return to_file


def constants(name, **fields):
    """Read a table of constants with other fields of one of them."""
    table = yaml.safe_load(CONSTANTS.read_text())
    table[name] = table.get(name, table["endurance"]) | fields
    return load(yaml.safe_dump(table), read_file=crossbar.load_constants)


def shaped(shape):
    """Return the functions of shapes, called with one."""
    explain = lambda shape, config: inspect.unwrap(crossbar.explain)(config, shape)  # noqa: E731
    functions = (crossbar.counts, crossbar.read_latency, explain)
    return [
        lambda f=f: inspect.unwrap(f)(shape, CrossbarConfig(adc=ADC()))
        for f in functions
    ]


DEVIATION = "give a standard deviation of at least 0"
AT_LEAST_0 = "give a number at least 0"
AGELESS = r"device.time = 10.0 changes nothing without device.drift: give one"
NO_KEY = r"random .*: give the chip's key, as in jax.random.key\(0\)"
AGAIN = "again for every read: give it a key"
NO_SHAPE = r"a matrix of shape .*: give two whole numbers above 0"
MATRIX = r"give a matrix \[d_in, d_out\]"
FRACTIONS = "give fractions of Gmax"
PARTS = [
    (part(Cell, bits=(2, 0)), r"cell.bits = \(2, 0\): give 1 to 8 bits for each weight"),
    (part(Cell, on_off_ratio=np.float32(0.5)), "on_off_ratio = 0.5: give Gmax / Gmin > 1"),
    (part(Encoding, kind="balanced"), "encoding.kind = 'balanced': choose differential or"),
    (part(DAC, bits=17), "dac.bits = 17: give 2 to 16 bits, or dac=None for ideal inputs"),
    (part(DAC, bits=0, signed=False), "give 1 to 16 bits"),
    (part(DAC, slice_bits=9), "give 1 to 8 bits, or None for no slicing"),
    (part(DAC, limit=NAN), r"give the largest \|x\|, positive and finite"),
    (part(ADC, bits=0), "give 2 to 16 bits, or adc=None for an ideal ADC"),
    (part(ADC, clip_share=-0.1), "give a share of conversions from 0 to 1"),
    (part(ADC, quantile=0.3), "give a share of conversions from 0.5 to 1"),
    (part(ADC, gain_error=-0.1), f"adc.gain_error = -0.1: {DEVIATION}"),
    (part(ADC, architecture=["sar"]), "choose sar, ramp, .*or call register_adc"),
    (lambda: crossbar.register_adc("sar", crossbar.Architecture(energy=len, time=len)),
     "an ADC architecture 'sar': choose another"),
    (part(ADC, range="given"), "adc.limits go with adc.range='given'"),
    (part(Tile, rows=0), "tile.rows = 0: give a positive number, or None for no limit"),
    (part(Tile, current_limit=np.int32(0)), "give a positive current, or None"),
    (part(Mapping, weight_bits=1), "give 2 to 16 bits, or None for real weights"),
    (part(Mapping, quantile=0.0), r"give a share of weights in \(0, 1\]"),
    (part(Mapping, clip="optimal"), "needs scale = 'column'"),
    (part(crossbar.Independent, sigma=np.float16(-0.5)), f"sigma = -0.5: {AT_LEAST_0} and finite"),
    (part(crossbar.StuckAt, low=1.5), "give a number at least 0 and at most 1"),
    (part(crossbar.StuckAt, low=0.7, high=0.7), r"low \+ high = 1.4: expected a sum of at"),
    (part(crossbar.WriteVerify, tolerance=0.0), "WriteVerify.tolerance = 0.0: give a number above 0"),
    (part(crossbar.Readback, repeats=0), "give the readings of a cell, 1 or more"),
    (
        part(Device, readback=crossbar.Readback(after=60.0), time=1.0),
        "after = 60 is later than device.time = 1: give an earlier reading",
    ),
    (part(Cell, significance=0.2), r"give a share of the first pair in \(0, 1\], with residual"),
    (
        lambda: crossbar.Table.from_measurements([1, 1, 8, 8], [1, 2, 7, 8], 10.0),
        "largest target is 8 and g_max = 10: measure cells at g_max, or give g_max = 8",
    ),
    (
        lambda: crossbar.Table.from_measurements([1, 1, 8], [1, 2, 7], 8.0),
        "1 readings at target 8 and 1 seconds: give two or more",
    ),
    (
        lambda: crossbar.Table.from_measurements([1, 8], [[1, 8]] * 2, 8.0),
        r"measured of shape \(2, 2\) .* expected \(1, 2\)",
    ),
    (part(Wire, relaxation=2.5), "give a number above 0 and at most 2"),
    (part(crossbar.LogLinear, low=0.2, high=0.1), "low = 0.2 is above high = 0.1"),
    (part(Device, time=-1.0), AT_LEAST_0),
    (part(Device, read_noise=0.01), r"give ReadNoise\(...\), or None"),
    (part(Device, programming=np.float32(0.5)), "give a function .* Independent"),
    (part(Device, write_verify=crossbar.WriteVerify(0.1)), "give programming too"),
    (lambda: crossbar.Polynomial(((0.1,), (0.2,))), r"deviation = .* of seconds = \(1.0,\)"),
    (lambda: crossbar.Polynomial(((),)), r"deviation = \(\(\),\): give one tuple of numbers"),
    (lambda: crossbar.Polynomial(((0.1,),), extrapolate=True), "extrapolate needs two times"),
    (lambda: crossbar.Polynomial(((0.1,), (0.2,)), seconds=(5.0, 1.0)), "rising positive times"),
    (lambda: crossbar.Table((0.1, 0.5), ((0.1, 0.2),)), "rising shares of Gmax that end in 1"),
    (lambda: crossbar.Table((0.1, 1.0), ((0.1,),)), "give one number for each target"),
    (lambda: Encoding(unit_column=True), "need kind='offset': set it"),
    (lambda: Encoding(kind="offset", two_sided=True), "needs kind='differential': set it"),
    (lambda: Encoding(kind="offset", flip=True), "set unit_column=True"),
]  # fmt: skip
CONFIGS = [
    (config(cell=Cell(bits=None)), r"cell.bits = None, .* 8: both or neither must be None"),
    (config(cell=Cell(bits=(2, 2, 2))), "hold 6 bits, .* need 7: .* or mapping.weight_bits = 7"),
    (config(cell=Cell(bits=None), mapping=Mapping(weight_bits=None), encoding=FLIP), "flip inverts"),
    (
        config(device=Device(programming=crossbar.Table((0.1, 1.0), ((0.1, 0.2),)))),
        "measured from 0.1 of Gmax on, .* Gmin is 0: .* give cell.on_off_ratio = 10",
    ),
    (config(encoding=OFFSET, cell=Cell(residual=True)), "cell.residual .* 'differential'"),
    (config(cell=Cell(bits=(7,), residual=True)), "slice after slice, .* two slices or more"),
    (config(device=Device(readback=crossbar.Readback())), "needs cell.residual or device.write_"),
    (lambda: jax.eval_shape(auto_significance), "outside of jax.jit: give a number"),
    (config(encoding=OFFSET, device=Device(compensate=True)), "compensate .* needs kind"),
    (config(encoding=OFFSET, adc=ADC(separate=True)), "adc.separate .* needs kind"),
    (config(adc=ADC(bits=((8,) * 7,))), "give 4 rows, .* of 7 numbers"),
    (config(adc=ADC(bits=((8,) * 6,) * 4)), "give 4 rows, .* of 7 numbers"),
    (config(adc=ADC(bits=((8,),) * 4, convert="sum"), dac=None), "give adc.bits as one number"),
    (config(adc=ADC(bits=((0,) * 7,) * 4)), "adc.bits are all 0: give some"),
    (config(adc=ADC(bits=((1,) * 7,) * 4)), "these sums are signed: give 2 bits or more"),
    (config(dac=None, adc=ADC(range="granular")), "'granular' .* give dac and cell.bits"),
    (config(mapping=Mapping(transform="hadamard"), dac=DAC(signed=False)), "dac.signed = True"),
    (config(adc=given(*FOUR[:3])), r"limits of shape \(3, 2\): .* for each of 4 slices"),
    (config(adc=given((-1.0, NAN), *FOUR[:3])), "ADC limits .* are not finite"),
    (config(adc=given((1.0, 1.0), *FOUR[:3])), "ADC range .* is empty"),
    (config(adc=given((0.0, 1.0), *FOUR[:3])), r"sums are signed: give \[-a, a\]"),
    (config(adc=given(*FOUR, separate=True), dac=DAC(signed=False)), r"never negative: give \[0"),
]  # fmt: skip
CHIPS = [
    (chip(weights=jnp.ones(5)), rf"weights of shape \(5,\): {MATRIX}"),
    (chip(weights=jnp.ones((2, 6, 5))), "use jax.vmap for stacks"),
    (chip(weights=jnp.ones((6, 5), jnp.int32)), "dtype int32: give floating point numbers"),
    (chip(weights=W.at[0].set(-INF)), "5 of 30 weights are NaN or infinite"),
    (lambda: jax.jit(lambda: programmed(weights=BAD).codes)(), "1 of 30 weights are NaN"),
    (chip(KEY, device=Device(time=10.0)), AGELESS),
    (chip(device=STUCK), NO_KEY),
    (chip(adc=ADC(range="max", gain_error=0.1)), NO_KEY),
    (chip(tile=Tile(rows=2), adc=ADC(range="given", limits=LIMITS)), "ADC limits of 2 row tiles, but .* 3"),
    (chip(path="none"), "choose from product, definition, lookup, packed, loop, or leave it out"),
    (chip(path="product", adc=AT_MAX), "not exact here: the ADC loses bits"),
    (chip(path="product", tile=WIRED), "not exact here: IR drop"),
    (chip(path="loop"), "path='loop' cannot compute this without an ADC"),
    (chip(path="loop", tile=Tile(current_limit=1.0), adc=AT_MAX), "column currents are limited"),
    (chip(path="loop", encoding=FLIP, adc=AT_MAX), "columns that are stored inverted"),
    (chip(path="lookup", dac=DAC(slice_bits=4), adc=AT_MAX), "input slices of up to 2 bits"),
    (chip(path="lookup", device=NOISY, adc=AT_MAX), "path='lookup' draws no noise"),
    (chip(KEY, "packed", device=Device(programming=UNIFORM), adc=AT_MAX), "takes integer cells"),
    (chip(conductances=measured(0.5)[:, :1]), r"\(4, 1, 1, 1, 6, 5\): expected \(4, 2, "),
    (chip(conductances=measured(40.0)), "from 0.5 to 40: .* microsiemens by the Gmax"),
    (chip(conductances=measured(NAN)), f"from nan to nan: {FRACTIONS}"),
    (
        chip(KEY, None, measured(0.5), device=Device(drift=crossbar.PCM_DRIFT, time=1e6)),
        "device.time = 1000000.0 would add drift: set device.time=None",
    ),
    *((calls(field, wrong), f"Device.{field} returned values of shape .* for cells of shape")
      for field in ("programming", "drift", "iv")
      for wrong in (lambda G: G[:1], lambda G: G.mean())),
]  # fmt: skip
READS = [
    (read(X[:, :4]), r"x of shape \(3, 4\) meets arrays of \(6, 5\): its last axis must be 6"),
    (read(jnp.float32(1)), r"x of shape \(\) meets arrays of \(6, 5\)"),
    (read(X.astype(jnp.int32)), "x of dtype int32: give floating point numbers"),
    (read(device=NOISY), AGAIN),
    (read(adc=ADC(bits=10, range="granular", noise=0.1)), AGAIN),
    *((read(adc=ADC(bits=4), path=path), r"range comes from data: chip = calibrated\(chip, ")
      for path in (None, "definition")),
    (
        lambda: matmul(X, dataclasses.replace(
            programmed(tile=Tile(rows=2), adc=AT_MAX), limits=jnp.asarray(LIMITS, "f4"))),
        r"chip.limits of shape \(2, 4, 2\): give .* or \(3, 4, 2\)",
    ),
    (
        lambda: crossbar.with_read_key(programmed(device=NOISY), jax.random.split(KEY, 2)),
        r"keys of shape \(2,\) for arrays of \(6, 5\): give one key",
    ),
    (slope("device.stuck.low", device=STUCK), "StuckAt.low has no gradient: .* take differences"),
    (slope("device.programming.sigma", device=VERIFIED), "write-verify has no gradient"),
    (slope("tile.wire.row_resistance", tile=WIRED), "row_resistance has no gradient"),
    (slope("cell.on_off_ratio", tile=WIRED, cell=Cell(on_off_ratio=9.0)), "ratio has no gradient"),
]  # fmt: skip
FILES = [
    (load("cells: {}"), r"file.yaml: cells is unknown: choose from cell, encoding, mapping, tile"),
    (load("cell: {bit: 2}"), r"cell\.bit is unknown: choose from bits, on_off_ratio"),
    (load("[1, 2]"), r"the file is \[1, 2\]: give a table"),
    (load("cell: {bits: [2, [2]]}"), r"Expected `int`, got `array` - at `\$\[1\]`"),
    (load("adc: {limits: [[low, 1]]}"), "expected a number, a list of numbers or null"),
    (load("adc: {range: widest}"), r"Invalid enum value 'widest'"),
    (load("device: {programming: noisy}"), r"'noisy': choose from PCM_JOSHI_2020, .*\{model: "),
    (load("device: {programming: {model: Independent}}"), r"device\.programming lacks sigma"),
    (load("device: {programming: {model: Independent, sigma: 1e-3}}"), "a number like 1.0e-3"),
    (load(f"cell: {{bits: {[1] * 17}}}"), "at most 16 slices"),
    (load("cell: ["), "cannot be read as YAML"),
    (load("x: !!python/object/apply:os.getcwd []"), "cannot be read as YAML"),
    (load("{", ".json"), "cannot be read as JSON"),
    (lambda: crossbar.load_config("isac"), "no preset 'isac': choose one of ideal, isaac"),
    (lambda: crossbar.load_config("absent.yaml"), r"absent\.yaml: no such file"),
    (save(CrossbarConfig(), "mine.toml"), r"ending in \.yaml, \.yml, \.json"),
    (
        save(CrossbarConfig(device=Device(programming=lambda G, key, time: G)), "mine.yaml"),
        r"device\.programming is the function .*, which a file cannot hold",
    ),
    (constants("enduranze"), "enduranze.* unknown: choose from cell_write_energy"),
    (constants("adc_energy", unit="nJ"), "adc_energy is in 'nJ': give it in 'pJ'"),
    (constants("adc_energy", low=0), "adc_energy is 0.0, .*: give 0 < low <= typical <= high"),
    (constants("endurance", low="1e4"), r"Expected `float`, got `str` - at `\$\.low`"),
]  # fmt: skip
COSTS = [
    *((call, NO_SHAPE) for shape in ((0, 3), (2.5, 4), (3,)) for call in shaped(shape)),
    (
        lambda: crossbar.explain(programmed(), (4, 5)),
        r"shape \(4, 5\): expected that of the chip, \(6, 5\)",
    ),
    (
        lambda: crossbar.read_energy(crossbar.Counts(), CrossbarConfig(dac=None, adc=ADC())),
        "dac = None is an ideal converter",
    ),
    (lambda: crossbar.read_latency((4, 4), CrossbarConfig()), "adc = None is an ideal converter"),
    *((lambda ends=ends: crossbar.Range(*ends), "give 0 <= low <= typical <= high")
      for ends in ((2.0, 1.0, 3.0), (-1.0, 0.0, 1.0), (NAN, 1.0, 2.0))),
]  # fmt: skip
ROWS = [*PARTS, *CONFIGS, *CHIPS, *READS, *FILES, *COSTS]


test_what_cannot_be_built_programmed_read_or_loaded_is_refused = refusals(ROWS)


def test_swept_values_and_placeholders_pass():
    """Arrays, tracers and a pytree's placeholders are no plain numbers: they are not refused."""
    config = CrossbarConfig(
        cell=Cell(on_off_ratio=10.0),
        adc=given(*FOUR),
        device=STUCK,
        tile=Tile(current_limit=2.0),
    )
    leaves, structure = jax.tree.flatten(config)
    assert jax.tree.unflatten(structure, [object()] * len(leaves)).adc.bits == 8
    assert jax.tree.unflatten(structure, [None] * len(leaves)).cell.bits == (2, 2, 2, 1)
    doubled = lambda config: jax.tree.leaves(jax.tree.map(lambda v: v * 2, config))  # noqa: E731
    jax.eval_shape(doubled, config)
    assert hash(structure) == hash(jax.tree.structure(config))
