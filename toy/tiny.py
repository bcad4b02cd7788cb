"""A tiny tokenizer and a tiny Qwen3-VL, and the settings that differ from the paper's."""

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig

from model import FutureL1, add_latent_tokens

# What differs from the paper's settings, in one place: the model is 10,000 times smaller and learns
# from scratch.
TINY_DATA = dict(image_max_tokens=1, l_max=1, max_length=256, system="watch the ball")

TINY = dict(
    TINY_DATA,
    global_batch=64,
    micro_batch=64,
    lr=2e-3,
    beta2=0.98,
    weight_decay=0.0,
    save_every=500,
    latent_head="linear",
    latent_loss="nmse",
    lam=1.0,  # raw states do not fit visual embeddings at this size
    stop_term=True,  # without it nothing teaches the model not to stop before its first latent
)

# Its policy is sure of itself, so many samples are needed to see two outcomes: they are decoded
# together while equal.
TINY_RL = dict(
    TINY_DATA,
    groups=10**6,
    prompts=256,
    max_tries=1,
    rollout_batch=128,
    share=True,
    group_size=16,
    low=0.0,
    high=1.0,
    temperature=1.2,
    top_p=1.0,
    max_new_tokens=48,
    max_latents=2,
    micro_batch=64,
    kl=0.0,
    lr=1e-4,
    beta2=0.99,
    warmup_steps=20,
    final_lr=0.1,
    adjoint_terms=-1,
    save_every=20,
)

TINY_EVAL = dict(TINY_DATA, batch=250, max_new_tokens=48, max_latents=2)

TINY_CURATION = dict(TINY_DATA, batch=50, max_new_tokens=12, max_latents=2)

TINY_PICTURES = dict(TINY_DATA, max_new_tokens=48, max_latents=2)

MARKUP = ("<reason>", "</reason>", "<answer>", "</answer>")
CONTROL = ("im_start", "vision_start", "vision_end", "image_pad", "video_pad")


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
