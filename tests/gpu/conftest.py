"""These need a GPU; elsewhere they are skipped."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
