"""Trainings of a trial by models: those of one arm are lanes of a program, each with its own rows and rates."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int32

from .. import tasks
from ..io.digests import Digests
from ..loading.identity import digests
from ..loading.model import LoadedModel, Texts, load_model, packing_of
from ..loading.spec import LoadOptions
from ..methods.entry import SearchJob
from ..methods.untrained import FewShotRecipe
from ..runs.evaluate import likeliest_correct, with_options
from ..runs.rows import generate_rows
from ..runs.setup import encode_shown
from ..support.platform import for_cpu
from ..tasks import Encoded, Example, Split, Task, TrainingRows
from ..training.compiled import make_room
from ..training.fit import fit, recipe_rates, start
from ..training.frozen import GENERATION, LOSS, OPTIONS
from ..training.loss import seed_likelihoods
from ..training.mesh import on_mesh, to_host
from ..training.method import Params
from ..training.problem import Problem
from ..training.recipe import Recipe
from .procedure import Scores, Training

_BATCH = 64  # rows of an evaluation


@dataclasses.dataclass(frozen=True, eq=False)
class Lanes:
    """The models of a trial's arms, which share the base's weights.

    Attributes:
      arms: options of each arm: its base, pool, method and recipe.
      rows: all rows of the task; trainings name them by their numbers.
      seed: seed of starts, orders of rows, modules drawn from a larger pool, and examples in prompts.
    """

    arms: Mapping[str, LoadOptions]
    rows: tuple[Example, ...]
    seed: int

    def measure(self, trainings: Sequence[Training]) -> Iterator[Scores]:
        """Yield the scores of trainings, in their order."""
        for lanes in self.together(trainings):
            make_room()
            options = dataclasses.replace(
                self.arms[lanes[0].arm], control_draw=lanes[0].draw
            )
            yield from (
                self._adapted(options, lanes)
                if self._learns(lanes[0])
                else self._untrained(options, lanes)
            )

    def together(self, trainings: Sequence[Training]) -> list[list[Training]]:
        """Return trainings in groups that are measured at once: neighbours of one arm, draw and length.

        On a CPU each training is a group: programs for other numbers of lanes would take longer to compile than lanes
        save.
        """

        def group_of(each: Training) -> tuple[Any, ...]:
            alone = for_cpu() and self._learns(each)
            return (
                each.arm,
                each.draw,
                each.share,
                each.answers,
                each if alone else None,
            )

        return [[*group] for _, group in itertools.groupby(trainings, key=group_of)]

    def _learns(self, training: Training) -> bool:
        return self.arms[training.arm].entry.learns != "untrained"

    def steps(self, training: Training) -> int:
        """Return the number of steps that a training takes."""
        options = self.arms[training.arm]
        if options.entry.learns != "trained":
            return 0
        recipe = shortened(options.recipe, training.share)
        return recipe.epochs * -(-len(training.train) // recipe.batch_size)

    @functools.cached_property
    def base(self) -> LoadedModel:
        """The base model alone."""
        of_arm = next(iter(self.arms.values()))
        return load_model(
            LoadOptions(
                base=of_arm.base,
                method="zero-shot",
                chat=of_arm.chat,
                dtype=of_arm.dtype,
            )
        )

    @functools.cached_property
    def digests(self) -> Digests:
        """Digests of the base and of the modules that the first arm with a pool fuses, which are loaded for this."""
        pools = (options for options in self.arms.values() if options.pool is not None)
        return digests(next((self._loaded(options) for options in pools), self.base))

    @functools.cached_property
    def tokens(self) -> Encoded:
        """Tokens of all rows; ValueError for a row that is too long for the base."""
        return self._encode(new_tokens=self.new_tokens)

    @functools.cached_property
    def new_tokens(self) -> int:
        """Most tokens of a generated answer, as in a run that trains on all rows."""
        return tasks.most_new_tokens(max(map(len, self._encode().labels)))

    def _encode(self, new_tokens: int = 0) -> Encoded:
        return tasks.encode(
            self.base.tokenizer, self.rows, self.base.text_format, new_tokens=new_tokens
        )

    @functools.cached_property
    def answers(self) -> tuple[tuple[str, ...], ...] | None:
        """The possible answers of every row; None for a task without a closed set."""
        return tasks.answer_options(
            self._task(range(len(self.rows)), range(len(self.rows)))
        )

    def _task(self, train: Sequence[int], test: Sequence[int]) -> Task:
        return Task(
            "the rows",
            tuple(self.rows[i] for i in train),
            tuple(self.rows[i] for i in test),
            "",
        )

    @functools.lru_cache(maxsize=2)  # noqa: B019 (the models live as long as the trial)
    def _loaded(self, options: LoadOptions) -> LoadedModel:
        return load_model(options, like=self.base)

    def _untrained(
        self, options: LoadOptions, lanes: Sequence[Training]
    ) -> Iterator[Scores]:
        """Score the unchanged base, without or with examples in its prompts: all lanes at once."""
        tokens = self.tokens
        stop = None
        asked = [row for lane in lanes for row in lane.test]
        if isinstance(options.recipe, FewShotRecipe):
            texts = Texts(self.base.tokenizer, self.base.text_format)
            shots = options.recipe.shots
            shown = [
                tasks.few_shot(self._task(lane.train, lane.test), shots, self.seed)
                for lane in lanes
            ]
            parts = [
                encode_shown(texts, one, len(one.test), self.new_tokens)
                for one in shown
            ]
            tokens = Encoded(
                *(
                    sum((getattr(part, side) for part in parts), ())
                    for side in ("inputs", "labels")
                )
            )
            # After its answer, a model that continues the prompt adds further examples.
            stop = (
                tasks.BETWEEN_EXAMPLES
                if texts.text_format.ends and not texts.text_format.chat
                else None
            )
        else:
            tokens = Encoded(
                *(
                    tuple(side[row] for row in asked)
                    for side in (tokens.inputs, tokens.labels)
                )
            )
        problem = self.base.problem
        every = range(len(asked))
        losses = self._losses({}, problem, tokens, [every])[0]
        correct = self._correct(
            {}, problem, tokens, [self.rows[row] for row in asked], stop
        )
        chosen = self._chosen({}, problem, tokens, [every], [asked])
        borders = np.cumsum([len(lane.test) for lane in lanes])[:-1]
        of_lanes = (np.split(losses, borders), np.split(correct, borders))
        options_of_lanes = (
            [None] * len(lanes) if chosen is None else np.split(chosen[0], borders)
        )
        yield from map(Scores, *of_lanes, options_of_lanes)

    def _adapted(
        self, options: LoadOptions, lanes: Sequence[Training]
    ) -> Iterator[Scores]:
        """Train the lanes, and score the test rows of each."""
        loaded = self._loaded(options)
        problem = loaded.problem.replace(
            index=jnp.tile(loaded.problem.index, (len(lanes), 1))
        )
        params = self._params(problem, loaded, options, lanes)
        asked = [lane.test for lane in lanes]
        losses = self._losses(params, problem, self.tokens, asked)
        if not lanes[0].answers:
            yield from (Scores(losses[i, : len(rows)]) for i, rows in enumerate(asked))
            return
        chosen = self._chosen(params, problem, self.tokens, asked, asked)
        longest = max(
            range(len(self.rows)), key=lambda row: len(self.tokens.inputs[row])
        )
        most = max(map(len, asked)) + 1
        for place, rows in enumerate(asked):
            # Filled up with the longest row, the prompts of all lanes have one shape.
            filled = [*rows, *[longest] * (most - len(rows))]
            prompts = Encoded(
                *(
                    tuple(side[row] for row in filled)
                    for side in vars(self.tokens).values()
                )
            )
            one = jax.tree.map(
                lambda leaf, place=place: leaf[place : place + 1], params
            )
            of_lane = problem.replace(index=problem.index[place : place + 1])
            correct = self._correct(
                one, of_lane, prompts, [self.rows[row] for row in filled]
            )
            yield Scores(
                losses[place, : len(rows)],
                correct[: len(rows)],
                None if chosen is None else chosen[place],
            )

    def _params(
        self,
        problem: Problem,
        loaded: LoadedModel,
        options: LoadOptions,
        lanes: Sequence[Training],
    ) -> Params:
        """Return the parameters of all lanes, trained, searched or given."""
        entry = options.entry
        seeds = (self.seed,) * len(lanes)
        recipe = shortened(options.recipe, lanes[0].share)
        if entry.learns == "given":
            return start(problem, seeds).params
        train = _table([lane.train for lane in lanes])
        # Training validates after each epoch, on one row here, because nothing depends on it.
        split = Split(train, train[:, :1])
        packing = packing_of(loaded.config, on_cpu=for_cpu())
        rows = TrainingRows(
            self.tokens, split, self.base.tokenizer.pad_token_id, packing
        )
        if entry.search is not None:
            modules = loaded.modules * len(lanes)
            return entry.search(
                SearchJob(
                    problem, rows, recipe, seeds, modules, record=lambda rows: None
                )
            )[0]
        of_lanes = [
            problem.method.learning_rates(
                dataclasses.replace(recipe, **dict(lane.rates))
            )
            for lane in lanes
        ]
        by_group = {
            group: jnp.array([rates[group] for rates in of_lanes], jnp.float32)
            for group in of_lanes[0]
        }
        rates = recipe_rates(problem.method, recipe, len(lanes))._replace(
            learning_rate=by_group
        )
        return fit(
            problem, rows, start(problem, seeds), recipe, seeds, rates=rates
        ).params

    def _losses(
        self,
        params: Params,
        problem: Problem,
        tokens: Encoded,
        asked: Sequence[Sequence[int]],
    ) -> Float[np.ndarray, "lanes rows"]:
        """Return the loss of each lane on its own rows of the tokens."""
        answer_tokens = np.mean([len(labels) for labels in self.tokens.labels])
        return -self._likelihoods(params, problem, tokens, asked, LOSS) / answer_tokens

    def _likelihoods(
        self,
        params: Params,
        problem: Problem,
        tokens: Encoded,
        asked: Sequence[Sequence[int]],
        purpose: int,
    ) -> Float[np.ndarray, "lanes rows"]:
        table = _table(asked)
        parts = []
        orders = tasks.batch_orders(table, batch_size=_BATCH)
        for number, batch in enumerate(
            tasks.train_batches(tokens, orders, pad_id=self.base.tokenizer.pad_token_id)
        ):
            of_batch = seed_likelihoods(
                params, on_mesh(batch, of_seeds=True), problem.read(purpose, number)
            )
            parts.append(to_host(of_batch).astype(float))
        return np.concatenate(parts, axis=1)[:, : table.shape[1]]

    def _chosen(
        self,
        params: Params,
        problem: Problem,
        tokens: Encoded,
        asked: Sequence[Sequence[int]],
        numbers: Sequence[Sequence[int]],
    ) -> list[Bool[np.ndarray, " test"]] | None:
        """Return whether the likeliest option of each row is its answer, by lane; None for a task without options.

        `asked` are places in the tokens, and `numbers` the same rows' numbers.
        """
        if self.answers is None:
            return None
        by_place = dict(
            zip(itertools.chain(*asked), itertools.chain(*numbers), strict=True)
        )
        places = [*by_place]
        task = self._task((), [by_place[place] for place in places])
        options = [self.answers[by_place[place]] for place in places]
        prompts = Encoded(tuple(tokens.inputs[place] for place in places), ())
        pairs = with_options(
            self.base.tokenizer, task, prompts, options, self.base.text_format
        )
        ends = np.cumsum([0, *map(len, options)])
        own = {place: range(ends[i], ends[i + 1]) for i, place in enumerate(places)}
        of_lanes = [[pair for place in lane for pair in own[place]] for lane in asked]
        likelihoods = self._likelihoods(params, problem, pairs, of_lanes, OPTIONS)
        chosen = []
        for values, of_lane, rows in zip(likelihoods, of_lanes, numbers, strict=True):
            own_answers = [self.answers[row] for row in rows]
            chosen += [
                *likeliest_correct(
                    values[None, : len(of_lane)], own_answers, self._task((), rows)
                )
            ]
        return chosen

    def _correct(
        self,
        params: Params,
        problem: Problem,
        prompts: Encoded,
        rows: Sequence[Example],
        stop: str | None = None,
    ) -> Bool[np.ndarray, " rows"]:
        """Return whether the generated answers of one lane match."""
        answers = generate_rows(
            params,
            lambda number: problem.read(GENERATION, number),
            prompts,
            batch_size=_BATCH,
            max_new_tokens=self.new_tokens,
            pad_id=self.base.tokenizer.pad_token_id,
            worth=math.inf,
        )
        said = tasks.decode(
            self.base.tokenizer, answers.tokens[0], self.base.text_format
        )
        if stop is not None:
            said = [text.partition(stop)[0] for text in said]
        return tasks.exact_match([said], [row.target for row in rows])[0]


def shortened(recipe: Recipe, share: float) -> Recipe:
    """Return a recipe with a share of its epochs, at least one."""
    return dataclasses.replace(recipe, epochs=max(round(recipe.epochs * share), 1))


def _table(rows: Sequence[Sequence[int]]) -> Int32[np.ndarray, "lanes most"]:
    """Return lists of row numbers as one array, filled up with -1, which is no row."""
    table = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for line, own in zip(table, rows, strict=True):
        line[: len(own)] = own
    return table
