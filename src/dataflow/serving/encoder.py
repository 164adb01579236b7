"""A transformers model that turns pictures, and with CLIP and its kin texts, into vectors."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from dataflow.errors import ConfigError, FatalServingError
from dataflow.serving.diffusers_options import import_library
from dataflow.serving.diffusers_runner import choose_device

FloatArray = npt.NDArray[np.float32]
Fit = Literal["model", "pad"]
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Encoder:
    """One model on one device. Preprocessing may run in several threads, the model runs in one at a time.

    Args:
        folder: of a CLIP, SigLIP or similar model, or of a vision model (DINOv2, ViT, ConvNeXt, …).
        device: ``auto``, ``cpu``, ``cuda:0``, ….
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        fit: ``model``: pictures are prepared as the model's own configuration says (CLIP: the short side resized, the
            middle cut out); ``pad``: the long side resized, the rest filled with black, as HPSv2 does.
        state: weights to load in place of those of the folder, under the model's own names.

    Raises:
        MissingExtraError: torch or transformers are not installed.
        ConfigError: the device is not there, or the model makes no vectors.
        FatalServingError: the model does not load.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: str,
        dtype: str,
        fit: Fit = "model",
        state: Mapping[str, npt.ArrayLike] | None = None,
    ) -> None:
        torch, transformers = import_library("torch"), import_library("transformers")
        self._torch = torch
        self._lock = threading.Lock()
        self._fit = fit
        self.device = choose_device(torch, device)
        self._dtype = getattr(torch, DTYPES[dtype])
        try:
            # transformers warns that it takes its Pillow processors because torchvision is not there: so it should be.
            with quiet(transformers):
                self._model = transformers.AutoModel.from_pretrained(folder, dtype=self._dtype, local_files_only=True)
                self._processor = transformers.AutoImageProcessor.from_pretrained(
                    folder, local_files_only=True, backend="pil"
                )
            if state is not None:
                self._model.load_state_dict({name: torch.from_numpy(np.array(each)) for name, each in state.items()})
            self.reads = hasattr(self._model, "get_text_features")
            self._tokenizer = (
                transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True) if self.reads else None
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise FatalServingError(f"{folder} cannot be loaded as a model of pictures: {error}") from error
        self._model.eval().requires_grad_(False).to(self.device)
        if not hasattr(self._model, "get_image_features") and "pixel_values" not in _forward_names(self._model):
            raise ConfigError(f"{type(self._model).__name__} takes no pictures")

    @property
    def logit_scale(self) -> float:
        """What a contrastive model multiplies its cosines with.

        Raises:
            ConfigError: it has none.
        """
        scale = getattr(self._model, "logit_scale", None)
        if scale is None:
            raise ConfigError(f"{type(self._model).__name__} has no logit scale: it is no CLIP")
        return float(scale.float().exp())

    def prepared(self, picture: Image.Image) -> FloatArray:
        """A picture as the model takes it, (3, height, width)."""
        if self._fit == "pad":
            return self._padded(picture)
        return self._processor(images=picture, return_tensors="np")["pixel_values"][0].astype(np.float32)

    def images(self, pictures: Sequence[FloatArray]) -> FloatArray:
        """Vectors of prepared pictures, (N, d), not of length one."""
        torch = self._torch
        pixels = torch.from_numpy(np.stack(pictures))
        with self._lock, torch.inference_mode():
            pixels = pixels.to(self.device, self._dtype)
            if hasattr(self._model, "get_image_features"):
                found = self._model.get_image_features(pixel_values=pixels)
            else:
                found = self._model(pixel_values=pixels)
            return _vectors(torch, found)

    def texts(self, texts: Sequence[str]) -> tuple[FloatArray, list[int]]:
        """Vectors of texts, (N, d), and how many tokens each has; what is longer than :attr:`longest` is cut.

        Raises:
            ConfigError: the model knows pictures only.
        """
        if self._tokenizer is None:
            raise ConfigError(f"{type(self._model).__name__} reads no texts: name a CLIP")
        torch = self._torch
        lengths = [len(ids) for ids in self._tokenizer(list(texts), verbose=False)["input_ids"]]
        padding = "max_length" if self._model.config.model_type.startswith("siglip") else True
        given = self._tokenizer(
            list(texts), padding=padding, truncation=True, max_length=self.longest, return_tensors="pt"
        )
        with self._lock, torch.inference_mode():
            named = {name: given[name].to(self.device) for name in ("input_ids", "attention_mask") if name in given}
            return _vectors(torch, self._model.get_text_features(**named)), lengths

    @property
    def longest(self) -> int:
        """Most tokens of a text, the marks of beginning and end included."""
        return int(self._model.config.text_config.max_position_embeddings)

    def close(self) -> None:
        """Free the weights."""
        on_gpu = self.device.startswith("cuda")
        del self._model
        if on_gpu:
            self._torch.cuda.empty_cache()

    def _padded(self, picture: Image.Image) -> FloatArray:
        torch = self._torch
        config = self._processor
        side = int((getattr(config, "crop_size", None) or config.size)["height"])
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float()[None] / 255
        scale = side / max(picture.size)
        height, width = round(picture.height * scale), round(picture.width * scale)
        if scale != 1:
            pixels = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
        left, top = (side - width) // 2, (side - height) // 2
        pixels = torch.nn.functional.pad(pixels, (left, side - width - left, top, side - height - top))
        mean, std = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
        return ((pixels[0] - mean) / std).numpy()


def _vectors(torch: Any, output: Any) -> FloatArray:
    if not isinstance(output, torch.Tensor):
        pooled = getattr(output, "pooler_output", None)
        output = output.last_hidden_state[:, 0] if pooled is None else pooled
    return output.flatten(1).float().cpu().numpy()


def _forward_names(model: Any) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


class quiet:  # noqa: N801 - reads as a statement
    """No progress bars and no advice from transformers."""

    def __init__(self, transformers: Any) -> None:
        self._logging = transformers.utils.logging

    def __enter__(self) -> None:
        self._level = self._logging.get_verbosity()
        self._logging.set_verbosity_error()
        self._bar = self._logging.is_progress_bar_enabled()
        self._logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self._logging.set_verbosity(self._level)
        if self._bar:
            self._logging.enable_progress_bar()
