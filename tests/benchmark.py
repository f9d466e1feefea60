"""How fast the scripts are on a CPU, beside their peers and beside what it could do at most; and
how well they learn, beside lightly.

    python tests/benchmark.py COMMAND --data CIFAR --photos FOLDER

CIFAR is CIFAR-10 as JPEG or PNG files, CIFAR/train/<class>/ and CIFAR/test/<class>/; FOLDER holds
full-size photographs. Commands:

    augmentation   views/s on one core: ours, lightly, kornia, torchvision; deviation per operation
    loop           training of one network on the same files: simclr.py, and lightly's example
    step           each method's step, and the same step without augmentation; share of GEMM rate
    start          from the command to the first step and to the report; memory
    evaluation     kNN and probe on features encoded once; re-encoding in each of 100 epochs
    scaling        time and memory against images, batch, resolution and processes
    network        on paper: bytes that each of 8 GPUs sends per step (nothing is sent)
    learning       seven methods on an equal budget, with their loss and heads and with lightly's

A shared machine's speed varies by factors within seconds, so only ratios mean anything. Contestants
alternate, in an order that reverses from round to round; each figure is the median of the rounds,
and the matrix product (GEMM) that was timed beside each round shows how steady the machine was.
What takes minutes is measured once: scaling, evaluation and start's report.
Nothing is installed: a row whose peer is missing is left out, and a line says how to get it.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from statistics import mean, median
from time import perf_counter as clock
from timeit import repeat
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CLASSES = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "simsiam": "SimSiam", "swav": "SwAV",
           "barlow": "BarlowTwins", "dino": "DINO"}
METHODS = [*CLASSES, "mae", "rotation", "jigsaw"]
CPU, CORES = torch.device("cpu"), os.cpu_count()

# --------------------------------------------------------------------------- measuring and printing


def gemm_rate():
    """FLOP/s of the best of three float32 products of 2048 x 2048."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / min(repeat(lambda: a @ a, number=1, repeat=3))


def alternate(contestants, rounds):
    """{name: function -> figure} -> {name: [a figure per round]}; a GEMM's FLOP/s of each round."""
    figures, gemm = {name: [] for name in contestants}, []
    for r in range(rounds):
        gemm.append(gemm_rate())
        for name in list(contestants)[:: 1 - 2 * (r % 2)]:
            figures[name].append(contestants[name]())
    return figures, gemm


def show(title, rows, gemm=()):
    """Print rows (dicts, first key: what the row is) as a markdown table."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in
                ("torch", "lightly", "kornia") if importlib.util.find_spec(name)]
    print(f"\n**{title}** · {cpu}, {CORES} cores,", ", ".join(versions))
    if gemm:
        print("GEMM beside the rounds, GFLOP/s:", ", ".join(f"{g / 1e9:,.0f}" for g in gemm))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[cell(row.get(column, "")) for column in columns] for row in rows]
    for line in [], columns, ["---"] * len(columns), *cells:
        print(*line, sep=" | ", flush=True)


def cell(value):
    """A number with two significant digits at least; nothing for 0, which is not known."""
    if not isinstance(value, float):
        return str(value)
    digits = 2 - math.floor(math.log10(abs(value) or 1))
    return f"{value:.1e}" if digits > 5 else f"{value:,.{max(0, digits)}f}"


def has(package):
    """Whether a peer is installed; says how to get it."""
    if not (found := importlib.util.find_spec(package)):
        print(f"{package} is left out; to have it, pip install {package}")
    return bool(found)


# --------------------------------------------------------------- scripts, driven from the outside


def script(method, flags, batch=None, steps=None, processes=0):
    """Run a script, to this step where it is given -> dict: seconds to the first step and to the
    end, peak MiB of the process (Linux), images/s of all steps but the first five, --out."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *torchrun * bool(processes), str(ROOT / f"{method}.py"), *flags]
    command += ["--device", "cpu", "--out", out := tempfile.mkdtemp(dir=".")]
    command += ["-b", str(batch)] * bool(batch) + ["-p", "5"] * bool(steps)
    begin, found = clock(), {"out": out}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            with suppress(OSError, IndexError):  # not ru_maxrss, which starts at the parent's
                status = Path(f"/proc/{process.pid}/status").read_text()
                found["peak, MiB"] = int(status.partition("VmHWM:")[2].split()[0]) / 1024
            if "step 1/" in line:
                found["first step, s"] = clock() - begin
            if steps and f"step {steps}/" in line:
                process.terminate()
                break
        found["end, s"] = clock() - begin
    if "first step, s" not in found:
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}")
    if batch:
        lines = map(json.loads, Path(out, "log.jsonl").read_text().splitlines())
        seconds = {line["step"]: line["seconds"] for line in lines}
        found["images/s"] = batch * (steps - 5) / (seconds[steps] - seconds[5])
    return found


class Done(Exception):
    """Ends a run, out of the middle of its loop."""


def drive(method, flags, visit):
    """`method`.train with `flags`; its loop gets the items that visit(model, args, items) yields,
    then ends."""
    common, module = importlib.import_module("common"), importlib.import_module(method)
    batches, parallel, models = common.batches, common.parallel, []

    def wrapped(model, *options, **more):
        models.append(model)
        return parallel(model, *options, **more)

    def visited(images, args, *rest):
        yield from visit(models[0], args, batches(images, args, *rest))
        raise Done

    with mock.patch.multiple(common, batches=visited, parallel=wrapped), suppress(Done), \
            redirect_stdout(None):
        module.train(module.parse_args([*flags, "--device", "cpu"]))


def timed_steps(method, flags, rounds, count):
    """-> [(seconds per step, of which in `augment`, GEMM rate) of each round], FLOP, batch size."""
    module, found, spent = importlib.import_module(method), [], 0.0
    augment, counter = module.augment, FlopCounterMode(display=False)

    def timed(*inputs, **options):
        nonlocal spent
        spent -= clock()
        views = augment(*inputs, **options)
        spent += clock()
        return views

    def visit(model, args, items):
        nonlocal spent
        with counter:
            yield next(items)
        for _ in range(rounds):
            gemm, spent, begin = gemm_rate(), 0.0, clock()
            yield from itertools.islice(items, count)
            found.append(((clock() - begin) / count, spent / count, gemm))
        found.append(args.batch_size)

    with mock.patch.object(module, "augment", timed):
        drive(method, flags, visit)
    return found[:-1], counter.get_total_flops(), found[-1]


# --------------------------------------------------------------------------------------- commands


def some_images(folder, side, count):
    """-> an ImageSet of about `count` images, not decoded, and their pixels and aspects."""
    from common import find_sets

    images = find_sets(folder)[0]
    images = images.subset(list(range(0, len(images), max(1, len(images) // count))))
    images.side = side
    return images, *next(images.load([list(range(len(images)))], CPU))


def augmentation(args):
    """From files, an image is decoded once for two views. All crops are bilinear but ours at 224
    pixels, which are bicubic."""
    from simclr import augment

    torch.set_num_threads(1)
    jitter, normal = (0.4, 0.4, 0.4, 0.1), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    cases = [(args.data, 32, 32, 64, 0.0), (args.data, 32, 32, 64, 0.5)]
    for folder, size, side, n, blur in cases + [(args.photos, 224, 256, 6, 0.5)] * bool(args.photos):
        images, pixels, aspect = some_images(folder, side, 8 * n)
        ours = partial(augment, image_size=size, crop_scale=0.08, jitter_strength=0.5, blur=blur)
        kernel = size // 10 | 1
        each = v2.Compose([
            v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(*jitter)], 0.8), v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], blur),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(*normal)])
        contestants = {
            "ours, decoded before, as in training": lambda rows: ours(pixels[rows], aspect[rows]),
            "ours, from files": lambda rows: [
                ours(*batch) for batch in images.load([rows], CPU) for _ in range(2)],
            "torchvision v2, tensors in memory": lambda rows: [*map(each, pixels[rows])]}
        if has("kornia"):
            import kornia.augmentation as K
            batched = nn.Sequential(
                K.RandomResizedCrop((size, size)), K.RandomHorizontalFlip(),
                K.ColorJitter(*jitter, p=0.8), K.RandomGrayscale(p=0.2),
                K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=blur),
                K.Normalize(*map(torch.tensor, normal)))
            contestants["kornia, batches in memory"] = lambda rows: batched(pixels[rows] / 255)
        if has("lightly"):
            from lightly.transforms import SimCLRTransform
            two = SimCLRTransform(input_size=size, cj_strength=0.5, gaussian_blur=blur)
            contestants["lightly, from files"] = lambda rows: [
                two(Image.open(images.source[i]).convert("RGB")) for i in rows]

        def rate(name):
            parts = itertools.cycle(torch.arange(8 * n).remainder(len(images)).split(n))
            views, begin = 0, clock()
            while clock() < begin + args.seconds:
                contestants[name](next(parts))
                views += n * (2 if "files" in name else 1)
            return views / (clock() - begin)

        figures, gemm = alternate({name: partial(rate, name) for name in contestants}, args.rounds)
        best, files = (median(f) for f in list(figures.values())[:2])
        show(f"Augmentation, {size} pixels, blur {blur}, views/s on one core", [
            {"pipeline": name, "median": median(f), "best": max(f), "ours / it": best / median(f),
             "ours from files / it": files / median(f)} for name, f in figures.items()], gemm)
    show("Largest deviation from torchvision, same parameters, in 1/255", deviations(args.data))


def deviations(data):
    import common

    _, pixels, _ = some_images(data, 32, 256)
    n, x, cases = len(pixels), pixels.float() / 255, {}
    boxes = torch.cat([torch.randint(0, 16, (n, 2)), torch.randint(1, 17, (n, 2))], 1)
    for side in 32, 224:
        cases[f"resized_crop to {side}"] = common.resized_crop(pixels, boxes.float(), side), [
            TF.resized_crop(i, *box, [side, side]) for i, box in zip(x, boxes.tolist())]
    for i, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        torch.manual_seed(i)
        values = (i < 3) + 0.5 * common.uniform(n, 4, device=CPU, low=-1.0)[:, i]
        torch.manual_seed(i)  # color_jitter draws the same
        cases[name] = common.color_jitter(x, *[0.5 * (i == j) for j in range(4)], p=1.0), [
            getattr(TF, f"adjust_{name}")(*pair) for pair in zip(x, values.tolist())]
    cases["grayscale"] = common.random_grayscale(x, 1.0), TF.rgb_to_grayscale(x, 3)
    cases["solarize"] = common.random_solarize(x, 1.0), TF.solarize(x, 0.5)
    for kernel, sigma in (3, 0.3), (9, 2.0):
        cases[f"gaussian_blur {kernel}"] = (common.gaussian_blur(x, 1.0, kernel, (sigma, sigma)),
                                            TF.gaussian_blur(x, [kernel] * 2, [sigma] * 2))
    return [{"operation": name, "deviation": 255 * max((a - b).abs().max().item()
                                                       for a, b in zip(*both))}
            for name, both in cases.items()]


def peer_loop(data, batch, workers, threads, steps):
    """lightly's example of SimCLR on our network: images/s, after its first full queue."""
    from common import make_backbone
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform
    from simclr import SimCLR

    torch.set_num_threads(threads)
    backbone = make_backbone("resnet8", 32)
    model, warm, times = SimCLR(backbone, backbone.feature_dim), 8 + 2 * workers, []
    transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)
    loader = torch.utils.data.DataLoader(ImageFolder(Path(data, "train"), transform), batch, True,
                                         num_workers=workers, drop_last=True)
    criterion, optimizer = NTXentLoss(), torch.optim.SGD(model.parameters(), lr=0.06)
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for (view1, view2), _ in itertools.islice(epochs, warm + steps):
        loss = criterion(*(model.projector(model.backbone(view)) for view in (view1, view2)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(clock())
    return batch * steps / (times[-1] - times[warm - 1])


def loop(args, batch=256):
    flags = ["--data", args.data, "--epochs", "50"]
    contestants = {"simclr.py": lambda: script("simclr", flags, batch, args.steps)["images/s"]}
    for workers, threads in ((2, CORES), (2, 1), (0, CORES)) if has("lightly") else ():
        contestants[f"lightly, {workers} workers, {threads} threads"] = partial(
            peer_loop, args.data, batch, workers, threads, args.steps)
    figures, gemm = alternate(contestants, args.rounds)
    show(f"Training loop, resnet8, batch {batch}, images/s", [
        {"loop": name, "median": median(f), "rounds": ", ".join(f"{v:,.0f}" for v in f),
         "ours / it": median(figures["simclr.py"]) / median(f)} for name, f in figures.items()],
        gemm)


def step(args):
    rows = []
    for method in args.methods:
        found, flop, batch = timed_steps(method, ["--epochs", "100"], args.rounds, args.steps)
        seconds = median(whole for whole, _, _ in found)
        rows.append({"method": method, "step, ms": 1e3 * seconds, "images/s": batch / seconds,
                     "without augmentation": median(1 - a / s for s, a, _ in found),
                     "GFLOP/step": flop / 1e9,
                     "share of GEMM": median(flop / s / g for s, _, g in found),
                     "share without": median(flop / (s - a) / g for s, a, g in found)})
    show("Steps of the demo recipes; without augmentation: as a fraction of the step", rows)


def start(args):
    from simclr import RECIPES

    imports, data = [sys.executable, "-c", "import torch, torchvision"], ["--data", args.data]
    figures, gemm = alternate({
        "imports of torch and torchvision": lambda: {"first step, s": repeat(
            lambda: subprocess.run(imports, check=True), number=1, repeat=1)[0]},
        "to the first step, built-in images": lambda: script("simclr", [], steps=1),
        "to the first step, --data": lambda: script("simclr", data, steps=1)}, args.rounds)
    rows = [{"what": name, "seconds": median(f["first step, s"] for f in found),
             "peak, MiB": found[0].get("peak, MiB", "")} for name, found in figures.items()]
    steps = RECIPES["epochs"][0] * (5000 // RECIPES["batch_size"][0])
    found, report = timed_steps("simclr", ["--epochs", "50"], 2, 20)[0], script("simclr", [])
    rows += [{"what": "to the report, built-in images", "seconds": report["end, s"],
              "peak, MiB": report.get("peak, MiB", "")},
             {"what": "as many steps without augmentation",
              "seconds": steps * median(s - a for s, a, _ in found)}]
    show("Start of simclr.py", rows, gemm)


def evaluation(args):
    """The usual protocol: a linear layer learns on crops that each epoch encodes anew."""
    from common import (load_data, make_backbone, normalize, random_horizontal_flip,
                        random_resized_crop)
    from linear_probe import centre_view, extract_features, knn, linear_probe, load_init

    backbone, features, gemm = make_backbone("resnet8", 32), [], [gemm_rate()]
    out = script("simclr", ["--data", args.data, "--max-images", str(args.images)])["out"]
    load_init(backbone.eval(), f"{out}/backbone.pth")
    train, test = load_data(args.data, 32, args.images)
    begin, view = clock(), partial(centre_view, image_size=32)
    for images in train, test:
        (x,), _ = extract_features(backbone, images, torch.arange(len(images)), view, CPU)
        features += [x, images.labels]
    encoded, test_x = clock(), features[2].clone()  # the probe works in place
    neighbours, voted = knn(*features), clock()
    probe, ended = linear_probe(*features)["probe"], clock()
    head = nn.Linear(backbone.feature_dim, len(train.classes))
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for epoch in range(args.epochs):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - epoch / args.epochs)
        order = torch.randperm(len(train)).split(256)
        for rows, batch in zip(order, train.load(order, CPU)):
            with torch.no_grad():
                crops = random_horizontal_flip(random_resized_crop(*batch, 32, (0.08, 1.0)))
                x = backbone(normalize(crops))
            optimizer.zero_grad()
            F.cross_entropy(head(x), train.labels[rows]).backward()
            optimizer.step()
    usual = (clock() - ended) * 100 / args.epochs
    top1 = 100 * (head(test_x).argmax(1) == test.labels).float().mean().item()
    show(f"Evaluation, {len(train):,} training and {len(test):,} test images", [
        {"what": "features, once", "seconds": encoded - begin},
        {"what": "kNN", "seconds": voted - encoded, "top-1, %": neighbours},
        {"what": "linear probe", "seconds": ended - voted, "top-1, %": probe},
        {"what": "100 epochs that encode", "seconds": usual, "top-1, %": top1,
         "it / the three": usual / (ended - begin)}], gemm + [gemm_rate()])


def scaling(args):
    """Rows of a group differ in one thing. Without processes, the script has all cores."""
    some = ["--data", args.data, "--epochs", "100", "--max-images"]
    cases = [(f"{n} images", some + [str(n)], 64, 0) for n in (1000, 10000, 50000)]
    cases += [(f"batch {b}", some + ["10000"], b, 0) for b in (64, 128, 256, 512)]
    cases += [(f"{p} processes, batch 256", some + ["10000"], 256, p) for p in (1, 2)]
    cases += [(f"{size} pixels", ["--data", args.photos, "--epochs", "1000", "--image-size",
                                  str(size)], 64, 0) for size in (32, 64, 96) if args.photos]
    rows, gemm = [], []
    for name, flags, batch, processes in cases:
        gemm.append(gemm_rate())
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": str(CORES // max(processes, 1))}):
            found = script("simclr", flags, batch, args.steps, processes)
        rows.append({"simclr.py with": name, **{key: found.get(key, "") for key in (
            "first step, s", "images/s", "peak, MiB")}})
    show("Scaling of simclr.py", rows, gemm)


def traffic(method, flags, world=8):
    """Bytes that one of `world` processes hands to collectives in a step. Gradients and buffers are
    those of the model; BN's statistics, and what else is summed, are counted."""
    counted = {"gradients": 0, "buffers": 0, "statistics": 0, "embeddings": 0, "images": 0}
    common = importlib.import_module("common")

    def parallel(model, compile=False, sync_bn=True):
        counted.update(buffers=sum(b.nbytes for b in model.buffers()), gradients=sum(
            p.nbytes for p in model.parameters() if p.requires_grad))
        for module in model.modules():
            if sync_bn and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.register_forward_pre_hook(statistics)
        return model

    def statistics(norm, inputs):  # forward: mean, deviation, count; backward: two sums
        numbers = 2 * norm.num_features + 1 + 2 * norm.num_features * torch.is_grad_enabled()
        counted["statistics"] += 4 * numbers

    def all_reduce(x):
        counted["images" if x.dim() > 3 else "embeddings"] += x.nbytes

    def visit(model, args, items):
        with mock.patch.object(common, "world_size", lambda: world), \
                mock.patch.object(torch.distributed, "all_reduce", all_reduce):
            yield next(items)

    with mock.patch.multiple(common, parallel=parallel, log=lambda *a, **k: None):
        drive(method, flags, visit)
    return counted


def network(args):
    """Each kind is linear in the batch, so two small batches give it for the recipe's. A ring sends
    what is summed almost twice."""
    rows = []
    for method in args.methods:
        batch = importlib.import_module(method).RECIPES["batch_size"][2]
        flags = "--recipe imagenet --max-images 64 -b".split()
        small, large = (traffic(method, flags + [b]) for b in ("16", "32"))
        sizes = {k: small[k] + (large[k] - small[k]) / 16 * (batch - 16) for k in small}
        ring = 2 * 7 / 8 * (sum(sizes.values()) - sizes["buffers"]) + sizes["buffers"]
        rows.append({"method": method, "batch": batch} | {k: v / 1e6 for k, v in sizes.items()}
                    | {"sent by a GPU": ring / 1e6, "ms at 100 GB/s": ring / 1e8})
    show("On paper: MB per step and process, imagenet recipes, 8 GPUs", rows)


# --------------------------------------------------------------------------------------- learning

HEADS = {  # where our heads are, and lightly's
    "simclr": {"projector": "SimCLRProjectionHead"},
    "moco": {"online.1": "MoCoProjectionHead", "target.1": "MoCoProjectionHead"},
    "byol": {"online.projector": "BYOLProjectionHead", "predictor": "BYOLPredictionHead",
             "target.projector": "BYOLProjectionHead"},
    "simsiam": {"projector": "SimSiamProjectionHead", "predictor": "SimSiamPredictionHead"},
    "swav": {"projector": "SwaVProjectionHead", "prototypes": "SwaVPrototypes"},
    "barlow": {"projector": "BarlowTwinsProjectionHead"},
    "dino": {"student.head": "DINOProjectionHead", "teacher.head": "DINOProjectionHead"}}


def peer_head(name, ours):
    """lightly's head, with the widths and weights of ours; a bias that ours lacks starts at 0."""
    from lightly.models.modules import heads

    def layers(head):
        return [m for m in head.modules() if getattr(m, "weight", None) is not None]

    linear = [layer for layer in layers(ours) if isinstance(layer, nn.Linear)]
    widths = [linear[0].in_features, *dict.fromkeys(layer.out_features for layer in linear)]
    if name == "DINOProjectionHead":
        theirs = heads.DINOProjectionHead(*widths, batch_norm=len(layers(ours)) > len(linear))
    elif name in ("BarlowTwinsProjectionHead", "SimSiamProjectionHead", "SimCLRProjectionHead"
        theirs = getattr(heads, name)(*widths[:2], *widths[-1:] * (len(widths) > 2))
