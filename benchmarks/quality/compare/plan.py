"""What is compared: tasks, arms, and which runs are still missing."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.tasks import Pair
from benchmarks.tasks import Plan as PairPlan

HERE = Path(__file__).parent
Result = dict[str, Any]


@dataclass(frozen=True)
class Task(Pair):
    """
    A [`~benchmarks.tasks.Pair`] with what the comparison needs to know of it.

    Attributes:
        kind (`str`): `"fine-tuning"` or `"scratch"`; arms say for which kinds they are.
        seeds (`list[int]`): one run each with every arm.
        tier (`int`): runs of lower tiers come first.
        minutes (`float`): of full training on one free core, for the estimate.
        seen (`bool`): whether the shipped predictor was trained on runs of this data set.
    """

    kind: str = "fine-tuning"
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    tier: int = 1
    minutes: float = 5.0
    seen: bool = False


@dataclass(frozen=True)
class Arm:
    """
    A way to train.

    Attributes:
        name (`str`): of the result files and the table. Ours begin with `smartfrz`.
        method (`str`): `"full"`, `"freezing"` (a policy of `smartfrz_hf`), `"lora"`, `"lora+freezing"`, `"lisa"` or
            `"grades"` (the package).
        share (`float`): of the steps of full training, with the whole schedule of the learning rate.
        policy (`str`, *optional*): one of `smartfrz_hf.policies.PEERS`, made with `options`.
        options (`dict`): of the policy, of LISA, of GradES or of LoRA.
        config (`dict`): fields of `SmartFRZConfig`.
        tune (`dict`, *optional*): one entry, the option that is tuned on other tasks and the values that are tried.
        ratio_of (`str`, *optional*): arm whose frozen fraction the policy `random` takes over.
        hindsight (`bool`): a fixed schedule, one of those of which the best is chosen afterwards.
        kinds (`list[str]`): kinds of tasks that it is for.
        models (`list[str]`): beginnings of names of models that it works with; all if empty.
    """

    name: str
    method: str
    share: float = 1.0
    policy: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, list[Any]] | None = None
    ratio_of: str | None = None
    hindsight: bool = False
    kinds: list[str] = field(default_factory=lambda: ["fine-tuning", "scratch"])
    models: list[str] = field(default_factory=list)
    tier: int = 1

    def fits(self, task: Task) -> bool:
        """Whether it is for this task."""
        return task.kind in self.kinds and (
            not self.models or any(task.model.startswith(start) for start in self.models)
        )

    @property
    def tuned_option(self) -> tuple[str, list[Any]]:
        """Name of the tuned option, and its values."""
        assert self.tune is not None
        ((name, values),) = self.tune.items()
        return name, values

    def with_value(self, value: Any) -> "Arm":
        """The same arm with a value for the tuned option."""
        name, _ = self.tuned_option
        known = self.__dict__ | {"tune": None, "name": f"{self.name.removesuffix('-tuned')}@{name}={value}"}
        where = "config" if self.policy is None and self.method == "freezing" else "options"
        return Arm(**known | {where: getattr(self, where) | {name: value}})


@dataclass(frozen=True)
class Experiment:
    """One run: a task, an arm and a seed."""

    task: Task
    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """`TASK/ARM.SEED`, the path of its result without the ending."""
        return f"{self.task.name}/{self.arm.name}.{self.seed}"

    def file(self, out: Path) -> Path:
        return out / f"{self.name}.json"

    def result(self, out: Path) -> Result:
        """
        Read its result.

        Raises:
            ValueError: the file is damaged, or that of another run.
        """
        file = self.file(out)
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            found = f"{known['task']['name']}/{known['arm']['name']}.{known['seed']}"
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error!r}). Delete it, and run again.") from error
        if found != self.name:
            raise ValueError(f"{file} is the result of {found}. Delete it, and run again.")
        return known


@dataclass(frozen=True)
class Plan:
    """
    All tasks and arms.

    Attributes:
        models (`dict`): as in [`~benchmarks.tasks.Plan`].
        tasks (`list[Task]`), arms (`list[Arm]`): in the order of the tables.
    """

    models: dict[str, dict[str, Any]]
    tasks: list[Task]
    arms: list[Arm]

    @classmethod
    def read(cls, folder: Path = HERE) -> "Plan":
        """Read `tasks.json` and `arms.json`."""
        tasks = json.loads((folder / "tasks.json").read_text())
        arms = json.loads((folder / "arms.json").read_text())
        return cls(tasks["models"], [Task(**task) for task in tasks["tasks"]], [Arm(**arm) for arm in arms])

    def folder(self, task: Pair, model_dir: Path) -> Path | None:
        """As [`~benchmarks.tasks.Plan.folder`]."""
        return PairPlan(self.models, []).folder(task, model_dir)

    def tuning_tasks(self, task: Task) -> list[Task]:
        """The tasks on which thresholds for a task are tuned: with the same model, or else all of the same kind."""
        others = [other for other in self.tasks if other.role == "tune" and other.kind == task.kind]
        return [other for other in others if other.model == task.model] or others

    @cached_property
    def experiments(self) -> list[Experiment]:
        """All runs: by tier, then by seed, so that all arms of a task have equally many seeds at any time."""
        found = []
        for task in self.tasks:
            arms = [arm for arm in self.arms if arm.fits(task)]
            if task.role == "tune":
                arms = [arm.with_value(v) for arm in arms if arm.tune for v in arm.tuned_option[1]] + [
                    arm for arm in arms if arm.name == "full"
                ]
            found += [
                (max(task.tier, arm.tier), place, Experiment(task, arm, seed))
                for arm in arms
                for place, seed in enumerate(task.seeds)
            ]
        found.sort(key=lambda entry: (entry[0], entry[2].task.role != "tune", entry[1]))
        return [experiment for _, _, experiment in found]

    def needs(self, experiment: Experiment) -> list[Experiment]:
        """The runs whose results an experiment depends on."""
        arm, task = experiment.arm, experiment.task
        if arm.ratio_of:
            return [e for e in self.of(task) if e.arm.name == arm.ratio_of and e.seed == experiment.seed]
        if arm.tune:
            return [e for other in self.tuning_tasks(task) for e in self.of(other) if self.tries(arm, e)]
        return []

    def of(self, task: Task) -> list[Experiment]:
        """All runs of a task."""
        return [experiment for experiment in self.experiments if experiment.task == task]

    @staticmethod
    def tries(arm: Arm, experiment: Experiment) -> bool:
        """Whether a run on a tuning task is one that a tuned arm is chosen by."""
        names = {arm.with_value(value).name for value in arm.tuned_option[1]}
        return experiment.arm.name in names or experiment.arm.name == "full"

    def waits_for(self, experiment: Experiment, out: Path) -> Experiment | None:
        """The first run that it depends on and that has not been made."""
        return next((needed for needed in self.needs(experiment) if not needed.file(out).exists()), None)
