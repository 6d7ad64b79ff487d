"""A run on a mesh of devices: the numbers of one device, seeds without collectives, matrices split by the table."""

import contextlib
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import one_block
import pytest
import tiny
from jax.sharding import PartitionSpec as P
from refusals import refused

from lorafusion_jax import PRESETS, FuseOptions, Fusion, fuse, init_state
from lorafusion_jax.training import make_mesh, on_mesh, recipe_rates, train_seeds
from lorafusion_jax.training.mesh import partition, rules, to_host

# As models of few layers run. A loop over layers is compiled otherwise for several devices: its last bits may differ.
_DEPTHS = {"num_layers": 1, "num_decoder_layers": 1, "unroll": True}
_CONFIG = replace(tiny.CONFIG, num_heads=2, d_kv=8, **_DEPTHS)
_COLLECTIVES = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
)
_QUICK = {
    "xla_backend_optimization_level": "0"
}  # of LLVM: what XLA computes stays the same
_SEEDS = 4
_SITES = ("encoder.self.q", "decoder.cross.v", "encoder.ff.wo")


def _trained(layout):
    """Return state and metrics of two steps of four seeds, the program, and how its arguments are split, by path."""
    pool = tiny.pool(8, names="q v wo", config=_CONFIG)
    fields = {
        field: {site: getattr(pool, field)[site] for site in _SITES}
        for field in ("A", "B", "rank")
    }
    frozen = tiny.frozen(tiny.t5(_CONFIG), replace(pool, **fields))
    index = jnp.stack([jnp.roll(jnp.arange(8), seed) for seed in range(_SEEDS)])
    keys = jax.random.split(jax.random.key(0), _SEEDS)
    problem = tiny.problem(Fusion(), frozen, index, _CONFIG, seed_mode="sequential")
    state = jax.vmap(lambda index, key: init_state(problem.replace(index=index), key))(
        index, keys
    )
    batches = [tiny.batch(_CONFIG, seed) for seed in range(_SEEDS)]
    batch = jax.tree.map(lambda *rows: jnp.stack(rows)[:, None], *batches)
    recipe = PRESETS["default"]
    mesh = contextlib.nullcontext()
    if layout is not None:
        mesh = jax.set_mesh(make_mesh(layout, _SEEDS))

    def of_seeds(tree):
        return on_mesh(tree, _CONFIG, of_seeds=True)

    with mesh:
        rates = of_seeds(recipe_rates(Fusion(), recipe, _SEEDS))
        state = of_seeds(state)
        batch = of_seeds(batch)
        frozen = on_mesh(frozen, _CONFIG)
        problem = problem.replace(frozen=frozen, index=of_seeds(index))
        shardings = {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding
            for path, leaf in jax.tree_util.tree_leaves_with_path(
                {"frozen": frozen, "state": state}
            )
        }

        def train(*arguments):
            optimisation = recipe.optimisation(2)
            return jax.tree.leaves(train_seeds(*arguments, optimisation=optimisation))

        program, leaves = tiny.compiled(
            train, state, batch, problem, rates, options=_QUICK
        )
        count = len(jax.tree.leaves(state))
        twice = program([*program(leaves)[:count], *leaves[count:]])
        return to_host(twice), program.as_text(), shardings


@pytest.fixture(scope="module")
def alone():
    return _trained(None)


def test_a_step_asks_nothing_of_the_host(alone):
    assert not re.search(r"callback|\b(infeed|outfeed|send|recv)\(", alone[1])


def test_seeds_over_devices_are_the_same_bits_and_never_meet(alone):
    values, _, _ = alone
    spread, program, where = _trained("seed=2")
    assert not _COLLECTIVES.search(program)
    assert where["state/params/coefficients"].shard_shape((4, 8, 2)) == (2, 8, 2)
    for a, b in zip(values, spread, strict=True):
        np.testing.assert_array_equal(a, b)


def test_matrices_over_devices_are_the_same_numbers(alone):
    values, _, _ = alone
    split, program, shardings = _trained("seed=2,model=2")
    assert _COLLECTIVES.search(program)
    for a, b in zip(values, split, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for name, shape, part in (
        ("frozen/base/encoder/self_attention/q/kernel", (1, 16, 16), (1, 16, 8)),
        ("frozen/base/encoder/ff/wo/kernel", (1, 24, 16), (1, 12, 16)),
        ("frozen/pool/A/encoder.ff.wo", (1, 8, 24, 4), (1, 8, 12, 4)),
        ("frozen/pool/B/decoder.cross.v", (1, 8, 4, 16), (1, 8, 4, 8)),
        ("frozen/gram/cross/encoder.self.q", (1, 8, 4, 16), (1, 8, 4, 8)),
        ("state/adam/mu/magnitudes/encoder.self.q", (4, 1, 16), (2, 1, 8)),
    ):
        (sharding,) = {shardings[path] for path in shardings if path.startswith(name)}
        assert sharding.shard_shape(shape) == part


@pytest.mark.parametrize(
    ("name", "dimensions", "of_seeds", "spec"),
    [
        ("base/embedding", 2, False, P("model", None)),
        ("base/decoder_bias/table", 2, False, P(None, "model")),
        ("base/encoder/ff/wi_0/kernel/scale", 3, False, P(None, None, "model")),
        (
            "base/decoder/cross_attention/o/kernel/qvalue",
            3,
            False,
            P(None, "model", None),
        ),
        (
            "params/base/['decoder']['cross_attention']['o']['kernel']",
            4,
            True,
            P("seed", None, "model", None),
        ),
        ("params/lora/B/encoder.self.k", 4, True, P("seed", None, None, "model")),
        ("pool/A/encoder.self.q", 4, False, P(None, None, None, None)),
        ("params/coefficients", 3, True, P("seed", None, None)),
        ("norms/encoder.ff.wi", 2, False, P(None, "model")),
    ],
)
def test_the_table(name, dimensions, of_seeds, spec):
    gated = rules(tiny.CONFIG)
    plain = rules(replace(tiny.CONFIG, gated=False))
    assert partition(name, dimensions, gated + plain, of_seeds=of_seeds) == spec


def test_what_a_mesh_cannot_do_is_refused_before_anything_is_written(tmp_path):
    options = FuseOptions(
        base=str(one_block.SMALL / "base"),
        pool=str(one_block.SMALL / "adapters"),
        task=str(one_block.SMALL / "tasks" / "double_digit"),
        seeds=(1, 2),
        out=tmp_path,
    )
    for layout, message in (
        ("rows=2", "'rows=2' is not an axis and its size: give for example seed=4"),
        ("seed=0", "'seed=0' is not an axis"),
        ("seed=3", "2 seeds cannot be shared out evenly over --mesh seed=3"),
        (
            "seed=2,model=4",
            "8 devices, got 4: use fewer, or set XLA_FLAGS=--xla_force_",
        ),
        ("model=4", "--mesh model=4 does not divide vocab_size, which is 66"),
        ("model=3", "--mesh model=3 does not divide num_heads, which is 4"),
    ):
        with refused(re.escape(message)):
            fuse(replace(options, mesh=layout))
    with refused("zero-shot trains no seeds to share out"):
        fuse(replace(options, mesh="seed=2", method="zero-shot"))
    assert not list(tmp_path.iterdir())
