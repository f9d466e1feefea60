"""How fast the scripts are on a CPU, beside their peers and beside what it could do at most.

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
and the matrix product (GEMM) timed beside each round shows how steady the machine was. Scaling,
evaluation and start's report are measured once.
Nothing is installed: a row whose peer is missing is left out, and a line says how to get it.
"""

import argparse
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout, suppress
from functools import partial
from importlib import import_module, metadata, util
from pathlib import Path
from statistics import median
from timeit import default_timer as clock, repeat, timeit
from unittest import mock

import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from beside_lightly import learning, peer_loop

METHODS = "simclr moco byol simsiam swav barlow dino mae rotation jigsaw".split()
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
    versions = [f"{name} {metadata.version(name)}" for name in
                ("torch", "lightly", "kornia") if util.find_spec(name)]
    print(f"\n**{title}** · {cpu}, {CORES} cores,", ", ".join(versions))
    if gemm:
        print("GEMM beside the rounds, GFLOP/s:", ", ".join(f"{g / 1e9:,.0f}" for g in gemm))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[cell(row.get(column, "")) for column in columns] for row in rows]
    for line in [], columns, ["---"] * len(columns), *cells:
        print(*line, sep=" | ", flush=True)


def cell(value):
    """A number with two significant digits at least."""
    if not isinstance(value, float):
        return str(value)
    digits = 2 - math.floor(math.log10(abs(value) or 1))
    return f"{value:.1e}" if digits > 5 else f"{value:,.{max(0, digits)}f}"


def has(package):
    """Whether a peer is installed; says how to get it."""
    if not (found := util.find_spec(package)):
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
    begin, found = clock(), {"out": out, "memory": {}}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            with suppress(OSError, IndexError):  # not ru_maxrss, which starts at the parent's
                status = Path(f"/proc/{process.pid}/status").read_text()
                found["memory"]["peak, MiB"] = int(status.split("VmHWM:")[1].split()[0]) / 1024
            if "step 1/" in line:
                found["first step, s"] = clock() - begin
            if steps and f"step {steps}/" in line:
                process.terminate()
                break
        found["end, s"] = clock() - begin
    if batch:
        lines = map(json.loads, Path(out, "log.jsonl").read_text().splitlines())
        seconds = {line["step"]: line["seconds"] for line in lines}
        found["images/s"] = batch * (steps - 5) / (seconds[steps] - seconds[5])
    return found


class Done(Exception):
    """Ends a run in the middle of its loop."""


def drive(method, flags, visit):
    """`method`.train with `flags`; its loop gets what visit(model, items) yields, then ends."""
    common, module = import_module("common"), import_module(method)
    batches, parallel = common.batches, mock.Mock(side_effect=common.parallel)

    def visited(*arguments):
        yield from visit(parallel.call_args.args[0], batches(*arguments))
        raise Done

    with mock.patch.multiple(common, batches=visited, parallel=parallel), suppress(Done), \
            redirect_stdout(None):
        module.train(module.parse_args([*flags, "--device", "cpu"]))


def timed_steps(method, flags, rounds, count):
    """-> (seconds per step, without `augment`, GEMM rate) of each round; FLOP per step."""
    module, found, spent = import_module(method), [], 0.0
    augment, counter = module.augment, FlopCounterMode(display=False)

    def timed(*inputs, **options):
        nonlocal spent
        spent -= clock()
        views = augment(*inputs, **options)
        spent += clock()
        return views

    def visit(model, items):
        nonlocal spent
        with counter:
            yield next(items)
        for _ in range(rounds):
            gemm, spent, begin = gemm_rate(), 0.0, clock()
            yield from itertools.islice(items, count)
            seconds = clock() - begin
            found.append((seconds / count, (seconds - spent) / count, gemm))

    with mock.patch.object(module, "augment", timed):
        drive(method, flags, visit)
    return found, counter.get_total_flops()


# --------------------------------------------------------------------------------------- commands


def some_images(folder, side, count):
    """-> an ImageSet, not decoded, and the pixels and aspects of `count` of its images."""
    images = import_module("common").find_sets(folder)[0]
    images = images.subset([i * len(images) // count for i in range(count)])
    images.side = side
    return images, *next(images.load([range(count)], CPU))


def augmentation(args):
    """From files, an image is decoded once for two views. All crops are bilinear but ours at 224
    pixels, which are bicubic."""
    from simclr import augment

    torch.set_num_threads(1)
    jitter, normal = (0.4, 0.4, 0.4, 0.1), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    small, large = (args.data, 32, 32, 64), (args.photos, 224, 256, 6)
    for *case, blur in [(*small, 0.0), (*small, 0.5)] + [(*large, 0.5)] * bool(args.photos):
        folder, size, side, n = case
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
                two(images.open(i).convert("RGB")) for i in rows]

        def rate(name):
            parts, views, begin = itertools.cycle(torch.arange(8 * n).split(n)), 0, clock()
            while clock() < begin + 1.5:
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

    n, (_, pixels, _), cases = 256, some_images(data, 32, 256), {}
    x = pixels / 255
    boxes = torch.cat([torch.randint(0, 16, (n, 2)), torch.randint(1, 17, (n, 2))], 1)
    cases["resized_crop"] = common.resized_crop(pixels, boxes.float(), 224), [
        TF.resized_crop(i, *box, [224, 224]) for i, box in zip(x, boxes.tolist())]
    for i, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        torch.manual_seed(i)
        values = (i < 3) + 0.5 * common.uniform(n, 4, device=CPU, low=-1.0)[:, i]
        torch.manual_seed(i)  # color_jitter draws the same
        cases[name] = common.color_jitter(x, *[0.5 * (i == j) for j in range(4)], p=1.0), [
            getattr(TF, f"adjust_{name}")(*pair) for pair in zip(x, values.tolist())]
    cases["grayscale"] = common.random_grayscale(x, 1.0), TF.rgb_to_grayscale(x, 3)
    cases["solarize"] = common.random_solarize(x, 1.0), TF.solarize(x, 0.5)
    cases["blur"] = common.gaussian_blur(x, 1.0, 9, (1.0, 1.0)), TF.gaussian_blur(x, 9, 1.0)
    return [{"operation": name, "deviation": max((255 * (a - b)).abs().max().item() for a, b in
                                                 zip(*case))} for name, case in cases.items()]


def loop(args, batch=256):
    flags = ["--data", args.data, "--epochs", "50"]
    contestants = {"simclr.py": lambda: script("simclr", flags, batch, args.steps)["images/s"]}
    for workers, threads in ((2, CORES), (2, 1), (0, CORES)) if has("lightly") else ():
        contestants[f"lightly, {workers} workers, {threads} threads"] = partial(
            peer_loop, args.data, batch, workers, threads, args.steps)
    figures, gemm = alternate(contestants, args.rounds)
    best = median(figures["simclr.py"])
    show(f"Training loop, resnet8, batch {batch}, images/s", [
        {"loop": name, "median": median(f), "best": max(f),
         "ours / it": best / median(f)} for name, f in figures.items()], gemm)


def step(args):
    rows, gemm = [], []
    for method in args.methods:
        found, flop = timed_steps(method, ["--epochs", "100"], args.rounds, args.steps)
        rows.append({"method": method, "step, ms": 1e3 * median(s for s, _, _ in found),
                     "without / step": median(bare / s for s, bare, _ in found),
                     "share of GEMM": median(flop / s / g for s, _, g in found),
                     "share without": median(flop / bare / g for _, bare, g in found)})
        gemm += [g for _, _, g in found]
    show("Steps of the demo recipes, with and without augmentation", rows, gemm)


def start(args):
    from simclr import RECIPES

    def first(*flags):
        return script("simclr", flags, steps=1)["first step, s"]

    imports = [sys.executable, "-c", "import torch, torchvision"]
    figures, gemm = alternate({
        "imports": lambda: timeit(lambda: subprocess.run(imports, check=True), number=1),
        "first step, drawn images": first,
        "first step, --data": lambda: first("--data", args.data)}, args.rounds)
    steps = RECIPES["epochs"][0] * (5000 // RECIPES["batch_size"][0])
    (found, _), report = timed_steps("simclr", ["--epochs", "50"], 2, 20), script("simclr", [])
    bare = steps * median(bare for _, bare, _ in found)
    show("Start of simclr.py", [
        *({"to": name, "seconds": median(f)} for name, f in figures.items()),
        {"to": "report, drawn images", "seconds": report["end, s"], **report["memory"]},
        {"to": "as many steps without augmentation", "seconds": bare}], gemm)


def evaluation(args):
    """The usual protocol encodes crops anew in each of 100 epochs; one of them is measured."""
    import common
    from common import centre_view
    from linear_probe import extract_features, knn, linear_probe, load_init

    out = script("simclr", ["--data", args.data, "--max-images", str(args.images)])["out"]
    load_init(backbone := common.make_backbone("resnet8", 32).eval(), f"{out}/backbone.pth")
    train, test = common.load_data(args.data, 32, args.images)
    gemm, times, features, view = gemm_rate(), [clock()], [], partial(centre_view, size=32)
    for images in train, test:
        features += extract_features(backbone, images, torch.arange(len(images)), view, CPU)
        features.append(images.labels)
    times.append(clock())
    top1 = [knn(*features)]
    times.append(clock())
    top1 += [linear_probe(*features)["probe"]]
    times.append(clock())
    for batch in train.load(torch.randperm(len(train)).split(256), CPU):
        crops = common.random_resized_crop(*batch, 32, (0.08, 1.0))
        with torch.no_grad():
            backbone(common.normalize(common.random_horizontal_flip(crops)))
    encode, vote, probe = (end - begin for begin, end in itertools.pairwise(times))
    usual = 100 * (clock() - times[-1])
    show(f"Evaluation, {len(train):,} training and {len(test):,} test images", [
        {"what": "features, once", "seconds": encode},
        {"what": "kNN", "seconds": vote, "top-1, %": top1[0]},
        {"what": "linear probe", "seconds": probe, "top-1, %": top1[1]},
        {"what": "100 epochs that encode", "seconds": usual,
         "it / these three": usual / (times[-1] - times[0])}], [gemm])


def scaling(args):
    some = ["--data", args.data, "--epochs", "100", "--max-images"]
    cases = [(f"{n} images", some + [str(n)], 64, 0) for n in (1000, 10000, 50000)]
    cases += [(f"batch {b}", some + ["10000"], b, 0) for b in (64, 128, 256, 512)]
    cases += [(f"{p} processes, batch 256", some + ["10000"], 256, p) for p in (1, 2)]
    cases += [(f"{s} pixels", some + ["9999", "--image-size", str(s)], 64, 0) for s in (32, 64, 96)]
    rows, gemm = [], []
    for name, flags, batch, processes in cases:
        gemm += [gemm_rate()]
        with mock.patch.dict(os.environ, OMP_NUM_THREADS=str(CORES // max(processes, 1))):
            found = script("simclr", flags, batch, args.steps, processes)
        rows.append({"simclr.py with": name, "first step, s": found["first step, s"],
                     "images/s": found["images/s"], **found["memory"]})
    show("Scaling of simclr.py", rows, gemm)


def traffic(method, flags):
    """-> bytes of one of eight processes that are summed in a step, by kind."""
    counted = {"gradients": 0, "buffers": 0, "statistics": 0, "gathered": 0, "images": 0}
    common = import_module("common")

    def statistics(norm, inputs):  # forward: mean, deviation, count; backward: two sums
        counted["statistics"] += 4 + 8 * norm.num_features * (1 + torch.is_grad_enabled())

    def all_reduce(x):
        counted["images" if x.dim() > 3 else "gathered"] += x.nbytes

    def visit(model, items):
        counted["gradients"] = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        counted["buffers"] = sum(b.nbytes for b in model.buffers())
        for module in model.modules():
            if method != "moco" and hasattr(module, "running_mean"):  # its version 2 syncs none
                module.register_forward_pre_hook(statistics)
        with mock.patch.object(common, "world_size", lambda: 8), \
                mock.patch.object(torch.distributed, "all_reduce", all_reduce):
            yield next(items)

    with mock.patch.object(common, "log"):
        drive(method, flags, visit)
    return counted


def network(args):
    """Linear in the batch: two small ones give the recipe's. A ring sends sums almost twice."""
    rows = []
    for method in args.methods:
        batch = import_module(method).RECIPES["batch_size"][-1]
        flags = "--recipe imagenet --max-images 64 -b".split()
        small, large = (traffic(method, flags + [b]) for b in ("16", "32"))
        sizes = {k: small[k] + (large[k] - small[k]) / 16 * (batch - 16) for k in small}
        sent = (7 / 4 * sum(sizes.values()) - 3 / 4 * sizes["buffers"]) / 1e6
        rows.append({"method": method, "batch": batch} | {k: v / 1e6 for k, v in sizes.items()}
                    | {"sent by a GPU": sent, "ms at 100 GB/s": sent / 100})
    show("On paper: MB per step and process, imagenet recipes, 8 GPUs", rows)


COMMANDS = {f.__name__: f for f in (augmentation, loop, step, start, evaluation, scaling, network,
                                    learning)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=COMMANDS, metavar="COMMAND")
    add("--data", metavar="CIFAR", type=os.path.abspath, help="CIFAR-10 as files in class folders")
    add("--photos", metavar="FOLDER", type=os.path.abspath, help="full-size photographs")
    add("--rounds", type=int, default=4, help="alternations; of learning: seeds (default 4)")
    add("--steps", type=int, default=40, help="of a round, a multiple of 5 above 5 (default 40)")
    add("--images", type=int, default=10000, help="of evaluation and learning (default 10,000)")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="of step, network, learning")
    args = parser.parse_args(argv)
    if not args.data and args.command not in ("step", "network"):
        parser.error(f"{args.command} needs --data")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # it gets runs/
        COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
