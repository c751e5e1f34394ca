"""Evidence for a run of stock verl. The only setting needed: `actor_rollout_ref.model.external_lib=verl_aqn.stock`.

verl imports this module in each of its processes: after the trainer object was created and before it does anything.
See docs/stock_verl.md.
"""

from verl_aqn.integrations.verl.stock_hook import install

install()
