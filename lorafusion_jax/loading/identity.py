"""Digests of what was loaded, and their comparison with those that a run recorded."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from ..io.digests import Digests
from .model import LoadedModel
from .spec import LoadOptions


def digests(loaded: LoadedModel) -> Digests:
    """Return the digests of base, configuration, modules, tokenizer and chat template of a run, as on the disk."""
    modules, basis = loaded.pool_digests
    used = {name for names in loaded.modules for name in names}
    used_digests = {name: digest for name, digest in modules.items() if name in used}
    current: Digests = {
        "base": loaded.base.digest,
        "modules": used_digests,
        "basis": basis,
    }
    current["tokenizer"] = loaded.base.files.tokenizer_sha256()
    current["config"] = _digest(_changed_fields(loaded.base.config))
    if (template := loaded.tokenizer.chat_template) is not None:
        current["chat_template"] = _digest(template)
    return current


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _changed_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are not the defaults, so that later versions may add fields."""
    values = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(config)
    }
    differing = {
        field.name
        for field in dataclasses.fields(config)
        if values[field.name] != field.default
    }
    return {
        n: _changed_fields(v) if dataclasses.is_dataclass(v) else v
        for n, v in values.items()
        if n in differing
    }


def check_digests(
    folder: Path, recorded: Digests, current: Digests, options: LoadOptions
) -> None:
    """Raise a ValueError if a run was fused with other tensors or texts than those that were loaded to use it."""
    is_ = _by_kind(current, options)
    for (kind, source), was in _by_kind(recorded, options).items():
        if was is not None and was != (digest := is_.get((kind, source))):
            state = f"has {digest[:12]}" if digest else "was not read"
            raise ValueError(
                f"{folder} was fused with other {kind}: {source} had the SHA-256 {was[:12]} then, and {state} now. "
                f"Restore those {kind}, or fuse the run again with these"
            )


def _by_kind(
    digests: Digests, options: LoadOptions
) -> dict[tuple[str, str], str | None]:
    """Return each digest by the kind of what it is of, and a description."""
    base = f"of {options.base}"
    pool = f"of the pool {options.pool}"
    return {
        ("weights", f"the base {options.base}"): digests["base"],
        ("weights", f"the shared basis {pool}"): digests.get("basis"),
        **{
            ("weights", f"{name} {pool}"): digest
            for name, digest in digests["modules"].items()
        },
        ("texts", f"the tokenizer {base}"): digests.get("tokenizer"),
        ("texts", f"the chat template {base}"): digests.get("chat_template")
        if options.chat
        else None,
        ("settings", f"the configuration {base}"): digests.get("config"),
    }
