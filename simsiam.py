"""SimSiam: predict one view's vector from the other's, which stop-gradient holds constant.

Chen and He, "Exploring Simple Siamese Representation Learning" (2020, arXiv 2011.10566).
Survey family: self-distillation, without negatives and without a momentum encoder. What prevents
collapse: the stop-gradient, and the predictor on the side that gets the gradient.

Each image is augmented twice. One encoder, backbone and projector, maps both views to vectors, and
a predictor has to turn the vector of one view into that of the other, which is held constant: BYOL,
with the online network itself as the target. A constant output would minimise the loss, but
training does not reach it; without stop-gradient or predictor, the vectors of different images draw
together (tests/test_simsiam.py).

               ┌─ augment ─ view1 ─ backbone ─ features ─ projector ─ z1 ─ predictor ─ p1 ─┐
        image ─┤                       (shared)                                            ├─ -cos
               └─ augment ─ view2 ─ backbone ─ features ─ projector ─ z2 ─ stop-gradient ──┘
                                              └─ what is kept     and with the views exchanged

Run      python simsiam.py                      demonstration: drawn images, CPU, minutes
         python simsiam.py --data path          a folder of images, or cifar10
         torchrun --nproc-per-node=8 simsiam.py --data path
Reuse    from simsiam import SimSiam, simsiam_loss, cosine       (needs torch only)
"""

import copy
import math
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


class SimSiam(nn.Module):
    """Backbone, projector and predictor.

    backbone: (B, 3, H, W) -> (B, feature_dim). proj_layers: 3, or 2 as in the paper for CIFAR-10.
    The projector ends in a BN without scale and offset, which alone does not prevent collapse. The
    predictor is a bottleneck, and has no BN at its output.
    """

    def __init__(self, backbone, feature_dim, proj_dim=2048, pred_dim=512, proj_layers=3):
        super().__init__()
        self.backbone = backbone
        layers = []
        for in_dim in [feature_dim] + [proj_dim] * (proj_layers - 1):
            layers += [nn.Linear(in_dim, proj_dim, bias=False),
                       nn.BatchNorm1d(proj_dim), nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(*layers[:-2], nn.BatchNorm1d(proj_dim, affine=False))
        self.predictor = nn.Sequential(nn.Linear(proj_dim, pred_dim, bias=False),
                                       nn.BatchNorm1d(pred_dim), nn.ReLU(inplace=True),
                                       nn.Linear(pred_dim, proj_dim))

    def forward(self, view1, view2):
        """Two (B, 3, H, W) -> predictions p1, p2 and projections z1, z2, each (B, D). One pass per
        view, so that each view has its own BN statistics, as in the official code."""
        z1, z2 = self.projector(self.backbone(view1)), self.projector(self.backbone(view2))
        return self.predictor(z1), self.predictor(z2), z1, z2


# ----------------------------------------------------------------------------------------- loss


def simsiam_loss(p1, p2, z1, z2):
    """Equation 4 of the paper, averaged over the batch: four (B, D) -> scalar, -1 to 1.

        ½ D(p1, stopgrad(z2)) + ½ D(p2, stopgrad(z1))        with D(p, z) = -cos(p, z)

    Chance level: 0, of vectors at right angles. At -1 within the first steps: collapse.
    """
    cos1 = F.cosine_similarity(p1, z2.detach(), dim=1)  # stop-gradient
    cos2 = F.cosine_similarity(p2, z1.detach(), dim=1)
    return -(cos1.mean() + cos2.mean()) / 2


@torch.no_grad()
def spread(z):
    """Health: how far apart the directions of z are, √D times the deviation over the batch of
    z / ‖z‖, averaged over the D dimensions: (B, D) -> scalar. Near 1 where z ends in BN; lower, but
    steady, where it does not; towards 0, all images get the same vector: collapse."""
    return z.shape[1] ** 0.5 * F.normalize(z, dim=1).std(0).mean()


# --------------------------------------------------------------------------------- augmentation


def augment(images, aspect, image_size, crop_scale, jitter_strength, blur):
    """The paper's augmentation (MoCo v2's): uint8 images (B, 3, S, S), squeezed to squares from
    width / height = aspect (B,) -> views (B, 3, image_size, image_size). Both views are made by it.
    """
    from common import (color_jitter, gaussian_blur, normalize, random_grayscale,
                        random_horizontal_flip, random_resized_crop)

    s = jitter_strength
    x = random_resized_crop(images, aspect, image_size, scale=(crop_scale, 1.0))
    x = color_jitter(x, 0.4 * s, 0.4 * s, 0.4 * s, 0.1 * s, p=0.8)
    x = random_grayscale(x, p=0.2)
    x = gaussian_blur(x, p=blur, sigma=(0.1, 2.0))
    x = random_horizontal_flip(x, p=0.5)
    return normalize(x)


# ------------------------------------------------------------------------------------- training


def cosine(step, total_steps, warmup_steps, peak, end=0.0):
    """Rises linearly to `peak` over the warm-up, then moves to `end` on half a cosine."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    t = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end + (peak - end) * (1 + math.cos(math.pi * t)) / 2


def make_optimizer(model, weight_decay):
    """Two groups, since their rates differ: encoder and predictor. Everything is decayed, biases
    and BN too."""
    encoder = [*model.backbone.parameters(), *model.projector.parameters()]
    groups = [{"params": encoder}, {"params": model.predictor.parameters()}]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=weight_decay)


def train(args):
    """Algorithm 1 of the paper, once per step."""
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
    peak_lr = args.lr * args.batch_size / 256

    backbone = make_backbone(args.arch, args.image_size, zero_init_residual=True)
    untrained = copy.deepcopy(backbone)  # the report's baseline
    load_init(backbone, args.init)
    model = SimSiam(backbone, backbone.feature_dim, args.proj_dim, args.pred_dim, args.proj_layers)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args.weight_decay)
    view = partial(augment, image_size=args.image_size, crop_scale=args.crop_scale,
                   jitter_strength=args.jitter_strength, blur=args.blur)
    step = load_checkpoint(args, train_set, model, optimizer)  # 0, or where the run goes on
    network = parallel(model, args.compile)  # DistributedDataParallel and SyncBN, if of several
    save_views(args, train_set, device, view, view)
    saved_at = save_checkpoint(args, step, train_set, model, optimizer, backbone)
    started = step, time.monotonic()  # for the speed and the time left
    chance = 0.0

    for step, images, aspect in batches(train_set, args, step, device):  # seeded by step
        # one rate for each epoch, except while it warms up, which the paper does not need
        epoch_start = max(step - step % steps_per_epoch, min(step, warmup_steps))
        lr = cosine(epoch_start, total_steps, warmup_steps, peak_lr)
        encoder_group, predictor_group = optimizer.param_groups
        encoder_group["lr"], predictor_group["lr"] = lr, peak_lr  # the predictor's is constant
        view1, view2 = view(images, aspect), view(images, aspect)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            p1, p2, z1, z2 = network(view1, view2)
        loss = simsiam_loss(p1.float(), p2.float(), z1.float(), z2.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        done, epoch_ends = step + 1, (step + 1) % steps_per_epoch == 0
        if done == 1 or done % args.print_freq == 0 or epoch_ends:
            log(args, done, total_steps, started, lr, loss, chance,
                spread=spread(gather(z1.float())))
        if epoch_ends or time.monotonic() - saved_at > 600:
            saved_at = save_checkpoint(args, done, train_set, model, optimizer, backbone)
    report = evaluate(backbone, untrained, train_set, test_set, args.image_size, device)
    write_log(args, {"step": total_steps, "report": report})


RECIPES = {
    "recipe":          ("demo",     "cpu",      "cifar",     "imagenet"),
    "arch":            ("resnet8",  "resnet8",  "resnet18",  "resnet50"),
    "image_size":      (32,         32,         32,          224),
    "epochs":          (7,          20,         800,         100),
    "warmup_epochs":   (1,          1,          0,           0),
    "batch_size":      (64,         64,         512,         512),
    "lr":              (0.6,        0.3,        0.03,        0.05),
    "weight_decay":    (5e-4,       5e-4,       5e-4,        1e-4),
    "proj_layers":     (2,          2,          2,           3),
    "proj_dim":        (512,        512,        2048,        2048),
    "pred_dim":        (128,        128,        512,         512),
    "crop_scale":      (0.35,       0.2,        0.2,         0.2),
    "jitter_strength": (1.0,        1.0,        1.0,         1.0),
    "blur":            (0.0,        0.0,        0.0,         0.5),
}
FLAGS = {  # type, lowest, highest, help, the paper's value
    "proj_layers": (int, 1, 10, "layers of the projector", "3, for CIFAR-10 2"),
    "proj_dim": (int, 1, 10**5, "length of z and p", "2048"),
    "pred_dim": (int, 1, 10**5, "hidden width of the predictor", "512"),
    "crop_scale": (float, 1e-3, 1, "smallest crop, as a fraction of the image's area", "0.2"),
    "jitter_strength": (float, 0, 2.5, "strength of the colour jitter", "1"),
    "blur": (float, 0, 1, "fraction of views that are blurred", "0.5"),
}


def parse_args(argv=None):
    from common import parse_flags

    return parse_flags("simsiam", __doc__, RECIPES, FLAGS, argv)


# Sources. imagenet: the paper and facebookresearch/simsiam. cifar: the paper's appendix on
# CIFAR-10; what it does not name, as for ImageNet. demo: measured on drawn images; cpu: not tuned.
# Departures from the paper: none that is known. From the official code: blur is a true Gaussian
# (official: PIL's); the projector's last linear layer has no frozen bias, which the BN after it
# would remove. In the official code only: the last BN of a residual block starts at 0.

if __name__ == "__main__":
    from common import main

    main(train, parse_args)
