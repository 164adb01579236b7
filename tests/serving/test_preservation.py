"""What an edit left as it was, against scikit-image, against the networks used directly, and by hand."""

from __future__ import annotations

import asyncio
import json
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from dataflow.errors import BadRequestError, ConfigError, InputError, MissingExtraError
from dataflow.metrics.perceptual import Dists, Lpips
from dataflow.serving.preservation import PSNR_CEILING, PreservationServing, may_change
from dataflow.types import GenerationRequest

ALEX = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
HEADS = (64, 192, 384, 256, 256)
VGG = ((0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256),
       (17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512))  # fmt: skip


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def album(tmp_path):
    class Album:
        folder = tmp_path

        def save(self, name, pixels):
            Image.fromarray(pixels).save(tmp_path / name)
            return str(tmp_path / name)

        def smooth(self, seed, size=(64, 48)):
            small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            return np.array(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))

    return Album()


@pytest.fixture
def edit(album):
    """A source, and the same with a square painted over it and a little noise everywhere; True where it is painted."""
    source = album.smooth(1)
    painted = np.zeros(source.shape[:2], bool)
    painted[10:26, 20:40] = True
    noise = np.random.default_rng(9).normal(0, 6, source.shape)
    edited = np.where(painted[..., None], 255 - source, np.clip(source + noise, 0, 255)).astype(np.uint8)
    return source, edited, painted


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights in the forms in which the networks are published: torchvision's, and the heads of lpips."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(0)

    def layer(outputs, inputs, kernel):
        scale = (2 / (inputs * kernel**2)) ** 0.5
        return torch.randn(outputs, inputs, kernel, kernel, generator=generator) * scale

    alex, vgg = {}, {}
    for number, shape in ALEX.items():
        alex |= {f"features.{number}.weight": layer(*shape), f"features.{number}.bias": torch.zeros(shape[0])}
    for number, inputs, outputs in VGG:
        vgg |= {f"features.{number}.weight": layer(outputs, inputs, 3), f"features.{number}.bias": torch.zeros(outputs)}
    heads = {f"lin{n}.model.1.weight": torch.rand(1, size, 1, 1, generator=generator) for n, size in enumerate(HEADS)}
    mixing = {name: torch.rand(1, 1475, 1, 1, generator=generator) for name in ("alpha", "beta")}
    paths = {}
    for name, tensors in {"alex": alex, "vgg": vgg, "heads": heads, "mixing": mixing}.items():
        paths[name] = folder / f"{name}.pth"
        torch.save(tensors, paths[name])
    return paths


def request(*images, mask=None):
    return GenerationRequest(request_id="0" * 32, prompt="", images=images, mask=mask, seed=0)


def scores(requests, serving=None):
    serving = serving or PreservationServing()
    for each in requests:
        serving.check(each)
    serving.setup()
    try:
        results = asyncio.run(serving.generate(requests))
        return [result.error or json.loads(result.text) for result in results]
    finally:
        serving.cleanup()


class TestWholePicture:
    def test_equals_scikit_image(self, album, edit):
        metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is the oracle here")
        source, edited, _ = edit
        [found] = scores([request(album.save("s.png", source), album.save("e.png", edited))])
        gray = [np.round(image @ np.array([0.2989, 0.5870, 0.1140])) for image in (source, edited)]
        assert found["psnr"] == pytest.approx(metrics.peak_signal_noise_ratio(source, edited, data_range=255))
        assert found["ssim"] == pytest.approx(
            metrics.structural_similarity(
                *gray, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
        )
        difference = (source.astype(float) - edited) / 255
        assert found["l1"] == pytest.approx(np.abs(difference).mean())
        assert found["l2"] == pytest.approx((difference**2).mean())
        assert (found["resized"], found["unedited"]) == (False, None)
        assert "lpips" not in found

    def test_equal_pictures(self, album):
        path = album.save("s.png", album.smooth(1))
        [found] = scores([request(path, path)])
        assert found == {
            "psnr": PSNR_CEILING, "ssim": pytest.approx(1), "l1": 0, "l2": 0, "resized": False, "unedited": None,
        }  # fmt: skip

    def test_another_size_is_resized_and_said(self, album, edit):
        source, edited, _ = edit
        larger = np.asarray(Image.fromarray(edited).resize((130, 90), Image.Resampling.LANCZOS))
        back = np.asarray(Image.fromarray(larger).resize((64, 48), Image.Resampling.BICUBIC))
        path = album.save("s.png", source)
        found, wanted = scores([request(path, album.save("l.png", larger)), request(path, album.save("b.png", back))])
        assert found == {**wanted, "resized": True}

    def test_what_is_too_small_is_null(self, album):
        first, second = album.smooth(1, (8, 40)), album.smooth(2, (8, 40))
        [found] = scores([request(album.save("1.png", first), album.save("2.png", second))])
        assert found["ssim"] is None
        assert found["psnr"] > 0


class TestUneditedRegion:
    def test_only_what_should_not_change_counts(self, album, edit):
        source, edited, painted = edit
        mask = album.save("m.png", np.where(painted, 255, 0).astype(np.uint8))
        [found] = scores([request(album.save("s.png", source), album.save("e.png", edited), mask=mask)])
        kept = (source.astype(float) - edited)[~painted] / 255
        unedited = found["unedited"]
        assert unedited["share"] == pytest.approx((~painted).mean())
        assert unedited["l1"] == pytest.approx(np.abs(kept).mean())
        assert unedited["l2"] == pytest.approx((kept**2).mean())
        assert unedited["psnr"] == pytest.approx(-10 * np.log10((kept**2).mean()))
        assert unedited["psnr"] > found["psnr"] + 5
        # Windows that lie wholly in the region: another content of the rest changes nothing.
        other = np.where(painted[..., None], 7, edited).astype(np.uint8)
        [again] = scores([request(album.save("s.png", source), album.save("o.png", other), mask=mask)])
        assert again["unedited"] == pytest.approx(unedited, abs=1e-9)
        assert again["ssim"] != pytest.approx(found["ssim"], abs=1e-3)

    def test_equals_scikit_images_map(self, album, edit):
        metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is the oracle here")
        from scipy import ndimage

        source, edited, painted = edit
        mask = album.save("m.png", np.where(painted, 255, 0).astype(np.uint8))
        [found] = scores([request(album.save("s.png", source), album.save("e.png", edited), mask=mask)])
        gray = [np.round(image @ np.array([0.2989, 0.5870, 0.1140])) for image in (source, edited)]
        _, values = metrics.structural_similarity(
            *gray, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
        )
        whole = ndimage.binary_erosion(~painted, np.ones((11, 11)), border_value=0)
        assert found["unedited"]["ssim"] == pytest.approx(values[whole].mean())

    @pytest.mark.parametrize("form", ["white", "transparent", "half the size", "colour"])
    def test_masks(self, album, form):
        wanted = np.zeros((40, 60), bool)
        wanted[10:20, 30:50] = True
        white = np.where(wanted, 255, 0).astype(np.uint8)
        if form == "white":
            pixels = np.where(wanted, 130, 120).astype(np.uint8)
        elif form == "transparent":  # what shows through is of no account
            pixels = np.dstack([np.full((40, 60, 3), 255, np.uint8), 255 - white])
        elif form == "half the size":
            pixels = white[::2, ::2]
        else:
            pixels = np.dstack([white] * 3)
        assert (may_change(album.save("m.png", pixels), (40, 60)) == wanted).all()

    def test_an_opaque_mask_with_an_alpha_channel_goes_by_its_colour(self, album):
        pixels = np.dstack([np.full((4, 4, 3), 255, np.uint8), np.full((4, 4), 255, np.uint8)])
        assert may_change(album.save("m.png", pixels), (4, 4)).all()

    def test_a_mask_that_leaves_nothing_gives_no_score_and_one_that_leaves_all_changes_nothing(self, album, edit):
        source, edited, _ = edit
        paths = album.save("s.png", source), album.save("e.png", edited)
        everything = album.save("white.png", np.full((5, 5), 255, np.uint8))
        nothing = album.save("black.png", np.zeros((5, 5), np.uint8))
        none, whole = scores([request(*paths, mask=everything), request(*paths, mask=nothing)])
        assert isinstance(none, BadRequestError)
        assert none.reason == "not_applicable"
        assert {**whole["unedited"], "resized": False, "unedited": None} == pytest.approx(
            {**whole, "share": 1.0, "unedited": None}
        )

    def test_a_region_too_thin_for_a_window_has_the_other_figures(self, album, edit):
        source, edited, _ = edit
        lines = np.full(source.shape[:2], 255, np.uint8)
        lines[::8] = 0
        paths = album.save("s.png", source), album.save("e.png", edited)
        [found] = scores([request(*paths, mask=album.save("m.png", lines))])
        assert found["unedited"]["ssim"] is None
        assert found["unedited"]["psnr"] > 0
        assert found["ssim"] is not None


class TestNetworks:
    @pytest.fixture
    def serving(self, weights):
        return PreservationServing(
            lpips_weights=weights["alex"],
            lpips_heads=weights["heads"],
            dists_weights=weights["vgg"],
            dists_mixing=weights["mixing"],
            device="cpu",
        )

    def test_equal_the_networks_used_directly(self, album, edit, serving, weights):
        source, edited, painted = edit
        mask = album.save("m.png", np.where(painted, 255, 0).astype(np.uint8))
        paths = album.save("s.png", source), album.save("e.png", edited)
        [found] = scores([request(*paths, mask=mask)], serving)
        lpips = Lpips(weights["alex"], "alex", weights["heads"])
        dists = Dists(weights["vgg"], weights["mixing"])
        filled = np.where(painted[..., None], source, edited)
        assert found["lpips"] == pytest.approx(lpips(source, edited)[0], rel=1e-5)
        assert found["dists"] == pytest.approx(dists(source, edited)[0], rel=1e-5)
        assert found["unedited"]["lpips"] == pytest.approx(lpips(source, filled)[0], rel=1e-5)
        assert found["unedited"]["dists"] == pytest.approx(dists(source, filled)[0], rel=1e-5)
        assert 0 < found["unedited"]["lpips"] < found["lpips"]

    def test_dists_sees_its_own_size(self, album, serving, weights):
        first, second = album.smooth(1, (272, 300)), album.smooth(2, (272, 300))
        bilinear = Image.Resampling.BILINEAR
        shrunk = [np.array(Image.fromarray(each).resize((256, 282), bilinear)) for each in (first, second)]
        [found] = scores([request(album.save("1.png", first), album.save("2.png", second))], serving)
        assert found["dists"] == pytest.approx(Dists(weights["vgg"], weights["mixing"])(*shrunk)[0], rel=1e-5)

    def test_are_sent_without_their_weights_and_named_by_them(self, serving, weights, tmp_path):
        serving.setup()
        twin = pickle.loads(pickle.dumps(serving))
        assert len(pickle.dumps(serving)) < 2000
        assert twin.fingerprint() == serving.fingerprint() != PreservationServing().fingerprint()
        other = tmp_path / "other.pth"
        other.write_bytes(weights["heads"].read_bytes() + b" ")
        changed = PreservationServing(lpips_weights=weights["alex"], lpips_heads=other)
        same = PreservationServing(lpips_weights=weights["alex"], lpips_heads=weights["heads"], device="cuda:7")
        assert changed.fingerprint() != same.fingerprint()
        assert json.dumps(dict(same.fingerprint()))

    def test_one_copy_on_each_device_where_there_are_networks(self, weights):
        two = ["cuda:0", "cuda:1"]
        alone = PreservationServing(device=two)
        assert alone.replicas() == [alone]
        pair = PreservationServing(lpips_weights=weights["alex"], device=two).replicas()
        assert [each.device for each in pair] == two

    def test_files_that_are_none(self, weights, tmp_path):
        gone = PreservationServing(lpips_weights=tmp_path / "gone.pth")
        with pytest.raises(ConfigError, match="gone"):
            gone.fingerprint()
        wrong = PreservationServing(lpips_weights=weights["vgg"], lpips_heads=weights["heads"], device="cpu")
        with pytest.raises(InputError, match="shape"):
            wrong.setup()


def test_one_bad_picture_fails_alone(album):
    good = album.save("g.png", album.smooth(1))
    (album.folder / "half.png").write_bytes((album.folder / "g.png").read_bytes()[:90])
    half, gone = str(album.folder / "half.png"), str(album.folder / "gone.png")
    found = scores([request(good, half), request(gone, good), request(good, good, mask=half), request(good, good)])
    assert [each.reason for each in found[:2]] == ["image_truncated", "image_missing"]
    assert found[2].reason.startswith("image_")
    assert found[3]["psnr"] == PSNR_CEILING


def test_one_picture_is_no_edit():
    with pytest.raises(BadRequestError, match="source") as caught:
        PreservationServing().check(request("a.png"))
    assert caught.value.reason == "not_applicable"


@pytest.mark.parametrize(
    "options", [{"lpips_network": "squeeze"}, {"lpips_heads": "h.pth"}, {"dists_weights": "v.pth"}]
)
def test_settings_that_make_no_sense(options):
    with pytest.raises(ConfigError):
        PreservationServing(**options)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtraError, match="metrics"):
        PreservationServing().setup()
