"""Several gloo processes for a test, from a server that has imported torch already."""

import multiprocessing
import traceback

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torchvision.transforms.v2", "pytest", "processes"])


def _process(function, arguments, rank, world, port, results):
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        results.put((rank, function(*arguments), None))
    except Exception:
        results.put((rank, None, traceback.format_exc()))
    if dist.is_initialized():  # common.main ends it
        dist.barrier()
        dist.destroy_process_group()


def run_processes(world, function, *arguments):
    """[function(*arguments) in each of `world` processes], in rank order."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = _context.Queue()
    processes = [_context.Process(target=_process,
                                  args=(function, arguments, rank, world, store.port, results))
                 for rank in range(world)]
    for process in processes:
        process.start()
    returned = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    errors = [error for _, _, error in returned if error]
    assert not errors, errors[0]
    return [value for _, value, _ in returned]
