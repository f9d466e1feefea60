"""Linear probe: what is a backbone that was trained without labels good for?

The frozen backbone encodes each image once. On its features stand a weighted kNN and a linear
classifier, beside the same network at random initialisation and raw pixels, so that one sees what
training added; and diagnostics of collapse, which need no labels.

    images ─► frozen backbone ─► features ─┬─► vote of the nearest training features ────► top-1
                  │              (N, C)    ├─► softmax regression, its penalty chosen on
                  │                        │   a held-out tenth of the training set ─────► top-1
                  │                        └─► spread, rank, alignment, uniformity
                  └─► --layers: the same top-1 after each stage (pretext tasks: best in the middle)

Run    python linear_probe.py --checkpoint runs/simclr/checkpoint.pth --data folder
       Also for files of torchvision, timm, MoCo, SimSiam, SwAV, Barlow Twins, VICReg, DINO, MAE and
       solo-learn: the architecture is read from the weights' names and shapes.
Reuse  knn, linear_probe and diagnostics take plain tensors and need only torch.

Departures: papers train the probe by SGD on augmented views, for up to a point more, and several
choose its rate on the test set. Here the features are those of the centre view, the fit has
converged (--steps shows how long SGD takes), and the test set is used once.
"""

import argparse
import copy
import hashlib
import math
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# --------------------------------------------------------------------------------------- features


@torch.no_grad()
def extract_features(backbone, image_set, image_size, device, view=None, indices=None):
    """-> features (N, C) float32 and readable (N,) bool on `device`, in the order of `indices`.

    Each of W processes encodes every W-th image and gets the rows of all. view(images, aspect)
    makes the network's input; None: the centre crop.
    """
    from common import eval_view, gather, progress, rank, world_size

    view = view or partial(eval_view, size=image_size)
    indices = torch.arange(len(image_set)) if indices is None else indices
    share = -(-len(indices) // world_size())  # of every process alike: the last rows wrap around
    mine = indices[(torch.arange(share) * world_size() + rank()) % len(indices)].split(256)
    rows, was_training = [], backbone.training
    backbone.eval()
    for images, aspect in progress(image_set.batches(mine, device), "encoding", len(mine)):
        x = view(images, aspect)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            rows.append(backbone(x).float())
    backbone.train(was_training)
    readable = [i not in image_set.unreadable for i in torch.cat(mine).tolist()]
    readable = torch.tensor(readable, dtype=torch.float32, device=device)[:, None]
    rows = gather(torch.cat([torch.cat(rows), readable], 1)).unflatten(0, (world_size(), share))
    rows = rows.transpose(0, 1).flatten(0, 1)[: len(indices)]
    return rows[:, :-1], rows[:, -1] > 0


class Stages(nn.Module):
    """The features after each stage of a backbone, side by side: (B, 3, H, W) -> (B, all of them).

    A map is averaged over a grid that leaves about `features` numbers (True: as many as the
    backbone has at its end), because more features alone raise an accuracy. ViT: mean of the
    patches and class token after each block and the last LayerNorm, and the last four class tokens
    together (DINO's probe of ViT-S). `columns`: {name: those of its features}.
    """

    def __init__(self, backbone, features=True):
        super().__init__()
        self.backbone, self.features = backbone, features
        self.train(backbone.training)  # the mode that `extract_features` restores

    def forward(self, x):
        net, outputs, found = self.backbone, [], {}
        names = getattr(net, "stages", None) or [f"blocks.{i}" for i in range(len(net.blocks))]
        hooks = [net.get_submodule(name).register_forward_hook(
            lambda module, inputs, output: outputs.append(output)) for name in names]
        end = net(x)
        for hook in hooks:
            hook.remove()
        wanted = end.shape[1] if self.features is True else self.features
        for name, z in zip(names, outputs):
            if z.dim() == 3:
                z = net.norm(z)
                found |= {f"{name} mean": z[:, 1:].mean(1), f"{name} class": z[:, 0]}
            else:
                side = min(max(round((wanted / z.shape[1]) ** 0.5), 1), z.shape[2])
                found[name] = F.adaptive_avg_pool2d(z, side).flatten(1)
        features = torch.cat(list(found.values()), 1)
        columns = torch.arange(features.shape[1]).split([z.shape[1] for z in found.values()])
        last = {"last 4 class": torch.cat(columns[1::2][-4:])} if hasattr(net, "blocks") else {}
        self.columns = last | dict(zip(found, columns))
        return features


def labelled_features(backbone, train, test, image_size, device, fraction=1.0, seed=0):
    """-> training features and labels, test features and labels; None without labels.

    fraction: of the training labels of each class, at least one. An unreadable training image is
    left out; in the test set it is an error, because leaving it out would change the accuracy.
    """
    from common import Failure

    if test is None or min(train.labels.max(), test.labels.max()) < 0:  # -1 = none
        return None
    result = []
    for images, part in (train, fraction), (test, 1):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        classes = [order[images.labels[order] == c] for c in range(images.labels.max() + 1)]
        indices = torch.cat([c[: max(1, round(part * len(c)))] for c in classes])
        features, good = extract_features(backbone, images, image_size, device, indices=indices)
        if images is test and not good.all():
            name = test.names[indices[good.int().argmin().item()]]
            raise Failure(f"test image {name!r} is unreadable; repair or remove it")
        result += [features[good], images.labels[indices].to(device)[good]]
    return result


def knn_accuracy(backbone, train, test, image_size, device):
    """kNN top-1 in percent; None without labels."""
    found = labelled_features(backbone, train, test, image_size, device)
    return found and knn(*found)


@torch.no_grad()
def calibrate_batch_norm(network, image_set, image_size, device, seed=0):
    """Give the BN layers of an untrained network the mean statistics of up to 8 batches; with the
    0 and 1 that they start from, it would be a weaker baseline than random weights are."""
    from common import eval_view

    norms = [m for m in network.eval().modules() if hasattr(m, "reset_running_stats")]
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # the mean over all batches
    order = torch.randperm(len(image_set), generator=torch.Generator().manual_seed(seed))[:2048]
    for images, aspect in image_set.batches(order.chunk(-(-len(order) // 256)), device):
        network(eval_view(images, aspect, image_size))
    network.eval()


# --------------------------------------------------------------------------------- kNN and probe


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
    """Softmax regression: yields (strength, classifier) from the strongest penalty to the weakest.

    Each minimises mean cross-entropy + strength / 2 · ‖W‖² to convergence, from the one before.
    L-BFGS works on V, where W = E diag(scale) V and E are the eigenvectors of the features'
    covariance: in V all directions curve alike, and the same optimum takes a fifth of the steps.
    """
    eigenvalues, directions = torch.linalg.eigh(features.T @ features / len(features))
    rotated = features.new_zeros(features.shape[1], classes)
    b = features.new_zeros(classes, requires_grad=True)
    for strength in (10.0**-e for e in range(7)):
        # at equal probabilities, the cross-entropy's curvature is the covariance / classes
        scale = (eigenvalues.clamp(min=0) / classes + strength).rsqrt()[:, None]
        v = (rotated / scale).requires_grad_()
        # a step that changes the loss by less than 1e-7 is lost in float32's rounding
        optimizer = torch.optim.LBFGS([v, b], max_iter=1000, tolerance_grad=1e-6,
                                      tolerance_change=1e-7, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            logits = features @ (directions @ (scale * v)) + classes**0.5 * b
            loss = F.cross_entropy(logits, labels) + strength / 2 * (scale * v).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        rotated = scale * v.detach()
        yield strength, partial(F.linear, weight=(directions @ rotated).T,
                                bias=classes**0.5 * b.detach())


def mlp_path(features, labels, classes):
    """One hidden layer of 1024 units by AdamW: yields (epoch, classifier) after each epoch."""
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Linear(features.shape[1], 1024), nn.ReLU(),
                               nn.Linear(1024, classes)).to(features)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3, weight_decay=1e-2)
    for epoch in range(1, 101):
        for rows in torch.randperm(len(features)).to(features.device).split(256):
            optimizer.zero_grad()
            F.cross_entropy(classifier(features[rows]), labels[rows]).backward()
            optimizer.step()
        yield epoch, classifier


def sgd_path(features, labels, classes, strength):
    """One strength of `linear_path` by plain SGD, from zero, in batches of 256 at a constant rate:
    yields (steps, classifier) after 10, 30, 100, ... 10,000 steps."""
    torch.manual_seed(0)
    classifier = nn.Linear(features.shape[1], classes).to(features)
    for p in classifier.parameters():
        nn.init.zeros_(p)
    # the rate that the curvature allows, which batches raise by an image's squared length / 256
    curvature = torch.linalg.eigvalsh(features.T @ features / len(features))[-1].item() / 2
    curvature += features.square().sum(1).mean().item() / 512 + 1e-6
    optimizer = torch.optim.SGD([{"params": classifier.weight, "weight_decay": strength},
                                 {"params": classifier.bias}], 1 / curvature)
    for step in range(1, 10_001):
        rows = torch.randint(len(features), (256,)).to(features.device)
        optimizer.zero_grad()
        F.cross_entropy(classifier(features[rows]), labels[rows]).backward()
        optimizer.step()
        if step in (10, 30, 100, 300, 1000, 3000, 10_000):
            yield step, classifier


def linear_probe(train_features, train_labels, test_features, test_labels, mlp=False, steps=False):
    """-> dict: probe (top-1 in percent), chosen (penalty strength; for the MLP, epochs), held_out,
    and, to show how far it has converged, steps: {steps of `sgd_path`: top-1}.

    Features (N, C), standardised by the training ones' mean and std (MAE's BN without affine);
    labels (N,) from 0; N at least 2. Settings are tried from the simplest on; the best on a tenth
    of the training images, held out (top-1 by setting), is fitted again on all of them.
    """
    variance, mean = torch.var_mean(train_features, 0, correction=0)
    x, test_x = ((z - mean) * (variance + 1e-6).rsqrt() for z in (train_features, test_features))

    @torch.no_grad()
    def top1(classifier, x, labels):
        return 100 * (classifier(x).argmax(1) == labels).sum().item() / len(labels)

    path, patience = (mlp_path, 10) if mlp else (linear_path, 2)
    y, classes, held_out = train_labels, int(train_labels.max()) + 1, {}
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(y.device)
    held, rest = order.tensor_split([max(1, len(y) // 10)])
    for setting, classifier in path(x[rest], y[rest], classes):
        held_out[setting] = top1(classifier, x[held], y[held])
        chosen = max(held_out, key=held_out.get)  # the simplest of equals
        if len(held_out) - list(held_out).index(chosen) > patience:
            break
    classifier = next(fit for setting, fit in path(x, y, classes) if setting == chosen)
    probe = top1(classifier, test_x, test_labels)
    result = {"probe": probe, "chosen": chosen, "held_out": held_out}
    if steps:
        path = sgd_path(x, y, classes, chosen)
        result["steps"] = {n: top1(fit, test_x, test_labels) for n, fit in path}
    return result


def accuracies(found, mlp=False, steps=False):
    """Of `labelled_features`' result -> knn, what `linear_probe` gives, and of an MLP top-1 and
    epochs, in one dict."""
    result = {"knn": knn(*found), **linear_probe(*found, steps=steps)}
    if mlp:
        fit = linear_probe(*found, mlp=True)
        result |= {"mlp": fit["probe"], "epochs": fit["chosen"]}
    return result


# ----------------------------------------------------------------------------------------- report


@torch.no_grad()
def diagnostics(z1, z2):
    """Signs of collapse, from the features (N, D) of two views of at least 2 images -> dict.

    spread          √D · std of unit f, mean over dimensions: 0 collapsed, 1 all directions alike
                    (between them where f comes from a ReLU)
    effective_rank  exp(entropy of the shares of the singular values), 1 to D: RankMe (2210.02885),
                    but of centred features, as a mean tells no images apart
    alignment       E ‖f(x) - f(y)‖² of unit f, over views x, y of an image: 0 invariant
    uniformity      log E exp(-2 ‖f(x) - f(y)‖²) over pairs of images: 0 collapsed, about -4 all
                    directions alike (both: Wang and Isola, 2005.10242)
    """
    singular = torch.linalg.svdvals(z1 - z1.mean(0))
    share = singular / singular.sum().clamp(min=torch.finfo(z1.dtype).tiny)
    f1, f2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    return {"spread": f1.shape[1] ** 0.5 * f1.std(0).mean().item(),
            "effective_rank": torch.special.entr(share).sum().exp().item(),
            "alignment": (f1 - f2).square().sum(1).mean().item(),
            "uniformity": F.pdist(f1).square().mul(-2).exp().mean().log().item()}


def digest(backbone):
    """16 hex digits of the SHA-256 of all weights and buffers."""
    tensors = backbone.state_dict().values()
    return hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def evaluate(backbone, initial, train, test, image_size, device, mlp=False, labels=1.0, seed=0,
             layers=False, steps=False):
    """-> dict for `print_report`: diagnostics and accuracies of the backbone, of `initial` (the
    same architecture, untrained) and of raw pixels.

    labels: fraction of the training labels to use. mlp, steps: as for `accuracies`. layers: those
    of `Stages`, too, with about so many features each; the best is chosen by held-out accuracy.
    The backbone stays frozen; `Failure` if it changed. Only rank 0 has the accuracies.
    """
    from common import (Augment, ColorJitter, Failure, Normalize, RandomHorizontalFlip,
                        RandomResizedCrop, rank)

    view = Augment([RandomResizedCrop(image_size, scale=(0.2, 1)), RandomHorizontalFlip(0.5),
                    ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), Normalize()])
    viewed = test or train
    sample = torch.arange(0, len(viewed), -(-len(viewed) // 2048))  # at most 2048, of all classes
    pixels = nn.Sequential(nn.AdaptiveAvgPool2d(16), nn.Flatten(),  # 16: better than 32 pixels
                           nn.BatchNorm1d(768, affine=False))  # standardises
    before, report = digest(backbone.eval().requires_grad_(False)), {}
    for name, network in {"trained": backbone, "random": initial, "pixels": pixels}.items():
        if network is not backbone:
            calibrate_batch_norm(network.to(device), train, image_size, device, seed)
        torch.manual_seed(seed)
        (z1, good), (z2, _) = (extract_features(network, viewed, image_size, device, view, sample)
                               for _ in range(2))
        row = report[name] = diagnostics(z1[good], z2[good])
        given = train, test, image_size, device, labels, seed
        if found := labelled_features(network, *given):
            row |= accuracies(found, mlp, steps and network is backbone) if rank() == 0 else {}
            report["images"] = [len(found[1]), len(found[3])]
            report["chance"] = 100 * found[3].bincount().max().item() / len(found[3])
        if found and layers and network is not pixels:
            stages = Stages(network, layers)
            x, y, test_x, test_y = labelled_features(stages, *given)
            row["layers"] = {name: accuracies((x[:, c], y, test_x[:, c], test_y), mlp)
                             | {"features": len(c)} for name, c in stages.columns.items()
                             if rank() == 0}
    if found := report["trained"].get("layers"):
        report["best_layer"] = max(found, key=lambda s: max(found[s]["held_out"].values()))
        report["last_layer"] = list(found)[-1]
    trainable = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    if trainable or backbone.training or digest(backbone) != before:
        raise Failure("the backbone changed while it was evaluated: the results are void")
    report["frozen"] = f"{trainable} trainable weights, SHA-256 {before} before and after"
    return report


def print_report(report):
    """A line for each representation, accuracies in percent; then the choice and the proof."""
    trained = report["trained"]
    tops = ["knn", "probe", *["mlp"] * ("mlp" in trained)]
    columns = [*tops, "spread", "effective_rank", "alignment", "uniformity"]
    print("       ", *(f"{column:>14}" for column in columns))
    for name in "trained", "random", "pixels":
        print(f"{name:7}", *(f"{report[name].get(column, math.nan):14.2f}" for column in columns))
    if "chance" in report:
        choices = ", ".join(f"{s:.2g}: {top1:.1f}" for s, top1 in trained["held_out"].items())
        print("chance {chance:.1f}; {images[0]} training, {images[1]} test images".format(**report))
        print(f"probe: chose {trained['chosen']:.2g} by held-out accuracy ({choices})")
    else:
        print("nothing to measure accuracy on: no labels, or no test images")
    if "steps" in trained:
        curve = ", ".join(f"{n}: {top1:.1f}" for n, top1 in trained["steps"].items())
        print(f"probe by steps of SGD: {curve}; converged: {trained['probe']:.1f}")
    if layers := trained.get("layers"):
        print(f"{'stage':14}", *(f"{name:>8}" for top in tops for name in (top, "random")))
        for name, row in layers.items():
            both = [r[top] for top in tops for r in (row, report["random"]["layers"][name])]
            print(f"{name:14}", *(f"{top1:8.2f}" for top1 in both), f"  {row['features']} features")
        for kind, how in ("best", " (by held-out accuracy)"), ("last", ""):
            name = report[f"{kind}_layer"]
            print(f"{kind} stage{how}: {name}, probe {layers[name]['probe']:.2f}")
    print("frozen:", report["frozen"])


def save_neighbours(rows, sets, image_size, device, path):
    """Draw eight images of the last set, each with the seven nearest of the first by cosine
    similarity. rows: the features (N, C) of each set."""
    from common import denormalize, eval_view, writing
    from torchvision.utils import save_image

    queries = torch.linspace(0, len(sets[-1]) - 1, min(8, len(sets[-1]))).long()
    similarity = F.normalize(rows[-1][queries], dim=1) @ F.normalize(rows[0], dim=1).T
    if len(sets) == 1:
        similarity[torch.arange(len(queries)), queries] = -math.inf  # it is no neighbour of itself
    nearest = similarity.topk(min(7, len(sets[0]))).indices
    query, near = (denormalize(eval_view(*next(images.batches([i.flatten()], device)), image_size))
                   for images, i in ((sets[-1], queries), (sets[0], nearest)))
    table = torch.cat([query[:, None], near.unflatten(0, nearest.shape)], 1)
    with writing(path):
        save_image(table.flatten(0, 1), path, nrow=table.shape[1], format="png")


# ------------------------------------------------------------------------------------ checkpoints


def find_weights(value, name=""):
    """Nested dicts -> {dotted name: tensor}."""
    if isinstance(value, dict):
        return {n: t for k in value for n, t in find_weights(value[k], f"{name}.{k}").items()}
    return {name[1:]: value} if isinstance(value, torch.Tensor) else {}


def read_backbone(path):
    """-> the weights of the backbone in a file, {name without prefix: tensor}; the run's arguments.

    Of several networks: DINO evaluates the teacher, BYOL and MoCo not the target or key encoder.
    """
    from common import Failure, read_file

    checkpoint = read_file(path)
    found = find_weights(checkpoint)
    first = re.compile(r"(|.*\.)(layer1\.0\.conv1|patch_embed\.proj|features\.0)\.weight")
    prefixes = [match[1] for match in map(first.fullmatch, found) if match]
    if not prefixes:
        raise Failure(f"{path} holds no backbone: no layer1.0, patch_embed.proj or features.0")
    last = re.compile("student|target|momentum|key|encoder_k")
    prefix = min(prefixes, key=lambda p: 0 if "teacher" in p else 2 if last.search(p) else 1)
    own = r"(conv1|bn1|layer\d|features|cls_token|pos_embed|patch_embed|blocks|norm)(\..+)?"
    weights = {name.removeprefix(prefix): tensor for name, tensor in found.items()
               if name.startswith(prefix) and re.fullmatch(own, name.removeprefix(prefix))}
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise Failure(f"{path} holds weights that are not finite: its training has diverged")
    args = checkpoint["args"] if isinstance(checkpoint.get("args"), dict) else {}
    bias = weights.get("patch_embed.proj.bias", torch.ones(1))
    if len(bias) == 384 and ("base_encoder" in prefix or not bias.any()):  # not trained: MoCo v3's
        args = args | {"num_heads": 12}
    return weights, args


def build(weights, args):
    """-> the untrained network with these weights' names and shapes; its image size in pixels."""

    def count(pattern):
        return len({match[1] for name in weights if (match := re.match(pattern, name))})

    if "conv1.weight" in weights:
        from common import ResNet
        from torchvision.models.resnet import BasicBlock, Bottleneck

        block = Bottleneck if "layer1.0.conv3.weight" in weights else BasicBlock
        layers = tuple(count(rf"layer{i}\.(\d+)\.") for i in range(1, 1 + count(r"layer(\d)\.")))
        channels, _, kernel, _ = weights["conv1.weight"].shape
        # the stride of a 3×3 stem leaves no trace; three stages are our resnet8 or 20, of stride 2
        stem = "imagenet" if kernel == 7 else "tiny" if len(layers) == 3 else "cifar"
        return ResNet(block, layers, channels / 64, stem), 224 if kernel == 7 else 32
    if "features.0.weight" in weights:
        from common import make_backbone

        depth = 3 + count(r"features\.(\d+)\.running_mean")
        width = max(bias.numel() for name, bias in weights.items() if name.endswith("bias")) / 512
        return make_backbone(f"vgg{depth}_bnx{width}", 224), 224
    from dino import ViT

    dim, _, patch, _ = weights["patch_embed.proj.weight"].shape
    side = patch * round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    heads = args.get("num_heads") or (16 if dim == 1280 else dim // 64)  # 1280: MAE's huge
    return ViT(side, patch, dim, count(r"blocks\.(\d+)\."), heads), side


def load_backbone(path, image_size=None):
    """-> the backbone in a file, the same untrained, the image size in pixels (None: its own)."""
    from common import Failure

    weights, args = read_backbone(path)
    try:
        backbone, size = build(weights, args)
        initial = copy.deepcopy(backbone)
        backbone.load_state_dict(weights)
    except (ImportError, LookupError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Failure(f"{path} holds no backbone that is known here: {reason}") from error
    return backbone, initial, image_size or args.get("image_size", size)


# ---------------------------------------------------------------------------------------- command


def parse_args(argv=None):
    from common import device_name, number

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE", help="checkpoint or backbone file")
    add("--data", metavar="PATH",
        help="folder of images, or name of a torchvision set; none: the small built-in set")
    add("--labels", type=number(float, 0, 1, above=True), default=1.0, metavar="FRACTION",
        help="fraction of the training labels of each class to use")
    add("--mlp", action="store_true", help="also a probe with one hidden layer of 1024 units")
    add("--layers", type=number(int, 1), nargs="?", const=True, default=False, metavar="FEATURES",
        help="also after each stage, averaged to about so many features; none: as at the end")
    add("--steps", action="store_true", help="also the probe by 10, 30, ... 10,000 steps of SGD")
    add("--features", metavar="FILE.npy", help="write all features: training, then test images")
    add("--neighbours", metavar="FILE.png", help="draw test images and their nearest neighbours")
    add("--image-size", type=number(int, 8), help="side of a view in pixels; none: as in training")
    add("--max-images", type=number(int, 2), help="use only this many training images")
    add("-j", "--workers", type=number(int, 0), default=4, help="processes that decode images")
    add("--device", type=device_name, help="cpu, cuda or cuda:N; none: CUDA where there is one")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of random weights and views")
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args([re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word)
                              for word in words])  # --max_images is --max-images
    if args.data == "":
        parser.error("--data is empty")
    return args


def run(args):
    from common import Failure, load_data, rank, start_processes, writing

    for path in filter(None, (args.features, args.neighbours)):
        if not Path(path).absolute().parent.is_dir():
            raise Failure(f"cannot write {path}: no such folder")  # at once, not after hours
    device = start_processes(args.device)
    torch.manual_seed(args.seed)  # of the random initialisation
    backbone, initial, size = load_backbone(args.checkpoint, args.image_size)
    train, test = load_data(args.data, size, args.max_images, args.workers, device)
    backbone = backbone.to(device)
    report = evaluate(backbone, initial, train, test, size, device, args.mlp, args.labels,
                      args.seed, args.layers, args.steps)
    if rank() == 0:
        print_report(report)
    if args.features or args.neighbours:
        sets = [train] if test is None else [train, test]
        rows = [extract_features(backbone, images, size, device)[0].cpu() for images in sets]
    if args.features and rank() == 0:
        with writing(args.features):
            np.save(args.features, torch.cat(rows).numpy())
    if args.neighbours and rank() == 0:
        save_neighbours(rows, sets, size, device, args.neighbours)


if __name__ == "__main__":
    from common import main

    main(run, parse_args)
