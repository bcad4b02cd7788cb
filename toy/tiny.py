"""A tiny tokenizer and a tiny random Qwen3-VL, for the embedded world and to try your own data.

    python -m toy.tiny --data my/train.jsonl,my/test.jsonl --out runs/my/untrained

The tokenizer knows the words of the records, and Qwen's chat markup; any other word is <unk>. The
model is Qwen3-VL's architecture with half a million weights. OUT also gets sft.json, rl.json,
curate.json and eval.json, the settings that so small a model needs, each for the `--config` of its
script: docs/data.md trains with them.

The embedded world's own settings stand beside this file (captions.json, sft.json, rl.json,
curate.json, eval.json, pictures.json); its frames are one token each. What differs in both from the
paper's settings, because the model is 10,000 times smaller and learns from scratch:
 - lr 2e-3 (RL 1e-4), beta2 0.98 (RL 0.99), no weight decay, no KL.
 - A linear latent head; Eq. (3) over the variance of its targets, with lambda = 1: raw states do
   not fit visual embeddings at this size.
 - The stop term: without it nothing teaches the model not to stop before its first latent.
 - RL takes 16 rollouts at temperature 1.4 of each of 128 prompts (16 of your own) and keeps every
   group with both outcomes: so low is the policy's entropy that few prompts have two. Rollouts are
   decoded together while they are equal (`merge_equal`).

Source: ours.
"""

import json
import os
from dataclasses import dataclass

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig

from common.cli import run_script
from common.formats import read_rows
from common.run import write_json
from model import FutureL1, add_latent_tokens

HERE = os.path.dirname(os.path.abspath(__file__))
MARKUP = ("<reason>", "</reason>", "<answer>", "</answer>")
CONTROL = ("im_start", "vision_start", "vision_end", "image_pad", "video_pad")


def settings(name):
    """The settings NAME.json beside this file, a script's `--config` -> {flag: value}."""
    with open(os.path.join(HERE, f"{name}.json")) as f:
        return json.load(f)


def make_tokenizer(texts):
    """Words split at white space -> a tokenizer with Qwen's chat markup, as AutoTokenizer loads."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in MARKUP])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    # not among the words: text that looks like a control token stays unknown text
    tokenizer.add_tokens([f"<|{name}|>" for name in CONTROL], special_tokens=True)
    add_latent_tokens(tokenizer)
    return tokenizer


def make_config(tokenizer, hidden, layers):
    """The shape of the tiny Qwen3-VL: one visual token a frame at 32x32 pixels."""
    head = hidden // 4
    words = dict(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    sections = [head // 2 - 2 * (head // 6), head // 6, head // 6]
    words["rope_parameters"] = dict(
        rope_type="default", rope_theta=1e4, mrope_interleaved=True, mrope_section=sections
    )
    pictures = dict(
        depth=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=2,
        out_hidden_size=hidden,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0],
    )
    return Qwen3VLConfig(
        text_config=words,
        vision_config=pictures,
        tie_word_embeddings=False,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )


def make_model(tokenizer, seed, hidden=96, layers=2):
    """A random FutureL1 of half a million weights."""
    torch.manual_seed(seed)
    model = FutureL1(make_config(tokenizer, hidden, layers))

    # 1 / sqrt(fan in): with the usual 0.02 so small a model learns nothing visual
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d)):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    model.set_latent_tokens(add_latent_tokens(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def words_of(rows):
    """What a model reads and writes of rows -> [text]."""
    texts = []
    for row in rows:
        parts = [*row.prompt, *row.response, row.answer, *(row.options or [])]
        texts += [part for part in parts if isinstance(part, str)]
    return texts


SYSTEM = "watch the clip and answer"
# for records that are not the embedded world's: larger frames, fewer rows, longer answers
OWN = dict(system=SYSTEM, image_max_tokens=4, l_max=4, num_frames=8, video_max_tokens=64)
OWN |= dict(max_length=1024)
ASKED = dict(max_new_tokens=128, max_latents=8)
OWN_SETTINGS = {
    "sft": dict(OWN, global_batch=16, micro_batch=16),
    "rl": dict(OWN, **ASKED, groups=16, prompts=16, rollout_batch=16, micro_batch=16),
    "curate": dict(OWN, **ASKED),
    "eval": dict(OWN, **ASKED, batch=32),
}


@dataclass
class Config:
    data: str = ""  # the records whose words it knows: files, with commas
    words: str = "system user assistant watch the clip and answer"  # of the chat, known too
    out: str = "runs/toy/seed_0/untrained"  # the model's folder
    seed: int = 0  # of the random weights


def main(config):
    """Write tokenizer, random model and settings to config.out, as a whole or not at all."""
    texts = [config.words]
    for path in filter(None, config.data.split(",")):
        texts += words_of(read_rows(path))
    tokenizer, partial = make_tokenizer(texts), config.out + ".part"
    model = make_model(tokenizer, config.seed)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for name, own in OWN_SETTINGS.items():
        write_json(os.path.join(partial, f"{name}.json"), settings(name) | own)
    os.rename(partial, config.out)
    weights = sum(p.numel() for p in model.parameters())
    print(f"{config.out}: {len(tokenizer)} tokens, {weights:,} random weights")


if __name__ == "__main__":
    run_script(main, Config)
