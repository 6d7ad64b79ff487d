"""What PyTorch and PEFT computed once, in float32: logits, losses, gradients, trajectories, texts.

Tolerances are those that come with the goldens: logits 1e-4, losses 1e-5, gradients 1e-5 + 1e-4 relative,
trajectories of 20 steps 1e-4.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorafusion_jax.adapters.norms import gram
from lorafusion_jax.io.export import merged_base
from lorafusion_jax.io.hf import base_tensor, load_base
from lorafusion_jax.io.pool import read_pool
from lorafusion_jax.methods.fusion import PRESETS, Fusion
from lorafusion_jax.methods.untrained import ZeroShot
from lorafusion_jax.models.architecture import kernels, places
from lorafusion_jax.models.generate import generate
from lorafusion_jax.models.t5.model import decoder_inputs
from lorafusion_jax.tasks import Batch
from lorafusion_jax.training.frozen import Frozen
from lorafusion_jax.training.loss import cross_entropy
from lorafusion_jax.training.method import Method
from lorafusion_jax.training.problem import Problem
from lorafusion_jax.training.recipe import Rates
from lorafusion_jax.training.step import fusion_step, init_state

_KINDS = ("t5a", "t5b")
_LORAS = ("lora_0", "lora_1", "lora_2", "lora_3")
_SINGLES = ("lora_0", "lora_0_bin", "rank_alpha_pattern", "rslora", "dora")
_POOLS = [
    ("t5a", "pool_factors_dora"),
    ("t5a", "pool_factors_lora"),
    ("t5a", "pool_products_dora"),
    ("t5a", "single_dora_fused"),
    ("t5b", "pool_factors_dora"),
    ("t5b", "pool_products_lora"),
]
# One of each composition and of each model, with magnitudes and without.
_SHORT = [pytest.param(*_POOLS[0], marks=pytest.mark.smoke), _POOLS[5]]
_CASES = [*_SHORT, *(pytest.param(*pool, marks=pytest.mark.long) for pool in _POOLS[1:5])]


class _Case(NamedTuple):
    """A fusion, a model to put it on, and what the goldens say about it."""

    graph: nnx.GraphDef
    method: Method
    frozen: Frozen
    index: jax.Array
    params: dict
    batches: tuple[Batch, Batch]
    golden: dict[str, np.ndarray]
    rows: list[tuple[str, int]]  # site and layer of every row of the golden's magnitudes
    positions: np.ndarray  # those of the golden's logits

    def adapters(self, params=None):
        return jax.jit(self.method.adapters)(params or self.params, self.frozen, self.index)[0]

    def say(self, batch=0, params=None):
        """Logits of a batch by teacher forcing, and greedily generated tokens."""
        logits, tokens = _say(self.graph, self.frozen.base, self.adapters(params), self.batches[batch])
        real = self.batches[batch].row_mask
        return logits[real], np.asarray(tokens[real])

    def check_logits(self, logits, name, tolerance=1e-4):
        """Compare the positions that the golden has."""
        _close(logits[:, self.positions], self.golden[name], tolerance)

    def step(self, state, batch, *, l1, l2):
        recipe = PRESETS["reference"]
        rates = Rates(
            {
                "coefficients": jnp.float32(recipe.lr_coefficients),
                "magnitudes": jnp.float32(recipe.lr_magnitudes),
            },
            l2=jnp.float32(l2),
            l1=jnp.float32(l1),
        )
        return _step(state, self.batches[batch], self.problem(), rates, optimisation=recipe.optimisation(20))

    def start(self):
        return init_state(self.problem(), jax.random.key(0), self.params)

    def problem(self):
        return Problem(graph=self.graph, method=self.method, frozen=self.frozen, index=self.index)

    def by_row(self, magnitudes):
        return np.stack([magnitudes[site][layer] for site, layer in self.rows])

    def by_site(self, rows):
        found = {site: [] for site, _ in self.rows}
        for (site, _), row in zip(self.rows, rows, strict=True):
            found[site].append(row)
        return {site: jnp.asarray(np.stack(layers)) for site, layers in found.items()}


@pytest.fixture(scope="module")
def case(goldens):
    goldens = goldens / "fusion"

    @functools.cache
    def base(kind):
        arrays = dict(np.load(goldens / kind / "inputs.npz"))
        return load_base(goldens / kind / "base"), arrays, (_batch(arrays, 0), _batch(arrays, 1))

    @functools.cache
    def make(kind, file="inputs"):
        model, arrays, batches = base(kind)
        graph, weights = nnx.split(model)
        positions = arrays["positions"]
        if file == "inputs":
            return _Case(graph, ZeroShot(), Frozen(weights), jnp.arange(0), {}, batches, arrays, [], positions)
        golden = dict(np.load(goldens / kind / f"{file}.npz"))
        names = _LORAS if file.startswith("pool") else [file.removeprefix("single_").removesuffix("_fused")]
        sources = [str(goldens / kind / "adapters" / name) for name in names]
        pool = read_pool(sources, model.config, base_tensor=base_tensor(goldens / kind / "base"))
        frozen = Frozen(weights, pool, gram(pool, {site: kernels(model)[site] for site in pool.A}))
        # Only the sum takes several ranks.
        composition = "sum" if "products" in file or "pattern" in file else "mix"
        method = Fusion(composition=composition, start="uniform", magnitudes="dora" in file)
        index = jnp.arange(len(pool))
        params = method.init(frozen, index, jax.random.key(0))
        if "traj_coeff" in golden:
            params["coefficients"] = jnp.asarray(golden["traj_coeff"][0])
        rows = [places(model.config)[path] for path in golden.get("modules", ())]
        return _Case(graph, method, frozen, index, params, batches, golden, rows, positions)

    return make


def _batch(arrays, k):
    """Both batches have four rows, so that they share programs: the second one is filled up."""
    ids, mask, labels = (arrays[f"{name}_{k}"] for name in ("input_ids", "attention_mask", "labels"))
    filling = ((0, 4 - len(ids)), (0, 0))
    return Batch(
        input_ids=jnp.asarray(np.pad(ids, filling), jnp.int32),
        input_mask=jnp.asarray(np.pad(mask > 0, filling)),
        labels=jnp.asarray(np.pad(labels, filling, constant_values=-100), jnp.int32),
        row_mask=jnp.arange(4) < len(ids),
    )


# Adapters are arguments: fusions that differ in their pools' names alone share this program.
@functools.partial(jax.jit, static_argnums=0)
def _say(graph, base, adapters, batch):
    model = nnx.merge(graph, base)
    start = decoder_inputs(batch.labels, start_id=model.start_id, pad_id=model.config.pad_id)
    logits = model(batch.input_ids, batch.input_mask, start, adapters)
    return logits, generate(model, batch.input_ids, batch.input_mask, adapters, max_new_tokens=16)


_step = jax.jit(fusion_step, static_argnames=("optimisation",))


def _close(got, wanted, tolerance, relative=0.0):
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=relative, atol=tolerance)


# The base model alone.


@pytest.mark.accelerator
@pytest.mark.parametrize("kind", [pytest.param("t5a", marks=pytest.mark.smoke), "t5b"])
def test_base_logits_and_loss(case, kind):
    base = case(kind)
    logits, _ = base.say()
    base.check_logits(logits, "base_logits_0")
    _close(cross_entropy(logits, base.batches[0].labels), base.golden["base_loss_mean_ce_0"], 1e-5)


@pytest.mark.accelerator
@pytest.mark.parametrize("kind", _KINDS)
def test_base_generates_the_same_tokens(case, kind):
    base = case(kind)
    np.testing.assert_array_equal(base.say()[1], base.golden["base_greedy_0"][:, 1:])


# One adapter.


@pytest.mark.accelerator
@pytest.mark.parametrize("name", [pytest.param("lora_0", marks=pytest.mark.smoke), *_SINGLES[1:]])
def test_single_adapter(case, name):
    single = case("t5a", f"single_{name}")
    golden, tolerance = single.golden, 2e-4 if name == "rslora" else 1e-4
    assert all(np.all(np.asarray(c) == 1) for c in jax.tree.leaves(single.params["coefficients"]))
    logits, tokens = single.say()
    single.check_logits(logits, "logits", tolerance)
    _close(cross_entropy(logits, single.batches[0].labels), golden["loss_mean_ce"], 1e-5)
    np.testing.assert_array_equal(tokens, golden["greedy"][:, 1:])
    single.check_logits(single.say(batch=1)[0], "logits_batch1", tolerance)


@pytest.mark.parametrize(
    "method",
    [
        Fusion(composition="sum", magnitudes=False),  # coefficients
        Fusion(composition="mix", start="xavier", magnitudes=False),  # the same, of the reference preset
        Fusion(granularity="global", magnitudes=False),  # mean and single
    ],
    ids=["coefficients", "mix", "single"],
)
def test_a_dora_adapter_keeps_its_magnitudes_where_none_are_trained(case, method):
    dora = case("t5a", "single_dora")
    params = method.init(dora.frozen, dora.index, jax.random.key(0))
    logits, tokens = dora._replace(method=method).say(params=params)
    dora.check_logits(logits, "logits")
    np.testing.assert_array_equal(tokens, dora.golden["greedy"][:, 1:])


@pytest.mark.parametrize("name", _SINGLES)
def test_merged_adapter(case, name):
    single = case("t5a", f"single_{name}")
    model = nnx.merge(single.graph, single.frozen.base)
    graph, merged = nnx.split(merged_base(model, single.adapters()))
    base = single._replace(graph=graph, method=ZeroShot(), frozen=Frozen(merged), params={})
    base.check_logits(base.say()[0], "logits_merged", 2e-4 if name == "rslora" else 1e-4)


# A pool, fused.


@pytest.mark.accelerator
@pytest.mark.parametrize(("kind", "file"), _CASES)
def test_fusion_at_the_start(case, kind, file):
    fusion = case(kind, file)
    golden = fusion.golden
    logits, tokens = fusion.say()
    fusion.check_logits(logits, "logits")
    _close(cross_entropy(logits, fusion.batches[0].labels), golden["loss_mean_ce"], 1e-5)
    np.testing.assert_array_equal(tokens, golden["greedy_init"][:, 1:])
    fusion.check_logits(fusion.say(batch=1)[0], "logits_batch1")
    if fusion.method.magnitudes:
        _close(fusion.by_row(fusion.params["magnitudes"]), golden["mag0"], 1e-5)


@pytest.mark.accelerator
@pytest.mark.parametrize(("kind", "file"), _CASES)
def test_loss_and_gradients(case, kind, file):
    fusion = case(kind, file)
    golden = fusion.golden
    # The goldens' gradients leave L1 and L2 out. After one step Adam's first moment is a tenth of the gradient.
    state, metrics = fusion.step(fusion.start(), 0, l1=0.0, l2=0.0)
    gradients = jax.tree.map(lambda moment: 10 * moment, state.adam.mu)
    _close(metrics["loss"], golden["loss"], 1e-5)
    _close(gradients["coefficients"], golden["grad_coeff"], 1e-5, 1e-4)
    assert ("magnitudes" in gradients) == ("grad_mag" in golden)
    if "magnitudes" in gradients:
        _close(fusion.by_row(gradients["magnitudes"]), golden["grad_mag"], 1e-5, 1e-4)


@pytest.mark.accelerator
@pytest.mark.parametrize(("kind", "file"), _CASES)
def test_twenty_steps_of_the_reference_protocol(case, kind, file):
    fusion = case(kind, file)
    golden, recipe = fusion.golden, PRESETS["reference"]
    state = fusion.start()
    for number in range(20):
        state, metrics = fusion.step(state, number % 2, l1=recipe.l1, l2=recipe.l2)
        _close(metrics["loss"], golden["traj_loss"][number], 1e-4)
        _close(metrics["l1"], golden["traj_l1"][number], 1e-4)
        _close(state.params["coefficients"], golden["traj_coeff"][number + 1], 1e-4)
        if fusion.method.magnitudes and number + 1 in golden["magnitude_steps"]:
            (row,) = np.flatnonzero(golden["magnitude_steps"] == number + 1)
            _close(fusion.by_row(state.params["magnitudes"]), golden["traj_mag"][row], 1e-4)
    logits, tokens = fusion.say(params=state.params)
    np.testing.assert_array_equal(tokens, golden["greedy_final"][:, 1:])
    # Numbers within 1e-4 of the golden's give logits further from its logits than the model's own error.
    fusion.check_logits(logits, "logits_final", 3e-4)


@pytest.mark.parametrize(("kind", "file"), _CASES)
def test_logits_at_the_end_of_the_goldens_trajectory(case, kind, file):
    fusion = case(kind, file)
    params = {"coefficients": jnp.asarray(fusion.golden["traj_coeff"][-1])}
    if fusion.method.magnitudes:
        params["magnitudes"] = fusion.by_site(fusion.golden["traj_mag"][-1])
    logits, tokens = fusion.say(params=params)
    fusion.check_logits(logits, "logits_final")
    np.testing.assert_array_equal(tokens, fusion.golden["greedy_final"][:, 1:])
