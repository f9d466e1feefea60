"""SIGKILL at each point of a save, and Ctrl-C on a terminal: the run continues to the same bits."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from processes import _context
from test_run import SMALL, TINY, at_step, load, resume, same, start, state, stop_after, undisturbed

import common
import simclr

pytestmark = pytest.mark.usefixtures("class_folders", "no_report")


def status_of(function, *args):
    """-> exit status of a process that calls this function, in this folder."""
    process = _context.Process(target=in_folder, args=(os.getcwd(), function, args))
    process.start()
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def in_folder(folder, function, args):
    os.chdir(folder)
    torch.set_num_threads(1)
    function(*args)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_writing(file, moment):
    """From here on, SIGKILL comes at this moment of writing this file."""
    save = torch.save
    replace = os.replace

    def save_and_die(value, path):
        save(value, path)
        if path == f"run/{file}.tmp" and moment != "renamed":
            if moment == "half written":
                os.truncate(path, os.path.getsize(path) // 2)
            kill()

    def replace_and_die(old, new):
        replace(old, new)
        if new == f"run/{file}":
            kill()

    torch.save = save_and_die
    os.replace = replace_and_die


def killed_while_saving(file, moment):
    """A run that is saved after each step, until the fourth save."""
    save_checkpoint = common.save_checkpoint

    def fourth_save_dies(args, step, *rest):
        if step == 4:
            die_while_writing(file, moment)
        save_checkpoint(args, step, *rest)

    common.SAVE_SECONDS = 0
    common.save_checkpoint = fourth_save_dies
    start("simclr")


@pytest.mark.parametrize("file, moment, step", [
    ("checkpoint.pth", "half written", 3), ("checkpoint.pth", "written", 3),
    ("checkpoint.pth", "renamed", 4), ("backbone.pth", "half written", 4),
    ("backbone.pth", "written", 4), ("backbone.pth", "renamed", 4)])
def test_killed_while_saving(file, moment, step):
    assert status_of(killed_while_saving, file, moment) == -signal.SIGKILL
    assert load("run/checkpoint.pth")["step"] == step
    load("run/backbone.pth")  # it is whole
    resume("simclr")
    assert same(state(), undisturbed("simclr"))


def killed_while_resuming(moment):
    """Before or after the log, without the lines beyond the checkpoint, takes its name."""
    replace = os.replace

    def replace_and_die(old, new):
        if moment == "after":
            replace(old, new)
        kill()

    os.replace = replace_and_die
    resume("simclr")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_resuming(moment):
    stop_after(4, "simclr")
    with open("run/log.jsonl", "a") as file:
        file.write('{"step": 5, "epoch": 2, "loss": 1.0}\n')
    assert status_of(killed_while_resuming, moment) == -signal.SIGKILL
    resume("simclr")
    assert same(state(), undisturbed("simclr"))


def interrupted():
    """Ctrl-C goes to the run and to its loader processes alike."""
    load_data = common.load_data

    def load_data_with_workers(*args):
        train, test = load_data(*args)
        train.workers = 2  # so few images get none
        return train, test

    multiprocessing.set_start_method("fork", force=True)  # as in a script, on Linux
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = open("stderr", "w")
    os.dup2(sys.stderr.fileno(), 2)
    common.SAVE_SECONDS = 0
    common.load_data = load_data_with_workers
    common.batches = at_step(4, lambda: os.killpg(0, signal.SIGINT))
    flags = [*TINY, *SMALL["simclr"], "--out", "run", "--memory", "0"]
    common.main(simclr.train, simclr.parse_args, flags)


def test_ctrl_c_on_a_terminal():
    assert status_of(interrupted) == 130
    said = "stopped; run holds the run after 4 steps: --resume --out run goes on\n"
    assert Path("stderr").read_text() == said
    resume("simclr")
    assert same(state(), undisturbed("simclr"))
