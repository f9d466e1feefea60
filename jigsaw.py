"""Jigsaw: the nine tiles of an image are shuffled; in which of a fixed set of orders are they?

Noroozi & Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles" (2016,
arXiv 1603.09246). With --task relative: on which of its eight sides is this tile's neighbour?
Doersch et al., "Unsupervised Visual Representation Learning by Context Prediction" (2015,
arXiv 1505.05192). Survey family: context-based pretext task. What prevents collapse: the labels.

Each tile passes through the same backbone, and a head that sees the features of all tiles names the
order: to put an ear beside an eye, the backbone has to know parts of objects. What would give the
order away without that is taken away: edges that continue (random gaps between tiles), brightness
that changes across the image (each tile is normalised by itself), colour fringes of the lens (some
images are gray), and orders that differ in two tiles only (those of the set are far apart).

                    ┌─ tile ─ backbone ─ features ─ embed ─┐
        image ──────┼─ tile ─ backbone ─ features ─ embed ─┼─ concatenated ─ head ─ which order?
          cut and   └─ tile ─ backbone ─ features ─ embed ─┘
          shuffle             (shared)  └─ what is kept: the backbone, used on whole images

Run      python jigsaw.py                       demonstration: built-in images, CPU, a minute
         python jigsaw.py --data path           a folder of images, or cifar10
         torchrun --nproc-per-node=8 jigsaw.py --data path
Reuse    from jigsaw import Jigsaw, permutation_set, cut_tiles, jigsaw_loss     (needs torch only)

The report at the end has every stage. puzzles.png has puzzles, and how the trained network solves
them. Tiles are 8 of 10 pixels of a cell at 32 pixels, with gaps of 0 to 4, and 64 of 85 at 255,
with gaps of 0 to 42.

Departures from the papers: ResNets instead of AlexNet, with the head of Kolesnikov et al. (2019)
without its dropout; channels are not jittered; images are flipped, as in vissl. Orders are chosen
by their smallest distance first, then by the mean, which alone is the paper's criterion. The
relative task has the puzzle's gaps (paper: half a tile; --tile-size 57 of 255 pixels is that on
average) and drops colour as the puzzle does. At the end the backbone's BN gets the statistics of
whole images; --eval-every has those of tiles.

Measured in the demonstration, top-1 in percent (of the network at random):
built-in set, kNN 56.6 (35.4), probe 77.6 (43.0); seeds: 3
10,000 of CIFAR-10, kNN 32.6 (32.2), probe 37.9 (34.6); seeds: 3
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


class Jigsaw(nn.Module):
    """Backbone on each tile, and a head on all of them.

    backbone: (B, 3, H, W) -> (B, feature_dim). orders (P, N): the orders of N tiles to be told
    apart; a buffer, so that they stay the same as long as the weights that have learned them.
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
        """(B, N, 3, t, t) -> logits (B, P). The embedding does not know a tile's place: only the
        order of the concatenation tells the head."""
        embedded = self.embed(self.backbone(tiles.flatten(0, 1)))
        return self.head(embedded.unflatten(0, tiles.shape[:2]).flatten(1))


def permutation_set(count, tiles, seed):
    """Permutations of the tiles, far apart -> (count, tiles), int64.

    Greedy: the next is, of all permutations, the one with the largest Hamming distance (number of
    places that differ) to the nearest one chosen so far; among equals, the largest to all of them.
    The seed chooses the first.
    """
    if not 1 <= count <= math.factorial(tiles):
        raise ValueError(f"{tiles} tiles have {math.factorial(tiles)} permutations, not {count}")
    generator = torch.Generator().manual_seed(seed)
    every = torch.zeros(1, 0, dtype=torch.uint8)
    for n in range(tiles):  # n before, between and after the numbers of all permutations of 0..n-1
        new = every.new_full((len(every), 1), n)
        every = torch.cat([torch.cat([every[:, :i], new, every[:, i:]], 1) for i in range(n + 1)])
    every = every[torch.randperm(len(every), generator=generator)].T.contiguous()
    nearest = torch.full((every.shape[1],), tiles, dtype=torch.int32)  # distance, places
    total, chosen = torch.zeros_like(nearest), [0]
    while len(chosen) < count:
        differs = every != every[:, chosen[-1], None]
        distance = sum(place.int() for place in differs)
        nearest, total = torch.minimum(nearest, distance), total + distance
        chosen.append((nearest * tiles * count + total).argmax().item())
    return every[:, chosen].T.long()


def relative_pairs():
    """The middle one of 3 x 3 tiles and a neighbour: eight "orders" of two tiles -> (8, 2)."""
    return torch.tensor([(4, neighbour) for neighbour in (0, 1, 2, 3, 5, 6, 7, 8)])


# ----------------------------------------------------------------------------------------- loss


def jigsaw_loss(logits, labels):
    """Cross-entropy of the orders: (B, P), (B,) -> scalar.

        L = -1/B Σ_i log p(S_i | tiles in the order S_i)

    where S_i, the label, is the index of an order in the set, and p the softmax of the logits.
    Guessing gives ln P.
    """
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def accuracy(logits, labels):
    """Health: the fraction of labels that are found. Above chance and rising; if it is close to 1
    within the first epochs, there is a shortcut: (B, classes), (B,) -> scalar."""
    return (logits.argmax(1) == labels).float().mean()


# --------------------------------------------------------------------------------- augmentation


def cut_tiles(images, grid, tile_size, offsets=None):
    """A tile from each cell of a grid: (B, 3, S, S) -> (B, grid², 3, t, t), row by row.

    offsets (B, grid², 2): where in its cell a tile lies, down and right, from 0 to below 1; random
    by default. With cells of c pixels, neighbours are 0 to 2 (c - t) pixels apart.
    """
    size, cell = images.shape[3], images.shape[3] // grid
    if tile_size > cell:
        raise ValueError(f"tiles of {tile_size} pixels do not fit {grid} times into {size}")
    if offsets is None:
        offsets = torch.rand(len(images), grid**2, 2, device=images.device)
    corner = (offsets * (cell - tile_size + 1)).long() + (size - grid * cell) // 2
    place = torch.arange(grid**2, device=images.device)
    top, left = corner[..., 0] + place // grid * cell, corner[..., 1] + place % grid * cell
    windows = images.unfold(2, tile_size, 1).unfold(3, tile_size, 1)  # a view: all places
    return windows[torch.arange(len(images), device=images.device)[:, None], :, top, left]


def shuffle(tiles, orders):
    """(B, M, 3, t, t), (B, N) -> (B, N, 3, t, t). Tile n is then tile orders[:, n] of the image."""
    return tiles[torch.arange(len(tiles), device=tiles.device)[:, None], orders]


def normalize_tiles(tiles):
    """Mean 0 and deviation 1 in each channel of each tile: (B, N, 3, t, t) -> the same."""
    return F.instance_norm(tiles.flatten(0, 1)).view_as(tiles)


def lay_out(tiles, places):
    """A picture of 3 x 3 tiles, where tile n is at places[:, n]: (B, N, 3, t, t), (B, N) ->
    (B, 3, 3 (t + 2), 3 (t + 2)), white around the tiles."""
    board = tiles.new_ones(len(tiles), 9, 3, tiles.shape[3] + 2, tiles.shape[4] + 2)
    board[torch.arange(len(tiles), device=tiles.device)[:, None], places, :, 1:-1, 1:-1] = tiles
    return board.unflatten(1, (3, 3)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


@dataclass
class RandomSquare:
    """The largest square that the image holds, anywhere along its longer side."""
    size: int

    def draw(self, images, aspect):
        from common import resized_crop, uniform

        canvas = images.shape[3]
        sides = canvas * torch.stack([aspect, 1 / aspect], 1).clamp(max=1)
        corner = uniform(len(images), 2, device=images.device) * (canvas - sides)
        return [(partial(resized_crop, size=self.size), torch.cat([corner, sides], 1))]


def make_augment(image_size, crop_scale, gray, invert):
    """What happens to the image before it is cut. Colours are dropped in all its tiles alike."""
    from common import (Augment, Normalize, RandomGrayscale, RandomHorizontalFlip,
                        RandomResizedCrop, RandomSolarize)

    crop = RandomSquare(image_size)
    if crop_scale < 1:
        crop = RandomResizedCrop(image_size, scale=(crop_scale, 1.0))
    return Augment([crop, RandomHorizontalFlip(0.5), RandomGrayscale(gray),
                    RandomSolarize(invert, threshold=0.0), Normalize()])


# ------------------------------------------------------------------------------------- training


def stepwise(step, total_steps, warmup_steps, start, drops, factor):
    """Rises linearly to `start` over the warm-up, and is multiplied by `factor` from each of the
    `drops` on, which are parts of the training."""
    passed = sum(step >= round(drop * total_steps) for drop in drops)
    return start * factor**passed * min((step + 1) / max(warmup_steps, 1), 1)


def make_optimizer(model, weight_decay):
    """Biases and BN are decayed like the rest."""
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=weight_decay)


def train(args):
    """Puzzles of a batch of images, once per step."""
    from common import Run, denormalize, make_backbone, uniform
    from linear_probe import calibrate_batch_norm

    run = Run("jigsaw", args)
    # The stem for whole images, though it sees tiles: whole images are what the backbone is for,
    # and the papers' 64-pixel tiles pass through a stem that reduces them fourfold, too.
    backbone = run.init(make_backbone(args.arch, args.image_size))
    orders = permutation_set(args.permutations, 9, seed=0)
    if args.task == "relative":
        orders = relative_pairs()
    model = Jigsaw(backbone, backbone.feature_dim, orders, args.tile_dim, args.hidden_dim)
    optimizer = make_optimizer(model, args.weight_decay)
    augment = make_augment(args.image_size, args.crop_scale, args.gray, args.invert)
    network = run.start(model, optimizer, backbone)
    chance = math.log(len(orders))

    def draw_puzzles(images, aspect):
        """-> tiles (B, N, 3, t, t) in one of the orders, and which: (B,)"""
        offsets = uniform(len(images), 9, 2, device=run.device)
        order = uniform(len(images), device=run.device, high=len(orders)).long()
        tiles = cut_tiles(augment(images, aspect), 3, args.tile_size, offsets)
        return shuffle(tiles, model.orders[order]), order

    images, aspect = run.sample()
    puzzles, order = draw_puzzles(images, aspect)
    tiles = denormalize(puzzles.flatten(0, 1)).view_as(puzzles)
    shuffled = lay_out(tiles, torch.arange(tiles.shape[1]).expand(len(tiles), -1))
    run.save_picture("views.png", images / 255, shuffled, lay_out(tiles, model.orders[order]))

    for step, images, aspect in run.steps():
        lr = stepwise(step, run.total_steps, run.warmup_steps, run.peak_lr, args.lr_drops,
                      args.lr_factor)
        for group in optimizer.param_groups:
            group["lr"] = lr
        puzzle, order = draw_puzzles(images, aspect)
        with run.autocast():
            logits = network(normalize_tiles(puzzle))
        loss = jigsaw_loss(logits.float(), order)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if run.prints(step):
            run.log(step, loss, lr, chance, accuracy=accuracy(logits, order))

    if not run.report:  # else it was done when the run was finished
        with torch.no_grad():
            solution = model.eval()(normalize_tiles(puzzles)).argmax(1)
        run.save_picture("puzzles.png", shuffled, lay_out(tiles, model.orders[solution]))
        # From now on the backbone sees whole images: its BN gets their statistics.
        whole = make_backbone(args.arch, args.image_size).to(run.device)
        whole.load_state_dict(backbone.state_dict())
        calibrate_batch_norm(whole, run.train_set, args.image_size, run.device)
        backbone.load_state_dict(whole.state_dict())
    run.finish(layers=True)


# Sources: imagenet: vissl's ResNet-50 (rate drops at epochs 30, 60, 90 and 100; of its probes that
# with 100 permutations is best; the paper has 1000). cifar: none is published; tiles as at 255
# pixels in proportion, not tuned. demo: measured.
RECIPES = {
    "recipe":        ("demo",           "cifar",          "imagenet"),
    "arch":          ("resnet8",        "resnet18",       "resnet50"),
    "image_size":    (32,               32,               255),
    "epochs":        (10,               200,              105),
    "warmup_epochs": (0.4,              5,                5),
    "batch_size":    (64,               256,              256),
    "lr":            (0.2,              0.1,              0.1),
    "lr_drops":      ([0.7],            [0.3, 0.6, 0.9],  [2 / 7, 4 / 7, 6 / 7, 20 / 21]),
    "lr_factor":     (0.1,              0.1,              0.1),
    "weight_decay":  (5e-4,             5e-4,             1e-4),
    "task":          ("jigsaw",         "jigsaw",         "jigsaw"),
    "permutations":  (30,               100,              100),
    "tile_size":     (8,                8,                64),
    "crop_scale":    (0.5,              1.0,              1.0),
    "gray":          (0.3,              0.3,              0.66),
    "invert":        (0.5,              0.0,              0.0),
    "tile_dim":      (128,              256,              1000),
    "hidden_dim":    (256,              1024,             4096),
}


def parse_args(argv=None):
    from common import ArgumentParser, number

    parser = ArgumentParser(__doc__, RECIPES)
    add = parser.add_argument
    add("--lr-drops", type=number(float, 0, 1), nargs="*", metavar="PART",
        help="parts of the training after which the rate falls")
    add("--lr-factor", type=number(float, 0, 1), help="by which it is then multiplied")
    add("--task", choices=("jigsaw", "relative"), help="nine tiles, or the middle one and another")
    add("--permutations", type=number(int, 2, 10000), help="orders of the puzzle (paper: 1000)")
    add("--tile-size", type=number(int, 2), help="side of a tile, in pixels; cells are a third of "
        "--image-size, and the gap is twice what remains at most (paper: 64)")
    add("--crop-scale", type=number(float, 0, 1, above=True),
        help="area of the smallest crop; 1: the largest square (paper)")
    add("--gray", type=number(float, 0, 1), help="fraction of images without colour (paper: 0.3)")
    add("--invert", type=number(float, 0, 1), help="fraction of images made negatives (paper: 0)")
    add("--tile-dim", type=number(int, 1), help="length of a tile's embedding")
    add("--hidden-dim", type=number(int, 1), help="width of the head")
    args = parser.parse_args(argv)
    if args.tile_size > args.image_size // 3:
        parser.error(f"--tile-size {args.tile_size} is more than a third of --image-size "
                     f"{args.image_size}")
    return args


if __name__ == "__main__":
    from common import main

    main(train, parse_args)
