# A loop of looks in the embedded world: the table of docs/variants.md.
#
#     bash toy/demo.sh                      # makes the world and the captions model
#     bash variants/mcr.sh [OUT] [SEED]     # some ten minutes; COSTS="0 0.05 0.2"
#
# The demo's questions, but at first one frame is seen, key frame 3; the others can be looked at. The
# next wall is asked for, or the second, third, fourth: the picture of key frame 4, 5, 6 or 7 shows
# it, and who does not look has to imagine. Beside the loop: uniform looks, N of the frames 4..7 put
# into the prompt whatever is asked. One model learns all N, by text-only SFT on the records' own chains,
# in as many steps as the loop.

OUT=${1:-runs/toy} SEED=${2:-0}
source toy/stage.sh
: "${COSTS:=0 0.05 0.2}"  # of a look: a training each
: "${LOOP_STEPS:=500}"    # of each SFT, x 64 loops
: "${REWARD_STEPS:=40}"   # x 32 prompts, 8 rollouts each
common=(--seed "$SEED" --resume)
loop=(--max_new_tokens 64 --max_latents 2 --max_turns 8 --max_looks 4)

# rows: one frame is seen (and some are shown); loops and uniform have chains, prompts answers alone
rows() { python - "$data" <<'PYTHON'; }
import sys
from toy.world import read_jsonl, turns, write_rows

def seen(row, shown=()):
    human, chain = (turn["value"] for turn in row["conversations"])
    asked = turns(1 + len(shown), human.replace("<image> ", ""), chain)
    return dict(row, image=[3, *shown], conversations=asked)

def answer_alone(row):
    human = row["conversations"][0]["value"]
    asked = turns(0, human, "<image>")  # which frame is asked for
    return dict(row, reasoning_image=row["reasoning_image"][-1:], conversations=asked)

def read(name):
    return read_jsonl(f"{sys.argv[1]}/{name}.jsonl")

def write(name, rows):
    write_rows(f"{sys.argv[1]}/mcr_{name}.jsonl", rows)

train, test, uniform = read("train"), read("test"), []
write("loops", [seen(row) for row in train])
write("prompts", [answer_alone(seen(row)) for row in read("all")])
for n, shown in enumerate(([], [6], [5, 7], [4, 6, 7])):  # n looks, spread over what comes
    uniform += [dict(seen(row, shown), id=f"{row['id']}-{n}") for row in train]
    write(f"test_{n}", [seen(row, shown) for row in test])
write("uniform", uniform)
PYTHON

# words FROM TO: a model of the world whose tokenizer also knows the words of the loop
words() { python - "$1" "$2" "$SEED" <<'PYTHON'; }
import os, sys, torch
from tokenizers import AddedToken
from common.folder import newest
from model import load
from variants.mcr import WORDS

model, tokenizer = load(newest(sys.argv[1]))
new = [*WORDS, *"12345678"]
tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in new])
torch.manual_seed(int(sys.argv[3]))
model.resize_token_embeddings(len(tokenizer))
model.config.text_config.vocab_size = len(tokenizer)
for part in (model, tokenizer):
    part.save_pretrained(sys.argv[2] + ".part")
os.rename(sys.argv[2] + ".part", sys.argv[2])
PYTHON

# play MODEL OUT T: the held-out questions in loops, greedy (T 0) or drawn; accuracy and looks
play() { python - "$1" "$data/mcr_test_0.jsonl" "$2" "$3" "$SEED" <<'PYTHON'; }
import os, sys, torch
import numpy as np
from common.folder import newest
from common.formats import read_rows
from common.run import write_json
from data import Samples
from model import load
from rewards import accuracy_reward
from toy.tiny import settings
from variants import mcr

folder, data, out, temperature, seed = sys.argv[1:]
shown = {name: settings("eval")[name] for name in ("image_max_tokens", "l_max", "system")}
config = mcr.Config(**shown, max_new_tokens=64, max_latents=2, max_turns=8, max_looks=4)
model, tokenizer = load(newest(folder))
how = {}
if float(temperature):
    how = dict(temperature=float(temperature), generator=torch.Generator().manual_seed(int(seed)))
samples, episodes, results = Samples(read_rows(data), tokenizer, config, train=False), [], []
for i in range(0, len(samples), 256):
    some = [samples[k] for k in range(i, min(i + 256, len(samples)))]
    episodes += mcr.play(model.eval(), tokenizer, some, config, **how)
for episode in episodes:
    row, text, looks = episode.sample["row"], tokenizer.decode(episode.tokens), len(episode.seen)
    right = accuracy_reward(text, row.answer, row.options) > 0
    results += [(group, right, looks) for group in (row.group, "all")]
    if not looks:
        results += [(f"{group}, no look", right, 0) for group in (row.group, "all")]
scores = {}
for name in sorted({group for group, _, _ in results}):
    some = [(right, looks) for group, right, looks in results if group == name]
    accuracy, looks = np.mean(some, 0)
    scores[name] = dict(n=len(some), accuracy=accuracy, looks=looks)
    print(f"{name}: accuracy {accuracy:.3f}, {looks:.2f} looks, {len(some)} questions")
os.makedirs(out, exist_ok=True)
write_json(os.path.join(out, "summary.json"), dict(scores=scores))
PYTHON

[ -e "$data/mcr_uniform.jsonl" ] || rows
[ -e "$home/mcr-words" ] || words "$OUT/seed_0/base" "$home/mcr-words"

uniform() {
  stage mcr-uniform python sft.py --config toy/sft.json --steps "$LOOP_STEPS" --no-spans \
    --model "$home/mcr-words" --data "$data/mcr_uniform.jsonl" --out "$home/mcr-uniform" \
    "${common[@]}"
  for n in 0 1 2 3; do
    ask "mcr-uniform-$n" "$home/mcr-uniform" --data "$data/mcr_test_$n.jsonl" --max_new_tokens 64
  done
}

loops() {
  stage mcr-loops python -m variants.mcr_sft --config toy/sft.json --steps "$LOOP_STEPS" \
    --model "$home/mcr-words" --data "$data/mcr_loops.jsonl" --out "$home/mcr-loops" "${common[@]}"
  loop_through mcr-loops 0
  loop_through mcr-loops 1
  for cost in $COSTS; do
    stage "mcr-cost-$cost" python -m variants.mcr --config toy/rl.json "${loop[@]}" --cost "$cost" \
      --steps "$REWARD_STEPS" --prompts 32 --rollout_batch 32 --group_size 8 --no-merge_equal \
      --adjoint_terms -1 --temperature 1.2 --lr 3e-4 --warmup_steps 5 --model "$home/mcr-loops" \
      --data "$data/mcr_prompts.jsonl" --out "$home/mcr-cost-$cost" "${common[@]}"
    loop_through "mcr-cost-$cost" 0
  done
}

loop_through() { stage "eval_$1-T$2" play "$home/$1" "$home/eval_$1-T$2" "$2"; }

at_once uniform loops
python -m toy.table "$home"
grep -H "looks" "$home"/logs/eval_mcr-*.txt | sed "s:.*/eval_::"
