"""Process groups for tests: ``launch`` runs a function on every rank and brings back what each returns."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

_SLOW_IMPORTS = [  # those that are not installed are passed over
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
]
NCCL = "cpu:gloo,cuda:nccl"  # the backend of ranks that have a GPU each; objects travel by gloo
_WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}


@functools.cache
def _context(on_gpu: bool):
    """How ranks are started: forked from a server that has imported what is slow, or afresh where they use a GPU."""
    if on_gpu:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_SLOW_IMPORTS)
    with mock.patch.dict(os.environ, _WITHOUT_GPU):  # a process that has touched a GPU must not be forked
        forkserver.ensure_running()
    first = context.Process(target=int)  # forked when the imports are done: no rank's time goes to them
    first.start()
    first.join()
    return context


class RankErrors(Exception):
    """What went wrong on each rank that failed: a traceback, an exit code, or that it had to be ended."""

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("\n".join(f"rank {rank}: {error}" for rank, error in errors.items()))
        self.errors = errors


def launch(
    worker: Callable[..., Any], world_size: int, *arguments: Any, backend: str = "gloo", timeout: float = 60.0
) -> list[Any]:
    """``worker(*arguments)`` on ``world_size`` ranks of a process group; the results in the order of the ranks.

    ``worker`` is a function of a module that the ranks import; arguments and results are pickled. With NCCL in
    ``backend`` each rank has the GPU of its number. Raises ``RankErrors`` if any rank raises, dies, or is not done
    after ``timeout`` seconds (it is killed then). No rank is ended before that because of another: how the others end
    is part of what is tested.
    """
    context = _context(on_gpu="nccl" in backend)
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        ranks = {}
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            setup = (rank, world_size, backend, f"file://{folder}/rendezvous", timeout)
            process = context.Process(target=_run, args=(sender, setup, worker, arguments), daemon=True)
            process.start()
            sender.close()  # the process has its own: when it dies, receiving ends
            ranks[receiver] = (rank, process)
        try:
            while ranks and (remaining := deadline - time.monotonic()) > 0:
                for receiver in wait(list(ranks), remaining):
                    rank, process = ranks.pop(receiver)
                    try:
                        succeeded, value = pickle.loads(receiver.recv_bytes())
                        (results if succeeded else errors)[rank] = value
                    except EOFError:
                        process.join()
                        errors[rank] = f"died with exit code {process.exitcode}"
        finally:
            for rank, process in ranks.values():
                process.kill()
                errors[rank] = f"not done after {timeout:g} s"
    if errors:
        raise RankErrors(errors)
    return [results[rank] for rank in range(world_size)]


def _run(
    sender: Connection,
    setup: tuple[int, int, str, str, float],
    worker: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    rank, world_size, backend, address, timeout = setup
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    try:
        if "nccl" in backend:
            torch.cuda.set_device(rank)  # what "cuda" means from here on
        limit = timedelta(seconds=timeout)
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=world_size, timeout=limit)
        answer = (True, worker(*arguments))
        dist.barrier()  # no rank leaves while another still talks to it
        dist.destroy_process_group()
    except BaseException:
        answer = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(answer))
