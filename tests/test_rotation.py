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
from rotation import (RotNet, augment, central_square, random_shift, rotate_four, rotation_loss,
                      solved)

# ---- loss


def slow_loss(logits):
    """The paper's equation, of logits (4B, 4) in the order of `rotate_four`."""
    count = len(logits) // 4
    total = 0.0
    for i in range(count):
        for y in range(4):
            scores = logits[y * count + i].exp()
            total = total - (scores[y] / scores.sum()).log() / 4
    return total / count


def test_loss_and_gradient_equal_slow_version():
    logits = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    _, labels = rotate_four(torch.zeros(3, 3, 2, 2))
    fast = rotation_loss(logits, labels)
    slow = slow_loss(logits)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    (fast_gradient,) = torch.autograd.grad(fast, logits)
    (slow_gradient,) = torch.autograd.grad(slow, logits)
    torch.testing.assert_close(fast_gradient, slow_gradient, rtol=1e-10, atol=1e-12)


def test_loss_and_solved_at_chance_and_at_extremes():
    labels = torch.arange(4)
    assert rotation_loss(torch.ones(4, 4), labels).item() == pytest.approx(math.log(4))
    right = torch.eye(4) * 1e15
    wrong = right.roll(1, 0)
    assert rotation_loss(right, labels) == 0
    assert rotation_loss(wrong, labels).isfinite()
    assert solved(right, labels) == 1
    assert solved(wrong, labels) == 0


# ---- the four rotations


def test_label_k_is_k_turns_counter_clockwise():
    image = torch.zeros(1, 3, 5, 5)
    image[..., 0, 1] = 1  # beside the top left corner
    rotated, labels = rotate_four(image)
    assert labels.tolist() == [0, 1, 2, 3]
    places = [turned[0].nonzero().squeeze().tolist() for turned in rotated]
    assert places == [[0, 1], [3, 0], [4, 3], [1, 4]]  # top, left, bottom, right


def test_each_image_is_there_in_all_rotations_and_pixels_only_change_places():
    images = torch.randn(3, 3, 6, 6)
    rotated, labels = rotate_four(images)
    assert rotated.shape == (12, 3, 6, 6)
    for k in range(4):
        for i in range(3):
            assert labels[3 * k + i] == k
            expected = np.rot90(images[i].numpy(), k, axes=(1, 2))
            assert np.array_equal(rotated[3 * k + i].numpy(), expected)


@pytest.fixture
def short_run(class_folders, monkeypatch):
    """short_run(*flags) trains for three steps -> what the network is given, what the loss is
    given, and the options of the evaluation."""
    batches = []
    losses = []
    options = []
    forward = RotNet.forward
    loss = rotation.rotation_loss

    def recorded_forward(model, rotated):
        batches.append(rotated)
        return forward(model, rotated)

    def recorded_loss(logits, labels):
        losses.append((logits, labels))
        return loss(logits, labels)

    def recorded_evaluate(*args, **given):
        options.append(given)
        return {}

    monkeypatch.setattr(RotNet, "forward", recorded_forward)
    monkeypatch.setattr(rotation, "rotation_loss", recorded_loss)
    monkeypatch.setattr(linear_probe, "evaluate", recorded_evaluate)

    def run(*flags):
        always = "--data images --recipe demo -b 8 --epochs 1 --workers 0".split()
        rotation.train(rotation.parse_args([*always, *flags]))
        return batches, losses, options

    return run


@pytest.mark.parametrize("crop", ["shift", "resized"])
def test_a_batch_has_each_view_in_all_rotations(short_run, crop):
    """So a view is rotated after its crop and flip, and all four rotations share BN statistics."""
    batches, losses, options = short_run("--crop", crop)
    assert len(batches) == len(losses) == 3
    for rotated, (logits, labels) in zip(batches, losses):
        views = rotated[:8]
        assert len(views.unique(dim=0)) == 8
        for k in range(4):
            assert torch.equal(rotated[8 * k : 8 * k + 8], views.rot90(k, (2, 3)))
            assert (labels[8 * k : 8 * k + 8] == k).all()
    assert options == [{"layers": True}]  # the last stage knows less about objects than others


# ---- augmentation


FLIP_AND_INVERT = [("random_horizontal_flip", {"p": 0.5}),
                   ("random_solarize", {"p": 0.25, "threshold": 0.0}),
                   ("normalize", {})]


@pytest.mark.parametrize("crop, expected", [
    ("resized", [("random_resized_crop", {"size": 72, "scale": (0.08, 1.0)}), *FLIP_AND_INVERT]),
    ("shift", FLIP_AND_INVERT)])
def test_operations_and_their_order(operations, crop, expected):
    images = torch.zeros(2, 3, 80, 80, dtype=torch.uint8)
    views = augment(images, torch.ones(2), 72, crop, invert=0.25)
    assert views.shape == (2, 3, 72, 72)
    assert operations == expected


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
    assert counts.sum() == 8100
    assert 50 < counts.min()
    assert counts.max() < 150


def test_small_images_are_shifted_with_a_black_border_and_flipped():
    images = torch.randint(1, 256, (16, 3, 32, 32), dtype=torch.uint8)
    views = common.denormalize(augment(images, torch.ones(16), 32, "shift", invert=0.0)) * 255
    flipped = 0
    black = 0
    for image, view in zip(images, views):
        assert (view - view.round()).abs().max() < 1e-3  # pixels only change places
        found = []
        for turn in 0, 1:
            padded = TF.pad(TF.hflip(image) if turn else image, 4)
            for top in range(9):
                for left in range(9):
                    if torch.equal(TF.crop(padded, top, left, 32, 32), view.round().byte()):
                        found.append(turn)
        assert len(found) == 1
        flipped += found[0]
        black += (view.round() == 0).any().item()
    assert 2 < flipped < 14
    assert black > 10


@pytest.mark.parametrize("aspect, top, left, height, width", [
    (1.0, 0, 0, 60, 60), (2.0, 0, 15, 60, 30), (0.5, 15, 0, 30, 60)])
def test_central_square_is_the_largest(aspect, top, left, height, width):
    image = torch.randint(256, (1, 3, 60, 60), dtype=torch.uint8)
    square = central_square(image, torch.tensor([aspect]), 30)
    box = image[..., top : top + height, left : left + width] / 255
    expected = TF.resize(box, [30, 30], antialias=True)
    torch.testing.assert_close(square, expected, atol=1e-5, rtol=0)


def test_shift_is_of_the_central_square():
    images = torch.full((4, 3, 60, 60), 255, dtype=torch.uint8)
    images[..., 15:45] = 51  # the middle of an image twice as wide as high
    views = augment(images, torch.full((4,), 2.0), 30, "shift", invert=0.0)
    assert common.denormalize(views).max().item() == pytest.approx(51 / 255)


def test_only_the_demonstration_is_inverted():
    assert rotation.RECIPES["invert"] == (0.5, 0, 0, 0)


# ---- schedule and optimizer


def rate(recipe, epoch, steps=390):
    """The rates at the first and the last step of an epoch, counted from 0."""
    args = rotation.parse_args(["--recipe", recipe])
    total_steps = args.epochs * steps
    warmup_steps = round(args.warmup_epochs * steps)
    peak_lr = args.lr * args.batch_size / 256
    first_and_last = epoch * steps, (epoch + 1) * steps - 1
    return [rotation.stepwise_schedule(step, total_steps, warmup_steps, peak_lr, args.lr_drops,
                              args.lr_factor) for step in first_and_last]


def test_rate_falls_at_the_epochs_of_the_official_code():
    """Its table has the first epoch, counted from 0, that no longer has a rate."""
    for first, end, lr in (0, 60, 0.1), (60, 120, 0.02), (120, 160, 0.004), (160, 200, 0.0008):
        assert rate("cifar", first) + rate("cifar", end - 1) == pytest.approx([lr] * 4)
    for first, end, lr in (5, 30, 0.2), (30, 50, 0.02), (50, 70, 0.002):
        assert rate("imagenet", first) + rate("imagenet", end - 1) == pytest.approx([lr] * 4)
    for steps in 7, 97, 391, 10009:
        assert rate("cifar", 60, steps)[0] == pytest.approx(0.02)
        assert rate("imagenet", 29, steps)[1] == pytest.approx(0.2)


def test_rate_rises_over_the_warmup():
    assert rate("imagenet", 0)[0] == pytest.approx(0.2 / (5 * 390))
    assert rate("imagenet", 2)[1] == pytest.approx(0.2 * 3 / 5)
    assert rotation.stepwise_schedule(0, 0, 0, 2.0, [0.5], 0.1) == pytest.approx(0.2)  # no steps


def test_optimizer_is_nesterov_sgd_that_decays_all_parameters():
    model = RotNet(common.make_backbone("resnet8", 32), 128)
    optimizer = rotation.make_optimizer(model, 5e-4)
    (group,) = optimizer.param_groups
    assert group["momentum"] == 0.9
    assert group["nesterov"]
    assert group["weight_decay"] == 5e-4
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
