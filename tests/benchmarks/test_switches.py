"""Each optimisation switched off: it is gone from the launches, and the features stay right."""

from collections import Counter

import pytest
import torch
from engines import SMALL, image, small_engine
from gpu.switches import FEW, SWITCHES, without
from kernel_checks import DEVICE, assert_budget
from references import reference_of

from stellar_fast.engine import encoder
from stellar_fast.engine.encoder import OUTPUTS
from stellar_fast.kernels import launch
from stellar_fast.reference import ops as oracles
from stellar_fast.weights.packed import map_nodes

pytestmark = [pytest.mark.kernels, pytest.mark.numerical]
META = {"backbone": SMALL, "num_sparse_tokens": 8, "spatial_temp": 0.06, "weights_seed": 1}
BY_NAME = {switch.name: switch for switch in SWITCHES}


@pytest.fixture(scope="module")
def engine():
    return small_engine(backend="triton", device=DEVICE, precision="fp16", cuda_graphs=True)


@pytest.fixture(scope="module")
def fp8_engine():
    return small_engine(backend="triton", device=DEVICE, precision="fp8")


def launches(engine, outputs=OUTPUTS) -> list[launch.Launch]:
    """What a batch launches of the package's kernels."""
    weights = map_nodes(engine._encoder, torch.Tensor, lambda tensor: tensor.to("meta"))
    x = torch.empty(2, 3, 96, 96, dtype=torch.uint8, device="meta")
    seen: list[launch.Launch] = []
    table = weights.table.table(6, 6)
    with launch.on_gpu(90, seen.append):
        encoder.encode(engine._ops, weights, engine.config, x, table, outputs, torch.float32)
    return seen


def count(items: list[launch.Launch]) -> Counter:
    """Launches by kernel, and what epilogues do."""
    found = Counter(item.kernel.__name__.strip("_").removesuffix("_kernel") for item in items)
    for flag in ("RMS", "GELU", "RESIDUAL", "DESCRIPTORS", "QUANTIZE"):
        found[flag] = sum(bool(item.arguments.get(flag)) for item in items)
    return +found


FULL = {
    "unfold": 1, "patch_embed": 1, "linear": 14, "attention": 3, "norm": 1, "similarity": 1,
    "spatial": 1, "RMS": 7, "GELU": 3, "RESIDUAL": 6, "DESCRIPTORS": 17,
}  # fmt: skip
# What differs from FULL in the launches of our kernels; what PyTorch launches instead is not seen.
CHANGES = {
    "norm statistics": {"norm": 1 + 7, "RMS": 0},
    "gelu": {"GELU": 0},
    "residual": {"RESIDUAL": 0},
    "flash attention": {"attention": 0, "DESCRIPTORS": 14},
    "own attention": {"attention": 0, "DESCRIPTORS": 14},
    "packed qkv": {"linear": 16, "RMS": 9, "DESCRIPTORS": 19},
    "patch embedding": {"unfold": 0, "patch_embed": 0},
    "spatial map": {"similarity": 0, "spatial": 0, "linear": 13, "DESCRIPTORS": 16},
    "tma": {"DESCRIPTORS": 0},
}


def test_the_whole_engine_has_every_optimisation(engine):
    assert count(launches(engine)) == FULL


@pytest.mark.parametrize("name", CHANGES)
def test_a_switch_turns_its_optimisation_off_and_no_other(name, engine):
    assert count(launches(without(BY_NAME[name], engine))) == +Counter(FULL | CHANGES[name])
    assert count(launches(engine)) == FULL, "the engine itself is untouched"


@pytest.mark.parametrize("name", ["gelu", "residual", "flash attention", "own attention"])
def test_a_switch_of_an_fp8_engine_keeps_its_products_in_fp8(name, fp8_engine):
    full = count(launches(fp8_engine))
    assert (full["quantize_rows"], full["QUANTIZE"]) == (2, 2)
    off = count(launches(without(BY_NAME[name], fp8_engine)))
    assert off["quantize_rows"] == 2
    assert off["GELU"] == (0 if name == "gelu" else full["GELU"])
    assert off["RESIDUAL"] == (0 if name == "residual" else full["RESIDUAL"])
    assert ("attention" in off) == (not name.endswith("attention"))
    # The switched op quantizes by PyTorch.
    assert off["QUANTIZE"] == (2 if name == "residual" else 1)


def test_without_wanted_rows_the_last_block_runs_on_all(engine):
    switch = BY_NAME["wanted rows"]
    assert switch.outputs == FEW

    def rows(outputs):
        found = launches(engine, outputs)
        return [item.arguments["M"] for item in found if item.arguments.get("GELU")]

    whole, few = 2 * (1 + 36 + 8), 2 * (1 + 8)
    assert rows(switch.outputs) == [whole, whole, few]
    assert rows(switch.outputs_off) == [whole, whole, whole]
    assert "similarity" not in count(launches(engine, switch.outputs_off))


def test_without_graphs_and_without_fp8(engine):
    assert engine.cuda_graphs and not without(BY_NAME["cuda graphs"], engine).cuda_graphs
    assert without(BY_NAME["gelu"], engine).cuda_graphs
    assert BY_NAME["fp8"].precision == "bf16" and BY_NAME["fp8"].precisions == ("fp8",)


def test_every_switch_is_under_test():
    assert set(BY_NAME) == {*CHANGES, "wanted rows", "cuda graphs", "fp8"}
    assert len(BY_NAME) == len(SWITCHES)


@pytest.mark.parametrize("name", [*CHANGES, "wanted rows"])
def test_features_stay_within_the_budget(name, engine):
    switch = BY_NAME[name]
    x = torch.randint(0, 256, (1, 3, 32, 48), generator=torch.Generator().manual_seed(3))
    x = x.to(torch.uint8)
    other = without(switch, engine)
    found = other.encode(x, outputs=switch.outputs_off)

    def computed(weights):
        cpu = map_nodes(weights, torch.Tensor, torch.Tensor.cpu)
        table = cpu.table.table(2, 3)
        return encoder.encode(oracles, cpu, engine.config, x, table, OUTPUTS, torch.float64)

    plain = computed(engine._encoder)
    wide = map_nodes(
        engine._encoder, torch.Tensor, lambda t: t.double() if t.is_floating_point() else t
    )
    exact = computed(wide)
    for key in switch.outputs_off:
        assert_budget(found[key], plain[key], exact[key], torch.float16)


# The ops of these have an FP8 form each; the others are as they are in the other precisions.
OWN_FP8 = {"gelu", "residual", "flash attention", "own attention", "packed qkv"}


@pytest.mark.parametrize(
    "name",
    [
        name if name in OWN_FP8 else pytest.param(name, marks=pytest.mark.slow)
        for name in CHANGES
        if "fp8" in BY_NAME[name].precisions
    ],
)
def test_fp8_features_stay_within_the_budget(name, fp8_engine):
    x = image(1, 32, 48)
    found = without(BY_NAME[name], fp8_engine).encode(x)
    weights = map_nodes(fp8_engine._encoder, torch.Tensor, torch.Tensor.cpu)
    table = weights.table.table(2, 3)
    plain = encoder.encode(oracles, weights, fp8_engine.config, x, table, OUTPUTS, torch.float32)
    with torch.no_grad():
        exact = reference_of(META).encode(x.double())
    for key in OUTPUTS:
        assert_budget(found[key], plain[key], exact[key], torch.float16)
