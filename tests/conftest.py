"""Strict JAX on four CPU devices, types checked at run time, and the goldens next to the checkout."""

import gc
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Collect garbage seldom: it was a tenth of the tests' time.
gc.set_threshold(100_000, 50, 100)

_ROOT = Path(__file__).resolve().parent.parent
# XLA knows the flag up to here, and aborts on one that it does not know.
_HAS_OLD_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")

# Environment variables, because JAX reads them on import and subprocesses that tests start inherit them.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=4",
        # Most of the tests' time is LLVM's: without its optimisations three files measured 18 to 34 % less CPU time.
        "--xla_backend_optimization_level=0",
        # The emitters of fusions by way of MLIR took 30 to 45 % of the CPU time of what compiles most; where bits of
        # several programs are compared, the fixture `fusion_emitters` has them again.
        "--xla_cpu_use_fusion_emitters=false" if _HAS_OLD_EMITTERS else "",
    )
)
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(_ROOT / ".cache" / "hypothesis"))

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
from jax._src import compiler  # noqa: E402

jaxtyping.install_import_hook("lorafusion_jax", "beartype.beartype")

# The same examples in every run, however long the first compilation of one takes.
hypothesis.settings.register_profile("deterministic", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("deterministic")


def pytest_collection_finish() -> None:
    """Never look for garbage in what imports made."""
    gc.collect()
    gc.freeze()


# Files of half a minute or more: they start first, so that no worker waits for another one's at the end.
_LONG = (
    "hardware/test_chips.py",
    "methods/test_methods.py",
    "crossbar/test_fuzz.py",
    "crossbar/test_mvm.py",
    "hardware/test_model_on_arrays.py",
    "crossbar/test_converters.py",
    "crossbar/test_learning.py",
    "crossbar/test_paths.py",
    "models/test_goldens.py",
    "runs/test_run.py",
    "crossbar/test_reads.py",
    "training/test_step.py",
    "training/test_seeds.py",
)


def _place_in_order(item: pytest.Item) -> int:
    name = item.path.relative_to(_ROOT / "tests").as_posix() if item.path.is_relative_to(_ROOT / "tests") else ""
    return _LONG.index(name) if name in _LONG else len(_LONG)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place_in_order)
    if all(importlib.util.find_spec(name) for name in ("torch", "peft")):
        return
    skip = pytest.mark.skip(reason="needs PyTorch and PEFT: pip install -e '.[peft]'")
    for item in items:
        if "peft" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_file() -> Iterator[None]:
    """Drop the compiled programs of each file behind it.

    A program takes several mappings of memory; Linux allows a process 65,530 of them: all files' programs together
    reach that, and what fails then is whatever asks for memory next.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module")
def fusion_emitters() -> Iterator[None]:
    """Compile a file's programs as without XLA_FLAGS of tests: products of one seed and of several round alike."""
    if not _HAS_OLD_EMITTERS:
        yield
        return
    options = compiler.get_compile_options

    def with_emitters(*args: Any, env_options_overrides: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        overrides = {"xla_cpu_use_fusion_emitters": True} | (env_options_overrides or {})
        return options(*args, env_options_overrides=overrides, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", with_emitters)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with goldens and data, which are no part of the repository."""
    folder = Path(os.environ.get("LORAFUSION_SHARED", _ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("needs ../shared (goldens and data), which this checkout lacks")
    return folder
