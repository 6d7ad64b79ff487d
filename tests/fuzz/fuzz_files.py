"""Read damaged files of every kind for a given time, or until Ctrl-C: `make fuzz SECONDS=3600`.

Prints how many files of each kind were read and refused, and every fault with the seed and number that give it again
(`--only KIND --seed SEED --first NUMBER`); exits with 1 if there was one.
"""

import argparse
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="how long to draw"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=random.SystemRandom().randrange(2**32),
        help="of the draws",
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--only", default="", help="part of a kind's name")
    options = parser.parse_args()
    faulthandler.enable()  # a crash says at least which kind it was
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # also where a shell started this in the background
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    print(f"seed {options.seed}", flush=True)
    found = Counter()
    number = options.first
    with tempfile.TemporaryDirectory() as sandbox:
        root = Path(sandbox) / "root"
        root.mkdir()
        kinds = {
            name: kind
            for name, kind in file_kinds.kinds(root).items()
            if options.only in name
        }
        for (
            kind
        ) in kinds.values():  # what a first use compiles or loads is charged to no file
            kind.read(kind.file)
        began = time.monotonic()
        with contextlib.suppress(KeyboardInterrupt):
            while time.monotonic() < began + options.seconds:
                for name, kind in kinds.items():
                    draw = random.Random(f"{name} {options.seed} {number}")
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
    sys.exit(main())
