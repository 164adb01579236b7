"""Gemini's own API: generateContent, whole or streamed."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

from dataflow.serving.fake_api.call import Asked, Call, Picture, RejectedError, Reply, Site, decode, event, pieces
from dataflow.serving.fake_api.ledger import Tokens, count
from dataflow.serving.fake_api.pictures import Mark, expected_mark, read_mark

RATIOS = {
    *("1:1", "2:3", "3:2", "3:4", "4:3", "4:5", "5:4", "9:16", "16:9", "21:9"),
    *("1:4", "4:1", "1:8", "8:1"),
}
SIZES = {"512", "0.5K", "1K", "2K", "4K"}
FIELDS = {
    *("contents", "generationConfig", "safetySettings", "systemInstruction", "tools", "toolConfig", "cachedContent"),
    *("model", "labels", "serviceTier", "store"),
}
CONFIG = {
    *("responseModalities", "imageConfig", "responseFormat", "temperature", "topP", "topK", "seed", "candidateCount"),
    *("maxOutputTokens", "stopSequences", "responseMimeType", "responseSchema", "responseJsonSchema", "thinkingConfig"),
    *("responseLogprobs", "logprobs", "presencePenalty", "frequencyPenalty", "mediaResolution", "speechConfig"),
}
IMAGE_CONFIG = {"aspectRatio", "imageSize", "imageOutputOptions", "personGeneration", "prominentPeople"}


def parse(model: str, body: Mapping[str, Any], site: Site, *, stream: bool = False) -> Asked:
    """What a body of POST …/models/{model}:generateContent asks for.

    Raises:
        RejectedError: the service would not take it.
    """
    _known(body, FIELDS, "")
    contents = body.get("contents")
    contents = [contents] if isinstance(contents, dict) else contents
    if not isinstance(contents, list) or not contents:
        raise RejectedError("GenerateContentRequest.contents: contents is not specified", param="contents")
    prompt, inputs = "", []
    for at, content in enumerate(contents):
        parts = content.get("parts") if isinstance(content, dict) else None
        parts = [parts] if isinstance(parts, dict) else parts
        if not isinstance(parts, list) or content.get("role", "user") not in ("user", "model"):
            raise RejectedError(f"contents[{at}]: a valid role and parts are needed", param="contents")
        texts = []
        for part in parts:
            if "text" in part and not part.get("thought"):
                texts.append(str(part["text"]))
            inputs += _images(part, f"contents[{at}]", site)
            if content.get("role") == "model":
                _check_signature(model, part, at)
        if content.get("role", "user") == "user":
            prompt = "\n".join(texts)
    config = body.get("generationConfig") or {}
    _known(config, CONFIG, "generation_config.")
    image = config.get("imageConfig") or {}
    _known(image, IMAGE_CONFIG, "generation_config.image_config.")
    for name, allowed in (("aspectRatio", RATIOS), ("imageSize", SIZES)):
        if image.get(name) is not None and image[name] not in allowed:
            raise RejectedError(f"{name}: {image[name]!r} is not one of {sorted(allowed)}", param=name)
    modalities = [str(name).upper() for name in config.get("responseModalities") or []]
    json_wanted = config.get("responseMimeType") == "application/json"
    wants_image = "IMAGE" in modalities or (not modalities and any(word in model for word in ("image", "banana")))
    if wants_image and config.get("candidateCount", 1) != 1:
        raise RejectedError("Multiple candidates is not enabled for this model", param="candidateCount")
    schema = config.get("responseJsonSchema") or config.get("responseSchema") or {}
    return Asked(
        family="gemini",
        model=model,
        prompt=prompt,
        inputs=tuple(inputs),
        seed=config.get("seed"),
        stream=stream,
        wants_image=wants_image and not json_wanted,
        schema=schema if json_wanted else None,
        body=body,
    )


def answer(call: Call) -> Reply:
    """The model's answer; errors before the model are somebody else's."""
    if "block" in call.plan or "refuse" in call.plan:
        reason = call.plan.get("block") or "SAFETY"
        tokens = count(call.asked.prompt, len(call.asked.inputs), "", 0)
        feedback = {"blockReason": reason, "safetyRatings": []}
        return _packed(call, tokens, [{"promptFeedback": feedback}], 0)
    reason = _reason(call)
    if "finish" in call.plan or "content_filter" in call.plan or "refusal_field" in call.plan:
        candidate = {"index": 0, "finishReason": reason, "finishMessage": f"Stopped: {reason}"}
        tokens = count(call.asked.prompt, len(call.asked.inputs), "", 0)
        return _packed(call, tokens, [{"candidates": [candidate]}], 0)
    pictures = call.pictures() if call.wants_image() else []
    text = call.text() if not pictures else "Here is your picture." if "talk" in call.plan else ""
    parts: list[dict[str, Any]] = []
    if "thoughts" in call.plan:
        draft = call.picture(partial="thought of ")
        parts += [{"text": "First the composition.", "thought": True}, {**_inline(draft), "thought": True}]
    parts += [{"text": piece} for piece in (pieces(text, 4) if call.asked.stream else [text] if text else [])]
    parts += [_part(call, picture) for picture in pictures]
    tokens = call.tokens(len(pictures), text)
    # A stream says why it ended in a chunk of its own, after everything else.
    groups = [*([part] for part in parts), [{"text": ""}]] if call.asked.stream else [parts]
    chunks: list[dict[str, Any]] = [
        {"candidates": [{"index": 0, "content": {"role": "model", "parts": group}}]} for group in groups
    ]
    if reason is not None:
        chunks[-1]["candidates"][0]["finishReason"] = reason
    return _packed(call, tokens, chunks, len(pictures))


def signature(mark: Mark) -> str:
    """The thought signature of a picture this service made: what a later turn has to send back with it.

    It goes by what the picture shows: one that a client has encoded anew is still the same.
    """
    return base64.b64encode(hashlib.sha256(f"signature {mark}".encode()).digest()).decode()


def _known(given: Mapping[str, Any], names: set[str], where: str) -> None:
    for name in given:
        head, *rest = name.split("_")
        if head + "".join(word.capitalize() for word in rest) not in names:
            raise RejectedError(f"Invalid JSON payload received. Unknown name \"{name}\" at '{where}'", param=name)


def _images(part: Mapping[str, Any], where: str, site: Site) -> list[bytes]:
    inline = part.get("inlineData") or part.get("inline_data")
    file = part.get("fileData") or part.get("file_data")
    if inline is not None:
        mime = inline.get("mimeType") or inline.get("mime_type")
        if mime not in ("image/png", "image/jpeg", "image/webp"):
            raise RejectedError(f"Unsupported MIME type: {mime}", param=where)
        return [] if part.get("thought") else [decode(str(inline.get("data")), where)]
    if file is None:
        return []
    uri = str(file.get("fileUri") or file.get("file_uri"))
    try:
        return [site.stored(uri.rpartition("/")[2])]
    except KeyError:
        raise RejectedError(f"no such file: {uri}", param=where, status=403) from None


def _check_signature(model: str, part: Mapping[str, Any], at: int) -> None:
    """The third generation takes a picture of its own back only with the signature that came with it."""
    inline = part.get("inlineData") or part.get("inline_data")
    if inline is None or part.get("thought") or "gemini-3" not in model:
        return
    given = part.get("thoughtSignature") or part.get("thought_signature")
    if not given:
        raise RejectedError(f"Image part is missing a thought_signature in content position {at + 1}", param="contents")
    plain = str(given).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        right = signature(read_mark(decode(str(inline["data"]), "contents"))).rstrip("=")
    except (ValueError, OSError):
        right = ""  # no picture of this service's
    if plain != right:
        raise RejectedError("Corrupted thought signature.", param="contents")


def _reason(call: Call) -> str | None:
    if "no_end" in call.plan:
        return None
    if "content_filter" in call.plan or "refusal_field" in call.plan:
        return "SAFETY"
    return (call.plan["finish"] or "IMAGE_SAFETY") if "finish" in call.plan else "STOP"


def _inline(picture: Picture) -> dict[str, Any]:
    return {"inlineData": {"mimeType": picture.mime, "data": picture.base64}}


def _part(call: Call, picture: Picture) -> dict[str, Any]:
    shape = call.plan.get("shape", "")
    if picture.url is not None or shape.endswith("url"):
        return {"fileData": {"mimeType": picture.mime, "fileUri": call.link(picture, shape or "url")}}
    return {**_inline(picture), "thoughtSignature": signature(expected_mark(call.asked.prompt, call.asked.inputs))}


def _usage(call: Call, tokens: Tokens) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "promptTokenCount": tokens.given,
        "candidatesTokenCount": tokens.answered,
        "totalTokenCount": tokens.given + tokens.answered,
        "promptTokensDetails": _details(tokens.text_input, tokens.image_input),
        "candidatesTokensDetails": _details(tokens.text_output, tokens.image_output),
    }
    if not tokens.answered:
        del usage["candidatesTokenCount"], usage["candidatesTokensDetails"]
    return usage | ({"cost": tokens.usd(call.discount)} if "cost" in call.plan else {})


def _details(text: int, image: int) -> list[dict[str, Any]]:
    counted = {"TEXT": text, "IMAGE": image}
    return [{"modality": name, "tokenCount": number} for name, number in counted.items() if number]


def _packed(call: Call, tokens: Tokens, chunks: list[dict[str, Any]], images: int) -> Reply:
    """Chunks as one body or as a stream; the usage stands in the last."""
    usage = _usage(call, tokens)
    name = hashlib.sha256(f"{call.asked.prompt}/{call.attempt}".encode("utf-8", "surrogatepass")).hexdigest()[:20]
    chunks[-1]["usageMetadata"] = usage
    for chunk in chunks:
        chunk |= {"modelVersion": call.asked.model, "responseId": name}
    reply = Reply(tokens=tokens, usage=usage, images=images)
    if not call.asked.stream:
        reply.body = chunks[0]
    else:
        frames = [event(chunk, newline="\r\n") for chunk in chunks]
        reply.frames, reply.end = frames[:-1], frames[-1:]
    return reply
