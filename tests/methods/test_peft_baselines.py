"""DoRA and VeRA against PEFT's: the first step's loss and gradients from equal values."""

import jax
import jax.numpy as jnp
import numpy as np
import peft_models
import pytest
import tiny
from flax import nnx

import lorafusion_jax as lf
from lorafusion_jax.methods.vera import Projections, VeRA

pytestmark = pytest.mark.peft

_NAMES = ("q", "v", "wo")  # of three shapes, which VeRA cuts from its shared matrices
_SITES = tuple((n, s) for n, s in tiny.CONFIG.sites.items() if n.rpartition(".")[2] in _NAMES)
_METHODS = {"dora": lf.LoRA(sites=_SITES, rank=3, alpha=5.0, dora=True), "vera": VeRA(sites=_SITES, rank=128)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    peft_models.t5().save_pretrained(folder)
    return folder


def _peft(folder, kind):
    """The model with a new adapter, all its numbers changed."""
    import peft
    import torch
    import transformers

    config = {
        "dora": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=list(_NAMES)),
        "vera": lambda: peft.VeraConfig(r=128, target_modules=list(_NAMES)),
    }[kind]()
    torch.manual_seed(1)
    model = peft.get_peft_model(transformers.T5ForConditionalGeneration.from_pretrained(folder), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= 1 + 0.3 * torch.rand_like(parameter)
            elif parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def _tensors(model, kind, of=lambda parameter: parameter):
    """PEFT's numbers, or what `of` makes of them, in the tree and the layout of our method's params."""
    modules = dict(model.base_model.model.named_modules())

    def stacked(get):
        def layer(path):
            return of(get(modules[path])).detach().numpy().T

        return {n: jnp.stack([layer(s.path_of(i)) for i in range(s.layers)]) for n, s in _SITES}

    if kind == "vera":
        d, b = stacked(lambda m: m.vera_lambda_d["default"]), stacked(lambda m: m.vera_lambda_b["default"])
        return {"vera": {"d": d, "b": b}}
    A, B = (stacked(lambda m, at=at: getattr(m, at)["default"].weight) for at in ("lora_A", "lora_B"))
    return {"lora": {"A": A, "B": B}, "magnitudes": stacked(lambda m: m.lora_magnitude_vector["default"].weight)}


def _frozen(folder, model, kind):
    base = lf.load_base(folder)
    graph, weights = nnx.split(base)
    if kind == "dora":
        norms = {n: jnp.linalg.norm(lf.kernels(base)[n], axis=1) for n, _ in _SITES}
        return graph, lf.Frozen(weights, norms=norms)
    shared = (jnp.asarray(getattr(model.base_model, at)["default"].numpy().T) for at in ("vera_A", "vera_B"))
    return graph, lf.Frozen(weights, prepared=Projections(*shared))


def _close(ours, theirs):
    """Within 1e-5 of the largest entry of each tensor."""
    wanted = dict(jax.tree.leaves_with_path(theirs))
    for path, got in jax.tree.leaves_with_path(ours):
        size = float(np.abs(wanted[path]).max())
        np.testing.assert_allclose(got, wanted.pop(path), rtol=0, atol=1e-5 * size, err_msg=jax.tree_util.keystr(path))
    assert not wanted


@pytest.mark.parametrize("kind", _METHODS)
def test_first_step(folder, kind):
    import torch

    model, batch = _peft(folder, kind), tiny.batch()
    loss = model(
        input_ids=torch.tensor(np.array(batch.input_ids)),
        attention_mask=torch.tensor(np.array(batch.input_mask)),
        labels=torch.tensor(np.array(batch.labels, np.int64)),
    ).loss / len(batch.labels)
    loss.backward()

    graph, frozen = _frozen(folder, model, kind)

    @jax.jit
    def step(params, frozen):
        def ours(params):
            return lf.objective(
                params,
                batch,
                lf.Problem(graph=graph, method=_METHODS[kind], frozen=frozen, index=jnp.arange(0)),
                jnp.float32(0),
            )[0]

        return jax.value_and_grad(ours)(params)

    value, gradients = step(_tensors(model, kind), frozen)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    wanted = _tensors(model, kind, of=lambda parameter: parameter.grad)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(wanted))
    _close(gradients, wanted)
