"""RotNet: by how many quarter turns was this image rotated?

Gidaris et al., "Unsupervised Representation Learning by Predicting Image Rotations" (2018,
arXiv 1803.07728). Survey family: context-based pretext task. What prevents collapse: the labels.

Each image is shown at 0, 90, 180 and 270 degrees, and a classifier has to say which. To see which
way is up, it has to recognise objects and to know how they usually stand, so the backbone learns
shapes. Images without an up-direction (from satellites or microscopes) teach it nothing.

                             ┌─ turned 0 times ─┐
        image ─── augment ───┼─ turned 1 time  ─┼─ backbone ─ features ─ classifier ─ 0, 1, 2 or 3
                             ├─ turned 2 times ─┤ (all four in the     └─ what is kept
                             └─ turned 3 times ─┘  same batch)

Run      python rotation.py                       demonstration: drawn images, CPU, minutes
         python rotation.py --data path           a folder of images, or cifar10
         torchrun --nproc-per-node=8 rotation.py --data path
Reuse    from rotation import RotNet, rotate_four, rotation_loss         (needs torch only)
"""

import copy
import math
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


class RotNet(nn.Module):
    """Backbone and a linear classifier of the four rotations.

    backbone: (B, 3, H, W) -> (B, feature_dim).
    """

    def __init__(self, backbone, feature_dim):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(feature_dim, 4)

    def forward(self, rotated):
        """(4B, 3, S, S) -> logits (4B, 4). All rotations in one pass: they share BN statistics,
        which could otherwise give them away."""
        return self.classifier(self.backbone(rotated))


def rotate_four(images):
    """The four rotations of every image: (B, 3, S, S) -> (4B, 3, S, S), labels (4B,).

    Label k is k quarter turns counter-clockwise; the first B are the images as they are. Pixels
    only change places: resampling would leave traces from which the label could be read.
    """
    rotated = torch.cat([torch.rot90(images, k, (2, 3)) for k in range(4)])
    return rotated, torch.arange(4, device=images.device).repeat_interleave(len(images))


# ----------------------------------------------------------------------------------------- loss


def rotation_loss(logits, labels):
    """Cross-entropy of the rotations: (4B, 4), (4B,) -> scalar.

        L = -1/N Σ_i 1/K Σ_y log F^y(g(X_i | y))

    where g(X | y) is the image X turned y times, F^y the probability that the network gives to
    rotation y, and K = 4. Chance level: ln 4.
    """
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def solved(logits, labels):
    """Health: the fraction of rows in which the label has the highest logit. Rising, and above the
    chance level, 1 / K; if it is near 1 within the first epochs, there is a shortcut that needs no
    features of objects: (B, K), (B,) -> scalar."""
    return (logits.argmax(1) == labels).float().mean()


# --------------------------------------------------------------------------------- augmentation


def augment(images, aspect, image_size, crop, invert):
    """uint8 images (B, 3, S, S), squeezed to squares from width / height = aspect (B,) -> views
    (B, 3, image_size, image_size), which are rotated afterwards.

    crop: "shift", the authors' augmentation of CIFAR, or "resized", theirs of ImageNet. invert: the
    fraction of views made negatives (not in the paper). The light on the drawn images falls from
    above; its direction alone would tell the rotation, were it not reversed in half of the views.
    """
    from common import (central_crop, normalize, random_horizontal_flip, random_resized_crop,
                        random_solarize)

    if crop == "shift":
        x = random_shift(central_crop(images, aspect, image_size), padding=4)
    else:
        x = random_resized_crop(images, aspect, image_size, scale=(0.08, 1.0))
    x = random_horizontal_flip(x, p=0.5)
    x = random_solarize(x, p=invert, threshold=0.0)  # from 0 on, every value is inverted
    return normalize(x)


def random_shift(x, padding, offsets=None):
    """Put a border of `padding` black pixels around each image, and cut a window of the old size
    from a random place: (B, 3, H, W) -> (B, 3, H, W).

    offsets (B, 2): top and left of the windows, whole numbers from 0 to 2 · padding; random by
    default. Pixels only change places.
    """
    from common import uniform

    if offsets is None:
        offsets = uniform(len(x), 2, device=x.device, high=2 * padding + 1).long()
    top, left = offsets.unbind(1)
    windows = F.pad(x, [padding] * 4).unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)
    return windows[torch.arange(len(x), device=x.device), :, top, left]


# ------------------------------------------------------------------------------------- training


def stepwise(step, total_steps, warmup_steps, peak, drops, factor):
    """Rises linearly to `peak` over the warm-up, then is constant, except that it is multiplied by
    `factor` at each of the `drops`: fractions of the training, from 0 to 1."""
    passed = sum(step >= round(drop * total_steps) for drop in drops)
    return peak * factor**passed * min((step + 1) / max(warmup_steps, 1), 1)


def make_optimizer(model, weight_decay):
    """Biases and BN are decayed like the rest, as in the official code."""
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, nesterov=True,
                           weight_decay=weight_decay)


def train(args):
    """The four rotations of each image of a batch, once per step."""
    from common import (batch_that_fits, batches, denormalize, examples, load_checkpoint, load_data,
                        log, make_backbone, parallel, rank, save_checkpoint, save_picture, start,
                        write_log)
    from linear_probe import evaluate, load_init

    device = start(args.device, args.seed, args.deterministic)
    train_set, test_set = load_data(args.data, args.image_size, args.max_images, args.workers,
                                    device)
    args.batch_size = batch_that_fits(args, train_set)  # over all processes
    steps_per_epoch = len(train_set) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    peak_lr = args.lr * args.batch_size / 256

    backbone = make_backbone(args.arch, args.image_size)
    untrained = copy.deepcopy(backbone)  # the report's baseline
    load_init(backbone, args.init)
    model = RotNet(backbone, backbone.feature_dim)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args.weight_decay)
    view = partial(augment, image_size=args.image_size, crop=args.crop, invert=args.invert)
    step = load_checkpoint(args, train_set, model, optimizer)  # 0, or where the run goes on
    network = parallel(model, args.compile)  # DistributedDataParallel and SyncBN, if of several
    if rank() == 0:
        images, aspect = examples(train_set, device)
        rotated, _ = rotate_four(denormalize(view(images, aspect)))
        save_picture(f"{args.out}/views.png", images / 255, *rotated.chunk(4))
    saved_at = save_checkpoint(args, step, train_set, model, optimizer, backbone)
    started = step, time.monotonic()  # for the speed and the time left
    chance = math.log(4)

    for step, images, aspect in batches(train_set, args, step, device):  # seeded by step
        lr = stepwise(step, total_steps, warmup_steps, peak_lr, args.lr_drops, args.lr_factor)
        for group in optimizer.param_groups:
            group["lr"] = lr
        rotated, rotation = rotate_four(view(images, aspect))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(rotated)
        loss = rotation_loss(logits.float(), rotation)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        done, epoch_ends = step + 1, (step + 1) % steps_per_epoch == 0
        if done == 1 or done % args.print_freq == 0 or epoch_ends:
            log(args, done, total_steps, started, lr, loss, chance,
                rotations_solved=solved(logits, rotation))
        if epoch_ends or time.monotonic() - saved_at > 600:
            saved_at = save_checkpoint(args, done, train_set, model, optimizer, backbone)
    report = evaluate(backbone, untrained, train_set, test_set, args.image_size, device,
                      layers=True)
    write_log(args, {"step": total_steps, "report": report})


RECIPES = {
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
FLAGS = {  # type, lowest, highest, help, the paper's value
    "lr_drops": ([float], 0, 1, "fractions of the training at which the rate falls",
                 "0.3 0.6 0.8 on CIFAR"),
    "lr_factor": (float, 0, 1, "what the rate is multiplied by when it falls", "0.2, ImageNet 0.1"),
    "crop": (("shift", "resized"), None, None, "shift: by up to 4 pixels; resized: of random size",
             "shift on CIFAR, resized on ImageNet"),
    "invert": (float, 0, 1, "fraction of views made negatives, so that the direction of the light "
               "does not tell the rotation", "0"),
}


def parse_args(argv=None):
    from common import parse_flags

    return parse_flags("rotation", __doc__, RECIPES, FLAGS, argv)


# Sources. cifar: gidariss/FeatureLearningRotNet (rate 0.1 for 128 images; falls at epochs 60, 120
# and 160), with a ResNet. imagenet: mmselfsup's ResNet-50 (rate 0.2 for 128 images; falls at epochs
# 30 and 50; no Nesterov). The authors' code for AlexNet has 50 epochs of batch 192, rate 0.01, a
# tenth of it from epochs 15, 30 and 45 on, weight decay 5e-4, no warm-up. demo: measured on drawn
# images; cpu: not tuned.
#
# Departures from the paper: ResNets (paper: NIN and AlexNet), with one linear layer on the pooled
# features; pixels are normalised with ImageNet's mean and std on CIFAR, too.
#
# The last layers know most about rotations, but middle ones more about objects: the paper takes the
# features of the second of four blocks. With mmselfsup's ResNet-50, linear probes of the third and
# fourth stage reach 54 and 46 % on ImageNet. This is why the report has a line for each stage.

if __name__ == "__main__":
    from common import main

    main(train, parse_args)
