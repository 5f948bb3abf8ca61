"""HTML from Python, where text is escaped unless it says that it is markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: str | int | bool | None) -> Markup:
    """Make an element.

    Args:
        name: Of the element.
        children: Escaped unless they are :class:`Markup`; None is left out.
        attributes: ``class_`` stands for class and ``data_x`` for data-x. True gives the bare name;
            None and False leave the attribute out.
    """
    opened = name + "".join(_attribute(key, value) for key, value in attributes.items())
    if name in ("meta", "link", "br", "input"):
        return Markup(f"<{opened}>")
    return Markup(f"<{opened}>{join(children)}</{name}>")


def join(children: Iterable[str | None]) -> Markup:
    """Put children one after the other, escaped unless they are :class:`Markup`."""
    return Markup("".join(escaped(child) for child in children if child is not None))


def escaped(text: str) -> Markup:
    """Text as markup."""
    return text if isinstance(text, Markup) else Markup(html.escape(text))


def css(variable: str) -> str:
    """The value of a variable of the page's style sheet, such as ``var(--ink)``."""
    return f"var(--{variable})"


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[str] = ()
) -> Markup:
    """A table whose first column heads its rows, and that scrolls on its own where it is too wide.

    Args:
        caption: What it shows.
        head: Names of the columns.
        rows: Cells.
        words: The columns that hold words; the others hold numbers and are aligned right.
    """
    kinds = [
        "words" if name in words or place == 0 else "number" for place, name in enumerate(head)
    ]
    columns = [
        tag("th", name, scope="col", class_=kind) for name, kind in zip(head, kinds, strict=True)
    ]
    lines = [
        tag(
            "tr",
            tag("th", row[0], scope="row", class_="words"),
            *(tag("td", cell, class_=kind) for cell, kind in zip(row[1:], kinds[1:], strict=True)),
        )
        for row in rows
    ]
    inner = tag(
        "table",
        tag("caption", tag("span", caption)),
        tag("thead", tag("tr", *columns)),
        tag("tbody", *lines),
    )
    # Focusable, so that a keyboard can scroll it.
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _attribute(key: str, value: str | int | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'
