# SPDX-License-Identifier: MIT
"""BYOL: from one view, predict what a slow copy of the network makes of the other view.

Grill et al., "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning" (2020,
arXiv 2006.07733).
Survey family: self-distillation, without negatives. What prevents collapse: the predictor, on one
side only, and a target that changes slowly and gets no gradient.

Each image is augmented twice. The target network maps one view to a vector, and the online network
with its predictor has to produce that vector from the other view. The target is not trained: its
weights are an exponential moving average (EMA) of the online network's. A constant output would
have the lowest loss, but training does not end up there, unless the predictor is left out
(tests/test_byol.py).

           ┌─ augment1 ─ view1 ─ backbone ─ features ─ projector ─ predictor ─ p1 ─────┐
           │                   online │     └─ used after training                     │
    image ─┤                          ↓ EMA of the weights                             ├─ 2 - 2 cos
           │                   target │                                                │
           └─ augment2 ─ view2 ─ backbone ─ features ─ projector ─ z2 ─ stop-gradient ─┘
                                                               and with the views exchanged

Run      python byol.py                         demonstration: synthetic images, CPU, minutes
         python byol.py --data path             a folder of images, or cifar10
         torchrun --nproc-per-node=8 byol.py --data path
Reuse    from byol import BYOL, byol_loss, ema_update, make_optimizer, cosine_schedule
         (needs torch only). `train` shows one step, from the learning rate, which make_optimizer
         leaves at 0, to ema_update, with an EMA momentum that rises to 1.
"""

import copy
import math
import time
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


class BYOL(nn.Module):
    """Online network, its predictor, and the target network, which has no predictor.

    backbone: (B, 3, H, W) -> (B, feature_dim). The target stays in training mode: it, too,
    normalizes by the batch's statistics, and it keeps running statistics of its own.
    """

    def __init__(self, backbone, feature_dim, proj_dim=256, hidden_dim=4096):
        super().__init__()
        projector = mlp(feature_dim, hidden_dim, proj_dim)
        self.online = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
        self.target = without_dropout(copy.deepcopy(self.online))
        self.target.requires_grad_(False)  # only ema_update changes it
        self.predictor = mlp(proj_dim, hidden_dim, proj_dim)

    def forward(self, view1, view2):
        """Two (B, 3, H, W) -> predictions p1, p2 and the target's z1, z2, each (B, D). One pass per
        view, so that each view has its own BN statistics, as in the official code."""
        p1 = self.predictor(self.online(view1))
        p2 = self.predictor(self.online(view2))
        with torch.no_grad():
            z1 = self.target(view1)
            z2 = self.target(view2)
        return p1, p2, z1, z2


def mlp(in_dim, hidden_dim, out_dim):
    """Projector or predictor. As in the official code, the first layer has a bias, and the second
    has neither bias nor BN."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, out_dim, bias=False))


def without_dropout(network):
    """Switch off the network's dropout and stochastic depth, in training mode too: a target that
    draws at random would differ from itself from one pass to the next."""
    for module in network.modules():
        # by name, so that neither torchvision nor timm need be imported
        if type(module).__name__.startswith(("Dropout", "StochasticDepth", "DropPath")):
            module.p = 0.0  # torch's and torchvision's name
            module.drop_prob = 0.0  # timm's
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return network


# ----------------------------------------------------------------------------------------- loss


def byol_loss(p1, p2, z1, z2):
    """Squared distance of unit vectors, equation 2 of the paper, plus the same with the views
    exchanged, averaged over the batch: four (B, D) -> scalar, 0 to 8.

        ‖p̄1 - z̄2‖² + ‖p̄2 - z̄1‖²  =  4 - 2 cos(p1, z2) - 2 cos(p2, z1)        with v̄ = v / ‖v‖

    The z are constants: stop-gradient. Chance level: 4, that of vectors at right angles. Other
    texts leave out the 4, and some halve the rest.
    """
    p1 = F.normalize(p1, dim=1)
    p2 = F.normalize(p2, dim=1)
    z1 = F.normalize(z1.detach(), dim=1)  # stop-gradient
    z2 = F.normalize(z2.detach(), dim=1)
    distances = (p1 - z2).square().sum(1) + (p2 - z1).square().sum(1)
    return distances.mean()


@torch.no_grad()
def spread(z):
    """Health: √D times the standard deviation of z / ‖z‖ over the batch, averaged over the D
    dimensions: (B, D) -> scalar. Near 1 where z ends in BN, lower but steady where it does not.
    Falling to 0, it shows collapse: all images get the same vector."""
    return z.shape[1] ** 0.5 * F.normalize(z, dim=1).std(0).mean()


# --------------------------------------------------------------------------------- augmentation


def augment(images, aspect, image_size, crop_scale, jitter_strength, blur, solarize):
    """The paper's augmentation: uint8 images (B, 3, S, S), resized to squares, and aspect (B,),
    their original width / height -> views (B, 3, image_size, image_size). The two views differ in
    blur and solarize: the fractions of views that are blurred, and whose bright pixels are
    inverted.
    """
    from common import (color_jitter, gaussian_blur, normalize, random_grayscale,
                        random_horizontal_flip, random_resized_crop, random_solarize)

    s = jitter_strength
    x = random_resized_crop(images, aspect, image_size, scale=(crop_scale, 1.0),
                            interpolation="bicubic" if image_size > 64 else "bilinear")
    x = random_horizontal_flip(x, p=0.5)
    x = color_jitter(x, 0.4 * s, 0.4 * s, 0.2 * s, 0.1 * s, p=0.8)
    x = random_grayscale(x, p=0.2)
    x = gaussian_blur(x, p=blur, sigma=(0.1, 2.0))
    x = random_solarize(x, p=solarize)
    return normalize(x)


# ------------------------------------------------------------------------------------- training


class LARS(torch.optim.Optimizer):
    """SGD with momentum and a learning rate for each tensor (You et al., 1708.03888):

        g ← g + weight_decay · w;   v ← momentum · v + η · |w| / |g| · g;   w ← w - lr · v

    lr multiplies v after the momentum update, as in Barlow Twins' official code; in SimCLR's it
    multiplies the gradient before it enters v. A parameter group with adapt=False gets plain SGD
    with momentum.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.9, eta=0.001, adapt=True):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta,
                                      adapt=adapt))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            # torch._foreach_*: a few kernels for all tensors, instead of a few for each
            grads = [p.grad for p in params]
            grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            if group["adapt"]:
                w_norm = torch.stack(torch._foreach_norm(params))
                g_norm = torch.stack(torch._foreach_norm(grads))
                trust = torch.where((w_norm > 0) & (g_norm > 0), group["eta"] * w_norm / g_norm, 1)
                torch._foreach_mul_(grads, list(trust.unbind()))
            for p in params:
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])
        return loss


def cosine_schedule(step, total_steps, warmup_steps, base, end=0.0):
    """Rises linearly to `base` over the warm-up, then moves to `end` on half a cosine."""
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end + (base - end) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def ema_update(target, online, ema_momentum):
    """target ← ema_momentum · target + (1 - ema_momentum) · online, parameters only: BN statistics
    are each network's own."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - ema_momentum)


def make_optimizer(name, model, weight_decay):
    """Biases and BN get neither weight decay nor LARS's adaptation."""
    weights = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    others = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    if name == "lars":
        groups[1]["adapt"] = False
        return LARS(groups, lr=0.0, weight_decay=weight_decay)
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
    model = BYOL(backbone, backbone.feature_dim, args.proj_dim, args.hidden_dim)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(args.optimizer, model, args.weight_decay)
    augment_both = partial(augment, image_size=args.image_size, crop_scale=args.crop_scale,
                           jitter_strength=args.jitter_strength)
    augment1 = partial(augment_both, blur=args.blur1, solarize=0.0)
    augment2 = partial(augment_both, blur=args.blur2, solarize=args.solarize2)
    chance = 4.0

    open_run(args)
    first_step = load_checkpoint(args, train_set, model, optimizer)  # 0, or where to resume
    network = parallel(model, args.compile)  # DDP and SyncBN when there are several processes
    save_views(args, train_set, device, augment1, augment2)
    untrained_knn = None  # measured when the first epoch ends
    started = saved_at = time.monotonic()

    for step, images, aspect in batches(train_set, args, first_step, device):  # seeds each step
        lr = cosine_schedule(step, total_steps, warmup_steps, peak_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        ema_momentum = cosine_schedule(step, total_steps, warmup_steps=0,
                                       base=args.ema_momentum, end=1.0)
        view1 = augment1(images, aspect)
        view2 = augment2(images, aspect)
        with autocast(device):  # the network only: the loss needs float32
            p1, p2, z1, z2 = network(view1, view2)
        loss = byol_loss(p1.float(), p2.float(), z1.float(), z2.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update(model.target, model.online, ema_momentum)

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
    "epochs":          (8,          20,         200,         100),
    "warmup_epochs":   (1,          1,          10,          10),
    "batch_size":      (32,         64,         512,         512),
    "optimizer":       ("sgd",      "sgd",      "sgd",       "lars"),
    "lr":              (0.8,        0.4,        0.03,        0.45),
    "weight_decay":    (5e-4,       5e-4,       2e-3,        1e-6),
    "ema_momentum":    (0.9,        0.98,       0.99,        0.9987),
    "hidden_dim":      (512,        512,        1024,        4096),
    "crop_scale":      (0.35,       0.2,        0.08,        0.08),
    "jitter_strength": (1.25,       1.0,        1.0,         1.0),
    "blur1":           (0.0,        0.0,        0.0,         1.0),
    "blur2":           (0.0,        0.0,        0.0,         0.1),
    "solarize2":       (0.0,        0.0,        0.2,         0.2),
}


def parse_args(argv=None):
    from common import make_parser, parse_with_recipe

    parser = make_parser("byol", __doc__, RECIPES)
    parser.epilog = ("The log's `spread` should stay steady, between 0.65 and 1: at 0 all images "
                     "have the same embedding (collapse).")
    add = parser.add_argument
    add("--optimizer", choices=["sgd", "lars"], help="paper: lars")
    add("--ema-momentum", type=float, help="weight of the old target in the average, τ, in the "
        "first step; it rises to 1; paper: 0.99 for 100 or 300 epochs, 0.996 for 1000")
    add("--hidden-dim", type=int, help="width of projector and predictor; paper: 4096")
    add("--proj-dim", type=int, default=256, help="length of z and p; paper: 256")
    add("--crop-scale", type=float, help="smallest crop, fraction of the image's area; paper: 0.08")
    add("--jitter-strength", type=float, help="strength of the color jitter, s; paper: 1")
    add("--blur1", type=float, help="fraction of first views that are blurred; paper: 1")
    add("--blur2", type=float, help="fraction of second views that are blurred; paper: 0.1")
    add("--solarize2", type=float, help="fraction of second views that are solarized; paper: 0.2")
    return parse_with_recipe(parser, RECIPES, argv)


# ------------------------------------------------------------------------- sources and departures

# Sources. imagenet: the paper and deepmind-research/byol for 100 epochs (there batch 4096 and EMA
# 0.99; the average covers as many images at batch 512 with 0.99^(1/8), arXiv 2307.13813). 1000
# epochs (linear probe 74.3 %; by the code's README 74.0 to 74.5): --epochs 1000 --lr 0.2
# --weight-decay 1.5e-6 --ema-momentum 0.9995 (there 0.996). cifar: the paper's augmentation without
# blur and an average from 0.99, as in solo-learn; heads, SGD and batch of lightly's CIFAR-10
# benchmark, with a quarter of its rate and four times its decay, since its loss is a quarter of
# this one. demo: measured on the synthetic images, where so few steps need a fast target; with a
# jitter of 1, some seeds end with features of an image's contrast instead of its pattern. cpu:
# chosen without a search.
#
# Departures from the paper: views of at most 64 pixels are resized bilinearly (official: bicubic),
# larger ones with antialiasing (official: without); crops are taken from a square canvas of 8/7 of
# the view's side (official: from the whole image), so that small crops are less sharp, and
# elongated images lose more (cut them beforehand); brightness is scaled (official: shifted),
# contrast is relative to the mean gray (official: per channel), saturation is changed without HSV;
# blur reflects the border (official: zeros); training is in bfloat16 on CUDA (official: float32);
# the target starts as a copy (official: from weights of its own, said to make no difference). A
# residual block's last BN starts at 0 as in the official code, whose README says that the paper's
# results were obtained without that.

if __name__ == "__main__":
    from common import main

    main(train, parse_args)
