"""From a model's name to a local path, by way of the Hugging Face hub if it is not one."""

from pathlib import Path

from rmjax.errors import UserError

# Weights only as safetensors: a pickle is never even downloaded.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


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
