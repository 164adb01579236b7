"""What each diffusers pipeline class takes, and what follows from it. Facts and pure functions, nothing heavy imported.

A pipeline's signature tells the names of its parameters, never what they mean: whether a list of images is a batch or
several references, whether different prompts may share a call, when a negative prompt has any effect. :data:`TABLE`
says so for the families it knows (read from the sources of diffusers 0.42); :func:`from_signature` is the cautious
answer for every other class.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dataflow.errors import BadRequestError, ConfigError
from dataflow.types import Task

NICKNAMES = {"FLUX": "FluxPipeline", "FLUX-Kontext": "FluxKontextPipeline"}
"""Short names that users know, beside the exact class names."""

Size = tuple[int, int]
"""(width, height) in pixels."""

Encoded = Literal["rows", "shared", "ragged", "mask"]
"""What a value that ``encode_prompt`` returns is: ``rows``, a tensor with a row per prompt, all of one length;
``shared``, the same for all prompts; ``ragged``, rows padded with zeros to the longest of the call; ``mask``, the ones
and zeros that go with those, or None where nothing is padded."""

OWN = frozenset(
    {
        "callback",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
        "callback_steps",
        "generator",
        "image",
        "images",
        "input_images",
        "latents",
        "num_images_per_prompt",
        "output_type",
        "prompt",
        "return_dict",
        "seed",
    }
)
"""Call arguments the serving gives itself; nobody else may."""

MANIFEST_ONLY = frozenset({"pipeline_class", "size_multiple"})
"""Keys of a dataflow.json section that are no call arguments."""

COUNTS = frozenset({"num_inference_steps", "max_sequence_length", "max_area", "height", "width"})
"""Parameters that are whole numbers from 1."""

MAX_STEPS = 10_000
"""More steps than any scheduler has; a guard against a number in the wrong column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What one pipeline class can do.

    Attributes:
        name: the class in diffusers.
        image: the call argument that takes input images; None for text only.
        list_means: what a list of images is to the class: ``batch``, one image per prompt; ``references``, all belong
            to one prompt; ``single``, it takes one image and no list.
        max_images: most input images of one request; None for no limit of its own.
        text2image: works without an input image.
        defaults: call arguments given where nobody says otherwise, with the steps and the guidance of the family.
        negative: when a negative prompt has an effect: ``never``, ``always``, ``guidance`` (``guidance_scale`` above
            ``free``) or ``true_cfg`` (``true_cfg_scale`` above ``free``).
        free: the guidance up to which there is no second, negative pass.
        multiple: both sides of a picture must be multiples of this, in pixels.
        sizes: the only sizes there are; empty for any.
        sized: takes ``height`` and ``width``; where not, the output has the input's size.
        follow: how an edit's size follows its input when nobody names one: ``kontext``, one of the sizes the model was
            trained on; ``area``, the input's shape within one megapixel; None, the pipeline sees to it.
        batch_text: prompts that differ may share a call.
        batch_edit: the same for edits.
        tag: put before the prompt for every input image (``{}`` is its number), where the class wants one.
        floats: can return pictures as floats, in which NaN is still visible.
        encoding: what each value that ``encode_prompt`` returns is, where prompts may be encoded apart from the call
            (:mod:`dataflow.serving.prompt_embeddings`); empty where they may not, or nobody looked.
        known: stands in the table; what is said of others is guessed, with caution.
    """

    name: str
    image: str | None = None
    list_means: Literal["batch", "references", "single"] = "single"
    max_images: int | None = 1
    text2image: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    negative: Literal["never", "always", "guidance", "true_cfg"] = "guidance"
    free: float = 1.0
    multiple: int = 16
    sizes: tuple[Size, ...] = ()
    sized: bool = True
    follow: Literal["kontext", "area"] | None = None
    batch_text: bool = True
    batch_edit: bool = False
    tag: str = ""
    floats: bool = True
    encoding: tuple[Encoded, ...] = ()
    known: bool = True

    @property
    def fixed_text(self) -> bool:
        """Whether every prompt is padded to one length, so that shapes do not depend on words."""
        return bool(self.encoding) and "ragged" not in self.encoding


_WIDE = ((1568, 672), (1504, 688), (1456, 720), (1392, 752), (1328, 800), (1248, 832), (1184, 880), (1104, 944))
KONTEXT_SIZES: tuple[Size, ...] = (*_WIDE, (1024, 1024), *((height, width) for width, height in _WIDE))
"""The sizes FLUX.1-Kontext was trained on; its pipeline snaps input images to them."""

KANDINSKY_SIZES: tuple[Size, ...] = (
    (1024, 1024), (640, 1408), (1408, 640), (768, 1280), (1280, 768), (896, 1152), (1152, 896)
)  # fmt: skip


def _text(name: str, steps: int, guidance: float | None, **facts: Any) -> Capabilities:
    """A row of the table; ``extra`` holds further default call arguments."""
    defaults = {"num_inference_steps": steps, "guidance_scale": guidance, "strength": facts.pop("strength", None)}
    defaults |= facts.pop("extra", {})
    return Capabilities(name=name, defaults={k: v for k, v in defaults.items() if v is not None}, **facts)


def _edit(name: str, steps: int, guidance: float | None, **facts: Any) -> Capabilities:
    return _text(name, steps, guidance, **({"image": "image", "text2image": False} | facts))


_ROWS: dict[str, Any] = {"encoding": ("rows", "rows")}
_FOUR_ROWS: dict[str, Any] = {"encoding": ("rows",) * 4}
_FLUX = {"negative": "true_cfg", "extra": {"true_cfg_scale": 1.0}, "encoding": ("rows", "rows", "shared")}
# without a negative prompt Qwen's guidance is silently off; a blank is what its authors use
_QWEN = {"negative": "true_cfg", "extra": {"true_cfg_scale": 4.0, "negative_prompt": " "}}
_PIX2PIX = {"extra": {"image_guidance_scale": 1.5}}
_BATCH = {"list_means": "batch", "batch_edit": True}
_OMNIGEN = {"negative": "never", "extra": {"img_guidance_scale": 1.6}, "tag": "<img><|image_{}|></img> "}
_HUNYUAN = {"extra": {"distilled_guidance_scale": 3.25}}
_REFERENCES = {"list_means": "references", "max_images": None}
_BOTH = {"text2image": True}

TABLE: Mapping[str, Capabilities] = {
    row.name: row
    for row in (
        _text("FluxPipeline", 28, 3.5, **_FLUX),
        # diffusers' own default of 3.5 is for text to image; the model's card says 2.5
        _edit("FluxKontextPipeline", 28, 2.5, follow="kontext", **_FLUX, **_BATCH, **_BOTH),
        _edit("FluxImg2ImgPipeline", 28, 7.0, strength=0.6, follow="area", **_FLUX, **_BATCH),
        _edit("Flux2Pipeline", 50, 4.0, negative="never", **_REFERENCES, **_BOTH),
        _edit("Flux2KleinPipeline", 50, 4.0, negative="never", **_REFERENCES, **_BOTH),
        _edit("Flux2KleinKVPipeline", 4, None, negative="never", **_REFERENCES, **_BOTH),
        _text("QwenImagePipeline", 50, None, encoding=("ragged", "mask"), **_QWEN),
        # in a batch the images that its text encoder sees are not resized, alone they are: never together
        _edit("QwenImageEditPipeline", 50, None, **_QWEN),
        _edit("QwenImageEditPlusPipeline", 50, None, **_QWEN, **_REFERENCES),
        _text("StableDiffusionPipeline", 50, 7.5, multiple=8, **_ROWS),
        _text("LatentConsistencyModelPipeline", 4, 8.5, multiple=8, negative="never"),
        _edit("StableDiffusionImg2ImgPipeline", 50, 7.5, strength=0.8, multiple=8, sized=False, **_ROWS, **_BATCH),
        _edit("StableDiffusionInstructPix2PixPipeline", 100, 7.5, multiple=8, sized=False, **_PIX2PIX, **_BATCH),
        _text("StableDiffusionXLPipeline", 50, 5.0, multiple=8, **_FOUR_ROWS),
        _edit(
            "StableDiffusionXLImg2ImgPipeline", 50, 5.0, strength=0.3, multiple=8, sized=False, **_FOUR_ROWS, **_BATCH
        ),
        _edit("StableDiffusionXLInstructPix2PixPipeline", 100, 5.0, multiple=8, follow="area", **_PIX2PIX, **_BATCH),
        _text("StableDiffusion3Pipeline", 28, 7.0, **_FOUR_ROWS),
        _edit("StableDiffusion3Img2ImgPipeline", 50, 7.0, strength=0.6, follow="area", **_FOUR_ROWS, **_BATCH),
        _text("SanaPipeline", 20, 4.5, multiple=32, **_FOUR_ROWS),
        _text("SanaSprintPipeline", 2, 4.5, multiple=32, negative="never"),
        _text("ZImagePipeline", 50, 5.0, free=0.0),
        _edit("ZImageOmniPipeline", 50, 5.0, free=0.0, batch_text=False, **_REFERENCES, **_BOTH),
        _text("Lumina2Pipeline", 30, 4.0),
        _text("CogView4Pipeline", 50, 5.0),
        _text("AuraFlowPipeline", 50, 3.5),
        _text("PixArtAlphaPipeline", 20, 4.5, multiple=8),
        _text("PixArtSigmaPipeline", 20, 4.5, multiple=8),
        _text("PRXPipeline", 28, 4.0),
        _text("ChromaPipeline", 35, 5.0),
        _text("HiDreamImagePipeline", 50, 5.0),
        _text("OvisImagePipeline", 50, 5.0),
        _text("LongCatImagePipeline", 50, 4.5),
        _edit("LongCatImageEditPipeline", 50, 4.5, sized=False),
        # its first stage draws from the first generator only: neighbours would share one seed
        _edit("GlmImagePipeline", 50, 1.5, multiple=32, negative="never", batch_text=False, **_REFERENCES, **_BOTH),
        _edit("OmniGenPipeline", 50, 2.5, image="input_images", **_OMNIGEN, **_REFERENCES, **_BOTH),
        _text("BriaFiboPipeline", 30, 5.0),
        _edit("BriaFiboEditPipeline", 30, 5.0, **_REFERENCES),
        _edit("JoyImageEditPipeline", 40, 4.0, **_BOTH),
        _edit("JoyImageEditPlusPipeline", 30, 4.0, image="images", **_REFERENCES, **_BOTH),
        _text("Kandinsky5T2IPipeline", 50, 3.5, sizes=KANDINSKY_SIZES),
        _edit("Kandinsky5I2IPipeline", 50, 3.5, sizes=KANDINSKY_SIZES),
        _edit("DreamLitePipeline", 30, 3.5, multiple=8, negative="always", batch_text=False, **_PIX2PIX, **_BOTH),
        _text("HunyuanImagePipeline", 50, None, multiple=64, negative="always", **_HUNYUAN),
        _text("Ideogram4Pipeline", 48, None, negative="never"),
    )
}
"""Capabilities by class name."""


def from_signature(name: str, parameters: Collection[str]) -> Capabilities:
    """The cautious answer for a class that is not in the table: one prompt, at most one image, no assumed defaults.

    Args:
        name: the class in diffusers.
        parameters: names its ``__call__`` takes.

    Raises:
        ConfigError: the class needs something that a row of prompts and images cannot give.
    """
    needs = next((p for p in ("mask_image", "mask", "control_image", "video", "audio") if p in parameters), None)
    if needs is not None or "prompt" not in parameters:
        lacks = f"takes a {needs!r}" if needs else "takes no prompt"
        raise ConfigError(f"{name} {lacks}: it is not a text-to-image or instruction-editing pipeline")
    image = next((p for p in ("image", "images", "input_images") if p in parameters), None)
    return Capabilities(
        name=name,
        image=image,
        list_means="single" if image == "image" else "references",
        negative="always" if "negative_prompt" in parameters else "never",
        multiple=8,
        sized={"height", "width"} <= set(parameters),
        batch_text=False,
        floats=False,
        known=False,
    )


def pipeline_class(index_class: str, *, named: str | None, task: Task, manifest: Mapping[str, Any]) -> str:
    """The class to load a folder with.

    Args:
        index_class: ``_class_name`` of the folder's model_index.json.
        named: what the user said, a nickname or an exact class name.
        task: what it is for.
        manifest: the folder's dataflow.json; ``{task: {"pipeline_class": …}}`` overrides the index.
    """
    if named:
        return NICKNAMES.get(named, named)
    section = manifest.get(task) or {}
    return str(section.get("pipeline_class") or index_class)


def require_task(capabilities: Capabilities, task: Task) -> None:
    """Refuse a class that cannot do the task.

    Raises:
        ConfigError: with what to name instead.
    """
    if task == "imageedit" and capabilities.image is None:
        raise ConfigError(
            f"{capabilities.name} makes images from text only, it does not edit: name a model that does"
            " (diffuser_model_name='FLUX-Kontext' for FLUX.1-Kontext), or Image_gen_task='text2image'"
        )
    if task == "text2image" and not capabilities.text2image:
        raise ConfigError(f"{capabilities.name} only edits images: Image_gen_task='imageedit'")


def near(name: str, names: Iterable[str]) -> str:
    """``", did you mean 'a' or 'b'?"``, or nothing."""
    matches = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.6)
    return f", did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def require_parameters(
    capabilities: Capabilities, params: Mapping[str, Any], signature: Callable[[], Collection[str]]
) -> None:
    """Refuse call parameters the class does not take.

    Args:
        capabilities: of the class.
        params: call parameters with their values.
        signature: the names its ``__call__`` takes; costly, so asked only about names the table does not settle.

    Raises:
        BadRequestError: a name is unknown or not the user's to give.
    """
    for name in params:
        if name in capabilities.defaults or name in ("num_inference_steps", "negative_prompt"):
            continue
        if name in ("height", "width") and capabilities.sized:
            continue
        if name in OWN:
            raise BadRequestError(f"{name!r} is set by the serving itself and cannot be given as a parameter")
        if name not in signature() or name == "kwargs":
            hint = near(name, set(signature()) - OWN)
            raise BadRequestError(f"{capabilities.name} takes no parameter {name!r}{hint}")


def require_values(params: Mapping[str, Any]) -> None:
    """Refuse values no pipeline can use.

    Raises:
        BadRequestError: a count that is no whole number from 1, a scale that is not finite, a strength outside [0, 1].
    """
    for name, value in params.items():
        if name in COUNTS:
            whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            if isinstance(value, bool) or not whole or value < 1:
                raise BadRequestError(f"{name} must be a whole number from 1, got {value!r}")
            if name == "num_inference_steps" and value > MAX_STEPS:
                raise BadRequestError(f"num_inference_steps is {value}, at most {MAX_STEPS} make sense")
        elif name.endswith("guidance_scale") or name in ("true_cfg_scale", "strength", "guidance_rescale"):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise BadRequestError(f"{name} must be a finite number, got {value!r}")
            if name == "strength" and not 0 <= value <= 1:
                raise BadRequestError(f"strength must lie in [0, 1], got {value!r}")


def require_size(capabilities: Capabilities, size: Size | None) -> None:
    """Refuse a size the class would silently change.

    Raises:
        BadRequestError: names the nearest allowed sizes.
    """
    if size is None:
        return
    width, height = size
    if not capabilities.sized:
        raise BadRequestError(f"{capabilities.name} takes no size, its output follows its input image")
    if capabilities.sizes:
        if size not in capabilities.sizes:
            nearest = sorted(capabilities.sizes, key=lambda s: abs(math.log(s[0] * height / (s[1] * width))))[:2]
            raise BadRequestError(
                f"{capabilities.name} cannot make {width}×{height}; the nearest of its sizes: {_join(nearest)}"
            )
    elif width < 1 or height < 1 or width % capabilities.multiple or height % capabilities.multiple:
        lower = (_floor(width, capabilities.multiple), _floor(height, capabilities.multiple))
        upper = (_ceil(width, capabilities.multiple), _ceil(height, capabilities.multiple))
        raise BadRequestError(
            f"{capabilities.name} makes sizes in multiples of {capabilities.multiple} pixels, not {width}×{height};"
            f" nearest: {_join([lower, upper])}"
        )


def require_images(capabilities: Capabilities, task: Task, count: int) -> None:
    """Refuse a number of input images that the class does not take.

    Raises:
        BadRequestError: says how many it takes and how many there are.
    """
    if task == "text2image":
        if count:
            raise BadRequestError(
                f"this serving makes images from text, the row has {count} input image{'s'[: count != 1]}:"
                " Image_gen_task='imageedit' edits"
            )
        return
    if not count:
        raise BadRequestError("this serving edits images, the row has no input image")
    most = capabilities.max_images
    if most is not None and count > most:
        raise BadRequestError(
            f"{capabilities.name} takes {most} input image{'s'[: most != 1]}, the row has {count};"
            " a model that takes references is needed (such as QwenImageEditPlusPipeline or Flux2Pipeline)"
        )


def negative_works(capabilities: Capabilities, params: Mapping[str, Any]) -> bool:
    """Whether a negative prompt changes anything under these call parameters."""
    if capabilities.negative == "guidance":
        return float(params.get("guidance_scale") or 0) > capabilities.free
    if capabilities.negative == "true_cfg":
        return float(params.get("true_cfg_scale") or 0) > capabilities.free
    return capabilities.negative == "always"


def require_negative(capabilities: Capabilities, negative: str | None, params: Mapping[str, Any]) -> None:
    """Refuse a negative prompt that would silently change nothing. A blank one is none.

    Raises:
        BadRequestError: says what would make it work.
    """
    if not negative or not negative.strip() or negative_works(capabilities, params):
        return
    how = {
        "never": "it takes none",
        "guidance": f"it needs guidance_scale > {capabilities.free:g}",
        "true_cfg": "it needs true_cfg_scale > 1 (which doubles the time)",
    }[capabilities.negative]
    raise BadRequestError(f"the negative prompt would have no effect on {capabilities.name}: {how}")


def edit_size(capabilities: Capabilities, params: Mapping[str, Any], source: Size) -> Size | None:
    """The size of an edit for which nobody named one; None leaves it to the pipeline.

    Args:
        capabilities: of the class.
        params: effective call parameters (``_auto_resize`` and ``max_area`` matter to Kontext).
        source: of the input image.
    """
    width, height = source
    if capabilities.follow == "kontext":
        if params.get("_auto_resize", True):
            return min(KONTEXT_SIZES, key=lambda size: (abs(width / height - size[0] / size[1]), size))
        return scaled(source, int(params.get("max_area", 1024 * 1024)), capabilities.multiple)
    if capabilities.follow == "area":
        return scaled(source, min(width * height, 1024 * 1024), capabilities.multiple)
    return None


def input_size(capabilities: Capabilities, params: Mapping[str, Any], source: Size, size: Size | None) -> Size:
    """The size an input image is brought to before the pipeline sees it; images of one batch must agree in it.

    Kontext squeezes every image of a batch into the first one's shape, so each gets its own right shape beforehand. A
    model that must not snap to Kontext's sizes (``_auto_resize`` false with a ``max_area`` of its own) gets the size it
    draws at.
    """
    if capabilities.follow != "kontext":
        return source
    if params.get("_auto_resize", True):
        return edit_size(capabilities, params, source) or source
    if "max_area" not in params:
        return (_floor(source[0], capabilities.multiple), _floor(source[1], capabilities.multiple))
    return size or edit_size(capabilities, params, source) or source


def scaled(source: Size, area: int, multiple: int) -> Size:
    """The shape of ``source`` at about ``area`` square pixels, both sides floored to a multiple and never zero."""
    ratio = source[0] / source[1]
    return (_floor(round((area * ratio) ** 0.5), multiple), _floor(round((area / ratio) ** 0.5), multiple))


def can_share(capabilities: Capabilities, images: int) -> bool:
    """Whether requests with this many input images may share a call at all."""
    return capabilities.batch_edit if images else capabilities.batch_text


def with_manifest(capabilities: Capabilities, section: Mapping[str, Any]) -> Capabilities:
    """Capabilities with what a folder's dataflow.json says of its own model: ``size_multiple``, in pixels.

    Raises:
        ConfigError: it is no whole number from 1.
    """
    multiple = section.get("size_multiple", capabilities.multiple)
    if not isinstance(multiple, int) or multiple < 1:
        raise ConfigError(f"dataflow.json: size_multiple must be a whole number from 1, got {multiple!r}")
    return replace(capabilities, multiple=multiple)


def _floor(value: int, multiple: int) -> int:
    return max(multiple, value // multiple * multiple)


def _ceil(value: int, multiple: int) -> int:
    return max(multiple, -(-value // multiple) * multiple)


def _join(sizes: Iterable[Size]) -> str:
    return " or ".join(dict.fromkeys(f"{width}×{height}" for width, height in sizes))
