"""N processes train what one process with the whole batch trains: each method's own loop, in
float64, from the images on the disk to the last step's weights. And mistakes are noticed."""

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import CLASSES, ROOT, write_images
from processes import run_processes
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
import linear_probe
import mae
import sync_bn

# 24 images: three steps, the first one already at the full rate
FLAGS = ("--recipe demo -b 8 --epochs 1 --warmup-epochs 0 --image-size 32 --workers 0 --device cpu "
         "--out run --data").split()
SMALL = {method: ["-a", "resnet8x0.5"] for method in CLASSES}
SMALL["mae"] = []
TOLERANCE = 1e-12  # of values of about 1, of which float64 has 2e-16


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder, "images"), 24)
        yield folder


def trained(folder, method, *flags, mutation=None):
    """-> loss of each step; gradients of the last step, parameters and buffers of this process at
    the end; the files that it wrote."""
    module = importlib.import_module(method)
    losses = []
    models = []
    grads = {}
    backward = torch.Tensor.backward
    before = os.getcwd()

    def keep_model(optimizer_of):
        """The model is what the method's optimizer is made for."""
        def make(*arguments):
            models.extend(a for a in arguments if isinstance(a, torch.nn.Module))
            return optimizer_of(*arguments)
        return make

    def keep_loss(loss):
        losses.append(loss.item())
        backward(loss)

    def keep_gradients(*_):
        for name, p in models[0].named_parameters():
            if p.grad is not None:
                grads[f"gradient of {name}"] = p.grad.clone()

    hook = register_optimizer_step_pre_hook(keep_gradients)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as own:
        os.chdir(own)
        torch.set_default_dtype(torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch.Tensor, "backward", keep_loss)
        patch.setattr(linear_probe, "evaluate", lambda *a, **k: {})
        patch.setattr(common, "parallel", sync_bn.parallel)
        patch.setattr(module, "make_optimizer", keep_model(module.make_optimizer))
        if mutation:
            _, _, name, replacement = MISTAKES[mutation]
            patch.setattr(name, replacement)
        try:
            module.train(module.parse_args([*FLAGS, f"{folder}/images", *SMALL[method], *flags]))
        finally:
            torch.set_default_dtype(torch.float32)
            os.chdir(before)
            hook.remove()
        files = sorted(os.listdir(f"{own}/run")) if os.path.exists(f"{own}/run") else []
    tensors = {name: value.numpy() for name, value in {**grads, **models[0].state_dict()}.items()}
    return losses, tensors, files


# DINO with small crops, and at a lower rate than the demonstration's, which amplifies the rounding.
# The norm is one that the gradients exceed, so that the clipping counts.
SOFT = ["--local-views", "2", "--lr", "1e-3", "--clip-norm", "0.01"]
VIT = ["-a", "vit_micro", "--no-head-bn", "--drop-path", "0.5", *SOFT]
V3 = ["--version", "3", "--hidden-dim", "32"]
SHIFT = ["--crop", "shift"]  # drawn in rotation.py itself


@functools.cache
def trained_alone(folder, method, *flags):
    return trained(folder, method, *flags)


def broken(folder, method, flags, mutation):
    return trained(folder, method, *flags, mutation=mutation)


def largest_difference(one, several):
    """Over the losses, of which one process's is the mean of the others', and over all tensors of
    every process; relative to the largest value of a tensor, if that exceeds 1."""
    losses, tensors, _ = one
    assert len(set(losses)) == 3
    differences = []
    for step in range(3):
        mean = sum(found[0][step] for found in several) / len(several)
        differences.append(abs(mean - losses[step]) / max(1, abs(losses[step])))
    for _, their_tensors, _ in several:
        assert their_tensors.keys() == tensors.keys()
        for name, value in tensors.items():
            if value.size > 0:  # an unused queue has none
                scale = max(1, abs(value).max())
                differences.append(abs(their_tensors[name] - value).max() / scale)
    return max(differences)


@pytest.mark.parametrize("method", CLASSES)
def test_two_processes_equal_one_and_only_the_first_writes(folder, method):
    flags = {"dino": SOFT, "rotation": SHIFT}.get(method, [])
    one = trained_alone(folder, method, *flags)
    first, second = run_processes(2, trained, folder, method, *flags)
    assert sum(name.startswith("gradient") for name in one[1]) > 10
    assert largest_difference(one, [first, second]) < TOLERANCE
    assert "backbone.pth" in one[2]
    assert first[2] == one[2]  # the files
    assert second[2] == []


@pytest.mark.parametrize("world, method, flags", [
    (2, "moco", ["--version", "1", "--bn-groups", "4", "--queue-size", "20"]),  # wraps round
    (2, "barlow", ["--loss", "vicreg"]), (4, "simclr", []),
    (4, "swav", ["--queue-size", "16", "--queue-epoch", "0", "--small-crops", "2"]),
    pytest.param(2, "dino", VIT, marks=pytest.mark.torture),
    pytest.param(4, "moco", V3, marks=pytest.mark.torture),
    pytest.param(4, "moco", ["--bn-groups", "4"], marks=pytest.mark.torture),
    pytest.param(4, "barlow", ["--loss", "vicreg"], marks=pytest.mark.torture),
    pytest.param(4, "dino", ["-a", "vit_micro", *SOFT], marks=pytest.mark.torture)])
def test_variants_and_four_processes_equal_one(folder, world, method, flags):
    one = trained_alone(folder, method, *flags)
    several = run_processes(world, trained, folder, method, *flags)
    assert largest_difference(one, several) < TOLERANCE


# ---- mistakes that the comparison must notice


def gather_without_gradient(x, gather=common.gather):
    """Of the others' rows; its own have one, as in many implementations of SimCLR."""
    rows = gather(x.detach()).unflatten(0, (common.world_size(), -1)).clone()
    rows[common.rank()] = x
    return rows.flatten(0, 1)


def gather_in_place(x):
    """By an all-reduce that autograd does not see, as in the official code of Barlow Twins."""
    rows = x.new_zeros(common.world_size(), *x.shape)
    rows[common.rank()] = x
    dist.all_reduce(rows)
    return rows.flatten(0, 1)


def gather_own(x):
    """This process's rows, as if the others had the same."""
    return x.repeat(common.world_size(), 1)


def gather_of_next(x, gather=common.gather):
    """Each process has the rows of the next one in the place of its own."""
    return gather(x).roll(-len(x), 0)


def sum_own(x):
    return x * common.world_size()


def leave(x):
    """In place of what gathers rows, or synchronizes the BN of a model."""
    return x


def draw_own(n, *shape, device, low=0.0, high=1.0):
    """The same numbers in each process."""
    return torch.empty(n, *shape, device=device).uniform_(low, high)


def mask_own(tokens, mask_ratio, noise, masking=mae.random_masking):
    """The same masks in each process; views as they are."""
    return masking(tokens, mask_ratio)


def clip_before_mean(model, devices, wrap=torch.nn.parallel.DistributedDataParallel):
    """Each process its own gradients; their mean is then short enough."""
    for p in model.student.parameters():
        p.register_hook(lambda grad: grad * (0.01 / grad.norm()).clamp(max=1))
    return wrap(model, devices)


MUTATIONS = {  # -> method, flags, name of what is replaced, by what
    "gather without gradient": ("simclr", [], "common.gather", gather_without_gradient),
    "all-reduce in place": ("barlow", [], "common.gather", gather_in_place),
    "local Sinkhorn": ("swav", [], "common.gather", gather_own),
    "codes of others": ("swav", [], "common.gather", gather_of_next),
    "local center": ("dino", VIT, "common.all_sum", sum_own),
    "clipping before the mean": ("dino", SOFT, "torch.nn.parallel.DistributedDataParallel",
                                 clip_before_mean),
    "BN not synchronized": ("byol", [], "sync_bn.convert", leave),
    "BN statistics of the first": ("moco", [], "common.all_sum", sum_own),
    "equal draws": ("rotation", SHIFT, "common.uniform", draw_own),
    "equal masks": ("mae", [], "mae.random_masking", mask_own),
}
TORTURE = {  # what is replaced here is replaced above, too, in another method
    "gather without gradient, MoCo v3": ("moco", V3, "common.gather", gather_without_gradient),
    "gather without gradient, Barlow": ("barlow", [], "common.gather", gather_without_gradient),
    "local keys": ("moco", V3, "common.gather", leave),
    "local correlations": ("barlow", [], "common.gather", leave),
    "equal draws, jigsaw": ("jigsaw", [], "common.uniform", draw_own),
    **{f"BN not synchronized, {method}": (method, flags, "sync_bn.convert", leave)
       for method, flags in (("simclr", []), ("moco", V3), ("simsiam", []), ("swav", []),
                             ("barlow", []), ("dino", SOFT), ("rotation", SHIFT), ("jigsaw", []))},
}


MISTAKES = {**MUTATIONS, **TORTURE}


@pytest.mark.parametrize("mutation", [
    *MUTATIONS, *(pytest.param(name, marks=pytest.mark.torture) for name in TORTURE)])
def test_mistakes_are_noticed(folder, mutation):
    method, flags, _, _ = MISTAKES[mutation]
    one = trained_alone(folder, method, *flags)
    several = run_processes(2, broken, folder, method, flags, mutation)
    assert largest_difference(one, several) > 1e6 * TOLERANCE


# ---- as users start it


LAUNCHER = """
import runpy, sys, torch
import common, sync_bn
common.parallel = sync_bn.parallel
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
torch.set_num_threads(1)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launched(folder, arguments):
    os.chdir(folder)
    sys.argv = arguments
    exec(LAUNCHER)


def test_torchrun_equals_python(class_folders, tmp_path):
    """From the first line to the report; only the first process speaks."""
    Path("launcher.py").write_text(LAUNCHER)
    command = ["launcher.py", str(ROOT / "simclr.py"), *FLAGS, str(class_folders), "-p", "1", "-a",
               "resnet8x0.5", "--lr", "1", "--out"]
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    done = subprocess.run([sys.executable, *torchrun, *command, "several"], capture_output=True,
                          text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 3/3") == done.stdout.count(" test images (chance") == 1
    run_processes(1, launched, tmp_path, [*command, "one"])
    weights = [torch.load(f"{out}/backbone.pth", weights_only=True) for out in ("several", "one")]
    for name, expected in weights[1].items():
        torch.testing.assert_close(weights[0][name], expected, rtol=0, atol=1e-5)
    logs = []
    for out in "several", "one":
        logs.append([json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()])
    for several, one in zip(*logs, strict=True):
        assert several.get("loss") == one.get("loss")
        assert several.get("knn") == one.get("knn")
        assert several.get("report") == one.get("report")
