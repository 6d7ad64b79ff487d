"""Draw new crossbars for a given time and hold every path against the loops: `make fuzz-crossbar SECONDS=3600`.

Runs the properties of test_fuzz.py in turns with seeds of their own. Prints how many cases each property and path has
had, and the smallest failing example of every round that fails; exits with 1 if there was one.
"""

import argparse
import gc
import itertools
import os
import random
import sys
import time
import warnings

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = (
    "false"  # an hour's programs, none of which comes again
)

import conftest  # noqa: F401  strict JAX and type checks, before anything imports JAX
import hypothesis
import jax
import test_fuzz as properties
from hypothesis.internal.conjecture import engine

# Hypothesis makes a failing example smaller for five minutes, which an hour of a broken path would be spent on.
engine.MAX_SHRINKING_SECONDS = 30
# Cases of one property in its turn; a property that has failed stops at its first example.
ROUND = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="how long to begin new rounds"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=random.SystemRandom().randrange(2**32),
        help="of the first draws",
    )
    parser.add_argument("--only", default="", help="part of a property's name")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    properties.COMPILER.clear()  # programs as users' are compiled
    # As in the tests: what it warns of is drawn on purpose.
    warnings.filterwarnings(
        "ignore", "adc.range='granular' with convert='sum'", UserWarning
    )
    settings = hypothesis.settings(
        max_examples=ROUND,
        derandomize=False,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    end = time.monotonic() + options.seconds
    names = [name for name in properties.PROPERTIES if options.only in name]
    for seed, name in enumerate(itertools.cycle(names), start=options.seed):
        if time.monotonic() > end:
            break
        check, drawn = properties.PROPERTIES[name]
        try:
            settings(hypothesis.seed(seed)(hypothesis.given(**drawn)(check)))()
        except Exception as error:  # whatever a crash raises is a finding
            properties.TALLY[name, "any", "failed"] += 1
            message = "\n".join(
                [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]
            )
            print(f"\nFAILED {name}, seed {seed}\n{message[:4000]}\n", flush=True)
        jax.clear_caches()
        gc.collect()
    outcomes = ("within tolerance", "refused", "failed")
    print(
        f"\n{'property':70}{'path':10}"
        + "".join(f"{outcome:>18}" for outcome in outcomes)
    )
    for name, path in sorted({key[:2] for key in properties.TALLY}):
        counts = "".join(
            f"{properties.TALLY[name, path, outcome]:18,}" for outcome in outcomes
        )
        print(f"{name:70}{path:10}{counts}")
    return int(any(outcome == "failed" for *_, outcome in properties.TALLY))


if __name__ == "__main__":
    sys.exit(main())
