"""RotNet: by how many quarter turns was this image rotated?

Gidaris et al., "Unsupervised Representation Learning by Predicting Image Rotations" (2018,
arXiv 1803.07728). Survey family: context-based pretext task. What prevents collapse: the labels.

Each image is shown at 0, 90, 180 and 270 degrees, and a classifier has to say which. To see which
way is up it has to find the objects and to know how they stand, so the backbone learns shapes.
Images without an up-direction (from satellites or microscopes) make the task impossible.

                             ┌─ turned 0 times ─┐
        image ─── augment ───┼─ turned 1 time  ─┼─ backbone ─ features ─ classifier ─ 0, 1, 2 or 3
                             ├─ turned 2 times ─┤ (all four in the     └─ what is kept
                             └─ turned 3 times ─┘  same batch)

Run      python rotation.py                       demonstration: built-in images, CPU, a minute
         python rotation.py --data path           a folder of images, or cifar10
         torchrun --nproc-per-node=8 rotation.py --data path
Reuse    from rotation import RotNet, rotate_four, rotation_loss         (needs torch only)

The last layer knows rotations best and objects less well than a middle one: the paper reads the
second of four blocks; with a ResNet-50 on ImageNet a linear probe of its third and fourth stage
gives 54 and 46 % (mmselfsup). So the report at the end has every stage.

The built-in images have a shortcut: light falls from above, and its direction alone tells the
rotation. So half of the demonstration's views are negatives (--invert); without them, see
`rotation-no-negatives` in tests/results/README.md.

Departures from the paper: ResNets instead of NIN and AlexNet, with one linear layer on the pooled
features; pixels are normalised with ImageNet's mean and std on CIFAR, too.

Measured in the demonstration, top-1 in percent (of the network at random):
built-in set, kNN 46.9 (35.4), probe 65.5 (43.0); seeds: 3
10,000 of CIFAR-10, kNN 34.6 (32.2), probe 38.5 (34.6); seeds: 3
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


class RotNet(nn.Module):
    """Backbone and a linear classifier of four rotations.

    backbone: (B, 3, H, W) -> (B, feature_dim).
    """

    def __init__(self, backbone, feature_dim):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(feature_dim, 4)

    def forward(self, rotated):
        """(4B, 3, S, S) -> logits (4B, 4). In one pass, so that BN cannot tell rotations apart."""
        return self.classifier(self.backbone(rotated))


def rotate_four(images):
    """The four quarter turns of every image: (B, 3, S, S) -> (4B, 3, S, S), labels (4B,).

    Label k is k quarter turns counter-clockwise; the first B are the images as they are. Pixels
    change places and none is computed: resampling would leave traces that give the label away.
    """
    rotated = torch.cat([torch.rot90(images, k, (2, 3)) for k in range(4)])
    return rotated, torch.arange(4, device=images.device).repeat_interleave(len(images))


# ----------------------------------------------------------------------------------------- loss


def rotation_loss(logits, labels):
    """Cross-entropy of the rotations: (4B, 4), (4B,) -> scalar.

        L = -1/N Σ_i 1/K Σ_y log F^y(g(X_i | y))

    where g(X | y) is the image X turned y times, F^y the probability that the network gives to y,
    and K = 4. Guessing gives ln 4.
    """
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def accuracy(logits, labels):
    """Health: the fraction of labels that are found. Above chance and rising; if it is close to 1
    within the first epochs, there is a shortcut: (B, classes), (B,) -> scalar."""
    return (logits.argmax(1) == labels).float().mean()


# --------------------------------------------------------------------------------- augmentation


def shift(x, offsets, padding):
    """Pad with `padding` black pixels and crop to the old size: (B, 3, H, W) -> (B, 3, H, W).

    offsets (B, 2): top and left of the crops, whole numbers from 0 to 2 · padding. No resampling.
    """
    top, left = offsets.unbind(1)
    padded = F.pad(x, [padding] * 4)
    windows = padded.unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)  # a view, all crops
    return windows[torch.arange(len(x), device=x.device), :, top, left]


@dataclass
class RandomShift:
    """torchvision's RandomCrop(size, padding), each image with its own offsets."""
    padding: int

    def draw(self, images, aspect):
        from common import uniform

        offsets = uniform(len(images), 2, device=images.device, high=2 * self.padding + 1).long()
        return [(partial(shift, padding=self.padding), offsets)]


def make_augment(image_size, crop, invert):
    """The authors' augmentations of CIFAR (crop "shift") and ImageNet ("resized"), and then, where
    the light gives the rotation away, negatives of some views. Views are turned after it."""
    from common import (Augment, CentralCrop, Normalize, RandomHorizontalFlip, RandomResizedCrop,
                        RandomSolarize)

    crops = {"shift": [CentralCrop(image_size), RandomShift(4)],
             "resized": [RandomResizedCrop(image_size, scale=(0.08, 1.0))]}
    return Augment([*crops[crop], RandomHorizontalFlip(0.5), RandomSolarize(invert, threshold=0.0),
                    Normalize()])


# ------------------------------------------------------------------------------------- training


def stepwise(step, total_steps, warmup_steps, start, drops, factor):
    """Rises linearly to `start` over the warm-up, and is multiplied by `factor` from each of the
    `drops` on, which are parts of the training."""
    passed = sum(step >= round(drop * total_steps) for drop in drops)
    return start * factor**passed * min((step + 1) / max(warmup_steps, 1), 1)


def make_optimizer(model, weight_decay):
    """Biases and BN are decayed like the rest, as in the official code."""
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, nesterov=True,
                           weight_decay=weight_decay)


def train(args):
    """Four turns of each image of a batch, once per step."""
    from common import Run, denormalize, make_backbone

    run = Run("rotation", args)
    backbone = run.init(make_backbone(args.arch, args.image_size))
    model = RotNet(backbone, backbone.feature_dim)
    optimizer = make_optimizer(model, args.weight_decay)
    augment = make_augment(args.image_size, args.crop, args.invert)
    network = run.start(model, optimizer, backbone)
    images, aspect = run.sample()
    rotated, _ = rotate_four(denormalize(augment(images, aspect)))
    run.save_picture("views.png", images / 255, *rotated.chunk(4))
    chance = math.log(4)

    for step, images, aspect in run.steps():
        lr = stepwise(step, run.total_steps, run.warmup_steps, run.peak_lr, args.lr_drops,
                      args.lr_factor)
        for group in optimizer.param_groups:
            group["lr"] = lr
        rotated, rotation = rotate_four(augment(images, aspect))
        with run.autocast():
            logits = network(rotated)
        loss = rotation_loss(logits.float(), rotation)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if run.prints(step):
            run.log(step, loss, lr, chance, accuracy=accuracy(logits, rotation))
    run.finish(layers=True)


# Sources: cifar: gidariss/FeatureLearningRotNet (rate 0.1 for 128 images; drops at epochs 60, 120
# and 160). imagenet: mmselfsup's ResNet-50 (rate 0.2 for 128 images; drops at epochs 30 and 50).
# The paper's AlexNet: 50 epochs of batch 192, rate 0.01, a tenth of it from epochs 15, 30 and 45
# on, decay 5e-4, no warm-up. demo: measured.
RECIPES = {
    "recipe":        ("demo",           "cifar",          "imagenet"),
    "arch":          ("resnet8",        "resnet18",       "resnet50"),
    "image_size":    (32,               32,               224),
    "epochs":        (3,                200,              70),
    "warmup_epochs": (0.2,              0,                5),
    "batch_size":    (64,               128,              128),  # images; four times as many views
    "lr":            (0.2,              0.2,              0.4),
    "lr_drops":      ([0.7],            [0.3, 0.6, 0.8],  [3 / 7, 5 / 7]),
    "lr_factor":     (0.1,              0.2,              0.1),
    "weight_decay":  (5e-4,             5e-4,             1e-4),
    "crop":          ("resized",        "shift",          "resized"),
    "invert":        (0.5,              0.0,              0.0),
}


def parse_args(argv=None):
    from common import ArgumentParser, number

    parser = ArgumentParser(__doc__, RECIPES)
    add = parser.add_argument
    add("--lr-drops", type=number(float, 0, 1), nargs="*", metavar="PART",
        help="parts of the training after which the rate falls (paper: 0.3 0.6 0.8, CIFAR)")
    add("--lr-factor", type=number(float, 0, 1),
        help="by which it is then multiplied (paper: 0.2, CIFAR)")
    add("--crop", choices=("shift", "resized"),
        help="shift: by up to 4 pixels (paper: CIFAR); resized: of random size (paper: ImageNet)")
    add("--invert", type=number(float, 0, 1), help="fraction of views made negatives, against the "
        "shortcut of light that falls from above (paper: 0)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    from common import main

    main(train, parse_args)
