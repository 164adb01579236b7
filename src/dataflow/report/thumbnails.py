"""Small pictures, one after the other or in processes of their own."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import Any

from PIL import Image

from dataflow.errors import ImageError
from dataflow.io import ImageIO
from dataflow.picture_files import status

_MOST_PROVENANCE = 20_000
# Not "-m", which would be another module than this one; and no module of the folder that somebody happens to be in.
_CHILD = (sys.executable, "-P", "-c", "from dataflow.report.thumbnails import work; work()")


@dataclass(slots=True, kw_only=True)
class Thumbnail:
    """A small picture with what its file says.

    Attributes:
        webp: base64 of a WebP file; empty where the file cannot be read.
        width: of the picture itself, in pixels.
        height: likewise.
        bytes: size of its file.
        facts: what the file's metadata says: prompt, seed, model, parameters.
        problem: why there is no picture: (reason, message), or None.
        reused: an earlier report had made it.
    """

    webp: str = ""
    width: int = 0
    height: int = 0
    bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    problem: tuple[str, str] | None = None
    reused: bool = False


@dataclass(frozen=True, slots=True)
class Look:
    """How thumbnails are made."""

    size: int
    quality: int


def thumbnail(path: str | os.PathLike[str], look: Look) -> Thumbnail:
    """The thumbnail of one picture; a file that is no whole picture gives one with a problem."""
    reader = ImageIO(os.curdir)
    try:
        image = reader.read(path)
        facts = reader.read_metadata(path)
        found = status(path)
        size = found.size if found else 0
    except ImageError as error:
        return Thumbnail(problem=(error.reason, error.message))
    except (OSError, ValueError) as error:  # ValueError: a name that no file system takes
        return Thumbnail(problem=("unreadable", str(error)))
    width, height = image.size
    scale = look.size / max(width, height)
    if scale < 1:
        small = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = image.resize(small, Image.Resampling.LANCZOS, reducing_gap=3)
    buffer = BytesIO()
    # A picture that is small already is kept as it is: icons and drawings suffer most from loss.
    image.save(buffer, "WEBP", quality=look.quality, method=2, lossless=scale >= 1 and width * height <= 128 * 128)
    text = base64.b64encode(buffer.getvalue()).decode()
    if len(json.dumps(facts, default=str)) > _MOST_PROVENANCE:
        facts = {name: facts[name] for name in ("request_id", "seed", "model", "revision", "images") if name in facts}
    return Thumbnail(webp=text, width=width, height=height, bytes=size, facts=facts)


class Makers:
    """Makes thumbnails in processes of their own, or in a thread where there are few of them.

    The processes are plain ones that read orders and write answers, so that a script that asks for a report need not
    guard its main module; a picture that kills its process costs no more than the pictures of its order.

    Args:
        look: how they are made.
        processes: how many; 0 for a thread of this process.
    """

    def __init__(self, look: Look, processes: int) -> None:
        self._look = look
        self._threads = ThreadPoolExecutor(max(1, processes))
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        self._processes = processes
        self._running: set[subprocess.Popen[bytes]] = set()
        for _ in range(processes):
            self._idle.put(None)

    def submit(self, paths: Sequence[str | os.PathLike[str]]) -> Future[list[Thumbnail]]:
        """The thumbnails of some files, to come."""
        return self._threads.submit(self._remotely if self._processes else self._here, paths)

    def close(self) -> None:
        """Give up what was not begun, and end the processes."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._running:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended already
                process.stdin.close()
            process.wait()
            process.stdout.close()

    def _here(self, paths: Sequence[str | os.PathLike[str]]) -> list[Thumbnail]:
        return [thumbnail(path, self._look) for path in paths]

    def _remotely(self, paths: Sequence[str | os.PathLike[str]]) -> list[Thumbnail]:
        process = self._idle.get()
        try:
            if process is None:
                process = subprocess.Popen(_CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                self._running.add(process)
            assert process.stdin is not None
            assert process.stdout is not None
            order = json.dumps([self._look.size, self._look.quality, *map(str, paths)])
            process.stdin.write(order.encode("ascii") + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if answer.endswith(b"\n"):
            self._idle.put(process)
            return [Thumbnail(**each) for each in json.loads(answer)]
        self._idle.put(None)
        if len(paths) > 1:
            return [made for path in paths for made in self._remotely([path])]  # which of them it was
        return [Thumbnail(problem=("killed_reader", "the process that read it died, perhaps for want of memory"))]


def work() -> None:
    """Make what is ordered on standard input, a line at a time; what a process of :class:`Makers` does."""
    for line in sys.stdin.buffer:
        size, quality, *paths = json.loads(line)
        made = [asdict(thumbnail(path, Look(size, quality))) for path in paths]
        sys.stdout.buffer.write(json.dumps(made, default=str).encode("ascii") + b"\n")
        sys.stdout.buffer.flush()
