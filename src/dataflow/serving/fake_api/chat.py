"""Chat completions that answer with images, in all the shapes seen in the wild, or with text."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

from dataflow.serving.fake_api.call import (
    Asked,
    Call,
    Picture,
    RejectedError,
    Reply,
    decode,
    event,
    from_url,
    pieces,
    wants_url,
    whole,
)
from dataflow.serving.fake_api.ledger import Tokens

SHAPES = (
    *("images", "camel", "images_url", "images_relative_url"),
    *("markdown", "markdown_open", "markdown_url", "url", "relative_url"),
    *("parts", "parts_url"),
)
"""How pictures come in a message, chosen by ``shape:NAME`` in the script or ``-NAME`` at the end of the model's name.

``images``: ``message.images`` with data URLs; ``camel``: the same with ``imageUrl``; ``markdown``: the content holds
``![image](data:…)``; ``markdown_open``: without the closing parenthesis; ``markdown_url``: with an address; ``url``: a
bare URL; ``relative_url``: markdown with a path of the same server; ``parts``: the content is a list of parts. ``_url``
behind ``images`` and ``parts`` puts addresses where the data URLs are.
"""
THINKING = "First the composition, then the light."


def parse(body: Mapping[str, Any]) -> Asked:
    """What a body of POST /v1/chat/completions asks for.

    Raises:
        RejectedError: the service would not take it.
    """
    messages = body.get("messages")
    if not isinstance(body.get("model"), str):
        raise RejectedError("you must provide a model parameter", param="model")
    if not isinstance(messages, list) or not messages:
        raise RejectedError("messages must be a list with at least one message", param="messages")
    prompt, inputs = "", []
    for at, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user", "assistant"):
            raise RejectedError("a message needs a role", param=f"messages[{at}].role")
        text, images = _message(message, f"messages[{at}]")
        inputs += images
        if message["role"] == "user":
            prompt = text
    model = body["model"]
    modalities = body.get("modalities") or []
    schema = _schema(body.get("response_format"))
    named = _shape_of(model) is not None or any(word in model for word in ("image", "banana", "edit"))
    return Asked(
        family="chat",
        model=model,
        prompt=prompt,
        inputs=tuple(inputs),
        number=whole(body.get("n"), "n", 1, 128, 1),
        seed=body.get("seed"),
        stream=body.get("stream") is True,
        wants_image=schema is None and ("image" in modalities or (not modalities and named)),
        schema=schema,
        body=body,
    )


def answer(call: Call) -> Reply:
    """The model's answer; errors and refusals before the model are somebody else's."""
    pictures = call.pictures() if call.wants_image() else []
    text = "" if pictures else call.text()
    said = _said(call, text)
    usage_text = said + (THINKING if "thoughts" in call.plan else "")
    tokens = call.tokens(len(pictures), usage_text)
    usage = _usage(call, tokens)
    reply = Reply(tokens=tokens, usage=usage, images=len(pictures))
    # Several answers (n) hold one picture each, several pictures of one answer are the script's wish.
    several = call.asked.number if call.asked.number > 1 and pictures else 1
    groups = [pictures[at::several] for at in range(several)]
    if call.asked.stream:
        return _stream(call, reply, groups, said)
    choices = [
        {"index": at, "message": _answered(call, group, said), "finish_reason": _finish(call), "logprobs": None}
        for at, group in enumerate(groups)
    ]
    if call.asked.body.get("logprobs") and not pictures:
        choices[0]["logprobs"] = logprobs(said, whole(call.asked.body.get("top_logprobs"), "top_logprobs", 0, 20, 0))
    reply.body = {**_head(call), "object": "chat.completion", "choices": choices, "usage": usage}
    return reply


def logprobs(text: str, top: int) -> dict[str, Any]:
    """Log-probabilities as chat completions give them: ``top`` alternatives per token, of its own kind.

    Digits stand against digits; yes against itself with a space before it and against no, and no likewise.
    """
    content = []
    for token in re.findall(r"\d|[^\W\d]+|\s+|[^\w\s]", text):
        others = _others(token)
        options = [(token, 0.8), *((other, 0.2 / len(others)) for other in others)]
        entries = [
            {"token": option, "logprob": math.log(share), "bytes": list(option.encode())} for option, share in options
        ]
        content.append({**entries[0], "top_logprobs": entries[:top]})
    return {"content": content, "refusal": None}


def _others(token: str) -> list[str]:
    """What the model might have said in place of a token."""
    if token.isdigit():
        return [digit for digit in "0123456789" if digit != token]
    match token.casefold():
        case "yes":
            return [f" {token}", "No"]
        case "no":
            return [f" {token}", "Yes"]
    return ["the", "a", "of"]


def _message(message: Mapping[str, Any], param: str) -> tuple[str, list[bytes]]:
    """Text and image bytes of one message, in order."""
    content, texts, images = message.get("content"), [], []
    if isinstance(content, str):
        texts.append(content)
        encoded = re.findall(r"data:image/\w+;base64,([A-Za-z0-9+/=_-]+)", content)
        images += [decode(data, f"{param}.content") for data in encoded]
    elif isinstance(content, list):
        for at, part in enumerate(content):
            where = f"{param}.content[{at}]"
            match part.get("type") if isinstance(part, dict) else None:
                case "text":
                    texts.append(str(part.get("text")))
                case "image_url":
                    images.append(_image_url(part, where))
                case _:
                    raise RejectedError("a part must be text or image_url", param=f"{where}.type")
    elif content is not None:
        raise RejectedError("content must be text or a list of parts", param=f"{param}.content")
    if message.get("role") == "assistant":
        images += [_image_url(image, f"{param}.images") for image in message.get("images") or ()]
    return "\n".join(texts), images


def _image_url(part: Mapping[str, Any], where: str) -> bytes:
    address = part.get("image_url") or part.get("imageUrl")
    url = address.get("url") if isinstance(address, dict) else None
    if not isinstance(url, str):
        raise RejectedError("image_url must be an object with a url", param=f"{where}.image_url")
    return from_url(url, f"{where}.image_url.url")


def _schema(wanted: Any) -> Mapping[str, Any] | None:
    match wanted:
        case {"type": "json_schema", "json_schema": {"name": str(), "schema": dict(schema)}}:
            return schema
        case {"type": "json_object"}:
            return {}
        case None | {"type": "text"}:
            return None
    raise RejectedError("response_format must be text, json_object or json_schema", param="response_format")


def _shape_of(model: str) -> str | None:
    ending = [shape for shape in SHAPES if model.endswith(f"-{shape}")]
    return max(ending, key=len, default=None)


def _shape(call: Call) -> str:
    shape = call.plan.get("shape") or _shape_of(call.asked.model) or "images"
    if wants_url(call.plan) and "url" not in shape:
        return "markdown_url"
    return shape


def _said(call: Call, text: str) -> str:
    """The text of the answer, without what stands there for pictures."""
    if "refusal_field" in call.plan or "content_filter" in call.plan or "finish" in call.plan or "block" in call.plan:
        return ""
    return text or ("Here is your picture." if "talk" in call.plan else "")


def _finish(call: Call) -> str | None:
    if "no_end" in call.plan:
        return None
    if "content_filter" in call.plan or "block" in call.plan:
        return "content_filter"
    return (call.plan["finish"] or "content_filter").lower() if "finish" in call.plan else "stop"


def _answered(call: Call, pictures: list[Picture], said: str) -> dict[str, Any]:
    """A message with its pictures."""
    shape = _shape(call)
    message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
    if "refusal_field" in call.plan:
        message |= {"content": None, "refusal": "I am sorry, I cannot help with that."}
    if "thoughts" in call.plan:
        message["reasoning" if shape in ("images", "camel") else "reasoning_content"] = THINKING
    if not pictures:
        return message
    urls = [call.link(picture, shape) for picture in pictures]
    key = "imageUrl" if shape == "camel" else "image_url"
    entries = [{"type": "image_url", key: {"url": url}} for url in urls]
    if shape.startswith("parts"):
        thoughts = []
        if "thoughts" in call.plan:
            draft = call.picture(partial="thought of ")
            thoughts = [
                {"type": "thinking", "thinking": THINKING},
                {"type": "image_url", "thought": True, "image_url": {"url": draft.data_url}},
            ]
        message["content"] = [*thoughts, *([{"type": "text", "text": said}] if said else []), *entries]
    elif shape.startswith(("images", "camel")):
        message["images"] = [{**entry, "index": at} for at, entry in enumerate(entries)]
    elif shape == "url":
        message["content"] = "\n".join([*([said] if said else []), *urls])
    else:
        close = "" if shape == "markdown_open" else ")"
        message["content"] = "\n\n".join([*([said] if said else []), *(f"![image]({url}{close}" for url in urls)])
    return message


def _usage(call: Call, tokens: Tokens) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "prompt_tokens": tokens.given,
        "completion_tokens": tokens.answered,
        "total_tokens": tokens.given + tokens.answered,
        "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": tokens.image_input},
        "completion_tokens_details": {
            "image_tokens": tokens.image_output,
            "reasoning_tokens": math.ceil(len(THINKING) / 4) if "thoughts" in call.plan else 0,
        },
    }
    return usage | ({"cost": tokens.usd(call.discount)} if "cost" in call.plan else {})


def _head(call: Call) -> dict[str, Any]:
    name = hashlib.sha256(f"{call.asked.prompt}/{call.attempt}".encode("utf-8", "surrogatepass")).hexdigest()[:24]
    return {"id": f"chatcmpl-{name}", "created": 1_790_000_000, "model": call.asked.model}


def _stream(call: Call, reply: Reply, groups: list[list[Picture]], said: str) -> Reply:
    head = {**_head(call), "object": "chat.completion.chunk"}
    wanted = call.asked.body.get("stream_options") or {}
    own_usage = call.asked.body.get("usage") or {}
    reply.tells = bool(wanted.get("include_usage") or own_usage.get("include"))
    # OpenRouter's way of keeping a connection open while the model works.
    frames = [b": PROCESSING\n\n"]
    for at, group in enumerate(groups):
        message = _answered(call, group, said)
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        for name in ("reasoning", "reasoning_content", "refusal"):
            deltas += [{name: piece} for piece in pieces(message.get(name) or "", 5)]
        content = message["content"]
        deltas += (
            [{"content": content}]
            if isinstance(content, list)
            else [{"content": piece} for piece in pieces(content or "", 40)]
        )
        if "images" in message:
            deltas.append({"images": message["images"]})
        for delta in deltas:
            choice = {"index": at, "delta": delta, "finish_reason": None, "logprobs": None}
            frames.append(event({**head, "choices": [choice]}))
        choice = {"index": at, "delta": {}, "finish_reason": _finish(call), "logprobs": None}
        reply.end.append(event({**head, "choices": [choice]}))
    if reply.tells:
        reply.end.append(event({**head, "choices": [], "usage": reply.usage}))
    reply.end.append(event("[DONE]"))
    reply.frames = frames
    return reply
