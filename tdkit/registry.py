"""Loads plugins, checks what they provide and answers look-ups. Nothing else uses pluggy."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from tdkit import builtin, hookspecs
from tdkit.errors import UsageError, option
from tdkit.hookspecs import (
    CostRecord,
    DatasetRecord,
    DecompositionRecord,
    MetricRecord,
    ModelRecord,
    PlannerRecord,
    Record,
    StageRecord,
)
from tdkit.version import __version__

if TYPE_CHECKING:
    from tdkit.decompositions.base import Decomposition
    from tdkit.layers.stages import Stage
    from tdkit.metrics.base import Metric

_NAME = re.compile(r"[a-z0-9-]+")
_FEW = 12

_R = TypeVar("_R", bound=Record)


@dataclass(frozen=True)
class Provider:
    """A plugin that was found.

    Attributes:
        name: Its distribution, or ``tdkit`` for the built-ins.
        version: The distribution's version.
        provides: The names it registered, by hook.
        failure: Why nothing of it is used; None when all is well.
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
        costs: What a budget may bound.
        models: The architectures.
        datasets: The data sets.
        planners: The planners.
        stages: The kinds of stages that factorizations are chained of.
        providers: The plugins they come from, and those that failed.
    """

    decompositions: Mapping[str, DecompositionRecord]
    metrics: Mapping[str, MetricRecord]
    costs: Mapping[str, CostRecord]
    models: Mapping[str, ModelRecord]
    datasets: Mapping[str, DatasetRecord]
    planners: Mapping[str, PlannerRecord]
    stages: Mapping[str, StageRecord]
    providers: tuple[Provider, ...]

    def versions(self, records: Iterable[Record]) -> dict[str, str]:
        """The version of each plugin that some records come from, by its distribution.

        The built-ins are left out: their version is tdkit's.
        """
        wanted = {
            (hook, record.name)
            for record in records
            for hook, kind in hookspecs.HOOKS.items()
            if isinstance(record, kind)
        }
        return {
            plugin.name: plugin.version
            for plugin in self.providers
            if plugin.name != "tdkit"
            and wanted & {(hook, name) for hook, names in plugin.provides.items() for name in names}
        }


class _RefusedError(Exception):
    """A plugin that breaks the contract; the message says how."""


def lookup(records: Mapping[str, _R], name: str, kind: str) -> _R:
    """The record of a name; underscores count as hyphens, and case does not matter.

    Raises:
        UsageError: Naming the close names when there is no such record.
    """
    if not isinstance(name, str):
        raise UsageError(f"a {kind} is named by a string, not by {name!r}")
    canonical = name.strip().lower().replace("_", "-")
    record = records.get(name) or records.get(canonical)
    if record is None:
        close = difflib.get_close_matches(canonical, records, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        if len(records) <= _FEW:
            hint += f"known: {', '.join(records)}"
        else:
            hint += "tdkit plugins lists them all"
        raise UsageError(f"no {kind} named {name!r}", hint)
    return record


def load_registry(plugins: Iterable[EntryPoint] | None = None) -> Registry:
    """Load the built-ins and every installed plugin.

    A plugin that fails to import, has a misspelt hook, returns the wrong type or a wrong name is
    left out as a whole, with a RuntimeWarning and its reason in ``providers``; everything else
    goes on.

    Args:
        plugins: The entry points to load; by default those of the group ``tdkit``.

    Raises:
        UsageError: If two providers claim one name; the message names both.
    """
    manager = pluggy.PluginManager("tdkit")
    manager.add_hookspecs(hookspecs)
    loaded = [_builtin(manager)]
    for entry in entry_points(group="tdkit") if plugins is None else plugins:
        provider, records = _plugin(manager, entry)
        loaded.append((provider, records))
        if provider.failure:
            message = f"the plugin {provider.name} {provider.version} is not used"
            warnings.warn(f"{message}: {provider.failure}", RuntimeWarning, stacklevel=2)
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
    manager.register(builtin)
    records = _collect(manager, builtin)
    return Provider("tdkit", __version__, _by_hook(records)), records


def _plugin(manager: pluggy.PluginManager, entry: EntryPoint) -> tuple[Provider, _Records]:
    name = entry.dist.name if entry.dist else entry.name
    version = entry.dist.version if entry.dist else "unknown"
    plugin = None
    try:
        plugin = entry.load()
        manager.register(plugin)
        _check_hooks(manager, plugin)
        records = _collect(manager, plugin)
    except (Exception, SystemExit) as error:  # it may fail in any way; the others must not
        # pluggy may keep a plugin registered whose validation failed.
        if plugin is not None and manager.is_registered(plugin):
            manager.unregister(plugin)
        return Provider(name, version, {}, _reason(error)), []
    return Provider(name, version, _by_hook(records)), records


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    if isinstance(error, _RefusedError | pluggy.PluginValidationError):
        return " ".join(line.strip() for line in lines)
    return f"{type(error).__name__}: {lines[0]}"


def _check_hooks(manager: pluggy.PluginManager, plugin: Any) -> None:
    callers = manager.get_hookcallers(plugin) or []
    if not callers:
        raise _RefusedError("it implements no hook; is @hookimpl missing above its functions?")
    for caller in callers:
        # pluggy accepts any name until check_pending().
        if not caller.has_spec():
            close = difflib.get_close_matches(caller.name, hookspecs.HOOKS, n=1, cutoff=0)
            raise _RefusedError(f"there is no hook {caller.name}; did you mean {close[0]}?")


def _collect(manager: pluggy.PluginManager, plugin: Any) -> _Records:
    records: _Records = []
    for hook, expected in hookspecs.HOOKS.items():
        others = [p for p in manager.get_plugins() if p is not plugin]
        for returned in manager.subset_hook_caller(hook, others)():
            records += [(hook, record) for record in _checked(returned, hook, expected)]
    return records


def _checked(returned: Any, hook: str, expected: type[Record]) -> Iterator[Record]:
    if not isinstance(returned, list):
        raise _RefusedError(f"{hook} returned a {type(returned).__name__}, not a list")
    names = set()
    for record in returned:
        if not isinstance(record, expected):
            kind = type(record).__name__
            raise _RefusedError(f"{hook} returned a {kind} where a {expected.__name__} belongs")
        if not isinstance(record.name, str) or not _NAME.fullmatch(record.name):
            raise _RefusedError(f"{hook}: the name {record.name!r} does not match [a-z0-9-]+")
        if not callable(record.create):
            raise _RefusedError(f"{hook}: create of {record.name!r} cannot be called")
        if record.name in names:
            raise _RefusedError(f"{hook} returned two records named {record.name!r}")
        names.add(record.name)
        yield record


def _by_hook(records: _Records) -> dict[str, tuple[str, ...]]:
    return {
        hook: tuple(record.name for h, record in records if h == hook)
        for hook in hookspecs.HOOKS
        if any(h == hook for h, _ in records)
    }


def resolve_methods(
    registry: Registry,
    names: Sequence[str] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    planned: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Decomposition]:
    """Decompositions by name; without names, those that are meant to be used by default.

    Args:
        registry: Everything that can be named.
        names: Of methods.
        settings: By the name of a method, keywords of its constructor.
        planned: Those of a plan, which hold where ``settings`` says nothing else.

    Raises:
        UsageError: If a name is unknown or not among those, or a setting does not fit its method.
    """
    from tdkit.decompositions.settings import by_method, create

    records, planned = registry.decompositions, planned or {}
    chosen = [n for n, record in records.items() if record.default] if names is None else names
    found = {r.name: r for r in (lookup(records, name, "method") for name in chosen)}
    given = {lookup(records, n, "method").name: each for n, each in by_method(settings).items()}
    for name in given:
        if name not in found:
            raise UsageError(
                f"there are settings for {name}, which is not among the methods",
                f"name it with {option('methods')}, or leave them out",
            )
    merged = {name: {**planned.get(name, {}), **given.get(name, {})} for name in found}
    return {name: create(record, merged[name]) for name, record in found.items()}


def method_limits(registry: Registry, names: Sequence[str] | None = None) -> dict[str, float]:
    """The largest keep at which each method is considered: none for what the user names."""
    if names is not None:
        return {}
    return {name: record.default for name, record in registry.decompositions.items()}


def resolve_metrics(registry: Registry, names: Sequence[str]) -> list[Metric]:
    """Metrics by name.

    Raises:
        UsageError: If a name is unknown.
    """
    return [lookup(registry.metrics, name, "metric").create() for name in names]


def method_versions(registry: Registry, names: Iterable[str]) -> dict[str, str]:
    """The versions of tdkit and of the plugins that some methods come from, by distribution."""
    records = [registry.decompositions[name] for name in names]
    return {"tdkit": __version__, **registry.versions(records)}


def resolve_stages(registry: Registry) -> dict[str, type[Stage]]:
    """The classes of stages by what stands for them in model files: the list that readers take.

    A class that cannot be made is left out, with a RuntimeWarning: no model but its own needs it.

    Raises:
        UsageError: If two records claim one kind; the message names both.
    """
    result: dict[str, type[Stage]] = {}
    owners: dict[str, str] = {}
    for record in registry.stages.values():
        try:
            cls = record.create()
        except Exception as error:  # a plugin may fail in any way; the others must not
            message = f"the stage {record.name} is not used: {_reason(error)}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            continue
        for kind in cls.kinds:
            other = owners.setdefault(kind, record.name)
            if other != record.name:
                raise UsageError(
                    f"two kinds of stages stand as {kind!r} in model files: {other} and"
                    f" {record.name}",
                    "uninstall the plugin that provides one of them; tdkit plugins names it",
                )
            result[kind] = cls
    return result
