"""The published probes: their golden logits, and their training on features that say something."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from budgets import PROBE, TENSOR
from checkpoints import golden, relative_error, synthetic
from goldens import golden_image
from outputs import write_output
from references import reference_of
from sklearn.metrics import jaccard_score

import stellar_fast
from stellar_fast.recipes import heads


@pytest.mark.numerical
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden(dtype):
    expected, meta = golden("probe-classification")
    features = reference_of(meta, dtype=dtype).encode(golden_image(meta).to(dtype))
    head = heads.ClassificationHead(meta["backbone"]["hidden_size"], meta["num_classes"]).to(dtype)
    assert head.normalize.eps == meta["layernorm_eps"]
    shapes = {name: tuple(shape) for name, shape in meta["head_shapes"].items()}
    head.load_state_dict(synthetic(shapes, meta["head_weights_seed"]))
    for key in meta["feature_keys"]:
        mean = features[key].mean(dim=1)
        assert relative_error(mean, expected[f"{key}.mean"]) < TENSOR
        logits = head(features[key])
        assert relative_error(logits, expected[f"{key}.logits"]) < PROBE, key
        assert torch.equal(logits, head(mean))
        assert relative_error(logits.softmax(-1), expected[f"{key}.probabilities"]) < PROBE


def clouds(rows: int, width: int, seed: int, spread: float = 1.0):
    """Vectors around one of three centres, whose names are the labels."""
    rng = np.random.default_rng(seed)
    names = rng.choice(["a", "b", "c"], rows)
    centres = dict(zip("abc", np.random.default_rng(0).standard_normal((3, width)), strict=True))
    noise = spread * rng.standard_normal((rows, width))
    return (np.stack([centres[name] for name in names]) + noise).astype(np.float32), names


def test_the_classifier_learns_and_is_repeatable():
    vectors, labels = clouds(300, 24, 1)
    settings = {"batch_size": 64, "epochs": 20, "learning_rate": 0.02}
    probe = heads.classification_probe(vectors, labels, **settings)
    assert probe.losses[-1] < probe.losses[0] / 2 and len(probe.losses) == 20
    assert probe.score(*clouds(200, 24, 2)) > 0.9
    assert set(probe.predict(vectors)) == {"a", "b", "c"} and not probe.head.training
    again = heads.classification_probe(vectors, labels, **settings)
    assert torch.equal(again.logits(vectors), probe.logits(vectors))
    shuffled = np.random.default_rng(3).permutation(labels)
    assert (
        heads.classification_probe(vectors, shuffled, **settings).score(*clouds(200, 24, 2)) < 0.7
    )


def test_the_optimizer_is_the_published_one(monkeypatch):
    vectors, labels = clouds(10, 8, 1)
    made, clipped = [], []
    adamw, clip = torch.optim.AdamW, torch.nn.utils.clip_grad_norm_

    def optimizer(parameters, lr, **named):
        made.append((lr, named))
        return adamw(parameters, lr, **named)

    monkeypatch.setattr(torch.optim, "AdamW", optimizer)
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda p, most: clipped.append(most) or clip(p, most)
    )
    assert len(heads.classification_probe(vectors, labels).losses) == 30
    assert made == [(1e-3, {"weight_decay": 1e-4})] and set(clipped) == {5.0}
    dense, masks = scenes(4, seed=1)
    assert len(heads.segmentation_probe(dense, masks, 3).losses) == 80
    assert made[1:] == [(1e-4, {})] and len(clipped) == 30


def scenes(rows: int, seed: int, grid: int = 4, width: int = 12, scale: int = 8):
    """Dense features of a grid whose patches are of three kinds, and the masks of their kinds."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 3, (rows, grid, grid))
    centres = np.random.default_rng(5).standard_normal((3, width))
    dense = centres[kinds.reshape(rows, -1)] + 0.3 * rng.standard_normal((rows, grid**2, width))
    masks = kinds.repeat(scale, axis=1).repeat(scale, axis=2)
    return dense.astype(np.float32), masks


def test_the_segmenter_learns_from_features_on_the_disk(tmp_path):
    dense, masks = scenes(40, seed=1)
    write_output(tmp_path / "out", {"dense": dense}, size=15)
    stored = stellar_fast.open_features(tmp_path / "out")["dense"]
    settings = {"epochs": 30, "batch_size": 16, "learning_rate": 0.02}
    probe = heads.segmentation_probe(stored, masks, 3, **settings)
    assert probe.losses[-1] < probe.losses[0] / 2
    held_out, wanted = scenes(20, seed=2)
    assert probe.score(held_out, wanted) > 0.9
    assert probe.predict(held_out).shape == (20, 4, 4)
    by_array = heads.segmentation_probe(dense, masks, 3, **settings)
    assert torch.equal(by_array.logits(held_out), probe.logits(held_out))
    wrong = np.random.default_rng(3).permutation(masks)
    assert heads.segmentation_probe(dense, wrong, 3, **settings).score(held_out, wanted) < 0.6


def test_the_segmentation_loss_by_its_formula():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, 3, (2, 4, 5), generator=generator)
    targets[0, :2] = heads.IGNORED
    kept = targets != heads.IGNORED
    shares = logits.softmax(1).movedim(1, -1)[kept]
    truth = F.one_hot(targets[kept], 3)
    crossed = -shares.log()[truth.bool()].mean()
    dice = (2 * (shares * truth).sum(0) + 1) / (shares.sum(0) + truth.sum(0) + 1)
    found = heads.segmentation_loss(logits, targets)
    torch.testing.assert_close(found, crossed + 1 - dice.mean())
    nothing = heads.segmentation_loss(logits, torch.full_like(targets, heads.IGNORED))
    assert nothing.item() == 0
    nothing.backward()


def test_mean_iou_is_scikit_learns():
    rng = np.random.default_rng(0)
    targets, predicted = rng.integers(0, 6, (2, 5, 9, 9))
    expected = jaccard_score(targets.ravel(), predicted.ravel(), average="macro")
    assert heads.mean_iou(predicted, targets) == pytest.approx(expected, rel=1e-12)
    targets[0] = heads.IGNORED
    expected = jaccard_score(targets[1:].ravel(), predicted[1:].ravel(), average="macro")
    assert heads.mean_iou(predicted, targets) == pytest.approx(expected, rel=1e-12)
    assert np.isnan(heads.mean_iou(predicted[:1], targets[:1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heads.classification_probe(np.ones((3, 4)), ["a", "b"]), "3 rows and 2 labels"),
        (lambda: heads.classification_probe(np.ones((0, 4)), []), "0 rows and 0 labels"),
        (
            lambda: heads.segmentation_probe(np.ones((1, 4, 2)), np.ones((2, 8, 8)), 3),
            "1 rows and 2 masks",
        ),
        (
            lambda: heads.segmentation_probe(np.ones((1, 4, 2)), np.full((1, 8, 8), 3), 3),
            "masks hold 3, of 3 classes",
        ),
        (lambda: heads.SegmentationHead(2, 3)(torch.ones(1, 5, 2)), "5 patches are no square"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
