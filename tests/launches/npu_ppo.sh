# PPO on NPUs with dynamic micro-batches, and sizes of micro-batches that verl then does not read.
NPUS=${NPUS:-16}
python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=gae \
    data.train_files=train.parquet data.val_files=test.parquet \
    actor_rollout_ref.model.path=Qwen/Qwen3-8B \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1 \
    actor_rollout_ref.actor.use_torch_compile=True \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1 \
    critic.model.path=Qwen/Qwen3-8B \
    critic.ulysses_sequence_parallel_size=2 \
    critic.model.fsdp_config.param_offload=True \
    trainer.n_gpus_per_node=$NPUS trainer.device=npu
