"""Can the forecast use a backward pass better? Candidates of features, computed on string tasks.

    python experiments/forecast_candidates.py --half fit
"""

import itertools
import sys
from pathlib import Path
from typing import Literal

import _script
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from forecast import SEED, DRAWS, halves, ranked
from lab.common import ROOT, SMALL, read_lines
from lab.pool_cells import SEEDS, SOURCE_WIDTH
from lab.string_pools import design, pool_folder, train_rows

from lorafusion_jax.tasks import IGNORED, Batch, Example, encode, pad
from lorafusion_jax.training.loss import batch_logits, objective

FOLDS, STEPS = 4, 0.05 * 2.0 ** np.arange(9)


def loss(c, batch, problem):
    return objective({"coefficients": c}, batch, problem, jnp.float32(0))[1]["cross_entropy"]


@jax.jit
def gradients(batches, problem, zeros):
    """Loss and gradient of each fold."""
    return jax.lax.map(lambda batch: jax.value_and_grad(loss)(zeros, batch, problem), batches)


@jax.jit
def along(direction, batch, problem, steps):
    return jax.lax.map(lambda t: loss(direction * t, batch, problem), steps)


@jax.jit
def curvature(direction, batch, problem, zeros):
    """Gauss-Newton curvature along a direction, per token."""
    logits, moved = jax.jvp(
        lambda c: batch_logits({"coefficients": c}, batch, problem)[0], (zeros,), (direction,)
    )
    p = jax.nn.softmax(logits, axis=-1)
    variance = jnp.sum(p * moved**2, axis=-1) - jnp.sum(p * moved, axis=-1) ** 2
    real = batch.labels != IGNORED
    return jnp.sum(jnp.where(real, variance, 0)) / jnp.sum(real)


def main(arguments=()) -> None:
    def run(half: Literal["fit", "test"], pools: Path, out: Path) -> None:
        cases = read_lines(ROOT / "docs/results/forecast/cases.jsonl")
        own = {case["task"] for case in halves(cases)[half == "test"]}
        found = {}
        for name in ("1", "2", "3"):
            targets = [t for t in design().targets if t.pool == name and t.task.name in own]
            model, problems = ranked(SMALL / "base", pool_folder(pools, name, shuffled=False))
            problems = [p.replace(index=p.index[0]) for p in problems]
            for target, seed in itertools.product(targets, SEEDS):
                found[target.task.name, seed] = one(model, problems, target, seed)
            print(name, file=sys.stderr, flush=True)
        keys = sorted(found)
        arrays = {k: np.stack([found[key][k] for key in keys]) for k in found[keys[0]]}
        np.savez(out, tasks=np.array([k[0] for k in keys]), seeds=np.array([k[1] for k in keys]), **arrays)

    tyro.cli(run, args=list(arguments))


def one(model, problems, target, seed):
    texts = [Example(row["context"], row["completion"]) for row in train_rows(target.task, seed)[:20]]
    rows = encode(model.tokenizer, texts, model.text_format)
    width = 8 if max(map(len, rows.labels)) <= 8 else 16
    ids = pad(rows.inputs, model.tokenizer.pad_token_id, SOURCE_WIDTH)
    mask = np.arange(SOURCE_WIDTH) < np.array([len(row) for row in rows.inputs])[:, None]
    labels = np.stack([np.pad(row, (0, width - len(row)), constant_values=IGNORED) for row in rows.labels])

    def batch(numbers):
        return Batch(ids[numbers], mask[numbers], labels[numbers].astype(np.int32), np.ones(len(numbers), bool))

    parts = np.arange(20).reshape(FOLDS, -1)
    folds = jax.tree.map(lambda *leaves: np.stack(leaves), *[batch(part) for part in parts])
    tokens = np.array([(labels[part] != IGNORED).sum() for part in parts])
    zeros = jnp.zeros((len(model.modules[0]), 4), jnp.float32)
    out = {"tokens": tokens, "grad": [], "line": [], "sign": [], "gn": [], "loss": []}
    for problem in problems:
        losses, G = map(np.asarray, gradients(folds, problem, zeros))
        line, sign, gn = [], [], []
        for k, part in enumerate(parts):
            rest = [n for n in range(FOLDS) if n != k]
            g = np.average(G[rest], axis=0, weights=tokens[rest])
            held = batch(part)
            unit = -g / np.linalg.norm(g)
            line.append(along(unit, held, problem, STEPS.astype(np.float32)))
            signs = -np.sign(g) / np.sqrt(g.size)
            sign.append(along(signs.astype(np.float32), held, problem, STEPS.astype(np.float32)))
            gn.append(curvature(unit, held, problem, zeros))
        for key, value in (("grad", G), ("line", line), ("sign", sign), ("gn", gn), ("loss", losses)):
            out[key].append(np.asarray(value))
    return {key: np.asarray(value) for key, value in out.items()}


if __name__ == "__main__":
    _script.run(main)
