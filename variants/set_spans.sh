# Spans predicted as a set on the embedded world: the tables of docs/variants.md.
#
#     bash variants/set_spans.sh [OUT] [SEED] [ARM...]    # runs/toy_sets 0; no ARM = all
#
# The world is the demo's with two changes. A frame is 64 x 64 pixels, four visual tokens, so that
# one latent of a frame can leak into the next. All coming frames of a chain are imagined one after
# the other before they are put into words, so that a set may hold several frames. Each seed has its
# own pretraining, from which all its arms start. `plain` is the paper's method on the same rows.

OUT=${1:-runs/toy_sets} SEED=${2:-0} ARMS=${*:3}
: "${CLIPS:=1300}" "${ANNOTATED:=1300}" "${EVAL_CLIPS:=500}" "${SFT_STEPS:=400}"
source toy/stage.sh
: "${ARMS:=plain ar frame one random}"
four=(--image_max_tokens 4 --l_max 4)
common=("${four[@]}" --seed "$SEED" --resume)

# join: records with their future frames side by side, before they are put into words
join() { python - "$data" <<'PYTHON'; }
import sys
from toy.world import read_jsonl, write_rows

for name in ("train", "test"):
    rows = read_jsonl(f"{sys.argv[1]}/{name}.jsonl")
    for row in rows:
        first, *hits = row["conversations"][1]["value"].split("<image>")
        row["conversations"][1]["value"] = first + "<image> " * len(hits) + " ".join(hits)
    write_rows(f"{sys.argv[1]}/joined_{name}.jsonl", rows)
PYTHON

# decode MODEL SCHEDULE OUT: answers whose spans are predicted set after set
decode() { python - "$1" "$data/joined_test.jsonl" "$2" "$3" <<'PYTHON'; }
import os, sys
import numpy as np
from common.folder import newest
from common.formats import answer_of, read_rows
from common.run import write_json
from data import DataConfig, collate, encode, model_inputs
from model import load
from rewards import pick
from variants import set_spans

folder, data, schedule, out = sys.argv[1:]
config = DataConfig(image_max_tokens=4, l_max=4, max_length=256, system="watch the ball")
model, tokenizer = load(newest(folder), cls=set_spans.Model)
model.eval()
right = {"all": []}
for row in read_rows(data):
    chain = encode(row, tokenizer, config)["ids"]  # the lengths of its spans are given
    blocks = [list(map(len, block)) for block in set_spans.find_blocks(chain, model.config)]
    prompt = model_inputs(collate([encode(row, tokenizer, config, train=False)], 0))
    tokens, _ = set_spans.decode(model, prompt, blocks, schedule, max_new_tokens=48)
    answer = pick(answer_of(tokenizer.decode(tokens)), row.options)
    for group in (row.group, "all"):
        right.setdefault(group, []).append(answer == pick(row.answer, row.options))
scores = {group: dict(n=len(v), accuracy=float(np.mean(v))) for group, v in right.items()}
os.makedirs(out, exist_ok=True)
write_json(os.path.join(out, "summary.json"), dict(scores=scores))
print({group: score["accuracy"] for group, score in scores.items()})
PYTHON

python -m toy.world --out "$data" --clips "$CLIPS" --annotated "$ANNOTATED" \
  --eval_clips "$EVAL_CLIPS"
[ -e "$data/joined_test.jsonl" ] || join
stage untrained python -m toy.tiny --data "$data/captions.jsonl,$data/train.jsonl" \
  --words "$words" --out "$home/untrained" --seed "$SEED"
stage base python sft.py --config toy/captions.json --steps "$PRETRAIN_STEPS" \
  --model "$home/untrained" --data "$data/captions.jsonl" --out "$home/base" "${common[@]}"

for arm in $ARMS; do
  tune=(--config toy/sft.json --steps "$SFT_STEPS" --model "$home/base" "${common[@]}")
  tune+=(--data "$data/joined_train.jsonl" --out "$home/sets-$arm")
  case $arm in
    plain)
      stage sets-plain python sft.py "${tune[@]}"
      ask sets-plain "$home/sets-plain" "${four[@]}" --max_latents 4 \
        --data "$data/joined_test.jsonl" ;;
    ar | frame | one | random)
      stage "sets-$arm" python -m variants.set_spans "${tune[@]}" --schedule "$arm" --slots 16 \
        --no-stop_term
      schedules=$arm
      if [ "$arm" = random ]; then schedules="1 2 4"; fi  # trained with any number of sets
      for schedule in $schedules; do
        stage "eval_sets-$arm-$schedule" decode "$home/sets-$arm" "$schedule" \
          "$home/eval_sets-$arm-$schedule"
      done ;;
    *) echo "$arm is no arm of this script" >&2; exit 2 ;;
  esac
done
python -m toy.table "$home"
