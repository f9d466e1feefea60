"""How fast the scripts are on a CPU, beside their peers and beside what it could do at most; and
how well they learn, beside lightly.

    python tests/benchmark.py COMMAND --data CIFAR --photos FOLDER --json FILE

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
What takes minutes is measured once: scaling, evaluation, start's report; learning, for each seed.
Nothing is installed: a row whose peer is missing is left out, and a line says how to get it.
"""

import argparse
import copy
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
import time
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from statistics import mean, median
from timeit import repeat
from types import SimpleNamespace
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
METHODS = "simclr moco byol simsiam swav barlow dino mae rotation jigsaw".split()
MIB, CPU, clock = 2**20, torch.device("cpu"), time.perf_counter

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


def rate(make_views, seconds):
    """make_views() -> how many; -> views per second."""
    views, start = 0, clock()
    while (now := clock()) - start < seconds or not views:
        views += make_views()
    return views / (now - start)


def show(args, title, rows, gemm=()):
    """Print rows (dicts, first key: what the row is) as a markdown table; append it to --json."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    where = [cpu, f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads"]
    where += [f"{name} {importlib.metadata.version(name)}" for name in
              ("torch", "lightly", "kornia") if importlib.util.find_spec(name)]
    print(f"\n**{title}** · {', '.join(where)}")
    if gemm:
        print(f"GEMM beside the rounds, GFLOP/s: {', '.join(f'{g / 1e9:,.0f}' for g in gemm)}")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[cell(row.get(column, "")) for column in columns] for row in rows]
    for line in [], columns, ["---"] * len(columns), *lines:
        print(*line, sep=" | ")
    if args.json:
        with open(args.json, "a") as file:
            table = {"title": title, "where": where, "gemm": list(gemm), "rows": rows}
            print(json.dumps(table), file=file)


def cell(value):
    """A number with two significant digits at least; nothing for NaN, which is not known."""
    if not isinstance(value, float) or math.isnan(value):
        return "" if value != value else str(value)
    small = 0 < abs(value) < 1e-3
    return f"{value:.1e}" if small else f"{value:,.{max(0, 2 - int(math.log10(abs(value) or 1)))}f}"


def has(package):
    """Whether a peer is installed; says how to get it."""
    if found := importlib.util.find_spec(package):
        return True
    print(f"left out, as it is not installed: {package} (pip install {package})")
    return bool(found)


# --------------------------------------------------------------- scripts, driven from the outside


def script(method, flags, batch=None, steps=None, processes=0):
    """Run a script, up to this step where it is given -> dict: seconds to the first step and to the
    end, peak memory of the process (bytes; Linux, else 0), images/s of all steps but five, --out.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *torchrun * bool(processes), str(ROOT / f"{method}.py"), *flags]
    command += ["--device", "cpu", "--out", out := tempfile.mkdtemp(dir=".")]
    command += ["-b", str(batch)] * bool(batch) + ["-p", "5"] * bool(steps)
    begin, found = clock(), {"out": out, "peak": 0}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            with suppress(OSError, IndexError):  # not ru_maxrss, which starts at the parent's
                status = Path(f"/proc/{process.pid}/status").read_text()
                found["peak"] = 1024 * int(status.partition("VmHWM:")[2].split()[0])
            if "step 1/" in line:
                found["first"] = clock() - begin
            if steps and f"step {steps}/" in line:
                process.terminate()
                break
        found["end"] = clock() - begin
    if process.returncode > 0 and not steps:
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}")
    if batch:
        lines = map(json.loads, Path(out, "log.jsonl").read_text().splitlines())
        seconds = {line["step"]: line["seconds"] for line in lines}
        found["images/s"] = batch * (steps - 5) / (seconds[steps] - seconds[5])
    return found


class Done(Exception):
    """Ends a run, out of the middle of its loop."""


def drive(method, flags, visit):
    """`method`.train with `flags`; its loop gets the items that visit(run, items) yields, then ends.
    run: the args, model and optimizer."""
    common, module = importlib.import_module("common"), importlib.import_module(method)
    batches, load_checkpoint, run = common.batches, common.load_checkpoint, SimpleNamespace()

    def load(args, images, model, optimizer):
        run.args, run.model, run.optimizer = args, model, optimizer
        return load_checkpoint(args, images, model, optimizer)

    def visited(*arguments):
        yield from visit(run, batches(*arguments))
        raise Done

    with mock.patch.multiple(common, batches=visited, load_checkpoint=load), suppress(Done), \
            redirect_stdout(None):
        module.train(module.parse_args([*flags, "--device", "cpu"]))


def blocks(method, flags, rounds=4, block=10):
    """Alternating blocks of a script's steps: whole, or bare, where each step gets the images and
    views of an earlier one. -> seconds per step of each, GEMM rate of each round, FLOP, batch."""
    module = importlib.import_module(method)
    augment, found = module.augment, {"whole": [], "bare": [], "gemm": []}
    bare, calls, views = False, itertools.count(), {}

    def augment_or_not(*inputs, **options):
        if not bare:
            return augment(*inputs, **options)
        if (call := next(calls)) not in views:  # a step's views differ, as they should
            views[call] = augment(*inputs, **options)
        return views[call]

    def visit(run, items):
        nonlocal bare, calls
        yield next(items)
        second = next(items)  # neither logged nor saved
        for r in range(-1, rounds):  # -1 warms up
            for bare in (False, True)[:: 1 - 2 * (r % 2)]:
                start = clock()
                for _, item in zip(range(block), itertools.repeat(second) if bare else items):
                    calls = itertools.count()
                    yield item
                found["bare" if bare else "whole"] += [(clock() - start) / block] * (r >= 0)
            found["gemm"] += [gemm_rate()] * (r >= 0)
        bare, calls = True, itertools.count()
        with FlopCounterMode(display=False) as counter:
            yield second
        found.update(flop=counter.get_total_flops(), batch=run.args.batch_size)

    with mock.patch.object(module, "augment", augment_or_not):
        drive(method, flags, visit)
    return found


# --------------------------------------------------------------------------------------- commands


def some_images(folder, side, count):
    """-> an ImageSet of about `count` images, not decoded, and their pixels and aspects."""
    from common import find_sets

    images = find_sets(folder)[0]
    images = images.subset(list(range(0, len(images), max(1, len(images) // count))))
    images.side = side
    return images, *next(images.load([list(range(len(images)))], CPU))


def peer_transform(size, blur):
    """lightly's, with the strengths that simclr.py has for CIFAR."""
    from lightly.transforms import SimCLRTransform

    return SimCLRTransform(input_size=size, cj_strength=0.5, gaussian_blur=blur)


def augmentation(args):
    """All crops are bilinear but ours at 224 pixels, which are bicubic."""
    from simclr import augment

    torch.set_num_threads(1)
    jitter, normal = (0.4, 0.4, 0.4, 0.1), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    cases = [(args.data, 32, 32, 512, 0.0), (args.data, 32, 32, 512, 0.5)]
    for folder, size, side, count, blur in cases + [(args.photos, 224, 256, 48, 0.5)]:
        if not folder:
            continue
        images, pixels, aspect = some_images(folder, side, count)
        ours = partial(augment, image_size=size, crop_scale=0.08, jitter_strength=0.5, blur=blur)
        rows, kernel = itertools.cycle(torch.arange(len(images)).split(count // 8)), size // 10 | 1

        def decoded(rows):
            return len(ours(pixels[rows], aspect[rows]))

        def from_files():  # an image is decoded once for its two views, as by lightly
            batch = next(images.load([next(rows)], CPU))
            return len(ours(*batch)) + len(ours(*batch))

        def opened():
            return [Image.open(images.source[i]).convert("RGB") for i in next(rows)]

        contestants = {"ours, decoded before, as in training": lambda: decoded(next(rows)),
                       "ours, from files": from_files}
        if has("lightly"):
            two, pil = peer_transform(size, blur), opened()
            contestants["lightly, from files"] = lambda: sum(len(two(i)) for i in opened())
            contestants["lightly, PIL images in memory"] = lambda: sum(len(two(i)) for i in pil)
        if has("kornia"):
            import kornia.augmentation as K
            batched = nn.Sequential(
                K.RandomResizedCrop((size, size)), K.RandomHorizontalFlip(),
                K.ColorJitter(*jitter, p=0.8), K.RandomGrayscale(p=0.2),
                K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=blur),
                K.Normalize(*map(torch.tensor, normal)))
            contestants["kornia, batches in memory"] = lambda: len(
                batched(pixels[next(rows)].float() / 255))
        each = v2.Compose([
            v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(*jitter)], 0.8), v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], blur),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(*normal)])
        contestants["torchvision v2, tensors in memory"] = lambda: len(
            [each(image) for image in pixels[next(rows)]])
        figures, gemm = alternate({name: partial(rate, make_views, args.seconds)
                                   for name, make_views in contestants.items()}, args.rounds)
        best, files = (median(f) for f in list(figures.values())[:2])
        show(args, f"Augmentation, {size} pixels, blur {blur}, views/s on one core", [
            {"pipeline": name, "median": median(f), "best": max(f), "ours / it": best / median(f),
             "ours from files / it": files / median(f)} for name, f in figures.items()], gemm)
    show(args, "Largest deviation from torchvision, same parameters, in 1/255", [
        {"operation": name, "deviation": 255 * (torch.stack([*a]) - torch.stack([*b])).abs().max().item()} for name, (a, b) in deviations(args).items()])


def deviations(args):
    """-> {operation: what we and torchvision make of 256 images}"""
    import common

    _, pixels, _ = some_images(args.data or args.photos, 32, 256)
    n, x, cases = len(pixels), pixels.float() / 255, {}
    boxes = torch.cat([torch.randint(0, 16, (n, 2)), torch.randint(1, 17, (n, 2))], 1)
    for side in 32, 224:
        cases[f"resized_crop to {side}"] = common.resized_crop(pixels, boxes.float(), side), [
            TF.resized_crop(i, *box, [side, side]) for i, box in zip(x, boxes.tolist())]
    for i, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        strengths = [0.5 * (i == j) for j in range(4)]
        torch.manual_seed(i)
        values = (i < 3) + 0.5 * common.uniform(n, 4, device=CPU, low=-1.0)[:, i]
        torch.manual_seed(i)  # color_jitter draws the same
        cases[name] = common.color_jitter(x, *strengths, p=1.0), [
            getattr(TF, f"adjust_{name}")(*pair) for pair in zip(x, values.tolist())]
    cases["grayscale"] = common.random_grayscale(x, 1.0), TF.rgb_to_grayscale(x, 3)
    cases["solarize"] = common.random_solarize(x, 1.0), TF.solarize(x, 0.5)
    for kernel, sigma in (3, 0.3), (9, 2.0):
        cases[f"gaussian_blur {kernel}"] = (common.gaussian_blur(x, 1.0, kernel, (sigma, sigma)),
                                            TF.gaussian_blur(x, [kernel] * 2, [sigma] * 2))
    return cases


def peer_loop(data, batch, workers, threads, steps):
    """lightly's example of SimCLR on our network: images/s, after its first full queue."""
    from common import make_backbone
    from lightly.loss import NTXentLoss
    from simclr import SimCLR

    torch.set_num_threads(threads)
    backbone = make_backbone("resnet8", 32)
    model, warm, marks = SimCLR(backbone, backbone.feature_dim), 8 + 2 * workers, []
    images = ImageFolder(Path(data, "train"), peer_transform(32, blur=0.0))
    loader = torch.utils.data.DataLoader(images, batch, True, num_workers=workers, drop_last=True)
    criterion, optimizer = NTXentLoss(), torch.optim.SGD(model.parameters(), lr=0.06)
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for (view1, view2), _ in itertools.islice(epochs, warm + steps):
        loss = criterion(*(model.projector(model.backbone(view)) for view in (view1, view2)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        marks.append(clock())
    return batch * steps / (marks[-1] - marks[warm - 1])


def loop(args, batch=256):
    flags, steps, cores = ["--data", args.data, "--epochs", "50"], args.steps or 40, os.cpu_count()
    contestants = {"simclr.py": lambda: script("simclr", flags, batch, steps)["images/s"]}
    for workers, threads in ((2, cores), (2, 1), (0, cores)) if has("lightly") else ():
        contestants[f"lightly, {workers} workers, {threads} threads"] = partial(
            peer_loop, args.data, batch, workers, threads, steps)
    figures, gemm = alternate(contestants, args.rounds)
    best = median(figures["simclr.py"])
    show(args, f"Training loop, resnet8, batch {batch}, images/s", [
        {"loop": name, "median": median(f), "rounds": ", ".join(f"{v:,.0f}" for v in f),
         "ours / it": best / median(f)} for name, f in figures.items()], gemm)


def step(args):
    rows, gemm = [], []
    for method in args.methods:
        found = blocks(method, ["--epochs", "100"], args.rounds, args.steps or 10)
        whole, bare, rates = (found[key] for key in ("whole", "bare", "gemm"))
        rows.append({"method": method, "step, ms": 1e3 * median(whole),
                     "without augmentation, ms": 1e3 * median(bare),
                     "without / step": median(b / w for w, b in zip(whole, bare)),
                     "images/s": found["batch"] / median(whole), "GFLOP/step": found["flop"] / 1e9,
                     "share of GEMM": median(found["flop"] / w / g for w, g in zip(whole, rates)),
                     "share without": median(found["flop"] / b / g for b, g in zip(bare, rates))})
        gemm += rates
    show(args, "Steps of the demo recipes, with and without augmentation", rows, gemm)


def start(args):
    from simclr import RECIPES

    imports = [sys.executable, "-c", "import torch, torchvision"]
    figures, gemm = alternate({
        "imports of torch and torchvision": lambda: repeat(
            lambda: subprocess.run(imports, check=True), number=1, repeat=1)[0],
        "first step on built-in images": lambda: script("simclr", [], steps=1)["first"],
        "first step on --data": lambda: script("simclr", ["--data", args.data], steps=1)["first"],
    }, args.rounds)
    show(args, "Start, seconds", [{"what": name, "median": median(f), "best": min(f)}
                                  for name, f in figures.items()], gemm)
    found, bare = script("simclr", []), blocks("simclr", ["--epochs", "50"], rounds=2)
    steps = RECIPES["epochs"][0] * (5000 // RECIPES["batch_size"][0])
    show(args, "python simclr.py, from the command to the report", [
        {"what": "seconds", "value": found["end"]},
        {"what": "as many steps without augmentation, s", "value": steps * median(bare["bare"])},
        {"what": "peak memory, MiB", "value": found["peak"] / MIB}], bare["gemm"])


def evaluation(args):
    """The usual protocol trains a linear layer by SGD on crops that each epoch encodes anew. Here
    four rates are trained side by side, and the best one by test accuracy counts: to its advantage,
    as is our pipeline."""
    from common import (load_data, make_backbone, normalize, random_horizontal_flip,
                        random_resized_crop)
    from linear_probe import centre_view, extract_features, knn, linear_probe, load_init

    count, backbone, found = args.images or 10000, make_backbone("resnet8", 32), []
    out = script("simclr", ["--data", args.data, "--max-images", str(count)])["out"]
    load_init(backbone.eval(), f"{out}/backbone.pth")
    train, test = load_data(args.data, 32, count)
    gemm, view, begin = [gemm_rate()], partial(centre_view, image_size=32), clock()
    for images in train, test:
        (x,), _ = extract_features(backbone, images, torch.arange(len(images)), view, CPU)
        found += [x, images.labels]
    *_, test_x, test_y = copy.deepcopy(found)  # the probe works in place
    encoded, neighbours, voted = clock(), knn(*found), clock()
    probe, ours = linear_probe(*found)["probe"], clock() - begin
    heads = [nn.Linear(backbone.feature_dim, len(train.classes)) for _ in range(4)]
    optimizer = torch.optim.SGD([{"params": head.parameters(), "lr": lr} for head, lr
                                 in zip(heads, (0.1, 1.0, 10.0, 30.0))], momentum=0.9)
    schedule, middle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs), clock()
    for _ in range(args.epochs):
        order = torch.randperm(len(train)).split(256)
        for indices, batch in zip(order, train.load(order, CPU)):
            crops = random_horizontal_flip(random_resized_crop(*batch, 32, (0.08, 1.0)))
            with torch.no_grad():
                features = backbone(normalize(crops))
            losses = [F.cross_entropy(head(features), train.labels[indices]) for head in heads]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
        schedule.step()
    seconds = (clock() - middle) * 100 / args.epochs
    top1 = max(100 * (head(test_x).argmax(1) == test_y).float().mean().item() for head in heads)
    show(args, f"Evaluation, {len(train):,} training and {len(test):,} test images", [
        {"protocol": "features, once", "seconds": encoded - begin},
        {"protocol": "kNN", "seconds": voted - encoded, "top-1, %": neighbours},
        {"protocol": "linear probe", "seconds": begin + ours - voted, "top-1, %": probe},
        {"protocol": "these three", "seconds": ours},
        {"protocol": f"100 epochs that encode ({args.epochs} measured)", "seconds": seconds,
         "top-1, %": top1, "it / ours": seconds / ours}], [*gemm, gemm_rate()])
