"""A whole T5 with its pool in arrays: exact where the arrays are ideal, noisy where they are not."""

import functools
import itertools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from numpy.testing import assert_array_equal
from refusals import refused

import lorafusion_jax as lf
from lorafusion_jax import crossbar
from lorafusion_jax.adapters.norms import PairTerms
from lorafusion_jax.adapters.updates import Dense, InBasis, Outputs
from lorafusion_jax.crossbar import PRESETS, Device, observe, site_errors
from lorafusion_jax.hardware import program_on_arrays, redrawn
from lorafusion_jax.hardware.chips import logits_of
from lorafusion_jax.methods.entry import SearchJob
from lorafusion_jax.methods.lorahub import LORAHUB, objective_of
from lorafusion_jax.models import dense, matrices
from lorafusion_jax.training import seed_entropies

_KEY = jax.random.key(5)
_IDEAL = {"*": PRESETS["ideal"]}
# Values of both stacks and their modules, where it does not matter which weights are written: less to compile.
_WRITTEN = "*.self.v"
_NOISY = replace(
    PRESETS["ideal"], device=Device(programming=crossbar.Independent(0.02))
)
_READ_NOISE = replace(_NOISY, device=Device(read_noise=crossbar.ReadNoise(0.01)))

_GRAPH, _BASE = nnx.split(tiny.t5())
_INDEX = jnp.array([2, 0])
_DIGITAL = tiny.frozen(tiny.t5(), tiny.pool(3))


def _somewhere(n, site, layer):
    """Module 0 has nothing in the decoder, and rank 3 of 4 in the encoder."""
    if n == 0:
        return 0 if "decoder" in site else 3
    return 4


@functools.cache
def _in_arrays(pattern="*", config=PRESETS["ideal"]):
    return program_on_arrays(_GRAPH, _DIGITAL, {pattern: config}, _KEY)


_value_and_grad = jax.jit(jax.value_and_grad(tiny.loss))


def _loss_and_gradients(params, frozen, method):
    return _value_and_grad(params, tiny.problem(method, frozen, _INDEX))


def _params(method, frozen=_DIGITAL):
    params = method.init(frozen, _INDEX, jax.random.key(0))
    params["coefficients"] = tiny.coefficients(params["coefficients"].shape)
    return params


def _close(got, wanted, tolerance=2e-4):
    scale = float(np.max(np.abs(wanted)))
    np.testing.assert_allclose(
        np.asarray(got), np.asarray(wanted), rtol=tolerance, atol=tolerance * scale
    )


# The digital model, where arrays are ideal.


@functools.cache
def _in_basis(norm=None, pattern="*"):
    """Modules in a basis, digital; or, with the weights of the norms, in arrays."""
    frozen = lf.Fusion().precompute(
        lf.Frozen(_BASE, lf.shared_basis(tiny.pool(3), 5)), lf.kernels(tiny.t5())
    )
    if norm is None:
        return frozen
    rules = {pattern: PRESETS["ideal"]}
    return program_on_arrays(_GRAPH, frozen, rules, _KEY, norm=norm)


_FULL_RANK = tiny.frozen(tiny.t5(), tiny.pool(3, lambda n, site, layer: 8))
_STACKS = {"encoder.*": PRESETS["ideal"], "decoder.*": PRESETS["ideal"]}
# Name -> digital weights, the same in ideal arrays, the fusion, and its adapters (of any kind for None).
_RANK = lf.Fusion(granularity="rank")
_MIX = lf.Fusion(composition="mix")
_SITE = lf.Fusion(granularity="site")
_SUM = lf.Fusion()
_CASES = {
    "all, a sum": lambda: (_DIGITAL, _in_arrays(), _RANK, Outputs),
    "all, a mix": lambda: (_DIGITAL, _in_arrays(), _MIX, Outputs),
    "encoder.*": lambda: (_DIGITAL, _in_arrays("encoder.*"), _SITE, None),
    "pool.B.*": lambda: (_DIGITAL, _in_arrays("pool.B.*"), _SITE, None),
    "full rank": lambda: (
        _FULL_RANK,
        program_on_arrays(_GRAPH, _FULL_RANK, _STACKS, _KEY),
        _SUM,
        Dense,
    ),
    "a basis": lambda: (_in_basis(), _in_basis("programmed"), _SUM, InBasis),
    "a basis, ideal norms": lambda: (_in_basis(), _in_basis("ideal"), _SUM, InBasis),
    "V of a basis": lambda: (_in_basis(), _in_basis("ideal", "pool.V.*"), _SUM, None),
}
_OFTEN = ("all, a sum", "encoder.*", "full rank")


@pytest.mark.long
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.nightly] * (case not in _OFTEN))
        for case in _CASES
    ],
)
def test_ideal_arrays_are_the_digital_fusion_and_so_are_their_gradients(case):
    digital, in_arrays, method, kind = _CASES[case]()
    params = _params(method, digital)
    if kind is not None:
        adapters, _ = jax.jit(method.adapters)(params, in_arrays, _INDEX)
        assert all(isinstance(adapter, kind) for adapter in adapters.values())
    wanted, gradients = _loss_and_gradients(params, digital, method)
    got, on_arrays = _loss_and_gradients(params, in_arrays, method)
    _close(got, wanted, 1e-5)
    assert jax.tree.structure(gradients) == jax.tree.structure(on_arrays)
    jax.tree.map(_close, on_arrays, gradients)


def _on_chips(weights):
    return bool(crossbar.chips_in(weights))


def test_a_pattern_names_the_weights_in_arrays():
    for pattern in ("encoder.*", "pool.B.*"):
        frozen = _in_arrays(pattern)
        assert _on_chips(frozen.base) == (not pattern.startswith("pool"))
        assert _on_chips(frozen.pool.B) == (not pattern.startswith("encoder"))
    basis = _in_basis("ideal").pool
    assert _on_chips(basis.U) and _on_chips(basis.V) and not _on_chips(basis.S)
    part = _in_basis("ideal", "pool.V.*")
    assert not _on_chips((part.base, part.pool.U)) and _on_chips(part.pool.V)


def test_the_digital_weights_are_left_alone():
    assert _on_chips(_in_arrays(config=_NOISY).base) and not _on_chips(
        (_DIGITAL, _BASE)
    )
    for name, weight in matrices(tiny.t5()).items():
        assert_array_equal(matrices(nnx.merge(_GRAPH, _BASE))[name], weight)


def test_a_tied_head_stays_digital():
    config = replace(tiny.CONFIG, tied=True)
    graph, base = nnx.split(tiny.t5(config))
    placed = nnx.merge(
        graph, program_on_arrays(graph, lf.Frozen(base), _IDEAL, _KEY).base
    )
    assert "head" not in matrices(placed) and isinstance(
        placed.embedding.get_value(), jax.Array
    )
    with refused("the rule 'head' matches no weight"):
        program_on_arrays(graph, lf.Frozen(base), {"head": PRESETS["ideal"]}, _KEY)


def test_quantised_weights_are_programmed_as_they_are():
    pool = tiny.pool(3).quantised("int8")
    digital = lf.Frozen(_BASE, pool, _DIGITAL.gram)
    frozen = program_on_arrays(_GRAPH, digital, {"pool.*": PRESETS["ideal"]}, _KEY)
    for site, A in pool.A.items():
        _close(dense(frozen.pool.A[site], jnp.float32), dense(A, jnp.float32), 1e-6)


# Chips that are not ideal.


def test_norms_are_those_of_the_weights_as_programmed():
    frozen = _in_arrays(config=_NOISY)
    for site, kernel in lf.kernels(nnx.merge(_GRAPH, frozen.base)).items():
        if site in frozen.pool.A:
            W = np.asarray(dense(kernel, jnp.float32), np.float64)
            A = np.asarray(dense(frozen.pool.A[site], jnp.float32), np.float64)
            _close(frozen.gram.squared[site], np.sum(W**2, axis=1), 1e-5)
            _close(frozen.gram.cross[site], np.einsum("lnir,lio->lnro", A, W), 1e-4)
    # With magnitudes at those norms, every adapted column keeps its length.
    method = lf.Fusion(composition="sum")
    params = _params(method, frozen)
    adapters, _ = jax.jit(method.adapters)(params, frozen, _INDEX)
    model = lf.kernels(nnx.merge(_GRAPH, frozen.base))

    @jax.jit
    def columns(adapter, kernel):
        return jax.vmap(lambda a, k: a(jnp.eye(k.shape[-2]), k))(adapter, kernel)

    for site in ("encoder.self.q", "decoder.cross.v"):
        norms = jnp.linalg.norm(columns(adapters[site], model[site]), axis=1)
        _close(norms, params["magnitudes"][site], 1e-3)


def test_ideal_norms_of_weights_prepared_for_an_accelerator_are_those_of_a_cpu():
    with tiny.for_tpu():
        digital = lf.Fusion().precompute(
            lf.Frozen(_BASE, _DIGITAL.pool), lf.kernels(nnx.merge(_GRAPH, _BASE))
        )
    assert isinstance(digital.gram, PairTerms)
    rules = {"pool.*.encoder.self.v": _NOISY}
    got = program_on_arrays(_GRAPH, digital, rules, _KEY, norm="ideal")
    wanted = program_on_arrays(_GRAPH, _DIGITAL, rules, _KEY, norm="ideal")
    assert isinstance(got.gram, lf.Gram) and got.gram.modules is digital.pool
    jax.tree.map(assert_array_equal, jax.tree.leaves(got), jax.tree.leaves(wanted))
    training = redrawn(got, digital, rules, _KEY, steps="every", norm="ideal")
    assert isinstance(training.digital.gram, lf.Gram)


def test_layers_that_a_module_does_not_adapt_add_no_noise():
    digital = tiny.frozen(tiny.t5(), tiny.pool(3, _somewhere))
    frozen = program_on_arrays(_GRAPH, digital, {"pool.*": _NOISY}, _KEY)
    index = jnp.array([0])
    method = lf.Fusion(magnitudes=False)
    params = {"coefficients": jnp.full((1, 5), 2.0)}
    adapters, _ = jax.jit(method.adapters)(params, frozen, index)
    x = jnp.ones((1, 16))
    none = adapters["decoder.self.q"]
    zero = jnp.zeros((2, 16, 12))
    y = jax.vmap(lambda a, k: a(x, k))(none, zero)
    assert_array_equal(y, jnp.zeros_like(y))
    # Rank 3 of 4: the fourth column and row are not there.
    some = adapters["encoder.self.q"]
    A = np.asarray(dense(frozen.pool.A["encoder.self.q"], jnp.float32))[:, 0]
    B = np.asarray(dense(frozen.pool.B["encoder.self.q"], jnp.float32))[:, 0]
    y = jax.vmap(lambda a, k: a(x, k))(some, jnp.zeros((3, 16, 12)))
    _close(
        y[:, 0],
        2 * np.einsum("li,lir,lro->lo", np.ones((3, 16)), A[:, :, :3], B[:, :3]),
        1e-4,
    )


# Read noise.


def test_every_seed_reads_with_separate_noise():
    method = lf.Fusion()
    problem = tiny.problem(method, _in_arrays(_WRITTEN, _READ_NOISE), [[2, 0], [2, 0]])
    params, batch = jax.tree.map(
        lambda leaf: jnp.stack([leaf] * 2), (_params(method), tiny.batch())
    )
    losses = seed_entropies(params, batch, problem)
    assert losses[0] != losses[1]
    assert_array_equal(seed_entropies(params, batch, problem), losses)


@pytest.mark.long
def test_every_evaluation_of_a_search_and_every_batch_reads_with_separate_noise():
    frozen = _in_arrays(_WRITTEN, _READ_NOISE)
    batch = jax.tree.map(lambda leaf: leaf[None], tiny.batch())
    rows = SimpleNamespace(once=lambda size: iter([batch, batch]))
    problem = tiny.problem(LORAHUB, frozen, [[2, 0]])
    job = SearchJob(
        problem,
        rows,
        SimpleNamespace(batch_size=3),
        (1,),
        (("c", "a"),),
        lambda rows: None,
    )
    objective = objective_of(job)
    weights = np.full((1, 2), 0.5)
    scores = [objective(number, weights).item() for number in (1, 2, 1)]
    assert scores[0] == scores[2] != scores[1]
    one = objective_of(
        job._replace(rows=SimpleNamespace(once=lambda size: iter([batch])))
    )(1, weights)
    assert (
        one.item() != scores[0]
    )  # the mean over batches with the same noise would be that of one


@pytest.mark.long
def test_every_training_step_reads_anew_and_the_same_seed_the_same():
    frozen = _in_arrays(_WRITTEN, _READ_NOISE)
    problem = tiny.problem(lf.Fusion(), frozen, _INDEX)
    rates = {"coefficients": jnp.float32(0), "magnitudes": jnp.float32(0)}
    step = jax.jit(
        functools.partial(lf.fusion_step, optimisation=lf.Optimisation(steps=9))
    )

    def losses(steps):
        state = lf.init_state(problem, jax.random.key(0))
        found = []
        for _ in range(steps):
            state, metrics = step(state, tiny.batch(), problem, rates)
            found.append(float(metrics["loss"]))
        return found

    three = losses(3)
    assert len(set(three)) == 3 and losses(3) == three


@pytest.mark.long
def test_every_token_is_decoded_with_separate_noise():
    """A model that copies noise into its cache: two equal tokens in a row, and different keys behind them."""
    frozen = _in_arrays("decoder.*", _READ_NOISE)
    batch = tiny.batch()

    @jax.jit
    def tokens(frozen):
        return lf.generate(
            nnx.merge(_GRAPH, frozen.base),
            batch.input_ids,
            batch.input_mask,
            max_new_tokens=4,
        )

    assert_array_equal(tokens(frozen), tokens(frozen))
    drawn = []

    class Recording:
        """An adapter that adds what the kernel's read adds to its ideal product."""

        def __call__(self, x, kernel):
            y = crossbar.matmul(x, kernel)
            jax.debug.callback(
                lambda noise: drawn.append(np.asarray(noise)),
                y - x @ crossbar.programmed_weights(kernel),
            )
            return y

    jax.tree_util.register_pytree_node(
        Recording, lambda r: ((), None), lambda aux, children: Recording()
    )

    @jax.jit
    def recorded(frozen):
        model = nnx.merge(_GRAPH, frozen.base)
        return lf.generate(
            model,
            batch.input_ids,
            batch.input_mask,
            {"decoder.self.o": Recording()},
            max_new_tokens=3,
        )

    jax.block_until_ready(recorded(frozen))
    jax.effects_barrier()
    assert len(drawn) == 3 * 2  # tokens x layers
    assert all(np.abs(noise).max() > 0 for noise in drawn)
    assert len({noise.tobytes() for noise in drawn}) == len(drawn)


# Reports.


@pytest.mark.long
def test_errors_by_site_layer_and_module():
    config = replace(PRESETS["ideal"], dac=crossbar.DAC(bits=6))
    frozen = program_on_arrays(
        _GRAPH, _DIGITAL, {"pool.A.encoder.*": config, "encoder.self.q": config}, _KEY
    )
    method = lf.Fusion()
    inputs = (_params(method), _INDEX, tiny.batch())
    rows = site_errors(frozen, observe(logits_of(_GRAPH, method), frozen, [inputs]))
    found = {(row["site"], row["layer"], row["module"]): row["sqnr"] for row in rows}
    layers = range(3)
    pool = itertools.product("qv", layers, (0, 2))
    assert found.keys() == {
        *(("encoder.self.q", layer, None) for layer in layers),
        *(
            (f"pool.A.encoder.self.{name}", layer, module)
            for name, layer, module in pool
        ),
    }
    # 6 bits, sign included: a uniform error of 1 / 31 of the largest input.
    assert all(20 < sqnr < 45 for sqnr in found.values())
