"""The batched augmentation of common.py against torchvision's, image by image, same parameters.

Bounds are for values in [0, 1]; one step of 8 bits is 1/255.
"""
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import common
from common import (Augment, ColorJitter, GaussianBlur, Normalize, RandomGrayscale,
                    RandomHorizontalFlip, RandomResizedCrop, RandomSolarize, eval_view)

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
MODES = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}
RECIPE = [RandomResizedCrop(32), RandomHorizontalFlip(), ColorJitter(0.8, 0.8, 0.8, 0.2),
          RandomGrayscale(), GaussianBlur(), RandomSolarize(0.3)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_images(n, size):
    """(n, 3, size, size) uint8: noise, smooth pictures, both mixed; the first flat or saturated."""
    images = torch.rand(n, 3, size, size)
    smooth = F.interpolate(torch.rand(n, 3, 5, 5), size, mode="bicubic").clamp(0, 1)
    images[1::3], images[2::3] = smooth[1::3], 0.9 * smooth[2::3] + 0.1 * images[2::3]
    images[0], images[1, 0], images[2, 1:] = 0.5, 1.0, 0.0
    return (255 * images).round().to(torch.uint8)


def make_floats(n, size):
    return make_images(n, size).float() / 255


def assert_near(ours, theirs, bound):
    assert ours.shape == theirs.shape
    deviation = (ours - theirs).abs().max().item()
    assert deviation <= bound, f"{deviation * 255:.5f} / 255"


def torchvision_crop(image, box, size, interpolation):
    top, left, height, width = (int(side) for side in box)
    mode = MODES[interpolation]
    return TF.resized_crop(image, top, left, height, width, [size, size], mode).clamp(0, 1)


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("canvas, size", [(32, 32), (40, 32), (32, 64), (256, 224), (96, 20)])
def test_crop_equals_torchvision(canvas, size, interpolation):
    extremes = [[0, 0, canvas, canvas], [0, 0, 1, 1], [canvas - 1, canvas - 1, 1, 1],
                [3, 0, 1, canvas], [0, 5, canvas, 1], [1, 2, 2, 3], [0, 16, canvas, canvas - 16]]
    n = 4 if canvas > 96 else 40
    [(_, drawn)] = RandomResizedCrop(size).draw(make_images(n, canvas), torch.ones(n))
    boxes = torch.cat([torch.tensor(extremes).float(), drawn])
    x = make_floats(len(boxes), canvas)
    theirs = torch.stack([torchvision_crop(*pair, size, interpolation) for pair in zip(x, boxes)])
    assert_near(common.resized_crop(x, boxes, size, interpolation), theirs, 2e-5)


def torchvision_operation(name, image, value, kernel_size=3):
    if name == "gaussian_blur":
        return TF.gaussian_blur(image, [kernel_size] * 2, value.item()) if value > 0 else image
    if name == "solarize":
        return TF.solarize(image, value.item()) if value <= 1 else image
    if name == "horizontal_flip":
        return TF.horizontal_flip(image) if value else image
    if name == "normalize":
        return TF.normalize(image, *IMAGENET)
    return getattr(TF, name)(image, value.item())


FACTORS, SHIFTS = [0.0, 0.2, 0.6, 1.0, 1.3, 1.8], [-0.5, -0.2, -0.05, 0.0, 0.1, 0.33, 0.5]


@pytest.mark.parametrize("name, values, bound", [
    ("adjust_brightness", FACTORS, 1e-6), ("adjust_contrast", FACTORS, 1e-6),
    ("adjust_saturation", FACTORS, 1e-6), ("adjust_hue", SHIFTS, 5e-6),
    ("solarize", [0.1, 128 / 255, 0.9, 1.0], 1e-6), ("gaussian_blur 3", [0.1, 0.5, 2.0], 1e-6),
    ("gaussian_blur 9", [0.1, 1.0, 2.0], 1e-6), ("gaussian_blur 23", [0.1, 0.7, 2.0], 3e-6)])
def test_operation_equals_torchvision(name, values, bound):
    name, *kernel_size = name.split()
    kernel_size = [int(k) for k in kernel_size]
    x = make_floats(9 * len(values), 40)
    before, parameter = x.clone(), torch.tensor(values).repeat(9)
    ours = getattr(common, name)(x, parameter, *kernel_size)
    theirs = [torchvision_operation(name, *pair, *kernel_size) for pair in zip(x, parameter)]
    assert_near(ours, torch.stack(theirs), bound)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name, neutral, bound", [
    ("horizontal_flip", 0.0, 0), ("adjust_brightness", 1.0, 0), ("adjust_contrast", 1.0, 0),
    ("adjust_saturation", 1.0, 0), ("adjust_hue", 0.0, 1e-6), ("gaussian_blur", 0.0, 0),
    ("solarize", 2.0, 0)])
def test_neutral_parameters_change_nothing(name, neutral, bound):
    x = make_floats(12, 32)
    assert_near(getattr(common, name)(x, torch.full((12,), neutral)), x, bound)


def torchvision_view(image, steps, i):
    """Image i by the drawn steps."""
    x = image.float() / 255
    for function, *parameters in steps:
        name = getattr(function, "func", function).__name__
        if name == "resized_crop":
            x = torchvision_crop(x, parameters[0][i], **function.keywords)
        else:
            x = torchvision_operation(name, x, parameters[0][i] if parameters else None)
    return x


def test_chain_equals_torchvision():
    """Solarize jumps at its threshold, where rounding decides: for up to 1 value in 10,000."""
    images, augment = make_images(150, 40), Augment([*RECIPE, Normalize()])
    torch.manual_seed(1)
    views = augment(images)
    torch.manual_seed(1)
    steps = augment.draw(images, torch.ones(150))
    theirs = torch.stack([torchvision_view(image, steps, i) for i, image in enumerate(images)])
    deviation = (views - theirs).abs()
    assert (deviation > 1e-4).float().mean() < 1e-4
    assert views.dtype == torch.float32 and views.is_contiguous(memory_format=torch.channels_last)


def test_reseeding_repeats_and_chunks_do_not_matter(monkeypatch):
    images, augment, views = make_images(150, 32), Augment([*RECIPE, Normalize()]), []
    for chunk_pixels in (2**16, 2**16, 2**10, 2**20):
        monkeypatch.setattr(Augment, "chunk_pixels", chunk_pixels)
        torch.manual_seed(2)
        views.append(augment(images))
    assert torch.equal(views[0], views[1])
    assert_near(views[0], views[2], 1e-5)
    assert_near(views[0], views[3], 1e-5)
    assert not torch.equal(views[0], augment(images))


def assert_same_distribution(ours, theirs):
    """Kolmogorov and Smirnov's distance (0.05 at n = 4000: once in 10,000) and the ends."""
    ours, theirs = (torch.as_tensor(x).float().round(decimals=5) for x in (ours, theirs))
    points = torch.cat([ours, theirs])
    below = [torch.searchsorted(x.sort()[0], points, right=True) / len(x) for x in (ours, theirs)]
    assert_near(*below, 0.05)
    span = (points.max() - points.min()).item()
    assert_near(torch.stack(ours.aminmax()), torch.stack(theirs.aminmax()), 0.06 * span)


@pytest.mark.parametrize("canvas, aspect, scale", [
    (32, 1.0, (0.08, 1)), (64, 2.0, (0.2, 1)), (60, 0.4, (0.5, 0.6)), (8, 1.0, (0.002, 0.02))])
def test_boxes_are_distributed_as_torchvision_draws_them(canvas, aspect, scale):
    n, width = 4000, round(canvas * aspect)
    images = torch.empty(1, 3, canvas, canvas).expand(n, -1, -1, -1)
    [(_, boxes)] = RandomResizedCrop(32, scale).draw(images, torch.full((n,), aspect))
    boxes = boxes * torch.tensor([1, width / canvas, 1, width / canvas])
    assert_near(boxes, boxes.round(), 1e-4)
    ours, crop, theirs = boxes.round().T, v2.RandomResizedCrop(32, scale), []
    for _ in range(n):
        box = crop.make_params([torch.empty(3, canvas, width)])
        theirs.append([box["top"], box["left"], box["height"], box["width"]])
    theirs = torch.tensor(theirs).float().T
    for measure in (lambda top, left, height, width: height * width, lambda t, l, h, w: h / w,
                    lambda t, l, h, w: t, lambda t, l, h, w: l, lambda t, l, h, w: t + h,
                    lambda t, l, h, w: l + w):
        assert_same_distribution(measure(*ours), measure(*theirs))
    assert_near(ours.corrcoef().nan_to_num(), theirs.corrcoef().nan_to_num(), 0.08)
    assert ours[:2].min() >= 0
    assert (ours[0] + ours[2]).max() <= canvas and (ours[1] + ours[3]).max() <= width


@pytest.mark.parametrize("canvas, aspect", [(32, 1.0), (32, 3.0), (31, 4.0), (48, 0.25), (47, 0.3)])
def test_fallback_is_torchvisions(canvas, aspect):
    """An area of 1.5 images fits in no try."""
    images, width = torch.empty(3, 3, canvas, canvas), round(canvas * aspect)
    [(_, boxes)] = RandomResizedCrop(32, (1.5, 1.6)).draw(images, torch.full((3,), aspect))
    theirs = v2.RandomResizedCrop(32, (1.5, 1.6)).make_params([torch.empty(3, canvas, width)])
    theirs = torch.tensor([theirs[key] for key in ("top", "left", "height", "width")])
    assert_near(boxes[0] * torch.tensor([1, width / canvas] * 2), theirs.float(), 1e-4)


def test_other_parameters_are_distributed_as_torchvision_draws_them():
    n, images = 4000, torch.empty(4000, 3, 1, 1)
    jitter, theirs = ColorJitter(0.4, 0.5, 1.0, 0.1, p=0.8), v2.ColorJitter(0.4, 0.5, 1.0, 0.1)
    drawn = {function.__name__: values for function, values in jitter.draw(images, None)}
    params, touched = [theirs.make_params([]) for _ in range(n)], []
    for name in ("brightness", "contrast", "saturation", "hue"):
        values = drawn[f"adjust_{name}"]
        touched.append(values != (name != "hue"))
        assert_same_distribution(values[touched[-1]], [p[f"{name}_factor"] for p in params])
    assert all(torch.equal(touched[0], other) for other in touched[1:])  # p decides for all four
    strengths = torch.stack(list(drawn.values()))[:, touched[0]]
    assert_near(strengths.corrcoef(), torch.eye(4), 0.06)
    sigma = GaussianBlur(0.5, (0.1, 2.0)).draw(images, None)[0][1]
    params = [v2.GaussianBlur(3, (0.1, 2.0)).make_params([])["sigma"][0] for _ in range(n)]
    assert_same_distribution(sigma[sigma > 0], params)
    threshold = RandomSolarize(0.3, 0.4).draw(images, None)[0][1]
    assert set(threshold.tolist()) == {torch.tensor(0.4).item(), 2.0}
    for applied, p in ((touched[0], 0.8), (sigma > 0, 0.5), (threshold < 1, 0.3),
                       (RandomHorizontalFlip(0.4).draw(images, None)[0][1] == 1, 0.4),
                       (RandomGrayscale(0.2).draw(images, None)[0][1] == 0, 0.2)):
        assert abs(applied.float().mean() - p) < 0.03


def test_every_order_of_the_colour_operations_occurs():
    draws = [ColorJitter(1, 1, 1, 0.5).draw(torch.empty(1, 3, 1, 1), None) for _ in range(400)]
    orders = [tuple(function for function, _ in draw) for draw in draws]
    assert len(set(orders)) == 24 and max(map(orders.count, orders)) < 40


@pytest.mark.parametrize("size, kernel_size", [(32, 3), (96, 9), (224, 23)])
def test_default_kernel_is_a_tenth_of_the_width_made_odd(size, kernel_size):
    x, sigma = make_floats(3, size), torch.full((3,), 2.0)
    assert torch.equal(common.gaussian_blur(x, sigma), common.gaussian_blur(x, sigma, kernel_size))


@pytest.mark.parametrize("interpolation", MODES)
def test_crops_of_a_squashed_image_are_those_of_the_original(interpolation):
    """A smooth 2:1 image: 6/255 at most, at the edges of the crop, 0.5/255 in the mean."""
    original = 0.2 + 0.6 * F.interpolate(torch.rand(20, 3, 5, 8), (64, 128), mode="bicubic")
    squashed = TF.resize(original, [64, 64], antialias=True)
    crop = RandomResizedCrop(48, (0.2, 1), interpolation)
    [(function, boxes)] = crop.draw(squashed, torch.full((20,), 2.0))
    in_original = (boxes * torch.tensor([1, 2, 1, 2])).round()
    theirs = [torchvision_crop(*pair, 48, interpolation) for pair in zip(original, in_original)]
    ours, theirs = function(squashed, boxes), torch.stack(theirs)
    assert_near(ours, theirs, 6 / 255)
    assert (ours - theirs).abs().mean() < 0.5 / 255


def test_eval_view():
    mean, std = (torch.tensor(c)[:, None, None] for c in IMAGENET)
    small, large = make_images(8, 32), make_images(4, 256)
    assert torch.equal(eval_view(small, torch.ones(8), 32), (small.float() / 255 - mean) / std)
    center = large[:, :, 16:240, 16:240].float() / 255
    assert torch.equal(eval_view(large, None, 224), (center - mean) / std)
    for aspect, box in ((2.0, [0, 16, 64, 32]), (0.5, [16, 0, 32, 64])):  # half the squashed canvas
        x = make_images(4, 64)
        theirs = torch.stack([torchvision_crop(y.float() / 255, box, 48, "bilinear") for y in x])
        assert_near(eval_view(x, torch.full((4,), aspect), 48), (theirs - mean) / std, 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_cpu_and_never_waits():
    images, augment = make_images(64, 40), Augment([*RECIPE[:-1], Normalize()])
    device_images, device_aspect = images.cuda(), (torch.rand(64) + 0.5).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        Augment([*RECIPE, Normalize()])(device_images, device_aspect)
        view = eval_view(device_images, None, 32)
        steps = augment.draw(device_images, device_aspect)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert view.is_contiguous(memory_format=torch.channels_last)
    assert_near(view.cpu(), eval_view(images, None, 32), 1e-4)
    x, y = images.float() / 255, device_images.float() / 255
    for function, *parameters in steps:
        x = function(x, *(parameter.cpu() for parameter in parameters))
        y = function(y, *parameters)
    assert_near(y.cpu(), x, 1e-3)
