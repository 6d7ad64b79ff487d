"""What the benchmarks share: their cases, a process that is pinned to cores, timings taken in turns."""

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# The temporaries of a step are mapped anew by every call: in huge pages that costs less, here and in PyTorch.
MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_SHORTEST_TURN = 0.1  # seconds; faster functions are called several times in a turn


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of the script's own description that knows --json."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    """Return one measured ratio and its bars; `required` is None where it is shown beside another one."""
    return {
        "name": name,
        "ratio": float(ratio),
        "required": required,
        "ambition": ambition,
        "higher_is_better": higher_is_better,
        "computed_from": computed_from,
    }


def show(cases: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print cases as the one JSON object of the contract, or a line each."""
    if as_json:
        print(json.dumps({"processor": processor(), "cases": cases}, indent=1))
        return
    for found in cases:
        numbers = ", ".join(f"{key} {_short(value)}" for key, value in found["computed_from"].items())
        print(f"{found['name']}: {found['ratio']:.3g} ({bar(found)}); {numbers}")


def bar(found: Mapping[str, Any]) -> str:
    """Return what a case was to reach, in words."""
    if found["required"] is None:
        return "no bar"
    bound = "at least" if found["higher_is_better"] else "at most"
    return f"{bound} {found['required']:g}" + ("" if found["ambition"] is None else f", ambition {found['ambition']:g}")


def met(found: Mapping[str, Any]) -> bool | None:
    """Return whether a case reaches what is required; None where nothing is."""
    if found["required"] is None:
        return None
    return bool(
        (found["ratio"] >= found["required"]) if found["higher_is_better"] else found["ratio"] <= found["required"]
    )


def launch(cores: int | None = None) -> None:
    """Pin this process to its first `cores` cores, and start it again where malloc is not set as for all others.

    Before JAX and PyTorch start their threads: nothing else makes JAX use one alone.
    """
    if cores is not None:
        there = sorted(os.sched_getaffinity(0))
        if cores > len(there):
            sys.exit(f"{cores} cores are asked for, and this process may use {len(there)}: ask for fewer")
        os.sched_setaffinity(0, there[:cores])
    if os.environ.get("GLIBC_TUNABLES") != MALLOC["GLIBC_TUNABLES"]:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)


def in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Return the seconds of a call of each function, [rounds]: one after the other, round by round.

    Every turn begins with a call that is not timed. In the first round it compiles; later it gets its memory from where
    the function before left it, which cost a step of a large model up to three quarters more.
    """
    calls: dict[str, int] = {}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            seconds = _seconds(run, calls.get(name, 1))
            if name not in calls:
                calls[name] = max(1, int(_SHORTEST_TURN / seconds))
                seconds = seconds if calls[name] == 1 else _seconds(run, calls[name])
            found[name].append(seconds)
    return {name: np.array(seconds) for name, seconds in found.items()}


def of_turns(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the median of the rounds' ratios: what slows a round down slows both sides."""
    return float(np.median(ours / theirs))


def has_peft() -> bool:
    """Return whether PyTorch and PEFT are there to compare with."""
    return all(importlib.util.find_spec(name) for name in ("torch", "peft"))


def processor() -> str:
    """Return the processor's name and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def _seconds(run: Callable[[], Any], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - began) / calls


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return str(value)
