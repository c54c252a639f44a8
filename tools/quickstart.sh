#!/usr/bin/env bash
# The main job, from a fresh clone: make the environment, generate a small data set, train a small
# model with MambaVision on it, evaluate it on held-out images and draw the predictions.
#
#   bash tools/quickstart.sh [detection|segmentation] [options for tools/train.py]
#
# For example: bash tools/quickstart.sh segmentation --cfg-options optim_wrapper.optimizer.lr=5e-4
#
# A GPU is used if there is one. Every run has a folder of its own below work_dirs/quickstart/, so
# running again trains anew and keeps the earlier results; environment and data are made once.
#
#   QUICKSTART_ITERS=20    stop training after about so many iterations (to see that all works)
#   QUICKSTART_PYTHON=...  use this Python and what is installed there instead of making .venv
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '[quickstart] %s\n' "$*"; }
fail() {
    printf '[quickstart] ERROR: %s\n' "$*" >&2
    exit 1
}

task=detection
if (($#)) && [[ "$1" != -* ]]; then
    task="$1"
    shift
fi
iterations="${QUICKSTART_ITERS:-}"
[[ "$iterations" =~ ^([1-9][0-9]*)?$ ]] ||
    fail "QUICKSTART_ITERS is '$iterations'; expected a positive whole number."

settings=()
case "$task" in
detection)
    config=cascade_mambavision_mini_coco
    dataset=mini-coco
    data=data/mini_coco
    settings=(train_cfg.val_interval=1000) # once is enough: step 4 evaluates
    if [[ -n "$iterations" ]]; then # 480 images in batches of 8 are 60 iterations per epoch
        epochs=$(((iterations + 59) / 60))
        settings+=(train_cfg.max_epochs=$epochs
            train_dataloader.dataset.indices=$(((iterations + epochs - 1) / epochs * 8)))
    fi
    ;;
segmentation)
    config=upernet_mambavision_mini_ade20k
    dataset=mini-ade20k
    data=data/mini_ade20k/ADEChallengeData2016
    settings=(train_cfg.val_interval=1000000)
    if [[ -n "$iterations" ]]; then
        settings+=(train_cfg.max_iters=$iterations
            default_hooks.checkpoint.interval=$iterations)
    fi
    ;;
-h | --help | help)
    sed -n '2,14s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
*) fail "unknown task '$task'; use 'detection' or 'segmentation'." ;;
esac

# The options of this script join those of the caller: a second --cfg-options would hide the first.
options=()
for option in "$@"; do
    case "$option" in
    --work-dir* | --data-root* | --resume* | --launcher*)
        fail "$option is chosen by this script; run tools/train.py to set it yourself." ;;
    -h | --help) task=help ;;
    esac
    options+=("$option")
    if [[ "$option" == --cfg-options ]]; then
        options+=(${settings[@]+"${settings[@]}"})
        settings=()
    fi
done
if [[ "$task" == help ]]; then
    sed -n '2,14s/^# \{0,1\}//p' "$0"
    exit 0
fi
if ((${#settings[@]})); then options+=(--cfg-options "${settings[@]}"); fi

# Idle threads soon sleep instead of spinning: on a machine that does other things as well, spinning
# threads hold up the working ones, and an iteration takes several times as long.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"

started=$SECONDS
say "1/5 environment"
if [[ -n "${QUICKSTART_PYTHON:-}" ]]; then
    python="$QUICKSTART_PYTHON"
    "$python" -c 'import mmengine, torch' ||
        fail "QUICKSTART_PYTHON=$python cannot import mmengine and torch; install them there, or" \
            "unset the variable to have an environment made."
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
else
    python="$(bash tools/setup_env.sh)" || fail "the environment could not be made; see above."
fi
environment_seconds=$((SECONDS - started))

say "2/5 data"
"$python" tools/prepare_data.py "$dataset" --root data/ ||
    fail "the data set could not be made; see above."

work="work_dirs/quickstart/$task-$(date +%Y%m%d-%H%M%S)"
[[ ! -e "$work" ]] || work="$work-$$"
mkdir -p "$work"
say "3/5 training; log, checkpoints and pictures go to $work/"
train_started=$SECONDS
"$python" tools/train.py "configs/$config.py" --work-dir "$work" --data-root "$data" \
    ${options[@]+"${options[@]}"} || fail "training stopped; see above and the log in $work/."
train_seconds=$((SECONDS - train_started))

# The config as it was trained, with all options.
trained="$work/$config.py"
checkpoint="$(cat "$work/last_checkpoint")"
[[ -f "$checkpoint" ]] || fail "training left no checkpoint in $work/; see the log there."

# The pictures are drawn meanwhile: half of either command is start-up, which one core does.
"$python" tools/visualize.py "$trained" "$checkpoint" --out-dir "$work/pictures" \
    >"$work/pictures.log" 2>&1 &
drawing=$!
trap 'kill "$drawing" 2>/dev/null || true' EXIT

say "4/5 evaluation on the held-out images"
"$python" tools/test.py "$trained" "$checkpoint" --work-dir "$work/test" ||
    fail "the evaluation of $checkpoint stopped; see above."

say "5/5 pictures"
wait "$drawing" || {
    cat "$work/pictures.log" >&2
    fail "the pictures could not be drawn; see above."
}
trap - EXIT

"$python" - "$task" "$work" <<'PY' || fail "the results in $work/test could not be read."
import json
import sys
from pathlib import Path

task, work = sys.argv[1], Path(sys.argv[2])
newest = max(work.glob('test/*/*.json'), key=lambda path: path.stat().st_mtime)
metrics = json.loads(newest.read_text().splitlines()[-1])
print()
if task == 'detection':
    if 'coco/bbox_mAP' not in metrics:  # a model that has hardly trained
        print('No object was found above the score threshold: an AP of 0 by definition.')
    print(f"box AP     {metrics.get('coco/bbox_mAP', 0):.3f} (IoU .50:.95, held-out images)")
    print(f"mask AP    {metrics.get('coco/segm_mAP', 0):.3f}")
else:
    print(f"mIoU       {metrics['mIoU_present'] / 100:.3f} over the "
          f"{metrics['classes_present']:.0f} classes present (held-out images)")
    print(f"baseline   {metrics['mIoU_majority'] / 100:.3f} with the majority class everywhere")
PY
total=$((SECONDS - started))
clock() { printf '%d min %02d s' $(($1 / 60)) $(($1 % 60)); }
echo "time       $(clock $total): environment $(clock $environment_seconds)," \
    "training $(clock $train_seconds), the rest $(clock $((total - environment_seconds - train_seconds)))"
echo "pictures   $work/pictures/"
echo "checkpoint $checkpoint"
echo "log        $(ls -t "$work"/*/*.log | tail -n 1)"
