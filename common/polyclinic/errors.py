"""Every error that Polyclinic raises on purpose, and the exit code it ends a command with.

    PolyclinicError            1  something failed while running
    ├── Refused                2  refused as asked: nothing has run
    │   ├── StudyError         2  the study file
    │   └── CohortError        2  the images or labels that a site points at
    ├── Collapsed              1  the encoder gives every image nearly the same features
    ├── QuorumLost             1  a round closed with fewer sites than `min_sites`
    ├── CheckpointError        1  a checkpoint that cannot be read
    ├── StorageError           1  the disk is full or cannot be written
    └── Interrupted          130  Ctrl-C, where there is more to say than that; what was finished is kept

Each says what is wrong (`problem`, naming where) and what to do about it (`fix`).
"""


class PolyclinicError(Exception):
    """Base of the tree: `problem` says what and where, `fix` what to do."""

    exit_code = 1

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem, fix)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem}\n  fix: {self.fix}"


class Refused(PolyclinicError):
    """What was asked cannot be done as asked; nothing has run."""

    exit_code = 2


class StudyError(Refused):
    """The study file is not one that can be run."""


class CohortError(Refused):
    """The images or labels that a site points at cannot be used."""


class Collapsed(PolyclinicError):
    """The encoder gives every image nearly the same features: more rounds would teach it nothing."""


class QuorumLost(PolyclinicError):
    """A round closed with fewer accepted updates than `min_sites`."""


class CheckpointError(PolyclinicError):
    """A checkpoint cannot be read."""


class StorageError(PolyclinicError):
    """The disk is full or cannot be written."""


class Interrupted(PolyclinicError):
    """Ctrl-C in what can be gone on with; `fix` says how."""

    exit_code = 130
