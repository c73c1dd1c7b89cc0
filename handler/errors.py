"""The errors a person is meant to read."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint or an auxiliary model cannot be used.

    The message says which file, which key, and what to do.
    """


class ModelDivergedError(Exception):
    """What the model computed is no longer a number, so there is no music to return.

    The message says what to do.
    """


class RequestError(ValueError):
    """What was asked for makes no sense for this model.

    Attributes:
        field: the request field at fault, by its name in the API, or None.
        message: what is wrong and within which bounds it would be right.
    """

    def __init__(self, field: str | None, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field
        self.message = message

    def __reduce__(self) -> tuple[type[RequestError], tuple[str | None, str]]:
        return type(self), (self.field, self.message)


class UnknownRequestError(RequestError):
    """There is no request of the id that was to be cancelled."""
