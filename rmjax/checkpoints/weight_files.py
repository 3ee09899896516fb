"""Which files of a directory hold a model's weights.

transformers deletes old shards when it saves a model again, but leaves their index, and whoever
copies files by hand leaves shards as well. Which of two sets is meant then cannot be told, so two
sets are an error.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from rmjax.errors import UserError, shortened
from rmjax.runtime.files import read_json

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
VALUE_HEAD = "value_head.safetensors"  # LLaMA-Factory's, see value_head.py
_SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")
_FILE = re.compile(r"[^/\\\0]{1,243}\.safetensors")
_log = logging.getLogger(__name__)


def weight_files(directory: Path) -> list[str]:
    """Names of the `.safetensors` files that make up the model in a directory.

    They are those of the index. Without one they are all there are, but a value head. An index
    whose files are gone is not used where there is a whole `model.safetensors`, as in transformers,
    and a warning says so.

    Raises:
      UserError: two sets of weights, one that is not complete, or none.
    """
    whole, index = (directory / WHOLE).exists(), directory / INDEX
    if index.exists():
        return _indexed_files(directory, _named_files(index), whole)
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    names = [name for name in names if name != VALUE_HEAD]
    shards = {match[1]: name for name in names if (match := _SHARD.fullmatch(name))}
    if shards and whole:
        _refuse(directory, WHOLE, _listed([name for name in names if _SHARD.fullmatch(name)]))
    if len(shards) > 1:
        _refuse(directory, *list(shards.values())[:2])
    if not names:
        raise UserError(f"{directory}: there is no .safetensors file{_pickles(directory)}")
    return names


def _named_files(index: Path) -> list[str]:
    """The files that an index names, sorted."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise UserError(f"{index}: field 'weight_map' does not map tensors to files")
    for name in files.values():  # a path would lead elsewhere, and whoever wrote it chooses where
        if not _FILE.fullmatch(name):
            raise UserError(
                f"{index}: field 'weight_map' names {shortened(name)!r}, which is no .safetensors "
                "file of this directory"
            )
    return sorted(set(files.values()))


def _indexed_files(directory: Path, named: Sequence[str], whole: bool) -> list[str]:
    there = [name for name in named if (directory / name).exists()]
    missing = [name for name in named if name not in there]
    if whole and named and WHOLE not in named:
        if there:
            gone = f" ({len(missing)} of the {len(named)} that it names are gone)" * bool(missing)
            _refuse(directory, WHOLE, f"{INDEX} with {_listed(there)}{gone}")
        _log.warning(
            f"{directory}: {WHOLE} is read; {INDEX} names {_listed(missing)}, which are not there, "
            "and is not used"
        )
        return [WHOLE]
    if missing or not named:
        what = f"{missing[0]} is named there but is" if missing else "the files it should name are"
        raise UserError(f"{directory / INDEX}: {what} not in the directory")
    return list(named)


def _refuse(directory: Path, one: str, other: str) -> None:
    raise UserError(
        f"{directory}: two sets of weights, {one}, and {other}. Perhaps a model was saved over an "
        "older one: delete the files of the one that is not meant"
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _pickles(directory: Path) -> str:
    """What to say of pickled weights, where there is nothing else."""
    found = [path.name for end in ("*.bin", "*.pth") for path in sorted(directory.glob(end))]
    if not found:
        return ""
    name = next((name for name in found if name.startswith("pytorch_model")), found[0])
    return f"; {refused_pickle(name)}"


def refused_pickle(name: str) -> str:
    """Why a file is not read, and how whoever trusts it makes one that is."""
    new = f"{name.rpartition('.')[0].replace('pytorch_model', 'model')}.safetensors"
    return (
        f"{name} is a pickle, which can run code when it is read: convert it to safetensors "
        'first, where you trust it with `python -c "import torch; from safetensors.torch import '
        f"save_file; t = torch.load('{name}', weights_only=True); save_file({{k: v.clone() for k, "
        f"v in t.items()}}, '{new}')\"`"
    )
