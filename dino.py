"""DINO: a student predicts what its own moving average, the teacher, makes of other views.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021, arXiv 2104.14294).
Survey family: self-distillation with an EMA teacher, on a vision transformer. What prevents
collapse: two opposed changes of the teacher's output. Centering, which subtracts its running mean,
keeps it from always choosing one class; sharpening, a low temperature, from choosing all alike.

Each image is cropped into two large views (global) and several small ones (local). Student and
teacher turn a view into probabilities of K classes, whose meaning is not given but found in
training. The student sees all views and learns to predict, from each, what the teacher, which sees
the global ones only, makes of another view: so it has to recognise the whole from its parts.

                  ┌─ global views ─ teacher ─ logits - center ─ softmax(/ τ_t), no gradient ─┐
        image ────┤                    ↑ EMA                                                 ├─ loss
                  └─ all views ──── student ─ logits ─ log softmax(/ τ_s) ───────────────────┘
        what is kept: the teacher's backbone; a ViT's features are the class token

Run      python dino.py                         demonstration: drawn images, CPU, minutes
         python dino.py --data path             a folder of images, or cifar10
         torchrun --nproc-per-node=8 dino.py --data path
Reuse    from dino import DINO, ViT, dino_loss, cosine          (needs torch only)
"""

import copy
import math
import time
from collections import OrderedDict
from functools import partial

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

    drop_path: in training, each branch is left out for this fraction of the images, and scaled up
    for the others (stochastic depth).
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
    """Vision transformer (Dosovitskiy et al., 2020) without a classifier; parameters as in timm.

    forward: (B, 3, H, W) -> (B, C), the class token after the last LayerNorm; C is feature_dim.
    image_size and patch_size: pixels. Position embeddings are interpolated for other sizes.
    drop_path: of the last block; it rises linearly from 0 in the first.
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
        """-> the position embeddings of height · width patches: (1, 1 + height · width, C)."""
        if height == width == self.grid_size:
            return self.pos_embed
        grid = self.pos_embed[0, 1:].unflatten(0, (self.grid_size, self.grid_size))
        # Bicubic, as two weighted sums: a 2-D F.interpolate has no deterministic gradient on CUDA.
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
        """How much the class token attends to each patch in the last block, for each head:
        (B, 3, H, W) -> (B, heads, H / patch_size, W / patch_size)."""
        last = self.blocks[-1]
        query, key, _ = last.attn.heads(last.norm1(self.blocks[:-1](self.embed(images))))
        scores = query[:, :, :1] @ key.transpose(2, 3) / query.shape[3] ** 0.5
        return scores.softmax(3)[:, :, 0, 1:].unflatten(2, (images.shape[2] // self.patch_size, -1))


def init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class Head(nn.Module):
    """Three layers to a bottleneck of unit length, then one to K classes whose weights have unit
    length too, so that logits are cosines: (B, C) -> (B, K). bn: BN after the hidden layers."""

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
    """Student and teacher, each a backbone and a head, and the center of the teacher's logits.

    backbone: (B, 3, H, W) -> (B, feature_dim), for global and local views. The teacher starts as a
    copy of the student, without stochastic depth, and has no gradient.
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
        """Lists of 2 and of V - 2 views (B, 3, H, W) -> logits of the student (V, B, K) and of the
        teacher (2, B, K). Views of one kind share a pass, and so BN statistics."""
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

    Chance level: ln K.
    """
    p = torch.softmax((teacher - center) / teacher_temperature, 2).detach()  # stop-gradient
    log_p = torch.log_softmax(student / student_temperature, 2)
    others = log_p.sum(0) - log_p[:2]  # for each global view the sum over all other views
    return -(p * others).sum(2).mean() / (len(student) - 1)


@torch.no_grad()
def teacher_entropy(teacher, center, teacher_temperature):
    """Health: mean entropy of the teacher's distributions, in nats: (2, B, K) -> scalar. It should
    stay well above 0 (one class dominates: centering too weak) and below ln K (all classes alike:
    sharpening too weak). The loss minus it is the log line's kl, the divergence of the student from
    the teacher, which should not vanish: it is 0 in either collapse (figure 7)."""
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


def augment(images, aspect, size, crop_scale, jitter_strength, blur, solarize=0.0):
    """BYOL's augmentation, for all views: uint8 images (B, 3, S, S), squeezed to squares from
    width / height = aspect (B,) -> views (B, 3, size, size). crop_scale: smallest and largest crop,
    as fractions of the image's area. blur and solarize: fractions of the views."""
    from common import (color_jitter, gaussian_blur, normalize, random_grayscale,
                        random_horizontal_flip, random_resized_crop, random_solarize)

    s = jitter_strength
    x = random_resized_crop(images, aspect, size, scale=crop_scale, interpolation="bicubic")
    x = random_horizontal_flip(x, p=0.5)
    x = color_jitter(x, 0.4 * s, 0.4 * s, 0.2 * s, 0.1 * s, p=0.8)
    x = random_grayscale(x, p=0.2)
    x = gaussian_blur(x, p=blur, kernel_size=13, sigma=(0.1, 2.0))  # 13: 3 σ of the largest
    x = random_solarize(x, p=solarize)
    return normalize(x)


# ------------------------------------------------------------------------------------- training


def cosine(step, total_steps, warmup_steps, peak, end=0.0):
    """Rises linearly to `peak` over the warm-up, then moves to `end` on half a cosine."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    t = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end + (peak - end) * (1 + math.cos(math.pi * t)) / 2


def linear(epoch, warmup_epochs, start, end):
    """From `start` to `end` over the warm-up, then `end`."""
    return end if epoch >= warmup_epochs else start + (end - start) * epoch / warmup_epochs


@torch.no_grad()
def clip_gradients(parameters, max_norm):
    """Scales each parameter's gradient by itself to a norm of at most max_norm. (By contrast,
    torch.nn.utils.clip_grad_norm_ scales all of them by the norm that they have together.)"""
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


def save_attention(args, backbone, images, device):
    """attention.png, of a ViT: some images, and what each head of the last block attends to."""
    from common import centre_view, denormalize, examples, rank, save_picture

    if args.arch in VITS and rank() == 0:
        views = centre_view(*examples(images, device), args.image_size)
        maps = backbone.eval().class_attention(views)
        maps = maps / maps.amax((2, 3), keepdim=True)
        heads = [maps[:, [head] * 3] for head in range(maps.shape[1])]  # three channels: gray
        save_picture(f"{args.out}/attention.png", denormalize(views), *heads)


def train(args):
    """Algorithm 1 of the paper, with its local views, once per step."""
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

    backbone = (ViT(args.image_size, args.patch_size, *VITS[args.arch], args.drop_path)
                if args.arch in VITS else make_backbone(args.arch, args.image_size))
    untrained = copy.deepcopy(backbone)  # the report's baseline
    load_init(backbone, args.init)
    model = DINO(backbone, backbone.feature_dim, args.out_dim, args.hidden_dim,
                 head_bn=args.head_bn)
    backbone = model.teacher["backbone"]  # what is kept
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(args.optimizer, model, args.weight_decay)
    view = partial(augment, jitter_strength=args.jitter_strength)
    whole = partial(view, size=args.image_size, crop_scale=(args.crop_scale, 1.0))
    view1 = partial(whole, blur=args.blur)
    view2 = partial(whole, blur=0.1 * args.blur, solarize=args.solarize2)
    local_view = partial(view, size=args.local_size, blur=0.5 * args.blur,
                         crop_scale=(args.local_crop_scale, args.crop_scale))
    step = load_checkpoint(args, train_set, model, optimizer)  # 0, or where the run goes on
    network = parallel(model, args.compile)  # DistributedDataParallel and SyncBN, if of several
    save_views(args, train_set, device, view1, view2, *[local_view] * args.local_views)
    saved_at = save_checkpoint(args, step, train_set, model, optimizer, backbone)
    started = step, time.monotonic()  # for the speed and the time left

    for step, images, aspect in batches(train_set, args, step, device):  # seeded by step
        lr = cosine(step, total_steps, warmup_steps, peak_lr, end=1e-6)
        for group in optimizer.param_groups:
            group["lr"] = lr
        decay = cosine(step, total_steps, 0, args.weight_decay, args.weight_decay_end)
        optimizer.param_groups[0]["weight_decay"] = decay
        ema_momentum = cosine(step, total_steps, 0, args.ema_momentum, 1.0)
        temperature = linear(step / steps_per_epoch, args.temperature_warmup_epochs,
                             args.teacher_temperature_start, args.teacher_temperature)
        global_views = [view1(images, aspect), view2(images, aspect)]
        local_views = [local_view(images, aspect) for _ in range(args.local_views)]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            student, teacher = (logits.float() for logits in network(global_views, local_views))
        loss = dino_loss(student, teacher, model.center, args.student_temperature, temperature)
        entropy = teacher_entropy(teacher, model.center, temperature)
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(model.student.parameters(), args.clip_norm)
        if step < args.freeze_epochs * steps_per_epoch:
            model.student["head"].last_layer.weight.grad = None  # at 0, decay would go on
        optimizer.step()
        ema_update(model.teacher, model.student, ema_momentum)
        batch_mean = gather(teacher.mean((0, 1))[None]).mean(0)  # of all processes
        update_center(model.center, batch_mean, args.center_momentum)

        done, epoch_ends = step + 1, (step + 1) % steps_per_epoch == 0
        if done == 1 or done % args.print_freq == 0 or epoch_ends:
            log(args, done, total_steps, started, lr, loss, chance=math.log(args.out_dim),
                entropy=entropy, kl=loss - entropy)
        if epoch_ends or time.monotonic() - saved_at > 600:
            saved_at = save_checkpoint(args, done, train_set, model, optimizer, backbone)
    save_attention(args, backbone, train_set, device)
    report = evaluate(backbone, untrained, train_set, test_set, args.image_size, device)
    write_log(args, {"step": total_steps, "report": report})


# dim, depth, num_heads; vit_micro is our own, for a CPU
VITS = {"vit_micro": (128, 4, 2), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6),
        "vit_base": (768, 12, 12)}

RECIPES = {
    "recipe":                    ("demo",         "cpu",      "cifar",     "imagenet"),
    "arch":                      ("resnet8x0.5",  "resnet8",  "resnet18",  "vit_small"),
    "patch_size":                (4,              4,          4,           16),
    "image_size":                (32,             32,         32,          224),
    "epochs":                    (8,              20,         200,         100),
    "warmup_epochs":             (1,              1,          10,          10),
    "batch_size":                (32,             64,         256,         512),
    "optimizer":                 ("adamw",        "adamw",    "adamw",     "adamw"),
    "lr":                        (8e-3,           4e-3,       5e-4,        5e-4),
    "weight_decay":              (0.04,           0.04,       0.04,        0.04),
    "weight_decay_end":          (0.04,           0.04,       0.4,         0.4),
    "drop_path":                 (0.0,            0.0,        0.0,         0.1),
    "local_views":               (2,              2,          8,           8),
    "local_size":                (16,             16,         16,          96),
    "crop_scale":                (0.5,            0.35,       0.4,         0.4),
    "local_crop_scale":          (0.15,           0.15,       0.05,        0.05),
    "jitter_strength":           (2.0,            1.0,        1.0,         1.0),
    "blur":                      (0.0,            0.0,        0.0,         1.0),
    "solarize2":                 (0.0,            0.0,        0.2,         0.2),
    "out_dim":                   (256,            256,        2048,        65536),
    "hidden_dim":                (512,            512,        2048,        2048),
    "head_bn":                   (True,           True,       True,        False),
    "student_temperature":       (0.1,            0.1,        0.1,         0.1),
    "teacher_temperature":       (0.02,           0.04,       0.07,        0.07),
    "teacher_temperature_start": (0.02,           0.04,       0.04,        0.04),
    "temperature_warmup_epochs": (0,              0,          30,          30),
    "ema_momentum":              (0.98,           0.99,       0.996,       0.996),
    "center_momentum":           (0.9,            0.9,        0.9,         0.9),
    "clip_norm":                 (3.0,            3.0,        3.0,         3.0),
    "freeze_epochs":             (0,              0,          1,           1),
}
FLAGS = {  # type, lowest, highest, help, the paper's value
    "patch_size": (int, 1, 10**3, "side of a ViT's patch, in pixels", "16 or 8"),
    "optimizer": (("adamw", "sgd"), None, None, "optimizer", "adamw, for ResNets sgd"),
    "weight_decay_end": (float, 0, 10**4, "weight decay at the end, reached on a cosine", "0.4"),
    "drop_path": (float, 0, 0.9, "stochastic depth of the student's last block", "0.1"),
    "local_views": (int, 0, 100, "small crops per image", "8"),
    "local_size": (int, 8, 10**4, "side of a local view, in pixels", "96"),
    "crop_scale": (float, 1e-3, 1, "smallest global, largest local crop: fraction of area", "0.4"),
    "local_crop_scale": (float, 1e-3, 1, "smallest local crop: fraction of area", "0.05"),
    "jitter_strength": (float, 0, 2.5, "strength of the colour jitter, s", "1"),
    "blur": (float, 0, 1, "fraction of first global views blurred (second: × 0.1, local: × 0.5)",
             "1"),
    "solarize2": (float, 0, 1, "fraction of second global views that are solarised", "0.2"),
    "out_dim": (int, 2, 10**6, "classes, K", "65536"),
    "hidden_dim": (int, 1, 10**5, "width of the head", "2048"),
    "head_bn": (bool, None, None, "BN in the head", "no"),
    "student_temperature": (float, 1e-3, 100, "softmax temperature of the student, τ_s", "0.1"),
    "teacher_temperature": (float, 1e-3, 100, "of the teacher, τ_t, after its warm-up", "0.07"),
    "teacher_temperature_start": (float, 1e-3, 100, "τ_t at the start", "0.04"),
    "temperature_warmup_epochs": (float, 0, 10**6, "epochs in which τ_t rises", "30"),
    "ema_momentum": (float, 0, 1, "weight of the old teacher at the start; in the end 1",
                     "0.996; its authors advise 0.9995 for batches of 256"),
    "center_momentum": (float, 0, 1, "weight of the old center", "0.9"),
    "clip_norm": (float, 1e-6, 10**6, "largest norm of a parameter's gradient", "3"),
    "freeze_epochs": (float, 0, 10**6, "epochs in which the last layer does not learn", "1"),
}


def parse_args(argv=None):
    from common import architecture, parse_flags, wrong_arguments

    def arch(text):
        return text if text in VITS else architecture(text)

    help = ", ".join(VITS) + ", resnet8 to resnet152, or another network of torchvision"
    flags = FLAGS | {"arch": (arch, None, None, help, "vit_small")}
    args = parse_flags("dino", __doc__, RECIPES, flags, argv)
    if args.arch in VITS and any(s % args.patch_size for s in (args.image_size, args.local_size)):
        wrong_arguments(f"--patch-size {args.patch_size} must divide --image-size and --local-size")
    if args.local_crop_scale > args.crop_scale:
        wrong_arguments(f"--local-crop-scale {args.local_crop_scale} is above --crop-scale")
    return args


# Sources. imagenet: section 3.2 of the paper, at the batch of facebookresearch/dino (paper: 1024).
# By default, and in its results after 100 epochs, that code keeps the teacher at 0.04. Its
# ResNet-50: --arch resnet50 --optimizer sgd --lr 0.03 --weight-decay 1e-4 --weight-decay-end 1e-4
# --crop-scale 0.14 --teacher-temperature 0.04. cifar: the paper's values for ViTs, on a ResNet-18,
# with K and the head's BN of lightly's CIFAR-10 benchmark; never run. demo: measured on the drawn
# images. What counts there is a strong jitter: with the paper's, the classes that the teacher finds
# are tints. Its temperature is lower, as few steps have to sharpen its output, and its network is
# narrow, for more steps in two minutes. cpu: not tuned.
#
# Departures from the paper: none in the loss. From the official code: the teacher's temperature
# rises by the step (official: by the epoch); blur is a true Gaussian (official: PIL's); position
# embeddings are interpolated to exactly the size of the grid (official: a tenth of a patch more);
# bfloat16 without gradient scaling (official: float16). As by its default, the lengths of the last
# layer's weights stay 1; its help advises trained ones for ViT-S. The survey's formula has two
# views, and neither temperatures nor a center.

if __name__ == "__main__":
    from common import main

    main(train, parse_args)
