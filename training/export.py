"""Put the parts together as a pipeline folder in half precision: ``python -m training.export``.

With ``--init FOLDER`` everything but the transformer is taken from an exported pipeline.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from training.text import T5_LENGTH
from training.vae import build

STEPS = 12


def export(work: Path, folder: Path, init: Path | None = None) -> None:
    """Write ``folder`` from the trained parts in ``work``; with ``init``, of its parts and the trained transformer."""
    transformer = FluxTransformer2DModel.from_pretrained(work / "pipeline" / "transformer")
    if init is not None:
        pipeline = FluxPipeline.from_pretrained(str(init), transformer=transformer)
    else:
        pipeline = _assembled(work, transformer)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder)
    for file in (folder / "model_index.json", *folder.glob("*/config.json")):
        # Where the parts lay when they were put together is nobody's business.
        facts = {name: value for name, value in json.loads(file.read_text()).items() if name != "_name_or_path"}
        file.write_text(json.dumps(facts, indent=2) + "\n")
    call = {"height": 64, "width": 64, "num_inference_steps": STEPS, "max_sequence_length": T5_LENGTH}
    defaults = {
        "text2image": call,
        "imageedit": {
            "pipeline_class": "FluxKontextPipeline",
            **call,
            "max_area": 64 * 64,
            "_auto_resize": False,
        },
    }
    (folder / "dataflow.json").write_text(json.dumps(defaults, indent=2) + "\n")


def _assembled(work: Path, transformer: FluxTransformer2DModel) -> FluxPipeline:
    parts = work / "pipeline"
    vae = build(*torch.load(work / "pca.pt"))
    vae.decoder.load_state_dict(torch.load(work / "decoder.pt"))
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(parts / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(parts / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(parts / "text_encoder_2"),
        tokenizer_2=T5Tokenizer.from_pretrained(parts / "tokenizer_2"),
        transformer=transformer,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/tiny-flux"))
    parser.add_argument("--folder", type=Path, default=Path("src/dataflow/builtin/tiny-flux"))
    parser.add_argument("--init", type=Path, help="an exported pipeline whose other parts are used")
    options = parser.parse_args()
    export(options.work, options.folder, options.init)


if __name__ == "__main__":
    main()
