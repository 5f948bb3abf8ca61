"""Making factors again, layer after layer, for what the compressed layers before deliver."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tdkit.calibration.activations import Rows, fitted_to_activations
from tdkit.calibration.divergence import divergences, outputs_of, samples_of
from tdkit.calibration.following import Following, following
from tdkit.calibration.pairs import Pairs, Wanted, at_least_float, given_rows, wanted_outputs
from tdkit.calibration.passes import Passes
from tdkit.calibration.regression import regressed
from tdkit.compression.verification import dense_weight
from tdkit.decompositions.base import Decomposition, Prepared, Rank
from tdkit.decompositions.whitening import Whitened
from tdkit.forward.inputs import Inputs
from tdkit.layers.evidence import Evidence
from tdkit.layers.impulses import join_groups, split_groups
from tdkit.layers.inventory import Layer
from tdkit.layers.spec import LayerSpec
from tdkit.layers.stages import Stage

ROWS = 20_000
"""Positions of each layer that are looked at, over all inputs."""

# All that dense layers returned at those positions, in bytes.
_WANTED = 2**29

# A covariance in float64 beyond which a layer's factors stay as they are, in bytes.
_LARGEST = 2**28

# Samples whose spread tells that of their mean.
_MANY = 30

# What the dense model returned, in bytes, that is compared beyond what is held back.
_OUTPUTS = 2**28

# The inputs that are kept of one layer to fit to its activation, in bytes.
_KEPT = 2**27


@dataclass(frozen=True, eq=False)
class Observed:
    """What a dense model makes of unlabelled inputs.

    Attributes:
        batches: Arguments of forward passes, tensors of any shape.
        held: How many of the last ones are held back, to choose by.
        wanted: What layers return on the batches, in the order of their first call.
        outputs: What the model returns on the last batches, tensors of any shape: on all of them
            where that is not too much, on those that are held back at least.
        following: By layer what is done to its output.
        activations: By layer that as a function of rows, for each group.
        seed: Seeds the choice of positions.
    """

    batches: tuple[Inputs, ...]
    held: int
    wanted: Mapping[str, Wanted]
    outputs: Sequence[Sequence[Tensor]]
    following: Mapping[str, Following]
    activations: Mapping[str, Sequence[Callable[[Tensor], Tensor]]]
    seed: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: Sequence[Layer],
        batches: Sequence[Inputs],
        sample: Inputs,
        seed: int,
    ) -> Observed:
        """Run a dense model.

        Args:
            model: It is afterwards as before.
            layers: Those that are to be replaced.
            batches: Arguments of two forward passes or more, tensors of any shape; a tenth, at
                least one, is held back.
            sample: Arguments of one that shows what follows what.
            seed: Seeds the choice of positions.

        Raises:
            UnsupportedError: If the model does not run on them.
        """
        specs = {layer.name: layer.spec for layer in layers if layer.spec is not None}
        channels = sum(spec.out_channels for spec in specs.values())
        rows = max(1, min(ROWS, _WANTED // max(1, 4 * channels)))
        wanted = wanted_outputs(model, layers, batches, rows, seed)
        held = max(1, len(batches) // 10)
        after = following(model, list(wanted), sample)
        return cls(
            tuple(batches),
            held,
            wanted,
            _last_outputs(model, batches, held),
            after,
            {name: each.functions(model, specs[name].groups) for name, each in after.items()},
            seed,
        )

    def divergences(self, model: nn.Module) -> Divergences:
        """How far a compressed model's outputs are from the dense ones."""
        batches = self.batches[-len(self.outputs) :]
        samples = sum(map(samples_of, self.outputs[-self.held :]))
        return Divergences(divergences(self.outputs, outputs_of(model, batches)), samples)

    @property
    def is_comparable(self) -> bool:
        """Whether the model returns any numbers to compare by."""
        return all(bool(outputs) for outputs in self.outputs)


def _last_outputs(model: nn.Module, batches: Sequence[Inputs], held: int) -> list[list[Tensor]]:
    found: list[list[Tensor]] = []
    size = 0
    for outputs in outputs_of(model, reversed(batches)):
        size += sum(each.numel() * each.element_size() for each in outputs)
        if len(found) >= held and size > _OUTPUTS:
            break
        found.append(outputs)
    return found[::-1]


@dataclass(frozen=True, eq=False)
class Divergences:
    """How far outputs are from the dense ones.

    Attributes:
        each: Of every sample that is compared, (samples,); those held back are the last.
        held: How many those are.
    """

    each: Tensor
    held: int

    @property
    def held_back(self) -> float:
        """In the mean over what no factor was fitted to."""
        return _known(float(self.each[-self.held :].mean()))

    @property
    def mean(self) -> float:
        """Over all."""
        return _known(float(self.each.mean()))

    def is_worse(self, other: Divergences) -> bool:
        """Whether this is more over all, or on what is held back by more than chance.

        A difference counts beyond twice its standard error; where that is not to be known, since
        a few samples are held back, any.
        """
        if not math.isfinite(other.mean):
            return not math.isfinite(self.mean)
        gaps = self.each[-self.held :] - other.each[-self.held :]
        chance = 2 * float(gaps.std()) / math.sqrt(len(gaps)) if len(gaps) >= _MANY else 0.0
        return not (self.mean <= other.mean and float(gaps.mean()) <= chance)


def _known(divergence: float) -> float:
    """Of outputs that are no numbers it is infinite."""
    return divergence if math.isfinite(divergence) else math.inf


@dataclass(frozen=True, eq=False)
class Part:
    """A layer that was replaced.

    Attributes:
        spec: The dense layer.
        weight: Gives its weight, in torch's layout.
        stages: What stands in for it.
        method: The decomposition.
        name: The method's name.
        rank: Its rank.
    """

    spec: LayerSpec
    weight: Callable[[], Tensor]
    stages: tuple[Stage, ...]
    method: Decomposition
    name: str
    rank: Rank


@dataclass(frozen=True)
class Refitted:
    """What became of the layers.

    Attributes:
        errors: By layer what its factors miss of its output, relative to that, both less their
            means where the layer has a bias.
        thin: The layers that were given fewer rows than they are wide.
        left: Why the factors of a layer are as they were, by its name.
    """

    errors: Mapping[str, float]
    thin: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        told = [f"{name} is not fitted to the data: {why}" for name, why in self.left.items()]
        if self.thin:
            told.append(
                "fewer places were looked at than some layers are wide, whose factors are drawn to"
                f" the dense weights: {', '.join(self.thin)}"
            )
        return tuple(told)


def refit(
    model: nn.Module,
    parts: Mapping[str, Part],
    seen: Observed,
    *,
    activations: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Refitted:
    """Fit the factors of every replaced layer, in the order of the forward pass.

    A layer's target is the weight that best makes the dense outputs of what the compressed layers
    before deliver; its factors are those of that target in the metric of these inputs, and its
    bias makes the mean right. Where a layer has no bias, the running mean of the BatchNorm that
    follows takes it; where there is none, means are part of the metric.

    Args:
        model: The compressed model, changed in place; BatchNorm as it is in the dense one.
        parts: Its replaced layers, by name.
        seen: What the dense model made of the inputs.
        activations: Fit also to what the activation that follows a layer makes of its output.
        progress: Called with the layers done and all layers.

    Raises:
        UnsupportedError: If the model does not run.
    """
    errors: dict[str, float] = {}
    left = {name: "the data never reach it" for name in parts if name not in seen.wanted}
    thin = []
    todo = [name for name in seen.wanted if name in parts]
    with Passes(model, todo, seen.batches) as passes:
        for done, name in enumerate(todo):
            progress(done, len(todo))
            part, width = parts[name], _width(parts[name].spec)
            fits = 8 * part.spec.groups * width**2 <= _LARGEST
            given = _Given.of(passes, name, part.spec, seen, activations, fits)
            if not given.pairs.count:
                left[name] = "it is given other places than in the dense model"
            elif not given.pairs.is_finite:
                left[name] = "what it is given is not finite"
            elif not fits:
                left[name] = f"its inputs of {width:,} entries are too wide for their covariance"
                _correct_bias(model, name, part, given.pairs, seen)
            else:
                if given.pairs.count < width:
                    thin.append(name)
                errors[name] = _refit(model, name, part, given, seen)
            passes.settle(name)
    progress(len(todo), len(todo))
    return Refitted(errors, tuple(thin), left)


def _width(spec: LayerSpec) -> int:
    return spec.in_channels // spec.groups * math.prod(spec.kernel_size)


@dataclass(frozen=True, eq=False)
class _Given:
    """What a layer is given in the compressed model, beside what it should return.

    Attributes:
        pairs: Sums over all that is not held back.
        held: What is, inputs (groups, n, d) and outputs (groups, n, out).
        rows: Some of the pairs as they are, likewise; None where nobody asked for them.
        activations: What is done to the output, for each group.
    """

    pairs: Pairs
    held: tuple[Tensor, Tensor] | None
    rows: tuple[Tensor, Tensor] | None
    activations: Sequence[Callable[[Tensor], Tensor]]

    @classmethod
    def of(
        cls,
        passes: Passes,
        name: str,
        spec: LayerSpec,
        seen: Observed,
        activations: bool,
        second: bool,
    ) -> _Given:
        centred = spec.bias or seen.following[name].norm is not None
        pairs = Pairs(spec, centred=centred, second=second)
        after = seen.activations[name] if activations and centred else ()
        kept, rows = list[tuple[Tensor, Tensor]](), list[tuple[Tensor, Tensor]]()
        most = _KEPT // (4 * spec.groups * _width(spec)) // max(1, len(seen.batches))
        for number, inputs, outputs in given_rows(passes, name, seen.wanted[name]):
            if number >= len(seen.batches) - seen.held:
                kept.append((at_least_float(inputs), at_least_float(outputs)))
                continue
            pairs.add(inputs, outputs)
            if after:
                rows.append((inputs[:, :most].float(), outputs[:, :most].float()))
        return cls(pairs, _joined(kept), _joined(rows), after)


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    if not parts:
        return None
    inputs, outputs = zip(*parts, strict=True)
    return torch.cat(inputs, 1), torch.cat(outputs, 1)


def _refit(model: nn.Module, name: str, part: Part, given: _Given, seen: Observed) -> float:
    spec, pairs = part.spec, given.pairs
    dense = split_groups(part.weight().detach().double(), spec)
    target = regressed(dense.flatten(2), pairs, given.held)
    evidence = Evidence(zlib.crc32(f"{seen.seed}/{name}/{part.name}".encode()))
    weight = join_groups(target.weight.reshape(dense.shape), spec)
    fitted = Whitened(part.method, spec, weight, target.metric, evidence).refined(part.rank)
    bias = _bias(pairs, fitted.reconstruct(part.rank))
    factors = fitted.factors(part.rank)
    if given.rows is not None and given.held is not None:
        factors, bias = _to_activations(part, fitted, bias, given, evidence.seed)
    _write(model, name, part, factors, bias, seen.following[name].norm)
    return fitted.error(part.rank) / fitted.norm if fitted.norm > 0 else 0.0


def _bias(pairs: Pairs, weight: Tensor) -> Tensor:
    """What makes the mean of the output right, (groups, out)."""
    made = split_groups(weight, pairs.spec).flatten(2)
    return pairs.output_mean - (made @ pairs.input_mean[..., None])[..., 0]


def _correct_bias(model: nn.Module, name: str, part: Part, pairs: Pairs, seen: Observed) -> None:
    """The bias alone: it takes no more than means."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Sequential)
    bias = _bias(pairs, dense_weight(module, part.spec, part.stages))
    _write(model, name, part, None, bias, seen.following[name].norm)


def _to_activations(
    part: Part, fitted: Prepared, bias: Tensor, given: _Given, seed: int
) -> tuple[list[Tensor], Tensor]:
    assert given.rows is not None
    assert given.held is not None
    generator = torch.Generator().manual_seed(seed)
    group, groups = part.spec.per_group(), part.spec.groups
    stages = part.method.stages(group, part.rank)
    own = len([stage for stage in stages if stage.weight_shape is not None])
    factors = fitted.factors(part.rank)
    starts = zip(*(factor.chunk(groups) for factor in factors[:own]), strict=True)
    found = [
        fitted_to_activations(
            stages,
            start,
            bias[g],
            Rows(*(each[g] for each in given.rows)),
            Rows(*(each[g].float() for each in given.held)),
            given.activations[g],
            group,
            generator,
        )
        for g, start in enumerate(starts)
    ]
    joined = [torch.cat(column) for column in zip(*(each for each, _ in found), strict=True)]
    return [*joined, *factors[own:]], torch.stack([summand for _, summand in found])


def _write(
    model: nn.Module,
    name: str,
    part: Part,
    factors: Sequence[Tensor] | None,
    bias: Tensor,
    norm: str | None,
) -> None:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Sequential)
    rest = iter(factors or ())
    with torch.no_grad():
        for own, stage in zip(module, part.stages, strict=True):
            if factors is not None and stage.weight_shape is not None:
                own.get_parameter("weight").copy_(next(rest))
            if stage.bias:
                own.get_parameter("bias").copy_(bias.flatten())
        if norm is not None and not part.spec.bias:
            # BatchNorm takes its mean away: what is missing is taken away less.
            mean = model.get_submodule(norm).get_buffer("running_mean")
            mean.sub_(bias.flatten().to(mean))
