"""Float64 transcriptions of the papers and of PyTorch's documented algorithms, most of one leaf at a time.

`rule(...)` returns a function (gradient, weight) → update that keeps its own state; `torch_*` and `keller_*`
return a function (gradient, weight) → new weight, the form in which those are published. Nothing here knows
JAX or optimorph.
"""

import numpy as np


def chain(*rules):
    """One rule after the other."""

    def step(g, w):
        for rule in rules:
            g = rule(g, w)
        return g

    return step


def momentum(beta, nesterov=False):
    v = 0.0

    def step(g, w):
        nonlocal v
        v = beta * v + g
        return g + beta * v if nesterov else v

    return step


def dampen(tau):
    t = 0

    def step(g, w):
        nonlocal t
        t += 1
        return g if t == 1 else (1 - tau) * g

    return step


def ema(beta, nesterov=False, initial=0.0, lookahead=None):
    m = initial

    def step(g, w):
        nonlocal m
        ahead = None if lookahead is None else lookahead * m + (1 - lookahead) * g
        m = beta * m + (1 - beta) * g
        return ahead if lookahead is not None else beta * m + (1 - beta) * g if nesterov else m

    return step


def slow_ema(beta, alpha=1.0):
    m, t = 0.0, 0

    def step(g, w):
        nonlocal m, t
        b, a = (x(t) if callable(x) else x for x in (beta, alpha))
        t += 1
        m = b * m + (1 - b) * g
        return a * m

    return step


def extrapolate(gamma, beta):
    before = 0.0

    def step(g, w):
        nonlocal before
        u, before = g + gamma * beta / (1 - beta) * (g - before), g
        return u

    return step


def clip_norm(bound):
    return lambda g, w: g * min(1, bound / (np.sqrt(np.sum(np.abs(g) ** 2)) or 1))


def clip_rms(bound):
    return lambda g, w: g * min(1, bound / (np.sqrt(np.mean(np.abs(g) ** 2)) or 1))


def cautious(rule):
    def step(g, w):
        u = rule(g, w)
        agree = np.real(u * np.conj(g)) > 0
        return u * agree / max(np.mean(agree), 1e-3)

    return step


def square():
    return lambda g, w: np.abs(g) ** 2


def accumulate(initial=0.0):
    s = initial

    def step(g, w):
        nonlocal s
        s = s + g
        return s

    return step


def debias(beta, ahead=0, power=1):
    t = 0

    def step(g, w):
        nonlocal t
        t += 1
        return g / (1 - beta ** (t + ahead)) ** power

    return step


def clip_by_global_norm(max_norm):
    """Of a tree."""

    def step(g, w):
        norm = np.sqrt(sum(np.sum(np.abs(x) ** 2) for x in g.values()))
        return {name: x * min(1, max_norm / norm) for name, x in g.items()}

    return step


def skip_nonfinite(rule):
    return lambda g, w: rule(g, w) if np.all(np.isfinite(g)) else 0 * w


def with_a_nan(rule, every):
    """What a rule makes of gradients of which each `every`th is NaN."""
    t = 0

    def step(g, w):
        nonlocal t
        t += 1
        return rule(g if t % every else np.nan * g, w)

    return step


def root(eps=0.0, eps_root=0.0):
    return lambda g, w: np.sqrt(g + eps_root) + eps


def add_decayed_weights(rate, cautious=False):
    t = 0

    def step(g, w):
        nonlocal t
        r = rate(t) if callable(rate) else rate
        t += 1
        return g + r * (aligned(g, w) if cautious else w)

    return step


def aligned(g, w):
    """The weights that a step against g makes smaller; of the others, nothing."""
    return np.where(np.real(g * np.conj(w)) >= 0, w, 0)


def multi_steps(rule, k, weights=(1.0,), flushed=(), by_maximum=lambda g: False):
    total, largest, weight, n, steps, t = 0.0, None, 0.0, 0, 0, 0

    def step(g, w):
        nonlocal total, largest, weight, n, steps, t
        each, flush, t = weights[t % len(weights)], t % len(weights) in flushed, t + 1
        if each > 0 and np.all(np.isfinite(g)):
            total, weight = total + each * g, weight + each
            largest = g if largest is None else np.maximum(largest, g)
        n += each == 0 or bool(np.all(np.isfinite(g)))
        if weight == 0 or not (flush or n >= (k(steps) if callable(k) else k)):
            return 0 * w
        found = largest if by_maximum(g) else total / weight
        total, largest, weight, n, steps = 0.0, None, 0.0, 0, steps + 1
        return rule(found, w)

    return step


def scale_by_learning_rate(rate):
    t = 0

    def step(g, w):
        nonlocal t
        r = rate(t) if callable(rate) else rate
        t += 1
        return -r * g

    return step


def sgd(lr, beta=None, nesterov=False, tau=None, l2=0.0):
    velocity = momentum(beta, nesterov) if beta is not None else lambda g, w: g
    shrink = dampen(tau) if tau is not None else lambda g, w: g

    return lambda g, w: -lr * velocity(shrink(g + l2 * w, w), w)


def adagrad(lr, initial, eps, inside=True, l2=0.0):
    s = initial

    def step(g, w):
        nonlocal s
        g = g + l2 * w
        s = s + np.abs(g) ** 2
        return -lr * g / (np.sqrt(s + eps) if inside else np.sqrt(s) + eps)

    return step


def rmsprop(
    lr, beta, eps, initial=0.0, inside=True, centered=False, mu=None, nesterov=False, correct=False, l2=0.0
):
    n, m, t, v = initial, 0.0, 0, 0.0

    def step(g, w):
        nonlocal n, m, t, v
        t += 1
        g = g + l2 * w
        n = beta * n + (1 - beta) * np.abs(g) ** 2
        m = beta * m + (1 - beta) * g
        c = 1 - beta**t if correct else 1.0
        spread = n / c - np.abs(m / c) ** 2 if centered else n / c
        u = -lr * g / (np.sqrt(spread + eps) if inside else np.sqrt(spread) + eps)
        if mu is None:
            return u
        v = mu * v + u
        return u + mu * v if nesterov else v

    return step


def descent(lr, decay, form):
    """From a direction and a weight, the step, with Loshchilov & Hutter's decay in one of its forms."""
    if form == "corrected":
        return corrected(lr, decay)
    if form == "independent":
        return lambda u, w: -lr * u - decay * w
    return lambda u, w: -lr * (u + decay * (aligned(u, w) if form == "cautious" else w))


def corrected(lr, decay):
    """AdamC's step, whose decay is λ η² over the highest η so far."""
    t, highest = 0, 0.0

    def step(u, w):
        nonlocal t, highest
        rate = lr(t) if callable(lr) else lr
        t, highest = t + 1, max(highest, rate)
        return -rate * u - (decay * rate**2 / highest * w if highest else 0)

    return step


def adam(lr, b1, b2, eps, eps_root=0.0, l2=0.0, decay=0.0, nesterov=False, form="coupled"):
    m, v, t, down = 0.0, 0.0, 0, descent(lr, decay, form)

    def step(g, w):
        nonlocal m, v, t
        t += 1
        g = g + l2 * w
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * np.abs(g) ** 2
        average = m / (1 - b1**t)
        if nesterov:  # Dozat, algorithm 2
            average = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        return down(average / (np.sqrt(v / (1 - b2**t) + eps_root) + eps), w)

    return step


def ademamix(lr, b1, b2, b3, alpha, eps, eps_root=0.0, decay=0.0, form="coupled"):
    m1, m2, v, t = 0.0, 0.0, 0.0, 0

    def step(g, w):
        nonlocal m1, m2, v, t
        b, a = (x(t) if callable(x) else x for x in (b3, alpha))
        t += 1
        m1 = b1 * m1 + (1 - b1) * g
        m2 = b * m2 + (1 - b) * g
        v = b2 * v + (1 - b2) * np.abs(g) ** 2
        root = np.sqrt(v / (1 - b2**t) + eps_root) + eps
        return descent(lr, decay, form)((m1 / (1 - b1**t) + a * m2) / root, w)

    return step


def mars_adamw(
    lr, b1=0.95, b2=0.99, eps=1e-8, eps_root=0.0, decay=0.0, gamma=0.025, bound=1.0, form="coupled"
):
    before, adamw = 0.0, adam(lr, b1, b2, eps, eps_root, decay=decay, form=form)

    def step(g, w):
        nonlocal before
        c, before = g + gamma * b1 / (1 - b1) * (g - before), g
        norm = np.sqrt(np.sum(np.abs(c) ** 2))
        return adamw(c * bound / norm if norm > bound else c, w)

    return step


def sign():
    return lambda g, w: np.sign(g)


def lion(lr, b1, b2, decay=0.0, form="coupled"):
    m = 0.0

    def step(g, w):
        nonlocal m
        u = np.sign((1 - b1) * g + b1 * m)
        m = b2 * m + (1 - b2) * g
        return descent(lr, decay, form)(u, w)

    return step


def laprop(lr, b1, b2, eps, eps_root=0.0, decay=0.0, form="coupled"):
    n, v, t = 0.0, 0.0, 0

    def step(g, w):
        nonlocal n, v, t
        t += 1
        v = b2 * v + (1 - b2) * np.abs(g) ** 2
        n = b1 * n + (1 - b1) * g / (np.sqrt(v / (1 - b2**t) + eps_root) + eps)
        return descent(lr, decay, form)(n / (1 - b1**t), w)

    return step


def hyperball(lr):
    """The update that ends on the sphere; of a weight of zeros the plain step."""

    def step(u, w):
        radius, length = np.linalg.norm(w), np.linalg.norm(u)
        if radius == 0 or length == 0:
            return -lr * u
        x = w - lr * radius * u / length
        return radius * x / np.linalg.norm(x) - w

    return step


def adamh(lr, b1=0.9, b2=0.95, eps=1e-8, eps_root=0.0):
    return chain(adam(-1.0, b1, b2, eps, eps_root), hyperball(lr))


def muonh(lr, beta=0.95, nesterov=True, rows=None):
    return chain(muon(-1.0, beta, nesterov, rows=rows or EXPRESS, scale=None), hyperball(lr))


def levanter_hyperball(direction, lr):
    """A direction of ascent as levanter's MuonH and AdamH take it."""

    def step(g, w):
        u, radius = direction(g, w), np.sqrt(np.sum(w**2))
        x = w - lr * radius * u / max(np.sqrt(np.sum(u**2)), 1e-10)
        return x * radius / max(np.sqrt(np.sum(x**2)), 1e-10)

    return step


def levanter_muonh(lr, momentum=0.95, rows=None):
    """The velocity is a sum; weights are (out, in)."""
    m = 0.0

    def direction(g, w):
        nonlocal m
        m = momentum * m + g
        return on_singular_values(momentum * m + g, rows or EXPRESS)

    return levanter_hyperball(direction, lr)


def published_laprop(lr, b1=0.9, b2=0.999, eps=1e-15, weight_decay=0.0):
    """The average holds lr g / √v and is corrected by the average of lr; weights decay after the step."""
    m, v, rates, weights = 0.0, 0.0, 0.0, 0.0

    def step(g, w):
        nonlocal m, v, rates, weights
        v = b2 * v + (1 - b2) * g**2
        weights = b2 * weights + (1 - b2)
        m = b1 * m + (1 - b1) * lr * g / (np.sqrt(v / weights) + eps)
        rates = b1 * rates + (1 - b1) * lr
        return (1 - weight_decay) * (w - m / (rates / lr))

    return step


def published_ademamix(
    lr,
    betas=(0.9, 0.999, 0.9999),
    alpha=2.0,
    beta3_warmup=0,
    alpha_warmup=0,
    weight_decay=0.0,
    eps=1e-8,
):
    """Steps count from 1, and β₃ starts from β₁ in half-lives."""
    b1, b2, last = betas
    fast, slow, square, t = 0.0, 0.0, 0.0, 0

    def f(beta):
        return np.log(0.5) / np.log(beta + 1e-8) - 1

    def step(g, w):
        nonlocal fast, slow, square, t
        t += 1
        a, b3 = alpha, last
        if t < alpha_warmup:
            a = t / alpha_warmup * alpha
        if t < beta3_warmup:
            share = t / beta3_warmup
            b3 = 0.5 ** (1 / ((1 - share) * f(b1) + share * f(last) + 1))
        fast = b1 * fast + (1 - b1) * g
        slow = b3 * slow + (1 - b3) * g
        square = b2 * square + (1 - b2) * g**2
        root = np.sqrt(square) / np.sqrt(1 - b2**t) + eps
        return w - lr * ((fast / (1 - b1**t) + a * slow) / root + weight_decay * w)

    return step


def published_mars(lr=3e-3, betas=(0.95, 0.99), eps=1e-8, weight_decay=0.0, gamma=0.025):
    """Of a matrix."""
    b1, b2 = betas
    last, m, v, t = 0.0, 0.0, 0.0, 0

    def step(g, w):
        nonlocal last, m, v, t
        t += 1
        c, last = (g - last) * (gamma * (b1 / (1 - b1))) + g, g
        norm = np.linalg.norm(c)
        c = c / norm if norm > 1 else c
        m = b1 * m + (1 - b1) * c
        v = b2 * v + (1 - b2) * c**2
        root = (np.sqrt(v) / np.sqrt(1 - b2**t) + eps) * (1 - b1**t)
        return w - lr * (weight_decay * w + m / root)

    return step


def published_lion(lr, b1=0.9, b2=0.99, weight_decay=0.0):
    """The decay comes first."""
    m = 0.0

    def step(g, w):
        nonlocal m
        w = w * (1 - lr * weight_decay)
        w = w - lr * np.sign(m * b1 + g * (1 - b1))
        m = m * b2 + g * (1 - b2)
        return w

    return step


JORDAN = [(3.4445, -4.7750, 2.0315)] * 5
EXPRESS = [
    (8.28721201814563 / 1.02, -23.595886519098837 / 1.02**3, 17.300387312530933 / 1.02**5),
    (4.107059111542203 / 1.02, -2.9478499167379106 / 1.02**3, 0.5448431082926601 / 1.02**5),
    (3.9486908534822946 / 1.02, -2.908902115962949 / 1.02**3, 0.5518191394370137 / 1.02**5),
    (3.3184196573706015 / 1.02, -2.488488024314874 / 1.02**3, 0.51004894012372 / 1.02**5),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]


def cubics(low, steps):
    """The cubics a σ - b σ³ with p(l) = p(u) = 2 - max p, each on what the one before leaves of [l, 1]."""
    rows, high = [], 1.0
    for step in range(1, steps + 1):
        squares = high**2 + high * low + low**2
        b = 2 / (squares * low - low**3 + 2 * (squares / 3) ** 1.5)
        room = 1.02 if step < steps else 1.0
        rows.append((b * squares / room, -b / room**3, 0.0))
        low = b * (squares * low - low**3)
        high = 2 - low
    return rows


def on_singular_values(x, rows):
    """The odd quintics, applied where they act: to the singular values of x / ‖x‖F."""
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    norm = np.sqrt(np.sum(s**2))
    s = s / (norm if norm else 1.0)
    for a, b, c in rows:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vh


def orthogonalize(rows=EXPRESS):
    return lambda g, w: on_singular_values(g, rows)


SHAPES = {
    "rms_to_rms": lambda fan_in, fan_out: np.sqrt(fan_out / fan_in),
    "keller": lambda fan_in, fan_out: np.sqrt(max(1.0, fan_out / fan_in)),
    "adamw_rms": lambda fan_in, fan_out: 0.2 * np.sqrt(max(fan_in, fan_out)),
    None: lambda fan_in, fan_out: 1.0,
}


def by_columns(rule, ends):
    """A rule of a matrix for each block of its columns; `ends` is of their number."""

    def step(g, w):
        blocks = zip(*(np.split(x, ends(g.shape[1]), axis=1) for x in (g, w)), strict=True)
        return np.concatenate([rule(*pair) for pair in blocks], axis=1)

    return step


def scale_by_shape(name):
    """For a matrix stored (in, out)."""
    return lambda g, w: SHAPES[name](*g.shape) * g


def muon(lr, beta=0.95, nesterov=True, decay=0.0, rows=EXPRESS, scale="rms_to_rms", form="coupled"):
    """For a matrix stored (in, out)."""
    return of_matrix(lr, ema(beta, nesterov), None, decay, rows, scale, form)


def of_matrix(lr, average, adapt=None, decay=0.0, rows=EXPRESS, scale="keller", form="coupled"):
    """From a rule of gradients and one of polar factors, a step of a matrix stored (in, out)."""
    down = descent(lr, decay, form)

    def step(g, w):
        factor = on_singular_values(average(g, w), rows)
        return down(SHAPES[scale](*g.shape) * (adapt(factor, w) if adapt else factor), w)

    return step


def mean(over, rule=None):
    """Of a matrix stored (in, out)."""
    rule = rule or (lambda g, w: g)
    axis = {"i": 0, "o": 1, "io": (0, 1)}[over]
    return lambda g, w: rule(np.mean(g, axis, keepdims=True), None) + 0 * g


def with_norm(u, norm):
    return u * norm / (np.linalg.norm(u) or 1.0)


def keep_norm(rule):
    def step(g, w):
        u = rule(g, w)
        return with_norm(u, np.linalg.norm(g))

    return step


def normuon(lr, beta=0.95, b2=0.95, eps=1e-10, shorter=False, nesterov=True, **kwargs):
    """The second moments of the outputs, or with `shorter` of the longer side."""
    average = ema(b2)

    def adapt(o, w):
        axis = 1 if shorter and o.shape[0] > o.shape[1] else 0
        v = average(np.mean(o**2, axis=axis, keepdims=True), w)
        return o / (np.sqrt(np.maximum(v, eps)) if shorter else np.sqrt(v) + eps)

    return of_matrix(lr, ema(beta, nesterov), keep_norm(adapt), **kwargs)


def adamuon(lr, beta=0.95, b2=0.95, eps=1e-8, nesterov=True, scale="adamw_rms", **kwargs):
    v = ema(b2)

    def adapt(o, w):
        return with_norm(o / (np.sqrt(v(o**2, w)) + eps), np.sqrt(min(o.shape)))

    return of_matrix(lr, chain(ema(beta, nesterov), sign()), adapt, scale=scale, **kwargs)


def muon2(lr, beta=0.95, b2=0.95, eps=1e-10, nesterov=True, **kwargs):
    m, v = ema(beta, nesterov), ema(b2)
    return of_matrix(lr, lambda g, w: m(g, w) / (np.sqrt(v(g**2, w)) + eps), **kwargs)


LMOS = {
    "spectral": lambda m, rows: np.sqrt(m.shape[1] / m.shape[0]) * on_singular_values(m, rows),
    "sign": lambda m, rows: np.sign(m) / m.shape[0],
    "row": lambda m, rows: m / (np.sqrt(np.mean(m**2, 0, keepdims=True)) + 1e-8) / m.shape[0],
    "column": lambda m, rows: m / (np.sqrt(np.mean(m**2, 1, keepdims=True)) + 1e-8) / m.shape[0],
    "rms": lambda m, rows: m / (np.sqrt(np.mean(m**2)) + 1e-8),
}
"""Of a matrix stored (in, out), or of any leaf."""


def scion(lr, beta=0.9, norm="spectral", radius=50.0, decay=1.0, form="coupled", rows=EXPRESS):
    average, down = ema(beta), descent(lr, decay, form)
    return lambda g, w: down(radius * LMOS[norm](average(g, w), rows), w)


# PyTorch and Keller Jordan, as published: they change the weight in place.


def torch_sgd(lr, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0):
    buffer = None

    def step(g, w):
        nonlocal buffer
        g = g + weight_decay * w
        if momentum != 0:
            buffer = g.copy() if buffer is None else momentum * buffer + (1 - dampening) * g
            g = g + momentum * buffer if nesterov else buffer
        return w - lr * g

    return step


def torch_adagrad(lr, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10):
    total = initial_accumulator_value

    def step(g, w):
        nonlocal total
        g = g + weight_decay * w
        total = total + g**2
        return w - lr * g / (np.sqrt(total) + eps)

    return step


def torch_rmsprop(lr, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False):
    v, average, buffer = 0.0, 0.0, 0.0

    def step(g, w):
        nonlocal v, average, buffer
        g = g + weight_decay * w
        v = alpha * v + (1 - alpha) * g**2
        spread = v
        if centered:
            average = average * alpha + (1 - alpha) * g
            spread = v - average**2
        if momentum > 0:
            buffer = momentum * buffer + g / (np.sqrt(spread) + eps)
            return w - lr * buffer
        return w - lr * g / (np.sqrt(spread) + eps)

    return step


def torch_adam(lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False):
    m, v, t = 0.0, 0.0, 0

    def step(g, w):
        nonlocal m, v, t
        t += 1
        if decoupled:
            w = w - lr * weight_decay * w
        else:
            g = g + weight_decay * w
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        first = m / (1 - betas[0] ** t)
        second = v / (1 - betas[1] ** t)
        return w - lr * first / (np.sqrt(second) + eps)

    return step


def torch_muon(lr, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="original"):
    """For a matrix stored (out, in)."""
    buffer = 0.0

    def step(g, w):
        nonlocal buffer
        buffer = momentum * buffer + (1 - momentum) * g
        update = (1 - momentum) * g + momentum * buffer if nesterov else buffer
        update = newton_schulz(update, JORDAN, floor=1e-7)
        rows, columns = w.shape
        ratio = (
            np.sqrt(max(1.0, rows / columns))
            if adjust_lr_fn == "original"
            else 0.2 * np.sqrt(max(rows, columns))
        )
        w = w * (1 - lr * weight_decay)
        return w - lr * ratio * update

    return step


def keller_muon(lr, weight_decay=0.0, momentum=0.95):
    """For a matrix stored (out, in)."""
    buffer = 0.0

    def step(g, w):
        nonlocal buffer
        buffer = momentum * buffer + (1 - momentum) * g
        update = (1 - momentum) * g + momentum * buffer
        update = newton_schulz(update, JORDAN, add=1e-7)
        update = update * max(1.0, w.shape[0] / w.shape[1]) ** 0.5
        return w * (1 - lr * weight_decay) - lr * update

    return step


def published_normuon(lr=0.02, weight_decay=0.0, momentum=0.95, beta2=0.95, shorter=False):
    """For a matrix stored (out, in): the paper's program, or the one of modded-nanogpt."""
    m = v = 0.0

    def step(g, w):
        nonlocal m, v
        m = m + (1 - momentum) * (g - m)
        u = newton_schulz(g + momentum * (m - g), EXPRESS)
        rows, columns = w.shape
        before = np.linalg.norm(u)
        mean = np.mean(u * u, axis=0 if shorter and rows < columns else 1, keepdims=True)
        v = v + (1 - beta2) * (mean - v)
        u = u / np.sqrt(np.maximum(v, 1e-10)) if shorter else u / (np.sqrt(v) + 1e-10)
        u = u * before / (np.linalg.norm(u) + 1e-10) * max(1, rows / columns) ** 0.5
        return w * (1 - lr * weight_decay) - lr * u

    return step


def published_adamuon(lr=0.02, weight_decay=0.01, momentum=0.95, eps=1e-8):
    """For a matrix stored (out, in)."""
    m = v = 0.0

    def step(g, w):
        nonlocal m, v
        m = m + (1 - momentum) * (g - m)
        u = newton_schulz(np.sign(g + momentum * (m - g)), EXPRESS)
        v = v * momentum + (1 - momentum) * u * u
        u = u / (np.sqrt(v) + eps)
        u = u * 0.2 * (min(w.shape) * max(w.shape)) ** 0.5 / (np.linalg.norm(u) + eps)
        return w * (1 - lr * weight_decay) - lr * u

    return step


def published_scion(lr, norm, momentum=0.1, scale=1.0):
    """For a matrix stored (out, in), or a bias."""
    d = 0.0

    def lmo(g):
        if norm == "Spectral":
            return newton_schulz(g, EXPRESS) * (g.shape[0] / g.shape[1]) ** 0.5
        if norm == "Sign":
            return np.sign(g) / g.shape[1]
        if norm == "RowNorm":
            return g / (np.sqrt(np.sum(g**2, axis=-1, keepdims=True)) * np.sqrt(g.shape[1]) + 1e-8)
        if norm == "ColNorm":
            rms = np.sqrt(np.sum(g**2, axis=0, keepdims=True)) / np.sqrt(g.shape[0])
            return g / (rms * g.shape[1] + 1e-8)
        return g / (np.sqrt(np.mean(g**2)) + 1e-8)

    def step(g, w):
        nonlocal d
        d = (1 - momentum) * d + momentum * g
        return w * (1 - lr) - lr * scale * lmo(d)

    return step


def published_muon2(lr, weight_decay=0.0125, mu=0.95, beta2=0.95):
    """For a matrix stored (out, in)."""
    m = v = 0.0

    def step(g, w):
        nonlocal m, v
        m = m + (1 - mu) * (g - m)
        v = v + (1 - beta2) * (g * g - v)
        u = newton_schulz((g + mu * (m - g)) / (np.sqrt(v) + 1e-10), EXPRESS)
        u = u * max(1, w.shape[0] / w.shape[1]) ** 0.5
        return w * (1 - lr * weight_decay) - lr * u

    return step


def newton_schulz(g, rows, floor=0.0, add=0.0):
    """By matrix products, as published."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (max(np.linalg.norm(x), floor) + add)
    for a, b, c in rows:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def orthogonal_iteration(p, q, sort, steps=1):
    """Bases nearer to the eigenvectors of P, and the order of the columns before."""
    order = np.arange(len(p))
    p = p / (np.trace(p) / len(p) or 1.0)
    for _ in range(steps):
        by = np.argsort(-np.diag(q.T @ p @ q), kind="stable") if sort else np.arange(len(p))
        q, order = q[:, by], order[by]
        q = np.linalg.qr(p @ q + np.finfo(float).eps ** (2 / 3) * q)[0]
    return q, order


class Factors:
    """L and R of the official SOAP and KL-SOAP, and their eigenbases; a side above `max_dim` has none."""

    def __init__(
        self, beta, every, max_dim=np.inf, kl=False, sort=True, whole_first=False, clamp=None, warmup=1
    ):
        self.beta, self.every, self.max_dim, self.warmup = beta, every, max_dim, warmup
        self.kl, self.sort, self.whole_first, self.clamp = kl, sort and not kl, whole_first, clamp
        self.steps = -1

    def start(self, g):
        """The factors of the first gradient, and their bases from the identity."""
        self.steps, weight = 0, 1.0 if self.whole_first else 1 - self.beta
        n, m = g.shape
        self.factors = [weight * g @ g.T / (m if self.kl else 1), weight * g.T @ g / (n if self.kl else 1)]
        self.bases, self.values = [], []
        for p in self.factors:
            has_basis, q = len(p) <= self.max_dim, np.eye(len(p))
            self.bases.append(orthogonal_iteration(p, q, self.sort, 2)[0] if has_basis else q)
            self.values.append(np.full(len(p), 0.1 if has_basis else 1.0))

    def into(self, x):
        return self.bases[0].T @ x @ self.bases[1]

    def back(self, x):
        return self.bases[0] @ x @ self.bases[1].T

    def update(self, g, m, v):
        """One more gradient, and at times another basis, in which m and v are returned."""
        self.steps += 1
        before, b = self.bases, self.beta
        n, width = g.shape
        seen = [g @ g.T, g.T @ g]
        if self.kl:
            ql, qr = (q / np.sqrt(x) for q, x in zip(self.bases, self.values, strict=True))
            seen = [g @ qr @ (g @ qr).T / width, g.T @ ql @ (g.T @ ql).T / n]
            p2 = self.into(g) ** 2
            means = [np.mean(p2 / self.values[1], axis=1), np.mean(p2.T / self.values[0], axis=1)]
            for k, size in enumerate((n, width)):
                if size <= self.max_dim:
                    clamp = self.clamp or max(10, min(size, 4000))
                    self.values[k] = np.maximum(b * self.values[k] + (1 - b) * means[k], clamp**-2.0)
        self.factors = [b * p + (1 - b) * new for p, new in zip(self.factors, seen, strict=True)]
        if self.steps % self.every and self.steps >= self.warmup:
            return m, v
        whole = before[0] @ m @ before[1].T
        for k, p in enumerate(self.factors):
            if len(p) <= self.max_dim:
                q, order = orthogonal_iteration(p, self.bases[k], self.sort)
                self.bases = [q if j == k else old for j, old in enumerate(self.bases)]
                v = np.take(v, order, axis=k)
        return self.into(whole), v


def soap(lr, b1=0.95, b2=0.95, eps=1e-8, decay=0.0, every=10, beta=None, correct=True, shampoo=None, **more):
    """Adam in the eigenbasis; with `kl` KL-SOAP, with `shampoo`, an exponent, Shampoo."""
    f = Factors(b2 if beta is None else beta, every, **more)
    m = v = t = 0

    def step(g, w):
        nonlocal m, v, t
        if f.steps < 0:
            f.start(g)
            return -lr * decay * w
        t += 1
        p = f.into(g)
        m, v = b1 * m + (1 - b1) * p, b2 * v + (1 - b2) * p**2
        if shampoo is not None:
            r = v / (1 - b2**t)
            product = r.mean(1, keepdims=True) * r.mean(0, keepdims=True)
            size = (product**0.25 if shampoo == 0.25 else np.sqrt(product / r.mean())) + eps
        else:
            size = (np.sqrt(v) + eps) / (np.sqrt(1 - b2**t) if correct else 1)
        u = f.back(m / (1 - b1**t if correct else 1) / size)
        m, v = f.update(g, m, v)
        return -lr * (u + decay * w)

    return step


def soap_muon(lr, mu=0.95, b2=0.9, eps=1e-12, every=1, decay=0.0, scale="keller", **factors):
    """The Nesterov average in the eigenbasis of the gradient's factors, over its root mean square."""
    f, momentum, v = Factors(b2, every, **factors), ema(mu, True), 0.0
    end = chain(orthogonalize(), scale_by_shape(scale))

    def step(g, w):
        nonlocal v
        u = momentum(g, w)
        if f.steps < 0:
            f.start(g)
        else:
            q = f.into(u)
            v = b2 * v + (1 - b2) * q**2
            u = f.back(q / (np.sqrt(v) + eps))
            _, v = f.update(g, 0 * u, v)
        return -lr * (end(u, w) + decay * w)

    return step


def factored(beta, geometric=False):
    """Adafactor's average of squares, of a matrix."""
    r = c = 0

    def step(g, w):
        nonlocal r, c
        r = beta * r + (1 - beta) * g.mean(1)
        c = beta * c + (1 - beta) * g.mean(0)
        return np.sqrt(np.outer(r, c)) if geometric else np.outer(r, c) / r.mean()

    return step
