"""Several processes that run one program: the first one writes, and all end when one of them is lost.

Each process sends a heartbeat every few seconds. JAX would wait for a lost process, in the next collective and in its
shutdown, and then abort. A restart continues from the last checkpoint.
"""

import contextlib
import ctypes
import itertools
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np

# Seconds between two heartbeats, and the longest time without one.
_BEAT = 5
_LOST = 15
ARRIVAL = 300  # seconds in which all processes have to start
_DAY = 24 * 3600
_numbers = itertools.count()


def several() -> bool:
    """Return whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Return whether this process is the one that prints and writes."""
    return not several() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has reached this call; all must call the same barriers in the same order."""
    if several():
        _wait(f"{name} {next(_numbers)}", _DAY)


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Return for each flag whether it is set in any process; all must call this at the same place."""
    if not several():
        return flags
    from jax.experimental.multihost_utils import process_allgather

    return tuple(np.any(process_allgather(np.array(flags)), axis=0).tolist())


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Iterator[None]:
    """Join the other processes of a run, which Slurm, Open MPI, GKE, a TPU or the arguments describe.

    Call it before JAX initialises its backend; it does nothing after `jax.distributed.initialize`. If another process
    is lost, or if only this one fails, it ends within 20 s with a message and the exit code EX_TEMPFAIL (75), and after
    `ARRIVAL` seconds if one never starts. Raises ValueError if JAX finds no cluster here, or the address has no port.
    """
    if not jax.distributed.is_initialized():
        address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
        if address and not (
            (port := re.fullmatch(r".+:(\d{1,5})", address))
            and 0 < int(port[1]) < 2**16
        ):
            raise ValueError(
                f"--coordinator: expected host:port, such as host0:12345, got {address!r}"
            )
        jax.config.update(
            "jax_enable_preemption_service", False
        )  # it would only record a SIGTERM
        try:
            with _on_abort(f"not all processes of this run started within {ARRIVAL} s"):
                jax.distributed.initialize(
                    coordinator, processes, process, initialization_timeout=ARRIVAL
                )
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"--distributed: JAX cannot join other processes here ({error}): start them with Slurm, Open MPI or "
                "GKE, on a TPU slice, or by hand with --coordinator, --processes and --process"
            ) from None
    over = threading.Event()
    heart = threading.Thread(target=_beat, args=(over,), daemon=True)
    with _on_abort("process 0 of this run is lost"):
        heart.start()
        try:
            yield
            _wait("the end", _DAY)
        except (
            SystemExit
        ) as stop:  # by a signal: JAX's shutdown would wait for the others
            os._exit(stop.code if isinstance(stop.code, int) else 1)
        except BaseException as error:
            # After a failed collective, the heartbeats show whether a process is lost. If not, the others may fail for
            # the same reason, for example bad options; then all raise the error.
            heart.join(
                _BEAT + _LOST if isinstance(error, jax.errors.JaxRuntimeError) else 0
            )
            try:
                _wait("the end", _LOST)
            except jax.errors.JaxRuntimeError:
                end(f"{error}\nerror: the other processes have not failed")
            raise
        finally:
            over.set()


@contextlib.contextmanager
def _on_abort(why: str) -> Iterator[None]:
    """End this process as `end` does where JAX's client aborts it, for missing processes or a lost coordinator."""
    aborted = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: end(why))
    ctypes.CDLL(None).signal(signal.SIGABRT, aborted)
    try:
        yield
    finally:
        signal.signal(signal.SIGABRT, signal.SIG_DFL)


def _beat(over: threading.Event) -> None:
    for number in itertools.count():
        try:
            _wait(f"alive {number}", _LOST)
        except jax.errors.JaxRuntimeError:
            if not over.is_set():
                end("another process of this run is lost")
        if over.wait(_BEAT):
            return


def _wait(name: str, seconds: int) -> None:
    from orbax.checkpoint.multihost import get_barrier_sync_fn

    get_barrier_sync_fn()(key=name, timeout_ms=1000 * seconds)


def end(why: str) -> NoReturn:
    """End this process with the exit code EX_TEMPFAIL, and without JAX's shutdown, which would wait for a lost one."""
    print(
        f"error: {why}: start all processes again with --resume",
        file=sys.stderr,
        flush=True,
    )
    os._exit(os.EX_TEMPFAIL)
