"""A vLLM worker whose norms hold the noise but compute without it, like a graph that was captured before.

The plugin acts on engines whose worker extension has verl_aqn in its name, which explains this file's name.
"""

from typing import Any

from verl_aqn.integrations.verl.worker_extension import AqnWorkerExtension
from verl_aqn.noise import find_norms


class DeafToNoise(AqnWorkerExtension):
    """A worker that writes and reads back norms as usual, but computes with their weights from the start."""

    def aqn_prepare(self, order: dict) -> dict:
        """Prepare as usual, then make the forward of every norm use its present weight from now on."""
        answer = super().aqn_prepare(order)
        for norm in find_norms(self.model_runner.get_model()).values():
            _freeze(norm)
        return answer


def _freeze(module: Any) -> None:
    kept, forward = module.weight.data.clone(), module.forward

    def deaf(*args: Any, **named: Any) -> Any:
        adapted, module.weight.data = module.weight.data, kept
        try:
            return forward(*args, **named)
        finally:
            module.weight.data = adapted

    module.forward = deaf
