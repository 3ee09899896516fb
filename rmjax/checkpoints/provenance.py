"""Where a model is from, as its model card says: kept by all that is made of it.

A model card is a `README.md` whose first lines, between two lines `---`, are YAML: the licence, the
models that it was made from, the data. A run, a converted model and an export each have one, so
that what a source says arrives at the hub, whatever is on the way.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmjax.checkpoints.pretrained import Pretrained
from rmjax.errors import UserError
from rmjax.runtime.files import replace_file

CARD = "README.md"
_KEPT = ("license", "license_name", "license_link", "language", "datasets", "base_model")


def read_front_matter(directory: Path) -> dict[str, Any]:
    """The YAML in front of a model card; empty if there is no card, or nothing in front of it.

    Raises:
      UserError: it is no YAML.
    """
    file = directory / CARD
    if not file.is_file():
        return {}
    # Here, since only conversions and beginning runs need it, and it takes a while to import.
    from huggingface_hub import metadata_load

    try:
        return metadata_load(file) or {}
    except Exception as error:  # whatever a YAML parser raises
        why = " ".join(str(error).split())
        raise UserError(
            f"{file}: the lines between '---' at its top are not YAML ({why}); mend or remove them"
        ) from error


def provenance(source: Pretrained, trained: bool = False) -> dict[str, Any]:
    """What a card of something made of `source` says of its origin, as fields of front matter.

    The model that it was made from is `source` itself if that is on the hub, else whatever
    `source` says that it was made from.

    Args:
      source: a model.
      trained: whether it is trained further, on other data than it says.

    Raises:
      UserError: see `read_front_matter`.
    """
    directory = source.files.parent if source.files.is_file() else source.files
    front = read_front_matter(directory)
    kept = {name: front[name] for name in _KEPT if front.get(name)}
    if not Path(source.name).expanduser().exists():
        kept["base_model"] = source.name
    if trained:
        kept.pop("datasets", None)
    return kept


def unknown_origin(source: Pretrained, front: Mapping[str, Any]) -> list[str]:
    """What nothing says of a model that is exported, as lines to print."""
    wanted = ["license", *(["base_model"] if source.base else [])]
    unknown = [field for field in wanted if not front.get(field)]
    if not unknown:
        return []
    return [
        f"README.md does not say {' and '.join(unknown)}, since nothing here does: add it before "
        "you publish the model"
    ]


def write_provenance(directory: Path, front: Mapping[str, Any], made: str) -> None:
    """Writes the card of a model that stays here: its origin, and in a line what it is."""
    write_card(directory, {**front, "library_name": "rmjax"}, f"{made}\n")


def write_card(directory: Path, front: Mapping[str, Any], body: str) -> None:
    """Writes a model card."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(ignore_metadata_errors=True, **front)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
    replace_file(directory / CARD, str(card).encode())
