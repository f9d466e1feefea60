"""Barlow Twins and VICReg against independent slow versions, and each of the details that are
commonly wrong."""

import math

import pytest
import torch
from torch import nn

import barlow
import common
import linear_probe
from barlow import BarlowTwins, barlow_loss, correlate, health, vicreg_loss

# --------------------------------------------------------------------------------------- losses


def standardize(column):
    mean = sum(column) / len(column)
    variance = sum((value - mean) ** 2 for value in column) / len(column)  # the biased one
    return [(value - mean) / (variance + 1e-5) ** 0.5 for value in column]


def slow_barlow(z1, z2, off_diagonal_weight):
    """Equations 1 and 2, entry by entry."""
    columns1 = [standardize(column) for column in z1.T]
    columns2 = [standardize(column) for column in z2.T]
    total = 0.0
    for i, column1 in enumerate(columns1):
        for j, column2 in enumerate(columns2):
            c = sum(a * b for a, b in zip(column1, column2)) / len(z1)
            if i == j:
                total = total + (1 - c) ** 2
            else:
                total = total + off_diagonal_weight * c**2
    return total


def slow_vicreg(z1, z2, invariance_weight, variance_weight, covariance_weight):
    """Term by term; torch.cov divides by B - 1."""
    batch_size, dim = z1.shape
    distances = sum((a - b).norm() ** 2 for a, b in zip(z1, z2))
    total = invariance_weight * distances / (batch_size * dim)
    for z in z1, z2:
        cov = torch.cov(z.T)
        for i in range(dim):
            std = (cov[i, i] + 0.0001) ** 0.5
            total = total + variance_weight * torch.clamp(1 - std, min=0) / dim / 2
            for j in range(dim):
                if i != j:
                    total = total + covariance_weight * cov[i, j] ** 2 / dim
    return total


@pytest.mark.parametrize("fast_loss, slow_loss, weights", [
    (barlow_loss, slow_barlow, [0.0051]),
    (barlow_loss, slow_barlow, [1.0]),
    (vicreg_loss, slow_vicreg, [25.0, 25.0, 1.0]),
    (vicreg_loss, slow_vicreg, [1.0, 3.0, 0.5])])
def test_losses_and_gradients_equal_slow_versions(fast_loss, slow_loss, weights):
    z = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    z1, z2 = z * torch.tensor([0.3, 0.5, 2, 1]) + 3  # deviations on both sides of 1, some mean
    fast = fast_loss(z1, z2, *weights)
    slow = slow_loss(z1, z2, *weights)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    (fast_gradient,) = torch.autograd.grad(fast, z, retain_graph=True)
    (slow_gradient,) = torch.autograd.grad(slow, z)
    torch.testing.assert_close(fast_gradient, slow_gradient, rtol=1e-10, atol=1e-12)


def uncorrelated(dim):
    """(2 dim, dim): columns of mean 0 and biased variance 1, without correlation."""
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))
    return torch.cat([basis, -basis]) * math.sqrt(dim)


def test_barlow_loss_at_extremes():
    z = uncorrelated(6)
    assert barlow_loss(z, z, 0.5).item() == pytest.approx(0, abs=1e-8)
    assert barlow_loss(z, -z, 0.5).item() == pytest.approx(6 * 4, rel=1e-4)  # a sum over D
    constant = torch.full((8, 6), 3.0)
    assert barlow_loss(constant, constant, 0.5).item() == 6  # the chance level of the log line
    copies = z[:, :1].repeat(1, 6)  # all dimensions say the same
    assert barlow_loss(copies, copies, 0.0).item() == pytest.approx(0, abs=1e-8)
    assert barlow_loss(copies, copies, 0.1).item() == pytest.approx(0.1 * 30, rel=1e-4)


def test_vicreg_loss_at_extremes():
    z = uncorrelated(6)
    assert vicreg_loss(z, z).item() == pytest.approx(0, abs=1e-12)
    constant = torch.full((8, 6), 3.0)
    assert vicreg_loss(constant, constant).item() == pytest.approx(0.99 * 25)
    assert vicreg_loss(constant, constant + 2, 1.0, 0.0, 0.0).item() == 4  # a mean over D
    assert vicreg_loss(z, 0 * z, 0.0, 1.0, 0.0).item() == pytest.approx(0.99 / 2)  # one view of two
    copies = z[:, :1].repeat(1, 6)  # all covariances are 12/11, in both views
    loss = vicreg_loss(copies, copies, 0.0, 0.0, 1.0)
    assert loss.item() == pytest.approx(2 * 5 * (12 / 11) ** 2)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_barlow_loss_is_finite_at_any_scale(scale):
    z1, z2 = torch.randn(2, 8, 5) * scale
    assert barlow_loss(z1, z2, 0.1).isfinite()


@pytest.mark.parametrize("scale", [1e-15, 1e7])
def test_vicreg_loss_is_finite_while_the_fourth_power_is(scale):
    z1, z2 = torch.randn(2, 8, 5) * scale
    assert vicreg_loss(z1, z2).isfinite()


def test_barlow_loss_ignores_scale_and_offset_of_each_dimension():
    z1, z2 = torch.randn(2, 8, 5, dtype=torch.float64)
    other = z1 * torch.tensor([100.0, 200, 300, 400, 500]) - 70
    torch.testing.assert_close(barlow_loss(other, z2, 0.1), barlow_loss(z1, z2, 0.1),
                               rtol=1e-4, atol=0)


def test_losses_do_not_depend_on_the_order_of_views():
    z1, z2 = torch.randn(2, 6, 5, dtype=torch.float64)
    assert barlow_loss(z1, z2, 0.2).item() == pytest.approx(barlow_loss(z2, z1, 0.2).item())
    assert vicreg_loss(z1, z2).item() == pytest.approx(vicreg_loss(z2, z1).item())


def test_variance_is_biased():
    """With the unbiased one C_ii of equal views would be 4/5 here."""
    z = 1000 * torch.randn(5, 4)
    torch.testing.assert_close(correlate(z, z).diagonal(), torch.ones(4), rtol=1e-6, atol=0)


def test_health():
    z = uncorrelated(6).float()
    values = health(z, z)
    assert values["diagonal"] == pytest.approx(1, abs=1e-4)
    assert values["off_diagonal"] == pytest.approx(0, abs=1e-6)
    assert values["std"] == pytest.approx(math.sqrt(12 / 11))
    copies = torch.randn(8, 1).repeat(1, 6)
    assert health(copies, -copies)["off_diagonal"] == pytest.approx(1, abs=1e-3)
    constant = torch.ones(8, 6)
    assert health(constant, constant) == {"diagonal": 0, "off_diagonal": 0, "std": 0}
    noise1, noise2 = torch.randn(2, 200, 50)
    chance = 0.8 / math.sqrt(200)
    assert health(noise1, noise2)["off_diagonal"] == pytest.approx(chance, rel=0.05)


# ---------------------------------------------------------------------------------------- model


def test_projector_is_that_of_the_official_code():
    model = BarlowTwins(nn.Flatten(), 12, proj_dim=20)
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(module) for module in model.projector] == 2 * hidden + [nn.Linear]
    for module in model.projector:
        if isinstance(module, nn.Linear):
            assert module.bias is None and module.out_features == 20
    z1, z2 = model(torch.randn(6, 3, 2, 2), torch.randn(6, 3, 2, 2))
    assert z1.shape == z2.shape == (6, 20)


def test_each_view_has_its_own_batch_statistics():
    model = BarlowTwins(nn.Flatten(), 12, proj_dim=5)
    view = torch.randn(6, 3, 2, 2)
    z1, z2 = model(view, 3 * view)  # the first BN removes the scale
    torch.testing.assert_close(z1, z2, rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------- training


@pytest.fixture
def run(monkeypatch, no_report, class_folders):
    """run(flags): the whole of `train`, without kNN, on 24 images of which a batch takes 8."""
    monkeypatch.setattr(linear_probe, "quick_knn", lambda *args, **kwargs: None)

    def run(flags):
        flags = f"--data images -a resnet8 --image-size 8 --proj-dim 8 -b 8 -j 0 {flags}"
        barlow.train(barlow.parse_args(flags.split()))

    return run


def test_views_differ_in_blur_and_solarize(operations, run):
    """`augment` is that of byol.py, whose test looks at all of it."""
    run("--recipe imagenet --max-images 8 --epochs 1")
    differing = [(name, given["p"]) for name, given in operations
                 if name in ("gaussian_blur", "random_solarize")]
    view1 = [("gaussian_blur", 1.0), ("random_solarize", 0.0)]
    view2 = [("gaussian_blur", 0.1), ("random_solarize", 0.2)]
    assert differing == 2 * (view1 + view2)  # in views.png, and in the only step


@pytest.mark.parametrize("flags, name, weights", [
    ("--off-diagonal-weight 0.1", "barlow_loss", (0.1,)),
    ("--loss vicreg --invariance-weight 3 --variance-weight 4 --covariance-weight 5", "vicreg_loss",
     (3, 4, 5))])
def test_flags_choose_the_loss_and_its_weights(run, monkeypatch, flags, name, weights):
    calls = []
    loss_function = getattr(barlow, name)

    def recorded(z1, z2, *weights):
        calls.append(weights)
        return loss_function(z1, z2, *weights)

    monkeypatch.setattr(barlow, name, recorded)
    run(f"--recipe demo --epochs 1 {flags}")
    assert calls == [weights] * 3


def test_weights_and_biases_have_learning_rates_of_their_own(run, monkeypatch):
    """Both warm up in three steps and fall to a thousandth of their peaks in nine."""
    weights_rates = []
    biases_rates = []

    def record(optimizer):
        weights, biases = optimizer.param_groups
        weights_rates.append(weights["lr"])
        biases_rates.append(biases["lr"])

    monkeypatch.setattr(barlow.LARS, "step", record)
    run("--recipe demo --epochs 4 --warmup-epochs 1 --lr 64 --lr-biases 16")
    schedule = [1 / 3, 2 / 3, 1]
    for step in range(9):
        schedule.append(0.001 + 0.999 * (1 + math.cos(math.pi * step / 9)) / 2)
    assert weights_rates == pytest.approx([2 * value for value in schedule])
    assert biases_rates == pytest.approx([value / 2 for value in schedule])


def test_biases_and_bn_are_neither_decayed_nor_adapted():
    model = BarlowTwins(common.make_backbone("resnet8", 32), 128, proj_dim=16)
    weights, biases = barlow.make_optimizer(model, 0.1).param_groups
    assert weights["weight_decay"] == 0.1 and biases["weight_decay"] == 0
    assert weights["adapt"] and not biases["adapt"]
    assert all(p.ndim > 1 for p in weights["params"])
    assert all(p.ndim == 1 for p in biases["params"])
    assert {*weights["params"], *biases["params"]} == {*model.parameters()}


# ------------------------------------- what each term prevents, and which health number shows it


def train_small_model(loss_function, *weights):
    """-> health after training. Of the 12 numbers of an image, the augmentation keeps the first
    almost as it is, and little of the last."""
    model = BarlowTwins(nn.Flatten(), 12, proj_dim=12)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    noise = torch.linspace(0.1, 2, 12).view(3, 2, 2)
    for _ in range(150):
        images = torch.randn(128, 3, 2, 2)
        view1 = images + noise * torch.randn_like(images)
        view2 = images + noise * torch.randn_like(images)
        z1, z2 = model(view1, view2)
        loss = loss_function(z1, z2, *weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return health(z1, z2)


def test_off_diagonal_term_prevents_collapse_to_one_dimension():
    collapsed = train_small_model(barlow_loss, 0.0)
    assert collapsed["diagonal"] > 0.9 and collapsed["off_diagonal"] > 0.6
    healthy = train_small_model(barlow_loss, 0.1)
    assert healthy["diagonal"] > 0.7 and healthy["off_diagonal"] < 0.25


def test_variance_term_prevents_collapse_to_a_constant():
    collapsed = train_small_model(vicreg_loss, 25.0, 0.0, 1.0)
    assert collapsed["std"] < 0.05
    healthy = train_small_model(vicreg_loss)
    assert healthy["std"] > 0.8 and healthy["off_diagonal"] < 0.5


def test_covariance_term_prevents_collapse_to_one_dimension():
    collapsed = train_small_model(vicreg_loss, 25.0, 25.0, 0.0)
    assert collapsed["std"] > 0.8 and collapsed["off_diagonal"] > 0.8
