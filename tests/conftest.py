"""What tests share: the backends, a count of waits, NaN in new memory; one thread, for steady times."""

from typing import Any

import pytest
import torch
from torch import Tensor
from waits import Waits

import crystalformer as cf

torch.set_num_threads(1)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; the tests that take it are the contract that every backend keeps."""
    missing = cf.available_backends()[request.param]
    if missing is not True:
        pytest.skip(f"backend {request.param}: {missing}")
    return request.param


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
