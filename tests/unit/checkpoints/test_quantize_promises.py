"""Folders that `quantize` publishes can be loaded here and in vLLM; others are rejected by name, in one line."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.helpers.tiny_configs import SMALL, SMALL_ASCEND
from verl_aqn.checkpoints import packing as checkpoint
from verl_aqn.checkpoints import promises
from verl_aqn.checkpoints.foreign import import_checkpoint
from verl_aqn.checkpoints.loading import load_model
from verl_aqn.checkpoints.packing import checkpoint_digest, quantize_checkpoint
from verl_aqn.checkpoints.writing import new_folder
from verl_aqn.errors import AqnError, ConfigError, EnvironmentFault, ModelError
from verl_aqn.mxfp4.codec import fake_quantize, quantize
from verl_aqn.mxfp4.linear import Mxfp4Linear

LAYER = "model.layers.0."


def make(folder: Path, dtype: torch.dtype = torch.float32, **config) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL_ASCEND | config), dtype=dtype).save_pretrained(folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "source")


def change(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config) -> None:
    if tensors:
        file = folder / "model.safetensors"
        save_file(load_file(file) | tensors, file)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def refused(kind: type[AqnError], match: str, function, *arguments, **more) -> None:
    with pytest.raises(kind, match=match) as caught:
        function(*arguments, **more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("exclude", "others"),
    [
        (("q_proj",), "k_proj, q_proj, v_proj"),
        (("q_proj", "k_proj"), "k_proj, q_proj, v_proj"),
        (("model.layers.1.mlp.up_proj",), "gate_proj, up_proj"),
    ],
)
def test_fused_layers_agree(source: Path, tmp_path: Path, exclude, others) -> None:
    refused(
        ConfigError,
        f"{others}, which vLLM fuses into one layer: exclude all of them .--exclude {others.split(', ')[0]} ",
        quantize_checkpoint,
        source,
        tmp_path / "out",
        exclude=exclude,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    quantize_checkpoint(
        source,
        tmp_path / "out",
        exclude=("lm_head", "q_proj", "k_proj", "v_proj", "model.layers.1.mlp.*"),
    )


def test_layers_that_do_not_fit_are_named_together(tmp_path: Path) -> None:
    source = make(tmp_path / "source", hidden_size=48, num_attention_heads=4, head_dim=16)
    wanted = [f"--exclude {name}_proj" for name in ("gate", "k", "q", "up", "v")]
    refused(ModelError, f"has 48 inputs.*{' '.join(wanted)}", quantize_checkpoint, source, tmp_path / "out")
    exclude = ("lm_head", *(text.removeprefix("--exclude ") for text in wanted))
    assert len(quantize_checkpoint(source, tmp_path / "out", exclude=exclude).modules) == 4


def test_what_the_loader_refuses_gets_no_name(source: Path, tmp_path: Path, monkeypatch) -> None:
    def renamed(*arguments):
        config, extra = finish(*arguments)
        return config | {"intermediate_size": 64}, extra

    finish = checkpoint.finish
    monkeypatch.setattr(checkpoint, "finish", renamed)
    out = tmp_path / "out"
    refused(ModelError, f"{out} was not created, .*weights of {out} do not fit", quantize_checkpoint, source, out)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_structure_is_checked_without_values(source: Path, tmp_path: Path, monkeypatch) -> None:
    quantize_checkpoint(source, tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    file.chmod(0o600)
    size = file.stat().st_size
    with file.open("r+b") as stream:  # the values are missing, the header exists
        header = 8 + int.from_bytes(stream.read(8), "little")
        stream.truncate(header)
        stream.truncate(size)
    model = load_model(tmp_path / "out", device="meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_a_tied_config_with_another_head(tmp_path: Path) -> None:
    source = make(tmp_path / "source", tie_word_embeddings=False)
    change(source, tie_word_embeddings=True)
    refused(
        ModelError, "ties lm_head.weight to model.embed_tokens.weight", quantize_checkpoint, source, tmp_path / "out"
    )
    change(source, {"lm_head.weight": load_file(source / "model.safetensors")["model.embed_tokens.weight"].clone()})
    quantize_checkpoint(source, tmp_path / "out")  # stored twice, but the same
    load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "NaN or Inf"),
        (float("-inf"), "NaN or Inf"),
        (3.4e38, "values beyond the range of torch.bfloat16"),
    ],
)
def test_kept_tensors_are_finite(source: Path, tmp_path: Path, value: float, words: str) -> None:
    weight = torch.ones(64)
    weight[7] = value
    change(source, {"model.norm.weight": weight})
    match = rf"tensor model\.norm\.weight of .*model\.safetensors contains {words}"
    refused(ModelError, match, quantize_checkpoint, source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_null_is_no_quantization(source: Path, tmp_path: Path) -> None:
    change(source, quantization_config=None)
    quantize_checkpoint(source, tmp_path / "out")
    load_model(tmp_path / "out")


def test_modelslim_as_a_source(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "slim", format="modelslim")
    quantize_checkpoint(source, tmp_path / "packed")
    refused(ModelError, r"is already MXFP4 \(modelslim\)", quantize_checkpoint, tmp_path / "slim", tmp_path / "out")
    assert import_checkpoint(tmp_path / "slim", tmp_path / "out").imported == "modelslim"
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()
    assert not (tmp_path / "out/quant_model_description.json").exists()
    description = tmp_path / "slim/quant_model_description.json"
    name = LAYER + "mlp.up_proj.weight"
    description.write_text(json.dumps(json.loads(description.read_text()) | {name: "W8A8"}))
    refused(ModelError, f"has {name} in W8A8", import_checkpoint, tmp_path / "slim", tmp_path / "again")


@pytest.mark.parametrize("name", ["self_attn.k_scale", "self_attn.q_proj.input_scale"])
@pytest.mark.parametrize("format", ["compressed-tensors", "modelslim"])
def test_extra_scales_are_never_kept_unseen(source: Path, tmp_path: Path, name: str, format: str) -> None:
    quantize_checkpoint(source, tmp_path / "packed")
    theirs = tmp_path / "packed"
    tensors = {n.replace("weight_packed", "weight"): t for n, t in load_file(theirs / "model.safetensors").items()}
    save_file(tensors | {LAYER + name: torch.ones(1)}, theirs / "model.safetensors")
    change(theirs, quantization_config={"quant_method": "quark"})
    refused(
        ModelError, f"tensor {LAYER}{name} .* is not a weight of", import_checkpoint, theirs, tmp_path / "out", format
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "source"]


def test_a_quantised_kv_cache_is_refused(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "packed")
    config = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    change(tmp_path / "packed", quantization_config=config | {"kv_cache_scheme": {"num_bits": 8}})
    refused(ModelError, "asks for a quantised KV cache", load_model, tmp_path / "packed")


def test_destinations_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(ModelError, "link already exists", quantize_checkpoint, source, tmp_path / "link")
    (tmp_path / "file").write_text("")
    refused(EnvironmentFault, r"cannot write .*file/out \(", quantize_checkpoint, source, tmp_path / "file/out")
    refused(EnvironmentFault, r"cannot write /proc/nowhere/out \(", quantize_checkpoint, source, "/proc/nowhere/out")
    refused(
        EnvironmentFault, r"cannot write .*\(File name too long", quantize_checkpoint, source, tmp_path / ("x" * 250)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "source"]


def test_no_room(source: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        refused(
            EnvironmentFault, r"cannot write .*out \(File too large\)", quantize_checkpoint, source, tmp_path / "out"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_errors_of_other_files_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out"):
        (tmp_path / "elsewhere/file").read_text()
    assert not list(tmp_path.iterdir())


def test_a_name_with_glob_characters(tmp_path: Path) -> None:
    other = tmp_path / ".ab.12345678.tmp"
    other.mkdir()
    (other / ".lock").write_text("")  # looks like a dead writer's folder, but for another target
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a[b]"):
            1 / 0  # noqa: B018
        assert other.is_dir()
    leftover = tmp_path / ".a[b].12345678.tmp"
    leftover.mkdir()
    (leftover / ".lock").write_text("")
    with new_folder(tmp_path / "a[b]"):
        assert not leftover.exists()
    with new_folder(tmp_path / "a*"):
        assert other.is_dir()


def test_negative_views_and_rows() -> None:
    x = torch.randn(2, 64)
    negative = torch._neg_view(x)
    assert negative.is_neg()
    for a, b in zip(quantize(negative), quantize(-x), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(fake_quantize(negative), fake_quantize(-x))
    layer = Mxfp4Linear.from_linear(torch.nn.Linear(64, 8))
    layer(x[0]).sum().backward()
    assert torch.equal(layer.bias.grad, torch.ones(8))


def test_the_report_says_what_is_left(source: Path, tmp_path: Path) -> None:
    report = quantize_checkpoint(source, tmp_path / "out", exclude=("lm_head", "o_proj"))
    assert report.left == ("lm_head", LAYER + "self_attn.o_proj", "model.layers.1.self_attn.o_proj")
    assert json.loads((tmp_path / "out/quantization.json").read_text())["left_in_16_bits"] == list(report.left)
    assert checkpoint_digest(tmp_path / "out") == report.base_digest
    assert SMALL["num_hidden_layers"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 1000, 70_000])
def test_every_value_is_checked(size: int, dtype: torch.dtype) -> None:
    """Also where a vector of the CPU ends, and on every thread."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert promises._is_finite(x)
    assert promises._is_finite(x[:0])
    for place in {0, size // 3, size // 2, size - 1}:
        for value in (float("nan"), float("inf"), float("-inf")):
            broken = x.clone()
            broken[place] = value
            assert not promises._is_finite(broken)
