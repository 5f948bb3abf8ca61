"""A convolutional or linear layer as a plain record, and the torch module it describes.

The same record describes a layer of the model and a stage of its factorization, so counting,
building and comparing are written once. No weights here: records are safe to keep, compare and
store as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tdkit.layers.impulses import impulse_response
from tdkit.layers.stages import Shape, Stage, is_int

CONVOLUTIONS: Mapping[str, type[nn.Module]] = {
    "Conv1d": nn.Conv1d,
    "Conv2d": nn.Conv2d,
    "Conv3d": nn.Conv3d,
}
TRANSPOSED: Mapping[str, type[nn.Module]] = {
    "ConvTranspose1d": nn.ConvTranspose1d,
    "ConvTranspose2d": nn.ConvTranspose2d,
    "ConvTranspose3d": nn.ConvTranspose3d,
}
KINDS: Mapping[str, type[nn.Module]] = {**CONVOLUTIONS, **TRANSPOSED, "Linear": nn.Linear}

_CLASSES = frozenset(KINDS.values())
_PADDING_MODES = frozenset({"zeros", "reflect", "replicate", "circular"})

_TUPLES = ("kernel_size", "stride", "padding", "dilation", "output_padding")


@dataclass(frozen=True)
class LayerSpec(Stage):
    """The hyperparameters of one Conv, ConvTranspose or Linear layer.

    Args:
        kind: The name of the torch class, a key of :data:`KINDS`.
        in_channels: Input channels (Linear: input features).
        out_channels: Output channels (Linear: output features).
        kernel_size: One entry per spatial axis; empty for Linear, like the next four.
        stride: Stride per axis.
        padding: Padding per axis, or ``"same"`` / ``"valid"``.
        dilation: Dilation per axis.
        output_padding: Output padding per axis (transposed convolutions only).
        groups: Number of groups.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
        bias: Whether the layer has a bias.
        leading: How many axes come before the features of a Linear's input, the batch axis
            included: 1 for (batch, features), 2 for (batch, tokens, features). What names all axes
            of the input, as a permutation does, needs it; the Linear itself takes any.
    """

    kind: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = False
    leading: int = 1

    kinds = tuple(KINDS)

    @property
    def transposed(self) -> bool:
        """Whether this is a transposed convolution, whose weight is (in, out / groups, ...)."""
        return self.kind in TRANSPOSED

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of torch's weight tensor for this layer."""
        if self.transposed:
            return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def weight_parameters(self) -> int:
        """The number of elements of the weight, without the bias."""
        return math.prod(self.weight_shape)

    @property
    def state_shapes(self) -> dict[str, Shape]:
        """The shapes of the weight and, where there is one, of the bias."""
        return {
            "weight": self.weight_shape,
            **({"bias": (self.out_channels,)} if self.bias else {}),
        }

    @property
    def parameters(self) -> int:
        """The number of parameters, bias included."""
        return self.weight_parameters + (self.out_channels if self.bias else 0)

    def per_group(self) -> LayerSpec:
        """The layer that each group is on its own, without bias."""
        return replace(
            self,
            in_channels=self.in_channels // self.groups,
            out_channels=self.out_channels // self.groups,
            groups=1,
            bias=False,
        )

    def repeated(self, groups: int) -> LayerSpec:
        """This layer side by side ``groups`` times, as one grouped layer."""
        if groups == 1:
            return self
        return replace(
            self,
            in_channels=self.in_channels * groups,
            out_channels=self.out_channels * groups,
            groups=self.groups * groups,
        )

    def ungrouped(self, groups: int) -> LayerSpec:
        """One of ``groups`` equal layers that this one is side by side."""
        return replace(
            self,
            in_channels=self.in_channels // groups,
            out_channels=self.out_channels // groups,
            groups=self.groups // groups,
        )

    def carries_bias(self, channels: int) -> bool:
        """Whether these are its output channels."""
        return self.out_channels == channels

    def with_bias(self, bias: bool) -> LayerSpec:
        """The same layer with or without a bias."""
        return replace(self, bias=bias)

    def output_shape(self, shape: Shape) -> Shape:
        """The full shape of the output, from that of the input."""
        if self.kind == "Linear":
            return (*shape[:-1], self.out_channels)
        batch, size = self._split(shape)
        if self.padding == "same":
            return (*batch, self.out_channels, *size)
        padding = (0,) * len(size) if isinstance(self.padding, str) else self.padding
        axes = zip(size, self.kernel_size, self.stride, padding, self.dilation, strict=True)
        if self.transposed:
            after = tuple(
                (n - 1) * s - 2 * p + d * (k - 1) + extra + 1
                for (n, k, s, p, d), extra in zip(axes, self.output_padding, strict=True)
            )
        else:
            after = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)
        return (*batch, self.out_channels, *after)

    def macs(self, shape: Shape) -> int:
        """Every weight meets every output position; in a transposed convolution, every input's."""
        if self.kind == "Linear":
            return self.weight_parameters * math.prod(shape[:-1])
        batch, size = self._split(shape if self.transposed else self.output_shape(shape))
        return self.weight_parameters * math.prod(batch) * math.prod(size)

    def compose(self, weight: Tensor | None, signal: Tensor) -> Tensor:
        """Impulses through the weight, without stride, padding and dilation.

        Args:
            weight: In torch's layout.
            signal: (impulses, in, *kernel), where the first axis may be missing, or (..., in) for a
                Linear.
        """
        assert weight is not None
        if self.kind == "Linear":
            return functional.linear(signal, weight)
        if signal.ndim == len(self.kernel_size) + 1:
            return impulse_response(self, weight, signal[None])[0]
        return impulse_response(self, weight, signal)

    def _split(self, shape: Shape) -> tuple[Shape, Shape]:
        """The batch axis of a convolution's input, which may be missing, and the spatial ones."""
        channels = len(shape) - len(self.kernel_size) - 1
        return shape[:channels], shape[channels + 1 :]

    def pointwise(self, in_channels: int, out_channels: int) -> LayerSpec:
        """A 1x1 convolution (Linear: a Linear) that mixes channels beside this layer."""
        axes = len(self.kernel_size)
        return LayerSpec(
            kind=self.kind.replace("ConvTranspose", "Conv"),
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=(1,) * axes,
            stride=(1,) * axes,
            padding=(0,) * axes,
            dilation=(1,) * axes,
            leading=self.leading,
        )

    def spatial(
        self,
        in_channels: int,
        out_channels: int,
        axes: Sequence[int] | None = None,
        groups: int = 1,
    ) -> LayerSpec:
        """This layer between other channel counts, restricted to some of its spatial axes.

        Args:
            in_channels: Input channels.
            out_channels: Output channels.
            axes: Spatial axes that keep this layer's kernel, stride, padding and dilation; the
                other axes get a kernel of 1 that moves nothing. None keeps all of them.
            groups: Groups of the result.
        """
        result = replace(
            self, in_channels=in_channels, out_channels=out_channels, groups=groups, bias=False
        )
        if axes is None:
            return result
        return replace(
            result,
            kernel_size=_on_axes(self.kernel_size, axes, 1),
            stride=_on_axes(self.stride, axes, 1),
            padding=(
                self.padding if isinstance(self.padding, str) else _on_axes(self.padding, axes, 0)
            ),
            dilation=_on_axes(self.dilation, axes, 1),
            output_padding=_on_axes(self.output_padding, axes, 0),
        )

    def build(self, dtype: torch.dtype | None = None, device: Any = None) -> nn.Module:
        """An ordinary torch module with these hyperparameters and uninitialised weights."""
        options: dict[str, Any] = {"bias": self.bias, "dtype": dtype, "device": device or "cpu"}
        cls: Any = KINDS[self.kind]
        if self.kind == "Linear":
            return self._empty(cls, options)
        options |= {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "padding_mode": self.padding_mode,
        }
        if self.transposed:
            options["output_padding"] = self.output_padding
        return self._empty(cls, options)

    def _empty(self, cls: Any, options: dict[str, Any]) -> nn.Module:
        module: nn.Module = torch.nn.utils.skip_init(
            cls, self.in_channels, self.out_channels, **options
        )
        return module

    @classmethod
    def of(cls, module: nn.Module) -> LayerSpec | None:
        """From one of torch's layers; what derives from them is something else."""
        return spec_of(module) if type(module) in _CLASSES else None

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values; ``leading`` only where it says something."""
        value = super().to_json()
        return value if self.leading != 1 else {k: v for k, v in value.items() if k != "leading"}

    def check(self) -> str | None:
        """Channels, groups and one entry of everything per axis, as torch demands them."""
        axes = 0 if self.kind == "Linear" else int(self.kind[-2])
        channels = is_int(self.in_channels, 0) and is_int(self.out_channels, 0)
        if not (channels and is_int(self.groups, 1)):
            return "its channels and groups are not positive numbers"
        if self.in_channels % self.groups or self.out_channels % self.groups:
            return "its channels are not divisible by its groups"
        tuples: dict[str, tuple[object, int]] = {
            "kernel_size": (self.kernel_size, 1),
            "stride": (self.stride, 1),
            "dilation": (self.dilation, 1),
            "padding": (self.padding, 0),
            "output_padding": (self.output_padding, 0),
        }
        if self.padding in ("same", "valid"):
            del tuples["padding"]
        for name, (values, least) in tuples.items():
            if name == "output_padding" and not self.transposed and values == ():
                continue
            if not (isinstance(values, tuple) and len(values) == axes) or not all(
                is_int(value, least) for value in values
            ):
                return f"its {name} is not {axes} numbers"
        if self.padding_mode not in _PADDING_MODES or not isinstance(self.bias, bool):
            return "its padding mode or bias is unknown"
        return None if is_int(self.leading, 0) else "its leading axes are not a number"


def spec_of(module: nn.Module) -> LayerSpec:
    """Describe a Conv1d/2d/3d, ConvTranspose1d/2d/3d or Linear module.

    Raises:
        KeyError: If the module is of another class.
    """
    kind = next((kind for kind, cls in KINDS.items() if isinstance(module, cls)), None)
    if kind is None:
        raise KeyError(f"a {type(module).__name__} is no convolution and not linear")
    bias = module._parameters.get("bias") is not None
    fields: Any = module
    if kind == "Linear":
        return LayerSpec(kind, fields.in_features, fields.out_features, bias=bias)
    return LayerSpec(
        kind=kind,
        in_channels=fields.in_channels,
        out_channels=fields.out_channels,
        groups=fields.groups,
        padding_mode=fields.padding_mode,
        bias=bias,
        **{name: getattr(fields, name) for name in _TUPLES},
    )


def _on_axes(values: tuple[int, ...], axes: Sequence[int], default: int) -> tuple[int, ...]:
    return tuple(value if axis in axes else default for axis, value in enumerate(values))
