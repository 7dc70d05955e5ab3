"""The folders in which Ray's workers look for modules."""

from ray.job_config import JobConfig

from trainables.machine.safe_path import SOURCE, installed


class OwnSearchPath(JobConfig):  # type: ignore[misc]  # Ray is not typed
    """A job whose workers look for modules where Python does, and for our code where this process has it.

    Ray puts the driver's current folder and the folder of its script before everything else in each worker, unless the job
    sets a working directory.
    """

    def __init__(self) -> None:
        super().__init__(_py_driver_sys_path=[] if installed() else [str(SOURCE)])

    def _runtime_env_has_working_dir(self) -> bool:
        """Answer Ray's question whether the driver's folders are to be left out."""
        return True
