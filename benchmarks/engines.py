"""Time 60 jobs of the embedded pool in one process on one core, and on two Ray nodes of one core each, in turns.

    python benchmarks/engines.py
    python benchmarks/engines.py --warm     # programs are in JAX's cache for both

The ratio of the times is to be at most 0.6. The overhead of a job is the time of a core beyond that of the one process,
at most 1 s: Ray's start, the two compilations of what both nodes run, memory estimates, pickled jobs and rows.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

_SCRIPT = Path(__file__).parent.parent / "experiments" / "small_pool.py"
_METHODS = (
    *(
        "few-shot prompt",
        "uniform mean",
        "best single module",
        "LoRAFusion",
        "LoRAFusion, mix",
    ),
    *("coefficients only", "magnitudes only", "random pool", "LoRA", "VeRA"),
)
_JOBS = 6 * len(_METHODS)  # the script has six tasks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument(
        "--warm", action="store_true", help="compile before the timed runs"
    )
    options = parser.parse_args()
    # All addresses are 127.0.0.1, which Ray's variable means for other systems.
    os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_AUTH_MODE="disabled")
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    cores = sorted(os.sched_getaffinity(0))[:2]
    times = []
    if options.warm:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
        _seconds(cores)
    for turn in range(options.turns):
        local = _seconds(cores[:1])
        cluster = importlib.import_module(
            "ray.cluster_utils"
        ).Cluster()  # of the extra ray
        for core in cores:
            os.sched_setaffinity(0, {core})  # which the node and its workers inherit
            cluster.add_node(num_cpus=1)
        os.sched_setaffinity(0, cores)
        ray = _seconds(cores, "--engine", "ray", "--address", cluster.address)
        cluster.shutdown()
        times.append((local, ray))
        print(
            f"turn {turn + 1}: {local:.0f} s in one process, {ray:.0f} s on two nodes",
            flush=True,
        )
    ratio = median(ray / local for local, ray in times)
    overhead = median((len(cores) * ray - local) / _JOBS for local, ray in times)
    print(
        f"{_JOBS} jobs: ratio {ratio:.2f}, overhead of a job {overhead:.2f} s (medians of {len(times)} turns)"
    )


def _seconds(cores: list[int], *engine: str) -> float:
    """Run the script on some cores and return its wall time."""
    with tempfile.TemporaryDirectory() as out:
        flags = ("--seeds", "1", "--out", out, *engine, "--methods", *_METHODS)
        begin = time.perf_counter()
        command = [
            "taskset",
            "--cpu-list",
            ",".join(map(str, cores)),
            sys.executable,
            str(_SCRIPT),
            *flags,
        ]
        subprocess.run(command, check=True, capture_output=True)
        assert (Path(out) / "results.jsonl").read_bytes().count(b"\n") == _JOBS
        return time.perf_counter() - begin


if __name__ == "__main__":
    main()
