"""RotNet against independent slow versions, and each of the details that are commonly wrong."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from torch import nn

import common
import linear_probe
import rotation
from rotation import RotNet, augment, random_shift, rotate_four, rotation_loss, solved


def slow_loss(logits, labels):
    """-log of the probability of the label, in Python floats."""
    total = 0.0
    for row, label in zip(logits, labels):
        total = total - torch.log(torch.exp(row[label]) / sum(torch.exp(v) for v in row))
    return total / len(labels)


def test_loss_and_gradient_equal_slow_version():
    logits = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(4).repeat_interleave(3)
    fast, slow = rotation_loss(logits, labels), slow_loss(logits, labels)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_loss_and_solved_at_chance_and_at_extremes():
    labels = torch.arange(4)
    assert rotation_loss(torch.ones(4, 4), labels).item() == pytest.approx(math.log(4))
    right = torch.eye(4) * 1e15
    assert rotation_loss(right, labels) == 0 and solved(right, labels) == 1
    assert rotation_loss(right.roll(1, 0), labels).isfinite()
    assert solved(right.roll(1, 0), labels) == 0


# ---- the four turns


def test_label_k_is_k_turns_counter_clockwise():
    image = torch.zeros(1, 3, 5, 5)
    image[..., 0, 1] = 1  # beside the top left corner
    rotated, labels = rotate_four(image)
    places = [tuple(r[0].nonzero()[0].tolist()) for r in rotated]
    assert labels.tolist() == [0, 1, 2, 3]
    assert places == [(0, 1), (3, 0), (4, 3), (1, 4)]  # top, left, bottom, right


def test_each_image_is_there_in_all_four_turns_and_no_pixel_is_computed():
    images = torch.randn(3, 3, 6, 6)
    rotated, labels = rotate_four(images)
    assert rotated.shape == (12, 3, 6, 6) and labels.bincount().tolist() == [3, 3, 3, 3]
    for k in range(4):
        for i in range(3):
            assert labels[3 * k + i] == k
            expected = np.rot90(images[i].numpy(), k, axes=(1, 2))
            assert np.array_equal(rotated[3 * k + i].numpy(), expected)


@pytest.fixture
def batches(class_folders, monkeypatch):
    """batches(*flags): what the network is given in each step of a short run."""
    seen, losses = [], []
    monkeypatch.setattr(linear_probe, "evaluate", lambda *a, **k: {})
    forward, loss = RotNet.forward, rotation.rotation_loss
    monkeypatch.setattr(RotNet, "forward", lambda m, x: (seen.append(x), forward(m, x))[1])
    monkeypatch.setattr(rotation, "rotation_loss",
                        lambda *inputs: (losses.append(inputs), loss(*inputs))[1])

    def start(*flags):
        rotation.train(rotation.parse_args([
            *"--data images --recipe demo -b 8 --epochs 1 --workers 0".split(), *flags]))
        return seen, losses

    return start


@pytest.mark.parametrize("crop", ["shift", "resized"])
def test_training_turns_each_view_after_its_crop_and_flip(batches, crop):
    views, losses = batches("--crop", crop)
    assert len(views) == len(losses) == 3
    for view, (logits, labels) in zip(views, losses):
        quarter = view.chunk(4)
        assert len(quarter[0]) == 8 and len(quarter[0].unique(dim=0)) == 8
        for k in range(4):
            assert torch.equal(quarter[k], quarter[0].rot90(k, (2, 3)))  # to the last bit
            assert (labels.chunk(4)[k] == k).all()
        assert logits.dtype == torch.float32


# ---- augmentation


def test_shift_equals_torchvision():
    images = torch.rand(81, 3, 7, 7)
    offsets = torch.cartesian_prod(torch.arange(9), torch.arange(9))
    moved = random_shift(images, 4, offsets)
    for image, (top, left), window in zip(images, offsets.tolist(), moved):
        assert torch.equal(window, TF.crop(TF.pad(image, 4), top, left, 7, 7))


def test_shifts_are_uniform_and_each_image_has_its_own():
    pixel = torch.zeros(8100, 1, 9, 9)
    pixel[:, :, 4, 4] = 1  # and from there to any place
    counts = random_shift(pixel, 4).sum((0, 1))
    assert 50 < counts.min() and counts.max() < 150 and counts.sum() == 8100


def test_augmentation_of_small_images_moves_pixels_and_computes_none():
    images = torch.randint(1, 256, (16, 3, 32, 32), dtype=torch.uint8)
    views = common.denormalize(augment(images, torch.ones(16), 32, "shift", 0.0)) * 255
    mirrored = black = 0
    for image, view in zip(images, views):
        assert (view - view.round()).abs().max() < 1e-3
        padded = TF.pad(image, 4)
        crops = [(TF.crop(flip(padded), i, j, 32, 32), flip is not torch.clone)
                 for flip in (torch.clone, TF.hflip) for i in range(9) for j in range(9)]
        found = [m for crop, m in crops if torch.equal(crop, view.round().byte())]
        assert len(found) == 1
        mirrored, black = mirrored + found[0], black + (view == 0).any().item()
    assert 2 < mirrored < 14 and black > 10


def test_augmentation_of_large_images_is_a_resized_crop(monkeypatch):
    seen, crop = [], common.random_resized_crop
    monkeypatch.setattr(common, "random_resized_crop", lambda images, aspect, *a, **k: (
        seen.append((a, k)), crop(images, aspect, *a, **k))[1])
    images = torch.zeros(2, 3, 80, 80, dtype=torch.uint8)
    assert augment(images, torch.ones(2), 72, "resized", 0.0).shape == (2, 3, 72, 72)
    assert seen == [((72,), {"scale": (0.08, 1.0)})]


def test_half_of_the_demonstration_are_negatives():
    images = torch.full((400, 3, 32, 32), 51, dtype=torch.uint8)  # 0.2; negative 0.8
    for invert, low, high in ((0.0, 0, 0), (0.5, 0.4, 0.6), (1.0, 1, 1)):
        views = common.denormalize(augment(images, torch.ones(400), 32, "resized", invert))
        negative = (views - 0.8).abs().amax((1, 2, 3)) < 1e-3
        assert low <= negative.float().mean() <= high
    assert rotation.parse_args(["--recipe", "cifar"]).invert == 0


# ---- schedule and optimizer


def rate(recipe, epoch, steps=390):
    """The rates at the first and the last step of an epoch, counted from 0."""
    args = rotation.parse_args(["--recipe", recipe])
    return [rotation.stepwise(epoch * steps + i, args.epochs * steps,
                              round(args.warmup_epochs * steps), args.lr * args.batch_size / 256,
                              args.lr_drops, args.lr_factor) for i in (0, steps - 1)]


def test_rate_falls_at_the_epochs_of_the_official_code():
    """Its table has the first epoch, counted from 0, that no longer has a rate."""
    for low, high, lr in ((0, 60, 0.1), (60, 120, 0.02), (120, 160, 0.004), (160, 200, 0.0008)):
        assert rate("cifar", low) + rate("cifar", high - 1) == pytest.approx([lr] * 4)
    for low, high, lr in ((5, 30, 0.2), (30, 50, 0.02), (50, 70, 0.002)):
        assert rate("imagenet", low) + rate("imagenet", high - 1) == pytest.approx([lr] * 4)
    for steps in 7, 97, 391, 10009:
        assert rate("cifar", 60, steps)[0] == pytest.approx(0.02)
        assert rate("imagenet", 29, steps)[1] == pytest.approx(0.2)
    assert rate("imagenet", 0)[0] == pytest.approx(0.2 / (5 * 390))
    assert rate("imagenet", 2)[1] == pytest.approx(0.2 * 3 / 5)
    assert rotation.stepwise(0, 0, 0, 2.0, [0.5], 0.1) == pytest.approx(0.2)  # no steps at all


def test_optimizer_is_nesterov_sgd_that_decays_all_parameters():
    model = RotNet(common.make_backbone("resnet8", 32), 128)
    optimizer = rotation.make_optimizer(model, 5e-4)
    (group,) = optimizer.param_groups
    assert {k: group[k] for k in ("momentum", "nesterov", "weight_decay")} == {
        "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    assert len(group["params"]) == len(list(model.parameters()))


def test_any_number_of_drops():
    assert rotation.parse_args(["--lr-drops", "0.1", "0.2"]).lr_drops == [0.1, 0.2]
    assert rotation.parse_args(["--lr-drops"]).lr_drops == []


# ---- what the health number shows


def solved_after_training(images):
    torch.manual_seed(0)
    model = RotNet(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()), 8 * 36)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(30):
        rotated, labels = rotate_four(images[step % 4 :: 4])
        logits = model(rotated)
        optimizer.zero_grad()
        rotation_loss(logits, labels).backward()
        optimizer.step()
    return solved(logits, labels).item()


def test_nothing_is_learned_without_an_up_direction():
    lit_from_above = torch.randn(64, 3, 8, 8) + torch.linspace(2, -2, 8)[:, None]
    assert solved_after_training(lit_from_above) > 0.9
    half = torch.randint(-2, 3, (64, 3, 8, 8)).float()
    alike = sum(half.rot90(k, (2, 3)) for k in range(4))  # the same from all four sides
    assert solved_after_training(alike) == pytest.approx(0.25)
