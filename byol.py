"""BYOL: the network predicts, from one view, what its own average of the past makes of the other.

Grill et al., "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning" (2020,
arXiv 2006.07733).
Survey family: self-distillation, without negatives. What prevents collapse: the predictor, on one
side only, and a target that changes slowly and gets no gradient.

Each image is augmented twice. The target network, an exponential moving average (EMA) of the online
network, maps one view to a vector; backbone, projector and predictor have to produce that vector
from the other view. Nothing in the loss forbids a constant output, yet it is not where this ends;
without the predictor it is where it goes: `spread` falls and the loss is near 0 after a hundred
steps of a small network (tests/test_byol.py).

               ┌─ augment1 ─ view1 ─ backbone ─ features ─ projector ─ predictor ─ p1 ─┐
               │                        │        └─ what is kept                       │
        image ─┤                        ↓ EMA of the weights                           ├─ 2 - 2 cos
               │                        │                                              │
               └─ augment2 ─ view2 ─ backbone ─ features ─ projector ─ stop-gradient z2 ┘
                                                           and with the views exchanged

Run      python byol.py                         demonstration: built-in images, CPU, a minute
         python byol.py --data path             a folder of images, or cifar10
         torchrun --nproc-per-node=8 byol.py --data path
Reuse    from byol import BYOL, byol_loss, ema_update      (needs torch only)

Departures from the paper: crops of small images are bilinear (official: bicubic everywhere);
brightness is scaled (official: shifted), contrast is by the mean gray (official: per channel),
saturation without HSV; the target starts as a copy (official: from weights of its own, said to make
no difference). The last BN of a residual block starts at 0 as in the official code, whose README
says that the paper's results were obtained without that.

Measured in the demonstration, top-1 in percent (of the network at random):
built-in set, kNN 39.4 (35.4), probe 57.2 (43.0); seeds: 3
10,000 of CIFAR-10, kNN 37.5 (32.2), probe 41.3 (34.6); seeds: 3
"""

import copy
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


class BYOL(nn.Module):
    """Online network, predictor, and target network, which has no predictor.

    backbone: (B, 3, H, W) -> (B, feature_dim). As in the official code, projector and predictor are
    linear with bias, BN, ReLU, linear without bias, and no last BN. The target is in training mode
    like the online network: both normalise by batch statistics, and the running ones of each are
    its own.
    """

    def __init__(self, backbone, feature_dim, hidden_dim=4096, proj_dim=256):
        super().__init__()

        def mlp(in_dim):
            return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim),
                                 nn.ReLU(inplace=True), nn.Linear(hidden_dim, proj_dim, bias=False))

        self.online = nn.Sequential(OrderedDict(backbone=backbone, projector=mlp(feature_dim)))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = mlp(proj_dim)

    def forward(self, view1, view2):
        """Two (B, 3, H, W) -> predictions p1, p2 and the target's z1, z2, each (B, D). One pass per
        view, so that each view has its own BN statistics, as in the official code."""
        p1, p2 = self.predictor(self.online(view1)), self.predictor(self.online(view2))
        with torch.no_grad():
            z1, z2 = self.target(view1), self.target(view2)
        return p1, p2, z1, z2


# ----------------------------------------------------------------------------------------- loss


def byol_loss(p1, p2, z1, z2):
    """Squared distance of unit vectors, averaged over the batch: four (B, D) -> scalar, 0 to 8.

        ‖p̄1 - z̄2‖² + ‖p̄2 - z̄1‖²  =  4 - 2 cos(p1, z2) - 2 cos(p2, z1)        with v̄ = v / ‖v‖

    z are constants: stop-gradient. Vectors at right angles give 4, a constant that surveys drop.
    """
    p1, p2 = F.normalize(p1, dim=1), F.normalize(p2, dim=1)
    z1, z2 = F.normalize(z1.detach(), dim=1), F.normalize(z2.detach(), dim=1)
    return ((p1 - z2).square().sum(1) + (p2 - z1).square().sum(1)).mean()


@torch.no_grad()
def spread(z):
    """Health: √D · std over the batch of z / ‖z‖, mean over dimensions: (B, D) -> scalar. Near 1
    where z ends in BN; below that, but steady, where it does not; towards 0: collapse."""
    return z.shape[1] ** 0.5 * F.normalize(z, dim=1).std(0).mean()


# --------------------------------------------------------------------------------- augmentation


def make_augment(image_size, crop_scale, jitter_strength, blur1, blur2, solarize2):
    """The paper's augmentation, one for each view; they differ in blur and solarisation."""
    from common import (Augment, ColorJitter, GaussianBlur, Normalize, RandomGrayscale,
                        RandomHorizontalFlip, RandomResizedCrop, RandomSolarize)

    s = jitter_strength

    def view(blur, solarize):
        return Augment([
            RandomResizedCrop(image_size, scale=(crop_scale, 1.0),
                              interpolation="bicubic" if image_size > 64 else "bilinear"),
            RandomHorizontalFlip(0.5),
            ColorJitter(0.4 * s, 0.4 * s, 0.2 * s, 0.1 * s, p=0.8),
            RandomGrayscale(0.2),
            GaussianBlur(blur, sigma=(0.1, 2.0)),
            RandomSolarize(solarize),
            Normalize(),
        ])

    return view(blur1, 0.0), view(blur2, solarize2)


# ------------------------------------------------------------------------------------- training


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose rate adapts to each tensor (You et al., 2017, arXiv 1708.03888):

        g ← g + weight_decay · w;   v ← momentum · v + η · |w| / |g| · g;   w ← w - lr · v

    A parameter group with adapt=False is updated by plain SGD with momentum.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.9, eta=0.001, adapt=True):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta,
                                      adapt=adapt))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = torch._foreach_add([p.grad for p in params], params,
                                       alpha=group["weight_decay"])
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


def cosine(step, total_steps, warmup_steps, start, end=0.0):
    """Rises linearly to `start` over the warm-up, then falls to `end` on half a cosine."""
    if step < warmup_steps:
        return start * (step + 1) / warmup_steps
    t = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


@torch.no_grad()
def ema_update(target, online, ema_momentum):
    """target ← ema_momentum · target + (1 - ema_momentum) · online, parameters only: BN statistics
    are each network's own."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - ema_momentum)


def make_optimizer(name, model, weight_decay):
    """Biases and BN are neither decayed nor adapted."""
    weights = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    others = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    if name == "lars":
        groups[1]["adapt"] = False
        return LARS(groups, lr=0.0, weight_decay=weight_decay)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=weight_decay)


def train(args):
    """Algorithm 1 of the paper, once per step."""
    from common import Run, gather, make_backbone

    run = Run("byol", args)
    backbone = run.init(make_backbone(args.arch, args.image_size, zero_init_residual=True))
    model = BYOL(backbone, backbone.feature_dim, args.hidden_dim, args.proj_dim)
    optimizer = make_optimizer(args.optimizer, model, args.weight_decay)
    augment1, augment2 = make_augment(args.image_size, args.crop_scale, args.jitter_strength,
                                      args.blur1, args.blur2, args.solarize2)
    network = run.start(model, optimizer, backbone)
    run.save_views(augment1, augment2)
    chance = 4.0

    for step, images, aspect in run.steps():
        lr = cosine(step, run.total_steps, run.warmup_steps, run.peak_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        ema_momentum = cosine(step, run.total_steps, 0, args.ema_momentum, 1.0)
        view1, view2 = augment1(images, aspect), augment2(images, aspect)
        with run.autocast():
            p1, p2, z1, z2 = network(view1, view2)
        loss = byol_loss(p1.float(), p2.float(), z1.float(), z2.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update(model.target, model.online, ema_momentum)
        if run.prints(step):
            run.log(step, loss, lr, chance, spread=spread(gather(z1.float())))
    run.finish()


# Sources: imagenet: the paper and deepmind-research/byol for 100 epochs (there: batch 4096 and
# EMA 0.99, of which 0.99^(1/8) is the average over as many images at a batch of 512:
# arXiv 2307.13813). cifar: the paper's augmentation without blur and an average from 0.99, as in
# solo-learn; head, SGD and batch of lightly's CIFAR-10 benchmark, whose loss is a quarter of this
# one: so its rate over 4 and its decay times 4. demo: a smaller head, a higher rate, a target that
# moves within a few of its 390 steps and no solarisation, as measured on the built-in set.
RECIPES = {
    "recipe":          ("demo",     "cifar",    "imagenet"),
    "arch":            ("resnet8",  "resnet18", "resnet50"),
    "image_size":      (32,         32,         224),
    "epochs":          (5,          200,        100),
    "warmup_epochs":   (0.5,        10,         10),
    "batch_size":      (64,         512,        512),
    "optimizer":       ("sgd",      "sgd",      "lars"),
    "lr":              (0.1,        0.03,       0.45),
    "weight_decay":    (2e-3,       2e-3,       1e-6),
    "ema_momentum":    (0.5,        0.99,       0.9987),
    "hidden_dim":      (256,        1024,       4096),
    "proj_dim":        (256,        256,        256),
    "crop_scale":      (0.35,       0.08,       0.08),
    "jitter_strength": (1.0,        1.0,        1.0),
    "blur1":           (0.0,        0.0,        1.0),
    "blur2":           (0.0,        0.0,        0.1),
    "solarize2":       (0.0,        0.2,        0.2),
}


def parse_args(argv=None):
    from common import ArgumentParser, number

    parser = ArgumentParser(__doc__, RECIPES)
    add = parser.add_argument
    add("--optimizer", choices=("sgd", "lars"), help="the paper has LARS")
    add("--ema-momentum", type=number(float, 0, 1), help="weight of the old target in the average, "
        "τ; rises to 1 on a cosine (paper: from 0.99 for 100 and 300 epochs, 0.996 for 1000)")
    add("--hidden-dim", type=number(int, 1), help="width of projector and predictor (paper: 4096)")
    add("--proj-dim", type=number(int, 1), help="length of z and p (paper: 256)")
    add("--crop-scale", type=number(float, 0, 1, above=True),
        help="area of the smallest crop, as a fraction of the image (paper: 0.08)")
    add("--jitter-strength", type=number(float, 0, 2.5), help="of the colour jitter (paper: 1)")
    add("--blur1", type=number(float, 0, 1), help="fraction of views 1 that are blurred (paper: 1)")
    add("--blur2", type=number(float, 0, 1), help="fraction of views 2 that are (paper: 0.1)")
    add("--solarize2", type=number(float, 0, 1),
        help="fraction of views 2 that are solarised (paper: 0.2; of views 1 none)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    from common import main

    main(train, parse_args)
