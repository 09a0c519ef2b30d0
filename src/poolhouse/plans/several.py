"""Several tasks answered from one pass; sparse vectors are read from the answer of another task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer
from poolhouse.errors import InvalidRequest
from poolhouse.outputs import Array, SparseVector
from poolhouse.params import PoolingParams
from poolhouse.plans import sparse
from poolhouse.tasks import Task, parse_task

# What callers name like a task, and the engine does not know.
SPARSE: Final = "sparse"
TaskOrSparse = Task | Literal["sparse"]


@dataclass(frozen=True, slots=True, eq=False)
class SeveralPlan:
    """What to run for several tasks, and where their answers are.

    tasks: as the caller named them. first, further: the engine's tasks, as in `Request`, each once.
    sparse: how sparse vectors are read; None where none are wanted.
    """

    tasks: tuple[TaskOrSparse, ...]
    first: Task
    further: tuple[Task, ...]
    sparse: sparse.SparsePlan | None

    def array(self, answer: Answer, task: Task) -> Array:
        """The answer of one of the engine's tasks."""
        return answer.array if task == self.first else answer.further[task]

    def vector(self, answer: Answer) -> SparseVector:
        """The sparse vector, where one is wanted."""
        assert self.sparse is not None
        return self.sparse.each(replace(answer, array=self.array(answer, self.sparse.head.task))).vector


def plan(
    engine: PoolingEngine, names: Sequence[str], options: sparse.SparseOptions, params: PoolingParams | None = None
) -> SeveralPlan:
    """What to run for at least one task. options: of sparse vectors. params: of the requests.

    Raises:
        UnsupportedTask: one that the model lacks. InvalidRequest: an unknown one, sparse vectors asked for twice (the
        engine refuses other repetitions), or parameters that would change them.
    """
    tasks: list[TaskOrSparse] = [
        SPARSE if name == SPARSE else parse_task(name, engine.facts.tasks, (SPARSE,)) for name in names
    ]
    passes: list[Task] = [task for task in tasks if task != SPARSE]
    if SPARSE not in tasks:
        return SeveralPlan(tuple(tasks), passes[0], tuple(passes[1:]), None)
    of_sparse = sparse.plan(engine, (), options)
    if tasks.count(SPARSE) > 1:
        raise InvalidRequest(f"The task '{SPARSE}' is asked for twice; name each once.", "task", SPARSE)
    if of_sparse.head.unit != "token" and params is not None and params.use_activation is False:
        raise InvalidRequest("This model's sparse vectors need use_activation.", "use_activation", False)
    if of_sparse.head.task not in passes:
        passes.append(of_sparse.head.task)
    return SeveralPlan(tuple(tasks), passes[0], tuple(passes[1:]), of_sparse)
