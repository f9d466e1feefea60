# SPDX-License-Identifier: MIT
"""SimSiam: from one view's vector, predict that of the other view, held constant by stop-gradient.

Chen and He, "Exploring Simple Siamese Representation Learning" (2020, arXiv 2011.10566).
Survey family: self-distillation, without negatives and without a moving average. What prevents
collapse: the stop-gradient, and the predictor on the side that gets the gradient.

Each image is augmented twice. One encoder, that is, backbone and projector, maps both views to
vectors. From the vector of one view a predictor has to produce that of the other, which is held
constant. This is BYOL with the online network itself as the target. A constant output would have
the lowest loss, but training does not end up there; without stop-gradient or predictor, the
vectors of different images draw together (tests/test_simsiam.py).

               ┌─ augment ─ view1 ─ backbone ─ features ─ projector ─ z1 ─ predictor ─ p1 ─┐
        image ─┤                       (shared)                                            ├─ -cos
               └─ augment ─ view2 ─ backbone ─ features ─ projector ─ z2 ─ stop-gradient ──┘
                                              └─ used after training  and with the views exchanged

Run      python simsiam.py                      demonstration: synthetic images, CPU, minutes
         python simsiam.py --data path          a folder of images, or cifar10
         torchrun --nproc-per-node=8 simsiam.py --data path
Reuse    from simsiam import SimSiam, simsiam_loss, make_optimizer, cosine_schedule
         (needs torch only). `train` shows one step, from the learning rates, which make_optimizer
         leaves at 0, to optimizer.step(). The predictor's rate stays constant.
"""

import copy
import math
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


class SimSiam(nn.Module):
    """Backbone, projector and predictor.

    backbone: (B, 3, H, W) -> (B, feature_dim). proj_layers: 3, or 2 as in the paper for CIFAR-10.
    The projector's last BN has neither scale nor offset; this BN alone does not prevent collapse.
    The predictor is a bottleneck, and does not end in BN.
    """

    def __init__(self, backbone, feature_dim, proj_dim=2048, pred_dim=512, proj_layers=3):
        super().__init__()
        self.backbone = backbone
        layers = []
        in_dim = feature_dim
        for _ in range(proj_layers - 1):
            layers.append(nn.Linear(in_dim, proj_dim, bias=False))
            layers.append(nn.BatchNorm1d(proj_dim))
            layers.append(nn.ReLU(inplace=True))
            in_dim = proj_dim
        layers.append(nn.Linear(in_dim, proj_dim, bias=False))
        layers.append(nn.BatchNorm1d(proj_dim, affine=False))
        self.projector = nn.Sequential(*layers)
        self.predictor = nn.Sequential(
            nn.Linear(proj_dim, pred_dim, bias=False),
            nn.BatchNorm1d(pred_dim),
            nn.ReLU(inplace=True),
            nn.Linear(pred_dim, proj_dim))

    def forward(self, view1, view2):
        """Two (B, 3, H, W) -> predictions p1, p2 and projections z1, z2, each (B, D). One pass per
        view, so that each view has its own BN statistics, as in the official code."""
        z1 = self.projector(self.backbone(view1))
        z2 = self.projector(self.backbone(view2))
        p1 = self.predictor(z1)
        p2 = self.predictor(z2)
        return p1, p2, z1, z2


# ----------------------------------------------------------------------------------------- loss


def simsiam_loss(p1, p2, z1, z2):
    """Equation 4 of the paper, averaged over the batch: four (B, D) -> scalar, -1 to 1.

        ½ D(p1, stopgrad(z2)) + ½ D(p2, stopgrad(z1))        with D(p, z) = -cos(p, z)

    Chance level: 0, that of vectors at right angles. At -1 within the first steps: collapse.
    """
    cos1 = F.cosine_similarity(p1, z2.detach(), dim=1)  # stop-gradient
    cos2 = F.cosine_similarity(p2, z1.detach(), dim=1)
    return -(cos1.mean() + cos2.mean()) / 2


@torch.no_grad()
def spread(z):
    """Health: √D times the standard deviation of z / ‖z‖ over the batch, averaged over the D
    dimensions: (B, D) -> scalar. Near 1 where z ends in BN, lower but steady where it does not.
    Falling to 0, it shows collapse: all images get the same vector."""
    return z.shape[1] ** 0.5 * F.normalize(z, dim=1).std(0).mean()


# --------------------------------------------------------------------------------- augmentation


def augment(images, aspect, image_size, crop_scale, jitter_strength, blur):
    """The paper's augmentation (MoCo v2's), of both views: uint8 images (B, 3, S, S), resized to
    squares, and aspect (B,), their original width / height -> views (B, 3, image_size, image_size).
    """
    from common import (color_jitter, gaussian_blur, normalize, random_grayscale,
                        random_horizontal_flip, random_resized_crop)

    s = jitter_strength
    x = random_resized_crop(images, aspect, image_size, scale=(crop_scale, 1.0))
    x = color_jitter(x, 0.4 * s, 0.4 * s, 0.4 * s, 0.1 * s, p=0.8)
    x = random_grayscale(x, p=0.2)
    x = gaussian_blur(x, p=blur, kernel_size=13, sigma=(0.1, 2.0))  # radius: 3 times the largest σ
    x = random_horizontal_flip(x, p=0.5)
    return normalize(x)


# ------------------------------------------------------------------------------------- training


def cosine_schedule(step, total_steps, warmup_steps, base, end=0.0):
    """Rises linearly to `base` over the warm-up, then moves to `end` on half a cosine."""
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end + (base - end) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model, weight_decay):
    """Two groups, since their rates differ: encoder and predictor. Everything is decayed, biases
    and BN too."""
    encoder = [*model.backbone.parameters(), *model.projector.parameters()]
    groups = [{"params": encoder}, {"params": model.predictor.parameters()}]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=weight_decay)


def train(args):
    """Algorithm 1 of the paper, once per step."""
    # Imported here, so that this file alone, copied elsewhere, can be imported without them.
    from common import (SAVE_SECONDS, autocast, batch_that_fits, batches, gather, load_checkpoint,
                        load_data, log, log_knn, make_backbone, open_run, parallel, save_checkpoint,
                        save_views, start, warmup_that_fits, write_log)
    from linear_probe import evaluate, load_backbone, quick_knn

    device = start(args.device, args.seed)
    train_set, test_set = load_data(args, device)
    args.batch_size = batch_that_fits(args.batch_size, train_set)  # over all processes
    steps_per_epoch = len(train_set) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = warmup_that_fits(round(args.warmup_epochs * steps_per_epoch), total_steps)
    peak_lr = args.lr * args.batch_size / 256

    backbone = make_backbone(args.arch, args.image_size, zero_init_residual=True)
    untrained = copy.deepcopy(backbone)  # the report's baseline
    if args.init:
        load_backbone(args.init, network=backbone)
    model = SimSiam(backbone, backbone.feature_dim, args.proj_dim, args.pred_dim, args.proj_layers)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args.weight_decay)
    make_view = partial(augment, image_size=args.image_size, crop_scale=args.crop_scale,
                        jitter_strength=args.jitter_strength, blur=args.blur)
    chance = 0.0

    open_run(args)
    first_step = load_checkpoint(args, train_set, model, optimizer)  # 0, or where to resume
    network = parallel(model, args.compile)  # DDP and SyncBN when there are several processes
    save_views(args, train_set, device, make_view, make_view)
    untrained_knn = None  # measured when the first epoch ends
    started = saved_at = time.monotonic()

    for step, images, aspect in batches(train_set, args, first_step, device):  # seeds each step
        schedule_step = step
        if step >= warmup_steps:  # one rate for each epoch, as in the official code
            epoch_start = step - step % steps_per_epoch
            schedule_step = max(epoch_start, warmup_steps)  # a warm-up may end within an epoch
        lr = cosine_schedule(schedule_step, total_steps, warmup_steps, peak_lr)
        encoder_group, predictor_group = optimizer.param_groups
        encoder_group["lr"] = lr
        predictor_group["lr"] = peak_lr  # constant: no warm-up, no decay
        view1 = make_view(images, aspect)
        view2 = make_view(images, aspect)
        with autocast(device):  # the network only: the loss needs float32
            p1, p2, z1, z2 = network(view1, view2)
        loss = simsiam_loss(p1.float(), p2.float(), z1.float(), z2.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        done = step + 1
        epoch_ends = done % steps_per_epoch == 0
        if done == 1 or done % args.print_freq == 0 or epoch_ends:
            log(args, done, total_steps, first_step, started, lr=lr, loss=loss, chance=chance,
                spread=spread(gather(z1.float())))
        if epoch_ends:
            paused = time.monotonic()
            if untrained_knn is None:
                untrained_knn = quick_knn(untrained, train_set, test_set, args.eval_size, device,
                                          calibrate=True)
            trained_knn = quick_knn(backbone, train_set, test_set, args.eval_size, device)
            log_knn(args, done, total_steps, trained_knn, untrained_knn)
            started += time.monotonic() - paused  # images/s leave the kNN out
        if time.monotonic() - saved_at > SAVE_SECONDS:
            save_checkpoint(args, done, train_set, model, optimizer, backbone)
            saved_at = time.monotonic()
    save_checkpoint(args, total_steps, train_set, model, optimizer, backbone)
    report = evaluate(backbone, untrained, train_set, test_set, args.eval_size, device)
    write_log(args, {"step": total_steps, "report": report})


RECIPES = {  # what differs between recipes; every other flag has a single default
    "recipe":          ("demo",     "cpu",      "cifar",     "imagenet"),
    "arch":            ("resnet8",  "resnet8",  "resnet18",  "resnet50"),
    "image_size":      (32,         32,         32,          224),
    "eval_size":       (32,         32,         32,          224),
    "epochs":          (7,          20,         800,         100),
    "warmup_epochs":   (1,          1,          0,           0),
    "batch_size":      (64,         64,         512,         512),
    "lr":              (0.6,        0.3,        0.03,        0.05),
    "weight_decay":    (5e-4,       5e-4,       5e-4,        1e-4),
    "proj_layers":     (2,          2,          2,           3),
    "proj_dim":        (512,        512,        2048,        2048),
    "pred_dim":        (128,        128,        512,         512),
    "crop_scale":      (0.35,       0.2,        0.2,         0.2),
    "blur":            (0.0,        0.0,        0.0,         0.5),
}


def parse_args(argv=None):
    from common import make_parser, parse_with_recipe

    parser = make_parser("simsiam", __doc__, RECIPES)
    parser.epilog = ("The log's `spread` should stay near 1: at 0 all images have the same "
                     "embedding (collapse).")
    add = parser.add_argument
    add("--proj-layers", type=int, help="layers of the projector; paper: 3, for CIFAR-10 2")
    add("--proj-dim", type=int, help="length of z and p; paper: 2048")
    add("--pred-dim", type=int, help="hidden width of the predictor; paper: 512")
    add("--crop-scale", type=float, help="smallest crop, fraction of the image's area; paper: 0.2")
    add("--jitter-strength", type=float, default=1.0,
        help="strength of the color jitter, s; paper: 1")
    add("--blur", type=float, help="fraction of views that are blurred; paper: 0.5")
    return parse_with_recipe(parser, RECIPES, argv)


# ------------------------------------------------------------------------- sources and departures

# Sources. imagenet: the paper and facebookresearch/simsiam (linear probe 68.1 %). The predictor's
# rate is constant, as in the official command (--fix-pred-lr) and the last row of the paper's table
# 1. cifar: the paper's appendix on CIFAR-10; where it is silent, its ImageNet settings. demo:
# measured on the synthetic images. cpu: chosen without a search.
#
# Departures from the paper: crops are taken from a square canvas of 8/7 of the view's side
# (official: from the whole image), so that small crops are less sharp, and elongated images lose
# more (cut them beforehand). From the official code: training is in bfloat16 on CUDA (official:
# float32); blur is a true Gaussian that reflects the border (official: PIL's, made of box blurs,
# which repeats the edge pixels); the projector's last linear layer has no frozen bias, which the BN
# after it would remove, and its hidden layers are as wide as z (official: as the features). As in
# the paper's appendix, a residual block's last BN starts at 0. In the official code only: the
# projector's last BN has neither scale nor offset.

if __name__ == "__main__":
    from common import main

    main(train, parse_args)
