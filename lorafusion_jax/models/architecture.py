"""The protocol of a family of models: a dataclass that extends `Architecture`, a `Model`, and a `Family` of both.

A *site* is one linear map of a block, stacked over the layers of its stack. Its name begins with the stack's and
ends with the map's: `reader.attention.query`. Site and layer together name one matrix of the model, which has a
module path in Hugging Face's files.

Axis letters: B batch, S source, T target, V vocabulary, D model width, L layer.
"""

import dataclasses
import fnmatch
import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    runtime_checkable,
)

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from .layers import Adapters, Base, Hidden, Logits, Mask, Rows, Source, Target
from .weights import Weight, dense

# The tokens of a row: the input (source) and the model's answer (target).
Part = Literal["source", "target"]
Parts = tuple[Part, ...]
# The axis of a matrix that a mesh of devices splits.
Split = Literal["columns", "rows"]
# Sizes and numbers of layers in a file, bounded so that a damaged file takes neither time nor memory.
Size = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
# Time of an operation on scores, with softmax and masks, over that of one in a product with a matrix: measured.
_SCORES = 4.0
# Name of the head among the matrices that an adapter may change.
HEAD = "head.lm_head"
# Versions of transformers have a text model at `language_model.model`, `model`, `model.language_model` and so on.
# Early files of a GPT-2 lack its `transformer`.
_WRAPPERS = re.compile(
    r"^(?:(?:model|language_model|text_model)\.)+|^transformer\.(?=h\.|w[pt]e\.|ln_f\.)"
)


class Attention(NamedTuple):
    """One attention of a block; `reads` are the tokens whose keys and values it attends to."""

    reads: Parts
    heads: int
    kv_heads: int
    d_head: int


class Stack(NamedTuple):
    """Blocks of one kind, one after the other.

    Attributes:
      layers: number of blocks.
      reads: the tokens that run through it; the last stack reads `target`.
      attentions: attentions of a block.
      d_ff: widest activation within a block.
      recurrent_heads: heads of a block's recurrent state, if it has one instead of keys and values.
    """

    layers: int
    reads: Parts
    attentions: tuple[Attention, ...]
    d_ff: int
    recurrent_heads: int = 0


@dataclasses.dataclass(frozen=True)
class Site:
    """One linear map, stacked over the layers of its stack: kernels [layers, d_in, d_out].

    Attributes:
      path: Hugging Face's module path, with `{layer}` for the layer's number.
      reads: the tokens that it multiplies.
      split: the axis that a mesh of devices splits. After a matrix that is split by rows, devices sum.
      stage: a name that sites of one stack share if they can be computed at the same time; those that read the same
        tokens then have the same input.
      first: number of its first layer in the model.
      every: distance of its layers in the model.
    """

    layers: int
    d_in: int
    d_out: int
    path: str = dataclasses.field(default="", repr=False)
    reads: Parts = dataclasses.field(default=("target",), repr=False)
    split: Split = dataclasses.field(default="columns", repr=False)
    stage: str = dataclasses.field(default="", repr=False)
    first: int = dataclasses.field(default=0, repr=False)
    every: int = dataclasses.field(default=1, repr=False)

    def path_of(self, layer: int) -> str:
        return self.path.format(layer=self.first + self.every * layer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Structure of a model and how to run it. Hashable, so it may be a static argument.

    A family adds its fields, `stacks` and `sites`.

    Attributes:
      family: name in `registry.FAMILIES`.
      causal: prompt and answer are one text that runs through one stack, not a source and a target.
      splits: by a name in their path in the model's state, the axis by which a mesh splits matrices other than kernels.
      tied: the head is the embedding, transposed.
      pad_id: the token that fills up rows.
      eos_id: the token, or the tokens, that end an answer.
      dtype: dtype of activations; weights are cast to it where they are used.
      unroll: compile the layers one after the other, whose backward pass keeps all values, instead of as a loop, which
        keeps the products; slower to compile, faster for few layers.
    """

    family: ClassVar[str]
    causal: ClassVar[bool] = False
    splits: ClassVar[Mapping[str, Split]] = {"embedding": "rows", "head": "columns"}

    vocab_size: Size
    d_model: Size
    tied: bool = False
    pad_id: int = 0
    eos_id: int | tuple[int, ...] = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    unroll: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        """Last names of the sites that methods without a pool adapt by default."""
        raise NotImplementedError

    @functools.cached_property
    def stacks(self) -> Mapping[str, Stack]:
        """Stacks by name, in the order of the computation."""
        raise NotImplementedError

    @functools.cached_property
    def sites(self) -> Mapping[str, Site]:
        """Every site by name, in the order of the computation, stack by stack."""
        raise NotImplementedError

    @functools.cached_property
    def adaptable(self) -> Mapping[str, Site]:
        """Every site and the head, which only a pool's adapters change."""
        return {**self.sites, HEAD: Site(1, *self.head, path="lm_head", stage="head")}

    @property
    def longest_row(self) -> int | None:
        """Most tokens of a row, prompt and answer together; None where positions have no limit."""
        return None

    @property
    def presumed_tied(self) -> bool:
        """Return whether the head is tied, as far as the configuration shows it without the weights."""
        return self.tied

    @property
    def end_ids(self) -> tuple[int, ...]:
        return (self.eos_id,) if isinstance(self.eos_id, int) else self.eos_id

    @property
    def layers(self) -> int:
        """Number of blocks of all stacks."""
        return sum(stack.layers for stack in self.stacks.values())

    @property
    def head(self) -> tuple[int, int]:
        """Shape of the head."""
        return self.d_model, self.vocab_size


@runtime_checkable
class Model(Protocol):
    """A model: an NNX module that holds the frozen base weights. Adapters are an argument of its methods."""

    config: Architecture
    embedding: Base

    def variables(self) -> dict[str, Base]:
        """Return the variables that multiply activations.

        Every site's kernel [L, d_in, d_out], in the order of `Architecture.sites`, and `head` [D, V] unless it is tied.
        """
        ...

    def label_logits(
        self,
        input_ids: Source,
        input_mask: Mask,
        labels: Target,
        adapters: Adapters,
        rows: Rows | None = None,
    ) -> Logits:
        """Return the logits that predict each label, from the source and the labels before it.

        A negative label is not a target: predictions at its position are ignored. With `rows` (`tasks.Rows`) these lie
        behind each other in one line, and each has the logits that it has alone.
        """
        ...

    def prompt(
        self, input_ids: Source, input_mask: Mask, length: int, adapters: Adapters
    ) -> tuple[Int[Array, " B"] | Float[Array, "B V"], Any]:
        """Read the source; return what generation continues from, and a cache for `length` new tokens.

        It continues from a first token of the target or, in a causal model, from the logits that follow the source.
        """
        ...

    def decode_token(
        self,
        token: Int[Array, " B"],
        step: Int[Array, ""],
        cache: Any,
        input_mask: Mask,
        adapters: Adapters,
    ) -> tuple[Float[Array, "B V"], Any]:
        """Return the logits that follow `token`, and the new cache.

        Rows have `step` new tokens so far: 0 only before the first call of a model that is not causal.
        """
        ...


class Slot(NamedTuple):
    """One variable of the model and the tensors that fill it.

    Attributes:
      names: tensors in Hugging Face's files: one for each layer if the variable is stacked, else a single one.
      stacked: its first axis is the layers'.
      transposed: files hold [d_out, d_in].
    """

    variable: Base
    names: list[str]
    stacked: bool = False
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of each tensor in Hugging Face's layout."""
        shape = self.variable.shape[1:] if self.stacked else self.variable.shape
        return shape[::-1] if self.transposed else shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Layout of a family's weights in Hugging Face's files, other than the kernels, whose names the sites give.

    Attributes:
      embedding: name of the embedding's tensor.
      head: name of the head's tensor; a file of a tied model may lack it.
      copies: other names under which files repeat the embedding.
      unused: tensors that no layer reads, as patterns of `fnmatch`.
      unread: tensors of parts that are not implemented, in the same way; merged models keep them.
      flipped: matrices that files hold as [d_in, d_out], in the same way.
      others: function from a model to the slots of its embedding, norms and so on.
    """

    embedding: str
    head: str
    copies: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    flipped: tuple[str, ...] = ()
    others: Callable[[Any], list[Slot]]

    def is_flipped(self, name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in self.flipped)

    def slots(self, model: Model) -> list[Slot]:
        """Return every variable of the model with the tensors that fill it."""
        variables = model.variables()
        slots = self.others(model)
        if "head" in variables:
            slots.append(Slot(variables["head"], [self.head], transposed=True))
        for name, site in model.config.sites.items():
            names = [f"{site.path_of(layer)}.weight" for layer in range(site.layers)]
            slots.append(Slot(variables[name], names, stacked=True, transposed=True))
        return slots


class GGUFTensor(NamedTuple):
    """A tensor of a GGUF file, and its differences from the one of Hugging Face that it was made from.

    Attributes:
      name: name in Hugging Face's files; the file's own if the family has no such tensor.
      order: function from the number of rows, or of columns with `axis` 1, to their indices in the order of the file;
        None if they keep their places. Raises ValueError for a number that does not fit.
      offset: number that was added to the values.
      change: `decay`: the file has -exp(x) instead of x; `taps`: the file lacks the middle axis, and is float32.
    """

    name: str
    order: Callable[[int], np.ndarray] | None = None
    axis: int = 0
    offset: float = 0.0
    change: Literal["", "decay", "taps"] = ""

    def in_file(self, array: np.ndarray) -> np.ndarray:
        """Return Hugging Face's numbers as the file has them, in float32."""
        array = np.asarray(array, np.float32) + np.float32(self.offset)
        if self.change == "decay":
            array = -np.exp(array, dtype=np.float64).astype(np.float32)
        array = array.reshape(len(array), -1) if self.change == "taps" else array
        if self.order is None:
            moved = array
        else:
            moved = array.take(self.order(array.shape[self.axis]), self.axis)
        return np.ascontiguousarray(moved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFLayout:
    """Layout of a family's models in llama.cpp's GGUF files.

    Attributes:
      architectures: `general.architecture` by the `model_type` of a config.json.
      config_json: function from a file's metadata, and its tensors by name, to the content of a config.json; raises
        ValueError without naming the file.
      stored: function from that content and the names of a file's tensors to the tensors' descriptions.
      names: function from that content to the names of all tensors that a file can hold.
      metadata: function from a structure to the keys of a file that describe it, and further tensors by their names.
      lost: field of the structure that no file can hold, also if llama.cpp's converter writes it.
    """

    architectures: Mapping[str, str]
    config_json: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    stored: Callable[[Mapping[str, Any], Collection[str]], dict[str, GGUFTensor]]
    names: Callable[[Mapping[str, Any]], list[str]]
    metadata: Callable[[Any], tuple[dict[str, Any], dict[str, np.ndarray]]]
    lost: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models.

    Attributes:
      members: names of its models, for messages.
      model_types: values of `model_type` in a config.json that `read_config` accepts, or rejects with a reason.
      names: regular expression that is in names of models, in small letters -> the `model_type`s of such models.
      config: the family's dataclass.
      read_config: function from the content of a config.json to the structure; raises ValueError without naming the
        file.
      model: function from (config, rngs=) to a randomly initialised model.
      checkpoint: function from a structure to the layout of its files.
      gguf: layout of its GGUF files, if they are read.
      tunix: function from the name of a module in tunix to the paths of its linear maps, if tunix has such models.
      task_type: PEFT's name of the models' task.
      shapes: known sizes by name.
    """

    name: str
    members: str
    model_types: tuple[str, ...]
    names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    config: type[Architecture]
    read_config: Callable[[Mapping[str, Any]], Architecture]
    model: Callable[..., Model]
    checkpoint: Callable[[Any], Checkpoint]
    gguf: GGUFLayout | None = None
    tunix: Callable[[str], tuple[str, ...]] | None = None
    task_type: str
    shapes: Mapping[str, Architecture]

    def abstract(self, config: Architecture) -> Model:
        """Return a model whose variables have shapes but no values."""
        return nnx.merge(*_abstract(self.model, config), copy=True)


# Tracing takes a tenth of a second, and a command opens a base several times.
@functools.lru_cache(maxsize=16)
def _abstract(
    model: Callable[..., Model], config: Architecture
) -> tuple[nnx.GraphDef[Any], nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))


def kernels(model: Model, adapted: Collection[str] = ()) -> dict[str, Weight]:
    """Return the kernel of every site, [L, d_in, d_out], in the order of `Architecture.sites`.

    The head's, [1, D, V], is among them only if it is `adapted`.
    """
    weights = matrices(model)
    of_sites = {name: weights[name] for name in model.config.sites}
    if HEAD in adapted:
        of_sites[HEAD] = jax.tree.map(lambda a: a[None], head_kernel(model))
    return of_sites


def head_kernel(model: Model) -> Weight:
    """Return the head [D, V], of a tied one the embedding, transposed."""
    if model.config.tied:
        return dense(model.embedding.get_value(), jnp.float32).T
    return matrices(model)["head"]


def matrices(model: Model) -> dict[str, Weight]:
    """Return every weight that multiplies activations: the kernels, and `head` [D, V] unless it is tied."""
    return {name: variable.get_value() for name, variable in model.variables().items()}


def adapted_head(model: Model, x: Hidden, adapters: Adapters) -> Logits:
    """Return the logits of a head with an adapter, which is stacked for one layer."""
    adapter = jax.tree.map(lambda a: a[0], adapters[HEAD])
    return adapter(x, head_kernel(model))


def set_matrices(model: Model, weights: Mapping[str, Weight]) -> None:
    """Replace some of the weights that `matrices` returns."""
    variables = model.variables()
    for name, weight in weights.items():
        variables[name].set_value(weight)


def targeted(
    config: Architecture, targets: Collection[str] | None, option: str = "targets"
) -> dict[str, Site]:
    """Return the sites whose last name is one of `targets`, or of the family's choice for None.

    Raises a ValueError that names the `option` if there are no targets, or the model lacks one of them.
    """
    targets = config.targets if targets is None else targets
    sites = {
        name: site
        for name, site in config.sites.items()
        if name.rpartition(".")[2] in targets
    }
    if not sites or set(targets) - {name.rpartition(".")[2] for name in sites}:
        last_names = dict.fromkeys(name.rpartition(".")[2] for name in config.sites)
        usual = " ".join(config.targets)
        raise ValueError(
            f"{option} are {' '.join(targets) or 'none'}: choose of {' '.join(last_names)}, such as {usual}"
        )
    return sites


@functools.lru_cache(maxsize=16)
def places(config: Architecture) -> Mapping[str, tuple[str, int]]:
    """Return (site, layer) of every matrix that an adapter may sit on, by its Hugging Face module path."""
    return {
        site.path_of(layer): (name, layer)
        for name, site in config.adaptable.items()
        for layer in range(site.layers)
    }


def linear_shapes(config: Architecture) -> dict[str, tuple[int, int]]:
    """Return (d_in, d_out) of every linear map of the blocks by its Hugging Face module path."""
    shapes = adaptable_shapes(config)
    del shapes[config.adaptable[HEAD].path]
    return shapes


def adaptable_shapes(config: Architecture) -> dict[str, tuple[int, int]]:
    """Return (d_in, d_out) of every matrix that a pool's adapters may change, as `linear_shapes` does."""
    return {
        path: (config.adaptable[name].d_in, config.adaptable[name].d_out)
        for path, (name, _) in places(config).items()
    }


def unwrapped(name: str) -> str:
    """Return a tensor's or module's name without the modules around a text model, which differ between versions."""
    return _WRAPPERS.sub("", name)


def rough_operations(
    config: Architecture, source: Any, target: Any, rows: Iterable[tuple[int, Any, Any]]
) -> Any:
    """Return about how many operations a training step with frozen weights takes, to compare shapes of its batch.

    They are four for every token and number of the matrices that it meets, and attention's square term. `source` and
    `target` are numbers of tokens. Attention computes `rows`: a number, source width and target width for each group of
    rows. All but the first may be arrays.
    """
    products = target * math.prod(config.head) + sum(
        _tokens(site.reads, source, target) * (site.layers * site.d_in * site.d_out)
        for site in config.sites.values()
    )
    scores = sum(
        count * _tokens(stack.reads, *widths) * _tokens(attention.reads, *widths)
        * (2 * stack.layers * attention.heads * attention.d_head)
        for count, *widths in rows
        for stack in config.stacks.values()
        for attention in stack.attentions
    )  # fmt: skip
    return 4.0 * (products + _SCORES * scores)


def _tokens(reads: Parts, source: Any, target: Any) -> Any:
    return sum({"source": source, "target": target}[part] for part in reads)


def sharing_inputs(sites: Mapping[str, Site], names: Iterable[str]) -> list[list[str]]:
    """Return the names of matrices, in groups that meet the same inputs; the head is not among the sites."""
    groups: dict[Any, list[str]] = {}
    for name in names:
        site = sites.get(name)
        groups.setdefault(
            name if site is None else (stack_of(name), site.stage, site.reads), []
        ).append(name)
    return list(groups.values())


def stack_of(site: str) -> str:
    """Return the name of a site's stack."""
    return site.partition(".")[0]
