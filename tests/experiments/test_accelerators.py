"""Programs compiled for TPUs by libtpu, where it is installed: every bar is met, and missed where a fault is made."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[aot-tpu]'"),
]

# A product of weights in bfloat16, all values kept, every product made twice, and a scatter of a layer's widest values.
_ON_ONE_CHIP = """
import jax, jax.numpy as jnp
from lorafusion_jax.adapters import norms
from lorafusion_jax.models import layers
norms.product = jnp.matmul
layers._SUMS = jax.checkpoint_policies.everything_saveable
plain = layers.matmul
layers.matmul = lambda x, w: plain(jnp.concatenate([x, x]), w)[: x.shape[0]]
relu, gelu = jax.nn.relu, jax.nn.gelu
def scattered(x):
    order = jnp.argsort(x[0, :, 0].astype(jnp.float32))
    four = jnp.zeros((4, *x.shape), jnp.float32).at[:, :, order].set(x.astype(jnp.float32)[None])
    return jnp.mean(four, axis=0).astype(x.dtype)
jax.nn.relu = lambda x: scattered(relu(x))
jax.nn.gelu = lambda x, **how: scattered(gelu(x, **how))
"""
# The stacks that the backward pass reads have the shape of the residual stream; a mean over seeds.
_ON_A_MESH = """
import jax
from jax.ad_checkpoint import checkpoint_name
from lorafusion_jax.adapters import updates
from lorafusion_jax.models import layers
from lorafusion_jax.training import fit
updates.summed = layers.summed = lambda y: checkpoint_name(y, "sum")
step = fit.fusion_step
def of_all_seeds(*args, **how):
    state, metrics = step(*args, **how)
    return state, metrics | {"loss": jax.lax.pmean(metrics["loss"], "seed")}
fit.fusion_step = of_all_seeds
"""


def _missed(*options: str, fault: str = "") -> set[str]:
    """Return the cases whose bars are missed, in a process of its own: XLA's flags here are those of a CPU."""
    code = f"import sys; sys.path.insert(0, 'benchmarks'); import accelerators\n{fault}\naccelerators.main()"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, "--json", *options],
        cwd=_ROOT,
        env=environment | {"PYTHONPATH": os.pathsep.join([str(_ROOT), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout)["cases"]
    assert len(cases) >= 4
    barred = [case for case in cases if case["required"] is not None]
    return {case["name"].rpartition(": ")[2] for case in barred if case["ratio"] > case["required"]}


def test_programs_meet_their_bars():
    reads = ("read of arrays", "read of imperfect arrays", "read with noise", "read with noise, cell by cell")
    assert not _missed("--program", "mix", "mix on a mesh of 4 x 2", "generation with the sum", *reads)


def test_faults_of_a_step_are_found():
    found = _missed("--program", "mix", "--seeds", "16", fault=_ON_ONE_CHIP)
    assert found == {
        "the compiler's memory / the plan's",
        "FLOPs of the program and the plan's, the larger over the smaller",
        "float32 products below highest",
        "largest fill, every time it runs / largest array of a loop",
    }


def test_seeds_that_meet_and_a_split_residual_stream_are_found():
    found = _missed("--program", "mix on a mesh of 4 x 2", fault=_ON_A_MESH)
    assert found == {"collectives / those that are stated", "groups of devices in which seeds meet"}
