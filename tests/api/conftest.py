"""What the tests of the public functions share."""

from __future__ import annotations

import pytest
from small_cnn import network
from torch import nn


@pytest.fixture
def model() -> nn.Sequential:
    """A small network, the same each time."""
    return network()
