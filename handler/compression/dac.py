"""The Descript Audio Codec (arXiv:2306.06546), through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from handler.compression.base import CompressionModel
from handler.compression.state import load_weights
from handler.errors import CheckpointError
from handler.model_folder import read_model_config, read_model_weights

if TYPE_CHECKING:
    from transformers import DacModel


class DacCompression(CompressionModel):
    """Mono audio as up to 9 (44 kHz) or 32 (24 kHz) codebooks of 1024 codes; float32, for inference only.

    Args:
        model: transformers' model, with its weights.
    """

    def __init__(self, model: DacModel) -> None:
        super().__init__()
        config = model.config
        self.sample_rate, self.channels = config.sampling_rate, 1
        self.hop_length = config.hop_length
        self.frame_rate = config.sampling_rate / config.hop_length
        self.total_codebooks = self.num_codebooks = config.n_codebooks
        self.cardinality = config.codebook_size
        self.model = model
        self.requires_grad_(False).eval()

    def encode(self, wav: Tensor) -> tuple[Tensor, Tensor | None]:
        """As every compression model: zeros fill the last frame, as Descript's own preprocessing does.

        audiocraft leaves that step out, and with it the samples after the last whole frame.
        """
        self.check_wav(wav)
        wav = F.pad(wav, (0, -wav.shape[-1] % self.hop_length))
        return self.model.encode(wav, self.num_codebooks).audio_codes, None  # [B, K, frames]

    def decode(self, codes: Tensor, scale: Tensor | None = None) -> Tensor:
        """As every compression model.

        A stride that is odd, as one of the 24 kHz model's, leaves the decoder some samples short (8 there); zeros
        take their place.
        """
        if scale is not None:
            raise ValueError("this compression model doesn't normalise its input, so decode takes no scale")
        self.check_codes(codes)
        latent = self.model.quantizer.from_codes(codes.long())[0]  # [B, dimension, frames]
        wav = self.model.decoder(latent)  # [B, 1, about frames * hop]
        return F.pad(wav, (0, codes.shape[-1] * self.hop_length - wav.shape[-1]))


def load_dac(folder: Path) -> DacCompression:
    """Rebuild a DAC from `config.json` and `model.safetensors` or `pytorch_model.bin`, in transformers' layout.

    Raises:
        CheckpointError: a file is absent or unreadable, `config.json` is not a DAC's, or the weights don't fit it.
    """
    # Imported here: transformers takes seconds to import, and hardly a checkpoint needs it for this.
    from huggingface_hub.errors import StrictDataclassError
    from transformers import DacConfig, DacModel

    path = folder / "config.json"
    config = read_model_config(folder)
    if config.get("model_type") != "dac":
        raise CheckpointError(
            f"{path}: model_type is {config.get('model_type')!r}, not 'dac'; fetch the repository in transformers' "
            "layout, such as descript/dac_44khz"
        )
    try:
        with torch.device("meta"):
            model = DacModel(DacConfig.from_dict(config))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a DAC's ({error}); fetch it again") from error
    weights, state = read_model_weights(folder)
    load_weights(model, state, str(weights), str)
    return DacCompression(model)
