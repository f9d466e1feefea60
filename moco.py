"""MoCo: find the other view's key among a queue of keys, made by a slow average of the network.

v1: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning" (2019, arXiv
1911.05722); v2: Chen et al., "Improved Baselines with Momentum Contrastive Learning" (2020, arXiv
2003.04297); v3: Chen, Xie and He, "An Empirical Study of Training Self-Supervised Vision
Transformers" (2021, arXiv 2104.02057).
Survey family: contrastive, negatives from a memory. What prevents collapse: the negatives.

One view of an image is the query, the other the key, and a softmax has to find the key among those
of earlier batches, which wait in a queue: so the number of negatives does not depend on the batch.
Old and new keys are comparable, for they come from the target, a slow moving average of the online
network. v2 has a deeper projector and more augmentation; v3 a predictor, both directions, and as
negatives the other keys of one large batch.

                 ┌─ augment ─ view1 ─ backbone ─ projector ─ (v3: predictor) ─ query ─┐
                 │                └─ what is kept   │ moving average                  ├─ InfoNCE
        image ───┤                                  ▼                                 │
                 └─ augment ─ view2 ─ target: backbone ─ projector ────── key ────────┤
                                                                           └─▶ queue ─┘
Run      python moco.py                         demonstration (v2): drawn images, CPU, minutes
         python moco.py --data path             a folder of images, or cifar10
         python moco.py --version 3 --arch vit_small --data path
         torchrun --nproc-per-node=8 moco.py --data path
Reuse    from moco import MoCo, moco_loss, moco_v3_loss, make_vit        (with torchvision)
"""

import argparse
import copy
import math
import os
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VisionTransformer

# ---------------------------------------------------------------------------------------- model


class MoCo(nn.Module):
    """Online network, its moving average, and the queue of keys.

    backbone: (B, 3, H, W) -> (B, feature_dim). The projector of v1 has one layer, of v2 two.
    v1, v2: queue_size, in keys; bn_groups, the parts of a batch that BN normalises by themselves:
    the backbone's BN layers become `GroupBatchNorm`, with the same weights and names. v3:
    hidden_dim, the width of projector and predictor; vit, whether they are those of the ViT: then
    the projector has a third layer, and the predictor ends in BN.
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
        it, too, normalises by the batch's statistics."""
        n = 2 if self.version == 3 else 1  # directions
        queries = [self.predictor(self.online(view)) for view in (view1, view2)[:n]]
        with torch.no_grad():
            keys = [self.target(view) for view in (view2, view1)[:n]]
        return [(F.normalize(q, dim=1), F.normalize(k, dim=1)) for q, k in zip(queries, keys)]

    @torch.no_grad()
    def enqueue(self, key):
        """The newest keys (B, D) replace the oldest, in place: call it after the backward pass."""
        key = key[-len(self.queue) :]
        rows = (self.queue_ptr + torch.arange(len(key), device=key.device)) % len(self.queue)
        self.queue.index_copy_(0, rows, key)
        self.queue_ptr.add_(len(key)).remainder_(len(self.queue))


def make_mlp(widths, batch_norm=False, last_norm=False):
    """Linear layers with ReLU between them. batch_norm (v3): without biases, each followed by BN.
    The last layer has its BN only with last_norm, and then without scale and offset."""
    layers = []
    for i in range(1, len(widths)):
        last = i == len(widths) - 1
        layers.append(nn.Linear(widths[i - 1], widths[i], bias=not batch_norm))
        if batch_norm and (last_norm or not last):
            layers.append(nn.BatchNorm1d(widths[i], affine=not last))
        layers += [] if last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class GroupBatchNorm(nn.BatchNorm2d):
    """BN that normalises `groups` parts of the batch, of at least two images, each by its own
    statistics, as so many GPUs would; the running statistics follow the parts' mean."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        parts = x.tensor_split(max(1, min(self.groups, len(x) // 2)))
        statistics = self.running_mean.new_zeros(len(parts), 2, x.shape[1])
        parts = [F.batch_norm(part, mean, var, self.weight, self.bias, True, 1.0, self.eps)
                 for part, (mean, var) in zip(parts, statistics)]  # momentum 1: writes mean, var
        both = [self.running_mean, self.running_var]
        torch._foreach_lerp_(both, list(statistics.mean(0)), self.momentum)
        self.num_batches_tracked.add_(1)
        return torch.cat(parts)


def shuffle_rows(view2):
    """Shuffled BN (v1, v2): this process's rows of the total batch in random order, and the order.
    Otherwise a query and its key would be normalised among the same neighbours, and could be
    matched by them, whatever the images show: 4 points of kNN in the official CIFAR-10 notebook."""
    from common import gather, rank, world_size

    view2 = gather(view2)
    order = torch.randperm(len(view2), device=view2.device)  # the same on all processes
    return view2[order].chunk(world_size())[rank()], order


@torch.no_grad()
def average_statistics(model):
    """Running BN statistics ← their mean over the processes, each of which has its own groups."""
    from common import all_sum, world_size

    if statistics := [b for name, b in model.named_buffers() if "running_" in name]:
        mean = all_sum(torch.cat(statistics)) / world_size()
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


VITS = {"vit_micro": (128, 4, 2), "vit_small": (384, 12, 12), "vit_base": (768, 12, 12)}


def make_vit(arch, image_size):
    """torchvision's ViT, (B, 3, S, S) -> its class token (B, feature_dim), with fixed positions and
    a patch projection that stays random, v3's remedy for unstable training. From the official code:
    the 12 heads of the small one, and Xavier's bounds, for q, k and v each."""
    patch_size, (dim, depth, num_heads) = 16 if image_size > 64 else 4, VITS[arch]
    vit = VisionTransformer(image_size, patch_size, depth, num_heads, dim, 4 * dim)
    vit.heads, vit.feature_dim = nn.Identity(), dim
    for name, parameter in vit.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() in (2, 4):  # the patch projection, too, as the matrix it is
            for matrix in parameter.detach().chunk(3 if "in_proj" in name else 1):
                nn.init.xavier_uniform_(matrix.flatten(1))
    nn.init.normal_(vit.class_token, std=1e-6)
    vit.encoder.pos_embedding = nn.Parameter(positions(dim, image_size // patch_size), False)
    vit.conv_proj.requires_grad_(False)
    return vit


# ----------------------------------------------------------------------------------------- loss


def moco_loss(query, key, queue, temperature):
    """InfoNCE, equation 1 of v1: (B, D), (B, D), (Q, D), all of unit rows -> scalar, a mean.

        l = -log  exp(q·k₊ / τ) / Σ_i exp(q·k_i / τ)

    where i runs over the query's own key k₊ and the Q keys of the queue. Keys are constants:
    stop-gradient. Chance level: ln(1 + Q).
    """
    positive = (query * key.detach()).sum(1, keepdim=True)
    logits = torch.cat([positive, query @ queue.detach().T], 1) / temperature
    labels = torch.zeros(len(query), dtype=torch.long, device=query.device)  # column 0: k₊
    return F.cross_entropy(logits, labels)


def moco_v3_loss(query, key, temperature):
    """InfoNCE of v3, one of its two directions: (B, D), (B, D), of unit rows -> scalar, a mean.

        l = -2τ log  exp(q·k₊ / τ) / Σ_i exp(q·k_i / τ)

    where i runs over the keys of the batch, constants as in v1. Chance level: 2τ ln B. The factor
    2τ, of the paper's pseudocode, keeps the gradient's size whatever the temperature.
    """
    logits = query @ key.detach().T / temperature
    labels = torch.arange(len(query), device=query.device)
    return 2 * temperature * F.cross_entropy(logits, labels)


@torch.no_grad()
def positive_found(query, key, queue):
    """Health: the fraction of queries whose own key is the most similar of the batch's and the
    queue's. High while the queue is noise, lower while keys fill it, then rising, and well above
    1 / (B + Q), the chance level: (B, D), (B, D), (Q, D) -> scalar."""
    nearest = (query @ torch.cat([key, queue]).T).argmax(1)
    return (nearest == torch.arange(len(query), device=query.device)).float().mean()


# --------------------------------------------------------------------------------- augmentation


def augment(images, aspect, version, image_size, crop_scale, blur, solarize):
    """The papers' augmentations: uint8 images (B, 3, S, S), squeezed to squares from
    width / height = aspect (B,) -> views (B, 3, image_size, image_size). In v3 the two views differ
    in the fractions that are blurred and solarised: whose bright pixels are inverted."""
    from common import (color_jitter, gaussian_blur, normalize, random_grayscale,
                        random_horizontal_flip, random_resized_crop, random_solarize)

    x = random_resized_crop(images, aspect, image_size, scale=(crop_scale, 1.0))
    if version == 1:
        x = random_grayscale(x, p=0.2)
        x = color_jitter(x, 0.4, 0.4, 0.4, 0.4, p=1.0)
    else:
        x = color_jitter(x, 0.4, 0.4, 0.4 if version == 2 else 0.2, 0.1, p=0.8)
        x = random_grayscale(x, p=0.2)
    x = gaussian_blur(x, p=blur, sigma=(0.1, 2.0))
    x = random_solarize(x, p=solarize)
    x = random_horizontal_flip(x, p=0.5)
    return normalize(x)


# ------------------------------------------------------------------------------------- training


class LARS(torch.optim.Optimizer):
    """SGD with momentum, and a rate for each tensor (You et al., 1708.03888), as in SimCLR's code:

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


def cosine(step, total_steps, warmup_steps, peak, end=0.0):
    """Rises linearly to `peak` over the warm-up, then moves to `end` on half a cosine."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    t = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end + (peak - end) * (1 + math.cos(math.pi * t)) / 2


@torch.no_grad()
def ema_update(target, online, ema_momentum):
    """target ← ema_momentum · target + (1 - ema_momentum) · online, parameters only: BN statistics
    are each network's own."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - ema_momentum)


def make_optimizer(name, model, weight_decay):
    """As in the official code, LARS neither decays nor adapts biases and BN; others decay all."""
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
    from common import (batch_that_fits, batches, gather, load_checkpoint, load_data, log,
                        make_backbone, parallel, save_checkpoint, save_views, start, world_size,
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

    v3, vit = args.version == 3, args.arch in VITS
    backbone = (make_vit(args.arch, args.image_size) if vit else
                make_backbone(args.arch, args.image_size, zero_init_residual=v3))
    untrained = copy.deepcopy(backbone)  # the report's baseline
    load_init(backbone, args.init)
    model = MoCo(backbone, backbone.feature_dim, args.version, args.proj_dim, args.queue_size,
                 args.bn_groups // world_size(), args.hidden_dim, vit)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(args.optimizer, model, args.weight_decay)
    view = partial(augment, version=args.version, image_size=args.image_size,
                   crop_scale=args.crop_scale)
    augment1 = partial(view, blur=args.blur1, solarize=0.0)
    augment2 = partial(view, blur=args.blur2, solarize=args.solarize2)
    step = load_checkpoint(args, train_set, model, optimizer)  # 0, or where the run goes on
    network = parallel(model, args.compile, sync_bn=v3)  # DistributedDataParallel, if of several
    save_views(args, train_set, device, augment1, augment2)
    saved_at = save_checkpoint(args, step, train_set, model, optimizer, backbone)
    started = step, time.monotonic()  # for the speed and the time left
    chance, ema_end = ((2 * 2 * args.temperature * math.log(args.batch_size), 1.0) if v3 else
                       (math.log(1 + args.queue_size), args.ema_momentum))

    for step, images, aspect in batches(train_set, args, step, device):  # seeded by step
        lr = cosine(step, total_steps, warmup_steps, peak_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        ema_momentum = cosine(step, total_steps, 0, args.ema_momentum, ema_end)
        view1, view2 = augment1(images, aspect), augment2(images, aspect)
        if not v3:
            view2, order = shuffle_rows(view2)
        ema_update(model.target, model.online, ema_momentum)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            pairs = network(view1, view2)
        pairs = [(gather(query.float()), gather(key.float())) for query, key in pairs]
        query, key = pairs[0]
        if v3:
            loss = sum(moco_v3_loss(query, key, args.temperature) for query, key in pairs)
        else:
            key = key[order.argsort()]  # in the queries' order
            loss = moco_loss(query, key, model.queue, args.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found = positive_found(query, key, key[:0] if v3 else model.queue)
        if not v3:
            model.enqueue(key)
            average_statistics(model)

        done, epoch_ends = step + 1, (step + 1) % steps_per_epoch == 0
        if done == 1 or done % args.print_freq == 0 or epoch_ends:
            log(args, done, total_steps, started, lr, loss, chance, positive_found=found)
        if epoch_ends or time.monotonic() - saved_at > 600:
            saved_at = save_checkpoint(args, done, train_set, model, optimizer, backbone)
    report = evaluate(backbone, untrained, train_set, test_set, args.image_size, device)
    write_log(args, {"step": total_steps, "report": report})


RECIPES = {
    "recipe":        ("demo",     "cpu",      "cifar",     "imagenet"),
    "arch":          ("resnet8",  "resnet8",  "resnet18",  "resnet50"),
    "image_size":    (32,         32,         32,          224),
    "epochs":        (8,          20,         200,         200),
    "warmup_epochs": (0.5,        1,          0,           0),
    "batch_size":    (32,         64,         512,         256),
    "optimizer":     ("sgd",      "sgd",      "sgd",       "sgd"),
    "lr":            (0.48,       0.24,       0.03,        0.03),
    "weight_decay":  (5e-4,       5e-4,       5e-4,        1e-4),
    "temperature":   (0.1,        0.2,        0.1,         0.2),
    "ema_momentum":  (0.9,        0.99,       0.99,        0.999),
    "queue_size":    (256,        1024,       4096,        65536),
    "bn_groups":     (2,          2,          8,           8),
    "hidden_dim":    (256,        256,        4096,        4096),
    "proj_dim":      (64,         64,         128,         128),
    "crop_scale":    (0.35,       0.2,        0.08,        0.2),
    "blur1":         (0.0,        0.0,        0.0,         0.5),
    "blur2":         (0.0,        0.0,        0.0,         0.5),
    "solarize2":     (0.0,        0.0,        0.0,         0.0),
}
# This is v2. What differs in v1, in v3, and in v3 with a ViT:
V1 = {"temperature": (0.2, 0.2, 0.1, 0.07), "blur1": (0.0,) * 4, "blur2": (0.0,) * 4}
V3 = {
    "epochs":        (5,          20,         200,         100),
    "warmup_epochs": (0.5,        1,          10,          10),
    "batch_size":    (64,         64,         512,         512),
    "optimizer":     ("sgd",      "sgd",      "sgd",       "lars"),
    "lr":            (0.48,       0.24,       0.12,        0.6),
    "weight_decay":  (5e-4,       5e-4,       5e-4,        1e-6),
    "temperature":   (0.2,        0.2,        0.2,         1.0),
    "ema_momentum":  (0.9,        0.99,       0.99,        0.9987),
    "proj_dim":      (64,         64,         256,         256),
    "blur1":         (0.0,        0.0,        0.0,         1.0),
    "blur2":         (0.0,        0.0,        0.0,         0.1),
    "solarize2":     (0.0,        0.0,        0.2,         0.2),
}
VIT = {
    "epochs":        (5,          20,         300,         300),
    "warmup_epochs": (0.5,        1,          40,          40),
    "optimizer":     ("adamw",    "adamw",    "adamw",     "adamw"),
    "lr":            (1e-3,       1e-3,       1.5e-4,      1.5e-4),
    "weight_decay":  (0.1,        0.1,        0.1,         0.1),
    "temperature":   (0.2,        0.2,        0.2,         0.2),
    "crop_scale":    (0.35,       0.2,        0.08,        0.08),
}
FLAGS = {  # type, lowest, highest, help, the papers' value
    "version": ((1, 2, 3), None, None, "of MoCo; 3 with a ViT"),
    "optimizer": (("sgd", "lars", "adamw"), None, None, "optimizer", "sgd, v3 lars, ViT adamw"),
    "temperature": (float, 1e-3, 100, "softmax temperature, τ", "v1 0.07, v2 0.2, v3 1, ViT 0.2"),
    "ema_momentum": (float, 0, 1, "weight of the old target, m; v3: rises to 1", "0.999, v3 0.99"),
    "queue_size": (int, 1, 10**7, "v1, v2: keys in the queue", "65536"),
    "bn_groups": (int, 1, 10**4, "v1, v2: parts of the total batch, each with BN of its own", "8"),
    "hidden_dim": (int, 1, 10**5, "v3: width of projector and predictor", "4096"),
    "proj_dim": (int, 1, 10**5, "length of query and key", "128, v3 256"),
    "crop_scale": (float, 1e-3, 1, "smallest crop, as a fraction of the image", "0.2, ViT 0.08"),
    "blur1": (float, 0, 1, "fraction of views 1 that are blurred", "v2 0.5, v3 1"),
    "blur2": (float, 0, 1, "fraction of views 2 that are blurred", "v2 0.5, v3 0.1"),
    "solarize2": (float, 0, 1, "fraction of views 2 that are solarised", "v3 0.2"),
}


def parse_args(argv=None):
    from common import FLAGS as shared, architecture, parse_flags, wrong_arguments

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # they choose the table
    first.error = wrong_arguments
    first.add_argument("--version", type=int)
    first.add_argument("-a", "--arch")
    first = first.parse_known_args(argv)[0]
    vit = first.arch in VITS
    version = first.version or 2 + vit
    recipes = RECIPES | {1: V1, 3: V3 | VIT if vit else V3}.get(version, {})
    arch = (lambda text: text if text in VITS else architecture(text), None, None,
            f"{shared['arch'][3]}; of v3 {', '.join(VITS)}")
    args = parse_flags("moco", __doc__, recipes | {"version": (version,) * 4},
                       FLAGS | {"arch": arch}, argv)
    if args.version < 3 and args.bn_groups % int(os.environ.get("WORLD_SIZE", 1)):
        wrong_arguments(f"--bn-groups {args.bn_groups} is no multiple of the number of processes")
    if args.arch in VITS and args.image_size % (side := 16 if args.image_size > 64 else 4):
        wrong_arguments(f"--image-size {args.image_size} is no multiple of the patches' {side}")
    return args


# Sources. imagenet: the papers and facebookresearch/moco and moco-v3 (v3: batch 4096, EMA 0.99: of
# as many images, at 512, 0.99^(1/8)). cifar: v1, v2: the former's CIFAR-10 notebook, which mixes
# v1's projector and v2's jitter; v3: heads, temperature and EMA of solo-learn, SGD, rate and decay
# of lightly's BYOL. demo: measured on the drawn images (v2). cpu: for real images, not tuned.
# Departures: the rate falls on a cosine per step (v1: to a tenth at epochs 120 and 160 of 200; v2:
# per epoch). BN groups are parts of the total batch, whatever the GPUs; their running statistics
# are averaged (official: the first GPU's). Any batch fits the queue. Blur is Gaussian (not PIL's).

if __name__ == "__main__":
    from common import main

    main(train, parse_args)
