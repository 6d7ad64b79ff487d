"""Makes the shared basis of a converted pool."""

from collections.abc import Sequence
from pathlib import Path

from ..adapters.basis import SharedBasis, check_size, directions, extended, in_directions
from ..progress import progress
from .pool.basis import FOLDER, save_basis
from .pool.folder import ConvertedPool


def add_basis(folder: Path, k: int, *, modules: Sequence[str] = ()) -> SharedBasis:
    """Make the shared basis of a converted pool, write it beside the adapters, and return it.

    Args:
      folder: the pool's.
      k: number of directions.
      modules: names of the modules whose directions are taken; by default all. All are projected on them.

    Raises:
      ValueError: the pool has a basis, no such module, or not so many directions.
    """
    stored = _without_basis(folder)
    pool = stored.load()
    of = pool.select(modules) if modules else pool
    check_size(of, k)
    layers = sum(len(rank) for rank in of.rank.values())
    with progress("basis", layers, unit="layer") as bar:
        basis = in_directions(pool, directions(of, k, done=bar.update))
    save_basis(folder, basis, made_of=stored.made_of, base=stored.manifest["base"])
    return basis


def add_projected(folder: Path, source: Path) -> SharedBasis:
    """Project the modules of a converted pool on another one's basis; write and return that basis with all modules.

    Args:
      folder: of the pool whose modules are new.
      source: of the pool that has a basis.

    Raises:
      ValueError: the first pool has a basis, the second has none or is of another base, or a name is in both.
    """
    stored, other = _without_basis(folder), ConvertedPool(source)
    other.check_base(stored.config)
    basis = extended(other.basis(), stored.load())
    save_basis(folder, basis, made_of=other.basis_modules() | stored.made_of, base=stored.manifest["base"])
    return basis


def _without_basis(folder: Path) -> ConvertedPool:
    if (folder / FOLDER).exists():
        raise ValueError(f"{folder / FOLDER} exists: move it away to make another basis")
    return ConvertedPool(folder)
