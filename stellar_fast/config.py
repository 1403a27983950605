"""Model geometry: the three ViT backbones, the five published models, and what follows."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields

# ImageNet RGB statistics on [0, 1] pixels, applied inside the model.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
LAYER_NORM_EPS = 1e-12  # the ViT-MAE backbones' value, for encoder and decoder alike
NORMALIZE_EPS = 1e-7  # floor of the l2 norm before the spatial-map logits
CODEBOOK_SIZE = 1024  # codes of the MaskGIT-VQGAN tokenizer
CODE_DIM = 256  # channels of a code

# A geometry comes from files of strangers. Each number may be ten times that of the largest
# published model, and so may all parameters of the backbone together.
LARGEST = {
    "hidden_size": 12_800,
    "num_hidden_layers": 320,
    "num_attention_heads": 160,
    "intermediate_size": 51_200,
    "patch_size": 160,
    "image_size": 2_240,
    "num_sparse_tokens": 240,
    "num_decoder_layers": 60,
}
MOST_PARAMETERS = 6_400_000_000
TEMPERATURES = (1e-4, 1e4)


def _check_number(owner: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{owner} {name} must be a positive integer, got {reprlib.repr(value)}")
    if value > LARGEST[name]:
        raise ValueError(
            f"{owner} {name} must be at most {LARGEST[name]}, got {reprlib.repr(value)}"
        )


@dataclass(frozen=True)
class BackboneConfig:
    """Geometry of one ViT. Lengths are in channels, sizes in pixels.

    Raises:
        ValueError: a field is not a positive integer, beyond what is plausible (`LARGEST`,
            `MOST_PARAMETERS`), or the fields contradict one another.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    patch_size: int
    image_size: int = 224

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_number("backbone", field.name, getattr(self, field.name))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"backbone hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.image_size < self.patch_size:
            raise ValueError(
                f"backbone image_size {self.image_size} is smaller than one patch of "
                f"{self.patch_size}"
            )
        if self.parameters > MOST_PARAMETERS:
            raise ValueError(
                f"a backbone of {self.parameters} parameters, at most {MOST_PARAMETERS} are taken"
            )

    @property
    def parameters(self) -> int:
        """Weights of its matrices and its position table."""
        width = self.hidden_size
        layer = 4 * width + 2 * self.intermediate_size
        embeddings = self.num_patches + 3 * self.patch_size**2
        return width * (self.num_hidden_layers * layer + embeddings)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def grid(self) -> int:
        """Patches a side at `image_size`: the side of the position table."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid * self.grid

    @classmethod
    def resolve(cls, backbone: str | Mapping[str, object] | BackboneConfig) -> BackboneConfig:
        """A backbone from its published name or from a mapping of this class's fields.

        Raises:
            ValueError: unknown name, unknown or missing field.
        """
        if isinstance(backbone, cls):
            return backbone
        if isinstance(backbone, str):
            if backbone not in BACKBONES:
                raise ValueError(
                    f"unknown backbone {reprlib.repr(backbone)}; known: {', '.join(BACKBONES)}, or "
                    "give its fields as an object"
                )
            return BACKBONES[backbone]
        if not isinstance(backbone, Mapping):
            raise ValueError(
                f"backbone must be a name or an object of fields, got {type(backbone).__name__}"
            )
        known = {field.name for field in fields(cls)}
        unknown, missing = set(backbone) - known, known - {"image_size"} - set(backbone)
        if unknown or missing:
            raise ValueError(
                f"backbone object: unknown fields {reprlib.repr(sorted(unknown))}, missing fields "
                f"{sorted(missing)}"
            )
        return cls(**backbone)  # type: ignore[arg-type]


# Layers and heads of the backbones by their width, which is all that newer files name of them.
DEPTHS = {768: (12, 12), 1024: (24, 16), 1280: (32, 16)}
BACKBONES = {
    "facebook/vit-mae-base": BackboneConfig(768, 12, 12, 3072, 16),
    "facebook/vit-mae-large": BackboneConfig(1024, 24, 16, 4096, 16),
    "facebook/vit-mae-huge": BackboneConfig(1280, 32, 16, 5120, 14),
}


@dataclass(frozen=True)
class ModelConfig:
    """One STELLAR model: a backbone, K sparse tokens, and the reconstruction decoder's depth.

    Raises:
        ValueError: a field is out of range.
    """

    name: str
    backbone: BackboneConfig
    num_sparse_tokens: int = 16
    num_decoder_layers: int = 6
    spatial_temp: float | None = 0.06
    weights: str = ""

    def __post_init__(self) -> None:
        for name in ("num_sparse_tokens", "num_decoder_layers"):
            _check_number(f"{self.name}:", name, getattr(self, name))
        low, high = TEMPERATURES
        if self.spatial_temp is not None and not low <= self.spatial_temp <= high:
            raise ValueError(
                f"{self.name}: spatial_temp must be positive, from {low} to {high}, or null, got "
                f"{reprlib.repr(self.spatial_temp)}"
            )

    @property
    def decoder(self) -> BackboneConfig:
        """The ViT of the reconstruction decoder, whose depth alone a checkpoint may choose."""
        return BackboneConfig(512, self.num_decoder_layers, 8, 2048, 16)

    @property
    def sequence_length(self) -> int:
        """Tokens an image at the backbone's own image size: CLS, patches, sparse tokens."""
        return 1 + self.backbone.num_patches + self.num_sparse_tokens


def _published(name: str, backbone: str, tokens: int) -> ModelConfig:
    return ModelConfig(
        name, BACKBONES[backbone], num_sparse_tokens=tokens, weights=f"{name}.safetensors"
    )


MODELS = {
    config.name: config
    for config in (
        _published("stellar-b16", "facebook/vit-mae-base", 16),
        _published("stellar-l16", "facebook/vit-mae-large", 16),
        _published("stellar-h16", "facebook/vit-mae-huge", 16),
        _published("stellar-b8", "facebook/vit-mae-base", 8),
        _published("stellar-b24", "facebook/vit-mae-base", 24),
    )
}
