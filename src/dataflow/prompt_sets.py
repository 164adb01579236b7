"""Published prompt sets, read from the files their authors give out; none is shipped.

Every row has ``prompt_id``, ``category``, ``conversations`` and ``images`` (the source picture of an edit, else a
placeholder), so that generating and scoring are ordinary steps, and the columns that its benchmark's evaluators need.
:mod:`dataflow.benchmark_reports` makes the benchmark's own table of what they found.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataflow.errors import InputError
from dataflow.metrics.objects import parse_geneval, spatial_relation
from dataflow.types import BadRow, Row
from dataflow.utils.parquet import libraries
from dataflow.utils.storage import FileStorage

COMPBENCH_CATEGORIES = (
    "color",
    "shape",
    "texture",
    "spatial",
    "3d_spatial",
    "numeracy",
    "non_spatial",
    "complex",
)
"""In the order of the paper's table; files of others are taken, too."""

_SPLIT = re.compile(r"_(train|val)(_\w+)?$")

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_PLACE = r"an? (?P<first>.+?) (?P<relation>{relation}) an? (?P<second>.+?)\.?$"
_SIGNATURES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}


def load(name: str, path: str | Path, images: str | Path | None = None) -> Iterator[Row]:
    """The prompts of a published set.

    Args:
        name: one of :data:`FORMATS`.
        path: its file or folder.
        images: folder of the source pictures of an edit set: where relative paths begin (else beside the file), and
            where pictures that lie inside a table are written to.

    Raises:
        InputError: no such format or file, or something in it is not as published; says where.
    """
    if name not in _LOADERS:
        raise InputError(f"there is no prompt set format {name!r}; there are {', '.join(FORMATS)}")
    place = Path(path)
    if not place.exists():
        raise InputError("no such file or folder", path=place)
    try:
        yield from _LOADERS[name](place, None if images is None else Path(images))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot be read: {error}", path=place) from error


def _row(prompt_id: str, category: str, prompt: str, image: str = "", **columns: Any) -> Row:
    return {
        "prompt_id": prompt_id,
        "category": category,
        "conversations": [{"role": "user", "content": prompt}],
        "images": [image],
        **columns,
    }


# Generation --------------------------------------------------------------------------------------------------------


def _geneval(path: Path, _: Path | None) -> Iterator[Row]:
    """``evaluation_metadata.jsonl``: each line whole in the column ``geneval``, numbered as the reference's folders."""
    lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    for number, line in enumerate(lines):
        try:
            prompt = parse_geneval(line)
        except ValueError as error:
            raise InputError(str(error), path=path, row=number + 1) from error
        yield _row(f"{number:05d}", prompt.tag, prompt.prompt, geneval=json.loads(line))


def _dsg(path: Path, _: Path | None) -> Iterator[Row]:
    """``dsg-1k-anns.csv``: a row of the file is a question, the category of a prompt is where it was taken from."""
    for item, rows in _by_item(path).items():
        category = item.rpartition("_")[0] or item
        yield _row(item, category, rows[0][1]["text"], questions=_questions(rows))


def _dpg(path: Path, _: Path | None) -> Iterator[Row]:
    """A folder with ``dpg_bench.csv`` and ``prompts/*.txt``, or the table, whose own texts do where there are none."""
    table = path if path.is_file() else _one_file(path, "*.csv")
    texts = {file.stem: file for folder in (table.parent / "prompts", table.parent) for file in folder.glob("*.txt")}
    for item, rows in _by_item(table).items():
        text = texts[item].read_text(encoding="utf-8").strip() if item in texts else rows[0][1]["text"]
        broad = sorted({_category(row).partition("-")[0].strip() for _, row in rows})
        # compat="ella" leaves out the file's first row, so that each question says where it stood.
        yield _row(item, ", ".join(broad), text, questions=_questions(rows, with_place=True))


def _by_item(path: Path) -> Mapping[str, Sequence[tuple[int, dict[str, str]]]]:
    """The numbered rows of each prompt, in the file's order."""
    needed = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
    found: dict[str, list[tuple[int, dict[str, str]]]] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 1):
            for column in needed:
                if row.get(column) is None:
                    raise InputError("the row has no such column", path=path, row=number, field=column)
            if not row["proposition_id"].strip().isdigit():
                raise InputError("expected a number", path=path, row=number, field="proposition_id")
            found.setdefault(row["item_id"], []).append((number, row))
    return found


def _questions(rows: Sequence[tuple[int, dict[str, str]]], *, with_place: bool = False) -> list[dict[str, Any]]:
    """The atoms of a prompt.

    As DSG's own program reads them: a prompt with one dependency that is no number has no dependencies at all. A parent
    that is no atom of the prompt is left out.
    """
    atoms = {int(row["proposition_id"]) for _, row in rows}
    parents = {int(row["proposition_id"]): _parents(row["dependency"]) for _, row in rows}
    readable = all(each is not None for each in parents.values())
    found = []
    for number, row in rows:
        atom = int(row["proposition_id"])
        question: dict[str, Any] = {
            "id": atom,
            "question": row["question_natural_language"],
            "parents": [each for each in parents[atom] or () if each in atoms] if readable else [],
            "answer": "yes",
            "category": _category(row),
        }
        found.append({**question, "row": number} if with_place else question)
    return found


def _category(row: Mapping[str, str]) -> str:
    return row["tuple"].partition("(")[0].strip()


def _parents(text: str) -> list[int] | None:
    parts = [part.strip() for part in text.split(",")]
    return [int(part) for part in parts] if all(part.isdigit() for part in parts) else None


def _compbench(path: Path, _: Path | None) -> Iterator[Row]:
    """A ``…_val.txt``, or the folder with all of them; the category is the file's name."""
    files = [path] if path.is_file() else sorted(path.glob("*_val.txt"), key=_compbench_order)
    if not files:
        raise InputError("holds no *_val.txt", path=path)
    for file in files:
        category = _SPLIT.sub("", file.stem)
        prompts = filter(None, map(str.strip, file.read_text(encoding="utf-8-sig").splitlines()))
        for number, prompt in enumerate(prompts):
            yield _row(f"{category}_{number:03d}", category, prompt, **_places(category, prompt))


def _compbench_order(file: Path) -> tuple[int, str]:
    category = _SPLIT.sub("", file.stem)
    known = category in COMPBENCH_CATEGORIES
    return COMPBENCH_CATEGORIES.index(category) if known else len(COMPBENCH_CATEGORIES), category


def _places(category: str, prompt: str) -> dict[str, Any]:
    """What lies where in a prompt of the category ``spatial``, as far as it has the set's usual words."""
    relation = spatial_relation(prompt) if category == "spatial" else None
    if relation is None:
        return {}
    found = re.match(_PLACE.format(relation=re.escape(relation)), prompt)
    return {"spatial": found.groupdict()} if found else {}


def _parti(path: Path, _: Path | None) -> Iterator[Row]:
    """``PartiPrompts.tsv``, which quotes nothing."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)):
            for column in ("Prompt", "Category", "Challenge"):
                if not row.get(column):
                    raise InputError("the row has nothing there", path=path, row=number + 1, field=column)
            columns = {"challenge": row["Challenge"], "note": row.get("Note") or ""}
            yield _row(f"parti_{number:04d}", row["Category"], row["Prompt"], **columns)


def _longtext(path: Path, _: Path | None) -> Iterator[Row]:
    """``text_prompts.jsonl`` and ``text_prompts_zh.jsonl``, one of them or their folder."""
    files = [path] if path.is_file() else sorted(path.glob("text_prompts*.jsonl"))
    if not files:
        raise InputError("holds no text_prompts*.jsonl", path=path)
    for file in files:
        for number, row in _rows(file):
            text = row.get("text")
            parts = text if isinstance(text, list) else [text]
            if not isinstance(row.get("prompt"), str) or not all(isinstance(part, str) for part in parts):
                raise InputError("expected a prompt and its text", path=file, row=number)
            wanted = " ".join(map(str, parts))
            language = "zh" if _HAN.search(wanted) else "en"
            extra = {name: row[name] for name in ("length", "text_length") if name in row}
            prompt_id = f"{language}_{int(row.get('prompt_id', number - 1)):04d}"
            yield _row(prompt_id, str(row.get("category", "")), row["prompt"], text=wanted, language=language, **extra)


# Edits -------------------------------------------------------------------------------------------------------------


def _gedit(path: Path, images: Path | None) -> Iterator[Row]:
    """An export of GEdit-Bench: JSON Lines with paths of pictures, or the hub's Parquet files with pictures inside."""
    files = [path] if path.is_file() else sorted([*path.glob("*.parquet"), *path.glob("*.jsonl")])
    if not files:
        raise InputError("holds no *.parquet or *.jsonl", path=path)
    for file in files:
        for number, row in _rows(file):
            for column in ("key", "task_type", "instruction", "instruction_language"):
                if not isinstance(row.get(column), str):
                    raise InputError("expected text", path=file, row=number, field=column)
            name = f"{row['key']}_{row['instruction_language']}"
            picture = row.get("input_image_raw") or row.get("input_image") or row.get("image")
            yield _row(
                name,
                row["task_type"],
                row["instruction"],
                _source(picture, file, images, name, number),
                edit_type=row["task_type"],
                language=row["instruction_language"],
                intersection=bool(row.get("Intersection_exist")),
            )


def _imgedit(path: Path, images: Path | None) -> Iterator[Row]:
    """``basic_edit.json``: cases by key with the picture's path (``id``), prompt and type."""
    try:
        cases = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}", path=path) from error
    if not isinstance(cases, dict):
        raise InputError("expected an object of cases by key", path=path)
    for number, (key, case) in enumerate(cases.items(), 1):
        fields = [str(case.get(name) or "") if isinstance(case, dict) else "" for name in ("id", "prompt", "edit_type")]
        if not all(fields):
            raise InputError(f"case {key}: expected id, prompt and edit_type", path=path, row=number)
        picture, prompt, kind = fields
        yield _row(str(key), kind, prompt, _source(picture, path, images, key, number), edit_type=kind)


def _source(picture: Any, file: Path, images: Path | None, name: str, number: int) -> str:
    """The path of a row's source picture; one that lies in the table is written to ``images`` first."""
    data = picture.get("bytes") if isinstance(picture, dict) else picture
    if isinstance(data, bytes) and data:
        if images is None:
            raise InputError("the pictures lie in the table: name a folder to write them to", path=file, row=number)
        suffix = next((kind for head, kind in _SIGNATURES.items() if data.startswith(head)), None)
        if suffix is None:
            raise InputError("holds no picture of a known format", path=file, row=number)
        target = images / (re.sub(r"[^\w.-]", "_", name) + suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_file() or target.read_bytes() != data:
            target.write_bytes(data)
        return str(target)
    if isinstance(picture, dict):
        picture = picture.get("path")
    if not isinstance(picture, str) or not picture:
        raise InputError("the row names no picture", path=file, row=number)
    return str((images or file.parent) / picture)


# Files -------------------------------------------------------------------------------------------------------------


def _rows(file: Path) -> Iterator[tuple[int, Row]]:
    """Rows with their numbers; those of Parquet keep bytes as bytes."""
    if file.suffix.lower() == ".parquet":
        pa, pq = libraries()
        try:
            with pq.ParquetFile(file) as table:
                batches = (row for batch in table.iter_batches(batch_size=16) for row in batch.to_pylist())
                yield from enumerate(batches, 1)
        except pa.ArrowException as error:
            raise InputError(f"not a readable parquet table: {error}", path=file) from error
        return
    for number, row in enumerate(FileStorage(str(file)).step().iter_rows(), 1):
        if isinstance(row, BadRow):
            raise InputError(row.error, path=file, row=number)
        yield number, row


def _one_file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise InputError(f"expected one {pattern} in it, found {len(found)}", path=folder)
    return found[0]


_LOADERS: Mapping[str, Callable[[Path, Path | None], Iterator[Row]]] = {
    "geneval": _geneval,
    "dsg": _dsg,
    "t2i_compbench": _compbench,
    "parti": _parti,
    "dpg": _dpg,
    "longtext": _longtext,
    "gedit": _gedit,
    "imgedit": _imgedit,
}
FORMATS = tuple(_LOADERS)
