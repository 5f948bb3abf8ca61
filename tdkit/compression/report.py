"""What a compression achieved, measured on the whole model."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any, cast

import torch
from torch import nn

from tdkit.costs.base import Change, to_json
from tdkit.costs.latency import Latency, measure_latency
from tdkit.datasets.base import Split
from tdkit.errors import first_line
from tdkit.forward.inputs import Inputs
from tdkit.tables import Table, number, percent
from tdkit.training.loop import evaluate

# Of tdkit's own costs.
_TITLES = {"params": "parameters", "macs": "MACs per input"}


@dataclass(frozen=True)
class Report:
    """Totals before and after; None where something could not be measured.

    Attributes:
        costs: Of the whole model, by the name of a cost.
        bytes: Size of the state_dict as a file, which compares models whatever the format.
        latency: Medians of forward passes.
        untimed: Why there is no latency although there are inputs.
        accuracy: On the test split.
        images: How many images that split has.
        compressed: The accuracy of the compressed model before it was fine-tuned.
        finetuning: How it was fine-tuned, as JSON values; None where it was not.
    """

    costs: Mapping[str, Change | None]
    bytes: tuple[int, int]
    latency: Latency | None = None
    accuracy: tuple[float, float] | None = None
    images: int | None = None
    compressed: float | None = None
    finetuning: Mapping[str, Any] | None = field(default=None)
    untimed: str | None = None

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def table(self) -> Table:
        """A row for each total: before, after, and the ratio."""
        columns = ("", "before", "after", "ratio")
        return Table(columns, tuple(self._rows()), frozenset(columns[1:]))

    def _rows(self) -> list[tuple[str, str, str, str]]:
        rows = [
            (_TITLES.get(name, name), *_counts(found.before, found.after))
            for name, found in self.costs.items()
            if found is not None
        ]
        before, after = self.bytes
        sizes = f"{before / 1e6:.2f} MB", f"{after / 1e6:.2f} MB"
        rows.append(("file size of the state_dict", *sizes, percent(after, before)))
        if self.latency is not None:
            rows.append(_latency_row(self.latency))
        if self.accuracy is not None:
            rows += self._accuracy_rows(*self.accuracy)
        return rows

    def _accuracy_rows(self, dense: float, small: float) -> list[tuple[str, str, str, str]]:
        images, rows = f"{number(self.images)} images", []
        if self.compressed is not None:
            rows.append(_accuracy(f"accuracy, not fine-tuned ({images})", dense, self.compressed))
        name = "accuracy" if self.finetuning is None else "accuracy, fine-tuned"
        return [*rows, _accuracy(f"{name} ({images})", dense, small)]

    def to_json(self) -> dict[str, Any]:
        """The totals as JSON values, ``{name}_before`` and ``{name}_after`` each.

        Costs of plugins are under ``costs`` by their names, which may be those of other totals.
        """
        latency = self.latency
        own = {name: found for name, found in self.costs.items() if name in _TITLES}
        others = {name: found for name, found in self.costs.items() if name not in _TITLES}
        return {
            **to_json(own),
            "costs": {name: found and asdict(found) for name, found in others.items()},
            **_pair("bytes", self.bytes),
            **_pair("accuracy", self.accuracy),
            "accuracy_compressed": self.compressed,
            "accuracy_images": self.images,
            "finetuning": self.finetuning,
            "latency_before_ms": None if latency is None else latency.milliseconds[0],
            "latency_after_ms": None if latency is None else latency.milliseconds[1],
            "latency": None if latency is None else _conditions(latency),
            "untimed": self.untimed,
        }


def measure(
    dense: nn.Module | None,
    small: nn.Module,
    costs: Mapping[str, Change | None],
    bytes_before: int,
    *,
    inputs: Inputs | None,
    test: Split | None = None,
) -> Report:
    """Measure the dense and the compressed model side by side, on the dense one's device.

    Args:
        dense: The original; None where it is no longer there, and nothing is timed or evaluated.
        small: The compressed model; it is moved to the dense one's device.
        costs: Before and after.
        bytes_before: Of the dense model, from :func:`state_bytes`.
        inputs: Arguments of a forward pass, for latency; tensors of any shape.
        test: Labelled images (n, channels, height, width), for accuracy.
    """
    both = (bytes_before, state_bytes(small))
    if dense is None:
        reason = None if inputs is None else "not timed: the dense model is no longer there"
        return Report(costs, both, untimed=reason)
    device = next(dense.parameters()).device
    small = small.to(device)
    latency, untimed = (None, None) if inputs is None else _latency((dense, small), inputs)
    accuracy = None
    if test is not None and test.labels is not None:
        found = [evaluate(model, test, device=device).accuracy for model in (dense, small)]
        accuracy = (found[0], found[1])
    return Report(
        costs=costs,
        bytes=both,
        latency=latency,
        untimed=untimed,
        accuracy=accuracy,
        images=None if accuracy is None or test is None else len(test),
    )


def near_chance(report: Report, classes: int) -> str | None:
    """A doubt about the data where the dense model is hardly better than guessing; or None.

    Args:
        report: What was measured.
        classes: How many classes the labels are of.
    """
    if report.accuracy is None or not report.images or classes < 2:
        return None
    accuracy, chance = report.accuracy[0], 1 / classes
    # Two standard errors, so that a few images are not trusted too far.
    margin = max(0.05, 2 * math.sqrt(chance * (1 - chance) / report.images))
    if accuracy >= chance + margin:
        return None
    return (
        f"the model's own accuracy, {accuracy:.2%} of {report.images:,} images, is near chance for"
        f" {classes} classes: are the images standardised, and the classes ordered, as in its"
        " training?"
    )


def state_bytes(model: nn.Module) -> int:
    """The size of a model's state_dict as torch writes it, without writing it."""
    counter = _Counter()
    torch.save(model.state_dict(), cast("IO[bytes]", counter))
    return counter.size


class _Counter(io.RawIOBase):
    """A file that keeps nothing of what is written to it but its size."""

    size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        count = memoryview(data).nbytes
        self.size += count
        return count


def _latency(models: Sequence[nn.Module], inputs: Inputs) -> tuple[Latency | None, str | None]:
    """The latency, or why there is none."""
    try:
        return measure_latency(models, inputs), None
    except Exception as error:  # a model may fail in any way, and be right on other inputs
        return None, f"not timed on a batch of {inputs.batch}: {first_line(error)}"


def _latency_row(latency: Latency) -> tuple[str, str, str, str]:
    dense, small = latency.milliseconds
    threads = f"{latency.threads} thread" + ("s" if latency.threads > 1 else "")
    where = f"batch {latency.batch}, {threads}, {latency.device}"
    times = f"{dense:.1f} ms", f"{small:.1f} ms"
    return f"latency ({where})", *times, f"{dense / small:.2f}× as fast"


def _counts(before: int, after: int) -> tuple[str, str, str]:
    return number(before), number(after), percent(after, before)


def _accuracy(name: str, before: float, after: float) -> tuple[str, str, str, str]:
    old, new = 100 * before, 100 * after
    return name, f"{old:.2f} %", f"{new:.2f} %", f"{new - old:+.2f} points"


def _pair(name: str, values: tuple[float, float] | None) -> Mapping[str, float | None]:
    before, after = values if values is not None else (None, None)
    return {f"{name}_before": before, f"{name}_after": after}


def _conditions(latency: Latency) -> dict[str, Any]:
    return {k: getattr(latency, k) for k in ("batch", "runs", "threads", "device")}
