import urllib.error

import pytest
import torch
import torchvision
from torchvision.models import _api

from tdkit.errors import UnreadableFileError, UsageError
from tdkit.models.torchvision import NAMES, SIZES, create, published_weights, records

RECORDS = records()
BY_NAME = {record.name: record for record in RECORDS}

# Transformers take one size only; of the other families the smallest member stands for all.
FIXED_SIZE = [record for record in RECORDS if record.name.startswith(("vit", "swin", "maxvit"))]
FAMILIES = (
    *("alexnet", "convnext-tiny", "densenet121", "efficientnet-b0", "efficientnet-v2-s"),
    *("googlenet", "inception-v3", "mnasnet0-5", "mobilenet-v2", "mobilenet-v3-small"),
    *("resnet18", "resnext50-32x4d", "shufflenet-v2-x0-5", "squeezenet1-0", "vgg11", "vgg11-bn"),
    "wide-resnet50-2",
)
SHAPED = [*FIXED_SIZE, *(BY_NAME[name] for name in FAMILIES)]


def test_names_are_those_of_the_installed_torchvision():
    assert list(NAMES) == torchvision.models.list_models(module=torchvision.models)


def test_registered_names_have_hyphens_and_are_unique():
    assert len(BY_NAME) == len(NAMES) == 80
    assert not any("_" in name for name in BY_NAME)
    assert "mobilenet-v3-small" in BY_NAME


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_published_weights(name):
    weights = torchvision.models.get_model_weights(name).DEFAULT
    size = weights.transforms.keywords["crop_size"]
    record = BY_NAME[name.replace("_", "-")]
    assert record.input_shape == (3, size, size)
    assert record.num_classes == len(weights.meta["categories"])


def test_size_table_names_known_models():
    assert set(SIZES) <= set(NAMES)


@pytest.mark.parametrize("record", SHAPED, ids=lambda record: record.name)
def test_model_takes_its_input_shape(record):
    with torch.device("meta"), torch.inference_mode():
        model = record.create(num_classes=7).eval()
        assert model(torch.empty(1, *record.input_shape)).shape == (1, 7)


@pytest.mark.parametrize("name", ["regnet-x-400mf", "regnet-y-400mf"])
def test_regnet_takes_images(name):
    """Its constructor computes widths with tensors, so it cannot be built on the meta device."""
    record = BY_NAME[name]
    with torch.inference_mode():
        model = record.create(num_classes=7).eval()
        # Any size will do, and a small one is fast.
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_other_channels_are_refused():
    with pytest.raises(UsageError, match="resnet18 takes images of 3 channels, not 1"):
        create("resnet18", in_channels=1)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "densenet121", "resnet18"])
def test_published_weights_fit_the_model(name, monkeypatch):
    """The file that torchvision publishes is imitated in its own, old layout."""
    auxiliary = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    published = torchvision.models.get_model(name, weights=None, **auxiliary).state_dict()
    if name == "densenet121":
        old = {_old_densenet_key(key): value for key, value in published.items()}
        published = {key: value for key, value in old.items() if "num_batches" not in key}
        assert "features.denseblock1.denselayer1.norm.1.weight" in published
    monkeypatch.setattr(_api, "load_state_dict_from_url", lambda *_, **__: published)
    model = create(name)
    model.load_state_dict(published_weights(name), strict=True)
    last = "classifier" if name == "densenet121" else "fc"
    assert torch.equal(model.get_submodule(last).weight, published[f"{last}.weight"])


def _old_densenet_key(key: str) -> str:
    for kind in ("norm", "conv"):
        for number in ("1", "2"):
            if "denselayer" in key:
                key = key.replace(f".{kind}{number}.", f".{kind}.{number}.")
    return key


def test_googlenet_normalises_its_input_as_its_published_weights_want():
    with torch.device("meta"):
        assert create("googlenet").transform_input
        assert create("inception_v3").transform_input


def test_without_a_network_the_hint_names_random_weights(monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(_api, "load_state_dict_from_url", offline)
    with pytest.raises(UnreadableFileError, match="weights of resnet18 could not") as caught:
        published_weights("resnet18")
    assert "weights='none'" in caught.value.hint
