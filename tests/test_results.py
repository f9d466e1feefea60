"""The figures in the READMEs are those of the logs in tests/results/, which measure.py makes; the
project's README quotes the code as it is, and its snippets run."""

import importlib
import itertools
import json
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, write_images

RESULTS = ROOT / "tests" / "results"
sys.path.insert(0, str(RESULTS))
import measure  # noqa: E402

LOGS = sorted(RESULTS.glob("*/log.jsonl"))
README = (ROOT / "README.md").read_text(encoding="utf8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
REPORT = {"trained": {"knn": 60.0, "probe": 70.0}, "random": {"knn": 30.0, "probe": 40.0},
          "pixels": {"knn": 20.0, "probe": 25.0}}


def write_run(results, name, probe=70.0, layers=None, finished=True, **record):
    """A log of three steps in two epochs, and its run.json."""
    folder = results / name
    folder.mkdir(parents=True)
    lines = [
        {"step": 1, "epoch": 1, "loss": 2.0, "spread": 0.9, "seconds": 60.0},
        {"step": 1, "epoch": 1, "knn": 40.0, "untrained": 30.0},
        {"step": 2, "epoch": 2, "loss": 1.0, "spread": 0.4, "positive_found": 0.2,
         "seconds": 70.0},
        {"step": 3, "epoch": 2, "loss": 0.7, "spread": 0.6, "positive_found": 0.4,
         "seconds": 80.0},
        {"step": 3, "epoch": 2, "knn": 50.0, "untrained": 30.0}]
    report = {**REPORT, "trained": {"knn": 60.0, "probe": probe}}
    for i, (stage, row) in enumerate((layers or {}).items(), 1):
        report[f"trained {stage}"] = row
        report[f"random {stage}"] = {"knn": 10.0 * i, "probe": 20.0 * i}
    if finished:
        lines.append({"step": 3, "report": report})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps(record))


# ---------------------------------------------------------------------------- the pages as kept


@pytest.mark.parametrize("page", measure.pages(RESULTS), ids=("results", "project"))
def test_page_is_what_table_writes(page):
    text = page.read_text(encoding="utf8")
    assert text.count("<!-- table: ") == text.count("<!-- end -->")
    assert measure.rewrite(text, measure.read_runs(RESULTS)) == text


def test_each_log_that_is_kept_is_of_a_finished_run_whose_command_is_known():
    runs = measure.read_runs(RESULTS)
    assert {log.parent.name for log in LOGS} == runs.keys()
    assert all(run["command"].startswith("python ") for run in runs.values())


def test_every_run_is_a_command_that_its_script_accepts():
    every = list(itertools.chain(*measure.RUNS.values()))
    assert len({name for name, _ in every}) == len(every)
    for name, command in every:
        script, *flags = command.split()
        if not script.startswith("tests/"):
            args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
            assert f"--seed {args.seed}" in command, name


# --------------------------------------------------------------------------- the project's README


def test_readme_has_the_size_that_a_visitor_reads():
    prose = re.sub(r"<details>.*?</details>|```.*?```|^\|[^\n]*$|<!--.*?-->|\(http[^)]*\)", "",
                   README, flags=re.DOTALL | re.M)
    assert len(prose.split()) < 900


def test_readme_quotes_simclr_to_the_character():
    source = (ROOT / "simclr.py").read_text(encoding="utf8")
    (loss,) = [block for _, block in BLOCKS if block.startswith("def simclr_loss(")]
    (step,) = [block for _, block in BLOCKS if block.startswith("view1 = make_view(")]
    assert loss in source
    assert textwrap.indent(step, " " * 8) in source


def test_readmes_quick_start_is_a_run_that_is_kept():
    run = measure.read_log(RESULTS / "simclr-idle")
    for name, row in run["report"].items():
        assert f"kNN {row['knn']:5.1f}  linear probe {row['probe']:5.1f}  {name}\n" in README
    shown = re.findall(r"^kNN so far ([\d.]+) \(untrained ([\d.]+)\)$", README, re.M)
    logged = [line for line in run["lines"] if "knn" in line]
    assert shown == [(f"{line['knn']:.1f}", f"{line['untrained']:.1f}") for line in logged]
    last = [line for line in run["lines"] if "loss" in line][-1]
    assert f"step {last['step']}/{last['step']}  loss {last['loss']:.4f} (chance" in README
    assert f"  lr {last['lr']:.3g}  {last['images_per_s']:,} images/s" in README


@pytest.mark.parametrize("page", measure.pages(RESULTS), ids=("results", "project"))
def test_links_within_the_project_lead_somewhere(page):
    prose = re.sub("```.*?```", "", page.read_text(encoding="utf8"), flags=re.DOTALL)
    links = re.findall(r"\]\((?!http)([^)#]*)", prose)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_readmes_loop_trains(monkeypatch):
    def few_images(folder, download, transform):
        images = torchvision.datasets.FakeData(8, (3, 40, 40))
        return [(transform(image), label) for image, label in images]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", few_images)
    (code,) = [block for _, block in BLOCKS if "from simclr import" in block]
    code = code.replace("range(100)", "range(1)").replace("batch_size=256", "batch_size=4")
    exec(code, {})
    assert "layer4.1.bn2.weight" in torch.load("backbone.pth")


def test_readmes_network_of_timm():
    timm = pytest.importorskip("timm")
    import simclr

    ((make, width),) = re.findall("`(backbone = timm.*?)`, and\n`(feature_dim=.*?)`", README)
    images = torch.rand(2, 3, 32, 32)
    names = {"timm": timm, "torch": torch, "SimCLR": simclr.SimCLR}
    exec(f"{make}\nmodel = SimCLR(backbone, {width})", names)
    assert names["model"](images, images)[0].shape == (2, 128)


def test_readmes_weights_and_embeddings(tmp_path):
    import linear_probe
    import simclr

    write_images(tmp_path / "photos", 12)
    simclr.train(simclr.parse_args(["--data", str(tmp_path / "photos"), "--epochs", "1", "-b", "4",
                                    "--recipe", "demo", "--device", "cpu", "-j", "0"]))
    (weights,) = [block for _, block in BLOCKS if "import load_backbone" in block]
    names = {}
    exec(weights, names)
    assert names["features"].shape == (4, 128)
    program = torch.export.load("backbone.pt2").module()
    views = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program(views), names["backbone"](views))

    (command,) = [block for _, block in BLOCKS if "--features embeddings.npz" in block]
    python, script, *flags = command.replace("path/to/images", str(tmp_path / "photos")).split()
    linear_probe.run(linear_probe.parse_args(flags))
    (table,) = [block for _, block in BLOCKS if "np.load" in block]
    names = {}
    exec(table, names)
    for i in range(12):  # "image 0 itself"
        order = (-names["features"] @ names["features"][i]).argsort()
        assert order[0] == i


def test_readmes_classifier(tmp_path, monkeypatch, capsys):
    """The command writes it, and the snippet of at most eight lines predicts a folder with it."""
    import common
    import linear_probe

    monkeypatch.setattr(linear_probe, "MIN_STEPS", 2)
    torch.save(common.make_backbone("resnet8x0.25", 32).state_dict(), "backbone.pth")
    for seed, name in enumerate(("cat", "dog")):
        write_images(tmp_path / "path" / "to" / "images" / name, 10, seed=seed)
    (command,) = [block for _, block in BLOCKS if "--finetune classifier.pth" in block]
    python, script, *flags = command.replace("runs/simclr/", "").split()
    linear_probe.run(linear_probe.parse_args([*flags, "--device", "cpu"]))
    (tmp_path / "path/to/images/dog/007.png").write_bytes(b"no image")

    capsys.readouterr()
    (code,) = [block for _, block in BLOCKS if "import load_classifier" in block]
    assert len([line for line in code.splitlines() if line]) <= 8
    names = {}
    exec(code, names)
    printed = [line for line in capsys.readouterr().out.splitlines()
               if line.startswith(("cat/", "dog/"))]
    assert [line.split()[0] for line in printed] == names["images"].names
    assert printed[17].startswith("dog/007.png 'dog/007.png': cannot identify")
    printed.pop(17)
    assert {line.split()[1] for line in printed} <= {"cat", "dog"} and len(printed) == 19


COMMANDS = re.findall("^.*(?:python|torchrun).*$", "".join(
    block for kind, block in BLOCKS if kind == "sh"), re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_readmes_commands_are_understood(command):
    script = re.search(r"(\w+)\.py(.*?)(#|$)", command)
    if script is None:
        assert "pytest -q tests" in command
        return
    write_images(Path("path/to/images"), 4)
    module = importlib.import_module(script[1])
    assert module.parse_args(script[2].split())


# ------------------------------------------------------------------------------------- measure.py


def test_missing_runs(tmp_path):
    write_run(tmp_path, "moco-0")
    write_run(tmp_path, "moco-1", finished=False)
    write_run(tmp_path, "moco-2")
    with open(tmp_path / "moco-2" / "log.jsonl", "a") as log:
        log.write('{"step": 3, "lo')  # cut off
    assert [name for name, _ in measure.missing("demo", tmp_path, "moco")] == ["moco-1", "moco-2"]
    assert measure.missing("demo", tmp_path, "moco-0") == []


def test_tables_of_a_few_runs(tmp_path):
    layers = {"layer1": {"knn": 50.0, "probe": 81.0, "held_out": {"1": 60.0, "0.1": 79.0}},
              "layer2": {"knn": 55.0, "probe": 90.0, "held_out": {"1": 75.0}}}  # the test set's
    for seed, probe in ((0, 70.0), (1, 80.0)):
        write_run(tmp_path, f"rotation-{seed}", probe, layers)
    write_run(tmp_path, "simsiam-0", wall_seconds=500)
    write_run(tmp_path, "simsiam-idle", wall_seconds=90)
    write_run(tmp_path, "simsiam-no-stop-gradient", 30.0)
    write_run(tmp_path, "simclr-0", command="python simclr.py", hardware="H100")
    write_run(tmp_path, "loss-infonce", 65.0)
    write_run(tmp_path, "mae-few-1000", 62.0)
    write_run(tmp_path, "mae-cifar-0", 64.0)
    write_run(tmp_path, "simsiam-10")
    write_run(tmp_path, "mae-10", 70.0, layers)
    write_run(tmp_path, "dino-10", 20.0)  # of no row: DINO's seeds are others
    write_run(tmp_path, "dino-30", 71.0)
    write_run(tmp_path, "dino-earlier-10", 72.0)
    write_run(tmp_path, "moco-one-bn-group-10000-0", 45.0)
    write_run(tmp_path, "moco-one-bn-group-10000-1", 47.0)
    write_run(tmp_path, "rotation-10", 49.0)
    write_run(tmp_path, "rotation-11", 51.0)
    runs = measure.read_runs(tmp_path)
    tables = {}
    for name, make in measure.TABLES.items():
        tables[name] = make(runs).splitlines()
        assert len({line.count(" | ") for line in tables[name]}) == 1
    assert "| Rotation | 60.0 (60.0 to 60.0) | 75.0 (70.0 to 80.0) | 30.0 (30.0 to 30.0) | " \
        "40.0 (40.0 to 40.0) |  |" in tables["demo"]
    assert "| Rotation, best stage (layer1) | 50.0 (50.0 to 50.0) | 81.0 (81.0 to 81.0) | " \
        "10.0 (10.0 to 10.0) | 20.0 (20.0 to 20.0) |  |" in tables["demo"]
    assert "| SimSiam | 60.0 | 70.0 | 30.0 | 40.0 | 1.5 |" in tables["demo"]
    assert tables["ablation"][2].endswith("| spread | 0.500 → 0.500 | 60.0 → 60.0 | 70.0 → 30.0 |")
    assert "| `infonce` | 60.0 | 65.0 |  |  |" in tables["losses"]
    assert tables["few"][2:] == ["| MAE | 1,000 | 60.0 | 62.0 | 30.0 | 40.0 |",
                                 "| MAE | 50,000 | 60.0 | 64.0 | 30.0 | 40.0 |"]
    assert tables["unseen"][2:] == [
        "| SimSiam | 60.0, 60.0, 60.0 | 70.0, 70.0, 70.0 | 30.0, 30.0, 30.0 | 40.0, 40.0, 40.0 | "
        "1 of 1 |",
        "| DINO | 60.0, 60.0, 60.0 | 71.0, 71.0, 71.0 | 30.0, 30.0, 30.0 | 40.0, 40.0, 40.0 | "
        "1 of 1 |",
        "| MAE, best stage | 50.0, 50.0, 50.0 | 81.0, 81.0, 81.0 | 10.0, 10.0, 10.0 | "
        "20.0, 20.0, 20.0 | 1 of 1 |",
        "| Rotation | 60.0, 60.0, 60.0 | 49.0, 50.0, 51.0 | 30.0, 30.0, 30.0 | 40.0, 40.0, 40.0 | "
        "1 of 2 |",
        "| DINO, earlier settings | 60.0, 60.0, 60.0 | 72.0, 72.0, 72.0 | 30.0, 30.0, 30.0 | "
        "40.0, 40.0, 40.0 | 1 of 1 |"]
    assert tables["repeated"][2:] == [
        "| MoCo | one bn group | positive found | 0.300 (0.300 to 0.300) | 60.0 (60.0 to 60.0) | "
        "46.0 (45.0 to 47.0) | 30.0 (30.0 to 30.0) | 40.0 (40.0 to 40.0) |"]
    assert ("| simclr-0 | `python simclr.py` | 60.0 | 70.0 | 30.0, 40.0 | 20.0, 25.0 |  | H100 |"
            in tables["runs"])
    assert measure.score(runs, "simsiam") == "kNN 60.0 (untrained 30.0)"
    assert measure.score(runs, "rotation") == "probe 75.0 (untrained 40.0)"
    runs["mae-0"] = runs["rotation-0"]
    assert measure.score(runs, "mae").startswith("kNN of the best stage 50.0 (untrained ")


def test_table_of_fine_tuning(tmp_path):
    run = ("\n$ python linear_probe.py --checkpoint runs/{}/backbone.pth --data cifar10 "
           "--labels {} --seed 0 --finetune classifier.pth\n"
           "linear probe  {}  fine-tuned  60.0  trained (rate 0.001)\n"
           "linear probe   9.5  fine-tuned  40.0  random (rate 0.003)\n90 s")
    log = tmp_path / "log.txt"
    log.write_text("What it is\n" + run.format("simclr", "0.1", "50.0")
                   + run.format("simclr", "0.01", "30.0") + run.format("simclr", "0.1", "52.0"))
    assert measure.finetune_table({}, log).splitlines()[2:] == [
        "| `simclr` | 500 | 30.0 | 60.0 | 9.5 | 40.0 | 1.5 |",
        "| `simclr` | 5,000 | 51.0 (50.0 to 52.0) | 60.0 (60.0 to 60.0) | 9.5 (9.5 to 9.5) | "
        "40.0 (40.0 to 40.0) | 1.5 (1.5 to 1.5) |"]


def test_goal_of_a_demonstration():
    """One and a half times the random network's kNN, and the pixels'; of MAE, without the pixels'.
    """
    def run(random, pixels, suffix=""):
        return {"report": {f"trained{suffix}": {"knn": 40.0, "held_out": {"1": 50.0}},
                           f"random{suffix}": {"knn": random}, "pixels": {"knn": pixels}}}

    assert measure.meets_goal(run(20.0, 20.0), "simclr")
    assert not measure.meets_goal(run(30.0, 20.0), "simclr")
    assert not measure.meets_goal(run(20.0, 30.0), "simclr")
    assert measure.meets_goal(run(20.0, 30.0, " blocks.1"), "mae")
    assert not measure.meets_goal(run(30.0, 20.0, " blocks.1"), "mae")


def test_rewrite_changes_only_what_is_between_markers(tmp_path):
    write_run(tmp_path, "simclr-0")
    page = "a\n<!-- table: demo -->\nold\n<!-- end -->\nb <!-- score: simclr -->x<!-- -->\n"
    new = measure.rewrite(page, measure.read_runs(tmp_path))
    assert new.startswith("a\n<!-- table: demo -->\n\n| method |")
    assert "old" not in new and "| SimCLR | 60.0" in new
    assert new.endswith("b <!-- score: simclr -->kNN 60.0 (untrained 30.0)<!-- -->\n")


def test_ablation_of_the_stop_gradient(monkeypatch):
    import simsiam

    whole = simsiam.simsiam_loss
    monkeypatch.setattr(simsiam, "simsiam_loss", whole)  # so that it is put back
    measure.no_stop_gradient(simsiam)
    vectors = [v.requires_grad_() for v in torch.randn(4, 8, 16).unbind()]  # p1, p2, z1, z2
    loss = simsiam.simsiam_loss(*vectors)
    torch.testing.assert_close(loss, whole(*vectors))
    assert torch.autograd.grad(whole(*vectors), vectors, allow_unused=True)[2] is None
    assert torch.autograd.grad(loss, vectors)[2].abs().sum() > 0


def test_ablation_of_the_predictor(monkeypatch):
    import byol

    monkeypatch.setattr(byol.BYOL, "__init__", byol.BYOL.__init__)
    measure.no_predictor(byol)
    model = byol.BYOL(torch.nn.Flatten(), 48, hidden_dim=16, proj_dim=8).eval()
    p1, p2, z1, z2 = model(torch.rand(5, 3, 4, 4), torch.rand(5, 3, 4, 4))
    torch.testing.assert_close(p1, z1)  # the target is still a copy of the online network
    torch.testing.assert_close(p2, z2)


def test_ablation_of_sinkhorn(monkeypatch):
    import swav

    whole = swav.sinkhorn
    monkeypatch.setattr(swav, "sinkhorn", whole)
    measure.no_sinkhorn(swav)
    scores = torch.tensor([[3.0, 0.0], [3.0, 0.0]])  # both prefer the first prototype
    torch.testing.assert_close(whole(scores, 0.05, 3).sum(0), torch.ones(2))
    torch.testing.assert_close(swav.sinkhorn(scores, 0.05, 3).sum(0), torch.tensor([2.0, 0.0]))


@pytest.mark.torture
def test_a_run_is_made_kept_and_not_repeated(tmp_path, class_folders, monkeypatch):
    flags = f"--data {class_folders} --recipe demo --epochs 1 -b 8 -j 0"
    monkeypatch.setitem(measure.RUNS, "demo", [("simclr-0", f"simclr.py {flags} --seed 0"),
                                               ("simclr-1", "simclr.py --data nowhere --seed 1")])
    args = measure.parse_args(["demo", "--jobs", "2", "--results", str(tmp_path / "kept")])
    assert measure.measure(args) == 1  # the second failed
    assert [folder.name for folder in (tmp_path / "kept").iterdir()] == ["simclr-0"]
    record = json.loads((tmp_path / "kept" / "simclr-0" / "run.json").read_text())
    assert record["torch"] == torch.__version__ and record["wall_seconds"] > 0
    assert [name for name, _ in measure.missing("demo", tmp_path / "kept")] == ["simclr-1"]


def test_after_ctrl_c_the_minutes_are_kept(tmp_path, class_folders, monkeypatch):
    monkeypatch.setitem(measure.RUNS, "demo", [("simclr-0", f"simclr.py --data {class_folders}")])

    def ctrl_c(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure.time, "sleep", ctrl_c)
    args = measure.parse_args(["demo", "--results", str(tmp_path / "kept")])
    assert measure.measure(args) == 0
    assert not (tmp_path / "kept").exists()
    record = json.loads(Path("runs/measure/simclr-0/run.json").read_text())
    assert record["command"] == f"python simclr.py --data {class_folders}"
    assert "wall_seconds" in record


def test_a_run_that_the_system_has_killed_has_failed(tmp_path, monkeypatch):
    class Killed:
        returncode = -9

        def poll(self):
            return self.returncode

    monkeypatch.setattr(measure, "start", lambda *args: Killed())
    monkeypatch.setattr(measure, "keep", lambda *args: "")
    monkeypatch.setitem(measure.RUNS, "demo", [("simclr-0", "simclr.py --seed 0")])
    assert measure.measure(measure.parse_args(["demo", "--results", str(tmp_path)])) == 1


def test_a_finished_run_is_not_taken_for_a_new_one(tmp_path, monkeypatch, capsys):
    """The folder of its results was removed, but its checkpoint is still there."""
    monkeypatch.setattr(measure.subprocess, "Popen", lambda *args, **kwargs: None)
    write_run(tmp_path, "simclr-0")
    args = measure.parse_args(["demo", "--out", str(tmp_path)])
    measure.start("simclr-0", "simclr.py --seed 0", args, threads=1)
    measure.start("simclr-1", "simclr.py --seed 1", args, threads=1)
    assert capsys.readouterr().out == (
        f"simclr-0: {tmp_path / 'simclr-0'} has been trained; it is evaluated again\n")
