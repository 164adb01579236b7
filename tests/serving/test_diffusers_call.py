import asyncio
import shutil
from types import SimpleNamespace

import pytest
from PIL import Image

from dataflow.io import ImageIO
from dataflow.serving.capabilities import TABLE
from dataflow.serving.diffusers_batches import Batches
from dataflow.serving.diffusers_call import Job, call_arguments
from dataflow.serving.local_image_gen_serving import LocalImageGenServing
from dataflow.types import GenerationRequest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def request(number=0, prompt="a red circle", **more):
    return GenerationRequest(request_id=f"{number:032x}", prompt=prompt, seed=more.pop("seed", number), **more)


def job(number=0, images=(), negative=None, size=None, params=None):
    return Job(place=number, request=request(number, f"prompt {number}"), params=params or {}, size=size,
               negative=negative, images=images, key=0)  # fmt: skip


A, B = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")


@pytest.mark.parametrize(
    ("name", "jobs", "expected"),
    [
        ("FluxPipeline", [job()], {"prompt": "prompt 0"}),
        ("FluxPipeline", [job(), job(1)], {"prompt": ["prompt 0", "prompt 1"]}),
        ("FluxPipeline", [job(params={"num_inference_steps": 4.0})], {"prompt": "prompt 0", "num_inference_steps": 4}),
        ("FluxPipeline", [job(size=(32, 16))], {"prompt": "prompt 0", "width": 32, "height": 16}),
        ("FluxPipeline", [job(negative="x")], {"prompt": "prompt 0"}),
        (
            "FluxPipeline",
            [job(negative="x", params={"true_cfg_scale": 2}), job(1, negative="y")],
            {"prompt": ["prompt 0", "prompt 1"], "true_cfg_scale": 2, "negative_prompt": ["x", "y"]},
        ),
        (
            "FluxKontextPipeline",
            [job(images=[A], size=(32, 16), params={"max_area": 9}), job(1, images=[B])],
            {"prompt": ["prompt 0", "prompt 1"], "image": [A, B], "width": 32, "height": 16, "max_area": 512},
        ),
        ("FluxKontextPipeline", [job(images=[A])], {"prompt": "prompt 0", "image": A}),
        ("QwenImageEditPlusPipeline", [job(images=[A, B])], {"prompt": "prompt 0", "image": [A, B]}),
        ("Flux2Pipeline", [job(images=[A])], {"prompt": "prompt 0", "image": [A]}),
        ("JoyImageEditPlusPipeline", [job(images=[A, B])], {"prompt": "prompt 0", "images": [A, B]}),
        (
            "OmniGenPipeline",
            [job(images=[A, B])],
            {"prompt": "<img><|image_1|></img> <img><|image_2|></img> prompt 0", "input_images": [A, B]},
        ),
        ("LongCatImageEditPipeline", [job(images=[A])], {"prompt": "prompt 0", "image": A}),
        (
            "QwenImagePipeline",
            [job(negative=" ", params={"true_cfg_scale": 4.0})],
            {"prompt": "prompt 0", "true_cfg_scale": 4.0, "negative_prompt": " "},
        ),
    ],
)
def test_call_arguments(name, jobs, expected):
    assert call_arguments(TABLE[name], jobs) == expected


def test_several_references_reach_the_pipeline_together(flux_folder, tmp_path, monkeypatch, picture, fake_runner):
    folder = shutil.copytree(flux_folder, tmp_path / "model")
    serving = LocalImageGenServing(
        hf_model_name_or_path=folder, diffuser_model_name="QwenImageEditPlusPipeline", Image_gen_task="imageedit",
        pipeline_kwargs={"height": 32, "width": 32, "max_sequence_length": 16},
    )  # fmt: skip
    calls = []
    output = SimpleNamespace(images=torch.full((1, 3, 8, 8), 0.5))
    runner = fake_runner(lambda **arguments: calls.append(arguments) or output)
    batches = Batches(
        runner, serving._facts(), serving._settings, most=4, reader=ImageIO(tmp_path), check=serving.check
    )
    requests = [request(n, images=(picture("a.png"), picture("b.png", (20, 10)))) for n in range(2)]
    results = asyncio.run(batches.generate(requests))
    assert all(result.error is None for result in results)
    assert [[image.size for image in call["image"]] for call in calls] == [[(32, 32), (20, 10)]] * 2
    assert [call["generator"].initial_seed() for call in calls] == [0, 1]
    batches.close()
    assert "num_images_per_prompt" not in calls[0]
    assert calls[0]["negative_prompt"] == " "
