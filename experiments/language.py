r"""Fusion on real language: SmolLM2 and its pool of 24 adapters, on tasks that no adapter was trained on.

    python experiments/language.py --tasks function_vectors/dataset_files                  # runs what is missing
    python experiments/language.py --tasks function_vectors/dataset_files --groups main
    python experiments/language.py --tasks function_vectors/dataset_files --adapters runs/language_second/adapters \
        --out runs/language_second --groups main --seeds 1 --methods LoRAFusion "random pool"    # of another pool

    main         prompts, mean, best module, coefficients, magnitudes, both, a random pool, a basis, LoRA
    more         constant answers, and coefficients of a random pool
    five         the trained rows of `main`, from five examples
    twenty       LoRAFusion, a random pool, magnitudes and LoRA from twenty
    examples     prompts and LoRAFusion from twenty, of which one or three stand in every prompt
    relevance    ten modules: none, one, two or all of the task's own family, and the others from other families
    more-relevance    the others are random matrices; and all of it with coefficients only

Results are rows of OUT/GROUP.jsonl; interrupted, the same command continues. Written to OUT/GROUP: tables and plots.
"""

import dataclasses
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import _script
import jax
import jax.numpy as jnp
import ml_dtypes
import tyro
from lab.common import ROOT, convert, slug
from lab.language import (
    DIRECTIONS,
    EVALUATED_ROWS,
    MAIN,
    MORE,
    SOURCES,
    TRAIN_ROWS,
    UNSEEN,
    find,
    load,
    options_of,
    trained_pairs,
    unseen,
    write_task,
)
from lab.matrix import Arm
from lab.scores import Scores, scores
from lab.smollm2 import EXAMPLES, HUB_ID, base
from results_page import report

from lorafusion_jax import LowRank, fuse, random_pool, read_config
from lorafusion_jax.io import lora_adapter, open_pool, write_adapter
from lorafusion_jax.models import dense
from lorafusion_jax.report import colour, plot
from lorafusion_jax.tasks import BETWEEN_EXAMPLES
from lorafusion_jax.trials import Job, read_rows, run_jobs

Group = Literal[
    "main", "more", "five", "twenty", "examples", "relevance", "more-relevance"
]

UNSEEN_TASKS = tuple(name for tasks in UNSEEN.values() for name in tasks)
# Tasks with a family of at least four modules in the pool, which a dose of relevant ones is drawn from.
RELEVANCE = {"prev_item": "words", "person-sport": "knowledge"}
DOSES = ("0", "1", "2", "all")
_ROWS = {
    "five": 5,
    "twenty": 20,
    "examples": 20,
}  # to learn from; in the other groups 100
# Pools that are made of adapters, the base and the tasks, linked: rows of any OUT and machine name the same files.
FOLDER = ROOT / "runs" / "smollm2"
_SHIPPED = EXAMPLES / "adapters"
FUSED = 10  # modules, the relevant ones among them
_TWIN = "random-"  # and the name of the module whose norms a random one has
_FUSION = "LoRAFusion"
_TRAINED = (
    _FUSION,
    "coefficients only",
    "magnitudes only",
    "random pool",
    "basis, k = 16",
    "LoRA",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageOptions:
    """Options of the experiment.

    Attributes:
      tasks: folder of the function-vector data sets, also in subfolders.
      unseen: names of the tasks to run; by default all, and in the groups of relevance the two of a large family.
      groups: rows to run; all by default.
      methods: names of rows of these groups; all by default.
      seeds: each orders the rows, and draws modules where some are drawn.
      adapters: folder of the pool's 24 adapters, which are converted once, with a shared basis.
      out: folder of the rows, the runs and what is made of them; what is there already is not run again.
    """

    tasks: Path
    unseen: tuple[str, ...] = UNSEEN_TASKS
    groups: tuple[Group, ...] = get_args(Group)
    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (1, 2, 3)
    adapters: Path = _SHIPPED
    out: Path = ROOT / "runs" / "language"


def main(arguments: Sequence[str] = ()) -> None:
    """Run what is missing, and write tables and plots of all results."""
    options = tyro.cli(LanguageOptions, args=list(arguments), description=__doc__)
    wanted = {name for family in SOURCES.values() for name in family}
    missing = sorted(wanted - {path.name for path in options.adapters.iterdir()})
    if missing and {"relevance", "more-relevance"} & set(options.groups):
        raise ValueError(
            f"{options.adapters} lacks {', '.join(missing)}, which the groups of relevance fuse: "
            "python experiments/language_pool.py trains them"
        )
    tasks = link_tasks(options.tasks)
    of_groups: dict[Group, dict[str, Path]] = {
        group: unseen_tasks(
            options.unseen, tasks, options.adapters, _ROWS.get(group, TRAIN_ROWS)
        )
        for group in options.groups
    }
    for group, paths in of_groups.items():
        file = options.out / f"{group}.jsonl"
        jobs = [
            job
            for job in jobs_of(group, options, paths)
            if not options.methods or job.method in options.methods
        ]
        make_pools(options.adapters)
        run_jobs(jobs, file, fuse, root=ROOT)
        reference = "0 relevant" if "relevance" in group else _FUSION
        report(read_rows(file), options.out / group, f"SmolLM2: {group}", reference)
    files = [
        options.out / f"{group}.jsonl" for group in ("relevance", "more-relevance")
    ]
    if rows := [row for file in files if file.exists() for row in read_rows(file)]:
        draw(scores(rows)[0], options.out / "relevance.png")


def unseen_tasks(
    names: Sequence[str], tasks: Path, adapters: Path, train_rows: int = TRAIN_ROWS
) -> dict[str, Path]:
    """Return unseen tasks by name, without the test pairs that they or a pool's adapters were trained on.

    Raises:
      ValueError: an adapter was trained on more than 5 % of a task's test pairs.
    """
    trained = trained_pairs(
        sorted(path.name for path in adapters.iterdir() if path.is_dir()), tasks
    )
    out = pool_of(adapters, "_unseen") / str(train_rows)
    found = {
        name: unseen(find(name, tasks), trained, out, train_rows) for name in names
    }
    for name, task in found.items():
        if task.left_out:
            what = f"left out {task.left_out} of the first {EVALUATED_ROWS} test pairs"
            print(
                f"{name}: {what}, which are training pairs, ignoring case",
                file=sys.stderr,
            )
    return {name: task.path for name, task in found.items()}


def jobs_of(
    group: Group, options: LanguageOptions, paths: dict[str, Path]
) -> Iterator[Job]:
    """Yield the programs of a group, task by task."""
    for task, path in paths.items():
        if group in ("main", "more"):
            for method, entry in (MAIN if group == "main" else MORE).items():
                # Without a draw, all seeds have the same mean.
                seeds = options.seeds[:1] if method == "uniform mean" else options.seeds
                yield _job(
                    task, method, entry, path, dataclasses.replace(options, seeds=seeds)
                )
        elif group == "five":
            for method in ("few-shot prompt", *_TRAINED):
                # Of a single batch of the same rows, only LoRA and prompts draw anything.
                seeds = (
                    options.seeds
                    if method in ("few-shot prompt", "LoRA")
                    else options.seeds[:1]
                )
                few = dataclasses.replace(options, seeds=seeds)
                yield _job(
                    task, method, MAIN[method], path, few, train_rows=_ROWS[group]
                )
        elif group == "twenty":
            for method in (_FUSION, "random pool", "magnitudes only", "LoRA"):
                yield _job(
                    task,
                    f"{method}, 20 examples",
                    MAIN[method],
                    path,
                    options,
                    train_rows=_ROWS[group],
                )
        elif group == "examples":
            few = dataclasses.replace(options, seeds=options.seeds[:1])
            for shown in (1, 3):
                prompted = with_examples(path, shown)
                for method in ("zero-shot", _FUSION):
                    name = f"{method}, {shown} in the prompt"
                    job = _job(
                        task, name, MAIN[method], prompted, few, train_rows=_ROWS[group]
                    )
                    yield job._replace(
                        options=dataclasses.replace(job.options, prompt=None)
                    )
        elif task in RELEVANCE:
            yield from _relevance(group, task, path, options)


def with_examples(path: Path, shown: int) -> Path:
    """Return a task whose first training rows stand in the prompts of all others, and train nothing."""
    task = load(path, _ROWS["examples"])
    said = "".join(
        f"{row.input} {row.target}{BETWEEN_EXAMPLES}" for row in task.train[:shown]
    )
    folder = FOLDER / "_with_examples" / f"{task.name}-{shown}"
    return write_task(folder, before=said, train=task.train[shown:], test=task.test)


def _relevance(
    group: Group, task: str, path: Path, options: LanguageOptions
) -> Iterator[Job]:
    both = MAIN[_FUSION]
    alone = MAIN["coefficients only"]
    forms = {"": (both, ""), ", random others": (both, _TWIN)}
    forms |= {
        f"{form}, coefficients only": (alone, twin) for form, (_, twin) in forms.items()
    }
    chosen = [""] if group == "relevance" else [form for form in forms if form]
    for form in chosen:
        entry, twin = forms[form]
        for dose in DOSES:
            for seed in options.seeds:
                modules = dosed(RELEVANCE[task], dose, seed, twin)
                few = dataclasses.replace(options, seeds=(seed,))
                yield _job(
                    task, f"{dose} relevant{form}", entry, path, few, adapters=modules
                )


def dosed(family: str, dose: str, seed: int, twin: str = "") -> tuple[str, ...]:
    """Return the names of ten modules, so many of them of a family and the others not, as a seed draws them.

    Args:
      family: of the relevant modules.
      dose: how many of them: a number, or `all`.
      seed: of the draws; a larger dose holds the modules of a smaller one.
      twin: before the names of the others; that of random matrices, or nothing.
    """
    own = SOURCES[family]
    others = [
        name for other, names in SOURCES.items() if other != family for name in names
    ]
    count = len(own) if dose == "all" else int(dose)
    order = random.Random(f"relevant, seed {seed}").sample(own, len(own))
    filling = random.Random(f"irrelevant, seed {seed}").sample(others, len(others))
    return (*order[:count], *(f"{twin}{name}" for name in filling[: FUSED - count]))


def _job(
    task: str,
    method: str,
    entry: Arm,
    path: Path,
    options: LanguageOptions,
    *,
    train_rows: int = TRAIN_ROWS,
    **how: Any,
) -> Job:
    name = slug("-".join((task, method, str(train_rows), *map(str, options.seeds))))
    run = options_of(
        entry,
        path,
        base=linked_base(),
        pool=pool_of(options.adapters, "_and_random" if "adapters" in how else ""),
        seeds=options.seeds,
        train_rows=train_rows,
        out=options.out / "runs",
        name=name.replace("=", ""),
        **how,
    )
    return Job(task, method, "5" if train_rows == 5 else "95+5", run, tuple(how))


def link_tasks(folder: Path) -> Path:
    """Return a link to the function-vector data sets inside the checkout.

    Raises:
      ValueError: there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder: give that of the function-vector data sets with --tasks"
        )
    return _link("tasks", folder)


def linked_base() -> Path:
    """Return a link to the model inside the checkout."""
    return _link(f"base{base().suffix}", base())


def make_pools(adapters: Path) -> None:
    """Convert a folder of adapters with a shared basis, and again with a random twin of each."""
    folders = sorted(path for path in adapters.iterdir() if path.is_dir())
    pool = pool_of(adapters, "")
    twins = pool_of(adapters, "_random")
    both = pool_of(adapters, "_and_random")
    if not pool.exists():
        convert(base(), folders, pool, "--basis", str(DIRECTIONS))
    if not both.exists():
        write_random(pool, twins)
        convert(base(), [*folders, *sorted(twins.iterdir())], both)


def pool_of(adapters: Path, kind: str = "") -> Path:
    """Return where a folder of adapters is converted to, which is another place than that of the shipped ones."""
    own = adapters.resolve()
    return (
        FOLDER / f"{'' if own == _SHIPPED else f'{own.parent.name}_'}{own.name}{kind}"
    )


def _link(name: str, to: Path) -> Path:
    """Link a file or folder into the experiment's own, and return the link."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    link = FOLDER / name
    partial = FOLDER / f".{name}.{os.getpid()}.partial"
    partial.symlink_to(to.resolve())
    return partial.replace(link)


def write_random(pool: Path, out: Path) -> None:
    """Write a random adapter for each module of a converted pool: Gaussian matrices of the same norms."""
    modules = open_pool(pool).load()
    config = read_config(base())
    drawn = random_pool(modules, jax.random.key(0))
    both = (drawn.A, drawn.B)
    for i, name in enumerate(modules.names):
        of = {
            site: LowRank(*(dense(factor[site], jnp.float32)[:, i] for factor in both))
            for site in drawn.sites
        }
        settings, tensors = lora_adapter(config, of, base=HUB_ID)
        halves = {
            key: tensor.astype(ml_dtypes.bfloat16) for key, tensor in tensors.items()
        }
        write_adapter(out / f"{_TWIN}{name}", settings, halves)


def draw(results: Scores, path: Path) -> None:
    """Draw accuracy against the number of relevant modules, for each task and their mean."""
    forms = (
        "",
        ", random others",
        ", coefficients only",
        ", random others, coefficients only",
    )
    labels = (
        "others irrelevant",
        "others random",
        "others irrelevant, no magnitudes",
        "others random, no magnitudes",
    )

    def on(figure: Any) -> None:
        panels = figure.subplots(1, len(results.tasks) + 1, sharey=True)
        for axes, task in zip(panels, (*results.tasks, None), strict=True):
            of = (
                results
                if task is None
                else Scores(
                    results.shots, [row for row in results.rows if row["task"] == task]
                )
            )
            for i, form in enumerate(forms, start=1):
                found = {
                    dose: of.summaries.get(f"{dose} relevant{form}") for dose in DOSES
                }
                points = {
                    x: summary for x, summary in enumerate(found.values()) if summary
                }
                if points:
                    x = [place + 0.06 * (i - 2.5) for place in points]
                    means = [summary.mean for summary in points.values()]
                    around = [
                        [s.mean - s.low for s in points.values()],
                        [s.high - s.mean for s in points.values()],
                    ]
                    axes.errorbar(
                        x,
                        means,
                        around,
                        fmt="o-",
                        color=colour(i),
                        elinewidth=1,
                        label=labels[i - 1],
                    )
            family = f"\n({RELEVANCE[task]})" if task in RELEVANCE else ""
            axes.set_title(f"{task}{family}" if task else "mean of tasks", fontsize=9)
            axes.set_xticks(range(len(DOSES)), DOSES)
        panels[0].set_ylabel("exact match, %, with 95 % interval")
        figure.supxlabel("relevant modules of ten", fontsize=10)
        figure.legend(
            *panels[-1].get_legend_handles_labels(),
            loc="outside upper center",
            ncols=4,
            fontsize=9,
        )

    plot(path, (3.0 * (len(results.tasks) + 1), 4.0), on)


if __name__ == "__main__":
    _script.run(main)
