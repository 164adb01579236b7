"""FLUX.1-dev and FLUX.1-Kontext-dev by their shapes, with random weights, as folders that diffusers reads."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataflow.serving.speed import PROMPTS

CLASSES = {"text2image": "FluxPipeline", "imageedit": "FluxKontextPipeline"}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The shapes of a pipeline, and what is drawn with it.

    Attributes:
        transformer: the denoiser.
        vae: its decoder and encoder.
        clip: the first text encoder.
        t5: the second one.
        side: of pictures, in pixels.
        steps: inference steps.
        images: pictures of every measurement.
        call: further arguments of a call.
        edit: those of an edit.
        clip_words: tokens that the first text encoder knows; 0 for those that the tokenizer made here has.
        t5_words: those of the second one, likewise.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    clip: Mapping[str, Any]
    t5: Mapping[str, Any]
    side: int
    steps: int
    images: int
    call: Mapping[str, Any] = field(default_factory=dict)
    edit: Mapping[str, Any] = field(default_factory=dict)
    clip_words: int = 0
    t5_words: int = 0


PRESETS = {
    "full": Preset(
        transformer={
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
        },
        vae={
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "latent_channels": 16,
            "sample_size": 1024,
        },
        clip={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
            "hidden_act": "quick_gelu",
        },
        t5={
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
            "is_gated_act": True,
        },
        side=1024,
        steps=28,
        images=8,
        call={"guidance_scale": 3.5, "max_sequence_length": 512},
        clip_words=49408,
        t5_words=32128,
    ),
    "tiny": Preset(
        transformer={
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 4, 8),
        },
        vae={
            "block_out_channels": (4, 8),
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 2,
            "sample_size": 32,
        },
        clip={
            "hidden_size": 16,
            "intermediate_size": 20,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "projection_dim": 16,
        },
        t5={"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
        side=64,
        steps=4,
        images=6,
        call={"guidance_scale": 3.5, "max_sequence_length": 32},
        edit={"max_area": 64 * 64, "_auto_resize": False},
    ),
}


def build(preset: Preset, folder: Path, device: str) -> dict[str, Path]:
    """Write the pipelines, unless they are there.

    The second has the first one's weights by links: both are of the same shapes.

    Args:
        preset: of what shapes.
        folder: gets a folder for each task; 34 GB for the full ones.
        device: on which the weights are made, in bf16 where it is a GPU.

    Returns:
        The folder of each task.
    """
    first, second = (folder / task for task in CLASSES)
    if not (first / "model_index.json").exists():
        _write(preset, first, device)
    if not (second / "model_index.json").exists():
        second.mkdir(parents=True, exist_ok=True)
        for part in first.iterdir():
            if part.is_dir() and not (second / part.name).exists():
                (second / part.name).symlink_to(part.resolve(), target_is_directory=True)
        index = json.loads((first / "model_index.json").read_text())
        (second / "model_index.json").write_text(json.dumps({**index, "_class_name": CLASSES["imageedit"]}))
    return {"text2image": first, "imageedit": second}


def parts(preset: Preset, *, clip_words: int, t5_words: int) -> dict[str, Callable[[], Any]]:
    """What makes each of the models, by its name in the pipeline.

    Args:
        preset: of what shapes.
        clip_words: tokens that the first text encoder knows; the last two begin and end a text.
        t5_words: tokens that the second one knows.
    """
    import diffusers
    import transformers

    blocks = len(preset.vae["block_out_channels"])
    vae = {
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        **preset.vae,
    }
    clip = {
        "vocab_size": clip_words,
        "max_position_embeddings": 77,
        "bos_token_id": clip_words - 2,
        "eos_token_id": clip_words - 1,
        "pad_token_id": clip_words - 1,
        **preset.clip,
    }
    t5 = {"vocab_size": t5_words, "dropout_rate": 0.0, **preset.t5}
    return {
        "transformer": lambda: diffusers.FluxTransformer2DModel(**preset.transformer),
        "vae": lambda: diffusers.AutoencoderKL(**vae),
        "text_encoder": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip)),
        "text_encoder_2": lambda: transformers.T5EncoderModel(transformers.T5Config(**t5)),
    }


def _write(preset: Preset, folder: Path, device: str) -> None:
    import diffusers
    import torch

    torch.manual_seed(0)
    clip_tokens, t5_tokens = _tokenizers(folder)
    known = {"clip_words": preset.clip_words or len(clip_tokens), "t5_words": preset.t5_words or len(t5_tokens)}
    # One after the other, so that only one of them takes memory.
    for name, make in parts(preset, **known).items():
        with _made_on(device):
            model = make()
        model.save_pretrained(folder / name, max_shard_size="5GB")
        del model
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.save_pretrained(folder / "scheduler")
    clip_tokens.save_pretrained(folder / "tokenizer")
    t5_tokens.save_pretrained(folder / "tokenizer_2")
    index = {
        "_class_name": CLASSES["text2image"],
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", type(clip_tokens).__name__],
        "tokenizer_2": ["transformers", type(t5_tokens).__name__],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))  # last: a folder without it is not finished


@contextmanager
def _made_on(device: str) -> Iterator[None]:
    """Weights are made where they are needed, and in what they are needed: in fp32 they would not fit."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.startswith("cuda") else torch.float32)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _tokenizers(folder: Path) -> tuple[Any, Any]:
    """They know the words that are drawn; a prompt is filled up to one number of tokens, whatever its words are."""
    from transformers import CLIPTokenizer, T5Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for prompt in PROMPTS for word in re.findall("[a-z]+", prompt.lower())} | {"number"})
    letters = [*string.ascii_lowercase, *string.digits, ","]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(1, len(word)):
            rest = word[end] + ("</w>" if end == len(word) - 1 else "")
            merges.append((word[:end], rest))
            tokens.append(word[:end] + rest)
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    clip = CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=list(dict.fromkeys(merges)),
        model_max_length=77,
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0), *((f"▁{word}", -3.0) for word in words)]
    return clip, T5Tokenizer(vocab=[*pieces, *((letter, -6.0) for letter in letters)], extra_ids=0)
