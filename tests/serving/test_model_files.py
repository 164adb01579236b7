import json
import struct
import sys
import types

import pytest

from dataflow.errors import ConfigError, MissingExtraError
from dataflow.serving import model_files
from dataflow.serving.model_files import ModelFiles

COMMIT, OTHER = "a" * 40, "b" * 40
INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
}


def safetensors(tensors):
    """The format by hand: header length, header, data."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(tensors.values())


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "model"
    for name in model_files.components(INDEX):
        (root / name).mkdir(parents=True)
    (root / "model_index.json").write_text(json.dumps(INDEX))
    (root / "scheduler/scheduler_config.json").write_text("{}")
    (root / "tokenizer/vocab.json").write_text("{}")
    for name in ("transformer", "vae"):
        (root / name / "config.json").write_text("{}")
        (root / name / "diffusion_pytorch_model.safetensors").write_bytes(safetensors({"w": bytes(3000)}))
    return root


def local(path):
    return ModelFiles(name=str(path), folder=path)


# Local folders


def test_a_local_folder_loads_as_it_is(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not even asked for
    files = model_files.locate(folder)
    assert (files.folder, files.hub, files.revision) == (folder, False, "")
    index = model_files.read_index(files)
    assert index == INDEX
    assert model_files.fetch(files, index) == folder
    assert model_files.read_manifest(files) == {}
    monkeypatch.chdir(folder.parent)
    assert model_files.locate("model").folder == folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin:nothing", "no built-in model 'builtin:nothing'"),
        ("./no/such/folder", "there is no such folder"),
        ("FLUX.1-dev", "no hub id"),
        ("a/b/c", "no hub id"),
        ("", "there is no such folder|not a diffusers pipeline"),
        ("file.safetensors", "is a file; name the folder"),
    ],
)
def test_names_that_mean_nothing(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=message):
        model_files.read_index(model_files.locate(name))


def test_builtin_models_are_folders_of_the_package(folder, monkeypatch):
    monkeypatch.setattr(model_files, "_BUILTIN_ROOT", folder.parent)
    assert model_files.builtin_models() == ["builtin:model"]
    files = model_files.locate("builtin:model")
    assert (files.name, files.folder) == ("builtin:model", folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a diffusers pipeline"),
        ("{", "cannot be read"),
        ("[]", "JSON object"),
        ("{}", "names no pipeline class"),
    ],
)
def test_folders_without_a_usable_index(content, message, tmp_path):
    if content is not None:
        (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        model_files.read_index(local(tmp_path))


def test_the_default_model_has_a_folder():
    assert model_files.BUILTIN_FOLDER.name == "tiny-flux"


def test_manifest(folder):
    (folder / "dataflow.json").write_text('{"text2image": {"height": 64}}')
    assert model_files.read_manifest(local(folder)) == {"text2image": {"height": 64}}
    (folder / "dataflow.json").write_text('{"imageedit": 3}')
    with pytest.raises(ConfigError, match="'imageedit' must be an object"):
        model_files.read_manifest(local(folder))


def shard(folder, present):
    part = folder / "transformer"
    (part / "diffusion_pytorch_model.safetensors").unlink()
    shards = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    (part / "m.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for name in present:
        (part / name).write_bytes(b"")


def test_whole_sharded_weights(folder):
    shard(folder, ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"])
    model_files.check_components(folder, INDEX)


def test_a_listing_of_another_format_is_no_lack(folder):
    shard(folder, ["m.fp16.safetensors"])
    model_files.check_components(folder, INDEX)


@pytest.mark.parametrize("present", [[], ["m-00001-of-00002.safetensors"]])
def test_missing_shards(folder, present):
    shard(folder, present)
    with pytest.raises(ConfigError, match=r"transformer is incomplete: \d of its weight files are missing"):
        model_files.check_components(folder, INDEX)


def test_missing_weights(folder):
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="vae has no weights"):
        model_files.fetch(local(folder), INDEX)


def test_missing_component(folder):
    (folder / "scheduler/scheduler_config.json").unlink()
    (folder / "scheduler").rmdir()
    with pytest.raises(ConfigError, match=r"component 'scheduler' \(FlowMatchEulerDiscreteScheduler\) has no folder"):
        model_files.fetch(local(folder), INDEX)


# What the files are


def test_the_digest_is_of_contents_not_of_places(folder):
    first = model_files.digest(folder, INDEX)
    assert len(first) == 32
    moved = folder.rename(folder.with_name("elsewhere"))
    (moved / "README.md").write_text("a card")
    (moved / "dataflow.json").write_text("{}")
    (moved / "big.safetensors").write_bytes(b"not a part")
    assert model_files.digest(moved, INDEX) == first
    path = moved / "vae/diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert model_files.digest(moved, INDEX) != first


def test_large_files_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "FULL_HASH_BYTES", 1000)
    path = tmp_path / "m.safetensors"
    tensors = {"a": bytes(5000), "b": bytes(100), "c": bytes(7000)}
    path.write_bytes(safetensors(tensors))
    plain = model_files.file_digest(path)
    for name in tensors:
        changed = dict(tensors)
        data = bytearray(changed[name])
        data[len(data) // 2] = 1
        path.write_bytes(safetensors(changed | {name: bytes(data)}))
        assert model_files.file_digest(path) != plain, name
    path.write_bytes(safetensors({"renamed": tensors["a"], "b": tensors["b"], "c": tensors["c"]}))
    assert model_files.file_digest(path) != plain


@pytest.mark.parametrize("name", ["weights.bin", "broken.safetensors", "short.safetensors"])
def test_other_large_files_are_sampled_too(tmp_path, monkeypatch, name):
    monkeypatch.setattr(model_files, "FULL_HASH_BYTES", 1000)
    head = {"weights.bin": b"\1", "broken.safetensors": struct.pack("<Q", 5) + b"nojsn"}.get(name, b"\xff" * 8)
    path = tmp_path / name
    path.write_bytes(head + bytes(9000))
    plain = model_files.file_digest(path)
    path.write_bytes(head + bytes(8999) + b"\1")
    assert model_files.file_digest(path) != plain


def test_an_unreadable_part(folder):
    (folder / "model_index.json").unlink()
    with pytest.raises(ConfigError, match=r"model_index\.json cannot be read"):
        model_files.digest(folder, INDEX)


def test_adapters(tmp_path):
    (tmp_path / "x").mkdir()
    file = tmp_path / "x/one.safetensors"
    file.write_bytes(b"one")
    by_file = model_files.adapter_identity(model_files.locate_adapter(str(file)))
    by_folder = model_files.adapter_identity(model_files.locate_adapter(str(tmp_path / "x")))
    file.write_bytes(b"two")
    assert model_files.adapter_identity(model_files.locate_adapter(str(file))) != by_file
    assert model_files.adapter_identity(model_files.locate_adapter(str(tmp_path / "x"))) != by_folder
    hub = ModelFiles(name="org/lora", hub=True, revision=COMMIT)
    assert model_files.adapter_identity(hub) == f"org/lora@{COMMIT}"
    with pytest.raises(ConfigError, match="no LoRA 'nothing'"):
        model_files.locate_adapter("nothing")


def test_needed_files():
    names = ["model_index.json", "dataflow.json", "README.md", "flux1-dev.safetensors", "ae.safetensors"]
    names += ["scheduler/scheduler_config.json", "tokenizer/vocab.json", "transformer/config.json"]
    names += ["transformer/m-00001-of-00002.safetensors", "transformer/m-00002-of-00002.safetensors"]
    names += ["transformer/m.safetensors.index.json", "vae/config.json", "vae/m.safetensors", "vae/m.fp16.safetensors"]
    names += ["vae/m.bin", "vae/m.fp16.bin", "text_encoder_9/model.safetensors", "safety_checker/m.bin"]
    common = {"model_index.json", "dataflow.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"}
    common |= {name for name in names if name.startswith("transformer/")} | {"vae/config.json"}
    assert set(model_files.needed_files(names, INDEX)) == common | {"vae/m.safetensors"}
    assert set(model_files.needed_files(names, INDEX, variant="fp16")) == common | {"vae/m.fp16.safetensors"}


def test_needed_files_of_other_shapes():
    index = {"_class_name": "X", "unet": ["diffusers", "UNet"]}
    bins = ["unet/config.json", "unet/m.bin", "unet/m.fp16.bin"]
    assert model_files.needed_files(bins, index) == ["unet/config.json", "unet/m.bin"]
    only = ["unet/m.fp16-00001-of-00002.safetensors", "unet/m.safetensors.index.fp16.json"]
    assert model_files.needed_files(only, index) == only
    assert model_files.needed_files(["unet/m-00001-of-00002.fp16.bin", "unet/m.bin"], index, variant="fp16") == [
        "unet/m-00001-of-00002.fp16.bin"
    ]


# The Hub, played by a fake with the same interface


class FakeHub(types.ModuleType):
    def __init__(self, source, errors):
        super().__init__("huggingface_hub")
        self.source, self.errors, self.asked = source, errors, []
        self.constants = types.SimpleNamespace(HF_HUB_CACHE=str(source.parent / "cache"))
        self.error = None
        self.HfApi = lambda: self

    def model_info(self, name, *, revision):
        self.asked.append(("info", name, revision))
        if self.error is not None:
            raise self.error
        names = [str(path.relative_to(self.source)) for path in self.source.rglob("*") if path.is_file()]
        siblings = [types.SimpleNamespace(rfilename=name) for name in names]
        return types.SimpleNamespace(sha=COMMIT, siblings=siblings)

    def hf_hub_download(self, name, file, *, revision, cache_dir, local_dir, local_files_only):
        self.asked.append(("file", file, revision))
        if self.error is not None:
            raise self.error
        if not (self.source / file).is_file():
            raise self.errors.EntryNotFoundError(file)
        return self._copy([file], local_dir)[0]

    def snapshot_download(self, name, *, revision, cache_dir, local_dir, allow_patterns, local_files_only):
        self.asked.append(("snapshot", name, revision))
        if self.error is not None:
            raise self.error
        if not local_files_only:
            self._copy(allow_patterns, local_dir)
        return str(local_dir or self.source)

    def _copy(self, names, local_dir):
        paths = []
        for name in names:
            paths.append((local_dir or self.source) / name)
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            paths[-1].write_bytes((self.source / name).read_bytes())
        return paths


@pytest.fixture
def hub(folder, monkeypatch):
    errors = pytest.importorskip("huggingface_hub.errors")
    fake = FakeHub(folder, errors)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return fake


def hub_error(hub, name):
    """An error of the hub client without the HTTP reply its constructor wants."""
    kind = getattr(hub.errors, name)
    error = kind.__new__(kind)
    error.args = (f"{name} happened",)
    return error


def test_a_hub_model_gets_a_folder_per_model_and_commit(hub, tmp_path):
    (hub.source / "dataflow.json").write_text("{}")
    (hub.source / "single.safetensors").write_bytes(b"all of it again")
    files = model_files.locate("org/name", local_dir=tmp_path / "ckpt", cache_dir=tmp_path / "cache")
    assert files.folder == tmp_path / "ckpt/org--name" / COMMIT
    assert files.revision == COMMIT
    index = model_files.read_index(files)
    assert model_files.read_manifest(files) == {}
    assert model_files.fetch(files, index) == files.folder
    assert not (files.folder / "single.safetensors").exists()
    assert (files.folder / "vae/diffusion_pytorch_model.safetensors").is_file()

    hub.asked.clear()
    assert model_files.fetch(files, index) == files.folder
    assert hub.asked == [], "a complete folder is not fetched again"
    model_files.fetch(files, index, variant="fp16")
    assert hub.asked != [], "another variant may be other files"

    hub.error = OSError("no route")
    again = model_files.locate("org/name", local_dir=tmp_path / "ckpt", cache_dir=tmp_path / "cache")
    assert again.revision == COMMIT
    assert again.offline
    assert model_files.read_index(again) == INDEX
    assert model_files.fetch(again, index) == files.folder


def test_without_a_local_folder_the_hubs_cache_keeps_the_files(hub):
    files = model_files.locate("org/name")
    assert files.folder is None
    assert model_files.fetch(files, model_files.read_index(files)) == hub.source
    assert model_files.read_manifest(files) == {}


def test_offline_the_cache_says_the_commit(hub, tmp_path):
    ref = tmp_path / "cache/models--org--name/refs/main"
    ref.parent.mkdir(parents=True)
    ref.write_text(OTHER)
    files = model_files.locate("org/name", cache_dir=tmp_path / "cache", local_files_only=True)
    assert files.revision == OTHER
    assert hub.asked == []
    assert model_files.read_manifest(files) == {}
    assert model_files.fetch(files, INDEX) == hub.source
    assert ("snapshot", "org/name", OTHER) in hub.asked


def test_a_commit_is_not_asked_for(hub):
    assert model_files.locate("org/name", revision=OTHER).revision == OTHER
    assert hub.asked == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "is gated: accept its terms at https://huggingface.co/org/name and log in"),
        ("RepositoryNotFoundError", "there is no model 'org/name' on the Hub"),
        ("RevisionNotFoundError", "has no revision 'v9'"),
        ("HfHubHTTPError", "org/name@v9 is not on this machine and the Hub cannot be asked .*Tried: .*refs/v9"),
        ("OfflineModeIsEnabled", "Name a local folder, download it where there is a network, or use builtin:tiny-flux"),
    ],
)
def test_what_can_go_wrong_on_the_hub(hub, error, message):
    hub.error = hub_error(hub, error)
    with pytest.raises(ConfigError, match=message):
        model_files.locate("org/name", revision="v9")


def test_files_that_cannot_be_fetched(hub):
    files = model_files.locate("org/name")
    hub.error = hub_error(hub, "HfHubHTTPError")
    for ask in (model_files.read_index, model_files.read_manifest, lambda f: model_files.fetch(f, INDEX)):
        with pytest.raises(ConfigError, match=r"org/name at a+ cannot be fetched .*HfHubHTTPError"):
            ask(files)
    hub.error = hub_error(hub, "LocalEntryNotFoundError")
    with pytest.raises(ConfigError, match="cannot be fetched"):
        model_files.read_manifest(files)
    offline = ModelFiles(name="org/name", hub=True, revision=COMMIT, offline=True)
    assert model_files.read_manifest(offline) == {}
    with pytest.raises(ConfigError, match="cannot be fetched"):
        model_files.read_index(offline)


def test_a_repository_that_is_no_pipeline(hub):
    (hub.source / "model_index.json").unlink()
    with pytest.raises(ConfigError, match="org/name is not a diffusers pipeline"):
        model_files.read_index(model_files.locate("org/name"))


def test_an_adapter_on_the_hub(hub):
    assert model_files.locate_adapter("org/lora").revision == COMMIT


def test_without_the_hub_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"open-dataflow\[local\]"):
        model_files.locate("org/name")


def test_the_real_client_with_what_it_left_in_its_cache(folder, tmp_path):
    """The same through the installed huggingface_hub: its offline mode over its own cache layout."""
    pytest.importorskip("huggingface_hub")
    cache = tmp_path / "cache"
    repo = cache / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(COMMIT)
    (repo / "snapshots").mkdir()
    folder.rename(repo / "snapshots" / COMMIT)
    files = model_files.locate("org/name", cache_dir=cache)
    assert (files.revision, files.offline) == (COMMIT, True)
    index = model_files.read_index(files)
    assert index == INDEX
    assert model_files.read_manifest(files) == {}
    assert model_files.fetch(files, index) == repo / "snapshots" / COMMIT
    with pytest.raises(ConfigError, match=r"org/other@main is not on this machine .*OfflineModeIsEnabled"):
        model_files.locate("org/other", cache_dir=cache)
