"""What a full run shows of its units before its first update and in its first fifth."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer

from benchmarks.tasks import Row, Task, bf16_autocast, losses
from smartfrz_hf.model.units import BlockStack, Unit
from smartfrz_hf.signals.weights import WeightSampler

SAMPLES = 1024
MOMENTS = (0.03, 0.05, 0.1)
PUT_BACK_FROM = 0.1  # the front is put back from this moment on
BATCHES = 4
RIDGE_ROWS = 256


def rounded(values: torch.Tensor | Sequence[float]) -> list[float | None]:
    """Numbers with four significant digits, None for what is not finite."""
    numbers = values.tolist() if isinstance(values, torch.Tensor) else values
    return [float(f"{x:.4g}") if abs(x) < float("inf") else None for x in numbers]


def shift(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Mean squared distance of logits, without what is common to all classes."""
    change = logits - others
    return float((change - change.mean(1, keepdim=True) if change.shape[1] > 1 else change).pow(2).mean())


def tensors_of(unit: Unit) -> list[torch.Tensor]:
    """Parameters and floating-point buffers of a unit."""
    buffers = [b for m in unit.modules.values() for b in m.buffers() if b.is_floating_point()]
    return [*unit.named_parameters().values(), *buffers]


class Signals:
    """
    Measures a full run; all arrays have one number for each unit, the stem first.

    Args:
        stack ([`BlockStack`]): the units.
        task ([`Task`]): model and rows.
        batch_size (`int`): rows of a training batch.
        steps (`int`): optimizer steps of the run.

    Attributes:
        found (`dict`): what has been measured, ready for JSON.
    """

    def __init__(self, stack: BlockStack, task: Task, batch_size: int, steps: int):
        self.stack, self.task, self.batch_size = stack, task, batch_size
        self.sampler = WeightSampler(stack.units, SAMPLES)
        self.moments = {max(1, round(steps * moment)): moment for moment in MOMENTS}
        self.parameters = [[p for p in unit.named_parameters().values() if p.requires_grad] for unit in stack.units]
        self.all_units = list(range(len(stack)))
        inside = {p for unit in self.parameters for p in unit}
        self.head = [p for p in task.model.parameters() if p.requires_grad and p not in inside]
        self.first = [[t.detach().clone() for t in tensors_of(unit)] for unit in stack.units]
        counts = [sum(p.numel() for p in unit) for unit in self.parameters]
        self.found: dict[str, Any] = {
            "steps": steps,
            "classes": task.labels,
            "unit_names": stack.names,
            "unit_parameters": counts,
            "head_parameters": sum(p.numel() for p in task.model.parameters()) - sum(counts),
            "moments": {},
        }
        self._reset()

    def _reset(self) -> None:
        zeros = torch.zeros(len(self.stack))
        self.steps, self.norms = 0, zeros.clone()
        self.change, self.path = zeros.clone(), zeros.clone()
        self.sum = torch.zeros(len(self.stack), SAMPLES)
        self.squares = torch.zeros(len(self.stack), SAMPLES)
        self.start = self.previous = self._weights()
        self.head_change, self.previous_head = 0.0, [p.detach().clone() for p in self.head]
        self.losses: list[float] = []

    def _gradients(self) -> torch.Tensor:
        return self.sampler.read_gradients(self.all_units).cpu()

    def _weights(self) -> torch.Tensor:
        return self.sampler.read(self.all_units).cpu()

    def _square_norms(self) -> torch.Tensor:
        return torch.tensor(
            [sum(float(p.grad.pow(2).sum()) for p in unit if p.grad is not None) for unit in self.parameters]
        )

    def before(self) -> None:
        """Gradients of the first batches at the weights as they are, and what a ridge regression reads from each unit."""
        model = self.task.model
        total = [[torch.zeros_like(p) for p in unit] for unit in self.parameters]
        norms, sampled, squares, loss = torch.zeros(len(self.stack)), 0.0, 0.0, 0.0
        model.eval()
        for number in range(BATCHES):
            rows = self.task.train[number * self.batch_size : (number + 1) * self.batch_size]
            model.zero_grad()
            with bf16_autocast():
                out = model(**self.task.batch(rows)).loss
            out.backward()
            loss += float(out.detach()) / BATCHES
            norms += self._square_norms() / BATCHES
            gradients = self._gradients()
            sampled, squares = sampled + gradients / BATCHES, squares + gradients.pow(2) / BATCHES
            for sums, unit in zip(total, self.parameters, strict=True):
                for mean, p in zip(sums, unit, strict=True):
                    if p.grad is not None:
                        mean += p.grad / BATCHES
        model.zero_grad()

        def over(what) -> list[float | None]:
            pairs = zip(total, self.parameters, strict=True)
            return rounded(
                [sum(float(what(g, p.detach()).sum()) for g, p in zip(*pair, strict=True)) for pair in pairs]
            )

        weights = self._weights()
        self.found["before"] = {
            "loss": rounded([loss])[0],
            "gradient_square_norm": rounded(norms),  # mean over the batches
            "mean_gradient_square_norm": over(lambda g, w: g.pow(2)),  # of the mean gradient
            "weight_square_norm": over(lambda g, w: w.pow(2)),
            "gradient_times_weight": over(lambda g, w: g * w),
            "absolute_gradient_times_weight": over(lambda g, w: (g * w).abs()),
            "sampled_gradient_square_norm": rounded(squares.sum(1)),
            "sampled_mean_gradient_square_norm": rounded(sampled.pow(2).sum(1)),
            "sampled_gradient_times_weight": rounded((sampled * weights).sum(1)),
            "sampled_absolute_gradient_times_weight": rounded((sampled * weights).abs().sum(1)),
            "ridge_loss": rounded(self._ridge()),
        }

    def _ridge(self) -> list[float]:
        """
        Share of the labels' variance that a ridge regression on what leaves each unit does not explain, leave-one-out, at
        the best of some penalties: mean over tokens and last token, or mean over places for images.
        """
        rows = self.task.train[:RIDGE_ROWS]
        features: list[list[torch.Tensor]] = [[] for _ in self.stack.units]
        labels: list[torch.Tensor] = []

        def keep(unit: int, hidden: Any, mask: torch.Tensor | None) -> None:
            hidden = (hidden[0] if isinstance(hidden, tuple) else hidden).detach().float().cpu()
            if hidden.dim() == 4:
                features[unit].append(hidden.flatten(2).mean(2))
            elif mask is None:
                features[unit].append(torch.cat([hidden.mean(1), hidden[:, 0]], 1))
            else:
                weights = mask.float() / mask.sum(1, keepdim=True)
                last = hidden[torch.arange(len(hidden)), mask.sum(1) - 1]
                features[unit].append(torch.cat([torch.einsum("rtf,rt->rf", hidden, weights), last, hidden[:, 0]], 1))

        for _, batch in self.task.batches(rows):
            mask = batch["attention_mask"].cpu() if "attention_mask" in batch else None
            blocks = self.stack.blocks
            hooks = [
                blocks[0].register_forward_pre_hook(
                    lambda m, a, k, mask=mask: keep(0, a[0] if a else k["hidden_states"], mask), with_kwargs=True
                )
            ]
            for unit, block in enumerate(blocks, start=1):
                hooks.append(block.register_forward_hook(lambda m, a, o, unit=unit, mask=mask: keep(unit, o, mask)))
            labels.append(batch.pop("labels").cpu())
            with torch.no_grad(), bf16_autocast():
                self.task.model(**batch)
            for hook in hooks:
                hook.remove()
        answers = torch.cat(labels)
        wanted = answers.double()[:, None] if self.task.labels == 1 else torch.nn.functional.one_hot(answers).double()
        wanted = wanted - wanted.mean(0)
        return [_leave_one_out(torch.cat(unit).double(), wanted) for unit in features]

    def after_backward(self, optimizer: torch.optim.Optimizer, step: int, loss: float) -> None:
        """
        Look at the gradients of a step, before it is taken.

        Args:
            optimizer (`torch.optim.Optimizer`): an Adam.
            step (`int`): steps taken so far.
            loss (`float`): of the batch.
        """
        if step > max(self.moments):
            return
        weights, gradients = self._weights(), self._gradients()
        moved = weights - self.previous
        self.change += (gradients * moved).sum(1)  # the gradient is that of the batch after the one that moved it
        self.path += moved.norm(dim=1)
        self.previous = weights
        self.losses.append(loss)
        with torch.no_grad():
            for p, before in zip(self.head, self.previous_head, strict=True):
                if p.grad is not None:
                    self.head_change += float((p.grad * (p - before)).sum())
                before.copy_(p)
        self.sum += gradients
        self.squares += gradients.pow(2)
        self.norms += self._square_norms()
        self.steps += 1
        if step in self.moments:
            self.found["moments"][str(self.moments[step])] = self._moment(optimizer, step, weights)

    def _moment(self, optimizer: torch.optim.Optimizer, step: int, weights: torch.Tensor) -> dict[str, Any]:
        optimizer = getattr(optimizer, "optimizer", optimizer)
        beta1, beta2 = optimizer.param_groups[0]["betas"]
        first, second = 1 - beta1**step, 1 - beta2**step
        signal, noise = torch.zeros(len(self.stack)), torch.zeros(len(self.stack))
        moved, size = torch.zeros(len(self.stack)), torch.zeros(len(self.stack))
        for index, unit in enumerate(self.stack.units):
            for p in self.parameters[index]:
                signal[index] += float((optimizer.state[p]["exp_avg"] / first).pow(2).sum())
                noise[index] += float((optimizer.state[p]["exp_avg_sq"] / second).sum())
            for now, then in zip(tensors_of(unit), self.first[index], strict=True):
                moved[index] += float((now.detach() - then).pow(2).sum())
                size[index] += float(then.pow(2).sum())
        gather = self.sampler._take  # the optimizer's state at the sampled positions
        m = torch.stack([gather(u, lambda p: optimizer.state[p]["exp_avg"]).cpu() for u in self.all_units]) / first
        v = torch.stack([gather(u, lambda p: optimizer.state[p]["exp_avg_sq"]).cpu() for u in self.all_units]) / second
        return {
            "step": step,
            "adam_signal": rounded(signal),
            "adam_noise": rounded(noise),
            "adam_signal_to_noise": rounded(signal / noise),
            "sampled_adam_signal_to_noise": rounded(m.pow(2).sum(1) / v.sum(1)),
            "gradient_square_norm": rounded(self.norms / self.steps),
            "sampled_gradient_square_norm": rounded((self.squares / self.steps).sum(1)),
            "sampled_mean_gradient_square_norm": rounded((self.sum / self.steps).pow(2).sum(1)),
            "sampled_loss_change": rounded(self.change),
            "relative_displacement": rounded((moved / size).sqrt()),
            "sampled_displacement": rounded((weights - self.start).norm(dim=1)),
            "sampled_path": rounded(self.path),
            "head_loss_change": rounded([self.head_change])[0],
            "losses": rounded(self.losses),
        } | ({"front_put_back": self._put_back()} if self.moments[step] >= PUT_BACK_FROM else {})

    def _put_back(self) -> dict[str, Any]:
        """
        Loss and output on the spare rows with units 0 to u as they were at the start; entry u of each array.
        """
        rows: list[Row] = self.task.probe
        logits, labels = self.task.outputs(rows)
        found: dict[str, list[float]] = {"loss": [], "shift": [], "agreement": []}
        current: list[tuple[torch.Tensor, torch.Tensor]] = []
        for unit, first in zip(self.stack.units, self.first, strict=True):
            for tensor, then in zip(tensors_of(unit), first, strict=True):
                current.append((tensor.data, tensor.detach().clone()))
                tensor.data.copy_(then)
            others, _ = self.task.outputs(rows)
            found["loss"].append(float(losses(others, labels).mean()))
            found["shift"].append(shift(others, logits))
            found["agreement"].append(float((others.argmax(1) == logits.argmax(1)).float().mean()))
        for tensor, now in current:
            tensor.copy_(now)
        return {
            "rows": len(rows),
            "current_loss": rounded([float(losses(logits, labels).mean())])[0],
            "current_spread": rounded([shift(logits, logits.mean(0, keepdim=True))])[0],
            **{name: rounded(values) for name, values in found.items()},
        }


def _leave_one_out(features: torch.Tensor, wanted: torch.Tensor) -> float:
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    values, vectors = torch.linalg.eigh(features @ features.T / features.shape[1])
    best = float("inf")
    for penalty in (0.01, 0.1, 1.0, 10.0, 100.0):
        hat = (vectors * (values / (values + penalty))) @ vectors.T
        errors = (wanted - hat @ wanted) / (1 - hat.diagonal()[:, None]).clamp(min=1e-6)
        best = min(best, float(errors.pow(2).sum() / wanted.pow(2).sum()))
    return best


class WatchedTrainer(Trainer):
    """A Trainer that shows its gradients to [`Signals`] before each step; needs one batch a step."""

    signals: Signals | None = None

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.signals is not None:
            assert self.args.gradient_accumulation_steps == 1, "a step has one batch here"
            self.signals.after_backward(self.optimizer, self.state.global_step, float(loss))
        return loss
