"""What a run leaves, and what becomes of it when it is stopped, killed, continued, misled."""

import fcntl
import functools
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, write_images
from PIL import Image
from processes import _context, run_processes
from torch import nn

import common
import linear_probe

pytestmark = [pytest.mark.filterwarnings("error::FutureWarning"),
              pytest.mark.filterwarnings("error::DeprecationWarning")]
METHODS = "simclr moco byol simsiam swav barlow dino mae rotation jigsaw".split()
all_methods = pytest.mark.parametrize("method", METHODS)
# What common.py does for any method is tested with the first one, and in the torture with all.
every_method = pytest.mark.parametrize("method", METHODS[:1] + [
    pytest.param(method, marks=pytest.mark.torture) for method in METHODS[1:]])

# 24 training images: three steps per epoch, log lines at steps 2, 3, 4 and 6 at least
TINY = "--data images --recipe demo -b 8 --epochs 2 --image-size 32 --workers 0 -p 2".split()
TIMINGS = ("images_per_s", "seconds", "peak_gb")


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """gc.collect need not look at torch's own objects, a fifth of a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def old_signal_handlers():
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def whole_run(capsys):
    """start(method, *flags) -> exit status, stdout, stderr"""
    def start(method, *flags):
        module = importlib.import_module(method)
        capsys.readouterr()
        status = 0
        try:
            common.main(module.train, module.parse_args, list(flags))
        except SystemExit as end:
            status = end.code
        gc.collect()  # closes log.jsonl
        return status, *capsys.readouterr()

    return start


@pytest.fixture
def run(whole_run, monkeypatch):
    """The same without the report at the end, which takes longer than the training."""
    monkeypatch.setattr(linear_probe, "evaluate", lambda *a, **k: {"trained": {"knn": 50.0}})
    monkeypatch.setattr(linear_probe, "print_report", lambda report: None)
    monkeypatch.setattr(linear_probe, "knn_accuracy", weights_as_accuracy)
    return whole_run


def weights_as_accuracy(backbone, *others):
    """Differs from step to step."""
    return next(backbone.parameters()).abs().mean().item() * 100


def hook(step, before=None, after=None, steps=common.Run.steps):
    """A Run.steps that calls before(run) and after(run) around a step (counted from 0)."""
    def hooked(self):
        for number, images, aspect in steps(self):
            if number == step and before:
                before(self)
            yield number, images, aspect
            if number == step and after:
                after(self)

    return hooked


def send(number):
    return lambda *others, **named: os.kill(os.getpid(), number)


def state(folder):
    """All that two equal runs have in common."""
    saved = torch.load(folder / "checkpoint.pth", weights_only=True)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]
    del saved["args"]
    return {**saved, "backbone": torch.load(folder / "backbone.pth", weights_only=True), "log": log,
            "files": sorted(os.listdir(folder))}


def same(a, b):
    """Equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def tree(folder="."):
    return {str(p): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@functools.cache
def kept():
    return {}  # files of runs that many tests start from, so that they are run once


@pytest.fixture
def undisturbed(run, class_folders):
    """state(method, *flags) of a run from start to end, in ./undisturbed."""
    def finished(method, *flags):
        shutil.rmtree("undisturbed", ignore_errors=True)
        if (method, *flags) not in kept():
            status, _, error = run(method, *TINY, "--out", "undisturbed", *flags)
            assert (status, error) == (0, "")
            kept()[method, *flags] = tree("undisturbed")
        write(kept()[method, *flags])
        return state(Path("undisturbed"))

    return finished


@pytest.fixture
def stopped(run, class_folders, monkeypatch):
    """stopped(method, *flags): a run in ./run that stopped at step 2."""
    def start(method, *flags):
        if ("stopped", method, *flags) not in kept():
            with monkeypatch.context() as patch:
                patch.setattr(common.Run, "steps", hook(1, before=send(signal.SIGTERM)))
                assert run(method, *TINY, "--out", "run", *flags)[0] == 143
            kept()["stopped", method, *flags] = tree("run")
        write(kept()["stopped", method, *flags])

    return start


def write(files):
    for path, data in files.items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(data)


def assert_one_line(result, status, *words):
    assert result[0] == status and result[2].count("\n") == 1, result[2]
    assert result[2].startswith("error: ") and len(result[2]) < 400
    for word in words:
        assert word in result[2], result[2]


# ---- what a run leaves


@all_methods
def test_files_of_a_run(whole_run, class_folders, method):
    status, output, error = whole_run(method, *TINY, "--eval-every", "1")
    assert (status, error) == (0, "")
    folder = Path("runs", method)
    files = {path.name for path in folder.iterdir()}
    assert {"checkpoint.pth", "backbone.pth", "log.jsonl", "views.png"} <= files
    assert all(n.endswith(".png") for n in files - {"checkpoint.pth", "backbone.pth", "log.jsonl"})
    with Image.open(folder / "views.png") as views:
        assert min(views.size) > 32 and len(views.getcolors(2**20)) > 100

    saved = torch.load(folder / "checkpoint.pth", weights_only=True)
    assert {"method", "args", "model", "optimizer", "step"} <= saved.keys()
    assert saved["method"] == method and saved["step"] == 6
    assert saved["args"]["recipe"] == "demo" and saved["args"]["batch_size"] == 8
    backbone = torch.load(folder / "backbone.pth", weights_only=True)
    assert not any(key.startswith(("fc.", "module.", "backbone.")) for key in backbone)
    copies = [k for k in saved["model"] if k.endswith("conv1.weight") or "patch_embed" in k]
    assert copies and backbone
    if saved["args"]["arch"].startswith("resnet"):
        common.make_backbone(saved["args"]["arch"], 32).load_state_dict(backbone)
    for key, tensor in backbone.items():
        assert any(same(tensor, v) for k, v in saved["model"].items() if k.endswith(key)), key

    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    training = [line for line in log if "loss" in line]
    epochs = {line["step"]: line["epoch"] for line in training}
    assert epochs | {2: 1, 3: 1, 4: 2, 6: 2} == epochs
    assert all({"lr", *TIMINGS[:2]} < line.keys() for line in training)
    assert all(line["images_per_s"] > 0 for line in training)
    assert [line["step"] for line in log if "knn" in line] == [3, 6]
    assert [line["step"] for line in log if "report" in line] == [6]
    assert log[-1]["report"].keys() >= {"trained", "random", "pixels"}
    for row in "trained", "random", "pixels":
        assert 0 <= log[-1]["report"][row]["knn"] <= 100 and f"\n{row}" in output
    assert "step 2/6" in output and "epoch 2/2" in output and output.count("kNN") >= 2
    assert f"{training[0]['loss']:.4f}" in output and "chance" in output


@every_method
def test_first_line_is_near_chance(run, class_folders, method):
    output = run(method, *TINY, "-p", "1", "--lr", "0")[1]
    words = output[output.index("step 1/6"):].split()
    loss, chance = float(words[3]), float(words[5].strip("()"))
    low = 0.1 if method == "moco" else 0.3  # the queue is noise at first
    assert low * chance - 0.1 < loss < 3 * chance + 0.1  # SimSiam's chance is 0


def torchvision_resnet(arch, stem_of_32_pixels=False):
    model = torchvision.models.get_model(arch)
    model.fc = nn.Identity()
    if stem_of_32_pixels:
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    return model.eval()


@every_method
@pytest.mark.parametrize("image_size", [32, 72])
def test_backbone_loads_into_torchvision(run, tmp_path, method, image_size):
    if method == "mae":
        pytest.skip("has ViTs only")
    write_images(tmp_path / "images", 8)
    flags = ["--image-size", str(image_size), "-a", "resnet18", "--epochs", "1"]
    assert run(method, *TINY, *flags)[0] == 0
    weights = torch.load(f"runs/{method}/backbone.pth", weights_only=True)
    theirs = torchvision_resnet("resnet18", stem_of_32_pixels=image_size == 32)
    theirs.load_state_dict(weights)
    ours = common.make_backbone("resnet18", image_size).eval()
    ours.load_state_dict(weights)
    assert not torch.equal(weights["bn1.running_var"], torch.ones(64))  # trained
    x = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@every_method
def test_scripts_run_without_warnings(class_folders, tmp_path, method):
    """Training and evaluation from `__main__`, where warnings of what will vanish are errors."""
    script(f"{method}.py", *TINY, "--out", "run")
    script("linear_probe.py", "--checkpoint", "run/backbone.pth", "--data", "images", "-j", "0")
    assert Path("run/backbone.pth").exists()


def script(name, *flags):
    """`python name flags` in a process that has imported torch already."""
    assert in_process(_script, name, flags) == 0


def _script(name, flags):
    warnings.simplefilter("error", FutureWarning)
    warnings.simplefilter("error", DeprecationWarning)
    sys.argv = [name, *flags]
    runpy.run_path(str(ROOT / name), run_name="__main__")


def in_process(function, *arguments):
    """Call it in a process of its own -> the exit status."""
    process = _context.Process(target=_in_process, args=(os.getcwd(), function, arguments))
    process.start()
    process.join(120)
    return process.exitcode


def _in_process(folder, function, arguments):
    os.chdir(folder)
    torch.set_num_threads(1)
    function(*arguments)


def test_a_copied_file_works_alone(tmp_path):
    """In an empty folder, each file finds neither common.py nor its siblings."""
    code = """if True:
        import importlib, sys, torch
        for method in sys.argv[1:]:
            sys.path[0] = method
            module = importlib.import_module(method)
            assert module.__file__.startswith(method) or "/" in module.__file__
        import simclr
        model = simclr.SimCLR(torch.nn.Flatten(), 12)
        loss = simclr.simclr_loss(*model(torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)), 0.5)
        loss.backward()
        assert not {"common", "linear_probe"} & set(sys.modules)
    """
    for method in METHODS:
        (tmp_path / method).mkdir()
        shutil.copy(ROOT / f"{method}.py", tmp_path / method)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code, *METHODS], capture_output=True, text=True,
                          env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- stopped and continued


STOPS = [(signal.SIGINT, 130, 4), (signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 2),
         (signal.SIGTERM, 143, 3), (signal.SIGINT, 130, 5), (signal.SIGTERM, 143, 6)]


@pytest.mark.parametrize("method, number, status, step", [
    pytest.param(method, *stop, marks=pytest.mark.torture if i * j else ())
    for i, method in enumerate(METHODS) for j, stop in enumerate(STOPS)])
def test_stopped_and_continued_equals_undisturbed(run, undisturbed, monkeypatch, method, number,
                                                  status, step):
    expected, out = undisturbed(method), Path("run")
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "steps", hook(step - 1, before=send(number)))
        found, output, error = run(method, *TINY, "--out", "run")
    assert (found, error) == (status, "")
    assert output.splitlines()[-1] == f"saved at step {step}"
    assert torch.load(out / "checkpoint.pth", weights_only=True)["step"] == step
    assert run(method, *TINY, "--out", "run", "--resume")[::2] == (0, "")
    assert same(state(out), expected)


@every_method
def test_stopped_twice_with_evaluations(run, undisturbed, monkeypatch, method):
    expected = undisturbed(method, "--eval-every", "1")
    assert [line["step"] for line in expected["log"] if "knn" in line] == [3, 6]
    for step in 2, 3:
        with monkeypatch.context() as patch:
            patch.setattr(common.Run, "steps", hook(step, before=send(signal.SIGTERM)))
            assert run(method, *TINY, "--out", "run", "--eval-every", "1", "--resume")[0] == 143
    run(method, *TINY, "--out", "run", "--eval-every", "1", "--resume")
    assert same(state(Path("run")), expected)


@every_method
@pytest.mark.parametrize("function, saved_step", [("knn_accuracy", 3), ("evaluate", 6)])
def test_stopped_while_evaluating(run, undisturbed, monkeypatch, method, function, saved_step):
    expected = undisturbed(method, "--eval-every", "1")
    with monkeypatch.context() as patch:
        patch.setattr(linear_probe, function, send(signal.SIGTERM))
        status, output, error = run(method, *TINY, "--out", "run", "--eval-every", "1")
    assert (status, error) == (143, "")
    assert f"saved at step {saved_step}" in output
    run(method, *TINY, "--out", "run", "--eval-every", "1", "--resume")
    assert same(state(Path("run")), expected)


def test_stopped_while_saving(run, class_folders, monkeypatch):
    save = common.Run.save
    monkeypatch.setattr(common.Run, "save", lambda self: (send(signal.SIGTERM)(), save(self)))
    status, output, error = run("simclr", *TINY, "--out", "run")
    assert (status, error) == (143, "") and output.endswith("saved at step 3\n")


@every_method
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_while_decoding(run, class_folders, monkeypatch, method, number, status):
    monkeypatch.setattr(common, "to_square", send(number))
    found, output, error = run(method, *TINY)
    assert (found, error) == (status, "") and not Path("runs").exists()


def test_kill_points_are_those_of_a_save(tmp_path, monkeypatch):
    """fsync of the file, rename, fsync of the folder: in this order."""
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: calls.append("fsync") or fsync(f))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(Path(b).name) or replace(a, b))
    common.save_file(tmp_path / "x.pth", {"x": torch.ones(3)})
    assert calls == ["fsync", "x.pth", "fsync"]


@every_method
def test_killed_in_the_middle(undisturbed, run, method):
    """By kill -9, after log lines that the last checkpoint does not know, the last one torn."""
    expected = undisturbed(method)
    assert in_process(_killed_at_step_5, method) == -signal.SIGKILL
    assert torch.load("run/checkpoint.pth", weights_only=True)["step"] == 3
    assert '"step": 4' in Path("run/log.jsonl").read_text()
    with open("run/log.jsonl", "a") as log:
        log.write('{"step": 5, "lo')
    assert run(method, *TINY, "--out", "run", "--resume")[::2] == (0, "")
    assert same(state(Path("run")), expected)


def _killed_at_step_5(method):
    common.Run.steps = hook(4, after=send(signal.SIGKILL))
    module = importlib.import_module(method)
    common.main(module.train, module.parse_args, [*TINY, "--out", "run"])


@every_method
def test_workers_and_streaming_change_no_bit(run, undisturbed, monkeypatch, method):
    expected = undisturbed(method)
    monkeypatch.setattr(common, "free_memory", lambda device: 0)
    for workers in "0", "1", "2":
        assert run(method, *TINY, "--out", workers, "--workers", workers)[::2] == (0, "")
        assert same(state(Path(workers)), expected)


@every_method
def test_seed_changes_the_run(run, undisturbed, method):
    expected = undisturbed(method)["backbone"]
    run(method, *TINY, "--out", "other", "--seed", "1")
    assert not same(state(Path("other"))["backbone"], expected)


@every_method
def test_order_and_views_differ_between_epochs(run, class_folders, monkeypatch, method):
    """Each epoch shows each image once, in an order of its own."""
    seen, steps = [], common.Run.steps

    def watched(self):
        for step, images, aspect in steps(self):
            seen.append(images.flatten(1).long().sum(1).tolist())
            yield step, images, aspect

    monkeypatch.setattr(common.Run, "steps", watched)
    run(method, *TINY)
    first, second = sum(seen[:3], []), sum(seen[3:], [])
    assert sorted(first) == sorted(second) and len(set(first)) == 24 and first != second


# ---- resumed with other flags


def other_arch(method):
    """Not that of the demonstration."""
    return "vit_tiny" if method == "mae" else "resnet18"


@every_method
@pytest.mark.parametrize("flag, value", [
    ("--epochs", "3"), ("--batch-size", "6"), ("--lr", "0.7"), ("--weight-decay", "0.3"),
    ("--seed", "5"), ("--image-size", "40"), ("--warmup-epochs", "2"), ("--arch", "other"),
    ("--max-images", "16"), ("--recipe", "cifar")])
def test_resume_with_another_value_is_an_error(run, stopped, method, flag, value):
    stopped(method)
    before, value = tree("run"), other_arch(method) if value == "other" else value
    assert_one_line(run(method, *TINY, "--out", "run", "--resume", flag, value), 1, flag, "run/")
    assert tree("run") == before


@every_method
def test_resume_with_other_images_is_an_error(run, stopped, method):
    stopped(method)
    os.rename("images/train/cat/000.png", "images/train/cat/new.png")
    assert_one_line(run(method, *TINY, "--out", "run", "--resume"), 1, "images", "run/")


@every_method
def test_resume_may_change_what_does_not_matter(run, stopped, undisturbed, monkeypatch, method):
    expected = undisturbed(method)
    stopped(method)
    flags = ["--workers", "1", "-p", "1", "--eval-every", "1", "--device", "cpu"]
    os.rename("images", "moved")
    assert run(method, *TINY, "--out", "run", "--resume", *flags, "--data", "moved")[0] == 0
    found = state(Path("run"))
    for part in "backbone", "model", "optimizer", "step":
        assert same(found[part], expected[part])
    assert [line["step"] for line in found["log"] if "loss" in line][-5:] == [2, 3, 4, 5, 6]


@every_method
def test_resume_continues_with_the_saved_flags(run, undisturbed, stopped, method):
    flags = ["--lr", "0.05", "--seed", "3", "--weight-decay", "0.01", "--max-images", "16"]
    expected = undisturbed(method, *flags)
    stopped(method, *flags)
    few = "--data images --out run --resume -p 2 --workers 0".split()
    assert run(method, *few)[::2] == (0, "")
    assert same(state(Path("run")), expected)


def test_resumed_run_is_deterministic_if_it_was_started_so(run, stopped):
    stopped("simclr", "--deterministic")
    torch.use_deterministic_algorithms(False)
    try:
        assert run("simclr", "--data", "images", "--out", "run", "--resume")[0] == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_resumed_run_needs_its_initial_weights_no_more(run, undisturbed, stopped):
    undisturbed("simclr")
    os.replace("undisturbed/backbone.pth", "initial.pth")
    stopped("simclr", "--init", "initial.pth")
    os.remove("initial.pth")
    assert run("simclr", "--data", "images", "--out", "run", "--resume")[::2] == (0, "")


@every_method
def test_resume_alone_continues_the_latest_run_on_its_data(run, class_folders, monkeypatch, method):
    assert run(method, *TINY, "--epochs", "1")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "steps", hook(1, before=send(signal.SIGTERM)))
        assert run(method, *TINY)[0] == 143
    assert run(method, "--resume")[::2] == (0, "")
    assert torch.load(f"runs/{method}-2/checkpoint.pth", weights_only=True)["step"] == 6
    assert len(os.listdir("runs")) == 2


@every_method
def test_failed_start_does_not_hide_the_latest_run(run, class_folders, monkeypatch, method):
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "steps", hook(1, before=send(signal.SIGTERM)))
        assert run(method, *TINY)[0] == 143
    assert run(method, *TINY, "--init", "missing.pth")[0] == 1
    assert run(method, *TINY, "--resume")[0] == 0
    assert torch.load(f"runs/{method}/checkpoint.pth", weights_only=True)["step"] == 6


@every_method
def test_resume_where_there_is_nothing_starts_afresh(run, class_folders, method):
    assert run(method, *TINY, "--resume")[::2] == (0, "")
    assert torch.load(f"runs/{method}/checkpoint.pth", weights_only=True)["step"] == 6


# ---- folders of runs


@every_method
def test_next_free_folder(run, class_folders, method):
    for folder in method, f"{method}-2", f"{method}-3":
        assert run(method, *TINY, "--epochs", "1")[0] == 0
        assert Path("runs", folder, "checkpoint.pth").exists()
        assert len(os.listdir("runs")) == int(folder.removeprefix(method).strip("-") or 1)


@every_method
def test_folder_that_holds_a_run_is_refused(run, stopped, method):
    stopped(method)
    before = tree("run")
    assert_one_line(run(method, *TINY, "--out", "run"), 1, "--out run", "--resume")
    assert tree("run") == before


@every_method
def test_finished_run_stays_as_it_is(run, undisturbed, monkeypatch, method):
    before = undisturbed(method, "--eval-every", "1")
    monkeypatch.setattr(linear_probe, "evaluate", None)  # would fail
    flags = ["--out", "undisturbed", "--resume", "--eval-every", "1"]
    status, output, error = run(method, *TINY, *flags)
    assert (status, error) == (0, "") and "already finished" in output and "loss" not in output
    assert same(state(Path("undisturbed")), before)


def _lock(path, locked):
    with open(path, "a") as log:
        fcntl.lockf(log, fcntl.LOCK_EX)
        locked.set()
        time.sleep(60)


@every_method
def test_two_processes_on_one_folder(run, stopped, method):
    stopped(method)
    before = tree("run")
    locked = _context.Event()
    other = _context.Process(target=_lock, args=(os.path.abspath("run/log.jsonl"), locked))
    other.start()
    assert locked.wait(60)
    try:
        assert_one_line(run(method, *TINY, "--out", "run", "--resume"), 1, "run", "another process")
    finally:
        other.kill()
        other.join()
    assert tree("run") == before
    assert run(method, *TINY, "--out", "run", "--resume")[0] == 0


# ---- what goes wrong while training


@every_method
def test_loss_that_is_not_finite(run, class_folders, monkeypatch, method):
    def spoil(self):
        with torch.no_grad():
            next(self.backbone.parameters()).fill_(float("nan"))

    monkeypatch.setattr(common.Run, "steps", hook(4, before=spoil))
    result = run(method, *TINY, "--out", "run")
    assert_one_line(result, 1, "loss is nan at step 6", "run/checkpoint.pth", "--lr")
    saved = torch.load("run/checkpoint.pth", weights_only=True)
    assert saved["step"] == 3 and all(v.isfinite().all() for v in saved["model"].values())
    assert not any("NaN" in line for line in Path("run/log.jsonl").read_text().splitlines())


@every_method
def test_weights_that_are_not_finite_are_not_saved(run, class_folders, monkeypatch, method):
    def spoil(self):
        with torch.no_grad():
            next(self.backbone.parameters())[0] = float("inf")

    monkeypatch.setattr(common.Run, "steps", hook(5, after=spoil))
    assert_one_line(run(method, *TINY, "--out", "run"), 1, "step 6", "run/checkpoint.pth")
    saved = torch.load("run/checkpoint.pth", weights_only=True)
    assert saved["step"] == 3 and all(v.isfinite().all() for v in saved["model"].values())


@every_method
def test_full_disk(run, class_folders, monkeypatch, method):
    def full(self):
        def fail(descriptor):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(os, "fsync", fail)

    monkeypatch.setattr(common.Run, "steps", hook(4, before=full))
    result = run(method, *TINY, "--out", "run")
    assert_one_line(result, 1, "run/checkpoint.pth", "No space left on device")
    assert torch.load("run/checkpoint.pth", weights_only=True)["step"] == 3
    assert not list(Path("run").glob("*.tmp"))


@every_method
def test_out_of_memory(run, class_folders, monkeypatch, method):
    monkeypatch.setattr(common.Run, "steps", hook(4, before=lambda run: torch.empty(2**60)))
    assert_one_line(run(method, *TINY), 1, "memory", "--batch-size")


def test_killed_loader_process(class_folders):
    """It may be noticed anywhere in a step."""
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; import test_run; "
    done = subprocess.run([sys.executable, "-c", code + "test_run.lose_loader_processes()"],
                          capture_output=True, text=True, timeout=300)
    assert_one_line((done.returncode, done.stdout, done.stderr), 1, "memory", "--workers")


def lose_loader_processes():
    def kill(run):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        time.sleep(0.2)

    common.free_memory = lambda device: 0
    common.Run.steps = hook(4, before=kill)
    module = importlib.import_module(METHODS[0])
    common.main(module.train, module.parse_args, [*TINY, "--epochs", "40", "--workers", "2"])


# ---- checkpoints of all kinds


class Malicious:
    def __reduce__(self):
        return open, ("executed", "w")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda item: item.file_size)
    data[largest.header_offset + 1000] ^= 1  # among the largest tensor's values
    path.write_bytes(data)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no checkpoint"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:100_000]),
    "flipped bit": flip_a_bit,
    "malicious": lambda path: torch.save({"model": Malicious()}, path),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "list": lambda path: torch.save([1, 2], path),
    "tensor": lambda path: torch.save(torch.ones(3), path),
    "backbone": lambda path: shutil.copy(path.with_name("backbone.pth"), path),
    "other": lambda path: torch.save({"state_dict": {}, "epoch": 3, "args": {}}, path),
}


@every_method
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_foreign_checkpoints(run, stopped, method, damage):
    stopped(method)
    DAMAGES[damage](Path("run/checkpoint.pth"))
    before = tree("run")
    assert_one_line(run(method, *TINY, "--out", "run", "--resume"), 1, "run/checkpoint.pth")
    assert tree("run") == before and not Path("executed").exists()


@every_method
@pytest.mark.parametrize("change", [
    lambda saved: saved.update(method="elsewhat"), lambda saved: saved.pop("optimizer"),
    lambda saved: saved.pop("step"), lambda saved: saved.pop("args"),
    lambda saved: saved["model"].pop(next(iter(saved["model"])))])
def test_checkpoints_that_do_not_fit(run, stopped, method, change):
    stopped(method)
    saved = torch.load("run/checkpoint.pth", weights_only=True)
    change(saved)
    torch.save(saved, "run/checkpoint.pth")
    before = tree("run")
    result = run(method, *TINY, "--out", "run", "--resume")
    assert_one_line(result, 1, "run/checkpoint.pth")
    assert tree("run") == before


def test_no_damage_goes_unnoticed(tmp_path):
    path, value = tmp_path / "x.pth", {"x": torch.arange(300.0), "n": [1, "a"]}
    common.save_file(path, value)
    assert same(common.read_file(path), value)
    data, noticed = path.read_bytes(), 0
    for position in range(0, len(data), 7):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        try:
            assert same(common.read_file(path), value)  # where no value is stored
        except common.Failure as error:
            assert str(path) in str(error) and "\n" not in str(error)
            noticed += 1
    assert noticed > 1200 / 7


# ---- wrong command lines


@every_method
@pytest.mark.parametrize("flags, word", [
    (["--data", ""], "--data"), (["--unknown", "1"], "--unknown"), (["stray"], "stray"),
    (["-a", "resnet49"], "resnet49"), (["-a", "resnet18x0"], "resnet18x0"),
    (["--epochs", "-1"], "--epochs"), (["--epochs", "1.5"], "--epochs"), (["--lr", "-1"], "--lr"),
    (["--lr", "nan"], "--lr"), (["--lr", "inf"], "--lr"), (["--wd", "-1"], "--wd"),
    (["--weight-decay", "inf"], "--weight-decay"), (["--batch-size", "0"], "--batch-size"),
    (["--batch_size=1"], "--batch-size"), (["--workers", "-1"], "--workers"),
    (["--image-size", "0"], "--image-size"), (["--max-images", "0"], "--max-images"),
    (["--warmup-epochs", "nan"], "--warmup-epochs"), (["--print-freq", "0"], "--print-freq"),
    (["--seed", "-1"], "--seed"), (["--recipe", "large"], "--recipe"), (["--lr"], "--lr"),
    (["--device", "cuda:99"], "cuda:99"), (["--device", "abacus"], "abacus"),
    (["--temp", "0.5"], "--temp")])
def test_wrong_arguments(run, class_folders, method, flags, word):
    before = tree()
    assert_one_line(run(method, *TINY, *flags), 2, word)
    assert tree() == before


@every_method
def test_empty_data_is_not_this_folder(run, method):
    assert_one_line(run(method, "--data", ""), 2, "--data")


@pytest.mark.parametrize("flags", [
    ["--temperature", "0"], ["--temperature", "nan"], ["--blur", "2"], ["--proj-layers", "4"],
    ["--optimizer", "adam"]])
def test_wrong_arguments_of_simclr(run, class_folders, flags):
    assert_one_line(run("simclr", *TINY, *flags), 2, flags[0])


@every_method
@pytest.mark.parametrize("flags, words", [
    (["--data", "missing"], ["missing"]), (["--data", "file"], ["file"]),
    (["--data", "empty"], ["empty", ".jpg"]), (["--batch-size", "26"], ["24", "--batch-size"]),
    (["--out", "file"], ["file"]), (["--out", "file/run"], ["file/run"]),
    (["--init", "missing.pth"], ["missing.pth"]), (["--init", "file"], ["file"])])
def test_what_is_missing_or_in_the_way(run, class_folders, method, flags, words):
    Path("empty").mkdir()
    Path("file").write_text("text")
    assert_one_line(run(method, *TINY, *flags), 1, *words)
    assert not tree("runs") and Path("file").read_text() == "text"


@every_method
@pytest.mark.parametrize("world, batch", [("3", "8"), ("8", "8")])
def test_batch_that_processes_cannot_share(run, class_folders, monkeypatch, method, world, batch):
    monkeypatch.setenv("WORLD_SIZE", world)
    assert_one_line(run(method, *TINY, "-b", batch), 2, "--batch-size", world)


@pytest.mark.parametrize("world, status", [("3", None), ("16", 1), ("24", 1)])
def test_processes_share_the_batch_of_a_resumed_run(run, stopped, monkeypatch, world, status):
    """A batch of 24, not the 512 of the recipe in force, is what 3 processes share; others not."""
    stopped("simclr", "-b", "24")
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(common, "start_processes", lambda name: torch.device("cpu"))
    monkeypatch.setattr(common, "world_size", lambda: int(world))
    monkeypatch.setattr(common, "load_data", lambda *args: sys.exit("shared"))
    result = run("simclr", "--data", "images", "--out", "run", "--resume")
    if status:
        assert_one_line(result, status, world, "24")
    else:
        assert result[0] == "shared"


@every_method
def test_help_needs_no_data(run, method):
    status, output, error = run(method, "--help")
    assert (status, error) == (0, "")
    for flag in "--data --resume --batch-size --weight-decay --eval-every".split():
        assert flag in output
    assert "only at the end (default: 0)" in " ".join(output.split())


@every_method
def test_underscores_are_accepted(method):
    args = importlib.import_module(method).parse_args(["--batch_size=6", "--image_size", "40"])
    assert (args.batch_size, args.image_size) == (6, 40)


# ---- sizes, beginnings and sets out of the ordinary


@every_method
def test_zero_epochs_save_the_initial_weights(run, class_folders, method):
    for seed, out in ("0", "a"), ("0", "b"), ("1", "c"):
        result = run(method, *TINY, "--epochs", "0", "--seed", seed, "--out", out)
        assert result[::2] == (0, "")
    a, b, c = (state(Path(out)) for out in "abc")
    assert a["step"] == 0 and same(a["backbone"], b["backbone"])
    assert not same(a["backbone"], c["backbone"])


@every_method
@pytest.mark.parametrize("file", ["backbone.pth", "checkpoint.pth"])
def test_init(run, undisturbed, method, file):
    expected = undisturbed(method)["backbone"]
    flags = ["--out", "new", "--init", f"undisturbed/{file}", "--seed", "7"]
    assert run(method, *TINY, *flags, "--epochs", "0")[::2] == (0, "")
    assert same(state(Path("new"))["backbone"], expected)
    assert_one_line(run(method, *TINY, "--init", flags[3], "-a", other_arch(method)), 1, "--init")


@every_method
def test_batch_of_the_recipe_shrinks_to_the_set(run, tmp_path, method):
    write_images(tmp_path / "images", 13)
    flags = "--data images --recipe demo --epochs 1 --workers 0".split()
    status, output, error = run(method, *flags)
    assert (status, error) == (0, "") and "batch of 12" in output
    saved = torch.load(f"runs/{method}/checkpoint.pth", weights_only=True)
    assert saved["step"] == 1 and saved["args"]["batch_size"] == 12


@every_method
def test_folder_without_labels(whole_run, tmp_path, method):
    write_images(tmp_path / "images", 16)
    status, output, error = whole_run(method, *TINY, "--eval-every", "1")
    assert (status, error) == (0, "") and "label" in output
    report, = (line["report"] for line in state(Path("runs", method))["log"] if "report" in line)
    assert "knn" not in report["trained"]


@every_method
@pytest.mark.parametrize("count", [2, 5])
def test_few_images(run, tmp_path, method, count):
    """Fewer than views.png has rows."""
    write_images(tmp_path / "images", count)
    assert run(method, *TINY, "-b", "2")[::2] == (0, "")
    assert Path("runs", method, "views.png").exists()


@every_method
def test_one_image_is_too_few(run, tmp_path, method):
    write_images(tmp_path / "images", 1)
    assert_one_line(run(method, "--data", "images", "--recipe", "demo"), 1, "images")


@every_method
@pytest.mark.parametrize("streaming", [False, True])
def test_unreadable_image(whole_run, class_folders, monkeypatch, method, streaming):
    """Named in one line; neither trained on nor evaluated."""
    for i in range(3):
        (class_folders / "train" / "cat" / f"bad{i}.png").write_text("no image")
    if streaming:
        monkeypatch.setattr(common, "free_memory", lambda device: 0)
    seen, steps = [], common.Run.steps

    def watched(self):
        for step, images, aspect in steps(self):
            seen.append((aspect > 0).all() and (images.flatten(1).amax(1) > 0).all())  # none black
            yield step, images, aspect

    monkeypatch.setattr(common.Run, "steps", watched)
    status, _, error = whole_run(method, *TINY)
    assert status == 0 and len(seen) >= 6 and all(seen)
    assert error.startswith("warning: ") and "'cat/bad" in error
    assert error.count("\n") == 1 or streaming
    report = state(Path("runs", method))["log"][-1]["report"]
    for row in report["trained"], report["random"], report["pixels"]:
        assert all(value == value for value in row.values())  # no NaN


@every_method
def test_unreadable_test_image_is_an_error_while_streaming(whole_run, class_folders, monkeypatch,
                                                           method):
    (class_folders / "val" / "cat" / "bad.png").write_text("no image")
    monkeypatch.setattr(common, "free_memory", lambda device: 0)
    assert_one_line(whole_run(method, *TINY, "--epochs", "1"), 1, "cat/bad.png")


# ---- several processes


@every_method
def test_signal_to_one_process_stops_all_at_the_next_line(class_folders, tmp_path, method):
    """Only the second one gets it, ahead of step 2; there is a line at step 3."""
    flags = ["-p", "50"]
    status, files = zip(*run_processes(2, _train_in_own_folder, method, str(tmp_path), 1, flags))
    assert status == (143, 143)
    saved = torch.load(tmp_path / "rank0" / "run" / "checkpoint.pth", weights_only=True)
    assert saved["step"] == 3


def _train_in_own_folder(method, folder, signalled, flags=()):
    """-> exit status, names of the files that this process wrote in its --out"""
    own = Path(folder, f"rank{common.rank()}")
    own.mkdir()
    os.chdir(own)
    os.symlink("../images", "images")
    linear_probe.evaluate = lambda *a, **k: {"trained": {}}
    linear_probe.print_report = lambda report: None
    if signalled == common.rank():
        common.Run.steps = hook(1, before=send(signal.SIGTERM))
    module, status = importlib.import_module(method), 0
    try:
        module.train(module.parse_args([*TINY, "--out", "run", "--epochs", "1", *flags]))
    except SystemExit as end:
        status = end.code
    return status, sorted(os.listdir("run")) if Path("run").exists() else []


def draws(shape):
    torch.manual_seed(0)
    return common.uniform(*shape, device=torch.device("cpu"), low=2.0, high=5.0).tolist()


def test_uniform_gives_each_process_its_rows_of_the_whole_draw():
    whole = draws((8, 3))
    assert 2 <= min(map(min, whole)) < 3 and 4 < max(map(max, whole)) <= 5
    assert sum(run_processes(2, draws, (4, 3)), []) == whole


def gathered(rows):
    share = rows[common.rank() * 3 :][:3].clone().requires_grad_()
    whole = common.gather(share)
    weights = torch.arange(1.0, 1 + whole.numel()).view_as(whole)
    (whole * weights).sum().backward()
    return whole.tolist(), share.grad.tolist()


def test_gather_keeps_the_order_and_the_gradient():
    rows = torch.randn(6, 2)
    results = run_processes(2, gathered, rows)
    weights = torch.arange(1.0, 13).view(6, 2)
    for rank, (whole, grad) in enumerate(results):
        assert whole == rows.tolist()
        # the sum over both processes' losses, which DistributedDataParallel halves
        assert grad == (2 * weights[rank * 3 :][:3]).tolist()


def normalised(kind, x, share):
    """-> of this process's share: output, its gradient, output in evaluation; the buffers"""
    torch.manual_seed(0)
    norm = nn.Sequential(nn.Linear(1, 1), kind(x.shape[1], affine=x.dim() == 4)).double()
    norm = common.sync_batch_norm(norm)[1]
    x = x[common.rank() * share :][:share].clone().requires_grad_()
    y = norm(x)
    whole = common.gather(y)
    (whole**2 * torch.arange(1.0, 1 + whole.numel()).view_as(whole).sin()).sum().backward()
    rows = y, x.grad / common.world_size(), norm.eval()(x)
    return [t.detach().numpy() for t in rows], [t.numpy() for t in norm.buffers()]


@pytest.mark.parametrize("kind, shape", [(nn.BatchNorm1d, (4, 5)), (nn.BatchNorm2d, (4, 3, 2, 2))])
def test_sync_batch_norm_equals_batch_norm_of_the_whole_batch(kind, shape):
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    expected_rows, expected_buffers = normalised(kind, x, 4)
    (rows1, buffers1), (rows2, buffers2) = run_processes(2, normalised, kind, x, 2)
    for whole, *parts in zip(expected_rows, rows1, rows2):
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-12, atol=1e-12)
    assert len(expected_buffers) == 3
    for whole, *copies in zip(expected_buffers, buffers1, buffers2):
        for copy in copies:
            np.testing.assert_allclose(copy, whole, rtol=1e-12, atol=1e-12)
