"""The config of a run of stock verl that our evidence watches."""


def composed(*overrides: str):
    """The config of `main_ppo` with these overrides."""
    from pathlib import Path

    import verl
    from hydra import compose, initialize_config_dir

    folder = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(config_dir=str(folder), version_base=None):
        return compose(
            "ppo_trainer",
            overrides=[
                "actor_rollout_ref.model.external_lib=verl_aqn.stock",
                "actor_rollout_ref.model.lora_rank=8",
                "actor_rollout_ref.rollout.name=vllm",
                *overrides,
            ],
        )
