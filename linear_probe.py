# SPDX-License-Identifier: MIT
"""Linear probe: how good are a backbone's features, compared with the untrained network's and with
raw pixels?

    images ─► frozen backbone ─► features ─┬─► vote of the nearest training features ─► top-1
                                 (N, C)    └─► softmax regression, its penalty chosen on
                                               a tenth of the training images ────────► top-1

Run    python linear_probe.py --checkpoint runs/simclr/backbone.pth --data folder
       Also for ResNets and ViTs of torchvision, timm, solo-learn and the methods' official code.
       --finetune classifier.pth: train all layers with labels, too, and keep the classifier

Images are normalized by ImageNet's mean and std. (Some of timm's ViTs were trained with 0.5 for
both: their features are worse here. Wrap such a network in one that rescales its input.)

Departures: papers train the probe by SGD on augmented views, and get up to one point more. DINO's
reads more of a ViT (the class tokens of the last four blocks, or the patches' mean, too), and its
kNN has a temperature of 0.07 and the best of four k. In fine-tuning, papers have recipes for each
method and network. MAE's, of 100 epochs for a ViT-B, adds mixup, CutMix, RandAugment, random
erasing, label smoothing, stochastic depth, smaller rates for earlier layers, and the mean over the
patches in place of the class token.
"""

import argparse
import copy
import math
import os
import re
from collections import Counter
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

import common
from common import Failure, center_view, rank, say, world_size

# --------------------------------------------------------------------------------------- features

STAGES = r"layer\d|blocks\.\d+|encoder\.layers\.\w+"  # names of the parts of a network


def stage_features(network, stages, x):
    """-> the features (B, C) after each of these stages; "" is the end. A map is pooled to a grid
    with about as many numbers as the final features, since more features alone raise the accuracy;
    a ViT's tokens are averaged over the patches."""
    outputs = {}
    hooks = []

    def keep(stage, module, inputs, output):
        outputs[stage] = output

    for stage in stages:
        module = network.get_submodule(stage)
        hooks.append(module.register_forward_hook(partial(keep, stage)))
    dim = network(x).shape[1]
    for hook in hooks:
        hook.remove()
    features = []
    for stage in stages:
        z = outputs[stage]
        if z.dim() == 4:
            grid = round((dim / z.shape[1]) ** 0.5)  # grid² · channels is about dim
            z = F.adaptive_avg_pool2d(z, grid).flatten(1)
        elif z.dim() == 3:
            z = z[:, 1:].mean(1)
        features.append(z.float())
    return features


@torch.no_grad()
def extract_features(network, images, rows, image_size, device, stages=("",), what=""):
    """-> for each stage, features (N, C) float32 of these rows of the images, and whether each
    image could be read, (N,). Each of W processes encodes every W-th row, and has all in the end.
    what: a name for the progress on the screen; without it, none is shown."""
    mine = torch.arange(len(rows))[rank() :: world_size()]
    no_row = len(mine) == 0  # more processes than images: encode one anyway, for the shapes
    if no_row:
        mine = torch.tensor([0])
    parts = mine.split(256)
    loaded = images.load([rows[part] for part in parts], device)
    if what:
        loaded = common.progress(loaded, f"encoding {what}", len(parts))
    features = None
    readable = torch.zeros(len(rows), device=device)
    for part, (pixels, aspect) in zip(parts, loaded):
        view = center_view(pixels, aspect, image_size)
        with common.autocast(device):
            encoded = stage_features(network, stages, view)
        if features is None:  # filled row by row: torch.cat would need twice their memory
            features = [z.new_zeros(len(rows), z.shape[1]) for z in encoded]
        if no_row:
            continue
        part = part.to(device)
        readable[part] = (aspect > 0).float()
        for of_stage, z in zip(features, encoded):
            of_stage[part] = z
    if world_size() > 1:
        # A row is zero in all processes but the one that encoded it: their sum has them all.
        for values in [readable, *features]:
            dist.all_reduce(values)
    return features, readable.bool()


@torch.no_grad()
def calibrate_batch_norm(network, images, image_size, device, seed=0):
    """Set the BN statistics to their mean over up to 8 batches of whole images: those of an
    untrained network, which with the initial 0 and 1 would be too weak a baseline, or of a network
    that was trained on tiles."""
    network.eval()
    norms = [module for module in network.modules() if hasattr(module, "reset_running_stats")]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the mean over all batches
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:2048]
    parts = order.chunk(math.ceil(len(order) / 256))
    for pixels, aspect in images.load(parts, device, replace=True):
        network(center_view(pixels, aspect, image_size))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    network.eval()


# ------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def knn(train_features, train_labels, test_features, test_labels, k=200, temperature=0.1):
    """Top-1 in percent of a vote among the k nearest training images by cosine similarity s, each
    with weight exp(s / temperature) (Wu et al., 1805.01978). Features (N, C), labels (N,)."""
    bank = F.normalize(train_features.float(), dim=1)  # in float16 the votes' sums overflow
    queries = F.normalize(test_features.float(), dim=1)
    k = min(k, len(bank))
    classes = int(train_labels.max()) + 1
    correct = 0
    chunk = max(1, 2**27 // len(bank))  # half a gigabyte of similarities at once
    for part, labels in zip(queries.split(chunk), test_labels.split(chunk)):
        similarity, nearest = (part @ bank.T).topk(k)
        votes = similarity.new_zeros(len(part), classes)
        votes.scatter_add_(1, train_labels[nearest], (similarity / temperature).exp())
        correct += (votes.argmax(1) == labels).sum().item()
    return 100 * correct / len(test_labels)


def linear_path(features, labels, classes):
    """Softmax regression: yields (strength, classifier) from the strongest penalty to the weakest,
    each the minimum of mean cross-entropy + strength / 2 · ‖W‖².

    L-BFGS does not work on W and the bias, but on V and b, in which the loss curves alike in all
    directions, so that it converges in some dozens of steps:

        W = V diag(scale) Eᵀ,  E: eigenvectors of the covariance;   bias = √classes · b
    """
    eigenvalues, directions = torch.linalg.eigh(features.T @ features / len(features))
    rotated = features.new_zeros(classes, features.shape[1])  # W E
    b = features.new_zeros(classes, requires_grad=True)
    for exponent in range(7):
        strength = 10.0**-exponent
        # at equal probabilities, the cross-entropy's curvature is the covariance / classes
        scale = (eigenvalues.clamp(min=0) / classes + strength).rsqrt()
        v = (rotated / scale).requires_grad_()
        # a step that changes the loss by less than 1e-7 is lost in float32's rounding
        optimizer = torch.optim.LBFGS([v, b], max_iter=1000, tolerance_grad=1e-6,
                                      tolerance_change=1e-7, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            logits = F.linear(features, scale * v @ directions.T, classes**0.5 * b)
            loss = F.cross_entropy(logits, labels) + strength / 2 * (scale * v).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        rotated = scale * v.detach()
        yield strength, partial(F.linear, weight=rotated @ directions.T,
                                bias=classes**0.5 * b.detach())


def mlp_path(features, labels, classes):
    """A classifier with one hidden layer of 1024 units, by AdamW in batches of 256: yields (steps,
    classifier) after 10, 30, 100, ... 10,000 steps."""
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Linear(features.shape[1], 1024), nn.ReLU(),
                               nn.Linear(1024, classes)).to(features)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3, weight_decay=1e-2)
    for step in range(1, 10_001):
        rows = torch.randint(len(features), (256,)).to(features.device)
        optimizer.zero_grad()
        F.cross_entropy(classifier(features[rows]), labels[rows]).backward()
        optimizer.step()
        if step in (10, 30, 100, 300, 1000, 3000, 10_000):
            yield step, classifier


def top1(logits, labels):
    """Accuracy in percent: (N, K), (N,) -> float."""
    return 100 * (logits.argmax(1) == labels).sum().item() / len(labels)


def linear_probe(train_features, train_labels, test_features, test_labels, path=linear_path):
    """-> dict: probe (top-1 in percent), chosen (the penalty's strength, or `mlp_path`'s steps),
    held_out (for each of these, top-1 on a tenth of the training images, before the fit to all).

    Features (N, C), N at least 2, are standardized in place (those of a million images are
    gigabytes), as by MAE's BN without affine; labels (N,) from 0.
    """
    variance, mean = torch.var_mean(train_features, 0, correction=0)
    for features in train_features, test_features:
        features.sub_(mean).mul_((variance + 1e-6).rsqrt())
    classes = int(train_labels.max()) + 1
    order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(0))
    held, rest = order.to(train_labels.device).tensor_split([max(1, len(order) // 10)])
    held_out = {}
    for setting, classifier in path(train_features[rest], train_labels[rest], classes):
        held_out[setting] = top1(classifier(train_features[held]), train_labels[held])
        chosen = max(held_out, key=held_out.get)  # the first of equals
        last_two = list(held_out)[-2:]
        if chosen not in last_two:  # neither of them was better
            break
    # Now with all images, from the first setting on: each fit starts where the last one ended.
    for setting, classifier in path(train_features, train_labels, classes):
        if setting == chosen:
            break
    return {"probe": top1(classifier(test_features), test_labels), "chosen": chosen,
            "held_out": held_out}


def labelled_rows(images, fraction=1.0, seed=0):
    """Rows of this fraction of each class's images, at least one, in random order in each class."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    rows = []
    for label in range(len(images.classes)):
        of_class = order[images.labels[order] == label]
        rows.append(of_class[: max(1, round(fraction * len(of_class)))])
    return torch.cat(rows)


def labelled_features(network, images, rows, image_size, device, stages=("",), what=""):
    """-> for each stage, features (N, C) of the rows that can be read, and their labels (N,)."""
    features, readable = extract_features(network, images, rows, image_size, device, stages, what)
    labels = images.labels[rows].to(device)
    if not readable.all():
        for i, z in enumerate(features):  # one at a time: twice all of them might not fit
            features[i] = z[readable]
        labels = labels[readable]
    return features, labels


def quick_knn(network, train, test, image_size, device, sizes=(2000, 500), calibrate=False):
    """kNN accuracy in percent while training, with k = 20, on at most `sizes` training and test
    images; None without labels. It works on a copy of the network, and draws no random numbers.
    calibrate: see `calibrate_batch_norm`."""
    if test is None or test.labels.max() < 0 or train.labels.max() < 0:
        return None
    network = copy.deepcopy(network).eval()
    if calibrate:
        calibrate_batch_norm(network.to(device), train, image_size, device)
    given = []
    for images, size in zip((train, test), sizes):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        rows = order[images.labels[order] >= 0][:size]
        (features,), labels = labelled_features(network, images, rows, image_size, device)
        given += [features, labels]
    return knn(*given, k=20)


def report_row(name, vote, probe):
    """Prints and returns a row of the report: kNN's accuracy and what `linear_probe` has found."""
    say(f"kNN {vote:5.1f}  linear probe {probe['probe']:5.1f}  {name}")
    return {"knn": vote, **probe}


def evaluate(backbone, untrained, train, test, image_size, device, label_fraction=1.0, seed=0,
             layers=False, mlp=False):
    """Prints and returns {name: accuracies} of "trained" (`backbone`), "random" (`untrained`) and
    "pixels"; also by stage ("trained layer1") and of an MLP ("trained, MLP"). With several
    processes, rank 0 alone has them, and the others get {}. label_fraction: how much of each
    class's training labels to use."""
    if test is None or test.labels.max() < 0 or (train.labels >= 0).sum() < 2:
        say("Nothing to evaluate on: try linear_probe.py --neighbours, or --data of class folders.")
        return {}
    pixels = nn.Sequential(nn.AdaptiveAvgPool2d(16), nn.Flatten(),  # 16 × 16 scores above 32 × 32
                           nn.BatchNorm1d(768, affine=False))  # standardizes
    rows = labelled_rows(train, label_fraction, seed)
    test_rows = labelled_rows(test, 1.0, seed)
    report = {}
    for kind, network in {"trained": backbone, "random": untrained, "pixels": pixels}.items():
        network.eval()
        if network is not backbone:
            calibrate_batch_norm(network.to(device), train, image_size, device, seed)
        stages = [""]
        if layers:
            stages += [name for name, _ in network.named_modules() if re.fullmatch(STAGES, name)]
        x, y = labelled_features(network, train, rows, image_size, device, stages,
                                 f"training images, {kind}")
        test_x, test_y = labelled_features(network, test, test_rows, image_size, device, stages,
                                           f"test images, {kind}")
        if rank() == 0:
            for stage in stages:
                name = f"{kind} {stage}".strip()
                features = x.pop(0)  # popped, so that the memory of each stage is freed
                test_features = test_x.pop(0)
                vote = knn(features, y, test_features, test_y)
                if mlp:  # on copies, since linear_probe standardizes in place
                    probe = linear_probe(features.clone(), y, test_features.clone(), test_y,
                                         mlp_path)
                    report[f"{name}, MLP"] = report_row(f"{name}, MLP", vote, probe)
                probe = linear_probe(features, y, test_features, test_y)
                report[name] = report_row(name, vote, probe)
        x = test_x = features = test_features = None  # frees them before the next network's
        common.wait_for_all()
    if rank() == 0:
        chance = 100 * test_y.bincount().max() / len(test_y)
        say(f"Percent right of {len(test_y):,} test images (chance {chance:.1f}) on frozen "
            f"features:\nthe nearest {min(200, len(y))} of {len(y):,} training images; a linear "
            "classifier.")
        say_best_stage(report)
    return report


def say_best_stage(report):
    """Of the stages before the end, chosen by held-out training images."""
    held_out = {}
    for name, row in report.items():
        if name.startswith("trained ") and not name.endswith(", MLP"):
            held_out[name] = max(row["held_out"].values())
    if held_out:
        best = max(held_out, key=held_out.get)
        untrained = report[best.replace("trained", "random")]
        say(f"best stage, by held-out training images: {best}, {report[best]['probe']:.1f} "
            f"(random: {untrained['probe']:.1f})")


# ------------------------------------------------------------------------------------ checkpoints

TIMM_NAMES = {  # parts of timm's names, as patterns, and torchvision's
    r"cls_token": "class_token",
    r"pos_embed": "encoder.pos_embedding",
    r"norm": "encoder.ln",
    r"patch_embed\.proj": "conv_proj",
    r"blocks\.(\d+)": r"encoder.layers.encoder_layer_\1",
    r"norm1": "ln_1",
    r"norm2": "ln_2",
    r"mlp\.fc1": "mlp.0",
    r"mlp\.fc2": "mlp.3",
    r"attn\.qkv\.": "self_attention.in_proj_",
    r"attn\.proj": "self_attention.out_proj",
}
OUTPUT_LAYERS = (r"(fc|heads?|linear|classifier|proj\w*|pred\w*|decoder\w*|mask_token|prototypes|"
                 r"queue\w*|pre_logits)(\.|$)")  # which a backbone goes without
# Attention heads of our own networks, where they are not one for each 64 dimensions.
HEADS = {("moco", "vit_small"): 12, ("mae", "vit_huge"): 16}


def timm_to_torchvision(weights):
    """{name in timm's ViT: tensor} -> {name in torchvision's: tensor}; others stay as they are."""
    renamed = {}
    for name, tensor in weights.items():
        for timm, torchvision in TIMM_NAMES.items():
            name = re.sub(rf"\b{timm}\b", torchvision, name)
        renamed[name] = tensor
    return renamed


def find_weights(value, name=""):
    """Nested dicts -> {dotted name: tensor}; names begin with a dot."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    found = {}
    if isinstance(value, dict):
        for key in value:
            found.update(find_weights(value[key], f"{name}.{key}"))
    return found


def backbone_weights(found, network):
    """{dotted name: tensor} of a file -> {name: tensor} of its backbone, and names of other parts.

    If there are several backbones, it takes the one that the method evaluates: DINO's teacher,
    BYOL's online network, MoCo's query encoder. Raises ValueError if there is none.
    """
    first_names = ["layer1.0.conv1.weight", "pos_embed", "encoder.pos_embedding"]
    if network is not None:
        first_names.append(next(iter(network.state_dict())))
    prefixes = set()
    for name in found:
        for first in first_names:
            if name.endswith("." + first):
                prefixes.add(name.removesuffix(first))
    if not prefixes:
        raise ValueError("it holds no weights of a ResNet or ViT (of another network: --arch)")

    def preference(prefix):
        """The lowest is taken: False comes before True, then the shorter name."""
        not_evaluated = re.search("student|target|momentum|key|encoder_k|ema", prefix) is not None
        return not_evaluated, len(prefix)

    prefix = min(sorted(prefixes), key=preference)
    weights = {}
    left_over = []
    for name, tensor in found.items():
        if name.startswith(prefix):
            weights[name.removeprefix(prefix)] = tensor
        else:
            # what is reported: the first part of the name that the prefix does not have
            parts = [part for part in name.split(".") if part not in prefix.split(".")]
            left_over.append(parts[0] if parts else name)
    return weights, left_over


def build_resnet(weights, image_size, stem_padding):
    """-> the untrained ResNet of these names and shapes, the size of its images in pixels, and a
    list of what had to be assumed, in words."""
    width, _, kernel, _ = weights["conv1.weight"].shape
    block = Bottleneck if "layer1.0.conv3.weight" in weights else BasicBlock
    inner, _, _, _ = weights["layer1.0.conv1.weight"].shape
    grouped = weights["layer1.0.conv2.weight"].shape[1] != inner
    if inner != width or grouped:
        raise ValueError("it is a wide ResNet or ResNeXt: name it by --arch")
    blocks = {tuple(name.split(".")[:2]) for name in weights if name.startswith("layer")}
    count = Counter(stage for stage, _ in blocks)
    depths = [count[stage] for stage in sorted(count)]
    if kernel == 7:
        network = common.ResNet(block, depths, width, "imagenet")
        size = image_size or 224
        assumed = []
    elif len(depths) == 3:
        network = common.ResNet(block, depths, width, "tiny")
        size = image_size or 32
        assumed = ["a first layer of stride 2, as resnet8's here"]
    else:
        network = common.ResNet(block, depths, width, "cifar")
        network.conv1.padding = stem_padding, stem_padding
        size = image_size or 32
        assumed = ["a first layer of stride 1", f"--stem-padding {stem_padding}"]
    if image_size is None:
        assumed.append(f"--image-size {size}")
    return network, size, assumed


def build_vit(weights, image_size, heads):
    """-> the untrained ViT of these names and shapes, the size of its images in pixels, and a list
    of what had to be assumed, in words."""
    dim, _, patch_size, _ = weights["conv_proj.weight"].shape
    patches = weights["encoder.pos_embedding"].shape[1] - 1
    size = image_size or patch_size * math.isqrt(patches)
    if size % patch_size:
        raise ValueError(f"--image-size {size} is no multiple of its patches' {patch_size}")
    heads = heads or max(1, dim // 64)
    assumed = [f"--heads {heads}", "ImageNet's mean and std"]
    if image_size is None:
        assumed.append(f"--image-size {size}")
    depth = len({name.split(".")[2] for name in weights if name.startswith("encoder.layers.")})
    network = VisionTransformer(size, patch_size, depth, heads, dim, 4 * dim)
    network.heads = nn.Identity()
    network.feature_dim = dim
    return network, size, assumed


@torch.no_grad()
def initialize_as_mae(network, positions):
    """Give torchvision's ViT these fixed positions and, where its own differ, MAE's first weights,
    as in the official code: a fair baseline for MAE's files, and nearly so for MoCo v3's."""
    network.encoder.pos_embedding.copy_(positions)
    nn.init.normal_(network.class_token, std=0.02)
    nn.init.xavier_uniform_(network.conv_proj.weight.flatten(1))  # as a matrix
    for layer in network.encoder.layers:
        nn.init.xavier_uniform_(layer.self_attention.out_proj.weight)  # the others are already


def load_weights(network, weights):
    """Load them into the network -> names of output layers, which it lacks. ValueError or
    RuntimeError: they do not fit."""
    own = network.state_dict()
    unused = [name for name in weights if re.match(OUTPUT_LAYERS, name) and name not in own]
    weights = {name: tensor for name, tensor in weights.items() if name not in unused}
    if isinstance(network, VisionTransformer):
        weights = interpolate_embeddings(network.image_size, network.patch_size, weights)
    if "conv1.weight" in own and "conv1.weight" in weights:
        stem = tuple(own["conv1.weight"].shape)
        given = tuple(weights["conv1.weight"].shape)
        if stem != given:
            raise ValueError(f"its first layer is {given}, the network's {stem}: 7x7 for views of "
                             "more than 64 pixels, else 3x3")
    network.load_state_dict(weights)
    return unused


def load_backbone(path, image_size=None, arch=None, stem_padding=1, heads=None, network=None):
    """-> a file's backbone, the same untrained, and the size of its images in pixels.

    Names and shapes tell what it is, or `arch` does, or it goes into this network. Every weight is
    used, or reported as no part of the backbone. Failure: it does not fit.
    """
    checkpoint = common.read_file(path)
    ours = isinstance(checkpoint, dict) and "recipe" in checkpoint  # a checkpoint.pth
    assumed = []
    if ours:
        args = checkpoint["args"]
        image_size = image_size or args.get("eval_size") or args["image_size"]
        arch = arch or args["arch"]
        heads = heads or HEADS.get((checkpoint["method"], arch))
        say(f"{path}: {checkpoint['method']} after {checkpoint['step']} steps")
    if network is None and arch and not arch.startswith(("resnet", "vit_")):
        network = common.make_backbone(arch, image_size or 224)
        if image_size is None:
            assumed.append("--image-size 224")
    try:
        weights, unused = backbone_weights(find_weights(checkpoint), network)
        if "pos_embed" in weights and not hasattr(network, "pos_embed"):
            weights = timm_to_torchvision(weights)
        if network is None and "layer1.0.conv1.weight" in weights:
            network, image_size, assumed = build_resnet(weights, image_size, stem_padding)
        elif network is None:
            network, image_size, assumed = build_vit(weights, image_size, heads)
        untrained = copy.deepcopy(network)
        unused += load_weights(network, weights)
        if isinstance(network, VisionTransformer):
            positions = network.encoder.pos_embedding
            if not positions[:, 0].any():  # zeros for the class token: sines and cosines, fixed
                initialize_as_mae(untrained, positions)
    except (AssertionError, KeyError, RuntimeError, ValueError) as error:
        lacking = "lacking " if isinstance(error, KeyError) else ""
        reason = " ".join(str(error).split())[:300]
        raise Failure(f"{path} does not fit a network that is known here: {lacking}{reason}")
    if assumed and not ours:
        say(f"{path}: assuming {', '.join(assumed)}")
    if unused:
        parts = sorted({name.split(".")[0] for name in unused})
        say(f"{path}: not of the backbone: {', '.join(parts)}")
    network.arch = arch  # None: names and shapes tell
    network.given_heads = heads  # of a ViT; None: one for each 64 dimensions
    return network, untrained, image_size or 224


# ----------------------------------------------------------------------------------- fine-tuning

RATES = 3e-4, 1e-3, 3e-3  # of all layers, to choose from
BATCH_SIZE = 64
MIN_STEPS = 300  # 20 epochs, but no fewer and no more steps than these
MAX_STEPS = 3000


def add_head(backbone, classes):
    """-> the backbone and a linear layer, (B, 3, S, S) -> logits (B, K). The layer starts at zero.
    As in the probe, its input is standardized, so that a rate means the same for all backbones."""
    linear = nn.Linear(backbone.feature_dim, classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(backbone, nn.BatchNorm1d(backbone.feature_dim, affine=False), linear)


def finetune(network, images, rows, image_size, device, rate, steps, seed=0, what="fine-tuning"):
    """-> a copy of the network with a linear layer, all of it trained on these rows of the images,
    by AdamW with this peak rate. what: a name for the progress on the screen."""
    torch.manual_seed(seed)  # the same batches and crops for both networks and all rates
    classifier = add_head(copy.deepcopy(network), len(images.classes))
    classifier.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # warm-up, then half a cosine to almost 0
        optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False)

    # drawn with replacement: a batch is full, however few images there are
    batches = rows[torch.randint(len(rows), (steps, BATCH_SIZE))]
    loaded = common.progress(images.load(batches, device), what, steps)
    for batch, (pixels, aspect) in zip(batches, loaded):
        labels = images.labels[batch].to(device)
        labels = torch.where(aspect > 0, labels, -100)  # unreadable: cross_entropy skips -100
        x = common.random_resized_crop(pixels, aspect, image_size, scale=(0.2, 1.0))
        x = common.normalize(common.random_horizontal_flip(x))
        with common.autocast(device):
            logits = classifier(x)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def finetune_at_best_rate(network, images, rows, image_size, device, seed=0, name=""):
    """-> the classifier, trained on all these rows, and its rate: the best on a held-out tenth of
    them, after training on the others. name: of the network, for the progress on the screen."""
    steps = min(max(20 * len(rows) // BATCH_SIZE, MIN_STEPS), MAX_STEPS)
    held = rows[::10]  # labelled_rows come class by class: a tenth of each
    rest = rows[torch.arange(len(rows)) % 10 > 0]
    held_out = {}
    for rate in RATES:
        classifier = finetune(network, images, rest, image_size, device, rate, steps, seed,
                              f"{name}, trying rate {rate:g}")
        (logits,), y = labelled_features(classifier, images, held, image_size, device)
        held_out[rate] = top1(logits, y)
    chosen = max(held_out, key=held_out.get)  # the first of equals
    classifier = finetune(network, images, rows, image_size, device, chosen, steps, seed,
                          f"{name}, rate {chosen:g}")
    return classifier, chosen


def evaluate_finetuning(backbone, untrained, report, train, test, image_size, device,
                        label_fraction=1.0, seed=0):
    """Fine-tunes both networks, and prints their accuracies beside the linear probe's in `report`,
    which is `evaluate`'s -> the backbone's classifier."""
    rows = labelled_rows(train, label_fraction, seed)
    test_rows = labelled_rows(test, 1.0, seed)
    classifiers = {}
    for name, network in {"trained": backbone, "random": untrained}.items():
        classifier, rate = finetune_at_best_rate(network, train, rows, image_size, device, seed,
                                                 name)
        (logits,), y = labelled_features(classifier, test, test_rows, image_size, device,
                                         what=f"test images, {name}")
        accuracy = top1(logits, y)
        say(f"linear probe {report[name]['probe']:5.1f}  fine-tuned {accuracy:5.1f}  {name} "
            f"(rate {rate:g})")
        classifiers[name] = classifier
    say("Fine-tuned: all layers, with the same labels; rates chosen by held-out training images.")
    return classifiers["trained"]


def save_classifier(classifier, args, images):
    """Write what `load_classifier` reads."""
    classifier.cpu()
    network = {"image_size": args.image_size, "arch": classifier[0].arch,
               "stem_padding": args.stem_padding, "heads": classifier[0].given_heads}
    common.save_file(args.finetune, {
        "backbone": classifier[0].state_dict(), "head": classifier[1:].state_dict(),
        "network": network, "classes": images.classes, "side": images.side})
    say(f"{args.finetune}: a classifier of {len(images.classes)} classes")


def load_classifier(path):
    """-> what --finetune has written: a network (B, 3, S, S) -> logits (B, K), the K class names,
    S, and the side in pixels of the squares from which `common.center_view` makes its input."""
    saved = common.read_file(path)
    backbone, _, image_size = load_backbone(path, **saved["network"])
    classifier = add_head(backbone, len(saved["classes"]))
    classifier[1:].load_state_dict(saved["head"])
    return classifier.eval().requires_grad_(False), saved["classes"], image_size, saved["side"]


# ---------------------------------------------------------------------------------------- command


def save_features(backbone, sets, image_size, device, path):
    """One .npz: features (N, C), names, labels (-1: none), test (whether it is a test image) and
    classes, in the files' order."""
    features = []
    labels = []
    names = []
    is_test = []
    for images in sets:
        every = torch.arange(len(images))
        (x,), readable = extract_features(backbone, images, every, image_size, device,
                                          what=images.origin)
        rows = readable.nonzero().flatten().cpu()
        features.append(x[readable].cpu())
        labels.append(images.labels[rows])
        names += [os.path.join(images.origin, str(images.names[row])) for row in rows.tolist()]
        is_test += [images is not sets[0]] * len(rows)
    features = torch.cat(features).numpy()
    labels = torch.cat(labels).numpy()
    order = np.arange(len(names))
    if sets[0].items is None:  # not a set of torchvision, whose order is that of its indices
        order = np.argsort(names)
    if rank() == 0:
        with open(path, "wb") as file:
            np.savez(file, features=features[order], names=np.array(names)[order],
                     labels=labels[order], test=np.array(is_test)[order],
                     classes=np.array(sets[0].classes, str))
    say(f"{path}: {len(names):,} images, {features.shape[1]} features each")


def save_neighbours(backbone, images, image_size, device, path):
    """A picture: an image of each class, followed by its seven nearest by cosine similarity."""
    every = torch.arange(len(images))
    (x,), readable = extract_features(backbone, images, every, image_size, device,
                                      what=images.origin)
    x = F.normalize(x, dim=1) * readable[:, None]
    nearest = (x[common.example_rows(images)] @ x.T).topk(min(8, len(x))).indices.cpu()
    pixels, aspect = next(images.load([nearest.flatten()], device))
    pictures = common.denormalize(center_view(pixels, aspect, image_size))
    if rank() == 0:
        common.save_picture(path, *pictures.unflatten(0, nearest.shape).unbind(1))
    say(f"{path}: in each row, an image and its {nearest.shape[1] - 1} nearest")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default="runs/simclr/backbone.pth", help="checkpoint or backbone file")
    add("--data", help="folder of images, or set of torchvision (cifar10); without it, synthetic "
        "images")
    add("--arch", help="network of the file, if it is no plain ResNet or ViT")
    add("--stem-padding", type=int, default=1, help="of a 3x3 first layer, which leaves no trace "
        "in the weights; 2 in solo-learn's files")
    add("--heads", type=int, help="attention heads of a ViT, which leave no trace either; without "
        "it, one for each 64 dimensions (MoCo v3's vit_small: 12, MAE's huge: 16)")
    add("--labels", type=float, default=1.0, help="fraction of each class's training labels to use")
    add("--layers", action="store_true", help="also after each stage")
    add("--mlp", action="store_true", help="also a probe with a hidden layer")
    add_one = parser.add_mutually_exclusive_group().add_argument
    add_one("--finetune", help="also train all layers with labels; write the classifier to this "
            ".pth")
    add_one("--features", help="write the features of all images to this .npz instead")
    add_one("--neighbours", help="draw images and their nearest ones to this .png instead")
    common.add_data_flags(parser)
    return parser.parse_args(argv)


def run(args):
    for path in args.finetune, args.features, args.neighbours:
        if path and os.path.exists(path):
            raise Failure(f"{path} exists already: choose another name")
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            raise Failure(f"{path}: there is no such folder")
    device = common.start(args.device, args.seed)
    if args.finetune and world_size() > 1:
        raise Failure("--finetune trains in a single process: start it without torchrun")
    backbone, untrained, args.image_size = load_backbone(
        args.checkpoint, args.image_size, args.arch, args.stem_padding, args.heads)
    train, test = common.load_data(args, device)
    backbone.to(device).eval()
    if args.features:
        sets = [train] if test is None else [train, test]
        save_features(backbone, sets, args.image_size, device, args.features)
    elif args.neighbours:
        save_neighbours(backbone, train, args.image_size, device, args.neighbours)
    else:
        report = evaluate(backbone, untrained, train, test, args.image_size, device, args.labels,
                          args.seed, args.layers, args.mlp)
        if args.finetune and not report:
            raise Failure("--finetune needs labels: --data with a folder for each class")
        if args.finetune:
            classifier = evaluate_finetuning(backbone, untrained, report, train, test,
                                             args.image_size, device, args.labels, args.seed)
            save_classifier(classifier, args, train)


if __name__ == "__main__":
    common.main(run, parse_args)
