"""What a request cost, as every answer says it."""

from pydantic import BaseModel


class PromptTokensDetails(BaseModel):
    """How much of the prompts was found in the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """Drafted tokens that the full depth confirmed and contradicted; ours: passes after the first token.

    `reasoning_tokens`, those of thoughts and their tags, is there where answers are searched for thoughts.
    """

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    decode_passes: int
    reasoning_tokens: int | None = None


class Usage(BaseModel):
    """What a request cost, all its choices together; a prompt counts once, however large `n` is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
