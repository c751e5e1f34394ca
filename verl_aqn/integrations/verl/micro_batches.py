"""The micro-batches of a critic, which verl's V1 trainer does not take from the recipe."""

from omegaconf import DictConfig, open_dict


def settle_critic(critic: DictConfig) -> None:
    """Copy the critic's settings of micro-batches to the keys that verl's V1 trainer and its worker read.

    verl copies them for the actor only. A critic would always get dynamic micro-batches of up to 32,768 tokens. Updates
    and values share one limit of tokens.
    """
    with open_dict(critic):
        critic.ppo_infer_max_token_len_per_gpu = critic.ppo_max_token_len_per_gpu
        critic.fsdp.use_dynamic_bsz = critic.use_dynamic_bsz
        critic.fsdp.micro_batch_size_per_gpu = critic.ppo_micro_batch_size_per_gpu
        critic.fsdp.infer_micro_batch_size_per_gpu = critic.forward_micro_batch_size_per_gpu
