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

pytestmark = pytest.mark.torture  # minutes; it stands on private functions of torch
METHODS = "simclr moco byol simsiam swav barlow dino mae rotation jigsaw".split()


@pytest.fixture(scope="module")
def process():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, fake_cuda.install) as pool:
        yield pool


def train(method, folder, insert="pass"):
    """In the process: four steps, of which all but the third print; `insert` goes into each."""
    torch.set_num_threads(1)
    os.chdir(folder)
    flags = "--recipe demo -b 8 --epochs 1 --warmup-epochs 0 --image-size 32 --max-images 32 " \
            "--workers 0 --device cuda --print-freq 2 --out run"
    flags += "" if method == "mae" else " -a resnet8x0.5"
    module, line, scope = importlib.import_module(method), "loss.backward()", {"__name__": method}
    source = inspect.getsource(module)
    assert source.count(line) == 1
    code = compile(source.replace(line, f"{insert}; {line}"), module.__file__, "exec")

    def run():
        with mock.patch("linear_probe.evaluate", side_effect=EOFError), pytest.raises(EOFError):
            exec(code, scope)
            scope["train"](scope["parse_args"](flags.split()))

    return fake_cuda.record(run)


@pytest.mark.parametrize("method", METHODS)
def test_only_log_lines_wait_for_the_device(process, tmp_path, method):
    waits, products = process.submit(train, method, tmp_path).result()
    assert [len(places) for places in waits[1:-1]] == [1, 1, 0], waits[1:-1]  # from step 1 on
    assert products[torch.bfloat16] > products[torch.float32]


def test_waits_are_counted(process, tmp_path):
    insert = ("loss.item(); bool(loss > 0); torch.tensor(1.0, device='cuda'); "
              "images[aspect > 0]; images[torch.arange(2)]; f'{loss:.2f}'; "
              "torch.where(loss > 0, loss, 0); torch.cuda.synchronize()")
    waits, _ = process.submit(train, "simclr", tmp_path, insert).result()
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
        process.submit(train, "simclr", tmp_path, insert).result()
