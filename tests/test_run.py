"""What a run leaves in its folder, and how it continues after it was stopped."""

import functools
import importlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import METHODS, write_images
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
import linear_probe
import simclr
from common import Failure

pytestmark = [pytest.mark.usefixtures("class_folders", "no_report"),
              pytest.mark.filterwarnings("error::FutureWarning"),
              pytest.mark.filterwarnings("error::DeprecationWarning")]

# 24 images: three steps per epoch; log lines at steps 1, 2, 3, 4 and 6
TINY = "--data images --recipe demo -b 8 --epochs 2 -p 2 --device cpu".split()
SMALL = {method: ["-a", "resnet8x0.25"] for method in METHODS}
SMALL["mae"] = []  # its smallest ViT is the demonstration's
TIMINGS = "seconds", "images_per_s"


def start(method, *flags):
    """A small run, in ./run."""
    module = importlib.import_module(method)
    module.train(module.parse_args([*TINY, *SMALL[method], "--out", "run", *flags]))


def resume(method, *flags):
    """Continue it; its flags are those of its checkpoint."""
    module = importlib.import_module(method)
    module.train(module.parse_args(["--resume", "--out", "run", "--device", "cpu", *flags]))


def at_step(step, action):
    """Something that happens right before this step, counted from 0: a stand-in for
    common.batches."""
    batches = common.batches

    def with_action(*args):
        for now, images, aspect in batches(*args):
            if now == step:
                action()
            yield now, images, aspect

    return with_action


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("mae", "rotation", "jigsaw")])
def test_evaluation_has_a_side_of_its_own(method, monkeypatch):
    """Views of 24 pixels, but kNN and report on images of 32."""
    sides = []

    def quick_knn(network, train, test, image_size, *args, **kwargs):
        sides.append(image_size)

    def evaluate(backbone, untrained, train, test, image_size, *args, **kwargs):
        sides.append(image_size)

    monkeypatch.setattr(linear_probe, "quick_knn", quick_knn)
    monkeypatch.setattr(linear_probe, "evaluate", evaluate)
    start(method, "--image-size", "24", "--eval-size", "32", "--epochs", "1")
    assert sides == [32, 32, 32]  # untrained and trained, and the report
    assert linear_probe.load_backbone("run/checkpoint.pth")[2] == 32


@pytest.mark.parametrize("method", METHODS)
def test_help_names_health_numbers_that_the_log_has(method, capsys):
    start(method, "--epochs", "1")
    logged = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        importlib.import_module(method).parse_args(["--help"])
    names = re.findall("`([a-z ]+)`", " ".join(capsys.readouterr().out.split()))
    assert names and {name.replace(" ", "_") for name in names} <= logged[0].keys()


def ctrl_c():
    raise KeyboardInterrupt


def stop_after(steps, method, *flags):
    """A run that is saved after each step, and that Ctrl-C ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "SAVE_SECONDS", 0)
        patch.setattr(common, "batches", at_step(steps, ctrl_c))
        with pytest.raises(KeyboardInterrupt):
            start(method, *flags)


def load(path):
    return torch.load(path, weights_only=True)


def log(folder="run"):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def contents(folder="run"):
    """-> {name of a file: its bytes}"""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def state(folder="run"):
    """All that two equal runs have in common."""
    lines = log(folder)
    for line in lines:
        for name in TIMINGS:
            line.pop(name, None)
    return {"checkpoint": load(f"{folder}/checkpoint.pth"), "log": lines,
            "backbone": load(f"{folder}/backbone.pth"), "files": sorted(os.listdir(folder))}


def same(a, b):
    """Equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@functools.cache
def undisturbed(method, *flags):
    """-> state of a run from start to end; the same for all tests, so call it unpatched."""
    start(method, *flags, "--out", "undisturbed")
    return state("undisturbed")


# ---- what a run leaves


def test_files_of_a_run():
    start("simclr")
    assert sorted(contents()) == ["backbone.pth", "checkpoint.pth", "log.jsonl", "views.png"]


def test_checkpoint():
    """Tensors and plain values, and no flags that are only for this machine."""
    flags = vars(simclr.parse_args(TINY)).keys()
    start("simclr", "--lr", "0.1")
    saved = load("run/checkpoint.pth")
    assert list(saved) == ["method", "recipe", "args", "step", "images", "model", "optimizer"]
    assert (saved["method"], saved["recipe"], saved["step"]) == ("simclr", "demo", 6)
    assert saved["images"].startswith("24 images, ")
    this_machine = {"out", "resume", "init", "device", "workers", "memory"}
    assert saved["args"].keys() == flags - this_machine
    assert saved["args"]["lr"] == 0.1


@pytest.mark.parametrize("method", METHODS)
def test_backbone_is_the_network_that_is_evaluated(monkeypatch, method):
    evaluated = []

    def evaluate(backbone, *args, **kwargs):
        evaluated.append(backbone.state_dict())
        return {}

    monkeypatch.setattr(linear_probe, "evaluate", evaluate)
    start(method, "--epochs", "1", "--max-images", "8")
    backbone = load("run/backbone.pth")
    assert same(backbone, dict(evaluated[0]))
    assert not any(name.startswith(("fc.", "module.", "backbone.")) for name in backbone)


def test_backbone_loads_into_torchvisions_resnet():
    write_images(Path("large"), 8, size=(72, 72))
    start("simclr", "--data", "large", "--image-size", "72", "-a", "resnet18", "--epochs", "1")
    weights = load("run/backbone.pth")
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(weights)
    ours = common.make_backbone("resnet18", 72)
    ours.load_state_dict(weights)
    assert not torch.equal(weights["bn1.running_mean"], torch.zeros(64))  # trained
    x = torch.randn(2, 3, 72, 72)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_views():
    """A row for each class: an image as it is, and its two views."""
    start("simclr")
    picture = np.asarray(Image.open("run/views.png"))
    assert picture.shape == (2 * (128 + 4) + 4, 3 * (128 + 4) + 4, 3)
    image = np.asarray(Image.open("images/train/cat/000.png"))
    columns = [picture[4:132:4, left : left + 128 : 4] for left in (4, 136, 268)]
    assert (columns[0] == image).all()
    for view in columns[1:]:
        assert view.std() > 10 and (view != image).any()


def test_log():
    start("simclr")
    lines = [line for line in log() if "loss" in line]
    assert [(line["step"], line["epoch"]) for line in lines] == [
        (1, 1), (2, 1), (3, 1), (4, 2), (6, 2)]
    for line in lines:
        assert list(line) == ["step", "epoch", "loss", "positive_found", "lr", *TIMINGS]
        assert line["images_per_s"] > 0
    assert log()[-1] == {"step": 6, "report": {}}


def test_screen(capsys):
    start("simclr")
    lines = capsys.readouterr().out.splitlines()
    assert "recipe demo: resnet8x0.25, views of 32 pixels; in run" in lines
    pattern = (r"epoch 2/2  step 4/6  loss \d\.\d{4} \(chance 2\.7081\)  positive found 0\.\d{4}  "
               r"lr \S+  [\d,]+ images/s  0:00:\d\d left")
    assert sum(re.fullmatch(pattern, line) is not None for line in lines) == 1


def test_knn_at_the_end_of_each_epoch(capsys):
    start("simclr")
    output = capsys.readouterr().out
    lines = [line for line in log() if "knn" in line]
    assert [(line["step"], line["epoch"]) for line in lines] == [(3, 1), (6, 2)]
    for line in lines:
        assert list(line) == ["step", "epoch", "knn", "untrained"]
        assert 0 <= line["knn"] <= 100
        assert f"kNN so far {line['knn']:.1f} (untrained {line['untrained']:.1f})\n" in output
    assert lines[0]["untrained"] == lines[1]["untrained"]


@pytest.mark.parametrize("method", METHODS)
def test_knn_changes_nothing(monkeypatch, method):
    """Without labels there is none, and the weights are the same."""
    expected = undisturbed(method)["backbone"]
    monkeypatch.setattr(linear_probe, "quick_knn", lambda *args, **kwargs: None)
    start(method)
    assert same(load("run/backbone.pth"), expected)
    assert not any("knn" in line for line in log())


def test_images_without_labels(capsys):
    """Fewer of them than the picture of the views has rows."""
    write_images(Path("unlabelled"), 2)
    start("simclr", "--data", "unlabelled", "-b", "2")
    assert "kNN" not in capsys.readouterr().out
    assert [line["step"] for line in log()] == [1, 2, 2]
    assert Path("run/views.png").exists()


def test_seed():
    start("simclr", "--seed", "1")
    assert not same(load("run/backbone.pth"), undisturbed("simclr")["backbone"])


# ---- what the loop hands on


@pytest.mark.parametrize("method", METHODS)
def test_the_optimizer_has_the_rate_that_is_logged(method):
    rates = []

    def record(optimizer, args, kwargs):
        rates.append(optimizer.param_groups[0]["lr"])

    hook = register_optimizer_step_pre_hook(record)
    try:
        start(method, "-p", "1", "--lr", "3.2")
    finally:
        hook.remove()
    assert rates == [line["lr"] for line in log() if "loss" in line]
    assert len(rates) == 6 and min(rates) > 0
    assert max(rates) == pytest.approx(3.2 * 8 / 256)


def record_loss(monkeypatch, module, method):
    """-> a list that gets the tensors of each call of the method's loss, and whether autocast was
    on."""
    name = f"{method}_loss"
    original = getattr(module, name)
    calls = []

    def recorded(*arguments, **options):
        tensors = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                tensors.append(argument)
            elif isinstance(argument, list):
                tensors += argument
        calls.append((tensors, torch.is_autocast_enabled("cpu")))
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, recorded)
    return calls


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_computed_in_float32_outside_of_autocast(method, monkeypatch):
    def bfloat16(device):
        return torch.autocast("cpu", torch.bfloat16)

    monkeypatch.setattr(common, "autocast", bfloat16)
    calls = record_loss(monkeypatch, importlib.import_module(method), method)
    start(method, "--epochs", "1")
    assert len(calls) >= 3
    for tensors, autocast_is_on in calls:
        dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        assert dtypes == {torch.float32}
        assert not autocast_is_on


@pytest.mark.parametrize("method, model", [("simclr", "SimCLR"), ("byol", "BYOL"),
                                           ("simsiam", "SimSiam"), ("barlow", "BarlowTwins")])
def test_the_loss_gets_what_the_model_returns_in_its_order(method, model, monkeypatch):
    """Another order of z1 and z2 would have each view predict itself."""
    module = importlib.import_module(method)
    model_class = getattr(module, model)
    forward = model_class.forward
    outputs = []

    def recorded_forward(self, view1, view2):
        outputs.append(forward(self, view1, view2))
        return outputs[-1]

    monkeypatch.setattr(model_class, "forward", recorded_forward)
    calls = record_loss(monkeypatch, module, method)
    start(method, "--epochs", "1")
    assert len(calls) == len(outputs) == 3
    for (tensors, _), returned in zip(calls, outputs):
        assert len(tensors) == len(returned)
        assert all(map(torch.equal, tensors, returned))


CHANCE = {"simclr": math.log(15), "moco": math.log(257), "byol": 4, "simsiam": 0, "barlow": 128,
          "swav": math.log(256), "dino": math.log(256), "rotation": math.log(4),
          "jigsaw": math.log(30)}  # of TINY; MAE's log has `variance` instead


@pytest.mark.parametrize("method", CHANCE)
def test_chance_level_on_the_screen(method, capsys):
    start(method, "--epochs", "1")
    assert f"(chance {CHANCE[method]:.4f})" in capsys.readouterr().out


# ---- when it is saved


def test_nothing_is_saved_before_training_has_begun(monkeypatch):
    found = []
    monkeypatch.setattr(common, "batches", at_step(0, lambda: found.extend(sorted(contents()))))
    start("simclr")
    assert found == ["log.jsonl", "views.png"]


@pytest.mark.parametrize("seconds, expected", [
    (10, [6]), (30, [5, 6]), (100, [2, 4, 6, 6]), (130, [1, 2, 3, 4, 5, 6, 6])])
def test_saved_every_two_minutes_and_at_the_end(monkeypatch, seconds, expected):
    """Steps of so many seconds."""
    now = [0]
    saved = []
    batches = common.batches

    def slow_batches(*args):
        for batch in batches(*args):
            now[0] += seconds
            yield batch

    def save_checkpoint(args, step, *rest):
        saved.append(step)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(common, "batches", slow_batches)
    monkeypatch.setattr(common, "save_checkpoint", save_checkpoint)
    start("simclr")
    assert saved == expected


# ---- beginnings


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("file", ["backbone", "checkpoint"])
def test_init(method, file):
    """Without epochs, the network is the file's, though a checkpoint may hold several."""
    torch.save(undisturbed(method)[file], f"{file}.pth")
    start(method, "--epochs", "0", "--seed", "7", "--init", f"{file}.pth")
    assert same(load("run/backbone.pth"), undisturbed(method)["backbone"])
    assert load("run/checkpoint.pth")["step"] == 0
    assert log() == [{"step": 0, "report": {}}]


def test_no_epochs_leave_the_untrained_network():
    start("simclr", "--epochs", "0")
    torch.manual_seed(0)
    untrained = common.make_backbone("resnet8x0.25", 32)
    assert same(load("run/backbone.pth"), dict(untrained.state_dict()))


@pytest.mark.parametrize("flags", ["--data nowhere", "-a resnet49", "--init nowhere", "-b 1"])
def test_a_mistake_leaves_no_folder(flags):
    before = os.listdir()
    for out in [], ["--out", "run"]:
        with pytest.raises(Failure):
            simclr.train(simclr.parse_args(["--data", "images", *flags.split(), *out]))
        assert os.listdir() == before


def test_two_runs_at_once(monkeypatch):
    """The other one starts while the first one trains. It gets a folder of its own, and is refused
    where it asks for the same."""
    flags = [*TINY, *SMALL["simclr"]]

    def start_another():
        patch.undo()
        with pytest.raises(Failure, match="^--out runs/simclr holds a run: add --resume"):
            simclr.parse_args([*flags, "--out", "runs/simclr"])
        with torch.random.fork_rng():  # as if it were another process
            simclr.train(simclr.parse_args([*flags, "--seed", "1"]))

    with monkeypatch.context() as patch:
        patch.setattr(common, "batches", at_step(2, start_another))
        simclr.train(simclr.parse_args(flags))
    assert sorted(os.listdir("runs")) == ["simclr", "simclr-2"]
    assert same(state("runs/simclr"), undisturbed("simclr"))


# ---- stopped and continued


@pytest.mark.parametrize("method", METHODS)
def test_continues_bit_for_bit(method):
    """Also where the images are now decoded anew for each batch."""
    stop_after(4, method)
    assert load("run/checkpoint.pth")["step"] == 4
    resume(method, "--memory", "0")
    assert same(state(), undisturbed(method))


VERSIONS = [
    ["simclr", "--optimizer", "lars"],
    ["moco", "--version", "1", "--bn-groups", "4", "--queue-size", "20"],  # wraps round
    ["moco", "--version", "3", "-a", "vit_micro", "--optimizer", "adamw", "--hidden-dim", "32"],
    ["byol", "--optimizer", "lars"],
    ["swav", "--optimizer", "lars", "--queue-size", "16", "--small-crops", "1"],
    ["barlow", "--loss", "vicreg"],
    ["dino", "-a", "vit_micro", "--local-views", "2", "--drop-path", "0.2", "--weight-decay-end",
     "0.4"],
    ["mae", "--objective", "simmim"],
    ["jigsaw", "--task", "relative"],
]


@pytest.mark.torture
@pytest.mark.parametrize("version", [[method] for method in METHODS] + VERSIONS)
def test_continues_bit_for_bit_after_each_step(version):
    for steps in range(1, 6):
        stop_after(steps, *version)
        resume(version[0])
        assert same(state(), undisturbed(*version))
        shutil.rmtree("run")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # by torch's workers
def test_continues_with_other_workers(monkeypatch):
    load_data = common.load_data

    def load_data_with_workers(*args):
        train, test = load_data(*args)
        train.workers = 2  # so few images get none
        return train, test

    stop_after(2, "simclr")
    with monkeypatch.context() as patch:
        patch.setattr(common, "load_data", load_data_with_workers)
        resume("simclr", "--memory", "0")
    assert same(state(), undisturbed("simclr"))


def test_lines_beyond_the_checkpoint_are_dropped():
    """And a torn last one."""
    stop_after(4, "simclr")
    with open("run/log.jsonl", "a") as file:
        file.write('{"step": 5, "epoch": 2, "loss": 1.0}\n')
        file.write('{"step": 6, "epoch": 2, "knn": 50.0, "untrained": 50.0}\n')
        file.write('{"step": 6, "epoch": 2, "lo')
    resume("simclr")
    assert same(state(), undisturbed("simclr"))


def test_stopped_before_it_was_saved(monkeypatch, capsys):
    """It starts anew, and no line of the first attempt is left."""
    with monkeypatch.context() as patch:
        patch.setattr(common, "batches", at_step(5, ctrl_c))
        with pytest.raises(KeyboardInterrupt):
            start("simclr")
    assert [line["step"] for line in log()] == [1, 2, 3, 3, 4]
    start("simclr", "--resume")
    assert "--resume: run holds no checkpoint; the run starts anew\n" in capsys.readouterr().out
    assert same(state(), undisturbed("simclr"))


def test_resume_where_there_is_nothing(capsys):
    simclr.train(simclr.parse_args([*TINY, *SMALL["simclr"], "--resume"]))
    line = "--resume: runs/simclr holds no checkpoint; the run starts anew\n"
    assert line in capsys.readouterr().out
    assert same(state("runs/simclr"), undisturbed("simclr"))


def test_resume_alone_continues_the_latest_run(capsys):
    start("simclr", "--out", "runs/simclr")
    stop_after(2, "simclr", "--seed", "3", "--wd", "0.01", "--out", "runs/simclr-2")
    before = contents("runs/simclr")
    simclr.train(simclr.parse_args(["--resume", "--device", "cpu"]))
    assert "continuing runs/simclr-2 after step 2\n" in capsys.readouterr().out
    assert same(state("runs/simclr-2"), undisturbed("simclr", "--seed", "3", "--wd", "0.01"))
    assert contents("runs/simclr") == before


def test_a_finished_run_is_only_evaluated_again(monkeypatch):
    start("simclr")
    with monkeypatch.context() as patch:
        patch.setattr(common, "log", None)
        resume("simclr")
    assert same(state(), undisturbed("simclr"))


def test_a_finished_run_with_more_epochs():
    """The report is now that of its end."""
    start("simclr")
    resume("simclr", "--epochs", "3")
    reports = [line for line in log() if "report" in line]
    assert reports == [{"step": 9, "report": {}}] == log()[-1:]


def test_to_resume_the_init_file_is_not_needed():
    start("simclr", "--seed", "1", "--out", "first")
    stop_after(2, "simclr", "--init", "first/backbone.pth")
    shutil.copytree("run", "other")
    resume("simclr")
    shutil.rmtree("first")
    resume("simclr", "--out", "other")
    assert same(state("other"), state())
    assert not same(state(), undisturbed("simclr"))


# ---- the flags of a run that is continued


def test_resume_finds_the_flags_of_a_version():
    flags = "--version 1 --bn-groups 4 --queue-size 20 --temperature 0.3 --proj-dim 24".split()
    stop_after(4, "moco", *flags)
    resume("moco")
    assert same(state(), undisturbed("moco", *flags))
    args = load("run/checkpoint.pth")["args"]
    assert (args["version"], args["bn_groups"], args["queue_size"]) == (1, 4, 20)


def test_flags_given_on_resuming_win():
    stop_after(2, "simclr", "--lr", "0.05")
    resume("simclr", "--epochs", "4", "--lr", "0.2", "-p", "1")
    args = load("run/checkpoint.pth")["args"]
    assert (args["epochs"], args["lr"], args["arch"]) == (4, 0.2, "resnet8x0.25")
    assert [line["step"] for line in log() if "loss" in line] == [*range(1, 13)]


def test_what_resume_cannot_change():
    """It is refused in one line, and the files stay as they are."""
    stop_after(4, "simclr")
    before = contents()
    shutil.copytree("images", "others")  # as many images, one of another name
    os.rename("others/train/cat/000.png", "others/train/cat/zero.png")
    for flags, words in [
            ("--data others", "run was trained on 24 images, .*, not 24 images, "),
            ("--max-images 16", "run was trained on 24 images, .*, not 16 images, "),
            ("-b 12", "--batch-size 12: the run in run has 8, which --resume cannot change"),
            ("-b 99", "--batch-size 24: the run in run has 8"),
            ("--optimizer lars", "--optimizer lars: the run in run has sgd"),
            ("--wd 0.3", "--weight-decay 0.3: the run in run has 0.0005"),
            ("--recipe cpu", "--recipe cpu: the run in run has demo"),
            ("--epochs 1", "--epochs 1: the run in run has done more already")]:
        with pytest.raises(Failure, match=f"^{words}") as failure:
            resume("simclr", *flags.split())
        assert "\n" not in str(failure.value)
        assert contents() == before


def test_a_run_does_not_go_on_with_another_set_of_torchvision(monkeypatch):
    """Whose images have the same numbers for names."""
    def fake(root, train, download):
        return torchvision.datasets.FakeData(24, (3, 32, 32), num_classes=2)

    for name in "CIFAR10", "CIFAR100":
        monkeypatch.setattr(torchvision.datasets, name, fake)
    stop_after(4, "simclr", "--data", "cifar10")
    before = contents()
    with pytest.raises(Failure, match="^run was trained on cifar10, not cifar100$"):
        resume("simclr", "--data", "cifar100")
    assert contents() == before
    resume("simclr", "--data", "CIFAR10")


def test_run_of_another_method():
    start("simclr")
    before = contents()
    with pytest.raises(Failure, match="^run/checkpoint.pth holds no run of byol.py$"):
        resume("byol")
    assert contents() == before


# ---- divergence


@pytest.mark.parametrize("save_seconds, words, saved", [
    (120, "loss is nan at step 6 ", 3), (0, r"\S+ is not finite at step 5: ", 4)])
def test_divergence(monkeypatch, save_seconds, words, saved):
    """The run ends at the next line of the log, or save; the last good checkpoint stays."""
    start("simclr", "--epochs", "1")
    monkeypatch.setattr(common, "SAVE_SECONDS", save_seconds)
    with pytest.raises(Failure, match=f"^{words}.*try a lower --lr; run keeps") as failure:
        resume("simclr", "--epochs", "2", "--lr", "1e38")
    assert "\n" not in str(failure.value)
    checkpoint = load("run/checkpoint.pth")
    assert checkpoint["step"] == saved
    for weights in checkpoint["model"], load("run/backbone.pth"):
        assert all(value.isfinite().all() for value in weights.values())
    assert [line["step"] for line in log()] == [1, 2, 3, 3, 4]
    assert "NaN" not in Path("run/log.jsonl").read_text()


# ---- inside another program


def surroundings():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return handlers, sys.excepthook, os.getcwd(), torch.get_num_threads(), threading.enumerate()


def test_in_a_thread_of_another_program():
    """It raises and does not exit, and changes nothing that is not its own."""
    ends = []

    def work():
        try:
            start("simclr")
            ends.append("done")
        except Failure as failure:
            ends.append(str(failure))

    before = surroundings()
    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
        assert surroundings() == before
    assert ends == ["done", "--out run holds a run: add --resume, or choose another folder"]
