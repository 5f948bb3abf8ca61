"""Every command and every Python block of the README runs, in order, as a reader would run them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.transforms.functional import to_pil_image

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line]

MY_NET = """
from torch import nn
from torchvision.transforms.functional import to_pil_image

class MyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.body = nn.Conv2d(24, 48, 3, padding=1)
        self.head = nn.Linear(48, 5)

    def forward(self, images):
        return self.head(self.body(self.stem(images).relu()).relu().mean((2, 3)))

def create():
    return MyNet()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader would have: a model of theirs, its weights, and a folder of images."""
    path = tmp_path_factory.mktemp("reader")
    (path / "mynet.py").write_text(MY_NET)
    script = "import torch, mynet; m = mynet.create(); torch.save(m, 'mynet.pt');"
    script += "torch.save(m.state_dict(), 'weights.pt')"
    subprocess.run([sys.executable, "-c", script], cwd=path, check=True)
    torch.save(classifier(), path / "model.pt")
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (path / "val" / name).mkdir(parents=True)
        for i in range(2):
            image = torch.randint(0, 256, (3, 40, 40), generator=generator, dtype=torch.uint8)
            to_pil_image(image).save(path / "val" / name / f"{i}.png")
    return path


def classifier() -> nn.Module:
    """A small one for photographs of two classes, in torch's own layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 7, stride=4),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(48, 2),
        )


def test_the_readme_names_the_two_make_targets() -> None:
    for target in ("test", "demo"):
        assert f"    make {target}\n" in README
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, folder: Path) -> None:
    program, *arguments = shlex.split(command)
    if program == "pip":
        # The test environment has it installed already; an install would need a network.
        assert (ROOT / arguments[-1] / "pyproject.toml").exists()
        return
    assert program == "tdkit"
    line = [sys.executable, "-m", "tdkit", *(a for a in arguments if a != ">")]
    output = None
    if ">" in arguments:
        output = line.pop()
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if output:
        (folder / output).write_text(done.stdout)


def test_python_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [block for kind, block in BLOCKS if kind == "python"]
    assert blocks
    for block in blocks:
        exec(block, {"model": classifier()})


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert "://" in target or (ROOT / target).exists()
