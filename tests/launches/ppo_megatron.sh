# A launch that mostly cannot be had: another engine, another rollout, preference feedback.
python3 -m verl.trainer.main_ppo --config-path=config \
    --config-name='ppo_megatron_trainer.yaml' \
    algorithm.adv_estimator=gae algorithm.use_pf_ppo=True \
    data.train_batch_size=256 data.max_response_length=1024 \
    actor_rollout_ref.model.path=some/model \
    actor_rollout_ref.actor.megatron.tensor_model_parallel_size=4 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \
    actor_rollout_ref.actor.use_torch_compile=False \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4 \
    actor_rollout_ref.rollout.name=sglang \
    critic.model.path=some/model critic.optim.lr=1e-5 \
    critic.model.fsdp_config.param_offload=True \
    critic.ppo_micro_batch_size_per_gpu=4 \
    trainer.device=npu trainer.n_gpus_per_node=16 $@
