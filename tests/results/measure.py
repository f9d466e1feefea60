"""Every measured run of this project as one command, and the pages' tables from the runs' logs.

    python tests/results/measure.py demo --jobs 2                 what is missing of a group of runs
    python tests/results/measure.py cifar --data PATH --jobs 2
    python tests/results/measure.py table                         then the tables, from all logs
    python tests/results/measure.py picture --data PATH           and the README's picture

PATH is CIFAR-10: a folder with train/ and test/, or cifar10, which torchvision downloads. A run is
done when tests/results/<name>/log.jsonl ends with a report; run.json beside it has its command,
hardware and minutes. One that was interrupted goes on from its last checkpoint. To train one again,
remove its folder in runs/measure as well.
"""

import argparse
import importlib
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
METHODS = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "simsiam": "SimSiam", "swav": "SwAV",
           "barlow": "Barlow Twins", "dino": "DINO", "mae": "MAE", "rotation": "Rotation",
           "jigsaw": "Jigsaw"}
READOUT = {"rotation": "probe", "jigsaw": "probe", "mae": "kNN of the best stage"}  # else kNN
# Seeds on which no setting was chosen. BYOL and DINO had other settings when they ran with seeds 10
# to 19, these; their present ones were chosen with a look at some of those runs.
UNSEEN = {**dict.fromkeys(METHODS, range(10, 20)), "byol": range(30, 40), "dino": range(30, 40),
          "byol-earlier": range(10, 20), "dino-earlier": range(10, 20)}
EARLIER_DEMO = {"byol": "--jitter-strength 1",
                "dino": "--arch resnet8x0.5 --local-views 2 --jitter-strength 2 --gray 0.2 "
                        "--teacher-temperature 0.02 --teacher-temperature-start 0.02"}
FEW = 1000, 5000, 20000  # images
# How many seeds have run on CIFAR-10; of the other methods seed 0 alone.
CIFAR_SEEDS = {"simclr": 3, "moco": 2, "byol": 3, "swav": 3, "dino": 3, "mae": 3}
LOSSES = "nt-xent", "infonce", "nce", "flatnce", "debiased", "hard", "alignment"

# ------------------------------------------------------------------------------------- ablations


def no_stop_gradient(simsiam):
    import torch.nn.functional as F

    def loss(p1, p2, z1, z2):
        return -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2

    simsiam.simsiam_loss = loss


def no_predictor(byol):
    from torch import nn

    init = byol.BYOL.__init__

    def init_without(self, *args, **options):
        init(self, *args, **options)
        self.predictor = nn.Identity()

    byol.BYOL.__init__ = init_without


def no_sinkhorn(swav):
    def softmax(scores, epsilon, iterations):
        return (scores / epsilon).softmax(1)

    swav.sinkhorn = softmax


# Name, which starts with the script's: flags, or what removes a part that has no flag, since nobody
# should run without it; the health number, by its name on the log line; what the run asks.
ABLATIONS = {
    "simclr-no-jitter": ("--jitter-strength 0", "positive_found",
                         "without color jitter, do colors alone find the other view?"),
    "simclr-high-rate": ("--lr 5 --warmup-epochs 0", "positive_found",
                         "with 40 times the rate and no warm-up, does it still learn?"),
    "moco-one-bn-group": ("--bn-groups 1", "positive_found",
                          "in one BN batch, which shuffling cannot mix, do statistics leak?"),
    "byol-no-predictor": (no_predictor, "spread", "is it the predictor that prevents collapse?"),
    "simsiam-no-stop-gradient": (no_stop_gradient, "spread",
                                 "with gradient through both sides, is a constant the outcome?"),
    "swav-no-sinkhorn": (no_sinkhorn, "code_entropy",
                         "with softmax for codes, does anything keep the clusters equal?"),
    "barlow-no-decorrelation": ("--off-diagonal-weight 0", "off_diagonal",
                                "do all dimensions then say the same?"),
    "dino-no-centering": ("--center-momentum 1", "entropy",
                          "does one class win, that is, does entropy fall to 0?"),
    "dino-no-sharpening": ("--teacher-temperature-start 1 --teacher-temperature 1", "entropy",
                           "do all classes become alike, that is, does entropy rise to ln K?"),
    "jigsaw-no-gaps": ("--tile-size 10", "puzzles_solved",
                       "do tiles that touch give the order away by their edges?"),
}

# Again on images of CIFAR-10 and three seeds, for those of which the demonstrations show little.
REPEATED = {
    "moco-one-bn-group": "--bn-groups 1",
    "barlow-no-decorrelation": "--off-diagonal-weight 0",
    "jigsaw-no-gaps": "--tile-size 21",
}


def ablate(name, flags):
    """Train without the part that an ablation of ABLATIONS removes; the flags are the script's."""
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(name.split("-")[0])
    ABLATIONS[name][0](module)
    importlib.import_module("common").main(module.train, module.parse_args, flags)


def ablation_command(name):
    change = ABLATIONS[name][0]
    if isinstance(change, str):
        return f"{name.split('-')[0]}.py --seed 0 {change}"
    return f"tests/results/measure.py ablate {name} --seed 0"


def whole_and_ablated(name, flags, seed):
    method = name.split("-")[0]
    command = f"{method}.py {FIFTH} --seed {seed}"
    return (f"{method}-10000-{seed}", command), (f"{name}-10000-{seed}", f"{command} {flags}")


# ------------------------------------------------------------------------------------------ runs

SUBSET = "--data cifar10 --recipe demo --max-images 10000"
WHOLE = "--data cifar10 --recipe cpu"
FIFTH = f"{WHOLE} --max-images 10000"
TILES = f"jigsaw.py {WHOLE} --image-size 32 --tile-size 8"
EARLIER = "--epochs 5 --warmup-epochs 0.5 --batch-size 64 --lr 0.48"  # the demonstration's, then
# The cpu column of these two before it was tuned.
STANDARD = {"simclr": "--image-size 32 --epochs 20 --lr 0.24",
            "swav": "--image-size 32 --epochs 20 --lr 0.003"}
SMALL = "--image-size 24 --eval-size 32 --epochs 15"
FASTER = "--image-size 24 --eval-size 32 --epochs 20 --lr 0.6"
RUNS = {
    "demo": [(f"{m}-{seed}", f"{m}.py --seed {seed}") for seed in range(3) for m in METHODS],
    "idle": [(f"{m}-idle", f"{m}.py --seed 0") for m in METHODS],  # one at a time, for the minutes
    "cifar": [(f"{m}-cifar-{seed}", f"{m}.py {WHOLE} --seed {seed}") for m in METHODS
              for seed in range(CIFAR_SEEDS.get(m, 1))],
    "small": [*((f"{m}-standard-0", f"{m}.py {WHOLE} {flags} --seed 0")
                for m, flags in STANDARD.items()),
              ("moco-24", f"moco.py {WHOLE} {SMALL} --seed 0"),
              ("byol-24", f"byol.py {WHOLE} {SMALL} --seed 0"),
              ("dino-24", f"dino.py {WHOLE} {SMALL} --local-size 12 --seed 0"),
              ("simsiam-24", f"simsiam.py {WHOLE} {FASTER} --seed 0"),
              ("barlow-24", f"barlow.py {WHOLE} {SMALL} --seed 0")],
    "few": [(f"{m}-few-{count}", f"{m}.py {WHOLE} --max-images {count} --seed 0")
            for m in ("simclr", "byol", "mae") for count in FEW],
    "unseen": [(f"{m}-{seed}", f"{m}.py --seed {seed}") for m in METHODS for seed in UNSEEN[m]]
              + [(f"{m}-earlier-{seed}", f"{m}.py {flags} --seed {seed}")
                 for m, flags in EARLIER_DEMO.items() for seed in UNSEEN[f"{m}-earlier"]],
    "losses": [(f"loss-{loss}{suffix}", f"simclr.py {flags}{EARLIER} --loss {loss} --seed 0")
               for suffix, flags in (("", ""), ("-cifar", f"{SUBSET} ")) for loss in LOSSES],
    "ablation": [(name, ablation_command(name)) for name in ABLATIONS],
    "repeated": [run for seed in range(3) for name, flags in REPEATED.items()
                 for run in whole_and_ablated(name, flags, seed)],
    "jigsaw": [("jigsaw-tiles-8", f"{TILES} --epochs 20 --seed 0"),  # what was tried on CIFAR-10
               ("jigsaw-tiles-8-colours", f"{TILES} --epochs 20 --gray 0 --seed 3"),
               ("jigsaw-tiles-8-relative", f"{TILES} --epochs 20 --task relative --seed 3"),
               ("jigsaw-tiles-8-uncropped", f"{TILES} --epochs 5 --crop-scale 1 --seed 3"),
               ("jigsaw-tiles-8-uncropped-500", f"{TILES} --epochs 20 --crop-scale 1 "
                "--permutations 500 --hidden-dim 512 --seed 3"),
               ("jigsaw-tiles-18", f"jigsaw.py {WHOLE} --epochs 4 --seed 3")],
    "gpu": [(f"{m}-gpu-0", f"{m}.py --data cifar10 --recipe cifar --epochs 200 --seed 0")
            for m in METHODS],
}


def read_log(folder):
    """-> lines and report of log.jsonl, and run.json; None unless the log ends with a report."""
    try:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError):  # none, or a line cut off
        return None
    if not lines or "report" not in lines[-1]:
        return None
    return {"lines": lines, "report": lines[-1]["report"], **read_record(folder)}


def read_record(folder):
    path = folder / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def read_runs(results):
    """-> {name: run} of all finished logs, in the order of their names."""
    found = {log.parent.name: read_log(log.parent) for log in sorted(results.glob("*/log.jsonl"))}
    return {name: run for name, run in found.items() if run}


def missing(group, results, only=""):
    """-> (name, command) of the group's runs that are not done, in their order."""
    return [(name, command) for name, command in RUNS[group]
            if (not only or only in (name.split("-")[0], name)) and not read_log(results / name)]


def machine():
    """-> cores; what a run is documented with: hardware and versions."""
    script = ("import torch, torchvision; print(torch.__version__, torchvision.__version__, "
              "torch.cuda.get_device_name() if torch.cuda.is_available() else '')")
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    torch, torchvision, name = found.stdout.strip("\n").split(" ", 2)
    info = Path("/proc/cpuinfo")
    models = re.findall("model name\\s*: (.*)", info.read_text()) if info.exists() else []
    cpu = f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores"
    return os.cpu_count(), {"hardware": name or cpu, "torch": torch, "torchvision": torchvision}


def start(name, command, args, threads):
    """-> the process of a run, which continues what an earlier call has left."""
    script, *flags = shlex.split(command)
    flags = [args.data if flag == "cifar10" else flag for flag in flags]
    out = args.out / name
    out.mkdir(parents=True, exist_ok=True)
    if read_log(out):
        print(f"{name}: {out} has been trained; it is evaluated again", flush=True)
    with open(args.out / f"{name}.txt", "a") as screen:
        return subprocess.Popen(
            [sys.executable, ROOT / script, *flags, "--out", out, "--resume"],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)}, stdout=screen, stderr=screen)


def keep(name, command, seconds, args, facts):
    """Write run.json of a run that has ended or was stopped, and keep its log if it is whole -> a
    line about it."""
    out = args.out / name
    seconds += read_record(out).get("wall_seconds", 0)  # of earlier calls
    record = {"command": shlex.join(["python", *shlex.split(command)]), **facts,
              "date": time.strftime("%Y-%m-%d"), "wall_seconds": round(seconds, 1)}
    (out / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    log = read_log(out)
    if log is None:
        said = "".join((args.out / f"{name}.txt").read_text().splitlines()[-1:])
    else:
        (args.results / name).mkdir(parents=True, exist_ok=True)
        for file in "log.jsonl", "run.json":
            shutil.copy(out / file, args.results / name / file)
        trained = log["report"]["trained"]
        said = f"kNN {trained['knn']:.1f}, probe {trained['probe']:.1f}"
    return f"{name}: {said}, {seconds / 60:.1f} minutes"


def measure(args):
    """Run what is missing, `jobs` at a time with an equal share of the cores -> the exit status."""
    todo = missing(args.group, args.results, args.only)
    cores, facts = machine()
    threads = max(1, cores // args.jobs)
    facts = {**facts, "threads": threads, "jobs": args.jobs}
    deadline = time.monotonic() + 60 * args.minutes
    running = []  # name, command, process, its start
    failed = False
    while todo or running:
        time_is_over = time.monotonic() > deadline
        if time_is_over:
            todo = []
        while todo and len(running) < args.jobs:
            name, command = todo.pop(0)
            running.append((name, command, start(name, command, args, threads), time.monotonic()))
        for run in list(running):
            name, command, process, since = run
            if time_is_over:
                process.kill()
                process.wait()
            if process.poll() is not None:
                running.remove(run)
                print(keep(name, command, time.monotonic() - since, args, facts), flush=True)
                failed = failed or (process.returncode != 0 and not time_is_over)
        try:
            time.sleep(0.2)
        except KeyboardInterrupt:  # as if the time were over: the minutes so far are kept
            deadline = time.monotonic()
    print(f"{len(missing(args.group, args.results, args.only))} runs of {args.group} are missing")
    return 1 if failed else 0


# --------------------------------------------------------------------------------------- picture


def picture(args):
    """neighbours.png from the finished run simclr-cifar-0: test images and two views of each, and
    their nearest test images by the trained and by the untrained network."""
    sys.path.insert(0, str(ROOT))
    import torch
    from PIL import Image

    import common
    import linear_probe
    import simclr

    device = torch.device("cpu")
    torch.manual_seed(0)
    backbone, untrained, size = linear_probe.load_backbone(args.out / "simclr-cifar-0/backbone.pth")
    recipe = simclr.parse_args(["--data", args.data, "--recipe", "cpu"])
    train, test = common.load_data(recipe, device)
    linear_probe.calibrate_batch_norm(untrained, train, size, device)
    make_view = partial(simclr.augment, image_size=recipe.image_size, crop_scale=recipe.crop_scale,
                        jitter_strength=recipe.jitter_strength, blur=recipe.blur)
    with tempfile.TemporaryDirectory() as folder:
        recipe.out = folder
        common.save_views(recipe, test, device, make_view, make_view)
        linear_probe.save_neighbours(backbone.eval(), test, size, device, f"{folder}/trained.png")
        linear_probe.save_neighbours(untrained.eval(), test, size, device, f"{folder}/random.png")
        parts = [Image.open(f"{folder}/{name}.png").reduce(2)
                 for name in ("views", "trained", "random")]
        gap = 20  # pixels
        width = sum(part.width for part in parts) + gap * (len(parts) - 1)
        page = Image.new("RGB", (width, parts[0].height), "white")
        left = 0
        for part in parts:
            page.paste(part, (left, 0))
            left += part.width + gap
        page.save(args.results / "neighbours.png", optimize=True)


# ---------------------------------------------------------------------------------------- tables


def table(head, rows):
    """A table in Markdown. head: the names of its columns, separated by |."""
    names = head.split("|")
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def span(values):
    """Mean and range, with one decimal; empty without values."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def best_stage(run):
    """The stage that is best on held-out training images; "" where the report has none."""
    stages = {name.removeprefix("trained "): max(row["held_out"].values())
              for name, row in run["report"].items() if name.startswith("trained ")}
    return max(stages, key=stages.get, default="")


def accuracy(runs, name="trained", stage=False):
    """-> the cells of kNN and probe; stage: at the best stage of each trained network."""
    found = []
    for run in runs:
        row = f"{name} {best_stage(run)}" if stage else name
        found.append(run["report"][row])
    return [span([row[key] for row in found]) for key in ("knn", "probe")]


def seeds(runs, prefix):
    return [runs[f"{prefix}-{seed}"] for seed in range(3) if f"{prefix}-{seed}" in runs]


def minutes(runs):
    return span([run["wall_seconds"] / 60 for run in runs if "wall_seconds" in run])


def group_table(runs, suffix=""):
    rows = []
    every = []
    for method in METHODS:
        own = seeds(runs, method + suffix)
        if own:
            every += own
            timed = own
            if not suffix:  # of the demonstrations, one was timed on an idle machine
                timed = [runs[f"{method}-idle"]] if f"{method}-idle" in runs else []
            rows.append([METHODS[method], *accuracy(own), *accuracy(own, "random"), minutes(timed)])
            if all(map(best_stage, own)):
                stages = ", ".join(sorted({best_stage(run) for run in own}))
                label = f"{METHODS[method]}, best stage ({stages})"
                rows.append([label, *accuracy(own, stage=True),
                             *accuracy(own, "random", stage=True), ""])
    rows.append(["raw pixels", *accuracy(every[:1], "pixels"), "", "", ""])
    return table("method|kNN|probe|random: kNN|random: probe|minutes", rows)


def features(run, method, name):
    """-> the report's row of a network's features; of MAE's, after its best stage."""
    if "stage" in READOUT.get(method, ""):
        name = f"{name} {best_stage(run)}"
    return run["report"][name]


def meets_goal(run, method):
    """The goal of a demonstration: one and a half times the kNN of the random network and of the
    pixels, for MAE of the random network alone; for rotation and jigsaw ten points of probe above
    the random network's."""
    trained = features(run, method, "trained")
    random = features(run, method, "random")
    if READOUT.get(method) == "probe":
        return trained["probe"] >= random["probe"] + 10
    if method == "mae":
        return trained["knn"] >= 1.5 * random["knn"]
    return trained["knn"] >= 1.5 * max(random["knn"], run["report"]["pixels"]["knn"])


def unseen_table(runs):
    rows = []
    labels = dict(METHODS)
    for method in EARLIER_DEMO:
        labels[f"{method}-earlier"] = f"{METHODS[method]}, earlier settings"
    for name, label in labels.items():
        own = [runs[f"{name}-{seed}"] for seed in UNSEEN[name] if f"{name}-{seed}" in runs]
        if not own:
            continue
        method = name.split("-")[0]
        if "stage" in READOUT.get(method, ""):
            label += ", best stage"
        cells = []
        for network, key in itertools.product(("trained", "random"), ("knn", "probe")):
            values = [features(run, method, network)[key] for run in own]
            cells.append(f"{min(values):.1f}, {statistics.median(values):.1f}, {max(values):.1f}")
        met = sum(meets_goal(run, method) for run in own)
        rows.append([label, *cells, f"{met} of {len(own)}"])
    return table("method|kNN: lowest, median, highest|probe|random: kNN|random: probe|"
                 "meet the goal", rows)


def score(runs, method):
    """For the project's README: mean top-1 by the readout that suits the method, and untrained."""
    own = seeds(runs, method)
    if not own:
        return ""
    what = READOUT.get(method.split("-")[0], "kNN")
    column = 1 if what == "probe" else 0
    trained = accuracy(own, "trained", "stage" in what)[column].split()[0]
    random = accuracy(own, "random", "stage" in what)[column].split()[0]
    return f"{what} {trained} (untrained {random})"


def small_table(runs):
    """Views of 32 and of 24 pixels."""
    rows = []
    for method in METHODS:
        large = runs.get(f"{method}-standard-0") or runs.get(f"{method}-cifar-0")
        small = runs.get(f"{method}-cifar-0" if method in STANDARD else f"{method}-24")
        if large and small:
            rows.append([METHODS[method], *accuracy([large]), *accuracy([small])])
    return table("method|32 pixels, 20 epochs: kNN|probe|24 pixels, 15 epochs (SimCLR and "
                 "SwAV: twice the rate; SimSiam: that, and 20 epochs): kNN|probe", rows)


def few_table(runs):
    rows = []
    for method in "simclr", "byol", "mae":
        for count in *FEW, 50000:
            name = f"{method}-cifar-0" if count == 50000 else f"{method}-few-{count}"
            if name in runs:
                own = [runs[name]]
                rows.append([METHODS[method], f"{count:,}", *accuracy(own),
                             *accuracy(own, "random")])
    return table("method|images|kNN|probe|random: kNN|random: probe", rows)


def finetune_table(runs, log=HERE / "benchmark/finetune.txt"):
    """From what `linear_probe.py --finetune` has printed; a row has the seeds of one fraction."""
    rows = {}
    for block in log.read_text().split("\n$ ")[1:]:
        checkpoint, labels = re.search(r"runs/(\S+)/backbone.pth .*--labels (\S+)", block).groups()
        found = re.findall(r"linear probe +(\S+)  fine-tuned +(\S+)  (?:trained|random)", block)
        (seconds,) = re.findall(r"(\S+) s$", block.strip())
        values = [float(value) for pair in found for value in pair]
        rows.setdefault((checkpoint, float(labels)), []).append([*values, float(seconds) / 60])
    return table("backbone|labels|linear probe|fine-tuned|untrained: linear probe|"
                 "trained with labels alone|CPU minutes",
                 [[f"`{checkpoint}`", f"{50000 * labels:,.0f}", *map(span, zip(*of_seeds))]
                  for (checkpoint, labels), of_seeds in sorted(rows.items())])


def loss_table(runs):
    rows = []
    for loss in LOSSES:
        names = f"loss-{loss}", f"loss-{loss}-cifar"
        both = [[runs[name]] if name in runs else [] for name in names]
        rows.append([f"`{loss}`", *accuracy(both[0]), *accuracy(both[1])])
    return table("loss|synthetic images: kNN|probe|10,000 of CIFAR-10: kNN|probe", rows)


def last_epoch(run, health):
    """The mean of a number of the log lines over the last epoch."""
    lines = [line for line in run["lines"] if health in line]
    last = [line[health] for line in lines if line["epoch"] == lines[-1]["epoch"]]
    return statistics.mean(last)


def ablation_table(runs):
    rows = []
    for name, (_, health, question) in ABLATIONS.items():
        pair = [runs.get(f"{name.split('-')[0]}-0"), runs.get(name)]
        if all(pair):
            both = [[f"{last_epoch(run, health):.3f}", *accuracy([run])] for run in pair]
            cells = [f"{whole} → {ablated}" for whole, ablated in zip(*both)]
            rows.append([f"`{name}`", question, health.replace("_", " "), *cells])
    return table("ablation|question|health|whole → ablated|kNN|probe", rows)


def repeated_table(runs):
    rows = []
    for name in REPEATED:
        method, *part = name.split("-")
        health = ABLATIONS[name][1]
        for prefix, what in (method, "whole"), (name, " ".join(part)):
            own = seeds(runs, f"{prefix}-10000")
            values = sorted(last_epoch(run, health) for run in own)
            if own:
                rows.append([METHODS[method], what, health.replace("_", " "),
                             f"{statistics.mean(values):.3f} ({values[0]:.3f} to {values[-1]:.3f})",
                             *accuracy(own), *accuracy(own, "random")])
    return table("method|part|health|its mean|kNN|probe|random: kNN|random: probe", rows)


def runs_table(runs):
    """Every log that is kept: its command, figures, minutes and hardware."""
    rows = []
    for name, run in runs.items():
        knn, probe = accuracy([run])
        random = ", ".join(accuracy([run], "random"))
        pixels = ", ".join(accuracy([run], "pixels"))
        machine = ", ".join(str(run[key]) for key in ("hardware", "date") if key in run)
        command = f"`{run.get('command', '')}`"
        rows.append([name, command, knn, probe, random, pixels, minutes([run]), machine])
    return table("run|command|kNN|probe|random: kNN, probe|pixels: kNN, probe|minutes|"
                 "hardware, date", rows)


TABLES = {"demo": group_table, "unseen": unseen_table,
          "cifar": partial(group_table, suffix="-cifar"), "gpu": partial(group_table, suffix="-gpu"),
          "small": small_table, "few": few_table, "finetune": finetune_table,
          "losses": loss_table, "ablation": ablation_table, "repeated": repeated_table,
          "runs": runs_table}


def rewrite(text, runs):
    """-> the page with what stands between its marks made anew: tables, `<!-- table: name -->` to
    `<!-- end -->`; cells, `<!-- score: method -->` or `<!-- lines: method -->` to `<!-- -->`."""
    def new_table(match):
        return f"{match[1]}\n{TABLES[match[2]](runs)}\n{match[3]}"

    def new_lines(match):
        source = (ROOT / f"{match[2]}.py").read_text(encoding="utf8")
        return f"{match[1]}{len(source.splitlines())}{match[3]}"

    def new_score(match):
        return f"{match[1]}{score(runs, match[2])}{match[3]}"

    text = re.sub(r"(<!-- table: ([\w.-]+) -->\n).*?(<!-- end -->)", new_table, text,
                  flags=re.DOTALL)
    text = re.sub(r"(<!-- lines: (\w+) -->).*?(<!-- -->)", new_lines, text)
    return re.sub(r"(<!-- score: ([\w-]+) -->).*?(<!-- -->)", new_score, text)


def pages(results):
    return [results / "README.md", results.parent.parent / "README.md"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("group", choices=[*RUNS, "table", "picture"])
    add("--data", default="cifar10", help="where CIFAR-10 is (torchvision's)")
    add("--jobs", type=int, default=1, help="runs at a time, which share the cores and the GPU (1)")
    add("--only", default="", metavar="NAME", help="of one method, or the run of this name")
    add("--minutes", type=float, default=1e6, help="stop after so long")
    add("--out", type=Path, default="runs/measure", help="the runs' folders (runs/measure)")
    add("--results", type=Path, default=HERE, help="where logs are kept (here)")
    return parser.parse_args(argv)


def main():
    if sys.argv[1:2] == ["ablate"]:
        return ablate(sys.argv[2], sys.argv[3:])
    args = parse_args()
    if args.group == "picture":
        return picture(args)
    if args.group != "table":
        return measure(args)
    runs = read_runs(args.results)
    for page in pages(args.results.resolve()):
        page.write_text(rewrite(page.read_text(encoding="utf8"), runs), encoding="utf8")


if __name__ == "__main__":
    sys.exit(main())
