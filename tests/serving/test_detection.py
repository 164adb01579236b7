"""Open-vocabulary detectors against transformers used directly: tiny random OWL-ViT, OWLv2 and Grounding DINO."""

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataflow.errors import (
    BadOutputError,
    BadRequestError,
    ConfigError,
    FatalServingError,
    MissingExtraError,
    OutOfMemoryError,
)
from dataflow.operators import ImageEvaluator
from dataflow.runtime.engine import RunOptions
from dataflow.serving.detection import ZeroShotDetectionServing
from dataflow.types import GenerationRequest
from dataflow.utils.storage import FileStorage

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = ["a", "an", "red", "blue", "green", "circle", "square", "star", "orange", "photo", "of"]
SIDE = 32


def clip_tokenizer():
    tokens = ["<|pad|>", "<|startoftext|>", *(f"{word}</w>" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz"]
    tokens += [f"{letter}</w>" for letter in "bcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: number for number, token in enumerate([*tokens, "<|endoftext|>"])}
    merges, known = [], set(vocabulary)
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merge = (parts[-2], parts[-1])
            merges.append(merge)
            parts[-2:] = ["".join(merge)]
            if parts[-1] not in known:
                known.add(parts[-1])
                vocabulary[parts[-1]] = len(vocabulary)
    vocabulary["<|endoftext|>"], last = len(vocabulary), vocabulary.pop("<|endoftext|>")
    vocabulary["<|unused|>"] = last
    return transformers.CLIPTokenizer(
        vocab=vocabulary, merges=merges, model_max_length=10, pad_token="<|pad|>", unk_token="<|endoftext|>"
    )


def save_owl(folder, version):
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    ends = {"bos_token_id": 1, "eos_token_id": len(tokenizer) - 1, "pad_token_id": 0}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 10, **ends}
    vision = {**sizes, "image_size": SIDE, "patch_size": 8}
    kind = {"owlvit": "OwlViT", "owlv2": "Owlv2"}[version]
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, projection_dim=16)
    model = getattr(transformers, f"{kind}ForObjectDetection")(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
        elif "layernorm" not in name and "layer_norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.constant_(model.class_head.logit_shift.bias, -0.1)
    torch.nn.init.constant_(model.class_head.logit_scale.bias, 6.0)
    model.save_pretrained(folder)
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(size={"height": SIDE, "width": SIDE})
    getattr(transformers, f"{kind}Processor")(processor, tokenizer).save_pretrained(folder)
    return folder


def save_dino(folder):
    torch.manual_seed(0)
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    tokens = [special.get(number, f"[unused{number}]") for number in range(1030)] + WORDS + ["##ish"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = transformers.BertTokenizer(vocab=vocabulary)
    backbone = transformers.SwinConfig(
        image_size=SIDE, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 1], window_size=2,
        out_features=["stage2", "stage3"],
    )  # fmt: skip
    text = {
        "model_type": "bert", "vocab_size": len(tokens), "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64,
    }  # fmt: skip
    config = transformers.GroundingDinoConfig(
        backbone_config=backbone, text_config=text, num_queries=20, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
        num_feature_levels=2, max_text_len=32,
    )  # fmt: skip
    model = transformers.GroundingDinoForObjectDetection(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    processor = transformers.GroundingDinoImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64})
    transformers.GroundingDinoProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def owlvit(tmp_path_factory):
    return save_owl(tmp_path_factory.mktemp("owlvit"), "owlvit")


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory):
    pytest.importorskip("scipy")
    return save_owl(tmp_path_factory.mktemp("owlv2"), "owlv2")


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return save_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate([(64, 64), (100, 60), (50, 90)]):
        small = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        path = folder / f"{number}.png"
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
        paths.append(str(path))
    return paths


def request(path, *labels, **params):
    return GenerationRequest(
        request_id="0" * 32, prompt="", images=(path,), seed=0, params={"labels": list(labels), **params}
    )


def detected(serving, requests):
    for each in requests:
        serving.check(each)
    serving.setup()
    try:
        results = asyncio.run(serving.generate(requests))
        return [result.error or json.loads(result.text) for result in results]
    finally:
        serving.cleanup()


def serve(folder, **options):
    return ZeroShotDetectionServing(folder, **{"device": "cpu", "threshold": 0.3, **options})


def flat(found, size):
    """Detections as sorted rows of label, score and edges; the oracle's boxes cut to the picture as well."""
    width, height = size
    rows = []
    for label, score, (x0, y0, x1, y1) in found:
        box = [min(max(x0, 0), width), min(max(y0, 0), height), min(max(x1, 0), width), min(max(y1, 0), height)]
        if box[0] < box[2] and box[1] < box[3]:
            rows.append((label, score, box))
    return sorted(rows, key=lambda row: (row[0], -row[1]))


def same(answer, wanted):
    """Whether a serving's answer holds the oracle's detections, and how many there are."""
    given = [(each["label"], each["score"], each["box"]) for each in answer["detections"]]
    size = answer["width"], answer["height"]
    given, wanted = flat(given, size), flat(wanted, size)
    assert [label for label, _, _ in given] == [label for label, _, _ in wanted]
    assert [score for _, score, _ in given] == pytest.approx([score for _, score, _ in wanted], abs=2e-5)
    assert [box for _, _, box in given] == [pytest.approx(box, abs=0.02) for _, _, box in wanted]
    return len(given)


def one_by_one(folder, kind, path, labels, threshold):
    """transformers itself, by hand: one text at a time, so that none takes a box from another."""
    model = getattr(transformers, f"{kind}ForObjectDetection").from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    processor = getattr(transformers, f"{kind}Processor")(
        getattr(transformers, f"{kind}ImageProcessorPil").from_pretrained(folder), tokenizer
    )
    found = []
    with Image.open(path) as picture, torch.no_grad():
        for label in labels:
            given = processor(text=[[label]], images=picture, return_tensors="pt")
            size = [(picture.height, picture.width)]
            [result] = processor.post_process_grounded_object_detection(
                model(**given), threshold=threshold, target_sizes=size, text_labels=[[label]]
            )
            rows = zip(result["text_labels"], result["scores"].tolist(), result["boxes"].tolist(), strict=True)
            found += list(rows)
    return found


class TestOwls:
    @pytest.mark.parametrize(("version", "kind"), [("owlvit", "OwlViT"), ("owlv2", "Owlv2")])
    def test_equal_transformers_own_post_processing(self, request_of_folder, pictures, version, kind):
        folder = request_of_folder(version)
        asked = [("a red circle", "a circle"), ("a blue star", "a square", "an orange"), ("a green photo",)]
        answers = detected(serve(folder), [request(p, *t) for p, t in zip(pictures, asked, strict=True)])
        counts = [
            same(answer, one_by_one(folder, kind, path, labels, 0.3))
            for answer, path, labels in zip(answers, pictures, asked, strict=True)
        ]
        assert min(counts) > 0
        assert sum(counts) > 6
        assert [(each["width"], each["height"]) for each in answers] == [(64, 64), (100, 60), (50, 90)]

    def test_equal_transformers_pipeline(self, owlvit, pictures):
        labels = ["a red circle", "a blue star"]
        detector = transformers.pipeline(
            "zero-shot-object-detection",
            model=transformers.OwlViTForObjectDetection.from_pretrained(owlvit, dtype=torch.float32),
            tokenizer=transformers.CLIPTokenizer.from_pretrained(owlvit),
            image_processor=transformers.OwlViTImageProcessorPil.from_pretrained(owlvit),
            device="cpu",
        )
        found = detector(Image.open(pictures[1]), candidate_labels=labels, threshold=0.3)
        [answer] = detected(serve(owlvit), [request(pictures[1], *labels)])
        wanted = sorted((each["label"], round(each["score"], 4)) for each in found)
        assert sorted((each["label"], round(each["score"], 4)) for each in answer["detections"]) == wanted
        assert len(wanted) > 2

    def test_a_text_has_the_same_answer_whatever_else_is_asked_and_shares_its_batch(self, owlvit, pictures):
        both, alone, beside = detected(
            serve(owlvit, batch_size=3),
            [
                request(pictures[0], "a red circle", "a circle"),
                request(pictures[0], "a circle"),
                request(pictures[2], "a star", "a blue square", "an orange star"),
            ],
        )
        [by_itself] = detected(serve(owlvit), [request(pictures[2], "a star", "a blue square", "an orange star")])
        same({**both, "detections": [each for each in both["detections"] if each["label"] == "a circle"]},
             [(each["label"], each["score"], each["box"]) for each in alone["detections"]])  # fmt: skip
        same(by_itself, [(each["label"], each["score"], each["box"]) for each in beside["detections"]])

    def test_the_surest_come_first_and_no_more_than_asked_for(self, owlvit, pictures):
        labels = ("a red circle", "a circle")
        everything, few = (
            detected(serve(owlvit, threshold=0.01, **more), [request(pictures[0], *labels)])[0]["detections"]
            for more in ({}, {"max_detections": 3})
        )
        scores = [each["score"] for each in everything]
        assert scores == sorted(scores, reverse=True)
        for label in labels:
            of_label = [each for each in everything if each["label"] == label]
            assert len(of_label) > 3
            assert [each for each in few if each["label"] == label] == of_label[:3]
        assert min(scores) > 0.01

    def test_a_text_that_is_too_long_is_refused(self, owlvit, pictures):
        long = "a red circle " * 4
        [found] = detected(serve(owlvit), [request(pictures[0], "a circle", long)])
        assert isinstance(found, BadRequestError)
        assert found.reason == "not_applicable"
        assert "14 tokens, the model reads 10" in str(found)

    def test_owlv2_says_what_it_needs(self, owlv2, monkeypatch):
        import importlib.util

        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "scipy" else real(name, *a))
        with pytest.raises(MissingExtraError, match="scipy"):
            serve(owlv2).setup()


class TestGroundingDino:
    def direct(self, folder, path, sentence):
        model = transformers.GroundingDinoForObjectDetection.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = transformers.BertTokenizer.from_pretrained(folder)
        processor = transformers.GroundingDinoProcessor(
            transformers.GroundingDinoImageProcessorPil.from_pretrained(folder), tokenizer
        )
        with Image.open(path) as picture, torch.no_grad():
            given = processor(text=sentence, images=picture, return_tensors="pt")
            return processor, tokenizer, given, model(**given), [(picture.height, picture.width)]

    def test_one_word_equals_transformers_own_post_processing(self, dino, pictures):
        processor, _, given, output, size = self.direct(dino, pictures[1], "star.")
        # Of one word alone the greatest token's score is the word's.
        output.logits[..., 2:] = -torch.inf
        output.logits[..., 0] = -torch.inf
        [result] = processor.post_process_grounded_object_detection(
            output, given["input_ids"], threshold=0.3, text_threshold=0.3, target_sizes=size
        )
        wanted = zip(result["text_labels"], result["scores"].tolist(), result["boxes"].tolist(), strict=True)
        [answer] = detected(serve(dino), [request(pictures[1], "star")])
        assert same(answer, list(wanted)) > 0

    def test_several_texts_are_the_means_over_their_tokens(self, dino, pictures):
        labels = ("A red circle", "orangeish", "blue square")
        _, tokenizer, given, output, size = self.direct(dino, pictures[2], "a red circle. orangeish. blue square.")
        words = tokenizer.convert_ids_to_tokens(given["input_ids"][0])
        assert words == ["[CLS]", "a", "red", "circle", ".", "orange", "##ish", ".", "blue", "square", ".", "[SEP]"]
        shares = output.logits[0].sigmoid()
        wanted = []
        height, width = size[0]
        for label, tokens in zip(labels, ((1, 2, 3), (5, 6), (8, 9)), strict=True):
            means = shares[:, list(tokens)].mean(-1)
            for score, (x, y, w, h) in zip(means.tolist(), output.pred_boxes[0].tolist(), strict=True):
                if score > 0.3:
                    edges = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
                    wanted.append((label, score, edges))
        [answer] = detected(serve(dino), [request(pictures[2], *labels)])
        assert same(answer, wanted) > 2
        assert {each["label"] for each in answer["detections"]} <= set(labels)

    def test_what_shares_a_batch_changes_nothing(self, dino, pictures):
        asked = [request(p, "a red circle", "star") for p in pictures] + [request(pictures[0], "square")] * 2
        together = detected(serve(dino, batch_size=5), asked)
        for answer, each in zip(together, asked, strict=True):
            [alone] = detected(serve(dino), [each])
            assert same(answer, [(one["label"], one["score"], one["box"]) for one in alone["detections"]]) > 0

    @pytest.mark.parametrize(
        ("labels", "message"),
        [(["a circle. star"], "full stop"), (["red circle", f"star {'a ' * 9}", "a " * 20], "37 tokens")],
    )
    def test_texts_that_cannot_be_asked(self, dino, pictures, labels, message):
        [found] = detected(serve(dino), [request(pictures[0], *labels)])
        assert isinstance(found, BadRequestError)
        assert found.reason == "not_applicable"
        assert message in str(found)


@pytest.fixture
def request_of_folder(request):
    return request.getfixturevalue


class TestServing:
    def test_one_bad_picture_fails_alone(self, owlvit, pictures, tmp_path):
        half = tmp_path / "half.png"
        half.write_bytes(Path(pictures[0]).read_bytes()[:80])
        asked = [request(str(half), "a star"), request(pictures[0], "a star"), request(str(tmp_path / "x"), "a star")]
        found = detected(serve(owlvit, threshold=0.01), asked)
        assert [found[0].reason, found[2].reason] == ["image_truncated", "image_missing"]
        assert found[1]["detections"]

    def test_numbers_that_are_none_are_no_detections(self, owlvit, pictures, monkeypatch):
        serving = serve(owlvit)
        serving.setup()
        torch.nn.init.constant_(serving._detector._model.class_head.logit_shift.bias, float("nan"))
        [found] = serving.score([request(pictures[0], "a star")])
        serving.cleanup()
        assert isinstance(found, BadOutputError)

    def test_memory_that_does_not_suffice_is_the_engines_to_handle(self, owlvit, pictures, monkeypatch):
        serving = serve(owlvit)
        serving.setup()

        def full(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(serving._detector._model, "forward", full)
        with pytest.raises(OutOfMemoryError):
            serving.score([request(pictures[0], "a star")])
        serving.cleanup()

    def test_through_the_engine_with_texts_of_its_own(self, owlvit, pictures, tmp_path):
        table = tmp_path / "in.jsonl"
        table.write_text(json.dumps({"images": pictures}) + "\n")
        storage = FileStorage(str(table), cache_path=str(tmp_path / "cache"))
        serving = serve(owlvit, labels=["a red circle"], batch_size=2)
        ImageEvaluator(serving, options=RunOptions(quiet=True)).run(storage.step(), output_key="found")
        row = json.loads(storage.output_path.read_text())
        assert row["found_status"] == ["ok"] * 3
        assert [each["width"] for each in row["found"]] == [64, 100, 50]
        assert row["found_by"].startswith("local#")

    def test_it_is_sent_without_its_weights(self, owlvit, pictures):
        serving = serve(owlvit)
        serving.setup()
        twin = pickle.loads(pickle.dumps(serving))
        assert len(pickle.dumps(serving)) < 2000
        assert twin.fingerprint() == serving.fingerprint()
        [one] = serving.score([request(pictures[0], "a star")])
        assert detected(twin, [request(pictures[0], "a star")]) == [json.loads(json.dumps(one))]
        serving.setup()
        serving.cleanup()
        with pytest.raises(FatalServingError, match="set up"):
            serving.score([request(pictures[0], "a star")])

    def test_the_fingerprint_names_what_makes_the_answer(self, owlvit, owlv2):
        known = serve(owlvit).fingerprint()
        assert serve(owlvit, batch_size=3, device="cuda:0", threads=1).fingerprint() == known
        for other in (serve(owlv2), serve(owlvit, threshold=0.2), serve(owlvit, dtype="bf16")):
            assert other.fingerprint() != known

    def test_one_copy_on_each_device(self, owlvit):
        assert [each.device for each in serve(owlvit, device=["cuda:0", "cuda:1"]).replicas()] == ["cuda:0", "cuda:1"]
        alone = serve(owlvit)
        assert alone.replicas() == [alone]

    def test_requests_that_can_never_work(self, owlvit):
        serving = serve(owlvit)
        for labels in ([], [""], "a star", [3], None):
            with pytest.raises(BadRequestError, match="labels"):
                serving.check(
                    GenerationRequest(request_id="", prompt="", images=("a",), seed=0, params={"labels": labels})
                )
        with pytest.raises(BadRequestError, match="picture"):
            serving.check(GenerationRequest(request_id="", prompt="", seed=0, params={"labels": ["a"]}))

    @pytest.mark.parametrize(
        "options",
        [
            {"threshold": 0},
            {"threshold": 1.5},
            {"max_detections": 0},
            {"batch_size": 0},
            {"dtype": "int8"},
            {"labels": "a star"},
            {"labels": [""]},
        ],
    )
    def test_settings_that_make_no_sense(self, options):
        with pytest.raises(ConfigError):
            serve("folder", **options)

    def test_models_that_are_none(self, tmp_path, owlvit):
        with pytest.raises(ConfigError):
            serve(tmp_path / "gone").fingerprint()
        other = tmp_path / "vit"
        transformers.ViTModel(
            transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        ).save_pretrained(other)
        with pytest.raises(ConfigError, match="is vit; detectors are owlvit"):
            serve(other).setup()
        broken = tmp_path / "broken"
        broken.mkdir()
        for file in owlvit.iterdir():
            (broken / file.name).write_bytes(file.read_bytes() if file.suffix != ".safetensors" else b"none")
        with pytest.raises(FatalServingError, match="cannot be loaded"):
            serve(broken).setup()
