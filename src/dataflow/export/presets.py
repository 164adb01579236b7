"""Layouts of published datasets: their columns, from ours, and their files.

A preset says which columns a published dataset has, in its order, and what fills each: a column of ours, a column of
the same name in the table, or what ``fill`` names. A column that nothing fills is null. What is left over (scores,
provenance, licence) follows behind, unless ``published_only`` is set.

Column names are those of the published files as far as they have been checked; ``note`` says what has not been.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dataflow.errors import ConfigError
from dataflow.export.options import ExportOptions, Format, Layout
from dataflow.export.samples import Picture

Packing = Literal[
    "webdataset", "parquet", "folder", "jsonl", "lance", "json_tar", "parquet_tar", "json_folder", "parts"
]
"""How files are laid out. ``json_tar`` and ``parquet_tar``: a table of paths and the pictures in tar files;
``json_folder``: a table of paths and the pictures in folders; ``parts``: folders of 1,000 pictures with a JSON each."""

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Filled:
    """A published column.

    Attributes:
        name: in the published dataset.
        source: our column, or a function of the record; None for a column of the same name in the table.
        uses: with a function: our columns that it stands for.
        kind: type of the column where nothing fills it.
    """

    name: str
    source: str | Callable[[Record], Any] | None = None
    uses: tuple[str, ...] = ()
    kind: str = "text"

    def value(self, record: Record) -> Any:
        if callable(self.source):
            return self.source(record)
        return record.get(self.source or self.name)

    @property
    def consumed(self) -> tuple[str, ...]:
        return self.uses if callable(self.source) else (self.source or self.name,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """How one published dataset is laid out.

    Attributes:
        name: what it is called here.
        layout: what a sample is.
        packing: how its files are laid out.
        columns: in the published order; empty leaves ours.
        folder: below which the pictures lie.
        manifest: name of the table of paths, ``{split}`` in it being the split.
        shard_samples: most samples of a shard, where the published dataset has a fixed number.
        note: what differs from the published files, or has not been checked.
    """

    name: str
    layout: Layout
    packing: Packing
    columns: tuple[Filled, ...] = ()
    folder: str = "images"
    manifest: str = ""
    shard_samples: int | None = None
    note: str = ""

    def arranged(self, record: Record, *, published_only: bool) -> dict[str, Any]:
        """The record with the published columns first."""
        if not self.columns:
            return dict(record)
        found = {column.name: column.value(record) for column in self.columns}
        used = {name for column in self.columns for name in column.consumed} | found.keys()
        return found if published_only else found | {name: each for name, each in record.items() if name not in used}


def _input_images(record: Record) -> list[Any]:
    return [record["source_image"], *(record.get("reference_images") or [])]


def _pico_files(record: Record) -> list[dict[str, Any]]:
    *turns, final = record["turn_images"]
    files = [{"id": f"edit_turn{number}", "url": picture} for number, picture in enumerate(turns, 1)]
    files.append({"id": "final_image", "url": final})
    if record.get("source_image") is not None:
        files.append({"id": "original_input_image", "url": record["source_image"]})
    return files


def _parameter(name: str) -> Callable[[Record], Any]:
    def find(record: Record) -> Any:
        picture = record["image"]
        params = picture.facts.get("params") if isinstance(picture, Picture) else None
        value = params.get(name) if isinstance(params, Mapping) else None
        return value if isinstance(value, int | float) else None

    return find


def _sampler(record: Record) -> Any:
    picture = record["image"]
    made = picture.facts.get("provenance") if isinstance(picture, Picture) else None
    value = made.get("scheduler") if isinstance(made, Mapping) else None
    return value if isinstance(value, str) else None


_PICO = (
    Filled("open_image_input_url", "source_image"),
    Filled("text", "instruction"),
    Filled("output_image", "edited_image"),
    Filled("edit_type"),
    Filled("summarized_text"),
)
_VIESCORE = (
    Filled("sc_score_1", kind="float"),
    Filled("sc_score_2", kind="float"),
    Filled("sc_reasoning"),
    Filled("pq_score", kind="float"),
    Filled("pq_reasoning"),
    Filled("o_score", kind="float"),
)
_ULTRAEDIT_SCORES = ("clip_sim_source", "clip_sim_target", "clip_sim_dir", "clip_sim_image", "dinov2_sim", "ssim")

PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="pico_banana",
            layout="edit",
            packing="jsonl",
            columns=_PICO,
            manifest="{split}.jsonl",
            note="Published with addresses only: base_url makes them; otherwise paths of the pictures stand there.",
        ),
        Preset(
            name="pico_banana_preference",
            layout="preference",
            packing="jsonl",
            columns=(
                Filled("output_image", "chosen"),
                Filled("rejected_images", lambda record: [record["rejected"]], ("rejected",)),
                Filled("text", "prompt"),
                Filled("edit_type"),
                Filled("open_image_input_url", "source_image"),
                Filled("summarized_text"),
            ),
            manifest="{split}.jsonl",
            note="One line for each pair: rejected_images has one entry.",
        ),
        Preset(
            name="pico_banana_multi_turn",
            layout="multi_turn",
            packing="jsonl",
            columns=(
                Filled("files", _pico_files, ("source_image", "turn_images")),
                Filled("metadata_edit_turn_prompts", "instructions"),
            ),
            manifest="{split}.jsonl",
        ),
        Preset(
            name="imgedit",
            layout="edit",
            packing="parquet_tar",
            columns=(
                Filled("input_images", _input_images, ("source_image", "reference_images")),
                Filled("output_images", lambda record: [record["edited_image"]], ("edited_image",)),
                Filled("prompt", "instruction"),
            ),
            manifest="{split}.parquet",
        ),
        Preset(
            name="omniedit",
            layout="edit",
            packing="parquet",
            columns=(
                Filled("omni_edit_id", "id"),
                Filled("task"),
                Filled("src_img", "source_image"),
                Filled("edited_img", "edited_image"),
                Filled("edited_prompt_list", lambda record: [record["instruction"]], ("instruction",)),
                Filled("width", "width"),
                Filled("height", "height"),
                *_VIESCORE,
            ),
        ),
        Preset(
            name="ultraedit",
            layout="edit",
            packing="parquet",
            columns=(
                *(Filled(name, kind="float") for name in _ULTRAEDIT_SCORES),
                Filled("source_caption"),
                Filled("target_caption"),
                Filled("idx", "id"),
                Filled("edit_prompt", "instruction"),
                Filled("source_image", "source_image"),
                Filled("edited_image", "edited_image"),
            ),
            note="Without edit_object and mask_image, which only the part with regions has.",
        ),
        Preset(
            name="sharegpt4o_image",
            layout="text_image",
            packing="json_tar",
            columns=(Filled("input_prompt", "prompt"), Filled("output_image", "image")),
            manifest="text_to_image.json",
            note="input_prompt was not checked against the files.",
        ),
        Preset(
            name="sharegpt4o_image_edit",
            layout="edit",
            packing="json_tar",
            columns=(
                Filled("input_prompt", "instruction"),
                Filled("input_image", _input_images, ("source_image", "reference_images")),
                Filled("output_image", "edited_image"),
            ),
            manifest="text_and_image_to_image.json",
            note="input_prompt was not checked against the files.",
        ),
        Preset(
            name="blip3o",
            layout="text_image",
            packing="webdataset",
            note="Published with a picture and a txt for each sample; here a json with the other columns comes along.",
        ),
        Preset(
            name="gpt_image_edit",
            layout="edit",
            packing="json_folder",
            folder="edit",
            manifest="edit/{split}.json",
            note="Folder and JSON as published; the published column names were not checked, so these are ours.",
        ),
        Preset(
            name="hpdv3",
            layout="preference",
            packing="json_tar",
            columns=(
                Filled("prompt", "prompt"),
                Filled("path1", "chosen"),
                Filled("path2", "rejected"),
                Filled("confidence", kind="float"),
                Filled("model1", "chosen_model"),
                Filled("model2", "rejected_model"),
            ),
            manifest="{split}.json",
            note="path1 is the preferred picture. Published as parts of one gzip file; here as whole tar files.",
        ),
        Preset(
            name="diffusiondb",
            layout="text_image",
            packing="parts",
            columns=(
                Filled("image_name", "image"),
                Filled("prompt", "prompt"),
                Filled("part_id", lambda _: 0),
                Filled("seed", "seed", kind="int"),
                Filled("step", _parameter("num_inference_steps"), kind="int"),
                Filled("cfg", _parameter("guidance_scale"), kind="float"),
                Filled("sampler", _sampler),
                Filled("width", "width"),
                Filled("height", "height"),
                Filled("user_name"),
                Filled("timestamp"),
                Filled("image_nsfw", kind="float"),
                Filled("prompt_nsfw", kind="float"),
            ),
            shard_samples=1000,
            note="The sampler is the name of the scheduler's class, not a number.",
        ),
        Preset(
            name="diffusers",
            layout="text_image",
            packing="folder",
            columns=(Filled("file_name", "image"), Filled("text", "prompt")),
        ),
        Preset(
            name="instruct_pix2pix",
            layout="edit",
            packing="folder",
            columns=(
                Filled("input_image", "source_image"),
                Filled("edit_prompt", "instruction"),
                Filled("edited_image", "edited_image"),
            ),
        ),
        Preset(
            name="kohya",
            layout="text_image",
            packing="folder",
            columns=(Filled("file_name", "image"), Filled("text", "prompt")),
            note="With a text file beside each picture.",
        ),
    )
}
"""By name. :attr:`Preset.note` of each says how it differs from what was published."""

_OF_FOLDER: Mapping[Layout, str] = {"text_image": "diffusers", "edit": "instruct_pix2pix"}


def find_preset(options: ExportOptions) -> Preset | None:
    """The preset that the options name.

    Raises:
        ConfigError: there is none of that name, or another layout is asked for.
    """
    if options.preset is None:
        return None
    preset = PRESETS.get(options.preset)
    if preset is None:
        raise ConfigError(f"export: there is no preset {options.preset!r}; choose one of {', '.join(PRESETS)}")
    if options.layout not in (None, preset.layout):
        raise ConfigError(f"export: preset {preset.name} has the layout {preset.layout}, not {options.layout}")
    return preset


def plain_preset(format: Format | None, layout: Layout) -> Preset:  # noqa: A002 - as the option is called
    """How a format is laid out without a preset: our columns; a folder as diffusers' training scripts read it."""
    packing: Packing = format or "webdataset"
    if packing == "folder" and layout in _OF_FOLDER:
        return PRESETS[_OF_FOLDER[layout]]
    return Preset(name="", layout=layout, packing=packing)


def packing_of(preset: Preset, format: Format | None) -> Packing:  # noqa: A002 - likewise
    """How the files are laid out: the preset's own way, unless another format is asked for."""
    own = {"json_tar": "jsonl", "json_folder": "jsonl", "parquet_tar": "parquet", "parts": "folder"}
    if format is None or format == preset.packing or own.get(preset.packing) == format:
        return preset.packing
    return format
