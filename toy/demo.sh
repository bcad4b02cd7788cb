# The whole method on the embedded world, in minutes on two cores:
#
#     bash toy/demo.sh [OUT] [SEED]      # runs/toy 0
#
# It makes the clips, pretrains a tiny model on captions, fine-tunes it, reinforces it, curates rows,
# evaluates, draws what is imagined, and prints the table. You can also give each command by hand.
# A stage that is done is skipped, and one that was interrupted goes on. To do a stage again, delete
# its folder and its log in OUT/seed_SEED/logs. Other seeds share the clips in OUT/data:
#
#     for seed in 1 2; do bash toy/demo.sh runs/toy $seed; done
#     python -m toy.table runs/toy/seed_*
#
# For a trial, set sizes (toy/stage.sh): CLIPS=24 SFT_STEPS=9 bash toy/demo.sh runs/trial

OUT=${1:-runs/toy} SEED=${2:-0}
source toy/stage.sh

begin() {
  python -m toy.world --out "$data" --clips "$CLIPS" --annotated "$ANNOTATED" \
    --eval_clips "$EVAL_CLIPS" --eval_seed "$EVAL_SEED"
  stage untrained python -m toy.tiny --data "$data/captions.jsonl,$data/train.jsonl" \
    --words "$words" --out "$home/untrained" --seed "$SEED"
  # a short training on captions of single frames stands in for Qwen3-VL's pretraining
  stage base python sft.py --config toy/captions.json --steps "$PRETRAIN_STEPS" --seed "$SEED" \
    --model "$home/untrained" --data "$data/captions.jsonl" --out "$home/base" --resume
}

imagine() {
  stage latent python sft.py --config toy/sft.json --steps "$SFT_STEPS" --seed "$SEED" \
    --model "$home/base" --data "$data/train.jsonl" --out "$home/latent" --resume
  stage la-dapo python la_dapo.py --config toy/rl.json --steps "$RL_STEPS" --seed "$SEED" \
    --model "$home/latent" --data "$data/prompts.jsonl" --out "$home/la-dapo" --resume
}

text() {
  stage text python sft.py --config toy/sft.json --steps "$SFT_STEPS" --seed "$SEED" --no-spans \
    --model "$home/base" --data "$data/train.jsonl" --out "$home/text" --resume
}

painter() {  # the vision tower is frozen from here on: one painter serves all models of the seed
  stage painter python -m common.painter --steps "$PAINTER_STEPS" --seed "$SEED" \
    --model "$home/base" --data "$data/captions.jsonl"
}

curate() {
  # what is probed: it can read a later frame that is shown, and foresee little
  stage able python sft.py --config toy/sft.json --steps $((PRETRAIN_STEPS / 15)) --seed "$SEED" \
    --lr 1e-3 --no-spans --model "$home/base" --data "$data/curation_able.jsonl" \
    --out "$home/able" --resume
  stage curation python curate.py --config toy/curate.json --seed "$SEED" --model "$home/able" \
    --data "$data/curation_pool.jsonl" --k $(($(wc -l < "$data/curation_pool.jsonl") / 6)) \
    --out "$home/curation"
  # the selected rows against as many random ones
  stage sets python -c "import sys; from toy.world import same_number; same_number(*sys.argv[1:])" \
    "$data/curation_pool.jsonl" "$home/curation/selected.jsonl" "$SEED" "$home/curation"
}

learn() {  # SFT on the rows of a set
  [ -s "$home/curation/$1.jsonl" ] || return 0  # in a trial, perhaps nothing is chosen
  stage "$1" python sft.py --config toy/sft.json --steps $((SFT_STEPS / 3)) --seed "$SEED" \
    --model "$home/able" --data "$home/curation/$1.jsonl" --media_root "$data" \
    --out "$home/$1" --resume
}

ablate() {  # does the answer depend on what is imagined?
  score latent
  ask ablations "$home/latent" --out "$home/eval_latent" --latents zero,pause,noise,shuffled,true
}

draw() {
  score la-dapo
  stage pictures python -m tools.pictures --config toy/pictures.json --model "$home/la-dapo" \
    --data "$data/test.jsonl" --out "$home/pictures"
}

score_the_rest() {
  score base
  score text
  for name in able chosen random; do
    [ -e "$home/$name" ] || continue
    ask "$name" "$home/$name"
  done
}

# two at a time, which take about as long
others() { painter; text; curate; learn chosen; }
show_imagined() { ablate; draw; }
show_others() { learn random; score_the_rest; }

echo "Each stage names itself and its seconds when it is done; what it says is in $logs."
at_once begin
at_once imagine others
at_once show_imagined show_others

python -m toy.table "$home"
echo "
$SECONDS s; in $OUT:
  seed_$SEED/pictures/imagined.png     what is imagined, right and wrong; imagine.gif: moving
  seed_$SEED/eval_la-dapo/report.html  answers to look through
  table.md accuracy.png rl.png data/clip.png, and each training's loss.png or rewards.png"
