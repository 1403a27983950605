"""`load` and `load_stellar`: from a model's name to something that encodes."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .config import ModelConfig
from .engine import backends, namespaces
from .engine.backends import resolve_device
from .engine.callers import unaffected
from .engine.engine import MAX_BATCH, MAX_PATCHES, Engine
from .errors import CheckpointError
from .precision import DTYPES, check_precision
from .weights import checkpoint, names, saving, source, synthetic
from .weights.manifest import NOTHING_SAID, Trained
from .weights.pack import pack_decoder, pack_encoder, pack_vqgan
from .weights.packed import VQGANWeights
from .weights.quantize import quantize_block
from .weights.residency import let_go, trim

if TYPE_CHECKING:
    from .module import FastSTELLARModel
    from .reference.vqgan import VQGAN

PUBLISHED_REPO = source.PUBLISHED_REPO
SYNTHETIC_SEED = 0
VQ_FILE = "maskgit-vqgan-imagenet-f16-256.bin"

PathLike = str | os.PathLike[str]


@unaffected
def load(
    name: str,
    *,
    purpose: Literal["encode", "reconstruct"] = "encode",
    vq_model: PathLike | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
    output_dtype: torch.dtype = torch.float32,
    backend: Literal["auto", "triton", "openvino", "torch"] = "auto",
    repo: PathLike = PUBLISHED_REPO,
    weights: Literal["pretrained", "synthetic"] = "pretrained",
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    max_batch: int | None = None,
    max_patches: int = MAX_PATCHES,
    cuda_graphs: bool = True,
) -> Engine:
    """An engine for one model.

    Args:
        name: a model of `list_models()`, or of the `config.json` in `repo`.
        purpose: "encode", or "reconstruct" to have `Engine.reconstruct` too.
        vq_model: the MaskGIT-VQGAN tokenizer file, needed to reconstruct with the published
            checkpoints.
        device: "cuda" where there is one, else "cpu".
        precision: "fp32", "bf16", "fp16", "fp8" (most products in e4m3, on GPUs from sm_89), "int8"
            (products of the blocks on 8-bit integers, on CPUs; `Engine.calibrate` comes first), or
            "auto": bf16 or fp32, whichever the device computes faster. On a CPU that is tried, by a
            product of the model's shape, once a process; `Engine.precision` says what was taken.
        output_dtype: dtype of the features, whatever the precision.
        backend: "triton", the kernels; "openvino", the runtime of the extra `cpu`, on CPUs; or
            "torch", PyTorch's own fused paths. "auto" takes the kernels on GPUs from sm_80 in bf16,
            fp16 and fp8, and on a CPU the faster of the others, by the same trial.
        repo: a Hub repository, or a local folder in the published layout or from `Engine.save`.
        weights: "synthetic" draws seeded random weights, with no network: for demos, benchmarks and
            tests.
        revision, cache_dir, token, local_files_only: as in `huggingface_hub`.
        max_batch: images computed at once; larger batches are cut. 16 on a CPU, 256 on a GPU.
        max_patches: patches of an image; larger images are a ValueError. The default is an image of
            4096x4096 at patch 16.
        cuda_graphs: run the kernels as CUDA graphs, one for each bucket of batch sizes.

    Raises:
        ValueError: an argument out of its range, or a precision or backend that the device lacks.
        MissingExtraError: OpenVINO is asked for and not installed.
        ForkError: OpenVINO was in use before this process was forked.
        DownloadError: a file cannot be had.
        CheckpointError: a file is not what the model needs.
    """
    if purpose not in ("encode", "reconstruct"):
        raise ValueError(
            f"purpose must be 'encode' or 'reconstruct', got {purpose!r} (load_stellar has "
            "'pretrain')"
        )
    if weights not in ("pretrained", "synthetic"):
        raise ValueError(f"weights must be 'pretrained' or 'synthetic', got {weights!r}")
    target = resolve_device(device)
    located = hashed = None
    if weights == "pretrained":
        located = source.locate(
            name,
            repo=repo,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        hashed = _hashed(located.weights)
        precision = _precision_of(located.weights, precision)
    config = source.geometry(name, repo) if located is None else located.config
    resolved, precision = backends.choose(backend, precision, target, config)
    if max_batch is None:
        max_batch = MAX_BATCH[target.type]
    # Layer by layer, as they are read: there are never two copies of all weights.
    layout = namespaces.layout(resolved, namespaces.typical_rows(config, max_batch))

    if located is not None and saving.saved_precision(located.weights) is not None:
        where = str(located.weights)
        encoder, decoder = saving.read(located.weights, config, target, layout)
        if purpose == "reconstruct" and decoder is None:
            raise CheckpointError(f"{where} was saved from an engine that only encodes")
    else:
        if located is None:
            state, where = _synthetic(config, purpose), "synthetic"
        else:
            where = str(located.weights)
            state = _read_model(located.weights, config, purpose)
        dtype = DTYPES[precision]
        decoder = None
        if purpose == "reconstruct":
            vqgan = _vqgan(state, vq_model, located is None, dtype, target)
            decoder = pack_decoder(state, config, vqgan, dtype, target, layout)
        quantize = quantize_block if precision == "fp8" else None
        encoder = pack_encoder(state, config, dtype, target, quantize=quantize, layout=layout)
    engine = Engine(
        config,
        encoder,
        decoder,
        device=target,
        precision=precision,
        output_dtype=output_dtype,
        max_batch=max_batch,
        max_patches=max_patches,
        weights=where,
        weights_sha256=None if hashed is None else hashed.result(),
        backend=resolved,
        cuda_graphs=cuda_graphs,
    )
    del encoder, decoder
    trim()
    engine._load_exact = functools.partial(
        load,
        name,
        precision="fp32",
        repo=repo,
        weights=weights,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        max_patches=max_patches,
    )
    return engine


def _hashed(path: Path) -> Future[str]:
    """The SHA-256 of a file as it is now, computed while its tensors are read and packed: later
    there may be another file of this name."""
    file = path.open("rb")

    def digest() -> str:
        with file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    pool = ThreadPoolExecutor(1, "sha256")
    try:
        return pool.submit(digest)
    finally:
        pool.shutdown(wait=False)


def _precision_of(path: Path, asked: str) -> str:
    """The precision of weights that an engine saved, or the one asked for."""
    saved = saving.saved_precision(path)
    if saved is None or saved == asked:
        return asked
    if asked != "auto":
        raise ValueError(
            f"{path} holds weights packed for precision={saved!r}, got precision={asked!r}; load "
            "the original checkpoint for that"
        )
    return saved


@unaffected
def load_stellar(
    model: str = "stellar-b16",
    purpose: Literal["encode", "reconstruct", "pretrain"] = "encode",
    vq_model: PathLike | None = None,
    repo_id: PathLike = PUBLISHED_REPO,
    device: str | torch.device | None = "cpu",
    revision: str | None = None,
    local_files_only: bool = False,
    *,
    precision: str = "fp32",
    backend: str = "auto",
    weights: Literal["pretrained", "synthetic"] = "pretrained",
    cache_dir: PathLike | None = None,
    token: str | bool | None = None,
    repo: PathLike | None = None,
    **model_arguments: Any,
) -> FastSTELLARModel:
    """The published loader: a module with the published parameters, names and methods.

    "encode" and "reconstruct" give it in evaluation mode, "pretrain" in training mode; all
    parameters but the tokenizer's require a gradient, float32. Under `torch.no_grad()`, or once
    nothing requires a gradient, `encode` and `reconstruct` run an engine.

    Args:
        model: a name of `list_models()`, or of the `config.json` in `repo_id`.
        purpose: "encode" builds the encoder alone, "reconstruct" the decoder too, "pretrain" all.
        vq_model: the MaskGIT-VQGAN tokenizer file, needed for the last two with the published
            checkpoints.
        repo_id: a Hub repository, or a local folder in the published layout; `repo` is the same.
        device: of the parameters; None is "cuda" where there is one, else "cpu".
        precision, backend: of the engine, as `load` takes them, while the parameters are float32.
        weights: "synthetic" draws seeded random weights, with no network.
        revision, local_files_only, cache_dir, token: as in `huggingface_hub`.
        model_arguments: for "pretrain", further constructor arguments of `reference.STELLARModel`,
            such as `masking_ratio` or `momentum_teacher`.

    Raises:
        ValueError: an argument out of its range, or a precision or backend that the device lacks.
        TypeError: `model_arguments` with another purpose.
        DownloadError, CheckpointError: as `load`.
    """
    from .module import FastSTELLARModel

    if purpose not in ("encode", "reconstruct", "pretrain"):
        raise ValueError(f"purpose must be 'encode', 'reconstruct' or 'pretrain', got {purpose!r}")
    if weights not in ("pretrained", "synthetic"):
        raise ValueError(f"weights must be 'pretrained' or 'synthetic', got {weights!r}")
    if model_arguments and purpose != "pretrain":
        raise TypeError(f"only purpose='pretrain' takes {', '.join(map(repr, model_arguments))}")
    target = _device_of_module(device)
    if check_precision(precision) == "int8":
        raise ValueError(
            "precision='int8' needs images to calibrate on, which a module's engine is not given: "
            f"load({model!r}, precision='int8').calibrate(images)"
        )
    if target.type in MAX_BATCH:
        backends.resolve_backend(backend, target, "fp32" if precision == "auto" else precision)

    def check(trained: Trained) -> None:
        if purpose != "encode" and vq_model is None and trained.pixel_head is False:
            raise _no_tokenizer(purpose)

    repository = repo_id if repo is None else repo
    state: Mapping[str, Tensor] | None = None
    if weights == "synthetic":
        config = source.geometry(model, repository)
        where, trained = "synthetic weights", NOTHING_SAID
    else:
        located = source.locate(
            model,
            repo=repository,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            check=check,
        )
        config, where, trained = located.config, str(located.weights), located.trained
        state = _read_unpacked(located.weights)
        # Before a model is built of a geometry that the file may not have.
        checkpoint.check_tensors(state, names.encode_shapes(config), where=where, ignored=state)
    tokenizer = None
    if purpose != "encode":
        tokenizer = _tokenizer(purpose, vq_model, state)
    arguments: dict[str, Any] = {
        "num_sparse_tokens": config.num_sparse_tokens,
        "num_decoder_layers": config.num_decoder_layers,
        "spatial_temp": config.spatial_temp,
        "vit_config": config.backbone,
        "vq_model": tokenizer,
        "do_recon": purpose != "encode",
        "do_clustering": purpose == "pretrain",
        "do_cls": trained.do_cls,
        "num_clusters": trained.num_clusters,
        "precision": precision,
        "backend": backend,
    }
    # On the meta device nothing is drawn that is only replaced; a teacher has to be there to be
    # filled.
    with torch.device("cpu" if purpose == "pretrain" else "meta"):
        module = FastSTELLARModel(**arguments | model_arguments)
    _fill(module, state, where)
    return module.to(target).train(purpose == "pretrain")


def _device_of_module(device: str | torch.device | None) -> torch.device:
    """As `resolve_device`, and also those where the reference alone computes, such as mps."""
    kind = None if device is None else torch.device(device).type
    return resolve_device(device) if kind in (None, *MAX_BATCH) else torch.device(device or "cpu")


def _no_tokenizer(purpose: str) -> ValueError:
    return ValueError(
        f"purpose={purpose!r} with this checkpoint needs vq_model, the path of {VQ_FILE}"
    )


def _read_unpacked(path: Path) -> Mapping[str, Tensor]:
    if saving.saved_precision(path) is not None:
        raise CheckpointError(
            f"{path} holds weights packed for an engine, and no module can be made of them; load "
            "the original checkpoint, or this with stellar_fast.load"
        )
    return checkpoint.read_state(path)


def _tokenizer(
    purpose: str, vq_model: PathLike | None, state: Mapping[str, Tensor] | None
) -> VQGAN | None:
    """The tokenizer of a module; None where the checkpoint draws pixels."""
    from .reference.vqgan import VQGAN

    if state is not None and _has_pixel_head(state):
        if vq_model is not None:
            raise _superfluous(vq_model)
        return None
    if vq_model is not None:
        return VQGAN.from_file(vq_model)
    if state is not None:
        raise _no_tokenizer(purpose)
    if purpose == "pretrain":
        return None  # as if it had been trained without: it draws pixels
    with torch.device("meta"):
        tokenizer = VQGAN()
    drawn = synthetic.synthetic_state(names.vqgan_shapes(), SYNTHETIC_SEED)
    tokenizer.load_state_dict(drawn, assign=True)
    return tokenizer


def _fill(module: FastSTELLARModel, state: Mapping[str, Tensor] | None, where: str) -> None:
    """Puts a file's tensors into a module that was built for them, or drawn ones without a file."""
    expected = {
        name: tuple(value.shape)
        for name, value in module.state_dict().items()
        if not name.startswith("tokenizer.")
    }
    if state is None:
        state = synthetic.synthetic_state(expected, SYNTHETIC_SEED)
    # A published file has no teacher: it starts as the student.
    if not any(name.startswith("teacher_") for name in state):
        expected = {n: shape for n, shape in expected.items() if not n.startswith("teacher_")}
    known = {
        *names.published_shapes(module.config, teacher=True),
        *(name for name in state if name.startswith("tokenizer.")),
    }
    checkpoint.check_tensors(state, expected, where=where, ignored=known)
    on_meta = module.sparse_tokens.is_meta
    # Copied, since a tensor read may be the file's own memory.
    values = {name: state[name].to(torch.float32, copy=on_meta) for name in expected}
    module.load_state_dict(values, strict=False, assign=on_meta)


def _synthetic(config: ModelConfig, purpose: str) -> Mapping[str, Tensor]:
    shapes = names.encode_shapes(config)
    if purpose == "reconstruct":
        shapes |= names.reconstruct_shapes(config)
    return synthetic.synthetic_state(shapes, SYNTHETIC_SEED)


def _read_model(path: Path, config: ModelConfig, purpose: str) -> Mapping[str, Tensor]:
    """The tensors that `purpose` needs, each there and of the right shape."""
    state = checkpoint.read_state(path)
    shapes = names.encode_shapes(config)
    if purpose == "reconstruct":
        shapes |= names.reconstruct_shapes(config, pixel_head=_has_pixel_head(state))
    known = names.published_shapes(config, teacher=True)
    ignored = {name for name in state if name in known or name.startswith("tokenizer.")}
    checkpoint.check_tensors(state, shapes, where=str(path), ignored=ignored)
    let_go(state.values())
    return {name: state[name] for name in shapes}


def _has_pixel_head(state: Mapping[str, Tensor]) -> bool:
    """Whether it was trained without a tokenizer: the head is then a convolution's, of 4 axes."""
    head = state.get("reconstruction_head.weight")
    return head is not None and head.dim() == 4


def _superfluous(vq_model: PathLike) -> CheckpointError:
    return CheckpointError(
        "the checkpoint's reconstruction head makes pixels itself; "
        f"vq_model={str(vq_model)!r} has no part in it, leave it out"
    )


def _vqgan(
    state: Mapping[str, Tensor],
    vq_model: PathLike | None,
    drawn: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> VQGANWeights | None:
    if _has_pixel_head(state):
        if vq_model is not None:
            raise _superfluous(vq_model)
        return None
    shapes = names.vqgan_decoder_shapes()
    if vq_model is None:
        if drawn:
            return pack_vqgan(synthetic.synthetic_state(shapes, SYNTHETIC_SEED), dtype, device)
        raise ValueError(f"purpose='reconstruct' needs vq_model, the path of {VQ_FILE}")
    tokenizer = checkpoint.read_state(vq_model)
    checkpoint.check_tensors(tokenizer, shapes, where=str(vq_model), ignored=names.vqgan_shapes())
    return pack_vqgan(tokenizer, dtype, device)
