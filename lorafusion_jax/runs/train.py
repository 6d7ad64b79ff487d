"""Training of runs by one program, with checkpoints that they continue from after it was killed or stopped."""

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from ..io import store
from ..methods.entry import SearchJob
from ..support import interrupts, processes
from ..support.reading import show
from ..training.fit import Epoch, fit, joined, orders_of, start, whole_epochs
from ..training.mesh import on_mesh, to_host
from ..training.method import Params
from ..training.step import TrainState
from .folder import FINAL, FinalSteps, RunFolder, note
from .options import FuseOptions
from .setup import Setup

# Steps without a finite loss in any seed after which training stops.
_BAD_STEPS = 20


class _Reached(TypedDict):
    """Metadata of a checkpoint."""

    epochs: int
    step: int
    seconds: NotRequired[float]


def train(
    runs: Sequence[RunFolder],
    setup: Setup,
    options: FuseOptions,
    begin: dict[str, Any] | None,
) -> list[tuple[Params, FinalSteps] | None]:
    """Return the trained parameters of each run, its seeds' steps and the seconds of training.

    Of several runs, one whose seeds have had no finite loss for many steps has None.

    Args:
      runs: runs that one program trains.
      setup: setup of the seeds of all runs, one run after another.
      options: options of the runs, with the seeds of all.
      begin: parameters to start from, of all seeds.
    """
    method = options.entry
    start_time = time.monotonic()
    if method.learns == "untrained":
        nothing = FinalSteps(steps=[0] * len(options.seeds), seconds=0.0)
        return [({}, nothing)] * len(runs)
    saved = [
        store.newest_sound([run.final], FINAL, FinalSteps, note=note) for run in runs
    ]
    finals = [final for final in saved if final is not None]
    failed = [False] * len(runs)
    if len(finals) < len(runs):
        with interrupts.released():
            steps = [0] * len(options.seeds)
            if method.learns == "given":
                params = start(setup.problem, options.seeds).params
            elif method.search is not None:
                (run,) = runs
                run.cut_metrics(0)  # a search is not resumed, but repeated
                all_losses = (
                    setup.problem,
                    setup.rows,
                    options.recipe,
                    options.seeds,
                    setup.modules,
                )
                params, taken = method.search(
                    SearchJob(*all_losses, record=run.append_metrics)
                )
                steps = [taken] * len(options.seeds)
            else:
                state, start_time, failed = _fit(runs, setup, options, begin)
                params = state.best if options.recipe.stop_early else state.params
                steps = to_host(state.step).tolist()
            all_params = _of_runs(to_host(params), len(runs))
            # of each run, a share
            seconds = (time.monotonic() - start_time) / len(runs)
            all_steps = np.split(np.array(steps), len(runs))
            finals = [
                (params, FinalSteps(steps=steps.tolist(), seconds=seconds))
                for params, steps in zip(all_params, all_steps, strict=True)
            ]
            for run, final, has_failed in zip(runs, finals, failed, strict=True):
                if processes.first() and not (has_failed or run.final.exists()):
                    store.save(run.final, FINAL, *final)
    return [
        None
        if has_failed
        else (on_mesh(jax.device_put(params), setup.config, of_seeds=True), metadata)
        for (params, metadata), has_failed in zip(finals, failed, strict=True)
    ]


def _of_runs(tree: Any, runs: int) -> list[Any]:
    """Return the part of each run of a tree of NumPy arrays with an axis of all seeds."""
    return [
        jax.tree.map(lambda leaf, number=number: np.split(leaf, runs)[number], tree)
        for number in range(runs)
    ]


def _fit(
    runs: Sequence[RunFolder],
    setup: Setup,
    options: FuseOptions,
    begin: dict[str, Any] | None,
) -> tuple[TrainState, float, list[bool]]:
    """Return the last state, when training began or would have begun without interruptions, and which runs failed."""
    start_time = time.monotonic()
    state = start(setup.problem, options.seeds, begin)
    seeds = options.seeds[: len(options.seeds) // len(runs)]
    orders = orders_of(setup.rows, options.recipe, options.seeds)
    has_rows = np.any(orders >= 0, axis=2)[:: len(seeds)]
    # Steps of each run before every step of the program, which has more if other runs have more rows.
    counts = np.pad(np.cumsum(has_rows, axis=1), ((0, 0), (1, 0))).tolist()
    reached, saved = _newest(runs, counts, state)
    if saved:
        states = [run_state for run_state, _ in saved]
        state = jax.tree.map(lambda *parts: jnp.asarray(np.concatenate(parts)), *states)
        state = on_mesh(state, setup.config, of_seeds=True)
        start_time -= sum(reached_by.get("seconds", 0.0) for _, reached_by in saved)
    # steps of each run's seeds since the last finite loss
    bad = [dict.fromkeys(seeds, 0) for _ in runs]
    for number, run in enumerate(runs):
        step = counts[number][reached]
        if saved:
            note(f"{run.folder}: going on from step {step}")
        elif store.steps(run.checkpoints):
            note(f"{run.folder}: starts again, with tasks that have no checkpoint near")
        run.cut_metrics(step)
        # Otherwise later steps that another run lacks would push out those that both are going to have.
        if processes.first():
            store.remove_later(run.checkpoints, step)
        _count_bad_steps(run.metrics(), bad[number])
    # Runs of which all seeds have stopped, whose metrics have ended.
    ended = np.all(to_host(state.stopped).reshape(len(runs), -1), axis=1)

    def failed() -> list[bool]:
        """Return whether all seeds of each run are without a finite loss."""
        return [min(of_run.values()) >= _BAD_STEPS for of_run in bad]

    def check_losses() -> None:
        if all(failed()):
            least = min(count for of_run in bad for count in of_run.values())
            raise ValueError(
                f"no seed has had a finite loss for {least} steps, up to step {reached}: try lower learning rates, or "
                f"float32 instead of bfloat16. {runs[0].folder} keeps the metrics, and in its last checkpoint the "
                "numbers of the best validation loss; give the next try another --name"
            )

    check_losses()  # of the run that is resumed
    ended |= failed()

    last_save = last_end = time.monotonic()
    several = processes.several()
    # unit after which a signal stops, and the seconds of the last one
    by_epoch = whole_epochs() or several
    taken = 0.0

    def record(
        epoch: int, metrics: Mapping[str, np.ndarray], scores: Mapping[str, np.ndarray]
    ) -> None:
        """Add the metrics of steps, [steps, seeds], and scores after them, [seeds], to those of the runs."""
        nonlocal reached
        begun = reached
        reached += len(next(iter(metrics.values())))
        for number in np.flatnonzero(~ended).tolist():
            count = counts[number]
            rows: list[tuple[int, Mapping[str, np.ndarray]]] = [
                (
                    count[step],
                    {name: value[step - begun - 1] for name, value in metrics.items()},
                )
                for step in range(begun + 1, reached + 1)
                if count[step] > count[step - 1]
            ]
            if scores:
                rows.append((count[reached], scores))
            first = number * len(seeds)
            lines = [
                {"step": step, "epoch": epoch, "seed": seed}
                | {name: value[first + place].item() for name, value in values.items()}
                for step, values in rows
                for place, seed in enumerate(seeds)
            ]
            runs[number].append_metrics(lines)
            _count_bad_steps(lines, bad[number])

    def save(epochs: int, state: TrainState) -> None:
        seconds = (time.monotonic() - start_time) / len(runs)  # of each run, a share
        parts = _of_runs(to_host(state), len(runs))
        for run, count, part in zip(runs, counts, parts, strict=True):
            step = count[reached]
            metadata = {"epochs": epochs, "step": step, "seconds": seconds}
            # Stopped twice between two of its steps, a run has saved this one already.
            if processes.first() and step not in store.steps(run.checkpoints):
                store.save_step(run.checkpoints, step, part, metadata, keep=2)

    def hold() -> None:
        when = "epoch" if by_epoch else "step"
        interrupts.hold(f"this {when} (the last one took {taken:.1f} s)")

    def after_interval(
        number: int, state: TrainState, metrics: Sequence[Mapping[str, Any]]
    ) -> None:
        nonlocal taken, last_end
        if not by_epoch:
            taken = time.monotonic() - last_end
        hold()
        if (
            interrupts.asked() and not several
        ):  # several processes agree on a stop only after an epoch
            record(number, joined(to_host(list(metrics))), {})
            save(number - 1, state)
            interrupts.release()
        if not by_epoch:
            last_end = time.monotonic()

    def after_epoch(epoch: Epoch) -> None:
        nonlocal last_save, taken, last_end, ended
        if by_epoch or not taken:
            taken = time.monotonic() - last_end
        hold()
        scores = {"validation_loss": epoch.validation_loss, "stopped": epoch.stopped}
        record(epoch.number, epoch.metrics, scores)
        ended = np.all(epoch.stopped.reshape(len(runs), -1), axis=1) | failed()
        due, is_stopped = processes.any_of(
            time.monotonic() - last_save >= options.save_seconds, interrupts.asked()
        )
        if all(failed()) or due or is_stopped:
            save(epoch.number, epoch.state)
            last_save = time.monotonic()
            interrupts.release()
            if is_stopped:
                show(
                    "error: another process of this run was stopped: start all again with --resume",
                    file=sys.stderr,
                )
                raise SystemExit(os.EX_TEMPFAIL)
        check_losses()
        last_end = time.monotonic()

    if not np.all(ended):
        state = fit(
            setup.problem,
            setup.rows,
            state,
            options.recipe,
            options.seeds,
            first_step=reached,
            after_interval=after_interval,
            after_epoch=after_epoch,
        )
    return state, start_time, failed()


def _newest(
    runs: Sequence[RunFolder], counts: Sequence[Sequence[int]], state: TrainState
) -> tuple[int, list[tuple[TrainState, _Reached]]]:
    """Return the last step of the program that every run has saved, and what each one saved; 0 and nothing if none."""
    seeds = len(state.step) // len(runs)
    part = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((seeds, *leaf.shape[1:]), leaf.dtype), state
    )
    while True:
        steps = [store.steps(run.checkpoints) for run in runs]
        common = [
            step
            for step in range(len(counts[0]))
            if all(
                count[step] in of_run
                for count, of_run in zip(counts, steps, strict=True)
            )
        ]
        if not common:
            return 0, []
        folders = [
            of_run[count[common[-1]]]
            for count, of_run in zip(counts, steps, strict=True)
        ]
        saved = [
            store.load_newest([folder], part, metadata=_Reached, note=note)
            for folder in folders
        ]
        sound = [each for each in saved if each is not None]
        if len(sound) == len(runs):  # otherwise a damaged one has been put aside
            return common[-1], sound


def _count_bad_steps(rows: Iterable[Mapping[str, Any]], bad: dict[int, int]) -> None:
    """Update the number of steps of each seed since its last finite loss by rows of metrics."""
    for row in rows:
        if "loss" in row and (seed := row.get("seed")) in bad:
            finite = row["loss"] is not None and np.isfinite(
                row["loss"]
            )  # null in a file is not finite
            bad[seed] = 0 if finite else bad[seed] + 1
