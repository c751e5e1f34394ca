"""Workers of vLLM that lose an adapter, for runs of stock verl.

The plugin watches engines whose worker extension has verl_aqn in its name, and leaves their norms alone where it has
stock in it: hence the name of this file.
"""

from typing import Any

from verl_aqn.integrations.verl.worker_extension import StockWorkerExtension


class SwallowsAll(StockWorkerExtension):
    """Every adapter is received, and dropped without a word."""

    def _update_weights(self, weights: Any, peft_config: Any, base_sync_done: bool) -> None:
        pass


class SwallowsUpdates(StockWorkerExtension):
    """The first adapter is loaded; later ones are dropped."""

    def _update_weights(self, weights: Any, peft_config: Any, base_sync_done: bool) -> None:
        if not getattr(self, "has_one", False):
            self.has_one = True
            super()._update_weights(weights, peft_config=peft_config, base_sync_done=base_sync_done)
