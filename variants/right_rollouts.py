"""SFT on the model's own right rollouts, latents included: rejection sampling, the control of RL.

A fork of la_dapo.py. What it changes:
 1. The loss is cross-entropy on the chosen tokens of the rollouts whose answer is right. Wrong ones
    have no part: no advantage, no clip, no KL.

        L = - 1/n sum_{t of right rollouts} log pi(a_t)        n: chosen tokens of all that are kept

 2. A group without a wrong rollout is kept, too (`high` above 1). One without a right rollout has
    nothing to learn from (`low` 0).
What stays: the loop, and its rollouts, sampled anew at each step. Their latents are fed again. The
gradient stops at them, as SFT's does at the true ones, unless adjoint_terms says otherwise.

    python -m variants.right_rollouts --model runs/sft --data train.json

Source: ours, after rejection sampling (STaR, arXiv 2203.14465; RAFT, arXiv 2304.06767).
"""

import dataclasses

import la_dapo
from common.cli import run_script


@dataclasses.dataclass
class Config(la_dapo.Config):
    low: float = 0.0  # a group needs a right rollout  # ours
    high: float = 1.1  # and may have no wrong one  # ours
    kl: float = 0.0  # ours

    def __post_init__(self):
        super().__post_init__()
        if self.kl or self.minibatches * self.inner_epochs != 1:
            raise ValueError("right rollouts: no KL, one update a step")

    @property
    def label(self):
        return "right rollouts"


def policy_loss(model, batch, counts, config):
    """The docstring's L in place of `la_dapo.policy_loss` -> a batch's share, figures for the log.

    Equal rollouts are merged. They are all right or all wrong.
    """
    new = la_dapo.replayed(model, batch, config)  # log-probabilities (R, T)
    right = [  # rows of `no_batch` have no members
        bool(members) and batch.groups[k].parts["correct"][members[0]]
        for k, members in zip(batch.prompt_of.tolist(), batch.members)
    ]
    weight = batch.weight * batch.A.new_tensor(right)[:, None] / counts.tokens  # (R, T)
    loss = -(new.logprobs * weight).sum()
    figures = dict(loss=loss.detach(), entropy=(new.entropy * batch.weight).sum() / counts.tokens)
    return loss + la_dapo.through_latents(loss, new, batch, config), figures


def train(config):
    """The loop of la_dapo.py with this loss -> path of the last checkpoint."""
    return la_dapo.train(config, policy_loss)


if __name__ == "__main__":
    run_script(train, Config)
