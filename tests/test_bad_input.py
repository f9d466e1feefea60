"""100 bad inputs by name: 30 image files, 20 folders, 20 command lines, 16 checkpoints, 14 events.

Each ends with at most one line on stderr, the documented exit status, and nothing overwritten."""

import os
import shutil
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image, features
from test_data import picture
from test_kill import SMALL, same, state
from test_run import OUT, TINY, assert_one_line, run, stopped, tree, undisturbed  # noqa: F401

import common

# common.py silences it, but pytest sets its own filters
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def read_images(capsys):
    """A run that ends when it has read the images below ./images -> exit status, stdout, stderr,
    training and test set"""
    sets, status = [], 0
    try:
        common.main(lambda argv: sets.extend(common.load_data("images", 16)), lambda argv: argv)
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr(), *(sets or (None, None))


# ---- image files


def saved(image, name="x.png", shown=None, **options):
    """A writer of a good file that shows the image, or what its format makes of it."""
    def write(folder):
        image.save(folder / name, **options)
        return (shown or image).convert("RGB")
    return write


def damaged(damage, name="x.jpg"):
    """A writer of a file that cannot be read: damage(bytes of a picture) -> bytes."""
    def write(folder):
        picture(64, 64).save(folder / name)
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
    return write


def levels(kind, factor, name):
    """All grays, in other numbers than 8 bits."""
    grays = np.arange(256).reshape(16, 16)
    return saved(Image.fromarray((grays * factor).astype(kind)), name,
                 Image.fromarray(grays.astype(np.uint8)))


def over_white(image):
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


EXIF = Image.Exif()
EXIF[0x0112] = 6  # the camera lay on its side
STORED = picture().transpose(Image.Transpose.ROTATE_90)
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (16, 16), "red")]}
GRAY, INKS = picture().convert("L"), picture().convert("CMYK")
RGBA, LA = Image.merge("RGBA", [*picture().split(), GRAY]), Image.merge("LA", [GRAY, GRAY])
MODERN = next(kind for kind in ("webp", "avif", "jpg") if kind == "jpg" or features.check(kind))
IMAGES = {  # -> a writer; what it returns is what the file must look like, None: to be left out
    "truncated body": damaged(lambda data: data[: len(data) // 2]),
    "truncated header": damaged(lambda data: data[:12]),
    "0 bytes": damaged(lambda data: b""),
    "text": damaged(lambda data: b"no image\n" * 99),
    "HTML": damaged(lambda data: b"<!DOCTYPE html><html><body>404</body></html>"),
    "random bytes": damaged(lambda data: np.random.default_rng(0).bytes(3000)),
    "bit flip": damaged(lambda data: data[:99] + bytes([data[99] ^ 8]) + data[100:], "x.png"),
    "CMYK": saved(INKS, "x.jpg", quality=95),
    "RGBA": saved(RGBA, shown=over_white(RGBA)),
    "P": saved(picture().quantize(32)),
    "transparent drawing": saved(Image.new("RGBA", (16, 16)),
                                 shown=Image.new("L", (16, 16), "white")),
    "L": saved(GRAY),
    "LA": saved(LA, shown=over_white(LA)),
    "1 bit": saved(picture().convert("1")),
    "16 bits": levels(np.uint16, 257, "x.png"),
    "12 bits of 16": levels(np.uint16, 4095 / 255, "x.png"),
    "float TIFF": levels(np.float32, 1 / 255, "x.tiff"),
    "EXIF rotation": saved(STORED, "x.jpg", picture(), exif=EXIF, quality=95, subsampling=0),
    "1 x 1": saved(Image.new("RGB", (1, 1), "lime")),
    "1 x 2000": saved(Image.new("RGB", (1, 2000), "lime")),
    "3000 x 1": saved(Image.new("RGB", (3000, 1), "lime")),
    "no known range": lambda folder: levels(np.float32, 1e6, "x.tiff")(folder) and None,
    "100 megapixels": saved(Image.new("1", (10_000, 10_000)), shown=Image.new("1", (16, 16))),
    "196 megapixels": lambda folder: Image.new("1", (14_000, 14_000)).save(folder / "x.png"),
    "animated GIF": saved(picture().quantize(32), "x.gif", **FRAMES),
    "animated PNG": saved(picture().quantize(32), **FRAMES),
    "AVIF or WebP": saved(picture(), f"x.{MODERN}", quality=95),
    "wrong extension": saved(picture(), "x.jpg", format="PNG"),
    "upper-case extension": saved(picture(), "x.PNG"),
    "broken colour profile": saved(picture(), icc_profile=b"broken"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_image_file(capsys, case):
    write_images(Path("images"), 3, size=(16, 16))
    shown = IMAGES[case](Path("images"))
    status, output, error, train, _ = read_images(capsys)
    assert (status, error) == (0, "")
    if shown is None:
        assert len(train) == 3 and "; 1 unreadable ('x." in output
        return
    (pixels, _), = train.load([[3]], torch.device("cpu"))
    difference = pixels[0].permute(1, 2, 0).numpy() - np.array(shown.resize((16, 16)), float)
    assert np.abs(difference).mean() < 4  # 0 but for lossy formats
    assert ("pages beyond the first" in output) == case.startswith("animated")


# ---- folders


def files(*names):
    """Makes small images of these names; of others, text."""
    def make():
        for i, name in enumerate(names):
            path = Path("images", os.fsdecode(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".png" and path.name[0] != ".":
                picture(16 + i, 16).save(path)
            else:
                path.write_text("text")
    return make


def then(make, change):
    return lambda: (make(), change())


NONE = "no training images below images"
FLAT = files("1.png", "2.png", "3.png")
PAIR = files("cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png")
FOLDERS = {  # -> what makes it; the images to train on or to hold out, or words of the error
    "empty": (lambda: os.mkdir("images"), NONE),
    "missing": (lambda: None, "images: no such folder"),
    "a file": (lambda: Path("images").write_text("text"), "images: no such folder"),
    "unreadable": (FLAT, NONE),
    "no images": (files("notes.txt", "more/table.csv"), NONE),
    "all classes empty": (lambda: [os.makedirs(f"images/{c}") for c in "ab"], NONE),
    "one class empty": (then(PAIR, lambda: os.mkdir("images/bird")), 4, 2),
    "flat": (FLAT, 3),
    "flat and classes": (then(PAIR, files("5.png", "6.png")), 6, 2),
    "one class": (files("cat/1.png", "cat/2.png", "cat/3.png"), 3),
    "nested": (files("a/b/c/1.png", "a/b/2.png", "a/d/e/3.png"), 3),
    "empty val": (then(files("train/a/1.png", "train/b/2.png"),
                       lambda: os.mkdir("images/val")), 2, 2),
    "hidden files": (then(FLAT, files("._1.png", ".DS_Store", "Thumbs.db", ".cache/4.png")), 3),
    "symlinked class": (then(PAIR, lambda: os.symlink("dog", "images/bird")), 4, 2),
    "symlink loop": (then(PAIR, lambda: os.symlink("..", "images/cat/loop")), 4, 2),
    "dangling link": (then(FLAT, lambda: os.symlink("nowhere", "images/4.png")), 3),
    "unicode": (then(PAIR, files("été 猫/1.png", "été 猫/2.png")), 6, 3),
    "newline": (then(PAIR, files("line\nbreak/1.png")), 5, 3),
    "not UTF-8": (then(PAIR, files(b"\xff\xfe/1.png")), 5, 3),
    "folder called x.png": (files("x.png/1.png", "x.png/2.png"), 2),
}


def refuse(folder):
    raise PermissionError(13, "Permission denied", folder)


@pytest.mark.parametrize("case", FOLDERS)
def test_folder(capsys, monkeypatch, case):
    make, expected, *classes = FOLDERS[case]
    make()
    if case == "unreadable":  # by others than root
        monkeypatch.setattr(os, "scandir", refuse)
    status, output, error, train, test = read_images(capsys)
    if isinstance(expected, str):
        return assert_one_line((status, output, error), 1, expected)
    assert (status, error) == (0, "") and output.replace("\n", "").isprintable()
    assert ("; 1 unreadable ('4.png')" in output) == (case == "dangling link")
    assert len(train) + (len(test) if test else 0) == expected
    assert len(train.classes) == (classes or [0])[0]


# ---- command lines


COMMAND_LINES = {  # -> script, flags, exit status, words
    "--data ''": ("simclr", ["--data", ""], 1, "--data"),
    "unknown flag": ("simclr", ["--unknown", "1"], 2, "--unknown"),
    "unknown architecture": ("simclr", ["-a", "resnet49"], 2, "resnet49"),
    "shortened flag": ("simclr", ["--temp", "0.5"], 2, "--temp"),
    "-1 epochs": ("simclr", ["--epochs", "-1"], 2, "--epochs"),
    "1.5 epochs": ("simclr", ["--epochs", "1.5"], 2, "--epochs"),
    "rate nan": ("simclr", ["--lr", "nan"], 2, "--lr"),
    "rate inf": ("simclr", ["--lr", "inf"], 2, "--lr"),
    "--out below a file": ("simclr", ["--out", "file/run"], 1, "file/run"),
    "one of several numbers": ("rotation", ["--lr-drops", "0.5", "nan"], 2, "--lr-drops"),
    "batch of 1": ("simclr", ["--batch_size=1"], 2, "--batch-size"),
    "batch larger than the set": ("simclr", ["-b", "26"], 1, "24 training images"),
    "stray word": ("simclr", ["stray"], 2, "stray"),
    "--init is no checkpoint": ("simclr", ["--init", "file"], 1, "file"),
    "no such recipe": ("simclr", ["--recipe", "large"], 2, "--recipe"),
    "temperature 0": ("simclr", ["--temperature", "0"], 2, "--temperature"),
    "mask ratio 1": ("mae", ["--mask-ratio", "1.0"], 2, "--mask-ratio"),
    "EMA momentum 2": ("byol", ["--ema-momentum", "2"], 2, "--ema-momentum"),
    "no such device": ("simclr", ["--device", "cuda:99"], 2, "cuda:99"),
    "--out is a file": ("simclr", ["--out", "file"], 1, "file"),
}


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_command_line(run, class_folders, case):
    method, flags, status, words = COMMAND_LINES[case]
    Path("file").write_text("text")
    before = tree()
    assert_one_line(run(method, *TINY, *flags), status, words)
    assert tree() == before


@pytest.mark.parametrize("device", ["meta", "hpu"])
def test_a_device_that_torch_knows_but_cannot_compute_on(run, class_folders, device):
    assert_one_line(run("simclr", *TINY, "--device", device), 2, f"--device {device}")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_says_it(run, class_folders, monkeypatch, rank):
    """torchrun ends the others, which are only later."""
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setenv("RANK", str(rank))
    for flags, status in (["--lr", "nan"], 2), (["--init", "none"], 1):
        assert_one_line(run("simclr", *TINY, *flags), status, flags[1])
    assert pauses == [10, 10] * rank


@pytest.mark.parametrize("batch, given, world, expected", [
    (8, True, 1, 8), (8, True, 3, None), (8, True, 8, None), (64, True, 1, None),
    (64, False, 1, 24), (64, False, 5, 20), (16, False, 3, 12), (64, False, 13, None)])
def test_batch_of_several_processes(monkeypatch, capsys, batch, given, world, expected):
    """Equal shares of two or more; a recipe's shrinks to them, one given by hand is an error."""
    monkeypatch.setattr(common, "world_size", lambda: world)
    args = Namespace(batch_size=batch, given=["batch_size"] * given)
    if expected:
        assert common.batch_that_fits(args, range(24)) == expected
        assert (f"--batch-size {expected}: " in capsys.readouterr().out) == (batch != expected)
    else:
        with pytest.raises(common.Failure, match=f"--batch-size {batch}: .* 24 .* {world} proc"):
            common.batch_that_fits(args, range(24))


# ---- checkpoints


class Malicious:
    def __reduce__(self):
        return open, ("executed", "w")


def edit(change):
    """What rewrites a checkpoint after change(its value)."""
    def rewrite(path):
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, path)
    return rewrite


def spoil_weights(checkpoint):
    for value in checkpoint["model"].values():
        value.fill_(float("nan") if value.is_floating_point() else 0)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda item: item.file_size)
    data[largest.header_offset + 1000] ^= 1  # among the largest tensor's values
    path.write_bytes(data)


def save(value):
    return lambda path: torch.save(value, path)


UNREADABLE, UNFIT = "cannot read run/checkpoint.pth", "run/checkpoint.pth does not fit"
FOREIGN = "run/checkpoint.pth holds no run of simclr.py"
CHECKPOINTS = {  # -> what is done to a run that stopped, words; None: it continues
    "missing": (os.remove, None),
    "0 bytes": (lambda path: path.write_bytes(b""), UNREADABLE),
    "text": (lambda path: path.write_text("no checkpoint"), UNREADABLE),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), UNREADABLE),
    "bit flip": (flip_a_bit, UNREADABLE),
    "malicious pickle": (save({"method": "simclr", "model": Malicious()}), UNREADABLE),
    "Namespace": (save({"state_dict": {}, "args": Namespace(arch="resnet50")}), FOREIGN),
    "other method": (edit(lambda c: c.update(method="byol")), FOREIGN),
    "a tensor": (save(torch.ones(3)), FOREIGN),
    "a backbone": (lambda path: shutil.copy("run/backbone.pth", path), FOREIGN),
    "other architecture": (edit(lambda c: c["args"].update(arch="resnet8")), UNFIT),
    "no optimizer": (edit(lambda c: c.pop("optimizer")), UNFIT),
    "NaN weights": (edit(spoil_weights), "weights are not finite"),
    "unknown keys": (edit(lambda c: c.update(extra=[1, 2])), None),
    "other images": (lambda path: os.remove("images/train/cat/000.png"), "not 23 images, "),
    "left-over temporary file": (lambda path: Path(f"{path}.tmp").write_bytes(b"half"), None),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoint(run, stopped, undisturbed, case):
    change, words = CHECKPOINTS[case]
    expected = undisturbed("simclr")
    stopped("simclr")
    change(Path("run/checkpoint.pth"))
    before = tree("run")
    flags = [*TINY, *SMALL["simclr"]] if case == "missing" else ["--device", "cpu"]
    result = run("simclr", *flags, *OUT, "--resume")
    assert not Path("executed").exists()
    if words:
        assert_one_line(result, 1, words)
        assert tree("run") == before
    else:
        found = state("run")
        assert result[::2] == (0, "") and found["files"] == expected["files"]
        assert found["step"] == 6 and same(found["backbone"], expected["backbone"])


# ---- events


SYSTEM = """
    test_kill.py::test_killed_at_a_point_of_saving
    test_kill.py::test_killed_in_mid_epoch_with_its_loader_processes
    test_kill.py::test_ctrl_c_ends_quietly
    test_kill.py::test_full_disk                                        at a checkpoint
    test_kill.py::test_full_disk                                        at a line of the log
    test_kill.py::test_lost_loader_process
    test_run.py::test_divergence                                        of the loss
    test_run.py::test_divergence                                        of the weights
    test_run.py::test_stopped_and_continued_equals_undisturbed          with a torn line of the log
    test_run.py::test_exit_status                                       out of memory
    test_run.py::test_folders_of_runs
    test_run.py::test_without_what_only_linux_has
    test_run.py::test_in_a_thread_of_another_program
    test_data.py::test_torchvision_failure_names_the_set                without a connection
""".split("\n")[1:-1]


def test_there_are_a_hundred():
    counts = [len(cases) for cases in (IMAGES, FOLDERS, COMMAND_LINES, CHECKPOINTS, SYSTEM)]
    assert counts == [30, 20, 20, 16, 14]
    for line in SYSTEM:
        file, name = line.split()[0].split("::")
        assert f"\ndef {name}(" in (Path(__file__).parent / file).read_text(), line
