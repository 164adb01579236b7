"""Where a transformers model's files are, what identifies them, and onto which device it goes. No torch in here.

A hub model is one commit, as in :mod:`dataflow.serving.model_files`; a folder is known by a digest of its files.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dataflow.errors import ConfigError, MissingExtraError
from dataflow.serving import diffusers_runner, model_files
from dataflow.serving.diffusers_options import parse_devices
from dataflow.serving.model_files import ModelFiles
from dataflow.types import Serving

PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
_WEIGHTS = "*.safetensors"


Dtype = Literal["fp32", "bf16", "fp16"]


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


class TransformersServing(Serving):
    """What servings of one transformers model share: the model's name and files, and a copy for each device.

    Attributes without a leading underscore are settings and go to other processes; the others are what
    :meth:`setup` makes, and :meth:`_forget` says how they begin.
    """

    num_cpus = None
    source: Source
    device: str | tuple[str, ...]
    dtype: Dtype

    def _name(
        self,
        model: str | os.PathLike[str],
        *,
        revision: str | None,
        hf_cache_dir: str | os.PathLike[str] | None,
        local_files_only: bool,
        device: str | Sequence[str],
        dtype: Dtype,
    ) -> None:
        """Take the settings that all have.

        Raises:
            ConfigError: no such number format.
        """
        if dtype not in ("fp32", "bf16", "fp16"):
            raise ConfigError(f"dtype must be fp32, bf16 or fp16, got {dtype!r}")
        self.dtype = dtype
        self.device = device if isinstance(device, str) else tuple(device)
        self.num_gpus = gpus_of_copy(device)
        self.source = Source(
            name=os.fspath(model),
            revision=revision,
            cache_dir=None if hf_cache_dir is None else str(Path(hf_cache_dir).expanduser()),
            local_files_only=local_files_only,
        )
        self._forget()

    def _forget(self) -> None:
        self._files: ModelFiles | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The settings alone; a hub model goes pinned to the commit that was found here."""
        kept = {name: value for name, value in self.__dict__.items() if not name.startswith("_")}
        if self._files is not None and self._files.hub:
            offline = self.source.local_files_only or self._files.offline
            kept["source"] = replace(self.source, revision=self._files.revision, local_files_only=offline)
        return kept

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def replicas(self) -> Sequence[Serving]:
        """One copy per device."""
        names = devices(self.device)
        if len(names) < 2:
            return [self]
        twins = [copy.copy(self) for _ in names]
        for twin, name in zip(twins, names, strict=True):
            twin.device = name
        return twins

    def _located(self) -> ModelFiles:
        if self._files is None:
            self._files = self.source.located()
        return self._files


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


def gpus_of_copy(device: str | Sequence[str]) -> float | None:
    """How many GPUs one copy takes on a cluster: one, or with ``auto`` one where there are any."""
    name = device if isinstance(device, str) else device[0]
    return None if name == "auto" else float(name.startswith("cuda"))


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
