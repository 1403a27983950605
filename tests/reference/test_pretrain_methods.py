"""The published module's methods that training is made of, one by one."""

import pytest
import torch
from budgets import FLOAT64, TENSOR
from checkpoints import images, relative_error
from pretraining import tiny_model

pytestmark = pytest.mark.numerical


@pytest.mark.parametrize("focal_mode", ["gaussian", "block", None])
def test_a_masked_image_and_where_its_patches_went(focal_mode):
    model = tiny_model(focal_mode=focal_mode, masking_ratio=0.0)
    image = images(5, 64, 64, 6).requires_grad_()
    cls, sparse, mask, ids_restore = model.forward_masked(image, ratio=0.6)
    assert cls.shape == (5, 1, 32) and sparse.shape == (5, 4, 32)
    assert mask.shape == ids_restore.shape == (5, 16) and mask.dtype == torch.float32
    assert (mask.sum(1) == 16 - int(16 * 0.4)).all() and ((mask == 0) | (mask == 1)).all()

    sparse.square().sum().backward()
    reached = image.grad.abs().sum(1).unflatten(2, (4, 16)).unflatten(1, (4, 16)).sum((2, 4))
    assert torch.equal(reached.flatten(1) > 0, mask == 0)

    # kept patches in front, as an MAE's decoder puts the others behind them
    places = torch.arange(16).expand(5, -1)
    assert torch.equal(ids_restore.sort(1).values, places)
    assert torch.equal(ids_restore >= 16 - mask.sum(1, keepdim=True), mask == 1)
    keep = ids_restore.argsort(1)[:, : int(16 * 0.4)]
    again, _, _ = model.encode_kept(image, keep)
    assert relative_error(again, cls) < TENSOR
    assert model.forward_masked(image)[2].sum(1).tolist() == [12.0] * 5


def test_each_view_takes_the_assignments_of_its_image():
    model = tiny_model()
    assignments = torch.arange(2 * 4 * 24.0).view(2, 4, 24)
    index = torch.tensor([[3, 2, 1, 0], [0, 0, 1, 1], [1, 2, 3, 0], [2, 2, 2, 2]])
    found = model.rearrange_sparse_targets(assignments, index)
    for view in range(4):
        for token in range(4):
            row = assignments[view // 2, index[view, token]]
            assert torch.equal(found[view, token], row)


def test_contrastive_loss_is_cross_entropy_of_each_view_with_its_image():
    model = tiny_model(logits_temp=0.25)
    draw = torch.Generator().manual_seed(4)
    logits = torch.randn(6, 4, 24, generator=draw, dtype=torch.float64)
    targets = torch.randn(2, 4, 24, generator=draw, dtype=torch.float64).softmax(-1)
    index = torch.randint(4, (6, 4), generator=draw)
    weights = torch.rand(6, 4, generator=draw, dtype=torch.float64)
    rows, matched = torch.zeros(2, 6, 4, dtype=torch.float64)
    for view in range(6):
        for token in range(4):
            log_p = (logits[view, token] / 0.25).log_softmax(-1)
            rows[view, token] = -targets[view // 3, token] @ log_p
            matched[view, token] = -targets[view // 3, index[view, token]] @ log_p
    for found, expected in (
        (model.contrastive_loss(logits, targets), rows.mean()),
        (model.contrastive_loss(logits, targets, index), matched.mean()),
        (model.contrastive_loss(logits, targets, pred_filter=weights), (rows * weights).mean()),
        (model.contrastive_loss(logits, targets, index, weights), (matched * weights).mean()),
    ):
        assert relative_error(found, expected) < FLOAT64
