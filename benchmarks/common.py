"""What the benchmark programs share: child processes, timing, Markdown and the machine.

Nothing here imports torch, so that a program which only starts others stays small and quick.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from typing import TypeVar

T = TypeVar("T")

MIB = 2**20
PACKAGES = ("torch", "tensorly", "tensorly-torch")


@dataclass(frozen=True)
class Usage:
    """What a child process took.

    Attributes:
        seconds: Wall time from its start to its end.
        cpu_seconds: Processor time, of all its threads.
        peak_bytes: The most memory that it had in use at once.
        status: Its exit status; -9 when it ran past its limit.
        output: What it printed, stderr included.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    status: int
    output: str


def run_child(command: Sequence[str], limit: float = 500.0) -> Usage:
    """Run a command to its end and measure it.

    A process inherits the peak memory of the one that starts it, so a small one stands between.

    Args:
        command: The program and its arguments.
        limit: Seconds after which it is ended.
    """
    between = [sys.executable, "-I", str(Path(__file__)), str(limit), *command]
    done = subprocess.run(between, stdout=subprocess.PIPE, text=True, check=True)
    return Usage(**json.loads(done.stdout))


def demand(usage: Usage, command: str) -> Usage:
    """The same usage.

    Raises:
        SystemExit: If the child failed.
    """
    if usage.status != 0:
        raise SystemExit(f"{command} ended with status {usage.status}: {usage.output.strip()}")
    return usage


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Wall seconds of one call, and what it returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """The median wall time of several calls after a first one that does not count."""
    work()
    return median(timed(work)[0] for _ in range(repeats))


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every program takes; the description is the first line of a docstring."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the program out")
    return parser


def header(*titles: str) -> None:
    """Print the head of a Markdown table."""
    row(*titles)
    print("|" + "---|" * len(titles), flush=True)


def row(*cells: object) -> None:
    """Print one row of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def ratio(slow: float, fast: float) -> str:
    """How many times faster, for a table."""
    return f"{slow / fast:.1f}×"


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def show_profile(name: str, work: Callable[[], object], most: int = 8) -> None:
    """Print the operators of torch that take the most time of their own, in a second run."""
    from torch.profiler import ProfilerActivity, profile

    work()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        seconds, _ = timed(work)
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    print(f"\n### Where the time goes in {name} ({seconds:.3f} s)\n")
    header("operator", "calls", "own time, ms", "share")
    total = sum(event.self_cpu_time_total for event in events)
    for event in events[:most]:
        taken = event.self_cpu_time_total
        row(f"`{event.key}`", event.count, f"{taken / 1e3:.1f}", f"{100 * taken / total:.0f} %")


def threads() -> str:
    """How many threads torch uses within an operation."""
    import torch

    return plural(torch.get_num_threads(), "thread")


def machine() -> str:
    """The processor, its cores that this process may use, and the memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{_processor()}, {plural(_cores(), 'core')}, {memory:.0f} GiB of memory"


def versions() -> str:
    """Python and the packages that are compared."""
    return ", ".join([f"Python {platform.python_version()}", *map(_installed, PACKAGES)])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    # macOS does not say which cores a process may use.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} is not installed"


def _measured(limit: float, command: Sequence[str]) -> Usage:
    with TemporaryFile() as captured:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=captured, stderr=subprocess.STDOUT)
        clock = threading.Timer(limit, child.kill)
        clock.start()
        # Unlike Popen.wait, this tells what this one child used.
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        clock.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
        captured.seek(0)
        output = captured.read().decode(errors="replace")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = used.ru_maxrss * unit
    return Usage(seconds, used.ru_utime + used.ru_stime, peak, child.returncode, output)


if __name__ == "__main__":
    print(json.dumps(asdict(_measured(float(sys.argv[1]), sys.argv[2:]))))
