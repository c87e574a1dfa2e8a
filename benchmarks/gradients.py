"""How far is each method's expected update from the gradient of the expected reward, and how noisy is it?

Denoisers of 3 tokens, 3 positions and 3 steps, random logits of standard deviation 1: "own", of each state,
or "shared", sums over positions (tabular.py). Rewards: uniform in [0, 1] for each of the 27 completions.
No Monte Carlo: the sampler is led down every path, groups of 4 are all multisets of completions, random steps
and masks are summed over. (wd1++ alone has too many groups, because of its y: 65,536 of them are drawn.) All
at theta_old, where ratios are 1, by the methods' own functions with the sampling and settings of VARIANTS
(RLDF has threshold 0.9, JustGRPO blocks of one token), against the exact gradient of E[R] under that
sampling. Simplified: RLDF draws one step or mask for a row, its normaliser a constant as in a large batch;
GDSD and ESPO draw one mask pair; there is no prompt, of which diffu-GRPO and wd1 could hide some.

    cosine    of the angle between expected update u and gradient g: mean and lowest over the models
    bias      |u - a g| / |a g| with the best a: the tangent of the angle, median
    noise     variance of a group's update / |u|^2, times the distinct canvases the group evaluates in rollout
              and update (GDSD's old scores are its new ones here): the forwards after which the average of
              updates is as much noise as signal, median

python benchmarks/gradients.py        some minutes; results/gradients.jsonl and gradients.png
"""

import functools
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import egspo  # noqa: E402
import gdsd  # noqa: E402
import rldf  # noqa: E402
import wd1  # noqa: E402
from baselines import diffu_grpo, espo, just_grpo  # noqa: E402
from benchmarks import figures  # noqa: E402
from benchmarks.tabular import STATE, L, S, V, every_rollout, random_model  # noqa: E402
from common import canvas, generator, score  # noqa: E402

G, N, MODELS = 4, V**L, 24  # samples in a group, completions, models of each kind
ANSWER = V ** torch.arange(L)  # completion @ ANSWER is its number
GROUPS = torch.combinations(torch.arange(N), G, with_replacement=True)
SAME = (GROUPS[:, :, None] == GROUPS[:, None]).tril().sum(2)  # 1, 2, .. among equals
COMES = math.factorial(G) / SAME.prod(1).double()  # in so many orders
ORDERS = torch.tensor(list(itertools.permutations(range(3)))) / 3  # noise (6, 3): each order once
MASKS = torch.cartesian_prod(*[torch.tensor([False, True])] * L)  # (8, L)

# The update of each method, given O rows with a draw each, and the reward of each completion: how likely the
# draw is, what is scored (O, D) on canvases (O, C, L), and the loss of D values for each of the rows o.


def egspo_update(model, roll, draw, value, K=S, select="entropy", lam=0.0, baseline="step"):
    share = weight = torch.ones(len(draw), 1)
    if select == "importance":  # draw is a number of K digits, the steps
        digits = draw[:, None] // S ** torch.arange(K) % S  # (O, K)
        P = roll.entropy.gather(1, roll.revealed_at.argsort(1))  # of each step, which reveals one token
        P = P / P.sum(1, keepdim=True)
        share = P.gather(1, digits)
        steps, taken, weight = egspo.draw_steps(roll, (P.cumsum(1) - P / 2).gather(1, digits))
    else:
        steps, taken = egspo.select_steps(roll, K, ORDERS[draw] if select == "uniform" else None)  # (O, K)
    guess = roll.guess.gather(1, steps[..., None].expand(-1, -1, L))
    reward, guess_reward = value[roll.completion @ ANSWER], value[guess @ ANSWER]
    hidden = roll.revealed_at[:, None] >= steps[..., None]  # (O, K, L)
    x = canvas(roll, hidden)
    logp = torch.stack([egspo.step_logp(model, x[:, k], roll, s, 1.0) for k, s in enumerate(steps.T)], 1)

    def loss(at, o):
        adv = egspo.stepwise_advantage(reward[o], guess_reward[o], steps[o], taken[o], G, S, lam, baseline)
        return egspo.policy_loss(at, at.detach(), adv, 0.2, 0.5)[0]

    hidden[:, 1:][steps[:, 1:] == steps[:, :-1]] = False  # a step that was drawn twice is evaluated once
    return share.prod(1), logp * weight, hidden, loss


def rldf_update(model, roll, draw, value, select="surprise", masks="sequential", p_min=0.6):
    if masks == "random":
        hidden = revealed = MASKS[draw]
        share = torch.where(hidden, 0.3, 0.7).prod(1)
    else:
        w, candidates = rldf.step_surprise(roll)
        w = (w if select == "surprise" else 0 * w).masked_fill(~candidates, -torch.inf)
        share = w.softmax(1).gather(1, draw[:, None])[:, 0]  # as draw_steps does for K = 1
        hidden, revealed = roll.revealed_at >= draw[:, None], roll.revealed_at == draw[:, None]
    logp = rldf.canvas_logp(model, canvas(roll, hidden), roll, hidden, 1.0)
    m = rldf.clean_state_mask(logp.detach().exp(), hidden, roll.valid, revealed, p_min)
    reward = value[roll.completion @ ANSWER]
    return share, (logp * m).sum(1, keepdim=True), hidden[:, None], (
        lambda at, o: rldf.token_loss(at, None, rldf.advantage(reward[o], G), 0.2))


def wd1_update(model, roll, draw, value, K=1, positive_only=False, y_sampled=False):
    steps = torch.arange(K).expand(len(draw), K)  # wd1: before step 0 all is hidden
    y = wd1.clean_predictions(roll, steps) if K == S else roll.completion[:, None]  # greedy y
    hidden = roll.revealed_at[:, None] >= steps[..., None]
    x = canvas(roll, hidden)
    share = torch.ones(len(draw), dtype=torch.float64)
    if K == S and y_sampled:  # draw is a number of 3 digits: the tokens of y that a later step reveals
        free = roll.revealed_at[:, None] > steps[..., None]  # (O, S, L): two before step 0, one before step 1
        y = roll.completion[:, None].expand(-1, S, -1).masked_scatter(free, draw[:, None] // ANSWER % V)
        for k in range(S):
            logp = score(model, x[:, k], roll.prompt_mask, y[:, k], hidden[:, k], 1.0).detach()
            surest = logp.masked_fill(~hidden[:, k], -torch.inf).argmax(1, keepdim=True)
            share *= (logp * free[:, k]).sum(1).exp()
            share *= roll.revealed_at.gather(1, surest)[:, 0] == k  # or the step had revealed another token
    logp = [wd1.one_step_logp(model, x[:, k], roll.prompt_mask, y[:, k], 1.0) for k in range(K)]

    def loss(at, o):
        reward = value[y[o] @ ANSWER].view(-1, G * K)
        return wd1.group_weights(reward, reward > -1, 1.0, positive_only).view(at.shape) * at

    return share, torch.stack(logp, 1), hidden, loss


def mask_noise(draw):
    """(O, 1, L + 1): how many of a mask pair's first half, then which; 24 draws are all of them."""
    return torch.cat([(draw[:, None] // 6 + 0.5) / (L + 1), ORDERS[draw % 6]], 1)[:, None]


def gdsd_update(model, roll, draw, value, match, weights="pair"):
    hidden = gdsd.mask_pairs(roll.valid, mask_noise(draw))[:, 0]  # (O, 2, L)
    c, _ = gdsd.pair_score(model, canvas(roll, hidden), roll, hidden, match, 1.0, weights)
    reward = value[roll.completion @ ANSWER]
    return torch.ones(len(draw)), c[:, None], hidden, lambda at, o: gdsd.distillation_loss(
        at, at.detach(), gdsd.advantage(reward[o], G)[:, None], gdsd.Args().psi, at, at.detach(), 0.0)


def diffu_grpo_update(model, roll, draw, value):
    hidden = torch.ones_like(roll.valid)
    logp = diffu_grpo.one_step_logp(model, canvas(roll, hidden), roll, 1.0)  # (O, L)
    reward = value[roll.completion @ ANSWER]
    return torch.ones(len(draw)), logp, hidden[:, None], lambda at, o: diffu_grpo.token_loss(
        at, at.detach(), diffu_grpo.advantage(reward[o], G), 0.2)[0]


def espo_update(model, roll, draw, value):
    scored = espo.antithetic_masks(roll.valid, mask_noise(draw))  # (O, 2, L)
    E = espo.elbo(model, canvas(roll, scored), roll, scored, 1.0)[:, None]
    reward = value[roll.completion @ ANSWER]
    return torch.ones(len(draw)), E, scored, lambda at, o: espo.sequence_loss(
        at, at.detach(), L, espo.advantage(reward[o], G)[:, None], 0.2)[0]


def just_grpo_update(model, roll, draw, value, normalise="released"):
    place = torch.arange(L)
    hidden = (place >= place[:, None]).expand(len(draw), -1, -1)  # (O, L, L)
    x = canvas(roll, hidden)
    logp = [just_grpo.token_logp(model, x[:, t], roll, place[t].expand(len(draw)), 1.0) for t in range(L)]
    reward = value[roll.completion @ ANSWER]
    return torch.ones(len(draw)), torch.stack(logp, 1), hidden, lambda at, o: just_grpo.token_loss(
        at, at.detach(), just_grpo.advantage(reward[o], G, normalise)[:, None], 0.2)[0]


TOP_PROB, CONFIDENCE, THRESHOLD = ("top_prob", None), ("confidence", None), ("confidence", 0.9)
LEFT_TO_RIGHT = ("top_prob", None, 1)
VARIANTS = {  # sampling, update, draws of a row, options
    "EGSPO": (TOP_PROB, egspo_update, 1, {}),
    "EGSPO, order confidence": (CONFIDENCE, egspo_update, 1, {}),
    "EGSPO, K 2 of 3": (TOP_PROB, egspo_update, 1, dict(K=2)),
    "EGSPO, K 2 of 3, uniform": (TOP_PROB, egspo_update, 6, dict(K=2, select="uniform")),
    "EGSPO, K 2 of 3, importance": (TOP_PROB, egspo_update, S**2, dict(K=2, select="importance")),
    "EGSPO, K 1 of 3": (TOP_PROB, egspo_update, 1, dict(K=1)),
    "EGSPO, K 1 of 3, uniform": (TOP_PROB, egspo_update, 6, dict(K=1, select="uniform")),
    "EGSPO, K 1 of 3, importance": (TOP_PROB, egspo_update, S, dict(K=1, select="importance")),
    "EGSPO-SA": (TOP_PROB, egspo_update, 1, dict(lam=0.5)),
    "EGSPO-SA, rank": (TOP_PROB, egspo_update, 1, dict(lam=0.5, baseline="rank")),
    "EGSPO-SA, K 2 of 3": (TOP_PROB, egspo_update, 1, dict(lam=0.5, K=2)),
    "EGSPO-SA, K 2 of 3, rank": (TOP_PROB, egspo_update, 1, dict(lam=0.5, K=2, baseline="rank")),
    "RLDF": (THRESHOLD, rldf_update, S, {}),
    "RLDF, uniform": (THRESHOLD, rldf_update, S, dict(select="uniform")),
    "RLDF, p_min 0": (THRESHOLD, rldf_update, S, dict(p_min=0.0)),
    "RLDF, random masks": (THRESHOLD, rldf_update, 8, dict(masks="random")),
    "wd1++": (CONFIDENCE, wd1_update, V**3, dict(K=S, y_sampled=True)),
    "wd1++, y greedy": (CONFIDENCE, wd1_update, 1, dict(K=S)),
    "wd1": (CONFIDENCE, wd1_update, 1, {}),
    "wd1, positive only": (CONFIDENCE, wd1_update, 1, dict(positive_only=True)),
    "GDSD": (CONFIDENCE, gdsd_update, 24, dict(match="logp")),
    "GDSD, elbo": (CONFIDENCE, gdsd_update, 24, dict(match="logp", weights="elbo")),
    "GDSD-TLC": (CONFIDENCE, gdsd_update, 24, dict(match="tlc")),
    "GDSD-TLC, elbo": (CONFIDENCE, gdsd_update, 24, dict(match="tlc", weights="elbo")),
    "diffu-GRPO": (CONFIDENCE, diffu_grpo_update, 1, {}),
    "ESPO": (CONFIDENCE, espo_update, 24, {}),
    "JustGRPO": (LEFT_TO_RIGHT, just_grpo_update, 1, {}),
    "JustGRPO, no std": (LEFT_TO_RIGHT, just_grpo_update, 1, dict(normalise="none")),
}


def moments(completion, p, logp, loss, table) -> tuple[Tensor, Tensor]:
    """Mean (parameters,) and variance of a group's update. Of what can become of a row: completion (O,),
    probability p (O,), logp (O, D), and loss, whose slopes must be equal for rows of one completion."""
    O, D = logp.shape
    total = p.new_zeros(N).index_add(0, completion, p)
    share = (p / total[completion])[:, None, None]  # of the draw, given the completion
    each = torch.eye(O * D, dtype=p.dtype).view(-1, O, D)
    h = torch.autograd.grad(logp, table, each, is_grads_batched=True)[0].reshape(O, D, -1)
    mean_h = h.new_zeros(N, *h.shape[1:]).index_add(0, completion, share * h)
    off = h - mean_h[completion]
    covariance = h.new_zeros(N, D, D).index_add(0, completion, share * off @ off.mT)
    mean_h = mean_h.flatten(0, 1)  # (N * D, parameters)
    o = torch.zeros(N, dtype=torch.long).index_copy(0, completion, torch.arange(O))[GROUPS.flatten()]
    at = logp.detach()[o].requires_grad_()
    c = -torch.autograd.grad(loss(at, o).sum(), at)[0].view(-1, G, D)  # what multiplies each gradient
    place = (GROUPS[..., None] * D + torch.arange(D)).flatten(1)
    c_sum = c.new_zeros(len(c), N * D).scatter_add(1, place, c.flatten(1))
    weight = COMES * total[GROUPS].prod(1)
    mean = weight @ c_sum @ mean_h
    square = (c_sum @ (mean_h @ mean_h.T) * c_sum).sum(1)
    square += torch.einsum("gik,gikl,gil->g", c, covariance[GROUPS], c)
    return mean, weight @ square - mean @ mean


def sampled_moments(p, logp, loss, table, groups=2**16) -> tuple[Tensor, Tensor]:
    """The same for wd1++, whose slopes depend on y, so not on the completion alone: of so many groups, each
    row an outcome of its own."""
    possible = p.nonzero()[:, 0]  # (O,)
    p, logp = p[possible], logp[possible]
    O, D = logp.shape
    each = torch.eye(O * D, dtype=p.dtype).view(-1, O, D)
    h = torch.autograd.grad(logp, table, each, is_grads_batched=True)[0].flatten(1)  # (O * D, parameters)
    gen = generator("cpu", "gradients", "groups")
    total, square = 0.0, 0.0
    for _ in range(groups // 2**12):
        o = p.multinomial(2**12 * G, replacement=True, generator=gen)
        at = logp.detach()[o].requires_grad_()
        c = -torch.autograd.grad(loss(at, possible[o]).sum(), at)[0].view(-1, G * D)
        place = (o[:, None] * D + torch.arange(D)).view(-1, G * D)
        u = c.new_zeros(len(c), O * D).scatter_add(1, place, c) @ h  # (2**12, parameters)
        total, square = total + u.sum(0), square + u.square().sum()
    mean = total / groups
    return mean, square / groups - mean @ mean


def distinct_canvases(roll, hidden, p) -> Tensor:
    """Expected number in a group, each of whose rows evaluates canvases (O, C, L) with probability p (O,)."""
    q = p[:, None] * hidden.any(2)  # (O, C)
    x = canvas(roll, hidden) @ STATE
    return (1 - (1 - p.new_zeros((V + 1) ** L).index_add(0, x.flatten(), q.flatten())) ** G).sum()


def measure(kind: str, seed: int, names=VARIANTS) -> dict[str, list[float]]:
    """cosine, bias and noise of each variant on one random model."""
    gen = generator("cpu", "gradients", kind, seed)
    model = random_model(kind, gen)
    table, value = model.network.table, torch.rand(N, generator=gen, dtype=torch.float64)
    rollout, found = functools.cache(functools.partial(every_rollout, model)), {}
    for name in names:
        sampling, update, draws, options = VARIANTS[name]
        roll, p = rollout(*sampling)
        g = torch.autograd.grad(p @ value[roll.completion @ ANSWER], table, retain_graph=True)[0].flatten()
        forwards = distinct_canvases(roll, roll.revealed_at[:, None] >= torch.arange(S)[:, None], p.detach())
        row, draw = torch.cartesian_prod(torch.arange(len(p)), torch.arange(draws)).T
        roll, p = roll[row], p.detach()[row]
        share, logp, hidden, loss = update(model, roll, draw, value, **options)
        p = p * share / share.view(-1, draws).sum(1)[row]
        forwards += distinct_canvases(roll, hidden, p)
        if name.startswith("wd1++"):
            u, variance = sampled_moments(p, logp, loss, table)
        else:
            u, variance = moments(roll.completion @ ANSWER, p, logp, loss, table)
        best = (u @ g) / (g @ g) * g
        cosine, bias = (u @ g) / u.norm() / g.norm(), (u - best).norm() / best.norm()
        found[name] = torch.stack([cosine, bias, variance / (u @ u) * forwards]).tolist()
    return found


if __name__ == "__main__":
    lines = []
    for kind in ("own", "shared"):
        models = [measure(kind, seed) for seed in range(MODELS)]
        for name in VARIANTS:
            cosine, bias, noise = zip(*(model[name] for model in models), strict=True)
            lines.append({
                "kind": kind, "variant": name, "models": MODELS, "cosine_mean": statistics.mean(cosine),
                "cosine_lowest": min(cosine), "bias": statistics.median(bias),
                "noise": statistics.median(noise)})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (ROOT / "results" / "gradients.jsonl").write_text(text)
    figures.gradients()
