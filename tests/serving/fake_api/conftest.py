"""A running fake service for each module, and ways to speak to it."""

from __future__ import annotations

import http.client
import io
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
from google import genai
from openai import OpenAI
from PIL import Image

from dataflow.serving.fake_api import FakeApi

KEY = "sk-a-secret"


@dataclass
class Answer:
    """What came back: status, headers with lower-case names, body, and whether the body was whole."""

    status: int
    headers: dict[str, str]
    data: bytes
    whole: bool

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class Wire:
    """Requests without a client library between the test and the service."""

    def __init__(self, api: FakeApi) -> None:
        self.api = api

    def post(self, path: str, body: Any, timeout: float = 10, **headers: str) -> Answer:
        connection = http.client.HTTPConnection(urlsplit(self.api.url).netloc, timeout=timeout)
        try:
            data = json.dumps(body)
            connection.request("POST", path, data, {"Content-Type": "application/json", **headers})
            response = connection.getresponse()
            known = {name.lower(): value for name, value in response.getheaders()}
            try:
                return Answer(response.status, known, response.read(), True)
            except http.client.IncompleteRead as error:
                return Answer(response.status, known, error.partial, False)
        finally:
            connection.close()

    def get(self, url: str) -> Answer:
        """By URL or path; redirects are not followed."""
        connection = http.client.HTTPConnection(urlsplit(self.api.url).netloc, timeout=10)
        try:
            connection.request("GET", url.removeprefix(self.api.url))
            response = connection.getresponse()
            known = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, known, response.read(), True)
        finally:
            connection.close()

    def chat(self, prompt: str, **facts: Any) -> Answer:
        messages = [{"role": "user", "content": prompt}]
        return self.post("/v1/chat/completions", {"model": "fake-image", "messages": messages, **facts})

    def generate(self, prompt: str, **facts: Any) -> Answer:
        return self.post("/v1/images/generations", {"model": "fake-image", "prompt": prompt, **facts})

    def gemini(self, prompt: str, method: str = "generateContent", **config: Any) -> Answer:
        config = {"responseModalities": ["IMAGE"], **config}
        body = {"contents": [{"role": "user", "parts": [{"text": prompt}]}], "generationConfig": config}
        return self.post(f"/v1beta/models/gemini-2.5-flash-image:{method}", body)

    def raw(self, prompt: str, seconds: float = 1.0) -> bytes:
        """All bytes of an answer to a chat request, until the connection closes or nothing comes for a while."""
        body = json.dumps({"model": "fake-image", "messages": [{"role": "user", "content": prompt}]}).encode()
        address = urlsplit(self.api.url)
        with socket.create_connection((address.hostname, address.port), timeout=seconds) as sock:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            sock.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
            received = b""
            try:
                while piece := sock.recv(65536):
                    received += piece
            except TimeoutError:
                return received + b"(no end)"
            return received


@pytest.fixture(scope="module")
def api() -> Iterator[FakeApi]:
    with FakeApi() as running:
        yield running


@pytest.fixture(scope="module")
def openai(api: FakeApi) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{api.url}/v1", api_key=KEY, max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def gemini(api: FakeApi) -> Iterator[genai.Client]:
    client = genai.Client(api_key=KEY, http_options={"base_url": api.url})
    yield client
    client.close()


@pytest.fixture
def wire(api: FakeApi) -> Wire:
    return Wire(api)


@pytest.fixture
def mask() -> bytes:
    """A mask as large as the pictures, RGBA."""
    out = io.BytesIO()
    Image.new("RGBA", (64, 64)).save(out, "PNG")
    return out.getvalue()
