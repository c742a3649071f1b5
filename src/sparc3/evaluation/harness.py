"""Zero-shot accuracy by EleutherAI's lm-evaluation-harness, on the model in memory (the extra `harness`)."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .. import distributed
from ..errors import Sparc3Error, UserError, unknown
from ..samples.reference_set import ReferenceSet
from ..samples.tokens import Tokenizer
from .metrics import HarnessSettings, Metric, Model, Reading, register
from .statistics import Observations


def harness(
    model: Model,
    tokenizer: Tokenizer,
    samples: ReferenceSet,
    settings: HarnessSettings,
    progress: bool = False,
) -> Reading:
    """harness.<task>, accuracy with one unit per question, and harness.mean, in which every task has the same
    weight.

    Raises:
        UserError: the harness is not installed, does not know a task, or cannot reach its data.
    """
    if not distributed.is_main():
        return Reading(distributed.first(()))
    simple_evaluate, _, wrap = _import_harness()
    # A copy, because the wrapper adds a padding token to a tokenizer without one.
    wrapped = wrap(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=settings.batch_size)
    with _explain_missing_data(settings.tasks):
        evaluated = simple_evaluate(
            model=wrapped,
            tasks=list(settings.tasks),
            task_manager=_make_task_manager(settings),
            num_fewshot=settings.fewshot,
            limit=settings.limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    return Reading(distributed.first(observations(evaluated["samples"], settings.tasks)))


def _import_harness() -> tuple[Any, Any, Any]:
    """The harness's simple_evaluate, TaskManager and HFLM."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"metric harness needs lm-evaluation-harness ({error}); pip install 'lm-eval[hf]'"
        ) from None
    return simple_evaluate, TaskManager, HFLM


def _make_task_manager(settings: HarnessSettings) -> Any:
    """A manager of the harness's tasks and those in the user's folder."""
    arguments = {"include_path": settings.tasks_dir} if settings.tasks_dir else {}
    return _import_harness()[1](**arguments)


def require_harness(settings: HarnessSettings) -> None:
    """Raise UserError unless the harness is installed, knows the tasks, and has their data (which it
    downloads here)."""
    if not distributed.is_main():
        return
    tasks = _make_task_manager(settings)
    for name in settings.tasks:
        if name not in tasks.all_tasks:
            raise unknown("task of lm-evaluation-harness", name, tasks.all_tasks)
    with _explain_missing_data(settings.tasks):
        tasks.load(list(settings.tasks))


def observations(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], tasks: Sequence[str]
) -> tuple[Observations, ...]:
    """Accuracies from the harness's record of every question."""
    answers = {}
    for task in tasks:
        rows = sorted(samples.get(task, ()), key=lambda row: row.get("doc_id", 0))
        answers[task] = [float(row["acc"]) for row in rows if "acc" in row]
        if not answers[task]:
            raise Sparc3Error(
                f"lm-evaluation-harness gave no accuracy for task {task}; choose tasks of single questions "
                "that have one"
            )
    per_task = [_accuracy(task, correct, [1.0] * len(correct)) for task, correct in answers.items()]
    weight_of_task = {task: 1 / (len(correct) * len(answers)) for task, correct in answers.items()}
    answers_of_all = [
        (answer * weight_of_task[task], weight_of_task[task])
        for task, correct in answers.items()
        for answer in correct
    ]
    return (
        *per_task,
        _accuracy(
            "mean", [correct for correct, _ in answers_of_all], [weight for _, weight in answers_of_all]
        ),
    )


def _accuracy(name: str, correct: list[float], weights: list[float]) -> Observations:
    return Observations(
        f"harness.{name}", "test", "share of questions", "higher", tuple(correct), tuple(weights)
    )


@contextmanager
def _explain_missing_data(tasks: Sequence[str]) -> Iterator[None]:
    """Inside, errors caused by unreachable data become one UserError; other errors pass."""
    try:
        yield
    except Exception as error:
        link: BaseException | None = error
        while link is not None:  # the cause is often wrapped several times
            package = type(link).__module__.split(".")[0]
            if isinstance(link, OSError) or package in ("httpx", "requests", "huggingface_hub", "datasets"):
                reason = " ".join(str(link).split())[:200]
                raise UserError(
                    f"lm-evaluation-harness cannot reach the data of {', '.join(tasks)} ({reason}); run "
                    "it once where the hub can be reached, or give other tasks"
                ) from None
            link = link.__cause__ or link.__context__
        raise


register(
    Metric("harness", HarnessSettings, harness, prompts=False, gives=("harness.*",), ready=require_harness)
)
