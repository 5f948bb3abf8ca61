"""Where a training keeps its state to go on after an interruption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdkit.errors import UnreadableFileError, UsageError, option

if TYPE_CHECKING:
    from tdkit.training.loop import TrainingState


@dataclass(frozen=True)
class Resume:
    """The file that a training writes after every epoch, and goes on from where it exists.

    Attributes:
        path: The file.
        made_by: What the training depends on: a name for each thing, and a text that changes
            when it does. A file with other texts is refused.
    """

    path: Path
    made_by: Mapping[str, str]

    def read(self) -> TrainingState | None:
        """What an earlier run left; None where there is no file.

        Raises:
            UnreadableFileError: If it is another kind of file.
            UsageError: If it belongs to another training.
        """
        import torch

        if not self.path.exists():
            return None
        try:
            saved: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            made_by, state = dict(saved["made_by"]), saved["state"]
        except Exception as error:  # torch raises a different error for every kind of damage
            raise UnreadableFileError(
                f"{self.path} is not a state that a training of tdkit wrote",
                f"remove it, or leave out {option('resume')}",
            ) from error
        for name, text in self.made_by.items():
            if made_by.get(name) != text:
                raise UsageError(
                    f"{self.path} belongs to another {name}, or to an earlier version of this one",
                    f"remove it, or name another file with {option('resume')}",
                )
        result: TrainingState = state
        return result

    def write(self, state: TrainingState) -> None:
        """Keep the state of a training in the place of the one before.

        Raises:
            StorageError: If the file cannot be written.
        """
        import torch

        from tdkit.checkpoint import atomic_write

        # Of a path without a suffix torch makes no archive.
        with atomic_write(self.path, force=True) as temporary, temporary.open("wb") as file:
            torch.save({"made_by": dict(self.made_by), "state": state}, file)
