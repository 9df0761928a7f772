"""Data and starting points as NumPy arrays from fixed seeds, the same for JAX and for PyTorch."""

import numpy as np

__all__ = ["logistic_optimum", "network", "teacher_batches", "tutorial", "w2_sizes"]


def network(sizes, seed=0):
    """He-initialised weights and zero biases, `[(W, b), …]`, float32."""
    rng = np.random.default_rng(seed)
    shapes = list(zip(sizes[:-1], sizes[1:], strict=True))
    return [
        (np.float32(np.sqrt(2 / a)) * rng.standard_normal((a, b), np.float32), np.zeros(b, "f4"))
        for a, b in shapes
    ]


def teacher_batches(shape, features, classes, seed):
    """Gaussian inputs (*shape, features) and the labels of a noisy linear teacher."""
    rng = np.random.default_rng(seed)
    teacher = np.random.default_rng(99).standard_normal((features, classes), np.float32)
    x = rng.standard_normal((*shape, features), np.float32)
    noise = rng.standard_normal((*shape, classes), np.float32)
    scores = x @ teacher + 0.5 * np.sqrt(features) * noise
    return x, scores.argmax(-1).astype(np.int32)


def w2_sizes(net, small=False):
    """`(layer sizes, batch, validation examples, steps)` of the two networks of W2.

    "params": parameters outweigh activations; "acts": the other way round.
    """
    if small:
        return [8, 6, 4], 5, 7, 6
    if net == "params":
        return [784, 256, 256, 10], 128, 1024, 100
    return [64] * 9 + [10], 1024, 1024, 100


def w2(net, small=False):
    """`(weights, (x, y) of T batches, (x, y) of one validation batch)`."""
    sizes, batch, judges, steps = w2_sizes(net, small)
    train = teacher_batches((steps, batch), sizes[0], sizes[-1], 1)
    return network(sizes), train, teacher_batches((judges,), sizes[0], sizes[-1], 2)


def tutorial(episodes, steps, batch):
    """W1: `(train set, validation set, train rows, validation rows, weights)`, labels one-hot."""
    rng = np.random.default_rng(0)
    centres = 2 * rng.standard_normal((5, 10))

    def sample(n, noise):
        y = rng.integers(0, 5, n)
        x = centres[y] + 0.5 * rng.standard_normal((n, 10))
        y = np.where(rng.random(n) < noise, rng.integers(0, 5, n), y)
        return x.astype("f4"), np.eye(5, dtype="f4")[y]

    train, val = sample(500, 0.2), sample(200, 0.0)
    rows = [rng.integers(0, n, (episodes, steps, batch), dtype=np.int32) for n in (500, 200)]
    (w1, b1), (w2, b2) = network([10, 32, 5])
    return train, val, *rows, {"w1": w1, "b1": b1, "w2": w2, "b2": b2}


# -- W3: logistic regression with one log penalty per feature, solved in float64 ----------------


def logistic_optimum(examples=2000, features=784, classes=10, judges=1000):
    """The data, the optimum and its hypergradient, by Newton's method and one dense solve.

    Training loss: mean cross-entropy + 0.5 sum_j exp(lam_j) |W_j|^2. Outer loss: cross-entropy.
    """
    x, y = teacher_batches((examples,), features, classes, 3)
    xv, yv = teacher_batches((judges,), features, classes, 4)
    X, XV, eye = x.astype(float), xv.astype(float), np.eye(classes)
    lam = np.log(1e-3) + 0.5 * np.random.default_rng(5).standard_normal(features)
    lam = lam.astype("f4").astype(float)
    penalty = np.exp(lam)[:, None]

    def gradient(W):
        return X.T @ (_softmax(X @ W) - eye[y]) / examples + penalty * W

    W = np.zeros((features, classes))
    for _ in range(50):
        g = gradient(W)
        size = np.linalg.norm(g)
        if size < 1e-12:
            break
        P = _softmax(X @ W)
        step, rate = _solve_cg(lambda v, P=P: _hessian_product(X, P, penalty, v), g), 1.0
        while np.linalg.norm(gradient(W - rate * step)) > size and rate > 1e-3:
            rate /= 2
        W = W - rate * step
    alpha = XV.T @ (_softmax(XV @ W) - eye[yv]) / judges
    u = np.linalg.solve(_hessian(X, _softmax(X @ W), penalty), alpha.T.ravel())
    hypergrad = -np.sum(u.reshape(classes, features).T * W * penalty, axis=1)
    return {"x": x, "y": y, "xv": xv, "yv": yv, "lam": lam, "W": W, "hypergrad": hypergrad}


def _softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _hessian_product(X, P, penalty, v):
    z = P * (X @ v)
    return X.T @ (z - P * z.sum(1, keepdims=True)) / len(X) + penalty * v


def _solve_cg(product, b, tolerance=1e-4):
    x, r, p = np.zeros_like(b), b, b
    rr = first = np.vdot(b, b)
    while rr > tolerance**2 * first:
        q = product(p)
        rate = rr / np.vdot(p, q)
        x, r = x + rate * p, r - rate * q
        rr, before = np.vdot(r, r), rr
        p = r + rr / before * p
    return x


def _hessian(X, P, penalty):
    """Dense, classes in the outer index."""
    features, classes = X.shape[1], P.shape[1]
    H = np.zeros((classes, features, classes, features))
    for a in range(classes):
        for b in range(a, classes):
            weight = P[:, a] * ((a == b) - P[:, b]) / len(X)
            H[a, :, b] = (X * weight[:, None]).T @ X
            H[b, :, a] = H[a, :, b].T
    H = H.reshape(classes * features, -1)
    return H + np.diag(np.tile(penalty[:, 0], classes))
