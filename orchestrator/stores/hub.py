"""Models of the Hugging Face hub as sources: hf://ORG/MODEL, or hf://ORG/MODEL@REVISION. Read by ranges; nothing is downloaded.

A plan is made from one commit: `pinned` resolves a branch or tag to it, and every node reads that commit. Files are identified by
the hub's facts about their content, for large files the sha256.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, TypeVar

from orchestrator.base.errors import SourceMissingError, SourceUnreadableError, SpecError
from orchestrator.stores.fsspec import FsspecStore
from orchestrator.stores.retrying import Backoff, TransientError
from orchestrator.stores.store import Fetched, ObjectInfo

HUB_OFFLINE = "TRT_ORCHESTRATOR_HF_HUB_OFFLINE"
"""Environment variable for workers, whose libraries are offline: HF_HUB_OFFLINE of the process that started the build."""
SCHEME = "hf://"
_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_SECONDS = 60.0

T = TypeVar("T")


def is_hub(url: str) -> bool:
    """Whether a source is a model of the hub."""
    return url.startswith(SCHEME)


def pinned(url: str) -> str:
    """Return the URL of a source with the commit in place of a branch or tag; other URLs and paths unchanged."""
    return HubStore(url).pinned if is_hub(url) else url


class HubStore(FsspecStore):
    """A model of the hub at one revision: a read-only store."""

    def __init__(self, url: str, *, backoff: Backoff | None = None) -> None:
        """Raises SpecError."""
        super().__init__(url, backoff=backoff)
        found = _NAME.fullmatch(self.url.removeprefix(SCHEME))
        if found is None:
            raise SpecError(f"{url!r} is no model of the hub", "Write hf://ORG/MODEL, or hf://ORG/MODEL@REVISION.")
        self._repo, self._asked = found["repo"], found["revision"] or "main"

    @cached_property
    def _api(self) -> Any:
        from huggingface_hub import HfApi, constants

        # Libraries of a worker are offline; the worker's source is read as the user's own process would.
        choice = os.environ.get(HUB_OFFLINE)
        if choice is not None:
            constants.HF_HUB_OFFLINE = choice.upper() in {"1", "ON", "YES", "TRUE"}
        return HfApi()

    @cached_property
    def _commit(self) -> str:
        if _COMMIT.fullmatch(self._asked):
            return self._asked
        found = self._ask("look at it", partial(self._api.model_info, self._repo, revision=self._asked, timeout=_TIMEOUT_SECONDS))
        return str(found.sha)

    @property
    def pinned(self) -> str:
        """URL of this very commit."""
        return f"{SCHEME}{self._repo}@{self._commit}"

    @cached_property
    def _files(self) -> dict[str, Any]:
        tree = partial(self._api.list_repo_tree, self._repo, recursive=True, revision=self._commit)
        found = self._ask("list it", lambda: list(tree()))
        return {item.path: item for item in found if hasattr(item, "blob_id")}

    def _connect(self) -> None:
        """Nothing to connect: huggingface_hub has sessions of its own."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        yield from (ObjectInfo(name, file.size) for name, file in self._files.items() if name.startswith(prefix))

    def look(self, key: str) -> dict[str, Any] | None:
        """Return the facts of a file. Identity: sha256 of a large file, git blob id of others. Files of a commit never change."""
        file = self._files.get(key)
        if file is None:
            return None
        return {"size": file.size, **({"lfs": {"sha256": file.lfs.sha256}} if file.lfs else {"git": file.blob_id})}

    def fetch_once(self, key: str, begin: int, end: int | None) -> Fetched:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        def get() -> bytes:
            headers = {
                **build_hf_headers(),
                "Range": f"bytes={begin}-{'' if end is None else end - 1}",
                "Accept-Encoding": "identity",
            }
            url = hf_hub_url(self._repo, key, revision=self._commit, endpoint=self._api.endpoint)
            answer = get_session().get(url, headers=headers, timeout=_TIMEOUT_SECONDS, follow_redirects=True)
            hf_raise_for_status(answer)
            data = bytes(answer.content)
            return data[begin:end] if answer.status_code == 200 else data  # a server without ranges sends everything

        return Fetched(self._refused(get))

    def _ask(self, doing: str, request: Callable[[], T]) -> T:
        return self.retried(doing, lambda: self._refused(request))

    def _meaning(self, doing: str, attempts: int, failure: Exception) -> Exception:
        if isinstance(failure, TransientError):
            return SourceUnreadableError(f"cannot {doing} at {self.url}: {failure}", self._without_network)
        return super()._meaning(doing, attempts, failure)

    def _refused(self, request: Callable[[], T]) -> T:
        """Turn answers that a retry would not change into errors of ours."""
        from huggingface_hub import errors

        try:
            return request()
        except errors.GatedRepoError:
            raise SourceUnreadableError(
                f"{self._repo} is gated: the hub gives it to those who accepted its licence",
                f"Accept it at https://huggingface.co/{self._repo}, then run `hf auth login`, or set HF_TOKEN on every node.",
            ) from None
        except errors.RevisionNotFoundError:
            raise SourceMissingError(f"{self._repo} has no revision {self._asked!r}", "Give a branch, a tag or a commit.") from None
        except errors.RepositoryNotFoundError:
            raise SourceMissingError(
                f"the hub has no model {self._repo}, or does not show it to this user",
                "Check the name; for a private model run `hf auth login`, or set HF_TOKEN on every node.",
            ) from None
        except errors.OfflineModeIsEnabled:
            raise SourceUnreadableError(
                f"{self.url} cannot be read offline (HF_HUB_OFFLINE is set)", self._without_network
            ) from None
        except errors.HfHubHTTPError as error:
            if error.response is not None and error.response.status_code in (401, 403):
                raise SourceUnreadableError(
                    f"the hub refuses {self._repo}: {error.response.status_code}",
                    "Run `hf auth login` with a token that may read it, or set HF_TOKEN on every node.",
                ) from None
            raise

    @property
    def _without_network(self) -> str:
        return (
            f"Where there is a network: hf download {self._repo} --local-dir FOLDER; then give FOLDER as source.path. "
            "HF_ENDPOINT names a mirror."
        )
