"""Digests of what was loaded, and their comparison with those that a run recorded."""

import hashlib
import json
from pathlib import Path

from ..io.digests import Digests
from .model import LoadedModel
from .spec import LoadOptions


def digests(loaded: LoadedModel) -> Digests:
    """Return the digests of base, modules, tokenizer and chat template of a run, as they are on the disk."""
    modules, basis = loaded.pool_digests
    used = {name for names in loaded.modules for name in names}
    of_used = {name: digest for name, digest in modules.items() if name in used}
    found: Digests = {"base": loaded.base.digest, "modules": of_used, "basis": basis}
    found["tokenizer"] = loaded.base.files.tokenizer_sha256()
    if (template := loaded.tokenizer.chat_template) is not None:
        found["chat_template"] = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()
    return found


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
    for kind, of_kind in (("weights", pairs), ("texts", texts)):
        for what, was, is_ in of_kind:
            if was != is_:
                here = f"has {is_[:12]}" if is_ else "was not read"
                raise ValueError(
                    f"{folder} was fused with other {kind}: {what} had the SHA-256 {was[:12]} then, and {here} now. "
                    f"Restore those {kind}, or fuse the run again with these"
                )
