#!/bin/sh
# The BiomedCLIP tower (open_clip ViT-B/16: 196 patches of 768) in place of CLIP's. Needs the extra "openclip".
# A new tower needs a new projector: run stage 1 with the same --vision_tower first (STAGE=1), then this.
set -eu
: "${STAGE:=2}"
: "${TOWER:=microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224}"
: "${IMAGES:=data/images}"
: "${GPUS:=8}"
if [ "$STAGE" = 1 ]; then
    : "${MODEL:=checkpoints/vicuna-7b}"
    : "${DATA:=data/alignment/llava_med_alignment_500k.json}"
    : "${OUT:=checkpoints/llava-med-biomedclip-pretrain}"
    set -- --tune_mm_mlp_adapter True --learning_rate 2e-3 --num_train_epochs 1 "$@"
else
    : "${MODEL:=checkpoints/llava-med-biomedclip-pretrain}"
    : "${DATA:=data/instruct/llava_med_instruct_60k_inline_mention.json}"
    : "${OUT:=checkpoints/llava-med-biomedclip}"
    set -- --learning_rate 2e-5 --num_train_epochs 3 --fsdp "full_shard auto_wrap" \
        --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer "$@"
fi

torchrun --nnodes=1 --nproc_per_node="$GPUS" --master_port=25001 \
    llava/train/train_mem.py \
    --model_name_or_path "$MODEL" \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$TOWER" \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end True \
    --version v0 \
    --bf16 True \
    --tf32 True \
    --output_dir "$OUT" \
    --per_device_train_batch_size 1 \
    --global_batch_size 128 \
    --save_strategy steps \
    --save_steps 2400 \
    --save_total_limit 2 \
    --weight_decay 0. \
    --warmup_steps 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --lazy_preprocess True \
    --report_to none "$@"
