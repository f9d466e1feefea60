# SPDX-License-Identifier: MIT
"""Barlow Twins: each dimension agrees between the views, and no two dimensions say the same thing.

Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction" (2021,
arXiv 2103.03230); --loss vicreg: Bardes et al., "VICReg: Variance-Invariance-Covariance
Regularization for Self-Supervised Learning" (2021, arXiv 2105.04906).
Survey family: information maximization, redundancy reduction. What prevents collapse: a constant
correlates with nothing, and copies of one dimension correlate with each other.

Each image is augmented twice. The D dimensions of z1 are correlated over the batch with those of
z2, and the loss pulls this D × D matrix towards the identity. Ones on the diagonal make each
dimension ignore what the augmentation changes; zeros elsewhere make each say something that no
other says. Images are not compared with each other, so there are no negatives. Both views pass
through one network, with gradient: there is no predictor, no stop-gradient and no moving average.

                  ┌─ augment1 ─ view1 ─ backbone ─ features ─ projector ─ z1 ─┐
        image ────┤                        (shared)                           ├─ C = identity
                  └─ augment2 ─ view2 ─ backbone ─ features ─ projector ─ z2 ─┘
                                                  └─ used after training

VICReg, the second loss here, asks for the same in three terms: z1 and z2 are close; each of their
dimensions has a standard deviation of at least 1; no two dimensions of one view covary.

Run      python barlow.py                       demonstration: synthetic images, CPU, minutes
         python barlow.py --data path           a folder of images, or cifar10
         python barlow.py --loss vicreg --lr-biases 0.2
         torchrun --nproc-per-node=8 barlow.py --data path
Reuse    from barlow import BarlowTwins, barlow_loss, vicreg_loss, make_optimizer, cosine_schedule
         (needs torch only). `train` shows one step, from the two learning rates, which
         make_optimizer leaves at 0, to optimizer.step().
"""

import copy
import math
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


class BarlowTwins(nn.Module):
    """Backbone and projector, which VICReg calls an expander.

    backbone: (B, 3, H, W) -> (B, feature_dim). The projector's three layers are as wide as z, in
    the paper wider than the features. They have no biases, and BN follows only the first two, since
    barlow_loss standardizes z itself.
    """

    def __init__(self, backbone, feature_dim, proj_dim=8192):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(feature_dim, proj_dim, bias=False),
            nn.BatchNorm1d(proj_dim),
            nn.ReLU(inplace=True),
            nn.Linear(proj_dim, proj_dim, bias=False),
            nn.BatchNorm1d(proj_dim),
            nn.ReLU(inplace=True),
            nn.Linear(proj_dim, proj_dim, bias=False))

    def forward(self, view1, view2):
        """Two (B, 3, H, W) -> two (B, D). One pass per view, so that each view has its own BN
        statistics, as in the official code."""
        z1 = self.projector(self.backbone(view1))
        z2 = self.projector(self.backbone(view2))
        return z1, z2


# ----------------------------------------------------------------------------------------- loss


def correlate(z1, z2):
    """Equation 2 of Barlow Twins: (B, D), (B, D) -> C (D, D). The equation takes z to be of mean 0,
    so z is standardized first, a step that many texts leave out.

        C_ij = 1/B Σ_b ẑ1_bi ẑ2_bj,    ẑ = (z - mean) / √(var + 1e-5)

    The variance is the biased one (1/B), as in the official code's BN, so C_ii is at most 1.
    """
    z1 = F.batch_norm(z1, None, None, training=True, eps=1e-5)
    z2 = F.batch_norm(z2, None, None, training=True, eps=1e-5)
    return z1.T @ z2 / len(z1)


def off_diagonal(matrix):
    """(D, D) -> (D, D), with zeros on the diagonal."""
    return matrix - matrix.diagonal().diag()


def barlow_loss(z1, z2, off_diagonal_weight):
    """Equation 1 of Barlow Twins: (B, D), (B, D) -> scalar, a sum, so larger for a larger D.

        Σ_i (1 - C_ii)² + λ Σ_i Σ_{j ≠ i} C_ij²

    A constant z gives D. The second sum has D - 1 times as many terms as the first, so a smaller D
    needs a larger λ.
    """
    correlation = correlate(z1, z2)
    invariance = (1 - correlation.diagonal()).square().sum()
    redundancy = off_diagonal(correlation).square().sum()
    return invariance + off_diagonal_weight * redundancy


def vicreg_loss(z1, z2, invariance_weight=25.0, variance_weight=25.0, covariance_weight=1.0):
    """VICReg: (B, D), (B, D) -> scalar. The sums over z have two terms, for z1 and z2.

        λ · mean (z1 - z2)² + μ Σ_z v(z) / 2 + ν Σ_z c(z)
        v = 1/D Σ_i max(0, 1 - √(Cov_ii + 1e-4)),    c = 1/D Σ_i Σ_{j ≠ i} Cov_ij²

    Cov is the unbiased covariance over the batch. The mean over D in the first term and the half in
    the second are the official code's. A constant z gives 0.99 μ.
    """
    invariance = F.mse_loss(z1, z2)
    variance = 0.0
    covariance = 0.0
    for z in z1, z2:
        centered = z - z.mean(0)
        cov = centered.T @ centered / (len(z) - 1)
        variance += F.relu(1 - (cov.diagonal() + 1e-4).sqrt()).mean() / 2
        covariance += off_diagonal(cov).square().sum() / len(cov)
    return (invariance_weight * invariance + variance_weight * variance
            + covariance_weight * covariance)


@torch.no_grad()
def health(z1, z2):
    """Health: (B, D), (B, D) -> three scalars by name.

    diagonal: the mean of C_ii. Rises towards 1; 0 where z is constant.
    off_diagonal: the mean of |C_ij|, i ≠ j; of unrelated dimensions 0.8 / √B. Rises at first, then
        falls, in short runs to 0.14 to 0.22; near 1 where all dimensions say the same.
    std: the mean standard deviation of the dimensions of z1. About 1 in VICReg, where 0 shows that
        z is constant; left free by Barlow Twins.
    """
    c = correlate(z1, z2)
    off = off_diagonal(c).abs().sum() / (len(c) * (len(c) - 1))
    return {"diagonal": c.diagonal().mean(), "off_diagonal": off, "std": z1.std(0).mean()}


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


def make_optimizer(model, weight_decay):
    """Two groups, since their rates differ: weights; and biases and BN, which are neither decayed
    nor adapted."""
    weights = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    others = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0, "adapt": False}]
    return LARS(groups, lr=0.0, weight_decay=weight_decay)


def train(args):
    """Algorithm 1 of Barlow Twins, once per step; of VICReg, with its loss."""
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
    peak_lr_biases = args.lr_biases * args.batch_size / 256

    backbone = make_backbone(args.arch, args.image_size, zero_init_residual=True)
    untrained = copy.deepcopy(backbone)  # the report's baseline
    if args.init:
        load_backbone(args.init, network=backbone)
    model = BarlowTwins(backbone, backbone.feature_dim, args.proj_dim)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args.weight_decay)
    augment_both = partial(augment, image_size=args.image_size, crop_scale=args.crop_scale,
                           jitter_strength=args.jitter_strength)
    augment1 = partial(augment_both, blur=args.blur1, solarize=0.0)
    augment2 = partial(augment_both, blur=args.blur2, solarize=args.solarize2)
    if args.loss == "barlow":  # chance: the loss of a constant z
        chance = args.proj_dim
    else:
        chance = 0.99 * args.variance_weight

    open_run(args)
    first_step = load_checkpoint(args, train_set, model, optimizer)  # 0, or where to resume
    network = parallel(model, args.compile)  # DDP and SyncBN when there are several processes
    save_views(args, train_set, device, augment1, augment2)
    untrained_knn = None  # measured when the first epoch ends
    started = saved_at = time.monotonic()

    for step, images, aspect in batches(train_set, args, first_step, device):  # seeds each step
        lr = cosine_schedule(step, total_steps, warmup_steps, peak_lr, end=peak_lr / 1000)
        weights_group, biases_group = optimizer.param_groups
        weights_group["lr"] = lr
        biases_group["lr"] = cosine_schedule(step, total_steps, warmup_steps, peak_lr_biases,
                                             end=peak_lr_biases / 1000)
        view1 = augment1(images, aspect)
        view2 = augment2(images, aspect)
        with autocast(device):  # the network only: the loss needs float32
            z1, z2 = network(view1, view2)
        z1 = gather(z1.float())  # correlations over all processes
        z2 = gather(z2.float())
        if args.loss == "barlow":
            loss = barlow_loss(z1, z2, args.off_diagonal_weight)
        else:
            loss = vicreg_loss(z1, z2, args.invariance_weight, args.variance_weight,
                               args.covariance_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        done = step + 1
        epoch_ends = done % steps_per_epoch == 0
        if done == 1 or done % args.print_freq == 0 or epoch_ends:
            log(args, done, total_steps, first_step, started, lr=lr, loss=loss, chance=chance,
                **health(z1, z2))
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
    "recipe":              ("demo",     "cpu",      "cifar",     "imagenet"),
    "arch":                ("resnet8",  "resnet8",  "resnet18",  "resnet50"),
    "image_size":          (32,         32,         32,          224),
    "eval_size":           (32,         32,         32,          224),
    "epochs":              (8,          20,         200,         300),
    "warmup_epochs":       (1,          1,          10,          10),
    "batch_size":          (128,        128,        256,         512),
    "lr":                  (10.0,       6.0,        6.0,         0.3),
    "lr_biases":           (0.05,       0.05,       0.03,        0.0072),
    "weight_decay":        (1e-4,       1e-4,       1e-3,        1e-6),
    "off_diagonal_weight": (0.01,       0.0051,     0.0051,      0.0051),
    "proj_dim":            (128,        256,        2048,        8192),
    "crop_scale":          (0.35,       0.2,        0.08,        0.08),
    "blur1":               (0.0,        0.0,        0.0,         1.0),
    "blur2":               (0.0,        0.0,        0.0,         0.1),
    "solarize2":           (0.0,        0.0,        0.2,         0.2),
}


def parse_args(argv=None):
    from common import make_parser, parse_with_recipe

    parser = make_parser("barlow", __doc__, RECIPES)
    parser.epilog = ("The log's `diagonal` should rise towards 1. `off diagonal` rises at first, "
                     "then falls: near 1, all dimensions say the same. VICReg: `std` about 1.")
    add = parser.add_argument
    add("--loss", choices=["barlow", "vicreg"], default="barlow", help="which paper's loss")
    add("--lr-biases", type=float, help="peak learning rate of biases and BN, per 256 images; "
        "--lr is that of the weights; papers: 0.0048, vicreg 0.2")
    add("--off-diagonal-weight", type=float, help="barlow: λ; official code: 0.0051, "
        "paper: 0.005")
    add("--invariance-weight", type=float, default=25.0, help="vicreg: λ; paper: 25")
    add("--variance-weight", type=float, default=25.0, help="vicreg: μ; paper: 25")
    add("--covariance-weight", type=float, default=1.0, help="vicreg: ν; paper: 1")
    add("--proj-dim", type=int, help="length of z; papers: 8192")
    add("--crop-scale", type=float, help="smallest crop, fraction of the image's area; paper: 0.08")
    add("--jitter-strength", type=float, default=1.0,
        help="strength of the color jitter, s; paper: 1")
    add("--blur1", type=float, help="fraction of first views that are blurred; paper: 1")
    add("--blur2", type=float, help="fraction of second views that are blurred; paper: 0.1")
    add("--solarize2", type=float, help="fraction of second views that are solarized; paper: 0.2")
    return parse_with_recipe(parser, RECIPES, argv)


# ------------------------------------------------------------------------- sources and departures

# Sources. imagenet: the paper and official code, for 300 epochs and a batch of 512 (paper: 1000 and
# 2048, rates 0.2 and 0.0048, λ 0.005, weight decay 1.5e-6). Its rate is from the authors' table of
# batch sizes, issue 7 of facebookresearch/barlowtwins, where it has a linear probe of 71.4 %. That
# table was made when one rate served both groups and the loss had a factor 0.024, so lr_biases is
# 0.024 times lr. cifar: solo-learn's for 1000 epochs, never run. Its LARS has η 0.02, but a
# weight's rate there is min(η · |w| / |g|, lr), so that no lr is the same here: 6.0 is its 0.3
# times 0.02 / 0.001. Its loss has a factor 0.1 (so lr_biases is a tenth, the decay ten times its
# own). demo: measured on the synthetic images. cpu: chosen without a search. For VICReg, whose loss
# is a mean over D and whose code has one rate, add --lr-biases 0.2, and on imagenet --lr 0.2; its
# augmentation is that of its code, which is this one (its paper: both views alike, blur 0.5,
# solarize 0.1). Processes exchange z rather than sums for C: at the paper's B 2048 and D 8192, two
# z are 134 MB, a D × D sum is 268 MB.
#
# Departures from the papers: views of at most 64 pixels are resized bilinearly (official: bicubic);
# crops are taken from a square canvas of 8/7 of the view's side (official: from the whole image),
# so that small crops are less sharp, and elongated images lose more (cut them beforehand); training
# is in bfloat16 on CUDA (official: float16); the blur is a Gaussian that reflects the border, cut
# off at a twentieth of the side, which at 224 pixels cuts nothing (official: PIL's, made of box
# blurs, which repeats the edge pixels). On W GPUs the official gradient is 1/W of the true one: DDP
# averages it, and the sum of C over the GPUs passes no gradient between them. LARS cancels this for
# weights (their decay counts W times less here), but not for biases, whose steps are W times longer
# here. VICReg's projector has biases before its two BN (official), where they have no effect; here
# it has none. In the official code only: a residual block's last BN starts at 0.

if __name__ == "__main__":
    from common import main

    main(train, parse_args)
