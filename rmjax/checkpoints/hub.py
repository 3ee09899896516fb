"""The Hugging Face hub: from a model's name to a local path, and an export to a name there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rmjax.errors import UserError

# Weights only as safetensors: a pickle is never even downloaded.
_Answer = TypeVar("_Answer")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md"]


def local_path(name: str) -> Path:
    """The path `name` if it exists, else the hub's snapshot of the model `name`.

    Raises:
      UserError: neither a path nor a model that the hub gives.
    """
    if not name:
        raise UserError("which model? The name is empty")
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or path.suffix == ".gguf":
        raise UserError(f"{name}: there is no such file or directory")
    # Here, since most models are on the disk, and the hub's client takes a while to import.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except Exception as error:  # no network, no such model, no licence accepted: it says which
        raise UserError(
            f"{name}: not a local path, and the hub does not give it ({error})"
        ) from error


def check_push(repo: str) -> None:
    """Checks a name to push to, and that the hub knows who asks, before an export begins.

    Raises:
      UserError: it is not `owner/name`, or the hub cannot be asked.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push={repo}: {error}") from error
    if repo.count("/") != 1:
        raise UserError(f"--push={repo}: expected OWNER/NAME")
    _asked(f"--push={repo}: nothing was done, since the hub", HfApi().whoami)


def push_export(directory: str, repo: str) -> list[str]:
    """Uploads a directory as one commit, which is there whole or not at all.

    Args:
      directory: of the export.
      repo: a model of the hub; one that is not there yet is made, as a private one.

    Returns:
      Lines to print about it.

    Raises:
      UserError: the hub refuses; it says what is there, and how to go on.
    """
    from huggingface_hub import HfApi

    api, folder = HfApi(), Path(directory).expanduser()
    retry = f"To go on: `hf upload {repo} {directory} --private`"
    whole = f"--push={repo}: {directory} is whole"
    is_new = not _asked(
        f"{whole}, and nothing was uploaded: the hub", lambda: api.repo_exists(repo), retry
    )
    _asked(
        f"{whole}, and nothing was uploaded: the hub",
        lambda: api.create_repo(repo, private=True if is_new else None, exist_ok=True),
        retry,
    )
    try:
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload a model of rmjax"
        )
    except Exception as error:  # network, rights, space: it says which
        what = _what_is_there(api, repo, folder, is_new)
        raise UserError(
            f"{whole}; {repo}: {what}. The upload ended with: {_said(error)}. {retry}"
        ) from error
    made = ", which was made, and is private" if is_new else ""
    return [f"pushed: {commit.commit_url or repo}{made}"]


def _what_is_there(api: Any, repo: str, folder: Path, is_new: bool) -> str:
    """Which files of a directory the hub has after an upload that failed, in words.

    An upload is one commit: in a model that was made for it, files are of it. In another they have
    the names of those that it was to bring, and perhaps are older.
    """
    wanted = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    try:
        there = set(api.list_repo_files(repo))
    except Exception as error:  # the same network, perhaps
        return f"what it has cannot be asked ({_said(error)}); an upload is whole or not there"
    missing = [name for name in wanted if name not in there]
    has = f"{len(wanted) - len(missing)} of the {len(wanted)}"
    if not is_new:
        return f"it has files of {has} names, which may be those from before"
    if not missing:
        return f"it has {has} files, so the upload came through"
    more = f" and {len(missing) - 1} more" if missing[1:] else ""
    return f"it has {has} files, not {missing[0]}{more}"


def _asked(what: str, ask: Callable[[], _Answer], after: str = "") -> _Answer:
    """An answer of the hub; or a `UserError` that says what was meant, and why not."""
    try:
        return ask()
    except Exception as error:  # network, no token, no rights: it says which
        raise UserError(f"{what} answers: {_said(error)}. {after}".strip()) from error


def _said(error: Exception) -> str:
    said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return f"{said} ({_said(error.__cause__)})" if isinstance(error.__cause__, OSError) else said
