"""Real signals to real processes, kills at every point of a save, limits on files: the run goes on
to the same bits, and stderr has one line or none."""

import contextlib
import importlib
import io
import itertools
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import _context
from test_run import (METHODS, TINY, assert_one_line, hook, old_signal_handlers,  # noqa: F401
                      quick_collection, run, same, send, state, undisturbed, weights_as_accuracy,
                      whole_run)

import common
import linear_probe


def some(default, cases):
    """All cases, of which those that are not among the default ones are for the torture."""
    return [pytest.param(*case, marks=() if case in default else pytest.mark.torture)
            for case in cases]


def start(method, flags=(), prepare=None, *arguments, prefix="", store=None):
    """A process, in a group of its own, that does what `python method.py TINY --out run flags` does
    after prepare(*arguments); its output goes to two files."""
    child = _context.Process(target=_child, args=(os.getcwd(), method, flags, prepare, arguments,
                                                  prefix, store))
    child.start()
    return child


def _child(folder, method, flags, prepare, arguments, prefix, store):
    multiprocessing.set_start_method("fork", force=True)  # what `python` has
    os.chdir(folder)
    os.setsid()
    for descriptor, name in (1, "stdout"), (2, "stderr"):
        os.dup2(os.open(prefix + name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), descriptor)
    torch.set_num_threads(1)
    linear_probe.evaluate = lambda *a, **k: {"trained": {"knn": 50.0}}
    linear_probe.print_report = lambda report: None
    linear_probe.knn_accuracy = weights_as_accuracy
    if store:
        rank, world, port = store
        dist.init_process_group("gloo", rank=rank, world_size=world,
                                store=dist.TCPStore("127.0.0.1", port, is_master=False))
    if prepare:
        prepare(*arguments)
    module = importlib.import_module(method)
    common.main(module.train, module.parse_args, [*TINY, "--out", "run", *flags])


def ended(child):
    """-> exit status, stdout, stderr"""
    child.join(120)
    assert child.exitcode is not None, "it hangs"
    return child.exitcode, Path("stdout").read_text(), Path("stderr").read_text()


def assert_continues(run, method, expected):
    """The checkpoint is whole, and from it the run ends as if nothing had happened."""
    if Path("run/checkpoint.pth").exists():
        torch.load("run/checkpoint.pth", weights_only=True)
    assert run(method, *TINY, "--out", "run", "--resume")[::2] == (0, "")
    assert same(state(Path("run")), expected)


# ---- kill -9

# Of checkpoint.pth and backbone.pth: half of the file is written, then ahead of and after each of
# fsync of the file, renaming, fsync of the folder.
POINTS = [f"{file}: {point}" for file in ("checkpoint", "backbone") for point in (
    "half written", "ahead of fsync", "after fsync", "ahead of renaming", "after renaming",
    "ahead of fsync of the folder", "after fsync of the folder")]


def kill_at(point):
    """Of the second save, so that there is a first one to lose."""
    file, point = divmod(POINTS.index(point), 7)
    calls, saves, save, fsync, replace = itertools.count(), itertools.count(), *(
        torch.save, os.fsync, os.replace)
    die = send(signal.SIGKILL)

    def halved(value, target):
        save(value, whole := io.BytesIO())
        if point == 0 and next(saves) == 2 + file:
            target.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            target.flush()
            die()
        target.write(whole.getvalue())

    def counted(function):
        def wrapper(*arguments):
            now = 2 * next(calls) - 2 * 3 * (2 + file)  # three calls per file
            if point and now == point - 1:
                die()
            function(*arguments)
            if point and now + 1 == point - 1:
                die()
        return wrapper

    common.free_memory = lambda device: 0  # no cache of images is saved
    torch.save, os.fsync, os.replace = halved, counted(fsync), counted(replace)


@pytest.mark.parametrize("method, point", some(
    [("simclr", POINTS[0]), ("simclr", POINTS[4]), ("simclr", POINTS[8])],
    itertools.product(METHODS, POINTS)))
def test_killed_at_a_point_of_saving(run, undisturbed, method, point):
    expected = undisturbed(method)
    assert ended(start(method, [], kill_at, point)) == (-signal.SIGKILL, *ended_output())
    saved = torch.load("run/checkpoint.pth", weights_only=True)["step"]
    renamed = point.startswith("backbone") or POINTS.index(point) >= 4
    assert saved == (6 if renamed else 3)
    assert bool(list(Path("run").glob("*.tmp"))) == (POINTS.index(point) % 7 < 4)
    assert_continues(run, method, expected)


def ended_output():
    return Path("stdout").read_text(), ""


@pytest.mark.parametrize("method, seed", some(
    [("simclr", 0)], [(METHODS[seed % 10], seed) for seed in range(50)]))
def test_killed_at_a_random_moment(run, undisturbed, method, seed):
    """With its loader processes, at any time from the start of its log to its end."""
    expected, draw = undisturbed(method), random.Random(seed)
    child = start(method, ["--workers", str(seed % 3)], stream)
    while child.is_alive() and not Path("run/log.jsonl").exists():
        time.sleep(0.01)
    child.join(draw.uniform(0, 1.5))
    if child.is_alive():
        os.killpg(child.pid, signal.SIGKILL)
    assert ended(child)[0] in (0, -signal.SIGKILL)
    assert_continues(run, method, expected)


def kill_at_step_2():
    stream()
    common.Run.steps = hook(1, before=send(signal.SIGKILL))


def test_killed_without_its_loader_processes(run, undisturbed):
    """They live on for seconds, and must not keep the next process from continuing."""
    expected = undisturbed("simclr")
    child = start("simclr", ["--workers", "2"], kill_at_step_2)
    child.join(60)
    try:
        assert child.exitcode == -signal.SIGKILL
        assert_continues(run, "simclr", expected)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def stream():
    """Loader processes decode the images all the time."""
    common.free_memory = lambda device: 0


# ---- signals


def signal_at_step_2(numbers, group):
    def give(run):
        for number in numbers:
            (os.killpg if group else os.kill)(0 if group else os.getpid(), number)

    stream()
    common.Run.steps = hook(1, before=give)


@pytest.mark.parametrize("method, number, group, workers", some(
    [("simclr", signal.SIGINT, False, "0"), ("simclr", signal.SIGINT, True, "2"),
     ("simclr", signal.SIGTERM, False, "2"), ("simclr", signal.SIGTERM, True, "2")],
    itertools.product(METHODS, (signal.SIGINT, signal.SIGTERM), (False, True), ("0", "2"))))
def test_signal(run, undisturbed, method, number, group, workers):
    """To the process alone or to its group, as systemd, Slurm and a terminal send it."""
    expected = undisturbed(method)
    child = start(method, ["--workers", workers], signal_at_step_2, [number], group)
    status, output, error = ended(child)
    assert (status, error) == (128 + number, "") and output.endswith("saved at step 2\n")
    assert torch.load("run/checkpoint.pth", weights_only=True)["step"] == 2
    assert_continues(run, method, expected)


def test_second_ctrl_c(run, undisturbed):
    """An impatient user's does not interrupt the saving that the first one asked for."""
    expected = undisturbed("simclr")
    child = start("simclr", ["--workers", "2"], signal_at_step_2, [signal.SIGINT] * 2, True)
    status, output, error = ended(child)
    assert (status, error) == (130, "") and output.endswith("saved at step 2\n")
    assert_continues(run, "simclr", expected)


# ---- disk, loader processes, other processes


def fill_disk(file):
    """From step 5 on, no file may grow beyond what the log holds then, or beyond 50 kB."""
    def limit(run):
        size = os.path.getsize("run/log.jsonl") + 20 if file == "log.jsonl" else 50_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    common.Run.steps = hook(4, before=limit)


@pytest.mark.parametrize("file", ["checkpoint.pth", "log.jsonl"])
def test_full_disk(run, undisturbed, file):
    expected = undisturbed("simclr")
    result = ended(start("simclr", [], fill_disk, file))
    assert_one_line(result, 1, f"cannot write run/{file}", "File too large")
    assert torch.load("run/checkpoint.pth", weights_only=True)["step"] == 3
    assert not list(Path("run").glob("*.tmp"))
    assert_continues(run, "simclr", expected)


def spoil_decoding():
    def to_square(*arguments):
        raise ZeroDivisionError("a bug in a decoder")

    stream()
    common.to_square = to_square


def test_loader_process_that_raises(undisturbed):
    undisturbed("simclr")
    result = ended(start("simclr", ["--workers", "2"], spoil_decoding))
    assert_one_line(result, 1, "unreadable", "a bug in a decoder")


def die_at_step_2():
    if common.rank() == 1:
        common.Run.steps = hook(1, before=send(signal.SIGKILL))


def test_one_process_of_two_dies(undisturbed):
    undisturbed("simclr")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, second = (start("simclr", [], die_at_step_2, prefix=prefix, store=(rank, 2, store.port))
                     for rank, prefix in enumerate(("", "second-")))
    second.join(120)
    assert second.exitcode == -signal.SIGKILL
    assert_one_line(ended(first), 1, "lost another process", "--resume")
