"""Comparison of configurations of arrays for one model: predicted loss and cost of all, simulated loss of the best.

1. A third of the batches gives the inputs of every matrix. For every configuration, the error power of every matrix
   over that of its outputs is computed: of cells as `expected_error` does, of converters and read noise by reading a
   sample of its columns with a sample of its inputs.
2. Excess loss is predicted as the sum over kinds of matrices of g times that power, with a g for cells and one for
   converters, which are measured once with noise in one kind at a time.
3. The front of predicted loss and energy is simulated on the second third, from the cheapest configuration on. The one
   that is chosen is simulated again, on other chips and the last third.
"""

import dataclasses
import functools
import hashlib
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..support.progress import progress
from ..support.reading import error_context, read_lines
from ..support.writing import append_lines
from .calibration.whole_model import Counted, Run, calibrate_tree, observe, summed
from .chip.chip import Chip, chips_in, over_stack, reads
from .chip.program import is_random
from .chip.tree import Preparations, Rules, program_tree
from .config.files import config_hash
from .config.presets import PRESETS
from .config.schema import CrossbarConfig, Tile, deterministic
from .cost.energy import (
    CONSTANTS,
    Constants,
    Counts,
    ReadEnergy,
    WriteCost,
    counts,
    preparing,
    read_energy,
    read_latency,
    write_cost,
)
from .cost.ranges import Range, longest, total
from .devices.device import Device, ReadNoise
from .devices.write_error import Independent
from .preparation.code_errors import CodeErrors, code_errors
from .preparation.moments import moments
from .preparation.preparation import Preparation, needs_preparation
from .preparation.prepare import expected_error, prepare
from .read.matmul import matmul

_SAMPLE = 48  # columns and inputs of a matrix that predictions read
_POWER = (
    0.03  # error power, over that of the outputs, at which sensitivities are measured
)
_SIGMA = 0.01  # error that is scaled to it
_SENSITIVITY_CHIPS = 2
_CHIPS = 3
_LOOKS = 4  # interim analyses, at most
_CONFIRMING_CHIPS = 10
_RISK = 0.05  # of an interval that misses the mean, in all analyses of a configuration
LEAST_BATCHES = 6
_CALIBRATING = 4  # batches that set ranges of converters
_MARGIN = 2  # configurations with a predicted loss of more than this times the bound are not simulated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model whose matrices are put on arrays.

    Attributes:
      weights: the matrices, or stacks of them, by name.
      together: names of matrices that meet the same inputs, in the order of the computation.
      products: number of vectors that a matrix, or all of a stack, multiply for one token or example.
      place: function from rules by name, the key of a chip and preparations to a function from a tree of weights and a
        batch to losses, and that tree. Losses are differentiable.
      counted: inputs that are no padding (see `moments`).
      macs: multiply-adds for one token or example that stay digital.
    """

    weights: Mapping[str, Float[Array, "*N d_in d_out"]]
    together: Sequence[Sequence[str]]
    products: Mapping[str, int]
    place: Callable[[Rules, Array, Preparations], tuple[Run, Any]]
    counted: Counted | None = None
    macs: float = 0.0


class Cost(NamedTuple):
    """Cost of a model on arrays; energies and latency are those of one token or example.

    Attributes:
      written: counts of all matrices, and `writing` their cost.
      reading: energy of the arrays and their converters, by component.
      digital: energy of products that stay digital.
      latency: seconds of the arrays, one group of matrices after the other, and of the digital products.
    """

    written: Counts
    writing: WriteCost
    conversions: int
    reading: ReadEnergy
    digital: Range
    latency: Range

    @property
    def energy(self) -> Range:
        """All joules of a token or example."""
        return total([self.reading.total, self.digital])


class Interval(NamedTuple):
    """Mean excess loss with one-sided limits."""

    mean: float
    low: float
    high: float


class Choice(NamedTuple):
    """The configuration that is named.

    Attributes:
      label: its key in the grid.
      meets: whether its upper limit was below the bound.
      excess: loss above the digital model's, on chips and batches that did not choose it.
      percentile_90: 90th percentile of that over chips.
      above_rounded: mean loss above that of perfect cells and converters, whose weights and inputs have few bits.
    """

    label: str
    meets: bool
    excess: Interval
    percentile_90: float
    above_rounded: float


def cost(
    subject: Subject, config: CrossbarConfig, constants: Constants = CONSTANTS
) -> Cost:
    """Return the cost of a model on arrays of one configuration; ValueError for converters without energy."""
    written = Counts()
    read = Counts()
    latency = constants["mac_time"] * subject.macs
    for names in subject.together:
        first = subject.weights[names[0]]
        times = subject.products[names[0]]
        read += preparing(first.shape[-2], config) * times
        latencies = []
        for name in names:
            *lead, d_in, d_out = subject.weights[name].shape
            matrix = counts((d_in, d_out), config, prepares=False)
            written += matrix * math.prod(lead)
            read += matrix * subject.products[name]
            latencies.append(read_latency((d_in, d_out), config, constants))
        latency += longest(latencies) * times
    digital = (constants["mac_energy"] + constants["word_energy"]) * subject.macs
    reading = read_energy(read, config, constants)
    writing = write_cost(written, constants)
    return Cost(written, writing, read.conversions, reading, digital, latency)


class Exploration:
    """Comparison of configurations for a model.

    Measured values are kept by name, in a file of JSON lines that only grows, or in memory without one. Raises a
    ValueError for a file of another model or other batches, and once the time is over.

    Attributes:
      subject: the model.
      grid: configurations by their labels.
      costs: cost of each.
      simulated: simulated loss above the digital model's, of the configurations that were simulated.
    """

    def __init__(
        self,
        subject: Subject,
        batches: Sequence[Any],
        grid: Mapping[str, CrossbarConfig],
        *,
        file: Path | None = None,
        minutes: float | None = None,
    ):
        if len(batches) < LEAST_BATCHES:
            raise ValueError(
                f"{len(batches)} batches: give at least {LEAST_BATCHES}, a third of them to measure, one to choose "
                "and one to confirm"
            )
        self.subject = subject
        self.grid = grid
        self.costs: dict[str, Cost] = {}
        for label, config in grid.items():
            with error_context(label):
                self.costs[label] = cost(subject, config)
        batches = list(batches)
        third = len(batches) // 3
        self.measuring = batches[:third]
        self.choosing = batches[third : 2 * third]
        self.confirming = batches[2 * third :]
        self._numbers = {id(batch): number for number, batch in enumerate(batches)}
        self._errors: dict[str, CodeErrors] = {}
        self._preparations: dict[str, Preparations] = {}
        self.simulated: dict[str, Interval] = {}
        self._file = file
        self._minutes = math.inf if minutes is None else minutes
        self._start = time.monotonic()
        rows = [] if file is None else read_lines(file)
        self._values = {row["name"]: row["value"] for row in rows}
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves((dict(subject.weights), batches)):
            digest.update(np.asarray(leaf).tobytes())
        if self._measured("settings", digest.hexdigest) != digest.hexdigest():
            raise ValueError(
                f"{file} holds results of another model or other text: give another --out"
            )

    @functools.cached_property
    def sensitivities(self) -> dict[str, tuple[float, float]]:
        """Excess loss over error power of cells, and over that of converters, by kind of matrix."""
        unit = self._powers(self._noisy(_SIGMA, _SIGMA))
        digital = self._digital(self.measuring)
        sensitivities = {}
        for kind, names in progress("sensitivities", list(self._kinds.items())):
            values = []
            for part in range(2):
                sigma = [0.0, 0.0]
                sigma[part] = _SIGMA * math.sqrt(_POWER / unit[kind][part])
                rules = self._rules(self._noisy(0.0, 0.0))
                rules |= dict.fromkeys(names, self._noisy(*sigma))
                row = f"sensitivity {kind} {part}"
                means = [
                    np.mean(self._losses(row, rules, chip, self.measuring) - digital)
                    for chip in range(_SENSITIVITY_CHIPS)
                ]
                values.append(max(float(np.mean(means)), 0.0) / _POWER)
            sensitivities[kind] = (values[0], values[1])
        return sensitivities

    @functools.cached_property
    def predicted(self) -> dict[str, float]:
        """Predicted loss of each configuration above the digital model's."""
        powers = {}
        for label in progress("error powers", list(self.grid)):
            with error_context(label):
                powers[label] = self._powers(self.grid[label])
        return {
            label: sum(
                float(np.dot(self.sensitivities[kind], power))
                for kind, power in by_kind.items()
            )
            for label, by_kind in powers.items()
        }

    @property
    def front(self) -> list[str]:
        """Configurations that none of less energy is predicted to beat, cheapest first."""
        front = []
        least = math.inf
        for label in sorted(
            self.grid, key=lambda label: self.costs[label].energy.typical
        ):
            if self.predicted[label] < least:
                least = self.predicted[label]
                front.append(label)
        return front

    def choose(self, bound: float) -> Choice:
        """Simulate the front until a configuration's loss is below a bound, and confirm the one that is named."""
        candidates = [
            label for label in self.front if self.predicted[label] <= _MARGIN * bound
        ] or self.front[-1:]
        for label in progress("simulated", candidates):
            if meets := self._meets(label, bound):
                break
        else:
            meets = False
            label = min(self.simulated, key=lambda label: self.simulated[label].mean)
        config = self.grid[label]
        chips = range(_CHIPS, _CHIPS + _CONFIRMING_CHIPS)
        excess = self.excess(label, chips, self.confirming)
        rounded = dataclasses.replace(deterministic(config), adc=None)
        above = self._losses(
            config_hash(rounded), self._rules(rounded), 0, self.confirming
        )
        return Choice(
            label,
            meets,
            interval(excess, _RISK / 2),
            float(np.percentile(excess.mean(axis=1), 90)),
            float(excess.mean() + self._digital(self.confirming).mean() - above.mean()),
        )

    def excess(
        self, label: str, chips: Sequence[int], batches: Sequence[Any]
    ) -> Float[np.ndarray, "chips units"]:
        """Return the loss of some chips of a configuration above the digital model's, for each unit of the batches."""
        config = self.grid[label]
        if not is_random(config) and not config.reads_at_random:
            chips = chips[:1]  # all alike
        name = config_hash(config)
        rules = self._rules(config)
        losses = [self._losses(name, rules, chip, batches) for chip in chips]
        return np.stack(losses) - self._digital(batches)

    def _meets(self, label: str, bound: float) -> bool:
        """Return whether the loss of a configuration is below a bound, from as little text as shows it."""
        number = len(self.choosing)
        for look in sorted(
            {-(-number * (look + 1) // _LOOKS) for look in range(_LOOKS)}
        ):
            excess = self.excess(label, range(_CHIPS), self.choosing[:look])
            self.simulated[label] = interval(excess, _RISK / _LOOKS)
            if self.simulated[label].high <= bound:
                return True
            if self.simulated[label].low > bound:
                return False
        return False

    def _measured(self, name: str, measure: Callable[..., Any], *arguments: Any) -> Any:
        """Return a value, which is measured by a function unless the file has it."""
        if name not in self._values:
            if time.monotonic() - self._start > 60 * self._minutes:
                raise ValueError(
                    f"{self._minutes:g} minutes are over: the same command continues"
                )
            value = measure(*arguments)
            if self._file is not None:
                append_lines(self._file, [{"name": name, "value": value}])
            self._values[name] = value
        return self._values[name]

    @property
    def _kinds(self) -> dict[str, list[str]]:
        """Names of matrices by kind: those whose names differ in numbers alone are of one kind."""
        kinds: dict[str, list[str]] = {}
        for name in self.subject.weights:
            kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
            kinds.setdefault(kind, []).append(name)
        return kinds

    def _rules(self, config: CrossbarConfig) -> dict[str, CrossbarConfig | None]:
        return dict.fromkeys(self.subject.weights, config)

    def _noisy(self, cells: float, reads: float) -> CrossbarConfig:
        """Return real-valued cells, prepared as those of the grid, with errors whose sizes are arrays."""
        mapping = next(iter(self.grid.values())).mapping
        mapping = dataclasses.replace(
            mapping, weight_bits=None, scale="column", quantile=1.0, clip="none"
        )
        device = Device(
            programming=Independent(jnp.float32(cells)),
            read_noise=ReadNoise(jnp.float32(reads)),
        )
        return dataclasses.replace(PRESETS["ideal"], mapping=mapping, device=device)

    def _digital(self, batches: Sequence[Any]) -> Float[np.ndarray, " units"]:
        return self._losses("digital", self._rules(PRESETS["ideal"]), 0, batches)

    def _losses(
        self, name: str, rules: Rules, chip: int, batches: Sequence[Any]
    ) -> Float[np.ndarray, " units"]:
        """Return the losses of a chip, a number for each unit of the batches, measured once."""

        @functools.cache
        def placed() -> tuple[Run, Any]:
            config = next(iter(rules.values()))
            assert config is not None
            preparations = self._prepared(config, self.subject.weights, "all")
            run, tree = self.subject.place(rules, jax.random.key(chip), preparations)
            if config.adc or config.dac and config.dac.scaling == "calibrated":
                tree = calibrate_tree(run, tree, self.measuring[:_CALIBRATING])
            return run, tree

        def measure(batch: Any, number: int) -> list[float]:
            run, tree = placed()
            losses = _compiled_losses(tree, batch, jnp.int32(number), run=run)
            return np.asarray(losses, float).ravel().tolist()

        parts = []
        for batch in batches:
            number = self._numbers[id(batch)]
            row = f"loss {name} chip {chip} batch {number}"
            parts += self._measured(row, measure, batch, number)
        return np.asarray(parts)

    def _prepared(
        self, config: CrossbarConfig, weights: Mapping[str, Array], part: str
    ) -> Preparations:
        """Return the preparations of all columns, or of a sample of them, computed once; none where none are needed."""
        if not needs_preparation(config):
            return {}
        key = _written(config) + part
        errors = None
        if config.mapping.clip == "none":  # made for any device
            key = str(config.mapping) + part
        else:
            errors = self._code_errors(config)
        if key not in self._preparations:
            preparations = {}
            for names in self.subject.together:
                preparations |= prepare(
                    {name: weights[name] for name in names},
                    self._moments[names[0]],
                    config,
                    errors=errors,
                )
            self._preparations[key] = preparations
        return self._preparations[key]

    def _code_errors(self, config: CrossbarConfig) -> CodeErrors:
        key = _written(config)
        if key not in self._errors:
            self._errors[key] = code_errors(config)
        return self._errors[key]

    @functools.cached_property
    def _perfect(self) -> tuple[Run, Any]:
        return self.subject.place(self._rules(PRESETS["ideal"]), jax.random.key(0), {})

    @functools.cached_property
    def _moments(self) -> Mapping[str, Array]:
        run, tree = self._perfect
        batches = progress("inputs", self.measuring)
        return moments(run, tree, batches, counted=self.subject.counted)

    @functools.cached_property
    def _inputs(self) -> dict[str, Float[Array, "*N _SAMPLE d_in"]]:
        """Some inputs of each matrix."""
        run, tree = self._perfect
        chips = chips_in(tree)
        zeros = [jnp.zeros((*c.shape[:-2], _SAMPLE, c.shape[-2])) for c in chips]
        inputs = summed(run, tree, self.measuring[:1], _first_inputs, zeros)
        return {chip.name: x for chip, x in zip(chips, inputs, strict=True)}

    def _powers(self, config: CrossbarConfig) -> dict[str, tuple[float, float]]:
        """Return the error power of cells and of converters over that of the outputs, by kind of matrix."""
        cells = self._measured(f"cells {_written(config)}", self._cell_powers, config)
        converters = self._measured(
            f"converters {config_hash(config)}", self._converter_powers, config
        )
        return {
            kind: (
                float(np.mean([cells[name] for name in names])),
                float(np.mean([converters[name] for name in names])),
            )
            for kind, names in self._kinds.items()
        }

    def _cell_powers(self, config: CrossbarConfig) -> dict[str, float]:
        errors = self._code_errors(config)
        preparations = self._prepared(config, self._columns, "sample")
        powers = {}
        for name, weights in self._columns.items():
            preparation = preparations.get(name, Preparation())
            if config.mapping.scale != "column" and not preparations:
                largest = jnp.max(jnp.abs(self.subject.weights[name]), (-2, -1))
                ranges = jnp.broadcast_to(
                    largest[..., None], (*largest.shape, weights.shape[-1])
                )
                preparation = Preparation(ranges=ranges)
            error = expected_error(
                weights, self._moments[name], config, preparation, errors=errors
            )
            powers[name] = float(jnp.mean(error))
        return powers

    def _converter_powers(self, config: CrossbarConfig) -> dict[str, float]:
        chips = program_tree(
            self._columns,
            self._rules(config),
            jax.random.key(0),
            preparations=self._prepared(config, self._columns, "sample"),
        )
        chips = calibrate_tree(_read_all, chips, [self._inputs])
        statistics = observe(_read_all, chips, [self._inputs])
        return {
            chip.name: float(np.mean(10 ** (-np.asarray(seen.sqnr) / 10)))
            for chip, seen in zip(chips_in(chips), statistics, strict=True)
        }

    @functools.cached_property
    def _columns(self) -> dict[str, Float[Array, "*N d_in _SAMPLE"]]:
        """Some columns of each matrix."""
        columns = {}
        for name, weights in self.subject.weights.items():
            width = weights.shape[-1]
            places = np.arange(min(_SAMPLE, width)) * width // min(_SAMPLE, width)
            columns[name] = weights[..., places]
        return columns


def interval(excess: Float[np.ndarray, "chips units"], risk: float) -> Interval:
    """Return the mean over chips and units of text, with limits that each fail with a probability of `risk`.

    Chips and units are random samples: the variances of their means add up, with Satterthwaite's degrees of freedom.
    """
    from scipy.special import stdtrit

    mean = float(excess.mean())
    if excess.shape[1] < 2:
        return Interval(mean, -math.inf, math.inf)
    variance = 0.0
    squares = 0.0
    for axis in range(2):
        means = excess.mean(axis=1 - axis)
        if len(means) > 1:
            mean_variance = means.var(ddof=1) / len(means)
            variance += mean_variance
            squares += mean_variance**2 / (len(means) - 1)
    if variance == 0:
        return Interval(mean, mean, mean)
    reach = float(stdtrit(variance**2 / squares, 1 - risk)) * math.sqrt(variance)
    return Interval(mean, mean - reach, mean + reach)


def _written(config: CrossbarConfig) -> str:
    """Return a digest of what cells depend on."""
    return config_hash(dataclasses.replace(config, adc=None, tile=Tile()))


@functools.partial(jax.jit, static_argnames="run")
def _compiled_losses(tree: Any, batch: Any, number: Array, *, run: Run) -> Array:
    return run(reads(tree, number), batch)


def _read_all(chips: Mapping[str, Chip], inputs: Mapping[str, Array]) -> Array:
    """Return a number that depends on the read of every chip."""
    sums = [
        jnp.sum(over_stack(matmul, chip.shape[:-2])(inputs[name], chip))
        for name, chip in chips.items()
    ]
    return jnp.sum(jnp.stack(sums))


def _first_inputs(
    x: Float[Array, "*B d_in"], chip: Chip
) -> tuple[Float[Array, "*B d_out"], Float[Array, "_SAMPLE d_in"]]:
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    places = np.arange(_SAMPLE) * len(rows) // _SAMPLE
    return matmul(x, chip), rows[places]
