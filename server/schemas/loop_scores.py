"""`loop_logprobs` as both kinds of answer have it: what every loop says of each token."""

from pydantic import BaseModel, Field


class LikelyToken(BaseModel):
    """A token that could have stood there, by one loop."""

    token: str
    token_id: int
    logprob: float
    bytes: list[int]


class Loop(BaseModel):
    """What one loop says at the place of a token that the last loop has chosen."""

    loop: int = Field(description="loops done: 1 is the first")
    logprob: float = Field(description="of the chosen token")
    rank: int = Field(description="of the chosen token: 1 is the likeliest")
    agrees: bool = Field(description="whether its likeliest token is that of the last loop")
    top_logprobs: list[LikelyToken] = Field(description="its likeliest tokens, likeliest first")
    gate: float | None = Field(
        None,
        description="models with an exit gate: the probability to stop here, once no loop before has stopped",
    )


class LoopToken(BaseModel):
    """A token of the answer. With `exit_threshold` the loops end with the one that chose it."""

    token: str
    token_id: int
    bytes: list[int]
    loops: list[Loop]
