#!/bin/sh
# BabyDoctor's three steps (babydoctor.sh) on small released weights and drawn images, without a GPU: projector, LoRA,
# merged, 4-bit QLoRA on that, merged, quantized to 4 bits. SmolLM2-135M and DINOv2-small: fetch_small_models.sh.
# STEPS is of each training. What is complete isn't made again.
set -eu
: "${MODELS:=models}"
: "${OUT:=runs/babydoctor_small}"
: "${STEPS:=60}"
: "${IMAGES:=400}"
: "${TEST:=8}"                       # images that questions are asked about
OUT="$MODELS" scripts/fetch_small_models.sh

if [ ! -d "$OUT/data" ]; then
    python -m llava.data.phantoms --output-dir "$OUT/data" --train "$IMAGES" --test "$TEST" --conversations "$IMAGES" \
        --vqa "$IMAGES" --text 100
fi

train() { # output folder, flags …
    folder="$1"
    shift
    if [ -f "$folder/config.json" ]; then return; fi
    python llava/train/train.py --output_dir "$folder" --image_folder "$OUT/data/images" --max_steps "$STEPS" \
        --image_aspect_ratio pad --per_device_train_batch_size 4 --lr_scheduler_type cosine --warmup_steps 0.03 \
        --model_max_length 1024 --gradient_checkpointing True --logging_steps 10 --save_strategy no --report_to none \
        --use_cpu True --bf16 False --dataloader_num_workers 0 --seed 0 "$@"
}

merge() { # adapter, base, output folder
    if [ -f "$3/config.json" ]; then return; fi
    python -m llava.model.merge_lora --model-path "$1" --model-base "$2" --save-model-path "$3"
}

# 1. The projector, on captions.
train "$OUT/1-projector" --model_name_or_path "$MODELS/smollm2-135m" --vision_tower "$MODELS/dinov2-small" \
    --mm_projector_type mlp2x_gelu --mm_vision_select_layer -1 --version plain --tune_mm_mlp_adapter True \
    --data_path "$OUT/data/captions.json" --learning_rate 2e-3

# 2. LoRA on conversations, then merged, because the next step quantizes its base.
train "$OUT/2-lora" --model_name_or_path "$OUT/1-projector" --version smollm2 --lora_enable True \
    --data_path "$OUT/data/conversations.json" --learning_rate 2e-4
merge "$OUT/2-lora" "$OUT/1-projector" "$OUT/2"

# 3. 4-bit QLoRA on questions.
train "$OUT/3-qlora" --model_name_or_path "$OUT/2" --version smollm2 --lora_enable True --bits 4 \
    --data_path "$OUT/data/vqa_train.json" --learning_rate 2e-4
merge "$OUT/3-qlora" "$OUT/2" "$OUT/3"

if [ ! -f "$OUT/3-4bit/config.json" ]; then
    python -m llava.model.quantize --model-path "$OUT/3" --save-model-path "$OUT/3-4bit" --bits 4 --device cpu
fi
for model in 3 3-4bit; do
    python -m llava.eval.model_vqa_med --model-path "$OUT/$model" --question-file "$OUT/data/vqa_test.json" \
        --image-folder "$OUT/data/images" --answers-file "$OUT/$model.jsonl" --max_new_tokens 16
done
echo "$OUT/3 and $OUT/3-4bit: complete; python -m llava.serve --model-path $OUT/3-4bit"
