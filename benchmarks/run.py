"""Run the benchmark programs one after the other and write what they print to RESULTS.md.

    python benchmarks/run.py [NAME ...]

With names only those run, and the other sections of the file stay. Each program is a process of
its own with a time limit. A program that fails says so in its section and makes the exit status 1;
a timing never does.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from common import machine, options, versions

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "RESULTS.md"
LIMIT = 600.0
HEADING = "## "

# Where rows of one layer each wait for their sum.
ROWS = "--rows build/measuring-garipov.json"


@dataclass(frozen=True)
class Program:
    """A section of the results, and what makes it.

    Attributes:
        name: What selects it on the command line.
        title: The section's heading.
        arguments: The file in this folder, and its arguments.
        limit: Seconds after which it is ended.
    """

    name: str
    title: str
    arguments: str
    limit: float = LIMIT

    @property
    def command(self) -> str:
        """How to reproduce the section."""
        return f"python benchmarks/{self.arguments}"


@dataclass(frozen=True)
class Outcome:
    """What a program printed, how long it took, and what went wrong, if anything did."""

    seconds: float
    output: str
    failure: str | None


PROGRAMS = (
    Program("scoring", "1. Scoring: every rank from one preparation", "scoring.py"),
    Program("cp", "2. CP by ALS", "cp.py"),
    Program("grid", "3. The default grid", "grid.py"),
    Program(
        "measuring-garipov",
        "4. Measuring: GaripovNet",
        "measuring.py --model garipov --images 400",
    ),
    Program(
        "measuring-resnet18",
        "4. Measuring: ResNet-18",
        "measuring.py --model resnet18-cifar --images 500 --repeats 1",
    ),
    *(
        Program(
            f"measuring-{layer}",
            f"4. Measuring: GaripovNet on 10,000 images, {layer}",
            f"measuring.py --images 10000 --repeats 1 --layer {layer} {ROWS}",
        )
        for layer in ("conv2", "conv3", "conv4", "conv5", "conv6")
    ),
    Program("layouts", "4. Measuring: memory layouts", "layouts.py"),
    Program("replaying", "4. Measuring: where the time goes", "replaying.py"),
    Program("latency", "5. Latency of the compressed model", "latency.py"),
    Program("machine", "6. How close to the machine", "machine.py"),
    Program("linear", "7. A large Linear", "linear.py"),
    *(
        Program(
            f"memory-{name}",
            f"8. Memory above the model: {name}",
            f"memory.py --model {name}",
            limit=2 * LIMIT,  # five processes
        )
        for name in ("embedding", "head", "resnet50")
    ),
)


def main() -> None:
    given = arguments()
    chosen = [p for p in PROGRAMS if not given.names or p.name in given.names]
    failed = []
    for program in chosen:
        print(f"{program.name}: {program.command}", file=sys.stderr, flush=True)
        outcome = run(program, given.quick)
        failed += [f"{program.name} {outcome.failure}"] if outcome.failure else []
        sections = {**read(given.output), program.title: section(program, outcome)}
        given.output.write_text(document(sections), encoding="utf-8")
        print(f"  {outcome.failure or 'done'}, {outcome.seconds:.0f} s", file=sys.stderr)
    if failed:
        raise SystemExit("; ".join(failed))


def arguments() -> argparse.Namespace:
    parser = options(__doc__)
    names = [program.name for program in PROGRAMS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--output", type=Path, help="instead of benchmarks/RESULTS.md")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(names))
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}: choose from {', '.join(names)}")
    if given.quick and given.output is None:
        parser.error("a quick run measures nothing of use: give it an --output of its own")
    given.output = given.output or RESULTS
    return given


def run(program: Program, quick: bool) -> Outcome:
    """Run a program in a process group of its own, which is ended when its time is up."""
    file, *rest = program.arguments.split()
    command = [sys.executable, str(FOLDER / file), *rest, *(["--quick"] if quick else [])]
    start = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        start_new_session=True,
    ) as child:
        try:
            output, errors = child.communicate(timeout=program.limit)
            failure = failure_of(child.returncode, errors)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            output, _ = child.communicate()
            failure = f"was ended after {program.limit:.0f} s"
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
    return Outcome(time.perf_counter() - start, output, failure)


def failure_of(status: int, errors: str) -> str | None:
    if status == 0:
        return None
    last = errors.strip().splitlines()[-1:] or ["it said nothing"]
    return f"failed with status {status}: {last[0]}"


def section(program: Program, outcome: Outcome) -> str:
    """What follows the heading."""
    when = f"{outcome.seconds:.0f} s in all, on {date.today().isoformat()}"
    lines = ["```sh", program.command, "```", "", f"{when}; {machine()}.", ""]
    if outcome.failure:
        lines += [f"**This program {outcome.failure}.** What it printed until then:", ""]
    return "\n".join([*lines, outcome.output.strip()])


def read(path: Path) -> dict[str, str]:
    """The sections of a file of results by title; none if there is no file."""
    if not path.exists():
        return {}
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(HEADING):
            lines = found.setdefault(line.removeprefix(HEADING), [])
        else:
            lines.append(line)
    return {title: "\n".join(lines).strip() for title, lines in found.items()}


def document(sections: Mapping[str, str]) -> str:
    """The whole file; sections of programs that are no more are left out."""
    found = [f"{HEADING}{p.title}\n\n{sections[p.title]}" for p in PROGRAMS if p.title in sections]
    return "\n\n".join([*preface(), *found]) + "\n"


def preface() -> Sequence[str]:
    return (
        "# What the benchmarks measured",
        "`make bench` writes this file: it runs the programs beside it one after the other, and"
        " each section has the command that reproduces it. Nothing else should run meanwhile.",
        f"- Machine: {machine()}\n- Versions: {versions()}\n- Last run: {date.today().isoformat()}",
    )


if __name__ == "__main__":
    main()
