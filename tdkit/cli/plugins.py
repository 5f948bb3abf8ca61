"""``tdkit plugins``: who provides what, and what failed."""

from __future__ import annotations

from tdkit.cli.options import Json


def plugins(json: Json = False) -> None:
    """List the installed plugins, what each provides, and what failed.

    Example: `tdkit plugins`
    """
    from tdkit.cli.display import stdout, table
    from tdkit.registry import load_registry

    registry = load_registry()
    if json:
        from tdkit.cli.common import file_json

        stdout().out(file_json([vars(provider) for provider in registry.providers]), end="")
        return
    view = table(None, "plugin", "version", "kind", "provides")
    for provider in registry.providers:
        kinds = {hook.removeprefix("tdkit_"): names for hook, names in provider.provides.items()}
        if provider.failure:
            kinds["failed"] = (provider.failure,)
        for row, (kind, names) in enumerate(kinds.items()):
            first = (provider.name, provider.version) if row == 0 else ("", "")
            style = "red" if kind == "failed" else None
            view.add_row(*first, kind, ", ".join(names), style=style)
    stdout().print(view)
