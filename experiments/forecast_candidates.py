"""Can the forecast use a backward pass better? Candidates of features, computed on string tasks.

    python experiments/forecast_candidates.py --half fit --pools POOLS --out fit.npz
    python experiments/forecast_candidates.py --half language --pools ADAPTERS --tasks FOLDER --out language.npz
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
from lab.language import TUNING, load
from lab.pool_cells import SEEDS, SOURCE_WIDTH
from lab.smollm2 import base as smollm2
from lab.string_pools import design, pool_folder, train_rows
from pool_value_language import SEEDS as LANGUAGE_SEEDS
from pool_value_language import draw, setup_of

from lorafusion_jax.tasks import IGNORED, Batch, Example, encode, pad
from lorafusion_jax.training.fit import start
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
    def run(half: Literal["fit", "test", "language"], pools: Path, out: Path, tasks: Path = Path()) -> None:
        if half == "language":
            of_language(pools, tasks, out)
            return
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


def of_language(pool: Path, tasks: Path, out: Path) -> None:
    """Write the gradients of each fold for real modules and rotated copies."""
    model, problems = ranked(smollm2(), pool)
    problems = [p.replace(index=p.index[0]) for p in problems]
    paths, _ = draw(tasks, ROOT / "runs" / "pool_value" / "language")
    keys = [key for key in itertools.product(paths, LANGUAGE_SEEDS) if key[0] not in TUNING]
    sets = {key: setup_of(model, load(paths[key[0]]), 20, key[1], 0).train for key in keys}
    wide = [max(len(row) for own in sets.values() for row in part(own)) for part in (inputs_of, labels_of)]
    zeros = jnp.zeros(start(problems[0].replace(index=problems[0].index[None]), (0,)).params["coefficients"].shape[1:])
    found = []
    for key in keys:
        rows = sets[key]
        ids = pad(rows.inputs[:20], model.tokenizer.pad_token_id, wide[0])
        mask = np.arange(wide[0]) < np.array([len(row) for row in rows.inputs[:20]])[:, None]
        labels = np.stack([np.pad(r, (0, wide[1] - len(r)), constant_values=IGNORED) for r in rows.labels[:20]])
        flat = Batch(ids, mask, labels.astype(np.int32), np.ones(20, bool))
        folds = jax.tree.map(lambda leaf: leaf.reshape(FOLDS, -1, *leaf.shape[1:]), flat)
        tokens = (labels != IGNORED).reshape(FOLDS, -1).sum(axis=1)
        losses, G = zip(*[map(np.asarray, gradients(folds, problem, zeros)) for problem in problems], strict=True)
        found.append((tokens, np.stack(losses), np.stack(G)))
        print(key, wide, file=sys.stderr, flush=True)
    tokens, losses, G = map(np.stack, zip(*found, strict=True))
    names, seeds = map(np.array, zip(*keys, strict=True))
    np.savez(out, tasks=names, seeds=seeds, tokens=tokens, loss=losses, grad=G)


def inputs_of(rows):
    return rows.inputs[:20]


def labels_of(rows):
    return rows.labels[:20]


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
