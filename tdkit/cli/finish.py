"""The end that ``compress`` and ``apply`` share: measure, write, tell."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tdkit.errors import UsageError

if TYPE_CHECKING:
    from tdkit.cli.common import Opened
    from tdkit.compression import Compression
    from tdkit.datasets.base import Split
    from tdkit.reports import Report

_SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "pt2": ".pt2"}


@dataclass(frozen=True)
class Destination:
    """Where the compressed model and its plan go.

    Attributes:
        path: The model file.
        format: One of :data:`tdkit.checkpoint.FORMATS`.
        force: Whether existing files are replaced.
        source: The input, which is never overwritten.
    """

    path: Path
    format: str
    force: bool
    source: str

    @property
    def plan(self) -> Path:
        """The plan file beside the model."""
        return self.path.with_name(self.path.stem + ".plan.json")

    @classmethod
    def of(
        cls,
        opened: Opened,
        output: Path | None,
        default: str,
        format: str | None,
        force: bool,
        source: str,
    ) -> Destination:
        """Settle path and format, and refuse early what could not be written at the end."""
        from tdkit.checkpoint import FORMATS, check_writable, default_format

        if format is not None and format not in FORMATS:
            raise UsageError(f"unknown format {format!r}", f"it is one of {', '.join(FORMATS)}")
        format = format or default_format(opened.loaded, output)
        path = output or Path(default + _SUFFIXES.get(format, ".pt"))
        if format in ("onnx", "pt2") and opened.shape is None:
            raise UsageError(
                f"exporting to {format} runs the model, and the shape of its input is unknown",
                "give it with --input-shape, such as 3,224,224",
            )
        result = cls(path, format, force, source)
        for target in (result.path, result.plan):
            check_writable(target, force=force, inputs=[source])
        return result


def finish(
    opened: Opened,
    result: Compression,
    destination: Destination,
    *,
    test: Split | None,
    batch: int,
    start: float,
    json: bool,
) -> None:
    """Measure the compressed model, write it with its plan, and print the report."""
    from tdkit.cli.common import file_json
    from tdkit.cli.display import stderr, stdout
    from tdkit.reports import measure, summary

    with stderr().status("measuring"):
        report = measure(opened.model, result, inputs=opened.inputs(batch), test=test)
    _write(opened, result, destination)
    if json:
        value = summary(
            report,
            result,
            seconds=time.perf_counter() - start,
            output=str(destination.path),
            plan=str(destination.plan),
        )
        stdout().out(file_json(value), end="")
        return
    _print(result, report)
    remark = f"{destination.path} ({destination.format}), plan in {destination.plan}"
    stdout().print(f"\nwrote {remark}, {time.perf_counter() - start:.0f} s in all")
    for note in (*opened.loaded.notes, *_remarks(result)):
        stderr().print(f"note: {note}")


def _write(opened: Opened, result: Compression, destination: Destination) -> None:
    from tdkit.checkpoint import atomic_write, save_model
    from tdkit.cli.common import file_json

    plan = result.plan.to_json()
    save_model(
        result.model,
        destination.path,
        format=destination.format,
        force=destination.force,
        inputs=[destination.source],
        plan=plan,
        structure=result.structure,
        arch=opened.loaded.arch,
        input_shape=opened.shape,
        arch_options=opened.loaded.arch_options,
    )
    with atomic_write(destination.plan, force=destination.force, inputs=[]) as temporary:
        temporary.write_text(file_json(plan), encoding="utf-8")


def _remarks(result: Compression) -> list[str]:
    remarks = [f"{name} was put back: {reason}" for name, reason in result.put_back.items()]
    if not result.verified:
        remarks.append("not verified and not timed: that takes --input-shape, such as 3,224,224")
    return remarks


def _print(result: Compression, report: Report) -> None:
    from tdkit.cli.display import number, percent, rank_text, stdout, table

    console = stdout()
    numbers = ("parameters", "→", "kept", "error")
    view = table(None, "layer", "method", "rank", *numbers, right=numbers)
    details = {candidate.layer: candidate for candidate in result.plan.candidates}
    sizes = {layer.name: layer.parameters for layer in result.layers}
    for move in result.plan.moves:
        before = sizes[move.layer]
        after = sum(stage.parameters for stage in result.structure[move.layer])
        known = details.get(move.layer)
        errors = "–" if known is None else f"{next(iter(known.errors.values())):.4f}"
        row = (number(before), number(after), percent(after, before), errors)
        view.add_row(move.layer, move.method, rank_text(move.rank), *row)
    console.print(view)
    console.print()
    columns = ("before", "after", "ratio")
    totals = table(None, "", *columns, right=columns)
    for row in _totals(report):
        totals.add_row(*row)
    console.print(totals)


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
    rows.append(("file size", *sizes, percent(after, before)))
    if (latency := report.latency) is not None:
        dense, small = latency.milliseconds
        where = f"batch {latency.batch}, {latency.threads} threads, {latency.device}"
        times = f"{dense:.1f} ms", f"{small:.1f} ms"
        rows.append((f"latency ({where})", *times, f"{dense / small:.2f}× as fast"))
    if report.accuracy is not None:
        old, new = (100 * value for value in report.accuracy)
        change = f"{new - old:+.2f} points"
        images = f"accuracy ({number(report.images)} images)"
        rows.append((images, f"{old:.2f} %", f"{new:.2f} %", change))
    return rows
