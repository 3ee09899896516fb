"""Exports that are pushed to the hub, of which a stand-in answers here."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from helpers.hf_models import save_hf, snapshot
from helpers.hub_server import Hub, hub
from helpers.paths import ROOT
from rmjax.checkpoints.hub import check_push, push_export
from rmjax.convert import hf_to_orbax
from rmjax.errors import UserError


@pytest.fixture
def server(monkeypatch) -> Iterator[Hub]:
    """A hub for this process, whose client has read its environment long ago."""
    with hub() as found:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
        yield found


@pytest.fixture
def export(tmp_path) -> Path:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "README.md").write_text("# model\n")
    (tmp_path / "export" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "export"


@pytest.mark.slow
def test_the_command_pushes_what_it_wrote(tmp_path):
    hf_to_orbax(str(save_hf(tmp_path / "hf")), str(tmp_path / "orbax"))
    with hub() as found:
        environment = {
            "HF_ENDPOINT": found.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_stand_in",
        }
        done = subprocess.run(
            [
                *(sys.executable, "-m", "rmjax.convert", "orbax-to-hf"),
                *(tmp_path / "orbax", tmp_path / "back", "--push=me/a-model", "--value=care"),
            ],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        url = f"{found.url}/me/a-model/commit/1"
        assert f"pushed: {url}, which was made, and is private" in done.stdout
        assert found.repos["me/a-model"] == snapshot(tmp_path / "back")
        assert found.private == {"me/a-model"}
    assert 'rmjax.load("me/a-model")' in (tmp_path / "back" / "README.md").read_text()


def test_what_is_there_is_pushed_to_and_stays_as_public_as_it_was(server, export):
    server.repos["me/it"] = {"README.md": b"older"}
    check_push("me/it")
    assert push_export(str(export), "me/it") == [f"pushed: {server.url}/me/it/commit/1"]
    assert server.repos["me/it"] == snapshot(export)
    assert not server.private


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ("create", r"export is whole, and nothing was uploaded: the hub answers: .*you may not"),
        ("/commit", r"export is whole; me/it: it has 0 of the 2 files, not README\.md and 1 more"),
        ("batch", r"export is whole; me/it: it has 0 of the 2 files"),
        ("/commit|/tree", r"export is whole; me/it: what it has cannot be asked \(.*\); an upload"),
    ],
    ids=["repository", "commit", "weights", "everything"],
)
def test_a_push_that_fails_says_what_is_there(refused, message, server, export):
    server.refused = refused
    with pytest.raises(UserError, match=message) as failed:
        push_export(str(export), "me/it")
    assert f"To go on: `hf upload me/it {export} --private`" in str(failed.value)
    assert "\n" not in str(failed.value)


def test_files_from_before_are_not_taken_for_those_of_an_upload_that_failed(server, export):
    server.repos["me/it"], server.refused = {"README.md": b"older"}, "/commit"
    with pytest.raises(UserError, match="files of 1 of the 2 names, which may be those from"):
        push_export(str(export), "me/it")


def test_a_name_and_a_token_are_asked_for_first(server, tmp_path):
    server.refused = "whoami"
    with pytest.raises(UserError, match=r"--push=me/it: nothing was done, since the hub answers: "):
        check_push("me/it")
    for name in ("it", "a/b/c", "me/--", "me/it it"):
        with pytest.raises(UserError, match=f"--push={name}: "):
            check_push(name)
