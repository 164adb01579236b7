"""Forms with files, as multipart bodies carry them."""

from __future__ import annotations

from aiohttp import BodyPartReader, web  # noqa: TID253 - only the server process imports this file

from dataflow.serving.fake_api.images import Upload


async def read_form(request: web.Request) -> tuple[dict[str, str], list[Upload]]:
    """Fields by name (of several with one name, the last) and files in order."""
    fields: dict[str, str] = {}
    files: list[Upload] = []
    async for part in await request.multipart():
        if not isinstance(part, BodyPartReader) or part.name is None:
            continue
        data = bytes(await part.read(decode=False))
        if part.filename is None:
            fields[part.name] = data.decode()
        else:
            mime = part.headers.get("Content-Type", "application/octet-stream")
            files.append(Upload(field=part.name, filename=part.filename, mime=mime, data=data))
    return fields, files
