"""What users get wrong, what they are told, and that the rest of their table still comes out.

One bad row between two good ones, one bad input image between two good ones, a table that cannot be read at all,
settings that cannot work. A run over rows never stops for one of them: the row says why it has no image, the others
have theirs.
"""

import gzip
import io
import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataflow.errors import ConfigError, DataflowError, InputError
from dataflow.io import ImageIO
from dataflow.operators import PromptedImageEditGenerator, Text2ImageGenerator
from dataflow.runtime.engine import RunOptions
from dataflow.serving.fake_serving import FakeServing
from dataflow.utils.storage import FileStorage

QUIET = RunOptions(quiet=True)


def said(message, words, *, where):
    """Every essential word stands in the message, and where to look."""
    for word in [*where, *words]:
        assert word in message, f"{word!r} is missing in: {message}"
    assert "Traceback" not in message
    assert len(message) < 1000


# One bad row between two good ones ------------------------------------------------------------------------------------


def row(**columns):
    return json.dumps({"conversations": "a fox", **columns})


def talk(*messages):
    return json.dumps({"conversations": list(messages)})


USER = {"role": "user", "content": "a fox"}

# What is wrong → the line, the column that is named (None: the line is no row), words of the message.
BAD_ROWS = {
    "a broken JSON line": ('{"conversations": "a fox"', None, ["line 2"]),
    "a comma too many": ('{"conversations": "a fox",}', None, ["line 2"]),
    "not JSON at all": ("a fox, please", None, ["line 2"]),
    "Python instead of JSON": ("{'conversations': 'a fox'}", None, ["line 2"]),
    "a list instead of an object": ('["a fox"]', None, ["expected a JSON object", "a list", "must be named .json"]),
    "a string instead of an object": ('"a fox"', None, ["expected a JSON object", "a string"]),
    "a number instead of an object": ("42", None, ["expected a JSON object", "a number"]),
    "null instead of an object": ("null", None, ["expected a JSON object", "null"]),
    "two objects on a line": ('{"conversations": "a"} {"conversations": "b"}', None, ["line 2"]),
    "invalid UTF-8": (b'{"conversations": "caf\xe9"}', None, ["line 2", "UTF-8"]),
    "control characters in between": (b'{"conversations": "a"\x00}', None, ["line 2"]),
    "a missing column": ('{"prompt": "a fox"}', "conversations", ["no such column"]),
    "an empty prompt": (row(conversations=""), "conversations", ["prompt is empty"]),
    "a prompt of blanks": (row(conversations=" \n\t"), "conversations", ["prompt is empty"]),
    "a prompt that is null": (row(conversations=None), "conversations", ["expected a string or a list of messages"]),
    "a prompt that is a number": (row(conversations=42), "conversations", ["found int 42"]),
    "a prompt that is true": (row(conversations=True), "conversations", ["found bool True"]),
    "no messages": (talk(), "conversations", ["no user turn"]),
    "no user turn": (talk({"role": "system", "content": "draw"}), "conversations", ["no user turn"]),
    "a message that is text": (talk("a fox"), "conversations", ["expected a message with role and content"]),
    "a role that is a number": (talk({"role": 1, "content": "x"}), "conversations", ["role must be text", "int 1"]),
    "a message without content": (talk({"role": "user"}), "conversations", ["content must be text", "None"]),
    "content that is a number": (talk({"role": "user", "content": 3}), "conversations", ["content must be text"]),
    "content with a picture in it": (
        talk({"role": "user", "content": [{"type": "image_url", "image_url": "x.png"}]}),
        "conversations",
        ["text parts only", "a column of their own"],
    ),
    "two turns for one picture": (talk(USER, USER), "conversations", ["2 user turns", "split it into rows"]),
    "half an emoji": (row(conversations="cut \ud83e"), None, ["prompt is not valid Unicode", "UTF-8"]),
    "half an emoji in the negative prompt": (row(negative_prompt="\ud83e"), None, ["negative prompt is not valid"]),
    "a negative prompt that is a list": (row(negative_prompt=["blur"]), "negative_prompt", ["expected text", "list"]),
    "a negative prompt that is a number": (row(negative_prompt=5), "negative_prompt", ["expected text", "int 5"]),
    "a seed in words": (row(seed="lucky"), "seed", ["expected a number", "'lucky'"]),
    "a seed with a fraction": (row(seed=1.5), "seed", ["expected a whole number", "1.5"]),
    "a seed that is true": (row(seed=True), "seed", ["expected a whole number", "True"]),
    "a negative seed": (row(seed=-1), "seed", ["from 0 to 9223372036854775807", "-1"]),
    "a seed beyond 63 bits": (row(seed=2**63), "seed", ["from 0 to 9223372036854775807"]),
    "a seed of 5,000 digits": ('{"conversations": "a", "seed": ' + "9" * 5000 + "}", None, ["line 2", "digits"]),
    "a list of seeds": (row(seed=[1, 2]), "seed", ["[1, 2]"]),
    "a height without a width": (row(height=64), "width", ["height and width must be given together"]),
    "a width without a height": (row(width=64), "height", ["height and width must be given together"]),
    "a width of zero": (row(width=0, height=64), "width", ["from 1", "0"]),
    "a size in one column": (row(width="64x64", height="64x64"), "width", ["expected a number", "'64x64'"]),
    "half a step": (row(num_inference_steps=0.5), "num_inference_steps", ["expected a whole number", "0.5"]),
    "no steps": (row(num_inference_steps=0), "num_inference_steps", ["from 1", "0"]),
    "steps in words": (row(num_inference_steps="many"), "num_inference_steps", ["expected a number", "'many'"]),
    "a billion billion steps": (row(num_inference_steps=10**18), "num_inference_steps", ["from 1 to"]),
    "guidance in words": (row(guidance_scale="high"), "guidance_scale", ["expected a number", "'high'"]),
    "guidance that is a list": (row(guidance_scale=[3.5]), "guidance_scale", ["expected a number", "[3.5]"]),
    "guidance that is true": (row(guidance_scale=True), "guidance_scale", ["expected a number", "True"]),
    "guidance of infinity": (row(guidance_scale="inf"), "guidance_scale", ["finite number", "inf"]),
    "true guidance in words": (row(true_cfg_scale="on"), "true_cfg_scale", ["expected a number", "'on'"]),
    "strength in words": (row(strength="strong"), "strength", ["expected a number", "'strong'"]),
    "a sequence length of zero": (row(max_sequence_length=0), "max_sequence_length", ["from 1"]),
    "a column we keep for ourselves": (row(__dataflow__=1), "__dataflow__", ["reserved"]),
}


@pytest.mark.parametrize(("line", "column", "words"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_told_what_is_wrong_and_its_neighbours_come_out(site, caplog, line, column, words):
    line = line if isinstance(line, bytes) else line.encode()
    site.table.write_bytes(b'{"conversations": "first"}\n' + line + b'\n{"conversations": "third"}\n')
    summary = site.run()
    assert (summary.rows, summary.done, summary.failed) == (3, 2, 1)
    where = [f"{site.table}, row 2", *([f"column '{column}'"] if column else [])]
    said(caplog.records[0].getMessage(), words, where=where)
    rows = {row["conversations"]: row for row in site.rows() if row.get("images")}
    assert rows.keys() == {"first", "third"}, "the good rows come out"
    assert all(len(row["images"]) == 1 and Path(row["images"][0]).stat().st_size for row in rows.values())
    if summary.reasons == {"bad_input": 1} and column != "__dataflow__":
        bad = next(row for row in site.rows() if not row["images"])
        assert bad["images_error"]["status"] == "failed"
        said(bad["images_error"]["message"], words, where=where)
    else:
        dropped = (site.cache / "dataflow_cache_step_step1.dropped.jsonl").read_text()
        assert len(dropped.splitlines()) == 1, "what is no row is kept beside the table"
    again = site.run()
    assert (again.done, again.failed, again.made) == (2, 1, 0)


# One bad input image between two good ones ----------------------------------------------------------------------------


def png(size=(32, 32), **options):
    data = io.BytesIO()
    Image.new("RGB", size, "teal").save(data, "PNG", **options)
    return data.getvalue()


def encoded(kind, **options):
    data = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(data, kind, **options)
    return data.getvalue()


def huge_png():
    """A header that promises 60,000 × 60,000 pixels; the file is a few bytes long."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    )


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (32, 32), "red")]}

# What is wrong → the file's bytes (None: there is no file), its name, the reason it is counted under, words.
BAD_IMAGES = {
    "a missing file": (None, "nothing.png", "image_missing", ["no such file", "right folder"]),
    "a URL": (None, "https://example.org/a.png", "bad_input", ["is a URL", "download it"]),
    "a data: URL": (None, "data:image/png;base64,iVBORw0KGgo=", "bad_input", ["is a URL", "download it"]),
    "a name too long for any disk": (None, "x" * 5000, "image_missing", ["cannot be a file's path"]),
    "a folder": ("folder", "a.png", "image_unreadable", ["is a folder"]),
    "a named pipe": ("pipe", "a.png", "image_unreadable", ["not an ordinary file"]),
    "an empty file": (b"", "a.png", "image_empty", ["no bytes at all"]),
    "a text file": (b"hello", "a.png", "image_not_an_image", ["plain text", "'hello'", "PNG, JPEG"]),
    "a web page": (b"<!DOCTYPE html><p>404", "a.jpg", "image_not_an_image", ["HTML page"]),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1", "a.png", "image_not_an_image", ["git lfs pu"]),
    "base64 text": (b"iVBORw0KGgoAAAANSUhEUg", "a.png", "image_not_an_image", ["base64", "decode"]),
    "JSON": (b'{"image": 1}', "a.png", "image_not_an_image", ["is JSON"]),
    "an SVG drawing": (b"<svg xmlns='x'/>", "a.svg", "image_unsupported", ["SVG", "needed is"]),
    "an SVG drawing called .png": (b"<?xml?><svg/>", "a.png", "image_unsupported", ["SVG"]),
    "a PDF": (b"%PDF-1.7", "a.pdf", "image_unsupported", ["PDF"]),
    "a phone's HEIC photo": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a.jpg", "image_unsupported", ["HEIC"]),
    "a video": (b"\0\0\0\x18ftypisom\0\0\0\0isom", "a.mp4", "image_not_an_image", ["video"]),
    "a program": (b"\x7fELF\x02\x01\x01" + bytes(99), "a.png", "image_not_an_image", ["needed is"]),
    "a PNG cut short": (encoded("PNG")[:-500], "a.png", "image_truncated", ["cut short or damaged", "again"]),
    "a JPEG cut short": (encoded("JPEG")[:600], "a.jpg", "image_truncated", ["cut short or damaged"]),
    "a WebP cut short": (encoded("WEBP")[:300], "a.webp", "image_truncated", ["cut short or damaged"]),
    "a PNG's first bytes alone": (b"\x89PNG\r\n\x1a\n", "a.png", "image_truncated", ["cut short or damaged"]),
    "a decompression bomb": (huge_png(), "a.png", "image_too_large", ["60000 × 60000", "max_pixels", "smaller"]),
    "an animated GIF": (encoded("GIF", **FRAMES), "a.gif", "image_animated", ["several frames", "by itself"]),
    "an animated WebP": (encoded("WEBP", **FRAMES), "a.webp", "image_animated", ["several frames"]),
    "a TIFF of two pages": (encoded("TIFF", **FRAMES), "a.tif", "image_animated", ["several frames or pages"]),
    "NUL in the path": (None, "a\0b.png", "bad_input", ["NUL", "column 'images'"]),
    "no path": (None, "", "bad_input", ["names no input image", "column 'images'"]),
    "a placeholder": (None, [""], "bad_input", ["names no input image"]),
    "an empty list": (None, [], "bad_input", ["names no input image"]),
    "null": (None, None, "bad_input", ["names no input image"]),
    "a number": (None, 7, "bad_input", ["expected an image path", "int 7"]),
    "a list of numbers": (None, [7], "bad_input", ["expected an image path", "int 7"]),
    "bytes as upstream tools store them": (None, {"bytes": "…"}, "bad_input", ["expected an image path", "dict"]),
}


@pytest.mark.parametrize(("content", "name", "reason", "words"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_a_bad_image_is_told_what_is_wrong_and_its_neighbours_come_out(
    make_site, tmp_path, caplog, content, name, reason, words
):
    site = make_site(tmp_path / "edits", task="edit")
    (site.root / "good.png").write_bytes(png())
    if content == "folder":
        (site.root / name).mkdir()
    elif content == "pipe":
        os.mkfifo(site.root / name)
    elif content is not None:
        (site.root / name).write_bytes(content)
    good = {"conversations": "brighter", "images": "good.png"}
    site.fill([good, {**good, "images": name}, {**good, "conversations": "darker"}])
    pipe = Reading(ImageIO(site.images))
    storage = FileStorage(str(site.table), str(site.cache)).step()
    summary = PromptedImageEditGenerator(pipe, options=QUIET).run(storage)
    assert (summary.rows, summary.done, summary.failed) == (3, 2, 1)
    first, bad, third = site.rows()
    assert [len(row["edited_images"]) for row in (first, bad, third)] == [1, 0, 1]
    error = bad["edited_images_error"]
    assert error["reason"] == reason
    said(error["message"], words, where=[str(site.root / name)] if isinstance(content, bytes) else [])
    assert caplog.records, "the log says so at once"
    assert bad["images"] == name, "the row itself is kept as it was"


class Reading(FakeServing):
    """Opens its input images, as every real serving does."""

    async def generate(self, requests):
        for request in requests:
            for path in request.images:
                self.image_io.read(path)
        return await super().generate(requests)


# A table that cannot be read at all -----------------------------------------------------------------------------------

GOOD = b'{"conversations": "a fox"}\n'


# What is wrong → the file's name, its bytes (None: there is no file), words of the message.
BAD_TABLES = {
    "a missing table": ("table.jsonl", None, ["no such file"]),
    "a folder": ("table.jsonl", "folder", ["is a folder"]),
    "a named pipe": ("table.jsonl", "pipe", ["expected a file"]),
    "no suffix": ("table", GOOD, ["unknown table format ''", ".jsonl", ".parquet"]),
    "an unknown suffix": ("table.xlsx", GOOD, ["unknown table format '.xlsx'", ".jsonl", ".csv"]),
    "a text file": ("table.txt", GOOD, ["unknown table format '.txt'", ".jsonl"]),
    "a NUL in the name": ("ta\0ble.jsonl", None, ["not a file name"]),
    "gzip": ("table.jsonl", gzip.compress(GOOD), ["compressed with gzip", "unpack it first"]),
    "gzip called .csv": ("table.csv", gzip.compress(GOOD), ["compressed with gzip", "unpack it first"]),
    "a .gz suffix": ("table.jsonl.gz", gzip.compress(GOOD), ["unknown table format '.gz'"]),
    "zstd": ("table.json", b"\x28\xb5\x2f\xfd" + GOOD, ["compressed with zstd", "unpack it first"]),
    "an Excel workbook": ("table.csv", b"PK\x03\x04" + bytes(50), ["Excel", "export it first"]),
    "UTF-16": ("table.jsonl", GOOD.decode().encode("utf-16"), ["UTF-16", "save it as UTF-8"]),
    "UTF-16 CSV": ("table.csv", "conversations\na fox\n".encode("utf-16"), ["UTF-16", "save it as UTF-8"]),
    "Parquet called .jsonl": ("table.jsonl", b"PAR1....PAR1", ["a Parquet table", "name it .parquet"]),
    "Parquet that is cut short": ("table.parquet", b"PAR1\0\0\0", ["not a readable parquet table"]),
    "text called .parquet": ("table.parquet", GOOD * 9, ["not a readable parquet table"]),
    "broken JSON": ("table.json", b'[{"conversations": "a fox"}', ["not valid JSON"]),
    "JSON that is a number": ("table.json", b"42", ["expected a JSON array of objects"]),
    "an empty JSON file": ("table.json", b"", ["the file is empty", "JSON array"]),
    "an empty CSV file": ("table.csv", b"", ["the file is empty", "name the columns"]),
    "a CSV header that names a column twice": (
        "table.csv",
        b"conversations,seed,seed\na fox,1,2\n",
        ["column 'seed'", "more than once"],
    ),
    "a column nobody has": ("table.jsonl", b'{"prompt": "a fox"}\n', ["column 'conversations'", "'prompt'", "run("]),
    "a CSV without a header": ("table.csv", b"a fox\na kite\n", ["column 'conversations'", "the table has 'a fox'"]),
    "a pickle": ("table.pkl", pickle.dumps([{"conversations": "a fox"}]), ["is a pickle", "allow_pickle=True"]),
}


@pytest.mark.parametrize(("name", "content", "words"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_bad_table_is_refused_before_any_work(site, name, content, words):
    path = site.root / name
    if content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)

    def run(table):
        storage = FileStorage(str(table), str(site.cache)).step()
        return Text2ImageGenerator(FakeServing(ImageIO(site.images), log=site.log), options=QUIET).run(storage)

    with pytest.raises((InputError, ConfigError)) as refused:
        run(path)
    said(str(refused.value), words, where=[name.replace("\0", "\\x00")])
    assert not site.generated()
    assert not site.output.exists()
    good = site.root / "good.jsonl"
    good.write_bytes(GOOD)
    assert run(good).done == 1, "the same folder works with a good table"


# What is wrong → the CSV, the line that is named, words of the message. The other two rows are good.
BAD_CSV_ROWS = {
    "too few cells": (b"conversations,seed\na fox,1\na kite\na cat,3\n", "line 3", ["1 cells", "2 columns"]),
    "too many cells": (b"conversations,seed\na fox,1\na, kite,2\na cat,3\n", "line 3", ["3 cells", "2 columns"]),
    "a quote that is never closed": (b'conversations\na fox\na cat\n"a kite\n', "line 4", ["never closed"]),
    "invalid UTF-8": (b"conversations\na fox\ncaf\xe9\na cat\n", "line 3", ["UTF-8"]),
    "a seed in words": (b"conversations,seed\na fox,1\na kite,x\na cat,\n", "row 2", ["column 'seed'", "'x'"]),
}


@pytest.mark.parametrize(("content", "line", "words"), BAD_CSV_ROWS.values(), ids=BAD_CSV_ROWS)
def test_a_bad_csv_row_is_told_what_is_wrong_and_its_neighbours_come_out(site, caplog, content, line, words):
    site.table = site.root / "table.csv"
    site.table.write_bytes(content)
    summary = site.run()
    assert (summary.rows, summary.done, summary.failed) == (3, 2, 1)
    said(caplog.records[0].getMessage(), words, where=[str(site.table), line])
    assert {row["conversations"] for row in site.rows() if row["images"]} == {"a fox", "a cat"}


# Settings that cannot work --------------------------------------------------------------------------------------------

BAD_SETTINGS = {
    "an unknown cache_type": (lambda: FileStorage("t.jsonl", cache_type="xml"), ["'xml'", "jsonl, json, csv"]),
    "pickle without opt-in": (lambda: FileStorage("t.jsonl", cache_type="pickle"), ["pickle", "allow_pickle=True"]),
    "an unknown image format": (lambda: ImageIO("x", format="bmp"), ["'bmp'", "png, webp, jpeg"]),
    "a quality of 0": (lambda: ImageIO("x", quality=0), ["quality=0", "1 to 100"]),
    "no folder for the images": (lambda: ImageIO(""), ["name the folder"]),
    "a pixel bound of 0": (lambda: ImageIO("x", max_pixels=0), ["max_pixels=0", "1 to"]),
    "an unknown fault": (lambda: FakeServing(script={"a": "explode"}), ["'explode'", "refuse", "kill"]),
}


@pytest.mark.parametrize(("make", "words"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_a_bad_setting_is_refused_at_once(make, words):
    with pytest.raises(ConfigError) as refused:
        make()
    said(str(refused.value), words, where=[])


def test_a_run_without_a_step_says_how_to_begin(site):
    site.fill(["a fox"])
    with pytest.raises(DataflowError, match=r"storage\.step\(\) first"):
        Text2ImageGenerator(FakeServing(ImageIO(site.images)), options=QUIET).run(FileStorage(str(site.table)))


# What a real model is asked -------------------------------------------------------------------------------------------


def local(**settings):
    pytest.importorskip("diffusers")
    from dataflow.serving.local_image_gen_serving import LocalImageGenServing

    return LocalImageGenServing(settings.pop("image_io", None), **settings)


# What is wrong → the serving's arguments, words of the message. Refused by the constructor, or before any work.
BAD_SERVINGS = {
    "a batch of nothing": ({"batch_size": 0}, ["batch_size", "from 1", "0"]),
    "a batch in words": ({"batch_size": "four"}, ["batch_size", "whole number", "'four'"]),
    "half an image per prompt": ({"diffuser_num_images_per_prompt": 0.5}, ["diffuser_num_images_per_prompt", "0.5"]),
    "no steps": ({"diffuser_num_inference_steps": 0}, ["num_inference_steps", "from 1"]),
    "steps in words": ({"diffuser_num_inference_steps": "many"}, ["num_inference_steps", "'many'"]),
    "guidance in words": ({"diffuser_guidance_scale": "high"}, ["guidance_scale", "'high'"]),
    "guidance of NaN": ({"diffuser_guidance_scale": float("nan")}, ["guidance_scale", "finite", "nan"]),
    "an unknown task": ({"Image_gen_task": "text2video"}, ["Image_gen_task", "'text2image'", "'text2video'"]),
    "an unknown dtype": ({"dtype": "fp64"}, ["dtype", "'bf16'", "'fp64'"]),
    "an unknown determinism": ({"determinism": "loose"}, ["determinism", "'strict'", "'loose'"]),
    "an unknown device": ({"device": "gpu"}, ["device", "'cuda'", "'gpu'"]),
    "no device": ({"device": []}, ["device", "at least one"]),
    "strict with a cache": ({"determinism": "strict", "step_cache": "first_block:0.1"}, ["strict", "step_cache"]),
    "an unknown built-in model": ({"hf_model_name_or_path": "builtin:flux"}, ["no built-in model", "'builtin:flux'"]),
    "an unknown folder": ({"hf_model_name_or_path": "/nowhere/flux"}, ["/nowhere/flux"]),
    "a folder that is no model": ({"hf_model_name_or_path": "EMPTY"}, ["EMPTY", "model_index.json"]),
    "a file as the model": ({"hf_model_name_or_path": "FILE"}, ["is a file", "folder of a diffusers pipeline"]),
    "an unknown pipeline class": ({"diffuser_model_name": "FLUXX"}, ["FLUXX"]),
    "a parameter that the model does not take": ({"pipeline_kwargs": {"stepz": 4}}, ["no parameter 'stepz'"]),
    "a parameter that is no JSON": ({"pipeline_kwargs": {"generator": object()}}, ["pipeline arguments"]),
    "a size that does not fit the model": (
        {"diffuser_image_height": 33, "diffuser_image_width": 47},
        ["multiples of", "47×33", "nearest"],
    ),
    "an unknown LoRA": ({"lora": "no_such_lora.safetensors"}, ["no LoRA", "no_such_lora.safetensors"]),
}


@pytest.mark.parametrize(("settings", "words"), BAD_SERVINGS.values(), ids=BAD_SERVINGS)
def test_a_serving_that_cannot_work_is_refused_before_any_work(site, model, settings, words):
    site.fill(["a fox"])
    (site.root / "EMPTY").mkdir()
    (site.root / "FILE").write_text("weights?")
    named = settings.get("hf_model_name_or_path", model)
    path = str(site.root / named) if named in ("EMPTY", "FILE") else named

    def run():
        serving = local(image_io=ImageIO(site.images), **{**settings, "hf_model_name_or_path": path})
        Text2ImageGenerator(serving, options=QUIET).run(FileStorage(str(site.table), str(site.cache)).step())

    with pytest.raises(ConfigError) as refused:
        run()
    said(str(refused.value), words, where=[])
    assert not site.images.exists()
    assert site.run().done == 1, "the folder is not spoilt by the attempt"


# What is wrong → the row, words of the message. All in one run, between good rows.
BAD_WISHES = {
    "a size that does not fit the model": ({"height": 33, "width": 47}, ["multiples of", "47×33", "nearest"]),
    "a million steps": ({"num_inference_steps": 1_000_000}, ["num_inference_steps", "at most"]),
    "a parameter that the model does not take": ({"strength": 0.5}, ["takes no parameter 'strength'"]),
    "a negative prompt without effect": ({"negative_prompt": "blur"}, ["negative prompt", "no effect"]),
}


@pytest.mark.slow
def test_rows_a_model_cannot_make_fail_with_a_reason_and_the_others_come_out(site, model):
    good = {"conversations": "a red circle"}
    site.fill([row for wish, _ in BAD_WISHES.values() for row in (good, {**good, **wish})])
    serving = local(image_io=ImageIO(site.images), hf_model_name_or_path=model, batch_size=4)
    summary = Text2ImageGenerator(serving, options=QUIET).run(FileStorage(str(site.table), str(site.cache)).step())
    assert (summary.done, summary.failed) == (len(BAD_WISHES), len(BAD_WISHES))
    assert summary.reasons == {"bad_request": len(BAD_WISHES)}
    rows = site.rows()
    assert all(len(row["images"]) == 1 for row in rows[::2]), "the good rows come out"
    for row, (_, words) in zip(rows[1::2], BAD_WISHES.values(), strict=True):
        assert row["images"] == []
        said(row["images_error"]["message"], words, where=[])


@pytest.mark.slow
def test_pictures_a_model_cannot_edit_fail_with_a_reason_and_the_others_come_out(make_site, tmp_path, model):
    site = make_site(tmp_path / "edits", task="edit")
    bad = {name: case for name, case in BAD_IMAGES.items() if isinstance(case[0], bytes)}
    (site.root / "good.png").write_bytes(png())
    rows = [{"conversations": "make it red", "images": "good.png"}]
    for number, (content, name, _, _) in enumerate(bad.values()):
        (site.root / f"{number}{name}").write_bytes(content)
        rows.append({"conversations": "make it red", "images": f"{number}{name}"})
    rows += [
        {"conversations": "make it red", "images": ["good.png"] * 20},
        {**rows[0], "conversations": "make it blue"},
    ]
    site.fill(rows)
    serving = local(
        image_io=ImageIO(site.images), hf_model_name_or_path=model, batch_size=4, Image_gen_task="imageedit"
    )
    storage = FileStorage(str(site.table), str(site.cache)).step()
    summary = PromptedImageEditGenerator(serving, options=QUIET).run(storage)
    assert (summary.done, summary.failed) == (2, len(bad) + 1)
    first, *wrong, many, last = site.rows()
    assert [len(row["edited_images"]) for row in (first, last)] == [1, 1]
    for row, (_, _, _, words) in zip(wrong, bad.values(), strict=True):
        said(row["edited_images_error"]["message"], words, where=[str(site.root / row["images"])])
    said(many["edited_images_error"]["message"], ["takes 1 input image", "the row has 20"], where=[])
