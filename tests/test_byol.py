"""BYOL against independent slow versions, and each of the details that are commonly wrong."""

import copy
import math

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

import byol
import common
import linear_probe
from byol import BYOL, byol_loss, ema_update, make_optimizer, spread

# ----------------------------------------------------------------------------------------- loss


def slow_loss(p1, p2, z1, z2):
    """2 - 2 cos, pair by pair, in both directions."""
    total = 0.0
    for p, z in [*zip(p1, z2), *zip(p2, z1)]:
        cosine = (p @ z) / ((p @ p).sqrt() * (z @ z).sqrt())
        total = total + 2 - 2 * cosine
    return total / len(p1)


def random_vectors():
    """Four (5, 7) that require gradients."""
    return [torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(4)]


def test_loss_and_gradient_equal_slow_version():
    p1, p2, z1, z2 = random_vectors()
    fast = byol_loss(p1, p2, z1, z2)
    slow = slow_loss(p1, p2, z1, z2)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    fast_gradients = torch.autograd.grad(fast, [p1, p2])
    slow_gradients = torch.autograd.grad(slow, [p1, p2])
    torch.testing.assert_close(fast_gradients, slow_gradients, rtol=1e-10, atol=1e-12)


def test_targets_get_no_gradient():
    p1, p2, z1, z2 = random_vectors()
    byol_loss(p1, p2, z1, z2).backward()
    assert p1.grad is not None and p2.grad is not None
    assert z1.grad is None and z2.grad is None


def test_loss_at_right_angles_and_at_extremes():
    z = torch.eye(8) * 1e15  # the loss normalizes
    other = z.roll(1, 0)
    assert byol_loss(z, z, z, z).item() == pytest.approx(0, abs=1e-6)
    assert byol_loss(z, z, -z, -z).item() == pytest.approx(8)
    assert byol_loss(z, z, other, other).item() == pytest.approx(4)
    assert byol_loss(z, -z, -z, z).item() == pytest.approx(0, abs=1e-6)  # p1 with z2, p2 with z1


def test_spread():
    assert spread(torch.randn(4096, 32)).item() == pytest.approx(1, abs=0.02)
    assert spread(5 + 1e-3 * torch.randn(64, 32)) < 1e-3
    assert spread(torch.randn(64, 1) * torch.ones(32)) > 0.9  # two directions, far apart


# ---------------------------------------------------------------------------------------- model


def small_model():
    """For images of 2 x 2 pixels, which it takes as 12 features."""
    return BYOL(nn.Flatten(), 12, hidden_dim=9, proj_dim=5)


def test_heads_are_those_of_the_official_code():
    model = small_model()
    for head, in_dim in (model.online.projector, 12), (model.predictor, 5):
        assert [type(module) for module in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert head[0].weight.shape == (9, in_dim) and head[0].bias is not None
        assert head[3].weight.shape == (5, 9) and head[3].bias is None


def test_only_the_online_network_has_a_predictor_and_is_trained():
    model = small_model()
    view1, view2 = torch.randn(2, 6, 3, 2, 2)
    p1, p2, z1, z2 = model(view1, view2)
    for view, p, z in (view1, p1, z1), (view2, p2, z2):
        assert p.shape == z.shape == (6, 5)
        torch.testing.assert_close(z, model.online(view))  # the target starts as a copy
        torch.testing.assert_close(p, model.predictor(model.online(view)))
        assert p.requires_grad and not z.requires_grad
    online = dict(model.online.named_parameters())
    target = dict(model.target.named_parameters())
    assert online.keys() == target.keys()
    assert all(p.requires_grad for p in online.values())
    assert not any(p.requires_grad for p in target.values())


def test_each_view_has_its_own_batch_statistics():
    model = small_model()
    view1, view2, other = torch.randn(3, 6, 3, 2, 2)
    p1, p2, z1, z2 = model(view1, view2)
    p1_again, p2_changed, z1_again, z2_changed = model(view1, 3 + other)
    assert torch.equal(p1, p1_again) and torch.equal(z1, z1_again)
    assert not torch.equal(p2, p2_changed) and not torch.equal(z2, z2_changed)


def test_target_normalises_by_the_batch():
    """It stays in training mode."""
    model = small_model()
    view1, view2 = 3 + torch.randn(2, 6, 3, 2, 2)
    linear1, norm, _, linear2 = model.target.projector
    hidden = linear1(view1.flatten(1))
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + norm.eps).sqrt()
    expected = linear2((hidden * norm.weight + norm.bias).relu())
    _, _, z1, _ = model(view1, view2)
    torch.testing.assert_close(z1, expected, rtol=1e-4, atol=1e-5)


def test_target_keeps_running_statistics_of_its_own():
    model = small_model()
    with torch.no_grad():
        for p in model.target.parameters():
            p.add_(0.1 * torch.randn_like(p))
    linear1, norm, _, _ = model.target.projector
    mean = torch.zeros(9)
    view1, view2 = 3 + torch.randn(2, 6, 3, 2, 2)
    model(view1, view2)
    for view in view1, view2:
        mean = 0.9 * mean + 0.1 * linear1(view.flatten(1)).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    assert not torch.equal(norm.running_mean, model.online.projector[1].running_mean)

    before = copy.deepcopy(dict(model.target.named_buffers()))
    ema_update(model.target, model.online, 0.5)
    for name, buffer in model.target.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_target_has_no_dropout_and_no_stochastic_depth():
    backbone = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), StochasticDepth(0.5, "row"))
    model = BYOL(backbone, 12, hidden_dim=9, proj_dim=5)
    view = torch.randn(6, 3, 2, 2)
    assert torch.equal(model.target(view), model.target(view))
    assert not torch.equal(model.online(view), model.online(view))


# ------------------------------------------------------------------------------------- training


def test_ema_update_equals_slow_version():
    target = nn.Linear(3, 2).double()
    online = nn.Linear(3, 2).double()
    before = copy.deepcopy(online)
    expected = [0.7 * t + 0.3 * o for t, o in zip(target.parameters(), online.parameters())]
    ema_update(target, online, 0.7)
    torch.testing.assert_close(list(target.parameters()), expected, rtol=1e-12, atol=1e-12)
    ema_update(target, online, 1.0)
    torch.testing.assert_close(list(target.parameters()), expected, rtol=1e-12, atol=1e-12)
    for p, old in zip(online.parameters(), before.parameters()):
        assert torch.equal(p, old)


def test_target_moves_after_each_step_with_a_momentum_that_rises_to_1(monkeypatch, no_report,
                                                                      class_folders):
    """The whole of `train`, on 12 images: three steps in each of two epochs."""
    calls = []
    momenta = []
    step = torch.optim.SGD.step
    update = byol.ema_update

    def recorded_step(optimizer):
        calls.append("step")
        return step(optimizer)

    def recorded_update(target, online, ema_momentum):
        calls.append("update")
        momenta.append(ema_momentum)
        update(target, online, ema_momentum)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded_step)
    monkeypatch.setattr(byol, "ema_update", recorded_update)
    flags = "--data images --recipe demo --max-images 12 -b 4 --epochs 2 --ema-momentum 0.8 -j 0"
    byol.train(byol.parse_args(flags.split()))
    assert calls == ["step", "update"] * 6
    expected = [1 - 0.2 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert momenta == pytest.approx(expected)


@pytest.mark.parametrize("name", ["lars", "sgd"])
def test_biases_and_bn_are_neither_decayed_nor_adapted_and_the_target_is_not_optimised(name):
    model = BYOL(common.make_backbone("resnet8", 32), 128, hidden_dim=32, proj_dim=16)
    weights, others = make_optimizer(name, model, 0.1).param_groups
    assert weights["weight_decay"] == 0.1 and others["weight_decay"] == 0
    if name == "lars":
        assert weights["adapt"] and not others["adapt"]
    assert all(p.ndim > 1 for p in weights["params"])
    assert all(p.ndim == 1 for p in others["params"])
    optimised = {*weights["params"], *others["params"]}
    assert optimised == {*model.online.parameters(), *model.predictor.parameters()}


def test_augmentation_is_that_of_the_paper(operations, monkeypatch, class_folders):
    """The two views differ in blur and solarize."""

    def view(blur, solarize):
        return [("random_resized_crop", {"size": 96, "scale": (0.08, 1.0),
                                         "interpolation": "bicubic"}),
                ("random_horizontal_flip", {"p": 0.5}),
                ("color_jitter", {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1,
                                  "p": 0.8}),
                ("random_grayscale", {"p": 0.2}),
                ("gaussian_blur", {"p": blur, "sigma": (0.1, 2.0)}),
                ("random_solarize", {"p": solarize}),
                ("normalize", {})]

    monkeypatch.setattr(linear_probe, "quick_knn", lambda *args, **kwargs: None)
    flags = ("--data images --recipe imagenet -a resnet8 --image-size 96 --hidden-dim 8 "
             "--proj-dim 8 -b 8 --max-images 8 --epochs 1 -j 0")
    byol.train(byol.parse_args(flags.split()))
    of_both_views = view(blur=1.0, solarize=0.0) + view(blur=0.1, solarize=0.2)
    assert operations == 2 * of_both_views  # in views.png, and in the only step


# -------------------------------------------------------------- collapse, and what prevents it


def train_small_model(predictor):
    """-> mean spread in steps 80 to 100, and the last loss. The two views of an image are the image
    and different noise."""
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.BatchNorm1d(64), nn.ReLU(),
                             nn.Linear(64, 32))
    model = BYOL(backbone, 32, hidden_dim=64, proj_dim=16)
    if not predictor:
        model.predictor = nn.Identity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    spreads = []
    for _ in range(100):
        images = torch.randn(64, 3, 4, 4)
        view1 = images + 0.5 * torch.randn_like(images)
        view2 = images + 0.5 * torch.randn_like(images)
        p1, p2, z1, z2 = model(view1, view2)
        loss = byol_loss(p1, p2, z1, z2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update(model.target, model.online, 0.9)
        spreads.append(spread(z1).item())
    return sum(spreads[80:]) / 20, loss.item()


def test_without_predictor_it_collapses_and_the_health_number_shows_it():
    healthy, loss = train_small_model(predictor=True)
    assert healthy > 0.7 and loss > 0.5
    collapsed, loss = train_small_model(predictor=False)
    assert collapsed < 0.25 and loss < 0.1  # a perfect loss, for nothing
