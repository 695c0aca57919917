"""What every test may ask for: the folder of real data, and a small number of threads so that runs repeat."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real tokenizers, configs and data slices (environment variable PHI2_SHARED)."""
    if "PHI2_SHARED" not in os.environ:
        pytest.skip("PHI2_SHARED is not set: real tokenizers and data are not here")
    return Path(os.environ["PHI2_SHARED"])
