"""SwAV: from one view of an image, predict which cluster another view of it belongs to.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (2020,
arXiv 2006.09882). Survey family: clustering, with assignments computed in each batch. What prevents
collapse: Sinkhorn-Knopp, which gives each cluster an equal share of the images.

Each image is cropped into two large and several small views (multi-crop), and each view is compared
with K prototypes, the learned centres of the clusters. Sinkhorn-Knopp turns the scores of the large
views into codes: probabilities of the clusters, balanced so that over the batch all clusters are
equally likely. Every other view of the image then learns to predict a large view's code.

              ┌─ large view s ─ backbone ─ projector ─ z_s ─ scores ─ Sinkhorn ─ code q_s ─┐
        image ┤                 (shared)   (shared)           (prototypes)  no gradient    ├─ loss
              ├─ large view t ─ backbone ─ projector ─ z_t ─ scores ─ softmax ─ p_t ───────┘
              └─ small views   (likewise)  └─ z of unit length     and s, t swapped
                                 └─ what is kept

Run      python swav.py                         demonstration: drawn images, CPU, minutes
         python swav.py --data path             a folder of images, or cifar10
         torchrun --nproc-per-node=8 swav.py --data path
Reuse    from swav import SwAV, sinkhorn, swav_loss, LARS, cosine       (needs torch only)
"""

import copy
import itertools
import math
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


class SwAV(nn.Module):
    """Backbone, projector, prototypes and the queue.

    backbone: (B, 3, H, W) -> (B, feature_dim), for any H and W. queue_size: how many z of past
    batches are kept for each of the two large views, and clustered with a small batch; 0: none.
    """

    def __init__(self, backbone, feature_dim, proj_dim=128, num_prototypes=3000, queue_size=0):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(feature_dim, feature_dim, bias=False), nn.BatchNorm1d(feature_dim),
            nn.ReLU(inplace=True), nn.Linear(feature_dim, proj_dim))
        self.prototypes = nn.Linear(proj_dim, num_prototypes, bias=False)  # weight (K, D)
        self.register_buffer("queue", torch.zeros(2, queue_size, proj_dim))
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))  # where the oldest is

    def forward(self, views):
        """V views (B, 3, H, W), those of one size next to each other -> z (V, B, D), of unit
        length, and scores (V, B, K). As in the authors' code, views of one size share a pass of the
        backbone, and all views one of the projector: what shares a pass shares BN statistics."""
        sizes = itertools.groupby(views, key=lambda view: view.shape[-1])
        features = torch.cat([self.backbone(torch.cat(list(group))) for _, group in sizes])
        z = F.normalize(self.projector(features), dim=1)
        return z.unflatten(0, (len(views), -1)), self.prototypes(z).unflatten(0, (len(views), -1))

    @torch.no_grad()
    def normalize_prototypes(self):
        """To unit length again, so that scores are cosines. Call it before every forward."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    @torch.no_grad()
    def assigning_scores(self, z, with_queue):
        """z (2, B, D) of the large views -> the scores for Sinkhorn: (2, B, K), or (2, B + Q, K)
        with the queue. It holds z, not scores, so that the present prototypes score past images."""
        z = torch.cat([z, self.queue], dim=1) if with_queue else z
        return z @ self.prototypes.weight.T

    @torch.no_grad()
    def enqueue(self, z):
        """Put z (2, B, D) of the large views in the place of the oldest in the queue."""
        size = self.queue.shape[1]
        z = z[:, -size:]
        places = (self.queue_ptr + torch.arange(z.shape[1], device=z.device)) % size
        self.queue.index_copy_(1, places, z)
        self.queue_ptr.add_(z.shape[1]).remainder_(size)


# ----------------------------------------------------------------------------------------- loss


@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """Scores (B, K) of images and prototypes -> codes (B, K), rows sum to 1, no gradient.

    The codes are B · Q*, equations 3 to 5 of the paper. Q* maximises

        Σ_ij Q_ij · scores_ij + ε H(Q),   H the entropy,

    over all Q ≥ 0 whose rows sum to 1 / B (images count alike) and columns to 1 / K (so do
    prototypes). It is Diag(u) exp(scores / ε) Diag(v), found by dividing columns and rows by their
    sums in turn (Sinkhorn-Knopp); in logarithms, as exp overflows, each division is a log-softmax.
    After a few iterations the columns' sums are only nearly equal.
    """
    log_q = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon
    for _ in range(iterations):
        log_q = log_q.log_softmax(0)  # all prototypes get the same share
        log_q = log_q.log_softmax(1)  # each image's code sums to 1
    return log_q.exp()


def swav_loss(scores, codes, temperature):
    """Swapped prediction: V scores (B, K), the two large views' first, and their 2 codes (B, K)
    -> scalar.

        l(z_t, q_s) = - Σ_k q_s^k log p_t^k,   p_t = softmax(scores_t / τ)

    equation 2 of the paper, averaged over the B images and the 2 (V - 1) pairs of a large view s
    and any other view t (equation 6: summed). Chance level: ln K.
    """
    log_p = [F.log_softmax(score / temperature, dim=1) for score in scores]
    swaps = [-(q.detach() * log_p[t]).sum(1).mean()  # codes are targets
             for s, q in enumerate(codes) for t in range(len(log_p)) if t != s]
    return torch.stack(swaps).mean()


@torch.no_grad()
def code_entropy(codes):
    """Health: mean entropy of an image's code, over ln K: (B, K) -> scalar. It should be clearly
    below 1, and the loss below ln K; if they stay there, the authors advise a smaller --epsilon
    (0.03), more --freeze-epochs, or a later --queue-epoch. (The entropy of the mean code would say
    nothing: Sinkhorn keeps it at ln K.)"""
    return torch.special.entr(codes).sum(1).mean() / math.log(codes.shape[1])


# --------------------------------------------------------------------------------- augmentation


def augment(images, aspect, size, crop_scale, jitter_strength, blur):
    """The paper's augmentation, of large and small views: uint8 images (B, 3, S, S), squeezed to
    squares from width / height = aspect (B,) -> views (B, 3, size, size). crop_scale: smallest and
    largest crop, as fractions of the image's area (paper: large 0.14 to 1, small 0.05 to 0.14)."""
    from common import (color_jitter, gaussian_blur, normalize, random_grayscale,
                        random_horizontal_flip, random_resized_crop)

    s = jitter_strength
    x = random_resized_crop(images, aspect, size, scale=crop_scale)
    x = random_horizontal_flip(x, p=0.5)
    x = color_jitter(x, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8)
    x = random_grayscale(x, p=0.2)
    x = gaussian_blur(x, p=blur, kernel_size=13, sigma=(0.1, 2.0))  # 13: to 3 σ, as PIL does
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


def make_optimizer(name, model, weight_decay):
    """All parameters alike, as in the authors' code: biases and BN are decayed and adapted, too."""
    if name == "lars":
        return LARS(model.parameters(), lr=0.0, weight_decay=weight_decay)
    return torch.optim.Adam(model.parameters(), lr=0.0, weight_decay=weight_decay)


@torch.no_grad()
def nearest_views(model, views, count=8):
    """For each of the prototypes that are the nearest of most views (B, 3, H, W), the views that
    are nearest to it: (rows, columns, 3, H, W), `count` of each where there are as many."""
    scores = model.eval()([views])[0][0] @ F.normalize(model.prototypes.weight, dim=1).T
    count = min(count, *scores.shape)
    popular = (scores == scores.amax(1, keepdim=True)).sum(0).topk(count).indices
    return views[scores[:, popular].topk(count, dim=0).indices.T]


def save_prototypes(args, model, images, device):
    """prototypes.png: each row shows the images that are nearest to one prototype."""
    from common import centre_view, denormalize, rank, save_picture

    if rank() == 0:
        (some,) = images.load([torch.arange(0, len(images), -(-len(images) // 256))], device)
        columns = nearest_views(model, centre_view(*some, args.image_size)).unbind(1)
        save_picture(f"{args.out}/prototypes.png", *map(denormalize, columns))


def train(args):
    """The paper's pseudocode, with multi-crop and the queue, once per step."""
    from common import (batch_that_fits, batches, gather, load_checkpoint, load_data, log,
                        make_backbone, parallel, rank, save_checkpoint, save_views, start,
                        write_log)
    from linear_probe import evaluate, load_init

    device = start(args.device, args.seed, args.deterministic)
    train_set, test_set = load_data(args.data, args.image_size, args.max_images, args.workers,
                                    device)
    args.batch_size = batch_that_fits(args, train_set)  # over all processes
    steps_per_epoch = len(train_set) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    frozen_steps = round(args.freeze_epochs * steps_per_epoch)
    queue_start = round(args.queue_epoch * steps_per_epoch)
    queue_full = queue_start + math.ceil(args.queue_size / args.batch_size)
    peak_lr = args.lr * args.batch_size / 256

    backbone = make_backbone(args.arch, args.image_size)
    untrained = copy.deepcopy(backbone)  # the report's baseline
    load_init(backbone, args.init)
    model = SwAV(backbone, backbone.feature_dim, args.proj_dim, args.num_prototypes,
                 args.queue_size)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(args.optimizer, model, args.weight_decay)
    view = partial(augment, jitter_strength=args.jitter_strength, blur=args.blur)
    large = partial(view, size=args.image_size, crop_scale=(args.crop_scale, 1.0))
    small = partial(view, size=args.small_size, crop_scale=(args.small_crop_scale, args.crop_scale))
    crops = [large] * 2 + [small] * args.small_crops
    step = load_checkpoint(args, train_set, model, optimizer)  # 0, or where the run goes on
    network = parallel(model, args.compile)  # DistributedDataParallel and SyncBN, if of several
    save_views(args, train_set, device, *crops)
    saved_at = save_checkpoint(args, step, train_set, model, optimizer, backbone)
    started = step, time.monotonic()  # for the speed and the time left
    chance = math.log(args.num_prototypes)

    for step, images, aspect in batches(train_set, args, step, device):  # seeded by step
        lr = cosine(step, total_steps, warmup_steps, peak_lr, peak_lr / 1000)
        for group in optimizer.param_groups:
            group["lr"] = lr
        views = [crop(images, aspect) for crop in crops]
        model.normalize_prototypes()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            z, scores = network(views)
        z = torch.stack([gather(v.detach()) for v in z[:2].float()])  # of all processes
        assigning = model.assigning_scores(z, step >= queue_full)
        mine = slice(rank() * len(images), (rank() + 1) * len(images))  # images of this process
        codes = [sinkhorn(s, args.epsilon, args.sinkhorn_iterations)[mine] for s in assigning]
        loss = swav_loss(scores.float(), codes, args.temperature)
        optimizer.zero_grad()
        loss.backward()
        if step < frozen_steps:
            model.prototypes.weight.grad = None  # at 0, decay and momentum would go on
        optimizer.step()
        if args.queue_size > 0 and step >= queue_start:
            model.enqueue(z)

        done, epoch_ends = step + 1, (step + 1) % steps_per_epoch == 0
        if done == 1 or done % args.print_freq == 0 or epoch_ends:
            log(args, done, total_steps, started, lr, loss, chance,
                code_entropy=code_entropy(torch.cat(codes)))
        if epoch_ends or time.monotonic() - saved_at > 600:
            saved_at = save_checkpoint(args, done, train_set, model, optimizer, backbone)
    save_prototypes(args, model, train_set, device)
    report = evaluate(backbone, untrained, train_set, test_set, args.image_size, device)
    write_log(args, {"step": total_steps, "report": report})


RECIPES = {
    "recipe":              ("demo",     "cpu",      "cifar",     "imagenet"),
    "arch":                ("resnet8",  "resnet8",  "resnet18",  "resnet50"),
    "image_size":          (32,         32,         32,          224),
    "epochs":              (8,          20,         200,         200),
    "warmup_epochs":       (1,          1,          0,           0),
    "batch_size":          (128,        128,        512,         256),
    "optimizer":           ("adam",     "adam",     "adam",      "lars"),
    "lr":                  (5e-3,       3e-3,       2e-3,        0.6),
    "weight_decay":        (1e-6,       1e-6,       1e-6,        1e-6),
    "temperature":         (0.1,        0.1,        0.1,         0.1),
    "epsilon":             (0.02,       0.02,       0.05,        0.05),
    "sinkhorn_iterations": (3,          3,          3,           3),
    "num_prototypes":      (256,        256,        512,         3000),
    "freeze_epochs":       (0,          0,          1,           1),
    "queue_size":          (0,          0,          0,           3840),
    "queue_epoch":         (0,          0,          0,           15),
    "proj_dim":            (64,         64,         128,         128),
    "small_crops":         (0,          0,          0,           6),
    "small_size":          (16,         16,         16,          96),
    "crop_scale":          (0.35,       0.2,        0.14,        0.14),
    "small_crop_scale":    (0.1,        0.1,        0.05,        0.05),
    "jitter_strength":     (0.5,        0.5,        0.5,         1.0),
    "blur":                (0.0,        0.0,        0.0,         0.5),
}
FLAGS = {  # type, lowest, highest, help, the paper's value
    "optimizer": (("lars", "adam"), None, None, "optimizer", "lars"),
    "temperature": (float, 1e-3, 100, "softmax temperature, τ", "0.1"),
    "epsilon": (float, 1e-3, 100, "ε of Sinkhorn: the smaller, the sharper the codes", "0.05"),
    "sinkhorn_iterations": (int, 1, 10**3, "iterations of Sinkhorn-Knopp", "3"),
    "num_prototypes": (int, 2, 10**6, "prototypes, K", "3000"),
    "freeze_epochs": (float, 0, 10**6, "epochs in which the prototypes do not learn", "1"),
    "queue_size": (int, 0, 10**6, "z of past images kept for each large view; 0: none", "3840"),
    "queue_epoch": (float, 0, 10**6, "epoch from which the queue fills; used when full", "15"),
    "proj_dim": (int, 1, 10**5, "length of z", "128"),
    "small_crops": (int, 0, 100, "small views per image", "6"),
    "small_size": (int, 8, 10**4, "side of a small view, in pixels", "96"),
    "crop_scale": (float, 1e-3, 1, "smallest large, largest small crop: fraction of area", "0.14"),
    "small_crop_scale": (float, 1e-3, 1, "smallest small crop: fraction of area", "0.05"),
    "jitter_strength": (float, 0, 1.25, "strength of the colour jitter, s", "1"),
    "blur": (float, 0, 1, "fraction of views that are blurred", "0.5"),
}


def parse_args(argv=None):
    from common import parse_flags, wrong_arguments

    args = parse_flags("swav", __doc__, RECIPES, FLAGS, argv)
    if args.small_crops and args.small_crop_scale > args.crop_scale:
        wrong_arguments(f"--small-crop-scale {args.small_crop_scale} is above --crop-scale")
    return args


# Sources. imagenet: the authors' recipe for batches of 256 (facebookresearch/swav; linear probe
# 72.7 %). Theirs for batches of 4096 (rate 0.3 per 256, 10 epochs of warm-up, no queue) reaches
# 75.3 % in 800 epochs. cifar: lightly's CIFAR-10 benchmark, with the authors' frozen first epoch.
# demo: the best values measured on the drawn images. cpu: for real images, not tuned.
#
# Departures from the paper: LARS for the authors' LARC, which divides by |g| + weight_decay · |w|
# (LARS: |g + weight_decay · w|); a warm-up starts at 0 (authors' code: 1/16 of the peak); no bias
# ahead of the projector's BN, which would cancel it; codes come from float32 scores (authors' code:
# float16); blur is a true Gaussian (authors' code: PIL's three box filters).

if __name__ == "__main__":
    from common import main

    main(train, parse_args)
