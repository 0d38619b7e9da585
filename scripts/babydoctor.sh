#!/bin/sh
# BabyDoctor's three steps on LLaMA-2-7B-chat: projector, LoRA, QLoRA (published: one A10 with
# 24 GB, about 8 hours; the dry run predicts more of both, and fits QLoRA with --per_device_train_batch_size 2
# --gradient_accumulation_steps 4: docs/training.md). Data are LLaVA's own lists with COCO's train2017, and ROCO's.
# Published script corrected: its last flag was broken, and "--version 0.0.1" is no template.
set -eu
command -v deepspeed >/dev/null || {
    echo "babydoctor.sh: needs deepspeed; install it with: pip install -c constraints.txt -e '.[deepspeed,quantized]'" >&2
    exit 2
}
: "${LLM:=meta-llama/Llama-2-7b-chat-hf}"
: "${OUT:=checkpoints/babydoctor}"
COMMON="--vision_tower openai/clip-vit-large-patch14 --mm_vision_select_layer -2
    --mm_use_im_start_end False --mm_use_im_patch_token False --bf16 True --tf32 True --num_train_epochs 1
    --per_device_train_batch_size 8 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
    --eval_strategy no --save_strategy steps --save_steps 500 --save_total_limit 3 --weight_decay 0.
    --warmup_steps 0.03 --lr_scheduler_type cosine --logging_steps 1 --model_max_length 2048
    --lazy_preprocess True --gradient_checkpointing True"

# 1. The projector, on LCS-558K.
# shellcheck disable=SC2086
deepspeed llava/train/train_mem.py --deepspeed scripts/zero2.json $COMMON \
    --model_name_or_path "$LLM" --version plain --tune_mm_mlp_adapter True \
    --data_path data/blip_laion_cc_sbu_558k.json --image_folder data/lcs_558k \
    --output_dir "$OUT-1-projector" --learning_rate 2e-3 "$@"

# 2. LoRA on LLaVA-Instruct-80K, then merged, because the next step quantizes its base.
# shellcheck disable=SC2086
deepspeed llava/train/train_mem.py --deepspeed scripts/zero2.json $COMMON \
    --model_name_or_path "$OUT-1-projector" --version llava_llama_2 --lora_enable True \
    --data_path data/llava_instruct_80k.json --image_folder data/coco/train2017 \
    --output_dir "$OUT-2-lora" --learning_rate 2e-5 "$@"
python -m llava.model.merge_lora \
    --model-path "$OUT-2-lora" --model-base "$OUT-1-projector" --save-model-path "$OUT-2"

# 3. 4-bit QLoRA on roco-instruct-65k.
# shellcheck disable=SC2086
deepspeed llava/train/train_mem.py --deepspeed scripts/zero2.json $COMMON \
    --model_name_or_path "$OUT-2" --version llava_llama_2 --lora_enable True --bits 4 \
    --data_path data/roco-train-1.json --image_folder data/roco-dataset/data/train/radiology/images \
    --output_dir "$OUT-3-qlora" --learning_rate 2e-5 "$@"
