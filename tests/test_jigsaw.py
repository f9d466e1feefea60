"""Jigsaw against independent slow versions, and each of the details that are commonly wrong."""

import functools
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

import common
import jigsaw
import linear_probe
from jigsaw import (Jigsaw, augment, cut_tiles, jigsaw_loss, lay_out, normalize_tiles,
                    permutation_set, random_square, relative_pairs, shuffle, solved)


def slow_loss(logits, labels):
    """-log of the probability of the label, in Python floats."""
    total = 0.0
    for row, label in zip(logits, labels):
        total = total - torch.log(torch.exp(row[label]) / sum(torch.exp(v) for v in row))
    return total / len(labels)


def test_loss_and_gradient_equal_slow_version():
    logits = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 9, 3, 3, 5, 1])
    fast, slow = jigsaw_loss(logits, labels), slow_loss(logits, labels)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_loss_and_solved_at_chance_and_at_extremes():
    labels = torch.arange(100)
    assert jigsaw_loss(torch.ones(100, 100), labels).item() == pytest.approx(math.log(100))
    right = torch.eye(100) * 1e15
    assert jigsaw_loss(right, labels) == 0 and solved(right, labels) == 1
    assert jigsaw_loss(right.roll(1, 0), labels).isfinite()
    assert solved(right.roll(1, 0), labels) == 0


# ---- the set of permutations: far apart, and the same in all runs and after a resume


@functools.cache
def hundred():
    return permutation_set(100, 9, seed=0)


def distances(permutations):
    """Hamming distances of all pairs."""
    return [sum(a != b for a, b in zip(p, q))
            for p, q in itertools.combinations(permutations.tolist(), 2)]


def test_permutations_are_far_apart():
    chosen, generator = hundred(), torch.Generator().manual_seed(0)
    anyhow = torch.rand(100, 9, generator=generator).argsort(1)
    assert chosen.shape == (100, 9) and chosen.dtype == torch.int64
    assert torch.equal(chosen.sort(1).values, torch.arange(9).expand(100, 9))
    assert min(distances(chosen)) >= 6 and min(distances(anyhow)) <= 3
    assert sum(distances(chosen)) / 4950 > 8.05
    assert min(distances(permutation_set(9, 9, seed=1))) == 9  # a Latin square


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_permutation_is_the_farthest_from_those_before(seed):
    chosen = permutation_set(24, 4, seed)
    assert len(chosen.unique(dim=0)) == 24
    for n in range(1, 24):
        def far(permutation):
            distance = [sum(a != b for a, b in zip(permutation, c)) for c in chosen[:n].tolist()]
            return min(distance), sum(distance)

        assert far(chosen[n].tolist()) == max(map(far, itertools.permutations(range(4))))


def test_permutations_depend_on_the_seed_only():
    assert torch.equal(permutation_set(10, 9, 0), hundred()[:10])
    assert torch.equal(permutation_set(10, 5, 3), permutation_set(20, 5, 3)[:10])
    assert not torch.equal(permutation_set(10, 5, 3), permutation_set(10, 5, 4))
    with pytest.raises(ValueError, match="24 permutations, not 25"):
        permutation_set(25, 4, 0)


def test_permutations_are_part_of_the_checkpoint():
    old = Jigsaw(nn.Flatten(), 12, permutation_set(5, 4, seed=1), 3, 3)
    new = Jigsaw(nn.Flatten(), 12, permutation_set(5, 4, seed=2), 3, 3)
    assert not torch.equal(new.orders, old.orders)
    new.load_state_dict(old.state_dict())
    assert torch.equal(new.orders, old.orders)


# ---- tiles: gaps, normalised each by itself, and put where the order says


@pytest.mark.parametrize("size, grid, tile_size", [
    (32, 3, 8), (32, 3, 10), (32, 2, 14), (96, 3, 24), (224, 3, 63), (255, 3, 64)])
def test_tiles_equal_slow_version(size, grid, tile_size):
    images, offsets = torch.rand(3, 3, size, size), torch.rand(3, grid**2, 2)
    offsets[0], offsets[1] = 0, 1 - 2**-24  # the largest below 1
    tiles = cut_tiles(images, grid, tile_size, offsets)
    assert tiles.shape == (3, grid**2, 3, tile_size, tile_size)
    cell = size // grid
    margin = (size - cell * grid) // 2
    for i in range(3):
        for n in range(grid**2):
            down, right = (int(v * (cell - tile_size + 1)) for v in offsets[i, n].double())
            top, left = margin + n // grid * cell + down, margin + n % grid * cell + right
            assert down <= cell - tile_size and right <= cell - tile_size
            expected = images[i, :, top : top + tile_size, left : left + tile_size]
            assert torch.equal(tiles[i, n], expected)


def test_gaps_between_tiles_are_random():
    """Neighbours touch in one of 9 cases only at 32 pixels, so that edges seldom continue."""
    columns = torch.arange(32.0).expand(600, 3, 32, 32)
    tiles = cut_tiles(columns, 3, 8)
    gaps = (tiles[:, 1:3, 0, 0, 0] - tiles[:, :2, 0, 0, -1] - 1).flatten().int()
    counts = gaps.bincount() / len(gaps)
    assert counts.tolist() == pytest.approx([1 / 9, 2 / 9, 3 / 9, 2 / 9, 1 / 9], abs=0.05)
    assert len(tiles[:, 0, 0, 0, 0].unique()) == 3  # and each image has its own
    with pytest.raises(ValueError, match="do not fit"):
        cut_tiles(columns, 3, 11)


def test_a_tile_does_not_show_brightness_contrast_and_tint_of_its_place():
    tiles = torch.rand(2, 9, 3, 8, 8)
    once = normalize_tiles(tiles)
    torch.testing.assert_close(once.mean((3, 4)), torch.zeros(2, 9, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(once.std((3, 4), correction=0), torch.ones(2, 9, 3), atol=1e-3,
                               rtol=0)
    scale, offset = 1 + torch.rand(2, 2, 9, 3, 1, 1)
    torch.testing.assert_close(normalize_tiles(scale * tiles + offset), once, atol=2e-3, rtol=0)
    assert normalize_tiles(torch.ones(1, 9, 3, 8, 8)).abs().max() < 1e-3


def solved_after_training(normalize):
    """By a linear network on noise that gets brighter from place to place."""
    torch.manual_seed(0)
    model = Jigsaw(nn.Flatten(), 12, permutation_set(8, 9, seed=0), 8, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    right = []
    for _ in range(40):
        tiles = torch.randn(64, 9, 3, 2, 2) + torch.arange(9.0)[:, None, None, None]
        order = torch.randint(8, (64,))
        logits = model(normalize(shuffle(tiles, model.orders[order])))
        optimizer.zero_grad()
        jigsaw_loss(logits, order).backward()
        optimizer.step()
        right.append(solved(logits, order))
    return torch.stack(right[-10:]).mean().item()


def test_brightness_is_a_shortcut_without_normalisation():
    assert solved_after_training(nn.Identity()) > 0.9
    assert solved_after_training(normalize_tiles) < 0.25  # chance is 1/8


def test_colours_are_dropped_in_whole_images():
    images = torch.randint(256, (400, 3, 32, 32), dtype=torch.uint8)
    for gray, low, high in ((0, 0, 0), (0.3, 0.2, 0.4), (1, 1, 1)):
        views = common.denormalize(augment(images, torch.ones(400), 32, 1.0, gray, 0.0))
        colourless = (views - views.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-3
        assert low <= colourless.float().mean() <= high


def test_square_is_the_largest_and_anywhere_along_the_longer_side():
    across = (torch.arange(60.0).expand(200, 3, 60, 60) * 4).byte()  # brighter to the right
    for aspect, height, width in ((1.0, 60, 60), (2.0, 60, 30), (0.5, 30, 60)):
        aspect = torch.full((200,), aspect)
        for images, side in (across, width), (across.mT, height):
            x = random_square(images, aspect, 30)[:, 0] * 255 / 4  # the column or row of a pixel
            x = x if images is across else x.mT
            first, last = x[:, 0, 0], x[:, 0, -1]
            torch.testing.assert_close(last - first, torch.full((200,), side * 29 / 30), atol=0.6,
                                       rtol=0)
            room = 60 - side
            assert first.min() < 1 + 0.05 * room and abs(first.max() - room) < 1.5 + 0.05 * room


def test_shuffled_tiles_laid_out_by_their_order_are_the_image():
    image = torch.rand(4, 3, 24, 24)
    tiles, orders = cut_tiles(image, 3, 8), hundred()[10:14]
    shuffled = shuffle(tiles, orders)
    for i, n in itertools.product(range(4), range(9)):
        assert torch.equal(shuffled[i, n], tiles[i, orders[i, n]])
    picture = lay_out(shuffled, orders)
    assert torch.equal(picture, lay_out(tiles, torch.arange(9)))
    assert picture.shape == (4, 3, 30, 30)
    inside = picture.unflatten(3, (3, 10))[..., 1:-1].flatten(3)
    inside = inside.unflatten(2, (3, 10))[:, :, :, 1:-1].flatten(2, 3)
    assert torch.equal(inside, image)
    assert (picture[:, :, [0, 9, 10, 29]] == 1).all() and (picture[..., [0, 9, 10, 29]] == 1).all()


def test_crops_and_negatives():
    images = torch.full((400, 3, 32, 32), 51, dtype=torch.uint8)  # 0.2; negative 0.8
    for invert, low, high in ((0.0, 0, 0), (0.5, 0.4, 0.6), (1.0, 1, 1)):
        views = common.denormalize(augment(images, torch.ones(400), 32, 1.0, 0.0, invert))
        negative = (views - 0.8).abs().amax((1, 2, 3)) < 1e-3
        assert low <= negative.float().mean() <= high
    images = torch.arange(64, dtype=torch.uint8).expand(100, 3, 64, 64)
    for crop_scale, low, high in ((1.0, 61, 64), (0.3, 0, 60)):  # what a view spans
        views = augment(images, torch.ones(100), 32, crop_scale, 0.0, 0.0)
        spans = common.denormalize(views).flatten(1) * 255
        assert low <= (spans.amax(1) - spans.amin(1)).mean() <= high
    assert jigsaw.RECIPES["invert"][1:] == (0, 0, 0) and jigsaw.RECIPES["crop_scale"][-1] == 1


def grid_strength(crop_scale, size):
    """By what fraction steps between pixels at the borders of a JPEG's blocks are larger, in views
    of files of 32 pixels, than in views of the same images never compressed."""
    smooth = F.interpolate(torch.rand(400, 3, 4, 4), size=32, mode="bilinear") * 255
    images = (smooth + 20 * torch.randn(400, 3, 32, 32)).clamp(0, 255).to(torch.uint8)
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files):
        to_pil_image(image).save(file, "JPEG", quality=60)
    ratios, block = [], 8 * size // 32
    for pixels in torch.stack([pil_to_tensor(Image.open(file)) for file in files]), images:
        steps = augment(pixels, torch.ones(400), size, crop_scale, 0.0, 0.0).diff(dim=3).abs()
        ratios.append(steps[..., block - 1 :: block].mean() / steps.mean())
    return (ratios[0] / ratios[1]).item() - 1


def test_small_images_are_cropped_to_hide_the_grid_of_jpeg():
    small = {pair for pair in zip(jigsaw.RECIPES["crop_scale"], jigsaw.RECIPES["image_size"])
             if pair[1] <= 64}
    assert {size for _, size in small} == {32, 64}
    for crop_scale, size in small:
        assert grid_strength(1.0, size) > 0.12
        assert grid_strength(crop_scale, size) < 0.8 * grid_strength(1.0, size)


# ---- model


def test_backbone_is_shared_by_all_tiles_and_does_not_know_their_place():
    backbone = common.make_backbone("resnet8", 32)
    model = Jigsaw(backbone, backbone.feature_dim, hundred(), 20, 30).eval()
    seen = []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tiles = torch.randn(2, 9, 3, 8, 8)
    assert model(tiles).shape == (2, 100)
    order = torch.randperm(9)
    model(tiles[:, order])
    first, second = (x.unflatten(1, (9, 20)) for x in seen)
    torch.testing.assert_close(second, first[:, order], rtol=1e-5, atol=1e-5)
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, backbone.feature_dim)  # whole images


def test_head_can_compare_tiles():
    """Without a hidden layer the logits would be sums over tiles, which cannot see relations."""
    model = Jigsaw(nn.Flatten(), 12, relative_pairs(), 16, 16).eval().double()
    a, b, c, d = torch.randn(4, 1, 3, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        ac, ad, bc, bd = (model(torch.stack([x, y], 1)) for x in (a, b) for y in (c, d))
    assert (ac - ad - bc + bd).abs().max() > 1e-4


def test_relative_task_is_eight_neighbours_of_the_middle():
    pairs = relative_pairs().tolist()
    assert [p[0] for p in pairs] == [4] * 8
    assert [p[1] for p in pairs] == [0, 1, 2, 3, 5, 6, 7, 8]


@pytest.fixture
def trained(class_folders, monkeypatch):
    """trained(*flags) -> the model of a short run, the arguments of cut_tiles and of the loss."""
    models, cuts, losses = [], [], []
    cut, loss = jigsaw.cut_tiles, jigsaw.jigsaw_loss
    monkeypatch.setattr(linear_probe, "evaluate", lambda *a, **k: {})
    monkeypatch.setattr(jigsaw, "cut_tiles", lambda *a: (cuts.append(a), cut(*a))[1])
    monkeypatch.setattr(jigsaw, "jigsaw_loss", lambda *a: (losses.append(a), loss(*a))[1])
    monkeypatch.setattr(jigsaw, "Jigsaw", lambda *a: (models.append(Jigsaw(*a)), models[-1])[1])

    def run(*flags):
        jigsaw.train(jigsaw.parse_args([
            *"--data images --recipe demo -b 8 --epochs 1 --workers 0 --out run".split(), *flags]))
        return models[-1], cuts, losses

    return run


@pytest.mark.parametrize("task, count, tiles", [("jigsaw", 30, 9), ("relative", 8, 2)])
def test_training(trained, task, count, tiles):
    model, cuts, losses = trained("--task", task, "--permutations", "30", "--seed", "5")
    orders = permutation_set(30, 9, seed=0) if tiles == 9 else relative_pairs()
    assert torch.equal(model.orders, orders)  # whatever the --seed
    saved = torch.load("run/checkpoint.pth", weights_only=True)["model"]
    assert torch.equal(saved["orders"], orders)
    assert len(losses) == 3 and len(cuts) == 4  # the first for the pictures
    for images, grid, tile_size, offsets in cuts:
        assert images.shape[1:] == (3, 32, 32) and (grid, tile_size) == (3, 8)
        assert offsets.numel() == 18 * len(images) == len(offsets.unique())
        assert 0 <= offsets.min() and offsets.max() < 1
    for logits, labels in losses:
        assert logits.shape == (8, count) and len(labels.unique()) > 2
        assert logits.dtype == torch.float32
    for name, columns in (("views.png", 3), ("puzzles.png", 2)):
        with Image.open(f"run/{name}") as picture:
            assert picture.width > columns * 128
            assert len(picture.convert("RGB").getcolors(2**20)) > 99


def test_backbone_ends_with_the_statistics_of_whole_images(trained):
    model, _, _ = trained()
    whole, _ = common.load_data("images", 32)
    saved = torch.load("run/backbone.pth", weights_only=True)
    backbone = common.make_backbone("resnet8", 32)
    backbone.load_state_dict(saved)
    linear_probe.calibrate_batch_norm(backbone, whole, 32, torch.device("cpu"))
    assert all(torch.equal(saved[name], value) for name, value in backbone.state_dict().items())
    again = torch.load("run/checkpoint.pth", weights_only=True)["model"]
    assert all(torch.equal(saved[name], again[f"backbone.{name}"]) for name in saved)


def test_flags_that_do_not_fit_are_errors(capsys):
    for flags in (["--tile-size", "11"], ["--image-size", "16"], ["--permutations", "1"]):
        with pytest.raises(SystemExit) as end:
            jigsaw.parse_args(flags)
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_rate_falls_at_the_epochs_of_vissl():
    args = jigsaw.parse_args(["--recipe", "imagenet"])

    def rate(epoch, steps=5004):
        return jigsaw.stepwise(epoch * steps, args.epochs * steps, args.warmup_epochs * steps,
                               args.lr, args.lr_drops, args.lr_factor)

    for epoch, lr in ((5, 0.1), (29, 0.1), (30, 0.01), (59, 0.01), (60, 1e-3), (89, 1e-3),
                      (90, 1e-4), (99, 1e-4), (100, 1e-5)):
        assert rate(epoch) == pytest.approx(lr)
    assert rate(0) == pytest.approx(0.1 / (5 * 5004))
