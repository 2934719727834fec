"""The tables of docs/benchmarks.md and README and the plots, from the CSV files of bench/results/: `report`."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .results import FOLDER, Row, read

ROOT = Path(__file__).parents[1]
README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
START, END = "<!-- written by python -m bench report -->", "<!-- end of the report -->"
CALL = "One attention call of the paper's size, forward and backward, fp32, milliseconds:"
PLOTS = ("time.svg", "memory.svg", "error.svg")
ATTENTION_PROBLEMS = ("w32", "jarvis256", "mp128", "bigcell-1000", "bigcell-4000")
IMAGE_PROBLEMS = ("w32", "jarvis256", "mp128")
OURS = (
    "cpu", "cpu-orbits", "cpu-dual-space", "cpu-dual-space-orbits", "cpu-slow-decay", "triton", "triton-orbits",
    "triton-tf32", "triton-graph", "reference",
)  # fmt: skip
COLORS = {
    "cpu": "#2563a8", "triton": "#2563a8", "reference": "#7fa8d1", "triton-tf32": "#4b8bc8", "radial-grid": "#3a9a78",
    "dense": "#d9772b", "edge-list": "#a05195", "paper": "#8a8f98", "paper-cuda": "#8a8f98",
}  # fmt: skip


def write(folder: Path = FOLDER, readme: Path = README, benchmarks: Path = BENCHMARKS) -> None:
    """Puts the tables between the markers of the two pages and the plots into the folder.

    Raises:
        ValueError: if a page has no markers.
    """
    pages = {benchmarks: tables(folder), readme: first_table(folder)}
    texts = {page: page.read_text() for page in pages}
    for page, text in texts.items():
        if text.count(START) != 1 or text.count(END) != 1:
            raise ValueError(f"{page} must hold {START!r} and {END!r}, each once")
    for page, written in pages.items():
        before, rest = texts[page].split(START)
        page.write_text(f"{before}{START}\n\n{written}\n\n{END}{rest.split(END)[1]}")
    plots(folder)


def first_table(folder: Path = FOLDER) -> str:
    """The attention call of the paper's size on the first device, a GPU where one was measured, without the reasons."""
    speed = _rows(folder, "speed")
    rows = _of_device(speed, _devices(speed)[0])
    table = _table([row for row in rows if _attention(row)], ATTENTION_PROBLEMS, "forward and backward")
    return "\n\n".join([_title(rows[0]), CALL, table.split("\n\n")[0]])


def tables(folder: Path = FOLDER) -> str:
    """The tables of all devices as markdown."""
    speed, training = _rows(folder, "speed"), _rows(folder, "training")
    parts = [_device(device, speed, training) for device in _devices(speed)]
    if not any(row["driver"] != "none" for row in speed):
        parts.append(
            "**NVIDIA GPU**: absent, none has been measured yet. `make gpu` on a machine with one, then "
            "`python -m bench report`, adds its rows."
        )
    return "\n\n".join(parts)


def _device(device: str, speed: Sequence[Row], training: Sequence[Row]) -> str:
    speed, training = _of_device(speed, device), _of_device(training, device)
    attention = [row for row in speed if _attention(row)]
    parts = [_title(speed[0]), CALL, _table(attention, ATTENTION_PROBLEMS, "forward and backward")]
    if training:
        parts += [
            "One training step of the paper's model (forward, backward, AdamW), milliseconds; in every row but the "
            "paper's, our network around that attention; `cpu-dual-space` has half of its heads in reciprocal space:",
            _table(training, sorted({row["problem"] for row in training}, key=_order), "step"),
        ]
    reciprocal = [row for row in speed if row["op"] == "reciprocal" and row["size"] == "paper"]
    if reciprocal:
        parts += [
            "One call of reciprocal attention, forward and backward, fp32, milliseconds; `paper-boxN` is the paper's "
            "code with ±N reciprocal cells in the place of ±2:",
            _table(reciprocal, ATTENTION_PROBLEMS, "forward and backward"),
        ]
    alpha = [row for row in speed if row["op"] == "alpha" and row["size"] == "paper"]
    if alpha:
        parts += [
            "alpha alone, lists, forward and backward, milliseconds; `cpu-slow-decay` has decays from 0.002 Å⁻², `cpu` "
            "the paper's, from 0.1275 Å⁻²:",
            _table(alpha, ATTENTION_PROBLEMS, "build, forward and backward"),
        ]
    images = [row for row in speed if row["op"] == "images" and row["size"] == "paper"]
    if images:
        parts += ["Building the image lists, sorted, milliseconds:", _table(images, IMAGE_PROBLEMS, "build")]
    return "\n\n".join(parts)


def _of_device(rows: Sequence[Row], device: str) -> list[Row]:
    return [row for row in rows if row["device"] == device and row["dtype"] == "fp32"]


def _attention(row: Row) -> bool:
    return row["op"] == "attention" and row["size"] == "paper"


def _title(row: Row) -> str:
    """What was measured where and when."""
    gpu = row["driver"] != "none"
    versions = f"torch {row['torch']}" + (f", triton {row['triton']}, driver {row['driver']}" if gpu else "")
    threads = "" if gpu else f", {row['threads']} thread{'s' if row['threads'] != '1' else ''}"
    return f"**{row['device']}**{threads}; {versions}; commit {row['commit']}, {row['date']}."


def _table(rows: Sequence[Row], problems: Iterable[str], direction: str) -> str:
    """Providers down, problems across, then the largest error; below it, why cells are empty."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    found = {(row["provider"], row["problem"]): row for row in rows if row["direction"] == direction and row["ms"]}
    problems = [name for name in problems if any(problem == name for _, problem in found)]
    if not problems:
        return "None was measured."
    timed = [name for name in names if any((name, problem) in found for problem in problems)]
    timed.sort(key=lambda name: float(found[name, problems[0]]["ms"]) if (name, problems[0]) in found else 1e9)
    counts = {row["problem"]: f"{int(row['atoms']):,} atoms" for row in rows}
    lines = ["| |" + "".join(f" {name}, {counts[name]} |" for name in problems) + " error |"]
    lines.append("|---|" + "---|" * (len(problems) + 1))
    for name in timed:
        cells = [found.get((name, problem)) for problem in problems]
        error = max((float(row["error"]) for row in cells if row and row["error"]), default=0.0)
        texts = [_milliseconds(row) if row else "—" for row in cells] + [f"{error:.0e}" if error else "none"]
        lines.append(f"| {f'**`{name}`**' if name in OURS else f'`{name}`'} |" + "".join(f" {t} |" for t in texts))
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["note"] and row["problem"] in problems and (row["provider"], row["problem"]) not in found:
            reasons.setdefault(re.sub(r"^absent: ", "", row["note"]), []).append(f"`{row['provider']}`")
    said = [f"{', '.join(dict.fromkeys(who))}: {why}" for why, who in reasons.items()]
    return "\n".join(lines) + (f"\n\nAbsent: {'; '.join(said)}." if said else "")


def _milliseconds(row: Row) -> str:
    return f"{float(row['ms']):.3g}" if float(row["ms"]) < 1000 else f"{float(row['ms']):.0f}"


def _order(problem: str) -> int:
    return ATTENTION_PROBLEMS.index(problem) if problem in ATTENTION_PROBLEMS else len(ATTENTION_PROBLEMS)


def _rows(folder: Path, command: str) -> list[Row]:
    return [row for file in sorted(folder.glob(f"{command}-*.csv")) for row in read(file)]


def _devices(rows: Iterable[Row]) -> list[str]:
    """GPUs first."""
    drivers = {row["device"]: row["driver"] for row in rows}
    return sorted(drivers, key=lambda device: (drivers[device] == "none", device))


def plots(folder: Path) -> None:
    """Time and memory against the cell's size, and error against tol, as SVG files that depend on the rows alone."""
    import matplotlib

    speed = _rows(folder, "speed")
    cells = [row for row in speed if row["problem"].startswith("bigcell-") and row["size"] == "paper"]
    cells = [row for row in cells if row["direction"] == "forward and backward" and row["dtype"] == "fp32"]
    with matplotlib.rc_context({"svg.hashsalt": "crystalformer", "svg.fonttype": "none", "font.size": 9}):
        _against_cells(folder / PLOTS[0], cells, "ms", "forward and backward (ms)")
        _against_cells(folder / PLOTS[1], cells, "peak_mib", "peak memory (MiB)")
        _error(folder / PLOTS[2], _rows(folder, "error"))


def _figure(file: Path, draw: Callable[..., None]) -> None:
    from matplotlib.figure import Figure

    figure = Figure((5.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e8eb", linewidth=0.6)
    axes.set_axisbelow(True)
    draw(axes)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Date": None, "Creator": None})
    # Trailing spaces of matplotlib's, which editors and git complain about.
    file.write_text(re.sub(r" +$", "", file.read_text(), flags=re.MULTILINE))


def _against_cells(file: Path, rows: Sequence[Row], column: str, label: str) -> None:
    devices = _devices(rows)

    def draw(axes) -> None:
        for device in devices:
            for name in dict.fromkeys(row["provider"] for row in rows if row["device"] == device):
                points = [
                    (int(row["atoms"]), max(float(row[column]), 0.5 if column == "peak_mib" else 0.0))
                    for row in rows
                    if row["device"] == device and row["provider"] == name and row[column]
                ]
                if not points:  # a graph's memory is not measured
                    continue
                style = "o-" if device == devices[0] else "o--"
                title = name if len(devices) == 1 else f"{name}, {device}"
                line = {"markersize": 4, "color": COLORS.get(name), "label": title}
                axes.plot(*zip(*sorted(points), strict=True), style, **line)
        axes.set(xscale="log", yscale="log", xlabel="atoms in the cell", ylabel=label)
        atoms = sorted({int(row["atoms"]) for row in rows})
        axes.set_xticks(atoms, [f"{n:,}" for n in atoms])
        axes.minorticks_off()

    _figure(file, draw)


def _error(file: Path, rows: Sequence[Row]) -> None:
    decay = min((row["decay"] for row in rows), default="")
    rows = [row for row in rows if row["decay"] == decay]

    def draw(axes) -> None:
        for problem, style in zip(dict.fromkeys(row["problem"] for row in rows), ("o-", "s--", "^:"), strict=False):
            mine = [row for row in rows if row["problem"] == problem and row["rule"] == "tol"]
            points = [(float(row["value"]), float(row["max"])) for row in mine]
            axes.plot(*zip(*points, strict=True), style, markersize=4, color="#2563a8", label=f"tol, {problem}")
            for rule, value, color in (("box", 2.0, "#d9772b"), ("adaptive", 3.5, "#8a8f98")):
                there = [r for r in rows if (r["problem"], r["rule"], float(r["value"])) == (problem, rule, value)]
                for row in there:
                    text = {"box": "the paper's box ±2", "adaptive": "the paper's 3.5 sigma"}[rule]
                    dash = {"color": color, "linewidth": 1.2, "linestyle": "-" if style == "o-" else "--"}
                    axes.axhline(float(row["max"]), label=f"{text}, {problem}", **dash)
        ends = [1e-10, 1e-2]
        axes.plot(ends, ends, color="#c9ced6", linewidth=1, zorder=0, label="error = tol")
        axes.set(xscale="log", yscale="log", xlabel="tol", ylabel="largest relative error of an atom")

    _figure(file, draw)
