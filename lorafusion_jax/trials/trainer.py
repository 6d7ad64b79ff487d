"""Trainings of a trial: each is trained by `fit` and scored as a run is, with models that share the base's weights."""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence

import numpy as np

from .. import tasks
from ..io.digests import Digests
from ..loading.model import LoadedModel, digests, load_model
from ..methods.entry import SearchJob
from ..methods.lora import LoRA, is_warm
from ..runs.evaluate import evaluate, evaluate_few_shot, row_losses
from ..runs.options import FuseOptions
from ..runs.setup import Setup
from ..support.platform import make_room
from ..tasks import Encoded, Example, Split, Task
from ..training.fit import fit, start
from ..training.method import Params
from ..training.problem import Problem
from ..training.recipe import Recipe
from .procedure import Scores, Training


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """The models of a trial's arms, which share the base's weights.

    Attributes:
      runs: options of each arm's run.
      rows: all rows of the task; trainings name them by their numbers.
    """

    runs: Mapping[str, FuseOptions]
    rows: tuple[Example, ...]

    def scores(self, training: Training) -> Scores:
        """Train, and return the scores of the test rows."""
        make_room()
        start_time = time.monotonic()
        arm = self.runs[training.arm]
        recipe = shortened(arm.recipe, training.share)
        options = dataclasses.replace(
            arm,
            control_draw=training.draw,
            recipe=dataclasses.replace(
                recipe, stop_early=False, **dict(training.rates)
            ),
            train_rows=len(training.train),
        )
        loaded = self._loaded(dataclasses.replace(arm, control_draw=training.draw))
        tested = training.test
        if training.answers:
            # With the longest row behind them, the prompts of all folds have one shape.
            tested = (*tested, self._longest)
        setup = self._setup(loaded, training.train, tested)
        params = self._trained(setup, options, training)
        correct = None
        chosen = None
        if not training.answers:
            losses = row_losses(setup, params, batch_size=options.eval_batch)
        else:
            closed = self._answers and [self._answers[row] for row in tested]
            if options.entry.answers == "examples":
                scored = evaluate_few_shot(setup, options, closed=closed)
            else:
                scored = evaluate(
                    setup, params, batch_size=options.eval_batch, options=closed
                )
            losses = scored.row_losses
            correct = scored.correct
            chosen = scored.option_correct
        assert losses is not None  # a model was evaluated
        rows = slice(len(training.test))
        return Scores(
            losses[0, rows] / np.mean([len(labels) for labels in self.tokens.labels]),
            None if correct is None else correct[0, rows].astype(float),
            None if chosen is None else chosen[0, rows].astype(float),
            time.monotonic() - start_time,
        )

    def _setup(
        self, loaded: LoadedModel, train: tuple[int, ...], test: tuple[int, ...]
    ) -> Setup:
        # It trains on all rows, and validates on none, because nothing depends on validation.
        order = np.arange(len(train), dtype=np.int32)[None]
        return Setup(
            **vars(loaded),
            task=Task(
                "the rows",
                tuple(self.rows[row] for row in train),
                tuple(self.rows[row] for row in test),
                "",
            ),
            train=_take(self.tokens, train),
            test=_take(self.tokens, test),
            split=Split(order, order[:, :0]),
            max_new_tokens=self._new_tokens,
        )

    def _trained(
        self, setup: Setup, options: FuseOptions, training: Training
    ) -> Params:
        """Return the trained, searched or given parameters, with an axis of one seed."""
        entry = options.entry
        if entry.learns == "untrained":
            return {}
        if entry.search is not None:
            return _searched(setup, options)
        begin = start(setup.problem, options.seeds)
        if entry.learns == "given":
            return begin.params
        if is_warm(options.recipe):
            method = setup.problem.method
            assert isinstance(method, LoRA)
            problem, nearest = self._nearest(training.arm, training.train)
            params, _ = method.start_at(problem, nearest, begin.params)
            begin = start(setup.problem, options.seeds, params)
        return fit(
            setup.problem, setup.rows, begin, options.recipe, options.seeds
        ).params

    @functools.lru_cache(maxsize=1)  # noqa: B019 (as that of `_loaded`)
    def _nearest(self, arm: str, train: tuple[int, ...]) -> tuple[Problem, Params]:
        """Return the problem and the parameters of the module of least loss on the training rows."""
        options = dataclasses.replace(self.runs[arm], method="single", recipe=Recipe())
        setup = self._setup(self._loaded(options), train, ())
        return setup.problem, _searched(setup, options)

    @functools.cached_property
    def digests(self) -> Digests:
        """Digests of the base and of the modules that the first arm with a pool fuses, which are loaded for this."""
        with_pool = [run for run in self.runs.values() if run.pool is not None]
        return digests(self._loaded(with_pool[0]) if with_pool else self._base)

    @functools.cached_property
    def tokens(self) -> Encoded:
        """Tokens of all rows; ValueError for a row that is too long for the base."""
        return self._encoded(self._new_tokens)

    @functools.cached_property
    def _new_tokens(self) -> int:
        """Most tokens of a generated answer, as in a run that trains on all rows."""
        return tasks.most_new_tokens(max(map(len, self._encoded(0).labels)))

    @functools.cached_property
    def _longest(self) -> int:
        """Number of the row with most tokens."""
        return int(np.argmax([len(tokens) for tokens in self.tokens.inputs]))

    @functools.cached_property
    def _answers(self) -> tuple[tuple[str, ...], ...] | None:
        """The possible answers of every row; None for a task without a closed set."""
        return tasks.answer_options(Task("the rows", self.rows, self.rows, ""))

    def _encoded(self, new_tokens: int) -> Encoded:
        base = self._base
        return tasks.encode(
            base.tokenizer, self.rows, base.text_format, new_tokens=new_tokens
        )

    @functools.cached_property
    def _base(self) -> LoadedModel:
        """The base model alone."""
        first_run = next(iter(self.runs.values()))
        return load_model(
            dataclasses.replace(
                first_run,
                pool=None,
                method="zero-shot",
                control="none",
                recipe=Recipe(),
            )
        )

    @functools.lru_cache(maxsize=3)  # noqa: B019 (the models live as long as the trial)
    def _loaded(self, options: FuseOptions) -> LoadedModel:
        return load_model(options, like=self._base)


def _searched(setup: Setup, options: FuseOptions) -> Params:
    job = SearchJob(
        setup.problem,
        setup.rows,
        options.recipe,
        options.seeds,
        setup.modules,
        record=lambda rows: None,
    )
    search = options.entry.search
    assert search is not None
    return search(job)[0]


def _take(tokens: Encoded, rows: Sequence[int]) -> Encoded:
    inputs = tuple(tokens.inputs[row] for row in rows)
    return Encoded(inputs, tuple(tokens.labels[row] for row in rows))


def shortened(recipe: Recipe, share: float) -> Recipe:
    """Return a recipe with a share of its epochs, at least one."""
    return dataclasses.replace(recipe, epochs=max(round(recipe.epochs * share), 1))
