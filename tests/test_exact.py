"""N processes train what one process with the whole batch trains: each method's own loop, in float64,
from the images on the disk to the weights after the last step. And the comparison notices mistakes."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, write_images
from processes import run_processes
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
import linear_probe

CLASSES = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "simsiam": "SimSiam", "swav": "SwAV",
           "barlow": "BarlowTwins", "dino": "DINO", "mae": "MAE", "rotation": "RotNet",
           "jigsaw": "Jigsaw"}
# 24 images: three steps, with a rate that is high from the first one
FLAGS = ("--recipe demo -b 8 --epochs 1 --warmup-epochs 0 --image-size 32 --workers 0 --device cpu "
         "--out run --data").split()
TOLERANCE = 1e-12  # of values of about 1; float64 has 2e-16


def in_float64(patch):
    """Everything that would be float32, of the loop and below it."""
    torch.set_default_dtype(torch.float64)
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)


def trained(method, folder, *flags, mutation=None):
    """-> loss of each step, gradients of the last one, parameters and buffers of this process."""
    module, losses, models, grads = importlib.import_module(method), [], [], {}
    kind, backward = getattr(module, CLASSES[method]), torch.Tensor.backward

    def keep_model(*arguments, **options):
        models.append(kind(*arguments, **options))
        return models[-1]

    def keep_loss(loss):
        losses.append(loss.item())
        backward(loss)

    def keep_gradients(optimizer, *_):
        for name, p in models[0].named_parameters():
            grads[name] = None if p.grad is None else p.grad.clone()

    own = Path(folder, f"{method}-{common.world_size()}-{common.rank()}")
    own.mkdir()
    hook, before = register_optimizer_step_pre_hook(keep_gradients), os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        try:
            os.chdir(own)
            in_float64(patch)
            patch.setattr(linear_probe, "evaluate", lambda *a, **k: {})
            patch.setattr(linear_probe, "print_report", lambda report: None)
            patch.setattr(module, CLASSES[method], keep_model)
            patch.setattr(torch.Tensor, "backward", keep_loss)
            for name, function in (mutation or {}).items():
                patch.setattr(name, function)
            module.train(module.parse_args([*FLAGS, f"{folder}/images", *flags]))
        finally:
            torch.set_default_dtype(torch.float32)
            os.chdir(before)
            hook.remove()
    tensors = {f"gradient of {k}": g for k, g in grads.items() if g is not None}
    tensors |= models[0].state_dict()
    return losses, {k: v.detach().double().numpy() for k, v in tensors.items()}


def trained_with(mutation, method, folder, *flags):
    return trained(method, folder, *flags, mutation=mutation)


def largest_difference(one, several):
    """Over the losses, each the mean of the processes', and over all tensors of every process,
    relative to the largest value of a tensor that exceeds 1."""
    losses = [sum(values) / len(several) for values in zip(*(losses for losses, _ in several))]
    assert len(losses) == len(one[0]) == 3 and len(set(losses)) == 3
    differences = [abs(a - b) / max(1, abs(b)) for a, b in zip(losses, one[0])]
    for _, tensors in several:
        assert tensors.keys() == one[1].keys()
        differences += [abs(tensors[k] - v).max() / max(1, abs(v).max())
                        for k, v in one[1].items() if v.size]  # an unused queue has none
    return max(differences)


@pytest.fixture
def images(tmp_path):
    write_images(tmp_path / "images", 24)
    return str(tmp_path)


@pytest.mark.parametrize("method", CLASSES)
def test_two_processes_equal_one(images, method):
    one, several = trained(method, images), run_processes(2, trained, method, images)
    assert any(name.startswith("gradient") for name in one[1])
    print(method, largest_difference(one, several))
    assert largest_difference(one, several) < TOLERANCE


@pytest.mark.parametrize("method, flags", [
    ("simclr", []), ("moco", ["--bn-groups", "4"]), ("swav", []), ("dino", ["-a", "vit_micro"])])
def test_four_processes_equal_one(images, method, flags):
    one = trained(method, images, *flags)
    several = run_processes(4, trained, method, images, *flags)
    print(method, largest_difference(one, several))
    assert largest_difference(one, several) < TOLERANCE
