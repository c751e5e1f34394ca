"""The packed linear layer: same function as its dequantised twin, under PEFT, autocast, checkpointing and FSDP2."""

import copy
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from verl_aqn.errors import ModelError
from verl_aqn.mxfp4 import Mxfp4Linear, codec, fake_quantize, linear, mxfp8
from verl_aqn.mxfp4.dense import DequantizedLinear
from verl_aqn.mxfp4.experts import packed_layers
from verl_aqn.mxfp4.kernels import native, reference
from verl_aqn.mxfp4.linear import Activation


def dense_twin(layer: Mxfp4Linear, dtype: torch.dtype | None = None) -> nn.Linear:
    dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    dense.weight = nn.Parameter(layer.weight.float(), requires_grad=False)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().float())
    return dense.to(dtype)


def packed_layer(k: int = 64, n: int = 48, bias: bool = True, seed: int = 0) -> Mxfp4Linear:
    torch.manual_seed(seed)
    return Mxfp4Linear.from_linear(nn.Linear(k, n, bias=bias))


class Net(nn.Module):
    """Two packed layers with something trainable (a norm) before them."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up = packed_layer(64, 96, seed=seed)
        self.down = packed_layer(96, 64, bias=False, seed=seed + 1)
        self.recompute = False

    def block(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)


def lora_net(seed: int = 0) -> nn.Module:
    from peft import (
        LoraConfig,
        get_peft_model,
    )  # imported here, because spawned ranks without PEFT import this file, too

    torch.manual_seed(seed)
    model = get_peft_model(Net(seed), LoraConfig(r=32, target_modules=["up", "down"], init_lora_weights=False))
    model.base_model.model.norm.requires_grad_(True)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_dense_forward_and_backward(bias: bool, dtype: torch.dtype) -> None:
    layer = packed_layer(bias=bias)
    dense = dense_twin(layer, dtype)
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    layer.to(dtype)
    grad = torch.randn(2, 5, 48, dtype=dtype)
    y, y2 = layer(x), dense(x2)
    assert y.dtype == dtype
    assert torch.equal(y, y2)
    y.backward(grad)
    y2.backward(grad)
    torch.testing.assert_close(x.grad, x2.grad)
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_slices_of_a_large_weight_do_not_show(bias: bool, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last slice is smaller; the output has the bits of the whole product."""
    layer = packed_layer(96, 200, bias=bias).bfloat16()
    x = torch.randn(2, tokens, 96).bfloat16().requires_grad_()
    grad = torch.randn(2, tokens, 200).bfloat16()
    whole = layer(x)
    (expected,) = torch.autograd.grad(whole, x, grad)
    monkeypatch.setattr(linear, "_LARGE", 1000)
    monkeypatch.setattr(linear, "_SLICE", 64 * 96 * 2)
    sizes = []
    monkeypatch.setattr(F, "linear", lambda x, w, b=None, of=F.linear: sizes.append(len(w)) or of(x, w, b))
    y = layer(x)
    assert sizes == [64, 64, 64, 8]
    torch.testing.assert_close(y, whole, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], expected, rtol=0, atol=0)
    torch.testing.assert_close(expected, grad @ layer.weight.bfloat16())


def test_gradients_to_machine_precision() -> None:
    layer = packed_layer(64, 8).double()
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), atol=1e-9, rtol=1e-9)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x)
    dense = dense_twin(layer, torch.float64)
    (expected,) = torch.autograd.grad(dense(x).square().sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-14, atol=1e-14)


def test_memory_of_the_base() -> None:
    layer = packed_layer(512, 256, bias=False)
    packed = sum(p.nbytes for p in layer.parameters())
    assert packed <= 0.27 * 512 * 256 * 2
    assert packed == 512 * 256 * 17 // 32


def test_four_bit_activations() -> None:
    """W4A4: the product of two rounded factors; the gradient ignores the rounding of the activation."""
    layer = packed_layer()
    layer.activation = Activation("floor", "half_away")
    assert str(layer.activation) == "floor/half_away"
    assert Activation.parse("floor/half_away") == layer.activation
    assert Activation.parse("none") is None
    dense = dense_twin(layer)
    x = torch.randn(4, 64, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, dense(fake_quantize(x.detach(), "floor", "half_away")))
    assert not torch.allclose(y, dense(x), atol=1e-2)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, torch.ones_like(y) @ dense.weight)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.nn.functional.linear(
            fake_quantize(x.bfloat16(), "floor", "half_away"), dense.weight.bfloat16(), layer.bias.bfloat16()
        )
        assert torch.equal(layer(x), expected)


def test_eight_bit_activations() -> None:
    """W4A8: as W4A4, with MXFP8 instead."""
    layer = packed_layer()
    layer.activation = Activation.parse("mxfp8/floor/nearest")
    assert str(layer.activation) == mxfp8.ARITHMETIC == "mxfp8/floor/nearest"
    dense = dense_twin(layer)
    x = torch.randn(4, 64, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, dense(mxfp8.fake_quantize(x.detach())))
    assert not torch.allclose(y, dense(x), atol=1e-3)
    assert not torch.allclose(y, dense(fake_quantize(x)), atol=1e-2)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, torch.ones_like(y) @ dense.weight)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.nn.functional.linear(
            mxfp8.fake_quantize(x.bfloat16()), dense.weight.bfloat16(), layer.bias.bfloat16()
        )
        assert torch.equal(layer(x), expected)
    assert torch.equal(DequantizedLinear(layer)(x), layer(x))


@pytest.mark.parametrize(
    "text", ["mxfp8", "mxfp8/even/nearest", "mxfp8/floor/half_away", "floor", "floor/odd", "ocp/nearest", ""]
)
def test_an_unknown_rounding_of_activations_is_refused(text: str) -> None:
    with pytest.raises(
        ModelError, match=f"unknown rounding of activations {text!r}: use none, mxfp8/floor/nearest, or"
    ):
        Activation.parse(text)


@pytest.mark.parametrize("activation", [None, Activation(), Activation.parse(mxfp8.ARITHMETIC)])
def test_dense_copy_changes_nothing_but_the_memory(activation: Activation | None) -> None:
    model, kept = lora_net(), lora_net()
    for layer in packed_layers(model):
        layer.activation = activation
    for layer in packed_layers(kept):
        layer.activation = activation
        layer.cache_dequantized = True
    assert set(kept.state_dict()) == set(model.state_dict())
    x = torch.randn(4, 64)
    with torch.inference_mode():
        kept(x)  # as a first forward: what it leaves behind must not affect training
    for net in (model, kept):
        net(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), kept.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name
    assert all(layer._dense is not None for layer in packed_layers(kept))
    assert kept.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_dense_copy_follows_the_state_dict() -> None:
    layer, other = packed_layer(seed=0), packed_layer(seed=1)
    layer.cache_dequantized = True
    x = torch.randn(2, 64)
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}], ids=lambda options: next(iter(options)))
def test_kinds_of_lora(options: dict[str, bool]) -> None:
    """Weight-decomposed and rank-stabilised adapters give the same output and gradients as over the dense twin."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    twin = Net()
    twin.up, twin.down = dense_twin(twin.up), dense_twin(twin.down)
    config = LoraConfig(r=8, target_modules=["up", "down"], init_lora_weights=False, **options)
    model, twin = get_peft_model(Net(), config), get_peft_model(twin, config)
    twin.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(4, 64)
    y, expected = model(x), twin(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    grads = {name: p.grad for name, p in twin.named_parameters()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == (6 if "use_dora" in options else 4)
    for name in trained:
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grads[name])


@pytest.mark.parametrize("activation", ["even/nearest", mxfp8.ARITHMETIC])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_inside_torch_compile(backend: str, activation: str) -> None:
    model = lora_net()
    packed_layers(model)[0].activation = Activation.parse(activation)
    x = torch.randn(4, 64)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == 7
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    layer = packed_layer()
    dense = dense_twin(layer)
    x = torch.randn(4, 64, dtype=dtype, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, y2 = layer(x), dense(x2)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, y2)
    y.float().square().sum().backward()
    y2.float().square().sum().backward()
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, x2.grad)


def test_no_dense_weight_is_registered() -> None:
    layer = packed_layer()
    assert set(layer.state_dict()) == {"weight_packed", "weight_scale", "bias"}
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"bias"}
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == (48, 64)
    assert not layer.weight.requires_grad


def test_casts_leave_the_bytes_alone() -> None:
    layer = packed_layer()
    before = copy.deepcopy(layer.state_dict())
    layer.to(torch.bfloat16).half().double()
    assert layer.bias.dtype == torch.float64
    assert layer.weight_packed.dtype == layer.weight_scale.dtype == torch.uint8
    assert torch.equal(layer.weight_packed, before["weight_packed"])


def test_meta_and_state_dict() -> None:
    source = packed_layer()
    for assign in (True, False):
        layer = Mxfp4Linear(64, 48, device="meta", compute_dtype=torch.float32)
        assert layer.weight.device.type == "meta"
        if not assign:
            layer.to_empty(device="cpu")
        layer.load_state_dict(source.state_dict(), assign=assign)
        x = torch.randn(3, 64)
        assert torch.equal(layer(x), source(x))
        assert not layer.weight_packed.requires_grad


def test_lora_trains_and_the_base_stays() -> None:
    model = lora_net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(4, 64)
    losses = []
    for _ in range(3):
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        unchanged = torch.equal(p, before[name])
        assert unchanged == ("weight_packed" in name or "weight_scale" in name or "up.base_layer.bias" in name), name


def test_lora_equals_lora_over_the_dense_twin() -> None:
    model = lora_net()
    twin = copy.deepcopy(model)
    for layer in (twin.base_model.model.up, twin.base_model.model.down):
        layer.base_layer = dense_twin(layer.base_layer)
    x = torch.randn(4, 64)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    grads = {name: p.grad for name, p in twin.named_parameters()}
    checked = 0
    for name, p in model.named_parameters():
        if "lora_" in name or "norm" in name:
            torch.testing.assert_close(p.grad, grads[name])
            checked += 1
    assert checked == 6


def test_gradient_checkpointing() -> None:
    model = lora_net()
    x = torch.randn(4, 64)
    grads = []
    for recompute in (False, True):
        model.base_model.model.recompute = recompute
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().sum()
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None])
    assert len(grads[0]) == 6
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_backward_keeps_no_dense_weight() -> None:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        packed_layer(bias=False)(torch.randn(4, 64, requires_grad=True))
    assert {t.dtype for t in saved} == {torch.uint8}


@pytest.mark.parametrize("kernels", [native, reference])
def test_layers_of_all_sizes_take_turns_in_the_memory_of_one_weight(kernels: ModuleType, monkeypatch) -> None:
    """Also in inference mode first, in several threads at once, and with a smaller layer after a larger one."""
    layers = [packed_layer(k, n, seed=k + n) for k, n in ((64, 96), (32, 32), (96, 128), (64, 32))]
    given = [torch.randn(5, layer.in_features) for layer in layers]
    wanted = [dense_twin(layer)(x) for layer, x in zip(layers, given, strict=True)]
    monkeypatch.setattr(codec, "_kernel", lambda *_: kernels)

    def check(_: int) -> bool:
        with torch.inference_mode():
            layers[2](given[2])  # the largest, so that training uses its memory
        inputs = [x.clone().requires_grad_() for x in given]
        outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        for out, want in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(out, want)
        sum(out.square().sum() for out in outputs).backward()
        for layer, x, out in zip(layers, inputs, outputs, strict=True):
            torch.testing.assert_close(x.grad, 2 * out.detach() @ dense_twin(layer).weight)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(20)))


def test_no_forward_or_backward_allocates_a_weight_again() -> None:
    class Allocated(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if "empty" in func.__name__ and isinstance(result, Tensor):
                self.largest = max(self.largest, result.numel())
            return result

    layer, x = packed_layer(512, 2048), torch.randn(2, 512, requires_grad=True)  # larger than in other tests
    for warm in (False, True):
        with Allocated() as allocated:
            layer(x).sum().backward()
        assert warm == (allocated.largest < 512 * 2048)


def test_refuses_what_mxfp4_cannot_hold() -> None:
    with pytest.raises(ModelError, match="multiple of 32, not 33"):
        Mxfp4Linear(33, 8)


def _train(model: nn.Module, x: Tensor, steps: int = 2) -> list[Tensor]:
    """Return outputs of ``steps`` SGD steps on ``x``."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    outputs = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(y.detach())
    return outputs


def _fsdp_worker(rank: int, world: int, port: int, make: Callable[[], nn.Module]) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        x = torch.randn(world, 4, 64, generator=torch.Generator().manual_seed(1))[rank]
        for policy in (
            MixedPrecisionPolicy(),
            MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        ):
            model, twin = make(), make()
            net = next(m for m in model.modules() if isinstance(m, Net))
            net.recompute = policy.param_dtype is not None
            net.up.cache_dequantized = net.recompute
            bases = [p.detach().clone() for name, p in twin.named_parameters() if "weight_" in name]
            fully_shard(net.up, mp_policy=policy)
            fully_shard(net.down, mp_policy=policy)
            fully_shard(model, mp_policy=policy)
            packed = next(p for name, p in net.up.named_parameters() if "weight_packed" in name)
            assert isinstance(packed, DTensor)
            assert packed.dtype == torch.uint8
            assert packed.to_local().shape[0] == 96 // world
            sharded = _train(model, x)
            if policy.param_dtype is None and world == 1:
                for a, b in zip(sharded, _train(twin, x), strict=True):
                    torch.testing.assert_close(a, b)
            elif policy.param_dtype is None:
                # The first output is independent of the other rank; the second follows the mean of both gradients.
                torch.testing.assert_close(sharded[0], _train(twin, x)[0])
                whole = torch.randn(world, 4, 64, generator=torch.Generator().manual_seed(1)).flatten(0, 1)
                twin = make()
                expected = _train(twin, whole)[1][4 * rank : 4 * rank + 4]
                torch.testing.assert_close(sharded[1].float(), expected.float(), rtol=2e-2, atol=2e-2)
            got = [p for name, p in model.named_parameters() if "weight_" in name]
            for a, b in zip(got, bases, strict=True):
                assert torch.equal(a.full_tensor(), b)
            if world == 1:  # the digest's import of transformers is slow in a spawned rank
                from tests.helpers.digests import model_digest

                assert model_digest(model) == model_digest(make())
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_fsdp2_one_rank() -> None:
    threads = torch.get_num_threads()
    _fsdp_worker(0, 1, _free_port(), lora_net)
    torch.set_num_threads(threads)


def test_fsdp2_two_ranks() -> None:
    mp.spawn(_fsdp_worker, args=(2, _free_port(), Net), nprocs=2)
