"""SimSiam against independent slow versions, and each of the details that are commonly wrong."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import linear_probe
import simsiam
from simsiam import SimSiam, make_optimizer, simsiam_loss, spread

# ----------------------------------------------------------------------------------------- loss


def slow_loss(p1, p2, z1, z2):
    """Equation 4, pair by pair."""
    total = 0.0
    for p, z in [*zip(p1, z2), *zip(p2, z1)]:
        cosine = (p / p.norm()) @ (z / z.norm())
        total = total - cosine / 2
    return total / len(p1)


def random_vectors():
    """Four (5, 7) that require gradients."""
    return [torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(4)]


def test_loss_and_gradient_equal_slow_version():
    p1, p2, z1, z2 = random_vectors()
    fast = simsiam_loss(p1, p2, z1, z2)
    slow = slow_loss(p1, p2, z1, z2)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    fast_gradients = torch.autograd.grad(fast, [p1, p2])
    slow_gradients = torch.autograd.grad(slow, [p1, p2])
    torch.testing.assert_close(fast_gradients, slow_gradients, rtol=1e-10, atol=1e-12)


def test_stop_gradient_is_inside_the_loss():
    p1, p2, z1, z2 = random_vectors()
    simsiam_loss(p1, p2, z1, z2).backward()
    assert p1.grad is not None and p2.grad is not None
    assert z1.grad is None and z2.grad is None


def test_loss_at_right_angles_and_at_extremes():
    z = torch.eye(8) * 1e15  # the loss normalizes
    other = z.roll(1, 0)
    assert simsiam_loss(z, z, z, z).item() == pytest.approx(-1)
    assert simsiam_loss(z, z, -z, -z).item() == pytest.approx(1)
    assert simsiam_loss(z, z, other, other).item() == pytest.approx(0, abs=1e-6)
    assert simsiam_loss(z, -z, -z, z).item() == pytest.approx(-1)  # p1 with z2, p2 with z1


# ---------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("proj_layers", [2, 3])
def test_heads_are_those_of_the_official_code(proj_layers):
    model = SimSiam(nn.Flatten(), 12, proj_dim=8, pred_dim=2, proj_layers=proj_layers)
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    kinds = [type(module) for module in model.projector]
    assert kinds == hidden * (proj_layers - 1) + [nn.Linear, nn.BatchNorm1d]
    for module in model.projector[:-1]:
        if isinstance(module, nn.BatchNorm1d):
            assert module.affine
        if isinstance(module, nn.Linear):
            assert module.bias is None
    assert not model.projector[-1].affine

    kinds = [type(module) for module in model.predictor]
    assert kinds == hidden + [nn.Linear]  # no BN at the end
    assert model.predictor[0].weight.shape == (2, 8) and model.predictor[0].bias is None
    assert model.predictor[3].weight.shape == (8, 2) and model.predictor[3].bias is not None


def test_z_comes_from_the_projector_and_p_from_the_predictor():
    model = SimSiam(nn.Flatten(), 12, proj_dim=8, pred_dim=2)
    view1, view2 = torch.randn(2, 6, 3, 2, 2)
    p1, p2, z1, z2 = model(view1, view2)
    for view, p, z in (view1, p1, z1), (view2, p2, z2):
        torch.testing.assert_close(z, model.projector(model.backbone(view)))
        torch.testing.assert_close(p, model.predictor(z))


def test_each_view_has_its_own_batch_statistics():
    model = SimSiam(nn.Flatten(), 12, proj_dim=8, pred_dim=2)
    view1 = torch.randn(6, 3, 2, 2)
    view2 = 3 + torch.randn(6, 3, 2, 2)
    _, _, z1, z2 = model(view1, view2)
    for z in z1, z2:
        torch.testing.assert_close(z.mean(0), torch.zeros(8), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------- training


def test_everything_is_decayed_and_the_predictor_is_a_group_of_its_own():
    model = SimSiam(common.make_backbone("resnet8", 32), 128, proj_dim=32, pred_dim=8)
    encoder, predictor = make_optimizer(model, 0.1).param_groups
    assert encoder["weight_decay"] == predictor["weight_decay"] == 0.1
    in_encoder = {*model.backbone.parameters(), *model.projector.parameters()}
    assert {*encoder["params"]} == in_encoder
    assert {*predictor["params"]} == {*model.predictor.parameters()}


@pytest.fixture
def rates(monkeypatch, no_report, class_folders):
    """rates(flags) -> the learning rates of the encoder and of the predictor in each step of the
    whole of `train`, with three steps per epoch and a peak of 1."""
    encoder_rates = []
    predictor_rates = []
    step = torch.optim.SGD.step

    def recorded_step(optimizer):
        encoder, predictor = optimizer.param_groups
        encoder_rates.append(encoder["lr"])
        predictor_rates.append(predictor["lr"])
        return step(optimizer)

    def run(flags):
        flags = f"--data images --recipe demo --max-images 12 -b 4 --lr 64 -j 0 {flags}"
        simsiam.train(simsiam.parse_args(flags.split()))
        return encoder_rates, predictor_rates

    monkeypatch.setattr(torch.optim.SGD, "step", recorded_step)
    return run


def test_rate_falls_once_per_epoch_and_the_predictors_not_at_all(rates):
    encoder, predictor = rates("--epochs 3 --warmup-epochs 0")
    first, second, third = [(1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3)]
    assert encoder == pytest.approx([first] * 3 + [second] * 3 + [third] * 3)
    assert predictor == [1.0] * 9


def test_warm_up_goes_by_steps(rates):
    encoder, predictor = rates("--epochs 2 --warmup-epochs 0.67")  # two of the six steps
    second_epoch = (1 + math.cos(math.pi / 4)) / 2  # one of the four steps left
    assert encoder == pytest.approx([0.5, 1, 1] + [second_epoch] * 3)
    assert predictor == [1.0] * 6


def test_augmentation_is_that_of_the_official_code(operations, monkeypatch, class_folders):
    """Crops are bilinear, and the flip comes last."""
    monkeypatch.setattr(linear_probe, "quick_knn", lambda *args, **kwargs: None)
    flags = ("--data images --recipe imagenet -a resnet8 --image-size 96 --proj-dim 8 --pred-dim 4 "
             "-b 8 --max-images 8 --epochs 1 -j 0")
    simsiam.train(simsiam.parse_args(flags.split()))
    view = [("random_resized_crop", {"size": 96, "scale": (0.2, 1.0)}),
            ("color_jitter", {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1,
                              "p": 0.8}),
            ("random_grayscale", {"p": 0.2}),
            ("gaussian_blur", {"p": 0.5, "kernel_size": 13, "sigma": (0.1, 2.0)}),
            ("random_horizontal_flip", {"p": 0.5}),
            ("normalize", {})]
    assert operations == 4 * view  # two views in views.png, and two in the only step


# -------------------------------------------------------------- collapse, and what prevents it


def without_stop_gradient(p1, p2, z1, z2):
    return -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2


def spread_after_training(loss_function=simsiam_loss, predictor=True):
    """-> mean spread in steps 60 to 100 of a small model. The two views of an image are the image
    and different noise."""
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.BatchNorm1d(64), nn.ReLU(),
                             nn.Linear(64, 32))
    model = SimSiam(backbone, 32, proj_dim=32, pred_dim=16)
    if not predictor:
        model.predictor = nn.Identity()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.9)
    spreads = []
    for _ in range(100):
        images = torch.randn(64, 3, 4, 4)
        view1 = images + torch.randn_like(images)
        view2 = images + torch.randn_like(images)
        p1, p2, z1, z2 = model(view1, view2)
        loss = loss_function(p1, p2, z1, z2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        spreads.append(spread(z1).item())
    return sum(spreads[60:]) / 40


def test_without_stop_gradient_or_predictor_it_collapses_and_the_health_number_shows_it():
    assert spread_after_training() > 0.95
    assert spread_after_training(loss_function=without_stop_gradient) < 0.85
    assert spread_after_training(predictor=False) < 0.85
