import inspect
import subprocess
import sys

import pytest

from dataflow.errors import BadRequestError, ConfigError
from dataflow.serving import capabilities as can
from dataflow.serving.capabilities import TABLE, Capabilities

BOTH = {"imageedit": {"pipeline_class": "FluxKontextPipeline"}}
FLUX, KONTEXT = TABLE["FluxPipeline"], TABLE["FluxKontextPipeline"]
PIX2PIX = TABLE["StableDiffusionInstructPix2PixPipeline"]


def no_signature():
    raise AssertionError("the signature is not needed for names the table settles")


def test_nothing_heavy_is_imported():
    code = (
        "import sys, dataflow.serving.local_image_gen_serving as m; m.LocalImageGenServing();"
        "print([n for n in ('torch', 'diffusers', 'transformers', 'huggingface_hub') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("row", TABLE.values(), ids=lambda row: row.name)
def test_the_table_agrees_with_the_installed_diffusers(row):
    diffusers = pytest.importorskip("diffusers")
    parameters = inspect.signature(getattr(diffusers, row.name).__call__).parameters
    assert {"prompt", "generator", "output_type", *row.defaults} - {"negative_prompt"} <= set(parameters)
    if row.image is not None:
        assert row.image in parameters
    else:
        assert row.text2image
        assert not {"image", "images", "input_images"} & set(parameters)
    if row.name != "Flux2KleinPipeline":  # takes embeddings only
        assert (row.negative == "never") == ("negative_prompt" not in parameters)
    assert row.sized == ({"height", "width"} <= set(parameters))
    if row.negative == "true_cfg":
        assert "true_cfg_scale" in parameters
    if row.follow:
        assert row.list_means == "batch"


def test_kontext_sizes_and_choice_are_those_of_its_pipeline():
    pytest.importorskip("diffusers")
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS as THEIRS

    assert set(can.KONTEXT_SIZES) == set(THEIRS)
    assert len(can.KONTEXT_SIZES) == len(THEIRS) == 17
    for width, height in [(640, 480), (1, 1), (100, 3000), (3000, 100), (1023, 1024), (1920, 1080)]:
        _, w, h = min((abs(width / height - w / h), w, h) for w, h in THEIRS)
        assert can.edit_size(KONTEXT, {}, (width, height)) == (w, h)


def test_family_defaults():
    assert FLUX.defaults["guidance_scale"] == 3.5
    assert FLUX.defaults["num_inference_steps"] == 28
    assert KONTEXT.defaults["guidance_scale"] == 2.5
    assert KONTEXT.defaults["num_inference_steps"] == 28
    assert TABLE["QwenImagePipeline"].defaults["negative_prompt"] == " "


@pytest.mark.parametrize(
    ("index", "named", "task", "manifest", "expected"),
    [
        ("FluxPipeline", None, "text2image", {}, "FluxPipeline"),
        ("FluxPipeline", "FLUX", "text2image", {}, "FluxPipeline"),
        ("FluxPipeline", "FLUX-Kontext", "imageedit", {}, "FluxKontextPipeline"),
        ("FluxPipeline", "SanaPipeline", "text2image", {}, "SanaPipeline"),
        ("FluxPipeline", None, "imageedit", BOTH, "FluxKontextPipeline"),
        ("FluxPipeline", None, "text2image", BOTH, "FluxPipeline"),
    ],
)
def test_pipeline_class(index, named, task, manifest, expected):
    assert can.pipeline_class(index, named=named, task=task, manifest=manifest) == expected


def test_unknown_classes_are_guessed_with_caution():
    guessed = can.from_signature("NewPipeline", {"prompt", "image", "height", "width", "negative_prompt", "generator"})
    assert (guessed.image, guessed.max_images, guessed.list_means, guessed.known) == ("image", 1, "single", False)
    assert not can.can_share(guessed, 0)
    assert not can.can_share(guessed, 1)
    assert guessed.negative == "always"
    text_only = can.from_signature("NewPipeline", {"prompt", "generator"})
    assert (text_only.image, text_only.sized, text_only.negative) == (None, False, "never")
    assert can.from_signature("NewPipeline", {"prompt", "images"}).list_means == "references"


@pytest.mark.parametrize(
    ("parameters", "message"), [({"prompt", "mask_image"}, "takes a 'mask_image'"), ({"image"}, "takes no prompt")]
)
def test_classes_that_need_more_than_a_row_has(parameters, message):
    with pytest.raises(ConfigError, match=message):
        can.from_signature("NewPipeline", parameters)


def test_tasks():
    can.require_task(KONTEXT, "text2image")
    can.require_task(KONTEXT, "imageedit")
    with pytest.raises(
        ConfigError, match=r"FluxPipeline makes images from text only.*diffuser_model_name='FLUX-Kontext'"
    ):
        can.require_task(FLUX, "imageedit")
    with pytest.raises(ConfigError, match="only edits images"):
        can.require_task(PIX2PIX, "text2image")


@pytest.mark.parametrize(
    ("row", "params", "message"),
    [
        (FLUX, {"guidence_scale": 3}, "takes no parameter 'guidence_scale', did you mean 'guidance_scale' or"),
        (FLUX, {"strength": 0.5}, "FluxPipeline takes no parameter 'strength'"),
        (FLUX, {"num_images_per_prompt": 2}, "'num_images_per_prompt' is set by the serving itself"),
        (FLUX, {"generator": 1}, "'generator' is set by the serving itself"),
        (PIX2PIX, {"height": 512}, "takes no parameter 'height'"),
        (PIX2PIX, {"kwargs": 1}, "takes no parameter 'kwargs'"),
    ],
)
def test_wrong_parameters(row, params, message):
    names = {"prompt", "guidance_scale", "num_inference_steps", "image_guidance_scale", "kwargs"}
    with pytest.raises(BadRequestError) as caught:
        can.require_parameters(row, params, lambda: names)
    assert message in str(caught.value)
    assert caught.value.reason == "bad_request"


def test_right_parameters():
    can.require_parameters(FLUX, {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 64}, no_signature)
    can.require_parameters(FLUX, {"max_sequence_length": 64}, lambda: {"max_sequence_length"})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1, got 0"),
        ({"num_inference_steps": -3}, "must be a whole number from 1"),
        ({"num_inference_steps": 2.5}, "must be a whole number from 1"),
        ({"num_inference_steps": "28"}, "must be a whole number from 1"),
        ({"num_inference_steps": True}, "must be a whole number from 1"),
        ({"num_inference_steps": float("nan")}, "must be a whole number from 1"),
        ({"num_inference_steps": 10**6}, "at most 10000"),
        ({"height": 0}, "height must be a whole number"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number"),
        ({"guidance_scale": float("nan")}, "must be a finite number"),
        ({"guidance_scale": "3.5"}, "must be a finite number"),
        ({"image_guidance_scale": [1.5]}, "image_guidance_scale must be a finite number"),
        ({"true_cfg_scale": None}, "must be a finite number"),
        ({"strength": 1.5}, r"strength must lie in \[0, 1\]"),
    ],
)
def test_wrong_values(params, message):
    with pytest.raises(BadRequestError, match=message):
        can.require_values(params)


def test_right_values():
    can.require_values({"num_inference_steps": 28.0, "guidance_scale": 0, "strength": 1, "anything": object()})


@pytest.mark.parametrize(
    ("row", "size", "message"),
    [
        (FLUX, (1000, 1024), "multiples of 16 pixels, not 1000×1024; nearest: 992×1024 or 1008×1024"),
        (FLUX, (8, 1024), "nearest: 16×1024"),
        (FLUX, (0, 16), "nearest: 16×16"),
        (TABLE["StableDiffusionPipeline"], (516, 512), "multiples of 8 pixels"),
        (PIX2PIX, (512, 512), "takes no size"),
        (TABLE["Kandinsky5T2IPipeline"], (512, 512), "nearest of its sizes: 1024×1024"),
    ],
)
def test_wrong_sizes(row, size, message):
    with pytest.raises(BadRequestError) as caught:
        can.require_size(row, size)
    assert message in str(caught.value)


def test_right_sizes():
    can.require_size(FLUX, None)
    can.require_size(FLUX, (1008, 16))
    can.require_size(TABLE["Kandinsky5T2IPipeline"], (640, 1408))
    small = can.with_manifest(FLUX, {"size_multiple": 8})
    can.require_size(small, (24, 40))
    assert can.with_manifest(FLUX, {}) == FLUX
    with pytest.raises(ConfigError, match="size_multiple must be a whole number from 1, got '8'"):
        can.with_manifest(FLUX, {"size_multiple": "8"})


@pytest.mark.parametrize(
    ("row", "task", "count", "message"),
    [
        (FLUX, "text2image", 1, "makes images from text, the row has 1 input image:"),
        (FLUX, "text2image", 2, "the row has 2 input images:"),
        (KONTEXT, "imageedit", 0, "the row has no input image"),
        (KONTEXT, "imageedit", 2, "takes 1 input image, the row has 2; a model that takes references is needed"),
    ],
)
def test_wrong_numbers_of_images(row, task, count, message):
    with pytest.raises(BadRequestError) as caught:
        can.require_images(row, task, count)
    assert message in str(caught.value)


def test_right_numbers_of_images():
    can.require_images(KONTEXT, "imageedit", 1)
    can.require_images(KONTEXT, "text2image", 0)
    can.require_images(TABLE["QwenImageEditPlusPipeline"], "imageedit", 7)


@pytest.mark.parametrize(
    ("row", "params", "message"),
    [
        (FLUX, {"true_cfg_scale": 1.0}, "needs true_cfg_scale > 1"),
        (TABLE["QwenImagePipeline"], {"true_cfg_scale": 1.0}, "needs true_cfg_scale > 1"),
        (TABLE["StableDiffusionPipeline"], {"guidance_scale": 1.0}, "needs guidance_scale > 1"),
        (TABLE["ZImagePipeline"], {"guidance_scale": 0.0}, "needs guidance_scale > 0"),
        (TABLE["Flux2Pipeline"], {"guidance_scale": 4.0}, "it takes none"),
    ],
)
def test_negative_prompts_without_effect(row, params, message):
    with pytest.raises(BadRequestError, match=message):
        can.require_negative(row, "blurry", params)
    can.require_negative(row, None, params)
    can.require_negative(row, " ", params)


def test_negative_prompts_with_effect():
    can.require_negative(FLUX, "blurry", {"true_cfg_scale": 2})
    can.require_negative(TABLE["StableDiffusionPipeline"], "blurry", {"guidance_scale": 7.5})
    can.require_negative(TABLE["ZImagePipeline"], "blurry", {"guidance_scale": 0.5})
    can.require_negative(TABLE["DreamLitePipeline"], "blurry", {})


def test_sizes_of_edits():
    area = TABLE["FluxImg2ImgPipeline"]
    assert can.edit_size(area, {}, (640, 480)) == (640, 480)
    assert can.edit_size(area, {}, (4000, 3000)) == (1168, 880)
    assert can.edit_size(area, {}, (5, 3)) == (16, 16)
    assert can.edit_size(PIX2PIX, {}, (640, 480)) is None
    own = {"_auto_resize": False, "max_area": 64 * 64}
    assert can.edit_size(KONTEXT, own, (100, 50)) == (80, 32)
    assert can.edit_size(KONTEXT, own, (1000, 1000)) == (64, 64)


def test_sizes_of_inputs():
    assert can.input_size(PIX2PIX, {}, (641, 480), None) == (641, 480)
    assert can.input_size(KONTEXT, {}, (640, 480), (512, 512)) == (1184, 880)
    assert can.input_size(KONTEXT, {"_auto_resize": False}, (650, 490), None) == (640, 480)
    own = {"_auto_resize": False, "max_area": 64 * 64}
    assert can.input_size(KONTEXT, own, (100, 50), None) == (80, 32)
    assert can.input_size(KONTEXT, own, (100, 50), (64, 64)) == (64, 64)


def test_what_may_share_a_call():
    assert can.can_share(KONTEXT, 0)
    assert can.can_share(KONTEXT, 1)
    flux2 = TABLE["Flux2Pipeline"]
    assert can.can_share(flux2, 0)
    assert not can.can_share(flux2, 2)
    assert not can.can_share(TABLE["GlmImagePipeline"], 0)


def test_near_names():
    assert can.near("FluxPipelin", ["FluxPipeline", "Other"]) == ", did you mean 'FluxPipeline'?"
    assert can.near("zzz", ["FluxPipeline"]) == ""


def test_capabilities_are_frozen():
    with pytest.raises(AttributeError):
        Capabilities(name="x").name = "y"  # pyright: ignore[reportAttributeAccessIssue]
