"""Prompts encoded once: embeddings kept per prompt, and text encoders that leave the device while nobody needs them.

A pipeline encodes the prompts of every call anew, though seeds and models are tried on the same prompts again and
again, and its text encoders sit beside the denoiser all the time (FLUX.1's T5 alone takes 9.5 GB). Here its
``encode_prompt`` is stood in for by :class:`PromptCache`: the pipeline's own code goes on as it is, and the embeddings
it is handed are those its own encoders made.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from dataflow.errors import ConfigError
from dataflow.serving.capabilities import Encoded
from dataflow.serving.diffusers_options import import_library

_PER_PROMPT = ("prompt", "negative_prompt")
"""Arguments of ``encode_prompt`` with a value for each prompt of the call."""

Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Asked:
    """One call of ``encode_prompt``, taken apart.

    Attributes:
        common: arguments that all prompts share.
        rows: for each prompt, its own arguments.
        key: the common arguments as something to look up by.
    """

    common: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    key: Key

    def keys(self) -> list[Key]:
        return [(*self.key, *row.items()) for row in self.rows]


@dataclass(slots=True)
class _Kept:
    """What ``encode_prompt`` returned for one prompt, in main memory: tensors with one row, or None."""

    values: tuple[Any, ...]
    size: int


class PromptCache:
    """Stands in for a pipeline's ``encode_prompt``. Not thread-safe, as the pipeline is not.

    Args:
        encode: the pipeline's own method.
        layout: what the values are that it returns.
        limit: bytes of embeddings to keep in main memory; those that were not used longest go first.
        device: where the pipeline wants them.
        encoders: what must be entered to encode.

    Attributes:
        encoded: prompts that were encoded, so far.
        found: prompts that were not, because they were known.
    """

    def __init__(
        self,
        encode: Callable[..., Any],
        layout: Sequence[Encoded],
        *,
        limit: int,
        device: str,
        encoders: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._encode, self._layout, self._limit, self._device = encode, tuple(layout), limit, device
        self._encoders = encoders
        self._signature = inspect.signature(encode)
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()
        self._bytes = 0
        self.encoded = self.found = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As ``encode_prompt``; prompts that are not known are encoded together."""
        asked = self._taken_apart(args, kwargs)
        if asked is None:
            with self._encoders():
                return self._encode(*args, **kwargs)
        keys = asked.keys()
        missing = [key for key in dict.fromkeys(keys) if key not in self._kept]
        self.encoded, self.found = self.encoded + len(missing), self.found + len(keys) - len(missing)
        known: dict[Key, _Kept] = {}
        for key in keys:
            if key in self._kept:
                self._kept.move_to_end(key)
                known[key] = self._kept[key]
        if missing:
            values = self._encoded(asked, [keys.index(key) for key in missing])
            known.update(zip(missing, self._split(values, len(missing)), strict=True))
            for key in missing:
                self._keep(key, known[key])
            if missing == keys:
                return values
        return self._joined([known[key] for key in keys])

    def _taken_apart(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Asked | None:
        """None for a call that has more to it than texts: it is left to the pipeline."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        prompts = given.pop("prompt")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, list) or given.get("num_images_per_prompt", 1) != 1:
            return None
        rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
        negative = given.get("negative_prompt")
        if isinstance(negative, str):
            negative = [negative] * len(rows)
        if isinstance(negative, list):
            if len(negative) != len(rows):
                return None
            del given["negative_prompt"]
            rows = [{**row, "negative_prompt": text} for row, text in zip(rows, negative, strict=True)]
        key = []
        for name, value in sorted(given.items()):
            # a second prompt would have to be dealt out, too; embeddings and pictures are not looked up by
            if (name.startswith(_PER_PROMPT) and name != "negative_prompt" and value is not None) or not _plain(value):
                return None
            key.append((name, str(value)))
        return _Asked(given, rows, tuple(key))

    def _encoded(self, asked: _Asked, places: Sequence[int]) -> tuple[Any, ...]:
        own = {name: [asked.rows[place][name] for place in places] for name in asked.rows[0]}
        with self._encoders():
            values = self._encode(**asked.common, **own)
        if len(values) != len(self._layout):
            raise ConfigError(
                f"encode_prompt() of the installed diffusers returns {len(values)} values, not {len(self._layout)}:"
                " prompt_cache_mb=0 leaves it to the pipeline"
            )
        return values

    def _split(self, values: Sequence[Any], count: int) -> list[_Kept]:
        torch = import_library("torch")
        mask = next((value for value, kind in zip(values, self._layout, strict=True) if kind == "mask"), None)
        lengths = [None] * count if mask is None else mask.sum(dim=1).tolist()
        found = []
        for row, length in enumerate(lengths):
            own = []
            for value, kind in zip(values, self._layout, strict=True):
                if value is None or kind == "mask":
                    own.append(None)
                    continue
                # cut to their own length, or a short prompt would take the place of its longest neighbour
                own.append(value if kind == "shared" else value[row : row + 1, : length if kind == "ragged" else None])
            with torch.no_grad():
                own = [None if value is None else value.detach().to("cpu", copy=True) for value in own]
            found.append(_Kept(tuple(own), sum(value.nbytes for value in own if value is not None)))
        return found

    def _joined(self, rows: Sequence[_Kept]) -> tuple[Any, ...]:
        torch = import_library("torch")
        mask, values = None, []
        for place, kind in enumerate(self._layout):
            each = [row.values[place] for row in rows]
            if kind == "mask" or each[0] is None:
                values.append(mask if kind == "mask" else None)
                continue
            if kind == "shared":
                values.append(each[0].to(self._device))
                continue
            if kind == "ragged":
                lengths = [value.shape[1] for value in each]
                longest = max(lengths)
                each = [_padded(torch, value, longest) for value in each]
                if min(lengths) < longest:
                    ones = [[1] * length + [0] * (longest - length) for length in lengths]
                    mask = torch.tensor(ones, dtype=torch.long, device=self._device)
            values.append(torch.cat(each).to(self._device))
        return tuple(values)

    def _keep(self, key: Key, kept: _Kept) -> None:
        if kept.size > self._limit:
            return
        self._kept[key] = kept
        self._bytes += kept.size
        while self._bytes > self._limit:
            self._bytes -= self._kept.popitem(last=False)[1].size


class ParkedEncoders:
    """The text encoders of a pipeline, in main memory; on the device only while prompts are encoded.

    While they are away the pipeline has none, as if it had been loaded for ready-made embeddings: else it would take
    the device of the first of them for its own.

    Args:
        pipe: a pipeline whose encoders are not on the device yet.
        device: where to encode.

    Raises:
        ConfigError: the encoders are quantized, and stay where they are.
    """

    def __init__(self, pipe: Any, device: str) -> None:
        torch = import_library("torch")
        self._pipe, self._device = pipe, device
        self._encoders = {
            name: module
            for name, module in pipe.components.items()
            if name.startswith("text_encoder") and isinstance(module, torch.nn.Module)
        }
        for name, module in self._encoders.items():
            if getattr(module, "is_quantized", False):
                raise ConfigError(f"text_encoders='offload': {name} is quantized and cannot be moved")
            for tensor in _tensors(module):
                # page-locked memory is read by the device itself, at several times the speed
                tensor.data = tensor.data.pin_memory() if device.startswith("cuda") else tensor.data.cpu()
        self._leave()

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """The encoders, in the pipeline and on the device, for as long as this lasts."""
        places = [(tensor, tensor.data) for module in self._encoders.values() for tensor in _tensors(module)]
        try:
            for tensor, data in places:
                tensor.data = data.to(self._device, non_blocking=True, copy=True)
            for name, module in self._encoders.items():
                setattr(self._pipe, name, module)
            yield
        finally:
            # nothing has changed in them: what lies in main memory need not be copied back
            for tensor, data in places:
                tensor.data = data
            self._leave()

    def _leave(self) -> None:
        for name in self._encoders:
            setattr(self._pipe, name, None)


def _tensors(module: Any) -> Iterator[Any]:
    yield from module.parameters()
    yield from module.buffers()


def _padded(torch: Any, row: Any, length: int) -> Any:
    if row.shape[1] == length:
        return row
    return torch.cat([row, row.new_zeros(1, length - row.shape[1], *row.shape[2:])], dim=1)


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(each, str | int | float) for each in value)
    if value is None or isinstance(value, str | int | float):
        return True
    torch = import_library("torch")
    return isinstance(value, torch.device | torch.dtype)
