"""What every route is given: the registry of its app, and what goes with it."""

from typing import Annotated

from fastapi import Depends, Request

from service.jobs import Jobs
from service.label_sets import LabelSets
from service.registry import Registry


async def _get_registry(request: Request) -> Registry:  # async, or FastAPI takes a thread for it
    registry: Registry = request.app.state.registry
    return registry


async def _get_label_sets(request: Request) -> LabelSets:
    sets: LabelSets = request.app.state.label_sets
    return sets


async def _get_jobs(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.jobs
    return jobs


ServedRegistry = Annotated[Registry, Depends(_get_registry)]
ServedLabelSets = Annotated[LabelSets, Depends(_get_label_sets)]
ServedJobs = Annotated[Jobs, Depends(_get_jobs)]
