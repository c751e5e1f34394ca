"""Calibration sees each layer's inputs in the model's own forward pass, however the decoder calls its layers."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    Cohere2Config,
    FalconH1Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from tests.helpers.tiny_configs import SMALL
from verl_aqn.checkpoints.calibrate import Calibration
from verl_aqn.checkpoints.gptq import gptq_quantizer
from verl_aqn.checkpoints.layer_calls import check_decoder
from verl_aqn.errors import ModelError

TOKENS = torch.randint(3, 96, (9, 24), generator=torch.Generator().manual_seed(0))  # two batches
WINDOW = {"sliding_window": 5, "max_position_embeddings": 64}
MIXED = ["sliding_attention", "full_attention"]
GEMMA = SMALL | WINDOW | {"head_dim": 16, "layer_types": MIXED, "pad_token_id": 0}
PER_LAYER = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 96}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
FOUR = {"num_hidden_layers": 4, "layer_types": MIXED * 2, "num_kv_shared_layers": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "mistral, window": MistralConfig(**SMALL | WINDOW),
    "qwen2, windows from layer 1": Qwen2Config(**SMALL | WINDOW, use_sliding_window=True, max_window_layers=1),
    "gemma3, two rotary bases": Gemma3TextConfig(**GEMMA),
    "gemma4, per-layer inputs and shared KV": Gemma4TextConfig(**GEMMA | PER_LAYER | FOUR, global_head_dim=32),
    "gemma3n, several streams": Gemma3nTextConfig(
        **GEMMA | PER_LAYER | FOUR | {"intermediate_size": [96] * 4},
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "cohere2": Cohere2Config(**SMALL | WINDOW, layer_types=MIXED, pad_token_id=0),
    "granite, multiplied embeddings": GraniteConfig(**SMALL, embedding_multiplier=6.0),
    "falcon-h1, tuples": FalconH1Config(**SMALL, head_dim=16, mamba_d_ssm=128, **MAMBA),
    "bamba, pairs": BambaConfig(**SMALL, attn_layer_indices=[1], **MAMBA),
    "granite hybrid": GraniteMoeHybridConfig(
        **SMALL, layer_types=["mamba", "attention"], num_local_experts=0, shared_intermediate_size=96, **MAMBA
    ),
    "lfm2, convolution": Lfm2Config(**SMALL, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "gpt-neox": GPTNeoXConfig(**{key: value for key, value in SMALL.items() if key != "num_key_value_heads"}),
    "opt, dropout": OPTConfig(
        vocab_size=96, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64
    ),
}


def make(folder: Path, config: PreTrainedConfig) -> Path:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "conv" not in name:  # weak weights would hide a wrong mask behind the residual
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_second_moments_are_those_of_an_ordinary_forward_pass(name: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", CONFIGS[name])
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    expected: dict[str, torch.Tensor] = {}

    def record(name: str, x: torch.Tensor) -> None:
        x = x.flatten(0, -2).double()
        expected[name] = expected.get(name, torch.zeros(())) + x.T @ x

    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    for name, module in layers.items():
        module.register_forward_pre_hook(lambda m, x, name=name: record(name, x[0]))
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    calibration = Calibration(source, TOKENS, torch.float32)
    assert len(expected) >= 8
    for name in layers:
        got = calibration.second_moment(name).double()
        assert (got - expected.get(name, torch.zeros_like(got))).norm() <= 1e-5 * got.norm(), name


class Decoder(nn.Module):
    """Layers that are called in a given way."""

    def __init__(self, way: str, layers: int = 2):
        super().__init__()
        self.way = way
        self.embed = nn.Embedding(96, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        if way == "shared":
            self.layers[1].inner = self.layers[0].inner = nn.Linear(8, 8)

    def forward(self, input_ids, use_cache):
        hidden, scale, cache = self.embed(input_ids), None, object() if self.way == "cache" else None
        for layer in [*self.layers] if self.way != "backwards" else self.layers[::-1]:
            before = hidden
            hidden = layer(hidden, scale=scale, cache=cache)
            if self.way == "scale":
                scale = hidden.mean()
            elif self.way == "residual":
                hidden = hidden + before
        return hidden


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("plain", ""),
        ("scale", "layer 1's argument scale depends on the output of earlier layers"),
        ("residual", "layers do not run in simple sequence"),
        ("backwards", "layers do not run in simple sequence"),
        ("cache", r"layer 0 gets a object \(cache\)"),
        ("shared", "layers share modules"),
    ],
)
def test_decoders_that_layers_alone_do_not_explain(way: str, words: str) -> None:
    decoder = Decoder(way)
    if not words:
        return check_decoder(decoder, decoder.layers, TOKENS)
    with pytest.raises(ModelError, match=f"cannot calibrate Decoder: its {words}") as caught:
        check_decoder(decoder, decoder.layers, TOKENS)
    assert "\n" not in str(caught.value)
    assert "forward" not in vars(decoder.layers[0])


def test_layers_outside_the_decoder_s_list_are_refused_before_any_work(tmp_path: Path) -> None:
    source = make(tmp_path / "source", CONFIGS["gemma4, per-layer inputs and shared KV"])
    with pytest.raises(ModelError, match=r"per_layer_model_projection, which is outside model\.layers: exclude it"):
        gptq_quantizer(source, TOKENS)
    gptq_quantizer(source, TOKENS, exclude=("lm_head", "per_layer_model_projection"))
