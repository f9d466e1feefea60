# SPDX-License-Identifier: MIT
"""What the ten method files share. Plain functions, in sections that can each be read alone:
command line, processes, data, synthetic images, augmentation, backbones, the training run."""

import argparse
import copy
import itertools
import json
import math
import os
import sys
import time
import traceback
import warnings
import zlib
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from inspect import signature
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import SAMPLESPERPIXEL
from torch import cos, nn, sin, tanh
from torch.utils.data import DataLoader
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.transforms.v2.functional import pil_to_tensor, rgb_to_grayscale
from torchvision.utils import save_image

warnings.filterwarnings("ignore", module="PIL")  # about very large or oddly tagged images

# ---------------------------------------------------------------------------------- command line


class Failure(Exception):
    """Something that users can put right, reported in one line, without a traceback."""


def main(train, parse_args, argv=None):
    """Run `train(parse_args(argv))`. Exit status: 0; 1 after an error; 2 for wrong arguments
    (argparse's own); 130 after Ctrl-C. Errors other than `Failure` keep their traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's cannot be changed
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack τ or odd file names
    args = None
    try:
        args = parse_args(argv)
        train(args)
    except Failure as error:
        leave(f"error: {error}", 1)
    except torch.OutOfMemoryError as error:
        leave(f"error: {error} Try smaller batches or images.", 1)
    except KeyboardInterrupt:
        leave(f"stopped{what_is_saved(args)}", 130)
    except Exception:
        leave(traceback.format_exc().rstrip(), 1)
    if dist.is_initialized():
        wait_for_all()
        dist.destroy_process_group()


def what_is_saved(args):
    """How the last line of a stopped run ends: where --resume goes on."""
    out = getattr(args, "out", None)
    if out is None or rank() > 0:  # out: linear_probe.py has none
        return ""
    path = f"{out}/checkpoint.pth"
    if not os.path.exists(path):
        return f"; nothing is saved yet: the first save comes after {SAVE_SECONDS} seconds"
    with suppress(Exception):  # whatever is wrong with the file, the run has been stopped
        step = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["step"]
        return f"; {out} holds the run after {step} steps: --resume --out {out} goes on"
    return ""


def leave(message, status):
    """Exit at once. After an error the process group is not destroyed: that could wait forever for
    the other processes, and torchrun would not see that this one has failed."""
    print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


NETWORKS = "resnet8 to resnet152, resnet18x2 (wider), or another network of torchvision"


def make_parser(method, doc, recipes, networks=NETWORKS):
    """-> argparse's parser with the flags that all methods share; a method then adds its own.
    networks: what --arch may be, in words."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.set_defaults(method=method)
    add = parser.add_argument
    add("--data", help="folder of images, or set of torchvision (cifar10); without it, synthetic "
        "images")
    add("--recipe", choices=recipes["recipe"], help="column of RECIPES; without it, what suits "
        "the data and the machine")
    add("--out", help="the run's folder; without it, the next free one in runs/")
    add("--resume", action="store_true", help="continue the run in --out, or the latest one")
    add("--init", help="file of backbone weights to start from")
    add("-a", "--arch", help=networks)
    add("--epochs", type=int, help="passes over the training images")
    add("--warmup-epochs", type=float, help="epochs in which the learning rate rises")
    add("-b", "--batch-size", type=int, help="images per step, over all processes")
    add("--lr", type=float, help="peak learning rate, per 256 images")
    add("--wd", "--weight-decay", type=float, dest="weight_decay", help="weight decay")
    add_data_flags(parser)
    if "eval_size" in recipes:
        add("--eval-size", type=int, help="side of the images in kNN and linear probe, in pixels; "
            "of a ViT: --image-size")
    add("--compile", action="store_true", help="torch.compile the model")
    add("-p", "--print-freq", type=int, default=20, help="steps per log line")
    return parser


def add_data_flags(parser):
    """The flags that training and linear_probe.py share."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        cores = len(os.sched_getaffinity(0))  # a job may use fewer than the machine has
    else:
        cores = os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this machine, under torchrun
    workers = min(16, cores // processes)
    add = parser.add_argument
    add("--image-size", type=int, help="side of a view, in pixels")
    add("--max-images", type=int, help="use only this many training and test images")
    add("--memory", type=float, default=8.0, help="GB of images that this machine may keep in "
        "memory; larger sets are decoded anew for each batch")
    add("-j", "--workers", type=int, default=workers, help="decoding processes per GPU; in Docker "
        "they need --ipc=host")
    add("--device", help="cpu, cuda, cuda:1, ...; without it, CUDA if there is one")
    add("--seed", type=int, default=0, help="seed of all randomness")


def parse_with_recipe(parser, recipes, argv=None):
    """-> the parsed arguments. Defaults come from a column of `recipes`, or with --resume from the
    saved run; what is given by hand wins. Call it after the last `add_argument`, whose `default=`
    would beat these."""
    argv = sys.argv[1:] if argv is None else argv
    # without --help, which would print defaults before the recipe has set them
    given = parser.parse_args([word for word in argv if word not in ("-h", "--help")])
    out = given.out
    if given.resume and out is None:
        out = latest_run(given.method)
    if given.resume and os.path.exists(f"{out}/checkpoint.pth"):
        defaults = read_run(out, given.method)["args"]
    else:
        recipe = given.recipe or choose_recipe(given.data, given.device)
        column = recipes["recipe"].index(recipe)
        defaults = {name: row[column] for name, row in recipes.items()}
        if given.image_size and "eval_size" in recipes:
            defaults["eval_size"] = given.image_size  # the recipe's goes with the recipe's views
    parser.set_defaults(**defaults, out=out)
    args = parser.parse_args(argv)  # once more, with these defaults
    if out and not args.resume:
        for name in "log.jsonl", "checkpoint.pth", "backbone.pth":
            if os.path.exists(f"{out}/{name}"):
                raise Failure(f"--out {out} holds a run: add --resume, or choose another folder")
    if args.resume and not os.path.exists(f"{out}/checkpoint.pth"):
        # A run that was stopped before its first save has left only its log, and may start anew.
        if os.path.exists(f"{out}/backbone.pth"):
            raise Failure(f"--resume: {out} holds weights but no checkpoint.pth to go on from")
    return args


def latest_run(method):
    """-> the folder of this method's run that was saved last, or None."""
    checkpoints = Path("runs").glob(f"{method}*/checkpoint.pth")
    latest = max(checkpoints, key=os.path.getmtime, default=None)
    return None if latest is None else str(latest.parent)


def choose_recipe(data, device):
    """demo without --data, cpu without CUDA, cifar for images of at most 64 pixels, else imagenet.
    """
    if data is None:
        return "demo"
    if not torch.cuda.is_available() or (device and not device.startswith("cuda")):
        return "cpu"
    if not os.path.isdir(data):
        small_sets = "cifar10", "cifar100", "svhn", "mnist", "fashionmnist", "kmnist", "usps"
        return "cifar" if data.lower() in small_sets else "imagenet"
    sides = list(itertools.islice(image_sides(data), 20))  # without a walk through a million files
    return "cifar" if sides and max(sides) <= 64 else "imagenet"


def image_sides(root):
    """Yields the shorter side, in pixels, of the images below a folder."""
    for folder, files in walk(root):
        for name in files:
            path = os.path.join(folder, name)
            if not is_image(name) or not os.path.isfile(path):  # opening a pipe would block
                continue
            with suppress(Exception), Image.open(path) as image:
                yield min(image.size)


# ------------------------------------------------------------------------------------- processes


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(line):
    if rank() == 0:
        print(line, flush=True)


def start(device_name, seed):
    """Join torchrun's processes, if there are several, and seed the generators -> the device."""
    torchrun = dist.is_torchelastic_launched()
    if torchrun and ":" in (device_name or ""):
        raise Failure(f"--device {device_name}: under torchrun each process takes its own GPU, "
                      "so give no number")
    name = device_name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and torchrun:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise Failure(f"--device {name}: only cpu and cuda are supported")
        device = torch.zeros(1, device=name).device  # with its number
    except (AssertionError, ImportError, RuntimeError) as error:  # none such, or it is full
        reason = str(error).splitlines()[0]
        raise Failure(f"--device {name}: {reason}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        # cuDNN's attention has given NaN gradients on H100 GPUs (NVIDIA/cudnn-frontend issue 160)
        torch.backends.cuda.enable_cudnn_sdp(False)
    if torchrun and not dist.is_initialized():
        # gloo for tensors on the CPU; a day, since the others wait while rank 0 evaluates
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    torch.manual_seed(seed)
    return device


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
    """Differentiable sum of a tensor over the processes; a no-op with one process.

    Each of W processes computes the same loss from it. The backward sum adds their W equal
    gradients, and DistributedDataParallel's mean divides by W, so that a loss needs no factor.
    """
    return AllSum.apply(x) if world_size() > 1 else x


def wait_for_all():
    """Returns when all processes are here. They wait through gloo, since a wait on the GPU of more
    than some minutes may be taken for a hang."""
    all_sum(torch.zeros(1))


def gather(x):
    """(B/W, ...) on each of W processes -> (B, ...) in their order, with gradient. Each process
    fills in its own rows, with zeros elsewhere, and these are summed."""
    rows = [x if i == rank() else torch.zeros_like(x) for i in range(world_size())]
    return all_sum(torch.cat(rows))


def uniform(n, *shape, device, low=0.0, high=1.0):
    """Random numbers (n, *shape): this process's rows of a draw for the total batch, which all
    processes make from the same seed. So an image's numbers depend only on its position in the
    total batch, whatever the number of processes."""
    draw = torch.empty(n * world_size(), *shape, device=device).uniform_(low, high)
    return draw[rank() * n : (rank() + 1) * n]


def parallel(model, compile=False, sync_bn=True):
    """-> what the loop calls in the model's place: gradients are means over the processes, and BN
    normalizes over all of them (on CUDA; torch has no such BN for CPUs, where each process has its
    own statistics).

    Synchronized BN makes the host wait for the GPU in each layer, and splits torch.compile's graph.
    """
    device = next(model.parameters()).device
    if world_size() > 1 and sync_bn and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if compile:
        model.compile()
    if world_size() == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def autocast(device):
    """bfloat16 on GPUs that have it, else float32."""
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


# ------------------------------------------------------------------------------------------ data

EXTENSIONS = ".jpg .jpeg .png .webp .bmp .gif .tif .tiff .avif .ppm .pgm".split()
TRAIN_FOLDERS = "train", "training"
TEST_FOLDERS = "val", "valid", "validation", "test", "testing"


def to_square(image, side):
    """PIL image -> uint8 (3, side, side), and the width / height that it had. It is turned as EXIF
    says; transparency becomes white; 16-bit gray is scaled by its full range. ValueError: pixels
    without a known range."""
    image.draft(None, (2 * side, 2 * side))  # a JPEG may be decoded at a fraction of its size
    # mode I;16, or I from these formats; asked now, since exif_transpose drops the format
    sixteen_bits = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in ("PNG", "PPM"))
    # The fourth band of a TIFF need not be opacity: it may be infrared.
    transparent = image.has_transparency_data and image.format in ("PNG", "WEBP", "GIF", "AVIF")
    image = ImageOps.exif_transpose(image)
    if sixteen_bits:
        gray = np.asarray(image, dtype=np.float32) * (255 / 65535)
        image = Image.fromarray(gray.round().astype(np.uint8))
    elif image.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of mode {image.mode}: convert to 8 bits")
    if transparent:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    square = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return pil_to_tensor(square), image.width / image.height


class ImageSet:
    """Images as uint8 squares of one side: kept in memory, or decoded each time.

    origin: where they are from. names: paths below the folder `origin`, or indices of `items`, a
    set of torchvision. labels: (N,), -1 = none; classes: their names. left_out: what was not read,
    in words.
    """

    def __init__(self, origin, names, labels, classes, left_out=(), items=None):
        self.origin = origin
        self.names = names
        self.labels = torch.as_tensor(labels).long()
        self.classes = classes
        self.left_out = list(left_out)
        self.items = items
        self.side = None  # of the squares, in pixels
        self.pixels = None  # (N, 3, side, side) uint8, if kept in memory
        self.aspect = None  # (N,) width / height, if kept in memory
        self.workers = 0

    def __len__(self):
        return len(self.names)

    def subset(self, rows):
        """-> the images of these indices."""
        part = copy.copy(self)
        part.names = [self.names[i] for i in rows]
        part.labels = self.labels[rows]
        part.left_out = list(self.left_out)
        if self.pixels is not None:
            part.pixels = self.pixels[rows]
            part.aspect = self.aspect[rows]
        return part

    def fingerprint(self):
        """What tells this set from another, in words."""
        return f"{len(self)} images, {zlib.crc32(repr(list(self.names)).encode()):08x}"

    def open(self, i):
        """-> PIL image, of which only the header has been read."""
        if self.items is not None:
            return self.items[self.names[i]][0]
        path = os.path.join(self.origin, self.names[i])
        if not os.path.isfile(path):
            raise OSError("no file")  # opening a pipe would block
        return Image.open(path)

    def __getitem__(self, i):
        """-> image i: uint8 (3, side, side), its width / height, i, and "". If it cannot be read: a
        black square, 0, i, and the reason."""
        try:
            with self.open(i) as image:
                square, aspect = to_square(image, self.side)
            return square, torch.tensor(aspect), i, ""
        except Exception as error:  # PIL raises a dozen kinds
            black = torch.zeros(3, self.side, self.side, dtype=torch.uint8)
            return black, torch.tensor(0.0), i, f"{self.names[i]!r}: {error}"

    def next_readable(self, i):
        """-> square and aspect of image i or, where it cannot be read, of the next that can."""
        for offset in range(20):
            square, aspect, _, reason = self[(i + offset) % len(self)]
            if not reason:
                return square, aspect
            print(f"cannot be read, the next image is used instead: {reason}", flush=True)
        raise Failure(f"{self.origin}: 20 images in a row cannot be read; {reason}")

    def load(self, index_lists, device, replace=False):
        """Tensors of B indices -> yields images (B, 3, side, side) uint8 and aspects (B,), on the
        device. An image that cannot be read has aspect 0, or with `replace` becomes the next one.
        """
        if self.pixels is not None:
            for indices in index_lists:
                indices = indices.to(self.pixels.device)
                yield self.pixels[indices].to(device), self.aspect[indices].to(device)
            return
        workers = self.workers
        if hasattr(index_lists, "__len__"):  # few batches end before many workers have started
            workers = min(workers, len(index_lists) // 2)
        loader = DataLoader(self, batch_sampler=(indices.tolist() for indices in index_lists),
                            num_workers=workers, pin_memory=device.type == "cuda",
                            generator=torch.Generator())  # else it draws from the global one
        for pixels, aspect, indices, reasons in loader:
            for row, reason in enumerate(reasons):
                if reason and replace:
                    pixels[row], aspect[row] = self.next_readable(indices[row].item())
            yield pixels.to(device, non_blocking=True), aspect.to(device, non_blocking=True)


def hash_order(names):
    """Indices of the names in an order that looks random and is the same on every machine."""
    hashes = [zlib.crc32(os.fsencode(str(name))) for name in names]
    return sorted(range(len(names)), key=lambda i: hashes[i])


def is_hidden(name):
    """Names that begin with a dot, a NAS's thumbnails (@eaDir), and what a Mac adds to zips."""
    return name.startswith((".", "@", "__MACOSX"))


def subfolders(folder):
    """-> {name in lower case: path} of the folders in it, but not our own runs/."""
    found = {}
    for path in sorted(Path(folder).iterdir()):
        if path.is_dir() and not is_hidden(path.name) and path.resolve() != Path("runs").resolve():
            found[path.name.lower()] = path
    return found


def is_image(name):
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not is_hidden(name)


def has_images(folder):
    """Whether images lie directly in the folder."""
    return any(is_image(path.name) for path in Path(folder).iterdir())


def walk(root, onerror=None):
    """Yields each folder below root and the names of its files, in order, without hidden ones and
    our own runs/."""
    seen = {os.path.realpath("runs")}
    for folder, folders, files in os.walk(root, followlinks=True, onerror=onerror):
        real = os.path.realpath(folder)
        if real in seen:  # links may form a loop
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield folder, sorted(name for name in files if not is_hidden(name))


def folder_set(root, classes=None):
    """The images below a folder, each real folder once. Its subfolders are the classes, if there
    are at least two; a test set gets `classes` from the training set."""
    names = []
    others = Counter()  # kinds of files that are not read
    errors = []
    for folder, files in walk(root, errors.append):
        below = os.path.relpath(folder, root)
        for name in files:
            if is_image(name):
                names.append(os.path.normpath(os.path.join(below, name)))
            else:
                others[os.path.splitext(name)[1].lower() or "without extension"] += 1
    first_folders = [name.split(os.sep)[0] if os.sep in name else None for name in names]
    if classes is None:
        classes = sorted(set(first_folders) - {None})
        if len(classes) == 1:
            classes = []
    label_of = {name: label for label, name in enumerate(classes)}
    labels = [label_of.get(name, -1) for name in first_folders]
    left_out = [f"{count} {kind}" for kind, count in others.most_common()]
    left_out += [str(error) for error in errors]
    return ImageSet(str(root), names, labels, classes, left_out)


def torchvision_set(name, train):
    """A set of torchvision.datasets, which downloads it to ./data."""
    spelling = {known.lower(): known for known in torchvision.datasets.__all__}
    if name.lower() not in spelling:
        raise Failure(f"--data {name}: no such folder, and no torchvision set of that name")
    make = getattr(torchvision.datasets, spelling[name.lower()])
    split = "train" if train else "test"
    if name.lower() == "stl10" and train:
        split = "train+unlabeled"
    if "train" in signature(make).parameters:
        part = {"train": train}
    else:
        part = {"split": split}
    try:
        items = make("data", download=True, **part)
    except Exception as error:  # no network, other arguments
        raise Failure(f"--data {name}: torchvision cannot load it: {error}")
    labels = None
    for attribute in "targets", "labels", "_labels":  # a set has one of them, or none
        if hasattr(items, attribute):
            labels = getattr(items, attribute)
    if labels is None:
        labels = [label for _, label in items]  # decodes them all, but few sets have no list
    classes = getattr(items, "classes", None)
    if classes is None:
        classes = sorted({*labels})
    classes = [str(label) for label in classes]
    return ImageSet(os.path.join(name, split), range(len(items)), labels, classes, items=items)


def find_sets(data):
    """The value of --data -> (training, test) ImageSets, not decoded; test is None where there is
    nothing to evaluate on."""
    if data is None:
        return synthetic_set("train", 5000, seed=0), synthetic_set("test", 1000, seed=1)
    if not os.path.isdir(data):
        return torchvision_set(data, train=True), torchvision_set(data, train=False)
    root = Path(data)
    folders = subfolders(root)
    while len(folders) == 1 and not has_images(root):  # as zips unpack
        root = next(iter(folders.values()))
        folders = subfolders(root)

    # A class may be called train or valid: they are splits only beside each other.
    train_names = [name for name in TRAIN_FOLDERS if name in folders]
    test_names = [name for name in TEST_FOLDERS if name in folders]
    test = None
    if train_names and test_names:
        train_folder = folders.pop(train_names[0])
        train = folder_set(train_folder)
        if train.classes:
            test_folder = folders.pop(test_names[0])
            test = folder_set(test_folder, train.classes)
        unused = folders.values()  # what was not taken out above
        train.left_out += [f"folder {path.name}/" for path in unused]
        if has_images(root):
            train.left_out.append(f"images directly in {root}")
    else:
        train = folder_set(root)
        if train.classes:  # a tenth is held out
            order = hash_order(train.names)
            count = math.ceil(len(train) / 10)
            test = train.subset(sorted(order[:count]))
            test.left_out = []
            train = train.subset(sorted(order[count:]))
    if len(train) == 0:
        raise Failure(f"--data {data}: no training images (looked for {' '.join(EXTENSIONS)})")
    return train, test


def read_headers(images):
    """-> the median of the shorter sides of up to 100 of the images, in pixels; and, in words, what
    such files hold that is not read."""
    if images.pixels is not None:
        return images.pixels.shape[-1], []
    sides = []
    unread = set()
    for i in range(0, len(images), math.ceil(len(images) / 100)):
        with suppress(Exception), images.open(i) as image:
            sides.append(min(image.size))
            if getattr(image, "n_frames", 1) > 1:
                unread.add("pages beyond the first")
            samples = image.tag_v2.get(SAMPLESPERPIXEL, 1) if image.format == "TIFF" else 1
            if samples > 3 and image.mode != "CMYK":
                unread.add("the fourth band")
    median = sorted(sides)[len(sides) // 2] if sides else 1
    return median, sorted(unread)


def progress(items, what, total):
    """Yields the items; every 5 seconds it says how many are done and the time left."""
    begin = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last > 5:
            last = now
            left = timedelta(seconds=round((now - begin) / done * (total - done)))
            say(f"{what}: {done / total:.0%}, {left} left")


def decode(images, device):
    """-> the images that can be read, in memory. Each process decodes its share for all."""
    pixels = torch.zeros(len(images), 3, images.side, images.side, dtype=torch.uint8)
    aspect = torch.zeros(len(images))
    mine = torch.arange(len(images))[rank() :: world_size()]
    parts = [rows for rows in mine.split(64) if len(rows) > 0]  # none if processes outnumber images
    loaded = images.load(parts, torch.device("cpu"))
    for rows, batch in zip(parts, progress(loaded, f"decoding {images.origin}", len(parts))):
        pixels[rows], aspect[rows] = batch
    if world_size() > 1:
        # An image is zero in all processes but the one that decoded it: their sum has them all.
        dist.all_reduce(aspect)
        for part in pixels.split(4096):  # a view, summed in place: no second copy of the set
            dist.all_reduce(part)
    unreadable = (aspect == 0).nonzero().flatten().tolist()
    if unreadable:
        _, _, _, reason = images[unreadable[0]]
        kept = aspect.nonzero().flatten().tolist()
        for row, old in enumerate(kept):  # moved up in place: no second copy of the set
            pixels[row] = pixels[old]
        pixels = pixels[: len(kept)]
        aspect = aspect[kept]
        images = images.subset(kept)
        images.left_out.append(f"{len(unreadable)} unreadable ({reason})")
    images.pixels = pixels.to(device)
    images.aspect = aspect.to(device)
    return images


def check_readable(images, device):
    """Look at 50 of the images: Failure if none can be read, or all are almost of one color."""
    if len(images) == 0:
        raise Failure(f"nothing that can be read: {describe(images)}")
    rows = torch.arange(0, len(images), math.ceil(len(images) / 50))
    pixels, aspect = next(images.load([rows], device))
    readable = pixels[aspect > 0]
    unreadable = rows[(aspect == 0).cpu()].tolist()
    if unreadable:
        _, _, _, reason = images[unreadable[0]]
        images.left_out.append(f"{len(unreadable)} of {len(rows)} tried unreadable ({reason})")
    if len(readable) == 0:
        raise Failure(f"nothing that can be read: {describe(images)}")
    # 12 bits in files of 16 come out as 0 to 16
    if (readable.amax((2, 3)) - readable.amin((2, 3)) < 20).all():
        raise Failure(f"the images of {images.origin} come out almost of one color, with values of "
                      f"{readable.min()} to {readable.max()} of 255: convert them to 8 bits")


def describe(images):
    """-> what was read, and what was left out, in one line."""
    parts = [f"{len(images):,} of {images.origin}"]
    if images.classes:
        names = ", ".join(images.classes[:3])
        if len(images.classes) > 3:
            names += ", ..."
        parts.append(f"{len(images.classes)} classes ({names})")
        unlabelled = (images.labels < 0).sum().item()
        if unlabelled > 0:
            parts.append(f"{unlabelled} of no class")
    else:
        parts.append("no class folders")
    if images.left_out:
        parts.append(f"left out: {', '.join(images.left_out)}")
    return "; ".join(parts)


def load_data(args, device):
    """-> (training, test) ImageSets, decoded if they fit into --memory; test is None where there is
    none. Images keep the detail of a canvas 8/7 of the view (256 pixels for 224), at least 64
    pixels, and no larger than the median image."""
    # A set of torchvision may have to be downloaded: by rank 0, then by one process of each other
    # machine, if its disk has no copy; the others find it there.
    if rank() == 0:
        turn = 0
    elif os.environ.get("LOCAL_RANK") == "0":
        turn = 1
    else:
        turn = 2
    for now in range(3):
        if now == turn:
            sets = find_sets(args.data)
        wait_for_all()
    sets = [images for images in sets if images is not None]
    if args.max_images:
        sets = [images.subset(sorted(hash_order(images.names)[: args.max_images]))
                for images in sets]
    median, unread = read_headers(sets[0])
    sets[0].left_out += unread
    eval_size = getattr(args, "eval_size", None) or args.image_size
    largest_view = max(args.image_size, eval_size)
    canvas = max(largest_view * 8 // 7, 64)
    side = min(canvas, median)
    if median != args.image_size:
        say(f"images of {median} pixels, seen at {args.image_size}")
    for images in sets:
        images.side = side
        if len(images) > 1000:
            images.workers = args.workers  # they start too slowly for few images

    size = sum(len(images) for images in sets) * 3 * side**2  # in bytes
    budget = args.memory * 1e9 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of each process
    if device.type == "cuda":
        budget = min(budget, torch.cuda.mem_get_info(device)[0] / 4)
    if size <= gather(torch.tensor([budget])).min():  # the smallest of all processes
        sets = [decode(images, device) for images in sets]
    for kind, images in zip(("training", "test"), sets):
        check_readable(images, device)
        say(f"{kind} images: {describe(images)}")
    if len(sets) == 1:
        return sets[0], None
    return sets[0], sets[1]


# ------------------------------------------------------------------------------ synthetic images
# For the demonstration: procedural, offline. The class is the pattern of a relief; tint, contrast,
# scale and angle say nothing about it, brightness little. Light falls from above, as from a sky.

PATTERNS = {  # the relief's height at (u, v); u and v are in radians
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


def synthetic_set(name, count, seed):
    """-> ImageSet of 32 x 32 pixels, in memory; the same anywhere to a gray level."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, channels=1):
        """(count, channels, 1, 1): one number for each image."""
        return low + (high - low) * torch.rand(count, channels, 1, 1, generator=generator)

    axis = torch.arange(33) / 16 - 1
    x = axis - draw(-0.4, 0.4)
    y = axis[:, None] - draw(-0.4, 0.4)
    angle = draw(-0.35, 0.35)
    frequency = draw(12, 19)
    u = frequency * (x * angle.cos() + y * angle.sin())
    v = frequency * (y * angle.cos() - x * angle.sin())
    height = torch.empty_like(u)
    for i, pattern in enumerate(PATTERNS.values()):
        height[i::10] = pattern(u[i::10], v[i::10])
    down = height.diff(dim=2)[..., 1:]
    right = height.diff(dim=3)[..., 1:, :]
    light = 0.6 * (down + draw(-0.7, 0.7) * right) + draw(0.3, 0.8) * height[..., 1:, 1:]
    light = light / light.std((2, 3), keepdim=True)  # so that contrast does not give the class away
    gray = draw(0.3, 0.7) + draw(0.05, 0.14) * light - draw(-0.05, 0.2) * y[..., 1:, :]
    tint = draw(0.92, 1.08, channels=3)
    images = ImageSet(f"synthetic images/{name}", range(count), torch.arange(count) % 10,
                      list(PATTERNS))
    images.pixels = (255 * tint * gray).round().clamp(0, 255).byte()
    images.aspect = torch.ones(count)
    return images


# --------------------------------------------------------------------------------- augmentation
# Each takes a batch x (B, 3, H, W), floats in [0, 1], and draws other parameters for each image.
# At the same parameters it equals torchvision's function of the same name. Departures from a
# torchvision pipeline: crops are resampled from the square canvas, whose size caps their detail;
# values stay float between operations; the operations of the jitter have one order per batch.

IMAGENET_MEAN = 0.485, 0.456, 0.406
IMAGENET_STD = 0.229, 0.224, 0.225


def resized_crop(images, boxes, size, interpolation="bilinear"):
    """uint8 images (B, 3, S, S), boxes (B, 4): top, left, height, width in pixels of the canvas ->
    crops (B, 3, size, size) in [0, 1], resized with antialiasing.

    The idea: an output row is a weighted mean of the canvas rows near it, and likewise a column. So
    a crop is two matrix products, rows (size, S) · image (S, S) · columns (S, size), and a batch
    of different crops is a batched product. The weights are those of a triangle (bilinear) or of a
    cubic with a = -1/2 (bicubic), as wide as the output's pixels where a crop shrinks. A pixel that
    the box cuts counts for its part inside.
    """
    pixel = torch.arange(images.shape[3], device=images.device)
    boxes = boxes.view(-1, 2, 2, 1, 1)
    start, length = boxes.unbind(1)  # (top, left) and (height, width), each (B, 2, 1, 1)
    scale = length / size  # canvas pixels per output pixel
    center = start + (torch.arange(size, device=images.device)[:, None] + 0.5) * scale
    distance = (pixel + 0.5 - center).div_(scale.clamp(min=1)).abs_()  # (B, 2, size, canvas)
    if interpolation == "bilinear":
        weights = (1 - distance).clamp_(min=0)
    else:  # the cubics for distances below 1 and from 1 to 2, both 0 at 1
        near = distance.clamp(max=1)
        far = distance.clamp(1, 2)
        weights = (1.5 * near - 2.5) * near**2 + 1 - (far - 1) * (far - 2) ** 2 / 2
    inside = torch.minimum(pixel + 1, start + length) - torch.maximum(pixel, start)
    weights *= inside.clamp(min=0)
    weights /= weights.sum(-1, keepdim=True)
    rows, columns = weights.unbind(1)  # (B, size, canvas) each
    x = (images.float() / 255).flatten(1, 2) @ columns.mT  # all rows of all channels at once
    x = rows[:, None] @ x.unflatten(1, (3, -1))
    return x.clamp_(0, 1)  # bicubic overshoots


def random_resized_crop(images, aspect, size, scale, interpolation="bilinear"):
    """Like torchvision's. scale: smallest and largest fraction of the area. The ratio of 3/4 to 4/3
    holds in the original geometry, given by aspect (B,), width / height. The first of ten tries
    that fits is taken, else a central crop."""
    n = len(images)
    canvas = images.shape[3]
    device = images.device
    width = (canvas * aspect).round().clamp(min=1)
    original = torch.stack([torch.full_like(width, canvas), width], 1)  # (B, 2): height, width
    area = uniform(n, 10, device=device, low=scale[0], high=scale[1])
    area = original.prod(1, keepdim=True) * area
    ratio = (math.log(4 / 3) * uniform(n, 10, device=device, low=-1)).exp()
    tries = torch.stack([area / ratio, area * ratio], 2).sqrt().round()
    # the whole image, cut to the nearest allowed ratio
    fallback = torch.minimum(original, (original.flip(1) * 4 / 3).round())
    sides = torch.cat([tries, fallback[:, None]], 1)  # (B, 11, 2): height, width
    fits = ((sides > 0) & (sides <= original[:, None])).all(2)
    first = fits.int().argmax(1, keepdim=True)
    sides = sides.take_along_dim(first[:, None], 1).squeeze(1)
    room = original - sides
    random_corner = uniform(n, 2, device=device) * (room + 1)
    corner = torch.where(first < 10, random_corner, room / 2).floor()  # 10: the fallback
    boxes = torch.cat([corner, sides], 1) * (canvas / original).repeat(1, 2)  # of the squares
    return resized_crop(images, boxes, size, interpolation)


def center_view(images, aspect, size):
    """The evaluation's view, normalized: the original's central square, of 7/8 of the shorter side
    (256 -> 224), or all of it for views of at most 64 pixels."""
    canvas = images.shape[3]
    side = canvas * (7 / 8 if size > 64 else 1)
    height = side * aspect.clamp(1e-3, 1)  # an image that cannot be read has aspect 0
    width = side * (1 / aspect).clamp(max=1)
    sides = torch.stack([height, width], 1)
    boxes = torch.cat([(canvas - sides) / 2, sides], 1)
    return normalize(resized_crop(images, boxes, size))


def chosen(x, p):
    """(B, 1, 1, 1): 1 with probability p, else 0."""
    return (uniform(len(x), device=x.device) < p).to(x.dtype)[:, None, None, None]


def random_horizontal_flip(x, p=0.5):
    return torch.lerp(x, x.flip(3), chosen(x, p))  # exact at 0 and 1, faster than torch.where


def random_grayscale(x, p=0.2):
    return torch.lerp(x, rgb_to_grayscale(x), chosen(x, p))


def color_jitter(x, brightness, contrast, saturation, hue, p=0.8):
    """Factors lie in 1 ± strength, hue turns by ± strength; strengths above 1 (hue: 1/2) count as
    that, since a negative factor would invert the image. The order of the four operations is
    random, the same for the whole batch."""
    strengths = min(brightness, 1), min(contrast, 1), min(saturation, 1), min(hue, 0.5)
    # (B, 4) in [-1, 1]; 0 for images that are left as they are
    turns = uniform(len(x), 4, device=x.device, low=-1) * chosen(x, p).flatten(1)
    for i in torch.randperm(4).tolist():
        change = strengths[i] * turns[:, i, None, None, None]
        factor = 1 + change
        if i == 0:  # brightness
            x = (x * factor).clamp_(0, 1)
        elif i == 1:  # contrast
            mean = rgb_to_grayscale(x.mean((2, 3), keepdim=True))
            x = (x * factor).add_(mean * (1 - factor)).clamp_(0, 1)
        elif i == 2:  # saturation
            x = torch.lerp(rgb_to_grayscale(x), x, factor).clamp_(0, 1)
        else:  # hue
            x = adjust_hue(x, change)
    return x


def adjust_hue(x, shift):
    """Turn the HSV hue by shift (B, 1, 1, 1), in turns; saturation and value stay.

    The idea, without the six cases of HSV: a color is stretched to minimum 0 and maximum 1. Then
    its hue, in sixths of a turn from red, is 1 + g + b - r, with the sign of g - b. Back again,
    each channel is 2 - |distance of the hue to the channel's own|, cut to [0, 1], and unstretched.
    """
    r, g, b = x.split(1, 1)
    low = x.amin(1, keepdim=True)
    high = x.amax(1, keepdim=True)
    stretch = (high - low).clamp_(min=1e-12)
    hue = (g - low).add_(b - r).div_(stretch).add_(1).copysign_(g - b)
    red_green_blue = 2 * torch.arange(3, device=x.device)[:, None, None]  # their hues
    distance = hue.add_(6 * shift) - red_green_blue
    distance -= 6 * (distance / 6).round_()  # the shorter way round the circle
    channels = (2 - distance.abs_()).clamp_(0, 1)
    return torch.lerp(low, high, channels)


def gaussian_blur(x, p, kernel_size=None, sigma=(0.1, 2.0)):
    """Square views (B, 3, S, S). sigma: lowest and highest, in pixels. kernel_size: odd; without
    it, a tenth of the side. The border is reflected.

    A blur along an axis is a product with a matrix (S, S) that has the kernel around its diagonal.
    """
    n = len(x)
    size = x.shape[3]
    radius = size // 20 if kernel_size is None else kernel_size // 2
    drawn = uniform(n, device=x.device, low=sigma[0], high=sigma[1])[:, None]
    # an image that is not chosen gets 0.001 pixels, too small to blur
    sigmas = (drawn * chosen(x, p).flatten(1)).clamp(min=1e-3)
    if p == 0:  # after the draws, so that those that follow do not depend on p
        return x
    offset = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-0.5 * (offset / sigmas) ** 2, 1)  # (B, 2 radius + 1)
    source = (torch.arange(size, device=x.device)[:, None] + offset).abs()
    source = size - 1 - (size - 1 - source).abs()  # reflected at both ends
    matrix = x.new_zeros(n, size, size)
    matrix.scatter_add_(2, source.expand(n, -1, -1), kernel[:, None].expand(-1, size, -1))
    x = (x.flatten(1, 2) @ matrix.mT).view_as(x)  # along the rows, of all channels at once
    return matrix[:, None] @ x


def random_solarize(x, p, threshold=0.5):
    """Values from threshold on are inverted."""
    return torch.lerp(x, 1 - x, (x >= threshold) * chosen(x, p))


def normalize(x):
    """Subtracts ImageNet's mean and divides by its deviation -> channels_last memory format."""
    # by channel: a tensor of the means would be copied to the device, and waited for
    channels = zip(x.split(1, 1), IMAGENET_MEAN, IMAGENET_STD)
    x = torch.cat([(channel - mean).div_(std) for channel, mean, std in channels], 1)
    return x.contiguous(memory_format=torch.channels_last)


def denormalize(views):
    """Undo normalize: (B, 3, H, W) -> the same in [0, 1]."""
    mean = views.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = views.new_tensor(IMAGENET_STD).view(3, 1, 1)
    return (views * std + mean).clamp(0, 1)


# ------------------------------------------------------------------------------------- backbones

BLOCKS = {  # kind, and number in each stage
    "resnet8": (BasicBlock, (1, 1, 1)),
    "resnet20": (BasicBlock, (3, 3, 3)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
STEMS = {"imagenet": (7, 2), "cifar": (3, 1), "tiny": (3, 2)}  # kernel and stride of conv1


class ResNet(torchvision.models.ResNet):
    """ResNet (He et al., 2016) without `fc`, of any width and up to four stages: (B, 3, H, W) ->
    (B, feature_dim). With the imagenet stem it is torchvision's; the others, for small images, do
    not pool.

    width: channels of the first stage.
    """

    def __init__(self, block, depths, width=64, stem="imagenet", zero_init_residual=False):
        nn.Module.__init__(self)  # torchvision's knows one width; its _make_layer reads these:
        self._norm_layer = nn.BatchNorm2d
        self.groups = 1
        self.base_width = 64
        self.dilation = 1
        self.inplanes = width

        kernel, stride = STEMS[stem]
        self.conv1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        self.stages = ["layer1", "layer2", "layer3", "layer4"][: len(depths)]
        for i, stage in enumerate(self.stages):
            layer = self._make_layer(block, width * 2**i, depths[i], stride=1 if i == 0 else 2)
            self.add_module(stage, layer)
        self.feature_dim = self.inplanes

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if zero_init_residual and isinstance(module, block):  # each block starts as identity
                last_norm = module.bn3 if block is Bottleneck else module.bn2
                nn.init.zeros_(last_norm.weight)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return x.mean((2, 3))


def make_backbone(arch, image_size, zero_init_residual=False):
    """-> a network (B, 3, H, W) -> (B, feature_dim). For views of at most 64 pixels, a ResNet has a
    3x3 stem without pooling. Other networks are torchvision's, without their last layer."""
    resnet, _, factor = arch.partition("x")
    if resnet in BLOCKS:
        block, depths = BLOCKS[resnet]
        width = round(64 * float(factor or 1))
        if len(depths) == 3:  # for a CPU: half the width, half the pixels; no BN starts at 0
            return ResNet(block, depths, width // 2, "tiny")
        stem = "cifar" if image_size <= 64 else "imagenet"
        return ResNet(block, depths, width, stem, zero_init_residual)
    if arch not in torchvision.models.list_models(torchvision.models):
        raise Failure(f"--arch {arch}: neither a ResNet nor another network of torchvision")
    network = torchvision.models.get_model(arch)
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise Failure(f"--arch {arch}: it has no linear layer at its end")
    network.feature_dim = network.get_submodule(names[-1]).in_features
    network.set_submodule(names[-1], nn.Identity())
    return network


# ------------------------------------------------------------------------------ the training run

SAVE_SECONDS = 120  # between checkpoints


def open_run(args):
    """Make the run's folder args.out, on rank 0; without --out, the next free one in runs/. An
    empty log marks it at once, so that of two runs with the same --out the second is refused."""
    if rank() == 0:
        args.out = args.out or free_folder(args.method)
        os.makedirs(args.out, exist_ok=True)
        try:
            open(f"{args.out}/log.jsonl", "a" if args.resume else "x").close()
        except FileExistsError:
            raise Failure(f"--out {args.out} holds a run: add --resume, or choose another folder")
    if world_size() > 1:
        names = [args.out]
        dist.broadcast_object_list(names, device=torch.device("cpu"))
        (args.out,) = names
    if args.resume and not os.path.exists(f"{args.out}/checkpoint.pth"):
        say(f"--resume: {args.out} holds no checkpoint; the run starts anew")
    say(f"recipe {args.recipe}: {args.arch}, views of {args.image_size} pixels; in {args.out}")


def free_folder(method):
    """Make the next free folder in runs/ -> its name. Two runs may start at the same time."""
    for number in itertools.count(1):
        out = f"runs/{method}" if number == 1 else f"runs/{method}-{number}"
        with suppress(FileExistsError):
            os.makedirs(out)
            return out


def batch_that_fits(batch_size, images):
    """-> --batch-size, or less if there are fewer images, in equal shares for the processes."""
    share = min(batch_size, len(images)) // world_size()
    if share < 2:
        raise Failure(f"--batch-size {batch_size}: BN needs two images in each of {world_size()} "
                      f"process(es), and there are {len(images)}")
    if share * world_size() != batch_size:
        say(f"--batch-size {share * world_size()}: what {len(images)} images and {world_size()} "
            "process(es) allow")
    return share * world_size()


def warmup_that_fits(warmup_steps, total_steps):
    """A warm-up longer than the run becomes a tenth of it."""
    return warmup_steps if warmup_steps <= total_steps else total_steps // 10


def read_file(path):
    """torch.load of tensors and plain values alone, and of argparse's Namespace, in which official
    files hold their arguments."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror}")
    except Exception as error:  # damaged files raise a dozen kinds
        raise Failure(f"cannot read {path}: it is damaged, or not made by torch.save, or holds "
                      f"more than weights: save a network's state_dict() ({type(error).__name__})")


def read_run(out, method):
    """-> the contents of the checkpoint.pth that this method's run has left in `out`."""
    saved = read_file(f"{out}/checkpoint.pth")
    if not isinstance(saved, dict) or saved.get("method") != method:
        raise Failure(f"{out}/checkpoint.pth holds no run of {method}.py")
    return saved


def save_file(path, value):
    """torch.save, so that at any moment `path` is the old file or the new one, and never a part."""
    torch.save(value, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def save_checkpoint(args, step, images, model, optimizer, backbone):
    """Write checkpoint.pth, the whole run after `step` steps, and backbone.pth, the weights to use.
    """
    if rank() > 0:
        return
    weights = model.state_dict()
    for name, value in weights.items():
        if not value.isfinite().all():
            raise Failure(f"{name} is not finite at step {step}: try a lower --lr; {args.out} "
                          "keeps what was saved before")
    not_saved = "out", "resume", "init", "device", "workers", "memory"
    saved_args = {name: value for name, value in vars(args).items() if name not in not_saved}
    save_file(f"{args.out}/checkpoint.pth", {
        "method": args.method, "recipe": args.recipe, "args": saved_args, "step": step,
        "images": images.fingerprint(), "model": weights, "optimizer": optimizer.state_dict()})
    save_file(f"{args.out}/backbone.pth",
              {name: value.cpu() for name, value in backbone.state_dict().items()})


def load_checkpoint(args, images, model, optimizer):
    """Restore the run in --out, if --resume asks for it -> the steps done."""
    saved = None
    step = 0
    if args.resume and os.path.exists(f"{args.out}/checkpoint.pth"):
        saved = read_run(args.out, args.method)
        step = saved["step"]
    steps = gather(torch.tensor([step]))  # of each process
    if steps.min() < steps.max():
        raise Failure(f"--resume: the processes see different checkpoints in {args.out}, which "
                      "must be on a disk that all machines share")
    if saved is None:
        if rank() == 0:
            cut_log(f"{args.out}/log.jsonl", 0)  # of a run that was stopped before its first save
        return 0
    if saved["images"] != images.fingerprint():
        raise Failure(f"{args.out} was trained on {saved['images']}, not {images.fingerprint()} (a "
                      "set that is too large for --memory counts unreadable images, too)")
    data = str(saved["args"]["data"])
    if images.items is not None and data.lower() != args.data.lower():  # their names are numbers
        raise Failure(f"{args.out} was trained on {data}, not {args.data}")
    # the saved step and optimizer mean something only with the same values of these
    for name in "recipe", "batch_size", "optimizer", "weight_decay":
        before = saved["args"].get(name)
        now = vars(args).get(name)
        if before != now:
            raise Failure(f"--{name.replace('_', '-')} {now}: the run in {args.out} has {before}, "
                          "which --resume cannot change")
    if step > args.epochs * (len(images) // args.batch_size):
        raise Failure(f"--epochs {args.epochs}: the run in {args.out} has done more already")
    try:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise Failure(f"{args.out}/checkpoint.pth does not fit this model: {reason}")
    if rank() == 0:
        cut_log(f"{args.out}/log.jsonl", step)
    say(f"continuing {args.out} after step {step}")
    return step


def cut_log(path, step):
    """Drop the lines beyond this step, the report, and a last line that was not written whole."""
    kept = []
    with open(path) as file:
        for line in file:
            with suppress(ValueError):
                entry = json.loads(line)
                if entry["step"] <= step and "report" not in entry:
                    kept.append(line.rstrip("\n") + "\n")
    with open(f"{path}.tmp", "w") as file:
        file.writelines(kept)
    os.replace(f"{path}.tmp", path)


def batches(images, args, first_step, device):
    """Yields step, images (B/W, 3, S, S) uint8 and aspect (B/W,), from the first step to the last.

    Epochs are permutations by seed and epoch, without an incomplete last batch. Before each step
    the generators are seeded by seed and step. So a resumed run continues as if it had never
    stopped: bit for bit on a CPU, up to rounding on a GPU.
    """
    steps_per_epoch = len(images) // args.batch_size
    share = args.batch_size // world_size()

    def index_lists():
        """Yields this process's indices (B/W,) for each step."""
        for epoch in range(first_step // steps_per_epoch, args.epochs):
            seed = 2**40 + args.seed * 1_000_003 + epoch  # far from the steps' seeds
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
            order = order[: steps_per_epoch * args.batch_size]
            if images.pixels is not None:
                order = order.to(device)  # once per epoch: a copy in each step would be waited for
            order = order.view(steps_per_epoch, world_size(), share)
            steps_done = max(0, first_step - epoch * steps_per_epoch)  # of this epoch
            yield from order[steps_done:, rank()]

    loaded = images.load(index_lists(), device, replace=True)
    for step, (pixels, aspect) in enumerate(loaded, first_step):
        seed = (args.seed + 1) * 1_000_003 + step  # other seeds overlap after 10⁶ steps
        torch.default_generator.manual_seed(seed)  # torch.manual_seed costs 100 times more
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield step, pixels, aspect


def log(args, done, total_steps, first_step, started, lr, loss, chance=None, **health):
    """A line on the screen and in log.jsonl. loss and health numbers are scalars, shown as their
    means over the processes. first_step, started: the step and the time from which images/s are
    counted. chance: the loss of guessing."""
    scalars = {"loss": loss, **health}
    values = torch.stack([torch.as_tensor(value, device=loss.device).detach().float()
                          for value in scalars.values()])
    means = (all_sum(values) / world_size()).tolist()
    scalars = {name: round(mean, 6) for name, mean in zip(scalars, means)}
    if not math.isfinite(scalars["loss"]):
        raise Failure(f"loss is {scalars['loss']} at step {done} (lr {lr:.3g}): try a lower --lr; "
                      f"{args.out} keeps what was saved before")
    seconds = time.monotonic() - started  # now, after the wait for the device
    steps_per_s = (done - first_step) / seconds
    images_per_s = steps_per_s * args.batch_size
    left = timedelta(seconds=round((total_steps - done) / steps_per_s))
    epoch = math.ceil(done * args.epochs / total_steps)
    write_log(args, {"step": done, "epoch": epoch, **scalars, "lr": lr,
                     "seconds": round(seconds, 2), "images_per_s": round(images_per_s)})
    shown = [f"epoch {epoch}/{args.epochs}", f"step {done}/{total_steps}"]
    for name, value in scalars.items():
        shown.append(f"{name.replace('_', ' ')} {value:.4f}")
        if name == "loss" and chance is not None:
            shown[-1] += f" (chance {chance:.4f})"
    shown += [f"lr {lr:.3g}", f"{images_per_s:,.0f} images/s", f"{left} left"]
    say("  ".join(shown))


def log_knn(args, done, total_steps, trained, untrained):
    """Accuracies in percent, from `linear_probe.quick_knn`; does nothing without labels."""
    if trained is not None:
        say(f"kNN so far {trained:.1f} (untrained {untrained:.1f})")
        write_log(args, {"step": done, "epoch": math.ceil(done * args.epochs / total_steps),
                         "knn": round(trained, 2), "untrained": round(untrained, 2)})


def write_log(args, line):
    if rank() == 0:
        with open(f"{args.out}/log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def example_rows(images):
    """Indices of an image of each of ten classes; without labels, of ten spread over the set."""
    labels = images.labels.tolist()
    classes = sorted({*labels} - {-1})
    if classes:
        return torch.tensor([labels.index(label) for label in classes[:10]])
    return torch.arange(0, len(images), math.ceil(len(images) / 10))


def examples(images, device):
    """-> these images, uint8, and their aspects."""
    return next(images.load([example_rows(images)], device, replace=True))


def save_picture(path, *columns):
    """Columns of B pictures (B, 3, ., .) in [0, 1], of any size, enlarged: B rows."""
    side = max(column.shape[-1] for column in columns)
    side *= math.ceil(128 / side)
    columns = [F.interpolate(column.float(), side, mode="nearest-exact") for column in columns]
    rows = torch.stack(columns, 1)
    save_image(rows.flatten(0, 1), path, nrow=len(columns), padding=4, pad_value=1, format="png")


def save_views(args, images, device, *augments):
    """views.png: some images as they are, and what each augmentation makes of them."""
    if rank() == 0:
        pixels, aspect = examples(images, device)
        views = [denormalize(augment(pixels, aspect)) for augment in augments]
        save_picture(f"{args.out}/views.png", pixels / 255, *views)
