"""What actor and critic share: a packed MXFP4 base under adapters with fp32 master weights."""

import math

import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils import tensordict_utils as tu
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
from verl_aqn.mxfp4.experts import packed_layers
from verl_aqn.mxfp4.linear import Activation, Mxfp4Linear
from verl_aqn.mxfp4.sharding import allow_packed_shards
from verl_aqn.noise.norms import find_norms


def norm_tensors(model: PreTrainedModel) -> list[str]:
    """Names of the parameters of all norms that can carry noise."""
    norms = find_norms(model)
    return [f"{name}.{leaf}" for name, norm in norms.items() for leaf, _ in norm.named_parameters()]


class PackedBase(FSDPEngineWithLMHead):
    """verl's FSDP engine, whose model may be a packed one.

    `layout`: how batches are laid out, and why not otherwise, in one line; `taken`: what the model can take.
    """

    layout: str = SEPARATE
    taken: Layout = Layout(together=False)

    def optimizer_step(self) -> float:
        """As verl's, which leaves out an update whose gradient is not finite and goes on; here the run stops."""
        norm = super().optimizer_step()
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient is not finite (norm {norm}): nothing was updated; lower the learning rate"
            )
        return norm

    def _causal_model(self, noisy: bool = False) -> PreTrainedModel:
        """The base as a causal language model: packed, or in bf16 where the recipe leaves it unquantised.

        Only the first rank reads it: under FSDP2 verl has the others' shards sent from there, and theirs may be on
        meta. Norms are read everywhere where the model is ``noisy``. Tied weights would not stay tied on their way
        from meta (verl does not do it either): such a model is read by every rank.
        """
        told = self.model_config.override_config  # by verl_aqn.preflight.prepare.tell_workers
        path = self.model_config.local_path
        attention = told.get("attn_implementation")
        if attention == "sdpa":
            attention = None  # transformers' choice: sdpa, or eager for the models that sdpa cannot serve
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
        """With what verl does to every model that it loads."""
        apply_monkey_patch(
            model=module,
            use_remove_padding=self.use_remove_padding,
            ulysses_sp_size=self.ulysses_sequence_parallel_size,
        )
        if self.model_config.enable_gradient_checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return module

    def _decide_layout(self, module: PreTrainedModel, share: bool) -> None:
        """Decide how batches are laid out. `share`: each prompt once for its samples where the model can take it.

        Raises ConfigError where sequence parallelism is asked for a model whose sequences cannot stand in one row.
        """
        found = decide(module)
        self.taken = agreed(found)
        agree_on_attention(module, found is not None)
        ulysses = self.ulysses_sequence_parallel_size > 1
        flash = attention_of(module).startswith("flash")
        if not self.taken.together:
            if ulysses:
                key = "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size"
                raise ConfigError(f"{key} must be 1: each sequence needs a row of its own, because {self.taken.reason}")
            self.layout = f"{SEPARATE}: {self.taken.reason}"
        elif self.use_remove_padding and (flash or ulysses):
            self.layout = PACKED
        elif share and not getattr(self.model_config, "use_fused_kernels", False):
            self.layout = SHARED
            use_attention(module, NAME)
        else:
            self.layout = SEPARATE

    def prepare_model_inputs(self, micro_batch):
        """As verl's; in rows of their own unless the layout is of packed rows."""
        if self.layout != PACKED:
            tu.assign_non_tensor(micro_batch, use_remove_padding=False)
        return super().prepare_model_inputs(micro_batch)

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
        # An adapter from outside brings the dropout of its own training: the update's probabilities would not be those
        # that the rollout sampled from.
        for layer in module.modules():
            if isinstance(layer, LoraLayer):
                layer.lora_dropout["default"] = torch.nn.Identity()
        return module

    def save_checkpoint(self, local_path: str, *arguments, **named) -> None:
        """As verl's, and PEFT's own config: verl's lora_train_meta.json knows neither rsLoRA nor patterns."""
        super().save_checkpoint(local_path, *arguments, **named)
        peft = getattr(getattr(self.module, "_fsdp_wrapped_module", self.module), "peft_config", None)
        if peft and torch.distributed.get_rank() == 0:
            peft["default"].save_pretrained(local_path)
