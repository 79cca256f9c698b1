"""`prompt_logprobs` as both kinds of answer have it, in vLLM's shape."""

from pydantic import BaseModel


class ScoredToken(BaseModel):
    """A token that stands in a prompt, or could; the likeliest one of all has rank 1."""

    logprob: float
    rank: int
    decoded_token: str


PromptScores = list[dict[str, ScoredToken] | None]  # by token id; None for the first token
