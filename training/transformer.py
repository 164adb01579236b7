"""The transformer: flow matching on packed latents, text to image and edits at once.

``python -m training.transformer --minutes 40 [--init FOLDER]`` trains on CPU or GPU and can go on from an exported
pipeline (``--init src/dataflow/builtin/tiny-flux``).

What makes it learn the caption in minutes rather than days: besides the velocity, small heads predict from a middle
layer what each image token will show (colour per 4 x 4 square, shape, background). At high noise that can only come
from the caption, and a cross-entropy says so much louder than a squared error does. The heads are thrown away.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch.nn.functional import cross_entropy
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from training.data import GROUND_CLASSES, SHAPE_CLASSES, SUB_CLASSES, shards
from training.text import T5_LENGTH, WIDTH, token_ids
from training.vae import COMPONENTS, latents, pack

HEADS = 6
HEAD_WIDTH = 32
DOUBLE_BLOCKS = 2
SINGLE_BLOCKS = 6
SIDE = 4
TOKENS = SIDE * SIDE
AUXILIARY_AT = 2
"""Before which single block the auxiliary heads look."""

Sample = dict[str, torch.Tensor]


class Muon:
    """Momentum with orthogonalised updates, for the matrices of the blocks; equal shapes are worked on together.

    Source: Jordan et al. 2024, scaled to the size of Adam's updates as in Liu et al. 2025 (arXiv 2502.16982).
    """

    def __init__(self, parameters: list[torch.nn.Parameter], momentum: float = 0.95, decay: float = 0.01) -> None:
        self.groups: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            self.groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self.buffers = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.groups.items()
        }
        self.momentum, self.decay = momentum, decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, group in self.groups.items():
            gradient = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])
            buffer = self.buffers[shape].lerp_(gradient, 1 - self.momentum)
            update = torch.lerp(gradient, buffer, self.momentum).bfloat16()
            tall = shape[0] > shape[1]
            update = update.mT.contiguous() if tall else update
            update = update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                gram = update @ update.mT
                update = 3.4445 * update + (2.0315 * gram @ gram - 4.7750 * gram) @ update
            update = (update.mT if tall else update).float() * (0.2 * max(shape) ** 0.5)
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - rate * self.decay).add_(change, alpha=-rate)


class Pool:
    """Shards in memory; a further one is taken in now and then."""

    def __init__(self, work: Path, kind: str, clip: CLIPTokenizer, t5: T5Tokenizer) -> None:
        self.work, self.kind, self.clip, self.t5 = work, kind, clip, t5
        self.files: list[Path] = []
        self.loaded: list[Sample] = []
        for _ in range(4):
            self.grow()

    def grow(self) -> None:
        new = next((file for file in shards(self.work, self.kind) if file not in self.files), None)
        if new is None:
            return
        shard = torch.load(new)
        shard["clip"], shard["t5"] = token_ids(self.clip, self.t5, shard.pop("text"))
        del shard["labels"]
        self.files.append(new)
        self.loaded.append(shard)

    def batch(self, size: int, device: torch.device) -> Sample:
        shard = random.choice(self.loaded)
        rows = torch.randint(0, len(shard["image"]), (size,))
        return {name: values[rows].to(device) for name, values in shard.items()}


class Model(torch.nn.Module):
    """The transformer with its auxiliary heads."""

    def __init__(self, init: Path | None) -> None:
        super().__init__()
        if init is not None:
            self.flux = FluxTransformer2DModel.from_pretrained(init, subfolder="transformer", dtype=torch.float32)
        else:
            self.flux = FluxTransformer2DModel(
                patch_size=1,
                in_channels=4 * COMPONENTS,
                num_layers=DOUBLE_BLOCKS,
                num_single_layers=SINGLE_BLOCKS,
                attention_head_dim=HEAD_WIDTH,
                num_attention_heads=HEADS,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                guidance_embeds=False,
                axes_dims_rope=(8, 12, 12),
            )
            self._start_at_zero()
        self.auxiliary = torch.nn.Linear(HEADS * HEAD_WIDTH, 16 * SUB_CLASSES + SHAPE_CLASSES + GROUND_CLASSES)

    @torch.no_grad()
    def _start_at_zero(self) -> None:
        """Every block begins as the identity (adaLN-zero), and the velocity as zero."""
        for name, parameter in self.flux.named_parameters():
            if (".norm" in name and ".linear." in name) or "norm_out.linear" in name or name.startswith("proj_out"):
                parameter.zero_()

    def forward(
        self, image: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor, time: torch.Tensor, rotary: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocity (N, 16, 4 C) and auxiliary logits (N, 16, classes); ``image`` may hold reference tokens too."""
        flux = self.flux
        hidden, context = flux.x_embedder(image), flux.context_embedder(tokens)
        modulation = flux.time_text_embed(time * 1000, pooled)
        for block in flux.transformer_blocks:
            context, hidden = block(
                hidden_states=hidden, encoder_hidden_states=context, temb=modulation, image_rotary_emb=rotary
            )
        auxiliary = None
        for number, block in enumerate(flux.single_transformer_blocks):
            if number == AUXILIARY_AT:
                auxiliary = self.auxiliary(hidden[:, :TOKENS])
            context, hidden = block(
                hidden_states=hidden, encoder_hidden_states=context, temb=modulation, image_rotary_emb=rotary
            )
        assert auxiliary is not None
        return flux.proj_out(flux.norm_out(hidden, modulation))[:, :TOKENS], auxiliary

    def rotary(self, *, edit: bool) -> Any:
        """Rotary embeddings of text, image and, for edits, reference tokens, as the pipelines lay them out."""
        text = torch.zeros(T5_LENGTH, 3)
        grids = []
        for stream in range(2 if edit else 1):
            grid = torch.zeros(SIDE, SIDE, 3)
            grid[..., 0] = stream
            grid[..., 1] = torch.arange(SIDE)[:, None]
            grid[..., 2] = torch.arange(SIDE)[None, :]
            grids.append(grid.reshape(TOKENS, 3))
        device = self.flux.proj_out.weight.device
        return self.flux.pos_embed(torch.cat([text, *grids]).to(device))


class Trainer:
    """Everything one run needs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        work, pipeline = options.work, options.init or options.work / "pipeline"
        clip = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
        t5 = T5Tokenizer.from_pretrained(pipeline / "tokenizer_2")
        self.clip = CLIPTextModel.from_pretrained(pipeline / "text_encoder", dtype=torch.float32)
        self.t5 = T5EncoderModel.from_pretrained(pipeline / "text_encoder_2", dtype=torch.float32)
        for encoder in (self.clip, self.t5):
            encoder.eval().requires_grad_(False).to(self.device)
        self.mean, self.projection = (value.to(self.device) for value in torch.load(work / "pca.pt"))
        self.model = Model(options.init).to(self.device)
        self.rotary = {edit: self.model.rotary(edit=edit) for edit in (False, True)}
        if self.device.type == "cpu":
            # For sequences this short the backward pass of CPU flash attention takes half of a step.
            self.model.flux.set_attention_backend("_native_math")
        if options.compile:
            self.model.flux.compile_repeated_blocks(dynamic=False)
        matrices, rest = [], []
        for name, parameter in self.model.named_parameters():
            inner = parameter.ndim == 2 and "blocks" in name and ".norm" not in name
            (matrices if inner else rest).append(parameter)
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
        self.pools = {False: Pool(work, "t2i", clip, t5), True: Pool(work, "edit", clip, t5)}

    def loss(self, edit: bool, *, auxiliary: float) -> tuple[torch.Tensor, dict[str, float]]:
        batch = self.pools[edit].batch(self.options.batch, self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            with torch.no_grad():
                tokens = self.t5(input_ids=batch["t5"]).last_hidden_state
                pooled = self.clip(input_ids=batch["clip"]).pooler_output
            clean = self._latents(batch["image"])
            # Shifted towards noise, where the caption decides.
            time_ = torch.sigmoid(torch.randn(len(clean), device=self.device) + 0.4)
            noise = torch.randn_like(clean)
            noisy = torch.lerp(clean, noise, time_[:, None, None])
            image = torch.cat([noisy, self._latents(batch["before"])], 1) if edit else noisy
            velocity, logits = self.model(image, tokens.float(), pooled.float(), time_, self.rotary[edit])
        error = (velocity.float() - (noise - clean)).pow(2).mean()
        sub, shape, ground = logits.float().split([16 * SUB_CLASSES, SHAPE_CLASSES, GROUND_CLASSES], -1)
        read = {
            "colour": cross_entropy(sub.reshape(-1, SUB_CLASSES), batch["sub"].long().reshape(-1)),
            "shape": cross_entropy(shape.reshape(-1, SHAPE_CLASSES), batch["shape"].long().reshape(-1)),
            "ground": cross_entropy(
                ground.reshape(-1, GROUND_CLASSES), batch["ground"].long()[:, None].expand(-1, TOKENS).reshape(-1)
            ),
        }
        total = error + auxiliary * (read["colour"] + read["shape"] + 0.5 * read["ground"])
        return total, {"velocity": error.item(), **{name: value.item() for name, value in read.items()}}

    def run(self) -> None:
        started, limit, step, seen = time.time(), self.options.minutes * 60, 0, 0
        shown: dict[str, float] = {}
        grown = saved = started
        while (elapsed := time.time() - started) < limit:
            share = elapsed / limit
            rate = self.options.rate * min(1, (step + 1) / 150) * (1 - share)
            edit = random.random() < (0.2 if share < 0.12 and self.options.init is None else 0.5)
            total, parts = self.loss(edit, auxiliary=0.15 if share < 0.6 else 0.05)
            self.model.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.muon.step(rate)
            self.adam.param_groups[0]["lr"] = rate
            self.adam.step()
            step, seen = step + 1, seen + self.options.batch
            for name, value in parts.items():
                name = f"{'edit' if edit else 'text'} {name}"
                shown[name] = 0.97 * shown.get(name, value) + 0.03 * value
            if step % 50 == 0:
                figures = ", ".join(f"{name} {value:.3f}" for name, value in sorted(shown.items()))
                print(f"{step} steps, {seen} images, {seen / elapsed:.0f}/s: {figures}", flush=True)
            now = time.time()
            if now - grown > 75:
                self.pools[bool(step % 2)].grow()
                grown = now
            if now - saved > 300:
                self.save()
                saved = now
        self.save()

    def save(self) -> None:
        self.model.flux.save_pretrained(self.options.work / "pipeline" / "transformer")

    def _latents(self, pictures: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return pack(latents(pictures.float() / 127.5 - 1, self.mean, self.projection))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/tiny-flux"))
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--init", type=Path, help="an exported pipeline to go on from")
    parser.add_argument("--compile", action="store_true", help="worth its minutes on a GPU")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    Trainer(options).run()


if __name__ == "__main__":
    main()
