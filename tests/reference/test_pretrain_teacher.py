"""The EMA teacher: where it starts, how it follows, what it gives."""

import copy
import pickle

import pytest
import torch
from budgets import TEACHER, TENSOR
from checkpoints import relative_error
from pretraining import TINY, tiny_inputs, tiny_model

from stellar_fast.reference import STELLARModel
from stellar_fast.reference.pretrain.teacher import update_teacher

pytestmark = pytest.mark.numerical
PAIRS = {
    "teacher_encoder.": "encoder.",
    "teacher_head.": "clustering_head.",
    "teacher_cls_head.": "cls_cluster_head.",
    "teacher_sparse_tokens": "sparse_tokens",
}


def teacher_and_student(state):
    """{teacher's tensor name: (its value, its student's)}."""
    found = {}
    for name in state:
        for teacher, student in PAIRS.items():
            if name.startswith(teacher):
                found[name] = (state[name], state[name.replace(teacher, student, 1)])
    return found


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_new_teacher_is_the_student_and_takes_no_gradient():
    model = STELLARModel(4, num_clusters=24, momentum_teacher=True, vit_pretrained=TINY)
    pairs = teacher_and_student(model.state_dict())
    names = [name for name in model.state_dict() if name.startswith("teacher_")]
    assert sorted(pairs) == sorted(names) and len(pairs) > 40
    for name, (teacher, student) in pairs.items():
        assert torch.equal(teacher, student), name
        assert teacher.data_ptr() != student.data_ptr(), name
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert not trained & pairs.keys()


def test_every_training_forward_is_one_step_of_the_average():
    model = tiny_model(momentum_teacher=True, teacher_momentum=0.75)
    for _ in range(2):
        before = snapshot(model)
        model(tiny_inputs())
        after = snapshot(model)
        pairs = teacher_and_student(before)
        assert pairs
        for name, (teacher, student) in pairs.items():
            expected = 0.75 * teacher.double() + 0.25 * student.double()
            assert relative_error(after[name], expected) < TEACHER, name
            assert not torch.equal(after[name], teacher), name
        assert all(torch.equal(after[name], before[name]) for name in before if name not in pairs)


@pytest.mark.parametrize(
    ("mode", "training"), [("eval", True), ("valid", True), ("valid", False), ("train", False)]
)
def test_evaluation_leaves_the_teacher_alone(mode, training):
    model = tiny_model(momentum_teacher=True).train(training)
    before = snapshot(model)
    found = model(tiny_inputs(), mode=mode)["predictions"]
    assert ("mask_loss" in found) == (mode != "eval")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_refused_input_leaves_the_teacher_alone():
    model = tiny_model(momentum_teacher=True)
    before = snapshot(model)
    inputs = tiny_inputs()
    del inputs["local_views"]
    with pytest.raises(ValueError, match="missing: local_views"):
        model(inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_teacher_encodes_as_the_student_with_its_weights_would():
    model = tiny_model(momentum_teacher=True)
    inputs = tiny_inputs()
    cls, sparse, dense = model.forward_teacher(inputs["image"])
    student = copy.deepcopy(model)
    for teacher, other in teacher_and_student(student.state_dict()).values():
        other.copy_(teacher)
    with torch.no_grad():
        expected = student.encode(inputs["image"])
    assert relative_error(cls, expected["cls"]) < TENSOR
    assert relative_error(sparse, expected["sparse"]) < TENSOR
    assert relative_error(dense, expected["dense"]) < TENSOR
    assert not sparse.requires_grad


def test_targets_come_from_the_second_global_view():
    model = tiny_model(momentum_teacher=True, teacher_momentum=1.0)
    inputs = tiny_inputs()
    losses = ("clustering_loss", "cls_clustering_loss")
    expected = model(inputs)["predictions"]
    for view, same in ((0, True), (1, False)):
        other = {key: value.clone() for key, value in inputs.items()}
        other["global_views"][:, view] = 1 - other["global_views"][:, view]
        found = model(other)["predictions"]
        for name in losses:
            assert torch.equal(found[name], expected[name]) == same, (view, name)


@pytest.mark.parametrize("needs", ["momentum_teacher", "do_global_align"])
@pytest.mark.parametrize(("masks", "views"), [(1, 2), (2, 1)])
def test_the_second_view_has_to_be_there(needs, masks, views):
    with pytest.raises(ValueError, match=f"num_masks is {masks}, and each image has {views}"):
        tiny_model(num_masks=masks, **{needs: True})(tiny_inputs(views=views))


def test_the_momentum_follows_its_schedule_and_can_be_set_from_outside():
    model = tiny_model(
        momentum_teacher=True,
        teacher_momentum=0.5,
        teacher_momentum_final=1.0,
        teacher_momentum_schedule_steps=2,
    )
    found = []
    for _ in range(4):
        model.update_teacher()
        found.append(model.teacher_momentum)
    assert found == pytest.approx([0.5, 0.75, 1.0, 1.0])
    model._step_counter.fill_(1)
    model.update_teacher()
    assert model.teacher_momentum == pytest.approx(0.75)
    for other in ({"teacher_momentum_schedule_steps": 0}, {"teacher_momentum_final": 1.0}):
        model = tiny_model(momentum_teacher=True, teacher_momentum=0.5, **other)
        model.update_teacher()
        assert (model.teacher_momentum, int(model._step_counter)) == (0.5, 0)
    tiny_model().update_teacher()  # has none


def test_a_file_without_a_teacher_starts_it_from_the_weights_loaded():
    published = tiny_model(seed=7).state_dict()
    model = tiny_model(momentum_teacher=True)
    missing = model.load_state_dict(published, strict=False).missing_keys
    pairs = teacher_and_student(model.state_dict())
    assert set(missing) == pairs.keys()
    for name, (teacher, student) in pairs.items():
        assert torch.equal(teacher, student), name
        assert torch.equal(student, published[_student_name(name)]), name
    with pytest.raises(RuntimeError, match="teacher_sparse_tokens"):
        model.load_state_dict(published)
    inside = torch.nn.ModuleDict({"model": tiny_model(momentum_teacher=True)})
    inside.load_state_dict({f"model.{key}": value for key, value in published.items()}, False)
    assert torch.equal(inside["model"].teacher_sparse_tokens, published["sparse_tokens"])


def test_a_file_with_a_teacher_gives_it():
    saved = tiny_model(seed=7, momentum_teacher=True).state_dict()
    model = tiny_model(momentum_teacher=True)
    model.load_state_dict(saved)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    # of a teacher that is there in part nothing is made up
    part = {key: value for key, value in saved.items() if key != "teacher_sparse_tokens"}
    model = tiny_model(momentum_teacher=True)
    own = model.teacher_sparse_tokens.clone()
    model.load_state_dict(part, strict=False)
    assert torch.equal(model.teacher_sparse_tokens, own)
    assert not torch.equal(own, saved["sparse_tokens"])


def test_copies_have_a_teacher_of_their_own():
    model = tiny_model(momentum_teacher=True, teacher_momentum=0.5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = snapshot(model)
        update_teacher(twin, twin.teacher_momentum)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not torch.equal(twin.teacher_sparse_tokens, model.teacher_sparse_tokens)


def _student_name(name):
    return next(name.replace(t, s, 1) for t, s in PAIRS.items() if name.startswith(t))
