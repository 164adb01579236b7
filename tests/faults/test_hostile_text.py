"""Text that would like to be more than text: in prompts, in tables, and in what services answer.

Whatever it holds, for a shell, a file system, a web page, a log or a terminal: it makes its picture, stands in the
table as it was, and does nothing else.
"""

import base64
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import unicodedata
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import pytest
from PIL import Image

pytest.importorskip("openai")

from dataflow.cli import main
from dataflow.contact_sheet import contact_sheet
from dataflow.errors import RunStoppedError
from dataflow.io import ImageIO
from dataflow.operators import PromptedImageEditGenerator, Text2ImageGenerator
from dataflow.runtime.engine import RunOptions
from dataflow.serving.api_vlm_serving_openai import APIVLMServing_openai
from dataflow.serving.fake_api import FakeApi, expected_mark, read_mark
from dataflow.serving.fake_serving import FakeServing
from dataflow.utils.storage import FileStorage

KEY = "df-secret-0123456789"
TERMINAL = "\x1b]0;owned\x07 \x1b[2J\x1b[1;31m \x1bP+q\x1b\\ \x9b31m \x9d0;x\x9c \x08\x08 \x7f \x0c \x0b \x85"
LINES = "one\r\nERROR: all is lost\rtwo\nthree\u2028four\u2029five"
TURNED = "\u202egnp.exe\u202c \u2066\u2067\u2069 \u202a\u202b\u202d \u200e\u200f\u061c"
NAME = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{30}\.png")


@pytest.fixture
def canary(tmp_path):
    """A file that comes about if any of the prompts below is executed by anything."""
    return tmp_path / "canary"


@pytest.fixture
def prompts(canary):
    touch = f"touch {canary}"
    return [
        f"$({touch})",
        f"`{touch}`",
        f'"; {touch}; echo "',
        f"'; {touch} #",
        f"a fox && {touch} & | {touch} || {touch}",
        f"\n{touch}\n",
        f"${{IFS}}{touch}$IFS$PATH ~ $HOME",
        f"__import__('os').system({touch!r})",
        f"{{0.__class__}} {{}} %s %(prompt)s %n {{{{7*7}}}} ${{7*7}} <%= `{touch}` %>",
        f'=cmd|"/c {touch}"!A1',
        f"!!python/object/apply:os.system [{touch!r}]",
        "$(rm -rf ~)",
        '"; DROP TABLE images; --',
        "<script>alert(1)</script><img src=x onerror=alert(1)>&lt;b&gt;\"'></title>",
        "![x](https://example.com/x.png) [a](javascript:alert(1))",
        "../../etc/passwd",
        f"../../../{canary.name}",
        str(canary),
        "..\\..\\windows\\win.ini C:\\con.png \\\\server\\share",
        "-rf --output=/ -o x",
        "a\0b\0/../c",
        ".hidden/. /.. ~root file:///etc/passwd",
        TERMINAL,
        LINES,
        TURNED,
        "\ufeff\u200b\u2060\U000e0041\ufffe\U0010ffff zero width",
        '{"crc":"00000000"}\\n{"s":"done"}',
        "é e\u0301 日本 🦊 " + "x" * 3000,
    ]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home, in which we are: what is written beside the folders that were named would stand here."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    return home


@pytest.fixture(autouse=True)
def _set_up(monkeypatch):
    """A key, quick waits, and the loggers as they were: the command line sets the root logger up for itself."""
    monkeypatch.setenv("DF_API_KEY", KEY)
    monkeypatch.setattr("dataflow.runtime.limits.FIRST_WAIT", 0.01)
    root, ours = logging.getLogger(), logging.getLogger("dataflow")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], root.level, ours.level = before


def check_shown(text, *, lines=False):
    """What a person is shown drives no terminal, turns nothing around and, unless it may, has no second line."""
    allowed = "\n" if lines else ""
    odd = {f"U+{ord(mark):04X}" for mark in text if is_odd(mark) and mark not in allowed}
    assert not odd, (sorted(odd), text)


def is_odd(mark):
    turns = "\u2066" <= mark <= "\u2069" or "\u202a" <= mark <= "\u202e"
    return turns or unicodedata.category(mark) in ("Cc", "Zl", "Zp")


def written(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def rows_of(storage):
    return [json.loads(line) for line in storage.output_path.read_bytes().splitlines()]


def read(table):
    """Rows of a table of any kind, as the next step would have them."""
    rows = list(FileStorage(str(table)).step().iter_rows())
    assert all(isinstance(row, dict) for row in rows)
    return cast("list[dict]", rows)


# Prompts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("task", ["draw", "edit"])
def test_prompts_make_their_pictures_and_nothing_else(tmp_path, home, canary, prompts, caplog, capfd, task, stream):
    """By way of a service, with everything that is logged on the way."""
    job = tmp_path / "job"
    job.mkdir()
    source = job / "source.png"
    Image.new("RGB", (8, 8), "teal").save(source)
    table = job / "in.jsonl"
    rows = [{"conversations": prompt, "images": [str(source)]} for prompt in prompts]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with FakeApi(key=KEY) as api, caplog.at_level(logging.DEBUG, "dataflow"):
        store = ImageIO(job / "images")
        serving = APIVLMServing_openai(f"{api.url}/v1", image_io=store, send_request_stream=stream)
        operator = Text2ImageGenerator if task == "draw" else PromptedImageEditGenerator
        storage = FileStorage(str(table), cache_path=str(job / "cache")).step()
        summary = operator(serving, options=RunOptions(progress=True)).run(storage, output_image_key="made")
    assert summary.done == len(prompts)

    inputs = [source.read_bytes()] if task == "edit" else []
    found = rows_of(storage)
    assert [row["conversations"].encode() for row in found] == [prompt.encode() for prompt in prompts], "byte for byte"
    for row in found:
        [path] = row["made"]
        assert read_mark(Image.open(path)) == expected_mark(row["conversations"], inputs)
        assert store.read_metadata(path)["prompt"] == row["conversations"]
        assert NAME.fullmatch(str(Path(path).relative_to(job / "images")))

    assert not canary.exists()
    assert not written(home)
    assert written(tmp_path) - {"home", "job"} == {f"job/{name}" for name in written(job)}
    assert {path.name for path in job.iterdir()} == {"in.jsonl", "source.png", "images", "cache"}
    assert all(re.fullmatch(r"[\w.-]+", path.name) for path in (job / "cache").rglob("*"))
    shown = capfd.readouterr()
    # The bar goes back to the beginning of its line, and to the line above when it ends.
    check_shown((shown.out + shown.err).replace("\r", "").replace("\x1b[A", ""), lines=True)
    for record in caplog.records:
        check_shown(record.getMessage())


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_tables_of_every_kind_keep_every_prompt(tmp_path, prompts, kind):
    """Read from one and written to one; a prompt that came back otherwise would be drawn, and paid for, again."""
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    first = tmp_path / "in.jsonl"
    first.write_text("".join(json.dumps({"conversations": prompt}) + "\n" for prompt in prompts))
    serving = FakeServing(ImageIO(tmp_path / "images", durable=False), size=(8, 8))
    storage = FileStorage(str(first), cache_path=str(tmp_path / "one"), cache_type=kind).step()
    assert Text2ImageGenerator(serving, options=RunOptions(quiet=True)).run(storage).done == len(prompts)
    names = [row["images"] for row in read(storage.output_path)]
    again = FileStorage(str(storage.output_path), cache_path=str(tmp_path / "two"), cache_type=kind).step()
    summary = Text2ImageGenerator(serving, options=RunOptions(quiet=True)).run(again, output_image_key="again")
    assert (summary.done, summary.made, summary.adopted) == (len(prompts), 0, len(prompts))
    found = read(again.output_path)
    assert [row["conversations"] for row in found] == prompts
    assert [row["again"] for row in found] == names


def dataflow(*arguments, cwd, code=0):
    """The program itself; what it writes."""
    environment = {**os.environ, "HOME": str(cwd), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "dataflow", *arguments], cwd=cwd, env=environment, capture_output=True, timeout=60
    )
    assert done.returncode == code, done.stderr.decode()
    return done.stdout.decode() + done.stderr.decode()


def test_prompts_on_the_command_line(home, canary, prompts):
    """A table of all of them, and one that is itself an argument."""
    table = home / "in.jsonl"
    table.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    check_shown(dataflow("generate", "in.jsonl", "-o", "all", "--fake", "-v", cwd=home), lines=True)
    check_shown(dataflow("status", "all", cwd=home), lines=True)
    one = f"$(touch {canary}) `touch {canary}` ../../{canary.name} {TERMINAL} {TURNED} <script>\n--fake"
    check_shown(dataflow("generate", one, "-o", "one", "--fake", cwd=home), lines=True)
    [row] = read(home / "one" / "dataflow_cache_step_step1.jsonl")
    assert row["conversations"][0]["content"] == one
    assert not canary.exists()
    assert {path.name for path in home.iterdir()} == {"in.jsonl", "all", "one"}
    names = {path.name for folder in ("all", "one") for path in (home / folder).rglob("*")}
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)
    assert not [name for name in names if name.endswith((".html", ".htm", ".svg"))], "nothing that a browser would run"


def test_a_contact_sheet_is_a_bitmap_whatever_stands_in_it(tmp_path, prompts):
    Image.new("RGB", (8, 8), "teal").save(tmp_path / "a.png")
    contact_sheet([([tmp_path / "a.png"], prompt) for prompt in prompts], title=TERMINAL).save(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert (sheet.format, sheet.info) == ("PNG", {})
    assert b"script" not in (tmp_path / "sheet.png").read_bytes()


# Tables ---------------------------------------------------------------------------------------------------------------

BAD_ROWS = {
    "no JSON": f"{{{TERMINAL}".replace("\n", " ").replace("\r", " "),
    "an odd column": json.dumps({TERMINAL: TURNED, LINES: 1, "conversations": "fine"}),
    "a missing image": json.dumps({"conversations": "x", "images": f"{TERMINAL}{LINES}{TURNED}.png"}),
    "a URL for an image": json.dumps({"conversations": "x", "images": f"http://{TERMINAL}{LINES}{TURNED}"}),
    "a path out of the folder": json.dumps({"conversations": "x", "images": f"../{LINES}/../../{TERMINAL}"}),
    "an odd role": json.dumps({"conversations": [{"role": TERMINAL, "content": TURNED}], "images": "source.png"}),
    "an odd content": json.dumps({"conversations": {"content": {TERMINAL: TURNED}}, "images": "source.png"}),
    "an odd number": json.dumps({"conversations": "x", "images": "source.png", "guidance_scale": TERMINAL + TURNED}),
    "an odd seed": json.dumps({"conversations": "x", "images": "source.png", "seed": LINES}),
}


@pytest.mark.parametrize("line", BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_cannot_be_used_are_told_in_plain_words(tmp_path, home, caplog, capfd, line):
    Image.new("RGB", (8, 8), "teal").save(tmp_path / "source.png")
    fine = {"conversations": "fine", "images": "source.png"}
    table = tmp_path / "in.jsonl"
    table.write_text(json.dumps(fine) + "\n" + line + "\n")
    serving = FakeServing(ImageIO(tmp_path / "images", durable=False), size=(8, 8))
    storage = FileStorage(str(table), cache_path=str(tmp_path / "cache")).step()
    with caplog.at_level(logging.DEBUG, "dataflow"):
        summary = PromptedImageEditGenerator(serving, options=RunOptions(progress=False)).run(storage)
    assert (summary.done, summary.failed) == (1, 1)
    check_shown(capfd.readouterr().err, lines=True)
    assert caplog.records
    for record in caplog.records:
        check_shown(record.getMessage())
    for row in rows_of(storage):
        if "edited_images_error" in row:
            check_shown(row["edited_images_error"]["message"])
    assert main(["status", str(tmp_path / "cache")]) == 0
    check_shown(capfd.readouterr().out, lines=True)
    assert not written(home)


def test_a_column_that_is_missing_is_told_in_plain_words(tmp_path, capfd):
    table = tmp_path / "in.jsonl"
    table.write_text(json.dumps({TERMINAL: 1, LINES: 2, TURNED: 3}) + "\n")
    assert main(["generate", str(table), "-o", str(tmp_path / "out"), "--fake"]) == 2
    check_shown(capfd.readouterr().err, lines=True)


# What services answer -------------------------------------------------------------------------------------------------

EVIL = f"{TERMINAL} {LINES} {TURNED} \0 $(touch canary) `x` <script>alert(1)</script> %s{{}} ../../etc/passwd {KEY}"
USAGE = {"prompt_tokens": 2, "completion_tokens": 1290, "completion_tokens_details": {"image_tokens": 1290}}


def answer(body, status=200, mime="application/json", **headers):
    """A function that sends this answer: JSON, or text or bytes as they are."""
    data = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()

    def send(handler):
        handler.send_response(status)
        for name, value in {"Content-Type": mime, "Content-Length": len(data), **headers}.items():
            handler.send_header(name.replace("_", "-"), str(value))
        handler.end_headers()
        handler.wfile.write(data)

    return send


def raw(data):
    """A function that writes these bytes in place of an answer."""

    def send(handler):
        handler.wfile.write(data)
        handler.close_connection = True

    return send


def error(message=EVIL, status=400, **facts):
    return answer({"error": {"message": message, **facts}}, status)


def said(content="", finish="stop", usage=USAGE, **message):
    return {"choices": [{"finish_reason": finish, "message": {"content": content, **message}}], "usage": usage}


def shown(url):
    return answer(said(images=[{"image_url": {"url": url}}]))


def events(*lines):
    return answer(
        b"".join(line if isinstance(line, bytes) else line.encode() for line in lines), mime="text/event-stream"
    )


def base64_of(text):
    return "data:image/png;base64," + base64.b64encode(text.encode()).decode()


ONE_LINE = TERMINAL.replace("\x0b", "").replace("\x0c", "") + TURNED
WHOLE = {
    "a message": error(),
    "a code": error("m", code=EVIL),
    "a type": error("m", type=EVIL, status=500),
    "a long message": error(EVIL * 10_000),
    "a refusal by error": error(code="moderation_blocked"),
    "a key that is wrong": error(status=401),
    "a quota": error(status=429, code="insufficient_quota"),
    "a model that is unknown": error(f"the model {EVIL} does not exist", status=404),
    "details": answer({"detail": [{"loc": [EVIL, 1], "msg": EVIL}]}, 422),
    "a list of errors": answer([{"error": {"message": EVIL}}], 400),
    "text for an error": answer(EVIL, 500, "text/plain"),
    "a page": answer(f"<html><title>{EVIL}</title>", 502, "text/html"),
    "a page for an answer": answer(f"<html><title>{EVIL}</title>", 200, "text/html"),
    "text for an answer": answer(EVIL, 200, "text/plain"),
    "JSON that is none": answer({EVIL: EVIL}),
    "an error with status 200": answer({"error": EVIL}),
    "a choice's error": answer({"choices": [{"error": {"message": EVIL, "code": EVIL}}]}),
    "a refusal": answer(said(refusal=EVIL)),
    "words": answer(said(EVIL)),
    "an end": answer(said(finish=EVIL)),
    "an end by error": answer(said(EVIL, finish="error", usage={EVIL: EVIL})),
    "a wrong type": answer({"choices": [{"finish_reason": "stop", "message": {"content": {EVIL: 1}}}]}),
    "an address": shown(f"https://x/{EVIL}"),
    "a host": shown(f"https://{TURNED}/x.png"),
    "a scheme": shown(f"{TURNED}x\x9b:evil"),
    "a user": shown(f"https://{TURNED}@x/y.png"),
    "a zone": shown("https://[fe80::1%\x9b31m]/y.png"),
    "a data URL": shown(f"data:image/{TERMINAL};base64,aaaa"),
    "base64": shown(f"iVBORw0KGgo{TERMINAL}"),
    "text for a picture": shown(base64_of(EVIL)),
    "a script for a picture": shown(base64_of(f"<svg><script>{EVIL}</script></svg>")),
    "a page for a picture": shown(base64_of(f"<html>{EVIL}")),
    "a reason phrase": raw(b"HTTP/1.1 500 " + TERMINAL.encode() + b"\r\nContent-Length: 2\r\n\r\n{}"),
    "a status line": raw(b"HTTP/1.1 " + TERMINAL.encode() + b"\r\n\r\n"),
    "no HTTP at all": raw(TERMINAL.encode() + b"\r\n\r\n"),
    "a header": raw(b"HTTP/1.1 200 OK\r\nX\x1b[31m: \x1b[2J\r\nContent-Length: 2\r\n\r\n{}"),
    "a header's value": raw(b"HTTP/1.1 200 OK\r\nX: \0" + TERMINAL.encode() + b"\r\nContent-Length: 2\r\n\r\n{}"),
    "a media type": raw(b"HTTP/1.1 200 OK\r\nContent-Type: \x1b[31m\r\nContent-Length: 3\r\n\r\nabc"),
    "a wait": raw(b"HTTP/1.1 503 x\r\nRetry-After: \x1b[31m\r\nContent-Length: 2\r\n\r\n{}"),
    "a chunk": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + TERMINAL.encode() + b"\r\n"),
    "a packing": raw(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 9\r\n\r\n\x1b]0;own\x07x"),
    "a way elsewhere": raw(b"HTTP/1.1 302 x\r\nLocation: http://\x1b[31m/\x9b\r\nContent-Length: 0\r\n\r\n"),
}


def cases(answers):
    """Parameters of a test."""
    return [pytest.param(send, id=name) for name, send in answers.items()]


STREAMED = {
    "no JSON": events(f"data: {ONE_LINE} $(touch canary)\n\n"),
    "no JSON with the key": events(f"data: {KEY}\n\n"),
    "a name": events(f"event: {ONE_LINE}\ndata: {{}}\n\n"),
    "an error": events(f"data: {json.dumps({'error': {'message': EVIL}})}\n\n"),
    "a refusal": events(
        f"data: {json.dumps({'choices': [{'delta': {'refusal': EVIL}, 'finish_reason': 'stop'}]})}\n\n"
    ),
    "words": events(f"data: {json.dumps({'choices': [{'delta': {'content': EVIL}, 'finish_reason': EVIL}]})}\n\n"),
}


@contextmanager
def service(send):
    """A chat service that answers everything like this."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            send(self)

        def log_message(self, format, *args):  # noqa: A002 - the name of the library
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def check_answer(folder, send, caplog, capfd, *, stream):
    """One row against such a service: it fails or is refused, and whoever reads of it reads plain words."""
    table = folder / "in.jsonl"
    table.write_text('{"conversations": "a fox"}\n')
    storage = FileStorage(str(table), cache_path=str(folder / "cache")).step()
    with service(send) as url, caplog.at_level(logging.DEBUG, "dataflow"):
        serving = APIVLMServing_openai(
            url, image_io=ImageIO(folder / "images"), timeout=10.0, send_request_stream=stream, max_workers=1
        )
        options = RunOptions(max_attempts=2, progress=False)
        try:
            summary = Text2ImageGenerator(serving, options=options).run(storage)
        except RunStoppedError as error:
            messages = [str(error)]
        else:
            messages = [row["images_error"]["message"] for row in rows_of(storage)]
            assert (summary.done, len(summary.reasons)) == (0, 1)
    for text in messages + [record.getMessage() for record in caplog.records]:
        check_shown(text)
        assert KEY not in text
        assert len(text) < 1000
    assert main(["status", str(folder / "cache")]) == 0
    said = capfd.readouterr()
    check_shown(said.out + said.err, lines=True)
    assert not [path for path in folder.rglob("*") if "canary" in path.name or "passwd" in path.name]
    assert not list((folder / "images").glob("??/*"))


@pytest.mark.parametrize("send", cases(WHOLE))
def test_what_a_service_answers_is_told_in_plain_words(tmp_path, home, caplog, capfd, send):
    check_answer(tmp_path, send, caplog, capfd, stream=False)
    assert not written(home)


@pytest.mark.parametrize("send", cases(STREAMED))
def test_what_a_service_streams_is_told_in_plain_words(tmp_path, home, caplog, capfd, send):
    check_answer(tmp_path, send, caplog, capfd, stream=True)
    assert not written(home)


HOSTS = (
    *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0x7F.0x0.0x0.0x1", "0", "0.0.0.0", "localhost"),
    *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"),
    *("①②⑦.⓪.⓪.①", "127。0。0。1", "user@127.0.0.1", "LOCALHOST", "127.0.0.1.", "%31%32%37.0.0.1"),
)


@pytest.mark.parametrize("way", ["url", "redirect"])
def test_addresses_in_answers_reach_nobody(tmp_path, way):
    """Every way to write this machine, in an answer and as the target of a redirect of the service's own."""
    with socket.create_server(("127.0.0.1", 0)) as trap, FakeApi(key=KEY) as api:
        port = trap.getsockname()[1]
        urls = [f"{scheme}://{host}:{port}/x.png" for host in HOSTS for scheme in ("http", "https")]
        urls += [f"file://{tmp_path}/in.jsonl", f"ftp://127.0.0.1:{port}/x.png", f"//127.0.0.1:{port}/x.png"]
        urls += [
            f"http:\\\\127.0.0.1:{port}\\x.png",
            "http://169.254.169.254/latest/meta-data/",
            "gopher://127.0.0.1/x",
        ]
        api.script({f"<{number}>": f"shape:images_url+{way}:{url}" for number, url in enumerate(urls)})
        table = tmp_path / "in.jsonl"
        table.write_text("".join(f'{{"conversations": "fox <{number}>"}}\n' for number in range(len(urls))))
        storage = FileStorage(str(table), cache_path=str(tmp_path / "cache")).step()
        serving = APIVLMServing_openai(f"{api.url}/v1", image_io=ImageIO(tmp_path / "images"))
        summary = Text2ImageGenerator(serving, options=RunOptions(quiet=True, max_attempts=1)).run(storage)
        errors = {url: row["images_error"]["reason"] for url, row in zip(urls, rows_of(storage), strict=True)}
        assert (summary.done, summary.failed) == (0, len(urls))
        assert set(errors.values()) == {"unsafe_url"}, errors
        trap.setblocking(False)
        with pytest.raises(BlockingIOError):
            trap.accept()


PIPELINE = """
[storage]
first_entry_file_name = "in.jsonl"
cache_path = "out"

[serving.api]
type = "dataflow.serving.api_vlm_serving_openai:APIVLMServing_openai"
api_url = "{url}"

[[step]]
operator = "Text2ImageGenerator"

[run]
max_attempts = 1
max_failed_fraction = 1.0
"""


def test_hostile_answers_on_the_command_line(home):
    """All of them in one run of the program: what it writes to the terminal, and what status and retry write."""
    stops = {"a key that is wrong", "a quota", "a way elsewhere"}
    answers = [send for name, send in WHOLE.items() if name not in stops]
    numbers = iter(range(10_000))
    with service(lambda handler: answers[next(numbers) % len(answers)](handler)) as url:
        (home / "pipeline.toml").write_text(PIPELINE.format(url=url))
        (home / "in.jsonl").write_text("".join(f'{{"conversations": "fox {n}"}}\n' for n in range(len(answers))))
        told = dataflow("run", "pipeline.toml", "-v", cwd=home, code=1)
        check_shown(told, lines=True)
        assert KEY not in told
        assert len(told.splitlines()) > 5
    check_shown(dataflow("status", "out", cwd=home), lines=True)


# Images of others -----------------------------------------------------------------------------------------------------


def test_a_replay_tells_what_a_file_says_in_plain_words(home, capfd):
    """Facts in an image's metadata are another's words as well."""
    assert main(["generate", "a fox", "-o", "out", "--fake", "-q"]) == 0
    capfd.readouterr()
    facts = {"request_id": "0" * 32, "prompt": "a fox", "seed": 1, "model": f"{TERMINAL}{LINES}{TURNED}"}
    saved = ImageIO(home / "elsewhere").save(Image.new("RGB", (64, 64)), "0" * 32, facts)
    main(["replay", f"elsewhere/{saved.name}", "--cache", "out"])
    said = capfd.readouterr()
    check_shown(said.out + said.err, lines=True)


@pytest.mark.parametrize("name", ["../../../owned", "/tmp/owned", "a\nb", 7, ["x"]])
def test_a_replay_takes_no_id_that_is_none(home, capfd, name):
    assert main(["generate", "a fox", "-o", "out", "--fake", "-q"]) == 0
    saved = ImageIO(home / "elsewhere").save(
        Image.new("RGB", (64, 64)), "0" * 32, {"request_id": name, "prompt": "a fox", "seed": 1}
    )
    assert main(["replay", f"elsewhere/{saved.name}", "--cache", "out"]) == 2
    assert not [path for path in home.rglob("*") if "owned" in path.name]
