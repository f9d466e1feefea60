"""The batched augmentation of common.py against torchvision's, image by image, same parameters.

Bounds are for values in [0, 1]; one step of 8 bits is 1/255.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import common
from common import (central_crop, color_jitter, gaussian_blur, normalize, random_grayscale,
                    random_horizontal_flip, random_resized_crop, random_solarize, resized_crop)

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
MODES = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}
FACTORS = torch.tensor([0.0, 0.2, 0.6, 1.0, 1.3, 1.8, 2.0])
SHIFTS = torch.tensor([-0.5, -0.2, -0.05, 0.0, 0.1, 0.33, 0.5])
OPERATIONS = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue


def make_images(n, size):
    """(n, 3, size, size) uint8: noise, smooth pictures, both mixed; the first flat or saturated."""
    images = torch.rand(n, 3, size, size)
    smooth = F.interpolate(torch.rand(n, 3, 5, 5), size, mode="bicubic").clamp(0, 1)
    images[1::3], images[2::3] = smooth[1::3], 0.9 * smooth[2::3] + 0.1 * images[2::3]
    images[0], images[1, 0], images[2, 1:] = 0.5, 1.0, 0.0
    return (255 * images).round().to(torch.uint8)


def make_floats(n, size):
    return make_images(n, size) / 255


def assert_near(ours, theirs, bound):
    assert ours.shape == theirs.shape
    deviation = (ours - theirs).abs().max().item()
    assert deviation <= bound, f"{deviation * 255:.5f} / 255"


@pytest.fixture
def draws(monkeypatch, uniform=common.uniform):
    """draws.given: what the next calls of `uniform` give; else they draw; draws.made: all."""
    def give(*shape, **options):
        draws.made.append(draws.given.pop(0) if draws.given else uniform(*shape, **options))
        return draws.made[-1]

    draws = SimpleNamespace(given=[], made=[])
    monkeypatch.setattr(common, "uniform", give)
    return draws


# ---- the same numbers as torchvision's


def torchvision_crop(image, box, size, interpolation):
    box, mode = [int(side) for side in box], MODES[interpolation]
    return TF.resized_crop(image, *box, [size, size], mode).clamp(0, 1)


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("canvas, size", [(32, 32), (40, 32), (32, 64), (256, 224), (96, 20)])
def test_crop(canvas, size, interpolation):
    extremes = [[0, 0, canvas, canvas], [0, 0, 1, 1], [canvas - 1, canvas - 1, 1, 1],
                [3, 0, 1, canvas], [0, 5, canvas, 1], [1, 2, 2, 3], [0, 16, canvas, canvas - 16]]
    drawn = torch.rand(4 if canvas > 96 else 40, 2, 2).sort(1)[0] * canvas
    drawn = torch.cat([drawn[:, 0].floor(), (drawn[:, 1] - drawn[:, 0]).ceil().clamp(min=1)], 1)
    boxes = torch.cat([torch.tensor(extremes).float(), drawn])
    images = make_images(len(boxes), canvas)
    theirs = torch.stack([torchvision_crop(*pair, size, interpolation)
                          for pair in zip(images / 255, boxes)])
    assert_near(resized_crop(images, boxes, size, interpolation), theirs, 2e-5)


@pytest.mark.parametrize("place", range(4))
def test_each_part_of_the_jitter(draws, place):
    strengths, values = [0.0] * 4, (SHIFTS if place == 3 else FACTORS).repeat(9)
    strengths[place] = 0.5 if place == 3 else 1.0
    u = ((values - int(place < 3)) / strengths[place])[:, None].expand(-1, 4)
    draws.given.extend([u, torch.zeros(len(u))])
    x = make_floats(len(u), 40)
    before = x.clone()
    theirs = [OPERATIONS[place](*pair) for pair in zip(x, values.tolist())]
    assert_near(color_jitter(x, *strengths, p=1), torch.stack(theirs), 5e-6)
    assert torch.equal(x, before)


def test_jitter_in_every_order(draws, monkeypatch):
    strengths = 0.4, 0.5, 0.9, 0.1
    for order in itertools.permutations(range(4)):
        monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor(order))
        x = make_floats(6, 16)
        ours, (u, chance), theirs = color_jitter(x, *strengths, p=0.8), draws.made[-2:], x.clone()
        for j, i in itertools.product((chance < 0.8).nonzero().flatten(), order):
            theirs[j] = OPERATIONS[i](theirs[j], (i < 3) + strengths[i] * u[j, i].item())
        assert_near(ours, theirs, 1e-4)


@pytest.mark.parametrize("size, kernel_size", [
    (32, 3), (96, 9), (224, 23), (40, 9), (96, 23)])  # by default a tenth of the width, made odd
def test_blur(draws, size, kernel_size):
    x, sigma = make_floats(4, size), torch.tensor([0.1, 0.5, 1.0, 2.0])
    before = x.clone()
    theirs = torch.stack([TF.gaussian_blur(image, [kernel_size] * 2, [value])
                          for image, value in zip(x, sigma.tolist())])
    for given in [kernel_size, None][: 1 + (kernel_size in (size // 10, size // 10 + 1))]:
        draws.given.extend([sigma, torch.zeros(4)])
        assert_near(gaussian_blur(x, 0.5, given), theirs, 3e-6)
    assert torch.equal(x, before)


def test_other_operations():
    x = make_floats(12, 33)
    before = x.clone()
    assert torch.equal(random_horizontal_flip(x, 1), TF.horizontal_flip(x))
    assert_near(random_grayscale(x, 1), TF.rgb_to_grayscale(x, 3), 1e-6)
    for threshold in 0.0, 0.1, 128 / 255, 0.9, 1.0:
        assert_near(random_solarize(x, 1, threshold), TF.solarize(x, threshold), 1e-6)
    views = normalize(x)
    assert_near(views, TF.normalize(x, *IMAGENET), 1e-6)
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert_near(common.denormalize(views), x, 1e-6)
    for operation in random_horizontal_flip, random_grayscale, random_solarize, gaussian_blur:
        assert_near(operation(x, p=0), x, 1e-6)
    assert_near(color_jitter(x, 1, 1, 1, 0.5, p=0), x, 5e-6)
    assert torch.equal(x, before)


@pytest.mark.parametrize("mode", MODES)
def test_crops_of_a_squashed_image_are_those_of_the_original(mode, monkeypatch):
    """A smooth 2:1 image: 6/255 at most, at the edges of the crop, 0.5/255 in the mean."""
    original = 0.2 + 0.6 * F.interpolate(torch.rand(20, 3, 5, 8), (64, 128), mode="bicubic")
    squashed = (255 * TF.resize(original, [64, 64], antialias=True)).round().byte()
    boxes, ours = boxes_of(monkeypatch, squashed, torch.full((20,), 2.0), 48, (0.2, 1), mode)
    boxes = (boxes * torch.tensor([1, 2, 1, 2])).round()
    theirs = torch.stack([torchvision_crop(*pair, 48, mode) for pair in zip(original, boxes)])
    assert_near(ours, theirs, 6 / 255)
    assert (ours - theirs).abs().mean() < 0.5 / 255


@pytest.mark.parametrize("canvas, aspect, size, box", [
    (32, 1.0, 32, [0, 0, 32, 32]), (256, 1.0, 224, [16, 16, 224, 224]),
    (64, 2.0, 48, [0, 16, 64, 32]), (64, 0.5, 48, [16, 0, 32, 64])])  # half the squashed canvas
def test_central_crop(canvas, aspect, size, box):
    images = make_images(4, canvas)
    theirs = torch.stack([torchvision_crop(x / 255, box, size, "bilinear") for x in images])
    assert_near(central_crop(images, torch.full((4,), aspect), size), theirs, 2e-5)


def test_central_crop_of_an_image_that_became_unreadable():
    """Its aspect is 0, and a batch of it and others must not give NaN."""
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    assert central_crop(images, torch.tensor([0.0, 1.0]), 32).isfinite().all()


# ---- the same distributions as torchvision's


def boxes_of(monkeypatch, images, *arguments):
    """-> the boxes that random_resized_crop draws, and its crops"""
    def crop(images, boxes, *others):
        return boxes, resized_crop(images, boxes, *others) if images.stride(0) else None

    monkeypatch.setattr(common, "resized_crop", crop)
    return random_resized_crop(images, *arguments)


def assert_same_distribution(ours, theirs):
    """Kolmogorov and Smirnov's distance (0.06 at n = 3000: once in 20,000) and the ends."""
    ours, theirs = (torch.as_tensor(x).float().round(decimals=5) for x in (ours, theirs))
    points = torch.cat([ours, theirs])
    below = [torch.searchsorted(x.sort()[0], points, right=True) / len(x) for x in (ours, theirs)]
    assert_near(*below, 0.06)
    span = (points.max() - points.min()).item()
    assert_near(torch.stack(ours.aminmax()), torch.stack(theirs.aminmax()), 0.08 * span)


@pytest.mark.parametrize("canvas, aspect, scale", [
    (32, 1.0, (0.08, 1)), (64, 2.0, (0.2, 1)), (60, 0.4, (0.5, 0.6)), (8, 1.0, (0.002, 0.02)),
    (32, 3.0, (1.5, 1.6)), (47, 0.3, (1.5, 1.6))])
def test_boxes_are_distributed_as_torchvision_draws_them(monkeypatch, canvas, aspect, scale):
    """The last two areas fit in no try: the largest box in the middle."""
    n, width = 3 if scale[0] > 1 else 3000, round(canvas * aspect)
    images = torch.empty(1, 3, canvas, canvas, dtype=torch.uint8).expand(n, -1, -1, -1)
    boxes, _ = boxes_of(monkeypatch, images, torch.full((n,), aspect), 32, scale)
    boxes = boxes * torch.tensor([1, width / canvas, 1, width / canvas])
    assert_near(boxes, boxes.round(), 1e-4)
    ours, crop = boxes.round().T, v2.RandomResizedCrop(32, scale)
    drawn = [crop.make_params([torch.empty(3, canvas, width)]) for _ in range(n)]
    theirs = torch.tensor([[box[key] for key in ("top", "left", "height", "width")]
                           for box in drawn]).float().T
    if n == 3:
        return assert_near(ours, theirs, 0)
    assert ours[:2].min() >= 0
    assert (ours[0] + ours[2]).max() <= canvas and (ours[1] + ours[3]).max() <= width
    for measure in (lambda t, l, h, w: h * w, lambda t, l, h, w: h / w, lambda t, l, h, w: t,
                    lambda t, l, h, w: l, lambda t, l, h, w: t + h, lambda t, l, h, w: l + w):
        assert_same_distribution(measure(*ours), measure(*theirs))
    assert_near(ours.corrcoef().nan_to_num(), theirs.corrcoef().nan_to_num(), 0.09)


def test_other_parameters_are_distributed_as_torchvision_draws_them(draws):
    """The jitter's are read off two grays, or off a colour of hue 0."""
    n, rates = 3000, []
    params = [v2.ColorJitter(0.4, 0.5, 1.0, 0.1).make_params([]) for _ in range(n)]
    gray = torch.tensor([0.3, 0.5]).expand(n, 3, 1, 2)
    red = torch.tensor([0.6, 0.3, 0.3])[:, None, None].expand(n, 3, 1, 1)
    contrast = color_jitter(gray, 0, 0.5, 0, 0)[:, 0, 0].diff(dim=1)[:, 0]
    saturated = color_jitter(red / 2 + 0.25, 0, 0, 1.0, 0).flatten(1)
    turned = color_jitter(red, 0, 0, 0, 0.1).flatten(1)
    for name, values, neutral in (
            ("brightness", color_jitter(gray, 0.4, 0, 0, 0)[:, 0, 0, 0] / 0.3, 1),
            ("contrast", contrast / 0.2, 1),
            ("saturation", (saturated[:, 0] - saturated[:, 1]) / 0.15, 1),
            ("hue", (turned[:, 1] - turned[:, 2]) / 0.3 / 6, 0)):
        touched = (values - neutral).abs() > 1e-4
        rates.append((touched, 0.8))
        assert_same_distribution(values[touched], [p[f"{name}_factor"] for p in params])
    x = torch.rand(n, 3, 1, 12).expand(-1, -1, 4, -1)
    blurred, sigma = gaussian_blur(x, 0.5, 3, (0.1, 2.0)), draws.made[-2]
    blur = v2.GaussianBlur(3, (0.1, 2.0))
    assert_same_distribution(sigma, [blur.make_params([])["sigma"][0] for _ in range(n)])
    for view, p in ((color_jitter(x, 0.4, 0.4, 0.4, 0.1, p=0.7), 0.7),  # one draw for all four
                    (random_solarize(x, 0.3, 0.0), 0.3), (random_horizontal_flip(x, 0.4), 0.4),
                    (random_grayscale(x, 0.2), 0.2), (blurred, 0.5)):
        rates.append(((view - x).abs().flatten(1).amax(1) > 1e-5, p))
    for touched, p in rates:
        assert abs(touched.float().mean() - p) < 0.03


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_never_waits():
    images, aspect = make_images(64, 40).cuda(), (torch.rand(64) + 0.5).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = random_resized_crop(images, aspect, 32, (0.2, 1.0))
        x = color_jitter(random_horizontal_flip(x), 0.8, 0.8, 0.8, 0.2)
        normalize(random_solarize(gaussian_blur(random_grayscale(x), 0.5), 0.3))
        middle = central_crop(images, aspect, 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_near(middle.cpu(), central_crop(images.cpu(), aspect.cpu(), 32), 1e-4)
