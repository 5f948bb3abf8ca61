"""Compress trained PyTorch models with tensor decompositions.

The public API; everything else may change between versions.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tdkit.version import __version__ as __version__

if TYPE_CHECKING:
    from tdkit.api.apply import apply
    from tdkit.api.compress import compress
    from tdkit.api.compression import Compression
    from tdkit.api.distill import Distilled, distill
    from tdkit.api.factorize import Factorization, factorize
    from tdkit.api.files import load, save
    from tdkit.api.finetune import Finetuned, finetune
    from tdkit.api.inspect import Inspection, inspect
    from tdkit.api.plan import plan
    from tdkit.api.plugins import Plugins, plugins
    from tdkit.api.report import Study, report
    from tdkit.api.score import Scores, score
    from tdkit.api.train import Trained, train
    from tdkit.api.validate import validate
    from tdkit.compression.plan import Move, Plan
    from tdkit.compression.report import Report
    from tdkit.errors import TdkitError

# Resolved on first use: `tdkit --help` must not wait for torch.
_HOMES = {
    "Compression": "tdkit.api.compression",
    "Distilled": "tdkit.api.distill",
    "Factorization": "tdkit.api.factorize",
    "Finetuned": "tdkit.api.finetune",
    "Inspection": "tdkit.api.inspect",
    "Move": "tdkit.compression.plan",
    "Plan": "tdkit.compression.plan",
    "Plugins": "tdkit.api.plugins",
    "Report": "tdkit.compression.report",
    "Scores": "tdkit.api.score",
    "Study": "tdkit.api.report",
    "TdkitError": "tdkit.errors",
    "Trained": "tdkit.api.train",
    "apply": "tdkit.api.apply",
    "compress": "tdkit.api.compress",
    "distill": "tdkit.api.distill",
    "factorize": "tdkit.api.factorize",
    "finetune": "tdkit.api.finetune",
    "inspect": "tdkit.api.inspect",
    "load": "tdkit.api.files",
    "plan": "tdkit.api.plan",
    "plugins": "tdkit.api.plugins",
    "report": "tdkit.api.report",
    "save": "tdkit.api.files",
    "score": "tdkit.api.score",
    "train": "tdkit.api.train",
    "validate": "tdkit.api.validate",
}

__all__ = [
    "Compression", "Distilled", "Factorization", "Finetuned", "Inspection", "Move", "Plan",
    "Plugins", "Report", "Scores", "Study", "TdkitError", "Trained", "apply", "compress", "distill",
    "factorize", "finetune", "inspect", "load", "plan", "plugins", "report", "save", "score",
    "train", "validate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tdkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
