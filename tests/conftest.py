"""Strict JAX on four CPU devices, types checked at run time, and the goldens."""

import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import os
import random
import threading
import types
import zlib
from pathlib import Path

import pytest

# Collect garbage seldom: it was a tenth of the tests' time.
gc.set_threshold(100_000, 50, 100)

_ROOT = Path(__file__).resolve().parent.parent
# XLA aborts on a flag that it does not know; these are known to work up to here.
_IS_0_10 = importlib.metadata.version("jaxlib").startswith("0.10.")

# Environment variables, because JAX reads them on import and subprocesses that tests start inherit them.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=4",
        # Most of the tests' time is LLVM's: without its optimisations three files measured 18 to 34 % less CPU time.
        "--xla_backend_optimization_level=0",
        # The emitters of fusions by way of MLIR took 30 to 45 % of the CPU time of what compiles most; where bits of
        # several programs are compared, the fixture `fusion_emitters` has them again.
        # One LLVM module a program: splitting small ones into parts took 8 % of the CPU time.
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        if _IS_0_10
        else "",
    )
)
# No stack of Python frames for every operation of a program.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
# Two threads of PyTorch spin while they wait for a busy core: the parity of decoders took 216 s of CPU time, not 36.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "HYPOTHESIS_STORAGE_DIRECTORY", str(_ROOT / ".cache" / "hypothesis")
)

import beartype  # noqa: E402
import hub_server  # noqa: E402
import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import one_block  # noqa: E402
import seeded  # noqa: E402
from jax._src import compilation_cache, compiler  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402

_jaxtyped = jaxtyping.jaxtyped
_typechecker = beartype.beartype(
    conf=beartype.BeartypeConf(violation_type=jaxtyping.TypeCheckError)
)


def _checked(item):
    """Check a function's types, or a data class's, as jaxtyping does, which binds the arguments and checks them twice.

    Binding them twice took half of the CPU time of tests with many small calls.
    """
    if isinstance(item, type):
        if dataclasses.is_dataclass(item) and "__init__" in vars(item):
            item.__init__ = _checked(item.__init__)
        return item
    hints = str([*item.__annotations__.values()])
    unresolved = [
        hint for hint in item.__annotations__.values() if isinstance(hint, str)
    ]
    # An axis as long as an argument says, and names that only type checkers import.
    if "{" in hints or any(
        item.__qualname__.partition(".")[0] not in hint for hint in unresolved
    ):
        return _jaxtyped(item, typechecker=beartype.beartype)
    checked = _nested(item) if "<locals>" in item.__qualname__ else _typechecker(item)
    if "jaxtyping" not in hints:
        return checked

    @functools.wraps(item)
    def in_scope_of_axes(*args, **kwargs):
        with _jaxtyped("context"):
            return checked(*args, **kwargs)

    return in_scope_of_axes


_wrappers = {}  # of functions within others, by their code


def _nested(item):
    """Check a function within another one. Its checks are compiled once, and not whenever the outer one is called."""
    wrapper = _wrappers.get(item.__code__) or _typechecker(item)
    if wrapper is item:  # without annotations
        return item
    _wrappers[item.__code__] = wrapper
    copied = types.FunctionType(
        wrapper.__code__, wrapper.__globals__, closure=wrapper.__closure__
    )
    copied.__kwdefaults__ = wrapper.__kwdefaults__ | {"__beartype_func": item}
    return functools.update_wrapper(copied, item)


jaxtyping.jaxtyped = lambda typechecker: _checked
jaxtyping.install_import_hook("lorafusion_jax", "beartype.beartype")

# The MLIR context that each thread lowers programs in: a new one for every program took 4 of a small one's 16 ms.
_of_thread = threading.local()


def _context_of_thread(make=mlir.make_ir_context):
    if not hasattr(_of_thread, "context"):
        _of_thread.context = make()
    return _of_thread.context


if _IS_0_10:
    mlir.make_ir_context = _context_of_thread
    if not (compilation_cache.zstd or compilation_cache.zstandard):
        # At zlib's usual level, 300 compiled functions took 0.4 s instead of 0.15, for a quarter less space.
        compilation_cache.compress_executable = functools.partial(
            zlib.compress, level=1
        )

from lorafusion_jax.support import interrupts  # noqa: E402

interrupts.watch = lambda *_: (
    None
)  # signals are pytest's, also while a test runs a command

# The same examples in every run, however long the first compilation of one takes.
hypothesis.settings.register_profile(
    "deterministic", derandomize=True, database=None, deadline=None
)
hypothesis.settings.load_profile("deterministic")


def pytest_collection_finish():
    """Never look for garbage in what imports made."""
    gc.collect()
    gc.freeze()


# The files with most to compile start first, so that no worker waits for another one's at the end; tests/methods before
# those that find its programs compiled (runs, cli, chips).
_FIRST = """
methods/test_methods runs/test_run crossbar/test_reads estimates/test_plan docs/test_code crossbar/test_goldens
hardware/test_model_on_arrays test_families crossbar/test_flax models/test_parity
models/test_goldens serving/test_bank adapters/test_composition estimates/test_energy cli/test_cli
hardware/test_chips adapters/test_peft_merge crossbar/test_tree
faults/test_kills hardware/test_restored runs/test_generation runs/test_lora_start trials/test_trial
training/test_packed
""".split()


def _place_in_order(item):
    inside = item.path.is_relative_to(_ROOT / "tests")
    name = (
        item.path.relative_to(_ROOT / "tests").with_suffix("").as_posix()
        if inside
        else ""
    )
    return _FIRST.index(name) if name in _FIRST else len(_FIRST)


def pytest_collection_modifyitems(items):
    items.sort(key=_place_in_order)
    if all(importlib.util.find_spec(name) for name in ("torch", "peft")):
        return
    skip = pytest.mark.skip(reason="needs PyTorch and PEFT: pip install -e '.[peft]'")
    for item in items:
        if "peft" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_items_checked():
    """beartype checks one item of a list, drawn from Python's global generator: the same one in every run."""
    random.seed(0)


# A program takes several mappings of memory; a thousand of them come with about 0.25 GB, traces included.
_MAPPINGS = Path("/proc/self/maps")
_MOST_MAPPINGS = 8_000


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs():
    """Files share compiled programs, which are forgotten where they take much memory."""
    yield
    vars(_of_thread).clear()  # a context keeps the constants of its programs
    if (
        _MAPPINGS.is_file()
        and len(_MAPPINGS.read_bytes().splitlines()) > _MOST_MAPPINGS
    ):
        jax.clear_caches()
        gc.collect()


@contextlib.contextmanager
def _compiled_with(**flags):
    """Compile all programs of a block with other flags than XLA_FLAGS of tests."""
    options = compiler.get_compile_options

    def with_flags(*args, env_options_overrides=None, **kwargs):
        return options(
            *args, env_options_overrides=flags | (env_options_overrides or {}), **kwargs
        )

    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", with_flags)
        yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def fusion_emitters():
    """Compile a file's programs as without XLA_FLAGS of tests: products of one seed and of several round alike."""
    with (
        _compiled_with(xla_cpu_use_fusion_emitters=True)
        if _IS_0_10
        else contextlib.nullcontext()
    ):
        yield


@pytest.fixture(scope="module")
def optimised_by_llvm():
    """Where programs run for longer than LLVM takes: those of a real language model need two thirds of the CPU time."""
    with (
        _compiled_with(xla_backend_optimization_level=2)
        if _IS_0_10
        else contextlib.nullcontext()
    ):
        yield


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The folders of a base of one block in either stack, and of four adapters for it, which no test changes."""
    return one_block.cut(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a small Llama, which no test changes."""
    import small_llama

    return small_llama.make(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="session")
def goldens(tmp_path_factory):
    """The folder of goldens, with the weights that are made from a seed."""
    return seeded.unfold(tmp_path_factory.mktemp("goldens"))


@pytest.fixture
def hub(small, monkeypatch, tmp_path):
    """A hub with a base and an adapter, in place of the real one; its library caches deep in a folder of its own."""
    with hub_server.in_place(monkeypatch, tmp_path / "a" / "b" / "c") as found:
        found.add("org/base", small[0])
        found.add("org/adapter", sorted(small[1].iterdir())[0])
        yield found


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, which are not written."""
    drawn = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, *a, **k: drawn.append(figure)
    )
    monkeypatch.setattr(
        "lorafusion_jax.report.plots.write", lambda path, writer: writer(path)
    )
    return drawn
