"""What every bench does with its results: a table, a JSON file, a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import typer

from daemon.cli_options import check_file


class Files(NamedTuple):
    """Where results go beside the terminal; None: nowhere."""

    json: Path | None
    plot: Path | None

    @classmethod
    def checked(cls, json: Path | None, plot: Path | None = None) -> Self:
        """Say before the work, not after it, that a file cannot be written. Raises typer.BadParameter."""
        check_file(json, "--json")
        check_file(plot, "--plot")
        if plot is not None and plot.suffix.lower() != ".png":
            raise typer.BadParameter(f"{plot.name} does not end in .png", param_hint="--plot")
        return cls(json, plot)


class Bars(NamedTuple):
    """One group of bars a label, one bar a series."""

    title: str
    unit: str
    labels: list[str]
    series: dict[str, list[float]]


def show(found: dict[str, Any], columns: Sequence[tuple[str, str]], files: Files, bars: Bars | None = None) -> None:
    """Print a table of the results and write the files.

    Args:
        found: `{"machine": {…}, "results": [{…}]}`.
        columns: headings with the format of their values: `stage.key` looks into a nested object.
        files: where else to.
        bars: what the plot shows.
    """
    typer.echo("  ".join(f"{name} {_words(value)}" for name, value in found["machine"].items() if value))
    rows = [[_cell(result, key, form) for key, form in columns] for result in found["results"]]
    headings = [key.replace(".", " ").replace("_", " ") for key, _ in columns]
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(columns))]
    for row in [headings, *rows]:
        typer.echo("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    if files.json is not None:
        from pipeline.bundle import write_result

        write_result(files.json, (json.dumps(found, indent=2, allow_nan=False) + "\n").encode())
    if files.plot is not None and bars is not None:
        _plot(bars, files.plot)


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:.0f}" for name, number in value.items())
    return str(value)


def _cell(result: dict[str, Any], key: str, form: str) -> str:
    value: Any = result
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, list | tuple):  # sizes, or what was seen in the course of it
        return "x".join(map(str, value)) if not form else " to ".join(format(value[i], form) for i in (0, -1))
    return "" if value is None else format(value, form)


def _plot(bars: Bars, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(max(6, 1.2 * len(bars.labels) + 3), 4.5), layout="constrained")
    width = 0.8 / len(bars.series)
    for index, (name, values) in enumerate(bars.series.items()):
        places = [i + (index - (len(bars.series) - 1) / 2) * width for i in range(len(values))]
        drawn = axes.bar(places, values, width, label=name)
        axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=8)
    axes.set_xticks(range(len(bars.labels)), bars.labels)
    axes.set_ylabel(bars.unit)
    axes.set_title(bars.title)
    axes.spines[["top", "right"]].set_visible(False)
    if len(bars.series) > 1:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
