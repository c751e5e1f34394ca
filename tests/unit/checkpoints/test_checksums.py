"""The content of a cached folder is verified: if one byte has changed, nothing starts on it."""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.helpers.tiny_configs import SMALL_ASCEND
from verl_aqn.checkpoints import checksums
from verl_aqn.checkpoints import packing as checkpoint
from verl_aqn.checkpoints.cached import check_made, dequantized_cache, modelslim_cache, quantized_cache
from verl_aqn.checkpoints.checksums import FILE, check_checksums, known_digest
from verl_aqn.checkpoints.packing import quantize_checkpoint
from verl_aqn.checkpoints.storage import Weights, companions
from verl_aqn.checkpoints.writing import new_folder
from verl_aqn.config.compose import load_recipe
from verl_aqn.errors import ModelError
from verl_aqn.evaluation.evaluate import Target, settings
from verl_aqn.preflight.prepare import prepare_model
from verl_aqn.runs.provenance import model_digest

CODES, SCALES = "model.layers.1.mlp.up_proj.weight_packed", "model.layers.0.self_attn.q_proj.weight_scale"
KEPT = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "plain"
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL_ASCEND, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    return folder


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "packed"
    quantize_checkpoint(source, folder)
    return folder


@pytest.fixture
def base(packed, tmp_path) -> Path:
    """A packed folder of this test only."""
    shutil.copytree(packed, tmp_path / "base")
    return tmp_path / "base"


def flip(file: Path, offset: int = -2) -> None:
    """Change one bit of a file; without ``offset``, one within the last values."""
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def flip_tensor(folder: Path, name: str) -> None:
    file, offset = Weights(folder)._place[name]
    flip(file, offset)


def refused(match: str, function: Callable, *arguments) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    assert re.search(r"delete \S+ and run again", str(caught.value))


@pytest.mark.parametrize("name", [CODES, SCALES, *KEPT])
def test_one_bit_of_any_tensor_of_a_cached_base(source, tmp_path, name):
    """Disk, actor and rollout would all agree on the changed bit."""
    folder = quantized_cache(source, tmp_path)
    assert quantized_cache(source, tmp_path) == folder
    flip_tensor(folder, name)
    refused(r"model\.safetensors was changed or damaged", quantized_cache, source, tmp_path)
    shutil.rmtree(folder)
    assert quantized_cache(source, tmp_path) == folder


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "quantization.json"])
def test_one_bit_of_any_other_file(base, name):
    check_made(base)
    flip(base / name)
    refused(f"{name} was changed or damaged", check_made, base)


def test_files_that_are_gone_or_were_added(base):
    moved = (base / "tokenizer.json").rename(base.parent / "tokenizer.json")
    refused(r"tokenizer\.json is missing", check_made, base)
    moved.rename(base / "tokenizer.json")
    check_made(base)
    (base / "notes.md").write_text("a model is not read from this")
    (base / ".hidden.json").write_text("nor from this")
    check_made(base)
    # transformers and vLLM would prefer this file to the recorded one, or read more from it.
    (base / "chat_template.jinja").write_text("{{ messages }}")
    refused(r"chat_template\.jinja was added", check_made, base)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sha256": null}', '{"sha256": {}}', '{"sha256": 3}'])
def test_a_record_that_says_nothing_does_not_pass(base, text):
    (base / FILE).write_text(text)
    refused(r"(cannot be read|was added)", check_made, base)


@pytest.mark.parametrize("value", [None, "", 0, "0" * 64])
def test_a_digest_that_is_no_digest_does_not_pass(base, value):
    record = json.loads((base / FILE).read_text())
    record["sha256"]["model.safetensors"] = value
    (base / FILE).write_text(json.dumps(record))
    refused("was changed or damaged", check_made, base)


@pytest.mark.parametrize("cached", [dequantized_cache, modelslim_cache])
def test_what_the_rollout_serves_instead(base, tmp_path, cached):
    folder = cached(base, tmp_path / "cache")
    assert cached(base, tmp_path / "cache") == folder
    assert check_checksums(folder)
    flip(folder / "model.safetensors")
    refused("was changed or damaged", cached, base, tmp_path / "cache")


def test_an_imported_base(base, tmp_path):
    foreign = modelslim_cache(base, tmp_path / "cache")
    folder = quantized_cache(foreign, tmp_path / "cache")
    flip(folder / "model.safetensors")
    refused("was changed or damaged", quantized_cache, foreign, tmp_path / "cache")


def test_folders_of_earlier_versions_are_checked_as_far_as_they_say(base):
    (base / FILE).unlink()
    check_made(base)
    flip_tensor(base, "model.norm.weight")  # outside the digest that they have
    check_made(base)
    flip_tensor(base, CODES)
    refused(r"the packed weights of .*base do not match its quantization\.json", check_made, base)
    (base / "quantization.json").unlink()  # as another tool packs it
    check_made(base)


def recipe(folder: Path):
    return load_recipe("e12_aggressive_1ep", ["profile=cpu", f"actor_rollout_ref.model.path={folder}"])


def test_a_run_and_an_evaluation_do_not_start_on_it(source, base, tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    folder = quantized_cache(source, tmp_path / "cache/mxfp4", exclude=recipe(source).aqn.mxfp4.exclude)
    flip(folder / "model.safetensors")
    refused("was changed or damaged", prepare_model, recipe(source))
    # The base of a run that is evaluated, probed or resumed is named by its packed folder.
    flip(base / "model.safetensors")
    refused("was changed or damaged", prepare_model, recipe(base))
    refused("was changed or damaged", settings, Target(base), [], None, "bf16")


def test_each_file_is_read_once_for_its_key_its_check_and_the_run_s_record(source, packed, tmp_path, monkeypatch):
    quantized_cache(source, tmp_path)
    read = []
    monkeypatch.setattr(checksums, "file_digest", lambda path: read.append(path) or "0" * 64)
    checksums._digest_of.cache_clear()
    with pytest.raises(ModelError):  # all digests are zeros
        check_made(packed)
    model_digest(packed)
    assert packed / "model.safetensors" in read
    assert len(read) == len(set(read))
    checksums._digest_of.cache_clear()


def test_progress_is_told_by_file(packed):
    told = []
    check_checksums(packed, lambda *entry: told.append(entry))
    assert [done for done, _, _ in told] == list(range(1, len(told) + 1))
    assert {name for _, _, name in told} == {file.name for file in packed.iterdir()} - {FILE}


def test_the_record_is_about_the_folder_and_not_of_the_model(base, tmp_path):
    """So the base keeps its identity for runs of earlier versions, and another folder does not inherit the record."""
    digest = model_digest(base)
    assert base / FILE not in companions(base)
    dense = dequantized_cache(base, tmp_path / "cache")
    (base / FILE).unlink()
    assert model_digest(base) == digest
    assert dequantized_cache(base, tmp_path / "cache") == dense


def test_files_that_do_not_hold_what_was_written_get_no_name(source, tmp_path, monkeypatch):
    """A record of them would confirm the damage."""
    write = checkpoint.write_model

    def damaging(folder: Path, *arguments) -> None:
        write(folder, *arguments)
        flip_tensor(folder, CODES)

    monkeypatch.setattr(checkpoint, "write_model", damaging)
    with pytest.raises(ModelError, match="was not created: its files differ from what was written"):
        quantized_cache(source, tmp_path)
    assert not list(tmp_path.iterdir())


def test_everything_is_on_disk_before_the_folder_has_its_name(source, tmp_path, monkeypatch):
    synced, sync = {}, os.fsync

    def fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced[path.name] = (tmp_path / "out").exists(), path.read_bytes() if path.is_file() else b""
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    quantize_checkpoint(source, tmp_path / "out")
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "quantization.json", FILE} <= files.keys()
    for name, content in files.items():
        assert synced[name] == (False, content), name
    (temporary,) = (name for name in synced if name.endswith(".tmp"))
    assert synced[temporary] == (False, b"")  # the list of names
    assert synced[tmp_path.name] == (True, b"")  # the name itself

    with new_folder(tmp_path / "deep") as folder:
        (folder / "below").mkdir()
        (folder / "below/file").write_text("x")
    assert {"below", "file"} <= synced.keys()


@pytest.fixture
def hashed(tmp_path, monkeypatch) -> list[Path]:
    """The files that were read for hashing; this process has no cached results."""
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    read: list[Path] = []

    def digest(path: Path) -> str:
        read.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(checksums, "file_digest", digest)
    return read


def next_process() -> None:
    checksums._digest_of.cache_clear()


def test_a_digest_is_kept_from_run_to_run_until_anything_about_the_file_changes(hashed, tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "SETTLED_S", 0.01)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"a" * 100)
    link = tmp_path / "link"
    link.symlink_to(file)
    changes: list[Callable[[], Any]] = [
        lambda: file.write_bytes(b"b" * 100),
        lambda: os.utime(file, ns=(0, 0)),
        lambda: (file.write_bytes(b"c" * 100), os.utime(file, ns=(0, 0))),  # as if the file had not been written
        lambda: file.write_bytes(b"c" * 101),
        lambda: shutil.copy2(file, tmp_path / "other") and os.replace(tmp_path / "other", file),
    ]
    for change in [lambda: None, *changes]:
        change()
        time.sleep(0.03)
        wanted, before = hashlib.sha256(file.read_bytes()).hexdigest(), len(hashed)
        for path in (file, link, file):
            next_process()
            assert known_digest(path) == wanted
        assert len(hashed) == before + 1
    for damage in ("", "[]", "{}", '{"path": 1}', None):
        for kept in (tmp_path / "cache" / "digests").iterdir():
            text = damage if damage is not None else kept.read_text().replace('"sha256": "', '"sha256": "../')
            kept.write_text(text)
        next_process()
        assert known_digest(file) == wanted


def test_a_file_that_was_just_written_is_read_again(hashed, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"a")
    for _ in range(2):
        next_process()
        known_digest(file)
    assert len(hashed) == 2
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_none(hashed, tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "SETTLED_S", 0)
    (tmp_path / "cache").write_text("no folder")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"a")
    time.sleep(0.03)
    assert known_digest(file) == hashlib.sha256(b"a").hexdigest()
