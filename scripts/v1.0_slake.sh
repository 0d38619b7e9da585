#!/bin/sh
# LLaVA-Med v1.0 fine-tuned on SLAKE (1 hour on 8 × A100 as published for VQA-RAD). The paper's tables are after
# several numbers of epochs (--num_train_epochs 1, 3, 9, 15): one command each.
set -eu
: "${MODEL:=checkpoints/llava-med-7b}"                # stage 2's output
: "${DATA:=data/slake/train.json}"
: "${IMAGES:=data/slake/images}"
: "${OUT:=checkpoints/llava-med-7b-slake}"
: "${GPUS:=8}"

torchrun --nnodes=1 --nproc_per_node="$GPUS" --master_port=25001 \
    llava/train/train_mem.py \
    --model_name_or_path "$MODEL" \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower openai/clip-vit-large-patch14 \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end True \
    --bf16 True \
    --tf32 True \
    --output_dir "$OUT" \
    --num_train_epochs 3 \
    --per_device_train_batch_size 1 \
    --global_batch_size 64 \
    --save_strategy steps \
    --save_steps 5000 \
    --save_total_limit 3 \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --warmup_steps 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --fsdp "full_shard auto_wrap" \
    --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --lazy_preprocess True \
    --report_to wandb "$@"
