"""LoRAFusion in JAX: fuse a frozen pool of LoRA modules for a new task with a few digital parameters."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from .support.version import __version__ as __version__

if TYPE_CHECKING:
    from ._api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Load the public names when one is asked for: a command handles Ctrl-C before it loads JAX."""
    if name == "__all__" or not name.startswith("_"):
        if importlib.util.find_spec(f".{name}", __name__) is not None:
            return importlib.import_module(f".{name}", __name__)
        api = importlib.import_module("._api", __name__)
        public = {
            each: value for each, value in vars(api).items() if not each.startswith("_")
        }
        public.pop("jaxtyping", None)  # its import hook adds it to every module
        public["__all__"] = [*public]
        if name in public:
            return globals().setdefault(
                name, public[name]
            )  # later look-ups find it without this function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*{*globals(), *__getattr__("__all__")}]
