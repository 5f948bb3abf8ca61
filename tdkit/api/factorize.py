"""``tdkit.factorize``: a single layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tdkit import arguments, defaults
from tdkit.calibration.moments import input_moments
from tdkit.compression.scoring import Grid, blamed, prepare
from tdkit.compression.scoring import factorize as factorized
from tdkit.decompositions.base import Rank, count, unsupported
from tdkit.errors import UnsupportedError, UsageError, option
from tdkit.forward.inputs import Inputs
from tdkit.layers.evidence import MOMENTS, Evidence
from tdkit.layers.inventory import find_layers
from tdkit.layers.weights import ModuleWeights
from tdkit.metrics.base import relative
from tdkit.recipes import Setting
from tdkit.registry import load_registry, resolve_methods
from tdkit.tables import Table, number, percent, sizes


@dataclass(frozen=True, eq=False)
class Factorization:
    """A layer as a row of smaller ones.

    Attributes:
        module: What stands in for the layer, an ``nn.Sequential`` of ordinary torch layers.
        method: The method's name.
        rank: Its rank.
        error: The norm of the difference of the weights over that of the layer's weight.
        parameters: Of the layer and of the module.
    """

    module: nn.Sequential
    method: str
    rank: Rank
    error: float
    parameters: tuple[int, int]

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def table(self) -> Table:
        """One row: method, rank, parameters before and after, and the relative error."""
        before, after = self.parameters
        counts = (number(before), number(after), percent(after, before))
        numbers = ("parameters", "after", "kept", "error")
        row = (self.method, sizes(self.rank), *counts, f"{self.error:.4f}")
        return Table(("method", "rank", *numbers), (row,), frozenset(numbers))


def factorize(
    layer: nn.Module,
    method: str,
    rank: Rank | None = None,
    *,
    keep: float | None = None,
    rule: str = defaults.RULE,
    settings: Mapping[str, Setting] | None = None,
    inputs: Tensor | None = None,
    seed: int = defaults.SEED,
) -> Factorization:
    """Factorize a single layer, which stays as it is.

    Example::

        smaller = tdkit.factorize(nn.Conv2d(64, 128, 3), "tucker", rank=(32, 16))
        smaller.module(images)

    Args:
        layer: A convolutional or linear layer, its weight in torch's layout.
        method: The name of a decomposition.
        rank: As the method has it: a number, or several.
        keep: Instead, the fraction of the weight parameters that may remain, in (0, 1].
        rule: How a keep becomes a rank: ``best`` or ``proportional``.
        settings: Of the method: ``{"sweeps": 20}``.
        inputs: Of the layer, (batch, channels, ...) or (..., features), for methods that look at
            their moments.
        seed: Seeds the method's random start, where it has one.

    Raises:
        UsageError: If the rank does not fit, not one of ``rank`` and ``keep`` is given, or a name
            or setting is wrong.
        UnsupportedError: If the layer cannot be decomposed so.
    """
    if (rank is None) == (keep is None):
        raise UsageError(
            "a layer is factorized to a rank or to a keep",
            f"give {option('rank', 8)} or {option('keep', 0.25)}",
        )
    holder = nn.Sequential(layer)
    (found,) = find_layers(holder, include_ends=True)
    if found.reason is not None:
        raise UnsupportedError(f"the layer cannot be decomposed: {found.reason}")
    registry = load_registry()
    names = arguments.methods(method)
    (entry,) = resolve_methods(registry, names, {names[0]: settings or {}}).items()
    name, how = entry
    moments = None
    if MOMENTS in how.needs and inputs is not None:
        moments = input_moments(holder, ["0"], [Inputs((inputs,))])["0"]
    # It refuses a keep, rule or seed that is none.
    fractions = () if keep is None else arguments.keeps(keep)
    grid = Grid({name: how}, (), fractions, rule, arguments.seed(seed))
    weights, evidence = ModuleWeights(holder), Evidence(grid.seed, moments)
    assert found.spec is not None
    reason = unsupported(how, found.spec)
    if reason is not None:
        raise UnsupportedError(f"{name} cannot decompose the layer: {reason}")
    with blamed(name, found):
        prepared = prepare(found, weights, name, how, evidence)
        assert prepared is not None
        wanted = prepared.rank(fractions[0], grid.rule) if rank is None else rank
    chosen: Any = tuple(wanted) if isinstance(wanted, list) else wanted
    refined = prepared.refined(chosen)
    error = refined.error(chosen)
    module = factorized(found, weights, refined, chosen).train(layer.training)
    after = count(refined.stages(chosen))
    distance = relative(error, refined.norm, found.spec.weight_parameters)
    return Factorization(module, name, chosen, distance, (found.parameters, after))
