"""What did a run find? From `results.json` the tables and the figure.

python -m experiments.large_models.tables large-run/results.json docs/figures
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]


def write(results: dict[str, Any], folder: Path) -> None:
    """Both of them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.md").write_text(page(results), encoding="utf-8")
    if {"peaks", "blocks", "length"} <= results.keys():
        plot(results, folder / "large_models.png")


def page(results: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    sections = [
        main_table(results),
        growth_table(results.get("blocks", []), "blocks"),
        growth_table(results.get("length", []), "length"),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def main_table(results: dict[str, Any]) -> str:
    """Peak, time and error of every contestant."""
    rows = []
    peaks, times = results.get("peaks", []), results.get("time", [])
    names = [record["contestant"] for record in peaks or times]
    for name in names:
        row = [name]
        peak = [record for record in peaks if record["contestant"] == name]
        first = peaks[0] if peaks else {}
        row += [in_units(peak[0], first, key) if peak else "" for key in ("peak", "live")]
        taken = [record for record in times if record["contestant"] == name]
        if taken:
            ratios = taken[0]["ratios"]
            row.append(f"{np.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
            row.append(f"{taken[0]['error']:.0e}")
        rows.append(row)
    header = ["", "peak, MiB", "live, MiB", "time of a product", "error"]
    return table(header, rows) if rows else ""


def in_units(record: Record, first: Record, key: str) -> str:
    return f"{record[key]:.0f} ({record[key] / first[key]:.2f})"


def growth_table(records: list[Record], by: str) -> str:
    """Peaks of every contestant, size by size."""
    sizes = sorted({record[by] for record in records})
    rows = []
    for name, some in curves(records, by).items():
        found = {record[by]: f"{record['peak']:.0f}; {record['live']:.0f}" for record in some}
        row = [name, *(found.get(size, "") for size in sizes)]
        if by == "blocks":
            row.append(f"{slope(some, 'peak'):.1f}; {slope(some, 'live'):.1f}")
        rows.append(row)
    header = ["peak; live, MiB", *(f"{by} {size}" for size in sizes)]
    header += ["per further block"] if by == "blocks" else []
    return table(header, rows) if rows else ""


def curves(records: list[Record], by: str) -> dict[str, list[Record]]:
    """The records of each contestant in order of size; with their blocks, if those differ."""
    found: dict[str, list[Record]] = {}
    several = by != "blocks" and len({record["blocks"] for record in records}) > 1
    for record in sorted(records, key=lambda record: record[by]):
        name = record["contestant"] + (f" ({record['blocks']} blocks)" if several else "")
        found.setdefault(name, []).append(record)
    return dict(sorted(found.items()))


def slope(records: list[Record], key: str) -> float:
    """MiB per block, between the fewest and the most."""
    if len(records) < 2:
        return float("nan")
    first, last = records[0], records[-1]
    return (last[key] - first[key]) / (last["blocks"] - first["blocks"])


def plot(results: dict[str, Any], file: Path) -> None:
    """Peaks by contestant, by blocks and by length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    bars, blocks, length = figure.subplots(1, 3, width_ratios=[1.2, 1, 1])
    peaks = results["peaks"]
    places = np.arange(len(peaks))[::-1]
    bars.barh(places + 0.2, [r["peak"] for r in peaks], 0.4, label="C library's default")
    bars.barh(places - 0.2, [r["live"] for r in peaks], 0.4, label="live")
    bars.set_yticks(places, [r["contestant"] for r in peaks])
    bars.set(xlabel="peak of a product, MiB")
    bars.legend()
    for axes, by in ((blocks, "blocks"), (length, "length")):
        for name, some in curves(results[by], by).items():
            axes.plot([r[by] for r in some], [r["live"] for r in some], "o-", label=name)
        axes.set(xlabel={"blocks": "blocks", "length": "T, at 4096 tokens"}[by], ylim=(0, None))
        axes.set(ylabel="live at the peak, MiB")
        axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
    blocks.set_xticks(sorted({r["blocks"] for r in results["blocks"]}))
    length.set_xscale("log", base=2)
    length.set_xticks(sorted({r["length"] for r in results["length"]}))
    length.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
    figure.savefig(file, dpi=110)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, numbers to the right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    return "\n".join([line(header), line(["---"] + ["--:"] * (len(header) - 1)), *map(line, rows)])


if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
