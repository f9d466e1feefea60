"""The other contrastive losses of simclr.py against independent slow versions, in float64."""

import math

import pytest
import torch

import simclr
from simclr import (alignment, alignment_uniformity_loss, debiased_loss, flatnce_loss,
                    hard_negative_loss, infonce_loss, nce_loss, positives_and_negatives,
                    simclr_loss, uniformity)

# Slow versions: the papers' sums, pair by pair, of numbers and not of logarithms.


def unit(z):
    return [v / v.square().sum().sqrt() for v in z]


def slow_infonce(z1, z2, temperature):
    z1 = unit(z1)
    z2 = unit(z2)
    total = 0.0
    for i in range(len(z1)):
        scores = [torch.exp(z1[i] @ other / temperature) for other in z2]
        total = total - torch.log(scores[i] / sum(scores))
    return total / len(z1)


def slow_nce(z1, z2, temperature):
    z1 = unit(z1)
    z2 = unit(z2)
    k = len(z1) - 1
    total = 0.0
    for i in range(len(z1)):
        for j in range(len(z2)):
            ratio = torch.exp(z1[i] @ z2[j] / temperature)  # p / p_n
            h = ratio / (ratio + k)
            if i == j:
                total = total - torch.log(h)
            else:
                total = total - torch.log(1 - h)
    return total / len(z1)


def slow_anchors(z1, z2, temperature):
    """-> for each of the 2B views: exp(s_i+), and the list of exp(s_ik)."""
    z = unit([*z1, *z2])
    image = [*range(len(z1)), *range(len(z2))]
    anchors = []
    for i in range(len(z)):
        negatives = []
        for k in range(len(z)):
            score = torch.exp(z[i] @ z[k] / temperature)
            if image[k] != image[i]:
                negatives.append(score)
            elif k != i:
                positive = score
        anchors.append((positive, negatives))
    return anchors


def slow_flatnce(z1, z2, temperature):
    terms = []
    for positive, negatives in slow_anchors(z1, z2, temperature):
        terms.append(torch.log(sum(negatives) / positive))
    v = sum(terms) / len(terms)
    return v - v.detach() + 1  # the gradient of v, the value 1


def slow_hard_negative(z1, z2, temperature, prior, beta):
    terms = []
    floor = math.exp(-1 / temperature)
    for positive, negatives in slow_anchors(z1, z2, temperature):
        weights = [negative**beta for negative in negatives]
        mean = sum(w * negative for w, negative in zip(weights, negatives)) / sum(weights)
        g = (mean - prior * positive) / (1 - prior)
        if g < floor:
            g = floor
        terms.append(-torch.log(positive / (positive + len(negatives) * g)))
    return sum(terms) / len(terms)


def slow_debiased(z1, z2, temperature, prior):
    return slow_hard_negative(z1, z2, temperature, prior, beta=0.0)


def slow_alignment(z1, z2, alpha=2):
    distances = [(a - b).square().sum().sqrt() for a, b in zip(unit(z1), unit(z2))]
    return sum(distance**alpha for distance in distances) / len(distances)


def slow_uniformity(z, t=2):
    z = unit(z)
    terms = []
    for i in range(len(z)):
        for j in range(i):
            terms.append(torch.exp(-t * (z[i] - z[j]).square().sum()))
    return torch.log(sum(terms) / len(terms))


def slow_alignment_uniformity(z1, z2, temperature):
    t = 1 / (2 * temperature)
    return slow_alignment(z1, z2) + slow_uniformity(z1, t) / 2 + slow_uniformity(z2, t) / 2


def make_views(images=5, dim=7, noise=1.0):
    z1 = 3 * torch.randn(images, dim, dtype=torch.float64)
    z2 = z1 + noise * torch.randn_like(z1)
    return z1.requires_grad_(), z2.requires_grad_()


@pytest.mark.parametrize("loss, slow, options", [
    (infonce_loss, slow_infonce, (0.1,)),
    (infonce_loss, slow_infonce, (1.0,)),
    (nce_loss, slow_nce, (0.1,)),
    (nce_loss, slow_nce, (1.0,)),
    (flatnce_loss, slow_flatnce, (0.1,)),
    (flatnce_loss, slow_flatnce, (1.0,)),
    (debiased_loss, slow_debiased, (0.3, 0.0)),
    (debiased_loss, slow_debiased, (0.5, 0.1)),
    (debiased_loss, slow_debiased, (0.05, 0.1)),  # here the floor counts
    (hard_negative_loss, slow_hard_negative, (0.3, 0.0, 1.0)),
    (hard_negative_loss, slow_hard_negative, (0.5, 0.3, 2.0)),
    (alignment, slow_alignment, ()),
    (alignment, slow_alignment, (1,)),
    (alignment, slow_alignment, (3,)),
    (alignment_uniformity_loss, slow_alignment_uniformity, (0.25,)),
    (alignment_uniformity_loss, slow_alignment_uniformity, (0.5,)),
])
def test_value_and_gradient_equal_the_slow_version(loss, slow, options):
    z1, z2 = make_views()
    fast_value = loss(z1, z2, *options)
    slow_value = slow(z1, z2, *options)
    torch.testing.assert_close(fast_value, slow_value, rtol=1e-9, atol=1e-11)
    fast_gradients = torch.autograd.grad(fast_value, [z1, z2])
    slow_gradients = torch.autograd.grad(slow_value, [z1, z2])
    torch.testing.assert_close(fast_gradients, slow_gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("t", [1, 2, 3])
def test_uniformity_equals_the_slow_version(t):
    z, _ = make_views()
    fast_value = uniformity(z, t)
    slow_value = slow_uniformity(z, t)
    torch.testing.assert_close(fast_value, slow_value, rtol=1e-9, atol=1e-11)
    (fast_gradient,) = torch.autograd.grad(fast_value, z)
    (slow_gradient,) = torch.autograd.grad(slow_value, z)
    torch.testing.assert_close(fast_gradient, slow_gradient, rtol=1e-9, atol=1e-11)


def test_some_negatives_are_at_the_floor_of_the_debiased_loss():
    """Else the comparisons above would say nothing about it."""
    z1, z2 = make_views()
    below = []
    for positive, negatives in slow_anchors(z1, z2, 0.05):
        g = (sum(negatives) / len(negatives) - 0.1 * positive) / 0.9
        below.append(bool(g < math.exp(-1 / 0.05)))
    assert any(below)


@pytest.mark.parametrize("images", [2, 3, 8])
def test_positives_and_negatives(images):
    """Each view of another image is a negative, once; neither the view itself nor its positive."""
    z1, z2 = make_views(images)
    positives, negatives = positives_and_negatives(z1, z2, 0.5)
    assert positives.shape == (2 * images,)
    assert negatives.shape == (2 * images, 2 * images - 2)
    for i, (positive, others) in enumerate(slow_anchors(z1, z2, 0.5)):
        torch.testing.assert_close(positives[i], positive.log())
        expected = torch.stack(others).log().sort()[0]
        torch.testing.assert_close(negatives[i].sort()[0], expected)


def test_without_prior_and_concentration_they_are_nt_xent():
    z1, z2 = make_views()
    nt_xent = simclr_loss(z1, z2, 0.2)
    expected = torch.autograd.grad(nt_xent, [z1, z2])
    for loss in debiased_loss(z1, z2, 0.2, 0.0), hard_negative_loss(z1, z2, 0.2, 0.0, 0.0):
        torch.testing.assert_close(loss, nt_xent, rtol=1e-10, atol=1e-12)
        gradients = torch.autograd.grad(loss, [z1, z2])
        torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)


def test_without_concentration_hard_negatives_are_the_debiased_loss():
    z1, z2 = make_views()
    assert debiased_loss(z1, z2, 0.2, 0.1) == hard_negative_loss(z1, z2, 0.2, 0.1, 0.0)


def test_prior_and_concentration_if_none_are_given():
    z1, z2 = make_views()
    expected = slow_debiased(z1, z2, 0.5, 0.1)
    torch.testing.assert_close(debiased_loss(z1, z2, 0.5), expected)
    expected = slow_hard_negative(z1, z2, 0.5, 0.1, 1.0)
    torch.testing.assert_close(hard_negative_loss(z1, z2, 0.5), expected)


def test_losses_at_chance():
    same = torch.ones(8, 4, dtype=torch.float64)
    assert infonce_loss(same, same, 0.1).item() == pytest.approx(math.log(8))
    assert debiased_loss(same, same, 0.5, 0.1).item() == pytest.approx(math.log(15))
    assert hard_negative_loss(same, same, 0.5, 0.1, 2.0).item() == pytest.approx(math.log(15))
    spread = torch.eye(16, dtype=torch.float64)  # all cosines are 0
    binary = 8 * math.log(8) - 7 * math.log(7)
    assert nce_loss(spread[:8], spread[8:], 0.1).item() == pytest.approx(binary)


def test_alignment_and_uniformity_at_their_ends():
    same = torch.ones(8, 4, dtype=torch.float64)
    assert alignment(same, same).item() == pytest.approx(0)
    assert alignment(same, -same).item() == pytest.approx(4)
    assert uniformity(same).item() == pytest.approx(0)
    spread = torch.eye(16, dtype=torch.float64)
    assert uniformity(spread).item() == pytest.approx(-4)  # t ‖z_i - z_j‖² = 2 · 2


LOSSES = [infonce_loss, nce_loss, flatnce_loss, debiased_loss, hard_negative_loss,
          alignment_uniformity_loss]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_finite_at_extremes_and_in_the_dtype_given(loss, dtype):
    eye = 1e4 * torch.eye(8, dtype=dtype)
    same = 1e4 * torch.ones(8, 8, dtype=dtype)
    for first in eye, same:
        for second in eye, eye.roll(1, 0), -eye, same, -same:
            z1 = first.clone().requires_grad_()
            z2 = second.clone().requires_grad_()
            value = loss(z1, z2, 0.01)
            for result in value, *torch.autograd.grad(value, [z1, z2]):
                assert result.dtype == dtype and result.isfinite().all()


@pytest.mark.parametrize("dtype, temperature", [(torch.float32, 0.05), (torch.bfloat16, 0.07)])
def test_flatnce_keeps_a_gradient_that_nt_xent_rounds_away(dtype, temperature):
    """In an easy batch, of cosines near 0.9."""
    errors = {}
    views = [view.detach().to(dtype) for view in make_views(16, dim=128, noise=1.5)]
    for loss in simclr_loss, flatnce_loss:
        gradients = []
        for precision in dtype, torch.float64:
            z1, z2 = (view.to(precision).requires_grad_() for view in views)
            gradient = torch.autograd.grad(loss(z1, z2, temperature), [z1, z2])
            gradients.append(torch.cat(gradient).double())
        found, right = gradients
        errors[loss] = ((found - right).norm() / right.norm()).item()
    assert errors[flatnce_loss] < (1e-6 if dtype == torch.float32 else 0.04)
    assert errors[simclr_loss] > 10 * errors[flatnce_loss]


def test_the_flag_knows_them_all():
    assert list(simclr.OTHER_LOSSES.values()) == LOSSES
