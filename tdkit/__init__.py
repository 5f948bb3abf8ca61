"""Compress trained PyTorch models with tensor decompositions.

The public API; everything else may change between versions.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tdkit.version import __version__ as __version__

if TYPE_CHECKING:
    from tdkit.api import apply, compress, load, validate
    from tdkit.compression.plan import Move, Plan
    from tdkit.errors import TdkitError

__all__ = ["Move", "Plan", "TdkitError", "apply", "compress", "load", "validate"]

# Resolved on first use: `tdkit --help` must not wait for torch.
_HOMES = {
    "apply": "tdkit.api",
    "compress": "tdkit.api",
    "load": "tdkit.api",
    "validate": "tdkit.api",
    "Move": "tdkit.compression.plan",
    "Plan": "tdkit.compression.plan",
    "TdkitError": "tdkit.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tdkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
