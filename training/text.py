"""The two text encoders, taught to read before anything is drawn: ``python -m training.text``.

FLUX's own text stream has no positions: who stands where reaches the image only through what the encoders say. So both
learn first to read the scene out of the sentence: linear heads on CLIP's pooled vector and on every T5 token predict
operation, colours, shapes, places, relation and background. The heads are thrown away.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from training.data import LABEL_SIZES, shards

T5_LENGTH = 24
"""The ``max_sequence_length`` of the pipeline: T5 gets no mask, so it must be called with this very length."""
CLIP_LENGTH = 28
WIDTH = 128


class Heads(torch.nn.Module):
    """What a sentence says, read from a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleList([torch.nn.Linear(width, size + 1) for size in LABEL_SIZES])

    def loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum of cross-entropies; ``features`` (..., width), ``labels`` (..., 9)."""
        losses = [
            cross_entropy(head(features).flatten(0, -2), labels[..., column].flatten())
            for column, head in enumerate(self.heads)
        ]
        return torch.stack(losses).sum()


def clip_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """Byte-level BPE in which every word of the domain is one token."""
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        min_frequency=1,
        show_progress=False,
    )
    bpe.train_from_iterator(list(words) * 50, trainer)
    trained = json.loads(bpe.to_str())["model"]
    vocabulary = trained["vocab"]
    for letter in alphabet:
        vocabulary.setdefault(letter + "</w>", len(vocabulary))
    merges = [tuple(merge) for merge in trained["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def t5_tokenizer(words: Sequence[str]) -> tuple[T5Tokenizer, list[tuple[int, int]]]:
    """A unigram list of whole words, single letters for the rest.

    A normaliser would be lost when the tokenizer is loaded again, so capitalised words are pieces of their own; the
    second value pairs each with its lower-case piece, whose embedding it gets in the end.
    """
    pieces: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [(f"▁{word}", -1.0) for word in sorted(words)]
    known = {piece for piece, _ in pieces}
    lower_of: dict[str, str] = {}
    for word in sorted(words):
        for other in (word.capitalize(), word.upper()):
            if f"▁{other}" not in known:
                known.add(f"▁{other}")
                pieces.append((f"▁{other}", -1.0))
                lower_of[f"▁{other}"] = f"▁{word}"
    pieces += [(mark, -3.0) for mark in ",.!?'-:"]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789▁"]
    number = {piece: index for index, (piece, _) in enumerate(pieces)}
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=T5_LENGTH)
    return tokenizer, [(number[upper], number[lower]) for upper, lower in lower_of.items()]


def token_ids(clip: CLIPTokenizer, t5: T5Tokenizer, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids for both encoders, padded as the pipeline pads them."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return (
        clip(list(texts), max_length=CLIP_LENGTH, **options)["input_ids"],
        t5(list(texts), max_length=T5_LENGTH, **options)["input_ids"],
    )


def build(clip: CLIPTokenizer, t5: T5Tokenizer) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Both encoders, untrained."""
    clip_model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CLIP_LENGTH,
            eos_token_id=clip.eos_token_id,
            bos_token_id=clip.bos_token_id,
            pad_token_id=clip.pad_token_id,
            projection_dim=WIDTH,
        )
    )
    for parameter in clip_model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    t5_model = T5EncoderModel(
        T5Config(
            vocab_size=len(t5),
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    return clip_model, t5_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/tiny-flux"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    loaded = [torch.load(file) for kind in ("t2i", "edit") for file in shards(options.work, kind)[:6]]
    texts = [text for shard in loaded for text in shard["text"]]
    labels = torch.cat([shard["labels"] for shard in loaded]).long()
    words = sorted({word for text in texts for word in text.split()})
    clip, (t5, twins) = clip_tokenizer(words), t5_tokenizer(words)
    clip_model, t5_model = build(clip, t5)
    clip_heads, t5_heads = Heads(WIDTH), Heads(WIDTH)
    clip_ids, t5_ids = token_ids(clip, t5, texts)
    parameters = [p for module in (clip_model, t5_model, clip_heads, t5_heads) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98))
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * min(1, 3 * (1 - step / options.steps))
        rows = torch.randint(0, len(texts), (96,))
        pooled = clip_model(input_ids=clip_ids[rows]).pooler_output
        tokens = t5_model(input_ids=t5_ids[rows]).last_hidden_state
        of_clip = clip_heads.loss(pooled, labels[rows])
        of_t5 = t5_heads.loss(tokens, labels[rows][:, None].expand(-1, T5_LENGTH, -1))
        # The transformer expects embeddings of about unit size.
        size = (pooled.pow(2).mean() - 1) ** 2 + (tokens.pow(2).mean() - 1) ** 2
        optimizer.zero_grad()
        (of_clip + of_t5 + 0.01 * size).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: CLIP {of_clip:.3f}, T5 {of_t5:.3f}", flush=True)
    with torch.no_grad():
        table = t5_model.get_input_embeddings().weight
        for upper, lower in twins:
            table[upper] = table[lower]
    for part, name in (
        (clip, "tokenizer"),
        (t5, "tokenizer_2"),
        (clip_model, "text_encoder"),
        (t5_model, "text_encoder_2"),
    ):
        part.save_pretrained(options.work / "pipeline" / name)


if __name__ == "__main__":
    main()
