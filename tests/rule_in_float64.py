"""The update rule written out in numpy float64, block by block: what the package is compared with.

It shares nothing with the package: no code, no constants, no layout. The block loop follows the rule's nine steps.
"""

from __future__ import annotations

import numpy as np
import scipy.ndimage

BLOCK = 256

DEFAULTS = {
    "lr": 1e-2,
    "base": 1e-2,
    "min_lr": 1e-7,
    "max_lr": 1e-1,
    "auto_lr": False,
    "weight_decay": 5e-4,
    "warmup_steps": 500,
    "betas": (0.9, 0.99, 0.999),
    "eps": (1e-30, 1e-16),
    "clip_threshold": 1.0,
    "percentile_clipping": 100,
    "edge_suppression": True,
    "edge_penalty": 0.1,
    "edge_threshold": 0.6,
    "frequency_penalty": 0.05,
    "background_regularization": True,
    "spatial_awareness": True,
    "detail_preservation": 0.8,
    "lora": False,
    "lora_mask": False,
    "lora_rank_penalty": True,
    "rank_penalty_strength": 0.01,
    "low_rank_emphasis": 1.2,
    "lora_direction": None,
    "torque": True,
    "came": True,
    "cautious": True,
}


class ElementMeans:
    """v or r of element-wise storage: a running mean of `new + eps` for every element."""

    def __init__(self, shape: tuple[int, ...], beta: float, eps: float) -> None:
        self.beta, self.eps = beta, eps
        self.held = np.zeros(int(np.prod(shape)))

    def estimate(self, at: slice, new: np.ndarray, kept: np.ndarray, t: int) -> np.ndarray:
        moved = self.beta * self.held[at] + (1 - self.beta) * (new + self.eps)
        self.held[at] = np.where(kept, moved, self.held[at])
        return self.held[at] / (1 - self.beta**t)

    def finish_step(self, kept: np.ndarray) -> None:
        pass


class TileMeans:
    """v or r of factored storage: row and column means of each tile, told from every element's own indices."""

    def __init__(self, shape: tuple[int, ...], beta: float, eps: float) -> None:
        self.beta, self.eps = beta, eps
        i = np.arange(int(np.prod(shape)))
        columns = i.size // shape[0]
        width = {1: 8, 2: 8, 4: 8}.get(columns, columns if columns in (8, 16, 32, 64, 128, 256) else 256)
        strips, height = np.lcm(columns, BLOCK) // BLOCK, max(16, width // 2)
        block = i // BLOCK
        self.tile_of = block // strips // height * strips + block % strips
        self.row_of, self.col_of = i // width, self.tile_of * width + i % width
        self.row, self.col = np.zeros(self.row_of.max() + 1), np.zeros((self.tile_of.max() + 1) * width)
        self.seen = np.zeros(i.size)

    @staticmethod
    def _means(x: np.ndarray, of: np.ndarray, size: int) -> np.ndarray:
        return np.bincount(of, x, size) / np.maximum(np.bincount(of, minlength=size), 1)

    def held(self) -> np.ndarray:
        """The estimate of every element, flat."""
        tile_mean = self._means(self.col[self.col_of], self.tile_of, self.tile_of.max() + 1)[self.tile_of]
        product = self.row[self.row_of] * self.col[self.col_of]
        return np.divide(product, tile_mean, out=np.zeros_like(product), where=tile_mean > 0)

    def estimate(self, at: slice, new: np.ndarray, kept: np.ndarray, t: int) -> np.ndarray:
        old = self.held()[at]
        self.seen[at] = np.where(kept, new + self.eps, old)
        return np.where(kept, self.beta * old + (1 - self.beta) * (new + self.eps), old) / (1 - self.beta**t)

    def finish_step(self, kept: np.ndarray) -> None:
        touched_row = self._means(kept.astype(float), self.row_of, self.row.size) > 0
        touched_tile = self._means(kept.astype(float), self.tile_of, self.tile_of.max() + 1) > 0
        row, col = (
            self._means(self.seen, self.row_of, self.row.size),
            self._means(self.seen, self.col_of, self.col.size),
        )
        self.row = np.where(touched_row, self.beta * self.row + (1 - self.beta) * row, self.row)
        touched_col = np.repeat(touched_tile, self.col.size // touched_tile.size)
        self.col = np.where(touched_col, self.beta * self.col + (1 - self.beta) * col, self.col)


class RuleInFloat64:
    """One parameter and its state; `step(gradient)` moves both.

    `closest` is how near the last step came to a decision that rounding could turn: a threshold, a sign.
    """

    def __init__(self, theta: np.ndarray, factored: bool = False, mask: bool = True, **options) -> None:
        self.options = o = {**DEFAULTS, **options}
        assert set(o) == set(DEFAULTS), "an option that this rule does not know"
        self.shape, self.mask = theta.shape, mask and (o["lora_mask"] or not o["lora"])
        self.theta = theta.astype(np.float64).reshape(-1)
        n = self.theta.size
        self.slices = [slice(i, min(i + BLOCK, n)) for i in range(0, n, BLOCK)]
        means = TileMeans if factored else ElementMeans
        self.v, self.r = (means(self.shape, o["betas"][1 + i], o["eps"][i]) for i in (0, 1))
        self.m, self.k, self.sign = np.zeros(n), np.zeros(n), np.zeros(n)
        blocks = len(self.slices)
        self.s, self.h, self.sigma = np.zeros(blocks), np.zeros(blocks), np.ones(blocks)
        self.t, self.skipped, self.norms, self.mask_mean = 0, 0, [], 1.0
        self.d = self.d0 = o["lr"]
        self.num = self.agreement = 0.0
        self.claimed: dict[int, int] = {}
        self.noted: dict[int, tuple[int, np.ndarray]] = {}
        self.watched: dict[int, tuple[int, np.ndarray]] = {}
        self.distance = self.scatter = self.momentum = 0.0
        self.closest = np.inf

    def step(self, gradient: np.ndarray) -> None:
        self.t += 1
        self.closest = np.inf
        flat = gradient.astype(np.float64).reshape(-1)
        kept = np.isfinite(flat)
        self.skipped += int((~kept).sum())
        g = np.where(kept, flat, 0.0)
        g = g * self._percentile_scale(g)
        filtered = self._spatial_filter(g, kept)
        self.distance = self.scatter = self.momentum = 0.0
        claimed, self.claimed = self.claimed, {}
        parts = [self._moved_moments(b, at, filtered[at], kept[at]) for b, at in enumerate(self.slices)]
        n = self._turned(np.concatenate([part[0] for part in parts]))
        for (b, at), (_, u) in zip(enumerate(self.slices), parts, strict=True):
            self._move(b, at, g[at], u, n[at], kept[at], claimed)
        self.v.finish_step(kept)
        self.r.finish_step(kept)
        if self.mask and 2 <= self.t <= self.options["warmup_steps"] and (g != 0).any():
            self.mask_mean = np.mean(2 ** (self.k[g != 0] / 16))
        self._shrink_rank()
        self._find_rate()

    def _near(self, distances: np.ndarray) -> None:
        if distances.size:
            self.closest = min(self.closest, np.abs(distances).min())

    def _percentile_scale(self, g: np.ndarray) -> float:
        percentile = self.options["percentile_clipping"]
        if percentile == 100:
            return 1.0
        norm = np.sqrt((g**2).sum())
        self.norms = [*self.norms, norm][-100:]
        limit = np.percentile(self.norms, percentile, method="inverted_cdf")
        return limit / norm if norm > limit else 1.0

    def _spatial_filter(self, g: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Step 1."""
        o = self.options
        if len(self.shape) < 2 or self.shape[-1] <= 2 or self.shape[-2] <= 2:
            return g
        planes = g.reshape(-1, *self.shape[-2:])
        lap = np.stack([scipy.ndimage.laplace(plane, mode="nearest") for plane in planes]).reshape(-1)
        lap = np.where(kept & (g != 0), lap, 0.0)
        filtered = g + o["frequency_penalty"] / 8 * lap
        if not o["edge_suppression"]:
            return filtered
        for b, at in enumerate(self.slices):
            e = np.abs(lap[at]) / (np.sqrt(20) * np.sqrt((g[at] ** 2).mean()) + 1e-30)
            e = np.minimum(e, 32)
            self._near(e - o["edge_threshold"])
            e = np.where(e > o["edge_threshold"], e, 0.0)
            self.h[b] = 0.9 * self.h[b] + 0.1 * e.mean()
            filtered[at] *= np.clip(1 - o["edge_penalty"] * self.h[b] * e, 0.1, 1)
        return filtered

    def _moved_moments(self, b: int, at: slice, filtered, kept) -> tuple[np.ndarray, np.ndarray]:
        """Steps 2 to 4 and 6 for one block: n and u."""
        o, t = self.options, self.t
        beta1 = o["betas"][0]
        v_hat = self.v.estimate(at, filtered**2, kept, t)
        u = np.divide(filtered, np.sqrt(v_hat), out=np.zeros_like(filtered), where=kept)
        activity = (u**2).mean()
        u = u * min(1.0, o["clip_threshold"] / np.sqrt(activity)) if activity > 0 else u

        old = self.m[at].copy()
        damping = 1.0
        if o["torque"]:
            aligned = (old * u).sum() / np.sqrt((old**2).sum() * (u**2).sum() + 1e-30)
            self.s[b] = 0.9 * self.s[b] + 0.1 * aligned
            damping = 1 + np.clip((o["low_rank_emphasis"] if o["lora"] else 1.0) * self.s[b], -1, 1)
        m = np.where(kept, beta1 * old + (1 - beta1) * damping * u, old)
        self.m[at] = m

        n = m / (1 - beta1**t)
        if o["came"]:
            r_hat = self.r.estimate(at, (u - m) ** 2, kept, t)
            n = n / np.sqrt(np.maximum(r_hat, 0.01))
        if o["background_regularization"]:
            self._near(activity - 0.1)
            n = n / 2 if activity < 0.1 else n
        return n, u

    def _is_turned(self) -> bool:
        o = self.options
        return bool(o["lora_direction"] and o["lora"] and len(self.shape) == 2 and min(self.shape) <= 256)

    def _turned(self, n: np.ndarray) -> np.ndarray:
        """`lora_direction`: singular values through Muon's polynomial and Newton-Schulz's, the rms as it was."""
        if not self._is_turned() or not n.any():
            return n
        left, values, right = np.linalg.svd(n.reshape(self.shape), full_matrices=False)
        x = values / np.sqrt((values**2).sum())
        for i in range(8):
            x = 3.4445 * x - 4.775 * x**3 + 2.0315 * x**5 if i < 5 else 1.5 * x - 0.5 * x**3
        turned = (left * x) @ right
        return (turned * np.sqrt((n**2).sum() / (turned**2).sum())).reshape(-1)

    def _move(self, b: int, at: slice, g, u, n, kept, claimed) -> None:
        """Steps 5, 7 and 8 for one block."""
        o = self.options
        if o["cautious"]:
            self._near(n[(g != 0) & (n != 0)])
            phi = (n * np.sign(g) > 0).astype(float)
            n = n * phi / max(phi.sum() / max((g != 0).sum(), 1), 0.25)
        rate = self._element_rates(b, at, g, u)
        self._watch(b, at, g, u, self.m[at], claimed)
        moved = self.theta[at] - rate * (n + o["weight_decay"] * self.theta[at])
        self.theta[at] = np.where(kept, moved, self.theta[at])

    def _element_rates(self, b: int, at: slice, g, u) -> np.ndarray:
        """Step 7: an element without a gradient learns nothing, and a bound on the wrong side of the mean is none."""
        o = self.options
        if self.mask and self.t <= o["warmup_steps"]:
            self.sigma[b] = 0.9 * self.sigma[b] + 0.1 * np.var(u)
            f = np.clip(o["detail_preservation"] * self.sigma[b], 0.5, 1.5) if o["spatial_awareness"] else 1.0
            if self.t >= 2:  # with the last sign, of which there is none yet before the first gradient
                self.k[at] = np.clip(self.k[at] + f * np.sign(g) * self.sign[at], -32, 31)
            self.sign[at] = np.where(g != 0, np.sign(g), self.sign[at])
        mean, schedule = self._mean_rate(), self._relative_rate()
        low, high = o["min_lr"] * schedule, 10 * mean if o["max_lr"] is None else o["max_lr"] * schedule
        rates = mean * 2 ** (self.k[at] / 16) / self.mask_mean
        rates = np.maximum(rates, low) if low <= mean else rates
        return np.minimum(rates, high) if high >= mean else rates

    def _watch(self, b: int, at: slice, g, u, m, claimed: dict[int, int]) -> None:
        """What auto_lr sums up: of every 32 blocks the first that had a gradient.

        A block is chosen in one step, its weights are noted in the next, and from the one after that it is watched.
        """
        span = b // 32
        if span in self.watched:
            if self.watched[span][0] == b:
                distances = u * (self.watched[span][1] - self.theta[at])
                self.distance += distances.sum() * (0.5 if self._is_turned() else 1)
                self.scatter += np.abs(distances).sum()
                self.momentum += max(np.abs(m).sum(), 0.1 * (g != 0).sum())
        elif span in claimed:
            if claimed[span] == b:
                self.noted[span] = (b, self.theta[at].copy())
        elif (g != 0).any():
            self.claimed.setdefault(span, b)

    def _find_rate(self) -> None:
        """The estimate that follows this step; the next step uses it."""
        o = self.options
        if self.momentum > 0:
            if self.scatter > 0:
                self._near(np.array([self.distance / self.scatter]))
            beta1 = o["betas"][0]
            self.num = beta1 * self.num + (1 - beta1) * self.distance
            self.agreement = 0.99 * self.agreement + 0.01 * np.sign(self.distance)
            error = np.sqrt((1 - 0.99 ** (2 * self.t)) * 0.01 / 1.99)
            trust = max(1 - 3.5 * error / self.agreement, 0) if self.agreement > 0 else 0.0
            found = 8 / np.sqrt(1 + self.t / 100) * max(self.num, 0) * trust / self.momentum
            if o["auto_lr"]:
                self.d = np.clip(min(max(self.d, found), 1.1 * self.d), o["min_lr"], o["max_lr"] or np.inf)
        self.watched |= self.noted
        self.noted = {}

    def _mean_rate(self) -> float:
        return self.d * self._relative_rate() if self.options["auto_lr"] else self.options["lr"]

    def _relative_rate(self) -> float:
        return self.options["lr"] / self.options["base"]

    def _shrink_rank(self) -> None:
        """Step 9."""
        o = self.options
        wanted = o["lora"] and o["lora_rank_penalty"] and len(self.shape) == 2 and min(self.shape) <= 256
        if not wanted or self.t % 10:
            return
        rate = self._mean_rate()
        left, values, right = np.linalg.svd(self.theta.reshape(self.shape), full_matrices=False)
        values = np.maximum(values - 10 * rate * o["rank_penalty_strength"], 0)
        self.theta = ((left * values) @ right).reshape(-1)
