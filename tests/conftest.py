"""What all tests share: the backends, and one thread for steady times on a busy machine."""

import pytest
import torch

import crystalformer as cf

torch.set_num_threads(1)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; the tests that take it are the contract that every backend keeps."""
    missing = cf.available_backends()[request.param]
    if missing is not True:
        pytest.skip(f"backend {request.param}: {missing}")
    return request.param
