"""LoRAFusion in JAX: fuse a frozen pool of LoRA modules for a new task with a few digital numbers."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ._api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Load the public names when one is asked for: a command handles Ctrl-C before it loads JAX."""
    if name == "__all__" or not name.startswith("_"):
        if importlib.util.find_spec(f".{name}", __name__) is not None:
            return importlib.import_module(f".{name}", __name__)
        names = importlib.import_module("._api", __name__)
        if name == "__all__" or name in names.__all__:
            return globals().setdefault(name, getattr(names, name))  # it is not asked for again
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*{*globals(), *__getattr__("__all__")}]
