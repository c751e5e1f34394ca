"""The chosen layout gives the same log-probs and gradients as each sample alone, in every family."""

import re

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from verl.utils import tensordict_utils as tu

from tests.helpers.engines import bare_engine
from tests.helpers.micro_batches import batch, engine_of, samples
from tests.helpers.sharing_models import GQA, SEPARATED, SHARING, make
from verl_aqn.errors import ConfigError, ModelError
from verl_aqn.integrations.verl.engine import AqnFSDPEngine
from verl_aqn.models.attention import NAME, attention, lay_out
from verl_aqn.models.layouts import PACKED, SEPARATE, SHARED, attention_of, decide, has_bare_head, use_attention
from verl_aqn.models.shared_prompts import share_prompts

# These scale or cap the logits of their head, so all logits are computed.
CHANGED_LOGITS = {"gemma2", "granite", "cohere", "cohere2"}
SCORED = ["llama", "qwen3_moe", "gemma3", "gemma4", "gpt_oss", "deepseek_v3", "gpt_neox", "llama4 chunks"]


def log_probs(engine: AqnFSDPEngine, prompts, responses, remove_padding: bool = False) -> torch.Tensor:
    """Return log-probs of all response tokens, computed by the engine, [N]."""
    micro_batch = batch(prompts, responses, remove_padding)
    inputs, arguments = engine.prepare_model_inputs(micro_batch)
    output = engine.module(**inputs, use_cache=False)
    found = engine.prepare_model_outputs(output, arguments, micro_batch, None)["log_probs"]
    return torch.cat(
        [row[len(p) - 1 : len(p) + len(r) - 1] for row, p, r in zip(found.unbind(), prompts, responses, strict=True)]
    )


def alone(model, prompts, responses) -> torch.Tensor:
    """Return the same, each sample in its own forward with transformers' eager attention."""
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
    """Check log-probs, and gradients of all parameters with gradient checkpointing, against samples alone."""
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


@pytest.mark.parametrize("kind", [*SCORED, *sorted(CHANGED_LOGITS)])
def test_a_frozen_head_gives_the_same_log_probs_without_all_logits(kind):
    model = make(kind)
    for parameter in model.get_output_embeddings().parameters():
        parameter.requires_grad_(False)
    engine = engine_of(model)
    engine._decide_scores(model)
    assert has_bare_head(model) <= engine.scores == engine.taken.bare  # the plan of memory expects no less
    assert has_bare_head(model) or kind != "llama"
    assert engine.scores == (kind not in CHANGED_LOGITS)
    check(model, engine)


@pytest.mark.parametrize("kind", SEPARATED)
@pytest.mark.parametrize("remove_padding", [False, True])
def test_a_model_that_cannot_share_gets_separate_rows(kind, remove_padding):
    model = make(kind)
    engine = engine_of(model, remove_padding)
    assert engine.layout.startswith(f"{SEPARATE}: ")
    assert SEPARATED[kind][2] in engine.layout
    check(model, engine, remove_padding)


def test_packed_rows_stay_where_flash_attention_is_asked_for_and_the_model_can_take_them():
    for kind, layout in (("mistral", PACKED), ("qwen3_next", f"{SEPARATE}: ")):
        model = make(kind)
        model.config._attn_implementation_internal = "flash_attention_2"  # as on a device that has it
        engine = bare_engine(AqnFSDPEngine, "", {})
        engine.use_remove_padding = True
        real = model.set_attn_implementation

        def without_flash(name, real=real, model=model):
            if name == "flash_attention_2":
                model.config._attn_implementation_internal = name
            else:
                real(name)

        model.set_attn_implementation = without_flash
        engine._decide_layout(model, share=True)
        assert engine.layout.startswith(layout)
        assert attention_of(model) == "flash_attention_2"


def test_sequence_parallelism_is_refused_for_a_model_that_needs_separate_rows():
    engine = bare_engine(AqnFSDPEngine, "", {})
    engine.ulysses_sequence_parallel_size = 2
    with pytest.raises(ConfigError, match=r"ulysses_sequence_parallel_size must be 1: .*model\.layers\.0\.conv"):
        engine._decide_layout(make("lfm2"), share=True)


class Wrapped(nn.Module):
    """An attention layer inside a wrapper."""

    def __init__(self, layer: nn.Module, before=lambda states: states, **arguments):
        super().__init__()
        self.layer, self.before, self.arguments = layer, before, arguments

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        return self.layer(self.before(hidden_states), past_key_values=past_key_values, **kwargs, **self.arguments)


def shifted(states: torch.Tensor) -> torch.Tensor:
    """Add half of the previous token to each token: a convolution that no name reveals."""
    return states + 0.5 * nn.functional.pad(states, (0, 0, 1, 0))[:, :-1]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"bias_of_position": torch.ones(1)}, "attention has the argument bias_of_position"),
        ({"is_causal": False}, "attention has the argument is_causal"),
        # An influence on the next token is not visible in the structure; the trial finds it.
        ({"before": shifted}, "its logits differ by .* from those of separate rows"),
        ({"before": lambda x: x + 0.1 * torch.arange(x.shape[1])[:, None]}, "counts the tokens of a row"),
    ],
)
def test_what_attention_does_not_know_and_what_leaks_past_it_needs_separate_rows(arguments, reason):
    model = make("llama")
    layer = model.model.layers[1]
    layer.self_attn = Wrapped(layer.self_attn, **arguments)
    if "before" in arguments:  # and nothing else is unusual about it
        assert decide(make("llama")).together
    found = decide(model)
    assert not found.together
    assert re.search(reason, found.reason)
    assert attention_of(model) == ("eager" if "is_causal" in arguments else "sdpa")


def test_separate_rows_take_eager_attention_where_sdpa_gives_other_values():
    """Doge's sdpa ignores causality in rows without padding."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.DogeConfig(**GQA), dtype=torch.float32).eval()
    engine = engine_of(model)
    assert engine.layout.startswith(SEPARATE)
    assert attention_of(model) == "eager"
    torch.testing.assert_close(log_probs(engine, *samples()), alone(model, *samples()))


def test_a_model_that_mixes_padding_in_is_refused():
    model = make("llama")
    layer = model.model.layers[1]
    layer.self_attn = Wrapped(layer.self_attn, lambda x: x + 0.5 * x.roll(1, 1))  # the last token comes first
    with pytest.raises(ModelError, match="gives other logits for padded rows than for single rows"):
        decide(model)


def test_a_layout_is_decided_on_bf16_weights_too():
    for kind in ("llama", "qwen3_moe", "gpt_oss", "mixtral"):
        assert decide(make(kind).to(torch.bfloat16)).together, kind
    model = make("llama").to(torch.bfloat16)
    layer = model.model.layers[1]
    layer.self_attn = Wrapped(layer.self_attn, shifted)
    assert "differ" in decide(model).reason


def test_weights_on_meta_leave_the_decision_to_another_rank():
    assert decide(make("llama").to("meta")) is None


def test_equal_prompts_stand_once_and_nothing_is_padded():
    given = samples()
    layout = share_prompts(*given)
    assert layout.input_ids.shape == (1, 4 + 17 + 9 + sum(len(response) - 1 for response in given[1]))
    assert torch.equal(layout.label, torch.cat(given[1]))


def test_ordinary_rows_go_through_the_same_attention():
    """Batches that cannot share (images, fused kernels) are verl's rows in the same model."""
    model = make("gemma2")
    want = alone(model, *samples())
    engine = engine_of(model)
    engine._shares_prompts = lambda _: False
    assert attention_of(model) == NAME
    torch.testing.assert_close(log_probs(engine, *samples()), want, atol=2e-4, rtol=1e-4)


def test_a_layout_and_a_mask_of_others_do_not_meet():
    layout = share_prompts([torch.tensor([1, 2])], [torch.tensor([3, 4])])
    states = torch.randn(1, 2, 3, 8)
    lay_out(layout)
    try:
        with pytest.raises(RuntimeError, match="a mask that does not come from transformers' mask functions"):
            attention(nn.Module(), states, states, states, torch.ones(1, 1, 3, 3))
    finally:
        lay_out(None)


def test_a_batch_with_images_goes_verl_s_way():
    engine = engine_of(make("llama"))
    given = batch(*samples())
    assert engine._shares_prompts(given)
    tu.assign_non_tensor(given, multi_modal_inputs=[{"pixel_values": torch.ones(1)}] + [{}] * 5)
    assert not engine._shares_prompts(given)
