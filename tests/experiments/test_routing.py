"""Routers of the experiment: the papers' formulas in NumPy, PEFT's Arrow, and the tables."""

import jax.numpy as jnp
import numpy as np
import pytest
import routing
from lab.string_pools import CLASSES
from scipy.special import softmax

_D_IN = 6
_RANK = 2
_D_OUT = 5
_MODULES = 4


def _arrays():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, _D_IN))
    kernel = rng.normal(size=(_D_IN, _D_OUT))
    return (
        x,
        kernel,
        rng.normal(size=(_MODULES, _D_IN, _RANK)),
        rng.normal(size=(_MODULES, _RANK, _D_OUT)),
    )


def _routed(kind: str, k: int) -> np.ndarray:
    x, kernel, A, B = (jnp.asarray(a, jnp.float32) for a in _arrays())
    of = routing._leading(A, B) if kind == "arrow" else jnp.einsum("nro,nso->nrs", B, B)
    return np.asarray(
        routing.Routed(A, B, of, jnp.array(k), kind, watched=False)(x, kernel)
    )


@pytest.mark.parametrize("k", [2, _MODULES])
@pytest.mark.parametrize("kind", ["arrow", "spectral"])
def test_layer_routers_are_the_formulas_of_their_papers(kind, k):
    """Arrow: the leading right singular vector of the update. SpectR: the norm of x after the update's V and S."""
    x, kernel, A, B = _arrays()
    wanted = x @ kernel
    for row, token in np.ndindex(*x.shape[:2]):
        scores = []
        for a, b in zip(A, B, strict=True):
            _, s, vt = np.linalg.svd((a @ b).T)
            along = vt[: len(s)] @ x[row, token]
            scores.append(
                abs(along[0]) if kind == "arrow" else np.linalg.norm(s * along)
            )
        kept = np.argsort(scores)[-k:]
        for n, weight in zip(kept, softmax(np.array(scores)[kept]), strict=True):
            wanted[row, token] += weight * x[row, token] @ A[n] @ B[n]
    np.testing.assert_allclose(_routed(kind, k), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.peft
def test_arrow_is_that_of_peft_with_the_same_prototypes():
    import torch
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer
    from peft.tuners.lora.config import ArrowConfig

    x, kernel, A, B = _arrays()
    config = ArrowConfig(top_k=2, router_temperature=1.0)
    config.task_adapter_names = [f"task_{n}" for n in range(_MODULES)]
    config.gks_adapter_names = []
    layer = ArrowLoraLinearLayer(_D_IN, config)

    def linears(weights: np.ndarray) -> dict:
        made = {}
        for n, weight in enumerate(weights):
            made[f"task_{n}"] = torch.nn.Linear(*weight.shape, bias=False)
            made[f"task_{n}"].weight.data = torch.tensor(weight.T, dtype=torch.float32)
        return made

    leading = routing._leading(*(jnp.asarray(a, jnp.float32) for a in (A, B)))
    layer.register_buffer("prototypes", torch.tensor(np.asarray(leading)))
    scaling = dict.fromkeys(config.task_adapter_names, 1.0)
    with torch.no_grad():
        update = layer(
            torch.tensor(x, dtype=torch.float32),
            linears(A),
            linears(B),
            torch.nn.Identity(),
            scaling,
        )
    np.testing.assert_allclose(
        _routed("arrow", 2), x @ kernel + update.numpy(), rtol=2e-5, atol=2e-5
    )


def test_tables_compare_with_uniform_once_all_cells_are_there():
    keys = [key for key in routing.cells() if key[0] == "use"]
    losses = {routing.UNIFORM: 0.5, routing.BASE: 0.7}
    rows = [
        {
            "what": what,
            "pool": pool,
            "task": task,
            "router": router,
            "relevance": CLASSES[n % 3],
            "exact_match": 10.0,
        }
        | {"loss": losses.get(router, 0.4 + n % 2 / 100)}
        | (
            {"share": 0.25 if router == routing.UNIFORM else 0.75}
            if router in routing.ROUTERS
            else {}
        )
        for n, (what, pool, task, router) in enumerate(keys)
    ]
    found = routing.tables(rows)
    lines = {line[1]: line for line in found["use"]}
    assert (
        lines[routing.BASE][2:5] == ["0.700", "10.0", "0.200"]
        and float(lines["nearest"][4]) < 0
    )
    assert lines[routing.UNIFORM][6] == "-0.200" and "LoRAFusion, 20 rows" in lines
    assert {line[0]: line[2:4] for line in found["related"]}["nearest"] == [
        "0.750",
        "0.500",
    ]
    assert keys[-1][3] not in {line[1] for line in routing.tables(rows[:-1])["use"]}
    others = [row for row in rows if row["router"] != routing.UNIFORM]
    assert all(
        line[1].startswith("LoRAFusion") for line in routing.tables(others)["use"][1:]
    )
