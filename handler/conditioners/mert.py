"""MERT (arXiv:2306.00107): features of music, through transformers' HuBERT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from handler.compression.state import load_weights
from handler.errors import CheckpointError
from handler.model_folder import read_model_config, read_model_weights

if TYPE_CHECKING:
    from transformers import HubertModel

SAMPLE_RATE = 24_000
"""Of the audio MERT takes, in Hz."""

# Where MERT departs from HuBERT, and the value with which it doesn't.
_HUBERT_VALUES = {"attention_relax": -1.0, "deepnorm": False, "feature_extractor_cqt": False}

# What only training needs: the vector that hides frames, and the heads that guess them.
_TRAINING_ONLY = ("masked_spec_embed", "final_proj.weight", "final_proj.bias", "label_embs_concat")

# torch's weight norm renamed its two parts; published files have the old names.
_WEIGHT_NORM = {".weight_g": ".parametrizations.weight.original0", ".weight_v": ".parametrizations.weight.original1"}

_ANCHOR = "feature_projection.projection.weight"


def load_mert(folder: Path) -> HubertModel:
    """MERT from a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`.

    MERT-v1-95M is a plain HuBERT under a `model_type` of its own, so no code of the folder is run. The weights may be
    stored in any precision and under any common prefix (`hubert.`); all of them must be there and be used.

    Returns:
        the model in float32, for inference; it takes 24 kHz audio `[B, T]` as it is, without normalisation.

    Raises:
        CheckpointError: a file is absent or unreadable, `config.json` departs from HuBERT, or the weights don't fit.
    """
    # Imported here: transformers takes seconds to import, and only style models need it.
    from huggingface_hub.errors import StrictDataclassError
    from transformers import HubertConfig, HubertModel

    config = read_model_config(folder)
    for key, value in _HUBERT_VALUES.items():
        if config.get(key, value) != value:
            raise CheckpointError(
                f"{folder / 'config.json'}: {key} is {config[key]!r}, and only {value!r} can be honoured; "
                "use m-a-p/MERT-v1-95M"
            )
    config.pop("model_type", None)
    # No frames are hidden at inference, and without these the model has no vector to hide them with.
    config |= {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    try:
        with torch.device("meta"):
            mert = HubertModel(HubertConfig.from_dict(config))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: not a HuBERT's ({error}); fetch it again") from error
    path, state = read_model_weights(folder)
    prefix = next((name.removesuffix(_ANCHOR) for name in state if name.endswith(_ANCHOR)), "")
    state = {_our_name(name.removeprefix(prefix)): tensor for name, tensor in state.items()}
    for name in _TRAINING_ONLY:
        state.pop(name, None)
    load_weights(mert, state, str(path), str)
    return mert.eval().requires_grad_(False)


def shortest_audio(mert: HubertModel) -> int:
    """The fewest samples that make one vector: 400 in MERT-v1-95M."""
    samples = 1
    for kernel, stride in zip(reversed(mert.config.conv_kernel), reversed(mert.config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def _our_name(name: str) -> str:
    for theirs, ours in _WEIGHT_NORM.items():
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    return name
