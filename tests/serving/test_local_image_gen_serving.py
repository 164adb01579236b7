import json
import logging
import pickle
import shutil
import sys

import pytest
from PIL import Image

from dataflow.errors import BadRequestError, ConfigError
from dataflow.serving import diffusers_options, model_files
from dataflow.serving.local_image_gen_serving import LocalImageGenServing
from dataflow.types import GenerationRequest, Serving

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def request(number=0, prompt="a red circle", **more):
    return GenerationRequest(request_id=f"{number:032x}", prompt=prompt, seed=more.pop("seed", number), **more)


# The constructor only stores


def test_it_is_a_serving():
    serving = LocalImageGenServing(batch_size=4, diffuser_num_images_per_prompt=3)
    assert isinstance(serving, Serving)
    assert (serving.batch_size, serving.concurrency, serving.ahead, serving.images_per_prompt) == (4, 1, 1, 3)
    assert serving.image_io is None


def test_it_pickles_small():
    serving = LocalImageGenServing(
        hf_model_name_or_path="black-forest-labs/FLUX.1-dev", batch_size=4, lora="a/b@0.8", device=["cuda:0", "cuda:1"]
    )
    data = pickle.dumps(serving)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again._settings == serving._settings
    assert again.batch_size == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number from 1, got 0"),
        ({"batch_size": "4"}, "batch_size must be a whole number from 1, got '4'"),
        ({"diffuser_num_images_per_prompt": -1}, "diffuser_num_images_per_prompt must be a whole number"),
        ({"Image_gen_task": "image_edit"}, "got 'image_edit', did you mean 'imageedit'?"),
        ({"dtype": "float8"}, "dtype must be 'auto' or 'bf16' or 'fp16' or 'fp32', got 'float8'"),
        ({"device": "gpu"}, "device must be 'auto', 'cpu'"),
        ({"device": ["auto", "cpu"]}, "device must be"),
        ({"device": []}, "at least one device"),
        ({"determinism": "bitwise"}, "determinism must be 'batch' or 'strict'"),
        ({"determinism": "strict", "step_cache": "taylorseer:5"}, "exclude each other"),
        ({"diffuser_num_inference_steps": 0}, "num_inference_steps must be a whole number from 1"),
        ({"diffuser_guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"diffuser_image_height": 64.5}, "height must be a whole number"),
        ({"pipeline_kwargs": {"sigmas": object()}}, "not JSON serializable"),
        ({"lora": [("x", "strong")]}, "lora must be names or"),
        ({"lora": ""}, "lora must be names or"),
        ({"compile": "fast"}, "compile must be one of"),
        ({"offload": "disk"}, "offload must be one of"),
        ({"step_cache": "first_block"}, "step_cache must be like"),
        ({"step_cache": "first_block:2"}, "step_cache must be like"),
        ({"step_cache": "taylorseer:1.5"}, "step_cache must be like"),
        ({"quantization": "int8"}, "quantization must be"),
        ({"quantization": "bnb:3bit"}, "quantization must be"),
    ],
)
def test_wrong_constructor_arguments(arguments, message):
    with pytest.raises(ConfigError) as caught:
        LocalImageGenServing(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        (None, ()),
        ("org/lora", (("org/lora", 1.0),)),
        ("org/lora@0.8", (("org/lora", 0.8),)),
        ("me@home/lora", (("me@home/lora", 1.0),)),
        (["a.safetensors", ("b", 2)], (("a.safetensors", 1.0), ("b", 2.0))),
    ],
)
def test_lora_names(lora, expected):
    assert diffusers_options.parse_lora(lora) == expected


def test_without_a_model_the_builtin_one_is_used_and_said(flux_folder, monkeypatch, caplog):
    monkeypatch.setattr(model_files, "_BUILTIN_ROOT", flux_folder.parent)
    caplog.set_level(logging.INFO)
    assert LocalImageGenServing().fingerprint()["model"] == "builtin:tiny-flux"
    assert "hf_model_name_or_path names a real one" in caplog.text


# Defaults and identity


def test_priority_of_defaults(flux_folder):
    plain = LocalImageGenServing(hf_model_name_or_path=flux_folder).default_params()
    assert plain["guidance_scale"] == 3.5  # the table
    assert plain["num_inference_steps"] == 2  # the model's dataflow.json
    assert (plain["width"], plain["height"]) == (32, 32)
    told = LocalImageGenServing(
        hf_model_name_or_path=flux_folder,
        diffuser_num_inference_steps=3,
        diffuser_guidance_scale=1.0,
        diffuser_image_height=64,
        pipeline_kwargs={"max_sequence_length": 8, "true_cfg_scale": 2.0},
        negative_prompt="blurry",
    ).default_params()
    assert told == {
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "height": 64,
        "width": 32,
        "max_sequence_length": 8,
        "true_cfg_scale": 2.0,
        "negative_prompt": "blurry",
    }
    edit = LocalImageGenServing(hf_model_name_or_path=flux_folder, Image_gen_task="imageedit")
    assert edit.default_params()["guidance_scale"] == 2.5
    assert edit.fingerprint()["pipeline"] == "FluxKontextPipeline"


def test_fingerprint(flux_folder, tmp_path):
    folder = shutil.copytree(flux_folder, tmp_path / "model")
    (tmp_path / "lora.safetensors").write_bytes(b"lora")

    def of(**arguments):
        return LocalImageGenServing(hf_model_name_or_path=folder, **arguments).fingerprint()

    plain = of()
    assert json.loads(json.dumps(plain)) == plain
    assert set(plain) == {"model", "revision", "pipeline", "dtype"}
    speed = {"batch_size": 8, "device": "cpu", "compile": True, "vae_slicing": True, "diffuser_num_inference_steps": 9}
    for same in ({name: value} for name, value in speed.items()):
        assert of(**same) == plain
    others = [
        {"dtype": "bf16"},
        {"variant": "fp16"},
        {"lora": str(tmp_path / "lora.safetensors")},
        {"lora": f"{tmp_path / 'lora.safetensors'}@0.5"},
        {"determinism": "strict"},
        {"scheduler": "EulerDiscreteScheduler"},
        {"quantization": "torchao:int8wo"},
        {"step_cache": "first_block:0.08"},
        {"attention_backend": "sage"},
        {"vae_tiling": True},
    ]
    found = [json.dumps(of(**other), sort_keys=True) for other in others]
    assert len({json.dumps(plain, sort_keys=True), *found}) == len(others) + 1

    serving = LocalImageGenServing(hf_model_name_or_path=folder)
    before = serving.fingerprint()
    weights = next((folder / "transformer").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert serving.fingerprint() == before, "cached: a run is about one model"
    assert of()["revision"] != plain["revision"]


def test_a_hub_model_is_known_by_its_commit_and_sent_with_it(flux_folder, monkeypatch):
    commit = "c" * 40
    files = model_files.ModelFiles(name="org/name", folder=flux_folder, revision=commit, branch="main", hub=True)
    monkeypatch.setattr(model_files, "locate", lambda name, **more: files)
    serving = LocalImageGenServing(hf_model_name_or_path="org/name")
    assert serving.fingerprint()["revision"] == commit
    assert pickle.loads(pickle.dumps(serving))._settings.revision == commit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"diffuser_image_height": 40}, "multiples of 16 pixels, not 32×40"),
        ({"negative_prompt": "blurry"}, "would have no effect on FluxPipeline: it needs true_cfg_scale > 1"),
        ({"diffuser_model_name": "FluxPipelin"}, "has no pipeline 'FluxPipelin', did you mean 'FluxPipeline'"),
        ({"diffuser_model_name": "AutoencoderKL"}, "has no pipeline 'AutoencoderKL'"),
        ({"diffuser_model_name": "FluxFillPipeline"}, "takes a 'mask_image'"),
        ({"diffuser_model_name": "FLUX", "Image_gen_task": "imageedit"}, "makes images from text only"),
    ],
)
def test_arguments_the_model_does_not_take(flux_folder, arguments, message):
    serving = LocalImageGenServing(hf_model_name_or_path=flux_folder, **arguments)
    with pytest.raises(ConfigError) as caught:
        serving.check(request())
    assert message in str(caught.value)


def test_a_height_without_a_width(sd_folder):
    with pytest.raises(ConfigError, match="height and width must be given together"):
        LocalImageGenServing(hf_model_name_or_path=sd_folder, diffuser_image_height=64).default_params()


def test_wrong_pipeline_kwargs_are_found_before_anything_is_loaded(flux_folder):
    serving = LocalImageGenServing(hf_model_name_or_path=flux_folder, pipeline_kwargs={"guidence_scale": 2})
    with pytest.raises(ConfigError, match="takes no parameter 'guidence_scale', did you mean 'guidance_scale'"):
        serving.default_params()


def test_without_diffusers_pipeline_kwargs_are_taken_on_trust(flux_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    serving = LocalImageGenServing(hf_model_name_or_path=flux_folder, pipeline_kwargs={"guidence_scale": 2})
    assert serving.default_params()["guidence_scale"] == 2
    with pytest.raises(ConfigError, match="pip install"):
        serving.setup()


def test_wrong_arguments_of_the_models_own_file_are_found_at_setup(flux_folder, tmp_path):
    folder = shutil.copytree(flux_folder, tmp_path / "model")
    (folder / "dataflow.json").write_text(json.dumps({"text2image": {"guidence_scale": 2}}))
    with pytest.raises(ConfigError, match="takes no parameter 'guidence_scale'"):
        LocalImageGenServing(hf_model_name_or_path=folder).setup()


# Requests that cannot work


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"images": ("a.png",)}, "makes images from text, the row has 1 input image"),
        ({"size": (33, 32)}, "nearest: 32×32 or 48×32"),
        ({"params": {"height": 40, "width": 32}}, "multiples of 16"),
        ({"params": {"num_inference_steps": 0}}, "num_inference_steps must be a whole number from 1"),
        ({"params": {"guidance_scale": float("inf")}}, "guidance_scale must be a finite number"),
        ({"params": {"guidance": 3}}, "takes no parameter 'guidance', did you mean"),
        ({"params": {"image_guidance_scale": 3}}, "takes no parameter 'image_guidance_scale'"),
        ({"params": {"latents": []}}, "set by the serving itself"),
        ({"negative_prompt": "blurry"}, "would have no effect"),
    ],
)
def test_wrong_requests(flux_folder, more, message):
    serving = LocalImageGenServing(hf_model_name_or_path=flux_folder)
    with pytest.raises(BadRequestError) as caught:
        serving.check(request(**more))
    assert message in str(caught.value)


def test_right_requests(flux_folder):
    serving = LocalImageGenServing(hf_model_name_or_path=flux_folder)
    serving.check(request())
    serving.check(request(params=dict(serving.default_params()) | {"num_inference_steps": None}))
    serving.check(request(negative_prompt="blurry", params={"true_cfg_scale": 2.0}, size=(48, 16)))
    edit = LocalImageGenServing(hf_model_name_or_path=flux_folder, Image_gen_task="imageedit")
    edit.check(request(images=("a.png",)))
    edit.check(request(after="0" * 32))
    with pytest.raises(BadRequestError, match="this serving edits images, the row has no input image"):
        edit.check(request())
    with pytest.raises(BadRequestError, match="takes 1 input image, the row has 2"):
        edit.check(request(images=("a.png", "b.png")))


def test_only_what_may_share_a_call_has_equal_keys(flux_folder, picture):
    serving = LocalImageGenServing(hf_model_name_or_path=flux_folder, batch_size=4)
    key = serving.batch_key(request())
    assert hash(key) == hash(serving.batch_key(request(1, prompt="another")))
    assert serving.batch_key(request(2, params=dict(serving.default_params()))) == key
    for more in (
        {"size": (48, 32)},
        {"params": {"num_inference_steps": 3}},
        {"params": {"guidance_scale": 1.0}},
        {"negative_prompt": "x"},
        {"alone": True},
    ):
        assert serving.batch_key(request(1, **more)) != key
    strict = LocalImageGenServing(hf_model_name_or_path=flux_folder, determinism="strict")
    assert strict.batch_key(request(1)) != strict.batch_key(request(2))

    edit = LocalImageGenServing(hf_model_name_or_path=flux_folder, diffuser_model_name="FLUX-Kontext",
                                Image_gen_task="imageedit", pipeline_kwargs={"_auto_resize": True})  # fmt: skip
    square = edit.batch_key(request(1, images=(picture("a.png", (64, 64)),)))
    assert edit.batch_key(request(2, images=(picture("b.png", (128, 128)),))) == square
    assert edit.batch_key(request(3, images=(picture("c.png", (128, 64)),))) != square
    exif = Image.Exif()
    exif[274] = 6
    turned = edit.batch_key(request(4, images=(picture("d.jpg", (64, 128), exif=exif),)))
    assert turned == edit.batch_key(request(5, images=(picture("e.png", (128, 64)),)))
    assert edit.batch_key(request(6, images=("nowhere.png",))) == request(6).request_id


def test_replicas(flux_folder, monkeypatch):
    serving = LocalImageGenServing(hf_model_name_or_path=flux_folder, device=["cpu", "cpu"], batch_size=3)
    copies = serving.replicas()
    assert [copy._settings.devices for copy in copies] == [("cpu",), ("cpu",)]
    assert all(copy.replicas() == [copy] and copy.batch_size == 3 for copy in copies)
    one = LocalImageGenServing(device="cpu")
    assert one.replicas() == [one]
    auto = LocalImageGenServing()
    assert auto.replicas() == [auto]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [copy._settings.devices for copy in auto.replicas()] == [("cuda:0",), ("cuda:1",)]
