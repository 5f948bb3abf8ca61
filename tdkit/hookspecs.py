"""What a plugin may provide: one hook per kind, each returning a list of records.

A plugin is an installed package with an entry point in the group ``tdkit``::

    [project.entry-points.tdkit]
    my-plugin = "my_plugin"

whose module implements one or more of the hooks below. Hooks take no arguments and import nothing
heavy: a record carries a ``create`` callable that does the importing when the thing is first used.
Names match ``[a-z0-9-]+``; a name that two providers claim is an error that names both. A plugin
that breaks these rules is left out as a whole; ``tdkit plugins`` says why. Every example below runs
as it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from tdkit.costs.base import Cost
    from tdkit.datasets.base import Dataset
    from tdkit.decompositions.base import Decomposition
    from tdkit.layers.stages import Stage
    from tdkit.metrics.base import Metric
    from tdkit.planners.base import Planner

hookspec = pluggy.HookspecMarker("tdkit")
hookimpl = pluggy.HookimplMarker("tdkit")


@dataclass(frozen=True)
class DecompositionRecord:
    """A decomposition method.

    Args:
        name: What users type after ``--methods``.
        summary: One line for ``tdkit plugins``.
        create: Returns the :class:`~tdkit.decompositions.base.Decomposition`. Attributes of it
            that a study may set, such as ``sweeps``, are keywords of ``create``.
        default: The largest keep at which ``compress`` considers it without being asked, 0 for
            never. What runs slower than the layer it replaces should wait to be asked.
    """

    name: str
    summary: str
    create: Callable[..., Decomposition]
    default: float = 1.0


@dataclass(frozen=True)
class MetricRecord:
    """An approximation error; see :class:`DecompositionRecord` for the common fields.

    Args:
        name: What users type after ``--metric``.
        summary: One line for ``tdkit plugins``.
        create: Returns the :class:`~tdkit.metrics.base.Metric`.
    """

    name: str
    summary: str
    create: Callable[[], Metric]


@dataclass(frozen=True)
class CostRecord:
    """A cost that a budget may bound; see :class:`DecompositionRecord` for the common fields.

    Args:
        name: What users type after ``--cost``.
        summary: One line for ``tdkit plugins``.
        create: Returns the :class:`~tdkit.costs.base.Cost`.
    """

    name: str
    summary: str
    create: Callable[[], Cost]


@dataclass(frozen=True)
class ModelRecord:
    """An architecture that can be named instead of a file.

    Args:
        name: What users type as MODEL or after ``--arch``.
        summary: One line for ``tdkit plugins``.
        create: Returns the randomly initialised model; takes ``in_channels`` and
            ``num_classes`` as keywords.
        input_shape: Shape of one input without the batch axis, such as (3, 224, 224).
        num_classes: Number of classes of the default model.
        weights: Named sources of trained weights, each a callable that returns a state_dict; the
            first is the default.
        allowed_classes: ``package.module:Class`` names that may stand in a file of this model.
        recipes: How some of ``weights`` were trained, where that is known: by the same name, a
            callable that returns the text of the recipe, as ``tdkit train`` reads it. Fine-tuning
            goes on where it ended.
    """

    name: str
    summary: str
    create: Callable[..., nn.Module]
    input_shape: tuple[int, ...]
    num_classes: int
    weights: Mapping[str, Callable[[], Mapping[str, Tensor]]] = field(default_factory=dict)
    allowed_classes: tuple[str, ...] = ()
    recipes: Mapping[str, Callable[[], str]] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetRecord:
    """A data set that can be named after ``--data``.

    Args:
        name: What users type; with ``takes_path`` it is ``NAME:PATH``.
        summary: One line for ``tdkit plugins``.
        create: Called with ``root`` (the folder of ``--data-root`` or None), ``path`` (what
            follows the colon, or None), ``image_size`` (height and width the model wants, or
            None) and ``seed`` (of the validation split) as keywords; returns the
            :class:`~tdkit.datasets.base.Dataset`.
        takes_path: Whether the name is followed by ``:PATH``.
    """

    name: str
    summary: str
    create: Callable[..., Dataset]
    takes_path: bool = False


@dataclass(frozen=True)
class PlannerRecord:
    """A way to choose among candidates.

    Args:
        name: What users type after ``--planner``.
        summary: One line for ``tdkit plugins``.
        create: Returns the :class:`~tdkit.planners.base.Planner`.
    """

    name: str
    summary: str
    create: Callable[[], Planner]


@dataclass(frozen=True)
class StageRecord:
    """A kind of stage that factorizations may be chained of.

    Args:
        name: What ``tdkit plugins`` lists. Model files hold the ``kinds`` of the class instead.
        summary: One line for ``tdkit plugins``.
        create: Returns the subclass of :class:`~tdkit.layers.stages.Stage`, the class itself.
    """

    name: str
    summary: str
    create: Callable[[], type[Stage]]


Record = (
    DecompositionRecord
    | MetricRecord
    | CostRecord
    | ModelRecord
    | DatasetRecord
    | PlannerRecord
    | StageRecord
)


@hookspec
def tdkit_decompositions() -> list[DecompositionRecord]:
    """Provide decomposition methods.

    Example::

        from tdkit.hookspecs import DecompositionRecord, hookimpl

        def create():
            import torch
            from tdkit.decompositions.base import Decomposition

            class TwoLinears(Decomposition):
                def supports(self, layer):
                    return None if layer.kind == "Linear" else "only Linear layers"

                def max_rank(self, layer):
                    return min(layer.in_channels, layer.out_channels)

                def stages(self, layer, rank):
                    first = layer.pointwise(layer.in_channels, rank)
                    return first, layer.pointwise(rank, layer.out_channels)

                def decompose(self, layer, weight, rank, generator):
                    left, values, right = torch.linalg.svd(weight, full_matrices=False)
                    return values[:rank, None] * right[:rank], left[:, :rank]

            return TwoLinears()

        @hookimpl
        def tdkit_decompositions():
            return [DecompositionRecord("two-linears", "a Linear as two", create)]
    """
    raise AssertionError("a specification is not called")


@hookspec
def tdkit_metrics() -> list[MetricRecord]:
    """Provide approximation errors.

    An error is a number of at least 0, larger is worse; its ``penalty`` says by what it adds up
    over layers. With ``compare`` instead of a value of norms it may look at the tensors.

    Example::

        from tdkit.hookspecs import MetricRecord, hookimpl

        def create():
            from tdkit.metrics.base import Metric
            squared = lambda error, norm, size: error**2
            return Metric("squared-weights", "weights", squared, penalty="itself")

        @hookimpl
        def tdkit_metrics():
            return [MetricRecord("squared-weights", "squared Frobenius norm", create)]
    """
    raise AssertionError("a specification is not called")


@hookspec
def tdkit_costs() -> list[CostRecord]:
    """Provide costs that a budget may bound.

    Example::

        from tdkit.hookspecs import CostRecord, hookimpl

        def create():
            from tdkit.costs.base import Cost

            class Bytes(Cost):
                name = "bytes"
                unit = "bytes"

                def of(self, stages, layer):
                    return layer.bytes_per_parameter * sum(s.parameters for s in stages)

                def total(self, model, layers):
                    return sum(p.numel() * p.element_size() for p in model.parameters())

            return Bytes()

        @hookimpl
        def tdkit_costs():
            return [CostRecord("bytes", "bytes of all parameters", create)]
    """
    raise AssertionError("a specification is not called")


@hookspec
def tdkit_models() -> list[ModelRecord]:
    """Provide architectures.

    Example::

        from tdkit.hookspecs import ModelRecord, hookimpl

        def create(in_channels=1, num_classes=10):
            from torch import nn
            return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 784, num_classes))

        @hookimpl
        def tdkit_models():
            return [ModelRecord("one-layer", "a linear classifier", create, (1, 28, 28), 10)]
    """
    raise AssertionError("a specification is not called")


@hookspec
def tdkit_datasets() -> list[DatasetRecord]:
    """Provide data sets.

    Example::

        from tdkit.hookspecs import DatasetRecord, hookimpl

        def create(root=None, path=None, image_size=None, seed=0):
            import torch
            from tdkit.datasets.base import in_memory_dataset

            generator = torch.Generator().manual_seed(0)
            shape = (100, 1, *(image_size or (28, 28)))
            images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
            labels = torch.arange(100) % 2
            part = images, labels
            return in_memory_dataset("noise", ("even", "odd"), part, part, seed)

        @hookimpl
        def tdkit_datasets():
            return [DatasetRecord("noise", "100 images of noise", create)]
    """
    raise AssertionError("a specification is not called")


@hookspec
def tdkit_planners() -> list[PlannerRecord]:
    """Provide planners.

    This one knows the budget alone; one that also holds further bounds takes what each has to save
    as a third argument, see :class:`tdkit.planners.base.BoundsPlanner`.

    Example::

        from tdkit.hookspecs import PlannerRecord, hookimpl

        def create():
            from tdkit.planners.base import UnreachableError

            def strongest(options, needed):
                moves = {}
                for option in sorted(options, key=lambda o: (o.saving, -o.penalty, o.layer)):
                    moves[option.layer] = option
                chosen, saved = [], 0
                for option in sorted(moves.values(), key=lambda o: (o.penalty, o.layer)):
                    if saved < needed:
                        chosen.append(option)
                        saved += option.saving
                if saved < needed:
                    raise UnreachableError(saved)
                return chosen

            return strongest

        @hookimpl
        def tdkit_planners():
            return [PlannerRecord("strongest", "each layer's largest saving", create)]
    """
    raise AssertionError("a specification is not called")


@hookspec
def tdkit_stages() -> list[StageRecord]:
    """Provide kinds of stages beside torch's weight layers and those that move entries.

    Example::

        from tdkit.hookspecs import StageRecord, hookimpl

        def create():
            from dataclasses import dataclass
            from torch import nn
            from tdkit.errors import UsageError
            from tdkit.layers.stages import Stage, is_int

            @dataclass(frozen=True)
            class PixelShuffle(Stage):
                factor: int

                kinds = ("PixelShuffle",)
                kind = "PixelShuffle"

                def output_shape(self, shape):
                    if len(shape) != 4 or shape[1] % self.factor**2:
                        raise UsageError(f"no pixels to shuffle in the shape {shape}")
                    batch, channels, height, width = shape
                    sides = height * self.factor, width * self.factor
                    return batch, channels // self.factor**2, *sides

                def build(self, dtype=None, device=None):
                    return nn.PixelShuffle(self.factor)

                def compose(self, weight, signal):
                    return self.build()(signal)

                @classmethod
                def of(cls, module):
                    return cls(module.upscale_factor) if type(module) is nn.PixelShuffle else None

                def check(self):
                    return None if is_int(self.factor, 1) else "its factor is not a positive number"

            return PixelShuffle

        @hookimpl
        def tdkit_stages():
            return [StageRecord("pixel-shuffle", "channels as pixels", create)]
    """
    raise AssertionError("a specification is not called")


HOOKS: dict[str, Any] = {
    "tdkit_decompositions": DecompositionRecord,
    "tdkit_metrics": MetricRecord,
    "tdkit_costs": CostRecord,
    "tdkit_models": ModelRecord,
    "tdkit_datasets": DatasetRecord,
    "tdkit_planners": PlannerRecord,
    "tdkit_stages": StageRecord,
}
