"""A published release with all its parts: pulled, run by ONNX Runtime GenAI, compiled again from its checkpoint, and damaged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import orchestrator
from orchestrator.base.errors import DigestError, ReleaseExistsError, ReleaseMissingError, SpecError, VerificationError
from orchestrator.cli.commands import app
from orchestrator.releases import pull, read_release, verify
from orchestrator.releases.manifest import Manifest
from orchestrator.releases.reference_numbers import read_numbers
from orchestrator.runners.genai import GenaiBackend
from orchestrator.runners.model import Model
from orchestrator.runners.tokenizer import Tokenizer
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode
from tests.support.portable import expected_tokens
from tests.support.tiny import write_tiny_llama

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTION = "a b c d"


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """A tokenizer of 131 words, written by transformers."""
    import tokenizers
    import transformers

    words = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "<system>", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {word: number for number, word in enumerate([*words, *(f"w{n}" for n in range(131 - len(words)))])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    made.chat_template = template
    made.save_pretrained(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_llama(tmp_path_factory.mktemp("run") / "source", dtype="float32")
    write_tokenizer(folder)
    return folder


def plain_spec(source: Path) -> dict[str, Any]:
    return {
        "source": {"path": str(source)}, "dtype": "float32", "topology": {"tp": 2}, "conversion": {"max_shard_bytes": 200_000},
        "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64},
        "verification": {"max_tokens": 12, "decode_steps": 3},
        "release": {"name": "tiny", "version": "1", "include": ["engines", "portable", "checkpoint"]},
    }  # fmt: skip


@pytest.fixture(scope="module")
def release(source: Path) -> str:
    """URL of a release with all parts, at tp=2."""
    return orchestrator.build(
        decode(BuildSpec, plain_spec(source), "test"), ClusterSpec(store=(source.parent / "store").as_uri())
    ).address


@pytest.fixture
def copied(release: str, tmp_path: Path) -> tuple[str, Path, Manifest]:
    """The store's copy to damage: URL of the release, its folder, its manifest."""
    store = Path(release.removeprefix("file://")).parents[2]
    shutil.copytree(store / "releases", tmp_path / "damaged" / "releases")
    folder = tmp_path / "damaged" / "releases" / "tiny" / "1"
    return folder.as_uri(), folder, read_release(release)[1]


def run(*words: str, **given: Any) -> Result:
    return CliRunner().invoke(app, ["run", *words], **given)


def test_run_answers_with_the_tokens_of_transformers(release: str, source: Path, tmp_path: Path) -> None:
    import transformers

    model = orchestrator.run(release, folder=tmp_path / "model")
    theirs: Any = transformers.AutoTokenizer.from_pretrained(source)
    prompt = theirs.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False)
    assert model.tokens(QUESTION) == prompt
    answer = model.generate(QUESTION, max_new_tokens=20)
    (expected,) = expected_tokens(source, [prompt], 20)
    assert (answer.tokens, answer.num_prompt_tokens) == (expected, len(prompt))
    assert answer.text.split() == theirs.decode(expected, skip_special_tokens=True).split()
    assert answer.tokens_per_second > 0


def test_run_of_the_command_line_streams_the_answer_and_prints_its_speed(release: str, tmp_path: Path) -> None:
    expected = orchestrator.run(release, folder=tmp_path / "model").generate(QUESTION, max_new_tokens=8).text
    found = run(release, QUESTION, "--max-tokens", "8", "--folder", str(tmp_path / "model"))
    assert found.exit_code == 0, found.output
    assert found.stdout == expected + "\n"
    assert "tokens/s" in found.stderr


def test_run_chat_remembers_what_was_said(release: str, tmp_path: Path) -> None:
    model = orchestrator.run(release, folder=tmp_path / "model")
    first = model.generate([{"role": "system", "content": "z"}, {"role": "user", "content": "a"}], max_new_tokens=4)
    history = [
        {"role": "system", "content": "z"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": first.text},
        {"role": "user", "content": "b"},
    ]  # fmt: skip
    second = model.generate(history, max_new_tokens=4)
    words = ["--interactive", "--system", "z", "--max-tokens", "4", "--folder", str(tmp_path / "model")]
    found = run(release, *words, input="a\n\nb\n")
    assert found.stdout == f"{first.text}\n{second.text}\n"


def test_run_batch_answers_every_line(release: str, tmp_path: Path) -> None:
    lines = [{"id": 7, "prompt": "a"}, {"messages": [{"role": "user", "content": "b c"}]}]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = run(release, "--batch", str(path), "--max-tokens", "4", "--folder", str(tmp_path / "model"))
    answers = [json.loads(line) for line in found.stdout.splitlines()]
    assert [{key: answer[key] for key in line} for answer, line in zip(answers, lines, strict=True)] == lines
    assert answers[0]["id"] == 7
    assert all(answer["num_tokens"] == 4 and answer["text"] for answer in answers)


@pytest.mark.parametrize(
    ("text", "reason"), [('{"prompt": "a"}\nnot json', "line 2"), ('{"messages": [{"role": 1}]}', "line 1"), ("[1]", "line 1")]
)
def test_run_batch_with_a_wrong_line_is_refused_before_anything_is_pulled(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    found = run("file:///nowhere", "--batch", str(path))
    assert found.exit_code == SpecError.exit_code
    assert reason in found.stderr


def test_run_without_a_prompt_is_refused() -> None:
    assert "give one of a prompt, --interactive and --batch" in run("file:///nowhere").stderr


def test_run_prompt_without_room_is_refused(release: str, tmp_path: Path) -> None:
    model = orchestrator.run(release, folder=tmp_path / "model")
    with pytest.raises(SpecError, match="more than the 64 positions"):
        model.generate("a " * 40, max_new_tokens=30)
    assert len(model.generate("a " * 50).tokens) <= 64 - 52


def test_run_release_without_a_portable_part_says_what_to_do(copied: tuple[str, Path, Manifest], tmp_path: Path) -> None:
    url, folder, manifest = copied
    (folder / "manifest.json").write_bytes(manifest.model_copy(update={"portable": ()}).to_json())
    with pytest.raises(ReleaseMissingError, match="has no portable part, it has: engines, checkpoint") as caught:
        orchestrator.run(url, folder=tmp_path / "model")
    assert "release.include: [engines, portable]" in caught.value.advice
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("role", ["graph", "weights", "config"])
def test_run_file_that_was_tampered_with_in_the_store_is_refused(
    role: str, copied: tuple[str, Path, Manifest], tmp_path: Path
) -> None:
    url, folder, manifest = copied
    file = next(file for file in manifest.files_of({0, 1}, ["portable"]) if file.role == role and file.path != "config.json")
    data = bytearray((folder / file.key).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file.key).unlink()
    (folder / file.key).write_bytes(data)
    with pytest.raises(DigestError, match=file.path.replace(".", r"\.")):
        orchestrator.run(url, folder=tmp_path / "model")
    with pytest.raises(DigestError):
        pull(url, tmp_path / "pulled", layout="genai")
    with pytest.raises(DigestError):
        verify(url)


def test_run_file_that_was_tampered_with_after_it_was_pulled_is_fetched_again(release: str, tmp_path: Path) -> None:
    first = orchestrator.run(release, folder=tmp_path / "model").generate(QUESTION, max_new_tokens=8)
    path = tmp_path / "model" / "stage0.onnx"
    right = path.read_bytes()
    path.write_bytes(right.replace(b"ArgMax", b"ArgMin"))
    assert orchestrator.run(release, folder=tmp_path / "model").generate(QUESTION, max_new_tokens=8).tokens == first.tokens
    assert path.read_bytes() == right


def test_run_folder_that_was_pulled_for_genai_runs_in_place(release: str, tmp_path: Path) -> None:
    pull(release, tmp_path / "model", layout="genai")
    first = orchestrator.run((tmp_path / "model").as_uri()).generate(QUESTION, max_new_tokens=4)
    assert first.tokens == orchestrator.run(release, folder=tmp_path / "other").generate(QUESTION, max_new_tokens=4).tokens
    (tmp_path / "model" / "stage0.onnx").write_bytes(b"")
    with pytest.raises(DigestError, match=r"stage0\.onnx"):
        orchestrator.run((tmp_path / "model").as_uri())


def test_run_model_without_a_chat_template_continues_the_text(release: str, tmp_path: Path) -> None:
    model = orchestrator.run(release, folder=tmp_path / "model")
    model._tokenizer._template = None
    assert model.tokens("a b") == model.tokens("a b", raw=True)
    with pytest.raises(SpecError, match="no chat template"):
        model.generate([{"role": "user", "content": "a"}])


def test_release_with_all_parts_stores_nothing_twice(release: str) -> None:
    _, manifest = read_release(release)
    assert manifest.parts == ("engines", "portable", "checkpoint")
    weights = [file for rank in manifest.ranks for file in rank.weights]
    assert len({file.key for file in manifest.all_files()}) == len(manifest.all_files())
    assert len(weights) == len({file.sha256 for file in weights}) > 2  # several shards per rank
    folder = Path(release.removeprefix("file://"))
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert stored - manifest.num_bytes == (folder / "manifest.json").stat().st_size


def test_build_with_other_parts_of_a_published_version_is_refused_and_named(release: str, source: Path) -> None:
    spec = decode(BuildSpec, {**plain_spec(source), "release": {"name": "tiny", "version": "1", "include": ["engines"]}}, "test")
    with pytest.raises(ReleaseExistsError, match=r"release\.include: \['engines'\], then"):
        orchestrator.build(spec, ClusterSpec(store=(source.parent / "store").as_uri()))


def test_pull_checkpoint_layout_can_be_compiled_and_read_again(release: str, source: Path, tmp_path: Path) -> None:
    from orchestrator.checkpoints import read_source

    pull(release, tmp_path / "checkpoint", layout="checkpoint")
    names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert {"config.json", "rank0.safetensors.index.json", "manifest.json"} <= names
    index, _ = read_source(str(tmp_path / "checkpoint"))
    ours, _ = read_source(str(source))
    assert index.format == "trtllm"
    assert set(ours.tensors) <= set(index.tensors)


def test_pull_part_that_a_layout_cannot_hold_is_refused(release: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="layout genai holds the part portable only"):
        pull(release, tmp_path / "out", layout="genai", parts=("engines",))
    found = CliRunner().invoke(app, ["pull", release, "--part", "weights", "--output", str(tmp_path / "out")])
    assert found.exit_code == SpecError.exit_code
    assert "no part 'weights'" in found.stderr


def test_pull_of_all_parts_flat_verifies_as_a_folder(release: str, tmp_path: Path) -> None:
    pull(release, tmp_path / "all", parts=("engines", "portable", "checkpoint"), check=False)
    assert verify((tmp_path / "all").as_uri()).num_files == len(read_release(release)[1].all_files())


def test_pull_of_engines_alone_brings_no_weights(release: str, tmp_path: Path) -> None:
    pull(release, tmp_path / "engines", check=False)
    assert not list((tmp_path / "engines").rglob("rank*.safetensors"))
    assert verify((tmp_path / "engines").as_uri()).num_files > 2


def test_check_compares_the_portable_part_with_what_the_release_was_verified_with(release: str, tmp_path: Path) -> None:
    done = run(release, "--check", "--folder", str(tmp_path / "model"))
    assert done.exit_code == 0, done.output
    found = re.search(r"check passed on 48 positions: relative error (\S+), top-1 agreement 1\.0000", done.stderr)
    assert found is not None, done.stderr
    assert float(found[1]) < 1e-5


def test_check_of_a_model_that_computes_something_else_fails(release: str, tmp_path: Path) -> None:
    """A graph on disk in which a norm divides by more, after the pull's own check."""
    import onnx

    folder = tmp_path / "model"
    orchestrator.run(release, folder=folder)
    (path,) = folder.glob("*.onnx")
    graph = onnx.load(path, load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if node.op_type == "RMSNormalization" and attribute.name == "epsilon":
                attribute.f = 0.05
    onnx.save(graph, path)
    numbers = read_numbers(folder / "reference.safetensors")
    model = Model(GenaiBackend(folder, 64, "cpu"), Tokenizer(folder))
    with pytest.raises(VerificationError, match=r"relative error .* > 5e-05"):
        model.check(numbers)
