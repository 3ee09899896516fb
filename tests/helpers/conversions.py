"""Conversions that are watched, and stopped on the way."""

from pathlib import Path

from helpers.hf_models import snapshot


def weights_of(directory: Path) -> dict[str, bytes]:
    """The weights' files, without those that hold the time."""
    return {
        name: data
        for name, data in snapshot(directory).items()
        if "params/" in name or name.endswith(".safetensors")
    }


def watch(monkeypatch, work: type, stop_after: int | None = None, error=KeyboardInterrupt):
    """The slices that are read from now on; after some are written, `error` is raised."""
    read: list[int] = []
    written: list[int] = []
    original_read, original_write = work.read, work.write

    def reading(self, part):
        read.append(part.number)
        return original_read(self, part)

    def writing(self, model, part, block):
        if stop_after is not None and len(written) >= stop_after:
            raise error
        written.append(part.number)
        original_write(self, model, part, block)

    monkeypatch.setattr(work, "read", reading)
    monkeypatch.setattr(work, "write", writing)
    return read, written
