"""Run the command line in-process, on toy models that are compressed within milliseconds."""

from __future__ import annotations

import re
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from tdkit.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TOY_PLUGIN = """
from tdkit.hookspecs import DatasetRecord, ModelRecord, hookimpl


def model(in_channels=1, num_classes=10):
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, num_classes),
    )


def data(root=None, path=None, image_size=None, seed=0):
    import torch

    from tdkit.datasets.base import in_memory_dataset

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 1, 12, 12), generator=generator, dtype=torch.uint8)
    part = images, torch.arange(60) % 10
    return in_memory_dataset("toy-data", tuple("abcdefghij"), part, part, seed)


@hookimpl
def tdkit_models():
    return [ModelRecord("toy-net", "two convolutions", model, (1, 12, 12), 10)]


@hookimpl
def tdkit_datasets():
    return [DatasetRecord("toy-data", "sixty images of noise", data)]
"""


@dataclass(frozen=True)
class Done:
    """What a run of the command line left behind."""

    status: int
    stdout: str
    stderr: str


@pytest.fixture
def tdkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Done]]:
    """Run ``tdkit`` with some arguments in an empty folder; check what always holds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        typed = [str(argument) for argument in arguments]
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            main(typed)
        out, err = (re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text) for text in capsys.readouterr())
        done = Done(int(ended.value.code or 0), out, err)
        assert "--debug" in typed or "Traceback" not in err
        assert ("\nerror: " in f"\n{err}") == (0 < done.status < 128) or "Usage: " in err
        assert done.status == 0 or err, "a failure without a word on stderr"
        assert not [*tmp_path.rglob(".tdkit-*")], "a temporary file is left"
        return done

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Install a plugin: a module and a dist-info folder on the path, as pip leaves them."""
    modules = []

    def install(name: str, source: str, version: str = "1.2") -> Path:
        module = name.replace("-", "_")
        site = tmp_path / "site" / name
        info = site / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[tdkit]\n{name} = {module}\n")
        monkeypatch.syspath_prepend(str(site))
        modules.append(module)
        return site

    yield install
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def toy_plugin(install: Callable[..., Path]) -> Path:
    """A plugin with the model ``toy-net`` and the data ``toy-data``."""
    return install("tdkit-toy", TOY_PLUGIN)


def toy_model(seed: int = 0) -> nn.Sequential:
    """3 + 1 weight layers, 3,738 parameters, for inputs of 1 x 12 x 12."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        )
    return model.eval()


@pytest.fixture
def toy(tmp_path: Path) -> nn.Sequential:
    """The model that lies in ``toy.pt``, saved whole."""
    model = toy_model()
    torch.save(model, tmp_path / "toy.pt")
    return model


@pytest.fixture
def images() -> torch.Tensor:
    """Three inputs of the toy model."""
    return torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(1))
