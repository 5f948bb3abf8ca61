import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from tdkit.datasets import sample
from tdkit.errors import UnreadableFileError
from tdkit.models import garipov
from tdkit.models.garipov import WEIGHTS_FILE, create, fashion_mnist_weights
from tdkit.training.loop import evaluate


def test_layers_are_those_of_the_paper():
    model = create()
    convolutions = [layer for layer in model if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 64, 128, 128, 128, 128]
    assert all(layer.kernel_size == (3, 3) for layer in convolutions)
    assert all(layer.padding == (1, 1) and layer.stride == (1, 1) for layer in convolutions)
    assert list(model._modules) == [
        *("conv1", "bn1", "relu1", "conv2", "bn2", "relu2", "pool1"),
        *("conv3", "bn3", "relu3", "conv4", "bn4", "relu4", "pool2"),
        *("conv5", "bn5", "relu5", "conv6", "avgpool", "flatten", "fc"),
    ]


def test_parameters_are_as_counted_by_hand():
    convolutions = 9 * (64 + 64 * 64 + 64 * 128 + 3 * 128 * 128) + 128
    batch_norms = 2 * (64 + 64 + 128 + 128 + 128)
    linear = 128 * 10 + 10
    counted = sum(parameter.numel() for parameter in create().parameters())
    assert counted == convolutions + batch_norms + linear == 555_978


def test_pooling_halves_28_to_14_to_7():
    images = torch.zeros(1, 1, 28, 28)
    sizes = {}
    for name, layer in create().eval().named_children():
        images = layer(images)
        sizes[name] = tuple(images.shape[2:])
    assert sizes["pool1"] == (14, 14)
    assert sizes["pool2"] == (7, 7)
    assert sizes["avgpool"] == (1, 1)


def test_options_set_input_and_output():
    assert create(in_channels=3, num_classes=4)(torch.zeros(2, 3, 32, 32)).shape == (2, 4)


def test_a_whole_module_file_loads_without_tdkit(tmp_path):
    file, model = tmp_path / "model.pt", create().eval()
    torch.save(model, file)
    script = (
        "import sys; sys.modules['tdkit'] = None\n"
        "import torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "print(model(torch.ones(1, 1, 28, 28)).double().sum().item())\n"
    )
    command = [sys.executable, "-I", "-c", script, str(file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    expected = model(torch.ones(1, 1, 28, 28)).double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    model = create()
    model.load_state_dict(fashion_mnist_weights())
    return model


@pytest.mark.parametrize(
    "content", [None, b"", b"text of no use"], ids=["missing", "empty", "text"]
)
def test_damaged_weights_are_unreadable(tmp_path, monkeypatch, content):
    file = tmp_path / "weights.safetensors"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(garipov, "WEIGHTS_FILE", file)
    with pytest.raises(UnreadableFileError, match=r"weights\.safetensors cannot be read"):
        fashion_mnist_weights()


def _provenance() -> dict:
    return json.loads(WEIGHTS_FILE.with_suffix(".json").read_text(encoding="utf-8"))


def test_provenance_names_what_made_the_weights():
    made = _provenance()
    assert made["test_accuracy"] >= 0.93
    assert made["test_images"] == 10_000
    recipe = WEIGHTS_FILE.parents[2] / "recipes" / "garipov-fashion-mnist.toml"
    if recipe.exists():
        assert made["recipe"] == recipe.read_text(encoding="utf-8")


def test_bundled_weights_are_as_good_on_the_bundled_images(trained):
    data = sample.create()
    assert list(data.mean) == _provenance()["mean"]
    assert list(data.std) == _provenance()["std"]
    measured = evaluate(trained, data.test).accuracy
    # 2,000 of 10,000 images: three standard errors of the difference are 1.5 points.
    assert measured == pytest.approx(_provenance()["test_accuracy"], abs=0.015)
