"""Vectors of pictures: made once by a transformers model, kept in a store, read by everything that scores with them."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflow.errors import BadRequestError, ConfigError, FatalServingError, ServingError
from dataflow.serving import transformers_model
from dataflow.serving.diffusers_options import import_library
from dataflow.serving.encoder import Encoder, Fit
from dataflow.serving.pictures import read_picture
from dataflow.serving.scoring import Scored, ScoringServing
from dataflow.serving.transformers_model import Dtype, TransformersServing
from dataflow.types import GenerationRequest
from dataflow.utils.vectors import FACTS, VectorStore

BUILTIN = "builtin:tiny-clip"
VERSION = 1
"""To be raised when the same picture comes to have another vector."""

Vector = npt.NDArray[np.float32]


class EmbeddingServing(TransformersServing, ScoringServing):
    """Makes vectors of pictures with any vision model of transformers: CLIP, SigLIP, DINOv2, ViT, ConvNeXt, ….

    An answer is ``{"sha256", "store"}``: under which key the vector lies in which folder of ``vectors``. A picture
    whose vector is there already is not even decoded.

    Args:
        hf_model_name_or_path: a folder, a hub id (``facebook/dinov2-base``), or None for the built-in tiny CLIP.
        vectors: folder of the vector stores, one for each model; None keeps no vectors.
        batch_size: pictures per call.
        revision: branch, tag or commit of a hub model.
        hf_cache_dir: the Hub's cache.
        local_files_only: never ask the Hub.
        device: ``auto`` (every CUDA device, else MPS, else CPU), a device, or a list of devices, one copy on each.
        dtype: ``fp32``, ``bf16`` or ``fp16``; published scores were computed in ``fp32``.
        threads: of decoding and preparing pictures; None for as many as there are cores.

    Raises:
        ConfigError: a value that can never work; from the other methods, a model that cannot be used.
    """

    concurrency = 2
    """One batch is decoded while another is in the model."""
    kind = "embedding"
    version = 1
    fit: Fit = "model"

    def __init__(
        self,
        hf_model_name_or_path: str | os.PathLike[str] | None = None,
        *,
        vectors: str | os.PathLike[str] | None = None,
        batch_size: int = 32,
        revision: str | None = None,
        hf_cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        device: str | Sequence[str] = "auto",
        dtype: Dtype = "fp32",
        threads: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be a whole number from 1, got {batch_size!r}")
        self.batch_size = batch_size
        self.vectors = None if vectors is None else os.fspath(vectors)
        self.threads = threads or os.cpu_count() or 1
        self._name(
            hf_model_name_or_path or BUILTIN,
            revision=revision,
            hf_cache_dir=hf_cache_dir,
            local_files_only=local_files_only,
            device=device,
            dtype=dtype,
        )

    def _forget(self) -> None:
        super()._forget()
        self._identity: dict[str, Any] | None = None
        self._encoder: Encoder | None = None
        self._store: VectorStore | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    # What the model is -------------------------------------------------------------------------------------------

    def fingerprint(self) -> Mapping[str, Any]:
        """Model, commit or digest of its files, number format, preparation, kind of score and version.

        Raises:
            ConfigError: the model cannot be found.
        """
        return {**self._encoding(), "kind": self.kind, "kind_version": self.version}

    def _encoding(self) -> dict[str, Any]:
        """What makes the vectors what they are."""
        if self._identity is None:
            found = transformers_model.identity(self._located())
            self._identity = {**found, "dtype": self.dtype, "fit": self.fit, "version": VERSION}
        return self._identity

    @property
    def store_name(self) -> str:
        """The folder, in ``vectors``, of this model's store.

        Raises:
            ConfigError: the model cannot be found.
        """
        return hashlib.sha256(json.dumps(self._encoding(), sort_keys=True).encode()).hexdigest()[:16]

    # Work ----------------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Fetch what is missing and load the model.

        Raises:
            ConfigError: the model cannot be found, fetched or used (``MissingExtraError``: without torch).
            FatalServingError: it does not load.
        """
        if self._encoder is not None:
            return
        for name in ("torch", "transformers"):
            import_library(name)
        self._encoder = self._loaded(transformers_model.fetched(self._located()))
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")

    def _loaded(self, folder: Path, state: Mapping[str, Any] | None = None) -> Encoder:
        device = transformers_model.devices(self.device)[0]
        return Encoder(folder, device=device, dtype=self.dtype, fit=self.fit, state=state)

    def cleanup(self) -> None:
        """Free the weights and the threads; vectors stay in their store."""
        if self._pool is not None:
            self._pool.shutdown()
        if self._encoder is not None:
            self._encoder.close()
        if self._store is not None:
            self._store.close()
        self._encoder = self._store = self._pool = None

    def score(self, requests: Sequence[GenerationRequest]) -> list[Scored]:
        """Where each request's first picture has its vector."""
        if self.vectors is None:
            raise FatalServingError("vectors: name the folder that is to hold the vectors")
        found = self.picture_vectors([_first(request) for request in requests])
        name = self.store_name
        return [
            vector if isinstance(vector, ServingError) else {"sha256": request.image_hashes[0], "store": name}
            for request, vector in zip(requests, found, strict=True)
        ]

    def picture_vectors(self, pictures: Sequence[tuple[str, str]]) -> list[Vector | ServingError]:
        """The vector of each picture, shape (d,), or why it has none.

        Args:
            pictures: path and sha256 of each.

        Raises:
            FatalServingError: not set up.
        """
        if self._encoder is None or self._pool is None:
            raise FatalServingError("the serving is not set up: call setup() before generate()")
        paths = {digest: path for path, digest in pictures}
        known = self._found(list(paths))
        missing = [digest for digest in paths if digest not in known]
        prepared: dict[str, Vector] = {}
        files = [paths[digest] for digest in missing]
        for digest, result in zip(missing, self._pool.map(self._prepared, files, missing), strict=True):
            if isinstance(result, BadRequestError):
                known[digest] = result
            else:
                prepared[digest] = result
        if prepared:
            rows = self._encoder.images(list(prepared.values()))
            known |= self._kept(dict(zip(prepared, rows, strict=True)))
        return [known[digest] for _, digest in pictures]

    def _prepared(self, path: str, digest: str) -> Vector | BadRequestError:
        assert self._encoder is not None
        try:
            return self._encoder.prepared(read_picture(path, digest))
        except BadRequestError as error:
            return error
        except ValueError as error:  # a picture so narrow that nothing is left of it
            return BadRequestError(f"{path} cannot be prepared for the model: {error}", reason="not_applicable")

    def _found(self, digests: Sequence[str]) -> dict[str, Vector | ServingError]:
        with self._lock:
            if self.vectors is None:
                return {}
            folder = Path(self.vectors, self.store_name)
            if self._store is None and (folder / FACTS).is_file():
                self._store = VectorStore(folder)
            vectors = [] if self._store is None else self._store.find(digests)
            return {digest: row for digest, row in zip(digests, vectors, strict=False) if row is not None}

    def _kept(self, rows: Mapping[str, Vector]) -> dict[str, Vector | ServingError]:
        whole = {digest: row for digest, row in rows.items() if np.isfinite(row).all() and row.any()}
        lost = ServingError("the model made no vector of this picture", reason="no_vector")
        if whole and self.vectors is not None:
            with self._lock:
                if self._store is None:
                    size = len(next(iter(whole.values())))
                    self._store = VectorStore(Path(self.vectors, self.store_name), size)
                self._store.add(list(whole), np.stack(list(whole.values())))
        return {digest: whole.get(digest, lost) for digest in rows}


def _first(request: GenerationRequest) -> tuple[str, str]:
    return request.images[0], request.image_hashes[0]
