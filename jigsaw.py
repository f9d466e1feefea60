"""Jigsaw: the nine tiles of an image are shuffled; in which order are they?

Noroozi & Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles" (2016,
arXiv 1603.09246). With --task relative: on which of its eight sides is this tile's neighbour?
Doersch et al., "Unsupervised Visual Representation Learning by Context Prediction" (2015,
arXiv 1505.05192). Survey family: context-based pretext task. What prevents collapse: the labels.

An image is cut into 3 x 3 tiles, which are shuffled into one of a fixed set of orders. The backbone
sees each tile by itself; a head that sees the features of all nine has to say which order it is. To
know that an ear belongs above an eye, the backbone has to recognise the parts of objects.

                    ┌─ tile ─ backbone ─ features ─ embed ─┐
        image ──────┼─ tile ─ backbone ─ features ─ embed ─┼─ concatenated ─ head ─ which order?
          cut and   └─ tile ─ backbone ─ features ─ embed ─┘
          shuffled            (shared)  └─ what is kept: the backbone, used on whole images

Run      python jigsaw.py                       demonstration: drawn images, CPU, minutes
         python jigsaw.py --data path           a folder of images, or cifar10
         torchrun --nproc-per-node=8 jigsaw.py --data path
Reuse    from jigsaw import Jigsaw, permutation_set, cut_tiles, jigsaw_loss     (needs torch only)
"""

import copy
import math
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


class Jigsaw(nn.Module):
    """Backbone on each tile, and a head on all tiles of an image.

    backbone: (B, 3, H, W) -> (B, feature_dim). orders (P, N): the set of P orders of N tiles that
    the head tells apart. It is a buffer, so that it is saved with the weights that learned it.
    """

    def __init__(self, backbone, feature_dim, orders, tile_dim=1000, hidden_dim=4096):
        super().__init__()
        self.backbone = backbone
        self.register_buffer("orders", orders)
        num_orders, num_tiles = orders.shape
        self.embed = nn.Sequential(nn.Linear(feature_dim, tile_dim, bias=False),
                                   nn.BatchNorm1d(tile_dim), nn.ReLU(inplace=True))
        self.head = nn.Sequential(nn.Linear(num_tiles * tile_dim, hidden_dim, bias=False),
                                  nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True),
                                  nn.Linear(hidden_dim, num_orders))

    def forward(self, tiles):
        """(B, N, 3, t, t) -> logits (B, P). Backbone and embedding treat all tiles alike; only by
        its position in the concatenation does the head know where a tile has been put."""
        embedded = self.embed(self.backbone(tiles.flatten(0, 1)))
        return self.head(embedded.unflatten(0, tiles.shape[:2]).flatten(1))


def permutation_set(count, tiles, seed):
    """Permutations of the tiles that differ in many places -> (count, tiles), int64.

    Orders that differ in two tiles only, which perhaps both show sky, nobody could tell apart. The
    seed chooses the first; each next one is, of all, the one that differs in the most places
    (Hamming distance) from the nearest chosen so far, and of equals, from all chosen, in the sum.
    """
    if not 1 <= count <= math.factorial(tiles):
        raise ValueError(f"{tiles} tiles have {math.factorial(tiles)} permutations, not {count}")
    generator = torch.Generator().manual_seed(seed)
    every = torch.zeros(1, 0, dtype=torch.uint8)
    for n in range(tiles):  # insert n at each of the n + 1 places of every permutation of 0..n-1
        new = every.new_full((len(every), 1), n)
        every = torch.cat([torch.cat([every[:, :i], new, every[:, i:]], 1) for i in range(n + 1)])
    every = every[torch.randperm(len(every), generator=generator)].T.contiguous()
    nearest = torch.full((every.shape[1],), tiles, dtype=torch.int32)  # distance to the nearest one
    total, chosen = torch.zeros_like(nearest), [0]  # sum of the distances to all chosen
    while len(chosen) < count:
        distance = sum((place != place[chosen[-1]]).int() for place in every)
        nearest, total = torch.minimum(nearest, distance), total + distance
        # total is less than tiles * count: it decides among equals only
        chosen.append((nearest * tiles * count + total).argmax().item())
    return every[:, chosen].T.long()


def relative_pairs():
    """The relative task's orders, of two tiles: the middle one and each neighbour -> (8, 2)."""
    return torch.tensor([(4, neighbour) for neighbour in (0, 1, 2, 3, 5, 6, 7, 8)])


# ----------------------------------------------------------------------------------------- loss


def jigsaw_loss(logits, labels):
    """Cross-entropy of the orders: (B, P), (B,) -> scalar.

        L = -1/B Σ_i log p(S_i | tiles of image i, in the order S_i)

    where S_i, the label, is an index into the set of orders, and p the softmax of the logits.
    Chance level: ln P.
    """
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def solved(logits, labels):
    """Health: the fraction of rows in which the label has the highest logit. Rising, and above the
    chance level, 1 / K; if it is near 1 within the first epochs, there is a shortcut that needs no
    features of objects: (B, K), (B,) -> scalar."""
    return (logits.argmax(1) == labels).float().mean()


# --------------------------------------------------------------------------------- augmentation
# An image is augmented, cut and shuffled. What would tell where tiles belong, without any knowledge
# of objects, is taken away: lines that go on in the next tile (by random gaps), brightness that
# changes across the image (each tile is normalised by itself), the coloured fringes of lenses (some
# images lose their colours), and most of the grid of small JPEG files (crops are resampled).


def augment(images, aspect, image_size, crop_scale, gray, invert):
    """uint8 images (B, 3, S, S), squeezed to squares from width / height = aspect (B,) -> views
    (B, 3, image_size, image_size), not cut yet.

    gray, invert: fractions of images that lose their colours, and that are made negatives. Not in
    the paper: negatives, and crops smaller than the largest square (crop_scale below 1).
    """
    from common import (normalize, random_grayscale, random_horizontal_flip, random_resized_crop,
                        random_solarize)

    if crop_scale < 1:
        x = random_resized_crop(images, aspect, image_size, scale=(crop_scale, 1.0))
    else:
        x = random_square(images, aspect, image_size)
    x = random_horizontal_flip(x, p=0.5)
    x = random_grayscale(x, p=gray)
    x = random_solarize(x, p=invert, threshold=0.0)  # from 0 on, every value is inverted
    return normalize(x)


def random_square(images, aspect, size):
    """The largest square that fits into the original, at a random place along its longer side."""
    from common import resized_crop, uniform

    canvas = images.shape[3]
    sides = canvas * torch.stack([aspect, 1 / aspect], 1).clamp(max=1)
    corner = uniform(len(images), 2, device=images.device) * (canvas - sides)
    return resized_crop(images, torch.cat([corner, sides], 1), size)


def cut_tiles(images, grid, tile_size, offsets=None):
    """A tile from each cell of a grid: (B, 3, S, S) -> (B, grid², 3, t, t), row by row.

    Tiles are smaller than cells, and lie anywhere in them, so that random gaps are left between
    tiles: 0 to 42 pixels with the paper's cells of 85 and tiles of 64; 0 to 4 with 10 and 8.
    offsets (B, grid², 2): where in its cell a tile lies, down and right, in [0, 1), else random.
    """
    size, cell = images.shape[3], images.shape[3] // grid
    if tile_size > cell:
        raise ValueError(f"tiles of {tile_size} pixels do not fit {grid} times into {size}")
    if offsets is None:
        offsets = torch.rand(len(images), grid**2, 2, device=images.device)
    corner = (offsets * (cell - tile_size + 1)).long() + (size - grid * cell) // 2
    place = torch.arange(grid**2, device=images.device)
    top, left = corner[..., 0] + place // grid * cell, corner[..., 1] + place % grid * cell
    windows = images.unfold(2, tile_size, 1).unfold(3, tile_size, 1)  # at all places
    return windows[torch.arange(len(images), device=images.device)[:, None], :, top, left]


def shuffle(tiles, orders):
    """(B, M, 3, t, t), (B, N) -> (B, N, 3, t, t). Tile n is then tile orders[:, n] of the image."""
    return tiles[torch.arange(len(tiles), device=tiles.device)[:, None], orders]


def draw_puzzles(images, aspect, view, orders, tile_size):
    """Augment, cut and shuffle -> tiles (B, N, 3, t, t) in random orders, and which ones: (B,)."""
    from common import uniform

    offsets = uniform(len(images), 9, 2, device=images.device)
    order = uniform(len(images), device=images.device, high=len(orders)).long()
    tiles = cut_tiles(view(images, aspect), 3, tile_size, offsets)
    return shuffle(tiles, orders[order]), order


def normalize_tiles(tiles):
    """Mean 0 and deviation 1 in each channel of each tile: (B, N, 3, t, t) -> the same."""
    return F.instance_norm(tiles.flatten(0, 1)).view_as(tiles)


def lay_out(tiles, places):
    """Put tile n at place places[:, n] of 3 x 3, with white around: (B, N, 3, t, t), (B, N) or (N,)
    -> (B, 3, 3 (t + 2), 3 (t + 2))."""
    board = tiles.new_ones(len(tiles), 9, 3, tiles.shape[3] + 2, tiles.shape[4] + 2)
    board[torch.arange(len(tiles), device=tiles.device)[:, None], places, :, 1:-1, 1:-1] = tiles
    return board.unflatten(1, (3, 3)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


# ------------------------------------------------------------------------------------- training


def stepwise(step, total_steps, warmup_steps, peak, drops, factor):
    """Rises linearly to `peak` over the warm-up, then is constant, except that it is multiplied by
    `factor` at each of the `drops`: fractions of the training, from 0 to 1."""
    passed = sum(step >= round(drop * total_steps) for drop in drops)
    return peak * factor**passed * min((step + 1) / max(warmup_steps, 1), 1)


def make_optimizer(model, weight_decay):
    """Biases and BN are decayed like the rest."""
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=weight_decay)


def train(args):
    """A puzzle of each image of a batch, once per step."""
    from common import (batch_that_fits, batches, denormalize, examples, load_checkpoint, load_data,
                        log, make_backbone, parallel, rank, save_checkpoint, save_picture, start,
                        write_log)
    from linear_probe import calibrate_batch_norm, evaluate, load_init

    device = start(args.device, args.seed, args.deterministic)
    train_set, test_set = load_data(args.data, args.image_size, args.max_images, args.workers,
                                    device)
    args.batch_size = batch_that_fits(args, train_set)  # over all processes
    steps_per_epoch = len(train_set) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    peak_lr = args.lr * args.batch_size / 256

    # With the stem for whole images, not for tiles: they are what the backbone will be used on.
    backbone = make_backbone(args.arch, args.image_size)
    untrained = copy.deepcopy(backbone)  # the report's baseline
    load_init(backbone, args.init)
    orders = relative_pairs()
    if args.task == "jigsaw":
        orders = permutation_set(args.permutations, 9, seed=0)
    model = Jigsaw(backbone, backbone.feature_dim, orders, args.tile_dim, args.hidden_dim)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args.weight_decay)
    view = partial(augment, image_size=args.image_size, crop_scale=args.crop_scale, gray=args.gray,
                   invert=args.invert)
    draw = partial(draw_puzzles, view=view, orders=model.orders, tile_size=args.tile_size)
    step = load_checkpoint(args, train_set, model, optimizer)  # 0, or where the run goes on
    network = parallel(model, args.compile)  # DistributedDataParallel and SyncBN, if of several
    images, aspect = examples(train_set, device)
    puzzles, order = draw(images, aspect)
    shown = denormalize(puzzles)
    unsolved = lay_out(shown, torch.arange(orders.shape[1], device=device))
    solution = lay_out(shown, model.orders[order])
    if rank() == 0:
        save_picture(f"{args.out}/views.png", images / 255, unsolved, solution)
    saved_at = save_checkpoint(args, step, train_set, model, optimizer, backbone)
    started = step, time.monotonic()  # for the speed and the time left
    chance = math.log(len(orders))

    for step, images, aspect in batches(train_set, args, step, device):  # seeded by step
        lr = stepwise(step, total_steps, warmup_steps, peak_lr, args.lr_drops, args.lr_factor)
        for group in optimizer.param_groups:
            group["lr"] = lr
        tiles, order = draw(images, aspect)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(normalize_tiles(tiles))
        loss = jigsaw_loss(logits.float(), order)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        done, epoch_ends = step + 1, (step + 1) % steps_per_epoch == 0
        if done == 1 or done % args.print_freq == 0 or epoch_ends:
            log(args, done, total_steps, started, lr, loss, chance,
                puzzles_solved=solved(logits, order))
        if done == total_steps and rank() == 0:
            with torch.no_grad():
                found = model.eval()(normalize_tiles(puzzles)).argmax(1)
            save_picture(f"{args.out}/puzzles.png", unsolved, lay_out(shown, model.orders[found]))
        if epoch_ends or time.monotonic() - saved_at > 600:
            saved_at = save_checkpoint(args, done, train_set, model, optimizer, backbone)
    calibrate_batch_norm(backbone, train_set, args.image_size, device)  # to whole images, not tiles
    save_checkpoint(args, total_steps, train_set, model, optimizer, backbone)
    report = evaluate(backbone, untrained, train_set, test_set, args.image_size, device,
                      layers=True)
    write_log(args, {"step": total_steps, "report": report})


RECIPES = {
    "recipe":        ("demo",     "cpu",      "cifar",          "imagenet"),
    "arch":          ("resnet8",  "resnet8",  "resnet18",       "resnet50"),
    "image_size":    (32,         64,         32,               255),
    "epochs":        (14,         10,         200,              105),
    "warmup_epochs": (1,          1,          5,                5),
    "batch_size":    (64,         64,         256,              256),
    "lr":            (0.2,        0.2,        0.1,              0.1),
    "lr_drops":      ([0.7],      [0.7],      [0.3, 0.6, 0.9],  [2 / 7, 4 / 7, 6 / 7, 20 / 21]),
    "lr_factor":     (0.1,        0.1,        0.1,              0.1),
    "weight_decay":  (5e-4,       5e-4,       5e-4,             1e-4),
    "task":          ("jigsaw",   "jigsaw",   "jigsaw",         "jigsaw"),
    "permutations":  (30,         30,         100,              100),
    "tile_size":     (8,          18,         8,                64),
    "crop_scale":    (0.5,        0.5,        0.5,              1.0),
    "gray":          (0.3,        0.3,        0.3,              0.66),
    "invert":        (0.5,        0.0,        0.0,              0.0),
    "tile_dim":      (128,        128,        256,              1000),
    "hidden_dim":    (256,        256,        1024,             4096),
}
FLAGS = {  # type, lowest, highest, help, the paper's value
    "lr_drops": ([float], 0, 1, "fractions of the training at which the rate falls"),
    "lr_factor": (float, 0, 1, "what the rate is multiplied by when it falls"),
    "task": (("jigsaw", "relative"), None, None, "the order of nine tiles, or which neighbour of "
             "the middle tile a second one is"),
    "permutations": (int, 2, 10000, "orders in the set", "1000"),
    "tile_size": (int, 2, 10**4, "side of a tile in pixels, at most a third of --image-size", "64"),
    "crop_scale": (float, 1e-3, 1, "smallest crop, as a fraction of the image's area; 1: the "
                   "largest square", "1"),
    "gray": (float, 0, 1, "fraction of images whose colours are dropped", "0.3"),
    "invert": (float, 0, 1, "fraction of images made negatives", "0"),
    "tile_dim": (int, 1, 10**5, "length of a tile's embedding", "1024 in its code"),
    "hidden_dim": (int, 1, 10**5, "width of the head's hidden layer", "4096"),
}


def parse_args(argv=None):
    from common import parse_flags, wrong_arguments

    args = parse_flags("jigsaw", __doc__, RECIPES, FLAGS, argv)
    if args.tile_size > args.image_size // 3:
        wrong_arguments(f"--tile-size {args.tile_size} is more than a third of --image-size "
                        f"{args.image_size}")
    return args


# Sources. imagenet: vissl's ResNet-50 (its probe is better with 100 permutations than with 2000),
# which has no hidden layer, normalises no tiles and does not decay BN. cifar: tiles in proportion,
# not tuned. cpu: measured on CIFAR-10, at twice its size. demo: measured on drawn images.
# Departures from the papers: ResNets (paper: AlexNet); vissl's embedding and flips, the hidden
# layer of Kolesnikov et al. (2019) without its dropout; no jitter of a tile's channels; the BN of
# the backbone that is kept is calibrated on whole images at the end. A permutation is chosen by its
# smallest distance, then by its mean (paper: by this alone). The relative task has the puzzle's
# gaps (paper: half a tile; --tile-size 57 of 255 gives that) and drops colours.

if __name__ == "__main__":
    from common import main

    main(train, parse_args)
