"""What did a run find? From `results.json` the page `benchmarks.md` and its plot.

python -m experiments.benchmarks.tables bench-run/results.json docs

Several files are those of processes that measured different parts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "digits": "digits MLP",
    "cnn": "CNN",
    "gpt": "GPT",
    "gpt2": "GPT-2",
    "minilm": "MiniLM",
    "tiny": "tiny",
}
TITLES_OF_ANSWERS = {
    "top 1": "Top 1",
    "top 10": "Top 10",
    "top 10 of many": "Top 10, many batches",
    "trace": "Trace",
    "analysis": "Analysis",
}
WRONG = 1e-6  # relative error of a product in float64 beyond which it is another matrix's

Record = dict[str, Any]
Part = dict[str, Any]


def write(results: dict[str, Any], folder: Path) -> None:
    """The page and its plot."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    drawn = plot(results, folder / "figures" / "benchmarks.png")
    (folder / "benchmarks.md").write_text(page(results, drawn), encoding="utf-8")


def page(results: dict[str, Any], drawn: bool) -> str:
    """All of it, in Markdown."""
    sections = [
        introduction(results),
        workloads(results),
        aims(results),
        products(results, "records", "One batch"),
        products(results, "many", "Many batches, the last one shorter"),
        answers(results),
        fastest(results),
        profiles(results),
        densities(results),
        compiling(results),
        memories(results),
        growths(results, drawn),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def introduction(results: dict[str, Any]) -> str:
    m = results["machine"]
    there = {name: v for name, v in m["versions"].items() if v}
    absent = [name for name, v in m["versions"].items() if not v]
    lines = [
        "# Benchmarks",
        "`make bench` prints this page anew. All contestants take turns within one process, and "
        "every time is divided by that of a plain gradient of the same workload, measured right "
        "before and right after it: **times are ratios within one run**, comparable across rows of "
        "a table, not across runs or machines. Cells are medians, with quartiles in brackets.",
        f"This run: {m['cpu']}, {m['cores']} cores, {m['threads']} thread(s), {m['system']}, "
        f"Python {m['python']}, {m['date']}, {results.get('seconds', 0) / 60:.0f} minutes"
        + (", with `--quick`" if results["quick"] else "")
        + ". "
        + ", ".join(f"{name} {v}" for name, v in there.items())
        + ".",
    ]
    if results.get("note"):
        lines.append(results["note"])
    if absent:
        lines.append("Not installed, and so left out: " + ", ".join(absent) + ".")
    lines.append(
        "Packages are used as their documentation says. What only the caller can choose (a "
        "tolerance, a number of products) is raised from the default until the answer is as "
        "accurate as asked, and the search for it is not counted. curvlinops runs without its "
        "check of determinism, which costs two products and four gradients more. BackPACK has a "
        "product and no solvers. «Wrong» is a relative error of the product in float64 above "
        f"{WRONG:g}, against differentiating twice by hand."
    )
    return "\n\n".join(lines)


def workloads(results: dict[str, Any]) -> str:
    rows = []
    for part in parts(results, "products"):
        if "failure" in part:
            rows.append([NAMES[part["workload"]], part["failure"], "", "", ""])
            continue
        one, many = part["description"], part["many_description"]
        times = [s for r in part["records"] for s in r.get("gradient_seconds", [])]
        unit = f"{1000 * np.median(times):.3g} ms" if times else ""
        sizes = " + ".join(map(str, many["batches"]))
        rows.append([NAMES[part["workload"]], f"{one['n']:,}", str(one["batches"][0]), sizes, unit])
    if not rows:
        return ""
    header = ["workload", "parameters", "one batch", "many batches", "a gradient (one batch)"]
    return "## Workloads\n\n" + WORKLOADS + "\n\n" + table(header, rows)


WORKLOADS = (
    "A tanh network and a residual CNN (batch norm in evaluation mode) on scikit-learn's digits; a "
    "byte-level GPT trained for half a minute on the documentation that comes with Python; the "
    "published weights of all-MiniLM-L6-v2 with their contrastive loss on sentences of the same "
    "documentation. All in float32."
)


def products(results: dict[str, Any], key: str, title: str) -> str:
    """First product, and the mean of the first twenty."""
    found = [part for part in parts(results, "products") if key in part]
    if not found:
        return ""
    header = ["gradients for a product"]
    for part in found:
        header += [f"{NAMES[part['workload']]}: first", "mean of 20"]
    rows = []
    for name in contestants(found, key):
        row = [name]
        for part in found:
            record = record_of(part, name, key)
            mark = wrong(record)
            if record.get("failure"):
                row += [shown(record["failure"]), ""]
            elif "first" not in record:
                row += ["not timed" + mark, ""]
            else:
                row += [spread(record["first"]) + mark, spread(record["amortised"]) + mark]
        rows.append(row)
    note = (
        "The first product with everything it takes to get there (construction, graphs, checks), "
        "and the mean of the first twenty."
    )
    for part in found:
        count = part["description"].get("products", 20)
        if count < 20:
            name = NAMES[part["workload"]]
            note += f" {name}: {count - 1} after the first were timed and stand for all nineteen."
    return f"## Products. {title}\n\n{note}\n\n{table(header, rows)}"


def wrong(record: Record) -> str:
    error = record.get("error", 0.0)
    if error <= WRONG:
        return ""
    return f", **wrong: {100 * error:.2g} % off**"


def answers(results: dict[str, Any]) -> str:
    """Times to the same accuracy."""
    tasks = list(TITLES_OF_ANSWERS)
    found = [part for task in tasks for part in parts(results, task)]
    if not any("records" in part for part in found):
        return ""
    blocks = [
        "## Answers at equal accuracy",
        "Eigenpairs: every residual ‖Hx − λx‖ / |λ|, measured by us with a plain product, is at "
        "most 0.001, and no contestant found larger ones. Trace: three runs out of three within "
        "1 % of a reference (exact for the digits MLP, else an estimate to 0.3 % or as near as "
        "3,000 products come, 400 for MiniLM). Analysis: ten eigenpairs, the trace and the "
        "density, for spectra in one run. Cells: gradients, and in parentheses products where "
        "they can be counted.",
    ]
    for task in tasks:
        some = [part for part in parts(results, task) if "records" in part]
        if not some:
            continue
        rows = [
            [name, *(cell(record_of(part, name, "records")) for part in some)]
            for name in contestants(some, "records")
        ]
        header = [task, *(NAMES[part["workload"]] for part in some)]
        blocks.append(f"### {TITLES_OF_ANSWERS[task]}\n\n" + table(header, rows))
        blocks += [
            f"{NAMES[part['workload']]}: held against {part['reference']['value']:.5g} ± "
            f"{part['reference']['half_width']:.2g}."
            for part in some
            if part.get("reference", {}).get("half_width")
        ]
        blocks += [
            f"{NAMES[part['workload']]}: {part['failure']}."
            for part in parts(results, task)
            if "failure" in part
        ]
    return "\n\n".join(blocks)


def cell(record: Record) -> str:
    if record.get("failure"):
        return shown(record["failure"])
    text = spread(record["gradients"])
    counts = [count for count in record.get("products", []) if count is not None]
    return text + (f" ({np.median(counts):.0f} products)" if counts else "")


def fastest(results: dict[str, Any]) -> str:
    """spectra beside whichever other package was the fastest to an accurate answer."""
    rows = []
    for task, title in TITLES_OF_ANSWERS.items():
        for part in parts(results, task):
            ours = record_of(part, "spectra", "records")
            others = [
                (float(np.median(record["gradients"])), record["contestant"])
                for record in part.get("records", [])
                if "gradients" in record
                and "failure" not in record
                and not record["contestant"].startswith("spectra")
            ]
            if "gradients" not in ours or not others:
                continue
            time, name = min(others)
            ratio = float(np.median(ours["gradients"])) / time
            rows.append([title, NAMES[part["workload"]], name, f"{ratio:.2f}"])
    if not rows:
        return ""
    header = ["answer", "workload", "fastest other package", "time of spectra / its time"]
    return "### Beside the fastest other package\n\n" + table(header, rows)


def profiles(results: dict[str, Any]) -> str:
    """Where the time of an answer goes."""
    rows = []
    for part in parts(results, "profile"):
        for record in part.get("records", []):
            count, gradients = np.median(record["products"]), np.median(record["gradients"])
            shares = [np.median(record[key]) for key in ("autograd", "around", "outside")]
            rows.append(
                [
                    f"{record['what']}, {NAMES[part['workload']]}",
                    f"{gradients:.0f}",
                    f"{count:.0f}",
                    *(f"{100 * share:.1f} %" for share in shares),
                    f"{count * record['plain']:.0f}",
                ]
            )
    if not rows:
        return ""
    header = [
        "spectra",
        "gradients",
        "products",
        "autograd",
        "around it, in a product",
        "outside of products",
        "as many products by hand",
    ]
    note = (
        "What the times above consist of: differentiating; what surrounds it in a product (checks "
        "of weights and data, sums over batches, copies); the algorithm (reorthogonalisation, "
        "Ritz values, tests). The last column is what the same number of products takes where "
        "nothing is checked and nothing is done with them, in gradients, on kept graphs: less "
        "than that takes fewer products."
    )
    return f"### Where the time goes\n\n{note}\n\n{table(header, rows)}"


# What was asked of this library, in gradients for a product or as a share of another's time.
AMORTISED = {"digits": 1.5, "cnn": 2.5, "gpt": 2.2, "minilm": 2.2}
FRESH = 3.4
COMPILED = {"gpt": 1.9, "gpt2": 1.6}
BESIDE_REBUILT = 1 / 1.4
BESIDE_ALL = 1.0
TOP_OF_MANY = 0.6
ANALYSIS = 1 / 5
BY_HAND = ("plain, graph retained", "plain, graph rebuilt")
REBUILT = ("curvlinops", "hessian-eigenthings", "landscaper", "BackPACK")


def aims(results: dict[str, Any]) -> str:
    """What was asked, and what was found."""
    rows = []
    for part in parts(results, "products"):
        name = part["workload"]
        times = {
            record["contestant"]: float(np.median(record["amortised"]))
            for record in part.get("records", [])
            if "amortised" in record and not wrong(record)
        }
        if name not in AMORTISED or not {"spectra", "spectra, fresh", *BY_HAND} <= set(times):
            continue
        others = {key: time for key, time in times.items() if key in REBUILT}
        peers = {
            key: time
            for key, time in times.items()
            if key not in BY_HAND and not key.startswith("spectra")
        }
        kept, built = (times[key] for key in BY_HAND)
        rows += [
            aim(
                "a product, gradients", name, AMORTISED[name], times["spectra"], note=f"{kept:.2f}"
            ),
            aim("without kept graphs", name, FRESH, times["spectra, fresh"], note=f"{built:.2f}"),
            *beside(
                "beside the fastest that rebuilds",
                name,
                BESIDE_REBUILT,
                times,
                others,
                by_hand=kept,
            ),
            *beside("beside the fastest", name, BESIDE_ALL, times, peers, by_hand=kept),
        ]
    for part in parts(results, "compiling"):
        if "record" in part and part["record"]["said"]["parts"]:
            found, plain = (float(np.median(part["record"][key])) for key in ("compiled", "kept"))
            limit = COMPILED[part["workload"]]
            rows.append(
                aim("compiled", part["workload"], limit, found, note=f"{plain:.2f} uncompiled")
            )
    for part in parts(results, "top 10 of many"):
        rows += whole(results, part["workload"], ["top 10 of many"], "top 10 of many", TOP_OF_MANY)
    for part in parts(results, "analysis"):
        needed = ["top 10", "trace", "density"]
        rows += whole(results, part["workload"], needed, "analysis", ANALYSIS)
    if not rows:
        return ""
    header = ["aim", "workload", "at most", "found", "by hand, or whom"]
    note = (
        "What this library was asked to reach, and what it does. By hand: differentiating twice "
        "where nothing is checked; a product on the same graphs is below that by chance only. "
        "Answers: our time divided by that of whoever was the fastest, in an analysis by the sum "
        "of the fastest for each part; «less than» where nobody else had a part within the time "
        "that was given. «Where the time goes» says what a missed one is spent on."
    )
    return f"## Aims\n\n{note}\n\n{table(header, rows)}"


def aim(
    what: str, workload: str, limit: float, found: float, *, note: str, sign: str = ""
) -> list[str]:
    """One line; what is reached is set in bold."""
    text = f"{sign}{found:.2f}"
    reached = found <= limit
    return [what, NAMES[workload], f"{limit:.2f}", f"**{text}**" if reached else text, note]


def beside(
    what: str,
    workload: str,
    limit: float,
    times: dict[str, float],
    others: dict[str, float],
    *,
    by_hand: float,
) -> list[list[str]]:
    """Our product beside that of the fastest of others, and what one by hand would be."""
    if not others:
        return []
    name = min(others, key=lambda key: others[key])
    note = f"{name}; by hand {by_hand / others[name]:.2f}"
    return [aim(what, workload, limit, times["spectra"] / others[name], note=note)]


def whole(
    results: dict[str, Any], workload: str, needed: list[str], what: str, limit: float
) -> list[list[str]]:
    """An answer beside the sum of the fastest others for its parts."""
    found = {p["task"]: p for p in results["parts"] if p["workload"] == workload}
    if not {what, *needed} <= set(found) or "gradients" not in record_of(
        found[what], "spectra", "records"
    ):
        return []
    total, least, names = 0.0, False, []
    for task in needed:
        others = [r for r in found[task]["records"] if not r["contestant"].startswith("spectra")]
        right = [
            (float(np.median(record["gradients"])), record["contestant"])
            for record in others
            if "gradients" in record and "failure" not in record
        ]
        unit = gradient_seconds(found[task]) or gradient_seconds(found[what])
        if right:
            time, name = min(right)
        elif unit and any("more than" in record.get("failure", "") for record in others):
            # Whoever was still at it would have taken longer than anyone was given.
            time, name, least = found[task]["limit"] / unit, "nobody", True
        else:
            return []
        total += time
        names.append(name)
    time = float(np.median(record_of(found[what], "spectra", "records")["gradients"]))
    sign = "less than " if least else ""
    return [aim(what, workload, limit, time / total, note=", ".join(names), sign=sign)]


def gradient_seconds(part: Part) -> float | None:
    """What a gradient took in a part, if anyone was timed."""
    units = [
        took / gradients
        for record in part["records"]
        if "seconds" in record
        for took, gradients in zip(record["seconds"], record["gradients"], strict=True)
    ]
    return float(np.median(units)) if units else None


def compiling(results: dict[str, Any]) -> str:
    """What `compile=True` gains."""
    found = [part for part in parts(results, "compiling") if "record" in part]
    if not found:
        return ""
    rows = []
    for part in found:
        record = part["record"]
        said = record["said"]
        rows.append(
            [
                NAMES[part["workload"]],
                spread(record["kept"]),
                spread(record["compiled"]) if said["parts"] else "; ".join(said["refused"]),
                f"{said['seconds']:.0f} s",
                f"{record['again']:.0f} s",
                f"{said.get('pays_after_products', 0):,}" if said["parts"] else "",
            ]
        )
    header = [
        "gradients for a product",
        "on a kept graph",
        "compiled",
        "compiling took",
        "with its code on disk",
        "pays after",
    ]
    return "## Compiled products\n\n" + table(header, rows)


def densities(results: dict[str, Any]) -> str:
    found = [part for part in parts(results, "density") if "records" in part]
    if not found:
        return ""
    header = ["density", *(NAMES[part["workload"]] for part in found)]
    rows = []
    for name in contestants(found, "records"):
        row = [name]
        for part in found:
            record = record_of(part, name, "records")
            text = cell(record)
            if "distance" in record and "failure" not in record:
                text += f", W1 {record['distance']:.1e} ‖H‖"
            row.append(text)
        rows.append(row)
    note = (
        "With about a hundred products (spectra: those for ten eigenpairs included). W1, the "
        "Wasserstein-1 distance to the true eigenvalues, for the digits MLP in float64. curvlinops "
        "returns a broadened curve, which costs it part of the distance."
    )
    return f"## Density at equal products\n\n{note}\n\n{table(header, rows)}"


def memories(results: dict[str, Any]) -> str:
    """Peaks, in MiB."""
    found = [part for part in parts(results, "memory") if "records" in part]
    if not found:
        return ""
    header = ["peak, MiB"]
    for part in found:
        header += [f"{NAMES[part['workload']]}: one batch", "many"]
    rows = []
    for name in contestants(found, "records"):
        row = [name]
        for part in found:
            for key in ("records", "many"):
                if key not in part:
                    row.append("")
                    continue
                record = record_of(part, name, key)
                row.append(shown(record["failure"]) if "failure" in record else peak(record))
        rows.append(row)
    note = (
        "The peak resident set of a fresh process after three products; it includes Python, "
        "PyTorch, the weights and what importing a package takes. The first row is a plain "
        "gradient."
    )
    return f"## Memory\n\n{note}\n\n{table(header, rows)}"


def peak(record: Record) -> str:
    return f"{record['peak']:.0f}"


TITLES = {
    "n": "Width of the digits MLP",
    "batches": "Batches of the CNN",
    "length": "Length of the sequences of the GPT, at its initial weights",
    "k": "Eigenpairs of the digits MLP",
}


def growths(results: dict[str, Any], drawn: bool) -> str:
    found = [part for part in results["parts"] if part["workload"] == "growth"]
    if not found:
        return ""
    blocks = ["## Growth"]
    if drawn:
        blocks.append("![Growth of time and memory](figures/benchmarks.png)")
    for part in found:
        points = part["points"]
        names = [record["contestant"] for record in points[0]["records"]]
        rows = []
        for name in names:
            row = [name]
            for point in points:
                record = record_of(point, name, "records")
                if "failure" in record:
                    row.append(shown(record["failure"]))
                    continue
                text = spread(record["gradients" if part["task"] == "k" else "amortised"])
                memory = record_of(point, name, "memory")
                row.append(text + (f"; {peak(memory)} MiB" if "peak" in memory else ""))
            rows.append(row)
        header = ["", *(label(part["task"], point) for point in points)]
        unit = (
            "Gradients for k eigenpairs."
            if part["task"] == "k"
            else "Gradients for a product (mean of 20; five after the first were timed and stand "
            "for nineteen), and the peak of a process."
        )
        blocks.append(f"### {TITLES[part['task']]}\n\n{unit}\n\n{table(header, rows)}")
    return "\n\n".join(blocks)


def label(task: str, point: dict[str, Any]) -> str:
    return f"n = {point['n']:,}" if task == "n" else f"{task} {point['size']}"


def plot(results: dict[str, Any], file: Path) -> bool:
    """Growth of time above, of memory below; False if there is nothing to draw."""
    found = [part for part in results["parts"] if part["workload"] == "growth"]
    if not found:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(found), 6), layout="constrained")
    axes = figure.subplots(2, len(found), squeeze=False)
    colors = {}
    for column, part in enumerate(found):
        points = part["points"]
        sizes = [point["n"] if part["task"] == "n" else point["size"] for point in points]
        key = "gradients" if part["task"] == "k" else "amortised"
        for record in points[0]["records"]:
            name = record["contestant"]
            color = colors.setdefault(name, f"C{len(colors)}")
            times = [quantiles(record_of(point, name, "records").get(key)) for point in points]
            low, middle, high = np.array(times).T
            axes[0, column].plot(sizes, middle, "o-", color=color, label=name, markersize=3)
            axes[0, column].fill_between(sizes, low, high, color=color, alpha=0.2, linewidth=0)
            peaks = [record_of(point, name, "memory").get("peak", np.nan) for point in points]
            axes[1, column].plot(sizes, peaks, "o-", color=color, markersize=3)
        axes[0, column].set_title(TITLES[part["task"]].split(",")[0], fontsize=9)
        unit = "k pairs" if part["task"] == "k" else "a product"
        axes[0, column].set_ylabel(f"gradients for {unit}", fontsize=8)
        axes[1, column].set_ylabel("peak of the process, MiB", fontsize=8)
        if part["task"] == "k":
            axes[1, column].set_visible(False)
        for axis in axes[:, column]:
            axis.set_xscale("log")
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axis.minorticks_off()
            axis.set_ylim(bottom=0)
            axis.tick_params(labelsize=7)
            axis.set_xlabel({"n": "parameters"}.get(part["task"], part["task"]), fontsize=8)
            axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    columns = min(5, 2 * len(found))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
    figure.savefig(file, dpi=110)
    return True


def parts(results: dict[str, Any], task: str) -> list[Part]:
    return [
        part for part in results["parts"] if part["task"] == task and part["workload"] != "growth"
    ]


def contestants(found: Sequence[Part], key: str) -> list[str]:
    """Those that were measured anywhere, in their order; an absent package has no row."""
    names = list(dict.fromkeys(r["contestant"] for part in found for r in part.get(key, [])))
    absent: Callable[[Record], bool] = lambda r: r.get("failure", "").endswith("not installed")  # noqa: E731
    return [name for name in names if not all(absent(record_of(p, name, key)) for p in found)]


def record_of(part: dict[str, Any], name: str, key: str) -> Record:
    return next((r for r in part.get(key, []) if r["contestant"] == name), {"failure": "—"})


def quantiles(values: Sequence[float] | None) -> list[float]:
    if not values:
        return [np.nan] * 3
    return [float(q) for q in np.quantile(values, [0.25, 0.5, 0.75])]


def spread(values: Sequence[float]) -> str:
    """Median and quartiles."""
    low, middle, high = quantiles(values)
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def shown(failure: str) -> str:
    """A failure in a cell: no line breaks, no column separators."""
    return failure.replace("|", "\\|")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def joined(several: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results of processes that measured different parts at the same time, as one."""
    result = dict(several[0])
    result["parts"] = [part for results in several for part in results["parts"]]
    result["seconds"] = max(results.get("seconds", 0) for results in several)
    return result


if __name__ == "__main__":
    *files, folder = map(Path, sys.argv[1:])
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    write(joined(found), folder)
