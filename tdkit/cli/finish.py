"""The end that ``compress`` and ``apply`` share: measure, write, tell."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdkit.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from tdkit.cli.common import Opened
    from tdkit.cli.fitting import Finetuning, Tuned
    from tdkit.compression.compress import Compression
    from tdkit.compression.report import Report
    from tdkit.datasets.base import Dataset
    from tdkit.layers.stages import Stage

_SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "pt2": ".pt2"}
_CALIBRATED = {
    "data": "BatchNorm is calibrated on training images",
    "noise": "BatchNorm is calibrated on noise",
    "none": "no BatchNorm is calibrated",
}


@dataclass(frozen=True)
class Destination:
    """Where the compressed model and its plan go.

    Attributes:
        path: The model file.
        format: One of :data:`tdkit.checkpoint.FORMATS`.
        force: Whether existing files are replaced.
        inputs: Files that are never overwritten.
    """

    path: Path
    format: str
    force: bool
    inputs: tuple[str | Path, ...]

    @property
    def plan(self) -> Path:
        """The plan file beside the model, named after its whole name: formats differ at its end."""
        return self.path.with_name(self.path.name + ".plan.json")

    @property
    def has_plan(self) -> bool:
        """Whether the plan file is itself an input, which stays as it is."""
        return any(_is_same(self.plan, Path(source)) for source in self.inputs)

    @classmethod
    def of(
        cls,
        opened: Opened,
        output: Path | None,
        default: str,
        format: str | None,
        force: bool,
        inputs: Sequence[str | Path],
    ) -> Destination:
        """Settle path and format, and refuse a format that the model cannot have.

        Args:
            opened: The dense model.
            output: The path, where the user named it.
            default: The path without its suffix, where the user did not.
            format: The format, where the user named it.
            force: Whether existing files are replaced.
            inputs: Files that are never overwritten.
        """
        from tdkit.checkpoint import FORMATS, default_format

        if format is not None and format not in FORMATS:
            raise UsageError(f"unknown format {format!r}", f"it is one of {', '.join(FORMATS)}")
        format = format or default_format(opened.loaded, output)
        if format in ("onnx", "pt2"):
            opened.require_shape(f"exporting to {format}")
        path = output or Path(default + _SUFFIXES.get(format, ".pt"))
        return cls(path, format, force, tuple(inputs))

    def check(self, *, with_plan: bool = True) -> None:
        """Refuse early what could not be written at the end."""
        from tdkit.checkpoint import check_writable

        check_writable(self.path, force=self.force, inputs=self.inputs)
        if with_plan and not self.has_plan:
            check_writable(self.plan, force=self.force, inputs=self.inputs)


def plan_title(path: Path) -> str:
    """The name of a plan file without what :attr:`Destination.plan` puts there."""
    title = Path(path.stem.removesuffix(".plan"))
    written = title.suffix in (".pt", ".pth", *_SUFFIXES.values())
    return title.stem if written else title.name


def finish(
    opened: Opened,
    result: Compression,
    destination: Destination,
    dataset: Dataset | None,
    tuning: Finetuning | None,
    *,
    batch: int,
    start: float,
    json: bool,
) -> None:
    """Fine-tune the compressed model if asked to, write it, measure it, and print the report.

    It is written first: whatever fails afterwards, a full pipe or a second Ctrl-C, loses a table.

    Args:
        opened: The dense model.
        result: Its compression.
        destination: Where it goes.
        dataset: Its test split is for accuracy.
        tuning: The fine-tuning, if there is to be one.
        batch: Inputs per timed pass.
        start: When the command started, in seconds.
        json: Whether to print one JSON object instead of tables.
    """
    from tdkit.cli.display import remark

    tuned = None if tuning is None else tuning.run(result.model, quiet=json)
    _write(opened, result, destination, tuned)
    try:
        _tell(opened, result, destination, dataset, tuned, batch=batch, start=start, json=json)
    except BaseException:
        remark(f"the model is written to {destination.path} all the same")
        raise


def _tell(
    opened: Opened,
    result: Compression,
    destination: Destination,
    dataset: Dataset | None,
    tuned: Tuned | None,
    *,
    batch: int,
    start: float,
    json: bool,
) -> None:
    from tdkit.cli.common import file_json
    from tdkit.cli.display import note, say, stdout, waiting
    from tdkit.compression.report import measure, near_chance, summary

    test = None if dataset is None else dataset.test
    with waiting("measuring"):
        report = measure(opened.model, result, inputs=opened.inputs(batch), test=test)
    if tuned is not None:
        report = replace(report, compressed=tuned.accuracy, finetuning=tuned.summary())
    if report.untimed is not None:
        note(report.untimed)
    if dataset is not None and report.accuracy is None:
        note(f"no accuracy: {dataset.name} has no labelled test images")
    if dataset is not None and (doubt := near_chance(report, len(dataset.classes))) is not None:
        note(doubt)
    if json:
        value = summary(
            report,
            result,
            seconds=time.perf_counter() - start,
            output=destination.path,
            plan=destination.plan,
        )
        stdout().out(file_json(value), end="")
    else:
        _print(result, report)
        if result.plan.moves:
            say(f"\n{_CALIBRATED[result.calibrated]}")
        size = f"{destination.path.stat().st_size / 1e6:.2f} MB"
        files = f"{destination.path} ({destination.format}, {size}), plan in {destination.plan}"
        say(f"\nwrote {files}, {time.perf_counter() - start:.0f} s in all")
    print_notes(opened, result)


def print_notes(opened: Opened, result: Compression) -> None:
    """Tell on stderr what the user should know about the model and its compression."""
    from tdkit.cli.display import note
    from tdkit.compression.compress import larger_than_dense
    from tdkit.costs.uncounted import left_out, outside_macs
    from tdkit.forward.inputs import one_sample

    for text in opened.notes:
        note(text)
    for name, reason in result.put_back.items():
        note(f"{name} was put back: {reason}")
    if not result.plan.moves:
        note("nothing was replaced")
    for name in larger_than_dense(result):
        note(f"the plan makes the layer {name} larger")
    if (inputs := one_sample(opened.inputs())) is not None:
        outside = outside_macs(opened.model, result.layers, inputs)
        if (told := left_out(outside, result.layers)) is not None:
            note(told)
    if not result.verified:
        undone = "verified, calibrated" if result.uncalibrated else "verified"
        note(f"not {undone} or timed: that takes --input-shape, such as 3,224,224")
    elif result.uncalibrated is not None:
        note(f"BatchNorm is not calibrated: {result.uncalibrated}")


def save(
    opened: Opened,
    model: nn.Module,
    destination: Destination,
    *,
    plan: Mapping[str, Any] | None,
    structure: Mapping[str, Sequence[Stage]],
    training: Mapping[str, Any] | None,
) -> None:
    """Write a model that was made from an opened one, for any machine to load.

    Args:
        opened: What it was made from.
        model: The model; it is moved to the CPU.
        destination: Where it goes.
        plan: The plan that it carries.
        structure: The stages of its replaced layers, besides those that it came with.
        training: What is known about its training.
    """
    from tdkit.checkpoint import save_model

    save_model(
        model.cpu(),
        destination.path,
        format=destination.format,
        force=destination.force,
        inputs=destination.inputs,
        plan=plan,
        structure={**opened.loaded.structure, **structure},
        arch=opened.loaded.arch,
        input_shape=opened.shape,
        arch_options=opened.loaded.arch_options,
        training=training,
    )


def _write(
    opened: Opened, result: Compression, destination: Destination, tuned: Tuned | None
) -> None:
    from tdkit.checkpoint import atomic_write
    from tdkit.cli.common import file_json

    plan = result.plan.to_json()
    training = opened.loaded.training if tuned is None else tuned.training

    def write() -> None:
        save(
            opened,
            result.model,
            destination,
            plan=plan,
            structure=result.structure,
            training=training,
        )

    if destination.has_plan:
        write()
        return
    # The plan takes its name last, when the model is safe; a full disk leaves neither.
    force, inputs = destination.force, destination.inputs
    with atomic_write(destination.plan, force=force, inputs=inputs) as temporary:
        temporary.write_text(file_json(plan), encoding="utf-8")
        write()


def _is_same(path: Path, source: Path) -> bool:
    return path.exists() and source.exists() and path.samefile(source)


def _print(result: Compression, report: Report) -> None:
    from tdkit.cli.display import number, percent, say, show, sizes, table

    numbers = ("parameters", "after", "kept", "error")
    view = table(None, "layer", "method", "rank", *numbers, right=numbers)
    dense = {layer.name: layer.parameters for layer in result.layers}
    for move in result.plan.moves:
        before = dense[move.layer]
        after = sum(stage.parameters for stage in result.structure[move.layer])
        error = f"{result.errors[move.layer]:.4f}"
        row = (number(before), number(after), percent(after, before), error)
        view.add_row(move.layer, move.method, sizes(move.rank), *row)
    if result.plan.moves:
        show(view)
        say("")
    columns = ("before", "after", "ratio")
    totals = table(None, "", *columns, right=columns)
    for row in _totals(report):
        totals.add_row(*row)
    show(totals)


def _totals(report: Report) -> list[tuple[str, str, str, str]]:
    from tdkit.cli.display import number, percent

    before, after = report.params
    rows: list[tuple[str, str, str, str]] = [
        ("parameters", number(before), number(after), percent(after, before))
    ]
    if report.macs is not None:
        before, after = report.macs
        rows.append(("MACs per input", number(before), number(after), percent(after, before)))
    before, after = report.bytes
    sizes = f"{before / 1e6:.2f} MB", f"{after / 1e6:.2f} MB"
    rows.append(("file size of the state_dict", *sizes, percent(after, before)))
    if (latency := report.latency) is not None:
        dense, small = latency.milliseconds
        threads = f"{latency.threads} thread" + ("s" if latency.threads > 1 else "")
        where = f"batch {latency.batch}, {threads}, {latency.device}"
        times = f"{dense:.1f} ms", f"{small:.1f} ms"
        rows.append((f"latency ({where})", *times, f"{dense / small:.2f}× as fast"))
    if report.accuracy is not None:
        dense, small = report.accuracy
        images = f"{number(report.images)} images"
        if report.compressed is not None:
            rows.append(_accuracy(f"accuracy, not fine-tuned ({images})", dense, report.compressed))
        name = "accuracy" if report.finetuning is None else "accuracy, fine-tuned"
        rows.append(_accuracy(f"{name} ({images})", dense, small))
    return rows


def _accuracy(name: str, before: float, after: float) -> tuple[str, str, str, str]:
    old, new = 100 * before, 100 * after
    return name, f"{old:.2f} %", f"{new:.2f} %", f"{new - old:+.2f} points"
