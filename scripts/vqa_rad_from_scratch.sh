#!/bin/sh
# VQA-RAD, all of it, with small models that have seen nothing else: no pretrained weights, no GPU, about 15 minutes.
# The result is modest and says so (docs/results.md); what it shows is that the pipeline works on real input.
set -eu
: "${RAD:=data/vqa_rad_source}"     # trainset.json, testset.json and images/ of VQA-RAD
: "${OUT:=runs/vqa_rad}"
: "${SEED:=0}"
# The models are too small to be divided among threads: with one, training is faster, on a busy machine several times.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

python -m llava.data.convert vqa-rad --train "$RAD/trainset.json" --test "$RAD/testset.json" \
    --image-folder "$RAD/images" --output-dir "$OUT/data"
python -m llava.data.convert qa-captions --records "$OUT/data/train.json" \
    --image-folder "$RAD/images" --output-dir "$OUT/base_data" --field image_organ --min-images 2

python -m llava.demo.tokenizer --data-path "$OUT/base_data/text.json" --output-dir "$OUT/tokenizer" --learned 1500
python -m llava.demo.language_model --data-path "$OUT/base_data/captions.json" \
    --data-path "$OUT/base_data/text.json" --tokenizer "$OUT/tokenizer" --output-dir "$OUT/language_model" --seed "$SEED"
python -m llava.demo.tower --data-path "$OUT/base_data/captions.json" --image-folder "$RAD/images" \
    --language-model "$OUT/language_model" --output-dir "$OUT/vision_tower" --steps 200 --seed "$SEED"

# The blind baseline: the same recipe on images that are all grey.
python - "$RAD/images" "$OUT/grey" <<'PYTHON'
import sys
from pathlib import Path
from PIL import Image

source, target = map(Path, sys.argv[1:])
target.mkdir(parents=True, exist_ok=True)
for path in source.iterdir():
    Image.new("RGB", (96, 96), (128, 128, 128)).save(target / path.name)
PYTHON

train() {
    python llava/train/train.py --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0.05 \
        --logging_steps 10 --save_strategy no --report_to none --use_cpu True --model_max_length 768 \
        --per_device_train_batch_size 16 --seed "$SEED" "$@"
}
for run in seeing blind; do
    if [ "$run" = blind ]; then images="$OUT/grey"; else images="$RAD/images"; fi
    train --model_name_or_path "$OUT/language_model" --vision_tower "$OUT/vision_tower" --version plain \
        --tune_mm_mlp_adapter True --mm_projector_type mlp2x_gelu --mm_vision_select_layer -1 \
        --mm_vision_select_feature cls_patch --image_aspect_ratio pad --data_path "$OUT/base_data/captions.json" \
        --image_folder "$images" --cache_vision_features True --output_dir "$OUT/${run}_stage_1" \
        --num_train_epochs 5 --learning_rate 2e-3
    train --model_name_or_path "$OUT/${run}_stage_1" --version mistral_instruct --data_path "$OUT/data/train.json" \
        --image_folder "$images" --unfreeze_mm_vision_tower True --mm_vision_tower_lr 2e-4 \
        --output_dir "$OUT/${run}_vqa" --num_train_epochs 2 --learning_rate 1e-3
    python llava/eval/model_vqa_med.py --model-path "$OUT/${run}_vqa" --question-file "$OUT/data/test.json" \
        --image-folder "$images" --answers-file "$OUT/${run}_answers.jsonl" --max_new_tokens 32
    python llava/eval/run_eval.py --gt "$OUT/data/test.json" --pred "$OUT/${run}_answers.jsonl" \
        --candidate "$OUT/data/candidates.json"
done
