# The tiny trained models that the repository carries: from a folder of the demo to taste/.
#
#     bash toy/demo.sh                            # trains it
#     bash toy/taste.sh COMMIT [OUT] [SEED] [TO]  # copies them, a painter, two clips, their questions
#
# COMMIT: of the code that trained it, for the card.

set -euo pipefail
commit=$1 out=${2:-runs/toy} seed=${3:-0} to=${4:-taste}
model=$(ls -d "$out/seed_$seed/la-dapo"/step_* | tail -n 1)
sft=$(ls -d "$out/seed_$seed/latent"/step_* | tail -n 1)

# the checkpoint without the state of its training; what it is asked with; its painter is in it
rm -rf "$to/model" "$to/sft"
mkdir -p "$to/clips"
cp -r "$model" "$to/model"
rm -rf "$to/model/trainer" "$to/model/README.md"
cp toy/pictures.json "$to/model/future_l1.json"

# the model that RL started from, in bf16, which halves it
python - "$sft" "$to/sft" <<'PYTHON'
import sys, torch
from model import load

model, tokenizer = load(sys.argv[1])
model.to(torch.bfloat16).save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
PYTHON
cp toy/pictures.json "$to/sft/future_l1.json"

# the first two held-out clips, four questions each
head -n 8 "$out/data/test.jsonl" > "$to/questions.jsonl"
for clip in $(grep -o 'clips/[0-9]*.mp4' "$to/questions.jsonl" | sort -u); do
  cp "$out/data/$clip" "$to/$clip"
done

cat > "$to/README.md" <<CARD
# A taste

A model of half a million weights that imagines, small enough to come with the code: it answers
questions about the embedded world (toy/world.py), and about nothing else.

- \`model/\`: LA-DAPO on the embedded world, seed $seed, trained by the command in toy/demo.sh with the
  code of commit $commit. \`model/painter/\` turns its visual tokens and latents back into pixels
  (\`python -m common.painter\`, 7,200 frames of training clips, error on held-out frames in
  docs/results.md). \`model/future_l1.json\`: what it is to be asked with.
- \`sft/\`: the latent SFT that RL started from, its weights rounded to bf16: a start for experiments
  with RL that need no other training (the questions: \`python -m toy.world\`).
- \`clips/\`, \`questions.jsonl\`: the first 2 of the held-out clips, with their four questions,
  answers and coming key frames. The model has never seen them.

Put together by \`bash toy/taste.sh\`. Licence as the code's.
CARD
echo "$to: copied from $model"
