"""Jigsaw against independent slow versions, and each of the details that are commonly wrong."""

import functools
import io
import itertools
import math
from types import SimpleNamespace

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
                    permutation_set, random_puzzles, random_square, relative_pairs, shuffle, solved)

# ---- loss


def slow_loss(logits, labels):
    """-log of the label's probability, row by row."""
    total = 0.0
    for row, label in zip(logits, labels):
        scores = row.exp()
        total = total - (scores[label] / scores.sum()).log()
    return total / len(labels)


def test_loss_and_gradient_equal_slow_version():
    logits = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 9, 3, 3, 5, 1])
    fast = jigsaw_loss(logits, labels)
    slow = slow_loss(logits, labels)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    (fast_gradient,) = torch.autograd.grad(fast, logits)
    (slow_gradient,) = torch.autograd.grad(slow, logits)
    torch.testing.assert_close(fast_gradient, slow_gradient, rtol=1e-10, atol=1e-12)


def test_loss_and_solved_at_chance_and_at_extremes():
    labels = torch.arange(100)
    assert jigsaw_loss(torch.ones(100, 100), labels).item() == pytest.approx(math.log(100))
    right = torch.eye(100) * 1e15
    wrong = right.roll(1, 0)
    assert jigsaw_loss(right, labels) == 0
    assert jigsaw_loss(wrong, labels).isfinite()
    assert solved(right, labels) == 1
    assert solved(wrong, labels) == 0


# ---- the set of permutations: far apart, and the same in all runs and after a resume


@functools.cache
def hundred():
    return permutation_set(100, 9, seed=0)


def hamming(p, q):
    return sum(a != b for a, b in zip(p, q))


def distances(permutations):
    """Of all pairs."""
    return [hamming(p, q) for p, q in itertools.combinations(permutations.tolist(), 2)]


def test_permutations_are_far_apart():
    chosen = hundred()
    assert chosen.shape == (100, 9)
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen.sort(1).values, torch.arange(9).expand(100, 9))
    assert min(distances(chosen)) >= 6
    assert sum(distances(chosen)) / 4950 > 8.05
    random = torch.rand(100, 9).argsort(1)
    assert min(distances(random)) <= 3
    assert min(distances(permutation_set(9, 9, seed=1))) == 9  # a Latin square


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_permutation_is_the_farthest_from_those_before(seed):
    chosen = permutation_set(24, 4, seed)
    assert len(chosen.unique(dim=0)) == 24
    for n in range(1, 24):
        before = chosen[:n].tolist()

        def distance(permutation):
            distances = [hamming(permutation, other) for other in before]
            return min(distances), sum(distances)

        farthest = max(distance(p) for p in itertools.permutations(range(4)))
        assert distance(chosen[n].tolist()) == farthest


def test_permutations_depend_on_the_seed_only():
    assert torch.equal(permutation_set(10, 9, 0), hundred()[:10])
    assert torch.equal(permutation_set(10, 5, 3), permutation_set(20, 5, 3)[:10])
    assert not torch.equal(permutation_set(10, 5, 3), permutation_set(10, 5, 4))


def test_permutations_are_those_of_the_kept_runs():
    assert hundred()[0].tolist() == [5, 1, 4, 2, 0, 8, 7, 6, 3]
    assert hundred()[1].tolist() == [3, 7, 2, 6, 1, 5, 0, 8, 4]
    assert hundred()[-1].tolist() == [8, 7, 0, 2, 5, 6, 1, 3, 4]


def test_more_permutations_than_there_are():
    with pytest.raises(ValueError, match="24 permutations, not 25"):
        permutation_set(25, 4, 0)


def test_permutations_are_part_of_the_checkpoint():
    old = Jigsaw(nn.Flatten(), 12, permutation_set(5, 4, seed=1), 3, 3)
    new = Jigsaw(nn.Flatten(), 12, permutation_set(5, 4, seed=2), 3, 3)
    assert not torch.equal(new.orders, old.orders)
    new.load_state_dict(old.state_dict())
    assert torch.equal(new.orders, old.orders)


def test_relative_task_is_eight_neighbours_of_the_middle():
    assert relative_pairs().tolist() == [[4, 0], [4, 1], [4, 2], [4, 3],
                                         [4, 5], [4, 6], [4, 7], [4, 8]]


# ---- tiles: with gaps, each normalized by itself, and put where the order says


@pytest.mark.parametrize("size, grid, tile_size", [
    (32, 3, 8), (32, 3, 10), (32, 2, 14), (96, 3, 24), (224, 3, 63), (255, 3, 64)])
def test_tiles_equal_slow_version(size, grid, tile_size):
    images = torch.rand(3, 3, size, size)
    offsets = torch.rand(3, grid**2, 2)
    offsets[0] = 0
    offsets[1] = 1 - 2**-24  # the largest below 1
    tiles = cut_tiles(images, grid, tile_size, offsets)
    assert tiles.shape == (3, grid**2, 3, tile_size, tile_size)
    cell = size // grid
    room = cell - tile_size
    margin = (size - cell * grid) // 2
    for i in range(3):
        for row in range(grid):
            for column in range(grid):
                n = row * grid + column
                down, right = [int(offset * (room + 1)) for offset in offsets[i, n].tolist()]
                assert 0 <= down <= room and 0 <= right <= room
                top = margin + row * cell + down
                left = margin + column * cell + right
                expected = images[i, :, top : top + tile_size, left : left + tile_size]
                assert torch.equal(tiles[i, n], expected)


def test_gaps_between_tiles_are_random():
    """Neighbours touch in one of 9 cases only at 32 pixels, so that edges seldom continue."""
    columns = torch.arange(32.0).expand(600, 3, 32, 32)
    tiles = cut_tiles(columns, 3, 8)
    first_column = tiles[:, :3, 0, 0, 0]
    last_column = tiles[:, :3, 0, 0, -1]
    gaps = (first_column[:, 1:] - last_column[:, :-1] - 1).int()
    frequencies = gaps.flatten().bincount() / gaps.numel()
    assert frequencies.tolist() == pytest.approx([1 / 9, 2 / 9, 3 / 9, 2 / 9, 1 / 9], abs=0.05)
    assert len(first_column[:, 0].unique()) == 3  # each image has its own


def test_tiles_larger_than_cells_are_refused():
    with pytest.raises(ValueError, match="tiles of 11 pixels do not fit 3 times into 32"):
        cut_tiles(torch.zeros(1, 3, 32, 32), 3, 11)


def test_a_tile_does_not_show_brightness_contrast_and_tint_of_its_place():
    tiles = torch.rand(2, 9, 3, 8, 8)
    normalized = normalize_tiles(tiles)
    mean = normalized.mean((3, 4))
    std = normalized.std((3, 4), correction=0)
    torch.testing.assert_close(mean, torch.zeros(2, 9, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(2, 9, 3), atol=1e-3, rtol=0)
    scale = 1 + torch.rand(2, 9, 3, 1, 1)
    offset = torch.rand(2, 9, 3, 1, 1)
    changed = normalize_tiles(scale * tiles + offset)
    torch.testing.assert_close(changed, normalized, atol=2e-3, rtol=0)
    assert normalize_tiles(torch.ones(1, 9, 3, 8, 8)).abs().max() < 1e-3


def solved_after_training(normalize):
    """By a linear network on noise that gets brighter from place to place."""
    torch.manual_seed(0)
    model = Jigsaw(nn.Flatten(), 12, permutation_set(8, 9, seed=0), 8, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = []
    for _ in range(40):
        tiles = torch.randn(64, 9, 3, 2, 2) + torch.arange(9.0)[:, None, None, None]
        order = torch.randint(8, (64,))
        logits = model(normalize(shuffle(tiles, model.orders[order])))
        optimizer.zero_grad()
        jigsaw_loss(logits, order).backward()
        optimizer.step()
        found.append(solved(logits, order))
    return torch.stack(found[-10:]).mean().item()


def test_brightness_is_a_shortcut_without_normalisation():
    assert solved_after_training(nn.Identity()) > 0.9
    assert solved_after_training(normalize_tiles) < 0.25  # chance is 1/8


def test_shuffled_tiles_laid_out_by_their_order_are_the_image():
    images = torch.rand(4, 3, 24, 24)
    tiles = cut_tiles(images, 3, 8)
    places = hundred()[10:14]
    shuffled = shuffle(tiles, places)
    for i in range(4):
        for n in range(9):
            assert torch.equal(shuffled[i, n], tiles[i, places[i, n]])
    picture = lay_out(shuffled, places)
    assert torch.equal(picture, lay_out(tiles, torch.arange(9)))
    for row in range(3):
        for column in range(3):
            rows = slice(2 + 10 * row, 10 + 10 * row)  # with white of two pixels around
            columns = slice(2 + 10 * column, 10 + 10 * column)
            cell = images[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert torch.equal(picture[..., rows, columns], cell)


def test_relative_tiles_are_laid_out_on_white():
    tiles = torch.zeros(1, 2, 3, 8, 8)
    picture = lay_out(tiles, torch.tensor([[4, 2]]))  # middle, top right
    assert (picture == 0).sum() == 2 * 3 * 8 * 8
    assert (picture[..., 12:20, 12:20] == 0).all()
    assert (picture[..., 2:10, 22:30] == 0).all()


# ---- augmentation


FLIP_GRAY_AND_INVERT = [("random_horizontal_flip", {"p": 0.5}),
                        ("random_grayscale", {"p": 0.66}),
                        ("random_solarize", {"p": 0.25, "threshold": 0.0}),
                        ("normalize", {})]


@pytest.mark.parametrize("crop_scale, expected", [
    (1.0, FLIP_GRAY_AND_INVERT),
    (0.5, [("random_resized_crop", {"size": 72, "scale": (0.5, 1.0)}), *FLIP_GRAY_AND_INVERT])])
def test_operations_and_their_order(operations, crop_scale, expected):
    images = torch.zeros(2, 3, 80, 80, dtype=torch.uint8)
    views = augment(images, torch.ones(2), 72, crop_scale, gray=0.66, invert=0.25)
    assert views.shape == (2, 3, 72, 72)
    assert operations == expected


@pytest.mark.parametrize("crop_scale, low, high", [(1.0, 61, 64), (0.3, 0, 60)])
def test_crops_are_as_small_as_crop_scale_allows(crop_scale, low, high):
    images = torch.arange(64, dtype=torch.uint8).expand(100, 3, 64, 64)  # brighter to the right
    views = augment(images, torch.ones(100), 32, crop_scale, 0.0, 0.0)
    values = common.denormalize(views).flatten(1) * 255
    spans = values.amax(1) - values.amin(1)
    assert low <= spans.mean() <= high


def test_only_the_demonstration_is_inverted_and_imagenet_is_not_cropped():
    assert jigsaw.RECIPES["invert"] == (0.5, 0, 0, 0)
    assert jigsaw.RECIPES["crop_scale"][-1] == 1


@pytest.mark.parametrize("aspect, height, width", [(1.0, 60, 60), (2.0, 60, 30), (0.5, 30, 60)])
def test_square_is_the_largest_and_anywhere_along_the_longer_side(aspect, height, width):
    aspects = torch.full((200,), aspect)
    rising = (torch.arange(60.0) * 4).byte()  # brighter by 4 from pixel to pixel
    to_the_right = rising.expand(200, 3, 60, 60)
    downwards = to_the_right.mT
    columns = random_square(to_the_right, aspects, 30)[:, 0, 0, :] * 255 / 4  # as on the canvas
    rows = random_square(downwards, aspects, 30)[:, 0, :, 0] * 255 / 4
    for pixels, side in (columns, width), (rows, height):
        first = pixels[:, 0]
        last = pixels[:, -1]
        expected = torch.full((200,), side * 29 / 30)
        torch.testing.assert_close(last - first, expected, atol=0.6, rtol=0)
        room = 60 - side
        assert first.min() < 1 + 0.05 * room
        assert abs(first.max() - room) < 1.5 + 0.05 * room


def compressed(image):
    """A uint8 image (3, S, S), after JPEG."""
    file = io.BytesIO()
    to_pil_image(image).save(file, "JPEG", quality=60)
    return pil_to_tensor(Image.open(file))


def grid_strength(crop_scale, size):
    """By what fraction steps between pixels at the borders of a JPEG's blocks are larger, in views
    of files of 32 pixels, than in views of the same images never compressed."""
    smooth = F.interpolate(torch.rand(400, 3, 4, 4), size=32, mode="bilinear") * 255
    images = (smooth + 20 * torch.randn(400, 3, 32, 32)).clamp(0, 255).to(torch.uint8)
    files = torch.stack([compressed(image) for image in images])
    block = 8 * size // 32
    ratios = []
    for pixels in files, images:
        views = augment(pixels, torch.ones(400), size, crop_scale, 0.0, 0.0)
        steps = views.diff(dim=3).abs()
        ratios.append(steps[..., block - 1 :: block].mean() / steps.mean())
    return (ratios[0] / ratios[1]).item() - 1


@pytest.mark.parametrize("recipe, size", [("cpu", 64), ("cifar", 32)])
def test_small_images_are_cropped_to_hide_the_grid_of_jpeg(recipe, size):
    args = jigsaw.parse_args(["--recipe", recipe])
    assert args.image_size == size
    uncropped = grid_strength(1.0, size)
    assert uncropped > 0.12
    assert grid_strength(args.crop_scale, size) < 0.8 * uncropped


# ---- model


def test_backbone_is_shared_by_all_tiles_and_does_not_know_their_place():
    backbone = common.make_backbone("resnet8", 32)
    model = Jigsaw(backbone, backbone.feature_dim, hundred(), 20, 30).eval()
    embedded = []

    def record(module, inputs):
        embedded.append(inputs[0].unflatten(1, (9, 20)))

    model.head.register_forward_pre_hook(record)
    tiles = torch.randn(2, 9, 3, 8, 8)
    order = torch.randperm(9)
    assert model(tiles).shape == (2, 100)
    model(tiles[:, order])
    torch.testing.assert_close(embedded[1], embedded[0][:, order], rtol=1e-5, atol=1e-5)
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, backbone.feature_dim)  # whole images


def test_head_can_compare_tiles():
    """Without a hidden layer the logits would be sums over tiles, which cannot see relations."""
    model = Jigsaw(nn.Flatten(), 12, relative_pairs(), 16, 16).eval().double()
    a, b, c, d = torch.randn(4, 1, 3, 2, 2, dtype=torch.float64)

    def logits(first, second):
        return model(torch.stack([first, second], 1))

    with torch.no_grad():
        difference = (logits(a, c) - logits(a, d)) - (logits(b, c) - logits(b, d))
    assert difference.abs().max() > 1e-4


# ---- training


@pytest.fixture
def short_run(class_folders, no_report, monkeypatch):
    """short_run(*flags) trains for three steps -> models: those that were made; cuts: what
    `cut_tiles` is given; normalized: the tiles that `normalize_tiles` returns; inputs: the tiles
    that the network is given; losses: what the loss is given; knn: the options of `quick_knn`;
    reports: those of the evaluation."""
    seen = SimpleNamespace(models=[], cuts=[], normalized=[], inputs=[], losses=[], knn=[],
                           reports=[])
    init = Jigsaw.__init__
    forward = Jigsaw.forward
    quick_knn = linear_probe.quick_knn

    def recorded_init(model, *args):
        seen.models.append(model)
        init(model, *args)

    def recorded_cut(*args):
        seen.cuts.append(args)
        return cut_tiles(*args)

    def recorded_normalize(tiles):
        seen.normalized.append(normalize_tiles(tiles))
        return seen.normalized[-1]

    def recorded_forward(model, tiles):
        seen.inputs.append(tiles)
        return forward(model, tiles)

    def recorded_loss(*args):
        seen.losses.append(args)
        return jigsaw_loss(*args)

    def recorded_knn(*args, **options):
        seen.knn.append(options)
        return quick_knn(*args, **options)

    def recorded_evaluate(*args, **options):
        seen.reports.append(options)
        return {}

    monkeypatch.setattr(Jigsaw, "__init__", recorded_init)
    monkeypatch.setattr(Jigsaw, "forward", recorded_forward)
    monkeypatch.setattr(jigsaw, "cut_tiles", recorded_cut)
    monkeypatch.setattr(jigsaw, "normalize_tiles", recorded_normalize)
    monkeypatch.setattr(jigsaw, "jigsaw_loss", recorded_loss)
    monkeypatch.setattr(linear_probe, "quick_knn", recorded_knn)
    monkeypatch.setattr(linear_probe, "evaluate", recorded_evaluate)

    def run(*flags):
        always = "--data images --recipe demo -b 8 --epochs 1 --workers 0 --out run".split()
        jigsaw.train(jigsaw.parse_args([*always, *flags]))
        return seen

    return run


@pytest.mark.parametrize("task, count, tiles", [("jigsaw", 30, 9), ("relative", 8, 2)])
def test_training(short_run, task, count, tiles):
    seen = short_run("--task", task, "--seed", "5")
    orders = relative_pairs() if task == "relative" else permutation_set(30, 9, seed=0)
    (model,) = seen.models
    assert torch.equal(model.orders, orders)  # whatever the --seed
    saved = torch.load("run/checkpoint.pth", weights_only=True)["model"]
    assert torch.equal(saved["orders"], orders)

    assert len(seen.cuts) == 4  # the first is for the pictures
    for images, grid, tile_size, offsets in seen.cuts:
        assert images.shape[1:] == (3, 32, 32)
        assert (grid, tile_size) == (3, 8)
        assert len(offsets.unique()) == len(images) * 9 * 2  # of each tile of each image its own
        assert 0 <= offsets.min() and offsets.max() < 1
    assert len(seen.inputs) == 4  # the last is for the pictures
    for normalized, given in zip(seen.normalized, seen.inputs, strict=True):
        assert given is normalized
        assert given.shape[1:] == (tiles, 3, 8, 8)
    assert len(seen.losses) == 3
    for logits, labels in seen.losses:
        assert logits.shape == (8, count)
        assert len(labels.unique()) > 2
    assert seen.knn == [{"calibrate": True}, {"calibrate": True}]  # untrained, trained
    assert seen.reports == [{"layers": True}]


@pytest.mark.parametrize("task", ["jigsaw", "relative"])
def test_labels_name_the_order_of_the_tiles(short_run, monkeypatch, task):
    """With tiles that show the number of their place."""
    def numbered(images, grid, tile_size, offsets):
        places = torch.arange(9.0)[:, None, None, None]
        return places.expand(len(images), 9, 3, tile_size, tile_size)

    monkeypatch.setattr(jigsaw, "cut_tiles", numbered)
    monkeypatch.setattr(jigsaw, "normalize_tiles", lambda tiles: tiles)
    seen = short_run("--task", task)
    (model,) = seen.models
    for tiles, (_, order) in zip(seen.inputs, seen.losses):
        assert torch.equal(tiles[:, :, 0, 0, 0].long(), model.orders[order])


def test_all_orders_are_drawn():
    images = torch.zeros(400, 3, 30, 30)
    _, labels = random_puzzles(images, torch.ones(400), lambda images, aspect: images,
                               relative_pairs(), 8)
    assert labels.max() == 7
    assert labels.bincount(minlength=8).min() > 20


def test_pictures(short_run):
    short_run()
    for name in "views.png", "puzzles.png":
        with Image.open(f"run/{name}") as picture:
            assert picture.width > 3 * 128  # columns: image, shuffled, in order
            assert len(picture.convert("RGB").getcolors(2**20)) > 99


def test_backbone_ends_with_the_statistics_of_whole_images(short_run):
    short_run()
    device = torch.device("cpu")
    args = jigsaw.parse_args(["--data", "images", "--recipe", "demo"])
    whole, _ = common.load_data(args, device)
    saved = torch.load("run/backbone.pth", weights_only=True)
    backbone = common.make_backbone("resnet8", 32)
    backbone.load_state_dict(saved)
    linear_probe.calibrate_batch_norm(backbone, whole, 32, device)
    for name, value in backbone.state_dict().items():
        assert torch.equal(saved[name], value)
    checkpoint = torch.load("run/checkpoint.pth", weights_only=True)["model"]
    for name, value in saved.items():
        assert torch.equal(checkpoint[f"backbone.{name}"], value)


def test_optimizer_is_sgd_that_decays_all_parameters():
    model = Jigsaw(nn.Flatten(), 12, relative_pairs(), 4, 4)
    (group,) = jigsaw.make_optimizer(model, 5e-4).param_groups
    assert group["momentum"] == 0.9
    assert group["weight_decay"] == 5e-4
    assert len(group["params"]) == len(list(model.parameters()))


def test_rate_falls_at_the_epochs_of_vissl():
    args = jigsaw.parse_args(["--recipe", "imagenet"])
    steps_per_epoch = 5004

    def rate(epoch):
        return jigsaw.stepwise_schedule(epoch * steps_per_epoch, args.epochs * steps_per_epoch,
                               args.warmup_epochs * steps_per_epoch, args.lr, args.lr_drops,
                               args.lr_factor)

    assert rate(0) == pytest.approx(0.1 / (5 * steps_per_epoch))
    for first, last, lr in ((5, 29, 0.1), (30, 59, 0.01), (60, 89, 1e-3), (90, 99, 1e-4),
                            (100, 104, 1e-5)):
        assert rate(first) == pytest.approx(lr)
        assert rate(last) == pytest.approx(lr)


@pytest.mark.parametrize("flags, words", [
    ("--image-size 32 --tile-size 11", "--tile-size 11 is more than a third of --image-size 32"),
    ("--permutations 0", "--permutations 0: nine tiles have 362880"),
    ("--permutations 362881", "--permutations 362881: nine tiles have 362880")])
def test_puzzles_that_cannot_be_made_are_refused(flags, words, refusal):
    assert words in refusal(jigsaw.parse_args, flags.split())
