# Another rollout with its own settings, a config of its own, and a path from the output of `pwd`.
DIR="$(pwd)"
now() { date +%d-%H-%M; }
NAME="multi-$(now)"
python3 -m verl.trainer.main_ppo --config-path="$DIR/config" --config-name='gsm8k_multiturn_grpo' \
    algorithm.adv_estimator=grpo \
    data.train_files=train.parquet data.val_files=test.parquet \
    data.return_raw_chat=True \
    actor_rollout_ref.model.path=Qwen/Qwen2.5-3B-Instruct \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=32 \
    actor_rollout_ref.rollout.name=sglang \
    actor_rollout_ref.rollout.multi_stage_wake_up=True \
    actor_rollout_ref.rollout.over_sample_rate=0.1 \
    actor_rollout_ref.rollout.mode=async \
    actor_rollout_ref.rollout.multi_turn.tool_config_path="$DIR/tools.yaml" \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=32 \
    trainer.experiment_name=$NAME
