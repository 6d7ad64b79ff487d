"""Flax models on arrays. The oracle: a read of each layer's kernel, laid out as a matrix by hand."""

import functools
import inspect
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from refusals import refusals, refused

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar.flax import (
    InArrays,
    calibrate,
    convert,
    count_reads,
    evaluate,
    prepare,
    site_errors,
    with_read_key,
)

_KEY = jax.random.key(0)
_IDEAL = crossbar.load_config("ideal")
_CHANGES = {"scale": "column", "factors": True, "transform": "hadamard"}
_PREPARED = replace(_IDEAL, mapping=crossbar.Mapping(weight_bits=None, **_CHANGES))
# One slice of weights and of inputs, which compiles fast.
_COARSE = crossbar.CrossbarConfig(
    cell=crossbar.Cell(bits=(7,)),
    dac=crossbar.DAC(bits=4, slice_bits=3),
    adc=crossbar.ADC(bits=6, range="max"),
    tile=crossbar.Tile(rows=8, cols=4),
)
_CALIBRATED = replace(
    _COARSE,
    dac=replace(_COARSE.dac, bits=6, slice_bits=5, scaling="calibrated"),
    adc=crossbar.ADC(bits=7),
)
_NOISY = crossbar.CrossbarConfig(
    device=crossbar.Device(
        programming=crossbar.Independent(0.02), read_noise=crossbar.ReadNoise(0.02)
    )
)


def _normal(*shape):
    return jnp.asarray(
        np.random.default_rng(len(shape)).normal(size=shape), jnp.float32
    )


_X = _normal(3, 4, 5, 6)


_program = jax.jit(functools.partial(crossbar.program, config=_COARSE))


def _read(x, matrix):
    return crossbar.matmul(x, _program(matrix))


# Every kind of layer.


def _by_patches(x, kernel):
    """Read the inputs under a filter with strides of (2, 1), by a convolution that JAX defines."""
    axes = ("NHWC", "HWIO", "NHWC")
    taps = jax.lax.conv_general_dilated_patches(
        x, kernel.shape[:-2], (2, 1), "SAME", dimension_numbers=axes
    )
    taps = taps.reshape(*taps.shape[:-1], x.shape[-1], -1).swapaxes(-1, -2)
    return _read(
        taps.reshape(*taps.shape[:-2], -1), kernel.reshape(-1, kernel.shape[-1])
    )


_MASK = jnp.tril(jnp.ones((3, 6, 8), jnp.float32))
_GROUPS = {
    "padding": ((1, 2), (0, 1)),
    "input_dilation": (1, 2),
    "kernel_dilation": (2, 1),
    "feature_group_count": 2,
}
_WRAPPED = {"strides": 2, "padding": "CIRCULAR"}
_CAUSAL = {"kernel_dilation": 2, "padding": "CAUSAL", "mask": _MASK}
_LAYERS = {
    "linear": lambda rngs: nnx.Linear(6, 7, rngs=rngs),
    "general": lambda rngs: nnx.LinearGeneral((5, 6), (2, 3), axis=(-2, -1), rngs=rngs),
    "general of groups": lambda rngs: nnx.LinearGeneral(
        6, 7, batch_axis={0: 3}, rngs=rngs
    ),
    "einsum": lambda rngs: nnx.Einsum("...d,dhf->...hf", (6, 2, 7), (2, 7), rngs=rngs),
    "einsum of groups": lambda rngs: nnx.Einsum("nthd,hfd->hntf", (5, 7, 6), rngs=rngs),
    "convolution": lambda rngs: nnx.Conv(6, 8, (3, 2), strides=(2, 1), rngs=rngs),
    "convolution of groups": lambda rngs: nnx.Conv(6, 8, (3, 2), rngs=rngs, **_GROUPS),
    "circular": lambda rngs: nnx.Conv(6, 8, (3, 2), rngs=rngs, **_WRAPPED),
    "masked and causal": lambda rngs: nnx.Conv(6, 8, 3, rngs=rngs, **_CAUSAL),
    "adapter": lambda rngs: nnx.LoRALinear(
        6, 7, lora_rank=2, b_initializer=nnx.initializers.normal(), rngs=rngs
    ),
}
# Reads of their kernels, laid out as matrices by hand.
_BY_HAND = {
    "linear": _read,
    "general": lambda x, k: _read(x.reshape(3, 4, 30), k.reshape(30, 6)).reshape(
        3, 4, 2, 3
    ),
    "einsum": lambda x, k: _read(x, k.reshape(6, 14)).reshape(3, 4, 5, 2, 7),
    "einsum of groups": lambda x, k: jnp.stack(
        [_read(x[:, :, h], k[h].T) for h in range(5)]
    ),
    "convolution": _by_patches,
}


@functools.cache
def _layer(name):
    return _LAYERS[name](nnx.Rngs(0))


@pytest.mark.parametrize("name", _BY_HAND)
def test_a_layer_reads_its_kernel_as_a_matrix(name):
    layer = _layer(name)
    assert_array_equal(
        convert(layer, {"*": _COARSE}, _KEY)(_X), _BY_HAND[name](_X, layer.kernel[...])
    )


def test_layers_on_ideal_arrays_are_the_digital_ones():
    configs = [(name, _IDEAL) for name in _LAYERS] + [
        (name, _PREPARED) for name in ("einsum of groups", "convolution of groups")
    ]
    on_arrays = [convert(_layer(name), {"*": config}, _KEY) for name, config in configs]
    digital = [convert(_layer(name), {}, _KEY) for name, _ in configs]
    biased = functools.partial(jax.tree_util.tree_map_with_path, _with_bias)
    compiled = jax.jit(lambda layers: [layer(_X) for layer in biased(layers)])
    outputs = zip(compiled(on_arrays), compiled(digital), strict=True)
    for (name, _), (got, wanted) in zip(configs, outputs, strict=True):
        assert_allclose(got, wanted, rtol=1e-5, atol=2e-6, err_msg=name)


def _with_bias(path, leaf):
    return (
        leaf + jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)
        if "bias" in str(path)
        else leaf
    )


# Models.


class _Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class _Language(nnx.Module):
    """Tied embeddings, two blocks in a scan, attention, positions."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(9, 8, rngs=rngs)
        self.kinds = nnx.Embed(2, 8, rngs=rngs)
        self.positions = nnx.Param(0.1 * jnp.ones((1, 4, 8)))
        self.blocks = nnx.split_rngs(splits=2)(nnx.vmap(_Block))(rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=8, decode=False, rngs=rngs
        )

    def __call__(self, tokens):
        x = self.embed(tokens) + self.kinds(tokens % 2) + self.positions[...]
        x = nnx.scan(
            lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry
        )(self.blocks, x)
        return self.embed.attend(self.attention(x))


_TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 9, (2, 4)))
_ATTENTION = [f"attention.{name}" for name in ("key", "out", "query", "value")]
_DIGITAL = {"positions": None}


@functools.cache
def _language():
    return _Language(nnx.Rngs(1))


@jax.jit
def _compiled(model, x):
    return model(x)


def test_a_language_model_goes_onto_arrays_in_one_call():
    digital = convert(_language(), {}, _KEY)
    on_arrays = convert(_language(), _DIGITAL | {"*": _IDEAL}, _KEY)
    assert_allclose(
        _compiled(on_arrays, _TOKENS), _compiled(digital, _TOKENS), rtol=1e-4, atol=1e-5
    )
    # And no table of an embedding.
    names = sorted(chip.name for chip in crossbar.chips_in(nnx.state(on_arrays)))
    assert names == [*_ATTENTION, "blocks.down", "blocks.up"]


def test_layers_of_one_input_are_prepared_together_for_the_inputs_of_a_model():
    rules = _DIGITAL | {"*": _PREPARED}
    heads = [f"attention.{name}" for name in ("query", "key", "value")]
    found = prepare(_language(), rules, [_TOKENS], together=[heads])
    assert found.keys() == {*heads, "attention.out", "blocks.up", "blocks.down"}
    assert_array_equal(found[heads[0]].factors, found[heads[1]].factors)
    assert found["blocks.up"].factors.shape == (2, 8) and not found["blocks.up"].white
    white = prepare(_language(), rules)
    assert white[heads[0]].white and not np.allclose(
        white[heads[0]].factors, white[heads[1]].factors
    )
    on_arrays = convert(_language(), rules, _KEY, found)
    assert_allclose(
        _compiled(on_arrays, _TOKENS),
        _compiled(_language(), _TOKENS),
        rtol=1e-4,
        atol=1e-5,
    )
    assert "equal power" in str(
        crossbar.explain(
            convert(_layer("linear"), {"*": _PREPARED}, _KEY).kernel[...].chip
        )
    )


def test_reads_are_counted_by_layer_over_positions_calls_and_stacked_layers():
    on_arrays = convert(_language(), _DIGITAL | {"*": _CALIBRATED}, _KEY)
    attention = dict.fromkeys(_ATTENTION, 2 * 4)
    stacked = {"blocks.down": 2 * 2 * 4, "blocks.up": 2 * 2 * 4}  # two layers
    assert count_reads(on_arrays, _TOKENS) == attention | stacked


def test_a_convolution_reads_a_vector_for_each_position_and_group():
    layer = nnx.Conv(4, 6, 3, feature_group_count=2, padding="VALID", rngs=nnx.Rngs(0))
    on_arrays = convert(layer, {"*": _CALIBRATED}, _KEY)
    assert count_reads(on_arrays, _normal(3, 5, 4)) == {"": 2 * 3 * 3}


# Rules.


def _mlp():
    return nnx.Sequential(
        nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 6, rngs=nnx.Rngs(1))
    )


class _Unable(nnx.Module):
    def __init__(self, rngs):
        self.transposed = nnx.ConvTranspose(6, 7, 3, rngs=rngs)
        self.quantised = nnx.Linear(
            6, 7, dot_general=lambda *args, **options: jax.lax.dot(*args), rngs=rngs
        )
        self.by_hand = nnx.Param(jnp.ones((6, 7)))
        self.outer = nnx.Einsum("td,tdf->tf", (3, 6, 7), rngs=rngs)
        self.odd = nnx.Einsum("td,dfg->tf", (6, 7, 2), rngs=rngs)


class _Unused(nnx.Module):
    def __init__(self, rngs):
        self.used = nnx.Linear(6, 7, rngs=rngs)
        self.unused = nnx.Linear(6, 7, rngs=rngs)

    def __call__(self, x):
        return self.used(x)


def _on_arrays(model=None, rules="*", config=_IDEAL):
    rules = {rules: config} if isinstance(rules, str) else rules
    return convert(model or _layer("linear"), rules, _KEY)


def _unable(path):
    """Put a model on arrays, of what cannot be there only the weight at `path`."""
    others = dict.fromkeys({"transposed", "quantised", "by_hand", "odd"} - {path})
    model = _Unable(nnx.Rngs(0))
    assert isinstance(_on_arrays(model, others | {path: None, "*": _IDEAL}), _Unable)
    return _on_arrays(model, others | {"*": _IDEAL})


class _Extra(nnx.Linear):
    def __init__(self, **extra):
        super().__init__(6, 7, rngs=nnx.Rngs(0))
        for name, value in extra.items():
            setattr(self, name, value)


def _of_qwix(layer, provider=None):
    provider = provider or qwix.PtqProvider(
        [qwix.QuantizationRule(weight_qtype="int8")]
    )
    with warnings.catch_warnings(action="ignore"):  # of what qwix calls in Flax
        return qwix.quantize_model(layer, provider, _X, rngs=nnx.Rngs(0))


def _second_axis():
    return nnx.vmap(lambda rngs: nnx.Linear(6, 7, rngs=rngs), in_axes=0, out_axes=1)(
        nnx.Rngs(0).split(3)
    )


def _scanned(*kinds):
    """Scan two blocks on arrays, with an axis for variables of some kinds alone."""
    model = convert(_language().blocks, {"*": _IDEAL}, _KEY)
    x = _normal(2, 8)
    axes = nnx.StateAxes({kinds: 0, ...: None})
    return nnx.scan(
        lambda block, x: block(x), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry
    )(model, x)


def _calibrated_inside(key):
    device = crossbar.Device(programming=crossbar.Independent(0.02))
    config = replace(_CALIBRATED, device=device)
    return calibrate(convert(_layer("linear"), {"*": config}, key), [_X])


def _small():
    return nnx.Linear(6, 7, rngs=nnx.Rngs(0))


_SQUARE = jnp.ones((7, 7))
# Of the tests' type checks.
_untyped_convert = inspect.unwrap(convert)
_empty = lambda: nnx.Linear(0, 3, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))  # noqa: E731
_RULES = _DIGITAL | {"*": _PREPARED}
_TWO = {"layers.0": _PREPARED, "*": _IDEAL}
_DIFFERENT = [["attention.query", "attention.out"]]
_OTHER = r"square cannot .*: it is a parameter of shape \(7, 7\), and no layer's kernel"
_REFUSED = [
    (lambda: _on_arrays(_language(), "decoder"), "'decoder' matches no weight: .*, blocks.down, "),
    (lambda: _on_arrays(_language(), "embed"), r"embed of shape \(8,\), but arrays hold matrices"),
    (lambda: _on_arrays(_mlp(), {"layers.*": _COARSE, "layers.2": None}), "'layers.2' never decides"),
    (lambda: _unable("transposed"), "ConvTranspose has no form .*digital.*'transposed': None"),
    (lambda: _unable("quantised"), "its dot_general is not that of JAX"),
    (lambda: _unable("by_hand"), r"by_hand .*of shape \(6, 7\), and no layer's kernel"),
    (lambda: _unable("odd"), "odd .*: the kernel of 'td,dfg->tf' has an axis"),
    (lambda: _on_arrays(_Extra(square=_SQUARE)), _OTHER),
    (lambda: _on_arrays(_Extra(square=nnx.Param(_SQUARE))), _OTHER),
    (lambda: _on_arrays(nnx.WeightNorm(_small(), rngs=nnx.Rngs(0))), "WeightNorm computes its"),
    (lambda: _on_arrays(_of_qwix(_small())), "comes from qwix"),
    (lambda: _on_arrays(_of_qwix(_mlp()).layers[0]), "its kernel is a WithAux instead of an array"),
    (lambda: _of_qwix(_on_arrays()), "dot_general has been replaced, as by a model of qwix"),
    (lambda: _on_arrays(_empty()), r"\(0, 3\) is empty"),
    (lambda: _untyped_convert(_mlp(), {"*": "isaac"}, _KEY), r"'\*' gives 'isaac': .*\('isaac'\)"),
    (lambda: _untyped_convert(_mlp(), _COARSE, _KEY), "rules of type CrossbarConfig: give a table"),
    (lambda: _untyped_convert(_mlp(), {"*": _IDEAL}, 3), "the key is 3: give one PRNG key, such as"),
    (lambda: _untyped_convert({"w": _X}, {"*": _IDEAL}, _KEY), "a model of type dict: give an NNX"),
    (lambda: _on_arrays(_on_arrays(_layer("convolution"))), "is on arrays already"),
    (lambda: _on_arrays(_second_axis()), r"\(6, 7\) are stacked to \(6, 3, 7\), and their axis"),
    (lambda: _on_arrays()(_X, out_sharding=jax.sharding.PartitionSpec()), "no out_sharding"),
    (lambda: inspect.unwrap(calibrate)(_on_arrays(), _X), r"batches is one array of shape \(3, "),
    (lambda: _scanned(nnx.Param), r"stack of \(2,\) layers, .*crossbar.flax.InArrays as well"),
    (
        lambda: calibrate(_on_arrays(_Unused(nnx.Rngs(0)), config=_CALIBRATED), [_X]),
        "unused was read by none",
    ),
    (lambda: prepare(_mlp(), {"*": _IDEAL}, together=[["kinds"]]), "kinds in `together`: expected"),
    (
        lambda: prepare(_language(), _RULES, [_TOKENS], together=_DIFFERENT),
        "attention.out and attention.query in `together` meet different inputs",
    ),
    (
        lambda: prepare(_mlp(), _TWO, together=[["layers.0", "layers.2"]]),
        "in `together` have two configurations",
    ),
    (
        lambda: count_reads(_on_arrays(_Unused(nnx.Rngs(0))), _X),
        "no gradient with respect to unused: let the model return logits",
    ),
    (lambda: jax.jit(_calibrated_inside)(_KEY), r"calibrate outside of them, .*jnp.stack\(leaves"),
]  # fmt: skip


test_what_cannot_be_put_on_arrays_or_read_there_is_refused_with_advice = refusals(
    _REFUSED
)


def test_a_drift_without_a_time_warns():
    device = crossbar.Device(drift=crossbar.PowerLaw(0.05))
    words = r"the rule '\*' has a device.drift, but its device.time is None"
    with pytest.warns(UserWarning, match=words):
        _on_arrays(config=crossbar.CrossbarConfig(device=device))


# Calibration.


def test_a_layer_is_calibrated_as_its_chip_is():
    layer = nnx.Linear(6, 7, use_bias=False, rngs=nnx.Rngs(0))
    on_arrays = convert(layer, {"*": _CALIBRATED}, _KEY)
    with refused(
        "the model has a DAC whose range comes from data: .*crossbar.flax.calibrate"
    ):
        on_arrays(_X)
    chip = jax.jit(functools.partial(crossbar.program, config=_CALIBRATED))(
        layer.kernel[...]
    )
    for _ in "inputs", "sums":
        chip = crossbar.calibrated(chip, crossbar.probe(_X, chip)[1])
    on_arrays = calibrate(on_arrays, [_X])
    assert_array_equal(on_arrays(_X), crossbar.matmul(_X, chip))
    (row,) = site_errors(on_arrays, [_X])
    assert_allclose(row["sqnr"], crossbar.probe(_X, chip)[1].sqnr, rtol=1e-5)
    assert row["site"] == "" and row["layer"] is None


def test_calibration_of_another_chip_compiles_nothing(caplog):
    compiled = []
    for number in (1, 2):
        sigma = crossbar.Independent(jnp.float32(0.01 * number))
        config = replace(_CALIBRATED, device=crossbar.Device(programming=sigma))
        chip = convert(_mlp(), {"*": config}, jax.random.key(number))
        caplog.clear()
        with jax.log_compiles():
            calibrate(chip, [_normal(7, 6)])
        compiled.append("Compiling jit(_found)" in caplog.text)
    assert compiled == [True, False]


# Noise, and transformations.


def test_read_noise_needs_a_key_and_calibration_has_one():
    noisy = replace(_CALIBRATED, device=_NOISY.device)
    on_arrays = calibrate(convert(_layer("linear"), {"*": noisy}, _KEY), [_X])
    assert site_errors(on_arrays, [_X])[0]["sqnr"] > 0
    with refused("again for every read: give it a key, .*crossbar.flax.with_read_key"):
        on_arrays(_X)
    assert with_read_key(on_arrays, _KEY)(_X).shape == (3, 4, 5, 7)


def test_a_read_key_decides_the_noise_of_all_layers():
    model = convert(_language(), {"blocks.*": _NOISY}, _KEY)

    @jax.jit
    def step(model, number):
        return with_read_key(model, jax.random.key(number))(_TOKENS)

    assert_array_equal(step(model, 1), step(model, 1))
    assert not np.array_equal(step(model, 1), step(model, 2))
    keyed = with_read_key(model, jax.random.key(1))
    chips = crossbar.chips_in(nnx.state(keyed))
    data = [np.asarray(jax.random.key_data(chip.key)).reshape(-1, 2) for chip in chips]
    keys = np.concatenate(data)
    # By path, and by layer within a scan.
    assert len(np.unique(keys, axis=0)) == len(keys) == 4


def test_training_leaves_arrays_alone():
    model = convert(_mlp(), {"layers.0": _NOISY, "*": _COARSE}, _KEY)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    before = jax.tree.leaves(nnx.state(model, InArrays)), model.layers[0].bias[...]

    @nnx.jit
    def step(model, optimizer, key):
        def loss(model):
            return jnp.mean(with_read_key(model, key)(_X) ** 2)

        value, slopes = nnx.value_and_grad(loss)(model)
        optimizer.update(model, slopes)
        return value

    values = [step(model, optimizer, jax.random.key(number)) for number in range(5)]
    assert values[-1] < values[0]
    after = jax.tree.leaves(nnx.state(model, InArrays))
    for old, new in zip(before[0], after, strict=True):
        assert (old == new).all()
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    assert paths == [("layers", 0, "bias"), ("layers", 2, "bias")]
    assert not np.array_equal(before[1], model.layers[0].bias[...])


def test_a_metric_is_evaluated_on_a_chip_for_each_key():
    """Each is the metric of a model that is converted, calibrated and keyed by hand."""
    noisy = replace(_CALIBRATED, device=_NOISY.device)
    digital = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    keys = jax.random.split(_KEY, 3)
    values = evaluate(
        digital, {"*": noisy}, keys, lambda model: model(_X[0, 0]), batches=[_X]
    )
    model = calibrate(convert(digital, {"*": noisy}, keys[1]), [_X])
    model = with_read_key(model, jax.random.fold_in(keys[1], 1))
    assert values.shape == (3, 5, 5)
    assert_array_equal(values[1], model(_X[0, 0]))
    assert np.all(values[0] != values[1])
