"""Routing without labels: routers of 24 modules on new tasks, and on the tasks of the modules themselves.

    python experiments/routing.py                    # the tables of the rows in OUT
    python experiments/routing.py --measure          # measures what is missing of the string tasks
    python experiments/routing.py --tasks FOLDER     # measures what is missing of language, and the times

The design is Part 2 of experiments/warm_starts.md. Written to OUT: a line of rows.jsonl for each router, pool and task,
and tables. The pools are those of experiments/pool_value.py and pool_value_language.py, which has FOLDER and the
targets of language. Interrupted, the same command continues.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import _script
import jax
import jax.numpy as jnp
import numpy as np
import pool_value_language as language
import tyro
from flax import nnx
from lab.common import ROOT, SMALL, with_interval, write_csv, write_tables
from lab.language import (
    EVALUATED_ROWS,
    NEW_TOKENS,
    SOURCES,
    UNSEEN,
    find,
    load,
    source_rows,
)
from lab.pool_cells import FUSION, TARGETS, Lab, Row
from lab.smollm2 import base
from lab.string_pools import (
    CLASSES,
    SEED,
    adapter_rows,
    design,
    pool_folder,
    test_rows,
    train_rows,
)
from string_tasks import draw

import lorafusion_jax as lf
from lorafusion_jax.parts import open_pool
from lorafusion_jax.tasks import (
    IGNORED,
    SEPARATE_TEXTS,
    Example,
    decode,
    encode,
    exact_match,
)
from lorafusion_jax.trials import Cells, read_lines

POOLS = ("1", "2", "3")
LANGUAGE = "language"
FAMILIES = (
    UNSEEN["near"] | UNSEEN["far"] | dict.fromkeys(language.DRAWN_FROM, "extraction")
)
# rows of a module's own task, and the purpose of their draw
OWN_ROWS = 20
_OWN = 5
BASE = "base"
SINGLE = "best single module, 20 labels"
UNIFORM = "uniform"
NEAREST = ("nearest", "nearest, top 3")
DIVERGENCE = "divergence"
ARROW = {"arrow, top 3": 3, "arrow, all": 24}
SPECTRAL = {"spectral, top 3": 3, "spectral, all": 24}
ROUTERS = (UNIFORM, *NEAREST, *ARROW, *SPECTRAL, DIVERGENCE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      measure: measure the missing cells of the string tasks.
      tasks: folder of the function-vector data sets, also in subfolders, to measure language.
      out: folder of results.
      pools: folder of the trained pools of the string tasks.
      pool: folder of the adapters of language.
    """

    measure: bool = False
    tasks: Path | None = None
    out: Path = ROOT / "results" / "routing"
    pools: Path = ROOT / "runs" / "pool_value" / "pools"
    pool: Path = language.Options.pool


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
    watched: bool = dataclasses.field(default=False, metadata={"static": True})

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        read = jnp.einsum("btd,ndr->btnr", x, self.A)
        if self.kind == "rows":
            c = jnp.broadcast_to(self.of[:, None], read.shape[:-1])
        else:
            if self.kind == "arrow":
                score = jnp.abs(jnp.einsum("btd,nd->btn", x, self.of))
            else:
                score = jnp.sqrt(
                    jnp.maximum(
                        jnp.einsum("btnr,nrs,btns->btn", read, self.of, read), 0.0
                    )
                )
            least = jnp.take(
                jnp.sort(score, axis=-1, descending=True), self.k[None] - 1, axis=-1
            )
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

    def adapters(
        self, kind: str, of: Mapping[str, jax.Array], k: int = 0
    ) -> dict[str, Any]:
        pool = self.pool
        of_sites: dict[str, Any] = {
            site: (pool.A[site], pool.B[site], of[site]) for site in pool.rank
        }
        return {
            s: Routed(A, B, own, jnp.full(len(A), k), kind)
            for s, (A, B, own) in of_sites.items()
        }

    def of_rows(self, c: jax.Array) -> dict[str, Any]:
        of = {
            site: jnp.broadcast_to(c, (len(rank), *c.shape))
            for site, rank in self.pool.rank.items()
        }
        return self.adapters("rows", of)


@jax.jit
def _leading(A: jax.Array, B: jax.Array) -> jax.Array:
    q, r = jnp.linalg.qr(A)
    return (q @ jnp.linalg.svd(r @ B, full_matrices=False)[0])[..., 0]


Examples = Sequence[Example]


class Strings:
    """The small T5, its pools and the string tasks."""

    text_format = SEPARATE_TEXTS
    most_new = 0

    def __init__(self, pools: Path):
        self.lab = Lab(pools)
        self.pools = pools
        self.graph, self.base, self.tokenizer = (
            self.lab.graph,
            self.lab.base,
            self.lab.tokenizer,
        )

    def pool(self, name: str) -> lf.LoraPool:
        return open_pool(
            pool_folder(self.pools, name, shuffled=False), str(SMALL / "base")
        ).load()

    def rows(
        self, own: bool, pool: str, name: str
    ) -> tuple[Examples, Examples, set[str]]:
        """Return rows that trained a module, or 20 with labels, those to measure, and the names of related modules."""
        modules = {task.name: task for task in design().pools[pool]}
        if own:
            trained = adapter_rows(modules[name], pool, shuffled=False)
            test = draw(
                modules[name],
                OWN_ROWS,
                (SEED, _OWN),
                exclude={row["context"] for row in trained},
            )
            return _examples(trained), _examples(test), {name}
        task = TARGETS[name].task
        related = {other for other, of in modules.items() if {*of} & {*task}}
        return _examples(train_rows(task, 1)[:20]), _examples(test_rows(task)), related


class Language:
    """SmolLM2, its pool and the tasks of language."""

    most_new = NEW_TOKENS

    def __init__(self, pool: Path, tasks: Path):
        model = language.Lab(base(), pool).model(language.ZERO, 0)
        self.folder = pool
        self.tasks = tasks
        self.text_format = model.text_format
        self.graph = model.problem.graph
        self.base = model.problem.frozen.base
        self.tokenizer = model.tokenizer
        self.paths, _ = language.draw(tasks, ROOT / "runs" / "pool_value" / "language")

    def pool(self, name: str) -> lf.LoraPool:
        return open_pool(self.folder, str(base())).load()

    def rows(
        self, own: bool, pool: str, name: str
    ) -> tuple[Examples, Examples, set[str]]:
        if own:
            path = find(name, self.tasks)
            task = load(path, source_rows(path))
            return task.train, task.test[:OWN_ROWS], {name}
        task = load(self.paths[name])
        return (
            task.train[:20],
            task.test[:EVALUATED_ROWS],
            {*SOURCES.get(FAMILIES.get(name, ""), ())},
        )


def _examples(rows: Sequence[Mapping[str, str]]) -> Examples:
    return [Example(row["context"], row["completion"]) for row in rows]


class Routing:
    """The measurements of a set of tasks."""

    def __init__(self, of: Strings | Language):
        self.set, self.modules = of, functools.cache(self._modules)

        def scores(
            base: nnx.State, batch: lf.Batch, adapters: Any
        ) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(of.graph, base)
            logits = model.label_logits(
                batch.input_ids, batch.input_mask, batch.labels, adapters
            )
            log_p = jax.nn.log_softmax(logits)
            real = batch.labels >= 0
            of_labels = jnp.take_along_axis(
                log_p, jnp.where(real, batch.labels, 0)[..., None], axis=-1
            )[..., 0]
            return -jnp.sum(of_labels * real) / jnp.sum(real), log_p[:, 0]

        def answers(
            base: nnx.State, batch: lf.Batch, adapters: Any, tokens: int
        ) -> jax.Array:
            return lf.generate(
                nnx.merge(of.graph, base),
                batch.input_ids,
                batch.input_mask,
                adapters,
                max_new_tokens=tokens,
            )

        def hidden(base: nnx.State, ids: jax.Array, mask: jax.Array) -> jax.Array:
            model: Any = nnx.merge(of.graph, base)
            if model.config.causal:
                states = model.norm(model._run(ids, [model._of_rows(mask)], {})[0])
            else:
                states = model.encode(ids, mask, {})
            return (
                jnp.sum(states * mask[..., None], axis=1)
                / jnp.sum(mask, axis=1)[:, None]
            )

        self.scores = partial(jax.jit(scores), of.base)
        self.hidden = partial(jax.jit(hidden), of.base)
        self.answers = partial(jax.jit(answers, static_argnames="tokens"), of.base)

    def _modules(self, name: str, rotated: bool) -> Modules:
        """Return a pool, or its copy with singular vectors drawn at random."""
        if rotated:
            pool = lf.rotated_pool(self.modules(name, False).pool, jax.random.key(1))
            centres = self.modules(name, False).centres
        else:
            pool = self.set.pool(name)
            batches = [
                self.batch(self.set.rows(True, name, module)[0][:100])
                for module in pool.names
            ]
            centres = jnp.stack(
                [
                    self.hidden(of.input_ids, of.input_mask).mean(axis=0)
                    for of in batches
                ]
            )
        leading = {site: _leading(pool.A[site], pool.B[site]) for site in pool.rank}
        grams = {
            site: jnp.einsum("lnro,lnso->lnrs", B, B) for site, B in pool.B.items()
        }
        return Modules(pool, leading, grams, centres)

    def batch(self, examples: Examples) -> lf.Batch:
        """Return a batch; sources, answers and both are of different widths, and few in all."""
        tokens = encode(
            self.set.tokenizer,
            examples,
            self.set.text_format,
            new_tokens=self.set.most_new,
        )

        def padded(rows: Sequence[np.ndarray], more: int, value: int) -> np.ndarray:
            width = more + 8 * -(-(max(map(len, rows)) - more) // 8)
            return np.stack(
                [
                    np.pad(row, (0, width - len(row)), constant_values=value)
                    for row in rows
                ]
            )

        ids = padded(tokens.inputs, 4, 0)
        labels = padded(tokens.labels, 0, IGNORED)
        mask = padded([np.ones_like(row) for row in tokens.inputs], 4, 0) > 0
        return lf.Batch(ids, mask, labels, np.ones(len(ids), bool))

    def router(
        self, name: str, modules: Modules, batch: lf.Batch, single: int = 0
    ) -> dict[str, Any]:
        """Return the adapters of a router for a batch, or those of a single module."""
        rows = len(batch.input_ids)
        count = len(modules.pool)
        if name == BASE:
            return {}
        if name in ARROW | SPECTRAL:
            kind, of = (
                ("arrow", modules.leading)
                if name in ARROW
                else ("spectral", modules.grams)
            )
            return modules.adapters(kind, of, (ARROW | SPECTRAL)[name])
        c = jnp.full((rows, count), 1 / count)
        if name == SINGLE:
            c = jnp.zeros((rows, count)).at[:, single].set(1)
        elif name in NEAREST:
            mean = self.hidden(batch.input_ids, batch.input_mask)
            k = 1 + 2 * NEAREST.index(name)
            unit = [
                x / jnp.linalg.norm(x, axis=1, keepdims=True)
                for x in (mean, modules.centres)
            ]
            cosine = jnp.matmul(unit[0], unit[1].T, precision="highest")
            c = (cosine >= jnp.sort(cosine, axis=1)[:, -k, None]) / k
        elif name == DIVERGENCE:
            first = batch._replace(labels=batch.labels[:, :1])
            _, of_base = self.scores(first, {})
            own = [
                self.scores(first, self.router(SINGLE, modules, batch, n))[1]
                for n in range(count)
            ]
            divergence = jnp.stack(
                [jnp.sum(jnp.exp(p) * (p - of_base), axis=-1) for p in own], axis=1
            )
            c = divergence / jnp.sum(divergence, axis=1, keepdims=True)
        return modules.of_rows(c)

    def measure(self, what: str, pool: str, task: str, router: str) -> Row:
        """Return a router's loss on rows of a task, the share of related modules, and exact match on a target."""
        modules, (few, test, related) = (
            self.modules(pool, what == "rotated"),
            self.set.rows(what == "own", pool, task),
        )
        places = [
            place
            for place, module in enumerate(modules.pool.names)
            if module in related
        ]
        batch = self.batch(test)
        single = places[0] if what == "own" else 0
        if router == SINGLE and what == "use":
            labelled = self.batch(few)
            of_each = (
                self.router(SINGLE, modules, labelled, n)
                for n in range(len(modules.pool))
            )
            single = int(
                np.argmin(
                    [float(self.scores(labelled, adapters)[0]) for adapters in of_each]
                )
            )
        adapters = self.router(router, modules, batch, single)
        loss, share = self.shares(batch, adapters)
        row: Row = {"loss": loss}
        if router in ROUTERS and places and what != "rotated":
            row["share"] = round(float(share[:, places].sum(axis=1).mean()), 4)
            row["first"] = float(np.isin(share.argmax(axis=1), places).mean())
        if what != "own":
            answers = self.answers(
                batch, adapters, tokens=self.set.most_new or batch.labels.shape[1]
            )
            said = decode(self.set.tokenizer, np.asarray(answers), self.set.text_format)
            row["exact_match"] = 100 * float(
                exact_match([said], [example.target for example in test]).mean()
            )
        return row

    def shares(
        self, batch: lf.Batch, adapters: dict[str, Any]
    ) -> tuple[float, np.ndarray]:
        """Return the loss, and the share of each module in the coefficients of each row."""
        _SEEN.clear()
        watched = {
            site: dataclasses.replace(routed, watched=True)
            for site, routed in adapters.items()
        }
        loss = round(float(self.scores(batch, watched)[0]), 5)
        jax.effects_barrier()
        source = np.asarray(batch.input_mask)
        target = np.asarray(batch.labels) >= 0
        # A decoder's prompts are at the right end of their columns, with the answers behind them.
        both = np.concatenate([np.sort(source, axis=1), target[:, :-1]], axis=1)
        masks = {mask.shape[1]: mask for mask in (source, target, both)}
        seen = [
            (np.asarray(c) * masks[c.shape[1]][..., None]).sum(axis=1) for c in _SEEN
        ]
        total = np.sum(seen, axis=0) if seen else np.ones((len(source), 1))
        return loss, total / total.sum(axis=1, keepdims=True)

    def times(self, pool: str, task: str) -> list[list[str]]:
        """Return CPU times of a batch whose rows have coefficients each, and of the passes before it."""
        modules = self.modules(pool, False)
        batch = self.batch(self.set.rows(False, pool, task)[1][:16])
        mixed = modules.of_rows(
            jnp.zeros((16, len(modules.pool)))
        )  # as the base, whose answers do not end
        parts: dict[str, Callable[[], Any]] = {
            "prompts": lambda: self.answers(batch, mixed, tokens=1),
            "prompts and 12 tokens": lambda: self.answers(
                batch, mixed, tokens=NEW_TOKENS
            ),
            **{
                name: partial(self.router, name, modules, batch)
                for name in (NEAREST[0], DIVERGENCE)
            },
        }
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        for _, (name, part) in itertools.product(range(4), parts.items()):
            began = time.process_time()
            jax.block_until_ready(part())
            seconds[name].append(time.process_time() - began)
        of = {
            name: median(rounds[1:]) for name, rounds in seconds.items()
        }  # the first round compiles
        whole = of["prompts"], of["prompts and 12 tokens"] - of["prompts"]
        lines = [
            [name, f"{s:.2f}", *(f"{100 * s / part:.0f}" for part in whole)]
            for name, s in of.items()
        ]
        return [
            ["16 rows", "CPU s", "of the prompts, %", "of 11 tokens more, %"],
            *lines,
        ]


def key_of(row: Row) -> tuple[str, str, str, str]:
    return row["what"], row["pool"], row["task"], row["router"]


@functools.cache
def _language_rows() -> list[Row]:
    return read_lines(language.RESULTS / "language.jsonl")


def tasks_of(pool: str) -> tuple[list[str], list[str]]:
    """Return the names of a pool's targets, and those of its modules."""
    if pool == LANGUAGE:
        return [*dict.fromkeys(row["task"] for row in _language_rows())], [
            *language.ADAPTERS
        ]
    return [name for name, target in TARGETS.items() if target.pool == pool], [
        task.name for task in design().pools[pool]
    ]


def cells(pools: Sequence[str] = POOLS) -> Iterator[tuple[str, str, str, str]]:
    """Yield the keys of all cells: targets, own tasks, and targets with rotated modules."""
    for what, routers in (
        ("use", (BASE, SINGLE, *ROUTERS)),
        ("own", (BASE, SINGLE, *ROUTERS)),
        ("rotated", ROUTERS),
    ):
        for router, pool in itertools.product(routers, pools):
            yield from (
                (what, pool, task, router) for task in tasks_of(pool)[what == "own"]
            )


def measure(routing: Routing, pools: Sequence[str], file: Path) -> None:
    """Measure the missing cells."""

    def of(missing: Sequence[tuple[str, str, str, str]]) -> Iterator[Row]:
        for key in missing:
            began = time.process_time()
            row = dict(
                zip(("what", "pool", "task", "router"), key, strict=True)
            ) | routing.measure(*key)
            if key[0] != "own" and key[1] in POOLS:
                row["relevance"] = TARGETS[key[2]].relevance
            yield row | {"cpu_seconds": round(time.process_time() - began, 2)}

    Cells(file, key_of).fill(
        cells(pools), of, lambda row: f"{key_of(row)}: {row['cpu_seconds']} CPU s"
    )


def tables(
    rows: Sequence[Row], pools: Sequence[str] = POOLS
) -> dict[str, list[list[str]]]:
    """Return the tables of the rows whose cells all exist."""
    own = [
        [
            "router",
            "share to the own module",
            "own module first, %",
            "loss",
            "minus uniform",
            "95 % interval",
        ]
    ]
    use = [
        [
            "modules",
            "router",
            "loss",
            "exact match, %",
            "minus uniform, nats",
            "95 % interval",
        ]
    ]
    use[0] += ["minus base, nats", "95 % interval"]
    related = [
        [
            "router",
            "tasks",
            "share to related modules",
            "minus uniform",
            "95 % interval",
        ]
    ]
    classes = [["router", *(f"minus uniform, {relevance}" for relevance in CLASSES)]]
    found = {key_of(row): row for row in rows}
    for what, router in itertools.product(
        ("own", "use", "rotated"), (BASE, SINGLE, *ROUTERS)
    ):
        keys = [key for key in cells(pools) if (key[0], key[3]) == (what, router)]
        here = [
            found[key] for key in keys if {key, (*key[:3], UNIFORM)} <= found.keys()
        ]
        if not here or len(here) < len(keys):
            continue

        def minus(
            other: str,
            value: str = "loss",
            what: str = what,
            here: Sequence[Row] = here,
        ) -> list[float]:
            """Return the difference from another router of each task that has this value."""
            of = "use" if other == BASE else what
            return [
                r[value] - found[of, r["pool"], r["task"], other][value]
                for r in here
                if value in r
            ]

        more = minus(UNIFORM)
        loss = f"{fmean(row['loss'] for row in here):.3f}"
        contrast = with_interval(more, 3)
        if what == "own":
            label = "own module alone" if router == SINGLE else router
            shares = ["-", "-"]
            if "share" in here[0]:
                shares = [
                    f"{fmean(r['share'] for r in here):.3f}",
                    f"{100 * fmean(r['first'] for r in here):.0f}",
                ]
            own.append([label, *shares, loss, *contrast])
            continue
        match = f"{fmean(row['exact_match'] for row in here):.1f}"
        kind = "rotated" if what == "rotated" else "real"
        use.append(
            [kind, router, loss, match, *contrast, *with_interval(minus(BASE), 3)]
        )
        if shares := [row["share"] for row in here if "share" in row]:
            gain = with_interval(minus(UNIFORM, "share"), 3)
            related.append([router, str(len(shares)), f"{fmean(shares):.3f}", *gain])
        if what == "use" and "relevance" in here[0]:
            by_class = [
                [d for row, d in zip(here, more, strict=True) if row["relevance"] == r]
                for r in CLASSES
            ]
            classes.append(
                [
                    router,
                    *(" (".join(with_interval(values, 3)) + ")" for values in by_class),
                ]
            )
    for number in (5, 20, 95):
        measured = (
            _language_rows()
            if LANGUAGE in pools
            else read_lines(language.RESULTS / f"rows_{number}.jsonl")
        )
        if fused := [
            row for row in measured if (row["arm"], row["rows"]) == (FUSION, number)
        ]:
            loss = fmean(row["test_loss"] for row in fused)
            match = fmean(row["exact_match"] for row in fused)
            use.append(
                [
                    "real",
                    f"LoRAFusion, {number} rows",
                    f"{loss:.3f}",
                    f"{match:.1f}",
                    *"----",
                ]
            )
    of_all = {"own": own, "use": use, "related": related, "classes": classes}
    return {name: lines for name, lines in of_all.items() if len(lines) > 1}


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, and write the tables."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    file = options.out / "rows.jsonl"
    if options.measure:
        measure(Routing(Strings(options.pools)), POOLS, file)
    if options.tasks is not None:
        routing = Routing(Language(options.pool, options.tasks))
        measure(routing, [LANGUAGE], file)
        write_csv(
            options.out / "language_times.csv",
            routing.times(LANGUAGE, "english-spanish"),
        )
    rows = read_lines(file)
    write_tables(options.out, tables(rows))
    write_tables(options.out, tables(rows, [LANGUAGE]), "language_")


if __name__ == "__main__":
    _script.run(main)
