"""Which word a random number picks: top-p without a sort of the vocabulary.

The nucleus is the smallest set of words of probability top_p, the likeliest first; words that are
as likely as the least of them are in, too. Axis letters: R rows, V vocabulary, K likeliest words.
"""

import torch

LIKELIEST = 1024  # words among which a sure policy's nucleus is looked for


def choose_word(logp, u, temperature=1.0, top_p=1.0):
    """Log-probabilities (R, V), -inf = never -> words (R,): the likeliest, or drawn by u (R,).

    Drawn is the inverse of the cumulated probabilities of the nucleus, in the vocabulary's order,
    not `multinomial`: with one number a row, its words do not depend on what else is in the batch,
    nor on how the nucleus was found. temperature 0 = the likeliest; else `logp` has it already.
    Source: ours.
    """
    if temperature == 0:
        return logp.argmax(-1)
    p, words = (logp - logp.amax(-1, keepdim=True)).exp(), None  # (R, V), up to a factor
    if top_p < 1:
        mass = top_p * p.sum(-1, keepdim=True, dtype=torch.float64)  # (R, 1)
        # a captured step cannot look whether the likeliest are enough
        capturing = p.is_cuda and torch.cuda.is_current_stream_capturing()
        words, floor = (None, None) if capturing else likeliest(p, mass)
        if words is None:
            floor = nucleus_floor(p, mass)
        else:
            p = p.gather(1, words)  # (R, K)
        p = p.masked_fill(p < floor, 0)
    cdf = p.double().cumsum(-1)  # float64: the sum may skip zeros or add them
    k = torch.searchsorted(cdf, u[:, None].double() * cdf[:, -1:], right=True)  # (R, 1)
    last = (cdf < cdf[:, -1:]).sum(-1, keepdim=True)  # rounding must not lead past what is possible
    k = torch.minimum(k, last)
    return (k if words is None else words.gather(1, k))[:, 0]


def likeliest(p, mass):
    """The K likeliest words in the vocabulary's order (R, K), the least probability inside the
    nucleus (R, 1); None, None if they do not hold all of every row's nucleus. Source: ours.

    p (R, V), mass (R, 1). Looks at the values.
    """
    top, words = p.topk(min(LIKELIEST, p.shape[1]))  # (R, K)
    covered = top.double().cumsum(-1) >= mass
    if not bool(covered[:, -1].all()):
        return None, None
    return words.sort(-1).values, top.gather(1, covered.int().argmax(-1, keepdim=True))


def nucleus_floor(p, mass):
    """The least probability inside the nucleus (R, 1): the largest t with sum_{p >= t} p >= mass.

    p (R, V), mass (R, 1). By bisection over the bits of a float, which are in the order of the
    numbers: as long whatever the values, without a sort and without a look at them. Source: ours.
    """
    low = torch.zeros_like(mass, dtype=torch.int32)  # all of p is enough
    high = p.amax(-1, keepdim=True).float().view(torch.int32) + 1  # nothing is not
    for _ in range(31):
        middle = low + (high - low) // 2
        above = p.masked_fill(p < middle.view(torch.float32), 0)
        enough = above.sum(-1, keepdim=True, dtype=torch.float64) >= mass
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low.view(torch.float32)
