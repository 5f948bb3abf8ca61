"""``tdkit plugins``: who provides what, and what failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tdkit.cli.options import Json

if TYPE_CHECKING:
    from tdkit.registry import Provider, Registry

_FEW = 12


def plugins(json: Json = False) -> None:
    """List the installed plugins, what each provides, and what failed.

    Example: `tdkit plugins`
    """
    import tdkit
    from tdkit.cli.display import stdout
    from tdkit.cli.parsing import file_json

    registry = tdkit.plugins()
    if json:
        value = {"plugins": [vars(provider) for provider in registry.providers]}
        stdout().out(file_json(value), end="")
        return
    for number, provider in enumerate(registry.providers):
        _print(provider, registry, first=number == 0)


def _print(provider: Provider, registry: Registry, *, first: bool) -> None:
    from tdkit.cli.display import say, show, table

    say(f"{'' if first else chr(10)}{provider.name} {provider.version}")
    if provider.failure:
        say(f"  not used: {provider.failure}")
        return
    view = table(None, "", "", "", "")
    view.show_header = False
    for hook, names in provider.provides.items():
        kind = hook.removeprefix("tdkit_")
        records = getattr(registry, kind)
        # Eighty summaries of architectures say less than their names.
        rows = [(name, _summary(records[name])) for name in names]
        if len(names) > _FEW:
            rows = [(f"{len(names)} names", ", ".join(names))]
        for row, (name, summary) in enumerate(rows):
            view.add_row("", "" if row else kind, name, summary)
    show(view)


def _summary(record: Any) -> str:
    limit = getattr(record, "default", 1.0)
    if limit == 0:
        return f"{record.summary}; only if named"
    return f"{record.summary}{'' if limit >= 1 else f'; unless named, up to keep {limit:g}'}"
