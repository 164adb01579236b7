"""The nouns of the package: what a request, a result, a plan and a serving are.

Every image asked for is one :class:`GenerationRequest`; several images per prompt are several requests. A serving turns
a batch of requests into results of the same length and order; the engine (:mod:`dataflow.runtime.engine`) does all the
rest: names, files, journal, retries, order.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL.Image import Image

    from dataflow.errors import ServingError

Row = dict[str, Any]
"""One row of a table: JSON values under column names."""

Task = Literal["text2image", "imageedit"]
Status = Literal["done", "refused", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """An earlier turn of a multi-turn edit: what was said, what was shown, what came back (all paths)."""

    prompt: str
    images: tuple[str, ...]
    answer: str


@dataclass(slots=True, kw_only=True)
class Draft:
    """What a row asks for, before it has an identity. Operators write drafts; the engine makes requests of them.

    Attributes:
        prompt: the text, exactly as the user wrote it.
        images: paths of input images as they stand in the row; several are references, in order.
        mask: path of a picture that says where the first input image may be changed, or None.
        negative_prompt: what must not be seen.
        seed: a seed the row fixes itself; None lets the engine derive one.
        size: (width, height) in pixels, or None for the serving's default.
        params: generation parameters the row overrides (``num_inference_steps``, ``guidance_scale``, …).
        sample: number of the image among several of one prompt, from 0.
        after: position, in the row's list of drafts, of the previous turn whose image this one edits.
    """

    prompt: str
    images: tuple[str, ...] = ()
    mask: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    size: tuple[int, int] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    sample: int = 0
    after: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One image to make.

    Attributes:
        request_id: 32 hex digits, a hash of everything that makes the image what it is. File name and journal key.
        prompt: the text.
        images: absolute paths of input images in order; empty means text to image.
        image_hashes: sha256 of each input file's bytes, as they were when the request was made; the mask's comes last.
        mask: absolute path of the mask, or None.
        negative_prompt: what must not be seen, or None.
        seed: 0 ≤ seed < 2**63.
        size: (width, height) in pixels, or None for the model's own choice.
        params: all generation parameters: the serving's defaults with the row's own on top.
        turns: earlier turns of a multi-turn edit, oldest first; ``images`` is then the last turn's answer.
        after: request id of the previous turn, or None.
        alone: the engine suspects this request of killing its worker: it shares a batch with nothing.
        job: for a detached serving, the name of the batch job it belongs to.
    """

    request_id: str
    prompt: str
    images: tuple[str, ...] = ()
    image_hashes: tuple[str, ...] = ()
    mask: str | None = None
    negative_prompt: str | None = None
    seed: int
    size: tuple[int, int] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()
    after: str | None = None
    alone: bool = False
    job: str | None = None

    @property
    def task(self) -> Task:
        return "imageedit" if self.images or self.after else "text2image"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """What a serving answers to one request: images, or text, or an error. A refusal is a result.

    Attributes:
        images: decoded pictures (PIL, any mode) or encoded bytes as a service sent them (not trusted, not decoded);
            a memoryview where they wait on disk.
        text: the answer of a serving that writes text.
        error: why there is nothing; its class says what the engine should do (:mod:`dataflow.errors`).
        usage: what the service counted, stored with the record; ``usd`` is what the call cost in US dollars, None or
            absent where nobody knows. Empty for a serving that costs nothing.
        provenance: facts about this one call that belong into the file and the journal (device, batch size).
        seconds: time the request took, batch time shared among its members.
    """

    images: tuple[Image | bytes | memoryview, ...] = ()
    text: str | None = None
    error: ServingError | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def finish_reason(self) -> Literal["stop", "refused", "error"]:
        if self.error is None:
            return "stop"
        return "refused" if self.error.reason == "refused" else "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedImage:
    """An image file that exists, whole and durable.

    Attributes:
        name: path relative to the store's folder, with ``/`` (``"ab/ab12….png"``).
        sha256: of the file's bytes, 64 hex digits.
        bytes: size of the file.
        width: in pixels.
        height: in pixels.
    """

    name: str
    sha256: str
    bytes: int
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one request ended, as :attr:`Plan.fold` sees it.

    Attributes:
        request_id: the request.
        status: ``done``, ``refused`` or ``failed``.
        images: paths of the files, ready to stand in a row.
        text: a text answer.
        reason: one word, when not done (``refused``, ``out_of_memory``, ``bad_request``, …).
        message: the same for people.
    """

    request_id: str
    status: Status
    images: tuple[str, ...] = ()
    text: str | None = None
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Drop:
    """A row that a fold takes out of the table; it goes to the step's sidecar file with this reason.

    Attributes:
        reason: one word, for counting.
        details: what else the sidecar says of it, as JSON: which row it repeats, what is wrong with it.
    """

    reason: str
    details: Mapping[str, Any] = field(default_factory=dict)


RAW_LIMIT = 10_000


@dataclass(frozen=True, slots=True)
class BadRow:
    """A piece of the input table that is not a row (a broken JSON line).

    Attributes:
        raw: the text as found, cut at ``RAW_LIMIT`` characters.
        error: what is wrong with it, for people.
    """

    raw: str
    error: str


def new_job_name() -> str:
    """A name for a batch job that nobody used before; it says when it was given."""
    return f"{int(time.time())}-{uuid.uuid4().hex}"


def job_named_at(name: str) -> float:
    """Seconds since 1970 at which :func:`new_job_name` gave the name."""
    return float(name.partition("-")[0])


class ImageStore(Protocol):
    """Where images are kept; :class:`dataflow.io.ImageIO` is the one in the package.

    Attributes:
        save_path: a folder, or the URL of another place.
    """

    save_path: Path | str

    def path(self, name: str) -> str:
        """What stands in a row for the file ``name`` (relative to the store)."""
        ...

    def save(self, image: Image | bytes | memoryview, name: str, metadata: Mapping[str, Any]) -> SavedImage:
        """Write one image under ``name`` (no suffix) durably and atomically; decode and check bytes first."""
        ...

    def find(self, name: str) -> SavedImage | None:
        """The whole, valid image of that name (no suffix), or None."""
        ...

    def existing(self) -> Iterator[tuple[str, int]]:
        """Name and size in bytes of every image file there is."""
        ...

    def sizes(self, names: Iterable[str]) -> Iterator[tuple[str, int]]:
        """Those of the files that exist, as :meth:`existing` gives them."""
        ...

    def sweep(self) -> int:
        """Remove what killed runs left half-written; number of files. Only under the cache lock."""
        ...


@runtime_checkable
class Serving(Protocol):
    """Whatever makes images (or text) from requests. Subclass it to inherit the defaults below.

    The constructor only stores, so that a serving pickles to a worker in a few hundred bytes; :meth:`setup` loads. A
    serving never retries, sleeps or writes files: it translates one batch and classifies its errors.

    Attributes:
        batch_size: largest number of requests per call of :meth:`generate`.
        concurrency: calls of :meth:`generate` that may be under way at once.
        ahead: further calls whose requests are only made ready (pictures read) until it is their turn.
        image_io: where the images go; None for a serving that answers with text.
        images_per_prompt: how many images each prompt asks for.
        timeout: seconds one call of :meth:`generate` may take; None for no limit.
        requests_per_minute: most requests that may start in a minute; None for any number.
        reproducible: asking again gives the same answer, so that a broken one is not asked for again.
        masks: a request may have a mask; one that has none here is refused before any work.
        remote: the work is done elsewhere; the replicas are connections that share this process, and one that fails
            for good leaves its work to the others.
        num_cpus: CPUs that one copy takes on a cluster. None for one beside a GPU, and else for a machine's share among
            its copies, which is all of them with one copy on each.
        num_gpus: GPUs, or a share of one, likewise; None for one where the cluster has any.
        memory_gb: 10^9 bytes of main memory, likewise; None takes no account of it.
        environment: names of the environment variables that :meth:`setup` reads (keys): they are sent along to other
            machines.
        detached: a call of :meth:`generate` only waits for a batch job that goes on without it, named by the requests'
            ``job``. It may be given up at any time: the same requests with the same name find the job again.
    """

    batch_size: int = 1
    concurrency: int = 1
    ahead: int = 0
    image_io: ImageStore | None = None
    images_per_prompt: int = 1
    timeout: float | None = None
    requests_per_minute: float | None = None
    reproducible: bool = True
    masks: bool = False
    remote: bool = False
    num_cpus: float | None = 1.0
    num_gpus: float | None = 0.0
    memory_gb: float | None = None
    environment: tuple[str, ...] = ()
    detached: bool = False

    def fingerprint(self) -> Mapping[str, Any]:
        """What identifies the model, as JSON: id, revision, class, dtype, adapters. Not batch size, device or keys."""
        ...

    def default_params(self) -> Mapping[str, Any]:
        """Generation parameters used where a row says nothing (steps, guidance, …), as JSON; part of a request's id.

        ``height`` and ``width`` among them stand for the default size.
        """
        return {}

    def check(self, request: GenerationRequest) -> None:
        """Raise :class:`~dataflow.errors.BadRequestError` if this request can never work here. No work yet."""

    def estimate(self, request: GenerationRequest) -> float | None:
        """US dollars a request is expected to cost, rather too many than too few; None where nobody knows."""
        return 0.0

    def batch_key(self, request: GenerationRequest) -> Hashable:
        """Requests with equal keys may share a batch."""
        return None

    def replicas(self) -> Sequence[Serving]:
        """Copies to run side by side, each in a process of its own (one per GPU); a single or remote one runs here."""
        return [self]

    def preflight(self) -> None:
        """Warn of what would stop :meth:`setup`. Called before the first step of a pipeline runs; loads nothing."""

    def setup(self) -> None:
        """Load weights or open connections. Called once per worker, and only if there is work."""

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """One result per request, same order. A batch that failed whole raises a ServingError."""
        ...

    def cleanup(self) -> None:
        """Free what :meth:`setup` took. The serving can be set up again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One step, described: building it does no work.

    Attributes:
        name: the operator, for journals and people.
        inputs: columns that rows must have.
        outputs: columns the step writes.
        requests: what a row asks for; raises :class:`~dataflow.errors.InputError` for a row that cannot be used.
        fold: the row with its outcomes in it, or :class:`Drop`. Where ``multiplies``, it may also give several rows,
            at least one, which are written in their order; they may be made one by one, as they are written.
        serving: who makes it; None for a step that only folds (a filter).
        seed: the run seed, mixed into every derived seed.
        prepare: looks over all rows before the first is folded, for a step without a serving that decides about a row
            by the others.
        folding: what the fold goes by beyond the outcomes, such as rules and thresholds: with another one the table is
            written anew, though nothing was made.
        multiplies: a row may become several, so that nothing but a run tells how many the step writes.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    requests: Callable[[Row], Sequence[Draft]]
    fold: Callable[[Row, Sequence[Outcome]], Row | Drop | Iterable[Row]]
    serving: Serving | None = None
    seed: int = 0
    prepare: Callable[[Iterable[Row | BadRow]], None] | None = None
    folding: str = ""
    multiplies: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What the pending rows of a step will take, if they are like the settled ones.

    Ranges are low, likely, high (95 %).

    Attributes:
        rows: pending rows.
        settled: rows that it rests on.
        usd: US dollars; None where nothing was counted or a price is unknown.
        seconds: with all requests at once that the serving allows; None for batch jobs.
        bytes: of images.
        refused: share of the rows, 0 to 1.
        failed: likewise.
    """

    rows: int
    settled: int
    usd: tuple[float, float, float] | None
    seconds: float | None
    bytes: float | None
    refused: tuple[float, float, float]
    failed: tuple[float, float, float]


@dataclass(slots=True, kw_only=True)
class Summary:
    """What became of a step's input rows. ``rows == done + refused + failed + dropped + pending``, always.

    Attributes:
        step: name of the step's table without suffix.
        rows: rows in the input table.
        done: rows with every image they asked for.
        refused: rows with at least one refusal (and no other failure).
        failed: rows with at least one failure.
        dropped: rows a filter took out.
        pending: rows not finished yet.
        reasons: failed, refused and dropped rows by reason.
        images: images that exist for these rows.
        bytes: their size together.
        made: images made in this run.
        adopted: images found whole on disk without a record.
        seconds: wall time of this run.
        usd: US dollars spent on the step in all its runs, refused and repeated calls included.
        unpriced: calls of which nobody knows what they cost.
        output: path of the step's table, None when it was not written.
        written: rows in it. They are more than those that were not dropped where a row became several, and fewer by
            what was no row at all.
        forecast: what the rest will take, after a pilot.
    """

    step: str = ""
    rows: int = 0
    done: int = 0
    refused: int = 0
    failed: int = 0
    dropped: int = 0
    pending: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    images: int = 0
    bytes: int = 0
    made: int = 0
    adopted: int = 0
    seconds: float = 0.0
    usd: float = 0.0
    unpriced: int = 0
    output: str | None = None
    written: int = 0
    forecast: Forecast | None = None

    @property
    def balanced(self) -> bool:
        return self.rows == self.done + self.refused + self.failed + self.dropped + self.pending
