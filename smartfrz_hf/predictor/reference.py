"""The predictor in plain loops over floats, line by line as the paper describes it. Slow; for tests."""

import math

from .modeling import EPSILON, FLOOR, SmartFRZPredictor

Vector = list[float]


def _norm(a: Vector) -> float:
    return math.sqrt(sum(x * x for x in a))


def _minus(a: Vector, b: Vector) -> Vector:
    return [x - y for x, y in zip(a, b, strict=True)]


def _cosine(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / max(_norm(a) * _norm(b), EPSILON)


def _log(x: float) -> float:
    return math.log10(max(x, FLOOR))


def _mlp(layers: list[tuple[list[Vector], Vector]], x: Vector) -> Vector:
    """Linear layers with a ReLU between each two."""
    for i, (weight, bias) in enumerate(layers):
        x = [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        if i + 1 < len(layers):
            x = [max(0.0, v) for v in x]
    return x


def dynamics_reference(history: list[Vector], start: Vector, usable: list[bool]) -> list[Vector]:
    """The eight scale-free quantities of each snapshot of one unit; see [`~predictor.modeling.dynamics`]."""
    last, window = history[-1], len(history)
    zero = [0.0] * len(start)
    updates = [_minus(history[t], history[t - 1]) if usable[t] else zero for t in range(window)]
    norm = max(_norm(last), EPSILON)
    mean = sum(_norm(u) for u in updates) / max(1, sum(usable))
    rows = []
    for t in range(window):
        if not usable[t]:
            rows.append([0.0] * 8)
            continue
        before = updates[t - 1] if usable[t - 1] else zero
        since = _norm(_minus(last, history[t]))
        path = sum(_norm(updates[s]) for s in range(t + 1, window))
        rows.append(
            [
                _log(_norm(updates[t]) / norm),
                _cosine(updates[t], before),
                _log(since / norm),
                _log(_norm(_minus(history[t], start)) / norm),
                _cosine(updates[t], _minus(last, start)),
                since / max(path, EPSILON),
                _log(_norm(updates[t]) / max(mean, EPSILON)),
                (window - 1 - t) / window,
            ]
        )
    return rows


def predict_reference(
    predictor: SmartFRZPredictor, history: list[Vector], start: Vector, mask: list[bool], context: Vector
) -> tuple[float, Vector]:
    """
    Score one unit.

    Args:
        predictor ([`SmartFRZPredictor`]): gives the weights.
        history (`list[list[float]]`): `window` snapshots of `samples` weights, oldest first.
        start (`list[float]`): the snapshot at the start of the run.
        mask (`list[bool]`): which snapshots are real.
        context (`list[float]`): the unit's context.

    Returns:
        `tuple[float, list[float]]`: the logit, and the attention over the window.
    """

    def layers(name: str) -> list[tuple[list[Vector], Vector]]:
        linear = [m for m in getattr(predictor, name) if hasattr(m, "weight")]
        return [(m.weight.tolist(), m.bias.tolist()) for m in linear]

    window = len(history)
    if predictor.config.form == "weights":
        usable, encoded = mask, history
    else:
        usable = [mask[t] and t > 0 and mask[t - 1] for t in range(window)]
        mean, std = predictor.feature_mean.tolist(), predictor.feature_std.tolist()
        encoded = [
            [(x - m) / s for x, m, s in zip(row, mean, std, strict=True)]
            for row in dynamics_reference(history, start, usable)
        ]
    query = _mlp(layers("query"), encoded[-1])
    scores: Vector = []
    for t in range(window):
        key = _mlp(layers("key"), encoded[t])
        dot = sum(q * k for q, k in zip(query, key, strict=True)) / math.sqrt(len(query))
        scores.append(dot if usable[t] else -math.inf)
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    attention = [weight / sum(weights) for weight in weights]
    attended = [0.0] * len(query)
    for t in range(window):
        value = _mlp(layers("value"), encoded[t])
        attended = [a + attention[t] * v for a, v in zip(attended, value, strict=True)]
    if predictor.config.form == "dynamics":
        attended = attended + context
    return _mlp(layers("head"), attended)[0], attention
