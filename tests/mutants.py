"""Do the tests notice a fault? Each of 40 small faults is written into a copy of the tree, whose tests then run.

    python tests/mutants.py           # the test files that each mutant names, until one fails
    python tests/mutants.py seeds     # mutants whose name contains a word
    python tests/mutants.py --check   # whether each old text occurs exactly once: part of make lint

A mutant is killed when a test fails. `mutants.txt` lists them, four lines each: name; file: tests; old text; new text.
A backslash-n in a text is a line break. After a file was moved or its text changed, edit the list.
`mutants_49e672b.jsonl` has the results at that commit, before the package was rearranged: 36 of 40 killed. The whole
suite was not run for the other four.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).resolve().parent.parent
_NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", ".cache", "build", "__pycache__")


class Mutant(NamedTuple):
    """A fault: in a file of the package, a text becomes another one. The test files run first."""

    name: str
    file: Path
    pattern: str
    new: str
    tests: list[Path]


def read_mutants():
    """Read the list.

    Raises:
      ValueError: an old text does not occur exactly once, or a test file is missing.
    """
    lines = (_ROOT / "tests" / "mutants.txt").read_text().splitlines()
    mutants = []
    for name, places, old, new in zip(*[iter(lines)] * 4, strict=True):
        file, _, tests = places.partition(": ")
        # However a formatter breaks the lines.
        words = re.findall(r"\w+|[^\w\s]", old[2:].replace(r"\n", "\n"))
        mutant = Mutant(
            name,
            Path("lorafusion_jax", file),
            r"\s*,?\s*".join(map(re.escape, words)),
            new[2:].replace(r"\n", "\n"),
            [Path("tests", f"{test}.py") for test in tests.split()],
        )
        for path in mutant.tests:
            if not (_ROOT / path).is_file():
                raise ValueError(f"{name}: there is no {path}: update the list")
        matches = re.findall(mutant.pattern, (_ROOT / mutant.file).read_text())
        if len(matches) != 1:
            raise ValueError(
                f"{name}: expected the old text once in {file}, got it {len(matches)} times: update the list"
            )
        mutants.append(mutant)
    return mutants


def killer(copy, mutant):
    """Return the first test that fails with a mutant, or an empty text. The file is as before afterwards."""
    file = copy / mutant.file
    before = file.read_text()
    file.write_text(re.sub(mutant.pattern, lambda _: mutant.new, before))
    markers = "not (peft or long or nightly)"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-m", markers]
    # Python takes compiled files of the same second and size for those of the source.
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, *mutant.tests],
        cwd=copy,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    file.write_text(before)
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return next(
        iter(failures), f"pytest ended with {done.returncode}" * done.returncode
    )


def main(word=""):
    mutants = read_mutants()
    if word == "--check":
        return
    killed = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = shutil.copytree(_ROOT, Path(folder, "tree"), ignore=_NOT_COPIED)
        for mutant in mutants:
            if word in mutant.name:
                killed.append(killer(copy, mutant))
                print(f"{mutant.name}: {killed[-1] or 'SURVIVED'}", flush=True)
    print(f"{sum(map(bool, killed))} of {len(killed)} killed")


if __name__ == "__main__":
    main(*sys.argv[1:])
