"""Rows of results: one CSV per command and device, each row with the machine and the versions it was measured with."""

import csv
import datetime
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"
ENVIRONMENT = ("device", "threads", "torch", "triton", "driver", "commit", "date")
Row = dict[str, str]


def environment(device: torch.device) -> dict[str, str]:
    """The columns that say where and with what a row was measured."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return {
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": triton,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.type == "cuda"
        else "none",
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _commit() -> str:
    """The commit, and whether anything but the results differs from it; without a repository, what COMMIT says."""
    git = ("git", "-C", str(FOLDER.parents[1]))
    changed = first_line(*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    found = first_line(*git, "rev-parse", "--short", "HEAD")
    if found == "unknown":
        return os.environ.get("COMMIT", found)
    return found + ("" if changed == "unknown" else "-dirty")


def device_name(device: torch.device) -> str:
    """The name of the GPU or of the CPU, with the best instruction set of its that matters here."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    name = re.search(r"model name\s*:\s*(.*)", text)
    family = re.search(r"cpu family\s*:\s*(\d+)", text)
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{name[1] if name else platform.processor() or platform.machine()}" + (
        f" family {family[1]}, {vectors}" if family else f", {vectors}"
    )


def first_line(*command: str) -> str:
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
        return found[0].strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def path(command: str, device: torch.device, folder: Path) -> Path:
    """The file of a command's results on a device."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return folder / f"{command}-{slug}.csv"


def write(file: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], machine: Mapping[str, str]) -> None:
    """Writes rows, as they come, with the columns and, in each, those of the environment."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        table = csv.DictWriter(out, [*columns, *ENVIRONMENT], restval="", lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({name: _text(value) for name, value in row.items()} | dict(machine))
            out.flush()  # an hour's rows are not lost to an interruption


def read(file: Path) -> list[Row]:
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


def _text(value: Any) -> str:
    if value is None or value != value:  # NaN
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
