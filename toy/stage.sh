# What the shell scripts of the embedded world share: sizes, folders, and stages that are done once.
# They set OUT, the folder of everything, and SEED, then read this file with `source`.

set -euo pipefail
set -m  # each background job becomes a process group, which can be ended as a whole
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1  # so small a model gains nothing from a second thread

# sizes, which can be set from outside
: "${CLIPS:=3000}"           # training clips
: "${ANNOTATED:=200}"        # of these, clips that have chains of future frames
: "${EVAL_CLIPS:=1000}"      # held-out clips, four questions each
: "${EVAL_SEED:=4000000}"    # the first of them
: "${PRETRAIN_STEPS:=1500}"  # x 64 captions
: "${SFT_STEPS:=600}"        # x 64 rows
: "${RL_STEPS:=80}"          # x 256 prompts, 16 rollouts each
: "${PAINTER_STEPS:=400}"    # of what turns latents back into pixels

data=$OUT/data            # clips and records, the same for all seeds
home=$OUT/seed_$SEED      # what is trained and measured with this seed
logs=$home/logs
mkdir -p "$logs"

# one folder holds the results of one set of sizes
sizes="$PRETRAIN_STEPS $SFT_STEPS $RL_STEPS $PAINTER_STEPS"
[ -e "$home/sizes.txt" ] || echo "$sizes" > "$home/sizes.txt"
if [ "$(< "$home/sizes.txt")" != "$sizes" ]; then
  echo "$home was made with other numbers of steps ($(< "$home/sizes.txt")): choose another OUT" >&2
  exit 2
fi

end() { for job in $(jobs -p); do kill -- "-$job" 2> /dev/null || true; done; }
trap end EXIT
trap 'exit 1' INT TERM

# at_once FUNCTION...: run functions beside each other, each in a process of its own
at_once() {
  local work job jobs=()
  for work; do
    "$work" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job"; done
}

# stage NAME COMMAND...: run a command, unless it is done. Its words go to logs/NAME.txt.part, which
# loses the .part when the command has ended well. One that was interrupted is given again, and goes
# on where it was. The first command that fails ends the whole script.
stage() {
  local name=$1 log=$logs/$1.txt began=$SECONDS TIMEFORMAT='CPU s: %U + %S'
  shift
  if [ -e "$log" ]; then return; fi
  if ! { time "$@"; } >> "$log.part" 2>&1; then
    echo "$name failed; the end of $log.part:" >&2
    tail -n 15 "$log.part" >&2
    kill $$  # the script, from whichever of its processes
    exit 1
  fi
  mv "$log.part" "$log"
  echo "$name: $((SECONDS - began)) s"
}

# newest RUN: the last checkpoint of a training
newest() { ls -d "$1"/step_* | tail -n 1; }

# score NAME [FLAG...]: answer the held-out questions with the model of training NAME
score() {
  local name=$1
  shift
  if [ ! -e "$(newest "$home/$name")/painter" ]; then  # what draws its latents in the report
    cp -r "$(newest "$home/base")/painter" "$(newest "$home/$name")"
  fi
  stage "eval_$name" python evaluate.py --config toy/eval.json --data "$data/test.jsonl" \
    --model "$home/$name" --out "$home/eval_$name" "$@"
}
