"""`orchestrator run`: answer prompts with a published release."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orchestrator.base.errors import SpecError
from orchestrator.cli.console import PublicKey, exit_codes, printable
from orchestrator.cli.releases import options_of, resolved

if TYPE_CHECKING:
    from orchestrator.releases import Release
    from orchestrator.runners import Sampling
    from orchestrator.runners.model import Answer, Model

app = typer.Typer()


@app.command()
def run(
    url: Annotated[str, typer.Argument(metavar="URL", help="URL of a release with a portable part, or of a tag.")],
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="Text to answer.")] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="Chat: answer each line of the input.")] = False,
    batch: Annotated[
        Path | None,
        typer.Option("--batch", help='JSON lines, {"prompt": ...} or {"messages": [...]}; answers as JSON lines.'),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Most tokens of an answer; absent: 256.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message of the chat.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")] = False,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0: always the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0, max=1, help="Probability of the tokens to choose among.")] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the choice, above temperature 0.")] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="First compare its logits on this machine with those that the release was verified with."),
    ] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="auto: a GPU where there is one.")] = "auto",
    folder: Annotated[Path | None, typer.Option("--folder", help="Folder for the files; absent: the user's cache.")] = None,
    public_key: PublicKey = None,
    cluster: Annotated[Path | None, typer.Option("--cluster", help="Cluster file with the connection to the store.")] = None,
) -> None:
    """Generate text with a release: pull what it needs, stream the answer, and print its speed on stderr."""
    with exit_codes():
        from orchestrator.base.extras import require
        from orchestrator.releases import open_release
        from orchestrator.report import TransferView
        from orchestrator.runners import Sampling
        from orchestrator.runners.model import folder_of, load

        require("run")
        asked = [prompt is not None, interactive, batch is not None].count(True)
        if asked > 1 or (not asked and not check):
            raise SpecError("give one of a prompt, --interactive and --batch", 'E.g. orchestrator run URL "What is TensorRT?"')
        jobs = _jobs(batch) if batch is not None else []
        release = open_release(resolved(url), public_key, options_of(cluster))
        with TransferView(_err()) as view:
            folder = folder or folder_of(release)
            model = load(release, folder, device, view)
        if check:
            _check(model, release, folder)
        sampling = Sampling(temperature, top_p, seed)
        if batch is not None:
            _answer_all(model, jobs, max_tokens, sampling, raw=raw)
        elif interactive:
            _chat(model, system, max_tokens, sampling)
        elif prompt is not None:
            messages = [*_system(system), {"role": "user", "content": prompt}]
            _say(model, prompt if raw or system is None else messages, max_tokens, sampling, raw=raw)


def _check(model: Model, release: Release, folder: Path) -> None:
    """Compare with the release's reference numbers and print the result on stderr."""
    from orchestrator.releases.reference_numbers import REFERENCE, read_numbers

    if release.manifest.reference is None:
        raise SpecError(f"{release.title} has no reference numbers: it was built without a verification", "Leave out --check.")
    found = model.check(read_numbers(folder / REFERENCE))
    text = f"relative error {found.max_relative_error:.1e}, top-1 agreement {found.top1_agreement:.4f}"
    print(f"check passed on {found.num_positions} positions: {text}", file=sys.stderr)


def _err() -> Any:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _system(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]


def _say(
    model: Model, prompt: str | list[dict[str, str]], max_tokens: int | None, sampling: Sampling, *, raw: bool = False
) -> Answer:
    """Stream an answer to stdout, its figures to stderr."""
    from orchestrator.runners.model import Answer

    answer = Answer()
    for piece in model.stream(prompt, max_tokens, sampling, raw=raw, answer=answer):
        # A model's text is not trusted to move the cursor.
        sys.stdout.write(printable(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    figures = f"{len(answer.tokens)} tokens, {answer.tokens_per_second:.1f} tokens/s; "
    print(figures + f"{answer.num_prompt_tokens} of the prompt in {answer.first_seconds:.2f} s", file=sys.stderr)
    return answer


def _chat(model: Model, system: str | None, max_tokens: int | None, sampling: Sampling) -> None:
    """Answer each line of stdin, with the whole chat before it."""
    messages = _system(system)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            messages.append({"role": "user", "content": line.strip()})
            answer = _say(model, messages, max_tokens, sampling)
            messages.append({"role": "assistant", "content": answer.text})


def _jobs(path: Path) -> list[dict[str, Any]]:
    """Read and check a file of prompts. Raises SpecError, which names the line."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--batch {path}: {error}", "Give a file of JSON lines.") from None
    return list(_checked(path, lines))


def _checked(path: Path, lines: list[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            job = json.loads(line)
        except ValueError:
            job = None
        prompt = job.get("prompt", job.get("messages")) if isinstance(job, dict) else None
        is_chat = isinstance(prompt, list) and all(_is_message(each) for each in prompt)
        if not isinstance(job, dict) or not (isinstance(prompt, str) or (is_chat and prompt)):
            raise SpecError(
                f"--batch {path}, line {number}: it is neither a prompt nor messages",
                'Write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]} on each line.',
            )
        yield job


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _answer_all(model: Model, jobs: list[dict[str, Any]], max_tokens: int | None, sampling: Sampling, *, raw: bool) -> None:
    """Print a JSON line per job: the job with text, number of tokens and speed."""
    for job in jobs:
        prompt: str | list[dict[str, str]] = job["prompt"] if "prompt" in job else job["messages"]
        answer = model.generate(prompt, max_tokens, sampling, raw=raw)
        found = {"text": answer.text, "num_tokens": len(answer.tokens), "tokens_per_second": round(answer.tokens_per_second, 2)}
        print(json.dumps({**job, **found}, ensure_ascii=False), flush=True)
