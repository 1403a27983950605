"""Training in two processes gives what one process gives on the whole batch."""

import pytest
import torch
import torch.multiprocessing as mp
import training_processes
from budgets import GRADIENT, LOSS, TENSOR
from checkpoints import relative_error
from pretraining import tiny_inputs, tiny_model
from stellar_fast.reference.clustering import sinkhorn_knopp
from stellar_fast.reference.pretrain import training_loss
from stellar_fast.reference.teacher import update_teacher

pytestmark = pytest.mark.numerical
PROCESSES = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(training_processes.work, (PROCESSES, str(folder)), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


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
    update_teacher(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in first.items())


@pytest.mark.parametrize(("key", "teacher"), [("step", False), ("step_with_teacher", True)])
def test_a_parallel_step_is_a_step_on_the_whole_batch(results, key, teacher):
    model = tiny_model(momentum_teacher=teacher)
    predictions = model(tiny_inputs(training_processes.BATCH))["predictions"]
    training_loss(predictions).backward()
    parts = [result[key] for result in results]
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
