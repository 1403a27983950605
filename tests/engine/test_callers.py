"""Whatever the caller has switched on in torch, the engine gives the same bits."""

import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from engines import image, small_engine
from extracting import feature, index
from pictures import photograph
from threads import in_threads
from tiny import BACKBONE

import stellar_fast
from stellar_fast.engine.callers import unaffected
from stellar_fast.extract import make_job, run
from stellar_fast.images import load_image


def test_the_default_device_of_the_caller(tmp_path):
    photograph(40, 30).save(tmp_path / "a.png")
    engine = small_engine()
    x = image(2, 32, 32)
    before = engine.encode(x), load_image(tmp_path / "a.png", "eval")
    try:
        torch.set_default_device("meta")
        for found, wanted in zip(
            (loaded(tmp_path / "repo").encode(x), engine.encode(x)), (None, before[0]), strict=True
        ):
            for name, value in found.items():
                assert value.device.type == "cpu", name
                assert wanted is None or torch.equal(value, wanted[name])
        assert torch.equal(load_image(tmp_path / "a.png", "eval"), before[1])
        for listed in ([tmp_path / "a.png"], [], np.zeros((1, 32, 32, 3), np.uint8)[:, ::-1]):
            assert engine.encode(listed, preset="eval")["cls"].device.type == "cpu"
        for preset in ("card", "eval"):
            (tmp_path / "in").mkdir(exist_ok=True)
            photograph(40, 30).save(tmp_path / "in" / "a.png")
            run(make_job(tmp_path / "in", tmp_path / preset, preset=preset), engine)
            assert index(tmp_path / preset)["status"] == ["ok"]
        engine.save(tmp_path / "saved")
        assert torch.empty(1).device.type == "meta"  # the caller's own, still
    finally:
        torch.set_default_device(None)
    assert np.isfinite(feature(tmp_path / "eval", "cls")).all()


def loaded(folder):
    write_checkpoint(
        folder, "tiny", backbone=asdict(BACKBONE), num_sparse_tokens=2, num_decoder_layers=1
    )
    return stellar_fast.load("tiny", repo=folder, device="cpu", precision="fp32")


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_precision_of_the_callers_products(precision):
    engine, x = small_engine(), image(2, 32, 32)
    before = engine.encode(x)
    seen = []
    inner = unaffected(lambda: seen.append(torch.get_float32_matmul_precision()))
    try:
        torch.set_float32_matmul_precision(precision)
        after = engine.encode(x)
        inner()
        unaffected(inner)()
        in_threads(lambda call: call(), [unaffected(inner)] * 8)
        with pytest.raises(ZeroDivisionError):
            unaffected(lambda: 1 / 0)()
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"] * 10
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["mkldnn", "cuda", ""])
def test_the_newer_interface_of_precisions(name):
    """In a process of its own: torch cannot go back to the older one."""
    place = f"torch.backends.{name}.matmul" if name else "torch.backends"
    probe = (
        "import torch; from stellar_fast.engine.callers import unaffected\n"
        "b = torch.backends; both = lambda: (b.cuda.matmul.fp32_precision, "
        "b.mkldnn.matmul.fp32_precision)\n"
        f"{place}.fp32_precision = 'tf32'; before = both()\n"
        "inside = unaffected(both)(); assert set(inside) <= {'ieee', 'none'}, inside\n"
        "assert both() == before and 'tf32' in before, (before, both())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compiled_callers_break_their_graph():
    """The packed weights are of types that no compiler looks into."""
    engine, x = small_engine(), image(2, 32, 32)
    before = engine.encode(x)

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.engine, self.head = engine, torch.nn.Linear(64, 3)

        def forward(self, x):
            return self.head(self.engine.encode(x, outputs=("cls",))["cls"]).sum()

    after = torch.compile(engine.encode, backend="eager")(x)
    assert all(torch.equal(before[name], after[name]) for name in before)
    head = Head()
    loss = torch.compile(head, backend="eager")(x)
    assert torch.allclose(loss, head(x))
    loss.backward()
    assert head.head.weight.grad is not None
