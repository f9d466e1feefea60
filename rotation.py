# SPDX-License-Identifier: MIT
"""RotNet: by how many quarter turns was this image rotated?

Gidaris et al., "Unsupervised Representation Learning by Predicting Image Rotations" (2018,
arXiv 1803.07728).
Survey family: context-based pretext task. What prevents collapse: the labels.

Each image is shown at 0, 90, 180 and 270 degrees, and a classifier has to say which. To see which
way is up, it has to recognize objects and to know how they usually stand, so the backbone learns
shapes. Images without an up-direction (from satellites or microscopes) teach it nothing.

                             ┌─ turned 0 times ─┐
        image ─── augment ───┼─ turned 1 time  ─┼─ backbone ─ features ─ classifier ─ 0, 1, 2 or 3
                             ├─ turned 2 times ─┤ (all four in the     └─ used after training
                             └─ turned 3 times ─┘  same batch)

Run      python rotation.py                     demonstration: synthetic images, CPU, minutes
         python rotation.py --data path         a folder of images, or cifar10
         torchrun --nproc-per-node=8 rotation.py --data path
Reuse    from rotation import (RotNet, rotate_four, rotation_loss, make_optimizer,
                               stepwise_schedule)
         (needs torch only). `train` shows one step, from the learning rate, which make_optimizer
         leaves at 0, to optimizer.step().
"""

import copy
import math
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


def rotate_four(images):
    """The four rotations of each image: (B, 3, S, S) -> (4B, 3, S, S), labels (4B,).

    Label k is k quarter turns counter-clockwise; the first B are the images as they are. Pixels
    only change places: resampling would leave traces that give the label away.
    """
    rotated = torch.cat([torch.rot90(images, k, (2, 3)) for k in range(4)])
    labels = torch.arange(4, device=images.device).repeat_interleave(len(images))
    return rotated, labels


class RotNet(nn.Module):
    """Backbone and a linear classifier of the four rotations.

    backbone: (B, 3, H, W) -> (B, feature_dim).
    """

    def __init__(self, backbone, feature_dim):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(feature_dim, 4)

    def forward(self, rotated):
        """(4B, 3, S, S) -> logits (4B, 4). One pass over all four rotations, so that they share BN
        statistics, which could otherwise give them away."""
        return self.classifier(self.backbone(rotated))


# ----------------------------------------------------------------------------------------- loss


def rotation_loss(logits, labels):
    """Cross-entropy of the rotations: (4B, 4), (4B,) -> scalar.

        L = -1/N Σ_i 1/K Σ_y log F^y(g(X_i | y))

    where g(X | y) is the image X turned y times, F^y the probability that the network gives to
    rotation y, N = B the number of images, and K = 4. Chance level: ln 4.
    """
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def solved(logits, labels):
    """Health: the fraction of rows in which the label has the highest logit. It should rise above
    the chance level, 1 / K. If it is near 1 within the first epochs, the network has found a
    shortcut: a solution that needs no features of objects. (B, K), (B,) -> scalar."""
    return (logits.argmax(1) == labels).float().mean()


# --------------------------------------------------------------------------------- augmentation


def augment(images, aspect, image_size, crop, invert):
    """uint8 images (B, 3, S, S), resized to squares, and aspect (B,), their original width / height
    -> views (B, 3, image_size, image_size), which are rotated afterwards.

    crop: "shift" or "resized", as in the official code for CIFAR and for ImageNet. invert: the
    fraction of views that are inverted (not in the paper). In the synthetic images light falls from
    above. Its direction alone would tell the rotation, if half of the views were not inverted.
    """
    from common import normalize, random_horizontal_flip, random_resized_crop, random_solarize

    if crop == "shift":
        x = central_square(images, aspect, image_size)
        x = random_shift(x, padding=4)
    else:
        x = random_resized_crop(images, aspect, image_size, scale=(0.08, 1.0))
    x = random_horizontal_flip(x, p=0.5)
    x = random_solarize(x, p=invert, threshold=0.0)  # from 0 on, every value is inverted
    return normalize(x)


def central_square(images, aspect, size):
    """The largest square in the middle of the original image: (B, 3, S, S) uint8, (B,) ->
    (B, 3, size, size) in [0, 1]."""
    from common import resized_crop

    # The stored image is the original, scaled to a square: in it, the square is a rectangle.
    canvas = images.shape[3]
    height = canvas * aspect.clamp(max=1)
    width = canvas * (1 / aspect).clamp(max=1)
    sides = torch.stack([height, width], 1)
    corner = (canvas - sides) / 2
    return resized_crop(images, torch.cat([corner, sides], 1), size)


def random_shift(x, padding, offsets=None):
    """Put a border of `padding` black pixels around each image, and cut a window of the old size
    from a random place: (B, 3, H, W) -> (B, 3, H, W).

    offsets (B, 2): top and left of the windows, whole numbers from 0 to 2 · padding; random by
    default. Pixels only change places.
    """
    from common import uniform

    if offsets is None:
        offsets = uniform(len(x), 2, device=x.device, high=2 * padding + 1).long()
    height, width = x.shape[2:]
    padded = F.pad(x, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, 3, tops, lefts, H, W)
    top, left = offsets.unbind(1)
    image = torch.arange(len(x), device=x.device)
    return windows[image, :, top, left]  # (B, 3, H, W)


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
    """Biases and BN are decayed like the rest, as in the official code."""
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, nesterov=True,
                           weight_decay=weight_decay)


def save_rotations(args, images, device, make_view):
    """views.png: some images as they are, and a view of each in its four rotations."""
    from common import denormalize, examples, rank, save_picture

    if rank() == 0:
        pixels, aspect = examples(images, device)
        rotated, _ = rotate_four(denormalize(make_view(pixels, aspect)))
        save_picture(f"{args.out}/views.png", pixels / 255, *rotated.chunk(4))


def train(args):
    """The four rotations of each image of a batch, once per step."""
    # Imported here, so that this file alone, copied elsewhere, can be imported without them.
    from common import (SAVE_SECONDS, autocast, batch_that_fits, batches, load_checkpoint,
                        load_data, log, log_knn, make_backbone, open_run, parallel, save_checkpoint,
                        start, warmup_that_fits, write_log)
    from linear_probe import evaluate, load_backbone, quick_knn

    device = start(args.device, args.seed)
    train_set, test_set = load_data(args, device)
    args.batch_size = batch_that_fits(args.batch_size, train_set)  # over all processes
    steps_per_epoch = len(train_set) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = warmup_that_fits(round(args.warmup_epochs * steps_per_epoch), total_steps)
    peak_lr = args.lr * args.batch_size / 256

    backbone = make_backbone(args.arch, args.image_size)
    untrained = copy.deepcopy(backbone)  # the report's baseline
    if args.init:
        load_backbone(args.init, network=backbone)
    model = RotNet(backbone, backbone.feature_dim)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args.weight_decay)
    make_view = partial(augment, image_size=args.image_size, crop=args.crop, invert=args.invert)
    chance = math.log(4)

    open_run(args)
    first_step = load_checkpoint(args, train_set, model, optimizer)  # 0, or where to resume
    network = parallel(model, args.compile)  # DDP and SyncBN when there are several processes
    save_rotations(args, train_set, device, make_view)
    untrained_knn = None  # measured when the first epoch ends
    started = saved_at = time.monotonic()

    for step, images, aspect in batches(train_set, args, first_step, device):  # seeds each step
        lr = stepwise_schedule(step, total_steps, warmup_steps, peak_lr, args.lr_drops,
                               args.lr_factor)
        for group in optimizer.param_groups:
            group["lr"] = lr
        rotated, rotation = rotate_four(make_view(images, aspect))
        with autocast(device):  # the network only: the loss needs float32
            logits = network(rotated)
        loss = rotation_loss(logits.float(), rotation)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        done = step + 1
        epoch_ends = done % steps_per_epoch == 0
        if done == 1 or done % args.print_freq == 0 or epoch_ends:
            log(args, done, total_steps, first_step, started, lr=lr, loss=loss, chance=chance,
                rotations_solved=solved(logits, rotation))
        if epoch_ends:
            paused = time.monotonic()
            if untrained_knn is None:
                untrained_knn = quick_knn(untrained, train_set, test_set, args.image_size, device,
                                          calibrate=True)
            trained_knn = quick_knn(backbone, train_set, test_set, args.image_size, device)
            log_knn(args, done, total_steps, trained_knn, untrained_knn)
            started += time.monotonic() - paused  # images/s leave the kNN out
        if time.monotonic() - saved_at > SAVE_SECONDS:
            save_checkpoint(args, done, train_set, model, optimizer, backbone)
            saved_at = time.monotonic()
    save_checkpoint(args, total_steps, train_set, model, optimizer, backbone)
    report = evaluate(backbone, untrained, train_set, test_set, args.image_size, device,
                      layers=True)
    write_log(args, {"step": total_steps, "report": report})


RECIPES = {  # what differs between recipes; every other flag has a single default
    "recipe":        ("demo",     "cpu",      "cifar",          "imagenet"),
    "arch":          ("resnet8",  "resnet8",  "resnet18",       "resnet50"),
    "image_size":    (32,         32,         32,               224),
    "epochs":        (3,          10,         200,              70),
    "warmup_epochs": (0.2,        1,          0,                5),
    "batch_size":    (64,         64,         128,              128),  # images, four views each
    "lr":            (0.2,        0.2,        0.2,              0.4),
    "lr_drops":      ([0.7],      [0.7],      [0.3, 0.6, 0.8],  [3 / 7, 5 / 7]),
    "lr_factor":     (0.1,        0.1,        0.2,              0.1),
    "weight_decay":  (5e-4,       5e-4,       5e-4,             1e-4),
    "crop":          ("resized",  "shift",    "shift",          "resized"),
    "invert":        (0.5,        0.0,        0.0,              0.0),
}


def parse_args(argv=None):
    from common import make_parser, parse_with_recipe

    parser = make_parser("rotation", __doc__, RECIPES)
    parser.epilog = ("The log's `rotations solved` should rise above 1/4; near 1 in the first "
                     "epochs, it shows a shortcut.")
    add = parser.add_argument
    add("--lr-drops", type=float, nargs="*", help="fractions of the training at which the rate "
        "falls; paper: 0.3 0.6 0.8 on CIFAR")
    add("--lr-factor", type=float, help="what the rate is multiplied by when it falls; paper: 0.2, "
        "0.1 on ImageNet")
    add("--crop", choices=["shift", "resized"], help="shift: by up to 4 pixels; resized: of random "
        "size; paper: shift on CIFAR, resized on ImageNet")
    add("--invert", type=float, help="fraction of views that are inverted, so that the direction "
        "of the light does not tell the rotation; paper: 0")
    return parse_with_recipe(parser, RECIPES, argv)


# ------------------------------------------------------------------------- sources and departures

# Sources. cifar: gidariss/FeatureLearningRotNet (rate 0.1 for 128 images; falls at epochs 60, 120
# and 160), with a ResNet. imagenet: mmselfsup's ResNet-50 (rate 0.2 for 128 images; falls at epochs
# 30 and 50; no Nesterov). The official code for AlexNet has 50 epochs of batch 192, rate 0.01,
# divided by 10 at epochs 15, 30 and 45, weight decay 5e-4, no warm-up. demo: measured on the
# synthetic images. cpu: chosen without a search; smaller views and resized crops did no better.
#
# Departures from the paper: ResNets (paper: NIN and AlexNet), with one linear layer on the pooled
# features; pixels are normalized by ImageNet's mean and std on CIFAR, too; crops are taken from a
# square canvas of 8/7 of the view's side (official: from the whole image), so that small crops are
# less sharp, and elongated images lose more (cut them beforehand); training is in bfloat16 on CUDA.
#
# The last layers know most about rotations, but middle ones more about objects: the paper takes the
# features of the second of four blocks. With mmselfsup's ResNet-50, linear probes of the third and
# fourth stage reach 54 and 46 % on ImageNet. This is why the report has a line for each stage.

if __name__ == "__main__":
    from common import main

    main(train, parse_args)
