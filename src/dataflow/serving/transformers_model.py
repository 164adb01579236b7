"""Where a transformers model's files are, what identifies them, and onto which device it goes. No torch in here.

A hub model is one commit, as in :mod:`dataflow.serving.model_files`; a folder is known by a digest of its files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataflow.errors import ConfigError, MissingExtraError
from dataflow.serving import diffusers_runner, model_files
from dataflow.serving.diffusers_options import parse_devices
from dataflow.serving.model_files import ModelFiles

PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
_WEIGHTS = "*.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model as the user named it.

    Attributes:
        name: a folder, a hub id (``org/name``) or ``builtin:NAME``.
        revision: branch, tag or commit of a hub model.
        cache_dir: the Hub's cache.
        local_files_only: never ask the Hub.
    """

    name: str
    revision: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False

    def located(self) -> ModelFiles:
        """The model at one commit; asks the Hub for it at most.

        Raises:
            ConfigError: there is no such model.
        """
        files = model_files.locate(
            self.name, revision=self.revision, cache_dir=self.cache_dir, local_files_only=self.local_files_only
        )
        if files.folder is not None and not (files.folder / "config.json").is_file():
            raise ConfigError(f"{self.name} is no transformers model: it has no config.json")
        return files


def pinned(source: Source, files: ModelFiles) -> Source:
    """The same model for another process: at the commit that was found here."""
    if not files.hub:
        return source
    return replace(source, revision=files.revision, local_files_only=source.local_files_only or files.offline)


def identity(files: ModelFiles) -> dict[str, Any]:
    """``model`` and ``revision`` for a fingerprint: a hub model's commit, else a digest of the folder's files.

    Raises:
        ConfigError: a file is not readable.
    """
    if files.hub:
        return {"model": files.name, "revision": files.revision}
    assert files.folder is not None
    named = files.name if files.name.startswith("builtin:") else "local"
    return {"model": named, "revision": _digest(files.folder)}


def fetched(files: ModelFiles) -> Path:
    """The folder with the model's files, downloading those that are missing.

    Raises:
        ConfigError: it cannot be fetched, or has no weights.
    """
    folder = files.folder or model_files.download(files, PATTERNS, fallback="*.bin")
    if not any(next(folder.glob(pattern), None) for pattern in (_WEIGHTS, "*.bin")):
        raise ConfigError(f"{folder} has no weights (no file ending in .safetensors or .bin)")
    return folder


def devices(device: str | Sequence[str]) -> tuple[str, ...]:
    """The devices a serving is copied to: those that are named, or every CUDA device with ``auto``.

    Raises:
        ConfigError: something else than devices.
    """
    named = parse_devices(device)
    if named != ("auto",):
        return named
    try:
        return tuple(diffusers_runner.cuda_devices()) or named
    except MissingExtraError:
        return named  # setup() says so


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        if path.suffix in (".md", ".png", ".jpg"):
            continue
        total.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        try:
            total.update(model_files.file_digest(path))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    return total.hexdigest()[:32]
