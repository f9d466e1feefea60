"""Several processes: how they start and end, and what they share. See also test_exact.py."""

import json
import os
import shutil
import sys
import time
from argparse import Namespace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import write_images
from processes import Group, run_processes
from torch import nn

import common
import linear_probe
from common import Failure

CPU = torch.device("cpu")

# ---- the start


def test_variables_that_torchrun_has_left(monkeypatch):
    """A run that is alone waits for no partners."""
    variables = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost",
                 "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", None)  # it would wait
    assert common.start("cpu", seed=0) == CPU
    assert not dist.is_initialized()
    assert common.world_size() == 1


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_torchrun_with_a_numbered_device(monkeypatch, device):
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    with pytest.raises(Failure, match=f"^--device {device}: under torchrun each .* no number$"):
        common.start(device, seed=0)


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_other_devices(device):
    with pytest.raises(Failure, match=f"^--device {device}: only cpu and cuda "):
        common.start(device, seed=0)


def reads_in_turn(folder):
    """The first and the last process are the first of their machines."""
    local_rank = ["0", "1", "0"][common.rank()]
    find_sets = common.find_sets

    def slowly(data):
        time.sleep(0.2 if common.rank() == 0 else 0)
        with open(f"{folder}/order", "a") as file:
            file.write(str(common.rank()))
        return find_sets(data)

    args = Namespace(data=None, image_size=32, max_images=20, memory=8.0, workers=0)
    with mock.patch.dict(os.environ, LOCAL_RANK=local_rank), mock.patch.object(
            common, "find_sets", slowly):
        common.load_data(args, CPU)


def test_one_process_of_a_machine_downloads_for_the_others(tmp_path):
    run_processes(3, reads_in_turn, tmp_path)
    assert (tmp_path / "order").read_text() == "021"


# ---- the end


class Exit(BaseException):
    pass


@pytest.fixture
def calls(monkeypatch):
    """A process of several, which does not talk to the others. -> what it calls, in order."""
    calls = []

    def exit_at_once(status):
        calls.append(f"exit {status}")
        raise Exit

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda x: calls.append("all_reduce"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroy"))
    monkeypatch.setattr(common, "wait_for_all", lambda: calls.append("wait"))
    monkeypatch.setattr(os, "_exit", exit_at_once)
    return calls


def test_after_success_all_wait(calls):
    common.main(lambda args: calls.append("train"), lambda argv: None)
    assert calls == ["train", "wait", "destroy"]


@pytest.mark.parametrize("error, status, last_line", [
    (Failure("--lr"), 1, "error: --lr"), (KeyError("images"), 1, "KeyError: 'images'"),
    (torch.OutOfMemoryError("Too large."), 1, "error: Too large. Try smaller batches"),
    (KeyboardInterrupt(), 130, "stopped")])
def test_a_process_that_fails_ends_at_once(calls, capsys, error, status, last_line):
    """It says why, and waits for nobody."""
    def train(args):
        raise error

    with pytest.raises(Exit):
        common.main(train, lambda argv: None)
    assert calls == [f"exit {status}"]
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(last_line)


def one_fails(folder):
    """The second process, while the first one waits for it."""
    def train(args):
        if common.rank() == 1:
            raise Failure("no images")
        common.wait_for_all()

    sys.stderr = open(f"{folder}/stderr{common.rank()}", "w")
    common.main(train, lambda argv: None)


def test_where_one_process_fails_all_end(tmp_path):
    group = Group(2)
    for tasks in group.tasks:
        tasks.put((one_fails, [tmp_path]))
    for process in group.processes:
        process.join(30)
    assert [process.exitcode for process in group.processes] == [1, 1]
    assert Path("stderr1").read_text() == "error: no images\n"
    assert Path("stderr0").read_text().startswith("Traceback")


def last_one_is_slow(folder):
    def train(args):
        if common.rank() == 1:
            time.sleep(0.5)
            Path(folder, "ready").touch()

    common.main(train, lambda argv: None)
    return Path(folder, "ready").exists(), dist.is_initialized()


def test_the_first_process_waits_for_the_others(tmp_path):
    assert run_processes(2, last_one_is_slow, tmp_path) == [(True, False)] * 2


# ---- the run's folder


def folder_of_a_run(folder):
    os.chdir(folder)
    args = Namespace(out=None, resume=False, method="simclr", recipe="demo", arch="resnet8",
                     image_size=32)
    common.open_run(args)
    return args.out


def test_all_processes_have_the_folder_that_the_first_one_chooses(tmp_path):
    assert run_processes(2, folder_of_a_run, tmp_path) == ["runs/simclr"] * 2
    assert run_processes(2, folder_of_a_run, tmp_path) == ["runs/simclr-2"] * 2
    assert sorted(os.listdir("runs")) == ["simclr", "simclr-2"]


def resumed(folder):
    """-> the reason why it is refused, on disks that the processes do not share."""
    os.chdir(f"{folder}/machine{common.rank()}")
    args = Namespace(out="run", resume=True, method="simclr", epochs=9, batch_size=1)
    images = common.ImageSet("images", ["1.png"], [0], [])
    network = nn.Linear(2, 2)
    try:
        common.load_checkpoint(args, images, network, torch.optim.SGD(network.parameters()))
    except Failure as failure:
        return str(failure)


@pytest.mark.parametrize("steps", [(4, None), (None, 4), (4, 3)])
def test_processes_see_different_checkpoints(tmp_path, steps):
    images = common.ImageSet("images", ["1.png"], [0], [])
    network = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters())
    for machine, step in enumerate(steps):
        out = f"machine{machine}/run"
        os.makedirs(out)
        if step is not None:
            args = Namespace(out=out, method="simclr", recipe="demo", batch_size=1)
            common.save_checkpoint(args, step, images, network, optimizer, network)
    reason = ("--resume: the processes see different checkpoints in run, which must be on a disk "
              "that all machines share")
    assert run_processes(2, resumed, tmp_path) == [reason] * 2


# ---- what they share


def read(folder):
    """-> how many images this process has decoded, and the sets that it has."""
    decoded = []
    to_square = common.to_square

    def count(image, side):
        decoded.append(side)
        return to_square(image, side)

    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "to_square", count)
        patch.setattr(common, "check_readable", lambda *args: None)  # it decodes some again
        sets = common.load_data(Namespace(data="images", image_size=32, max_images=None,
                                          memory=8.0, workers=0), CPU)
    return len(decoded), [contents(images) for images in sets]


def contents(images):
    pixels, aspect = next(images.load([torch.arange(len(images))], CPU))
    return images.names, images.labels.tolist(), pixels.tolist(), aspect.tolist()


def test_processes_share_the_decoding(class_folders, tmp_path):
    count, sets = read(tmp_path)
    assert count == 24 + 8
    counts, theirs = zip(*run_processes(3, read, tmp_path))
    assert counts == (8 + 3, 8 + 3, 8 + 2)
    assert theirs == (sets, sets, sets)


def test_images_that_cannot_be_read_are_left_out_by_all(class_folders, tmp_path):
    for name in "000.png", "001.png":
        Path("images/train/cat", name).write_text("no image")
    _, sets = read(tmp_path)
    names, *_ = sets[0]
    assert len(names) == 22
    _, theirs = zip(*run_processes(3, read, tmp_path))
    assert theirs == (sets, sets, sets)


def read_and_evaluate(folder):
    """-> the kNN accuracy, from features of each image that one of the processes makes."""
    os.chdir(folder)
    train, test = common.load_data(Namespace(data="images", image_size=32, max_images=None,
                                             memory=8.0, workers=0), CPU)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
    (features,), _ = linear_probe.extract_features(network, test, torch.arange(len(test)), 32, CPU)
    return features.tolist(), linear_probe.quick_knn(network, train, test, 32, CPU)


def test_more_processes_than_test_images(class_folders, tmp_path):
    shutil.rmtree("images/val/cat")
    shutil.rmtree("images/val/dog")
    write_images(Path("images/val/dog"), 1)
    alone = read_and_evaluate(tmp_path)
    assert run_processes(3, read_and_evaluate, tmp_path) == [alone] * 3


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_only_where_the_card_has_it(monkeypatch, supported):
    def is_bf16_supported(including_emulation):
        assert not including_emulation
        return supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *args, enabled: asked.append((*args, enabled)))
    common.autocast(torch.device("cuda"))
    assert asked == [("cuda", torch.bfloat16, supported)]


@pytest.mark.parametrize("sync_bn", [True, False])
def test_bn_is_synchronized_on_gpus_only_where_it_is_asked_for(monkeypatch, sync_bn):
    """MoCo's shuffled groups must not be."""
    converted = []
    monkeypatch.setattr(common, "world_size", lambda: 2)
    monkeypatch.setattr(nn.SyncBatchNorm, "convert_sync_batchnorm", converted.append)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model, devices: model)
    weight = Namespace(device=torch.device("cuda:0"))
    model = Namespace(parameters=lambda: iter([weight]))
    common.parallel(model, sync_bn=sync_bn)
    assert converted == ([model] if sync_bn else [])


def log_rank(folder):
    args = Namespace(out=folder, batch_size=4, epochs=1)
    rank = torch.tensor(float(common.rank()))
    common.log(args, done=1, total_steps=2, first_step=0, started=time.monotonic() - 1, lr=0.1,
               loss=rank, spread=4 * rank)


def test_the_log_has_means_over_the_processes(tmp_path):
    run_processes(2, log_rank, str(tmp_path))
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == 0.5
    assert json.loads(line)["spread"] == 2
