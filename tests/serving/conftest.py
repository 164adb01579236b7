"""Tiny untrained pipelines, built once per run: the real classes and file formats, a few thousand weights."""

import json
import logging
from types import SimpleNamespace

import pytest
from PIL import Image

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

WORDS = ["a", "red", "blue", "green", "circle", "square", "on", "white", "make", "it", "the", "日", "本", "é"]


def clip_tokenizer(folder):
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(97, 123)]
    vocabulary = {token: number for number, token in enumerate([*letters, *(f"{x}</w>" for x in letters)])}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        vocab=vocabulary, merges=[], model_max_length=77, unk_token="<|endoftext|>", pad_token="<|endoftext|>"
    ), len(vocabulary)


def t5_tokenizer():
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS] + [(chr(code), -6.0) for code in range(97, 123)]
    return T5Tokenizer(vocab=pieces, extra_ids=0), len(pieces)


def clip_text(size, **more):
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=77, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1, **more,
        )
    ).eval()  # fmt: skip


def tiny_vae(channels, **more):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 8), in_channels=3, out_channels=3, latent_channels=channels, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=32, **more,
    ).eval()  # fmt: skip


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory):
    """A FLUX pipeline (VAE factor 2) that its dataflow.json lets edit as well; draws 32×32 in two steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer, clip_size = clip_tokenizer(root / "clip")
    tokenizer_2, t5_size = t5_tokenizer()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=1.0),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        text_encoder=clip_text(clip_size, projection_dim=16),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=t5_size, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
        ).eval(),
        vae=tiny_vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0),
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
        ).eval(),
    )  # fmt: skip
    folder = root / "tiny-flux"
    pipe.save_pretrained(folder)
    common = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16}
    edit = {**common, "pipeline_class": "FluxKontextPipeline", "max_area": 1024, "_auto_resize": False}
    (folder / "dataflow.json").write_text(json.dumps({"text2image": common, "imageedit": edit}))
    return folder


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """A Stable Diffusion pipeline with a safety checker that can be told what to flag."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer, size = clip_tokenizer(root / "clip")
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(4),
        text_encoder=clip_text(size),
        tokenizer=tokenizer,
        unet=_unet(4),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    assert isinstance(pipe.unet, UNet2DConditionModel)
    pipe.save_pretrained(root / "tiny-sd")
    return root / "tiny-sd"


@pytest.fixture(scope="session")
def pix2pix_folder(tmp_path_factory):
    """An InstructPix2Pix pipeline: the output has the input's size."""
    from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer, size = clip_tokenizer(root / "clip")
    pipe = StableDiffusionInstructPix2PixPipeline(
        vae=tiny_vae(4),
        text_encoder=clip_text(size),
        tokenizer=tokenizer,
        unet=_unet(8),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(root / "tiny-pix2pix")
    return root / "tiny-pix2pix"


def _unet(channels):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, sample_size=16, in_channels=channels, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, norm_num_groups=2, attention_head_dim=4,
    ).eval()  # fmt: skip


@pytest.fixture
def loaded():
    """Sets servings up, and cleans them up at the end."""
    from dataflow.serving.local_image_gen_serving import LocalImageGenServing

    servings = []

    def load(folder, **arguments):
        servings.append(LocalImageGenServing(hf_model_name_or_path=folder, **arguments))
        servings[-1].setup()
        return servings[-1]

    yield load
    for serving in servings:
        serving.cleanup()


@pytest.fixture
def picture(tmp_path):
    def make(name="in.png", size=(32, 32), colour="red", mode="RGB", **save):
        Image.new(mode, size, colour).save(tmp_path / name, **save)
        return str(tmp_path / name)

    return make


@pytest.fixture
def fake_runner():
    """Makes a runner around anything callable that plays the pipeline."""
    from dataflow.serving.capabilities import Capabilities
    from dataflow.serving.diffusers_options import Options
    from dataflow.serving.diffusers_runner import Runner

    def make(pipe, floats=True, **options):
        runner = object.__new__(Runner)
        runner._torch, runner.device, runner.pipe, runner._facts = torch, "cpu", pipe, {}
        runner._once, runner._restore = logging.Filter(), None
        runner._attention, runner._free_at, runner._warm, runner.warm_up_seconds = [], 0.0, set(), 0.0
        runner._recipe = SimpleNamespace(
            pipeline="FakePipeline",
            capabilities=Capabilities(name="FakePipeline", floats=floats),
            device="cpu",
            folder="model",
            options=Options(**options),
        )
        return runner

    return make
