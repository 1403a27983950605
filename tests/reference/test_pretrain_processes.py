"""Training in two processes gives what one process gives on the whole batch.

Each takes seconds to import torch, so threads play them first.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import training_processes
from budgets import GRADIENT, LOSS, TENSOR
from checkpoints import relative_error
from pretraining import tiny_inputs, tiny_model

from stellar_fast.reference.pretrain import clustering, teacher
from stellar_fast.reference.pretrain.clustering import sinkhorn_knopp
from stellar_fast.reference.pretrain.losses import training_loss
from stellar_fast.reference.pretrain.teacher import update_teacher

pytestmark = pytest.mark.numerical
PROCESSES = 2


class Threads:
    """A group of `PROCESSES` threads, each with the rank that it ran under."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(PROCESSES, timeout=300)
        self.local = threading.local()
        self.given = [torch.empty(0)] * PROCESSES

    def run(self, work):
        """`work(rank)` of every rank, at the same time."""

        def ranked(rank):
            self.local.rank = rank
            return work(rank)

        with ThreadPoolExecutor(PROCESSES) as pool:
            return list(pool.map(ranked, range(PROCESSES)))

    def _exchange(self, tensor, choose) -> None:
        self.given[self.local.rank] = tensor.clone()
        self.barrier.wait()
        chosen = choose(torch.stack(self.given))
        self.barrier.wait()
        tensor.copy_(chosen)

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM) -> None:
        largest = op == dist.ReduceOp.MAX
        self._exchange(tensor, lambda all: all.amax(0) if largest else all.sum(0))

    def broadcast(self, tensor, src) -> None:
        self._exchange(tensor, lambda all: all[src])


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(training_processes.work, (PROCESSES, str(folder)), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.fixture(params=["threads", pytest.param("processes", marks=pytest.mark.slow)])
def results(request, monkeypatch):
    if request.param == "processes":
        return request.getfixturevalue("processes")
    threads = Threads()
    for module in (clustering, teacher):
        monkeypatch.setattr(module, "several_processes", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", threads.all_reduce)
    monkeypatch.setattr(dist, "broadcast", threads.broadcast)

    def work(rank):
        return {
            "sinkhorn": sinkhorn_knopp(training_processes.scores().chunk(PROCESSES)[rank], 3, 0.5),
            "teacher": training_processes.teacher_of_differing_students(rank),
        }

    found = threads.run(work)
    monkeypatch.undo()
    return found


def test_sinkhorn_runs_over_the_rows_of_all_processes(results):
    whole = sinkhorn_knopp(training_processes.scores(), 3, 0.5)
    found = torch.cat([result["sinkhorn"] for result in results])
    assert relative_error(found, whole) < TENSOR
    alone = sinkhorn_knopp(training_processes.scores().chunk(PROCESSES)[1], 3, 0.5)
    assert relative_error(results[1]["sinkhorn"], alone) > 0.1


def test_every_process_gets_the_teacher_of_the_first(results):
    first, second = (result["teacher"] for result in results)
    assert first.keys() == second.keys() and len(first) > 40
    assert all(torch.equal(second[name], first[name]) for name in first)
    model = tiny_model(seed=10, momentum_teacher=True, teacher_momentum=0.75)
    update_teacher(model, model.teacher_momentum)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in first.items())


@pytest.mark.slow
@pytest.mark.parametrize(("key", "teacher"), [("step", False), ("step_with_teacher", True)])
def test_a_parallel_step_is_a_step_on_the_whole_batch(processes, key, teacher):
    model = tiny_model(momentum_teacher=teacher)
    predictions = model(tiny_inputs(training_processes.BATCH))["predictions"]
    training_loss(predictions).backward()
    parts = [result[key] for result in processes]
    for name, value in predictions.items():
        if value.ndim == 0:
            mean = torch.stack([part[name] for part in parts]).mean()
            assert relative_error(mean, value.detach()) < LOSS, name
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None or name.endswith("key.bias"):
            continue
        compared += 1
        for part in parts:
            assert relative_error(part[name], parameter.grad) < GRADIENT, name
    assert compared > 60
