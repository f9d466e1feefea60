"""SimCLR: two views of an image are each other's label among all other images of the batch.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (2020,
arXiv 2002.05709); three-layer projector: "Big Self-Supervised Models..." (v2, arXiv 2006.10029).
Survey family: contrastive, negatives from the same batch. What prevents collapse: the negatives.

Each image is augmented twice. Backbone and projector map the 2B views to 2B vectors, and a softmax
over cosine similarities has to find, for each view, the other view of the same image. What the
augmentation changes cannot help, so the backbone learns what it leaves alone.

                  ┌─ augment ─ view1 ─ backbone ─ features ─ projector ─ z1 ─┐
        image ────┤                       (shared)                           ├─ NT-Xent
                  └─ augment ─ view2 ─ backbone ─ features ─ projector ─ z2 ─┘
                                                 └─ what is kept

Run      python simclr.py                       demonstration: built-in images, CPU, a minute
         python simclr.py --data path           a folder of images, or cifar10
         torchrun --nproc-per-node=8 simclr.py --data path
Reuse    from simclr import SimCLR, simclr_loss         (needs torch only)

Departures from the paper: pixels are normalised with ImageNet's mean and std (official code: left
in [0, 1]); crops of small images are bilinear (official: bicubic everywhere). LARS keeps the rate
outside the momentum buffer (official: inside), which differs only while the rate changes. The loss
is half the official one, and so are the steps of biases and BN, which LARS does not adapt. In the
official code only: the last BN of a residual block starts at 0.

Measured in the demonstration, top-1 in percent (of the network at random):
built-in set, kNN 86.7 (35.4), probe 94.0 (43.0); seeds: 3
10,000 of CIFAR-10, kNN 42.8 (32.2), probe 47.8 (34.6); seeds: 3
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


class SimCLR(nn.Module):
    """Backbone and projector.

    backbone: (B, 3, H, W) -> (B, feature_dim). proj_layers: 2 as in SimCLR v1, 3 as in v2.
    As in the official code, each layer is linear without bias, then BN; the last BN has a scale
    and no offset. (Other projects' projectors have biases, and no last BN.)
    """

    def __init__(self, backbone, feature_dim, proj_dim=128, proj_layers=2):
        super().__init__()
        self.backbone = backbone
        layers = []
        for _ in range(proj_layers - 1):
            layers += [nn.Linear(feature_dim, feature_dim, bias=False),
                       nn.BatchNorm1d(feature_dim), nn.ReLU(inplace=True)]
        layers += [nn.Linear(feature_dim, proj_dim, bias=False), nn.BatchNorm1d(proj_dim)]
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
    Guessing gives ln(2B - 1). The official code adds the means over both views' anchors: twice
    this.
    """
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    labels = torch.arange(len(z), device=z.device).roll(len(z1))  # view i's positive is i ± B
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def positive_accuracy(z1, z2):
    """Health: the fraction of views 1 whose positive is the most similar of all views 2. Rising,
    and well above 1 / B, which guessing gives: (B, D), (B, D) -> scalar."""
    nearest = (z1 @ F.normalize(z2, dim=1).T).argmax(1)
    return (nearest == torch.arange(len(z1), device=z1.device)).float().mean()


# --------------------------------------------------------------------------------- augmentation


def make_augment(image_size, crop_scale, jitter_strength, blur):
    """The paper's augmentation (appendix A); both views are drawn from it."""
    from common import (Augment, ColorJitter, GaussianBlur, Normalize, RandomGrayscale,
                        RandomHorizontalFlip, RandomResizedCrop)

    s = jitter_strength
    return Augment([
        RandomResizedCrop(image_size, scale=(crop_scale, 1.0),
                          interpolation="bicubic" if image_size > 64 else "bilinear"),
        RandomHorizontalFlip(0.5),
        ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8),
        RandomGrayscale(0.2),
        GaussianBlur(blur, sigma=(0.1, 2.0)),
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
    """Biases and BN are neither decayed nor adapted."""
    weights = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    others = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    if name == "lars":
        groups[1]["adapt"] = False
        return LARS(groups, lr=0.0, weight_decay=weight_decay)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=weight_decay)


def train(args):
    """Algorithm 1 of the paper, once per step."""
    from common import Run, gather, make_backbone

    run = Run("simclr", args)
    backbone = run.init(make_backbone(args.arch, args.image_size, zero_init_residual=True))
    model = SimCLR(backbone, backbone.feature_dim, args.proj_dim, args.proj_layers)
    optimizer = make_optimizer(args.optimizer, model, args.weight_decay)
    augment = make_augment(args.image_size, args.crop_scale, args.jitter_strength, args.blur)
    network = run.start(model, optimizer, backbone)
    run.save_views(augment, augment)
    chance = math.log(2 * args.batch_size - 1)

    for step, images, aspect in run.steps():
        lr = cosine(step, run.total_steps, run.warmup_steps, run.peak_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        view1, view2 = augment(images, aspect), augment(images, aspect)
        with run.autocast():
            z1, z2 = network(view1, view2)
        z1, z2 = gather(z1.float()), gather(z2.float())  # negatives from all processes
        loss = simclr_loss(z1, z2, args.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if run.prints(step):
            run.log(step, loss, lr, chance, accuracy=positive_accuracy(z1, z2))
    run.finish()


# Sources: imagenet: the paper and google-research/simclr, at a batch that 80 GB hold (there: 4096):
# hence the rate of its rule for small batches, 0.075 √B. Its decay is 1e-4, in the paper 1e-6.
# cifar: augmentation of the same repository's README, v1's head; SGD, its rate and decay (there of
# biases and BN too), temperature and batch of lightly's CIFAR-10 benchmark. demo: cifar's where no
# other value was measured to be better on the built-in set.
RECIPES = {
    "recipe":          ("demo",     "cifar",    "imagenet"),
    "arch":            ("resnet8",  "resnet18", "resnet50"),
    "image_size":      (32,         32,         224),
    "epochs":          (5,          200,        100),
    "warmup_epochs":   (0.5,        10,         10),
    "batch_size":      (64,         512,        512),
    "optimizer":       ("sgd",      "sgd",      "lars"),
    "lr":              (0.48,       0.12,       0.85),
    "weight_decay":    (5e-4,       5e-4,       1e-4),
    "temperature":     (0.2,        0.5,        0.1),
    "proj_layers":     (2,          2,          2),
    "proj_dim":        (64,         128,        128),
    "crop_scale":      (0.35,       0.08,       0.08),
    "jitter_strength": (0.5,        0.5,        1.0),
    "blur":            (0.0,        0.0,        0.5),
}


def parse_args(argv=None):
    from common import ArgumentParser, number

    parser = ArgumentParser(__doc__, RECIPES)
    add = parser.add_argument
    add("--optimizer", choices=("sgd", "lars"), help="the paper has LARS")
    add("--temperature", type=number(float, 0, above=True),
        help="softmax temperature, τ (paper: 0.1)")
    add("--proj-layers", type=number(int, 2, 3), help="layers of the projector: v1 2, v2 3")
    add("--proj-dim", type=number(int, 1), help="length of z (paper: 128)")
    add("--crop-scale", type=number(float, 0, 1, above=True),
        help="area of the smallest crop, as a fraction of the image (paper: 0.08)")
    add("--jitter-strength", type=number(float, 0, 1.25), help="of the colour jitter, s (paper: 1)")
    add("--blur", type=number(float, 0, 1), help="fraction of views that are blurred (paper: 0.5)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    from common import main

    main(train, parse_args)
