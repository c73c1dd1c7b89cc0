"""How much disk and memory a variant takes, computed from its dimensions."""

from __future__ import annotations

from dataclasses import dataclass

from handler.registry import Variant

CARDINALITY, FRAME_RATE = 2048, 50
CODEC_BYTES = 236_001_935  # float32, on the disk and in memory
# Bytes on the disk, and parameters in memory (of T5 the encoder alone), all of them float32 there.
AUXILIARIES = {
    "t5-base": (893_800_000, 109_628_544),
    "t5-large": (2_953_000_000, 334_939_648),
    "encodec_32khz": (CODEC_BYTES, 0),  # counted as the codec
    "htdemucs": (84_025_440, 41_984_456),
    "MERT-v1-95M": (377_600_000, 94_371_712),
}
T5_DIMS = {"t5-base": 768, "t5-large": 1024}
STYLE_DIM, STYLE_LAYERS, STYLE_CODEBOOKS, STYLE_BINS = 512, 8, 6, 1024

# One request: the model's own window with guidance, which takes two rows, and the longest conditions in front of it.
ROWS, PROMPT_TOKENS, MELODY_FRAMES, STYLE_FRAMES = 2, 512, 235, 512


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes: of an archive, and in memory on a GPU (float16) and on a CPU (float32, its weights kept in float16), where
    the model, its auxiliary models and the keys and values of one request are counted."""

    disk: int
    gpu: int
    cpu: int


def sizes_of(variant: Variant) -> Sizes:
    """The sizes of a variant; PyTorch itself and the activations (some hundred MB) come on top."""
    parameters = lm_parameters(variant)
    auxiliaries = [AUXILIARIES[name] for name in variant.auxiliaries]
    checkpoint = variant.checkpoint_bytes or 2 * parameters + CODEC_BYTES
    beside = CODEC_BYTES + sum(4 * loaded for _, loaded in auxiliaries)
    cache = cache_values(variant)
    # Embeddings are looked up, not multiplied, and so are float32 on a CPU.
    cpu = 2 * parameters + 2 * embedding_values(variant) + 4 * cache
    disk = checkpoint + sum(disk for disk, _ in auxiliaries)
    return Sizes(disk, 2 * (parameters + cache) + beside, cpu + beside)


def lm_parameters(variant: Variant) -> int:
    """The values of a language model's state: transformer, embeddings, heads, and its own part of the conditioners."""
    dim, codebooks = variant.dim, codebooks_of(variant)
    cross = variant.conditioners == ("description",)
    attention, norm = 4 * dim * dim, 2 * dim
    layer = attention + norm + 8 * dim * dim + norm + (attention + norm if cross else 0)
    total = variant.layers * layer + embedding_values(variant) + codebooks * CARDINALITY * dim + norm
    total += sum((T5_DIMS[name] + 1) * dim for name in variant.auxiliaries if name in T5_DIMS)
    if "melody" in variant.conditioners:
        total += (12 + 1) * dim + 16_384  # the projection of the chroma, the window of its spectrogram
    if "style" in variant.conditioners:
        total += (STYLE_DIM + 1) * dim + (768 + 1) * STYLE_DIM
        total += STYLE_LAYERS * (12 * STYLE_DIM**2 + 4 * STYLE_DIM) + 2 * STYLE_DIM
        total += STYLE_CODEBOOKS * (2 * STYLE_BINS * STYLE_DIM + STYLE_BINS + 1)
    return total


def embedding_values(variant: Variant) -> int:
    """The values of a language model's embeddings, the special token's included."""
    return codebooks_of(variant) * (CARDINALITY + 1) * variant.dim


def codebooks_of(variant: Variant) -> int:
    return 4 * variant.channels


def cache_values(variant: Variant) -> int:
    """The keys and values claimed for one request: of every layer, row and position."""
    prefix = 0 if variant.conditioners == ("description",) else PROMPT_TOKENS
    prefix += MELODY_FRAMES if "melody" in variant.conditioners else 0
    prefix += STYLE_FRAMES if "style" in variant.conditioners else 0
    seconds = 10 if variant.name.startswith("audiogen") else 30
    delays = 3
    return ROWS * variant.layers * 2 * variant.dim * (prefix + seconds * FRAME_RATE + delays + 1)
