#!/usr/bin/env bash
# A launch in the manner of verl's examples: variables, defaults, arrays, continued lines, "$@".
set -xeuo pipefail

N_GPUS=${N_GPUS:-4}
DATA_DIR=${DATA_DIR:-"${HOME}/data/my set"}
prompt_length=$((1024 * 2))
response_length=$((1024 * 6))
stamp=$(date +%Y%m%d)

if [ "${ENGINE:-vllm}" = "vllm" ]; then
    max_num_seqs=64
fi

DATA=(
    data.train_files="['${DATA_DIR}/train.parquet']"
    data.val_files="${DATA_DIR}/test.parquet"
    data.train_batch_size=64
    # data.train_batch_size=1024
    data.max_prompt_length=$prompt_length
    data.max_response_length=${response_length}
    data.reward_fn_key=data_source
)
ACTOR=(
    actor_rollout_ref.actor.optim.lr=3e-6
    actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=0.05
    actor_rollout_ref.actor.grad_clip=0.5
    actor_rollout_ref.actor.ppo_mini_batch_size=64
    actor_rollout_ref.actor.ppo_micro_batch_size=16
    actor_rollout_ref.actor.use_kl_loss=True
    actor_rollout_ref.actor.fsdp_config.model_dtype=bfloat16
    actor_rollout_ref.actor.strategy=fsdp
)

python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    "${DATA[@]}" "${ACTOR[@]}" \
    actor_rollout_ref.model.path=Qwen/Qwen2.5-1.5B-Instruct \
    actor_rollout_ref.model.lora_rank=64 \
    actor_rollout_ref.model.use_liger=True \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=5 \
    actor_rollout_ref.rollout.log_prob_micro_batch_size=32 \
    actor_rollout_ref.rollout.max_num_seqs=$max_num_seqs \
    actor_rollout_ref.rollout.load_format=dummy_dtensor \
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.ref.fsdp_config.param_offload=True \
    custom_reward_function.path=rewards/mine.py \
    reward_model.reward_manager=dapo \
    +reward_model.reward_kwargs.overlong_buffer_cfg.enable=True \
    +reward_model.reward_kwargs.overlong_buffer_cfg.len=512 \
    trainer.logger='["console","wandb"]' \
    trainer.experiment_name=lora-${stamp} \
    trainer.default_local_dir=checkpoints/lora \
    trainer.n_gpus_per_node="$N_GPUS" trainer.nnodes=1 \
    trainer.no_such_key=1 \
    trainer.total_epochs=2 "$@" 2>&1 | tee train.log
