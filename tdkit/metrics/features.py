"""The three feature errors of Table 1 of the paper, and how they are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tdkit.metrics.base import Metric, absolute, relative, scaled

RELATIVE = Metric("relative-features", "features", relative)
ABSOLUTE = Metric("absolute-features", "features", absolute)
SCALED = Metric("scaled-features", "features", scaled)


@torch.no_grad()
def feature_errors(
    layer: nn.Module,
    factorized: nn.Module,
    inputs: Iterable[Tensor],
    metrics: Sequence[Metric],
) -> dict[str, float]:
    """Mean over samples of each metric on the layer's output.

    Args:
        layer: The original layer.
        factorized: What stands in for it.
        inputs: Batches of the layer's input, (batch, ...).
        metrics: Feature metrics.

    Returns:
        The error of every metric, by name.
    """
    sums = dict.fromkeys((metric.name for metric in metrics), 0.0)
    samples = 0
    for batch in inputs:
        features = layer(batch).double().flatten(1)
        difference = features - factorized(batch).double().flatten(1)
        norms = torch.linalg.vector_norm(features, dim=1).tolist()
        errors = torch.linalg.vector_norm(difference, dim=1).tolist()
        samples += len(norms)
        for metric in metrics:
            size = features.shape[1]
            pairs = zip(errors, norms, strict=True)
            sums[metric.name] += sum(metric.value(error, norm, size) for error, norm in pairs)
    return {name: total / samples for name, total in sums.items()}


def layer_inputs(
    model: nn.Module, names: Mapping[str, nn.Module], batches: Iterable[Tensor]
) -> dict[str, list[Tensor]]:
    """What each named layer receives when the model runs on some batches, in eval mode.

    Args:
        model: The dense model.
        names: Its layers by name.
        batches: Model inputs.

    Returns:
        For each name its inputs, one tensor per call.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def remember(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name].append(args[0].detach().clone())

        return hook

    handles = [
        module.register_forward_pre_hook(remember(name))
        for name, module in names.items()
    ]
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return seen
