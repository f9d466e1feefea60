"""What all tests share: one thread, a folder of their own, small image folders, processes."""

import inspect
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these tests are of the CPU; of a GPU: gpu_checks.py

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # two threads on two busy cores are slower than one

CLASSES = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "simsiam": "SimSiam", "swav": "SwAV",
           "barlow": "BarlowTwins", "dino": "DINO", "mae": "MAE", "rotation": "RotNet",
           "jigsaw": "Jigsaw"}
METHODS = [*CLASSES]


def pytest_configure(config):
    config.addinivalue_line("markers", "torture: long; run by `pytest -m torture`")
    config.option.markexpr = config.option.markexpr or "not torture"


@pytest.fixture(autouse=True)
def own_folder_and_seed(tmp_path, monkeypatch):
    """data/cache and runs/ of a test lie in its own temporary folder; each draws the same numbers
    every time."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def write_images(folder, count, size=(32, 32), seed=0, suffix=".png"):
    """`count` random smooth images."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        coarse = torch.randint(256, (4, 4, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(coarse.numpy()).resize(size, Image.Resampling.BICUBIC).save(
            folder / f"{i:03}{suffix}")


def run_linear_probe(argv, capsys):
    """-> exit status, stdout and stderr of the command."""
    import common  # here, since test_house.py looks at what a method file imports
    import linear_probe

    status = 0
    try:
        common.main(linear_probe.run, linear_probe.parse_args, argv)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def refusal(capsys):
    """-> a function: what argparse prints about flags that it refuses, with exit status 2."""
    def call(parse_args, flags):
        with pytest.raises(SystemExit) as end:
            parse_args(flags)
        assert end.value.code == 2
        return capsys.readouterr().err

    return call


@pytest.fixture
def class_folders(tmp_path):
    """train/ and val/ with two classes: 24 and 8 images of 32 x 32."""
    seed = 0
    for split, count in ("train", 12), ("val", 4):
        for name in "cat", "dog":
            write_images(tmp_path / "images" / split / name, count, seed=seed)
            seed += 1
    return tmp_path / "images"


@pytest.fixture
def no_report(monkeypatch):
    """Runs end without an evaluation."""
    import linear_probe  # here, since test_house.py looks at what a method file imports

    monkeypatch.setattr(linear_probe, "evaluate", lambda *args, **kwargs: {})


@pytest.fixture
def operations(monkeypatch, no_report):
    """What is done to views from here on: [(function of common.py, its arguments by name)]."""
    import common

    calls = []

    def record(name):
        function = getattr(common, name)

        def recorded(x, *args, **kwargs):
            given = inspect.signature(function).bind(x, *args, **kwargs).arguments.items()
            calls.append((name, {k: v for k, v in given if not isinstance(v, torch.Tensor)}))
            return function(x, *args, **kwargs)

        monkeypatch.setattr(common, name, recorded)

    for name in ("random_resized_crop", "random_horizontal_flip", "color_jitter", "gaussian_blur",
                 "random_grayscale", "random_solarize", "normalize"):
        record(name)
    return calls
