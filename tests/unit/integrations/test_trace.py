"""Which region of which tensor a loader wrote to which place, however it writes."""

import gc
import weakref

import pytest
import torch
from torch import nn

from verl_aqn.checkpoints.boxes import Box, compose
from verl_aqn.checkpoints.slices import NOTHING, Loaded
from verl_aqn.errors import EvidenceError
from verl_aqn.integrations.vllm.trace import Trace


def load(loader, tensors: dict, **shapes) -> tuple[Loaded, dict]:
    """Return what `loader(parameters, tensors)` does with parameters of these shapes, and the parameters."""
    parameters = {name: nn.Parameter(torch.zeros(shape), requires_grad=False) for name, shape in shapes.items()}
    with Trace() as trace:
        loader(parameters, dict(trace.watch(tensors.items())))
    return trace.loaded(parameters.items()), parameters


def tensor(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def rows_and_columns(p, t):
    """A rank's part: rows of q and k stacked, columns of o."""
    p["qk"].data.narrow(0, 0, 4).copy_(t["q"].narrow(0, 4, 4))
    p["qk"].data.narrow(0, 4, 2).copy_(t["k"][2:4])
    p["o"].data.copy_(t["o"].chunk(2, dim=1)[1])


def test_rows_and_columns_of_a_rank():
    tensors = {"q": tensor(8, 6), "k": tensor(4, 6), "o": tensor(6, 8)}
    loaded, parameters = load(rows_and_columns, tensors, qk=(6, 6), o=(6, 4))
    assert {name: loaded.region(name) for name in tensors} == {"q": [4, 4, 0, 6], "k": [2, 2, 0, 6], "o": [0, 6, 4, 4]}
    for name, (row, rows, column, columns) in {n: loaded.region(n) for n in tensors}.items():
        part = loaded.read(name, parameters.__getitem__)
        assert torch.equal(part, tensors[name][row : row + rows, column : column + columns])
    assert loaded.names() == {"o": "o"}


def through_copies(p, t):
    p["w"].data.copy_(torch.cat([t["a"].to(torch.float64).t().contiguous().t(), t["b"]]).float())


def permuted_heads(p, t):
    p["w"].data.copy_(torch.cat([t["a"].view(2, 2, 2, 6).transpose(1, 2).reshape(8, 6), t["b"]]))


def interleaved(p, t):
    p["w"][0:8:2] = t["a"][:4]
    p["w"][1:8:2] = t["a"][4:]
    p["w"].data[8:].copy_(t["b"] * 1)


def through_a_new_parameter(p, t):
    p["w"] = nn.Parameter(torch.cat((t["a"], t["b"])), requires_grad=False)


def stacked(p, t):
    both = torch.stack([t["a"][:4], t["b"], t["a"][4:]]).transpose(1, 2).contiguous()
    p["w"].data.copy_(both.transpose(1, 2).reshape(12, 6))


@pytest.mark.parametrize("loader", [through_copies, permuted_heads, interleaved, through_a_new_parameter, stacked])
def test_every_way_of_copying_gives_the_tensors_back(loader):
    tensors = {"a": tensor(8, 6), "b": tensor(4, 6)}
    loaded, parameters = load(loader, tensors, w=(12, 6))
    for name, value in tensors.items():
        assert loaded.region(name) is None
        assert torch.equal(loaded.read(name, parameters.__getitem__), value)
    parameters["w"].data[3, 3] += 1
    read = [loaded.read(name, parameters.__getitem__) for name in tensors]
    assert [torch.equal(part, value) for part, value in zip(read, tensors.values(), strict=True)].count(False) == 1


def test_halves_of_a_fused_tensor_are_blocks_of_rows():
    def loader(p, t):  # the second of two ranks, gate above up
        p["w"].data[:2].copy_(t["gate_up"][2:4])
        p["w"].data[2:].copy_(t["gate_up"][6:8])

    whole = tensor(8, 6)
    loaded, parameters = load(loader, {"gate_up": whole}, w=(4, 6))
    assert loaded.region("gate_up") == [2, 2, 0, 6, 6, 2, 0, 6]
    assert torch.equal(loaded.read("gate_up", parameters.__getitem__), torch.cat([whole[2:4], whole[6:8]]))


def test_experts_have_places_and_others_are_nothing():
    def loader(p, t):
        for place, name in enumerate(("e2", "e3")):
            p["w13"].data[place].narrow(0, 3, 3).copy_(t[name])

    tensors = {name: tensor(3, 6) for name in ("e1", "e2", "e3")}
    loaded, parameters = load(loader, tensors, w13=(2, 6, 6))
    assert loaded.region("e1") == NOTHING
    assert torch.equal(loaded.read("e3", parameters.__getitem__), tensors["e3"])
    assert not loaded.lost


def test_two_copies_must_agree():
    def loader(p, t):
        p["one"].data.copy_(t["w"])
        p["two"].data.copy_(t["w"])

    loaded, parameters = load(loader, {"w": tensor(4, 6)}, one=(4, 6), two=(4, 6))
    assert torch.equal(loaded.read("w", parameters.__getitem__), parameters["one"])
    parameters["two"].data[1, 1] += 1
    with pytest.raises(EvidenceError, match="held twice"):
        loaded.read("w", parameters.__getitem__)


def test_what_is_overwritten_is_not_held_and_what_cannot_be_followed_is_told():
    def loader(p, t):
        p["w"].data.copy_(t["a"])
        p["w"].data.copy_(t["b"])
        p["v"].data.copy_(t["a"].sum(0, keepdim=True).expand(4, 6))
        p["u"].data.copy_(t["b"])
        p["u"].data.zero_()

    loaded, _ = load(loader, {"a": tensor(4, 6), "b": tensor(4, 6)}, w=(4, 6), v=(4, 6), u=(4, 6))
    assert loaded.pieces.keys() == {"b"}
    assert loaded.sources_in == {"w": ["b"]}
    assert "sum" in loaded.lost["a"]


def test_nothing_keeps_a_weight_alive_and_no_address_is_taken_for_another():
    """A loader sees tensors one at a time, and the next tensor may reuse the memory of the last."""
    gone = []
    gc.collect()
    gc.freeze()  # so that a collection does not walk through all imported packages

    def tensors():
        for number in range(20):
            weight = torch.full((64, 64), float(number))
            gone.append(weakref.ref(weight))
            yield f"w{number}", weight
            del weight
            gc.collect()
            assert number < 1 or gone[number - 1]() is None

    parameters = {f"w{number}": torch.zeros(64, 64) for number in range(20)}
    with Trace() as trace:
        for name, weight in trace.watch(tensors()):
            parameters[name].copy_(weight)
            torch.empty(64, 64).fill_(3)
            del weight
    gc.unfreeze()
    loaded = trace.loaded(parameters.items())
    assert loaded.names() == {name: name for name in parameters}


def test_boxes_that_touch_only_in_part():
    """A window of a flat buffer against rows of a matrix inside it."""
    view = Box(10, 0, ((4, 8, 3), (3, 1, 1)))  # 4 rows of 3 out of rows of 8, starting at row 1, column 2
    known = Box(16, 100, ((2, 8, 8), (8, 1, 1)))  # rows 2 and 3
    assert compose(view, known) == [Box(3, 102, ((2, 3, 8), (3, 1, 1)))]
    assert compose(view, Box(0, 0, ((8, 1, 1),))) == []  # row 0
    assert compose(Box(0, 0, ((4, 3, 1),)), Box(0, 0, ((2, 2, 2), (2, 1, 1)))) is None


def test_what_was_computed_with_on_its_way_is_noted_and_copies_are_not():
    def loader(p, t):
        p["a"].data.copy_(-torch.exp(t["a"].float()))
        p["b"].data.copy_(t["b"].to(torch.bfloat16).clone().t().contiguous().t())
        p["c"].data.copy_(t["c"])
        p["c"].data.add_(1)

    loaded, _ = load(loader, {name: tensor(4, 6) for name in "abc"}, a=(4, 6), b=(4, 6), c=(4, 6))
    assert loaded.computed == {"a": "exp, neg", "c": "add_"}
    assert loaded.pieces.keys() == set("abc")
    assert not loaded.lost


def test_a_vector_in_another_order_is_read_back_in_its_own():
    def loader(p, t):  # GPT-NeoX stores q, k and v of each head next to each other
        p["bias"].data.copy_(t["bias"].view(2, 3, 4).transpose(0, 1).reshape(24))

    vector = torch.arange(24.0)
    loaded, parameters = load(loader, {"bias": vector}, bias=(24,))
    assert loaded.region("bias") is None
    assert torch.equal(loaded.read("bias", parameters.__getitem__), vector.view(24, 1))
