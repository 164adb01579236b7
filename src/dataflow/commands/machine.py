"""``models`` and ``doctor``: what can be loaded, and what this machine has."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from dataflow import __version__
from dataflow.commands.folder import shown
from dataflow.errors import InputError
from dataflow.runtime.progress import human_bytes
from dataflow.serving import capabilities, prices
from dataflow.serving.model_files import INDEX, builtin_models

DISTRIBUTION = "open-dataflow"
LEAST_FREE_BYTES = 1_000_000_000
SCORERS = {
    "builtin:tiny-clip": "says how well such a picture shows its caption",
    "builtin:tiny-owl": "finds its shapes by name",
}


def models(args: argparse.Namespace) -> int:
    """What ``--model`` may name."""
    local = dict(_local_models(Path(args.hf_local_dir))) if args.hf_local_dir else {}
    if args.json:
        families = {
            name: {"text2image": row.text2image, "imageedit": row.image is not None, "defaults": dict(row.defaults)}
            for name, row in capabilities.TABLE.items()
        }
        rates = {name: asdict(each) for name, each in prices.shipped().items()}
        found = {"builtin": builtin_models(), "local": local, "families": families, "api_prices": rates}
        print(json.dumps(found, indent=2))
        return 0
    print("built in:")
    for name in builtin_models() or ["(none: this installation lacks its model)"]:
        print(f"  {name}  draws and edits a few shapes, colours and places at 64 × 64")
    for name, what in SCORERS.items():
        print(f"  {name}  {what}")
    if args.hf_local_dir:
        print(f"\nin {args.hf_local_dir}:")
        for folder, name in local.items() or [("(no folder with a model_index.json)", "")]:
            print(f"  {folder}  {name}")
    print("\nany hub id (org/name) or folder with a diffusers pipeline; these classes are known:")
    width = max(map(len, capabilities.TABLE))
    print(f"  {'class':{width}}  draws  edits  input images  steps  guidance")
    for name, row in capabilities.TABLE.items():
        edits = "yes" if row.image else "-"
        images = "-" if not row.image else "several" if row.max_images is None else str(row.max_images)
        steps, guidance = row.defaults["num_inference_steps"], row.defaults.get("guidance_scale", "-")
        line = f"{'yes' if row.text2image else '-':5}  {edits:5}  {images:12}  {steps:<5}  {guidance}"
        print(f"  {name:{width}}  {line}")
    print("\nothers run too, one image per call.")
    print("\nimage APIs (--api chat, openai_images or gemini); any model runs, these have a list price:")
    for name, rates in prices.shipped().items():
        print(f"  {name:{width}}  " + ("per token" if rates.image is None else f"about ${rates.image:.3f} per image"))
    return 0


def doctor(_: argparse.Namespace) -> int:
    """What is here; exit code 1 if local models cannot run."""
    print(f"dataflow    {__version__}")
    print(f"Python      {platform.python_version()} ({sys.executable})")
    print(f"platform    {platform.platform()}")
    usage = shutil.disk_usage(Path.cwd())
    low = "  — little for a data set" if usage.free < LEAST_FREE_BYTES else ""
    print(f"disk        {human_bytes(usage.free)} free here{low}")
    missing = {extra: _missing(extra) for extra in _extras()}
    for extra, libraries in missing.items():
        if libraries:
            print(f"[{extra}]".ljust(12) + f"missing {', '.join(libraries)}: pip install '{DISTRIBUTION}[{extra}]'")
        else:
            print(f"[{extra}]".ljust(12) + "installed")
    key = os.environ.get("DF_API_KEY", "").strip()
    print(f"API key     DF_API_KEY is {'set' if key else 'not set: image APIs need one'}")
    works = not missing.get("local") and _torch()
    print(f"models      {', '.join(builtin_models()) or 'none is built in: this installation is not whole'}")
    return 0 if works else 1


def _local_models(folder: Path) -> Iterator[tuple[str, str]]:
    """Pipelines in a folder or one or two floors below it (a folder per model and commit), with their classes."""
    if not folder.is_dir():
        raise InputError("no such folder", path=folder)
    for depth in ("", "*/", "*/*/"):
        for index in sorted(folder.glob(depth + INDEX)):
            try:
                name = json.loads(index.read_bytes())["_class_name"]
            except (OSError, ValueError, KeyError, TypeError):
                name = f"(its {INDEX} cannot be read)"
            yield shown(index.parent), str(name)


def _extras() -> list[str]:
    names = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    return [name for name in names if name != "all"]


def _missing(extra: str) -> list[str]:
    """Libraries of an extra that are not installed."""
    missing = []
    for requirement in metadata.requires(DISTRIBUTION) or []:
        name, marker = re.match(r"[\w.-]+", requirement), requirement.partition(";")[2]
        if name and re.search(rf"extra == ['\"]{re.escape(extra)}['\"]", marker):
            try:
                metadata.version(name[0])
            except metadata.PackageNotFoundError:
                missing.append(name[0])
    return missing


def _torch() -> bool:
    """Say what torch sees; whether it can be used."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of CUDA's that does not load
        print(f"torch       is installed but does not load: {error}")
        return False
    print(f"torch       {torch.__version__}")
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        print(f"cuda:{number}".ljust(12) + f"{name}, {human_bytes(free)} of {human_bytes(total)} free")
    if torch.backends.mps.is_available():
        print("mps         available")
    print(f"cpu         {torch.get_num_threads()} threads")
    return True
