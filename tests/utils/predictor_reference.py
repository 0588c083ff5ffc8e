"""A slow reference of the predictor, in plain loops over floats, that follows its description line by line."""

import math

from smartfrz_hf.predictor.features import EPSILON, MAX_RATIO, MIN_RATIO
from smartfrz_hf.predictor.modeling import CLIP, SmartFRZPredictor

Vector = list[float]
Layers = list[tuple[list[Vector], Vector]]


def _norm(a: Vector) -> float:
    return math.sqrt(sum(x * x for x in a))


def _minus(a: Vector, b: Vector) -> Vector:
    return [x - y for x, y in zip(a, b, strict=True)]


def _dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _cosine(a: Vector, b: Vector) -> float:
    return _dot(a, b) / max(_norm(a) * _norm(b), EPSILON)


def _log_ratio(a: float, b: float) -> float:
    return math.log10(min(max(a / max(b, EPSILON), MIN_RATIO), MAX_RATIO))


def _mlp(layers: Layers, x: Vector) -> Vector:
    """Linear layers with a ReLU after each but the last."""
    for i, (weight, bias) in enumerate(layers):
        x = [_dot(row, x) + b for row, b in zip(weight, bias, strict=True)]
        if i + 1 < len(layers):
            x = [max(0.0, v) for v in x]
    return x


def _attend(query: Vector, keys: list[Vector], values: list[Vector], mask: list[bool]) -> tuple[Vector, Vector]:
    """Scaled dot-product attention of one query."""
    scores = [
        _dot(query, key) / math.sqrt(len(query)) if on else -math.inf for key, on in zip(keys, mask, strict=True)
    ]
    weights = [math.exp(score - max(scores)) for score in scores]
    weights = [weight / sum(weights) for weight in weights]
    attended = [sum(w * value[i] for w, value in zip(weights, values, strict=True)) for i in range(len(values[0]))]
    return attended, weights


def dynamics_reference(history: list[Vector], start: Vector, usable: list[bool], spent: Vector) -> list[Vector]:
    """The ten scale-free quantities of each snapshot of one unit; see [`~predictor.features.dynamics`]."""
    last, window = history[-1], len(history)
    zero = [0.0] * len(start)
    updates = [_minus(history[t], history[t - 1]) if usable[t] else zero for t in range(window)]
    budget = [spent[t] - spent[t - 1] if usable[t] else 0.0 for t in range(window)]
    whole = _norm(_minus(last, start))
    mean = sum(_norm(u) for u in updates) / max(1, sum(usable))
    mean_speed = sum(_norm(u) for u in updates) / max(sum(budget), EPSILON)
    rows = []
    for t in range(window):
        if not usable[t]:
            rows.append([0.0] * 10)
            continue
        size = _norm(updates[t])
        since = _norm(_minus(last, history[t - 1]))
        path = sum(_norm(updates[s]) for s in range(t, window))
        to_come = since / max(sum(budget[t:]), EPSILON) * (1 - spent[-1])
        rows.append(
            [
                _log_ratio(size, whole),
                _log_ratio(size, mean),
                _log_ratio(size / max(budget[t], EPSILON), mean_speed),
                _cosine(updates[t], updates[t - 1] if usable[t - 1] else zero),
                _cosine(updates[t], _minus(last, start)),
                _log_ratio(_norm(_minus(history[t], start)), whole),
                _log_ratio(since, whole),
                since / max(path, EPSILON),
                _log_ratio(to_come, whole),
                (window - 1 - t) / window,
            ]
        )
    return rows


def predict_reference(
    predictor: SmartFRZPredictor,
    histories: list[list[Vector]],
    starts: list[Vector],
    mask: list[bool],
    spent: Vector,
    contexts: list[Vector],
) -> tuple[Vector, list[Vector]]:
    """
    Score the units of one freezing stage.

    Args:
        predictor ([`SmartFRZPredictor`]): gives the weights.
        histories (`list[list[list[float]]]`): per unit, `window` snapshots of `weights_per_unit` weights, oldest first.
        starts (`list[list[float]]`): per unit, the snapshot at the start of the run.
        mask (`list[bool]`): which snapshots are real.
        spent (`list[float]`): share of the summed learning rate spent before each snapshot.
        contexts (`list[list[float]]`): per unit, its context.

    Returns:
        `tuple[list[float], list[list[float]]]`: per unit, the logit, and the attention over the window.
    """

    def layers(name: str) -> Layers:
        module = getattr(predictor, name)
        linear = [m for m in module.modules() if hasattr(m, "weight")]
        return [(m.weight.tolist(), m.bias.tolist()) for m in linear]

    config, window = predictor.config, len(mask)
    units, attentions = [], []
    for history, start, context in zip(histories, starts, contexts, strict=True):
        if config.form == "weights":
            usable, encoded = mask, history
        else:
            usable = [mask[t] and t > 0 and mask[t - 1] for t in range(window)]
            mean, std = predictor.feature_mean.tolist(), predictor.feature_std.tolist()
            encoded = [
                [min(max((x - m) / s, -CLIP), CLIP) for x, m, s in zip(row, mean, std, strict=True)]
                for row in dynamics_reference(history, start, usable, spent)
            ]
        keys, values = [_mlp(layers("key"), x) for x in encoded], [_mlp(layers("value"), x) for x in encoded]
        attended, attention = _attend(_mlp(layers("query"), encoded[-1]), keys, values, usable)
        units.append(attended if config.form == "weights" else _mlp(layers("join"), attended + context))
        attentions.append(attention)
    if config.form == "dynamics" and config.unit_attention:
        query, key, value = ([_mlp(layers(f"unit_{name}"), x) for x in units] for name in ("query", "key", "value"))
        shared = [_attend(q, key, value, [True] * len(units))[0] for q in query]
        units = [[x + y for x, y in zip(a, b, strict=True)] for a, b in zip(units, shared, strict=True)]
    logits = [_mlp(layers("head"), x)[0] for x in units]
    if config.form == "dynamics" and config.front_sum:
        logits = [-math.log(sum(math.exp(-z) for z in logits[: unit + 1])) for unit in range(len(logits))]
    offset, temperature = float(predictor.offset), float(predictor.temperature)
    return [(z - offset) / temperature for z in logits], attentions
