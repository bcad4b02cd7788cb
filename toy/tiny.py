"""A tiny tokenizer and a tiny Qwen3-VL, and the settings that differ from the paper's."""

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig

from model import FutureL1, add_latent_tokens

# What differs from the paper's settings, in one place: the model is 10,000 times smaller and learns
# from scratch.
TINY = dict(
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
    image_max_tokens=1,
    l_max=1,
    max_length=256,
    system="watch the ball",
)


def make_tokenizer(texts):
    """Words split at white space -> a tokenizer with Qwen's chat markup, which AutoTokenizer
    loads.
    """
    words = sorted({word for text in texts for word in text.split()})
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<unk>", *words])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens(
        [
            AddedToken(tag, normalized=False)
            for tag in ("<reason>", "</reason>", "<answer>", "</answer>")
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    # not among the words: text that looks like a control token stays unknown text
    tokenizer.add_tokens(
        [
            f"<|{name}|>"
            for name in ("im_start", "vision_start", "vision_end", "image_pad", "video_pad")
        ],
        special_tokens=True,
    )
    add_latent_tokens(tokenizer)
    return tokenizer


def make_model(tokenizer, seed, hidden=96, layers=2):
    """A random Qwen3-VL of half a million weights: one visual token a frame at 32x32 pixels."""
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image_token_id", "image_pad"),
            ("video_token_id", "video_pad"),
            ("vision_start_token_id", "vision_start"),
            ("vision_end_token_id", "vision_end"),
        )
    }
    head = hidden // 4
    config = Qwen3VLConfig(
        text_config=dict(
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
            rope_parameters=dict(
                rope_type="default",
                rope_theta=10000.0,
                mrope_interleaved=True,
                mrope_section=[head // 2 - 2 * (head // 6), head // 6, head // 6],
            ),
        ),
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            num_heads=2,
            out_hidden_size=hidden,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        ),
        tie_word_embeddings=False,
        **ids,
    )
    torch.manual_seed(seed)
    model = FutureL1(config)
    for module in (
        model.modules()
    ):  # 1 / sqrt(fan in): with the usual 0.02 so small a model learns nothing visual
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d)):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    model.set_latent_tokens(add_latent_tokens(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model
