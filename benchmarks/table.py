"""Run the benchmarks, each in a process of its own, and print one table of ratios and bars.

    python benchmarks/table.py bench [--out results/speed]

`fast`: the embedded small shape and padding, in less than a minute. `bench`: what has a bar of FLAN-T5-small, and of
FLAN-T5-large with one seed, in about 40 minutes on two cores. `full`: every shape, pool, number of seeds and
precision, adapters and crossbars too. A missed bar is only printed; a script that fails is an error. Parts that need
more cores than there are, or the `peft` extra, are left out.
"""

import argparse
import csv
import datetime
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _measure import MALLOC, PRODUCT, ROOT, features, has_peft, met, processor

from lorafusion_jax.report import as_markdown as markdown, write_text

_SMALL = "fusion_step.py --shape flan-t5-small"
_LARGE = "fusion_step.py --shape flan-t5-large --rounds 2"
_FAST = ("fusion_step.py --shape small-pool --rounds 5", "padding.py")
_BENCH = (
    f"{_SMALL} --dtype float32 bfloat16 --seeds 1 4 --rounds 3 --bars",
    f"{_SMALL} --cores 2 --rounds 3",
    f"{_LARGE} --dtype float32 bfloat16 --bars",
    f"{_LARGE} --cores 2",
    "peer.py",
    "generation.py --shape flan-t5-small --rounds 3",
    "mixed_batches.py --shape small-pool",
    "compilation.py",
    "memory.py --peak",
    "padding.py",
    "start.py",
    "whole_task.py",
)
_FULL = (
    "fusion_step.py --shape small-pool --dtype float32 bfloat16 nf4 --seeds 1 4 16",
    f"{_SMALL} --dtype float32 bfloat16 nf4 --seeds 1 4 16",
    f"{_SMALL} --cores 2",
    f"{_SMALL} --pool 100",
    "fusion_step.py --shape flan-t5-base --rounds 5 --dtype float32 bfloat16 nf4 --seeds 1 4",
    "fusion_step.py --shape flan-t5-base --rounds 5 --pool 100",
    f"{_LARGE} --dtype float32 bfloat16",
    f"{_LARGE} --dtype nf4",
    f"{_LARGE} --cores 2",
    f"{_LARGE} --pool 100",
    f"{_LARGE} --cores 2 --seeds 4 16",
    "peer.py --shape flan-t5-small smollm2-135m flan-t5-base",
    "generation.py --shape flan-t5-small",
    "generation.py --shape flan-t5-large --rounds 3",
    "mixed_batches.py --shape flan-t5-small",
    "compilation.py",
    "memory.py",
    "padding.py",
    "convert.py",
    "crossbar.py",
    "start.py",
    "whole_task.py --shape flan-t5-small flan-t5-base smollm2-135m --rows 20 95",
)
_NEED_PEFT = (
    "peer.py",
    "generation.py",
    "convert.py",
    "whole_task.py",
)  # which compare with nothing else
_LEVELS = {"fast": _FAST, "bench": _BENCH, "full": _FULL}
_HEAD = ("what", "ratio", "required", "ambition", "verdict")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("level", choices=_LEVELS, help="how much is measured")
    parser.add_argument("--out", type=Path, help="folder for table.csv and cases.json")
    options = parser.parse_args()
    began = time.perf_counter()
    cases = []
    rates = []
    failed = []
    for command in _LEVELS[options.level]:
        print(f"{command} ...", file=sys.stderr, flush=True)
        found = _run(command)
        if found is None:
            failed.append(command)
            continue
        cases += [{"command": command, **of_script} for of_script in found["cases"]]
        if found["rates"]:
            rates.append(
                {
                    "command": command,
                    "processor": found["processor"],
                    "gflops": found["rates"],
                }
            )
    minutes = (time.perf_counter() - began) / 60
    tables = [*table(cases), *(["", *rates_table(rates)] if rates else [])]
    print(
        "\n".join(
            [
                *tables,
                "",
                f"{processor()} ({' '.join(features())}), {minutes:.1f} minutes",
            ]
        )
    )
    if options.out is not None:
        kept = {
            "level": options.level,
            "processor": processor(),
            "features": features(),
            "date": datetime.date.today().isoformat(),
        }
        _write(
            options.out,
            kept | {"minutes": round(minutes), "rates": rates, "cases": cases},
        )
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


def table(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table with one row a case, columns aligned."""
    return markdown([_HEAD, *map(_cells, cases)], left=(0, 4)).splitlines()


def csv_of(cases: Sequence[Mapping[str, Any]]) -> str:
    """Return the same rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_HEAD, *map(_cells, cases)])
    return text.getvalue()


def rates_table(rates: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table of what one product of each library reached, a row for each script."""
    libraries = list(
        dict.fromkeys(name for of_script in rates for name in of_script["gflops"])
    )
    head = (
        f"GFLOP/s of one product, {PRODUCT} x {PRODUCT} x {PRODUCT}, in the run of",
        "on",
        *libraries,
    )
    rows = [
        (
            row["command"],
            row["processor"],
            *(
                f"{row['gflops'][n]:.0f}" if n in row["gflops"] else ""
                for n in libraries
            ),
        )
        for row in rates
    ]
    return markdown([head, *rows], left=(0, 1)).splitlines()


def _cells(case: Mapping[str, Any]) -> tuple[str, ...]:
    sign = "≥" if case["higher_is_better"] else "≤"
    bars = (
        "" if case[key] is None else f"{sign} {case[key]:g}"
        for key in ("required", "ambition")
    )
    verdict = {True: "met", False: "missed", None: ""}[met(case)]
    return (case["name"], f"{case['ratio']:.3g}", *bars, verdict)


def _run(command: str) -> dict[str, Any] | None:
    """Return the cases and rates of one script, none where it cannot run here, or None where it fails."""
    script, *arguments = command.split()
    if "--cores" in arguments and int(arguments[arguments.index("--cores") + 1]) > len(
        os.sched_getaffinity(0)
    ):
        print(
            f"  left out: this process may use {len(os.sched_getaffinity(0))} cores",
            file=sys.stderr,
        )
        return {"cases": [], "rates": {}}
    if script in _NEED_PEFT and not has_peft():
        print("  left out: PyTorch and PEFT are not installed", file=sys.stderr)
        return {"cases": [], "rates": {}}
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *arguments, "--json"],
        env=os.environ | MALLOC,
        stdout=subprocess.PIPE,
        text=True,
    )
    return None if done.returncode else json.loads(done.stdout)


def _write(folder: Path, found: Mapping[str, Any]) -> None:
    """Write the table and what it is computed from, each complete or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("table.csv", csv_of(found["cases"])),
        ("cases.json", json.dumps(found, indent=1) + "\n"),
    ):
        write_text(folder / name, text)


if __name__ == "__main__":
    main()
