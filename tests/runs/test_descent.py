"""Descent of the modules of a pool: finite differences in float64, explicit rotated matrices, order and devices."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import lorafusion_jax as lf
from lorafusion_jax.models.architecture import Stack
from lorafusion_jax.models.layers import Base, Linear, of_stack, scan_blocks
from lorafusion_jax.parts import make_mesh, on_mesh

_KEY = jax.random.key(5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config(lf.Architecture):
    """Structure of a model that is so small that NumPy defines it: two blocks of two products with a tanh between."""

    family: ClassVar[str] = "tanh"
    targets: ClassVar[tuple[str, ...]] = ("up", "down")

    @functools.cached_property
    def stacks(self):
        return {"only": Stack(2, ("source", "target"), (), 2 * self.d_model, 0)}

    @functools.cached_property
    def sites(self):
        d, reads = self.d_model, ("source", "target")
        maps = {"only.up": (d, 2 * d, "columns", "a"), "only.down": (2 * d, d, "rows", "b")}
        return {
            name: lf.Site(2, d_in, d_out, path=f"{{layer}}.{name}", reads=reads, split=split, stage=stage)
            for name, (d_in, d_out, split, stage) in maps.items()
        }


class _Block(nnx.Module):
    def __init__(self, config, rngs):
        sites = config.sites.items()
        self.up, self.down = (
            Linear(n.rpartition(".")[2], 2, s.d_in, s.d_out, scale=s.d_in**-0.5, rngs=rngs) for n, s in sites
        )


class _Tanh(nnx.Module):
    """Reads the mean of the source's tokens and the token before each answer token."""

    def __init__(self, config, *, rngs):
        self.config: lf.Architecture = config
        self.embedding = Base(rngs.params.normal((config.vocab_size, config.d_model)))
        self.blocks = _Block(config, rngs)
        self.head = Base(rngs.params.normal((config.d_model, config.vocab_size)))

    def variables(self):
        return {"only.up": self.blocks.up.kernel, "only.down": self.blocks.down.kernel}

    def label_logits(self, input_ids, input_mask, labels, adapters, rows=None):
        def block(layer, x, of_layer):
            return x + layer.down(jnp.tanh(layer.up(x, of_layer)), of_layer), None

        real = input_mask[:, :, None].astype(jnp.float32)
        read = jnp.sum(self.embedding[...][input_ids] * real, axis=1) / jnp.sum(real, axis=1)
        before = jnp.pad(jnp.maximum(labels[:, :-1], 0), ((0, 0), (1, 0)))
        x = self.embedding[...][before] + read[:, None]
        adapters = of_stack(adapters, "only", self.config.sites)
        x, _ = scan_blocks(block, self.blocks, x, adapters, remat="none", unroll=True)
        return x @ self.head[...]

    prompt = decode_token = moved = label_logits  # parts of the protocol that no test calls


_CONFIG = _Config(vocab_size=48, d_model=12)


def _problem() -> lf.Problem:
    """A fusion of three of four modules, one of which lacks a site in the first layer."""
    graph, base = nnx.split(_Tanh(_CONFIG, rngs=nnx.Rngs(0)))
    modules = tiny.pool(4, lambda n, site, layer: 3 * (n != 2 or layer != 0), names=("up", "down"), config=_CONFIG)
    method = lf.Fusion(granularity="site")
    frozen = method.prepare(lf.Frozen(base, modules), lf.kernels(nnx.merge(graph, base)))
    return lf.Problem(graph=graph, method=method, frozen=frozen, index=jnp.array([3, 0, 2]))


def _loss(problem: lf.Problem, deltas: dict[tuple[str, int], np.ndarray], batches: list[lf.Batch]) -> float:
    """Mean cross-entropy per answer token of the model whose matrices have `deltas` added, in float64."""
    model = nnx.merge(problem.graph, problem.frozen.base)
    kernels = {name: np.asarray(kernel, np.float64) for name, kernel in lf.kernels(model).items()}
    embedding, head = (np.asarray(variable[...], np.float64) for variable in (model.embedding, model.head))
    total, tokens = 0.0, 0
    for batch in batches:
        source, mask, labels = (np.asarray(leaf) for leaf in (batch.input_ids, batch.input_mask, batch.labels))
        read = np.stack([embedding[row[real]].mean(axis=0) for row, real in zip(source, mask, strict=True)])
        before = np.concatenate([np.zeros((len(labels), 1), int), np.maximum(labels[:, :-1], 0)], axis=1)
        x = embedding[before] + read[:, None]
        for layer in range(2):
            up, down = (kernels[site][layer] + deltas.get((site, layer), 0.0) for site in _CONFIG.sites)
            x = x + np.tanh(x @ up) @ down
        scores = x @ head
        log_probs = scores - np.log(np.sum(np.exp(scores), axis=-1, keepdims=True))
        real = labels != -100
        picked = np.take_along_axis(log_probs, np.where(real, labels, 0)[:, :, None], axis=2)[:, :, 0]
        total, tokens = total - np.sum(picked[real]), tokens + np.sum(real)
    return total / tokens


def _by_differences(problem: lf.Problem, pool: lf.LoraPool, batches: list[lf.Batch]) -> np.ndarray:
    """Descent of each module, by central differences of the loss in each coefficient."""
    found, eps = [], 1e-4
    for n in np.asarray(problem.index):
        squares = 0.0
        for site in pool.A:
            A, B = (np.asarray(factor[site], np.float64) for factor in (pool.A, pool.B))
            for layer in range(A.shape[0]):
                update = eps * A[layer, n] @ B[layer, n]
                ends = [_loss(problem, {(site, layer): sign * update}, batches) for sign in (1, -1)]
                squares += ((ends[0] - ends[1]) / 2 / eps) ** 2
        found.append(np.sqrt(squares))
    return np.array(found)


@pytest.fixture(scope="module")
def batches() -> list[lf.Batch]:
    """Two batches with different numbers of rows and answer tokens."""
    return [tiny.batch(_CONFIG), tiny.batch(_CONFIG, 1, rows=2, source=5, target=4)]


def test_descents_are_norms_of_finite_differences_in_float64(batches):
    problem = _problem()
    found = lf.descent(problem, batches, key=_KEY, draws=2)
    pool = problem.frozen.pool
    np.testing.assert_allclose(found.modules, _by_differences(problem, pool, batches), rtol=1e-4)
    for draw, descent in enumerate(found.rotated):
        rotated = lf.rotated_pool(pool, jax.random.fold_in(_KEY, draw))
        np.testing.assert_allclose(descent, _by_differences(problem, rotated, batches), rtol=1e-4)
    assert found.loss == pytest.approx(_loss(problem, {}, batches), rel=1e-5)


def test_the_order_of_the_modules_makes_no_difference(batches):
    problem = _problem()
    found = lf.descent(problem, batches, key=_KEY, draws=2)
    pool, order = problem.frozen.pool, [2, 0, 3, 1]
    frozen = problem.method.prepare(
        lf.Frozen(problem.frozen.base, pool.select(order)),
        lf.kernels(nnx.merge(problem.graph, problem.frozen.base)),
    )
    other = problem.replace(frozen=frozen, index=jnp.array([1, 0, 2]))  # modules 0, 2 and 3 of the first pool
    again = lf.descent(other, batches, key=_KEY, draws=2)
    for name in ("modules", "rotated"):
        np.testing.assert_allclose(getattr(again, name), getattr(found, name)[..., [1, 2, 0]], rtol=1e-5)


def test_the_number_of_devices_makes_no_difference():
    config = dataclasses.replace(tiny.CONFIG, num_heads=4)
    model, pool = tiny.t5(config), tiny.pool(3, config=config)
    frozen = tiny.frozen(model, pool)
    problem = tiny.problem(lf.Fusion(), frozen).replace(graph=nnx.split(model)[0])
    batches = [tiny.batch(config)]
    one = lf.descent(problem, batches, key=_KEY)
    with jax.set_mesh(make_mesh("model=4", 1)):
        on_four = problem.replace(frozen=on_mesh(frozen, config), index=on_mesh(problem.index))
        found = lf.descent(on_four, batches, key=_KEY)
    for name in ("modules", "rotated", "loss"):
        np.testing.assert_allclose(getattr(found, name), getattr(one, name), rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": lf.Fusion(composition="mix")}, "a mix has no gradient at zero coefficients"),
        ({"method": lf.ZeroShot()}, "needs a fusion of whole LoRA modules"),
    ],
)
def test_problems_without_a_descent_are_refused(batches, changes, message):
    with pytest.raises(ValueError, match=message):
        lf.descent(_problem().replace(**changes), batches, key=_KEY)


def test_no_rows_and_no_draws_are_refused(batches):
    with pytest.raises(ValueError, match="no rows to compute a descent from"):
        lf.descent(_problem(), [], key=_KEY, draws=1)
    with pytest.raises(ValueError, match="draws is 0: expected at least 1"):
        lf.descent(_problem(), batches, key=_KEY, draws=0)
