"""vLLM workers that lose an adapter, for runs of stock verl.

The plugin watches engines whose worker extension has verl_aqn in its name, and does not touch their norms if the name
has stock in it. This explains the name of this file.
"""

from typing import Any

from verl_aqn.integrations.verl.worker_extension import StockWorkerExtension


class SwallowsAll(StockWorkerExtension):
    """A worker that receives every adapter and silently drops it."""

    def _update_weights(self, weights: Any, peft_config: Any, base_sync_done: bool) -> None:
        pass


class SwallowsUpdates(StockWorkerExtension):
    """A worker that loads the first adapter and drops later ones."""

    def _update_weights(self, weights: Any, peft_config: Any, base_sync_done: bool) -> None:
        if not getattr(self, "has_one", False):
            self.has_one = True
            super()._update_weights(weights, peft_config=peft_config, base_sync_done=base_sync_done)
