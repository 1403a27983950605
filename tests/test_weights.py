"""The offline transforms: exact in float64, and each doing what it says."""

import pytest
import torch
from checkpoints import images, relative_error, synthetic
from engines import SMALL, config_of
from stellar_fast.reference import ops
from stellar_fast.reference.model import STELLARModel
from stellar_fast.reference.vqgan import VQGAN

from stellar_fast import encoder, weights
from stellar_fast.names import canonical_name, encode_shapes, reconstruct_shapes, vqgan_shapes
from stellar_fast.vqgan import decode_codes

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
    model = STELLARModel(8, vit_pretrained=SMALL, do_recon=False, do_clustering=False).double()
    model.load_state_dict(dict(state), strict=False)
    x = images(2, *size, 3).double()
    table = packed.table.table(size[0] // 16, size[1] // 16).double()
    ours = encoder.encode(ops, packed, config, x, table, encoder.OUTPUTS, torch.float64)
    with torch.no_grad():
        exact = model.encode(x)
    for name in exact:  # what is left is the position table, which is float32
        assert relative_error(ours[name], exact[name]) < 1e-6, name


def test_every_row_of_the_residual_stream_has_mean_zero(packed, config):
    x = images(1, 224, 224, 3).double()
    table = packed.table.table(14, 14).double()
    for rows in residual_stream(packed, config, x, table):
        assert (rows.mean(-1).abs() / rows.std(-1)).max() < 1e-6


def test_uint8_and_float_pixels_enter_alike(packed, config):
    pixels = (images(1, 224, 224, 3) * 255).round()
    table = packed.table.table(14, 14).double()
    sparse, patch = packed.sparse_tokens, config.backbone.patch_size
    floats, _ = ops.patch_embed(pixels.double() / 255, packed.patch, table, sparse, patch, 0.5)
    bytes_, _ = ops.patch_embed(pixels.byte(), packed.patch_uint8, table, sparse, patch, 127.5)
    assert relative_error(bytes_, floats) < 1e-12


def test_centred_bytes_are_exact_in_the_half_precisions():
    bytes_ = torch.arange(256, dtype=torch.float64) - weights.PIXEL_CENTRE_UINT8
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(bytes_.to(dtype).double(), bytes_)


def test_packed_weights_share_no_memory_with_the_state(state, config):
    floats = {name: tensor.float() for name, tensor in state.items()}
    packed = weights.pack_encoder(floats, config, torch.float32, CPU)
    decoder = weights.pack_decoder(floats, config, None, torch.float32, CPU)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in floats.values()}
    ours = []
    weights.map_nodes((packed, decoder), torch.Tensor, ours.append)
    assert len(ours) > 40
    assert not theirs & {tensor.untyped_storage().data_ptr() for tensor in ours}


def test_the_vqgan_shortcut_is_folded_exactly():
    state = {name: tensor.double() for name, tensor in synthetic(vqgan_shapes(), 7).items()}
    model = VQGAN().double()
    model.load_state_dict(state)
    codes = torch.arange(36).reshape(1, 6, 6) * 28
    packed = weights.pack_vqgan(state, torch.float64, CPU)
    with torch.no_grad():
        exact = model.decode(codes)
    assert relative_error(decode_codes(packed, codes).clamp(0, 1), exact) < 1e-12


def test_position_code_is_the_reference_less_its_mean():
    from stellar_fast.reference.position import RandomFourierPosition

    reference = RandomFourierPosition(512)
    fourier = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    reference.load_state_dict({"positional_encoding_gaussian_matrix": fourier})
    code = weights.position_code(fourier, 14, 14)
    exact = reference.double()(14, 14).reshape(196, 512)
    assert relative_error(code, exact - exact.mean(-1, keepdim=True)) < 1e-5


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
