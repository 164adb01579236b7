"""Where a model's files are, and what they are: the built-in model, a local folder, or an id on the Hugging Face Hub.

A model is always one commit: a branch such as ``main`` is resolved once, and its files live in a folder per model and
commit (``{local_dir}/{org}--{name}/{commit}``), so that two models or two revisions never mix. A local folder is known
by a digest of its contents, so that changed weights are another model even under the same path.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataflow.errors import ConfigError, MissingExtraError

log = logging.getLogger(__name__)

BUILTIN = "builtin:tiny-flux"
INDEX = "model_index.json"
MANIFEST = "dataflow.json"
"""A folder's own defaults: ``{"text2image": {call arguments}, "imageedit": {…}}``; optional.

Beside call arguments a section may hold ``pipeline_class`` (for that task, instead of the index's) and
``size_multiple`` (what both sides of a picture must be multiples of, in pixels, instead of the family's).
"""

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".ckpt", ".msgpack", ".h5", ".onnx", ".pb")
FULL_HASH_BYTES = 32 * 2**20
SAMPLE_BYTES = 1024

_BUILTIN_ROOT = Path(__file__).resolve().parent.parent / "builtin"
BUILTIN_FOLDER = _BUILTIN_ROOT / BUILTIN.removeprefix("builtin:")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTLESS = re.compile(r"Tokenizer|Processor|Scheduler|Extractor")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """One model at one commit.

    Attributes:
        name: as the user wrote it.
        folder: where the files are or, for a hub model, will be; None where only the Hub's own cache knows.
        revision: the commit of a hub model; empty for folders, whose :func:`digest` says it.
        branch: what was asked for: a branch, a tag or the commit itself.
        hub: has to be fetched from the Hub.
        cache_dir: the Hub's cache, None for its default.
        local_dir: the folder that holds a folder per hub model, None to leave them in the Hub's cache.
        offline: use only what is on this machine.
    """

    name: str
    folder: Path | None = None
    revision: str = ""
    branch: str = ""
    hub: bool = False
    cache_dir: Path | None = None
    local_dir: Path | None = None
    offline: bool = False


def locate(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> ModelFiles:
    """Find out what a model's name means. Asks the Hub for the commit of a branch at most; downloads nothing.

    Raises:
        ConfigError: there is no such model, or the Hub cannot be asked and nothing here answers.
    """
    text = os.fspath(name)
    if text.startswith("builtin:"):
        folder = _BUILTIN_ROOT / text.removeprefix("builtin:")
        if not (folder / INDEX).is_file() and not (folder / "config.json").is_file():
            raise ConfigError(f"there is no built-in model {text!r}; built in: {', '.join(builtin_models()) or 'none'}")
        return ModelFiles(name=text, folder=folder)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return ModelFiles(name=text, folder=folder.resolve())
    if folder.is_file():
        raise ConfigError(f"{text} is a file; name the folder of a diffusers pipeline (the one with {INDEX})")
    if not _HUB_ID.fullmatch(text):
        raise ConfigError(
            f"no model {text!r}: there is no such folder, and it is no hub id (org/name);"
            f" {BUILTIN} is the model that needs neither"
        )
    files = ModelFiles(
        name=text,
        branch=revision or "main",
        hub=True,
        cache_dir=None if cache_dir is None else Path(cache_dir).expanduser().absolute(),
        local_dir=None if local_dir is None else Path(local_dir).expanduser().absolute(),
        offline=local_files_only,
    )
    files = _with_commit(files)
    if files.local_dir is None:
        return files
    return replace(files, folder=files.local_dir / _slug(text) / files.revision)


def locate_adapter(
    name: str, *, cache_dir: str | os.PathLike[str] | None = None, local_files_only: bool = False
) -> ModelFiles:
    """The same for a LoRA: a .safetensors file, a folder that holds one, or a hub id.

    Raises:
        ConfigError: there is no such adapter.
    """
    path = Path(name).expanduser()
    if path.exists():
        return ModelFiles(name=name, folder=path.resolve())
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(f"no LoRA {name!r}: there is no such file or folder, and it is no hub id (org/name)")
    return locate(name, cache_dir=cache_dir, local_files_only=local_files_only)


def builtin_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(f"builtin:{index.parent.name}" for index in _BUILTIN_ROOT.glob(f"*/{INDEX}"))


def read_index(files: ModelFiles) -> dict[str, Any]:
    """The model_index.json: which pipeline class, which components. Fetches that one file of a hub model.

    Raises:
        ConfigError: it is no diffusers pipeline.
    """
    path = _fetch_one(files, INDEX) if files.hub else _folder(files) / INDEX
    if path is None or not path.is_file():
        raise ConfigError(
            f"{files.name} is not a diffusers pipeline: it has no {INDEX} (single-file checkpoints and bare"
            " transformers have to be converted or named together with their pipeline's folder)"
        )
    index = _read_object(path)
    if not isinstance(index.get("_class_name"), str):
        raise ConfigError(f"{path} names no pipeline class (_class_name)")
    return index


def read_manifest(files: ModelFiles) -> dict[str, Any]:
    """The model's own defaults (dataflow.json), empty where it has none.

    Raises:
        ConfigError: the file is not what it should be.
    """
    path = _fetch_one(files, MANIFEST) if files.hub else _folder(files) / MANIFEST
    if path is None or not path.is_file():
        return {}
    manifest = _read_object(path)
    for task in ("text2image", "imageedit"):
        if not isinstance(manifest.get(task, {}), dict):
            raise ConfigError(f"{path}: {task!r} must be an object of call arguments")
    return manifest


def fetch(files: ModelFiles, index: Mapping[str, Any], *, variant: str | None = None) -> Path:
    """The folder with all files the pipeline needs, downloading those that are missing.

    Raises:
        ConfigError: files are missing and cannot be fetched.
    """
    if not files.hub:
        folder = _folder(files)
    elif files.folder is not None and _complete(files, variant).is_file():
        folder = files.folder
    else:
        folder = _download(files, index, variant)
    check_components(folder, index)
    return folder


def download(files: ModelFiles, patterns: Sequence[str], *, fallback: str) -> Path:
    """The folder, in the Hub's cache, with the files of a hub model whose names fit.

    Args:
        files: a hub model.
        patterns: names, with ``*``; those that are not there are not missed.
        fallback: names of weights to take where the repository has no safetensors.

    Raises:
        ConfigError: they cannot be fetched.
    """
    hub = _hub()

    def snapshot(names: Sequence[str]) -> Path:
        return Path(
            hub.snapshot_download(
                files.name,
                revision=files.revision,
                cache_dir=files.cache_dir,
                allow_patterns=list(names),
                local_files_only=files.offline,
            )
        )

    try:
        folder = snapshot(patterns)
        return folder if any(folder.rglob("*.safetensors")) else snapshot([*patterns, fallback])
    except _unreachable(hub) as error:
        raise ConfigError(_cannot_fetch(files, error)) from error


def check_components(folder: Path, index: Mapping[str, Any]) -> None:
    """Every component of the index must be there with all its weights.

    Raises:
        ConfigError: names what is missing.
    """
    for name, class_name in components(index).items():
        part = folder / name
        if not part.is_dir():
            raise ConfigError(f"{folder} is incomplete: the component {name!r} ({class_name}) has no folder")
        present = {entry.name for entry in part.iterdir()}
        weights = {entry for entry in present if entry.endswith(WEIGHTS)}
        for listing in (entry for entry in present if entry.endswith(".index.json")):
            shards = set(_read_object(part / listing).get("weight_map", {}).values())
            lost = sorted(shards - present)
            # none of its files but others: it lists a format that was left out on purpose
            if lost and (shards & present or not weights - shards):
                raise ConfigError(f"{part} is incomplete: {len(lost)} of its weight files are missing ({lost[0]}, …)")
        if "config.json" in present and not weights and not _WEIGHTLESS.search(class_name):
            raise ConfigError(f"{part} has no weights (no file ending in .safetensors or .bin)")


def components(index: Mapping[str, Any]) -> dict[str, str]:
    """Class names of a pipeline's components by folder, those that are switched off left out."""
    return {
        name: str(entry[1])
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[0] is not None and entry[1] is not None
    }


def needed_files(names: Iterable[str], index: Mapping[str, Any], *, variant: str | None = None) -> list[str]:
    """Which files of a repository a pipeline loads from: the index, and each component once.

    Of a component's weights, safetensors are preferred to other formats, and the wanted variant to the others;
    single-file checkpoints and pictures beside the index are not needed.
    """
    by_component: dict[str, list[str]] = {name: [] for name in components(index)}
    wanted = []
    for name in names:
        top, _, rest = name.partition("/")
        if name in (INDEX, MANIFEST):
            wanted.append(name)
        elif rest and top in by_component:
            by_component[top].append(name)
    for files in by_component.values():
        weights = [name for name in files if _is_weight(name)]
        wanted += [name for name in files if not _is_weight(name)]
        chosen = [name for name in weights if ".safetensors" in name] or weights
        plain = [name for name in chosen if _variant(name) is None]
        wanted += [name for name in chosen if variant is not None and _variant(name) == variant] or plain or chosen
    return sorted(wanted)


def digest(folder: Path, index: Mapping[str, Any]) -> str:
    """What the files of a pipeline folder hold, as 32 hex digits; other files beside them do not count.

    Files up to 32 MiB count whole. Of larger safetensors files the header and 1 KiB from the middle of every tensor
    count, of other large files the size and 1 KiB from start, middle and end: seconds instead of minutes, and any
    training or merging changes it.

    Raises:
        ConfigError: a file is not readable.
    """
    total = hashlib.sha256()
    paths = [folder / INDEX]
    for name in sorted(components(index)):
        paths += sorted(path for path in (folder / name).rglob("*") if path.is_file() and not path.name.startswith("."))
    for path in paths:
        try:
            size = path.stat().st_size
            total.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
            total.update(file_digest(path))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    return total.hexdigest()[:32]


def file_digest(path: Path) -> bytes:
    """sha256 of a file up to 32 MiB; of samples of a larger one (see :func:`digest`)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= FULL_HASH_BYTES:
            return hashlib.file_digest(file, "sha256").digest()
        hasher = hashlib.sha256()
        spots = [(0, SAMPLE_BYTES), (size // 2, SAMPLE_BYTES), (size - SAMPLE_BYTES, SAMPLE_BYTES)]
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(8), "little")
            if 2 <= length <= size - 8:
                header = file.read(length)
                hasher.update(header)
                spots = _tensor_spots(header, 8 + length) or spots
        for start, count in spots:
            file.seek(start)
            hasher.update(file.read(count))
    return hasher.digest()


def adapter_identity(files: ModelFiles) -> str:
    """What tells one LoRA from another: name and commit of a hub repository, or the digest of local files."""
    if files.hub:
        return f"{files.name}@{files.revision}"
    path = _folder(files)
    if path.is_file():
        return file_digest(path).hex()[:32]
    hasher = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        hasher.update(file.name.encode() + b"\0" + file_digest(file))
    return hasher.hexdigest()[:32]


def _tensor_spots(header: bytes, start: int) -> list[tuple[int, int]]:
    try:
        entries = json.loads(header)
        offsets = sorted(entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    spots = []
    for begin, end in offsets:
        count = min(SAMPLE_BYTES, end - begin)
        spots.append((start + begin + (end - begin - count) // 2, count))
    return spots


def _is_weight(name: str) -> bool:
    return name.endswith(WEIGHTS) or bool(re.search(r"\.(safetensors|bin)(\.[\w-]+)?\.index(\.[\w-]+)?\.json$", name))


def _variant(name: str) -> str | None:
    """``fp16`` of ``model.fp16.safetensors``, ``model.fp16-00001-of-00002.safetensors`` or ``….index.fp16.json``."""
    stem = name.rsplit("/", 1)[-1]
    for pattern in (
        r"\.index\.([\w]+)\.json$",
        r"\.([\w]+)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)$",
        r"-\d{5}-of-\d{5}\.([\w]+)\.(?:safetensors|bin)$",
    ):
        found = re.search(pattern, stem)
        if found:
            return found[1]
    return None


def _slug(repo: str) -> str:
    return repo.replace("/", "--")


def _folder(files: ModelFiles) -> Path:
    assert files.folder is not None
    return files.folder


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "local", "a model from the Hugging Face Hub") from error
    return huggingface_hub


def _unreachable(hub: Any) -> tuple[type[Exception], ...]:
    # HTTPError is the base of the HTTP library's own errors, whichever one the installed hub client uses
    return (hub.errors.HTTPError, OSError, ValueError)


def _with_commit(files: ModelFiles) -> ModelFiles:
    """Turn the branch or tag into a commit: by the Hub, else by what earlier downloads left here."""
    if _COMMIT.fullmatch(files.branch):
        return replace(files, revision=files.branch)
    hub = _hub()
    reason = "only local files are allowed"
    if not files.offline:
        try:
            return replace(files, revision=str(hub.HfApi().model_info(files.name, revision=files.branch).sha))
        except hub.errors.GatedRepoError as error:
            raise ConfigError(
                f"{files.name} is gated: accept its terms at https://huggingface.co/{files.name} and log in with"
                " 'hf auth login' (or set HF_TOKEN)"
            ) from error
        except hub.errors.RevisionNotFoundError as error:
            raise ConfigError(f"{files.name} has no revision {files.branch!r} on the Hub") from error
        except hub.errors.RepositoryNotFoundError as error:
            raise ConfigError(
                f"there is no model {files.name!r} on the Hub (or it is private: 'hf auth login'), and no folder of"
                f" that name here; {BUILTIN} needs neither"
            ) from error
        except _unreachable(hub) as error:
            reason = _first_line(error)
    for path in _refs(files):
        commit = path.read_text("utf-8").strip() if path.is_file() else ""
        if _COMMIT.fullmatch(commit):
            log.info("%s: the Hub was not asked (%s), using commit %s found here", files.name, reason, commit)
            return replace(files, revision=commit, offline=True)
    raise ConfigError(
        f"{files.name}@{files.branch} is not on this machine and the Hub cannot be asked ({reason})."
        f" Tried: the Hub, {', '.join(str(path) for path in _refs(files))}."
        f" Name a local folder, download it where there is a network, or use {BUILTIN}"
    )


def _refs(files: ModelFiles) -> list[Path]:
    """Files that may hold the commit of the branch: ours, then the Hub cache's."""
    cache = files.cache_dir or Path(_hub().constants.HF_HUB_CACHE)
    ours = [] if files.local_dir is None else [files.local_dir / _slug(files.name) / "refs" / files.branch]
    return [*ours, cache / f"models--{_slug(files.name)}" / "refs" / files.branch]


def _complete(files: ModelFiles, variant: str | None) -> Path:
    """The marker, written last, that a commit's files are all there."""
    return _folder(files).parent / "complete" / (f"{files.revision}.{variant}" if variant else files.revision)


def _fetch_one(files: ModelFiles, name: str) -> Path | None:
    """One small file of a hub model, or None where the repository has none."""
    if files.folder is not None and (files.folder / name).is_file():
        return files.folder / name
    hub = _hub()
    try:
        return Path(
            hub.hf_hub_download(
                files.name,
                name,
                revision=files.revision,
                cache_dir=files.cache_dir,
                local_dir=files.folder,
                local_files_only=files.offline,
            )
        )
    except hub.errors.LocalEntryNotFoundError as error:
        if name == MANIFEST and files.offline:
            return None
        raise ConfigError(_cannot_fetch(files, error)) from error
    except hub.errors.EntryNotFoundError:
        return None
    except _unreachable(hub) as error:
        raise ConfigError(_cannot_fetch(files, error)) from error


def _download(files: ModelFiles, index: Mapping[str, Any], variant: str | None) -> Path:
    hub = _hub()
    try:
        patterns: Sequence[str] = [INDEX, MANIFEST, *(f"{name}/*" for name in components(index))]
        if not files.offline:
            listing = hub.HfApi().model_info(files.name, revision=files.revision).siblings or []
            patterns = needed_files((entry.rfilename for entry in listing), index, variant=variant)
            log.info("fetching %d files of %s at %s", len(patterns), files.name, files.revision)
        folder = Path(
            hub.snapshot_download(
                files.name,
                revision=files.revision,
                cache_dir=files.cache_dir,
                local_dir=files.folder,
                allow_patterns=list(patterns),
                local_files_only=files.offline,
            )
        )
    except _unreachable(hub) as error:
        raise ConfigError(_cannot_fetch(files, error)) from error
    if files.folder is not None:
        check_components(folder, index)
        ref = files.folder.parent / "refs" / files.branch
        for path in (ref, _complete(files, variant)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files.revision + "\n", "utf-8")
    return folder


def _cannot_fetch(files: ModelFiles, error: Exception) -> str:
    place = files.folder or files.cache_dir or "the Hub's cache"
    return (
        f"{files.name} at {files.revision} cannot be fetched into {place}"
        f" ({_first_line(error)}). Name a local folder, log in for gated models ('hf auth login'), or use {BUILTIN}"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
