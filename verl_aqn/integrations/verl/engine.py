"""verl's FSDP engine with a packed MXFP4 base.

verl imports this module through `actor_rollout_ref.model.external_lib`, so that processes without a model stay light.
"""

from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from verl.utils import tensordict_utils as tu
from verl.utils.model import convert_weight_keys, extract_multi_modal_inputs
from verl.workers.engine.base import EngineRegistry

from verl_aqn.checkpoints.actual_base import actual_base
from verl_aqn.checkpoints.adapter import ADAPTER_DTYPE, digest_name, served_adapter, unwrapped
from verl_aqn.checkpoints.building import is_multimodal
from verl_aqn.checkpoints.packing import is_packed
from verl_aqn.checkpoints.slices import Slices, cut
from verl_aqn.digest import tensor_digest
from verl_aqn.integrations.verl.critic import AqnValueEngine
from verl_aqn.integrations.verl.kept_forward import KeptForward
from verl_aqn.integrations.verl.packed_base import PackedBase
from verl_aqn.models.attention import lay_out
from verl_aqn.models.layouts import SHARED, shared_inputs
from verl_aqn.models.shared_prompts import SharedPrompts, share_prompts
from verl_aqn.models.vocabulary import Scored, score, scores_of, use_scoring_head
from verl_aqn.mxfp4.experts import packed_layers
from verl_aqn.noise import NoiseInjector


class AqnFSDPEngine(KeptForward, PackedBase):
    """The actor's engine: a packed base (uint8), and LoRA with fp32 master weights that is used and sent in bf16.

    `noise` is set if the recipe has noise on norms: for all forwards of a step if the recipe wants the noise in the
    actor too, otherwise for one measurement of its effect. `slicings`: the parts of the adapter that ranks of the
    rollout hold ({} stands for the whole adapter), known after the first sync. `sent_adapters`: the digest of each of
    these parts at the last sync. `sent_bytes`: the bytes that were sent to each replica at the last sync.
    """

    slicings: tuple[Slices, ...] = ()
    sent_adapters: tuple[str, ...] = ()
    sent_bytes: int = 0
    noise: NoiseInjector | None = None
    scores: bool = False  # whether the head returns log-probs and entropies, and no logits
    _served: tuple[tuple[str, torch.Tensor], ...] = ()  # the first adapter that was sent, until `slicings` is known

    def _build_module(self):
        told = self.model_config.override_config
        noisy = told.get("noise_in_actor") or told.get("noise_measured")
        noisy = noisy and not self.engine_config.forward_only
        if not is_packed(self.model_config.local_path) and not noisy and not self.text_part:
            if self.model_config.override_config.get("attn_implementation") == "sdpa":
                # Let transformers choose: sdpa, or eager for models that do not support sdpa.
                self.model_config.hf_config._attn_implementation = None
            module = super()._build_module()
        else:
            module = self._finished(self._causal_model(noisy=bool(noisy)))
        self._decide_layout(module, share=True)
        if noisy:
            # At this point the norms are whole and have the rollout's names; PEFT and FSDP wrap them later.
            self.noise = NoiseInjector(module, beside=True)
        return module

    def _build_lora_module(self, module):
        module = super()._build_lora_module(module)
        self._decide_scores(module)
        return module

    def _decide_scores(self, module) -> None:
        """Let the head of a built model return log-probs instead of logits, if model and layout allow it."""
        self.scores = self.layout == SHARED and self.taken.bare and use_scoring_head(module)

    @cached_property
    def text_part(self) -> bool:
        """Return whether the actor is the text part of a multimodal model, which vLLM serves under the full names."""
        return is_multimodal(Path(self.model_config.local_path))

    @contextmanager
    def disable_adapter(self):
        """Switch adapter and noise off, which gives the reference policy."""
        with super().disable_adapter(), self.noise.paused() if self.noise else nullcontext():
            self.adapter_is_off = True
            try:
                yield
            finally:
                self.adapter_is_off = False

    def get_per_tensor_param(self, layered_summon=False, base_sync_done=False, **kwargs):
        """Return the adapter's tensors in bf16 for the rollout, and keep the digests that its ranks must show later.

        B already contains each layer's scaling. vLLM has only one scaling for a whole adapter, and gets 1.
        """
        params, peft_config = super().get_per_tensor_param(layered_summon, base_sync_done, **kwargs)
        if peft_config is None or not base_sync_done:
            return params, peft_config
        rank, scalings = self.model_config.lora_rank, self._scalings()
        tensors = ((unwrapped(name), tensor.to(ADAPTER_DTYPE)) for name, tensor in params)
        renamed = self.module.checkpoint_names.adapter_name if self.text_part else str
        adapter = [(renamed(name), tensor) for name, tensor in served_adapter(tensors, scalings.__getitem__, rank)]
        self.sent_bytes = sum(tensor.nbytes for _, tensor in adapter)
        named = tuple((digest_name(name), tensor) for name, tensor in adapter)
        self._served = () if self.slicings else tuple((name, tensor.cpu()) for name, tensor in named)
        self.sent_adapters = _digests(named, self.slicings or ({},))
        one = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
        return iter(adapter), peft_config | one

    def _scalings(self) -> dict[str, float]:
        """Return PEFT's scaling of B·A for every adapted layer, by the name under which B is sent."""
        layers = ((name, layer) for name, layer in self.module.named_modules() if isinstance(layer, LoraLayer))
        scalings = {f"{unwrapped(name)}.lora_B.weight": layer.scaling["default"] for name, layer in layers}
        return convert_weight_keys(scalings, getattr(self.module, "_fsdp_wrapped_module", self.module))

    def expect_slices(self, slicings: tuple[Slices, ...]) -> None:
        """Make `sent_adapters` have a digest for each of `slicings` from now on, also for the adapter sent first."""
        self.slicings = slicings
        if self._served:
            self.sent_adapters, self._served = _digests(self._served, slicings), ()

    def base(self, every: bool) -> dict[str, Any]:
        """Return the current `mxfp4.actual_base.ActualBase` of this process, without its tensors unless `every`.

        All ranks must call this together. `activations`: how the packed layers round their inputs, with one entry if
        all do the same.
        """
        actual = actual_base(self.module, self.model_config.local_path)._asdict()
        rounding = sorted({str(layer.activation or "none") for layer in packed_layers(self.module)})
        return {key: value for key, value in actual.items() if every or "digest" in key or key == "faults"} | {
            "activations": rounding
        }

    def prepare_model_inputs(self, micro_batch):
        """Prepare each prompt once for all of its samples if the model supports that, or else verl's own rows."""
        if not self._shares_prompts(micro_batch):
            lay_out(None)
            score(None)
            return super().prepare_model_inputs(micro_batch)
        shared = share_prompts(list(micro_batch["prompts"].unbind()), list(micro_batch["responses"].unbind()))
        lay_out(shared)  # for the forward that follows
        tokens = _tokens_of(micro_batch, shared)
        if self.scores:
            score(tokens)
        return shared_inputs(shared, self.taken.keeps), {"shared": shared, "tokens": tokens}

    def prepare_model_outputs(self, output, output_args, micro_batch, logits_processor_func):
        """Return log_probs (and entropy), jagged like input_ids as in verl; prompt positions are 0 and never read."""
        if not self._shares_prompts(micro_batch):
            return self.noted(super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func))
        lay_out(None)
        score(None)
        shared: SharedPrompts = output_args["shared"]
        tokens: Scored = output_args["tokens"]
        found = output.logits[0] if self.taken.keeps else output.logits[0, shared.column]
        if not self.scores:  # the head returned logits [N, V]
            found = scores_of(found, tokens)
        result = {"log_probs": found[:, 0]}
        if tokens.entropy:
            result["entropy"] = found[:, 1]
        offsets = micro_batch["input_ids"].offsets()
        total = int(offsets[-1])
        return self.noted(
            {
                name: torch.nested.nested_tensor_from_jagged(
                    values.new_zeros(total).index_put((shared.flat,), values), offsets
                )
                for name, values in result.items()
            }
        )

    def _shares_prompts(self, micro_batch) -> bool:
        return self.layout == SHARED and not (
            extract_multi_modal_inputs(micro_batch.get("multi_modal_inputs", []))
            or tu.get_non_tensor_data(data=micro_batch, key="use_fused_kernels", default=False)
            or tu.get_non_tensor_data(data=micro_batch, key="calculate_sum_pi_squared", default=False)
            or tu.get_non_tensor_data(data=micro_batch, key="distillation_use_topk", default=False)
        )


def _tokens_of(micro_batch, shared: SharedPrompts) -> Scored:
    """Return the response tokens of a micro-batch, with the temperature of each and what verl asks of them."""
    temperature = micro_batch["temperature"]
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.float()[shared.sample]
    entropy = tu.get_non_tensor_data(data=micro_batch, key="calculate_entropy", default=False)
    return Scored(shared.label, temperature, bool(entropy))


def _digests(served: tuple[tuple[str, torch.Tensor], ...], slicings: tuple[Slices, ...]) -> tuple[str, ...]:
    """Return the digest of an adapter's parts for each of `slicings`."""
    return tuple(tensor_digest((name, cut(tensor, slices.get(name))) for name, tensor in served) for slices in slicings)


def _register() -> None:
    """Register the engines so that verl uses them instead of its own: by vendor, which verl looks up first."""
    for model_type, engine in (("language_model", AqnFSDPEngine), ("value_model", AqnValueEngine)):
        register = partial(EngineRegistry.register, model_type=model_type, backend=["fsdp", "fsdp2"])
        register(device="cpu")(engine)
        for device, vendor in (("cuda", "nvidia"), ("npu", "huawei")):
            register(device=device, vendor=vendor)(engine)


_register()
# Checkpoints are loaded with weights_only (`runs.checkpoints`). verl's also contain numpy's random state.
_RANDOM_STATE: list[Any] = [np.empty(0).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.uint32))]
torch.serialization.add_safe_globals(_RANDOM_STATE)
