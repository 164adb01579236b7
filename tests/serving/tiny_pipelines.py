"""Untrained pipelines of families that encode prompts each in their own way, a few thousand weights each."""

import torch
import transformers
from tests.serving.conftest import WORDS, clip_text, clip_tokenizer, tiny_vae
from tokenizers import Tokenizer, models, pre_tokenizers


def word_tokenizer(special=("<pad>", "<eos>", "<bos>"), **more):
    """Words, and single letters for all others."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*special, "<unk>", *WORDS, *letters]))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=special[0], eos_token=special[1], unk_token="<unk>", **more
    )


def sdxl(root):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer, size = clip_tokenizer(root / "clip")
    second = transformers.CLIPTextConfig(
        vocab_size=size, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
        projection_dim=16,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=tiny_vae(4),
        text_encoder=clip_text(size),
        text_encoder_2=transformers.CLIPTextModelWithProjection(second).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32, norm_num_groups=2, attention_head_dim=(2, 4), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 1),
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ).eval(),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )  # fmt: skip


def sd3(root):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer, size = clip_tokenizer(root / "clip")
    config = transformers.CLIPTextConfig(
        vocab_size=size, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
        projection_dim=16,
    )  # fmt: skip
    words = word_tokenizer(model_max_length=512)
    t5 = transformers.T5Config(
        vocab_size=len(words), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
            caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=32, out_channels=4,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0),
        text_encoder=transformers.CLIPTextModelWithProjection(config).eval(),
        tokenizer=tokenizer,
        text_encoder_2=transformers.CLIPTextModelWithProjection(config).eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=transformers.T5EncoderModel(t5).eval(),
        tokenizer_3=words,
    )  # fmt: skip


def sana(_):
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    words = word_tokenizer(bos_token="<bos>", model_max_length=512)
    gemma = transformers.Gemma2Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8,
    )  # fmt: skip
    return SanaPipeline(
        tokenizer=words,
        text_encoder=transformers.Gemma2Model(gemma).eval(),
        vae=AutoencoderDC(
            latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], downsample_block_type="conv",
            upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
            scaling_factor=0.41407,
        ).eval(),
        transformer=SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
            num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=16,
            sample_size=32,
        ).eval(),
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, beta_schedule="linear"
        ),
    )  # fmt: skip


def qwen(_):
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    words = word_tokenizer(special=("<|endoftext|>", "<|im_end|>", "<|im_start|>"), model_max_length=1024)
    text = {
        "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ).eval(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=words,
        transformer=QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        ).eval(),
    )  # fmt: skip


FAMILIES = {"sdxl": sdxl, "sd3": sd3, "sana": sana, "qwen": qwen}


def save(family, root):
    """A folder with an untrained pipeline of the family."""
    torch.manual_seed(0)
    folder = root / f"tiny-{family}"
    FAMILIES[family](root).save_pretrained(folder)
    return folder
