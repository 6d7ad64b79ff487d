"""What a run is asked for: the command line, the saved configuration, and the presets."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..adapters.coefficients import Granularity, Start
from ..adapters.updates import Composition
from ..adapters.merges import MergeKind
from ..tasks.protocol import Protocol
from ..methods.method import Fusion
from ..training.step import Optimisation

MethodName = Literal[
    "fusion", "coefficients", "magnitudes", "lora", "dora", "vera", "full",
    "lorahub", "cma", "mean", "single", "merge", "zero-shot", "few-shot", "constant",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to fuse and train, in every number.

    Attributes:
      modules: how many modules of the pool a seed fuses; all of a smaller pool.
      choose: which: `draw` them by seed, or rank the whole pool by one backward pass over the training rows at zero
        coefficients, `gradient`.
      composition: `mix` or `sum` of the modules.
      granularity: of the coefficients.
      start: of the coefficients.
      differentiate_norm: let gradients flow through the magnitudes' norm.
      epochs: passes over the training rows.
      batch_size: rows in a step.
      lr_coefficients: learning rate of the coefficients.
      lr_magnitudes: learning rate of the magnitudes.
      lr_lora: learning rate of the LoRA and DoRA baselines' matrices.
      lr_vera: learning rate of VeRA's vectors.
      lr_full: learning rate of full fine-tuning.
      l2: inside the coefficients' gradient.
      l1: weight of mean |c| in the objective.
      schedule: of the learning rates.
      warmup: steps.
      clip: global norm of the gradients.
      stop_early: after epochs / 3 without a better validation loss, counted from epochs / 5 on.
      prune: share of the smallest magnitudes set to zero at half time.
      protocol: `reference` splits and orders the rows as the paper's code; `default` by seed.
      max_new_tokens: of generation; None for twice the longest training target.
      lora_rank: of the LoRA and DoRA baselines, whose alpha is twice that.
      lora_targets: the linear maps that LoRA, DoRA, VeRA and magnitudes alone adapt; by default the model family's
        own choice.
      vera_rank: of VeRA's random matrices.
      evaluations: of LoraHub's search.
      generations: of CMA-ES.
      population: members of a generation.
      shots: examples in a few-shot prompt.
      merge: PEFT's rule, for the method `merge`, with all modules at 1 / N.
      density: share of the entries that ties, dare and magnitude_prune keep.
    """

    modules: int = 20
    choose: Literal["draw", "gradient"] = "draw"
    composition: Composition = "sum"
    granularity: Granularity = "block"
    start: Start = "uniform"
    differentiate_norm: bool = False
    epochs: int = 20
    batch_size: int = 10
    lr_coefficients: float = 0.1
    lr_magnitudes: float = 0.01
    lr_lora: float = 2e-3
    lr_vera: float = 0.03
    lr_full: float = 2e-4
    l2: float = 0.0
    l1: float = 0.0
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: int = 0
    clip: float | None = 1.0
    stop_early: bool = False
    prune: float = 0.0
    protocol: Protocol = "default"
    max_new_tokens: int | None = None
    lora_rank: int = 16
    lora_targets: tuple[str, ...] | None = None
    vera_rank: int = 128
    evaluations: int = 40
    generations: int = 40
    population: int = 16
    shots: int = 5
    merge: MergeKind = "linear"
    density: float = 0.5

    def fusion(self, *, magnitudes: bool) -> Fusion:
        """Return the fusion that this recipe describes."""
        return Fusion(
            composition=self.composition,
            granularity=self.granularity,
            start=self.start,
            magnitudes=magnitudes,
            differentiate_norm=self.differentiate_norm,
        )

    def optimisation(self, steps: int) -> Optimisation:
        """Return the static part of the optimisation over `steps` steps."""
        return Optimisation(
            steps=steps,
            schedule=self.schedule,
            warmup=self.warmup,
            clip=self.clip,
            patience=max(self.epochs // 3, 1) if self.stop_early else None,
            patience_from=self.epochs // 5,
            prune=self.prune,
        )


PRESETS = {
    "default": Recipe(),
    # The protocol of the paper's published code, in every number.
    "reference": Recipe(
        composition="mix",
        start="xavier",
        lr_coefficients=0.02,
        lr_magnitudes=0.005,
        l2=1e-5,
        l1=5e-4,
        schedule="constant",
        clip=None,
        stop_early=True,
        protocol="reference",
        max_new_tokens=256,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnArrays:
    """On which simulated ReRAM arrays a fusion is trained, and then evaluated.

    Attributes:
      crossbar: train with every frozen matrix in arrays: a folder that `lorafusion crossbar program` wrote, a preset
        or a .yaml or .json file; by default digitally.
      noise: of training: of the `chip` itself, which is calibrated to it; `fresh`, another chip at every step, which
        makes robust on any; `both` in turn; or `none`, which knows the bits of cells and converters alone.
      chip: the number of the chip that is trained on, unless noise is fresh or none, and evaluated on.
      chip_key: from which the chips of a preset or file are drawn; a folder has its own.
      digital: patterns of weights that stay digital: `head`, `pool.*`; a folder has its own.
      age: of the chip: seconds, or as in 1h, 1day, 1month, 1year.
      norm: the magnitudes' norms are those of the `ideal` weights, or of the weights as `programmed`, read back.
    """

    crossbar: str | None = None
    noise: Literal["chip", "fresh", "both", "none"] = "fresh"
    chip: int = 0
    chip_key: int = 0
    digital: tuple[str, ...] = ()
    age: str | None = None
    norm: Literal["ideal", "programmed"] = "ideal"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseOptions:
    """Fuse a pool of LoRA modules for a new task, and evaluate it by generation.

    Examples:
      lorafusion fuse --base google/flan-t5-large --pool pool --task bbh/snarks.json --seeds 1 2 3
      lorafusion fuse --preset reference --base base --pool pool --task task
      lorafusion fuse --base base --pool pool --task task --crossbar chips/noisy --noise chip --chip 3

    Attributes:
      base: the base model: a Hugging Face folder or a hub id (owner/name, owner/name@revision).
      pool: a converted pool, or a folder of PEFT adapter folders; methods that fuse nothing need none.
      task: a JSONL file or a folder of them, a BIG-Bench Hard file, a `datasets` folder or hub id.
      seeds: each draws its modules, its start and its order of rows; all run as one program.
      name: the run is written to OUT/NAME.
      out: where runs are.
      method: `fusion` trains coefficients and magnitudes, `coefficients` or `magnitudes` one of them; `lora`, `dora`,
        `vera` and `full` (fine-tuning) are trained from the base; `lorahub` and `cma` search one weight a module
        without gradients; `mean` weighs all modules alike, `single` takes the one of least training loss, `merge`
        combines them by one of PEFT's rules;
        `zero-shot`, `few-shot` (examples in the prompt) and `constant` (the most common answer) train nothing.
      control: `random` replaces every module by a random one of the same norms, `shuffled` shuffles its layers.
      adapters: fuse these modules, by name or index, instead of a draw by seed.
      recipe: every number of fusion and training; `--preset reference` starts from those of the paper's code.
      arrays: on which simulated arrays; none by default.
      prompt: template of the model's input, with {input}.
      train_rows: at most this many rows are trained and validated on.
      test_rows: evaluate on the first rows of the test set only.
      eval_batch: rows in a batch of generation.
      dtype: of weights and activations.
      load_in: hold base and pool in 4 or 8 bits.
      mesh: share the run out over devices: seeds over the axis `seed`, matrices over `model`, as in seed=4,model=2.
      distributed: this process is one of several, started by Slurm, Open MPI or GKE or on a TPU slice; --mesh is of all
        their devices.
      path: how seeds run: batched, or one after the other; by default what is faster on the platform.
      resume: go on with a run that was interrupted.
      start_from: start from the saved fusion of another run (same seeds, modules and method).
      log: also to Weights & Biases (WANDB_MODE=offline works).
      save_seconds: time between checkpoints, which are written at the end of an epoch.
    """

    base: str
    task: str
    pool: str | None = None
    seeds: tuple[int, ...] = (1,)
    name: str | None = None
    out: Path = Path("runs")
    method: MethodName = "fusion"
    control: Literal["none", "random", "shuffled"] = "none"
    adapters: tuple[str, ...] = ()
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = PRESETS["default"]
    arrays: Annotated[OnArrays, tyro.conf.arg(name="")] = OnArrays()
    prompt: str | None = None
    train_rows: int = 100
    test_rows: int | None = None
    eval_batch: int = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    load_in: Literal["full", "nf4", "int8"] = "full"
    mesh: str | None = None
    distributed: bool = False
    path: Literal["auto", "vmap", "map"] = "auto"
    resume: bool = False
    start_from: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    log: bool = False
    save_seconds: float = 30.0


# Methods without a pool; those that compute nothing before evaluation; those whose numbers follow from the pool alone.
POOLLESS: frozenset[MethodName] = frozenset(
    ("magnitudes", "lora", "dora", "vera", "full", "zero-shot", "few-shot", "constant")
)
UNTRAINED: frozenset[MethodName] = frozenset(("zero-shot", "few-shot", "constant"))
GIVEN: frozenset[MethodName] = frozenset(("mean", "merge"))
