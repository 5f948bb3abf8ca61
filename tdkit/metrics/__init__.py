"""The six metrics of Table 1 of the paper, registered through the hook anyone uses."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tdkit.hookspecs import MetricRecord, hookimpl

if TYPE_CHECKING:
    from tdkit.metrics.base import Metric


def _create(target: str, normalisation: str) -> Metric:
    from tdkit.metrics import features, weights

    module = {"weights": weights, "features": features}[target]
    metric: Metric = getattr(module, normalisation.upper())
    return metric


@hookimpl
def tdkit_metrics() -> list[MetricRecord]:
    """Provide {relative,absolute,scaled}-{weights,features}."""
    meaning = {
        "relative": "norm of the difference over the norm of the original",
        "absolute": "norm of the difference",
        "scaled": "norm of the difference over the number of elements",
    }
    needs = {"weights": "", "features": "; needs data"}
    return [
        MetricRecord(f"{name}-{target}", summary + needs[target], partial(_create, target, name))
        for target in needs
        for name, summary in meaning.items()
    ]
