"""The Images API: images from words, and edits of images, as OpenAI, vLLM-Omni and SGLang offer it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dataflow.errors import BadRequestError, ConfigError
from dataflow.serving.api_serving import ApiServing
from dataflow.serving.images_replies import ImagesStream, images_reply
from dataflow.serving.model_limits import ModelLimits, limits_of
from dataflow.serving.openai_batches import OpenAIBatches
from dataflow.serving.openai_client import answer, connect, translated_errors
from dataflow.serving.pictures import input_bytes
from dataflow.serving.replies import Reply, counted
from dataflow.serving.reply_images import data_url, media_type
from dataflow.types import GenerationRequest, ImageStore

if TYPE_CHECKING:
    import openai

DEFAULT_URL = "https://api.openai.com/v1"

FORMATS = ("png", "jpeg", "webp")
"""Of what a service can draw, what is an image here."""

File = tuple[str, bytes, str]
"""Name, content and media type of a file in a form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How a service speaks the Images API.

    Attributes:
        name: for messages.
        draws: it runs the model itself: it knows seeds and negative prompts, and has to be asked for base64.
        params: further fields that it takes from a row that asks for an image.
        edit_params: the same for an edit. One that the service would drop without a word is not among them.
        mask: the field a mask is sent in; None where it would be dropped.
    """

    name: str
    draws: bool = False
    params: frozenset[str] = frozenset()
    edit_params: frozenset[str] = frozenset()
    mask: str | None = "mask"


_STEPS = frozenset({"num_inference_steps", "guidance_scale", "true_cfg_scale"})

DIALECTS: Mapping[str, Dialect] = {
    "openai": Dialect(name="OpenAI's Images API"),
    "vllm-omni": Dialect(name="vLLM-Omni", draws=True, params=_STEPS, edit_params=_STEPS, mask="mask_image"),
    "sglang": Dialect(
        name="SGLang", draws=True, params=_STEPS | {"max_sequence_length"}, edit_params=_STEPS, mask=None
    ),
}


class OpenAIImageServing(ApiServing):
    """A service with OpenAI's Images API: ``images/generations``, and ``images/edits`` for rows with input images.

    Several input images of a row are sent as they lie on disk, whole and in order. The API has no conversation: a
    further turn of an edit is the edit of the image before, and earlier turns are not sent. Several images per prompt
    are as many requests.

    Args:
        api_url: base URL of the service, with or without ``/images/generations``; several for failover.
        key_name_of_api_key: environment variable with the key; several for several keys. It is read when work begins
            and kept nowhere else.
        model_name: as the service calls it.
        image_io: where the images go.
        max_workers: requests in flight at once, at each endpoint.
        timeout: seconds one request may take.
        send_request_stream: have the answer streamed; only with the dialect ``openai``. Of the events only the finished
            image counts, ``partial_images`` are passed over.
        dialect: ``openai``, or ``vllm-omni`` or ``sglang`` for an engine of one's own. Those are sent each request's
            seed, and rows may set a negative prompt, ``num_inference_steps``, ``guidance_scale``, ``true_cfg_scale``
            and (SGLang, without input images) ``max_sequence_length``.
        size: (width, height) in pixels of rows that give none; None for the service's own choice.
        request_params: further fields of the request, as JSON: ``quality``, ``background``, ``moderation``,
            ``output_format`` (``png``, ``jpeg`` or ``webp``), ``output_compression`` (0 to 100), ``input_fidelity``,
            ``partial_images`` (0 to 3), … They are part of what makes an image what it is; None leaves a field out.
        images_per_prompt: how many images each prompt asks for, one request each.
        requests_per_minute: most requests that may start in a minute, at each endpoint.
        images_per_minute: most images, likewise.
        price_table: a file with prices, laid over the package's own table (:mod:`dataflow.serving.prices`).
        model_table: a file with what models take, laid over the package's own
            (:mod:`dataflow.serving.model_limits`). A model in neither is sent everything.
        batch_jobs: send the requests as jobs of OpenAI's Batch API, at half price and with an answer within a day;
            ``max_workers`` is then how many jobs wait at once.
        batch_size: requests in one batch job.

    Raises:
        ConfigError: an argument cannot be used.
    """

    masks = True
    service = "images"
    own_fields = frozenset(
        {"model", "prompt", "n", "size", "width", "height", "stream", "image", "images", "mask", "mask_image"}
        | {"response_format", "seed"}
    )
    own_path = "/images/generations"

    def __init__(
        self,
        api_url: str | Sequence[str] = DEFAULT_URL,
        key_name_of_api_key: str | Sequence[str] = "DF_API_KEY",
        model_name: str = "gpt-image-2",
        image_io: ImageStore | None = None,
        max_workers: int = 10,
        timeout: float = 300.0,
        send_request_stream: bool = False,
        *,
        dialect: Literal["openai", "vllm-omni", "sglang"] = "openai",
        size: tuple[int, int] | None = None,
        request_params: Mapping[str, Any] | None = None,
        images_per_prompt: int = 1,
        requests_per_minute: float | None = None,
        images_per_minute: float | None = None,
        price_table: str | os.PathLike[str] | None = None,
        model_table: str | os.PathLike[str] | None = None,
        batch_jobs: bool = False,
        batch_size: int = 500,
    ) -> None:
        super().__init__(
            api_url=api_url,
            key_name_of_api_key=key_name_of_api_key,
            model_name=model_name,
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
            raise ConfigError("image_io must say where the images go: the Images API answers with nothing else")
        if dialect not in DIALECTS:
            raise ConfigError(f"dialect must be one of {', '.join(DIALECTS)}, got {dialect!r}")
        self.dialect = dialect
        self.stream = send_request_stream and not batch_jobs
        self.size = _whole_size(size)
        self.model_table = None if model_table is None else os.fspath(model_table)
        self._limits: ModelLimits | None = None
        self._check_params(streams=send_request_stream, batches=batch_jobs)
        if self._speaks.draws:
            # The noise of a seed on another device depends on the device.
            self.params = {"generator_device": "cpu", **self.params}

    def _check_params(self, *, streams: bool, batches: bool) -> None:
        kind = self.params.get("output_format")
        if kind is not None and kind not in FORMATS:
            raise ConfigError(f"request_params: output_format must be one of {', '.join(FORMATS)}, got {kind!r}")
        if self.params.get("partial_images") and not self.stream:
            raise ConfigError("request_params: partial_images are only sent with send_request_stream, never in batches")
        if not self._speaks.draws:
            if self.params.get("negative_prompt"):
                raise ConfigError(f"request_params: {self._speaks.name} takes no negative_prompt")
        elif streams or batches:
            name = "send_request_stream" if streams else "batch_jobs"
            raise ConfigError(f"{self._speaks.name} has no {name}: only the dialect openai")

    @property
    def _speaks(self) -> Dialect:
        return DIALECTS[self.dialect]

    # What it takes -------------------------------------------------------------------------------------------------

    def default_params(self) -> Mapping[str, Any]:
        """The parameters of every request, and the default size."""
        self._find_limits()  # a table that cannot be read is found before anything is paid for
        found = super().default_params()
        return found if self.size is None else {**found, "width": self.size[0], "height": self.size[1]}

    def check(self, request: GenerationRequest) -> None:
        """Refuse what the service or the model does not take, before it is paid for.

        Raises:
            BadRequestError: a size, a number of input images, a mask, a negative prompt, the prompt's length, or a
                parameter of the row.
        """
        limits, speaks = self._find_limits(), self._speaks
        if limits.max_prompt is not None and len(request.prompt) > limits.max_prompt:
            number = len(request.prompt)
            raise BadRequestError(
                f"{self.model} takes prompts of {limits.max_prompt:,} characters; this one has {number:,}"
            )
        if request.negative_prompt and not speaks.draws:
            raise BadRequestError(f"{speaks.name} takes no negative prompt: say it in the prompt")
        if request.size is not None and (problem := limits.size_problem(request.size)) is not None:
            raise BadRequestError(f"{self.model}: {problem}")
        # The answer of the turn before is not among the images before that turn is done.
        number = len(request.images) + (request.after is not None and not request.turns)
        if limits.max_images is not None and number > limits.max_images:
            raise BadRequestError(f"{self.model} takes {limits.max_images} input images; the row has {number}")
        if request.mask is not None:
            self._check_mask(request, limits)
        self.check_parameters(request)

    def _check_mask(self, request: GenerationRequest, limits: ModelLimits) -> None:
        if request.task != "imageedit":
            raise BadRequestError("the row has a mask and no input image: a mask says where an image may be changed")
        if self._speaks.mask is None:
            raise BadRequestError(f"{self._speaks.name} takes no mask")
        if limits.mask is False:
            raise BadRequestError(f"{self.model} takes no mask")

    def check_parameters(self, request: GenerationRequest) -> None:
        """Refuse parameters of the row that nobody said the service takes.

        Raises:
            BadRequestError: the row sets one that neither ``request_params`` nor the dialect names.
        """
        speaks = self._speaks
        taken = speaks.edit_params if request.task == "imageedit" else speaks.params
        known = self.params.keys() | taken
        if unknown := sorted(name for name, value in request.params.items() if name not in known and value is not None):
            allowed = f" (rows may set {', '.join(sorted(taken))})" if taken else ""
            raise BadRequestError(
                f"the row sets {', '.join(unknown)}: {speaks.name} gets that only if request_params names it{allowed}"
            )

    def _find_limits(self) -> ModelLimits:
        if self._limits is None:
            self._limits = limits_of(self.model, self.model_table)
        return self._limits

    # Work ----------------------------------------------------------------------------------------------------------

    def _connect(self) -> openai.AsyncOpenAI:
        return connect(self.url, self._key, self.request_timeout, self.concurrency)

    def _fields(self, request: GenerationRequest) -> dict[str, Any]:
        """The fields beside model, prompt and files."""
        fields = {name: value for name, value in {**self.params, **request.params}.items() if value is not None}
        fields.pop("negative_prompt", None)  # the request has it, the row's own or the default
        if self._speaks.draws:
            if request.negative_prompt:
                fields["negative_prompt"] = request.negative_prompt
            # What is left out of these is drawn by chance, or the same for every request, or comes as an address.
            fields |= {"seed": request.seed % 2**31, "response_format": "b64_json"}
        if request.size is not None:
            fields["size"] = "{}x{}".format(*request.size)
        return fields

    async def _call(self, request: GenerationRequest) -> Reply:
        stream = ImagesStream(**self._names)
        add = (lambda name, event: stream.add(event, name=name)) if self.stream else None
        with counted(stream), translated_errors(self._classified, self._clean, self.request_timeout):
            async with self._asked(request) as response:
                found = await answer(response, add, self._classified, self._clean)
        if found is None:
            return stream.reply()
        if "error" in found and not found.get("data"):
            raise self._classified(response.status_code, response.headers, found)
        return images_reply(found, **self._names)

    @asynccontextmanager
    async def _asked(self, request: GenerationRequest) -> AsyncIterator[Any]:
        fields = self._fields(request)
        # Plain fields, as the service gets them, which the client's own types do not describe.
        named: dict[str, Any] = {"model": self.model, "prompt": request.prompt, "extra_body": fields}
        if self.stream:
            named["stream"] = True
        api: Any = self._client.images.with_streaming_response
        if not request.images:
            async with api.generate(**named) as response:
                yield response
            return
        images, mask = await asyncio.to_thread(_files, request)
        if mask is None or self._speaks.mask == "mask":
            if mask is not None:
                named["mask"] = mask
            async with api.edit(image=images if len(images) > 1 else images[0], **named) as response:
                yield response
            return
        # The client's own method knows no other field for a mask.
        files = [("image[]" if len(images) > 1 else "image", image) for image in images]
        response = await self._client.post(
            "/images/edits",
            cast_to=object,
            body={"model": self.model, "prompt": request.prompt, **fields},
            files=[*files, (self._speaks.mask, mask)],
            options={"headers": {"Content-Type": "multipart/form-data", "X-Stainless-Raw-Response": "stream"}},
        )
        try:
            yield response
        finally:
            await response.close()

    def _body(self, request: GenerationRequest) -> dict[str, Any]:
        """The request as one JSON body, the form of batch jobs."""
        body = {"model": self.model, "prompt": request.prompt, **self._fields(request)}
        if request.images:
            images, mask = _files(request)
            body["images"] = [{"image_url": data_url(data)} for _, data, _ in images]
            if mask is not None:
                body["mask"] = {"image_url": data_url(mask[1])}
        return body

    def _batches(self, requests: Sequence[GenerationRequest]) -> OpenAIBatches:
        return OpenAIBatches(
            self._client,
            endpoint=f"/v1/images/{'edits' if requests[0].images else 'generations'}",
            body=self._body,
            reply=lambda found: images_reply(found, **self._names),
            classified=self._classified,
            clean=self._clean,
            timeout=self.request_timeout,
        )

    def _facts(self, reply: Reply) -> dict[str, Any]:
        # SGLang repeats the prompt there.
        return {} if self._speaks.draws or not reply.text else {"revised_prompt": reply.text}


def _whole_size(size: Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    whole = isinstance(size, Sequence) and all(isinstance(side, int) and not isinstance(side, bool) for side in size)
    if not whole or len(size) != 2 or min(size) < 1:
        raise ConfigError(f"size must be (width, height) in pixels, got {size!r}")
    return size[0], size[1]


def _files(request: GenerationRequest) -> tuple[list[File], File | None]:
    """The input images in order, and the mask.

    Raises:
        BadRequestError: one cannot be read (``bad_image``) or is of a kind that services do not take
            (``image_unsupported``).
    """
    images = [_file(path, str(number)) for number, path in enumerate(request.images)]
    if request.mask is None:
        return images, None
    mask = _file(request.mask, "mask")
    if mask[2] != "image/png":
        raise BadRequestError(f"mask {request.mask}: a mask must be a PNG file", reason="image_unsupported")
    return images, mask


def _file(path: str, name: str) -> File:
    data = input_bytes(path)
    try:
        kind = media_type(data)
    except BadRequestError as error:
        raise BadRequestError(f"input image {path}: {error}", reason=error.reason) from None
    # Without a name and a type the service takes it for anything but an image.
    return f"{name}.{kind.removeprefix('image/')}", data, kind
