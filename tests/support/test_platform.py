"""The platform that a program is traced for: asked for in one place, and not always that of the process."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

import lorafusion_jax as lf
from lorafusion_jax.models import dense
from lorafusion_jax.models.bit_cast import to_bits
from lorafusion_jax.support import platform
from lorafusion_jax.support.platform import for_cpu, make_room, quick_jit
from lorafusion_jax.training import AXES, default_seed_mode


def test_a_program_is_lowered_for_a_tpu_where_there_is_none():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 16)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(16, 8)), jnp.bfloat16)
    nf4 = lf.quantise(
        jnp.asarray(rng.normal(size=(16, 8)), jnp.float32), "nf4", tiled_axis=-2
    )
    program = jax.jit(
        lambda x, w, nf4: (
            jax.tree.leaves(to_bits(w)),
            lf.matmul(x, w),
            dense(nf4, jnp.float32),
        )
    )

    def operations():
        text = program.lower(x, w, nf4).as_text()
        return {
            name
            for name in ("bitcast_convert", "gather")
            if f"stablehlo.{name}" in text
        }

    assert (
        operations() == {"bitcast_convert", "gather"}
        and default_seed_mode() == "sequential"
    )
    with tiny.for_tpu():
        assert operations() == set() and default_seed_mode() == "batched"
    assert operations() == {
        "bitcast_convert",
        "gather",
    }  # neither trace is taken for the other


def test_the_devices_of_a_mesh_say_it(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not for_cpu()
    with jax.set_mesh(
        jax.make_mesh((2, 1), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    ):
        assert for_cpu()


def test_quick_programs_are_parts_of_others_like_those_of_jax_jit():
    double = quick_jit(lambda x: 2 * x)
    x = jnp.arange(3.0)
    for found in (
        double(x),
        jax.jit(lambda: double(x))(),
        jax.vmap(double)(x),
        jax.jit(double)(x),
        double.lower(x).compile()(x),
    ):
        np.testing.assert_array_equal(found, 2 * x)


def test_a_mesh_with_explicit_axes_is_refused():
    mesh = jax.make_mesh((2,), ("data",))
    model = tiny.t5()
    ids = jax.device_put(
        jnp.ones((2, 3), jnp.int32), NamedSharding(mesh, PartitionSpec("data"))
    )
    frozen = jax.device_put(tiny.frozen(model), NamedSharding(mesh, PartitionSpec()))

    def with_mesh():
        with jax.set_mesh(mesh):
            tiny.problem(lf.Fusion(), tiny.frozen(model))

    for refused in (
        lambda: tiny.problem(lf.Fusion(), frozen),
        with_mesh,
        lambda: model(ids, ids > 0, ids),
    ):
        with pytest.raises(
            ValueError, match=r"axes are Auto, got \{'data': Explicit\}: make it with"
        ):
            refused()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_programs_are_forgotten_when_mappings_run_out():
    double = jax.jit(lambda x: 2 * x)
    double(jnp.ones(2))
    assert not make_room(10**9) and double._cache_size() == 1
    assert make_room(2) and double._cache_size() == 0
    assert double(jnp.ones(2)).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("flags", "dtype", "suggested"),
    [
        ("avx2 amx_bf16", "float32", True),
        ("avx2 amx_bf16", "bfloat16", False),
        ("avx2", "float32", False),
    ],
)
def test_bfloat16_is_suggested_where_a_processor_has_tiles(
    flags, dtype, suggested, monkeypatch, tmp_path, capsys
):
    information = tmp_path / "cpuinfo"
    information.write_text(f"flags\t: {flags}\n")
    monkeypatch.setattr(platform, "_PROCESSOR", information)
    platform.suggest_bfloat16(dtype)
    assert ("--dtype bfloat16" in capsys.readouterr().err) == suggested
