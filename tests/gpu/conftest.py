"""Where the tests of this folder run: a GPU, or with ``--device cpu`` a dry run on the CPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that was asked for; without one the test is skipped."""
    if request.config.getoption("--device") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here; --device cpu tries what can be tried without one")
    return torch.device("cuda", torch.cuda.current_device())
