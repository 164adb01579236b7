"""The specification's own snippets, sections 1 to 3, as scripts: only paths, model names and keys are changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dataflow.serving.fake_api import FakeApi, expected_mark, read_mark

TEXT_TO_IMAGE = """
import os
from dataflow.utils.storage import FileStorage
from dataflow.serving.local_image_gen_serving import LocalImageGenServing
from dataflow.io import ImageIO
from dataflow.operators import Text2ImageGenerator

class Job:
    def __init__(self):
        self.storage = FileStorage(
            first_entry_file_name="prompts.jsonl",
            cache_path="./cache_local",
            file_name_prefix="dataflow_cache_step",
            cache_type="jsonl",
        )
        self.serving = LocalImageGenServing(
            image_io=ImageIO(save_path=os.path.join(self.storage.cache_path, "images")),
            batch_size=4,
            hf_model_name_or_path="builtin:tiny-flux",
            hf_cache_dir="~/.cache/huggingface",
            hf_local_dir="./ckpt/models/",
        )
        self.generator = Text2ImageGenerator(pipe=self.serving)

    def forward(self):
        self.generator.run(
            storage=self.storage.step(),
            input_conversation_key="conversations",
            output_image_key="images",
        )

Job().forward()
"""

EDIT = """
import os
from dataflow.utils.storage import FileStorage
from dataflow.serving.local_image_gen_serving import LocalImageGenServing
from dataflow.io import ImageIO
from dataflow.operators.core_vision import PromptedImageEditGenerator

class Job:
    def __init__(self):
        self.storage = FileStorage(
            first_entry_file_name="edits.jsonl",
            cache_path="./cache_local",
            file_name_prefix="dataflow_cache_step",
            cache_type="jsonl",
        )
        self.serving = LocalImageGenServing(
            image_io=ImageIO(save_path=os.path.join(self.storage.cache_path, "images")),
            hf_model_name_or_path="builtin:tiny-flux",
            hf_cache_dir="./cache_local",
            hf_local_dir="./ckpt/models/",
            Image_gen_task="imageedit",
            batch_size=4,
            diffuser_model_name="FLUX-Kontext",
            diffuser_num_inference_steps=28,
            diffuser_guidance_scale=3.5,
        )
        self.generator = PromptedImageEditGenerator(pipe=self.serving)

    def forward(self):
        self.generator.run(
            storage=self.storage.step(),
            input_image_key="images",
            input_conversation_key="conversations",
            output_image_key="edited_images",
        )

Job().forward()
"""


API = """
import argparse
import os
from dataflow.utils.storage import FileStorage
from dataflow.io import ImageIO
from dataflow.operators import Text2ImageGenerator
from dataflow.operators.core_vision import PromptedImageEditGenerator

parser = argparse.ArgumentParser()
parser.add_argument("--api_key")
parser.add_argument("--api_url")
parser.add_argument("--edit", action="store_true")
args = parser.parse_args()
api_url = args.api_url

os.environ["DF_API_KEY"] = args.api_key
from dataflow.serving.api_vlm_serving_openai import APIVLMServing_openai

class Job:
    def __init__(self):
        self.storage = FileStorage(
            first_entry_file_name="edits.jsonl" if args.edit else "prompts.jsonl",
            cache_path="./cache_local",
            file_name_prefix="dataflow_cache_step",
            cache_type="jsonl",
        )
        self.serving = APIVLMServing_openai(
            api_url=api_url,
            model_name="gemini-2.5-flash-image-preview",
            image_io=ImageIO(save_path=os.path.join(self.storage.cache_path, "images")),
            send_request_stream=STREAM,
        )

    def forward(self):
        if args.edit:
            PromptedImageEditGenerator(pipe=self.serving).run(
                storage=self.storage.step(),
                input_image_key="images",
                input_conversation_key="conversations",
                output_image_key="edited_images",
            )
        else:
            Text2ImageGenerator(pipe=self.serving).run(
                storage=self.storage.step(),
                input_conversation_key="conversations",
                output_image_key="images",
            )

Job().forward()
"""


def run_script(code: str, folder: Path, *arguments: str) -> list[dict]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    table = folder / "cache_local" / "dataflow_cache_step_step1.jsonl"
    return [json.loads(line) for line in table.read_text().splitlines()]


def write_table(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_text_to_image_as_specified(tmp_path: Path) -> None:
    prompts = ["a fox darting between snow-covered pines at dusk", "a kite surfer riding emerald waves"]
    write_table(
        tmp_path / "prompts.jsonl",
        [{"conversations": [{"content": text, "role": "user"}], "images": [""]} for text in prompts],
    )
    rows = run_script(TEXT_TO_IMAGE, tmp_path)
    assert [row["conversations"][0]["content"] for row in rows] == prompts
    files = [path for row in rows for path in row["images"]]
    assert len(set(files)) == 2
    for path in files:
        assert path.startswith("./cache_local/images/")
        with Image.open(tmp_path / path) as picture:
            picture.load()


@pytest.mark.slow
def test_image_editing_as_specified(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for name, colour in (("image1", "red"), ("image2", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "pictures" / f"{name}.png")
    instructions = ["Change the woman's clothes to a white dress.", "Change the vase to red."]
    write_table(
        tmp_path / "edits.jsonl",
        [
            {
                "conversations": [{"content": text, "role": "user"}],
                "images": [f"./pictures/image{number}.png"],
                "edited_images": [""],
            }
            for number, text in enumerate(instructions, 1)
        ],
    )
    rows = run_script(EDIT, tmp_path)
    assert [row["images"] for row in rows] == [["./pictures/image1.png"], ["./pictures/image2.png"]]
    files = [path for row in rows for path in row["edited_images"]]
    assert len(set(files)) == 2
    for path in files:
        with Image.open(tmp_path / path) as picture:
            picture.load()


@pytest.mark.parametrize("stream", [True, False])
def test_generating_and_editing_through_an_api_as_specified(tmp_path: Path, stream: bool) -> None:
    (tmp_path / "pictures").mkdir()
    instructions = ["Change the woman's clothes to a white dress.", "Change the vase to red."]
    contents = []
    for number, colour in enumerate(("red", "blue"), 1):
        path = tmp_path / "pictures" / f"image{number}.png"
        Image.new("RGB", (64, 64), colour).save(path)
        contents.append(path.read_bytes())
    said = [[{"content": text, "role": "user"}] for text in instructions]
    write_table(tmp_path / "prompts.jsonl", [{"conversations": talk, "images": [""]} for talk in said])
    write_table(
        tmp_path / "edits.jsonl",
        [
            {"conversations": talk, "images": [f"./pictures/image{number}.png"], "edited_images": [""]}
            for number, talk in enumerate(said, 1)
        ],
    )
    code = API.replace("STREAM", str(stream))
    with FakeApi(key="the-users-own-key") as api:
        arguments = ["--api_key", "the-users-own-key", "--api_url", f"{api.url}/v1"]
        drawn = run_script(code, tmp_path, *arguments)
        edited = run_script(code, tmp_path, *arguments, "--edit")
        assert api.ledger()["totals"]["attempts"] == 4
        assert all(request["body"]["stream"] is stream for request in api.requests("chat/completions"))
    for text, content, row, edit in zip(instructions, contents, drawn, edited, strict=True):
        assert read_mark(Image.open(tmp_path / row["images"][0])) == expected_mark(text)
        assert read_mark(Image.open(tmp_path / edit["edited_images"][0])) == expected_mark(text, [content])
