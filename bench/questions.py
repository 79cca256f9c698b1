"""Twenty simple questions to a running server, and its answers as a page to read.

    speed serve & python -m bench.questions --output bench/results/questions.md

Judges nothing: whether the answers are coherent is for a reader to say. Greedy, so that the same model
gives the same page.
"""

import argparse
import http.client
import json
import urllib.error
import urllib.request

from tqdm import tqdm

from bench.options import output_file, positive, reporting

QUESTIONS = (
    "Hello! How are you?",
    "What is your name?",
    "What is the capital of France?",
    "What colour is the sky on a clear day?",
    "How many days are there in a week?",
    "What is two plus three?",
    "What do bees make?",
    "Name three fruits.",
    "Why do people sleep?",
    "What is water made of?",
    "Which animal says meow?",
    "What is the opposite of hot?",
    "Who wrote Romeo and Juliet?",
    "What do plants need to grow?",
    "What should I have for breakfast?",
    "Tell me a short story about a dog.",
    "Write one sentence about the sea.",
    "How do I make a cup of tea?",
    "What is a computer?",
    "Thank you, goodbye!",
)


def ask(url: str, model: str, question: str, max_tokens: int) -> str:
    """The server's greedy answer; raises urllib.error.HTTPError with its reason."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": max_tokens,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        answer: str = json.load(response)["choices"][0]["message"]["content"]
    return answer.strip()


def _asked(args: argparse.Namespace, question: str) -> str:
    """The answer to one question; raises OSError that says where there is no server, or what it refuses."""
    try:
        return ask(args.url, args.model, question, args.max_tokens)
    except urllib.error.HTTPError as error:
        raise OSError(
            f"{args.url} answers {error.code}: {error.read(500).decode(errors='replace')}"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"no server answers at {args.url} ({error}): start one with `speed serve`") from None


def page(model: str, answers: list[str]) -> str:
    """Questions and answers as Markdown."""
    pairs = zip(QUESTIONS, answers, strict=True)
    parts = [f"**{question}**\n\n{_quoted(answer)}\n" for question, answer in pairs]
    return f"# Twenty questions to `{model}`, greedy\n\n" + "\n".join(parts)


def _quoted(answer: str) -> str:
    return "\n".join(f"    {line}" for line in answer.splitlines() or ["(nothing)"])


@reporting("python -m bench.questions")
def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.questions", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="default")
    parser.add_argument("--max-tokens", type=positive, default=96)
    parser.add_argument("--output", type=output_file, default=None, help="Markdown file (default: print it)")
    args = parser.parse_args()
    answers = [_asked(args, question) for question in tqdm(QUESTIONS, unit="question", disable=None)]
    if args.output is None:
        print(page(args.model, answers))
    else:
        args.output.write_text(page(args.model, answers))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
