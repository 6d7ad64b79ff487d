"""Options that several commands share; the options of a command inherit from those that it has."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

# What base and pool are held in: whole, or in 4 or 8 bits.
LoadIn = Literal["full", "nf4", "int8"]
Dtype = Literal["float32", "bfloat16", "float16"]
Format = Literal["adapter", "merged", "gguf", "gguf-f16", "gguf-q8_0"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """The base model.

    Attributes:
      base: the base model: a Hugging Face folder, a hub id (owner/name, owner/name@revision) or a GGUF file.
    """

    base: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolOptions(BaseOptions):
    """The base model and a pool of modules.

    Attributes:
      pool: a converted pool, or a folder of PEFT adapter folders.
    """

    pool: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyBaseOptions:
    """A base model, or none.

    Attributes:
      base: base model without a run: a Hugging Face folder, a hub id or a GGUF file.
    """

    base: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyPoolOptions(AnyBaseOptions):
    """A base model and a pool, or none.

    Attributes:
      pool: a converted pool, or a folder of PEFT adapter folders, for the base.
    """

    pool: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModulesOptions:
    """Modules of a pool.

    Attributes:
      adapters: modules of the pool, by name or index; by default a draw by seed, or all.
    """

    adapters: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DtypeOptions:
    """Precision of a computation.

    Attributes:
      dtype: dtype of weights and activations.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionOptions(DtypeOptions):
    """Precision of a computation and of its frozen weights.

    Attributes:
      load_in: hold base and pool in 4 or 8 bits.
    """

    load_in: LoadIn = "full"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Chat template.

    Attributes:
      chat: put the input into the base model's own chat template, as the user's message.
    """

    chat: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Format of a task's rows.

    Attributes:
      prompt: template of the model's input, with {input} or other columns of the task's rows.
      input: column of a row's input, if it is not input or context.
      target: column of a row's answer, if it is not target, completion or output.
    """

    prompt: str | None = None
    input: str | None = None
    target: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalBatchOptions:
    """Batches of generation.

    Attributes:
      eval_batch: number of rows in a batch of generation.
    """

    eval_batch: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedRowsOptions(EvalBatchOptions):
    """Rows that are evaluated.

    Attributes:
      test_rows: evaluate on the first rows of the test set only.
    """

    test_rows: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """Devices.

    Attributes:
      mesh: divide the work over devices: seeds and chips over the axis `seed`, matrices over `model`, as in
        seed=4,model=2.
    """

    mesh: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedOptions:
    """Seed of random draws.

    Attributes:
      seed: seed of the random draws.
    """

    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyRunOptions:
    """A run, or none.

    Attributes:
      run: folder of the run; it has its own base, prompt and chat template.
    """

    run: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSeedOptions(AnyRunOptions):
    """A run and one of its seeds, or none.

    Attributes:
      seed: seed of the run; by default its first.
    """

    seed: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOptions:
    """Output.

    Attributes:
      out: folder to write, which must not exist.
    """

    out: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredDtypeOptions:
    """Dtype of files.

    Attributes:
      dtype: dtype of the written numbers; by default that of an adapter as it was read, float32 of other adapters, and
        the run's of a base.
    """

    dtype: Dtype | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatOptions(StoredDtypeOptions, OutOptions):
    """Output in the hub's formats.

    Attributes:
      format: a PEFT `adapter`; a Hugging Face base with the trained parameters `merged` in; for llama.cpp a LoRA in
        `gguf` without magnitudes, or a merged model in `gguf-f16` or `gguf-q8_0`.
    """

    format: Format = "adapter"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitalOptions:
    """Weights outside of simulated arrays.

    Attributes:
      keep_digital: patterns of weights that stay digital: `head`, `pool.*`; a file of chips has its own.
    """

    keep_digital: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnChipsOptions(DigitalOptions):
    """Simulated chips that are drawn.

    Attributes:
      chip_key: key from which the chips of a preset or file are drawn; a file of chips has its own.
    """

    chip_key: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgeOptions:
    """Age of chips.

    Attributes:
      age: age of the chips: seconds, or as in 1h, 1day, 1month, 1year.
    """

    age: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassesOptions:
    """Passes of a training.

    Attributes:
      epochs: passes over the training rows.
    """

    epochs: int = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsOptions(PassesOptions):
    """Passes and steps of a training.

    Attributes:
      batch_size: rows in a step.
    """

    batch_size: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """Modules of a fusion.

    Attributes:
      modules: number of modules of the pool that a seed fuses; all of a smaller pool.
    """

    modules: int = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedMatricesOptions:
    """Rank of VeRA.

    Attributes:
      vera_rank: rank of the random matrices, which all sites share.
    """

    vera_rank: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeOptions(DrawOptions):
    """A base model's shape, and the sizes of methods on it.

    Attributes:
      shape: name of a known shape, such as flan-t5-large, or the folder, hub id or GGUF file of a base model, whose
        configuration is read.
      rank: rank of every module, and of LoRA and DoRA.
      targets: the linear maps that are adapted, wherever they occur; by default the family's own choice.
    """

    shape: str = "flan-t5-large"
    rank: int = 16
    targets: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossbarOptions:
    """Simulated arrays.

    Attributes:
      crossbar: a preset (ideal, isaac, puma, raella, neurram, aihwkit, crosssim), a .yaml or .json file, a file of
        chips, or a folder of preparations.
    """

    crossbar: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class BasisOptions:
    """Shared basis.

    Attributes:
      basis: number of directions of the pool's shared basis (`lorafusion convert --basis`), from all its modules; by
        default modules stay whole.
    """

    basis: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PresetOptions:
    """Simulated arrays.

    Attributes:
      crossbar: a preset (ideal, isaac, puma, raella, neurram, aihwkit, crosssim), a .yaml or .json file, a file of
        chips, or a folder of preparations.
    """

    crossbar: str = "isaac"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRowsOptions:
    """Rows that are trained on.

    Attributes:
      train_rows: at most this many rows are trained and validated on; four fifths of a file that has no more.
    """

    train_rows: int = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Where work runs.

    Attributes:
      engine: in this process, or as tasks of a Ray cluster.
      address: a running Ray cluster: auto, or host:port of its head node; by default one is started on this machine.
    """

    engine: Literal["local", "ray"] = "local"
    address: str | None = None

    def __post_init__(self):
        if self.address is not None and self.engine != "ray":
            raise ValueError(
                f"--address {self.address} is that of a Ray cluster: add --engine ray, or leave it out"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanFlagOptions:
    """A plan instead of the work itself.

    Attributes:
      plan: print what this needs (FLOPs, memory, time), and run nothing. The base may be the name of a shape, such as
        flan-t5-large, whose weights are not needed.
    """

    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialOptions(
    EngineOptions,
    PlanFlagOptions,
    SeedOptions,
    DtypeOptions,
    PassesOptions,
    RowOptions,
    PoolOptions,
):
    """Find out what to do with adapters for a task: methods that are tuned and cross-validated, and a sentence.

    Without the pool: the base alone, examples in the prompt, magnitudes, a LoRA of the pool's rank. With it: the
    nearest adapter (that of least training loss) as it is and trained further, LoRAFusion, and the same with random
    adapters of the same size. The report has an answer after each round: all methods briefly, then tuned, then fold by
    fold. When the time is over, or after Ctrl-C, the last answer stands, and the same command continues.

    Examples:
      lorafusion trial --base examples/small/base --pool examples/small/adapters --task examples/small/tasks/odd_dash \
--train-rows 40
      lorafusion trial --base base --pool pool --task rows.csv --input question --target answer --minutes none
      lorafusion trial --base base --pool pool --task rows.csv --arms DoRA=dora "shuffled modules=fusion:shuffled"

    Attributes:
      task: one or more tasks, as in `lorafusion fuse`; of one with a training and a test part, only the first is used.
      chat: put the input into the model's own chat template.
      train_rows: use at most so many rows; by default all.
      arms: further methods, or others instead of those of the same names, as NAME=METHOD or NAME=METHOD:CONTROL.
      folds: parts of the rows; each is tested by models that were trained on the others.
      minutes: time after which no further training begins, shared by the tasks; none for as long as all rounds take.
      out: folder of the report and of all measurements.
    """

    task: tuple[str, ...]
    chat: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    train_rows: int | None = None
    arms: tuple[str, ...] = ()
    folds: int = 5
    minutes: float | Literal["none"] = 15.0
    out: Path = Path("runs/trial")
