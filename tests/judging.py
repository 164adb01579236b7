"""What tests of judges share: a table with pictures, and a fake service to ask."""

import json

from PIL import Image

from dataflow.runtime.engine import RunOptions
from dataflow.serving.api_vlm_serving_openai import APIVLMServing_openai
from dataflow.utils.storage import FileStorage

QUIET = RunOptions(quiet=True)
ONCE = RunOptions(quiet=True, max_attempts=1)


class Desk:
    """A folder with pictures and a table of them."""

    def __init__(self, folder):
        self.folder = folder

    def picture(self, number):
        path = self.folder / f"{number}.png"
        if not path.exists():
            Image.new("RGB", (60, 48), (number * 40 % 256, 80, 200 - number * 10)).save(path)
        return str(path)

    def storage(self, *rows):
        table = self.folder / "in.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.store = FileStorage(str(table), cache_path=str(self.folder / "cache"))
        return self.store.step()

    def table(self):
        return [json.loads(line) for line in self.store.output_path.read_text().splitlines()]


def ready(server, monkeypatch):
    """The running fake service, with nothing scripted and nothing asked yet."""
    monkeypatch.setenv("DF_API_KEY", "any-word")
    monkeypatch.setattr("dataflow.runtime.limits.backoff", lambda attempt: 0.0)
    server.script({})
    server.reset()
    return server


def service(api, **options):
    return APIVLMServing_openai(f"{api.url}/v1", model_name="some-judge", **options)


def calls(api):
    return len(api.ledger()["attempts"])
