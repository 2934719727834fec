"""What the tests of the contract share: results that a kernel forgets to write are NaN."""

import pytest

POISON = {"cpu": "poison_cpp", "triton": "poison"}


@pytest.fixture(autouse=True)
def _poisoned(request: pytest.FixtureRequest) -> None:
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    for way in (params[name] for name in ("way", "single", "kernels", "builder") if name in params):
        if way.backend in POISON:
            request.getfixturevalue(POISON[way.backend])
