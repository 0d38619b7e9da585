#!/bin/sh
# VQA-RAD, all of it, with small models that have seen nothing else: no pretrained weights, no GPU, about 15 minutes.
# The result is modest and says so (docs/results.md); what it shows is that the road holds on real input.
set -eu
: "${RAD:=data/vqa_rad_source}"     # trainset.json, testset.json and images/ of VQA-RAD
: "${OUT:=runs/vqa_rad}"
: "${SEED:=0}"

python -m llava.data.convert vqa-rad --train "$RAD/trainset.json" --test "$RAD/testset.json" \
    --image-folder "$RAD/images" --output-dir "$OUT/data"
python -m llava.data.convert qa-captions --records "$OUT/data/train.json" \
    --image-folder "$RAD/images" --output-dir "$OUT/base_data" --field image_organ --min-pictures 2

python -m llava.demo.tokenizer --data-path "$OUT/base_data/text.json" --output-dir "$OUT/tokenizer" --learned 1500
python -m llava.demo.tower --data-path "$OUT/base_data/captions.json" --image-folder "$RAD/images" \
    --tokenizer "$OUT/tokenizer" --output-dir "$OUT/vision_tower" --steps 600 --seed "$SEED"
python -m llava.demo.language_model --data-path "$OUT/base_data/text.json" \
    --captions "$OUT/base_data/captions.json" --tokenizer "$OUT/tokenizer" \
    --output-dir "$OUT/language_model" --steps 600 --seed "$SEED"

train() {
    python llava/train/train.py --image_folder "$RAD/images" --lr_scheduler_type cosine --warmup_steps 0.03 \
        --weight_decay 0.05 --logging_steps 10 --save_strategy no --report_to none --use_cpu True \
        --model_max_length 768 --seed "$SEED" "$@"
}
train --model_name_or_path "$OUT/language_model" --vision_tower "$OUT/vision_tower" --version plain \
    --tune_mm_mlp_adapter True --mm_projector_type mlp2x_gelu --mm_vision_select_layer -1 \
    --mm_vision_select_feature cls_patch --image_aspect_ratio pad --data_path "$OUT/base_data/captions.json" \
    --cache_vision_features True --output_dir "$OUT/stage_1" --num_train_epochs 10 \
    --per_device_train_batch_size 16 --learning_rate 2e-3
train --model_name_or_path "$OUT/stage_1" --version mistral_instruct --data_path "$OUT/data/train.json" \
    --unfreeze_mm_vision_tower True --mm_vision_tower_lr 2e-4 --output_dir "$OUT/vqa" --num_train_epochs 6 \
    --per_device_train_batch_size 16 --learning_rate 1e-3
train --model_name_or_path "$OUT/stage_1" --version mistral_instruct --data_path "$OUT/base_data/blind.json" \
    --output_dir "$OUT/blind" --num_train_epochs 6 --per_device_train_batch_size 16 --learning_rate 1e-3

python llava/eval/model_vqa_med.py --model-path "$OUT/vqa" --question-file "$OUT/data/test.json" \
    --image-folder "$RAD/images" --answers-file "$OUT/answers.jsonl"
python llava/eval/model_vqa_med.py --model-path "$OUT/blind" --question-file "$OUT/data/test.json" \
    --image-folder "$RAD/images" --answers-file "$OUT/blind_answers.jsonl" --ablate-image none
for name in answers blind_answers; do
    python llava/eval/run_eval.py --gt "$OUT/data/test.json" --pred "$OUT/$name.jsonl" \
        --candidate "$OUT/data/candidates.json"
done
