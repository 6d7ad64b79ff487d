"""Trees of weights in arrays: which go where, on which chip, with which noise, and what probing them returns."""

import dataclasses
import re
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crossbar_strategies import product

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    Chip,
    CrossbarConfig,
    calibrate_tree,
    observe,
    program_tree,
    reads,
)
from lorafusion_jax.crossbar import matmul as read
from lorafusion_jax.models import dense

_IDEAL = crossbar.PRESETS["ideal"]
_NOISY = CrossbarConfig(device=crossbar.Device(programming=crossbar.Independent(0.05)))
_READ_NOISE = CrossbarConfig(
    device=crossbar.Device(read_noise=crossbar.ReadNoise(0.02))
)
_CONVERTED = CrossbarConfig(
    cell=crossbar.Cell(bits=(4, 4)),
    adc=ADC(bits=5, clip_share=0.1),
    tile=crossbar.Tile(rows=4, cols=4),
    dac=crossbar.DAC(bits=4),
)

_KEY = jax.random.key(3)


def _weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "head": (6, 5),
        "encoder.self.q": (4, 6, 6),
        "encoder.ff.wi": (4, 6, 8),
        "A": {"q": (4, 3, 6, 2)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def _equal(got, wanted):
    np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))


# Rules.


def test_the_first_rule_that_matches_decides_and_the_rest_stays_digital():
    weights = _weights()
    placed = program_tree(
        weights, {"*.wi": None, "encoder.*": _NOISY, "A.*": _IDEAL}, _KEY
    )
    assert (
        placed["head"] is weights["head"]
        and placed["encoder.ff.wi"] is weights["encoder.ff.wi"]
    )
    assert (
        placed["encoder.self.q"].config == _NOISY and placed["A"]["q"].config == _IDEAL
    )
    assert placed["A"]["q"].name == "A.q" and placed["A"]["q"].shape == (4, 3, 6, 2)
    assert len(crossbar.chips_in(placed)) == 2 and not crossbar.chips_in(weights)


def test_a_rule_that_matches_nothing_is_refused_with_the_paths_there_are():
    for pattern in ("decoder.*", "head[1:]", "encoder.self"):
        with pytest.raises(
            ValueError,
            match=rf"{re.escape(repr(pattern))}.*A.q, encoder.ff.wi, encoder.self.q, head",
        ):
            program_tree(_weights(), {pattern: _IDEAL}, _KEY)


def test_biases_stay_digital_unless_a_rule_names_them_alone():
    weights = {"kernel": _weights()["head"], "bias": jnp.ones(5), "scale": jnp.ones(())}
    placed = program_tree(weights, {"*": _NOISY}, _KEY)
    assert isinstance(placed["kernel"], Chip)
    assert placed["bias"] is weights["bias"] and placed["scale"] is weights["scale"]
    with pytest.raises(
        ValueError,
        match=r"the rule 'b\*' matches bias of shape \(5,\), but arrays hold matrices",
    ):
        program_tree(weights, {"b*": _NOISY}, _KEY)
    assert (
        program_tree(weights, {"b*": None, "*": _NOISY}, _KEY)["bias"]
        is weights["bias"]
    )


# Chips.


def test_weights_are_named_in_messages():
    for weight, rule, message in (
        (
            {"head": jnp.full((6, 5), jnp.nan)},
            "*",
            "head holds weights that are NaN or infinite",
        ),
        (
            jnp.ones((3, 4)),
            "head",
            "matches no weight: there are a single layer, which has no name and matches",
        ),
        (jnp.ones(3), "*", "matches the model of shape"),
        (jnp.full((3, 4), jnp.nan), "*", "the model holds weights that are NaN"),
        (
            {"layers": jnp.ones((0, 6, 5))},
            "*",
            "layers of shape .* is a stack without matrices: give at least one",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            program_tree(weight, {rule: _IDEAL}, _KEY)


def test_a_raw_key_is_the_typed_one():
    x = jnp.ones((2, 6))
    weights = {"stack": _weights()["encoder.self.q"]}
    raw = jax.random.PRNGKey(3)
    stacks = [
        reads(program_tree(weights, {"*": _READ_NOISE}, key), 5)["stack"]
        for key in (_KEY, raw)
    ]
    _equal(*(jax.vmap(read, in_axes=(None, 0))(x, stack) for stack in stacks))
    again = [crossbar.with_read_key(stacks[0], key) for key in (_KEY, raw)]
    _equal(*(jax.vmap(read, in_axes=(None, 0))(x, stack) for stack in again))
    with pytest.raises(
        ValueError, match=r"the key is uint32\[4, 2\]: give one PRNG key"
    ):
        program_tree(weights, {"*": _READ_NOISE}, jax.random.split(raw, 4))


def test_every_matrix_is_programmed_with_a_key_of_its_own():
    same = {"a": jnp.ones((2, 3, 4, 4)), "b": jnp.ones((2, 3, 4, 4))}
    placed = program_tree(same, {"*": _NOISY}, _KEY)
    chips = np.concatenate(
        [np.asarray(dense(placed[name], jnp.float32)).reshape(6, -1) for name in "ab"]
    )
    assert len(np.unique(chips, axis=0)) == 12
    _equal(
        dense(program_tree(same, {"*": _NOISY}, _KEY)["b"], jnp.float32),
        dense(placed["b"], jnp.float32),
    )
    # What else is programmed makes no difference.
    _equal(
        dense(program_tree({"b": same["b"]}, {"*": _NOISY}, _KEY)["b"], jnp.float32),
        dense(placed["b"], jnp.float32),
    )


def test_the_reads_of_a_model_avoid_look_up_which_compiles_slowly():
    config = dataclasses.replace(
        _CONVERTED, adc=ADC(bits=5, range="max"), device=_NOISY.device
    )
    weight = _weights()["head"]
    x = _inputs(1)[0]
    placed = program_tree({"head": weight}, {"*": config}, _KEY)["head"]
    assert placed.plan.path == "loop"
    whole = dataclasses.replace(config, device=crossbar.Device())
    assert (
        program_tree({"head": weight}, {"*": whole}, _KEY)["head"].plan.path == "packed"
    )
    chip = jax.random.fold_in(jax.random.fold_in(_KEY, zlib.crc32(b"head")), 0)
    looked_up = crossbar.program(weight, config, chip, path="lookup")
    np.testing.assert_allclose(
        crossbar.programmed_weights(placed),
        crossbar.programmed_weights(looked_up),
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        product(x, placed), product(x, looked_up), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({}, -40.0),
        (
            {
                "encoding": crossbar.Encoding(kind="offset"),
                "dac": crossbar.DAC(bits=4, signed=False),
            },
            0.0,
        ),
        ({"mapping": crossbar.Mapping(weight_bits=8, scale="tile")}, -40.0),
        ({"tile": crossbar.Tile(rows=2)}, -2.0),
    ],
)
def test_a_model_reads_many_vectors_as_it_reads_few(changes, least):
    """Two layers by look-up, the last array of which has fewer rows, against reads of fewer vectors."""
    config = CrossbarConfig(
        **{
            "mapping": crossbar.Mapping(weight_bits=8),
            "dac": crossbar.DAC(bits=4),
            "tile": crossbar.Tile(rows=100, cols=16, partition="full"),
            **changes,
        },
        adc=ADC(bits=5, range="given", limits=[(least, abs(least) or 40.0)] * 4),
    )
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(2, 140, 20)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(70, 140)), jnp.float32)
    chips = program_tree({"w": weights}, {"*": config}, _KEY)["w"]
    assert chips.plan.tabulates and chips.plan.path != "lookup"
    for layer in range(2):
        chip = jax.tree.map(lambda leaf, layer=layer: leaf[layer], chips)
        _equal(read(x, chip), jnp.concatenate([read(x[:35], chip), read(x[35:], chip)]))


def test_a_model_whose_converters_have_no_ranges_yet_is_probed_with_many_vectors():
    config = CrossbarConfig(dac=crossbar.DAC(bits=4), adc=ADC(bits=5))
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(20, 3)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(70, 20)), jnp.float32)
    chip = program_tree({"w": weights}, {"*": config}, _KEY)["w"]
    assert chip.plan.tabulates and chip.limits is None
    many = crossbar.probe(x, chip)[0]
    few = [crossbar.probe(part, chip)[0] for part in (x[:35], x[35:])]
    np.testing.assert_allclose(many, jnp.concatenate(few), rtol=1e-5, atol=1e-5)


# Reads.


def test_reads_draw_anew_for_every_number_layer_and_module():
    """Without read noise a chip has no key, and nothing is drawn."""
    placed = program_tree(_weights(), {"*": _READ_NOISE}, _KEY)
    x = jnp.ones((2, 6))

    def read(*numbers):
        return np.asarray(product(x, reads(placed, *numbers)["head"]))

    _equal(read(1, 2), read(1, 2))
    draws = [read(), read(0), read(1), read(1, 2), read(2, 1), read(0, 0)]
    assert len({draw.tobytes() for draw in draws}) == len(draws)
    assert not np.array_equal(draws[0][0], draws[0][1])  # two inputs of one read
    keys = [
        jax.random.key_data(leaf.key).reshape(-1, 2)
        for leaf in (placed["A"]["q"], placed["encoder.self.q"])
    ]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 4 * 3 + 4
    jitted = jax.jit(lambda placed, number: product(x, reads(placed, number)["head"]))
    np.testing.assert_allclose(
        jitted(placed, jnp.int32(1)), read(1), rtol=1e-5, atol=1e-5
    )
    quiet = program_tree({"head": _weights()["head"]}, {"*": _NOISY}, _KEY)
    before = jax.tree.leaves(quiet)
    after = jax.tree.leaves(reads(quiet, 7))
    assert quiet["head"].key is None and all(
        a is b for a, b in zip(before, after, strict=True)
    )


# Probing.


def _run(weights, x):
    """Two products in a scan, of which the second is read twice, then modules and a head."""

    def body(x, layer):
        q, wi, A = layer
        x = x + product(x, q)
        hidden = product(x, wi)[:, :6] + product(jnp.tanh(x), wi)[:, :6]
        modules = jax.vmap(product, in_axes=(None, 0))(x, A)
        return x + 0.1 * hidden, jnp.sum(modules, axis=0)

    x, low = jax.lax.scan(
        body,
        x,
        (weights["encoder.self.q"], weights["encoder.ff.wi"], weights["A"]["q"]),
    )
    return jnp.concatenate([jnp.sum(low, axis=0), product(x, weights["head"])], axis=-1)


def _inputs(count):
    return [
        jnp.asarray(np.random.default_rng(i).normal(size=(5, 6)), jnp.float32)
        for i in range(count)
    ]


@pytest.mark.long
def test_taps_return_the_statistics_of_every_read():
    placed = program_tree(_weights(), {"*": _CONVERTED}, _KEY)
    seen = dict(
        zip(["A.q", "wi", "q", "head"], observe(_run, placed, _inputs(2)), strict=True)
    )
    assert (
        seen["A.q"].signal.shape == (4, 3)
        and seen["q"].signal.shape == (4,)
        and seen["head"].signal.shape == ()
    )
    # The first layer's inputs are known: the same reads, one by one.
    wanted = None
    matrix = jax.tree.map(lambda leaf: leaf[0], placed["encoder.self.q"])
    for x in _inputs(2):
        statistics = crossbar.probe(x, matrix)[1]
        wanted = (
            statistics if wanted is None else jax.tree.map(jnp.add, wanted, statistics)
        )
    for got, want in zip(
        jax.tree.leaves(seen["q"]), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-6)
    conversions = np.asarray(jnp.sum(seen["wi"].histogram, axis=(-2, -1)))
    # batches x reads x inputs x input slices x weight slices x row tiles x columns
    _equal(conversions, np.full(4, 2 * 2 * 5 * 3 * 2 * 2 * 8))


@pytest.mark.nightly
def test_calibration_sets_every_matrix_to_its_own_data():
    config = dataclasses.replace(_CONVERTED, device=_NOISY.device)
    placed = program_tree(_weights(), {"*": config}, _KEY)
    settled = calibrate_tree(_run, placed, _inputs(3))
    statistics = observe(_run, placed, _inputs(3))
    A = settled["A"]["q"]
    for layer, module in ((0, 0), (3, 2)):
        one = jax.tree.map(
            lambda leaf, at=(layer, module): leaf[at], (placed["A"]["q"], statistics[0])
        )
        np.testing.assert_allclose(
            A.limits[layer, module], crossbar.calibrated(*one).limits, rtol=1e-6
        )
    assert len(np.unique(np.asarray(A.limits[..., -1]))) > 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = crossbar.site_errors(settled, observe(_run, settled, _inputs(3)))
    assert {(row["site"], row["layer"], row["module"]) for row in rows} >= {
        ("A.q", 3, 2),
        ("head", None, None),
    }
    assert all(3 < row["sqnr"] < 60 and row["clipped"] <= 0.1 for row in rows)


def test_ranges_that_clip_warn_by_name():
    limits = ((-0.2, 0.2), (-0.2, 0.2))
    config = dataclasses.replace(
        _CONVERTED, adc=ADC(bits=5, range="given", limits=limits)
    )
    placed = program_tree(_weights(), {"head": config}, _KEY)
    with pytest.warns(
        UserWarning,
        match=r"ADCs clip more conversions than adc.clip_share: head: \d+.\d%",
    ):
        crossbar.site_errors(placed, observe(_run, placed, _inputs(1)))


def test_calibration_without_batches_or_reads_is_refused():
    weights = _weights()
    placed = program_tree(
        {"q": weights["encoder.self.q"][0], "head": weights["head"]},
        {"*": _CONVERTED},
        _KEY,
    )
    with pytest.raises(ValueError, match="there are no batches"):
        calibrate_tree(_run, placed, [])
    with pytest.raises(ValueError, match="head was read by none of the batches"):
        calibrate_tree(lambda weights, x: product(x, weights["q"]), placed, _inputs(1))


def test_ranges_of_inputs_come_from_data_before_those_of_sums():
    config = CrossbarConfig(
        dac=crossbar.DAC(scaling="calibrated", quantile=0.5), adc=ADC(bits=8)
    )
    placed = program_tree(
        {"a": _weights()["encoder.self.q"][0], "b": _weights()["head"]},
        {"*": config},
        _KEY,
    )

    def run(tree, x):
        return product(product(x, tree["a"]), tree["b"])

    settled = calibrate_tree(run, placed, _inputs(1))
    assert all(
        chip.limits is not None and chip.input_limit > 0 for chip in settled.values()
    )
    with pytest.warns(
        UserWarning,
        match=r"DACs clip more inputs than dac.clip_share: .*a: (4|5)\d\.\d%",
    ):
        crossbar.site_errors(settled, observe(run, settled, _inputs(1)))


def test_every_batch_is_observed_with_noise_of_its_own():
    placed = program_tree({"w": _weights()["head"]}, {"*": _READ_NOISE}, _KEY)
    once = float(
        observe(lambda tree, x: product(x, tree["w"]), placed, _inputs(1) * 1)[0].error
    )
    twice = float(
        observe(lambda tree, x: product(x, tree["w"]), placed, _inputs(1) * 2)[0].error
    )
    assert abs(twice / once - 2) > 1e-3
