"""The machinery of benchmark.py; nothing here asserts a time."""

import json

import benchmark
import pytest
import torch

import common
from rotation import RotNet

TINY = "--recipe demo --max-images 64 --epochs 100 --device cpu -b".split()


def test_every_command_is_explained(capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in benchmark.COMMANDS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no CUDA device")
def test_commands_for_a_gpu_say_that_there_is_none(capsys):
    benchmark.main(["gpu-vit", "--photos", "."])
    assert capsys.readouterr().out == "gpu-vit needs a CUDA device, and there is none\n"


def test_blocks_without_augmentation_draw_no_views(monkeypatch):
    monkeypatch.setattr(benchmark, "gemm_rate", lambda: 1.0)
    drawn, draw = [], common.Augment.draw
    monkeypatch.setattr(common.Augment, "draw", lambda *a: drawn.append(1) or draw(*a))
    found = [benchmark.blocks("simclr", TINY + [batch], "augmentation", rounds=2, block=3)
             for batch in ("4", "8")]
    assert [len(found[0][key]) for key in ("with", "without", "gemm")] == [2, 2, 2]
    pictures, blocks, frozen = 2, 3 * 3 * 2, 2  # of views.png; with, of which one unmeasured; cache
    assert len(drawn) == 2 * (pictures + blocks + frozen)
    backbone = [f["flop"] / f["batch"] for f in found]
    assert backbone[0] == pytest.approx(backbone[1], rel=0.01)  # but for the logits' B²


def test_blocks_without_upkeep_leave_the_weights(monkeypatch):
    monkeypatch.setattr(benchmark, "gemm_rate", lambda: 1.0)
    updates, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: updates.append(1) or step(self))
    benchmark.blocks("rotation", TINY + ["4"], "upkeep", rounds=1, block=3)
    assert len(updates) == 2 * 3


def test_counted_traffic_is_that_of_the_model(monkeypatch):
    for name in "WORLD_SIZE", "RANK", "LOCAL_RANK":
        monkeypatch.setenv(name, "0")  # so that they are unset afterwards
    counted = benchmark.traffic("rotation", TINY + ["16"], world=8)
    backbone = common.make_backbone("resnet8", 32)
    model = RotNet(backbone, backbone.feature_dim)
    assert counted["gradients"] == 4 * sum(p.numel() for p in model.parameters())
    channels = sum(m.num_features for m in model.modules() if hasattr(m, "running_mean"))
    assert counted["statistics"] == 4 * 4 * channels  # mean and variance, forward and backward
    assert counted["embeddings"] == counted["images"] == 0


def test_tables_and_json_agree(tmp_path, capsys):
    args = type("args", (), {"json": str(tmp_path / "results.jsonl")})
    rows = [{"what": "ours", "median": 12345.6},
            {"what": "theirs", "median": 0.01234, "ratio": 2.0},
            {"what": "unknown", "median": float("nan")}]
    benchmark.show(args, "Title", rows, [1e11])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-5:] == ["| what | median | ratio |", "|---|---|---|", "| ours | 12,346 |  |",
                          "| theirs | 0.012 | 2.00 |", "| unknown |  |  |"]
    assert json.loads((tmp_path / "results.jsonl").read_text())["rows"][:2] == rows[:2]
