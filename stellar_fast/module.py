"""What `load_stellar` returns: the published module, with an engine inside.

The parameters are those of `reference.STELLARModel`, and so are all of its methods. Where no
gradient can be wanted, `encode` and `reconstruct` run an engine instead, on weights packed from the
parameters when they are first needed. They are packed anew when a parameter is not what it was:
another tensor, or the same one elsewhere in memory, or changed in place. Autograd counts changes in
place, but not those made through `.data` or NumPy, so a few numbers of each parameter are compared
too. What an engine could not know of leaves the work to the reference: hooks, adapters and other
replaced parts, tracing, transforms of functions, dtypes and devices that it does not serve.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, count, repeat
from operator import attrgetter, contains, is_
from typing import Any

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .engine import backends
from .engine.engine import MAX_BATCH, MAX_PATCHES, Engine
from .engine.inputs import as_batch, check_range
from .precision import DTYPES
from .reference import STELLARModel
from .weights import names
from .weights.pack import pack_decoder, pack_encoder, pack_vqgan
from .weights.quantize import quantize_block

FEATURES = ("sparse", "spatial", "concat", "lowrank", "dense", "cls", "peak_dist")
# Numbers of each parameter that are compared: a change of a tenth of them goes unseen once in 800.
SAMPLED = 64
# Models by the number that a compiled graph knows them by.
_models: weakref.WeakValueDictionary[int, FastSTELLARModel] = weakref.WeakValueDictionary()
_numbers = count()
NATIVE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Part:
    """What an engine needs of a model, for one of its methods.

    Attributes:
        modules: names of modules whose parameters and children are packed.
        parameters: names of the model's own parameters.
        beside: names of modules among them that are not used.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


ENCODER = Part(
    ("encoder", "dense_proj", "sparse_proj"), ("sparse_tokens",), beside=("encoder.pooler",)
)
DECODER = Part(
    ("decoder", "decoder_proj", "position_embedding", "reconstruction_head", "tokenizer"),
    beside=("decoder.embeddings", "decoder.pooler", "tokenizer.encoder"),
)


class Packed:
    """The engines of a model, and what they were packed from. A copy of the model packs its own."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pid = os.getpid()
        self.engines: dict[Part, tuple[Snapshot, Engine]] = {}

    def __deepcopy__(self, memo: Any) -> Packed:
        return Packed()

    def __reduce__(self) -> tuple[type[Packed], tuple[()]]:
        return Packed, ()

    def after_fork(self) -> None:
        """An engine does not survive a fork, and a lock may have been held."""
        if self.pid != os.getpid():
            self.__init__()  # type: ignore[misc]


class Snapshot:
    """What a part of a model was when it was packed.

    Args:
        model: the model.
        part: what of it.
    """

    def __init__(self, model: FastSTELLARModel, part: Part) -> None:
        self.own: list[tuple[dict[str, Any], str]] = [
            *((model._modules, name) for name in part.modules),
            *((model._parameters, name) for name in part.parameters),
        ]
        modules = list(_modules_of(model, part))
        self.dicts: list[dict[str, Any]] = [
            holder
            for module in modules
            for holder in (module._parameters, module._modules, module._buffers)
            if holder
        ]
        self.hooks = [
            hooks
            for module in modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self.attributes = [vars(module) for module in modules]
        self.things = self._things()
        self.tensors = [thing for thing in self.things if isinstance(thing, Tensor)]
        self.types = [type(module) for module in modules]
        first = self.tensors[0]
        self.device, self.dtype = first.device, first.dtype
        self.settings = self._settings(model)
        self.versions: list[int] = []
        self.addresses: list[int] = []
        self.views: list[Tensor] = []
        self.sample = torch.empty(0)

    def _settings(self, model: FastSTELLARModel) -> tuple[Any, ...]:
        kind = self.device.type
        cast = torch.get_autocast_dtype(kind) if _autocasts(self.device) else None
        return model.precision, model.backend, model.spatial_temp, cast

    def _things(self) -> list[Any]:
        own = [holder.get(name) for holder, name in self.own]
        return [*own, *chain.from_iterable(map(dict.values, self.dicts))]

    def can_be_packed(self, types: list[type]) -> bool:
        """Whether an engine computes what the part does. `types`: of its modules as they are built.

        Called once; `is_current` sees to it that it stays so.
        """
        return (
            self.device.type in MAX_BATCH
            and self.dtype in NATIVE
            and self.types == types
            and all(
                type(tensor) in (Tensor, nn.Parameter)
                and tensor.device == self.device
                and tensor.dtype == self.dtype
                and tensor.layout == torch.strided
                and not tensor.is_inference()
                for tensor in self.tensors
            )
            and self.undisturbed()
        )

    def undisturbed(self) -> bool:
        """Whether the part's modules run their own forward and nothing else."""
        return not any(self.hooks) and not any(map(contains, self.attributes, repeat("forward")))

    def take(self) -> None:
        """Notes versions, addresses and values, before the tensors are packed."""
        self.versions = list(map(attrgetter("_version"), self.tensors))
        self.addresses = list(map(Tensor.data_ptr, self.tensors))
        with torch.inference_mode(False), torch.no_grad():
            self.views = [_few(tensor) for tensor in self.tensors]
            self.sample = torch.cat(self.views)

    def is_current(self, model: FastSTELLARModel) -> bool:
        """Whether nothing has changed that shows without looking at values."""
        things = self._things()
        return (
            self.settings == self._settings(model)
            and len(things) == len(self.things)
            and all(map(is_, things, self.things))
            and list(map(attrgetter("_version"), self.tensors)) == self.versions
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
            and self.undisturbed()
        )

    def compare_values(self) -> Callable[[], bool]:
        """Starts to compare the sampled values: a function that says whether any has changed.

        On a GPU the comparison is queued before what is asked for next, and waited for after it, so
        that the GPU is never without work.
        """
        sample, cuda = self.sample, self.device.type == "cuda"
        if cuda and torch.cuda.is_current_stream_capturing():
            return lambda: False
        with torch.inference_mode(False), torch.no_grad():
            now = torch.cat(self.views)
            if not cuda:
                return lambda: not torch.equal(_bits(now), _bits(sample))
            same = (_bits(now) == _bits(sample)).all().to("cpu", non_blocking=True)
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.device))

        def changed() -> bool:
            done.synchronize()
            return not same.item()

        return changed


def _autocasts(device: torch.device) -> bool:
    return device.type in MAX_BATCH and torch.is_autocast_enabled(device.type)


def _modules_of(model: nn.Module, part: Part) -> Iterator[nn.Module]:
    beside = {id(model.get_submodule(name)) for name in part.beside if _has(model, name)}

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if id(module) not in beside:
            yield module
            for child in module.children():
                yield from walk(child)

    for name in part.modules:
        module = model._modules.get(name)
        if module is not None:
            yield from walk(module)


def _has(model: nn.Module, name: str) -> bool:
    try:
        return model.get_submodule(name) is not None
    except AttributeError:
        return False


def _few(tensor: Tensor) -> Tensor:
    """A view of `SAMPLED` numbers spread over the memory of a dense tensor.

    The step is odd and no part of its size, so that they lie in many rows and in many columns.
    """
    count = min(tensor.numel(), SAMPLED)
    step = tensor.numel() // SAMPLED * 31 // 32 | 1
    return tensor.detach().as_strided((count,), (step,), tensor.storage_offset())


def _bits(values: Tensor) -> Tensor:
    """Equal where the values are, NaN too."""
    return values.view(torch.uint8)


class FastSTELLARModel(STELLARModel):
    """`reference.STELLARModel` whose `encode` and `reconstruct` run an engine where they can.

    Args:
        arguments, keywords: as `reference.STELLARModel` takes them.
        precision: that engines compute in while the parameters are float32; parameters of another
            dtype, and autocast, choose their own.
        backend: of the engines, as `load` takes it.

    Attributes:
        precision, backend: may be set.
    """

    def __init__(
        self, *arguments: Any, precision: str = "fp32", backend: str = "auto", **keywords: Any
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.precision, self.backend = precision, backend
        self._types = {part: [type(m) for m in _modules_of(self, part)] for part in _PARTS}
        self._start()

    def _start(self) -> None:
        self._packed = Packed()
        self._number = next(_numbers)
        _models[self._number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()

    def _apply(self, fn: Any, recurse: bool = True) -> FastSTELLARModel:
        # What is about to move or to be cast is not kept in memory beside what it becomes.
        self._packed.after_fork()
        with self._packed.lock:
            self._packed.engines.clear()
        return super()._apply(fn, recurse)

    def encode(self, images: Any) -> dict[str, Tensor]:
        """Features of a batch of images.

        Args:
            images: a batch as `Engine.encode` takes it, or a mapping that holds one as "image".

        Returns:
            sparse (B, K, D), spatial (B, P, K), concat (B, K, D + P), lowrank (B, P, D),
            dense (B, P, D), cls (B, 1, D), peak_dist (B, K), in the parameters' dtype, on their
            device. Where gradients are on and a parameter that is used or the images require
            one, all but peak_dist have a gradient.

        Raises:
            TypeError, ValueError: `images` is something else; the message says what was found.
            ImageError: a listed image could not be decoded.
        """
        if torch.compiler.is_compiling():
            return self._encode_compiled(images)
        patch = self.config.backbone.patch_size
        batch, floats = as_batch(images, "card", patch, MAX_PATCHES)
        if floats and batch.numel() and not self._is_transformed((batch,)):
            check_range(batch)
        found = self._run(
            ENCODER,
            (batch,),
            lambda engine: engine.encode(batch, outputs=FEATURES, check_range=False),
        )
        if found is None:
            return self.features(self._pixels(batch))
        return {name: found[name] for name in FEATURES}

    def reconstruct(
        self, sparse: Mapping[str, Tensor | None] | Tensor, spatial: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Images from features, as `STELLARModel.reconstruct`: by an engine where no gradient of
        the features or of the decoder can be wanted."""
        given = sparse if isinstance(sparse, Mapping) else {"sparse": sparse, "spatial": spatial}
        features = {
            name: value
            for name, value in given.items()
            if name in ("lowrank", "sparse", "spatial") and isinstance(value, Tensor)
        }
        found = None
        if self.do_recon and not torch.compiler.is_compiling():
            found = self._run(
                DECODER, tuple(features.values()), lambda engine: engine.reconstruct(features)
            )
        if found is None:
            return super().reconstruct(sparse, spatial)
        return found if self.tokenizer is not None else found | {"logits": found["reconstruction"]}

    def _pixels(self, batch: Tensor) -> Tensor:
        """A batch of any form as the reference takes it."""
        batch = batch.to(self.sparse_tokens.device)
        return batch if batch.is_floating_point() else batch.to(self.sparse_tokens.dtype) / 255

    def _encode_compiled(self, images: Any) -> dict[str, Tensor]:
        batch = images["image"] if isinstance(images, Mapping) else images
        if torch.compiler.is_exporting() or self._wants_gradient(ENCODER, (batch,)):
            return self.features(self._pixels(batch))
        return dict(zip(FEATURES, torch.ops.stellar_fast.encode(batch, self._number), strict=True))

    def _wants_gradient(
        self, part: Part, inputs: tuple[Tensor, ...], snapshot: Snapshot | None = None
    ) -> bool:
        """`snapshot`: of the part as it is, which spares looking for its parameters."""
        if not torch.is_grad_enabled():
            return False
        if snapshot is not None:
            return any(map(attrgetter("requires_grad"), chain(inputs, snapshot.tensors)))
        own = [self._parameters.get(name) for name in part.parameters]
        held = (module.parameters(recurse=False) for module in _modules_of(self, part))
        return any(
            tensor is not None and tensor.requires_grad
            for tensor in chain(inputs, own, chain.from_iterable(held))
        )

    def _run(
        self,
        part: Part,
        inputs: tuple[Tensor, ...],
        function: Callable[[Engine], dict[str, Tensor]],
    ) -> dict[str, Tensor] | None:
        """`function` of an engine of the part as it is now; None where the reference has to run."""
        if self._is_transformed(inputs):
            return None
        packed = self._packed
        packed.after_fork()
        for _ in range(2):
            with packed.lock:
                held = packed.engines.get(part)
                if held is not None and not held[0].is_current(self):
                    held = None
                if self._wants_gradient(part, inputs, None if held is None else held[0]):
                    return None
                if held is None:
                    held = self._pack_anew(part)
            if held is None:
                return None
            snapshot, engine = held
            changed = snapshot.compare_values()
            found = function(engine)
            if not changed():
                return found
            del held, snapshot, engine  # before there is another one
            with packed.lock:
                packed.engines.pop(part, None)
        return None  # somebody writes into the parameters all the while

    def _is_transformed(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether more is done here than to compute values: tracing, transforms, global hooks."""
        return (
            getattr(self, "_is_replica", False)
            or torch.jit.is_tracing()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch.autograd.forward_ad._current_level >= 0
            or torch.nn.modules.module._has_any_global_hook()
            or not all(_has_values(tensor) for tensor in inputs)
        )

    def _pack_anew(self, part: Part) -> tuple[Snapshot, Engine] | None:
        """An engine of `part` as it is now; None where none computes what the part does."""
        self._packed.engines.pop(part, None)  # before there is another one
        snapshot = Snapshot(self, part)
        shapes = self._shapes(part)
        state = dict(self.named_parameters()) | dict(self.named_buffers())
        if not snapshot.can_be_packed(self._types[part]) or any(
            name not in state or tuple(state[name].shape) != shape for name, shape in shapes.items()
        ):
            return None
        snapshot.take()
        with torch.inference_mode(False), torch.no_grad():
            weights = {name: state[name].detach() for name in shapes}
            engine = self._pack(part, weights, snapshot)
        self._packed.engines[part] = snapshot, engine
        return snapshot, engine

    def _precision(self, device: torch.device, dtype: torch.dtype) -> str:
        """What an engine of parameters of a dtype computes in."""
        if dtype != torch.float32:
            return NATIVE[dtype]
        if self.precision == "fp32" and _autocasts(device):
            return NATIVE[torch.get_autocast_dtype(device.type)]
        return backends.choose(self.backend, self.precision, device, self.config)[1]

    def _shapes(self, part: Part) -> names.Shapes:
        if part is ENCODER:
            return names.encode_shapes(self.config)
        shapes = names.reconstruct_shapes(self.config, pixel_head=self.tokenizer is None)
        if self.tokenizer is not None:
            decoder = names.vqgan_decoder_shapes()
            shapes |= {f"tokenizer.{name}": shape for name, shape in decoder.items()}
        return shapes

    def _pack(self, part: Part, weights: dict[str, Tensor], snapshot: Snapshot) -> Engine:
        device, precision = snapshot.device, self._precision(snapshot.device, snapshot.dtype)
        dtype = DTYPES[precision]
        config: ModelConfig = replace(self.config, spatial_temp=self.spatial_temp)
        encoder = decoder = None
        if part is ENCODER:
            quantize = quantize_block if precision == "fp8" else None
            encoder = pack_encoder(weights, config, dtype, device, quantize=quantize)
        else:
            vqgan = None
            if self.tokenizer is not None:
                prefix = "tokenizer."
                own = {
                    name.removeprefix(prefix): value
                    for name, value in weights.items()
                    if name.startswith(prefix)
                }
                vqgan = pack_vqgan(own, dtype, device)
            decoder = pack_decoder(weights, config, vqgan, dtype, device)
        return Engine(
            config,
            encoder,
            decoder,
            device=device,
            precision=precision,
            output_dtype=snapshot.dtype,
            max_batch=MAX_BATCH[device.type],
            weights="the module's parameters",
            backend=backends.choose(self.backend, precision, device, self.config)[0],
            cuda_graphs=True,
        )


_PARTS = (ENCODER, DECODER)


def _has_values(tensor: Tensor) -> bool:
    """Whether it is a plain tensor that can be read."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"


# An op of its own in compiled graphs, which are whole with it.
@torch.library.custom_op("stellar_fast::encode", mutates_args=())
def _encode_op(images: Tensor, model: int) -> list[Tensor]:
    with torch.no_grad():
        found = _models[model].encode(images)
    # The reference gives views of one tensor, which an op must not.
    return [value if value._base is None else value.clone() for value in found.values()]


@_encode_op.register_fake
def _shapes_of_encode(images: Tensor, model: int) -> list[Tensor]:
    config, like = _models[model].config, _models[model].sparse_tokens
    batch, _, height, width = images.shape
    patch, tokens = config.backbone.patch_size, config.num_sparse_tokens
    channels = config.backbone.hidden_size
    patches = (height // patch) * (width // patch)
    shapes = {
        "sparse": (tokens, channels),
        "spatial": (patches, tokens),
        "concat": (tokens, channels + patches),
        "lowrank": (patches, channels),
        "dense": (patches, channels),
        "cls": (1, channels),
        "peak_dist": (tokens,),
    }
    return [images.new_empty((batch, *shapes[name]), dtype=like.dtype) for name in FEATURES]
