"""The autoencoder: an encoder that is a PCA of 8 x 8 patches, set and not trained, and a decoder trained to undo it.

The encoder of diffusers' ``AutoencoderKL`` is made linear on purpose: its residual blocks are zeroed, its three strided
convolutions move pixels into channels and project them. Each component travels twice, with both signs, through the
last normalisation and activation: ``silu(y) - silu(-y) = y``, so the activation cancels, and two large constants in
every group make the normalisation a division by a constant. Latents are then one matrix product, and the transformer
can train while the decoder does: ``python -m training.vae --minutes 30``.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from training.data import shards

COMPONENTS = 32
CHANNELS = (32, 64, 80, 80)
GROUPS = 8
PATCH = 8
WHITENING = 0.8
"""0 keeps the components' variances, 1 makes them equal: between the two, coarse structure weighs a little more."""

_PAIRS = COMPONENTS // GROUPS
_PER_GROUP = CHANNELS[-1] // GROUPS
_LARGE = 300.0


def patches(pictures: torch.Tensor) -> torch.Tensor:
    """(N, 3, 64, 64) as (N, 8, 8, 192): one row per patch, ordered channel, y, x."""
    count, side = len(pictures), pictures.shape[-1] // PATCH
    return (
        pictures.reshape(count, 3, side, PATCH, side, PATCH)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(count, side, side, 3 * PATCH * PATCH)
    )


def fit(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (192,) and projection (192, 32) of pictures in -1..1."""
    rows = patches(pictures).reshape(-1, 3 * PATCH * PATCH).double()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    spread = values.flip(0)[:COMPONENTS].sqrt()
    scale = spread**WHITENING
    scale = scale * (spread / scale).pow(2).mean().sqrt()
    return mean.float(), (vectors.flip(1)[:, :COMPONENTS] / scale).float()


def latents(pictures: torch.Tensor, mean: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """What the encoder makes of (N, 3, 64, 64) in -1..1: (N, 32, 8, 8)."""
    return ((patches(pictures) - mean) @ projection).permute(0, 3, 1, 2)


def pack(latent: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) as FLUX's tokens, (N, H/2 * W/2, 4 C)."""
    count, channels, height, width = latent.shape
    return (
        latent.reshape(count, channels, height // 2, 2, width // 2, 2)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(count, height * width // 4, 4 * channels)
    )


def build(mean: torch.Tensor, projection: torch.Tensor) -> AutoencoderKL:
    """The autoencoder with its encoder set; the decoder is untrained."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=COMPONENTS,
        norm_num_groups=GROUPS,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    encoder = vae.encoder
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
        for module in encoder.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight.fill_(1)
        for channel in range(3):
            encoder.conv_in.weight[channel, channel, 1, 1] = 1
        encoder.conv_in.bias[3] = _LARGE
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                if resnet.conv_shortcut is not None:
                    for channel in range(min(resnet.conv_shortcut.weight.shape[:2])):
                        resnet.conv_shortcut.weight[channel, channel, 0, 0] = 1
        _space_to_depth(encoder.down_blocks[0].downsamplers[0].conv, 3)
        _space_to_depth(encoder.down_blocks[1].downsamplers[0].conv, 12)
        _project(encoder.down_blocks[2].downsamplers[0].conv, encoder.conv_out, mean, projection)
        encoder.conv_out.bias[COMPONENTS:] = -30  # log-variance: the encoder is certain
    return vae


def _space_to_depth(conv: torch.nn.Conv2d, channels: int) -> None:
    """Four pixels become four times the channels; the constant after them stays the last."""
    for a, b, channel in itertools.product(range(2), range(2), range(channels)):
        conv.weight[(a * 2 + b) * channels + channel, channel, a, b] = 1
    conv.weight[4 * channels, channels, 0, 0] = 1


def _project(conv: torch.nn.Conv2d, out: torch.nn.Conv2d, mean: torch.Tensor, projection: torch.Tensor) -> None:
    """The last stride and the PCA in one, each component with both signs, and its way out of the normalisation."""
    for component in range(COMPONENTS):
        group, place = divmod(component, _PAIRS)
        plus = group * _PER_GROUP + 2 + 2 * place
        for bits in itertools.product(range(2), repeat=6):
            a2, b2, a1, b1, a0, b0 = bits
            y, x = a0 + 2 * a1 + 4 * a2, b0 + 2 * b1 + 4 * b2
            for channel in range(3):
                source = (a1 * 2 + b1) * 12 + (a0 * 2 + b0) * 3 + channel
                weight = projection[channel * PATCH * PATCH + y * PATCH + x, component]
                conv.weight[plus, source, a2, b2] = weight
                conv.weight[plus + 1, source, a2, b2] = -weight
        offset = mean @ projection[:, component]
        conv.bias[plus], conv.bias[plus + 1] = -offset, offset
        deviation = _LARGE * (2 / _PER_GROUP) ** 0.5
        out.weight[component, plus, 1, 1], out.weight[component, plus + 1, 1, 1] = deviation, -deviation
    for group in range(GROUPS):
        conv.weight[group * _PER_GROUP, 48, 0, 0] = 1
        conv.weight[group * _PER_GROUP + 1, 48, 0, 0] = -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/tiny-flux"))
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    files = shards(options.work, "t2i")[:4] + shards(options.work, "edit")[:3]
    pictures = torch.cat([torch.load(file)["image"] for file in files])
    pca, state = options.work / "pca.pt", options.work / "decoder.pt"
    if not pca.exists():
        torch.save(fit(pictures[:10_000].float() / 127.5 - 1), pca)
    mean, projection = torch.load(pca)
    decoder = build(mean, projection).decoder.to(memory_format=torch.channels_last)
    if state.exists():
        decoder.load_state_dict(torch.load(state))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    started, limit, step = time.time(), options.minutes * 60, 0
    while (elapsed := time.time() - started) < limit:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * min(1, 2 * (1 - elapsed / limit))
        picture = pictures[torch.randint(0, len(pictures), (24,))].float() / 127.5 - 1
        latent = latents(picture, mean, projection)
        # What the transformer hands over is not exact: the decoder must not mind a little noise.
        latent = latent + torch.randn_like(latent) * 0.06 * torch.rand(len(latent), 1, 1, 1)
        error = decoder(latent.contiguous(memory_format=torch.channels_last)) - picture
        loss = error.abs().mean() + 2 * error.pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"step {step}, {elapsed:.0f} s: {10 * torch.log10(4 / error.pow(2).mean()):.1f} dB", flush=True)
            torch.save(decoder.state_dict(), state)
    torch.save(decoder.state_dict(), state)


if __name__ == "__main__":
    main()
