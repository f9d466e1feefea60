"""The other contrastive losses against independent slow versions, and their usual mistakes."""

import inspect
import math

import pytest
import torch

import simclr
from simclr import (alignment_uniformity_loss, debiased_loss, flatnce_loss, hard_negative_loss,
                    infonce_loss, nce_loss, simclr_loss, uniformity)

# Slow versions: the papers' sums, pair by pair, of numbers and not of logarithms.


def unit(z):
    return [v / v.square().sum().sqrt() for v in z]


def slow_infonce(z1, z2, temperature):
    z1, z2, total = unit(z1), unit(z2), 0.0
    for i in range(len(z1)):
        f = [torch.exp(z1[i] @ z2[j] / temperature) for j in range(len(z2))]
        total = total - torch.log(f[i] / sum(f))
    return total / len(z1)


def slow_nce(z1, z2, temperature):
    z1, z2, k, total = unit(z1), unit(z2), len(z1) - 1, 0.0
    for i in range(len(z1)):
        for j in range(len(z2)):
            ratio = torch.exp(z1[i] @ z2[j] / temperature)  # p / p_n
            h = ratio / (ratio + k)
            total = total - torch.log(h if i == j else 1 - h)
    return total / len(z1)


def anchors(z1, z2, temperature):
    """For each of the 2B views: exp(s_i+), and the list of exp(s_ik)."""
    z, n = unit([*z1, *z2]), len(z1)
    for i in range(2 * n):
        positive = torch.exp(z[i] @ z[i + n if i < n else i - n] / temperature)
        others = [z[k] for k in range(2 * n) if k not in (i, i + n, i - n)]
        yield positive, [torch.exp(z[i] @ other / temperature) for other in others]


def slow_flatnce(z1, z2, temperature):
    terms = [torch.log(sum(negative / positive for negative in negatives))
             for positive, negatives in anchors(z1, z2, temperature)]
    mean = sum(terms) / len(terms)
    return mean - mean.detach() + 1  # the gradient of the logarithm, the value 1


def slow_hard(z1, z2, temperature, prior, beta=0.0):
    terms, floor = [], math.exp(-1 / temperature)
    for positive, negatives in anchors(z1, z2, temperature):
        weights = [negative ** beta for negative in negatives]
        mean = sum(w * e for w, e in zip(weights, negatives)) / sum(weights)
        g = (mean - prior * positive) / (1 - prior)
        noise = len(negatives) * (g if g > floor else floor)
        terms.append(-torch.log(positive / (positive + noise)))
    return sum(terms) / len(terms)


def slow_alignment(z1, z2, alpha=2):
    return sum((a - b).square().sum() ** (alpha / 2) for a, b in zip(unit(z1), unit(z2))) / len(z1)


def slow_uniformity(z, t=2):
    z = unit(z)
    terms = [torch.exp(-t * (z[i] - z[j]).square().sum()) for i in range(len(z)) for j in range(i)]
    return torch.log(sum(terms) / len(terms))


def slow_alignment_uniformity(z1, z2, temperature):
    t = 1 / (2 * temperature)
    return slow_alignment(z1, z2) + (slow_uniformity(z1, t) + slow_uniformity(z2, t)) / 2


# name: the slow version, and the options of each comparison
SLOW = {
    "infonce_loss": (slow_infonce, (0.1,), (1.0,)),
    "nce_loss": (slow_nce, (0.1,), (1.0,)),
    "flatnce_loss": (slow_flatnce, (0.1,), (1.0,)),
    "debiased_loss": (slow_hard, (0.3, 0.0), (0.5, 0.1), (0.05, 0.1)),
    "hard_negative_loss": (slow_hard, (0.3, 0.0, 1.0), (0.5, 0.3, 2.0)),
    "alignment": (slow_alignment, (), (1,), (3,)),
    "uniformity": (slow_uniformity, (), (1,), (3,)),
    "alignment_uniformity_loss": (slow_alignment_uniformity, (0.25,), (0.5,)),
}
SPLIT = "positives_and_negatives"
CASES = [(name, options) for name, (_, *cases) in SLOW.items() for options in cases]


def views(images=5, dim=7, noise=1.0):
    z1 = 3 * torch.randn(images, dim, dtype=torch.float64)
    return z1, z1 + noise * torch.randn_like(z1)


def value_and_gradient(loss, z, *options):
    z = [v.detach().requires_grad_() for v in z]
    inputs = z if "z2" in inspect.signature(loss).parameters else z[:1]
    value = loss(*inputs, *options)
    return [value, *torch.autograd.grad(value, z, allow_unused=True, materialize_grads=True)]


def compare(fast, slow, options):
    torch.manual_seed(1)
    z = views()
    torch.testing.assert_close(value_and_gradient(fast, z, *options),
                               value_and_gradient(slow, z, *options), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name, options", CASES)
def test_value_and_gradient_equal_the_slow_version(name, options):
    compare(getattr(simclr, name), SLOW[name][0], options)


@pytest.mark.parametrize("name, old, new", [
    ("infonce_loss", "(z1, dim=1) @ F.normalize(z2", "(z2, dim=1) @ F.normalize(z1"),  # direction
    ("nce_loss", " - math.log(len(z1) - 1)", ""),  # log-odds without the number of noise pairs
    ("nce_loss", "len(z1) - 1)", "len(z1))"),
    ("nce_loss", 'reduction="sum") / len(z1)', 'reduction="mean")'),
    (SPLIT, "% len(z1)", "% len(z)"),  # the positive among the negatives
    (SPLIT, "image[:, None] != image", "(image[:, None] != image) | torch.eye(len(z)).bool()"),
    ("flatnce_loss", "v.detach()", "v"),  # no gradient
    ("flatnce_loss", "(v - v.detach())", "v"),  # anchors weigh what they weigh in the sum
    ("flatnce_loss", "negatives - positives[:, None]", "negatives"),
    ("debiased_loss", "concentration=0.0", "concentration=1.0"),
    ("hard_negative_loss", "-torch.expm1(log_share)", "1 + torch.exp(log_share)"),
    ("hard_negative_loss", "log_share.clamp(max=-torch.finfo(z1.dtype).tiny)", "log_share"),
    ("hard_negative_loss", " - math.log(1 - positive_prior)", ""),
    ("hard_negative_loss", "log_g.clamp(min=-1 / temperature)", "log_g"),  # no floor
    ("hard_negative_loss", " - math.log(negatives.shape[1])", ""),  # N
    ("hard_negative_loss", "math.log(negatives.shape[1])", "math.log(len(z1) - 1)"),
    ("hard_negative_loss", "math.log(negatives.shape[1])", "math.log(2 * len(z1))"),
    ("hard_negative_loss", ".log_softmax(1)", ""),  # weights that do not add up to 1
    ("hard_negative_loss", ".log_softmax(1)", ".log_softmax(1).detach()"),
    ("hard_negative_loss", "(concentration *", "(temperature * concentration *"),
    ("alignment", ".pow(alpha)", ""),
    ("alignment", "F.normalize(z2, dim=1)", "z2"),
    ("uniformity", ".fill_diagonal_(-math.inf)", ""),  # pairs of a view with itself
    ("uniformity", "2 * t *", "t *"),
    ("uniformity", "(len(z) - 1)", "len(z)"),
    ("alignment_uniformity_loss", ") / 2", ")"),
    ("alignment_uniformity_loss", "uniformity(z2, t)", "uniformity(z1, t)"),
])
def test_comparison_notices_the_usual_mistakes(name, old, new):
    source, mutant = inspect.getsource(getattr(simclr, name)), dict(vars(simclr))
    assert source.count(old) == 1
    users = ("flatnce_loss", "hard_negative_loss") if name == SPLIT else (name,)
    for user in users:  # defined anew where the mutant is, so that they call it
        exec(inspect.getsource(getattr(simclr, user)), mutant)
    exec(source.replace(old, new), mutant)
    for user in users:
        slow, *cases = SLOW[user]
        with pytest.raises(AssertionError):
            for options in cases:
                compare(mutant[user], slow, options)


def test_without_prior_and_concentration_they_are_nt_xent():
    z = views()
    plain = value_and_gradient(simclr_loss, z, 0.2)
    for loss, zeros in (debiased_loss, [0.0]), (hard_negative_loss, [0.0, 0.0]):
        found = value_and_gradient(loss, z, 0.2, *zeros)
        torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-12)
    assert debiased_loss(*z, 0.2, 0.1) == hard_negative_loss(*z, 0.2, 0.1, 0.0)


def test_chance():
    same, spread = torch.ones(8, 4, dtype=torch.float64), torch.eye(16, dtype=torch.float64)
    binary = 8 * math.log(8) - 7 * math.log(7)
    assert infonce_loss(same, same, 0.1).item() == pytest.approx(math.log(8))
    assert nce_loss(spread[:8], spread[8:], 0.1).item() == pytest.approx(binary)
    assert debiased_loss(same, same, 0.5, 0.1).item() == pytest.approx(math.log(15))
    assert hard_negative_loss(same, same, 0.5, 0.1, 2.0).item() == pytest.approx(math.log(15))
    assert alignment_uniformity_loss(same, same, 0.25).item() == pytest.approx(0)
    assert uniformity(spread).item() == pytest.approx(-4)  # t ‖z_i - z_j‖² = 2 · 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SLOW)
def test_finite_at_extremes_and_in_the_dtype_given(name, dtype):
    options = {"debiased_loss": (0.01, 0.1), "hard_negative_loss": (0.01, 0.1, 2.0)}.get(
        name, () if name in ("alignment", "uniformity") else (0.01,))
    eye, same = 1e4 * torch.eye(8, dtype=dtype), 1e4 * torch.ones(8, 8, dtype=dtype)
    for z1 in (eye, same):
        for z2 in (eye, eye.roll(1, 0), -eye, same, -same):
            results = value_and_gradient(getattr(simclr, name), (z1, z2), *options)
            assert all(r.dtype == dtype and r.isfinite().all() for r in results)


@pytest.mark.parametrize("dtype, temperature", [(torch.float32, 0.05), (torch.bfloat16, 0.07)])
def test_flatnce_keeps_a_gradient_that_nt_xent_rounds_away(dtype, temperature):
    z, error = torch.stack(views(16, dim=128, noise=1.5)).to(dtype), {}  # cosines near 0.9: easy
    for loss in (simclr_loss, flatnce_loss):
        found, right = (torch.cat(value_and_gradient(loss, v, temperature)[1:]).double()
                        for v in (z, z.double()))
        error[loss] = ((found - right).norm() / right.norm()).item()
    assert error[flatnce_loss] < (1e-6 if dtype == torch.float32 else 0.04)
    assert error[simclr_loss] > 10 * error[flatnce_loss]
