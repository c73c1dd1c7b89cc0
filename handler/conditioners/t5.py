"""Text by T5 (Raffel et al. 2020), through transformers, from a local folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from handler.conditioners.base import TextConditioner
from handler.conditioners.fuser import Condition
from handler.errors import CheckpointError
from handler.file_kind import file_kind, wrong_kind
from handler.finite import require_finite
from handler.model_folder import require_json, require_kind, require_safetensors, weights_file


class T5Conditioner(TextConditioner):
    """The encoder's last hidden state of each token, projected (`conditioners.*.t5`).

    Each text is encoded alone, so nothing pads it. An empty text is the null condition. There is no truncation.
    T5 is not among this module's parameters: it comes from its own folder, or, for a model trained with `finetune`,
    from the checkpoint, and always computes in float32.

    Args:
        folder: T5's files in the transformers layout: config, weights, tokenizer.
        output_dim: the language model's dimension.
        normalize: applied to each text first (`normalize_text`), or None.
        state: T5's parameters of a fine-tuned model, instead of the folder's, or None.

    Raises:
        CheckpointError: if the folder does not hold a whole T5.
    """

    def __init__(
        self,
        folder: Path,
        output_dim: int,
        normalize: Callable[[str], str] | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        self.tokenizer, t5 = _load(folder, state)
        super().__init__(t5.config.d_model, output_dim)
        self.normalize = normalize
        # In a list, or nn.Module would count it among the parameters of the checkpoint.
        self._t5 = [t5]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> T5Conditioner:
        """Takes T5 along wherever the module goes (`to`, `cuda`, …)."""
        self._t5[0]._apply(fn)
        super()._apply(fn, recurse)
        return self

    def token_ids(self, text: str) -> list[int]:
        """The tokens of a text, `</s>` at the end."""
        return list(self.tokenizer(text).input_ids)

    def hidden(self, text: str) -> Tensor:
        """T5's last hidden state, float32 `[1, L, d_model]`."""
        device = self.output_proj.weight.device
        ids = torch.tensor([self.token_ids(text)], device=device)  # [1, L]
        return self._t5[0](input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state

    def forward(self, text: str | None) -> Condition:
        text = self.normalize(text) if text and self.normalize else text
        if not text:
            return self.null(1)
        return self._project(self.hidden(text))


def _load(folder: Path, state: dict[str, Tensor] | None) -> tuple[Any, Any]:
    """T5's tokenizer and encoder; nothing is fetched and no code of the folder is run."""
    # Imported here: transformers takes seconds to import, and only text models need it.
    from transformers import T5Config, T5EncoderModel, T5Tokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    _require_kinds(folder, state is None)
    try:
        tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
        if state is not None:
            t5 = T5EncoderModel(T5Config.from_pretrained(folder, local_files_only=True))
            t5.load_state_dict(_tied(t5, state))
        else:
            loaded: Any = T5EncoderModel.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
            t5, report = loaded
            if report["missing_keys"]:
                raise CheckpointError(f"{folder} lacks weights of T5: {sorted(report['missing_keys'])[:3]} …")
            for name, parameter in t5.named_parameters():
                require_finite(parameter, name, str(weights_file(folder) or folder))
    except (SafetensorError, KeyError, TypeError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} does not hold a usable T5 (config.json, model.safetensors, spiece.model or tokenizer.json): "
            f"{error}"
        ) from error
    return tokenizer, t5.eval().requires_grad_(False)


def _require_kinds(folder: Path, weights: bool) -> None:
    """Raises CheckpointError for a file that is not what its name says, before transformers reads it."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        require_json(folder / name)
    if (folder / "spiece.model").is_file():
        require_kind(folder / "spiece.model")
    file = weights_file(folder)
    if file is None or not weights:
        return
    if file.suffix == ".safetensors":
        require_safetensors(file)
    elif not (found := file_kind(file)).holds_torch:
        raise CheckpointError(wrong_kind(file, "weights in torch's format", found))


def _tied(t5: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters with the one embedding under both of its names, where the file holds one of them."""
    names = ("shared.weight", "encoder.embed_tokens.weight")
    embedding = next((state[name] for name in names if name in state), None)
    if embedding is None:
        return state
    return {**{name: embedding for name in names if name in t5.state_dict()}, **state}
