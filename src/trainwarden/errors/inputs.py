"""INPUT_: the request or its data is wrong."""

from __future__ import annotations

from .families import InputError


class UsageError(InputError, code="INPUT_VALIDATION_FAILED", exit_code=64, http_status=400):
    """A command line option or an argument of a function has a value that it cannot have.

    ## Why this happens
    The value was read before anything started and does not make sense on its own: a negative number of
    steps, an unknown exit profile, two options that exclude each other. Nothing was loaded, written or
    changed.

    ## What to do
    Correct the argument that the message names. `warden COMMAND --help` lists what each option accepts.
    Repeating the same command fails in the same way.

    ## Example
    ```console
    $ warden train configs/quickstart.yaml --exit-profile slurm
    warden: unknown exit profile 'slurm'; known are warden, backpropagate, genolewm
    $ warden train configs/quickstart.yaml --exit-profile genolewm
    ```
    """

    template = "{problem}"
    suggestion = "Correct the argument; `warden COMMAND --help` lists what each one accepts."
    problem: str


class ConfigNotFoundError(InputError, code="INPUT_CONFIG_NOT_FOUND", exit_code=66, http_status=404):
    """The configuration file does not exist.

    ## Why this happens
    Relative paths start at the current directory, so a file that is there for one shell is missing for
    a job that starts elsewhere.

    ## What to do
    Check the spelling and the current directory, or give an absolute path.

    ## Example
    ```console
    $ warden train quickstart.yaml
    warden: there is no configuration file quickstart.yaml
    $ warden train configs/quickstart.yaml
    ```
    """

    template = "there is no configuration file {path}"
    suggestion = "Check the path; a relative one starts at the current directory."
    path: str


class RunNotFoundError(InputError, code="INPUT_RUN_NOT_FOUND", exit_code=66, http_status=404):
    """No run has this name, or the beginning of a name fits several.

    ## Why this happens
    A run is found by its id, by an unambiguous beginning of it, or by its directory. The ledger lists
    the runs that this user started on this machine; a run from another machine, or under another
    `WARDEN_HOME`, is only found by its directory.

    ## What to do
    List the runs and copy the id, or pass the path of the run directory.

    ## Example
    ```console
    $ warden resume calm-otter
    warden: no single run is called calm-otter; known are calm-otter-41, calm-otter-52
    $ warden runs ls
    $ warden resume calm-otter-41
    ```
    """

    template = "no single run is called {run}; known are {known}"
    suggestion = "`warden runs ls` lists the runs; the path of a run directory works too."
    run: str
    known: list[str]


class UnknownCodeError(InputError, code="INPUT_UNKNOWN_CODE", exit_code=64, http_status=404):
    """`warden explain` was asked about a code that does not exist.

    ## Why this happens
    The name is neither a code nor an alias of this version. A typing error is the usual cause; a log
    written by a newer version may also hold codes that this one does not have yet. Codes are never
    renamed or reused.

    ## What to do
    Take the closest name from the message, or list all of them. Upper and lower case make no
    difference.

    ## Example
    ```console
    $ warden explain RUNTIME_GPU_OM
    warden: there is no error code RUNTIME_GPU_OM; closest: RUNTIME_GPU_OOM
    $ warden explain RUNTIME_GPU_OOM
    $ warden explain --all
    ```
    """

    template = "there is no error code {asked}; closest: {closest}"
    suggestion = "`warden explain --all` lists every code."
    asked: str
    closest: list[str]


class DatasetError(InputError, code="INPUT_DATASET_INVALID", exit_code=65, http_status=422):
    """The data set cannot be trained on, for a reason that belongs to the whole of it.

    This is also the class to catch for every other data set error.

    ## Why this happens
    The file cannot be read. Or every row is well formed and the set still unusable: it is empty, every
    row was dropped, or nothing is left to train on after the prompts are masked.

    ## What to do
    Look at what the message names, and at the program that wrote the file. A tokenizer or a
    `max_length` that leaves nothing of a row has the same effect as an empty row.

    ## Example
    ```console
    $ warden train configs/lora.yaml
    warden: data/train.jsonl holds no rows
    $ wc -l data/train.jsonl
    ```
    """

    template = "{problem}"
    suggestion = "Look at the file that the message names, and at what wrote it."
    problem: str


class DatasetNotFoundError(DatasetError, code="INPUT_DATASET_NOT_FOUND", exit_code=66, http_status=404):
    """The data set file does not exist.

    ## Why this happens
    Relative paths in a configuration start at the current directory, not at the configuration file. A
    mount that is not there yet looks the same.

    ## What to do
    Check `data.train`, or override it on the command line.

    ## Example
    ```console
    $ warden train configs/lora.yaml
    warden: there is no data set at data/trian.jsonl
    $ warden train configs/lora.yaml -o data.train=data/train.jsonl
    ```
    """

    template = "there is no data set at {path}"
    suggestion = "Check `data.train`; a relative path starts at the current directory."
    path: str


class DatasetParseError(DatasetError, code="INPUT_DATASET_PARSE_FAILED", exit_code=65, http_status=422):
    """A line of the data set is not valid JSON.

    ## Why this happens
    A JSONL file holds one complete JSON object on each line. Usual causes: a file that was cut off
    while being copied (the last line), an object spread over several lines, single quotes, a trailing
    comma, or text that is not UTF-8.

    ## What to do
    Open the file at the line that the message names and correct it. Nothing is skipped silently:
    training on the rest is a decision that you make by removing the line.

    ## Example
    ```console
    $ warden train configs/lora.yaml
    warden: data/train.jsonl, line 812: Unterminated string starting at column 17
    $ sed -n 812p data/train.jsonl
    ```
    """

    template = "{path}[, line {line}]: {problem}"
    suggestion = "Correct or remove the line: each one holds one complete JSON object."
    path: str
    line: int
    problem: str


class DatasetValidationError(DatasetError, code="INPUT_DATASET_VALIDATION_FAILED", exit_code=65, http_status=422):
    """A row has a known format but its content breaks the rules of that format.

    ## Why this happens
    The keys say what the row is meant to be, and something in it does not fit: a message without a
    role, a text that is a number, a conversation without an answer to learn from.

    ## What to do
    Correct the row at the line that the message names. When one row is wrong, the program that wrote it
    has often made more like it.

    ## Example
    ```console
    $ warden train configs/lora.yaml
    warden: data/chat.jsonl, line 3: message 2 has the role 'bot'; known are system, user, assistant
    $ sed -i '3s/"bot"/"assistant"/' data/chat.jsonl
    ```
    """

    template = "{path}[, line {line}]: {problem}"
    suggestion = "Correct the row; the line number counts from 1."
    path: str
    line: int
    problem: str


class DatasetFormatError(DatasetError, code="INPUT_DATASET_FORMAT_UNSUPPORTED", exit_code=65, http_status=422):
    """The keys of a row fit none of the supported row formats.

    ## Why this happens
    The format is recognised by the keys: conversations, instruction and response, or plain text. Keys
    of another name (`source` and `target`, say) are not guessed at, because a wrong guess trains on the
    wrong text.

    ## What to do
    Rename the keys to those of a format that the message lists.

    ## Example
    ```console
    $ warden train configs/lora.yaml
    warden: qa.jsonl, line 1: the keys source, target fit no supported row format (question, answer; text)
    $ jq -c '{question: .source, answer: .target}' qa.jsonl > train.jsonl
    ```
    """

    template = "{path}[, line {line}]: the keys {keys} fit no supported row format ({supported})"
    suggestion = "Rename the keys to those of a supported format."
    path: str
    line: int
    keys: list[str]
    supported: list[str]
