"""Own path: the rewards of latents are also followed straight into the latents.

A fork of la_dapo.py. What it changes: R_ctr and R_div are functions of the latents, so that

    grad E[R] = E[ R grad log pi + grad R ],      grad R = dR/dz dz/dw

has a second term, which la_dapo.py drops, as the paper does. Here it is added, through the same
adjoint as dloss/dz (la_dapo.adjoint_loss):

    g = d/dz ( clipped loss - 1/n sum_groups sum_i (lambda_c R_ctr,i + lambda_d R_div,i) / std )

 1. std is the deviation of the group's R, the unit of its advantages; it is a constant, and at
    least .1. An advantage is bounded however small std is; this term would not be.
 2. All of dR/dz: R_ctr of one rollout depends on the latents of the others, and what it says about
    theirs counts too. (In R grad log pi each rollout has its own reward alone.)
 3. Which rollouts are right, and the words, are held fixed. An unjudged rollout has no part.
 4. adjoint_terms is -1: without the adjoint there is no way from a latent to the weights.
What stays: rollouts, rewards, filter, advantages, the loop. A group of equal rollouts, which has no
advantages, has an update here.

    python -m variants.own_path --model runs/sft --data train.json

Source: ours.
"""

import dataclasses

import torch

import la_dapo
from common.cli import run_script
from rewards import contrastive_reward, span_likeness

LEAST_STD = 0.1  # of a group's rewards; ours


@dataclasses.dataclass
class Config(la_dapo.Config):
    adjoint_terms: int = -1  # -1 exact; k terms of the series

    def __post_init__(self):
        super().__post_init__()
        if self.adjoint_terms == 0:
            raise ValueError("own path: adjoint_terms is 0, so it has no way to the weights")

    @property
    def label(self):
        return "own path"


def own_rewards(group, latents, config):
    """What a group's latents earn, sum_i lambda_c R_ctr,i + lambda_d R_div,i -> scalar.

    latents: G tensors (N_i, D), None = unjudged. Differentiable in them. Source: Eq. (4)-(7).
    """
    ctr = contrastive_reward(latents, group.parts["correct"], config.tau)
    reward = config.lambda_c * ctr.sum()
    for z, lengths in zip(latents, group.spans):
        if z is not None:
            reward = reward - config.lambda_d * span_likeness(z, lengths).cpu()
    return reward


def batch_rewards(latents, batch, config):
    """`own_rewards` of a batch's groups, each in units of its deviation, summed -> scalar.

    latents: those of the batch's rows. A merged row's are those of each rollout it stands for.
    In fp32, as the rewards that are logged.
    """
    of_group = [[None] * len(group.texts) for group in batch.groups]  # G latents each
    for z, k, members in zip(latents, batch.prompt_of.tolist(), batch.members):
        for i in members:
            of_group[k][i] = z
    total = torch.zeros(())
    for group, own in zip(batch.groups, of_group):
        known = torch.tensor([R for R in group.parts["total"] if R is not None])
        std = known.std().clamp(min=LEAST_STD)
        with torch.autocast(latents[0].device.type, enabled=False):
            total = total + own_rewards(group, own, config) / std
    return total


def policy_loss(model, batch, counts, config):
    """`la_dapo.policy_loss` with the rewards' own path in its adjoint -> loss, figures."""
    new = la_dapo.replayed(model, batch, config)
    loss, kl, figures = la_dapo.clipped_loss(new, batch, counts, config)
    latents = new.latents.split([len(z) for z in batch.rollout.latents])
    reward = batch_rewards(latents, batch, config).to(loss.device) / counts.tokens
    total = loss + config.kl * kl + la_dapo.through_latents(loss - reward, new, batch, config)
    return total, dict(figures, own_reward=reward.detach())


def train(config):
    """`la_dapo.train` with this loss -> path of the last checkpoint."""
    return la_dapo.train(config, policy_loss)


if __name__ == "__main__":
    run_script(train, Config)
