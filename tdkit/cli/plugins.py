"""``tdkit plugins``: who provides what, and what failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdkit.cli.options import Json

if TYPE_CHECKING:
    from tdkit.api.plugins import Plugins
    from tdkit.registry import Provider


def plugins(json: Json = False) -> None:
    """List the installed plugins, what each provides, and what failed.

    Example: `tdkit plugins`
    """
    import tdkit
    from tdkit.cli.display import stdout
    from tdkit.cli.parsing import file_json

    found = tdkit.plugins()
    if json:
        stdout().out(file_json(found.to_json()), end="")
        return
    for number, provider in enumerate(found.providers):
        _print(provider, found, first=number == 0)


def _print(provider: Provider, found: Plugins, *, first: bool) -> None:
    from tdkit.cli.display import say, show, table

    say(f"{'' if first else chr(10)}{provider.name} {provider.version}")
    if provider.failure:
        say(f"  not used: {provider.failure}")
        return
    view = table(None, "", "", "", "")
    view.show_header = False
    for row in found.table(provider).rows:
        view.add_row("", *row)
    show(view)
