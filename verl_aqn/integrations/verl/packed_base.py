"""The common engine of actor and critic: a packed MXFP4 base, and adapters with fp32 master weights."""

import math
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_aqn.checkpoints.loading import load_dense, load_model, read_values
from verl_aqn.checkpoints.packing import is_packed
from verl_aqn.errors import ConfigError, TrainingError
from verl_aqn.models.attention import NAME
from verl_aqn.models.layouts import (
    PACKED,
    SEPARATE,
    SHARED,
    Layout,
    agree_on_attention,
    agreed,
    attention_of,
    decide,
    use_attention,
)
from verl_aqn.models.recompute import recompute_mlps
from verl_aqn.mxfp4.experts import packed_layers
from verl_aqn.mxfp4.linear import Activation, Mxfp4Linear
from verl_aqn.mxfp4.sharding import allow_packed_shards
from verl_aqn.noise.norms import find_norms
from verl_aqn.runs.checkpoints import saving


def norm_tensors(model: PreTrainedModel) -> list[str]:
    """Return the names of the parameters of all norms that can have noise."""
    norms = find_norms(model)
    return [f"{name}.{leaf}" for name, norm in norms.items() for leaf, _ in norm.named_parameters()]


class PackedBase(FSDPEngineWithLMHead):
    """verl's FSDP engine, whose model may be packed.

    `layout`: the layout of batches, with the reason, in one line; `taken`: the layouts that the model supports.
    """

    layout: str = SEPARATE
    taken: Layout = Layout(together=False)

    def optimizer_step(self) -> float:
        """Update the weights as verl does, but stop the run if the gradient is not finite.

        verl would skip such an update and continue.
        """
        norm = super().optimizer_step()
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient is not finite (norm {norm}): the weights were not updated; lower the learning rate"
            )
        return norm

    def _causal_model(self, noisy: bool = False) -> PreTrainedModel:
        """Load the base as a causal language model: packed, or in bf16 if the recipe does not quantise it.

        Under FSDP2 only the first rank reads the weights: verl sends the other ranks their shards, so their model may
        be on the meta device. If the model is ``noisy``, every rank reads the norms. Tied weights do not stay tied when
        they are moved from the meta device, so every rank reads such a model (as in verl).
        """
        told = self.model_config.override_config  # set by verl_aqn.preflight.prepare.tell_workers
        path = self.model_config.local_path
        attention = told.get("attn_implementation")
        if attention == "sdpa":
            attention = None  # transformers chooses: sdpa, or eager for models that do not support sdpa
        packed = is_packed(path)
        if packed:
            allow_packed_shards()

        def load(device: str) -> PreTrainedModel:
            if packed:
                return load_model(path, torch.bfloat16, device, attention)
            return load_dense(path, torch.bfloat16, attention, device)

        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        elsewhere = rank > 0 and self.engine_config.strategy == "fsdp2"
        module = load("meta" if elsewhere else "cpu")
        if elsewhere and module.all_tied_weights_keys:
            module = load("cpu")
        elif elsewhere and noisy:
            read_values(module, path, norm_tensors(module))
        if not packed:
            return module.train()
        for layer in packed_layers(module):
            layer.activation = Activation.parse(told.get("mxfp4_activation"))
            if isinstance(layer, Mxfp4Linear):
                layer.cache_dequantized = bool(told.get("mxfp4_cache_dequantized"))
        return module

    def _finished(self, module: PreTrainedModel) -> PreTrainedModel:
        """Apply the changes that verl applies to every model that it loads, and return the model."""
        apply_monkey_patch(
            model=module,
            use_remove_padding=self.use_remove_padding,
            ulysses_sp_size=self.ulysses_sequence_parallel_size,
        )
        if self.model_config.enable_gradient_checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return module

    def _decide_layout(self, module: PreTrainedModel, share: bool) -> None:
        """Decide the layout of batches.

        `share`: whether samples may share their prompt, if the model supports it.

        Raises:
            ConfigError: sequence parallelism is set, but the model does not support several sequences in one row.
        """
        found = decide(module)
        self.taken = agreed(found)
        agree_on_attention(module, found is not None)
        ulysses = self.ulysses_sequence_parallel_size > 1
        flash = attention_of(module).startswith("flash")
        if not self.taken.together:
            if ulysses:
                key = "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size"
                raise ConfigError(f"{key} must be 1: each sequence needs its own row, because {self.taken.reason}")
            self.layout = f"{SEPARATE}: {self.taken.reason}"
        elif self.use_remove_padding and (flash or ulysses):
            self.layout = PACKED
        elif share and not getattr(self.model_config, "use_fused_kernels", False):
            self.layout = SHARED
            use_attention(module, NAME)
        else:
            self.layout = SEPARATE

    def prepare_model_inputs(self, micro_batch):
        """Prepare the inputs as verl does, with one row per sequence unless the layout has packed rows."""
        if self.layout != PACKED:
            tu.assign_non_tensor(micro_batch, use_remove_padding=False)
        return super().prepare_model_inputs(micro_batch)

    def _build_lora_module(self, module):
        # Adapters start with random numbers; verl draws them from a generator without a seed.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.engine_config.seed)
            module = super()._build_lora_module(module)
        # verl casts adapters to the dtype of the first frozen parameter (bf16 here). An Adam step of 1e-5 on a weight
        # of 0.02 is below half of bf16's spacing there and would be lost.
        for param in module.parameters():
            if param.requires_grad:
                param.data = param.data.float()
        # A loaded adapter has the dropout of its earlier training. With it, the update's probabilities would differ
        # from those that the rollout sampled from.
        for layer in module.modules():
            if isinstance(layer, LoraLayer):
                layer.lora_dropout["default"] = torch.nn.Identity()
        # Accelerators have verl's gradient checkpointing, whose cost there is small beside that of their memory.
        if get_device_name() == "cpu" and not self.model_config.enable_gradient_checkpointing:
            recompute_mlps(module)
        return module

    def save_checkpoint(self, local_path: str, *arguments, **named) -> None:
        """Save as verl does, and add PEFT's own config: verl's lora_train_meta.json lacks rsLoRA and patterns."""
        with saving(Path(local_path)):
            super().save_checkpoint(local_path, *arguments, **named)
            peft = getattr(getattr(self.module, "_fsdp_wrapped_module", self.module), "peft_config", None)
            if peft and torch.distributed.get_rank() == 0:
                peft["default"].save_pretrained(local_path)

    def load_checkpoint(self, local_path: str, *arguments, **named) -> None:
        """Load as verl does, but refuse an optimizer that has other settings than the recipe's.

        torch restores the settings with the state, so the recipe's would have no effect. This concerns a run that
        begins from another run's checkpoint (`trainer.resume_from_path`).

        Raises:
            ConfigError: the settings differ.
        """
        recipes = self._optimizer_settings()
        super().load_checkpoint(local_path, *arguments, **named)
        for key, value in self._optimizer_settings().items():
            if value != recipes[key]:
                raise ConfigError(
                    f"the optimizer in {local_path} has {key} {value}, but the recipe's has {recipes[key]}: set the "
                    "same in optim, or begin with the checkpoint's adapter alone "
                    "(actor_rollout_ref.model.lora_adapter_path)"
                )

    def _optimizer_settings(self) -> dict[str, Any]:
        """Return the settings of the optimizer that a checkpoint replaces; the learning rate without its schedule."""
        (group, *_) = self.optimizer.param_groups if self.optimizer is not None else [{}]
        found = {"lr": group.get("initial_lr"), "betas": group.get("betas"), "weight_decay": group.get("weight_decay")}
        return {key: list(value) if isinstance(value, list | tuple) else value for key, value in found.items()}
