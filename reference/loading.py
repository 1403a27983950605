"""Loading of published checkpoints into models that hold only a part of them."""

from __future__ import annotations

from os import PathLike

from torch import Tensor

from ..config import CODEBOOK_SIZE, MODELS
from ..weights.checkpoint import check_tensors, read_state
from ..weights.names import linear_shapes, published_shapes
from .model import Autoencoder

PARTS = {name.partition(".")[0] for name in published_shapes(MODELS["stellar-b16"], teacher=True)}
TOKENIZER, TEACHER = "tokenizer", "teacher_"


def take_out_other_head(model: Autoencoder, state: dict[str, Tensor]) -> list[str]:
    """Takes the code head out of `state` if `model` draws pixels, and returns its names.

    The published files hold a head that predicts codes. A model built without a tokenizer has the
    pixel head under the same names, with other shapes, and could load nothing of such a file. Any
    other shape stays, to be reported.
    """
    if not model.do_recon or model.tokenizer is not None:
        return []
    code_head = linear_shapes(
        "reconstruction_head", CODEBOOK_SIZE, model.config.decoder.hidden_size
    )
    other = [
        name for name, shape in code_head.items() if name in state and state[name].shape == shape
    ]
    for name in other:
        del state[name]
    return other


def load_checkpoint(model: Autoencoder, path: str | PathLike[str]) -> None:
    """Fills `model` from a file that holds all its tensors; the tokenizer's may be missing.

    Parts of the published model that `model` was built without are passed over. Without any of a
    teacher's tensors in the file, the teacher starts as a copy of what was loaded.

    Raises:
        CheckpointError: the file cannot be read, or a tensor is missing, unknown or has another
            shape.
    """
    state = read_state(path, inside="state_dict")
    expected = {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if not name.startswith(f"{TOKENIZER}.")
    }
    if not any(name.startswith(TEACHER) for name in state):
        expected = {name: shape for name, shape in expected.items() if not name.startswith(TEACHER)}
    built = {name.partition(".")[0] for name in expected}
    passed_over = [
        name for name in state if name.partition(".")[0] in (PARTS | {TOKENIZER}) - built
    ]
    check_tensors(state, expected, where=str(path), ignored=passed_over)
    model.load_state_dict(state, strict=False)
