"""Gemini's own API: images from words and images, and edits over several turns."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any

from dataflow.errors import BadRequestError, ConfigError, ImageError, MissingExtraError
from dataflow.io import ImageIO
from dataflow.serving.api_serving import ApiServing
from dataflow.serving.gemini_batches import GeminiBatches
from dataflow.serving.gemini_client import API_VERSION, GeminiClient
from dataflow.serving.gemini_replies import GeminiStream, gemini_reply
from dataflow.serving.model_limits import limits_of
from dataflow.serving.pictures import input_bytes
from dataflow.serving.replies import Reply, counted
from dataflow.serving.reply_images import media_type
from dataflow.types import GenerationRequest, ImageStore

DEFAULT_URL = "https://generativelanguage.googleapis.com"
_OUTER = frozenset({"safetySettings", "systemInstruction", "tools", "toolConfig", "cachedContent", "labels", "store"})
_WORDS = ("aspect_ratio", "image_size")


class GeminiImageServing(ApiServing):
    """Gemini's generateContent with images in the answer, on Google's own client.

    Input images are sent as they lie on disk, whole and in order, after the text. A further turn of an edit is sent as
    the conversation so far; what the model wants to see again of its answers stands in their files' metadata. An answer
    whose file does not say it (made by another model or service, or a JPEG whose metadata was cut) is sent as the
    user's own picture, with which the conversation begins anew.

    Args:
        model_name: as the service calls it, with or without ``models/``.
        image_io: where the images go.
        api_url: base URL of the service, with or without ``/v1beta``; several for failover.
        key_name_of_api_key: environment variable with the key; several for several keys. It is read when work begins
            and kept nowhere else; the variables that Google's client reads by itself have no effect.
        max_workers: requests in flight at once, at each endpoint.
        timeout: seconds one request may take.
        send_request_stream: have the answer streamed.
        aspect_ratio: ``"1:1"``, ``"16:9"``, … of rows that give no size; None for the model's own choice.
        image_size: ``"1K"``, ``"2K"``, … likewise, for models that have several.
        request_params: further fields of ``generationConfig``, as JSON (``temperature``, ``topP``, ``seed``,
            ``thinkingConfig``, …), and ``safetySettings``, ``systemInstruction``, ``tools``, ``toolConfig``,
            ``cachedContent``, ``labels`` or ``store``, which stand beside it. They are part of what makes an image what
            it is; None leaves a field out. Without ``responseModalities`` among them it is ``["IMAGE"]``.
        images_per_prompt: how many images each prompt asks for, one request each.
        requests_per_minute: most requests that may start in a minute, at each endpoint.
        images_per_minute: most images, likewise.
        price_table: a file with prices, laid over the package's own table (:mod:`dataflow.serving.prices`).
        model_table: a file with what models take, laid over the package's own
            (:mod:`dataflow.serving.model_limits`). A model in neither is sent everything but a size.
        batch_jobs: send the requests as jobs of Gemini's Batch API, at half price and with an answer within a day;
            ``max_workers`` is then how many jobs wait at once.
        batch_size: requests in one batch job.

    Raises:
        ConfigError: an argument cannot be used, or the model is known not to take it.
    """

    service = "generateContent"
    package = "google.genai"
    own_path = f"/{API_VERSION}"
    own_fields = frozenset(
        {"contents", "model", "generationConfig", "generation_config", "candidateCount", "candidate_count"}
        | {"image_config", "aspectRatio", "imageSize", *_WORDS}
    )

    def __init__(
        self,
        model_name: str = "gemini-2.5-flash-image",
        image_io: ImageStore | None = None,
        api_url: str | Sequence[str] = DEFAULT_URL,
        key_name_of_api_key: str | Sequence[str] = "DF_API_KEY",
        max_workers: int = 10,
        timeout: float = 300.0,
        send_request_stream: bool = False,
        *,
        aspect_ratio: str | None = None,
        image_size: str | None = None,
        request_params: Mapping[str, Any] | None = None,
        images_per_prompt: int = 1,
        requests_per_minute: float | None = None,
        images_per_minute: float | None = None,
        price_table: str | os.PathLike[str] | None = None,
        model_table: str | os.PathLike[str] | None = None,
        batch_jobs: bool = False,
        batch_size: int = 100,
    ) -> None:
        super().__init__(
            api_url=api_url,
            key_name_of_api_key=key_name_of_api_key,
            model_name=model_name.removeprefix("models/"),
            image_io=image_io,
            max_workers=max_workers,
            timeout=timeout,
            request_params=request_params,
            images_per_prompt=images_per_prompt,
            requests_per_minute=requests_per_minute,
            images_per_minute=images_per_minute,
            price_table=price_table,
            batch_jobs=batch_jobs,
            batch_size=batch_size,
        )
        if image_io is None:
            raise ConfigError("image_io must say where the images go: this serving makes nothing else")
        self.stream = send_request_stream and not batch_jobs
        self.limits = limits_of(self.model, None if model_table is None else os.fspath(model_table))
        words = {"aspect_ratio": aspect_ratio, "image_size": image_size}
        self.words = {name: word for name, word in words.items() if word is not None}
        if problem := self._words_problem(self.words):
            raise ConfigError(problem)
        image_config = self.params.get("imageConfig")
        if image_config is not None and (
            not isinstance(image_config, dict) or {"aspectRatio", "imageSize"} & {*image_config}
        ):
            raise ConfigError(
                "request_params: imageConfig must be an object; say aspect_ratio and image_size outside it"
            )
        self.params = {"responseModalities": ["IMAGE"], **self.params}

    # What it takes -------------------------------------------------------------------------------------------------

    def default_params(self) -> Mapping[str, Any]:
        """The parameters of every request, with aspect ratio and image size where they are set."""
        return {**super().default_params(), **self.words}

    def check(self, request: GenerationRequest) -> None:
        """Refuse what the API or the model does not take, before it is paid for.

        Raises:
            BadRequestError: a negative prompt, a size that the model does not make, too many input images, or a
                parameter of the row.
        """
        if request.negative_prompt:
            raise BadRequestError("Gemini takes no negative prompt: say it in the prompt")
        if request.size is not None:
            if not self.limits.pixels:
                raise BadRequestError(
                    f"what sizes {self.model} makes is not known: set aspect_ratio in place of height and width, or "
                    "give a model_table"
                )
            if problem := self.limits.size_problem(request.size):
                raise BadRequestError(f"{self.model}: {problem}")
        # Earlier answers stand in the conversation as the model's own words, and are no references.
        number = len(request.images) + sum(len(turn.images) for turn in request.turns) - len(request.turns)
        if self.limits.max_images is not None and number > self.limits.max_images:
            raise BadRequestError(f"{self.model} takes {self.limits.max_images} input images; the row has {number}")
        self.check_parameters(request)

    def check_parameters(self, request: GenerationRequest) -> None:
        """Refuse parameters of the row that nobody said the service takes.

        Raises:
            BadRequestError: the row sets one that is neither in ``request_params`` nor ``aspect_ratio`` or
                ``image_size``, or one of these to what the model does not make.
        """
        known = {*self.params, *_WORDS}
        if unknown := sorted(name for name, value in request.params.items() if name not in known and value is not None):
            raise BadRequestError(
                f"the row sets {', '.join(unknown)}: Gemini gets that only if request_params names it (rows may set "
                "aspect_ratio and image_size)"
            )
        if problem := self._words_problem(request.params):
            raise BadRequestError(problem)

    def _words_problem(self, given: Mapping[str, Any]) -> str | None:
        offers = {"aspect_ratio": self.limits.aspect_ratios, "image_size": self.limits.image_sizes}
        for name, offered in offers.items():
            word = given.get(name)
            if word is None:
                continue
            if not isinstance(word, str):
                return f"{name} must be a word of the service's, got {word!r}"
            if self.limits.pixels and word not in offered:
                there = f"there are {', '.join(offered)}" if offered else "it makes one size only"
                return f"{self.model} makes no {name} {word!r}: {there}"
        return None

    # Work ----------------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Find the key and load the client library, which takes seconds that the event loop has not.

        Raises:
            ConfigError: the environment holds no key (``MissingExtraError``: without the client library).
        """
        super().setup()
        try:
            import google.genai  # noqa: F401 - loaded here for later
        except ModuleNotFoundError:
            raise MissingExtraError("google-genai", "api", f"the service {self.url}") from None

    def _connect(self) -> GeminiClient:
        return GeminiClient(
            self.url,
            self._key,
            timeout=self.request_timeout,
            connections=self.concurrency,
            classified=self._classified,
            clean=self._clean,
        )

    @property
    def _path(self) -> str:
        return self.model if "/" in self.model else f"models/{self.model}"

    def _body(self, request: GenerationRequest) -> dict[str, Any]:
        given = {**self.default_params(), **request.params}
        fields = {name: value for name, value in given.items() if value is not None}
        ratio, size = (fields.pop(name, None) for name in _WORDS)
        if request.size is not None and (words := self.limits.words(request.size)) is not None:
            ratio, size = words
        image = {**fields.pop("imageConfig", {}), "aspectRatio": ratio, "imageSize": size}
        if image := {name: value for name, value in image.items() if value is not None}:
            fields["imageConfig"] = image
        outer = {name: fields.pop(name) for name in sorted(_OUTER & fields.keys())}
        return {"contents": conversation(request, self.fingerprint()), "generationConfig": fields, **outer}

    async def _call(self, request: GenerationRequest) -> Reply:
        body = await asyncio.to_thread(self._body, request)
        if not self.stream:
            return gemini_reply(await self._client.ask("post", f"{self._path}:generateContent", body), **self._names)
        stream = GeminiStream(**self._names)
        with counted(stream):
            async with aclosing(self._client.events(f"{self._path}:streamGenerateContent?alt=sse", body)) as chunks:
                async for chunk in chunks:
                    stream.add(chunk)
        return stream.reply()

    def _batches(self, requests: Sequence[GenerationRequest]) -> GeminiBatches:  # noqa: ARG002 - one model for all
        return GeminiBatches(
            self._client,
            path=self._path,
            body=self._body,
            reply=lambda found: gemini_reply(found, **self._names),
            classified=self._classified,
        )

    def _facts(self, reply: Reply) -> dict[str, Any]:
        return {"parts": _kept(reply.parts)}


# -- conversations ----------------------------------------------------------------------------------------------------


def conversation(request: GenerationRequest, maker: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The ``contents`` of a request: earlier turns as they were said, then this one.

    An answer that is not this model's own, or does not say what has to go with it, is none that the model would accept
    as such: it is shown as the user's own picture, with which the conversation begins.

    Args:
        request: any.
        maker: what the metadata of an answer says if it is this model's.

    Raises:
        BadRequestError: an input image cannot be read (``bad_image``) or is of a kind that the service does not take
            (``image_unsupported``).
    """
    contents: list[dict[str, Any]] = []
    said = [*((turn.prompt, turn.images) for turn in request.turns), (request.prompt, request.images)]
    for number, (prompt, images) in enumerate(said):
        if number:
            answer = _answered(request.turns[number - 1].answer, maker)
            if answer is None:
                contents.clear()
            else:
                contents.append({"role": "model", "parts": answer})
                images = images[1:]
        contents.append({"role": "user", "parts": [{"text": prompt}, *map(_shown, images)]})
    return contents


def _shown(path: str) -> dict[str, Any]:
    data = input_bytes(path)
    try:
        kind = media_type(data)
    except BadRequestError as error:
        raise BadRequestError(f"input image {path}: {error}", reason=error.reason) from None
    return {"inlineData": {"mimeType": kind, "data": base64.b64encode(data).decode()}}


def _answered(path: str, maker: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The parts of an earlier answer as this model gave them; None if its file does not say."""
    image = _shown(path)
    try:
        metadata = ImageIO(os.curdir).read_metadata(path)
    except ImageError as error:
        raise BadRequestError(f"input image {path}: {error}", reason="bad_image") from error
    provenance = metadata.get("provenance")
    parts = provenance.get("parts") if isinstance(provenance, dict) else None
    # A signature is worth nothing to another model than the one that gave it.
    if any(metadata.get(name) != value for name, value in maker.items()) or not isinstance(parts, list):
        return None
    if not all(isinstance(part, dict) for part in parts) or sum("inlineData" in part for part in parts) != 1:
        return None
    return [{**part, **image} if "inlineData" in part else part for part in parts]


def _kept(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Parts of an answer as they are kept with the image: without its data, which are the file itself."""
    kept: list[dict[str, Any]] = []
    for part in parts:
        found = {name: part[name] for name in ("text", "thought") if part.get(name)}
        if signature := part.get("thoughtSignature") or part.get("thought_signature"):
            found["thoughtSignature"] = signature
        if any(part.get(name) for name in ("inlineData", "inline_data", "fileData", "file_data")):
            if part.get("thought"):
                continue  # a draft, which is not kept and so cannot be shown again
            found["inlineData"] = {}
        elif signature:
            found.setdefault("text", "")  # a part without any data must not be sent
        if found.keys() - {"thought"}:
            kept.append(found)
    return kept
