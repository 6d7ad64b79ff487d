"""What PyTorch and PEFT computed once, in float32: logits, losses, gradients, trajectories, texts.

Tolerances are those that come with the goldens: logits 1e-4, losses 1e-5, gradients 1e-5 + 1e-4 relative,
trajectories of 20 steps 1e-4.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorafusion_jax as lf
from lorafusion_jax.training import cross_entropy

_KINDS = ("t5a", "t5b", "llama")
_LORAS = ("lora_0", "lora_1", "lora_2", "lora_3")
_POOLS = [
    ("t5a", "pool_factors_dora"),
    ("t5a", "pool_factors_lora"),
    ("t5a", "pool_products_dora"),
    ("t5a", "single_dora_fused"),
    ("t5b", "pool_factors_dora"),
    ("t5b", "pool_products_lora"),
    ("llama", "pool_factors_lora"),
]
# One of each composition and of each model, with magnitudes and without.
_SHORT = [pytest.param(*_POOLS[0], marks=pytest.mark.smoke), *_POOLS[5:]]
_CASES = [
    *_SHORT,
    *(pytest.param(*pool, marks=pytest.mark.long) for pool in _POOLS[1:5]),
]


class _Case(NamedTuple):
    """A fusion, a model to put it on, and the goldens' numbers."""

    graph: nnx.GraphDef
    method: lf.Method
    frozen: lf.Frozen
    index: jax.Array
    params: dict
    batches: tuple[lf.Batch, lf.Batch]
    inputs: dict[str, np.ndarray]
    golden: dict[str, np.ndarray]
    rows: list[
        tuple[str, int]
    ]  # site and layer of every row of the golden's magnitudes

    def adapters(self, params=None):
        return jax.jit(self.method.adapters)(
            params or self.params, self.frozen, self.index
        )[0]

    def check(
        self, logits, *, loss=None, greedy=None, k=0, params=None, tolerance=1e-4
    ):
        """Compare a batch's logits at the golden's positions, its mean loss, and greedily generated tokens."""
        batch = self.batches[k]
        whole = _rows_of_four(self.inputs, k)
        found, of_labels, tokens = _say(
            self.graph, self.frozen.base, self.adapters(params), batch, whole
        )
        rows = np.flatnonzero(batch.row_mask)
        positions = self.inputs["positions"]
        real = np.ones((len(rows), len(positions)), bool)
        if _is_causal(self.inputs):
            real = self.inputs[f"attention_mask_{k}"][:, positions] > 0
        _close(found[rows][:, positions][real], self.golden[logits][real], tolerance)
        if loss is not None:
            _close(
                cross_entropy(of_labels[rows], batch.labels[rows]),
                self.golden[loss],
                1e-5,
            )
        if greedy is not None:
            prompt = batch.input_ids.shape[1] if _is_causal(self.inputs) else 1
            np.testing.assert_array_equal(tokens[rows], self.golden[greedy][:, prompt:])

    def step(self, state, batch, *, l1=0.0, l2=0.0):
        recipe = lf.PRESETS["reference"]
        rates = {
            "coefficients": jnp.float32(recipe.lr_coefficients),
            "magnitudes": jnp.float32(recipe.lr_magnitudes),
        }
        method = dataclasses.replace(self.method, l1=l1, l2=l2)
        return _step(
            state,
            self.batches[batch],
            self.problem().replace(method=method),
            {group: rates[group] for group in self.params},
            optimisation=recipe.optimisation(20),
        )

    def start(self):
        return lf.init_state(self.problem(), jax.random.key(0), self.params)

    def problem(self):
        return lf.Problem(
            graph=self.graph, method=self.method, frozen=self.frozen, index=self.index
        )

    def by_row(self, magnitudes):
        return np.stack([magnitudes[site][layer] for site, layer in self.rows])


@pytest.fixture(scope="module")
def case(goldens):
    goldens = goldens / "fusion"

    @functools.cache
    def base(kind):
        arrays = dict(np.load(goldens / kind / "inputs.npz"))
        return (
            lf.load_base(goldens / kind / "base"),
            arrays,
            (_batch(arrays, 0), _batch(arrays, 1)),
        )

    @functools.cache
    def make(kind, file="inputs"):
        model, arrays, batches = base(kind)
        graph, weights = nnx.split(model)
        if file == "inputs":
            return _Case(
                graph,
                lf.ZeroShot(),
                lf.Frozen(weights),
                jnp.arange(0),
                {},
                batches,
                arrays,
                arrays,
                [],
            )
        golden = dict(np.load(goldens / kind / f"{file}.npz"))
        names = [file.removeprefix("single_").removesuffix("_fused")]
        if file.startswith("pool"):
            names = _LORAS[: len(golden["grad_coeff"])]
        sources = [str(goldens / kind / "adapters" / name) for name in names]
        pool = lf.read_pool(
            sources, model.config, base_tensor=lf.base_tensor(goldens / kind / "base")
        )
        frozen = lf.Frozen(
            weights,
            pool,
            lf.gram(pool, {site: lf.kernels(model)[site] for site in pool.A}),
        )
        # Only the sum takes several ranks.
        composition = "sum" if "products" in file or "pattern" in file else "mix"
        method = lf.Fusion(
            composition=composition, start="uniform", magnitudes="dora" in file
        )
        index = jnp.arange(len(pool))
        params = method.init(frozen, index, jax.random.key(0))
        if "traj_coeff" in golden:
            params["coefficients"] = jnp.asarray(golden["traj_coeff"][0])
        rows = [lf.places(model.config)[path] for path in golden.get("modules", ())]
        return _Case(
            graph, method, frozen, index, params, batches, arrays, golden, rows
        )

    return make


def _is_causal(arrays):
    """Return whether labels continue the inputs, and begin behind the prompt."""
    return arrays["labels_0"].shape == arrays["input_ids_0"].shape


def _rows_of_four(arrays, k, end=None):
    """Return ids and mask of a batch. Both batches have four rows, so that they share programs."""
    ids = arrays[f"input_ids_{k}"][:, :end]
    mask = arrays[f"attention_mask_{k}"][:, :end]
    filling = ((0, 4 - len(ids)), (0, 0))
    return jnp.asarray(np.pad(ids, filling), jnp.int32), jnp.asarray(
        np.pad(mask > 0, filling)
    )


def _batch(arrays, k):
    labels = arrays[f"labels_{k}"]
    prompt = None
    if _is_causal(arrays):
        prompt = int(np.argmax(labels[0] >= 0))
        assert (labels[:, :prompt] < 0).all() and (labels[:, prompt] >= 0).all()
        labels = labels[:, prompt:]
    labels = np.pad(labels, ((0, 4 - len(labels)), (0, 0)), constant_values=-100)
    row_mask = jnp.arange(4) < len(arrays[f"labels_{k}"])
    return lf.Batch(
        *_rows_of_four(arrays, k, end=prompt), jnp.asarray(labels, jnp.int32), row_mask
    )


# Adapters are arguments: fusions that differ in their pools' names alone share this program.
@functools.partial(jax.jit, static_argnums=0)
def _say(graph, base, adapters, batch, whole):
    """Return logits by teacher forcing, those that predict each label, and greedily generated tokens."""
    model = nnx.merge(graph, base)
    of_labels = logits = model.label_logits(
        batch.input_ids, batch.input_mask, batch.labels, adapters
    )
    if model.config.causal:
        logits = model(*whole, adapters)
    tokens = lf.generate(
        model, batch.input_ids, batch.input_mask, adapters, max_new_tokens=16
    )
    return logits, of_labels, tokens


_step = jax.jit(lf.fusion_step, static_argnames=("optimisation",))


def _close(got, wanted, tolerance, relative=0.0):
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=relative, atol=tolerance)


@pytest.mark.accelerator
@pytest.mark.parametrize(
    "kind", [pytest.param("t5a", marks=pytest.mark.smoke), *_KINDS[1:]]
)
def test_the_base_alone(case, kind):
    case(kind).check(
        "base_logits_0", loss="base_loss_mean_ce_0", greedy="base_greedy_0"
    )


@pytest.mark.accelerator
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("lora_0", marks=pytest.mark.smoke),
        *("rank_alpha_pattern", "dora"),
        # Tests of tests/io read the pickle and the scaling too.
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("lora_0_bin", "rslora")
        ),
    ],
)
def test_single_adapter(case, name):
    single = case("t5a", f"single_{name}")
    assert all(
        np.all(np.asarray(c) == 1)
        for c in jax.tree.leaves(single.params["coefficients"])
    )
    tolerance = 2e-4 if name == "rslora" else 1e-4
    single.check("logits", loss="loss_mean_ce", greedy="greedy", tolerance=tolerance)
    single.check("logits_batch1", k=1, tolerance=tolerance)
    graph, merged = nnx.split(
        lf.merged_base(nnx.merge(single.graph, single.frozen.base), single.adapters())
    )
    base = single._replace(
        graph=graph, method=lf.ZeroShot(), frozen=lf.Frozen(merged), params={}
    )
    base.check("logits_merged", tolerance=tolerance)


@pytest.mark.parametrize(
    "method",
    [
        lf.Fusion(composition="sum", magnitudes=False),  # coefficients
        lf.Fusion(
            composition="mix", start="xavier", magnitudes=False
        ),  # the same, of the reference preset
        pytest.param(
            lf.Fusion(granularity="global", magnitudes=False), marks=pytest.mark.long
        ),  # mean and single
    ],
    ids=["coefficients", "mix", "single"],
)
def test_a_dora_adapter_keeps_its_magnitudes_where_none_are_trained(case, method):
    dora = case("t5a", "single_dora")
    params = method.init(dora.frozen, dora.index, jax.random.key(0))
    dora._replace(method=method).check("logits", greedy="greedy", params=params)


@pytest.mark.accelerator
@pytest.mark.parametrize(("kind", "file"), _CASES)
def test_fusion_at_the_start(case, kind, file):
    fusion = case(kind, file)
    fusion.check("logits", loss="loss_mean_ce", greedy="greedy_init")
    fusion.check("logits_batch1", k=1)
    if fusion.method.magnitudes:
        _close(fusion.by_row(fusion.params["magnitudes"]), fusion.golden["mag0"], 1e-5)


@pytest.mark.accelerator
@pytest.mark.parametrize(("kind", "file"), _CASES)
def test_loss_and_gradients(case, kind, file):
    fusion = case(kind, file)
    golden = fusion.golden
    # The goldens' gradients leave L1 and L2 out. After one step Adam's first moment is a tenth of the gradient.
    state, metrics = fusion.step(fusion.start(), 0)
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
    golden = fusion.golden
    recipe = lf.PRESETS["reference"]
    state = fusion.start()
    for number in range(20):
        squares = jnp.sum(jnp.square(state.params["coefficients"]))
        state, metrics = fusion.step(state, number % 2, l1=recipe.l1, l2=recipe.l2)
        _close(metrics["loss"], golden["traj_loss"][number], 1e-4)
        l1 = metrics["penalty"] - recipe.l2 / 2 * squares
        _close(l1, golden["traj_l1"][number], 1e-4)
        _close(state.params["coefficients"], golden["traj_coeff"][number + 1], 1e-4)
        if fusion.method.magnitudes and number + 1 in golden["magnitude_steps"]:
            (row,) = np.flatnonzero(golden["magnitude_steps"] == number + 1)
            _close(
                fusion.by_row(state.params["magnitudes"]), golden["traj_mag"][row], 1e-4
            )
    # Numbers within 1e-4 of the golden's give logits further from its logits than the model's own error.
    fusion.check(
        "logits_final", greedy="greedy_final", params=state.params, tolerance=3e-4
    )
