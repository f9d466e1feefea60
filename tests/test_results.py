"""The figures in the READMEs are those of the logs in tests/results/, which measure.py makes."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from statistics import mean

import pytest
import torch
from conftest import ROOT

RESULTS = ROOT / "tests" / "results"
sys.path.insert(0, str(RESULTS))
import measure  # noqa: E402

LOGS = sorted(RESULTS.glob("*/log.jsonl"))
TABLE = (RESULTS / "README.md").read_text(encoding="utf8").splitlines()
README = (ROOT / "README.md").read_text(encoding="utf8")
REPORT = {"trained": {"knn": 60.0, "probe": 70.0}, "random": {"knn": 30.0, "probe": 40.0},
          "pixels": {"knn": 20.0, "probe": 25.0}}


def report(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return next(line["report"] for line in lines if "report" in line)


def write_run(results, name, probe=70.0, layers=None, finished=True, **record):
    """A log of two steps, and its run.json."""
    folder = results / name
    folder.mkdir(parents=True)
    lines = [{"step": step, "epoch": step, "loss": loss, "spread": 0.5, "accuracy": step / 4,
              "images_per_s": 100, "seconds": 60.0} for step, loss in ((1, 2.0), (2, 1.0))]
    final = REPORT | {"trained": {"knn": 60.0, "probe": probe}}
    if layers:
        final["trained"]["layers"] = layers
        final["random"] = REPORT["random"] | {"layers": {
            stage: {"knn": 10.0 * i, "probe": 20.0 * i} for i, stage in enumerate(layers, 1)}}
    lines += [{"step": 2, "report": final, "peak_gb": 1.5}] if finished else []
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if record:
        (folder / "run.json").write_text(json.dumps(record))


# ---------------------------------------------------------------------------- the pages as kept


@pytest.mark.parametrize("method", measure.METHODS)
def test_docstrings_have_the_figures_of_the_logs(method):
    text = (measure.ROOT / f"{method}.py").read_text(encoding="utf8")
    assert measure.rewrite_docstring(text, measure.read_runs(RESULTS), method) == text
    assert "\nMeasured in the demonstration" in text.split('"""')[1]


@pytest.mark.parametrize("page", measure.pages(RESULTS), ids=("results", "project"))
def test_page_is_what_table_writes(page):
    text = page.read_text(encoding="utf8")
    assert text.count("<!-- table: ") == text.count("<!-- end -->") > 0
    assert measure.rewrite(text, measure.read_runs(RESULTS)) == text


@pytest.mark.parametrize("log", LOGS, ids=lambda path: path.parent.name)
def test_row_of_each_log(log):
    found = report(log)
    row = next(line for line in TABLE if line.startswith(f"| {log.parent.name} |")).split(" | ")
    expected = [f"{found['trained'][key]:.1f}" for key in ("knn", "probe")]
    expected += [f"{found[name]['knn']:.1f}, {found[name]['probe']:.1f}"
                 for name in ("random", "pixels")]
    assert row[2:6] == expected and re.fullmatch("`.*python .*`", row[1])


def test_rows_without_a_log():
    names = [line.split(" | ")[0][2:] for line in TABLE if re.match(r"\| \w+-[\w.-]+ \|", line)]
    assert names and names == [log.parent.name for log in LOGS]


def test_summary_of_the_methods():
    """Mean and range of the built-in set's and CIFAR's seeds, by another route."""
    rows = re.findall(r"^\| `(\w+)\.py` (\|[^a-zA-Z]*(?:to[^a-zA-Z]*)*)\|$", README, re.MULTILINE)
    assert [method for method, _ in rows] == list(measure.METHODS)
    for method, cells in rows:
        for place, middle in ((1, "-"), (3, "-cifar-")):
            logs = [log for log in LOGS if re.fullmatch(f"{method}{middle}[012]", log.parent.name)]
            for cell, key in zip(cells.split("|")[place:], ("knn", "probe")):
                values = [report(log)["trained"][key] for log in logs]
                figures = [float(f) for f in re.findall(r"[\d.]+", cell)]
                if len(values) > 1:
                    values = [mean(values), min(values), max(values)]
                assert figures == pytest.approx(values, abs=0.0501), (method, place, key)


# ------------------------------------------------------------------------------ the list of runs


def test_every_run_is_a_command_that_its_script_accepts():
    names = [name for runs in measure.RUNS.values() for name, _ in runs]
    assert len(set(names)) == len(names) and len(measure.ABLATIONS) <= 12
    sys.path.insert(0, str(ROOT))
    for name, command in (run for runs in measure.RUNS.values() for run in runs):
        script, *flags = command.split()
        if "vgg" in name or script.startswith("tests/"):
            continue
        flags = ["cifar10" if flag == "cifar" and before == "--data" else flag
                 for before, flag in zip([script, *flags], flags)]
        args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
        assert f"--seed {args.seed}" in command, name


def test_missing_runs(tmp_path):
    write_run(tmp_path, "moco-0")
    write_run(tmp_path, "moco-1", finished=False)
    write_run(tmp_path, "moco-2")
    with open(tmp_path / "moco-2" / "log.jsonl", "a") as log:
        log.write('{"step": 3, "lo')  # cut off
    write_run(tmp_path, "moco-cifar-0")
    names = [name for name, _ in measure.missing("cpu", tmp_path, "moco")]
    assert names == ["moco-1", "moco-2", "moco-cifar-1", "moco-cifar-2"]
    assert [name for name, _ in measure.missing("cpu", tmp_path, "moco-1")] == ["moco-1"]
    assert measure.missing("cpu", tmp_path, "moco-0") == []
    assert len(measure.missing("gpu", tmp_path)) == 11


# ------------------------------------------------------------------------------------ the tables


def test_span():
    assert [measure.span(v) for v in ([], [None], [5], [1, 2, 6])] == ["", "", "5.0",
                                                                      "3.0 (1.0 to 6.0)"]


def test_tables_of_a_few_runs(tmp_path):
    layers = {"layer1": {"knn": 50.0, "probe": 81.0, "held_out": {"1": 60.0, "0.1": 79.0}},
              "layer2": {"knn": 55.0, "probe": 90.0, "held_out": {"1": 75.0}}}  # the test set's
    for seed, probe in ((0, 70.0), (1, 80.0)):
        write_run(tmp_path, f"rotation-{seed}", probe, layers)
    write_run(tmp_path, "simsiam-0", wall_seconds=90)
    write_run(tmp_path, "simsiam-no-stop-gradient", 30.0)
    write_run(tmp_path, "byol-no-predictor")
    write_run(tmp_path, "simclr-200", command="python simclr.py", hardware="H100")
    write_run(tmp_path, "swav-800")
    write_run(tmp_path, "rotation-resnet8x2", 65.0, layers)
    write_run(tmp_path, "simclr-resnet20")
    write_run(tmp_path, "simclr-resnet20-1", 80.0)
    write_run(tmp_path, "dino-0", finished=False)
    runs = measure.read_runs(tmp_path)
    tables = {name: make(runs).splitlines() for name, make in measure.TABLES.items()}
    for lines in tables.values():
        assert len({line.count(" | ") for line in lines}) == 1
    cpu = tables["cpu"]
    assert "| Rotation | 60.0 (60.0 to 60.0) | 75.0 (70.0 to 80.0) | 30.0 (30.0 to 30.0) | " \
        "40.0 (40.0 to 40.0) | 2 | 100 | 1.0 | 1.5 |" in cpu
    assert "| Rotation, best layer: layer1 | 50.0 (50.0 to 50.0) | 81.0 (81.0 to 81.0) | " \
        "10.0 (10.0 to 10.0) | 20.0 (20.0 to 20.0) |  |  |  |  |" in cpu
    assert "| SimSiam | 60.0 | 70.0 | 30.0 | 40.0 | 1 | 100 | 1.5 | 1.5 |" in cpu
    assert tables["pretext"][2] == "| Rotation | built-in set | 50.0 (50.0 to 50.0) | layer1 | " \
        "81.0 (81.0 to 81.0) | 20.0 (20.0 to 20.0) | 75.0 (70.0 to 80.0) | 40.0 (40.0 to 40.0) |"
    assert "| DINO |  |  |  |  |  |  |  |  |" in cpu
    assert "| raw pixels | 20.0 | 25.0 |  |  |  |  |  |  |" in cpu
    assert "| SimCLR | 60.0 | 70.0 | 84.8 | 87 | 100 | 1.0 | 1.5 |" in tables["gpu"]
    assert "| DINO, ViT-tiny |  |  |  |  |  |  |  |" in tables["gpu"]
    assert "| SwAV | 60.0 | 70.0 | 88.4 | 89.2 | 100 | 1.0 | 1.5 |" in tables["gpu-long"]
    ablated = {line.split("`")[1]: line for line in tables["ablation"][2:]}
    assert ablated["simsiam-no-stop-gradient"].endswith(
        "| spread | 0.500 → 0.500 | 60.0 → 60.0 | 70.0 → 30.0 |")
    assert ablated["byol-no-predictor"].endswith("| spread |  |  |  |")  # nothing to compare with
    assert "| resnet8x2 |  |  | 60.0 | 65.0 | layer1: 81.0 |  |  |" in tables["architecture"]
    assert "| resnet20 | 30.0 (30.0 to 30.0) | 40.0 (40.0 to 40.0) |  |  |  | 60.0 (60.0 to 60.0) " \
        "| 75.0 (70.0 to 80.0) |" in tables["architecture"]
    assert "| `simclr.py` |  |  |  |  | 60.0 | 70.0 |" in tables["summary"]
    assert "| simclr-200 | `python simclr.py` | 60.0 | 70.0 | 30.0, 40.0 | 20.0, 25.0 | 1.000 | " \
        "100 | 1.0 | 1.5 | H100 |" in tables["runs"]
    assert len(tables["runs"]) == 2 + len(runs)


def test_a_trial_is_not_kept_as_a_run():
    args = measure.parse_args(["cpu", "--flags=--lr 1", "--results",
                               os.path.relpath(measure.HERE)])
    with pytest.raises(SystemExit, match="trial"):
        measure.measure(args)


def test_rewrite_changes_only_what_is_between_markers(tmp_path):
    write_run(tmp_path, "simclr-0")
    page = ("a\n<!-- table: simclr-0 -->\nold\n<!-- end -->\nb\n"
            "<!-- table: cpu -->\n<!-- end -->\nc\n")
    runs = measure.read_runs(tmp_path)
    new = measure.rewrite(page, runs)
    assert "| trained | 60.0 | 70.0 |\n| random | 30.0 | 40.0 |" in new and "old" not in new
    assert re.sub("(?m)^(\\|.*)?\n", "", new) == re.sub("old\n", "", page)
    assert measure.rewrite(new, runs) == new


# ---------------------------------------------------------------------------------- the ablations


def fresh(name):
    """The module again, so that a patch stays in this test."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_no_stop_gradient():
    simsiam, vectors = fresh("simsiam"), torch.randn(4, 8, 16).unbind(1)[:4]
    vectors = [v.clone().requires_grad_() for v in vectors]
    whole = simsiam.simsiam_loss(*vectors)
    assert torch.autograd.grad(whole, vectors, allow_unused=True)[2] is None
    measure.no_stop_gradient(simsiam)
    torch.testing.assert_close(simsiam.simsiam_loss(*vectors), whole)
    assert torch.autograd.grad(simsiam.simsiam_loss(*vectors), vectors)[2].abs().sum() > 0


def test_no_predictor_and_no_average():
    byol = fresh("byol")
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6))
    measure.no_predictor(byol)
    measure.no_average(byol)
    model = byol.BYOL(backbone, 6, 16, 8)
    view = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(model(view, view)[0], model.online(view))
    with torch.no_grad():
        for p in model.online.parameters():
            p.add_(1)
    byol.ema_update(model.target, model.online, 0.99)
    for mine, other in zip(model.target.parameters(), model.online.parameters()):
        torch.testing.assert_close(mine, other)


def test_no_sinkhorn():
    swav, scores = fresh("swav"), torch.tensor([[3.0, 0.0], [3.0, 0.0]])  # both prefer the first
    torch.testing.assert_close(swav.sinkhorn(scores, 0.05, 3).sum(0), torch.ones(2))
    measure.no_sinkhorn(swav)
    torch.testing.assert_close(swav.sinkhorn(scores, 0.05, 3).sum(0), torch.tensor([2.0, 0.0]))


# --------------------------------------------------------------------------------- the whole way


def test_an_ablation_is_made_kept_and_not_repeated(tmp_path, class_folders):
    def call(kept):
        return subprocess.run(
            [sys.executable, RESULTS / "measure.py", "ablation", "--only", "swav-no-sinkhorn",
             "--jobs", "9", "--flags", f"--data {class_folders} --recipe demo --epochs 1 -b 8 -j 0",
             "--results", tmp_path / kept], capture_output=True, text=True)

    done = call("kept")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1/1 swav-no-sinkhorn: kNN" in done.stdout and "0 runs of ablation" in done.stdout
    record = json.loads((tmp_path / "kept" / "swav-no-sinkhorn" / "run.json").read_text())
    assert record["command"].startswith(
        "python tests/results/measure.py ablate swav-no-sinkhorn --seed 0 --data images ")
    assert record["torch"] == torch.__version__ and record["seed"] == 0
    assert record["wall_seconds"] > 0 and record["hardware"].endswith("cores")
    assert (tmp_path / "kept" / "swav-no-sinkhorn" / "log.jsonl").exists()
    again = call("kept")
    assert again.returncode == 0 and "swav-no-sinkhorn" not in again.stdout
    moved = call("other")  # the run's folder is here, its log is not kept there
    assert "swav-no-sinkhorn: was finished, now kept" in moved.stdout
    assert (tmp_path / "other" / "swav-no-sinkhorn" / "log.jsonl").exists()


SCRIPT = """
import json, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
if "fail" in sys.argv:
    sys.exit("error: it failed")
log = out / "log.jsonl"
if "--resume" not in sys.argv or not log.exists():
    log.write_text('{"step": 1, "loss": 1.0, "images_per_s": 9, "seconds": 1.0}\\n')
    time.sleep(60)
with open(log, "a") as file:
    file.write(json.dumps({"step": 2, "report": {"trained": {"knn": 1.0, "probe": 2.0}}}) + "\\n")
"""


def test_runs_are_stopped_continued_and_reported(tmp_path, monkeypatch, capsys):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(measure, "RUNS", {"cpu": [
        ("good-0", f"{tmp_path}/script.py --seed 0"),
        ("bad-0", f"{tmp_path}/script.py fail --seed 3"),
        ("good-1", f"{tmp_path}/script.py --data cifar --seed 1")]})
    monkeypatch.setattr(measure, "machine", lambda gpu: (4, {"hardware": "some cores"}))

    def call(*flags):
        args = measure.parse_args(["cpu", "--results", str(tmp_path / "kept"), "--jobs", "2",
                                   "--data", "/private/place/cifar", *flags])
        return measure.measure(args), capsys.readouterr().out

    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    status, said = call("--minutes", "0.1")
    assert "good-0: stopped; the next call continues it" in said
    assert "bad-0: failed: error: it failed" in said and status == 1
    assert "3 runs of cpu are missing" in said and not (tmp_path / "kept").exists()
    status, said = call("--only", "good")
    assert status == 0 and "good-0: kNN 1.0, probe 2.0" in said and "2/2 good-" in said
    status, said = call()
    assert status == 1 and "1/1 bad-0: failed" in said and "good" not in said
    assert handlers == {s: signal.getsignal(s) for s in handlers}
    assert {"good-0", "good-1"} == {folder.name for folder in (tmp_path / "kept").iterdir()}
    record = json.loads((tmp_path / "kept" / "good-1" / "run.json").read_text())
    assert "--data cifar --seed 1" in record["command"] and "private" not in str(record)
    assert record["threads"] == 2 and record["seed"] == 1 and record["hardware"] == "some cores"
    assert record["wall_seconds"] > 3 and "1 runs of cpu are missing" in said
