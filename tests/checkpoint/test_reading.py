from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from torch import nn

from tdkit.checkpoint import content_hash, load_into, load_model, save_model
from tdkit.checkpoint.contents import read_contents
from tdkit.checkpoint.safe.classes import allowlist
from tdkit.checkpoint.safe.kinds import kind_of
from tdkit.checkpoint.states import build_light, expected_shapes
from tdkit.errors import TdkitError, UnreadableFileError, UnsafeFileError, UsageError
from tdkit.hookspecs import ModelRecord

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Models = dict[str, ModelRecord]
COUNT = {"num_classes": 10**6}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.pt"


def assert_equal(model: nn.Module, expected: nn.Module) -> None:
    assert str(model) == str(expected)
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


# Whole models


def test_a_whole_model(file: Path, tiny: nn.Module) -> None:
    tiny.train()
    torch.save(tiny, file)
    loaded = load_model(file, models={})
    assert_equal(loaded.model, tiny)
    assert loaded.model.training
    assert (loaded.format, loaded.source) == ("module", str(file))
    assert loaded.arch is loaded.input_shape is loaded.plan is None
    assert loaded.notes == ()
    assert not list(file.parent.glob(".tdkit*"))


def test_a_path_as_text(file: Path, tiny: nn.Module) -> None:
    torch.save(tiny, file)
    assert_equal(load_model(str(file), models={}).model, tiny)


LAYERS = [
    nn.LSTM(2, 3, num_layers=2, bidirectional=True),
    nn.GRUCell(2, 3),
    nn.MultiheadAttention(4, 2),
    nn.TransformerEncoderLayer(4, 2, 8, activation="gelu"),
    nn.TransformerDecoderLayer(4, 2, 8),
    nn.Embedding(5, 3, padding_idx=0),
    nn.ModuleDict({"a": nn.PReLU(), "b": nn.Upsample(scale_factor=2)}),
    nn.ParameterList([nn.Parameter(torch.ones(2))]),
    nn.ParameterDict({"a": nn.Parameter(torch.ones(2))}),
    nn.ConvTranspose3d(2, 2, 3, output_padding=0, padding=(0, 1, 2)),
    nn.Conv1d(2, 4, 3, padding="same", padding_mode="circular", groups=2),
    nn.Linear(3, 2, bias=False, dtype=torch.float64),
    nn.GroupNorm(2, 4),
    nn.BatchNorm1d(3, affine=False),
    nn.Unflatten(1, (2, 2)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_layers_of_torch(file: Path, layer: nn.Module) -> None:
    torch.save(layer, file)
    assert_equal(load_model(file, models={}).model, layer)


def test_parameters_with_plain_attributes_and_frozen_ones(file: Path) -> None:
    layer = nn.Linear(2, 2)
    layer.weight.no_decay = True
    layer.bias.requires_grad = False
    torch.save(layer, file)
    loaded = load_model(file, models={}).model
    assert loaded.weight.no_decay
    assert loaded.weight.requires_grad
    assert not loaded.bias.requires_grad


def test_shared_modules_and_tied_weights_stay_shared(file: Path) -> None:
    shared = nn.Linear(2, 2)
    tied = nn.Linear(2, 2)
    tied.weight = shared.weight
    torch.save(nn.Sequential(shared, tied, shared), file)
    loaded = load_model(file, models={}).model
    assert loaded[0] is loaded[2]
    assert loaded[0].weight is loaded[1].weight


def test_data_parallel_is_unwrapped(file: Path, tiny: nn.Module) -> None:
    torch.save(nn.DataParallel(tiny), file)
    loaded = load_model(file, models={})
    assert_equal(loaded.model, tiny)
    assert loaded.notes == ("unwrapped DataParallel",)


def test_arch_is_not_needed_for_a_whole_model(file: Path, tiny: nn.Module, models: Models) -> None:
    torch.save(tiny, file)
    loaded = load_model(file, models=models, arch="tiny")
    assert any("was not needed" in note for note in loaded.notes)


OWN = """
import argparse
from torch import nn

class MyNet(nn.Module):
    def __init__(self, num_classes=2):
        super().__init__()
        self.layer = nn.Linear(3, num_classes)
        self.options = argparse.Namespace(depth=3)

    def forward(self, x):
        return self.layer(x)

def make():
    return MyNet()

def wrong():
    return 3

def broken():
    raise ValueError("no such depth")

number = 5
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """A module of the user's in the current folder, under a name that no other test has."""
    name = f"own_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__(name)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    return module


def test_a_class_of_ones_own(file: Path, own: Any) -> None:
    torch.save(own.MyNet(), file)
    with pytest.raises(UnsafeFileError, match=rf"uses {own.__name__}\.MyNet, argparse\.Namespace"):
        load_model(file, models={})
    allowed = [f"{own.__name__}:MyNet", "argparse:Namespace"]
    loaded = load_model(file, models={}, allow_classes=allowed)
    assert type(loaded.model) is own.MyNet
    assert loaded.model.options.depth == 3
    assert type(load_into(own.MyNet(), file, allow_classes=allowed).model) is own.MyNet


def test_a_class_that_a_script_had_in_main(
    file: Path, own: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import __main__

    with monkeypatch.context() as context:
        context.setattr(own.MyNet, "__module__", "__main__")
        context.setattr(__main__, "MyNet", own.MyNet, raising=False)
        model = own.MyNet()
        del model.options
        torch.save(model, file)
    with pytest.raises(UnsafeFileError, match=r"uses __main__\.MyNet") as caught:
        load_model(file, models={})
    assert "allow_classes=['YOUR_MODULE:MyNet']" in str(caught.value.hint)
    loaded = load_model(file, models={}, allow_classes=[f"{own.__name__}:MyNet"])
    assert type(loaded.model) is own.MyNet


def test_a_class_that_a_registered_model_brings(file: Path, own: Any) -> None:
    model = own.MyNet()
    del model.options
    torch.save(model, file)
    record = ModelRecord("mine", "", own.make, (3,), 2, allowed_classes=(f"{own.__name__}:MyNet",))
    assert type(load_model(file, models={"mine": record}).model) is own.MyNet


# State dicts


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ""])
def test_a_state_dict_with_its_architecture(
    tmp_path: Path, tiny: nn.Module, models: Models, suffix: str
) -> None:
    file = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(tiny.state_dict(), file)
    else:
        torch.save(tiny.state_dict(), file)
    loaded = load_model(file, models=models, arch="tiny")
    assert_equal(loaded.model, tiny)
    assert not loaded.model.training
    assert loaded.format == ("safetensors" if suffix == ".safetensors" else "state-dict")
    assert (loaded.arch, loaded.input_shape) == ("tiny", (1, 8, 8))
    assert not any(tensor.is_meta for tensor in loaded.model.state_dict().values())


def test_safetensors_is_told_by_its_content(file: Path, tiny: nn.Module, models: Models) -> None:
    safetensors.torch.save_file(tiny.state_dict(), file)
    assert load_model(file, models=models, arch="tiny").format == "safetensors"
    torch.save(tiny.state_dict(), file.with_suffix(".safetensors"))
    loaded = load_model(file.with_suffix(".safetensors"), models=models, arch="tiny")
    assert loaded.format == "state-dict"


@pytest.mark.parametrize("second", range(6))
def test_a_safetensors_header_may_be_as_long_as_a_pickle_starts(
    tmp_path: Path, second: int
) -> None:
    """A length of 640 bytes is written as the two bytes that pickle's protocol 2 starts with."""
    file, start = tmp_path / "model.safetensors", b""
    length = 0
    while start != bytes([0x80, second]):
        metadata = {"padding": " " * length}
        safetensors.torch.save_file({"a": torch.ones(1)}, file, metadata=metadata)
        start, length = file.read_bytes()[:2], length + 8
    with file.open("rb") as handle:
        assert kind_of(handle, file) == "safetensors"
    assert read_contents(file, allowlist((), ()), unsafe=False).value.keys() == {"a"}


def test_a_training_travels_with_the_model(tmp_path: Path, tiny: nn.Module, models: Models) -> None:
    training = {"recipe": "epochs = 3", "optimizer": {"lr": 0.1}}
    for format in ("module", "state-dict", "safetensors"):
        file = tmp_path / f"{format}.pt"
        save_model(tiny, file, format=format, arch="tiny", training=training)
        assert load_model(file, models=models).training == training
        assert load_into(copy.deepcopy(tiny), file).training == training
        save_model(tiny, file, format=format, arch="tiny", force=True)
        assert load_model(file, models=models).training is None


def test_a_training_checkpoint_tells_its_optimizer(
    file: Path, tiny: nn.Module, models: Models
) -> None:
    optimizer = torch.optim.SGD(tiny.parameters(), lr=0.25, momentum=0.5)
    state = {"epoch": 1, "state_dict": tiny.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, file)
    training = load_model(file, models=models, arch="tiny").training
    assert training is not None
    assert training["optimizer"]["lr"] == 0.25
    assert training["optimizer"]["momentum"] == 0.5
    json.dumps(training)
    torch.save({"epoch": 1, "model": tiny, "optimizer": optimizer.state_dict()}, file)
    assert load_model(file, models=models).training == training
    torch.save(tiny.state_dict(), file)
    assert load_model(file, models=models, arch="tiny").training is None


def test_a_safetensors_model_outlives_its_file(tmp_path: Path, models: Models) -> None:
    file = tmp_path / "a.safetensors"
    weights = models["tiny"].weights["seed-0"]()
    safetensors.torch.save_file(dict(weights), file)
    model = load_model(file, models=models, arch="tiny").model
    file.write_bytes(b"")
    assert torch.equal(model.state_dict()["head.weight"], weights["head.weight"])


def test_a_state_dict_in_the_old_format(file: Path, tiny: nn.Module, models: Models) -> None:
    torch.save(tiny.state_dict(), file, _use_new_zipfile_serialization=False)
    assert_equal(load_model(file, models=models, arch="tiny").model, tiny)


def test_views_in_the_old_format(file: Path, models: Models) -> None:
    whole = torch.arange(12.0)
    state = {"first.weight": torch.randn(8, 8), "second.weight": torch.randn(8, 8)}
    state["second.weight"] = state["first.weight"]
    torch.save({"state_dict": state, "views": [whole[:3], whole[6:]]}, file)
    assert load_model(file, models=models).arch == "tied-net"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_the_files(
    file: Path, tiny: nn.Module, models: Models, dtype: torch.dtype
) -> None:
    tiny.to(dtype)
    torch.save(tiny.state_dict(), file)
    assert_equal(load_model(file, models=models, arch="tiny").model, tiny)


@pytest.mark.parametrize(
    ("prefix", "stripped"),
    [
        ("module.", "module."),
        ("_orig_mod.", "_orig_mod."),
        ("module._orig_mod.", "_orig_mod. and module."),
        ("_orig_mod.module.", "_orig_mod. and module."),
        ("module.module.", "module."),
        ("model.", "model."),
        ("module.net.", "module. and net."),
    ],
)
@pytest.mark.parametrize("arch", ["tiny", None])
def test_prefixes_of_wrappers_are_stripped(
    file: Path, tiny: nn.Module, models: Models, prefix: str, stripped: str, arch: str | None
) -> None:
    torch.save({prefix + name: value for name, value in tiny.state_dict().items()}, file)
    loaded = load_model(file, models=models, arch=arch)
    assert_equal(loaded.model, tiny)
    assert f"stripped the prefix {stripped} from the names" in loaded.notes


def test_averaged_and_compiled_models(file: Path, tiny: nn.Module, models: Models) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(tiny)
    torch.save(averaged.state_dict(), file)
    assert_equal(load_model(file, models=models, arch="tiny").model, tiny)
    part = {name.replace("conv1", "conv1._orig_mod"): v for name, v in tiny.state_dict().items()}
    torch.save(part, file)
    assert_equal(load_model(file, models=models, arch="tiny").model, tiny)


def test_batch_counters_from_before_torch_0_4_1(
    file: Path, tiny: nn.Module, models: Models
) -> None:
    state = {name: v for name, v in tiny.state_dict().items() if "num_batches" not in name}
    torch.save(state, file)
    assert_equal(load_model(file, models=models).model, tiny)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)


def test_a_model_that_really_has_a_module_called_module(file: Path) -> None:
    torch.save(Wrapped().state_dict(), file)
    loaded = load_into(Wrapped(), file)
    assert loaded.notes == ()


def test_tied_weights_of_the_architecture_stay_tied(file: Path, models: Models) -> None:
    model = models["tied-net"].create()
    torch.save(model.state_dict(), file)
    loaded = load_model(file, models=models, arch="tied-net").model
    assert loaded.first.weight is loaded.second.weight
    assert loaded.scale.tolist() == [2, 2, 2]
    state = dict(model.state_dict())
    state["second.weight"] = state["second.weight"] + 1
    torch.save(state, file)
    with pytest.raises(UnreadableFileError, match="two different weights"):
        load_model(file, models=models, arch="tied-net")


class Unset(nn.Module):
    """A buffer that is made with torch.empty and is not in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("scale", torch.empty(3).fill_(3), persistent=False)


class Counting(nn.Module):
    """A constructor that looks at values, which the meta device does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(int(torch.empty(3).fill_(2).sum()), 2)


@pytest.mark.parametrize("cls", [Unset, Counting])
def test_models_that_cannot_be_made_without_values(file: Path, cls: type[nn.Module]) -> None:
    record = ModelRecord("odd", "", lambda **_: cls(), (2,), 2)
    expected = cls()
    torch.save(expected.state_dict(), file)
    loaded = load_model(file, models={"odd": record}, arch="odd").model
    assert_equal(loaded, expected)
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), expected.buffers(), strict=True))


def test_loading_leaves_the_random_numbers_alone(
    file: Path, tiny: nn.Module, models: Models
) -> None:
    def drawing(**options: int) -> nn.Module:
        torch.rand(3)
        return models["tiny"].create(**options)

    torch.save(tiny.state_dict(), file)
    before = torch.get_rng_state()
    record = replace(models["tiny"], name="drawing", create=drawing)
    load_model(file, models={"drawing": record})
    assert torch.equal(torch.get_rng_state(), before)


def test_models_are_compared_without_allocating_them() -> None:
    """Four terabytes, if they were."""
    model = build_light(lambda **options: nn.Linear(10**6, options["num_classes"]), COUNT)
    assert expected_shapes(model, {})["weight"] == (10**6, 10**6)


MISFITS = [
    ({"head.bias": None}, r"it lacks head\.bias"),
    ({"extra.weight": torch.zeros(1)}, r"the unexpected extra\.weight"),
    ({"conv2.weight": torch.zeros(8, 4, 5, 5)}, r"conv2\.weight 8x4x5x5 instead of 8x4x3x3"),
    ({"head.bias": torch.zeros(())}, r"head\.bias \(\) instead of 10"),
    ({"head.weight": torch.zeros(7, 8)}, r"head\.weight 7x8 instead of 10x8"),
]


@pytest.mark.parametrize(("change", "match"), MISFITS, ids=[next(iter(c[0])) for c in MISFITS])
def test_a_state_dict_that_does_not_fit(
    file: Path, tiny: nn.Module, models: Models, change: Mapping[str, Any], match: str
) -> None:
    state = {**tiny.state_dict(), **change}
    torch.save({name: value for name, value in state.items() if value is not None}, file)
    with pytest.raises(UnreadableFileError, match=match) as caught:
        load_model(file, models=models, arch="tiny")
    assert str(file) in str(caught.value)
    assert "does not fit tiny" in str(caught.value)


def test_integer_weights_are_refused_by_torch(file: Path, tiny: nn.Module, models: Models) -> None:
    torch.save({name: value.to(torch.int64) for name, value in tiny.state_dict().items()}, file)
    with pytest.raises(UnreadableFileError, match="torch refuses the weights"):
        load_model(file, models=models, arch="tiny")


# Training checkpoints


@pytest.mark.parametrize(
    "key", ["state_dict", "model", "model_state_dict", "net", "ema", "something"]
)
def test_a_training_checkpoint(file: Path, tiny: nn.Module, models: Models, key: str) -> None:
    optimizer = torch.optim.Adam(tiny.parameters())
    tiny(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    value = {"epoch": 3, "optimizer": optimizer.state_dict(), key: tiny.state_dict(), "loss": [0.1]}
    torch.save(value, file)
    loaded = load_model(file, models=models)
    assert_equal(loaded.model, tiny)
    assert loaded.format == "state-dict"
    assert loaded.notes[0] == f"took the entry {key!r} of a training checkpoint"


def test_the_usual_entry_comes_first(file: Path, tiny: nn.Module, models: Models) -> None:
    other = {name: value + 1 for name, value in tiny.state_dict().items()}
    torch.save({"ema": other, "state_dict": tiny.state_dict()}, file)
    assert_equal(load_model(file, models=models).model, tiny)


def test_a_whole_model_in_a_checkpoint(file: Path, tiny: nn.Module) -> None:
    torch.save({"epoch": 1, "model": tiny}, file)
    loaded = load_model(file, models={})
    assert_equal(loaded.model, tiny)
    assert loaded.format == "module"


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"epoch": 3, "optimizer": {"state": {}}}, "holds no state dict, only: epoch, optimizer"),
        ({}, "holds no state dict, only: nothing"),
        (
            {"teacher": {"a": torch.ones(1)}, "student": {"a": torch.ones(1)}},
            "holds several state dicts: teacher, student",
        ),
        ([1, 2], "holds a list, not a model"),
        (torch.ones(3), "holds a Tensor, not a model"),
        (None, "holds a NoneType, not a model"),
    ],
    ids=["no-weights", "nothing", "several", "list", "tensor", "none"],
)
def test_checkpoints_without_one_model(file: Path, models: Models, value: Any, match: str) -> None:
    torch.save(value, file)
    with pytest.raises(UnreadableFileError, match=match) as caught:
        load_model(file, models=models)
    assert caught.value.hint


# Recognition


def test_the_architecture_is_recognised(file: Path, models: Models) -> None:
    for name in models:
        torch.save(models[name].create().state_dict(), file)
        loaded = load_model(file, models=models)
        assert loaded.arch == name
        assert f"recognised {name} from its names and shapes" in loaded.notes


@pytest.mark.parametrize("arch", [None, "tiny"])
def test_other_class_and_channel_counts(file: Path, models: Models, arch: str | None) -> None:
    model = models["tiny"].create(in_channels=3, num_classes=7)
    torch.save(model.state_dict(), file)
    loaded = load_model(file, models=models, arch=arch)
    assert_equal(loaded.model, model.eval())
    assert loaded.arch_options == {"in_channels": 3, "num_classes": 7}
    assert loaded.input_shape == (3, 8, 8)


def test_a_fine_tuned_resnet18_with_seven_classes(file: Path) -> None:
    from torchvision.models import get_model

    names = ["resnet18", "resnet34", "wide-resnet50-2", "mobilenet-v3-small"]
    models = {name: _torchvision(name) for name in names}
    model = get_model("resnet18", num_classes=7)
    torch.save(model.state_dict(), file)
    loaded = load_model(file, models=models)
    assert (loaded.arch, dict(loaded.arch_options)) == ("resnet18", {"num_classes": 7})
    assert_equal(loaded.model, model.eval())


def _torchvision(name: str) -> ModelRecord:
    from torchvision.models import get_model

    def create(in_channels: int = 3, num_classes: int = 1000) -> nn.Module:
        assert in_channels == 3
        return get_model(name.replace("-", "_"), num_classes=num_classes)

    return ModelRecord(name, "", create, (3, 224, 224), 1000)


def test_an_exact_fit_comes_before_other_counts(file: Path, models: Models) -> None:
    def seven(in_channels: int = 1, num_classes: int = 7) -> nn.Module:
        return models["tiny"].create(in_channels, num_classes)

    torch.save(seven().state_dict(), file)
    both = {"tiny": models["tiny"], "seven": ModelRecord("seven", "", seven, (1, 8, 8), 7)}
    assert load_model(file, models=both).arch == "seven"
    torch.save(seven(num_classes=5).state_dict(), file)
    with pytest.raises(UsageError, match="fits several registered models: tiny, seven"):
        load_model(file, models=both)


def test_unlikely_families_are_not_built(file: Path) -> None:
    built: list[str] = []

    def unexpected(**_: int) -> nn.Module:
        built.append("another")
        return nn.Linear(1, 1)

    def create(**_: int) -> nn.Module:
        built.append("resnet")
        return nn.ModuleDict({"layer1": nn.ModuleList([nn.ModuleDict({"conv1": nn.Linear(1, 1)})])})

    models = {
        "vgg11": ModelRecord("vgg11", "", unexpected, (1,), 1),
        "swin-t": ModelRecord("swin-t", "", unexpected, (1,), 1),
        "resnet": ModelRecord("resnet", "", create, (1,), 1),
    }
    torch.save(create().state_dict(), file)
    assert load_model(file, models=models).arch == "resnet"
    assert set(built) == {"resnet"}


def test_a_plugin_model_with_a_familys_name_is_still_found(file: Path, models: Models) -> None:
    renamed = {"vgg-of-mine": replace(models["tiny"], name="vgg-of-mine")}
    torch.save(models["tiny"].create().state_dict(), file)
    assert load_model(file, models=renamed).arch == "vgg-of-mine"


def test_a_broken_plugin_does_not_stop_the_recognition(
    file: Path, tiny: nn.Module, models: Models
) -> None:
    def broken(**_: int) -> nn.Module:
        raise ZeroDivisionError("oops")

    torch.save(tiny.state_dict(), file)
    record = ModelRecord("broken", "", broken, (1,), 1)
    assert load_model(file, models={"broken": record, **models}).arch == "tiny"
    with pytest.raises(UsageError, match="broken cannot be made: ZeroDivisionError: oops"):
        load_model("broken", models={"broken": record})


def test_no_or_several_architectures(file: Path, models: Models) -> None:
    torch.save({"a": torch.ones(1), "b": torch.ones(1)}, file)
    with pytest.raises(UsageError, match="fits no registered model; it holds a, b") as caught:
        load_model(file, models=models)
    assert "arch='NAME'" in str(caught.value.hint)
    twins = {"one": models["tiny"], "two": models["tiny"]}
    torch.save(models["tiny"].create().state_dict(), file)
    with pytest.raises(UsageError, match="fits several registered models: one, two"):
        load_model(file, models=twins)


# --arch


def test_a_factory_or_class_of_ones_own(file: Path, own: Any) -> None:
    model = own.MyNet(num_classes=5)
    torch.save(model.state_dict(), file)
    arch = f"{own.__name__}:MyNet"
    loaded = load_model(file, models={}, arch=arch)
    assert torch.equal(loaded.model.layer.weight, model.layer.weight)
    assert (loaded.arch, dict(loaded.arch_options)) == (arch, {"num_classes": 5})
    torch.save(own.make().state_dict(), file)
    assert load_model(file, models={}, arch=f"{own.__name__}:make").model.layer.out_features == 2


@pytest.mark.parametrize(
    ("arch", "error", "match"),
    [
        ("OWN:make", UnreadableFileError, "does not fit own_.*:make"),
        ("OWN:wrong", UsageError, "returned a int, not a torch.nn.Module"),
        ("OWN:broken", UsageError, "calling it failed: ValueError: no such depth"),
        ("OWN:number", UsageError, "of type int, not a function"),
        ("OWN:nothing", UsageError, "has no nothing"),
        ("nowhere.at.all:make", UsageError, "No module named 'nowhere'"),
        ("exits:make", UsageError, "importing exits failed: SystemExit"),
        ("OWN:", UsageError, "form package.module:name"),
        ("resnet81", UsageError, "'resnet81' is not a registered architecture"),
    ],
)
def test_architectures_that_cannot_be_used(
    tmp_path: Path, file: Path, own: Any, arch: str, error: type[TdkitError], match: str
) -> None:
    (tmp_path / "exits.py").write_text("raise SystemExit(2)\n")
    torch.save({"a": torch.ones(1)}, file)
    with pytest.raises(error, match=match):
        load_model(file, models={}, arch=arch.replace("OWN", own.__name__))


def test_the_current_folder_does_not_stay_on_the_path(file: Path, own: Any) -> None:
    import sys

    torch.save(own.make().state_dict(), file)
    before = list(sys.path)
    load_model(file, models={}, arch=f"{own.__name__}:make")
    assert sys.path == before


# Registered names


@pytest.mark.parametrize("name", ["tied-net", "tied_net", "Tied_Net"])
def test_a_registered_name(models: Models, name: str) -> None:
    loaded = load_model(name, models=models)
    assert (loaded.arch, loaded.format, loaded.source) == ("tied-net", "registered", name)
    assert loaded.input_shape == (8,)
    assert loaded.notes == ("tied-net has random weights",)


@pytest.mark.parametrize("weights", [None, "seed-0", "SEED_0"])
def test_trained_weights(models: Models, weights: str | None) -> None:
    loaded = load_model("tiny", models=models, weights=weights)
    expected = models["tiny"].weights["seed-0"]()
    assert torch.equal(loaded.model.state_dict()["head.weight"], expected["head.weight"])
    assert loaded.notes == ("tiny has the weights seed-0",)
    assert not loaded.model.training


def test_random_weights(models: Models) -> None:
    torch.manual_seed(5)
    first = load_model("tiny", models=models, weights="none").model
    torch.manual_seed(5)
    second = load_model("tiny", models=models, weights="None").model
    assert_equal(first, second)
    assert_equal(first, _after_seed(models, 5))


def _after_seed(models: Models, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models["tiny"].create()


def test_unknown_weights(models: Models) -> None:
    with pytest.raises(UsageError, match="has no weights called imagenet") as caught:
        load_model("tiny", models=models, weights="imagenet")
    assert caught.value.hint == "choose from: seed-0, none"


def test_without_a_network(models: Models) -> None:
    with pytest.raises(UnreadableFileError, match="there is no network") as caught:
        load_model("tiny-wide", models=models)
    assert "weights='none'" in str(caught.value.hint)
    assert load_model("tiny-wide", models=models, weights="none").model is not None


def test_a_damaged_download(models: Models) -> None:
    with pytest.raises(UnreadableFileError, match="are damaged: invalid hash value"):
        load_model("tiny-wide", models=models, weights="bad")


def test_an_unknown_name(models: Models) -> None:
    with pytest.raises(UsageError, match="'tiny-wode' is not a registered model") as caught:
        load_model("tiny-wode", models=models)
    assert "tiny-wide" in str(caught.value.hint)
    with pytest.raises(UsageError, match="'zzz' is not a registered model") as caught:
        load_model("zzz", models=models)
    assert caught.value.hint == "tdkit.plugins lists the models"
    with pytest.raises(UsageError, match="'' is not a registered model"):
        load_model("", models=models)


def test_a_file_comes_before_a_name(
    tmp_path: Path, tiny: nn.Module, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tied-net").mkdir()
    assert load_model("tied-net", models=models).format == "registered"
    torch.save(tiny, "tiny")
    assert load_model("tiny", models=models).format == "module"


def test_options_that_do_not_belong(file: Path, tiny: nn.Module, models: Models) -> None:
    torch.save(tiny, file)
    with pytest.raises(UsageError, match="belongs to a registered model"):
        load_model(file, models=models, weights="none")
    with pytest.raises(UsageError, match="belongs to a file with a state_dict"):
        load_model("tiny", models=models, arch="tiny")


# A model of one's own


@pytest.mark.parametrize("whole", [True, False])
def test_load_into(file: Path, tiny: nn.Module, models: Models, whole: bool) -> None:
    torch.save(tiny if whole else tiny.state_dict(), file)
    mine = models["tiny"].create().train()
    loaded = load_into(mine, file)
    assert loaded.model is mine
    assert mine.training
    assert_equal(mine, tiny)


def test_load_into_changes_nothing_if_it_does_not_fit(
    file: Path, tiny: nn.Module, models: Models
) -> None:
    torch.save(tiny.state_dict(), file)
    mine = models["tiny-wide"].create()
    before = content_hash(mine)
    with pytest.raises(UnreadableFileError, match="does not fit Sequential: it has"):
        load_into(mine, file)
    assert content_hash(mine) == before


def test_content_hash_sees_every_part(models: Models) -> None:
    model = models["tiny"].create()
    first = content_hash(model)
    assert first == content_hash(model)
    seen = {first}
    for name, value in model.state_dict().items():
        with torch.no_grad():
            value.reshape(-1)[-1] += 1
        seen.add(content_hash(model))
        assert len(seen) > 1, name
    assert len(seen) == 1 + len(model.state_dict())
    assert content_hash(model.half()) not in seen


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")
def test_unusual_tensors_can_be_read(file: Path) -> None:
    state = {
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "complex": torch.ones(3, dtype=torch.complex64).conj(),
        "empty": torch.empty(0, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3),
        "float8": torch.ones(3).to(torch.float8_e5m2),
        "uint16": torch.ones(3).to(torch.uint16),
    }
    torch.save(state, file)
    with pytest.raises(UsageError, match="fits no registered model"):
        load_model(file, models={})


def test_a_long_file_name_in_an_odd_folder(
    tmp_path: Path, tiny: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a b\u00e9\udc80"
    folder.mkdir()
    torch.save(tiny, tmp_path / "x.pt")
    os.rename(tmp_path / "x.pt", folder / ("m" * 200 + ".pt"))  # noqa: PTH104
    assert_equal(load_model(folder / ("m" * 200 + ".pt"), models={}).model, tiny)
