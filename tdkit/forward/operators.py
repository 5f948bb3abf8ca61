"""Seeing every operator of torch that runs, without importing torch's compiler."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorMode(TorchDispatchMode):
    """What a mode that defines ``__torch_dispatch__`` is derived from.

    The one of torch imports the compiler when it is first entered, which takes a second.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # To be left out of compiled code it would have to import the compiler.
        return False
