#!/bin/sh
# Stage 2 on several machines with torchrun's rendezvous: start this on each, with the same HEAD (host:port).
#   HEAD=node0:29500 NODES=4 scripts/multi_node.sh
set -eu
: "${HEAD:?set HEAD to host:port of the first machine}"
: "${NODES:?set NODES to the number of machines}"
: "${MODEL:=checkpoints/llava-med-7b-pretrain}"
: "${DATA:=data/instruct/llava_med_instruct_60k_inline_mention.json}"
: "${IMAGES:=data/images}"
: "${OUT:=checkpoints/llava-med-7b}"
: "${GPUS:=8}"

torchrun --nnodes="$NODES" --nproc_per_node="$GPUS" \
    --rdzv_backend=c10d --rdzv_endpoint="$HEAD" --rdzv_id="${RUN_ID:-llava-med}" \
    llava/train/train_mem.py \
    --model_name_or_path "$MODEL" \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --mm_vision_select_layer -2 \
    --version v0 \
    --bf16 True \
    --tf32 True \
    --output_dir "$OUT" \
    --num_train_epochs 3 \
    --per_device_train_batch_size 2 \
    --global_batch_size 128 \
    --packing True \
    --save_strategy steps \
    --save_steps 500 \
    --save_total_limit 3 \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --warmup_steps 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --fsdp "full_shard auto_wrap" \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --lazy_preprocess True "$@"
