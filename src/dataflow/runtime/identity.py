"""What a request is called: the id that is its file name and journal key, and the seed derived for it.

The id is a hash of everything that makes the image what it is: prompt, negative prompt, *content* of each input image,
size, parameters, the serving's fingerprint, the seed (or the run seed), the sample number and the occurrence among
identical requests. It never depends on the row's position: rows may be inserted, reordered or removed freely.

The derived seed depends on prompt, input images, run seed, sample and occurrence only: the same prompt starts from the
same noise under another model, step count or guidance, so that runs can be compared image by image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from dataflow.errors import ImageError, InputError
from dataflow.types import Draft, GenerationRequest, Serving

FORMAT = 1
"""Part of every id; to be raised when the meaning of an id changes."""

ID_BYTES = 16
ORIGIN_BYTES = 8
SEED_LIMIT = 2**63


class Identity(NamedTuple):
    """A draft's place in the world.

    Attributes:
        key: the request id as 16 bytes.
        image_hashes: sha256 (hex) of each input image, the mask's last.
        occurrence: how many identical drafts came before it in the table.
        broken: why it can never be made as the files are: an input image cannot be read.
    """

    key: bytes
    image_hashes: tuple[str, ...]
    occurrence: int
    broken: ImageError | None = None


class Identifier:
    """Gives requests their identity, in the order of the table.

    Args:
        serving: asked once for its fingerprint and default parameters.
        run_seed: mixed into every derived seed.
        resolve: absolute path of an image path as it stands in a row.
        digest: sha256 (hex) of a file's bytes.
        earlier: for a part of a table, how many identical drafts the parts before it have.

    Attributes:
        origins: of every draft so far the first :data:`ORIGIN_BYTES` bytes of what identical drafts have in common.
    """

    def __init__(
        self,
        serving: Serving,
        run_seed: int,
        *,
        resolve: Callable[[str], Path],
        digest: Callable[[Path], str],
        earlier: Callable[[bytes], int] | None = None,
    ) -> None:
        self.fingerprint = dict(serving.fingerprint())
        defaults = dict(serving.default_params())
        width, height = defaults.pop("width", None), defaults.pop("height", None)
        self.size: tuple[int, int] | None = (width, height) if width and height else None
        self.negative_prompt: str | None = defaults.pop("negative_prompt", None)
        self.params = defaults
        self.run_seed = run_seed
        self._resolve = resolve
        self._digest = digest
        self._base = hashlib.sha256(orjson.dumps([FORMAT, self.fingerprint], option=orjson.OPT_SORT_KEYS))
        self._plain_tail = self._tail(Draft(prompt=""))
        self._earlier = earlier
        self._seen: set[bytes] = set()
        self._repeats: dict[bytes, int] = {}
        self.origins = bytearray()

    def identify(self, drafts: Sequence[Draft]) -> list[Identity]:
        """The identities of a row's drafts. Call it once per row, in table order: occurrences are counted here.

        Where some input images cannot be read and others can, the drafts that need them are broken, and only those.

        Raises:
            InputError: a prompt is not valid Unicode, or no draft's input images can be read.
        """
        # Everything that can fail comes first: a row that cannot be used must not count as an occurrence.
        contents = [self._content_or_error(draft) for draft in drafts]
        errors = [content for content in contents if isinstance(content, ImageError)]
        if errors and len(errors) == len(contents):
            raise errors[0]
        identities: list[Identity] = []
        for draft, found in zip(drafts, contents, strict=True):
            if isinstance(found, ImageError):
                place = orjson.dumps(["broken", draft.prompt, draft.images, draft.mask, draft.sample])
                identities.append(Identity(hashlib.sha256(place).digest()[:ID_BYTES], (), 0, found))
                continue
            content, image_hashes = found
            digest = self._base.copy()
            digest.update(content)
            if draft.after is not None:
                digest.update(identities[draft.after].key)
            key = digest.digest()[:ID_BYTES]
            occurrence = self._occurrence(key)
            if occurrence:
                key = hashlib.sha256(b"%b#%d" % (key, occurrence)).digest()[:ID_BYTES]
            identities.append(Identity(key, image_hashes, occurrence))
        return identities

    def _occurrence(self, key: bytes) -> int:
        """How many identical drafts came before this one in the table."""
        origin = key[:ORIGIN_BYTES]
        self.origins += origin
        if key in self._seen:
            self._repeats[key] = self._repeats.get(key, 0) + 1
        else:
            self._seen.add(key)
            if self._earlier is None or not (before := self._earlier(origin)):
                return 0
            self._repeats[key] = before
        return self._repeats[key]

    def request(self, draft: Draft, identity: Identity, parent: GenerationRequest | None) -> GenerationRequest:
        """The whole request of a draft that has to be made; ``parent`` is its previous turn."""
        if draft.seed is not None:
            seed = (draft.seed + draft.sample) % SEED_LIMIT
        else:
            origin = identity.image_hashes if parent is None else parent.seed
            parts = [self.run_seed, draft.prompt, origin, draft.sample, identity.occurrence]
            seed = int.from_bytes(hashlib.sha256(orjson.dumps(parts)).digest()[:8]) % SEED_LIMIT
        return GenerationRequest(
            request_id=identity.key.hex(),
            prompt=draft.prompt,
            images=tuple(str(self._resolve(path)) for path in draft.images),
            image_hashes=identity.image_hashes,
            mask=None if draft.mask is None else str(self._resolve(draft.mask)),
            negative_prompt=self.negative_prompt if draft.negative_prompt is None else draft.negative_prompt,
            seed=seed,
            size=draft.size or self.size,
            params={**self.params, **draft.params},
            after=None if parent is None else parent.request_id,
        )

    def _content_or_error(self, draft: Draft) -> tuple[bytes, tuple[str, ...]] | ImageError:
        try:
            return self._content(draft)
        except ImageError as error:
            return error

    def _content(self, draft: Draft) -> tuple[bytes, tuple[str, ...]]:
        inputs = draft.images if draft.mask is None else (*draft.images, draft.mask)
        image_hashes = tuple(self._digest(self._resolve(path)) for path in inputs) if inputs else ()
        plain = draft.seed is None and draft.size is None and not draft.params
        negative = self.negative_prompt if draft.negative_prompt is None else draft.negative_prompt
        try:
            masked = () if draft.mask is None else ("mask",)
            head = orjson.dumps([draft.prompt, negative, image_hashes, draft.sample, *masked])
        except TypeError as error:
            which = "negative prompt" if _is_unicode(draft.prompt) else "prompt"
            raise InputError(f"the {which} is not valid Unicode text ({error}): write it as UTF-8") from None
        return head + (self._plain_tail if plain else self._tail(draft)), image_hashes

    def _tail(self, draft: Draft) -> bytes:
        params = _canonical({**self.params, **draft.params})
        # The run seed only matters where the row does not fix a seed itself.
        seed = ["run", self.run_seed] if draft.seed is None else ["row", draft.seed]
        return orjson.dumps([draft.size or self.size, params, seed], option=orjson.OPT_SORT_KEYS)


def _canonical(params: Mapping[str, Any]) -> dict[str, Any]:
    """Equal parameters in equal form: ``4.0`` and ``4`` make the same image."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value for name, value in params.items()
    }


def _is_unicode(text: str) -> bool:
    """False for text with lone surrogates: half an emoji, cut in the middle."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
