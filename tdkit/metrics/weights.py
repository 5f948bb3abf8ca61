"""The three weight errors of Table 1 of the paper."""

from __future__ import annotations

from tdkit.metrics.base import Metric, absolute, relative, scaled

RELATIVE = Metric("relative-weights", "weights", relative, penalty="logarithm")
ABSOLUTE = Metric("absolute-weights", "weights", absolute)
SCALED = Metric("scaled-weights", "weights", scaled)
