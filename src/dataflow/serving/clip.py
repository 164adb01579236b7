"""Scores from CLIP's vectors: alignment, edits, aesthetics and human preference."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dataflow.errors import BadRequestError, ConfigError, InputError, ServingError
from dataflow.metrics import alignment
from dataflow.metrics.aesthetic import aesthetic_score, collapsed_head
from dataflow.metrics.perceptual import read_tensors
from dataflow.serving import model_files
from dataflow.serving.embedding import EmbeddingServing, Vector
from dataflow.serving.encoder import Encoder
from dataflow.serving.scoring import Scored
from dataflow.types import GenerationRequest

LongPrompts = Literal["truncate", "refuse"]
_TEXTS_KEPT = 10_000


class ClipServing(EmbeddingServing):
    """How well a picture shows its prompt: the cosine of CLIP's vectors of both.

    An answer is ``{"alignment", "tokens", "truncated"}``: -1 to 1, higher is better, 0.15 to 0.4 is usual with
    OpenAI's models (CLIPScore as torchmetrics scales it is 100 times that); how many tokens the prompt has; and
    whether the model saw only its beginning, most CLIPs read 77.

    Args:
        hf_model_name_or_path: a CLIP, LongCLIP or SigLIP (``openai/clip-vit-large-patch14``); None for the built-in
            one.
        long_prompts: what becomes of a prompt that is longer than the model reads: ``truncate`` scores its beginning
            and says so, ``refuse`` gives no score (``not_applicable``).
        options: see :class:`~dataflow.serving.embedding.EmbeddingServing`.
    """

    kind = "clip_alignment"

    def __init__(
        self,
        hf_model_name_or_path: str | os.PathLike[str] | None = None,
        *,
        long_prompts: LongPrompts = "truncate",
        **options: Any,
    ) -> None:
        super().__init__(hf_model_name_or_path, **options)
        if long_prompts not in ("truncate", "refuse"):
            raise ConfigError(f"long_prompts must be truncate or refuse, got {long_prompts!r}")
        self.long_prompts: LongPrompts = long_prompts

    def _forget(self) -> None:
        super()._forget()
        self._texts: OrderedDict[str, tuple[Vector, int]] = OrderedDict()

    def fingerprint(self) -> Mapping[str, Any]:
        """As every model's, and what becomes of long prompts."""
        return {**super().fingerprint(), "long_prompts": self.long_prompts}

    def check(self, request: GenerationRequest) -> None:
        """Raise BadRequestError for a request without a prompt."""
        if not request.prompt:
            raise BadRequestError("there is no prompt to compare with: with_prompt=True", reason="not_applicable")

    def score(self, requests: Sequence[GenerationRequest]) -> list[Scored]:
        """The alignment of each request's first picture with its prompt."""
        pictures = self.picture_vectors([(request.images[0], request.image_hashes[0]) for request in requests])
        texts = self.text_vectors([request.prompt for request in requests])
        return [self._scored(picture, text) for picture, text in zip(pictures, texts, strict=True)]

    def _scored(self, picture: Vector | ServingError, text: tuple[Vector, int] | ServingError) -> Scored:
        if isinstance(picture, ServingError):
            return picture
        if isinstance(text, ServingError):
            return text
        vector, tokens = text
        return {
            **self._value(float(alignment.cosine(picture, vector)[0])),
            "tokens": tokens,
            "truncated": self._cut(tokens),
        }

    def _value(self, cosine: float) -> dict[str, float]:
        return {"alignment": cosine}

    def _cut(self, tokens: int) -> bool:
        assert self._encoder is not None
        return tokens > self._encoder.longest

    def text_vectors(self, prompts: Sequence[str]) -> list[tuple[Vector, int] | ServingError]:
        """The vector of each prompt, shape (d,), with its number of tokens, or why it has none."""
        assert self._encoder is not None
        with self._lock:
            known = {prompt: self._texts[prompt] for prompt in set(prompts) if prompt in self._texts}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if missing:
            rows, lengths = self._encoder.texts(missing)
            known |= dict(zip(missing, zip(rows, lengths, strict=True), strict=True))
            with self._lock:
                self._texts.update(known)
                while len(self._texts) > _TEXTS_KEPT:
                    self._texts.popitem(last=False)
        return [self._fitting(known[prompt]) for prompt in prompts]

    def _fitting(self, text: tuple[Vector, int]) -> tuple[Vector, int] | ServingError:
        assert self._encoder is not None
        if self.long_prompts == "refuse" and self._cut(text[1]):
            return BadRequestError(
                f"the prompt has {text[1]} tokens, the model reads {self._encoder.longest}", reason="not_applicable"
            )
        return text


class ClipEditServing(ClipServing):
    """How an edited picture stands to its source: the request's pictures are the source and what became of it.

    An answer is ``{"image_similarity", "direction", "alignment", "source_alignment"}``, each -1 to 1 or null where
    there is nothing to compare: CLIP-I (with DINOv2 as the model, DINO-I); CLIP directional similarity; and how well
    the edited picture and the source fit the caption of what should be seen afterwards and before. The captions are
    the request's parameters ``target_caption`` and ``source_caption``; without them only ``image_similarity`` is there.
    InstructPix2Pix keeps edits with an image similarity of 0.7 (paper 0.75), a direction of 0.2 and alignments of 0.2
    or more.
    """

    kind = "clip_edit"

    def check(self, request: GenerationRequest) -> None:
        """Raise BadRequestError unless there are two pictures."""
        if len(request.images) < 2:
            raise BadRequestError("there is no source to compare with", reason="not_applicable")

    def score(self, requests: Sequence[GenerationRequest]) -> list[Scored]:
        """The comparisons of each request's two pictures."""
        pairs = [list(zip(request.images[:2], request.image_hashes[:2], strict=True)) for request in requests]
        pictures = self.picture_vectors([picture for pair in pairs for picture in pair])
        captions = [_captions(request) for request in requests]
        said = list(dict.fromkeys(caption for pair in captions for caption in pair if caption))
        texts = dict(zip(said, self.text_vectors(said), strict=True)) if said else {}
        found: list[Scored] = []
        for number, (before_said, after_said) in enumerate(captions):
            before, after = pictures[2 * number : 2 * number + 2]
            t0, t1 = texts.get(before_said or ""), texts.get(after_said or "")
            failed = next((each for each in (before, after, t0, t1) if isinstance(each, ServingError)), None)
            found.append(failed or _compared(before, after, t0, t1))
        return found


class AestheticServing(EmbeddingServing):
    """LAION's aesthetic score: a linear head on CLIP's vector of a picture.

    An answer is a number, about 1 to 10, higher is better.

    Args:
        head: the released weights (``sac+logos+ava1-l14-linearMSE.pth`` of improved-aesthetic-predictor, Apache-2.0),
            or others of that form; ``.pth``, ``.pt`` or ``.safetensors``.
        hf_model_name_or_path: the CLIP that the head was trained on.
        options: see :class:`~dataflow.serving.embedding.EmbeddingServing`.

    Raises:
        InputError: the head cannot be read.
        ConfigError: it is no head for this model.
    """

    kind = "aesthetic"

    def __init__(
        self,
        head: str | os.PathLike[str],
        hf_model_name_or_path: str | os.PathLike[str] = "openai/clip-vit-large-patch14",
        **options: Any,
    ) -> None:
        super().__init__(hf_model_name_or_path, **options)
        self.head = os.fspath(head)

    def fingerprint(self) -> Mapping[str, Any]:
        """The CLIP's, and a digest of the head."""
        return {**super().fingerprint(), "head": _digest(self.head)}

    def setup(self) -> None:
        """Load the model and the head."""
        super().setup()
        try:
            self._head = collapsed_head(read_tensors(self.head))
        except ValueError as error:
            raise ConfigError(f"{self.head} is no aesthetic head: {error}") from error

    def score(self, requests: Sequence[GenerationRequest]) -> list[Scored]:
        """The score of each request's first picture."""
        pictures = self.picture_vectors([(request.images[0], request.image_hashes[0]) for request in requests])
        weight, bias = self._head
        try:
            return [
                each if isinstance(each, ServingError) else float(aesthetic_score(each, weight, bias)[0])
                for each in pictures
            ]
        except ValueError as error:
            raise ConfigError(f"{self.head} does not fit {self.source.name}: {error}") from error


class PickScoreServing(ClipServing):
    """PickScore: which picture people would pick for a prompt, CLIP-H's cosine times its logit scale.

    An answer is ``{"pick_score", "tokens", "truncated"}``: about 15 to 25, higher is better; the difference of two
    pictures of one prompt is the logit of one being preferred. The model's files must include its preprocessor and
    tokenizer; those of ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K`` are the ones it was trained with.

    Source: Kirstain et al. 2023, arXiv:2305.01569 (MIT).
    """

    kind = "pick_score"

    def __init__(
        self, hf_model_name_or_path: str | os.PathLike[str] = "yuvalkirstain/PickScore_v1", **options: Any
    ) -> None:
        super().__init__(hf_model_name_or_path, **options)

    def _value(self, cosine: float) -> dict[str, float]:
        assert self._encoder is not None
        return {"pick_score": self._encoder.logit_scale * cosine}


class HPSv2Serving(ClipServing):
    """HPS v2.1: a CLIP-H taught human preference; the cosine alone, the picture padded to a square.

    An answer is ``{"hps", "tokens", "truncated"}``: about 0.2 to 0.35, higher is better (the benchmark prints 100
    times that).

    Args:
        checkpoint: the released weights (``HPS_v2.1_compressed.pt`` of ``xswu/HPSv2``, Apache-2.0), as open_clip
            names them.
        hf_model_name_or_path: the CLIP-H whose configuration, preprocessor and tokenizer they go with.
        options: see :class:`~dataflow.serving.embedding.EmbeddingServing`.

    Source: Wu et al. 2023, arXiv:2306.09341.
    """

    kind = "hps_v2"
    fit = "pad"

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        hf_model_name_or_path: str | os.PathLike[str] = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        **options: Any,
    ) -> None:
        super().__init__(hf_model_name_or_path, **options)
        self.checkpoint = os.fspath(checkpoint)

    def _encoding(self) -> dict[str, Any]:
        return {**super()._encoding(), "checkpoint": _digest(self.checkpoint)}

    def _loaded(self, folder: Path, state: Mapping[str, Any] | None = None) -> Encoder:
        return super()._loaded(folder, state or from_open_clip(read_tensors(self.checkpoint)))

    def _value(self, cosine: float) -> dict[str, float]:
        return {"hps": cosine}


def from_open_clip(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """open_clip's names of a ViT CLIP's tensors as those of transformers.

    Args:
        tensors: of a checkpoint; a leading ``state_dict.`` or ``module.`` is left out.

    Raises:
        InputError: they are of another architecture.
    """
    plain = {name.removeprefix("state_dict.").removeprefix("module."): value for name, value in tensors.items()}
    try:
        return {new: part for name, value in plain.items() for new, part in _renamed(name, np.asarray(value))}
    except KeyError as error:
        raise InputError(f"no tensor of a ViT CLIP of open_clip: {error}") from error


_TOP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TURNED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_IN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _renamed(name: str, value: np.ndarray) -> list[tuple[str, np.ndarray]]:
    if name == "attn_mask":
        return []
    if name in _TOP:
        return [(_TOP[name], value)]
    if name in _TURNED:
        return [(_TURNED[name], np.ascontiguousarray(value.T))]
    tower, _, rest = name.removeprefix("visual.").partition("transformer.resblocks.")
    number, _, inner = rest.partition(".")
    if tower or not number.isdigit():
        raise KeyError(name)
    prefix = f"{'vision_model' if name.startswith('visual.') else 'text_model'}.encoder.layers.{number}."
    if inner in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = inner.rpartition("_")[2]
        return [
            (f"{prefix}self_attn.{letter}_proj.{kind}", part)
            for letter, part in zip("qkv", np.split(value, 3), strict=True)
        ]
    module, _, kind = inner.rpartition(".")
    return [(f"{prefix}{_IN_LAYER[module]}.{kind}", value)]


def _captions(request: GenerationRequest) -> tuple[str | None, str | None]:
    return request.params.get("source_caption"), request.params.get("target_caption")


def _compared(
    before: Any, after: Any, source: tuple[Vector, int] | Any | None, target: tuple[Vector, int] | Any | None
) -> dict[str, float | None]:
    found: dict[str, float | None] = {
        "image_similarity": float(alignment.image_similarity(before, after)[0]),
        "direction": None,
        "alignment": None if target is None else float(alignment.cosine(after, target[0])[0]),
        "source_alignment": None if source is None else float(alignment.cosine(before, source[0])[0]),
    }
    if source is not None and target is not None:
        found["direction"] = alignment.directional_similarity(before, after, source[0], target[0])[0]
    return found


def _digest(path: str) -> str:
    try:
        return model_files.file_digest(Path(path)).hex()[:32]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
