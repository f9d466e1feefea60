"""The training of each method on a pretended CUDA device (fake_cuda.py): devices, dtypes, waits."""

import importlib
import inspect
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import fake_cuda
import pytest
import torch
from conftest import METHODS

pytestmark = pytest.mark.torture  # minutes; it stands on private functions of torch

FLAGS = ("--recipe demo -b 8 --epochs 1 --warmup-epochs 0 --image-size 32 --max-images 32 "
         "--workers 0 --device cuda --print-freq 2 --out run")  # four steps; the third has no line
VARIANTS = [(method, "") for method in METHODS] + [
    ("simclr", "--loss flatnce"), ("simclr", "--loss hard"), ("simclr", "--optimizer lars"),
    ("moco", "--version 3 --hidden-dim 32"), ("swav", "--queue-size 16 --small-crops 2"),
    ("barlow", "--loss vicreg"), ("dino", "-a vit_micro --local-views 2 --drop-path 0.1"),
    ("mae", "--objective simmim"), ("jigsaw", "--task relative")]


@pytest.fixture(scope="module")
def process():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, fake_cuda.install) as pool:
        yield pool


def train(method, folder, more_flags="", insert=None):
    """What the process runs: a training without its report, with a statement inserted before each
    loss.backward()."""
    torch.set_num_threads(1)
    os.chdir(folder)
    flags = f"{FLAGS} {more_flags}".split()
    if method != "mae" and "-a" not in flags:
        flags += ["-a", "resnet8x0.5"]
    module = importlib.import_module(method)
    source = inspect.getsource(module)
    if insert:
        assert source.count("loss.backward()") == 1
        source = source.replace("loss.backward()", f"{insert}; loss.backward()")
    scope = {"__name__": method}

    def run():
        exec(compile(source, module.__file__, "exec"), scope)
        with mock.patch("linear_probe.evaluate", side_effect=EOFError), pytest.raises(EOFError):
            scope["train"](scope["parse_args"](flags))
        assert not torch.backends.cuda.cudnn_sdp_enabled()

    return fake_cuda.record(run)


@pytest.mark.parametrize("method, flags", VARIANTS, ids=[" ".join(v).strip() for v in VARIANTS])
def test_only_log_lines_wait_for_the_device(process, tmp_path, method, flags):
    waits, products = process.submit(train, method, tmp_path, flags).result()
    assert len(waits) == 5  # up to each of the four backward passes, and from there to the end
    assert [len(places) for places in waits[1:-1]] == [1, 1, 0], waits[1:-1]
    assert products[torch.bfloat16] > products[torch.float32]


def test_waits_are_counted(process, tmp_path):
    insert = ("loss.item(); bool(loss > 0); torch.tensor(1.0, device='cuda'); "
              "images[aspect > 0]; images[torch.arange(2)]; f'{loss:.2f}'; "
              "torch.where(loss > 0, loss, 0); torch.cuda.synchronize()")
    waits, _ = process.submit(train, "simclr", tmp_path, "", insert).result()
    assert [place.split()[0] for place in waits[3]] == [
        "_local_scalar_dense", "_local_scalar_dense", "_to_copy", "index", "index", "_to_copy",
        "_local_scalar_dense"]
    assert all("simclr.py" in place for place in waits[3][:-1])


@pytest.mark.parametrize("insert, error", [
    ("loss = loss + torch.zeros(1)", "add mixes devices"),
    ("z1.T @ z1.bfloat16()", "mm mixes dtypes"),
    ("loss = loss.bfloat16()", "the loss is torch.bfloat16")])
def test_mixtures_are_refused(process, tmp_path, insert, error):
    with pytest.raises(RuntimeError, match=error):
        process.submit(train, "simclr", tmp_path, "", insert).result()
