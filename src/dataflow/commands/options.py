"""The options that ``generate`` and ``edit`` share, and the pipeline file's tables they stand for.

An option whose ``dest`` is ``serving.NAME`` is the argument NAME of the local serving's constructor;
``api.NAME`` is one of an API's.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from typing import Any

from dataflow.errors import ConfigError

DEFAULT_FOLDER = "dataflow_output"
CACHE_TYPES = ("jsonl", "json", "csv", "parquet")
DEFAULT_BATCH = 4
APIS = ("chat", "openai_images", "gemini")
_SERVING, _API = "serving.", "api."
_FLAGS: dict[str, str] = {}
"""Destination → the option as it is typed."""
_BOTH = {
    "serving.hf_model_name_or_path": "model_name",
    "serving.diffuser_num_images_per_prompt": "images_per_prompt",
    "serving.batch_size": "batch_size",
}
"""Options of local models that an API has as well, under a name of its own."""


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Everything but the input itself."""
    _table_options(parser)
    _image_options(parser)
    _model_options(parser)
    _speed_options(parser)
    _api_options(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--fake",
        action="store_true",
        help="a dry run: no model, the pictures are coloured tiles (settings of the model are not checked)",
    )
    group.add_argument(
        "--max-failed-fraction",
        type=float,
        metavar="F",
        help="stop when more than this share of the rows failed, and at least 100 (default 0.5)",
    )
    group.add_argument(
        "--budget",
        dest="budget_usd",
        type=float,
        metavar="USD",
        help="stop before the calls of a paid service cost more than this, over all runs (default: no limit)",
    )
    add_run_options(group)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What a local model is and how it is run, without a table and an output."""
    _image_options(parser)
    _model_options(parser)
    _speed_options(parser)
    parser.set_defaults(api=None, fake=False)


def add_run_options(group: argparse._ActionsContainer) -> None:
    """What may be said of one run of a job, and is no part of the job."""
    group.add_argument(
        "--share",
        action="store_true",
        help="make a long table together with other processes that run the same command with this option, here or on "
        "machines that see the same folder",
    )
    group.add_argument(
        "--executor",
        choices=("local", "ray"),
        help="where the model runs: on this machine, or on a Ray cluster whose machines see the same folders",
    )
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of the cluster: 'auto' or HOST:6379 (default: RAY_ADDRESS, else one that is started on this machine)",
    )
    group.add_argument(
        "--workers",
        type=_from_one,
        metavar="N",
        help="copies of the model on the cluster (default: as many as there is room for)",
    )
    group.add_argument(
        "--pilot",
        type=_from_one,
        metavar="N",
        help="make only N rows, drawn at random, and forecast money, time, disk and refusals of the others",
    )


def run_changes(args: argparse.Namespace) -> dict[str, Any]:
    """What the options of :func:`add_run_options` and ``--quiet`` change of the run's settings."""
    names = ("pilot", "share", "executor", "ray_address", "workers")
    changes = {name: getattr(args, name) for name in names if getattr(args, name, None)}
    if changes.get("executor") == "local":
        changes = {"ray_address": None, "workers": None} | changes  # those of the pipeline file mean another executor
    return changes | ({"quiet": True, "progress": False} if args.quiet else {})


def serving_table(args: argparse.Namespace, task: str) -> dict[str, Any]:
    """The ``[serving.NAME]`` that the options describe.

    Raises:
        ConfigError: options of a local model and of an API together.
    """
    if args.api:
        return _api_table(args)
    for dest, value in vars(args).items():
        if dest.startswith(_API) and value is not None:
            raise ConfigError(f"{_FLAGS[dest]} belongs to image APIs: add --api {'|'.join(APIS)}, or leave it out")
    given = {
        name.removeprefix(_SERVING): value
        for name, value in vars(args).items()
        if name.startswith(_SERVING) and value is not None
    }
    if args.size:
        given["diffuser_image_width"], given["diffuser_image_height"] = args.size
    if args.pipeline_arg:
        given["pipeline_kwargs"] = dict(args.pipeline_arg)
    given.setdefault("batch_size", DEFAULT_BATCH)
    if not args.fake:
        return {"type": "local", **({"Image_gen_task": task} if task != "text2image" else {}), **given}
    params = dict(given.get("pipeline_kwargs", {}))
    for name, option in (
        ("num_inference_steps", "diffuser_num_inference_steps"),
        ("guidance_scale", "diffuser_guidance_scale"),
        ("negative_prompt", "negative_prompt"),
    ):
        if option in given:
            params[name] = given[option]
    fake: dict[str, Any] = {"type": "fake", "batch_size": given["batch_size"]}
    if args.size:
        fake["size"] = list(args.size)
    if "diffuser_num_images_per_prompt" in given:
        fake["images_per_prompt"] = given["diffuser_num_images_per_prompt"]
    if params:
        fake["params"] = params
    return fake


def _api_table(args: argparse.Namespace) -> dict[str, Any]:
    table: dict[str, Any] = {"type": args.api}
    for dest, value in vars(args).items():
        if value is None:
            continue
        if dest.startswith(_API):
            name = dest.removeprefix(_API)
            # One is written as one, not as a list of one.
            table[name] = value[0] if isinstance(value, list) and len(value) == 1 else value
        elif dest in _BOTH:
            table[_BOTH[dest]] = value
        elif dest.startswith(_SERVING):
            raise ConfigError(f"{_FLAGS[dest]} belongs to local models: leave it out, or say it with --request-param")
    if args.pipeline_arg or args.fake:
        flag = "--fake" if args.fake else "--pipeline-arg"
        raise ConfigError(f"{flag} does not go with --api")
    if args.request_param:
        table["request_params"] = dict(args.request_param)
    if args.size:
        if args.api != "openai_images":
            raise ConfigError(f"--size goes with --api openai_images, not with {args.api}: see --aspect-ratio")
        table["size"] = list(args.size)
    return table


def _table_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("table")
    group.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        default=DEFAULT_FOLDER,
        help="folder for images, tables and journal (default ./%(default)s)",
    )
    group.add_argument(
        "--column",
        metavar="NAME",
        help="column with the prompt or the instruction (default: conversations or what else looks like it)",
    )
    group.add_argument("--cache-type", choices=CACHE_TYPES, default="jsonl", help="format of the result table")
    group.add_argument("--format", choices=("png", "webp", "jpeg"), default="png", help="of the images")


def _image_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("images")
    add = _adder(group)
    add("--steps", "diffuser_num_inference_steps", type=_from_one, metavar="N", help="denoising steps")
    add("--guidance", "diffuser_guidance_scale", type=float, metavar="G", help="guidance scale (default: the model's)")
    group.add_argument("--size", type=_size, metavar="WxH", help="such as 1024x768 (default: the model's)")
    add("--negative-prompt", metavar="TEXT", help="what must not be seen, for rows that do not say it themselves")
    add("--images-per-prompt", "diffuser_num_images_per_prompt", type=_from_one, metavar="N", help="default 1")
    group.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="every image's seed follows from it (default 0)"
    )
    group.add_argument(
        "--pipeline-arg",
        type=_name_value,
        action="append",
        metavar="NAME=VALUE",
        help="a further argument of the pipeline's call, such as true_cfg_scale=4.0; may be repeated",
    )
    add(
        "--strict", "determinism", action="store_const", const="strict", help="bitwise reproducible; one image per call"
    )


def _model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = _adder(group)
    add(
        "--model",
        "hf_model_name_or_path",
        metavar="NAME",
        help="hub id (org/name) or folder of a diffusers pipeline (default: the small builtin:tiny-flux)",
    )
    add("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    add("--variant", metavar="NAME", help="weights variant, such as fp16")
    add("--pipeline-class", "diffuser_model_name", metavar="NAME", help="FLUX, FLUX-Kontext or a class of diffusers")
    add("--lora", action="append", metavar="NAME[@SCALE]", help="LoRA file, folder or hub id; may be repeated")
    add("--scheduler", metavar="CLASS", help="in place of the model's own")
    add("--hf-cache-dir", metavar="DIR", help="the Hub's cache")
    add("--hf-local-dir", metavar="DIR", help="download hub models here, into a folder per model and commit")
    add("--local-files-only", action="store_const", const=True, help="never ask the Hub")


def _speed_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory and speed")
    add = _adder(group)
    add(
        "--batch-size",
        type=_from_one,
        metavar="N",
        help=f"most images per call (default {DEFAULT_BATCH}); with --batch-jobs, requests per job",
    )
    add(
        "--device",
        type=_devices,
        metavar="DEV[,DEV]",
        help="cpu, mps, cuda, cuda:0,cuda:1 (default: every GPU, else the CPU)",
    )
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), help="default auto: bf16 on a GPU, fp32 on the CPU")
    add("--compile", choices=("regional", "full"), help="torch.compile the repeated blocks, or all of the denoiser")
    add(
        "--attention",
        "attention_backend",
        metavar="NAME",
        help="auto: the fastest for this GPU; or diffusers' name of one, such as _native_cudnn",
    )
    add("--quantization", metavar="NAME", help="torchao:int8wo, torchao:fp8wo, bnb:4bit, …; auto: fp8 where it pays")
    add("--step-cache", metavar="NAME", help="first_block:0.08 or taylorseer:5; faster and lossy")
    add(
        "--offload",
        choices=("model", "sequential", "group"),
        help="weights wait on the CPU, for models that do not fit",
    )
    add("--vae-slicing", action="store_const", const=True, help="decode one image at a time (default: large batches)")
    add("--vae-tiling", action="store_const", const=True, help="decode in tiles, for very large images")
    add("--vae-tiling-auto", "vae_tiling", action="store_const", const="auto", help="decode large images in tiles")
    add("--channels-last", action="store_const", const=True, help="memory format of the convolutions")
    add(
        "--text-encoders",
        choices=("keep", "offload"),
        help="offload: they wait on the CPU while nothing is encoded (default keep)",
    )
    add("--prompt-cache-mb", type=int, metavar="N", help="memory for encoded prompts that come again (default 512)")
    add("--threads", type=_from_one, metavar="N", help="of the CPU (default: torch's choice)")


def _api_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("image API")
    group.add_argument(
        "--api",
        choices=APIS,
        help="ask a service instead of a local model: chat completions (nano banana and many more), OpenAI's Images API"
        " (also vLLM-Omni, SGLang), or Gemini's own API; --model is the model's name there",
    )
    add = _adder(group, _API)
    add("--api-url", "api_url", action="append", metavar="URL", help="base URL; repeated: several, for failover")
    add(
        "--api-key-name",
        "key_name_of_api_key",
        action="append",
        metavar="VAR",
        help="environment variable with the key (default DF_API_KEY); may be repeated",
    )
    add("--max-workers", type=_from_one, metavar="N", help="requests in flight at once (default 10)")
    add("--timeout", type=float, metavar="S", help="seconds one request may take (default 300)")
    add("--stream", "send_request_stream", action="store_const", const=True, help="have answers streamed")
    add("--requests-per-minute", type=float, metavar="N", help="most that may start in a minute, at each endpoint")
    add("--images-per-minute", type=float, metavar="N", help="most images in a minute, at each endpoint")
    add("--aspect-ratio", metavar="W:H", help="such as 16:9 (gemini)")
    add("--image-size", metavar="SIZE", help="1K, 2K or 4K (gemini)")
    add("--dialect", choices=("openai", "vllm-omni", "sglang"), help="who answers the Images API (openai_images)")
    group.add_argument(
        "--request-param",
        type=_name_value,
        action="append",
        metavar="NAME=VALUE",
        help="a further field of the request, such as quality=high; may be repeated",
    )
    add("--prices", "price_table", metavar="FILE", help="a price table (TOML) laid over the package's own")
    add("--batch-jobs", action="store_const", const=True, help="the service's batch API: half price, within a day")


def _adder(group: argparse._ArgumentGroup, prefix: str = _SERVING) -> Callable[..., None]:
    def add(flag: str, argument: str | None = None, **options: Any) -> None:
        dest = prefix + (argument or flag[2:].replace("-", "_"))
        _FLAGS[dest] = flag
        group.add_argument(flag, dest=dest, **options)

    return add


def _from_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text}")
    return number


def positive_number(text: str) -> float:
    """A number above 0 of the command line."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, found {text!r}")
    return value


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**63 - 1, got {text}")
    return number


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)[x×X](\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"write width and height as 1024x768, got {text!r}")
    return int(found[1]), int(found[2])


def _devices(text: str) -> str | list[str]:
    names = [name.strip() for name in text.split(",")]
    return names[0] if len(names) == 1 else names


def _name_value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"write it as name=value, got {text!r}")
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    if parsed is None:
        raise argparse.ArgumentTypeError(f"null is no value: leave {name} out")
    return name, parsed
