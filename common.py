"""What the ten method files share, in sections that can each be read alone:

    errors and flags   one clear line for bad input; the flags that every script has
    processes          one differentiable sum over processes, and what follows from it
    data               folders, torchvision sets and a built-in set, as uint8 squares on the device
    augmentation       torchvision's operations on a whole batch, each image with its own parameters
    backbones          ResNets and VGGs with torchvision's key names
    the run            steps, log lines, checkpoints, signals

Nothing here belongs to one method only: models, losses and training loops are in the method files.
"""

import argparse
import contextlib
import copy
import fcntl
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import cos, nn, sin, tanh
from torch.utils.data import DataLoader, Dataset
from torchvision.models import vgg
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import save_image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIGNALS = signal.SIGINT, signal.SIGTERM
warnings.filterwarnings("ignore", module="PIL")  # of very large or oddly tagged images

# ------------------------------------------------------------------------------ errors and flags


class Failure(Exception):
    """Something wrong with data, checkpoint, disk, memory or the loss, said in one line."""


def main(run, parse_args, argv=None):
    """`run(parse_args(argv))`, and the exit status: 1 after a failure (one line on stderr), 2 for
    wrong arguments, 130 and 143 after Ctrl-C and SIGTERM (nothing on stderr)."""
    handlers = {n: signal.signal(n, lambda n, _: sys.exit(128 + n)) for n in SIGNALS}
    try:
        run(parse_args(argv))
    except (Failure, MemoryError, OSError, RuntimeError) as error:
        reason, lost_worker = " ".join(str(error).split()), "DataLoader worker (" in str(error)
        if lost_worker:
            reason = "a process that decodes images died, out of memory? try fewer --workers"
        elif isinstance(error, MemoryError) or re.search(
                "out of memory|can't allocate memory|ALLOC_FAILED", reason):
            reason = "out of memory; try a smaller --batch-size or --image-size"
        elif world_size() > 1 and re.search("gloo|NCCL|[Cc]onnection", reason):
            reason = f"lost another process of this run (continue with --resume): {reason[:150]}"
        elif isinstance(error, RuntimeError):
            raise
        if rank() > 0:
            time.sleep(10)  # the first process says the same, and torchrun then stops this one
        print("error:", reason, file=sys.stderr, flush=True)
        (os._exit if lost_worker else sys.exit)(1)  # sys.exit would wait for the worker
    finally:
        end_loader_processes()
        if dist.is_initialized():
            dist.destroy_process_group()
        for n, handler in handlers.items():
            signal.signal(n, handler)


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite `kind` (int or float) from `low` (or above it) to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value) or (above and value == low):
            limit = f" and at most {high}" if high < math.inf else ", and finite"
            raise argparse.ArgumentTypeError(
                f"{text} is not {'above' if above else 'at least'} {low}{limit}")
        return value

    parse.__name__ = kind.__name__  # argparse says it where `kind` itself refuses the text
    return parse


def device_name(text):
    """An argparse type: cpu, or a CUDA device that is there."""
    match, count = re.fullmatch(r"cpu|cuda(?::(\d+))?", text), torch.cuda.device_count()
    if not match or (text != "cpu" and int(match[1] or 0) >= count):
        raise argparse.ArgumentTypeError(f"{text} is neither cpu nor one of {count} CUDA devices")
    return text


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        none = action.default is None or action.default is False
        return action.help if none else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """The flags that all scripts share, with the defaults of the recipe in force.

    recipes: flag -> its value in each column; the row "recipe" names the columns. `--recipe` and
    `--data` are read first; the column then becomes the defaults, which any flag overrides.
    """

    def __init__(self, description, recipes, arch=None, other_archs=""):
        super().__init__(description=description, allow_abbrev=False, formatter_class=Formatter)
        self.recipes = recipes
        add = self.add_argument
        add("--data", metavar="PATH",
            help="folder of images, or name of a torchvision set; none: the small built-in set")
        add("--recipe", choices=recipes["recipe"], help="column of RECIPES; none: demo without "
            "--data, cifar for a median side of at most 64 pixels, else imagenet")
        add("--out", metavar="FOLDER", help="the run's folder; none: a new one in runs/")
        add("--resume", action="store_true", help="continue the run in --out, or the latest one")
        add("--init", metavar="FILE", help="backbone weights to start from")
        add("-a", "--arch", type=arch or architecture,
            help=f"{ARCHS}; with a width: resnet18x2{other_archs}")
        add("--epochs", type=number(int, 0), help="passes over the training images")
        add("--warmup-epochs", type=number(float, 0), help="epochs of linear warm-up")
        add("-b", "--batch-size", type=number(int, 2), help="images per step, over all processes")
        add("--lr", type=number(float, 0), help="peak learning rate per 256 images")
        add("--weight-decay", "--wd", type=number(float, 0), help="weight decay")
        add("--image-size", type=number(int, 8), help="side of a view, in pixels")
        add("--max-images", type=number(int, 2), help="train on only this many images")
        add("-j", "--workers", type=number(int, 0), default=min(os.cpu_count(), 16),
            help="processes that decode images")
        add("--device", type=device_name, help="cpu, cuda or cuda:N; none: CUDA where there is one")
        add("--seed", type=number(int, 0, 2**31), default=0, help="seed of all randomness")
        add("--deterministic", action="store_true", help="bit-exact on CUDA too, but slower")
        add("--compile", action="store_true", help="torch.compile the model")
        add("-p", "--print-freq", type=number(int, 1), default=20, help="steps per log line")
        add("--eval-every", type=number(int, 0), default=0,
            help="epochs between kNN evaluations; 0: only at the end")

    def parse_args(self, argv=None):
        """-> Namespace; `recipe` is the one in force, `given` names the flags given by hand."""
        argv = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word)
                for word in (sys.argv[1:] if argv is None else argv)]  # --batch_size=8
        nothing = argparse.Namespace(**{action.dest: None for action in self._actions})
        given = super().parse_args([word for word in argv if word not in ("-h", "--help")], nothing)
        if given.data == "":
            self.error("--data is empty")
        column = self.recipes["recipe"].index(given.recipe or choose_recipe(given.data))
        self.set_defaults(**{flag: row[column] for flag, row in self.recipes.items()})
        args = super().parse_args(argv)
        args.given = sorted(flag for flag, value in vars(given).items() if value is not None)
        processes = int(os.environ.get("WORLD_SIZE", 1))
        resumed = args.resume and given.batch_size is None  # Run sees the saved one
        if not resumed and (args.batch_size % processes or args.batch_size < 2 * processes):
            self.error(f"--batch-size {args.batch_size} gives {processes} processes no equal share "
                       "of at least 2 images")
        return args

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def choose_recipe(data):
    """The recipe for --data, by the images' median side; that of torchvision's sets is known."""
    if data is None:
        return "demo"
    small = (find_sets(data)[0].median_side() <= 64 if Path(data).exists()
             else data.lower() in SMALL_SETS)
    return "cifar" if small else "imagenet"


# ------------------------------------------------------------------------------------- processes


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes(name):
    """Join the processes that torchrun started, if it did -> this process's torch.device."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # both kinds of tensor; a day, since the others wait while the first decodes and evaluates
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(days=1))
    return device


@contextlib.contextmanager
def first_process_first():
    """The first process of each machine runs the block, then the others: they find its files."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        all_sum(torch.zeros(1))  # waits for all
    yield
    if first:
        all_sum(torch.zeros(1))


class AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return AllSum.apply(grad)


def all_sum(x):
    """Differentiable sum of a tensor over the processes; the identity on one.

    Each process then computes the same loss from it; the backward sum adds these W equal losses'
    gradients, and DistributedDataParallel's mean divides by W: no factor appears anywhere.
    """
    return AllSum.apply(x) if world_size() > 1 else x


def gather(x):
    """(B/W, ...) on each of W processes -> (B, ...) in their order, with gradient."""
    if world_size() == 1:
        return x
    rows = x.new_zeros(world_size(), *x.shape)
    rows[rank()] = x
    return all_sum(rows).flatten(0, 1)


def uniform(n, *shape, device, low=0.0, high=1.0):
    """(n, *shape): this process's rows of a draw for the total batch, which all make from the same
    seed, so that an image's numbers depend on its position in the total batch alone."""
    draw = torch.empty(n * world_size(), *shape, device=device).uniform_(low, high)
    return draw[rank() * n :][:n]


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the batches of all processes, for the CPU: torch's needs a GPU."""

    def forward(self, x):
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                                eps=self.eps)
        dims, count = [0, *range(2, x.dim())], x.numel() // x.shape[1] * world_size()
        mean = all_sum(x.sum(dims, keepdim=True)) / count
        x = x - mean
        var = all_sum(x.square().sum(dims, keepdim=True)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * count / (count - 1), self.momentum)
        x = x * (var + self.eps).rsqrt()
        return x * self.weight.view_as(mean) + self.bias.view_as(mean) if self.affine else x


def sync_batch_norm(model):
    """Make every BN of the model, which is on its device already, normalise over all processes."""
    if world_size() > 1 and next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if world_size() > 1 and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = SyncBatchNorm
    return model


# ------------------------------------------------------------------------------------------ data

EXTENSIONS = tuple(".jpg .jpeg .png .webp .bmp .gif .tif .tiff .avif .ppm .pgm".split())
SMALL_SETS = "cifar10 cifar100 svhn mnist fashionmnist kmnist usps eurosat".split()


def find_images(root):
    """Sorted paths of the image files below a folder: hidden names left out, links followed, each
    real folder once. Pipes and devices are no images."""
    files, seen = [], set()

    def fail(error):
        raise Failure(f"cannot read folder {error.filename!r}: {error.strerror}")

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        files += [os.path.join(folder, name) for name in sorted(names)
                  if name[0] != "." and name.lower().endswith(EXTENSIONS)]
    return [f for f in files if os.path.isfile(f) or not os.path.exists(f)]  # a dead link is said


def open_image(item):
    """A path, or (torchvision set, index) -> PIL image, not decoded yet."""
    return Image.open(item) if isinstance(item, str) else item[0][item[1]][0]


def to_square(image, size):
    """PIL image of any mode -> uint8 (3, size, size), and the aspect (width / height) it had.

    Turned as EXIF says; 16-bit gray is scaled to 8 bits; an alpha channel is dropped.
    """
    image.draft(None, (2 * size, 2 * size))  # a JPEG may decode at a fraction of its size
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no known range")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    image = image.convert("RGB")
    aspect = image.width / image.height
    return pil_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC)), aspect


class ImageSet(Dataset):
    """Images as squares of one size, the canvas: in memory after `decode` if they fit there, else
    decoded by worker processes each time.

    source: list of what `open_image` takes; names: one per image, unique; labels: (N,), -1 = none;
    classes: their names; unreadable: {index: reason}, as it is found out.
    """

    def __init__(self, source, names, labels, classes):
        self.source, self.names, self.classes = source, names, classes
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.canvas, self.workers, self.pixels, self.aspect = None, 0, None, None
        self.unreadable, self.warned, self.loader = {}, 0, None

    def __len__(self):
        return len(self.names)

    def hashes(self):
        return torch.tensor([zlib.crc32(os.fsencode(name)) for name in self.names])

    def subset(self, chosen):
        """chosen: (N,) bool"""
        rows = chosen.nonzero().flatten().tolist()
        source, names = [self.source[i] for i in rows], [self.names[i] for i in rows]
        subset = ImageSet(source, names, self.labels[chosen], self.classes)
        if self.pixels is not None:
            subset.pixels, subset.aspect = self.pixels[chosen], self.aspect[chosen]
        return subset

    def __getitem__(self, i):
        """-> uint8 (3, S, S), width / height, i, and why it is the next readable image instead."""
        reason = ""
        for j in range(i, i + 20):
            try:
                with open_image(self.source[j % len(self)]) as image:
                    return *to_square(image, self.canvas), i, reason
            except Exception as error:  # PIL raises a dozen kinds
                reason = reason or f"{self.names[i]!r} ({str(error) or type(error).__name__})"
        return torch.zeros(3, self.canvas, self.canvas, dtype=torch.uint8), 1.0, i, reason

    def median_side(self):
        """Median of the shorter sides, in pixels, of up to 100 of the images."""
        sides = []
        for item in self.source[:: -(-len(self) // 100)]:
            with contextlib.suppress(Exception), open_image(item) as image:
                sides.append(min(image.size))
        return sorted(sides)[len(sides) // 2] if sides else 1

    def decode(self, canvas, workers, device):
        """Fix the canvas (pixels), and decode all images onto the device if they take at most half
        of the free memory; the next start finds them in data/cache."""
        self.canvas, self.workers, n = canvas, workers, len(self)
        if self.pixels is None:
            free = min(free_memory(device), free_memory(torch.device("cpu")))
            if all_sum(torch.tensor(float(n * 3 * canvas**2 > free / 2))):
                return
            stored = {"pixels": torch.empty(n, 3, canvas, canvas, dtype=torch.uint8),
                      "aspect": torch.empty(n), "unreadable": self.unreadable}
            digest = hashlib.sha256(str(canvas).encode())
            for name, item in zip(self.names, self.source):
                if isinstance(item, str) and os.path.exists(item):
                    name = os.path.abspath(item), os.stat(item).st_size, os.stat(item).st_ctime_ns
                digest.update(repr(name).encode())
            file = Path("data/cache", digest.hexdigest()[:16] + ".pth")
            with first_process_first():
                try:
                    stored = read_file(file, mmap=True)
                except Failure:
                    self.workers *= n > 1000  # fewer take less time than starting the workers
                    parts = torch.arange(n).split(64)
                    batches = self.batches(parts, torch.device("cpu"))
                    for rows, batch in zip(parts, progress(batches, "decoding", len(parts))):
                        stored["pixels"][rows], stored["aspect"][rows] = batch
                    self.loader = None  # ends its processes
                    with contextlib.suppress(Failure, OSError):  # without it, the next start waits
                        file.parent.mkdir(parents=True, exist_ok=True)
                        save_file(file, stored)
            self.pixels, self.aspect, self.unreadable = stored.values()
        self.pixels, self.aspect = self.pixels.to(device), self.aspect.to(device)

    def warn_of_unreadable(self):
        """One line for those found since the last warning."""
        reasons = list(self.unreadable.values())
        if len(reasons) > self.warned and rank() == 0:
            some = ", ".join(reasons[self.warned :][:3]) + ", ..." * (len(reasons) > 3)
            print(f"warning: skipped {len(reasons)} unreadable images: {some}", file=sys.stderr)
        self.warned = len(reasons)

    def batches(self, index_lists, device):
        """index_lists: iterable of (B,) indices -> uint8 images (B, 3, S, S) and their aspects
        (B,), width / height, on the device."""
        if self.pixels is not None:
            for indices in index_lists:
                indices = torch.as_tensor(indices, device=self.pixels.device)
                yield self.pixels[indices], self.aspect[indices]
            return
        loader = DataLoader(self, batch_sampler=(torch.as_tensor(i).tolist() for i in index_lists),
                            num_workers=self.workers, worker_init_fn=ignore_signals,
                            pin_memory=device.type == "cuda")
        self.loader = None  # an iterator cannot be pickled, as a start by forkserver does
        self.loader = iter(loader)  # kept: to destroy it when a worker was killed can hang
        for images, aspect, indices, reasons in self.loader:
            self.unreadable |= {i: r for i, r in zip(indices.tolist(), reasons) if r}
            if all(reasons) and not images.any():
                raise Failure(f"a whole batch of images is unreadable: {reasons[0]}, ...")
            yield images.to(device, non_blocking=True), aspect.float().to(device, non_blocking=True)


def ignore_signals(_):
    """A signal to the whole process group must not kill the workers before the run is saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_loader_processes():
    """They ignore SIGTERM, by which Python would end them and then wait for ever."""
    if children := multiprocessing.active_children():
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's takes this for a failure
        for child in children:
            child.kill()
            child.join()
        signal.signal(signal.SIGCHLD, handler)


def free_memory(device):
    """Free bytes on the device (on a CPU: what Linux calls available, or a container's limit)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not Path("/proc/meminfo").exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    with contextlib.suppress(OSError, ValueError):  # none, or "max"
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free


def progress(items, what, total):
    """Yields the items; says every 5 seconds how many are done and the time left."""
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last > 5 and rank() == 0:
            last, left = now, timedelta(seconds=round((now - start) / done * (total - done)))
            print(f"{what}: {done / total:.0%}, {left} left", flush=True)


def find_sets(data):
    """The value of --data -> (training, test) ImageSets, not decoded; test is None without labels.

    Labels are the names of the folders directly below the root. A set that has no test images of
    its own gives a tenth of its labelled images, chosen by a hash of the path.
    """
    if data is None:
        return builtin_set("train", 5000, seed=0), builtin_set("test", 1000, seed=1)
    root, test = Path(data), None
    if root.exists() and not root.is_dir():
        raise Failure(f"--data {data} is a file; a folder of images is needed")
    if not root.exists():
        train, test = torchvision_sets(data)
    elif not (root / "train").is_dir():
        train = folder_set(root)
    else:
        train = folder_set(*filter(Path.is_dir, (root / "train", root / "unlabeled")))
        held_out = [f for f in ("val", "test", "validation") if (root / f).is_dir()]
        if held_out and train.classes:
            test = folder_set(root / held_out[0], classes=train.classes)
            test = test.subset(test.labels >= 0)
    if not len(train):
        raise Failure(f"no images below {data} (looked for {' '.join(EXTENSIONS)})")
    if test is None and train.classes:
        held_out = (train.hashes() % 10 == 0) & (train.labels >= 0)
        train, test = train.subset(~held_out), train.subset(held_out)
    return train, test if test and train.classes else None


def folder_set(*folders, classes=None):
    """The images of the folders, with names that start from the first, or from beside it. The first
    part of a name is the class, if there are two or more; "unlabeled" is none."""
    files = [file for folder in folders for file in find_images(folder)]
    names = [os.path.relpath(file, folders[0]).removeprefix(".." + os.sep) for file in files]
    parts = [name.split(os.sep)[0] if os.sep in name else "unlabeled" for name in names]
    found = sorted(set(parts) - {"unlabeled"})
    classes = classes or (found if len(found) > 1 else [])
    if unknown := classes and set(found) - set(classes):
        raise Failure(f"{folders[0]} has a class {min(unknown)!r} that the training images lack")
    index = {name: i for i, name in enumerate(classes)}
    return ImageSet(files, names, [index.get(part, -1) for part in parts], classes)


def torchvision_sets(name):
    """(training, test) sets of torchvision.datasets, downloaded by torchvision under ./data."""
    known = {n.lower(): getattr(torchvision.datasets, n) for n in torchvision.datasets.__all__}
    if name.lower() not in known:
        raise Failure(f"--data {name}: no such folder, and no torchvision set of that name")
    make, sets = known[name.lower()], []
    flags = inspect.signature(make).parameters
    fixed = {k: v for k, v in {"root": "data", "download": True}.items() if k in flags}
    first = "train+unlabeled" if name.lower() == "stl10" else "train"
    choices = ([{"train": True}, {"train": False}] if "train" in flags else
               [{"split": first}, {"split": "test"}] if "split" in flags else [{}])
    for choice in choices:
        try:
            dataset = make(**fixed, **choice)
            found = [a for a in ("targets", "labels", "_labels") if hasattr(dataset, a)]
            labels = getattr(dataset, found[0]) if found else [label for _, label in dataset]
            labels = np.asarray(labels, dtype=np.int64).reshape(len(dataset))
        except Exception as error:  # no network, a wrong checksum, more flags or other labels
            raise Failure(f"torchvision cannot load {name}: {error}")
        classes = getattr(dataset, "classes", None) or np.unique(labels[labels >= 0])
        sets.append(ImageSet([(dataset, i) for i in range(len(dataset))],
                             [f"{name}/{choice}/{i}" for i in range(len(dataset))],
                             labels, [str(c) for c in classes]))
    return sets[0], sets[1] if len(sets) > 1 else None


def load_data(data, image_size, max_images=None, workers=0, device=torch.device("cpu")):
    """-> (training, test) ImageSets, decoded where they fit; test is None without labels. The
    neighbours of unreadable training images stand for them, without a label.

    Images keep the detail of a canvas 8/7 of the view (256 pixels for 224), at least 64 pixels, and
    no larger than the median image.
    """
    with first_process_first():
        train, test = find_sets(data)
    if max_images and max_images < len(train):
        order = train.hashes().argsort(stable=True)
        train = train.subset(order.argsort() < max_images)
    canvas = min(max(image_size * 8 // 7, 64), train.median_side())
    for images in filter(None, (train, test)):
        images.decode(canvas, workers, device)
        images.labels[list(images.unreadable)] = -1
        if images is test and images.unreadable:
            raise Failure("an evaluation image is unreadable, repair or remove it: "
                          + next(iter(images.unreadable.values())))
        images.warn_of_unreadable()
    return train, test


# ------------------------------------------------------------------------------ built-in images
# For the demonstration: procedural, offline. The class is the pattern in relief on an object; tint,
# brightness, contrast, scale, angle and outline say nothing about it, and light falls from above.


def alternate(v, even, odd):
    """`even` and `odd` on alternate rows of the pattern, whose rows are 2π high in `v`; smooth."""
    return even + (odd - even) * torch.sigmoid(6 * sin(v / 2))


def saw(t):
    return (sin(t) - sin(2 * t) / 2 + sin(3 * t) / 3) / 1.5


RELIEFS = {  # height, about -1 to 1, at (u, v) or at polar (r, w), all in radians of the pattern
    "waves": lambda u, v, r, w: sin(v + 1.6 * sin(u / 2)),
    "ribs": lambda u, v, r, w: tanh(2 * sin(u)),
    "zigzag": lambda u, v, r, w: tanh(2 * sin(v + 2.6 * torch.asin(0.98 * sin(u / 2.5)))),
    "studs": lambda u, v, r, w: 2 * torch.exp(1.2 * (cos(u) + cos(v) - 2)) - 1,
    "checks": lambda u, v, r, w: tanh(3 * sin(u / 2) * sin(v / 2)),
    "bricks": lambda u, v, r, w: 1 - 2 * torch.maximum(
        cos(v / 2) ** 16, alternate(v, sin(u / 4) ** 16, cos(u / 4) ** 16)),
    "scales": lambda u, v, r, w: saw(
        v + 2.5 * alternate(v, sin(u / 2).abs(), cos(u / 2).abs())),
    "rings": lambda u, v, r, w: sin(r),
    "rays": lambda u, v, r, w: tanh(2 * sin(w)),
    "net": lambda u, v, r, w: 2 * torch.maximum(
        cos((u + v) / 3.2) ** 8, cos((u - v) / 3.2) ** 8) - 1,
}


def builtin_set(name, count, seed):
    """-> ImageSet of 32 x 32 pixels, decoded; the same anywhere to a grey level."""
    generator = torch.Generator().manual_seed(seed)
    names, labels = [f"{name}/{i}" for i in range(count)], torch.arange(count) % 10
    image_set = ImageSet([None] * count, names, labels, [*RELIEFS])
    image_set.aspect = torch.ones(count)
    image_set.pixels = torch.empty(count, 3, 32, 32, dtype=torch.uint8)
    axis = torch.arange(33) / 16 - 1  # -1 to 1, downwards for y; one more than 32 for the slopes
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    for label, relief in enumerate(list(RELIEFS.values())[:count]):
        rows = image_set.pixels[label::10]

        def draw(low, high, *channels):
            shape = len(rows), *channels, 1, 1
            return low + (high - low) * torch.rand(shape, generator=generator)

        a, b = (x - draw(-0.15, 0.15)) / draw(0.85, 1.1), (y - draw(-0.1, 0.2)) / draw(0.85, 1.1)
        angle, wave = draw(-0.35, 0.35), 2 * math.pi / draw(0.28, 0.5)
        bulge = wave * (1 + 0.25 * (a * a + b * b))
        u = bulge * (x * angle.cos() + y * angle.sin()) + draw(0, 4 * math.pi)
        v = bulge * (y * angle.cos() - x * angle.sin()) + draw(0, 4 * math.pi)
        dx, dy = x - draw(-0.3, 0.3), y - draw(-0.3, 0.3)
        r = wave / 0.75 * (dx * dx + dy * dy + 1e-4).sqrt() + draw(0, 2 * math.pi)
        spokes = torch.randint(7, 12, (len(rows), 1, 1), generator=generator)
        height = relief(u, v, r, spokes * torch.atan2(dy, dx) + draw(0, 2 * math.pi))
        # What faces up is lit; the deviation is one, so that contrast does not give the class away.
        down, across = height.diff(dim=1)[:, :, :-1], height.diff(dim=2)[:, :-1]
        light = 0.6 * (down + draw(-0.7, 0.7) * across) + draw(0.1, 0.6) * height[:, :-1, :-1]
        light = light / light.std((1, 2), keepdim=True)
        a, b, up = a[:, :-1, :-1], b[:, :-1, :-1], -y[:-1, :-1]
        front = draw(0.32, 0.66) - draw(0, 0.12) * b + draw(0.06, 0.13) * light
        sky = torch.sigmoid(8 * (up + draw(-0.2, 0.6))) - 0.5
        back = draw(0.25, 0.6) + draw(-0.15, 0.25) * sky + 0.1 * up
        inside = torch.sigmoid(12 * (1 - a.abs() ** 3 - b.abs() ** 3))
        front, back = (inside * front)[:, None], ((1 - inside) * back)[:, None]
        pixels = draw(0.96, 1.04, 3) * front + draw(0.96, 1.04, 3) * back
        rows.copy_((255 * pixels).round().clamp(0, 255))
    return image_set


# --------------------------------------------------------------------------------- augmentation
# Operations on a batch of float images x (B, 3, H, W) in [0, 1], each image with its own parameter
# (B,), equal to torchvision's functions of the same names. Every parameter has a neutral value, so
# "with probability p" needs no branch: it chooses parameters. Departures from a torchvision
# pipeline: crops are resampled from the square canvas, whose size caps their detail; values stay
# float between operations (torchvision: uint8); colour operations are ordered once per batch.


def resized_crop(x, boxes, size, interpolation="bilinear"):
    """Crop and antialiased resize, two matrix products; boxes (B, 4): top, left, height, width.

    The filter (bicubic: a = -1/2) widens as a crop shrinks: antialiasing. A pixel cut by the edge
    of the box, as happens where the canvas is a squashed image, counts for its part inside.
    """
    pixel = torch.arange(x.shape[3], device=x.device)
    start, length = boxes.view(-1, 2, 2, 1, 1).unbind(1)  # (B, 2, 1, 1): vertical, horizontal
    scale = length / size  # canvas pixels per output pixel
    center = start + (torch.arange(size, device=x.device)[:, None] + 0.5) * scale
    distance = (pixel + 0.5 - center).div_(scale.clamp(min=1)).abs_()  # (B, 2, size, canvas)
    if interpolation == "bilinear":
        weights = (1 - distance).clamp_(min=0)
    else:  # the cubics for distances below 1 and from 1 to 2, both 0 at 1
        near, far = distance.clamp(max=1), distance.clamp(1, 2)
        weights = (1.5 * near - 2.5) * near**2 + 1 - (far - 1) * (far - 2) ** 2 / 2
    weights *= (torch.minimum(pixel + 1, start + length) - torch.maximum(pixel, start)).clamp(min=0)
    rows, columns = weights.div_(weights.sum(-1, keepdim=True)).unbind(1)
    if x.shape[3] > 64 and not x.is_cuda:
        x = sum_rows(rows, sum_rows(columns, x.mT).mT)
    else:
        x = rows[:, None] @ (x.flatten(1, 2) @ columns.mT).unflatten(1, (3, -1))
    return x.clamp_(0, 1)  # bicubic overshoots


def sum_rows(weights, x):
    """weights @ x of a narrow band of weights, as sums of a few rows, which is faster for large
    images on a CPU: (B, size, S), (B, 3, S, W) -> (B, 3, size, W)."""
    used, (_, _, side, width) = (weights != 0).int(), x.shape
    first = used.argmax(2, keepdim=True)
    band = int((side - used.flip(2).argmax(2, keepdim=True) - first).max())
    index = first.clamp(max=side - band) + torch.arange(band)
    images = side * torch.arange(x.shape[0] * 3).view(-1, 3, 1, 1)
    weights = weights.gather(2, index)[:, None].expand(-1, 3, -1, -1)
    sums = F.embedding_bag((images + index[:, None]).flatten(0, 2), x.reshape(-1, width),
                           mode="sum", per_sample_weights=weights.flatten(0, 2))
    return sums.view(len(x), 3, -1, width)


def horizontal_flip(x, flip):
    """flip: 1 = mirrored, 0 = neutral (lerp is exact at both, and faster than torch.where)."""
    return torch.lerp(x, x.flip(3), flip[:, None, None, None])


def grayscale(x):
    r, g, b = x.split(1, 1)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)  # (B, 1, H, W)


def adjust_brightness(x, factor):
    """factor: 0 = black, 1 = neutral."""
    return (x * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(x, factor):
    """factor: 0 = the mean gray of the image, 1 = neutral."""
    factor = factor[:, None, None, None]
    mean = grayscale(x.mean((2, 3), keepdim=True))
    return (x * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(x, factor):
    """factor: 0 = gray, 1 = neutral."""
    return torch.lerp(grayscale(x), x, factor[:, None, None, None]).clamp_(0, 1)


def adjust_hue(x, shift):
    """shift: turns of the HSV hue, 0 = neutral.

    For a colour (r, g, b) stretched to minimum 0 and maximum 1, the hue in sixths of a turn is
    ±(1 + g + b - r) with the sign of g - b, and each channel is 2 - |distance of the hue to the
    channel's own|, cut to [0, 1]: no cases, no HSV.
    """
    r, g, b = x.split(1, 1)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    hue = (g - low).add_(b - r).div_((high - low).clamp_(min=1e-12)).add_(1).copysign_(g - b)
    red_green_blue = 2 * torch.arange(3, device=x.device)[:, None, None]  # their hues
    distance = hue.add_(6 * shift[:, None, None, None]) - red_green_blue
    distance.sub_((distance / 6).round_(), alpha=6)  # the shorter way round the circle
    return torch.lerp(low, high, (2 - distance.abs_()).clamp_(0, 1))


def gaussian_blur(x, sigma, kernel_size=None):
    """sigma: pixels, 0 = neutral. kernel_size: odd; by default a tenth of the width."""
    radius = (kernel_size or x.shape[3] // 10 | 1) // 2
    # On a CPU skip images that stay sharp; on CUDA the host would have to wait for their number.
    chosen = slice(None) if x.is_cuda else sigma.nonzero().squeeze(1)
    blurred, sigma = x[chosen], sigma[chosen, None].clamp(min=1e-3)
    offset = torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.softmax(-0.5 * (offset / sigma) ** 2, 1)[:, :, None, None, None].unbind(1)
    for axis, padding in (2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0)):
        padded, blurred = F.pad(blurred, padding, mode="reflect"), torch.zeros_like(blurred)
        for i, weight in enumerate(weights):
            blurred.addcmul_(padded.narrow(axis, i, x.shape[axis]), weight)
    x = x.clone()
    x[chosen] = blurred
    return x


def solarize(x, threshold):
    """Values from threshold on are inverted; above 1 = neutral."""
    return x.clone().ge_(threshold[:, None, None, None]).sub_(x).abs_()  # |1 - x| or |0 - x|


def normalize(x):
    channels = zip(x.split(1, 1), IMAGENET_MEAN, IMAGENET_STD)
    return torch.cat([(channel - mean).div_(std) for channel, mean, std in channels], 1)


def denormalize(views):
    """Undo normalize: (B, 3, H, W) -> the same in [0, 1]."""
    mean, std = (views.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (views * std + mean).clamp(0, 1)


# The classes draw the parameters of a batch: `draw(images, aspect)` returns steps to be taken on x,
# each a function and its parameters.


def chosen(images, p):
    """(B,) bool, True with probability p."""
    return uniform(len(images), device=images.device) < p


@dataclass
class RandomResizedCrop:
    """scale: part of the area; ratio 3/4 to 4/3 in the original geometry; ten tries to fit."""
    size: int
    scale: tuple = (0.08, 1)
    interpolation: str = "bilinear"

    def draw(self, images, aspect):
        draw, canvas = partial(uniform, len(images), device=images.device), images.shape[3]
        width = (canvas * aspect).round().clamp(min=1)
        image = torch.stack([torch.full_like(width, canvas), width], 1)
        area = image.prod(1, keepdim=True) * draw(10, low=self.scale[0], high=self.scale[1])
        ratio = (math.log(4 / 3) * draw(10, low=-1)).exp()
        tries = torch.stack([area / ratio, area * ratio], 2).sqrt().round()
        fallback = torch.minimum(image, (image.flip(1) * 4 / 3).round())  # as much as ratios allow
        sides = torch.cat([tries, fallback[:, None]], 1)  # (B, 11, 2): height, width
        fits = ((sides > 0) & (sides <= image[:, None])).all(2)
        first = fits.int().argmax(1, keepdim=True)
        sides = sides.take_along_dim(first[:, None], 1).squeeze(1)
        room = image - sides
        corner = torch.where(first < 10, draw(2) * (room + 1), room / 2).floor()
        boxes = torch.cat([corner, sides], 1) * (canvas / image).repeat(1, 2)
        return [(partial(resized_crop, size=self.size, interpolation=self.interpolation), boxes)]


@dataclass
class CentralCrop:
    """Central square of the original: 7/8 of the short side (256 -> 224), all of it up to 64."""
    size: int

    def draw(self, images, aspect):
        side = images.shape[3] * (7 / 8 if self.size > 64 else 1)
        sides = side * torch.stack([aspect.clamp(max=1), (1 / aspect).clamp(max=1)], 1)
        boxes = torch.cat([(images.shape[3] - sides) / 2, sides], 1)
        return [(partial(resized_crop, size=self.size), boxes)]


@dataclass
class RandomHorizontalFlip:
    p: float = 0.5

    def draw(self, images, aspect):
        return [(horizontal_flip, chosen(images, self.p).float())]


@dataclass
class ColorJitter:
    """Four operations, random order; factor 1 ± strength (at most 1), hue ± strength (1/2)."""
    brightness: float
    contrast: float
    saturation: float
    hue: float
    p: float = 0.8

    def draw(self, images, aspect):
        u = uniform(len(images), 4, device=images.device, low=-1) * chosen(images, self.p)[:, None]
        steps = [(adjust_brightness, 1 + self.brightness * u[:, 0]),
                 (adjust_contrast, 1 + self.contrast * u[:, 1]),
                 (adjust_saturation, 1 + self.saturation * u[:, 2]),
                 (adjust_hue, self.hue * u[:, 3])]
        return [steps[i] for i in torch.randperm(4).tolist()]


@dataclass
class RandomGrayscale:
    p: float = 0.2

    def draw(self, images, aspect):
        return [(adjust_saturation, 1 - chosen(images, self.p).float())]


@dataclass
class GaussianBlur:
    p: float = 0.5
    sigma: tuple = (0.1, 2.0)  # pixels
    kernel_size: int | None = None

    def draw(self, images, aspect):
        low, high = self.sigma
        sigma = uniform(len(images), device=images.device, low=low, high=high)
        blur = partial(gaussian_blur, kernel_size=self.kernel_size)
        return [(blur, sigma * chosen(images, self.p))]


@dataclass
class RandomSolarize:
    p: float = 0.2
    threshold: float = 0.5

    def draw(self, images, aspect):
        return [(solarize, torch.where(chosen(images, self.p), self.threshold, 2.0))]


class Normalize:
    def draw(self, images, aspect):
        return [(normalize,)]


class Augment:
    """A view of each image: draws the parameters of the whole batch, then takes the steps.

    images (B, 3, S, S) uint8, aspect (B,): width / height of the originals, by default 1
    -> (B, 3, size, size) float32, channels_last.
    """

    chunk_pixels = 2**16  # 64 images of 32 x 32 pixels at a time stay in a CPU's cache

    def __init__(self, operations):
        self.operations = operations

    def draw(self, images, aspect):
        return [step for operation in self.operations for step in operation.draw(images, aspect)]

    def __call__(self, images, aspect=None):
        n, device = len(images), images.device
        steps = self.draw(images, torch.ones(n, device=device) if aspect is None else aspect)
        chunk = n if images.is_cuda else -(-self.chunk_pixels // images.shape[2] ** 2)
        views = []
        for rows in (slice(first, first + chunk) for first in range(0, n, chunk)):
            x = images[rows].float() / 255
            for function, *parameters in steps:
                x = function(x, *(parameter[rows] for parameter in parameters))
            views.append(x.contiguous(memory_format=torch.channels_last))
        return torch.cat(views)


def eval_view(images, aspect, size):
    """The view that evaluation sees: central square, normalised."""
    return Augment([CentralCrop(size), Normalize()])(images, aspect)


# ------------------------------------------------------------------------------------- backbones

DEPTHS = {"resnet8": (BasicBlock, (1, 1, 1)), "resnet20": (BasicBlock, (3, 3, 3)),
          "resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet34": (BasicBlock, (3, 4, 6, 3)),
          "resnet50": (Bottleneck, (3, 4, 6, 3)), "resnet101": (Bottleneck, (3, 4, 23, 3)),
          "resnet152": (Bottleneck, (3, 8, 36, 3))}
STEMS = {"imagenet": (7, 2), "cifar": (3, 1), "tiny": (3, 2)}  # kernel and stride of conv1
VGGS = {"vgg11_bn": "A", "vgg13_bn": "B", "vgg16_bn": "D", "vgg19_bn": "E"}  # the paper's names
ARCHS = ", ".join([*DEPTHS, *VGGS])


class ResNet(torchvision.models.ResNet):
    """ResNet (He et al., 2016) without `fc`, of any width and up to four stages: (B, 3, H, W) ->
    (B, C). With the imagenet stem it is torchvision's; the stems for small images do not pool.
    `stages`: names of the submodules after which features can be taken."""

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


class VGG(nn.Module):
    """VGG with BN (Simonyan and Zisserman, 2015): (B, 3, H, W) -> (B, C), the mean of torchvision's
    `features`, of any width. layers: channels of convolutions, "M" for max-pooling."""

    def __init__(self, layers):
        super().__init__()
        self.features = vgg.make_layers(layers, batch_norm=True)
        self.stages = [f"features.{i}" for i, module in enumerate(self.features)
                       if isinstance(module, nn.MaxPool2d)]
        self.feature_dim = layers[-2]
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x):
        if min(x.shape[2:]) < 32:
            raise Failure("a VGG halves its images five times: they need 32 pixels at least")
        return self.features(x).mean((2, 3))


def architecture(text):
    """An argparse type: a name of DEPTHS or VGGS, or such a name times a width ("resnet18x2")."""
    name, _, width = text.partition("x")
    known = name in DEPTHS or name in VGGS
    if not known or not re.fullmatch(r"(\d+(\.\d+)?)?", width) or float(width or 1) < 1 / 32:
        raise argparse.ArgumentTypeError(f"{text} is none of {ARCHS}, nor such a name and a width")
    return text


def make_backbone(arch, image_size, zero_init_residual=False):
    """"resnet50", 224 -> ResNet or VGG; views of at most 64 pixels get a ResNet a 3x3 stem without
    max-pooling."""
    name, _, width = arch.partition("x")
    width = float(width or 1)
    if name in VGGS:
        return VGG([v if v == "M" else round(v * width) for v in vgg.cfgs[VGGS[name]]])
    if len(DEPTHS[name][1]) == 3:  # for a CPU: resnet20 has twice the width of the paper's and half
        # its resolution; zero_init_residual made resnet8 learn less
        return ResNet(*DEPTHS[name], 0.5 * width, "tiny")
    stem = "cifar" if image_size <= 64 else "imagenet"
    return ResNet(*DEPTHS[name], width, stem, zero_init_residual)


# --------------------------------------------------------------------------------------- the run


@contextlib.contextmanager
def writing(path):
    """Names the file in what can go wrong with a disk."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise Failure(f"cannot write {path}: {reason}")


def save_file(path, value):
    """torch.save, so that at any moment `path` is the old file or the new one, and never a part."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                torch.save(value, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(temporary.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name, too, survives a power cut
        os.close(folder)


def read_file(path, mmap=False):
    """torch.load, of tensors and plain values only, with the CRCs checked, which torch does not."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # old formats have none
            raise ValueError("its checksum is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on what other programs wrote
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged files raise a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise Failure(f"{path} is missing, damaged or no file of weights: {reason}")


def run_folders(method):
    """runs/<method>, runs/<method>-2, ...: the last that exists, or None, and the next."""
    found = [re.fullmatch(rf"{method}(?:-(\d+))?", path.name) for path in Path("runs").glob("*")]
    last = max([int(match[1] or 1) for match in found if match], default=0)
    folders = [Path("runs", method + f"-{n}" * (n > 1)) for n in (last, last + 1)]
    return folders[0] if last else None, folders[1]


class Run:
    """What surrounds the steps of a training run: data, folder, log, checkpoints and signals.

    Attributes: device; train_set, test_set; steps_per_epoch, total_steps, warmup_steps; peak_lr,
    that is --lr · batch / 256; folder; step, the optimizer steps done.
    """

    SAVED = {"args": dict, "step": int, "images": str, "log": int, "report": dict | None,
             "model": dict, "optimizer": dict}
    MAY_CHANGE = {"data", "out", "resume", "workers", "device", "print_freq", "eval_every"}

    def __init__(self, method, args):
        self.method, self.args, self.step, self.saved, self.report = method, args, 0, None, None
        self.device = start_processes(args.device)
        self.folder = run_folders(method)[0] if args.resume else None
        if args.out:
            self.folder = Path(args.out)
        if self.folder:
            self._open_folder()
        if args.batch_size % world_size() or args.batch_size < 2 * world_size():
            raise Failure(f"--batch-size {args.batch_size} gives {world_size()} processes no equal "
                          "share of at least 2 images: start another number of processes")
        torch.backends.cudnn.benchmark = not args.deterministic
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.train_set, self.test_set = load_data(args.data, args.image_size, args.max_images,
                                                  args.workers, self.device)
        images, share = len(self.train_set), 2 * world_size()
        if args.batch_size > images:  # a recipe's shrinks to the set; one given by hand does not
            if "batch_size" in args.given or images < share:
                raise Failure(f"{images} training images are fewer than --batch-size "
                              f"{args.batch_size}")
            args.batch_size = images // share * share
            self.say(f"batch of {args.batch_size}, since there are {images} images")
        names = "\n".join(self.train_set.names).encode(errors="surrogateescape")
        self.images = hashlib.sha256(names).hexdigest()[:16]
        if self.saved and self.saved["images"] != self.images:
            raise Failure(f"{self.checkpoint} was trained on other images than those of --data")
        self.steps_per_epoch = images // args.batch_size
        self.total_steps = args.epochs * self.steps_per_epoch
        self.warmup_steps = round(args.warmup_epochs * self.steps_per_epoch)
        self.peak_lr = args.lr * args.batch_size / 256
        self.say(f"recipe {args.recipe}, {args.data or 'built-in set'}: {images:,} images, "
                 f"learning rate {args.lr:g} x {args.batch_size}/256 = {self.peak_lr:g}")
        torch.manual_seed(args.seed)

    def _open_folder(self):
        """Refuse a folder with a run in it; to resume, read the checkpoint. Arguments that were not
        given by hand become what they were, others must not differ."""
        args, self.checkpoint = self.args, self.folder / "checkpoint.pth"
        if self.folder.exists() and not self.folder.is_dir():
            raise Failure(f"--out {self.folder} is not a folder")
        files = self.checkpoint, self.folder / "backbone.pth", self.folder / "log.jsonl"
        if not args.resume and any(map(Path.exists, files)):
            raise Failure(f"--out {args.out} holds a run: add --resume, or choose another folder")
        if not self.checkpoint.exists():
            return
        self.saved = saved = read_file(self.checkpoint)
        method = saved.get("method") if isinstance(saved, dict) else None
        if method != self.method or not all(isinstance(saved.get(key), kind)
                                            for key, kind in self.SAVED.items()):
            raise Failure(f"{self.checkpoint} holds no run of {self.method}.py (method: {method})")
        for key, old in saved["args"].items():
            given, new = key in args.given, getattr(args, key, None)
            if given and key not in self.MAY_CHANGE and new != old:
                raise Failure(f"{self.checkpoint} has --{key.replace('_', '-')} {old}, this run "
                              f"{new}; use another --out")
            if not given and key not in ("out", "resume", "device", "workers"):
                setattr(args, key, old)

    def say(self, line):
        if rank() == 0:
            print(line, flush=True)

    def init(self, backbone):
        """-> the backbone, with the weights of --init; keeps a copy without, for the report."""
        self.initial = copy.deepcopy(backbone)
        if self.args.init and not self.saved:
            from linear_probe import read_backbone

            try:
                backbone.load_state_dict(read_backbone(self.args.init)[0])
            except RuntimeError:
                raise Failure(f"--init {self.args.init} does not fit --arch {self.args.arch}")
        return backbone

    def start(self, model, optimizer, backbone, sync_bn=True):
        """Place, restore and wrap the model -> what the loop calls instead of it. `backbone` is the
        part that is evaluated and saved by itself."""
        self.model, self.optimizer, self.backbone, log_length = model, optimizer, backbone, 0
        model.to(self.device, memory_format=torch.channels_last)
        if sync_bn:
            sync_batch_norm(model)
        if saved := self.saved:
            try:
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
                self.step, self.report, log_length = saved["step"], saved["report"], saved["log"]
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                raise Failure(f"{self.checkpoint} does not fit this model: {error}")
            self.saved = None  # its memory
        if not self.folder:
            self.folder = run_folders(self.method)[1]
            self.checkpoint = self.folder / "checkpoint.pth"
        self.say(f"writing to {self.folder}, training on {self.device}")
        if rank() == 0:
            self._open_log(self.folder / "log.jsonl", log_length)
        self.signal, self.deferring = 0, False
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        if self.args.compile:
            model.compile()
        if world_size() == 1:
            return model
        return nn.parallel.DistributedDataParallel(
            model, [self.device] if self.device.type == "cuda" else None)

    def _open_log(self, path, length):
        """Continue log.jsonl after its first `length` bytes; one process at a time."""
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.log_file = open(path, "a")
            try:  # flock's would last as long as loader processes, which outlive a kill for seconds
                fcntl.lockf(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Failure(f"another process is writing to {self.folder}")
            except OSError:
                pass  # a file system without locks
            self.log_file.truncate(min(length, path.stat().st_size))
            self.log_file.seek(0, os.SEEK_END)  # `save` stores the position
            for part in self.folder.glob("*.tmp"):  # of a process killed while it saved
                part.unlink()

    def sample(self, count=8):
        """-> some images from all over the training set, uint8, and their aspects."""
        n = len(self.train_set)
        rows = torch.arange(min(count, n)) * n // min(count, n)
        return next(self.train_set.batches([rows], self.device))

    def save_picture(self, name, *columns):
        """Columns of pictures (B, 3, ., .) in [0, 1], of any sizes: a row for each of the B."""
        if rank() == 0:
            size = max(column.shape[-1] for column in columns)
            columns = [F.interpolate(c.float(), size, mode="nearest-exact") for c in columns]
            with writing(self.folder / name):
                save_image(torch.stack(columns, 1).flatten(0, 1), self.folder / name,
                           nrow=len(columns) * max(1, 8 // len(columns)))

    def save_views(self, *augments):
        """views.png: some images as they are, and what each augmentation makes of them."""
        images, aspect = self.sample()
        views = [denormalize(augment(images, aspect)) for augment in augments]
        self.save_picture("views.png", images / 255, *views)

    def autocast(self):
        """bfloat16 on CUDA (float32's range: no gradient scaling); nothing on the CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda")

    def prints(self, step):
        """Whether this step, counted from 0, ends with a log line."""
        done = step + 1
        return done == 1 or done % self.args.print_freq == 0 or done % self.steps_per_epoch == 0

    def steps(self):
        """Yields step, images (B/W, 3, S, S) uint8 and aspect (B/W,), until the last step.

        Epochs are permutations by seed and epoch, without an incomplete last batch; before each
        step the generators are seeded by seed and step: so a resumed run continues bit for bit,
        with any number of workers. Between steps it saves, evaluates, and obeys signals.
        """
        batches = self.train_set.batches(self._order(), self.device)
        self.started = self.printed = self.saved_at = time.monotonic()
        self.first_step = self.printed_step = self.step
        self.deferring = True
        try:
            if not self.report:
                self._evaluate_if_due()
            for images, aspect in batches:
                seed = (self.args.seed + 1) * 1_000_003 + self.step
                torch.default_generator.manual_seed(seed)  # torch.manual_seed costs 100 times more
                if self.device.type == "cuda":
                    torch.cuda.manual_seed(seed)
                yield self.step, images, aspect
                self.step += 1
                stop, epoch_ends = self._stops(), self.step % self.steps_per_epoch == 0
                if stop or epoch_ends or time.monotonic() - self.saved_at > 600:
                    self.train_set.warn_of_unreadable()
                    self.save()
                    stop = stop or world_size() == 1 and self._stops()  # it came while saving
                if stop:
                    self.train_set.loader = None
                    self._exit()
                self._evaluate_if_due()
        finally:
            batches.close()
            self.deferring = False

    def _order(self):
        """This process's share of each batch's indices, from the current step to the last."""
        n, batch, order = len(self.train_set), self.args.batch_size, None
        for step in range(self.step, self.total_steps):
            epoch, first = divmod(step, self.steps_per_epoch)
            if order is None or first == 0:
                seed = 2**40 + self.args.seed * 1_000_003 + epoch
                order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
                if self.train_set.pixels is not None:
                    order = order.to(self.device)
            yield order[first * batch :][:batch].chunk(world_size())[rank()]

    def _on_signal(self, number, _):
        self.signal = 128 + number
        if not self.deferring:
            self._exit()

    def _stops(self):
        """Whether a signal came; several processes agree on it at log lines only."""
        if world_size() > 1:
            if not self.prints(self.step - 1):
                return False
            dist.all_reduce(agreed := torch.tensor(self.signal), dist.ReduceOp.MAX)
            self.signal = int(agreed)
        return self.signal > 0

    def _exit(self):
        if self.checkpoint.exists():
            self.say(f"saved at step {self.step}")
        sys.exit(self.signal)

    def log(self, step, loss, lr, chance=None, **health):
        """A line on the screen and in log.jsonl, for steps that `prints`; ends the run if the loss
        is not finite. loss and health: scalars, averaged over the processes."""
        line, done, now = {"loss": loss, **health}, step + 1, time.monotonic()
        values = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device)
                              for v in line.values()]).detach()
        values = (all_sum(values) / world_size()).tolist()
        line = {name: round(value, 6) for name, value in zip(line, values)}
        if not math.isfinite(line["loss"]):
            raise self._diverged(f"loss is {line['loss']}", done)
        speed = (done - self.printed_step) * self.args.batch_size / (now - self.printed)
        left = (self.total_steps - done) * (now - self.started) / (done - self.first_step)
        self.printed, self.printed_step, epoch = now, done, -(-done // self.steps_per_epoch)
        self._write({"step": done, "epoch": epoch, **line, "lr": lr, "images_per_s": round(speed),
                     "seconds": round(now - self.started, 2)})
        loss, *health = (f"{name} {value:.4f}" for name, value in line.items())
        loss += f" (chance {chance:.4f})" if chance is not None else ""
        self.say("  ".join([f"epoch {epoch}/{self.args.epochs}", f"step {done}/{self.total_steps}",
                            loss, *health, f"lr {lr:.3g}", f"{speed:,.0f} images/s",
                            f"{timedelta(seconds=round(left))} left"]))
        if done == 1 and left > 86400 and self.device.type == "cpu":
            self.say("this takes days on a CPU; --recipe demo trains a small network")

    def _write(self, line):
        if rank() == 0:
            with writing(self.folder / "log.jsonl"):
                self.log_file.write(json.dumps(line) + "\n")
                self.log_file.flush()

    def _diverged(self, what, step):
        kept = f"; {self.checkpoint} holds an earlier step" * self.checkpoint.exists()
        lr = self.optimizer.param_groups[0]["lr"]
        return Failure(f"{what} at step {step} (lr {lr:.3g}): try a lower --lr{kept}")

    def save(self):
        """checkpoint.pth, the whole run, and backbone.pth, what users want of it."""
        state = self.model.state_dict()
        if not torch.stack([v.isfinite().all() for v in state.values()]).all():
            raise self._diverged("weights are not finite", self.step)
        if rank() == 0:
            args = {k: v for k, v in vars(self.args).items() if k != "given"}
            save_file(self.checkpoint, {
                "method": self.method, "recipe": self.args.recipe, "args": args, "step": self.step,
                "images": self.images, "log": self.log_file.tell(), "report": self.report,
                "model": state, "optimizer": self.optimizer.state_dict()})
            save_file(self.folder / "backbone.pth",
                      {k: v.cpu() for k, v in self.backbone.state_dict().items()})
        self.saved_at = time.monotonic()

    def _evaluate_if_due(self):
        """kNN at the end of each `eval_every`-th epoch; a run resumed there does it again."""
        every = self.args.eval_every * self.steps_per_epoch
        if not every or not self.step or self.step % every:
            return
        from linear_probe import knn_accuracy

        self.deferring = False  # the run is saved already
        top1 = knn_accuracy(self.backbone, self.train_set, self.test_set, self.args.image_size,
                            self.device)
        self.deferring, self.printed, self.printed_step = True, time.monotonic(), self.step
        if top1 is not None:
            self._write({"step": self.step, "knn": round(top1, 2)})
            self.say(f"kNN {top1:.2f} % after epoch {self.step // self.steps_per_epoch}")

    def finish(self, layers=False):
        """The report: what the backbone, its random initialisation and raw pixels are worth; with
        `layers`, also what each stage of the backbone is."""
        from linear_probe import evaluate, print_report

        if self.report:
            self.say(f"already finished: {self.folder}")
        else:
            if not self.total_steps:
                self.save()
            self.report = evaluate(self.backbone, self.initial, self.train_set, self.test_set,
                                   self.args.image_size, self.device, layers=layers)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
            peak *= 1 if sys.platform == "darwin" else 1024
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self.device)
            self._write({"step": self.step, "peak_gb": round(peak / 1e9, 2), "report": self.report})
            self.save()
        if rank() == 0:
            print_report(self.report)
        self.say(f"wrote {self.folder}/backbone.pth, checkpoint.pth, log.jsonl and pictures")
