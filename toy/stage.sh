# What the shell scripts of the embedded world share: sizes, folders, and stages that run only once.
# A script sets OUT, the folder of all seeds, and SEED, and then reads this file with `source`.

set -euo pipefail
set -m  # each background job becomes a process group, which can be ended as a whole
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1  # so small a model gains nothing from a second thread
export CUDA_VISIBLE_DEVICES=  # nor from a GPU, on which bf16 would give other figures

# sizes; to change one, set it in the environment
: "${CLIPS:=3000}"           # training clips
: "${ANNOTATED:=200}"        # of these, clips that have chains of future frames
: "${EVAL_CLIPS:=1000}"      # held-out clips, four questions each
: "${EVAL_SEED:=6000000}"    # the first of them
: "${PRETRAIN_STEPS:=1500}"  # x 64 captions
: "${SFT_STEPS:=600}"        # x 64 rows
: "${RL_STEPS:=80}"          # x 128 prompts, 16 rollouts each
: "${PAINTER_STEPS:=400}"    # of what turns latents back into pixels

data=$OUT/data            # clips and records, the same for all seeds
home=$OUT/seed_$SEED      # what is trained and measured with this seed
logs=$home/logs
mkdir -p "$logs"
# known to the tokenizer besides the rows' words; the last ones are never seen, but the size of the
# vocabulary decides the random weights of the published tables
words="system user assistant watch the ball THOUGHT 1: 2: 3: 4:"

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

# stage NAME COMMAND...: run a command unless logs/NAME.txt says that it has succeeded before.
# Its output goes to logs/NAME.txt.part, which is renamed when the command succeeds. An interrupted
# command runs again, and continues from its last checkpoint. The first failure ends the script.
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

# wanted NAME: whether a row is among those that were asked for (ROWS, an array; empty = all)
wanted() { [ ${#ROWS[@]} -eq 0 ] || [[ " ${ROWS[*]} " == *" $1 "* ]]; }

# check_rows PREFIX: at the end, complain about rows that were asked for and do not exist
check_rows() {
  for name in "${ROWS[@]}"; do
    if [ ! -e "$home/$1$name" ]; then
      echo "$name is not a row of this script" >&2
      exit 2
    fi
  done
}

# newest RUN: the last checkpoint of a training
newest() { ls -d "$1"/step_* | tail -n 1; }

# ask NAME MODEL [FLAG...]: a model's answers to the held-out questions, in OUT/seed_SEED/eval_NAME
ask() {
  # EVALUATE: the command of a variant whose folders need it, in place of evaluate.py
  # shellcheck disable=SC2086  # several words are meant
  stage "eval_$1" python ${EVALUATE:-evaluate.py} --config toy/eval.json \
    --data "$data/test.jsonl" --model "$2" --out "$home/eval_$1" "${@:3}"
}

# score NAME [FLAG...]: the same of training NAME, and its report shows what the model imagines
score() {
  local painter model
  painter=$(newest "$home/base")/painter  # it draws the latents of every model of this seed
  model=$(newest "$home/$1")
  if [ ! -e "$model/painter" ]; then
    rm -rf "$model/painter.part"
    cp -r "$painter" "$model/painter.part"
    mv "$model/painter.part" "$model/painter"
  fi
  ask "$1" "$home/$1" "${@:2}"
}
