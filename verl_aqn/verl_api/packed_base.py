"""What actor and critic share: a packed MXFP4 base under adapters with fp32 master weights."""

import math

import torch
from transformers import PreTrainedModel
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_aqn.errors import TrainingError
from verl_aqn.mxfp4.checkpoint import is_packed
from verl_aqn.mxfp4.experts import packed_layers
from verl_aqn.mxfp4.linear import Activation, Mxfp4Linear
from verl_aqn.mxfp4.model import load_dense, load_model
from verl_aqn.mxfp4.sharding import allow_packed_shards


class PackedBase(FSDPEngineWithLMHead):
    """verl's FSDP engine, whose model may be a packed one."""

    def optimizer_step(self) -> float:
        """As verl's, which leaves out an update whose gradient is not finite and goes on; here the run stops."""
        norm = super().optimizer_step()
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient is not finite (norm {norm}): nothing was updated; lower the learning rate"
            )
        return norm

    def _causal_model(self) -> PreTrainedModel:
        """The base as a causal language model: packed, or in bf16 where the recipe leaves it unquantised."""
        told = self.model_config.override_config  # by verl_aqn.prepare.tell_workers
        path = self.model_config.local_path
        if not is_packed(path):
            attention = told.get("attn_implementation", "sdpa")
            return load_dense(path, torch.bfloat16, attention).train()
        allow_packed_shards()
        module = load_model(path, dtype=torch.bfloat16)
        for layer in packed_layers(module):
            layer.activation = Activation.parse(told.get("mxfp4_activation"))
            if isinstance(layer, Mxfp4Linear):
                layer.keep_dense = bool(told.get("mxfp4_keep_dense"))
        return module

    def _finished(self, module: PreTrainedModel) -> PreTrainedModel:
        """With what verl does to every model that it loads."""
        apply_monkey_patch(
            model=module,
            use_remove_padding=self.use_remove_padding,
            ulysses_sp_size=self.ulysses_sequence_parallel_size,
        )
        if self.model_config.enable_gradient_checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return module

    def _build_lora_module(self, module):
        # Adapters begin as random numbers, which verl leaves to a generator that nobody has seeded.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.engine_config.seed)
            module = super()._build_lora_module(module)
        # verl casts adapters to the dtype of the first frozen parameter (bf16 here): an Adam step of 1e-5 on a
        # weight of 0.02 is below half of bf16's spacing there and would be lost.
        for param in module.parameters():
            if param.requires_grad:
                param.data = param.data.float()
        return module
