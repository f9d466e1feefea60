# SPDX-License-Identifier: MIT
"""SwAV: from one view of an image, predict which cluster another view of it belongs to.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (2020,
arXiv 2006.09882).
Survey family: clustering, with assignments computed in each batch. What prevents collapse:
Sinkhorn-Knopp, which gives each cluster an equal share of the images.

Each image is cropped into two large and several small views (multi-crop), and each view is compared
with K prototypes, the learned centers of the clusters. Sinkhorn-Knopp turns the scores of the large
views into codes: soft assignments to the clusters, balanced so that over the batch all clusters are
used equally. The network then learns to predict a large view's code from every other view.

              ┌─ large view s ─ backbone ─ projector ─ z_s ─ scores ─ Sinkhorn ─ code q_s ─┐
        image ┤                 (shared)   (shared)           (prototypes)  no gradient    ├─ loss
              ├─ large view t ─ backbone ─ projector ─ z_t ─ scores ─ softmax ─ p_t ───────┘
              │                        └─ used after training      and s, t swapped
              └─ small views: like view t, in its place

Run      python swav.py                         demonstration: synthetic images, CPU, minutes
         python swav.py --data path             a folder of images, or cifar10
         torchrun --nproc-per-node=8 swav.py --data path
Reuse    from swav import SwAV, sinkhorn, swav_loss, make_optimizer, cosine_schedule
         (needs torch only). `train` shows one step, from the learning rate, which make_optimizer
         leaves at 0. In a single process, without the queue, its loss is
             model.normalize_prototypes()
             z, scores = model(views)  # a list of views, the two large ones first
             codes = [sinkhorn(view_scores, epsilon=0.05, iterations=3)
                      for view_scores in model.scores_for_codes(z[:2].detach(), use_queue=False)]
             loss = swav_loss(scores, codes, temperature=0.1)
         In the first epoch model.prototypes.weight.grad = None comes before optimizer.step().
         With the queue, call model.enqueue(z[:2].detach()) after it; once the queue is full,
         use_queue is True, and only the first B rows of the codes are this batch's.
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

    backbone: (B, 3, H, W) -> (B, feature_dim), for any H and W. queue_size: number of past images
    whose z, of both large views, join the batch in Sinkhorn; 0: none. Use the queue only once it is
    full: it starts as zeros.
    """

    def __init__(self, backbone, feature_dim, proj_dim=128, num_prototypes=3000, queue_size=0):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(feature_dim, feature_dim, bias=False), nn.BatchNorm1d(feature_dim),
            nn.ReLU(inplace=True), nn.Linear(feature_dim, proj_dim))
        self.prototypes = nn.Linear(proj_dim, num_prototypes, bias=False)  # weight: (K, D)
        self.register_buffer("queue", torch.zeros(2, queue_size, proj_dim))  # zeros until filled
        self.register_buffer("queue_ptr", torch.tensor(0))  # index of the oldest entry

    def forward(self, views):
        """V views (B, 3, H, W) -> z (V, B, D), of unit length, and scores (V, B, K).

        As in the official code, adjacent views of one size go through the backbone together, and
        all views through the projector together: what shares a pass shares BN statistics.
        """
        features = []
        for _, same_size in itertools.groupby(views, key=lambda view: view.shape[-1]):
            batch = torch.cat(list(same_size))
            features.append(self.backbone(batch))
        z = self.projector(torch.cat(features))  # (V * B, D)
        z = F.normalize(z, dim=1)
        scores = self.prototypes(z)  # cosines, since the prototypes have unit length, too
        return z.unflatten(0, (len(views), -1)), scores.unflatten(0, (len(views), -1))

    @torch.no_grad()
    def normalize_prototypes(self):
        """Renormalize the prototypes to unit length. Call it before every forward pass."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    @torch.no_grad()
    def scores_for_codes(self, z, use_queue):
        """z (2, B, D) of the large views -> the scores that Sinkhorn turns into codes: (2, B, K),
        or with the queue (2, B + Q, K), the batch first.

        Sinkhorn spreads the images evenly over the prototypes, which makes sense only for many
        images. The queue adds past ones to a small batch. It holds z and not scores, so that past
        images, too, are compared with the present prototypes.
        """
        if use_queue:
            z = torch.cat([z, self.queue], dim=1)
        return z @ self.prototypes.weight.T

    @torch.no_grad()
    def enqueue(self, z):
        """Replace the oldest entries of the queue by z (2, B, D) of the large views."""
        queue_size = self.queue.shape[1]
        z = z[:, -queue_size:]  # the last, if there are more than fit
        batch_size = z.shape[1]
        rows = (self.queue_ptr + torch.arange(batch_size, device=z.device)) % queue_size
        self.queue[:, rows] = z
        self.queue_ptr.copy_((self.queue_ptr + batch_size) % queue_size)


# ----------------------------------------------------------------------------------------- loss


@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """Sinkhorn-Knopp: scores (B, K) of images and prototypes -> codes (B, K), whose rows sum to 1,
    without gradient.

    Codes are soft assignments of images to prototypes that use all prototypes equally, and that fit
    the scores as well as this allows. With Q = codes / B (the paper's Q, transposed), they maximize

        Σ_ij Q_ij · scores_ij + ε H(Q),   H the entropy, which makes them soft,

    over all Q ≥ 0 whose rows sum to 1 / B (every image counts the same) and whose columns sum to
    1 / K (so does every prototype): equations 3 and 4 of the paper.

    The solution is exp(scores / ε) with each row and each column multiplied by a factor of its own
    (equation 5). Sinkhorn-Knopp finds the factors: divide each column by its sum, then each row by
    its sum, which spoils the columns a little, and repeat. The code works on log Q, since exp can
    overflow; dividing by a sum is then a log-softmax. It makes the sums 1 instead of 1 / K or
    1 / B: this multiplies all of Q by one number, which the next division cancels. The rows come
    last, so that they sum to 1 exactly; the columns' sums are only nearly equal after a few
    iterations.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # at least float32
    log_q = scores / epsilon
    for _ in range(iterations):
        log_q = log_q.log_softmax(0)  # each prototype gets the same share
        log_q = log_q.log_softmax(1)  # each image's code sums to 1
    return log_q.exp()


def swav_loss(scores, codes, temperature):
    """Swapped prediction: scores of V views, each (B, K), those of the two large views first, and
    the large views' 2 codes, each (B, K) -> scalar.

        l(z_t, q_s) = - Σ_k q_s^k log p_t^k,   p_t = softmax(scores_t / τ)

    equation 2 of the paper, averaged over the B images and the 2 (V - 1) pairs of a large view s
    and any other view t (equation 6: summed). Chance level: ln K.
    """
    log_p = [F.log_softmax(view_scores / temperature, dim=1) for view_scores in scores]
    losses = []
    for s in range(len(codes)):
        q_s = codes[s].detach()  # stop-gradient: codes are targets
        for t in range(len(log_p)):
            if t != s:
                losses.append(-(q_s * log_p[t]).sum(1).mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def code_entropy(codes):
    """Health: mean entropy of an image's code, over ln K: (B, K) -> scalar. It should be clearly
    below 1, and the loss below ln K. If it stays near 1, or the loss near ln K, the authors advise
    a smaller --epsilon (0.03) and more --freeze-epochs; if the loss rises when the queue starts and
    stays up, a smaller --queue-size or a later --queue-epoch. (The entropy of the mean code would
    say nothing: Sinkhorn keeps it at ln K.)"""
    return torch.special.entr(codes).sum(1).mean() / math.log(codes.shape[1])


# --------------------------------------------------------------------------------- augmentation


def augment(images, aspect, size, crop_scale, jitter_strength, blur):
    """The paper's augmentation, of large and small views: uint8 images (B, 3, S, S), resized to
    squares, and aspect (B,), their original width / height -> views (B, 3, size, size).
    crop_scale: smallest and largest crop, as fractions of the image's area (paper: large views
    0.14 to 1, small views 0.05 to 0.14)."""
    from common import (color_jitter, gaussian_blur, normalize, random_grayscale,
                        random_horizontal_flip, random_resized_crop)

    s = jitter_strength
    x = random_resized_crop(images, aspect, size, scale=crop_scale)
    x = random_horizontal_flip(x, p=0.5)
    x = color_jitter(x, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8)
    x = random_grayscale(x, p=0.2)
    x = gaussian_blur(x, p=blur, kernel_size=13, sigma=(0.1, 2.0))  # radius: 3 times the largest σ
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


def make_optimizer(name, model, weight_decay):
    """As in the official code, biases and BN are decayed and adapted like all other parameters."""
    if name == "lars":
        return LARS(model.parameters(), lr=0.0, weight_decay=weight_decay)
    return torch.optim.Adam(model.parameters(), lr=0.0, weight_decay=weight_decay)


def train(args):
    """The paper's pseudocode, with multi-crop and the queue, once per step."""
    # Imported here, so that this file alone, copied elsewhere, can be imported without them.
    from common import (SAVE_SECONDS, autocast, batch_that_fits, batches, gather, load_checkpoint,
                        load_data, log, log_knn, make_backbone, open_run, parallel, rank,
                        save_checkpoint, save_views, start, warmup_that_fits, write_log)
    from linear_probe import evaluate, load_backbone, quick_knn

    device = start(args.device, args.seed)
    train_set, test_set = load_data(args, device)
    args.batch_size = batch_that_fits(args.batch_size, train_set)  # over all processes
    steps_per_epoch = len(train_set) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = warmup_that_fits(round(args.warmup_epochs * steps_per_epoch), total_steps)
    frozen_steps = round(args.freeze_epochs * steps_per_epoch)
    # From step queue_start on, batches enter the queue; from queue_full on, it is full and used.
    queue_start = round(args.queue_epoch * steps_per_epoch)
    queue_full = queue_start + math.ceil(args.queue_size / args.batch_size)
    peak_lr = args.lr * args.batch_size / 256

    backbone = make_backbone(args.arch, args.image_size)
    untrained = copy.deepcopy(backbone)  # the report's baseline
    if args.init:
        load_backbone(args.init, network=backbone)
    model = SwAV(backbone, backbone.feature_dim, args.proj_dim, args.num_prototypes,
                 args.queue_size)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(args.optimizer, model, args.weight_decay)
    augment_any = partial(augment, jitter_strength=args.jitter_strength, blur=args.blur)
    augment_large = partial(augment_any, size=args.image_size, crop_scale=(args.crop_scale, 1.0))
    augment_small = partial(augment_any, size=args.small_size,
                            crop_scale=(args.small_crop_scale, args.crop_scale))
    augments = [augment_large] * 2 + [augment_small] * args.small_crops
    chance = math.log(args.num_prototypes)

    open_run(args)
    first_step = load_checkpoint(args, train_set, model, optimizer)  # 0, or where to resume
    network = parallel(model, args.compile)  # DDP and SyncBN when there are several processes
    save_views(args, train_set, device, *augments)
    untrained_knn = None  # measured when the first epoch ends
    started = saved_at = time.monotonic()

    for step, images, aspect in batches(train_set, args, first_step, device):  # seeds each step
        lr = cosine_schedule(step, total_steps, warmup_steps, peak_lr, end=peak_lr / 1000)
        for group in optimizer.param_groups:
            group["lr"] = lr
        views = [make_view(images, aspect) for make_view in augments]
        model.normalize_prototypes()
        with autocast(device):  # the network only: the loss needs float32
            z, scores = network(views)
        # The codes need scores of their own: in float32, of the images of all processes and of
        # the queue.
        z1 = gather(z[0].detach().float())
        z2 = gather(z[1].detach().float())
        large_z = torch.stack([z1, z2])
        use_queue = args.queue_size > 0 and step >= queue_full
        # Every process computes all codes, and keeps those of its own images.
        first = rank() * len(images)
        codes = []
        for view_scores in model.scores_for_codes(large_z, use_queue):
            all_codes = sinkhorn(view_scores, args.epsilon, args.sinkhorn_iterations)
            own_codes = all_codes[first : first + len(images)]
            codes.append(own_codes)
        loss = swav_loss(scores.float(), codes, args.temperature)
        optimizer.zero_grad()
        loss.backward()
        if step < frozen_steps:
            # None, not 0: with 0 the optimizer would still apply momentum and weight decay
            model.prototypes.weight.grad = None
        optimizer.step()
        if args.queue_size > 0 and step >= queue_start:
            model.enqueue(large_z)

        done = step + 1
        epoch_ends = done % steps_per_epoch == 0
        if done == 1 or done % args.print_freq == 0 or epoch_ends:
            log(args, done, total_steps, first_step, started, lr=lr, loss=loss, chance=chance,
                code_entropy=code_entropy(torch.cat(codes)))
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
    "recipe":           ("demo",     "cpu",      "cifar",     "imagenet"),
    "arch":             ("resnet8",  "resnet8",  "resnet18",  "resnet50"),
    "image_size":       (32,         24,         32,          224),
    "eval_size":        (32,         32,         32,          224),
    "epochs":           (8,          15,         200,         200),
    "warmup_epochs":    (1,          1,          0,           0),
    "batch_size":       (128,        128,        512,         256),
    "optimizer":        ("adam",     "adam",     "adam",      "lars"),
    "lr":               (5e-3,       6e-3,       2e-3,        0.6),
    "epsilon":          (0.02,       0.02,       0.05,        0.05),
    "num_prototypes":   (256,        256,        512,         3000),
    "freeze_epochs":    (0,          0,          1,           1),
    "queue_size":       (0,          0,          0,           3840),
    "queue_epoch":      (0,          0,          0,           15),
    "proj_dim":         (64,         64,         128,         128),
    "small_crops":      (0,          0,          0,           6),
    "small_size":       (16,         16,         16,          96),
    "crop_scale":       (0.35,       0.2,        0.14,        0.14),
    "small_crop_scale": (0.1,        0.1,        0.05,        0.05),
    "jitter_strength":  (0.5,        0.5,        0.5,         1.0),
    "blur":             (0.0,        0.0,        0.0,         0.5),
}


def parse_args(argv=None):
    from common import make_parser, parse_with_recipe

    parser = make_parser("swav", __doc__, RECIPES)
    parser.epilog = ("The log's `code entropy` should stay clearly below 1, and the loss "
                     "fall below ln K.")
    parser.set_defaults(weight_decay=1e-6)  # the paper's, in all recipes
    add = parser.add_argument
    add("--optimizer", choices=["lars", "adam"], help="paper: lars")
    add("--temperature", type=float, default=0.1, help="softmax temperature, τ; paper: 0.1")
    add("--epsilon", type=float, help="ε of Sinkhorn: the smaller, the sharper the codes; "
        "paper: 0.05")
    add("--sinkhorn-iterations", type=int, default=3, help="iterations of Sinkhorn-Knopp; paper: 3")
    add("--num-prototypes", type=int, help="prototypes, K; paper: 3000")
    add("--freeze-epochs", type=float, help="epochs in which the prototypes do not learn; paper: 1")
    add("--queue-size", type=int, help="past z kept for each large view, 0: none; paper: 3840, "
        "with a batch of 256")
    add("--queue-epoch", type=float, help="epoch from which the queue is filled; it is used when "
        "full; paper: 15")
    add("--proj-dim", type=int, help="length of z; paper: 128")
    add("--small-crops", type=int, help="small views per image; paper: 6")
    add("--small-size", type=int, help="side of a small view, in pixels; paper: 96")
    add("--crop-scale", type=float, help="smallest large and largest small crop, fraction of the "
        "image's area; paper: 0.14")
    add("--small-crop-scale", type=float, help="smallest small crop, fraction of the image's area; "
        "paper: 0.05")
    add("--jitter-strength", type=float, help="strength of the color jitter, s; paper: 1")
    add("--blur", type=float, help="fraction of views that are blurred; paper: 0.5")
    return parse_with_recipe(parser, RECIPES, argv)


# ------------------------------------------------------------------------- sources and departures

# Sources. imagenet: the authors' recipe for batches of 256 (facebookresearch/swav; linear probe
# 72.7 %). Theirs for batches of 4096 (rate 0.3 per 256, 10 epochs of warm-up, no queue) reaches
# 75.3 % in 800 epochs. cifar: lightly's CIFAR-10 benchmark, with the authors' frozen first epoch.
# demo: the best values measured on the synthetic images. cpu: measured on CIFAR-10; trained on
# views of 24 pixels and evaluated at 32, as in FixRes (1906.06423).
#
# Departures from the paper: prototypes are normalized before each forward pass, as in the official
# code (paper: after each update, which differs at the first and the last step alone); LARS for the
# official LARC, which divides by |g| + weight_decay · |w| (LARS: |g + weight_decay · w|); a warm-up
# starts near 0 (official: at 1/16 of the peak); no bias ahead of the projector's BN, which would
# cancel it; training is in bfloat16 on CUDA (official: float16), but codes come from float32
# scores; blur is a true Gaussian, as in the authors' own runs, by OpenCV (the code published since:
# PIL's); crops are taken from a square canvas of 8/7 of the view's side (official: from the whole
# image), so that small crops are less sharp, and elongated images lose more (cut them beforehand);
# a small view, of 5 to 14 % of the area, comes from 57 to 96 pixels of the canvas.

if __name__ == "__main__":
    from common import main

    main(train, parse_args)
