"""``tdkit.plugins``: who provides what, and what failed."""

from __future__ import annotations

import warnings

from tdkit.registry import Registry, load_registry


def plugins() -> Registry:
    """Everything that can be named, the plugins that it comes from, and those that failed.

    Raises:
        UsageError: If two plugins claim one name; the message names both.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return load_registry()
