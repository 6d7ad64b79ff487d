"""Pools of adapters on disk: converted ones, and folders of PEFT adapter folders.

    manifest.json                        what there is, where it came from, a SHA-256 of every other file and of itself
    adapters/0000/arrays                 orbax: site -> A [L, r, d_in], B [L, d_out, r] (DoRA: magnitude [L, d_out])
    adapters/0000/adapter_config.json    PEFT's configuration, byte for byte
    adapters/0000/keys.json              how its file spelt the tensors' names
    basis/                               a shared basis of the modules, where one was made (see `pool.basis`)

Factors, dtype and scaling stay as read, in PEFT's layouts, so that an adapter can be saved again exactly;
layers without an adapter are zeros of rank 0, smaller ranks are padded. In a `LoraPool` the scaling is in B.

Axis letters: L layer, r rank.
"""

from .folder import AdapterFolders, ConvertedPool, load_basis, load_pool, open_pool
from .stack import read_pool

__all__ = ["AdapterFolders", "ConvertedPool", "load_basis", "load_pool", "open_pool", "read_pool"]
