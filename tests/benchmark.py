"""How fast the scripts are, beside their peers and beside what the machine could do at most.

    python tests/benchmark.py COMMAND --data CIFAR --photos FOLDER --json FILE

CIFAR is CIFAR-10 as JPEG or PNG files, CIFAR/train/<class>/ and CIFAR/test/<class>/; FOLDER holds
full-size photographs. Commands:

    augmentation   views/s on one core: ours, lightly, kornia, torchvision; deviation per operation
    loop           training of one network on the same files: simclr.py, and lightly's example
    step           each method's step, and the same step without augmentation; share of GEMM peak
    start          from the command to the first step and to the report; memory
    evaluation     kNN and probe on features encoded once; re-encoding in each of 100 epochs
    scaling        time and memory against images, batch, resolution and processes
    network        on paper: bytes that each of 8 GPUs sends per step (counted, nothing is sent)
    gpu-simclr     ResNet-18 on CIFAR-10, beside lightly's loop with all CPU cores
    gpu-vit        DINO ViT-S/16 with 2 + 8 crops and MAE ViT-B/16, beside lightly's DINO loader
    gpu-step       each method's step without augmentation, and without EMA, optimizer and log
    gpu-syncs      how often the host waits for the device in 50 steps
    gpu-compile    --compile beside eager
    gpu-decode     photographs decoded by the device, and by worker processes

A shared machine's speed varies by factors within seconds, so only ratios mean anything. Contestants
alternate, in an order that reverses from round to round; each figure is the median of the rounds,
and the matrix product (GEMM) that was timed beside each round shows how steady the machine was.
What takes minutes is measured once: scaling, evaluation, gpu-vit and start's report.
Nothing is installed: a row whose peer is missing is left out, and a line says how to get it.
"""

import argparse
import gc
import importlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from statistics import median
from unittest import mock

STARTED = time.perf_counter()

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
METHODS = "simclr moco byol simsiam swav barlow dino mae rotation jigsaw".split()
MIB = 2**20

# --------------------------------------------------------------------------- measuring and printing


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gemm_rate():
    """FLOP/s of the best of 3 products: fp32 2048³ on the CPU, bf16 8192³ on CUDA."""
    cuda = torch.cuda.is_available()
    n, kind = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    a, best = torch.randn(n, n, device="cuda" if cuda else "cpu", dtype=kind), math.inf
    for _ in range(3):
        synchronize()
        start = time.perf_counter()
        a @ a
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_memory(process="self"):
    """Peak resident bytes (Linux, else NaN). Not ru_maxrss, which starts at the parent's."""
    with suppress(OSError, IndexError):  # a process that has just ended has no such line
        status = Path(f"/proc/{process}/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    return math.nan


def alternate(contestants, rounds):
    """{name: function -> figure} -> {name: [a figure per round]}; a GEMM's FLOP/s of each round."""
    figures, gemm = {name: [] for name in contestants}, []
    for r in range(rounds):
        gemm.append(gemm_rate())
        for name in list(contestants)[:: 1 - 2 * (r % 2)]:
            figures[name].append(contestants[name]())
            print(f"  round {r + 1}: {name}", file=sys.stderr)
    return figures, gemm


def rate(function, seconds):
    """function -> number of views that it made; -> views per second."""
    views, start = 0, time.perf_counter()
    while (now := time.perf_counter()) - start < seconds or not views:
        views += function()
    return views / (now - start)


def machine():
    cpu = platform.processor() or platform.machine()
    with suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{cpu}, {os.cpu_count()} cores"


def show(args, title, rows, gemm=(), threads=None):
    """Print rows (dicts, first key: what the row is) as a markdown table; append it to --json."""
    versions = {"python": platform.python_version()}
    for name in "torch", "torchvision", "lightly", "kornia":
        with suppress(ImportError):
            versions[name] = importlib.metadata.version(name)
    threads = threads or torch.get_num_threads()
    print(f"\n**{title}** · {machine()}, {threads} threads · "
          + ", ".join(f"{name} {version}" for name, version in versions.items()))
    if gemm:
        print(f"GEMM beside the rounds, GFLOP/s: {', '.join(f'{g / 1e9:,.0f}' for g in gemm)}")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("\n" + "| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(cell(row.get(column, "")) for column in columns) + " |")
    if args.json:
        with open(args.json, "a") as file:
            file.write(json.dumps({"title": title, "machine": machine(), "threads": threads,
                                   "versions": versions, "gemm": gemm, "rows": rows}) + "\n")


def cell(value):
    """A number with two significant digits at least; nothing for NaN, which is not known."""
    if value != value:
        return ""
    if isinstance(value, float):
        return f"{value:,.{max(0, 2 - int(math.log10(abs(value) or 1)))}f}"
    return str(value)


def missing(name, packages):
    """Whether a peer cannot be imported; says how to get it."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{error}: left out; to have it, pip install {packages}")
        return True


# --------------------------------------------------------------- scripts, driven from the outside


def child(function, *, processes=0, threads=None, **arguments):
    """A function of this file in a process of its own (or of torchrun) -> what it returns."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *torchrun * bool(processes), __file__, "--child", function.__name__,
               json.dumps(arguments)]
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    done = subprocess.run(command, env=os.environ | environment, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[1:])}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Done(Exception):
    """Ends a run, out of the middle of its loop."""


def drive(method, flags, visit, **patches):
    """`method`.train with `flags`; its loop gets what visit(run, steps) yields, then ends.
    patches: attributes of common.py to be replaced."""
    common, module = importlib.import_module("common"), importlib.import_module(method)
    original, handlers = common.Run.steps, {s: signal.getsignal(s) for s in (2, 15)}

    def steps(run):
        yield from visit(run, original(run))
        raise Done

    with mock.patch.multiple(common, **patches) if patches else nullcontext(), \
            mock.patch.object(common.Run, "steps", steps), suppress(Done):
        module.train(module.parse_args(flags))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    gc.collect()  # ends worker processes of loaders; at exit, Python would wait for them


def tensors(value):
    """Bytes of all tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value
    return sum(map(tensors, parts)) if isinstance(value, (dict, list, tuple)) else 0


def throughput(method, flags, steps=40, warm=5, stream=False):
    """A process's steady images/s, after `warm` steps. stream: as if images did not fit memory."""
    found = {}

    def visit(run, inner):
        for i, item in zip(range(steps), inner):
            yield item
            if i + 1 in (1, warm, steps):
                synchronize()
                found[i + 1] = time.perf_counter()
        sets = [s.pixels for s in (run.train_set, run.test_set) if s and s.pixels is not None]
        seconds = (found[steps] - found[warm]) / (steps - warm)
        found.update(images_per_s=run.args.batch_size / seconds, peak=peak_memory(),
                     first=found[1] - STARTED, images=tensors(sets),
                     state=tensors([run.model.state_dict(), run.optimizer.state_dict()]),
                     count=len(run.train_set), gpu=torch.cuda.max_memory_allocated())

    drive(method, flags, visit, **{"free_memory": lambda device: 0} if stream else {})
    return found


def blocks(method, flags, without, rounds=4, block=10):
    """Alternating blocks of steps of a script, with everything and `without` something:

    augmentation  each step gets the first step's images and views; nothing is logged
    upkeep        no optimizer step, moving average and log
    -> seconds per step of each block, FLOP per step, GEMM rate beside each round, memory.
    """
    common, module = importlib.import_module("common"), importlib.import_module(method)
    augment, log, ema_update = (common.Augment.__call__, common.Run.log,
                                getattr(module, "ema_update", None))
    found = {"with": [], "without": [], "gemm": []}
    off, calls, views = False, itertools.count(), {}

    def augment_or_not(self, *inputs):
        if not off or without != "augmentation":
            return augment(self, *inputs)
        key = next(calls)  # the views of a step differ, as they should
        if key not in views:
            views[key] = augment(self, *inputs)
        return views[key]

    def visit(run, inner):
        nonlocal off, calls
        step = run.optimizer.step
        run.optimizer.step = lambda: None if off and without == "upkeep" else step()
        next(inner)
        first = next(inner)  # not a step that is logged
        for r in range(-1, rounds):
            for off in (False, True)[:: 1 - 2 * (r % 2)]:
                repeats = off and without == "augmentation"
                synchronize()
                start = time.perf_counter()
                for _, item in zip(range(block), itertools.repeat(first) if repeats else inner):
                    calls = itertools.count()
                    yield item
                synchronize()
                if r >= 0:
                    seconds = (time.perf_counter() - start) / block
                    found["without" if off else "with"].append(seconds)
            if r >= 0:
                found["gemm"].append(gemm_rate())
        off, calls = True, itertools.count()
        with FlopCounterMode(display=False) as counter:
            yield first
        found.update(flop=counter.get_total_flops(), peak=peak_memory(), batch=run.args.batch_size)

    with mock.patch.object(common.Augment, "__call__", augment_or_not), \
            mock.patch.object(common.Run, "log", lambda *a, **k: None if off else log(*a, **k)), \
            mock.patch.object(module, "ema_update", create=True, new=lambda *a: None if off and
                              without == "upkeep" else ema_update(*a)):
        drive(method, flags, visit)
    return found


def peer_loop(data, arch, size, batch, workers, steps):
    """lightly's example of SimCLR on our network, steady images/s, after its first full queue."""
    from common import make_backbone
    from lightly.loss import NTXentLoss
    from simclr import SimCLR

    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = make_backbone(arch, size)
    model = SimCLR(backbone, backbone.feature_dim).to(device)
    loader = peer_loader(data, peer_transform(size, blur=0.0), batch, workers)
    criterion, marks, step, warm = NTXentLoss(), {}, 0, 8 + 2 * workers
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    steps += warm
    while step < steps:
        for (view1, view2), _ in loader:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                z1 = model.projector(model.backbone(view1.to(device)))
                z2 = model.projector(model.backbone(view2.to(device)))
                loss = criterion(z1.float(), z2.float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step in (warm, steps):
                synchronize()
                marks[step] = time.perf_counter()
            if step == steps:
                break
    return {"images_per_s": batch * (steps - warm) / (marks[steps] - marks[warm])}


def peer_transform(size, blur):
    """The recipe that simclr.py has for CIFAR."""
    from lightly.transforms import SimCLRTransform

    return SimCLRTransform(input_size=size, cj_strength=0.5, gaussian_blur=blur)


def peer_loader(data, transform, batch, workers):
    folder = Path(data, "train") if Path(data, "train").is_dir() else data
    return torch.utils.data.DataLoader(
        torchvision.datasets.ImageFolder(folder, transform), batch, shuffle=True, drop_last=True,
        num_workers=workers, pin_memory=torch.cuda.is_available())


# --------------------------------------------------------------------------------------- commands


def our_augment(size, blur):
    """simclr.py's, with torchvision's default interpolation, as all the peers."""
    from common import (Augment, ColorJitter, GaussianBlur, Normalize, RandomGrayscale,
                        RandomHorizontalFlip, RandomResizedCrop)

    return Augment([RandomResizedCrop(size), RandomHorizontalFlip(),
                    ColorJitter(0.4, 0.4, 0.4, 0.1), RandomGrayscale(), GaussianBlur(blur),
                    Normalize()])


def files_and_set(folder, size, count):
    """-> paths of some images of a folder, and an ImageSet of them, decoded to a canvas."""
    from common import find_sets

    images = find_sets(folder)[0]
    images = images.subset(torch.arange(len(images)) % max(1, len(images) // count) == 0)
    images.decode(min(max(size * 8 // 7, 64), images.median_side()), 0, torch.device("cpu"))
    return images.source, images


def augmentation(args):
    torch.set_num_threads(1)
    for size, folder in (32, args.data), (224, args.photos):
        if not folder:
            print(f"{size} pixels left out: no {'--photos' if size > 64 else '--data'}")
            continue
        files, images = files_and_set(folder, size, 512 if size == 32 else 48)
        bare = type(images)(files, images.names, images.labels, [])  # decodes on demand
        bare.canvas = images.canvas
        pil = [Image.open(file).convert("RGB") for file in files] if size == 32 else []
        chunk, positions = 64 if size == 32 else 12, itertools.count()
        for blur in (0.0, 0.5) if size == 32 else (0.5,):
            augment = our_augment(size, blur)

            def some(rows):
                first = next(positions) * chunk % len(rows)
                return rows[first : first + chunk]

            def decode():
                pixels, aspect = zip(*(bare[i][:2] for i in some(range(len(files)))))
                return torch.stack(pixels), torch.tensor(aspect)

            def ours_cached():
                return len(augment(images.pixels, images.aspect))

            def ours_files():  # the image is decoded once for its two views, as by lightly
                batch = decode()
                return len(augment(*batch)) + len(augment(*batch))

            contestants = {"ours, decoded before, as in training": ours_cached,
                           "ours, from files": ours_files}
            if not missing("lightly.transforms", "lightly"):
                peer = peer_transform(size, blur)
                contestants["lightly, from files"] = lambda: sum(
                    len(peer(Image.open(file).convert("RGB"))) for file in some(files))
                if pil:
                    contestants["lightly, PIL images in memory"] = lambda: sum(
                        len(peer(image)) for image in some(pil))
            if not missing("kornia.augmentation", "kornia"):
                import kornia.augmentation as K
                kornia = torch.nn.Sequential(
                    K.RandomResizedCrop((size, size)), K.RandomHorizontalFlip(),
                    K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), K.RandomGrayscale(p=0.2),
                    K.RandomGaussianBlur((size // 10 | 1,) * 2, (0.1, 2.0), p=blur),
                    K.Normalize(torch.tensor([0.485, 0.456, 0.406]),
                                torch.tensor([0.229, 0.224, 0.225])))
                contestants["kornia, batches in memory"] = lambda: len(
                    kornia(some(images.pixels).float() / 255))
            each = v2.Compose([
                v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(size // 10 | 1, (0.1, 2.0))], blur),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
            contestants["torchvision v2, tensors in memory"] = lambda: len(
                [each(image) for image in some(images.pixels)])
            figures, gemm = alternate({name: lambda f=f: rate(f, args.seconds)
                                       for name, f in contestants.items()}, args.rounds)
            title = f"Augmentation, {size} pixels, blur {blur}, views/s on one core"
            ours = [median(figures[name]) for name in list(contestants)[:2]]
            show(args, title, [
                {"pipeline": name, "median": median(f), "best": max(f),
                 "ours / it": ours[0] / median(f), "ours from files / it": ours[1] / median(f)}
                for name, f in figures.items()], gemm)
    show(args, "Largest deviation from torchvision, same parameters, in 1/255", deviations(args))


def deviations(args):
    import common

    torch.manual_seed(0)
    x = files_and_set(args.data, 32, 256)[1].pixels.float() / 255
    n, size = len(x), x.shape[3]
    top, left = torch.randint(0, size // 2, (2, n))
    boxes = torch.stack([top, left, *torch.randint(1, size // 2, (2, n))], 1)
    factors, shifts, sigmas = 2 * torch.rand(n), torch.rand(n) - 0.5, 0.1 + 1.9 * torch.rand(n)
    cases = {name: (getattr(common, name)(x, values), [getattr(TF, name)(*pair) for pair in
                                                       zip(x, values.tolist())])
             for name, values in {"adjust_brightness": factors, "adjust_contrast": factors,
                                  "adjust_saturation": factors, "adjust_hue": shifts,
                                  "solarize": factors / 2}.items()}
    for side in 32, 224:
        cases[f"resized_crop to {side}"] = (common.resized_crop(x, boxes.float(), side), [
            TF.resized_crop(i, *box, [side, side]) for i, box in zip(x, boxes.tolist())])
    for kernel in 3, 9:
        cases[f"gaussian_blur {kernel}"] = (common.gaussian_blur(x, sigmas, kernel), [
            TF.gaussian_blur(i, [kernel] * 2, sigma) for i, sigma in zip(x, sigmas.tolist())])
    return [{"operation": name, "deviation": 255 * (ours - torch.stack(theirs)).abs().max().item()}
            for name, (ours, theirs) in cases.items()]


def loop(args, arch="resnet8", recipe="demo"):
    cuda, args.batch_size = torch.cuda.is_available(), args.batch_size or 256
    flags = ["--data", args.data, "--recipe", recipe, "-b", str(args.batch_size), "--epochs", "50",
             *(["--max-images", str(args.images)] if args.images else [])]

    def ours():
        return child(throughput, method="simclr", flags=flags,
                     steps=args.steps or 40)["images_per_s"]

    contestants = {"simclr.py": ours}
    ours()  # fills the cache of decoded images
    if not missing("lightly.transforms", "lightly"):
        settings = [(os.cpu_count(), None)] if cuda else [(2, None), (2, 1), (0, None)]
        for workers, threads in settings:
            name = f"lightly, {workers} workers, {threads or 'default'} threads"
            contestants[name] = lambda workers=workers, threads=threads: child(
                peer_loop, threads=threads, data=args.data, arch=arch, size=32,
                batch=args.batch_size, workers=workers, steps=args.steps or 40)["images_per_s"]
    figures, gemm = alternate(contestants, args.rounds)
    best = median(figures["simclr.py"])
    show(args, f"Training loop, {arch}, batch {args.batch_size}, images/s",
         [{"loop": name, "median": median(f), "rounds": ", ".join(f"{v:,.0f}" for v in f),
           "ours / it": best / median(f)} for name, f in figures.items()], gemm)
    return best, gemm


def step(args, without="augmentation"):
    rows, gemms = [], []
    cuda = torch.cuda.is_available()
    for method in args.methods:
        flags = ["--recipe", "cifar", "--data", args.data] if cuda else ["--epochs", "100"]
        found = child(blocks, method=method, flags=flags, without=without, rounds=args.rounds,
                      block=args.steps or 10)
        gemms += found["gemm"]
        pairs = list(zip(found["with"], found["without"], found["gemm"]))
        full, bare = median(found["with"]), median(found["without"])
        rows.append({"method": method, "step, ms": 1e3 * full, f"without {without}, ms": 1e3 * bare,
                     "without / step": median(b / f for f, b, _ in pairs),
                     "images/s": found["batch"] / full, "GFLOP/step": found["flop"] / 1e9,
                     "share of GEMM": median(found["flop"] / f / g for f, _, g in pairs),
                     "share without": median(found["flop"] / b / g for _, b, g in pairs),
                     "peak memory, MiB": found["peak"] / MIB})
        print(f"  {method}", file=sys.stderr)
    show(args, f"Steps with and without {without}, blocks of {args.steps or 10}", rows, gemms)


def until(command, word=None):
    """Run a script -> seconds until a line with the word, or until its end; peak memory in bytes by
    then."""
    start, peak = time.perf_counter(), 0.0
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            peak = max(peak, peak_memory(process.pid))  # in this order NaN changes nothing
            if word and word in line:
                break
        else:
            if process.wait() or word:
                sys.exit(f"{' '.join(command)} ended with status {process.returncode}")
        seconds = time.perf_counter() - start
        process.kill()
    return seconds, peak


def start(args):
    from simclr import RECIPES

    first_step = [str(ROOT / "simclr.py"), "--data", args.data, "--recipe", "demo"]
    bare = ["-c", "import torch, torchvision"]

    def first():
        shutil.rmtree("data/cache", ignore_errors=True)
        return until(first_step, "step 1/")[0]

    figures, gemm = alternate({  # reversed rounds follow a first start, too: the cache is there
        "imports of torch and torchvision": lambda: until(bare)[0],
        "first start to the first step": first,
        "second start to the first step": lambda: until(first_step, "step 1/")[0]}, args.rounds)
    base = median(figures["imports of torch and torchvision"])
    show(args, "Start, seconds", [
        {"what": name, "median": median(f), "best": min(f), "it / imports": median(f) / base}
        for name, f in figures.items()], gemm)
    used = child(throughput, method="simclr", flags=first_step[1:], steps=args.steps or 40)
    base = child(peak_memory)
    bound = base + 1.5 * used["images"] + used["state"]
    show(args, "Memory of simclr.py on that folder, MiB", [
        {"what": name, "MiB": value / MIB} for name, value in {
            "peak": used["peak"], "imports": base, "images": used["images"],
            "model and optimizer": used["state"],
            "imports, 1.5 × images, model and optimizer": bound}.items()])
    seconds, peak = until([str(ROOT / "simclr.py")])
    steps = RECIPES["epochs"][0] * (5000 // RECIPES["batch_size"][0])  # of the demonstration
    bare = child(blocks, method="simclr", flags=["--epochs", "50"], without="augmentation",
                 rounds=2)
    step_seconds = median(bare["without"])
    show(args, "python simclr.py, from the command to the report", [
        {"what": "seconds", "value": seconds},
        {"what": "seconds of as many steps without augmentation", "value": steps * step_seconds},
        {"what": "peak memory, MiB", "value": peak / MIB}], bare["gemm"])


def evaluation(args):
    from common import Augment, Normalize, RandomHorizontalFlip, RandomResizedCrop, load_data
    from linear_probe import extract_features, knn, labelled_features, linear_probe, load_backbone

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = args.images or 10000
    if not args.checkpoint:
        until([str(ROOT / "simclr.py"), "--data", args.data, "--recipe", "demo",
               "--max-images", str(count), "--out", "evaluated"])
    backbone, _, size = load_backbone(args.checkpoint or "evaluated/backbone.pth")
    backbone = backbone.to(device, memory_format=torch.channels_last).eval()
    train, test = load_data(args.data, size, count, 2, device)
    test = test.subset(torch.arange(len(test)) % max(1, 5 * len(test) // len(train)) == 0)
    gemm, start = [gemm_rate()], time.perf_counter()
    found = labelled_features(backbone, train, test, size, device)
    encoded = time.perf_counter()
    neighbours, voted = knn(*found), time.perf_counter()
    probe = linear_probe(*found)["probe"]
    ours = time.perf_counter() - start
    show(args, f"Evaluation, {len(train)} training and {len(test)} test images, seconds", [
        {"part": "features, once", "seconds": encoded - start},
        {"part": "kNN", "seconds": voted - encoded, "top-1, %": neighbours},
        {"part": "linear probe", "seconds": ours + start - voted, "top-1, %": probe}])

    # The usual protocol: each epoch encodes crops, SGD on a linear layer. Four rates are trained
    # side by side, and the best one by test accuracy counts: to its advantage, as is our pipeline.
    view = Augment([RandomResizedCrop(size), RandomHorizontalFlip(), Normalize()])
    test_x, test_y = found[2:]
    heads = [torch.nn.Linear(backbone.feature_dim, len(train.classes)).to(device) for _ in range(4)]
    optimizer = torch.optim.SGD([{"params": head.parameters(), "lr": lr} for head, lr
                                 in zip(heads, (0.1, 1.0, 10.0, 30.0))], momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    start = time.perf_counter()
    for epoch in range(args.epochs):
        order = torch.randperm(len(train)).split(256)
        for rows, (images, aspect) in zip(order, train.batches(order, device)):
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16,
                                                 enabled=device.type == "cuda"):
                features = backbone(view(images, aspect)).float()
            labels = train.labels[rows].to(device)
            losses = [F.cross_entropy(head(features), labels) for head in heads]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
        schedule.step()
        if epoch % 10 == 9:
            gemm.append(gemm_rate())
    seconds = time.perf_counter() - start
    top1 = max(100 * (head(test_x).argmax(1) == test_y).float().mean().item() for head in heads)
    rows = [{"protocol": "features once, kNN and probe", "seconds": ours, "top-1, %": probe},
            {"protocol": f"re-encoded in each of {args.epochs} epochs", "seconds": seconds,
             "top-1, %": top1, "it / ours": seconds / ours}]
    if args.epochs != 100:
        rows.append({"protocol": "the same, 100 epochs, extrapolated", "it / ours":
                     100 * seconds / args.epochs / ours, "seconds": 100 * seconds / args.epochs})
    show(args, "Evaluation protocols", rows, gemm)


def scaling(args):
    """Beside each other: rows of a group differ in one thing."""
    cifar, rows, gemm = ["--data", args.data, "--recipe", "demo", "--epochs", "100"], [], []
    some, cores = cifar + ["--max-images", "10000", "-b"], os.cpu_count()
    cases = [(f"{n} images", cifar + ["--max-images", str(n)], 0) for n in (1000, 10000, 50000)]
    cases += [(f"batch {b}", some + [str(b)], 0) for b in (64, 128, 256, 512)]
    if args.photos:
        cases += [(f"{s} pixels", ["--data", args.photos, "--recipe", "demo", "--epochs", "1000",
                                   "--image-size", str(s), "-b", "64"], 0) for s in (32, 64, 96)]
    cases += [(f"{p} processes of {max(1, cores // p)} threads, batch 256", some + ["256"], p)
              for p in (1, 2) if p <= (torch.cuda.device_count() or 2)]
    for name, flags, processes in cases:
        shutil.rmtree("data/cache", ignore_errors=True)  # so that each first start decodes
        threads = max(1, cores // processes) if processes else None
        gemm.append(gemm_rate())
        starts = [child(throughput, processes=processes, threads=threads, method="simclr",
                        flags=flags, steps=args.steps or 40) for _ in range(2)]
        last = starts[1]
        rows.append({"simclr.py with": name, "first start, s": starts[0]["first"],
                     "second start, s": last["first"], "images/s": last["images_per_s"],
                     "images, MiB": last["images"] / MIB,
                     "peak of a process, MiB": last["peak"] / MIB})
        print(f"  {name}", file=sys.stderr)
    show(args, "Scaling of simclr.py, the demonstration's network", rows, gemm)


def traffic(method, flags, world=8):
    """Bytes handed to collectives in one step of one of `world` processes, by kind."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # The fake backend communicates nothing, so one process can play its part of the whole.
    os.environ |= {"WORLD_SIZE": str(world), "RANK": "0", "LOCAL_RANK": "0"}
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    counted = {"gradients": 0, "buffers": 0, "statistics": 0, "embeddings": 0, "images": 0}

    def all_reduce(x, *_):
        if counting:
            vector = x.numel() == max(x.shape, default=1)
            kind = "statistics" if vector else "embeddings" if x.dim() < 5 else "images"
            counted[kind] += x.nbytes

    def hook(_, bucket):
        counted["gradients"] += bucket.buffer().nbytes
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def wrap(model, *_):
        network = parallel(model)
        network.register_comm_hook(None, hook)
        counted["buffers"] = sum(b.nbytes for b in network.modules_buffers)
        return network

    def visit(run, inner):
        nonlocal counting
        item, counting = next(inner), True
        yield item
        counting = False

    counting, parallel = False, torch.nn.parallel.DistributedDataParallel
    common = importlib.import_module("common")
    with mock.patch.object(dist, "all_reduce", all_reduce), \
            mock.patch.object(torch.nn.parallel, "DistributedDataParallel", wrap), \
            mock.patch.object(common.Run, "log", lambda *a, **k: None):
        drive(method, flags, visit)
    dist.destroy_process_group()
    return counted


def network(args):
    """Each kind is linear in the batch, so two small batches give it for the recipe's."""
    rows = []
    for method in args.methods:
        batch = importlib.import_module(method).RECIPES["batch_size"][2]
        flags = "--recipe imagenet --max-images 64 --device cpu -b".split()
        small, large = (child(traffic, method=method, flags=flags + [b]) for b in ("16", "32"))
        sizes = {kind: small[kind] + (large[kind] - small[kind]) / 16 * (batch - 16)
                 for kind in small}
        ring = 2 * 7 / 8 * (sum(sizes.values()) - sizes["buffers"]) + sizes["buffers"]
        rows.append({"method": method, "batch": batch} | {k: v / 1e6 for k, v in sizes.items()}
                    | {"sent by a GPU": ring / 1e6, "ms at 100 GB/s": ring / 1e8})
        print(f"  {method}", file=sys.stderr)
    show(args, "On paper: MB per step and process, imagenet recipes, 8 GPUs", rows)


# -------------------------------------------------------------------------------------------- CUDA


def gpu_simclr(args):
    args.batch_size, args.steps = 512, args.steps or 200
    images_per_s, gemm = loop(args, "resnet18", "cifar")
    flags = ["--data", args.data, "--recipe", "cifar"]
    found = child(blocks, method="simclr", flags=flags, without="augmentation", rounds=2)
    full = images_per_s * found["flop"] / found["batch"]
    show(args, "SimCLR, ResNet-18, CIFAR-10", [
        {"what": "share of the bf16 GEMM", "value": full / median(gemm)},
        {"what": "minutes of 200 epochs of 50,000 images", "value": 200 * 5e4 / images_per_s / 60}])


def replicated(photos, count):
    """A folder with links to the photographs, again and again."""
    files = sorted(Path(photos).resolve().rglob("*.[jJ][pP]*[gG]"))
    folder = Path("replicated", "train", "photos")
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        with suppress(FileExistsError):
            (folder / f"{i:05}.jpg").symlink_to(files[i % len(files)])
    return str(folder.parent.parent)


def loader_rate(data, batch, workers):
    """lightly's loader of DINO's 2 + 8 views, no network behind it: images/s."""
    from lightly.transforms import DINOTransform

    loader = peer_loader(data, DINOTransform(n_local_views=8), batch, workers)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # epoch after epoch
    next(batches)
    return rate(lambda: len(next(batches)[0][0]), 20)


def gpu_vit(args):
    data, batch = replicated(args.photos, 8192), args.batch_size or 128
    rows, gemm = [], []
    for method in "dino", "mae":
        flags = ["--data", data, "--recipe", "imagenet", "-b", str(batch), "--epochs", "100"]
        flop = child(blocks, method=method, flags=flags, without="augmentation", rounds=1)["flop"]
        for name, more, stream in (("", [], False), (", --compile", ["--compile"], False),
                                   (", not in memory", [], True)):
            gemm.append(gemm_rate())
            found = child(throughput, method=method, flags=flags + more, stream=stream, warm=10)
            rows.append({"loop": f"{method}.py{name}", "images/s": found["images_per_s"],
                         "share of GEMM": found["images_per_s"] * flop / batch / gemm[-1],
                         "GPU memory, MiB": found["gpu"] / MIB})
    if not missing("lightly.transforms", "lightly"):
        rows.append({"loop": "lightly's DINO loader alone, all cores", "images/s": child(
            loader_rate, threads=1, data=data, batch=32, workers=os.cpu_count())})
    show(args, f"ViTs at 224 pixels, batch {batch}, photographs replicated", rows, gemm)


def syncs(method, flags, steps=50):
    """How often the host waits for the device in steps 2 to 51, and how many of them are logged."""
    waits = 0

    def visit(run, inner):
        nonlocal waits
        yield next(inner)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            for _, item in zip(range(steps), inner):
                yield item
            torch.cuda.set_sync_debug_mode("default")
        waits = sum("synchroniz" in str(w.message) for w in caught)

    drive(method, flags, visit)
    return waits


def gpu_syncs(args):
    show(args, "Host waits in 50 steps, one of them logged", [
        {"method": method, "waits": child(syncs, method=method, flags=[
            "--data", args.data, "--recipe", "cifar", "-b", "128", "-p", "51"])}
        for method in args.methods])


def gpu_step(args):
    step(args)
    step(args, "upkeep")


def gpu_compile(args):
    rows, gemm = [], []
    for method in args.methods:
        flags = ["--data", args.data, "--recipe", "cifar"]
        names = {"eager": flags, "compiled": flags + ["--compile"]}
        figures, more = alternate({name: lambda f=f: child(throughput, method=method, flags=f)
                                   for name, f in names.items()}, max(1, args.rounds // 2))
        gemm += more
        eager, compiled = ({key: median(f[key] for f in figures[name]) for key in
                            ("images_per_s", "first")} for name in names)
        rows.append({"method": method, "eager, images/s": eager["images_per_s"],
                     "compiled, images/s": compiled["images_per_s"],
                     "ratio": compiled["images_per_s"] / eager["images_per_s"],
                     "eager, s to the first step": eager["first"],
                     "compiled, s": compiled["first"]})
    show(args, "--compile", rows, gemm)


def gpu_decode(args):
    """Photographs -> squares of 256 pixels on the device."""
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    files, images = files_and_set(args.photos, 224, 200)
    images.pixels, images.workers = None, os.cpu_count()
    cuda = torch.device("cuda")

    def device():
        squares = []
        for first in range(0, len(files), 50):
            raw = [read_file(file) for file in files[first : first + 50]]
            for image in decode_jpeg(raw, ImageReadMode.RGB, device="cuda"):
                squares.append(TF.resize(image, [256, 256], v2.InterpolationMode.BICUBIC))
        synchronize()
        return len(squares)

    def workers():
        order = (torch.arange(len(files)).repeat(5)).split(50)
        return sum(len(batch) for batch, _ in images.batches(order, cuda))

    figures, gemm = alternate({
        "decode_jpeg on the device": lambda: rate(device, args.seconds),
        "PIL in worker processes": lambda: rate(workers, args.seconds)}, args.rounds)
    show(args, "Decoding of photographs, images/s", [
        {"decoder": name, "median": median(f), "best": max(f)}
        for name, f in figures.items()], gemm)


# ---------------------------------------------------------------------------------------- command

COMMANDS = {f.__name__.replace("_", "-"): f for f in (
    augmentation, loop, step, start, evaluation, scaling, network, gpu_simclr, gpu_vit, gpu_step,
    gpu_syncs, gpu_compile, gpu_decode)}
NEED_PHOTOS = "gpu-vit", "gpu-decode"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=COMMANDS, metavar="COMMAND")
    add("--data", metavar="CIFAR", type=os.path.abspath, help="CIFAR-10 as files in class folders")
    add("--photos", metavar="FOLDER", type=os.path.abspath, help="full-size photographs")
    add("--json", metavar="FILE", type=os.path.abspath, help="append each table to this file")
    add("--rounds", type=int, default=4, help="alternations (default 4)")
    add("--seconds", type=float, default=1.5, help="of a pipeline in a round (default 1.5)")
    add("--steps", type=int, help="of a loop, more than 5 (default 40); of a block (default 10)")
    add("--batch-size", type=int, help="of loop (default 256) and gpu-vit (128)")
    add("--images", type=int, help="training images, of loop (all) and evaluation (10,000)")
    add("--epochs", type=int, default=100, help="of the re-encoding protocol (default 100)")
    add("--checkpoint", type=os.path.abspath, help="evaluate this one; none: train one first")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="of step, network, gpu-...")
    args = parser.parse_args(argv)
    if args.command.startswith("gpu-") and not torch.cuda.is_available():
        return print(f"{args.command} needs a CUDA device, and there is none")
    needed = "photos" if args.command in NEED_PHOTOS else "data"
    builtin = args.command == "network" or args.command == "step" and not torch.cuda.is_available()
    if not getattr(args, needed) and not builtin:
        parser.error(f"{args.command} needs --{needed}")
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:  # of data/cache and runs/
        os.chdir(folder)
        COMMANDS[args.command](args)
        os.chdir(home)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        result = globals()[sys.argv[2]](**json.loads(sys.argv[3]))
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(result))
    else:
        main()
