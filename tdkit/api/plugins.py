"""``tdkit.plugins``: who provides what, and what failed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from tdkit.registry import Provider, Registry, load_registry
from tdkit.tables import Table

_FEW = 12


@dataclass(frozen=True)
class Plugins:
    """The plugins that are installed.

    Attributes:
        registry: Everything that can be named, by kind and name.
    """

    registry: Registry

    @property
    def providers(self) -> tuple[Provider, ...]:
        """Tdkit itself, then the plugins, and those that failed."""
        return self.registry.providers

    def __str__(self) -> str:
        """What ``tdkit plugins`` prints."""
        return "\n\n".join(f"{title(p)}\n{p.failure or self.table(p)}" for p in self.providers)

    def _repr_html_(self) -> str:
        return "".join(self._html(provider) for provider in self.providers)

    def _html(self, provider: Provider) -> str:
        failure, table = provider.failure, self.table(provider)
        return f"<p>{title(provider)}</p>{escape(failure) if failure else table._repr_html_()}"

    def table(self, provider: Provider) -> Table:
        """A row for each name that a plugin provides; of many of one kind their names alone."""
        rows = [row for hook in provider.provides for row in self._rows(provider, hook)]
        return Table(("kind", "name", "summary"), tuple(rows))

    def _rows(self, provider: Provider, hook: str) -> Iterator[tuple[str, str, str]]:
        kind, names = hook.removeprefix("tdkit_"), provider.provides[hook]
        if len(names) > _FEW:
            # Eighty summaries of architectures say less than their names.
            yield kind, f"{len(names)} names", ", ".join(names)
            return
        records = getattr(self.registry, kind)
        for number, name in enumerate(names):
            yield "" if number else kind, name, _summary(records[name])

    def to_json(self) -> dict[str, Any]:
        """The plugins as JSON values."""
        return {"plugins": [vars(provider) for provider in self.providers]}


def title(provider: Provider) -> str:
    """A plugin's name and version."""
    return f"{provider.name} {provider.version}"


def plugins() -> Plugins:
    """Everything that can be named, the plugins that it comes from, and those that failed.

    Raises:
        UsageError: If two plugins claim one name; the message names both.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return Plugins(load_registry())


def _summary(record: Any) -> str:
    limit = getattr(record, "default", 1.0)
    if limit == 0:
        return f"{record.summary}; only if named"
    return f"{record.summary}{'' if limit >= 1 else f'; unless named, up to keep {limit:g}'}"
