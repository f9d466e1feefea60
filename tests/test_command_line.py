"""The command line: recipes, flags, the run's folder, exit status and what is said of errors."""

import importlib
import io
import os
import pickle
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import METHODS, write_images
from PIL import Image
from torch import nn

import common
import simclr
from common import Failure

TINY = "--data images --recipe demo -a resnet8x0.25 -b 8 --epochs 1 --device cpu".split()


@pytest.fixture
def run(capsys, no_report):
    """run(*flags) -> exit status, stdout and stderr of simclr.py with these flags."""
    def start(*flags):
        return call(capsys, simclr.train, simclr.parse_args, [*TINY, *flags])

    return start


def call(capsys, train, parse_args, argv=None):
    """-> exit status, stdout and stderr of common.main."""
    capsys.readouterr()
    status = 0
    try:
        common.main(train, parse_args, argv)
    except SystemExit as end:
        status = end.code
    output, error = capsys.readouterr()
    return status, output, error


def assert_one_line(result, words):
    """Exit status 1, and one line on stderr."""
    status, _, error = result
    assert status == 1 and error.startswith("error: ") and error.count("\n") == 1, error
    assert words in error


# ---- recipes and flags


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def recipe(*flags):
    return simclr.parse_args([*flags]).recipe


def test_recipe_without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_images(Path("images"), 1)
    assert recipe() == "demo"
    assert recipe("--data", "images") == recipe("--data", "cifar10") == "cpu"


@pytest.mark.parametrize("size, expected", [
    ((64, 64), "cifar"), ((90, 64), "cifar"), ((65, 65), "imagenet")])
def test_recipe_with_gpu_follows_the_size_of_the_images(gpu, size, expected):
    write_images(Path("images/cat"), 2, size=size)
    assert recipe("--data", "images") == expected
    assert recipe("--data", "images", "--device", "cuda:1") == expected
    assert recipe("--data", "images", "--device", "cpu") == "cpu"


@pytest.mark.parametrize("data, expected", [
    ("cifar10", "cifar"), ("SVHN", "cifar"), ("stl10", "imagenet"), ("nowhere", "imagenet")])
def test_recipe_with_gpu_of_sets_of_torchvision(gpu, data, expected):
    assert recipe("--data", data) == expected


def test_recipe_with_gpu_follows_links(gpu):
    write_images(Path("store"), 2)
    os.mkdir("images")
    os.symlink("../store", "images/cat")
    os.symlink(".", "images/loop")
    assert recipe("--data", "images") == "cifar"


def test_recipe_with_gpu_opens_images_only(gpu, monkeypatch):
    """No pipe, which would wait forever; and the pictures in runs/ are no data."""
    write_images(Path("cat"), 2)
    write_images(Path("runs/simclr"), 1, size=(200, 200))
    os.mkfifo("cat/pipe.png")
    Path("cat/notes.txt").touch()
    opened = []

    def record(path):
        opened.append(os.path.relpath(path))
        return Image.new("RGB", (32, 32))

    monkeypatch.setattr(Image, "open", record)
    assert recipe("--data", ".") == "cifar"
    assert sorted(opened) == ["cat/000.png", "cat/001.png"]


def test_recipe_with_gpu_without_a_walk_through_a_large_folder(gpu, monkeypatch):
    for i in range(50):
        write_images(Path(f"images/{i}"), 1)
    listed = []
    scandir = os.scandir

    def record(path):
        listed.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", record)
    assert recipe("--data", "images") == "cifar"
    assert len(listed) == 21  # the folder itself, and twenty in it with an image each


def test_what_is_given_by_hand_wins():
    args = simclr.parse_args(["--recipe", "imagenet", "--lr", "3", "--image-size", "96"])
    assert (args.lr, args.image_size, args.arch) == (3.0, 96, "resnet50")


def test_side_of_evaluation_follows_the_views_that_are_given_by_hand():
    flags = ["--data", "cifar10", "--recipe", "cpu"]
    for given, sides in (("", (24, 32)), ("--image-size 48", (48, 48)),
                         ("--eval-size 64", (24, 64)),
                         ("--image-size 48 --eval-size 64", (48, 64))):
        args = simclr.parse_args([*flags, *given.split()])
        assert (args.image_size, args.eval_size) == sides


def test_side_of_evaluation_of_a_resumed_run(tmp_path):
    saved = {"image_size": 24, "eval_size": 32}
    for given, sides in ("", (24, 32)), ("--image-size 24", (24, 32)), ("--eval-size 24", (24, 24)):
        torch.save({"method": "simclr", "args": saved}, tmp_path / "checkpoint.pth")
        args = simclr.parse_args(["--resume", "--out", str(tmp_path), *given.split()])
        assert (args.image_size, args.eval_size) == sides


@pytest.mark.parametrize("method", ["moco", "dino"])
def test_side_of_evaluation_of_a_vit_is_that_of_its_views(method):
    module = importlib.import_module(method)
    flags = ["--recipe", "demo", "--eval-size", "48"]
    assert module.parse_args(flags).eval_size == 48
    assert module.parse_args([*flags, "-a", "vit_small"]).eval_size == 32


CHANGED = """--data images -a resnet34 --epochs 7 --warmup-epochs 2.5 -b 24 --lr 0.7 --wd 0.03
    --image-size 48 --max-images 99 --seed 5 --compile -p 3 --loss nce --optimizer lars
    --temperature 0.7 --proj-layers 3 --proj-dim 17 --crop-scale 0.3 --jitter-strength 0.9
    --blur 0.4""".split()


def test_resume_finds_each_flag_again():
    """But those of this machine."""
    args = simclr.parse_args([*CHANGED, "--recipe", "cifar", "--out", "run"])
    defaults = vars(simclr.parse_args([]))
    unchanged = [name for name, value in vars(args).items() if value == defaults[name]]
    assert sorted(unchanged) == ["device", "init", "memory", "method", "resume", "workers"]
    os.mkdir("run")
    network = nn.Linear(2, 2)
    images = common.ImageSet("images", ["1.png"], [0], [])
    optimizer = torch.optim.SGD(network.parameters())
    common.save_checkpoint(args, 1, images, network, optimizer, network)
    again = simclr.parse_args(["--resume", "--out", "run", "--lr", "0.9", "--memory", "2"])
    assert vars(again) == {**vars(args), "resume": True, "lr": 0.9, "memory": 2.0}


@pytest.mark.parametrize("cores, processes, workers", [
    (8, None, 8), (8, "4", 2), (128, None, 16), (128, "4", 16)])
def test_workers(monkeypatch, cores, processes, workers):
    """The cores that this job may use, shared by its processes, at most 16."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert simclr.parse_args([]).workers == workers


@pytest.mark.parametrize("cores, workers", [(8, 8), (None, 1)])
def test_workers_where_a_job_cannot_ask(monkeypatch, cores, workers):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert simclr.parse_args([]).workers == workers


@pytest.mark.parametrize("batch, world, expected", [
    (8, 1, 8), (8, 3, 6), (64, 1, 24), (64, 5, 20), (24, 1, 24)])
def test_batch_larger_than_the_set_shrinks(monkeypatch, capsys, batch, world, expected):
    """And to equal shares of the processes."""
    monkeypatch.setattr(common, "world_size", lambda: world)
    assert common.batch_that_fits(batch, range(24)) == expected
    output = capsys.readouterr().out
    if expected == batch:
        assert output == ""
    else:
        assert output == f"--batch-size {expected}: what 24 images and {world} process(es) allow\n"


@pytest.mark.parametrize("batch, world", [(1, 1), (8, 5), (64, 13)])
def test_batch_of_less_than_two(monkeypatch, batch, world):
    monkeypatch.setattr(common, "world_size", lambda: world)
    with pytest.raises(Failure, match=f"--batch-size {batch}: .* {world} proc.* 24"):
        common.batch_that_fits(batch, range(24))


@pytest.mark.parametrize("warmup, total, expected", [
    (10, 100, 10), (100, 100, 100), (101, 100, 10)])
def test_warmup_longer_than_the_run_is_a_tenth_of_it(warmup, total, expected):
    assert common.warmup_that_fits(warmup, total) == expected


# ---- the run's folder


def open_run(out=None, resume=False):
    """-> the folder that a run with these flags gets."""
    args = Namespace(out=out, resume=resume, method="simclr", recipe="demo", arch="resnet8",
                     image_size=32)
    common.open_run(args)
    return args.out


def test_runs_that_start_together_get_folders_of_their_own():
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: open_run(), range(8)))
    assert sorted(found) == ["runs/simclr"] + [f"runs/simclr-{i}" for i in range(2, 9)]


def test_of_two_runs_with_the_same_out_one_is_refused():
    assert open_run("new/run") == "new/run"
    with pytest.raises(Failure, match="^--out new/run holds a run: add --resume, or choose"):
        open_run("new/run")
    assert open_run("new/run", resume=True) == "new/run"


@pytest.mark.parametrize("name", ["log.jsonl", "checkpoint.pth", "backbone.pth"])
def test_what_is_left_of_a_run_is_not_overwritten(run, name):
    Path("kept").mkdir()
    Path("kept", name).write_bytes(b"of an earlier run")
    assert_one_line(run("--out", "kept"), "--out kept holds a run")
    assert Path("kept", name).read_bytes() == b"of an earlier run"
    assert os.listdir("kept") == [name]


def test_weights_without_their_checkpoint_are_not_overwritten(run):
    """With --resume, either: the run cannot go on, and would begin again."""
    Path("kept").mkdir()
    Path("kept", "backbone.pth").write_bytes(b"of an earlier run")
    Path("kept", "log.jsonl").write_text('{"step": 3, "report": {}}\n')
    assert_one_line(run("--out", "kept", "--resume"), "kept holds weights but no checkpoint.pth")
    assert Path("kept", "backbone.pth").read_bytes() == b"of an earlier run"
    assert Path("kept", "log.jsonl").read_text() == '{"step": 3, "report": {}}\n'


def test_help_is_shown_beside_a_kept_run(run):
    Path("kept").mkdir()
    Path("kept", "log.jsonl").touch()
    status, output, error = run("--out", "kept", "--help")
    assert status == 0 and output.startswith("usage: ") and not error


# ---- exit status


@pytest.mark.parametrize("flags, words", [
    (["--unknown", "1"], "--unknown"), (["stray"], "stray"), (["--temp", "0.5"], "--temp"),
    (["--epochs", "1.5"], "--epochs"), (["--recipe", "large"], "--recipe"), (["--lr"], "--lr"),
    (["--data"], "--data")])
def test_wrong_arguments(run, flags, words):
    status, _, error = run(*flags)
    assert status == 2 and words in error.splitlines()[-1]


@pytest.mark.parametrize("flags, words", [
    (["--data", "nowhere"], "--data nowhere: no such folder"),
    (["--data", "file"], "--data file: no such folder"),
    (["--data", "empty"], "--data empty: no training images"),
    (["--data", "spoiled"], "nothing that can be read: 0 of spoiled; no class folders"),
    (["--init", "nowhere"], "nowhere"), (["--init", "file"], "cannot read file"),
    (["--init", "other.pth"], "other.pth does not fit"), (["-a", "resnet49"], "--arch resnet49"),
    (["-b", "1"], "--batch-size 1"), (["--device", "cuda:99"], "--device cuda:99"),
    (["--lr", "nan"], "loss is nan at step 3"), (["--temperature", "0"], "loss is nan at step 1")])
def test_error_that_users_can_put_right(run, class_folders, flags, words):
    Path("file").write_text("text")
    os.mkdir("empty")
    os.mkdir("spoiled")
    Path("spoiled/1.png").write_text("text")
    torch.save(common.make_backbone("resnet8x0.5", 32).state_dict(), "other.pth")
    assert_one_line(run(*flags), words)


def test_run_of_another_network(run, class_folders):
    assert run("--out", "run")[0] == 0
    result = run("--out", "run", "--resume", "-a", "resnet20x0.25")
    assert_one_line(result, "run/checkpoint.pth does not fit this model: ")


def test_data_that_is_corrected_goes_into_the_same_out(run, class_folders):
    """The run that failed has left nothing that stands in the way."""
    assert run("--out", "run", "--data", "image")[0] == 1
    assert run("--out", "run")[0] == 0


def raised(error):
    def train(args):
        raise error

    return train


def test_out_of_memory(capsys):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    result = call(capsys, raised(error), lambda argv: None)
    assert_one_line(result, "error: CUDA out of memory. Tried to allocate 20.00 MiB.")
    assert "Try smaller batches" in result[2]


@pytest.mark.parametrize("error", [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("images"),
    RuntimeError("CUDA error: an illegal memory access"), RuntimeError("out of memory"),
    OSError(28, "No space left on device")])
def test_other_errors_keep_their_traceback(capsys, error):
    status, _, shown = call(capsys, raised(error), lambda argv: None)
    assert status == 1 and shown.startswith("Traceback")
    assert "    raise error\n" in shown and f"{type(error).__name__}: {error}\n" in shown


def test_ctrl_c(capsys):
    result = call(capsys, raised(KeyboardInterrupt()), lambda argv: None)
    assert result == (130, "", "stopped\n")


def test_ctrl_c_says_what_is_saved(capsys, tmp_path):
    args = Namespace(out=str(tmp_path))
    status, _, said = call(capsys, raised(KeyboardInterrupt()), lambda argv: args)
    assert status == 130 and "stopped; nothing is saved yet" in said
    (tmp_path / "checkpoint.pth").write_bytes(b"damaged")
    assert call(capsys, raised(KeyboardInterrupt()), lambda argv: args) == (130, "", "stopped\n")
    torch.save({"step": 100}, tmp_path / "checkpoint.pth")
    _, _, said = call(capsys, raised(KeyboardInterrupt()), lambda argv: args)
    assert said == (f"stopped; {tmp_path} holds the run after 100 steps: --resume --out {tmp_path} "
                    "goes on\n")


def test_success(capsys):
    assert call(capsys, print, lambda argv: "done") == (0, "done\n", "")


def test_success_in_a_notebook(monkeypatch):
    """Its stdout is no TextIOWrapper."""
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    common.main(print, lambda argv: "done")
    assert screen.getvalue() == "done\n"


@pytest.mark.parametrize("file", [*METHODS, "linear_probe"])
def test_help_on_a_terminal_of_few_letters(monkeypatch, file):
    """As with PYTHONIOENCODING=cp1252, which has no Greek ones."""
    module = importlib.import_module(file)
    screen = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", screen)
    with pytest.raises(SystemExit) as end:
        common.main(raised(AssertionError), module.parse_args, ["--help"])
    screen.seek(0)
    assert end.value.code == 0 and "--max-images" in screen.read()


# ---- malicious files


class Call:
    """Pickled, it is a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", [
    Call(open, "executed", "w"), Call(os.system, "touch executed"),
    Call(eval, "open('executed', 'w')")])
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_weights_execute_nothing(call, kind):
    value = {"method": "simclr", "model": {"layer1.0.conv1.weight": call}}
    if kind == "pickle":
        Path("checkpoint.pth").write_bytes(pickle.dumps(value, protocol=2))
    else:
        torch.save(value, "checkpoint.pth", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(Failure, match="cannot read checkpoint.pth"):
        common.read_file("checkpoint.pth")
    assert not Path("executed").exists()
