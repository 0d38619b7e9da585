#!/bin/sh
# Fetch LLaVA-Med's nine data files into data/, each checked against its size and SHA-256. Stopped or killed, the same
# command goes on where it was; files that are there and whole are left alone.
#
#     sh download_data.sh                 all of them (853 MB)
#     sh download_data.sh eval/ urls      only those whose name contains one of the words
#
# LLAVA_MED_DATA_URL   another address to fetch from      LLAVA_MED_DATA_DIR   another folder than data/
# LLAVA_MED_DATA_LIST  another list: lines of "file bytes sha256"
# The images come through: python -m llava.data.download_images --input_path data/llava_med_image_urls.jsonl …
set -u

url=${LLAVA_MED_DATA_URL:-https://hanoverprod.z21.web.core.windows.net/med_llava}
here=$(dirname -- "$0")
folder=${LLAVA_MED_DATA_DIR:-$here/data}

files() {
    if [ -n "${LLAVA_MED_DATA_LIST:-}" ]; then
        cat -- "$LLAVA_MED_DATA_LIST"
        return
    fi
    cat <<'LIST'
alignment/llava_med_alignment_500k.json 358112840 007456f3d6c2091466b3fb6cd0573f61a63fd0c937e568f44113d5a1f23e8b93
instruct/llava_med_instruct_10k.json 20176754 84f75c2b83404fe7dd1631212b4ad73228a0dad77bb819ab29c511a535a279c8
instruct/llava_med_instruct_60k.json 88758916 cf84c82fb58e391d6cf198e2657b6fc8584a180509b8813c3604ce46f6275c19
instruct/llava_med_instruct_60k_inline_mention.json 87669379 b3649f4193a51215aee4519b44d8436a4200e182d6a78a3cb78672d97bea948a
instruct/llava_med_instruct_fig_captions.json 169224662 1d58b7befd2687695cbba04e4f51fd648899b25f4f567815eb49538faf6f07fb
eval/llava_med_eval_qa50_qa.jsonl 262328 48c6b680a962dbf8caf63e3ded2bef7770dccf9c2602f32e5f05f4b907266f25
eval/llava_med_eval_qa50_fig_captions.json 53066 64a4de84f8959a049ab9de68572318c6a299194b24368084159ef1f4a259aa66
eval/llava_med_qa50_instruct_caption_in_text_cleaned-60k-3epoch.json 103392 442b2ea3bda35ddcd57475f350ee6b2e938da02835792232925b01fde0a288ef
llava_med_image_urls.jsonl 128785989 2604441ec3d1f6324d21846cfd44f92eab29454beed1da42a98d943b41731e44
LIST
}

# fetch ADDRESS FILE: goes on with what FILE holds already; 33 if the server can't go on in the middle.
if command -v curl >/dev/null 2>&1; then
    fetch() { curl --fail --location --retry 5 --retry-delay 2 --connect-timeout 30 --speed-time 60 --speed-limit 100 \
        --progress-bar --continue-at - --output "$2" "$1"; }
    # 5 to 7: no proxy, no such host, no connection; 28: no answer in time.
    probe() { curl --silent --head --connect-timeout 10 --max-time 20 --output /dev/null "$1"
        case $? in 5|6|7|28) return 1 ;; esac; }
elif command -v wget >/dev/null 2>&1; then
    fetch() { wget --tries=5 --timeout=60 --continue --output-document="$2" "$1"; }
    probe() { wget --quiet --spider --tries=1 --timeout=10 "$1"; [ $? -ne 4 ]; }
else
    echo "download_data.sh: needs curl or wget; install one of them" >&2
    exit 2
fi

if command -v sha256sum >/dev/null 2>&1; then
    sum() { sha256sum < "$1" | cut -d ' ' -f 1; }
elif command -v shasum >/dev/null 2>&1; then
    sum() { shasum -a 256 < "$1" | cut -d ' ' -f 1; }
else
    echo "download_data.sh: needs sha256sum or shasum; install one of them" >&2
    exit 2
fi

size() { wc -c < "$1" | tr -d ' '; }
whole() { [ -f "$1" ] && [ "$(size "$1")" = "$2" ] && [ "$(sum "$1")" = "$3" ]; }

wanted() {
    name=$1
    shift
    [ $# -eq 0 ] && return 0
    for word in "$@"; do
        case $name in *"$word"*) return 0 ;; esac
    done
    return 1
}

# get NAME BYTES SHA256: 0 if the file is there and whole in the end.
get() {
    target=$folder/$1
    part=$target.part
    if whole "$target" "$2" "$3"; then
        echo "$1: there already"
        return 0
    fi
    mkdir -p -- "$(dirname -- "$target")" || return 1
    # A second try starts from nothing: what was there may have been of another version, or badly joined.
    for try in 1 2; do
        if [ -f "$part" ] && [ "$(size "$part")" -gt "$2" ]; then
            rm -f -- "$part"
        fi
        if ! whole "$part" "$2" "$3"; then
            if [ "$reached" = no ]; then
                probe "$url/$1" || { echo "download_data.sh: host unreachable: $url; is there a network?" >&2; exit 2; }
                reached=yes
            fi
            echo "$1: fetching $2 bytes"
            # No more than the file has, in blocks of 512 bytes: a body without end would fill the disk.
            (ulimit -c 0; ulimit -f $(($2 / 512 + 2)); fetch "$url/$1" "$part")
            code=$?
        fi
        if whole "$part" "$2" "$3"; then
            mv -f -- "$part" "$target" && echo "$1: whole" && return 0
            return 1
        fi
        # What broke off on the way is kept: the next call goes on with it.
        if [ -f "$part" ] && [ "$(size "$part")" -lt "$2" ] && [ "$code" != 33 ] && [ "$code" != 0 ]; then
            echo "$1: broke off after $(size "$part") of $2 bytes; run download_data.sh again to go on" >&2
            return 1
        fi
        rm -f -- "$part"
        [ "$try" = 1 ] && echo "$1: size or checksum is wrong, trying once more from the start" >&2
    done
    echo "$1: could not be had from $url (not there, or another size or checksum than expected)" >&2
    return 1
}

failed=0
chosen=0
reached=no
list=$(files) || exit 2
while read -r name bytes checksum; do
    [ -n "$name" ] || continue
    wanted "$name" "$@" || continue
    chosen=$((chosen + 1))
    get "$name" "$bytes" "$checksum" < /dev/null || failed=$((failed + 1))
done <<EOF
$list
EOF

if [ "$chosen" -eq 0 ]; then
    echo "download_data.sh: no file's name contains: $*" >&2
    exit 2
fi
if [ "$failed" -gt 0 ]; then
    echo "download_data.sh: $failed of $chosen files are missing; run it again to go on" >&2
    exit 1
fi
echo "all $chosen files are in $folder"
