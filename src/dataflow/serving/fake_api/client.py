"""The fake service for tests: starts it as a process of its own and asks what it recorded."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dataflow.errors import ConfigError

START_SECONDS = 60.0


class FakeApi:
    """A running fake service; a context manager that ends it.

    Args:
        script: what goes wrong, see :class:`dataflow.serving.fake_api.script.Script`.
        latency: seconds the model takes for an answer.
        key: key that requests must bring; None takes any or none.
        image_bytes: least bytes of a picture, filled with noise; 0 for 64 × 64 pixels.
        rpm: most requests in 60 seconds.
        batch_seconds: how long a batch job takes.
        lifetime: seconds after which it ends by itself.
        port: on 127.0.0.1; 0 takes a free one.

    Attributes:
        url: ``http://127.0.0.1:PORT``, without a slash; for OpenAI's client, add ``/v1``.
    """

    def __init__(
        self,
        script: Mapping[str, Any] | None = None,
        *,
        latency: float = 0.0,
        key: str | None = None,
        image_bytes: int = 0,
        rpm: int | None = None,
        batch_seconds: float = 0.2,
        lifetime: float = 3600.0,
        port: int = 0,
    ) -> None:
        self._script = dict(script or {})
        options = {
            "--port": port,
            "--latency": latency,
            "--image-bytes": image_bytes,
            "--batch-seconds": batch_seconds,
            "--lifetime": lifetime,
            "--key": key,
            "--rpm": rpm,
        }
        self._options = [str(word) for name, value in options.items() if value is not None for word in (name, value)]
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def __enter__(self) -> FakeApi:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the service's process."""
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> FakeApi:
        """Start the process and wait until it answers.

        Raises:
            ConfigError: it does not start; the text says what it wrote.
        """
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "script.json"
            script.write_text(json.dumps(self._script), encoding="utf-8")
            words = [sys.executable, "-m", "dataflow.serving.fake_api", "--script", str(script), *self._options]
            # In a session of its own, so that a Ctrl-C meant for the tests does not end it under them.
            with (Path(folder) / "errors").open("w+", encoding="utf-8") as errors:
                self._process = subprocess.Popen(
                    words,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    start_new_session=True,
                )
                timer = threading.Timer(START_SECONDS, self._process.kill)
                timer.start()
                assert self._process.stdout is not None
                self.url = self._process.stdout.readline().strip()
                timer.cancel()
                if not self.url:
                    self.stop()
                    errors.seek(0)
                    raise ConfigError(f"the fake service did not start: {errors.read().strip()}")
        return self

    def stop(self) -> None:
        """End the process, and wait for its end."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def ledger(self) -> dict[str, Any]:
        """What was billed: ``totals`` (:func:`dataflow.serving.fake_api.ledger.totals`) and ``attempts``, a list of
        :class:`dataflow.serving.fake_api.ledger.Entry` as dicts, oldest first."""
        return self._ask("GET", "/_ledger")

    def requests(self, path: str = "") -> list[dict[str, Any]]:
        """The newest requests as they came, oldest first: method, path, query, headers without secrets, body, key.

        Args:
            path: only those whose path holds this.
        """
        return [request for request in self._ask("GET", "/_requests") if path in request["path"]]

    def script(self, mapping: Mapping[str, Any]) -> None:
        """Go on with another script; attempts are counted from 0 again.

        Raises:
            ConfigError: the script cannot be used.
        """
        self._ask("POST", "/_script", mapping)

    def reset(self) -> None:
        """Empty the ledger and forget requests and attempts."""
        self._ask("POST", "/_reset", {})

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        # Not urllib: it would send this through a proxy that the environment names.
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise ConfigError(str(answer["error"]))
        return answer
