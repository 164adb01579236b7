"""A tiny Qwen2-VL with random weights, or with a script that it answers by: real classes, real files, no hub."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

END, PAD = "<|im_end|>", "<|endoftext|>"
SPECIAL = [PAD, "<|im_start|>", END, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}\
{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def tokenizer(words):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    core.add_tokens(list(words))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=PAD, additional_special_tokens=SPECIAL
    )


def save(folder, script=None, *, words=("Yes", "No"), template=TEMPLATE, sampling=False, ends=True):
    """Write a model.

    Args:
        folder: where.
        script: token → {next token: logit}; what begins an answer is behind a newline. With one, the next token depends
            on the last one alone; without, on everything.
        words: tokens besides single bytes.
        template: of the chat, or None.
        sampling: with settings that its authors wish for, as Qwen2-VL has them.
        ends: with what ends an answer; without, only the tokenizer knows.
    """
    words = dict.fromkeys([*words, *(word for row in (script or {}).values() for word in row)])
    reader = tokenizer([word for word in words if word not in SPECIAL])
    ids = {name: reader.convert_tokens_to_ids(name) for name in SPECIAL}
    hidden = 8 * -(-len(reader) // 8) if script else 32
    heads = 2
    half = hidden // heads // 2
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": len(reader),
            "hidden_size": hidden,
            "intermediate_size": 64,
            "num_hidden_layers": 1 if script else 2,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-12,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
            },
            "bos_token_id": None,
            "eos_token_id": ids[END],
            "pad_token_id": ids[PAD],
        },
        vision_config={
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": hidden,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config)
    if script:
        _follow(model, reader, script, hidden)
    else:
        with torch.no_grad():  # random weights of the usual size make every token as probable as any other
            model.lm_head.weight.mul_(40)
    model.generation_config = transformers.GenerationConfig(
        **({"eos_token_id": [ids[END], ids[PAD]], "pad_token_id": ids[PAD]} if ends else {}),
        **({"do_sample": True, "temperature": 1.7, "top_k": 3, "repetition_penalty": 1.9} if sampling else {}),
    )
    model.save_pretrained(folder)
    reader.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112).save_pretrained(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def _follow(model, reader, script, hidden):
    """The hidden state is the last token's own axis, of length sqrt(hidden); the head is a table."""
    number = len(reader)
    with torch.no_grad():
        language = model.model.language_model
        language.embed_tokens.weight.copy_(torch.eye(number, hidden))
        for layer in language.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        table = torch.full((number, hidden), -30.0)
        for last, following in script.items():
            for word, logit in following.items():
                [token], [before] = reader.encode(word), reader.encode(last)
                table[token, before] = logit
        model.lm_head.weight.copy_(table / hidden**0.5)
