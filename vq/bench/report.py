"""What a bench hands back, and how it is shown: as a table, in Markdown, as JSON, as a picture.

A bench measures and gives a report, one JSON object; `describe` says which tables and charts show
it. Nothing here measures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeAlias

from vq.bench.measure import print_json, print_table
from vq.errors import UsageError

__all__ = [
    "VQ",
    "Bars",
    "Chart",
    "Curves",
    "Description",
    "Figure",
    "Stacked",
    "Table",
    "add_output_arguments",
    "describe_figures",
    "machine",
    "show",
    "summary",
]

VQ = "vq"


class Figure(NamedTuple):
    """Something that is measured."""

    name: str
    unit: str
    more_is_better: bool = True
    digits: int = 2
    """Decimal places in the table."""


class Table(NamedTuple):
    """Rows of text below a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


class Bars(NamedTuple):
    """How vq does beside another contestant: above 1 it is ahead, whatever is measured."""

    title: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float | None]]
    """For each other contestant a value a label."""


class Curves(NamedTuple):
    """Values over what grows, both on logarithmic axes."""

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, Sequence[tuple[float, float]]]


class Stacked(NamedTuple):
    """What something is made of: a bar for each label, one part of it for each series."""

    title: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float]]
    x_label: str


Chart: TypeAlias = Bars | Curves | Stacked


@dataclass
class Description:
    """What a report says, for people."""

    title: str
    tables: Sequence[Table]
    charts: Sequence[Chart] = field(default_factory=list)


# --- options and output --------------------------------------------------------------------------


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every bench has."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object and no more")
    form.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument(
        "--plot",
        type=_picture,
        metavar="FILE",
        help="draw it too, as .svg or .png (needs matplotlib: the extra vq[plot])",
    )


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither an .svg nor a .png file")
    return path


def show(args: argparse.Namespace, report: Mapping[str, Any], description: Description) -> None:
    """Prints a report as the options say, and draws it where they say.

    Raises `UsageError` when it shall be drawn and there is no matplotlib, or nothing to draw.
    """
    if args.json:
        print_json(report)
    elif args.markdown:
        _print_markdown(description, sys.stdout)
    else:
        print(description.title)
        for table in description.tables:
            print()
            if table.title:
                print(table.title)
            print_table(table.head, table.rows)
    if args.plot is not None:
        from vq.bench.plot import draw

        if not description.charts:
            raise UsageError("this bench has nothing to draw")
        draw(description.charts, args.plot)


def _print_markdown(description: Description, file: TextIO) -> None:
    print(f"{description.title}.", file=file)
    for table in description.tables:
        print(file=file)
        if table.title:
            print(f"{table.title}:\n", file=file)
        # The first column says what, the others are numbers.
        rule = ["---", *("---:" for _ in table.head[1:])]
        for row in (table.head, rule, *table.rows):
            print(f"| {' | '.join(row)} |", file=file)


def machine(report: Mapping[str, Any]) -> str:
    """Where a report comes from, in words."""
    return (
        f"Python {report['python']} on {report['machine']} ({report['processor']}{_apart(report)}),"
        f" {report['system']} {report['kernel']}, {report['date']}"
    )


def _apart(report: Mapping[str, Any]) -> str:
    """How far apart the processors were, if that was measured."""
    distances: Sequence[float] = report.get("distance_ns", ())
    if not distances:
        return ""
    least, most = min(distances), max(distances)
    return (
        f", {least:.0f}" + (f" to {most:.0f}" if round(most) > round(least) else "") + " ns apart"
    )


# --- figures of several contestants ---------------------------------------------------------------


def summary(
    figures: Sequence[Figure], samples: Mapping[str, Sequence[Mapping[str, float]]]
) -> list[dict[str, Any]]:
    """Medians for each figure and contestant, and vq's ratio to each of the others.

    `samples` are each contestant's rounds; in a round a figure may be missing.
    """
    rows = []
    for figure in figures:
        values = {
            name: [sample[figure.name] for sample in rounds if figure.name in sample]
            for name, rounds in samples.items()
        }
        medians = {name: statistics.median(found) for name, found in values.items() if found}
        ours = medians.get(VQ)
        rows.append(
            {
                "figure": figure.name,
                "unit": figure.unit,
                "better": "more" if figure.more_is_better else "less",
                "medians": {name: round(value, 4) for name, value in medians.items()},
                "ratios": {
                    name: round(ours / value, 3)
                    for name, value in medians.items()
                    if name != VQ and ours is not None and value
                },
                "samples": {
                    name: [round(value, 4) for value in found] for name, found in values.items()
                },
            }
        )
    return rows


def describe_figures(
    title: str, figures: Sequence[Figure], report: Mapping[str, Any]
) -> Description:
    """The table and the bars of a report with `contestants` and a `summary` as its `figures`."""
    contestants: Sequence[str] = report["contestants"]
    rows: Sequence[Mapping[str, Any]] = report["figures"]
    others = [name for name in contestants if name != VQ]
    table = Table(
        ("", "", *contestants, *(f"vq/{name}" for name in others)),
        [
            (
                row["figure"],
                row["unit"],
                *(_cell(row["medians"].get(name), figure.digits) for name in contestants),
                *(_cell(row["ratios"].get(name), 2) for name in others),
            )
            for figure, row in zip(figures, rows, strict=True)
        ],
    )
    bars = Bars(
        title,
        [row["figure"] for row in rows],
        {name: list(_advantages(rows, name)) for name in others},
    )
    return Description(f"{title}; {machine(report)}", [table], [bars] if others else [])


def _advantages(rows: Iterable[Mapping[str, Any]], other: str) -> Iterable[float | None]:
    for row in rows:
        ratio = row["ratios"].get(other)
        if ratio and row["better"] == "less":
            ratio = 1 / ratio
        yield ratio


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
