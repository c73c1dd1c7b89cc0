"""Downloads from the Hugging Face hub, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from handler.errors import CheckpointError


def hub_snapshot(
    repo: str,
    files: Iterable[str],
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """One commit's `files`, in one folder of the cache; those the repository lacks are left out.

    Raises:
        CheckpointError: there is no such repository or revision, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(repo, revision):
        folder = snapshot_download(
            repo, revision=revision, token=token, cache_dir=cache_dir, allow_patterns=list(files)
        )
    return Path(folder)


@contextmanager
def hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turns the hub client's errors into CheckpointError."""
    import httpx2  # what the client talks with
    from huggingface_hub import errors

    at = f"{repo}@{revision}" if revision else repo
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{at}: access to this repository must be asked for. Accept its terms on the hub's page, then "
            "run `hf auth login` or set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{at}: the repository has no such branch, tag or commit.") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{at}: no such repository on the hub, or it is private. Check the spelling; for a private one "
            "run `hf auth login` or set HF_TOKEN."
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{at}: not a valid hub id: {error}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx2.TransportError) as error:
        raise CheckpointError(_not_reached(at, error)) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{at}: the download failed: {error}") from error


def _not_reached(at: str, error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            f"{at} is not in the Hugging Face cache, and HF_HUB_OFFLINE is set. Unset it to download, or give a folder."
        )
    cause = error.__cause__ or error
    return (
        f"{at} is not in the Hugging Face cache, and the hub could not be reached ({type(cause).__name__}: "
        f"{cause}). Check the network, or give a folder that holds the files."
    )
