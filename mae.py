"""MAE: remove three quarters of an image's patches, and let an autoencoder draw them.

He et al., "Masked Autoencoders Are Scalable Vision Learners" (2021, arXiv 2111.06377). --objective
simmim: Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling" (2021, arXiv 2111.09886).
Survey family: generative, masked image modelling. What prevents collapse: the target is the image.

The encoder, a ViT, sees a quarter of an image's patches, drawn anew for each image, and nothing of
the rest, so that a large encoder is cheap. A light decoder gets its tokens, each in its place, and
the same mask token in all empty places, and predicts the removed pixels: with so little left, from
what is in the picture and not by continuing lines. Kept: the ViT, with its class token as features.

                  ┌─ a quarter ── encoder ── tokens ─┐
        patches ──┤                                  ├─ decoder ─ prediction ─┐
                  │       mask token in empty places ┘                        ├─ squared error
                  └─ the removed ones, normalised each ───────────────────────┘

Run      python mae.py                          demonstration: built-in images, CPU, a minute
         python mae.py --data path              a folder of images, or cifar10
         torchrun --nproc-per-node=8 mae.py --data path
Reuse    from mae import MAE, ViT, mae_loss             (needs torch only)

The official checkpoints load: into ViT, and with "backbone." before the encoder's keys into MAE.
Departures from the paper: crops of small images are bilinear (official: bicubic everywhere). SimMIM
removes single patches (paper: squares of 32 pixels), in this ViT (paper: relative positions), on
MAE's crops and with its mask ratio (official: --crop-scale 0.67 --mask-ratio 0.6).

Measured in the demonstration, top-1 in percent (of the network at random):
built-in set, kNN 20.6 (18.4), probe 71.2 (72.6); seeds: 3
10,000 of CIFAR-10, kNN 35.2 (30.0), probe 48.2 (42.6); seeds: 3
"""

import argparse
import math
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
    """For `Module.apply`: matrices Xavier-uniform, biases 0, as in the official code."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al., 2020) without a classifier, under timm's names.

    forward: (B, 3, S, S) -> (B, C), the class token after the last LayerNorm, on which the paper's
    linear probe stands; C is feature_dim. image_size, S, and patch_size: pixels.
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
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # as the matrix it is

    def embed(self, images):
        """(B, 3, S, S) -> tokens of all patches, which know their places: (B, N, C)."""
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def encode(self, tokens):
        """Any n of the tokens, (B, n, C) -> (B, 1 + n, C): the class token is put before them."""
        cls_token = self.cls_token + self.pos_embed[:, :1]
        tokens = torch.cat([cls_token.expand(len(tokens), -1, -1), tokens], 1)
        return self.norm(self.blocks(tokens))

    def forward(self, images):
        return self.encode(self.embed(images))[:, 0]


def random_masking(tokens, mask_ratio, noise=None):
    """Remove a part of the tokens, other ones in each image: (B, N, C) -> kept (B, n, C); mask
    (B, N), 1 = removed; restore (B, N), the place of each token in [kept, removed]. Of the noise
    (B, N), an image's n smallest are kept."""
    noise = torch.rand(tokens.shape[:2], device=tokens.device) if noise is None else noise
    order = noise.argsort(1)
    restore = order.argsort(1)
    keep = order[:, : round(noise.shape[1] * (1 - mask_ratio))]
    mask = (restore >= keep.shape[1]).to(noise.dtype)
    return tokens.take_along_dim(keep[:, :, None], 1), mask, restore


class MAE(nn.Module):
    """A ViT as the encoder, and a light decoder under the official names.

    forward: (B, 3, S, S), noise (B, N) -> prediction (B, N, p·p·3), mask (B, N), 1 = removed.
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
    """The encoder gets all places, with a mask token in those of the removed patches, and one
    linear layer predicts: arguments and results are those of `MAE`."""

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
    """(B, 3, H, W) -> patches (B, N, p·p·3), row by row; so are a patch's pixels, colours last."""
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

    over patches i of all images and values j; mask: 1 = removed. The target is the patch's pixels,
    x, or with norm_pix, the paper's best, (x - mean x) / √(var x + 1e-6).
    """
    target = patchify(images, patch_size)
    if norm_pix:
        mean, deviation = patch_statistics(target)
        target = (target - mean) / deviation
    error = (prediction - target).square().mean(2)
    return (error * mask).sum() / mask.sum()


def simmim_loss(prediction, images, mask, patch_size):
    """Mean absolute error on the pixels, not normalised, of removed patches: else as `mae_loss`."""
    error = (prediction - patchify(images, patch_size)).abs().mean(2)
    return (error * mask).sum() / mask.sum()


@torch.no_grad()
def reconstruct(prediction, images, mask, patch_size, norm_pix=True):
    """-> the images with their removed patches 0, which is the mean gray, and with these as they
    are predicted: (B, 3, S, S) each. With norm_pix, mean and deviation, which the network is not
    asked for, are those of the true patches: a blurred image comes for free."""
    patches, removed = patchify(images, patch_size), mask[:, :, None]
    if norm_pix:
        mean, deviation = patch_statistics(patches)
        prediction = prediction * deviation + mean
    visible = patches * (1 - removed)
    return [unpatchify(x, patch_size) for x in (visible, visible + prediction * removed)]


# --------------------------------------------------------------------------------- augmentation


def make_augment(image_size, crop_scale):
    """The paper's augmentation: crop and flip; colours are what is predicted."""
    from common import Augment, Normalize, RandomHorizontalFlip, RandomResizedCrop

    return Augment([
        RandomResizedCrop(image_size, scale=(crop_scale, 1.0),
                          interpolation="bicubic" if image_size > 64 else "bilinear"),
        RandomHorizontalFlip(0.5),
        Normalize(),
    ])


# ------------------------------------------------------------------------------------- training


def cosine(step, total_steps, warmup_steps, start, end=0.0):
    """Rises linearly to `start` over the warm-up, then falls to `end` on half a cosine."""
    if step < warmup_steps:
        return start * (step + 1) / warmup_steps
    t = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


def make_optimizer(model, weight_decay):
    """Biases and LayerNorm are not decayed; class and mask tokens are, as in the official code."""
    weights = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    others = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=weight_decay)


def save_reconstruction(run, model, norm_pix):
    """reconstruction.png: some images with patches removed, reconstructed, and as they are."""
    from common import denormalize, eval_view

    view, patch_size = eval_view(*run.sample(), run.args.image_size), model.backbone.patch_size
    noise = torch.rand(patchify(view, patch_size).shape[:2],
                       generator=torch.Generator().manual_seed(0)).to(run.device)
    with torch.no_grad(), run.autocast():
        prediction, mask = model(view, noise)
    pictures = *reconstruct(prediction.float(), view, mask, patch_size, norm_pix), view
    run.save_picture("reconstruction.png", *map(denormalize, pictures))


def train(args):
    """One view per image and step. Health: the loss is below `variance`, that of predicting 0."""
    from common import Run, uniform

    run = Run("mae", args)
    backbone = run.init(ViT(args.image_size, args.patch_size, *VITS[args.arch]))
    if args.objective == "mae":
        decoder = args.decoder_dim, args.decoder_depth, args.decoder_dim // 32
        model = MAE(backbone, args.mask_ratio, *decoder)
        loss_function = partial(mae_loss, patch_size=args.patch_size, norm_pix=args.norm_pix)
    else:
        model = SimMIM(backbone, args.mask_ratio)
        loss_function = partial(simmim_loss, patch_size=args.patch_size)
    optimizer = make_optimizer(model, args.weight_decay)
    augment = make_augment(args.image_size, args.crop_scale)
    network = run.start(model, optimizer, backbone)
    run.save_views(augment)
    patches = (args.image_size // args.patch_size) ** 2

    for step, images, aspect in run.steps():
        lr = cosine(step, run.total_steps, run.warmup_steps, run.peak_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        view = augment(images, aspect)
        noise = uniform(len(view), patches, device=run.device)  # says which are removed
        with run.autocast():
            prediction, mask = network(view, noise)
        loss = loss_function(prediction.float(), view, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if run.prints(step):
            run.log(step, loss, lr, variance=loss_function(0 * prediction, view, mask))
    save_reconstruction(run, model, args.objective == "mae" and args.norm_pix)
    run.finish()


# dim, depth, num_heads; micro is ours, for a CPU
VITS = {"vit_micro": (128, 4, 2), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6),
        "vit_base": (768, 12, 12), "vit_large": (1024, 24, 16), "vit_huge": (1280, 32, 16)}

# Sources: imagenet: the paper and facebookresearch/mae (batch there: 4096). cifar: widths and
# depths of IcarusWizard/MAE (there: patch 2, 3 heads in the decoder, learned positions); epochs,
# batch and rate are ours and were not measured. demo: ours, chosen by the loss on removed patches.
RECIPES = {
    "recipe":          ("demo",      "cifar",    "imagenet"),
    "arch":            ("vit_micro", "vit_tiny", "vit_base"),
    "patch_size":      (4,           4,          16),
    "image_size":      (32,          32,         224),
    "epochs":          (10,          800,        800),
    "warmup_epochs":   (1,           40,         40),
    "batch_size":      (64,          512,        1024),
    "lr":              (3e-3,        3e-4,       1.5e-4),
    "weight_decay":    (0.05,        0.05,       0.05),
    "mask_ratio":      (0.75,        0.75,       0.75),
    "norm_pix":        (True,        True,       True),
    "decoder_dim":     (64,          192,        512),
    "decoder_depth":   (1,           4,          8),
    "crop_scale":      (0.35,        0.2,        0.2),
}


def parse_args(argv=None):
    from common import ArgumentParser, number

    parser = ArgumentParser(__doc__, RECIPES, str, f"; for this script only {', '.join(VITS)}")
    add = parser.add_argument
    add("--patch-size", type=number(int, 1), help="side of a patch in pixels (paper: 16; huge: 14)")
    add("--objective", choices=("mae", "simmim"), default="mae",
        help="simmim: mask tokens in the encoder, a linear decoder, absolute error of plain pixels")
    add("--mask-ratio", type=number(float, 0, 1),
        help="fraction of patches removed (MAE: 0.75, SimMIM: 0.6)")
    add("--norm-pix", action=argparse.BooleanOptionalAction,
        help="normalise the pixels to be predicted, in each patch")
    add("--decoder-dim", type=number(int, 32), help="decoder's width, 32 per head (paper: 512)")
    add("--decoder-depth", type=number(int, 0), help="blocks of the decoder (paper: 8)")
    add("--crop-scale", type=number(float, 0, 1, above=True),
        help="area of the smallest crop, as a fraction of the image (paper: 0.2)")
    args = parser.parse_args(argv)
    if args.arch not in VITS:
        parser.error(f"--arch {args.arch} is none of {', '.join(VITS)}")
    if args.image_size % args.patch_size or args.decoder_dim % 32:
        parser.error(f"--patch-size {args.patch_size} must divide --image-size, 32 --decoder-dim")
    patches = (args.image_size // args.patch_size) ** 2
    if not 0 < round(patches * (1 - args.mask_ratio)) < patches:
        parser.error(f"--mask-ratio {args.mask_ratio} removes none or all of {patches} patches")
    return args


if __name__ == "__main__":
    from common import main

    main(train, parse_args)
