"""Where noise goes and how much: patterns, multipliers, units, routers, linear layers, tensor-parallel parts."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    DeepseekV3Config,
    GemmaConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from verl_aqn.digest import tensor_digest
from verl_aqn.errors import ConfigError, EvidenceError, ModelError
from verl_aqn.integrations.vllm.trace import Trace
from verl_aqn.mxfp4 import dequantize, quantize
from verl_aqn.noise import NoiseInjector, NoiseSpec, check_evidence, draw, find_norms
from verl_aqn.noise.routers import router_norms
from verl_aqn.noise.spec import Layers, Zone
from verl_aqn.noise.targets import find_linears

TINY = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "pad_token_id": 0,
}
ORDER = NoiseSpec(3, 0, 0.05, "absolute")
POST = [f"layers.{i}.post_attention_layernorm" for i in range(3)]


def llama() -> nn.Module:
    return AutoModel.from_config(LlamaConfig(**TINY))


def noisy(injector: NoiseInjector, order: NoiseSpec) -> dict[str, float]:
    """Return the multiplier of every module that has noise, after checking the evidence."""
    evidence = injector.apply(order)
    check_evidence(json.loads(json.dumps(evidence)), order, injector.clean_digest)
    return {name: group["multiplier"] for group in evidence["groups"] for name in group["modules"]}


# ---------------------------------------------------------------- patterns


def test_include_and_exclude():
    injector = NoiseInjector(llama())
    assert set(noisy(injector, replace(ORDER, include=("layers.1.*", "norm")))) == {
        "layers.1.input_layernorm",
        "layers.1.post_attention_layernorm",
        "norm",
    }
    assert set(noisy(injector, replace(ORDER, include=("layers.*",), exclude=("*.input_layernorm",)))) == set(POST)


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_names_the_nearest(key):
    injector = NoiseInjector(llama())
    with pytest.raises(ConfigError, match=r"noise\.\w+: '\*\.post_atention_layernorm' .*post_attention_layernorm'"):
        injector.apply(replace(ORDER, **{key: ("*.post_atention_layernorm",)}))


def test_what_an_earlier_order_touched_is_clean_under_the_next():
    injector = NoiseInjector(llama())
    noisy(injector, ORDER)
    assert len(noisy(injector, replace(ORDER, include=("norm",)))) == 1  # check_evidence checks the other modules, too


# ---------------------------------------------------------------- multipliers by layer


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        (Layers(), [1, 1, 1, 1]),
        (Layers("targeted", modules=("0-1",), multiplier=0.5), [0.5, 0.5, 1, 1]),
        (Layers("targeted", modules=("*.input_layernorm",), multiplier=2, others=0), [2, 2, 2, None]),
        (Layers("targeted", modules=("1", "norm"), others=0), [None, 1, None, 1]),
        (Layers("variable", first=1, last=0.5), [1, 0.75, 0.5, 0.5]),
        (Layers("variable", first=0, last=1), [None, 0.5, 1, 1]),
        (Layers("inverse", first=1, last=0.25), [1, 0.4, 0.25, 0.25]),
        (
            Layers("zones", zones=(Zone(("0",), 1, 0.1), Zone(("*",), 0.5, 2)), boundary=0.5),
            [1, 0.5, 0.5, 0.5],
        ),
    ],
)
def test_multipliers(layers, wanted):
    found = noisy(NoiseInjector(llama()), replace(ORDER, layers=layers, share=0.49))
    names = [f"layers.{i}.input_layernorm" for i in range(3)] + ["norm"]
    assert [found.get(name) for name in names] == [None if w is None else pytest.approx(w) for w in wanted]


def test_a_zone_changes_at_its_boundary():
    layers = Layers("zones", zones=(Zone(("0",), 1, 0.1),), boundary=0.5, others=0)
    injector = NoiseInjector(llama())
    for share, wanted in ((0.0, 1), (0.49, 1), (0.5, 0.1), (1.0, 0.1)):
        assert set(noisy(injector, replace(ORDER, layers=layers, share=share)).values()) == {wanted}


@given(st.sampled_from(["variable", "inverse"]), st.floats(0.01, 3), st.floats(0.01, 1), st.integers(1, 60))
def test_ramps_hit_both_ends_and_never_turn(kind, first, ratio, count):
    layers = Layers(kind, first=first, last=first * ratio)
    values = [layers.multiplier_of(f"model.layers.{i}.norm", count, 0.0) for i in range(count)]
    assert values[0] == pytest.approx(first)
    assert count == 1 or values[-1] == pytest.approx(first * ratio)
    assert all(deeper <= value * (1 + 1e-12) for value, deeper in itertools.pairwise(values))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "some"}, "uniform, targeted"),
        ({"kind": "uniform", "first": 2.0}, "no effect with kind 'uniform': it is a key of variable and inverse"),
        ({"kind": "targeted"}, "needs modules"),
        ({"kind": "zones"}, "needs zones"),
        ({"kind": "zones", "zones": (Zone(),)}, "needs zones"),
        ({"kind": "inverse", "first": 1.0, "last": 2.0}, "must fall"),
        ({"kind": "inverse", "last": 0.0}, "must fall"),
        ({"kind": "variable", "first": -1.0}, "0 or more"),
        ({"kind": "zones", "zones": (Zone(("0",), -1),)}, r"zones\[0\]\.before"),
        ({"kind": "zones", "zones": (Zone(("0",)),), "boundary": 12.0}, "share of the steps"),
    ],
)
def test_impossible_multipliers_are_refused(changes, says):
    with pytest.raises(ConfigError, match=says):
        Layers(**changes)


@pytest.mark.parametrize(("entry", "says"), [("7", "layers are 0 to 2"), ("*.q_nrm", "nearest"), ("3-9", "0 to 2")])
def test_a_layer_that_does_not_exist_is_an_error(entry, says):
    with pytest.raises(ConfigError, match=says):
        NoiseInjector(llama()).apply(replace(ORDER, layers=Layers("targeted", modules=(entry,))))


def test_the_order_survives_json_with_all_that_it_carries():
    zones = Layers("zones", zones=(Zone(("0-1", "*.q_norm"), 1.5, 0.5), Zone(("2",))), boundary=0.25, others=0.1)
    order = NoiseSpec(4, 1, 0.01, "multiplicative", ("norm", "linear"), ("layers.*",), ("*.k_norm",), True, zones, 0.3)
    assert NoiseSpec.from_dict(json.loads(json.dumps(order.to_dict()))) == order
    with pytest.raises(ConfigError, match="unknown key 'sigm'"):
        NoiseSpec.from_dict(order.to_dict() | {"sigm": 1})
    with pytest.raises(ConfigError, match="lacks the key 'sigma'"):
        NoiseSpec.from_dict({"step": 0, "seed": 0, "unit": "rms"})


# ---------------------------------------------------------------- units


def test_multiplicative_noise_is_in_proportion_to_each_weight():
    model = nn.ModuleDict({"n": LlamaRMSNorm(4096)})
    model["n"].weight.data.copy_(torch.linspace(0, 2, 4096))  # one weight is 0 and stays so
    order = NoiseSpec(2, 5, 0.05, "multiplicative")
    injector = NoiseInjector(model)
    check_evidence(injector.apply(order), order, injector.clean_digest)
    wanted = torch.linspace(0, 2, 4096) * (1 + 0.05 * draw(5, 2, "n", 4096))
    assert torch.allclose(model["n"].weight, wanted, rtol=1e-6)


def test_multiplicative_noise_of_gemma_multiplies_what_the_model_multiplies_with():
    model = AutoModel.from_config(GemmaConfig(**TINY))
    order = NoiseSpec(0, 0, 0.05, "multiplicative")
    injector = NoiseInjector(model)
    check_evidence(injector.apply(order), order, injector.clean_digest)
    assert torch.allclose(model.norm.weight, 0.05 * draw(0, 0, "norm", 64))  # Gemma's zeros mean 1


# ---------------------------------------------------------------- routers

MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {
    "qwen3_moe": (Qwen3MoeConfig(**TINY, **MOE, num_experts=4), POST),
    "qwen3_moe_with_a_dense_layer": (
        Qwen3MoeConfig(**TINY, **MOE, num_experts=4, mlp_only_layers=[1]),
        [POST[0], POST[2]],
    ),
    "qwen2_moe": (
        Qwen2MoeConfig(**TINY, **MOE, num_experts=4, shared_expert_intermediate_size=32),
        POST,
    ),
    "mixtral": (MixtralConfig(**TINY, num_local_experts=4), POST),
    "olmoe": (OlmoeConfig(**TINY, num_experts=4, num_experts_per_tok=2), POST),
    "gpt_oss": (GptOssConfig(**TINY, num_local_experts=4, num_experts_per_tok=2), POST),
    "deepseek_v3": (
        DeepseekV3Config(
            **(TINY | {"num_key_value_heads": 2}), **MOE, n_routed_experts=4, n_group=1, topk_group=1,
            first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=32, v_head_dim=32,
        ),
        POST[1:],
    ),
    "llama": (LlamaConfig(**TINY), []),
    "qwen3": (Qwen3Config(**TINY), []),
    "gemma": (GemmaConfig(**TINY), []),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTED)
def test_norms_in_front_of_routers_are_left_alone_by_default(name):
    config, wanted = ROUTED[name]
    model = AutoModel.from_config(config)
    norms = find_norms(model)
    assert sorted(router_norms(model, norms)) == wanted
    injector = NoiseInjector(model)
    assert set(noisy(injector, ORDER)) == set(norms) - set(wanted)
    assert injector.describe(ORDER)["router_norms"] == wanted
    assert set(noisy(injector, replace(ORDER, router_norms=True))) == set(norms)
    assert "forward" not in model.layers[0].__dict__ | model.layers[0].self_attn.__dict__  # the stand-ins are removed


def test_q_and_k_norms_get_noise_of_their_own_width():
    found = noisy(NoiseInjector(AutoModel.from_config(Qwen3Config(**TINY))), ORDER)
    assert {"layers.0.self_attn.q_norm", "layers.2.self_attn.k_norm"} <= set(found)
    assert len(found) == 3 * 4 + 1


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 32), nn.Linear(32, 64)


class OtherNames(nn.Module):
    """A layer whose names say nothing: sandwich norms, a residual in between, experts in a list."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (LlamaRMSNorm(64) for _ in range(4))
        self.mix = nn.Linear(64, 64)
        self.block = nn.ModuleDict({"gate": nn.Linear(64, 4), "pool": nn.ModuleList(Expert() for _ in range(4))})

    def forward(self, hidden_states, memory):
        hidden_states = hidden_states + self.b(self.mix(self.a(hidden_states)))
        x = self.c(hidden_states).view(-1, 64)
        weights = self.block["gate"](x).softmax(-1)
        out = sum(w[..., None] * e.down(e.up(x)) for w, e in zip(weights.unbind(-1), self.block["pool"], strict=True))
        return hidden_states + self.d(out.view_as(hidden_states))


def test_no_name_and_no_class_is_needed():
    model = nn.ModuleList([OtherNames()])
    assert router_norms(model, find_norms(model)) == {"0.c"}


class NeedsMemory(OtherNames):
    def forward(self, hidden_states, memory):
        return super().forward(hidden_states + memory.last, memory)


def test_a_layer_that_cannot_be_run_is_not_guessed_at():
    model = nn.ModuleList([NeedsMemory()])
    injector = NoiseInjector(model)
    with pytest.raises(ModelError, match="cannot find the norm that feeds its router"):
        injector.apply(ORDER)
    assert len(noisy(injector, replace(ORDER, router_norms=True, exclude=("*.c",)))) == 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.pool = nn.Linear(64, 4), nn.ModuleList(Expert() for _ in range(4))

    def forward(self, x):
        weights = self.gate(x).softmax(-1).unbind(-1)
        return sum(w[..., None] * e.down(e.up(x)) for w, e in zip(weights, self.pool, strict=True))


class Sandwich(nn.Module):
    """Misleading names: `post_attention_layernorm` follows the attention, `first` feeds the router."""

    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm, self.first = (LlamaRMSNorm(64) for _ in range(3))
        self.attention, self.mlp = nn.Linear(64, 64), Block()

    def forward(self, x, mask):
        x = x + self.post_attention_layernorm(self.attention(self.input_layernorm(x)))
        return x + self.mlp(self.first(x.view(-1, 64))).view_as(x)


def test_the_norm_is_found_by_what_it_feeds_and_not_by_its_name():
    """post_attention_layernorm reaches the experts only through `first`.

    While `first` runs, it is the norm that feeds them.
    """
    model = nn.ModuleList([Sandwich()])
    assert router_norms(model, find_norms(model)) == {"0.first"}


def test_including_a_norm_that_is_left_alone_is_an_error():
    injector = NoiseInjector(AutoModel.from_config(ROUTED["mixtral"][0]))
    with pytest.raises(ConfigError, match="router_norms=true"):
        injector.apply(replace(ORDER, include=("*.post_attention_layernorm", "norm")))


# ---------------------------------------------------------------- linear layers and tensor-parallel parts


class Engine(nn.Module):
    """A norm and two packed layers as in vLLM's CPU kernel on rank `rank` of `world`."""

    HEADS, HIDDEN, INNER = {"q_proj": 64, "k_proj": 32, "v_proj": 32}, 128, 256

    def __init__(self, rank: int = 0, world: int = 1, kernel: str = "cpu"):
        super().__init__()
        torch.manual_seed(0)
        shapes = {name: (n, self.HIDDEN) for name, n in self.HEADS.items()} | {"down_proj": (self.HIDDEN, self.INNER)}
        whole = {name: quantize(torch.randn(shape) * 0.05) for name, shape in shapes.items()}
        # There are at most as many k/v heads as ranks; with more ranks, two hold the same head.
        replicas = max(1, world // 2)
        kv = world // replicas
        cuts = {
            "q_proj": lambda t: t.chunk(world)[rank],
            "k_proj": lambda t: t.chunk(kv)[rank // replicas],
            "v_proj": lambda t: t.chunk(kv)[rank // replicas],
            "down_proj": lambda t: t.chunk(world, dim=1)[rank],
        }
        self.norm = LlamaRMSNorm(self.HIDDEN)
        self.layer = nn.Module()
        with Trace() as trace:
            for fused, names in {"qkv_proj": list(self.HEADS), "down_proj": ["down_proj"]}.items():
                parts = []
                for name in names:
                    sources = (
                        (f"layer.{name}.weight_packed", whole[name].packed),
                        (f"layer.{name}.weight_scale", whole[name].scale),
                    )
                    parts.append([cuts[name](t) for _, t in trace.watch(sources)])
                codes, scale = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
                self.layer.add_module(fused, self.packed(codes, scale, kernel))
                self.layer.get_submodule(fused).widths = [len(codes) for codes, _ in parts]
        self.aqn_loaded = trace.loaded(
            (f"layer.{fused}.{end}", getattr(self.layer.get_submodule(fused), at))
            for fused in ("qkv_proj", "down_proj")
            for end, at in (
                ("weight_packed", "weight" if kernel == "marlin" else "mxfp4_packed"),
                ("weight_scale", "weight_scale"),
            )
        )

    @staticmethod
    def packed(codes, scale, kernel) -> nn.Module:
        layer = nn.Module()
        layer.mxfp4_digests, layer.scheme = ["…"], SimpleNamespace(kernel=object())
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)
        if kernel == "cpu":
            layer.mxfp4_packed = codes
            layer.weight = nn.Parameter(dequantize(codes, scale, torch.bfloat16), requires_grad=False)
        elif kernel == "codes":  # the CPU kernel, where it multiplies with the codes
            layer.mxfp4_packed, layer.params_dtype = codes, torch.bfloat16
            layer.weight = nn.Parameter(codes, requires_grad=False)
        else:
            layer.weight = nn.Parameter(codes.flip(0), requires_grad=False)
        return layer

    def parts(self) -> dict[str, torch.Tensor]:
        q, k, v = self.layer.qkv_proj.weight.data.split(self.layer.qkv_proj.widths)
        return {"q_proj": q, "k_proj": k, "v_proj": v, "down_proj": self.layer.down_proj.weight.data}


LINEAR = NoiseSpec(3, 0, 0.001, "absolute", targets=("linear",))


@pytest.mark.parametrize("unit", ["absolute", "rms", "multiplicative"])
def test_linear_noise_comes_and_goes_bit_for_bit(unit):
    model = Engine()
    clean = {name: weight.clone() for name, weight in model.parts().items()}
    injector = NoiseInjector(model)
    order = replace(LINEAR, unit=unit, sigma=0.001 if unit == "absolute" else 0.05, targets=("norm", "linear"))
    names = {"norm", "layer.q_proj", "layer.k_proj", "layer.v_proj", "layer.down_proj"}
    assert set(noisy(injector, order)) == names
    addresses = [weight.data_ptr() for weight in model.parts().values()]
    assert all(not torch.equal(weight, clean[name]) for name, weight in model.parts().items())
    assert set(noisy(injector, replace(order, step=4, targets=("norm",)))) == {"norm"}
    assert all(torch.equal(weight, clean[name]) for name, weight in model.parts().items())
    noisy(injector, order)
    check_evidence(injector.restore(), None, injector.clean_digest)
    assert all(torch.equal(weight, clean[name]) for name, weight in model.parts().items())
    assert addresses == [weight.data_ptr() for weight in model.parts().values()]


def test_a_layer_that_multiplies_with_its_codes_has_values_while_it_has_noise():
    kept, codes = Engine(), Engine(kernel="codes")
    injector, layers = NoiseInjector(codes), [codes.layer.qkv_proj, codes.layer.down_proj]

    def dtypes() -> list[torch.dtype]:
        return [layer.weight.dtype for layer in layers]

    noisy(injector, replace(LINEAR, targets=("norm",)))
    assert dtypes() == [torch.uint8, torch.uint8]
    both = [one.apply(LINEAR) for one in (NoiseInjector(kept), injector)]
    check_evidence(both[1], LINEAR, injector.clean_digest)
    assert both[0]["groups"] == both[1]["groups"]
    assert all(torch.equal(weight, kept.parts()[name]) for name, weight in codes.parts().items())
    # Noise on one of the fused layers only: the others are clean, and computed from the same matrix.
    only_k = replace(LINEAR, step=4, include=("*.k_proj",))
    check_evidence(injector.apply(only_k), only_k, injector.clean_digest)
    assert dtypes() == [torch.bfloat16, torch.uint8]
    clean = dequantize(layers[0].mxfp4_packed, layers[0].weight_scale.data, torch.bfloat16)
    changed = (codes.layer.qkv_proj.weight.data != clean).any(dim=1)
    assert changed.tolist() == [False] * 64 + [True] * 32 + [False] * 32
    check_evidence(injector.restore(), None, injector.clean_digest)
    assert all(layer.weight.data_ptr() == layer.mxfp4_packed.data_ptr() for layer in layers)


def test_the_noise_of_one_part_outlives_that_of_another_in_the_same_layer():
    model = Engine(kernel="codes")
    q, k, v, _ = find_linears(model)
    q.write(q.clean() + 1)
    k.write(k.clean() + 1)
    q.write_clean()
    v.write_clean()
    assert [torch.equal(part.data(), part.clean()) for part in (q, k, v)] == [True, False, True]
    k.write_clean()
    assert model.layer.qkv_proj.weight.dtype == torch.uint8


def test_linear_noise_is_told_by_kind_and_multiplier():
    injector = NoiseInjector(Engine())
    layers = Layers("targeted", modules=("*.down_proj",), multiplier=0.5)
    evidence = injector.apply(order := replace(LINEAR, targets=("norm", "linear"), sigma=0.01, layers=layers))
    check_evidence(evidence, order, injector.clean_digest)
    found = {(g["kind"], g["multiplier"]): g["sigma_measured"] for g in evidence["groups"]}
    assert found[("linear", 0.5)] == pytest.approx(0.005, rel=0.02)
    assert found[("linear", 1.0)] == pytest.approx(0.01, rel=0.02)
    assert found[("norm", 1.0)] == pytest.approx(0.01, rel=0.3)


class NormsOnly(NoiseInjector):
    def _clean_all(self, but):
        for norm in self._norms.values():
            norm.write(norm.clean())


def test_linear_noise_that_stays_on_is_caught():
    model = Engine()
    injector = NormsOnly(model)
    injector.apply(LINEAR)
    with pytest.raises(EvidenceError, match="are not clean at"):
        check_evidence(injector.restore(), None, injector.clean_digest)


def test_a_kernel_that_keeps_weights_in_its_own_order_is_refused():
    with pytest.raises(ModelError, match="stores weights in its own order"):
        NoiseInjector(Engine(kernel="marlin")).apply(LINEAR)


def test_linear_noise_without_packed_layers_is_refused():
    with pytest.raises(EvidenceError, match=r"mxfp4\.enabled"):
        NoiseInjector(llama()).apply(LINEAR)


@pytest.mark.parametrize("world", [2, 4])
def test_two_ranks_noise_put_together_is_the_noise_of_one(world):
    order = replace(LINEAR, sigma=1.0, targets=("norm", "linear"))  # large enough to be visible in bf16

    def noise(rank: int, of: int) -> dict[str, torch.Tensor]:
        model = Engine(rank, of)
        injector = NoiseInjector(model)
        clean = {name: weight.clone() for name, weight in model.parts().items()}
        check_evidence(injector.apply(order), order, injector.clean_digest)
        noise = {name: (weight.float() - clean[name].float()) for name, weight in model.parts().items()}
        return noise | {"norm": model.norm.weight.detach() - 1}

    one, ranks = noise(0, 1), [noise(rank, world) for rank in range(world)]
    rough = {"atol": 0.05, "rtol": 0.02}  # bf16 rounds sums of noise and clean
    assert all(torch.equal(rank["norm"], one["norm"]) for rank in ranks)
    torch.testing.assert_close(torch.cat([r["q_proj"] for r in ranks]), one["q_proj"], **rough)
    torch.testing.assert_close(torch.cat([r["down_proj"] for r in ranks], dim=1), one["down_proj"], **rough)
    heads = ranks[:: max(1, world // 2)]
    for name in ("k_proj", "v_proj"):
        torch.testing.assert_close(torch.cat([r[name] for r in heads]), one[name], **rough)
        assert torch.equal(ranks[0][name], ranks[world // 2 - 1][name])  # copies have the same noise


def test_a_part_of_a_norm_has_its_slice_of_the_noise_and_does_not_enter_the_ranks_digest():
    def rank(number: int) -> nn.ModuleDict:
        norm = LlamaRMSNorm(64)
        norm.weight_shard_rank, norm.weight_shard_world = number, 2
        return nn.ModuleDict({"q_norm": norm, "norm": LlamaRMSNorm(64)})

    models = [rank(0), rank(1)]
    injectors = [NoiseInjector(model) for model in models]
    evidence = [injector.apply(ORDER) for injector in injectors]
    for injector, said in zip(injectors, evidence, strict=True):
        check_evidence(said, ORDER, injector.clean_digest)
    assert evidence[0]["weights_digest"] == evidence[1]["weights_digest"]
    both = torch.cat([model["q_norm"].weight.detach() - 1 for model in models])
    assert torch.allclose(both, 0.05 * draw(0, 3, "q_norm", 128), atol=1e-6)
    with pytest.raises(ModelError, match="rms of the whole"):
        injectors[0].apply(replace(ORDER, unit="rms"))


def test_a_restarted_worker_writes_the_same_noise():
    first = NoiseInjector(llama_with_seed()).apply(ORDER)
    assert NoiseInjector(llama_with_seed()).apply(ORDER)["weights_digest"] == first["weights_digest"]


def llama_with_seed() -> nn.Module:
    torch.manual_seed(0)
    return llama()


def test_no_copy_of_a_linear_weight_is_kept():
    injector = NoiseInjector(Engine())
    noisy(injector, LINEAR)
    for target in injector._linears.values():
        tensors = [value for value in vars(target).values() if isinstance(value, torch.Tensor)]
        assert tensors == []


def test_parts_of_a_norm_alone_have_the_digest_of_nothing():
    assert tensor_digest([]) == NoiseInjector(nn.ModuleDict({"n": part_of_a_norm()})).clean_digest


def part_of_a_norm() -> nn.Module:
    norm = LlamaRMSNorm(32)
    norm.weight_shard_rank, norm.weight_shard_world = 0, 2
    return norm
