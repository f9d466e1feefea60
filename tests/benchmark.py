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
from timeit import default_timer as clock, repeat
from unittest import mock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from beside_lightly import learning, peer_loop

METHODS = "simclr moco byol simsiam swav barlow dino mae rotation jigsaw".split()
CPU = torch.device("cpu")
CORES = os.cpu_count()

# --------------------------------------------------------------------------- measuring and printing


def gemm_rate():
    """FLOP/s of the best of three float32 products of 2048 x 2048."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / min(repeat(lambda: a @ a, number=1, repeat=3))


def alternate(contestants, rounds):
    """{name: function -> figure} -> {name: [a figure per round]}; a GEMM's FLOP/s of each round."""
    figures = {name: [] for name in contestants}
    gemm = []
    order = list(contestants)
    for _ in range(rounds):
        gemm.append(gemm_rate())
        for name in order:
            figures[name].append(contestants[name]())
        order.reverse()
    return figures, gemm


def show(title, rows, gemm=()):
    """Print rows (dicts, first key: what the row is) as a markdown table."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "lightly", "kornia")
                if util.find_spec(name)]
    print(f"\n**{title}** · {cpu}, {CORES} cores,", ", ".join(versions))
    if gemm:
        print("GEMM beside the rounds, GFLOP/s:", ", ".join(f"{g / 1e9:,.0f}" for g in gemm))
    columns = {}  # for its order
    for row in rows:
        columns.update(row)
    lines = [[], list(columns), ["---"] * len(columns)]
    for row in rows:
        lines.append([cell(row.get(column, "")) for column in columns])
    for line in lines:
        print(*line, sep=" | ", flush=True)


def cell(value):
    """A number with two significant digits at least."""
    if not isinstance(value, float):
        return str(value)
    digits = 2 - math.floor(math.log10(abs(value) or 1))
    return f"{value:.1e}" if digits > 5 else f"{value:,.{max(0, digits)}f}"


def has(package):
    """Whether a peer is installed; says how to get it."""
    found = util.find_spec(package) is not None
    if not found:
        print(f"{package} is left out; to have it, pip install {package}")
    return found


# --------------------------------------------------------------- scripts, driven from the outside


def script(method, flags, batch=None, steps=None, processes=0):
    """Run a script, to this step where it is given -> dict: seconds to the first step and to the
    end, peak MiB of the process (Linux), images/s of all steps but the first five, --out."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    out = tempfile.mkdtemp(dir=".")
    command += [str(ROOT / f"{method}.py"), *flags, "--device", "cpu", "--out", out]
    if batch:
        command += ["-b", str(batch)]
    if steps:
        command += ["-p", "5"]
    found = {"out": out, "memory": {}}
    begin = clock()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if not processes:  # under torchrun, this one only starts the others
                with suppress(OSError, IndexError):  # not ru_maxrss, which starts at the parent's
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    peak = int(status.split("VmHWM:")[1].split()[0])  # in KiB
                    found["memory"]["peak, MiB"] = peak / 1024
            if "step 1/" in line:
                found["first step, s"] = clock() - begin
            if steps and f"step {steps}/" in line:
                process.terminate()
                break
        found["end, s"] = clock() - begin
    if batch:
        seconds = {}
        for line in map(json.loads, Path(out, "log.jsonl").read_text().splitlines()):
            if "loss" in line:
                seconds[line["step"]] = line["seconds"]
        found["images/s"] = batch * (steps - 5) / (seconds[steps] - seconds[5])
    return found


class Done(Exception):
    """Ends a run in the middle of its loop."""


def drive(method, flags, visit):
    """`method`.train with `flags`; its loop gets what visit(model, items) yields, then ends."""
    common = import_module("common")
    module = import_module(method)
    batches = common.batches
    parallel = mock.Mock(side_effect=common.parallel)

    def visited(*arguments):
        yield from visit(parallel.call_args.args[0], batches(*arguments))
        raise Done

    with mock.patch.multiple(common, batches=visited, parallel=parallel), suppress(Done), \
            redirect_stdout(None):
        module.train(module.parse_args([*flags, "--device", "cpu"]))


def timed_steps(method, flags, rounds, count):
    """-> (seconds per step, without `augment`, GEMM rate) of each round; FLOP per step."""
    module = import_module(method)
    augment = module.augment
    counter = FlopCounterMode(display=False)
    found = []
    spent = 0.0  # in augment

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
            gemm = gemm_rate()
            spent = 0.0
            begin = clock()
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
    return images, *next(images.load([torch.arange(count)], CPU))


def augmentation(args):
    """From files, an image is decoded once for two views. All crops are bilinear but ours at 224
    pixels, which are bicubic."""
    from simclr import augment

    torch.set_num_threads(1)
    jitter = 0.4, 0.4, 0.4, 0.1
    normal = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    cases = [(args.data, 32, 32, 64, 0.0), (args.data, 32, 32, 64, 0.5)]
    if args.photos:
        cases.append((args.photos, 224, 256, 6, 0.5))
    for folder, size, side, n, blur in cases:
        images, pixels, aspect = some_images(folder, side, 8 * n)
        ours = partial(augment, image_size=size, crop_scale=0.08, jitter_strength=0.5, blur=blur)
        kernel = size // 10 | 1
        each = v2.Compose([
            v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(*jitter)], 0.8), v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], blur),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(*normal)])

        def ours_from_files(rows):
            decoded, its_aspect = next(images.load([rows], CPU))
            return ours(decoded, its_aspect), ours(decoded, its_aspect)

        contestants = {
            "ours, decoded before, as in training": lambda rows: ours(pixels[rows], aspect[rows]),
            "ours, from files": ours_from_files,
            "torchvision v2, tensors in memory": lambda rows: [each(x) for x in pixels[rows]]}
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

            def lightly_views(rows):
                return [two(images.open(i).convert("RGB")) for i in rows]

            contestants["lightly, from files"] = lightly_views

        def rate(name):
            parts = itertools.cycle(torch.arange(8 * n).split(n))
            views = 0
            begin = clock()
            while clock() < begin + 1.5:
                contestants[name](next(parts))
                views += 2 * n if "files" in name else n
            return views / (clock() - begin)

        figures, gemm = alternate({name: partial(rate, name) for name in contestants}, args.rounds)
        from_memory = median(figures["ours, decoded before, as in training"])
        from_files = median(figures["ours, from files"])
        rows = []
        for name, rates in figures.items():
            rows.append({"pipeline": name, "median": median(rates), "best": max(rates),
                         "ours / it": from_memory / median(rates),
                         "ours from files / it": from_files / median(rates)})
        show(f"Augmentation, {size} pixels, blur {blur}, views/s on one core", rows, gemm)
    show("Largest deviation from torchvision, same parameters, in 1/255", deviations(args.data))


def deviations(data):
    """-> rows: each operation on a batch, beside torchvision's on one image after the other."""
    import common

    n = 256
    _, pixels, _ = some_images(data, 32, n)
    x = pixels / 255
    pairs = {}  # name: our result, theirs
    boxes = torch.cat([torch.randint(0, 16, (n, 2)), torch.randint(1, 17, (n, 2))], 1)
    theirs = [TF.resized_crop(image, *box, [224, 224]) for image, box in zip(x, boxes.tolist())]
    pairs["resized_crop"] = common.resized_crop(pixels, boxes.float(), 224), theirs
    for i, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        torch.manual_seed(i)
        values = 0.5 * common.uniform(n, 4, device=CPU, low=-1.0)[:, i]
        if name != "hue":
            values += 1
        adjust = getattr(TF, f"adjust_{name}")
        theirs = [adjust(image, value) for image, value in zip(x, values.tolist())]
        torch.manual_seed(i)  # color_jitter draws the same
        strengths = [0.0] * 4
        strengths[i] = 0.5
        pairs[name] = common.color_jitter(x, *strengths, p=1.0), theirs
    pairs["grayscale"] = common.random_grayscale(x, 1.0), TF.rgb_to_grayscale(x, 3)
    pairs["solarize"] = common.random_solarize(x, 1.0), TF.solarize(x, 0.5)
    pairs["blur"] = common.gaussian_blur(x, 1.0, 9, (1.0, 1.0)), TF.gaussian_blur(x, 9, 1.0)
    rows = []
    for name, (ours, theirs) in pairs.items():
        largest = max((a - b).abs().max().item() for a, b in zip(ours, theirs))
        rows.append({"operation": name, "deviation": 255 * largest})
    return rows


def loop(args, batch=256):
    flags = ["--data", args.data, "--epochs", "50"]
    contestants = {"simclr.py": lambda: script("simclr", flags, batch, args.steps)["images/s"]}
    lightly = ((2, CORES), (2, 1), (0, CORES)) if has("lightly") else ()
    for workers, threads in lightly:
        contestants[f"lightly, {workers} workers, {threads} threads"] = partial(
            peer_loop, args.data, batch, workers, threads, args.steps)
    figures, gemm = alternate(contestants, args.rounds)
    ours = median(figures["simclr.py"])
    rows = []
    for name, rates in figures.items():
        rows.append({"loop": name, "median": median(rates), "best": max(rates),
                     "ours / it": ours / median(rates)})
    show(f"Training loop, resnet8, batch {batch}, images/s", rows, gemm)


def step(args):
    rows = []
    gemm = []
    for method in args.methods:
        found, flop = timed_steps(method, ["--epochs", "100"], args.rounds, args.steps)
        rows.append({
            "method": method,
            "step, ms": 1e3 * median(seconds for seconds, _, _ in found),
            "without / step": median(bare / seconds for seconds, bare, _ in found),
            "share of GEMM": median(flop / seconds / rate for seconds, _, rate in found),
            "share without": median(flop / bare / rate for _, bare, rate in found)})
        gemm += [rate for _, _, rate in found]
    show("Steps of the demo recipes, with and without augmentation", rows, gemm)


def start(args):
    from simclr import RECIPES

    def first(*flags):
        return script("simclr", flags, steps=1)["first step, s"]

    def imports():
        begin = clock()
        subprocess.run([sys.executable, "-c", "import torch, torchvision"], check=True)
        return clock() - begin

    def first_with_data():
        return first("--data", args.data)

    figures, gemm = alternate({
        "imports": imports,
        "first step, synthetic images": first,
        "first step, --data": first_with_data}, args.rounds)
    steps = RECIPES["epochs"][0] * (5000 // RECIPES["batch_size"][0])
    found, _ = timed_steps("simclr", ["--epochs", "50"], 2, 20)
    report = script("simclr", [])
    bare = steps * median(bare for _, bare, _ in found)
    rows = [{"to": name, "seconds": median(f)} for name, f in figures.items()]
    rows.append({"to": "report, synthetic images", "seconds": report["end, s"], **report["memory"]})
    rows.append({"to": "as many steps without augmentation", "seconds": bare})
    show("Start of simclr.py", rows, gemm)


def evaluation(args):
    """The usual protocol encodes crops anew in each of 100 epochs; one of them is measured."""
    import common
    from linear_probe import extract_features, knn, linear_probe, load_backbone
    from simclr import parse_args

    flags = ["--data", args.data, "--max-images", str(args.images)]
    out = script("simclr", flags)["out"]
    backbone = common.make_backbone("resnet8", 32).eval()
    load_backbone(f"{out}/backbone.pth", network=backbone)
    train, test = common.load_data(parse_args(flags), CPU)
    gemm = gemm_rate()
    times = [clock()]
    features = []
    for images in train, test:
        rows = torch.arange(len(images))
        encoded, _ = extract_features(backbone, images, rows, 32, CPU)
        features += [encoded[0], images.labels]
    times.append(clock())
    vote = knn(*features)
    times.append(clock())
    probe = linear_probe(*features)["probe"]
    times.append(clock())
    for pixels, aspect in train.load(torch.randperm(len(train)).split(256), CPU):
        crops = common.random_resized_crop(pixels, aspect, 32, (0.08, 1.0))
        with torch.no_grad():
            backbone(common.normalize(common.random_horizontal_flip(crops)))
    times.append(clock())
    seconds = [end - begin for begin, end in itertools.pairwise(times)]
    usual = 100 * seconds[3]
    show(f"Evaluation, {len(train):,} training and {len(test):,} test images", [
        {"what": "features, once", "seconds": seconds[0]},
        {"what": "kNN", "seconds": seconds[1], "top-1, %": vote},
        {"what": "linear probe", "seconds": seconds[2], "top-1, %": probe},
        {"what": "100 epochs that encode", "seconds": usual,
         "it / these three": usual / sum(seconds[:3])}], [gemm])


def scaling(args):
    some = ["--data", args.data, "--epochs", "100", "--max-images"]
    cases = [(f"{n} images", some + [str(n)], 64, 0) for n in (1000, 10000, 50000)]
    cases += [(f"batch {b}", some + ["10000"], b, 0) for b in (64, 128, 256, 512)]
    cases += [(f"{p} processes, batch 256", some + ["10000"], 256, p) for p in (1, 2)]
    cases += [(f"{s} pixels", some + ["9999", "--image-size", str(s)], 64, 0) for s in (32, 64, 96)]
    rows = []
    gemm = []
    for name, flags, batch, processes in cases:
        gemm.append(gemm_rate())
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
        recipes = import_module(method).RECIPES
        batch = recipes["batch_size"][recipes["recipe"].index("imagenet")]
        flags = "--recipe imagenet --max-images 64 -b".split()
        small = traffic(method, flags + ["16"])
        large = traffic(method, flags + ["32"])
        sizes = {}
        for kind in small:
            per_image = (large[kind] - small[kind]) / 16
            sizes[kind] = small[kind] + per_image * (batch - 16)
        sent = (7 / 4 * sum(sizes.values()) - 3 / 4 * sizes["buffers"]) / 1e6
        row = {"method": method, "batch": batch}
        row.update({kind: size / 1e6 for kind, size in sizes.items()})
        row.update({"sent by a GPU": sent, "ms at 100 GB/s": sent / 100})
        rows.append(row)
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
