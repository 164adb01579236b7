"""``python -m dataflow.serving.fake_api``: the fake service, until its standard input closes."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

from dataflow.errors import ConfigError
from dataflow.serving.fake_api.script import Script
from dataflow.serving.fake_api.world import Options, World


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dataflow.serving.fake_api",
        description="A service that answers like image APIs do, for tests. It ends when its standard input closes.",
    )
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (0: a free one, the default)")
    parser.add_argument("--script", type=Path, help="JSON file: what goes wrong, by words in the prompt")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds the model takes (default: 0)")
    parser.add_argument("--key", help="key that requests must bring (default: any or none)")
    parser.add_argument("--image-bytes", type=int, default=0, help="least bytes of a picture (default: 64 × 64 pixels)")
    parser.add_argument("--rpm", type=int, help="most requests in 60 seconds (default: any number)")
    parser.add_argument("--batch-seconds", type=float, default=0.2, help="time a batch job takes (default: 0.2)")
    parser.add_argument("--lifetime", type=float, default=3600.0, help="seconds until it ends (default: 3600)")
    return parser


async def serve(world: World, port: int, lifetime: float) -> None:
    """Serve on 127.0.0.1 until told to stop; the address goes to standard output once it answers."""
    from aiohttp import web

    from dataflow.serving.fake_api.server import application

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def watch() -> None:
        try:
            while os.read(0, 4096):
                pass
        except OSError:
            # No standard input at all: only a signal or the end of its lifetime stops it.
            return
        loop.call_soon_threadsafe(stop.set)

    runner = web.AppRunner(application(world), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=4096)
    await site.start()
    world.origin = f"http://127.0.0.1:{runner.addresses[0][1]}"
    print(world.origin, flush=True)
    threading.Thread(target=watch, daemon=True).start()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), lifetime)
    await runner.cleanup()


def main() -> int:
    options = arguments().parse_args()
    try:
        script = Script(json.loads(options.script.read_text(encoding="utf-8")) if options.script else None)
    except (OSError, ValueError, ConfigError) as error:
        print(f"script: {error}", file=sys.stderr)
        return 2
    settings = Options(
        latency=options.latency,
        key=options.key,
        pad=options.image_bytes,
        rpm=options.rpm,
        batch_seconds=options.batch_seconds,
    )
    asyncio.run(serve(World(settings, script), options.port, options.lifetime))
    return 0


if __name__ == "__main__":
    sys.exit(main())
