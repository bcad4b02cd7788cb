# Latents without annotated futures: the tables of docs/variants.md.
#
#     bash toy/demo.sh                                     # clips, the captions model, latent SFT
#     bash variants/video_latent.sh [OUT] [SEED] [ROW...]  # no ROW = all
#
# All rows start from the demo's captions model, learn from the answers of all its clips, see the
# same questions in the same order, and take as many steps. Each model is asked with its own latents
# and with zeros: if zeros cost nothing, the latents are not read. How the answer's loss changes with
# another row's latents stands in each log.jsonl (answer_swapped).

OUT=${1:-runs/toy} SEED=${2:-0} ROWS=("${@:3}")
source toy/stage.sh
: "${ANSWER_STEPS:=300}"  # x 64 questions
start=(--steps "$ANSWER_STEPS" --seed "$SEED" --model "$OUT/seed_0/base")
start+=(--data "$data/prompts.jsonl")

# ask_fixed: `ask` for a model whose spans have one length
ask_fixed() {
  stage "eval_$1" python -m variants.video_latent evaluate --config toy/eval.json \
    --data "$data/test.jsonl" --model "$2" --out "$home/eval_$1" "${@:3}"
}

# row NAME FED COMMAND...: a training, if it is wanted, and its answers with its spans fed FED
row() {
  local name=$1 fed=$2 asked=ask_fixed
  shift 2
  if [ "$1" = sft.py ]; then asked=ask; fi
  if ! wanted "${name#video_}"; then return; fi
  stage "$name" python "$@" "${start[@]}" --out "$home/$name" --resume
  for how in $fed; do "$asked" "$name-$how" "$home/$name" --latents "$how" --max_latents 3; done
}

both="generated zero"
latents=(-m variants.video_latent --config variants/video_latent.json)
controls() {
  row video_none generated sft.py --config toy/sft.json --no-spans --latent_head "" \
    --latent_loss mse --no-stop_term
  row video_pause pause "${latents[@]}" --pause
  row video_own "$both" "${latents[@]}"
  row video_linear "$both" "${latents[@]}" --latent_head linear
  row video_div "$both" "${latents[@]}" --beta 0.01
}
aligned() {
  for kind in A B C; do row video_$kind "$both" "${latents[@]}" --align $kind --alpha 0.1; done
  for kind in B C; do
    row video_$kind+div "$both" "${latents[@]}" --align $kind --alpha 0.1 --beta 0.01
  done
}

at_once controls aligned
check_rows video_
python -m toy.table "$home"
python -m common.report "$home/eval_video_pause-pause" "$home"/eval_video_*-generated
