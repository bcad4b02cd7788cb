"""The tiny tokenizer is one like any other."""

from transformers import AutoTokenizer


def test_the_tokenizer_loads_as_any_other(world):
    """Breaks if the saved folder is not one that AutoTokenizer understands, or a control token is
    split.
    """
    tokenizer = AutoTokenizer.from_pretrained(world["model"])
    ids = tokenizer(
        "<reason> hits red </reason> <|latent_start|> <|latent|> <|latent_end|> <|im_end|>"
    ).input_ids
    assert len(ids) == 8 and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids[:4]) == "<reason> hits red </reason>"
    assert tokenizer.eos_token == "<|im_end|>"
