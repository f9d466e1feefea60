"""SwAV: the cluster that one view of an image falls into is predicted from its other views.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (2020,
arXiv 2006.09882).
Survey family: clustering, with codes computed online. What prevents collapse: Sinkhorn-Knopp, which
gives each cluster an equal share of the images.

Each image is cut into two large views and several small ones (multi-crop), which are all scored
against K prototypes, the learned centres of the clusters. Sinkhorn-Knopp turns the scores of the
large views into codes, soft choices of prototypes, so that over the batch all are chosen equally
often. From its own scores, every other view of the image has to predict a large view's code.

              ┌─ large view s ─ backbone ─ projector ─ z_s ─ scores ─ Sinkhorn ─ code q_s ─┐
        image ┤                 (shared)   (shared)           (prototypes)  no gradient    ├─ loss
              ├─ large view t ─ backbone ─ projector ─ z_t ─ scores ─ softmax ─ p_t ───────┘
              └─ small views   (likewise)  └─ z of unit length     and s, t swapped
                                 └─ what is kept

Run      python swav.py                         demonstration: built-in images, CPU, a minute
         python swav.py --data path             a folder of images, or cifar10
         torchrun --nproc-per-node=8 swav.py --data path
Reuse    from swav import SwAV, sinkhorn, swav_loss     (needs torch only)

On the log line the loss should leave ln K, printed as chance, and code_entropy, the mean entropy of
a code over ln K, fall clearly below 1. If they do not, the authors advise a smaller --epsilon
(0.03), longer --freeze-epochs, or a later queue. In prototypes.png, a row has a cluster's images.

Departures from the paper: LARS on all parameters, biases and BN too, for the authors' LARC, which
divides by |g| + weight_decay · |w|, LARS by |g + weight_decay · w|; a warm-up starts at 0 (authors'
code: 1/16 of the peak); no bias ahead of the projector's BN, which cancels it; codes come from
float32 scores (authors' code: float16); blur is a true Gaussian (authors' code: PIL's three boxes).

Measured in the demonstration, top-1 in percent (of the network at random):
built-in set, kNN 70.3 (35.4), probe 86.8 (43.0); seeds: 3
10,000 of CIFAR-10, kNN 39.9 (32.2), probe 46.1 (34.6); seeds: 3
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


class SwAV(nn.Module):
    """Backbone, projector, prototypes and the queue.

    backbone: (B, 3, H, W) -> (B, feature_dim), for any H and W. queue_size: embeddings of past
    batches, for each of the two large views, that are assigned with a small batch; 0: none.
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
        """V views (B, 3, ., .), those of one size adjacent -> z (V, B, D) of unit length and scores
        (V, B, K). One pass of the backbone for each size, whose views so share BN statistics, and
        one of the projector over all views, as in the authors' code."""
        sizes = itertools.groupby(views, key=lambda view: view.shape[-1])
        features = torch.cat([self.backbone(torch.cat(list(group))) for _, group in sizes])
        z = F.normalize(self.projector(features), dim=1)
        return z.unflatten(0, (len(views), -1)), self.prototypes(z).unflatten(0, (len(views), -1))

    @torch.no_grad()
    def normalize_prototypes(self):
        """Back to the unit sphere, so that scores are cosines; before every forward."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    @torch.no_grad()
    def assigning_scores(self, z, with_queue):
        """z (2, B, D) of the large views -> what Sinkhorn sees of each: (2, B, K), or (2, B + Q, K)
        with the queue, whose embeddings are scored against the prototypes as they are now."""
        z = torch.cat([z, self.queue], dim=1) if with_queue else z
        return z @ self.prototypes.weight.T

    @torch.no_grad()
    def enqueue(self, z):
        """z (2, B, D) of the large views takes the place of the oldest in the queue."""
        size = self.queue.shape[1]
        z = z[:, -size:]
        places = (self.queue_ptr + torch.arange(z.shape[1], device=z.device)) % size
        self.queue.index_copy_(1, places, z)
        self.queue_ptr.add_(z.shape[1]).remainder_(size)


# ----------------------------------------------------------------------------------------- loss


@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """Scores (B, K) of images against prototypes -> codes (B, K), rows sum to 1, no gradient.

    The codes are B · Q*, equations 3 to 5 of the paper: of all Q whose rows have equal sums, and
    whose columns have equal sums, Q* is the one with the largest

        Σ_ij Q_ij · scores_ij + ε H(Q);   Q* = Diag(u) exp(scores / ε) Diag(v)

    found by scaling rows and columns in turn (Sinkhorn-Knopp). In the log domain, each scaling is
    a log-softmax: finite at any scale of the scores, where exp(scores / ε) overflows. After few
    iterations the columns' sums, B / K, are not quite reached.
    """
    log_q = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon
    for _ in range(iterations):
        log_q = log_q.log_softmax(0)  # every prototype gets as many images
        log_q = log_q.log_softmax(1)  # every image is given away once
    return log_q.exp()


def swav_loss(scores, codes, temperature):
    """Swapped prediction: V scores (B, K), of the assigning views first, and their 2 codes (B, K)
    -> scalar.

        l(z_t, q_s) = - Σ_k q_s^k log p_t^k,   p_t = softmax(scores_t / τ)

    equation 2 of the paper, averaged over the B images and the 2 (V - 1) pairs of an assigning view
    s and any other view t (equation 6: summed). Guessing gives ln K. Codes must have no gradient.
    """
    log_p = [F.log_softmax(score / temperature, dim=1) for score in scores]
    swaps = [-(q * log_p[t]).sum(1).mean()
             for s, q in enumerate(codes) for t in range(len(log_p)) if t != s]
    return torch.stack(swaps).mean()


@torch.no_grad()
def code_entropy(codes):
    """Health: the mean entropy of the images' codes over ln K, clearly below 1 if codes tell images
    apart: (B, K) -> scalar. (The entropy of the mean code tells nothing: Sinkhorn forces it.)"""
    return torch.special.entr(codes).sum(1).mean() / math.log(codes.shape[1])


@torch.no_grad()
def cluster_pictures(model, images, views, count=8):
    """Columns of images (B, 3, S, S): a row for each of the prototypes that most of the views score
    highest, with the images whose views (B, 3, H, W) score highest there, in falling order."""
    scores = model.eval()([views])[0][0] @ F.normalize(model.prototypes.weight, dim=1).T
    count = min(count, *scores.shape)
    popular = (scores == scores.amax(1, keepdim=True)).sum(0).topk(count).indices
    return images[scores[:, popular].topk(count, dim=0).indices]


# --------------------------------------------------------------------------------- augmentation


def make_augment(image_size, crop_scale, jitter_strength, blur):
    """The augmentation of the large views (smallest to largest crop_scale 0.14 to 1 in the paper)
    and, at a smaller size, of the small ones (0.05 to 0.14)."""
    from common import (Augment, ColorJitter, GaussianBlur, Normalize, RandomGrayscale,
                        RandomHorizontalFlip, RandomResizedCrop)

    s = jitter_strength
    return Augment([
        RandomResizedCrop(image_size, scale=crop_scale),
        RandomHorizontalFlip(0.5),
        ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8),
        RandomGrayscale(0.2),
        GaussianBlur(blur, sigma=(0.1, 2.0), kernel_size=13),  # to 3 σ, as PIL
        Normalize(),
    ])


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


def make_optimizer(name, model, weight_decay):
    """All parameters alike, as in the authors' code: biases and BN are decayed and adapted, too."""
    if name == "lars":
        return LARS(model.parameters(), lr=0.0, weight_decay=weight_decay)
    return torch.optim.Adam(model.parameters(), lr=0.0, weight_decay=weight_decay)


def train(args):
    """The paper's pseudocode, with multi-crop and the queue, once per step."""
    from common import Run, eval_view, gather, make_backbone, rank

    run = Run("swav", args)
    backbone = run.init(make_backbone(args.arch, args.image_size))
    model = SwAV(backbone, backbone.feature_dim, args.proj_dim, args.num_prototypes,
                 args.queue_size)
    optimizer = make_optimizer(args.optimizer, model, args.weight_decay)
    large = make_augment(args.image_size, (args.crop_scale, 1.0), args.jitter_strength, args.blur)
    small = make_augment(args.small_size, (args.small_crop_scale, args.crop_scale),
                         args.jitter_strength, args.blur)
    augments = [large, large] + [small] * args.small_crops
    network = run.start(model, optimizer, backbone)
    run.save_views(*augments)
    chance = math.log(args.num_prototypes)
    frozen_steps = round(args.freeze_epochs * run.steps_per_epoch)
    queue_start = round(args.queue_epoch * run.steps_per_epoch)
    queue_full = queue_start + math.ceil(args.queue_size / args.batch_size)

    for step, images, aspect in run.steps():
        lr = cosine(step, run.total_steps, run.warmup_steps, run.peak_lr, run.peak_lr / 1000)
        for group in optimizer.param_groups:
            group["lr"] = lr
        views = [augment(images, aspect) for augment in augments]
        model.normalize_prototypes()
        with run.autocast():
            z, scores = network(views)
        z = torch.stack([gather(v.detach()) for v in z[:2].float()])  # of all processes
        assigning = model.assigning_scores(z, args.queue_size > 0 and step >= queue_full)
        mine = slice(rank() * len(images), (rank() + 1) * len(images))
        codes = [sinkhorn(s, args.epsilon, args.sinkhorn_iterations)[mine] for s in assigning]
        loss = swav_loss(scores.float(), codes, args.temperature)
        optimizer.zero_grad()
        loss.backward()
        if step < frozen_steps:
            model.prototypes.weight.grad = None  # at 0, decay and momentum would go on
        optimizer.step()
        if args.queue_size > 0 and step >= queue_start:
            model.enqueue(z)
        if run.prints(step):
            run.log(step, loss, lr, chance, code_entropy=code_entropy(torch.cat(codes)))
    images, aspect = run.sample(256)
    run.save_picture("prototypes.png", *cluster_pictures(
        model, images / 255, eval_view(images, aspect, args.image_size)))
    run.finish()


# Sources: imagenet: the authors' recipe for batches of 256 (facebookresearch/swav), 72.7 % linear.
# Their large one: batch 4096, lr 0.3 per 256, 10 epochs of warm-up, no queue; 75.3 % after 800
# epochs. cifar: lightly's CIFAR-10 benchmark, with the authors' frozen first epoch. demo: measured;
# SimCLR's budget of 50,000 views.
RECIPES = {
    "recipe":              ("demo",    "cifar",    "imagenet"),
    "arch":                ("resnet8", "resnet18", "resnet50"),
    "image_size":          (32,        32,         224),
    "epochs":              (5,         200,        200),
    "warmup_epochs":       (0.5,       0,          0),
    "batch_size":          (128,       512,        256),
    "optimizer":           ("adam",    "adam",     "lars"),
    "lr":                  (1e-2,      2e-3,       0.6),
    "weight_decay":        (1e-6,      1e-6,       1e-6),
    "temperature":         (0.1,       0.1,        0.1),
    "epsilon":             (0.02,      0.05,       0.05),
    "sinkhorn_iterations": (3,         3,          3),
    "num_prototypes":      (256,       512,        3000),
    "freeze_epochs":       (0,         1,          1),
    "queue_size":          (0,         0,          3840),
    "queue_epoch":         (0,         0,          15),
    "proj_dim":            (64,        128,        128),
    "small_crops":         (0,         0,          6),
    "small_size":          (16,        16,         96),
    "crop_scale":          (0.35,      0.14,       0.14),
    "small_crop_scale":    (0.1,       0.05,       0.05),
    "jitter_strength":     (0.5,       0.5,        1.0),
    "blur":                (0.0,       0.0,        0.5),
}


def parse_args(argv=None):
    from common import ArgumentParser, number

    parser = ArgumentParser(__doc__, RECIPES)
    add = parser.add_argument
    add("--optimizer", choices=("lars", "adam"), help="the paper has LARS")
    add("--temperature", type=number(float, 0, above=True),
        help="softmax temperature, τ (paper: 0.1)")
    add("--epsilon", type=number(float, 0, above=True),
        help="weight of the entropy in Sinkhorn: smaller, sharper codes (paper: 0.05)")
    add("--sinkhorn-iterations", type=number(int, 1), help="of Sinkhorn-Knopp (paper: 3)")
    add("--num-prototypes", type=number(int, 2),
        help="K (paper: 3000); batch and queue together should have more images")
    add("--freeze-epochs", type=number(float, 0), help="epochs of frozen prototypes (paper: 1)")
    add("--queue-size", type=number(int, 0),
        help="past embeddings of each large view, assigned with the batch when full (paper: 3840)")
    add("--queue-epoch", type=number(float, 0),
        help="epochs before the queue starts to fill (paper: 15)")
    add("--proj-dim", type=number(int, 1), help="length of z (paper: 128)")
    add("--small-crops", type=number(int, 0), help="small views per image (paper: 6)")
    add("--small-size", type=number(int, 8), help="side of a small view, in pixels (paper: 96)")
    add("--crop-scale", type=number(float, 0, 1, above=True),
        help="area that divides large from small crops, as a fraction of the image (paper: 0.14)")
    add("--small-crop-scale", type=number(float, 0, 1, above=True),
        help="area of the smallest crop, as a fraction of the image (paper: 0.05)")
    add("--jitter-strength", type=number(float, 0, 1.25), help="of the colour jitter (paper: 1)")
    add("--blur", type=number(float, 0, 1), help="fraction of views that are blurred (paper: 0.5)")
    args = parser.parse_args(argv)
    if args.small_crops and args.small_crop_scale > args.crop_scale:
        parser.error(f"--small-crop-scale {args.small_crop_scale} is above --crop-scale")
    return args


if __name__ == "__main__":
    from common import main

    main(train, parse_args)
