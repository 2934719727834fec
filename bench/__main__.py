"""The command line: python -m bench COMMAND. Every command takes --smoke, which does all of it on a few atoms."""

import argparse
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import error, gradients, problems, results, speed

CELLS = ("bigcell-20", "bigcell-80", "bigcell-320", "bigcell-1000", "bigcell-4000")
# What `all` measures: operations, problems, sizes, providers (none: all). On a CPU the slow providers
# have the small problems, so that all of it takes a quarter of an hour on two cores.
FAST, SLOW = ("cpu", "cpu-orbits", "radial-grid"), ("reference", "dense", "edge-list")
PLANS: dict[str, list[dict[str, Any]]] = {
    "cpu": [
        {"ops": ("attention", "encoding", "alpha", "reciprocal", "images"), "problems": ("w32",)},
        {"ops": ("attention",), "problems": ("w32",), "sizes": ("simple",)},
        {"ops": ("attention",), "problems": ("w32",), "dtype": "fp64", "providers": ("cpu", "reference")},
        {"ops": ("attention",), "problems": ("jarvis256", "mp128"), "providers": (*FAST, *SLOW[1:])},
        {"ops": ("images",), "problems": ("jarvis256", "mp128")},
        {"ops": ("attention",), "problems": ("tiny", "needle")},
        {"ops": ("attention",), "problems": CELLS[:2], "providers": (*FAST, *SLOW, "paper")},
        {"ops": ("attention",), "problems": CELLS[2:4], "providers": (*FAST, *SLOW)},
        {"ops": ("attention",), "problems": CELLS[4:], "providers": (*FAST, *SLOW[1:])},
    ],
    "cuda": [
        {"ops": ("attention", "encoding", "images", "reciprocal"), "problems": ("w32",)},
        {
            "ops": ("reciprocal",),
            "problems": ("jarvis256", "mp128", "bigcell-320"),
            "providers": ("triton", "reference"),
        },
        {"ops": ("attention",), "problems": ("w32",), "sizes": ("simple",)},
        {
            "ops": ("attention",),
            "problems": ("jarvis256", "mp128", "tiny", "needle", *CELLS),
            "providers": (
                "triton",
                "triton-orbits",
                "triton-tf32",
                "triton-bf16",
                "triton-graph",
                "radial-grid",
                *SLOW,
                "paper",
                "paper-cuda",
            ),
        },
    ],
}
STEPS: dict[str, list[dict[str, Any]]] = {
    "cpu": [{"problems": ("w32",)}, {"problems": ("jarvis256",), "providers": FAST}],
    "cuda": [{"problems": ("w32", "jarvis256", "mp128")}],
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Speed, memory and exactness, side by side.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("speed", "times and memory of the operators and of building images"),
        ("memory", "peak memory alone"),
        ("training", "times and memory of training steps"),
        ("forces", "times of training steps with forces on the CPU, and what second derivatives take of them"),
        ("gradients", "errors of all outputs and gradients against fp64; exit code 1 if a bound is broken"),
        ("error", "error against the cutoff and the tolerance"),
        ("all", "everything above, as docs/benchmarks.md has it"),
        ("report", "tables and plots of docs/benchmarks.md and README, from the results"),
    ):
        _arguments(commands.add_parser(name, help=what, description=what), name)
    options = parser.parse_args(arguments)
    if options.command == "report":
        from . import report

        report.write(options.out)
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.command == "all":
        return _all(options)
    if options.command == "gradients":
        return _gradients(options, options.problems[0])
    if options.command == "forces":
        from . import forces  # which needs what trainings need

        return _save(options, "forces", forces.COLUMNS, forces.measure(options.seconds, options.smoke))
    if options.command == "error":
        return _save(options, "error", error.COLUMNS, error.measure(tuple(options.problems), options.smoke))
    ops = {"training": ["training"]}.get(options.command) or options.ops
    plan = {"ops": ops, "problems": options.problems, "sizes": options.sizes, "providers": options.providers}
    plan |= {"dtype": options.dtype}
    return _speed(options, options.command, [plan])


def _arguments(parser: argparse.ArgumentParser, command: str) -> None:
    parser.add_argument("--out", type=Path, default=None, help="folder for the CSV; none is written without")
    if command == "report":
        parser.set_defaults(out=results.FOLDER)
        return
    parser.add_argument("--smoke", action="store_true", help="a few atoms and one turn, to test this program")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch on the CPU (torch's own choice)")
    if command in ("speed", "memory", "training", "gradients", "all"):
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    if command in ("gradients", "all"):
        parser.add_argument("--repeat", type=int, default=20, help="runs that must give the same bits (%(default)s)")
    if command in ("speed", "training", "forces", "all"):
        parser.add_argument("--seconds", type=float, default=1.0, help="to time each call for (%(default)s)")
    if command in ("all", "forces"):
        return
    known = f"{', '.join(problems.NAMES)}, bigcell-N or a file of crystals"
    default = {"memory": CELLS[:4], "error": ("w32", "needle")}.get(command, ("w32",))
    parser.add_argument("--problems", nargs="+", default=list(default), help=f"of {known}")
    if command in ("speed", "memory", "training"):
        parser.add_argument("--providers", nargs="+", default=[], help="by name (all)")
        parser.add_argument("--sizes", nargs="+", default=["paper"], choices=problems.SIZES)
        parser.add_argument("--dtype", default="fp32", choices=speed.DTYPES)
    if command in ("speed", "memory"):
        ops = ("attention", "encoding", "alpha", "reciprocal", "images")
        parser.add_argument("--ops", nargs="+", default=list(ops if command == "speed" else ops[:1]), choices=ops)


def _speed(options: argparse.Namespace, name: str, plans: Iterable[Mapping[str, Any]]) -> int:
    seconds = 0.0 if name == "memory" else options.seconds

    def rows() -> Iterable[dict[str, Any]]:
        for plan in plans:
            if options.smoke:
                plan = {**plan, "sizes": ("smoke",), "seconds": min(seconds, 1e-3)}
            yield from speed.measure(
                speed.Plan(**{"seconds": seconds, **plan}, device=options.device, smoke=options.smoke)
            )

    return _save(options, name, speed.COLUMNS, rows())


def _gradients(options: argparse.Namespace, problem: str) -> int:
    size = "smoke" if options.smoke else "paper"
    broken: list[str] = []

    def rows() -> Iterable[dict[str, Any]]:
        for row in gradients.measure(problem, size, options.device, options.repeat, options.smoke):
            yield row
            if not row.get("ok", True):
                name = " ".join(row[part] for part in ("op", "backend", "dtype", "precision"))
                what = "result" in row and f"{row['result']}: {row['error']:.1e}, more than {row['bound']:.0e}"
                broken.append(f"{name} {what or row['note']}")

    _save(options, "gradients", gradients.COLUMNS, rows())
    for line in broken:
        print(f"BROKEN: {line}")
    return 1 if broken else 0


def _all(options: argparse.Namespace) -> int:
    """Runs every part, also after one has failed; 1 if a bound is broken or a part failed."""
    kind = torch.device(options.device).type
    parts = [lambda: _gradients(options, "w32")]
    if kind == "cpu":
        parts.append(lambda: _save(options, "error", error.COLUMNS, error.measure(smoke=options.smoke)))
    parts.append(lambda: _speed(options, "speed", PLANS[kind]))
    parts.append(lambda: _speed(options, "training", [{"ops": ("training",), **plan} for plan in STEPS[kind]]))
    code = 0
    for part in parts:
        try:
            code |= part()
        except Exception:
            traceback.print_exc()
            code = 1
    return code


def _save(options: argparse.Namespace, command: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> int:
    device = torch.device(getattr(options, "device", "cpu"))
    machine = results.environment(device)
    if options.out:
        file = results.path(command, device, options.out)
        results.write(file, columns, rows, machine)
        print(f"written: {file}")
    else:
        for _ in rows:
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
