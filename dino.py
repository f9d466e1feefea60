"""DINO: a student predicts what its own moving average, the teacher, says of other crops.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021, arXiv 2104.14294).
Survey family: self-distillation with an EMA teacher, on a vision transformer. What prevents
collapse: centering (no class dominates) and sharpening (not all classes alike), against each other.

Each image is cropped twice large and several times small. Teacher and student turn crops into
distributions over K classes that nobody named; the student, which sees all crops, has to match what
the teacher, which sees only the large ones, says of another crop. So parts must tell of the whole.

                  ┌─ global views ─ teacher ─ logits - center ─ softmax(/ τ_t), no gradient ─┐
        image ────┤                    ↑ EMA                                                 ├─ loss
                  └─ all views ──── student ─ logits ─ log softmax(/ τ_s) ───────────────────┘
        what is kept: the teacher's backbone; a ViT's features are the class token

Run      python dino.py                         demonstration: built-in images, CPU, a minute
         python dino.py --data path             a folder of images, or cifar10
         torchrun --nproc-per-node=8 dino.py --data path
Reuse    from dino import DINO, ViT, dino_loss          (needs torch only)

On the log line, entropy (the teacher's) should stay between 0 and ln K, printed as chance, and kl
leave 0. The ViT has timm's names and shapes, as have the official checkpoints; with one,
attention.png shows what its class token sees. Official ResNet-50: --arch resnet50 --optimizer sgd
--lr 0.03 --weight-decay 1e-4 --weight-decay-end 1e-4 --crop-scale 0.14 --teacher-temperature 0.04.

Departures from the paper: none in the loss. From the official code: the teacher's temperature
rises by the step (official: by the epoch); blur is a true Gaussian (official: PIL's); position
embeddings are interpolated to exactly the grid's size (official: a tenth of a patch more); bfloat16
without gradient scaling (official: float16). The survey's formula has two views, no temperatures
and no center.

Measured in the demonstration, top-1 in percent (of the network at random):
built-in set, kNN 29.9 (35.4), probe 54.4 (43.0); seeds: 3
10,000 of CIFAR-10, kNN 33.7 (32.2), probe 40.1 (34.6); seeds: 3
"""

import argparse
import copy
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------- model


class PatchEmbed(nn.Module):
    """Square patches, each mapped to a token: (B, 3, H, W) -> (B, N, C), row by row."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, C) -> (B, N, C)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x):
        """(B, N, C) -> query, key and value of each head: (3, B, heads, N, C / heads)."""
        return self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        query, key, value = self.heads(x)
        x = F.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each a residual branch that begins with LayerNorm.

    drop_path: in training, the fraction of images that go without a branch (stochastic depth); it
    is scaled up for the others.
    """

    def __init__(self, dim, num_heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), gelu=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.drop_path = drop_path

    def drop(self, branch):
        if not self.training or self.drop_path == 0:
            return branch
        keep = torch.full_like(branch[:, :1, :1], 1 - self.drop_path)
        return branch * (keep.bernoulli() / keep)

    def forward(self, x):
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al., 2020) without a classifier, under timm's names.

    forward: (B, 3, H, W) -> (B, C), the class token after the last LayerNorm; C is feature_dim.
    image_size and patch_size: pixels. Other sizes get interpolated position embeddings.
    drop_path: that of the last block; it rises linearly from 0 in the first.
    """

    def __init__(self, image_size, patch_size, dim, depth, num_heads, drop_path=0.0):
        super().__init__()
        self.feature_dim, self.patch_size = dim, patch_size
        self.grid_size = image_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid_size ** 2, dim))
        self.blocks = nn.Sequential(*[Block(dim, num_heads, drop_path * i / max(depth - 1, 1))
                                      for i in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)

    def positions(self, height, width):
        """(1, 1 + height · width, C): those of another grid of patches, interpolated (bicubic)."""
        if height == width == self.grid_size:
            return self.pos_embed
        grid = self.pos_embed[0, 1:].unflatten(0, (self.grid_size, self.grid_size))
        # Two weighted sums, as the gradient of a 2-D F.interpolate is not deterministic on CUDA.
        eye = torch.eye(self.grid_size, dtype=grid.dtype, device=grid.device)[None, :, :, None]
        rows, columns = (F.interpolate(eye, (side, 1), mode="bicubic")[0, :, :, 0].T
                         for side in (height, width))  # (side, grid_size)
        grid = (rows[:, :, None, None] * grid).sum(1)
        grid = (columns[:, :, None] * grid[:, None]).sum(2)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(0, 1)[None]], 1)

    def embed(self, images):
        """(B, 3, H, W) -> (B, 1 + N, C): class token and patches, with positions."""
        tokens = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        return tokens + self.positions(*(side // self.patch_size for side in images.shape[2:]))

    def forward(self, images):
        return self.norm(self.blocks(self.embed(images)))[:, 0]

    @torch.no_grad()
    def class_attention(self, images):
        """What the class token looks at in the last block: (B, heads, H / patch, W / patch), each
        map with the class token's share of 1 missing."""
        last = self.blocks[-1]
        query, key, _ = last.attn.heads(last.norm1(self.blocks[:-1](self.embed(images))))
        scores = query[:, :, :1] @ key.transpose(2, 3) / query.shape[3] ** 0.5
        return scores.softmax(3)[:, :, 0, 1:].unflatten(2, (images.shape[2] // self.patch_size, -1))


def init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class Head(nn.Module):
    """Three layers to a bottleneck of unit length, then a weight-normalised layer to K classes: the
    logits are cosines. (B, C) -> (B, K). bn: after the hidden layers (the paper's ViTs: none)."""

    def __init__(self, feature_dim, out_dim, hidden_dim, bottleneck_dim, bn):
        super().__init__()
        layers = []
        for in_dim in feature_dim, hidden_dim:
            layers += [nn.Linear(in_dim, hidden_dim), *[nn.BatchNorm1d(hidden_dim)] * bn, nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        self.mlp.apply(init_linear)
        self.last_layer = nn.Linear(bottleneck_dim, out_dim, bias=False)

    def forward(self, x):
        x = F.normalize(self.mlp(x), dim=1)
        return F.linear(x, F.normalize(self.last_layer.weight, dim=1))  # weight norm with g = 1


class DINO(nn.Module):
    """Student and teacher, each a backbone and a head; the center of the teacher's logits.

    backbone: (B, 3, H, W) -> (B, feature_dim) at the sizes of both kinds of views. The teacher
    starts as a copy, without stochastic depth, and has no gradient.
    """

    def __init__(self, backbone, feature_dim, out_dim=65536, hidden_dim=2048, bottleneck_dim=256,
                 head_bn=False):
        super().__init__()
        head = Head(feature_dim, out_dim, hidden_dim, bottleneck_dim, head_bn)
        self.student = nn.ModuleDict({"backbone": backbone, "head": head})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for module in self.teacher.modules():
            if isinstance(module, Block):
                module.drop_path = 0.0
        self.register_buffer("center", torch.zeros(out_dim))

    def forward(self, global_views, local_views):
        """Lists of 2 and of V - 2 tensors (B, 3, ., .) -> logits of the student (V, B, K) and the
        teacher (2, B, K). Views of one size go in one pass and share BN statistics."""
        sizes = [torch.cat(views) for views in (global_views, local_views) if views]
        features = torch.cat([self.student["backbone"](x) for x in sizes])
        student = self.student["head"](features)
        with torch.no_grad():
            teacher = self.teacher["head"](self.teacher["backbone"](sizes[0]))
        return student.unflatten(0, (-1, len(global_views[0]))), teacher.unflatten(0, (2, -1))


# ----------------------------------------------------------------------------------------- loss


def dino_loss(student, teacher, center, student_temperature, teacher_temperature):
    """Equation 3 of the paper, as a mean over its 2(V - 1) terms and the batch: (V, B, K),
    (2, B, K), (K,) -> scalar. Views 0 and 1 are the global ones, in both.

        Σ_{x ∈ {0, 1}} Σ_{v ≠ x} H(P_t(x), P_s(v)),  H(a, b) = -Σ_k a_k log b_k
        P_t(x) = softmax((teacher_x - c) / τ_t), no gradient;  P_s(v) = softmax(student_v / τ_s)

    Guessing gives ln K.
    """
    p = torch.softmax((teacher - center) / teacher_temperature, 2).detach()  # stop-gradient
    log_p = torch.log_softmax(student / student_temperature, 2)
    others = log_p.sum(0) - log_p[:2]  # for each global view the sum over all other views
    return -(p * others).sum(2).mean() / (len(student) - 1)


@torch.no_grad()
def teacher_entropy(teacher, center, teacher_temperature):
    """Health: mean entropy of the teacher's distributions, in nats: (2, B, K) -> scalar. Strictly
    between 0 (one class dominates: centering too weak) and ln K (uniform: sharpening too weak). The
    loss less this is KL(teacher, student), which is 0 in either collapse (figure 7)."""
    log_p = torch.log_softmax((teacher - center) / teacher_temperature, 2)
    return -(log_p.exp() * log_p).sum(2).mean()


@torch.no_grad()
def update_center(center, batch_mean, center_momentum):
    """Equation 4: c ← m · c + (1 - m) · mean of the teacher's logits over the batch, (K,)."""
    center.lerp_(batch_mean, 1 - center_momentum)


@torch.no_grad()
def ema_update(target, online, ema_momentum):
    """target ← ema_momentum · target + (1 - ema_momentum) · online, parameters only: BN statistics
    are each network's own."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - ema_momentum)


# --------------------------------------------------------------------------------- augmentation


def make_augments(image_size, local_size, crop_scale, local_crop_scale, blur, solarize2):
    """-> those of the first global view, the second one, and the local ones: BYOL's, on crops that
    are larger and smaller than crop_scale."""
    from common import (Augment, ColorJitter, GaussianBlur, Normalize, RandomGrayscale,
                        RandomHorizontalFlip, RandomResizedCrop, RandomSolarize)

    def view(size, scale, blurred, solarized):
        return Augment([
            RandomResizedCrop(size, scale=scale, interpolation="bicubic"),
            RandomHorizontalFlip(0.5),
            ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            RandomGrayscale(0.2),
            GaussianBlur(blur * blurred, sigma=(0.1, 2.0), kernel_size=13),  # to 3 σ, as PIL
            RandomSolarize(solarized),
            Normalize(),
        ])

    return (view(image_size, (crop_scale, 1.0), blurred=1.0, solarized=0.0),
            view(image_size, (crop_scale, 1.0), blurred=0.1, solarized=solarize2),
            view(local_size, (local_crop_scale, crop_scale), blurred=0.5, solarized=0.0))


# ------------------------------------------------------------------------------------- training


def cosine(step, total_steps, warmup_steps, start, end=0.0):
    """Rises linearly to `start` over the warm-up, then falls to `end` on half a cosine."""
    if step < warmup_steps:
        return start * (step + 1) / warmup_steps
    t = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


def linear(step, warmup_steps, start, end):
    """From `start` to `end` over the warm-up, then `end`."""
    return end if step >= warmup_steps else start + (end - start) * step / warmup_steps


@torch.no_grad()
def clip_gradients(parameters, max_norm):
    """Scales each parameter's gradient to a norm of at most max_norm, by itself: not as
    torch.nn.utils.clip_grad_norm_, which scales all by their common norm."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_mul_(grads, list((max_norm / (norms + 1e-6)).clamp(max=1).unbind()))


def make_optimizer(name, model, weight_decay):
    """Biases, LayerNorm and BN are not decayed; class token and position embeddings are."""
    weights = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    others = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=weight_decay)


def save_attention(run, backbone, image_size):
    """attention.png: some images, and what each head of the last block attends to in them."""
    from common import denormalize, eval_view

    views = eval_view(*run.sample(), image_size)
    maps = backbone.class_attention(views)
    maps = maps / maps.amax((2, 3), keepdim=True)
    heads = [maps[:, [head] * 3] for head in range(maps.shape[1])]  # three equal channels: gray
    run.save_picture("attention.png", denormalize(views), *heads)


def train(args):
    """Algorithm 1 of the paper, with its local views, once per step."""
    from common import Run, all_sum, make_backbone, world_size

    run = Run("dino", args)
    backbone = run.init(ViT(args.image_size, args.patch_size, *VITS[args.arch], args.drop_path)
                        if args.arch in VITS else make_backbone(args.arch, args.image_size))
    model = DINO(backbone, backbone.feature_dim, args.out_dim, args.hidden_dim,
                 head_bn=args.head_bn)
    optimizer = make_optimizer(args.optimizer, model, args.weight_decay)
    augment1, augment2, augment_local = make_augments(
        args.image_size, args.local_size, args.crop_scale, args.local_crop_scale, args.blur,
        args.solarize2)
    network = run.start(model, optimizer, model.teacher["backbone"])
    run.save_views(augment1, augment2, *[augment_local] * args.local_views)
    chance = math.log(args.out_dim)

    for step, images, aspect in run.steps():
        epoch = step / run.steps_per_epoch
        lr = cosine(step, run.total_steps, run.warmup_steps, run.peak_lr, end=1e-6)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["weight_decay"] = cosine(
            step, run.total_steps, 0, args.weight_decay, args.weight_decay_end)
        ema_momentum = cosine(step, run.total_steps, 0, args.ema_momentum, 1.0)
        temperature = linear(epoch, args.temperature_warmup_epochs,
                             args.teacher_temperature_start, args.teacher_temperature)
        global_views = [augment1(images, aspect), augment2(images, aspect)]
        local_views = [augment_local(images, aspect) for _ in range(args.local_views)]
        with run.autocast():
            student, teacher = network(global_views, local_views)
        student, teacher = student.float(), teacher.float()
        loss = dino_loss(student, teacher, model.center, args.student_temperature, temperature)
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(model.student.parameters(), args.clip_norm)
        if epoch < args.freeze_epochs:
            model.student["head"].last_layer.weight.grad = None  # so the optimizer passes it over
        optimizer.step()
        ema_update(model.teacher, model.student, ema_momentum)
        if run.prints(step):
            entropy = teacher_entropy(teacher, model.center, temperature)
            run.log(step, loss, lr, chance, entropy=entropy, kl=loss - entropy)
        batch_mean = all_sum(teacher.mean((0, 1))) / world_size()
        update_center(model.center, batch_mean, args.center_momentum)
    if args.arch in VITS:
        save_attention(run, model.teacher["backbone"], args.image_size)
    run.finish()


VITS = {"vit_micro": (128, 4, 2), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6),
        "vit_base": (768, 12, 12)}  # dim, depth, num_heads; micro is ours, for a CPU

# Sources: imagenet: section 3.2 of the paper, at the batch of facebookresearch/dino (paper: 1024),
# whose default, and 100-epoch figures, have teacher temperature 0.04 throughout. cifar: K and the
# head's BN of lightly's CIFAR-10 benchmark, the rest the paper's for ViTs, on a ResNet-18; not run
# yet. demo: no local views, few classes, sharper distributions, a teacher and a center that follow
# within steps: the best of the settings tried on the built-in set, and still a weak one.
RECIPES = {
    "recipe":                    ("demo",      "cifar",     "imagenet"),
    "arch":                      ("resnet8",   "resnet18",  "vit_small"),
    "patch_size":                (4,           4,           16),
    "image_size":                (32,          32,          224),
    "epochs":                    (5,           200,         100),
    "warmup_epochs":             (0.5,         10,          10),
    "batch_size":                (64,          256,         512),
    "optimizer":                 ("adamw",     "adamw",     "adamw"),
    "lr":                        (8e-3,        5e-4,        5e-4),
    "weight_decay":              (0.04,        0.04,        0.04),
    "weight_decay_end":          (0.04,        0.4,         0.4),
    "drop_path":                 (0.0,         0.0,         0.1),
    "local_views":               (0,           8,           8),
    "local_size":                (16,          16,          96),
    "crop_scale":                (0.35,        0.4,         0.4),
    "local_crop_scale":          (0.15,        0.05,        0.05),
    "blur":                      (0.0,         0.0,         1.0),
    "solarize2":                 (0.0,         0.2,         0.2),
    "out_dim":                   (256,         2048,        65536),
    "hidden_dim":                (512,         2048,        2048),
    "head_bn":                   (True,        True,        False),
    "student_temperature":       (0.06,        0.1,         0.1),
    "teacher_temperature":       (0.012,       0.07,        0.07),
    "teacher_temperature_start": (0.012,       0.04,        0.04),
    "temperature_warmup_epochs": (0,           30,          30),
    "ema_momentum":              (0.5,         0.996,       0.996),
    "center_momentum":           (0.0,         0.9,         0.9),
    "clip_norm":                 (3.0,         3.0,         3.0),
    "freeze_epochs":             (0,           1,           1),
}


def parse_args(argv=None):
    from common import ArgumentParser, architecture, number

    def arch(text):
        return text if text in VITS else architecture(text)

    parser = ArgumentParser(__doc__, RECIPES, arch, f"; {', '.join(VITS)}")
    add = parser.add_argument
    add("--patch-size", type=number(int, 1), help="ViT: side of a patch in pixels (paper: 16 or 8)")
    add("--optimizer", choices=("adamw", "sgd"), help="the paper: AdamW for ViT, SGD for ResNet")
    add("--weight-decay-end", type=number(float, 0), help="decay at the end, cosine (paper: 0.4)")
    add("--drop-path", type=number(float, 0, 0.9), help="stochastic depth of the student (0.1)")
    add("--local-views", type=number(int, 0), help="small crops of each image (paper: 8)")
    add("--local-size", type=number(int, 8), help="side of a local view in pixels (paper: 96)")
    add("--crop-scale", type=number(float, 0, 1, above=True), help="area of the smallest global "
        "and the largest local crop, as a fraction of the image (paper: 0.4)")
    add("--local-crop-scale", type=number(float, 0, 1, above=True),
        help="area of the smallest local crop (paper: 0.05)")
    add("--blur", type=number(float, 0, 1), help="share of the paper's fractions of blurred views: "
        "all first global, a tenth of the second, half of the local ones")
    add("--solarize2", type=number(float, 0, 1), help="fraction of global views 2 solarised (0.2)")
    add("--out-dim", type=number(int, 2), help="classes, K (paper: 65536)")
    add("--hidden-dim", type=number(int, 1), help="width of the head (paper: 2048)")
    add("--head-bn", action=argparse.BooleanOptionalAction, help="BN in the head (paper: none)")
    add("--student-temperature", type=number(float, 0, above=True), help="paper: 0.1")
    add("--teacher-temperature", type=number(float, 0, above=True), help="paper: 0.07")
    add("--teacher-temperature-start", type=number(float, 0, above=True), help="paper: 0.04")
    add("--temperature-warmup-epochs", type=number(float, 0),
        help="epochs from --teacher-temperature-start to --teacher-temperature (paper: 30)")
    add("--ema-momentum", type=number(float, 0, 1), help="weight of the old teacher at the start; "
        "1 at the end (paper: 0.996; its authors advise 0.9995 for batches of 256)")
    add("--center-momentum", type=number(float, 0, 1), help="weight of the old center (paper: 0.9)")
    add("--clip-norm", type=number(float, 0, above=True), help="largest gradient per parameter (3)")
    add("--freeze-epochs", type=number(float, 0), help="epochs with a frozen last layer (paper: 1)")
    args = parser.parse_args(argv)
    if args.arch in VITS and any(s % args.patch_size for s in (args.image_size, args.local_size)):
        parser.error(f"--patch-size {args.patch_size} must divide --image-size and --local-size")
    if args.local_crop_scale > args.crop_scale:
        parser.error(f"--local-crop-scale {args.local_crop_scale} is above --crop-scale")
    return args


if __name__ == "__main__":
    from common import main

    main(train, parse_args)
