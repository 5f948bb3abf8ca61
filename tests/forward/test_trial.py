"""Running a model leaves no trace, whatever mode of torch its tensors were made in."""

import torch
from torch import nn

from tdkit.forward.trial import buffer_watch, trial


def test_buffers_made_in_inference_mode_come_back() -> None:
    with torch.inference_mode():
        norm = nn.BatchNorm1d(3)
        with trial(norm, training=True):
            is_written = buffer_watch(norm)
            assert not is_written()
            norm(torch.randn(8, 3) + 1)
            assert is_written()
        assert norm.running_mean is not None
        assert torch.equal(norm.running_mean, torch.zeros(3))
        assert norm.num_batches_tracked is not None
        assert int(norm.num_batches_tracked) == 0
