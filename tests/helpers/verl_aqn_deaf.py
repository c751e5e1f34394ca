"""A vLLM worker whose norms hold the noise but compute without it, as with a graph that was made before.

The plugin is for engines whose worker extension has verl_aqn in its name: hence that of this file.
"""

from typing import Any

from verl_aqn.integrations.verl.worker_extension import AqnWorkerExtension
from verl_aqn.noise import find_norms


class DeafToNoise(AqnWorkerExtension):
    """Norms are written and read back as ever; their forward takes the weights that were there at the start."""

    def aqn_prepare(self, order: dict) -> dict:
        """As ever, and from now on the forward of every norm uses its weight as it is now."""
        answer = super().aqn_prepare(order)
        for norm in find_norms(self.model_runner.get_model()).values():
            _freeze(norm)
        return answer


def _freeze(module: Any) -> None:
    kept, forward = module.weight.data.clone(), module.forward

    def deaf(*args: Any, **named: Any) -> Any:
        held, module.weight.data = module.weight.data, kept
        try:
            return forward(*args, **named)
        finally:
            module.weight.data = held

    module.forward = deaf
