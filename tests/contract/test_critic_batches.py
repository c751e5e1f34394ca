"""The critic's micro-batches: verl's V1 trainer copies those of the actor only."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from tests.helpers.composed import recipe_with


class Told(Exception):
    """Stop verl's trainer before it starts workers."""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (True, 16384, 16384)),
        (["critic.ppo_max_token_len_per_gpu=512"], (True, 512, 512)),
        (["critic.use_dynamic_bsz=false", "critic.ppo_micro_batch_size_per_gpu=3"], (False, 3, 3)),
        (
            ["critic.use_dynamic_bsz=false", "critic.ppo_micro_batch_size_per_gpu=3",
             "critic.forward_micro_batch_size_per_gpu=6"],
            (False, 3, 6),
        ),
    ],
)  # fmt: skip
def test_a_critic_s_worker_gets_the_micro_batches_of_the_recipe(overrides, expected, monkeypatch):
    from verl.trainer.ppo.utils import Role
    from verl.trainer.ppo.v1 import trainer_base

    from verl_aqn.integrations.verl.trainer import AqnTrainer

    told = {}

    def note(cls, config, **named):
        told[cls] = config
        return SimpleNamespace()

    def stop(**named):
        raise Told

    made = AqnTrainer.__new__(AqnTrainer)
    made.config = recipe_with("ppo", *overrides)
    OmegaConf.resolve(made.config)
    # Its own path would be loaded, and no key of the model decides micro-batches.
    made.config.critic.model = None
    made.use_critic, made.use_reference_policy, made.hybrid_engine = True, False, True
    for name in ("_init_tokenizer", "_init_dataloader", "_init_dump_executor"):
        monkeypatch.setattr(made, name, lambda: None)
    monkeypatch.setattr(trainer_base, "RayClassWithInitArgs", note)
    monkeypatch.setattr(trainer_base, "create_colocated_worker_cls", stop)
    pools = trainer_base.ResourcePoolManager
    monkeypatch.setattr(pools, "create_resource_pool", lambda self: self.resource_pool_dict.update(all="pool"))
    monkeypatch.setattr(pools, "get_resource_pool", lambda self, role: "pool")
    with pytest.raises(Told):
        made._setup()
    engine = told[made.role_worker_mapping[Role.Critic]].engine_config
    sizes = (
        (engine.max_token_len_per_gpu, engine.infer_max_token_len_per_gpu)
        if engine.use_dynamic_bsz
        else (engine.micro_batch_size_per_gpu, engine.infer_micro_batch_size_per_gpu)
    )
    assert (engine.use_dynamic_bsz, *sizes) == expected
