"""The engine: a loaded model, ready for many threads, that owns no memory its callers see."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..engine.backends import resolve_device
from ..errors import ForkError, StellarError
from ..weights import saving
from ..weights.int8 import is_quantized
from ..weights.packed import DecoderWeights, EncoderWeights, map_nodes, position_code
from ..weights.quantize import calibrated
from . import backends, decoder, encoder, namespaces, openvino_forwards
from .caching import ByteCache
from .calibration import int8_of
from .callers import unaffected
from .encoder import DERIVED, OUTPUTS
from .fidelity import Fidelity, compare
from .graphs import CudaRecorder, GraphRunner
from .inputs import as_batch, as_features, check_patches
from .inputs import check_range as check_pixel_range

# Images computed at once. On two CPU cores B/16 ran fastest at 8 and 16, 5 % slower at 32, whose
# activations outgrow the caches. The GPU's number bounds memory and is not tuned yet.
MAX_BATCH = {"cpu": 16, "cuda": 256}
# Patches of an image. Attention takes time by their square: on a processor's two cores, minutes for
# this many, which is an image of 4096x4096 at patch 16.
MAX_PATCHES = 65_536
# What PyTorch and OpenVINO say on a CPU; the driver, Triton and cuBLAS on a GPU.
OUT_OF_MEMORY = (
    "can't allocate memory", "not enough memory", "bad_alloc", "failed to allocate",
    "out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip
TABLE_BYTES = 256 << 20  # of position tables kept, one for each image size
GRAPH_SHARE = 8  # of the device's memory, the part that inputs and outputs of CUDA graphs may take


def resolve_outputs(outputs: Collection[str] | None) -> tuple[str, ...]:
    """Feature names in the order of `OUTPUTS`, then of `DERIVED`; None is all of the first.

    Raises:
        ValueError: an unknown name, or none at all.
    """
    if outputs is None:
        return OUTPUTS
    wanted = {outputs} if isinstance(outputs, str) else set(outputs)
    known = (*OUTPUTS, *DERIVED)
    unknown = sorted(map(str, wanted - set(known)))
    if unknown or not wanted:
        raise ValueError(
            f"outputs must name some of {', '.join(known)}; got {', '.join(unknown) or 'none'}"
        )
    return tuple(name for name in known if name in wanted)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed.

    On the CPU, in the driver and in Triton's launcher that is a plain RuntimeError, told by its
    text.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return any(said in text for said in OUT_OF_MEMORY)


Out = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # of one image


def _kind(names: tuple[str, ...], inputs: tuple[Tensor, ...]) -> tuple:
    """What makes one batch take the memory of another, their numbers of images aside."""
    return names, *(tensor.shape[1:] for tensor in inputs)


def _copy_out(features: Out, out: Out | None, dtypes: Mapping[str, torch.dtype]) -> Out:
    """`features` in `out`, which by default is memory of their own for each of `dtypes`."""
    if out is None:
        return {
            name: features[name].to(dtype, copy=True, memory_format=torch.contiguous_format)
            for name, dtype in dtypes.items()
        }
    for name, tensor in out.items():
        tensor.copy_(features[name])
    return out


class Engine:
    """A STELLAR model for inference. Made by `stellar_fast.load`.

    Safe to call from many threads. Outputs are new tensors that the caller owns, without gradients,
    on the engine's device. A process forked after the engine was made cannot use it.

    Attributes:
        config: geometry of the model.
        device: where it computes.
        precision: "fp32", "bf16", "fp16", "fp8" or "int8".
        backend: "triton", "openvino" or "torch".
        output_dtype: dtype of every float output.
        max_batch: images computed at once; larger batches are cut into chunks.
        max_patches: patches of an image; larger images are refused.
        cuda_graphs: whether forwards of the Triton backend run as CUDA graphs.
        weights: where the weights came from, a path or "synthetic".
    """

    def __init__(
        self,
        config: ModelConfig,
        encoder_weights: EncoderWeights | None,
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
        self._load_exact: Callable[..., Engine] | None = None
        self._ops = namespaces.ops_of(backend)
        self._place(encoder_weights, decoder_weights, device)
        self._pid = os.getpid()

    def _place(
        self,
        encoder_weights: EncoderWeights | None,
        decoder_weights: DecoderWeights | None,
        device: torch.device,
    ) -> None:
        """Takes weights that are on `device`."""
        rows = namespaces.typical_rows(self.config, self.max_batch)
        self.device = device
        self._encoder_or_none: EncoderWeights | None = namespaces.prepare(
            self.backend, encoder_weights, rows
        )
        self._decoder: DecoderWeights | None = namespaces.prepare(
            self.backend, decoder_weights, rows
        )
        self._tables: ByteCache[tuple[int, int], Tensor] = ByteCache(
            TABLE_BYTES, lambda table: table.nbytes
        )
        # Images of a shape that were computed at once where memory had run out before.
        self._fitting: dict[tuple, int] = {}
        self._runner = backends.runner_of(self.backend, self.precision, self.config)
        self._graphs: GraphRunner | None = None
        if self.cuda_graphs and self.backend == "triton" and device.type == "cuda":
            with torch.cuda.device(device):
                recorder = CudaRecorder(device)
            most = torch.cuda.get_device_properties(device).total_memory // GRAPH_SHARE
            self._graphs = GraphRunner(
                recorder, self.max_batch, self.output_dtype, _is_out_of_memory, most
            )

    @property
    def _encoder(self) -> EncoderWeights:
        if self._encoder_or_none is None:
            raise ValueError("this engine was made to reconstruct alone")
        return self._encoder_or_none

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
                paths; or a mapping that holds one of these as "image". H and W are at least one
                patch, and `max_patches` together; rows and columns beyond a whole patch are
                dropped. B may be 0.
            outputs: the features wanted, of sparse, spatial, dense, lowrank, cls, which are given
                by default, and of concat and peak_dist. Only what they need is computed.
            preset: how listed images are resized: "card" (224x224) or "eval" (shorter side 256,
                centre crop 224).
            check_range: refuse NaN and floats further from [0, 1] than the overshoot of a bicubic
                resize. Off, the values are taken as they come.

        Returns:
            `output_dtype` tensors on the engine's device: sparse (B, K, D); spatial (B, P, K), rows
            that sum to 1; dense (B, P, D); lowrank (B, P, D) = spatial @ sparse; cls (B, 1, D);
            concat (B, K, D + P), each sparse token beside its map; peak_dist (B, K), the largest
            value of each map.

        Raises:
            TypeError, ValueError: `images` is something else; the message says what was found.
            ImageError: a listed image could not be decoded.
            ValueError: an int8 engine that was not calibrated.
            ForkError: called in a forked child.
            StellarError: not even one image fits into memory.
        """
        self._check_process()
        self._check_calibrated()
        wanted = resolve_outputs(outputs)
        batch, floats = self._batch(images, preset)
        if floats and check_range and batch.numel():
            check_pixel_range(batch)
        with self._scope():
            found = self._chunked(
                lambda out, chunk: self._encode_chunk(chunk, wanted, out),
                (batch,),
                wanted,
                lambda: self._features(wanted, self._grid(*batch.shape[2:])),
            )
        return dict(found)

    def _encode_chunk(
        self, images: Tensor, wanted: tuple[str, ...], out: Out | None = None, warm: bool = False
    ) -> Out:
        """Features of at most `max_batch` images; `warm`: by every way that later calls take."""

        def prepare() -> Callable[[Tensor], dict[str, Tensor]]:
            table = self._table(self._grid(*images.shape[2:]))

            def forward(images: Tensor) -> dict[str, Tensor]:
                return encoder.encode(
                    self._ops, self._encoder, self.config, images, table, wanted, self.output_dtype
                )

            return forward

        if self._runner is not None:
            grid = self._grid(*images.shape[2:])
            if out is None:
                out = self._empty(len(images), self._features(wanted, grid))
            openvino_forwards.encode(
                self._runner, self._ops, self._encoder, self.config, images, self._table(grid),
                self._shapes(*grid), out,
            )  # fmt: skip
            return out
        # Before the wait for the graph's turn; strides are kept, and the device reorders pixels.
        images = images.to(self.device)
        if self._graphs is not None:
            found = self._graphs.run(images, wanted, prepare, out, at_once=warm)
            if found is not None and not warm:
                return found
        return _copy_out(prepare()(images), out, dict.fromkeys(wanted, self.output_dtype))

    def warm_up(
        self,
        batches: Collection[int] = (1,),
        sizes: Collection[tuple[int, int]] = ((224, 224),),
        *,
        dtype: torch.dtype = torch.uint8,
        outputs: Collection[str] | None = None,
    ) -> Engine:
        """Pays in advance what the first batches would: compiled kernels, CUDA graphs, tables.

        Each batch is also launched kernel by kernel, for a caller who captures `encode` in a graph
        of his own.

        Args:
            batches: numbers of images, at least 1; above `max_batch` they are computed in chunks.
            sizes: (height, width) of the images.
            dtype: of the pixels to come.
            outputs: as `encode` will be asked for; all by default.

        Returns:
            The engine.

        Raises:
            ValueError: a batch below 1, or images that `encode` would refuse.
            ForkError: called in a forked child.
            StellarError: not even one image fits into memory.
        """
        self._check_process()
        wanted = resolve_outputs(outputs)
        if min(batches, default=1) < 1:
            raise ValueError(f"batches must be at least 1, got {min(batches)}")
        for height, width in sizes:
            for batch in sorted({min(batch, self.max_batch) for batch in batches}):
                images = torch.zeros((batch, 3, height, width), dtype=dtype, device=self.device)
                images, _ = self._batch(images, "card")
                with self._scope():
                    self._chunked(
                        lambda _, chunk: self._encode_chunk(chunk, wanted, warm=True),
                        (images,),
                        (),
                        dict,
                    )
        return self

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

        def reconstruct_chunk(out: Out | None, *chunk: Tensor) -> Out:
            if self._runner is not None:
                out = self._empty(len(chunk[0]), shapes) if out is None else out
                openvino_forwards.reconstruct(
                    self._runner, self._ops, weights, self.config, chunk, side, out
                )
                return out
            code = position_code(weights.fourier, side, side).unflatten(0, (side, side)).to(dtype)
            features = [part.to(self.device) for part in chunk]
            lowrank = features[0] if len(features) == 1 else self._ops.reassemble(*features)
            found = decoder.reconstruct(self._ops, weights, self.config, lowrank.to(dtype), code)
            return _copy_out(found, out, {name: kind for name, (_, kind) in shapes.items()})

        shapes = self._reconstructed(side)
        with self._scope():
            return dict(self._chunked(reconstruct_chunk, parts, tuple(shapes), lambda: shapes))

    @unaffected
    def calibrate(self, images: Any, *, preset: str = "card") -> Engine:
        """Sets the static scales of an fp8 or int8 engine by what `images` bring forth; returns the
        engine.

        Without it those of fp8 come from bounds that no image can pass, and int8 cannot encode.
        int8 is calibrated once: its float weights are gone then. No thread may be encoding
        meanwhile.

        Args:
            images: a batch as `encode` takes it, at least one image; a few dozen of the kind to
                come are enough.

        Raises:
            ValueError: the engine is neither, or was calibrated to int8 already, or there are no
                images.
        """
        self._check_process()
        if self.precision not in ("fp8", "int8"):
            raise ValueError(
                f"only fp8 and int8 engines have static scales, this one is {self.precision}"
            )
        if self.precision == "int8" and self.calibrated:
            raise ValueError("this int8 engine is calibrated already; load it anew to do it again")
        batch, _ = self._batch(images, preset)
        if not len(batch):
            raise ValueError("calibrate needs at least one image, got an empty batch")
        table = self._table(self._grid(*batch.shape[2:]))
        if self.precision == "int8":
            with self._scope():
                chunks = [chunk.to(self.device) for chunk in batch.split(self.max_batch)]
                weights = int8_of(self._encoder, self.config, chunks, table)
            self._place(weights, self._decoder, self.device)
            return self

        def run(ops: Any, weights: EncoderWeights) -> None:
            for chunk in batch.split(self.max_batch):
                images = chunk.to(self.device)
                encoder.encode(ops, weights, self.config, images, table, OUTPUTS, torch.float32)

        with self._scope():
            weights = calibrated(self._ops, self._encoder, run)
        self._place(weights, self._decoder, self.device)
        return self

    @unaffected
    def fidelity(
        self,
        images: Any,
        *,
        preset: str = "card",
        reference: Engine | None = None,
        intended: Any = None,
    ) -> Fidelity:
        """How far each output is from float32, on the images given: whether this precision serves.

        Args:
            images: a batch as `encode` takes it, at least one image. Judge int8 and fp8 by others
                than those of `calibrate`.
            reference: an fp32 engine of the same weights; left out, it is loaded as this one was.
            intended: the same images as the reference shall see them, where this engine is given
                others, such as those of a scaled decode.

        Raises:
            ValueError: no images, another number of them in `intended`, or it is not known where
                float32 weights are.
        """
        batch, floats = self._batch(images, preset)
        if not len(batch):
            raise ValueError("fidelity needs at least one image, got an empty batch")
        if reference is None:
            if self._load_exact is None:
                raise ValueError("this engine was not made by load: give an fp32 one as reference")
            reference = self._load_exact(device=self.device, max_batch=self.max_batch)
        right, others = (batch, floats) if intended is None else self._batch(intended, preset)
        if len(right) != len(batch):
            raise ValueError(f"{len(batch)} images, but {len(right)} intended ones")
        ours, theirs = (
            partial(engine.encode, check_range=floating and preset != "eval")
            for engine, floating in ((self, floats), (reference, others))
        )
        chunks = (pixels.split(self.max_batch) for pixels in (batch, right))
        pairs = ((ours(found), theirs(exact)) for found, exact in zip(*chunks, strict=True))
        return compare(pairs, self.precision, self.backend)

    @property
    def calibrated(self) -> bool:
        """Whether the engine can encode as it is: all but int8 ones can before `calibrate`."""
        return self.precision != "int8" or is_quantized(self._encoder)

    def _check_calibrated(self) -> None:
        if not self.calibrated:
            raise ValueError(
                "an int8 engine needs the range of its activations first: call "
                "engine.calibrate(images) with a few dozen images of the kind to come, or load "
                "one that was saved calibrated"
            )

    @unaffected
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the packed weights, with their scales, for `load(name, repo=folder)`.

        Args:
            folder: made if it is not there.

        Raises:
            StellarError: the folder cannot be written, or holds models already.
            ValueError: an int8 engine that was not calibrated.
        """
        self._check_calibrated()
        encode, decode = namespaces.restore(self.backend, (self._encoder, self._decoder))
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
            weights = namespaces.restore(self.backend, (self._encoder_or_none, self._decoder))
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
        kind = self.device.type
        plain = not (torch.is_inference_mode_enabled() or torch.is_autocast_enabled(kind))
        if plain and (kind != "cuda" or torch.cuda.current_device() == self.device.index):
            return torch.no_grad()  # some microseconds less than the contexts, as most calls are
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

    def _features(self, wanted: tuple[str, ...], grid: tuple[int, int]) -> Shapes:
        shapes = self._shapes(*grid)
        return {name: (shapes[name], self.output_dtype) for name in wanted}

    def _shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        channels, tokens = self.config.backbone.hidden_size, self.config.num_sparse_tokens
        patches = rows * columns
        return {
            "sparse": (tokens, channels),
            "spatial": (patches, tokens),
            "dense": (patches, channels),
            "lowrank": (patches, channels),
            "cls": (1, channels),
            "concat": (tokens, channels + patches),
            "peak_dist": (tokens,),
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
        function: Callable[..., Out],
        inputs: tuple[Tensor, ...],
        names: tuple[str, ...],
        shapes: Callable[[], Shapes],
    ) -> Out:
        """What `function` makes of `inputs`, chunk by chunk: `names`, whose `shapes` are those of
        one image.

        One chunk is left where `function` puts it; several are written into memory of one piece.
        """
        total, start = inputs[0].shape[0], 0
        size = self.max_batch
        if self._fitting:
            size = self._fitting.get(_kind(names, inputs), size)
        out: Out | None = None
        gave_up = False
        while True:
            if out is None and not 0 < total <= size:
                out = self._empty(total, shapes())
            if out is not None and start == total:
                return out
            stop = min(start + size, total)
            try:
                if out is None:
                    return function(None, *inputs)
                views = {name: tensor[start:stop] for name, tensor in out.items()}
                function(views, *(tensor[start:stop] for tensor in inputs))
                start = stop
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                if not gave_up:
                    gave_up = True
                    if self._give_up_memory():
                        continue
                if stop - start == 1:
                    raise StellarError(
                        f"not enough memory on {self.device} for one image of this size: {error}"
                    ) from error
                # For good: every later batch would run out anew.
                size = self._fitting[_kind(names, inputs)] = (stop - start) // 2

    def _empty(self, count: int, outputs: Shapes) -> dict[str, Tensor]:
        return {
            name: torch.empty((count, *shape), dtype=dtype, device=self.device)
            for name, (shape, dtype) in outputs.items()
        }

    def _give_up_memory(self) -> bool:
        """Lets graphs and position tables go; whether there were any."""
        graphs = self._graphs is not None and self._graphs.clear()
        return self._tables.evict() or graphs
