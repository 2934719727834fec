"""What tests share: backends, a count of waits, NaN in new memory; one thread each, and the seconds of each file."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from waits import Waits
from ways import parameters, ways

import crystalformer as cf

# One thread each, for steady times: several tests run side by side, and start processes of their own.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CRYSTALFORMER_POISON"] = "1"  # scratch memory of the C++ kernels starts as NaN


BACKENDS = "reference,cpu,triton"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backends", default=BACKENDS, help="of these alone the contract is tested")
    parser.addoption("--fuzz-examples", type=int, default=0, help="so many random problems for test_fuzz.py, new ones")


def pytest_configure(config: pytest.Config) -> None:
    wanted = os.environ.get("CRYSTALFORMER_FROM")  # by `make sanitize`
    if wanted and Path(wanted).resolve() not in Path(cf.__file__).resolve().parents:
        raise pytest.UsageError(f"crystalformer must be the one in {wanted}, not {cf.__file__}")
    if (asked := config.getoption("--backends")) != BACKENDS:  # else all their tests would be skipped, and pass
        for name, state in ((name, cf.available_backends()[name]) for name in asked.split(",")):
            if state is not True:
                raise pytest.UsageError(f"--backends {name}: {state}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which files take how long: seconds of all their tests, set-up included, of every process."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    total = seconds.total()
    terminalreporter.section(f"seconds of each file, {total:.0f} in all")
    for file, spent in seconds.most_common():
        if spent >= 0.01 * total:
            terminalreporter.write_line(f"{spent:7.1f}  {file}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives tests of the contract each way in turn, `way`, those of fp32, `single`, or those that are not the reference
    on the CPU, which these are held against, `kernels`; of them one a backend, for lists, which are in fp64 anyway,
    `builder`; and by its name each backend that has fp64, `backend`."""
    found = ways(metafunc.config.getoption("--backends").split(","))
    kernels = [way for way in found if (way.backend, way.device) != ("reference", "cpu")]
    chosen = {
        "way": found,
        "single": [way for way in found if not way.double],
        "kernels": kernels,
        "builder": [way for way in kernels if way.double or way.backend == "triton"],
        "backend": [way for way in found if way.double and way.device == "cpu"],
    }
    marks = metafunc.definition.iter_markers("parametrize")
    own = {name for mark in marks for name in ([mark.args[0]] if isinstance(mark.args[0], str) else mark.args[0])}
    for name in (name for name in chosen if name in metafunc.fixturenames and name not in own):
        metafunc.parametrize(name, parameters(chosen[name], name == "backend"), scope="session")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    mode, tolist = Waits(), Tensor.tolist  # the dispatcher does not see tolist

    def noted(x: Tensor) -> Any:
        mode.found.append("tolist")
        return tolist(x)

    monkeypatch.setattr(Tensor, "tolist", noted)
    return mode


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that a kernel forgets to write are NaN."""
    empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poisoned(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))


@pytest.fixture
def poison_cpp() -> Iterator[None]:
    """The same for tensors that C++ makes: with this mode torch fills every empty one with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
