#!/bin/sh
# A LLaVA-Med on Mistral-7B-Instruct, in the shape of v1.5: CLIP at 336 px, two-layer projector, tower trained too.
# v1.5's own training was never published; this recipe is ours (LLaVA-1.5's settings on LLaVA-Med's data).
set -eu
: "${LLM:=mistralai/Mistral-7B-Instruct-v0.2}"
: "${IMAGES:=data/images}"
: "${OUT:=checkpoints/llava-med-mistral}"
: "${GPUS:=8}"
COMMON="--image_folder $IMAGES --mm_vision_select_layer -2 --bf16 True --tf32 True
    --global_batch_size 128 --save_strategy steps --save_steps 1000 --save_total_limit 2 --weight_decay 0.
    --warmup_steps 0.03 --lr_scheduler_type cosine --logging_steps 1 --model_max_length 2048
    --gradient_checkpointing True --lazy_preprocess True --report_to none"

# Stage 1: the projector, on captions.
# shellcheck disable=SC2086
torchrun --nnodes=1 --nproc_per_node="$GPUS" --master_port=25001 \
    llava/train/train_mem.py $COMMON \
    --model_name_or_path "$LLM" \
    --vision_tower openai/clip-vit-large-patch14-336 \
    --mm_projector_type mlp2x_gelu \
    --version plain \
    --tune_mm_mlp_adapter True \
    --data_path data/alignment/llava_med_alignment_500k.json \
    --output_dir "$OUT-pretrain" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 4 \
    --packing True \
    --learning_rate 1e-3 "$@"

# Stage 2: everything, the tower with a tenth of the learning rate.
# shellcheck disable=SC2086
torchrun --nnodes=1 --nproc_per_node="$GPUS" --master_port=25001 \
    llava/train/train_mem.py $COMMON \
    --model_name_or_path "$OUT-pretrain" \
    --version mistral_instruct \
    --image_aspect_ratio pad \
    --unfreeze_mm_vision_tower True \
    --mm_vision_tower_lr 2e-6 \
    --data_path data/instruct/llava_med_instruct_60k_inline_mention.json \
    --output_dir "$OUT" \
    --num_train_epochs 3 \
    --per_device_train_batch_size 2 \
    --packing True \
    --fsdp "full_shard auto_wrap" \
    --fsdp_transformer_layer_cls_to_wrap MistralDecoderLayer \
    --learning_rate 2e-5 "$@"
