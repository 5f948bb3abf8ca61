"""How much errors of layers' weights matter, by what unlabelled inputs make of the dense model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tdkit.calibration.divergence import are_scores
from tdkit.calibration.following import following
from tdkit.calibration.pairs import Pairs, drawn, removed
from tdkit.errors import UnsupportedError, first_line
from tdkit.forward.inputs import Inputs
from tdkit.forward.trial import run_on_data, trial
from tdkit.layers.evidence import Curvature
from tdkit.layers.inventory import Layer
from tdkit.layers.patches import input_rows, output_rows, positions
from tdkit.layers.spec import LayerSpec

ROWS = 20_000
"""Positions of each layer that are looked at, over all inputs."""

# A covariance in float64 beyond which it is of channels alone, or not collected at all, in bytes.
_LARGEST = 2**27

# Samples whose gradients are computed together: their activations are in memory.
_TOGETHER = 16


class NoGradientsError(UnsupportedError):
    """A model cannot be differentiated."""


def curvatures(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Inputs],
    sample: Inputs,
    seed: int,
    *,
    outputs: bool = False,
) -> dict[str, Curvature]:
    """The curvature of layers' weights, for decompositions and metrics that look at it.

    Args:
        model: The dense model; it is afterwards as before.
        layers: Of it, decomposable ones.
        batches: Arguments of forward passes, tensors of any shape.
        sample: Arguments of one that shows what follows what.
        seed: Seeds the choice of positions and projections.
        outputs: Whether the metric of the model's output is wanted, which takes a backward pass.

    Returns:
        By the name of a layer; those that are never reached, that are too wide, or whose inputs are
        not finite, are left out.

    Raises:
        UnsupportedError: If the model does not run on the batches.
        NoGradientsError: If it does not run backwards, where that is wanted.
    """
    specs = {x.name: x.spec for x in layers if x.spec is not None and _bytes(_channels(x.spec))}
    inputs = _covariances(model, specs, layers, batches, sample, seed)
    pulled = _gradients(model, specs, batches, seed) if outputs and inputs else {}
    if outputs and inputs and not pulled:
        raise NoGradientsError("no gradient of the model's output reaches its layers")
    return {
        name: Curvature(specs[name], value, _or_none_at_all(pulled, name, specs[name]))
        for name, value in inputs.items()
    }


def _or_none_at_all(pulled: Mapping[str, Tensor], name: str, spec: LayerSpec) -> Tensor | None:
    """What reaches a layer; nothing where nothing of it reaches the output."""
    out = spec.out_channels // spec.groups
    zeros = torch.zeros(spec.groups, out, out, dtype=torch.float64)
    return pulled.get(name, zeros) if pulled else None


def _bytes(width: int) -> bool:
    return 8 * width**2 <= _LARGEST


def _channels(spec: LayerSpec) -> int:
    return spec.in_channels // spec.groups


def _covariances(
    model: nn.Module,
    specs: Mapping[str, LayerSpec],
    layers: Sequence[Layer],
    batches: Sequence[Inputs],
    sample: Inputs,
    seed: int,
) -> dict[str, Tensor]:
    after = following(model, list(specs), sample)
    sums = {
        name: Pairs(spec, centred=spec.bias or after[name].norm is not None)
        for name, spec in specs.items()
    }
    calls = {x.name: len(x.calls or (0,)) for x in layers}
    share = {name: -(-ROWS // max(1, len(batches) * calls[name])) for name in specs}

    def look(
        name: str, _module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        spec, value = specs[name], args[0] if args else next(iter(kwargs.values()))
        count = positions(spec, output)
        places = drawn(count, share[name], f"{seed}/{name}/{sums[name].count}").to(output.device)
        rows = _narrowed(spec, input_rows(spec, value.detach(), places))
        sums[name].add(rows, rows[..., :0])

    handles = [
        model.get_submodule(name).register_forward_hook(partial(look, name), with_kwargs=True)
        for name in specs
    ]
    with removed(handles):
        for batch in batches:
            run_on_data(model, batch)
    return {name: x.covariance for name, x in sums.items() if x.count and x.is_finite}


def _narrowed(spec: LayerSpec, rows: Tensor) -> Tensor:
    """Patches (groups, n, d) as they are, or the channels of every place (groups, n k, in)."""
    if _bytes(rows.shape[-1]):
        return rows
    shape = (_channels(spec), math.prod(spec.kernel_size))
    channels: Tensor = rows.unflatten(-1, shape).mT.flatten(1, 2)
    return channels


def _gradients(
    model: nn.Module, specs: Mapping[str, LayerSpec], batches: Sequence[Inputs], seed: int
) -> dict[str, Tensor]:
    """The sum over positions of the second moments of each layer's gradients, (groups, out, out).

    Each sample's output is projected once: scores by what the Fisher information samples (the class
    that they draw, less their softmax), anything else by noise of the size of one over its spread.
    """
    generator = torch.Generator().manual_seed(seed)
    probes: list[tuple[str, Tensor]] = []
    sums: dict[str, Tensor] = {}
    count = 0

    def watch(name: str, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        probe = torch.zeros_like(output, requires_grad=True)
        probes.append((name, probe))
        return output + probe

    handles = [
        model.get_submodule(name).register_forward_hook(partial(watch, name)) for name in specs
    ]
    with removed(handles):
        for batch in _pieces(batches):
            probes.clear()
            for name, found in _backward(model, batch, probes, generator):
                rows = output_rows(specs[name], found, torch.arange(positions(specs[name], found)))
                rows = rows.double()
                sums[name] = sums.get(name, 0.0) + rows.mT @ rows
            count += batch.batch or 1
    return {name: value / count for name, value in sums.items() if bool(value.isfinite().all())}


def _backward(
    model: nn.Module,
    batch: Inputs,
    probes: Sequence[tuple[str, Tensor]],
    generator: torch.Generator,
) -> Iterator[tuple[str, Tensor]]:
    try:
        with torch.inference_mode(False), trial(model), torch.enable_grad():
            leaves = pytree.tree_leaves(batch.map(torch.clone).run(model))
            floats = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
            total = sum(_projected(x, generator) for x in floats)
            if not isinstance(total, Tensor):
                return
            values = [probe for _, probe in probes]
            found = torch.autograd.grad(total, values, allow_unused=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model may fail in any way
        raise NoGradientsError(
            f"the model does not run backwards on the data: {first_line(error)}"
        ) from error
    yield from (
        (name, gradient)
        for (name, _), gradient in zip(probes, found, strict=True)
        if gradient is not None
    )


def _projected(output: Tensor, generator: torch.Generator) -> Tensor:
    values = output.detach().float()
    if are_scores(values):
        share = values.softmax(-1)
        chosen = torch.multinomial(share.cpu(), 1, generator=generator).to(output.device)
        weight = torch.zeros_like(values).scatter_(1, chosen, 1.0) - share
    else:
        spread = float((values - values.mean()).square().sum() / max(1, len(values))) or 1.0
        noise = torch.randn(values.shape, generator=generator)
        weight = noise.to(values) / math.sqrt(spread)
    return (output * weight.to(output.dtype)).sum()


def _pieces(batches: Sequence[Inputs]) -> Iterator[Inputs]:
    """Images a few at a time; other inputs as they are."""
    for batch in batches:
        image = batch.image
        yield from [batch] if image is None else [Inputs((x,)) for x in image.split(_TOGETHER)]
