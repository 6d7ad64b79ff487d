"""Routing without labels: routers of 24 modules on the 30 string tasks, and on the tasks of the modules themselves.

    python experiments/routing.py              # the tables of the rows in OUT
    python experiments/routing.py --measure    # measures what is missing

The design is Part 2 of experiments/warm_starts.md. Written to OUT: a line of rows.jsonl for each router, pool and task,
and tables. The pools are those of experiments/pool_value.py. Interrupted, the same command continues.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import _script
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from lab.common import ROOT, SMALL, with_interval, write_tables
from lab.pool_cells import FUSION, TARGET_WIDTHS, Lab, Row
from lab.string_pools import CLASSES, SEED, Target, adapter_rows, design, pool_folder, train_rows
from string_tasks import Task, draw

import lorafusion_jax as lf
from lorafusion_jax.parts import open_pool
from lorafusion_jax.tasks import IGNORED, SEPARATE_TEXTS, Example, decode, encode, exact_match
from lorafusion_jax.trials import Cells, read_lines

POOLS = ("1", "2", "3")
OWN_ROWS, _OWN = 20, 5  # rows of a module's own task, and the purpose of their draw
BASE, SINGLE, UNIFORM = "base", "best single module, 20 labels", "uniform"
NEAREST = ("nearest", "nearest, top 3")
DIVERGENCE = "divergence"
ARROW, SPECTRAL = {"arrow, top 3": 3, "arrow, all": 24}, {"spectral, top 3": 3, "spectral, all": 24}
ROUTERS = (UNIFORM, *NEAREST, DIVERGENCE, *ARROW, *SPECTRAL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      measure: measure the missing cells.
      out: folder of results.
      pools: folder of the trained pools.
    """

    measure: bool = False
    out: Path = ROOT / "results" / "routing"
    pools: Path = ROOT / "runs" / "pool_value" / "pools"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed:
    """Modules A [N, d_in, r], B [N, r, d_out] whose coefficients come from a router.

    `rows`: `of` has coefficients [B, N]. `arrow`: `of` has the leading singular vector of each update [N, d_in], and
    the score is |x v|. `spectral`: `of` has B B^T [N, r, r], and the score is ||x A B||. A softmax is over the top k.
    """

    A: jax.Array
    B: jax.Array
    of: jax.Array
    k: jax.Array
    kind: str = dataclasses.field(metadata={"static": True})
    watched: bool = dataclasses.field(metadata={"static": True})

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        read = jnp.einsum("btd,ndr->btnr", x, self.A)
        if self.kind == "rows":
            c = jnp.broadcast_to(self.of[:, None], read.shape[:-1])
        else:
            if self.kind == "arrow":
                score = jnp.abs(jnp.einsum("btd,nd->btn", x, self.of))
            else:
                score = jnp.sqrt(jnp.maximum(jnp.einsum("btnr,nrs,btns->btn", read, self.of, read), 0.0))
            least = jnp.take(jnp.sort(score, axis=-1, descending=True), self.k[None] - 1, axis=-1)
            c = jax.nn.softmax(jnp.where(score >= least, score, -jnp.inf), axis=-1)
        if self.watched:
            jax.debug.callback(_SEEN.append, c)
        return x @ kernel + jnp.einsum("btnr,btn,nro->bto", read, c, self.B)


_SEEN: list[Any] = []


class Modules(NamedTuple):
    """A pool, with what its routers are computed from."""

    pool: lf.LoraPool
    leading: dict[str, jax.Array]
    grams: dict[str, jax.Array]
    centres: jax.Array

    def adapters(self, kind: str, of: Mapping[str, jax.Array], k: int = 0, *, watched: bool = False) -> dict[str, Any]:
        pool = self.pool
        of_sites: dict[str, Any] = {site: (pool.A[site], pool.B[site], of[site]) for site in pool.rank}
        return {s: Routed(A, B, own, jnp.full(len(A), k), kind, watched) for s, (A, B, own) in of_sites.items()}

    def of_rows(self, c: jax.Array, *, watched: bool = False) -> dict[str, Any]:
        of = {site: jnp.broadcast_to(c, (len(rank), *c.shape)) for site, rank in self.pool.rank.items()}
        return self.adapters("rows", of, watched=watched)


@jax.jit
def _leading(A: jax.Array, B: jax.Array) -> jax.Array:
    q, r = jnp.linalg.qr(A)
    return (q @ jnp.linalg.svd(r @ B, full_matrices=False)[0])[..., 0]


class Routing:
    """The base, the pools and the measurements."""

    def __init__(self, pools: Path):
        self.lab = lab = Lab(pools)
        self.pools: dict[str, Modules] = {}

        def scores(base: nnx.State, batch: lf.Batch, adapters: Any) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(lab.graph, base)
            logits = model.label_logits(batch.input_ids, batch.input_mask, batch.labels, adapters)
            log_p, real = jax.nn.log_softmax(logits), batch.labels >= 0
            of_labels = jnp.take_along_axis(log_p, jnp.where(real, batch.labels, 0)[..., None], axis=-1)[..., 0]
            return -jnp.sum(of_labels * real) / jnp.sum(real), log_p[:, 0]

        def answers(base: nnx.State, batch: lf.Batch, adapters: Any, tokens: int) -> jax.Array:
            return lf.generate(
                nnx.merge(lab.graph, base), batch.input_ids, batch.input_mask, adapters, max_new_tokens=tokens
            )

        def hidden(base: nnx.State, ids: jax.Array, mask: jax.Array) -> jax.Array:
            model: Any = nnx.merge(lab.graph, base)
            states = model.encode(ids, mask, {})
            return jnp.sum(states * mask[..., None], axis=1) / jnp.sum(mask, axis=1)[:, None]

        self.scores, self.hidden = partial(jax.jit(scores), lab.base), partial(jax.jit(hidden), lab.base)
        self.answers = partial(jax.jit(answers, static_argnames="tokens"), lab.base)

    def modules(self, name: str, *, rotated: bool) -> Modules:
        """Return a pool, or its copy with singular vectors drawn at random."""
        key = f"{name}, rotated" if rotated else name
        if key not in self.pools:
            pool = open_pool(pool_folder(self.lab.pools, name, shuffled=False), str(SMALL / "base")).load()
            tasks = {task.name: task for task in design().pools[name]}
            centres = []
            for task in pool.names:
                batch = self.batch(adapter_rows(tasks[task], name, shuffled=False)[:100])
                centres.append(self.hidden(batch.input_ids, batch.input_mask).mean(axis=0))
            pool = lf.rotated_pool(pool, jax.random.key(1)) if rotated else pool
            leading = {site: _leading(pool.A[site], pool.B[site]) for site in pool.rank}
            grams = {site: jnp.einsum("lnro,lnso->lnrs", B, B) for site, B in pool.B.items()}
            self.pools[key] = Modules(pool, leading, grams, jnp.stack(centres))
        return self.pools[key]

    def batch(self, rows: Sequence[Mapping[str, str]]) -> lf.Batch:
        tokens = encode(self.lab.tokenizer, [Example(row["context"], row["completion"]) for row in rows])
        width = next(w for w in (*TARGET_WIDTHS, 2 * TARGET_WIDTHS[-1]) if w >= max(map(len, tokens.labels)))
        return self.lab._batch(
            tokens.inputs, [np.pad(row, (0, width - len(row)), constant_values=IGNORED) for row in tokens.labels]
        )

    def router(self, name: str, modules: Modules, batch: lf.Batch, *, watched: bool = False) -> dict[str, Any]:
        """Return the adapters of a router for a batch."""
        rows, count = len(batch.input_ids), len(modules.pool)
        if name in ARROW | SPECTRAL:
            kind, of = ("arrow", modules.leading) if name in ARROW else ("spectral", modules.grams)
            return modules.adapters(kind, of, (ARROW | SPECTRAL)[name], watched=watched)
        c = jnp.full((rows, count), 1 / count)
        if name in NEAREST:
            mean, k = self.hidden(batch.input_ids, batch.input_mask), 1 + 2 * NEAREST.index(name)
            unit = [x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (mean, modules.centres)]
            cosine = jnp.matmul(unit[0], unit[1].T, precision="highest")
            c = (cosine >= jnp.sort(cosine, axis=1)[:, -k, None]) / k
        elif name == DIVERGENCE:
            _, base = self.scores(batch, {})
            own = [
                self.scores(batch, modules.of_rows(jnp.zeros((rows, count)).at[:, n].set(1)))[1] for n in range(count)
            ]
            divergence = jnp.stack([jnp.sum(jnp.exp(p) * (p - base), axis=-1) for p in own], axis=1)
            c = divergence / jnp.sum(divergence, axis=1, keepdims=True)
        return modules.of_rows(c, watched=watched)

    def use(self, name: str, target: Target, *, rotated: bool) -> Row:
        """Return loss and exact match of a router on the test rows of a target."""
        modules, (_, batch, texts) = self.modules(target.pool, rotated=rotated), self.lab.tokens(target.task)
        adapters: dict[str, Any] = {}
        if name == SINGLE:
            labelled, count = self.batch(train_rows(target.task, 1)[:20]), len(modules.pool)
            one = jnp.eye(count)[:, None]
            losses = [float(self.scores(labelled, modules.of_rows(jnp.repeat(c, 20, axis=0)))[0]) for c in one]
            adapters = modules.of_rows(jnp.repeat(one[int(np.argmin(losses))], len(batch.input_ids), axis=0))
        elif name != BASE:
            adapters = self.router(name, modules, batch)
        loss, said = self.scores(batch, adapters)[0], self.answers(batch, adapters, tokens=batch.labels.shape[1])
        wanted = [row["completion"] for row in texts]
        match = exact_match([decode(self.lab.tokenizer, np.asarray(said), SEPARATE_TEXTS)], wanted)
        return {"loss": round(float(loss), 5), "exact_match": 100 * float(match.mean())}

    def own(self, name: str, task: Task, pool: str) -> Row:
        """Return the loss on rows of a module's own task, the share sent to it, and how often it has the largest."""
        modules, trained = self.modules(pool, rotated=False), adapter_rows(task, pool, shuffled=False)
        rows = draw(task, OWN_ROWS, (SEED, _OWN), exclude={row["context"] for row in trained})
        batch, place = self.batch(rows), modules.pool.names.index(task.name)
        if name in (BASE, SINGLE):
            one = jnp.zeros((OWN_ROWS, len(modules.pool))).at[:, place].set(1)
            return {"loss": round(float(self.scores(batch, modules.of_rows(one) if name == SINGLE else {})[0]), 5)}
        _SEEN.clear()
        loss, _ = self.scores(batch, self.router(name, modules, batch, watched=True))
        jax.block_until_ready(loss)
        jax.effects_barrier()
        masks = {mask.shape[1]: mask for mask in (batch.input_mask, batch.labels >= 0)}
        total = np.sum([(np.asarray(c) * masks[c.shape[1]][..., None]).sum(axis=1) for c in _SEEN], axis=0)
        share = total / total.sum(axis=1, keepdims=True)
        first = float((share.argmax(axis=1) == place).mean())
        return {"loss": round(float(loss), 5), "share": round(float(share[:, place].mean()), 4), "first": first}


def key_of(row: Row) -> tuple[str, str, str, str]:
    return row["what"], row["pool"], row["task"], row["router"]


def cells() -> Iterator[tuple[str, str, str, str]]:
    """Yield the keys of all cells: targets, own tasks, and targets with rotated modules."""
    for target in (target for target in design().targets if target.pool in POOLS):
        yield from (("use", target.pool, target.task.name, router) for router in (BASE, SINGLE, *ROUTERS))
    for pool in POOLS:
        for task, router in itertools.product(design().pools[pool], (BASE, SINGLE, *ROUTERS)):
            yield "own", pool, task.name, router
    for target in (target for target in design().targets if target.pool in POOLS):
        yield from (("rotated", target.pool, target.task.name, router) for router in ROUTERS)


def measure(pools: Path, file: Path) -> None:
    """Measure the missing cells."""
    routing = Routing(pools)
    targets = {target.task.name: target for target in design().targets}

    def of(missing: Sequence[tuple[str, str, str, str]]) -> Iterator[Row]:
        for what, pool, task, router in missing:
            began = time.process_time()
            if what == "own":
                found = routing.own(router, next(t for t in design().pools[pool] if t.name == task), pool)
            else:
                found = routing.use(router, targets[task], rotated=what == "rotated")
                found["relevance"] = targets[task].relevance
            key = {"what": what, "pool": pool, "task": task, "router": router}
            yield key | found | {"cpu_seconds": round(time.process_time() - began, 2)}

    Cells(file, key_of).fill(cells(), of, lambda row: f"{key_of(row)}: {row['cpu_seconds']} CPU s")


def tables(rows: Sequence[Row]) -> dict[str, list[list[str]]]:
    """Return the tables of the rows whose cells all exist."""
    own = [["router", "share to the own module", "own module first, %", "loss", "minus uniform", "95 % interval"]]
    use = [["modules", "router", "loss", "exact match, %", "minus uniform, nats", "95 % interval"]]
    classes = [["router", *(f"minus uniform, {relevance}" for relevance in CLASSES)]]
    found = {key_of(row): row for row in rows}
    for what, router in itertools.product(("own", "use", "rotated"), (BASE, SINGLE, *ROUTERS)):
        here = [found[key] for key in cells() if (key[0], key[3]) == (what, router) and key in found]
        if not here or len(here) < len([key for key in cells() if (key[0], key[3]) == (what, router)]):
            continue
        more = [row["loss"] - found[what, row["pool"], row["task"], UNIFORM]["loss"] for row in here]
        loss, contrast = f"{fmean(row['loss'] for row in here):.3f}", with_interval(more, 3)
        if what == "own":
            label = "own module alone" if router == SINGLE else router
            shares = ["-", "-"]
            if "share" in here[0]:
                shares = [f"{fmean(r['share'] for r in here):.3f}", f"{100 * fmean(r['first'] for r in here):.0f}"]
            own.append([label, *shares, loss, *contrast])
            continue
        use.append(
            [
                "rotated" if what == "rotated" else "real",
                router,
                loss,
                f"{fmean(row['exact_match'] for row in here):.1f}",
                *contrast,
            ]
        )
        if what == "use":
            by_class = [[d for row, d in zip(here, more, strict=True) if row["relevance"] == r] for r in CLASSES]
            classes.append([router, *(" (".join(with_interval(values, 3)) + ")" for values in by_class)])
    for number in (5, 20, 95):
        fused = [row for row in read_lines(ROOT / f"results/pool_value/rows_{number}.jsonl") if row["arm"] == FUSION]
        scores = (
            f"{fmean(row[value] for row in fused):.{digits}f}"
            for value, digits in (("test_loss", 3), ("exact_match", 1))
        )
        use.append(["real", f"LoRAFusion, {number} rows", *scores, "-", "-"])
    return {"own": own, "use": use, "classes": classes}


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, and write the tables."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    file = options.out / "rows.jsonl"
    if options.measure:
        measure(options.pools, file)
    write_tables(options.out, tables(read_lines(file)))


if __name__ == "__main__":
    _script.run(main)
