"""Clustering targets, matching and the losses between tokens, each by itself."""

import math

import pytest
import torch
import torch.nn.functional as F
from budgets import FLOAT64, TENSOR
from checkpoints import golden, relative_error

from stellar_fast.config import MODELS
from stellar_fast.reference.pretrain.clustering import (
    ClusteringHead,
    sinkhorn_knopp,
    soft_cross_entropy,
)
from stellar_fast.reference.pretrain.koleo import koleo_loss
from stellar_fast.reference.pretrain.matching import match
from stellar_fast.weights.names import cluster_head_shapes

pytestmark = pytest.mark.numerical
DTYPES = [torch.float32, torch.float64]  # of which the second shows that the bounds are the model's


@pytest.fixture(scope="module")
def pieces():
    return golden("pretrain-pieces")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "scale"), [("P3", 1.0), ("P3_scale0.5", 0.5), ("P3", 3.0)])
def test_sinkhorn_golden(pieces, name, scale, dtype):
    tensors, meta = pieces
    found = sinkhorn_knopp(tensors["M"].to(dtype), meta["sinkhorn_iterations"], scale)
    assert relative_error(found, tensors[name]) < TENSOR


def test_sinkhorn_rows_are_distributions_and_more_rounds_even_the_clusters_out():
    scores = 4 * torch.randn(96, 12, generator=generator(0), dtype=torch.float64)
    uneven = []
    for rounds in (1, 3, 30):
        plan = sinkhorn_knopp(scores, rounds)
        sums = plan.sum(1)
        # short of 1 by what 1e-8 is of a row's sum before its division, which 4 sigma leave small
        assert (sums <= 1 + FLOAT64).all() and (sums > 1 - 1e-3).all()
        uneven.append((plan.sum(0) - 96 / 12).abs().max().item())
    assert uneven[0] > uneven[1] > uneven[2]
    assert uneven[2] < 0.05


def test_sinkhorn_survives_any_scale_leaves_its_argument_alone_and_has_no_gradient():
    scores = 1e4 * torch.randn(64, 8, generator=generator(1))
    kept = scores.clone()
    plan = sinkhorn_knopp(scores.requires_grad_())
    assert plan.isfinite().all() and not plan.requires_grad
    assert torch.equal(scores, kept)
    shifted = sinkhorn_knopp(kept.double() / 1e4 + 300.0)
    assert relative_error(shifted, sinkhorn_knopp(kept.double() / 1e4)) < FLOAT64


def test_sinkhorn_computes_half_precision_in_float32():
    scores = 3 * torch.randn(32, 8, generator=generator(2), dtype=torch.float64)
    coarse = scores.bfloat16()
    assert sinkhorn_knopp(coarse).dtype == torch.float32
    assert torch.equal(sinkhorn_knopp(coarse), sinkhorn_knopp(coarse.float()))
    assert sinkhorn_knopp(scores).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 4),), r"\(2, 3, 4\)"),
        ((torch.zeros(2, 3, dtype=torch.int64),), "int64"),
        ((torch.zeros(2, 3), 0), "at least one iteration, got 0"),
    ],
)
def test_sinkhorn_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_knopp(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matcher_golden(pieces, dtype):
    tensors, meta = pieces
    pair = tensors["match_preds"].to(dtype), tensors["match_targets"].to(dtype)
    index, plan = match(*pair, meta["matcher"]["epsilon"], meta["matcher"]["iterations"])
    assert relative_error(plan, tensors["match_plan"]) < TENSOR
    two = plan.topk(2).values
    assert (two[..., 0] - two[..., 1] > 2 * TENSOR * plan.norm()).all(), "every choice is decided"
    assert torch.equal(index.int(), tensors["match_index"])
    by_default, _ = match(*pair)
    assert torch.equal(by_default, index)


def test_matcher_undoes_a_permutation():
    targets = 3 * torch.randn(2, 9, 16, generator=generator(3))
    order = torch.stack([torch.randperm(9, generator=generator(i)) for i in (0, 1)])
    shuffled = targets.gather(1, order.unsqueeze(-1).expand_as(targets))
    predictions = shuffled + 0.1 * torch.randn(2, 9, 16, generator=generator(4))
    index, plan = match(predictions.requires_grad_(), targets)
    assert torch.equal(index, order)
    assert not plan.requires_grad
    assert relative_error(plan.sum(1), torch.ones(2, 9)) < TENSOR


def test_matcher_is_sinkhorn_scaling_with_any_number_of_targets():
    predictions = torch.randn(3, 5, 4, generator=generator(3), dtype=torch.float64)
    targets = torch.randn(3, 8, 4, generator=generator(4), dtype=torch.float64)
    kernel = (-(predictions.unsqueeze(2) - targets.unsqueeze(1)).norm(dim=-1) / 0.1).exp()
    b = torch.ones(3, 8, 1, dtype=torch.float64)
    for _ in range(5):
        a = 1 / (kernel @ b)
        b = 1 / (kernel.transpose(1, 2) @ a)
    index, plan = match(predictions, targets)
    assert relative_error(plan, a * kernel * b.transpose(1, 2)) < FLOAT64
    assert torch.equal(index, plan.argmax(2))


def test_matcher_puts_what_is_not_wanted_at_twice_the_largest_distance():
    predictions = torch.randn(3, 5, 4, generator=generator(3), dtype=torch.float64)
    targets = torch.randn(3, 8, 4, generator=generator(4), dtype=torch.float64)
    wanted = torch.tensor([1, 0, 1, 1, 1, -1, 1, 1]).expand(3, -1)
    cost = (predictions.unsqueeze(2) - targets.unsqueeze(1)).norm(dim=-1)
    cost[:, :, [1, 5]] = 2 * cost.max()
    kernel, b = (-cost / 0.1).exp(), torch.ones(3, 8, 1, dtype=torch.float64)
    for _ in range(5):
        a = 1 / (kernel @ b)
        b = 1 / (kernel.transpose(1, 2) @ a)
    index, plan = match(predictions, targets, wanted=wanted)
    assert relative_error(plan, a * kernel * b.transpose(1, 2)) < FLOAT64
    assert torch.equal(index, plan.argmax(2))
    assert not torch.equal(plan, match(predictions, targets)[1])


@pytest.mark.parametrize(
    "shapes", [((2, 4, 8), (3, 4, 8)), ((2, 4, 8), (2, 4, 6)), ((4, 8), (4, 8))]
)
def test_matcher_refuses_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match=r"predictions must be \(B, Q, D\)"):
        match(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_koleo_golden(pieces, dtype):
    tensors, _ = pieces
    found = koleo_loss(tensors["koleo_input"].to(dtype)).reshape(1)
    assert relative_error(found, tensors["koleo"]) < TENSOR


def test_koleo_by_hand_and_within_one_image_only():
    corner = torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]).double()
    # distance |(1, -1, 0) + 1e-8| / 2, and 1e-8 in the logarithm
    distance = math.hypot(1 + 1e-8, 1 - 1e-8, 1e-8) / 2
    expected = -math.log(distance + 1e-8)
    assert koleo_loss(corner[None]).item() == pytest.approx(expected, rel=3e-8)
    # the same tokens in another image are no neighbours
    pair = torch.stack([corner, corner.roll(1, 0)])
    assert koleo_loss(pair).item() == pytest.approx(koleo_loss(corner[None]).item(), rel=FLOAT64)


def test_koleo_pushes_a_token_from_its_nearest_neighbour():
    tokens = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [-1.0, -0.5]]], requires_grad=True)
    before = koleo_loss(tokens)
    (gradient,) = torch.autograd.grad(before, tokens)
    after = F.normalize(tokens.detach() - 0.05 * gradient, dim=-1)
    apart = lambda x: (F.normalize(x, dim=-1)[0, 0] - F.normalize(x, dim=-1)[0, 1]).norm()  # noqa: E731
    assert apart(after) > apart(tokens.detach()) + 1e-3
    assert koleo_loss(after) < before


def test_koleo_of_equal_tokens_is_finite_and_autocast_changes_nothing():
    same = torch.ones(1, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = koleo_loss(same)
    # distance |(1e-8, 1e-8, 1e-8, 1e-8)| / 2, and 1e-8 in the logarithm
    assert loss.item() == pytest.approx(-math.log(1e-8 + 1e-8), rel=FLOAT64)
    loss.backward()
    assert same.grad.isfinite().all()
    tokens = torch.randn(2, 6, 8, generator=generator(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(koleo_loss(tokens), koleo_loss(tokens.clone()))
        inside = koleo_loss(tokens)
    assert torch.equal(inside, koleo_loss(tokens))


@pytest.mark.parametrize("shape", [(2, 1, 8), (4, 8)])
def test_koleo_refuses(shape):
    with pytest.raises(ValueError, match="two tokens an image"):
        koleo_loss(torch.zeros(shape))


def test_head_has_the_published_tensors():
    with torch.device("meta"):
        head = ClusteringHead(768)
    shapes = {f"clustering_head.{key}": tuple(v.shape) for key, v in head.state_dict().items()}
    assert MODELS["stellar-b16"].backbone.hidden_size == 768
    assert shapes == cluster_head_shapes("clustering_head", 768)


def test_head_by_its_formula():
    torch.manual_seed(0)
    head = ClusteringHead(12, num_clusters=7, prototype_dim=5).double()
    tokens = torch.randn(2, 3, 12, dtype=torch.float64)
    first, last = head.predictor.layers[0], head.predictor.layers[2]
    hidden = F.gelu(tokens @ first.weight.T + first.bias)
    x = hidden @ last.weight.T + last.bias
    expected = (x / x.norm(dim=-1, keepdim=True)) @ head.layer.weight.T
    logits, assigned, loss = head(tokens)
    assert relative_error(logits, expected) < FLOAT64
    by_hand = sinkhorn_knopp(expected.detach().flatten(0, 1) / 0.06, 3).view(2, 3, 7)
    assert relative_error(assigned, by_hand) < FLOAT64 and not assigned.requires_grad
    log_p = (expected / 0.12).log_softmax(-1)
    assert relative_error(loss, -(by_hand * log_p).sum(-1).mean()) < FLOAT64
    again, none, nothing = head(tokens, do_sinkhorn=False)
    assert torch.equal(again, logits) and none is nothing is None
    # the direction of what comes out of the MLP counts, not its length
    with torch.no_grad():
        last.weight.mul_(10), last.bias.mul_(10)
    assert relative_error(head(tokens)[0], expected) < FLOAT64


def test_head_logits_are_float32_or_better():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        head = ClusteringHead(8, 6, prototype_dim=4).to(dtype)
        assert {each.dtype for each in head(torch.randn(2, 3, 8, dtype=dtype))} == {expected}


@pytest.mark.parametrize(
    ("layers", "names", "prototype"),
    [
        (None, [], 12),
        (1, ["predictor.layers.weight"], 5),
        (3, [f"predictor.layers.{index}.weight" for index in (0, 2, 4)], 5),
    ],
)
def test_head_of_other_depths(layers, names, prototype):
    head = ClusteringHead(12, num_clusters=7, predictor_layers=layers, prototype_dim=5)
    state = head.state_dict()
    assert [name for name in state if name.endswith("weight")] == ["layer.weight", *names]
    assert state["layer.weight"].shape == (7, prototype)
    assert head(torch.randn(2, 3, 12))[0].shape == (2, 3, 7)


@pytest.mark.parametrize(
    "arguments", [{"num_clusters": 0}, {"predictor_layers": 0}, {"prototype_dim": -1}]
)
def test_head_refuses(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} .*must be positive"):
        ClusteringHead(8, **arguments)


def test_soft_cross_entropy_of_certain_targets_is_the_usual_one():
    logits = torch.randn(2, 5, 7, generator=generator(6), dtype=torch.float64)
    labels = torch.randint(0, 7, (2, 5), generator=generator(7))
    expected = F.cross_entropy(logits.flatten(0, 1) / 0.12, labels.flatten())
    found = soft_cross_entropy(logits, F.one_hot(labels, 7).double(), 0.12)
    assert found.item() == pytest.approx(expected.item(), rel=FLOAT64)


def test_soft_cross_entropy_mixes_and_gives_targets_no_gradient():
    logits = torch.randn(4, 7, generator=generator(8), dtype=torch.float64, requires_grad=True)
    first, second = F.one_hot(torch.tensor([[0, 1, 2, 3], [6, 5, 4, 4]]), 7).double()
    mixed = (0.25 * first + 0.75 * second).requires_grad_()
    loss = soft_cross_entropy(logits, mixed, 0.5)
    parts = [soft_cross_entropy(logits, part, 0.5) for part in (first, second)]
    expected = 0.25 * parts[0] + 0.75 * parts[1]
    assert loss.item() == pytest.approx(expected.item(), rel=FLOAT64)
    loss.backward()
    assert mixed.grad is None and logits.grad.any()
    with pytest.raises(ValueError, match=r"\(4, 7\), got \(4, 6\)"):
        soft_cross_entropy(logits, mixed[:, :6], 0.5)
