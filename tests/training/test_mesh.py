"""A run on a mesh of devices: the numbers of one device, seeds without collectives, matrices split by the table."""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import one_block
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from lorafusion_jax import PRESETS, FuseOptions, Fusion, LoraPool, fuse, init_state
from lorafusion_jax.training import make_mesh, on_mesh, recipe_rates, train_seeds
from lorafusion_jax.training.mesh import partition, rules, to_host

# As models of few layers run. A loop over layers is compiled otherwise for several devices: its last bits may differ.
_DEPTHS = {"num_layers": 1, "num_decoder_layers": 1, "unroll": True}
_CONFIG = dataclasses.replace(tiny.CONFIG, num_heads=2, d_kv=8, **_DEPTHS)
_COLLECTIVES = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
)
_OF_THE_HOST = re.compile(r"callback|\b(infeed|outfeed|send|recv)\(")
_QUICK = {
    "xla_backend_optimization_level": "0"
}  # of LLVM: what XLA computes stays the same
_SEEDS = 4
_SITES = ("encoder.self.q", "decoder.cross.v", "encoder.ff.wo")


def _of_sites(pool: LoraPool, sites: tuple[str, ...]) -> LoraPool:
    """Few sites compile quickly: one of each way to split, in either stack."""
    chosen = ({site: of[site] for site in sites} for of in (pool.A, pool.B, pool.rank))
    return dataclasses.replace(
        pool, **dict(zip(("A", "B", "rank"), chosen, strict=True))
    )


def _trained(asked: str | None, *, together: int = 1) -> tuple[list, str, dict]:
    """Return state and metrics of two steps of four seeds, the program, and how its arguments are split, by path.

    The program takes so many steps together, 1 or 2.
    """
    model = tiny.t5(_CONFIG)
    pool = _of_sites(tiny.pool(8, names="q v wo", config=_CONFIG), _SITES)
    frozen = tiny.frozen(model, pool)
    method = Fusion()
    index = jnp.stack([jnp.roll(jnp.arange(8), seed) for seed in range(_SEEDS)])
    keys = jax.random.split(jax.random.key(0), _SEEDS)
    problem = tiny.problem(method, frozen, index, _CONFIG, seed_mode="sequential")
    state = jax.vmap(lambda index, key: init_state(problem.replace(index=index), key))(
        index, keys
    )
    batch = jax.tree.map(
        lambda *rows: jnp.stack(rows),
        *(tiny.batch(_CONFIG, seed) for seed in range(_SEEDS)),
    )
    batch = jax.tree.map(lambda rows: jnp.stack([rows] * together, axis=1), batch)
    recipe = PRESETS["default"]
    with (
        contextlib.nullcontext()
        if asked is None
        else jax.set_mesh(make_mesh(asked, _SEEDS))
    ):
        rates = recipe_rates(method, recipe, _SEEDS)
        state = on_mesh(state, _CONFIG, of_seeds=True)
        batch = on_mesh(batch, _CONFIG, of_seeds=True)
        index = on_mesh(index, _CONFIG, of_seeds=True)
        rates = on_mesh(rates, _CONFIG, of_seeds=True)
        frozen = on_mesh(frozen, _CONFIG)
        problem = problem.replace(frozen=frozen, index=index)
        where = {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding
            for path, leaf in jax.tree_util.tree_leaves_with_path(
                {"frozen": frozen, "state": state}
            )
        }

        def train(*given):
            return jax.tree.leaves(
                train_seeds(*given, optimisation=recipe.optimisation(2))
            )

        compiled, leaves = tiny.compiled(
            train, state, batch, problem, rates, options=_QUICK
        )
        once = compiled(leaves)
        count = len(jax.tree.leaves(state))
        if together == 2:
            return to_host(once), compiled.as_text(), where
        twice = compiled([*once[:count], *leaves[count:]])
        return to_host(twice), compiled.as_text(), where


@pytest.fixture(scope="module")
def alone():
    return _trained(None)


def test_a_step_asks_nothing_of_the_host(alone):
    asking = (
        jax.jit(lambda x: jax.pure_callback(np.sin, x, x))
        .lower(jnp.ones(2))
        .compile()
        .as_text()
    )
    assert _OF_THE_HOST.search(asking)
    assert not _OF_THE_HOST.search(alone[1])


def test_seeds_over_devices_are_the_same_bits_and_never_meet(alone):
    values, _, _ = alone
    spread, program, where = _trained("seed=2")
    assert not _COLLECTIVES.search(program)
    assert where["state/params/coefficients"].shard_shape((4, 8, 2)) == (2, 8, 2)
    for a, b in zip(values, spread, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.long
@pytest.mark.parametrize("asked", ["seed=2", "seed=2,model=2"])
def test_two_steps_in_one_program_over_devices_are_those_of_two_calls(asked, alone):
    values, _, _ = alone
    spread, program, _ = _trained(asked, together=2)
    assert bool(_COLLECTIVES.search(program)) == ("model" in asked)
    for a, b in zip(values, spread, strict=True):
        last = (
            b if a.shape == b.shape else b[1:]
        )  # of both steps' metrics those of the second
        np.testing.assert_allclose(
            last, a, rtol=1e-5, atol=1e-5 if "model" in asked else 0
        )
        assert "model" in asked or np.array_equal(last, a)


def test_matrices_over_devices_are_the_same_numbers(alone):
    values, _, _ = alone
    split, program, where = _trained("seed=2,model=2")
    assert _COLLECTIVES.search(program)
    for a, b in zip(values, split, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    whole = {
        "frozen/base/encoder/self_attention/q/kernel": (1, 16, 16),
        "frozen/base/encoder/ff/wo/kernel": (1, 24, 16),
        "frozen/pool/A/encoder.ff.wo": (1, 8, 24, 4),
        "frozen/pool/B/decoder.cross.v": (1, 8, 4, 16),
        "frozen/gram/cross/encoder.self.q": (1, 8, 4, 16),
        "state/adam/mu/magnitudes/encoder.self.q": (4, 1, 16),
    }
    parts = [
        next(
            sharding for path, sharding in where.items() if path.startswith(name)
        ).shard_shape(shape)
        for name, shape in whole.items()
    ]
    assert parts == [
        (1, 16, 8),
        (1, 12, 16),
        (1, 8, 12, 4),
        (1, 8, 4, 8),
        (1, 8, 4, 8),
        (2, 1, 8),
    ]


@pytest.mark.parametrize(
    ("name", "dimensions", "of_seeds", "spec"),
    [
        ("base/embedding", 2, False, P("model", None)),
        ("base/head", 2, False, P(None, "model")),
        ("base/decoder_bias/table", 2, False, P(None, "model")),
        ("base/encoder/self_norm/scale", 2, False, P(None, None)),
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
        ("params/lora/B/encoder.self.o", 4, True, P("seed", None, None, None)),
        ("pool/A/encoder.self.q", 4, False, P(None, None, None, None)),
        ("pool/rank/encoder.self.q", 2, False, P(None, None)),
        ("params/coefficients", 3, True, P("seed", None, None)),
        ("params/magnitudes/encoder.ff.wo", 3, True, P("seed", None, None)),
        ("norms/encoder.ff.wi", 2, False, P(None, "model")),
        ("gram/pairs/encoder.self.q", 3, False, P(None, None, "model")),
        ("gram/pairs/encoder.ff.wo", 3, False, P(None, None, None)),
    ],
)
def test_the_table(name, dimensions, of_seeds, spec):
    gated = rules(tiny.CONFIG)
    plain = rules(dataclasses.replace(tiny.CONFIG, gated=False))
    assert partition(name, dimensions, gated + plain, of_seeds=of_seeds) == spec


def test_what_a_mesh_cannot_do_is_refused_before_anything_is_written(tmp_path):
    options = FuseOptions(
        base=str(one_block.SMALL / "base"),
        pool=str(one_block.SMALL / "adapters"),
        task=str(one_block.SMALL / "tasks" / "double_digit"),
        seeds=(1, 2),
        out=tmp_path,
    )
    for asked, message in (
        (
            "rows=2",
            "'rows=2' is not an axis and its size: give for example seed=4,model=2",
        ),
        ("seed=0", "'seed=0' is not an axis"),
        ("seed", "'seed' is not an axis"),
        (
            "seed=3",
            "2 seeds cannot be shared out evenly over --mesh seed=3: give a multiple",
        ),
        (
            "seed=2,model=4",
            "8 devices, got 4: use fewer, or set XLA_FLAGS=--xla_force_host_platform_device_count=8",
        ),
        ("model=4", "--mesh model=4 does not divide vocab_size, which is 66"),
        ("model=3", "--mesh model=3 does not divide num_heads, which is 4"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            fuse(dataclasses.replace(options, mesh=asked))
    with pytest.raises(ValueError, match="zero-shot trains no seeds to share out"):
        fuse(dataclasses.replace(options, mesh="seed=2", method="zero-shot"))
    assert not list(tmp_path.iterdir())
