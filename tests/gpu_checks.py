"""Checks for a machine with a GPU, where the tests, which run on a CPU, cannot look.

    python tests/gpu_checks.py NAME [--device cpu] [--commands "moco --version 1" dino ...]

Each prints what it finds, to be judged by the reader. With --device cpu the sizes are small: that
shows only that the check itself works. --commands: methods, with flags, in place of the check's own
list. NAME is one of

    parity          the same steps in float32 on the CPU and on the device: losses and weights
    waits           where the host waits for the GPU in a step, as CUDA reports it
    speed           time, images/s and memory of a step of the imagenet recipe, on random pixels
    demonstrations  all demonstrations at once: their scores
    two             two processes that share the GPU, through gloo, beside one: losses
    streaming       images/s where each batch is decoded anew (--memory 0)
    resume          a run that was stopped and resumed beside one that was not: weights
    kernels         time of each operation of the augmentation at 224 pixels
    compilation     with --compile and without: losses, time, graph breaks
    probe           time and memory of kNN and of the linear probe, on random features
"""

import argparse
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
import linear_probe

METHODS = "simclr moco byol simsiam swav barlow dino mae rotation jigsaw".split()
TINY = ("--recipe demo -a resnet8x0.5 -b 8 --epochs 1 --warmup-epochs 0 --image-size 32 "
        "--max-images 48 --workers 0 --print-freq 1")  # six steps
VARIANTS = [  # each method, and what is different in its other versions
    "simclr", "simclr --loss hard", "simclr --optimizer lars --image-size 80 --blur 0.5",
    "moco", "moco --version 1", "moco --version 3 --optimizer lars --hidden-dim 32",
    "moco -a vit_micro --version 3 --optimizer adamw --lr 0.001 --hidden-dim 32",
    "byol", "simsiam", "swav", "swav --queue-size 16 --small-crops 2", "barlow",
    "barlow --loss vicreg", "dino",
    "dino -a vit_micro --local-views 2 --no-head-bn --drop-path 0.1", "mae -a vit_micro",
    "mae -a vit_micro --objective simmim", "rotation", "rotation --crop shift",
    "jigsaw", "jigsaw --task relative --crop-scale 1"]

# ------------------------------------------------------------------------------------ what they use


@contextmanager
def reported(command):
    """An error is printed, and the check goes on with the next command."""
    try:
        yield
    except Exception:
        print(f"{command}: FAILED\n{traceback.format_exc()}", flush=True)


def run(command, device, *flags):
    """Train without kNN and report. command: a method and its flags, which come last, so that they
    win over the others."""
    method, *own_flags = command.split()
    module = importlib.import_module(method)
    with mock.patch.object(linear_probe, "evaluate", return_value={}), \
            mock.patch.object(linear_probe, "quick_knn", return_value=None), redirect_stdout(None):
        module.train(module.parse_args([*flags, *own_flags, "--device", device]))


def train(command, device, *flags, out=None):
    """-> the log's lines with a loss, and the backbone's weights."""
    out = out or f"{tempfile.mkdtemp()}/run"
    run(command, device, *flags, "--out", out)
    weights = torch.load(f"{out}/backbone.pth", map_location="cpu", weights_only=True)
    return read_log(out), weights


def read_log(out):
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def losses(lines):
    return " ".join(f"{line['loss']:.6f}" for line in lines)


def largest_difference(weights, others):
    """Of a tensor's values, over its largest value or 1."""
    largest = 0.0
    for name, tensor in weights.items():
        a = tensor.double()
        b = others[name].double()
        difference = (a - b).abs().max() / b.abs().max().clamp(min=1)
        largest = max(largest, difference.item())
    return largest


@contextmanager
def float32():
    """Neither bfloat16 nor TF32 (which stays off)."""
    torch.backends.cudnn.allow_tf32 = False
    with mock.patch.object(common, "autocast", lambda device: nullcontext()):
        yield


@contextmanager
def random_numbers_of_the_cpu():
    """On the device, too: CUDA's generator draws others."""
    uniform = common.uniform
    randperm = torch.randperm

    def cpu_uniform(n, *shape, device, low=0.0, high=1.0):
        return uniform(n, *shape, device=torch.device("cpu"), low=low, high=high).to(device)

    def cpu_randperm(n, generator=None, device="cpu"):
        return randperm(n, generator=generator).to(device)

    with mock.patch.object(common, "uniform", cpu_uniform), \
            mock.patch.object(torch, "randperm", cpu_randperm):
        yield


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def timed(function, device, times=1):
    """-> seconds per call, and what the last one returns."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(times):
        result = function()
    synchronize(device)
    return (time.perf_counter() - begin) / times, result


def start_counting_memory(device):
    if device == "cuda":
        gc.collect()  # the model before may hang on a cycle, such as a mock's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device):
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else float("nan")


# ------------------------------------------------------------------------------------------ checks


def parity(args):
    """The losses should agree to about 1e-5 in the first steps; then rounding grows."""
    for command in args.commands or VARIANTS:
        with reported(command), float32(), random_numbers_of_the_cpu():
            on_cpu, cpu_weights = train(command, "cpu", *TINY.split())
            on_device, device_weights = train(command, args.device, *TINY.split())
            print(f"{command}\n    {losses(on_cpu)}\n    {losses(on_device)}\n    weights differ "
                  f"by {largest_difference(device_weights, cpu_weights):.1e}", flush=True)


@contextmanager
def noted_waits(device):
    """-> a list, which in the end has the places where the host has waited for the GPU."""
    places = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if str(warning.message).startswith("Synchronization debug mode"):  # of the mode itself
            continue
        places.append(f"{Path(warning.filename).name}:{warning.lineno} {str(warning.message)[:60]}")


def waits(args):
    """Steps 1, 3 and 6 print, and should wait once each, and the first of an epoch once more, for
    the order of the images; the others should not wait, nor should the evaluation's view, which
    should be the CPU's up to rounding."""
    images = torch.randint(256, (64, 3, 40, 40), dtype=torch.uint8, device=args.device)
    aspect = torch.rand(64, device=args.device) + 0.5
    with noted_waits(args.device) as places:
        views = common.center_view(images, aspect, 32)
    expected = common.center_view(images.cpu(), aspect.cpu(), 32)
    difference = (views.cpu() - expected).abs().max().item()
    print(f"the evaluation's view: {'; '.join(places) or 'no wait'}; {difference:.1e} from the CPU's")

    batches = common.batches
    found = {}  # step: places

    def watched(images, train_args, first_step, device):
        loaded = batches(images, train_args, first_step, device)
        total_steps = train_args.epochs * (len(images) // train_args.batch_size)
        for step in range(first_step, total_steps):
            with noted_waits(args.device) as places:  # loading the batch counts, too
                yield next(loaded)
            found[step + 1] = places

    for command in args.commands or VARIANTS:
        with reported(command), mock.patch.object(common, "batches", watched):
            found.clear()
            train(command, args.device, *TINY.split(), "--print-freq", "3")
            print(command)
            for step, places in found.items():
                print(f"    step {step}: {'; '.join(places) or 'no wait'}", flush=True)
    if args.device == "cuda":
        torch.cuda.set_sync_debug_mode("default")


def speed(args):
    """Of 14 steps the first four warm up. The others are timed in turn as a whole, with what the
    host needs to launch them, and with a wait between augmentation and network. The GB include the
    pixels of 14 batches."""
    recipe = "imagenet" if args.device == "cuda" else "cpu"
    batches = common.batches
    steps = []  # seconds of the step, and of the host
    augmentations = []  # seconds
    wait_for_augmentation = False
    begin = 0.0
    batch_size = 0

    def load_data(train_args, device):
        """As many random images as 14 batches take."""
        nonlocal batch_size
        batch_size = train_args.batch_size
        size = train_args.image_size
        side = 32 if size == 32 else max(size * 8 // 7, 64)
        count = 14 * batch_size
        images = common.ImageSet("random", range(count), [-1] * count, [])
        images.pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, device=device)
        images.aspect = torch.ones(count, device=device)
        return images, None

    def timed_batches(*inputs):
        nonlocal wait_for_augmentation, begin
        for step, *batch in batches(*inputs):
            wait_for_augmentation = step % 2 == 1
            synchronize(args.device)
            begin = time.perf_counter()
            yield step, *batch
            host = time.perf_counter() - begin
            synchronize(args.device)
            if step >= 4 and not wait_for_augmentation:
                steps.append((time.perf_counter() - begin, host))

    def parallel(model, compile=False, sync_bn=True):
        if compile:
            model.compile()

        def network(*inputs):
            if wait_for_augmentation:
                synchronize(args.device)
                augmentations.append(time.perf_counter() - begin)
            return model(*inputs)

        return network

    for command in args.commands or METHODS:
        steps.clear()
        augmentations.clear()
        start_counting_memory(args.device)
        with reported(command), mock.patch.multiple(
                common, load_data=load_data, batches=timed_batches, parallel=parallel,
                save_checkpoint=mock.Mock()):
            run(command, args.device, "--recipe", recipe, "--epochs", "1", "--print-freq", "100",
                "--out", f"{tempfile.mkdtemp()}/run")
            seconds = median(step for step, _ in steps)
            host = median(host for _, host in steps)
            augmentation = median(augmentations[-5:])
            print(f"{command}: batch {batch_size}, {1e3 * seconds:.1f} ms a step, of these "
                  f"augmentation {1e3 * augmentation:.1f}; host {1e3 * host:.1f} ms; "
                  f"{batch_size / seconds:.0f} images/s; {peak_gb(args.device):.1f} GB", flush=True)


def demonstrations(args):
    """In bfloat16 the scores should be near those of the README, which rounding alone moves, for
    some methods by a dozen points."""
    folder = tempfile.mkdtemp()
    flags = ["--device", args.device]
    if args.device == "cpu":
        flags += ["--epochs", "1", "--max-images", "256"]
    jobs = {}
    for command in args.commands or METHODS:
        method, *own_flags = command.split()
        jobs[command] = subprocess.Popen(
            [sys.executable, ROOT / f"{method}.py", *flags, "--out", f"{folder}/{len(jobs)}",
             *own_flags], env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for command, job in jobs.items():
        text, _ = job.communicate()
        lines = text.splitlines()
        print(f"{command}: exit status {job.returncode}")
        for line in lines[-14:]:
            print(f"    {line}", flush=True)


def two(args):
    """SyncBN, DistributedDataParallel and gather on CUDA; NCCL refuses two processes on one GPU, so
    they talk through gloo. The losses should be those of one process. (On a CPU BN is not
    synchronized, and most differ.)"""
    commands = args.commands or ["simclr", "moco", "moco --version 3 --hidden-dim 32", "byol",
                                 "swav --queue-size 16", "barlow", "dino",
                                 "dino -a vit_micro --local-views 2", "jigsaw"]
    for command in commands:
        print(command)
        for processes in 1, 2:
            out = f"{tempfile.mkdtemp()}/run"
            job = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 f"--nproc-per-node={processes}", __file__, "process", "--device", args.device,
                 "--commands", f"{command} --out {out}"],
                env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT)
            if job.returncode == 0:
                found = losses(read_log(out))
            else:
                found = job.stdout[-3000:]
            print(f"    {processes} processes: {found}", flush=True)


def process(args):
    """One of the processes of `two`; all take the first GPU."""
    os.environ["LOCAL_RANK"] = "0"
    init = dist.init_process_group

    def init_gloo(backend, timeout):
        init("gloo", timeout=timeout)

    (command,) = args.commands
    with float32(), mock.patch.object(dist, "init_process_group", init_gloo):
        run(command, args.device, *TINY.split())
    common.wait_for_all()
    dist.destroy_process_group()


def streaming(args):
    """20 photographs of 500 x 375 pixels, as JPEG, under many names. The rate without training is
    about that of the smallest network."""
    folder = Path(tempfile.mkdtemp())
    copies = 2200 if args.device == "cuda" else 128
    for name in "cat", "dog":
        (folder / "set" / "train" / name).mkdir(parents=True)
        (folder / "set" / "val" / name).mkdir(parents=True)
    for i in range(20):
        coarse = np.random.randint(0, 256, (24, 32, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        grain = np.random.randint(-14, 15, (375, 500, 3))
        photo = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(photo).save(folder / f"{i}.jpg", quality=90)
    for i in range(copies):
        name = "cat" if i % 2 == 0 else "dog"
        os.link(folder / f"{i % 20}.jpg", folder / "set" / "train" / name / f"{i}.jpg")
    os.link(folder / "0.jpg", folder / "set" / "val" / "cat" / "0.jpg")
    os.link(folder / "1.jpg", folder / "set" / "val" / "dog" / "1.jpg")

    flags = ["--data", str(folder / "set"), "--memory", "0", "--warmup-epochs", "0",
             "--print-freq", "1"]
    if args.device == "cuda":
        flags += ["--recipe", "imagenet", "--epochs", "6"]
        commands = ["rotation -a resnet8", "simclr"]
        batch_size = 128
    else:
        flags += ["--recipe", "cpu", "--epochs", "2"]
        commands = ["rotation"]
        batch_size = 8
    for command in args.commands or commands:
        with reported(command):
            lines, _ = train(command, args.device, *flags, "--batch-size", str(batch_size))
            first = lines[len(lines) // 3]
            last = lines[-1]
            steps = last["step"] - first["step"]
            seconds = last["seconds"] - first["seconds"]
            print(f"{command}: {steps * batch_size / seconds:.0f} images/s, "
                  f"{os.path.getsize(folder / '0.jpg') / 1e3:.0f} kB each", flush=True)


def resume(args):
    """On a GPU some sums have no fixed order, so that two equal runs differ, too: the resumed run
    should differ by about as much."""
    batches = common.batches
    commands = ["simclr -a resnet50 --image-size 72 -b 16 --max-images 64",
                "dino -a vit_micro --local-views 2 --no-head-bn", "mae", "moco", "jigsaw"]
    flags = ["--recipe", "demo", "--epochs", "2", "--max-images", "128"]

    def stops_after_one_epoch(images, train_args, first_step, device):
        for item in batches(images, train_args, first_step, device):
            if item[0] == len(images) // train_args.batch_size:
                raise EOFError
            yield item

    for command in args.commands or commands:
        with reported(command), mock.patch.object(common, "SAVE_SECONDS", 0):
            lines, weights = train(command, args.device, *flags)
            again, weights_again = train(command, args.device, *flags)
            out = f"{tempfile.mkdtemp()}/run"
            try:
                with mock.patch.object(common, "batches", stops_after_one_epoch):
                    train(command, args.device, *flags, out=out)
            except EOFError:
                pass
            resumed, weights_resumed = train(command, args.device, *flags, "--resume", out=out)
            print(f"{command}\n    last losses: {losses([lines[-1], again[-1], resumed[-1]])}")
            print("    weights differ, of a second run, by "
                  f"{largest_difference(weights_again, weights):.1e}; of the resumed run, by "
                  f"{largest_difference(weights_resumed, weights):.1e}", flush=True)


def kernels(args):
    """In milliseconds for a batch of 512; then the slowest kernels."""
    import simclr

    device = torch.device(args.device)
    count = 512 if args.device == "cuda" else 4
    images = torch.randint(256, (count, 3, 256, 256), dtype=torch.uint8, device=device)
    aspect = torch.ones(count, device=device)
    x = torch.rand(count, 3, 224, 224, device=device)

    def whole():
        return simclr.augment(images, aspect, 224, crop_scale=0.08, jitter_strength=1.0, blur=0.5)

    operations = {
        "whole": whole,
        "crop": lambda: common.random_resized_crop(images, aspect, 224, (0.08, 1.0), "bicubic"),
        "flip": lambda: common.random_horizontal_flip(x),
        "jitter": lambda: common.color_jitter(x, 0.8, 0.8, 0.8, 0.2),
        "grayscale": lambda: common.random_grayscale(x),
        "blur": lambda: common.gaussian_blur(x, 0.5),
        "solarize": lambda: common.random_solarize(x, 0.2),
        "normalize": lambda: common.normalize(x)}
    for name, operation in operations.items():
        timed(operation, args.device, times=2)
        seconds, _ = timed(operation, args.device, times=5)
        print(f"{name}: {1e3 * seconds:.1f} ms", flush=True)
    with torch.profiler.profile() as profile:
        timed(whole, args.device)
    order = "self_device_time_total" if args.device == "cuda" else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=60))


def compilation(args):
    """The losses should agree to the rounding of bfloat16, without graph breaks. (The time of a
    step: `speed --commands simclr "simclr --compile"`.)"""
    for command in args.commands or VARIANTS:
        with reported(command), random_numbers_of_the_cpu():
            print(command)
            for flags in [], ["--compile"]:
                torch._dynamo.reset()
                torch._dynamo.utils.counters.clear()
                begin = time.perf_counter()
                lines, _ = train(command, args.device, *TINY.split(), *flags)
                breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
                print(f"    {' '.join(flags) or 'without':9}  {losses(lines)}  "
                      f"{time.perf_counter() - begin:.0f} s in all, {breaks} graph breaks",
                      flush=True)


def probe(args):
    """A twelfth of ImageNet, features of a ResNet-50."""
    count, dim, classes = (100_000, 2048, 1000) if args.device == "cuda" else (2000, 64, 10)
    y = torch.randint(classes, (count,), device=args.device)
    centers = torch.randn(classes, dim, device=args.device)
    x = 0.5 * centers[y] + torch.randn(count, dim, device=args.device)
    test_x = x[: count // 10].clone()
    test_y = y[: count // 10]
    for name, function in {
            "kNN": lambda: linear_probe.knn(x, y, test_x, test_y),
            "eigenvectors": lambda: torch.linalg.eigh(x.T @ x / count)[0][-1].item(),
            "linear probe": lambda: linear_probe.linear_probe(x, y, test_x, test_y)}.items():
        start_counting_memory(args.device)
        seconds, result = timed(function, args.device)
        print(f"{name}: {seconds:.1f} s, {peak_gb(args.device):.1f} GB; {result}", flush=True)


CHECKS = {check.__name__: check for check in (
    parity, waits, speed, demonstrations, two, process, streaming, resume, kernels, compilation,
    probe)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=CHECKS, metavar="NAME")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commands", nargs="+", help="methods, with flags")
    args = parser.parse_args()
    CHECKS[args.check](args)


if __name__ == "__main__":
    main()
