"""Uploads: a folder becomes a repository of the Hugging Face Hub."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from functional_llm.files.replacing import replaced_file
from functional_llm.formats.model_card import CARD_NAME, for_repository


def push_folder(
    folder: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    message: str = "Upload with functional_llm",
    token: str | None = None,
) -> str:
    """Uploads a directory or an adapter to the Hugging Face Hub, in one commit.

    A card that this library wrote, and nobody has changed, names the repository then.

    Args:
        folder: A directory that `save_preset` or `save_adapter` wrote.
        repository: `"organisation/name"`; made if it is not there.
        private: Whether a repository that is made is private; the account's default if left out.
        message: Of the commit.
        token: Of the account; that of `HF_TOKEN` or `hf auth login` unless given.

    Returns:
        The address of the repository.

    Raises:
        FileNotFoundError: If the folder has no model or adapter.
        ValueError: If the name is none, or there is no token that may write there.
        RuntimeError: If the upload fails. The repository is as it was then.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(
            f"Expected a directory from save_preset, or an adapter, at {folder}: it has no "
            "config.json and no adapter_config.json."
        )
    _prepare_repository(repository, private, token)
    return _upload(folder, repository, message, token)


def push_saved(
    save: Callable[[Path], object],
    repository: str,
    *,
    private: bool | None = None,
    message: str = "Upload with functional_llm",
    token: str | None = None,
) -> str:
    """Saves into a folder that is gone afterwards, and uploads it.

    Args:
        save: Saves into a folder.
        repository: As for `push_folder`; the others too.
        private: Whether it is private.
        message: Of the commit.
        token: Of the account.

    Returns:
        The address of the repository.

    Raises:
        ValueError: As `push_folder`.
        RuntimeError: As `push_folder`.
    """
    _prepare_repository(repository, private, token)  # before weights are written
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / repository.partition("/")[2]
        save(folder)
        return _upload(folder, repository, message, token)


def _upload(folder: Path, repository: str, message: str, token: str | None) -> str:
    card = folder / CARD_NAME
    if card.is_file():
        before = card.read_text("utf-8", errors="replace")
        if (after := for_repository(before, repository)) != before:
            with replaced_file(card) as part:
                part.write_text(after, encoding="utf-8")
    from huggingface_hub import HfApi, constants

    # Checkpoints of the run and hidden files stay here.
    left_out = ["training/*", ".*"]
    with _explained(repository):
        HfApi(token=token).upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message, ignore_patterns=left_out
        )
    return f"{constants.ENDPOINT}/{repository}"


def _prepare_repository(repository: str, private: bool | None, token: str | None) -> None:
    """Makes a repository, if it is not there, and so finds out whether one may write to it."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    with _explained(repository):
        validate_repo_id(repository)
    if "/" not in repository:
        raise _bad_name(repository, "")
    if token is None and get_token() is None:
        raise _no_token(repository, "no token")
    with _explained(repository):
        HfApi(token=token).create_repo(repository, private=private, exist_ok=True)


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turns what the library of the Hub raises into one error that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise _bad_name(repository, str(error)) from error
    except errors.LocalTokenNotFoundError as error:
        raise _no_token(repository, "no token") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 401:
            raise _no_token(repository, "a token that is not valid") from error
        if status == 403:
            raise _no_token(repository, "a token that may not write there") from error
        raise _failed(repository, error) from error
    except Exception as error:  # the library lets errors of its HTTP client through
        raise _failed(repository, error) from error


def _bad_name(repository: str, reason: str) -> ValueError:
    return ValueError(f"Expected organisation/name. Received: {repository!r}. {reason}".strip())


def _no_token(repository: str, received: str) -> ValueError:
    return ValueError(
        f"Expected a token that may write to {repository}. Received: {received}. Make one at "
        "https://huggingface.co/settings/tokens, then set HF_TOKEN or run `hf auth login`."
    )


def _failed(repository: str, error: Exception) -> RuntimeError:
    reason = f"{type(error).__name__}: {error}"[:500]
    return RuntimeError(
        f"Could not upload to {repository}; nothing there has changed. Received: {reason}. Check "
        "the network, HF_ENDPOINT and HF_HUB_OFFLINE, and try again."
    )
