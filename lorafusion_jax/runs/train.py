"""Training of a run, with checkpoints that it continues from after it was killed or stopped."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from ..io import store
from ..methods.entry import SearchJob
from ..support import interrupts, processes
from ..support.reading import show
from ..training.fit import Epoch, fit, joined, start, whole_epochs
from ..training.mesh import on_mesh, to_host
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
    run: RunFolder, setup: Setup, options: FuseOptions, begin: dict[str, Any] | None
) -> tuple[dict[str, Any], list[int], float]:
    """Return the trained parameters, each seed's steps, and seconds of training; `begin` has those to start from."""
    method = options.entry
    start_time = time.monotonic()
    if method.learns == "untrained":
        return {}, [0] * len(options.seeds), 0.0
    saved = store.newest_sound([run.final], FINAL, FinalSteps, note=note)
    if saved is not None:
        params, metadata = saved
        params = on_mesh(jax.device_put(params), setup.config, of_seeds=True)
        return params, metadata["steps"], metadata.get("seconds", 0.0)
    with interrupts.released():
        if method.learns == "given":
            params = start(setup.problem, options.seeds).params
            steps = [0] * len(options.seeds)
        elif method.search is not None:
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
            state, start_time = _fit(run, setup, options, begin)
            params = state.best if options.recipe.stop_early else state.params
            steps = to_host(state.step).tolist()
        host_params = to_host(params)
        seconds = time.monotonic() - start_time
        if processes.first():
            store.save(
                run.final, FINAL, host_params, {"steps": steps, "seconds": seconds}
            )
    return on_mesh(params, setup.config, of_seeds=True), steps, seconds


def _fit(
    run: RunFolder, setup: Setup, options: FuseOptions, begin: dict[str, Any] | None
) -> tuple[TrainState, float]:
    """Return the last state, and the time at which training began or, after an interruption, would have begun."""
    start_time = time.monotonic()
    state = start(setup.problem, options.seeds, begin)
    reached = 0
    steps = store.steps(run.checkpoints)
    saved = store.load_newest(steps, state, metadata=_Reached, note=note)
    if saved is not None:
        state, metadata = saved
        state = on_mesh(jax.tree.map(jnp.asarray, state), setup.config, of_seeds=True)
        reached = metadata["step"]
        start_time = start_time - metadata.get("seconds", 0.0)
    if steps:
        note(f"{run.folder}: going on from step {reached}")
    run.cut_metrics(reached)
    bad = dict.fromkeys(options.seeds, 0)  # steps since the last finite loss
    _count_bad_steps(run.metrics(), bad)

    def check_losses() -> None:
        if (least := min(bad.values())) >= _BAD_STEPS:
            raise ValueError(
                f"no seed has had a finite loss for {least} steps, up to step {reached}: try lower learning rates, or "
                f"float32 instead of bfloat16. {run.folder} keeps the metrics, and in its last checkpoint the numbers "
                "of the best validation loss; give the next try another --name"
            )

    check_losses()  # of the run that is resumed

    last_save = ended = time.monotonic()
    several = processes.several()
    # unit after which a signal stops, and the seconds of the last one
    by_epoch = whole_epochs() or several
    taken = 0.0

    def save(epochs: int, step: int, state: TrainState) -> None:
        metadata = {
            "epochs": epochs,
            "step": step,
            "seconds": time.monotonic() - start_time,
        }
        state = to_host(state)
        if processes.first():
            store.save_step(run.checkpoints, step, state, metadata, keep=2)

    def hold() -> None:
        when = "epoch" if by_epoch else "step"
        interrupts.hold(f"this {when} (the last one took {taken:.1f} s)")

    def after_interval(
        number: int, state: TrainState, metrics: Sequence[Mapping[str, Any]]
    ) -> None:
        nonlocal taken, ended
        if not by_epoch:
            taken = time.monotonic() - ended
        hold()
        if (
            interrupts.asked() and not several
        ):  # several processes agree on a stop only after an epoch
            rows = list(
                _step_rows(
                    joined(to_host(list(metrics))), number, reached, options.seeds
                )
            )
            run.append_metrics(rows)
            save(number - 1, rows[-1]["step"], state)
            interrupts.release()
        if not by_epoch:
            ended = time.monotonic()

    def after_epoch(epoch: Epoch) -> None:
        nonlocal reached, last_save, taken, ended
        if by_epoch or not taken:
            taken = time.monotonic() - ended
        hold()
        rows = list(_epoch_rows(epoch, options.seeds))
        run.append_metrics(rows)
        _count_bad_steps(rows, bad)
        reached = rows[-1]["step"]
        due, is_stopped = processes.any_of(
            time.monotonic() - last_save >= options.save_seconds, interrupts.asked()
        )
        if min(bad.values()) >= _BAD_STEPS or due or is_stopped:
            save(epoch.number, reached, epoch.state)
            last_save = time.monotonic()
            interrupts.release()
            if is_stopped:
                show(
                    "error: another process of this run was stopped: start all again with --resume",
                    file=sys.stderr,
                )
                raise SystemExit(os.EX_TEMPFAIL)
        check_losses()
        ended = time.monotonic()

    if not np.all(to_host(state.stopped)):
        state = fit(
            setup.problem,
            setup.rows,
            state,
            options.recipe,
            options.seeds,
            after_interval=after_interval,
            after_epoch=after_epoch,
        )
    return state, start_time


def _count_bad_steps(rows: Iterable[Mapping[str, Any]], bad: dict[int, int]) -> None:
    """Update the number of steps of each seed since its last finite loss by rows of metrics."""
    for row in rows:
        if "loss" in row and (seed := row.get("seed")) in bad:
            finite = row["loss"] is not None and np.isfinite(
                row["loss"]
            )  # null in a file is not finite
            bad[seed] = 0 if finite else bad[seed] + 1


def _step_rows(
    metrics: Mapping[str, np.ndarray],
    epoch: int,
    first_step: int,
    seeds: tuple[int, ...],
) -> Iterator[dict[str, Any]]:
    for i in range(len(next(iter(metrics.values())))):
        for s, seed in enumerate(seeds):
            values = {name: value[i, s].item() for name, value in metrics.items()}
            yield {"step": first_step + i + 1, "epoch": epoch, "seed": seed, **values}


def _epoch_rows(epoch: Epoch, seeds: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    yield from _step_rows(epoch.metrics, epoch.number, epoch.first_step, seeds)
    step = epoch.first_step + len(next(iter(epoch.metrics.values())))
    for s, seed in enumerate(seeds):
        scores = {
            "validation_loss": epoch.validation_loss[s].item(),
            "stopped": epoch.stopped[s].item(),
        }
        yield {"step": step, "epoch": epoch.number, "seed": seed, **scores}
