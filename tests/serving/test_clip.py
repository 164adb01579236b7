"""CLIP's scores and the vectors beneath them, against transformers and torch used directly."""

from __future__ import annotations

import asyncio
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from dataflow.errors import BadRequestError, ConfigError, FatalServingError, InputError, ServingError
from dataflow.operators import ImageEvaluator, ScoreFilter
from dataflow.runtime.engine import RunOptions
from dataflow.serving import transformers_model
from dataflow.serving.clip import (
    AestheticServing,
    ClipEditServing,
    ClipServing,
    HPSv2Serving,
    PickScoreServing,
    from_open_clip,
)
from dataflow.serving.embedding import EmbeddingServing
from dataflow.serving.encoder import Encoder
from dataflow.types import GenerationRequest
from dataflow.utils.storage import FileStorage
from dataflow.utils.vectors import VectorStore

LONG = "a red circle on the left of a blue square " * 30


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate([(64, 64), (100, 80), (50, 130), (64, 65)]):
        path = folder / f"{number}.png"
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    return paths


def digest(path):
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def request(*images, prompt="", **params):
    return GenerationRequest(
        request_id="0" * 32,
        prompt=prompt,
        images=images,
        image_hashes=tuple(map(digest, images)),
        seed=0,
        params=params,
    )


def scores(serving, requests):
    serving.setup()
    try:
        results = asyncio.run(serving.generate(requests))
        return [result.error or json.loads(result.text) for result in results]
    finally:
        serving.cleanup()


@pytest.fixture(scope="module")
def clip():
    folder = EmbeddingServing().source.located().folder
    model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)

    class Direct:
        @torch.no_grad()
        def image(self, path):
            with Image.open(path) as picture:
                pixels = processor(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"]
            return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0].numpy()

        @torch.no_grad()
        def text(self, text):
            given = tokenizer([text], truncation=True, max_length=28, return_tensors="pt")
            return model.text_projection(model.text_model(**given).pooler_output)[0].numpy()

    direct = Direct()
    direct.model, direct.folder = model, folder
    return direct


def cosine(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


class TestAlignment:
    def test_is_the_cosine_of_what_transformers_gives(self, clip, pictures):
        prompts = ["a red circle", "A Blue Square on a black background", "a red circle", LONG]
        found = scores(
            ClipServing(device="cpu"), [request(p, prompt=t) for p, t in zip(pictures, prompts, strict=True)]
        )
        wanted = [cosine(clip.image(p), clip.text(t)) for p, t in zip(pictures, prompts, strict=True)]
        assert [each["alignment"] for each in found] == pytest.approx(wanted, abs=2e-6)
        assert [each["truncated"] for each in found] == [False, False, False, True]
        assert found[0]["tokens"] == 5
        assert found[3]["tokens"] == 302

    def test_a_prompt_that_is_too_long_may_be_refused(self, pictures):
        found = scores(ClipServing(device="cpu", long_prompts="refuse"), [request(pictures[0], prompt=LONG)])
        assert isinstance(found[0], BadRequestError)
        assert found[0].reason == "not_applicable"
        assert "302 tokens, the model reads 28" in str(found[0])

    def test_without_a_prompt_there_is_nothing_to_compare(self, pictures):
        with pytest.raises(BadRequestError, match="with_prompt") as caught:
            ClipServing().check(request(pictures[0]))
        assert caught.value.reason == "not_applicable"

    def test_a_bad_picture_costs_its_neighbours_nothing(self, clip, pictures, tmp_path):
        half, text = tmp_path / "half.jpg", tmp_path / "text.png"
        Image.open(pictures[1]).convert("RGB").save(half, quality=95)
        half.write_bytes(half.read_bytes()[:3000])
        text.write_text("no picture")
        found = scores(
            ClipServing(device="cpu"), [request(p, prompt="a red star") for p in (pictures[0], str(half), str(text))]
        )
        assert found[0]["alignment"] == pytest.approx(
            cosine(clip.image(pictures[0]), clip.text("a red star")), abs=2e-6
        )
        assert all(isinstance(each, BadRequestError) and each.reason.startswith("image_") for each in found[1:])

    def test_a_model_that_makes_nonsense_gives_no_score(self, pictures, monkeypatch):
        monkeypatch.setattr(Encoder, "images", lambda self, rows: np.full((len(rows), 192), np.nan, np.float32))
        found = scores(ClipServing(device="cpu"), [request(pictures[0], prompt="a red star")])
        assert isinstance(found[0], ServingError)
        assert found[0].reason == "no_vector"

    def test_texts_are_computed_once_and_not_all_kept(self, pictures, monkeypatch):
        monkeypatch.setattr("dataflow.serving.clip._TEXTS_KEPT", 2)
        asked = []
        texts = Encoder.texts
        monkeypatch.setattr(Encoder, "texts", lambda self, given: asked.append(list(given)) or texts(self, given))
        serving = ClipServing(device="cpu")
        serving.setup()
        for prompts in (["a", "a", "b"], ["a", "b"], ["c"], ["a"]):
            serving.score([request(pictures[0], prompt=prompt) for prompt in prompts])
        serving.cleanup()
        assert asked == [["a", "b"], ["c"], ["a"]]


class TestEdits:
    def test_all_comparisons(self, clip, pictures):
        before, after = pictures[0], pictures[1]
        said = {"source_caption": "a red circle", "target_caption": "a blue circle"}
        found = scores(
            ClipEditServing(device="cpu"),
            [
                request(before, after, **said),
                request(before, after),
                request(before, after, target_caption="a blue circle"),
                request(before, before, **said),
            ],
        )
        i0, i1 = clip.image(before), clip.image(after)
        t0, t1 = clip.text(said["source_caption"]), clip.text(said["target_caption"])
        units = [each / np.linalg.norm(each) for each in (i0, i1, t0, t1)]
        wanted = {
            "image_similarity": cosine(i0, i1),
            "direction": cosine(units[1] - units[0], units[3] - units[2]),
            "alignment": cosine(i1, t1),
            "source_alignment": cosine(i0, t0),
        }
        assert found[0] == pytest.approx(wanted, abs=5e-6)
        nothing = dict.fromkeys(["direction", "alignment", "source_alignment"])
        assert found[1] == {"image_similarity": found[0]["image_similarity"], **nothing}
        assert found[2]["alignment"] == found[0]["alignment"]
        assert found[2]["source_alignment"] is None
        assert found[3]["direction"] is None  # it did not change: there is no direction, and no 0
        assert found[3]["image_similarity"] == pytest.approx(1.0)

    def test_one_picture_is_not_enough(self, pictures):
        with pytest.raises(BadRequestError, match="no source"):
            ClipEditServing().check(request(pictures[0]))

    def test_a_broken_source_is_no_number(self, pictures, tmp_path):
        (tmp_path / "text.png").write_text("no picture")
        found = scores(ClipEditServing(device="cpu"), [request(str(tmp_path / "text.png"), pictures[0])])
        assert found[0].reason.startswith("image_")


class TestAesthetic:
    @pytest.fixture
    def head(self, tmp_path):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(
            torch.nn.Linear(192, 64), torch.nn.Dropout(0.2), torch.nn.Linear(64, 16), torch.nn.Linear(16, 1)
        )
        path = tmp_path / "released.pth"
        torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, path)
        return layers.eval(), path

    def test_is_the_head_on_the_vector_of_length_one(self, clip, pictures, head):
        layers, path = head
        found = scores(AestheticServing(path, clip.folder, device="cpu"), [request(p) for p in pictures])
        with torch.no_grad():
            units = [torch.from_numpy(clip.image(p) / np.linalg.norm(clip.image(p))) for p in pictures]
            wanted = [layers(unit[None]).item() for unit in units]
        assert found == pytest.approx(wanted, abs=1e-5)

    def test_another_head_is_another_score(self, clip, head, tmp_path):
        other = tmp_path / "other.pth"
        torch.save({"weight": torch.ones(1, 192), "bias": torch.zeros(1)}, other)
        one, two = AestheticServing(head[1], clip.folder), AestheticServing(other, clip.folder)
        assert one.fingerprint() != two.fingerprint()
        assert one.store_name == two.store_name == EmbeddingServing(clip.folder).store_name

    @pytest.mark.parametrize(
        ("tensors", "told"),
        [({"weight": torch.ones(2, 192), "bias": torch.zeros(2)}, "ends in 2"), ({"x": torch.ones(1)}, "needs layers")],
    )
    def test_what_is_no_head(self, clip, tmp_path, tensors, told):
        torch.save(tensors, tmp_path / "head.pth")
        with pytest.raises(ConfigError, match=told):
            AestheticServing(tmp_path / "head.pth", clip.folder, device="cpu").setup()
        with pytest.raises(ConfigError, match="cannot be read"):
            AestheticServing(tmp_path / "none.pth", clip.folder).fingerprint()

    def test_a_head_for_another_model(self, clip, pictures, tmp_path):
        torch.save({"weight": torch.ones(1, 768), "bias": torch.zeros(1)}, tmp_path / "head.pth")
        serving = AestheticServing(tmp_path / "head.pth", clip.folder, device="cpu")
        serving.setup()
        with pytest.raises(ConfigError, match="the head is for 768 numbers, the features have 192"):
            serving.score([request(pictures[0])])
        serving.cleanup()


class TestPreference:
    def test_pick_score_is_the_scaled_cosine(self, clip, pictures):
        found = scores(PickScoreServing(clip.folder, device="cpu"), [request(p, prompt="a star") for p in pictures])
        scale = clip.model.logit_scale.exp().item()
        wanted = [scale * cosine(clip.image(p), clip.text("a star")) for p in pictures]
        assert [each["pick_score"] for each in found] == pytest.approx(wanted, abs=1e-4)

    def test_hps_is_open_clips_arithmetic_on_padded_pictures(self, clip, pictures, tmp_path):
        tensors = _open_clip_tensors()
        torch.save({"state_dict": tensors}, tmp_path / "hps.pt")
        serving = HPSv2Serving(tmp_path / "hps.pt", clip.folder, device="cpu")
        found = scores(serving, [request(p, prompt="a red star") for p in pictures])
        tokenizer = transformers.CLIPTokenizer.from_pretrained(clip.folder)
        ids = tokenizer(["a red star"], return_tensors="pt")["input_ids"]
        text = _open_clip_text(tensors, ids)
        wanted = [cosine(_open_clip_image(tensors, _hps_pixels(p)), text) for p in pictures]
        assert [each["hps"] for each in found] == pytest.approx(wanted, abs=5e-6)
        assert serving.store_name != EmbeddingServing(clip.folder).store_name

    def test_another_architecture_is_told(self):
        with pytest.raises(InputError, match=r"no tensor of a ViT CLIP of open_clip: 'visual.trunk.stem.weight'"):
            from_open_clip({"visual.trunk.stem.weight": np.zeros(1)})
        assert from_open_clip({"attn_mask": np.zeros(1)}) == {}


class TestVectors:
    def test_are_made_once_for_everything_that_reads_them(self, clip, pictures, tmp_path, monkeypatch):
        table = tmp_path / "in.jsonl"
        table.write_text("".join(json.dumps({"images": [p], "conversations": "a red star"}) + "\n" for p in pictures))
        storage = FileStorage(str(table), cache_path=str(tmp_path / "cache"))
        quiet = RunOptions(quiet=True)
        vectors = tmp_path / "vectors"
        serving = EmbeddingServing(vectors=vectors, device="cpu")
        assert ImageEvaluator(serving, options=quiet).run(storage.step(), output_key="vector").done == 4

        def never(*_):
            raise AssertionError("computed again")

        monkeypatch.setattr(Encoder, "images", never)
        monkeypatch.setattr(Encoder, "prepared", never)
        aligned = ImageEvaluator(ClipServing(vectors=vectors, device="cpu"), with_prompt=True, options=quiet)
        assert aligned.run(storage.step(), output_key="clip").done == 4
        assert ScoreFilter(options=quiet).run(storage.step(), input_score_key="clip.alignment", minimum=-1).done == 4
        rows = [json.loads(line) for line in storage.output_path.read_text().splitlines()]
        wanted = [cosine(clip.image(p), clip.text("a red star")) for p in pictures]
        assert [row["clip"][0]["alignment"] for row in rows] == pytest.approx(wanted, abs=2e-6)
        for path, row in zip(pictures, rows, strict=True):
            (entry,) = row["vector"]
            (vector,) = VectorStore(vectors / entry["store"]).find([entry["sha256"]])
            assert vector == pytest.approx(clip.image(path), abs=1e-4)

    def test_a_vision_model_without_texts(self, pictures, tmp_path):
        torch.manual_seed(0)
        config = transformers.Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
        )
        model = transformers.Dinov2Model(config).eval()
        model.save_pretrained(tmp_path / "dino")
        processor = transformers.BitImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
        processor.save_pretrained(tmp_path / "dino")
        serving = EmbeddingServing(tmp_path / "dino", vectors=tmp_path / "v", device="cpu")
        serving.setup()
        found = serving.picture_vectors([(p, digest(p)) for p in pictures])
        serving.cleanup()
        for path, vector in zip(pictures, found, strict=True):
            with Image.open(path) as picture, torch.no_grad():
                pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
                assert vector == pytest.approx(model(pixel_values=pixels).pooler_output[0].numpy(), abs=1e-5)
        reader = ClipServing(tmp_path / "dino", device="cpu")
        reader.setup()
        with pytest.raises(ConfigError, match="reads no texts"):
            reader.score([request(pictures[0], prompt="a star")])
        with pytest.raises(ConfigError, match="no logit scale"):
            _ = reader._encoder.logit_scale
        reader.cleanup()

    def test_of_a_picture_that_changed_meanwhile_is_not_kept(self, pictures, tmp_path):
        path = tmp_path / "changes.png"
        path.write_bytes(Path(pictures[0]).read_bytes())
        asked = request(str(path))
        path.write_bytes(Path(pictures[1]).read_bytes())
        (tmp_path / "vectors" / EmbeddingServing().store_name).mkdir(parents=True)  # a kill left it empty
        (found,) = scores(EmbeddingServing(vectors=tmp_path / "vectors", device="cpu"), [asked])
        assert (found.reason, "was changed while" in str(found)) == ("image_changed", True)
        assert not list((tmp_path / "vectors").rglob("*.vectors"))

    def test_without_a_folder_there_is_nowhere_to_keep_them(self, pictures):
        serving = EmbeddingServing(device="cpu")
        serving.setup()
        with pytest.raises(FatalServingError, match="name the folder"):
            serving.score([request(pictures[0])])
        serving.cleanup()


class TestTheServing:
    def test_goes_to_another_process_as_settings(self, tmp_path):
        serving = ClipServing(vectors=tmp_path, device="cpu", long_prompts="refuse")
        serving.setup()
        again = pickle.loads(pickle.dumps(serving))
        serving.cleanup()
        assert len(pickle.dumps(again)) < 2000
        assert again.fingerprint() == serving.fingerprint()
        assert again._encoder is None

    def test_number_format_and_kind_are_part_of_what_it_is(self):
        prints = [
            s.fingerprint()
            for s in (
                ClipServing(),
                ClipServing(dtype="bf16"),
                ClipServing(long_prompts="refuse"),
                ClipEditServing(),
                EmbeddingServing(),
            )
        ]
        assert len({json.dumps(each, sort_keys=True) for each in prints}) == 5
        assert ClipServing().store_name == EmbeddingServing().store_name != ClipServing(dtype="bf16").store_name
        assert ClipServing(batch_size=3, device="cpu", threads=1).fingerprint() == ClipServing().fingerprint()

    def test_has_a_copy_for_each_device(self):
        copies = ClipServing(device=["cuda:0", "cuda:1"], long_prompts="refuse").replicas()
        assert [copy.device for copy in copies] == ["cuda:0", "cuda:1"]
        assert {copy.long_prompts for copy in copies} == {"refuse"}
        alone = ClipServing(device="cpu")
        assert alone.replicas() == [alone]

    def test_bf16_is_near(self, clip, pictures):
        (found,) = scores(ClipServing(device="cpu", dtype="bf16"), [request(pictures[0], prompt="a red star")])
        assert found["alignment"] == pytest.approx(cosine(clip.image(pictures[0]), clip.text("a red star")), abs=0.02)

    @pytest.mark.parametrize(
        "options", [{"batch_size": 0}, {"dtype": "fp8"}, {"long_prompts": "cut"}, {"device": "tpu"}]
    )
    def test_what_can_never_work(self, options):
        with pytest.raises(ConfigError):
            ClipServing(**options).replicas()

    def test_before_setup(self, pictures):
        with pytest.raises(FatalServingError, match="not set up"):
            ClipServing().score([request(pictures[0], prompt="a star")])

    def test_models_that_cannot_be_used(self, tmp_path):
        with pytest.raises(ConfigError, match="no built-in model"):
            ClipServing("builtin:none").fingerprint()
        with pytest.raises(ConfigError, match=r"no transformers model: it has no config\.json"):
            ClipServing("builtin:tiny-flux").fingerprint()
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ConfigError, match="has no weights"):
            ClipServing(tmp_path).setup()
        (tmp_path / "model.safetensors").write_bytes(b"no weights")
        with pytest.raises(FatalServingError, match="cannot be loaded"):
            ClipServing(tmp_path, device="cpu").setup()

    def test_changed_weights_are_another_model(self, clip, tmp_path):
        for file in clip.folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "README.md").write_text("a card")
        same = transformers_model.identity(ClipServing(tmp_path).source.located())["revision"]
        assert same == ClipServing().fingerprint()["revision"]
        data = bytearray((tmp_path / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (tmp_path / "model.safetensors").write_bytes(data)
        assert transformers_model.identity(ClipServing(tmp_path).source.located())["revision"] != same


# open_clip's arithmetic, written down here ---------------------------------------------------------------------------

VISION = {"width": 160, "layers": 5, "heads": 5, "hidden": 480}
TEXT = {"width": 128, "layers": 3, "heads": 4, "hidden": 256}
JOINT, PATCH, SIDE, WORDS, LENGTH = 192, 8, 64, 655, 28


def _open_clip_tensors():
    torch.manual_seed(1)
    random = lambda *shape: torch.randn(*shape) * 0.1  # noqa: E731
    found = {
        "visual.class_embedding": random(VISION["width"]),
        "visual.positional_embedding": random((SIDE // PATCH) ** 2 + 1, VISION["width"]),
        "visual.conv1.weight": random(VISION["width"], 3, PATCH, PATCH),
        "visual.proj": random(VISION["width"], JOINT),
        "token_embedding.weight": random(WORDS, TEXT["width"]),
        "positional_embedding": random(LENGTH, TEXT["width"]),
        "text_projection": random(TEXT["width"], JOINT),
        "logit_scale": torch.tensor(4.6),
        "attn_mask": torch.zeros(LENGTH, LENGTH),
    }
    for name, width in (("visual.ln_pre", 160), ("visual.ln_post", 160), ("ln_final", 128)):
        found |= {f"{name}.weight": 1 + random(width), f"{name}.bias": random(width)}
    for prefix, tower in (("visual.", VISION), ("", TEXT)):
        width, hidden = tower["width"], tower["hidden"]
        for layer in range(tower["layers"]):
            block = f"{prefix}transformer.resblocks.{layer}"
            for norm in ("ln_1", "ln_2"):
                found |= {f"{block}.{norm}.weight": 1 + random(width), f"{block}.{norm}.bias": random(width)}
            found |= {
                f"{block}.attn.in_proj_weight": random(3 * width, width),
                f"{block}.attn.in_proj_bias": random(3 * width),
                f"{block}.attn.out_proj.weight": random(width, width),
                f"{block}.attn.out_proj.bias": random(width),
                f"{block}.mlp.c_fc.weight": random(hidden, width),
                f"{block}.mlp.c_fc.bias": random(hidden),
                f"{block}.mlp.c_proj.weight": random(width, hidden),
                f"{block}.mlp.c_proj.bias": random(width),
            }
    return found


def _norm(tensors, name, x):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def _blocks(tensors, prefix, tower, x, mask=None):
    for layer in range(tower["layers"]):
        block = f"{prefix}transformer.resblocks.{layer}"
        attention = torch.nn.MultiheadAttention(tower["width"], tower["heads"], batch_first=True)
        attention.load_state_dict(
            {
                name.removeprefix(f"{block}.attn."): value
                for name, value in tensors.items()
                if name.startswith(f"{block}.attn.")
            }
        )
        y = _norm(tensors, f"{block}.ln_1", x)
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = _norm(tensors, f"{block}.ln_2", x)
        y = y @ tensors[f"{block}.mlp.c_fc.weight"].T + tensors[f"{block}.mlp.c_fc.bias"]
        y = y * torch.sigmoid(1.702 * y)
        x = x + y @ tensors[f"{block}.mlp.c_proj.weight"].T + tensors[f"{block}.mlp.c_proj.bias"]
    return x


@torch.no_grad()
def _open_clip_image(tensors, pixels):
    x = torch.nn.functional.conv2d(pixels[None], tensors["visual.conv1.weight"], stride=PATCH)
    x = x.flatten(2).permute(0, 2, 1)
    x = torch.cat([tensors["visual.class_embedding"][None, None], x], 1) + tensors["visual.positional_embedding"]
    x = _blocks(tensors, "visual.", VISION, _norm(tensors, "visual.ln_pre", x))
    return (_norm(tensors, "visual.ln_post", x[:, 0]) @ tensors["visual.proj"])[0].numpy()


@torch.no_grad()
def _open_clip_text(tensors, ids):
    length = ids.shape[1]
    x = tensors["token_embedding.weight"][ids] + tensors["positional_embedding"][:length]
    mask = torch.full((length, length), float("-inf")).triu(1)
    x = _norm(tensors, "ln_final", _blocks(tensors, "", TEXT, x, mask))
    return (x[0, -1] @ tensors["text_projection"]).numpy()


def _hps_pixels(path):
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    scale = SIDE / max(pixels.shape[1:])
    size = [round(side * scale) for side in pixels.shape[1:]]
    if scale != 1:
        pixels = torch.nn.functional.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    canvas = torch.zeros(3, SIDE, SIDE)
    top, left = (SIDE - size[0]) // 2, (SIDE - size[1]) // 2
    canvas[:, top : top + size[0], left : left + size[1]] = pixels
    return (canvas - 0.5) / 0.5
