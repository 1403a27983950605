"""The engine: a loaded model, ready for many threads, that owns no memory its callers see."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..engine.backends import resolve_device
from ..errors import ForkError, StellarError
from ..weights import saving
from ..weights.packed import DecoderWeights, EncoderWeights, map_nodes, position_code
from ..weights.quantize import calibrated
from . import backends, decoder, encoder
from .caching import ByteCache
from .callers import unaffected
from .encoder import OUTPUTS
from .graphs import CudaRecorder, GraphRunner
from .inputs import as_batch, as_features, check_patches
from .inputs import check_range as check_pixel_range

TYPICAL_BATCH = 8  # images in the product that weights are laid out for
# Patches of an image. Attention takes time by their square: on a processor's two cores, minutes for
# this many, which is an image of 4096x4096 at patch 16.
MAX_PATCHES = 65_536
TABLE_BYTES = 256 << 20  # of position tables kept, one for each image size


def resolve_outputs(outputs: Collection[str] | None) -> tuple[str, ...]:
    """Feature names in the order of `OUTPUTS`; None is all of them.

    Raises:
        ValueError: an unknown name, or none at all.
    """
    if outputs is None:
        return OUTPUTS
    wanted = {outputs} if isinstance(outputs, str) else set(outputs)
    unknown = sorted(map(str, wanted - set(OUTPUTS)))
    if unknown or not wanted:
        raise ValueError(
            f"outputs must name some of {', '.join(OUTPUTS)}; got {', '.join(unknown) or 'none'}"
        )
    return tuple(name for name in OUTPUTS if name in wanted)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; on the CPU that is a plain RuntimeError, told by its text."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return "can't allocate memory" in text or "not enough memory" in text


def _copy_out(features: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> None:
    for name, tensor in out.items():
        tensor.copy_(features[name])


class Engine:
    """A STELLAR model for inference. Made by `stellar_fast.load`.

    Safe to call from many threads. Outputs are new tensors that the caller owns, without gradients,
    on the engine's device. A process forked after the engine was made cannot use it.

    Attributes:
        config: geometry of the model.
        device: where it computes.
        precision: "fp32", "bf16", "fp16" or "fp8".
        backend: "triton" or "torch".
        output_dtype: dtype of every float output.
        max_batch: images computed at once; larger batches are cut into chunks.
        max_patches: patches of an image; larger images are refused.
        cuda_graphs: whether forwards of the Triton backend run as CUDA graphs.
        weights: where the weights came from, a path or "synthetic".
    """

    def __init__(
        self,
        config: ModelConfig,
        encoder_weights: EncoderWeights,
        decoder_weights: DecoderWeights | None,
        *,
        device: torch.device,
        precision: str,
        output_dtype: torch.dtype,
        max_batch: int,
        weights: str,
        max_patches: int = MAX_PATCHES,
        weights_sha256: str | None = None,
        backend: str = "torch",
        cuda_graphs: bool = False,
    ) -> None:
        if not output_dtype.is_floating_point:
            raise ValueError(f"output_dtype must be a float dtype, got {output_dtype}")
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        if max_patches < 1:
            raise ValueError(f"max_patches must be at least 1, got {max_patches}")
        self.config = config
        self.precision = precision
        self.output_dtype = output_dtype
        self.max_batch = max_batch
        self.max_patches = max_patches
        self.weights = weights
        self.weights_sha256 = weights_sha256
        self.backend = backend
        self.cuda_graphs = cuda_graphs
        self._ops = backends.ops_of(backend)
        self._place(encoder_weights, decoder_weights, device)
        self._pid = os.getpid()

    def _place(
        self,
        encoder_weights: EncoderWeights,
        decoder_weights: DecoderWeights | None,
        device: torch.device,
    ) -> None:
        """Takes weights that are on `device`."""
        rows = min(self.max_batch, TYPICAL_BATCH) * self.config.sequence_length
        self.device = device
        self._encoder: EncoderWeights = backends.prepare(self._ops, encoder_weights, rows)
        self._decoder: DecoderWeights | None = backends.prepare(self._ops, decoder_weights, rows)
        self._tables: ByteCache[tuple[int, int], Tensor] = ByteCache(
            TABLE_BYTES, lambda table: table.nbytes
        )
        self._graphs: GraphRunner | None = None
        if self.cuda_graphs and self.backend == "triton" and device.type == "cuda":
            with torch.cuda.device(device):
                recorder = CudaRecorder(device)
            self._graphs = GraphRunner(recorder, self.max_batch, _is_out_of_memory)

    def __repr__(self) -> str:
        return (
            f"Engine({self.config.name!r}, {self.precision}, {self.backend}, {self.device}, "
            f"{self.weights!r})"
        )

    def __reduce__(self):
        raise TypeError(
            "an Engine cannot be pickled; load one in each process with stellar_fast.load"
        )

    @unaffected
    def encode(
        self,
        images: Any,
        *,
        outputs: Collection[str] | None = None,
        preset: str = "card",
        check_range: bool = True,
    ) -> dict[str, Tensor]:
        """Features of a batch of images.

        Args:
            images: float tensor or NumPy array (B, 3, H, W) with RGB in [0, 1], any float dtype,
                strides and device; uint8 (B, 3, H, W) or (B, H, W, 3); or a list of PIL images and
                paths. H and W are at least one patch, and `max_patches` together; rows and columns
                beyond a whole patch are dropped. B may be 0.
            outputs: the features wanted, of sparse, spatial, dense, lowrank, cls; all by default.
                Only what they need is computed.
            preset: how listed images are resized: "card" (224x224) or "eval" (shorter side 256,
                centre crop 224).
            check_range: refuse floats outside [0, 1] and NaN. Off, the values are taken as they
                come, such as the overshoot of a bicubic resize.

        Returns:
            `output_dtype` tensors on the engine's device: sparse (B, K, D); spatial (B, P, K), rows
            that sum to 1; dense (B, P, D); lowrank (B, P, D) = spatial @ sparse; cls (B, 1, D).

        Raises:
            TypeError, ValueError: `images` is something else; the message says what was found.
            ImageError: a listed image could not be decoded.
            ForkError: called in a forked child.
            StellarError: not even one image fits into memory.
        """
        self._check_process()
        wanted = resolve_outputs(outputs)
        batch, floats = self._batch(images, preset)
        if floats and check_range and batch.numel():
            check_pixel_range(batch)
        grid = self._grid(*batch.shape[2:])
        shapes = self._shapes(*grid)

        def encode_chunk(out: dict[str, Tensor], chunk: Tensor) -> None:
            table = self._table(grid)

            def forward(chunk: Tensor) -> dict[str, Tensor]:
                return encoder.encode(
                    self._ops, self._encoder, self.config, chunk, table, wanted, self.output_dtype
                )

            if self._graphs is None or not self._graphs.run(chunk, wanted, forward, out):
                _copy_out(forward(chunk.to(self.device)), out)

        with self._scope():
            out = {
                name: torch.empty(
                    (len(batch), *shapes[name]), dtype=self.output_dtype, device=self.device
                )
                for name in wanted
            }
            self._chunked(encode_chunk, (batch,), out, grid)
        return out

    @unaffected
    def reconstruct(
        self, features: Mapping[str, Tensor] | Tensor, spatial: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Images from features, through the decoder and the VQ tokenizer.

        Args:
            features: the dict that `encode` returned (`lowrank`, or `sparse` and `spatial`), or
                `sparse` (B, K, D).
            spatial: (B, P, K), with `sparse` given; P is a square number.

        Returns:
            reconstruction (B, 3, 16 h, 16 w) in [0, 1], tokens (B, P) int64, logits (B, P, 1024). A
            checkpoint with the pixel head gives `reconstruction` (B, 3, p h, p w) alone, as the
            head leaves it.

        Raises:
            TypeError: `features` is neither a mapping nor a tensor.
            ValueError: the engine was loaded without the decoder, or features are missing or of the
                wrong shape.
            ForkError: called in a forked child.
            StellarError: not even one image fits into memory.
        """
        self._check_process()
        if self._decoder is None:
            raise ValueError(
                f"this engine was loaded to encode; load({self.config.name!r}, "
                "purpose='reconstruct', vq_model=...)"
            )
        width, tokens = self.config.backbone.hidden_size, self.config.num_sparse_tokens
        parts = as_features(features, spatial, width, tokens)
        patches = parts[0].shape[1]
        check_patches(patches, self.max_patches, f"features of {patches} patches")
        side = decoder.square_grid(patches)
        weights = self._decoder
        dtype = weights.decoder_proj.bias.dtype

        def reconstruct_chunk(out: dict[str, Tensor], *chunk: Tensor) -> None:
            moved = [part.to(self.device) for part in chunk]
            lowrank = moved[0] if len(moved) == 1 else self._ops.reassemble(*moved)
            code = position_code(weights.fourier, side, side).to(dtype)
            _copy_out(
                decoder.reconstruct(self._ops, weights, self.config, lowrank.to(dtype), code), out
            )

        with self._scope():
            out = {
                name: torch.empty((len(parts[0]), *shape), dtype=kind, device=self.device)
                for name, (shape, kind) in self._reconstructed(side).items()
            }
            self._chunked(reconstruct_chunk, parts, out)
        return out

    @unaffected
    def calibrate(self, images: Any, *, preset: str = "card") -> Engine:
        """Sets the static scales of an fp8 engine by what `images` bring forth; returns the engine.

        Without it they come from bounds that no image can pass. No thread may be encoding
        meanwhile.

        Args:
            images: a batch as `encode` takes it, at least one image; a few dozen of the kind to
                come are enough.

        Raises:
            ValueError: the engine is not fp8, or there are no images.
        """
        self._check_process()
        if self.precision != "fp8":
            raise ValueError(f"only fp8 engines have static scales, this one is {self.precision}")
        batch, _ = self._batch(images, preset)
        if not len(batch):
            raise ValueError("calibrate needs at least one image, got an empty batch")
        table = self._table(self._grid(*batch.shape[2:]))

        def run(ops: Any, weights: EncoderWeights) -> None:
            for chunk in batch.split(self.max_batch):
                images = chunk.to(self.device)
                encoder.encode(ops, weights, self.config, images, table, OUTPUTS, torch.float32)

        with self._scope():
            weights = calibrated(self._ops, self._encoder, run)
        self._place(weights, self._decoder, self.device)
        return self

    @unaffected
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the packed weights, for `load(name, repo=folder)`; fp8 scales included.

        Args:
            folder: made if it is not there.

        Raises:
            StellarError: the folder cannot be written, or holds models already.
        """
        encode, decode = backends.restore(self._ops, (self._encoder, self._decoder))
        saving.save(Path(folder), self.config, self.precision, encode, decode)

    def eval(self) -> Engine:
        """This engine, always in evaluation mode; for code written for the published module."""
        return self

    @unaffected
    def to(self, device: str | torch.device) -> Engine:
        """Moves the weights, as a module's `to` does, and returns this engine.

        No thread may be encoding meanwhile.

        Raises:
            ValueError: no such device on this machine, or the backend cannot compute there.
        """
        target = resolve_device(device)
        if target != self.device:
            backends.resolve_backend(self.backend, target, self.precision)
            weights = backends.restore(self._ops, (self._encoder, self._decoder))
            encode, decode = map_nodes(weights, Tensor, lambda tensor: tensor.to(target))
            self._place(encode, decode, target)
        return self

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkError(
                "this Engine was made in the parent of a forked process and cannot be used in the "
                "child; start workers with 'spawn' or 'forkserver', or load the engine there"
            )

    def _scope(self) -> AbstractContextManager[Any]:
        """Plain float arithmetic without gradients, whatever the caller has switched on."""
        stack = ExitStack()
        # Tensors made in inference mode could never be trained on.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(self.device.type, enabled=False))
        if self.device.type == "cuda":
            stack.enter_context(torch.cuda.device(self.device))
        return stack

    def _batch(self, images: Any, preset: str) -> tuple[Tensor, bool]:
        return as_batch(images, preset, self.config.backbone.patch_size, self.max_patches)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        patch = self.config.backbone.patch_size
        return height // patch, width // patch

    def _table(self, grid: tuple[int, int]) -> Tensor:
        return self._tables.get(grid, lambda: self._encoder.table.table(*grid))

    def _shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        channels, tokens = self.config.backbone.hidden_size, self.config.num_sparse_tokens
        patches = rows * columns
        return {
            "sparse": (tokens, channels),
            "spatial": (patches, tokens),
            "dense": (patches, channels),
            "lowrank": (patches, channels),
            "cls": (1, channels),
        }

    def _reconstructed(self, side: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        assert self._decoder is not None
        if self._decoder.vqgan is None:
            size = side * self.config.backbone.patch_size
            return {"reconstruction": ((3, size, size), self.output_dtype)}
        codebook = self._decoder.vqgan.codebook.shape[0]
        size = side * 2 ** len(self._decoder.vqgan.upsample)
        return {
            "reconstruction": ((3, size, size), self.output_dtype),
            "tokens": ((side * side,), torch.int64),
            "logits": ((side * side, codebook), self.output_dtype),
        }

    def _chunked(
        self,
        function: Callable[..., None],
        inputs: tuple[Tensor, ...],
        out: dict[str, Tensor],
        grid: tuple[int, int] | None = None,
    ) -> None:
        """Has `function` fill `out` chunk by chunk of `inputs`. When memory runs out, the position
        tables of other grids than `grid` go first, then chunks are halved."""
        total, start, size = len(inputs[0]), 0, self.max_batch
        evicted = False
        while start < total:
            stop = min(start + size, total)
            try:
                function(
                    {name: tensor[start:stop] for name, tensor in out.items()},
                    *(tensor[start:stop] for tensor in inputs),
                )
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                if not evicted and self._tables.evict(grid):
                    evicted = True
                    continue
                if stop - start == 1:
                    raise StellarError(
                        f"not enough memory on {self.device} for one image of this size: {error}"
                    ) from error
                size = (stop - start) // 2
                continue
            start = stop
