"""Extensions of vLLM's worker: noise on its norms, and reading back its weights."""

import logging
import traceback
from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from verl_aqn.errors import EnvironmentFault, EvidenceError
from verl_aqn.integrations.verl.base_evidence import TABLES, table_digest
from verl_aqn.integrations.verl.sync_socket import of_this_run
from verl_aqn.integrations.vllm import readback
from verl_aqn.integrations.vllm import vllm_plugin as plugin
from verl_aqn.integrations.vllm.tensor_digests import describe_tensors
from verl_aqn.noise import NoiseInjector, NoiseSpec
from verl_aqn.preflight.peak import memory_peak

logger = logging.getLogger(__name__)


class StockWorkerExtension(vLLMColocateWorkerExtension):
    """Methods for reading back weights, which the server calls on every rank of the engine by `collective_rpc`.

    Runs of stock verl (`verl_aqn.stock`) use this class. Because of "stock" in its name, the plugin does not change the
    model's norms.
    """

    def update_weights_from_ipc(self, *args: Any, **kwargs: Any) -> None:
        """Receive weights as verl does, but raise an error about them only after the sender has got its answers.

        If vLLM rejects an adapter, verl's receiver closes its socket, and the sender would wait for ever.
        """
        self._aqn_refused: Exception | None = None
        super().update_weights_from_ipc(*args, **kwargs)
        if self._aqn_refused is not None:
            raise self._aqn_refused

    def _update_weights(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._update_weights(*args, **kwargs)
        except Exception as error:
            logger.error("vLLM rejected the weights:\n%s", traceback.format_exc())
            # Drop the traceback: its frames would keep verl's buffer alive, and the sender would get no answer.
            self._aqn_refused = self._aqn_refused or error.with_traceback(None)

    def aqn_base(self, modules: list[str]) -> dict:
        """Return the base as the engine holds it: the kernels of the packed `modules`, and every tensor."""
        model = self.model_runner.get_model()
        return readback.describe_base(model, modules) | describe_tensors(model, modules)

    def aqn_base_told(self, modules: list[str]) -> dict:
        """Return `aqn_base` without its tables, which are kept for `aqn_base_tables`; `told` is their digest."""
        answer = self.aqn_base(modules)
        self.aqn_tables = {key: answer.pop(key) for key in TABLES}
        return answer | {"told": table_digest(self.aqn_tables)}

    def aqn_base_tables(self) -> dict:
        """Return the tables of the last `aqn_base_told`."""
        return self.aqn_tables

    def aqn_adapter(self, parts: bool = True) -> dict:
        """Return the adapter that the engine multiplies with, and its `slices` and `sizes` if `parts`."""
        answer = readback.describe_adapter(self.model_runner.get_model())
        return answer if parts else {key: value for key, value in answer.items() if key not in ("slices", "sizes")}

    def aqn_adapter_or_fault(self) -> dict:
        """Return `aqn_adapter` and the adapter's `dtype`, or `{"fault"}` if there is no adapter that can be read."""
        dtype = str(self.model_runner.vllm_config.lora_config.lora_dtype).removeprefix("torch.")
        try:
            plugin.check_version()
            if not plugin.is_registered():
                raise EnvironmentFault(
                    "vLLM has not loaded verl-aqn's plugin: add verl_aqn to VLLM_PLUGINS if it is set"
                )
            return self.aqn_adapter() | {"dtype": dtype}
        except (EnvironmentFault, EvidenceError) as error:
            return {"fault": str(error)}


class AqnWorkerExtension(StockWorkerExtension):
    """The same methods, and noise on the norms of every rank."""

    def _get_zmq_handle(self) -> str:
        return of_this_run(super()._get_zmq_handle())

    def aqn_prepare(self, order: dict) -> dict:
        """Return the engine's norms, which are kept clean since loading, and the effect that `order` would have."""
        injector = getattr(self.model_runner.get_model(), "aqn_injector", None)
        if injector is None:
            raise EnvironmentFault(
                "vLLM worker: the verl-aqn plugin is not loaded: check that verl-aqn is installed there"
            )
        self.aqn_injector: NoiseInjector = injector
        return {
            **self.aqn_injector.describe(NoiseSpec.from_dict(order)),
            "vllm": plugin.check_version(),
            "dtype": str(self.model_runner.vllm_config.model_config.dtype),
        }

    def aqn_apply_noise(self, order: dict) -> dict:
        """Write clean weights + noise as `order` says, and return evidence that is read back from the weights."""
        with torch.no_grad():
            return self.aqn_injector.apply(NoiseSpec.from_dict(order))

    def aqn_restore(self) -> dict:
        """Write the clean weights, and return evidence that is read back from them."""
        with torch.no_grad():
            return self.aqn_injector.restore()

    def aqn_memory_peak(self) -> dict[str, int]:
        """Return this process's peak memory in bytes: `resident`, and `device` if it computes on a device."""
        return memory_peak()
