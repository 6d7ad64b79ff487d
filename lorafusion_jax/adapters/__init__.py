"""Pools of LoRA modules: coefficients, compositions, column norms, shared bases, merges."""

from .coefficients import column_names as column_names, expand as expand
from .merges import MergeKind as MergeKind
