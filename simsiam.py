"""SimSiam: two views of an image predict each other; stop-gradient replaces BYOL's slow target.

Chen and He, "Exploring Simple Siamese Representation Learning" (2020, arXiv 2011.10566).
Survey family: self-distillation, without negatives and without a momentum encoder. What prevents
collapse: the stop-gradient, and the predictor on the side that gets the gradient.

Each image is augmented twice. One encoder, backbone and projector, maps both views to vectors, and
a predictor has to turn the vector of one view into that of the other, which is held constant: BYOL
whose target is the online network itself. Without stop-gradient or without predictor the vectors of
different images draw together, and `spread` falls (tests/test_simsiam.py).

               ┌─ augment ─ view1 ─ backbone ─ features ─ projector ─ z1 ─ predictor ─ p1 ─┐
        image ─┤                       (shared)                                            ├─ -cos
               └─ augment ─ view2 ─ backbone ─ features ─ projector ─ z2 ─ stop-gradient ──┘
                                              └─ what is kept     and with the views exchanged

Run      python simsiam.py                      demonstration: built-in images, CPU, a minute
         python simsiam.py --data path          a folder of images, or cifar10
         torchrun --nproc-per-node=8 simsiam.py --data path
Reuse    from simsiam import SimSiam, simsiam_loss      (needs torch only)

Departure from the paper: none that is known; from the official code: blur is a true Gaussian
(official: PIL's). In the official code only: the last BN of a residual block starts at 0; the
projector's last linear layer has a frozen bias, left out here because the BN after it removes it.

Measured in the demonstration, top-1 in percent (of the network at random):
built-in set, kNN 58.5 (35.4), probe 75.8 (43.0); seeds: 3
10,000 of CIFAR-10, kNN 39.1 (32.2), probe 43.4 (34.6); seeds: 3
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


class SimSiam(nn.Module):
    """Backbone, projector and predictor.

    backbone: (B, 3, H, W) -> (B, feature_dim). proj_layers: 3, or 2 as in the paper for CIFAR-10.
    The projector ends in a BN without scale and offset, which keeps z spread out. The predictor is
    a bottleneck, and has no BN at its output.
    """

    def __init__(self, backbone, feature_dim, proj_dim=2048, pred_dim=512, proj_layers=3):
        super().__init__()
        self.backbone = backbone
        layers = []
        for in_dim in [feature_dim] + [proj_dim] * (proj_layers - 1):
            layers += [nn.Linear(in_dim, proj_dim, bias=False),
                       nn.BatchNorm1d(proj_dim), nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(*layers[:-2], nn.BatchNorm1d(proj_dim, affine=False))
        self.predictor = nn.Sequential(nn.Linear(proj_dim, pred_dim, bias=False),
                                       nn.BatchNorm1d(pred_dim), nn.ReLU(inplace=True),
                                       nn.Linear(pred_dim, proj_dim))

    def forward(self, view1, view2):
        """Two (B, 3, H, W) -> predictions p1, p2 and projections z1, z2, each (B, D). One pass per
        view, so that each view has its own BN statistics, as in the official code."""
        z1, z2 = self.projector(self.backbone(view1)), self.projector(self.backbone(view2))
        return self.predictor(z1), self.predictor(z2), z1, z2


# ----------------------------------------------------------------------------------------- loss


def simsiam_loss(p1, p2, z1, z2):
    """Equation 4 of the paper, averaged over the batch: four (B, D) -> scalar, -1 to 1.

        ½ D(p1, stopgrad(z2)) + ½ D(p2, stopgrad(z1))        with D(p, z) = -cos(p, z)

    Vectors at right angles give 0. At -1 within the first steps: collapse.
    """
    cos1 = F.cosine_similarity(p1, z2.detach(), dim=1)  # stop-gradient
    cos2 = F.cosine_similarity(p2, z1.detach(), dim=1)
    return -(cos1.mean() + cos2.mean()) / 2


@torch.no_grad()
def spread(z):
    """Health: √D · std over the batch of z / ‖z‖, mean over dimensions: (B, D) -> scalar. Near 1
    where z ends in BN; below that, but steady, where it does not; towards 0: collapse."""
    return z.shape[1] ** 0.5 * F.normalize(z, dim=1).std(0).mean()


# --------------------------------------------------------------------------------- augmentation


def make_augment(image_size, crop_scale, jitter_strength, blur):
    """The paper's augmentation, that of MoCo v2; both views are drawn from it."""
    from common import (Augment, ColorJitter, GaussianBlur, Normalize, RandomGrayscale,
                        RandomHorizontalFlip, RandomResizedCrop)

    s = jitter_strength
    return Augment([
        RandomResizedCrop(image_size, scale=(crop_scale, 1.0)),
        ColorJitter(0.4 * s, 0.4 * s, 0.4 * s, 0.1 * s, p=0.8),
        RandomGrayscale(0.2),
        GaussianBlur(blur, sigma=(0.1, 2.0)),
        RandomHorizontalFlip(0.5),
        Normalize(),
    ])


# ------------------------------------------------------------------------------------- training


def cosine(step, total_steps, warmup_steps, start, end=0.0):
    """Rises linearly to `start` over the warm-up, then falls to `end` on half a cosine."""
    if step < warmup_steps:
        return start * (step + 1) / warmup_steps
    t = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


def make_optimizer(model, weight_decay):
    """Two groups: encoder and predictor. Everything is decayed, biases and BN too."""
    encoder = [*model.backbone.parameters(), *model.projector.parameters()]
    groups = [{"params": encoder}, {"params": model.predictor.parameters()}]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=weight_decay)


def train(args):
    """Algorithm 1 of the paper, once per step."""
    from common import Run, gather, make_backbone

    run = Run("simsiam", args)
    backbone = run.init(make_backbone(args.arch, args.image_size, zero_init_residual=True))
    model = SimSiam(backbone, backbone.feature_dim, args.proj_dim, args.pred_dim, args.proj_layers)
    optimizer = make_optimizer(model, args.weight_decay)
    augment = make_augment(args.image_size, args.crop_scale, args.jitter_strength, args.blur)
    network = run.start(model, optimizer, backbone)
    run.save_views(augment, augment)
    chance = 0.0

    for step, images, aspect in run.steps():
        # one rate for each epoch, except while it warms up, which the paper does not need
        epoch_start = max(step - step % run.steps_per_epoch, min(step, run.warmup_steps))
        lr = cosine(epoch_start, run.total_steps, run.warmup_steps, run.peak_lr)
        encoder_group, predictor_group = optimizer.param_groups
        encoder_group["lr"], predictor_group["lr"] = lr, run.peak_lr  # the predictor's is constant
        view1, view2 = augment(images, aspect), augment(images, aspect)
        with run.autocast():
            p1, p2, z1, z2 = network(view1, view2)
        loss = simsiam_loss(p1.float(), p2.float(), z1.float(), z2.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if run.prints(step):
            run.log(step, loss, lr, chance, spread=spread(gather(z1.detach().float())))
    run.finish()


# Sources: imagenet: the paper and facebookresearch/simsiam. cifar: the paper's appendix on
# CIFAR-10; what it does not name, as for ImageNet. demo: smaller heads and a higher rate, as
# measured on the built-in set.
RECIPES = {
    "recipe":          ("demo",     "cifar",    "imagenet"),
    "arch":            ("resnet8",  "resnet18", "resnet50"),
    "image_size":      (32,         32,         224),
    "epochs":          (5,          800,        100),
    "warmup_epochs":   (0,          0,          0),
    "batch_size":      (64,         512,        512),
    "lr":              (0.6,        0.03,       0.05),
    "weight_decay":    (5e-4,       5e-4,       1e-4),
    "proj_layers":     (2,          2,          3),
    "proj_dim":        (512,        2048,       2048),
    "pred_dim":        (128,        512,        512),
    "crop_scale":      (0.35,       0.2,        0.2),
    "jitter_strength": (1.0,        1.0,        1.0),
    "blur":            (0.0,        0.0,        0.5),
}


def parse_args(argv=None):
    from common import ArgumentParser, number

    parser = ArgumentParser(__doc__, RECIPES)
    add = parser.add_argument
    add("--proj-layers", type=number(int, 1), help="layers of the projector (paper: 3; CIFAR 2)")
    add("--proj-dim", type=number(int, 1), help="length of z and p (paper: 2048)")
    add("--pred-dim", type=number(int, 1), help="hidden width of the predictor (paper: 512)")
    add("--crop-scale", type=number(float, 0, 1, above=True),
        help="area of the smallest crop, as a fraction of the image (paper: 0.2)")
    add("--jitter-strength", type=number(float, 0, 2.5), help="of the colour jitter (paper: 1)")
    add("--blur", type=number(float, 0, 1), help="fraction of views that are blurred (paper: 0.5)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    from common import main

    main(train, parse_args)
