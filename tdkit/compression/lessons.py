"""What a dense model makes of unlabelled inputs, kept for a compressed one to learn from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.calibration.divergence import outputs_of
from tdkit.calibration.following import ACTIVATIONS
from tdkit.forward.inputs import Inputs

VERSIONS = 8
"""How many versions of images a model is shown, the first of which are they themselves."""

KEPT = 2**30
"""Inputs, dense outputs and features that are kept, in bytes."""

# Images in one step.
_TOGETHER = 32

# Images are shifted by this share of their height and width at most: two pixels of 28.
_SHIFT = 1 / 14


@dataclass(frozen=True, eq=False)
class Lesson:
    """Inputs of one step.

    Attributes:
        inputs: Arguments of a forward pass, tensors of any shape.
        outputs: What the dense model returns, tensors of any shape.
        features: What its modules return, by their names, in each call.
    """

    inputs: Inputs
    outputs: Sequence[Tensor]
    features: Mapping[str, Sequence[Tensor]]

    def bytes(self, names: Sequence[str]) -> int:
        """How much is to be kept with the features of some modules.

        Args:
            names: Of the modules.
        """
        features = [each for name in names for each in self.features.get(name, ())]
        tensors = (*self.inputs.tensors, *self.outputs, *features)
        return sum(each.numel() * each.element_size() for each in tensors)


class Lessons:
    """Inputs in several versions, each of which is shown to the dense model when its turn comes.

    What the dense model returns is kept, in at most :data:`KEPT` bytes. Features of the first
    modules are left out where those of all would take more than an eighth of that and than the
    inputs and outputs themselves; where it cannot be kept even so, the dense model is run anew each
    time.

    Args:
        dense: The dense model.
        batches: Arguments of forward passes, tensors of any shape.
        divisible: Whether images can be put in other batches.
        names: Modules whose features are of use, in order.
        seed: Of the versions.

    Raises:
        UnsupportedError: If the model does not run on the inputs.
    """

    def __init__(
        self,
        dense: nn.Module,
        batches: Sequence[Inputs],
        divisible: bool,
        names: Sequence[str],
        seed: int,
    ) -> None:
        self.dense, self.batches, self.seed, self.names = dense, tuple(batches), seed, tuple(names)
        self.images = _images(batches, divisible)
        self.size = _TOGETHER if divisible else None
        self.versions = VERSIONS if self.images else 1
        self.is_kept, self.notes = True, list[str]()
        self._shown: dict[int, list[Inputs]] = {}
        self._kept: dict[tuple[int, int], Lesson] = {}
        self.count = len(self._inputs(0))
        self._settle()

    def get(self, epoch: int, index: int) -> Lesson:
        """The inputs of one step.

        Args:
            epoch: Counts from 0; the versions take turns.
            index: Which of the lessons of the version.

        Raises:
            UnsupportedError: If the dense model does not run on them.
        """
        version = epoch % self.versions
        key = version, index
        if key in self._kept:
            return self._kept[key]
        lesson = _lesson(self.dense, self._inputs(version)[index], self.names)
        if self.is_kept:
            self._kept[key] = lesson
        return lesson

    def _settle(self) -> None:
        """Choose what is kept by the size of the first lesson."""
        first = _lesson(self.dense, self._inputs(0)[0], self.names)
        self.names = tuple(name for name in self.names if first.features.get(name))
        bare, names = first.bytes(()) * self.count, list(self.names)
        while names and first.bytes(names) * self.count - bare > max(KEPT // VERSIONS, bare):
            del names[0]
        needed = first.bytes(names) * self.count
        self.is_kept = needed <= KEPT
        if not self.is_kept:
            self.notes.append("the dense model is run anew in each step: too much to keep")
            return
        self.versions = max(1, min(self.versions, KEPT // max(1, needed)))
        if len(names) < len(self.names):
            told = f"features of the last {len(names)} of {len(self.names)} modules are compared"
            self.notes.append(f"{told}: those of all are too much to keep")
        self.names = tuple(names)

    def _inputs(self, version: int) -> list[Inputs]:
        if not self.images:
            return list(self.batches)
        if version not in self._shown:
            if not self.is_kept:
                self._shown.clear()
            generator = torch.Generator().manual_seed((self.seed + version) % 2**63)
            parts = self.images if version == 0 else [altered(x, generator) for x in self.images]
            cut = [each for part in parts for each in part.split(self.size or len(part))]
            self._shown[version] = [Inputs((_laid_out(each),)) for each in cut]
        return self._shown[version]


def shared_features(dense: nn.Module, compressed: nn.Module) -> list[str]:
    """The activations and layer norms that two models have under the same names.

    Args:
        dense: The dense model.
        compressed: The same with layers replaced.
    """
    theirs = dict(compressed.named_modules())
    return [
        name
        for name, module in dense.named_modules()
        if isinstance(module, (*ACTIVATIONS, nn.LayerNorm))
        and type(theirs.get(name)) is type(module)
    ]


@contextmanager
def watched(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What modules return meanwhile, by their names, in each call.

    Args:
        model: It has no hook afterwards.
        names: Of the modules.

    Yields:
        Tensors of any shape; clear it between two passes.
    """
    seen: dict[str, list[Tensor]] = {}

    def look(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            seen.setdefault(name, []).append(output)

    modules = {name: model.get_submodule(name) for name in names}
    handles = [m.register_forward_hook(partial(look, name)) for name, m in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def altered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Other inputs of the same kind, of which the dense model says what they are.

    Half of the images are mirrored, all are shifted a little, and half are mixed with another one
    in random shares (mixup, Zhang et al. 2018, whose labels are here the dense outputs). What has
    no two axes of pixels is only mixed.

    Args:
        images: (n, ...), floats.
        generator: On the CPU.

    Returns:
        (n, ...), in another order.
    """
    images = images[torch.randperm(len(images), generator=generator)]
    if images.ndim == 4:
        images = torch.stack([_moved(image, generator) for image in images])
    shape = (len(images), *(1 for _ in images.shape[1:]))
    share = torch.rand(shape, generator=generator)
    share = torch.where(torch.rand(shape, generator=generator) < 0.5, share, 1.0).to(images)
    others = images[torch.randperm(len(images), generator=generator)]
    return torch.lerp(others, images, share)


def _moved(image: Tensor, generator: torch.Generator) -> Tensor:
    """An image, mirrored or not, shifted; its edge goes on."""
    axes = []
    for size in image.shape[-2:]:
        most = int(size * _SHIFT)
        by = int(torch.randint(-most, most + 1, (), generator=generator))
        axes.append((torch.arange(size) + by).clamp(0, size - 1))
    if torch.rand((), generator=generator) < 0.5:
        axes[-1] = axes[-1].flip(0)
    rows, columns = (axis.to(image.device) for axis in axes)
    return image[..., rows[:, None], columns]


def _images(batches: Sequence[Inputs], divisible: bool) -> list[Tensor]:
    """The inputs where all are images alone, as one tensor if they can be put in other batches."""
    images = [batch.image for batch in batches]
    known = [each for each in images if each is not None]
    if len(known) < len(batches):
        return []
    alike = len({each.shape[1:] for each in known}) == 1
    return [torch.cat(known)] if divisible and alike else known


def _laid_out(images: Tensor) -> Tensor:
    if images.ndim != 4:
        return images
    return images.contiguous(memory_format=torch.channels_last)


def _lesson(dense: nn.Module, inputs: Inputs, names: Sequence[str]) -> Lesson:
    with watched(dense, names) as seen:
        (outputs,) = outputs_of(dense, [inputs])
        # What a module returned may be a part of something larger.
        features = {name: [x.detach().clone() for x in each] for name, each in seen.items()}
    return Lesson(inputs, [each.detach() for each in outputs], features)
