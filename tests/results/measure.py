"""Every measured run of this project as one command, and the READMEs' tables from the runs' logs.

    python tests/results/measure.py cpu --data PATH --jobs 2      what is missing of a group of runs
    python tests/results/measure.py gpu --data PATH --jobs 2 --minutes 28
    python tests/results/measure.py table                         then the tables, from all logs
    python tests/results/measure.py ablate swav-no-sinkhorn       a script without a part of it

PATH is CIFAR-10: a folder with train/ and test/, or cifar10, which torchvision downloads. A run is
done when tests/results/<name>/log.jsonl ends with a report; run.json beside it has its command,
hardware and cost. One that was interrupted, or stopped by --minutes, goes on at the next call.
"""

import argparse
import importlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
METHODS = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "simsiam": "SimSiam", "swav": "SwAV",
           "barlow": "Barlow Twins", "dino": "DINO", "mae": "MAE", "rotation": "Rotation",
           "jigsaw": "Jigsaw"}
# CIFAR-10, ResNet-18. kNN at 200 epochs, its minutes, kNN at 800: lightly's benchmark on an A6000,
# the best of its batch sizes, maximum over epochs (MoCo at 200: the notebook of
# facebookresearch/moco, symmetric loss). Linear at 1000: solo-learn, an online classifier.
PUBLISHED = {"simclr": (84.8, 87, 87.9, 90.7), "moco": (85.3, None, 89.9, 92.9),
             "byol": (86.9, 122, 91.0, 92.6), "simsiam": (81.9, 97, 90.4, 90.5),
             "swav": (84.2, 89, 88.4, 89.2), "barlow": (84.2, 376, 85.9, 92.1),
             "dino": (84.0, 120, 84.8, 89.5)}

# ------------------------------------------------------------------------------------- ablations


def no_stop_gradient(simsiam):
    import torch.nn.functional as F

    def loss(p1, p2, z1, z2):
        return -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2

    simsiam.simsiam_loss = loss


def no_predictor(byol):
    from torch import nn

    init = byol.BYOL.__init__

    def init_without(self, *args):
        init(self, *args)
        self.predictor = nn.Identity()

    byol.BYOL.__init__ = init_without


def no_average(byol):
    update = byol.ema_update
    byol.ema_update = lambda target, online, ema_momentum: update(target, online, 0.0)


def no_sinkhorn(swav):
    swav.sinkhorn = lambda scores, epsilon, iterations: (scores / epsilon).softmax(1)


# Name, which starts with the script's: flags, or what removes a part that has no flag, since nobody
# should run without it; the health number, by its name on the log line; what the run asks.
ABLATIONS = {
    "simclr-no-jitter": ("--jitter-strength 0", "accuracy",
                         "without colour jitter, do colours alone find the other view?"),
    "moco-one-bn-group": ("--bn-groups 1", "accuracy",
                          "in one BN batch, which shuffling cannot mix, do statistics leak?"),
    "byol-no-predictor": (no_predictor, "spread", "is it the predictor that prevents collapse?"),
    "byol-no-average": (no_average, "spread",
                        "is a target needed that is an average, not the network itself?"),
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
    "mae-plain-pixels": ("--no-norm-pix", "loss/variance",
                         "what is it worth to normalise the pixels of each patch?"),
    "rotation-no-negatives": ("--invert 0", "accuracy",
                              "does light that falls from above give the rotation away?"),
    "jigsaw-no-gaps": ("--tile-size 10", "accuracy",
                       "do tiles that touch give the order away by their edges?"),
}


def ablate(name, flags):
    """Train without the part that an ablation of ABLATIONS removes; the flags are the script's."""
    sys.path.insert(0, str(ROOT))
    module, change = importlib.import_module(name.split("-")[0]), ABLATIONS[name][0]
    change(module)
    importlib.import_module("common").main(module.train, module.parse_args, flags)


def ablation_command(name):
    change = ABLATIONS[name][0]
    if isinstance(change, str):  # a flag of the script
        return f"{name.split('-')[0]}.py --seed 0 {change}"
    return f"tests/results/measure.py ablate {name} --seed 0"


# ------------------------------------------------------------------------------------------ runs

SUBSET = "--data cifar --recipe demo --max-images 10000"  # 100,000 views in 5 epochs
FEWER = {"rotation": " --epochs 2"}  # four views of each image
NETWORKS = "resnet8x0.5", "resnet8x2", "resnet20", "vgg11_bnx0.25"  # resnet8: in the group cpu
RUNS = {
    "cpu": [(f"{m}{suffix}-{seed}", f"{m}.py{flags + FEWER.get(m, '') * bool(flags)} --seed {seed}")
            for seeds, suffix, flags in [("0", "", ""), ("0", "-cifar", f" {SUBSET}"),
                                         ("12", "", ""), ("12", "-cifar", f" {SUBSET}")]
            for seed in seeds for m in METHODS],
    "gpu": [(f"{m}-200", f"{m}.py --data cifar --recipe cifar --epochs 200 --seed 0")
            for m in METHODS]
    + [("dino-vit-200",
        "dino.py --data cifar --recipe cifar --epochs 200 --arch vit_tiny --seed 0")],
    "gpu-long": [(f"{m}-800", f"{m}.py --data cifar --recipe cifar --epochs 800 --seed 0")
                 for m in METHODS],
    "ablation": [(name, ablation_command(name)) for name in ABLATIONS],
    "architecture": [(f"{m}-{arch}", f"{m}.py {SUBSET}{FEWER.get(m, '')} --arch {arch} --seed 0")
                     for arch in NETWORKS for m in ("rotation", "simclr")]
    + [(f"simclr-resnet20-{seed}", f"simclr.py {SUBSET} --arch resnet20 --seed {seed}")
       for seed in "12"],
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


def write_record(folder, record):
    (folder / "run.json").write_text(json.dumps(record, indent=1) + "\n")


def missing(group, results, only=""):
    """-> (name, command) of the group's runs that are not done, in their order."""
    return [(name, command) for name, command in RUNS[group]
            if only in (name.split("-")[0], name, "") and not read_log(results / name)]


def machine(gpu):
    """-> what a run is documented with: hardware and versions."""
    script = ("import torch, torchvision; print(torch.__version__, torchvision.__version__, "
              "torch.cuda.get_device_name() if torch.cuda.is_available() else '')")
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if found.returncode:
        sys.exit(found.stderr.strip().splitlines()[-1])
    torch, torchvision, name = found.stdout.strip("\n").split(" ", 2)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    models = re.findall("model name\\s*: (.*)", info.read_text()) if info.exists() else []
    cpu = f"{models[0] if models else platform.processor()}, {cores} cores"
    return cores, {"hardware": name if gpu and name else cpu, "torch": torch,
                   "torchvision": torchvision}


def measure(args):
    """Run what is missing -> the exit status."""
    gpu = args.group.startswith("gpu")
    if args.flags:  # a trial is neither continued nor kept as the run without its flags
        if args.results.resolve() == HERE:
            sys.exit("--flags is for a trial: give it --results, a folder of its own")
        args.out = args.out / f"trial-{zlib.crc32(args.flags.encode()):08x}"

    def keep(name):
        (args.results / name).mkdir(parents=True, exist_ok=True)
        for file in "log.jsonl", "run.json":
            shutil.copy(args.out / name / file, args.results / name / file)

    todo = missing(args.group, args.results, args.only)
    for name, _ in [run for run in todo if read_log(args.out / run[0])]:
        keep(name)  # finished by a call whose results folder was another
        todo = [run for run in todo if run[0] != name]
        print(f"{name}: was finished, now kept", flush=True)
    cores, facts = machine(gpu) if todo else (1, {})
    threads = max(1, cores // args.jobs)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if not gpu:
        env["CUDA_VISIBLE_DEVICES"] = ""
    total, begin, running, walls, failed, stopped = len(todo), time.monotonic(), {}, [], 0, False
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def start(name, command):
        words = shlex.split(command) + shlex.split(args.flags)
        shown, out = ["python", *words], args.out / name
        for place, (flag, word) in enumerate(zip(words, words[1:]), 1):
            if flag == "--data":  # a folder is recorded by its name alone
                words[place] = args.data if word == "cifar" else word
                shown[place + 1] = Path(words[place]).name
        shown = shlex.join(shown)
        record = {"command": shown, "seed": int(re.findall(r"--seed (\d+)", shown)[-1]), **facts,
                  "threads": threads, "jobs": args.jobs, "date": time.strftime("%Y-%m-%d"),
                  "wall_seconds": read_record(out).get("wall_seconds", 0)}  # of earlier calls
        out.mkdir(parents=True, exist_ok=True)
        write_record(out, record)
        with open(args.out / f"{name}.txt", "a") as screen:
            process = subprocess.Popen(
                [sys.executable, ROOT / words[0], *words[1:], "--out", out, "--resume"],
                env=env, stdout=screen, stderr=subprocess.STDOUT)
        running[name] = process, time.monotonic(), record

    def end(name):
        """Adds up the time, also of a run that was interrupted, and keeps what is finished."""
        nonlocal failed
        process, since, record = running.pop(name)
        out, wall = args.out / name, time.monotonic() - since
        record["wall_seconds"] = round(record["wall_seconds"] + wall, 1)
        write_record(out, record)
        if process.returncode == 0 and (log := read_log(out)):
            keep(name)
            walls.append(wall)
            left = statistics.mean(walls) * (len(todo) + len(running)) / args.jobs / 60
            trained = log["report"]["trained"]
            said = (f"kNN {trained.get('knn')}, probe {trained.get('probe')}, "
                    f"{record['wall_seconds'] / 60:.1f} minutes; about {left:.0f} minutes left")
        elif stopped:
            said = "stopped; the next call continues it"
        else:
            failed += 1
            last = (args.out / f"{name}.txt").read_text().strip().splitlines()[-1:]
            said = f"failed: {' '.join(last)}"
        print(f"{total - len(todo) - len(running)}/{total} {name}: {said}", flush=True)

    try:
        while todo or running:
            if time.monotonic() - begin > 60 * args.minutes:
                break
            while todo and len(running) < args.jobs:
                start(*todo.pop(0))
            time.sleep(0.2)
            for name in [name for name, (process, *_) in running.items()
                         if process.poll() is not None]:
                end(name)
    except KeyboardInterrupt:
        failed += 1
    stopped = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for process, *_ in running.values():
        process.terminate()  # saves, and exits
    for name in list(running):
        running[name][0].wait()
        end(name)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    print(f"{len(missing(args.group, args.results, args.only))} runs of {args.group} are missing")
    return 1 if failed else 0


# ---------------------------------------------------------------------------------------- tables


def table(head, rows):
    return "".join(f"| {' | '.join(row)} |\n" for row in
                   [head.split("|"), ["---"] * len(head.split("|")), *rows])


def span(values):
    """Mean and range, with one decimal; empty without values."""
    values = [v for v in values if v is not None]
    if len(values) < 2:
        return "".join(f"{v:.1f}" for v in values)
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def accuracy(runs, name="trained"):
    """-> the cells of kNN and probe."""
    return [span([run["report"][name].get(key) for run in runs]) for key in ("knn", "probe")]


def best_layer(runs):
    """-> the stage that is best by held-out accuracy, and the cells of kNN and probe there, of the
    trained and of the random network; None where the reports have no layers."""
    layers = [[run["report"][name].get("layers") for run in runs] for name in ("trained", "random")]
    if not runs or not all(layers[0]):
        return None
    stage = max(layers[0][0], key=lambda s: sum(max(found[s]["held_out"].values())
                                                for found in layers[0]))
    return stage, [span([found[stage].get(key) for found in own])
                   for own in layers for key in ("knn", "probe")]


def with_best_layer(method, runs, row, random=True):
    """The row of a method, and one more with the best layer where its report has layers."""
    if not (best := best_layer(runs)):
        return [row]
    cells = best[1][: 4 if random else 2]
    return [row, [f"{METHODS[method]}, best layer: {best[0]}", *cells,
                  *[""] * (len(row) - 1 - len(cells))]]


def cost(runs):
    """-> the cells of images per second, minutes and peak memory in GB."""
    def mean(function, decimals):
        values = [v for v in map(function, runs) if v is not None]
        return f"{statistics.mean(values):,.{decimals}f}" if values else ""

    return [mean(speed, 0), mean(minutes, 1), mean(lambda run: run["lines"][-1].get("peak_gb"), 1)]


def speed(run):
    return statistics.median(line["images_per_s"] for line in run["lines"] if "loss" in line)


def minutes(run):
    """Of the whole process; of a log without run.json, of the training steps."""
    last = [line["seconds"] for line in run["lines"] if "seconds" in line][-1]
    return run.get("wall_seconds", last) / 60


def seeds(runs, prefix):
    return [runs[f"{prefix}-{seed}"] for seed in range(3) if f"{prefix}-{seed}" in runs]


def cpu_table(runs, suffix=""):
    rows, every = [], []
    for method in METHODS:
        own = seeds(runs, method + suffix)
        every += own
        row = [METHODS[method], *accuracy(own), *accuracy(own, "random"), str(len(own) or ""),
               *cost(own)]
        rows += with_best_layer(method, own, row)
    rows.append(["raw pixels", *accuracy(every[:1], "pixels"), *[""] * 6])
    return table("method|kNN|probe|random: kNN|random: probe|seeds|images/s|minutes|GB", rows)


def gpu_table(runs, group="gpu"):
    rows, first = [], [runs[name] for name, _ in RUNS[group][:1] if name in runs]  # a ResNet-18
    for name, _ in RUNS[group]:
        method, own = name.split("-")[0], [runs[name]] if name in runs else []
        vit = method == "mae" or "-vit-" in name  # what is published is a ResNet's
        knn, its_minutes, long_knn, linear = PUBLISHED.get("" if vit else method, [None] * 4)
        published = (knn, its_minutes) if group == "gpu" else (long_knn, linear)
        rows += with_best_layer(method, own, [
            METHODS[method] + ", ViT-tiny" * vit, *accuracy(own),
            *("" if value is None else f"{value}" for value in published), *cost(own)],
            random=False)
    rows += [["ResNet-18 at random", *accuracy(first, "random"), *[""] * 5],
             ["raw pixels", *accuracy(first, "pixels"), *[""] * 5]]
    last = "its minutes" if group == "gpu" else "published linear"
    return table(f"method|kNN|probe|published kNN|{last}|images/s|minutes|GB", rows)


def health_number(run, name):
    """The last value of a health number, or of the ratio of two."""
    last = [line for line in run["lines"] if "loss" in line][-1]
    first, _, second = name.partition("/")
    return f"{last[first] / (last[second] if second else 1):.3f}" if first in last else ""


def ablation_table(runs):
    rows = []
    for name, (_, health, question) in ABLATIONS.items():
        pair = [runs.get(f"{name.split('-')[0]}-0"), runs.get(name)]
        cells = [""] * 3
        if all(pair):
            both = [[health_number(run, health), *accuracy([run])] for run in pair]
            cells = [f"{whole} → {ablated}" for whole, ablated in zip(*both)]
        rows.append([f"`{name}`", question, health, *cells])
    return table("ablation|question|health|whole → ablated|kNN|probe", rows)


def architecture_table(runs):
    rows = []
    for arch in NETWORKS[0], "resnet8", *NETWORKS[1:]:
        rotation, simclr = (seeds(runs, f"{method}-cifar") if arch == "resnet8" else
                            [runs[name] for name in (f"{method}-{arch}", f"{method}-{arch}-1",
                                                     f"{method}-{arch}-2") if name in runs]
                            for method in ("rotation", "simclr"))
        best = best_layer(rotation)
        rows.append([arch, *accuracy(simclr, "random"), *accuracy(rotation),
                     f"{best[0]}: {best[1][1]}" if best else "", *accuracy(simclr)])
    return table("network|random: kNN|probe|rotation: kNN|probe|probe of the best layer|"
                 "SimCLR: kNN|probe", rows)


def pretext_table(runs):
    """How well the pretext tasks are solved in the last epoch, and what the stages are worth."""
    def solved(run):
        lines = [line for line in run["lines"] if "loss" in line]
        return statistics.mean(100 * line["accuracy"] for line in lines
                               if line["epoch"] == lines[-1]["epoch"])

    rows = []
    for method in "rotation", "jigsaw":
        for suffix, data in ("", "built-in set"), ("-cifar", "10,000 of CIFAR-10"):
            own = seeds(runs, method + suffix)
            stage, best = best_layer(own) or ("", [""] * 4)
            last = [accuracy(own, name)[1] for name in ("trained", "random")]
            rows.append([METHODS[method], data, span([solved(run) for run in own]), stage,
                         best[1], best[3], *last])
    return table("task|data|solved, %|best layer|probe there|at random|probe of the last|at random",
                 rows)


def summary_table(runs):
    """For the project's README: what a reader can repeat, and what a GPU adds."""
    groups = [lambda m: seeds(runs, m), lambda m: seeds(runs, f"{m}-cifar"),
              lambda m: [runs[f"{m}-200"]] if f"{m}-200" in runs else []]
    rows = [[f"`{m}.py`", *(cell for group in groups for cell in accuracy(group(m)))]
            for m in METHODS]
    for label, method, name in (("SimCLR's network at random", "simclr", "random"),
                                ("MAE's network at random", "mae", "random"),
                                ("raw pixels", "simclr", "pixels")):
        own = [group(method)[: 1 if name == "pixels" else None] for group in groups]
        rows.append([label, *(cell for group in own for cell in accuracy(group, name))])
    return table("|built-in set: kNN|probe|10,000 of CIFAR-10: kNN|probe|CIFAR-10, 200 epochs: kNN"
                 "|probe", rows)


def runs_table(runs):
    """Every log that is kept: its command, figures, cost and hardware."""
    rows = []
    for name, run in runs.items():
        losses = [line["loss"] for line in run["lines"] if "loss" in line]
        both = [", ".join(accuracy([run], other)) for other in ("random", "pixels")]
        rows.append([name, f"`{run.get('command', '')}`", *accuracy([run]), *both,
                     f"{losses[-1]:.3f}" if losses else "", *cost([run]),
                     ", ".join(str(run[key]) for key in ("hardware", "date") if key in run)])
    return table("run|command|kNN|probe|random: kNN, probe|pixels: kNN, probe|last loss|images/s|"
                 "minutes|GB|hardware, date", rows)


def measured(runs, method):
    """The last paragraph of the method file's docstring: means over the seeds."""
    lines = ["Measured in the demonstration, top-1 in percent (of the network at random):"]
    for suffix, data in ("", "built-in set"), ("-cifar", "10,000 of CIFAR-10"):
        own, cells = seeds(runs, method + suffix), []
        for key in ("knn", "probe") if own else ():
            trained, random = (statistics.mean(run["report"][name][key] for run in own)
                               for name in ("trained", "random"))
            cells.append(f"{trained:.1f} ({random:.1f})")
        lines += [f"{data}, kNN {cells[0]}, probe {cells[1]}; seeds: {len(own)}"] if own else []
    return "\n".join(lines)


def report_table(run):
    """What the script itself prints at its end."""
    return table("|kNN, %|linear probe, %", [[name, *accuracy([run], name)]
                                            for name in ("trained", "random", "pixels")])


TABLES = {"cpu": cpu_table, "cpu-cifar": lambda runs: cpu_table(runs, "-cifar"), "gpu": gpu_table,
          "gpu-long": lambda runs: gpu_table(runs, "gpu-long"), "ablation": ablation_table,
          "pretext": pretext_table, "architecture": architecture_table, "summary": summary_table,
          "runs": runs_table}


def read_runs(results):
    """-> {name: run} of all finished logs, in the order of their names."""
    found = {log.parent.name: read_log(log.parent) for log in sorted(results.glob("*/log.jsonl"))}
    return {name: run for name, run in found.items() if run}


def benchmark_table(name, number):
    """One of the tables that `tests/benchmark.py name` printed, counted from 1."""
    text = (HERE / "benchmark" / f"{name}.txt").read_text(encoding="utf8")
    return re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)[int(number) - 1]


def rewrite(text, runs):
    """A page whose tables, each between `<!-- table: name -->` and `<!-- end -->`, are made anew;
    the name is one of TABLES, or a run's, for the table that its script prints, or benchmark.1 for
    the first table that this command of benchmark.py printed."""
    def make(match):
        name, (command, _, number) = match[2], match[2].partition(".")
        made = (TABLES[name](runs) if name in TABLES else report_table(runs[name])
                if name in runs else benchmark_table(command, number))
        return match[1] + "\n" + made + "\n" + match[3]

    return re.sub(r"(<!-- table: ([\w.-]+) -->\n).*?(<!-- end -->)", make, text, flags=re.DOTALL)


def rewrite_docstring(text, runs, method):
    """A method file whose docstring ends with what was measured."""
    return re.sub(r'^Measured.*?(?=\n"""\n)', lambda _: measured(runs, method), text, count=1,
                  flags=re.DOTALL | re.MULTILINE)


def pages(results):
    return [results / "README.md", results.parent.parent / "README.md"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("group", choices=[*RUNS, "table"])
    add("--data", default="cifar10", help="where CIFAR-10 is (torchvision's)")
    add("--jobs", type=int, default=1, help="runs at a time, which share the cores and the GPU (1)")
    add("--only", default="", metavar="NAME", help="of one method, or the run of this name")
    add("--minutes", type=float, default=float("inf"), help="stop after so long")
    add("--flags", default="", help="more flags for every run, for a trial")
    add("--out", type=Path, default="runs/measure", help="the runs' folders (runs/measure)")
    add("--results", type=Path, default=HERE, help="where logs are kept (here)")
    return parser.parse_args(argv)


def main():
    patches = [name for name, (change, *_) in ABLATIONS.items() if callable(change)]
    if sys.argv[1:2] == ["ablate"]:
        if sys.argv[2:3] and sys.argv[2] in patches:
            return ablate(sys.argv[2], sys.argv[3:])
        sys.exit(f"ablate one of {', '.join(patches)}; the others are flags of the scripts")
    args = parse_args()
    if args.group != "table":
        return measure(args)
    runs = read_runs(args.results)
    for page in pages(args.results.resolve()):
        page.write_text(rewrite(page.read_text(encoding="utf8"), runs), encoding="utf8")
    for method in METHODS:
        file = pages(args.results.resolve())[1].parent / f"{method}.py"
        text = file.read_text(encoding="utf8")
        file.write_text(rewrite_docstring(text, runs, method), encoding="utf8")


if __name__ == "__main__":
    sys.exit(main())
