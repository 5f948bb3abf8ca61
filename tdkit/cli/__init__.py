"""The command line: thin commands over the library.

Only here typer, and rich but for the bar that :mod:`tdkit.progress` shows.
"""

from __future__ import annotations

import errno
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

import typer

from tdkit.cli.apply import apply
from tdkit.cli.compress import compress
from tdkit.cli.distill import distill
from tdkit.cli.finetune import finetune
from tdkit.cli.inspect import inspect
from tdkit.cli.plugins import plugins
from tdkit.cli.report import report
from tdkit.cli.score import score
from tdkit.cli.spelling import ShellSpelling
from tdkit.cli.stopping import StoppedError
from tdkit.cli.train import train
from tdkit.cli.validate import validate
from tdkit.errors import TdkitError, spelled
from tdkit.version import __version__

app = typer.Typer(
    name="tdkit",
    help="Compress trained PyTorch models with tensor decompositions.",
    epilog="Start with: tdkit compress garipov --budget 0.5",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _command(run: Callable[..., None]) -> None:
    """Add a command, named after its function, that leaves stdout to its results."""

    @wraps(run)
    def apart(**options: Any) -> None:
        from tdkit.cli.display import results_apart

        with results_apart(), spelled(ShellSpelling()):
            run(**options)

    app.command()(apart)


for command in (
    compress,
    inspect,
    score,
    apply,
    distill,
    finetune,
    train,
    validate,
    report,
    plugins,
):
    _command(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tdkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
    debug: bool = typer.Option(
        False, "--debug", help="Show tracebacks and warnings; may stand anywhere."
    ),
) -> None:
    """Compress trained PyTorch models with tensor decompositions."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with the status that fits what happened.

    Raises:
        SystemExit: Always, with that status.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    if not debug:
        warnings.simplefilter("ignore")
    try:
        app([argument for argument in arguments if argument != "--debug"])
    except StoppedError as stop:
        typer.echo(f"\nstopped; {stop.said}", err=True)
        raise SystemExit(128 + stop.number) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        _explain(error)
    raise SystemExit(0)


def _stop(number: int, _frame: Any) -> NoReturn:
    raise StoppedError(number)


def _explain(error: Exception) -> NoReturn:
    if isinstance(error, TdkitError):
        status, message, hint = error.exit_status, str(error), error.hint
    elif _is_out_of_memory(error):
        status, message = 1, "out of memory"
        hint = "try a smaller --batch-size or --input-shape, fewer --methods, or --device cpu"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        # Files are the library's to explain; what is left is standard output.
        status, message = 6, "standard output cannot be written: there is no room left"
        hint = "free some space where it goes to"
    else:
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        status, message = 1, f"unexpected {type(error).__name__}: {first}"
        hint = "run it again with --debug for the traceback, and report it"
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(message, err=True)
    if hint:
        typer.echo(f"hint: {hint}", err=True)
    raise SystemExit(status)


def _is_out_of_memory(error: Exception) -> bool:
    # torch has a class for the GPU's memory; for the computer's it raises a RuntimeError.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(sign in str(error) for sign in ("can't allocate memory", "Storage size calculation"))
