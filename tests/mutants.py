"""Do the tests notice a fault? Each of 40 small faults is written into a copy of the tree, whose tests then run.

    python tests/mutants.py                      # the test files that each mutant names, until one fails
    python tests/mutants.py --survivors          # the whole suite for those that survived
    python tests/mutants.py --only seeds         # mutants whose name contains a word

A mutant is killed when a test fails. `tests/mutants.jsonl` records which test killed each one; delete a row to run its
mutant again. The last row, `unchanged`, is of the tests that killed one, without a mutant: it must survive.

`mutants.txt` lists them. The old text must occur exactly once in its file. After a file was moved or its text changed,
edit the list.
`mutants_49e672b.jsonl` has the results at that commit, before the package was rearranged: 36 of 40 killed. The whole
suite was not run for the other four.
"""

import argparse
import collections
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).resolve().parent.parent
_RESULTS = Path(__file__).resolve().with_suffix(".jsonl")
_UNCHANGED = "unchanged"
# The tests of `make test`.
_MARKERS = "not (peft or long or nightly)"


class Mutant(NamedTuple):
    """One fault: in `file`, `old` becomes `new`; `tests` run first, both below their folders."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def pattern(self) -> str:
        """Return an expression for the old text, however a formatter breaks its lines."""
        return r"\s*,?\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", self.old)))


# Four lines a mutant: name; file: tests; old text; new text. A backslash-n in a text is a line break.
_LIST = Path(__file__).resolve().with_suffix(".txt")


def _mutants() -> Iterator[Mutant]:
    lines = iter(_LIST.read_text(encoding="utf-8").splitlines())
    for name, where, old, new in zip(lines, lines, lines, lines, strict=True):
        file, _, tests = where.partition(": ")
        texts = (text[2:].replace(r"\n", "\n") for text in (old, new))
        yield Mutant(name, file, *texts, tuple(f"{test}.py" for test in tests.split()))


MUTANTS = tuple(_mutants())


def control(done: dict[str, dict]) -> Mutant:
    """Return no fault, and every test that killed a mutant."""
    killers = dict.fromkeys(
        row["by"].removeprefix("tests/")
        for row in done.values()
        if row["result"] == "killed"
    )
    return Mutant(_UNCHANGED, "", "", "", tuple(killers))


def check(tree: Path) -> None:
    """Raise ValueError if an old text does not occur exactly once, or a test file is missing."""
    wrong = []
    for mutant in MUTANTS:
        wrong += [
            f"{mutant.name}: no file tests/{t}"
            for t in mutant.tests
            if not (tree / "tests" / t).is_file()
        ]
        file = tree / "lorafusion_jax" / mutant.file
        if not file.is_file():
            wrong.append(f"{mutant.name}: no file {mutant.file}")
            continue
        source = file.read_text(encoding="utf-8")
        matches = len(re.findall(mutant.pattern, source))
        if matches != 1:
            wrong.append(
                f"{mutant.name}: {mutant.file} has the old text {matches} times, expected once"
            )
    if wrong:
        raise ValueError("update the list of mutants:\n" + "\n".join(wrong))


def recorded(results: Path) -> dict[str, dict]:
    """Return the last row of every mutant."""
    lines = (
        results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    )
    return {row["mutant"]: row for row in map(json.loads, lines)}


def copy_tree(tree: Path, copy: Path) -> None:
    """Copy the files of a checkout that git tracks, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=tree, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (tree / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, copy / name)


def run(copy: Path, mutant: Mutant, *, whole_suite: bool) -> dict:
    """Return the row of one mutant, whose file is as before afterwards."""
    file = copy / "lorafusion_jax" / mutant.file
    before = None if mutant.name == _UNCHANGED else file.read_bytes()
    if before is not None:
        source = before.decode()
        start, end = re.search(mutant.pattern, source).span()
        file.write_text(source[:start] + mutant.new + source[end:], encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--tb=no",
        "-m",
        _MARKERS,
        "-p",
        "no:cacheprovider",
    ]
    tests = [] if whole_suite else [f"tests/{test}" for test in mutant.tests]
    # Python takes compiled files of the same second and size for those of the source.
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    begun = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *tests],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
        )
    finally:
        if before is not None:
            file.write_bytes(before)
    if done.returncode not in (0, 1, 2) and done.returncode > 0:
        raise RuntimeError(
            f"{mutant.name}: pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    failures = (
        line
        for line in done.stdout.splitlines()
        if line.startswith(("FAILED ", "ERROR "))
    )
    by = next(failures, "").partition(" ")[2].partition(" - ")[0]
    return {
        "result": "killed" if done.returncode else "survived",
        "by": by,
        "whole_suite": whole_suite,
        "seconds": round(time.monotonic() - begun),
    }


def record(copy: Path, mutant: Mutant, options: argparse.Namespace) -> bool:
    """Run a mutant and add its row, if there is something new to run; return whether there was."""
    row = recorded(options.results).get(mutant.name)
    again = (
        row is not None
        and options.survivors
        and row["result"] == "survived"
        and not row["whole_suite"]
    )
    if row is not None and not again and mutant.name != _UNCHANGED:
        return False
    row = {
        "mutant": mutant.name,
        **run(copy, mutant, whole_suite=again and mutant.name != _UNCHANGED),
    }
    with options.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(
        f"{row['result']:<9} {row['seconds']:>5} s  {mutant.name}  {row['by']}",
        flush=True,
    )
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tree",
        type=Path,
        default=_ROOT,
        help="the checkout that is copied, by default this one",
    )
    parser.add_argument(
        "--results", type=Path, default=_RESULTS, help="rows of results, added to"
    )
    parser.add_argument(
        "--only", default="", help="a word in the names of the mutants to run"
    )
    parser.add_argument(
        "--survivors",
        action="store_true",
        help="run the whole suite for those that survived",
    )
    parser.add_argument(
        "--check", action="store_true", help="only look for the old texts"
    )
    options = parser.parse_args()
    check(options.tree)
    if options.check:
        return
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "tree"
        copy_tree(options.tree, copy)
        ran = [
            record(copy, mutant, options)
            for mutant in MUTANTS
            if options.only in mutant.name
        ]
        if any(ran):
            record(copy, control(recorded(options.results)), options)
    counts = collections.Counter(
        row["result"]
        for name, row in recorded(options.results).items()
        if name != _UNCHANGED
    )
    print(f"{counts['killed']} of {len(MUTANTS)} killed, {counts['survived']} survived")


if __name__ == "__main__":
    main()
