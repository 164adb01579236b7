"""How much of a picture an edit left as it was: pixel by pixel, by structure, and as it looks."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataflow.decoding import normalise
from dataflow.errors import BadRequestError, ConfigError
from dataflow.metrics import fidelity
from dataflow.metrics.fidelity import Mask, Picture
from dataflow.metrics.perceptual import Dists, Lpips, Network
from dataflow.serving import model_files, transformers_model
from dataflow.serving.diffusers_options import import_library
from dataflow.serving.diffusers_runner import choose_device
from dataflow.serving.pictures import input_bytes, read_picture
from dataflow.serving.scoring import Scored, ScoringServing
from dataflow.types import GenerationRequest, Serving

VERSION = 1
"""To be raised when a figure changes its meaning: then everything is measured again."""

PSNR_CEILING = 100.0
"""Decibels of equal pictures, which have infinitely many; noise of one bit in 8 has 48."""

_DISTS_SIDE = 256
_WHITE = 128

Measure = Callable[[Picture, Picture, Mask | None], float]


class PreservationServing(ScoringServing):
    """Measures how far a request's second picture, the edited one, is from its first, the source.

    An answer is ``{"psnr", "ssim", "l1", "l2", "lpips", "dists", "resized", "unedited"}``, over the whole picture.
    ``unedited`` is the same over what a mask says should not change, with ``share``, the part of the picture that this
    is, 0 to 1; without a mask it is null. ``psnr`` (decibels, 100 at most) and ``ssim`` (-1 to 1): higher is better;
    ``l1``, ``l2`` (mean absolute and squared difference, 0 to 1), ``lpips`` and ``dists``: lower is better. ``lpips``
    and ``dists`` are there only where weights are given. A figure is null where the picture, or the region, is too
    small for it: ``ssim`` needs a window of 11 x 11 pixels, ``lpips`` 31 (alex) or 16 (vgg) pixels either way,
    ``dists`` 16.

    An edited picture of another size is brought to the source's with Pillow's bicubic filter, the aspect not kept, as
    MagicBrush does; ``resized`` says so. A mask is white where the picture may change, as diffusers has it, or, where
    it has transparency, transparent there, as OpenAI's Images API has it; the middle between both decides, and one of
    another size is resized to the source's, nearest neighbour. A mask that leaves nothing gives no score
    (``not_applicable``).

    Over the unedited region:

    - ``psnr``, ``l1``, ``l2``: the mean over its pixels;
    - ``ssim``: the mean of SSIM's map over windows that lie wholly in it, so that no changed pixel has a part in it;
    - ``lpips``, ``dists``: of the source and the edited picture with the source's pixels where it may change. They are
      of the whole picture and shrink with ``share``. PIE-Bench (arXiv:2310.01506) blackens the region in both pictures,
      which gives the network an edge that is in neither.

    DISTS is computed as its authors do: pictures whose shorter side is over 256 pixels are brought to that, bilinear.

    Args:
        lpips_weights: file of LPIPS's network, see :mod:`dataflow.metrics.perceptual`; None for no LPIPS.
        lpips_network: ``alex``, as its authors advise, or ``vgg``.
        lpips_heads: file of its heads, where ``lpips_weights`` has none.
        dists_weights: file of VGG16; None for no DISTS.
        dists_mixing: file with the weights of DISTS; goes with ``dists_weights``.
        batch_size: pairs per call.
        concurrency: calls at once, each in a thread; None for as many as there are cores.
        device: where the networks run: ``auto`` (every CUDA device, else MPS, else CPU), a device, or a list of
            devices, one copy on each.

    Raises:
        ConfigError: a value that can never work; from the other methods, a file of weights that cannot be used.
    """

    masks = True
    num_cpus = None

    def __init__(
        self,
        *,
        lpips_weights: str | os.PathLike[str] | None = None,
        lpips_network: Network = "alex",
        lpips_heads: str | os.PathLike[str] | None = None,
        dists_weights: str | os.PathLike[str] | None = None,
        dists_mixing: str | os.PathLike[str] | None = None,
        batch_size: int = 8,
        concurrency: int | None = None,
        device: str | Sequence[str] = "auto",
    ) -> None:
        if lpips_network not in ("alex", "vgg"):
            raise ConfigError(f"lpips_network must be alex or vgg, got {lpips_network!r}")
        if lpips_heads is not None and lpips_weights is None:
            raise ConfigError("lpips_heads go with lpips_weights")
        if (dists_weights is None) != (dists_mixing is None):
            raise ConfigError("dists_weights and dists_mixing go together")
        self.lpips_weights, self.lpips_heads = _path(lpips_weights), _path(lpips_heads)
        self.lpips_network: Network = lpips_network
        self.dists_weights, self.dists_mixing = _path(dists_weights), _path(dists_mixing)
        self.batch_size = batch_size
        self.concurrency = concurrency or os.cpu_count() or 1
        self.device = device if isinstance(device, str) else tuple(device)
        self.num_gpus = transformers_model.gpus_of_copy(device) if self._files else 0.0
        self._networks: dict[str, Measure] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The settings alone."""
        return {**self.__dict__, "_networks": None}

    @property
    def _files(self) -> dict[str, str]:
        files = {
            "lpips_weights": self.lpips_weights,
            "lpips_heads": self.lpips_heads,
            "dists_weights": self.dists_weights,
            "dists_mixing": self.dists_mixing,
        }
        return {name: path for name, path in files.items() if path is not None}

    def fingerprint(self) -> Mapping[str, Any]:
        """The kind of measurement, its version, and a digest of each file of weights.

        Raises:
            ConfigError: a file cannot be read.
        """
        network = {"lpips_network": self.lpips_network} if self.lpips_weights is not None else {}
        digests = {name: _digest(path) for name, path in self._files.items()}
        return {"model": "preservation", "version": VERSION, **network, **digests}

    def check(self, request: GenerationRequest) -> None:
        """Raise BadRequestError unless there are two pictures."""
        if len(request.images) != 2:
            raise BadRequestError(
                f"an edited picture is compared with its source, there are {len(request.images)} pictures",
                reason="not_applicable",
            )

    def replicas(self) -> Sequence[Serving]:
        """One copy per device, where there are networks to run."""
        devices = transformers_model.devices(self.device) if self._files else ()
        if len(devices) < 2:
            return [self]
        twins = [copy.copy(self) for _ in devices]
        for twin, device in zip(twins, devices, strict=True):
            twin.device = device
        return twins

    def setup(self) -> None:
        """Find the libraries and load the networks.

        Raises:
            ConfigError: the device is not there (``MissingExtraError``: a library is not installed).
            InputError: a file does not hold the weights it should.
        """
        tile = np.zeros((16, 16, 3), np.uint8)
        fidelity.ssim(tile, tile)
        if self._networks is not None:
            return
        self._networks = self._loaded() if self._files else {}

    def _loaded(self) -> dict[str, Measure]:
        networks: dict[str, Measure] = {}
        device = choose_device(import_library("torch"), transformers_model.devices(self.device)[0])
        if self.lpips_weights is not None:
            lpips = Lpips(self.lpips_weights, self.lpips_network, self.lpips_heads, device).setup()
            networks["lpips"] = _composed(lpips)
        if self.dists_weights is not None and self.dists_mixing is not None:
            dists = Dists(self.dists_weights, self.dists_mixing, device).setup()
            networks["dists"] = _composed(lambda first, second: dists(_to_dists(first), _to_dists(second)))
        return networks

    def cleanup(self) -> None:
        """Free the weights."""
        self._networks = None

    def score(self, requests: Sequence[GenerationRequest]) -> list[Scored]:
        """The measurements of each request's two pictures."""
        return [self._scored(request) for request in requests]

    def _scored(self, request: GenerationRequest) -> Scored:
        try:
            source, edited = (np.asarray(read_picture(path).convert("RGB")) for path in request.images)
            kept = None if request.mask is None else ~may_change(request.mask, source.shape[:2])
        except BadRequestError as error:
            return error
        if kept is not None and not kept.any():
            return BadRequestError("the mask leaves nothing that should not change", reason="not_applicable")
        resized = edited.shape != source.shape
        edited = fidelity.resized_like(edited, source)
        unedited = None
        if kept is not None:
            unedited = {**self._measured(source, edited, kept), "share": float(kept.mean())}
        return {**self._measured(source, edited, None), "resized": resized, "unedited": unedited}

    def _measured(self, source: Picture, edited: Picture, kept: Mask | None) -> dict[str, float | None]:
        assert self._networks is not None
        measures: dict[str, Measure] = {
            "psnr": lambda first, second, mask: fidelity.psnr(first, second, mask, ceiling=PSNR_CEILING),
            "ssim": fidelity.ssim,
            "l1": fidelity.l1,
            "l2": fidelity.l2,
            **self._networks,
        }
        found: dict[str, float | None] = {}
        for name, measure in measures.items():
            try:
                found[name] = measure(source, edited, kept)
            except ValueError:  # too small: the pictures are of one size and type, and the mask is not empty
                found[name] = None
        return found


def may_change(path: str, size: tuple[int, int]) -> Mask:
    """What a mask says of each pixel of a picture.

    Args:
        path: of a picture, white where a change is wanted; or one with transparency, transparent there.
        size: (height, width) of the picture that it is of.

    Returns:
        bool, (height, width): True where the picture may change.

    Raises:
        BadRequestError: it cannot be read.
    """
    read_picture(path)  # refuses what is no whole, harmless picture, and lays transparency over white
    with Image.open(BytesIO(input_bytes(path))) as file:
        mask = normalise(file, path, keep_alpha=True)
    plane = mask.getchannel("A") if mask.mode == "RGBA" else mask.convert("L")
    height, width = size
    values = np.asarray(plane.resize((width, height), Image.Resampling.NEAREST))
    return values < _WHITE if mask.mode == "RGBA" else values >= _WHITE


def _composed(distance: Callable[[Picture, Picture], Any]) -> Measure:
    """A network's distance, with the source's pixels where the edited picture may change."""

    def measured(source: Picture, edited: Picture, kept: Mask | None) -> float:
        shown = edited if kept is None else np.where(kept[..., None], edited, source)
        # Pillow's pixels are read-only, and torch warns of such arrays.
        return float(distance(np.array(source), np.array(shown))[0])

    return measured


def _to_dists(picture: Picture) -> Picture:
    """In the size in which DISTS was fitted to human ratings."""
    height, width = picture.shape[:2]
    shorter = min(height, width)
    if shorter <= _DISTS_SIDE:
        return picture
    size = (_DISTS_SIDE * width // shorter, _DISTS_SIDE * height // shorter)
    return np.array(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))


def _path(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.fspath(path)


def _digest(path: str) -> str:
    try:
        return model_files.file_digest(Path(path)).hex()[:32]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
