"""What the ten method files share: plain functions, in sections that can each be read alone: errors
and flags, processes, data, drawn images, augmentation, backbones, around the step."""

import argparse
import copy
import json
import math
import os
import re
import sys
import time
import warnings
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from datetime import timedelta
from inspect import signature
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import cos, nn, sin, tanh
from torch.utils.data import DataLoader
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.transforms.v2.functional import pil_to_tensor, rgb_to_grayscale, to_pil_image
from torchvision.utils import save_image

warnings.filterwarnings("ignore", module="PIL")  # of very large or oddly tagged images

# ------------------------------------------------------------------------------ errors and flags


class Failure(Exception):
    """Something wrong with data, checkpoint, disk, memory or the loss, said in one line."""


def main(train, parse_args, argv=None):
    """`train(parse_args(argv))`, and the exit status: 1 after a failure, with one line on stderr, 2
    for wrong arguments, 130 after Ctrl-C."""
    try:
        train(parse_args(argv))
    except KeyboardInterrupt:
        sys.exit(130)
    except (Failure, MemoryError, OSError, RuntimeError) as error:
        known = "memory|DataLoader|gloo|NCCL|[Cc]onnection"
        if isinstance(error, RuntimeError) and not re.search(known, str(error)):
            raise
        fail(" ".join(str(error).split())[:500] or "out of memory", 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def fail(message, status):
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)  # the first process says it, and torchrun ends the others
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def wrong_arguments(message):
    fail(f"{message} (see --help)", 2)


def architecture(text):
    name, _, width = text.partition("x")
    others = torchvision.models.list_models(torchvision.models, exclude=[
        "resnet*", "googlenet", "inception*", "maxvit*", "squeezenet*", "vit*"])
    if text not in others and not (name in DEPTHS and 1 / 32 <= float(width or 1) <= 32):
        raise argparse.ArgumentTypeError(f"{text} is no ResNet, nor another network of torchvision")
    return text


# Flag: type, lowest and highest value, help; a method's own have the paper's value at the end. A
# tuple is a choice, [float] takes several numbers.
FLAGS = {
    "data": (str, None, None, "folder of images, or torchvision set (cifar10); else drawn images"),
    "recipe": (str, None, None, "column of RECIPES; else by the device and the images' size"),
    "out": (str, None, None, "the run's folder; else the next free one in runs/"),
    "resume": (bool, None, None, "continue the run in --out, or the latest one"),
    "init": (str, None, None, "file of backbone weights to start from"),
    "arch": (architecture, None, None, "resnet8 to 152, resnet18x2 is wider; or torchvision's"),
    "epochs": (int, 0, 10**6, "passes over the training images"),
    "warmup_epochs": (float, 0, 10**6, "epochs in which the learning rate rises"),
    "batch_size": (int, 2, 10**6, "images per step, over all processes"),
    "lr": (float, 0, 10**4, "peak learning rate, per 256 images"),
    "weight_decay": (float, 0, 10**4, "weight decay"),
    "image_size": (int, 8, 10**4, "side of a view, in pixels"),
    "max_images": (int, 2, 10**9, "train on only this many images"),
    "workers": (int, 0, 10**3, "processes of this machine that decode images"),
    "device": (str, None, None, "cpu, cuda, cuda:1; mps and xpu are untried; else CUDA or cpu"),
    "seed": (int, 0, 2**31, "seed of all randomness"),
    "deterministic": (bool, None, None, "bit-exact on CUDA too, but slower"),
    "compile": (bool, None, None, "torch.compile the model"),
    "print_freq": (int, 1, 10**9, "steps per log line"),
}
SHORT = {"arch": "-a", "batch_size": "-b", "weight_decay": "--wd", "workers": "-j",
         "print_freq": "-p"}
DEFAULTS = {"resume": False, "deterministic": False, "compile": False, "seed": 0, "print_freq": 20,
            "workers": min(os.cpu_count() or 1, 16)}


def parse(argv, flags, defaults, doc="", recipe=None):
    """-> Namespace of the flags; None: not given, and no default."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0], allow_abbrev=False)
    parser.error = wrong_arguments
    groups = {title: parser.add_argument_group(title) for title in ("data", "run", "method")}
    for name, (kind, _, _, text, *paper) in flags.items():
        if (default := defaults.get(name)) is not None and default is not False:
            shown = f"{default}" if not isinstance(kind, list) else " ".join(
                f"{value:.3g}" for value in default)
            text += f"; default {shown}"
            text += f" (recipe {recipe})" if recipe and name not in DEFAULTS else ""
        options = {"help": "; paper ".join([text, *paper]).replace("%", "%%"), "default": default}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(kind, tuple):
            options |= {"choices": kind, "type": type(kind[0])}
        else:
            options |= {"nargs": "*", "type": kind[0]} if isinstance(kind, list) else {"type": kind}
        group = "data" if name in ("data", "image_size", "max_images", "workers") else "run"
        names = filter(None, [SHORT.get(name), "--" + name.replace("_", "-")])
        groups[group if name in FLAGS else "method"].add_argument(*names, dest=name, **options)
    args = parser.parse_args([re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word)
                              for word in (sys.argv[1:] if argv is None else argv)])
    for name, (_, low, high, *_) in flags.items():
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if None not in (low, number) and not low <= number <= high:  # NaN is not, either
                wrong_arguments(f"--{name.replace('_', '-')} {number} is not {low:g} to {high:g}")
    return args


def parse_flags(method, doc, recipes, flags, argv=None):
    """-> Namespace of a method's arguments, with `method`, and `given`: names of those given by
    hand. These are parsed first, to find the recipe or saved run that has the others' values."""
    argv = sys.argv[1:] if argv is None else argv
    flags = FLAGS | {"recipe": (recipes["recipe"], *FLAGS["recipe"][1:])} | flags
    given = vars(parse([word for word in argv if word not in ("-h", "--help")], flags, {}))
    given = {name: value for name, value in given.items() if value is not None}
    out, saved = given.get("out"), {}
    if not out and given.get("resume"):
        runs = Path("runs").glob(f"{method}*/checkpoint.pth")
        out = os.path.dirname(max(runs, key=os.path.getmtime, default=""))
    names = (f"runs/{method}" + f"-{n}" * (n > 1) for n in range(1, 10**6))
    out = out or next(name for name in names if not os.path.exists(name))
    if os.path.exists(f"{out}/checkpoint.pth"):
        if not given.get("resume"):
            raise Failure(f"--out {out} holds a run: add --resume, or choose another folder")
        saved = read_file(f"{out}/checkpoint.pth")
        if not isinstance(saved, dict) or saved.get("method") != method:
            raise Failure(f"{out}/checkpoint.pth holds no run of {method}.py")
        saved = saved["args"]
    recipe = (saved | given).get("recipe") or choose_recipe(given.get("data"), given.get("device"))
    column = recipes["recipe"].index(recipe)
    defaults = DEFAULTS | {name: row[column] for name, row in recipes.items()} | saved
    args = parse(argv, flags, defaults, doc, recipe)
    args.method, args.out, args.given = method, out, sorted(given)
    args.init = given.get("init") if saved else args.init  # its weights are in the checkpoint
    return args


def choose_recipe(data, device):
    """demo without --data or without a CUDA device; else by the images' median side."""
    if data is None or not (device or "cuda").startswith("cuda") or not torch.cuda.is_available():
        return "demo"
    small = data.lower() in "cifar10 cifar100 svhn mnist fashionmnist kmnist usps".split()
    small = small or os.path.isdir(data) and median_side(find_sets(data)[0]) <= 64
    return "cifar" if small else "imagenet"


# ------------------------------------------------------------------------------------- processes


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(line):
    if rank() == 0:
        print(line.encode(errors="backslashreplace").decode(), flush=True)  # odd file names


def start(name, seed, deterministic=False):
    """Joins torchrun's processes, if any, seeds the generators -> this process's device."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
        device = (x := torch.zeros(1, device=name)).device
        x.item()  # a device that computes
    except (AssertionError, ImportError, RuntimeError):
        wrong_arguments(f"--device {name} is no device of this machine")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # both kinds of tensor; a day, since the others wait while the first one evaluates
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(days=1))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    torch.manual_seed(seed)
    return device


class AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(x := x.clone(memory_format=torch.contiguous_format))
        return x

    @staticmethod
    def backward(ctx, grad):
        return AllSum.apply(grad)


def all_sum(x):
    """Differentiable sum of a tensor over the processes; the identity on one. Each of W processes
    computes the same loss from it. The backward sum adds their W equal gradients, and
    DistributedDataParallel's mean divides by W, so that a loss needs no factor."""
    return AllSum.apply(x) if world_size() > 1 else x


def gather(x):
    """(B/W, ...) on each of W processes -> (B, ...) in their order, with gradient."""
    rows = [x if i == rank() else torch.zeros_like(x) for i in range(world_size())]
    return all_sum(torch.cat(rows))


def uniform(n, *shape, device, low=0.0, high=1.0):
    """(n, *shape): this process's rows of a draw for the total batch, which all processes make from
    the same seed: an image's numbers depend on its position in the total batch alone."""
    draw = torch.empty(n * world_size(), *shape, device=device).uniform_(low, high)
    return draw[rank() * n :][:n]


def parallel(model, compile=False, sync_bn=True):
    """-> what the loop calls in the model's place: gradients are means over the processes, and BN
    normalises over all of them (on CUDA; torch has no such BN for the CPU)."""
    device = next(model.parameters()).device
    if world_size() > 1 and sync_bn and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif world_size() > 1 and sync_bn:
        say("on a CPU, BN normalises the images of each process by themselves")
    if compile:
        model.compile()
    devices = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, devices) if world_size() > 1 else model


# ------------------------------------------------------------------------------------------ data

EXTENSIONS = ".jpg .jpeg .png .webp .bmp .gif .tif .tiff .avif .ppm .pgm".split()
TEST_FOLDERS = "val", "valid", "validation", "test", "testing"


def to_square(image, side):
    """PIL image -> uint8 (3, side, side), and the aspect (width / height) it had. Turned as EXIF
    says; transparent is white; gray beyond 8 bits is scaled by the least of 1, 255, 4095 and 65535
    that its values do not exceed."""
    image.draft(None, (2 * side, 2 * side))  # a JPEG may decode at a fraction of its size
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        gray = pil_to_tensor(image.convert("F"))
        top = next(top for top in (1, 255, 4095, 65535) if gray.max() <= top)
        image = to_pil_image((gray * (255 / top)).round().clamp(min=0).byte())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    square = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return pil_to_tensor(square), image.width / image.height


class ImageSet:
    """Images as uint8 squares of one side: in memory (pixels, aspect), or decoded each time.
    names: paths below the folder `origin`, or indices of `items`, a set of torchvision; labels:
    (N,), -1 = none; left_out: what was not read, in words."""

    pixels, aspect, side, workers, decoded = None, None, None, 0, False

    def __init__(self, origin, names, labels, classes, left_out=(), items=None):
        self.origin, self.names, self.classes, self.items = origin, names, classes, items
        self.labels, self.left_out = torch.as_tensor(labels).long(), list(left_out)

    def __len__(self):
        return len(self.names)

    def open(self, i):
        if self.items:
            return self.items[self.names[i]][0]
        if not os.path.isfile(path := os.path.join(self.origin, self.names[i])):
            raise OSError(f"{path} is no file")  # a pipe would wait for ever
        return Image.open(path)  # reads its header only

    def __getitem__(self, i):
        """-> uint8 (3, S, S) and width / height, which is 0 for an image that cannot be read."""
        try:
            with self.open(i) as image:
                return to_square(image, self.side)
        except Exception:  # PIL raises a dozen kinds
            return torch.zeros(3, self.side, self.side, dtype=torch.uint8), 0.0

    def subset(self, rows):
        part = copy.copy(self)
        part.names, part.labels = [self.names[i] for i in rows], self.labels[rows]
        if self.pixels is not None:
            part.pixels, part.aspect = self.pixels[rows], self.aspect[rows]
        return part

    def load(self, index_lists, device):
        """Lists of B indices -> yields images (B, 3, S, S) and aspects (B,), on the device."""
        if self.pixels is not None:
            for indices in index_lists:
                indices = torch.as_tensor(indices, device=self.pixels.device)
                yield self.pixels[indices], self.aspect[indices]
            return
        loader = DataLoader(self, batch_sampler=(torch.as_tensor(i).tolist() for i in index_lists),
                            num_workers=self.workers, pin_memory=device.type == "cuda",
                            generator=torch.Generator())  # else it draws from the global one
        for images, aspect in loader:
            if self.decoded and not aspect.all():
                raise Failure(f"images of {self.origin} can be read no longer")
            yield [x.to(device, non_blocking=True) for x in (images, aspect.float())]


def fingerprint(images):
    """What tells one set from another, in words."""
    return f"{len(images)} images, {zlib.crc32(repr(list(images.names)).encode()):08x}"


def hash_order(names):
    """Indices of the names in an order that looks random and is the same on every machine."""
    return sorted(range(len(names)), key=lambda i: zlib.crc32(os.fsencode(str(names[i]))))


def folder_set(root, skip=(), classes=None):
    """The images below a folder, each real folder once, hidden names left out. The folders directly
    below it are the classes, if they are two or more."""
    names, others, seen = [], Counter(), dict.fromkeys(map(os.path.realpath, skip), 0)
    for folder, subfolders, files in os.walk(root, followlinks=True,
                                             onerror=lambda error: others.update([str(error)])):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            others["folder read already under another name"] += seen[real]
            continue
        seen[real] = 1
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        for name in sorted(name for name in files if name[0] != "."):
            if (kind := os.path.splitext(name)[1].lower()) in EXTENSIONS:
                names.append(os.path.relpath(os.path.join(folder, name), root))
            else:
                others[f"{kind or name}: not decoded here"] += 1
    parts = [name.split(os.sep)[0] if os.sep in name else None for name in names]
    found = sorted({*parts} - {None})
    classes = classes or (found if len(found) > 1 else [])
    number = {name: i for i, name in enumerate(classes)}
    labels = [number.get(part, -1) for part in parts]
    left_out = [f"{count} {kind}" for kind, count in others.most_common(6) if count]
    return ImageSet(str(root), names, labels, classes, left_out + ["others"] * (len(others) > 6))


def torchvision_set(name, train):
    """A set of torchvision.datasets, which downloads it to ./data."""
    known = {n.lower(): getattr(torchvision.datasets, n) for n in torchvision.datasets.__all__}
    if not (make := known.get(name.lower())):
        raise Failure(f"--data {name}: no such folder, and no torchvision set of that name")
    part = ("train+unlabeled" if name.lower() == "stl10" else "train") if train else "test"
    part = {"train": train} if "train" in signature(make).parameters else {"split": part}
    try:
        items = make("data", download=True, **part)
        labels = items.targets if hasattr(items, "targets") else items.labels
    except Exception as error:  # no network, other flags, other labels
        raise Failure(f"torchvision cannot load {name}: {error}")
    classes = [str(c) for c in getattr(items, "classes", sorted({*labels}))]
    origin = os.path.join(name, "train" if train else "test")
    return ImageSet(origin, range(len(items)), labels, classes, items=items)


def find_sets(data):
    """The value of --data -> (training, test) ImageSets, not decoded; test is None where there is
    nothing to evaluate on."""
    if data is None:
        return drawn_set("train", 5000, seed=0), drawn_set("test", 1000, seed=1)
    if not os.path.isdir(data):
        return torchvision_set(data, True), torchvision_set(data, False)
    folders = {path.name.lower(): path for path in sorted(Path(data).glob("[!.]*"))
               if path.is_dir()}
    tests = [folders.pop(name) for name in TEST_FOLDERS if name in folders]
    first = next((folders.pop(name) for name in ("train", "training") if name in folders), None)
    train, test = folder_set(first or data, skip=tests), None
    if not len(train):
        raise Failure(f"no training images below {data} (looked for {' '.join(EXTENSIONS)})")
    if tests and train.classes:
        test = folder_set(tests.pop(0), classes=train.classes)
    elif train.classes:
        order, count = hash_order(train.names), -(-len(train) // 10)
        test, train = train.subset(sorted(order[:count])), train.subset(sorted(order[count:]))
        test.left_out = []
    for unused in tests + ([*folders.values()] if first else []):
        train.left_out.append(f"folder {unused.name}/")
    return train, test


def median_side(images):
    """Median of the shorter sides, in pixels, of up to 100 of the images."""
    sides = []
    for i in range(0, len(images), -(-len(images) // 100)):
        with suppress(Exception), images.open(i) as image:
            sides.append(min(image.size))
            if getattr(image, "n_frames", 1) > 1:
                images.left_out = [*dict.fromkeys([*images.left_out, "pages beyond the first"])]
    return sorted(sides)[len(sides) // 2] if sides else 1


def free_memory(device):
    """Free bytes of a GPU; of a CPU, half the machine's or container's, per process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        say("the machine does not tell its memory: 4 GB are taken to be free")
        total = 8e9
    with suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))  # or "max"
    return total / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def progress(items, what, total):
    """Yields the items; says every 5 seconds how many are done and the time left."""
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if (now := time.monotonic()) - last > 5:
            last, left = now, timedelta(seconds=round((now - start) / done * (total - done)))
            say(f"{what}: {done / total:.0%}, {left} left")


def decode(images, side, workers, device):
    """-> the readable images. They stay on the device if they take at most half of its free memory,
    else they are decoded again for each use. Each process decodes its share for all."""
    n, cpu, images.side = len(images), torch.device("cpu"), side
    if n > 1000 and not images.items:  # workers start too slowly for few images
        images.workers = workers // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fits = n * 3 * side**2 <= min(free_memory(device), free_memory(cpu)) / 2
    fits = all_sum(torch.tensor(float(fits))) == world_size()
    aspect, pixels = torch.zeros(n), torch.zeros(n * fits, 3, side, side, dtype=torch.uint8)
    mine = [rows for rows in torch.arange(n)[rank() :: world_size()].split(64) if len(rows)]
    for rows, batch in zip(mine, progress(images.load(mine, cpu), "decoding", len(mine))):
        aspect[rows] = batch[1]
        if fits:
            pixels[rows] = batch[0]
    if world_size() > 1:
        for part in aspect, *pixels.split(4096):  # in place: no second copy of the set
            dist.all_reduce(part)
    if fits:
        images.pixels, images.aspect = pixels.to(device), aspect.to(device)
    images.decoded = True
    if bad := [name for name, value in zip(images.names, aspect.tolist()) if not value]:
        images = images.subset(aspect.nonzero().flatten().tolist())
        names = ", ".join(map(repr, bad[:20])) + ", ..." * (len(bad) > 20)
        images.left_out = [*images.left_out, f"{len(bad)} unreadable ({names})"]
    return images


def describe(images, device):
    """-> a line that would show a misreading; Failure for images that are all of one colour."""
    if not images:
        raise Failure(f"{images.origin}: nothing to read; {'; '.join(images.left_out)}")
    some, _ = next(images.load([range(0, len(images), -(-len(images) // 50))], device))
    if (some.amax((2, 3)) - some.amin((2, 3)) < 16).all():
        raise Failure(f"the images of {images.origin} come out almost of one colour, with values "
                      f"of {some.min()} to {some.max()} of 255: convert them to 8 bits")
    names = ", ".join(images.classes[:3]) + ", ..." * (len(images.classes) > 3)
    classes = f"{len(images.classes)} classes ({names})" if images.classes else "no class folders"
    unlabelled = (images.labels < 0).sum() if images.classes else 0
    return "; ".join([f"{len(images):,} of {images.origin}, {classes}",
                      *[f"{unlabelled} of no class"] * bool(unlabelled), *images.left_out])


def load_data(data, image_size, max_images=None, workers=0, device=torch.device("cpu")):
    """-> (training, test) ImageSets, decoded where they fit; test is None where there is nothing to
    evaluate on. Images keep the detail of a canvas 8/7 of the view (256 pixels for 224), at least
    64 pixels, and no larger than the median image."""
    sets = find_sets(data) if rank() == 0 else None  # it downloads for the others
    all_sum(torch.zeros(1))  # waits for all
    train, test = sets or find_sets(data)
    if max_images and max_images < len(train):
        train = train.subset(sorted(hash_order(train.names)[:max_images]))
    side = min(max(image_size * 8 // 7, 64), median_side(train))
    train = decode(train, side, workers, device)
    say(f"training images: {describe(train, device)}")
    try:
        if test is not None:
            test = decode(test, side, workers, device)
            say(f"test images: {describe(test, device)}")
    except Failure as error:
        say(f"test images: {error}")
        test = None
    if test is None or test.labels.max() < 0:
        say("no test images with labels: nothing to evaluate on")
        test = None
    return train, test


# --------------------------------------------------------------------------------- drawn images
# For the demonstration: procedural, offline. The class is the pattern of a relief; tint, contrast,
# scale and angle say nothing about it, brightness little. Light falls from above, as from a sky.

PATTERNS = {  # height at (u, v), in radians of the pattern
    "waves": lambda u, v: sin(v + 1.6 * sin(u / 2)),
    "ribs": lambda u, v: sin(u),
    "zigzag": lambda u, v: sin(v + 3 * torch.asin(0.98 * sin(u / 3))),
    "studs": lambda u, v: torch.exp(1.5 * cos(u * 0.8) + 1.5 * cos(v * 0.8)),
    "checks": lambda u, v: tanh(3 * sin(u / 2) * sin(v / 2)),
    "rings": lambda u, v: sin(torch.hypot(u, v)),
    "rays": lambda u, v: sin(9 * torch.atan2(v, u)),
    "net": lambda u, v: cos((u + v) / 3) ** 8 + cos((u - v) / 3) ** 8,
    "bricks": lambda u, v: -cos(v / 2) ** 16 - cos(u / 4 + 0.8 * tanh(6 * sin(v / 2))) ** 16,
    "scales": lambda u, v: sin(v / 2 + 1.2 * sin(u / 2).abs()).abs(),
}


def drawn_set(name, count, seed):
    """-> ImageSet of 32 x 32 pixels; the same anywhere to a grey level."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, channels=1):
        return low + (high - low) * torch.rand(count, channels, 1, 1, generator=generator)

    axis, left, top = torch.arange(33) / 16 - 1, draw(-0.4, 0.4), draw(-0.4, 0.4)
    x, y, angle, wave = axis - left, axis[:, None] - top, draw(-0.35, 0.35), draw(12, 19)
    u, v = wave * (x * angle.cos() + y * angle.sin()), wave * (y * angle.cos() - x * angle.sin())
    height = torch.empty_like(u)
    for i, pattern in enumerate(PATTERNS.values()):
        height[i::10] = pattern(u[i::10], v[i::10])
    down, right = height.diff(dim=2)[..., 1:], height.diff(dim=3)[..., 1:, :]
    light = 0.6 * (down + draw(-0.7, 0.7) * right) + draw(0.3, 0.8) * height[..., 1:, 1:]
    light = light / light.std((2, 3), keepdim=True)  # so that contrast does not give the class away
    grey = draw(0.3, 0.7) + draw(0.05, 0.14) * light - draw(-0.05, 0.2) * y[..., 1:, :]
    pixels = (255 * draw(0.92, 1.08, 3) * grey).round().clamp(0, 255).byte()
    items = [(to_pil_image(image), None) for image in pixels]
    return ImageSet(f"drawn images/{name}", range(count), torch.arange(count) % 10,
                    [*PATTERNS], items=items)


# --------------------------------------------------------------------------------- augmentation
# Each takes a batch x (B, 3, H, W), floats in [0, 1], and draws parameters for each image alone.
# At the same parameters it equals torchvision's function of the same name. Departures from a
# torchvision pipeline: crops are resampled from the square canvas, whose size caps their detail;
# values stay float between operations; the operations of the jitter have one order per batch.

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def resized_crop(images, boxes, size, interpolation="bilinear"):
    """uint8 images, boxes (B, 4): top, left, height, width in pixels of the canvas -> crops,
    resized with antialiasing, as two matrix products: the filter (bicubic: a = -1/2) widens as a
    crop shrinks. A pixel that the box cuts counts for its part inside."""
    pixel = torch.arange(images.shape[3], device=images.device)
    start, length = boxes.view(-1, 2, 2, 1, 1).unbind(1)  # (B, 2, 1, 1): vertical, horizontal
    scale = length / size  # canvas pixels per output pixel
    center = start + (torch.arange(size, device=images.device)[:, None] + 0.5) * scale
    distance = (pixel + 0.5 - center).div_(scale.clamp(min=1)).abs_()  # (B, 2, size, canvas)
    if interpolation == "bilinear":
        weights = (1 - distance).clamp_(min=0)
    else:  # the cubics for distances below 1 and from 1 to 2, both 0 at 1
        near, far = distance.clamp(max=1), distance.clamp(1, 2)
        weights = (1.5 * near - 2.5) * near**2 + 1 - (far - 1) * (far - 2) ** 2 / 2
    weights *= (torch.minimum(pixel + 1, start + length) - torch.maximum(pixel, start)).clamp(min=0)
    rows, columns = weights.div_(weights.sum(-1, keepdim=True)).unbind(1)
    x = (images.float() / 255).flatten(1, 2) @ columns.mT
    return (rows[:, None] @ x.unflatten(1, (3, -1))).clamp_(0, 1)  # bicubic overshoots


def random_resized_crop(images, aspect, size, scale, interpolation="bilinear"):
    """scale: smallest and largest part of the area; ratio 3/4 to 4/3 in the original geometry,
    which aspect (B,), width / height, tells of the squares (B, 3, S, S); ten tries to fit."""
    n, canvas, device = len(images), images.shape[3], images.device
    width = (canvas * aspect).round().clamp(min=1)
    image = torch.stack([torch.full_like(width, canvas), width], 1)
    area = image.prod(1, keepdim=True) * uniform(n, 10, device=device, low=scale[0], high=scale[1])
    ratio = (math.log(4 / 3) * uniform(n, 10, device=device, low=-1)).exp()
    tries = torch.stack([area / ratio, area * ratio], 2).sqrt().round()
    fallback = torch.minimum(image, (image.flip(1) * 4 / 3).round())  # as much as ratios allow
    sides = torch.cat([tries, fallback[:, None]], 1)  # (B, 11, 2): height, width
    first = ((sides > 0) & (sides <= image[:, None])).all(2).int().argmax(1, keepdim=True)
    sides = sides.take_along_dim(first[:, None], 1).squeeze(1)
    room = image - sides
    corner = torch.where(first < 10, uniform(n, 2, device=device) * (room + 1), room / 2).floor()
    boxes = torch.cat([corner, sides], 1) * (canvas / image).repeat(1, 2)
    return resized_crop(images, boxes, size, interpolation)


def central_crop(images, aspect, size):
    """The original's central square: 7/8 of the short side (256 -> 224), all of it up to 64."""
    side = images.shape[3] * (7 / 8 if size > 64 else 1)
    sides = side * torch.stack([aspect.clamp(1e-3, 1), (1 / aspect).clamp(max=1)], 1)
    return resized_crop(images, torch.cat([(images.shape[3] - sides) / 2, sides], 1), size)


def centre_view(images, aspect, size):
    """What evaluation sees: the central square, normalised."""
    return normalize(central_crop(images, aspect, size))


def chosen(x, p):
    """(B, 1, 1, 1): 1 with probability p, else 0."""
    return (uniform(len(x), device=x.device) < p).to(x.dtype)[:, None, None, None]


def random_horizontal_flip(x, p=0.5):
    return torch.lerp(x, x.flip(3), chosen(x, p))  # exact at 0 and 1, faster than torch.where


def random_grayscale(x, p=0.2):
    return torch.lerp(rgb_to_grayscale(x), x, 1 - chosen(x, p)).clamp_(0, 1)


def color_jitter(x, brightness, contrast, saturation, hue, p=0.8):
    """Factors lie in 1 ± strength (at most 1), hue turns by ± strength (at most 1/2); the order of
    the four operations is random."""
    u = uniform(len(x), 4, device=x.device, low=-1) * chosen(x, p).flatten(1)
    for i in torch.randperm(4).tolist():
        strength = (brightness, contrast, saturation, hue)[i]
        factor = 1 + strength * u[:, i, None, None, None]
        if i == 0:
            x = (x * factor).clamp_(0, 1)
        elif i == 1:
            mean = rgb_to_grayscale(x.mean((2, 3), keepdim=True))
            x = (x * factor).add_(mean * (1 - factor)).clamp_(0, 1)
        elif i == 2:
            x = torch.lerp(rgb_to_grayscale(x), x, factor).clamp_(0, 1)
        else:
            x = adjust_hue(x, hue * u[:, 3])
    return x


def adjust_hue(x, shift):
    """shift (B,): turns of the HSV hue. For a colour (r, g, b) stretched to minimum 0 and maximum
    1, the hue in sixths of a turn is ±(1 + g + b - r) with the sign of g - b, and each channel is
    2 - |distance of the hue to the channel's own|, cut to [0, 1]: no cases, no HSV."""
    r, g, b = x.split(1, 1)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    hue = (g - low).add_(b - r).div_((high - low).clamp_(min=1e-12)).add_(1).copysign_(g - b)
    red_green_blue = 2 * torch.arange(3, device=x.device)[:, None, None]  # their hues
    distance = hue.add_(6 * shift[:, None, None, None]) - red_green_blue
    distance.sub_((distance / 6).round_(), alpha=6)  # the shorter way round the circle
    return torch.lerp(low, high, (2 - distance.abs_()).clamp_(0, 1))


def gaussian_blur(x, p, kernel_size=None, sigma=(0.1, 2.0)):
    """sigma: pixels. kernel_size: odd; by default a tenth of the width."""
    radius = (kernel_size or x.shape[3] // 10 | 1) // 2
    sigma = uniform(len(x), device=x.device, low=sigma[0], high=sigma[1])
    sigma = (sigma[:, None] * chosen(x, p).flatten(1)).clamp(min=1e-3)  # which changes nothing
    if p == 0:
        return x
    offset = torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.softmax(-0.5 * (offset / sigma) ** 2, 1)[:, :, None, None, None].unbind(1)
    for axis, padding in (2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0)):
        padded, x = F.pad(x, padding, mode="reflect"), torch.zeros_like(x)
        for i, weight in enumerate(weights):
            x.addcmul_(padded.narrow(axis, i, x.shape[axis]), weight)
    return x


def random_solarize(x, p, threshold=0.5):
    """Values from threshold on are inverted."""
    thresholds = 2 + (threshold - 2) * chosen(x, p)
    return x.clone().ge_(thresholds).sub_(x).abs_()  # |1 - x| or |0 - x|


def normalize(x):
    """Subtracts ImageNet's mean and divides by its deviation; channels last."""
    channels = zip(x.split(1, 1), IMAGENET_MEAN, IMAGENET_STD)
    x = torch.cat([(channel - mean).div_(std) for channel, mean, std in channels], 1)
    return x.contiguous(memory_format=torch.channels_last)


def denormalize(views):
    """Undo normalize: (B, 3, H, W) -> the same in [0, 1]."""
    mean, std = (views.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (views * std + mean).clamp(0, 1)


# ------------------------------------------------------------------------------------- backbones

DEPTHS = {"resnet8": (BasicBlock, (1, 1, 1)), "resnet20": (BasicBlock, (3, 3, 3)),
          "resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet34": (BasicBlock, (3, 4, 6, 3)),
          "resnet50": (Bottleneck, (3, 4, 6, 3)), "resnet101": (Bottleneck, (3, 4, 23, 3)),
          "resnet152": (Bottleneck, (3, 8, 36, 3))}
STEMS = {"imagenet": (7, 2), "cifar": (3, 1), "tiny": (3, 2)}  # kernel and stride of conv1


class ResNet(torchvision.models.ResNet):
    """ResNet (He et al., 2016) without `fc`, of any width and up to four stages: (B, 3, H, W) ->
    (B, C). With the imagenet stem it is torchvision's; the stems for small images do not pool."""

    def __init__(self, block, layers, width=1.0, stem="imagenet", zero_init_residual=False):
        nn.Module.__init__(self)  # torchvision's has one width
        (kernel, stride), self.inplanes = STEMS[stem], round(64 * width)
        self._norm_layer, self.groups, self.base_width, self.dilation = nn.BatchNorm2d, 1, 64, 1
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        self.stages = [f"layer{i + 1}" for i in range(len(layers))]
        planes = [round(64 * width) * 2**i for i in range(len(layers))]
        for stage, *shape in zip(self.stages, planes, layers, (1, 2, 2, 2)):
            self.add_module(stage, self._make_layer(block, *shape))
        self.feature_dim = self.inplanes
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if zero_init_residual and isinstance(module, block):  # each block starts as identity
                nn.init.zeros_((module.bn3 if block is Bottleneck else module.bn2).weight)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return x.mean((2, 3))


def make_backbone(arch, image_size, zero_init_residual=False):
    """-> a network (B, 3, H, W) -> (B, feature_dim). For views of at most 64 pixels, a ResNet has a
    3x3 stem without pooling. Other networks are torchvision's, without their last layer."""
    name, _, width = arch.partition("x")
    if name in DEPTHS and len(DEPTHS[name][1]) == 3:
        # for a CPU: twice the width of the paper's resnet20, half the pixels; no BN starts at 0
        return ResNet(*DEPTHS[name], 0.5 * float(width or 1), "tiny")
    if name in DEPTHS:
        stem = "cifar" if image_size <= 64 else "imagenet"
        return ResNet(*DEPTHS[name], float(width or 1), stem, zero_init_residual)
    network = torchvision.models.get_model(arch)
    *_, (last, linear) = ((n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear))
    network.feature_dim = linear.in_features
    network.set_submodule(last, nn.Identity())
    if arch.startswith(("alexnet", "vgg")):  # their hidden layers go, too
        network.avgpool, network.classifier = nn.AdaptiveAvgPool2d(1), nn.Identity()
        network.feature_dim = 256 if arch == "alexnet" else 512
    return network


# -------------------------------------------------------------------------------- around the step


@contextmanager
def writing(path):
    """Turns a disk's error into a Failure that names the file."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        raise Failure(f"cannot write {path}: {error.__context__ or error}")


def save_file(path, value):
    """torch.save, so that at any moment `path` is the old file or the new one, and never a part."""
    with writing(path), open(f"{path}.tmp", "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def read_file(path):
    """torch.load, of tensors and plain values only, with the CRCs checked, which torch does not."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # old formats have none
            raise ValueError("its checksum is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise a dozen kinds
        reason = str(error).split(". ")[0]  # torch goes on with advice to trust the file
        if pickled := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it holds a pickled {pickled[1]} object: save its state_dict()"
        raise Failure(f"cannot read {path}: {reason or type(error).__name__}")


def save_checkpoint(args, step, images, model, optimizer, backbone):
    """Write checkpoint.pth, the whole run after `step` steps, and backbone.pth, the weights to use
    -> the time."""
    weights, log = model.state_dict(), Path(args.out, "log.jsonl")
    if not torch.stack([value.isfinite().all() for value in weights.values()]).all():
        raise Failure(f"weights are not finite at step {step}: try a lower --lr; {args.out} holds "
                      "an earlier step")
    if rank() == 0:
        unsaved = "out", "resume", "device", "workers", "given"
        saved_args = {name: value for name, value in vars(args).items() if name not in unsaved}
        save_file(f"{args.out}/checkpoint.pth", {
            "method": args.method, "recipe": args.recipe, "args": saved_args, "step": step,
            "images": fingerprint(images), "log": log.stat().st_size if log.exists() else 0,
            "model": weights, "optimizer": optimizer.state_dict()})
        save_file(f"{args.out}/backbone.pth",
                  {name: value.cpu() for name, value in backbone.state_dict().items()})
    return time.monotonic()


def load_checkpoint(args, images, model, optimizer):
    """Restore the run in --out, if there is one, and cut its log back to it -> the steps done."""
    if rank() == 0:  # a folder that another run has made since its name was chosen is an error
        os.makedirs(args.out, exist_ok=bool({"out", "resume"} & {*args.given}))
    if not os.path.exists(f"{args.out}/checkpoint.pth"):
        say(f"--recipe {args.recipe}, --out {args.out}")
        return 0
    saved, log = read_file(f"{args.out}/checkpoint.pth"), f"{args.out}/log.jsonl"
    if saved["images"] != fingerprint(images):
        raise Failure(f"{args.out} was trained on {saved['images']}, not {fingerprint(images)}")
    for name in "recipe", "batch_size", "optimizer", "weight_decay":
        if saved["args"].get(name) != vars(args).get(name):
            raise Failure(f"--{name.replace('_', '-')} {vars(args)[name]}: the run in {args.out} "
                          f"has {saved['args'][name]}, which a resumed one cannot change")
    if args.epochs * (len(images) // args.batch_size) < saved["step"]:
        raise Failure(f"--epochs {args.epochs}: the run in {args.out} is beyond them already")
    try:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise Failure(f"{args.out}/checkpoint.pth does not fit this model: {error}")
    changed = [f"--{name.replace('_', '-')}" for name in args.given
               if saved["args"].get(name, vars(args)[name]) != vars(args)[name]]
    changed = " ".join(changed) or "nothing"
    say(f"continuing {args.out} after step {saved['step']}; changed: {changed}")
    if rank() == 0 and os.path.exists(log):
        os.truncate(log, min(saved["log"], os.path.getsize(log)))
    return saved["step"]


def batch_that_fits(args, images):
    """--batch-size, in equal shares of two or more; a recipe's shrinks to what fits."""
    n, share, batch = len(images), 2 * world_size(), args.batch_size
    if "batch_size" not in args.given and (batch > n or batch % world_size()):
        batch = min(batch, n) // share * share
        say(f"--batch-size {batch}: what suits {n} training images and {world_size()} processes")
    if not share <= batch <= n or batch % world_size():
        raise Failure(f"--batch-size {args.batch_size}: there are {n} training images, in equal "
                      f"shares of two or more for {world_size()} processes")
    return batch


def batches(images, args, step, device):
    """Yields step, images (B/W, 3, S, S) uint8 and aspect (B/W,), from this step to the last.
    Epochs are permutations by seed and epoch, without an incomplete last batch; before each step
    the generators are seeded by seed and step: so a resumed run continues bit for bit."""
    steps, share = len(images) // args.batch_size, args.batch_size // world_size()

    def shares():  # this process's indices, for each step
        for epoch in range(step // steps, args.epochs):
            generator = torch.Generator().manual_seed(2**40 + args.seed * 1_000_003 + epoch)
            rows = torch.randperm(len(images), generator=generator)[: steps * args.batch_size]
            rows = rows.to("cpu" if images.pixels is None else device)
            first = step % steps if epoch == step // steps else 0
            yield from rows.view(steps, world_size(), share)[first:, rank()]

    for done, (pixels, aspect) in enumerate(images.load(shares(), device), step):
        seed = (args.seed + 1) * 1_000_003 + done
        torch.default_generator.manual_seed(seed)  # torch.manual_seed costs 100 times more
        if device.type != "cpu":
            getattr(torch, device.type).manual_seed(seed)
        yield done, pixels, aspect


def log(args, done, total_steps, started, lr, loss, chance=None, **health):
    """A line on the screen and in log.jsonl; the means over the processes of loss and health, which
    are scalars. started: step and time at which this process began; lr: of this step."""
    names, values = zip(("loss", loss), *health.items())
    values = torch.stack([torch.as_tensor(v, device=loss.device).detach().float() for v in values])
    values = [round(value, 6) for value in (all_sum(values) / world_size()).tolist()]
    if not math.isfinite(values[0]):
        raise Failure(f"loss is {values[0]} at step {done} (lr {lr:.3g}): try a lower --lr; "
                      f"{args.out} holds an earlier step")
    seconds, epoch = time.monotonic() - started[1], -(-done * args.epochs // total_steps)
    speed = (done - started[0]) / seconds  # steps per second
    write_log(args, {"step": done, "epoch": epoch, **dict(zip(names, values)), "lr": lr,
                     "seconds": round(seconds, 2), "images_per_s": round(speed * args.batch_size)})
    loss, *health = (f"{name.replace('_', ' ')} {v:.4f}" for name, v in zip(names, values))
    loss += f" (chance {chance:.4f})" if chance is not None else ""
    left = timedelta(seconds=round((total_steps - done) / speed))
    say("  ".join([f"epoch {epoch}/{args.epochs}", f"step {done}/{total_steps}", loss, *health,
                   f"lr {lr:.3g}", f"{speed * args.batch_size:,.0f} images/s", f"{left} left"]))


def write_log(args, line):
    if rank() == 0:
        with writing(path := f"{args.out}/log.jsonl"), open(path, "a") as file:
            file.write(json.dumps(line) + "\n")


def example_rows(images, count=10):
    """Indices of an image of each class; without labels, from all over the set."""
    labels = images.labels.tolist()
    rows = [labels.index(label) for label in sorted({*labels} - {-1})[:count]]
    return rows or list(range(0, len(images), -(-len(images) // count)))


def examples(images, device):
    """-> these images, uint8, and their aspects."""
    return next(images.load([example_rows(images)], device))


def save_picture(path, *columns):
    """Columns of B pictures (B, 3, ., .) in [0, 1], of any size, enlarged: B rows."""
    side = max(column.shape[-1] for column in columns)
    side *= -(-128 // side)
    rows = torch.stack([F.interpolate(c.float(), side, mode="nearest-exact") for c in columns], 1)
    save_image(rows.flatten(0, 1), path, nrow=len(columns), padding=4, pad_value=1, format="png")


def save_views(args, images, device, *augments):
    """views.png: some images as they are, and what each augmentation makes of them."""
    if rank() == 0:
        pixels, aspect = examples(images, device)
        views = [denormalize(augment(pixels, aspect)) for augment in augments]
        save_picture(f"{args.out}/views.png", pixels / 255, *views)
