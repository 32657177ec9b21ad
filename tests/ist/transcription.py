"""IST written down straight from its description, to compare with: no class, no file of the package."""

import itertools

import torch


def ist(model, scalings_of, batches, steps, seed=0, interval=10):
    """Yields, for each step, (update set, the suppress sets drawn before it, I after).

    `scalings_of[i]`: the dictionaries of scalings of layer i; `batches[n]`: the batch of estimate n.
    """
    layers = len(scalings_of)
    generator = torch.Generator().manual_seed(seed)
    unimportance = torch.zeros(layers)
    estimates = 0
    for step in range(steps):
        suppress_sets = []
        if step > 0 and step % interval == 0:
            size = max(1, int(0.5 * layers))
            possible = len(list(itertools.combinations(range(layers), size)))
            while len(suppress_sets) < min(3, possible):
                drawn = set(torch.multinomial(torch.sigmoid(unimportance), size, generator=generator).tolist())
                if drawn not in suppress_sets:
                    suppress_sets.append(drawn)
            rewards = []
            for chosen in suppress_sets:
                before = [dict(scaling) for i in chosen for scaling in scalings_of[i]]
                for i in chosen:
                    for scaling in scalings_of[i]:
                        for key in scaling:
                            scaling[key] *= 0.25
                model.eval()
                with torch.no_grad():
                    rewards.append(torch.exp(-model(**batches[estimates]).loss).item())
                model.train()
                for scaling, old in zip([s for i in chosen for s in scalings_of[i]], before):
                    scaling.update(old)
            mean = sum(rewards) / len(rewards)
            p = torch.sigmoid(unimportance)
            for chosen, reward in zip(suppress_sets, rewards):
                for i in chosen:
                    unimportance[i] += 10 * (reward - mean) * p[i] * (1 - p[i])
            estimates += 1
        update = torch.multinomial(torch.sigmoid(-unimportance), max(1, int(0.25 * layers)), generator=generator)
        yield set(update.tolist()), suppress_sets, unimportance.clone()
