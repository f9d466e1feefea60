"""MAE: remove three quarters of an image's patches, and let an autoencoder fill them in.

He et al., "Masked Autoencoders Are Scalable Vision Learners" (2021, arXiv 2111.06377). --objective
simmim: Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling" (2021, arXiv 2111.09886).
Survey family: generative, masked image modelling. What prevents collapse: the target is the image.

The encoder, a ViT, gets a random quarter of an image's patches and nothing of the others, which
also makes it cheap. A small decoder gets the encoder's tokens, each in its place, with one learned
mask token in all the empty places, and predicts the pixels of the removed patches. So few are left
that it is not enough to continue lines and textures: one has to recognise what the image shows.

                  ┌─ a quarter ── encoder ── tokens ─┐
        patches ──┤               └─ what is kept    ├─ decoder ─ prediction ─┐
                  │       mask token in empty places ┘                        ├─ squared error
                  └─ the removed ones, each normalised ───────────────────────┘

Run      python mae.py                          demonstration: drawn images, CPU, minutes
         python mae.py --data path              a folder of images, or cifar10
         torchrun --nproc-per-node=8 mae.py --data path
Reuse    from mae import MAE, ViT, mae_loss, cosine             (needs torch only)
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


def positions(dim, grid):
    """Sines and cosines of the places of grid² patches, row by row, after zeros for the class
    token: (1, 1 + grid², dim).

    A quarter of the dimensions each: sin xω, cos xω, sin yω, cos yω, ω from 1 to almost 1 / 10000.
    x, the column, comes first, as in MAE's official code; in MoCo v3's, by torch.meshgrid, the row.
    """
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    code = torch.cat([angle.sin(), angle.cos()], 1)
    places = torch.cat([code.repeat(grid, 1), code.repeat_interleave(grid, 0)], 1)
    return F.pad(places, (0, 0, 1, 0))[None].float()


def init_weights(module):
    """For Module.apply: weights Xavier-uniform, biases 0, as in the official code."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al., 2020) without a classifier; parameters as in timm.

    forward: (B, 3, S, S) -> (B, C), the class token after the last LayerNorm, which the paper's
    linear probe uses; C is feature_dim. image_size, S, and patch_size: pixels.
    """

    def __init__(self, image_size, patch_size, dim, depth, num_heads):
        super().__init__()
        self.feature_dim, self.patch_size = dim, patch_size
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.register_buffer("pos_embed", positions(dim, image_size // patch_size))
        self.blocks = nn.Sequential(*[Block(dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # as a matrix

    def embed(self, images):
        """(B, 3, S, S) -> tokens of all patches, with their positions added: (B, N, C)."""
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def encode(self, tokens):
        """Any n of the tokens, (B, n, C) -> the class token's output and theirs, (B, 1 + n, C)."""
        cls_token = self.cls_token + self.pos_embed[:, :1]
        tokens = torch.cat([cls_token.expand(len(tokens), -1, -1), tokens], 1)
        return self.norm(self.blocks(tokens))

    def forward(self, images):
        return self.encode(self.embed(images))[:, 0]


def random_masking(tokens, mask_ratio, noise=None):
    """Remove a random part of each image's tokens, (B, N, C) -> kept (B, n, C); mask (B, N), 1 =
    removed; restore (B, N), the index of each token in [kept, removed]. noise (B, N), uniform:
    the tokens with the n smallest values are kept."""
    noise = torch.rand(tokens.shape[:2], device=tokens.device) if noise is None else noise
    order = noise.argsort(1)
    restore = order.argsort(1)
    keep = order[:, : round(noise.shape[1] * (1 - mask_ratio))]
    mask = (restore >= keep.shape[1]).to(noise.dtype)
    return tokens.take_along_dim(keep[:, :, None], 1), mask, restore


class MAE(nn.Module):
    """A ViT as the encoder, and a small decoder whose parameters have the official names.

    forward: (B, 3, S, S), noise (B, N) -> prediction (B, N, p·p·3), mask (B, N), 1 = removed.
    An official checkpoint loads after "backbone." is put before the names of the encoder.
    """

    def __init__(self, backbone, mask_ratio=0.75, decoder_dim=512, decoder_depth=8, num_heads=16):
        super().__init__()
        self.backbone, self.mask_ratio = backbone, mask_ratio
        grid = math.isqrt(backbone.pos_embed.shape[1] - 1)
        self.decoder_embed = nn.Linear(backbone.feature_dim, decoder_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_dim))
        self.register_buffer("decoder_pos_embed", positions(decoder_dim, grid))
        self.decoder_blocks = nn.Sequential(*[Block(decoder_dim, num_heads)
                                              for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * backbone.patch_size**2)
        for module in self.decoder_embed, self.decoder_blocks, self.decoder_pred:
            module.apply(init_weights)

    def forward(self, images, noise=None):
        kept, mask, restore = random_masking(self.backbone.embed(images), self.mask_ratio, noise)
        tokens = self.decoder_embed(self.backbone.encode(kept))
        cls_token, kept = tokens[:, :1], tokens[:, 1:]
        removed = self.mask_token.expand(len(kept), mask.shape[1] - kept.shape[1], -1)
        tokens = torch.cat([kept, removed], 1).take_along_dim(restore[:, :, None], 1)
        tokens = torch.cat([cls_token, tokens], 1) + self.decoder_pos_embed
        tokens = self.decoder_norm(self.decoder_blocks(tokens))
        return self.decoder_pred(tokens[:, 1:]), mask


class SimMIM(nn.Module):
    """The encoder gets tokens for all places, the mask token for removed patches, and one linear
    layer predicts the pixels. forward: as MAE's."""

    def __init__(self, backbone, mask_ratio=0.6):
        super().__init__()
        self.backbone, self.mask_ratio = backbone, mask_ratio
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, backbone.feature_dim))
        self.decoder = nn.Linear(backbone.feature_dim, 3 * backbone.patch_size**2)
        self.decoder.apply(init_weights)

    def forward(self, images, noise=None):
        tokens = self.backbone.embed(images)
        _, mask, _ = random_masking(tokens, self.mask_ratio, noise)
        empty = self.mask_token + self.backbone.pos_embed[:, 1:]
        tokens = torch.where(mask[:, :, None] == 1, empty, tokens)
        return self.decoder(self.backbone.encode(tokens)[:, 1:]), mask


# ----------------------------------------------------------------------------------------- loss


def patchify(images, patch_size):
    """(B, 3, H, W) -> patches (B, N, p·p·3), row by row, as are a patch's pixels; colours last."""
    B, _, H, W = images.shape
    p = patch_size
    patches = images.reshape(B, 3, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(B, -1, p * p * 3)


def unpatchify(patches, patch_size):
    """The inverse, for square images: (B, N, p·p·3) -> (B, 3, S, S)."""
    p, grid = patch_size, math.isqrt(patches.shape[1])
    images = patches.reshape(-1, grid, grid, p, p, 3).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(-1, 3, grid * p, grid * p)


def patch_statistics(patches):
    """-> mean and deviation of each patch, (B, N, 1). Unbiased, as in the official code."""
    variance, mean = torch.var_mean(patches, 2, correction=1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def mae_loss(prediction, images, mask, patch_size, norm_pix=True):
    """Mean squared error on removed patches: (B, N, p·p·3), (B, 3, S, S), (B, N) -> scalar.

        L = Σ_i mask_i · mean_j (prediction_ij - target_ij)² / Σ_i mask_i

    over the patches i of all images and the values j of each; mask: 1 = removed. The target is the
    patch's pixels x, or with norm_pix (better in the paper) (x - mean x) / √(var x + 1e-6).
    """
    target = patchify(images, patch_size)
    if norm_pix:
        mean, deviation = patch_statistics(target)
        target = (target - mean) / deviation
    error = (prediction - target).square().mean(2)
    return (error * mask).sum() / mask.sum()


def simmim_loss(prediction, images, mask, patch_size):
    """As mae_loss, but the mean absolute error, and of pixels that are not normalised by patch."""
    error = (prediction - patchify(images, patch_size)).abs().mean(2)
    return (error * mask).sum() / mask.sum()


def reconstruct(prediction, images, mask, patch_size, norm_pix=True):
    """-> the images with their removed patches gray (0), and with these as predicted: (B, 3, S, S)
    each. With norm_pix, a patch's mean and deviation, which are not predicted, are the image's."""
    patches, removed = patchify(images, patch_size), mask[:, :, None]
    if norm_pix:
        mean, deviation = patch_statistics(patches)
        prediction = prediction * deviation + mean
    visible = patches * (1 - removed)
    return [unpatchify(x, patch_size) for x in (visible, visible + prediction * removed)]


# --------------------------------------------------------------------------------- augmentation


def augment(images, aspect, image_size, crop_scale):
    """The paper's augmentation, which leaves colours, as they are to be predicted: uint8 images
    (B, 3, S, S), squeezed to squares from width / height = aspect (B,) -> views (B, 3, image_size,
    image_size)."""
    from common import normalize, random_horizontal_flip, random_resized_crop

    x = random_resized_crop(images, aspect, image_size, scale=(crop_scale, 1.0),
                            interpolation="bicubic" if image_size > 64 else "bilinear")
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
    """Biases and LayerNorm are not decayed; class and mask tokens are, as in the official code."""
    weights = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    others = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=weight_decay)


@torch.no_grad()
def save_reconstruction(args, model, images, device):
    """reconstruction.png: some images with patches removed, reconstructed, and as they are."""
    from common import centre_view, denormalize, examples, rank, save_picture

    if rank() == 0:
        view = centre_view(*examples(images, device), args.image_size)
        prediction, mask = model.eval()(view)
        norm_pix = args.norm_pix and args.objective == "mae"
        pictures = *reconstruct(prediction, view, mask, args.patch_size, norm_pix), view
        save_picture(f"{args.out}/reconstruction.png", *map(denormalize, pictures))


def train(args):
    """One view per image and step. Health: the loss is below `variance`, that of predicting 0."""
    from common import (batch_that_fits, batches, load_checkpoint, load_data, log, parallel,
                        save_checkpoint, save_views, start, uniform, write_log)
    from linear_probe import evaluate, load_init

    device = start(args.device, args.seed, args.deterministic)
    train_set, test_set = load_data(args.data, args.image_size, args.max_images, args.workers,
                                    device)
    args.batch_size = batch_that_fits(args, train_set)  # over all processes
    steps_per_epoch = len(train_set) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    peak_lr = args.lr * args.batch_size / 256

    backbone = ViT(args.image_size, args.patch_size, *VITS[args.arch])
    untrained = copy.deepcopy(backbone)  # the report's baseline
    load_init(backbone, args.init)
    if args.objective == "mae":
        decoder = args.decoder_dim, args.decoder_depth, args.decoder_dim // 32
        model = MAE(backbone, args.mask_ratio, *decoder)
        loss_function = partial(mae_loss, patch_size=args.patch_size, norm_pix=args.norm_pix)
    else:
        model = SimMIM(backbone, args.mask_ratio)
        loss_function = partial(simmim_loss, patch_size=args.patch_size)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args.weight_decay)
    view = partial(augment, image_size=args.image_size, crop_scale=args.crop_scale)
    step = load_checkpoint(args, train_set, model, optimizer)  # 0, or where the run goes on
    network = parallel(model, args.compile)  # DistributedDataParallel and SyncBN, if of several
    save_views(args, train_set, device, view)
    saved_at = save_checkpoint(args, step, train_set, model, optimizer, backbone)
    started = step, time.monotonic()  # for the speed and the time left
    patches = (args.image_size // args.patch_size) ** 2

    for step, images, aspect in batches(train_set, args, step, device):  # seeded by step
        lr = cosine(step, total_steps, warmup_steps, peak_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        views = view(images, aspect)
        noise = uniform(len(views), patches, device=device)  # decides which patches are removed
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            prediction, mask = network(views, noise)
        loss = loss_function(prediction.float(), views, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        done, epoch_ends = step + 1, (step + 1) % steps_per_epoch == 0
        if done == 1 or done % args.print_freq == 0 or epoch_ends:
            log(args, done, total_steps, started, lr, loss,
                variance=loss_function(0 * prediction, views, mask))
        if epoch_ends or time.monotonic() - saved_at > 600:
            saved_at = save_checkpoint(args, done, train_set, model, optimizer, backbone)
    save_reconstruction(args, model, train_set, device)
    report = evaluate(backbone, untrained, train_set, test_set, args.image_size, device,
                      layers=True)
    write_log(args, {"step": total_steps, "report": report})


# dim, depth, num_heads; vit_micro is our own, for a CPU
VITS = {"vit_micro": (128, 4, 2), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6),
        "vit_base": (768, 12, 12), "vit_large": (1024, 24, 16), "vit_huge": (1280, 32, 16)}

RECIPES = {
    "recipe":        ("demo",       "cpu",        "cifar",     "imagenet"),
    "arch":          ("vit_micro",  "vit_micro",  "vit_tiny",  "vit_base"),
    "patch_size":    (4,            4,            4,           16),
    "image_size":    (32,           32,           32,          224),
    "epochs":        (8,            20,           800,         800),
    "warmup_epochs": (1,            1,            40,          40),
    "batch_size":    (32,           64,           512,         1024),
    "lr":            (6e-3,         3e-3,         3e-4,        1.5e-4),
    "weight_decay":  (0.05,         0.05,         0.05,        0.05),
    "objective":     ("mae",        "mae",        "mae",       "mae"),
    "mask_ratio":    (0.75,         0.75,         0.75,        0.75),
    "norm_pix":      (True,         True,         True,        True),
    "decoder_dim":   (64,           64,           192,         512),
    "decoder_depth": (1,            1,            4,           8),
    "crop_scale":    (0.35,         0.2,          0.2,         0.2),
}
FLAGS = {  # type, lowest, highest, help, the paper's value
    "arch": (tuple(VITS), None, None, "the encoder", "vit_base to vit_huge"),
    "patch_size": (int, 1, 10**3, "side of a patch, in pixels", "16, vit_huge 14"),
    "objective": (("mae", "simmim"), None, None, "simmim: the encoder gets mask tokens, too"),
    "mask_ratio": (float, 0, 1, "fraction of patches removed", "0.75, of SimMIM 0.6"),
    "norm_pix": (bool, None, None, "predict pixels that are normalised in each patch", "yes"),
    "decoder_dim": (int, 32, 10**4, "width of the decoder, 32 per head", "512"),
    "decoder_depth": (int, 0, 10**3, "blocks of the decoder", "8"),
    "crop_scale": (float, 1e-3, 1, "smallest crop, as a fraction of the image's area", "0.2"),
}


def parse_args(argv=None):
    from common import parse_flags, wrong_arguments

    args = parse_flags("mae", __doc__, RECIPES, FLAGS, argv)
    if args.image_size % args.patch_size or args.decoder_dim % 32:
        wrong_arguments("--patch-size must divide --image-size, and 32 must divide --decoder-dim")
    patches = (args.image_size // args.patch_size) ** 2
    if not 0 < round(patches * (1 - args.mask_ratio)) < patches:
        wrong_arguments(f"--mask-ratio {args.mask_ratio} removes none or all of {patches} patches")
    return args


# Sources. imagenet: the paper and facebookresearch/mae (batch there 4096). cifar: widths and depths
# of IcarusWizard/MAE (there patches of 2 pixels, 3 heads in the decoder, learned positions); the
# rest is ours and not measured. demo: measured on the drawn images. cpu: not tuned.
#
# Departures from the paper: crops of small images are bilinear (official: bicubic everywhere).
# SimMIM removes single patches (paper: squares of 32 pixels), in this ViT (paper: relative
# positions), with MAE's crops and mask ratio (official: --crop-scale 0.67 --mask-ratio 0.6).

if __name__ == "__main__":
    from common import main

    main(train, parse_args)
