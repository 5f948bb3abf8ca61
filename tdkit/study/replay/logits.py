"""What a model says of a batch: its logits, the classes, and whether two passes agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tdkit.errors import TdkitError, UnsupportedError, UsageError, first_line
from tdkit.forward.inputs import copies
from tdkit.forward.trial import trial

# Powers of the precision: by how much two passes of a deterministic model may differ (some CUDA
# kernels add up in any order), and how closely a replay has to agree with a full pass.
_DETERMINISTIC = 0.5
_REPLAYED = 0.75


def dense_predictions(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """The classes that a model predicts, without any layer replaced.

    Args:
        model: The model; it runs in eval mode.
        batches: Its inputs, (batch, ...).

    Returns:
        The classes, int64 (n,) on the CPU; -1 for logits with a NaN.

    Raises:
        UnsupportedError: If the model does not run on the inputs, gives another output each time,
            or none of shape (batch, classes).
        UsageError: If there are no inputs.
    """
    found: list[Tensor] = []
    for batch in batches:
        with trial(model):
            logits = logits_of(model, batch)
            if not found:
                refuse_random(logits, logits_of(model, batch))
            found.append(classes(logits))
    return joined(found).cpu()


def logits_of(model: nn.Module, batch: Tensor) -> Tensor:
    """The logits of a model, which is given a copy of the batch.

    Args:
        model: The model.
        batch: Its inputs, (batch, ...).

    Returns:
        The first floating-point output of shape (batch, classes).

    Raises:
        UnsupportedError: If the model does not run on the batch, or has no such output.
    """
    try:
        output = model(*copies([batch]))
    except (MemoryError, torch.OutOfMemoryError, TdkitError):
        raise
    except Exception as error:  # a model may fail in any way
        raise UnsupportedError(
            f"the model does not run on images of shape {tuple(batch.shape[1:])}:"
            f" {first_line(error)}"
        ) from error
    for tensor in _tensors(output):
        if tensor.ndim == 2 and len(tensor) == len(batch) and tensor.is_floating_point():
            return tensor
    raise UnsupportedError(
        f"the model gives no output of shape ({len(batch)}, classes) for {len(batch)} images"
    )


def _tensors(output: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors([getattr(leaf, each.name) for each in fields(leaf)])


def classes(logits: Tensor) -> Tensor:
    """The classes that logits of shape (batch, classes) predict, int64 (batch,).

    That of logits with a NaN is -1.
    """
    return torch.where(logits.isnan().any(1), -1, logits.argmax(1))


def joined(found: Sequence[Tensor]) -> Tensor:
    """The classes of all batches, (n,), from those of each, (batch,).

    Raises:
        UsageError: If there are no batches.
    """
    if not found:
        raise UsageError("there are no images to measure on")
    return torch.cat(list(found))


def refuse_random(first: Tensor, second: Tensor) -> None:
    """Refuse a model whose logits, (batch, classes), of two passes over a batch differ.

    Raises:
        UnsupportedError: If they do.
    """
    if _differ(first, second, _DETERMINISTIC):
        raise UnsupportedError(
            "the model cannot be measured, as it is not deterministic in eval mode: the same"
            " images give different outputs",
            "does it draw random numbers, or keep something from one pass to the next?",
        )


def agree(full: Tensor, replayed: Tensor) -> bool:
    """Whether the logits, (batch, classes), of a replay are those of a full pass."""
    return not _differ(full, replayed, _REPLAYED)


def _differ(first: Tensor, second: Tensor, power: float) -> bool:
    """Whether logits differ by more than a power of their precision, relative to the largest."""
    if first.shape != second.shape:
        return True
    tolerance = torch.finfo(first.dtype).eps ** power
    wide = first.double()
    scale = float(wide.nan_to_num(0, 0, 0).abs().max())
    return not torch.allclose(wide, second.double(), 0, tolerance * scale, equal_nan=True)


def reason_of(error: BaseException) -> str:
    """Why something failed, in one line."""
    if isinstance(error, TdkitError):
        return str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"out of memory: {first_line(error)}"
    return f"{type(error).__name__}: {first_line(error)}"
