"""The figures in the two READMEs are those of the logs in tests/results/."""

import json
import re

import pytest
from conftest import ROOT

LOGS = sorted((ROOT / "tests" / "results").glob("*/log.jsonl"))
TABLE = (ROOT / "tests" / "results" / "README.md").read_text(encoding="utf8").splitlines()
README = (ROOT / "README.md").read_text(encoding="utf8")


def report(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return next(line["report"] for line in lines if "report" in line)


@pytest.mark.parametrize("log", LOGS, ids=lambda path: path.parent.name)
def test_row_of_each_log(log):
    found = report(log)
    row = next(line for line in TABLE if line.startswith(f"| {log.parent.name} |")).split(" | ")
    expected = [f"{found['trained'][key]:.1f}" for key in ("knn", "probe")]
    expected += [f"{found[name]['knn']:.1f}, {found[name]['probe']:.1f}"
                 for name in ("random", "pixels")]
    assert row[2:6] == expected


def test_rows_without_a_log():
    names = [line.split(" | ")[0][2:] for line in TABLE if re.match(r"\| \w+-[\w-]+ \|", line)]
    assert names and set(names) == {log.parent.name for log in LOGS}


def test_table_of_methods():
    rows = re.findall(r"^\| `(\w+)\.py` .*\| ([\d./ ]*) \| ([\d./ ]*) \|$", README, re.MULTILINE)
    assert len(rows) == 10
    for method, *cells in rows:
        for run, cell in zip((f"{method}-0", f"{method}-cifar"), cells):
            log = ROOT / "tests" / "results" / run / "log.jsonl"
            found = report(log)["trained"] if log.exists() else None
            expected = f"{found['knn']:.1f} / {found['probe']:.1f}" if found else ""
            assert cell.strip() == expected, (method, run)
