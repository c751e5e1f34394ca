"""Sampling with per-request seeds on vLLM's CPU platform."""

import os
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("VERL_PLATFORM", "cpu")


@pytest.fixture(scope="module")
def ours():
    from verl_aqn.integrations.vllm import cpu_sampler
    from verl_aqn.integrations.vllm import vllm_plugin as plugin

    plugin.register()
    return cpu_sampler


@pytest.fixture(scope="module")
def draw(ours):
    """`draw(logits, generators)`: vLLM's sampler."""
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    sampler = TopKTopPSampler()
    assert sampler.forward.__func__ is TopKTopPSampler.forward_cpu
    return lambda logits, generators, k=None, p=None: sampler(logits.clone(), generators, k, p)[0].tolist()


def generators(ours, *seeds):
    return {row: ours.KeyedGenerator(seed) for row, seed in enumerate(seeds) if seed is not None}


def test_vllm_s_request_gets_a_generator_that_can_go_back(ours):
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    def request(generator):
        return CachedRequestState("r", [1, 2], [], None, generator, ([0],), 0, []).generator

    assert request(None) is None
    found = request(torch.Generator().manual_seed((1 << 62) + 5))
    assert (type(found).__name__, found.seed) == ("KeyedGenerator", (1 << 62) + 5)
    with pytest.raises(
        RuntimeError, match="does not use offset"
    ):  # what vLLM does to a generator if it discards a token
        torch.Generator().get_offset()
    first = found.key()
    found.set_offset(found.get_offset() - 4)
    assert found.key() == first != found.key()


def test_a_row_s_token_does_not_depend_on_the_batch(ours, draw):
    torch.manual_seed(0)
    logits = torch.randn(6, 1003)
    seeds = (11, 12, 13, 14, 15, 16)
    together = draw(logits, generators(ours, *seeds))
    assert draw(logits, generators(ours, *seeds)) == together
    assert [draw(logits[[row]], generators(ours, seed))[0] for row, seed in enumerate(seeds)] == together
    assert draw(logits.flip(0), generators(ours, *reversed(seeds))) == together[::-1]
    assert len({tuple(draw(logits, generators(ours, *(seed + n for seed in seeds)))) for n in range(5)}) == 5


def test_seeds_hold_beside_requests_that_have_none(ours, draw):
    """Stock vLLM ignores the seeds of a batch if one request has no seed."""
    logits = torch.zeros(3, 5000)
    found = [draw(logits, generators(ours, 7, None, 9)) for _ in range(5)]
    assert len({(a, c) for a, _, c in found}) == 1
    assert len({b for _, b, _ in found}) > 1


def test_tokens_of_a_request_are_drawn_anew(ours, draw):
    state = generators(ours, 5)
    assert len({draw(torch.zeros(1, 5000), state)[0] for _ in range(50)}) > 45


def test_without_seeds_vllm_s_own_sampler_draws(ours, draw, monkeypatch):
    monkeypatch.setattr(ours, "_compiled_sample", None)
    assert len(draw(torch.zeros(3, 50), {})) == 3
    # vLLM's warm-up of a compiled model: no request made these generators.
    assert len(draw(torch.zeros(3, 50), {row: torch.Generator() for row in range(3)})) == 3


def test_top_k_holds(ours, draw):
    logits = torch.arange(100.0).repeat(2, 1) / 100
    for seed in range(20):
        assert min(draw(logits, generators(ours, seed, seed + 99), k=torch.tensor([3, 3], dtype=torch.int32))) >= 97


def test_samples_have_the_probabilities_of_the_logits(ours):
    """χ² test of 40,000 draws over 12 tokens, with keys as in requests; the bound is that of p = 1e-4."""
    probs = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.08, 0.06, 0.04, 0.03, 0.02, 0.01, 0.006, 0.004])
    n = 40_000
    keys = ours.keys_of({row: ours.KeyedGenerator(row) for row in range(n)}, n)
    drawn = ours.sample(probs.log().repeat(n, 1), keys).bincount(minlength=12)
    assert float(((drawn - n * probs) ** 2 / (n * probs)).sum()) < 37.4
    state = ours.KeyedGenerator(3)
    keys = torch.cat([ours.keys_of({0: state}, 1) for _ in range(n)])
    drawn = ours.sample(probs.log().repeat(n, 1), keys).bincount(minlength=12)
    assert float(((drawn - n * probs) ** 2 / (n * probs)).sum()) < 37.4


def test_the_numbers_are_exponential_and_their_neighbours_independent(ours):
    keys = ours.keys_of({row: ours.KeyedGenerator(row) for row in range(64)}, 64)
    found = ours.exponentials(keys, 49_152).double()
    assert 0 < float(found.min()) < 1e-5
    assert float(found.mean()) == pytest.approx(1, abs=0.003)
    assert float(found.var()) == pytest.approx(1, abs=0.01)
    uniform = torch.exp(-found)
    shares = torch.histc(uniform, 64, 0, 1) / uniform.numel()
    assert float((shares * 64 - 1).abs().max()) < 0.025
    for shift, dim in ((1, 1), (2, 1), (8, 1), (256, 1), (1, 0)):
        a, b = (uniform - 0.5).flatten(), (uniform.roll(shift, dim) - 0.5).flatten()
        assert abs(float((a * b).mean() / (a * a).mean())) < 0.004, (shift, dim)


@pytest.mark.parametrize(("rows", "width"), [(1, 49_152), (5, 1003), (48, 130), (3, 7)])
def test_compiled_and_plain_numbers_are_the_same_bits(ours, rows, width):
    """Hashing wraps at 32 bits, in vectorised code and in the remainder loop."""
    compiled = torch.compile(ours.exponentials, dynamic=True)
    keys = torch.randint(-(1 << 31), 1 << 31, (rows, 2)).to(torch.int32)
    torch.testing.assert_close(compiled(keys, width), ours.exponentials(keys, width), rtol=1e-5, atol=0)


def test_the_seam_in_vllm_is_where_we_think(ours):
    import inspect

    from vllm.v1.worker import gpu_model_runner

    source = inspect.getsource(gpu_model_runner.GPUModelRunner)
    assert "generator.manual_seed(sampling_params.seed)" in source
    assert "gen.set_offset(gen.get_offset() - 4)" in source
    state = SimpleNamespace(generator=ours.KeyedGenerator(1))
    assert state.generator.get_offset() == 0
