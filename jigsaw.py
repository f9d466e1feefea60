# SPDX-License-Identifier: MIT
"""Jigsaw: the nine tiles of an image are shuffled; in which order are they?

Noroozi and Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles"
(2016, arXiv 1603.09246); --task relative: Doersch et al., "Unsupervised Visual Representation
Learning by Context Prediction" (2015, arXiv 1505.05192).
Survey family: context-based pretext task. What prevents collapse: the labels.

An image is cut into 3 x 3 tiles, which are shuffled into one of a fixed set of orders. The backbone
sees each tile by itself; a head that sees the features of all nine has to say which order it is. To
know that an ear belongs above an eye, the backbone has to recognize the parts of objects. The
relative task shows the middle tile and one of its eight neighbours: which neighbour is it?

                    ┌─ tile ─ backbone ─ features ─ embed ─┐
        image ──────┼─ tile ─ backbone ─ features ─ embed ─┼─ concatenated ─ head ─ which order?
          cut and   └─ tile ─ backbone ─ features ─ embed ─┘
          shuffled            (shared)  └─ used after training, on whole images

Run      python jigsaw.py                       demonstration: synthetic images, CPU, minutes
         python jigsaw.py --data path           a folder of images, or cifar10
         torchrun --nproc-per-node=8 jigsaw.py --data path
Reuse    from jigsaw import (Jigsaw, permutation_set, cut_tiles, shuffle, normalize_tiles,
                             jigsaw_loss, make_optimizer, stepwise_schedule)
         (needs torch only). `train` shows one step, from the learning rate, which make_optimizer
         leaves at 0. In a single process, its loss is
             labels = torch.randint(len(model.orders), (len(images),), device=images.device)
             tiles = shuffle(cut_tiles(images, 3, tile_size), model.orders[labels])
             loss = jigsaw_loss(model(normalize_tiles(tiles)), labels)
         At the end the BN layers of the backbone have statistics of tiles. Calibrate them for whole
         images: reset_running_stats() and momentum = None, then some batches of whole, normalized
         images in training mode, without gradient (linear_probe.py's calibrate_batch_norm).
"""

import copy
import math
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


def cut_tiles(images, grid, tile_size, offsets=None):
    """A tile from each cell of a grid: (B, 3, S, S) -> (B, grid², 3, t, t), row by row.

    Tiles are smaller than cells and lie anywhere in them, so that there are random gaps between
    tiles: 0 to 42 pixels with the paper's cells of 85 and tiles of 64; 0 to 4 with 10 and 8.
    offsets (B, grid², 2): where in its cell a tile lies, down and right, in [0, 1); random by
    default.
    """
    size = images.shape[3]
    cell = size // grid
    margin = (size - grid * cell) // 2
    if tile_size > cell:
        raise ValueError(f"tiles of {tile_size} pixels do not fit {grid} times into {size}")
    if offsets is None:
        offsets = torch.rand(len(images), grid**2, 2, device=images.device)
    down, right = (offsets * (cell - tile_size + 1)).long().unbind(2)  # in pixels
    place = torch.arange(grid**2, device=images.device)
    top = margin + place // grid * cell + down
    left = margin + place % grid * cell + right
    windows = images.unfold(2, tile_size, 1).unfold(3, tile_size, 1)  # (B, 3, tops, lefts, t, t)
    image = torch.arange(len(images), device=images.device)[:, None]
    return windows[image, :, top, left]  # (B, grid², 3, t, t)


def shuffle(tiles, places):
    """Tile n of the result is the one from place places[:, n] of the image: (B, M, 3, t, t),
    (B, N) -> (B, N, 3, t, t)."""
    image = torch.arange(len(tiles), device=tiles.device)[:, None]
    return tiles[image, places]


def normalize_tiles(tiles):
    """Mean 0 and deviation 1 in each channel of each tile: (B, N, 3, t, t) -> the same."""
    return F.instance_norm(tiles.flatten(0, 1)).unflatten(0, tiles.shape[:2])


class Jigsaw(nn.Module):
    """Backbone on each tile, and a head on all tiles of an image.

    backbone: (B, 3, H, W) -> (B, feature_dim). orders (P, N): the P orders that the head tells
    apart; orders[k, n] is the place in the image of the n-th tile that is shown. They are a buffer,
    so that they are saved with the weights that learned them.
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
        """(B, N, 3, t, t) -> logits (B, P). Backbone and embedding treat all tiles alike; only from
        its position in the concatenation does the head know where a tile has been put."""
        embedded = self.embed(self.backbone(tiles.flatten(0, 1)))  # (B · N, tile_dim)
        embedded = embedded.unflatten(0, tiles.shape[:2])
        return self.head(embedded.flatten(1))


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
    """Health: the fraction of rows in which the label has the highest logit. It should rise above
    the chance level, 1 / K. If it is near 1 within the first epochs, the network has found a
    shortcut: a solution that needs no features of objects. (B, K), (B,) -> scalar."""
    return (logits.argmax(1) == labels).float().mean()


# --------------------------------------------------------------------------------- augmentation
# An image is augmented, cut and shuffled. What would tell where a tile belongs, without any
# knowledge of objects, is taken away: lines that go on in the next tile (by random gaps),
# brightness that changes across the image (each tile is normalized by itself), the colored fringes
# of lenses (some images lose their colors), and most of JPEG's grid of 8 x 8 blocks, which shows
# in small files (crops are resampled).


def augment(images, aspect, image_size, crop_scale, gray, invert):
    """uint8 images (B, 3, S, S), resized to squares, and aspect (B,), their original width / height
    -> views (B, 3, image_size, image_size), not cut yet.

    gray, invert: fractions of images that lose their colors, and that are inverted. Not in the
    paper: inverted images, and crops smaller than the largest square (crop_scale below 1).
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
    """The largest square that fits into the original image, at a random place along the longer
    side: (B, 3, S, S) uint8, (B,) -> (B, 3, size, size) in [0, 1]."""
    from common import resized_crop, uniform

    # The stored image is the original, scaled to a square: in it, the square is a rectangle.
    canvas = images.shape[3]
    height = canvas * aspect.clamp(max=1)
    width = canvas * (1 / aspect).clamp(max=1)
    sides = torch.stack([height, width], 1)
    corner = uniform(len(images), 2, device=images.device) * (canvas - sides)
    return resized_crop(images, torch.cat([corner, sides], 1), size)


def random_puzzles(images, aspect, make_view, orders, tile_size):
    """Make views of the images, cut and shuffle them -> tiles (B, N, 3, t, t), each image's in
    one of the `orders` (P, N) at random, and the labels (B,): which order that is."""
    from common import uniform

    offsets = uniform(len(images), 9, 2, device=images.device)
    labels = uniform(len(images), device=images.device, high=len(orders)).long()
    tiles = cut_tiles(make_view(images, aspect), 3, tile_size, offsets)
    return shuffle(tiles, orders[labels]), labels


# --------------------------------------------------------------------------- the sets of orders


def all_permutations(n):
    """The permutations of 0 to n - 1: (n!, n), float for torch.cdist."""
    every = torch.zeros(1, 0)
    for new in range(n):  # insert it at each place of each permutation of 0 to new - 1
        column = torch.full((len(every), 1), float(new))
        inserted = [torch.cat([every[:, :i], column, every[:, i:]], 1) for i in range(new + 1)]
        every = torch.cat(inserted)
    return every


def permutation_set(count, tiles, seed):
    """Permutations of the tiles that differ in many places -> (count, tiles), int64.

    Two orders that differ in only two tiles cannot be told apart where both show sky. The
    search is greedy: the first permutation is random; each next one has, of all permutations, the
    largest Hamming distance to the nearest of those chosen before it, and among equals the largest
    sum of the distances to all of them. The seed decides the first, and what is still equal.
    """
    if not 1 <= count <= math.factorial(tiles):
        raise ValueError(f"{tiles} tiles have {math.factorial(tiles)} permutations, not {count}")
    every = all_permutations(tiles)
    generator = torch.Generator().manual_seed(seed)
    every = every[torch.randperm(len(every), generator=generator)]
    chosen = [0]
    nearest = torch.full((len(every),), float(tiles))  # distance to the nearest one chosen
    total = torch.zeros(len(every))  # sum of the distances to all chosen
    while len(chosen) < count:
        last = every[chosen[-1]][None]  # (1, tiles)
        distance = torch.cdist(every, last, p=0).squeeze(1)  # p = 0: Hamming distance
        nearest = torch.minimum(nearest, distance)
        total += distance
        # total is less than tiles · count, so it decides among equals only
        chosen.append((nearest * tiles * count + total).argmax().item())
    return every[chosen].long()


def relative_pairs():
    """The orders of the relative task, which has two tiles: the middle one, and one of its eight
    neighbours -> (8, 2)."""
    neighbours = [0, 1, 2, 3, 5, 6, 7, 8]
    return torch.tensor([[4, neighbour] for neighbour in neighbours])


# ------------------------------------------------------------------------------------- training


def stepwise_schedule(step, total_steps, warmup_steps, peak, drops, factor):
    """Rises linearly to `peak` over the warm-up, then is constant, except that it is multiplied by
    `factor` at each of the `drops`: fractions of the training, from 0 to 1."""
    passed = sum(step >= round(drop * total_steps) for drop in drops)
    lr = peak * factor**passed
    if step < warmup_steps:
        lr *= (step + 1) / warmup_steps
    return lr


def make_optimizer(model, weight_decay):
    """Biases and BN are decayed like the rest."""
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=weight_decay)


def lay_out(tiles, places):
    """Put tile n at place places[:, n] of 3 x 3: (B, N, 3, t, t), (B, N) or (N,) -> pictures
    (B, 3, ., .)."""
    from torchvision.utils import make_grid

    boards = tiles.new_ones(len(tiles), 9, *tiles.shape[2:])  # white
    image = torch.arange(len(tiles), device=tiles.device)[:, None]
    boards[image, places] = tiles
    return torch.stack([make_grid(board, nrow=3, pad_value=1) for board in boards])


def save_puzzles(path, images, tiles, places):
    """A picture of uint8 images, of their shuffled tiles, and of the tiles put at these places."""
    from common import denormalize, rank, save_picture

    if rank() == 0:
        tiles = denormalize(tiles)
        in_turn = torch.arange(tiles.shape[1], device=tiles.device)
        save_picture(path, images / 255, lay_out(tiles, in_turn), lay_out(tiles, places))


def train(args):
    """A puzzle of each image of a batch, once per step."""
    # Imported here, so that this file alone, copied elsewhere, can be imported without them.
    from common import (SAVE_SECONDS, autocast, batch_that_fits, batches, examples, load_checkpoint,
                        load_data, log, log_knn, make_backbone, open_run, parallel, save_checkpoint,
                        start, warmup_that_fits, write_log)
    from linear_probe import calibrate_batch_norm, evaluate, load_backbone, quick_knn

    device = start(args.device, args.seed)
    train_set, test_set = load_data(args, device)
    args.batch_size = batch_that_fits(args.batch_size, train_set)  # over all processes
    steps_per_epoch = len(train_set) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = warmup_that_fits(round(args.warmup_epochs * steps_per_epoch), total_steps)
    peak_lr = args.lr * args.batch_size / 256

    # with the stem for whole images, not for tiles: after training it is used on whole images
    backbone = make_backbone(args.arch, args.image_size)
    untrained = copy.deepcopy(backbone)  # the report's baseline
    if args.init:
        load_backbone(args.init, network=backbone)
    if args.task == "jigsaw":
        orders = permutation_set(args.permutations, 9, seed=0)  # the same with any --seed
    else:
        orders = relative_pairs()
    model = Jigsaw(backbone, backbone.feature_dim, orders, args.tile_dim, args.hidden_dim)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args.weight_decay)
    make_view = partial(augment, image_size=args.image_size, crop_scale=args.crop_scale,
                        gray=args.gray, invert=args.invert)
    make_puzzles = partial(random_puzzles, make_view=make_view, orders=model.orders,
                           tile_size=args.tile_size)
    chance = math.log(len(orders))

    open_run(args)
    first_step = load_checkpoint(args, train_set, model, optimizer)  # 0, or where to resume
    network = parallel(model, args.compile)  # DDP and SyncBN when there are several processes
    shown, shown_aspect = examples(train_set, device)
    shown_tiles, shown_labels = make_puzzles(shown, shown_aspect)
    save_puzzles(f"{args.out}/views.png", shown, shown_tiles, model.orders[shown_labels])
    untrained_knn = None  # measured when the first epoch ends
    started = saved_at = time.monotonic()

    for step, images, aspect in batches(train_set, args, first_step, device):  # seeds each step
        lr = stepwise_schedule(step, total_steps, warmup_steps, peak_lr, args.lr_drops,
                               args.lr_factor)
        for group in optimizer.param_groups:
            group["lr"] = lr
        tiles, labels = make_puzzles(images, aspect)
        with autocast(device):  # the network only: the loss needs float32
            logits = network(normalize_tiles(tiles))
        loss = jigsaw_loss(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        done = step + 1
        epoch_ends = done % steps_per_epoch == 0
        if done == 1 or done % args.print_freq == 0 or epoch_ends:
            log(args, done, total_steps, first_step, started, lr=lr, loss=loss, chance=chance,
                puzzles_solved=solved(logits, labels))
        if epoch_ends:
            paused = time.monotonic()
            if untrained_knn is None:
                untrained_knn = quick_knn(untrained, train_set, test_set, args.image_size, device,
                                          calibrate=True)
            trained_knn = quick_knn(backbone, train_set, test_set, args.image_size, device,
                                    calibrate=True)  # its BN has statistics of tiles
            log_knn(args, done, total_steps, trained_knn, untrained_knn)
            started += time.monotonic() - paused  # images/s leave the kNN out
        if time.monotonic() - saved_at > SAVE_SECONDS:
            save_checkpoint(args, done, train_set, model, optimizer, backbone)
            saved_at = time.monotonic()
        # How the network solves the puzzles of views.png. Here, and not after the loop: when a
        # finished run is resumed, its BN has the statistics of whole images.
        if done == total_steps:
            with torch.no_grad():
                found = model.eval()(normalize_tiles(shown_tiles)).argmax(1)
            save_puzzles(f"{args.out}/puzzles.png", shown, shown_tiles, model.orders[found])
    calibrate_batch_norm(backbone, train_set, args.image_size, device)  # to whole images, not tiles
    save_checkpoint(args, total_steps, train_set, model, optimizer, backbone)
    report = evaluate(backbone, untrained, train_set, test_set, args.image_size, device,
                      layers=True)
    write_log(args, {"step": total_steps, "report": report})


RECIPES = {  # what differs between recipes; every other flag has a single default
    "recipe":        ("demo",     "cpu",      "cifar",          "imagenet"),
    "arch":          ("resnet8",  "resnet8",  "resnet18",       "resnet50"),
    "image_size":    (32,         64,         32,               255),
    "epochs":        (14,         10,         200,              105),
    "warmup_epochs": (1,          1,          5,                5),
    "batch_size":    (64,         64,         256,              256),
    "lr":            (0.2,        0.2,        0.1,              0.1),
    "lr_drops":      ([0.7],      [0.7],      [0.3, 0.6, 0.9],  [2 / 7, 4 / 7, 6 / 7, 20 / 21]),
    "weight_decay":  (5e-4,       5e-4,       5e-4,             1e-4),
    "permutations":  (30,         30,         100,              100),
    "tile_size":     (8,          18,         8,                64),
    "crop_scale":    (0.5,        0.5,        0.5,              1.0),
    "gray":          (0.3,        0.3,        0.3,              0.66),
    "invert":        (0.5,        0.0,        0.0,              0.0),
    "tile_dim":      (128,        128,        256,              1000),
    "hidden_dim":    (256,        256,        1024,             4096),
}


def parse_args(argv=None):
    from common import make_parser, parse_with_recipe

    parser = make_parser("jigsaw", __doc__, RECIPES)
    parser.epilog = ("The log's `puzzles solved` should rise above 1 / --permutations (relative: "
                     "1/8); near 1 in the first epochs, it shows a shortcut.")
    add = parser.add_argument
    add("--lr-drops", type=float, nargs="*", help="fractions of the training at which the rate "
        "falls")
    add("--lr-factor", type=float, default=0.1, help="what the rate is multiplied by when it falls")
    add("--task", choices=["jigsaw", "relative"], default="jigsaw", help="jigsaw: the order of "
        "nine tiles; relative: which neighbour of the middle tile a second tile is")
    add("--permutations", type=int, help="orders in the set; paper: 1000")
    add("--tile-size", type=int, help="side of a tile in pixels, at most a third of --image-size; "
        "paper: 64")
    add("--crop-scale", type=float, help="smallest crop, fraction of the image's area; 1: the "
        "largest square; paper: 1")
    add("--gray", type=float, help="fraction of images that lose their colors; paper: 0.3")
    add("--invert", type=float, help="fraction of images that are inverted; paper: 0")
    add("--tile-dim", type=int, help="length of a tile's embedding; official code: 1024")
    add("--hidden-dim", type=int, help="width of the head's hidden layer; paper: 4096")
    args = parse_with_recipe(parser, RECIPES, argv)
    if args.tile_size > args.image_size // 3:
        parser.error(f"--tile-size {args.tile_size} is more than a third of --image-size "
                     f"{args.image_size}")
    if not 1 <= args.permutations <= math.factorial(9):
        parser.error(f"--permutations {args.permutations}: nine tiles have {math.factorial(9)}")
    return args


# ------------------------------------------------------------------------- sources and departures

# Sources. imagenet: vissl's ResNet-50 (linear probe 48.57 %; with 2000 permutations instead of 100
# it has 46.73); there the head has no hidden layer, tiles are not normalized one by one, and BN is
# not decayed. cifar: tiles in proportion, not tuned. cpu: measured on CIFAR-10, at twice its size.
# demo: measured on the synthetic images.
#
# Departures from the papers: the backbone is a ResNet (paper: AlexNet); the embedding of a tile and
# the flips are vissl's, the hidden layer is that of Kolesnikov et al. (2019), without dropout; the
# channels of a tile are not jittered; at the end the backbone's BN is calibrated on whole images,
# before it is saved (a backbone.pth saved during training has statistics of tiles); crops are taken
# from a square canvas of 8/7 of the view's side, so that elongated images lose detail (cut them
# beforehand); training is in bfloat16 on CUDA. A permutation is chosen by its smallest distance,
# then by its mean (paper: by the mean alone). The relative task has the puzzle's gaps (paper: half
# a tile; --tile-size 57 of 255 gives that on average) and turns images gray (paper: drops or
# projects color channels). The first layer is the same for tiles and for whole images (paper:
# stride 2 for tiles, then 4).

if __name__ == "__main__":
    from common import main

    main(train, parse_args)
