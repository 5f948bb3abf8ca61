"""Is the compressed model the model we meant? Compare it with its dense reconstruction.

Layer-wise scores can look fine while the whole model is broken: a layer whose weight is read from
outside, a replacement that the forward pass never calls. So the compressed model and the original
carrying the reconstructed dense weights run on the same input, in eval and in train mode. Neither
is a copy: parameters are shared, and widened one operation at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tdkit.decompositions.base import compose
from tdkit.errors import UnsupportedError, first_line
from tdkit.forward.copying import shared_copy
from tdkit.forward.inputs import Inputs
from tdkit.forward.trial import trial
from tdkit.layers.chains import stage_of
from tdkit.layers.impulses import join_groups
from tdkit.layers.inventory import Layer, replace_layer
from tdkit.layers.spec import LayerSpec
from tdkit.layers.stages import Stage

# By the precision of the outputs; in half precision rounding alone adds up to percents.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1

# How closely the outputs in double precision have to be those of the model as it is.
_SAME_MODEL = 1e-2

_BLIND = "without the shape of its input it is compressed unverified"


def verify(
    model: nn.Module,
    factorized: Mapping[Layer, nn.Sequential],
    inputs: Inputs,
    stages: Mapping[Layer, Sequence[Stage]] | None = None,
) -> dict[str, str]:
    """Which factorized layers break the model, and how.

    Everything is computed in float64 where the model allows it, so that rounding does not hide or
    fake a difference. What is held for that are the dense weights of these layers, and the one
    that an operation works with.

    Args:
        model: The model with its dense layers; it is not changed.
        factorized: What stands in for which layer.
        inputs: Arguments of one forward pass; of one sample two are made where that runs, since
            BatchNorm in train mode refuses one.
        stages: What each stand-in is built from, where that is more than tdkit's own kinds.

    Returns:
        A reason for every layer that has to be put back; empty when the model is right.

    Raises:
        UnsupportedError: If the dense model does not run on the inputs, or gives another output
            each time.
    """
    if not factorized:
        return {}
    comparison = _Comparison(model, inputs, stages or {})
    if comparison.difference(factorized) is None:
        return {}
    kept: dict[Layer, nn.Sequential] = {}
    broken = {}
    for layer, module in factorized.items():
        reason = comparison.difference({**kept, layer: module})
        if reason is None:
            kept[layer] = module
        else:
            broken[layer.name] = reason
    return broken


def dense_weight(
    module: nn.Sequential, spec: LayerSpec, stages: Sequence[Stage] | None = None
) -> Tensor:
    """The weight that a factorized layer amounts to, float64, as torch has that of the layer.

    That is (out, in/groups, *kernel) but for transposed convolutions.

    Args:
        module: The modules of the stages.
        spec: The layer that they stand in for.
        stages: The stages; None reads them off the modules, of tdkit's own kinds.

    Raises:
        UnsupportedError: If a module is none of tdkit's own stages.
    """
    stages = _stages_of(module) if stages is None else stages
    ungrouped = [stage.ungrouped(spec.groups) for stage in stages]
    weights = [
        part.get_parameter("weight").detach().double().chunk(spec.groups)
        for part, stage in zip(module, stages, strict=True)
        if stage.weight_shape is not None
    ]
    group = spec.per_group()
    parts = [compose(ungrouped, part, group) for part in zip(*weights, strict=True)]
    # Without a copy where there is one group: a weight may be a large part of the model.
    stacked = parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)
    return join_groups(stacked, spec)


def _stages_of(module: nn.Sequential) -> list[Stage]:
    stages = []
    for part in module:
        stage = stage_of(part)
        if stage is None:
            raise UnsupportedError(f"a {type(part).__name__} is no stage of a factorized layer")
        stages.append(stage)
    return stages


class _Comparison:
    """A dense model, in the widest precision that it runs in, and inputs for it."""

    def __init__(
        self, model: nn.Module, inputs: Inputs, stages: Mapping[Layer, Sequence[Stage]]
    ) -> None:
        # A copy of what it keeps in plain attributes: those would come out of this in float64.
        self.model, self.inputs, self.stages = shared_copy(model), inputs.two_samples(), stages
        plain = _outputs(self.model, self.inputs)
        if isinstance(plain, str):
            # It may take no other batch than the one it was shown.
            self.inputs = inputs
            again = _outputs(self.model, inputs)
            if isinstance(again, str):
                raise UnsupportedError(
                    f"the model cannot be verified on a batch of samples: {plain}", _BLIND
                )
            plain = again
        _refuse_broken(model, self.inputs, plain)
        wide = _outputs(self.model, self.inputs, wide=True)
        # A model that insists on its own precision, or works on views of its own tensors.
        self.wide = _gap(plain, wide, max(_SAME_MODEL, _tolerance(plain))) is None
        if not self.wide and _overflows(plain):
            self.wide = isinstance(wide, list)
        self.tolerance = _TOLERANCE[torch.float64] if self.wide else _tolerance(plain)

    def difference(self, factorized: Mapping[Layer, nn.Sequential]) -> str | None:
        """What is different with these layers replaced; None when nothing is."""
        reference, compressed = self._pair(factorized)
        for training in (False, True):
            expected = _outputs(reference, self.inputs, training, self.wide)
            if isinstance(expected, str):
                continue  # only ever in train mode
            actual = _outputs(compressed, self.inputs, training, self.wide)
            reason = _gap(expected, actual, self.tolerance)
            if reason is None:
                continue
            again = _outputs(reference, self.inputs, training, self.wide)
            if _gap(expected, again, self.tolerance) is None:
                return f"{reason} in {'train' if training else 'eval'} mode"
            if not training:
                raise UnsupportedError(
                    "the model cannot be verified, as it is not deterministic: the same input"
                    " gives different outputs",
                    _BLIND,
                )
        return None

    def _pair(self, factorized: Mapping[Layer, nn.Sequential]) -> tuple[nn.Module, nn.Module]:
        """The model with reconstructed dense weights, and the model with the stand-ins."""
        weights = [
            self.model.get_submodule(layer.name).get_parameter("weight") for layer in factorized
        ]
        # In place, so that whoever else holds such a weight sees the reconstruction as well.
        reference = shared_copy(self.model, own=weights)
        compressed = shared_copy(self.model)
        for layer, module in factorized.items():
            assert layer.spec is not None
            weight = reference.get_submodule(layer.name).get_parameter("weight")
            found = dense_weight(module, layer.spec, self.stages.get(layer))
            weight.data = found if self.wide else found.to(weight.dtype)
            replace_layer(compressed, layer, module)
        return reference, compressed


class _Wide(TorchFunctionMode):
    """Compute in float64, whatever precision the weights are kept in.

    An operation gets float64 copies of its arguments, one weight at a time and a large matrix in
    parts, and its results are float64; what is changed in place, or is a view of something, is
    left in its own precision.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            found = func(*args, **options)
            floats = isinstance(found, torch.dtype) and found.is_floating_point
            return torch.float64 if floats else found
        if name in _METADATA or name in _VIEWS:
            return func(*args, **options)
        if func in _LOOKUPS:
            # A table is looked up, not computed with: its rows are widened, not the whole.
            return _widened(func(*args, **options))
        if isinstance(out := options.pop("out", None), Tensor):
            return func(*_like(args, out), **_like(options, out), out=out)
        if _is_in_place(name):
            return func(*args[:1], *_like(args[1:], args[0]), **_like(options, args[0]))
        if func in _IN_PARTS and out is None:
            return _IN_PARTS[func](func, *args, **options)
        options = _widened(options) if out is None else {**_widened(options), "out": out}
        return _widened(func(*_widened(args), **options))


# What is asked about a tensor without computing: not worth a copy of a whole table.
_METADATA = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "get_device"}
    | {"element_size", "data_ptr", "is_contiguous", "is_complex", "is_floating_point"}
    | {"untyped_storage", "__len__", "__hash__", "__repr__"}
)

# What gives views, which models write through: a copy would not be seen by whoever else has one.
_VIEWS = frozenset(
    {"__getitem__", "view", "view_as", "expand", "expand_as", "narrow", "select", "unbind"}
    | {"chunk", "split", "tensor_split", "unflatten", "transpose", "permute", "movedim", "swapaxes"}
    | {"t", "squeeze", "unsqueeze", "detach", "diagonal", "as_strided", "unfold", "flatten"}
    | {"reshape"}
)

_LOOKUPS = (functional.embedding, functional.embedding_bag, torch.embedding)


# How much of a weight is held in float64 at once, where an operation can be done in parts: the
# head of a language model may be most of it. Less than this glibc may keep when it is freed, and
# then lay the next part beside it.
_BLOCK_BYTES = 2**25


def _layer(
    func: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> Tensor:
    """A linear layer or a convolution, a few output channels at a time."""
    groups = rest[3] if len(rest) > 3 else options.get("groups", 1)
    run = partial(_run, func)
    if groups != 1 or not _is_large(weight):
        return run(input, weight, bias, *rest, **options)
    weights = _parts(weight, 0)
    biases = [None] * len(weights) if bias is None else bias.split(len(weights[0]))
    input = _widened(input)
    done = [run(input, *each, *rest, **options) for each in zip(weights, biases, strict=True)]
    return torch.cat(done, 1 - weight.dim())


def _product(
    func: Callable[..., Tensor], input: Tensor, other: Any = None, **options: Any
) -> Tensor:
    """A product of matrices, a few rows or columns of a large one at a time."""
    right = options.pop("mat2", other)
    run = partial(_run, func)
    if _is_large(right) and right.dim() == 2:
        input = _widened(input)
        return torch.cat([run(input, part, **options) for part in _parts(right, 1)], -1)
    if _is_large(input) and input.dim() == 2 and isinstance(right, Tensor):
        right = _widened(right)
        rows = -min(right.dim(), 2)
        return torch.cat([run(part, right, **options) for part in _parts(input, 0)], rows)
    return run(input, right, **options)


def _sum_and_product(
    func: Callable[..., Tensor], input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any
) -> Tensor:
    """``torch.addmm``, a few columns of a large second matrix at a time."""
    run = partial(_run, func)
    if not _is_large(mat2):
        return run(input, mat1, mat2, **scales)
    mat1 = _widened(mat1)
    parts = _parts(mat2, 1)
    sums = input.expand(len(mat1), mat2.shape[1]).split(parts[0].shape[1], 1)
    return torch.cat(
        [run(total, mat1, part, **scales) for total, part in zip(sums, parts, strict=True)], 1
    )


def _run(func: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    result: Tensor = _widened(func(*_widened(args), **_widened(options)))
    return result


def _is_large(value: Any) -> bool:
    """Whether it would take more than a block to widen."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    # A sparse matrix cannot be split, and takes less than it seems.
    plain = value.layout == torch.strided and value.dtype != torch.float64
    return plain and 8 * value.numel() > _BLOCK_BYTES


def _parts(weight: Tensor, dim: int) -> Sequence[Tensor]:
    each = 8 * weight.numel() // weight.shape[dim]
    # Rounded up, so that no part but the last is less than a block.
    parts: Sequence[Tensor] = weight.split(ceil(_BLOCK_BYTES / each), dim)
    return parts


_IN_PARTS: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((functional.linear, torch.conv1d, torch.conv2d, torch.conv3d), _layer),
    **dict.fromkeys((torch.matmul, Tensor.matmul, torch.mm, Tensor.mm), _product),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _sum_and_product),
}


def _is_in_place(name: str) -> bool:
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (
            name.startswith("__i") and name != "__invert__"
        )
    return name.endswith("_")


def _widened(value: Any) -> Any:
    return pytree.tree_map(_wide_tensor, value)


def _like(value: Any, target: Any) -> Any:
    """With floats in the precision of what they are written to: many operations demand that."""
    if not isinstance(target, Tensor) or not target.is_floating_point():
        return _widened(value)
    return pytree.tree_map(partial(_cast, dtype=target.dtype), value)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _wide_tensor(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if narrow and value.dtype != torch.float64 else value


def _refuse_broken(model: nn.Module, inputs: Inputs, outputs: Sequence[Tensor]) -> None:
    """Refuse a model that is broken before anything is replaced: nothing could be compared."""
    if any(bool(output.isfinite().any()) or output.numel() == 0 for output in outputs):
        return
    if not inputs.is_finite:
        raise UnsupportedError(
            "the model cannot be verified on inputs that hold NaN or infinite values",
            "take those samples out",
        )
    state = model.state_dict(keep_vars=True).items()
    broken = [name for name, value in state if not bool(value.isfinite().all())]
    where = f"; so are entries of {', '.join(broken[:3])}" if broken else ""
    raise UnsupportedError(
        f"the model's output is NaN or infinite before anything is replaced{where}",
        "restore its weights from an earlier checkpoint" if broken else _BLIND,
    )


def _overflows(outputs: Sequence[Tensor]) -> bool:
    """Whether some of the outputs are not finite: in float64 they may be."""
    return not all(bool(output.isfinite().all()) for output in outputs)


def _tolerance(outputs: Sequence[Tensor]) -> float:
    """By how much outputs of their precision may differ, relative to their norm."""
    dtypes = {output.dtype for output in outputs if output.is_floating_point()}
    return max((_TOLERANCE.get(dtype, _HALF_TOLERANCE) for dtype in dtypes), default=1e-6)


def _gap(expected: list[Tensor], actual: list[Tensor] | str, tolerance: float) -> str | None:
    """How outputs differ; None when they do not."""
    if isinstance(actual, str):
        return f"the model does not run with it replaced, perhaps it reads its weight: {actual}"
    shapes = [[tuple(output.shape) for output in outputs] for outputs in (expected, actual)]
    if shapes[0] != shapes[1]:
        wanted, given = ("shape " + " and ".join(map(str, each)) for each in shapes)
        return f"the output has {given} instead of {wanted.removeprefix('shape ')}"
    for want, have in zip(map(_double, expected), map(_double, actual), strict=True):
        finite = want.isfinite()
        if not torch.equal(finite, have.isfinite()):
            return "the output is NaN or infinite in other places than the dense reconstruction's"
        gap = float(torch.linalg.vector_norm((have - want)[finite]))
        if not gap <= tolerance * float(torch.linalg.vector_norm(want[finite])):
            return f"the output differs from the dense reconstruction by {gap:.1e}"
    return None


def _outputs(
    model: nn.Module, inputs: Inputs, training: bool = False, wide: bool = False
) -> list[Tensor] | str:
    """All tensors among the outputs, or why there are none."""
    try:
        with trial(model, training), _Wide() if wide else nullcontext():
            found = _tensors((inputs.map(_wide_tensor) if wide else inputs).run(model))
    except (MemoryError, torch.OutOfMemoryError):
        raise  # it says nothing of the layer
    except Exception as error:  # a model may fail in any way
        return first_line(error)
    return found or "there is no tensor among its outputs"


def _tensors(outputs: Any) -> list[Tensor]:
    found = []
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += _tensors([getattr(leaf, field.name) for field in fields(leaf)])
    return found


def _double(output: Tensor) -> Tensor:
    return output.to(torch.complex128 if output.is_complex() else torch.float64)
