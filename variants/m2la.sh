# What a compressed cache costs on the embedded world: ranks, before and after healing.
#
#     bash toy/demo.sh                      # trains latent SFT, which is converted
#     bash variants/m2la.sh [OUT] [SEED]    # the rows of docs/variants.md, some ten minutes
#
# Each rank, and each way with the norm of keys, is a conversion of the same model and 100 steps of
# the same SFT at half its learning rate. Two controls: those steps without a conversion, and after
# one whose maps into the latent and out of it were made random, at half the cache.

OUT=${1:-runs/toy} SEED=${2:-0}
source toy/stage.sh
: "${HEAL_STEPS:=100}"
heal=(--config toy/sft.json --steps "$HEAL_STEPS" --lr 1e-3 --seed "$SEED")
heal+=(--model "$home/latent" --data "$data/train.jsonl")

# ask_converted: `ask` for a converted model
ask_converted() {
  stage "eval_$1" python -m variants.m2la evaluate --config toy/eval.json \
    --data "$data/test.jsonl" --model "$2" --out "$home/eval_$1"
}

# row NORM RANK: a conversion, its healing, and the answers before and after
row() {
  local name=m2la-$1-$2
  stage "$name" python -m variants.m2la "${heal[@]}" --norm "$1" --rank "$2" \
    --out "$home/$name" --resume
  ask_converted "$name-before" "$home/$name/converted"
  ask_converted "$name" "$home/$name"
}

controls() {
  stage m2la-none python sft.py "${heal[@]}" --out "$home/m2la-none" --resume
  ask m2la-none "$home/m2la-none"

  local name=m2la-random-24
  stage "$name-converted" python -m variants.m2la "${heal[@]}" --rank 24 --no-heal \
    --out "$home/$name" --resume
  stage "$name-forgotten" python -c "
import sys, torch
from model import load
from variants.m2la import Model
model, _ = load(sys.argv[1], cls=Model)
torch.manual_seed(0)
for layer in model.model.language_model.layers:
    attention = layer.self_attn
    for weight in (attention.kv_a.weight, attention.up_k, attention.up_v):
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
model.save_pretrained(sys.argv[1])" "$home/$name/converted"
  stage "$name" python -m variants.m2la "${heal[@]}" --rank 24 --out "$home/$name" --resume
  ask_converted "$name-before" "$home/$name/converted"
  ask_converted "$name" "$home/$name"
}

exact() { for rank in ${RANKS:-72 48 36 24 12}; do row exact "$rank"; done; }
linear() { controls; for rank in ${RANKS:-48 36 24 12}; do row linear "$rank"; done; }

at_once exact linear
python -m toy.table "$home"
python -m common.report "$home/eval_latent" "$home"/eval_m2la-*  # differences, with intervals
