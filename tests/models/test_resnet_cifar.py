import torch
import torchvision

from tdkit.models.resnet_cifar import create


def test_only_the_first_convolution_differs_from_torchvision():
    ours, theirs = create(), torchvision.models.resnet18(num_classes=10)
    assert (ours.conv1.kernel_size, ours.conv1.stride, ours.conv1.padding) == (
        (3, 3),
        (1, 1),
        (1, 1),
    )
    assert ours.conv1.bias is None
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    different = {n for n, tensor in ours.state_dict().items() if tensor.shape != shapes[n]}
    assert different == {"conv1.weight"}


def test_first_convolution_starts_as_torchvision_starts_convolutions():
    weight = create(in_channels=64).conv1.weight
    assert abs(float(weight.detach().std()) / (2 / (64 * 9)) ** 0.5 - 1) < 0.02


def test_options_set_input_and_output():
    model = create(in_channels=1, num_classes=4).eval()
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 4)
