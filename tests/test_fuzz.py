"""Damaged files by the thousand: no traceback, no hang, no wrong values, and nothing executed."""

import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from conftest import write_images
from PIL import Image, features
from test_run import in_process, same

import common
import linear_probe

pytestmark = pytest.mark.filterwarnings("error")  # would be lines on stderr
FORMATS = [".jpg", ".png", ".gif", ".bmp", ".tiff", ".ppm"] + [
    f".{kind}" for kind in ("webp", "avif") if features.check(kind)]
numbers = pytest.mark.parametrize("first, count", [
    (0, 60), *(pytest.param(n, 200, marks=pytest.mark.torture) for n in range(60, 2060, 200))])


def mutated(data, draw):
    """The bytes with one to three of the damages that disks, networks and editors do."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(max(1, len(data)))
        end = min(len(data), at + draw.choice((1, 4, 64, 4096)))
        other = draw.randrange(max(1, len(data)))
        damage = draw.choice("flip flip cut zero noise repeat drop insert move header".split())
        if damage == "flip" and data:
            data[at] ^= 1 << draw.randrange(8)
        elif damage == "cut":
            del data[at:]
        elif damage == "zero":
            data[at:end] = bytes(end - at)
        elif damage == "noise":
            data[at:end] = draw.randbytes(end - at)
        elif damage == "repeat":
            data[end:end] = data[at:end]
        elif damage == "drop":
            del data[at:end]
        elif damage == "insert":
            data[at:at] = draw.randbytes(draw.choice((1, 7, 512)))
        elif damage == "move":
            part = data[at:end]
            del data[at:end]
            data[other:other] = part
        elif data:
            data[min(draw.randrange(64), len(data) - 1)] = draw.randrange(256)
    return bytes(data)


def in_process_within(function, *arguments):
    assert in_process(function, *arguments) == 0, "a traceback, or a hang"


# ---- images


@numbers
def test_damaged_images(first, count):
    """Each is read, or named in the one line of those that were skipped."""
    write_images(Path("images"), 3)
    with Image.open("images/000.png") as image:
        for suffix in FORMATS:
            image.resize((48, 40)).save(f"whole{suffix}")
    for number in range(first, first + count):
        draw = random.Random(number)
        suffix = draw.choice(FORMATS)
        data = mutated(Path("whole" + suffix).read_bytes(), draw)
        Path(f"images/{number}{suffix}").write_bytes(data)
    in_process_within(read_images, count + 3)


def read_images(count):
    train, _ = common.load_data("images", image_size=32)
    images, aspect = next(train.batches([range(count)], torch.device("cpu")))
    assert len(images) == count and images.dtype == torch.uint8
    assert (aspect > 0).all() and aspect.isfinite().all()
    assert 0 < len(train.unreadable) < count  # mostly readable or mostly not: not much of a test


# ---- checkpoints


def checkpoint():
    """All kinds of values that a run's has."""
    generator = torch.Generator().manual_seed(0)
    model = {"backbone.layer1.0.conv1.weight": torch.randn(8, 3, 3, 3, generator=generator),
             "backbone.conv1.weight": torch.randn(8, 3, 3, 3, generator=generator),
             "count": torch.tensor(7), "half": torch.arange(9, dtype=torch.bfloat16)}
    return {"method": "simclr", "args": {"lr": 0.1, "data": None, "arch": "resnet8"}, "step": 3,
            "model": model, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(99)}},
                                          "param_groups": [{"lr": 0.1, "params": [0, 1]}]}}


@numbers
def test_damaged_checkpoints(tmp_path, first, count):
    """Each is refused in one line, or gives the values that were saved, to the last bit."""
    in_process_within(read_checkpoints, first, count)


def read_checkpoints(first, count):
    path, value, refused = Path("checkpoint.pth"), checkpoint(), 0
    common.save_file(path, value)
    data, weights = path.read_bytes(), linear_probe.read_backbone(path)
    for number in range(first, first + count):
        path.write_bytes(mutated(data, random.Random(number)))
        for read, expected in (common.read_file, value), (linear_probe.read_backbone, weights):
            try:
                assert same(read(path), expected), number
            except common.Failure as error:
                assert "checkpoint.pth" in str(error) and "\n" not in str(error), number
                refused += 1
    assert refused > count  # of twice as many readings


# ---- pickles that would run something


class Opens:
    def __reduce__(self):
        return open, ("executed", "w")


class Runs:
    def __reduce__(self):
        return os.system, ("touch executed",)


class Evaluates:
    def __reduce__(self):
        return eval, ("open('executed', 'w')",)


class Imports:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('executed').touch()",)


@pytest.mark.parametrize("kind", [Opens, Runs, Evaluates, Imports])
@pytest.mark.parametrize("save", ["zip", "legacy", "pickle"])
def test_malicious_files_execute_nothing(kind, save):
    value = {"method": "simclr", "args": {}, "model": {"backbone.layer1.0.conv1.weight": kind()}}
    if save == "pickle":
        Path("checkpoint.pth").write_bytes(pickle.dumps(value))
    else:
        torch.save(value, "checkpoint.pth", _use_new_zipfile_serialization=save == "zip")
    assert not Path("executed").exists()
    for read in common.read_file, linear_probe.read_backbone, linear_probe.load_backbone:
        with pytest.raises(common.Failure, match="checkpoint.pth"):
            read("checkpoint.pth")
    assert not Path("executed").exists()
