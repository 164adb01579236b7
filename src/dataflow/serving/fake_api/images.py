"""The Images API: generations and edits, whole or streamed, as OpenAI, vLLM-Omni and SGLang offer it."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dataflow.serving.fake_api.call import (
    Asked,
    Call,
    RejectedError,
    Reply,
    Site,
    checked,
    decode,
    event,
    from_url,
    wants_url,
    whole,
)
from dataflow.serving.fake_api.ledger import Tokens

COMMON = {
    *("model", "prompt", "n", "size", "quality", "background", "output_format", "output_compression", "stream"),
    *("partial_images", "user", "moderation", "safety_identifier", "complexity"),
}
EDIT_ONLY = {"image", "images", "mask", "input_fidelity", "markup"}
"""What GPT image models take, and nothing else: any other parameter is an error there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A file of a form: the field it came in, its name, the type it claims, its bytes."""

    field: str
    filename: str
    mime: str
    data: bytes


def parse_generation(body: Mapping[str, Any]) -> Asked:
    """What a body of POST /v1/images/generations asks for.

    Raises:
        RejectedError: the service would not take it.
    """
    return _asked(body, (), edit=False)


def parse_json_edit(body: Mapping[str, Any], site: Site) -> Asked:
    """What a JSON body of POST /v1/images/edits asks for: ``images`` and ``mask`` by URL or file id."""
    images = body.get("images")
    if not isinstance(images, list) or not images:
        raise RejectedError("images must be a list with at least one image", param="images")
    inputs = [_reference(image, f"images[{at}]", site) for at, image in enumerate(images)]
    if body.get("mask") is not None:
        inputs.append(_mask(_reference(body["mask"], "mask", site), inputs[0]))
    return _asked(body, tuple(inputs), edit=True)


def parse_form_edit(fields: Mapping[str, str], files: Sequence[Upload]) -> Asked:
    """What a form of POST /v1/images/edits asks for: ``image`` once, or ``image[]`` up to 16 times, ``mask``."""
    images = [file for file in files if file.field in ("image", "image[]")]
    for file in files:
        if file.mime not in ("image/png", "image/jpeg", "image/webp"):
            raise RejectedError(
                f"unsupported mimetype ({file.mime!r})", param=file.field, code="unsupported_file_mimetype"
            )
    if sum(file.field == "image" for file in images) > 1:
        raise RejectedError("duplicate parameter: 'image'; use the array syntax", param="image")
    inputs = [checked(file.data, file.field) for file in images]
    inputs += [from_url(fields[name], name) for name in ("url", "url[]") if name in fields]
    if not inputs or len(inputs) > 16:
        raise RejectedError(f"from 1 to 16 images are taken, got {len(inputs)}", param="image")
    masks = [file for file in files if file.field in ("mask", "mask_image")]
    inputs += [_mask(checked(file.data, "mask"), inputs[0]) for file in masks]
    return _asked(fields, tuple(inputs), edit=True)


def answer(call: Call) -> Reply:
    """The model's answer; errors and refusals before the model are somebody else's."""
    asked = call.asked
    pictures = call.pictures()
    tokens = call.tokens(len(pictures), "")
    usage = _usage(tokens)
    facts = {"size": _size(asked), "quality": "low", "background": "opaque", "output_format": asked.kind}
    reply = Reply(tokens=tokens, usage=usage, images=len(pictures))
    if asked.stream:
        name = "image_edit" if asked.edit else "image_generation"
        created = {"created_at": 1_790_000_000, **facts}
        reply.frames = []
        reply.tells = bool(pictures)
        for index in range(asked.partials if pictures else 0):
            partial = call.picture(partial=f"partial {index} of ")
            data = {"type": f"{name}.partial_image", "b64_json": partial.base64, "partial_image_index": index}
            reply.frames.append(event({**data, **created}, f"{name}.partial_image"))
        for picture in pictures:
            data = {"type": f"{name}.completed", "b64_json": picture.base64, **created, "usage": usage}
            reply.end.append(event(data, f"{name}.completed"))
        return reply
    shape = call.plan.get("shape") or ("url" if asked.body.get("response_format") == "url" else "")
    data = []
    for picture in pictures:
        if wants_url(call.plan) or shape.endswith("url"):
            data.append({"b64_json": None, "url": call.link(picture, shape or "url"), "revised_prompt": None})
        else:
            data.append({"b64_json": picture.base64})
    reply.body = {"created": 1_790_000_000, "data": data, "usage": usage, **facts}
    return reply


def _asked(body: Mapping[str, Any], inputs: tuple[bytes, ...], *, edit: bool) -> Asked:
    model, prompt = body.get("model") or "gpt-image-2", body.get("prompt")
    if not isinstance(prompt, str) or not prompt or len(prompt) > 32_000:
        raise RejectedError("prompt must be text of 1 to 32000 characters", param="prompt")
    if "gpt-image" in model:
        for name in body:
            if name not in COMMON and not (edit and name.removesuffix("[]") in EDIT_ONLY):
                raise RejectedError(f"Unknown parameter: {name!r}.", param=name, code="unknown_parameter")
    size = body.get("size") or "auto"
    found = re.fullmatch(r"(\d{2,4})x(\d{2,4})", size)
    if size != "auto" and (found is None or any(int(side) % 16 for side in found.groups())):
        raise RejectedError(f"Invalid size {size!r}: width and height must be multiples of 16", param="size")
    kind = body.get("output_format") or "png"
    if kind not in ("png", "jpeg", "webp"):
        raise RejectedError(f"Invalid output_format {kind!r}", param="output_format")
    return Asked(
        family="images",
        model=model,
        prompt=prompt,
        inputs=inputs,
        number=whole(body.get("n"), "n", 1, 10, 1),
        seed=None if body.get("seed") is None else str(body["seed"]),
        kind=kind,
        stream=body.get("stream") in (True, "true", "True"),
        partials=whole(body.get("partial_images"), "partial_images", 0, 3, 0),
        edit=edit,
        body=body,
    )


def _reference(image: Any, param: str, site: Site) -> bytes:
    match image:
        case {"image_url": str(url)}:
            return from_url(url, f"{param}.image_url")
        case {"file_id": str(name)}:
            try:
                return checked(site.stored(name), f"{param}.file_id")
            except KeyError:
                raise RejectedError(f"no such file: {name}", param=f"{param}.file_id", status=404) from None
        case {"b64_json": str(text)}:
            return decode(text, f"{param}.b64_json")
    raise RejectedError("an image is given by image_url or file_id", param=param)


def _mask(mask: bytes, image: bytes) -> bytes:
    """A mask, checked as the service does: a PNG with an alpha channel, as large as the image it is for."""
    if not mask.startswith(b"\x89PNG") or mask[25] not in (4, 6):
        raise RejectedError("the mask must be a PNG with an alpha channel", param="mask", code="invalid_image_mask")
    if image.startswith(b"\x89PNG") and struct.unpack(">II", mask[16:24]) != struct.unpack(">II", image[16:24]):
        raise RejectedError("the mask and the image differ in size", param="mask", code="invalid_image_mask")
    return mask


def _usage(tokens: Tokens) -> dict[str, Any]:
    return {
        "input_tokens": tokens.given,
        "output_tokens": tokens.answered,
        "total_tokens": tokens.given + tokens.answered,
        "input_tokens_details": {"text_tokens": tokens.text_input, "image_tokens": tokens.image_input},
        "output_tokens_details": {"text_tokens": tokens.text_output, "image_tokens": tokens.image_output},
    }


def _size(asked: Asked) -> str:
    size = asked.body.get("size")
    return "1024x1024" if size in (None, "auto") else str(size)
