"""How much of a GPU becomes pictures? ``python -m benchmarks.gpu --preset full --results gpu.json``.

Each stage is measured in the order given and kept in the file of results at once, so that stages can be run in several
commands; one that is there is not measured again. Without ``--stages`` all are run, in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.gpu.loops import OURS, Work, ours, plain, reference
from benchmarks.gpu.models import CLASSES, PRESETS, build
from benchmarks.measure import Result

LOOPS = {"plain": plain, "reference": reference}
NAMES = {
    "plain": "plain diffusers loop, nothing saved",
    "reference": "one call per batch, fp16, saving in line",
    "defaults": "this project, as it comes",
    "compiled": "this project, compiled, attention by hardware",
    "fp8": "this project, compiled, fp8",
}
MODELS = {"text2image": "FLUX.1-dev", "imageedit": "FLUX.1-Kontext-dev"}


def main(arguments: list[str] | None = None) -> None:
    args = _arguments(arguments)
    device = args.device or _device()
    preset = PRESETS[args.preset]
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found: dict[str, Any] = json.loads(args.results.read_text()) if args.results.exists() else {}
        facts = {"preset": args.preset, "steps": args.steps or preset.steps, "side": preset.side}
        if found and found["facts"] != facts:
            raise SystemExit(f"{args.results} is about {found['facts']}: name another file")
        found.setdefault("facts", facts)
        begun = time.perf_counter()
        folders = build(preset, folder, device)
        found.setdefault("build_seconds", time.perf_counter() - begun)
        for task in args.tasks:
            work = Work(
                task=task,
                model=folders[task],
                preset=replace(preset, steps=facts["steps"]),
                images=args.images or preset.images,
                batch=args.batch,
                device=device,
            )
            for stage in args.stages:
                done = found.setdefault(task, {})
                if stage not in done:
                    print(f"{task}: {stage} ...", flush=True)
                    done[stage] = _measured(work, stage)
                    _keep(args.results, found)
        _keep(args.results, found)
        if not args.keep and args.folder:
            shutil.rmtree(args.folder)
    for task in args.tasks:
        print(section(found, task).markdown())


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    stages = [*LOOPS, *OURS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--results", type=Path, required=True, metavar="FILE", help="JSON, completed by later calls")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="of the models (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="leave the models in --folder for the next call")
    parser.add_argument("--tasks", nargs="+", choices=CLASSES, default=[*CLASSES])
    parser.add_argument("--stages", nargs="*", choices=stages, default=stages, help="none only builds the models")
    parser.add_argument("--images", type=int, help="of each measurement, after the first call")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", help="cuda, or cpu")
    return parser.parse_args(arguments)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _measured(work: Work, stage: str) -> dict[str, Any]:
    """A stage's figures, or why there are none: what one cannot do must not take the others along."""
    try:
        return LOOPS[stage](work) if stage in LOOPS else ours(work, OURS[stage])
    except Exception as error:  # noqa: BLE001 - whatever a device or a library does not like
        lines = str(error).strip().splitlines() or [""]
        return {"problem": f"{type(error).__name__}: {lines[0][:200]}"}


def _keep(path: Path, found: Mapping[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1))
    part.replace(path)


def section(found: Mapping[str, Any], task: str) -> Result:
    """What was found, as a table."""
    stages, facts = found.get(task, {}), found["facts"]
    good = {stage: each for stage, each in stages.items() if "problem" not in each}
    rates = {stage: each["images"] / each["seconds"] for stage, each in good.items()}
    flops = next((each["flops"] for each in good.values() if each.get("flops")), None)
    rows = []
    for stage, each in stages.items():
        if stage not in good:
            rows.append([NAMES[stage], each["problem"], *["–"] * 6])
            continue
        rate = rates[stage]
        reached = flops * rate / 1e12 if flops else None
        peak = each.get("peak_teraflops")
        rows.append(
            [
                f"{NAMES[stage]} ({each['dtype']}, batch {each['batch']})",
                f"{rate:.3f}",
                f"{1 / rate:.2f} s",
                f"{rate / rates['plain']:.2f}" if "plain" in rates else "–",
                f"{rate / each['bare']:.3f}" if "bare" in each else "–",
                f"{reached:.2f}" if reached is not None else "–",
                f"{reached / peak:.0%}" if reached is not None and peak else "–",
                f"{each['first']:.1f} s",
            ]
        )
    device = next((each["device"] for each in good.values() if each.get("device")), "no device")
    tiny = facts["preset"] != "full"
    name = f"a model of {MODELS[task]}'s classes, tiny" if tiny else f"{MODELS[task]}, random weights"
    return Result(
        question=f"How much of the device becomes pictures? {name}, {facts['side']}², {facts['steps']} steps, {device}",
        aim="1.5 × the plain loop without loss, 2 × with fp8; saving and journal cost at most 2 % of the bare speed",
        columns=["", "images/s", "an image", "× plain", "of its bare speed", "TFLOP/s", "of the peak", "first call"],
        rows=rows,
        notes=[
            "Same prompts, same steps. From the end of the first call to the last picture; ours to the finished table.",
            "Bare speed: the same calls of the same pipeline, with nothing saved. TFLOP/s of the denoiser.",
            f"torch {version('torch')}, diffusers {version('diffusers')}.",
            *(["Tiny weights: the script works; the ratios say nothing of a GPU."] if tiny else []),
        ],
    )


if __name__ == "__main__":
    main()
