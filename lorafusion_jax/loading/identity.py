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
    of_used = {name: digest for name, digest in modules.items() if name in used}
    current: Digests = {"base": loaded.base.digest, "modules": of_used, "basis": basis}
    current["tokenizer"] = loaded.base.files.tokenizer_sha256()
    current["config"] = _digest(_changed_fields(loaded.base.config))
    if (template := loaded.tokenizer.chat_template) is not None:
        current["chat_template"] = _digest(template)
    return current


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _changed_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are not the defaults, so that later versions may add fields."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    differing = {field.name for field in dataclasses.fields(config) if values[field.name] != field.default}
    return {n: _changed_fields(v) if dataclasses.is_dataclass(v) else v for n, v in values.items() if n in differing}


def check_digests(folder: Path, recorded: Digests, now: Digests, options: LoadOptions) -> None:
    """Raise a ValueError if a run was fused with other tensors or texts than those that were loaded to use it."""
    of_pool = f"the pool {options.pool}"
    pairs: list[tuple[str, str, str | None]] = [(f"the base {options.base}", recorded["base"], now["base"])]
    if basis := recorded.get("basis"):
        pairs.append((f"the shared basis of {of_pool}", basis, now.get("basis")))
    for name, digest in recorded["modules"].items():
        pairs.append((f"{name} of {of_pool}", digest, now["modules"].get(name)))
    texts: list[tuple[str, str, str | None]] = []
    if "tokenizer" in recorded:
        texts.append((f"the tokenizer of {options.base}", recorded["tokenizer"], now.get("tokenizer")))
    if options.chat and "chat_template" in recorded:
        texts.append((f"the chat template of {options.base}", recorded["chat_template"], now.get("chat_template")))
    settings: list[tuple[str, str, str | None]] = []
    if "config" in recorded:
        settings.append((f"the configuration of {options.base}", recorded["config"], now.get("config")))
    for kind, of_kind in (("weights", pairs), ("texts", texts), ("settings", settings)):
        for what, was, is_ in of_kind:
            if was != is_:
                here = f"has {is_[:12]}" if is_ else "was not read"
                raise ValueError(
                    f"{folder} was fused with other {kind}: {what} had the SHA-256 {was[:12]} then, and {here} now. "
                    f"Restore those {kind}, or fuse the run again with these"
                )
