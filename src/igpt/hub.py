"""The Hugging Face Hub: models come down from it into its cache on this machine, and go up to it.

`huggingface_hub` does the work. Here it gets time limits, and what it raises becomes one sentence.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from igpt.errors import InputError

Choose = Callable[[Collection[str]], list[str]]  # some of the names of files
_TOKEN = "`hf auth login`, or HF_TOKEN in the environment"


def download(name: str, what: str, needed: str, more: Choose = lambda _: []) -> Path:
    """Download missing files of a model into the Hub's cache, and return their folder.

    Without the Hub, what the cache has of the model is used, if that is enough.

    Args:
        what: is looked for, in words.
        needed: name of a file.
        more: chooses more of the names of its files, and raises InputError where these are not
            enough.

    Raises:
        InputError: a bad name, no such model or file, or no network and not enough of it in the
            cache.
    """
    try:
        require_name(name)
    except InputError as error:
        raise InputError(f"no {what} {name} here, and {error}") from None
    from huggingface_hub import constants, model_info, snapshot_download, try_to_load_from_cache

    # snapshot_download has no time limit of its own: where packets vanish it would wait for ever
    try:
        files = [
            file.rfilename
            for file in model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT).siblings or ()
        ]
        if needed not in files:
            raise InputError(f"{needed} is missing")
        return Path(snapshot_download(name, allow_patterns=[needed, *more(files)]))
    except InputError as error:
        raise InputError(f"the Hub's {name}: {error}") from None
    except Exception as error:  # the network fails in many ways, proxies among them
        why = _in_words(error, name)
    found = try_to_load_from_cache(name, needed)
    try:
        if isinstance(found, str):
            more([path.name for path in Path(found).parent.iterdir()])
            return Path(found).parent
    except InputError:  # a download was cut off
        pass
    raise InputError(
        f"no {what} {name} here, and the Hub cannot give it: {why}; download its files elsewhere "
        f"({constants.ENDPOINT}/{name}) and give the path of their folder"
    )


def upload(name: str, files: Mapping[str, Path], *, private: bool = False, message: str) -> str:
    """Upload files to a model repository, created if necessary, and return its address.

    They go in one commit: all of them are there, or none.

    Args:
        name: USER/NAME.
        files: by their names in the repository.
        private: of a new repository; one that is there already must be private.

    Raises:
        InputError: a bad name, no token, no right to write, no network, or a public repository
            where it was to be private.
    """
    require_name(name)
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if get_token() is None:
        raise InputError(f"uploading needs a token with the right to write: {_TOKEN}")
    hub = HfApi()
    try:
        try:
            public = not hub.model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT).private
        except RepositoryNotFoundError:
            hub.create_repo(name, private=private)
            public = False
        if private and public:
            raise InputError(
                f"{name} is public on the Hub already; choose another name, or make it private "
                "there"
            )
        additions = [CommitOperationAdd(path, str(file)) for path, file in files.items()]
        hub.create_commit(name, additions, commit_message=message)
    except InputError:
        raise
    except Exception as error:
        folders = " and ".join(sorted({str(file.parent) for file in files.values()}))
        raise InputError(
            f"nothing was uploaded to {name}: {_in_words(error, name)}; repeat the command, "
            f"or upload the files by hand: {', '.join(files)} of {folders}"
        ) from None
    return f"{constants.ENDPOINT}/{name}"


def require_name(name: str) -> None:
    """Raise if a name cannot be that of a repository of the Hub.

    Raises:
        InputError: it is not USER/NAME.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
        is_valid = name.isascii() and name.count("/") == 1 and len(name) <= 96
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise InputError(
            f"{name!r} is not a valid name of a model on the Hub; USER/NAME is needed, of letters, "
            "digits, '-', '_' and '.'"
        )


def _in_words(error: BaseException, name: str) -> str:
    """What an error of `huggingface_hub` means."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    chain = [error]
    while cause := chain[-1].__cause__:  # what happened in an upload's thread is wrapped
        chain.append(cause)
    answers = [
        link for link in chain if isinstance(link, HfHubHTTPError) and link.response is not None
    ]
    if not answers:
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE forbids to ask it"
        if (
            isinstance(error, OSError)
            and error.strerror
            and not isinstance(error, ConnectionError | TimeoutError)
        ):
            where = f" ({error.filename})" if error.filename else ""
            return f"this machine reports {error.strerror!r}{where}"
        return f"there is no network, or it broke ({type(chain[-1]).__name__})"
    answer = answers[0]
    if isinstance(answer, GatedRepoError):
        return f"it asks for consent to terms, on the model's page, and for a token ({_TOKEN})"
    if isinstance(answer, RepositoryNotFoundError):
        return f"it has no such model, or none for this token ({_TOKEN})"
    code, said = answer.response.status_code, " ".join((answer.server_message or "").split())
    if code == 401:
        return f"it does not know the token ({_TOKEN})"
    if code == 403:
        return f"the token has no right to {name}"
    return f"it answers {code}{f' ({said:.200})' if said else ''}"
