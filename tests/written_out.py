"""The sums of the theory written out with numpy, image by image, for problems in fp64."""

import itertools
import math

import numpy as np
import torch
from crystals import box_images
from problems import Problem
from torch import Tensor


def crystals(x: Problem) -> list[slice]:
    """The atoms of each crystal of a problem."""
    return [slice(i, j) for i, j in itertools.pairwise(x.ptr.tolist())]


def written_out(x, radius: float = 8.0):
    """y, lse, alpha and beta of a problem, image by image, equations (2) to (7)."""
    k, w = x.basis.num, x.basis.width * x.basis.r_max / x.basis.num
    mu = np.arange(1, k + 1) * x.basis.r_max / k
    y, lse, alpha, beta = [], [], [], []
    for c, atoms in enumerate(crystals(x)):
        q, key, v, a = (t[atoms].numpy() for t in (x.q, x.k, x.v, x.decay))
        n, heads, _ = q.shape
        pair, _, d2 = box_images(x.positions[atoms], x.lattice[c], radius)
        i, j = pair // n, pair % n
        b = np.exp(-((np.sqrt(d2)[:, None] - mu) ** 2) / (2 * w**2))
        for row, h in itertools.product(range(n), range(heads)):
            mine = i == row
            s = key[j[mine], h] @ q[row, h] / math.sqrt(q.shape[2]) - a[row, h] * d2[mine]
            p = np.exp(s) / np.exp(s).sum()
            y.append(p @ (v[j[mine], h] + b[mine] @ x.edge_weight[h].numpy().T))
            lse.append(np.log(np.exp(s).sum()))
        for p, h in itertools.product(range(n * n), range(heads)):
            e = np.exp(-a[p // n, h] * d2[pair == p])
            alpha.append(np.log(e.sum()))
            beta.append((e / e.sum()) @ b[pair == p] @ x.edge_weight[h].numpy().T)
    return [torch.from_numpy(np.array(z)) for z in (y, lse, alpha, beta)]


def reciprocal_written_out(x: Problem) -> Tensor:
    """y of a problem whose decays are reciprocal ones, wave vector by wave vector, equation (13)."""
    y = []
    for c, atoms in enumerate(crystals(x)):
        lattice = x.lattice[c].numpy()
        vectors = 2 * math.pi * np.linalg.inv(lattice).T
        g = np.array(list(itertools.product(range(-12, 13), repeat=3))) @ vectors
        r = x.positions[atoms].numpy()
        for i, h in itertools.product(range(len(r)), range(x.q.shape[1])):
            decay = x.decay[atoms][i, h].item()
            total = (np.exp(-decay * (g**2).sum(1)) * np.exp(1j * (r - r[i]) @ g.T)).sum(1).real
            alpha = np.log(np.maximum(total, 1e-6)) + 1.5 * np.log(4 * math.pi * decay)
            alpha -= math.log(abs(np.linalg.det(lattice)))
            s = x.k[atoms][:, h].numpy() @ x.q[atoms][i, h].numpy() / math.sqrt(x.q.shape[2]) + alpha
            y.append(np.exp(s) / np.exp(s).sum() @ x.v[atoms][:, h].numpy())
    return torch.from_numpy(np.array(y))
