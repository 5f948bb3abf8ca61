"""Tables as records that print themselves, in a terminal and in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        columns: Their heads.
        rows: One text per column each.
        right: Columns that hold numbers.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[str] = frozenset()

    def __str__(self) -> str:
        lines = (self.columns, *self.rows)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(self._line(line, widths) for line in lines)

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        padded = [
            cell.rjust(width) if name in self.right else cell.ljust(width)
            for name, cell, width in zip(self.columns, cells, widths, strict=True)
        ]
        return "  ".join(padded).rstrip()

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        body = "".join(f"<tr>{self._cells(row)}</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _cells(self, row: Sequence[str]) -> str:
        return "".join(
            f'<td style="text-align: {"right" if name in self.right else "left"}">'
            f"{escape(cell)}</td>"
            for name, cell in zip(self.columns, row, strict=True)
        )


def number(value: int | None) -> str:
    """1,234,567, or a dash."""
    return "–" if value is None else f"{value:,}"


def percent(part: float | None, whole: float | None) -> str:
    """A share such as 50.0 %, or a dash."""
    return "–" if part is None or not whole else f"{100 * part / whole:.1f} %"


def sizes(values: int | Sequence[int]) -> str:
    """A rank or a shape, such as 12 or 64×3×3×3."""
    return str(values) if isinstance(values, int) else "×".join(map(str, values))
