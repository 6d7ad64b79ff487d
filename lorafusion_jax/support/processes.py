"""Several processes that compute one program on one mesh, of which the first prints and writes."""

import jax
import numpy as np


def several() -> bool:
    """Return whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Return whether this process is the one that prints and writes."""
    return not several() or jax.process_index() == 0


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Return for each flag whether it is set in any process; all must call this at the same place."""
    if not several():
        return flags
    from jax.experimental.multihost_utils import process_allgather

    return tuple(np.any(process_allgather(np.array(flags)), axis=0).tolist())


def join() -> None:
    """Join the other processes of a run, which Slurm, Open MPI, GKE or a TPU describes to JAX.

    Call it before JAX initialises its backend; it does nothing after `jax.distributed.initialize`. Raises ValueError if
    JAX finds no cluster here.
    """
    if jax.distributed.is_initialized():
        return
    # The service would only record a SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed: JAX cannot join other processes here ({error}): start them with Slurm, Open MPI or GKE, "
            "on a TPU slice, or call jax.distributed.initialize in Python"
        ) from None
