"""TensorBoard and MLflow callbacks."""

import importlib.util
import logging
import os

from ray import tune

from trainables.data.storage import absolute
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.study.spec import StudySpec


def log_callbacks(spec: StudySpec, files: StudyFiles) -> list[tune.Callback]:
    """Return Ray's callbacks for `spec.log`. Raises SpecError when what they need is not installed or does not answer."""
    callbacks: list[tune.Callback] = []
    if "tensorboard" in spec.log:
        from ray.tune.logger import TBXLoggerCallback

        callbacks.append(TBXLoggerCallback())
    if "mlflow" in spec.log:
        if importlib.util.find_spec("mlflow") is None:
            raise SpecError(
                "log=mlflow: mlflow is not installed; `pip install mlflow`, or leave it out"
            )
        from mlflow.exceptions import MlflowException
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table it makes
        asked = os.environ.get("MLFLOW_TRACKING_URI")
        uri = (
            asked or f"sqlite:///{absolute(files.root)}/mlflow.db"
        )  # MLflow takes no folder any more
        callback = MLflowLoggerCallback(tracking_uri=uri, experiment_name=files.root.name)
        try:
            callback.setup()  # as Tune will, but while the user can still mend it
        except MlflowException as error:
            where = (
                "MLFLOW_TRACKING_URI" if asked else "mlflow.db in the study"
            )  # a URI may hold a password
            raise SpecError(f"log=mlflow: {where}: {str(error).splitlines()[0]}") from None
        callbacks.append(callback)
    return callbacks
