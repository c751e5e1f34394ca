"""Writing of the PEFT adapter and of the model card of an exported folder."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save

from verl_aqn.checkpoints.adapter import Adapter
from verl_aqn.checkpoints.error_report import FILE
from verl_aqn.checkpoints.loading import PACKED
from verl_aqn.checkpoints.naming import Naming
from verl_aqn.checkpoints.storage import Weights, companions
from verl_aqn.config.serving import served_rank


def write_peft_folder(folder: Path, adapter: Adapter, base: Path) -> None:
    """Fill ``folder`` with the adapter's weights (bf16), its PEFT config, and the tokenizer of ``base``.

    ``adapter`` must have no patterns (`Adapter.uniform`), because vLLM does not read them.
    """
    from peft import LoraConfig

    alpha: Any = int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        inference_mode=True,
        r=adapter.rank,
        lora_alpha=alpha,
        use_rslora=adapter.rslora,
        target_modules=target_modules(adapter, base),
    )
    config.save_pretrained(str(folder))
    # PEFT stores the names in a set, whose order differs between processes.
    file = folder / "adapter_config.json"
    written = json.loads(file.read_text())
    written["target_modules"] = sorted(written["target_modules"])
    file.write_text(json.dumps(written, indent=2) + "\n")
    tensors = {name: tensor.contiguous() for name, tensor in adapter.tensors()}
    # save_file is not used: it raises no OSError for a full disk, and only the owner can read its file.
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    for source in companions(base):
        if source.name not in ("generation_config.json", FILE):  # these describe the base, not the adapter
            shutil.copyfile(source, folder / source.name)


def target_modules(adapter: Adapter, base: Path) -> list[str]:
    """Return the last parts of the adapter's module names if these match no other module, else the full names."""
    naming = Naming.of_folder(base)
    ours = {naming.in_checkpoint(module) for module in adapter.matrices}
    leaves = sorted({module.rpartition(".")[2] for module in adapter.matrices})
    modules = {
        name.removesuffix(PACKED).removesuffix(".weight")
        for name in Weights(base).specs
        if name.endswith((PACKED, ".weight"))
    }
    exact = {module for module in modules if module.rpartition(".")[2] in leaves} == ours
    return leaves if exact else sorted(adapter.matrices)


def write_card(folder: Path, proof: dict[str, Any]) -> None:
    """Write README.md: what the export is, which base it needs, and how it was checked."""
    merged, answers, base = proof["merged"], proof["answers"], proof["base"]
    plain = "DENSE" if base["digest"] else "BASE"
    base_digest = base["digest"] or "none on record (an unquantised base)"
    kind = "a packed MXFP4 checkpoint" if base["digest"] else "an unquantised checkpoint"
    head = ["---", f"base_model: {Path(base['path']).name}", "pipeline_tag: text-generation"]
    head += ["tags: [lora, mxfp4, verl-aqn]", "---", ""]
    activation = {"none": ""}.get(proof["activation"], "MXFP8" if proof["activation"].startswith("mxfp8") else "MXFP4")
    if merged:
        form = "A bf16 model: base (dequantised where it is MXFP4) + scaling·B·A, in fp32 and rounded once."
        if proof["rounding"]:
            form = "A packed MXFP4 model: base + scaling·B·A, in 4 bits, with codes chosen for the outputs of layers."
        text = [f"# {proof['run']}, step {proof['step']}, merged", "", form, *lines_of_rounding(proof)]
        text.append("The unmerged adapter has no such loss.")
        if activation and proof["rounding"]:
            text.append(f"The run also rounded activations to {activation}: serve this model with the same setting.")
        elif activation:
            text.append(f"The run also rounded activations to {activation}; this model does not.")
    else:
        text = [
            f"# {proof['run']}, step {proof['step']}, LoRA adapter",
            "",
            "In bf16, as the rollout used it (the trainer's own copy is fp32). Use it only with the base below and not",
            "with another rounding of the same model: it has learned to compensate for the errors of this base.",
            "",
            "```python",
            "# vLLM, with the base as it is",
            f"llm = vllm.LLM(BASE, enable_lora=True, max_lora_rank={served_rank(proof['rank'])})",
            'llm.generate(prompts, lora_request=LoRARequest("adapter", 1, FOLDER))',
            "",
            "# plain PEFT, with the base dequantised to bf16",
            *(["verl_aqn.checkpoints.loading.dequantize_checkpoint(BASE, DENSE)"] if base["digest"] else []),
            f"base = AutoModelForCausalLM.from_pretrained({plain}, dtype=torch.bfloat16)",
            "model = PeftModel.from_pretrained(base, FOLDER, autocast_adapter_dtype=False)  # the default is fp32",
            "```",
        ]
    text += [
        "",
        f"- run: {proof['run']}, RL step {proof['step']}",
        f"- base: `{base['path']}`, {kind}",
        f"- base digest: {base_digest}",
        f"- adapter digest: {proof['adapter']['digest']} (r={proof['rank']}, α={proof['alpha']:g}"
        f"{', rsLoRA: scaled by α/√r' if proof['rslora'] else ''})",
        *(f"- {line}" for line in lines_of_answers(answers)),
        *([f"- **not distinguished from the base**: {answers['undecided']}"] if answers["undecided"] else []),
        "",
        "The full record is in `verl_aqn_export.json`. Made by verl-aqn.",
    ]
    (folder / "README.md").write_text("\n".join([*head, *text]) + "\n")


def lines_of_rounding(proof: dict[str, Any]) -> list[str]:
    """Return lines about what rounding of a merged model left of the adapter."""
    kept = f"{100 * proof['merge']['kept']:.0f} % of the adapter's update"
    rounding, survived = proof.get("rounding"), proof["answers"].get("survived")
    if not rounding:
        lost = f"error {proof['merge']['loss']:.2f} of it"
        return [f"bf16 kept {kept} ({lost}): an update below 2^-9 of a weight is lost in rounding"]
    lines = [
        f"4 bits kept {kept} in the weights; of its effect on the outputs of layers {rounding['output_error']:.2f} is "
        f"missing or wrong, for {rounding['tokens']} calibration tokens (the bare base has 1)"
    ]
    if survived:
        lines.append(
            f"on log-probabilities {100 * survived['shown']:.0f} % of the adapter's effect survived, and "
            f"{survived['error']:.2f} of it is missing or wrong (the bare base has 1)"
        )
    return lines


def lines_of_answers(answers: dict[str, Any]) -> list[str]:
    """Return lines about responses and log-probabilities; records of earlier versions have fewer fields."""
    near = ""
    bounded = [entry for entry in answers["differing"] if entry["bound"] is not None]
    if farthest := max(bounded, key=lambda entry: entry["gap"], default=None):
        near = f", the others differ within {farthest['gap']:.3g} nats of a tie ({farthest['bound']:g} allowed)"
    lines = [f"{answers['equal']} of {answers['prompts']} greedy responses equal those of {answers['against']}{near}"]
    if "base_equal" not in answers:
        return lines
    needed = f", at least {answers['required']} needed" if answers["required"] is not None else ""
    lines.append(
        f"the bare base gives {answers['base_equal']} of them; of {answers['telling']} short responses that the base "
        f"does not give, the export gives {answers['telling_equal']}{needed}"
    )
    if (effect := answers["effect"]) and effect["error"] is not None:
        bound = f"at most {effect['allowed']:.2f} allowed" if effect["allowed"] is not None else "too noisy to judge"
        whose = "the effect of the rounded weights" if answers.get("survived") else "the adapter's effect"
        lines.append(
            f"{whose} on the log-probabilities of {effect['tokens']} tokens is {effect['size']:.2g} nats "
            f"per token, and {effect['error']:.2f} of it is missing or wrong ({bound}; the bare base has 1)"
        )
    return lines
