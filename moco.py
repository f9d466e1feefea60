"""MoCo: find the other view's key among a queue of keys, made by a slow average of the network.

v1: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning" (2019, arXiv
1911.05722); v2: Chen et al., "Improved Baselines with Momentum Contrastive Learning" (2020, arXiv
2003.04297); v3: Chen, Xie and He, "An Empirical Study of Training Self-Supervised Vision
Transformers" (2021, arXiv 2104.02057).
Survey family: contrastive, negatives from a memory. What prevents collapse: the negatives.

One view of an image is the query, the other the key, and a softmax has to find the key among the
keys of earlier batches. These stay comparable because they are encoded by the target, a moving
average of the online network; so the number of negatives does not depend on the batch. v2 has a
deeper projector and more augmentation; v3 a predictor and both directions, and for negatives the
keys of its one large batch.

                 ┌─ augment ─ view1 ─ backbone ─ projector ─ (v3: predictor) ─ query ─┐
                 │                └─ what is kept   │ moving average                  ├─ InfoNCE
        image ───┤                                  ▼                                 │
                 └─ augment ─ view2 ─ target: backbone ─ projector ────── key ────────┤
                                                                           └─▶ queue ─┘
Run      python moco.py                         demonstration (v2): built-in images, CPU, a minute
         python moco.py --data path             a folder of images, or cifar10
         python moco.py --version 3 --arch vit_small --data path
         torchrun --nproc-per-node=8 moco.py --data path
Reuse    from moco import MoCo, moco_loss, moco_v3_loss         (needs torch only)

Shuffled BN: a key normalised together with its query's neighbours would betray itself by the
statistics. Keys are shuffled between the BN groups (paper: GPUs), worth about 4 points of kNN after
800 epochs (official CIFAR-10 notebook); without it: `moco-one-bn-group` in tests/results/README.md.

Departures from the papers: the rate falls on a cosine per step (v1: to a tenth at epochs 120 and
160 of 200; v2: per epoch). BN groups are parts of the total batch, whatever the number of GPUs, and
their running statistics are averaged (official: the first GPU's). Any batch fits the queue. Blur is
a true Gaussian (official: PIL's).

Measured in the demonstration, top-1 in percent (of the network at random):
built-in set, kNN 44.6 (35.4), probe 67.6 (43.0); seeds: 3
10,000 of CIFAR-10, kNN 38.7 (32.2), probe 43.5 (34.6); seeds: 3
"""

import argparse
import copy
import math
import os

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


class MoCo(nn.Module):
    """Online network, its moving average, and the queue of keys.

    backbone: (B, 3, H, W) -> (B, feature_dim). The projector of v1 has one layer, of v2 two.
    v1, v2: queue_size, in keys; bn_groups, the parts of a batch that BN normalises by themselves,
    useful only if the rows of view2 are shuffled (see `train`). v3: hidden_dim, the width of
    projector and predictor; vit, whether they are those of the ViT: then the projector has a third
    layer, and the predictor ends in BN.
    """

    def __init__(self, backbone, feature_dim, version=2, proj_dim=128, queue_size=65536,
                 bn_groups=8, hidden_dim=4096, vit=False):
        super().__init__()
        self.version, self.predictor = version, nn.Identity()
        if version < 3:
            projector = make_mlp([feature_dim] * version + [proj_dim])
            for module in backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.__class__, module.groups = GroupBatchNorm, bn_groups
            # Noise at first: the loss starts low, rises while keys replace it, then falls.
            self.register_buffer("queue", F.normalize(torch.randn(queue_size, proj_dim), dim=1))
            self.register_buffer("queue_ptr", torch.tensor(0))  # the row of the oldest key
        else:
            projector = make_mlp([feature_dim] + [hidden_dim] * (1 + vit) + [proj_dim], True, True)
            self.predictor = make_mlp([proj_dim, hidden_dim, proj_dim], True, vit)
        self.online = nn.Sequential(backbone, projector)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, view1, view2):
        """Two (B, 3, H, W) -> [(query, key)], of (B, D) and unit rows: the query of view1 and the
        key of view2. v3 has a second pair, the views exchanged. The target stays in training mode:
        it, too, normalises by batch statistics."""
        directions = [(view1, view2), (view2, view1)] if self.version == 3 else [(view1, view2)]
        pairs = []
        for one, other in directions:
            query = self.predictor(self.online(one))
            with torch.no_grad():
                key = self.target(other)
            pairs.append((F.normalize(query, dim=1), F.normalize(key, dim=1)))
        return pairs

    @torch.no_grad()
    def enqueue(self, key):
        """The newest keys (B, D) replace the oldest, in place: after the backward pass, which needs
        the queue as it was."""
        key = key[-len(self.queue) :]
        rows = (self.queue_ptr + torch.arange(len(key), device=key.device)) % len(self.queue)
        self.queue.index_copy_(0, rows, key)
        self.queue_ptr.add_(len(key)).remainder_(len(self.queue))


def make_mlp(widths, batch_norm=False, last_norm=False):
    """Linear layers with ReLU between them. batch_norm (v3): no biases, and a BN after each layer,
    after the last one, without scale and offset, only if last_norm."""
    layers = []
    for i in range(1, len(widths)):
        last = i == len(widths) - 1
        layers.append(nn.Linear(widths[i - 1], widths[i], bias=not batch_norm))
        if batch_norm and (last_norm or not last):
            layers.append(nn.BatchNorm1d(widths[i], affine=not last))
        layers += [] if last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class GroupBatchNorm(nn.BatchNorm2d):
    """BN that normalises `groups` equal parts of the batch, each by its own statistics, as so many
    GPUs would; the running statistics follow the parts' mean."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        parts = x.tensor_split(max(1, min(self.groups, len(x) // 2)))
        statistics = self.running_mean.new_zeros(len(parts), 2, x.shape[1])
        parts = [F.batch_norm(part, mean, var, self.weight, self.bias, True, 1.0, self.eps)
                 for part, (mean, var) in zip(parts, statistics)]  # momentum 1: writes mean, var
        mean, var = statistics.mean(0)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)
        self.num_batches_tracked.add_(1)
        return torch.cat(parts)


@torch.no_grad()
def average_statistics(model, all_sum, processes):
    """Running BN statistics ← their mean over the processes, each of which has its own groups."""
    statistics = [b for name, b in model.named_buffers() if "running_" in name]
    mean = all_sum(torch.cat(statistics)) / processes
    torch._foreach_copy_(statistics, mean.split([len(s) for s in statistics]))


def positions(dim, grid):
    """Sines and cosines of the places of grid² patches, row by row, after zeros for the class
    token: (1, 1 + grid², dim).

    A quarter of the dimensions each: sin xω, cos xω, sin yω, cos yω, ω from 1 to almost 1 / 10000.
    x, the column, comes first, as in MAE's official code; in MoCo v3's, by torch.meshgrid, the row.
    """
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    code = torch.cat([angle.sin(), angle.cos()], 1)
    places = torch.cat([code.repeat(grid, 1), code.repeat_interleave(grid, 0)], 1)
    return F.pad(places, (0, 0, 1, 0))[None].float()


VITS = {"vit_micro": (128, 4, 2), "vit_small": (384, 12, 12),
        "vit_base": (768, 12, 12)}  # dim, depth, num_heads: v3 gives the small one 12


def make_vit(arch, image_size):
    """The ViT of dino.py with fixed positions and a patch embedding that stays random, v3's remedy
    for unstable training. From the official code: Xavier's bounds, for q, k and v each."""
    from dino import ViT

    patch_size = 16 if image_size > 64 else 4
    vit = ViT(image_size, patch_size, *VITS[arch])
    for name, module in vit.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            outputs = len(module.weight) // (3 if name.endswith("qkv") else 1)
            bound = math.sqrt(6 / (module.weight[0].numel() + outputs))
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
    nn.init.normal_(vit.cls_token, std=1e-6)
    vit.pos_embed = nn.Parameter(positions(vit.feature_dim, image_size // patch_size), False)
    vit.patch_embed.requires_grad_(False)
    return vit


# ----------------------------------------------------------------------------------------- loss


def moco_loss(query, key, queue, temperature):
    """InfoNCE, equation 1 of v1: (B, D), (B, D), (Q, D), all of unit rows -> scalar, a mean.

        l = -log  exp(q·k₊ / τ) / Σ_i exp(q·k_i / τ)

    where i runs over the query's own key k₊ and the Q keys of the queue. Guessing gives ln(1 + Q).
    """
    positive = (query * key).sum(1, keepdim=True)
    logits = torch.cat([positive, query @ queue.T], 1) / temperature
    labels = torch.zeros(len(query), dtype=torch.long, device=query.device)  # column 0: k₊
    return F.cross_entropy(logits, labels)


def moco_v3_loss(query, key, temperature):
    """InfoNCE of v3, one of its two directions: (B, D), (B, D), of unit rows -> scalar, a mean.

        l = -2τ log  exp(q·k₊ / τ) / Σ_i exp(q·k_i / τ)

    where i runs over the keys of the batch. Guessing gives 2τ ln B. The paper's pseudocode has the
    factor 2τ: it keeps the gradient's size whatever the temperature.
    """
    logits = query @ key.T / temperature
    labels = torch.arange(len(query), device=query.device)
    return 2 * temperature * F.cross_entropy(logits, labels)


@torch.no_grad()
def positive_accuracy(query, key, queue):
    """Health: the fraction of queries whose own key is the most similar of the batch's and the
    queue's. High while the queue is noise, lower while keys fill it, then rising, and well above
    1 / (B + Q), which guessing gives: (B, D), (B, D), (Q, D) -> scalar."""
    nearest = (query @ torch.cat([key, queue]).T).argmax(1)
    return (nearest == torch.arange(len(query), device=query.device)).float().mean()


# --------------------------------------------------------------------------------- augmentation


def make_augment(version, image_size, crop_scale, blur, solarize):
    """The papers' augmentations. The views of v3 differ in blur and solarisation."""
    from common import (Augment, ColorJitter, GaussianBlur, Normalize, RandomGrayscale,
                        RandomHorizontalFlip, RandomResizedCrop, RandomSolarize)

    crop = RandomResizedCrop(image_size, scale=(crop_scale, 1.0))
    colors = [ColorJitter(0.4, 0.4, 0.4 if version == 2 else 0.2, 0.1, p=0.8), RandomGrayscale(0.2),
              GaussianBlur(blur, sigma=(0.1, 2.0)), RandomSolarize(solarize)]
    if version == 1:
        colors = [RandomGrayscale(0.2), ColorJitter(0.4, 0.4, 0.4, 0.4, p=1.0)]
    return Augment([crop, *colors, RandomHorizontalFlip(0.5), Normalize()])


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
    """As in the official code, SGD and AdamW decay all parameters, and LARS neither decays nor
    adapts biases and BN."""
    params = [p for p in model.parameters() if p.requires_grad]
    if name == "lars":
        weights, others = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
        groups = [{"params": weights}, {"params": others, "weight_decay": 0.0, "adapt": False}]
        return LARS(groups, lr=0.0, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(params, lr=0.0, weight_decay=weight_decay)
    return torch.optim.SGD(params, lr=0.0, momentum=0.9, weight_decay=weight_decay)


def train(args):
    """Algorithm 1 of v1 (v1, v2) or of v3, once per step."""
    from common import Failure, Run, all_sum, gather, make_backbone, rank, world_size

    run = Run("moco", args)
    v3, vit = args.version == 3, args.arch in VITS
    if not v3 and args.bn_groups % world_size():  # a resumed run's
        raise Failure(f"{world_size()} processes cannot share --bn-groups {args.bn_groups}")
    backbone = run.init(make_vit(args.arch, args.image_size) if vit else
                        make_backbone(args.arch, args.image_size, zero_init_residual=v3))
    model = MoCo(backbone, backbone.feature_dim, args.version, args.proj_dim, args.queue_size,
                 args.bn_groups // world_size(), args.hidden_dim, vit)
    optimizer = make_optimizer(args.optimizer, model, args.weight_decay)
    shared = args.version, args.image_size, args.crop_scale
    augment1 = make_augment(*shared, args.blur1, 0.0)
    augment2 = make_augment(*shared, args.blur2, args.solarize2)
    network = run.start(model, optimizer, backbone, sync_bn=v3)
    run.save_views(augment1, augment2)
    chance = (2 * 2 * args.temperature * math.log(args.batch_size) if v3 else
              math.log(1 + args.queue_size))

    for step, images, aspect in run.steps():
        lr = cosine(step, run.total_steps, run.warmup_steps, run.peak_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        ema_momentum = cosine(step, run.total_steps, 0, args.ema_momentum,
                              1.0 if v3 else args.ema_momentum)
        view1, view2 = augment1(images, aspect), augment2(images, aspect)
        if not v3:  # shuffled BN: other neighbours for the keys; all processes draw one order
            order = torch.randperm(args.batch_size, device=run.device)
            view2 = gather(view2)[order].chunk(world_size())[rank()]
        ema_update(model.target, model.online, ema_momentum)
        with run.autocast():
            pairs = network(view1, view2)
        pairs = [(gather(query.float()), gather(key.float())) for query, key in pairs]
        query, key = pairs[0]
        if v3:
            queue = key[:0]  # there is none
            loss = sum(moco_v3_loss(query, key, args.temperature) for query, key in pairs)
        else:
            queue, key = model.queue, key[order.argsort()]
            loss = moco_loss(query, key, queue, args.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if run.prints(step):
            run.log(step, loss, lr, chance, accuracy=positive_accuracy(query, key, queue))
        if not v3:
            model.enqueue(key)
            average_statistics(model, all_sum, world_size())
    run.finish()


# Sources: imagenet: the papers and facebookresearch/moco and moco-v3 (v3: 100 epochs, batch 4096
# there, with vit_small 1024, and EMA 0.99, here of as many images: see byol.py). cifar: v1, v2: the
# CIFAR-10 notebook of the former, whose head is v1's and whose jitter is v2's; v3: heads,
# temperature and average of solo-learn, SGD with its rate and decay of lightly's BYOL. demo: v2's
# measured on the built-in set; the keys of a longer queue would, in so short a run, be told from
# new ones by their age.
RECIPES = {
    "recipe":        ("demo",    "cifar",    "imagenet"),
    "arch":          ("resnet8", "resnet18", "resnet50"),
    "image_size":    (32,        32,         224),
    "epochs":        (5,         200,        200),
    "warmup_epochs": (0,         0,          0),
    "batch_size":    (32,        512,        256),
    "optimizer":     ("sgd",     "sgd",      "sgd"),
    "lr":            (0.48,      0.03,       0.03),
    "weight_decay":  (5e-4,      5e-4,       1e-4),
    "temperature":   (0.2,       0.1,        0.2),
    "ema_momentum":  (0.99,      0.99,       0.999),
    "queue_size":    (128,       4096,       65536),
    "bn_groups":     (2,         8,          8),
    "hidden_dim":    (256,       4096,       4096),
    "proj_dim":      (64,        128,        128),
    "crop_scale":    (0.35,      0.08,       0.2),
    "blur1":         (0.0,       0.0,        0.5),
    "blur2":         (0.0,       0.0,        0.5),
    "solarize2":     (0.0,       0.0,        0.0),
}
# What differs in v1, v3, and v3 with a ViT:
V1 = {"temperature": (0.2,       0.1,        0.07)}
V3 = {
    "epochs":        (5,         200,        100),
    "warmup_epochs": (0.5,       10,         10),
    "batch_size":    (64,        512,        512),
    "optimizer":     ("sgd",     "sgd",      "lars"),
    "lr":            (0.48,      0.12,       0.6),
    "weight_decay":  (5e-4,      5e-4,       1e-6),
    "temperature":   (0.2,       0.2,        1.0),
    "ema_momentum":  (0.9,       0.99,       0.9987),
    "proj_dim":      (64,        256,        256),
    "blur1":         (0.0,       0.0,        1.0),
    "blur2":         (0.0,       0.0,        0.1),
    "solarize2":     (0.0,       0.2,        0.2),
}
VIT = {
    "epochs":        (5,         300,        300),
    "warmup_epochs": (0.5,       40,         40),
    "optimizer":     ("adamw",   "adamw",    "adamw"),
    "lr":            (1e-3,      1.5e-4,     1.5e-4),
    "weight_decay":  (0.1,       0.1,        0.1),
    "temperature":   (0.2,       0.2,        0.2),
    "ema_momentum":  (0.9,       0.99,       0.995),
    "crop_scale":    (0.35,      0.08,       0.08),
}


def parse_args(argv=None):
    from common import ArgumentParser, architecture, number

    def arch(text):
        return text if text in VITS else architecture(text)

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # they choose the table
    first.add_argument("--version")
    first.add_argument("-a", "--arch")
    first = first.parse_known_args(argv)[0]
    vit = first.arch in VITS
    version = first.version or ("3" if vit else "2")
    recipes = RECIPES | {"1": V1, "3": V3 | VIT if vit else V3}.get(version, {})
    parser = ArgumentParser(__doc__, recipes, arch, f"; {', '.join(VITS)} (v3)")
    add = parser.add_argument
    add("--version", type=int, choices=(1, 2, 3), default=3 if vit else 2, help="of MoCo")
    add("--optimizer", choices=("sgd", "lars", "adamw"), help="v1, v2: sgd; v3: lars, ViT: adamw")
    add("--temperature", type=number(float, 0, above=True),
        help="softmax temperature, τ (v1: 0.07, v2: 0.2, v3: 1, with a ViT 0.2)")
    add("--ema-momentum", type=number(float, 0, 1), help="weight of the old target in the average, "
        "m; of v3 it rises to 1 on a cosine (v1, v2: 0.999, v3: 0.99, for 1000 epochs 0.996)")
    add("--queue-size", type=number(int, 1), help="v1, v2: keys in the queue (papers: 65536)")
    add("--bn-groups", type=number(int, 1), help="v1, v2: parts of the total batch, normalised by "
        "themselves; a multiple of the processes (papers: 8 GPUs)")
    add("--hidden-dim", type=number(int, 1), help="v3: width of projector and predictor (4096)")
    add("--proj-dim", type=number(int, 1), help="length of query and key (v1, v2: 128, v3: 256)")
    add("--crop-scale", type=number(float, 0, 1, above=True),
        help="area of the smallest crop, as a fraction of the image (0.2, with a ViT 0.08)")
    add("--blur1", type=number(float, 0, 1), help="fraction of views 1 blurred (v2: 0.5, v3: 1)")
    add("--blur2", type=number(float, 0, 1), help="fraction of views 2 (v2: 0.5, v3: 0.1)")
    add("--solarize2", type=number(float, 0, 1), help="v3: fraction of views 2 solarised (0.2)")
    args = parser.parse_args(argv)
    unequal = args.bn_groups % int(os.environ.get("WORLD_SIZE", 1))
    unknown = args.resume and "bn_groups" not in args.given  # `train` sees a resumed run's
    if args.version < 3 and unequal and not unknown:
        parser.error(f"--bn-groups {args.bn_groups} is not a multiple of the number of processes")
    return args


if __name__ == "__main__":
    from common import main

    main(train, parse_args)
