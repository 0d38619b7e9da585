#!/bin/sh
# LLaVA-Med v1.0, stage 1: the projector learns biomedical concepts (7 hours on 8 × A100 as published).
# Paper: global batch 128, learning rate 2e-3, 1 epoch, 2048 tokens, no weight decay.
set -eu
: "${MODEL:=checkpoints/llava-7b-v0}"                 # LLaVA-7B v0 (llava.model.apply_delta makes it)
: "${DATA:=data/alignment/llava_med_alignment_500k.json}"
: "${IMAGES:=data/images}"
: "${OUT:=checkpoints/llava-med-7b-pretrain}"
: "${GPUS:=8}"

torchrun --nnodes=1 --nproc_per_node="$GPUS" --master_port=25001 \
    llava/train/train_mem.py \
    --model_name_or_path "$MODEL" \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower openai/clip-vit-large-patch14 \
    --tune_mm_mlp_adapter True \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end True \
    --version v0 \
    --bf16 True \
    --tf32 True \
    --output_dir "$OUT" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 2 \
    --global_batch_size 128 \
    --packing True \
    --save_strategy steps \
    --save_steps 2400 \
    --save_total_limit 1 \
    --learning_rate 2e-3 \
    --weight_decay 0. \
    --warmup_steps 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --lazy_preprocess True \
    --report_to none "$@"
