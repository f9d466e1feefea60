"""What the project promises of its files: readable in order, and usable alone."""

import ast
import importlib
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import CLASSES, METHODS, ROOT, write_images
from processes import run_processes
from torch import nn
from torchvision.transforms import v2

FILES = {"common", "linear_probe", *METHODS}
SECTIONS = ["- model\n", "- loss\n", "- augmentation\n", "- training\n", "\nRECIPES = {",
            "def parse_args(", "# Departures", "if __name__"]


def source(name):
    return (ROOT / f"{name}.py").read_text()


def imported(name):
    """-> {module: whether the file itself imports it, and not only a function in it}"""
    tree = ast.parse(source(name))
    found = {}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for module in names:
            module = module.split(".")[0]
            found[module] = found.get(module, False) or node in tree.body
    return found


def test_these_are_all_files():
    assert {path.stem for path in ROOT.glob("*.py")} == FILES


def test_order_of_imports():
    assert not FILES & imported("common").keys()
    assert FILES & imported("linear_probe").keys() == {"common"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_width(name):
    assert max(len(line) for line in source(name).splitlines()) <= 100


@pytest.mark.parametrize("name", sorted(FILES))
def test_license_travels_with_a_copy(name):
    assert source(name).startswith('# SPDX-License-Identifier: MIT\n"""')


@pytest.mark.parametrize("method", METHODS)
def test_order_of_a_method_file(method):
    text = source(method)
    assert "arXiv" in text and "Survey family:" in text
    places = [text.index(section) for section in SECTIONS]
    assert places == sorted(places)


@pytest.mark.parametrize("method", METHODS)
def test_imports_of_a_method_file(method):
    uses = imported(method)
    assert not uses.keys() & {*METHODS}, "siblings"
    assert not uses["common"] and not uses["linear_probe"], "imported where they are used"
    top = {name for name, at_top in uses.items() if at_top}
    assert top <= {*sys.stdlib_module_names, "torch", "torchvision"}


@pytest.mark.parametrize("method", METHODS)
def test_names_that_users_rely_on(method):
    module = importlib.import_module(method)
    for name in CLASSES[method], f"{method}_loss", "augment", "train", "parse_args", "RECIPES":
        assert hasattr(module, name)


@pytest.mark.parametrize("method", METHODS)
def test_each_recipe_sets_flags_of_its_method(method):
    module = importlib.import_module(method)
    columns = module.RECIPES["recipe"]
    assert columns[:4] == ("demo", "cpu", "cifar", "imagenet")
    for name, row in module.RECIPES.items():
        assert len(row) == len(columns)
        assert len({str(value) for value in row}) > 1, f"{name} is the same in all: a default"
    for i, recipe in enumerate(columns):
        args = vars(module.parse_args(["--recipe", recipe]))
        for name, row in module.RECIPES.items():
            assert args[name] == row[i]


# ---- copied into an empty folder


def vit(module):
    return module.ViT(image_size=32, patch_size=8, dim=32, depth=2, num_heads=2)


def make_model(module, method, backbone):
    """As a user of torchvision writes it; for the two with ViTs, their own."""
    if method == "simclr":
        return module.SimCLR(backbone, 512)
    if method == "moco":
        return module.MoCo(backbone, 512, queue_size=8, bn_groups=2)
    if method == "byol":
        return module.BYOL(backbone, 512, hidden_dim=64)
    if method == "simsiam":
        return module.SimSiam(backbone, 512, 64)
    if method == "swav":
        return module.SwAV(backbone, 512, num_prototypes=16)
    if method == "barlow":
        return module.BarlowTwins(backbone, 512, 64)
    if method == "dino":
        return module.DINO(vit(module), 32, out_dim=16, hidden_dim=16)
    if method == "mae":
        return module.MAE(vit(module), decoder_dim=16, decoder_depth=1, num_heads=2)
    if method == "rotation":
        return module.RotNet(backbone, 512)
    return module.Jigsaw(backbone, 512, module.permutation_set(8, 9, seed=0), 16, 32)


def loss_of(module, method, model, view1, view2):
    if method == "simclr":
        return module.simclr_loss(*model(view1, view2), 0.5)
    if method == "moco":
        query, key = model(view1, view2)
        return module.moco_loss(query, key, model.queue, 0.2)
    if method == "byol":
        return module.byol_loss(*model(view1, view2))
    if method == "simsiam":
        return module.simsiam_loss(*model(view1, view2))
    if method == "swav":
        _, scores = model([view1, view2])
        codes = [module.sinkhorn(view_scores, 0.05, 3) for view_scores in scores]
        return module.swav_loss(scores, codes, 0.1)
    if method == "barlow":
        return module.barlow_loss(*model(view1, view2), 0.005)
    if method == "dino":
        student, teacher = model([view1, view2], [])
        return module.dino_loss(student, teacher, model.center, 0.1, 0.04)
    if method == "mae":
        prediction, mask = model(view1)
        return module.mae_loss(prediction, view1, mask, 8)
    if method == "rotation":
        rotated, labels = module.rotate_four(view1)
        return module.rotation_loss(model(rotated), labels)
    order = torch.randint(8, (4,))
    tiles = module.shuffle(module.cut_tiles(view1, 3, 8), model.orders[order])
    return module.jigsaw_loss(model(module.normalize_tiles(tiles)), order)


@contextmanager
def only(folder):
    """Of the project, only what lies in this folder can be imported."""
    modules = {name: sys.modules.pop(name) for name in FILES if name in sys.modules}
    path = list(sys.path)
    sys.path[:] = [folder, *(p for p in path if p not in ("", str(ROOT), f"{ROOT}/tests"))]
    os.chdir(folder)
    try:
        yield
    finally:
        sys.path[:] = path
        for name in FILES:
            sys.modules.pop(name, None)
        sys.modules.update(modules)


def own_loop(folder, method):
    """Two steps -> losses, what of the project is imported, whether weights have changed."""
    with only(folder):
        return two_steps(method)


def two_steps(method):
    module = importlib.import_module(method)
    backbone = torchvision.models.resnet18()
    backbone.fc = nn.Identity()
    model = make_model(module, method, backbone)
    view = v2.Compose([v2.ToImage(), v2.RandomResizedCrop(32),
                       v2.ToDtype(torch.float32, scale=True)])
    images = torchvision.datasets.FakeData(8, (3, 48, 48), transform=lambda x: (view(x), view(x)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    losses = []
    for (view1, view2), _ in torch.utils.data.DataLoader(images, 4):
        loss = loss_of(module, method, model, view1, view2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    changed = any((p != old).any().item() for p, old in zip(model.parameters(), before))
    return losses, FILES & sys.modules.keys(), changed


@pytest.mark.parametrize("method", METHODS)
def test_file_alone_in_a_loop_of_ones_own(tmp_path, method):
    shutil.copy(ROOT / f"{method}.py", tmp_path)
    ((losses, files, changed),) = run_processes(1, own_loop, str(tmp_path), method)
    assert len(losses) == 2 and torch.tensor(losses).isfinite().all() and changed
    assert files == {method}


def whole_run(folder, method, *flags):
    with only(folder):
        module = importlib.import_module(method)
        module.train(module.parse_args(flags))
        return FILES & sys.modules.keys()


@pytest.mark.parametrize("method", METHODS)
def test_file_beside_the_two_others_trains_to_its_report(tmp_path, method):
    for name in method, "common", "linear_probe":
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    for seed, name in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
        write_images(tmp_path / "images" / name, 8, seed=seed)
    flags = "--data images --recipe cpu -b 8 --epochs 1 -j 0 --device cpu --out run".split()
    (files,) = run_processes(1, whole_run, str(tmp_path), method, *flags)
    assert files == {method, "common", "linear_probe"}
    last = json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2
    assert last["report"].keys() >= {"trained", "random", "pixels"}
    by_stage = any(name.startswith("trained ") for name in last["report"])
    assert by_stage == (method in ("mae", "rotation", "jigsaw"))
    written = {path.name for path in Path("run").iterdir()}
    assert written >= {"backbone.pth", "checkpoint.pth", "log.jsonl", "views.png"}
