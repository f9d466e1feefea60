"""BYOL against independent slow versions, and each of the details that are commonly wrong."""

import copy
import math

import pytest
import torch
from torch import nn

import byol
import common
from byol import BYOL, byol_loss, ema_update, make_optimizer, spread


def slow_loss(p1, p2, z1, z2):
    """2 - 2 cos, pair by pair, in both directions."""
    total = 0.0
    for p, z in (*zip(p1, z2), *zip(p2, z1)):
        total = total + 2 - 2 * (p @ z) / ((p @ p).sqrt() * (z @ z).sqrt())
    return total / len(p1)


def test_loss_and_gradient_equal_slow_version():
    vectors = [torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    fast, slow = byol_loss(*vectors), slow_loss(*vectors)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, vectors[:2]) for loss in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    z1, z2 = vectors[2].detach(), vectors[3].detach()
    assert torch.autograd.gradcheck(lambda a, b: byol_loss(a, b, z1, z2), vectors[:2])


def test_targets_get_no_gradient():
    vectors = [torch.randn(5, 7, requires_grad=True) for _ in range(4)]
    byol_loss(*vectors).backward()
    assert [v.grad is not None for v in vectors] == [True, True, False, False]


def test_loss_at_right_angles_and_at_extremes():
    z = torch.eye(8) * 1e15  # the loss normalises
    assert byol_loss(z, z, z, z).item() == pytest.approx(0, abs=1e-6)
    assert byol_loss(z, z, -z, -z).item() == pytest.approx(8)
    assert byol_loss(z, z, z.roll(1, 0), z.roll(1, 0)).item() == pytest.approx(4)
    assert byol_loss(z, -z, -z, z).item() == pytest.approx(0, abs=1e-6)  # p1 with z2, p2 with z1


def test_spread():
    assert spread(torch.randn(4096, 32)).item() == pytest.approx(1, abs=0.02)
    assert spread(5 + 1e-3 * torch.randn(64, 32)) < 1e-3
    assert spread(torch.randn(64, 1) * torch.ones(32)).item() > 0.9  # two directions, far apart


def test_heads_are_those_of_the_official_code():
    model = BYOL(nn.Flatten(), 12, hidden_dim=9, proj_dim=5)
    for head, in_dim in (model.online.projector, 12), (model.predictor, 5):
        assert [type(m) for m in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert head[0].weight.shape == (9, in_dim) and head[0].bias is not None
        assert head[3].weight.shape == (5, 9) and head[3].bias is None


def test_predictor_is_only_online():
    torch.manual_seed(0)
    model = BYOL(nn.Flatten(), 12, hidden_dim=9, proj_dim=5)
    views = torch.randn(2, 6, 3, 2, 2)
    p1, p2, z1, z2 = model(*views)
    assert p1.shape == p2.shape == z1.shape == z2.shape == (6, 5)
    for p, z, view in (p1, z1, views[0]), (p2, z2, views[1]):
        torch.testing.assert_close(z, model.online(view))  # the target starts as a copy
        torch.testing.assert_close(p, model.predictor(model.online(view)))
        assert p.requires_grad and not z.requires_grad
    assert not any(p.requires_grad for p in model.target.parameters())
    names = {name for name, _ in model.online.named_parameters()}
    assert names == {name for name, _ in model.target.named_parameters()}


def test_each_view_has_its_own_batch_statistics():
    model = BYOL(nn.Flatten(), 12, hidden_dim=9, proj_dim=5)
    view1, view2, other = torch.randn(3, 6, 3, 2, 2)
    p1, p2, z1, z2 = model(view1, view2)
    q1, q2, y1, y2 = model(view1, 3 + other)
    assert torch.equal(p1, q1) and torch.equal(z1, y1)
    assert not torch.equal(p2, q2) and not torch.equal(z2, y2)


def test_target_normalises_by_batch_statistics_and_keeps_its_own_running_ones():
    torch.manual_seed(0)
    model = BYOL(nn.Flatten(), 12, hidden_dim=9, proj_dim=5)
    views = 3 + torch.randn(2, 6, 3, 2, 2)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        for p in model.target.parameters():
            p.add_(0.1 * torch.randn_like(p))
    linear1, bn, _, linear2 = model.target.projector
    hidden = linear1(views[0].flatten(1))
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + bn.eps).sqrt()
    expected = linear2((hidden * bn.weight + bn.bias).relu())
    torch.testing.assert_close(model(*views)[2], expected, rtol=1e-4, atol=1e-5)

    mean = torch.zeros(9)
    for view in views:
        mean = 0.9 * mean + 0.1 * linear1(view.flatten(1)).mean(0)
    torch.testing.assert_close(bn.running_mean, mean)
    buffers = copy.deepcopy(dict(model.target.named_buffers()))
    assert not torch.equal(buffers["projector.1.running_mean"],
                           model.online.projector[1].running_mean)
    ema_update(model.target, model.online, 0.5)
    for name, buffer in model.target.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_ema_update_equals_slow_version():
    target, online = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    expected = [0.7 * t + (1 - 0.7) * o for t, o in zip(target.parameters(), online.parameters())]
    before = [p.clone() for p in online.parameters()]
    ema_update(target, online, 0.7)
    for t, o, b, e in zip(target.parameters(), online.parameters(), before, expected):
        torch.testing.assert_close(t, e, rtol=1e-12, atol=1e-12)
        assert torch.equal(o, b)
    ema_update(target, online, 1.0)
    torch.testing.assert_close(list(target.parameters()), expected, rtol=1e-12, atol=1e-12)


def test_target_moves_after_each_step_on_a_cosine_from_base_to_1(monkeypatch, no_report,
                                                                 class_folders):
    """The whole of `train`, on 12 images: three steps in each of two epochs."""
    calls = []
    step, update = torch.optim.SGD.step, byol.ema_update

    def recorded_step(self, *arguments):
        calls.append("step")
        return step(self, *arguments)

    def recorded_update(target, online, ema_momentum):
        before = [p.clone() for p in target.parameters()]
        update(target, online, ema_momentum)
        for t, b, o in zip(target.parameters(), before, online.parameters()):
            torch.testing.assert_close(t, ema_momentum * b + (1 - ema_momentum) * o)
        calls.append(ema_momentum)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded_step)
    monkeypatch.setattr(byol, "ema_update", recorded_update)
    flags = "--data images --recipe demo --max-images 12 -b 4 --epochs 2 --ema-momentum 0.8 -j 0"
    byol.train(byol.parse_args(flags.split()))
    assert calls[::2] == ["step"] * 6
    assert calls[1::2] == pytest.approx([1 - 0.2 * (1 + math.cos(math.pi * s / 6)) / 2
                                         for s in range(6)])


def test_biases_and_bn_are_neither_decayed_nor_adapted_and_the_target_is_not_optimised():
    model = BYOL(common.make_backbone("resnet8", 32), 128, 32, 16)
    trained = {*model.online.parameters(), *model.predictor.parameters()}
    for name in "lars", "sgd":
        weights, others = make_optimizer(name, model, 0.1).param_groups
        assert weights["weight_decay"] == 0.1 and others["weight_decay"] == 0
        assert all(p.ndim > 1 for p in weights["params"])
        assert all(p.ndim == 1 for p in others["params"])
        if name == "lars":
            assert weights["adapt"] and not others["adapt"]
        assert {*weights["params"], *others["params"]} == trained


def test_augmentation_is_that_of_the_paper(operations, class_folders):
    """The views differ in blur and solarisation."""
    byol.train(byol.parse_args("--data images --recipe imagenet -a resnet8 --image-size 96 "
                               "--hidden-dim 8 --proj-dim 8 -b 8 --epochs 0".split()))

    def view(blur, solarize):
        return [("random_resized_crop", {"size": 96, "scale": (0.08, 1.0),
                                         "interpolation": "bicubic"}),
                ("random_horizontal_flip", {"p": 0.5}),
                ("color_jitter", {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1,
                                  "p": 0.8}),
                ("random_grayscale", {"p": 0.2}),
                ("gaussian_blur", {"p": blur, "sigma": (0.1, 2.0)}),
                ("random_solarize", {"p": solarize}), ("normalize", {})]

    assert operations == view(1.0, 0.0) + view(0.1, 0.2)


# ---- collapse, and what prevents it


def spread_after_training(predictor=True):
    """Mean spread in steps 80 to 100 of a small network; its views are an image and noise."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.BatchNorm1d(64), nn.ReLU(),
                             nn.Linear(64, 32))
    model = BYOL(backbone, 32, hidden_dim=64, proj_dim=16)
    if not predictor:
        model.predictor = nn.Identity()
    optimizer = make_optimizer("sgd", model, 0.0)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.3
    spreads = []
    for _ in range(100):
        images = torch.randn(64, 3, 4, 4)
        p1, p2, z1, z2 = model(*(images + 0.5 * torch.randn_like(images) for _ in range(2)))
        loss = byol_loss(p1, p2, z1, z2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update(model.target, model.online, 0.9)
        spreads.append(spread(z1).item())
    return sum(spreads[80:]) / 20, loss.item()


def test_without_predictor_it_collapses_and_the_health_number_shows_it():
    healthy, loss = spread_after_training()
    assert healthy > 0.7 and loss > 0.5
    collapsed, loss = spread_after_training(predictor=False)
    assert collapsed < 0.25 and loss < 0.1  # a perfect loss, for nothing
