"""The ResNets are torchvision's, key for key and number for number."""

import pytest
import torch
import torchvision
from torch import nn

from common import make_backbone


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_equals_torchvision(arch):
    ours, theirs = make_backbone(arch, 224), torchvision.models.get_model(arch)
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))
    assert ours(images).shape == (2, ours.feature_dim)


def test_starts_like_torchvision():
    torch.manual_seed(0)
    ours, theirs = make_backbone("resnet18", 224), torchvision.models.resnet18()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters()):
        if a.ndim > 1:
            assert a.std().item() == pytest.approx(b.std().item(), rel=0.05), name


def test_small_images_keep_their_resolution():
    torch.manual_seed(0)
    ours, theirs = make_backbone("resnet18", 32), torchvision.models.resnet18()
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)  # the README's two lines
    theirs.maxpool, theirs.fc = nn.Identity(), nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize("arch, dim", [("resnet18x2", 1024), ("resnet18x0.5", 256),
                                       ("resnet50x2", 4096), ("resnet8", 128), ("resnet8x2", 256)])
def test_width(arch, dim):
    backbone = make_backbone(arch, 32)
    assert backbone.feature_dim == dim
    assert backbone.eval()(torch.randn(1, 3, 32, 32)).shape == (1, dim)
