"""The batched augmentation of common.py against torchvision's, image by image, same parameters.

Bounds are for values in [0, 1]; one step of 8 bits is 1/255.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import common
from common import (center_view, color_jitter, denormalize, gaussian_blur, normalize,
                    random_grayscale, random_horizontal_flip, random_resized_crop, random_solarize,
                    resized_crop)

MEAN = [0.485, 0.456, 0.406]
STD = [0.229, 0.224, 0.225]
MODES = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}
FACTORS = torch.tensor([0.0, 0.2, 0.6, 1.0, 1.3, 1.8, 2.0])
SHIFTS = torch.tensor([-0.5, -0.2, -0.05, 0.0, 0.1, 0.33, 0.5])
JITTER = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue


def make_images(n, size):
    """(n, 3, size, size) uint8: noise, smooth pictures, both mixed; one flat, two saturated."""
    images = torch.rand(n, 3, size, size)
    smooth = F.interpolate(torch.rand(n, 3, 5, 5), size, mode="bicubic").clamp(0, 1)
    images[1::3] = smooth[1::3]
    images[2::3] = 0.9 * smooth[2::3] + 0.1 * images[2::3]
    images[0] = 0.5
    images[1, 0] = 1.0
    images[2, 1:] = 0.0
    return (255 * images).round().to(torch.uint8)


def make_floats(n, size):
    return make_images(n, size) / 255


def assert_near(ours, theirs, bound):
    assert ours.shape == theirs.shape
    deviation = (ours - theirs).abs().max().item()
    assert deviation <= bound, f"{255 * deviation:.5f} / 255"


@pytest.fixture
def uniforms(monkeypatch):
    """A list: what the next calls of `uniform` give. When it is empty, they draw."""
    draw = common.uniform
    given = []

    def uniform(*shape, **options):
        return given.pop(0) if given else draw(*shape, **options)

    monkeypatch.setattr(common, "uniform", uniform)
    return given


# ------------------------------------------------------------------------------------------ crops


def torchvision_crop(image, box, size, interpolation):
    """image: floats (3, H, W)."""
    top, left, height, width = (int(side) for side in box)
    crop = TF.resized_crop(image, top, left, height, width, [size, size], MODES[interpolation])
    return crop.clamp(0, 1)


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("canvas, size", [(32, 32), (40, 32), (32, 64), (256, 224), (96, 20)])
def test_crop(canvas, size, interpolation):
    boxes = [[0, 0, canvas, canvas], [0, 0, 1, 1], [canvas - 1, canvas - 1, 1, 1],
             [3, 0, 1, canvas], [0, 5, canvas, 1], [1, 2, 2, 3], [0, 16, canvas, canvas - 16]]
    for _ in range(4 if canvas > 96 else 30):
        top, left = torch.randint(canvas, (2,)).tolist()
        height = torch.randint(1, canvas - top + 1, ()).item()
        width = torch.randint(1, canvas - left + 1, ()).item()
        boxes.append([top, left, height, width])
    images = make_images(len(boxes), canvas)
    ours = resized_crop(images, torch.tensor(boxes).float(), size, interpolation)
    theirs = [torchvision_crop(image, box, size, interpolation)
              for image, box in zip(images / 255, boxes)]
    assert_near(ours, torch.stack(theirs), 2e-5)


def random_boxes(monkeypatch, *arguments):
    """-> the boxes that random_resized_crop takes, in pixels of the canvas."""
    taken = []

    def crop(images, boxes, size, interpolation):
        taken.append(boxes)

    monkeypatch.setattr(common, "resized_crop", crop)
    random_resized_crop(*arguments)
    return taken[0]


@pytest.mark.parametrize("interpolation", MODES)
def test_crops_of_a_squeezed_image_are_those_of_the_original(interpolation, monkeypatch):
    """A smooth 2:1 image: 6/255 at most, at the edges of the crop, 0.5/255 in the mean."""
    original = 0.2 + 0.6 * F.interpolate(torch.rand(20, 3, 5, 8), (64, 128), mode="bicubic")
    squeezed = (255 * TF.resize(original, [64, 64], antialias=True)).round().byte()
    boxes = random_boxes(monkeypatch, squeezed, torch.full((20,), 2.0), 48, (0.2, 1))
    ours = resized_crop(squeezed, boxes, 48, interpolation)
    boxes = (boxes * torch.tensor([1, 2, 1, 2])).round()
    theirs = torch.stack([torchvision_crop(image, box, 48, interpolation)
                          for image, box in zip(original, boxes)])
    assert_near(ours, theirs, 6 / 255)
    assert (ours - theirs).abs().mean() < 0.5 / 255


@pytest.mark.parametrize("canvas, aspect, size, box", [
    (32, 1.0, 32, [0, 0, 32, 32]), (256, 1.0, 224, [16, 16, 224, 224]),
    (64, 2.0, 48, [0, 16, 64, 32]), (64, 0.5, 48, [16, 0, 32, 64])])  # half the squeezed canvas
def test_center_view(canvas, aspect, size, box):
    images = make_images(4, canvas)
    theirs = [TF.normalize(torchvision_crop(image, box, size, "bilinear"), MEAN, STD)
              for image in images / 255]
    assert_near(center_view(images, torch.full((4,), aspect), size), torch.stack(theirs), 1e-4)


def test_center_view_of_64_pixels_is_the_whole_square():
    images = make_images(4, 64)
    assert_near(center_view(images, torch.ones(4), 64), normalize(images / 255), 1e-4)


def test_center_view_of_an_image_that_cannot_be_read():
    """Its aspect is 0, and a batch of it and others must not give NaN."""
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    assert center_view(images, torch.tensor([0.0, 1.0]), 32).isfinite().all()


# -------------------------------------------------------------------- operations, fixed parameters


@pytest.mark.parametrize("place", range(4))
def test_each_part_of_the_jitter(place, uniforms):
    """The other three have strength 0."""
    hue = place == 3
    strengths = [0.0, 0.0, 0.0, 0.0]
    strengths[place] = 0.5 if hue else 1.0
    values = (SHIFTS if hue else FACTORS).repeat(9)
    draws = values / 0.5 if hue else values - 1
    uniforms.append(draws[:, None].expand(-1, 4))
    uniforms.append(torch.zeros(len(values)))  # all are chosen
    x = make_floats(len(values), 40)
    before = x.clone()
    theirs = [JITTER[place](image, value) for image, value in zip(x, values.tolist())]
    assert_near(color_jitter(x, *strengths, p=1), torch.stack(theirs), 5e-6)
    assert torch.equal(x, before)


def test_jitter_in_every_order(uniforms, monkeypatch):
    strengths = 0.4, 0.5, 0.9, 0.1
    for order in itertools.permutations(range(4)):
        monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor(order))
        draws = 2 * torch.rand(6, 4) - 1
        uniforms.append(draws)
        uniforms.append(torch.tensor([0.0, 0.5, 0.7, 0.79, 0.81, 0.99]))  # the first four of six
        x = make_floats(6, 16)
        theirs = x.clone()
        for image in range(4):
            for place in order:
                change = strengths[place] * draws[image, place].item()
                value = change if place == 3 else 1 + change
                theirs[image] = JITTER[place](theirs[image], value)
        assert_near(color_jitter(x, *strengths, p=0.8), theirs, 1e-4)


@pytest.mark.parametrize("size, kernel_size", [
    (32, 3), (96, 9), (40, 13), (9, 9), (5, 9), (4, 7), (5, 1), (1, 1)])
def test_blur(size, kernel_size, uniforms):
    """In the smallest, the border is reflected at both ends of one kernel."""
    x = make_floats(4, size)
    before = x.clone()
    sigma = [0.1, 0.5, 1.0, 2.0]
    uniforms.append(torch.tensor(sigma))
    uniforms.append(torch.zeros(4))
    theirs = [TF.gaussian_blur(image, [kernel_size, kernel_size], [value])
              for image, value in zip(x, sigma)]
    assert_near(gaussian_blur(x, 1.0, kernel_size), torch.stack(theirs), 3e-6)
    assert torch.equal(x, before)


@pytest.mark.parametrize("size, kernel_size", [(32, 3), (96, 9), (224, 23)])
def test_the_blurs_kernel_is_a_tenth_of_the_side(size, kernel_size, uniforms):
    """Made odd; at 32 and 224 pixels, as in SimCLR's code."""
    x = make_floats(3, size)[2:]
    uniforms.append(torch.tensor([2.0]))
    uniforms.append(torch.zeros(1))
    assert_near(gaussian_blur(x, 1.0), TF.gaussian_blur(x, [kernel_size] * 2, [2.0]), 3e-6)


@pytest.mark.parametrize("size", [32, 96])
def test_images_that_are_not_blurred_stay_the_same_to_the_bit(size, uniforms):
    x = make_floats(4, size)
    assert torch.equal(gaussian_blur(x, 0.0), x)
    uniforms.append(torch.full((4,), 1.5))
    uniforms.append(torch.tensor([0.2, 0.8, 0.4, 0.6]))
    blurred = gaussian_blur(x, 0.5, 9)
    assert torch.equal(blurred[1::2], x[1::2])
    assert_near(blurred[::2], TF.gaussian_blur(x[::2], [9, 9], [1.5]), 3e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 128 / 255, 0.5, 0.9, 1.0])
def test_solarize(threshold, uniforms):
    x = make_floats(12, 33)
    before = x.clone()
    assert_near(random_solarize(x, 1.0, threshold), TF.solarize(x, threshold), 1e-6)
    uniforms.append(torch.tensor([0.1, 0.3] * 6))
    some = random_solarize(x, 0.2, threshold)
    assert_near(some[::2], TF.solarize(x[::2], threshold), 1e-6)
    assert torch.equal(some[1::2], x[1::2])
    assert torch.equal(x, before)


def test_flip_grayscale_and_normalize():
    x = make_floats(12, 33)
    before = x.clone()
    assert torch.equal(random_horizontal_flip(x, 1), TF.horizontal_flip(x))
    assert_near(random_grayscale(x, 1), TF.rgb_to_grayscale(x, 3), 1e-6)
    views = normalize(x)
    assert_near(views, TF.normalize(x, MEAN, STD), 1e-6)
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert_near(denormalize(views), x, 1e-6)
    assert torch.equal(x, before)


def test_with_probability_0_nothing_changes():
    x = make_floats(12, 33)
    for operation in random_horizontal_flip, random_grayscale, random_solarize, gaussian_blur:
        assert_near(operation(x, p=0), x, 1e-6)
    assert_near(color_jitter(x, 1, 1, 1, 0.5, p=0), x, 5e-6)


# ----------------------------------------------------------------------------- random parameters


def assert_same_distribution(ours, theirs):
    """Kolmogorov and Smirnov's distance (above 0.06 once in 20,000, for 3000 draws), and the ends.
    """
    ours = torch.as_tensor(ours).float().round(decimals=5)
    theirs = torch.as_tensor(theirs).float().round(decimals=5)
    points = torch.cat([ours, theirs])
    ours_below = torch.searchsorted(ours.sort()[0], points, right=True) / len(ours)
    theirs_below = torch.searchsorted(theirs.sort()[0], points, right=True) / len(theirs)
    assert_near(ours_below, theirs_below, 0.06)
    span = (points.max() - points.min()).item()
    assert_near(ours.min(), theirs.min(), 0.08 * span)
    assert_near(ours.max(), theirs.max(), 0.08 * span)


def boxes_of_both(monkeypatch, n, canvas, aspect, scale):
    """-> n boxes of ours and n of torchvision's: top, left, height, width, each (4, n), in pixels
    of the original image."""
    width = round(canvas * aspect)
    images = torch.empty(1, 3, canvas, canvas, dtype=torch.uint8).expand(n, -1, -1, -1)
    boxes = random_boxes(monkeypatch, images, torch.full((n,), aspect), 32, scale)
    boxes = boxes * torch.tensor([1, width / canvas, 1, width / canvas])
    assert_near(boxes, boxes.round(), 1e-4)
    crop = v2.RandomResizedCrop(32, scale)
    theirs = []
    for _ in range(n):
        box = crop.make_params([torch.empty(3, canvas, width)])
        theirs.append([box["top"], box["left"], box["height"], box["width"]])
    return boxes.round().T, torch.tensor(theirs).float().T


def measures(boxes):
    """Their area, ratio and four edges."""
    top, left, height, width = boxes
    return [height * width, height / width, top, left, top + height, left + width]


@pytest.mark.parametrize("canvas, aspect, scale", [
    (32, 1.0, (0.08, 1)), (64, 2.0, (0.2, 1)), (60, 0.4, (0.5, 0.6)), (8, 1.0, (0.002, 0.02))])
def test_boxes_are_distributed_as_torchvisions(monkeypatch, canvas, aspect, scale):
    ours, theirs = boxes_of_both(monkeypatch, 3000, canvas, aspect, scale)
    top, left, height, width = ours
    assert top.min() >= 0 and left.min() >= 0
    assert (top + height).max() <= canvas and (left + width).max() <= round(canvas * aspect)
    for a, b in zip(measures(ours), measures(theirs)):
        assert_same_distribution(a, b)
    assert_near(ours.corrcoef().nan_to_num(), theirs.corrcoef().nan_to_num(), 0.09)


@pytest.mark.parametrize("canvas, aspect", [(32, 3.0), (47, 0.3)])
def test_where_no_try_fits_the_largest_box_in_the_middle_is_taken(monkeypatch, canvas, aspect):
    ours, theirs = boxes_of_both(monkeypatch, 3, canvas, aspect, (1.5, 1.6))
    assert torch.equal(ours, theirs)


def test_factors_of_the_jitter_are_distributed_as_torchvisions():
    """Read off two grays, or off a color of hue 0."""
    params = [v2.ColorJitter(0.4, 0.5, 1.0, 0.1).make_params([]) for _ in range(3000)]
    gray = torch.tensor([0.3, 0.5]).expand(3000, 3, 1, 2)
    red = torch.tensor([0.6, 0.3, 0.3])[:, None, None].expand(3000, 3, 1, 1)
    brightness = color_jitter(gray, 0.4, 0, 0, 0)[:, 0, 0, 0] / 0.3
    contrast = color_jitter(gray, 0, 0.5, 0, 0)[:, 0, 0].diff(dim=1)[:, 0] / 0.2
    saturated = color_jitter(red / 2 + 0.25, 0, 0, 1.0, 0)[:, :, 0, 0]
    saturation = (saturated[:, 0] - saturated[:, 1]) / 0.15
    turned = color_jitter(red, 0, 0, 0, 0.1)[:, :, 0, 0]
    hue = (turned[:, 1] - turned[:, 2]) / 0.3 / 6
    for name, values, neutral in (("brightness", brightness, 1), ("contrast", contrast, 1),
                                  ("saturation", saturation, 1), ("hue", hue, 0)):
        changed = (values - neutral).abs() > 1e-4
        assert abs(changed.float().mean() - 0.8) < 0.03, name
        assert_same_distribution(values[changed], [p[f"{name}_factor"] for p in params])


def test_jitter_above_its_strongest_counts_as_that():
    """Else factors would be negative, and views black or inverted."""
    x = make_floats(50, 8)
    torch.manual_seed(0)
    strongest = color_jitter(x, 1.0, 1.0, 1.0, 0.5)
    torch.manual_seed(0)
    assert torch.equal(color_jitter(x, 1.6, 1.2, 2.0, 0.8), strongest)


def test_sigma_of_the_blur_is_distributed_as_torchvisions():
    """Read off an edge: the wider the blur, the grayer its neighbor."""
    blur = v2.GaussianBlur(3, (0.1, 2.0))
    theirs = torch.tensor([blur.make_params([])["sigma"][0] for _ in range(3000)])
    edge = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]).expand(3000, 3, 6, 6)
    found = gaussian_blur(edge, 1.0, 3, (0.1, 2.0))[:, 0, 0, 2]  # exp(-a) / (1 + 2 exp(-a))
    expected = torch.exp(-0.5 / theirs**2)
    assert_same_distribution(found, expected / (1 + 2 * expected))


def test_probabilities():
    x = torch.rand(3000, 3, 1, 12).expand(-1, -1, 12, -1)
    views = {0.7: color_jitter(x, 0.4, 0.4, 0.4, 0.1, p=0.7),  # one draw for all four
             0.3: random_solarize(x, 0.3, 0.0),
             0.4: random_horizontal_flip(x, 0.4),
             0.2: random_grayscale(x, 0.2),
             0.5: gaussian_blur(x, 0.5, 3)}
    for p, view in views.items():
        changed = (view - x).abs().flatten(1).amax(1) > 1e-5
        assert abs(changed.float().mean() - p) < 0.03
