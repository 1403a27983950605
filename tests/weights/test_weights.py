"""The offline transforms: exact in float64, and each doing what it says."""

import pytest
import torch
from budgets import FLOAT64, entitlement
from checkpoints import images, relative_error, synthetic
from engines import SMALL, config_of
from references import reference_of, vqgan_of

from stellar_fast.engine import encoder
from stellar_fast.engine.vqgan import decode_codes
from stellar_fast.reference import ops
from stellar_fast.weights import pack as weights
from stellar_fast.weights.names import canonical_name, encode_shapes, reconstruct_shapes
from stellar_fast.weights.packed import PIXEL_CENTRE_UINT8, map_nodes, position_code

pytestmark = pytest.mark.numerical
META = {"backbone": SMALL, "num_sparse_tokens": 8, "spatial_temp": 0.06, "num_decoder_layers": 2}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config():
    return config_of(META)


@pytest.fixture(scope="module")
def state(config):
    shapes = encode_shapes(config) | reconstruct_shapes(config)
    return {name: tensor.double() for name, tensor in synthetic(shapes, 5).items()}


@pytest.fixture(scope="module")
def packed(state, config):
    return weights.pack_encoder(state, config, torch.float64, CPU)


def residual_stream(packed, config, x, table):
    """The rows after the embedding and after each block but the last."""
    x, sums = ops.patch_embed(
        x, packed.patch, table, packed.sparse_tokens, config.backbone.patch_size, 0.5
    )
    yield x
    for block in packed.blocks:
        x, sums = encoder.run_block(ops, block, x, sums, config.backbone.num_attention_heads)
        yield x


@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
def test_the_whole_fold_is_exact_in_float64(packed, state, config, size):
    model = reference_of(META | {"weights_seed": 5})
    x = images(2, *size, 3).double()
    table = packed.table.table(size[0] // 16, size[1] // 16).double()
    exact = model.encode(x)
    ours = encoder.encode(ops, packed, config, x, table, exact, torch.float64)
    # The position table is float32: no more than float32 everywhere would cost.
    sound = entitlement(lambda: model.encode(x), exact, torch.float32)
    for name in exact:
        assert relative_error(ours[name], exact[name]) < sound[name].l2, name


def test_every_row_of_the_residual_stream_has_mean_zero(packed, config):
    x = images(1, 224, 224, 3).double()
    table = packed.table.table(14, 14).double()
    for rows in residual_stream(packed, config, x, table):
        # of the float32 table, half a step at most of the mean magnitude
        assert (rows.mean(-1).abs() / rows.std(-1)).max() < torch.finfo(torch.float32).eps


def test_uint8_and_float_pixels_enter_alike(packed, config):
    pixels = (images(1, 224, 224, 3) * 255).round()
    table = packed.table.table(14, 14).double()
    sparse, patch = packed.sparse_tokens, config.backbone.patch_size
    floats, _ = ops.patch_embed(pixels.double() / 255, packed.patch, table, sparse, patch, 0.5)
    bytes_, _ = ops.patch_embed(pixels.byte(), packed.patch_uint8, table, sparse, patch, 127.5)
    assert relative_error(bytes_, floats) < FLOAT64


def test_centred_bytes_are_exact_in_the_half_precisions():
    bytes_ = torch.arange(256, dtype=torch.float64) - PIXEL_CENTRE_UINT8
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(bytes_.to(dtype).double(), bytes_)


def test_packed_weights_share_no_memory_with_the_state(state, config):
    floats = {name: tensor.float() for name, tensor in state.items()}
    packed = weights.pack_encoder(floats, config, torch.float32, CPU)
    decoder = weights.pack_decoder(floats, config, None, torch.float32, CPU)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in floats.values()}
    ours = []
    map_nodes((packed, decoder), torch.Tensor, ours.append)
    assert len(ours) > 40
    assert not theirs & {tensor.untyped_storage().data_ptr() for tensor in ours}


def test_the_vqgan_shortcut_is_folded_exactly():
    model = vqgan_of().double()
    codes = torch.arange(6).reshape(1, 2, 3) * 180
    packed = weights.pack_vqgan(model.state_dict(), torch.float64, CPU)
    exact = model.decode(codes)
    assert relative_error(decode_codes(packed, codes).clamp(0, 1), exact) < FLOAT64


def test_position_code_is_the_reference_less_its_mean():
    from stellar_fast.reference.position import RandomFourierPosition

    reference = RandomFourierPosition(512)
    fourier = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    reference.load_state_dict({"positional_encoding_gaussian_matrix": fourier})
    code = position_code(fourier, 14, 14)
    exact = reference.double()(14, 14).reshape(196, 512)
    half_step = torch.finfo(torch.float32).eps / 2  # it is rounded once
    assert relative_error(code, exact - exact.mean(-1, keepdim=True)) < half_step


@pytest.mark.parametrize(
    ("renamed", "published"),
    [
        ("encoder.layers.11.mlp.fc2.bias", "encoder.encoder.layer.11.output.dense.bias"),
        (
            "model.decoder.layers.0.attention.o_proj.weight",
            "decoder.encoder.layer.0.attention.output.dense.weight",
        ),
        (
            "teacher_encoder.layers.2.layernorm_after.weight",
            "teacher_encoder.encoder.layer.2.layernorm_after.weight",
        ),
        ("model.sparse_tokens", "sparse_tokens"),
        ("clustering_head.predictor.layers.0.weight", "clustering_head.predictor.layers.0.weight"),
        ("tokenizer.encoder.conv_in.weight", "tokenizer.encoder.conv_in.weight"),
        ("encoder.layers.0.mlp.fc9.bias", "encoder.layers.0.mlp.fc9.bias"),
    ],
)
def test_both_spellings_of_a_name(renamed, published):
    assert canonical_name(renamed) == published
    assert canonical_name(published) == published
