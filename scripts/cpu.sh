#!/bin/sh
# Fine-tuning without a GPU: for small models, and to try a recipe before renting machines. By default the demo's model
# and questions, which `make demo` leaves.
set -eu
: "${MODEL:=runs/demo/stage_2}"
: "${DATA:=runs/demo/data/vqa_train.json}"
: "${IMAGES:=runs/demo/data/images}"
: "${OUT:=runs/cpu}"

python llava/train/train.py \
    --use_cpu True \
    --model_name_or_path "$MODEL" \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --cache_vision_features True \
    --output_dir "$OUT" \
    --num_train_epochs 3 \
    --per_device_train_batch_size 16 \
    --save_strategy epoch \
    --save_total_limit 1 \
    --learning_rate 5e-4 \
    --weight_decay 0. \
    --warmup_steps 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 10 \
    --model_max_length 512 \
    --report_to none "$@"
