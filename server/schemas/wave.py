"""The wave in a stream's chunks, with `stream_options.include_wave`: what each pass did for a request."""

from pydantic import BaseModel, Field


class CommittedToken(BaseModel):
    """A token that the last loop has confirmed, and what the loops that were read out said in its place."""

    token_id: int
    agreed: int = Field(description="how many of the guesses are the token, the last loop's own included")
    guesses: list[tuple[int, int]] = Field(description="[loops done, token id], the last loop at the end")


class Flush(BaseModel):
    """Drafts that were dropped: from which position on, and after how many loops a readout contradicted."""

    position: int
    depth: int


class Pass(BaseModel):
    """One pass. Positions count from the prompt's first token, which is 0."""

    runs: list[tuple[int, int, int]] = Field(
        description="rows that ran: [position of the first token, number, loops done after the pass]"
    )
    position: int = Field(description="of the first token that was not final before the pass")
    committed: list[CommittedToken] = Field(description="tokens that the pass made final")
    drafts: list[int] = Field(description="ids of the tokens that are guessed behind them now")
    flushed: Flush | None


class Wave(BaseModel):
    """The passes since the chunk before."""

    num_loops: int
    passes: list[Pass] = Field(description="the latest ones, at most 64")
    omitted: int = Field(description="how many before them are left out")
    texts: dict[str, str] = Field(description="the text of each token named here, by its id")
