"""An adapter from outside in vLLM, as the actor sends it, gives PEFT's log-probs for all ranks and scalings."""

import json

import pytest
import torch
from peft import PeftModel

from tests.helpers.outside_adapters import SERVED, built, sent, write_adapter
from tests.integration.conftest import ask_vllm
from verl_aqn.checkpoints.loading import load_model
from verl_aqn.checkpoints.packing import quantize_checkpoint
from verl_aqn.preflight.adapter_folder import read_folder

KINDS = ("rslora", "patterns", "some layers")  # in fp32, as PEFT saves them
TOKENS = torch.arange(300, 348).view(4, 12).tolist()


def logprobs(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor(TOKENS)
    with torch.no_grad():
        logp = model(ids).logits[:, :-1].float().log_softmax(-1)
    return logp.gather(2, ids[:, 1:, None]).squeeze(2)


@pytest.fixture(scope="module")
def served(tiny_model, tmp_path_factory):
    """For each kind of adapter: log-probs of the engine, of PEFT and of the base alone, and the folder's digest."""
    root = tmp_path_factory.mktemp("outside")
    quantize_checkpoint(tiny_model, root / "packed")
    adapters, expected = {}, {}
    for kind in KINDS:
        folder = write_adapter(root / kind, tiny_model, **SERVED[kind])
        adapter = read_folder(folder, root / "packed")
        tensors, config = sent(built(root / "packed", folder, adapter.widest))
        adapters[kind] = tensors, json.loads(json.dumps(config, default=list))  # of enums and sets
        peft = PeftModel.from_pretrained(load_model(root / "packed"), folder).eval()
        with peft.disable_adapter():
            without = logprobs(peft)
        expected[kind] = logprobs(peft), without, adapter.digest()
    torch.save({"tokens": TOKENS, "adapters": adapters}, root / "sent.pt")
    return ask_vllm("outside", root / "packed", root / "sent.pt"), expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_rollout_s_log_probs_are_peft_s(served, kind):
    found, (peft, without, digest) = served[0][kind], served[1][kind]
    off = (torch.tensor(found["logprobs"]) - peft).abs().mean()
    # In nats per token. Without an adapter the two differ by 0.028, like PEFT in bf16 and in float32.
    assert off < 0.06
    assert (without - peft).abs().mean() > 0.5
    assert found["digest"] == digest
