"""Evidence for a run of stock verl: `actor_rollout_ref.model.external_lib=verl_aqn.stock`, and nothing else.

verl imports this module in each of its processes, after it has made the trainer and before that does anything. See
docs/stock_verl.md.
"""

from verl_aqn.integrations.verl.stock_hook import install

install()
