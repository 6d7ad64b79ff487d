"""Batches of mixed tasks: what many tasks cost over one, and PEFT's mixed batches beside them.

    python benchmarks/mixed_batches.py [--shape flan-t5-small] [--cores 1] [--json]

Random weights, a pool of 20 modules of rank 16 on q and v; rows of 16 source and 16 new tokens, none ending earlier.
Batches of 64 and 256 rows, each row with a task of its own, are compared with the same rows of one task: the same bank
and the same program. With magnitudes, tasks are sums with scales, of whole modules and in a shared basis. Without, they
are mixes: PEFT can hold each of them as an adapter of rank 16, and chooses adapters row by row (`adapter_names`; this
needs the `peft` extra and is left out without it). Ids are compared with those of one task's own program, whose speed
is shown too.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import _measure
import jax
import jax.numpy as jnp
import numpy as np
from _measure import case, has_peft, in_turns, of_turns, product_rates
from _model import (
    MODULES,
    answers,
    batch_of,
    config_of,
    frozen,
    graph_of,
    in_basis,
    shape_parser,
)
from _peer import mixed_batch

from lorafusion_jax import Frozen, Fusion, Problem, TaskBank
from lorafusion_jax.tasks import Batch
from lorafusion_jax.training import Params

_SOURCE = 16
_NEW = 16
_BATCHES = (64, 256)
_BAR = 0.9
_COMPARED = 4  # tasks whose ids are compared with those of a program of their own
_METHODS = {
    "magnitudes": Fusion(composition="sum", magnitudes=True),
    "magnitudes, basis of 32": Fusion(composition="sum", magnitudes=True, basis=32),
    "coefficients": Fusion(composition="mix", magnitudes=False),
}


def main() -> None:
    parser = shape_parser(__doc__, "flan-t5-small")
    parser.add_argument("--cores", type=int, default=1, help="that both sides may use")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    _measure.launch(options.cores)
    cases = []
    for name, method in _METHODS.items():
        cases += _cases(options, name, method)
    _measure.show(cases, as_json=options.json, rates=product_rates(["float32"]))


def _cases(options: Any, name: str, method: Fusion) -> list[dict[str, Any]]:
    # Random weights would end a row somewhere: no token does.
    config = dataclasses.replace(config_of(options.shape), eos_id=-1)
    weights = frozen(config, "float32", MODULES)
    if method.basis is not None:
        weights = in_basis(config, weights, method.basis)
    weights = jax.block_until_ready(weights)
    tasks = _tasks(method, weights, max(_BATCHES))
    bank = TaskBank.empty(
        graph_of(config),
        weights,
        len(tasks),
        scaled=sorted(tasks[0].get("magnitudes", ())),
    )
    for number, params in enumerate(tasks):
        bank = bank.with_task(number, method, params, range(MODULES))
    problem = Problem(
        graph=graph_of(config),
        method=method,
        frozen=weights,
        index=jnp.arange(MODULES)[None],
    )
    batches = {
        rows: jax.tree.map(lambda a: a[0], batch_of(config, (rows, _SOURCE, _SOURCE)))
        for rows in _BATCHES
    }
    runs: dict[str, Callable[[], np.ndarray]] = {}
    for rows, batch in batches.items():

        def run(numbers: np.ndarray, batch: Batch = batch) -> np.ndarray:
            return np.asarray(bank.generate(batch, numbers, max_new_tokens=_NEW))

        runs[f"{rows} one"] = partial(run, np.zeros(rows, np.int32))
        runs[f"{rows} mixed"] = partial(run, np.arange(rows, dtype=np.int32))
    rows = _BATCHES[0]
    runs["alone"] = partial(_alone, tasks[0], batches[rows], problem)
    if name == "coefficients" and has_peft():
        adapters = [
            jax.device_get(_factors(params, weights, method=method))
            for params in tasks[:rows]
        ]
        peer = mixed_batch(
            config, weights.base, batches[rows], adapters, new_tokens=_NEW
        )
        runs["peer one"] = partial(peer, [0] * rows)
        runs["peer mixed"] = partial(peer, list(range(rows)))
    mixed = {rows: runs[f"{rows} mixed"]() for rows in _BATCHES}
    same = [
        np.mean(_alone(tasks[t], batches[rows], problem)[t] == mixed[rows][t])
        for t in range(_COMPARED)
    ]
    seconds = in_turns(runs, options.rounds)
    where = f"{options.shape}, {options.cores} core{'s' if options.cores > 1 else ''}, {name}"

    def speed(of: str, rows: int) -> float:
        return rows * _NEW / float(np.median(seconds[of]))

    cases = [
        case(
            f"{where}: tokens/s of {rows} tasks / of one, {rows} rows",
            of_turns(seconds[f"{rows} one"], seconds[f"{rows} mixed"]),
            _BAR,
            higher_is_better=True,
            tokens_per_second=speed(f"{rows} mixed", rows),
            same_tokens_as_alone=float(np.mean(same)),
            rounds=options.rounds,
        )
        for rows in _BATCHES
    ]
    ours = seconds[f"{rows} mixed"]
    beside = {
        f"{where}: tokens/s of {rows} tasks / of one in a program of its own, {rows} rows": "alone"
    }
    if "peer mixed" in runs:
        beside[
            f"{where}: tokens/s of {rows} tasks / of PyTorch + PEFT, {rows} rows"
        ] = "peer mixed"
    for what, other in beside.items():
        found = {
            "tokens_per_second": speed(f"{rows} mixed", rows),
            "other_tokens_per_second": speed(other, rows),
        }
        if other == "peer mixed":
            found["same_tokens"] = float(np.mean(mixed[rows] == runs[other]()))
            found["peer_of_one_task"] = of_turns(seconds["peer one"], seconds[other])
        cases.append(
            case(
                what,
                of_turns(seconds[other], ours),
                None,
                higher_is_better=True,
                **found,
            )
        )
    return cases


def _tasks(method: Fusion, weights: Frozen, count: int) -> list[Params]:
    """Return made-up numbers of tasks: coefficients as a fusion draws them, magnitudes about ||W||."""
    keys = jax.random.split(jax.random.key(0), count)
    found = []
    start = dataclasses.replace(method, start="xavier")
    draw = jax.jit(start.init)
    for key in keys:
        params = draw(weights, jnp.arange(MODULES), key)
        if "magnitudes" in params:
            scale = jax.random.uniform(key, (), minval=0.8, maxval=1.2)
            params["magnitudes"] = jax.tree.map(
                lambda m, by=scale: m * by, params["magnitudes"]
            )
        found.append(params)
    return found


def _alone(params: Params, batch: Batch, problem: Problem) -> np.ndarray:
    """Return the ids of a batch by a program of one task."""
    seeds = jax.tree.map(lambda a: a[None], params)
    return answers(seeds, batch, problem, _NEW)[0]


@partial(jax.jit, static_argnames="method")
def _factors(
    params: Params, weights: Frozen, *, method: Fusion
) -> dict[str, tuple[Any, Any]]:
    """Return A and B of the module that is a task's mix, [L, d_in, r] and [L, r, d_out] by site."""
    adapters, _ = method.adapters(params, weights, jnp.arange(MODULES))
    return {site: (adapter.A, adapter.B) for site, adapter in adapters.items()}


if __name__ == "__main__":
    main()
