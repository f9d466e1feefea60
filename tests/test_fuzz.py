"""Damaged files by the thousand: no traceback, no hang, no wrong values, and nothing executed."""

import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from conftest import write_images
from PIL import Image, features
from processes import run_processes
from test_kill import same

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
        at = draw.randrange(draw.choice((64, len(data) + 1, len(data) + 1)))  # often in the header
        part = data[at : at + draw.choice((1, 4, 64, 4096))]
        damage = draw.choice("flip flip cut zero noise repeat drop insert move".split())
        if damage == "cut":
            del data[at:]
        elif damage == "move":
            del data[at : at + len(part)]
            other = draw.randrange(len(data) + 1)
            data[other:other] = part
        else:
            flipped = bytes(byte ^ 1 << draw.randrange(8) for byte in part[:1]) + part[1:]
            data[at : at + len(part)] = {
                "flip": flipped, "zero": bytes(len(part)), "noise": draw.randbytes(len(part)),
                "repeat": part * 2, "drop": b"",
                "insert": draw.randbytes(draw.choice((1, 7, 512))) + part}[damage]
    return bytes(data)


# ---- images


@numbers
def test_damaged_images(first, count):
    """Each is read, or left out and counted in the one line of the set."""
    write_images(Path("images"), 3)
    with Image.open("images/000.png") as image:
        for suffix in FORMATS:
            image.resize((48, 40)).save(f"whole{suffix}")
    for number in range(first, first + count):
        draw = random.Random(number)
        suffix = draw.choice(FORMATS)
        data = mutated(Path("whole" + suffix).read_bytes(), draw)
        Path(f"images/{number}{suffix}").write_bytes(data)
    run_processes(1, read_images, os.getcwd(), count + 3)  # where it may hang or die


def read_images(folder, count):
    os.chdir(folder)
    train, _ = common.load_data("images", image_size=32)
    images, aspect = next(train.load([range(len(train))], torch.device("cpu")))
    assert images.dtype == torch.uint8 and (aspect > 0).all() and aspect.isfinite().all()
    assert f"; {count - len(train)} unreadable (" in "; ".join(["", *train.left_out])
    assert 3 < len(train) < count  # all readable or none: not much of a test


# ---- checkpoints


def checkpoint():
    """All kinds of values that a run's has."""
    backbone = common.make_backbone("resnet8x0.25", 32).state_dict()
    model = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
    return {"method": "simclr", "args": {"lr": 0.1, "data": None, "out": "run"}, "step": 3,
            "model": model | {"half": torch.arange(9, dtype=torch.bfloat16)}, "images": 24,
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(99)}},
                          "param_groups": [{"lr": 0.1, "params": [0, 1]}]}}


def weights(path):
    return linear_probe.load_backbone(path)[0].state_dict()


@numbers
def test_damaged_checkpoints(first, count):
    """Each is refused in one line, or gives the values that were saved, to the last bit."""
    run_processes(1, read_checkpoints, os.getcwd(), first, count)


def read_checkpoints(folder, first, count):
    os.chdir(folder)
    path, value, refused = Path("checkpoint.pth"), checkpoint(), 0
    common.save_file(path, value)
    data, expected_weights = path.read_bytes(), weights(path)
    for number in range(first, first + count):
        path.write_bytes(mutated(data, random.Random(number)))
        for read, expected in (common.read_file, value), (weights, expected_weights):
            try:
                assert same(read(path), expected), number
            except common.Failure as error:
                assert "checkpoint.pth" in str(error) , number
                refused += 1
    assert refused > count  # of twice as many readings


# ---- pickles that would run something


class Calls(list):
    def __reduce__(self):
        return tuple(self)


@pytest.mark.parametrize("call", [
    (open, ("executed", "w")), (os.system, ("touch executed",)),
    (eval, ("open('executed', 'w')",)), (exec, ("open('executed', 'w')",))])
@pytest.mark.parametrize("save", ["zip", "legacy", "pickle"])
def test_malicious_files_execute_nothing(call, save):
    value = {"method": "simclr", "args": {}, "model": {"layer1.0.conv1.weight": Calls(call)}}
    if save == "pickle":
        Path("checkpoint.pth").write_bytes(pickle.dumps(value))
    else:
        torch.save(value, "checkpoint.pth", _use_new_zipfile_serialization=save == "zip")
    for read in common.read_file, weights:
        with pytest.raises(common.Failure, match="checkpoint.pth"):
            read("checkpoint.pth")
    assert not Path("executed").exists()
