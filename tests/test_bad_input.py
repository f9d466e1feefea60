"""100 bad inputs by name: 30 image files, 20 folders, 20 command lines, 16 checkpoints, 14 events.

Each ends with at most one line on stderr, the documented exit status, and nothing overwritten."""

import ast
import os
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image, features
from test_run import (TINY, assert_one_line, flip_a_bit, old_signal_handlers,  # noqa: F401
                      quick_collection, run, state, stopped, tree, undisturbed, whole_run)

import common
import linear_probe

pytestmark = [pytest.mark.filterwarnings("error::FutureWarning"),
              pytest.mark.filterwarnings("error::DeprecationWarning"),
              # common.py silences it, but pytest sets its own filters
              pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")]


# ---- image files


def picture(size=(16, 16)):
    """A smooth picture that no turn or mirror leaves as it is."""
    coarse = np.random.default_rng(0).integers(40, 220, (3, 3, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def saved(image, name="x.png", shown=None, **options):
    """A writer of a good file that shows the image, or what its format makes of it."""
    def write(folder):
        image.save(folder / name, **options)
        return (shown or image).convert("RGB")
    return write


def damaged(damage, name="x.jpg"):
    """A writer of a file that cannot be read: damage(bytes of a picture) -> bytes."""
    def write(folder):
        picture((64, 64)).save(folder / name)
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
    return write


def refused(kind):
    def write(folder):
        Image.fromarray(np.ones((16, 16), kind)).save(folder / "x.tiff")
    return write


def sixteen_bits(folder):
    levels = np.arange(256).reshape(16, 16)
    Image.fromarray((levels * 257).astype(np.uint16)).save(folder / "x.png")
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def turned(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    stored = picture().transpose(Image.Transpose.ROTATE_90)
    stored.save(folder / "x.jpg", exif=exif, quality=95, subsampling=0)
    return picture()


def bomb(folder):
    Image.new("1", (14_000, 14_000)).save(folder / "x.png")


def other_extension(folder):
    picture().save(folder / "x.jpg", format="PNG")
    return picture()


def webp_or_avif(folder):
    kind = next(kind for kind in ("webp", "avif") if features.check(kind))
    picture().save(folder / f"x.{kind}", quality=95)
    return picture()


def animation(name):
    frames = [picture(), Image.new("RGB", (16, 16), "red")]
    return saved(frames[0].quantize(32), name, save_all=True, append_images=frames[1:])


def plain(*size):
    return Image.new("RGB", size, (10, 200, 60))


GRAY, INKS = picture().convert("L"), picture().convert("CMYK")
IMAGES = {  # -> a writer; what it returns is what the file must look like, None: to be skipped
    "truncated body": damaged(lambda data: data[: len(data) // 2]),
    "truncated header": damaged(lambda data: data[:12]),
    "0 bytes": damaged(lambda data: b""),
    "text": damaged(lambda data: b"no image\n" * 99),
    "HTML": damaged(lambda data: b"<!DOCTYPE html><html><body>404</body></html>"),
    "random bytes": damaged(lambda data: np.random.default_rng(0).bytes(3000)),
    "bit flip": damaged(lambda data: data[:99] + bytes([data[99] ^ 8]) + data[100:], "x.png"),
    "CMYK": saved(INKS, "x.jpg", quality=95),
    "RGBA": saved(Image.merge("RGBA", [*picture().split(), GRAY]), shown=picture()),
    "P": saved(picture().quantize(32)),
    "P with transparency": saved(picture().quantize(32), transparency=3),
    "L": saved(GRAY),
    "LA": saved(Image.merge("LA", [GRAY, GRAY]), shown=GRAY),
    "1 bit": saved(picture().convert("1")),
    "16 bits": sixteen_bits,
    "int32 TIFF": refused(np.int32),
    "float TIFF": refused(np.float32),
    "EXIF rotation": turned,
    "1 x 1": saved(plain(1, 1)),
    "1 x 2000": saved(plain(1, 2000)),
    "3000 x 1": saved(plain(3000, 1)),
    "5 x 5": saved(plain(5, 5)),
    "100 megapixels": saved(Image.new("1", (10_000, 10_000)), shown=Image.new("1", (16, 16))),
    "196 megapixels": bomb,
    "animated GIF": animation("x.gif"),
    "animated PNG": animation("x.png"),
    "AVIF or WebP": webp_or_avif,
    "wrong extension": other_extension,
    "upper-case extension": saved(picture(), "x.PNG"),
    "broken colour profile": saved(picture(), icc_profile=b"broken"),
}
FEW = ("--data images --recipe demo -a resnet8x0.25 -b 2 --epochs 1 --image-size 16 --workers 0 "
       "--out run").split()


@pytest.mark.parametrize("case", IMAGES)
def test_image_file(run, case):
    write_images(Path("images"), 3, size=(16, 16))
    shown = IMAGES[case](Path("images"))
    status, _, error = run("rotation", *FEW)
    assert status == 0
    if shown is None:
        assert error.startswith("warning: skipped 1 ") and "'x." in error
        assert error.count("\n") == 1 and len(error) < 300
        return
    assert error == ""
    train, _ = common.load_data("images", image_size=16)
    (pixels, _), = train.batches([[3]], torch.device("cpu"))
    shown = shown.resize((16, 16), Image.Resampling.BICUBIC)
    difference = pixels[0].permute(1, 2, 0).int() - torch.from_numpy(np.array(shown)).int()
    assert difference.abs().float().mean() < 4  # 0 but for lossy formats


# ---- folders


def files(*names):
    """Makes small images of these names; of others, text."""
    def make():
        for i, name in enumerate(names):
            path = os.path.join(b"images", name if isinstance(name, bytes) else name.encode())
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                if path.endswith(b".png") and b"._" not in path:
                    Image.new("RGB", (16, 16), (i, 90, 0)).save(file, "PNG")
                else:
                    file.write(b"text")
    return make


def then(make, change):
    return lambda: (make(), change())


FLAT = files("1.png", "2.png", "3.png")
PAIR = files("cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png")
FOLDERS = {  # -> what makes it; the images to train on or to hold out, or words of the error
    "empty": (lambda: os.mkdir("images"), "no images below images"),
    "missing": (lambda: None, "images: no such folder"),
    "a file": (lambda: Path("images").write_text("text"), "images is a file"),
    "unreadable": (FLAT, "cannot read folder"),
    "no images": (files("notes.txt", "more/table.csv"), "no images below images"),
    "all classes empty": (lambda: [os.makedirs(f"images/{c}") for c in "ab"], "no images below"),
    "one class empty": (then(PAIR, lambda: os.mkdir("images/bird")), 4),
    "flat": (FLAT, 3),
    "flat and classes": (then(PAIR, files("5.png", "6.png")), 6),
    "one class": (files("cat/1.png", "cat/2.png", "cat/3.png"), 3),
    "nested": (files("a/b/c/1.png", "a/b/2.png", "a/d/e/3.png"), 3),
    "train and val": (files("train/a/1.png", "train/a/2.png", "train/b/3.png", "val/a/4.png"), 3),
    "hidden files": (then(FLAT, files("._1.png", ".DS_Store", "Thumbs.db", ".cache/4.png")), 3),
    "symlinked class": (then(files("cat/1.png", "cat/2.png"), lambda: (
        shutil.copytree("images/cat", "elsewhere"), os.symlink("../elsewhere", "images/dog"))), 4),
    "symlink loop": (then(PAIR, lambda: os.symlink("..", "images/cat/loop")), 4),
    "dangling link": (then(FLAT, lambda: os.symlink("nowhere", "images/4.png")), 4),
    "unicode": (then(FLAT, files("été 猫/1.png", "été 猫/2.png")), 5),
    "newline": (then(FLAT, files("line\nbreak/1.png")), 4),
    "not UTF-8": (then(FLAT, files(b"\xff\xfe/1.png")), 4),
    "folder called x.png": (files("x.png/1.png", "x.png/2.png"), 2),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folder(run, monkeypatch, case):
    make, expected = FOLDERS[case]
    make()
    def scandir(folder, real=os.scandir):
        if case == "unreadable":  # root may read all folders
            raise PermissionError(13, "Permission denied", folder)
        return real(folder)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        result = run("rotation", *FEW)
    if isinstance(expected, str):
        assert_one_line(result, 1, "images", expected)
        assert not Path("run").exists()
        return
    assert result[0] == 0
    if case == "dangling link":
        assert result[2].startswith("warning: skipped 1 ") and "'4.png'" in result[2]
        assert result[2].count("\n") == 1
    else:
        assert result[2] == ""
    train, test = common.find_sets("images")
    held_out = len(test) if test and case != "train and val" else 0
    assert len(train) + held_out == expected
    assert train.classes == {"one class empty": ["cat", "dog"], "flat and classes": ["cat", "dog"],
                             "train and val": ["a", "b"], "symlinked class": ["cat", "dog"],
                             "symlink loop": ["cat", "dog"]}.get(case, [])


# ---- command lines


COMMAND_LINES = {  # -> script, flags, exit status, words
    "--data ''": ("simclr", ["--data", ""], 2, "--data"),
    "unknown flag": ("simclr", ["--unknown", "1"], 2, "--unknown"),
    "unknown architecture": ("simclr", ["-a", "resnet49"], 2, "resnet49"),
    "0 epochs": ("simclr", ["--epochs", "0"], 0, ""),
    "-1 epochs": ("simclr", ["--epochs", "-1"], 2, "--epochs"),
    "negative rate": ("simclr", ["--lr", "-1"], 2, "--lr"),
    "rate nan": ("simclr", ["--lr", "nan"], 2, "--lr"),
    "rate inf": ("simclr", ["--lr", "inf"], 2, "--lr"),
    "negative decay": ("simclr", ["--wd", "-1"], 2, "--wd"),
    "batch of 0": ("simclr", ["-b", "0"], 2, "--batch-size"),
    "batch of 1": ("simclr", ["--batch_size=1"], 2, "--batch-size"),
    "batch larger than the set": ("simclr", ["-b", "26"], 1, "24 training images"),
    "batch without equal shares": ("simclr", ["-b", "8"], 2, "--batch-size 8 gives 3 processes"),
    "-1 workers": ("simclr", ["-j", "-1"], 2, "--workers"),
    "image size 0": ("simclr", ["--image-size", "0"], 2, "--image-size"),
    "temperature 0": ("simclr", ["--temperature", "0"], 2, "--temperature"),
    "mask ratio 1": ("mae", ["--mask-ratio", "1.0"], 2, "--mask-ratio"),
    "EMA momentum 2": ("byol", ["--ema-momentum", "2"], 2, "--ema-momentum"),
    "no CUDA": ("simclr", ["--device", "cuda:99"], 2, "cuda:99"),
    "--out is a file": ("simclr", ["--out", "file"], 1, "--out file is not a folder"),
}


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_command_line(run, class_folders, monkeypatch, case):
    method, flags, status, words = COMMAND_LINES[case]
    Path("file").write_text("text")
    if case == "batch without equal shares":
        monkeypatch.setenv("WORLD_SIZE", "3")
    before = tree()
    result = run(method, *TINY, *flags)
    if status:
        assert_one_line(result, status, words)
        assert {k: v for k, v in tree().items() if not k.startswith("data/")} == before
    else:
        assert result[::2] == (0, "")


def test_out_that_cannot_be_written(run, class_folders):
    """Below a file; in /proc not even root may."""
    Path("file").write_text("text")
    for out in "file/run", "/proc/run":
        assert_one_line(run("simclr", *TINY, "--out", out), 1, out)


# ---- checkpoints


class Malicious:
    def __reduce__(self):
        return open, ("executed", "w")


def edit(change):
    """What rewrites run/checkpoint.pth after change(its value)."""
    def rewrite():
        checkpoint = torch.load("run/checkpoint.pth", weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, "run/checkpoint.pth")
    return rewrite


def spoil_weights(checkpoint):
    for value in checkpoint["model"].values():
        value.fill_(float("nan") if value.is_floating_point() else 0)


def write(data):
    return lambda: Path("run/checkpoint.pth").write_bytes(data)


def cut():
    path = Path("run/checkpoint.pth")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def save(value):
    return lambda: torch.save(value, "run/checkpoint.pth")


CHECKPOINTS = {  # -> what is done to a run that stopped, further flags, words; None: it continues
    "missing": (lambda: os.remove("run/checkpoint.pth"), [], None),
    "0 bytes": (write(b""), [], "damaged"),
    "text": (write(b"no checkpoint"), [], "damaged"),
    "truncated": (cut, [], "damaged"),
    "bit flip": (lambda: flip_a_bit(Path("run/checkpoint.pth")), [], "damaged"),
    "malicious pickle": (save({"method": "simclr", "model": Malicious()}), [], "damaged"),
    "Namespace": (save({"state_dict": {}, "args": Namespace(arch="resnet50")}), [], "holds no run"),
    "other method": (edit(lambda c: c.update(method="byol")), [], "method: byol"),
    "other architecture": (lambda: None, ["-a", "resnet18"], "--arch resnet8"),
    "other image size": (lambda: None, ["--image-size", "40"], "--image-size 32"),
    "NaN weights": (edit(spoil_weights), [], "nan"),
    "a backbone": (lambda: shutil.copy("run/backbone.pth", "run/checkpoint.pth"), [],
                   "holds no run"),
    "unknown keys": (edit(lambda c: c.update(extra=[1, 2])), [], None),
    "other images": (lambda: os.remove("images/train/cat/000.png"), [], "other images"),
    "other rate and batch": (lambda: None, ["--lr", "0.7", "-b", "4"], "use another --out"),
    "left-over temporary file": (lambda: Path("run/checkpoint.pth.7.tmp").write_bytes(b"half"), [],
                                 None),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoint(run, stopped, undisturbed, case):
    change, flags, words = CHECKPOINTS[case]
    expected = undisturbed("simclr")
    stopped("simclr")
    change()
    before = tree("run")
    result = run("simclr", *TINY, "--out", "run", "--resume", *flags)
    assert not Path("executed").exists()
    if words is None:
        assert result[::2] == (0, "")
        found = state(Path("run"))
        if case == "missing":  # it starts afresh, which ends alike
            assert found["step"] == 6
        assert found["files"] == expected["files"]
        assert torch.equal(found["backbone"]["conv1.weight"], expected["backbone"]["conv1.weight"])
    else:
        assert_one_line(result, 1, words)
        assert tree("run") == before


INCOMPLETE = ("method", "args", "step", "images", "log", "report", "model", "optimizer")


@pytest.mark.parametrize("key", INCOMPLETE)
@pytest.mark.parametrize("change", ["without", "other"])
def test_checkpoint_of_another_form(run, stopped, key, change):
    """Checksums are right, but something is missing, or is not what it should be."""
    stopped("simclr")
    edit(lambda c: c.pop(key) if change == "without" else c.update({key: ["other"]}))()
    before = tree("run")
    result = run("simclr", *TINY, "--out", "run", "--resume")
    assert_one_line(result, 1, "run/checkpoint.pth")
    assert tree("run") == before


@pytest.mark.parametrize("file", ["0 bytes", "text", "malicious pickle"])
def test_weights_to_start_from(run, class_folders, capsys, file):
    """--init, and the probe's --checkpoint."""
    os.mkdir("run")
    CHECKPOINTS[file][0]()
    assert_one_line(run("simclr", *TINY, "--init", "run/checkpoint.pth"), 1, "run/checkpoint.pth")
    with pytest.raises(SystemExit) as end:
        common.main(linear_probe.run, linear_probe.parse_args,
                    ["--checkpoint", "run/checkpoint.pth", "--data", "images"])
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.count("\n") == 1 and "run/checkpoint.pth" in error
    assert not Path("executed").exists() and not Path("runs").exists()


# ---- events


SYSTEM = {  # -> the test
    "kill -9": "test_kill.py::test_killed_at_a_point_of_saving",
    "SIGTERM": "test_kill.py::test_signal",
    "SIGTERM to the group": "test_kill.py::test_signal",
    "SIGINT": "test_kill.py::test_signal",
    "second SIGINT": "test_kill.py::test_second_ctrl_c",
    "disk full at a checkpoint": "test_kill.py::test_full_disk",
    "disk full at the log": "test_kill.py::test_full_disk",
    "loader process killed": "test_run.py::test_killed_loader_process",
    "loader process raises": "test_kill.py::test_loader_process_that_raises",
    "NaN loss": "test_run.py::test_loss_that_is_not_finite",
    "torn log line": "test_run.py::test_killed_in_the_middle",
    "one process of several dies": "test_kill.py::test_one_process_of_two_dies",
    "out of memory": "test_run.py::test_out_of_memory",
    "two runs in one folder": "test_run.py::test_two_processes_on_one_folder",
}


def test_events_have_their_tests():
    for case, test in SYSTEM.items():
        file, name = test.split("::")
        source = ast.parse((Path(__file__).parent / file).read_text())
        assert name in {f.name for f in source.body if isinstance(f, ast.FunctionDef)}, case


def test_there_are_a_hundred():
    counts = [len(cases) for cases in (IMAGES, FOLDERS, COMMAND_LINES, CHECKPOINTS, SYSTEM)]
    assert counts == [30, 20, 20, 16, 14]
