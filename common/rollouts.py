"""Names that moved to latent_decode.py."""

from latent_decode import Rollout, join, one_mark_a_span, take  # noqa: F401
