"""Run anybody's model and leave no trace: modes, buffers and random numbers come back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdkit.errors import UnsupportedError, first_line
from tdkit.forward.inputs import Inputs


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Run a block in train or eval mode, then restore every module's own mode."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, value in before.items():
            module.training = value


@contextmanager
def trial(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Run a block in eval or train mode, without gradients and with fixed random numbers.

    Modes, buffers and the random state of Python, NumPy and torch are afterwards as before.
    """
    with _kept_buffers(model), _fixed_randomness(model), mode(model, training), torch.no_grad():
        yield


def run_on_data(model: nn.Module, batch: Inputs) -> Any:
    """What a model returns in eval mode, without gradients and without a trace.

    Args:
        model: It is afterwards as before.
        batch: Arguments of a forward pass, tensors of any shape.

    Raises:
        UnsupportedError: If the model does not run on them.
    """
    with tried_on_data(model):
        return batch.run(model)


@contextmanager
def tried_on_data(model: nn.Module) -> Iterator[None]:
    """A trial in eval mode that is told as one on data where it fails.

    Raises:
        UnsupportedError: For whatever the model raises itself.
    """
    try:
        with trial(model):
            yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model may fail in any way
        raise UnsupportedError(
            f"the model does not run on the data: {first_line(error)}"
        ) from error


def buffer_watch(model: nn.Module) -> Callable[[], bool]:
    """What tells later whether any buffer of a model is another one or was written to."""
    before = _tables(model)
    values = [(x, _version(x), x.clone()) for _, x in before if x is not None]

    def is_written() -> bool:
        now = _tables(model)
        same = [(key, id(x)) for key, x in before] == [(key, id(x)) for key, x in now]
        return not same or any(
            _version(x) != version
            or ((_can_change_unseen(x) or _counts_nothing(x)) and not torch.equal(x, value))
            for x, version, value in values
        )

    return is_written


def _tables(model: nn.Module) -> list[tuple[str, Tensor | None]]:
    return [item for module in model.modules() for item in module._buffers.items()]


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    tables = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, _version(buffer), buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for table, before in tables:
            table.clear()
            table.update(before)
        for buffer, version, value in values:
            if _counts_nothing(buffer):
                if not torch.equal(buffer, value):
                    with torch.inference_mode():
                        buffer.copy_(value)
            elif _version(buffer) != version:
                buffer.copy_(value)
            elif _can_change_unseen(buffer):
                # Writing through .data does not count as a version either. To look whether it is
                # needed would be to wait for a GPU.
                buffer.data.copy_(value)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _counts_nothing(buffer: Tensor) -> bool:
    # Inference tensors have no version at all.
    return buffer.is_inference() and buffer.layout == torch.strided and not buffer.is_meta


def _can_change_unseen(buffer: Tensor) -> bool:
    # BatchNorm's kernels write running statistics without counting it as a new version.
    plain = buffer.is_floating_point() and buffer.layout == torch.strided and not buffer.is_meta
    if not plain or buffer.is_inference():
        return False
    # Nothing can be written to an expanded buffer.
    return all(step or size < 2 for step, size in zip(buffer.stride(), buffer.shape, strict=True))


def random_state() -> Any:
    """The random state of Python, NumPy and torch, to be set again."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_state(state: Any) -> None:
    """Go on from where :func:`random_state` was called."""
    python, arrays, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(arrays)
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(cuda)


@contextmanager
def _fixed_randomness(model: nn.Module) -> Iterator[None]:
    python, arrays = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            # Not torch.manual_seed, which reaches devices whose state is not kept here.
            torch.default_generator.manual_seed(0)
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
