"""Digital corrections of chips: closed forms against NumPy's least squares, and what they may be put on."""

import functools
import tempfile
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crossbar_strategies import product
from numpy.testing import assert_allclose, assert_array_equal
from refusals import refusals

import lorafusion_jax as lf
from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import ADC, Correction, CrossbarConfig, Device, Independent

_PERFECT = crossbar.PRESETS["ideal"]
_NOISY = replace(_PERFECT, device=Device(programming=Independent(0.05)))
_WEIGHTS = {
    "layers": jax.random.normal(jax.random.key(0), (3, 8, 8)),
    "head": jax.random.normal(jax.random.key(1), (8, 5)),
}
_BATCHES = [jax.random.normal(jax.random.key(n), (20, 8)) for n in (2, 3)]


def _run(weights, x):
    """A residual network of three layers, scanned, and a head."""
    x, _ = jax.lax.scan(
        lambda x, w: (x + product(jnp.tanh(x), w), None), x, weights["layers"]
    )
    return product(x, weights["head"])


_outputs = jax.jit(_run)


@functools.cache
def _chips(config=_NOISY):
    return crossbar.program_tree(_WEIGHTS, {"*": config}, jax.random.key(7))


def _fit(weights=None, batches=_BATCHES, **how):
    weights = _chips() if weights is None else weights
    return crossbar.fit_corrections(
        _run, weights, [_WEIGHTS["head"], _WEIGHTS["layers"]], batches, **how
    )


@functools.cache
def _fitted(**how):
    return _fit(**how)


def _seen_by_layers():
    """Inputs, digital outputs, reads and row weights of every matrix in the digital model, in float64."""
    x = np.concatenate(_BATCHES).astype(float)
    found = []
    programmed = {
        of.name: np.asarray(crossbar.programmed_weights(of), float)
        for of in crossbar.chips_in(_chips())
    }
    for layer in range(3):
        inputs = np.tanh(x)
        found.append(
            (
                inputs,
                inputs @ np.asarray(_WEIGHTS["layers"][layer]),
                inputs @ programmed["layers"][layer],
            )
        )
        x = x + found[-1][1]
    found.append((x, x @ np.asarray(_WEIGHTS["head"]), x @ programmed["head"]))
    return [(x, y, z, 1 / np.mean(np.square(y), axis=1)) for x, y, z in found]


def _with_head(**parts):
    return crossbar.with_corrections(_chips(), {"head": Correction(**parts)})


def _of_layer(corrections, layer):
    if layer == 3:
        return corrections["head"]
    return jax.tree.map(lambda part: part[layer], corrections["layers"])


@pytest.mark.parametrize("offsets", [False, True])
def test_scales_are_those_of_weighted_least_squares(offsets):
    found = _fit(offsets=offsets, ridge=0.0)
    for layer, (_, y, z, weight) in enumerate(_seen_by_layers()):
        one = _of_layer(found, layer)
        root = np.sqrt(weight)
        for column in range(y.shape[1]):
            unknowns = np.stack([z[:, column], np.ones(len(z))][: 1 + offsets], axis=1)
            wanted, *_ = np.linalg.lstsq(
                unknowns * root[:, None], y[:, column] * root, rcond=None
            )
            got = [one.scale[column], *([one.offset[column]] if offsets else [])]
            assert_allclose(got, wanted, rtol=2e-4, atol=2e-5)


def test_padding_does_not_count():
    padded = [jnp.concatenate([x, 100 * x]) for x in _BATCHES]

    def counted(batch, name):
        return jnp.arange(len(batch)) < len(batch) // 2

    found = (
        _fit(batches=padded, offsets=True, counted=counted),
        crossbar.moments(_run, _chips(), padded, counted=counted),
    )
    wanted = _fitted(offsets=True), crossbar.moments(_run, _chips(), _BATCHES)
    jax.tree.map(
        functools.partial(assert_allclose, rtol=1e-4, atol=1e-5),
        found,
        wanted,
    )


def test_low_rank_is_the_best_matrix_of_that_rank():
    # All ranks that there are: what remains is the least-squares error of a full matrix, which is none here.
    found = _fit(numbers=10_000, ridge=1e-7)
    for layer, (x, y, z, _) in enumerate(_seen_by_layers()):
        one = _of_layer(found, layer)
        got = np.asarray(one(jnp.asarray(x, jnp.float32), jnp.asarray(z, jnp.float32)))
        assert_allclose(got, y, atol=2e-3 * np.abs(y).max())
    # Rank 1 for every matrix, next to its scales: the reduced-rank regression of NumPy's SVD.
    found = _fit(numbers=3 * 16 + 13, ridge=1e-7)
    removed = 0.0
    for layer, (x, y, z, weight) in enumerate(_seen_by_layers()):
        one = _of_layer(found, layer)
        root = np.sqrt(weight)[:, None]
        rank = int(np.any(np.asarray(one.U) != 0, axis=0).sum())
        orthogonal, triangle = np.linalg.qr(x * root)
        error = (y - np.asarray(one.scale) * z) * root
        left, singular, right = np.linalg.svd(orthogonal.T @ error, full_matrices=False)
        wanted = np.linalg.solve(
            triangle, (left[:, :rank] * singular[:rank]) @ right[:rank]
        )
        assert_allclose(one.U @ one.V, wanted, atol=2e-3 * np.abs(wanted).max())
        removed += rank
    assert removed > 0


def test_columns_of_zeros_are_no_numbers_of_a_correction():
    U = jnp.ones((6, 2)).at[:, 1].set(0)
    correction = Correction(scale=jnp.ones(5), U=U, V=jnp.ones((2, 5)))
    assert correction.numbers() == 5 + (6 + 5)


def test_corrections_of_the_same_chip_are_the_same_and_bring_outputs_closer():
    chips = _chips()
    x = jax.random.normal(jax.random.key(9), (30, 8))
    scaled = crossbar.with_corrections(chips, _fitted(numbers=0))
    further = crossbar.with_corrections(chips, _fitted(numbers=200))
    errors = [
        np.mean(np.square(_outputs(tree, x) - _outputs(_WEIGHTS, x)))
        for tree in (chips, scaled, further)
    ]
    assert errors[2] < 0.5 * errors[1] and errors[1] < errors[0]
    again = _fit(scaled, numbers=90)  # a chip that has a correction already
    jax.tree.map(assert_array_equal, _fitted(numbers=90), again)


def test_programmed_weights_contain_the_correction():
    chips = crossbar.with_corrections(_chips(), _fitted(numbers=90))
    x = _BATCHES[0]
    for chip in crossbar.chips_in(chips):
        held = crossbar.programmed_weights(chip)
        one, of_one = (
            (chip, held)
            if held.ndim == 2
            else (jax.tree.map(lambda leaf: leaf[1], chip), held[1])
        )
        assert_allclose(crossbar.matmul(x, one), x @ of_one, atol=1e-4)


def test_a_calibrated_and_corrected_chip_keeps_its_ranges():
    config = CrossbarConfig(
        adc=ADC(bits=5), device=Device(programming=Independent(0.03))
    )
    chips = crossbar.calibrate_tree(_run, _chips(config), _BATCHES)
    corrected = crossbar.with_corrections(chips, _fit(chips, numbers=60))
    again = crossbar.calibrate_tree(_run, corrected, [4 * _BATCHES[0]])
    for before, after in zip(
        crossbar.chips_in(corrected), crossbar.chips_in(again), strict=True
    ):
        assert_array_equal(before.limits, after.limits)


@pytest.mark.parametrize("method", ["scales", "low-rank"])
def test_left_out_inputs_choose_the_start_and_the_epoch(method):
    """A rate of 5 makes training worse than its start: the closed form or ones, whichever is wanted."""
    chips = _chips()
    matrices = [_WEIGHTS[chip.name] for chip in crossbar.chips_in(_chips())]
    digital = [_outputs(_WEIGHTS, x) for x in _BATCHES]
    numbers = 90 if method == "low-rank" else 0

    def restored(wanted):
        left_out = [_outputs(wanted, x) for x in _BATCHES]
        how = lf.Restoring(
            method=method, numbers=numbers, epochs=2, rate=5.0, rate_low_rank=5.0
        )
        return lf.restore(
            _run, chips, matrices, _BATCHES, digital, how, left_out=(_BATCHES, left_out)
        )

    closed = crossbar.fit_corrections(_run, chips, matrices, _BATCHES, numbers=numbers)
    for name, correction in restored(crossbar.with_corrections(chips, closed)).items():
        assert_array_equal(correction.scale, closed[name].scale)
    for correction in restored(chips).values():
        assert_array_equal(correction.scale, 1)
        assert correction.V is None or not correction.V.any()


def test_fewer_vectors_than_inputs_warn_of_the_ridge():
    with pytest.warns(
        UserWarning, match=r"fewer than its 8 inputs: the ridge of 0\.01 decides"
    ):
        _fit(batches=[_BATCHES[0][:4]], numbers=90)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _fit(batches=[_BATCHES[0][:4]])


def test_offsets_are_part_of_the_reference_of_corrected_chips():
    """Ideal converters: what is left of an error is rounding, as without offsets."""
    chip = crossbar.program(_WEIGHTS["head"], _PERFECT)
    offset = Correction(scale=jnp.full(5, 1.1), offset=jnp.arange(5.0))
    _, found = crossbar.probe(_BATCHES[0], replace(chip, correction=offset))
    assert float(found.sqnr) > 100


def _wide_head():
    chip = crossbar.program(_WEIGHTS["head"], _PERFECT)
    return replace(chip, name="head", correction=Correction(scale=jnp.ones(1)))


_NAN = [_BATCHES[0].at[3, 2].set(jnp.nan)]
_TARGET = jnp.ones((20, 5))


def _restored(target, **how):
    matrices = [_WEIGHTS["head"], _WEIGHTS["layers"]]
    epochs = lf.Restoring(epochs=1)
    return lf.restore(_run, _chips(), matrices, _BATCHES[:1], [target], epochs, **how)


_CONV = jnp.ones((3, 3, 1, 8))


def _fit_of(chips, *matrices):
    return crossbar.fit_corrections(_run, chips, [*matrices], _BATCHES)


def _fit_kernel():
    return _fit_of({"conv": crossbar.program(_CONV.reshape(9, 8), _PERFECT)}, _CONV)


def _saved():
    with tempfile.TemporaryDirectory() as folder:
        crossbar.save_chip(_wide_head(), f"{folder}/chip.safetensors")
        crossbar.load_chip(f"{folder}/chip.safetensors")


_NAMELESS = [crossbar.program(_WEIGHTS["head"], _PERFECT) for _ in range(2)]
_ONE = Correction(scale=jnp.ones(5))
_WIDE = r"scale of the correction of 'head' has shape \(1,\)"
_RIDGE = "give a finite share, above 0 with numbers"
_LAYERS = _WEIGHTS["layers"]
_HEAD = _WEIGHTS["head"]


test_what_does_not_fit_the_chips_is_refused = refusals([
    (lambda: _fit(batches=[]), "there are no batches"),
    (lambda: _fit(batches=_NAN), "inputs or outputs of head are NaN or infinite"),
    (
        lambda: _restored(_TARGET.at[2, 1].set(jnp.nan)),
        "the targets of batch 0 are NaN or infinite: give the digital model's",
    ),
    (lambda: _restored(_TARGET, left_out=(_NAN, [_TARGET * jnp.inf])), "targets of batch 0"),
    (lambda: _fit(ridge=-0.1), rf"ridge = -0\.1: {_RIDGE}"),
    (lambda: _fit(numbers=90, ridge=0.0), rf"ridge = 0\.0: {_RIDGE}"),
    (lambda: _fit(numbers=-3), "numbers = -3: give a whole number of at least 0"),
    (lambda: _fit(offsets=True, numbers=9), "offsets are fitted without"),
    (
        lambda: _fit(batches=[0 * _BATCHES[0]], numbers=90, ridge=1e-300),
        "do not determine its matrix of low rank",
    ),
    (lambda: Correction(U=jnp.ones((8, 2))), "U and V are .*: give both or neither"),
    (_fit_kernel, r"expected \(9, 8\)\. .* give kernel\.reshape\(-1, 8\)"),
    (lambda: _fit_of(_chips(), _HEAD), "1 matrices for 2 chips: expected one for each"),
    (lambda: _fit_of(_chips(), _HEAD.T, _LAYERS), r"shape \(5, 8\): expected \(8, 5\)"),
    (lambda: _fit_of(_NAMELESS, _HEAD, _HEAD), "2 chips have the name '', .*: set other"),
    (lambda: crossbar.with_corrections(_NAMELESS, {"": _ONE}), "2 chips have the name ''"),
    (lambda: crossbar.with_chips(_NAMELESS, _NAMELESS[:1]), "1 chips for a tree with 2"),
    (
        lambda: crossbar.with_corrections(_chips(), {"tail": _ONE}),
        "a correction of 'tail': expected one of the chips head, layers",
    ),
    (lambda: crossbar.matmul(_BATCHES[0], _wide_head()), _WIDE),
    (_saved, rf"chip\.safetensors: the {_WIDE}"),
    (lambda: _with_head(scale=jnp.ones(4)), r"has shape \(4,\): expected \(5,\)"),
])  # fmt: skip
