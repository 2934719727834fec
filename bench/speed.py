"""Time and memory of every provider on every problem, side by side: `speed`, `memory` and `training`."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .cases import Absent, Case, Provider, truth
from .formulas import COUNTED_TILE, Roof, issue_percent, issue_rate, measure_roof, work
from .measure import alternate, captured, peak_memory
from .problems import Problem, make
from .providers import PROVIDERS
from .verify import Wrong, verify

COLUMNS = (
    "op", "problem", "size", "dtype", "provider", "direction", "ms", "p20", "p80", "runs", "peak_mib", "crystals",
    "atoms", "images", "images_per_s", "gflop", "mbyte", "roofline_percent", "issue_percent", "error", "bound", "note",
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        ops, problems, sizes: every combination of these.
        providers: names, or none for all.
        seconds: for each call (see `alternate`); 0 to take the memory alone.
    """

    ops: Sequence[str]
    problems: Sequence[str]
    sizes: Sequence[str] = ("paper",)
    providers: Sequence[str] = ()
    dtype: str = "fp32"
    device: str = "cpu"
    seconds: float = 1.0
    smoke: bool = False


def measure(plan: Plan) -> Iterator[dict[str, Any]]:
    """Rows of COLUMNS, printed as they come."""
    roof = measure_roof(torch.device(plan.device), plan.smoke) if plan.seconds else None
    for problem in plan.problems:
        for size in plan.sizes:
            x = make(problem, size, DTYPES[plan.dtype], plan.device, plan.smoke)
            for op in plan.ops:
                for row in _measure(x, op, plan, roof):
                    print(_line(row), flush=True)
                    yield row


def _measure(x: Problem, op: str, plan: Plan, roof: Roof | None) -> Iterator[dict[str, Any]]:
    about = {
        "op": op, "problem": x.name, "size": x.size_name, "dtype": plan.dtype, "crystals": x.crystals.num_crystals,
        "atoms": x.crystals.num_atoms, "images": x.images.num_images,
    }  # fmt: skip
    chosen = [p for p in PROVIDERS if p.op == op and (not plan.providers or p.name in plan.providers)]
    exact = None
    cases: dict[str, tuple[Provider, Case, float]] = {}
    for provider in chosen:
        said = about | {"provider": provider.name, "bound": provider.bound}
        try:
            case = provider.prepare(x)
            if case.truth is None and exact is None:
                exact = truth(x, op)
            if provider.graph:
                case = replace(case, calls={name: captured(call) for name, call in case.calls.items()})
            expected = case.truth() if case.truth else exact or {}
            results = list(case.calls.values()) if provider.graph else [case.results]
            error = max(verify(provider, call(), expected) for call in results)
            cases[provider.name] = (provider, case, error)
        except Absent as reason:
            yield said | {"note": f"absent: {reason}"}
        except Wrong as reason:
            yield said | {"note": f"not timed: {reason}"}
        except Exception as error:  # another library's failure is a result, too
            yield said | {"note": _failure(error)}
    exact = None
    failed: dict[tuple[str, str], str] = {}
    calls = {
        (name, direction): _guarded((name, direction), call, failed, provider.replays)
        for name, (provider, case, _) in cases.items()
        for direction, call in case.calls.items()
    }
    times = alternate(calls, x.device, plan.seconds) if plan.seconds else {}
    for (name, direction), call in calls.items():
        provider, case, error = cases[name]
        row = about | {"provider": name, "direction": direction, "bound": provider.bound, "error": error}
        row["peak_mib"] = math.nan if provider.graph else peak_memory(call, x.device)  # a graph has its memory already
        if why := failed.get((name, direction)):
            yield about | {"provider": name, "direction": direction, "bound": provider.bound, "note": why}
            continue
        if spent := times.get((name, direction)):
            spent = [time / provider.replays for time in spent]
            row |= _times(x, op, direction, spent, roof)
            instructions = provider.instructions.get(direction)
            on_gpu = x.size_name == "paper" and x.device.type == "cuda"
            if instructions and on_gpu and x.tiles.shape == COUNTED_TILE:
                row["issue_percent"] = issue_percent(x, instructions, row["ms"], issue_rate(x.device))
        yield row
    for name, (provider, case, _) in cases.items():
        for direction, note in case.notes.items():
            said = {"provider": name, "direction": direction, "bound": provider.bound}
            yield about | said | {"note": f"absent: {note}"}


def _guarded(
    key: tuple[str, str], call: Callable[[], object], failed: dict[tuple[str, str], str], repeat: int
) -> Callable[[], object]:
    """The call, `repeat` times, or once it has failed nothing: the others go on."""

    def run() -> None:
        if key in failed:
            return
        try:
            for _ in range(repeat):
                call()
        except Exception as error:
            failed[key] = _failure(error)

    return run


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _times(x: Problem, op: str, direction: str, spent: list[float], roof: Roof | None) -> dict[str, Any]:
    low, *_, high = statistics.quantiles(spent, n=5, method="inclusive") if len(spent) > 1 else (spent[0], spent[0])
    median = statistics.median(spent)
    row = {"ms": median, "p20": low, "p80": high, "runs": len(spent)}
    row["images_per_s"] = 1e3 * x.images.num_images / median
    needed = work(x, op, direction)
    if needed and roof:
        row |= {"gflop": needed.flops / 1e9, "mbyte": needed.bytes / 1e6}
        row["roofline_percent"] = 1e5 * needed.seconds(roof) / median
    return row


def _line(row: dict[str, Any]) -> str:
    what = f"{row['op']:10} {row['problem']:13} {row['size']:6} {row['provider']:15} {row.get('direction', ''):27}"
    if "note" in row:
        return f"{what} {row['note']}"
    ms = f"{row['ms']:10.3f} ms" if "ms" in row else ""
    share = f"{row['roofline_percent']:6.1f} %" if "roofline_percent" in row else ""
    return f"{what} {ms} {row['peak_mib']:8.0f} MiB {share} error {row['error']:.0e}"
