"""Settings of a GPU that the engine is measured under."""

import pytest
import torch


@pytest.fixture
def full_float32():
    """No tf32: what is called float32 is held to float32's tolerances."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
