"""ResNets are torchvision's, key for key and number for number; its other networks fit as well."""

import argparse
import contextlib

import pytest
import torch
import torchvision
from torch import nn

from common import DEPTHS, architecture, make_backbone


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", *(
    pytest.param(arch, marks=pytest.mark.torture) for arch in ("resnet101", "resnet152"))])
def test_equals_torchvision(arch):
    with torch.device("meta"):  # without the seconds that random weights take
        theirs = torchvision.models.get_model(arch)
    ours, theirs.fc = make_backbone(arch, 224), nn.Identity()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))
    assert ours(images).shape == (2, ours.feature_dim)


def test_small_images_keep_their_resolution():
    ours, theirs = make_backbone("resnet18", 32), torchvision.models.resnet18()
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)  # the README's two lines
    theirs.maxpool, theirs.fc = nn.Identity(), nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def test_starts_like_torchvision():
    ours, theirs = make_backbone("resnet18", 224), torchvision.models.resnet18().state_dict()
    for name, a in ours.named_parameters():
        found, expected = ((x.std() if x.ndim > 1 else x.mean()).item() for x in (a, theirs[name]))
        assert found == pytest.approx(expected, rel=0.05), name
    for arch, last in ("resnet18", "bn2"), ("resnet50", "bn3"):
        block = make_backbone(arch, 32, zero_init_residual=True).layer2[1]  # starts as the identity
        assert not block.get_submodule(last).weight.any() and (block.bn1.weight == 1).all()


@pytest.mark.parametrize("arch, image_size, shapes", [
    ("resnet8", 32, [(32, 16), (64, 8), (128, 4)]),
    ("resnet20", 32, [(32, 16), (64, 8), (128, 4)]),
    ("resnet8x2", 32, [(64, 16), (128, 8), (256, 4)]),
    ("resnet18", 32, [(64, 32), (128, 16), (256, 8), (512, 4)]),
    ("resnet18x2", 65, [(128, 17), (256, 9), (512, 5), (1024, 3)]),
    ("resnet50x0.5", 64, [(128, 64), (256, 32), (512, 16), (1024, 8)]),
    ("resnet18", 96, [(64, 24), (128, 12), (256, 6), (512, 3)])])
def test_width_and_resolution_of_the_stages(arch, image_size, shapes):
    """Channels and side of what each of them puts out; the mean of the last is the features."""
    backbone, outputs = make_backbone(arch, image_size).eval(), []
    for stage in backbone.stages:
        backbone.get_submodule(stage).register_forward_hook(lambda *x: outputs.append(x[-1]))
    features = backbone(torch.randn(1, 3, image_size, image_size))
    assert [output.shape for output in outputs] == [(1, c, side, side) for c, side in shapes]
    assert torch.equal(outputs[-1].mean((2, 3)), features)
    assert features.shape == (1, backbone.feature_dim)


@pytest.mark.parametrize("arch, dim", [
    ("alexnet", 256), ("vgg11_bn", 512), ("convnext_tiny", 768), ("densenet121", 1024),
    ("efficientnet_b0", 1280), ("efficientnet_v2_s", 1280), ("mnasnet0_5", 1280),
    ("mobilenet_v2", 1280), ("mobilenet_v3_small", 1024), ("regnet_y_400mf", 440),
    ("resnext50_32x4d", 2048), ("shufflenet_v2_x0_5", 1024), ("swin_t", 768), ("swin_v2_t", 768),
    ("wide_resnet50_2", 2048)])
def test_other_families(arch, dim):
    assert architecture(arch) == arch
    on_meta = not arch.startswith(("regnet", "swin"))  # which compute while they are built
    with torch.device("meta" if on_meta else "cpu"):
        backbone = make_backbone(arch, 224).eval()
        assert backbone(torch.empty(2, 3, 96, 96)).shape == (2, backbone.feature_dim) == (2, dim)


def test_all_other_networks_are_of_these_families():
    families = ("resnet", "alexnet", "vgg", "convnext", "densenet", "efficientnet", "mnasnet",
                "mobilenet", "regnet", "resnext", "shufflenet", "swin", "wide_resnet")
    for arch in torchvision.models.list_models(torchvision.models):
        with contextlib.suppress(argparse.ArgumentTypeError, ValueError):
            assert architecture(arch).startswith(families)


@pytest.mark.parametrize("arch", "resnet49 vgg12_bn vgg11x2 resnet18xx2 resnet18x-1 resnet18x0.001 "
                         "resnet18xnan resnet18xinf".split())
def test_unknown_architecture(arch):
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):  # argparse refuses both
        architecture(arch)
    assert architecture("resnet18x0.25") == "resnet18x0.25"
