"""SimCLR against independent slow versions, and each of the details that are commonly wrong."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import common
import linear_probe
import simclr
from simclr import LARS, SimCLR, cosine_schedule, positive_found, simclr_loss

# ------------------------------------------------------------------------------------------- loss


def slow_loss(z1, z2, temperature):
    """Equation 1 of the paper, term by term."""
    z = [v / v.norm() for v in torch.cat([z1, z2])]
    total = 0.0
    for i in range(len(z)):
        positive = (i + len(z1)) % len(z)
        numerator = torch.exp(z[i] @ z[positive] / temperature)
        denominator = 0.0
        for k in range(len(z)):
            if k != i:
                denominator = denominator + torch.exp(z[i] @ z[k] / temperature)
        total = total - torch.log(numerator / denominator)
    return total / len(z)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_loss_and_gradient_equal_the_slow_version(temperature):
    z1, z2 = torch.randn(2, 5, 7, dtype=torch.float64)
    z1.requires_grad_()
    z2.requires_grad_()
    fast = simclr_loss(z1, z2, temperature)
    slow = slow_loss(z1, z2, temperature)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    fast_gradients = torch.autograd.grad(fast, [z1, z2])
    slow_gradients = torch.autograd.grad(slow, [z1, z2])
    torch.testing.assert_close(fast_gradients, slow_gradients, rtol=1e-10, atol=1e-12)


def test_loss_at_chance():
    same = torch.ones(8, 4)
    assert simclr_loss(same, same, 0.5).item() == pytest.approx(math.log(15))


def test_loss_of_extreme_inputs():
    z = 1e15 * torch.eye(8)  # the loss normalizes
    assert simclr_loss(z, z, 0.01).item() == pytest.approx(0, abs=1e-6)
    assert simclr_loss(z, z.roll(1, 0), 1e-3).isfinite()


def test_loss_does_not_depend_on_the_order_of_views():
    z1, z2 = torch.randn(2, 6, 5, dtype=torch.float64)
    assert simclr_loss(z1, z2, 0.2).item() == pytest.approx(simclr_loss(z2, z1, 0.2).item())


def test_loss_changes_nothing():
    z1, z2 = torch.randn(2, 6, 5)
    before = z1.clone(), z2.clone()
    simclr_loss(z1, z2, 0.2)
    assert torch.equal(z1, before[0]) and torch.equal(z2, before[1])


def test_positive_found():
    z = torch.eye(8)
    assert positive_found(z, z) == 1
    assert positive_found(z, z.roll(1, 0)) == 0


def test_positive_found_compares_cosines():
    z1 = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    z2 = torch.tensor([[1.0, 0.0], [9.0, 9.0]])  # the second has the larger product with both
    assert positive_found(z1, z2) == 1


# ------------------------------------------------------------------------------------------ model


@pytest.mark.parametrize("proj_layers", [2, 3])
def test_projector_is_that_of_the_official_code(proj_layers):
    model = SimCLR(nn.Flatten(), 12, proj_dim=5, proj_layers=proj_layers)
    kinds = [type(module) for module in model.projector]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == (proj_layers - 1) * hidden + [nn.Linear, nn.BatchNorm1d]
    for module in model.projector:
        if isinstance(module, nn.Linear):
            assert module.bias is None
    last = model.projector[-1]
    assert last.weight.requires_grad and not last.bias.requires_grad  # a scale, no offset
    z1, z2 = model(torch.randn(6, 3, 2, 2), torch.randn(6, 3, 2, 2))
    assert z1.shape == z2.shape == (6, 5)


def test_both_views_share_batch_statistics():
    model = SimCLR(nn.Flatten(), 12, proj_dim=5)
    z1, z2 = model(torch.randn(6, 3, 2, 2), 3 + torch.randn(6, 3, 2, 2))
    torch.testing.assert_close(torch.cat([z1, z2]).mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    assert z1.mean(0).abs().max() > 0.1


# ------------------------------------------------------------------------- optimizer and schedule


def slow_lars(w, g, v, lr, adapt):
    """One tensor, with momentum 0.9, weight decay 0.1 and η 0.001 -> w and v."""
    g = g + 0.1 * w
    if adapt and w.norm() > 0 and g.norm() > 0:
        g = 0.001 * w.norm() / g.norm() * g
    v = 0.9 * v + g
    return w - lr * v, v


@pytest.mark.parametrize("adapt", [True, False])
def test_lars_equals_the_slow_version(adapt):
    params = [nn.Parameter(torch.randn(4, 3, dtype=torch.float64)),
              nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    optimizer = LARS([{"params": params, "adapt": adapt}], lr=1.0, weight_decay=0.1)
    weights = [p.detach().clone() for p in params]
    momenta = [torch.zeros_like(p) for p in params]
    for lr in 0.5, 0.25, 0.1:
        optimizer.param_groups[0]["lr"] = lr
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            weights[i], momenta[i] = slow_lars(weights[i], p.grad, momenta[i], lr, adapt)
        optimizer.step()
        for p, expected in zip(params, weights):
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


def test_lars_takes_a_closure_as_torchs_optimizers_do():
    """It is called once, with gradients enabled, before the step; its loss is returned."""
    calls = []
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = LARS([w], lr=0.1, adapt=False)

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True] and loss.item() == 25
    torch.testing.assert_close(w.detach(), torch.tensor([2.4, 3.2]))
    assert optimizer.step() is None


def test_lars_leaves_what_has_no_gradient():
    used = nn.Parameter(torch.ones(2))
    unused = nn.Parameter(torch.ones(2))
    optimizer = LARS([used, unused], lr=0.1, weight_decay=0.1)
    used.sum().backward()
    optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(2)) and unused not in optimizer.state
    assert not torch.equal(used.detach(), torch.ones(2))


def test_lars_goes_on_from_its_state():
    w = nn.Parameter(torch.randn(3, 2))
    optimizer = LARS([w], lr=0.1)
    w.grad = torch.randn(3, 2)
    optimizer.step()
    resumed = nn.Parameter(w.detach().clone())
    resumed_optimizer = LARS([resumed], lr=0.5)
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    w.grad = torch.randn(3, 2)
    resumed.grad = w.grad
    optimizer.step()
    resumed_optimizer.step()
    assert torch.equal(w, resumed)


@pytest.mark.parametrize("name", ["lars", "sgd"])
def test_biases_and_bn_are_neither_decayed_nor_adapted(name):
    model = SimCLR(common.make_backbone("resnet8", 32), 128)
    weights, others = simclr.make_optimizer(name, model, 0.1).param_groups
    assert weights["weight_decay"] == 0.1 and others["weight_decay"] == 0
    assert all(p.ndim > 1 for p in weights["params"])
    assert all(p.ndim == 1 and p.requires_grad for p in others["params"])
    together = len(weights["params"]) + len(others["params"])
    assert together == sum(p.requires_grad for p in model.parameters())
    if name == "lars":
        assert weights["adapt"] and not others["adapt"]


def test_schedule_warms_up_and_ends_at_its_ends():
    values = [cosine_schedule(step, 100, 10, 2.0) for step in range(100)]
    assert values[0] == pytest.approx(0.2)
    assert values[9] == values[10] == max(values) == 2.0
    assert values[55] == pytest.approx(1.0)
    assert 0 < values[-1] < 0.01
    assert cosine_schedule(100, 100, 10, 2.0, 0.5) == pytest.approx(0.5)
    assert cosine_schedule(0, 0, 0, 2.0) == 2.0  # no steps at all


# -------------------------------------------------------------------------------------- the run


def train(flags):
    """A run on the images of `class_folders` -> the lines of its log about the loss."""
    args = simclr.parse_args(f"--data images --recipe demo -b 8 --epochs 2 -p 1 {flags}".split())
    simclr.train(args)
    lines = [json.loads(line) for line in Path(args.out, "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_the_loss_in_the_loop_is_the_default_one(class_folders, no_report, monkeypatch, capsys):
    losses = []

    def record(z1, z2, temperature):
        assert temperature == 0.2 and z1.shape == z2.shape == (8, 64)
        losses.append(simclr_loss(z1, z2, temperature))
        return losses[-1]

    monkeypatch.setattr(simclr, "simclr_loss", record)
    lines = train("")
    assert [line["loss"] for line in lines] == [round(loss.item(), 6) for loss in losses]
    assert len(losses) == 6  # 24 images, batches of 8, two epochs
    assert f"(chance {math.log(15):.4f})" in capsys.readouterr().out


def test_the_rate_follows_the_schedule_by_steps(class_folders, no_report):
    lines = train("--lr 3.2 --warmup-epochs 1")
    peak = 3.2 * 8 / 256
    expected = [cosine_schedule(step, 6, 3, peak) for step in range(6)]
    assert [line["lr"] for line in lines] == pytest.approx(expected)
    assert max(expected) == pytest.approx(peak) and 0 < expected[5] < peak / 2


def test_flag_for_another_loss(class_folders, no_report, monkeypatch):
    losses = []

    def record(z1, z2, temperature):
        losses.append(simclr.infonce_loss(z1, z2, temperature))
        return losses[-1]

    monkeypatch.setitem(simclr.OTHER_LOSSES, "infonce", record)
    lines = train("--loss infonce --epochs 1")
    assert [line["loss"] for line in lines] == [round(loss.item(), 6) for loss in losses]
    assert len(losses) == 3


def test_each_block_starts_as_the_identity(class_folders, no_report, monkeypatch):
    """Of the networks for a GPU; the untrained network is the one that is trained."""
    models = []
    monkeypatch.setattr(common, "save_checkpoint", lambda *args: models.append(args[3]))
    train("-a resnet18x0.125 --epochs 0")
    assert (models[0].backbone.layer3[1].bn2.weight == 0).all()


@pytest.mark.parametrize("recipe", ["demo", "cpu", "cifar"])
def test_small_images_are_not_blurred_and_have_half_the_jitter(recipe):
    args = simclr.parse_args(["--recipe", recipe])
    assert args.image_size <= 32
    assert args.blur == 0 and args.jitter_strength == 0.5


def test_recipe_for_imagenet_is_that_of_the_official_code():
    args = simclr.parse_args(["--recipe", "imagenet"])
    assert (args.arch, args.image_size, args.optimizer) == ("resnet50", 224, "lars")
    assert (args.temperature, args.proj_dim, args.proj_layers) == (0.1, 128, 2)
    assert (args.warmup_epochs, args.weight_decay) == (10, 1e-4)
    assert (args.crop_scale, args.jitter_strength, args.blur) == (0.08, 1, 0.5)
    assert args.lr * 512 / 256 == pytest.approx(0.075 * 512**0.5, rel=0.01)


def test_augmentation_is_that_of_the_paper(operations, monkeypatch, class_folders):
    monkeypatch.setattr(linear_probe, "quick_knn", lambda *args, **kwargs: None)
    args = ("--data images --recipe imagenet -a resnet8 --image-size 96 -b 8 --max-images 8 "
            "--epochs 1 -j 0")
    simclr.train(simclr.parse_args(args.split()))
    view = [("random_resized_crop", {"size": 96, "scale": (0.08, 1.0), "interpolation": "bicubic"}),
            ("random_horizontal_flip", {"p": 0.5}),
            ("color_jitter", {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2,
                              "p": 0.8}),
            ("random_grayscale", {"p": 0.2}),
            ("gaussian_blur", {"p": 0.5, "sigma": (0.1, 2.0)}),
            ("normalize", {})]
    assert operations == 2 * (view + view)  # in views.png, and in the only step
