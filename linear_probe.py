"""Linear probe: what is a backbone that was trained without labels good for?

The frozen backbone encodes each image once. On its features stand a weighted kNN and a linear
classifier, beside the same network at random initialisation and raw pixels, so that one sees what
training added.

    images ─► frozen backbone ─► features ─┬─► vote of the nearest training features ────► top-1
                  │              (N, C)    └─► softmax regression, its penalty chosen on
                  │                            a held-out tenth of the training set ─────► top-1
                  └─► --layers: the same top-1 after each stage (pretext tasks: best in the middle)

Run    python linear_probe.py --checkpoint runs/simclr/backbone.pth --data folder
       Also for files of torchvision, timm, MoCo, SimSiam, SwAV, Barlow Twins, VICReg, DINO, MAE and
       solo-learn: the architecture is read from the weights' names and shapes.
       --features embeddings.npz writes what the backbone makes of each image, with file names.

Departures: papers train the probe by SGD on augmented views, for up to a point more, and several
choose its rate on the test set. Here the features are those of the centre view, the fit has
converged (--steps shows how long SGD takes), and the test set is used once.
"""

import copy
import math
import os
import re
import sys
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

import common
from common import Failure, progress, rank, say, world_size

# --------------------------------------------------------------------------------------- features


def centre_view(images, aspect, image_size):
    """What evaluation sees: the central square, normalised."""
    return common.normalize(common.central_crop(images, aspect, image_size))


@torch.no_grad()
def extract_features(network, images, indices, view, device):
    """-> features (N, C) float32 and readable (N,) bool on `device`, in the order of `indices`.

    Each of W processes encodes every W-th image and gets the rows of all. view(images, aspect)
    makes the network's input.
    """
    (first,) = images.load([indices[:1]], device)
    features = torch.zeros(len(indices), network(view(*first)).shape[1], device=device)
    readable = torch.zeros(len(indices), device=device)
    mine = torch.arange(rank(), len(indices), world_size()).split(256)
    loaded = images.load([indices[rows] for rows in mine], device)
    for rows, batch in zip(mine, progress(loaded, "encoding", len(mine))):
        x, rows = view(*batch), rows.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features[rows] = network(x).float()
        readable[rows] = torch.tensor([float(i not in images.unreadable)
                                       for i in indices[rows.cpu()].tolist()], device=device)
    if world_size() > 1:
        dist.all_reduce(features)  # in place: the rows of a million images are gigabytes
        dist.all_reduce(readable)
    return features, readable > 0


class Stage(nn.Module):
    """The features after some stages of a backbone: (B, 3, H, W) -> (B, C).

    A map is averaged over a grid that leaves about `size` numbers, because more features alone
    raise an accuracy. Of a ViT's tokens, after its last LayerNorm, the mean of the patches or the
    class token; of several blocks, side by side.
    """

    def __init__(self, backbone, stages, readout, size):
        super().__init__()
        self.backbone, self.stages, self.readout, self.size = backbone, stages, readout, size

    def forward(self, x):
        outputs = []
        hooks = [self.backbone.get_submodule(stage).register_forward_hook(
            lambda module, inputs, output: outputs.append(output)) for stage in self.stages]
        self.backbone(x)
        for hook in hooks:
            hook.remove()
        if self.readout == "map":
            side = min(max(round((self.size / outputs[0].shape[1]) ** 0.5), 1), outputs[0].shape[2])
            return F.adaptive_avg_pool2d(outputs[0], side).flatten(1)
        norm = getattr(self.backbone, "norm", None) or self.backbone.encoder.ln
        tokens = [norm(output) for output in outputs]
        return torch.cat([z[:, 0] if self.readout == "class" else z[:, 1:].mean(1)
                          for z in tokens], 1)


def stages_of(backbone, size):
    """{name: network that ends there}, with about `size` features each; a ViT has two readouts of
    each block, and the last four class tokens together (DINO's probe of ViT-S)."""
    names = getattr(backbone, "stages", [])
    if not hasattr(backbone, "blocks") and not hasattr(backbone, "encoder"):
        return {name: Stage(backbone, [name], "map", size) for name in names}
    found = {f"{name} {readout}": Stage(backbone, [name], readout, size)
             for name in names for readout in ("mean", "class")}
    return found | {"last 4 class": Stage(backbone, names[-4:], "class", size)}


@torch.no_grad()
def calibrate_batch_norm(network, images, image_size, device, seed=0):
    """Give the BN layers of an untrained network the mean statistics of up to 8 batches; with the
    0 and 1 that they start from, it would be a weaker baseline than random weights are."""
    norms = [m for m in network.eval().modules() if hasattr(m, "reset_running_stats")]
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # the mean over all batches
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:2048]
    for batch in images.load(order.chunk(-(-len(order) // 256)), device):
        network(centre_view(*batch, image_size))
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
    result = {"probe": top1(classifier, test_x, test_labels), "chosen": chosen, "held_out": held_out}
    if steps:
        path = sgd_path(x, y, classes, chosen)
        result["steps"] = {n: top1(fit, test_x, test_labels) for n, fit in path}
    return result


# ----------------------------------------------------------------------------------------- report


def alignment(z1, z2, alpha=2):
    """E ‖f(x) - f(y)‖^α of unit f, over views x, y of an image: 0 invariant (2005.10242)."""
    return (F.normalize(z1, dim=1) - F.normalize(z2, dim=1)).norm(dim=1).pow(alpha).mean()


def uniformity(z, t=2):
    """log E exp(-t ‖f(x) - f(y)‖²) of unit f over pairs of images: 0 collapsed, about -4 spread in
    all directions (2005.10242)."""
    return F.pdist(F.normalize(z, dim=1)).square().mul(-t).exp().mean().log()


@torch.no_grad()
def diagnostics(z1, z2):
    """Signs of collapse, from the features (N, D) of two views of at least 2 images -> dict.

    spread          √D · std of unit f, mean over dimensions: 0 collapsed, 1 all directions alike
                    (between them where f comes from a ReLU)
    effective_rank  exp(entropy of the shares of the singular values), 1 to D: RankMe (2210.02885),
                    but of centred features, as a mean tells no images apart
    """
    singular = torch.linalg.svdvals(z1 - z1.mean(0))
    share = singular / singular.sum().clamp(min=torch.finfo(z1.dtype).tiny)
    f1 = F.normalize(z1, dim=1)
    return {"spread": f1.shape[1] ** 0.5 * f1.std(0).mean().item(),
            "effective rank": torch.special.entr(share).sum().exp().item(),
            "alignment": alignment(z1, z2).item(), "uniformity": uniformity(z1).item()}


def labelled(images, fraction=1.0, seed=0):
    """-> indices of the images with a label; of each class a fraction, at least one."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    classes = [order[images.labels[order] == c] for c in range(images.labels.max() + 1)]
    return torch.cat([c[: max(1, round(fraction * len(c)))] for c in classes])


def evaluate(backbone, initial, train, test, image_size, device, labels=1.0, seed=0, mlp=False,
             layers=False, steps=False):
    """Prints and returns what the frozen backbone, `initial` (the same network, untrained) and raw
    pixels are worth: {name: accuracies}; the images; with `layers`, the best stage by held-out
    accuracy. labels: fraction of the training labels to use. Only the first process has it all."""
    if test is None:
        say("No labels to evaluate with. Look at nearest neighbours (linear_probe.py --neighbours), "
            "take the features (--features), or give it a folder with classes.")
        return {}
    pixels = nn.Sequential(nn.AdaptiveAvgPool2d(16), nn.Flatten(),  # 16: better than 32 pixels
                           nn.BatchNorm1d(768, affine=False))  # standardises
    view = partial(centre_view, image_size=image_size)
    rows = labelled(train, labels, seed), labelled(test, 1.0, seed)
    backbone.eval().requires_grad_(False)

    def worth(network):
        (x, good), (test_x, test_good) = (extract_features(network, images, indices, view, device)
                                          for images, indices in zip((train, test), rows))
        y, test_y = train.labels[rows[0]].to(device), test.labels[rows[1]].to(device)
        given = x[good], y[good], test_x[test_good], test_y[test_good]
        if rank() > 0:
            return {}
        found = {"knn": knn(*given), **linear_probe(*given, steps=steps and network is backbone)}
        if mlp:
            found |= {"mlp": (fit := linear_probe(*given, mlp=True))["probe"], "epochs": fit["chosen"]}
        return found | {"features": x.shape[1]}

    report = {}
    for name, network in {"trained": backbone, "random": initial, "pixels": pixels}.items():
        if network is not backbone:
            calibrate_batch_norm(network.to(device), train, image_size, device, seed)
        report[name] = worth(network)
        if layers and network is not pixels:
            size = layers if layers > 1 else backbone.feature_dim
            report[name]["layers"] = {stage: worth(net) for stage, net
                                      in stages_of(network, size).items()}
    report["images"] = [len(indices) for indices in rows]
    report["chance"] = 100 * test.labels[rows[1]].bincount().max().item() / len(rows[1])
    if rank() == 0:
        print_report(report)
    return report


def print_report(report):
    """A row for each representation, top-1 in percent; how they were obtained; then the stages."""
    trained, tops = report["trained"], ["knn", "probe", *["mlp"] * ("mlp" in report["trained"])]
    print(f"{'':8}{'kNN':>8}{'linear probe':>16}" + f"{'MLP probe':>14}" * ("mlp" in trained))
    for name in "trained", "random", "pixels":
        print(f"{name:8}" + "".join(f"{report[name][top]:{width}.1f}"
                                    for top, width in zip(tops, (8, 16, 14))))
    print("Percent right of {1:,} test images (chance: {2:.1f}), by a vote of the 200 nearest of {0:,} "
          "training images\nand by a linear classifier, on frozen features; of this network trained, "
          "of the same at random, of raw pixels.".format(*report["images"], report["chance"]))
    if "steps" in trained:
        curve = ", ".join(f"{n}: {top1:.1f}" for n, top1 in trained["steps"].items())
        print(f"linear probe by steps of SGD: {curve}; converged: {trained['probe']:.1f}")
    if stages := trained.get("layers"):
        print(f"{'stage':24}" + "".join(f"{top:>8}{'random':>8}" for top in tops) + "  features")
        for name, row in stages.items():
            both = [r[top] for top in tops for r in (row, report["random"]["layers"][name])]
            print(f"{name:24}" + "".join(f"{top1:8.1f}" for top1 in both), f"{row['features']:9}")
        best = max(stages, key=lambda name: max(stages[name]["held_out"].values()))
        report["best_layer"], report["last_layer"] = best, list(stages)[-1]
        print(f"best stage by held-out training images: {best}, linear probe "
              f"{stages[best]['probe']:.1f} (random {report['random']['layers'][best]['probe']:.1f})")


def save_features(backbone, sets, root, view, device, path):
    """One .npz for all sets: features (N, C), names, labels (-1: none) and classes, in the order of
    the files' names; unreadable images are left out."""
    rows = []
    for images in sets:
        features, good = extract_features(backbone, images, torch.arange(len(images)), view, device)
        names = [os.path.relpath(source, root) if isinstance(source, str) else name
                 for source, name in zip(images.source, images.names)]
        rows += zip(names, images.labels.tolist(), features.cpu().numpy(), good.tolist())
    rows = sorted((row for row in rows if row[3]), key=lambda row: row[0])
    names, labels, features, _ = zip(*rows)
    if rank() == 0:
        with common.writing(path), open(path, "wb") as file:
            np.savez(file, features=np.stack(features), names=np.array(names),
                     labels=np.array(labels), classes=np.array(sets[0].classes))
        print(f"wrote {len(rows):,} rows of {len(features[0])} features to {path}")


def save_neighbours(backbone, train, test, image_size, device, path):
    """Draw eight images, of the test set where there is one, each with its seven nearest of the
    training set by cosine similarity."""
    view, queries = partial(centre_view, image_size=image_size), test or train
    some = torch.arange(0, len(queries), -(-len(queries) // 8))
    (x, _), (bank, _) = (extract_features(backbone, images, rows, view, device) for images, rows
                         in ((queries, some), (train, torch.arange(len(train)))))
    similarity = F.normalize(x, dim=1) @ F.normalize(bank, dim=1).T
    if test is None:
        similarity[torch.arange(len(some)), some] = -math.inf  # it is no neighbour of itself
    nearest = similarity.topk(min(7, len(train))).indices.cpu()
    query, near = (common.denormalize(view(*next(images.load([rows.flatten()], device))))
                   for images, rows in ((queries, some), (train, nearest)))
    if rank() == 0:
        common.save_picture(path, query, *near.unflatten(0, nearest.shape).unbind(1))


# ------------------------------------------------------------------------------------ checkpoints

TIMM_NAMES = {  # parts of timm's names, as patterns, and torchvision's
    r"cls_token": "class_token", r"pos_embed": "encoder.pos_embedding",
    r"patch_embed\.proj": "conv_proj", r"norm": "encoder.ln",
    r"blocks\.(\d+)": r"encoder.layers.encoder_layer_\1", r"norm1": "ln_1", r"norm2": "ln_2",
    r"attn\.qkv\.": "self_attention.in_proj_", r"attn\.proj": "self_attention.out_proj",
    r"mlp\.fc1": "mlp.0", r"mlp\.fc2": "mlp.3"}


def timm_to_torchvision(weights):
    """{name in timm's ViT: tensor} -> {name in torchvision's: tensor}; torchvision's stay as they
    are. What it has no name for (layer scale, norms of q and k) a strict load will refuse."""
    renamed = {}
    for name, tensor in weights.items():
        for timm, torchvision in TIMM_NAMES.items():
            name = re.sub(rf"\b{timm}\b", torchvision, name)
        renamed[name] = tensor
    return renamed


def find_weights(value, name=""):
    """Nested dicts -> {dotted name: tensor}."""
    if isinstance(value, dict):
        return {n: t for k in value for n, t in find_weights(value[k], f"{name}.{k}").items()}
    return {name[1:]: value} if isinstance(value, torch.Tensor) else {}


def read_backbone(path):
    """-> the weights of the backbone in a file, {name without prefix: tensor}, and what else is
    known of it: arguments of the run, num_heads, stem_padding.

    Of several networks: DINO evaluates the teacher, BYOL and MoCo not the target or key encoder.
    """
    checkpoint = common.read_file(path)
    if isinstance(checkpoint, nn.Module) or not isinstance(checkpoint, dict):
        raise Failure(f"{path} holds a {type(checkpoint).__name__}: save its state_dict()")
    found = find_weights(checkpoint)
    first = re.compile(r"(|.*\.)(layer1\.0\.conv1|patch_embed\.proj|conv_proj|features\.0.*)\.weight")
    prefixes = [match[1] for match in map(first.fullmatch, found) if match]
    last = re.compile("student|target|momentum|key|encoder_k")
    prefix = min(prefixes, key=lambda p: 0 if "teacher" in p else 2 if last.search(p) else 1, default="")
    weights = {name.removeprefix(prefix): tensor for name, tensor in found.items()
               if name.startswith(prefix)}
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise Failure(f"{path} holds weights that are not finite: its training has diverged")
    head = re.compile(r"(fc|head|heads|classifier|proj|pred|decoder|mask_token|prototypes|queue|fc_norm)")
    unused = sorted({name.split(".")[0] for name in weights if head.match(name)})
    if unused:
        say(f"{path}: not used: {', '.join(unused)}")
    weights = {name: tensor for name, tensor in weights.items() if not head.match(name)}
    known = dict(checkpoint["args"]) if isinstance(checkpoint.get("args"), dict) else {}
    bias = weights.get("patch_embed.proj.bias", weights.get("conv_proj.bias", torch.ones(1)))
    if len(bias) == 384 and ("base_encoder" in prefix or not bias.any()):  # not trained: MoCo v3's
        known["num_heads"] = 12
    known["stem_padding"] = 2 if "pytorch-lightning_version" in checkpoint else 1  # solo-learn's
    return weights, known


def build(weights, known, image_size=None):
    """-> the untrained network with these weights' names and shapes; its image size in pixels."""

    def count(pattern):
        return len({match[1] for name in weights if (match := re.match(pattern, name))})

    if known.get("arch", "resnet").split("x")[0] not in (*common.DEPTHS, "resnet") and "conv_proj.weight" not in weights:
        size = image_size or known.get("image_size", 224)
        return common.make_backbone(known["arch"], size), size
    if "conv1.weight" in weights:
        block = Bottleneck if "layer1.0.conv3.weight" in weights else BasicBlock
        layers = tuple(count(rf"layer{i}\.(\d+)\.") for i in range(1, 1 + count(r"layer(\d)\.")))
        channels, _, kernel, _ = weights["conv1.weight"].shape
        # the stride of a 3×3 stem leaves no trace; three stages are our resnet8 or 20, of stride 2
        stem = "imagenet" if kernel == 7 else "tiny" if len(layers) == 3 else "cifar"
        network = common.ResNet(block, layers, channels / 64, stem)
        if kernel == 3:
            network.conv1.padding = (known["stem_padding"],) * 2
            say(f"assuming that the 3x3 stem pads by {known['stem_padding']} (--stem-padding)")
        return network, image_size or known.get("image_size", 224 if kernel == 7 else 32)
    dim, _, patch_size, _ = weights["conv_proj.weight"].shape
    grid = round((weights["encoder.pos_embedding"].shape[1] - 1) ** 0.5)
    num_heads = known.get("num_heads") or (16 if dim == 1280 else dim // 64)  # 1280: MAE's huge
    size = image_size or known.get("image_size", grid * patch_size)
    if size % patch_size:
        raise Failure(f"--image-size {size} is no multiple of the ViT's patches of {patch_size} pixels")
    network = VisionTransformer(size, patch_size, count(r"encoder\.layers\.(\w+)\."), num_heads, dim,
                                4 * dim)
    network.heads, network.feature_dim = nn.Identity(), dim
    network.stages = [f"encoder.layers.{name}" for name, _ in network.encoder.layers.named_children()]
    return network, size


def load_backbone(path, image_size=None, **more):
    """-> the backbone in a file, the same untrained, the image size in pixels (None: its own).
    more: what the file does not tell, arch or stem_padding."""
    weights, known = read_backbone(path)
    known |= {name: value for name, value in more.items() if value is not None}
    if "patch_embed.proj.weight" in weights:
        weights = timm_to_torchvision(weights)
    try:
        backbone, size = build(weights, known, image_size)
        initial = copy.deepcopy(backbone)
        if isinstance(backbone, VisionTransformer):
            weights = interpolate_embeddings(size, backbone.patch_size, weights)
        backbone.load_state_dict(weights)
    except (AssertionError, LookupError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Failure(f"{path} holds no backbone that is known here (--arch?): {reason}") from error
    return backbone, initial, size


def load_init(backbone, path):
    """The weights of --init into a method's backbone; nothing without a path."""
    if path:
        weights, _ = read_backbone(path)
        if isinstance(backbone, VisionTransformer):
            weights = timm_to_torchvision(weights)
        try:
            backbone.load_state_dict(weights)
        except RuntimeError as error:
            raise Failure(f"--init {path} does not fit --arch: {' '.join(str(error).split())[:200]}")


# ---------------------------------------------------------------------------------------- command

FLAGS = {name: common.FLAGS[name] for name in ("data", "image_size", "max_images", "workers",
                                               "device", "seed")} | {
    "checkpoint": (str, None, None, "checkpoint or backbone file"),
    "arch": (common.architecture, None, None, "network of the file, where it does not tell"),
    "stem_padding": (int, 1, 2, "of a 3x3 stem, which leaves no trace; 2 is solo-learn's"),
    "labels": (float, 1e-6, 1, "fraction of the training labels of each class to use"),
    "mlp": (bool, None, None, "also a probe with one hidden layer of 1024 units"),
    "layers": (int, 1, 10**6, "also after each stage, averaged to so many features; 1: as at the end"),
    "steps": (bool, None, None, "also the probe by 10, 30, ... 10,000 steps of SGD"),
    "diagnostics": (bool, None, None, "also signs of collapse, which need no labels"),
    "features": (str, None, None, "write the features of all images to this .npz, with names"),
    "neighbours": (str, None, None, "draw images and their nearest neighbours to this .png"),
}


def parse_args(argv=None):
    words = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word)
             for word in (sys.argv[1:] if argv is None else argv)]
    args = common.parse(words, FLAGS, {"labels": 1.0, "seed": 0, "workers": 4}, __doc__)
    if not args.checkpoint:
        common.wrong_arguments("--checkpoint is needed")
    return args


def run(args):
    device = common.start(args.device, args.seed)
    backbone, initial, size = load_backbone(args.checkpoint, args.image_size, arch=args.arch,
                                            stem_padding=args.stem_padding)
    train, test = common.load_data(args.data, size, args.max_images, args.workers, device)
    backbone = backbone.to(device).eval()
    view = partial(centre_view, image_size=size)
    if args.features:
        save_features(backbone, [train, test] if test else [train], args.data, view, device, args.features)
    if args.neighbours:
        save_neighbours(backbone, train, test, size, device, args.neighbours)
    if args.diagnostics:
        ...
    if not (args.features or args.neighbours) or ...:
        evaluate(backbone, initial, train, test, size, device, args.labels, args.seed, args.mlp,
                 args.layers, args.steps)


if __name__ == "__main__":
    common.main(run, parse_args)
