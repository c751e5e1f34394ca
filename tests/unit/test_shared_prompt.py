"""The layout that a model is given yields the log-probs and gradients of each sample alone, in every family."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from tensordict import TensorDict
from torch import nn
from transformers import AutoModelForCausalLM
from verl.utils import tensordict_utils as tu

from tests.engines import bare_engine
from verl_aqn.errors import ConfigError
from verl_aqn.layout.attention import NAME, attention, lay_out
from verl_aqn.layout.decide import PACKED, SEPARATE, SHARED, attention_of, decide, use_attention
from verl_aqn.layout.prompts import share_prompts
from verl_aqn.verl_api.engine import AqnFSDPEngine

V, WINDOW = 96, 6
BASE = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
GQA = BASE | {"num_key_value_heads": 2}
SMALL = GQA | {"head_dim": 8}
WINDOWED = SMALL | {"sliding_window": WINDOW}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MLA = BASE | MOE | {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "num_key_value_heads": 4,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
SHARING = {
    "llama": ("Llama", SMALL),
    "mistral": ("Mistral", WINDOWED),
    "ministral": ("Ministral", WINDOWED),
    "qwen2": ("Qwen2", GQA | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", SMALL),
    "qwen3_moe": ("Qwen3Moe", SMALL | MOE | {"num_experts": 4}),
    "gemma2": ("Gemma2", WINDOWED | {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text", WINDOWED | MIXED | {"query_pre_attn_scalar": 8}),
    "gemma4": (
        "Gemma4Text",
        WINDOWED | MIXED | {
            "global_head_dim": 8, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": V,
            "num_kv_shared_layers": 1, "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3", GQA | {"sliding_window": WINDOW}),
    "olmo2": ("Olmo2", GQA),
    "olmo3": ("Olmo3", GQA | MIXED | {"sliding_window": WINDOW}),
    "granite": ("Granite", GQA),
    "glm4": ("Glm4", SMALL),
    "glm4_moe": ("Glm4Moe", SMALL | MOE | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    "gpt_oss": ("GptOss", WINDOWED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("DeepseekV2", MLA | {"topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3", MLA),
    "mixtral": ("Mixtral", SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": ("SmolLM3", GQA),
    "cohere": ("Cohere", GQA),
    "cohere2": ("Cohere2", WINDOWED | MIXED),
    "starcoder2": ("Starcoder2", GQA | {"sliding_window": WINDOW}),
    "gpt_neox": ("GPTNeoX", BASE),
    "exaone4": ("Exaone4", SMALL | MIXED | {"sliding_window": WINDOW}),
    "llama4 chunks": (
        "Llama4Text",
        SMALL | {
            "attention_chunk_size": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1, "attn_temperature_tuning": False, "intermediate_size_mlp": 48,
        },
    ),
}  # fmt: skip
SEPARATED = {
    "qwen3_next": ("Qwen3Next", SMALL | LINEAR | {"num_experts": 0}, "model.layers.0.linear_attn"),
    "qwen3_5": ("Qwen3_5Text", SMALL | LINEAR, "model.layers.0.linear_attn"),
    "lfm2": ("Lfm2", GQA | {"layer_types": ["conv", "full_attention"]}, "model.layers.0.conv"),
    "granite hybrid": (
        "GraniteMoeHybrid",
        GQA | MAMBA | {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 48},
        "model.layers.0.mamba",
    ),
    "falcon_h1": ("FalconH1", SMALL | MAMBA | {"mamba_d_ssm": 64}, "model.layers.0.mamba"),
    "nemotron_h": (
        "NemotronH",
        SMALL | {"hybrid_override_pattern": "M*", "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
        "model.layers.0.mixer",
    ),
    "minimax": ("MiniMax", SMALL | {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["linear_attention", "full_attention"], "block_size": 8}, "model.layers.0.self_attn"),
    "bamba": ("Bamba", GQA | MAMBA | {"attn_layer_indices": [1]}, "model.layers.0.mamba"),
    "jamba": ("Jamba", GQA | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 8, "use_mamba_kernels": False}, "model.layers.0.mamba"),
    "llama4 by slot": (
        "Llama4Text",
        SMALL | {"attention_chunk_size": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1, "no_rope_layers": [1, 0], "interleave_moe_layer_step": 1, "intermediate_size_mlp": 48},
        "counts the tokens of a row",
    ),
    "bloom": ("Bloom", {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "does not use transformers' attention interface"),
    "mamba2": ("Mamba2", {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}, "no layer of Mamba2ForCausalLM"),
}  # fmt: skip


def make(kind: str, **more) -> transformers.PreTrainedModel:
    config, arguments, *_ = (SHARING | SEPARATED)[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        getattr(transformers, config + "Config")(**(arguments | more)), dtype=torch.float32
    )
    for name, p in model.named_parameters():  # large enough for attention to matter, small enough to be smooth
        if p.dim() > 1:
            nn.init.normal_(p, std=0.15)
        elif "sinks" in name:
            nn.init.normal_(p)
    return model.eval()


def engine_of(model: nn.Module, remove_padding: bool = False) -> AqnFSDPEngine:
    """An engine as it is after building `model`, without adapters and FSDP."""
    engine = bare_engine(AqnFSDPEngine, "", {})
    engine.use_remove_padding, engine.use_ulysses_sp, engine.pad_to_length = remove_padding, False, False
    engine.engine_config = SimpleNamespace(forward_only=False, seed=0, entropy_checkpointing=False)
    engine._decide_layout(model, share=True)
    engine.module = model
    return engine


def batch(prompts: list[torch.Tensor], responses: list[torch.Tensor], remove_padding: bool = False) -> TensorDict:
    """A micro-batch as verl's trainer makes it."""

    def jagged(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    whole = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    made = TensorDict(
        {
            "input_ids": jagged(whole),
            "position_ids": jagged([torch.arange(len(row)) for row in whole]),
            "prompts": jagged(prompts),
            "responses": jagged(responses),
        },
        batch_size=[len(prompts)],
    )
    tu.assign_non_tensor(made, use_remove_padding=remove_padding, temperature=1.0, pad_token_id=0)
    return made


def samples() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Groups of three, two and one, mixed; prompts shorter and longer than a window; responses of 1 to 13 tokens."""
    generator = torch.Generator().manual_seed(1)
    a, b, c = (torch.randint(3, V, (n,), generator=generator) for n in (4, 17, 9))
    prompts = [b, a, a, c, b, a]
    return prompts, [torch.randint(3, V, (n,), generator=generator) for n in (5, 1, 9, 3, 13, 2)]


def log_probs(engine: AqnFSDPEngine, prompts, responses, remove_padding: bool = False) -> torch.Tensor:
    """Of every response token, by the engine's own way, [N]."""
    micro_batch = batch(prompts, responses, remove_padding)
    inputs, arguments = engine.prepare_model_inputs(micro_batch)
    output = engine.module(**inputs, use_cache=False)
    found = engine.prepare_model_outputs(output, arguments, micro_batch, None)["log_probs"]
    return torch.cat(
        [row[len(p) - 1 : len(p) + len(r) - 1] for row, p, r in zip(found.unbind(), prompts, responses, strict=True)]
    )


def alone(model, prompts, responses) -> torch.Tensor:
    """The same, each sample in a forward of its own with transformers' eager attention."""
    before = attention_of(model)
    if decide(model).together:
        assert use_attention(model, "eager")
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = model(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits[0]
        found.append(logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, response[:, None])[:, 0])
    use_attention(model, before)
    return torch.cat(found)


def check(model, engine, remove_padding: bool = False) -> None:
    """Log-probs, and gradients of all parameters by gradient checkpointing, as of samples alone."""
    given = samples()
    weights = torch.randn(sum(map(len, given[1])), generator=torch.Generator().manual_seed(2))
    want = alone(model, *given)
    (want @ weights).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if model.supports_gradient_checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = log_probs(engine, *given, remove_padding)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    log_probs(engine, *(side[::-1] for side in given), remove_padding)  # another forward before the backward
    (got @ weights).backward()
    for name, p in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(p.grad, wanted[name], atol=2e-3, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", SHARING)
def test_shared_prompts_give_what_each_sample_gives_alone(kind):
    model = make(kind)
    engine = engine_of(model)
    assert engine.layout == SHARED
    check(model, engine)


@pytest.mark.parametrize("kind", SEPARATED)
@pytest.mark.parametrize("remove_padding", [False, True])
def test_a_model_that_cannot_share_gets_separate_rows(kind, remove_padding):
    model = make(kind)
    engine = engine_of(model, remove_padding)
    assert engine.layout.startswith(f"{SEPARATE}: ")
    assert SEPARATED[kind][2] in engine.layout
    check(model, engine, remove_padding)
