"""One life of a run, in a process made to be killed.

``python life.py JOB`` is one life from the start of the interpreter. ``python life.py --nursery MODULE…`` imports once
and forks a life for every job on standard input, so that a hundred lives cost seconds: it answers with the life's pid,
and on the next line with its wait status. The life stays unreaped in between, so that its pid is nobody else's.

A job is JSON: ``table``, ``cache``, ``images``, ``serving`` (arguments), ``kind`` (``fake`` or ``local``), ``task``
(``draw`` or ``edit``; or ``pack`` or ``unpack`` what was made, with ``shard_bytes``), ``options`` (of the run), and
``kill_at``: SIGKILL itself at the n-th step towards the disk (0: count the steps into ``cache/../steps``).
"""

import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path


def main():
    if sys.argv[1] != "--nursery":
        live(json.loads(sys.argv[1]))
        return
    for name in ["dataflow.operators", "dataflow.serving.fake_serving", *sys.argv[2:]]:
        importlib.import_module(name)
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                live(json.loads(line))
                status = 0
            except BaseException:  # noqa: BLE001  its parent wants to know, whatever it is
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(pid, flush=True)
        sys.stdin.readline()
        print(os.waitpid(pid, 0)[1], flush=True)


def live(job):
    if job.get("kill_at") is not None:
        steps = count_steps(job["kill_at"])
    summary = keep(job) if job.get("task") in ("pack", "unpack") else run(job)
    if job.get("kill_at") == 0:
        Path(job["cache"], "..", "steps").write_text(str(next(steps)))
    if summary is None:
        return
    Path(job["cache"], "..", "summary").write_text(f"{summary.rows} {summary.done} {summary.made} {summary.adopted}")


def keep(job):
    from dataflow import packing

    given = {"shard_bytes": job["shard_bytes"]} if job["task"] == "pack" else {}
    getattr(packing, job["task"])(job["cache"], images=job["images"], **given)


def run(job, **options):
    from dataflow.io import ImageIO
    from dataflow.operators import PromptedImageEditGenerator, Text2ImageGenerator
    from dataflow.runtime.engine import RunOptions
    from dataflow.serving.fake_serving import FakeServing
    from dataflow.utils.storage import FileStorage

    store = ImageIO(job["images"])
    if job.get("kind", "fake") == "fake":
        serving = FakeServing(store, **job["serving"])
    else:
        from dataflow.serving.local_image_gen_serving import LocalImageGenServing

        serving = logged(LocalImageGenServing, job["log"])(store, **job["serving"])
    storage = FileStorage(job["table"], job["cache"]).step()
    operator = PromptedImageEditGenerator if job.get("task") == "edit" else Text2ImageGenerator
    return operator(serving, options=RunOptions(quiet=True, **job.get("options", {}), **options)).run(storage)


def logged(kind, log):
    class Logged(kind):
        async def generate(self, requests):
            results = await super().generate(requests)
            with Path(log).open("a") as file:
                file.writelines(f"{request.request_id}\n" for request in requests)
            return results

    return Logged


def count_steps(kill_at):
    """Count every call that changes the disk, before and after it; a write is cut in the middle as well."""
    steps = iter_numbers()
    lock = threading.Lock()

    def step():
        with lock:
            if next(steps) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)

    def around(call):
        def wrapped(*args, **kwargs):
            step()
            if call is write and len(args[1]) > 1:
                # The kernel may stop anywhere in a write: here in the middle.
                half = len(args[1]) // 2
                done = write(args[0], args[1][:half])
                step()
                done += write(args[0], args[1][half:])
            else:
                done = call(*args, **kwargs)
            step()
            return done

        return wrapped

    from dataflow.runtime import journal

    write = os.write
    for name in ("write", "fsync", "replace", "rename", "unlink", "mkdir", "ftruncate"):
        setattr(os, name, around(getattr(os, name)))
    journal._datasync = around(journal._datasync)
    return steps


def iter_numbers():
    number = 0
    while True:
        number += 1
        yield number


if __name__ == "__main__":
    main()
