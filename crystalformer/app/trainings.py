"""A folder with several trainings, done one after another or side by side in processes of their own."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ..common import checks, storage
from ..common.process import PROG, uninterrupted
from ..data.samples import DataError
from ..model.config import CrystalformerConfig
from ..training import Recipe
from .data_source import DataSource
from .fine_tuning import Start
from .metrics import METRICS
from .run_folder import CHECKPOINTS, has_checkpoint, run_folder
from .train import MACHINE, settings_of, train

# What may change when they are resumed.
FREE = (*MACHINE, "jobs", "workers", "cache", "strict")


@dataclass(frozen=True)
class Training:
    """One of several, by what it does not share with the others.

    Attributes:
        out: its folder. Of one in a process of its own, what it prints is in the file beside it that ends in .log.
        source: of its crystals.
        seed: as `train` has it.
    """

    out: Path
    source: DataSource
    seed: int

    @property
    def name(self) -> str:
        """As a user reads it: fold-0, or fold-0/member-1."""
        parent = self.out.parent.name
        return f"{parent}/{self.out.name}" if parent.startswith("fold-") else self.out.name

    @property
    def log(self) -> Path:
        return self.out.with_name(f"{self.out.name}.log")


@contextlib.contextmanager
def folder_of_trainings(out: Path, resume: bool) -> Iterator[None]:
    """As `run_folder`; what is in the folder is kept once one of its trainings has a checkpoint."""
    with run_folder(out, resume, _begun):
        try:
            yield
        except BaseException:
            if not resume and not _begun(out):
                for path in (*out.rglob("*-*.json"), *out.rglob("*-*.log")):
                    path.unlink()
                for path in out.glob("*-*"):
                    with contextlib.suppress(OSError):  # of others
                        path.rmdir()
            raise


def _begun(out: Path) -> bool:
    return any(out.rglob(f"{CHECKPOINTS}/*.ckpt")) or any(out.rglob(f"*-*/{METRICS}"))


def write_settings(path: Path, settings: dict[str, Any], resume: bool) -> None:
    """Writes config.yaml, or compares what it says.

    Raises:
        DataError: for settings that a resumed training cannot change.
    """
    if not resume:
        storage.write(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        return
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if name not in FREE and before.get(name) != value:
            raise DataError(f"{name} must be {before.get(name)}, as when {path.parent} was begun, not {value}")


def train_all(
    trainings: Sequence[Training],
    jobs: int,
    names: tuple[str, ...],
    units: tuple[str, ...],
    recipe: Recipe,
    model: CrystalformerConfig,
    machine: dict[str, Any],
    start: Start | None = None,
) -> None:
    """Does the trainings that are not done; those that are begun go on.

    Args:
        jobs: how many at once, in processes that share this one's threads; 1 for one after another in this process.
        names, units, recipe, model, machine, start: of all of them, as for `train`.

    Raises:
        FloatingPointError: if the loss of one in a process of its own is not finite.
        DataError: if such a process fails otherwise. The others are stopped then.
        Otherwise as `train`.
    """
    waiting = [x for x in trainings if not (x.out / METRICS).exists()]
    if jobs > 1:
        settings = [settings_of(names, units, x.source, recipe, model, x.seed, machine) for x in waiting]
        _train_in_processes(waiting, [x | settings_of_start(start) for x in settings], jobs)
        return
    for x in waiting:
        print(x.name, flush=True)
        resume = has_checkpoint(x.out)
        train(x.out, names, x.source, recipe, model, start=start, unit=units, seed=x.seed, resume=resume, **machine)


def settings_of_start(start: Start | None) -> dict[str, Any]:
    """The options of `crystalformer train` that say which model to start from."""
    if start is None:
        return {}
    return {"from": str(start.folder), "from_sha256": start.sha256, "freeze": list(start.freeze)}


def check_jobs(jobs: int) -> None:
    try:
        checks.check_integer("jobs", jobs, 1, checks.MOST_WORKERS)
    except ValueError as error:
        raise DataError(str(error)) from error


def _train_in_processes(trainings: Sequence[Training], settings: Sequence[dict[str, Any]], jobs: int) -> None:
    # Where this library was imported from, also if that is not installed.
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs)),
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    processes = _Processes(environment)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        try:
            running = {}
            for number, (x, options) in enumerate(zip(trainings, settings, strict=True)):
                config = Path(folder) / f"{number}.yaml"
                config.write_text(yaml.safe_dump(options))
                resume = ["--resume"] if has_checkpoint(x.out) else []
                command = ["train", "--out", str(x.out), "--config", str(config), *resume]
                running[pool.submit(processes.run, x, command)] = x
            for future in as_completed(running):
                _check_end(running[future], future.result())
        except BaseException:
            processes.stop()
            raise


class _Processes:
    """Those that run, each started and waited for in a thread: signals come to the main thread only, so that none
    comes between the start of a process and its entry in the list."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.running: list[subprocess.Popen[bytes]] = []
        self.stopped = False
        self.lock = threading.Lock()

    def run(self, training: Training, command: list[str]) -> int:
        """The exit code of a command of this program, which writes into the log of the training."""
        training.log.parent.mkdir(parents=True, exist_ok=True)
        with self.lock, training.log.open("ab") as log, uninterrupted():
            if self.stopped:
                raise CancelledError
            process = subprocess.Popen(
                [sys.executable, "-m", PROG, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
            )
            self.running.append(process)
        print(f"{training.name} has begun, its log is {training.log}", flush=True)
        return process.wait()

    def stop(self) -> None:
        """Lets no other begin, and those that run end as on SIGTERM: with what their last epoch has written."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()


def _check_end(training: Training, code: int) -> None:
    name = training.name
    if code == 0:
        print(f"{name} is done", flush=True)
        return
    lines = training.log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((x for x in reversed(lines) if x.strip()), "it said nothing").removeprefix(f"{PROG}: ")
    if code < 0:
        raise DataError(f"{name}: its process was ended by {signal.Signals(-code).name}, behind: {last}")
    raise (FloatingPointError if code == 1 else DataError)(f"{name}: {last}")
