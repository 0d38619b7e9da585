#!/bin/sh
# Fine-tuning on one GPU with 12–24 GB: 4-bit base, LoRA, checkpointed activations, 8-bit paged optimizer.
# `python -m llava.train.estimate_memory` tells before the start whether it fits.
set -eu
: "${MODEL:=checkpoints/llava-med-7b}"
: "${DATA:=data/vqa_rad/train.json}"
: "${IMAGES:=data/vqa_rad/images}"
: "${OUT:=checkpoints/llava-med-7b-qlora}"

python llava/train/train_mem.py \
    --model_name_or_path "$MODEL" \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --lora_enable True \
    --bits 4 \
    --lora_r 64 \
    --lora_alpha 16 \
    --mm_projector_lr 2e-5 \
    --bf16 True \
    --tf32 True \
    --output_dir "$OUT" \
    --num_train_epochs 3 \
    --per_device_train_batch_size 1 \
    --global_batch_size 16 \
    --optim paged_adamw_8bit \
    --save_strategy steps \
    --save_steps 500 \
    --save_total_limit 2 \
    --learning_rate 2e-4 \
    --weight_decay 0. \
    --warmup_steps 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --report_to none "$@"
