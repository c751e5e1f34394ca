"""Checks for verl's own trainer: what `verl_aqn.stock`, as a model's external_lib, does in each process.

There is one runtime patch. verl imports the external_lib while it sets up its trainer. After that,
`PPOTrainer._init_dataloader`, the next method that verl calls, turns the trainer into a `StockTrainer`.
"""

import sys
from typing import Any

from verl_aqn.config.stock_settings import OPTION, adapt, check_supported, parse_settings
from verl_aqn.errors import ConfigError, EnvironmentFault
from verl_aqn.integrations.verl.verl_plugin import check_versions

TRAINER = "verl.trainer.ppo.v1.trainer_base"
V0 = "verl.trainer.main_ppo_v0"


def install() -> None:
    """Patch verl's trainer in this process, if it is loaded, so that it is checked.

    Raises:
        ConfigError: the process uses verl's older trainer.
        EnvironmentFault: the version of verl is not supported.
    """
    check_versions(["verl"])  # a stock run uses the versions of the other packages that verl itself uses
    if V0 in sys.modules:
        raise ConfigError(f"{OPTION} cannot check verl's older trainer: set trainer.use_v1=true")
    module = sys.modules.get(TRAINER)
    if module is None or hasattr(module.PPOTrainer, "aqn_hooked"):
        return
    if "_init_dataloader" not in vars(module.PPOTrainer):
        raise EnvironmentFault("verl's PPOTrainer has no _init_dataloader: this version of verl is not supported")
    init_dataloader = module.PPOTrainer._init_dataloader

    def init_checked(self: Any) -> None:
        become_checked(self)
        init_dataloader(self)
        self.begin_evidence()

    module.PPOTrainer._init_dataloader = init_checked
    module.PPOTrainer.aqn_hooked = True


def become_checked(trainer: Any) -> None:
    """Turn verl's own trainer, which has set up only its tokenizer so far, into a checked trainer.

    Raises:
        ConfigError: the run cannot be checked.
    """
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    from verl_aqn.integrations.verl.stock_trainer import StockTrainer

    settings = parse_settings(trainer.config)
    check_supported(trainer.config)
    if type(trainer) is not PPOTrainerSync:
        raise ConfigError(f"{OPTION} checks verl's own synchronous trainer, not {type(trainer).__name__}")
    trainer.__class__ = StockTrainer
    trainer.settings, trainer.changed = settings, adapt(trainer.config)
