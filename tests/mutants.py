"""Do the tests notice a fault? Each of 40 small faults is written into a copy of the tree, whose tests then run.

    python tests/mutants.py                      # the test files that each mutant names, until one fails
    python tests/mutants.py --survivors          # the whole suite for those that survived
    python tests/mutants.py --only seeds         # mutants whose name contains a word

A mutant is killed when a test fails. `tests/mutants.jsonl` records which test killed each one; delete a row to run its
mutant again. The last row, `unchanged`, is of the tests that killed one, without a mutant: it must survive.

The old text must occur exactly once in its file. After a file was moved or its text changed, edit the list.
`mutants_49e672b.jsonl` has the results at that commit, before the package was rearranged: 36 of 40 killed. The whole
suite was not run for the other four.
"""

import argparse
import collections
import json
import os
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


# Name; file: tests; old text; new text. A backslash-n in a text is a line break.
_LIST = r"""
crossbar: subtract the polarities the other way round
crossbar/read/definition.py: crossbar/test_parasitics crossbar/test_fuzz
- return (sums[0] - sums[1])[None] if subtract else sums
+ return (sums[1] - sums[0])[None] if subtract else sums
crossbar: leave the top level out of the current at Gmin
crossbar/read/definition.py: crossbar/test_fuzz crossbar/test_paths
- return sums + g_min * top / (1 - g_min) * jnp.sum(u)
+ return sums + g_min / (1 - g_min) * jnp.sum(u)
crossbar: limit the current from above alone
crossbar/read/definition.py: crossbar/test_parasitics crossbar/test_fuzz
- jnp.clip(current, -like(tile.current_limit, g), like(tile.current_limit, g))
+ jnp.minimum(current, like(tile.current_limit, g))
crossbar: one code too few at the bottom of the ADC
crossbar/mapping/adc/quantiser.py: crossbar/test_fuzz crossbar/test_paths
- return jnp.clip(scaled, self.qmin, self.qmax)
+ return jnp.clip(scaled, self.qmin + 1, self.qmax)
crossbar: round ties of the ADC to odd
crossbar/mapping/adc/quantiser.py: crossbar/test_fuzz crossbar/test_paths
- jnp.where((abs(twice) == span) & odd,
+ jnp.where((abs(twice) == span) & ~odd,
crossbar: read inverted columns with the opposite sign
crossbar/mapping/decoding.py: crossbar/test_fuzz crossbar/test_paths
- jnp.where(flipped, top * ones - values, values)
+ jnp.where(flipped, values - top * ones, values)
crossbar: conductances grow instead of drifting down
crossbar/devices/drift.py: crossbar/test_device
- drifted = G * (t / t0) ** -nu
+ drifted = G * (t / t0) ** nu
crossbar: 1/f noise gathers from half the time
crossbar/devices/drift.py: crossbar/test_device crossbar/test_goldens
- gathered = jnp.maximum((time + read) / (2 * read), 1)
+ gathered = jnp.maximum((time + read) / (4 * read), 1)
crossbar: count a pulse for every cell
crossbar/devices/write_error.py: crossbar/test_device
- count + again.astype(count.dtype)
+ count + jnp.ones_like(count)
crossbar: bit lines one cell too short
crossbar/devices/wires.py: crossbar/test_parasitics
- like(rows + 1 - jnp.maximum(r[:, None], r[None, :]), G)
+ like(rows - jnp.maximum(r[:, None], r[None, :]), G)
calibration: choose the widest error instead of the least
crossbar/calibration/one_chip.py: crossbar/test_calibration crossbar/test_fuzz
- jnp.argmin(statistics.errors
+ jnp.argmax(statistics.errors
calibration: the range of the inputs ends one bin early
crossbar/calibration/one_chip.py: crossbar/test_calibration crossbar/test_fuzz
- axis=-1).astype(histogram.dtype) + 1
+ axis=-1).astype(histogram.dtype)
cost: energy of a 7-bit ADC for one of 8
crossbar/mapping/adc/sar.py: crossbar/test_cost
- constants["adc_growth"] ** (bits - 8)
+ constants["adc_growth"] ** (bits - 7)
norms: count pairs of modules once
adapters/norms.py: adapters/test_composition
- jnp.where(first == second, 1.0, 2.0)
+ jnp.where(first == second, 1.0, 1.0)
norms: leave a factor out of the norm of a column
adapters/norms.py: adapters/test_composition
- return jnp.sum(right * product(product(left.T, left), right), axis=0)
+ return jnp.sum(left.T @ left @ right, axis=0)
composition: read a rank that a module lacks
adapters/composition.py: adapters/test_composition hardware/test_model_on_arrays hardware/test_chips
- [None, None, :] < pool.rank[site]
+ [None, None, :] <= pool.rank[site]
basis: the smallest directions instead of the largest
adapters/basis.py: adapters/test_basis
- subset_by_index=[d - k, d - 1])[1][:, ::-1]
+ subset_by_index=[0, k - 1])[1][:, ::-1]
merges: multiply by the density of dare
adapters/merges.py: adapters/test_merges
- jnp.where(kept, tasks / density, jnp.zeros_like(tasks))
+ jnp.where(kept, tasks * density, jnp.zeros_like(tasks))
merges: the mean of ties over all modules
adapters/merges.py: adapters/test_merges
- jnp.maximum(jnp.sum(agreeing, axis=0), 1)
+ agreeing.shape[0]
t5: a token is behind itself
models/t5/attention.py: models/test_goldens
- offset = jnp.where(distance > 0, buckets, 0)
+ offset = jnp.where(distance >= 0, buckets, 0)
decoder: rotate one half the other way
models/decoder/rotary.py: models/test_decoder models/test_smollm2
- second * cos + first * sin
+ second * cos - first * sin
decoder: exchange stretched and kept frequencies of llama3
models/decoder/rotary.py: models/test_decoder models/test_decoder_configs io/test_gguf models/test_decoder_parity
- ((1 - kept) / rope.factor + kept) * frequencies
+ (kept / rope.factor + (1 - kept)) * frequencies
generation: the last token that top_p needs is left out
models/generate.py: models/test_sampling
- jnp.where(likely & (before < self.top_p), ordered, jnp.inf)
+ jnp.where(likely & (before + probabilities < self.top_p), ordered, jnp.inf)
training: the loss is not divided by the rows
training/loss.py: training/test_step
- loss = entropy / jnp.maximum(jnp.sum(batch.row_mask), 1).astype(jnp.float32)
+ loss = entropy
training: one epoch more of patience
training/step.py: training/test_step training/test_fit
- stopped = waited >= optimisation.patience
+ stopped = waited > optimisation.patience
training: the warmup begins at zero
training/step.py: training/test_step
- optax.linear_schedule(1 / optimisation.warmup, 1.0, optimisation.warmup - 1)
+ optax.linear_schedule(0.0, 1.0, optimisation.warmup)
seeds: all seeds read with the noise of the first
training/problem.py: hardware/test_model_on_arrays hardware/test_chips
- fn(self.replace(frozen=frozen.of_seed(number), index=index), *own, *shared)
+ fn(self.replace(frozen=frozen.of_seed(number * 0), index=index), *own, *shared)
ranking: the modules of least descent
runs/ranking.py: runs/test_ranking
- np.argsort(-descent,
+ np.argsort(descent,
batches: half as many widths
tasks/batches.py: tasks/test_batches
- rung = max(octave // 16, 4)
+ rung = max(octave // 8, 4)
scores: upper and lower case differ
tasks/metrics.py: tasks/test_metrics
- text.strip().lower().replace(".", "")
+ text.strip().replace(".", "")
options: a label that occurs once closes a task
tasks/options.py: tasks/test_options
- min(counts.values()) > 1
+ min(counts.values()) > 0
pool: forget the scaling of an adapter
io/pool/stack.py: io/test_convert io/test_export
- .T * np.float32(adapter.scaling[path])
+ .T * np.float32(1)
peft: the scaling of rslora without its root
io/peft/config.py: io/test_peft_read
- float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
+ float(alpha / rank)
gguf: tensors begin before the alignment
io/gguf/reader.py: io/test_gguf
- start = -(-header.at // alignment) * alignment
+ start = header.at // alignment * alignment
base: an untied head counts as tied
io/hf.py: io/test_hf
- and np.array_equal(tensors[names.head], tensors[names.embedding])\n
+ \n
serving: rows of a mix are weighted once
serving/rows.py: serving/test_bank
- mixed = jnp.sum(weighted, axis=-2, keepdims=True) * c
+ mixed = jnp.sum(weighted, axis=-2, keepdims=True)
serving: a row's run and its rows change places
serving/predict.py: serving/test_service
- [number for rows, numbers in blocks for number in numbers for _ in rows.inputs]
+ [number for rows, numbers in blocks for _ in rows.inputs for number in numbers]
plan: half of the attention's operations
estimates/flops.py: estimates/test_plan test_hlo_counts
- return 4.0 * sum(
+ return 2.0 * sum(
statistics: divide by the number of seeds
report/statistics.py: report/test_statistics
- by_seed.std(ddof=1)
+ by_seed.std(ddof=0)
statistics: p counts one sign twice
report/statistics.py: report/test_statistics
- min(np.sum(differences <= rounding), np.sum(differences >= -rounding))
+ max(np.sum(differences <= rounding), np.sum(differences >= -rounding))
"""


def _mutants() -> Iterator[Mutant]:
    lines = iter(_LIST.strip().splitlines())
    for name, where, old, new in zip(lines, lines, lines, lines, strict=True):
        file, _, tests = where.partition(": ")
        texts = (text[2:].replace(r"\n", "\n") for text in (old, new))
        yield Mutant(name, file, *texts, tuple(f"{test}.py" for test in tests.split()))


MUTANTS = tuple(_mutants())


def control(done: dict[str, dict]) -> Mutant:
    """Return no fault, and every test that killed a mutant."""
    killers = dict.fromkeys(row["by"].removeprefix("tests/") for row in done.values() if row["result"] == "killed")
    return Mutant(_UNCHANGED, "", "", "", tuple(killers))


def check(tree: Path) -> None:
    """Raise ValueError if an old text does not occur exactly once, or a test file is missing."""
    wrong = []
    for mutant in MUTANTS:
        file = tree / "lorafusion_jax" / mutant.file
        if not file.is_file():
            wrong.append(f"{mutant.name}: no file {mutant.file}")
        elif (found := file.read_text(encoding="utf-8").count(mutant.old)) != 1:
            wrong.append(f"{mutant.name}: {mutant.file} holds the old text {found} times, expected once")
        wrong += [f"{mutant.name}: no file tests/{t}" for t in mutant.tests if not (tree / "tests" / t).is_file()]
    if wrong:
        raise ValueError("update the list of mutants:\n" + "\n".join(wrong))


def recorded(results: Path) -> dict[str, dict]:
    """Return the last row of every mutant."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    return {row["mutant"]: row for row in map(json.loads, lines)}


def copy_tree(tree: Path, copy: Path) -> None:
    """Copy the files of a checkout that git tracks, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=tree, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (tree / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, copy / name)


def run(copy: Path, mutant: Mutant, *, whole_suite: bool) -> dict:
    """Return the row of one mutant, whose file is as before afterwards."""
    file = copy / "lorafusion_jax" / mutant.file
    before = None if mutant.name == _UNCHANGED else file.read_bytes()
    if before is not None:
        file.write_bytes(before.replace(mutant.old.encode(), mutant.new.encode()))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-m", _MARKERS, "-p", "no:cacheprovider"]
    tests = [] if whole_suite else [f"tests/{test}" for test in mutant.tests]
    # Python takes compiled files of the same second and size for those of the source.
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    begun = time.monotonic()
    try:
        done = subprocess.run([*command, *tests], cwd=copy, env=environment, capture_output=True, text=True)
    finally:
        if before is not None:
            file.write_bytes(before)
    if done.returncode not in (0, 1, 2) and done.returncode > 0:
        raise RuntimeError(f"{mutant.name}: pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    failures = (line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR ")))
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
    again = row is not None and options.survivors and row["result"] == "survived" and not row["whole_suite"]
    if row is not None and not again and mutant.name != _UNCHANGED:
        return False
    row = {"mutant": mutant.name, **run(copy, mutant, whole_suite=again and mutant.name != _UNCHANGED)}
    with options.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{row['result']:<9} {row['seconds']:>5} s  {mutant.name}  {row['by']}", flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=_ROOT, help="the checkout that is copied, by default this one")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="rows of results, added to")
    parser.add_argument("--only", default="", help="a word in the names of the mutants to run")
    parser.add_argument("--survivors", action="store_true", help="run the whole suite for those that survived")
    parser.add_argument("--check", action="store_true", help="only look for the old texts")
    options = parser.parse_args()
    check(options.tree)
    if options.check:
        return
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "tree"
        copy_tree(options.tree, copy)
        ran = [record(copy, mutant, options) for mutant in MUTANTS if options.only in mutant.name]
        if any(ran):
            record(copy, control(recorded(options.results)), options)
    counts = collections.Counter(row["result"] for name, row in recorded(options.results).items() if name != _UNCHANGED)
    print(f"{counts['killed']} of {len(MUTANTS)} killed, {counts['survived']} survived")


if __name__ == "__main__":
    main()
