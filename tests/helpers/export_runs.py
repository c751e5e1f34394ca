"""Runs as `verl-aqn train` leaves them, with a checkpoint as verl's FSDP engine writes it, made without both."""

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.run_folders import begin_run, end_run, write_lines
from verl_aqn.checkpoints.adapter import Adapter
from verl_aqn.checkpoints.loading import dequantize_checkpoint, load_model
from verl_aqn.checkpoints.packing import checkpoint_digest, is_packed, quantize_checkpoint
from verl_aqn.config.compose import load_recipe
from verl_aqn.evaluation.export.trained_model import logprobs
from verl_aqn.tasks.parquet import row, write_parquet
from verl_aqn.tasks.smollm2 import tiny_model

RANK, ALPHA = 6, 12  # not one of the ranks that vLLM supports


def trained(base: Path, seed: int = 3, std: float = 0.3, **settings: Any) -> PeftModel:
    """Return the actor's model after training: a packed base with random fp32 adapters on all linear layers."""
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    model = get_peft_model(load_model(base), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            parameter.data.normal_(std=std)
    return model


def packed_base(root: Path) -> Path:
    """Make a packed tiny model with SmolLM2's tokenizer below `root`."""
    quantize_checkpoint(tiny_model(root / "tiny"), root / "packed")
    return root / "packed"


def state_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the state dict that `save_lora_only` saves."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}


def adapter_of(state: dict[str, torch.Tensor]) -> Adapter:
    """Return the adapter of a checkpoint's state, assembled in a different way from the exporter's."""
    pairs = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): name
        for name in state
        if ".lora_A." in name
    }
    return Adapter(
        {
            module: (state[name].bfloat16(), state[name.replace(".lora_A.", ".lora_B.")].bfloat16())
            for module, name in sorted(pairs.items())
        },
        RANK,
        float(ALPHA),
    )


def write_actor(folder: Path, states: list[dict[str, torch.Tensor]]) -> Path:
    """Write verl's checkpoint of an actor, one file per rank."""
    folder.mkdir(parents=True)
    for rank, state in enumerate(states):
        torch.save(state, folder / f"model_world_size_{len(states)}_rank_{rank}.pt")
    (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": len(states)}))
    meta = {"r": RANK, "lora_alpha": ALPHA, "task_type": "CAUSAL_LM"}
    (folder / "lora_train_meta.json").write_text(json.dumps(meta))
    return folder


def exported_run(
    experiment: Path,
    base: Path,
    state: dict[str, torch.Tensor],
    answers: dict[str, str] | None = None,
    step: int = 3,
    problems: int = 4,
    peft: PeftModel | None = None,
) -> Path:
    """Write a run under `experiment` with one checkpoint.

    `answers`: responses of its validation, by prompt as verl records it. `problems`: number of validation problems.
    `peft`: the actor's model, whose config the checkpoint gets as from the engine; the recorded digest is then that of
    what the engine sends.
    """
    data = experiment / "test.parquet"
    experiment.mkdir(parents=True, exist_ok=True)
    write_parquet(questions(problems), data)
    config: Any = load_recipe("e12_aggressive_1ep", ["profile=cpu", f"actor_rollout_ref.model.path={base}"])
    config.data.val_files = str(data)
    config.actor_rollout_ref.model.lora_rank = RANK
    config.data.max_response_length = config.actor_rollout_ref.rollout.response_length = 6
    folder = begin_run(experiment, OmegaConf.to_container(config, resolve=True))
    run = folder.path
    write_actor(run / "checkpoints" / f"global_step_{step}" / "actor", [state])
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(step))
    digest = adapter_of(state).digest()
    if peft:
        peft.peft_config["default"].save_pretrained(str(run / "checkpoints" / f"global_step_{step}" / "actor"))
        digest = sent_digest(base, peft)
    evidence = [{"kind": "adapter", "step": step, "sent": digest}]
    if is_packed(base):
        evidence.insert(0, {"kind": "base", "when": "start", "disk": checkpoint_digest(base)})
    write_lines(run / "evidence.jsonl", evidence)
    if answers is not None:
        lines = [{"input": text, "output": answer, "gts": "1", "acc": 0.0} for text, answer in answers.items()]
        write_lines(run / f"validation/{step}.jsonl", lines)
    return end_run(folder).path


def write_training_data(run: Path, problems: int = 150) -> None:
    """Give a run's folder the training data that its config names."""
    file = run / "train.parquet"
    write_parquet(
        [row | {"prompt": [{"role": "user", "content": f"Add {n}!"}]} for n, row in enumerate(questions(problems))],
        file,
    )
    config = OmegaConf.load(run / "config.yaml")
    config.data.train_files = str(file)
    OmegaConf.save(config, run / "config.yaml")


def sent_digest(base: Path, peft: PeftModel) -> str:
    """Return the digest of the adapter as the engine sends it."""
    from tests.helpers.outside_adapters import bare, sent

    engine = bare(base, rank=max(len(p) for n, p in peft.named_parameters() if "lora_A" in n))
    engine.module = peft
    sent(engine)
    return engine.sent_adapters[0]


def questions(number: int) -> list[dict[str, Any]]:
    """Return rows of validation data."""
    return [
        row(
            "verl_aqn/word_problems",
            [{"role": "user", "content": f"{one} + 1?"}],
            str(one + 1),
            split="test",
            index=one,
            question=f"{one} + 1?",
            answer=str(one + 1),
        )
        for one in range(number)
    ]


def transformers_engine(config, model, adapters, prompts, expected, scored, *, of_run):
    """Replace vLLM in these tests: load the exported folder by plain transformers and PEFT."""
    dense = model
    if of_run:
        dense = model.parent / "dense"
        if not dense.exists():
            dequantize_checkpoint(model, dense)
    tokenizer = AutoTokenizer.from_pretrained(model)
    said = []
    for adapter in adapters:
        network = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
        if adapter is not None:
            network = PeftModel.from_pretrained(network, str(adapter), autocast_adapter_dtype=False)
        answers = greedily(network, tokenizer, config, prompts, expected)
        with torch.no_grad():
            said.append({"answers": answers, "logprobs": logprobs(network, prompts, scored)})
    return said


def greedily(network, tokenizer, config, prompts, expected):
    answers = []
    for ids, text in zip(prompts, expected, strict=True):
        tokens, tops = [], []
        for _ in range(config.actor_rollout_ref.rollout.response_length):
            with torch.no_grad():
                logp = network(torch.tensor([ids + tokens])).logits[0, -1].float().log_softmax(-1)
            values, indices = logp.topk(20)
            tops.append(dict(zip(indices.tolist(), values.tolist(), strict=True)))
            tokens.append(int(logp.argmax()))
            if tokens[-1] == tokenizer.eos_token_id:
                break
        answer = {"tokens": tokens, "text": tokenizer.decode(tokens, skip_special_tokens=True)}
        answers.append(answer if answer["text"] == text else answer | {"tops": tops})
    return answers
