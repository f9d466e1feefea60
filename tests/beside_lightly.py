"""What benchmark.py runs of lightly to measure beside it: its example of a training loop, and its
losses and heads in our scripts."""

import importlib
import itertools
import json
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from statistics import mean
from time import perf_counter as clock
from unittest import mock

import torch
from torch import nn
from torchvision.datasets import ImageFolder


def peer_loop(data, batch, workers, threads, steps):
    """lightly's example of SimCLR on our network: images/s, after its first full queue."""
    from common import make_backbone
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform
    from simclr import SimCLR

    torch.set_num_threads(threads)
    backbone = make_backbone("resnet8", 32)
    model = SimCLR(backbone, backbone.feature_dim)
    transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)
    loader = torch.utils.data.DataLoader(ImageFolder(Path(data, "train"), transform), batch, True,
                                         num_workers=workers, drop_last=True)
    criterion = NTXentLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    warm = 8 + 2 * workers
    times = []
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for (view1, view2), _ in itertools.islice(epochs, warm + steps):
        z1 = model.projector(model.backbone(view1))
        z2 = model.projector(model.backbone(view2))
        loss = criterion(z1, z2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(clock())
    return batch * steps / (times[-1] - times[warm - 1])


HEADS = {  # method: its class, where its heads are, and lightly's
    "simclr": ("SimCLR", {"projector": "SimCLRProjectionHead"}),
    "moco": ("MoCo", {"online.1": "MoCoProjectionHead", "target.1": "MoCoProjectionHead"}),
    "byol": ("BYOL", {"online.projector": "BYOLProjectionHead", "predictor": "BYOLPredictionHead",
                      "target.projector": "BYOLProjectionHead"}),
    "simsiam": ("SimSiam", {"projector": "SimSiamProjectionHead",
                            "predictor": "SimSiamPredictionHead"}),
    "swav": ("SwAV", {"projector": "SwaVProjectionHead", "prototypes": "SwaVPrototypes"}),
    "barlow": ("BarlowTwins", {"projector": "BarlowTwinsProjectionHead"}),
    "dino": ("DINO", {"student.head": "DINOProjectionHead", "teacher.head": "DINOProjectionHead"})}


def peer_head(name, ours):
    """lightly's head, with the widths and weights of ours; a bias that ours lacks starts at 0."""
    from lightly.models.modules import heads

    def layers(head):
        return [m for m in head.modules() if getattr(m, "weight", None) is not None]

    linear = [layer for layer in layers(ours) if isinstance(layer, nn.Linear)]
    widths = [linear[0].in_features] + [layer.out_features for layer in linear]
    if len(widths) > 3:  # the second hidden layer is as wide as the first
        del widths[2]
    options = {"batch_norm": True} if "DINO" in name else {}
    theirs = getattr(heads, name)(*widths, **options)
    for old, new in zip(layers(ours), layers(theirs), strict=True):
        getattr(new, "weight_v", new.weight).data.copy_(old.weight)  # weight norm's g stays 1
        if new.bias is not None:
            new.bias.data.copy_(0 * new.bias if old.bias is None else old.bias)
    if not linear[0].weight.requires_grad:
        theirs.requires_grad_(False)
    return theirs.heads[0] if name == "SwaVPrototypes" else theirs


class BatchNormPerView(nn.modules.batchnorm._BatchNorm):
    """BN of each half of the batch by itself, as in a pass per view."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        views = x.chunk(2) if self.training else [x]
        return torch.cat([super(BatchNormPerView, self).forward(view) for view in views])


def peer_losses(recipe, state):
    """-> {method: lightly's loss, with the arguments of ours}."""
    import lightly.loss as L

    cosine = L.NegativeCosineSimilarity()

    def simclr(z1, z2, temperature):
        return L.NTXentLoss(temperature)(z1, z2)

    def moco(query, key, queue, temperature):
        return state(query, key)

    def byol(p1, p2, z1, z2):
        return 4 + 2 * (cosine(p1, z2) + cosine(p2, z1))

    def simsiam(p1, p2, z1, z2):
        return (cosine(p1, z2.detach()) + cosine(p2, z1.detach())) / 2

    def swav(scores, codes, temperature):
        loss = L.SwaVLoss(temperature, recipe.sinkhorn_iterations, recipe.epsilon)
        return loss([*scores], [])[0]

    def barlow(z1, z2, off_diagonal_weight):
        return L.BarlowTwinsLoss(off_diagonal_weight)(z1, z2)

    def dino(student, teacher, center, student_temperature, teacher_temperature):
        return state([*teacher], [*student], teacher_temperature)

    return {"simclr": simclr, "moco": moco, "byol": byol, "simsiam": simsiam, "swav": swav,
            "barlow": barlow, "dino": dino}


@contextmanager
def lightly_in(method, its_passes=True):
    """Puts lightly's loss and heads into a method's file, and BN as in its passes."""
    import lightly.loss as L

    module = importlib.import_module(method)
    name, heads = HEADS[method]
    recipe = module.parse_args(["--recipe", "cpu"])
    state = None  # MoCo's queue, DINO's center
    if method == "moco":
        state = L.NTXentLoss(recipe.temperature, (recipe.queue_size, recipe.proj_dim))
    if method == "dino":
        state = L.DINOLoss(recipe.out_dim, student_temp=recipe.student_temperature,
                           center_momentum=recipe.center_momentum)

    class Peer(getattr(module, name)):
        def __init__(self, *inputs, **options):
            super().__init__(*inputs, **options)
            for path, head in heads.items():
                self.set_submodule(path, peer_head(head, self.get_submodule(path)))
            if method == "moco":
                state.memory_bank.bank = self.queue.clone()
            if not its_passes:
                return
            for norm in self.modules():
                if method == "moco" and isinstance(norm, nn.BatchNorm2d):
                    norm.__class__ = nn.BatchNorm2d
                elif method in ("simclr", "swav", "dino") and hasattr(norm, "running_mean"):
                    norm.__class__ = BatchNormPerView

    losses = peer_losses(recipe, state)
    with mock.patch.multiple(module, **{name: Peer, f"{method}_loss": losses[method]}):
        yield


def gradients(method, flags):
    """-> how far lightly's gradient of the backbone is from ours in the first step, in float64: the
    largest difference over the largest value of ours, with our passes and with lightly's."""
    from benchmark import drive
    from common import ResNet

    found = []

    def visit(model, items):
        yield next(items)
        backbone = next(m for m in model.modules() if isinstance(m, ResNet))
        found.append([p.grad for p in backbone.parameters()])

    torch.set_default_dtype(torch.float64)
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        for peer in nullcontext(), lightly_in(method, its_passes=False), lightly_in(method):
            with peer:
                drive(method, flags, visit)
    torch.set_default_dtype(torch.float32)
    ours, *peers = found
    largest = []
    for theirs in peers:
        differences = [(t - o).abs().max() / o.abs().max() for t, o in zip(theirs, ours)]
        largest.append(max(differences).item())
    return largest


def learning(args):
    """Data, augmentation, backbone, first weights, optimizer and steps are the same, five epochs of
    the cpu recipe with its standard values; lightly's are the loss (times 4 for BYOL, as ours is),
    the heads, MoCo's queue, DINO's center, and the passes. In SimCLR, SwAV and DINO we, like the
    official codes, take both views in one pass, and they share BN statistics; lightly makes a pass
    for each. In MoCo its BN has one group. SimSiam has lightly's three layers in both. The
    gradients are compared at equal weights: with our passes, where only rounding may differ, and
    with lightly's."""
    from benchmark import has, show
    from results.measure import STANDARD

    rows = []
    methods = [method for method in args.methods if method in HEADS]
    if not has("lightly"):
        methods = []
    for method in methods:
        flags = f"--recipe cpu {STANDARD.get(method, '')} --epochs 5".split()
        flags += ["--device", "cpu", "--max-images", str(args.images)]
        flags += ["--data", args.data]
        if method == "simsiam":
            flags += ["--proj-layers", "3"]
        module = importlib.import_module(method)
        row = {"method": method}
        for name, peer in ("ours", nullcontext), ("lightly", partial(lightly_in, method)):
            reports = []
            for seed in range(args.rounds):
                run = module.parse_args([*flags, "--seed", str(seed)])
                with peer(), redirect_stdout(None):
                    module.train(run)
                last = Path(run.out, "log.jsonl").read_text().splitlines()[-1]
                reports.append(json.loads(last)["report"]["trained"])
            for key in "knn", "probe":
                row[f"{key}, {name}"] = mean(report[key] for report in reports)
        row["gradient"], row["gradient, its passes"] = gradients(method, flags)
        rows.append(row)
    show(f"Learning, {args.images:,} images, percent right, means of {args.rounds} seeds", rows)
