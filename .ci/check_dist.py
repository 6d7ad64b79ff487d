"""Check what the built files of a release contain: python .ci/check_dist.py dist"""

import email
import re
import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGE = "lorafusion_jax"
# Names at the top of the source distribution.
SOURCE = {
    PACKAGE,
    "examples",
    *"CHANGELOG.md CITATION.cff LICENSE NOTICE PKG-INFO SECURITY.md".split(),
}
SOURCE |= {"README.md", "pyproject.toml", ".gitignore"}


def main(folder: Path) -> None:
    wheel, source = one(folder, "*.whl"), one(folder, "*.tar.gz")
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        info = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(opened.read(info))
    place = info.rpartition("/")[0]
    check(
        wheel,
        [n for n in names if not n.startswith((f"{PACKAGE}/", f"{place}/"))],
        "files outside of the package",
    )
    check(
        wheel,
        [
            n
            for n in names
            if "tests" in Path(n).parts or Path(n).name.startswith("test_")
        ],
        "tests",
    )
    needed = {
        f"{PACKAGE}/py.typed",
        f"{place}/licenses/LICENSE",
        f"{place}/licenses/NOTICE",
    }
    check(wheel, sorted(needed - set(names)), "no")

    with tarfile.open(source) as opened:
        paths = [
            Path(*Path(member.name).parts[1:]) for member in opened if member.isfile()
        ]
    check(
        source,
        sorted({p.parts[0] for p in paths} - SOURCE),
        "files that neither the wheel nor its examples need:",
    )
    check(
        source,
        sorted(map(str, {Path("NOTICE"), Path("pyproject.toml")} - set(paths))),
        "no",
    )
    check(
        source, [str(p) for p in paths if "smollm2" in p.parts], "adapters of SmolLM2"
    )

    links = re.findall(r"\]\((?!https?://)[^)]*\)", str(metadata.get_payload()))
    check(wheel, links, "links that lead nowhere on a package index")
    check(
        wheel,
        [name for name in ("Author", "License-Expression") if not metadata[name]],
        "metadata without",
    )


def one(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{folder} has {len(found)} files {pattern}: expected one")
    return found[0]


def check(file: Path, faults: list[str], what: str) -> None:
    if faults:
        sys.exit(f"{file.name} has {what} {', '.join(faults[:5])}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
