"""Read damaged files of every kind for a given time, or until Ctrl-C: `make fuzz SECONDS=3600`.

Prints how many files of each kind were read and refused, and every fault with the seed and number that give it again
(`--only KIND --seed SEED --first NUMBER`); exits with 1 if there was one.
"""

import contextlib
import faulthandler
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import datasets
import file_kinds
import tyro


def main(
    seconds: float = 3600.0, seed: int | None = None, first: int = 0, only: str = ""
) -> bool:
    """Read damaged files, and return whether there was a fault.

    Args:
      seconds: how long to draw.
      seed: of the draws; by default a new one.
      first: number of the first draw.
      only: part of a kind's name.
    """
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)
    faulthandler.enable()  # a crash says at least which kind it was
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # also where a shell started this in the background
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    print(f"seed {seed}", flush=True)
    found = Counter()
    number = first
    with tempfile.TemporaryDirectory() as sandbox:
        root = Path(sandbox) / "root"
        root.mkdir()
        kinds = {
            name: kind for name, kind in file_kinds.kinds(root).items() if only in name
        }
        for (
            kind
        ) in kinds.values():  # what a first use compiles or loads is charged to no file
            kind.read(kind.file)
        began = time.monotonic()
        with contextlib.suppress(KeyboardInterrupt):
            while time.monotonic() < began + seconds:
                for name, kind in kinds.items():
                    draw = random.Random(f"{name} {seed} {number}")
                    try:
                        found[name, file_kinds.outcome(kind, root, draw)] += 1
                    except file_kinds.Fault as fault:
                        found[name, "fault"] += 1
                        print(f"{name}, number {number}: {fault}\n", flush=True)
                number += 1
    print("| kind | read | refused | faults |\n|---|---:|---:|---:|")
    for name in kinds:
        row = [found[name, outcome] for outcome in ("read", "refused", "fault")]
        print(f"| {name} | {' | '.join(f'{n:,}' for n in row)} |")
    return any(outcome == "fault" for _, outcome in found)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
