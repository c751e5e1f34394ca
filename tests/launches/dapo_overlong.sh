# DAPO: group filtering, arithmetic, settings that the launch adds, a name that only a shell knows.
max_response_length=$((1024 * 8))
overlong=1024
CKPTS=${CKPTS:-"${HOME}/ckpts/dapo"}
ray job submit --no-wait -- python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    algorithm.filter_groups.enable=True \
    algorithm.filter_groups.metric=seq_reward \
    data.train_files=train.parquet data.val_files=test.parquet \
    data.max_response_length=${max_response_length} \
    actor_rollout_ref.model.path=Qwen/Qwen2.5-32B \
    +actor_rollout_ref.model.override_config.max_position_embeddings=32768 \
    actor_rollout_ref.actor.clip_ratio_high=0.28 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.rollout.name=vllm \
    reward_model.reward_manager=dapo \
    +reward_model.reward_kwargs.overlong_buffer_cfg.enable=True \
    +reward_model.reward_kwargs.overlong_buffer_cfg.len=${overlong} \
    trainer.experiment_name="dapo-$(basename $PWD)" \
    trainer.default_local_dir="${CKPTS}" \
    trainer.nnodes=${SLURM_JOB_NUM_NODES}
