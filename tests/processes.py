"""Groups of gloo processes, from a server that has imported torch, which serve test after test."""

import atexit
import multiprocessing
import os
import threading
import traceback

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torchvision.transforms.v2", "pytest", "processes"])
_groups = {}  # by their number of processes


def _serve(rank, world, port, tasks, results):
    parent = multiprocessing.parent_process()
    folder = os.getcwd()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    while dist.is_initialized():  # common.main ends the group
        function, arguments = tasks.get()
        os.chdir(folder)
        torch.manual_seed(0)
        value = None
        error = None
        try:
            value = function(*arguments)
        except Exception:
            error = traceback.format_exc()
        results.put((rank, value, error, dist.is_initialized()))


class Group:
    def __init__(self, world):
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.tasks = [_context.Queue() for _ in range(world)]
        self.results = _context.Queue()
        self.processes = []
        for rank, tasks in enumerate(self.tasks):
            arguments = rank, world, self.store.port, tasks, self.results
            process = _context.Process(target=_serve, args=arguments)
            process.start()
            self.processes.append(process)

    def run(self, task):
        """-> the values in rank order, and whether the group can go on."""
        for tasks in self.tasks:
            tasks.put(task)
        values = {}
        usable = True
        for _ in self.tasks:
            rank, values[rank], error, alive = self.results.get(timeout=120)
            assert not error, error  # the others may wait for the one that failed
            if not alive:
                usable = False
        return [values[rank] for rank in sorted(values)], usable

    def end(self):
        for process in self.processes:
            process.kill()
            process.join()


@atexit.register
def end_all():
    while _groups:
        _groups.popitem()[1].end()


def run_processes(world, function, *arguments):
    """[function(*arguments) in each of `world` processes], in rank order."""
    group = _groups.pop(world, None)
    if group is None:
        group = Group(world)
    usable = False  # if the task fails
    try:
        values, usable = group.run((function, arguments))
    finally:
        if usable:
            _groups[world] = group
        else:
            group.end()
    return values
