"""Batches of mixed tasks: each row as its task alone would compute it, and no program is compiled for new tasks."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama
import tiny
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from refusals import refused

import lorafusion_jax as lf
from lorafusion_jax import crossbar
from lorafusion_jax.adapters.coefficients import GRANULARITIES, shape
from lorafusion_jax.adapters.norms import PairTerms
from lorafusion_jax.adapters.updates import Outputs
from lorafusion_jax.hardware import program_on_arrays
from lorafusion_jax.methods import Magnitudes
from lorafusion_jax.models import matrices, set_matrices
from lorafusion_jax.models.registry import family_of_json
from lorafusion_jax.serving.rows import RowModules
from lorafusion_jax.training import log_likelihood
from lorafusion_jax.training.loss import batch_logits

_GRAPH, _BASE = nnx.split(tiny.t5())
_KERNELS = lf.kernels(tiny.t5())
# Module 0 has nothing in the decoder.
_POOL = tiny.pool(4, lambda n, site, layer: 0 if n == 0 and "decoder" in site else 4)
_MODULES = [2, 0, 3]
_NEW = 6
_KEY = jax.random.key(5)


_PLAIN = lf.TaskBank.empty(_GRAPH, lf.Frozen(_BASE), 1)


def _params(method, number, modules=_MODULES, pool=_POOL):
    """Numbers that depend on the task's number; magnitudes of 0.7 to 1.3 of ||W||."""
    params = {}
    if isinstance(method, lf.Fusion):
        params["coefficients"] = tiny.coefficients(
            shape(pool, len(modules), method.granularity), seed=number
        )
    if isinstance(method, Magnitudes) or method.magnitudes:
        rng = np.random.default_rng(number)
        params["magnitudes"] = {}
        for site in [site for site in _KERNELS if site in pool.rank]:
            norm = np.linalg.norm(_KERNELS[site], axis=1)
            drawn = rng.uniform(0.7, 1.3, norm.shape) * norm
            params["magnitudes"][site] = jnp.asarray(drawn, jnp.float32)
    return params


_BLOCK = lf.Fusion(magnitudes=False, granularity="block")
_SITE = lf.Fusion(magnitudes=False, granularity="site")
_RANKS = lf.Fusion(magnitudes=False, granularity="rank")
_METHODS = [
    lf.Fusion(composition=composition, granularity=granularity, magnitudes=magnitudes)
    for composition, granularity, magnitudes in itertools.product(
        ("sum", "mix"), GRANULARITIES, (False, True)
    )
]
_TASKS = [
    *((method, _params(method, number)) for number, method in enumerate(_METHODS))
]
_TASKS.append((Magnitudes(), _params(Magnitudes(), len(_TASKS))))


def _filled(frozen, tasks=_TASKS, **changes):
    values = {"granularity": "rank", "scaled": tuple(_POOL.A)} | changes
    bank = lf.TaskBank.empty(_GRAPH, frozen, len(tasks) + 1, **values)
    for number, (method, params) in enumerate(tasks):
        bank = bank.with_task(
            number, method, params, _MODULES if isinstance(method, lf.Fusion) else ()
        )
    return bank


@pytest.fixture(scope="module")
def bank():
    return _filled(lf.Frozen(_BASE, _POOL))


def _merged(method, params):
    """The base with a task's update and magnitudes in its kernels, by the definition, in float64."""
    model = tiny.t5()
    weights = {s: np.array(k, np.float64) for s, k in matrices(model).items()}
    if isinstance(method, lf.Fusion):
        c = tiny.coefficient_of(params["coefficients"], _POOL, method.granularity)
        updates = tiny.updates(_POOL, _MODULES, c, method.composition)
        for (site, layer), update in updates.items():
            weights[site][layer] += update
    for site, m in params.get("magnitudes", {}).items():
        weights[site] *= (m / np.linalg.norm(weights[site], axis=1))[:, None]
    set_matrices(
        model, {site: jnp.asarray(w, jnp.float32) for site, w in weights.items()}
    )
    return lf.TaskBank.empty(_GRAPH, lf.Frozen(nnx.split(model)[1]), 1)


_FUSED = lf.Fusion()


def _prepared(method=_FUSED, pool=_POOL):
    """The base and a pool as a run of a method has them."""
    return method.precompute(lf.Frozen(_BASE, pool), _KERNELS)


def _alone(params, batch, method, frozen, modules=_MODULES):
    """The logits of a task as a run computes them."""
    problem = tiny.problem(method, frozen, modules)
    return np.asarray(jax.jit(batch_logits)(params, batch, problem)[0])


def _close(got, wanted, tolerance=1e-5):
    assert_allclose(
        np.asarray(got), wanted, rtol=0, atol=tolerance * np.abs(wanted).max()
    )


def _rows(count):
    """A batch, of which the last row only fills it up."""
    batch = tiny.batch(rows=count, target=_NEW)
    return batch._replace(row_mask=jnp.arange(count) < count - 1)


def _numbers(*numbers):
    return jnp.array(numbers, jnp.int32)


_ORDER = np.random.default_rng(0).permutation(len(_TASKS))
_BATCH = _rows(len(_TASKS) + 3)
_MIXED = _numbers(
    *_ORDER, len(_TASKS), -1, -1
)  # then an empty place, the plain base, and the row that fills up
_ALONE = jnp.full(len(_MIXED), -1, jnp.int32)


@pytest.fixture(scope="module")
def alone():
    """Logits and ids of every row of the batch by its own task, from merged weights."""
    by_task = [_merged(*task) for task in _TASKS]
    banks = [*(by_task[i] for i in _ORDER), _PLAIN, _PLAIN, _PLAIN]
    logits = [bank.logits(_BATCH, _ALONE)[row] for row, bank in enumerate(banks)]
    ids = [
        bank.generate(_BATCH, _ALONE, max_new_tokens=_NEW)[row]
        for row, bank in enumerate(banks)
    ]
    return np.stack(logits), np.stack(ids)


def test_each_row_has_the_logits_of_its_task(bank, alone):
    """Every granularity, mix and sum, with magnitudes and without, magnitudes alone, and the plain base."""
    wanted, _ = alone
    got = np.asarray(bank.logits(_BATCH, _MIXED))
    _close(got, wanted)
    plain = np.asarray(_PLAIN.logits(_BATCH, _ALONE))
    assert_array_equal(got[-3:], plain[-3:])
    # The tasks differ from the base.
    assert (
        np.abs(wanted - plain)[: len(_TASKS)].max(axis=(1, 2))
        > 0.02 * np.abs(wanted).max()
    ).all()
    likelihoods = log_likelihood(bank.logits(_BATCH, _MIXED), _BATCH.labels)
    assert_allclose(bank.log_likelihoods(_BATCH, _MIXED), likelihoods, rtol=1e-5)
    # A row does not depend on the tasks of the others.
    one_task = bank.logits(_BATCH, jnp.full(len(_MIXED), 3, jnp.int32))
    assert_array_equal(one_task[5], bank.logits(_BATCH, _MIXED.at[5].set(3))[5])


def test_each_row_has_the_tokens_of_its_task(bank, alone):
    _, ids = alone
    got = np.asarray(bank.generate(_BATCH, _MIXED, max_new_tokens=_NEW))
    # Until two tokens are about as likely, after which rounding decides.
    ranked = np.sort(
        bank.logits(_BATCH._replace(labels=jnp.asarray(ids)), _MIXED), axis=-1
    )
    clear = np.cumprod(ranked[..., -1] - ranked[..., -2] > 1e-3, axis=1).astype(bool)
    assert_array_equal(got[clear], ids[clear])
    assert clear.mean() > 0.9
    assert len({tuple(row) for row in ids.tolist()}) > len(_TASKS) / 2
    assert (got[-1] == tiny.CONFIG.pad_id).all()
    plain = _PLAIN.generate(
        jax.tree.map(lambda a: a[-2:-1], _BATCH), _numbers(-1), max_new_tokens=_NEW
    )
    assert_array_equal(got[-2], plain[0])


@pytest.mark.long
def test_rows_of_a_qwen_3_5_are_those_of_their_tasks_alone():
    """On delta nets and attention. The plain base has its bits."""
    raw = (
        small_llama.CONFIG
        | small_llama.QWEN3_5
        | {"vocab_size": 40, "num_hidden_layers": 2}
    )
    raw["layer_types"] = ["linear_attention", "full_attention"]
    config = family_of_json(raw).read_config(raw)
    graph, base = nnx.split(family_of_json(raw).model(config, rngs=nnx.Rngs(0)))
    names = {site.rpartition(".")[2] for site in config.sites}
    pool = tiny.pool(3, names=names, config=config)
    method = lf.Fusion(magnitudes=False)
    frozen = method.precompute(
        lf.Frozen(base, pool), lf.kernels(nnx.merge(graph, base))
    )
    bank = lf.TaskBank.empty(graph, frozen, 2)
    problem = lf.Problem(graph=graph, method=method, frozen=frozen, index=jnp.arange(3))
    tasks = [_params(method, number, range(3), pool) for number in range(2)]
    for number, params in enumerate(tasks):
        bank = bank.with_task(number, method, params, pool.names)
    batch = tiny.batch(config, rows=4, target=_NEW)
    numbers = _numbers(1, -1, 0, -1)
    none = _numbers(-1, -1, -1, -1)
    plain = lf.TaskBank.empty(graph, lf.Frozen(base), 1)
    got = np.asarray(bank.logits(batch, numbers))
    of_base = np.asarray(plain.logits(batch, none))
    assert_array_equal(got[1::2], of_base[1::2])
    for row in (0, 2):
        wanted = jax.jit(batch_logits)(tasks[numbers[row]], batch, problem)[0][row]
        _close(got[row], np.asarray(wanted))
        assert np.abs(got[row] - of_base[row]).max() > 0.02 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("rank", "same"),
    [
        (2, assert_array_equal),
        # The run multiplies by the sum as a matrix, because its norms need it.
        (4, functools.partial(_close, tolerance=1e-6)),
    ],
)
def test_a_sum_of_the_banks_own_modules_has_the_bits_of_the_run_alone(rank, same):
    """Or it is equal up to rounding, where the run computes in another form."""
    method = lf.Fusion()
    pool = tiny.pool(3, lambda n, site, layer: rank)
    params = _params(method, 1, range(3), pool)
    bank = lf.TaskBank.empty(_GRAPH, lf.Frozen(_BASE, pool), 2, scaled=tuple(pool.A))
    bank = bank.with_task(1, method, params, pool.names)
    batch = tiny.batch()
    wanted = _alone(params, batch, method, _prepared(method, pool), range(3))
    got = bank.logits(batch, _numbers(1, -1, 1))
    same(got[0], wanted[0])
    same(got[2], wanted[2])


def test_modules_that_no_row_uses_are_left_out():
    """Oracle: the bank with all four modules, which takes more operations."""
    bank = lf.TaskBank.empty(_GRAPH, lf.Frozen(_BASE, _POOL), 2)
    for number, modules in enumerate(([2], [1, 3])):
        bank = bank.with_task(number, _BLOCK, _params(_BLOCK, number, modules), modules)
    few = bank.with_modules_of(np.array([0, -1]))
    numbers = _numbers(0, -1, 0)
    assert (
        len(few.frozen.pool) == 1
        and len(bank.with_modules_of(np.array([1])).frozen.pool) == 2
    )
    assert bank.with_modules_of(np.array([0, 1])) is bank

    def run(bank):
        program, leaves = tiny.compiled(lf.TaskBank.logits, bank, _rows(3), numbers)
        return program(leaves), program.cost_analysis()["flops"]

    got, fewer = run(few)
    wanted, more = run(bank)
    _close(got, np.asarray(wanted))
    assert fewer < more


@pytest.mark.parametrize("arrays", [False, pytest.param(True, marks=pytest.mark.long)])
def test_tasks_in_a_shared_basis_have_the_logits_of_the_run_alone(arrays):
    """With magnitudes and without, and next to the plain base."""
    basis = lf.shared_basis(_POOL, 5)
    methods = [lf.Fusion(), _SITE, lf.Fusion(magnitudes=False)]
    tasks = [
        (method, _params(method, number, pool=basis))
        for number, method in enumerate(methods)
    ]
    weights = _prepared(pool=basis)
    batch = _rows(5)
    if arrays:
        ideal = {"pool.*": crossbar.PRESETS["ideal"]}
        weights = program_on_arrays(_GRAPH, weights, ideal, _KEY)
    bank = _filled(weights, tasks, granularity="site")
    got = np.asarray(bank.logits(batch, _numbers(2, 0, 1, -1, -1)))
    for row, (method, params) in ((0, tasks[2]), (1, tasks[0]), (2, tasks[1])):
        _close(got[row], _alone(params, batch, method, weights)[row])
    plain = np.asarray(_PLAIN.logits(batch, _numbers(-1, -1, -1, -1, -1)))
    assert_array_equal(got[3], plain[3])


def _at(pool, modules, last_names):
    """Some modules as they are read without the others: without sites and padding that only the others have."""
    few = pool.select(modules)
    sites = {
        site: int(np.max(few.rank[site]))
        for site in pool.sites
        if site.rpartition(".")[2] in last_names
    }
    return replace(
        few,
        A={site: few.A[site][..., :r] for site, r in sites.items()},
        B={site: few.B[site][:, :, :r] for site, r in sites.items()},
        rank={site: few.rank[site] for site in sites},
        sites=tuple(sites),
    )


_SHORT = [("block", True, True), ("rank", False, False)]


@pytest.mark.parametrize(
    ("composition", "granularity", "magnitudes", "ranked"),
    [
        pytest.param("sum", *layout, marks=() if layout in _SHORT else pytest.mark.long)
        for layout in itertools.product(GRANULARITIES, (True, False), (True, False))
    ]
    + [("mix", "block", False, False)],
)
def test_a_task_may_have_other_sites_and_ranks_than_the_bank(
    composition, granularity, magnitudes, ranked
):
    """Modules 0 and 1 have no k, and lower ranks than module 2; a run that ranks all has numbers for all sites."""
    second = 4 if composition == "mix" else 3
    ranks = {"q": (4, second, 6), "v": (4, second, 6), "k": (0, 0, 5)}
    pool = tiny.pool(3, lambda n, site, layer: ranks[site[-1]][n], names="qvk")
    method = lf.Fusion(
        composition=composition, granularity=granularity, magnitudes=magnitudes
    )
    own = _at(pool, [0, 1], "qv")
    of_run, of_bank = (pool, own) if ranked else (own, pool)
    params = _params(method, 0, (0, 1), of_run)
    batch = _rows(3)
    wanted = _alone(params, batch, method, _prepared(method, of_run), (0, 1))
    bank = lf.TaskBank.empty(
        _GRAPH, lf.Frozen(_BASE, of_bank), 2, granularity="rank", scaled=tuple(pool.A)
    )
    bank = bank.with_task(
        0, method, params, own.names, sites=None if magnitudes else of_run.sites
    )
    _close(bank.logits(batch, _numbers(0, -1, 0))[::2], wanted[::2])


_FEW_METHODS = [
    lf.Fusion(magnitudes=True),
    lf.Fusion(composition="mix", granularity="site", magnitudes=False),
]
_FEW = [(method, _params(method, number)) for number, method in enumerate(_FEW_METHODS)]


@pytest.mark.long
def test_base_and_pool_in_4_bits():
    model = tiny.t5()
    quantised = {
        site: lf.quantise(kernel, "nf4", tiled_axis=-2)
        for site, kernel in matrices(model).items()
    }
    set_matrices(model, quantised)
    frozen = lf.Frozen(nnx.split(model)[1], _POOL.quantised("nf4"))
    frozen = _FUSED.precompute(frozen, lf.kernels(model))
    bank = _filled(frozen, _FEW, granularity="site")
    batch = _rows(4)
    got = np.asarray(bank.logits(batch, _numbers(1, 0, -1, -1)))
    for row, (method, params) in enumerate(_FEW[::-1]):
        _close(got[row], _alone(params, batch, method, frozen)[row])
    plain = lf.TaskBank.empty(_GRAPH, lf.Frozen(frozen.base), 1)
    base = np.asarray(plain.logits(batch, _numbers(-1, -1, -1, -1)))
    _close(got[2], base[2])


def test_a_bank_of_weights_prepared_for_a_sum_on_an_accelerator_holds_mixes_too():
    with tiny.for_tpu():
        frozen = _prepared()
    assert isinstance(frozen.gram, PairTerms)
    tasks = [
        task
        for task in _TASKS
        if task[0] in (lf.Fusion(), lf.Fusion(composition="mix"))
    ]
    assert len(tasks) == 2
    got = _filled(frozen, tasks).tasks.scales
    wanted = _filled(lf.Frozen(_BASE, _POOL), tasks).tasks.scales
    jax.tree.map(assert_array_equal, got, wanted)


_NOISY = replace(
    crossbar.PRESETS["ideal"],
    device=crossbar.Device(programming=crossbar.Independent(0.02)),
)


@pytest.mark.parametrize(
    "number",
    [pytest.param(0, marks=pytest.mark.long), 1],
    ids=["sum, magnitudes", "mix"],
)
def test_modules_on_a_chip_are_read_one_by_one_as_by_a_run_alone(number):
    """Cells err; the run alone is what `compose` makes of modules in arrays."""
    noisy = {"encoder.self.v": _NOISY, "pool.*.self.v": _NOISY}
    frozen = program_on_arrays(_GRAPH, _prepared(), noisy, _KEY, norm="ideal")
    method, params = _FEW[number]
    bank = _filled(frozen, _FEW, granularity="site")
    batch = _rows(3)
    wanted = _alone(params, batch, method, frozen)
    got = np.asarray(bank.logits(batch, _numbers(number, -1, -1)))
    _close(got[0], wanted[0])
    assert np.abs(got[1] - wanted[1]).max() > 0.01


@pytest.mark.long
def test_a_module_that_a_row_does_not_mix_adds_no_offset_of_its_converters():
    adc = crossbar.ADC(bits=12, offset_error=0.05)
    config = crossbar.CrossbarConfig(dac=crossbar.DAC(scaling="calibrated"), adc=adc)
    rng = np.random.default_rng(0)
    pool = {
        name: jnp.asarray(rng.normal(size=s), jnp.float32)
        for name, s in {"A": (2, 8, 3), "B": (2, 3, 5)}.items()
    }
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    kernel = jnp.zeros((8, 5))

    def run(pool, x):
        both = Outputs(pool["A"], pool["B"], jnp.arange(2), jnp.ones((2, 3)), "sum")
        return both(x, kernel)

    chip = crossbar.calibrate_tree(
        run, crossbar.program_tree(pool, {"*": config}, jax.random.key(0)), [x]
    )
    c = jnp.array([[1.0, 0.0], [0.0, 0.0], [0.7, 2.0], [0.0, 3.0]])
    rows = RowModules(
        chip["A"], chip["B"], c[:, :, None], jnp.zeros(4, bool), one_by_one=True
    )
    got = jax.jit(lambda rows, x: rows(x))(rows, x)

    @jax.jit
    def of_first(chip, c):
        return Outputs(chip["A"], chip["B"], jnp.arange(1), jnp.full((1, 3), c), "sum")(
            x, kernel
        )

    assert_allclose(got[0], of_first(chip, 1.0)[0], rtol=1e-5)
    assert_array_equal(got[1], jnp.zeros(5))
    assert np.abs(of_first(chip, 0.0)).min() > 0  # what the converters make of zeros


_MIX = lf.Fusion(composition="mix", magnitudes=False)
_PARAMS = _params(_BLOCK, 0)


def test_tasks_and_banks_that_do_not_fit_are_refused():
    weights = lf.Frozen(_BASE, _POOL)
    fused = lf.Fusion()
    of_fused = _params(fused, 0)
    three_ranks = {"coefficients": _params(_RANKS, 0)["coefficients"][:, :, :3]}
    numbers = "the fusion has no numbers for decoder.cross.q, .*which modules adapt"
    for arguments, message in (
        (
            (2, _BLOCK, _PARAMS, _MODULES),
            "no task 2 in a bank of capacity 2: give 0 to 1",
        ),
        ((-1, _BLOCK, _PARAMS, _MODULES), "no task -1 in a bank"),
        ((0, lf.LoRA(sites=(), rank=4), {}, ()), "not LoRA"),
        (
            (0, _SITE, _params(_SITE, 0), _MODULES),
            "granularity site do not fit into .* block.*granularity='site'",
        ),
        (
            (0, fused, of_fused, _MODULES),
            "magnitudes at decoder.cross.q.*the bank rescales no site",
        ),
        (
            (0, _BLOCK, _PARAMS, _MODULES[:2]),
            r"expected coefficients of shape \(2, 5\), of one seed, got \(3, 5\)",
        ),
        (
            (0, _BLOCK, _PARAMS, ["module_9", "module_1", "module_0"]),
            "the pool lacks 'module_9'",
        ),
        ((0, fused, of_fused | {"magnitudes": {}}, _MODULES), numbers),
    ):
        with refused(message):
            lf.TaskBank.empty(_GRAPH, weights, 2).with_task(*arguments)
    with refused("the bank has no pool"):
        _PLAIN.with_task(0, _BLOCK, _PARAMS, _MODULES)
    with refused("capacity is 0"):
        lf.TaskBank.empty(_GRAPH, weights, 0)
    with refused("coefficients for 3 ranks of modules of rank 4: give one"):
        _filled(weights, [(_RANKS, three_ranks)])
    uneven = tiny.pool(2, lambda n, site, layer: 3 + n)
    with refused("different ranks"):
        lf.TaskBank.empty(_GRAPH, lf.Frozen(_BASE, uneven), 1).with_task(
            0, _MIX, _PARAMS, uneven.names
        )
