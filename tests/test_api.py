"""The public names, and what they are enough for."""

import collections
import importlib
import pkgutil
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorafusion_jax as lf
from lorafusion_jax import crossbar, tasks
from lorafusion_jax.crossbar import flax as crossbar_flax

_ROOT = Path(__file__).resolve().parent.parent
_API_PAGES = _ROOT / "docs" / "reference" / "api"


def test_every_public_name_exists_once_and_is_documented():
    assert len(set(lf.__all__)) == len(lf.__all__) and {"fuse", "LoraPool", "crossbar"} <= {*lf.__all__}
    for name in lf.__all__:
        assert getattr(lf, name).__doc__ or name == "PRESETS", name
    for name, value in vars(importlib.import_module("lorafusion_jax.parts")).items():
        assert value.__doc__ or not isinstance(value, type | types.FunctionType), name
    found = lf.Batch
    assert vars(lf)["Batch"] is found and dir(lf).count("Batch") == 1


def test_every_public_name_is_on_one_api_page():
    found = collections.Counter()
    for page in _API_PAGES.glob("*.md"):
        module = ""
        for directive, name in re.findall(r"^\.\. (?:auto|py:)?(\w+):: (\S+)$", page.read_text(), re.MULTILINE):
            if directive == "currentmodule":
                module = name
            elif directive != "module":  # `parts` is described whole
                found[f"{module}.{name}"] += 1
    names = [f"{module.__name__}.{name}" for module in (crossbar, crossbar_flax, tasks) for name in module.__all__]
    # The names that the package takes from its crossbar library are described there.
    own = (name for name in lf.__all__ if name != "crossbar")
    names += [f"{lf.__name__}.{name}" for name in own if getattr(crossbar, name, None) is not getattr(lf, name)]
    assert found == collections.Counter(names)


def test_names_of_tasks_that_pages_and_examples_use_are_exported():
    """Type checkers refuse other names of a typed package."""
    files = [*_ROOT.glob("docs/**/*.md"), *_ROOT.glob("examples/*.py")]
    used = {name for file in files for name in re.findall(r"\btasks\.(\w+)\(", file.read_text())}
    assert {"load_task", "pad"} <= used <= {*tasks.__all__}


def test_no_submodule_replaces_a_public_name():
    for module in pkgutil.walk_packages(lf.__path__, "lorafusion_jax."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    with pytest.raises(ValueError, match="seeds"):
        lf.fuse(lf.FuseOptions(base="base", task="task", seeds=()))
    assert all(type(getattr(lf, name)) is not type(importlib) or name == "crossbar" for name in lf.__all__)


def test_a_fusion_is_read_trained_and_merged_with_public_names_alone(small):
    """A gradient step by hand gives the result of `fusion_step`, and the merged model has the fused one's loss."""
    folder, adapters = small
    model = lf.load_base(folder)
    graph, base = nnx.split(model)
    sources = [str(path) for path in sorted(adapters.iterdir())[:2]]
    pool = lf.read_pool(sources, model.config, base_tensor=lf.base_tensor(folder))
    assert lf.places(model.config)["encoder.block.0.layer.0.SelfAttention.q"] == ("encoder.self.q", 0)
    used = {site: kernel for site, kernel in lf.kernels(model).items() if site in pool.A}
    frozen, index = lf.Frozen(base, pool, jax.jit(lf.gram)(pool, used)), jnp.arange(2)
    batch = lf.Batch(
        input_ids=jnp.array([[5, 6, 7], [8, 9, 0]]),
        input_mask=jnp.array([[True, True, True], [True, True, False]]),
        labels=jnp.array([[4, 1], [3, 1]]),
        row_mask=jnp.ones(2, bool),
    )
    method = lf.Fusion(magnitudes=False)
    problem = lf.Problem(graph=graph, method=method, frozen=frozen, index=index)
    state = lf.init_state(problem, jax.random.key(0), {"coefficients": jnp.full((2, 2), 0.3)})
    rates = lf.Rates({"coefficients": jnp.float32(0.1)}, l2=jnp.float32(0), l1=jnp.float32(0))
    step = jax.jit(lf.fusion_step, static_argnames=("optimisation",))
    new, metrics = step(state, batch, problem, rates, optimisation=lf.Optimisation(steps=1))

    @jax.jit
    def value_and_gradient(params, problem):
        def loss(params):
            return lf.objective(params, batch, problem, jnp.float32(0))[0]

        return jax.value_and_grad(loss)(params)

    value, gradient = value_and_gradient(state.params, problem)
    np.testing.assert_allclose(value, metrics["loss"], rtol=1e-6)
    # Adam's first step is the learning rate against the gradient's sign.
    wanted = state.params["coefficients"] - 0.1 * jnp.sign(gradient["coefficients"])
    np.testing.assert_allclose(new.params["coefficients"], wanted, atol=1e-4)

    fused, _ = jax.jit(method.adapters)(state.params, frozen, index)
    merged, weights = nnx.split(lf.merged_base(model, fused))
    plain = problem.replace(graph=merged, method=lf.ZeroShot(), frozen=lf.Frozen(weights))
    again, _ = value_and_gradient({}, plain)
    np.testing.assert_allclose(again, value, rtol=1e-5)
