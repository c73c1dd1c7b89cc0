"""Text by a lookup table of hashed words."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from handler.conditioners.base import TextConditioner
from handler.conditioners.fuser import Condition
from handler.errors import CheckpointError

Words = Callable[[str], list[str]]


class LUTConditioner(TextConditioner):
    """The embedding of each word's hash, projected (`conditioners.*.lut`).

    Args:
        num_bins: size of the table (`n_bins`).
        dim: of the table.
        output_dim: the language model's dimension.
        words: cuts a text into what is hashed.
    """

    def __init__(self, num_bins: int, dim: int, output_dim: int, words: Words) -> None:
        super().__init__(dim, output_dim)
        self.embed = nn.Embedding(num_bins, dim)
        self.words = words

    def forward(self, text: str | None) -> Condition:
        words = [] if text is None else self.words(text)
        if not words:
            return self.null(1)
        tokens = [hash_bin(word, self.embed.num_embeddings) for word in words]
        return self._project(self.embed(torch.tensor([tokens], device=self.embed.weight.device)))


def hash_bin(word: str, num_bins: int) -> int:
    """The bin of a word: its sha256 modulo the number of bins."""
    return int(hashlib.sha256(word.encode()).hexdigest(), 16) % num_bins


def get_words(tokenizer: str, key: str) -> Words:
    """The function that `tokenizer` names: `noop` (the whole text) or `whitespace` (see `natural_words`).

    Raises:
        CheckpointError: for another name, or when spaCy is missing; `key` says where the config asks for it.
    """
    if tokenizer == "noop":
        return lambda text: [text]
    if tokenizer == "whitespace":
        return natural_words(key)
    raise CheckpointError(f"{key} is {tokenizer!r}; it must be noop or whitespace.")


def natural_words(key: str) -> Words:
    """Lemmas of a text without stop words and punctuation, numbers spelled out, by spaCy and num2words.

    Raises:
        CheckpointError: when spaCy, its English model or num2words is missing; `key` says what asks for it.
    """
    try:
        import num2words
        import spacy

        nlp = spacy.load("en_core_web_sm")
    except (ImportError, OSError) as error:
        raise CheckpointError(
            f"{key} needs spaCy, its model en_core_web_sm and num2words, which are not installed here ({error}). "
            "Install them with `pip install spacy num2words` and `python -m spacy download en_core_web_sm`."
        ) from error
    return lambda text: lemmas(text, nlp, num2words.num2words)


def lemmas(text: str, nlp: Callable[[str], Any], spell_number: Callable[[int], str]) -> list[str]:
    """The words that count, given spaCy's pipeline and num2words' function."""
    text = re.sub(r"\d+", lambda number: spell_number(int(number.group())), text)
    return [token.lemma_ for token in nlp(text) if not token.is_stop and token.text not in "?:!.,;"]
