"""What latents look like: the frames they are near to."""

import torch
import torch.nn.functional as F

from common.clips import ClipError, film, normalise, resize_and_cut


def imagined(model, row, latents, lengths, budget):
    """What a row's spans are near to -> a JSON-able dict. Source: ours.

    latents (N, D); lengths: latents of each span; budget: pixels (min, max) of a frame.
    {"spans": lengths, "frames": labels, "cosine": (N, F), "similarity": (M, M)}, the latter of the
    non-empty spans' means, Eq. (6)'s b_m; or {"error": why}.
    """
    try:
        frames = film(row)
    except ClipError as e:
        return dict(error=str(e))
    labels = [label for label, _, _ in frames]
    out = dict(spans=lengths, frames=labels, cosine=[], similarity=[])
    if not frames or not len(latents):
        return out

    # each latent beside each frame: the best cosine over the frame's tokens
    z = F.normalize(latents.float(), dim=-1)  # (N, D)
    columns = []
    for _, _, pixels in frames:
        patches, grid = resize_and_cut(pixels[None], *budget)
        patches, grid = normalise(patches).to(model.device), grid[None].to(model.device)
        e = F.normalize(model.encode_frames(patches, grid).float(), dim=-1)  # (K, D)
        columns.append((z @ e.T).amax(1))  # (N,)
    out["cosine"] = rounded(torch.stack(columns, 1))  # (N, F)

    spans = latents.float().split([n for n in lengths if n])
    b = F.normalize(torch.stack([span.mean(0) for span in spans]), dim=-1)  # (M, D)
    out["similarity"] = rounded(b @ b.T)
    return out


def rounded(matrix):
    """A matrix -> lists of its rows, three digits."""
    return [[round(v, 3) for v in line] for line in matrix.tolist()]
