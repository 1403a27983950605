"""`load` and `load_stellar`: from a model's name to something that encodes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .config import MODELS, ModelConfig
from .engine import backends
from .engine.backends import resolve_device
from .engine.callers import unaffected
from .engine.engine import MAX_PATCHES, Engine
from .errors import CheckpointError
from .precision import DTYPES, resolve_precision
from .weights import checkpoint, hub, names, saving, synthetic
from .weights.pack import pack_decoder, pack_encoder, pack_vqgan
from .weights.packed import VQGANWeights
from .weights.quantize import quantize_block

if TYPE_CHECKING:
    from .reference import STELLARModel

PUBLISHED_REPO = hub.PUBLISHED_REPO
SYNTHETIC_SEED = 0
# Images computed at once. On two CPU cores B/16 ran fastest at 8 and 16, 5 % slower at 32, whose
# activations outgrow the caches. The GPU's number bounds memory and is not tuned yet.
MAX_BATCH_CPU = 16
MAX_BATCH_GPU = 256
# What the published training run set differently from the constructor's defaults.
PUBLISHED_TRAINING = {"masking_ratio": 0.8}
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
    backend: Literal["auto", "triton", "torch"] = "auto",
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
        precision: "fp32", "bf16", "fp16", "fp8" (most products in e4m3, on GPUs from sm_89), or
            "auto": bf16 where the device has bf16 matrix units, else fp32.
        output_dtype: dtype of the features, whatever the precision.
        backend: "triton", the kernels, or "torch", PyTorch's own fused paths; "auto" takes the
            kernels on GPUs from sm_80 in bf16, fp16 and fp8.
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
        located = hub.locate(
            name,
            repo=repo,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        hashed = _hashed(located.weights)
        precision = _precision_of(located.weights, precision)
    precision = resolve_precision(precision, target)
    resolved = backends.resolve_backend(backend, target, precision)
    if max_batch is None:
        max_batch = MAX_BATCH_GPU if target.type == "cuda" else MAX_BATCH_CPU

    if located is not None and saving.saved_precision(located.weights) is not None:
        config, source = located.config, str(located.weights)
        encoder, decoder = saving.read(located.weights, config, target)
        if purpose == "reconstruct" and decoder is None:
            raise CheckpointError(f"{source} was saved from an engine that only encodes")
    else:
        if located is None:
            config, state = _synthetic(name, repo, purpose)
            source = "synthetic"
        else:
            config, source = located.config, str(located.weights)
            state = _read_model(located.weights, config, purpose)
        dtype = DTYPES[precision]
        decoder = None
        if purpose == "reconstruct":
            vqgan = _vqgan(state, vq_model, located is None, dtype, target)
            decoder = pack_decoder(state, config, vqgan, dtype, target)
        quantize = quantize_block if precision == "fp8" else None
        encoder = pack_encoder(state, config, dtype, target, quantize=quantize)
    return Engine(
        config,
        encoder,
        decoder,
        device=target,
        precision=precision,
        output_dtype=output_dtype,
        max_batch=max_batch,
        max_patches=max_patches,
        weights=source,
        weights_sha256=None if hashed is None else hashed.result(),
        backend=resolved,
        cuda_graphs=cuda_graphs,
    )


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
    name: str,
    purpose: Literal["encode", "reconstruct", "pretrain"] = "encode",
    vq_model: PathLike | None = None,
    *,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    repo: PathLike = PUBLISHED_REPO,
    weights: Literal["pretrained", "synthetic"] = "pretrained",
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **model_arguments: Any,
) -> Engine | STELLARModel:
    """The published loader's name and arguments.

    "encode" and "reconstruct" give an `Engine` at full float32 precision; "pretrain" gives the
    reference module in training mode, with gradients on everything but the tokenizer.

    Args:
        model_arguments: for "pretrain", further constructor arguments of `reference.STELLARModel`,
            such as `masking_ratio` or `momentum_teacher`; the published training run's values are
            the defaults.

    Raises:
        As `load`; TypeError for `model_arguments` with another purpose.
    """
    files: dict[str, Any] = {
        "repo": repo,
        "weights": weights,
        "revision": revision,
        "cache_dir": cache_dir,
        "token": token,
        "local_files_only": local_files_only,
    }
    if purpose != "pretrain":
        if model_arguments:
            raise TypeError(
                f"only purpose='pretrain' takes {', '.join(map(repr, model_arguments))}"
            )
        return load(
            name, purpose=purpose, vq_model=vq_model, device=device, precision=precision, **files
        )
    if precision != "fp32":
        raise ValueError(
            f"pretraining parameters are fp32 (use autocast around the forward), got {precision!r}"
        )
    return _load_pretrain(name, vq_model, resolve_device(device), files, model_arguments)


def _local_config(name: str, repo: PathLike) -> ModelConfig:
    """The geometry of synthetic weights: a local folder's if `repo` is one, else the published."""
    folder = hub.local_folder(repo)
    if folder is not None:
        return hub.read_config(folder / hub.CONFIG_FILE, name)
    if repo != PUBLISHED_REPO:
        raise ValueError(
            f"synthetic weights are drawn without the network, so the geometry in {repo!r} cannot "
            "be looked up; give a local folder as repo, or leave it out"
        )
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name]


def _synthetic(name: str, repo: PathLike, purpose: str) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    config = _local_config(name, repo)
    shapes = names.encode_shapes(config)
    if purpose == "reconstruct":
        shapes |= names.reconstruct_shapes(config)
    return config, synthetic.synthetic_state(shapes, SYNTHETIC_SEED)


def _read_model(path: Path, config: ModelConfig, purpose: str) -> Mapping[str, Tensor]:
    """The tensors that `purpose` needs, each there and of the right shape."""
    state = checkpoint.read_state(path)
    shapes = names.encode_shapes(config)
    if purpose == "reconstruct":
        shapes |= names.reconstruct_shapes(config, pixel_head=_has_pixel_head(state))
    known = names.published_shapes(config, teacher=True)
    ignored = {name for name in state if name in known or name.startswith("tokenizer.")}
    checkpoint.check_tensors(state, shapes, where=str(path), ignored=ignored)
    return {name: state[name] for name in shapes}


def _has_pixel_head(state: Mapping[str, Tensor]) -> bool:
    """Whether it was trained without a tokenizer: the head is then a convolution's, of 4 axes."""
    head = state.get("reconstruction_head.weight")
    return head is not None and head.dim() == 4


def _vqgan(
    state: Mapping[str, Tensor],
    vq_model: PathLike | None,
    drawn: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> VQGANWeights | None:
    if _has_pixel_head(state):
        if vq_model is not None:
            raise CheckpointError(
                "the checkpoint's reconstruction head makes pixels itself; "
                f"vq_model={str(vq_model)!r} has no part in it, leave it out"
            )
        return None
    shapes = names.vqgan_decoder_shapes()
    if vq_model is None:
        if drawn:
            return pack_vqgan(synthetic.synthetic_state(shapes, SYNTHETIC_SEED), dtype, device)
        raise ValueError(f"purpose='reconstruct' needs vq_model, the path of {VQ_FILE}")
    tokenizer = checkpoint.read_state(vq_model)
    checkpoint.check_tensors(tokenizer, shapes, where=str(vq_model), ignored=names.vqgan_shapes())
    return pack_vqgan(tokenizer, dtype, device)


def _load_pretrain(
    name: str,
    vq_model: PathLike | None,
    device: torch.device,
    files: dict[str, Any],
    model_arguments: dict[str, Any],
) -> STELLARModel:
    from .reference import STELLARModel

    if files["weights"] == "synthetic":
        config = _local_config(name, files["repo"])
        state, where = None, "synthetic weights"
    else:
        located = hub.locate(
            name, **{key: value for key, value in files.items() if key != "weights"}
        )
        config, where = located.config, str(located.weights)
        state = checkpoint.read_state(located.weights)
        # Before a model is built of a geometry that the file may not have.
        checkpoint.check_tensors(state, names.encode_shapes(config), where=where, ignored=state)
        if vq_model is None and not _has_pixel_head(state):
            raise ValueError(
                f"purpose='pretrain' with this checkpoint needs vq_model, the path of {VQ_FILE}"
            )
    model = STELLARModel(
        num_sparse_tokens=config.num_sparse_tokens,
        num_decoder_layers=config.num_decoder_layers,
        spatial_temp=config.spatial_temp,
        vit_pretrained=config.backbone,
        vq_model=vq_model,
        **PUBLISHED_TRAINING | model_arguments,
    )
    trained = {
        key: tuple(value.shape)
        for key, value in model.state_dict().items()
        if not key.startswith("tokenizer.")
    }
    if state is None:
        state = synthetic.synthetic_state(trained, SYNTHETIC_SEED)
    known = {
        *names.published_shapes(config, teacher=True),
        *(key for key in state if key.startswith("tokenizer.")),
    }
    # A published file has no teacher: it starts as the student.
    if not any(key.startswith("teacher_") for key in state):
        trained = {key: shape for key, shape in trained.items() if not key.startswith("teacher_")}
    checkpoint.check_tensors(state, trained, where=where, ignored=known)
    model.load_state_dict({key: state[key] for key in trained}, strict=False)
    return model.to(device).train()
