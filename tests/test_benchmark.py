"""The machinery of benchmark.py; nothing here asserts a time."""

import beside_lightly
import benchmark
import pytest

import common
from rotation import RotNet

TINY = "--recipe cpu --max-images 64 --epochs 100 -b".split()


def test_every_command_is_explained(capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in benchmark.COMMANDS)


def test_timed_steps(monkeypatch):
    monkeypatch.setattr(benchmark, "gemm_rate", lambda: 1.0)
    found = [benchmark.timed_steps("simclr", TINY + [batch], 2, 3) for batch in ("4", "8")]
    assert [len(rounds) for rounds, _ in found] == [2, 2]
    assert all(0 < bare < whole for rounds, _ in found for whole, bare, _ in rounds)
    flop = [total / batch for (_, total), batch in zip(found, (4, 8))]
    assert flop[0] == pytest.approx(flop[1], rel=0.01)  # but for the logits' B²


@pytest.mark.torture
def test_script_that_is_stopped():
    found = benchmark.script("rotation", TINY[:-1], 8, 10)
    assert 0 < found["first step, s"] < found["end, s"] and found["images/s"] > 0


def test_counted_traffic_is_that_of_the_model():
    counted = benchmark.traffic("rotation", TINY + ["16"])
    backbone = common.make_backbone("resnet8", 32)
    model = RotNet(backbone, backbone.feature_dim)
    norms = [m for m in model.modules() if hasattr(m, "running_mean")]
    assert counted["gradients"] == 4 * sum(p.numel() for p in model.parameters())
    assert counted["statistics"] == sum(4 * (4 * norm.num_features + 1) for norm in norms)
    assert counted["gathered"] == counted["images"] == 0


@pytest.mark.parametrize("method", beside_lightly.HEADS)
def test_gradient_is_that_of_lightly(method):
    pytest.importorskip("lightly")
    layers = ["--proj-layers", "3"] if method == "simsiam" else []
    ours, its = beside_lightly.gradients(method, TINY + ["8", "--device", "cpu", *layers])
    assert ours < 1e-10
    assert (its > 1e-3) == (method in ("simclr", "moco", "swav", "dino"))  # passes differ


def test_tables(capsys):
    rows = [{"what": "ours", "median": 12345.6},
            {"what": "theirs", "median": 0.01234, "ratio": 2.0},
            {"what": "tiny", "median": 1e-14}]
    benchmark.show("Title", rows, gemm=[1e11])
    assert capsys.readouterr().out.splitlines()[-6:] == [
        "", "what | median | ratio", "--- | --- | ---", "ours | 12,346 | ",
        "theirs | 0.0123 | 2.00", "tiny | 1.0e-14 | "]
