"""What every route is given: the registry of its app."""

from typing import Annotated

from fastapi import Depends, Request

from service.registry import Registry


async def _get_registry(request: Request) -> Registry:  # async, or FastAPI takes a thread for it
    registry: Registry = request.app.state.registry
    return registry


ServedRegistry = Annotated[Registry, Depends(_get_registry)]
