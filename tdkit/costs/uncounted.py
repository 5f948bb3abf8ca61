"""What the MACs of layers leave out: attention, recurrent layers, weights read directly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry

from tdkit.forward.inputs import Inputs
from tdkit.forward.operators import OperatorMode
from tdkit.forward.trial import trial
from tdkit.layers.inventory import Layer


def outside_macs(model: nn.Module, layers: Sequence[Layer], inputs: Inputs) -> int | None:
    """Multiply-accumulates per sample outside of convolutional and linear layers.

    Args:
        model: The model that was run.
        layers: All its layers, with their calls.
        inputs: Arguments of a forward pass over a single sample.

    Returns:
        torch's own count of matrix products and convolutions less that of the layers; None where
        the model does not run under that count.
    """
    counter = _Products()  # type: ignore[no-untyped-call]
    try:
        with trial(model), _in_plain_products(), counter:
            inputs.run(model)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # a model may fail in any way
        return None
    return max(0, counter.flops // 2 - sum(layer.macs or 0 for layer in layers))


def left_out(macs: int | None, layers: Sequence[Layer]) -> str | None:
    """A sentence on what the MACs of layers leave out; None where that is nothing.

    Args:
        macs: From :func:`outside_macs`; None says that they are unknown.
        layers: All layers of the model, with their calls.
    """
    if macs == 0:
        return None
    names = [layer.name for layer in layers if layer.calls == () and layer.parameters]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    idle = f"; not called as layers: {shown}" if names else ""
    where = "outside of convolutional and linear layers, as in attention and recurrent layers"
    if macs is None:
        return f"MACs {where}, are unknown{idle}"
    return f"MACs leave out {macs:,} per input that are {where}{idle}"


class _Products(OperatorMode):
    """Adds up torch's formulas for matrix products and convolutions.

    Its own FlopCounterMode does so too, and imports the compiler, which takes as long as torch.
    """

    flops = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and count it where there is a formula."""
        output = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        return output


@contextmanager
def _in_plain_products() -> Iterator[None]:
    """Attention and recurrent layers in matrix products, which torch counts on every device."""
    attention, fused = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    # Not its flags(), which sets the precision of products too and warns where TF32 is unknown.
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(attention)
        torch.backends.mkldnn.enabled = fused
