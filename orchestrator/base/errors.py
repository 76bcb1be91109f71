"""One error per situation of the user, each with its own exit code and advice.

The message says what is wrong and where; `advice` says what to do. Exit codes are stable: scripts branch on them.
0 is success, 1 an error of ours (a bug), 2 wrong usage of the command line; the rest stands in the classes below.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Sequence
from typing import Any, ClassVar

BUG = "This is a bug: report it, with the command and the step's log."
"""Advice where no user is at fault."""

MESSAGE_BYTES, ADVICE_BYTES = 3000, 800
"""Longest message of an error, so that what is printed of it stays below 4 kB."""


def abbreviated(text: str, limit: int) -> str:
    """`text` in at most `limit` characters: a long one keeps its beginning and end around the number of characters."""
    if len(text) <= limit:
        return text
    note = f"...({len(text):,} characters)..."
    kept = max(limit - len(note), 8)
    return text[: kept - kept // 3] + note + text[len(text) - kept // 3 :]


def some_of(names: Sequence[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, and {len(names) - limit} more"


def bounded(text: str, limit_bytes: int) -> str:
    """`text` in at most `limit_bytes` bytes of UTF-8, abbreviated in its middle."""
    size = len(text.encode(errors="backslashreplace"))
    characters = len(text)
    while size > limit_bytes:
        characters = characters * limit_bytes // size - 1
        text = abbreviated(text, characters)
        size = len(text.encode(errors="backslashreplace"))
    return text


def is_text(text: str) -> bool:
    """Whether `text` can be encoded as UTF-8: file names and escapes of JSON and YAML may hold lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


class OrchestratorError(Exception):
    """Base of every error that a user can cause or mend."""

    exit_code: ClassVar[int] = 1
    default_advice: ClassVar[str] = ""

    def __init__(self, message: str, advice: str = "") -> None:
        self.message = bounded(message, MESSAGE_BYTES)
        self.advice = bounded(advice or self.default_advice, ADVICE_BYTES)
        super().__init__(self.message)
        if self.advice:
            self.add_note(self.advice)  # tracebacks print it: in a notebook, too, it is read

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep `advice` when the error crosses a process boundary."""
        return type(self), (self.message, self.advice)


class SpecError(OrchestratorError):
    """A spec or cluster file does not decode."""

    exit_code = 10
    default_advice = "Correct the named field; `orchestrator schema build|cluster` prints every field."


class TopologyError(OrchestratorError):
    """The model cannot be split the way that was asked."""

    exit_code = 11
    default_advice = "Choose sizes that divide the model; the error of `orchestrator plan` names those that do."


class ArchitectureError(OrchestratorError):
    """No family knows this model."""

    exit_code = 12
    default_advice = "Compare config.json with the publisher's; the README lists the families that are known."


class SourceMissingError(OrchestratorError):
    """The checkpoint, or a file that its index names, is missing."""

    exit_code = 13
    default_advice = "Download the checkpoint again; every file named in the index must be present."


class SourceCorruptError(OrchestratorError):
    """A file of the checkpoint is truncated, or its header does not describe it."""

    exit_code = 14
    default_advice = "Download the file again and compare its size and checksum with the publisher's."


class SourceUnreadableError(OrchestratorError):
    """A file or folder of the checkpoint exists but cannot be read."""

    exit_code = 38
    default_advice = "Give the user that builds the right to read the source's folder and every file in it (ls -lL)."


class SourceLinkError(OrchestratorError):
    """A file that would be published is a symbolic link that leads out of the source."""

    exit_code = 37
    default_advice = "Copy the file into the source's folder, if it is meant to be published, or remove the link."


class LfsPointerError(OrchestratorError):
    """A file of weights is a Git-LFS pointer."""

    exit_code = 15
    default_advice = "Run `git lfs pull` in the checkpoint's folder, then try again."


class WeightMapError(OrchestratorError):
    """The checkpoint's tensors do not add up to the model that its config describes."""

    exit_code = 16
    default_advice = "Compare config.json with the weights: one of them is of another model."


class StoreError(OrchestratorError):
    """The store cannot be read or written."""

    exit_code = 17
    default_advice = "Check that the store's URL exists and that this user may write to it."


class StoreFullError(StoreError):
    """A store, an output folder or a node's scratch folder is full."""

    exit_code = 34
    default_advice = "Free space there, or name a larger place, and run the same command again: committed steps are not repeated."


class ReleaseExistsError(OrchestratorError):
    """A different build is already published under this name and version."""

    exit_code = 18
    default_advice = "Releases are immutable: raise release.version in the spec."


class ReleaseMissingError(OrchestratorError):
    """The release, or a rank of it, does not exist."""

    exit_code = 19
    default_advice = "`orchestrator releases` lists what the store has."


class DigestError(OrchestratorError):
    """Bytes differ from those that were published."""

    exit_code = 20
    default_advice = (
        "The object was damaged or replaced after it was written. Fetch it again; if it stays wrong, raise release.version and "
        "build again: damaged outputs are found, and their steps run again."
    )


class DamagedOutputError(DigestError):
    """A stored output of a step differs from what the step wrote, or is gone."""

    exit_code = 39
    default_advice = "Check the disk or server under the store, then run the same command again: the step that wrote it runs again."

    def __init__(self, message: str, advice: str = "", key: str = "") -> None:
        super().__init__(message, advice)
        self.key = key
        """Key of the object in the store."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.advice, self.key)


class ReleaseAddressError(DigestError):
    """A release is stored under another name or version than its own."""

    exit_code = 35
    default_advice = (
        "Do not use it: another release, which may be an old one, was put in its place. Give the address of the release that the "
        "manifest names. A folder that a release is pulled to must not be called releases/NAME/VERSION of another."
    )


class ToolError(OrchestratorError):
    """A program or package is missing, or has the wrong version."""

    exit_code = 21
    default_advice = "Install the versions of constraints.txt, the same on the driver and on every node."


class ClusterError(OrchestratorError):
    """The cluster cannot be reached, or can never run a step of this plan."""

    exit_code = 22
    default_advice = "Look at the cluster's own state and logs, then run the same command again: committed steps are not repeated."


class StepFailedError(OrchestratorError):
    """A step failed for good. Committed steps stay committed."""

    exit_code = 23
    default_advice = "Mend the cause and run the same command again: committed steps are not repeated."


class VerificationError(OrchestratorError):
    """A rank's graph does not compute what the reference computes."""

    exit_code = 24
    default_advice = "Nothing was published. The step's log holds the numbers."


class MiniatureError(VerificationError):
    """The miniature of the model does not compute what it computes in transformers."""

    exit_code = 36
    default_advice = (
        "Nothing was built. A key of config.json means something else here than in transformers: correct it in the source, "
        "or report it with the config.json; real weights would give a wrong model too."
    )


class EngineBuildError(OrchestratorError):
    """TensorRT refused the graph."""

    exit_code = 25
    default_advice = "TensorRT's own messages stand in the step's log."


class QuantizationError(OrchestratorError):
    """The quantization does not exist, or does not apply to this model."""

    exit_code = 26
    default_advice = "Correct `quantization` in the spec; docs/quantization.md lists the algorithms and what each needs."


class SchemaVersionError(OrchestratorError):
    """A manifest is newer than this reader."""

    exit_code = 27
    default_advice = "Upgrade trt-orchestrator to read this release."


class SignatureError(OrchestratorError):
    """A release is not signed, or not by the given key."""

    exit_code = 32
    default_advice = "Do not use it. Ask its publisher for the public key, or for a release that is signed with it."


class MachineError(OrchestratorError):
    """This machine cannot run the engines that were asked for."""

    exit_code = 33
    default_advice = "Pull on the machine that runs them, or pass --no-check to fetch them anyway."


class NotFiniteError(OrchestratorError):
    """The weights hold NaN or infinity, and conversion.not_finite is error."""

    exit_code = 30
    default_advice = "Compare the file's checksum with the publisher's, or set conversion.not_finite: warn."


class DtypeError(OrchestratorError):
    """The weights do not fit into the dtype."""

    exit_code = 28
    default_advice = "Set another dtype in the spec, or auto."


class UnsafePickleError(OrchestratorError):
    """A pickled checkpoint holds more than tensors: loading it could run code of its author."""

    exit_code = 29
    default_advice = "Convert the checkpoint to safetensors in a sandbox, and only when you trust its author."


class UnreachableError(OrchestratorError):
    """The cluster's API does not answer."""

    exit_code = 40
    default_advice = "Check the address, and that this machine can reach it (port forwarding, VPN, proxy variables)."


class AuthenticationError(OrchestratorError):
    """The cluster refuses the credentials, or would get them over an unencrypted connection."""

    exit_code = 41
    default_advice = "Give this shell the cluster's credentials: RAY_AUTH_TOKEN, or a kubeconfig of a user who may do this."


class UnknownSubmissionError(OrchestratorError):
    """The cluster has no submitted build of this id."""

    exit_code = 42
    default_advice = "`orchestrator list`, or `orchestrator k8s list`, names those that it knows."


class DriverLostError(OrchestratorError):
    """The driver of a submitted build ended without a result: killed, crashed, or unable to run."""

    exit_code = 43
    default_advice = "Submit it again: committed steps are not repeated."


class NotStartedError(OrchestratorError):
    """A submitted build did not start in time."""

    exit_code = 44
    default_advice = "The cluster's log of the job says why. Mend that and submit again."


class DeadlineError(OrchestratorError):
    """A submitted build exceeded its deadline."""

    exit_code = 45
    default_advice = "Submit it again: committed steps are not repeated."


class EngineRunError(OrchestratorError):
    """The engines of a release cannot be run, or fail while they run."""

    exit_code = 47
    default_advice = "Look at the logs of all ranks: the first that failed says why, and the others waited for it."


class ManifestError(OrchestratorError):
    """A Kubernetes manifest breaks a rule, or cannot be read."""

    exit_code = 50
    default_advice = "Correct the named object; `orchestrator k8s validate` checks all of them."


class CancelledError(OrchestratorError):
    """The command was stopped by Ctrl-C (SIGINT)."""

    exit_code = 130
    default_advice = "Run the same command again to go on from the committed steps."


class TerminatedError(CancelledError):
    """The command was stopped by SIGTERM: by a scheduler, `orchestrator stop`, or a shutdown."""

    exit_code = 143


class Interrupted(KeyboardInterrupt):
    """Raised in the main thread by a signal to end the process. Not an Exception, so that error handlers let it pass."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def interruption(number: int) -> CancelledError:
    """Error of a command that the signal `number` stopped."""
    return TerminatedError("stopped by SIGTERM") if number == signal.SIGTERM else CancelledError("stopped")


_FULL = {errno.ENOSPC, errno.EDQUOT}
_ADVICE = {
    errno.EACCES: "Give this user the right to read and write there, or name another place.",
    errno.EPERM: "Give this user the right to read and write there, or name another place.",
    errno.EROFS: "The file system is mounted read-only: mount it writable, or name another place.",
    errno.EIO: "The disk or network file system fails: see the kernel's log, then run the same command again.",
    errno.ESTALE: "The network file system lost the file: see that it is mounted, then run the same command again.",
    errno.ENOTDIR: "A file stands where a folder is needed: name another place.",
    errno.EISDIR: "A folder stands where a file is needed: name another place.",
    errno.EEXIST: "A file stands where a folder is needed: name another place.",
    errno.ENAMETOOLONG: "Shorten the name or the path.",
    errno.EMFILE: "Raise the limit of open files: ulimit -n.",
    errno.ENFILE: "Raise the machine's limit of open files: sysctl fs.file-max.",
    errno.EFBIG: "The file system takes no files of this size: name another place.",
}


def store_error(what: str, error: OSError) -> StoreError:
    """StoreError for an OSError of a read or write, with advice that fits its cause. Raise it from `error`."""
    message = f"{what}: {error.strerror or error}"
    if error.errno in _FULL:
        return StoreFullError(message)
    return StoreError(message, _ADVICE.get(error.errno or 0, ""))


def error_classes() -> dict[str, type[OrchestratorError]]:
    """Every error class by name, to rebuild an error on the other side of a process boundary."""
    found: dict[str, type[OrchestratorError]] = {}
    pending: list[type[OrchestratorError]] = [OrchestratorError]
    while pending:
        cls = pending.pop()
        found[cls.__name__] = cls
        pending.extend(cls.__subclasses__())
    return found
