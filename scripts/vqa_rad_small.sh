#!/bin/sh
# VQA-RAD with small released weights: SmolLM2-135M and DINOv2-small (scripts/fetch_small_models.sh), on two cores, or on
# a GPU where there is one: the trainings run beside each other there.
# Both splits: the official one, and `clean`, whose training has no image of the test. Models: seeing, blind (grey images,
# trained as long), the language model before any fine-tuning, and answers from memory. Scores in both metric sets with
# intervals, paired tests, the image taken away. It goes on where it was stopped: what is complete isn't made again.
# STEPS=4 tries every step out.
set -eu
: "${RAD:=data/vqa_rad_source}"     # trainset.json, testset.json and images/ of VQA-RAD
: "${MODELS:=models}"
: "${OUT:=runs/vqa_rad_small}"
: "${SEED:=0}"
: "${STEPS:=-1}"                    # of each training; -1: by epochs
: "${STAGE_1_EPOCHS:=1}" "${KIND_EPOCHS:=3}" "${PARTS:=20}" "${PART_EPOCHS:=1}" "${WHOLE_EPOCHS:=2}"
: "${RATE:=2e-4}" "${PART_RATE:=3e-4}" "${WHOLE_RATE:=1e-4}"
: "${SAVE_STEPS:=100}"              # between checkpoints
: "${RESAMPLES:=10000}"
: "${SPLITS:=official clean}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

say() { echo "== $*"; }
if python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    compute="--bf16 True --dataloader_num_workers 2"
    : "${BESIDE=1}"                 # the trainings run beside each other; BESIDE= is one after the other
    : "${PIXELS:=224}" "${TOKENS:=2048}"
else
    # A quarter of the patches.
    compute="--use_cpu True --dataloader_num_workers 0"
    : "${BESIDE=}"                  # BESIDE=1 with OMP_NUM_THREADS=1 is better where other work is done too
    # Where the processor multiplies bfloat16, twice as fast.
    if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then compute="$compute --bf16 True"; fi
    : "${PIXELS:=112}" "${TOKENS:=1024}"
fi
: "${QUESTIONS:=16}"
# PIXELS: height and width of what the tower sees. TOKENS of a batch, packed, in which up to QUESTIONS of an image stand
# behind one copy of it, each as if alone.
OUT="$MODELS" scripts/fetch_small_models.sh
tower="$MODELS/dinov2-small"
if [ "$PIXELS" != 224 ]; then
    tower="$OUT/tower_$PIXELS"
    mkdir -p "$tower"
    cp "$MODELS"/dinov2-small/* "$tower/"
    sed -i "s/224/$PIXELS/" "$tower/preprocessor_config.json"
fi

# Once: grey images under the same names, the sets, and the training questions that are on no image of the test.
if [ ! -f "$OUT/data/audit.json" ]; then
    say data
    python - "$RAD/images" "$OUT/grey" <<'PYTHON'
import sys
from pathlib import Path
from PIL import Image

source, target = map(Path, sys.argv[1:])
target.mkdir(parents=True, exist_ok=True)
for path in source.iterdir():
    Image.new("RGB", (224, 224), (128, 128, 128)).save(target / path.name)
PYTHON
    python -m llava.data.convert vqa-rad --train "$RAD/trainset.json" --test "$RAD/testset.json" \
        --image-folder "$RAD/images" --output-dir "$OUT/data"
    python -m llava.data.audit --train "$OUT/data/train.json" --test "$OUT/data/test.json" \
        --image-folder "$RAD/images" --clean-train "$OUT/data/clean_train.json" --output "$OUT/data/audit.json"
fi

train() { # output folder, flags …: nothing if it is complete; else from its last checkpoint, if it has one
    folder="$1"
    shift
    if [ -f "$folder/config.json" ]; then return; fi
    say "$folder"
    python llava/train/train.py --output_dir "$folder" --image_aspect_ratio pad --packing True \
        --model_max_length 1024 --lr_scheduler_type cosine --warmup_steps 0.03 \
        --logging_steps 10 --save_strategy steps --save_steps "$SAVE_STEPS" --save_total_limit 1 --report_to none $compute \
        --questions_per_image "$QUESTIONS" --max_tokens_per_batch "$TOKENS" \
        --cache_vision_features True --vision_cache_dir "$OUT/features" --max_steps "$STEPS" --seed "$SEED" \
        --learning_rate "$RATE" "$@"
}

answer() { # checkpoint, images, answer file, flags …
    model="$1" images="$2" file="$3"
    shift 3
    python -m llava.eval.model_vqa_med --model-path "$model" --question-file "$OUT/data/test.json" \
        --image-folder "$images" --answers-file "$file" --max_new_tokens 32 "$@"
}

# The questions' words alone tell most training answers, and a model that learns these first never looks. So stage 1
# starts from a projector whose patches stand near the words of their image (--fit_projector); then each answer is asked
# for by its kind alone, which only the image can tell more of; then by some of the question's words, others each time;
# then by the whole question, as the test asks: twice from there, in two orders, and the mean of the two is the model.
every_stage() { # split, seeing or blind
    here="$OUT/$1" run="$2"
    train "$here/${run}_stage_1" --model_name_or_path "$MODELS/smollm2-135m" --version plain \
        --vision_tower "$tower" --tune_mm_mlp_adapter True --mm_projector_type mlp2x_gelu \
        --fit_projector True --mm_vision_select_layer -1 --data_path "$here/data/captions.json" \
        --image_folder "$(images_of "$run")" --num_train_epochs "$STAGE_1_EPOCHS"
    train "$here/${run}_kinds" --model_name_or_path "$here/${run}_stage_1" --version smollm2 \
        --data_path "$here/data/kinds.json" --image_folder "$(images_of "$run")" --num_train_epochs "$KIND_EPOCHS"
    train "$here/${run}_parts" --model_name_or_path "$here/${run}_kinds" --version smollm2 \
        --data_path "$here/data/parts.json" --image_folder "$(images_of "$run")" --num_train_epochs "$PART_EPOCHS" \
        --learning_rate "$PART_RATE"
    for order in "$SEED" "$((SEED + 1))"; do
        train "$here/${run}_whole_$order" --model_name_or_path "$here/${run}_parts" --version smollm2 \
            --data_path "$(questions_of "$1")" --image_folder "$(images_of "$run")" --num_train_epochs "$WHOLE_EPOCHS" \
            --learning_rate "$WHOLE_RATE" --seed "$order"
    done
    if [ ! -f "$here/$run/config.json" ]; then
        python -m llava.model.average --output "$here/$run" \
            --models "$here/${run}_whole_$SEED" "$here/${run}_whole_$((SEED + 1))"
    fi
}

images_of() { if [ "$1" = blind ]; then echo "$OUT/grey"; else echo "$RAD/images"; fi; }
questions_of() { if [ "$1" = clean ]; then echo "$OUT/data/clean_train.json"; else echo "$OUT/data/train.json"; fi; }

for split in $SPLITS; do
    here="$OUT/$split"
    questions="$(questions_of "$split")"
    if [ ! -f "$here/data/parts.json" ]; then
        python -m llava.data.convert qa-captions --records "$questions" \
            --image-folder "$RAD/images" --output-dir "$here/data" --field image_organ \
            --kind question_type --kind answer_type --parts "$PARTS"
    fi
    if [ ! -f "$here/memory/nearest_text_and_image.jsonl" ]; then
        python -m llava.eval.baselines --train "$questions" --test "$OUT/data/test.json" --device cpu \
            --image-folder "$RAD/images" --vision-tower "$MODELS/dinov2-small" --output-dir "$here/memory"
    fi
done

started=
for split in $SPLITS; do
    for run in seeing blind; do
        if [ -n "$BESIDE" ]; then
            mkdir -p "$OUT/$split"
            every_stage "$split" "$run" >"$OUT/$split/$run.log" 2>&1 &
            started="$started $!"
            echo "$split, $run: $OUT/$split/$run.log"
        else
            every_stage "$split" "$run"
        fi
    done
done
for process in $started; do wait "$process"; done

for split in $SPLITS; do
    here="$OUT/$split"
    for run in seeing blind; do
        answer "$here/$run" "$(images_of "$run")" "$here/$run.jsonl" --yes-no-probabilities
    done
    # The language model before training: stage 1's projector is all that it has learned.
    answer "$here/blind_stage_1" "$OUT/grey" "$here/language_model.jsonl" --conv-mode smollm2
    for ablation in blank noise shuffle; do
        answer "$here/seeing" "$RAD/images" "$here/seeing_$ablation.jsonl" --ablate-image "$ablation"
    done
    say "$split: seeing against memory and against blind"
    for other in blind seeing_shuffle language_model; do
        python -m llava.eval.run_eval --gt "$OUT/data/test.json" --pred "$here/seeing.jsonl" --group-by \
            --compare "$here/$other.jsonl" --memory "$here/memory/nearest_text_and_image.jsonl" \
            --bootstrap-samples "$RESAMPLES" --candidate "$OUT/data/candidates.json" --output "$here/seeing_$other.json"
    done
    python -m llava.eval.report --title "VQA-RAD, $split split, small released weights" --output "$here/report.html" \
        --pred "seeing=$here/seeing.jsonl" "blind=$here/blind.jsonl" "language model=$here/language_model.jsonl" \
        "seeing, grey=$here/seeing_blank.jsonl" "seeing, noise=$here/seeing_noise.jsonl" \
        "seeing, shuffled=$here/seeing_shuffle.jsonl" "commonest=$here/memory/commonest.jsonl" \
        "memory, text=$here/memory/nearest_text.jsonl" \
        "memory, text and images=$here/memory/nearest_text_and_image.jsonl" --gt "$OUT/data/test.json" \
        --image-folder "$RAD/images" --audit "$OUT/data/audit.json" --bootstrap-samples "$RESAMPLES"
done
