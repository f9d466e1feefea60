"""Kills at every point of a save, Ctrl-C, a full disk, a lost process: the checkpoint stays whole,
the run goes on from it to the same bits, and stderr has one line or none."""

import contextlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
from pathlib import Path

import pytest
import torch
from conftest import METHODS
from processes import _context

import common
import linear_probe

# 24 images: a save ahead of the first step, after step 3 and after step 6
TINY = ("--data images --recipe demo -b 8 --epochs 2 --image-size 32 --workers 0 -p 2 "
        "--device cpu --out").split()
SMALL = {method: ["-a", "resnet8x0.25"] for method in METHODS} | {"mae": []}
TIMINGS = "images_per_s", "seconds"


def run(method, *flags, out="run"):
    """python method.py, without the report -> exit status"""
    linear_probe.evaluate = lambda *a, **k: {}
    module = importlib.import_module(method)
    try:
        common.main(module.train, module.parse_args, [*TINY, out, *SMALL[method], *flags])
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(scope="module", autouse=True)
def evaluate_again():
    evaluate = linear_probe.evaluate
    yield
    linear_probe.evaluate = evaluate


def state(folder):
    """All that two equal runs have in common."""
    saved = torch.load(f"{folder}/checkpoint.pth", weights_only=True)
    lines = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
    log = [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]
    del saved["args"]
    backbone = torch.load(f"{folder}/backbone.pth", weights_only=True)
    return {**saved, "backbone": backbone, "log": log, "files": sorted(os.listdir(folder))}


def same(a, b):
    """Equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


KEPT = {}  # method -> state of a run that nothing disturbed


@pytest.fixture
def undisturbed(class_folders):
    def undisturbed(method):
        if method not in KEPT:
            assert run(method, out="undisturbed") == 0
            KEPT[method] = state("undisturbed")
        return KEPT[method]

    return undisturbed


def disturbed(method, flags, prepare, *arguments):
    """The same in a process of a group of its own, after prepare(*arguments) -> exit status,
    stdout, stderr."""
    child = _context.Process(target=_child, args=(os.getcwd(), method, flags, prepare, arguments))
    child.start()
    child.join(120)
    assert child.exitcode is not None, "it hangs"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # what it has left
    return child.exitcode, Path("stdout").read_text(), Path("stderr").read_text()


def _child(folder, method, flags, prepare, arguments):
    multiprocessing.set_start_method("fork", force=True)  # what `python` has
    os.chdir(folder)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, name in (1, "stdout"), (2, "stderr"):
        os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), descriptor)
    torch.set_num_threads(1)
    prepare(*arguments)
    raise SystemExit(run(method, *flags))


def before_step(number, act):
    """Call act() before this step, counted from 1; two loader processes decode all the time."""
    batches, decode = common.batches, common.decode

    def no_memory(*arguments):
        images = decode(*arguments)
        images.workers = 2
        return images

    def disturbing(*arguments):
        for step, images, aspect in batches(*arguments):
            if step + 1 == number:
                act()
            yield step, images, aspect

    common.free_memory = lambda device: 0
    common.decode, common.batches = no_memory, disturbing


def assert_continues(method, expected):
    """The checkpoint is whole, and from it the run ends as if nothing had happened."""
    torch.load("run/checkpoint.pth", weights_only=True)
    assert run(method, "--resume") == 0
    assert same(state("run"), expected)


def assert_one_line(result, *parts):
    status, _, error = result
    assert status == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert all(part in error for part in parts), error


# ---- kill -9

POINTS = [f"{file}: {point}" for file in ("checkpoint", "backbone")
          for point in ("half written", "written", "on the disk", "renamed")]


def kill_at(point):
    """In the second save."""
    points, save, fsync, replace = itertools.count(-8), torch.save, os.fsync, os.replace

    def passed():
        if next(points) == POINTS.index(point):
            os.kill(os.getpid(), signal.SIGKILL)

    def save_in_halves(value, file):
        save(value, whole := io.BytesIO())
        half = len(whole.getvalue()) // 2
        for part in whole.getvalue()[:half], whole.getvalue()[half:]:
            file.write(part)
            file.flush()
            passed()

    torch.save = save_in_halves
    os.fsync = lambda file: (fsync(file), passed())
    os.replace = lambda old, new: (replace(old, new), passed())


@pytest.mark.parametrize("method, point", [
    pytest.param(method, point, marks=() if method == "simclr" else pytest.mark.torture)
    for method in METHODS for point in POINTS])
def test_killed_at_a_point_of_saving(undisturbed, method, point):
    expected = undisturbed(method)
    assert disturbed(method, [], kill_at, point)[::2] == (-signal.SIGKILL, "")
    saved = torch.load("run/checkpoint.pth", weights_only=True)["step"]
    assert saved == (3 if POINTS.index(point) >= 3 else 0)
    torch.load("run/backbone.pth", weights_only=True)
    assert_continues(method, expected)


def kill(number):
    return lambda: os.killpg(0, number)


def kill_before_step(step):
    before_step(step, kill(signal.SIGKILL))


@pytest.mark.parametrize("method, step", [
    pytest.param(method, step, marks=() if (method, step) == ("jigsaw", 5) else pytest.mark.torture)
    for method in METHODS for step in (1, 2, 5)])
def test_killed_in_mid_epoch_with_its_loader_processes(undisturbed, method, step):
    expected = undisturbed(method)
    assert disturbed(method, [], kill_before_step, step)[::2] == (-signal.SIGKILL, "")
    assert torch.load("run/checkpoint.pth", weights_only=True)["step"] == (3 if step == 5 else 0)
    assert_continues(method, expected)


# ---- Ctrl-C


def interrupt():
    before_step(5, kill(signal.SIGINT))


def test_ctrl_c_ends_quietly(undisturbed):
    """To the whole group, as a terminal sends it: also to the loader processes."""
    expected = undisturbed("simclr")
    assert disturbed("simclr", [], interrupt)[::2] == (130, "")
    assert_continues("simclr", expected)


# ---- disk and loader processes


def fill_disk(file):
    """From step 5 on, no file may grow beyond what the log holds then, or beyond 50 kB."""
    def limit():
        size = os.path.getsize("run/log.jsonl") + 20 if file == "log.jsonl" else 50_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    before_step(5, limit)


@pytest.mark.parametrize("file", ["checkpoint.pth", "log.jsonl"])
def test_full_disk(undisturbed, file):
    expected = undisturbed("simclr")
    result = disturbed("simclr", [], fill_disk, file)
    assert_one_line(result, f"cannot write run/{file}", "File too large")
    assert torch.load("run/checkpoint.pth", weights_only=True)["step"] == 3
    assert_continues("simclr", expected)


def lose_loader_process():
    before_step(2, lambda: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL))


def test_lost_loader_process(undisturbed):
    """As the system kills one when memory runs out."""
    expected = undisturbed("simclr")
    status, output, error = disturbed("simclr", [], lose_loader_process)
    # a thread of multiprocessing may complain, too, of a process that it was sending to
    (line,) = re.findall("^error: .*\n", error, re.MULTILINE)
    assert_one_line((status, output, line), "DataLoader worker")
    assert_continues("simclr", expected)
