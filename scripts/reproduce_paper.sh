#!/bin/sh
# From the released deltas to the paper's table, in one command: apply each delta, answer the test questions, score,
# and print for every cell the expected value, ours and the tolerance. Started again, it goes on where it stopped.
#
#   LLAMA=/path/to/llama-7b DELTAS=/path/to/deltas DATA=/path/to/data sh scripts/reproduce_paper.sh
#
# DELTAS holds the released archives (or folders of the same name without .zip); DATA holds, for each set, test.json
# (made by llava.data.convert) and images/. More flags for the answering commands (--batch-size 64, --device cpu)
# may follow. Writes 54 GB, beside the deltas (44 GB as archives) and
# LLaMA-7B (13.5 GB) that have to be there; on one GPU about an hour, most of it PathVQA.
set -eu
: "${LLAMA:?path of the LLaMA-7B weights in Hugging Face form}"
: "${DELTAS:?folder with the released delta archives}"
: "${DATA:?folder with vqa_rad/, slake/ and pathvqa/}"
: "${OUT:=runs/reproduce_paper}"
: "${SETS:=vqa-rad slake pathvqa}"
: "${ROWS:=fine-tuned zero-shot}"
: "${PROCESSES:=1}"
: "${CONV_MODE:=simple}"  # the prompts that the published numbers were made with
: "${MAX_NEW_TOKENS:=256}"
: "${PYTHON:=python}"

delta_of() {  # the archive of a row and a set
    case "$1 $2" in
        "zero-shot "*) echo llava_med_in_text_60k_ckpt2_delta ;;
        "fine-tuned vqa-rad") echo data_RAD-9epoch_delta ;;
        "fine-tuned slake") echo Slake1.0-9epoch_delta ;;
        "fine-tuned pathvqa") echo pvqa-9epoch_delta ;;
        *) echo "unknown set or row: $1 $2" >&2; exit 2 ;;
    esac
}

folder_of() {
    case "$1" in vqa-rad) echo vqa_rad ;; *) echo "$1" ;; esac
}

results=""
for row in $ROWS; do
    for set in $SETS; do
        delta=$(delta_of "$row" "$set")
        model="$OUT/models/$delta"
        if [ ! -d "$model" ]; then
            source="$DELTAS/$delta"
            [ -d "$source" ] || source="$source.zip"
            "$PYTHON" -m llava.model.apply_delta --base "$LLAMA" --target "$model" --delta "$source"
        fi
        data="$DATA/$(folder_of "$set")"
        run="$OUT/$row/$set"
        mkdir -p "$run"
        "$PYTHON" -m llava.eval.run_med_datasets_eval_batch --model-name "$model" --conv-mode "$CONV_MODE" \
            --question-file "$data/test.json" --image-folder "$data/images" --answers-file "$run/answers.jsonl" \
            --num-chunks "$PROCESSES" --max_new_tokens "$MAX_NEW_TOKENS" "$@"
        "$PYTHON" -m llava.eval.run_eval --gt "$data/test.json" --pred "$run/answers.jsonl" \
            --output "$run/scores.json" >"$run/scores.txt"
        results="$results $row:$set=$run/scores.json"
    done
done
# shellcheck disable=SC2086  # one argument per result
"$PYTHON" -m llava.eval.paper_table --results $results --output "$OUT/table.md"
