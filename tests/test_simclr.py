"""SimCLR against independent slow versions, and each of the details that are commonly wrong."""

import math

import pytest
import torch
from torch import nn

import common
import simclr
from simclr import LARS, SimCLR, positive_found, simclr_loss


def slow_loss(z1, z2, temperature):
    """Equation 1, term by term, in Python floats."""
    z = [v / v.norm() for v in torch.cat([z1, z2])]
    n, total = len(z), 0.0
    for i in range(n):
        j = (i + n // 2) % n
        denominator = sum(torch.exp(z[i] @ z[k] / temperature) for k in range(n) if k != i)
        total = total - torch.log(torch.exp(z[i] @ z[j] / temperature) / denominator)
    return total / n


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_loss_and_gradient_equal_slow_version(temperature):
    z = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    fast, slow = simclr_loss(*z, temperature), slow_loss(*z, temperature)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: simclr_loss(a, b, temperature), tuple(z))


def test_loss_at_chance_and_at_extremes():
    same = torch.ones(8, 4)
    assert simclr_loss(same, same, 0.5).item() == pytest.approx(math.log(15))
    z = torch.eye(8) * 1e15  # the loss normalises
    assert simclr_loss(z, z, 0.01).item() == pytest.approx(0, abs=1e-6)
    assert simclr_loss(z, z.roll(1, 0), 1e-3).isfinite()


def test_loss_does_not_depend_on_the_order_of_views():
    z1, z2 = torch.randn(2, 6, 5, dtype=torch.float64)
    assert simclr_loss(z1, z2, 0.2).item() == pytest.approx(simclr_loss(z2, z1, 0.2).item())


def test_positive_found():
    z = torch.eye(8)
    assert positive_found(z, z) == 1
    assert positive_found(z, z.roll(1, 0)) == 0


@pytest.mark.parametrize("proj_layers", [2, 3])
def test_projector_is_that_of_the_official_code(proj_layers):
    model = SimCLR(nn.Flatten(), 12, proj_dim=5, proj_layers=proj_layers)
    kinds = [type(m) for m in model.projector]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == hidden * (proj_layers - 1) + [nn.Linear, nn.BatchNorm1d]
    assert all(m.bias is None for m in model.projector if isinstance(m, nn.Linear))
    last = model.projector[-1]
    assert last.weight.requires_grad and not last.bias.requires_grad  # a scale, no offset
    z1, z2 = model(torch.randn(6, 3, 2, 2), torch.randn(6, 3, 2, 2))
    assert z1.shape == z2.shape == (6, 5)


def test_both_views_share_batch_statistics():
    model = SimCLR(nn.Flatten(), 12, proj_dim=5)
    view1, view2 = torch.randn(6, 3, 2, 2), 3 + torch.randn(6, 3, 2, 2)
    z1, z2 = model(view1, view2)
    torch.testing.assert_close(torch.cat([z1, z2]).mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    assert z1.mean(0).abs().max() > 0.1


def slow_lars(w, g, v, lr, weight_decay, adapt):
    g = g + weight_decay * w
    if adapt and w.norm() > 0 and g.norm() > 0:
        g = 0.001 * w.norm() / g.norm() * g
    v = 0.9 * v + g
    return w - lr * v, v


@pytest.mark.parametrize("adapt", [True, False])
def test_lars_equals_slow_version(adapt):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3, dtype=torch.float64)),
              nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    optimizer = LARS([{"params": params, "adapt": adapt}], lr=1.0, weight_decay=0.1)
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in params]
    for step in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        lr = optimizer.param_groups[0]["lr"] = 0.5 / (step + 1)
        expected = [slow_lars(w, p.grad, v, lr, 0.1, adapt)
                    for p, (w, v) in zip(params, expected)]
        optimizer.step()
        for p, (w, _) in zip(params, expected):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)


def test_biases_and_bn_are_neither_decayed_nor_adapted():
    model = SimCLR(common.make_backbone("resnet8", 32), 128)
    for name in "lars", "sgd":
        weights, others = simclr.make_optimizer(name, model, 0.1).param_groups
        assert weights["weight_decay"] == 0.1 and others["weight_decay"] == 0
        assert all(p.ndim > 1 for p in weights["params"])
        assert all(p.ndim == 1 and p.requires_grad for p in others["params"])
        if name == "lars":
            assert weights["adapt"] and not others["adapt"]
        together = len(weights["params"]) + len(others["params"])
        assert together == sum(p.requires_grad for p in model.parameters())


def test_schedule_warms_up_and_ends_at_its_ends():
    values = [simclr.cosine(step, 100, 10, 2.0) for step in range(100)]
    assert values[0] == pytest.approx(0.2) and values[9] == values[10] == 2.0
    assert max(values) == 2.0 and 0 < values[-1] < 0.01
    assert values[55] == pytest.approx(1.0)
    assert simclr.cosine(100, 100, 10, 2.0, 0.5) == pytest.approx(0.5)
    assert simclr.cosine(0, 0, 0, 2.0) == 2.0  # no steps at all


def test_augmentation_is_that_of_the_paper(operations, class_folders):
    simclr.train(simclr.parse_args(
        "--data images --recipe imagenet -a resnet8 --image-size 96 -b 8 --epochs 0".split()))
    view = [("random_resized_crop", {"size": 96, "scale": (0.08, 1.0), "interpolation": "bicubic"}),
            ("random_horizontal_flip", {"p": 0.5}),
            ("color_jitter", {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2,
                              "p": 0.8}),
            ("random_grayscale", {"p": 0.2}), ("gaussian_blur", {"p": 0.5, "sigma": (0.1, 2.0)}),
            ("normalize", {})]
    assert operations == 2 * view
