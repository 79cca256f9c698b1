"""Paths as the routes see them, and which API a path belongs to."""

from starlette.types import Scope

MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"


def route_path(scope: Scope) -> str:
    """The path behind the root path, whether or not the proxy has cut that off."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def is_responses(scope: Scope) -> bool:
    """Whether the path is of the API whose streams are events of a response."""
    return route_path(scope) == RESPONSES


def is_messages(scope: Scope) -> bool:
    """Whether the path is of Anthropic's API, not OpenAI's."""
    path = route_path(scope)
    return path == MESSAGES or path.startswith(f"{MESSAGES}/")
