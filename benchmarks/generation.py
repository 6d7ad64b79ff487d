"""Greedy generation with a fused pool against PyTorch + PEFT `generate`, taking turns on one core.

    python benchmarks/generation.py --shape flan-t5-small [--batch 10] [--json]

128 source and 32 new tokens, no row ending earlier; the mix of 20 modules of rank 16 on q and v with its magnitudes,
beside the base (composed anew by every call here, in PEFT a DoRA adapter) and merged into its weights (`merged_base`,
PEFT's `merge_and_unload`). With a decoder also the prompt alone, merged, up to the first new token. Random weights.
Needs the `peft` extra.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import _measure
import jax
import jax.numpy as jnp
import numpy as np
from _measure import case, has_peft, in_turns, of_turns, product_rates
from _model import CHOICES, MODULES, SOURCE, TARGET, Dtype, batch_of, config_of, frozen, graph_of
from _peer import Peer
from flax import nnx
from fusion_step import decoder_peer

from lorafusion_jax.io.export import merged_base
from lorafusion_jax.methods.fusion import Fusion
from lorafusion_jax.methods.untrained import ZeroShot
from lorafusion_jax.runs.evaluate import generate_seeds
from lorafusion_jax.tasks import Batch
from lorafusion_jax.training.problem import Frozen, Method, Problem

_NEW = 32
_DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
_HOW = {"beside": "adapters beside", "merged": "adapters merged", "prompt": "the prompt alone"}
# (required, ambition) of our precision against PyTorch's float32.
_BARS = {"float32": (1.5, 2.0), "bfloat16": (2.0, None)}


def main() -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument("--shape", choices=CHOICES, default="flan-t5-small", help="of the base model")
    parser.add_argument("--batch", type=int, nargs="+", default=[10], help="rows of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not has_peft():
        sys.exit("PyTorch and PEFT are not installed, and nothing else is compared with: pip install -e '.[peft]'")
    _measure.launch(1)
    rates = product_rates(_DTYPES)
    cases = [found for rows in options.batch for found in _cases(options.shape, rows, options.rounds, rates)]
    _measure.show(cases, as_json=options.json, rates=rates)


def _cases(shape: str, rows: int, rounds: int, rates: dict[str, float]) -> list[dict[str, Any]]:
    import torch

    torch.set_num_threads(1)
    runs: dict[str, Callable[[], np.ndarray]] = {}
    for dtype in _DTYPES:
        # Random weights would end a row somewhere: no token does.
        config = dataclasses.replace(config_of(shape, dtype), eos_id=-1)
        weights = jax.block_until_ready(frozen(config, dtype, MODULES))
        batch = batch_of(config, (rows, SOURCE, TARGET))
        runs |= {f"{dtype} {how}": run for how, run in _ours(config, weights, batch).items()}
        runs |= {f"{dtype} peer {how}": run for how, run in _theirs(config, weights, batch, dtype).items()}
    causal, cases = config_of(shape).causal, []
    bars = {"float32": (decoder_peer(rates), None)} if causal else _BARS
    said = {name: run() for name, run in runs.items()}
    seconds = in_turns(runs, rounds)
    for how in ("beside", "merged", *(("prompt",) if causal else ())):
        new = 1 if how == "prompt" else _NEW
        for dtype, peer in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")):
            ours, theirs = f"{dtype} {how}", f"{peer} peer {how}"
            took, other = float(np.median(seconds[ours])), float(np.median(seconds[theirs]))
            cases.append(
                case(
                    f"{shape}, 1 core, generation, {rows} rows, {_HOW[how]}: PyTorch {peer} / our {dtype}",
                    of_turns(seconds[theirs], seconds[ours]),
                    *(bars.get(dtype, (None, None)) if peer == "float32" else (None, None)),
                    higher_is_better=True,
                    tokens_per_second=rows * new / took,
                    peer_tokens_per_second=rows * new / other,
                    same_tokens=float(np.mean(said[ours] == said[theirs])),
                    rounds=len(seconds[ours]),
                )
            )
    return cases


def _ours(config: Any, weights: Frozen, batch: Batch) -> dict[str, Callable[[], np.ndarray]]:
    method = Fusion(composition="mix", start="uniform")
    index = jnp.arange(MODULES)
    params = jax.jit(method.init)(weights, index, jax.random.key(0))
    model = nnx.merge(graph_of(config), weights.base)
    merged = nnx.split(merged_base(model, jax.jit(method.adapters)(params, weights, index)[0]))[1]
    merged = jax.tree.map(lambda a: a.astype(config.dtype), merged)
    one = jax.tree.map(lambda a: a[0], batch)

    def run(method: Method, params: Any, weights: Frozen, new: int = _NEW) -> Callable[[], np.ndarray]:
        seeds = jax.tree.map(lambda a: a[None], params)
        problem = Problem(graph=graph_of(config), method=method, frozen=weights, index=index[None], path="map")
        return lambda: np.asarray(generate_seeds(seeds, one, problem, max_new_tokens=new)[0])

    runs = {"beside": run(method, params, weights), "merged": run(ZeroShot(), {}, Frozen(merged))}
    return runs | ({"prompt": run(ZeroShot(), {}, Frozen(merged), 1)} if config.causal else {})


def _theirs(config: Any, weights: Frozen, batch: Batch, dtype: Dtype) -> dict[str, Callable[[], np.ndarray]]:
    import torch

    def run(model: Any, prompts: Any, new: int = _NEW) -> Callable[[], np.ndarray]:
        model.generation_config.eos_token_id = None

        @torch.no_grad()
        def generate() -> np.ndarray:
            return model.generate(**prompts, max_new_tokens=new, do_sample=False)[:, -new:].numpy()

        return generate

    beside, other = (Peer(config, weights, batch, dtype) for _ in range(2))
    merged, prompts = other.model.merge_and_unload(), beside.prompts
    runs = {"beside": run(beside.model, prompts), "merged": run(merged, prompts)}
    return runs | ({"prompt": run(merged, prompts, 1)} if config.causal else {})


if __name__ == "__main__":
    main()
