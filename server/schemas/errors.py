"""The body of every answer that isn't a success."""

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong; `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """OpenAI's shape."""

    error: ErrorDetail
