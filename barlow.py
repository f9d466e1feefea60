"""Barlow Twins: each dimension agrees between two views, and no two dimensions say the same.

Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction" (2021,
arXiv 2103.03230); --loss vicreg: Bardes et al., "VICReg: Variance-Invariance-Covariance
Regularization for Self-Supervised Learning" (2021, arXiv 2105.04906).
Survey family: information maximisation, redundancy reduction. What prevents collapse: a constant
correlates with nothing, and copies of one dimension correlate with each other.

Each image is augmented twice. The D dimensions of z1 are correlated over the batch with those of
z2, and this D x D matrix is drawn to the identity: ones on the diagonal make each dimension ignore
what the augmentation changes, zeros elsewhere make each say something that no other says. Images
are not compared with each other, so there are no negatives; and the views are treated alike, with
no predictor, stop-gradient or moving average.

                  ┌─ augment1 ─ view1 ─ backbone ─ features ─ projector ─ z1 ─┐
        image ────┤                        (shared)                           ├─ C = identity
                  └─ augment2 ─ view2 ─ backbone ─ features ─ projector ─ z2 ─┘
                                                  └─ what is kept

VICReg, the second loss here, asks for the same in three terms: z1 and z2 are close; in each of
them, every dimension has a deviation of at least 1, and no two dimensions have a covariance.

Run      python barlow.py                       demonstration: drawn images, CPU, minutes
         python barlow.py --data path           a folder of images, or cifar10
         python barlow.py --loss vicreg --lr-biases 0.2
         torchrun --nproc-per-node=8 barlow.py --data path
Reuse    from barlow import BarlowTwins, barlow_loss, vicreg_loss, LARS, cosine  (needs torch only)
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
    the paper wider than the features. They have no biases, and BN follows the first two only, as
    barlow_loss standardises z itself.
    """

    def __init__(self, backbone, feature_dim, proj_dim=8192):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(feature_dim, proj_dim, bias=False),
            nn.BatchNorm1d(proj_dim), nn.ReLU(inplace=True),
            nn.Linear(proj_dim, proj_dim, bias=False),
            nn.BatchNorm1d(proj_dim), nn.ReLU(inplace=True),
            nn.Linear(proj_dim, proj_dim, bias=False))

    def forward(self, view1, view2):
        """Two (B, 3, H, W) -> two (B, D). One pass per view, so that each view has its own BN
        statistics, as in the official code."""
        return self.projector(self.backbone(view1)), self.projector(self.backbone(view2))


# ----------------------------------------------------------------------------------------- loss


def correlate(z1, z2):
    """Equation 2 of Barlow Twins: (B, D), (B, D) -> C (D, D). It holds for z of mean 0, so z is
    standardised first, a step that many texts leave out.

        C_ij = 1/B Σ_b ẑ1_bi ẑ2_bj,    ẑ = (z - mean) / √(var + 1e-5)

    The variance is the biased one (1/B), as in the official code's BN, so C_ii is at most 1.
    """
    z1, z2 = (F.batch_norm(z, None, None, training=True, eps=1e-5) for z in (z1, z2))
    return z1.T @ z2 / len(z1)


def off_diagonal(matrix):
    """(D, D) -> (D, D), with zeros on the diagonal."""
    return matrix - matrix.diagonal().diag()


def barlow_loss(z1, z2, off_diagonal_weight):
    """Equation 1 of Barlow Twins: (B, D), (B, D) -> scalar, a sum, so larger for a larger D.

        Σ_i (1 - C_ii)² + λ Σ_i Σ_{j ≠ i} C_ij²

    Constant z give D. The second sum has D - 1 times as many terms as the first, so a smaller D
    needs a larger λ.
    """
    correlation = correlate(z1, z2)
    invariance = (1 - correlation.diagonal()).square().sum()
    redundancy = off_diagonal(correlation).square().sum()
    return invariance + off_diagonal_weight * redundancy


def vicreg_loss(z1, z2, invariance_weight=25.0, variance_weight=25.0, covariance_weight=1.0):
    """VICReg: (B, D), (B, D) -> scalar. z in the sums over z is z1, then z2.

        λ · mean (z1 - z2)² + μ Σ_z v(z) / 2 + ν Σ_z c(z)
        v = 1/D Σ_i max(0, 1 - √(Cov_ii + 1e-4)),    c = 1/D Σ_i Σ_{j ≠ i} Cov_ij²

    Cov is the unbiased covariance over the batch. The mean over D in the first term and the half in
    the second are the official code's. Constant z give 0.99 μ.
    """
    invariance, variance, covariance = F.mse_loss(z1, z2), 0.0, 0.0
    for z in z1, z2:
        z = z - z.mean(0)
        cov = z.T @ z / (len(z) - 1)
        variance += F.relu(1 - (cov.diagonal() + 1e-4).sqrt()).mean() / 2
        covariance += off_diagonal(cov).square().sum() / len(cov)
    return (invariance_weight * invariance + variance_weight * variance
            + covariance_weight * covariance)


@torch.no_grad()
def health(z1, z2):
    """Health: (B, D), (B, D) -> three scalars by name, each a mean over dimensions.

    diagonal: of C_ii; towards 1. 0 when z is constant.
    off_diagonal: of |C_ij|, i ≠ j; towards 0, or 0.8 / √B, the chance level. Near 1 when all
        dimensions say the same.
    std: of the deviations of z1; about 1 in VICReg, of no importance in Barlow Twins. 0 when z is
        constant.
    """
    c = correlate(z1, z2)
    off = off_diagonal(c).abs().sum() / (len(c) * (len(c) - 1))
    return {"diagonal": c.diagonal().mean(), "off_diagonal": off, "std": z1.std(0).mean()}


# --------------------------------------------------------------------------------- augmentation


def augment(images, aspect, image_size, crop_scale, jitter_strength, blur, solarize):
    """The paper's augmentation: uint8 images (B, 3, S, S), squeezed to squares from
    width / height = aspect (B,) -> views (B, 3, image_size, image_size). The two views differ in
    blur and solarize, the fractions of views that are blurred and whose bright pixels are inverted.
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


def make_optimizer(model, weight_decay):
    """Two groups, since their rates differ: weights; biases and BN, neither decayed nor adapted."""
    weights = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    others = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0, "adapt": False}]
    return LARS(groups, lr=0.0, weight_decay=weight_decay)


def train(args):
    """Algorithm 1 of Barlow Twins, once per step; of VICReg, with its loss."""
    from common import (batch_that_fits, batches, gather, load_checkpoint, load_data, log,
                        make_backbone, parallel, save_checkpoint, save_views, start, write_log)
    from linear_probe import evaluate, load_init

    device = start(args.device, args.seed, args.deterministic)
    train_set, test_set = load_data(args.data, args.image_size, args.max_images, args.workers,
                                    device)
    args.batch_size = batch_that_fits(args, train_set)  # over all processes
    steps_per_epoch = len(train_set) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    peak_lrs = args.lr * args.batch_size / 256, args.lr_biases * args.batch_size / 256

    backbone = make_backbone(args.arch, args.image_size, zero_init_residual=True)
    untrained = copy.deepcopy(backbone)  # the report's baseline
    load_init(backbone, args.init)
    model = BarlowTwins(backbone, backbone.feature_dim, args.proj_dim)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args.weight_decay)
    view = partial(augment, image_size=args.image_size, crop_scale=args.crop_scale,
                   jitter_strength=args.jitter_strength)
    augment1 = partial(view, blur=args.blur1, solarize=0.0)
    augment2 = partial(view, blur=args.blur2, solarize=args.solarize2)
    step = load_checkpoint(args, train_set, model, optimizer)  # 0, or where the run goes on
    network = parallel(model, args.compile)  # DistributedDataParallel and SyncBN, if of several
    save_views(args, train_set, device, augment1, augment2)
    saved_at = save_checkpoint(args, step, train_set, model, optimizer, backbone)
    started = step, time.monotonic()  # for the speed and the time left
    chance = args.proj_dim if args.loss == "barlow" else 0.99 * args.variance_weight  # constant z

    for step, images, aspect in batches(train_set, args, step, device):  # seeded by step
        for group, peak_lr in zip(optimizer.param_groups, peak_lrs):  # weights, then biases and BN
            group["lr"] = cosine(step, total_steps, warmup_steps, peak_lr, peak_lr / 1000)
        view1, view2 = augment1(images, aspect), augment2(images, aspect)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            z1, z2 = network(view1, view2)
        z1, z2 = gather(z1.float()), gather(z2.float())  # statistics of the total batch
        if args.loss == "barlow":
            loss = barlow_loss(z1, z2, args.off_diagonal_weight)
        else:
            loss = vicreg_loss(z1, z2, args.invariance_weight, args.variance_weight,
                               args.covariance_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        done, epoch_ends = step + 1, (step + 1) % steps_per_epoch == 0
        if done == 1 or done % args.print_freq == 0 or epoch_ends:
            lr = optimizer.param_groups[0]["lr"]
            log(args, done, total_steps, started, lr, loss, chance, **health(z1, z2))
        if epoch_ends or time.monotonic() - saved_at > 600:
            saved_at = save_checkpoint(args, done, train_set, model, optimizer, backbone)
    report = evaluate(backbone, untrained, train_set, test_set, args.image_size, device)
    write_log(args, {"step": total_steps, "report": report})


RECIPES = {
    "recipe":              ("demo",     "cpu",      "cifar",     "imagenet"),
    "arch":                ("resnet8",  "resnet8",  "resnet18",  "resnet50"),
    "image_size":          (32,         32,         32,          224),
    "epochs":              (8,          20,         200,         300),
    "warmup_epochs":       (1,          1,          10,          10),
    "batch_size":          (128,        128,        256,         512),
    "loss":                ("barlow",   "barlow",   "barlow",    "barlow"),
    "lr":                  (10.0,       6.0,        6.0,         0.3),
    "lr_biases":           (0.05,       0.05,       0.03,        0.0072),
    "weight_decay":        (1e-4,       1e-4,       1e-3,        1e-6),
    "off_diagonal_weight": (0.01,       0.0051,     0.0051,      0.0051),
    "invariance_weight":   (25.0,       25.0,       25.0,        25.0),
    "variance_weight":     (25.0,       25.0,       25.0,        25.0),
    "covariance_weight":   (1.0,        1.0,        1.0,         1.0),
    "proj_dim":            (128,        256,        2048,        8192),
    "crop_scale":          (0.35,       0.2,        0.08,        0.08),
    "jitter_strength":     (1.0,        1.0,        1.0,         1.0),
    "blur1":               (0.0,        0.0,        0.0,         1.0),
    "blur2":               (0.0,        0.0,        0.0,         0.1),
    "solarize2":           (0.0,        0.0,        0.2,         0.2),
}
FLAGS = {  # type, lowest, highest, help, the papers' value
    "loss": (("barlow", "vicreg"), None, None, "which of the two papers' losses"),
    "lr_biases": (float, 0, 10**4, "peak learning rate of biases and BN, per 256 images; --lr: of "
                  "weights", "0.0048, in vicreg 0.2"),
    "off_diagonal_weight": (float, 0, 10**6, "barlow: λ", "0.0051"),
    "invariance_weight": (float, 0, 10**6, "vicreg: λ", "25"),
    "variance_weight": (float, 0, 10**6, "vicreg: μ", "25"),
    "covariance_weight": (float, 0, 10**6, "vicreg: ν", "1"),
    "proj_dim": (int, 2, 10**5, "length of z", "8192"),
    "crop_scale": (float, 1e-3, 1, "smallest crop, as a fraction of the image's area", "0.08"),
    "jitter_strength": (float, 0, 2.5, "strength of the colour jitter", "1"),
    "blur1": (float, 0, 1, "fraction of views 1 that are blurred", "1"),
    "blur2": (float, 0, 1, "fraction of views 2 that are blurred", "0.1"),
    "solarize2": (float, 0, 1, "fraction of views 2 that are solarised", "0.2, of views 1 none"),
}


def parse_args(argv=None):
    from common import parse_flags

    return parse_flags("barlow", __doc__, RECIPES, FLAGS, argv)


# Sources. imagenet: the paper and official code, for 300 epochs and a batch of 512 (paper: 1000 and
# 2048, rates 0.2 and 0.0048). Its rate is from the authors' table of batch sizes, issue 7 of
# facebookresearch/barlowtwins, made when one rate served both groups and the loss had a factor
# 0.024: hence lr_biases. cifar: solo-learn's for 1000 epochs; its LARS has η 0.02 (so lr is 20
# times its 0.3) and clips the adapted rate; its loss has a factor 0.1 (so lr_biases is a tenth, the
# decay ten times its own). demo: measured on the drawn images. cpu: not tuned. For VICReg, whose
# loss is a mean over D and whose code has one rate, add --lr-biases 0.2, on imagenet --lr 0.2.
# Processes exchange z rather than sums for C: of the paper's B 2048 and D 8192, two z are 134 MB,
# D x D sums 268 MB.
# Departures from the papers: small crops are bilinear (official: bicubic). Blur is a true Gaussian
# (official: PIL's). The official gradient on W GPUs is 1/W of the true one, because the sum over
# GPUs in C passes none on: LARS takes this out of the steps of weights, not of biases, whose steps
# are W times longer here. VICReg's projector has biases before its two BN (official), where they
# have no effect; here it has none.

if __name__ == "__main__":
    from common import main

    main(train, parse_args)
