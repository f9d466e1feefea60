"""ResNets and VGGs are torchvision's, key for key and number for number."""

import argparse

import pytest
import torch
import torchvision
from torch import nn

from common import DEPTHS, VGGS, Failure, architecture, make_backbone


def untrained(arch):
    """torchvision's, without the seconds that its random weights take."""
    with torch.device("meta"):
        return torchvision.models.get_model(arch)


@pytest.mark.parametrize("arch", sorted(set(DEPTHS) - {"resnet8", "resnet20"}))
def test_equals_torchvision(arch):
    ours, theirs = make_backbone(arch, 224), untrained(arch)
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))
    assert ours(images).shape == (2, ours.feature_dim)


@pytest.mark.parametrize("arch", VGGS)
def test_vgg_equals_torchvision(arch):
    ours, theirs = make_backbone(arch, 224), untrained(arch)
    own_keys = [k for k in theirs.state_dict() if k.startswith("features.")]
    assert list(ours.state_dict()) == own_keys
    theirs.load_state_dict(ours.state_dict(), strict=False, assign=True)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(images), theirs.eval().features(images).mean((2, 3)))
    assert ours(images).shape == (2, ours.feature_dim) == (2, 512)


@pytest.mark.parametrize("arch", ["resnet18", "vgg11_bn"])
def test_starts_like_torchvision(arch):
    torch.manual_seed(0)
    ours, theirs = make_backbone(arch, 224), torchvision.models.get_model(arch).state_dict()
    for name, a in ours.named_parameters():
        expected = theirs[name].std().item() if a.ndim > 1 else theirs[name].mean().item()
        found = a.std().item() if a.ndim > 1 else a.mean().item()
        assert found == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize("arch, image_size, shapes", [
    ("resnet8", 32, [(32, 16), (64, 8), (128, 4)]),
    ("resnet20", 32, [(32, 16), (64, 8), (128, 4)]),
    ("resnet18", 32, [(64, 32), (128, 16), (256, 8), (512, 4)]),
    ("resnet50x0.5", 64, [(128, 64), (256, 32), (512, 16), (1024, 8)]),
    ("resnet18", 96, [(64, 24), (128, 12), (256, 6), (512, 3)]),
    ("vgg11_bn", 32, [(64, 16), (128, 8), (256, 4), (512, 2), (512, 1)]),
    ("vgg19_bnx0.5", 64, [(32, 32), (64, 16), (128, 8), (256, 4), (256, 2)])])
def test_stages_are_where_the_resolution_changes(arch, image_size, shapes):
    """Channels and side of what each of them puts out; the mean of the last is the features."""
    backbone, outputs = make_backbone(arch, image_size).eval(), []
    for stage in backbone.stages:
        backbone.get_submodule(stage).register_forward_hook(lambda *x: outputs.append(x[-1]))
    features = backbone(torch.randn(1, 3, image_size, image_size))
    assert [output.shape for output in outputs] == [(1, c, side, side) for c, side in shapes]
    assert torch.equal(outputs[-1].mean((2, 3)), features)


def test_images_too_small_for_a_vgg():
    with pytest.raises(Failure, match="32 pixels"):
        make_backbone("vgg11_bn", 24)(torch.randn(1, 3, 24, 24))


@pytest.mark.parametrize("arch", ["resnet49", "vgg11", "vgg12_bn", "vgg11_bnx0", "resnet18xx2",
                                  "resnet18x-1", "resnet18x0.001", ""])
def test_unknown_architecture(arch):
    with pytest.raises(argparse.ArgumentTypeError, match="vgg19_bn"):
        architecture(arch)
    assert architecture("vgg16_bnx0.25") == "vgg16_bnx0.25"


def test_small_images_keep_their_resolution():
    torch.manual_seed(0)
    ours, theirs = make_backbone("resnet18", 32), torchvision.models.resnet18()
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)  # the README's two lines
    theirs.maxpool, theirs.fc = nn.Identity(), nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize("arch, dim", [("resnet18x2", 1024), ("resnet18x0.5", 256),
                                       ("resnet50x2", 4096), ("resnet8", 128), ("resnet8x2", 256),
                                       ("vgg11_bnx0.5", 256), ("vgg13_bnx2", 1024)])
def test_width(arch, dim):
    backbone = make_backbone(arch, 32)
    assert backbone.feature_dim == dim
    assert backbone.eval()(torch.randn(1, 3, 32, 32)).shape == (1, dim)
