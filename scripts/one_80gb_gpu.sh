#!/bin/sh
# Instruction tuning of a whole 7B on one GPU with 80 GB: weights in bfloat16 alone, rounded at random, 8-bit moments
# (extra `torchao`). On 141 GB leave out --master_weights False: weights and sums of gradients are float32 then.
# `python -m llava.train.estimate_memory` tells before the start whether it fits.
set -eu
: "${MODEL:=checkpoints/llava-med-7b-pretrain}"
: "${DATA:=data/instruct/llava_med_instruct_60k_inline_mention.json}"
: "${IMAGES:=data/images}"
: "${OUT:=checkpoints/llava-med-7b}"

python llava/train/train_mem.py \
    --model_name_or_path "$MODEL" \
    --version v0 \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --bf16 True \
    --tf32 True \
    --optim adamw_torch_8bit \
    --master_weights False \
    --packing True \
    --max_tokens_per_batch 4096 \
    --gradient_accumulation_steps 4 \
    --torch_compile True \
    --output_dir "$OUT" \
    --num_train_epochs 3 \
    --save_strategy steps \
    --save_steps 500 \
    --save_total_limit 2 \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --warmup_steps 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --model_max_length 2048 \
    --lazy_preprocess True \
    --report_to none "$@"
