# SPDX-License-Identifier: MIT
"""SimCLR: of all images in the batch, find the other view of the same image.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (2020,
arXiv 2002.05709); three-layer projector: "Big Self-Supervised Models..." (v2, arXiv 2006.10029).
Survey family: contrastive, negatives from the same batch. What prevents collapse: the negatives.

Each image is augmented twice. Backbone and projector map the 2B views to 2B vectors, and a softmax
over cosine similarities has to find, for each view, the other view of the same image. So the
backbone learns features that the augmentation does not change and that tell images apart.

                  ┌─ augment ─ view1 ─ backbone ─ features ─ projector ─ z1 ─┐
        image ────┤                       (shared)                           ├─ NT-Xent
                  └─ augment ─ view2 ─ backbone ─ features ─ projector ─ z2 ─┘
                                                 └─ used after training

Run      python simclr.py                       demonstration: synthetic images, CPU, minutes
         python simclr.py --data path           a folder of images, or cifar10
         torchrun --nproc-per-node=8 simclr.py --data path
Reuse    from simclr import SimCLR, simclr_loss, make_optimizer, cosine_schedule
         (needs torch only). `train` shows one step, from the learning rate, which make_optimizer
         leaves at 0, to optimizer.step().
"""

import copy
import math
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


class SimCLR(nn.Module):
    """Backbone and projector.

    backbone: (B, 3, H, W) -> (B, feature_dim). proj_layers: 2 as in SimCLR v1, 3 as in v2.
    As in the official code, each layer is linear without bias, then BN; the last BN has a scale
    and no offset. (solo-learn uses biases and no BN; lightly's last BN has an offset.)
    """

    def __init__(self, backbone, feature_dim, proj_dim=128, proj_layers=2):
        super().__init__()
        self.backbone = backbone
        layers = []
        for _ in range(proj_layers - 1):
            layers.append(nn.Linear(feature_dim, feature_dim, bias=False))
            layers.append(nn.BatchNorm1d(feature_dim))
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Linear(feature_dim, proj_dim, bias=False))
        layers.append(nn.BatchNorm1d(proj_dim))
        self.projector = nn.Sequential(*layers)
        self.projector[-1].bias.requires_grad_(False)  # stays 0: no offset

    def forward(self, view1, view2):
        """Two (B, 3, H, W) -> two (B, D). One pass over all 2B views, so that they share BN
        statistics, as in the official code."""
        z = self.projector(self.backbone(torch.cat([view1, view2])))
        return z.chunk(2)


# ----------------------------------------------------------------------------------------- loss


def simclr_loss(z1, z2, temperature):
    """NT-Xent, equation 1 of the paper, averaged over the 2B anchors: (B, D), (B, D) -> scalar.

        l(i, j) = -log  exp(sim(z_i, z_j) / τ) / Σ_{k ≠ i} exp(sim(z_i, z_k) / τ)

    where j is the other view of i's image, k runs over all 2B views but i, and sim is the cosine.
    Chance level: ln(2B - 1). The official code's loss is twice this one: it adds the means over
    the anchors of both views.
    """
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    labels = torch.arange(len(z), device=z.device).roll(len(z1))  # view i's positive is i ± B
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def positive_found(z1, z2):
    """Health: how often a first view's positive is the most similar of all second views. It should
    rise well above 1 / B, the chance level: (B, D), (B, D) -> scalar."""
    # z1 is left as it is: its length does not change which z2 is nearest
    nearest = (z1 @ F.normalize(z2, dim=1).T).argmax(1)
    return (nearest == torch.arange(len(z1), device=z1.device)).float().mean()


# --------------------------------------------------------------------------------- augmentation


def augment(images, aspect, image_size, crop_scale, jitter_strength, blur):
    """The paper's augmentation (appendix A), of both views: uint8 images (B, 3, S, S), resized to
    squares, and aspect (B,), their original width / height -> views (B, 3, image_size, image_size).
    """
    from common import (color_jitter, gaussian_blur, normalize, random_grayscale,
                        random_horizontal_flip, random_resized_crop)

    s = jitter_strength
    x = random_resized_crop(images, aspect, image_size, scale=(crop_scale, 1.0),
                            interpolation="bicubic" if image_size > 64 else "bilinear")
    x = random_horizontal_flip(x, p=0.5)
    x = color_jitter(x, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8)
    x = random_grayscale(x, p=0.2)
    x = gaussian_blur(x, p=blur, sigma=(0.1, 2.0))
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
    """Biases and BN get neither weight decay nor LARS's adaptation."""
    weights = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    others = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    if name == "lars":
        groups[1]["adapt"] = False
        return LARS(groups, lr=0.0, weight_decay=weight_decay)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=weight_decay)


def train(args):
    """Algorithm 1 of the paper, once per step."""
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

    backbone = make_backbone(args.arch, args.image_size, zero_init_residual=True)
    untrained = copy.deepcopy(backbone)  # the report's baseline
    if args.init:
        load_backbone(args.init, network=backbone)
    model = SimCLR(backbone, backbone.feature_dim, args.proj_dim, args.proj_layers)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(args.optimizer, model, args.weight_decay)
    make_view = partial(augment, image_size=args.image_size, crop_scale=args.crop_scale,
                        jitter_strength=args.jitter_strength, blur=args.blur)
    chance = math.log(2 * args.batch_size - 1) if args.loss == "nt-xent" else None

    open_run(args)
    first_step = load_checkpoint(args, train_set, model, optimizer)  # 0, or where to resume
    network = parallel(model, args.compile)  # DDP and SyncBN when there are several processes
    save_views(args, train_set, device, make_view, make_view)
    untrained_knn = None  # measured when the first epoch ends
    started = saved_at = time.monotonic()

    for step, images, aspect in batches(train_set, args, first_step, device):  # seeds each step
        lr = cosine_schedule(step, total_steps, warmup_steps, peak_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        view1 = make_view(images, aspect)
        view2 = make_view(images, aspect)
        with autocast(device):  # the network only: the loss needs float32
            z1, z2 = network(view1, view2)
        z1 = gather(z1.float())  # negatives from all processes
        z2 = gather(z2.float())
        if args.loss == "nt-xent":
            loss = simclr_loss(z1, z2, args.temperature)
        else:
            loss = OTHER_LOSSES[args.loss](z1, z2, args.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        done = step + 1
        epoch_ends = done % steps_per_epoch == 0
        if done == 1 or done % args.print_freq == 0 or epoch_ends:
            log(args, done, total_steps, first_step, started, lr=lr, loss=loss, chance=chance,
                positive_found=positive_found(z1, z2))
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
    "recipe":          ("demo",     "cpu",      "cifar",     "imagenet"),
    "arch":            ("resnet8",  "resnet8",  "resnet18",  "resnet50"),
    "image_size":      (32,         24,         32,          224),
    "eval_size":       (32,         32,         32,          224),
    "epochs":          (6,          15,         200,         100),
    "warmup_epochs":   (1,          1,          10,          10),
    "batch_size":      (32,         64,         512,         512),
    "optimizer":       ("sgd",      "sgd",      "sgd",       "lars"),
    "lr":              (0.12,       0.48,       0.12,        0.85),
    "weight_decay":    (5e-4,       5e-4,       5e-4,        1e-4),
    "temperature":     (0.2,        0.2,        0.5,         0.1),
    "proj_dim":        (64,         64,         128,         128),
    "crop_scale":      (0.35,       0.2,        0.08,        0.08),
    "jitter_strength": (0.5,        0.5,        0.5,         1.0),
    "blur":            (0.0,        0.0,        0.0,         0.5),
}


def parse_args(argv=None):
    from common import make_parser, parse_with_recipe

    parser = make_parser("simclr", __doc__, RECIPES)
    parser.epilog = "The log's `positive found` should rise far above 1 / --batch-size."
    add = parser.add_argument
    add("--loss", choices=["nt-xent", *OTHER_LOSSES], default="nt-xent", help="contrastive loss")
    add("--optimizer", choices=["sgd", "lars"], help="paper: lars")
    add("--temperature", type=float, help="softmax temperature, τ; paper: 0.1")
    add("--proj-layers", type=int, default=2, help="layers of the projector; paper: 2, in v2 3")
    add("--proj-dim", type=int, help="length of z; paper: 128")
    add("--crop-scale", type=float, help="smallest crop, fraction of the image's area; paper: 0.08")
    add("--jitter-strength", type=float, help="strength of the color jitter, s; paper: 1")
    add("--blur", type=float, help="fraction of views that are blurred; paper: 0.5")
    return parse_with_recipe(parser, RECIPES, argv)


# ----------------------------------------- appendix: the surveys' other contrastive losses
# Each takes two (B, D) and returns the mean of L_i. s_ij = sim(z_i, z_j) / τ. With B anchors, i is
# a first view and j a second view. With 2B anchors, i is any view, s_i+ compares it with the other
# view of its image, and k runs over the N = 2B - 2 views of other images.


def infonce_loss(z1, z2, temperature):
    """InfoNCE (CPC, 1807.03748), of cosines: L_i = -log exp(s_ii) / Σ_j exp(s_ij). Chance: ln B."""
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(z1), device=z1.device))


def nce_loss(z1, z2, temperature):
    """Binary NCE (as in InstDisc, 1805.01978): is the pair (i, j) one image, or one of the
    k = B - 1 noise pairs?

        L_i = -log h_ii - Σ_{j≠i} log(1 - h_ij),   h = exp(s) / (exp(s) + k) = σ(s - ln k)

    Here exp(s) is the ratio of the densities of data and noise, p / p_n (InstDisc: n exp(s) / Z).
    Chance level, at s = 0: B ln B - (B - 1) ln(B - 1).
    """
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature
    logits = logits - math.log(len(z1) - 1)
    labels = torch.eye(len(z1), dtype=logits.dtype, device=z1.device)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(z1)


def positives_and_negatives(z1, z2, temperature):
    """The logits of 2B anchors, s_i+ and s_ik: (2B,), (2B, N)."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = z @ z.T / temperature
    positives = logits.diagonal(len(z1)).repeat(2)
    # Columns `first` and first + B are the views of a row's own image; the others are its
    # negatives. The j-th of these is column j, j + 1 or j + 2: before, between or behind the two.
    first = (torch.arange(len(z), device=z.device) % len(z1))[:, None]
    column = torch.arange(len(z) - 2, device=z.device)
    columns = column + (column >= first)  # (2B, N)
    columns = columns + (columns >= first + len(z1))
    return positives, logits.gather(1, columns)


def flatnce_loss(z1, z2, temperature):
    """FlatNCE (2107.01152), 2B anchors:

        L_i = exp(v_i - sg(v_i)),   v_i = log Σ_k exp(s_ik - s_i+)

    Its value is always 1, its gradient that of v: NT-Xent's divided by 1 - p, where p is the
    positive's softmax. Where p is near 1, NT-Xent's gradient is tiny, and at last rounding error.
    """
    positives, negatives = positives_and_negatives(z1, z2, temperature)
    v = (negatives - positives[:, None]).logsumexp(1)
    return (v - v.detach()).exp().mean()


def debiased_loss(z1, z2, temperature, positive_prior=0.1):
    """Debiased (2007.00224), 2B anchors:

        L_i = -log exp(s_i+) / (exp(s_i+) + N g_i)
        g_i = max((Σ_k exp(s_ik) / N - τ+ exp(s_i+)) / (1 - τ+), exp(-1/τ))

    τ+, positive_prior, is how often a negative is of i's class. Chance: ln(2B - 1).
    """
    return hard_negative_loss(z1, z2, temperature, positive_prior, concentration=0.0)


def hard_negative_loss(z1, z2, temperature, positive_prior=0.1, concentration=1.0):
    """Hard negatives (2010.04592): debiased_loss, but its mean over k is weighted. The weights are
    ∝ exp(β s_ik), and gradients pass through them. With concentration β = 0 it is debiased_loss;
    with τ+ = 0, too, it is NT-Xent."""
    positives, negatives = positives_and_negatives(z1, z2, temperature)
    # False negatives, images of i's own class, make up a share of the mean: τ+ exp(s_i+) / mean.
    # g = mean · (1 - share) / (1 - τ+), at least exp(-1/τ). All of it in logarithms, as exp(1/τ)
    # may overflow.
    log_mean = ((concentration * negatives).log_softmax(1) + negatives).logsumexp(1)
    log_share = positives - log_mean + math.log(max(positive_prior, 1e-300))  # τ+ may be 0
    # From a share of 1 on, nothing is left of the mean, and g is its floor. Cut off just below 1,
    # since the logarithm of nothing has no gradient.
    log_share = log_share.clamp(max=-torch.finfo(z1.dtype).tiny)
    log_g = log_mean + (-torch.expm1(log_share)).log() - math.log(1 - positive_prior)
    log_g = log_g.clamp(min=-1 / temperature)
    return -F.logsigmoid(positives - log_g - math.log(negatives.shape[1])).mean()


def alignment(z1, z2, alpha=2):
    """E ‖z1 - z2‖^α of unit z (2005.10242), 0 if invariant: (B, D), (B, D) -> scalar."""
    return (F.normalize(z1, dim=1) - F.normalize(z2, dim=1)).norm(dim=1).pow(alpha).mean()


def uniformity(z, t=2):
    """log E exp(-t ‖z_i - z_j‖²), i ≠ j, unit z: 0 collapsed, -2t spread out: (B, D) -> scalar."""
    z = F.normalize(z, dim=1)
    logits = (2 * t * (z @ z.T - 1)).fill_diagonal_(-math.inf)  # ‖z_i - z_j‖² = 2 - 2 z_i·z_j
    return logits.logsumexp((0, 1)) - math.log(len(z) * (len(z) - 1))


def alignment_uniformity_loss(z1, z2, temperature):
    """Alignment, plus the mean uniformity of both views. t = 1 / (2τ): the paper's t = 2 is
    --temperature 0.25."""
    t = 1 / (2 * temperature)
    return alignment(z1, z2) + (uniformity(z1, t) + uniformity(z2, t)) / 2


OTHER_LOSSES = {"infonce": infonce_loss, "nce": nce_loss, "flatnce": flatnce_loss,
                "debiased": debiased_loss, "hard": hard_negative_loss,
                "alignment": alignment_uniformity_loss}

# ------------------------------------------------------------------------- sources and departures

# Sources. imagenet: the paper and google-research/simclr (batch 4096; its rate, 0.075 √B, is 0.85
# per 256 images at batch 512, and 0.3 at 4096; decay 1e-4, in the paper 1e-6; published linear
# probe after 100 epochs with batch 4096: about 64.5 %). cifar: augmentation and warm-up of that
# repository; SGD, rate, decay and batch of lightly's CIFAR-10 benchmark (which decays biases and
# BN, too). demo: measured on the synthetic images. cpu: measured on CIFAR-10; trained on views of
# 24 pixels and evaluated at 32, as in FixRes (1906.06423).
#
# Departures from the paper: pixels are normalized by ImageNet's mean and std (official: in [0, 1]);
# views of at most 64 pixels are resized bilinearly (official: bicubic), larger ones with
# antialiasing (official: without); crops are taken from a square canvas of 8/7 of the view's side
# (official: from the whole image), so that small crops are less sharp, and elongated images lose
# more (cut them beforehand); contrast is relative to the mean gray (official: per channel),
# saturation is changed without HSV; blur reflects the border (official: zeros); training is in
# bfloat16 on CUDA (official: float32); LARS keeps the rate outside the momentum buffer; the loss is
# half the official one. In the official code only: a residual block's last BN starts at 0.

if __name__ == "__main__":
    from common import main

    main(train, parse_args)
