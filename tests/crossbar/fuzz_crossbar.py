"""Draw new crossbars for a given time and hold every path against the loops: `make fuzz-crossbar SECONDS=3600`.

Runs the properties of test_crossbar_fuzz.py in turns with seeds of their own. Prints how many cases each property and
path has had, and the smallest failing example of every kind of failure; exits with 1 if there was one.
"""

import argparse
import contextlib
import gc
import os
import random
import re
import sys
import time
import traceback
import warnings
from typing import Any

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # an hour's programs, none of which comes again

import conftest  # noqa: F401  strict JAX and type checks, before anything imports JAX
import hypothesis
import jax
import test_fuzz as properties
from hypothesis.internal.conjecture import engine

# Hypothesis makes a failing example smaller for five minutes, which an hour of a broken path would be spent on.
engine.MAX_SHRINKING_SECONDS = 30
# Cases of one property in its turn; a property that has failed stops at its first example.
ROUND = 10


class TimeIsUp(BaseException):
    """No time is left for another draw."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long to draw")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32), help="of the first draws")
    parser.add_argument("--only", default="", help="part of a property's name")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    properties.COMPILER.clear()  # programs as users' are compiled
    # As in the tests: what it warns of is drawn on purpose.
    warnings.filterwarnings("ignore", "adc.range='granular' with convert='sum'", UserWarning)
    seed, failures, end = options.seed, {}, time.monotonic() + options.seconds
    names = [name for name in properties.PROPERTIES if options.only in name]
    with contextlib.suppress(TimeIsUp):
        while True:
            for name in names:
                seed += 1
                if failed := one_round(name, seed, end):
                    properties.TALLY[name, "any", "failed"] += 1
                    if (name, failed[0]) not in failures:
                        failures[name, failed[0]] = failed[1]
                        print(f"\nFAILED {name}, seed {seed}\n{failed[1]}\n", flush=True)
                jax.clear_caches()
                gc.collect()
            print(f"{properties.TALLY.total()} cases, {len(failures)} kinds of failure", flush=True)
    table()
    return bool(failures)


def one_round(name: str, seed: int, end: float) -> tuple[str, str] | None:
    """Return the kind and the description of the smallest failing example, if one of a round of draws fails.

    Raises:
      TimeIsUp: before a draw after `end`, where none has failed.
    """
    check, drawn = properties.PROPERTIES[name]
    failed = False

    def timed(**case: Any) -> None:
        nonlocal failed
        if not failed and time.monotonic() > end:
            raise TimeIsUp
        try:
            check(**case)
        except Exception:
            failed = True
            raise

    settings = hypothesis.settings(
        max_examples=ROUND,
        derandomize=False,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    try:
        settings(hypothesis.seed(seed)(hypothesis.given(**drawn)(timed)))()
    except Exception as error:  # whatever a crash raises is a finding
        last = traceback.extract_tb(error.__traceback__)[-1]
        message = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
        kind = re.sub(r"[-+]?\d[\d.e+-]*", "#", f"{last.name} {str(error).strip()[:60]}")
        return kind, message[:4000]
    return None


def table() -> None:
    outcomes = ("bitwise", "within tolerance", "refused", "failed")
    print(f"\n{'property':70}{'path':10}" + "".join(f"{o:>18}" for o in outcomes))
    for name, path in sorted({key[:2] for key in properties.TALLY}):
        counts = "".join(f"{properties.TALLY[name, path, outcome]:18,}" for outcome in outcomes)
        print(f"{name:70}{path:10}{counts}")


if __name__ == "__main__":
    sys.exit(main())
