"""The quality benchmark: one pass over a random model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.command import one_line, run
from verl_aqn.bench import quality
from verl_aqn.checkpoints.calibrate import conversations
from verl_aqn.errors import ConfigError, ModelError
from verl_aqn.tasks.smollm2 import tiny_model


def loss_of(model: Path, sequences: int) -> float:
    """Return the mean next-token loss in nats of the first test texts, by transformers' own loss."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = conversations(tokenizer, sequences, "test", 0)
    tokens = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in texts]
    tokens = [ids[:, : quality.LENGTH] for ids in tokens]
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    with torch.inference_mode():
        sums = [original(ids, labels=ids).loss.item() * (ids.shape[1] - 1) for ids in tokens]
    return sum(sums) / sum(ids.shape[1] - 1 for ids in tokens)


def test_every_variant_of_a_tiny_model(tmp_path, capsys):
    model = tiny_model(tmp_path / "tiny")
    rows = quality.measure(model, 4, 3, ["gptq", "even", "keep-sqnr"], "embedded", ["embedded"])
    assert [row["variant"] for row in rows] == ["bf16", "mse", "even", "gptq", "keep-sqnr"]
    by_name = {row["variant"]: row for row in json.loads(json.dumps(rows))}
    assert by_name["bf16"]["loss"] == pytest.approx(loss_of(model, 3), rel=1e-3)
    for name, other in (("mse", "bf16"), ("gptq", "mse")):
        difference, low, high = by_name[name][f"loss_minus_{other}"]
        assert low <= difference <= high
        assert difference == pytest.approx(by_name[name]["loss"] - by_name[other]["loss"])
    assert 0 < by_name["gptq"]["kl"][0] < by_name["mse"]["kl"][0]
    assert by_name["mse"]["bytes"] == by_name["gptq"]["bytes"] < by_name["keep-sqnr"]["bytes"]
    assert by_name["keep-sqnr"]["bytes"] < by_name["bf16"]["bytes"]
    quality.print_table(rows, "title")
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if "[" in line] == list(by_name)


def test_a_model_without_a_chat_template_is_measured_by_its_loss_alone(tmp_path):
    model = tiny_model(tmp_path / "tiny")
    (model / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="has no chat template: set --items 0, and JSONL files"):
        quality.measure(model, 4, 3, [], "embedded", ["embedded"])
    for name, text in (("test", "a b c d e f g h "), ("train", "the sum of two numbers is ")):
        (tmp_path / name).write_text((json.dumps({"text": text * 40}) + "\n") * 120)
    arguments = ("--items", "0", "--sequences", "3", "--text", tmp_path / "test", "--calibrate", tmp_path / "train")
    done = run("bench", "mxfp4-quality", "--model", model, "--only", "keep-loss", *arguments)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "[" in line]
    assert [row.split()[1] for row in rows] == ["bf16", "mse", "keep-loss"]
    assert all(row.count("–") == 3 for row in rows)


def test_refuses(tmp_path):
    one_line(run("bench", "mxfp4-quality", "--items", "1"), 2)
    one_line(run("bench", "mxfp4-quality", "--model", tmp_path), 1)
    with pytest.raises(ConfigError, match="unknown variant 'gtpq'"):
        quality.measure("/nowhere", 4, 4, ["gtpq"], "embedded", ["embedded"])
    with pytest.raises(ConfigError, match="give two different files"):
        quality.measure("/nowhere", 4, 4, ["gptq"], "a.jsonl", ["embedded", "./a.jsonl"])
    one_line(run("bench", "mxfp4-quality", "--only", "gtpq"), 2)
