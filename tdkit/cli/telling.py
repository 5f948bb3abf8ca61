"""What several commands tell: plugins that are not used, tables of the library, notes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tdkit.api.compression import Compression
    from tdkit.tables import Table


def tell_unused_plugins() -> None:
    """Report the plugins that are not used, and why."""
    import tdkit
    from tdkit.cli.display import note

    for provider in tdkit.plugins().providers:
        if provider.failure:
            title = f"the plugin {provider.name} {provider.version}"
            note(f"{title} is not used: {provider.failure}")


def show_table(table: Table, title: str | None = None) -> None:
    """Print a table of the library, whole."""
    from tdkit.cli.display import show
    from tdkit.cli.display import table as view

    shown = view(title, *table.columns, right=tuple(table.right))
    for row in table.rows:
        shown.add_row(*row)
    show(shown)


def tell_notes(notes: Iterable[str]) -> None:
    """Tell on stderr what the user should know."""
    from tdkit.cli.display import note

    for text in notes:
        note(text)


def tell_compression(result: Compression, *, json: bool) -> None:
    """Print a compression that was written, as tables or as one JSON object, then its notes.

    Args:
        result: The compression.
        json: Whether to print JSON.
    """
    from tdkit.cli.display import remark, say, stdout
    from tdkit.cli.parsing import file_json

    file = result.written
    assert file is not None
    try:
        if json:
            stdout().out(file_json(result.to_json()), end="")
        else:
            if result.plan.moves:
                show_table(result.moves())
                say("")
            show_table(result.report.table())
            if result.remark is not None:
                say(f"\n{result.remark}")
            size = f"{file.path.stat().st_size / 1e6:.2f} MB"
            files = f"{file.path} ({file.format}, {size}), plan in {file.plan}"
            say(f"\nwrote {files}, {result.seconds:.0f} s in all")
        tell_notes(result.notes)
    except BaseException:
        remark(f"the model is written to {file.path} all the same")
        raise
