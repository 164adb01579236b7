"""The words in a picture, read by an OCR on this machine, and how they compare with the words that should be there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataflow.errors import BadRequestError, ConfigError, FatalServingError, MissingExtraError, ServingError
from dataflow.metrics import text_rendering
from dataflow.metrics.text_rendering import Unit, normalise, tokens
from dataflow.serving.model_files import file_digest
from dataflow.serving.pictures import read_picture
from dataflow.serving.scoring import Scored, ScoringServing
from dataflow.types import GenerationRequest

VERSION = 1
"""To be raised when the same picture comes to have another reading or another score."""

Box = tuple[int, int, int, int]

_MODELS = {
    "Det": "PP-OCRv6_det_small.onnx",
    "Cls": "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
    "Rec": "PP-OCRv6_rec_small.onnx",
}
_LEAST_SIDE = 32
_SLIMMEST = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of text in a picture.

    Attributes:
        text: as it was read.
        score: the recogniser's confidence, 0..1, higher is better.
        box: x0, y0, x1, y1 in pixels of the upright picture: the upright rectangle around it.
    """

    text: str
    score: float
    box: Box


class OcrServing(ScoringServing):
    """Reads the text in pictures with RapidOCR's PP-OCRv6 models, which come with its package (Apache-2.0).

    An answer is ``{"text", "lines", "line_count", "area"}``: all lines joined by line breaks; each line as
    ``{"text", "score", "box"}`` (see :class:`Line`), rows from top to bottom and a row's pieces from left to right;
    how many there are; and which share of the picture their boxes cover, 0..1. A picture in which nothing is read has
    the text "": that is a reading, not an error.

    A request with a prompt is also compared with it. The prompt is the text that should stand in the picture and
    nothing else, so ``ImageEvaluator(serving, with_prompt=True)`` gets the column of that text as its
    ``input_conversation_key``. Texts are compared as :func:`~dataflow.metrics.text_rendering.normalise` leaves them,
    in words, or in characters where the prompt has a Chinese one:

    - ``word_recall``: share of the words asked for that occur in the reading at all; 0..1, higher is better.
    - ``multiset_recall``: the same, each occurrence counted once, LongText-Bench's score; 0..1, higher is better.
    - ``ned``: edit distance over the longer text's length; 0..1, lower is better. Benchmarks that report a NED of which
      higher is better report 1 minus this.
    - ``gned``: words matched one to one in any order, missing and surplus ones counted; 0..1, lower is better.
    - ``exact``: 1 where both texts are the same, else 0.
    - ``wanted``: how many words were asked for, the weight of each recall in a micro-average.

    A prompt in which nothing is left to compare, or with signs that the recogniser does not know (it reads Chinese,
    Japanese and most of the Latin script), gets no score (``not_applicable``): a recall of 0 would be the OCR's and not
    the picture's. Columns of text are read across.

    Args:
        longest_side: larger pictures are made this large before they are read, in pixels; more reads finer print, in
            time that grows with the number of pixels.
        least_confidence: lines below it are left out, 0..1.
        recogniser: ONNX file of another PP-OCR recogniser for RapidOCR, for other scripts.
        batch_size: pictures per call.
        concurrency: calls at once, each in a thread, all with one copy of the models; None for one per core.
        threads: of one call, in the models.

    Raises:
        ConfigError: a value that can never work; from the other methods, a recogniser that cannot be used
            (``MissingExtraError``: without rapidocr).
    """

    num_cpus = None

    def __init__(
        self,
        *,
        longest_side: int = 1280,
        least_confidence: float = 0.5,
        recogniser: str | os.PathLike[str] | None = None,
        batch_size: int = 1,
        concurrency: int | None = None,
        threads: int = 1,
    ) -> None:
        if longest_side < _LEAST_SIDE:
            raise ConfigError(f"longest_side must be a whole number from {_LEAST_SIDE}, got {longest_side!r}")
        if not 0 <= least_confidence <= 1:
            raise ConfigError(f"least_confidence must be from 0 to 1, got {least_confidence!r}")
        if min(batch_size, threads) < 1:
            raise ConfigError(f"batch_size and threads must be whole numbers from 1, got {batch_size!r}, {threads!r}")
        self.longest_side = longest_side
        self.least_confidence = least_confidence
        self.recogniser = None if recogniser is None else os.fspath(recogniser)
        self.batch_size = batch_size
        self.concurrency = concurrency or os.cpu_count() or 1
        self.threads = threads
        self._forget()

    def _forget(self) -> None:
        self._identity: dict[str, str] | None = None
        self._engine: Any = None
        self._signs: frozenset[str] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        """The settings alone."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def fingerprint(self) -> Mapping[str, Any]:
        """RapidOCR's version, digests of the models, how pictures are prepared, and the version of the scores.

        Raises:
            ConfigError: the models cannot be found.
        """
        if self._identity is None:
            files = self._files()
            self._identity = {name: file_digest(path).hex()[:32] for name, path in files.items()}
        return {
            "model": "rapidocr",
            "rapidocr": metadata.version("rapidocr"),
            "weights": self._identity,
            "longest_side": self.longest_side,
            "least_confidence": self.least_confidence,
            "version": VERSION,
        }

    def check(self, request: GenerationRequest) -> None:
        """Raise BadRequestError for a prompt without a letter or digit in it."""
        if request.prompt and not tokens(normalise(request.prompt)):
            raise BadRequestError(f"no text to look for in {request.prompt!r}", reason="not_applicable")

    def setup(self) -> None:
        """Load the models.

        Raises:
            ConfigError: they cannot be found, or the recogniser does not say which signs it knows.
            FatalServingError: they do not load.
        """
        if self._engine is not None:
            return
        files = self._files()
        try:
            import onnxruntime
            from rapidocr import RapidOCR
        except ImportError as error:
            raise _missing() from error
        params = {f"{part}.model_path": str(path) for part, path in files.items()}
        params |= {
            "Global.log_level": "error",  # it warns of every picture without text
            "Global.text_score": self.least_confidence,
            # Its own preparation blows pictures with one very short side up to gigabytes: _canvas does it here.
            "Global.use_preprocess_img": False,
            "Global.use_vertical_padding": False,
            "EngineConfig.onnxruntime.intra_op_num_threads": self.threads,
        }
        try:
            session = onnxruntime.InferenceSession(files["Rec"], providers=["CPUExecutionProvider"])
            signs = session.get_modelmeta().custom_metadata_map.get("character")
            if not signs:
                raise ConfigError(f"{files['Rec']} does not say which signs it knows: it has no entry 'character'")
            self._signs = frozenset(normalise(signs))
            engine = RapidOCR(params=params)
            # It loads on first use: the recogniser, then the detector.
            nothing = Image.new("RGB", (3 * _LEAST_SIDE, _LEAST_SIDE))
            engine(nothing, use_det=False)
            engine(nothing, use_det=True)
        except ConfigError:
            raise
        except Exception as error:
            raise FatalServingError(f"the OCR does not load: {error}") from error
        self._engine = engine

    def cleanup(self) -> None:
        """Free the models."""
        self._engine = None

    def score(self, requests: Sequence[GenerationRequest]) -> list[Scored]:
        """The reading of each request's first picture, compared with its prompt where it has one.

        Raises:
            FatalServingError: not set up.
        """
        if self._engine is None:
            raise FatalServingError("the serving is not set up: call setup() before generate()")
        return [self._scored(request) for request in requests]

    def _scored(self, request: GenerationRequest) -> Scored:
        try:
            self._readable(request.prompt)
            picture = read_picture(request.images[0])
        except ServingError as error:
            return error
        lines = self._read(picture)
        text = "\n".join(line.text for line in lines)
        found: dict[str, Any] = {
            "text": text,
            "lines": [{"text": line.text, "score": line.score, "box": list(line.box)} for line in lines],
            "line_count": len(lines),
            "area": covered([line.box for line in lines], picture.size),
        }
        return {**found, **compared(request.prompt, text)} if request.prompt else found

    def _readable(self, prompt: str) -> None:
        unknown = sorted({sign for sign in normalise(prompt) if not sign.isspace()} - self._signs)
        if unknown:
            shown = " ".join(unknown[:10])
            raise BadRequestError(f"the recogniser does not know {shown}; name another one", reason="not_applicable")

    def _read(self, picture: Image.Image) -> list[Line]:
        canvas, scale, left, top = _canvas(picture, self.longest_side)
        reading = self._engine(canvas)
        if reading.txts is None:
            return []
        low = (np.min(reading.boxes, axis=1) - (left, top)) / scale
        high = (np.max(reading.boxes, axis=1) - (left, top)) / scale
        corners = np.clip(np.rint(np.hstack([low, high])), 0, [*picture.size, *picture.size]).astype(int)
        boxes: list[Box] = [(x0, y0, x1, y1) for x0, y0, x1, y1 in corners.tolist()]
        return [
            Line(text=str(reading.txts[number]), score=round(float(reading.scores[number]), 4), box=boxes[number])
            for number in reading_order(boxes)
        ]

    def _files(self) -> dict[str, Path]:
        """The models' files by RapidOCR's names of their parts. Named, they are never downloaded."""
        spec = find_spec("rapidocr")
        if spec is None or spec.origin is None:
            raise _missing()
        files = {part: Path(spec.origin).parent / "models" / name for part, name in _MODELS.items()}
        if self.recogniser is not None:
            files["Rec"] = Path(self.recogniser).expanduser()
        for path in files.values():
            if not path.is_file():
                raise ConfigError(f"{path}: no such file; rapidocr 3.10 has its models in its package")
        return files


def compared(target: str, reading: str) -> dict[str, float]:
    """What :class:`OcrServing` says of a reading and the text that should be there.

    Args:
        target: the text asked for.
        reading: the text read; line breaks are blanks.

    Returns:
        ``word_recall``, ``multiset_recall`` and ``exact`` (higher is better), ``ned`` and ``gned`` (lower is better),
        all 0..1, and ``wanted``, the number of words or characters asked for.

    Raises:
        ValueError: nothing was asked for.
    """
    unit = _unit(target)
    wanted, read = tokens(normalise(target), unit), tokens(normalise(reading), unit)
    # Where characters count, line breaks and blanks between them do not.
    between = "" if unit == "character" else " "
    one, other = between.join(wanted), between.join(read)
    return {
        "word_recall": text_rendering.word_recall(one, other, unit=unit, normaliser=str).recall,
        "multiset_recall": text_rendering.multiset_recall(one, other, unit=unit, normaliser=str).recall,
        "ned": text_rendering.ned(one, other, normaliser=str),
        "gned": text_rendering.gned(wanted, read, normaliser=str),
        "exact": int(wanted == read),
        "wanted": len(wanted),
    }


def _unit(target: str) -> Unit:
    """What ``auto`` stands for with this text: both texts must be cut alike."""
    return "word" if tokens(f"{normalise(target)} ab")[-1] == "ab" else "character"


def reading_order(boxes: Sequence[Box]) -> list[int]:
    """Indices of boxes, rows from top to bottom and each row from left to right.

    Boxes stand in one row where they share at least half of the height of the higher one. RapidOCR's own order takes
    boxes for one row whose tops are less than 10 pixels apart, which tears large print to pieces and joins small print.
    """
    rows: list[list[int]] = []
    for number in sorted(range(len(boxes)), key=lambda number: boxes[number][1]):
        row = next((row for row in rows if _beside(boxes[row[0]], boxes[number])), None)
        if row is None:
            rows.append([number])
        else:
            row.append(number)
    return [number for row in rows for number in sorted(row, key=lambda number: boxes[number][0])]


def _beside(one: Box, other: Box) -> bool:
    shared = min(one[3], other[3]) - max(one[1], other[1])
    return 2 * shared >= max(one[3] - one[1], other[3] - other[1])


def covered(boxes: Sequence[Box], size: tuple[int, int]) -> float:
    """The share of a picture of ``size`` (width, height) that lies in at least one box, 0..1."""
    inside = np.zeros((size[1], size[0]), dtype=np.bool_)
    for x0, y0, x1, y1 in boxes:
        inside[y0:y1, x0:x1] = True
    return float(inside.mean())


def _canvas(picture: Image.Image, longest_side: int) -> tuple[Image.Image, float, int, int]:
    """The picture as the detector gets it: reduced, and with black borders if it is tiny or very slim.

    The detector enlarges short sides to 736 pixels, and the long ones with them: a column of 20 x 1280 would come to
    47,000 rows.

    Returns:
        The canvas, by how much the picture was scaled, and where its left upper corner lies.
    """
    scale = min(1.0, longest_side / max(picture.size))
    width, height = (max(1, round(side * scale)) for side in picture.size)
    if scale < 1:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    wide, high = _roomy(width, height), _roomy(height, width)
    left, top = (wide - width) // 2, (high - height) // 2
    if (wide, high) == (width, height):
        return picture, scale, 0, 0
    canvas = Image.new("RGB", (wide, high))
    canvas.paste(picture, (left, top))
    return canvas, scale, left, top


def _roomy(side: int, other: int) -> int:
    """A side's length with borders; a slim picture gets as much as RapidOCR gives a wide one."""
    return max(_LEAST_SIDE, side if side * _SLIMMEST >= other else other * 2 // _SLIMMEST)


def _missing() -> MissingExtraError:
    return MissingExtraError("rapidocr", "ocr", "reading the text in pictures")
