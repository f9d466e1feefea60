"""What a run leaves, what becomes of it when it is stopped and continued, and inside a program."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import METHODS, ROOT, write_images
from PIL import Image
from processes import run_processes
from test_kill import SMALL, TIMINGS, same, state
from torch import nn

import common
import linear_probe

pytestmark = [pytest.mark.filterwarnings("error::FutureWarning"),
              pytest.mark.filterwarnings("error::DeprecationWarning")]
all_methods = pytest.mark.parametrize("method", METHODS)
# What common.py does for any method is tested with the first one, and in the torture with all.
every_method = pytest.mark.parametrize("method", METHODS[:1] + [
    pytest.param(method, marks=pytest.mark.torture) for method in METHODS[1:]])

# 24 training images: three steps per epoch, log lines at steps 1, 2, 3, 4 and 6
TINY = ("--data images --recipe demo -b 8 --epochs 2 --image-size 32 --workers 0 -p 2 "
        "--device cpu").split()
OUT = ["--out", "run"]


@pytest.fixture
def run(capsys, monkeypatch):
    """run(method, *flags) -> exit status, stdout, stderr; with report=False without the report at
    the end, which takes longer than the training"""
    def start(method, *flags, report=False):
        if not report:
            monkeypatch.setattr(linear_probe, "evaluate", lambda *a, **k: {})
        module, status = importlib.import_module(method), 0
        small = [] if {"-a", "--resume"} & {*flags} else SMALL[method]
        capsys.readouterr()
        try:
            common.main(module.train, module.parse_args, [*small, *flags])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return start


def assert_one_line(result, status, *words):
    assert result[0] == status and result[2].count("\n") == 1, result[2]
    assert result[2].startswith("error: ") and len(result[2]) < 520
    for word in words:
        assert word in result[2], result[2]


def load(path):
    return torch.load(path, weights_only=True)


def lines(folder="run"):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def tree(folder="."):
    return {str(p): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def watch(patch, before=lambda step: None):
    """Calls before(step) ahead of steps 1, 2, ... -> the batches of images, as they come"""
    batches, seen = common.batches, []

    def watched(*arguments):
        for step, images, aspect in batches(*arguments):
            before(step + 1)
            seen.append(images)
            yield step, images, aspect

    patch.setattr(common, "batches", watched)
    return seen


def interrupted(run, step, *flags):
    """A run in ./run that Ctrl-C ends before this step; it is saved after each step."""
    def interrupt(found):
        if found == step:
            raise KeyboardInterrupt

    save = common.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "save_checkpoint", lambda *a: save(*a) - 1000)  # seconds ago
        watch(patch, interrupt)
        assert run(*flags, *TINY, *OUT)[::2] == (130, "")
    assert load("run/checkpoint.pth")["step"] == step - 1


KEPT = {}


def once(folder, make, *key):
    """What make() writes into this folder; many tests start from the same runs."""
    if (folder, key) not in KEPT:
        make()
        KEPT[folder, key] = tree(folder)
    Path(folder).mkdir(exist_ok=True)
    for path, data in KEPT[folder, key].items():
        Path(path).write_bytes(data)


@pytest.fixture
def undisturbed(run, class_folders):
    """undisturbed(method, *flags): state of a run from start to end, in ./undisturbed"""
    def finished(*flags):
        once("undisturbed", lambda: run(*flags, *TINY, "--out", "undisturbed"), flags)
        return state("undisturbed")

    return finished


@pytest.fixture
def stopped(run, class_folders):
    """stopped(method, *flags): a run in ./run that stopped after step 2 of 6"""
    return lambda *flags: once("run", lambda: interrupted(run, 3, *flags), flags)


# ---- what a run leaves


@every_method
def test_files_of_a_run(run, class_folders, method):
    status, output, error = run(method, *TINY, report=True)
    assert (status, error) == (0, "")
    folder = Path("runs", method)
    files = {path.name for path in folder.iterdir()}
    assert {n for n in files if n[-3:] != "png"} == {"checkpoint.pth", "backbone.pth", "log.jsonl"}
    with Image.open(folder / "views.png") as views:
        assert min(views.size) > 128 and len(views.getcolors(2**20)) > 100

    saved, backbone = load(folder / "checkpoint.pth"), load(folder / "backbone.pth")
    assert {"method", "recipe", "args", "model", "optimizer", "step"} <= saved.keys()
    assert (saved["method"], saved["step"], saved["recipe"]) == (method, 6, "demo")
    assert saved["args"]["recipe"] == "demo" and saved["args"]["batch_size"] == 8
    assert backbone and not any(k.startswith(("fc.", "module.", "backbone.")) for k in backbone)
    for key, tensor in backbone.items():
        assert any(same(tensor, v) for k, v in saved["model"].items() if k.endswith(key)), key

    *training, report = lines(folder)
    assert [(line["step"], line["epoch"]) for line in training] == [
        (1, 1), (2, 1), (3, 1), (4, 2), (6, 2)]
    assert all({"loss", "lr", *TIMINGS} < line.keys() for line in training)  # and a health number
    assert all(line["images_per_s"] > 0 for line in training)
    assert report["step"] == 6 and report["report"].keys() >= {"trained", "random", "pixels"}
    for row in "trained", "random", "pixels":
        assert 0 <= report["report"][row]["knn"] <= 100 and f"  {row}\n" in output
    assert output.count("kNN") >= 3 and f"--recipe demo, --out runs/{method}\n" in output
    for part in "epoch 2/2", "step 2/6", "chance", "images/s", f"{training[0]['loss']:.4f}":
        assert part in output, part


@all_methods
def test_first_line_is_near_chance(run, class_folders, method):
    output = run(method, *TINY, "--epochs", "1", "--lr", "0")[1]
    words = output[output.index("step 1/3"):].split()
    loss, chance = float(words[3]), float(words[5].strip("()"))
    low = 0 if method == "moco" else 0.3  # the queue is noise at first
    assert low * chance - 0.1 < loss < 3 * chance + 0.1  # SimSiam's chance is 0


@every_method
@pytest.mark.parametrize("image_size", [32, 72])
def test_backbone_loads_into_torchvision(run, tmp_path, method, image_size):
    if method == "mae":
        pytest.skip("has ViTs only")
    write_images(tmp_path / "images", 8)
    flags = ["--image-size", str(image_size), "-a", "resnet18", "--epochs", "1"]
    assert run(method, *TINY, *flags)[0] == 0
    weights, theirs = load(f"runs/{method}/backbone.pth"), torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    if image_size == 32:
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    theirs.load_state_dict(weights)
    ours = common.make_backbone("resnet18", image_size).eval()
    ours.load_state_dict(weights)
    assert not torch.equal(weights["bn1.running_var"], torch.ones(64))  # trained
    x = torch.randn(2, 3, image_size, image_size)
    torch.testing.assert_close(ours(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


# ---- inside another program, and on other systems


def test_in_a_thread_of_another_program(class_folders):
    """It raises and does not exit, and leaves no signal handler, folder, thread behind."""
    import simclr

    def surroundings():
        handlers = [signal.getsignal(number) for number in signal.valid_signals()]
        return handlers, sys.excepthook, os.getcwd(), torch.get_num_threads(), threading.enumerate()

    def work():
        try:
            simclr.train(simclr.parse_args([*TINY, *SMALL["simclr"], *OUT]))
        except common.Failure as error:
            failures.append(str(error))

    before, failures = surroundings(), []
    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
        assert surroundings() == before and "report" in lines()[-1]
    assert failures == ["--out run holds a run: add --resume, or choose another folder"]


def test_without_what_only_linux_has(class_folders):
    """As a script, where warnings of what will vanish are errors."""
    code = """if True:
        import os, runpy, signal, sys, torch, torchvision, warnings
        sys.modules |= dict.fromkeys(["fcntl", "resource", "pwd", "grp", "termios"])
        del os.sysconf, os.fork, os.killpg, os.setsid, signal.SIGKILL
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        torch.set_num_threads(1)
        sys.argv.pop(0)
        runpy.run_path(sys.argv[0], run_name="__main__")
    """
    arguments = [str(ROOT / "simclr.py"), *TINY, *SMALL["simclr"], *OUT]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "") and "  trained\n" in done.stdout


# ---- stopped and continued


@pytest.mark.parametrize("method, step", [
    pytest.param(method, step, marks=pytest.mark.torture if step != 2 + i % 4 or i % 2 else ())
    for i, method in enumerate(METHODS) for step in range(1, 7)])
def test_stopped_and_continued_equals_undisturbed(run, undisturbed, monkeypatch, method, step):
    """With other --workers, the images decoded anew for each batch, and a torn log line."""
    expected = undisturbed(method)
    interrupted(run, step, method)
    with open("run/log.jsonl", "a") as log:
        log.write('{"step": 5, "lo')
    monkeypatch.setattr(common, "free_memory", lambda device: 0)
    monkeypatch.setattr(common.ImageSet, "workers", 1)  # small sets are given none
    output = run(method, *OUT, "--resume", "--workers", "1", "--device", "cpu")[1]
    assert f"continuing run after step {step - 1}; changed: nothing\n" in output
    assert same(state("run"), expected)


@every_method
def test_seed_order_and_streaming(run, undisturbed, monkeypatch, method):
    """Each epoch shows each image once, in an order of its own; another seed, other weights."""
    expected, seen = undisturbed(method), watch(monkeypatch)
    monkeypatch.setattr(common, "free_memory", lambda device: 0)
    monkeypatch.setattr(common.ImageSet, "workers", 2)
    assert run(method, *TINY, *OUT)[::2] == (0, "")
    assert same(state("run"), expected)
    one, two = torch.cat(seen).flatten(1).long().sum(1).view(2, 24).tolist()
    assert sorted(one) == sorted(two) and len({*one}) == 24 and one != two
    assert run(method, *TINY, "--out", "other", "--seed", "1")[0] == 0
    assert not same(load("other/backbone.pth"), expected["backbone"])


def test_flags_given_on_resuming_win_and_are_named(run, stopped):
    stopped("simclr", "--lr", "0.05", "--no-deterministic")
    flags = "--epochs 4 --lr 0.2 -p 1 -b 8 --data images".split()
    output = run("simclr", *OUT, "--resume", *flags)[1]
    assert "after step 2; changed: --epochs --lr --print-freq\n" in output
    args = load("run/checkpoint.pth")["args"]
    assert (args["epochs"], args["lr"], args["arch"]) == (4, 0.2, "resnet8x0.25")
    assert [line["step"] for line in lines()[:-1]] == [*range(1, 13)]
    before = tree("run")
    shutil.copytree("images", "others")  # as many images, of other names
    os.rename("others/train/cat/000.png", "others/train/cat/zero.png")
    for flag, value, words in (("--epochs", "3", "--epochs 3: "), ("-a", "resnet8", "does not fit"),
                               ("--max-images", "16", "not 16 images, "),
                               ("--data", "others", "run was trained on 24 images, "),
                               ("--recipe", "cifar", "--recipe cifar: the run in run has demo"),
                               ("--wd", "0.3", "--weight-decay 0.3: the run in run has 0.0005"),
                               ("-b", "26", "--batch-size 26: there are"),
                               ("-b", "12", "--batch-size 12: the run in run has 8"),
                               ("--optimizer", "lars", "--optimizer lars: the run in run has")):
        assert_one_line(run("simclr", *OUT, "--resume", flag, value), 1, words)
        assert tree("run") == before
    before = state("run")  # once finished, it is only evaluated again
    assert "loss" not in run("simclr", *OUT, "--resume")[1] and same(state("run"), before)


def test_resume_alone_continues_the_latest_run_with_its_flags(run, undisturbed):
    flags = ["--wd", "0.01", "--max-images", "16", "--seed", "3", "--deterministic"]
    try:
        expected = undisturbed("simclr", *flags)
        assert run("simclr", *TINY, "--epochs", "1", "--out", "runs/simclr-2")[0] == 0
        interrupted(run, 2, "simclr", *flags)
        shutil.move("run", "runs/simclr")
        assert_one_line(run("simclr", *TINY, "--init", "missing.pth"), 1, "missing.pth")
        torch.use_deterministic_algorithms(False)
        assert run("simclr", "--resume", "--device", "cpu")[::2] == (0, "")
        assert torch.are_deterministic_algorithms_enabled() and len(os.listdir("runs")) == 2
        assert same(state("runs/simclr"), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_folders_of_runs(run, class_folders):
    """The next free one; --resume where there is nothing; one that holds a run; 0 epochs."""
    flags = [*TINY, "--epochs", "0"]
    for folder, *more in ["simclr", "--resume"], ["simclr-2"], ["simclr-3", "--seed", "1"]:
        assert run("simclr", *flags, "-a", "resnet8x0.25", *more)[::2] == (0, "")
        assert load(f"runs/{folder}/checkpoint.pth")["step"] == 0
    assert len(os.listdir("runs")) == 3
    a, b, c = (load(f"runs/simclr{number}/backbone.pth") for number in ("", "-2", "-3"))
    assert same(a, b) and not same(a, c)
    before = tree()
    assert_one_line(run("simclr", *TINY, "--out", "runs/simclr"), 1, "runs/simclr", "--resume")
    assert_one_line(run("byol", "--out", "runs/simclr", "--resume"), 1, "no run of byol.py")
    assert tree() == before


def test_two_runs_that_start_together_do_not_share_a_folder(run, class_folders, monkeypatch):
    """The other one has made it since this one's name was chosen."""
    load_data = common.load_data
    monkeypatch.setattr(common, "load_data", lambda *args: (
        os.makedirs("runs/simclr"), load_data(*args))[1])
    assert_one_line(run("simclr", *TINY), 1, "runs/simclr")


# ---- beginnings


def test_to_resume_the_init_file_is_not_needed(run, undisturbed):
    expected = undisturbed("simclr")
    shutil.copy("undisturbed/backbone.pth", "start.pth")
    interrupted(run, 3, "simclr", "--init", "start.pth")
    os.remove("start.pth")
    assert run("simclr", *OUT, "--resume")[::2] == (0, "")
    assert not same(load("run/backbone.pth"), expected["backbone"])


@every_method
def test_init(run, undisturbed, method):
    expected = undisturbed(method)["backbone"]
    for file in "backbone.pth", "checkpoint.pth":
        flags = ["--init", f"undisturbed/{file}", "--seed", "7", "--epochs", "0"]
        assert run(method, *TINY, *flags, "--out", file)[::2] == (0, "")
        assert same(load(f"{file}/backbone.pth"), expected)
    other = "vit_tiny" if method == "mae" else "resnet18"
    assert_one_line(run(method, *TINY, *flags, "-a", other), 1, "undisturbed/checkpoint.pth")


@pytest.mark.parametrize("count", [1, 2, 16])
def test_few_images_without_labels(run, tmp_path, count):
    """Fewer than views.png has rows; and no accuracy, but what to do next."""
    write_images(tmp_path / "images", count)
    result = run("simclr", *TINY, "-b", "2", report=True)
    if count == 1:
        return assert_one_line(result, 1, "1 training images")
    assert result[::2] == (0, "") and Path("runs/simclr/views.png").exists()
    assert "linear_probe.py --neighbours" in result[1] and "nan" not in result[1]
    assert lines("runs/simclr")[-1]["report"] == {}


@pytest.mark.parametrize("side, recipe", [(24, "cifar"), (64, "cifar"), (65, "imagenet")])
def test_recipe_on_a_gpu_is_that_of_the_images(monkeypatch, side, recipe):
    write_images(Path("images"), 3, size=(side, 2 * side))
    chosen = importlib.import_module("simclr").parse_args
    assert chosen(["--data", "images", "--device", "cpu"]).recipe == "demo"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = chosen(["--data", "images", "--lr", "0.3"])
    assert (args.recipe, args.lr) == (recipe, 0.3) and args.arch != "resnet8"
    assert chosen(["--data", "cifar10"]).recipe == "cifar" and chosen([]).recipe == "demo"
    assert chosen(["--data", "images", "--recipe", "demo"]).arch == "resnet8"


@every_method
def test_help(run, method):
    status, output, error = run(method, "--help")
    output = " ".join(output.split())
    assert (status, error) == (0, "")
    places = [output.rindex(part) for part in (
        "data: --data", "--max-images", "run: --recipe", "--print-freq", "method: --")]
    assert places == sorted(places)
    if method == "simclr":
        assert "softmax temperature, τ; default 0.2 (recipe demo); paper 0.1" in output
        output = run(method, "--help", "--recipe", "cifar")[1]
        assert "default 0.5 (recipe cifar)" in " ".join(output.split())


# ---- what goes wrong


@pytest.mark.parametrize("error, status, text", [
    (KeyboardInterrupt(), 130, ""), (common.Failure("two\nlines"), 1, "error: two lines\n"),
    (OSError(28, "No space left", "x"), 1, "error: [Errno 28] No space left: 'x'\n"),
    (MemoryError(), 1, "error: out of memory\n"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: CUDA out of memory\n")])
def test_exit_status(capsys, error, status, text):
    def fail(args):
        raise error

    with pytest.raises(SystemExit) as end:
        common.main(fail, lambda argv: None)
    assert (end.value.code, capsys.readouterr().err) == (status, text)
    with pytest.raises(SystemExit):
        common.main(lambda args: torch.empty(2**60), lambda argv: None)
    assert "memory" in capsys.readouterr().err
    with pytest.raises(RuntimeError):  # a mistake of ours: its traceback is wanted
        common.main(lambda args: torch.ones(2) @ torch.ones(3), lambda argv: None)


@every_method
@pytest.mark.parametrize("last, words", [
    (4, "loss is nan at step 6"), (6, "weights are not finite at step 6")])
def test_divergence(run, class_folders, monkeypatch, method, last, words):
    """The run stops at the next log line or save; its last good checkpoint stays."""
    module, models, write = importlib.import_module(method), [], common.log
    make = module.make_optimizer

    def keep(*arguments):
        models.extend(a for a in arguments if isinstance(a, nn.Module))
        return make(*arguments)

    def log_and_spoil(args, done, *arguments, **health):
        write(args, done, *arguments, **health)
        if done == last:
            with torch.no_grad():
                next(models[0].parameters()).fill_(float("nan"))

    monkeypatch.setattr(module, "make_optimizer", keep)
    monkeypatch.setattr(common, "log", log_and_spoil)
    assert_one_line(run(method, *TINY, *OUT), 1, words, "--lr")
    saved = load("run/checkpoint.pth")
    assert saved["step"] == 3 and all(v.isfinite().all() for v in saved["model"].values())
    assert "NaN" not in Path("run/log.jsonl").read_text()


# ---- several processes


def read_by_a_share(folder):
    os.chdir(folder)
    train, test = common.load_data("images", 32)
    images, aspect = next(train.load([range(len(train))], torch.device("cpu")))
    return images.tolist(), aspect.tolist(), train.labels.tolist(), len(test)


def test_processes_share_the_decoding(class_folders, tmp_path):
    """There may be fewer test images than processes."""
    for name in "train/cat/000.png", "train/cat/001.png":
        (class_folders / name).write_text("no image")
    shutil.rmtree(class_folders / "val")
    write_images(class_folders / "val" / "dog", 1)
    one, *others = run_processes(3, read_by_a_share, str(tmp_path))
    assert [one, one, read_by_a_share(tmp_path)] == [*others, one] and len(one[2]) == 22 and one[3] == 1
