"""SimSiam against independent slow versions, and each of the details that are commonly wrong."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import simsiam
from simsiam import SimSiam, make_optimizer, simsiam_loss, spread


def slow_loss(p1, p2, z1, z2):
    """Equation 4, pair by pair."""
    total = 0.0
    for p, z in (*zip(p1, z2), *zip(p2, z1)):
        total = total - (p / p.norm()) @ (z / z.norm()) / 2
    return total / len(p1)


def test_loss_and_gradient_equal_slow_version():
    vectors = [torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    fast, slow = simsiam_loss(*vectors), slow_loss(*vectors)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, vectors[:2]) for loss in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    z1, z2 = vectors[2].detach(), vectors[3].detach()
    assert torch.autograd.gradcheck(lambda a, b: simsiam_loss(a, b, z1, z2), vectors[:2])


def test_stop_gradient_is_inside_the_loss():
    vectors = [torch.randn(5, 7, requires_grad=True) for _ in range(4)]
    simsiam_loss(*vectors).backward()
    assert [v.grad is not None for v in vectors] == [True, True, False, False]


def test_loss_at_right_angles_and_at_extremes():
    z = torch.eye(8) * 1e15  # the loss normalises
    assert simsiam_loss(z, z, z, z).item() == pytest.approx(-1)
    assert simsiam_loss(z, z, -z, -z).item() == pytest.approx(1)
    assert simsiam_loss(z, z, z.roll(1, 0), z.roll(1, 0)).item() == pytest.approx(0, abs=1e-6)
    assert simsiam_loss(z, -z, -z, z).item() == pytest.approx(-1)  # p1 with z2, p2 with z1


def test_spread():
    assert spread(torch.randn(4096, 32)).item() == pytest.approx(1, abs=0.02)
    assert spread(5 + 1e-3 * torch.randn(64, 32)) < 1e-3


@pytest.mark.parametrize("proj_layers", [2, 3])
def test_heads_are_those_of_the_official_code(proj_layers):
    model = SimSiam(nn.Flatten(), 12, proj_dim=8, pred_dim=2, proj_layers=proj_layers)
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    kinds = [type(m) for m in model.projector]
    assert kinds == hidden * (proj_layers - 1) + [nn.Linear, nn.BatchNorm1d]
    assert [m.affine for m in model.projector[1::3]] == [True] * (proj_layers - 1) + [False]
    assert all(m.bias is None for m in model.projector[::3])
    assert [type(m) for m in model.predictor] == [*hidden, nn.Linear]  # no BN at the output
    assert model.predictor[0].weight.shape == (2, 8) and model.predictor[0].bias is None
    assert model.predictor[3].weight.shape == (8, 2) and model.predictor[3].bias is not None


def test_z_is_what_the_projector_gives_and_p_what_the_predictor_makes_of_it():
    torch.manual_seed(0)
    model = SimSiam(nn.Flatten(), 12, proj_dim=8, pred_dim=2)
    views = torch.randn(2, 6, 3, 2, 2)
    p1, p2, z1, z2 = model(*views)
    for p, z, view in (p1, z1, views[0]), (p2, z2, views[1]):
        torch.testing.assert_close(z, model.projector(model.backbone(view)))
        torch.testing.assert_close(p, model.predictor(z))


def test_each_view_has_its_own_batch_statistics():
    model = SimSiam(nn.Flatten(), 12, proj_dim=8, pred_dim=2)
    view1, view2 = torch.randn(6, 3, 2, 2), 3 + torch.randn(6, 3, 2, 2)
    for z in model(view1, view2)[2:]:
        torch.testing.assert_close(z.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    assert model.projector[1].num_batches_tracked == 2


def test_everything_is_decayed_and_each_parameter_is_in_one_group():
    model = SimSiam(common.make_backbone("resnet8", 32), 128, 32, 8)
    encoder, predictor = make_optimizer(model, 0.1).param_groups
    assert encoder["weight_decay"] == predictor["weight_decay"] == 0.1
    assert {*predictor["params"]} == {*model.predictor.parameters()}
    assert {*encoder["params"], *predictor["params"]} == {*model.parameters()}
    assert len(encoder["params"]) + len(predictor["params"]) == len([*model.parameters()])


@pytest.fixture
def rates(monkeypatch, no_report, class_folders):
    """rates(flags) -> those of encoder and predictor in each step of the whole of `train`."""
    seen, step = [], torch.optim.SGD.step

    def recorded_step(self, *arguments):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *arguments)

    def run(flags):
        flags = f"--data images --recipe demo --max-images 12 -b 4 --lr 64 -j 0 {flags}"
        simsiam.train(simsiam.parse_args(flags.split()))
        return map(list, zip(*seen))

    monkeypatch.setattr(torch.optim.SGD, "step", recorded_step)
    return run


def test_rate_falls_once_per_epoch_and_the_predictors_not_at_all(rates):
    encoder, predictor = rates("--epochs 3 --warmup-epochs 0")
    assert predictor == [1.0] * 9
    cosines = [(1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3)]
    assert encoder == pytest.approx([c for c in cosines for _ in range(3)])


def test_warm_up_on_request_goes_by_steps(rates):
    encoder, predictor = rates("--epochs 2 --warmup-epochs 0.67")
    assert encoder == pytest.approx([0.5, 1, 1, *[(1 + math.cos(math.pi / 4)) / 2] * 3])
    assert predictor == [1.0] * 6


def test_augmentation_is_that_of_the_official_code(operations, class_folders):
    simsiam.train(simsiam.parse_args("--data images --recipe imagenet -a resnet8 --image-size 96 "
                                     "--proj-dim 8 --pred-dim 4 -b 8 --epochs 0".split()))
    view = [("random_resized_crop", {"size": 96, "scale": (0.2, 1.0)}),  # bilinear
            ("color_jitter", {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1,
                              "p": 0.8}),
            ("random_grayscale", {"p": 0.2}), ("gaussian_blur", {"p": 0.5, "sigma": (0.1, 2.0)}),
            ("random_horizontal_flip", {"p": 0.5}), ("normalize", {})]
    assert operations == 2 * view


# ---- collapse, and what prevents it


def without_stop_gradient(p1, p2, z1, z2):
    return -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2


def spread_after_training(loss_function=simsiam_loss, predictor=True):
    """Mean spread in steps 60 to 100 of a small network; its views are an image and noise."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.BatchNorm1d(64), nn.ReLU(),
                             nn.Linear(64, 32))
    model = SimSiam(backbone, 32, proj_dim=32, pred_dim=16)
    if not predictor:
        model.predictor = nn.Identity()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.9)
    spreads = []
    for _ in range(100):
        images = torch.randn(64, 3, 4, 4)
        p1, p2, z1, z2 = model(*(images + torch.randn_like(images) for _ in range(2)))
        loss = loss_function(p1, p2, z1, z2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        spreads.append(spread(z1).item())
    return sum(spreads[60:]) / 40


@pytest.mark.parametrize("broken", [{"loss_function": without_stop_gradient}, {"predictor": False}])
def test_without_stop_gradient_or_predictor_it_collapses_and_the_health_number_shows_it(broken):
    assert spread_after_training() > 0.95
    assert spread_after_training(**broken) < 0.75
