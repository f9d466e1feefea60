"""Linear probe: what is a backbone good for, beside itself untrained and raw pixels?

    images ─► frozen backbone ─► features ─┬─► vote of the nearest training features ─► top-1
                                 (N, C)    └─► softmax regression, its penalty chosen on
                                               a tenth of the training images ────────► top-1

Run    python linear_probe.py --checkpoint runs/simclr/backbone.pth --data folder
       Also for ResNets and ViTs of torchvision, timm, solo-learn and the methods' official code.

Departure: papers train the probe by SGD on augmented views, for up to a point more.
"""

import copy
import math
import os
import re
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

import common
from common import Failure, centre_view, rank, say, world_size

# --------------------------------------------------------------------------------------- features


def stage_features(network, stages, x):
    """-> the features (B, C) after each of these stages; "" is the end. A map is averaged over a
    grid that leaves about as many numbers as there are at the end, as more features alone raise an
    accuracy; a ViT's tokens are averaged over the patches."""
    outputs = {}
    hooks = [network.get_submodule(stage).register_forward_hook(
        lambda module, inputs, output, stage=stage: outputs.update({stage: output}))
        for stage in stages]
    dim = network(x).shape[1]
    for hook in hooks:
        hook.remove()
    for stage, z in outputs.items():
        if z.dim() == 4:
            outputs[stage] = F.adaptive_avg_pool2d(z, round((dim / z.shape[1]) ** 0.5)).flatten(1)
        elif z.dim() == 3:
            outputs[stage] = z[:, 1:].mean(1)
    return [outputs[stage] for stage in stages]


@torch.no_grad()
def extract_features(network, images, indices, view, device, stages=("",)):
    """-> a list, for each stage, of features (N, C) float32 in the order of `indices`. Each of W
    processes encodes every W-th image, as view(images, aspect), and has all in the end."""
    blank = torch.zeros(1, 3, images.side, images.side, dtype=torch.uint8, device=device)
    features = [torch.zeros(len(indices), z.shape[1], device=device)
                for z in stage_features(network, stages, view(blank, torch.ones(1, device=device)))]
    mine = [i for i in torch.arange(len(indices))[rank() :: world_size()].split(256) if len(i)]
    batches = images.load([indices[rows] for rows in mine], device)
    for rows, batch in zip(mine, common.progress(batches, "encoding", len(mine))):
        x = view(*batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for z, found in zip(features, stage_features(network, stages, x)):
                z[rows.to(device)] = found.float()
    for z in features if world_size() > 1 else []:
        dist.all_reduce(z)  # in place: the features of a million images are gigabytes
    return features


@torch.no_grad()
def calibrate_batch_norm(network, images, image_size, device, seed=0):
    """Give the BN layers of an untrained network the mean statistics of up to 8 batches; with the
    0 and 1 that they start from, it would be a weaker baseline than random weights are."""
    norms = [m for m in network.eval().modules() if hasattr(m, "reset_running_stats")]
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # the mean over all batches
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:2048]
    for batch in images.load(order.chunk(-(-len(order) // 256)), device) if norms else ():
        network(centre_view(*batch, image_size))
    network.eval()


# ------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def knn(train_features, train_labels, test_features, test_labels, k=200, temperature=0.1):
    """Top-1 in percent of a vote among the k nearest training images by cosine similarity s, each
    with weight exp(s / temperature) (Wu et al., 1805.01978). Features (N, C), labels (N,)."""
    bank = F.normalize(train_features, dim=1)
    k, classes, correct = min(k, len(bank)), train_labels.max() + 1, 0
    chunk = max(1, 2**27 // len(bank))  # half a gigabyte of similarities at once
    for queries, labels in zip(test_features.split(chunk), test_labels.split(chunk)):
        similarity, nearest = (F.normalize(queries, dim=1) @ bank.T).topk(k)
        votes = similarity.new_zeros(len(queries), classes)
        votes.scatter_add_(1, train_labels[nearest], (similarity / temperature).exp())
        correct += (votes.argmax(1) == labels).sum().item()
    return 100 * correct / len(test_labels)


def linear_path(features, labels, classes):
    """Softmax regression: yields (strength, classifier) from the strongest penalty to the weakest,
    each the minimum of mean cross-entropy + strength / 2 · ‖W‖². L-BFGS works on V, where W = V
    diag(scale) Eᵀ and E are the eigenvectors of the covariance: in V all directions curve alike."""
    eigenvalues, directions = torch.linalg.eigh(features.T @ features / len(features))
    rotated = features.new_zeros(classes, features.shape[1])
    b = features.new_zeros(classes, requires_grad=True)
    for strength in (10.0**-e for e in range(7)):
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


def sgd_path(features, labels, classes, hidden=None):
    """A linear classifier, or an MLP with `hidden` units, by AdamW in batches of 256: yields
    (steps, classifier) after 10, 30, 100, ... 10,000 steps."""
    torch.manual_seed(0)
    dims = [features.shape[1], *[hidden] * bool(hidden), classes]
    layers = [layer for shape in zip(dims, dims[1:]) for layer in (nn.ReLU(), nn.Linear(*shape))]
    classifier = nn.Sequential(*layers[1:]).to(features)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3, weight_decay=1e-2)
    for step in range(1, 10_001):
        rows = torch.randint(len(features), (256,)).to(features.device)
        optimizer.zero_grad()
        F.cross_entropy(classifier(features[rows]), labels[rows]).backward()
        optimizer.step()
        if step in (10, 30, 100, 300, 1000, 3000, 10_000):
            yield step, classifier


def linear_probe(train_features, train_labels, test_features, test_labels, path=linear_path):
    """-> dict: probe (top-1 in percent), chosen (the penalty's strength, or steps), held_out (by
    these, top-1 on a tenth of the training images, before the fit to all). Features (N, C), N at
    least 2, are standardised in place, as by MAE's BN without affine; labels (N,) from 0."""
    def top1(classifier, x, labels):
        return 100 * (classifier(x).argmax(1) == labels).sum().item() / len(labels)

    variance, mean = torch.var_mean(train_features, 0, correction=0)
    for z in train_features, test_features:
        z.sub_(mean).mul_((variance + 1e-6).rsqrt())
    x, y, classes, held_out = train_features, train_labels, int(train_labels.max()) + 1, {}
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(y.device)
    held, rest = order.tensor_split([max(1, len(y) // 10)])
    for setting, classifier in path(x[rest], y[rest], classes):
        held_out[setting] = top1(classifier, x[held], y[held])
        chosen = max(held_out, key=held_out.get)  # the strongest of equals
        if len(held_out) - list(held_out).index(chosen) > 2:
            break
    best = next(fit for setting, fit in path(x, y, classes) if setting == chosen)
    return {"probe": top1(best, test_features, test_labels), "chosen": chosen, "held_out": held_out}


def diagnostics(z1, z2):
    """Signs of collapse, from the features (N, D) of two views of at least 2 images -> dict.
    Spread: √D · std of unit z, 0 collapsed, 1 all directions alike. Effective rank: exp(entropy of
    the singular values' shares), 1 to D (2210.02885), but centred: a mean tells nothing apart.
    Alignment E ‖z1 - z2‖² and uniformity log E exp(-2 ‖z_i - z_j‖²), of unit z (2005.10242)."""
    singular, (u1, u2) = torch.linalg.svdvals(z1 - z1.mean(0)), (F.normalize(z) for z in (z1, z2))
    share = singular / singular.sum().clamp(min=torch.finfo(z1.dtype).tiny)
    return {"spread": u1.std(0).mean() * u1.shape[1] ** 0.5,
            "effective rank": torch.special.entr(share).sum().exp(),
            "alignment": (u1 - u2).square().sum(1).mean(),
            "uniformity": F.pdist(u1).square().mul(-2).exp().mean().log()}


def evaluate(backbone, initial, train, test, image_size, device, labels=1.0, seed=0, layers=False,
             mlp=False, steps=False):
    """Prints and returns {name: accuracies} of "trained", "random" (`initial`), "pixels"; also by
    stage ("trained layer1") and `sgd_path` ("trained, MLP"), in the first process. labels: fraction
    to use."""
    if test is None or (train.labels >= 0).sum() < 2:
        say("Nothing to evaluate on: try linear_probe.py --neighbours, or --data of class folders.")
        return {}
    pixels = nn.Sequential(nn.AdaptiveAvgPool2d(16), nn.Flatten(),  # 16: better than 32 pixels
                           nn.BatchNorm1d(768, affine=False))  # standardises
    view, report, paths = partial(centre_view, size=image_size), {}, {"": linear_path}
    paths |= {", MLP": partial(sgd_path, hidden=1024)} if mlp else {}
    paths |= {", by steps": sgd_path} if steps else {}

    def encode(images, fraction):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        classes = [order[images.labels[order] == c] for c in range(len(images.classes))]
        rows = torch.cat([c[: max(1, round(fraction * len(c)))] for c in classes])
        features = extract_features(network, images, rows, view, device, stages)
        return features, images.labels[rows].to(device)

    for kind, network in {"trained": backbone.eval(), "random": initial, "pixels": pixels}.items():
        if network is not backbone:
            calibrate_batch_norm(network.to(device), train, image_size, device, seed)
        stages = ["", *[name for name, _ in network.named_modules() if layers and re.fullmatch(
            r"layer\d|blocks\.\d+|encoder\.layers\.\w+", name)]]
        (x, y), (test_x, test_y) = encode(train, labels), encode(test, 1.0)
        for stage in stages:  # one after the other: each needs the memory of the probe's copies
            given, name = (x.pop(0), y, test_x.pop(0), test_y), f"{kind} {stage}".strip()
            if rank() == 0:
                vote = {"knn": knn(*given)}
                report |= {name + by: vote | linear_probe(*given, p) for by, p in paths.items()}
    if rank() == 0:
        for name, row in report.items():
            print(f"kNN {row['knn']:5.1f}  linear probe {row['probe']:5.1f}  {name}", *[
                f"{n}: {top1:.1f}" for n, top1 in row["held_out"].items() if "by steps" in name])
        print(f"Percent right of {len(test_y):,} test images (chance "
              f"{100 * test_y.bincount().max() / len(test_y):.1f}) on frozen features:\n"
              f"the nearest 200 of {len(y):,} training images; a linear classifier.")
    if stages := [name for name in report if name.startswith("trained ")]:
        best = max(stages, key=lambda name: max(report[name]["held_out"].values()))
        print(f"best stage, by held-out training images: {best}, {report[best]['probe']:.1f}"
              f" (random: {report[best.replace('trained', 'random')]['probe']:.1f})")
    return report


def save_features(backbone, sets, view, device, path):
    """One .npz: features (N, C), names, labels (-1: none), classes, in the order of the files."""
    rows = []
    for images in filter(None, sets):
        (x,) = extract_features(backbone, images, torch.arange(len(images)), view, device)
        names = [os.path.join(images.origin, str(name)) for name in images.names]
        rows += zip(names, images.labels.tolist(), x.cpu().numpy())
    if not images.items:
        rows.sort(key=lambda row: row[0])
    names, labels, features = zip(*rows)
    if rank() == 0:
        with common.writing(path), open(path, "wb") as file:
            np.savez(file, features=np.stack(features), names=names, labels=labels,
                     classes=np.array(images.classes, str))
    say(f"{path}: {len(rows):,} images, {len(features[0])} features each")


# ------------------------------------------------------------------------------------ checkpoints

TIMM_NAMES = {  # parts of timm's names, as patterns, and torchvision's
    r"cls_token": "class_token", r"pos_embed": "encoder.pos_embedding", r"norm": "encoder.ln",
    r"patch_embed\.proj": "conv_proj", r"blocks\.(\d+)": r"encoder.layers.encoder_layer_\1",
    r"norm1": "ln_1", r"norm2": "ln_2", r"mlp\.fc1": "mlp.0", r"mlp\.fc2": "mlp.3",
    r"attn\.qkv\.": "self_attention.in_proj_", r"attn\.proj": "self_attention.out_proj"}
HEADS = (r"(fc|heads?|linear|classifier|proj\w*|pred\w*|decoder\w*|mask_token|prototypes|queue\w*|"
         r"pre_logits)(\.|$)")  # layers that a backbone goes without


def timm_to_torchvision(weights):
    """{name in timm's ViT: tensor} -> {name in torchvision's: tensor}; others stay as they are."""
    for timm, torchvision in TIMM_NAMES.items():
        weights = {re.sub(rf"\b{timm}\b", torchvision, n): tensor for n, tensor in weights.items()}
    return weights


def find_weights(value, name=""):
    """Nested dicts -> {dotted name: tensor}."""
    if isinstance(value, dict):
        return {n: t for k in value for n, t in find_weights(value[k], f"{name}.{k}").items()}
    return {name[1:]: value} if isinstance(value, torch.Tensor) else {}


def build(weights, image_size, stem_padding):
    """-> the network of these names and shapes, untrained, and its image size in pixels."""
    if "layer1.0.conv1.weight" in weights:
        channels, _, kernel, _ = weights["conv1.weight"].shape
        block = Bottleneck if "layer1.0.conv3.weight" in weights else BasicBlock
        blocks = {tuple(name.split(".")[:2]) for name in weights if name.startswith("layer")}
        depths = [n for i in "1234" if (n := sum(layer == f"layer{i}" for layer, _ in blocks))]
        # a 3×3 stem's stride leaves no trace; three stages are our resnet8 or 20, of stride 2
        stem = "imagenet" if kernel == 7 else "tiny" if len(depths) == 3 else "cifar"
        network = common.ResNet(block, depths, channels / 64, stem)
        if kernel == 3:
            network.conv1.padding = stem_padding, stem_padding
            say(f"assuming stride {network.conv1.stride[0]} and --stem-padding {stem_padding}")
        return network, image_size or (224 if kernel == 7 else 32)
    dim, _, patch_size, _ = weights["conv_proj.weight"].shape
    size = image_size or patch_size * math.isqrt(weights["encoder.pos_embedding"].shape[1] - 1)
    if size % patch_size:
        raise ValueError(f"--image-size {size} is no multiple of its {patch_size}-pixel patches")
    if dim % 64:
        raise ValueError(f"the number of attention heads is not known for {dim} dimensions")
    # MAE's huge one has 16, MoCo v3's small one 12: v3 does not train the projection
    moco = dim == 384 and not weights["conv_proj.bias"].any()
    heads = 12 if moco else 16 if dim == 1280 else dim // 64
    say(f"assuming {heads} attention heads")
    depth = len({name.split(".")[2] for name in weights if name.startswith("encoder.layers.")})
    network = VisionTransformer(size, patch_size, depth, heads, dim, 4 * dim)
    network.heads = nn.Identity()
    return network, size


def load_backbone(path, image_size=None, arch=None, stem_padding=None, network=None):
    """-> a file's backbone, the same untrained, and the image size in pixels (None: its own). Names
    and shapes tell what it is, or `arch` does, or it goes into this network. Of several, DINO
    evaluates the teacher, BYOL and MoCo not the target or key encoder."""
    checkpoint = common.read_file(path)
    found, keys = find_weights(checkpoint), checkpoint if isinstance(checkpoint, dict) else {}
    args = keys["args"] if "recipe" in keys else {}  # else it is not ours
    arch, size = arch or args.get("arch", "resnet"), image_size or args.get("image_size")
    if network is None and not arch.startswith(("resnet", "vit")):
        network = common.make_backbone(arch, size or 224)
    ends = [".layer1.0.conv1.weight", ".pos_embed", ".encoder.pos_embedding"]
    ends += [f".{next(iter(network.state_dict()))}"] if network else []
    prefixes = [name.removesuffix(end[1:]) for name in found for end in ends
                if f".{name}".endswith(end)]
    if not prefixes:
        raise Failure(f"{path} holds no weights of a ResNet or ViT (of another network: --arch)")
    late = re.compile("student|target|momentum|key|encoder_k|ema")
    prefix = min(prefixes, key=lambda p: ("teacher" not in p, bool(late.search(p)), len(p)))
    weights = {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise Failure(f"{path} holds weights that are not finite: its training has diverged")
    if "pos_embed" in weights and not hasattr(network, "pos_embed"):
        weights = timm_to_torchvision(weights)
    try:
        if network is None:
            solo_learn = "pytorch-lightning_version" in keys
            network, size = build(weights, size, stem_padding or 1 + solo_learn)
        initial, own = copy.deepcopy(network), network.state_dict()
        heads = [name for name in weights if re.match(HEADS, name) and name not in own]
        used = {name: tensor for name, tensor in weights.items() if name not in heads}
        if isinstance(network, VisionTransformer):
            used = interpolate_embeddings(network.image_size, network.patch_size, used)
        network.load_state_dict(used)
    except (AssertionError, KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(f"{'lacking ' * isinstance(error, KeyError)}{error}".split())[:200]
        raise Failure(f"{path} does not fit a network that is known here: {reason}")
    if unused := heads + [name for name in found if not name.startswith(prefix)]:
        parts = (next(p for p in n.split(".") if p not in prefix.split(".")) for n in unused)
        say(f"{path}: not used: {', '.join(sorted(set(parts)))}")
    return network, initial, size or 224


def load_init(backbone, path):
    """The weights of --init into a method's backbone; nothing without a path."""
    if path:
        load_backbone(path, network=backbone)


# ---------------------------------------------------------------------------------------- command

FLAGS = {name: common.FLAGS[name] for name in ("data", "image_size", "max_images", "workers",
                                               "device", "seed")} | {
    "checkpoint": (str, None, None, "checkpoint or backbone file"),
    "arch": (common.architecture, None, None, "network of the file, if no ResNet or ViT"),
    "stem_padding": (int, 1, 2, "of a 3x3 stem, which leaves no trace; 2 is solo-learn's"),
    "labels": (float, 1e-6, 1, "fraction of the training labels of each class to use"),
    "layers": (bool, None, None, "also after each stage"),
    "mlp": (bool, None, None, "also a probe with a hidden layer of 1024 units"),
    "steps": (bool, None, None, "also after 10, 30, ... steps of AdamW, of held-out images"),
    "features": (str, None, None, "write the features of all images to this .npz instead"),
    "neighbours": (str, None, None, "draw images and their nearest ones to this .png instead"),
    "diagnostics": (bool, None, None, "show signs of collapse, which need no labels, instead"),
}
parse_args = partial(common.parse, flags=FLAGS, doc=__doc__, defaults=common.DEFAULTS | {
    "checkpoint": "runs/simclr/backbone.pth", "labels": 1.0})


def run(args):
    for path in filter(None, (args.features, args.neighbours)):
        with common.writing(path):  # where it cannot, that is said at once, not after hours
            open(path, "ab").close()
    device = common.start(args.device, args.seed)
    backbone, initial, size = load_backbone(args.checkpoint, args.image_size, args.arch,
                                            args.stem_padding)
    train, test = common.load_data(args.data, size, args.max_images, args.workers, device)
    backbone, view = backbone.to(device).eval(), partial(centre_view, size=size)
    rows = torch.arange(len(train))
    if args.features:
        save_features(backbone, [train, test], view, device, args.features)
    elif args.neighbours:  # an image of each class, followed by its seven nearest
        x = F.normalize(extract_features(backbone, train, rows, view, device)[0], dim=1)
        nearest = (x[common.example_rows(train)] @ x.T).topk(min(8, len(x))).indices.cpu()
        pictures = common.denormalize(view(*next(train.load([nearest.flatten()], device))))
        if rank() == 0:
            common.save_picture(args.neighbours, *pictures.unflatten(0, nearest.shape).unbind(1))
    elif args.diagnostics:  # of two random crops of up to 2048 images
        def crop(images, aspect):
            return common.normalize(common.random_resized_crop(images, aspect, size, (0.2, 1.0)))
        if len(train) < 2:
            raise Failure("--diagnostics needs two images")
        rows = rows[:: -(-len(rows) // 2048)]
        (z1,), (z2,) = (extract_features(backbone, train, rows, crop, device) for _ in range(2))
        say(", ".join(f"{sign} {value:.2f}" for sign, value in diagnostics(z1, z2).items()))
    else:
        evaluate(backbone, initial, train, test, size, device, args.labels, args.seed, args.layers,
                 args.mlp, args.steps)


if __name__ == "__main__":
    common.main(run, parse_args)
