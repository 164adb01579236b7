"""Quality of pictures without a reference, by any metric of pyiqa: a plug-in that users install themselves."""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from dataflow.errors import BadRequestError, ConfigError, FatalServingError, OutOfMemoryError, ServingError
from dataflow.serving.pictures import read_picture
from dataflow.serving.scoring import Scored, ScoringServing
from dataflow.serving.transformers_model import gpus_of_copy
from dataflow.types import GenerationRequest

VERSION = 1
"""To be raised when the same picture comes to have another score."""

_OF_DATA_SETS = ("fid", "inception_score")
_LICENCE = "PolyForm-Noncommercial-1.0.0"


class PyiqaServing(ScoringServing):
    """A no-reference metric of pyiqa (``musiq``, ``clipiqa``, ``niqe``, ``brisque``, ``maniqa``, ``topiq_nr``, …).

    **Licence.** pyiqa is licensed under PolyForm-Noncommercial-1.0.0, parts of it under the S-Lab licence: neither
    allows commercial use. It is no part of this package and none of its extras installs it. Whoever uses it says with
    ``accept_noncommercial_licence=True`` that they may.

    Install ``pyiqa`` together with the torchvision that belongs to your torch; most metrics fetch their weights when
    they are first used.

    An answer is ``{"value", "lower_better"}``: the score on the metric's own scale, and whether a lower one is better.

    Args:
        metric_name: as ``pyiqa.list_models("NR")`` names it.
        accept_noncommercial_licence: that you have read pyiqa's licence and may use it.
        device: ``cpu``, ``cuda``, ``cuda:1``, …; None for pyiqa's choice, a GPU where there is one.

    Raises:
        ConfigError: the licence is not accepted; from the other methods, pyiqa cannot be imported, or there is no such
            metric.
    """

    concurrency = 2
    """One picture is decoded while another is measured: pictures have different sizes, so there are no batches."""
    num_cpus = None

    def __init__(
        self, metric_name: str, *, accept_noncommercial_licence: bool = False, device: str | None = None
    ) -> None:
        if accept_noncommercial_licence is not True:
            raise ConfigError(
                f"pyiqa may be used for noncommercial purposes only ({_LICENCE}); if yours are, say so with "
                "accept_noncommercial_licence=True"
            )
        self.metric_name = metric_name
        self.accept_noncommercial_licence = True
        self.device = device
        self.num_gpus = gpus_of_copy(device or "auto")
        self._forget()

    def _forget(self) -> None:
        self._metric: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """The settings alone."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def fingerprint(self) -> Mapping[str, Any]:
        """The metric and the version of pyiqa, which names its weights and preparation.

        Raises:
            ConfigError: pyiqa is not installed.
        """
        try:
            package = metadata.version("pyiqa")
        except ImportError as error:
            raise _unusable(error) from error
        return {"model": f"pyiqa/{self.metric_name}", "pyiqa": package, "version": VERSION}

    def setup(self) -> None:
        """Load the metric; pyiqa fetches its weights.

        Raises:
            ConfigError: pyiqa cannot be imported, or has no such metric of single pictures.
            FatalServingError: the metric does not load.
        """
        if self._metric is not None:
            return
        try:
            pyiqa = importlib.import_module("pyiqa")
        except (ImportError, OSError, RuntimeError) as error:  # a torchvision that does not fit raises any of them
            raise _unusable(error) from error
        known = [name for name in pyiqa.list_models("NR") if not name.startswith(_OF_DATA_SETS)]
        if self.metric_name not in known:
            raise ConfigError(
                f"pyiqa has no metric {self.metric_name!r} of single pictures without a reference, only "
                f"{', '.join(known)}"
            )
        try:
            self._metric = pyiqa.create_metric(self.metric_name, device=self.device)
        except Exception as error:
            raise FatalServingError(f"pyiqa's {self.metric_name} does not load: {error}") from error

    def cleanup(self) -> None:
        """Free the weights."""
        self._metric = None

    def score(self, requests: Sequence[GenerationRequest]) -> list[Scored]:
        """The quality of each request's first picture.

        Raises:
            FatalServingError: not set up.
        """
        if self._metric is None:
            raise FatalServingError("the serving is not set up: call setup() before generate()")
        return [self._scored(request.images[0]) for request in requests]

    def _scored(self, path: str) -> Scored:
        import torch

        try:
            pixels = np.array(read_picture(path), dtype=np.uint8)
        except BadRequestError as error:
            return error
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(torch.float32) / 255
        try:
            with self._lock, torch.no_grad():
                value = float(self._metric(tensor))
        except torch.OutOfMemoryError as error:
            return OutOfMemoryError(str(error))
        except Exception as error:  # noqa: BLE001 - what a metric raises about one picture is that picture's failure
            return ServingError(f"pyiqa's {self.metric_name} cannot measure {path}: {error}", reason="no_score")
        if not math.isfinite(value):
            return ServingError(f"pyiqa's {self.metric_name} gave {value}", reason="no_score")
        return {"value": value, "lower_better": bool(self._metric.lower_better)}


def _unusable(error: Exception) -> ConfigError:
    return ConfigError(
        f"pyiqa cannot be imported ({error}). It is not part of this package's extras, its licence is {_LICENCE}: "
        "pip install pyiqa, and the torchvision that belongs to your torch"
    )
