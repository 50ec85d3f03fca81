"""Pictures of what was measured, by matplotlib (the extra ``vq[plot]``)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vq.bench.report import Bars, Chart, Curves, Stacked
from vq.errors import UsageError

__all__ = ["draw"]

_WIDTH, _CURVES_HEIGHT, _BAR_HEIGHT = 8.0, 4.5, 0.3  # inches


def draw(charts: Sequence[Chart], path: Path) -> None:
    """Draws charts below one another into a file, whose suffix says how (.svg, .png).

    Raises `UsageError` where matplotlib is not installed.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise UsageError("a picture needs matplotlib: pip install 'vq[plot]'") from None
    heights = [_height(chart) for chart in charts]
    figure = figures.Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    places = figure.subplots(len(charts), squeeze=False, height_ratios=heights)
    for (place,), chart in zip(places, charts, strict=True):
        place.set_title(chart.title)
        if isinstance(chart, Bars):
            _draw_bars(place, chart)
        elif isinstance(chart, Curves):
            _draw_curves(place, chart)
        else:
            _draw_stacked(place, chart)
    figure.savefig(path)


def _height(chart: Chart) -> float:
    if isinstance(chart, Curves):
        return _CURVES_HEIGHT
    if isinstance(chart, Stacked):
        return 3.0 + 2 * _BAR_HEIGHT * len(chart.labels)
    return 1.5 + _BAR_HEIGHT * len(chart.labels) * max(1, len(chart.series))


def _draw_bars(place: Any, chart: Bars) -> None:
    thickness = 0.8 / max(1, len(chart.series))
    for number, (name, values) in enumerate(chart.series.items()):
        known = [(row, value) for row, value in enumerate(values) if value is not None]
        place.barh(
            [row + number * thickness for row, _ in known],
            [value for _, value in known],
            thickness,
            label=name,
        )
    middle = thickness * (len(chart.series) - 1) / 2
    place.set_yticks([row + middle for row in range(len(chart.labels))], chart.labels)
    place.invert_yaxis()
    place.axvline(1, color="black", linewidth=1)
    place.set_xlabel("vq beside the other: above 1 vq is ahead")
    place.legend()


def _draw_curves(place: Any, chart: Curves) -> None:
    for name, points in chart.curves.items():
        place.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
    place.set_xscale("log", base=2)
    place.set_yscale("log")
    place.set_xlabel(chart.x_label)
    place.set_ylabel(chart.y_label)
    place.grid(True, which="both", alpha=0.3)
    place.legend()


def _draw_stacked(place: Any, chart: Stacked) -> None:
    left = [0.0] * len(chart.labels)
    for name, values in chart.series.items():
        place.barh(chart.labels, values, left=left, label=name)
        left = [start + value for start, value in zip(left, values, strict=True)]
    place.invert_yaxis()
    place.set_xlabel(chart.x_label)
    place.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, fontsize="small")
