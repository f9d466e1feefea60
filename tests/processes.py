"""Groups of gloo processes, from a server that has imported torch, which serve test after test."""

import atexit
import multiprocessing
import traceback

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torchvision.transforms.v2", "pytest", "processes"])
_groups = {}  # by their number of processes


def _serve(rank, world, port, tasks, results):
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    while dist.is_initialized() and (task := tasks.get()):  # common.main ends the group
        function, arguments = task
        try:
            value, error = function(*arguments), None
        except Exception:
            value, error = None, traceback.format_exc()
        results.put((rank, value, error, dist.is_initialized()))


class Group:
    def __init__(self, world):
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.tasks, self.results = [_context.Queue() for _ in range(world)], _context.Queue()
        self.processes = [_context.Process(target=_serve, args=(
            rank, world, self.store.port, tasks, self.results))
            for rank, tasks in enumerate(self.tasks)]
        for process in self.processes:
            process.start()

    def run(self, task):
        for tasks in self.tasks:
            tasks.put(task)
        return sorted((self.results.get(timeout=120) for _ in self.tasks), key=lambda r: r[0])

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
    group = _groups.pop(world, None) or Group(world)
    try:
        returned = group.run((function, arguments))
        if all(error is None and usable for _, _, error, usable in returned):
            _groups[world] = group
    finally:
        if world not in _groups:  # the others of one that failed may wait for it
            group.end()
    errors = [error for _, _, error, _ in returned if error]
    assert not errors, errors[0]
    return [value for _, value, *_ in returned]
