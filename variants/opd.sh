# On-policy distillation on the embedded world: the tables of docs/variants.md.
#
#     bash toy/demo.sh                            # clips, captions, and the captions model
#     bash variants/opd.sh [OUT] [SEED] [ROW...]  # no ROW = la-dapo answer cue cue+module none
#
# The cue of a question says where the ball is in each picture that is shown, in the words that the
# captions have taught: it follows from the pictures. The teacher is a latent SFT in which every
# second question ends in a hint, by turns its cue and its answer; all rows start from it, too. First
# it is asked the held-out questions without a hint and with either. CPU seconds are in the table.
#
# A model whose eyes are weak, because it has learnt few captions:
#
#     CAPTION_STEPS=60 CHAINS=all bash variants/opd.sh runs/toy 0 cue answer

OUT=${1:-runs/toy} SEED=${2:-0} ROWS=${*:3}
source toy/stage.sh
: "${ROWS:=la-dapo answer cue cue+module none}" "${OPD_STEPS:=95}"
: "${CAPTION_STEPS:=0}"  # of a captions model of its own; 0 = the demo's
: "${CHAINS:=train}"     # what the teacher learns from: train (annotated clips) or all
at=opd-$CAPTION_STEPS-$CHAINS-
common=(--seed "$SEED" --resume)

# the rows with their cues, and those whose questions end in a hint
[ -e "$data/hinted_test_answer.jsonl" ] || python - "$data" <<'PYTHON'
import json, sys
from toy.world import contacts, place_words, read_jsonl, write_rows

folder = sys.argv[1]
with open(f"{folder}/world.json") as f:
    bend = json.load(f)["bend"]

def cued(name):
    rows = read_jsonl(f"{folder}/{name}.jsonl")
    for row in rows:
        path = contacts(int(row["id"].split("-")[0]), bend)
        row["cue"] = " ".join(place_words(path[k - 1]) for k in row["image"])
    return rows

def hinted(row, kind):
    human, chain = row["conversations"]
    text = f"{human['value']} where is the ball ? {row[kind]}"
    return dict(row, conversations=[dict(human, value=text), chain])

write_rows(f"{folder}/cued_prompts.jsonl", cued("prompts"))
for name in ("train", "all"):
    rows = cued(name)
    hints = [hinted(row, kind) for kind in ("cue", "answer") for row in rows]
    write_rows(f"{folder}/hinted_{name}.jsonl", rows + rows + hints)
for kind in ("cue", "answer"):
    write_rows(f"{folder}/hinted_test_{kind}.jsonl", [hinted(row, kind) for row in cued("test")])
PYTHON

base=$OUT/seed_0/base  # the seeds share it
if [ "$CAPTION_STEPS" != 0 ]; then
  base=$home/${at}base
  stage "${at}base" python sft.py --config toy/captions.json --steps "$CAPTION_STEPS" \
    --model "$OUT/seed_0/untrained" --data "$data/captions.jsonl" --out "$base" "${common[@]}"
fi
stage "${at}teacher" python sft.py --config toy/sft.json --steps "$SFT_STEPS" --model "$base" \
  --data "$data/hinted_$CHAINS.jsonl" --out "$home/${at}teacher" "${common[@]}"
ask "${at}teacher" "$home/${at}teacher"
for hint in cue answer; do
  ask "${at}teacher-told-$hint" "$home/${at}teacher" --data "$data/hinted_test_$hint.jsonl"
done

opd=(-m variants.opd --config variants/opd.json --steps "$OPD_STEPS")
expert=(--privilege none --lr 3e-4 --teacher "$home/${at}the-expert")
for row in $ROWS; do
  case $row in  # a row without -adjoint holds latents constant
    expert*)    # the teacher is another model, which knows more: a latent SFT on all clips
      stage "${at}the-expert" python sft.py --config toy/sft.json --steps "$SFT_STEPS" \
        --model "$base" --data "$data/all.jsonl" --out "$home/${at}the-expert" "${common[@]}"
      ask "${at}the-expert" "$home/${at}the-expert" ;;
  esac
  case $row in
    la-dapo)                command=(la_dapo.py --config toy/rl.json --steps "$OPD_STEPS")
                            command+=(--adjoint_terms -1) ;;
    answer)                 command=("${opd[@]}" --privilege answer) ;;
    cue)                    command=("${opd[@]}" --privilege cue) ;;
    cue+module)             command=("${opd[@]}" --privilege cue --recovery) ;;
    none)                   command=("${opd[@]}" --privilege none) ;;
    cue-adjoint)            command=("${opd[@]}" --privilege cue --adjoint_terms -1) ;;
    expert)                 command=("${opd[@]}" "${expert[@]}") ;;
    expert-adjoint)         command=("${opd[@]}" "${expert[@]}" --adjoint_terms -1) ;;
    expert-latents)         command=("${opd[@]}" "${expert[@]}" --lam 10) ;;
    expert-latents-adjoint) command=("${opd[@]}" "${expert[@]}" --lam 10 --adjoint_terms -1) ;;
    *) echo "$row is no row of this script" >&2; exit 2 ;;
  esac
  stage "$at$row" python "${command[@]}" --model "$home/${at}teacher" \
    --data "$data/cued_prompts.jsonl" --out "$home/$at$row" "${common[@]}"
  EVALUATE="-m variants.opd evaluate" ask "$at$row" "$home/$at$row"
done
python -m toy.table "$home"
