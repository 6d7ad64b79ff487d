"""Use of a run, a mixture or a base: `lorafusion evaluate` on a task, `lorafusion generate` on new text."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from flax import nnx

from ..adapters.updates import precomputed
from ..io.export import merged_base
from ..io.hf import Base, open_base
from ..io.pool import open_pool
from ..loading.model import Texts, load_model, load_texts
from ..loading.spec import LoadOptions
from ..methods.base_alone import ZeroShot
from ..models.architecture import HEAD, kernels
from ..models.generate import GREEDY, Sampling
from ..support.checks import at_least, check_uint32
from ..support.options import (
    AnyBaseOptions,
    ChatOptions,
    EvalBatchOptions,
    EvaluatedRowsOptions,
    RunSeedOptions,
)
from ..support.reading import decode as decode_json, utf8
from ..tasks import (
    Encoded,
    Example,
    Task,
    as_input,
    columns,
    decode,
    encode,
    eval_batches,
    load_task,
    row_example,
    stream_text,
)
from ..training.mesh import to_host
from ..training.method import Frozen, Params
from ..training.problem import Problem
from .evaluate import evaluate_seeds, seed_rows
from .folder import RunConfig, check_answers, load_run, load_seed, note
from .generation import draw_keys, generate_rows, stream_row
from .options import FuseOptions, row_format
from .setup import Setup, load_setup, of_run, own_task
from .weight_list import check_modules, coefficients_of, typed_weights

_NEW_TOKENS = 256  # of a base model's answer
# Rows that are multiplied by a large matrix while it is read. With SmolLM2 and a sum of 24 modules of rank 8, a token
# takes a core 38 ms, merged 20 ms, and merging 4.7 s.
_READING = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(EvaluatedRowsOptions):
    """Evaluate a fused run, on its own task or another one, and print a row for each seed.

    Attributes:
      run: folder of the run.
      task: task to evaluate on, as in `lorafusion fuse`, without rows whose inputs the run was trained on; by default
        the run's own task, which must be unchanged.
      train_rows: number of rows of an unsplit `task` that are not scored, but show which answers there are and
        calibrate chips; by default 0, and as in the run for a method that needs examples.
    """

    run: Path
    task: str | None = None
    train_rows: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(EvalBatchOptions, ChatOptions, AnyBaseOptions, RunSeedOptions):
    """Let a fused run, or a base model as it is, answer new text: one line in, one answer out.

    If the run's prompt names other columns than `input`, a line is a JSON object with these columns.

    Attributes:
      file: file with a line for each answer; by default standard input.
      max_new_tokens: most tokens of an answer; by default as in the run, and 256 without one.
      stream: answer line after line, and print tokens as they come.
      sampling: choice of the next token.
      sampling_seed: seed of the draws; the draws of a line depend on it and on the number of the line alone.
    """

    file: Path | None = None
    max_new_tokens: int | None = None
    stream: bool = False
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = GREEDY
    sampling_seed: int = 0


@dataclasses.dataclass(frozen=True)
class _Answering:
    """One seed of a run, or a base model as it is, that answers new text in at most `new_tokens` tokens."""

    fused: LoadOptions
    base: Base
    run: tuple[Path, RunConfig] | None
    params: Params
    place: int  # of the seed among those of the run
    new_tokens: int

    def encode(self, texts: Texts, lines: Mapping[int, str]) -> Encoded:
        """Tokenise lines, given by their places in the text."""
        prompt = None
        column = None
        if isinstance(self.fused, FuseOptions):
            prompt = self.fused.prompt
            column = self.fused.input
        rows = {f"line {place + 1}": line for place, line in lines.items()}
        if columns(prompt) - {"input"}:
            fix = f"give a row such as {row_example(prompt)}"
            rows = {
                number: decode_json(
                    row.encode(), dict[str, Any], number, allow_unknown=True, fix=fix
                )
                for number, row in rows.items()
            }
        examples = [
            Example(as_input(row, number, prompt, input=column), "")
            for number, row in rows.items()
        ]
        return encode(
            texts.tokenizer, examples, texts.text_format, new_tokens=self.new_tokens
        )

    def load(
        self,
        on_chip: Callable[[], Problem] | None,
        tokens: int,
        steps: int,
        rows: int = 1,
    ) -> tuple[Params, Problem]:
        """Load the parameters and the model, by default digitally; leaves have an axis of this seed alone.

        Plain weights take the run in, if its adapters would take longer in `tokens` of prompts and `steps` of `rows`.
        """
        if on_chip is None:
            params, problem = self._digital(tokens, steps, rows)
        else:
            params = self.params
            problem = on_chip()
        params, index = jax.device_put(
            jax.tree.map(lambda p: p[None], to_host((params, problem.index)))
        )
        return params, problem.replace(index=index)

    def _digital(self, tokens: int, steps: int, rows: int) -> tuple[Params, Problem]:
        loaded = load_model(self.fused, base=self.base)
        if self.run is not None:
            loaded = of_run(loaded, self.fused, *self.run, self.params)
        problem = loaded.problem.replace(
            index=jax.device_put(to_host(loaded.problem.index)[self.place])
        )
        parts = self.params, problem.frozen, problem.index
        adapters_of = jax.jit(problem.method.adapters)
        model = nnx.merge(problem.graph, problem.frozen.base)

        def leaves() -> dict[str, list[jax.Array]]:
            ready = precomputed(adapters_of(*parts)[0], model)
            return {name: jax.tree.leaves(adapter) for name, adapter in ready.items()}

        shapes = jax.eval_shape(leaves)
        plain = all(isinstance(kernel, jax.Array) for kernel in kernels(model).values())
        size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        sites = [problem.config.adaptable[name] for name in shapes]
        merging = sum(
            site.layers * site.d_in**2 * site.d_out for site in sites
        )  # products of `merged_base`
        if (
            HEAD in shapes
            or not plain
            or merging >= size * (tokens + steps * max(rows, _READING))
        ):
            return self.params, problem
        adapters, _ = adapters_of(*parts)
        merged = nnx.state(merged_base(model, adapters))
        merged = jax.tree.map(
            lambda new, old: new.astype(old.dtype), merged, problem.frozen.base
        )
        return {}, problem.replace(method=ZeroShot(), frozen=Frozen(merged))


def evaluate_run(options: EvaluateOptions) -> list[dict[str, Any]]:
    """Return the scores of every seed of a run (see `seed_rows`)."""
    return seed_rows(*evaluate_seeds(*load_to_evaluate(options)))


def evaluate_mixture(
    base: str,
    pool: str,
    *,
    task: str,
    weights: Sequence[str] = (),
    weights_file: Path | None = None,
    prompt: str | None = None,
    chat: bool = False,
    train_rows: int | None = None,
    test_rows: int | None = None,
    eval_batch: int = 64,
) -> list[dict[str, Any]]:
    """Return the scores of a weighted sum of modules of a pool on a task, as one seed (see `seed_rows`).

    `weights` and `weights_file` are those of `lorafusion merge`, other arguments those of `FuseOptions`.
    """
    mixture = typed_weights(weights, weights_file)
    check_modules(mixture, open_pool(pool).names, pool)
    options = FuseOptions(
        base=base,
        pool=pool,
        task=task,
        prompt=prompt,
        chat=chat,
        method="coefficients",
        adapters=tuple(mixture),
        train_rows=train_rows or 0,
        test_rows=test_rows,
        eval_batch=eval_batch,
    )
    options.check()
    setup = load_setup(options, to_train=False)
    modules = setup.problem.frozen.pool
    assert modules is not None
    coefficients = coefficients_of(mixture, modules)[setup.problem.index]
    return seed_rows(*evaluate_seeds(setup, options, {"coefficients": coefficients}))


def load_to_evaluate(options: EvaluateOptions) -> tuple[Setup, FuseOptions, Params]:
    """Return the setup of a run, its options updated by those of the evaluation, and its trained parameters."""
    at_least(1, test_rows=options.test_rows)
    fused, params, config = load_run(options.run)
    task = _task_to_evaluate(options, fused, config)
    recipe = dataclasses.replace(fused.recipe, max_new_tokens=config["max_new_tokens"])
    train_rows = fused.train_rows if options.train_rows is None else options.train_rows
    test_rows = options.test_rows or fused.test_rows or None
    fused = dataclasses.replace(
        fused,
        task=task.source,
        recipe=recipe,
        train_rows=train_rows,
        test_rows=test_rows,
        eval_batch=options.eval_batch,
    )
    setup = load_setup(fused, to_train=False, task=task)
    first_seed = jax.eval_shape(lambda: jax.tree.map(lambda p: p[0], params))
    return of_run(setup, fused, options.run, config, first_seed), fused, params


def _task_to_evaluate(
    options: EvaluateOptions, fused: FuseOptions, config: RunConfig
) -> Task:
    """Return the task of a run, or another one without the rows that the run was trained on.

    Raises a ValueError for a run's own task that has changed, and for one without other rows.
    """
    folder = options.run
    at_least(0, train_rows=options.train_rows)
    if options.task is None:
        if options.train_rows is not None:
            raise ValueError(
                "--train-rows divides another task: name it with --task, or leave it out"
            )
        if fused.test_rows == 0:
            raise ValueError(
                f"{folder} was trained on all rows of its task (--test-rows 0): give others with --task"
            )
        return own_task(fused, folder, config)
    needed = fused.entry.answers != "model"
    train_rows = options.train_rows
    if train_rows is None:
        train_rows = fused.train_rows if needed else 0
    need = ("train", "test") if needed else ("test",)
    task = load_task(
        options.task, **row_format(fused), train_rows=train_rows, need=need
    )
    trained = {*config["trained_sha256"]}
    test = tuple(row for row in task.test if row.input_sha256 not in trained)
    seen = tuple(row for row in task.test if row.input_sha256 in trained)
    if not test:
        raise ValueError(
            f"{folder} was trained on the inputs of all rows of {options.task}: give others with --task"
        )
    if seen:
        note(
            f"note: {len(seen)} rows of {options.task} are left out, because {folder} was trained on their inputs"
        )
    return dataclasses.replace(task, train=task.train + seen, test=test)


def generate_lines(
    options: GenerateOptions, load: Callable[[], Problem] | None = None
) -> list[str]:
    """Return the answers of a run's seed or of a base model to the lines of a file or of standard input.

    A blank line has an empty answer, so that answers and lines have the same numbers. By default the options' model
    answers; `load` returns another problem of the same seed, which may have its weights on chips.
    """
    answering = _answering(options)
    lines = list(read_lines(options.file))
    texts = load_texts(answering.base, chat=answering.fused.chat)
    filled = {place: line for place, line in enumerate(lines) if line.strip()}
    encoded = answering.encode(texts, filled)
    places = np.array([*filled])
    rows = min(options.eval_batch, len(encoded))
    steps = answering.new_tokens * -(-len(encoded) // max(rows, 1))
    tokens = sum(map(len, encoded.inputs))
    params, problem = answering.load(load, tokens, steps, rows)
    answers = [""] * len(lines)
    generated = generate_rows(
        params,
        lambda number: problem,
        encoded,
        batch_size=options.eval_batch,
        max_new_tokens=answering.new_tokens,
        pad_id=texts.tokenizer.pad_token_id,
        sampling=options.sampling,
        keys=lambda indices: draw_keys(
            options.sampling, options.sampling_seed, places[indices]
        ),
    )
    for place, answer in zip(
        places,
        decode(texts.tokenizer, generated[0], texts.text_format),
        strict=True,
    ):
        answers[place] = answer
    return answers


def stream_lines(
    options: GenerateOptions, load: Callable[[], Problem] | None = None
) -> Iterator[Iterator[str]]:
    """Yield the answers of `generate_lines`, line after line, each in pieces as its tokens come.

    A line is read after the previous answer is complete.
    """
    answering = _answering(options)
    texts = load_texts(answering.base, chat=answering.fused.chat)
    params, problem = answering.load(load, 0, answering.new_tokens)
    if "base" not in params:
        problem = problem.per_layer()
    tokenizer = texts.tokenizer
    for number, line in enumerate(read_lines(options.file)):
        if not line.strip():
            yield iter(())
            continue
        ((_, batch),) = eval_batches(
            answering.encode(texts, {number: line}), 1, pad_id=tokenizer.pad_token_id
        )
        tokens = stream_row(
            params,
            problem,
            batch,
            draw_keys(options.sampling, options.sampling_seed, np.array([number])),
            max_new_tokens=answering.new_tokens,
            sampling=options.sampling,
        )
        yield stream_text(tokenizer, tokens, texts.text_format)


def read_lines(file: Path | None) -> Iterator[str]:
    """Yield the lines of a file, or of standard input, blank ones too, as they arrive.

    Raises a ValueError for a file that is not UTF-8, and at the end of one that holds no text.
    """
    if file is None:
        source = contextlib.nullcontext(sys.stdin)
    else:
        source = open(file, encoding="utf-8-sig")
    empty = True
    where = file or "standard input"
    with source as text, utf8(where):
        for line in text:  # U+2028 and its like end no line, as in files of rows
            line.encode()  # in some locales bytes that are not UTF-8 become half characters
            empty = empty and not line.strip()
            yield line.rstrip("\r\n")
    if empty:
        raise ValueError(f"{where} holds no text: give a line for each answer")


def _answering(options: GenerateOptions) -> _Answering:
    at_least(1, max_new_tokens=options.max_new_tokens, eval_batch=options.eval_batch)
    check_uint32(sampling_seed=options.sampling_seed)
    if (options.run is None) == (options.base is None):
        raise ValueError(
            "give one model: a fused run with --run, or an unchanged base model with --base"
        )
    if options.run is None:
        if options.seed is not None:
            raise ValueError("a base model has no seeds: leave out --seed")
        fused = LoadOptions(
            base=str(options.base), method="zero-shot", chat=options.chat
        )
        return _Answering(
            fused,
            open_base(fused.base),
            None,
            {},
            0,
            options.max_new_tokens or _NEW_TOKENS,
        )
    if options.chat:
        raise ValueError(
            "a run uses the chat template if it was fused with it: leave out --chat"
        )
    fused, params, config, place = load_seed(options.run, options.seed)
    check_answers(options.run, fused)
    new_tokens = options.max_new_tokens or config["max_new_tokens"]
    return _Answering(
        fused, open_base(fused.base), (options.run, config), params, place, new_tokens
    )
