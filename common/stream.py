"""An answer on the screen while it comes."""


def streamer(tokenizer, config, write):
    """-> a function for generate's `stream` that writes one row as it comes. Source: ours.

    Words are written as text, a span as [span 1: 4 latents].
    """
    words, shown, spans, latents, ended = [], "", 0, 0, False

    def feed(tokens):
        nonlocal words, shown, spans, latents, ended
        for token in tokens[0].tolist():
            if ended:
                return
            if token == config.latent_start_id:
                words, shown, spans, latents = [], "", spans + 1, 0
                write(f"\n[span {spans}: ")
            elif token == config.latent_id:
                latents += 1
            elif token == config.latent_end_id:
                write(f"{latents} latent{'s' * (latents != 1)}]\n")
            else:
                words.append(token)
                text = tokenizer.decode(words, skip_special_tokens=True)
                text = text.rstrip("\ufffd")  # half a character waits
                write(text[len(shown) :])
                shown, ended = text, tokenizer.convert_ids_to_tokens(token) == "<|im_end|>"

    return feed
