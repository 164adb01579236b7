"""Where a batch is made: :class:`InlineWorker` here, :class:`ProcessWorker` in a process of its own.

A worker takes two steps with a batch, so that the next one can be generated while the last one is encoded and written:
:meth:`generate` makes the pictures and keeps them, :meth:`save` writes them and tells their names. Pixels never leave
the worker; what comes back is one :class:`Made` or one :class:`~dataflow.errors.ServingError` per request.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

from dataflow import __version__
from dataflow.errors import (
    BadOutputError,
    BadRequestError,
    ConfigError,
    DataflowError,
    FatalServingError,
    ImageError,
    InputError,
    RetryError,
    ServingError,
    WorkerDiedError,
)
from dataflow.types import GenerationRequest, GenerationResult, SavedImage, Serving

SAVE_THREADS = 4
STOP_SECONDS = 30.0
"""How long a worker process may take to end."""

# Not "-m": the module would be "__main__" over there, and what it sends could not be unpacked here.
_ENTRY = "import sys; from dataflow.runtime.worker import main; main(int(sys.argv[1]))"


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """One request's result, safe on disk."""

    images: tuple[SavedImage, ...] = ()
    text: str | None = None
    seconds: float = 0.0
    usage: Mapping[str, Any] = field(default_factory=dict)


Item = Made | ServingError


class Worker(Protocol):
    """One copy of a serving at work.

    Attributes:
        concurrency: batches that may be with it at once, those it makes ready included.
    """

    concurrency: int

    @property
    def up(self) -> bool:
        """Whether it can take a batch, once it was started; if not, it is to be started again."""
        ...

    async def start(self) -> None: ...

    async def generate(self, requests: Sequence[GenerationRequest]) -> int: ...

    async def save(self, ticket: int) -> list[Item]: ...

    async def stop(self) -> None: ...

    def give_up(self) -> None:
        """Drop what is under way; :meth:`stop` follows."""
        ...


class InlineWorker:
    """Runs a serving in this process.

    Args:
        serving: set up by :meth:`start`, cleaned up by :meth:`stop`.
        fingerprint: what the images' metadata says of the model.
    """

    up = True

    def __init__(self, serving: Serving, fingerprint: Mapping[str, Any]) -> None:
        self.serving = serving
        self.concurrency = serving.concurrency + serving.ahead
        self._fingerprint = dict(fingerprint)
        self._tickets = itertools.count()
        self._held: dict[int, tuple[Sequence[GenerationRequest], list[GenerationResult]]] = {}
        self._savers = ThreadPoolExecutor(SAVE_THREADS, thread_name_prefix="save")

    async def start(self) -> None:
        """Load the serving.

        Raises:
            FatalServingError: it does not load.
        """
        try:
            await asyncio.to_thread(self.serving.setup)
        except (FatalServingError, ConfigError):
            raise
        except Exception as error:
            # Loading runs foreign code that may raise anything, and nothing can be made without it.
            raise FatalServingError(f"the serving did not start: {type(error).__name__}: {error}") from error

    async def generate(self, requests: Sequence[GenerationRequest]) -> int:
        """Make one batch and keep it; the ticket is for :meth:`save`.

        Raises:
            ServingError: the batch failed whole.
        """
        try:
            results = await asyncio.wait_for(self.serving.generate(requests), self.serving.timeout)
        except TimeoutError as error:
            limit = self.serving.timeout
            raise RetryError(f"no answer within {limit:g} s" if limit else str(error), reason="timeout") from None
        except InputError as error:
            reason = f"image_{error.reason}" if isinstance(error, ImageError) else "bad_input"
            raise BadRequestError(str(error), reason=reason) from error
        except DataflowError:
            raise
        except Exception as error:
            # A serving may raise anything: the engine isolates the request that causes it.
            raise ServingError(f"{type(error).__name__}: {error}", reason="crash") from error
        if len(results) != len(requests):
            raise BadOutputError(f"the serving answered {len(requests)} requests with {len(results)} results")
        ticket = next(self._tickets)
        self._held[ticket] = (requests, results)
        return ticket

    async def save(self, ticket: int) -> list[Item]:
        """Write the pictures of a batch.

        Raises:
            OSError: the disk is full or not writable.
        """
        requests, results = self._held.pop(ticket)
        if not any(result.images for result in results):
            return [self._save(request, result) for request, result in zip(requests, results, strict=True)]
        loop = asyncio.get_running_loop()
        saving = (
            loop.run_in_executor(self._savers, self._save, request, result)
            for request, result in zip(requests, results, strict=True)
        )
        return await asyncio.gather(*saving)

    async def stop(self) -> None:
        self._savers.shutdown()
        await asyncio.to_thread(self.serving.cleanup)

    def give_up(self) -> None:
        pass  # the engine cancels the call

    def _save(self, request: GenerationRequest, result: GenerationResult) -> Item:
        item = self._saved(request, result)
        if isinstance(item, ServingError) and result.usage:
            item.usage = result.usage  # an answer that cannot be used was paid for all the same
        return item

    def _saved(self, request: GenerationRequest, result: GenerationResult) -> Item:
        if result.error is not None:
            return result.error
        store = self.serving.image_io
        if result.images and store is None:
            return BadOutputError("the serving made an image but has no image_io to keep it", reason="no_image_io")
        if not result.images and result.text is None:
            return BadOutputError("the serving answered with neither image nor text", reason="empty_answer")
        saved = []
        metadata = self._metadata(request, result)
        for number, image in enumerate(result.images):
            assert store is not None
            name = request.request_id if number == 0 else f"{request.request_id}_{number}"
            try:
                saved.append(store.save(image, name, metadata))
            except ImageError as error:
                return BadOutputError(f"the answer is not a usable image: {error}", reason=error.reason)
            except Exception as error:
                if isinstance(error, OSError) and error.errno is not None:
                    # A full disk does not say which one it is.
                    error.filename = error.filename or str(store.save_path)
                    raise
                return BadOutputError(f"the answer cannot be saved: {type(error).__name__}: {error}", reason="crash")
        text = None if result.text is None else result.text.encode(errors="replace").decode()
        return Made(images=tuple(saved), text=text, seconds=result.seconds, usage=result.usage)

    def _metadata(self, request: GenerationRequest, result: GenerationResult) -> dict[str, Any]:
        metadata: dict[str, Any] = {
            "request_id": request.request_id,
            "prompt": request.prompt,
            "seed": request.seed,
            "params": dict(request.params),
            **self._fingerprint,
        }
        if request.negative_prompt is not None:
            metadata["negative_prompt"] = request.negative_prompt
        if request.size is not None:
            metadata["size"] = list(request.size)
        if request.images:
            metadata["images"] = list(request.images)
            metadata["image_hashes"] = list(request.image_hashes)
        if request.mask is not None:
            metadata["mask"] = request.mask
        if request.after is not None:
            metadata["after"] = request.after
        if result.usage:
            metadata["usage"] = dict(result.usage)
        metadata["software"] = f"open-dataflow {__version__}"
        metadata["provenance"] = dict(result.provenance)
        return metadata


class ProcessWorker:
    """Runs a copy of a serving in a process of its own, and starts a new one when it dies.

    The process is a Python of its own that is sent the serving: not forked, and without importing the caller's main
    module again, so that scripts need no ``if __name__ == "__main__"`` and CUDA can be used.
    """

    up = True  # a process that died is replaced when the next batch comes

    def __init__(self, serving: Serving, fingerprint: Mapping[str, Any]) -> None:
        self.concurrency = serving.concurrency + serving.ahead
        self._timeout = serving.timeout
        try:
            self._payload = pickle.dumps((serving, dict(fingerprint)))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(f"{type(serving).__name__} cannot be sent to a worker process: {error}") from None
        self._child: _Child | None = None
        self._tickets = itertools.count()
        self._held: dict[int, _Child] = {}
        self._starting = asyncio.Lock()
        self._loaded_once = False

    async def start(self) -> None:
        """Start the process and wait until its serving is loaded.

        Raises:
            FatalServingError: the serving does not load.
        """
        await self._living()

    async def generate(self, requests: Sequence[GenerationRequest]) -> int:
        """Make one batch and keep it over there; the ticket is for :meth:`save`.

        Raises:
            ServingError: the batch failed whole; WorkerDiedError if the process is gone.
        """
        child = await self._living()
        ticket = next(self._tickets)
        try:
            await asyncio.wait_for(child.ask("generate", ticket, requests), self._timeout)
        except TimeoutError:
            child.kill()
            raise RetryError(f"no answer within {self._timeout:g} s; worker restarted", reason="timeout") from None
        self._held[ticket] = child
        return ticket

    async def save(self, ticket: int) -> list[Item]:
        """Have the pictures of a batch written.

        Raises:
            OSError: the disk is full or not writable.
            WorkerDiedError: the process is gone, the batch with it.
        """
        return await self._held.pop(ticket).ask("save", ticket, None)

    async def stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if not self._loaded_once:
            child.kill()  # nobody waits for a model that is not needed any more
        if child.process.poll() is None:
            try:
                await asyncio.to_thread(child.send, pickle.dumps(("stop", 0, None)))
                await asyncio.to_thread(child.process.wait, STOP_SECONDS)
            except (OSError, subprocess.TimeoutExpired):
                child.kill()
        # It calls into the loop, which may be closed next.
        await asyncio.to_thread(child.listener.join)

    def give_up(self) -> None:
        if self._child is not None:
            self._child.kill()

    async def _living(self) -> _Child:
        """The process, started if there is none (any more)."""
        async with self._starting:
            child = self._child
            if child is not None and not child.death and child.process.poll() is None:
                return child
            child = self._child = _Child(asyncio.get_running_loop())
            ready = child.expect("ready", 0)
            with contextlib.suppress(OSError):  # the listener tells
                await asyncio.to_thread(child.send, self._payload)
            try:
                await ready
            except WorkerDiedError as error:
                message = f"the worker process ended while it was loading: {error}"
                if self._loaded_once:
                    raise WorkerDiedError(message) from None
                raise FatalServingError(message) from None
            self._loaded_once = True
            return child


class _Child:
    """A worker process, and the answers it owes. All but :meth:`send` and the listener belong to the loop's thread.

    Attributes:
        death: how it ended; empty while it lives, as far as the loop knows.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _ENTRY, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                # Ctrl-C is the parent's business: it lets the batches in flight end.
                start_new_session=True,
            )
        self.death = ""
        self._connection = Connection(ours.detach())
        self._answers: dict[tuple[str, int], asyncio.Future[Any]] = {}
        self._loop = loop
        self._send_lock = threading.Lock()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def expect(self, what: str, ticket: int) -> asyncio.Future[Any]:
        if self.death:
            raise WorkerDiedError(self.death)
        answer = self._answers[what, ticket] = self._loop.create_future()
        return answer

    async def ask(self, what: str, ticket: int, body: object) -> Any:
        answer = self.expect(what, ticket)
        # On a broken pipe the listener fails every open answer, this one too.
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self.send, pickle.dumps((what, ticket, body)))
        return await answer

    def send(self, data: bytes) -> None:
        with self._send_lock:
            self._connection.send_bytes(data)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _listen(self) -> None:
        try:
            while True:
                what, ticket, error, body = pickle.loads(self._connection.recv_bytes())  # noqa: S301  our own child's words
                self._loop.call_soon_threadsafe(self._settle, (what, ticket), error, body)
        except (EOFError, OSError):
            code = self.process.wait()
            self._connection.close()
            with contextlib.suppress(RuntimeError):  # the loop may be closed, after a second Ctrl-C
                self._loop.call_soon_threadsafe(self._bury, f"the worker process died (exit status {code})")

    def _settle(self, key: tuple[str, int], error: BaseException | None, body: object) -> None:
        answer = self._answers.pop(key, None)
        if answer is not None and not answer.done():
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(body)

    def _bury(self, death: str) -> None:
        self.death = death
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(WorkerDiedError(death))
        self._answers.clear()


def sendable(
    error: BaseException | None, body: Any, dumps: Callable[[object], bytes] = pickle.dumps
) -> tuple[BaseException | None, Any]:
    """An error and an answer as they can be sent to another process: what cannot becomes an error that says so.

    Args:
        error: what went wrong.
        body: what went well.
        dumps: how they will be packed.
    """
    if error is not None and not isinstance(error, DataflowError | OSError):
        error = ServingError(f"{type(error).__name__}: {error}", reason="crash")
    try:
        # A serving's own class of error may be packed and not come back.
        pickle.loads(dumps((error, body)))  # noqa: S301  our own words
    except Exception as problem:  # noqa: BLE001  whatever the class does when it is packed
        return ServingError(f"the answer cannot be sent: {error or problem}", reason="crash"), None
    return error, body


async def _serve(connection: Connection) -> None:
    """The other side of a :class:`ProcessWorker`: answers until the parent stops it or is gone."""
    serving, fingerprint = pickle.loads(connection.recv_bytes())  # noqa: S301  our own parent's words
    worker = InlineWorker(serving, fingerprint)
    tickets: dict[int, int] = {}

    def answer(what: str, ticket: int, error: BaseException | None, body: object) -> None:
        connection.send_bytes(pickle.dumps((what, ticket, *sendable(error, body))))

    async def handle(what: str, ticket: int, body: Any) -> None:
        try:
            if what == "generate":
                tickets[ticket] = await worker.generate(body)
                answer(what, ticket, None, None)
            else:
                answer(what, ticket, None, await worker.save(tickets.pop(ticket)))
        except Exception as error:  # noqa: BLE001  without an answer the parent would wait for ever
            answer(what, ticket, error, None)

    try:
        await worker.start()
    except DataflowError as error:
        answer("ready", 0, error, None)
        return
    answer("ready", 0, None, None)
    running: set[asyncio.Task[None]] = set()
    while True:
        try:
            data = await asyncio.to_thread(connection.recv_bytes)
        except (EOFError, OSError):
            # The parent is gone. What is finished lies on disk under its own name and is adopted by the next run.
            os._exit(1)
        what, ticket, body = pickle.loads(data)  # noqa: S301  our own parent's words
        if what == "stop":
            break
        task = asyncio.create_task(handle(what, ticket, body))
        running.add(task)
        task.add_done_callback(running.discard)
    await worker.stop()


def main(fd: int) -> None:
    """Entry point of the worker process; ``fd``: its end of the socket pair."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        asyncio.run(_serve(Connection(fd)))
