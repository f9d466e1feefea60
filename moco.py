# SPDX-License-Identifier: MIT
"""MoCo: find the other view's key among a queue of keys, made by a slow average of the network.

v1: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning" (2019, arXiv
1911.05722); v2: Chen et al., "Improved Baselines with Momentum Contrastive Learning" (2020, arXiv
2003.04297); v3: Chen, Xie and He, "An Empirical Study of Training Self-Supervised Vision
Transformers" (2021, arXiv 2104.02057).
Survey family: contrastive, negatives from a memory. What prevents collapse: the negatives.

One view of an image gives the query, the other its key, and a softmax has to tell this key from the
keys of earlier batches, which wait in a queue. So the number of negatives does not depend on the
batch size. Old and new keys can be compared because the network that makes them, the target,
changes slowly: it is a moving average of the trained one, the online network. v2 has a deeper
projector and stronger augmentation. v3 has no queue: the negatives are the other keys of one large
batch. It adds a predictor, and each view is the query once and the key once.

                 ┌─ augment ─ view1 ─ backbone ─ projector ─ (v3: predictor) ─ query ─┐
                 │                └─ used after     │ moving average                  ├─ InfoNCE
        image ───┤                   training       ▼                                 │
                 └─ augment ─ view2 ─ target: backbone ─ projector ────── key ────────┤
                                                                           └─▶ queue ─┘ (v1, v2)

Run      python moco.py                         demonstration: synthetic images, CPU, minutes
         python moco.py --data path             a folder of images, or cifar10
         python moco.py --data path --recipe imagenet-v3-vit
         torchrun --nproc-per-node=8 moco.py --data path
         python linear_probe.py --checkpoint runs/moco/backbone.pth --heads 12     for vit_small
Reuse    from moco import (MoCo, MoCoV3, ema_update, moco_loss, moco_v3_loss, make_vit,
                           make_optimizer, cosine_schedule)   (needs torch and torchvision only)
         `train` shows one step, from the learning rate, which make_optimizer leaves at 0. v1 and
         v2: ema_update, shuffle_rows, forward, moco_loss, backward, optimizer.step,
         model.enqueue. In a single process, shuffle_rows is
             order = torch.randperm(len(view2))
             view2 = view2[order]
         and after the forward pass key = key[order.argsort()]. Without it, BN may give the
         positive away. v3 neither shuffles nor has a queue; its EMA momentum rises to 1, and its
         loss is
             moco_v3_loss(query1, key2, temperature) + moco_v3_loss(query2, key1, temperature)
"""

import copy
import math
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VisionTransformer

# ---------------------------------------------------------------------------------------- model


class MoCo(nn.Module):
    """v1 and v2: the online network, the target (its moving average), and the queue of keys.

    backbone: (B, 3, H, W) -> (B, feature_dim). Its BN layers are replaced, in place, by
    `GroupBatchNorm`. proj_layers: 1 in v1, 2 in v2. queue_size: in keys. bn_groups: the number of
    parts of a batch that BN normalizes separately.
    """

    def __init__(self, backbone, feature_dim, proj_dim=128, proj_layers=2, queue_size=65536,
                 bn_groups=8):
        super().__init__()
        layers = []
        for _ in range(proj_layers - 1):
            layers.append(nn.Linear(feature_dim, feature_dim))
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Linear(feature_dim, proj_dim))
        self.online = nn.Sequential(backbone, nn.Sequential(*layers))
        replace_batch_norm(self.online, bn_groups)
        self.target = without_dropout(copy.deepcopy(self.online)).requires_grad_(False)
        # The queue starts as noise: the loss starts low, rises while keys replace it, then falls.
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, proj_dim), dim=1))
        self.register_buffer("queue_ptr", torch.tensor(0))  # index of the oldest key

    def forward(self, view1, view2):
        """Two (B, 3, H, W) -> the query of view1 and the key of view2, (B, D) each, of unit rows.
        The target stays in training mode: it, too, normalizes by the batch's statistics."""
        query = self.online(view1)
        with torch.no_grad():
            key = self.target(view2)
        return F.normalize(query, dim=1), F.normalize(key, dim=1)

    @torch.no_grad()
    def enqueue(self, key):
        """Replace the oldest keys of the queue by key (B, D), in place: call it after the backward
        pass."""
        queue_size = len(self.queue)
        key = key[-queue_size:]  # the last, if there are more than fit
        batch_size = len(key)
        rows = (self.queue_ptr + torch.arange(batch_size, device=key.device)) % queue_size
        self.queue[rows] = key
        self.queue_ptr.copy_((self.queue_ptr + batch_size) % queue_size)


class MoCoV3(nn.Module):
    """v3: the online network with a predictor, and the target, the online network's moving average.

    backbone: (B, 3, H, W) -> (B, feature_dim). hidden_dim: width of projector and predictor.
    The defaults are those for a ResNet. A ViT has proj_layers=3 and pred_last_norm=True: its
    predictor ends in BN.
    """

    def __init__(self, backbone, feature_dim, proj_dim=256, hidden_dim=4096, proj_layers=2,
                 pred_last_norm=False):
        super().__init__()
        projector = make_mlp(feature_dim, hidden_dim, proj_dim, proj_layers, last_norm=True)
        self.online = nn.Sequential(backbone, projector)
        self.target = without_dropout(copy.deepcopy(self.online)).requires_grad_(False)
        self.predictor = make_mlp(proj_dim, hidden_dim, proj_dim, 2, last_norm=pred_last_norm)

    def forward(self, view1, view2):
        """Two (B, 3, H, W) -> queries of both views and keys of both, (B, D) each, of unit rows.
        query1 is to find key2, and query2 key1. The target stays in training mode, as in v1."""
        query1 = self.predictor(self.online(view1))
        query2 = self.predictor(self.online(view2))
        with torch.no_grad():
            key1 = self.target(view1)
            key2 = self.target(view2)
        return (F.normalize(query1, dim=1), F.normalize(query2, dim=1),
                F.normalize(key1, dim=1), F.normalize(key2, dim=1))


def make_mlp(in_dim, hidden_dim, out_dim, num_layers, last_norm):
    """v3's MLP: linear layers without bias, each with BN and, except after the last, ReLU. The last
    BN has neither scale nor offset; without last_norm it is left out."""
    layers = []
    dim = in_dim
    for _ in range(num_layers - 1):
        layers.append(nn.Linear(dim, hidden_dim, bias=False))
        layers.append(nn.BatchNorm1d(hidden_dim))
        layers.append(nn.ReLU(inplace=True))
        dim = hidden_dim
    layers.append(nn.Linear(dim, out_dim, bias=False))
    if last_norm:
        layers.append(nn.BatchNorm1d(out_dim, affine=False))
    return nn.Sequential(*layers)


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


class GroupBatchNorm(nn.BatchNorm2d):
    """BN that normalizes `groups` parts of the batch separately, as that many GPUs would, each of
    at least two images. The running statistics follow the mean over the parts.
    nn.SyncBatchNorm.convert_sync_batchnorm would replace it, and undo the groups.

    norm: the nn.BatchNorm2d whose parameters and buffers it takes over.
    """

    def __init__(self, norm, groups):
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.groups = groups
        self.weight = norm.weight
        self.bias = norm.bias
        self.running_mean = norm.running_mean
        self.running_var = norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.training = norm.training

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        groups = max(1, min(self.groups, len(x) // 2))
        # batch_norm updates the buffers that it is given: with a momentum of 1, it overwrites them
        # with the mean and variance of this part.
        outputs = []
        means = []
        variances = []
        for part in x.tensor_split(groups):
            mean = torch.zeros_like(self.running_mean)
            variance = torch.zeros_like(self.running_var)
            outputs.append(F.batch_norm(part, mean, variance, self.weight, self.bias,
                                        training=True, momentum=1.0, eps=self.eps))
            means.append(mean)
            variances.append(variance)
        self.running_mean.lerp_(torch.stack(means).mean(0), self.momentum)
        self.running_var.lerp_(torch.stack(variances).mean(0), self.momentum)
        self.num_batches_tracked.add_(1)
        return torch.cat(outputs)


def replace_batch_norm(network, groups):
    """Replace each nn.BatchNorm2d in the network by a GroupBatchNorm of the same name and weights.
    ValueError: the network has another kind of BN, which would normalize the batch as a whole."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            # GroupBatchNorm: of a backbone that has been in a MoCo before
            if type(child) in (nn.BatchNorm2d, GroupBatchNorm):
                setattr(parent, name, GroupBatchNorm(child, groups))
            elif isinstance(child, nn.modules.batchnorm._BatchNorm):
                raise ValueError(f"layer {name} is a {type(child).__name__}: MoCo v1 and v2 can "
                                 "split only nn.BatchNorm2d into groups")


def shuffle_rows(view2):
    """Shuffled BN (v1, v2): returns this process's rows of the shuffled total batch, and the order.
    Without the shuffle, a query and its key would be normalized with the same other images, and the
    network could match them by these statistics, whatever the images show. Shuffling is worth 4
    points of kNN in the official CIFAR-10 notebook."""
    from common import gather, rank, world_size

    all_views = gather(view2)  # of the total batch
    order = torch.randperm(len(all_views), device=view2.device)  # the same on all processes
    mine = order.chunk(world_size())[rank()]
    return all_views[mine], order


@torch.no_grad()
def average_statistics(model):
    """Running BN statistics ← their mean over the processes, each of which has its own groups."""
    from common import all_sum, world_size

    statistics = [buffer for name, buffer in model.named_buffers() if "running_" in name]
    if world_size() == 1 or not statistics:
        return
    mean = all_sum(torch.cat(statistics)) / world_size()  # one message for all layers
    sizes = [len(buffer) for buffer in statistics]
    torch._foreach_copy_(statistics, mean.split(sizes))


def positions(dim, grid):
    """Fixed 2-D sine-cosine position embeddings of grid² patches, row by row, after zeros for the
    class token: (1, 1 + grid², dim).

    A quarter of the dimensions each: sin xω, cos xω, sin yω, cos yω, ω from 1 to almost 1 / 10000.
    The column x comes first, as in MAE's official code. In MoCo v3's it is the row, since its
    torch.meshgrid exchanges the two.
    """
    quarter = dim // 4
    exponent = torch.arange(quarter, dtype=torch.float64) / quarter
    omega = 10000**-exponent
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    code = torch.cat([angle.sin(), angle.cos()], 1)
    x_code = code.repeat(grid, 1)  # columns 0 1 2 0 1 2 ...
    y_code = code.repeat_interleave(grid, 0)  # rows 0 0 0 1 1 1 ...
    places = torch.cat([x_code, y_code], 1)
    return F.pad(places, (0, 0, 1, 0))[None].float()


VITS = {  # dim, depth, num_heads
    "vit_micro": (128, 4, 2),
    "vit_small": (384, 12, 12),
    "vit_base": (768, 12, 12),
}


def choose_patch_size(image_size):
    return 16 if image_size > 64 else 4


def make_vit(arch, image_size):
    """torchvision's ViT, (B, 3, S, S) -> its class token (B, feature_dim), with fixed position
    embeddings and a patch projection that stays random, v3's remedy for unstable training.

    As in the official code, vit_small has 12 heads, and q, k and v have Xavier's bounds each.
    """
    dim, depth, num_heads = VITS[arch]
    patch_size = choose_patch_size(image_size)
    vit = VisionTransformer(image_size, patch_size, depth, num_heads, dim, 4 * dim)
    vit.heads = nn.Identity()
    vit.feature_dim = dim
    for name, parameter in vit.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name.endswith("in_proj_weight"):
            q, k, v = parameter.detach().chunk(3)  # views of the parameter: filled in place
            for matrix in q, k, v:
                nn.init.xavier_uniform_(matrix)
        elif parameter.dim() == 2:
            nn.init.xavier_uniform_(parameter)
        elif parameter.dim() == 4:  # the patch projection
            matrix = parameter.detach().flatten(1)  # a view, too
            nn.init.xavier_uniform_(matrix)
    nn.init.normal_(vit.class_token, std=1e-6)
    embeddings = positions(dim, image_size // patch_size)
    vit.encoder.pos_embedding = nn.Parameter(embeddings, requires_grad=False)
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
def positive_found(query, key, queue=None):
    """Health: how often a query's own key is the most similar of all keys of the batch and the
    queue. It is high while the queue is noise, falls while keys fill it, and should then rise well
    above 1 / (B + Q), the chance level: (B, D), (B, D), (Q, D) or None -> scalar."""
    keys = key if queue is None else torch.cat([key, queue])
    nearest = (query @ keys.T).argmax(1)
    return (nearest == torch.arange(len(query), device=query.device)).float().mean()


# --------------------------------------------------------------------------------- augmentation


def augment(images, aspect, version, image_size, crop_scale, jitter_strength, blur, solarize):
    """The papers' augmentations: uint8 images (B, 3, S, S), resized to squares, and aspect (B,),
    their original width / height -> views (B, 3, image_size, image_size). In v3 the two views
    differ in the fractions that are blurred and solarized (bright pixels inverted)."""
    from common import (color_jitter, gaussian_blur, normalize, random_grayscale,
                        random_horizontal_flip, random_resized_crop, random_solarize)

    s = jitter_strength
    x = random_resized_crop(images, aspect, image_size, scale=(crop_scale, 1.0))
    if version == 1:
        x = random_grayscale(x, p=0.2)
        x = color_jitter(x, 0.4 * s, 0.4 * s, 0.4 * s, 0.4 * s, p=1.0)
    elif version == 2:
        x = color_jitter(x, 0.4 * s, 0.4 * s, 0.4 * s, 0.1 * s, p=0.8)
        x = random_grayscale(x, p=0.2)
    else:
        x = color_jitter(x, 0.4 * s, 0.4 * s, 0.2 * s, 0.1 * s, p=0.8)
        x = random_grayscale(x, p=0.2)
    x = gaussian_blur(x, p=blur, kernel_size=13, sigma=(0.1, 2.0))  # radius: 3 times the largest σ
    x = random_solarize(x, p=solarize)
    x = random_horizontal_flip(x, p=0.5)
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
    """As in the official code: LARS neither decays nor adapts biases and BN; the others decay all
    parameters."""
    params = [p for p in model.parameters() if p.requires_grad]
    if name == "lars":
        weights = [p for p in params if p.ndim > 1]
        others = [p for p in params if p.ndim <= 1]
        groups = [{"params": weights}, {"params": others, "weight_decay": 0.0, "adapt": False}]
        return LARS(groups, lr=0.0, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(params, lr=0.0, weight_decay=weight_decay)
    return torch.optim.SGD(params, lr=0.0, momentum=0.9, weight_decay=weight_decay)


def train(args):
    """Algorithm 1 of v1 (for v1 and v2) or of v3, once per step."""
    # Imported here, so that this file alone, copied elsewhere, can be imported without them.
    from common import (SAVE_SECONDS, Failure, autocast, batch_that_fits, batches, gather,
                        load_checkpoint, load_data, log, log_knn, make_backbone, open_run, parallel,
                        save_checkpoint, save_views, start, warmup_that_fits, world_size, write_log)
    from linear_probe import evaluate, load_backbone, quick_knn

    device = start(args.device, args.seed)
    if args.version < 3 and args.bn_groups % world_size() != 0:
        raise Failure(f"--bn-groups {args.bn_groups}: no multiple of {world_size()} processes")
    train_set, test_set = load_data(args, device)
    args.batch_size = batch_that_fits(args.batch_size, train_set)  # over all processes
    steps_per_epoch = len(train_set) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = warmup_that_fits(round(args.warmup_epochs * steps_per_epoch), total_steps)
    peak_lr = args.lr * args.batch_size / 256

    is_vit = args.arch in VITS
    if is_vit:
        backbone = make_vit(args.arch, args.image_size)
    else:
        backbone = make_backbone(args.arch, args.image_size, zero_init_residual=args.version == 3)
    untrained = copy.deepcopy(backbone)  # the report's baseline
    if args.init:
        load_backbone(args.init, network=backbone)
    if args.version < 3:
        model = MoCo(backbone, backbone.feature_dim, proj_layers=1 if args.version == 1 else 2,
                     proj_dim=args.proj_dim, queue_size=args.queue_size,
                     bn_groups=args.bn_groups // world_size())
        last_ema_momentum = args.ema_momentum  # as at the start: it stays constant
        chance = math.log(1 + args.queue_size)
    else:
        model = MoCoV3(backbone, backbone.feature_dim, args.proj_dim, args.hidden_dim,
                       proj_layers=3 if is_vit else 2, pred_last_norm=is_vit)
        last_ema_momentum = 1.0
        chance = 2 * (2 * args.temperature * math.log(args.batch_size))  # the sum of two losses
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(args.optimizer, model, args.weight_decay)
    augment_both = partial(augment, version=args.version, image_size=args.image_size,
                           crop_scale=args.crop_scale,
                           jitter_strength=args.jitter_strength)
    augment1 = partial(augment_both, blur=args.blur1, solarize=0.0)
    augment2 = partial(augment_both, blur=args.blur2, solarize=args.solarize2)

    open_run(args)
    first_step = load_checkpoint(args, train_set, model, optimizer)  # 0, or where to resume
    # DDP when there are several processes, and SyncBN in v3, which has no groups
    network = parallel(model, args.compile, sync_bn=args.version == 3)
    save_views(args, train_set, device, augment1, augment2)
    untrained_knn = None  # measured when the first epoch ends
    started = saved_at = time.monotonic()

    for step, images, aspect in batches(train_set, args, first_step, device):  # seeds each step
        lr = cosine_schedule(step, total_steps, warmup_steps, peak_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        ema_momentum = cosine_schedule(step, total_steps, warmup_steps=0,
                                       base=args.ema_momentum, end=last_ema_momentum)
        view1 = augment1(images, aspect)
        view2 = augment2(images, aspect)
        ema_update(model.target, model.online, ema_momentum)
        if args.version < 3:
            view2, order = shuffle_rows(view2)
            with autocast(device):  # the network only: the loss needs float32
                query, key = network(view1, view2)
            query = gather(query.float())
            key = gather(key.float())
            unshuffle = order.argsort()  # the inverse permutation
            key = key[unshuffle]  # row i is again the key of query i
            loss = moco_loss(query, key, model.queue, args.temperature)
        else:
            with autocast(device):  # the network only: the loss needs float32
                query1, query2, key1, key2 = network(view1, view2)
            query1 = gather(query1.float())
            query2 = gather(query2.float())
            key1 = gather(key1.float())  # negatives from all processes
            key2 = gather(key2.float())
            loss = (moco_v3_loss(query1, key2, args.temperature)
                    + moco_v3_loss(query2, key1, args.temperature))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if args.version < 3:
            found = positive_found(query, key, model.queue)  # before these keys join the queue
            model.enqueue(key)
            average_statistics(model)
        else:
            found = positive_found(query1, key2)

        done = step + 1
        epoch_ends = done % steps_per_epoch == 0
        if done == 1 or done % args.print_freq == 0 or epoch_ends:
            log(args, done, total_steps, first_step, started, lr=lr, loss=loss, chance=chance,
                positive_found=found)
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
    "recipe": ("demo", "cpu", "cifar", "imagenet", "imagenet-v1", "imagenet-v3", "imagenet-v3-vit"),
    "arch": ("resnet8", "resnet8", "resnet18", "resnet50", "resnet50", "resnet50", "vit_small"),
    #                  demo     cpu      cifar    imagenet -v1      -v3       -v3-vit
    "version":        (2,       2,       2,       2,       1,       3,        3),
    "image_size":     (32,      32,      32,      224,     224,     224,      224),
    "eval_size":      (32,      32,      32,      224,     224,     224,      224),
    "epochs":         (8,       20,      200,     200,     200,     100,      300),
    "warmup_epochs":  (0.5,     1,       0,       0,       0,       10,       40),
    "batch_size":     (32,      64,      512,     256,     256,     512,      512),
    "optimizer":      ("sgd",   "sgd",   "sgd",   "sgd",   "sgd",   "lars",   "adamw"),
    "lr":             (0.48,    0.24,    0.03,    0.03,    0.03,    0.6,      1.5e-4),
    "weight_decay":   (5e-4,    5e-4,    5e-4,    1e-4,    1e-4,    1e-6,     0.1),
    "temperature":    (0.1,     0.2,     0.1,     0.2,     0.07,    1.0,      0.2),
    "ema_momentum":   (0.9,     0.99,    0.99,    0.999,   0.999,   0.9987,   0.9987),
    "queue_size":     (256,     1024,    4096,    65536,   65536,   65536,    65536),
    "bn_groups":      (2,       2,       8,       8,       8,       8,        8),
    "hidden_dim":     (256,     256,     4096,    4096,    4096,    4096,     4096),
    "proj_dim":       (64,      64,      128,     128,     128,     256,      256),
    "crop_scale":     (0.35,    0.2,     0.08,    0.2,     0.2,     0.2,      0.08),
    "blur1":          (0.0,     0.0,     0.0,     0.5,     0.0,     1.0,      1.0),
    "blur2":          (0.0,     0.0,     0.0,     0.5,     0.0,     0.1,      0.1),
    "solarize2":      (0.0,     0.0,     0.0,     0.0,     0.0,     0.2,      0.2),
}


def parse_args(argv=None):
    from common import NETWORKS, make_parser, parse_with_recipe

    parser = make_parser("moco", __doc__, RECIPES, f"{', '.join(VITS)}, {NETWORKS}")
    parser.epilog = ("The log's `positive found` falls while the queue fills, then should rise "
                     "far above 1 / (--batch-size + --queue-size). Version 3 has no queue.")
    add = parser.add_argument
    add("--version", type=int, choices=[1, 2, 3], help="of MoCo: model, loss and augmentation; "
        "other flags stay as the recipe has them")
    add("--optimizer", choices=["sgd", "lars", "adamw"],
        help="paper: v1 and v2 sgd, v3 lars, with a ViT adamw")
    add("--temperature", type=float,
        help="softmax temperature, τ; paper: v1 0.07, v2 0.2, v3 1, with a ViT 0.2")
    add("--ema-momentum", type=float,
        help="weight of the old target, m, which in v3 rises to 1; paper: 0.999, v3 "
        "with a ViT 0.99")
    add("--queue-size", type=int, help="v1, v2: keys in the queue; paper: 65536")
    add("--bn-groups", type=int,
        help="v1, v2: parts of the total batch that BN normalizes separately; paper: 8 (GPUs)")
    add("--hidden-dim", type=int, help="v3: width of projector and predictor; paper: 4096")
    add("--proj-dim", type=int, help="length of query and key; paper: 128, v3 256")
    add("--crop-scale", type=float,
        help="smallest crop, fraction of the image's area; paper: 0.2, with a ViT 0.08")
    add("--jitter-strength", type=float, default=1.0,
        help="strength of the color jitter, s; papers: 1")
    add("--blur1", type=float, help="fraction of first views that are blurred; paper: v2 0.5, v3 1")
    add("--blur2", type=float,
        help="fraction of second views that are blurred; paper: v2 0.5, v3 0.1")
    add("--solarize2", type=float,
        help="fraction of second views that are solarized; paper: v3 0.2")
    args = parse_with_recipe(parser, RECIPES, argv)

    patch_size = choose_patch_size(args.image_size)
    if args.arch in VITS and args.image_size % patch_size != 0:
        parser.error(f"--image-size {args.image_size}: no multiple of the patch size, {patch_size}")
    if args.arch in VITS:
        args.eval_size = args.image_size  # for which its positions are
    return args


# ------------------------------------------------------------------------- sources and departures

# Sources. imagenet: the papers and facebookresearch/moco and moco-v3. (v3: batch 4096 and EMA 0.99.
# At batch 512 the average covers as many images with 0.99^(1/8) = 0.9987.) Published linear probes:
# v1 60.8, v2 67.5, v3 68.9 %, with ViT-S 73.2. v3's 1000 epochs, 74.6 %, have rate 0.3, decay
# 1.5e-6 and EMA 0.996 (at 512: 0.9995). cifar: moco's CIFAR-10 notebook, which mixes v1's projector
# and v2's jitter (here v2's projector, and ImageNet's mean and std). demo: measured on the
# synthetic images. cpu: chosen without a search. v3 on 32 pixels was never run; solo-learn's values
# are --version 3 --temperature 0.2 --proj-dim 256 --solarize2 0.2 --optimizer lars --weight-decay
# 1e-6 --warmup-epochs 10, and a rate that has to be searched here, since its LARS (rate 0.3, η
# 0.02) clips the adapted rate.
#
# Departures from the papers: the learning rate falls on a cosine per step (v1: to a tenth at epochs
# 120 and 160 of 200; v2: per epoch). BN groups are parts of the total batch, whatever the number of
# GPUs, and their running statistics are averaged (official: the first GPU's). The queue need not be
# a multiple of the batch. The target moves at the start of a step, as in the official code; in the
# papers' algorithms it moves at the end, which is the same except for v3's schedule. Blur is a true
# Gaussian that reflects the border (official: PIL's, made of box blurs, which repeats the edge
# pixels). Training is in bfloat16 on CUDA (official: v1 and v2 float32, v3 float16). Crops are
# taken from a square canvas of 8/7 of the view's side (official: from the whole image), so that
# small crops are less sharp, and elongated images lose more (cut them beforehand). In the official
# code only: in v3 a residual block's last BN starts at 0, a ResNet's predictor does not end in BN,
# other last BN layers have no scale and offset; how often views are blurred and solarized.

if __name__ == "__main__":
    from common import main

    main(train, parse_args)
