import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Small tensors: more threads only wait for each other.
    torch.set_num_threads(1)
