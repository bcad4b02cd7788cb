# The rows of docs/results.md beside the demo's: controls, ablations of the rewards, variants.
#
#     bash toy/controls.sh [OUT] [SEED] [ROW...]      # after toy/demo.sh; no ROW = all
#     python -m toy.table runs/toy/seed_*
#
# A row is a training, named by its folder in OUT/seed_SEED, and its answers to the held-out
# questions. CPU seconds stand beside each in the table. The titles are in toy/table.py.

OUT=${1:-runs/toy} SEED=${2:-0} ROWS=("${@:3}")
source toy/stage.sh

# row NAME COMMAND...: a training, if it is wanted, and its score with its spans fed FED
row() {
  local name=$1
  shift
  if ! wanted "$name"; then return; fi
  stage "$name" python "$@" --seed "$SEED" --out "$home/$name" --resume
  score "$name" --latents "${FED:-generated}" --max_latents "${LONGEST:-2}"
}

base=$home/base latent=$home/latent text=$home/text
train=$data/train.jsonl      # 200 clips with chains of future frames
answers=$data/prompts.jsonl  # the questions that RL sees, their answers alone
half=$((SFT_STEPS / 2)) twice=$((SFT_STEPS * 2))
# in about the seconds of latent SFT and RL: on chains, on answers; in those of RL: on answers
longer=$((SFT_STEPS * 9 / 5)) longest=$((SFT_STEPS * 3)) more=$((SFT_STEPS * 4 / 3))

sft_rows() {
  set -- --config toy/sft.json  # of sft.py and its variants

  # on the answers that RL sees: no chain, no reward
  row answers sft.py "$@" --no-spans --steps "$SFT_STEPS" --model "$base" --data "$answers"
  row answers-long sft.py "$@" --no-spans --steps "$longest" --model "$base" --data "$answers"
  row latent-answers sft.py "$@" --no-spans --steps "$more" --model "$latent" --data "$answers"
  row answers-half sft.py "$@" --no-spans --steps "$half" --model "$base" --data "$answers"
  row answers-twice sft.py "$@" --no-spans --steps "$twice" --model "$base" --data "$answers"

  # on the annotated clips: words that say the exact place, spans without content, more steps
  row places sft.py "$@" --no-spans --steps "$SFT_STEPS" --model "$base" --data "$data/places.jsonl"
  FED=pause row pause -m variants.pause_tokens "$@" --lam 0 --steps "$SFT_STEPS" \
    --model "$base" --data "$train"
  row latent-long sft.py "$@" --steps "$longer" --model "$base" --data "$train"
  row latent-long-all sft.py "$@" --steps "$longer" --model "$base" --data "$data/all.jsonl"
  row latent+self -m variants.self_forcing "$@" --self_forcing 0.5 --self_forcing_passes 3 \
    --steps "$SFT_STEPS" --model "$base" --data "$train"
  row latent-stop sft.py "$@" --no-stop_term --steps "$SFT_STEPS" --model "$base" --data "$train"

  # on the answers with a span before them: of latent SFT's own latents, of pause tokens
  set -- -m variants.video_latent --config variants/video_latent.json --n_latents 4 \
    --data "$answers"
  local EVALUATE="-m variants.video_latent evaluate"
  LONGEST=4 row latent-answers-spans "$@" --steps "$half" --model "$latent"
  FED=pause LONGEST=4 row answers-pause "$@" --pause --steps "$SFT_STEPS" --model "$base"
}

rl_rows() {
  set -- --config toy/rl.json --steps "$RL_STEPS" --data "$answers"  # of la_dapo.py and its variants
  row adjoint la_dapo.py "$@" --adjoint_terms -1 --model "$latent"  # ours, through the latents
  row adjoint-1 la_dapo.py "$@" --adjoint_terms 1 --model "$latent"
  row right -m variants.right_rollouts "$@" --high 1.1 --model "$latent"
  row text-rl la_dapo.py "$@" --model "$text"
  row dapo la_dapo.py "$@" --lambda_c 0 --lambda_d 0 --model "$latent"
  row dapo+ctr la_dapo.py "$@" --lambda_d 0 --model "$latent"
  row dapo+div la_dapo.py "$@" --lambda_c 0 --model "$latent"
  row own-path -m variants.own_path "$@" --model "$latent"

  # noisy latents, so that the rollouts of a group differ in what they imagine
  set -- -m variants.noisy_latents "$@" --latent_sigma 0.1 --no-merge_equal \
    --prompts 64 --steps $((RL_STEPS / 2)) --model "$latent"
  row noise "$@"
  row noise-none "$@" --lambda_c 0 --lambda_d 0
  row noise-ctr "$@" --lambda_d 0
  row noise-div "$@" --lambda_c 0
  row noise-mean "$@" --density mean
}

at_once sft_rows rl_rows
check_rows ""
python -m toy.table "$home"
