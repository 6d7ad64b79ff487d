"""Trees of weights in arrays: which go where, on which chip, with which noise, and what probing them returns."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crossbar_strategies import product
from numpy.testing import assert_allclose
from refusals import refused

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


def _normal(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


_WEIGHTS = {
    "head": _normal(6, 5),
    "encoder.self.q": _normal(4, 6, 6),
    "encoder.ff.wi": _normal(4, 6, 8),
    "A": {"q": _normal(4, 3, 6, 2)},
}
_BATCHES = [_normal(5, 6, seed=number) for number in range(3)]
_equal = np.testing.assert_array_equal


def _on_chip(weight, config, key=_KEY):
    return program_tree({"w": weight}, {"*": config}, key)["w"]


# Rules.


def test_the_first_rule_that_matches_decides_and_the_rest_stays_digital():
    rules = {"*.wi": None, "encoder.*": _NOISY, "A.*": _IDEAL}
    placed = program_tree(_WEIGHTS, rules, _KEY)
    assert placed["head"] is _WEIGHTS["head"]
    assert placed["encoder.ff.wi"] is _WEIGHTS["encoder.ff.wi"]
    assert placed["encoder.self.q"].config == _NOISY
    assert placed["A"]["q"].config == _IDEAL and placed["A"]["q"].name == "A.q"
    assert placed["A"]["q"].shape == (4, 3, 6, 2)
    assert len(crossbar.chips_in(placed)) == 2 and not crossbar.chips_in(_WEIGHTS)


def test_biases_stay_digital_unless_a_rule_names_them_alone():
    weights = {"kernel": _WEIGHTS["head"], "bias": jnp.ones(5), "scale": jnp.ones(())}
    for rules in ({"*": _NOISY}, {"b*": None, "*": _NOISY}):
        placed = program_tree(weights, rules, _KEY)
        assert isinstance(placed["kernel"], Chip)
        assert placed["bias"] is weights["bias"]
        assert placed["scale"] is weights["scale"]


@pytest.mark.parametrize(
    ("weights", "pattern", "words"),
    [
        (_WEIGHTS, "decoder.*", r"'decoder.\*'.*A.q, encoder.ff.wi, encoder.self.q, head"),
        (_WEIGHTS, "encoder.self", "matches no weight"),
        (jnp.ones((3, 4)), "head", "there are a single layer, which has no name and matches"),
        ({"bias": jnp.ones(5)}, "b*", r"bias of shape \(5,\), but arrays hold matrices"),
        ({"head": jnp.full((6, 5), jnp.nan)}, "*", "head holds weights that are NaN or infinite"),
        (jnp.full((3, 4), jnp.nan), "*", "the model holds weights that are NaN"),
        ({"layers": jnp.ones((0, 6, 5))}, "*", "layers of shape .* is a stack without matrices"),
    ],
)  # fmt: skip
def test_rules_and_weights_that_do_not_fit_are_refused(weights, pattern, words):
    with refused(words):
        program_tree(weights, {pattern: _IDEAL}, _KEY)


# Chips.


def test_a_raw_key_is_the_typed_one():
    raw = jax.random.PRNGKey(3)
    stack = _WEIGHTS["encoder.self.q"]
    x = jnp.ones((2, 6))
    typed = reads(_on_chip(stack, _READ_NOISE, _KEY), 5)
    same = reads(_on_chip(stack, _READ_NOISE, raw), 5)
    _equal(*(jax.vmap(product, (None, 0))(x, chips) for chips in (typed, same)))
    with refused(r"the key is uint32\[4, 2\]: give one PRNG"):
        _on_chip(stack, _READ_NOISE, jax.random.split(raw, 4))


def test_every_matrix_is_programmed_with_a_key_of_its_own():
    same = {"a": jnp.ones((2, 3, 4, 4)), "b": jnp.ones((2, 3, 4, 4))}
    placed = program_tree(same, {"*": _NOISY}, _KEY)
    programmed = {name: dense(chips, jnp.float32) for name, chips in placed.items()}
    chips = np.concatenate(
        [np.asarray(programmed[name]).reshape(6, -1) for name in "ab"]
    )
    assert len(np.unique(chips, axis=0)) == 12
    # What else is programmed makes no difference, nor do the other layers of a stack.
    alone = program_tree({"b": same["b"]}, {"*": _NOISY}, _KEY)["b"]
    _equal(dense(alone, jnp.float32), programmed["b"])
    indices = {"b": [jnp.asarray([1]), jnp.arange(3)]}
    layer = program_tree({"b": same["b"][1:]}, {"*": _NOISY}, _KEY, indices=indices)
    _equal(dense(layer["b"], jnp.float32)[0], programmed["b"][1])


def test_the_reads_of_a_model_avoid_look_up_which_compiles_slowly():
    weight = _WEIGHTS["head"]
    perfect = replace(_CONVERTED, adc=ADC(bits=5, range="max"))
    assert _on_chip(weight, perfect).plan.path == "packed"
    config = replace(perfect, device=_NOISY.device)
    assert _on_chip(weight, config).plan.path == "loop"


# Reads.


def test_reads_draw_anew_for_every_number_layer_and_module():
    """Without read noise a chip has no key, and nothing is drawn."""
    placed = program_tree(_WEIGHTS, {"*": _READ_NOISE}, _KEY)

    def read(*numbers):
        return product(jnp.ones((2, 6)), reads(placed, *numbers)["head"])

    _equal(read(1, 2), read(1, 2))
    draws = [read(), read(0), read(1), read(1, 2), read(2, 1), read(0, 0)]
    assert len({np.asarray(draw).tobytes() for draw in draws}) == len(draws)
    assert not np.array_equal(draws[0][0], draws[0][1])  # two inputs of one read
    stacks = (placed["A"]["q"], placed["encoder.self.q"])
    keys = [jax.random.key_data(chips.key).reshape(-1, 2) for chips in stacks]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 4 * 3 + 4
    assert_allclose(jax.jit(read)(1), read(1), rtol=1e-5, atol=1e-5)
    assert reads(_on_chip(_WEIGHTS["head"], _NOISY), 7).key is None


# Probing.


def _run(weights, x):
    """Two products in a scan, of which the second is read twice, then modules and a head."""

    def body(x, layer):
        q, wi, A = layer
        x = x + product(x, q)
        hidden = product(x, wi)[:, :6] + product(jnp.tanh(x), wi)[:, :6]
        modules = jax.vmap(product, in_axes=(None, 0))(x, A)
        return x + 0.1 * hidden, jnp.sum(modules, axis=0)

    layers = (weights["encoder.self.q"], weights["encoder.ff.wi"], weights["A"]["q"])
    x, low = jax.lax.scan(body, x, layers)
    return jnp.concatenate([jnp.sum(low, axis=0), product(x, weights["head"])], axis=-1)


@pytest.mark.long
def test_taps_return_the_statistics_of_every_read():
    placed = program_tree(_WEIGHTS, {"*": _CONVERTED}, _KEY)
    A, wi, q, head = observe(_run, placed, _BATCHES[:2])
    shapes = (A.signal.shape, q.signal.shape, head.signal.shape)
    assert shapes == ((4, 3), (4,), ())
    # The first layer's inputs are known: the same reads, one by one.
    matrix = jax.tree.map(lambda leaf: leaf[0], placed["encoder.self.q"])
    one_by_one = [crossbar.probe(x, matrix)[1] for x in _BATCHES[:2]]
    total = jax.tree.map(jnp.add, *one_by_one)
    for ours, theirs in zip(*map(jax.tree.leaves, (q, total)), strict=True):
        assert_allclose(ours[0], theirs, rtol=1e-4, atol=1e-6)
    # Batches x reads x inputs x input slices x weight slices x row tiles x columns.
    conversions = jnp.sum(wi.histogram, axis=(-2, -1))
    _equal(conversions, np.full(4, 2 * 2 * 5 * 3 * 2 * 2 * 8))


def test_ranges_that_clip_warn_by_name():
    adc = ADC(bits=5, range="given", limits=((-0.2, 0.2), (-0.2, 0.2)))
    config = replace(_CONVERTED, adc=adc)
    placed = program_tree(_WEIGHTS, {"head": config}, _KEY)
    seen = observe(_run, placed, _BATCHES[:1])
    with pytest.warns(UserWarning, match=r"adc.clip_share: head: \d+.\d%"):
        crossbar.site_errors(placed, seen)


def test_ranges_of_inputs_come_from_data_before_those_of_sums():
    dac = crossbar.DAC(scaling="calibrated", quantile=0.5)
    config = CrossbarConfig(dac=dac, adc=ADC(bits=8))
    weights = {"a": _WEIGHTS["encoder.self.q"][0], "b": _WEIGHTS["head"]}
    placed = program_tree(weights, {"*": config}, _KEY)

    def run(tree, x):
        return product(product(x, tree["a"]), tree["b"])

    settled = calibrate_tree(run, placed, _BATCHES[:1])
    assert all(chip.limits is not None for chip in settled.values())
    assert all(chip.input_limit > 0 for chip in settled.values())
    seen = observe(run, settled, _BATCHES[:1])
    with pytest.warns(UserWarning, match=r"dac.clip_share: .*a: (4|5)\d\.\d%"):
        crossbar.site_errors(settled, seen)


def test_every_batch_is_observed_with_noise_of_its_own():
    chip = _on_chip(_WEIGHTS["head"], _READ_NOISE)

    def error(batches):
        return float(observe(lambda w, x: product(x, w), chip, batches)[0].error)

    once = error(_BATCHES[:1])
    assert abs(error([_BATCHES[0], _BATCHES[0]]) / once - 2) > 1e-3
