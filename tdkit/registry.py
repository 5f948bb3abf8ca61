"""Loads plugins, checks what they provide and answers look-ups. Nothing else uses pluggy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, TypeVar

import pluggy

from tdkit import hookspecs
from tdkit.errors import UsageError
from tdkit.hookspecs import (
    DatasetRecord,
    DecompositionRecord,
    MetricRecord,
    ModelRecord,
    PlannerRecord,
    Record,
)

_BUILTINS = ("decompositions", "metrics", "models", "datasets", "planners")
_NAME = re.compile(r"[a-z0-9-]+")

_R = TypeVar("_R", bound=Record)


@dataclass(frozen=True)
class Provider:
    """A plugin that was found.

    Attributes:
        name: Its distribution, or ``tdkit`` for the built-ins.
        version: The distribution's version.
        provides: The names it registered, by hook.
        failure: Why it, or a part of it, is not used; None when all is well.
    """

    name: str
    version: str
    provides: Mapping[str, tuple[str, ...]]
    failure: str | None = None


@dataclass(frozen=True)
class Registry:
    """Everything that can be named, by kind and name.

    Attributes:
        decompositions: The methods.
        metrics: The approximation errors.
        models: The architectures.
        datasets: The data sets.
        planners: The planners.
        providers: The plugins they come from, and those that failed.
    """

    decompositions: Mapping[str, DecompositionRecord]
    metrics: Mapping[str, MetricRecord]
    models: Mapping[str, ModelRecord]
    datasets: Mapping[str, DatasetRecord]
    planners: Mapping[str, PlannerRecord]
    providers: tuple[Provider, ...]


def lookup(records: Mapping[str, _R], name: str, kind: str) -> _R:
    """The record of a name; underscores count as hyphens.

    Raises:
        UsageError: Naming the close names when there is no such record.
    """
    import difflib

    record = records.get(name) or records.get(name.replace("_", "-"))
    if record is None:
        close = difflib.get_close_matches(name, records, n=3, cutoff=0.5) or sorted(records)[:8]
        raise UsageError(f"no {kind} named {name!r}", f"known: {', '.join(close)}")
    return record


def load_registry(plugins: Iterable[EntryPoint] | None = None) -> Registry:
    """Load the built-ins and every installed plugin.

    A plugin that fails to import, has a misspelt hook, returns the wrong type or a wrong name is
    left out with its reason in ``providers``; everything else goes on.

    Args:
        plugins: The entry points to load; by default those of the group ``tdkit``.

    Raises:
        UsageError: If two providers claim one name; the message names both.
    """
    manager = pluggy.PluginManager("tdkit")
    manager.add_hookspecs(hookspecs)
    loaded = [_builtin(manager)]
    for entry in entry_points(group="tdkit") if plugins is None else plugins:
        loaded.append(_plugin(manager, entry))
    tables: dict[str, dict[str, Record]] = {hook: {} for hook in hookspecs.HOOKS}
    owners: dict[tuple[str, str], str] = {}
    for provider, records in loaded:
        for hook, record in records:
            other = owners.setdefault((hook, record.name), provider.name)
            if record.name in tables[hook]:
                kind = hook.removeprefix("tdkit_")
                raise UsageError(
                    f"two plugins provide {record.name!r} among the {kind}:"
                    f" {other} and {provider.name}",
                    f"uninstall one of them: pip uninstall {provider.name}",
                )
            tables[hook][record.name] = record
    frozen: Any = {
        hook.removeprefix("tdkit_"): MappingProxyType(table) for hook, table in tables.items()
    }
    return Registry(**frozen, providers=tuple(provider for provider, _ in loaded))


_Records = list[tuple[str, Record]]


def _builtin(manager: pluggy.PluginManager) -> tuple[Provider, _Records]:
    from tdkit import __version__

    records: _Records = []
    for name in _BUILTINS:
        module = import_module(f"tdkit.{name}")
        manager.register(module)
        records += _collect(manager, module)
    return Provider("tdkit", __version__, _by_hook(records)), records


def _plugin(manager: pluggy.PluginManager, entry: EntryPoint) -> tuple[Provider, _Records]:
    name = entry.dist.name if entry.dist else entry.name
    version = entry.dist.version if entry.dist else "unknown"
    plugin = None
    try:
        plugin = entry.load()
        manager.register(plugin)
        _refuse_misspelt(manager, plugin)
        records = _collect(manager, plugin)
    except Exception as error:  # a plugin may fail in any way; the others must not
        # pluggy keeps a plugin registered whose validation failed.
        if plugin is not None and manager.is_registered(plugin):
            manager.unregister(plugin)
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        return Provider(name, version, {}, f"{type(error).__name__}: {reason}"), []
    return Provider(name, version, _by_hook(records)), records


def _refuse_misspelt(manager: pluggy.PluginManager, plugin: Any) -> None:
    callers = manager.get_hookcallers(plugin) or []
    unknown = [caller.name for caller in callers if not caller.has_spec()]
    if unknown:
        known = ", ".join(hookspecs.HOOKS)
        raise UsageError(f"no hook is called {', '.join(unknown)}; the hooks are {known}")


def _collect(manager: pluggy.PluginManager, plugin: Any) -> _Records:
    records: _Records = []
    for hook, expected in hookspecs.HOOKS.items():
        others = [p for p in manager.get_plugins() if p is not plugin]
        for returned in manager.subset_hook_caller(hook, others)():
            records += [(hook, record) for record in _checked(returned, hook, expected)]
    return records


def _checked(returned: Any, hook: str, expected: type[Record]) -> Iterator[Record]:
    if not isinstance(returned, list):
        raise TypeError(f"{hook} returned a {type(returned).__name__}, not a list")
    for record in returned:
        if not isinstance(record, expected):
            raise TypeError(
                f"{hook} returned a {type(record).__name__} where a {expected.__name__} belongs"
            )
        if not _NAME.fullmatch(record.name):
            raise ValueError(f"{hook}: the name {record.name!r} does not match [a-z0-9-]+")
        yield record


def _by_hook(records: _Records) -> dict[str, tuple[str, ...]]:
    return {
        hook: tuple(record.name for h, record in records if h == hook)
        for hook in hookspecs.HOOKS
        if any(h == hook for h, _ in records)
    }
