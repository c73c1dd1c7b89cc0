"""Reads torch files, trusting nothing in them."""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from handler.errors import CheckpointError
from handler.file_kind import Kind, file_kind, wrong_kind


class ForeignClassError(CheckpointError):
    """A torch file names a class or function that may not be in it.

    Attributes:
        name: of the class, with its module.
    """

    def __init__(self, path: Path, name: str, what: str) -> None:
        super().__init__(
            f"{path} holds {name}; {what} may hold only tensors and plain types. Loading it could run code of whoever "
            "made it, so it is refused; get the file from its publisher again."
        )
        self.name = name


def read_torch_file(path: Path, allowed: Sequence[Any] = (), what: str = "a checkpoint") -> tuple[Any, bool]:
    """What `torch.save` wrote to a file; only tensors and plain types are unpickled (`weights_only`).

    Tensors of a zip file, which torch writes since version 1.6, stay in the file until they are used; those of an older
    file are read at once.

    Args:
        path: the file.
        allowed: classes it may hold besides, as `torch.serialization.safe_globals` takes them.
        what: the file should be, for messages.

    Returns:
        what was saved, and whether its tensors are still in the file.

    Raises:
        CheckpointError: it is not a torch file (says what it is), or is cut short.
        ForeignClassError: it names another class.
    """
    kind = file_kind(path)
    if not kind.holds_torch:
        raise CheckpointError(wrong_kind(path, what, kind))
    mapped = kind.kind is Kind.TORCH
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped), mapped
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL `?([\w.]+)`?", str(error))
        if foreign is None:
            raise CheckpointError(
                f"{path} cannot be read: it is damaged, or was pickled by another protocol than torch.save's own. "
                "Download or copy it again. Save it again with torch.save, without pickle_protocol, if it is whole."
            ) from error
        raise ForeignClassError(path, foreign.group(1), what) from error
    except (
        *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError),
        *(RuntimeError, TypeError, ValueError, struct.error),
    ) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(f"{path} cannot be read: it is cut short or damaged ({reason}). Download or copy it again.")
