"""Shared prompts in a model that FSDP2 shards over two ranks; one has its weights on meta at the decision."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, MistralConfig

from verl_aqn.models.attention import NAME, laid_out
from verl_aqn.models.layouts import (
    agree_on_attention,
    agreed,
    attention_of,
    decide,
    shared_inputs,
    use_attention,
)
from verl_aqn.models.shared_prompts import share_prompts

CONFIG = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "sliding_window": 4, "initializer_range": 0.3,
}  # fmt: skip


def make():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MistralConfig(**CONFIG), dtype=torch.float32)


def loss(model, prompts, responses) -> torch.Tensor:
    layout = share_prompts(prompts, responses)
    with laid_out(layout):
        output = model(**shared_inputs(layout, keeps=True), use_cache=False)
    return torch.nn.functional.cross_entropy(output.logits[0].float(), layout.label)


def rank_main(rank: int, port: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        first = make().to("meta") if rank else make()
        found = decide(first)
        assert (found is None) == bool(rank)
        if rank == 0:  # as `decide` does where sdpa would leave out what a layer asks for
            assert use_attention(first, "eager")
        agree_on_attention(first, found is not None)
        assert attention_of(first) == "eager"
        found = agreed(found)
        assert found.together, found.reason
        model, whole = make().train(), make()
        for each in (model, whole):
            assert use_attention(each, NAME)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=True)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        generator = torch.Generator().manual_seed(1)  # both ranks have the same samples
        a, b = (torch.randint(64, (n,), generator=generator) for n in (7, 3))
        responses = [torch.randint(64, (n,), generator=generator) for n in (6, 9, 2)]
        got, want = (loss(each, [a, a, b], responses) for each in (model, whole))
        torch.testing.assert_close(got, want, atol=0.05, rtol=0.02)
        for each in (got, want):
            each.backward()
        name = "model.layers.0.self_attn.k_proj.weight"
        one, other = model.get_parameter(name).grad.full_tensor(), whole.get_parameter(name).grad
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), 0) > 0.98
    finally:
        dist.destroy_process_group()


def test_two_ranks_share_prompts_as_one_does() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(rank_main, args=(port,), nprocs=2)
