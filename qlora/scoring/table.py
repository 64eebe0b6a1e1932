"""Scores of two models in a terminal. Imports nothing that takes time: a tool's --help does not wait for it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora.scoring.bootstrap import Difference

NOT_DEFINED = "–"
"""In place of a measure that is not defined, such as BLEU of answers without a 4-gram."""


def table(differences: "Mapping[str, Difference]", before: str, after: str) -> str:
    """One line per measure."""
    heads = ("", before, after, "difference", "95 % interval", "p(better)", "")
    rows = [
        (
            name,
            *(NOT_DEFINED if value is None else f"{value:.4f}" for value in (found.before, found.after)),
            signed(found.delta),
            interval(found),
            "" if found.p_better is None else f"{found.p_better:.3f}",
            found.verdict,
        )
        for name, found in differences.items()
    ]
    return aligned([heads, *rows], words=(0, 6))


def signed(value: float | None) -> str:
    return NOT_DEFINED if value is None else f"{value:+.4f}"


def interval(found: "Difference") -> str:
    return NOT_DEFINED if found.low is None else f"{signed(found.low)} to {signed(found.high)}"


def aligned(rows: Sequence[Sequence[str]], words: Sequence[int]) -> str:
    """Columns of words begin at one place, those of numbers end at one."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) if place in words else cell.rjust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
