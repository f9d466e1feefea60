"""Barlow Twins and VICReg against independent slow versions, and each of the details that are
commonly wrong."""

import math

import pytest
import torch
from torch import nn

import barlow
import common
from barlow import BarlowTwins, barlow_loss, correlate, health, vicreg_loss


def slow_barlow(z1, z2, off_diagonal_weight):
    """Equations 1 and 2, entry by entry; the variance is the biased one."""
    def standardise(column):
        mean = sum(column) / len(column)
        var = sum((v - mean) ** 2 for v in column) / len(column)
        return [(v - mean) / (var + 1e-5) ** 0.5 for v in column]

    columns1, columns2 = [standardise(c) for c in z1.T], [standardise(c) for c in z2.T]
    total = 0.0
    for i, column1 in enumerate(columns1):
        for j, column2 in enumerate(columns2):
            c = sum(a * b for a, b in zip(column1, column2)) / len(z1)
            total = total + ((1 - c) ** 2 if i == j else off_diagonal_weight * c**2)
    return total


def slow_vicreg(z1, z2, invariance_weight, variance_weight, covariance_weight):
    """Term by term; torch.cov divides by B - 1."""
    n, size = z1.shape
    total = sum((a - b).norm() ** 2 for a, b in zip(z1, z2)) / (n * size) * invariance_weight
    for z in z1, z2:
        cov = torch.cov(z.T)
        for i in range(size):
            std = (cov[i, i] + 0.0001) ** 0.5
            total = total + variance_weight * torch.clamp(1 - std, min=0) / size / 2
            for j in range(size):
                total = total + covariance_weight * (i != j) * cov[i, j] ** 2 / size
    return total


@pytest.mark.parametrize("fast,slow,weights", [
    (barlow_loss, slow_barlow, (0.0051,)), (barlow_loss, slow_barlow, (1.0,)),
    (vicreg_loss, slow_vicreg, (25.0, 25.0, 1.0)), (vicreg_loss, slow_vicreg, (1.0, 3.0, 0.5))])
def test_losses_and_gradients_equal_slow_versions(fast, slow, weights):
    z = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    z1, z2 = z * torch.tensor([0.3, 0.5, 2, 1]) + 3  # deviations on both sides of 1, some mean
    losses = [loss(z1, z2, *weights) for loss in (fast, slow)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: fast(a, b, *weights), tuple(z))


def orthogonal(size, dtype=torch.float64):
    """(2 size, size): columns of mean 0 and biased variance 1, without correlation."""
    basis = torch.linalg.qr(torch.randn(size, size, dtype=dtype))[0]
    return torch.cat([basis, -basis]) * math.sqrt(size)


def test_barlow_loss_at_extremes():
    z = orthogonal(6)
    assert barlow_loss(z, z, 0.5).item() == pytest.approx(0, abs=1e-8)
    assert barlow_loss(z, -z, 0.5).item() == pytest.approx(6 * 4, rel=1e-4)  # a sum over D
    constant = torch.full((8, 6), 3.0)
    assert barlow_loss(constant, constant, 0.5).item() == 6  # the chance level of the log line
    copies = z[:, :1].repeat(1, 6)  # all dimensions say the same
    assert barlow_loss(copies, copies, 0.0).item() == pytest.approx(0, abs=1e-8)
    assert barlow_loss(copies, copies, 0.1).item() == pytest.approx(0.1 * 30, rel=1e-4)


def test_vicreg_loss_at_extremes():
    z = orthogonal(6)
    assert vicreg_loss(z, z).item() == pytest.approx(0, abs=1e-12)
    constant = torch.full((8, 6), 3.0)
    assert vicreg_loss(constant, constant).item() == pytest.approx(0.99 * 25)
    assert vicreg_loss(constant, constant + 2, 1.0, 0.0, 0.0).item() == 4  # a mean over D
    assert vicreg_loss(z, 0 * z, 0.0, 1.0, 0.0).item() == pytest.approx(0.99 / 2)  # one view of two
    copies = z[:, :1].repeat(1, 6)  # all covariances are 12/11, in both views
    loss = vicreg_loss(copies, copies, 0.0, 0.0, 1.0)
    assert loss.item() == pytest.approx(2 * 5 * (12 / 11) ** 2)


@pytest.mark.parametrize("scale", [1e-15, 1e7, 1e15])
def test_losses_are_finite_for_any_scale(scale):
    z1, z2 = torch.randn(2, 8, 5) * scale
    assert barlow_loss(z1, z2, 0.1).isfinite()
    assert vicreg_loss(z1, z2).isfinite() == (scale < 1e9)  # the fourth power is in the loss itself


def test_barlow_loss_ignores_scale_and_offset_of_each_dimension():
    z1, z2 = torch.randn(2, 8, 5, dtype=torch.float64)
    other = z1 * torch.tensor([100.0, 200, 300, 400, 500]) - 70
    torch.testing.assert_close(barlow_loss(other, z2, 0.1), barlow_loss(z1, z2, 0.1),
                               rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", [vicreg_loss, lambda z1, z2: barlow_loss(z1, z2, 0.2)])
def test_losses_do_not_depend_on_the_order_of_views(loss):
    z1, z2 = torch.randn(2, 6, 5, dtype=torch.float64)
    assert loss(z1, z2).item() == pytest.approx(loss(z2, z1).item())


def test_variance_is_biased():
    """With the unbiased one C_ii of equal views would be 4/5 here."""
    z = 1000 * torch.randn(5, 4)
    torch.testing.assert_close(correlate(z, z).diagonal(), torch.ones(4), rtol=1e-6, atol=0)


def test_health():
    z = orthogonal(6).float()
    values = health(z, z)
    assert values["diagonal"] == pytest.approx(1, abs=1e-4)
    assert values["off_diagonal"] == pytest.approx(0, abs=1e-6)
    assert values["std"] == pytest.approx(math.sqrt(12 / 11))
    copies = torch.randn(8, 1).repeat(1, 6)
    assert health(copies, -copies)["off_diagonal"] == pytest.approx(1, abs=1e-3)
    constant = torch.ones(8, 6)
    assert health(constant, constant) == {"diagonal": 0, "off_diagonal": 0, "std": 0}
    noise = torch.randn(2, 200, 50)
    assert health(*noise)["off_diagonal"] == pytest.approx(0.8 / math.sqrt(200), rel=0.05)


def test_projector_is_that_of_the_official_code():
    model = BarlowTwins(nn.Flatten(), 12, proj_dim=20)
    layer = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(m) for m in model.projector] == 2 * layer + [nn.Linear]
    assert all(m.bias is None for m in model.projector if isinstance(m, nn.Linear))
    z1, z2 = model(torch.randn(6, 3, 2, 2), torch.randn(6, 3, 2, 2))
    assert z1.shape == z2.shape == (6, 20)


def test_each_view_has_its_own_batch_statistics():
    model = BarlowTwins(nn.Flatten(), 12, proj_dim=5)
    view = torch.randn(6, 3, 2, 2)
    z1, z2 = model(view, 3 * view)  # the first BN removes the scale
    torch.testing.assert_close(z1, z2, rtol=0, atol=1e-3)


def test_views_are_of_two_kinds(class_folders, operations):
    """`augment` is byol.py's, which has its test; here, that each view gets its own numbers."""
    barlow.train(barlow.parse_args("--data images --recipe imagenet -a resnet8 --image-size 32 "
                                   "--proj-dim 8 -b 8 --epochs 0".split()))
    assert [given["p"] for name, given in operations
            if name in ("gaussian_blur", "random_solarize")] == [1.0, 0.0, 0.1, 0.2]


@pytest.mark.parametrize("flags, loss, options", [
    ("--off-diagonal-weight 0.1", "barlow_loss", [0.1]),
    ("--loss vicreg --invariance-weight 3 --variance-weight 4 --covariance-weight 5", "vicreg_loss",
     [3, 4, 5])])
def test_loss_and_its_weights_are_those_of_the_flags(class_folders, no_report, monkeypatch, flags,
                                                     loss, options):
    calls, function = [], getattr(barlow, loss)

    def recorded(z1, z2, *weights):
        calls.append([*weights])
        return function(z1, z2, *weights)

    monkeypatch.setattr(barlow, loss, recorded)
    barlow.train(barlow.parse_args(["--data", "images", *f"--recipe demo -b 8 --epochs 1 "
                                    f"--proj-dim 8 --image-size 8 -j 0 {flags}".split()]))
    assert calls == [options] * 3


def test_two_learning_rates(class_folders, no_report, monkeypatch):
    """Weights and biases have peaks of their own, and fall to a thousandth of them together."""
    rates, kinds = [], []

    def step(optimizer):
        rates.append([group["lr"] for group in optimizer.param_groups])
        kinds.append([{p.ndim > 1 for p in group["params"]} for group in optimizer.param_groups])

    monkeypatch.setattr(barlow.LARS, "step", step)
    monkeypatch.setattr(common, "save_checkpoint", lambda *arguments: 0.0)
    flags = ("--recipe demo -b 8 --epochs 30 --warmup-epochs 1 --lr 4 --lr-biases 0.16"
             " --proj-dim 8 --image-size 8 --workers 0")
    barlow.train(barlow.parse_args(["--data", str(class_folders), *flags.split()]))
    assert all(kind == [{True}, {False}] for kind in kinds)
    weights, biases = zip(*rates)
    assert len(weights) == 90 and max(weights) == weights[3] == 4 * 8 / 256
    assert max(biases) == biases[3] == 0.16 * 8 / 256
    assert weights[0] == pytest.approx(max(weights) / 3)
    assert all(w / b == pytest.approx(25) for w, b in rates)
    assert max(weights) / 1000 < min(weights) < max(weights) / 500


def test_biases_and_bn_are_neither_decayed_nor_adapted():
    model = BarlowTwins(common.make_backbone("resnet8", 32), 128, proj_dim=16)
    weights, others = barlow.make_optimizer(model, 0.1).param_groups
    assert weights["weight_decay"] == 0.1 and others["weight_decay"] == 0
    assert weights["adapt"] and not others["adapt"]
    assert all(p.ndim > 1 for p in weights["params"])
    assert all(p.ndim == 1 for p in others["params"])
    assert len(weights["params"]) + len(others["params"]) == len(list(model.parameters()))


# ---- what each term prevents, and which health number shows it


def train_toy(loss):
    """Health after training on inputs whose 12 numbers survive the augmentation in part, the first
    most and the last least."""
    torch.manual_seed(0)
    model = BarlowTwins(nn.Flatten(), 12, proj_dim=12)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    noise = torch.linspace(0.1, 2, 12).view(3, 2, 2)
    for _ in range(150):
        images = torch.randn(128, 3, 2, 2)
        views = (images + noise * torch.randn_like(images) for _ in range(2))
        z1, z2 = model(*views)
        optimizer.zero_grad()
        loss(z1, z2).backward()
        optimizer.step()
    return health(z1, z2)


def test_off_diagonal_term_prevents_collapse_to_one_dimension():
    collapsed = train_toy(lambda z1, z2: barlow_loss(z1, z2, 0.0))
    assert collapsed["diagonal"] > 0.9 and collapsed["off_diagonal"] > 0.8
    healthy = train_toy(lambda z1, z2: barlow_loss(z1, z2, 0.1))
    assert healthy["diagonal"] > 0.7 and healthy["off_diagonal"] < 0.25


def test_variance_term_prevents_collapse_to_a_constant():
    assert train_toy(lambda z1, z2: vicreg_loss(z1, z2, 25.0, 0.0, 1.0))["std"] < 0.05
    healthy = train_toy(vicreg_loss)
    assert healthy["std"] > 0.8 and healthy["off_diagonal"] < 0.5


def test_covariance_term_prevents_collapse_to_one_dimension():
    collapsed = train_toy(lambda z1, z2: vicreg_loss(z1, z2, 25.0, 25.0, 0.0))
    assert collapsed["std"] > 0.8 and collapsed["off_diagonal"] > 0.8
