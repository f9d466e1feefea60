"""ResNets are torchvision's, key for key and number for number; its other networks fit as well."""

import pytest
import torch
import torchvision
from torch import nn

from common import Failure, make_backbone


@pytest.mark.parametrize("arch", [
    "resnet18", "resnet50", pytest.param("resnet34", marks=pytest.mark.torture),
    pytest.param("resnet101", marks=pytest.mark.torture),
    pytest.param("resnet152", marks=pytest.mark.torture)])
def test_equals_torchvision(arch):
    ours = make_backbone(arch, 224)
    with torch.device("meta"):  # without the seconds that random weights take
        theirs = torchvision.models.get_model(arch)
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    images = torch.randn(2, 3, 64, 64)
    features = ours.eval()(images)
    torch.testing.assert_close(features, theirs.eval()(images))
    assert features.shape == (2, ours.feature_dim)


def test_small_images_keep_their_resolution():
    ours = make_backbone("resnet18", 32)
    theirs = torchvision.models.resnet18()
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def test_starts_like_torchvision():
    theirs = torchvision.models.resnet18().state_dict()
    for name, parameter in make_backbone("resnet18", 224).named_parameters():
        measure = torch.std if parameter.ndim > 1 else torch.mean
        expected = measure(theirs[name]).item()
        assert measure(parameter).item() == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize("arch, last", [("resnet18x0.5", "bn2"), ("resnet50x0.5", "bn3")])
def test_zero_init_residual(arch, last):
    """Each block starts as the identity."""
    for stage in make_backbone(arch, 32, zero_init_residual=True).children():
        if isinstance(stage, nn.Sequential):
            for block in stage:
                assert (block.get_submodule(last).weight == 0).all()
                assert (block.bn1.weight == 1).all()


@pytest.mark.parametrize("arch, image_size, shapes", [
    ("resnet8", 32, [(32, 16), (64, 8), (128, 4)]),
    ("resnet20", 32, [(32, 16), (64, 8), (128, 4)]),
    ("resnet8x2", 32, [(64, 16), (128, 8), (256, 4)]),
    ("resnet18", 32, [(64, 32), (128, 16), (256, 8), (512, 4)]),
    ("resnet18x0.5", 65, [(32, 17), (64, 9), (128, 5), (256, 3)]),
    ("resnet50x0.25", 64, [(64, 64), (128, 32), (256, 16), (512, 8)]),
    ("resnet18", 96, [(64, 24), (128, 12), (256, 6), (512, 3)])])
def test_width_and_resolution_of_the_stages(arch, image_size, shapes):
    """Channels and side of what each of them puts out; the mean of the last is the features."""
    backbone = make_backbone(arch, image_size).eval()
    outputs = []

    def keep(module, inputs, output):
        outputs.append(output)

    for stage in backbone.stages:
        backbone.get_submodule(stage).register_forward_hook(keep)
    features = backbone(torch.randn(1, 3, image_size, image_size))
    assert [output.shape for output in outputs] == [(1, c, side, side) for c, side in shapes]
    assert torch.equal(outputs[-1].mean((2, 3)), features)
    assert features.shape == (1, backbone.feature_dim)


@pytest.mark.parametrize("arch, feature_dim", [
    ("alexnet", 4096), ("vgg11_bn", 4096), ("convnext_tiny", 768), ("densenet121", 1024),
    ("efficientnet_b0", 1280), ("mnasnet0_5", 1280), ("mobilenet_v3_small", 1024),
    ("regnet_y_400mf", 440), ("resnext50_32x4d", 2048), ("shufflenet_v2_x0_5", 1024),
    pytest.param("swin_t", 768, marks=pytest.mark.torture)])
@torch.no_grad()
def test_other_families(arch, feature_dim):
    on_meta = not arch.startswith(("regnet", "swin"))  # which compute while they are built
    with torch.device("meta" if on_meta else "cpu"):
        backbone = make_backbone(arch, 96).eval()
        assert backbone(torch.empty(2, 3, 96, 96)).shape == (2, feature_dim)
    assert backbone.feature_dim == feature_dim


@pytest.mark.parametrize("arch", ["resnet49", "resnet", "resnext", "fcn_resnet50", "abacus"])
def test_an_unknown_network_is_refused_by_name(arch):
    with pytest.raises(Failure, match=f"--arch {arch}: neither"):
        make_backbone(arch, 96)


def test_a_network_that_ends_in_a_convolution_is_refused():
    with torch.device("meta"), pytest.raises(Failure, match="squeezenet1_1: it has no linear"):
        make_backbone("squeezenet1_1", 96)
