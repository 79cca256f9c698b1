"""What a request may ask of a model: every rule once, for the server and for the engine.

The server asks before it queues a request, so that a client gets a status and not a broken stream. The engine
asks again, since it is used without a server too. Pure Python, and it knows nothing about HTTP or tensors.
Invariant: a request that `check_request` lets pass ends with an answer; it never ends with a refusal for what
can be known beforehand, except for a grammar's own content.
"""

from collections.abc import Collection

from model.options import unknown_policy
from model.protocol import EngineInfo, GenerationRequest, RequestOptions

MOST_OF_LOOPS = 256  # log-probabilities of one token by all loops, the token's own included


class RuleError(ValueError):
    """A request that the model cannot serve. `field` is at fault; the message names its value and limit."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class TokenIdError(RuleError):
    """A token that the model doesn't have; `shown` is the id as the message quotes it."""

    def __init__(self, field: str, shown: object, vocab_size: int) -> None:
        super().__init__(field, f"{field}: {shown} is no token id; ids are 0 to {vocab_size - 1}")


class ContextError(RuleError):
    """A prompt and a completion that are longer together than the model's context."""

    def __init__(self, num_prompt_tokens: int, max_tokens: int, max_model_len: int) -> None:
        super().__init__(
            "max_tokens",
            f"{num_prompt_tokens} prompt tokens and max_tokens {max_tokens} exceed the context of "
            f"{max_model_len} tokens",
        )


def check_request(request: GenerationRequest, info: EngineInfo) -> None:
    """Raises RuleError for the first rule of the model `info` that the request breaks."""
    check_options(request, info)
    check_token_ids("logit_bias", request.sampling.logit_bias, info.vocab_size)
    check_prompt("prompt_token_ids", request.prompt_token_ids, info.vocab_size)
    num_tokens = num_tokens_before(len(request.prompt_token_ids), request, info)
    check_length(num_tokens, request.max_tokens, info.max_model_len)


def check_options(options: RequestOptions, info: EngineInfo) -> None:
    """Raises RuleError for a loop, a noise, a policy, a stopping token or a grammar that can't be had."""
    if options.num_loops is not None and not 1 <= options.num_loops <= info.most_loops:
        raise RuleError(
            "num_loops", f"num_loops is {options.num_loops}, but the model has {info.most_loops} loops"
        )
    if options.init_scale and not info.has_noisy_start:
        raise RuleError(
            "init_scale",
            f"init_scale is {options.init_scale:g}, but the state of this model does not start from noise",
        )
    if options.draft_policy is not None and options.draft_policy not in info.draft_policies:
        raise RuleError("draft_policy", unknown_policy(options.draft_policy, info.draft_policies))
    if options.prompt_logprobs is not None and info.prompt_scores_problem:
        raise RuleError("prompt_logprobs", info.prompt_scores_problem)
    loops = options.num_loops or info.num_loops
    if options.loop_logprobs is not None and (total := loops * (1 + options.loop_logprobs)) > MOST_OF_LOOPS:
        raise RuleError(
            "loop_logprobs",
            f"loop_logprobs is {options.loop_logprobs}, which for {loops} loops is {total} log-probabilities "
            f"of each token; {MOST_OF_LOOPS} are the most",
        )
    if options.exit_threshold is not None and not info.has_exit_gate:
        raise RuleError(
            "exit_threshold",
            f"exit_threshold is {options.exit_threshold:g}, but this model has no exit gate that could stop "
            "before its last loop; models of Ouro's family have one",
        )
    if options.decoder_prompt and not info.is_encoder_decoder:
        raise RuleError(
            "decoder_prompt",
            "decoder_prompt: this model has no decoder apart; its text goes on where prompt ends",
        )
    check_token_ids("decoder_prompt", options.decoder_prompt, info.vocab_size)
    check_token_ids("stop_token_ids", options.stop_token_ids, info.vocab_size)
    if options.grammar is not None and info.grammar_problem:
        raise RuleError("grammar", info.grammar_problem)


def check_prompt(field: str, token_ids: list[int], vocab_size: int) -> None:
    """Raises RuleError for a prompt without tokens, or with one that the model doesn't have."""
    if not token_ids:
        raise RuleError(field, f"{field} is empty: the model needs at least one token")
    check_token_ids(field, token_ids, vocab_size)


def num_tokens_before(num_prompt_tokens: int, options: RequestOptions, info: EngineInfo) -> int:
    """Tokens of the context that are taken before the first one that is generated.

    Behind an encoder these are the source and what its text begins with.
    """
    return num_prompt_tokens + (1 + len(options.decoder_prompt) if info.is_encoder_decoder else 0)


def check_token_ids(field: str, token_ids: Collection[int], vocab_size: int) -> None:
    """Raises TokenIdError for the first id that the model doesn't have."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        outside = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise TokenIdError(field, outside, vocab_size)


def check_length(num_prompt_tokens: int, max_tokens: int, max_model_len: int) -> None:
    """Raises RuleError if so many tokens can't be generated behind such a prompt."""
    if max_tokens < 0:
        raise RuleError("max_tokens", f"max_tokens is {max_tokens}; it must be at least 0")
    if num_prompt_tokens + max_tokens > max_model_len:
        raise ContextError(num_prompt_tokens, max_tokens, max_model_len)
