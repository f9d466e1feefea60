"""Barlow Twins: the features of two views agree in each dimension, and no two dimensions alike.

Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction" (2021,
arXiv 2103.03230); --loss vicreg: Bardes et al., "VICReg: Variance-Invariance-Covariance
Regularization for Self-Supervised Learning" (2021, arXiv 2105.04906).
Survey family: information maximisation, redundancy reduction. What prevents collapse: a constant
correlates with nothing, and copies of one dimension correlate with each other.

Each image is augmented twice. Over the batch, the D dimensions of z1 are correlated with those of
z2, which gives a D x D matrix. Its diagonal is drawn to 1: what the augmentation changes cannot
help. All else is drawn to 0: each dimension has to say something new. Nothing is compared between
images, so there are no negatives, and both views go the same way: no predictor, no stop-gradient.

                  ┌─ augment1 ─ view1 ─ backbone ─ features ─ projector ─ z1 ─┐
        image ────┤                        (shared)                           ├─ C = identity
                  └─ augment2 ─ view2 ─ backbone ─ features ─ projector ─ z2 ─┘
                                                  └─ what is kept

VICReg, the second loss here, asks for the same of each view's own statistics: z1 and z2 are close,
the deviation of each dimension is at least 1, and two dimensions have no covariance.

Run      python barlow.py                       demonstration: built-in images, CPU, a minute
         python barlow.py --data path           a folder of images, or cifar10
         python barlow.py --loss vicreg --lr-biases 0.2
         torchrun --nproc-per-node=8 barlow.py --data path
Reuse    from barlow import BarlowTwins, barlow_loss, vicreg_loss         (needs torch only)

Departures from the papers: crops of small images are bilinear (official: bicubic everywhere). Blur
is a true Gaussian (official: PIL's). The official gradient on W GPUs is 1/W of the true one,
because the sum over GPUs in C has none: LARS takes this out of the steps of weights, not of biases,
whose steps are W times longer here. VICReg's projector has biases in front of its two BN
(official), where they have no effect; here it has none. Its loss is a mean over D, where that of
Barlow Twins is a sum, and its official code has a single learning rate: hence --lr-biases 0.2.

Measured in the demonstration, top-1 in percent (of the network at random):
built-in set, kNN 51.2 (35.4), probe 77.2 (43.0); seeds: 3
10,000 of CIFAR-10, kNN 39.0 (32.2), probe 44.6 (34.6); seeds: 3
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


class BarlowTwins(nn.Module):
    """Backbone and projector; the same for VICReg, which calls the latter an expander.

    backbone: (B, 3, H, W) -> (B, feature_dim). Three layers as wide as z, which is wider than the
    features, without biases; BN after the first two only, because the loss has its own.
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
        """Two (B, 3, H, W) -> two (B, D). One pass per view, so that each has its own BN
        statistics, as in the official code."""
        return self.projector(self.backbone(view1)), self.projector(self.backbone(view2))


# ----------------------------------------------------------------------------------------- loss


def correlate(z1, z2):
    """Equation 2 of Barlow Twins, for z of mean 0, which surveys omit: (B, D), (B, D) -> C (D, D).

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

    Constant z give D. λ weighs D (D - 1) terms against D: the smaller D, the larger λ may be.
    """
    correlation = correlate(z1, z2)
    invariance = (1 - correlation.diagonal()).square().sum()
    redundancy = off_diagonal(correlation).square().sum()
    return invariance + off_diagonal_weight * redundancy


def vicreg_loss(z1, z2, invariance_weight=25.0, variance_weight=25.0, covariance_weight=1.0):
    """VICReg: (B, D), (B, D) -> scalar, with v and c of each of the two views z.

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
    """Three means: (B, D), (B, D) -> scalars by name.

    diagonal: of C_ii, towards 1; 0 when z is constant.
    off_diagonal: of |C_ij|, i ≠ j, towards 0, where chance leaves 0.8 / √B; near 1 when all
        dimensions say the same.
    std: of the deviations of z1, about 1 in VICReg and of no importance in Barlow Twins; 0 when z
        is constant.
    """
    c = correlate(z1, z2)
    off = off_diagonal(c).abs().sum() / (len(c) * (len(c) - 1))
    return {"diagonal": c.diagonal().mean(), "off_diagonal": off, "std": z1.std(0).mean()}


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


def make_optimizer(model, weight_decay):
    """Two groups, since their rates differ: weights; biases and BN, neither decayed nor adapted."""
    weights = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    others = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0, "adapt": False}]
    return LARS(groups, lr=0.0, weight_decay=weight_decay)


def train(args):
    """Algorithm 1 of Barlow Twins, once per step; of VICReg, with its loss."""
    from common import Run, gather, make_backbone

    run = Run("barlow", args)
    backbone = run.init(make_backbone(args.arch, args.image_size, zero_init_residual=True))
    model = BarlowTwins(backbone, backbone.feature_dim, args.proj_dim)
    optimizer = make_optimizer(model, args.weight_decay)
    augment1, augment2 = make_augment(args.image_size, args.crop_scale, args.jitter_strength,
                                      args.blur1, args.blur2, args.solarize2)
    network = run.start(model, optimizer, backbone)
    run.save_views(augment1, augment2)
    peaks = run.peak_lr, args.lr_biases * args.batch_size / 256
    chance = args.proj_dim if args.loss == "barlow" else 0.99 * args.variance_weight  # constant z

    for step, images, aspect in run.steps():
        decay = cosine(step, run.total_steps, run.warmup_steps, 1.0, 0.001)
        for group, peak in zip(optimizer.param_groups, peaks):  # weights, then biases and BN
            group["lr"] = peak * decay
        view1, view2 = augment1(images, aspect), augment2(images, aspect)
        with run.autocast():
            z1, z2 = network(view1, view2)
        # Statistics are of the total batch. For the paper's B 2048 and D 8192 the two z are 134 MB;
        # the D x D sum, which would save W processes computing the same C, is 268 MB; and the
        # gradient of the projector, which is summed anyway, 600 MB.
        z1, z2 = gather(z1.float()), gather(z2.float())
        if args.loss == "barlow":
            loss = barlow_loss(z1, z2, args.off_diagonal_weight)
        else:
            loss = vicreg_loss(z1, z2, args.invariance_weight, args.variance_weight,
                               args.covariance_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if run.prints(step):
            run.log(step, loss, peaks[0] * decay, chance, **health(z1, z2))
    run.finish()


# Sources: imagenet: the paper and official code, for 300 epochs and a batch of 512 (paper: 1000
# and 2048, rates 0.2 and 0.0048). Its rate is from the authors' table of batch sizes, issue 7 of
# facebookresearch/barlowtwins, when one rate served both groups and the loss had a factor 0.024:
# hence lr_biases. cifar: solo-learn's for 1000 epochs; its LARS clips and has η 0.02 (so lr is 20
# times its 0.3), and its loss has a factor 0.1 (so lr_biases is a tenth of its rate, and the decay
# ten times its own). demo: measured on the built-in set.
RECIPES = {
    "recipe":              ("demo",     "cifar",    "imagenet"),
    "arch":                ("resnet8",  "resnet18", "resnet50"),
    "image_size":          (32,         32,         224),
    "epochs":              (5,          200,        300),
    "warmup_epochs":       (1,          10,         10),
    "batch_size":          (64,         256,        512),
    "lr":                  (20.0,       6.0,        0.3),
    "lr_biases":           (0.05,       0.03,       0.0072),
    "weight_decay":        (1e-4,       1e-3,       1e-6),
    "off_diagonal_weight": (0.0051,     0.0051,     0.0051),
    "proj_dim":            (256,        2048,       8192),
    "crop_scale":          (0.35,       0.08,       0.08),
    "jitter_strength":     (1.0,        1.0,        1.0),
    "blur1":               (0.0,        0.0,        1.0),
    "blur2":               (0.0,        0.0,        0.1),
    "solarize2":           (0.0,        0.2,        0.2),
}


def parse_args(argv=None):
    from common import ArgumentParser, number

    parser = ArgumentParser(__doc__, RECIPES)
    add = parser.add_argument
    add("--loss", choices=("barlow", "vicreg"), default="barlow", help="which of the two papers'")
    add("--lr-biases", type=number(float, 0),
        help="peak learning rate of biases and BN, per 256 images; --lr is that of weights "
        "(papers: 0.0048; vicreg 0.2)")
    add("--off-diagonal-weight", type=number(float, 0), help="barlow: λ (paper: 0.0051)")
    add("--invariance-weight", type=number(float, 0), default=25.0, help="vicreg: λ")
    add("--variance-weight", type=number(float, 0), default=25.0, help="vicreg: μ")
    add("--covariance-weight", type=number(float, 0), default=1.0, help="vicreg: ν")
    add("--proj-dim", type=number(int, 2), help="length of z (papers: 8192)")
    add("--crop-scale", type=number(float, 0, 1, above=True),
        help="area of the smallest crop, as a fraction of the image (papers: 0.08)")
    add("--jitter-strength", type=number(float, 0, 2.5), help="of the colour jitter (paper: 1)")
    add("--blur1", type=number(float, 0, 1), help="fraction of views 1 that are blurred (paper: 1)")
    add("--blur2", type=number(float, 0, 1), help="fraction of views 2 that are (paper: 0.1)")
    add("--solarize2", type=number(float, 0, 1),
        help="fraction of views 2 that are solarised (paper: 0.2; of views 1 none)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    from common import main

    main(train, parse_args)
