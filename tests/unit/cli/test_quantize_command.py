"""`verl-aqn quantize` in this process: a table, JSON, a picture, and a one-line message for every mistake."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from verl_aqn.cli import main as cli
from verl_aqn.tasks.smollm2 import tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def quantize(monkeypatch, capsys):
    """`quantize(*arguments)` → (exit code, standard output, standard error)."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["verl-aqn", "quantize", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_table_and_exclusions(quantize, source, tmp_path):
    code, out, err = quantize(source, tmp_path / "a", "--exclude", "o_proj", "--exclude", "model.layers.0.mlp.*")
    assert (code, err) == (0, "")
    for word in ("model.layers.0.self_attn.q_proj", "scale bias", "grid noise", "deadzone", "clipped", "SQNR"):
        assert word in out
    table, left = out.split("kept in 16 bits: ")
    assert "o_proj" not in table
    assert "layers.0.mlp" not in table
    assert "model.layers.*.self_attn.o_proj (2)" in left
    assert {"lm_head", "model.layers.*.mlp.up_proj"} <= set(left.replace(";", ",").split(", "))
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert {"lm_head", "model.layers.0.self_attn.o_proj"} <= set(config["quantization_config"]["ignore"])


def test_json_and_picture(quantize, source, tmp_path):
    _, out, _ = quantize(source, tmp_path / "a", "--json", "--format", "modelslim", "--plot", tmp_path / "a.svg")
    report = json.loads(out)
    for part in (report, *report["modules"]):
        parts = [part[name] for name in ("deadzone", "clipped", "scale_bias", "grid_noise")]
        assert sum(parts) == pytest.approx(part["noise"], rel=1e-12)
        assert 0 < part["deadzone_share"] < 0.2
    assert (tmp_path / "a/quant_model_description.json").is_file()
    picture = (tmp_path / "a.svg").read_text()
    assert picture.count("<path") > 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--exclude", "nothing"), "exclude has 'nothing', which matches no module"),
        (("--format", "gguf"), "use one of compressed-tensors, modelslim"),
        (("--scale-rule", "best"), "use one of mse, even, floor, rceil"),
        (("--plot", "picture.docx"), "cannot write a picture to picture.docx"),
    ],
)
def test_mistakes_are_one_line(quantize, source, tmp_path, arguments, words):
    code, out, err = quantize(source, tmp_path / "b", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("long", [("--calibrate", "embedded"), ("--keep-worst", "0.1")])
@pytest.mark.parametrize("wrong", [("--format", "gguf"), ("--scale-rule", "best"), ()])
def test_mistakes_are_told_before_the_long_work(quantize, source, tmp_path, monkeypatch, long, wrong):
    for name in ("gptq.quantize_with_gptq", "packing.quantize_checkpoint"):
        monkeypatch.setattr(f"verl_aqn.checkpoints.{name}", lambda *_, **__: pytest.fail("began to work"))
    (tmp_path / "b").mkdir()
    code, out, err = quantize(source, tmp_path / "b", *long, *wrong)
    assert (code, out, err.count("\n")) == (2 if wrong else 1, "", 1)
    assert ("use one of" if wrong else f"{tmp_path / 'b'} already exists: remove it or choose another folder") in err


def test_converts_what_is_mxfp4_already(quantize, source, tmp_path):
    packed, theirs = tmp_path / "packed", tmp_path / "quark"
    quantize(source, packed, "--json")
    theirs.mkdir()
    config = json.loads((packed / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "quark"}}))
    tensors = load_file(packed / "model.safetensors")
    save_file({name.replace("weight_packed", "weight"): t for name, t in tensors.items()}, theirs / "model.safetensors")
    _, out, _ = quantize(theirs, tmp_path / "out")
    assert "quark is already MXFP4 (quark): 14 modules converted bit for bit" in out
    assert (tmp_path / "out/model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()
    _, out, _ = quantize(theirs, tmp_path / "again", "--json")
    report = json.loads(out)
    assert (report["imported"], report["modules"]) == ("quark", 14)
    code, _, err = quantize(theirs, tmp_path / "more", "--scale-rule", "even")
    assert (code, "remove --exclude, --plot, --calibrate, --keep-worst and --scale-rule" in err) == (2, True)
    code, _, err = quantize(theirs, tmp_path / "more", "--exclude", "o_proj")
    assert (code, "remove --exclude" in err) == (2, True)
