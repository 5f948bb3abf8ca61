"""Outputs: the section "Output" of bad-inputs.md, and that what is written loads again."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from tdkit.checkpoint import (
    FORMATS,
    LoadedModel,
    atomic_write,
    check_writable,
    default_format,
    load_into,
    load_model,
    save_model,
)
from tdkit.errors import StorageError, UnreadableFileError, UnsupportedError, UsageError
from tdkit.hookspecs import ModelRecord
from tdkit.layers.chains import OWN_STAGES
from tdkit.layers.spec import spec_of
from tdkit.layers.stages import Flatten, Permute, Stage, Unflatten, is_int

ROOT = Path(__file__).parents[2]
SUFFIXES = {
    "module": ".pt",
    "state-dict": ".pt",
    "safetensors": ".safetensors",
    "onnx": ".onnx",
    "pt2": ".pt2",
}
WEIGHTS = ["module", "state-dict", "safetensors"]
PLAN = {"budget": 0.5, "moves": [{"layer": "conv2", "rank": [2, 3]}]}

Models = dict[str, ModelRecord]


@pytest.fixture
def compressed(models: Models) -> nn.Module:
    """The tiny model with two layers replaced by sequences, as compressing leaves it."""
    model = models["tiny"].create(in_channels=3, num_classes=7)
    assert isinstance(model, nn.Sequential)
    model._modules["conv2"] = nn.Sequential(
        nn.Conv2d(4, 2, 1, bias=False), nn.Conv2d(2, 3, 3, 2, bias=False), nn.Conv2d(3, 8, 1)
    )
    model._modules["head"] = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 7))
    return model.eval()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "out.pt"


def description(model: nn.Module) -> dict[str, Any]:
    return {
        "plan": PLAN,
        "structure": {
            name: [spec_of(stage) for stage in model.get_submodule(name)]  # type: ignore[union-attr]
            for name in ("conv2", "head")
        },
        "arch": "tiny",
        "input_shape": (3, 8, 8),
        "arch_options": {"in_channels": 3, "num_classes": 7},
    }


def assert_equal(model: nn.Module, expected: nn.Module) -> None:
    assert str(model) == str(expected)
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert all(found[name].dtype == value.dtype for name, value in wanted.items())


def only_file(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is written loads again


@pytest.mark.parametrize("format", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_bit_equal(
    tmp_path: Path, compressed: nn.Module, models: Models, format: str, dtype: torch.dtype
) -> None:
    compressed.to(dtype)
    file = tmp_path / f"out{SUFFIXES[format]}"
    save_model(compressed, file, format=format, **description(compressed))
    loaded = load_model(file, models=models)
    assert_equal(loaded.model, compressed)
    inputs = torch.randn(2, 3, 8, 8, dtype=dtype)
    assert torch.equal(loaded.model(inputs), compressed(inputs))
    assert loaded.format == format
    assert loaded.plan == PLAN
    assert loaded.arch == "tiny"
    assert loaded.input_shape == (3, 8, 8)
    assert loaded.arch_options == {"in_channels": 3, "num_classes": 7}
    structure = description(compressed)["structure"]
    assert loaded.structure == {name: tuple(specs) for name, specs in structure.items()}
    assert only_file(tmp_path) == [file.name]


@pytest.mark.parametrize("format", ["module", "state-dict"])
def test_written_twice_is_the_same_file(tmp_path: Path, compressed: nn.Module, format: str) -> None:
    for name in ("one.pt", "two.pt"):
        save_model(compressed, tmp_path / name, format=format, **description(compressed))
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()


@pytest.mark.parametrize("format", ["state-dict", "safetensors"])
def test_without_an_architecture_the_shapes_tell(
    file: Path, compressed: nn.Module, models: Models, format: str
) -> None:
    known = description(compressed)
    save_model(compressed, file, format=format, structure=known["structure"])
    loaded = load_model(file, models=models)
    assert loaded.arch == "tiny"
    assert_equal(loaded.model, compressed)


@pytest.mark.parametrize("format", WEIGHTS)
def test_load_into_rebuilds_the_layers(
    file: Path, compressed: nn.Module, models: Models, format: str
) -> None:
    known = description(compressed)
    save_model(compressed, file, format=format, structure=known["structure"], plan=PLAN)
    mine = models["tiny"].create(in_channels=3, num_classes=7)
    mine.get_submodule("head").eval()
    loaded = load_into(mine, file)
    assert_equal(mine, compressed)
    assert mine.get_submodule("conv2.0").training
    assert not mine.get_submodule("head.0").training
    assert loaded.plan == PLAN
    assert loaded.model is mine
    assert torch.equal(mine.eval()(torch.ones(1, 3, 8, 8)), compressed(torch.ones(1, 3, 8, 8)))


def test_a_layer_compressed_twice(file: Path, compressed: nn.Module, models: Models) -> None:
    known = description(compressed)
    inner = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 7))
    compressed.get_submodule("head")._modules["1"] = inner
    structure = {"head.1": [spec_of(stage) for stage in inner], **known["structure"]}
    with pytest.raises(UsageError, match="the structure says that head is a sequence"):
        save_model(compressed, file, format="state-dict", structure=known["structure"])
    save_model(compressed, file, format="state-dict", **{**known, "structure": structure})
    loaded = load_model(file, models=models)
    assert_equal(loaded.model, compressed)
    assert loaded.structure.keys() == structure.keys()


class Twice(nn.Module):
    """One layer under two names, and two layers with one weight."""

    def __init__(self, **_: int) -> None:
        super().__init__()
        self.one = self.two = nn.Linear(4, 4)
        self.encode = nn.Linear(4, 4, bias=False)
        self.decode = nn.Linear(4, 4, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(self.two(self.one(x))))


@pytest.mark.parametrize("format", WEIGHTS)
def test_shared_modules_and_tied_weights(file: Path, format: str) -> None:
    model = Twice().eval()
    model.one = model.two = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4))
    models = {"twice": ModelRecord("twice", "", Twice, (4,), 4)}
    structure = {"one": [spec_of(stage) for stage in model.one]}
    save_model(model, file, format=format, structure=structure, arch="twice")
    if format == "module":
        return
    loaded = load_model(file, models=models).model
    assert loaded.one is loaded.two
    assert loaded.encode.weight is loaded.decode.weight
    assert torch.equal(loaded(torch.ones(2, 4)), model(torch.ones(2, 4)))
    if format == "safetensors":
        size = 4 * sum(p.numel() for p in model.parameters())
        with safetensors.safe_open(file, framework="pt") as opened:
            assert sum(opened.get_tensor(key).numel() * 4 for key in opened.keys()) == size  # noqa: SIM118
        other = Twice()
        other.one = other.two = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4))
        # Older releases say it in sets, newer ones in lists.
        assert not any(safetensors.torch.load_model(other, file))


def test_views_of_one_storage_in_safetensors(file: Path) -> None:
    model = nn.Module()
    whole = torch.arange(12.0)
    model.register_buffer("first", whole[:6].reshape(2, 3).T)
    model.register_buffer("all", whole)
    model.register_buffer("none", torch.empty(0))
    model.register_buffer("nothing", torch.empty(0))
    save_model(model, file, format="safetensors")
    found = safetensors.torch.load_file(file)
    assert found.keys() == {"first", "all", "none", "nothing"}
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_a_whole_model_loads_with_plain_torch_elsewhere(file: Path, compressed: nn.Module) -> None:
    """In a process without tdkit, with only torch's own classes allowed."""
    save_model(compressed, file, format="module", **description(compressed))
    code = f"""
import sys, torch
from torch import nn
classes = [nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten,
           nn.Linear, set]
with torch.serialization.safe_globals(classes):
    model = torch.load({str(file)!r}, weights_only=True)
torch.save(model(torch.ones(1, 3, 8, 8)), {str(file.with_suffix(".out"))!r})
assert "tdkit" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=file.parent)
    found = torch.load(file.with_suffix(".out"), weights_only=True)
    assert torch.equal(found, compressed(torch.ones(1, 3, 8, 8)))


def test_a_state_dict_loads_with_plain_torch(file: Path, compressed: nn.Module) -> None:
    save_model(compressed, file, format="state-dict", **description(compressed))
    found = torch.load(file, weights_only=True)
    compressed.load_state_dict(found["state_dict"])
    assert json.loads(found["tdkit"])["plan"] == PLAN


def test_safetensors_loads_with_plain_safetensors(file: Path, compressed: nn.Module) -> None:
    compressed.to(memory_format=torch.channels_last)
    save_model(compressed, file, format="safetensors", **description(compressed))
    compressed.load_state_dict(safetensors.torch.load_file(file))


@pytest.mark.parametrize("batch", [1, 5])
def test_onnx(tmp_path: Path, compressed: nn.Module, batch: int) -> None:
    runtime = pytest.importorskip("onnxruntime")
    file = tmp_path / "out.onnx"
    save_model(compressed, file, format="onnx", input_shape=(3, 8, 8))
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    inputs = torch.randn(batch, 3, 8, 8)
    (found,) = session.run(None, {"input": inputs.numpy()})
    assert torch.allclose(torch.from_numpy(found), compressed(inputs), atol=1e-5)
    assert only_file(tmp_path) == ["out.onnx"]


class Expanding(nn.Module):
    """Puts a token before each sequence, by the batch size as a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Parameter(torch.ones(1, 1, 8)), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.token.expand(len(x), -1, -1), x], 1))


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_batch_that_the_model_reads_as_a_number_stays_free(tmp_path: Path, format: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, inputs = Expanding().eval(), torch.ones(5, 3, 8)
    file = tmp_path / f"out.{format}"
    save_model(model, file, format=format, input_shape=(3, 8))
    if format == "onnx":
        (found,) = runtime.InferenceSession(file).run(None, {"input": inputs.numpy()})
    else:
        found = torch.export.load(file).module()(inputs).detach()
    torch.testing.assert_close(torch.as_tensor(found), model(inputs).detach())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_pt2_and_the_models_own_modes(tmp_path: Path, compressed: nn.Module) -> None:
    compressed.train()
    compressed.get_submodule("norm1").eval()
    before = [module.training for module in compressed.modules()]
    file = tmp_path / "out.pt2"
    save_model(compressed, file, format="pt2", input_shape=(3, 8, 8))
    assert [module.training for module in compressed.modules()] == before
    program = torch.export.load(file).module()
    compressed.eval()
    for batch in (1, 5):
        inputs = torch.randn(batch, 3, 8, 8)
        assert torch.allclose(program(inputs), compressed(inputs), atol=1e-6)


# Requests that cannot be met


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_exports_need_the_shape_of_the_input(
    file: Path, compressed: nn.Module, format: str
) -> None:
    with pytest.raises(UsageError, match=f"the format {format} needs the shape") as caught:
        save_model(compressed, file, format=format)
    assert "input_shape=(3, 224, 224)" in str(caught.value.hint)


def test_onnx_without_its_packages(
    file: Path, compressed: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    with pytest.raises(UsageError, match="needs the package onnxscript") as caught:
        save_model(compressed, file, format="onnx", input_shape=(3, 8, 8))
    assert caught.value.hint == "pip install 'tdkit[onnx]'"
    assert only_file(file.parent) == []


def test_an_unknown_format(file: Path, compressed: nn.Module) -> None:
    with pytest.raises(UsageError, match="unknown format keras") as caught:
        save_model(compressed, file, format="keras")
    assert caught.value.hint == f"choose from: {', '.join(FORMATS)}"


@pytest.mark.parametrize("name", ["conv1", "relu1", "nothing"])
def test_a_structure_of_another_model(file: Path, compressed: nn.Module, name: str) -> None:
    with pytest.raises(UsageError, match=f"the structure says that {name} is a sequence"):
        save_model(compressed, file, format="module", structure={name: [spec_of(nn.Linear(1, 1))]})


def test_a_structure_of_other_sizes(file: Path, compressed: nn.Module) -> None:
    specs = [spec_of(nn.Linear(8, 3, bias=False)), spec_of(nn.Linear(3, 7))]
    with pytest.raises(UsageError, match="the structure says that head is a sequence"):
        save_model(compressed, file, format="module", structure={"head": specs})


def test_a_plan_that_is_no_json(file: Path, compressed: nn.Module) -> None:
    with pytest.raises(UsageError, match="the plan cannot be stored as JSON"):
        save_model(compressed, file, format="module", plan={"a": torch.ones(1)})


class Local(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.activation = lambda x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return self.layer(x)
        return x


@pytest.mark.parametrize(
    ("format", "other"), [("module", "state-dict"), ("pt2", "module"), ("onnx", "module")]
)
def test_a_model_that_a_format_cannot_hold(tmp_path: Path, format: str, other: str) -> None:
    file = tmp_path / f"out{SUFFIXES[format]}"
    with pytest.raises(UnsupportedError, match=f"cannot be written as {format}") as caught:
        save_model(Local(), file, format=format, input_shape=(2,))
    assert f"format={other!r}" in str(caught.value.hint)
    assert "\n" not in str(caught.value)
    assert only_file(tmp_path) == []
    save_model(Local(), file, format="state-dict")


# Cases 69 to 74


def by_its_name(source: Path) -> Path:
    return source


def by_another_spelling(source: Path) -> Path:
    return source.parent / ".." / source.parent.name / source.name


def by_a_symlink(source: Path) -> Path:
    link = source.parent / "link.pt"
    link.symlink_to(source)
    return link


def by_a_hard_link(source: Path) -> Path:
    link = source.parent / "hard.pt"
    os.link(source, link)
    return link


def by_a_symlinked_folder(source: Path) -> Path:
    folder = source.parent.parent / "folder"
    folder.symlink_to(source.parent)
    return folder / source.name


@pytest.mark.parametrize(
    "spell",
    [by_its_name, by_another_spelling, by_a_symlink, by_a_hard_link, by_a_symlinked_folder],
    ids=lambda spell: spell.__name__,
)
def test_the_input_is_never_replaced(tmp_path: Path, compressed: nn.Module, spell: Any) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    source = folder / "in.pt"
    source.write_bytes(b"precious")
    output = spell(source)
    with pytest.raises(StorageError, match="is the input itself"):
        save_model(compressed, output, format="module", force=True, inputs=[source])
    with pytest.raises(StorageError, match="is the input itself"):
        check_writable(output, force=True, inputs=[str(source)])
    assert source.read_bytes() == b"precious"


def test_a_registered_name_as_input_is_no_file(file: Path) -> None:
    check_writable(file, inputs=["resnet18"])


def test_an_existing_file_needs_force(file: Path, compressed: nn.Module) -> None:
    file.write_bytes(b"precious")
    with pytest.raises(StorageError, match=r"out\.pt exists"):
        check_writable(file)
    with pytest.raises(StorageError, match=r"out\.pt exists") as caught:
        save_model(compressed, file, format="module")
    assert "force=True" in str(caught.value.hint)
    assert file.read_bytes() == b"precious"
    save_model(compressed, file, format="module", force=True)
    assert_equal(load_model(file, models={}).model, compressed)
    assert only_file(file.parent) == ["out.pt"]


def test_a_missing_folder(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "out.pt"
    with pytest.raises(StorageError, match=r"the folder of .* does not exist") as caught:
        check_writable(file)
    assert caught.value.hint == f"mkdir -p {file.parent}"


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(StorageError, match="does not exist"):
        check_writable(tmp_path / "a" / "out.pt")


def test_a_read_only_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StorageError, match=r"the folder of .* may not be written to"):
        check_writable(file)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_that_turns_out_read_only(
    file: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", denied)
    with (
        pytest.raises(StorageError, match=r"the folder of .* may not be written to"),
        atomic_write(file),
    ):
        raise AssertionError("reached")


@pytest.mark.parametrize("force", [True, False])
def test_folders_and_devices(tmp_path: Path, force: bool) -> None:
    with pytest.raises(StorageError, match="is a folder"):
        check_writable(tmp_path, force=force)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(StorageError, match="is not an ordinary file"):
        check_writable(pipe, force=force)
    with pytest.raises(StorageError, match="is not an ordinary file"):
        check_writable(Path(os.devnull), force=force)
    with pytest.raises(StorageError, match="cannot be written"):
        check_writable(tmp_path / ("x" * 300), force=force)
    with pytest.raises(StorageError, match="cannot be written"):
        check_writable(Path("a\0b"), force=force)


@pytest.mark.parametrize("dangling", [True, False])
def test_a_symlink_is_replaced_and_not_followed(tmp_path: Path, dangling: bool) -> None:
    target, link = tmp_path / "target.pt", tmp_path / "link.pt"
    if not dangling:
        target.write_bytes(b"precious")
    link.symlink_to(target)
    with pytest.raises(StorageError, match=r"link\.pt exists"):
        check_writable(link)
    with atomic_write(link, force=True) as temporary:
        temporary.write_bytes(b"new")
    assert not link.is_symlink()
    assert link.read_bytes() == b"new"
    assert target.exists() is not dangling
    assert dangling or target.read_bytes() == b"precious"


def test_of_two_runs_the_second_fails(file: Path) -> None:
    def write_while_another_does() -> None:
        with atomic_write(file) as second:
            second.write_bytes(b"second")
            with atomic_write(file) as first:
                assert first != second
                first.write_bytes(b"first")

    with pytest.raises(StorageError, match=r"out\.pt exists"):
        write_while_another_does()
    assert file.read_bytes() == b"first"
    assert only_file(file.parent) == ["out.pt"]


def test_two_runs_without_hard_links(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "link", unsupported)
    with atomic_write(file) as temporary:
        temporary.write_bytes(b"first")
    assert file.read_bytes() == b"first"
    other = file.with_name("other.pt")
    with pytest.raises(StorageError, match=r"other\.pt exists"), atomic_write(other):
        other.write_bytes(b"theirs")
    assert other.read_bytes() == b"theirs"
    assert only_file(file.parent) == ["other.pt", "out.pt"]


def test_permissions_are_those_of_an_ordinary_file(file: Path) -> None:
    old = os.umask(0o027)
    try:
        with atomic_write(file) as temporary:
            temporary.write_bytes(b"1")
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
        file.chmod(0o604)
        with atomic_write(file, force=True) as temporary:
            temporary.write_bytes(b"2")
        assert stat.S_IMODE(file.stat().st_mode) == 0o604
    finally:
        os.umask(old)


def test_everything_reaches_the_disk_before_the_name(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append("folder" if name == file.parent else f"file, named: {file.exists()}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    with atomic_write(file) as temporary:
        temporary.write_bytes(b"1")
    assert events == ["file, named: False", "folder"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, MemoryError])
def test_any_exception_leaves_nothing(file: Path, error: type[BaseException]) -> None:
    file.write_bytes(b"precious")

    def write_half() -> None:
        with atomic_write(file, force=True) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert file.read_bytes() == b"precious"
    assert only_file(file.parent) == ["out.pt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["fsync", "body"])
def test_a_full_disk(file: Path, number: int, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    file.write_bytes(b"precious")
    if where == "fsync":
        monkeypatch.setattr(os, "fsync", full)

    def write() -> None:
        with atomic_write(file, force=True):
            if where == "body":
                full()

    with pytest.raises(StorageError, match="there is no room left"):
        write()
    assert file.read_bytes() == b"precious"
    assert only_file(file.parent) == ["out.pt"]


class Interrupted(io.BytesIO):
    """A file in whose second write the user presses Ctrl-C."""

    writes = 0

    def write(self, data: Any) -> int:
        self.writes += 1
        if self.writes == 2:
            raise KeyboardInterrupt
        return super().write(data)


@pytest.mark.parametrize("format", ["module", "state-dict", "pt2"])
def test_ctrl_c_inside_torchs_writer(
    file: Path, compressed: nn.Module, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch ends the process if an exception passes through its writer."""
    file.write_bytes(b"precious")
    monkeypatch.setattr(Path, "open", lambda *_: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        save_model(compressed, file, format=format, force=True, input_shape=(3, 8, 8))
    monkeypatch.undo()
    assert file.read_bytes() == b"precious"
    assert only_file(file.parent) == ["out.pt"]


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from torch import nn
from tdkit.checkpoint import save_model
from tdkit.errors import StorageError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
model = nn.Sequential(nn.Linear(700, 700))
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
for format, suffix in [("module", ".pt"), ("state-dict", ".pth"),
                       ("safetensors", ".safetensors"), ("pt2", ".pt2"), ("onnx", ".onnx")]:
    path = folder / f"out{suffix}"
    path.write_bytes(b"precious")
    try:
        save_model(model, path, format=format, force=True, input_shape=(700,))
    except StorageError as error:
        print(format, error)
    assert path.read_bytes() == b"precious", format
assert len(list(folder.iterdir())) == 5
"""


def test_a_full_disk_in_every_format(tmp_path: Path) -> None:
    """With a limit on the size of files, which writers meet as they meet a full disk."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULL, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "there is no room left" in line]
    assert [line.split()[0] for line in lines] == [
        "module", "state-dict", "safetensors", "pt2", "onnx",
    ]  # fmt: skip


WAIT = """
import signal, sys, time
from pathlib import Path
from tdkit.checkpoint import atomic_write

# What runs the tests in the background, such as nohup, has its children ignore signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
with atomic_write(Path(sys.argv[1]), force=True) as temporary:
    temporary.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_leave_nothing(file: Path, number: signal.Signals) -> None:
    file.write_bytes(b"precious")
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT, str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        assert len(only_file(file.parent)) == 2
        process.send_signal(number)
        start = time.monotonic()
        assert process.wait(timeout=30) != 0
        assert time.monotonic() - start < 20
    assert file.read_bytes() == b"precious"
    assert only_file(file.parent) == ["out.pt"]


def test_signal_handlers_come_back(file: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    with atomic_write(file):
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_a_programs_own_handler_is_kept(file: Path) -> None:
    def handler(*_: Any) -> None:
        pass

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with atomic_write(file):
            assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_writing_from_a_thread(file: Path, compressed: nn.Module) -> None:
    thread = threading.Thread(
        target=save_model, args=(compressed, file), kwargs={"format": "module"}
    )
    thread.start()
    thread.join()
    assert_equal(load_model(file, models={}).model, compressed)


# The default format


@pytest.mark.parametrize(
    ("format", "output", "expected"),
    [
        ("module", None, "module"),
        ("state-dict", None, "state-dict"),
        ("safetensors", None, "safetensors"),
        ("registered", None, "module"),
        ("state-dict", "x.pt", "state-dict"),
        ("module", "x.safetensors", "safetensors"),
        ("module", "x.ONNX", "onnx"),
        ("registered", "x.pt2", "pt2"),
        ("safetensors", "x.pt", "state-dict"),
        ("safetensors", "x", "safetensors"),
    ],
)
def test_default_format(format: Any, output: str | None, expected: str) -> None:
    loaded = LoadedModel(nn.ReLU(), "x", format)
    assert default_format(loaded, Path(output) if output else None) == expected


def test_a_module_keeps_the_plan_beside_the_pickle(file: Path, compressed: nn.Module) -> None:
    """torch.load never sees it, and the archive passes the reader's own checks."""
    save_model(compressed, file, format="module", **description(compressed))
    with zipfile.ZipFile(file) as archive:
        assert json.loads(archive.read("archive/tdkit.json"))["plan"] == PLAN
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/other", "x")
    assert load_model(file, models={}).plan == PLAN


def test_a_plan_that_was_changed_by_hand(file: Path, compressed: nn.Module) -> None:
    torch.save(OrderedDict(a=torch.ones(1)), file)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("out/tdkit.json", "{")
    with pytest.raises(UnreadableFileError, match="is not JSON"):
        load_model(file, models={})


@pytest.mark.parametrize("format", ["module", "state-dict", "safetensors"])
def test_the_file_has_the_permissions_of_a_new_file(format: str, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    save_model(torch.nn.Linear(2, 2), tmp_path / "model", format=format)
    modes = [(tmp_path / name).stat().st_mode for name in ("new", "model")]
    assert modes[0] == modes[1]


@dataclass(frozen=True)
class Scale(Stage):
    """A stage of somebody else's: one factor per entry of the last axis."""

    size: int

    kinds = ("Scale",)
    kind = "Scale"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.size,)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def build(self, dtype: torch.dtype | None = None, device: Any = None) -> nn.Module:
        return nn.RMSNorm(self.size, dtype=dtype, device=device)

    def compose(self, weight: torch.Tensor | None, signal: torch.Tensor) -> torch.Tensor:
        assert weight is not None
        return signal * weight

    @classmethod
    def of(cls, module: nn.Module) -> Scale | None:
        return cls(module.normalized_shape[0]) if type(module) is nn.RMSNorm else None

    def check(self) -> str | None:
        return None if is_int(self.size, 1) else "its size is none"


@pytest.fixture
def scaled(models: Models) -> tuple[nn.Module, dict[str, Any]]:
    model = models["tiny"].create(in_channels=3, num_classes=7)
    stages = [spec_of(nn.Linear(8, 7, bias=False)), Scale(7), Unflatten(1, (7, 1)), Flatten(1, 2)]
    model._modules["head"] = nn.Sequential(*(stage.build() for stage in stages))
    options = {"in_channels": 3, "num_classes": 7}
    known = {"structure": {"head": stages}, "arch": "tiny", "arch_options": options}
    return model.eval(), known


@pytest.mark.parametrize("format", WEIGHTS)
def test_stages_of_others_are_read_where_the_caller_lists_them(
    scaled: tuple[nn.Module, dict[str, Any]], file: Path, models: Models, format: str
) -> None:
    model, known = scaled
    save_model(model, file, format=format, **known)
    stages = {**OWN_STAGES, "Scale": Scale}
    loaded = load_model(file, models=models, stages=stages)
    assert_equal(loaded.model, model)
    assert loaded.structure == {"head": tuple(known["structure"]["head"])}
    mine = models["tiny"].create(in_channels=3, num_classes=7)
    assert_equal(load_into(mine, file, stages=stages).model, model)
    for read in (
        lambda: load_model(file, models=models),
        lambda: load_into(models["tiny"].create(), file),
    ):
        with pytest.raises(UnreadableFileError, match="kind Scale, which nothing here provides"):
            read()


@pytest.mark.parametrize(
    "wrong", [Unflatten(1, (1, 7)), Flatten(1, 2), Permute((0, 1)), spec_of(nn.Linear(7, 7))]
)
def test_a_structure_with_another_move_is_refused(
    scaled: tuple[nn.Module, dict[str, Any]], file: Path, wrong: Stage
) -> None:
    model, known = scaled
    known["structure"]["head"][2] = wrong
    with pytest.raises(UsageError, match="the model has something else there"):
        save_model(model, file, format="state-dict", **known)
