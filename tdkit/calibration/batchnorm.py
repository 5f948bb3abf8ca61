"""BatchNorm statistics that fit the compressed layers in front of them, with data and without."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdkit.calibration.moments import ChannelStatistics
from tdkit.errors import UnsupportedError, UsageError, first_line, option
from tdkit.forward.inputs import Inputs
from tdkit.forward.trial import trial

Calibration = Literal["none", "noise", "synthetic", "data"]
"""What compressed layers are fitted to: nothing, noise images, made ones, or real ones."""

Statistics = Mapping[str, ChannelStatistics]
"""By the name of a BatchNorm the mean and variance of what it is given."""

CALIBRATIONS: tuple[Calibration, ...] = get_args(Calibration)


# How much of a change of variance is followed, as an exponent. What truncation takes away is
# mostly orthogonal to what stays, so scaling it up again in full would amplify an error.
_VARIANCE_SHARE = 0.75


def match_statistics(dense: nn.Module, compressed: nn.Module, batches: Iterable[Inputs]) -> int:
    """Shift the statistics of every BatchNorm as far as compression shifted its input.

    Both models see the same inputs, which need not be real ones: with BatchNorm on the statistics
    of the batch, the features of every layer have the means and variances that it learned, whatever
    comes in. The difference between the two models is what the running statistics, measured in
    training, are moved by. In the spirit of the bias correction of Nagel et al. 2019,
    "Data-free quantization through weight equalization and bias correction" (section 4.2). Changes
    ``compressed`` in place; BatchNorm layers whose input is the same in both stay bit-equal.

    Args:
        dense: The original; it stays as it is.
        compressed: The same model with layers replaced.
        batches: Model inputs of at least two samples each, a few hundred in all. A last batch of
            one is passed over.

    Returns:
        How many BatchNorm layers were changed.

    Raises:
        UsageError: If there are no inputs.
        UnsupportedError: If the models do not run on them, or they are not finite.
    """
    inputs = list(batches)
    return shift_statistics(compressed, norm_statistics(dense, inputs), inputs)


def norm_statistics(model: nn.Module, batches: Iterable[Inputs]) -> Statistics:
    """What every BatchNorm of a model is given, while all of them use the batch's statistics.

    Args:
        model: It is afterwards as before.
        batches: See :func:`match_statistics`.

    Raises:
        UsageError: If there are no inputs.
        UnsupportedError: If the model does not run on them, or they are not finite.
    """
    inputs = _usable(list(batches))
    try:
        return _input_statistics(model, inputs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model may fail in any way
        raise UnsupportedError(
            f"the model does not run on the data to calibrate on: {first_line(error)}",
            "take data of the shape that it was trained on, or use"
            f" {option('calibration', 'noise')}",
        ) from error


def shift_statistics(compressed: nn.Module, before: Statistics, batches: Iterable[Inputs]) -> int:
    """The second half of :func:`match_statistics`, when the dense model is no longer at hand.

    Args:
        compressed: Changed in place; as it was where this raises.
        before: From :func:`norm_statistics` of the dense model on the same batches.
        batches: See :func:`match_statistics`.

    Returns:
        How many BatchNorm layers were changed.

    Raises:
        UsageError: If there are no inputs.
        UnsupportedError: If the model does not run on them, or they are not finite.
    """
    after, norms = norm_statistics(compressed, batches), running_norms(compressed)
    shared = [name for name in norms if name in before.keys() & after.keys()]
    kept = {name: copy.deepcopy(norms[name].state_dict()) for name in shared}
    try:
        return sum(_shift(norms[name], before[name], after[name]) for name in shared)
    except BaseException:
        for name, state in kept.items():
            norms[name].load_state_dict(state)
        raise


def has_statistics(model: nn.Module) -> bool:
    """Whether a model has any BatchNorm with running statistics, which can be calibrated."""
    return bool(running_norms(model))


def running_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers that have running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def _usable(inputs: list[Inputs]) -> list[Inputs]:
    if not inputs:
        raise UsageError("calibrating on data needs some", f"name some with {option('data')}")
    if not all(batch.is_finite for batch in inputs):
        raise UnsupportedError(
            "the data to calibrate on hold NaN or infinite values", "take those samples out"
        )
    # BatchNorm has no statistics of a single sample without spatial axes.
    return inputs[:-1] if len(inputs) > 1 and inputs[-1].batch == 1 else inputs


def _input_statistics(model: nn.Module, batches: Iterable[Inputs]) -> Statistics:
    """What each BatchNorm is given while all of them use the batch's statistics."""
    norms = running_norms(model)
    found: dict[str, ChannelStatistics] = {}

    def look(name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.setdefault(name, ChannelStatistics()).add(args[0])

    handles = [norm.register_forward_pre_hook(partial(look, n)) for n, norm in norms.items()]
    try:
        for batch in batches:
            with trial(model):
                for norm in norms.values():
                    norm.training = True
                batch.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _shift(norm: _BatchNorm, before: ChannelStatistics, after: ChannelStatistics) -> bool:
    """Move running statistics by the difference of two moments; False where there is none."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    alive = (before.variance > 0) & (after.variance > 0)
    ratio = torch.where(alive, after.variance / before.variance, 1)
    # In units of the real deviation: that of the noise may be another.
    unit = torch.where(alive, variance.double() / before.variance, 0).sqrt()
    shift = (after.mean - before.mean) * unit
    if not bool(((shift != 0) | (ratio != 1)).any()):
        return False
    if not (math.isfinite(float(shift.sum())) and math.isfinite(float(ratio.sum()))):
        return False
    mean.add_(shift.to(mean.dtype))
    variance.mul_(ratio.pow(_VARIANCE_SHARE).to(variance.dtype))
    return True
