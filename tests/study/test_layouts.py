"""Which layout convolutions run in, seen from outside by a mode of torch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tdkit.forward.inputs import Inputs
from tdkit.study.layouts import set_layouts, small_maps


class Seen(TorchFunctionMode):
    """Notes the layouts of features and weights that convolutions are given."""

    def __init__(self) -> None:
        super().__init__()
        self.layouts: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d:
            self.layouts.append("+".join(map(layout, args[:2])))
        return func(*args, **kwargs or {})


def layout(tensor: Tensor) -> str:
    if tensor.is_contiguous():
        return "both" if tensor.is_contiguous(memory_format=torch.channels_last) else "first"
    assert tensor.is_contiguous(memory_format=torch.channels_last)
    return "last"


def modes() -> int:
    return torch._C._len_torch_function_stack()


class Net(nn.Module):
    def __init__(self, *convolutions: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, convolutions[0].in_channels, 3, padding=1)
        self.body = nn.Sequential(*convolutions)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x)).mean((2, 3))


def layouts_of(model: nn.Module, images: Tensor) -> list[str]:
    set_layouts(model, Inputs((images[:1],)))
    with torch.no_grad(), Seen() as seen, small_maps(model):
        model(images)
    return seen.layouts[1:]  # the stem gets the images as they are


WIDE = (256, 256, 3)


@pytest.mark.parametrize(
    ("convolution", "side", "expected"),
    [
        (nn.Conv2d(*WIDE, padding=1), 8, "first+first"),
        (nn.Conv2d(*WIDE, padding=1, bias=False), 10, "first+first"),
        (nn.Conv2d(*WIDE, padding=1), 11, "last+last"),
        (nn.Conv2d(*WIDE, padding=1, groups=2), 8, "last+last"),
        (nn.Conv2d(128, 128, 3, padding=1), 8, "last+last"),
        (nn.Conv2d(1024, 1024, 1), 8, "last+both"),
    ],
)
def test_wide_convolutions_of_small_maps_are_contiguous(
    convolution: nn.Conv2d, side: int, expected: str
) -> None:
    assert layouts_of(Net(convolution), torch.randn(2, 3, side, side)) == [expected]


def test_what_comes_after_and_beside_goes_its_own_way() -> None:
    narrow = nn.Conv2d(256, 32, 3, padding=1)
    model = Net(nn.Conv2d(*WIDE, padding=1), nn.ReLU(), narrow)
    assert layouts_of(model, torch.randn(2, 3, 6, 6)) == ["first+first", "first+last"]


def test_stages_of_a_stand_in_count_as_well() -> None:
    model = Net(nn.Conv2d(512, 512, 3, padding=1))
    images = torch.randn(2, 3, 4, 4)
    layouts_of(model, images)
    core = nn.Conv2d(300, 300, 3, padding=1, bias=False)
    stages = nn.Conv2d(512, 300, 1, bias=False), core, nn.Conv2d(300, 512, 1)
    with torch.no_grad(), Seen() as seen, small_maps(model):
        model.body[0] = nn.Sequential(*stages)
        model(images)
        large = torch.randn(1, 300, 12, 12).to(memory_format=torch.channels_last)
        core(large)
    # What is pointwise follows its input, and its weights lie either way at once.
    assert seen.layouts == ["first+last", "last+both", "first+first", "first+both", "last+first"]


def test_a_convolution_on_maps_of_both_sizes_keeps_channels_last() -> None:
    shared = nn.Conv2d(*WIDE, padding=1)
    model = Net(shared, nn.MaxPool2d(2), shared)
    assert layouts_of(model, torch.randn(2, 3, 12, 12)) == ["last+last", "last+last"]


def test_outputs_and_values_stay_the_same() -> None:
    torch.manual_seed(0)
    model = Net(nn.Conv2d(*WIDE, padding=1), nn.ReLU(), nn.Conv2d(*WIDE, stride=2))
    images = torch.randn(5, 3, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(images)
        set_layouts(model, Inputs((images[:1],)))
        with small_maps(model):
            assert modes() == 1
            found = model(images)
    torch.testing.assert_close(found, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_pass() -> None:
    model = Net(nn.Conv2d(*WIDE, padding=1))
    set_layouts(model, Inputs((torch.randn(1, 3, 4, 4),)))
    with small_maps(model):
        assert modes() == 1
        model(torch.randn(2, 3, 4, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_other_ways_to_call_the_function() -> None:
    weight, images = torch.randn(256, 256, 3, 3), torch.randn(1, 256, 4, 4)
    model = Net(nn.Conv2d(*WIDE, padding=1))
    layouts_of(model, torch.randn(2, 3, 4, 4))
    with small_maps(model):
        assert modes() == 1
        for found in (
            functional.conv2d(input=images, weight=weight),
            functional.conv2d(images, weight=weight),
            functional.conv2d(images[0], weight)[None],
        ):
            assert found.shape == (1, 256, 2, 2)


def test_a_convolution_that_has_no_weight_is_none_of_these() -> None:
    class Averages(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 3, 3)
            del self.weight

        def forward(self, x: Tensor) -> Tensor:
            return functional.avg_pool2d(x, 3)

    model = Averages()
    set_layouts(model, Inputs((torch.randn(1, 3, 6, 6),)))
    with small_maps(model):
        assert modes() == 0


@pytest.mark.parametrize(
    ("convolution", "side", "expected"),
    [
        (nn.Conv2d(8, 8, 3), 6, 0),
        (nn.Conv2d(3, 768, 16, stride=16), 32, 0),  # wide, as in a ViT, and on a large map
        (nn.Conv2d(*WIDE), 6, 1),
    ],
)
def test_the_mode_is_entered_where_it_has_something_to_do(
    convolution: nn.Conv2d, side: int, expected: int
) -> None:
    # A mode of torch turns the fast path of its transformer layers off.
    model = Net(convolution)
    set_layouts(model, Inputs((torch.randn(1, 3, side, side),)))
    with small_maps(model):
        assert modes() == expected
    assert modes() == 0


def test_a_model_that_fails_with_both_layouts_stays_contiguous() -> None:
    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            if modes():
                raise RuntimeError("no")
            return super().forward(x)

    model = Fails(nn.Conv2d(*WIDE, padding=1))
    set_layouts(model, Inputs((torch.randn(1, 3, 6, 6),)))
    assert layout(model.stem.weight) == "first"
    with small_maps(model):
        model(torch.randn(2, 3, 6, 6))


def test_a_model_that_views_its_features_stays_contiguous() -> None:
    class Views(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.stem(x)).view(len(x), -1)

    # Also where the dense model could be viewed, as a contiguous convolution comes last: a
    # stand-in's last stage is none.
    model = Views(nn.Conv2d(*WIDE, padding=1))
    assert layouts_of(model, torch.randn(2, 3, 6, 6)) == ["first+first"]
    assert layout(model.stem.weight) == "first"
